"""The slots of a model: the rows of one decode state, each with the options of its own request, and their programs.

Everything in which requests differ is an array with a row for each slot, so that no request compiles anything.
"""

import dataclasses
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import GenerationError
from mpt_eqx.generation.prompts import read_chunk
from mpt_eqx.generation.sampling import log_softmax
from mpt_eqx.generation.sampling_params import SamplingParams
from mpt_eqx.generation.state import (
    DecodeState,
    constrain,
    constrain_replicated,
    empty_state,
    repeat_and_resize,
    replicate,
)
from mpt_eqx.generation.steps import StepOutput, chosen_step
from mpt_eqx.generation.validate import check_edits
from mpt_eqx.interp import Add
from mpt_eqx.model import MPT
from mpt_eqx.model.taps import Edit
from mpt_eqx.serve.requests import TOP

MAX_EOS = 32
"""The most end-of-sequence tokens of a request."""

SCORED_ROWS = 32
"""Rows of logits of a prompt that are computed at a time."""


class Slots(eqx.Module):
    """B rows, and what the request of each asks for.

    Attributes:
        state: prompts and new tokens.
        params: the options of each row, with room for MAX_EOS tokens.
        key: randomness of each row.
        bias: what is added to its logits.
        top: whether it asks for the likeliest tokens.
    """

    state: DecodeState
    params: SamplingParams
    key: Key[Array, " B"]
    bias: Float32[Array, "B V"]
    top: Bool[Array, " B"]


class Likeliest(eqx.Module):
    """The K likeliest tokens and their log-probabilities, the likeliest first; zeros where none asked."""

    tokens: Int[Array, "*N K"]
    logprobs: Float32[Array, "*N K"]


def empty_slots(model: MPT, rows: int, capacity: int, *, edits: bool) -> Slots:
    """Returns slots that are free, with room for `capacity` tokens in each."""
    state = empty_state(model, rows, capacity)
    if edits:
        state = dataclasses.replace(state, edits=edits_of(model, {}, capacity, rows))
    params = padded_eos(SamplingParams()).of_rows(rows)
    keys = jax.random.wrap_key_data(np.zeros((rows, *_key_shape()), np.uint32))  # type: ignore[arg-type]
    bias = np.zeros((rows, model.config.vocab_size), np.float32)
    return Slots(state, *replicate(model, jax.tree.map(jnp.array, (params, keys, bias, np.zeros(rows, bool)))))


def check_vectors(config: MPTConfig, edits: Mapping[str, Edit], length: int) -> dict[str, tuple[Edit, ...]]:
    """Returns an edit after each block: the vector that is added there, or one that is off.

    Args:
        config: the model's.
        edits: by place; each an `interp.Add` of one vector, at positions that a slice gives.
        length: how many positions there are.

    Raises:
        GenerationError: one is at another place, or of another kind.
    """
    off = eqx.tree_at(lambda edit: edit.on, Add(np.zeros(config.d_model, np.float32)), np.asarray(False))
    places = [f"blocks.{number}.hook_resid_post" for number in range(config.n_layers)]
    (found,) = check_edits(config, dict.fromkeys(places, off) | dict(edits), [length])
    for place, (edit, *others) in found.items():
        vector = getattr(edit.value, "shape", None) == (config.d_model,) and edit.positions is None
        if place not in places or others or not vector or edit.change is not off.change:
            raise GenerationError(
                f"edits: expected Add(vector, positions=slice(…)) of {config.d_model} numbers at "
                f"blocks.N.hook_resid_post, found another edit at {place}"
            )
    return found


def edits_of(model: MPT, edits: Mapping[str, Edit], length: int, rows: int = 1) -> dict[str, tuple[Edit, ...]]:
    """Returns what `check_vectors` does as arrays of so many rows."""

    def of_rows(x: Array | np.ndarray) -> Array:
        kind = np.float32 if np.ndim(x) else np.asarray(x).dtype
        # Copied, because a state is donated.
        return jnp.array(np.broadcast_to(np.asarray(x, kind), (rows, *np.shape(x))))

    found = jax.tree.map(of_rows, check_vectors(model.config, edits, length))
    made: dict[str, tuple[Edit, ...]] = replicate(model, found)
    return made


def padded_eos(params: SamplingParams) -> SamplingParams:
    """Returns the options with room for MAX_EOS end-of-sequence tokens, so that all requests have the same shapes."""
    ids = np.full(MAX_EOS, -1, np.int32)
    ids[: len(params.eos_token_ids)] = params.eos_token_ids
    return eqx.tree_at(lambda p: p.eos_token_ids, params, ids)


def one_slot(
    model: MPT,
    state: DecodeState,
    params: SamplingParams,
    key: Key[Array, ""],
    bias: Mapping[int, float],
    top: bool,
) -> Slots:
    """Returns a slot with a prompt that was read, and its options."""
    added = np.zeros((1, model.config.vocab_size), np.float32)
    for token, number in bias.items():
        added[0, token] = number
    rest = (padded_eos(params).of_rows(1), key[None], added, np.asarray([top]))
    return Slots(state, *replicate(model, rest))


@eqx.filter_jit(donate="all-except-first")
def join(given: tuple[MPT, Slots], slots: Slots, row: Int[Array | np.ndarray, ""]) -> Slots:
    """Returns the slots with one of them replaced by a slot of its own, which may have a smaller cache.

    Args:
        given: the model, and the one slot; neither is donated.
        slots: donated.
        row: which.
    """
    model, one = given
    joined = jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, row, 0), slots, one)
    return eqx.tree_at(lambda s: s.state, joined, constrain(model, joined.state))


@eqx.filter_jit(donate="all-except-first")
def decode_slots(
    model: MPT, slots: Slots, active: Bool[Array, " B"], mask: Bool[Array, "B V"] | None, steps: int
) -> tuple[Slots, tuple[StepOutput, Likeliest]]:
    """Decodes `steps` more tokens of each active row, in one scan.

    Args:
        model: the model.
        slots: donated, like what follows.
        active: the rows that are in use; the others get padding, and hold no tokens.
        mask: which tokens may come next in each row, for one step; None for all.
        steps: length of the scan.
    """
    state = eqx.tree_at(
        lambda s: (s.done, s.cache.length),
        slots.state,
        (slots.state.done | ~active, jnp.where(active, slots.state.cache.length, 0)),
    )
    bias = slots.bias if mask is None else jnp.where(mask, slots.bias, -jnp.inf)

    def one(state: DecodeState, _: None) -> tuple[DecodeState, tuple[StepOutput, Likeliest]]:
        fixed = (model, slots.params, slots.key, ())
        after, output = chosen_step(fixed, state, True, bias=bias)
        assert output.logits is not None
        top = likeliest(output.logits, jnp.any(slots.top & ~state.done))
        return after, (eqx.tree_at(lambda o: o.logits, output, None), top)

    state, output = jax.lax.scan(one, constrain(model, state), length=steps)
    slots = eqx.tree_at(lambda s: s.state, slots, constrain(model, state))
    return slots, constrain_replicated(model, output)


@eqx.filter_jit(donate="all-except-first")
def prefill_outputs(
    model: MPT, state: DecodeState, chunk: Int[Array, "1 T"], ends: Int[Array, " 1"]
) -> tuple[DecodeState, Float[Array, "T D"]]:
    """Returns what `prefill_chunk` does of one row, and the outputs of norm_f."""
    state, x = read_chunk(model, state, chunk, ends)
    return state, x[0]


@eqx.filter_jit
def next_likely(
    model: MPT, x: Float[Array, "T D"], targets: Int[Array, " T"]
) -> tuple[Float32[Array, " T"], Likeliest]:
    """Returns how likely the token that follows each of a prompt's is, and which are the likeliest.

    Args:
        model: the model.
        x: from `prefill_outputs`; T is a multiple of 32, or a power of two below.
        targets: the token that follows each; anything where none does.

    Returns:
        The targets' log-probabilities in nats, and the likeliest tokens.
    """
    size = len(targets)
    rows = min(SCORED_ROWS, size)

    def one(piece: tuple[Float[Array, "P D"], Int[Array, " P"]]) -> tuple[Float32[Array, " P"], Likeliest]:
        x, targets = piece
        logits = model.unembed(x, dtype=jnp.float32)
        logprobs = jax.vmap(log_softmax)(logits)
        picked = jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0]
        return picked, likeliest(logits, jnp.asarray(True))

    found = jax.lax.map(one, (x.reshape(-1, rows, x.shape[-1]), targets.reshape(-1, rows)))
    return constrain_replicated(model, jax.tree.map(lambda y: y.reshape(size, *y.shape[2:]), found))


@eqx.filter_jit
def continued(state: DecodeState, length: Int[Array | np.ndarray, ""], capacity: int) -> DecodeState:
    """Returns a state of one row that holds the first `length` tokens of another, with room for `capacity`."""
    state = repeat_and_resize(state, 1, capacity)
    return eqx.tree_at(lambda s: s.cache.length, state, jnp.full_like(state.cache.length, length))


def likeliest(logits: Float32[Array, "B V"], asked: Bool[Array, ""]) -> Likeliest:
    """Returns the TOP likeliest tokens of each row, or zeros, at no cost, where they are not asked for."""
    rows, vocab_size = logits.shape
    count = min(TOP, vocab_size)

    def found() -> tuple[Float32[Array, "B K"], Int[Array, "B K"]]:
        logprobs, tokens = jax.lax.top_k(jax.vmap(log_softmax)(logits), count)
        return logprobs, tokens

    def nothing() -> tuple[Float32[Array, "B K"], Int[Array, "B K"]]:
        return jnp.zeros((rows, count), jnp.float32), jnp.zeros((rows, count), jnp.int32)

    logprobs, tokens = jax.lax.cond(asked, found, nothing)
    return Likeliest(tokens, logprobs)


def _key_shape() -> tuple[int, ...]:
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
