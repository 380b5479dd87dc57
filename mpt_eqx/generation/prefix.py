"""A cached prefix: prefilled once, continued many times."""

from collections.abc import Sequence

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Int

from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import GenerationError
from mpt_eqx.generation.buckets import cache_bucket
from mpt_eqx.generation.interrupts import held_interrupts
from mpt_eqx.generation.prompts import prefill_prompts, progress_bar
from mpt_eqx.generation.state import DecodeState, empty_state, is_large, repeat_and_resize, state_shapes
from mpt_eqx.generation.validate import check_model, check_one_prompt, check_prompts
from mpt_eqx.model import MPT
from mpt_eqx.ops.platform import trim_memory
from mpt_eqx.sharding.multihost import check_same_arguments


class Prefix(eqx.Module):
    """The KV cache of a prefix, from `prefill`: `generate(…, prefix=…)` continues it, as often as wanted.

    It is a pytree of arrays that no function changes: keep it, copy it, save it with
    `equinox.tree_serialise_leaves`, or extend it with `prefill(…, prefix=…)`, which returns another one.
    """

    state: DecodeState
    config: MPTConfig = eqx.field(static=True)

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return int(self.state.cache.length[0])

    @property
    def tokens(self) -> Int[np.ndarray, " T"]:
        """The tokens of the prefix."""
        return np.asarray(self.state.tokens[0])[: len(self)]


@check_same_arguments
def prefill(model: MPT, tokens: Sequence[int], *, prefix: Prefix | None = None, progress: bool | None = None) -> Prefix:
    """Returns the KV cache of tokens, so that calls of `generate` with this prefix need not prefill them again.

    Args:
        model: the model.
        tokens: token ids; at least one, unless a prefix stands before them.
        prefix: what stands before them.
        progress: whether to show a bar on stderr when it takes over two seconds; None: where that is a terminal.

    Raises:
        GenerationError: a token is not valid, there are more than max_seq_len of them, or the prefix is that of a
            model with another configuration.
    """
    check_one_prompt(tokens)
    model = check_model(model)
    before = prefix_length(prefix)
    (row,) = check_prompts(model.config, [tokens], max_new_tokens=0, before=before)
    state = initial_state(model, prefix, 1, before + len(row))
    with progress_bar(len(row), progress) as shown:
        return Prefix(prefill_prompts(model, state, [row], before, shown), model.config)


def prefix_length(prefix: Prefix | None) -> int:
    """Returns the number of tokens of a prefix, 0 for None.

    Raises:
        GenerationError: it is not a prefix.
    """
    if prefix is not None and not isinstance(prefix, Prefix):
        raise GenerationError(f"prefix: expected what prefill(model, tokens) returns, found {type(prefix).__name__}")
    return 0 if prefix is None else len(prefix)


def initial_state(model: MPT, prefix: Prefix | None, rows: int, length: int) -> DecodeState:
    """Returns a state whose rows hold the prefix, with room for `length` tokens in each.

    Raises:
        GenerationError: the prefix is that of a model with another configuration or type.
    """
    capacity = cache_bucket(model.config, length, rows)
    if is_large(model, rows, capacity):
        trim_memory()
    if prefix is None:
        with held_interrupts():
            return empty_state(model, rows, capacity)
    found, dtype = prefix.state.hidden.dtype, model.dtype
    if prefix.config != model.config or found != dtype:
        what = f"in {found} instead of {dtype}" if found != dtype else "with another configuration"
        raise GenerationError(
            f"prefix: expected one of this model, found that of a model {what}; make it with prefill(model, tokens)"
        )
    with held_interrupts():
        return repeat_and_resize(prefix.state, rows, capacity)


def like_rows(model: MPT, prefix: Prefix | None, rows: int, copies: int, capacity: int) -> DecodeState:
    """Returns what has the shapes of a state of `copies` times so many rows, but takes no memory: it is not written."""
    if prefix is None:
        one = state_shapes(model, rows, capacity)
    else:
        one = jax.eval_shape(lambda state: repeat_and_resize(state, rows, capacity), prefix.state)
    all_rows = jax.eval_shape(lambda state: repeat_and_resize(state, copies, capacity), one)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), all_rows)
