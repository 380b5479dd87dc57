"""The model: embedding, blocks, norm, logits."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, DTypeLike, Float, Int, PRNGKeyArray, Shaped

from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import MPTError
from mpt_eqx.model.agreement import check_agreement
from mpt_eqx.model.arguments import as_embeddings, as_row, as_tokens
from mpt_eqx.model.block import Block
from mpt_eqx.model.init import init_embedding, init_linear
from mpt_eqx.model.kv_cache import KVCache
from mpt_eqx.model.leaves import is_array
from mpt_eqx.model.linear import Embedding, Linear
from mpt_eqx.model.norms import LayerNorm, RMSNorm, make_norm
from mpt_eqx.model.positions import Positions, token_positions
from mpt_eqx.model.remat import run_block
from mpt_eqx.model.stacked import StackedBlocks
from mpt_eqx.model.taps import UNTAPPED, Tap
from mpt_eqx.ops.layer_cache import KeysValues, LayerCache
from mpt_eqx.ops.layout import Layout
from mpt_eqx.ops.numerics import apply_dropout, scale, softcap
from mpt_eqx.ops.quantized import QuantizedWeight
from mpt_eqx.ops.sizes import at_most
from mpt_eqx.ops.switches import library_function


class MPT(eqx.Module):
    """An MPT language model for one sequence of tokens; a batch is `jax.vmap(model)`.

    Its arrays are exactly the tensors of a checkpoint, under the checkpoint's names. What a configuration does not use
    is None. Only where it asks for dropout or jitter are there other leaves, the switches that `eqx.nn.inference_mode`
    turns; then `eqx.filter_jit` and `eqx.filter_grad` are needed, as for any Equinox model with dropout.
    """

    wte: Embedding
    wpe: Embedding | None
    emb_dropout: eqx.nn.Dropout | None
    blocks: tuple[Block, ...] | StackedBlocks
    norm_f: LayerNorm | RMSNorm
    lm_head: Linear | None
    layout: Layout | None
    logit_scale: float | None = eqx.field(static=True)
    remat: str = eqx.field(static=True)
    config: MPTConfig = eqx.field(static=True)

    def __init__(self, config: MPTConfig, *, key: PRNGKeyArray):
        """Makes a model with new float32 weights, drawn as `config.init_config` says.

        Args:
            config: sizes and options.
            key: randomness of the weights.
        """
        wte_key, wpe_key, head_key, *block_keys = jax.random.split(key, 3 + config.n_layers)
        v, d = config.vocab_size, config.d_model
        wte = init_embedding(config, (v, d), key=wte_key)
        self.wte = Embedding(wte if config.pad_token_id is None else wte.at[config.pad_token_id].set(0))
        learned = config.learned_pos_emb
        self.wpe = Embedding(init_embedding(config, (config.max_seq_len, d), key=wpe_key)) if learned else None
        self.emb_dropout = eqx.nn.Dropout(config.emb_pdrop) if config.emb_pdrop else None
        self.blocks = tuple(
            Block(config, layer, key=block_key) for layer, block_key in zip(config.layers, block_keys, strict=True)
        )
        self.norm_f = make_norm(config)
        self.lm_head = None if config.tie_word_embeddings else init_linear(config, (v, d), False, key=head_key)
        self.layout = None
        self.logit_scale = d**-0.5 if isinstance(config.logit_scale, str) else config.logit_scale
        self.remat = "none"
        self.config = config

    @library_function
    def __call__(
        self,
        tokens: Int[Array, " T"] | ArrayLike | Sequence[int] | None,
        *,
        mask: Bool[Array, " T"] | Int[Array, " T"] | np.ndarray | Sequence[int] | None = None,
        sequence_ids: Int[Array, " T"] | np.ndarray | Sequence[int] | None = None,
        key: PRNGKeyArray | None = None,
        embeddings: Float[Array, "T D"] | ArrayLike | None = None,
        logits_dtype: DTypeLike | None = None,
    ) -> Float[Array, "T V"]:
        """Returns the logits of the token that follows each position.

        Args:
            tokens: token ids of one sequence, 0 ≤ id < vocab_size; at most max_seq_len of them. With `embeddings` they
                may be None.
            mask: True (or 1) at real tokens, False (or 0) at padding, which may stand anywhere; None when all are
                real. Logits at padding mean nothing.
            sequence_ids: which of several packed sequences each token belongs to, −1 for padding; tokens see their own
                sequence only, in which positions begin with 0. For models with attn_uses_sequence_id.
            key: randomness of dropout and jitter, needed when the configuration asks for them, except under
                `eqx.nn.inference_mode`.
            embeddings: used in place of the rows of wte, for soft prompts and for gradients with respect to them.
            logits_dtype: the type of the logits; None is that of the model. Log-probabilities of 16-bit models need
                float32: logits in bfloat16 are rounded by up to 2⁻⁸ of their size, and so move by hundredths of a nat.

        Raises:
            MPTError: too many tokens, an argument that does not fit the model, or (outside jit, where they can be
                seen) an id outside the vocabulary.
        """
        _, x = self._states(tokens, mask, sequence_ids, key, embeddings, UNTAPPED)
        return self.unembed(x, dtype=logits_dtype)

    @property
    def dtype(self) -> np.dtype:
        """The type that it computes in: the embedding's, or norm_f's where that is quantised or something else."""
        weight: Any = getattr(self.wte, "weight", None)
        return np.dtype(weight.dtype if is_array(weight) else self.norm_f.weight.dtype)

    @library_function
    def hidden_states(
        self,
        tokens: Int[Array, " T"] | ArrayLike | Sequence[int] | None,
        *,
        mask: Bool[Array, " T"] | Int[Array, " T"] | np.ndarray | Sequence[int] | None = None,
        sequence_ids: Int[Array, " T"] | np.ndarray | Sequence[int] | None = None,
        key: PRNGKeyArray | None = None,
        embeddings: Float[Array, "T D"] | ArrayLike | None = None,
        tap: Tap = UNTAPPED,
    ) -> tuple[Float[Array, "T D"], ...]:
        """Returns the residual stream: the input of each block, then the output of norm_f; n_layers + 1 arrays.

        Arguments and errors as in `__call__`; `tap` is what `interp.run` captures and edits.
        """
        inputs, x = self._states(tokens, mask, sequence_ids, key, embeddings, tap)
        return (*inputs, x)

    def _states(
        self, tokens: Any, mask: Any, sequence_ids: Any, key: PRNGKeyArray | None, embeddings: Any, tap: Tap
    ) -> tuple[Sequence[Float[Array, "T D"]] | Float[Array, "L T D"], Float[Array, "T D"]]:
        """Returns the input of each block, and the output of norm_f."""
        if tokens is not None or embeddings is None:
            tokens = as_tokens(tokens, self.config.vocab_size)
        if embeddings is not None:
            embeddings = as_embeddings(embeddings, tokens, self.config.d_model, self.dtype)
            tokens = jnp.zeros(embeddings.shape[0], jnp.int32) if tokens is None else tokens
        mask, sequence_ids = as_row("mask", mask, tokens.shape), as_row("sequence_ids", sequence_ids, tokens.shape)
        self._check(tokens, sequence_ids, key)
        place = jnp.arange(tokens.shape[0])
        if mask is not None:
            mask = mask.astype(bool)  # tokenizers give 0 and 1
        if sequence_ids is not None:
            mask = sequence_ids >= 0 if mask is None else mask & (sequence_ids >= 0)
        allowed = None if mask is None else jnp.broadcast_to(mask, tokens.shape * 2)
        if allowed is not None and sequence_ids is not None:
            allowed &= sequence_ids[None, :] == sequence_ids[:, None]
        token = place if mask is None else token_positions(mask, sequence_ids)
        n_keys = 1 + len(self.blocks)
        keys = (None,) * n_keys if key is None else jax.random.split(key, n_keys)
        tap = tap.at(place)
        x = self._embed(tokens, token, keys[0], embeddings, tap)
        positions = Positions(query=place, token=token, allowed=allowed)
        inputs, x, _ = self._run(x, positions, (None,) * len(self.blocks), keys[1:], tap)
        return inputs, tap("ln_final.hook_normalized", self.norm_f(x))

    @library_function
    def extend(
        self, tokens: Int[Array, " T"] | ArrayLike | Sequence[int], cache: KVCache, *, tap: Tap = UNTAPPED
    ) -> tuple[Float[Array, "T D"], KVCache]:
        """Reads T more tokens after those in the cache, without dropout.

        Args:
            tokens: the tokens that follow, 0 ≤ id < vocab_size; they must fit into the rest of the cache.
            cache: the tokens so far.
            tap: what is edited, for positions that count from the start of the cache.

        Returns:
            The output of norm_f at the T positions (`unembed` makes logits of it), and the cache with the T tokens
            added. Of a padded input take a cache whose `length` counts the real tokens only: the rest is then
            overwritten by what comes next.

        Raises:
            MPTError: (outside jit, where it can be seen) an id outside the vocabulary, more tokens than fit into the
                cache, or more than max_seq_len.
        """
        tokens = as_tokens(tokens, self.config.vocab_size, "model.extend")
        if not isinstance(cache.length, jax.core.Tracer) and cache.length.ndim == 0:
            total = int(cache.length) + tokens.shape[0]
            self._check_length(total)
            if at_most(cache.capacity + 1, total):
                raise MPTError(
                    f"tokens: expected at most {cache.capacity - int(cache.length)}, which fit into the rest of the "
                    f"cache, found {tokens.shape[0]}; make room with cache.resized({total})"
                )
        query = cache.length + jnp.arange(tokens.shape[0])
        positions = Positions(query=query, token=query, allowed=None)
        tap = tap.at(query)
        x = self._embed(tokens, query, None, None, tap)
        _, x, written = self._run(x, positions, cache.layers, (None,) * len(self.blocks), tap)
        if not isinstance(cache.layers, LayerCache):
            pairs = zip(cache.layers, written, strict=True)
            written = tuple(None if own is None else read for own, read in pairs)
        x = tap("ln_final.hook_normalized", self.norm_f(x))
        return x, KVCache(layers=written, length=cache.length + tokens.shape[0])

    @library_function
    @jax.named_scope("unembed")
    def unembed(self, x: Float[Array, "T D"], *, dtype: DTypeLike | None = None) -> Float[Array, "T V"]:
        """Returns the logits of the output of norm_f, in its type or in `dtype`, as in `__call__`."""
        head = Linear(self.wte.weight) if self.lm_head is None else self.lm_head
        logits = head(x, dtype)
        if self.logit_scale is not None:
            logits = scale(logits, self.logit_scale)
        if self.config.final_logit_softcapping is not None:
            logits = softcap(logits, self.config.final_logit_softcapping)
        return logits

    @jax.named_scope("embed")
    def _embed(
        self,
        tokens: Int[Array, " T"],
        token: Int[Array, " T"],
        key: PRNGKeyArray | None,
        embeddings: Float[Array, "T D"] | None,
        tap: Tap,
    ) -> Float[Array, "T D"]:
        """Returns the residual stream before the first block."""
        x = self.wte(tokens) if embeddings is None else embeddings
        if isinstance(getattr(self.wte, "weight", None), QuantizedWeight):
            x = x.astype(self.dtype)
        x = tap("hook_embed", x)
        if self.config.pad_token_id is not None and embeddings is None:
            x = jnp.where((tokens == self.config.pad_token_id)[:, None], jax.lax.stop_gradient(x), x)
        if self.wpe is not None:
            x = x + self.wpe(token)
        if (fraction := self.config.embedding_fraction) != 1:
            # The value stays, the gradient shrinks: arXiv:2210.02414, page 7.
            x = scale(x, fraction) + scale(jax.lax.stop_gradient(x), 1 - fraction)
        return self._constrain(apply_dropout(x, self.emb_dropout, key))

    def _constrain(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Returns the residual stream as it lies on a mesh, if the model does."""
        return x if self.layout is None else self.layout.constrain_batched(x, "seq", None)

    def _run(
        self,
        x: Float[Array, "T D"],
        positions: Positions,
        cache: Any,
        keys: Shaped[Array, "L ..."] | Sequence[None],
        tap: Tap,
    ) -> tuple[Sequence[Float[Array, "T D"]] | Float[Array, "L T D"], Float[Array, "T D"], Any]:
        """Returns the input of each block, the output of the last, and the keys and values that each block read."""
        if callable(self.blocks):
            return self.blocks(x, positions, cache, keys, tap=tap, constrain=self._constrain, remat=self.remat)
        inputs: list[Float[Array, "T D"]] = []
        read: list[KeysValues | LayerCache] = []
        layers = zip(self.blocks, self.config.layers, cache, keys, strict=True)
        for number, (block, layer, own, key) in enumerate(layers):
            inputs.append(x)
            kv = own if layer.kv_from is None else read[layer.kv_from]
            x_kv = None if layer.kv_x_from is None else inputs[layer.kv_x_from]
            of_block = tap.of_block(number)
            x, kv, found = run_block(block, x, positions, kv, x_kv, key=key, tap=of_block, remat=self.remat)
            tap.keep(number, found)
            x = self._constrain(x)
            read.append(kv)
        return inputs, x, read

    def _check(self, tokens: Int[Array, " T"], sequence_ids: Int[Array, " T"] | None, key: PRNGKeyArray | None) -> None:
        config = self.config
        self._check_length(tokens.shape[0])
        if sequence_ids is not None and not config.attn_config.attn_uses_sequence_id:
            raise MPTError(
                "sequence_ids: expected none, because attn_config.attn_uses_sequence_id is false; load the model with "
                "config_overrides={'attn_config': {'attn_uses_sequence_id': True}}"
            )
        if key is None and self._is_random():
            raise MPTError(
                "key: expected a key, such as jax.random.key(0), because the model has dropout or jitter; "
                "switch them off with eqx.nn.inference_mode(model)"
            )

    def _check_length(self, total: Any) -> None:
        """Checks the number of tokens that are read in all."""
        config = self.config
        check_agreement(self)
        if at_most(config.max_seq_len + 1, total):
            raise MPTError(
                f"tokens: expected at most max_seq_len={config.max_seq_len}, found {total}; "
                f"{max_len_hint(config, total)}"
            )

    def _is_random(self) -> bool:
        """Tells whether any dropout or jitter is on."""
        modules = jax.tree.leaves(self, is_leaf=lambda node: hasattr(node, "inference"))
        return not all(getattr(module, "inference", True) for module in modules)


def max_len_hint(config: MPTConfig, n: Any) -> str:
    """Returns what to do about an input of n tokens, which is more than max_seq_len."""
    if config.learned_pos_emb:
        return "learned positions end there; shorten the input"
    how = f"from_pretrained(…, config_overrides={{'max_seq_len': {n}}})"
    return f"shorten the input, or load the model for more with {how} or --max-seq-len {n} on the command line"
