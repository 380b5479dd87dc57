"""Cross-entropy of logits that are never held all at once."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int, Shaped

from mpt_eqx.ops.switches import library_switches

Head = Callable[[Any, Float[Array, "T D"]], Float[Array, "T V"]]


def cross_entropy(
    head: Head,
    weights: Any,
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    counts: Float[Array, "B T"],
    *,
    z_loss: float,
    piece: int,
) -> Float[Array, ""]:
    """Returns Σ counts · (−log p(target) + z_loss · (log Σ exp logits)²), with the logits of few positions at a time.

    Derivatives of any order and kind exist. The gradient is computed along with the value, so that no product is
    computed twice; nothing of the size of the logits is kept for it.

    Args:
        head: returns the logits of some positions, in the type of sums, from weights and hidden states.
        weights: what it needs, of which the floating arrays have derivatives.
        x: hidden states.
        targets: the token that follows each position; any token where none is counted.
        counts: the factor of each position; 0 leaves one out.
        z_loss: factor of the second term.
        piece: positions of each row whose logits are held at a time.
    """
    floating, rest = eqx.partition(weights, eqx.is_inexact_array)
    rows, length, _ = x.shape
    pieces = -(-length // piece)
    piece = -(-length // pieces)

    def logits_of(floating: Any, x: Float[Array, "B P D"]) -> Float[Array, "B P V"]:
        return jax.vmap(lambda x: head(eqx.combine(floating, rest), x))(x)

    def value(logits: Array, targets: Array, counts: Array) -> tuple[Array, Array, Array]:
        """Returns the sum, the probabilities of all tokens, and the logarithms of the sums of exponentials."""
        largest = jnp.max(logits, axis=-1, keepdims=True)
        powers = jnp.exp(logits - largest)
        sums = jnp.sum(powers, axis=-1, keepdims=True)
        log_sums = (largest + jnp.log(sums))[..., 0]
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        each = log_sums - picked + z_loss * log_sums**2
        return jnp.sum(jnp.where(counts == 0, 0, counts * each)), powers / sums, log_sums

    def split(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "C B P ..."]:
        padded = jnp.pad(x, ((0, 0), (0, pieces * piece - length), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(rows, pieces, piece, *x.shape[2:]), 1, 0)

    def over_pieces(one: Callable[[Any, Any], tuple[Any, Any]], start: Any, x: Array) -> tuple[Any, Any]:
        if pieces == 1:
            return one(start, (x, targets, counts))
        return jax.lax.scan(one, start, (split(x), split(targets), split(counts)))

    @jax.custom_jvp
    def total(floating: Any, x: Float[Array, "B T D"]) -> Float[Array, ""]:
        def one(so_far: Array, this: tuple[Array, Array, Array]) -> tuple[Array, None]:
            x, targets, counts = this
            return so_far + value(logits_of(floating, x), targets, counts)[0], None

        return over_pieces(one, jnp.zeros((), counts.dtype), x)[0]

    @library_switches()
    def with_gradient(floating: Any, x: Float[Array, "B T D"], of_weights: bool) -> tuple[Array, Any, Array]:
        """Returns the sum and its gradients, None for that of the weights where it is not asked for."""

        def one(so_far: tuple[Array, Any], this: tuple[Array, Array, Array]) -> tuple[tuple[Array, Any], Array]:
            x, targets, counts = this
            if of_weights:
                logits, pull = jax.vjp(logits_of, floating, x)
            else:
                logits, pull = jax.vjp(lambda x: logits_of(floating, x), x)
            here, likely, log_sums = value(logits, targets, counts)
            factor = (counts * (1 + 2 * z_loss * log_sums))[..., None]
            is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
            slope = likely * factor
            *grads, slope_x = pull(jnp.where(is_target, slope - counts[..., None], slope))
            loss, gradient = so_far
            if of_weights:
                gradient = jax.tree.map(lambda a, b: a + b.astype(a.dtype), gradient, grads[0])
            return (loss + here, gradient), slope_x

        sums = jax.tree.map(lambda w: jnp.zeros(w.shape, counts.dtype), floating) if of_weights else None
        (loss, gradient), slope = over_pieces(one, (jnp.zeros((), counts.dtype), sums), x)
        if pieces > 1:
            slope = jnp.moveaxis(slope, 0, 1).reshape(rows, -1, x.shape[-1])[:, :length]
        return loss, jax.tree.map(lambda g, w: g.astype(w.dtype), gradient, floating) if of_weights else None, slope

    def is_zero(tangent: Any) -> bool:
        return isinstance(tangent, SymbolicZero)

    def rule(primals: tuple[Any, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
        moved, moved_x = tangents
        fixed = jax.tree.map(is_zero, moved, is_leaf=is_zero)
        of_weights = not all(jax.tree.leaves(fixed))
        loss, gradient, slope = with_gradient(*primals, of_weights)

        def along(gradient: Array, moved: Any) -> Array:
            if is_zero(moved):
                return jnp.zeros((), counts.dtype)
            return jnp.sum(gradient.astype(counts.dtype) * moved.astype(counts.dtype))

        parts = [along(slope, moved_x)]
        if of_weights:
            parts += jax.tree.leaves(jax.tree.map(along, gradient, moved))
        return loss, sum(parts[1:], parts[0])

    total.defjvp(rule, symbolic_zeros=True)
    return total(floating, x)
