"""ShardingRules: which axes of a mesh shard which axes of the arrays."""

import dataclasses

from mpt_eqx.errors import ShardingError

Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Which axes of a mesh share which axes of the arrays; None leaves them whole on every device.

    Attributes:
        vocab: rows of the embedding and of the head, and logits.
        embed: the width of the residual stream, in weights; that of activations stays whole.
        heads: heads of queries, in Wqkv, out_proj and activations.
        kv_heads: heads of keys and values, in Wqkv and the cache.
        head_dim: the size of a head, in the cache and in norms of single heads.
        mlp: the hidden size of the feed-forward network.
        layers: must be None: the blocks of a model are arrays of their own.
        batch: rows of a batch.
        seq: positions of a sequence, in activations.
        experts: the experts of a mixture.
        uneven: along which of these weights stay whole, instead of being an error, where the mesh does not divide
            them. Activations and the cache always do.
    """

    vocab: Axes = None
    embed: Axes = None
    heads: Axes = None
    kv_heads: Axes = None
    head_dim: Axes = None
    mlp: Axes = None
    layers: Axes = None
    batch: Axes = None
    seq: Axes = None
    experts: Axes = None
    uneven: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self) if field.name != "uneven"]
        for name in names:
            axes = getattr(self, name)
            known = axes is None or isinstance(axes, str | tuple)
            if not known or not all(isinstance(axis, str) and axis for axis in mesh_axes(axes)):
                raise ShardingError(f"rules.{name}: expected a mesh axis, a tuple of some, or None, found {axes!r}")
        if self.layers is not None:
            raise ShardingError(
                f"rules.layers: expected None, found {self.layers!r}: it would match nothing, since every block has "
                f"arrays of its own; to share the layers' weights use embed"
            )
        if not isinstance(self.uneven, tuple):
            raise ShardingError(f"rules.uneven: expected a tuple of names, found {self.uneven!r}")
        for together in (("batch", "seq"), ("batch", "kv_heads", "head_dim")):
            used = [axis for name in together for axis in self.axes(name)]
            if twice := [axis for axis in used if used.count(axis) > 1]:
                raise ShardingError(
                    f"rules: expected different mesh axes for {', '.join(together)}, which stand together in "
                    f"activations or in the cache, found {twice[0]!r} twice; change one of them"
                )
        if unknown := [name for name in self.uneven if name not in names]:
            raise ShardingError(f"rules.uneven: expected some of {', '.join(names)}, found {unknown[0]!r}")

    def axes(self, name: str | None) -> tuple[str, ...]:
        """Returns the axes of the mesh that share the logical axis `name`; none for None."""
        return () if name is None else mesh_axes(getattr(self, name))


def mesh_axes(axes: Axes) -> tuple[str, ...]:
    """Returns the axes of a mesh that a rule or a part of a PartitionSpec names."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())
