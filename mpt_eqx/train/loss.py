"""The loss of next-token prediction."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Int, PRNGKeyArray, Shaped

from mpt_eqx.errors import MPTError
from mpt_eqx.model import MPT
from mpt_eqx.model.arguments import as_batch
from mpt_eqx.ops.layout import axes_size
from mpt_eqx.ops.numerics import accum_dtype
from mpt_eqx.ops.switches import library_function
from mpt_eqx.train.cross_entropy import cross_entropy

IGNORED = -100
CHUNK = 512
"""Tokens whose logits are held at a time: enough that the weight's gradient is added up a few times only."""

Rows = Sequence[Sequence[int]]


@library_function
def next_token_loss(
    model: MPT,
    tokens: Int[Array, "B T"] | ArrayLike | Rows,
    *,
    mask: Bool[Array, "B T"] | Int[Array, "B T"] | np.ndarray | Rows | None = None,
    labels: Int[Array, "B T"] | np.ndarray | Rows | None = None,
    sequence_ids: Int[Array, "B T"] | np.ndarray | Rows | None = None,
    key: PRNGKeyArray | None = None,
    z_loss: float = 0.0,
    vocab_chunk: int = CHUNK,
) -> Float32[Array, ""]:
    """Returns the mean cross-entropy, in nats, of each token given those before it in its sequence.

    Logits have the type of the model, and what is computed of them is float32 (float64 for float64). They are never
    held for more than `vocab_chunk` tokens, nor computed twice.

    A token counts only where it is real and the position before it is a real token of the same sequence: padding,
    wherever it stands, neither is predicted nor predicts, and the first token of a packed sequence is not predicted.

    Args:
        model: the model.
        tokens: a batch of token ids, 0 ≤ id < vocab_size.
        mask: True (or 1) at real tokens; None when all are real.
        labels: the tokens again (the shift by one happens here), with -100 where none is to be predicted; None means
            every token that counts. Those that are given count wherever the position before them is real. Without any
            the loss is 0.
        sequence_ids: as in `MPT.__call__`; −1 counts as padding.
        key: as in `MPT.__call__`; every row gets its own.
        z_loss: factor of the mean of (log Σ exp logits)², which is added, ≥ 0.
        vocab_chunk: for how many tokens logits are held at a time, on each device, ≥ 1; one of every row in any case.

    Raises:
        MPTError: tokens are no batch, another array has not their shape, `z_loss` or `vocab_chunk` is not in its range,
            or as in `MPT.__call__`.

    Source: llm-foundry 8c8dd48, llmfoundry/models/mpt/modeling_mpt.py, compute_loss_from_logits.
    """
    if isinstance(vocab_chunk, bool) or not isinstance(vocab_chunk, int) or vocab_chunk < 1:
        raise MPTError(f"vocab_chunk: expected a whole number ≥ 1, found {vocab_chunk!r}")
    if not isinstance(z_loss, jax.core.Tracer) and not z_loss >= 0:
        raise MPTError(f"z_loss: expected a number ≥ 0, found {z_loss!r}")
    tokens = as_batch("tokens", tokens)
    mask = None if mask is None else as_batch("mask", mask, tokens.shape)
    labels = None if labels is None else as_batch("labels", labels, tokens.shape)
    sequence_ids = None if sequence_ids is None else as_batch("sequence_ids", sequence_ids, tokens.shape)
    if model.layout is not None:
        tokens = model.layout.constrain(tokens, "batch", None)
    keys = None if key is None else jax.random.split(key, tokens.shape[0])
    # Arguments that are None have no leaf to be mapped over.
    states = jax.vmap(
        lambda tokens, mask, sequence_ids, key: model.hidden_states(
            tokens, mask=mask, sequence_ids=sequence_ids, key=key
        )[-1]
    )(tokens, mask, sequence_ids, keys)
    targets = (tokens if labels is None else labels)[:, 1:]
    counted = counted_tokens(tokens, mask=mask, labels=labels, sequence_ids=sequence_ids)
    sums = accum_dtype(states.dtype)
    where = "wte" if model.lm_head is None else "lm_head"

    def head(module: Any, x: Float[Array, "T D"]) -> Float[Array, "T V"]:
        return eqx.tree_at(lambda m: getattr(m, where), model, module).unembed(x).astype(sums)

    devices = 1 if model.layout is None else axes_size(model.layout.mesh, model.layout.rules.axes("batch"))
    # The last position is read as well, because a length such as 512 has more divisors than the one before it.
    last = ((0, 0), (0, 1))
    return cross_entropy(
        head,
        getattr(model, where),
        states,
        jnp.pad(jnp.where(counted, targets, 0), last),
        jnp.pad(counted.astype(sums) / jnp.maximum(jnp.sum(counted), 1).astype(sums), last),
        z_loss=z_loss,
        piece=max(vocab_chunk * devices // tokens.shape[0], 1),
    ).astype(jnp.float32)


def counted_tokens(
    tokens: Int[Array, "B T"],
    *,
    mask: Shaped[Array, "B T"] | None = None,
    labels: Int[Array, "B T"] | None = None,
    sequence_ids: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T-1"]:
    """Tells of each token but the first of a row whether `next_token_loss` counts it."""
    real = jnp.ones_like(tokens, bool)
    if mask is not None:
        real &= mask.astype(bool)
    if sequence_ids is not None:
        real &= sequence_ids >= 0
    if labels is not None:
        return (labels[:, 1:] != IGNORED) & real[:, :-1]
    counted = real[:, :-1] & real[:, 1:]
    return counted if sequence_ids is None else counted & (sequence_ids[:, :-1] == sequence_ids[:, 1:])
