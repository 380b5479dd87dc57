"""The decode loop: reading prompts, then a scan over tokens. Everything here is traced; checks stand in `arguments`."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Float32, Int, Key

from mpt_eqx.generation.choose import SamplingOptions, allowed, choose
from mpt_eqx.model import MPT, KVCache
from mpt_eqx.ops.layout import Layout


class DecodeState(eqx.Module):
    """What one step hands to the next, for B rows.

    Attributes:
        cache: keys and values of the tokens so far; each row has its own length.
        tokens: the tokens so far, at their places in the cache; what stands beyond a row's length means nothing.
        hidden: what the model made of the last of them, from which the next is chosen.
        done: rows that have ended; they only get padding.
        step: how many tokens each row has been given, counting padding.
        not_finite: the first step whose logits were not all finite, in any row that had not ended; −1 for none.
        nothing_left: the first step at which no token was allowed, in any row that had not ended; −1 for none.
    """

    cache: KVCache
    tokens: Int[Array, "B S"]
    hidden: Float[Array, "B D"]
    done: Bool[Array, " B"]
    step: Int[Array, ""]
    not_finite: Int[Array, ""]
    nothing_left: Int[Array, ""]


class Decoded(eqx.Module):
    """What one step brought, or N of them with a leading axis."""

    tokens: Int[Array, "*N B"]
    logprobs: Float32[Array, "*N B"]
    logits: Float32[Array, "*N B V"] | None


def empty_state(model: MPT, rows: int, capacity: int) -> DecodeState:
    """Returns a state of rows that hold no token yet, with room for `capacity` tokens in each."""
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

    state = by_axes(jax.eval_shape(zeros), lambda x, *names: new(layout, x.shape, x.dtype, 0, *names))
    nothing = tuple(new(layout, (), np.int32, -1) for _ in range(2))
    return eqx.tree_at(lambda s: (s.not_finite, s.nothing_left), state, nothing)


def new(layout: Layout | None, shape: tuple[int, ...], dtype: DTypeLike, value: float, *names: str | None) -> Array:
    """Returns a new array, by numpy so that no shape costs a compilation, and copied so that it can be donated."""
    if layout is None:
        return jax.device_put(np.full(shape, value, dtype), may_alias=False)
    sharding = layout.sharding(shape, *names)
    part = sharding.shard_shape(shape)
    return jax.make_array_from_callback(shape, sharding, lambda _: np.full(part, value, dtype))


def by_axes(state: DecodeState, function: Callable[..., Any]) -> DecodeState:
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


def on_mesh(model: MPT, state: DecodeState) -> DecodeState:
    """Returns the state as it lies on the model's mesh, if it has one."""
    return state if model.layout is None else by_axes(state, model.layout.constrain)


def replicated(model: MPT, tree: Any) -> Any:
    """Returns arrays that the host is to read, as all devices of the model's mesh have them, if it has one."""
    return tree if model.layout is None else model.layout.constrain_replicated(tree)


@eqx.filter_jit
def spread(state: DecodeState, copies: int, capacity: int) -> DecodeState:
    """Returns the state with every row `copies` times, one after the other, and room for `capacity` tokens in each."""

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
def read(model: MPT, state: DecodeState, piece: Int[Array, "B T"], ends: Int[Array, " B"]) -> DecodeState:
    """Reads the next T tokens of prompts.

    Args:
        model: the model.
        state: the tokens so far. Donated: do not use it again.
        piece: the next tokens, with any valid id after the end of a prompt. Donated, like the next.
        ends: how many tokens each row has when its prompt is read to the end.
    """

    def row(
        cache: KVCache, tokens: Int[Array, " S"], hidden: Float[Array, " D"], piece: Int[Array, " T"], end: Array
    ) -> tuple[KVCache, Int[Array, " S"], Float[Array, " D"]]:
        places = cache.length + jnp.arange(piece.shape[0])
        last = end - 1 - cache.length
        x, new = model.extend(piece, cache)
        new = eqx.tree_at(lambda c: c.length, new, jnp.minimum(new.length, end))
        here = (last >= 0) & (last < piece.shape[0])
        hidden = jnp.where(here, x[jnp.clip(last, 0, piece.shape[0] - 1)], hidden)
        return new, tokens.at[places].set(piece, mode="drop"), hidden

    cache, tokens, hidden = jax.vmap(row)(state.cache, state.tokens, state.hidden, piece, ends)
    return on_mesh(model, eqx.tree_at(lambda s: (s.cache, s.tokens, s.hidden), state, (cache, tokens, hidden)))


@eqx.filter_jit(donate="all-except-first")
def decode(
    fixed: tuple[MPT, SamplingOptions, Key[Array, ""]], state: DecodeState, steps: int, with_logits: bool
) -> tuple[DecodeState, Decoded]:
    """Chooses `steps` more tokens for each row, in one scan; ended rows get padding.

    Args:
        fixed: the model, how to choose, and the key. They stand together because all other arguments are donated.
        state: from `read` or an earlier call, with room for the tokens. Donated: do not use it again.
        steps: length of the scan.
        with_logits: whether to return the logits that each token was chosen from.
    """
    model, options, key = fixed

    def one(state: DecodeState, _: None) -> tuple[DecodeState, Decoded]:
        logits = next_logits(model, state.hidden)
        open_ = allowed(logits, options, state.tokens, state.cache.length, state.step)
        chosen = choose(open_, options, key, state.step)
        tokens = jnp.where(state.done, options.pad_token_id, chosen)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=-1)[:, 0]
        decoded = Decoded(
            tokens=tokens,
            logprobs=jnp.where(state.done, 0.0, logprobs),
            logits=jnp.where(state.done[:, None], 0.0, logits) if with_logits else None,
        )
        ended = jnp.any(chosen[:, None] == options.eos_token_ids, axis=-1)
        # Not under a cond on `done`: XLA would copy the whole cache in and out of it at every step.
        after = append(model, state, tokens)
        return eqx.tree_at(
            lambda s: (s.done, s.step, s.not_finite, s.nothing_left),
            after,
            (
                state.done | ended | (state.step + 1 >= options.max_new_tokens),
                state.step + 1,
                first_step(state, state.not_finite, ~jnp.all(jnp.isfinite(logits), axis=-1)),
                first_step(state, state.nothing_left, jnp.all(jnp.isneginf(open_), axis=-1)),
            ),
        ), decoded

    state, decoded = jax.lax.scan(one, on_mesh(model, state), length=steps)
    return on_mesh(model, state), replicated(model, decoded)


def append(model: MPT, state: DecodeState, tokens: Int[Array, " B"]) -> DecodeState:
    """Returns the state with one more token in each row."""

    def row(
        cache: KVCache, so_far: Int[Array, " S"], token: Int[Array, ""]
    ) -> tuple[KVCache, Int[Array, " S"], Float[Array, " D"]]:
        x, new = model.extend(token[None], cache)
        new = eqx.tree_at(lambda c: c.length, new, cache.length + 1)
        return new, so_far.at[cache.length].set(token, mode="drop"), x[0]

    cache, so_far, hidden = jax.vmap(row)(state.cache, state.tokens, tokens)
    return on_mesh(model, eqx.tree_at(lambda s: (s.cache, s.tokens, s.hidden), state, (cache, so_far, hidden)))


def next_logits(model: MPT, hidden: Float[Array, "B D"]) -> Float32[Array, "B V"]:
    """Returns the logits of each row's next token."""
    # Row by row, so that few rows and many are multiplied in the same way.
    return jax.vmap(lambda x: model.unembed(x[None])[0])(hidden).astype(jnp.float32)


def first_step(state: DecodeState, so_far: Int[Array, ""], bad: Bool[Array, " B"]) -> Int[Array, ""]:
    """Returns the first step at which a row that had not ended was bad, or −1."""
    return jnp.where((so_far < 0) & jnp.any(bad & ~state.done), state.step, so_far)
