"""Models on a mesh: eight devices of a CPU compute what one computes, and send each other what they must."""

import dataclasses
import importlib.util
import json
import re
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace

import equinox as eqx
import jax
import numpy as np
import pytest
from conftest import AS_USERS, GOLDEN, ROOT, asked_by_line, is_long, one_in, some
from jax.sharding import AbstractMesh, PartitionSpec


@contextmanager
def devices(**environment):
    with asked_by_line("sharded.py", **environment) as line:

        def asked(name, **arguments):
            answer = line(json.dumps([name, arguments]))
            assert answer, "the helper has died"
            return json.loads(answer)

        yield asked


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Models have two blocks in `just test-all`, one in `just test`."""
    with devices(BLOCKS="2" if is_long() else "1", ROOM=str(tmp_path_factory.mktemp("blocks"))) as asked:
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
    return all(value < 1e-4 for value in found.values()) and found.get("tokens", 0) == found.get("sampled", 0) == 0


@pytest.mark.parametrize("preset", some(MESHES, ("FSDP_TP", "SEQUENCE_PARALLEL")))
def test_every_preset_computes_what_one_device_does(ask, preset):
    """Logits, loss, gradients, a step of AdamW and tokens, greedy and sampled; weights read to the mesh and moved."""
    for axes in MESHES[preset] if is_long() else MESHES[preset][:1]:
        found = ask("compare", case="hf_generate", preset=preset, axes=axes, tokens=is_long() or preset == "FSDP_TP")
        assert close(found), (axes, found)


@pytest.mark.slow
@pytest.mark.parametrize("case", some(CASES[1:], ("f_torch_dmoe",)))
def test_every_kind_of_model_does(ask, case):
    found = ask("compare", case=case, preset="FSDP_TP", axes={"fsdp": 2, "tp": 4})
    assert close(found), found


@pytest.mark.parametrize("axes", one_in(2, [{"fsdp": 2, "tp": 2, "sp": 2}, {"fsdp": 4, "tp": 1, "sp": 2}]))
def test_cudnn_attends_to_rows_and_heads_where_they_lie(ask, axes):
    """Each device calls the kernels, played by a CPU, for its rows and heads; nothing is sent if they lie there.

    Values differ from those of one device by rounding, also where operands and results lie otherwise.
    """
    rows, n, k = 8 // axes["fsdp"], 4 // axes["tp"], 2 // axes["tp"]
    q, kv = [rows, 64, n, 24], [rows, 64, k, 24]
    for spec in (["fsdp", "tp"], ["fsdp", "tp", "sp"], [None, None, None, "sp"]):
        found = ask("by_rows_and_heads", axes=axes, spec=spec)
        assert [q, kv, kv] in found["asked"] and [q, kv, kv, [rows, n, 64], q, q] in found["asked"]
        assert len({json.dumps(shapes) for shapes in found["asked"]}) == 2
        assert found["values"] < 2**-7
        assert found["sent"] == [] or spec != ["fsdp", "tp"]


@pytest.mark.parametrize("form", some(["plain", "stacked"], ["stacked"]))
def test_training_on_a_mesh_takes_cudnn(ask, form):
    """Forward and backward, stacked and rematerialised; the tolerance is that of bfloat16."""
    found = ask("by_cudnn", preset="FSDP_TP", axes={"fsdp": 4, "tp": 2}, form=form, run=True)
    assert found["taken"] and found["values"] < 0.03
    assert {shapes[0][0] for shapes in found["asked"]} == {2} and {shapes[0][2] for shapes in found["asked"]} == {2}


def test_which_meshes_cudnn_attends_on(ask):
    """Not where queries and keys are sharded apart, where positions are, and where a program has Explicit axes."""

    def taken(preset, axes, **rest):
        return ask("by_cudnn", preset=preset, axes=axes, **rest)["taken"]

    assert taken("DATA_PARALLEL", {"dp": 8}) and taken("FSDP", {"fsdp": 8}) and taken("TENSOR_PARALLEL", {"tp": 2})
    assert taken("TENSOR_PARALLEL", {"tp": 8}), "all heads are replicated"
    assert not taken("TENSOR_PARALLEL", {"tp": 4}), "four heads of queries, two of keys"
    assert not taken("TENSOR_PARALLEL", {"tp": 2}, key_heads=1)
    assert not taken("SEQUENCE_PARALLEL", {"dp": 2, "sp": 4})
    for kind in ("explicit", "set", "tokens"):
        assert not taken("DATA_PARALLEL", {"dp": 8}, kind=kind)


def test_streaming_and_prefixes_on_a_mesh_are_those_of_one_device(ask):
    """A single row, which the mesh does not divide; its heads are sharded."""
    found = ask("streamed", preset="FSDP_TP", axes={"fsdp": 2, "tp": 4})
    assert found == {"stream": True, "prefix": True, "cache": [None, "tp", None, None]}


@pytest.mark.parametrize("kind", some(["auto", "explicit"], ["explicit"]))
def test_stacked_blocks_lie_on_a_mesh_as_single_ones_do(ask, kind):
    """Stacked there, moved there, and kept in another order; the axis of layers is replicated."""
    found = ask("stacked", preset="FSDP_TP", axes={"fsdp": 2, "tp": 4}, kind=kind)
    assert all(found.pop(name) < 1e-4 for name in ("weights", "logits", "gradients"))
    assert found == {"placed alike": True, "bytes": True, "lines": 1}


@pytest.mark.parametrize("inside", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["vmap", "shard_map"])
def test_decode_on_a_mesh_and_inside_shard_map(ask, inside):
    assert ask("decoded", preset="FSDP_TP", axes={"fsdp": 2, "tp": 2}, inside=inside) == {"tokens": True}


def test_the_engine_of_the_server_on_a_mesh(ask):
    """Its slots do not divide the mesh; its heads are sharded."""
    assert ask("served", preset="FSDP_TP", axes={"fsdp": 2, "tp": 4}) == {"tokens": True, "sampled": True}


@pytest.mark.parametrize("kind", some(["auto", "explicit", "explicit, set_mesh"], ["explicit, set_mesh"]))
def test_edits_on_a_mesh_are_those_of_one_device(ask, kind):
    """In one pass, and of generated tokens with other edits in each row."""
    found = ask("edited", kind=kind.split(",")[0], inside="set_mesh" in kind)
    assert all(difference < 1e-4 for difference in found.values()), found


@pytest.mark.parametrize("form", some(["plain", "stacked", "int8"], ["plain"]))
@pytest.mark.parametrize("kind", some(["auto", "explicit"], ["auto"]))
def test_scores_on_a_mesh_are_those_of_one_device(ask, form, kind):
    """With Auto axes, and with Explicit ones inside of `jax.set_mesh`."""
    found = ask("scored", form=form, kind=kind, inside=kind == "explicit")
    assert found["logprobs"] < 1e-4 and found["greedy"]


def test_a_mesh_with_explicit_axes(ask):
    """Outside of `jax.set_mesh`. In `just test` its tokens are those of other tests, inside of it and with edits."""
    axes = {"fsdp": 2, "tp": 4}
    found = ask("compare", case="hf_generate", preset="FSDP_TP", axes=axes, kind="explicit", tokens=is_long())
    assert close(found), found


@pytest.mark.slow
def test_a_mesh_of_three_axes(ask):
    three = {"dp": 2, "fsdp": 2, "tp": 2}
    found = ask("compare", case="hf_generate", preset="FSDP_TP", axes=three, batch=["dp", "fsdp"])
    assert close(found), found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["shard", "by hand"])
@pytest.mark.parametrize("inside", [True, False])
def test_explicit_axes_inside_and_outside_of_set_mesh(ask, inside, how):
    """Models that are on no mesh, sharded and placed by hand; calls, gradients, a step of AdamW, tokens."""
    assert ask("explicit", inside=inside, how=how) == {"wrong": []}


@pytest.mark.parametrize("preset", some(MESHES, ("TENSOR_PARALLEL",)))
def test_placed_by_hand_it_lies_as_shard_places_it(ask, preset):
    """By partition_specs, NamedSharding and device_put; of heads that the mesh does not divide, too."""
    axes = {"TENSOR_PARALLEL": {"tp": 8}, "FSDP": {"fsdp": 4}}.get(preset, MESHES[preset][0])
    assert ask("placed", preset=preset, axes=axes) == {"wrong": []}


WRAPPED = {
    "FSDP": ({"fsdp": 4}, ["*.attn.Wqkv", "*.ffn.up_proj", "wte"]),
    "TENSOR_PARALLEL": ({"tp": 4}, ["*.ffn.up_proj", "wte"]),
}


@pytest.mark.parametrize("preset", some(WRAPPED, ("FSDP",)))
def test_a_wrapped_model_on_a_mesh_computes_what_one_device_does(ask, preset):
    """Logits, loss, gradients, a step of AdamW, in `just test-all` tokens; gradients lie as the weights do."""
    axes, places = WRAPPED[preset]
    found = ask("wrapped", preset=preset, axes=axes, places=places, tokens=is_long())
    assert found.pop("tokens", None) in ([True] if is_long() else [None])
    assert found == {"far": {}, "gradients": True}


LEARNED = {
    **{preset: (preset, MESHES[preset][0], "plain") for preset in MESHES},
    "stacked": ("FSDP_TP", {"fsdp": 2, "tp": 2}, "stacked"),
    "experts": ("FSDP_TP", {"fsdp": 2, "tp": 2}, "experts"),  # with the loss that balances them
}


@pytest.mark.parametrize("case", some(LEARNED, ("FSDP",)))
def test_training_on_a_mesh_is_that_of_one_device(ask, case):
    """Three steps of two micro-batches, of which tokens count by their number, clipped; to float32's rounding."""
    preset, axes, form = LEARNED[case]
    found = ask("learned", preset=preset, axes=axes, form=form)
    assert found["metrics"] < 2e-5 and found["weights"] < 2e-6, found


@pytest.mark.slow
@pytest.mark.parametrize("meshes", [("fsdp=8", "fsdp=4"), ("dp=2,fsdp=2,tp=2", "fsdp=2,tp=4")])
def test_the_command_trains_on_a_mesh_and_goes_on_on_another(ask, tmp_path, meshes):
    """New weights; the loss of each step is that of one device, to float32's rounding."""
    pytest.importorskip("orbax.checkpoint")
    texts = [json.dumps({"text": f"The function number {i} returns {i} things."}) for i in range(9)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    sizes = {"d_model": 16, "n_heads": 4, "n_layers": 1, "vocab_size": 4096, "max_seq_len": 16}
    (tmp_path / "tiny.json").write_text(json.dumps({"model_type": "mpt", **sizes, "attn_config": {"alibi": True}}))
    options = ["--new", "tiny.json", "--data", "texts.jsonl", "--batch-size", "8", "--length", "16"]
    found = ask("commanded", directory=str(tmp_path), meshes=list(meshes), options=options)
    assert found.pop("losses") < 1e-5
    assert found == {"steps": [1, 2, 3, 4], "sharded": True, "model": True}


ADAPTED = {
    "FSDP": ({"fsdp": 4}, ["Wqkv", "down_proj"], "auto"),
    "FSDP, explicit": ({"fsdp": 4}, ["Wqkv"], "explicit"),
    "TENSOR_PARALLEL": ({"tp": 4}, ["out_proj", "up_proj", "down_proj"], "auto"),
}


@pytest.mark.slow
@pytest.mark.parametrize("preset", ADAPTED)
def test_adapters_trained_on_a_mesh_are_those_of_one_device(ask, preset):
    """Over 8 bits: two steps, the files, and what is merged, which lies as the model without adapters does."""
    axes, targets, kind = ADAPTED[preset]
    assert ask("adapted", preset=preset.split(",")[0], axes=axes, targets=targets, kind=kind) == {"wrong": []}


@pytest.mark.slow
def test_tensor_parallel_blocks_send_what_they_must(ask):
    """One sum after attention and one after the network of each block; one for the embedding, if it is split."""
    assert ask("collectives", preset="TENSOR_PARALLEL", axes={"tp": 2}) == {"all-reduce": 4}
    assert ask("collectives", preset="DATA_PARALLEL", axes={"dp": 4}) == {}


def test_fsdp_gathers_each_weight_and_sums_nothing(ask):
    """Four matrices of each of two blocks, the embedding, and the tokens."""
    assert ask("collectives", preset="FSDP", axes={"fsdp": 4}) == {"all-gather": 10}


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
    from mpt_eqx.sharding import FSDP_TP, TENSOR_PARALLEL, explain

    text = explain(MPTConfig.preset("mpt-7b"), AbstractMesh((4, 8), ("fsdp", "tp")), FSDP_TP)
    assert re.search(r"blocks\.\*\.attn\.Wq\.weight +4096 × 4096 +tp fsdp +1,048,576 +×32", text)
    assert "total: 13,298,573,312 bytes; on each of 32 devices 416,096,256 (416.10 MB, 3.1%)" in text
    rules = dataclasses.replace(TENSOR_PARALLEL, mlp=None)
    config = MPTConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=66, max_seq_len=32)
    text = explain(config, AbstractMesh((3,), ("tp",)), rules)
    assert re.search(r"Wq\.weight +64 × 64 +· · .* ×2 +replicated \(4 heads over 3 devices\)", text)
    assert re.search(r"wte\.weight +66 × 64 +tp · +2,816 +×1\n", text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (4_160_000, "4.16 MB"), (13e9, "13.00 GB")],
)
def test_bytes_have_the_unit_that_fits(nbytes, text):
    from mpt_eqx.sharding.explain import readable_bytes

    assert readable_bytes(int(nbytes)) == text


def test_arguments_are_compared_before_a_function_is_called(monkeypatch):
    """All but the model and the bar, each with its default; a prefix by its length, a function by its name."""
    from mpt_eqx.sharding import multihost

    compared = []
    monkeypatch.setattr(multihost, "assert_same_across_processes", lambda **what: compared.append(what))

    @multihost.check_same_arguments
    def function(model, prompts, *, processors=(), prefix=None, progress=None, key=0):
        return "called", prompts

    layout = SimpleNamespace(several_processes=False)
    model = SimpleNamespace(layout=layout)
    assert function(model, [1]) == function(SimpleNamespace(layout=None), prompts=[1]) == ("called", [1])
    assert compared == []
    layout.several_processes = True
    assert function(model, [1], prefix="abc", progress=True) == ("called", [1])
    assert compared.pop() == {"prompts": [1], "processors": (), "prefix": 3, "key": 0}
    assert function(model, prompts := iter([1])) == ("called", prompts)
    assert compared.pop() == {"processors": (), "prefix": None, "key": 0}
    with pytest.raises(TypeError, match="unexpected keyword argument 'tokens'"):
        function(model, [1], tokens=3)


def test_what_is_compared_is_text_that_does_not_depend_on_the_process():
    from mpt_eqx.sharding import FSDP
    from mpt_eqx.sharding.multihost import _flat

    found = _flat(
        {"rules": FSDP, "key": jax.random.key(1), "f": (test_every_leaf_has_a_spec,), "d": {"a": np.arange(2)}}
    )
    assert found["rules.batch"] == '"fsdp"' and found["key"] == "[0, 1]" and found["d.a"] == "[0, 1]"
    assert found["f"] == '["test_sharding.test_every_leaf_has_a_spec"]'


def test_groups_of_a_quantised_weight_are_not_divided_within():
    """Four heads of sixteen numbers on four devices, but two groups of 32."""
    from mpt_eqx import MPT, MPTConfig, quantize
    from mpt_eqx.sharding import TENSOR_PARALLEL, explain

    config = MPTConfig(d_model=64, n_heads=4, n_layers=1, vocab_size=64, max_seq_len=32)
    model = eqx.filter_eval_shape(lambda key: quantize(MPT(config, key=key), "int4"), jax.random.key(0))
    text = explain(model, AbstractMesh((4,), ("tp",)), TENSOR_PARALLEL)
    assert re.search(r"out_proj\.weight\.values +64 × 32 +· tp ", text)
    assert re.search(r"out_proj\.weight\.scale +64 × 2 +· · .* ×1 +replicated \(2 groups over 4 devices\)", text)


def test_wrong_rules_and_meshes(tiny_model, monkeypatch):
    from mpt_eqx import ShardingError, from_pretrained
    from mpt_eqx.sharding import (
        FSDP,
        TENSOR_PARALLEL,
        ShardingRules,
        make_mesh,
        partition_specs,
    )
    from mpt_eqx.sharding.mesh import assert_same_mesh
    from mpt_eqx.sharding.shard import with_layout

    def refused(message):
        return pytest.raises(ShardingError, match=message)

    eight = AbstractMesh((8,), ("tp",))
    with refused(r"rules\.embed: expected an axis of the mesh, tp, found 'fsdp'; name the mesh's axes so"):
        with_layout(tiny_model, eight, FSDP)
    strict = ShardingRules(heads="tp")
    with refused(
        r"blocks\.0\.attn\.Wq\.weight: dimension 0 \(heads\) has size 4, which the 8 devices of mesh axis tp do "
        r"not divide; choose another mesh, or replicate it with .*allow_replicated, 'heads'\)\)"
    ):
        from mpt_eqx.sharding import explain

        explain(tiny_model, eight, strict)
    with refused(r"expected different mesh axes for heads and embed, found 'tp' twice"):
        partition_specs(tiny_model, ShardingRules(heads="tp", embed="tp"))
    with refused("rules: expected one for an axis that this model has, batch, embed, .*, found ShardingRules"):
        partition_specs(tiny_model, ShardingRules(experts="tp"))
    with refused(r"rules\.layers: expected None, found 'pp': it would match nothing"):
        ShardingRules(layers="pp")
    with refused(r"rules\.mlp: expected a mesh axis, a tuple of some, or None, found 3"):
        ShardingRules(mlp=3)
    with refused(r"rules\.allow_replicated: expected a tuple of names, found \['heads'\]"):
        ShardingRules(allow_replicated=["heads"])
    with refused(r"expected different mesh axes for batch, kv_heads, head_dim, which stand .* found 'tp' twice"):
        ShardingRules(batch="tp", kv_heads="tp")
    with monkeypatch.context() as patched, refused("mesh: expected devices of all 3 processes, or of one, found none"):
        patched.setattr(jax.sharding.Mesh, "is_multi_process", True)
        patched.setattr(jax, "process_count", lambda: 3)
        assert_same_mesh(make_mesh(tp=1))
    with refused(r"rules\.allow_replicated: expected some of vocab, .*, found 'head'"):
        ShardingRules(allow_replicated=("head",))
    with refused(r"mesh: expected at most 1 devices, which JAX has, found 8 \(fsdp=2 × tp=4\); make it smaller"):
        make_mesh(fsdp=2, tp=4)
    with refused(r"tp: expected a number of devices, ≥ 1, found 0"):
        make_mesh(tp=0)
    with refused("expected mesh and rules together, or device alone, found rules"):
        from_pretrained(GOLDEN / "hf_default", rules=TENSOR_PARALLEL)
    with refused(r"rules\.embed: expected an axis of the mesh, tp, found 'fsdp'"):
        partition_specs(tiny_model, FSDP, eight)
    with refused(r"blocks\.0\.attn\.Wqkv\.weight: dimension 0 \(heads\) has size 4, which the 8 devices"):
        partition_specs(tiny_model, strict, eight)
    grown = jax.tree_util.tree_map(lambda x: x, tiny_model)
    object.__setattr__(grown.blocks[0].norm_1, "weight", np.ones((2, 2)))
    with refused(r"blocks\.0\.norm_1\.weight: expected one of an MPT's weights, which one rule matches"):
        partition_specs(grown, TENSOR_PARALLEL)


@pytest.mark.parametrize("case", ["hf_generate", "f_gqa_kv2", "f_bias", "f_torch_dmoe"])
def test_a_model_saved_from_a_mesh_is_the_one_that_was_loaded(ask, case, tmp_path):
    assert ask("saved", case=case, directory=str(tmp_path)) == {"weights": 0.0, "same": True}


def test_a_model_made_on_a_mesh_is_the_one_made_on_a_device(ask):
    """The same random numbers, and on each device its part only; so are one that comes from elsewhere and moments."""
    options = {name: value for name, value in AS_USERS.items() if "emitters" in name}
    found = ask("initialised", preset="FSDP_TP", axes={"fsdp": 2, "tp": 4}, options=options)
    assert found["weights"] == 0
    made = found["bytes"].pop("made")
    assert len(made) == 8 and all(held == made for held in found["bytes"].values())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", some(["int8", "int4"], ["int4"]))
def test_quantised_weights_on_a_mesh_compute_the_same(ask, scheme):
    found = ask("quantised", scheme=scheme)
    assert found["logits"] < 1e-4 and found["later"] == 0 and found["tokens"] and found["bytes"], found


def ended(directory, computes):
    """What two processes with two devices each have answered, and how they ended."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", Path(__file__).parent / "process.py", str(port)]
    processes = [
        subprocess.Popen([*command, str(rank), CASE, directory, computes], stdout=PIPE, stderr=PIPE, text=True)
        for rank in range(2)
    ]
    # What carries the messages between them has lines of its own.
    answers = [next((line for line in process.stdout if line.startswith("{")), "") for process in processes]
    errors = [process.communicate(timeout=30)[1] for process in processes]
    assert all(answers), errors
    return SimpleNamespace(
        answers=list(map(json.loads, answers)), errors=errors, codes=[p.returncode for p in processes],
        directory=directory,
    )  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Processes that compute before they differ."""
    return ended(tmp_path_factory.mktemp("two"), "computes")


CASE = GOLDEN / "hf_generate"


@pytest.mark.slow
def test_two_processes_compute_what_one_does(ask, two):
    """Loading, logits, loss, a step of training, saving it, and tokens, on two devices in each."""
    from mpt_eqx import MPT, MPTConfig, sharding

    wanted = ask("reference", directory=str(two.directory))
    assert wanted.pop("trained") < 1e-4 and wanted.pop("odd") == 0
    config = MPTConfig.from_dict(json.loads((CASE / "config.json").read_text()))
    mesh, rules = AbstractMesh((2, 2), ("fsdp", "tp")), sharding.FSDP_TP
    shapes = eqx.filter_eval_shape(MPT, config, key=jax.random.key(0))
    held = int(re.search(r"on each of 4 devices ([\d,]+)", sharding.explain(shapes, mesh, rules))[1].replace(",", ""))
    exact = {"moved": 0, "bytes": [held, held], **{name: wanted[name] for name in ("tokens", "sampled", "beams")}}
    for found in two.answers:
        np.testing.assert_allclose(found["logits"], wanted["logits"], atol=1e-4)
        assert abs(found["loss"] - wanted["loss"]) < 1e-4
        assert {name: found[name] for name in exact} == exact


REFUSED = {
    "config": r"config\.max_seq_len: expected the same in all 2 processes, found 16 in process 0 and 17 in process 1",
    "rules": r"rules\.\w+: expected the same in all 2 processes, found .* start all with the same checkpoint, rules",
    "file": r"none1: no such|process 1 failed, and all stop with it: CheckpointError: .*none1",
    "dtype": r"dtype: expected the same in all 2 processes, found \"float32\" in process 0 and \"bfloat16\" in process",
    "step": r"step: expected the same in all 2 processes, found 10 in process 0 and 11 in process 1",
    "prompts": r"prompts: expected the same in all 2 processes, found \[\[1, 2, 3\]\] in process 0 and \[\[1, 2, 4\]\]",
    "axes": r"rules\.\w+: expected the same in all 2 processes",
    "invalid": r"prompts: expected the same in all 2 processes, found \[\[0\]\] in process 0 and \[\[99\]\]",
    "length": r"return_logits: expected the same in all 2 processes, found false in process 0 and true in process 1",
    "options": r"key: expected the same in all 2 processes, found \[0, 0\] in process 0 and \[0, 1\] in process 1",
    "save": r"nowhere: cannot be written|process 0 failed, and all stop with it: CheckpointError: /proc/nowhere",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_processes_that_differ_stop_at_once_and_say_why(two, what):
    for found in two.answers:
        assert re.search(REFUSED[what], found["refused"][what]["said"] or "nothing"), found["refused"][what]
        assert found["refused"][what]["seconds"] < 30


def test_processes_that_differ_end(tmp_path):
    """Within 30 seconds, for which `ended` waits."""
    two = ended(tmp_path, "nothing")
    assert all(two.codes)
    assert all("ShardingError: config.max_seq_len: expected the same in all" in error for error in two.errors)


@pytest.mark.slow
def test_the_page_shows_what_explain_says():
    spec = importlib.util.spec_from_file_location("page", ROOT / "docs" / "sharding.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert f"<!-- table -->\n{page.table()}\n<!-- end -->" in (ROOT / "docs" / "sharding.md").read_text()
    assert page.picture() == (ROOT / "docs" / "mesh.svg").read_text()
