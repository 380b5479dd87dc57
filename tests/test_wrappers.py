"""Wrapped linear maps and embeddings: their specs, what `explain` says, quantisation. On a mesh: test_sharding.py."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from conftest import some
from jax.sharding import AbstractMesh, PartitionSpec
from wrappers import Lora, LoraWithAxes, Outer, make_lora, make_nested

TOKENS = jnp.asarray([3, 1, 4, 1, 5], jnp.int32)
FOUR, EIGHT = AbstractMesh((4,), ("fsdp",)), AbstractMesh((4, 2), ("fsdp", "tp"))


@pytest.fixture(scope="module")
def model():
    from mpt_eqx import MPT, MPTConfig

    return MPT(MPTConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=64, max_seq_len=16), key=jax.random.key(0))


def wrap(model, where, how=make_lora):
    from mpt_eqx import surgery

    return surgery.replace(model, where, how)


def test_wrapped_weights_lie_as_plain_ones(model):
    """Also in wrappers in wrappers, stacked and quantised; their own arrays are replicated."""
    from mpt_eqx import quantize, stack
    from mpt_eqx.sharding import FSDP, FSDP_TP, explain, partition_specs

    nested = wrap(wrap(model, ["*.Wqkv", "wte"]), "*.up_proj", make_nested)
    plain, found = (partition_specs(m, FSDP, FOUR) for m in (model, nested))
    block, attn = found.blocks[0], plain.blocks[0].attn
    assert block.attn.Wqkv == Lora(attn.Wqkv, PartitionSpec(None, None), PartitionSpec(None, None))
    assert block.ffn.up_proj.inner.base == plain.blocks[0].ffn.up_proj
    assert block.ffn.up_proj.gate.weight == PartitionSpec(None, None)
    assert found.wte.base == plain.wte and found.norm_f == plain.norm_f
    stacked = partition_specs(stack(nested), FSDP, FOUR).blocks.block
    assert stacked.attn.Wqkv.base.weight == PartitionSpec(None, *block.attn.Wqkv.base.weight)
    assert stacked.attn.Wqkv.a == PartitionSpec(None, None, None)
    small = partition_specs(eqx.filter_eval_shape(quantize, nested, "int8"), FSDP, FOUR).blocks[0].attn.Wqkv
    assert small.base.weight.values == attn.Wqkv.weight and small.base.weight.scale == PartitionSpec(None, None)
    up = wrap(model, "*.up_proj")
    assert partition_specs(up, FSDP_TP, EIGHT).blocks[0].ffn.up_proj.base.weight == PartitionSpec("tp", "fsdp")
    text = explain(up, EIGHT, FSDP_TP)
    assert re.search(r"up_proj\.base\.weight +128 × 32 +tp fsdp ", text) and re.search(
        r"up_proj\.a +2 × 32 +· · ", text
    )
    only = eqx.filter(up, jax.tree_util.tree_map_with_path(lambda path, _: "up_proj" in str(path), up))
    assert partition_specs(only, FSDP, FOUR).blocks[0].ffn.up_proj.a == PartitionSpec(None, None)


def test_a_wrapper_may_say_how_its_own_arrays_are_sharded(model):
    from mpt_eqx import ShardingError, stack
    from mpt_eqx.sharding import FSDP_TP, explain, partition_specs

    up = wrap(model, "*.up_proj", lambda module: make_lora(module, LoraWithAxes))
    found = partition_specs(up, FSDP_TP, EIGHT).blocks[0].ffn.up_proj
    assert (found.a, found.b) == (PartitionSpec(None, "fsdp"), PartitionSpec("tp", None))
    assert partition_specs(stack(up), FSDP_TP, EIGHT).blocks.block.ffn.up_proj.b == PartitionSpec(None, "tp", None)
    assert re.search(r"up_proj\.b +128 × 2 +tp · ", explain(up, EIGHT, FSDP_TP))

    def refused(axes, message):
        class Wrong(Lora):
            logical_axes = axes

        with pytest.raises(ShardingError, match=message):
            partition_specs(wrap(model, "*.up_proj", lambda module: make_lora(module, Wrong)), FSDP_TP)

    where = r"blocks\.0\.ffn\.up_proj\.a: expected "
    refused(
        {"a": ("embed",)}, where + r"2 axes, each None or one of vocab, .*found \('embed',\); change the .*of Wrong"
    )
    refused({"a": (None, "width")}, where + r"2 axes, each .*, found \(None, 'width'\)")
    refused({"c": (None,)}, where + r"a mapping from names of fields of Wrong to axes, found \{'c'")
    refused(["a"], where + r"a mapping from names of fields of Wrong to axes, found \['a'\]")


def test_what_cannot_be_sharded(model):
    """Heads within a wrapper, of which no contiguous rows are a part; and a wrapper around another shape."""
    from mpt_eqx import ShardingError
    from mpt_eqx.model.linear import Linear
    from mpt_eqx.sharding import FSDP, FSDP_TP, TENSOR_PARALLEL, explain, partition_specs, split_qkv

    wrapped = wrap(model, "*.Wqkv")
    assert eqx.tree_equal(split_qkv(wrapped), wrapped)
    message = (
        r"blocks\.0\.attn\.Wqkv: expected a Linear, split .*, found Lora; shard the model first, and then wrap Wq,"
    )
    for compute in (lambda: partition_specs(wrapped, TENSOR_PARALLEL), lambda: explain(wrapped, EIGHT, FSDP_TP)):
        with pytest.raises(ShardingError, match=message):
            compute()
    after = wrap(split_qkv(model), "*.W[qkv]")
    assert partition_specs(after, FSDP_TP, EIGHT).blocks[0].attn.Wq.base.weight == PartitionSpec("tp", "fsdp")
    other = wrap(model, "*.up_proj", lambda module: Outer(module, Linear(jnp.zeros((3, 32)))))
    assert partition_specs(other, FSDP).blocks[0].ffn.up_proj.inner.weight == PartitionSpec(None, None)
    less = wrap(model, "*.up_proj", lambda module: make_lora(Linear(module.weight[:3])))
    with pytest.raises(ShardingError, match=r"blocks\.0\.ffn\.up_proj\.base\.weight: expected one of .* or wrap a Lin"):
        partition_specs(less, FSDP)


@pytest.mark.parametrize("scheme", some(["int8", "int4"], ["int8"]))
def test_what_is_wrapped_is_quantised_as_without(model, scheme):
    """The embedding, too, where it is asked for; own arrays and linear maps of the wrapper stay."""
    from mpt_eqx import quantize
    from mpt_eqx.surgery.quantization import quantization_of

    wrapped = wrap(wrap(model, ["*.Wqkv", "wte"]), "*.up_proj", make_nested)
    plain, found = (quantize(m, scheme, embeddings=True) for m in (model, wrapped))
    assert quantization_of(found) == quantization_of(plain)
    expected = wrap(wrap(model, ["*.Wqkv", "wte"]), "*.up_proj", make_nested)
    expected = eqx.tree_at(bases(wrapped=True), expected, bases(wrapped=False)(plain))
    expected = eqx.tree_at(others, expected, others(plain))
    assert eqx.tree_equal(found, expected)
    assert not eqx.tree_equal(found.wte.base, wrapped.wte.base)
    assert eqx.tree_equal(quantize(wrapped, scheme).wte, wrapped.wte)
    if scheme == "int8":
        logits = wrapped(TOKENS)
        assert jnp.abs(found(TOKENS) - logits).max() < 0.02 * jnp.abs(logits).max()


def test_a_wrapped_embedding_without_a_weight_is_quantised_and_not_saved(model, tmp_path):
    from mpt_eqx import CheckpointError, quantize, save_pretrained
    from mpt_eqx.surgery.quantization import quantization_of

    class Bare(eqx.Module):
        base: eqx.Module

    bare = quantize(wrap(model, "wte", Bare), "int8", embeddings=True)
    assert quantization_of(bare).embeddings
    with pytest.raises(CheckpointError, match="wte: expected an? Embedding, .* found test_wrappers.*Bare"):
        save_pretrained(bare, tmp_path / "saved")


def bases(wrapped):
    if wrapped:
        return lambda m: (m.blocks[0].attn.Wqkv.base, m.blocks[0].ffn.up_proj.inner.base, m.wte.base)
    return lambda m: (m.blocks[0].attn.Wqkv, m.blocks[0].ffn.up_proj, m.wte)


def others(m):
    return m.blocks[0].attn.out_proj, m.blocks[0].ffn.down_proj
