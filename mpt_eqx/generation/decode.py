"""The decode loop: prefill, then a scan over tokens. Everything here is traced; checks stand in `generate`."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Key

from mpt_eqx.generation.choose import SamplingOptions, choose
from mpt_eqx.model import MPT, KVCache


class DecodeState(eqx.Module):
    """What one step hands to the next, for B rows.

    Attributes:
        cache: keys and values of all tokens but the one about to be chosen; each row has its own length.
        logits: logits of the token about to be chosen.
        done: rows that have ended; they only get padding.
        step: how many tokens each row has been given, counting padding.
        first_bad_step: the first step whose logits were not all finite, in any row that had not ended; −1 for none.
    """

    cache: KVCache
    logits: Float32[Array, "B V"]
    done: Bool[Array, " B"]
    step: Int[Array, ""]
    first_bad_step: Int[Array, ""]


class Decoded(eqx.Module):
    """What one step brought, or N of them with a leading axis."""

    tokens: Int[Array, "*N B"]
    logprobs: Float32[Array, "*N B"]
    logits: Float32[Array, "*N B V"] | None


@eqx.filter_jit
def prefill(model: MPT, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], capacity: int) -> DecodeState:
    """Reads prompts and returns the state from which their first new token is chosen.

    Args:
        model: the model.
        tokens: prompts, padded at the right with any valid id.
        lengths: how many tokens of each row are its prompt, ≥ 1.
        capacity: how many tokens the cache holds, ≥ T.
    """

    def row(tokens: Int[Array, " T"], length: Int[Array, ""]) -> tuple[KVCache, Float32[Array, " V"]]:
        x, cache = model.extend(tokens, KVCache.empty(model.config, capacity, model.wte.weight.dtype))
        cache = eqx.tree_at(lambda c: c.length, cache, length)
        last = jax.lax.dynamic_slice_in_dim(x, length - 1, 1)
        return cache, model.unembed(last)[0].astype(jnp.float32)

    cache, logits = jax.vmap(row)(tokens, lengths)
    return DecodeState(
        cache=cache,
        logits=logits,
        done=jnp.zeros(tokens.shape[0], bool),
        step=jnp.zeros((), jnp.int32),
        first_bad_step=jnp.full((), -1, jnp.int32),
    )


@eqx.filter_jit(donate="all-except-first")
def decode(
    model_options_keys: tuple[MPT, SamplingOptions, Key[Array, " B"], Int[Array, ""]],
    state: DecodeState,
    steps: int,
    with_logits: bool,
) -> tuple[DecodeState, Decoded]:
    """Chooses `steps` more tokens for each row, in one scan; ended rows get padding.

    Args:
        model_options_keys: the model, how to choose, a key for each row, and the number of tokens after which every
            row ends. They stand together because all other arguments are donated.
        state: from `prefill` or an earlier call. Donated: do not use it again.
        steps: length of the scan.
        with_logits: whether to return the logits that each token was chosen from.
    """
    model, options, keys, max_new_tokens = model_options_keys

    def forward(cache: KVCache, tokens: Int[Array, " B"]) -> tuple[KVCache, Float32[Array, "B V"]]:
        def row(token: Int[Array, ""], cache: KVCache) -> tuple[KVCache, Float32[Array, " V"]]:
            x, cache = model.extend(token[None], cache)
            return cache, model.unembed(x)[0].astype(jnp.float32)

        return jax.vmap(row)(tokens, cache)

    def one(state: DecodeState, _: None) -> tuple[DecodeState, Decoded]:
        bad = jnp.any(~state.done & ~jnp.all(jnp.isfinite(state.logits), axis=-1))
        chosen = choose(state.logits, options, keys, state.step)
        tokens = jnp.where(state.done, options.pad_token_id, chosen)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(state.logits), chosen[:, None], axis=-1)[:, 0]
        decoded = Decoded(
            tokens=tokens,
            logprobs=jnp.where(state.done, 0.0, logprobs),
            logits=jnp.where(state.done[:, None], 0.0, state.logits) if with_logits else None,
        )
        done = state.done | jnp.any(chosen[:, None] == options.eos_token_ids, axis=-1)
        done |= state.step + 1 >= max_new_tokens
        # Not under a cond on `done`: XLA would copy the whole cache in and out of it at every step.
        cache, logits = forward(state.cache, tokens)
        state = DecodeState(
            cache=cache,
            logits=logits,
            done=done,
            step=state.step + 1,
            first_bad_step=jnp.where(bad & (state.first_bad_step < 0), state.step, state.first_bad_step),
        )
        return state, decoded

    return jax.lax.scan(one, state, length=steps)
