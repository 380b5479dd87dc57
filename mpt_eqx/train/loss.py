"""The loss of next-token prediction."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Int, PRNGKeyArray, Shaped

from mpt_eqx.config import MOE_TYPES
from mpt_eqx.errors import MPTError
from mpt_eqx.model import MPT
from mpt_eqx.model.arguments import as_batch
from mpt_eqx.model.taps import Tap
from mpt_eqx.ops.layout import axes_size
from mpt_eqx.ops.numerics import accum_dtype
from mpt_eqx.ops.platform import over_rows
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
    moe_loss_weight: float | None = None,
    vocab_chunk: int = CHUNK,
) -> Float32[Array, ""]:
    """Returns the mean cross-entropy, in nats, of each token given those before it in its sequence.

    Of a model whose `ffn_type` is mb_dmoe, the loss that balances its experts is added, as llm-foundry does.

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
        moe_loss_weight: factor of `balance_loss`, which is added, ≥ 0; None means the configuration's with mb_dmoe, and
            0 with any other `ffn_type`.
        vocab_chunk: for how many tokens logits are held at a time, on each device, ≥ 1; one of every row in any case.

    Raises:
        MPTError: tokens are no batch, another array has not their shape, `z_loss`, `moe_loss_weight` or `vocab_chunk`
            is not in its range, a model without experts is to be balanced, or as in `MPT.__call__`.

    Source: llm-foundry 8c8dd48, llmfoundry/models/mpt/modeling_mpt.py, compute_loss_from_logits.
    """
    if isinstance(vocab_chunk, bool) or not isinstance(vocab_chunk, int) or vocab_chunk < 1:
        raise MPTError(f"vocab_chunk: expected a whole number ≥ 1, found {vocab_chunk!r}")
    if not isinstance(z_loss, jax.core.Tracer) and not z_loss >= 0:
        raise MPTError(f"z_loss: expected a number ≥ 0, found {z_loss!r}")
    weight = _moe_loss_weight(model, moe_loss_weight)
    tokens = as_batch("tokens", tokens)
    mask = None if mask is None else as_batch("mask", mask, tokens.shape)
    labels = None if labels is None else as_batch("labels", labels, tokens.shape)
    sequence_ids = None if sequence_ids is None else as_batch("sequence_ids", sequence_ids, tokens.shape)
    if model.layout is not None:
        tokens = model.layout.constrain(tokens, "batch", None)
    keys = None if key is None else jax.random.split(key, tokens.shape[0])
    places = [f"blocks.{i}.mlp.hook_expert_weights" for i in range(model.config.n_layers if weight else 0)]

    def row(tokens: Array, mask: Any, sequence_ids: Any, key: Any) -> tuple[Array, list[Array]]:
        tap = Tap({}, frozenset(places), None, {})
        states = model.hidden_states(tokens, mask=mask, sequence_ids=sequence_ids, key=key, tap=tap)
        return states[-1], [tap.found[place] for place in places]

    # Arguments that are None have no leaf to be mapped over.
    rows = (tokens, mask, sequence_ids, keys)
    states, probabilities = over_rows(row, *rows) if model.layout is None else jax.vmap(row)(*rows)
    targets = (tokens if labels is None else labels)[:, 1:]
    counted = counted_tokens(tokens, mask=mask, labels=labels, sequence_ids=sequence_ids)
    sums = accum_dtype(states.dtype)
    where = "wte" if model.lm_head is None else "lm_head"

    def head(module: Any, x: Float[Array, "T D"]) -> Float[Array, "T V"]:
        return eqx.tree_at(lambda m: getattr(m, where), model, module).unembed(x).astype(sums)

    devices = 1 if model.layout is None else axes_size(model.layout.mesh, model.layout.rules.axes("batch"))
    # The last position is read as well, because a length such as 512 has more divisors than the one before it.
    last = ((0, 0), (0, 1))
    loss = cross_entropy(
        head,
        getattr(model, where),
        states,
        jnp.pad(jnp.where(counted, targets, 0), last),
        jnp.pad(counted.astype(sums) / jnp.maximum(jnp.sum(counted), 1).astype(sums), last),
        z_loss=z_loss,
        piece=max(vocab_chunk * devices // tokens.shape[0], 1),
    )
    if weight:
        real = real_tokens(tokens, mask=mask, sequence_ids=sequence_ids)
        loss = loss + weight * balance_loss(probabilities, real, model.config.ffn_config.moe_top_k).astype(sums)
    return loss.astype(jnp.float32)


def _moe_loss_weight(model: MPT, given: float | None) -> float:
    ffn = model.config.ffn_config
    if given is None:
        return ffn.moe_loss_weight if ffn.ffn_type == "mb_dmoe" else 0.0
    if not given >= 0:
        raise MPTError(f"moe_loss_weight: expected a number ≥ 0 or None, found {given!r}")
    if given and ffn.ffn_type not in MOE_TYPES:
        raise MPTError(f"moe_loss_weight: expected 0 or None with ffn_type={ffn.ffn_type!r}, found {given!r}")
    return given


def balance_loss(
    probabilities: Sequence[Float[Array, "B T E"]], real: Bool[Array, "B T"], top_k: int
) -> Float[Array, ""]:
    """Returns E/k · Σ over experts of (share of the tokens that chose it) · (its mean probability), meant over layers.

    It is 1 where all E experts are alike, and E/k where all tokens are sure of the same k. Gradients go through the
    probabilities. Padding does not count (in megablocks it does, unless llm-foundry's `use_pad_tok_in_ffn` is false).

    Args:
        probabilities: the router's, of each layer.
        real: True at tokens that count.
        top_k: how many experts a token chooses, k.

    Source: megablocks, megablocks/layers/moe.py, batched_load_balancing_loss, which multiplies by moe_loss_weight.
    """
    sums = accum_dtype(probabilities[0].dtype)
    n_experts = probabilities[0].shape[-1]
    n_tokens = jnp.maximum(jnp.sum(real), 1).astype(sums)

    def mean(x: Float[Array, "B T E"]) -> Float[Array, " E"]:
        return jnp.sum(jnp.where(real[..., None], x.astype(sums), 0), axis=(0, 1)) / n_tokens

    def of_layer(p: Float[Array, "B T E"]) -> Float[Array, ""]:
        chosen = jax.nn.one_hot(jax.lax.top_k(jax.lax.stop_gradient(p), top_k)[1], n_experts, dtype=sums)
        return jnp.sum(mean(jnp.sum(chosen, axis=-2)) * mean(p))

    total = jnp.sum(jnp.stack([of_layer(p) for p in probabilities]))
    return total * (n_experts / (top_k * len(probabilities)))


def counted_tokens(
    tokens: Int[Array, "B T"],
    *,
    mask: Shaped[Array, "B T"] | None = None,
    labels: Int[Array, "B T"] | None = None,
    sequence_ids: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T-1"]:
    """Tells of each token but the first of a row whether `next_token_loss` counts it."""
    real = real_tokens(tokens, mask=mask, sequence_ids=sequence_ids)
    if labels is not None:
        return (labels[:, 1:] != IGNORED) & real[:, :-1]
    counted = real[:, :-1] & real[:, 1:]
    return counted if sequence_ids is None else counted & (sequence_ids[:, :-1] == sequence_ids[:, 1:])


def real_tokens(
    tokens: Int[Array, "B T"], *, mask: Shaped[Array, "B T"] | None, sequence_ids: Int[Array, "B T"] | None
) -> Bool[Array, "B T"]:
    """Tells of each token whether it is no padding."""
    real = jnp.ones_like(tokens, bool)
    if mask is not None:
        real &= mask.astype(bool)
    return real if sequence_ids is None else real & (sequence_ids >= 0)
