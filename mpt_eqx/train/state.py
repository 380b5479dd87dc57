"""The state of a training run: weights, what the optimizer keeps, the step and the key."""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, PRNGKeyArray

from mpt_eqx.errors import MPTError
from mpt_eqx.model import MPT
from mpt_eqx.model.leaves import is_array
from mpt_eqx.ops.switches import library_function
from mpt_eqx.train.optimizers import choice


class TrainState(eqx.Module):
    """Everything that a step of training reads and writes; a pytree.

    Attributes:
        model: the weights. Those that are trained are float32, or wider.
        opt_state: what the optimizer keeps of the weights that are trained.
        step: how many steps were done.
        key: randomness of dropout; step n draws with fold_in(key, n).
        trainable: a tree like the model: True at the arrays that are trained.
    """

    model: MPT
    opt_state: optax.OptState
    step: Int[Array, ""]
    key: Key[Array, ""]
    trainable: Any

    @classmethod
    @library_function
    def create(
        cls,
        model: MPT,
        optimizer: optax.GradientTransformation,
        *,
        key: PRNGKeyArray | None = None,
        trainable: Any = None,
    ) -> "TrainState":
        """Returns the state before the first step.

        Weights of 16 bits that are to be trained become float32 ones, and a warning says so: a step of 1e-5 of a
        weight near 1 is less than half of the distance of two bfloat16 numbers there, so that it would change nothing.
        `make_train_step(…, compute_dtype="bfloat16")` computes in 16 bits all the same.

        The state takes over the arrays of the model that it need not widen, and the first step frees them: load the
        model again, or copy it, where it is wanted afterwards.

        Args:
            model: the weights to begin with, also sharded ones.
            optimizer: of optax, or one of this module's.
            key: randomness of dropout; None where there is none.
            trainable: what is trained: a tree of booleans like the model, a function of the model that returns one,
                such as `named("*norm*")`; None for all floating arrays. The optimizer keeps nothing of the rest.

        Raises:
            MPTError: `trainable` is not like the model, or picks nothing, or something that is not floating.
        """
        spec = choice(trainable, model)
        if spec is None:
            spec = jax.tree.map(_is_floating, model)
        structures: list[Any] = [jax.tree.structure(tree) for tree in (spec, jax.tree.map(lambda _: True, model))]
        if structures[0] != structures[1]:
            raise MPTError("trainable: expected a tree of booleans like the model, found another tree")
        spec = jax.tree.map(bool, spec)
        picked = [leaf for leaf, there in zip(jax.tree.leaves(model), jax.tree.leaves(spec), strict=True) if there]
        if not picked or not all(map(_is_floating, picked)):
            kind = "none" if not picked else next(leaf for leaf in picked if not _is_floating(leaf)).dtype
            raise MPTError(f"trainable: expected floating arrays, found {kind}; quantised weights need adapters")
        narrow = sorted({str(leaf.dtype) for leaf in picked if leaf.dtype.itemsize < 4})
        if narrow:
            warnings.warn(
                f"TrainState.create: weights in {' and '.join(narrow)} are trained in float32, because small steps "
                "would be lost in 16 bits",
                stacklevel=2,
            )
        widened = jax.tree.map(
            lambda leaf, there: leaf.astype(jnp.float32) if there and leaf.dtype.itemsize < 4 else leaf, model, spec
        )
        key = jax.random.key(0) if key is None else key
        return cls(
            model=widened,
            opt_state=optimizer.init(eqx.filter(widened, spec)),
            step=jnp.zeros((), jnp.int32),
            key=jax.random.wrap_key_data(key) if key.dtype == jnp.uint32 else key,
            trainable=spec,
        )


def _is_floating(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
