"""LoRA: what PEFT computes, over any base, in training, in generation, on meshes, and files that do not fit."""

import json
import re
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_bytes as tb
from conftest import GOLDEN, some
from jax.sharding import AbstractMesh, PartitionSpec
from safetensors.numpy import load_file, save_file

from mpt_eqx import CheckpointError, MPTError, from_pretrained, lora, quantize, stack, train, unstack
from mpt_eqx.model.leaves import named_arrays

TARGETS = ("Wqkv", "out_proj", "up_proj", "down_proj")
TOKENS = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
PEFT = GOLDEN / "peft_wqkv_ffn"
OURS = GOLDEN / "peft_ours"
FORMS = {
    "float32": lambda model: model,
    "bfloat16": lambda model: jax.tree.map(lambda x: x.astype(jnp.bfloat16), model),
    "int8": lambda model: quantize(model, "int8"),
    "int4": lambda model: quantize(model, "int4"),
    "stacked int4": lambda model: stack(quantize(model, "int4")),
}


def is_adapter(node):
    return isinstance(node, lora.LoRALinear)


def trained(model, size=0.2):
    """The model with adapters whose B is not zero."""
    keys = iter(jax.random.split(jax.random.key(5), 100))

    def change(node):
        if not is_adapter(node):
            return node
        b = node.lora_B.weight
        return eqx.tree_at(
            lambda a: a.lora_B.weight, node, size * jax.random.normal(next(keys), b.shape[-2:], b.dtype) + 0 * b
        )

    return jax.tree.map(change, model, is_leaf=is_adapter)


def with_all(model, **kwargs):
    return lora.add(model, rank=3, alpha=6, targets=TARGETS, key=jax.random.key(2), **kwargs)


@pytest.fixture(scope="module")
def base(tiny_config):
    from mpt_eqx import MPT

    return MPT(tiny_config(n_layers=1), key=jax.random.key(1))


@pytest.fixture(scope="module")
def two_blocks(tiny_config):
    from mpt_eqx import MPT

    return MPT(tiny_config(), key=jax.random.key(1))


@pytest.fixture(scope="module")
def theirs():
    """The base that the recorded adapters are of."""
    return from_pretrained(PEFT / "base")


@pytest.fixture
def adapter(tmp_path):
    """A copy of PEFT's files, to be damaged."""
    shutil.copytree(PEFT / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def assert_same_tensors(directory, other):
    found, wanted = (load_file(path / "adapter_model.safetensors") for path in (directory, other))
    assert found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


@eqx.filter_jit
def rows(model, tokens):
    return jax.vmap(model)(jnp.asarray(tokens))


@pytest.mark.parametrize("form", ["single", "stacked"])
@pytest.mark.parametrize("case", ["peft_wqkv_ffn", "peft_ours"])
def test_logits_are_those_of_peft(theirs, case, form):
    """With an adapter that PEFT wrote, and with one that this library wrote and PEFT read: all targets, rslora."""
    inputs = load_file(PEFT / "expected.safetensors")
    wanted = load_file(GOLDEN / case / "expected.safetensors")["logits"]
    model = lora.load(stack(theirs) if form == "stacked" else theirs, GOLDEN / case / "adapter")
    ids = inputs["input_ids"].astype(np.int32)
    np.testing.assert_allclose(rows(model, ids), wanted, atol=1e-4, rtol=0)
    assert np.abs(inputs["base_logits"] - wanted).max() > 0.1


@pytest.mark.parametrize("form", ["single", "stacked"])
def test_what_is_saved_is_what_peft_has_read(theirs, form, tmp_path):
    model = lora.load(stack(theirs) if form == "stacked" else theirs, OURS / "adapter")
    lora.save(model, tmp_path, base="peft_wqkv_ffn/base")
    assert (tmp_path / "adapter_config.json").read_text() == (OURS / "adapter" / "adapter_config.json").read_text()
    assert_same_tensors(tmp_path, OURS / "adapter")
    lora.save(lora.load(theirs, PEFT / "adapter"), tmp_path)
    assert_same_tensors(tmp_path, PEFT / "adapter")
    content, known = (json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path, PEFT / "adapter"))
    assert content == {name: known[name] for name in content}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_torch_file_of_an_adapter_is_read(theirs, adapter):
    path = adapter / "adapter_model.safetensors"
    tb.write_zip(adapter / "adapter_model.bin", *tb.of_arrays(load_file(path)))
    path.unlink()
    assert eqx.tree_equal(lora.load(theirs, adapter), lora.load(theirs, PEFT / "adapter"))


@pytest.mark.parametrize("form", some(FORMS, ["stacked int4"]))
def test_a_new_adapter_changes_nothing_and_copies_nothing(base, form):
    """Every array of the base is the one that was given; another adapter takes the place of the first."""
    plain = FORMS[form](base)
    model = with_all(plain)
    for (name, one), (_, other) in zip(named_arrays(lora.remove(model)), named_arrays(plain), strict=True):
        assert one is other, name
    np.testing.assert_array_equal(rows(model, TOKENS), rows(plain, TOKENS))
    own = [x for name, x in named_arrays(model) if "lora_" in name]
    assert {x.dtype for x in own} == {np.dtype(np.float32)} and len(own) == 8
    assert all(jnp.all(x == 0) == name.endswith("lora_B.weight") for name, x in named_arrays(model) if "lora_" in name)


def test_several_adapters_share_a_base(theirs):
    model = theirs
    arrays = [x for _, x in named_arrays(theirs)]
    for directory in (PEFT, OURS, PEFT):
        model = lora.load(model, directory / "adapter")
        assert all(any(x is own for own in arrays) for name, x in named_arrays(model) if "lora_" not in name)
    assert eqx.tree_equal(model, lora.load(theirs, PEFT / "adapter"))


def test_a_stacked_model_gets_the_same_adapters(two_blocks):
    assert eqx.tree_equal(unstack(with_all(stack(two_blocks))), with_all(two_blocks))


@eqx.filter_jit
def loss_and_gradient(model, tokens=TOKENS):
    own, rest = eqx.partition(model, lora.trainable(model))
    return eqx.filter_value_and_grad(lambda own: train.next_token_loss(eqx.combine(own, rest), tokens))(own)


@pytest.mark.parametrize("scheme", some(["int8", "int4"], ["int4"]))
def test_the_gradient_over_a_quantised_base_is_that_of_the_dequantised_one(base, scheme):
    small = with_all(quantize(base, scheme))
    plain = lora.merge(small)  # whose adapters are zero yet
    assert not any(x.dtype in (jnp.int8, jnp.uint8) for _, x in named_arrays(plain))
    small, large = trained(small), trained(with_all(plain))
    (one, found), (other, wanted) = loss_and_gradient(small), loss_and_gradient(large)
    np.testing.assert_allclose(one, other, rtol=1e-6)
    assert len(jax.tree.leaves(found)) == 8
    for (name, a), (_, b) in zip(named_arrays(found), named_arrays(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()), rtol=0, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_only_the_adapters_learn_and_the_optimizer_keeps_theirs_alone(base, form):
    plain = jax.tree.map(jnp.copy, FORMS[form](base))  # a step frees what it was given
    model = with_all(plain, dropout=0.1)
    before = {name: np.array(x) for name, x in named_arrays(model)}
    optimizer = train.decoupled_adamw(1e-2)
    state = train.TrainState.create(model, optimizer, trainable=lora.trainable, key=jax.random.key(3))
    sizes = sum(x.size for name, x in before.items() if "lora_" in name)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state.momentum)) == sizes
    step, losses = train.make_train_step(optimizer, compute_dtype="bfloat16"), []
    for _ in range(3):
        state, metrics = step(state, {"tokens": TOKENS})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    for name, x in named_arrays(state.model):
        assert np.array_equal(x, before[name]) != ("lora_" in name), name


@pytest.mark.parametrize("form", some(FORMS, ["bfloat16", "stacked int4"]))
def test_a_merged_model_computes_the_same_and_is_plain(base, form, tmp_path):
    from mpt_eqx import save_pretrained

    model = trained(with_all(FORMS[form](base)))
    merged, wanted = lora.merge(model), rows(model, TOKENS)
    # In bfloat16 the merged weights are rounded to 8 bits, and so are the logits.
    far = 0.02 * float(jnp.abs(wanted).max()) if form == "bfloat16" else 2e-5
    np.testing.assert_allclose(rows(merged, TOKENS), wanted, atol=far, rtol=0)
    assert jax.tree.structure(unstack(merged)) == jax.tree.structure(base)
    save_pretrained(merged, tmp_path / "merged")
    assert eqx.tree_equal(from_pretrained(tmp_path / "merged"), unstack(merged))
    with pytest.raises(
        CheckpointError, match=r"Wqkv: expected a Linear, .* found mpt_eqx\.lora\.\S+LoRALinear; .*lora"
    ):
        save_pretrained(model, tmp_path / "adapted")


def test_adapters_on_a_gated_network_and_on_separate_projections(tiny_config):
    from mpt_eqx import MPT, AttnConfig, FFNConfig

    config = tiny_config(
        n_layers=1, attn_config=AttnConfig(alibi=True, fused_qkv=False), ffn_config=FFNConfig(ffn_type="mptglu")
    )
    model = MPT(config, key=jax.random.key(1))
    model = trained(lora.add(model, rank=2, targets=["Wq", "Wv", "gate_proj"], key=jax.random.key(2)))
    np.testing.assert_allclose(rows(lora.merge(model), TOKENS), rows(model, TOKENS), atol=1e-5)
    assert model.blocks[0].attn.Wq.scale == 1.0


@pytest.mark.parametrize("form", some(["float32", "bfloat16", "int8", "int4"], ["int4"]))
def test_generation_loops_over_adapted_layers(two_blocks, form, kernel):
    """The blocks stay alike, so that they are compiled once, and the logits are those of the forward pass."""
    from mpt_eqx import generate
    from mpt_eqx.generation.layers import has_layer_loop

    model = trained(with_all(FORMS[form](two_blocks)))
    assert has_layer_loop(model)
    result = generate(model, TOKENS[:, :3].tolist(), max_new_tokens=4, return_logits=True)
    wanted = rows(model, np.concatenate([TOKENS[:, :3], result.tokens], axis=1))[:, 2:-1]
    np.testing.assert_allclose(result.logits, wanted, atol=0.05 if form == "bfloat16" else 1e-4, rtol=0)


def test_adapters_of_some_blocks_are_saved(two_blocks, tmp_path):
    from mpt_eqx.generation.layers import has_layer_loop

    part = eqx.tree_at(lambda m: m.blocks[1], trained(with_all(two_blocks)), two_blocks.blocks[1])
    assert not has_layer_loop(part)
    lora.save(part, tmp_path)
    assert "blocks.0.attn.Wqkv" in json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert eqx.tree_equal(lora.load(two_blocks, tmp_path), part)
    with pytest.raises(CheckpointError, match=r"all blocks alike, because the model is stacked, .*mpt_eqx\.unstack"):
        lora.load(stack(two_blocks), tmp_path)


@pytest.mark.parametrize("form", some(["single", "stacked"], ["stacked"]))
def test_dropout_takes_a_key_and_is_of_training_alone(base, form, tmp_path):
    plain = stack(base) if form == "stacked" else base
    model = trained(with_all(plain, dropout=0.5))
    with pytest.raises(MPTError, match=r"key: expected a key, .*because the model has dropout .*inference_mode"):
        model(TOKENS[0])
    quiet = eqx.nn.inference_mode(model)
    run = eqx.filter_jit(lambda model, key=None: model(TOKENS[0], key=key))
    wanted, (one, same, other) = run(quiet), (run(model, jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert jnp.abs(one - other).max() > 1e-3 and jnp.abs(one - wanted).max() > 1e-3
    np.testing.assert_array_equal(wanted, run(trained(with_all(plain))))
    lora.save(model, tmp_path)
    loaded = lora.load(plain, tmp_path)
    np.testing.assert_array_equal(run(loaded), wanted)
    assert eqx.tree_equal(eqx.nn.inference_mode(loaded, False), model)


def test_every_adapter_drops_numbers_of_its_own(base):
    """With half of its inputs dropped on the average: neither in two adapters nor in two rows the same ones."""
    from mpt_eqx.model.remat import _with_keys

    block = _with_keys(with_all(base, dropout=0.5).blocks[0], jax.random.key(0))
    own = [
        jax.random.key_data(node.key).tolist()
        for node in jax.tree.leaves(block, is_leaf=is_adapter)
        if is_adapter(node)
    ]
    taken = jax.random.key_data(jax.random.split(jax.random.key(0), 8)).tolist()
    assert len(own) == 4 and len({tuple(key) for key in own + taken}) == 12


def test_on_a_mesh_adapters_are_replicated_and_the_base_lies_as_without(base):
    from mpt_eqx.sharding import FSDP, TENSOR_PARALLEL, partition_specs

    mesh = AbstractMesh((4,), ("fsdp",))
    plain, found = (partition_specs(model, FSDP, mesh) for model in (base, with_all(base)))
    assert lora.remove(found) == plain
    own = found.blocks[0].ffn.up_proj
    assert own.lora_A.weight == own.lora_B.weight == PartitionSpec(None, None)
    axes = AbstractMesh((4,), ("tp",))
    other = lora.add(base, rank=2, targets=("up_proj",), key=jax.random.key(0))
    assert partition_specs(other, TENSOR_PARALLEL, axes).blocks[0].ffn.up_proj.base.weight[0] == "tp"


def test_a_wqkv_that_a_mesh_has_split_has_no_adapter(base, tmp_path):
    """PEFT's files know Wqkv alone."""
    from mpt_eqx.sharding import TENSOR_PARALLEL, make_mesh, shard

    split = shard(base, make_mesh(tp=1), TENSOR_PARALLEL)
    for target in ("Wqkv", "Wq"):
        with pytest.raises(MPTError, match=f"found '{target}', which rules that shard heads have split .*FSDP"):
            lora.add(split, rank=2, targets=(target,), key=jax.random.key(0))
    lora.save(lora.add(base, rank=2, key=jax.random.key(0)), tmp_path)
    with pytest.raises(CheckpointError, match=r"found 'Wqkv' \(rules that shard heads have split Wqkv: .*FSDP\)"):
        lora.load(split, tmp_path)


WRONG_ARGUMENTS = {
    "rank": ({"rank": 0}, r"rank: expected a whole number ≥ 1, found 0"),
    "half a rank": ({"rank": 1.5}, r"rank: expected a whole number ≥ 1, found 1\.5"),
    "alpha": ({"alpha": -1}, r"alpha: expected a finite number > 0 or None, found -1"),
    "dropout": ({"dropout": 1.0}, r"dropout: expected a number with 0 ≤ dropout < 1, found 1\.0"),
    "a string": ({"targets": "Wqkv"}, r"targets: expected some names of linear maps, .*found 'Wqkv'"),
    "no target": ({"targets": ()}, r"targets: expected some names of linear maps, .*found \(\)"),
    "unknown": (
        {"targets": ("Wqkv", "lm_head")},
        r"targets: expected some of Wqkv, out_proj, up_proj, down_proj, found 'lm_head'",
    ),
}


@pytest.mark.parametrize("what", WRONG_ARGUMENTS)
def test_arguments_that_are_not_valid(base, what):
    given, message = WRONG_ARGUMENTS[what]
    with pytest.raises(MPTError, match=message):
        lora.add(base, **{"rank": 2, "key": jax.random.key(0), **given})


def test_models_without_adapters_or_with_some_already(two_blocks, tmp_path):
    with pytest.raises(
        MPTError, match=r"model: expected no adapters, found some; merge them with mpt_eqx\.lora\.merge"
    ):
        with_all(with_all(two_blocks))
    for function in (lora.trainable, lora.merge, lambda model: lora.save(model, tmp_path)):
        with pytest.raises(MPTError, match="model: expected one with adapters, found none; "):
            function(two_blocks)
    uneven = eqx.tree_at(
        lambda m: m.blocks[1],
        with_all(two_blocks),
        lora.add(two_blocks, rank=2, targets=TARGETS, key=jax.random.key(0)).blocks[1],
    )
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.Wqkv: expected \{'r': 3, .* found \{'r': 2, "):
        lora.save(uneven, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file: cannot be written \("):
        lora.save(with_all(two_blocks), tmp_path / "file")


WRONG_CONFIGS = {
    "dora": ({"use_dora": True}, "use_dora: expected nothing, because it changes what an adapter computes, found True"),
    "bias": ({"bias": "lora_only"}, "bias: expected nothing, .*found 'lora_only'; merge the adapter in PEFT"),
    "lora_bias": ({"lora_bias": True}, "lora_bias: expected nothing"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "fan_in_fan_out: expected nothing"),
    "modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save: expected nothing, .*found \['lm_head'\]"),
    "ranks": ({"rank_pattern": {"Wqkv": 4}}, "rank_pattern: expected nothing"),
    "alphas": ({"alpha_pattern": {"Wqkv": 4}}, "alpha_pattern: expected nothing"),
    "layers": ({"layers_to_transform": [0]}, "layers_to_transform: expected nothing"),
    "replication": ({"layer_replication": [[0, 1]]}, "layer_replication: expected nothing"),
    "unknown": ({"some_new_idea": 3}, "some_new_idea: expected nothing"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: expected true, .*found 'pissa_niter_4'"),
    "kind": ({"peft_type": "LOHA"}, "peft_type: expected 'LORA', found 'LOHA'"),
    "rank": ({"r": 0}, "r: expected a whole number from 1 to 65536, found 0"),
    "another rank": ({"r": 4}, r"lora_A\.weight: expected \[4, 48\], of rank r=4 for this model, found \[8, 48\]"),
    "alpha": ({"lora_alpha": "8"}, "lora_alpha: expected a finite number > 0, found '8'"),
    "dropout": ({"lora_dropout": 1}, "lora_dropout: expected a number from 0 to below 1, found 1"),
    "rslora": ({"use_rslora": "yes"}, "use_rslora: expected true or false, found 'yes'"),
    "targets": ({"target_modules": "all-linear"}, r"target_modules: expected a list of names, .*found 'all-linear'"),
    "another map": (
        {"target_modules": ["Wqkv", "down_proj", "wte"]},
        "target_modules: expected linear maps of this model's blocks, Wqkv, out_proj, up_proj, down_proj, found 'wte'",
    ),
    "more targets": (
        {"target_modules": ["Wqkv", "down_proj", "up_proj"]},
        r"expected tensors of all that target_modules names, missing: blocks\.0\.ffn\.up_proj\.lora_A, ",
    ),
    "fewer targets": (
        {"target_modules": ["Wqkv"]},
        r"expected tensors of what target_modules names in 2 blocks, found some of blocks\.0\.ffn\.down_proj",
    ),
}


@pytest.mark.parametrize("what", WRONG_CONFIGS)
def test_settings_that_are_not_computed_here_are_refused_by_name(theirs, adapter, what):
    changes, message = WRONG_CONFIGS[what]
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        lora.load(theirs, adapter)
    assert str(adapter) in str(caught.value)


A = "base_model.model.transformer.blocks.0.attn.Wqkv.lora_A.weight"
WRONG_TENSORS = {
    "shape": (lambda t: t | {A: t[A][:, :40]}, r"Wqkv\.lora_A\.weight: expected \[8, 48\], .*found \[8, 40\]"),
    "axes": (lambda t: t | {A: t[A].reshape(-1)}, r"Wqkv\.lora_A\.weight: expected \[8, 48\], .*found \[384\]"),
    "missing": (lambda t: {k: x for k, x in t.items() if k != A}, r"missing: blocks\.0\.attn\.Wqkv\.lora_A"),
    "another layer": (
        lambda t: t | {A.replace("blocks.0", "blocks.7"): t[A]},
        r"in 2 blocks, found some of blocks\.7\.attn\.Wqkv; the adapter is another model's",
    ),
    "an embedding": (
        lambda t: t | {"base_model.model.transformer.wte.lora_embedding_A": t[A]},
        r"expected lora_A and lora_B of linear maps in blocks only, .*found base_model\.model\.transformer\.wte",
    ),
    "dora": (lambda t: t | {A.replace("lora_A", "lora_magnitude_vector"): t[A]}, "found .*lora_magnitude_vector"),
    "twice": (lambda t: t | {A.replace("base_model.model.", ""): t[A]}, "expected it once, found it under two names"),
    "integers": (lambda t: t | {A: t[A].astype(np.int8)}, r"lora_A\.weight: expected .*float32.*, found int8"),
}


@pytest.mark.parametrize("what", WRONG_TENSORS)
def test_tensors_that_do_not_fit(theirs, adapter, what):
    change, message = WRONG_TENSORS[what]
    path = adapter / "adapter_model.safetensors"
    save_file({name: np.ascontiguousarray(x) for name, x in change(load_file(path)).items()}, path)
    with pytest.raises(CheckpointError, match=message):
        lora.load(theirs, adapter)


def test_files_that_are_not_there(theirs, adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "other")
    with pytest.raises(CheckpointError, match=r"expected adapter_model\.safetensors or adapter_model\.bin beside"):
        lora.load(theirs, adapter)
    (adapter / "adapter_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: expected JSON, found something else"):
        lora.load(theirs, adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected an adapter of PEFT, found no adapter_config\.json"):
        lora.load(theirs, adapter)


def test_a_save_that_ends_early_leaves_one_adapter_or_none(theirs, adapter, monkeypatch):
    """At every step of a save the directory holds the old adapter, the new one, or none."""
    import os

    old, new = lora.load(theirs, adapter), lora.load(theirs, OURS / "adapter")
    real, left = os.replace, [0]

    def replace(*paths):
        if left[0] == 0:
            raise OSError("no power")
        left[0] -= 1
        real(*paths)

    for steps in range(3):
        directory = adapter.parent / str(steps)
        shutil.copytree(adapter, directory)
        left[0] = steps
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                lora.save(new, directory)
            except CheckpointError as error:
                assert re.search("cannot be written", str(error)) and steps < 2
        try:
            found = lora.load(theirs, directory)
        except CheckpointError as error:
            assert "found no adapter_config.json" in str(error) and steps < 2
        else:
            assert eqx.tree_equal(found, new if steps == 2 else old)
