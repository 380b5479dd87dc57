"""ShardingRules: which axes of a mesh shard which axes of the arrays."""

import dataclasses

from mpt_eqx.errors import ShardingError

Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Which axes of a mesh shard which axes of the arrays; None replicates them.

    Attributes:
        vocab: rows of the embedding and of the head, and logits.
        embed: the width of the residual stream, in weights; activations are never sharded over it.
        heads: heads of queries, in Wqkv, out_proj and activations.
        kv_heads: heads of keys and values, in Wqkv and the cache.
        head_dim: the size of a head, in the cache and in norms of single heads.
        mlp: the hidden size of the feed-forward network.
        layers: must be None: the blocks of a model are arrays of their own.
        batch: rows of a batch.
        seq: positions of a sequence, in activations.
        experts: the experts of a mixture.
        allow_replicated: along which of these a weight is replicated, instead of being an error, where the mesh does
            not divide it. Activations and the cache always are.
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
    allow_replicated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self) if field.name != "allow_replicated"]
        for name in names:
            axes = getattr(self, name)
            known = axes is None or isinstance(axes, str | tuple)
            if not known or not all(isinstance(axis, str) and axis for axis in mesh_axes(axes)):
                raise ShardingError(f"rules.{name}: expected a mesh axis, a tuple of some, or None, found {axes!r}")
        if self.layers is not None:
            raise ShardingError(
                f"rules.layers: expected None, found {self.layers!r}: it would match nothing, since every block has "
                f"arrays of its own; to shard the layers' weights use embed"
            )
        if not isinstance(self.allow_replicated, tuple):
            raise ShardingError(f"rules.allow_replicated: expected a tuple of names, found {self.allow_replicated!r}")
        for names_of_one in (("batch", "seq"), ("batch", "kv_heads", "head_dim")):
            used = [axis for name in names_of_one for axis in self.axes(name)]
            if twice := [axis for axis in used if used.count(axis) > 1]:
                raise ShardingError(
                    f"rules: expected different mesh axes for {', '.join(names_of_one)}, which stand together in "
                    f"activations or in the cache, found {twice[0]!r} twice; change one of them"
                )
        if unknown := [name for name in self.allow_replicated if name not in names]:
            raise ShardingError(f"rules.allow_replicated: expected some of {', '.join(names)}, found {unknown[0]!r}")

    def axes(self, name: str | None) -> tuple[str, ...]:
        """Returns the axes of the mesh over which the logical axis `name` is sharded; none for None."""
        return () if name is None else mesh_axes(getattr(self, name))


def mesh_axes(axes: Axes) -> tuple[str, ...]:
    """Returns the axes of a mesh that a rule or a part of a PartitionSpec names."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())
