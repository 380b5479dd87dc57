"""Prefill and decode: the programs that are compiled, and after them the loops on the host that call them.

Arguments are checked before, in `validate` and `sampling_params`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Float32, Int, Key
from tqdm import tqdm

from mpt_eqx.errors import GenerationError
from mpt_eqx.generation.buckets import DECODE_CHUNK, cache_bucket, prefill_buckets
from mpt_eqx.generation.sampling import LogitsProcessor, process_logits, sample
from mpt_eqx.generation.sampling_params import SamplingParams
from mpt_eqx.model import MPT, KVCache
from mpt_eqx.ops.layout import Layout


class DecodeState(eqx.Module):
    """B rows between two steps.

    Attributes:
        cache: keys and values of the tokens so far; each row has its own length.
        tokens: the tokens so far, at their places in the cache; what stands from a row's length on means nothing.
        hidden: the last token's output of norm_f, from which the next token is chosen.
        done: rows that have ended; they only get padding.
        step: how many tokens each row was given, counting padding.
        not_finite: the first step with logits that were not finite, in any row that had not ended; −1 for none.
        nothing_left: the first step at which no token was allowed, in any row that had not ended; −1 for none.
    """

    cache: KVCache
    tokens: Int[Array, "B S"]
    hidden: Float[Array, "B D"]
    done: Bool[Array, " B"]
    step: Int[Array, ""]
    not_finite: Int[Array, ""]
    nothing_left: Int[Array, ""]


class StepOutput(eqx.Module):
    """The tokens of one decode step, or of N of them with a leading axis.

    Attributes:
        tokens: one for each row.
        logprobs: the model's log-probability of each, before any processing; 0 after the end of a row.
        logits: the model's logits that each was chosen from, if they were asked for.
    """

    tokens: Int[Array, "*N B"]
    logprobs: Float32[Array, "*N B"]
    logits: Float32[Array, "*N B V"] | None


def empty_state(model: MPT, rows: int, capacity: int) -> DecodeState:
    """Returns a state of rows without tokens, with room for `capacity` tokens in each."""
    dtype, layout = model.wte.weight.dtype, model.layout

    def zeros() -> DecodeState:
        one = KVCache.empty(model.config, capacity, dtype)
        return DecodeState(
            cache=jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), one),
            tokens=jnp.zeros((rows, one.capacity), jnp.int32),
            hidden=jnp.zeros((rows, model.config.d_model), dtype),
            done=jnp.zeros((rows,), bool),
            step=jnp.zeros((), jnp.int32),
            not_finite=jnp.zeros((), jnp.int32),
            nothing_left=jnp.zeros((), jnp.int32),
        )

    state = map_with_axes(jax.eval_shape(zeros), lambda x, *names: new_array(layout, x.shape, x.dtype, 0, *names))
    nothing = tuple(new_array(layout, (), np.int32, -1) for _ in range(2))
    return eqx.tree_at(lambda s: (s.not_finite, s.nothing_left), state, nothing)


def new_array(
    layout: Layout | None, shape: tuple[int, ...], dtype: DTypeLike, value: float, *names: str | None
) -> Array:
    """Returns a new array, by numpy so that no shape costs a compilation, and copied so that it can be donated."""
    if layout is None:
        return jax.device_put(np.full(shape, value, dtype), may_alias=False)
    sharding = layout.sharding(shape, *names)
    part = sharding.shard_shape(shape)
    return jax.make_array_from_callback(shape, sharding, lambda _: np.full(part, value, dtype))


def map_with_axes(state: DecodeState, function: Callable[..., Any]) -> DecodeState:
    """Returns the state with function(array, name of each axis, …) of each; what the host reads has no names."""

    def whole(x: Any) -> Any:
        return function(x, *(None,) * len(x.shape))

    layers = jax.tree.map(lambda x: function(x, "batch", "kv_heads", None, "head_dim"), state.cache.layers)
    length = function(state.cache.length, "batch")
    return DecodeState(
        cache=eqx.tree_at(lambda c: (c.layers, c.length), state.cache, (layers, length)),
        tokens=function(state.tokens, "batch", None),
        hidden=function(state.hidden, "batch", None),
        done=whole(state.done),
        step=whole(state.step),
        not_finite=whole(state.not_finite),
        nothing_left=whole(state.nothing_left),
    )


def constrain(model: MPT, state: DecodeState) -> DecodeState:
    """Returns the state as it is sharded over the model's mesh, if there is one."""
    return state if model.layout is None else map_with_axes(state, model.layout.constrain)


def constrain_replicated(model: MPT, tree: Any) -> Any:
    """Returns arrays that the host is to read, replicated over the model's mesh, if there is one."""
    return tree if model.layout is None else model.layout.constrain_replicated(tree)


@eqx.filter_jit
def repeat_and_resize(state: DecodeState, copies: int, capacity: int) -> DecodeState:
    """Returns the state with each row `copies` times in succession, and room for `capacity` tokens in each."""

    def repeated(x: Array) -> Array:
        # The copy is for the case that nothing changes: what is returned will be donated, what came in will not.
        return jnp.repeat(x, copies, axis=0) if copies > 1 else jnp.copy(x)

    rows = (state.cache, state.tokens, state.hidden, state.done)
    cache, tokens, hidden, done = jax.tree.map(repeated, rows)
    cache = jax.vmap(lambda row: row.resized(capacity))(cache)
    tokens = jnp.pad(tokens, ((0, 0), (0, cache.capacity - tokens.shape[1])))
    return DecodeState(
        cache=cache,
        tokens=tokens,
        hidden=hidden,
        done=done,
        step=jnp.copy(state.step),
        not_finite=jnp.copy(state.not_finite),
        nothing_left=jnp.copy(state.nothing_left),
    )


@eqx.filter_jit(donate="all-except-first")
def prefill_chunk(model: MPT, state: DecodeState, chunk: Int[Array, "B T"], ends: Int[Array, " B"]) -> DecodeState:
    """Returns the state after T more tokens of each prompt.

    Args:
        model: the model.
        state: the tokens so far. Donated: do not use it again.
        chunk: the next tokens, with any valid id after the end of a prompt. Donated, like the next.
        ends: how many tokens each row has at the end of its prompt.
    """

    def row(
        cache: KVCache, tokens: Int[Array, " S"], hidden: Float[Array, " D"], chunk: Int[Array, " T"], end: Array
    ) -> tuple[KVCache, Int[Array, " S"], Float[Array, " D"]]:
        places = cache.length + jnp.arange(chunk.shape[0])
        last = end - 1 - cache.length
        x, new = model.extend(chunk, cache)
        new = eqx.tree_at(lambda c: c.length, new, jnp.minimum(new.length, end))
        here = (last >= 0) & (last < chunk.shape[0])
        hidden = jnp.where(here, x[jnp.clip(last, 0, chunk.shape[0] - 1)], hidden)
        return new, tokens.at[places].set(chunk, mode="drop"), hidden

    cache, tokens, hidden = jax.vmap(row)(state.cache, state.tokens, state.hidden, chunk, ends)
    return constrain(model, eqx.tree_at(lambda s: (s.cache, s.tokens, s.hidden), state, (cache, tokens, hidden)))


@eqx.filter_jit(donate="all-except-first")
def decode_chunk(
    fixed: tuple[MPT, SamplingParams, Key[Array, ""], tuple[LogitsProcessor, ...]],
    state: DecodeState,
    steps: int,
    with_logits: bool,
) -> tuple[DecodeState, StepOutput]:
    """Decodes `steps` more tokens of each row, in one scan; rows that have ended get padding.

    Args:
        fixed: the model, the options of each row, the key, and the functions of `logits_processors`. They stand
            together because all other arguments are donated.
        state: from `prefill_chunk` or an earlier call, with room for the tokens. Donated: do not use it again.
        steps: length of the scan.
        with_logits: whether to return the logits that each token was chosen from.
    """
    model, params, key, processors = fixed

    def one(state: DecodeState, _: None) -> tuple[DecodeState, StepOutput]:
        logits = next_logits(model, state.hidden)
        processed = process_logits(logits, params, state.tokens, state.cache.length, state.step, processors)
        chosen = sample(processed, params, key, state.step)
        tokens = jnp.where(state.done, params.pad_token_id, chosen)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=-1)[:, 0]
        output = StepOutput(
            tokens=tokens,
            logprobs=jnp.where(state.done, 0.0, logprobs),
            logits=jnp.where(state.done[:, None], 0.0, logits) if with_logits else None,
        )
        ended = jnp.any(chosen[:, None] == params.eos_token_ids, axis=-1)
        # Not under a cond on `done`: XLA would copy the whole cache in and out of it at every step.
        after = decode_step(model, state, tokens)
        return eqx.tree_at(
            lambda s: (s.done, s.step, s.not_finite, s.nothing_left),
            after,
            (
                state.done | ended | (state.step + 1 >= params.max_new_tokens),
                state.step + 1,
                first_step(state, state.not_finite, not_finite(logits, processed if processors else None)),
                first_step(state, state.nothing_left, jnp.all(jnp.isneginf(processed), axis=-1)),
            ),
        ), output

    state, output = jax.lax.scan(one, constrain(model, state), length=steps)
    return constrain(model, state), constrain_replicated(model, output)


def decode_step(model: MPT, state: DecodeState, tokens: Int[Array, " B"]) -> DecodeState:
    """Returns the state with one more token in each row."""

    def row(
        cache: KVCache, so_far: Int[Array, " S"], token: Int[Array, ""]
    ) -> tuple[KVCache, Int[Array, " S"], Float[Array, " D"]]:
        x, new = model.extend(token[None], cache)
        new = eqx.tree_at(lambda c: c.length, new, cache.length + 1)
        return new, so_far.at[cache.length].set(token, mode="drop"), x[0]

    cache, so_far, hidden = jax.vmap(row)(state.cache, state.tokens, tokens)
    return constrain(model, eqx.tree_at(lambda s: (s.cache, s.tokens, s.hidden), state, (cache, so_far, hidden)))


def next_logits(model: MPT, hidden: Float[Array, "B D"]) -> Float32[Array, "B V"]:
    """Returns the logits of each row's next token."""
    return jax.vmap(lambda x: model.unembed(x[None])[0])(hidden).astype(jnp.float32)


def not_finite(logits: Float32[Array, "B V"], processed: Float32[Array, "B V"] | None) -> Bool[Array, " B"]:
    """Tells of each row whether its logits are not all finite, or NaN is among what processors made of them."""
    bad = ~jnp.all(jnp.isfinite(logits), axis=-1)
    return bad if processed is None else bad | jnp.any(jnp.isnan(processed), axis=-1)


def first_step(state: DecodeState, so_far: Int[Array, ""], bad: Bool[Array, " B"]) -> Int[Array, ""]:
    """Returns the first step at which a row that had not ended was bad, or −1."""
    return jnp.where((so_far < 0) & jnp.any(bad & ~state.done), state.step, so_far)


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
    longest = max(map(len, prompts))
    # A row is padded with its own last token: one that it does not have could make NaN of it.
    others = max(prompts, key=len)[:1]
    fillers = [(prompt if len(prompt) else others)[-1:] for prompt in prompts]
    ends = np.asarray([before + len(prompt) for prompt in prompts], np.int32)
    start = 0
    for size in prefill_buckets(longest):
        chunk = np.empty((len(prompts), size), np.int32)
        for row, prompt, filler in zip(chunk, prompts, fillers, strict=True):
            here = prompt[start : start + size]
            row[:] = [*here, *filler.tolist() * (size - len(here))]
        state = prefill_chunk(model, state, *replicate(model, (chunk, ends)))
        # Otherwise the host would be done long before the device, with a copy of the cache waiting for every chunk.
        jax.block_until_ready(state.hidden)
        start += size
        progress.update(min(start, longest) - progress.n)
    return state


def decode_tokens(
    model: MPT,
    state: DecodeState,
    params: SamplingParams,
    key: Key[Array, ""],
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
        key: randomness.
        length: tokens of the longest row so far.
        max_new_tokens: as above.
        chunk: decode steps between two host syncs.
        with_logits: whether to keep the logits of each step.
        processors: the functions of `logits_processors`.

    Raises:
        GenerationError: logits were not finite, or no token was left to choose from.
    """
    params, key = replicate(model, (params, key))
    decoded = 0
    while decoded < max_new_tokens:
        state = ensure_capacity(model, state, length + min(decoded + chunk, max_new_tokens))
        state, output = decode_chunk((model, params, key, processors), state, chunk, with_logits)
        bad_step, empty_step, done = jax.device_get((state.not_finite, state.nothing_left, state.done))
        check_finite(int(bad_step), processors)
        if empty_step >= 0:
            raise GenerationError(f"no token is left to choose from for new token {empty_step}; {loosen(processors)}")
        last = min(chunk, max_new_tokens - decoded)
        yield jax.tree.map(lambda x, last=last: x[:last], jax.device_get(output))
        decoded += chunk
        if done.all():
            return


def ensure_capacity(model: MPT, state: DecodeState, length: int) -> DecodeState:
    """Returns the state with room for `length` tokens in each row, copied into a larger cache where it had less."""
    if length <= state.cache.capacity:
        return state
    return repeat_and_resize(state, 1, cache_bucket(model.config, length))


def replicate(model: MPT, tree: Any) -> Any:
    """Returns arrays of the host, or of one device, on all devices of the model."""
    return jax.device_put(tree) if model.layout is None else model.layout.replicate(tree)


def check_finite(bad_step: int, processors: tuple[LogitsProcessor, ...] = ()) -> None:
    """Raises unless `bad_step`, the first new token whose logits were not finite, is −1 for none."""
    if bad_step >= 0:
        where = "what logits_processors return and in the weights" if processors else "the weights"
        raise GenerationError(
            f"the logits of new token {bad_step} are not finite; look for NaN or infinity in {where} with "
            f"from_pretrained(…, check_finite=True), or use a wider dtype"
        )


def loosen(processors: tuple[LogitsProcessor, ...]) -> str:
    """Returns what to do where no token is left."""
    return f"loosen no_repeat_ngram_size, min_new_tokens{', logits_processors' if processors else ''} or vocab_size"


def progress_bar(total: int, shown: bool | None) -> tqdm:
    """Returns a bar on stderr that counts tokens, and shows itself after two seconds; None: only in a terminal."""
    disabled = None if shown is None else not shown
    return tqdm(total=total, desc="generating", unit=" tokens", disable=disabled, delay=2, leave=False)
