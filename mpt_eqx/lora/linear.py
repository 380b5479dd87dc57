"""A linear map with an adapter."""

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from mpt_eqx.model.leaves import with_fields
from mpt_eqx.model.linear import Linear
from mpt_eqx.ops.numerics import accum_dtype, apply_dropout, rounded


class LoRALinear(eqx.Module):
    """y = W x + b + scale · B (A x), where W and b stay as they are: floating or in 8 or 4 bits.

    Attributes:
        base: W and b.
        lora_A: A, of `rank` rows.
        lora_B: B, of `rank` columns; zeros in a new adapter.
        dropout: of the x that A gets, in training; None for none.
        key: randomness of dropout, as a forward pass puts it here; None for none.
        rank: of B A, ≥ 1.
        alpha: numerator of the scale.
        rslora: whether the scale is alpha / √rank (rank-stabilised LoRA), and not alpha / rank.
    """

    base: Linear
    lora_A: Linear
    lora_B: Linear
    dropout: eqx.nn.Dropout | None
    key: PRNGKeyArray | None
    rank: int = eqx.field(static=True)
    alpha: float = eqx.field(static=True)
    rslora: bool = eqx.field(static=True)

    def __call__(self, x: Float[Array, "T in"], dtype: DTypeLike | None = None) -> Float[Array, "T out"]:
        """Returns y, rounded once: to the type of x, or to `dtype`. A x is in the type of A."""
        y = self.base(x, accum_dtype(x.dtype))
        h = apply_dropout(x, self.dropout, self.key).astype(jax.tree.leaves(self.lora_A.weight)[0].dtype)
        y = y + self.lora_B(self.lora_A(h), y.dtype) * self.scale
        return rounded(y, x.dtype if dtype is None else dtype)

    @property
    def scale(self) -> float:
        """What B A counts."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def with_key(self, key: PRNGKeyArray) -> "LoRALinear":
        """Returns the same with a key for dropout."""
        return with_fields(self, key=key)
