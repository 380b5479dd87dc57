"""remat: less memory for a gradient, by computing parts of the blocks again."""

from typing import Any, Literal

from mpt_eqx.errors import MPTError
from mpt_eqx.model import MPT
from mpt_eqx.model.leaves import with_fields
from mpt_eqx.model.remat import POLICIES


def remat(model: MPT, how: Literal["none", "full", "dots", "offload"]) -> MPT:
    """Returns the model with another choice of what is kept of its blocks for a gradient; values stay the same.

    A gradient then needs less memory, and more time. The choice is a part of the model, `model.remat`; checkpoints do
    not carry it, and generation ignores it.

    XLA's CPU backend joins what is computed again with what was computed before, and so undoes this, but not in a
    stacked model: `stack` the model there.

    Args:
        model: a model, stacked or not.
        how: "full" keeps the input of each block; "offload" keeps it in the host's memory, where the device has one of
            its own; "dots" keeps it and the products with weights, so that what is computed again is little, but for
            attention; "none", as models are made, keeps what XLA chooses, and in a stacked model all products.

    Raises:
        MPTError: it is none of these.
    """
    check_how(how)
    return with_fields(model, remat=how)


def check_how(how: Any) -> None:
    """Raises an MPTError unless there is such a choice."""
    if not isinstance(how, str) or how not in POLICIES:
        raise MPTError(f"how: expected {', '.join(map(repr, POLICIES))}, found {how!r}")
