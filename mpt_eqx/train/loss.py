"""The loss of next-token prediction."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from mpt_eqx.model import MPT

IGNORED = -100


def next_token_loss(
    model: MPT,
    tokens: Int[Array, "B T"],
    *,
    mask: Bool[Array, "B T"] | None = None,
    labels: Int[Array, "B T"] | None = None,
) -> Float32[Array, ""]:
    """Returns the mean cross-entropy, in nats, of each token given those before it.

    Args:
        model: the model.
        tokens: a batch of token ids, 0 ≤ id < vocab_size.
        mask: True at real tokens; None when all are real.
        labels: the tokens again (the shift by one happens here), with -100 where none is to be predicted; None means
            every real token. Without any label the loss is 0.

    Source: llm-foundry 8c8dd48, llmfoundry/models/mpt/modeling_mpt.py, compute_loss_from_logits.
    """
    if labels is None:
        labels = tokens if mask is None else jnp.where(mask, tokens, IGNORED)
    if mask is None:
        logits = jax.vmap(model)(tokens)
    else:
        logits = jax.vmap(lambda row, real: model(row, mask=real))(tokens, mask)
    targets = labels[:, 1:]
    counted = targets != IGNORED
    log_probs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probs, jnp.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(counted, picked, 0.0)) / jnp.maximum(jnp.sum(counted), 1).astype(jnp.float32)
