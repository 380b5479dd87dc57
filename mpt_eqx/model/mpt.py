"""The model: embedding, blocks, norm, logits."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import MPTError
from mpt_eqx.model.blocks import Block
from mpt_eqx.model.cache import KVCache
from mpt_eqx.model.init import init_embedding
from mpt_eqx.model.linear import Embedding, Linear
from mpt_eqx.model.norms import LayerNorm


class MPT(eqx.Module):
    """An MPT language model for one sequence of tokens; a batch is `jax.vmap(model)`.

    Its leaves are exactly the tensors of a checkpoint, under the checkpoint's names.
    """

    wte: Embedding
    blocks: tuple[Block, ...]
    norm_f: LayerNorm
    lm_head: Linear | None
    config: MPTConfig = eqx.field(static=True)

    def __init__(self, config: MPTConfig, *, key: PRNGKeyArray):
        """Makes a model with new float32 weights, drawn as `config.init_config` says.

        Args:
            config: sizes and options.
            key: randomness of the weights.
        """
        wte_key, head_key, *block_keys = jax.random.split(key, 2 + config.n_layers)
        table = (config.vocab_size, config.d_model)
        self.wte = Embedding(init_embedding(config, table, key=wte_key))
        self.blocks = tuple(Block(config, key=block_key) for block_key in block_keys)
        self.norm_f = LayerNorm(config.d_model, config.norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(init_embedding(config, table, key=head_key))
        self.config = config

    def __call__(self, tokens: Int[Array, " T"], *, mask: Bool[Array, " T"] | None = None) -> Float[Array, "T V"]:
        """Returns the logits of the token that follows each position.

        Args:
            tokens: token ids, 0 ≤ id < vocab_size; at most max_seq_len of them.
            mask: True at real tokens, False at padding, which may stand anywhere; None when all are real. Logits at
                padding mean nothing.

        Raises:
            MPTError: too many tokens, or (outside jit, where they can be seen) an id outside the vocabulary.
        """
        return self.unembed(self.hidden_states(tokens, mask=mask)[-1])

    def hidden_states(
        self, tokens: Int[Array, " T"], *, mask: Bool[Array, " T"] | None = None
    ) -> tuple[Float[Array, "T D"], ...]:
        """Returns the residual stream: the input of each block, then the output of norm_f; n_layers + 1 arrays.

        Arguments and errors as in `__call__`.
        """
        self._check(tokens)
        pos = jnp.arange(tokens.shape[0])
        visible = pos[None, :] <= pos[:, None]
        if mask is not None:
            visible &= mask[None, :]
        x = self.wte(tokens)
        states = []
        for block in self.blocks:
            states.append(x)
            x, _ = block(x, pos, pos, visible)
        return (*states, self.norm_f(x))

    def extend(self, tokens: Int[Array, " T"], cache: KVCache) -> tuple[Float[Array, "T D"], KVCache]:
        """Reads T more tokens after those in the cache.

        Args:
            tokens: the tokens that follow; they must fit into the rest of the cache.
            cache: the tokens so far.

        Returns:
            The output of norm_f at the T positions (`unembed` makes logits of it), and the cache with the T tokens
            added. Of a padded input take a cache whose `length` counts the real tokens only: the rest is then
            overwritten by what comes next.
        """
        query_pos = cache.length + jnp.arange(tokens.shape[0])
        key_pos = jnp.arange(cache.capacity)
        visible = key_pos[None, :] <= query_pos[:, None]
        x = self.wte(tokens)
        layers = []
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x, written = block(x, query_pos, key_pos, visible, layer)
            assert written is not None  # because a cache went in
            layers.append(written)
        return self.norm_f(x), KVCache(layers=tuple(layers), length=cache.length + tokens.shape[0])

    def unembed(self, x: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """Returns the logits of the output of norm_f, in its type."""
        head = Linear(self.wte.weight) if self.lm_head is None else self.lm_head
        return head(x)

    def _check(self, tokens: Int[Array, " T"]) -> None:
        n, config = tokens.shape[0], self.config
        if n > config.max_seq_len:
            raise MPTError(
                f"tokens: expected at most max_seq_len={config.max_seq_len}, found {n}; an ALiBi model can be loaded "
                f"for more with from_pretrained(…, config_overrides={{'max_seq_len': {n}}})"
            )
        if not isinstance(tokens, jax.core.Tracer) and n:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= config.vocab_size:
                bad = low if low < 0 else high
                raise MPTError(f"tokens: expected ids from 0 to {config.vocab_size - 1} (vocab_size), found {bad}")
