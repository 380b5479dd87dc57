"""Where tokens stand, and what each may see."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Positions(eqx.Module):
    """Where the T queries of one call stand, and what they may see.

    Attributes:
        query: place of each query in its input, 0-based, padding counted; in the cache, also where its key is written.
        token: how many real tokens of its sequence stand before each query; the same as `query` where nothing is
            padded or packed.
        allowed: True where a query may see a key; None for all keys. Those after the query are hidden besides.
    """

    query: Int[Array, " T"]
    token: Int[Array, " T"]
    allowed: Bool[Array, "T T"] | None


def token_positions(mask: Bool[Array, " T"], sequence_ids: Int[Array, " T"] | None = None) -> Int[Array, " T"]:
    """Returns each place minus the padding up to it, but at least 0; each packed sequence begins with 0.

    llm-foundry lets learned positions run on over the sequences of a row, so that what a token reads depends on what is
    packed before it.

    Source: llm-foundry 0.22, llmfoundry/models/mpt/modeling_mpt.py, MPTModel.forward.
    """
    places = jnp.maximum(jnp.arange(mask.shape[0]) - jnp.cumsum(~mask), 0)
    if sequence_ids is None:
        return places
    same = (sequence_ids[None, :] == sequence_ids[:, None]) & mask
    return jnp.maximum(places - jnp.min(jnp.where(same, places, mask.shape[0]), axis=1), 0)
