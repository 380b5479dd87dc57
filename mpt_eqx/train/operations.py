"""The operations of a step that trains some of the weights."""

import math
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp

from mpt_eqx.config import count_flops
from mpt_eqx.errors import MPTError
from mpt_eqx.model import MPT
from mpt_eqx.model.leaves import is_array, leaf_name
from mpt_eqx.model.stacked import StackedBlocks
from mpt_eqx.ops.quantized import QuantizedWeight
from mpt_eqx.train.optimizers import choice

ONE_INPUT = re.compile(r"(\.(Wqkv|Wq|Wk|Wv|gate_proj|up_proj|w1|v1))?(\.(base|lora_A|lora_B))?(\.(weight|bias))?$")
"""The ends of names. Without them, weights that are next to each other and have the same input have the same name."""

Weight = tuple[str, int, bool]
"""The name of a weight, how many of its numbers a token is multiplied by, and whether it is trained."""


def count_step_flops(model: MPT, seq_len: int, *, trainable: Any = None) -> int:
    """Returns the floating-point operations of one training step on one sequence, in which some weights are trained.

    It is `count_flops` where all weights are trained. A weight of n numbers costs 2·n·T in the forward pass, 2·n·T for
    its own gradient and 2·n·T for that of its input; attention costs 4·d_model·T² in the forward pass and 8·d_model·T²
    for the gradient of its input. A weight that is not trained needs no gradient of its own, and nothing needs that of
    its input where no trained weight comes before.

    Args:
        model: the model, also quantised, stacked, with adapters, or the shapes of one.
        seq_len: T, tokens in the sequence, ≥ 1.
        trainable: what is trained, as in `TrainState.create`.

    Raises:
        ConfigError: as by `count_flops`.
        MPTError: `trainable` is not like the model.
    """
    count_flops(model.config, seq_len)  # refuses what the formula does not hold for
    spec = choice(trainable, model)
    if spec is None:
        spec = jax.tree.map(lambda leaf: is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating), model)
    structures: list[Any] = [jax.tree.structure(tree) for tree in (spec, jax.tree.map(lambda _: True, model))]
    if structures[0] != structures[1]:
        raise MPTError("trainable: expected a tree of booleans like the model, found another tree")
    total, trained_before = 0, False
    for place, group in groupby(_in_order(model, spec), lambda weight: ONE_INPUT.sub("", weight[0])):
        if place.endswith(".attn.out_proj"):
            total += 4 * model.config.d_model * seq_len**2 * (3 if trained_before else 1)
        of_input, last = trained_before, False
        for name, numbers, trained in group:
            # The input of B is A x.
            inner = ".lora_B" in name and last
            total += 2 * numbers * seq_len * (1 + trained + (of_input or inner))
            trained_before, last = trained_before or trained, trained
    return total


def _in_order(model: MPT, spec: Any) -> Iterator[Weight]:
    """Yields the weights in the order in which a token meets them, which is that of the fields."""
    found: list[Weight] = []

    def one(path: tuple[Any, ...], leaf: Any, trained: Any) -> None:
        name, ffn = leaf_name(path), model.config.ffn_config
        if isinstance(leaf, QuantizedWeight):
            numbers = math.prod(leaf.values.shape[:-1]) * leaf.columns
        elif is_array(leaf):
            numbers = math.prod(leaf.shape)
        else:
            return
        if ffn.ffn_type == "mb_dmoe" and ".experts.mlp." in name:
            numbers = numbers * ffn.moe_top_k // ffn.moe_num_experts
        found.append((name, numbers, any(jax.tree.leaves(trained))))

    jax.tree_util.tree_map_with_path(one, model, spec, is_leaf=lambda node: isinstance(node, QuantizedWeight))
    blocks = [weight for weight in found if weight[0].startswith("blocks.")]
    embedding, first = found[0], found.index(blocks[0])
    yield embedding[0], 0, embedding[2]  # its rows are looked up
    yield from found[1:first]
    if isinstance(model.blocks, StackedBlocks):
        layers = len(model.blocks)
        for layer in range(layers):
            yield from ((f"{layer}.{name}", numbers // layers, trained) for name, numbers, trained in blocks)
    else:
        yield from blocks
    yield from found[first + len(blocks) :]
    if model.lm_head is None:
        yield "lm_head", embedding[1], embedding[2]
