"""Models on a mesh: eight devices of a CPU compute what one computes, and send each other what they must."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from conftest import GOLDEN, asked_by_line
from jax.sharding import AbstractMesh, PartitionSpec


@pytest.fixture(scope="module")
def ask():
    with asked_by_line("sharded.py") as line:

        def asked(name, **arguments):
            answer = line(json.dumps([name, arguments]))
            assert answer, "the helper has died"
            return json.loads(answer)

        yield asked


MESHES = {
    "DATA_PARALLEL": [{"dp": 8}],
    "FSDP": [{"fsdp": 8}],
    "TENSOR_PARALLEL": [{"tp": 2}],
    "FSDP_TP": [{"fsdp": 2, "tp": 4}, {"fsdp": 4, "tp": 2}],
    "SEQUENCE_PARALLEL": [{"dp": 2, "sp": 4}],
}
# Heads that four devices divide and that they do not; few heads of keys; a head of its own; experts; biases.
CASES = ("hf_generate", "hf_heads6", "f_gqa_kv2", "f_mqa", "f_untied", "f_torch_dmoe", "f_bias")


def close(found):
    numbers = {name: found[name] for name in ("logits", "moved", "loss", "gradients", "step")}
    return all(value < 1e-4 for value in numbers.values()) and found["tokens"] and found["sampled"]


@pytest.mark.parametrize("preset", MESHES)
def test_every_preset_computes_what_one_device_does(ask, preset):
    """Logits, loss, gradients, a step of AdamW and tokens, greedy and sampled; weights read to the mesh and moved."""
    for axes in MESHES[preset]:
        found = ask("compare", case="hf_generate", preset=preset, axes=axes)
        assert close(found), (axes, found)


@pytest.mark.parametrize("case", CASES[1:])
def test_every_kind_of_model_does(ask, case):
    found = ask("compare", case=case, preset="FSDP_TP", axes={"fsdp": 2, "tp": 4})
    assert close(found), found


def test_a_mesh_with_explicit_axes_and_one_of_three(ask):
    found = ask("compare", case="hf_generate", preset="FSDP_TP", axes={"fsdp": 2, "tp": 4}, kind="explicit")
    assert close(found), found
    three = {"dp": 2, "fsdp": 2, "tp": 2}
    found = ask("compare", case="hf_generate", preset="FSDP_TP", axes=three, batch=["dp", "fsdp"])
    assert close(found), found


def test_tensor_parallel_blocks_send_what_they_must(ask):
    """One sum after attention and one after the network of each of two blocks; one for the embedding, if it is split."""
    assert ask("collectives", preset="TENSOR_PARALLEL", axes={"tp": 2}) == {"all-reduce": 4}
    assert ask("collectives", preset="DATA_PARALLEL", axes={"dp": 4}) == {}


def specs(model, rules):
    from mpt_eqx.sharding import partition_specs

    return partition_specs(model, rules)


def test_every_leaf_has_a_spec(tiny_model):
    from mpt_eqx.sharding import FSDP_TP

    found = specs(tiny_model, FSDP_TP)
    assert len(jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, PartitionSpec))) == len(
        jax.tree.leaves(tiny_model)
    )
    assert found.wte.weight == PartitionSpec("tp", "fsdp")
    assert found.blocks[0].attn.Wqkv.weight == PartitionSpec("tp", "fsdp")
    assert found.blocks[1].attn.out_proj.weight == PartitionSpec("fsdp", "tp")
    assert found.blocks[1].norm_1.weight == PartitionSpec(None)
    assert jax.tree.leaves(specs(tiny_model.config, FSDP_TP)) == jax.tree.leaves(found)


def test_explain_counts_the_bytes_of_a_device_and_allocates_nothing():
    from mpt_eqx import MPTConfig
    from mpt_eqx.sharding import FSDP_TP, explain

    text = explain(MPTConfig.preset("mpt-7b"), AbstractMesh((4, 8), ("fsdp", "tp")), FSDP_TP)
    assert re.search(r"blocks\.\*\.attn\.Wq\.weight +4096 × 4096 +tp fsdp +1,048,576 +32 times", text)
    assert "total: 13,298,573,312 bytes; on each of 32 devices 416,096,256 (0.42 GB, 3.1%)" in text
    text = explain(MPTConfig.preset("mpt-7b"), AbstractMesh((3,), ("tp",)), FSDP_TP_WITHOUT_FSDP())
    assert re.search(r"Wq\.weight +4096 × 4096 +· · .* heads whole: not divided", text)


def FSDP_TP_WITHOUT_FSDP():
    from mpt_eqx.sharding import TENSOR_PARALLEL

    return dataclasses.replace(TENSOR_PARALLEL, mlp=None)


def test_wrong_rules_and_meshes(tiny_model):
    from mpt_eqx import ShardingError, from_pretrained
    from mpt_eqx.sharding import FSDP, TENSOR_PARALLEL, ShardingRules, make_mesh, partition_specs, prepared

    def refused(message):
        return pytest.raises(ShardingError, match=message)

    eight = AbstractMesh((8,), ("tp",))
    with refused(r"rules\.batch: expected an axis of the mesh, tp, found 'fsdp'; name the mesh's axes so"):
        prepared(tiny_model, eight, FSDP)
    strict = ShardingRules(heads="tp")
    with refused(r"blocks\.0\.attn\.Wq\.weight: dimension 0 \(heads\) has size 4, which the 8 devices of mesh axis tp do"):
        from mpt_eqx.sharding import explain

        explain(tiny_model, eight, strict)
    with refused(r"expected different mesh axes for heads and embed, found 'tp' twice"):
        partition_specs(tiny_model, ShardingRules(heads="tp", embed="tp"))
    with refused("expected one that matches something in this model"):
        partition_specs(tiny_model, ShardingRules(experts="tp"))
    with refused(r"rules\.layers: expected None, found 'pp': it would match nothing"):
        ShardingRules(layers="pp")
    with refused(r"rules\.mlp: expected a mesh axis, a tuple of some, or None, found 3"):
        ShardingRules(mlp=3)
    with refused(r"rules\.uneven: expected some of vocab, .*, found 'head'"):
        ShardingRules(uneven=("head",))
    with refused(r"mesh: expected at most 1 devices, which there are, found 8 \(fsdp=2 × tp=4\); make it smaller"):
        make_mesh(fsdp=2, tp=4)
    with refused(r"tp: expected a number of devices, ≥ 1, found 0"):
        make_mesh(tp=0)
    with refused("expected mesh and rules together, or device alone, found rules"):
        from_pretrained(GOLDEN / "hf_default", rules=TENSOR_PARALLEL)
    grown = jax.tree_util.tree_map(lambda x: x, tiny_model)
    object.__setattr__(grown.blocks[0].norm_1, "weight", np.ones((2, 2)))
    with refused(r"blocks\.0\.norm_1\.weight: expected one of an MPT's weights, which one rule matches"):
        partition_specs(grown, TENSOR_PARALLEL)
