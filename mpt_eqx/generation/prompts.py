"""Prefill: prompts into the cache, chunk by chunk, and the bar that shows it."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from mpt_eqx.checkpoint.progress import is_shown
from mpt_eqx.generation.buckets import prefill_buckets
from mpt_eqx.generation.interrupts import held_interrupts
from mpt_eqx.generation.layers import with_blocks_once
from mpt_eqx.generation.state import DecodeState, OverRows, constrain, replicate, row_of, with_row, without_idle_edits
from mpt_eqx.model import MPT, KVCache
from mpt_eqx.model.flat import Flat, flat
from mpt_eqx.model.taps import Edit, editing
from mpt_eqx.ops.platform import prefills_by_row


def prefill_prompts(
    model: MPT, state: DecodeState, prompts: Sequence[np.ndarray], before: int, progress: tqdm
) -> DecodeState:
    """Returns the state after all prompts, which are prefilled chunk by chunk.

    Args:
        model: the model.
        state: as many rows, of `before` tokens each. Donated.
        prompts: token ids of each row, of any lengths.
        before: as above.
        progress: counts the tokens of the longest prompt.
    """
    longest, total = max(map(len, prompts)), sum(map(len, prompts))

    def report(done: int) -> None:
        progress.update(min(done, longest) - progress.n)

    if len(prompts) == 1 or not prefills_by_row(state.hidden):
        return prefill_rows(model, state, prompts, before, report)
    done = 0
    for row, prompt in enumerate(prompts):
        if len(prompt):
            number = np.asarray(row, np.int32)
            with held_interrupts():
                alone = without_idle_edits(row_of(state, number))
            alone = prefill_rows(model, alone, [prompt], before, lambda _: None)
            with held_interrupts():
                state = with_row(alone, state, number)
            done += len(prompt)
            report(done * longest // total)
    return state


def prefill_rows(
    model: MPT,
    state: DecodeState,
    prompts: Sequence[np.ndarray],
    before: int,
    report: Callable[[int], object],
) -> DecodeState:
    """Returns the state after all prompts, prefilled together; arguments as in `prefill_prompts`.

    `report` is told after each chunk how many tokens the longest has had.
    """
    # A row is padded with its own last token: one that it does not have could make NaN of it.
    others = max(prompts, key=len)[:1]
    fillers = [(prompt if len(prompt) else others)[-1:] for prompt in prompts]
    ends = np.asarray([before + len(prompt) for prompt in prompts], np.int32)
    start, apart = 0, flat(model)
    for size in prefill_buckets(max(map(len, prompts)), len(prompts)):
        chunk = np.empty((len(prompts), size), np.int32)
        for row, prompt, filler in zip(chunk, prompts, fillers, strict=True):
            here = prompt[start : start + size]
            row[:] = [*here, *filler.tolist() * (size - len(here))]
        with held_interrupts():
            state = prefill_chunk(apart, state, *replicate(model, (chunk, ends)))
            # Otherwise the host would be done long before the device, with a copy of the cache waiting for every chunk.
            jax.block_until_ready(state.hidden)
        start += size
        report(start)
    return state


@eqx.filter_jit(donate="all-except-first")
def prefill_chunk(
    model: MPT | Flat, state: DecodeState, chunk: Int[Array, "B T"], ends: Int[Array, " B"]
) -> DecodeState:
    """Returns the state after T more tokens of each prompt.

    Args:
        model: the model, or what `flat` makes of it.
        state: the tokens so far. Donated: do not use it again.
        chunk: the next tokens, with any valid id after the end of a prompt. Donated, like the next.
        ends: how many tokens each row has at the end of its prompt.
    """
    return read_chunk(model.whole() if isinstance(model, Flat) else model, state, chunk, ends)[0]


def read_chunk(
    model: MPT,
    state: DecodeState,
    chunk: Int[Array, "B T"],
    ends: Int[Array, " B"],
    over_rows: OverRows = jax.vmap,
) -> tuple[DecodeState, Float[Array, "B T D"]]:
    """Returns what `prefill_chunk` does and the outputs of norm_f, within another program.

    `over_rows` is `jax.vmap` or `one_row`.
    """
    model = with_blocks_once(model, state.cache.layers)

    def row(
        cache: KVCache,
        tokens: Int[Array, " S"],
        hidden: Float[Array, " D"],
        edits: dict[str, tuple[Edit, ...]],
        chunk: Int[Array, " T"],
        end: Array,
    ) -> tuple[KVCache, Int[Array, " S"], Float[Array, " D"], Float[Array, "T D"]]:
        places = cache.length + jnp.arange(chunk.shape[0])
        last = end - 1 - cache.length
        x, new = model.extend(chunk, cache, tap=editing(edits))
        new = eqx.tree_at(lambda c: c.length, new, jnp.minimum(new.length, end))
        here = (last >= 0) & (last < chunk.shape[0])
        hidden = jnp.where(here, x[jnp.clip(last, 0, chunk.shape[0] - 1)], hidden)
        return new, tokens.at[places].set(chunk, mode="drop"), hidden, x

    cache, tokens, hidden, x = over_rows(row)(state.cache, state.tokens, state.hidden, state.edits, chunk, ends)
    after = eqx.tree_at(lambda s: (s.cache, s.tokens, s.hidden), state, (cache, tokens, hidden))
    return constrain(model, after), x


def progress_bar(total: int, shown: bool | None, description: str = "generating") -> tqdm:
    """Returns a bar on stderr that counts tokens, and shows itself after two seconds; None: only in a terminal."""
    return tqdm(total=total, desc=description, unit=" tokens", disable=not is_shown(shown), delay=2, leave=False)
