"""Torch files, legacy torch files and GGUF: the same tensors as from safetensors, bit for bit."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch_bytes as tb
from conftest import GOLDEN, some
from safetensors.numpy import load_file

VARIANTS = sorted(path.name for path in (GOLDEN / "hf_bin").iterdir() if path.is_dir())
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json")
CASES = sorted(
    path.parent.name
    for path in GOLDEN.glob("*/config.json")
    if path.parent.name != "hf_ignored_keys" and set(os.listdir(path.parent)) & set(WEIGHTS)
)


def leaves(model):
    from mpt_eqx.checkpoint.names import named_leaves

    return {name: np.asarray(leaf) for name, leaf in named_leaves(model).items()}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        assert array.dtype == wanted[name].dtype and array.shape == wanted[name].shape
        np.testing.assert_array_equal(array.reshape(-1).view(np.uint8), wanted[name].reshape(-1).view(np.uint8))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mmap", [True, False])
def test_every_torch_file(variant, mmap):
    from mpt_eqx import from_pretrained

    dtype = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[variant[:4]]
    wanted = load_file(GOLDEN / "hf_bin" / "tensors_fp32.safetensors")
    wanted = {name: tensor.astype(dtype) for name, tensor in wanted.items() if name != "lm_head.weight"}
    assert_equal(leaves(from_pretrained(GOLDEN / "hf_bin" / variant, mmap=mmap)), wanted)


@pytest.mark.parametrize("variant", ["fp32_odd_legacy", "fp16_zip", "bf16_shard3_zip"])
def test_a_torch_checkpoint_gives_the_recorded_logits(variant):
    """Recorded with the stored weights widened to float32."""
    from mpt_eqx import from_pretrained

    expected = load_file(GOLDEN / "hf_bin" / "expected.safetensors")
    model = from_pretrained(GOLDEN / "hf_bin" / variant, dtype="float32")
    logits = jax.vmap(model)(jnp.asarray(expected["input_ids"], jnp.int32))
    np.testing.assert_allclose(logits, expected[f"logits.{variant[:4]}"], atol=1e-4, rtol=0)


WRITTEN = ("hf_default", "f_gqa_kv2", "f_torch_dmoe", "f_reuse_kv_x", "f_glu_silu", "f_qk_ln")


@pytest.mark.parametrize("name", some(CASES, WRITTEN))
def test_every_case_through_every_writer(tmp_path, name):
    """As torch zip, legacy, inside a Composer checkpoint, and through save_pretrained and convert."""
    from mpt_eqx import checkpoint_info, from_pretrained, save_pretrained
    from mpt_eqx.checkpoint import convert

    model = from_pretrained(GOLDEN / name)
    wanted = leaves(model)
    stored = {tensor.name: tensor.read() for tensor in checkpoint_info(GOLDEN / name).tensors}

    def place(directory):
        directory.mkdir()
        shutil.copy(GOLDEN / name / "config.json", directory)
        return directory

    tb.write_zip(place(tmp_path / "zip") / "pytorch_model.bin", *tb.of_arrays(stored))
    tb.write_legacy(place(tmp_path / "legacy") / "pytorch_model.bin", *tb.of_arrays(stored, legacy=True))
    composer = {f"model.{tensor}": array for tensor, array in stored.items()}
    tb.write_zip(place(tmp_path / "composer") / "ep1-ba5.pt", *tb.of_arrays(composer, nest=("state", "model")))
    save_pretrained(model, tmp_path / "saved", max_shard_size=20_000)
    convert(tmp_path / "legacy", tmp_path / "converted")
    for directory in ("zip", "legacy", "composer", "saved", "converted"):
        assert_equal(leaves(from_pretrained(tmp_path / directory)), wanted)
    file = tmp_path / "composer" / "ep1-ba5.pt"
    assert_equal(leaves(from_pretrained(file)), wanted)
    assert checkpoint_info(file).format == "torch"


@pytest.mark.parametrize("write", [tb.write_zip, tb.write_legacy])
def test_a_whole_composer_checkpoint(tmp_path, write):
    """With times, an optimizer and states of random number generators beside the weights."""
    from mpt_eqx import from_pretrained

    stored = load_file(GOLDEN / "hf_default" / "model.safetensors")
    weights = {f"model.{name}": array for name, array in stored.items()}
    stream, storages = tb.of_arrays(weights, legacy=write is tb.write_legacy)
    whole = tb.composer(stream[2:-1], b"N", key="more")
    write(tmp_path / "latest-rank0.pt", whole, {**storages, "more": (32, bytes(128))})
    shutil.copy(GOLDEN / "hf_default" / "config.json", tmp_path)
    assert_equal(leaves(from_pretrained(tmp_path)), stored)


def write_gguf(path, model, quantisation=None, also=lambda writer: None):
    """Writes a model as llama.cpp's converter does."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "mpt")
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_head_count(config.n_heads)
    if config.kv_heads != config.n_heads:
        writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_eps(config.norm_eps)
    if config.attn_config.clip_qkv is not None:
        writer.add_clamp_kqv(config.attn_config.clip_qkv)
    writer.add_max_alibi_bias(config.attn_config.alibi_bias_max if config.attn_config.alibi else 0.0)
    for name, array in leaves(model).items():
        name = name.removeprefix("transformer.").replace("blocks.", "blk.").replace("attn.Wqkv", "attn_qkv")
        for ours, theirs in (
            ("attn.out_proj", "attn_output"), ("attn.q_ln", "attn_q_norm"), ("attn.k_ln", "attn_k_norm"),
            ("norm_1", "attn_norm"), ("norm_2", "ffn_norm"), ("ffn.up_proj", "ffn_up"), ("ffn.down_proj", "ffn_down"),
            ("norm_f", "output_norm"), ("wte", "token_embd"), ("wpe", "position_embd"), ("lm_head", "output"),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        if quantisation is not None and array.ndim == 2:
            kind = gguf.GGMLQuantizationType[quantisation]
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        elif array.dtype == ml_dtypes.bfloat16:
            raw = array.view(np.uint8).reshape(*array.shape[:-1], -1)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, array)
    also(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


IN_GGUF = (
    *("hf_default", "hf_untied", "hf_clip_qkv", "hf_fp16", "f_alibi_bias_max16_heads6", "f_bias", "f_bias_noattnbias"),
    *("f_learned_pos", "f_gqa_kv2", "f_qk_ln", "f_expansion2", "hf_bf16"),
)
# The largest error of a weight, as a share of the largest in its block of 32 (for F16 and BF16, of itself).
STEPS = {
    "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127, "Q4_0": 1 / 7, "Q4_1": 1 / 15, "Q5_0": 1 / 15, "Q5_1": 1 / 31,
}  # fmt: skip


@pytest.mark.parametrize("name", some(IN_GGUF, IN_GGUF[:5]))
def test_gguf_without_a_config(tmp_path, name):
    """The header and the tensors say what config.json would: the same tensors and the same logits."""
    from mpt_eqx import checkpoint_info, from_pretrained

    model = from_pretrained(GOLDEN / name)
    write_gguf(tmp_path / "model.gguf", model)
    again = from_pretrained(tmp_path / "model.gguf")
    assert_equal(leaves(again), leaves(model))
    tokens = jnp.arange(12)
    np.testing.assert_allclose(*(np.asarray(m(tokens), np.float32) for m in (again, model)), atol=1e-6)
    info = checkpoint_info(tmp_path)
    assert info.format.startswith("GGUF (") and not info.problems


@pytest.mark.parametrize("quantisation", STEPS)
def test_quantised_gguf(golden, tmp_path, quantisation):
    """Every weight is within one step of its block's range (or one rounding); logits follow from the weights."""
    from mpt_eqx import from_pretrained

    model = golden("hf_default").model
    write_gguf(tmp_path / "model.gguf", model, quantisation)
    again = from_pretrained(tmp_path / "model.gguf")
    for name, array in leaves(again).items():
        assert array.dtype == np.float32
        original = leaves(model)[name]
        blocks = np.abs(original.reshape(-1, 32))
        scale = blocks.max(-1, keepdims=True) if quantisation.startswith("Q") else blocks
        off = np.abs(array - original).reshape(-1, 32)
        assert (off <= 2.1 * STEPS[quantisation] * scale).all() if original.ndim == 2 else (off == 0).all()
    if quantisation == "Q8_0":
        assert np.abs(again(jnp.arange(12)) - model(jnp.arange(12))).max() < 0.3


@pytest.mark.parametrize("quantisation", some(["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"], ["Q3_K", "Q4_K"]))
def test_k_quants(tiny_config, tmp_path, quantisation):
    """Their blocks have 256 numbers; the library dequantises, this looks at shapes and values."""
    import gguf

    from mpt_eqx import MPT, from_pretrained

    model = MPT(tiny_config(d_model=256), key=jax.random.key(0))
    kind = gguf.GGMLQuantizationType[quantisation]
    rng = np.random.default_rng(0)
    raw = {}

    def quantize(array, kind):
        count, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 30, (array.shape[0], array.shape[1] // count * size), np.uint8)
        raw[array.shape] = gguf.quants.dequantize(blocks, kind)
        return blocks

    original, gguf.quants.quantize = gguf.quants.quantize, quantize
    try:
        write_gguf(tmp_path / "model.gguf", model, quantisation)
    finally:
        gguf.quants.quantize = original
    again = from_pretrained(tmp_path, dtype="float32")
    np.testing.assert_array_equal(again.wte.weight, raw[(61, 256)])
    assert from_pretrained(tmp_path, dtype="bfloat16").wte.weight.dtype == jnp.bfloat16
    assert kind.name == quantisation


def test_gguf_with_a_config_beside_it(golden, tmp_path):
    from mpt_eqx import from_pretrained

    case = golden("hf_softmax_scale")
    write_gguf(tmp_path / "model.gguf", case.model)
    shutil.copy(case.directory / "config.json", tmp_path)
    assert from_pretrained(tmp_path / "model.gguf").config == case.model.config


def test_gguf_needs_its_library(golden, tmp_path, monkeypatch):
    import sys

    from mpt_eqx import CheckpointError, from_pretrained

    write_gguf(tmp_path / "model.gguf", golden("hf_default").model)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        CheckpointError, match=r"reading GGUF needs the gguf library; install it with pip install .*gguf"
    ):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("stored", ["float64", "float32"])
def test_float64(tmp_path, stored):
    """Loaded as it is where JAX allows it, converted where asked, and refused in words where JAX would narrow it."""
    from mpt_eqx import CheckpointError, from_pretrained

    arrays = {
        name: array.astype(stored) for name, array in load_file(GOLDEN / "hf_default" / "model.safetensors").items()
    }
    tb.write_zip(tmp_path / "pytorch_model.bin", *tb.of_arrays(arrays))
    shutil.copy(GOLDEN / "hf_default" / "config.json", tmp_path)
    assert from_pretrained(tmp_path, dtype="float32").wte.weight.dtype == jnp.float32
    with pytest.raises(CheckpointError, match="would be float64, which JAX has switched off; pass dtype='float32'"):
        from_pretrained(tmp_path, dtype="float64")
    with jax.enable_x64(True):
        model = from_pretrained(tmp_path, dtype="float64")
        assert model.wte.weight.dtype == jnp.float64
        logits = model(jnp.asarray(np.arange(5)))
        assert logits.dtype == jnp.float64
    np.testing.assert_allclose(logits, from_pretrained(GOLDEN / "hf_default")(jnp.arange(5)), atol=1e-4)


def test_ways_to_name_a_checkpoint(golden, tmp_path):
    from mpt_eqx import CheckpointError, from_pretrained

    shutil.copytree(GOLDEN / "hf_default", tmp_path / "m")
    wanted = leaves(golden("hf_default").model)
    assert_equal(leaves(from_pretrained(tmp_path / "m" / "model.safetensors")), wanted)
    (tmp_path / "m" / "expected.safetensors").unlink()
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "weights.safetensors")
    assert_equal(leaves(from_pretrained(str(tmp_path / "m"))), wanted)
    shutil.copy(tmp_path / "m" / "weights.safetensors", tmp_path / "m" / "more.safetensors")
    with pytest.raises(
        CheckpointError, match="found several files and no index: more.safetensors, weights.safetensors; p"
    ):
        from_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(Exception, match=r"config.json: no such file; an MPT checkpoint has its configuration there"):
        from_pretrained(tmp_path / "m" / "more.safetensors")


def test_in_place_when_aligned(golden, tmp_path):
    """What save_pretrained writes is used where it lies in the file; mmap=False, a cast or odd sizes copy."""
    from mpt_eqx import from_pretrained, save_pretrained

    model = golden("hf_default").model
    save_pretrained(model, tmp_path)

    def in_file(leaf):
        address = leaf.unsafe_buffer_pointer()
        spans = [
            [int(end, 16) for end in line.split()[0].split("-")]
            for line in Path("/proc/self/maps").read_text().split("\n")
            if str(tmp_path) in line
        ]
        return any(start <= address < end for start, end in spans)

    loaded = from_pretrained(tmp_path)
    assert all(in_file(leaf) for leaf in jax.tree.leaves(loaded))
    copied = from_pretrained(tmp_path, mmap=False)
    cast = from_pretrained(tmp_path, dtype="bfloat16")
    for other in (copied, cast):
        assert not any(in_file(leaf) for leaf in jax.tree.leaves(other))
    tokens = jnp.arange(9)
    np.testing.assert_array_equal(loaded(tokens), model(tokens))
    header = json.loads((tmp_path / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")
    start = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") + 8
    assert all((start + entry["data_offsets"][0]) % 64 == 0 for name, entry in header.items() if name[0] != "_")


def test_tensors_of_odd_sizes_come_last(tiny_config, tmp_path):
    from mpt_eqx import MPT, from_pretrained, save_pretrained

    model = MPT(tiny_config(d_model=36, vocab_size=7), key=jax.random.key(0))
    save_pretrained(model, tmp_path)
    assert_equal(leaves(from_pretrained(tmp_path)), leaves(model))


def test_a_summary_and_a_bar_when_asked(capsys):
    import re

    from mpt_eqx import from_pretrained

    from_pretrained(GOLDEN / "hf_default", progress=True)
    err = capsys.readouterr().err
    assert re.search(
        r"loaded hf_default: 27,840 parameters, 111.36 kB float32, \d+.\d s, peak memory \d+.\d\d [MG]B\n", err
    )
    from_pretrained(GOLDEN / "hf_default")
    assert capsys.readouterr().err == ""
