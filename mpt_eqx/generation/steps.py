"""Steps of decoding: the program of several steps in a scan, and the loop on the host that calls it.

Arguments are checked before, in `validate` and `sampling_params`.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from mpt_eqx.errors import GenerationError
from mpt_eqx.generation.buckets import DECODE_CHUNK
from mpt_eqx.generation.interrupts import held_interrupts
from mpt_eqx.generation.layers import with_blocks_once
from mpt_eqx.generation.sampling import LogitsProcessor, log_softmax, process_logits, sample
from mpt_eqx.generation.sampling_params import SamplingParams
from mpt_eqx.generation.state import DecodeState, OverRows, constrain, constrain_replicated, ensure_capacity, replicate
from mpt_eqx.model import MPT, KVCache
from mpt_eqx.model.flat import async_jit, flat
from mpt_eqx.model.taps import Edit, editing
from mpt_eqx.ops.platform import is_default


class StepOutput(eqx.Module):
    """The tokens of one decode step, or of N of them with a leading axis.

    Attributes:
        tokens: one for each row.
        logprobs: the model's log-probability of each, before any processing; 0 after the end of a row.
        logits: the model's logits that each was chosen from, if they were asked for.
        done: as in the state after the step, like the next two.
        not_finite: the first step of each row with logits that were not finite.
        nothing_left: the first step of each row at which no token was allowed.
    """

    tokens: Int[Array, "*N B"]
    logprobs: Float32[Array, "*N B"]
    logits: Float32[Array, "*N B V"] | None
    done: Bool[Array, "*N B"]
    not_finite: Int[Array, "*N B"]
    nothing_left: Int[Array, "*N B"]


@async_jit
def decode_chunk(
    fixed: tuple[MPT, SamplingParams, Key[Array, "*B"], tuple[LogitsProcessor, ...]],
    state: DecodeState,
    steps: int,
    with_logits: bool,
    asked: frozenset[str] | None = None,
) -> tuple[DecodeState, StepOutput]:
    """Decodes `steps` more tokens of each row, in one scan; rows that have ended get padding.

    Args:
        fixed: the model, the options of each row, the key, and the functions of `logits_processors`. They stand
            together because all other arguments are donated.
        state: from `prefill_chunk` or an earlier call, with room for the tokens. Donated: do not use it again.
        steps: length of the scan.
        with_logits: whether to return the logits that each token was chosen from.
        asked: as in `sample`.
    """
    model, params, key, processors = fixed
    fixed = (with_blocks_once(model, state.cache.layers), params, key, processors)

    def one(state: DecodeState, _: None) -> tuple[DecodeState, StepOutput]:
        return chosen_step(fixed, state, with_logits, asked=asked)

    state, output = jax.lax.scan(one, constrain(model, state), length=steps)
    return constrain(model, state), constrain_replicated(model, output)


def chosen_step(
    fixed: tuple[MPT, SamplingParams, Key[Array, "*B"], tuple[LogitsProcessor, ...]],
    state: DecodeState,
    with_logits: bool,
    numbers: Int[Array, " B"] | None = None,
    over_rows: OverRows = jax.vmap,
    bias: Float32[Array, "B V"] | None = None,
    asked: frozenset[str] | None = None,
) -> tuple[DecodeState, StepOutput]:
    """Returns the state with one more token in each row, chosen as the options say, and what `decode_chunk` returns.

    Args:
        fixed: as there.
        state: of the rows.
        with_logits: as there.
        numbers: as in `sample`.
        over_rows: `jax.vmap` or `one_row`.
        bias: what is added to the logits after the processors; −∞ bans a token.
        asked: as in `sample`.
    """
    model, params, key, processors = fixed
    logits = next_logits(model, state.hidden, over_rows)
    # Which token is chosen has no derivative, and loops of unknown length choose it.
    fixed_logits = jax.lax.stop_gradient(logits)
    processed = process_logits(fixed_logits, params, state.tokens, state.cache.length, state.step, processors, asked)
    processed = processed if bias is None else processed + bias
    chosen = sample(processed, params, key, state.step, numbers, asked)
    tokens = jnp.where(state.done, params.pad_token_id, chosen)
    logprobs = jnp.take_along_axis(jax.vmap(log_softmax)(logits), chosen[:, None], axis=-1)[:, 0]
    ended = jnp.any(chosen[:, None] == params.eos_token_ids, axis=-1)
    # Not under a cond on `done`: XLA would copy the whole cache in and out of it at every step.
    after = decode_step(model, state, tokens, over_rows)
    output = StepOutput(
        tokens=tokens,
        logprobs=jnp.where(state.done, 0.0, logprobs),
        logits=jnp.where(state.done[:, None], 0.0, logits) if with_logits else None,
        done=state.done | ended | (state.step + 1 >= params.max_new_tokens),
        not_finite=first_steps(state, state.not_finite, not_finite(logits, processed if processors else None)),
        nothing_left=first_steps(state, state.nothing_left, jnp.all(jnp.isneginf(processed), axis=-1)),
    )
    return dataclasses.replace(
        after,
        step=state.step + 1,
        done=output.done,
        not_finite=output.not_finite,
        nothing_left=output.nothing_left,
    ), output


def decode_step(
    model: MPT, state: DecodeState, tokens: Int[Array, " B"], over_rows: OverRows = jax.vmap
) -> DecodeState:
    """Returns the state with one more token in each row."""
    model = with_blocks_once(model, state.cache.layers)

    def row(
        cache: KVCache, so_far: Int[Array, " S"], edits: dict[str, tuple[Edit, ...]], token: Int[Array, ""]
    ) -> tuple[KVCache, Int[Array, " S"], Float[Array, " D"]]:
        # A row that has ended may stand at the end of its cache while others go on.
        at = jnp.minimum(cache.length, cache.capacity - 1)
        x, new = model.extend(token[None], eqx.tree_at(lambda c: c.length, cache, at), tap=editing(edits))
        new = eqx.tree_at(lambda c: c.length, new, cache.length + 1)
        return new, so_far.at[cache.length].set(token, mode="drop"), x[0]

    cache, so_far, hidden = over_rows(row)(state.cache, state.tokens, state.edits, tokens)
    return constrain(model, eqx.tree_at(lambda s: (s.cache, s.tokens, s.hidden), state, (cache, so_far, hidden)))


def next_logits(model: MPT, hidden: Float[Array, "B D"], over_rows: OverRows = jax.vmap) -> Float32[Array, "B V"]:
    """Returns the logits of each row's next token."""
    return over_rows(lambda x: model.unembed(x[None])[0])(hidden).astype(jnp.float32)


def not_finite(logits: Float32[Array, "B V"], processed: Float32[Array, "B V"] | None) -> Bool[Array, " B"]:
    """Tells of each row whether its logits are not all finite, or NaN is among what processors made of them."""
    bad = ~jnp.all(jnp.isfinite(logits), axis=-1)
    return bad if processed is None else bad | jnp.any(jnp.isnan(processed), axis=-1)


def first_steps(state: DecodeState, so_far: Int[Array, " B"], bad: Bool[Array, " B"]) -> Int[Array, " B"]:
    """Returns the first step of each row at which it had not ended and was bad, or −1."""
    return jnp.where((so_far < 0) & bad & ~state.done, state.step, so_far)


def decode_tokens(
    model: MPT,
    state: DecodeState,
    params: SamplingParams,
    key: Key[Array, "*B"],
    *,
    length: int,
    max_new_tokens: int,
    chunk: int = DECODE_CHUNK,
    with_logits: bool = False,
    processors: tuple[LogitsProcessor, ...] = (),
) -> Iterator[StepOutput]:
    """Yields the tokens of `chunk` steps at a time, at most max_new_tokens in all, until every row has ended.

    Args:
        model: the model.
        state: after the prompts. Donated.
        params: the options of each row.
        key: randomness, one or one for each row.
        length: tokens of the longest row so far.
        max_new_tokens: as above.
        chunk: decode steps between two host syncs.
        with_logits: whether to keep the logits of each step.
        processors: the functions of `logits_processors`.

    Raises:
        GenerationError: logits were not finite, or no token was left to choose from.
    """
    asked = known_options(model, params)
    fixed = flat((model, *replicate(model, (params, key)), processors))
    # A GPU gets its next chunk before the host has read this one: it would wait for the host otherwise.
    begun, waiting, ahead = 0, deque[StepOutput](), 0 if is_default("cpu") else 1
    for decoded in range(0, max_new_tokens, chunk):
        with held_interrupts():
            while begun < max_new_tokens and begun <= decoded + ahead * chunk:
                state = ensure_capacity(model, state, length + min(begun + chunk, max_new_tokens))
                state, output = decode_chunk(fixed, state, chunk, with_logits, asked)
                waiting.append(output)
                begun += chunk
            output = jax.device_get(waiting.popleft())
        check_finite(output.not_finite[-1], processors)
        if (output.nothing_left[-1] >= 0).any():
            raise GenerationError(nothing_left(output.nothing_left[-1], processors))
        last = min(chunk, max_new_tokens - decoded)
        yield jax.tree.map(lambda x, last=last: x[:last], output)
        if output.done[-1].all():
            return


def known_options(model: MPT, params: SamplingParams) -> frozenset[str] | None:
    """Returns the options that a program is compiled for; None on CPUs, where one for all is as fast.

    On a GPU each branch of a program, and each loop of unknown length, waits for the host.
    """
    return None if is_default("cpu") else params.asked(model.config.vocab_size)


def compile_decode(
    model: MPT,
    state: DecodeState,
    params: SamplingParams,
    key: Key[Array, "*B"],
    *,
    chunk: int,
    with_logits: bool,
    processors: tuple[LogitsProcessor, ...],
) -> None:
    """Compiles what `decode_tokens` calls with these arguments, which will be found then.

    Compiling takes memory of its own, which is free again when a large cache is made after it.
    """
    fixed = flat((model, *replicate(model, (params, key)), processors))
    asked = known_options(model, params)  # also where it is None: left out, it would be another program
    decode_chunk.lower(fixed, state, chunk, with_logits, asked).compile()  # type: ignore[attr-defined]


def check_finite(bad_steps: Int[np.ndarray, " B"], processors: tuple[LogitsProcessor, ...] = ()) -> None:
    """Raises unless `bad_steps`, the first new token of each row whose logits were not finite, are all −1 for none."""
    if (bad_steps >= 0).any():
        where = "what logits_processors return and in the weights" if processors else "the weights"
        raise GenerationError(
            f"the logits of new token {_first(bad_steps)} are not finite; look for NaN or infinity in {where} with "
            f"from_pretrained(…, check_finite=True), or use a wider dtype"
        )


def nothing_left(empty_steps: Int[np.ndarray, " B"], processors: tuple[LogitsProcessor, ...]) -> str:
    """Returns what to say where a row had no token to choose from."""
    return f"no token is left to choose from for new token {_first(empty_steps)}; {loosen(processors)}"


def _first(steps: Int[np.ndarray, " B"]) -> int:
    return int(steps[steps >= 0].min())


def loosen(processors: tuple[LogitsProcessor, ...]) -> str:
    """Returns what to do where no token is left."""
    return f"loosen no_repeat_ngram_size, min_new_tokens{', logits_processors' if processors else ''} or vocab_size"
