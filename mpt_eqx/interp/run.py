"""run: a forward pass that captures and edits activations by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from mpt_eqx.interp.edits import resolve_edits
from mpt_eqx.interp.places import matching, places
from mpt_eqx.model import MPT
from mpt_eqx.model.arguments import as_tokens
from mpt_eqx.model.taps import Tap
from mpt_eqx.ops.switches import library_function


class Run(eqx.Module):
    """What `run` returns.

    Attributes:
        logits: of the token that follows each position.
        activations: what was captured, by the names of `places`.
    """

    logits: Float[Array, "T V"]
    activations: dict[str, Array]


@library_function
def run(
    model: MPT,
    tokens: Int[Array, " T"] | ArrayLike | Sequence[int],
    *,
    capture: str | Sequence[str] = (),
    edits: Mapping[str, Any] | None = None,
    mask: Bool[Array, " T"] | Int[Array, " T"] | np.ndarray | Sequence[int] | None = None,
    sequence_ids: Int[Array, " T"] | np.ndarray | Sequence[int] | None = None,
) -> Run:
    """Returns the logits of a sequence and the activations at the places that are asked for, without dropout.

    A pure function of one sequence, for use inside jit, vmap and grad. Nothing is computed for places that are not
    asked for.

    Args:
        model: the model.
        tokens: token ids, as in `MPT.__call__`, like the two last arguments.
        capture: names of places, or patterns such as "blocks.*.attn.hook_pattern"; "*" is every place. `places` lists
            them with their shapes. Activations are captured after they are edited.
        edits: for names of places, or patterns of some: an array, which replaces the activation; `Add`, `Scale`,
            `Ablate`, `Replace` or `Apply`; a function of the activation; or a list of these. Several edits of a place
            are made in the order of names and patterns. They are a pytree: new numbers never compile again.
        mask: which tokens are real.
        sequence_ids: which of several packed sequences each token belongs to.

    Raises:
        MPTError: an unknown place, a value that does not fit its activation, or as in `MPT.__call__`.
    """
    tokens = as_tokens(tokens, model.config.vocab_size, "interp.run")
    wanted = matching("capture", capture, list(places(model.config)))
    tap = Tap(resolve_edits(model.config, edits, tokens.shape[0]), frozenset(wanted), None, {})
    model = eqx.nn.inference_mode(model)
    states = model.hidden_states(tokens, mask=mask, sequence_ids=sequence_ids, tap=tap)
    return Run(model.unembed(states[-1]), {name: tap.found[name] for name in wanted})
