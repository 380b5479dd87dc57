"""Loading and saving: bit for bit, strict, and with one error that says what is wrong."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, some
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

CASES = (
    "hf_default",
    "hf_untied",
    "hf_sharded",
    "hf_bf16",
    "hf_fp16",
    "f_mha_alibi",
    "hf_clip_qkv",
    "f_bias",
    "f_reuse_kv",
    "f_unfused_qkv",
    "f_act_leaky_relu",
)


def tensors(directory):
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        if path.name != "expected.safetensors":
            with safe_open(path, "np") as f:
                found |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return found


@pytest.fixture
def copy(tmp_path):
    """A copy of hf_default to break; `change` gets its tensors and may replace them."""

    def make(change=lambda held: held, case="hf_default"):
        directory = tmp_path / "copy"
        shutil.copytree(GOLDEN / case, directory)
        (directory / "expected.safetensors").unlink()
        if (directory / "model.safetensors").exists():
            held = change(tensors(directory))
            save_file(held, directory / "model.safetensors")
        return directory

    return make


def assert_same_weights(again, model):
    assert again.config == model.config
    assert jax.tree.structure(again) == jax.tree.structure(model)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        assert one.dtype == other.dtype and (one == other).all()


def without(held, *names):
    return {name: tensor for name, tensor in held.items() if name not in names}


@pytest.mark.parametrize("name", CASES)
def test_leaves_are_the_files_tensors_bit_for_bit(golden, name):
    from mpt_eqx.checkpoint.names import named_leaves

    leaves, stored = named_leaves(golden(name).model), tensors(GOLDEN / name)
    assert leaves.keys() == stored.keys()
    for tensor, leaf in leaves.items():
        assert leaf.dtype == stored[tensor].dtype
        np.testing.assert_array_equal(np.asarray(leaf).view(np.uint8), stored[tensor].view(np.uint8))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("max_shard_size", some(["5GB", "30KB", 1000], ["30KB"]))
def test_save_and_load(golden, tmp_path, name, max_shard_size):
    from mpt_eqx import checkpoint_info, from_pretrained, save_pretrained

    model = golden(name).model
    save_pretrained(model, tmp_path, max_shard_size=max_shard_size)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert "config.json" in files and ("model.safetensors.index.json" in files) == (max_shard_size != "5GB")
    assert all((tmp_path / file).stat().st_mode == (tmp_path / "config.json").stat().st_mode for file in files)
    again = from_pretrained(tmp_path)
    assert_same_weights(again, model)
    info = checkpoint_info(tmp_path)
    assert info.problems == () and info.parameters == sum(t.size for t in info.tensors)
    assert info.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))


def test_saving_replaces_what_an_earlier_save_left(golden, tmp_path):
    from mpt_eqx import from_pretrained, save_pretrained

    (tmp_path / "tokenizer.json").write_text("{}")
    for size in ("30KB", "5GB", "30KB"):
        save_pretrained(golden("hf_default").model, tmp_path, max_shard_size=size)
        assert (tmp_path / "model.safetensors").exists() == (size == "5GB")
        assert (tmp_path / "tokenizer.json").exists() and not list(tmp_path.glob("*.tmp"))
        from_pretrained(tmp_path)


def test_arrays_that_are_not_contiguous_are_saved_rightly(golden, tmp_path):
    """safetensors 0.8 writes the wrong bytes of a transposed numpy array."""
    import equinox as eqx

    from mpt_eqx import from_pretrained, save_pretrained

    model = golden("hf_default").model
    weight = np.asarray(model.wte.weight)
    transposed = eqx.tree_at(lambda m: m.wte.weight, model, np.asfortranarray(weight))
    save_pretrained(transposed, tmp_path)
    np.testing.assert_array_equal(from_pretrained(tmp_path).wte.weight, weight)


@pytest.mark.parametrize("size", ["5 parsecs", "0", "-1", 0, "1.5GB"])
def test_sizes_that_are_none(tiny_model, tmp_path, size):
    from mpt_eqx import CheckpointError, save_pretrained

    with pytest.raises(CheckpointError, match="max_shard_size: expected bytes or a size such as '200MB'"):
        save_pretrained(tiny_model, tmp_path / "x", max_shard_size=size)
    assert not (tmp_path / "x").exists()


def test_saving_where_nothing_can_be_written(tiny_model, tmp_path):
    from mpt_eqx import CheckpointError, save_pretrained

    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: cannot be written"):
        save_pretrained(tiny_model, tmp_path / "file")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", jnp.bfloat16, np.float16])
@pytest.mark.parametrize("name", ["hf_default", "hf_bf16"])
def test_dtype_converts(golden, dtype, name):
    stored = golden(name).model
    model = golden(name, dtype=dtype).model
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(model.wte.weight, stored.wte.weight.astype(dtype))


def test_device(golden):
    device = jax.devices()[0]
    assert golden("hf_default", device=device).model.wte.weight.devices() == {device}


@pytest.mark.parametrize("dtype", ["int8", "half a float"])
def test_other_dtypes_are_refused(golden, dtype):
    from mpt_eqx import CheckpointError

    with pytest.raises(
        CheckpointError, match=f"dtype: expected float64 or float32 or float16 or bfloat16, found '{dtype}'"
    ):
        golden("hf_default", dtype=dtype)


FIRST = "transformer.blocks.0.norm_1.weight"


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda held: without(held, FIRST), [r"1 missing: transformer.blocks.0.norm_1.weight \[32\]"]),
        (lambda held: held | {"extra": held[FIRST]}, [r"ignore=\['extra.\*'\]", r"1 unexpected: extra \[32\]"]),
        (
            lambda held: held | {FIRST: held[FIRST][:5]},
            [r"1 misshaped: .*norm_1.weight \(expected \[32\], found \[5\] in model.safetensors\)"],
        ),
        (
            lambda held: held | {FIRST: held[FIRST].astype(np.int32)},
            [r"1 of another type than .*norm_1.weight \(I32, model.safetensors\)"],
        ),
        (
            lambda held: without(held, FIRST) | {"extra": held[FIRST], "transformer.norm_f.weight": held[FIRST][:1]},
            [r"ignore=\['extra.\*'\]", "1 missing", "1 unexpected", "1 misshaped"],
        ),
        (
            lambda held: {"x": np.zeros(3, np.float32)},
            [r"ignore=\['x.\*'\]", r"14 missing: .* … and 4 more", "1 unexpected: x"],
        ),
    ],
)
def test_tensors_that_do_not_fit_come_in_one_error(copy, change, messages):
    from mpt_eqx import CheckpointError, checkpoint_info, from_pretrained

    directory = copy(change)
    with pytest.raises(CheckpointError, match="config.json and the tensors disagree") as error:
        from_pretrained(directory)
    for message in messages:
        assert re.search(message, str(error.value))
    assert "\n" not in str(error.value)
    assert len(checkpoint_info(directory).problems) == len(messages)


def test_config_and_tensors_disagree(copy):
    from mpt_eqx import CheckpointError, from_pretrained

    directory = copy()
    with pytest.raises(CheckpointError, match=r"6 missing: transformer.blocks.2.norm_1.weight"):
        from_pretrained(directory, config_overrides={"n_layers": 3})
    with pytest.raises(CheckpointError, match=r"7 unexpected|6 unexpected: transformer.blocks.1"):
        from_pretrained(directory, config_overrides={"num_hidden_layers": 1})
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head.weight \[97, 32\]"):
        from_pretrained(directory, config_overrides={"tie_word_embeddings": False})


def test_config_overrides(golden):
    case = golden(
        "hf_default", config_overrides={"max_seq_len": 999, "attn_config": {"clip_qkv": 0.5}, "norm_eps": 0.1}
    )
    config = case.model.config
    assert (config.max_seq_len, config.attn_config.clip_qkv, config.norm_eps) == (999, 0.5, 0.1)
    assert config.attn_config.alibi


def test_a_head_in_the_file_of_a_tied_model(copy):
    from mpt_eqx import CheckpointError, from_pretrained

    embedding = "transformer.wte.weight"
    same = copy(lambda held: held | {"lm_head.weight": held[embedding]})
    assert from_pretrained(same).lm_head is None
    save_file(tensors(same) | {"lm_head.weight": 2 * tensors(same)[embedding]}, same / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from transformer.wte.weight, although"):
        from_pretrained(same)
    assert from_pretrained(same, config_overrides={"tie_word_embeddings": False}).lm_head is not None


def test_several_types_need_a_choice(copy):
    from mpt_eqx import CheckpointError, from_pretrained

    directory = copy(lambda held: held | {FIRST: held[FIRST].astype(np.float16)})
    with pytest.raises(CheckpointError, match=r"expected tensors of one type, found .*float16\).*; pass dtype="):
        from_pretrained(directory)
    assert from_pretrained(directory, dtype="float32").wte.weight.dtype == jnp.float32


def test_check_finite_names_the_tensor(copy):
    from mpt_eqx import CheckpointError, from_pretrained

    directory = copy(lambda held: held | {FIRST: np.where(np.arange(32) == 3, np.nan, held[FIRST]).astype(np.float32)})
    from_pretrained(directory)
    with pytest.raises(CheckpointError, match=f"model.safetensors: {FIRST} holds NaN or infinity"):
        from_pretrained(directory, check_finite=True)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"x": "../out.safetensors"}}, "expected names of files beside it, found ../out.safetensors"),
        ({"weight_map": {"x": "/etc/passwd"}}, "expected names of files beside it, found /etc/passwd"),
        ({"weight_map": {"x": "none.safetensors"}}, "missing: none.safetensors"),
        ({"weight_map": [1]}, "expected a 'weight_map' from tensor names to file names"),
        ({}, "expected a 'weight_map' from tensor names to file names, found None"),
        ([], "expected a JSON object, found list"),
    ],
)
def test_an_index_that_is_wrong(copy, index, message):
    from mpt_eqx import CheckpointError, from_pretrained

    directory = copy(case="hf_sharded")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(directory)


def test_shards_that_disagree_with_the_index(copy):
    from mpt_eqx import CheckpointError, from_pretrained

    directory = copy(case="hf_sharded")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(name for name, file in index["weight_map"].items() if file == first)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {name: second}}))
    with pytest.raises(CheckpointError, match=rf"1 tensors not in the file that .* names: {name} \({second}\)"):
        from_pretrained(directory)
    shutil.copy(directory / first, directory / second)
    with pytest.raises(CheckpointError, match=rf"there twice: .* .{first}. and .* .{second}."):
        from_pretrained(directory)
    (directory / first).unlink()
    with pytest.raises(
        CheckpointError, match=f"expected the files that model.safetensors.index.json names; missing: {first}"
    ):
        from_pretrained(directory)


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, b"short"])
def test_a_file_that_is_no_safetensors(copy, content):
    from mpt_eqx import CheckpointError, from_pretrained

    directory = copy()
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors: expected a safetensors file, found something else"):
        from_pretrained(directory)


def test_a_file_that_was_cut_off(copy):
    from mpt_eqx import CheckpointError, from_pretrained

    path = copy() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="expected a safetensors file, found something else or a part"):
        from_pretrained(path.parent)


def test_directories_without_weights(tmp_path):
    from mpt_eqx import CheckpointError, ConfigError, from_pretrained

    with pytest.raises(CheckpointError, match=r"expected model.safetensors, pytorch_model.bin, .*, found no weights"):
        from_pretrained(tmp_path)
    shutil.copy(GOLDEN / "hf_default" / "model.safetensors", tmp_path)
    with pytest.raises(ConfigError, match="config.json: no such file"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "source", ["./none", "/none/at/all", "~/none-at-all", "a/b/c", "none", "tests/none", r"models\none", r"D:\a\none"]
)
def test_a_path_that_does_not_exist_is_no_repository(source):
    from mpt_eqx import CheckpointError, from_pretrained

    with pytest.raises(CheckpointError, match=f"^{re.escape(source)}: no such directory$"):
        from_pretrained(source)


def test_a_file_or_subfolder_instead_of_a_directory():
    from mpt_eqx import CheckpointError, from_pretrained

    with pytest.raises(
        CheckpointError, match="config.json: expected safetensors, a torch file or GGUF, found something"
    ):
        from_pretrained(GOLDEN / "hf_default" / "config.json")
    with pytest.raises(CheckpointError, match="no such directory; check subfolder='none'"):
        from_pretrained(GOLDEN, subfolder="none")
    from_pretrained(GOLDEN, subfolder="hf_default")


@pytest.fixture
def hub(monkeypatch):
    """Replaces the listing and the download; records what was asked for; answers with a directory or an error."""
    from types import SimpleNamespace

    import huggingface_hub

    asked = {}

    def answer_with(answer):
        def model_info(self, repo_id, **kwargs):
            asked.update(listed=kwargs)
            if isinstance(answer, Exception):
                raise answer
            paths = [path for path in answer.rglob("*") if path.is_file()]
            names = [path.relative_to(answer).as_posix() for path in paths]
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=1) for name in names])

        def snapshot_download(repo_id, **kwargs):
            asked.update(kwargs, repo_id=repo_id)
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return answer_with


def test_a_hub_repository(hub):
    from mpt_eqx import from_pretrained

    asked = hub(GOLDEN / "hf_default")
    model = from_pretrained("owner/name", revision="v1", token="t", cache_dir="/c")
    assert model.config.d_model == 32
    assert asked["listed"] == {"files_metadata": True, "revision": "v1", "token": "t"}
    expected = {"repo_id": "owner/name", "revision": "v1", "token": "t", "cache_dir": "/c", "local_files_only": False}
    assert expected.items() <= asked.items()
    assert {"config.json", "model.safetensors"} < set(asked["allow_patterns"])
    asked.pop("listed")
    from_pretrained("owner/name", local_files_only=True)
    assert "listed" not in asked and asked["local_files_only"] is True
    asked = hub(GOLDEN)
    from_pretrained("owner/name", subfolder="hf_default")
    assert all(pattern.startswith("hf_default/") for pattern in asked["allow_patterns"])


def test_what_can_go_wrong_with_a_hub_repository(hub):
    from unittest.mock import Mock

    from huggingface_hub import errors

    from mpt_eqx import CheckpointError, from_pretrained

    response = Mock(headers={}, status_code=503)
    for error, message in (
        (
            errors.RepositoryNotFoundError("x", response=response),
            "no such repository on the Hub .*mosaicml/mpt-.* gone",
        ),
        (errors.GatedRepoError("x", response=response), "the repository is gated; ask for access"),
        (errors.RevisionNotFoundError("x", response=response), "the repository has no revision 'v9'"),
        (errors.LocalEntryNotFoundError("x"), "not completely in the Hub's local cache"),
        (errors.HFValidationError("x"), "not a repository id, which looks like owner/name"),
        (errors.HfHubHTTPError("x y", response=response), r"the Hub answers with status 503; try again later \(x y\)"),
        (OSError("no route\nto host"), r"the download from the Hub broke off; try again \(no route to host\)"),
    ):
        hub(error)
        with pytest.raises(CheckpointError, match=message):
            from_pretrained("owner/name", revision="v9")


def test_overrides_that_are_none(tmp_path):
    """In a process without the tests' type checks, which would have another message."""
    script = (
        "from mpt_eqx import ConfigError, checkpoint_info, from_pretrained\n"
        "from mpt_eqx.checkpoint import convert\n"
        f"source = {str(GOLDEN / 'hf_default')!r}\n"
        "for overrides in (3, 'n_layers', [('n_layers', 3)]):\n"
        "    for function, rest in ((checkpoint_info, ()), (from_pretrained, ()), (convert, ('x',))):\n"
        "        try: function(source, *rest, config_overrides=overrides)\n"
        "        except ConfigError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    lines = [
        f"config_overrides: expected a dict of keys of config.json, found {found}"
        for found in ("3", "'n_layers'", "[('n_layers', 3)]")
        for _ in range(3)
    ]
    assert run.stdout.splitlines() == lines, run.stderr


def test_offline_with_a_cached_repository(tmp_path):
    """A cache as huggingface_hub lays it out, in a process of its own: it reads its environment once."""
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(GOLDEN / "hf_default", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    script = (
        "from mpt_eqx import from_pretrained, CheckpointError\n"
        "print(from_pretrained('owner/name').config.d_model)\n"
        "try: from_pretrained('owner/other')\n"
        "except CheckpointError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert run.stdout.startswith("32\nowner/other: no such directory, and not completely in the Hub's local cache"), run


def test_progress_goes_to_stderr_only_if_asked(capsys):
    from mpt_eqx import from_pretrained

    from_pretrained(GOLDEN / "hf_default")
    assert capsys.readouterr() == ("", "")
    from_pretrained(GOLDEN / "hf_default", progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "loading hf_default" in err


def fsdp(name):
    return "model._fsdp_wrapped_module." + name.replace("blocks.", "blocks._checkpoint_wrapped_module.")


def of_early_2023(name):
    for today, then in (("norm_1", "ln_1"), ("norm_2", "ln_2"), ("norm_f", "ln_f"), ("ffn.up_proj", "mlp.mlp_up")):
        name = name.replace(today, then)
    return name.replace("ffn.down_proj", "mlp.mlp_down")


@pytest.mark.parametrize(
    "rename",
    [
        of_early_2023,
        fsdp,
        lambda name: "model." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: "base_model.model." + name,
        lambda name: re.sub(r"(blocks.\d.)(norm|attn)", r"\1norm_attn_norm.\2", name),
    ],
    ids=["early 2023", "FSDP", "Composer", "compiled DDP", "PEFT", "fuse_norm_attn_norm"],
)
def test_names_of_wrappers_and_of_early_2023(copy, golden, rename):
    from mpt_eqx import from_pretrained

    directory = copy(lambda held: {rename(name): tensor for name, tensor in held.items()}, case="f_qk_ln")
    assert_same_weights(from_pretrained(directory), golden("f_qk_ln").model)


def test_a_flat_checkpoint_of_early_2023(copy, golden):
    """As MosaicML published mpt-1b-redpajama-200b: another config.json and other names, the same numbers."""
    from mpt_eqx import from_pretrained

    directory = copy(lambda held: {of_early_2023(name): tensor for name, tensor in held.items()}, case="f_qk_ln")
    flat = {
        "model_type": "mosaic_gpt", "architectures": ["MosaicGPT"], "alibi": True, "alibi_bias_max": 8,
        "attn_clip_qkv": None, "attn_impl": "torch", "attn_pdrop": 0, "attn_qk_ln": True,
        "attn_uses_sequence_id": False, "d_model": 32, "emb_init_std": None, "emb_pdrop": 0, "embedding_fraction": 1.0,
        "fan_mode": "fan_in", "init_nonlinearity": "relu", "low_precision_layernorm": True, "max_seq_len": 64,
        "mlp_ratio": 4, "n_heads": 4, "n_layers": 2, "no_bias": True, "param_init_fn": "kaiming_normal_",
        "prefix_lm": False, "resid_pdrop": 0, "softmax_scale": None, "vocab_size": 97, "verbose": 0,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(flat))
    case = golden("f_qk_ln")
    logits = from_pretrained(directory)(jnp.asarray(case.expected["input_ids"][0], jnp.int32))
    np.testing.assert_allclose(logits, case.expected["logits"][0], atol=1e-4, rtol=0)


def test_a_buffer_of_the_rotation_is_no_weight(copy):
    from mpt_eqx import from_pretrained

    from_pretrained(
        copy(lambda held: held | {"transformer.rotary_embedding.inv_freq": np.ones(4, np.float32)}, "f_rope")
    )


def test_what_transformer_engine_keeps_for_itself_is_no_weight(copy):
    from mpt_eqx import from_pretrained

    state = {f"transformer.blocks.{i}.ffn._extra_state": np.zeros(0, np.uint8) for i in range(2)}
    from_pretrained(copy(lambda held: held | state))


def test_two_names_for_one_tensor(copy):
    from mpt_eqx import CheckpointError, from_pretrained

    old = "transformer.blocks.0.ln_1.weight"
    directory = copy(lambda held: held | {old: held[FIRST]})
    with pytest.raises(CheckpointError, match=rf"1 there twice: {old} .*safetensors. and {FIRST} .*safetensors."):
        from_pretrained(directory)


@pytest.mark.parametrize("ffn_type", ["te_ln_mlp", "torch_dmoe", "mb_dmoe", "mptglu"])
def test_saved_under_the_names_of_the_reference(tiny_config, tmp_path, ffn_type):
    from mpt_eqx import MPT, FFNConfig, from_pretrained, save_pretrained

    model = MPT(tiny_config(no_bias=False, ffn_config=FFNConfig(ffn_type=ffn_type)), key=jax.random.key(0))
    save_pretrained(model, tmp_path)
    names = {name.removeprefix("transformer.blocks.0.ffn.") for name in tensors(tmp_path) if ".0.ffn." in name}
    linear = {"up_proj.weight", "up_proj.bias", "down_proj.weight", "down_proj.bias"}
    assert (
        names
        == {
            "te_ln_mlp": {f"{n}_{kind}" for n in ("layer_norm", "fc1", "fc2") for kind in ("weight", "bias")},
            "torch_dmoe": {"router.layer.weight", "experts.mlp.w1", "experts.mlp.w2"},
            "mb_dmoe": {"router.layer.weight", "experts.mlp.w1", "experts.mlp.w2", "experts.bias"},
            "mptglu": linear | {"gate_proj.weight", "gate_proj.bias"},
        }[ffn_type]
    )
    assert_same_weights(from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    ("case", "overrides", "cause"),
    [
        ("hf_default", {"n_layers": 1}, "config.json says n_layers 1, the tensors have 2 blocks"),
        ("hf_default", {"vocab_size": 98}, "config.json says vocab_size 98 and d_model 32, the embedding is 97 by 32"),
        ("hf_default", {"no_bias": False}, "config.json's no_bias does not fit: there are no tensors norm_1.bias"),
        ("f_bias", {"no_bias": True}, "config.json's no_bias does not fit: there are tensors norm_1.bias"),
        ("f_attention_bias", {"attention_bias": False}, "config.json's attention_bias does not fit: there are tensors"),
        (
            "f_qk_ln",
            {"attn_config": {"qk_ln": False}},
            "config.json's qk_ln or qk_gn does not fit: there are tensors attn",
        ),
        (
            "f_learned_pos",
            {"attn_config": {"alibi": True}},
            "config.json does not ask for learned positions (learned_pos",
        ),
        ("hf_default", {"attn_config": {"alibi": False}}, "config.json asks for learned positions"),
        (
            "hf_default",
            {"tie_word_embeddings": False},
            "config.json says tie_word_embeddings false, the tensors have no lm",
        ),
        (
            "f_gqa_kv2",
            {"attn_config": {"attn_type": "multiquery_attention", "kv_n_heads": None}},
            "4 heads over 1 of keys and values, so 48 rows of Wqkv; its 64 rows would be 2 heads of keys and values",
        ),
    ],
)
def test_why_config_and_tensors_disagree(case, overrides, cause):
    from mpt_eqx import CheckpointError, checkpoint_info, from_pretrained

    problems = checkpoint_info(GOLDEN / case, config_overrides=overrides).problems
    assert any(cause in problem for problem in problems[:2]), problems
    with pytest.raises(CheckpointError, match=re.escape(cause)):
        from_pretrained(GOLDEN / case, config_overrides=overrides)


def test_convert(copy, tmp_path):
    """Any format to aligned safetensors with the tokenizer beside them; refuses what is not finite."""
    from mpt_eqx import SHIPPED_MODEL, CheckpointError, checkpoint_info, from_pretrained
    from mpt_eqx.checkpoint import convert

    convert(SHIPPED_MODEL, tmp_path / "m", max_shard_size="2MB", dtype="float32")
    assert {"tokenizer.json", "generation_config.json", "config.json"} <= {p.name for p in (tmp_path / "m").iterdir()}
    assert_same_weights(from_pretrained(tmp_path / "m"), from_pretrained(SHIPPED_MODEL, dtype="float32"))
    assert len({tensor.file for tensor in checkpoint_info(tmp_path / "m").tensors}) > 3
    with pytest.raises(CheckpointError, match="expected another directory than the source"):
        convert(tmp_path / "m", tmp_path / "m")
    broken = copy(lambda held: held | {FIRST: np.full(32, np.inf, np.float32)})
    with pytest.raises(CheckpointError, match=f"{FIRST} holds NaN or infinity"):
        convert(broken, tmp_path / "n")
    large = shutil.copytree(broken, tmp_path / "large")
    save_file(tensors(broken) | {FIRST: np.full(32, 1e30, np.float32)}, large / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{FIRST} does not fit into float16"):
        convert(large, tmp_path / "n", dtype="float16")
    assert not list((tmp_path / "n").iterdir())


TEXT_FILES = {
    **dict.fromkeys(("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"), b"{}"),
    **dict.fromkeys(("added_tokens.json", "generation_config.json", "chat_template.json"), b"{ }"),
    **dict.fromkeys(("merges.txt", "vocab.txt", "chat_template.jinja", "spiece.model", "tokenizer.model"), b"x"),
    **dict.fromkeys(("gpt2.tiktoken", "sentencepiece.bpe.model", "additional_chat_templates/rag.jinja"), b"y"),
}
TEXT_KEYS = {"eos_token_id": [5, 7], "bos_token_id": 1, "pad_token_id": 3, "tokenizer_class": "T", "top_k": 50}


@pytest.fixture
def with_text(copy):
    """A checkpoint as transformers writes it, with all kinds of files and keys about text, and files that are none."""
    directory = copy()
    (directory / "additional_chat_templates").mkdir()
    for name, content in {**TEXT_FILES, "README.md": b"r", "tokenization_x.py": b"p", "optimizer.pt": b"o"}.items():
        (directory / name).write_bytes(content)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | TEXT_KEYS))
    return directory


def text_files(directory):
    paths = [path for path in directory.rglob("*") if path.is_file()]
    found = {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}
    return {name: content for name, content in found.items() if name not in ("config.json", "model.safetensors")}


@pytest.mark.parametrize("how", ["convert", "save"])
def test_what_is_said_about_text_survives(with_text, tmp_path, how):
    """In every file and in config.json, whichever way a checkpoint is made from another."""
    from mpt_eqx import checkpoint_info, from_pretrained, save_pretrained
    from mpt_eqx.checkpoint import convert

    new = tmp_path / "new"
    if how == "convert":
        convert(with_text, new)
    else:
        save_pretrained(from_pretrained(with_text), new, companions_from=with_text)
    assert text_files(new) == TEXT_FILES
    written = json.loads((new / "config.json").read_text())
    assert {key: written[key] for key in TEXT_KEYS} == TEXT_KEYS
    assert checkpoint_info(new).config == checkpoint_info(with_text).config
    assert checkpoint_info(new).config.pad_token_id is None  # it stays a matter of text, and is trained


@pytest.mark.parametrize("ends", [5, [5, 7]])
def test_what_ends_a_text_is_in_the_configuration(with_text, tmp_path, ends):
    """So that load and save keep it, without any other file."""
    from mpt_eqx import from_pretrained, generation_defaults, save_pretrained

    overrides = {"eos_token_id": ends}
    save_pretrained(from_pretrained(with_text, config_overrides=overrides), tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == (ends, 1, 3)
    assert text_files(tmp_path / "new") == {}
    expected = (ends,) if isinstance(ends, int) else tuple(ends)
    assert generation_defaults(tmp_path / "new") == {"temperature": 0.0, "eos_token_ids": expected, "pad_token_id": 3}


def test_an_override_takes_what_ends_a_text_away(with_text, tmp_path):
    from mpt_eqx.checkpoint import convert

    convert(with_text, tmp_path / "new", config_overrides={"eos_token_id": None})
    assert "eos_token_id" not in json.loads((tmp_path / "new" / "config.json").read_text())


def test_companions_of_a_file_and_of_nothing(with_text, golden, tmp_path):
    from mpt_eqx import CheckpointError, save_pretrained

    model = golden("hf_default").model
    save_pretrained(model, tmp_path / "new", companions_from=with_text / "model.safetensors")
    assert text_files(tmp_path / "new") == TEXT_FILES
    save_pretrained(model, tmp_path / "new", companions_from=tmp_path / "new")
    assert text_files(tmp_path / "new") == TEXT_FILES
    with pytest.raises(CheckpointError, match="companions_from: expected a checkpoint with a tokenizer .* found none"):
        save_pretrained(model, tmp_path / "other", companions_from=GOLDEN / "hf_default")
    with pytest.raises(CheckpointError, match="none: no such directory"):
        save_pretrained(model, tmp_path / "other", companions_from=tmp_path / "none")
    with open(with_text / "vocab.json", "wb") as f:
        f.truncate(2**27)
    with pytest.raises(CheckpointError, match=r"vocab.json: expected at most 67108864 bytes, found 134217728; move"):
        save_pretrained(model, tmp_path / "other", companions_from=with_text)
    assert not (tmp_path / "other").exists()


BARE = "transformer."
WRAPPED = {
    "bare backbone": lambda name: name.removeprefix(BARE),
    "bare backbone of early 2023": lambda name: of_early_2023(name).removeprefix(BARE),
    "bare, compiled, in Lightning": lambda name: "model._orig_mod." + name.removeprefix(BARE),
    "DDP around FSDP around compiled": lambda name: "module._fsdp_wrapped_module._orig_mod." + name,
    "compiled around DDP around PEFT": lambda name: "_orig_mod.module.base_model.model." + name,
    "Accelerate": lambda name: "_forward_module.module.model." + name,
    "every block compiled": lambda name: re.sub(r"(blocks\.\d)\.", r"\1._orig_mod.", name),
    "every block in DDP, checkpointed": lambda name: re.sub(
        r"(blocks\.\d)\.", r"\1.module._checkpoint_wrapped_module.", name
    ),
    "PEFT around single maps": lambda name: "base_model.model." + re.sub(r"(Wqkv|up_proj)\.", r"\1.base_layer.", name),
    "a teacher": lambda name: "teacher.language_model." + name,
}


@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("case", ["f_qk_ln", "hf_untied"])
def test_names_behind_any_wrappers(copy, golden, rename, case):
    from mpt_eqx import from_pretrained

    directory = copy(lambda held: {rename(name): tensor for name, tensor in held.items()}, case=case)
    assert_same_weights(from_pretrained(directory), golden(case).model)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from(["model", "module", "_orig_mod", "base_model", "_fsdp_wrapped_module", "net"]), max_size=6)
)
def test_wrappers_in_any_order(wrappers):
    from mpt_eqx.checkpoint.names import canonical_name

    for name in ("transformer.wte.weight", "lm_head.weight", "transformer.blocks.11.ffn.up_proj.bias"):
        assert canonical_name(".".join([*wrappers, name])) == name
        assert canonical_name(".".join([*wrappers, name.removeprefix(BARE)])) == name


def test_two_models_in_one_file(copy):
    from mpt_eqx import CheckpointError, from_pretrained

    directory = copy(lambda held: {f"{model}.{name}": held[name] for name in held for model in ("policy", "reference")})
    with pytest.raises(CheckpointError, match="14 there twice: policy.transformer.* and reference.transformer"):
        from_pretrained(directory)


def test_another_head_is_left_out_only_when_told(copy, golden, tmp_path):
    from mpt_eqx import CheckpointError, checkpoint_info, from_pretrained
    from mpt_eqx.checkpoint import convert

    head = {"score.weight": np.zeros((3, 32), np.float32), "score.bias": np.zeros(3, np.float32)}
    directory = copy(lambda held: {name.removeprefix(BARE): tensor for name, tensor in held.items()} | head)
    with pytest.raises(CheckpointError, match=r"ignore=\['score.\*'\] leaves it out; 2 unexpected: score.bias"):
        from_pretrained(directory)
    model = golden("hf_default").model
    assert_same_weights(from_pretrained(directory, ignore=["score.*"]), model)
    assert checkpoint_info(directory, ignore=("score.weight", "score.bias")).problems == ()
    convert(directory, tmp_path / "new", ignore=["score.*"])
    assert_same_weights(from_pretrained(tmp_path / "new"), model)
    with pytest.raises(CheckpointError, match="2 unexpected: score.bias|1 unexpected: score.bias"):
        from_pretrained(directory, ignore=["score.weight"])
    with pytest.raises(
        CheckpointError, match=r"ignore: expected names of tensors .* found 'scoer.\*', which names none"
    ):
        from_pretrained(directory, ignore=["scoer.*"])
    with pytest.raises(CheckpointError, match="1 missing: transformer.norm_f.weight"):
        from_pretrained(directory, ignore=["score.*", "norm_f.*"])
    with pytest.raises(CheckpointError, match=r"ignore: expected a list of names of tensors, such as \['score"):
        checkpoint_info(directory, ignore="score.*")


def shards(directory, names, held):
    """Writes the tensors into files of these names, in turn."""
    (directory / "model.safetensors").unlink()
    for i, name in enumerate(names):
        save_file({key: held[key] for key in list(held)[i :: len(names)]}, directory / name)


@pytest.mark.parametrize("stem", ["model", "mpt-7b.fp32", "model-1a2b3c4d"])
def test_shards_without_an_index(copy, golden, stem):
    """All of them are read, whether the directory or one of them is named; with what trainers leave beside them."""
    from mpt_eqx import CheckpointError, from_pretrained

    directory = copy()
    names = [f"{stem}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    shards(directory, names, tensors(directory))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "optimizer_1.bin"):
        (directory / name).write_bytes(b"x")
    for place in (directory, *(directory / name for name in names)):
        assert_same_weights(from_pretrained(place), golden("hf_default").model)
    (directory / names[1]).unlink()
    for place in (directory, directory / names[0]):
        with pytest.raises(CheckpointError, match=f"expected all 3 shards beside each other, missing: {names[1]}; if"):
            from_pretrained(place)


def test_shards_of_two_models_and_of_gguf(copy):
    from mpt_eqx import CheckpointError, from_pretrained

    directory = copy()
    shards(directory, [f"{m}-0000{i}-of-00002.safetensors" for m in "ab" for i in (1, 2)], tensors(directory))
    with pytest.raises(CheckpointError, match="found several files and no index: a-00001-of-00002.safetensors, a-0"):
        from_pretrained(directory)
    for path in directory.glob("*.safetensors"):
        path.rename(path.with_suffix(".gguf"))
    with pytest.raises(CheckpointError, match="expected a GGUF file in one piece, found one of 2; join them"):
        from_pretrained(directory / "a-00001-of-00002.gguf")


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin", None])
@pytest.mark.parametrize(
    "config", [b'{"peft_type": "LORA", "base_model_name_or_path": "mosaicml/mpt-7b"}', b"[", b"{}"]
)
def test_a_directory_of_an_adapter_says_so(tmp_path, weights, config):
    from mpt_eqx import CheckpointError, from_pretrained

    (tmp_path / "adapter_config.json").write_bytes(config)
    places = [tmp_path]
    if weights is not None:
        (tmp_path / weights).write_bytes(b"x")
        places.append(tmp_path / weights)
    of = (
        "LORA.* for the base model 'mosaicml/mpt-7b'"
        if b"LORA" in config
        else "of unknown type.* that it does not name"
    )
    for place in places:
        with pytest.raises(CheckpointError, match=rf"found an adapter of PEFT .{of}; load that .*mpt_eqx\.lora\.load"):
            from_pretrained(place)


def test_an_adapter_beside_or_inside_a_model(copy, golden):
    from mpt_eqx import CheckpointError, from_pretrained

    lora = {
        f"base_model.model.transformer.blocks.0.attn.Wqkv.lora_{ab}.default.weight": np.zeros((2, 2)) for ab in "AB"
    }
    directory = copy()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (directory / name).write_bytes(b"{}")
    assert_same_weights(from_pretrained(directory), golden("hf_default").model)
    (directory / "adapter_model.safetensors").unlink()
    save_file(tensors(directory) | lora, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="there are 2 tensors of a LoRA that is not merged: merge it in PEFT"):
        from_pretrained(directory)


def test_shards_without_an_index_and_an_adapter_on_the_hub(copy, golden, hub):
    from mpt_eqx import CheckpointError, from_pretrained

    directory = copy()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shards(directory, names, tensors(directory))
    asked = hub(directory)
    assert_same_weights(from_pretrained("owner/name"), golden("hf_default").model)
    assert set(names) <= set(asked["allow_patterns"])
    assert_same_weights(from_pretrained(f"owner/name/{names[0]}"), golden("hf_default").model)
    for name in names:
        (directory / name).unlink()
    (directory / "adapter_model.safetensors").write_bytes(b"x")
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "mosaicml/mpt-7b"}))
    for source in ("owner/name", "owner/name/adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match="expected a whole model, found an adapter .*'mosaicml/mpt-7b'"):
            from_pretrained(source)


def test_the_command_line_leaves_tensors_out(copy, tmp_path, capsys):
    from mpt_eqx.cli import main

    directory = copy(lambda held: held | {"score.weight": np.zeros((3, 32), np.float32)})
    assert main(["inspect", str(directory)]) == 1
    assert main(["inspect", str(directory), "--ignore", "score.*"]) == 0
    assert main(["convert", str(directory), str(tmp_path / "n"), "--ignore", "score.*"]) == 0
    assert "ignore=['score.*'] leaves it out" in capsys.readouterr().err
