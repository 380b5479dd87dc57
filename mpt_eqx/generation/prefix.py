"""Reading a text once, to continue it many times."""

from collections.abc import Sequence

import equinox as eqx
import numpy as np
from jaxtyping import Int

from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import GenerationError
from mpt_eqx.generation.decode import DecodeState, empty_state, spread
from mpt_eqx.generation.loop import agree_on_arguments, bar, capacity_for, read_prompts
from mpt_eqx.generation.validate import check_one_prompt, check_prompts
from mpt_eqx.model import MPT


class Prefix(eqx.Module):
    """A text that a model has read: `generate(…, prefix=…)` goes on from it, as often as wanted.

    It is a pytree of arrays that nothing changes: it can be kept, copied, written with
    `equinox.tree_serialise_leaves`, and extended with `prefill(…, prefix=…)`, which gives another one.
    """

    state: DecodeState
    config: MPTConfig = eqx.field(static=True)

    def __len__(self) -> int:
        """Returns how many tokens were read."""
        return int(self.state.cache.length[0])

    @property
    def tokens(self) -> Int[np.ndarray, " T"]:
        """The tokens that were read."""
        return np.asarray(self.state.tokens[0])[: len(self)]


def prefill(model: MPT, tokens: Sequence[int], *, prefix: Prefix | None = None, progress: bool | None = None) -> Prefix:
    """Reads tokens into a cache, so that no call of `generate` with this prefix reads them again.

    Args:
        model: the model.
        tokens: token ids; at least one, where nothing stands before.
        prefix: what stands before them.
        progress: whether to show a bar on stderr when it takes over two seconds; None: where that is a terminal.

    Raises:
        GenerationError: a token is not valid, there are more than max_seq_len of them, or the prefix is that of a
            model with another configuration.
    """
    agree_on_arguments(locals())
    check_one_prompt(tokens)
    before = length_of(prefix)
    (row,) = check_prompts(model.config, [tokens], max_new_tokens=0, before=before)
    state = state_after(model, prefix, 1, before + len(row))
    with bar(len(row), progress) as shown:
        return Prefix(read_prompts(model, state, [row], before, shown), model.config)


def length_of(prefix: Prefix | None) -> int:
    """Returns how many tokens a prefix has.

    Raises:
        GenerationError: it is none.
    """
    if prefix is not None and not isinstance(prefix, Prefix):
        raise GenerationError(f"prefix: expected what prefill(model, tokens) returns, found {type(prefix).__name__}")
    return 0 if prefix is None else len(prefix)


def state_after(model: MPT, prefix: Prefix | None, rows: int, length: int) -> DecodeState:
    """Returns a state of rows that hold the prefix, with room for `length` tokens in each."""
    capacity = capacity_for(model.config, length)
    if prefix is None:
        return empty_state(model, rows, capacity)
    read_in, dtype = prefix.state.hidden.dtype, model.wte.weight.dtype
    if prefix.config != model.config or read_in != dtype:
        what = f"in {read_in} instead of {dtype}" if read_in != dtype else "with another configuration"
        raise GenerationError(
            f"prefix: expected one that this model has read, found that of a model {what}; make it with "
            f"prefill(model, tokens)"
        )
    return spread(prefix.state, rows, capacity)
