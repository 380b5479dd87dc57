"""decode: one sequence continued by a pure function, for use inside any transformation."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float32, Int, Key, PRNGKeyArray

from mpt_eqx.errors import GenerationError
from mpt_eqx.generation.buckets import PREFILL_CHUNKS
from mpt_eqx.generation.prompts import read_chunk
from mpt_eqx.generation.sampling_params import SamplingParams, check_params
from mpt_eqx.generation.state import DecodeState, constrain, one_row, scan_row, zero_state
from mpt_eqx.generation.steps import StepOutput, chosen_step
from mpt_eqx.generation.validate import check_count, check_edits, check_key, check_model, check_sequence, check_whole
from mpt_eqx.model import MPT
from mpt_eqx.model.taps import Edit
from mpt_eqx.ops.platform import varying_as
from mpt_eqx.ops.switches import library_function


class Decoded(eqx.Module):
    """The output of `decode`, for N = max_new_tokens.

    Attributes:
        tokens: the new tokens; pad_token_id after the end.
        logprobs: the model's log-probability of each token, in nats, before any processing; 0 after the end, and NaN
            where `decode` says so. Of a 16-bit model they are rounded as those of `generate`.
        length: how many new tokens there are; the end-of-sequence token counts.
    """

    tokens: Int[Array, " N"]
    logprobs: Float32[Array, " N"]
    length: Int[Array, ""]


@library_function
def decode(
    model: MPT,
    tokens: Int[Array, " T"] | ArrayLike,
    length: Int[Array, ""] | int,
    *,
    max_new_tokens: int,
    sampling: SamplingParams = SamplingParams(),  # noqa: B008
    key: PRNGKeyArray | None = None,
    row: Int[Array, ""] | int = 0,
    edits: Mapping[str, Any] | None = None,
) -> Decoded:
    """Continues one sequence as `generate` does, as a pure function for use inside jit, vmap, scan, shard_map and grad.

    A batch is `jax.vmap` over tokens, length and row; independent draws are `jax.vmap` over keys. All max_new_tokens
    steps run, also after the end of the sequence. Memory is that of a cache of T + max_new_tokens tokens, and of 256
    tokens of the prompt. It is compiled for each T and max_new_tokens; other options never recompile.

    Derivatives go through the log-probabilities, for the tokens as they were chosen, forward and reverse. In reverse
    they keep the cache of every step: for a policy gradient, `model` of the prompt with the new tokens needs less.

    Args:
        model: the model.
        tokens: token ids of the prompt, padded on the right with anything.
        length: how many of them are real, 1 ≤ length ≤ T.
        max_new_tokens: how many steps to run, ≥ 0; static.
        sampling: how tokens are chosen, greedily by default. The sequence also ends after `sampling.max_new_tokens`.
        key: randomness, needed when sampling.temperature is above 0 or traced.
        row: the n-th token is drawn with fold_in(fold_in(key, row), n), as in row `row` of `generate` with this key.
        edits: of activations, as in `generate`.

    Raises:
        GenerationError: an argument is not valid, or length and max_new_tokens exceed max_seq_len. What is traced is
            not checked: log-probabilities are then NaN where length is not valid, as they are from the first token on
            whose logits are not finite, or for which the options leave no token to choose.
    """
    model = check_model(model)
    check_count("max_new_tokens", max_new_tokens, least=0)
    max_new_tokens = int(max_new_tokens)
    tokens, length = check_sequence(model.config, tokens, length, max_new_tokens=max_new_tokens)
    check_params(model.config, sampling, max_new_tokens)
    temperature = sampling.temperature
    if key is None and isinstance(temperature, jax.core.Tracer):
        raise GenerationError("key: expected a key, such as jax.random.key(0), with a traced temperature, found None")
    key = check_key(key, 1.0 if isinstance(temperature, jax.core.Tracer) else float(temperature))
    (resolved,) = check_edits(model.config, edits, [tokens.shape[0] + max_new_tokens])
    operands = (model, tokens, length, sampling, key, jnp.asarray(check_whole("row", row, 0), jnp.int32), resolved)
    if model.dtype.itemsize == 2:
        return _decode_with_bits(*operands, max_new_tokens=max_new_tokens)
    return _decode(*operands, max_new_tokens=max_new_tokens)


def _decode(
    model: MPT,
    tokens: Int[Array, " T"],
    length: Int[Array, ""],
    sampling: SamplingParams,
    key: Key[Array, ""],
    row: Int[Array, ""],
    edits: dict[str, tuple[Edit, ...]],
    *,
    max_new_tokens: int,
    as_bits: bool = False,
) -> Decoded:
    n = max_new_tokens
    valid = (length >= 1) & (length <= tokens.shape[0]) & (length + n <= model.config.max_seq_len)
    like = (model, tokens, length, sampling, key, row, edits)
    state = read_sequence(model, tokens, length, edits, max_new_tokens=n, as_bits=as_bits, like=like)
    params = jax.tree.map(lambda x: x[None], sampling)

    def step(state: DecodeState, _: None) -> tuple[DecodeState, StepOutput]:
        return chosen_step((model, params, key, ()), state, False, row[None], one_row)

    state, output = scan_row(step, state, None, n)
    chosen = output.tokens[:, 0]
    ends = jnp.any(chosen[:, None] == jnp.asarray(sampling.eos_token_ids), axis=-1)
    places = jnp.arange(n)
    bad = [jnp.where(step < 0, n, step)[0] for step in (state.not_finite, state.nothing_left)]
    right = valid & (places < jnp.minimum(*bad))
    first_end = jnp.min(jnp.where(ends, places + 1, n), initial=n)
    return Decoded(
        tokens=chosen,
        logprobs=jnp.where(right, output.logprobs[:, 0], jnp.nan),
        length=jnp.minimum(first_end, sampling.max_new_tokens).astype(jnp.int32),
    )


def read_sequence(
    model: MPT,
    tokens: Int[Array, " T"],
    length: Int[Array, ""],
    edits: dict[str, tuple[Edit, ...]],
    *,
    max_new_tokens: int,
    as_bits: bool,
    like: Any = (),
) -> DecodeState:
    """Returns the state of one row after its prompt, with room for the new tokens, within a program.

    Args:
        model: the model.
        tokens: as in `decode`.
        length: as there.
        edits: as there, resolved.
        max_new_tokens: as there.
        as_bits: as in `KVCache.empty`.
        like: what the state varies as within `jax.shard_map`.
    """
    # The prompt is read in chunks of one size. It is padded with its own last token: another could make NaN of it.
    chunks = -(-tokens.shape[0] // PREFILL_CHUNKS[0])
    size = -(-tokens.shape[0] // chunks)
    padded = jnp.pad(tokens, (0, chunks * size - tokens.shape[0]))
    padded = jnp.where(jnp.arange(len(padded)) < length, padded, tokens[jnp.maximum(length - 1, 0)])
    room = max(tokens.shape[0] + max_new_tokens, len(padded))
    state = zero_state(model.config, model.dtype, 1, room, as_bits=as_bits)
    state = dataclasses.replace(state, edits=jax.tree.map(lambda x: jnp.asarray(x)[None], edits))
    state = varying_as(constrain(model, state), *like)

    def read(state: DecodeState, chunk: Int[Array, "1 S"]) -> tuple[DecodeState, None]:
        return read_chunk(model, state, chunk, length[None], one_row)[0], None

    return scan_row(read, state, padded.reshape(chunks, 1, size), chunks)[0]


@eqx.filter_custom_jvp
def _decode_with_bits(*operands: Any, max_new_tokens: int) -> Decoded:
    return _decode(*operands, max_new_tokens=max_new_tokens, as_bits=True)


def _derivative(primals: Any, tangents: Any, *, max_new_tokens: int) -> tuple[Decoded, Decoded]:
    """Returns what `_decode` and its derivative do: bits have none, and where none is asked for they are faster."""
    return eqx.filter_jvp(lambda *operands: _decode(*operands, max_new_tokens=max_new_tokens), primals, tangents)


_decode_with_bits.def_jvp(_derivative)  # type: ignore[no-untyped-call]
