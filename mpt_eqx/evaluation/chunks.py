"""The program that reads a chunk of each row of a batch, and says how likely the tokens that follow are."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from mpt_eqx.generation.layers import with_blocks_once
from mpt_eqx.generation.state import constrain_replicated, map_layers
from mpt_eqx.model import MPT, KVCache
from mpt_eqx.ops.layer_cache import LayerCache

Layers = tuple[LayerCache | None, ...] | LayerCache

CHUNKS = (256, 32)
"""Tokens per call. A row of logits costs as much in each, so that little padding counts for more than few calls."""

MAX_LOGITS = CHUNKS[0]
"""Rows of logits that are computed at a time."""


@eqx.filter_jit(donate="all-except-first")
def read_chunk(
    model: MPT,
    layers: Layers,
    chunk: Int[Array, "B S"],
    targets: Int[Array, "B S"] | None,
    starts: Int[Array, " B"],
) -> tuple[Layers, tuple[Float32[Array, "B S"], Bool[Array, "B S"]] | None]:
    """Returns the cache after S more tokens of each row, and how likely each target is to follow.

    Args:
        model: the model.
        layers: of the cache. Donated, like all that follows.
        chunk: the tokens, with any valid id after the end of a row.
        targets: the token that follows each; None where nothing is asked.
        starts: how many tokens of each row are in the cache.

    Returns:
        The cache, and for each target its log-probability, and whether no logit is larger than its.
    """
    model = with_blocks_once(model, layers)

    def row(layers: Layers, tokens: Int[Array, " S"], start: Int[Array, ""]) -> tuple[Layers, Float[Array, "S D"]]:
        x, cache = model.extend(tokens, KVCache(layers=layers, length=start))
        return cache.layers, x

    layers, x = jax.vmap(row)(layers, chunk, starts)
    if model.layout is not None:
        layers = map_layers(layers, model.layout.constrain)
    return layers, None if targets is None else constrain_replicated(model, _likelihoods(model, x, targets))


def _likelihoods(
    model: MPT, x: Float[Array, "B S D"], targets: Int[Array, "B S"]
) -> tuple[Float32[Array, "B S"], Bool[Array, "B S"]]:
    """Returns what `read_chunk` does of the outputs of norm_f, with at most MAX_LOGITS rows of logits at a time."""
    rows, size = targets.shape
    piece = size
    while piece > 1 and rows * piece > MAX_LOGITS:
        piece //= 2

    def one(piece: tuple[Float[Array, "B P D"], Int[Array, "B P"]]) -> tuple[Float32[Array, "B P"], Bool[Array, "B P"]]:
        x, targets = piece
        logits = jax.vmap(lambda x: model.unembed(x, dtype=jnp.float32))(x)
        largest = jnp.max(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        logprobs = picked - largest - jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
        return logprobs, picked == largest

    if piece == size:
        return one((x, targets))
    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(rows, -1, piece, *x.shape[2:]), 0, 1), (x, targets))
    found = jax.lax.map(one, split)
    logprobs, is_greedy = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(rows, size), found)
    return logprobs, is_greedy
