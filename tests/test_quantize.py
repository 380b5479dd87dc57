"""Weights in 8 and 4 bits: what is quantised and how well, that such a model is one like any other, and its files."""

import itertools
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, examples, is_long, one_in, some
from hypothesis import given
from hypothesis import strategies as st
from mutate import mutant
from safetensors.numpy import load_file, save_file

SCHEMES = ["int8", "int4"]
DIVISORS = (-8.0, -7.0, -7.25, -7.5, -7.75, -8.25, -8.5, -8.75, -9.0)  # of the candidates for a scale in 4 bits
TINY = 2e-36  # 127 times what is below float32's normal numbers, which processors may take for 0
TOKENS = jnp.asarray([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], jnp.int32)


# The numbers ----------------------------------------------------------------------------------------------------------


def numbers_of(values):
    """The whole numbers, column by column, as QuantizedWeight says where they are."""
    if values.dtype == np.int8:
        return values.astype(int)
    numbers = np.zeros((len(values), 2 * values.shape[1]), int)
    for byte in range(values.shape[1]):
        group, place = divmod(byte, 16)
        numbers[:, 32 * group + place] = values[:, byte].astype(int) % 16 - 8
        numbers[:, 32 * group + place + 16] = values[:, byte].astype(int) // 16 - 8
    return numbers


def least_error(groups):
    """The least squared error of groups over the candidates for a scale, with the numbers rounded by numpy."""
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
    errors = []
    for divisor in DIVISORS:
        scale = (largest / divisor).astype(ml_dtypes.bfloat16).astype(np.float64)
        errors.append(((groups - scale * np.clip(np.rint(groups / np.where(scale, scale, 1)), -8, 7)) ** 2).sum(-1))
    return np.min(errors, axis=0)


def check(weight, scheme, to_int8, to_int4, dequantize):
    """Asserts that a weight is quantised as well as it should be, and comes back as it was written."""
    values, scale = (to_int8 if scheme == "int8" else to_int4)(weight)
    back = np.asarray(dequantize(values, scale), np.float64)
    values, scale, w = np.asarray(values), np.asarray(scale), np.asarray(weight.astype(jnp.float32), np.float64)
    numbers, wide = numbers_of(values), scale.astype(np.float64)
    per_column = np.repeat(wide, w.shape[1] // wide.shape[1], axis=1)
    np.testing.assert_allclose(back, numbers * per_column, rtol=1e-6, atol=TINY)
    errors = np.abs(w - numbers * per_column)
    if scheme == "int8":
        assert values.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (len(w), 1)
        assert np.abs(numbers).max() <= 127
        np.testing.assert_allclose(scale[:, 0], np.abs(w).max(1) / 127, rtol=1e-6, atol=TINY)
        assert (errors <= per_column * (0.5 + 1e-4) + TINY).all()
        return
    assert values.dtype == np.uint8 and scale.dtype == ml_dtypes.bfloat16 and scale.shape == (len(w), w.shape[1] // 32)
    groups = w.reshape(len(w), -1, 32)
    largest = np.abs(groups).max(-1)
    assert (errors.reshape(groups.shape).max(-1) <= largest / 4 + TINY).all()
    seen = largest > 1e-35
    found = (errors.reshape(groups.shape) ** 2).sum(-1)[seen]
    assert (found <= least_error(groups)[seen] * (1 + 1e-4)).all()


def weights_of(seed, shape, exponent, dtype):
    """A weight of numbers about 10^exponent with a row of zeros, and one in which a number stands out."""
    rng = np.random.default_rng(seed)
    limit = float(ml_dtypes.finfo(dtype).max)
    w = np.clip(rng.standard_normal(shape) * 10.0**exponent, -limit, limit)
    w[seed % shape[0]] *= rng.choice([0, 1, -1])
    w[0, seed % shape[1]] *= rng.choice([1, 5, -3])
    return jnp.asarray(np.clip(w, -limit, limit).astype(dtype))


@pytest.mark.parametrize("scheme", SCHEMES)
@examples(60)
@given(
    st.integers(0, 2**31), st.sampled_from([1, 3]), st.sampled_from([1, 2, 3]),
    st.integers(-40, 37), st.sampled_from(["float32", "bfloat16", "float16"]),
)  # fmt: skip
def test_the_error_of_a_weight_is_bounded(scheme, seed, rows, groups, exponent, dtype):
    """int8: half a scale. int4: a quarter of the group's largest, and the least square of all candidates."""
    from mpt_eqx.ops.quantized import dequantize
    from mpt_eqx.surgery.quantization import to_int4, to_int8

    columns = 32 * groups + (groups if scheme == "int8" else 0)
    check(weights_of(seed, (rows, columns), exponent, np.dtype(dtype)), scheme, to_int8, to_int4, dequantize)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [0.0, 1e-45, 3e38, -3e38])
def test_rows_of_one_number(scheme, value):
    """Nothing that is finite becomes NaN."""
    from mpt_eqx.ops.quantized import dequantize
    from mpt_eqx.surgery.quantization import quantize_weight

    made = quantize_weight("w", np.full((2, 64), value, np.float32), scheme)
    back = dequantize(made.values, made.scale)
    np.testing.assert_allclose(back, np.full((2, 64), value), rtol=0.004, atol=TINY)


# The scheme that shows it, the function, and what takes the place of what: capital letters stand for anything.
MUTATIONS = {
    "int8: scale": ("int8", "to_int8", "A / 127", "A / 126"),
    "int8: sums": ("int8", "to_int8", "jnp.abs(A)", "A"),
    "int8: cut off": ("int8", "_rounded", "jnp.round(A)", "jnp.trunc(A)"),
    "int4: zeros": ("int4", "_rounded", "jnp.where(A, B, C)", "C"),
    "int4: the largest with its sign": ("int4", "to_int4", "A > -B", "A > B"),
    "int4: the last": ("int4", "better", "jnp.where(A < B, C, D)", "C"),
    "int4: not squared": ("int4", "better", "A**2", "A"),
    "int4: scale rounded too late": ("int4", "to_int4", "jax.lax.reduce_precision(A, 8, 7)", "A"),
    "int4: offset": ("int4", "to_int4", "A + 8", "A + 7"),
    "int4: halves": ("int4", "to_int4", "A[:, :, 0] | (A[:, :, 1] << 4)", "A[:, :, 1] | (A[:, :, 0] << 4)"),
    "int4: neighbours": ("int4", "to_int4", "A.reshape(B, -1, 2, C)", "A.reshape(B, -1, C, 2).swapaxes(2, 3)"),
    "read: offset": ("int4", "dequantize", "A - 8", "A - 7"),
    "read: halves": ("int4", "dequantize", "[A & 15, A >> 4]", "[A >> 4, A & 15]"),
    "read: scale": ("int8", "dequantize", "A[..., None]", "A[:1, :, None]"),
}


def assert_noticed(scheme, *functions):
    with pytest.raises(AssertionError):
        for seed in range(4):
            check(weights_of(seed, (8, 96), 0, np.dtype(np.float32)).at[5].set(0), scheme, *functions)


@pytest.mark.parametrize("name", one_in(3, MUTATIONS))
def test_the_bounds_notice_a_mutation(name):
    from mpt_eqx.ops import quantized
    from mpt_eqx.surgery import quantization

    scheme, function, part, other = MUTATIONS[name]
    read = name.startswith("read")
    made = mutant(quantized if read else quantization, function, part, other)
    writing, reading = (quantization, made) if read else (made, quantized)
    assert_noticed(scheme, writing.to_int8, writing.to_int4, reading.dequantize)


def test_the_bounds_notice_that_there_is_one_candidate_for_a_scale(monkeypatch):
    from mpt_eqx.ops.quantized import dequantize
    from mpt_eqx.surgery import quantization

    monkeypatch.setattr(quantization, "DIVISORS", quantization.DIVISORS[:1])
    quantization.to_int4.clear_cache()
    assert_noticed("int4", quantization.to_int8, quantization.to_int4, dequantize)
    quantization.to_int4.clear_cache()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_large_weight_is_quantised_in_parts(monkeypatch, scheme):
    """Whatever the parts are, and where the weight is: on a device, in memory, or in a file."""
    from mpt_eqx.surgery import quantization

    weight = weights_of(0, (10, 64), 0, np.dtype(ml_dtypes.bfloat16))
    whole = quantization.quantize_weight("w", weight, scheme)
    monkeypatch.setattr(quantization, "NUMBERS", 200)
    assert_same(quantization.quantize_weight("w", np.asarray(weight), scheme), whole)


# The model ------------------------------------------------------------------------------------------------------------


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def whole(model):
    """The model with the weights that its quantised ones stand for."""
    from mpt_eqx.ops.quantized import QuantizedWeight, dequantize

    def is_quantised(node):
        return isinstance(node, QuantizedWeight)

    return jax.tree.map(
        lambda w: dequantize(w.values, w.scale).astype(w.dtype) if is_quantised(w) else w, model, is_leaf=is_quantised
    )


CASES = [
    "f_bias", "f_glu_default_act_bias", "f_unfused_qkv", "f_reuse_kv", "f_torch_dmoe", "f_learned_pos", "f_untied",
    "f_qk_ln",
]  # fmt: skip


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_which_weights_are_quantised(golden, name, embeddings):
    """Matrices of attention, networks and an own output matrix, by the names of the tensors; nothing else changes."""
    from mpt_eqx import quantize
    from mpt_eqx.checkpoint.names import named_leaves

    model = golden(name).model
    before, after = named_leaves(model), named_leaves(quantize(model, "int8", embeddings=embeddings))
    pattern = r"(Wqkv|Wq|Wk|Wv|out_proj|up_proj|down_proj|gate_proj|lm_head)\.weight"
    chosen = {key for key in before if re.search(pattern, key) or (embeddings and key == "transformer.wte.weight")}
    assert len(chosen) >= 4 and ("lm_head.weight" in chosen) == (name == "f_untied")
    assert after.keys() == {f"{key}.{part}" for key in chosen for part in ("values", "scale")} | before.keys() - chosen
    assert all(after[key] is before[key] for key in before.keys() - chosen)


@pytest.mark.parametrize("embeddings", some([False, True], [True]))
@pytest.mark.parametrize("scheme", some(SCHEMES, ["int4"]))
@pytest.mark.parametrize("name", some(CASES, CASES[:1]))
def test_a_quantised_model_computes_what_its_weights_stand_for(golden, name, scheme, embeddings):
    from mpt_eqx import quantize

    model = quantize(golden(name).model, scheme, embeddings=embeddings)
    expected = eqx.filter_jit(whole(model))(TOKENS)
    batch = jnp.stack([TOKENS, TOKENS[::-1]])
    several = jax.jit(lambda m, b: jax.vmap(m)(b))(model, batch)
    for found in (model(TOKENS), jax.jit(lambda m, t: m(t))(model, TOKENS), several[0]):
        # The scale of a row is multiplied before the sum in one, after it in the other: float32's precision of the sum.
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(
    ("scheme", "dtype"), one_in(3, [*itertools.product(SCHEMES, ("float32", "bfloat16", "float16"))])
)
def test_the_type_of_computations_stays(tiny_model, scheme, dtype):
    from mpt_eqx import quantize
    from mpt_eqx.surgery.quantization import quantization_of

    model = jax.tree.map(lambda x: x.astype(dtype), tiny_model)
    made = quantize(model, scheme, embeddings=True)
    assert made(TOKENS).dtype == dtype and made.wte(TOKENS).dtype == dtype and made.config == model.config
    assert quantization_of(made) == (scheme, True) and quantization_of(model) is None
    assert sum(x.nbytes for x in jax.tree.leaves(made)) < sum(x.nbytes for x in jax.tree.leaves(model))
    assert_same(quantize(jax.tree.map(np.asarray, model), scheme, embeddings=True), made)


@pytest.mark.parametrize("scheme", some(SCHEMES, ["int4"]))
def test_the_shipped_model_keeps_what_it_knows(shipped, scheme):
    """Its likelihood of a text changes by less than 2 % in 8 bits, 10 % in 4."""
    from mpt_eqx import SHIPPED_MODEL, quantize
    from mpt_eqx.text import load_tokenizer
    from mpt_eqx.train import next_token_loss

    text = "Return a new list containing all items from the iterable in ascending order, or None."
    tokens = jnp.asarray([[0, *load_tokenizer(SHIPPED_MODEL).encode(text)]])
    loss = eqx.filter_jit(next_token_loss)
    before, after = (float(loss(m, tokens)) for m in (shipped, quantize(shipped, scheme, embeddings=True)))
    assert abs(after / before - 1) < {"int8": 0.02, "int4": 0.1}[scheme]


@pytest.mark.slow
def test_every_way_of_writing_text(tiny_model, prompts):
    """Tokens are those of the model with the weights as a whole."""
    from mpt_eqx import beam_search, generate, prefill, quantize, stream

    model = quantize(tiny_model, "int4", embeddings=True)
    plain = whole(model)
    rows = prompts(5, 9)
    expected = generate(plain, rows, max_new_tokens=12).tokens
    np.testing.assert_array_equal(generate(model, rows, max_new_tokens=12).tokens, expected)
    assert list(stream(model, rows[0], max_new_tokens=12)) == expected[0].tolist()
    np.testing.assert_array_equal(
        beam_search(model, rows, num_beams=3, max_new_tokens=6).tokens,
        beam_search(plain, rows, num_beams=3, max_new_tokens=6).tokens,
    )
    continued = generate(model, [rows[0][3:]], max_new_tokens=12, prefix=prefill(model, rows[0][:3]))
    np.testing.assert_array_equal(continued.tokens[0], expected[0])


def test_gradients_are_those_of_what_is_floating(tiny_model):
    from mpt_eqx import quantize
    from mpt_eqx.train import next_token_loss

    model = quantize(tiny_model, "int8")
    gradient = eqx.filter_jit(eqx.filter_grad(next_token_loss))
    grads = gradient(model, TOKENS[None])
    weight = grads.blocks[0].ffn.up_proj.weight
    assert weight.values is None and weight.scale.shape == (128, 1)
    expected = gradient(whole(model), TOKENS[None]).wte.weight
    np.testing.assert_allclose(grads.wte.weight, expected, atol=1e-5)


def cast(model, dtype):
    """What recipes of mixed precision do."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, model)


FAST_CASTS = [("int4", "float32", "bfloat16")]


@pytest.mark.parametrize(
    ("scheme", "before", "after"),
    [
        pytest.param(*case, marks=() if case in FAST_CASTS else pytest.mark.slow)
        for case in itertools.product(SCHEMES, ("float32", "bfloat16"), ("float32", "bfloat16", "float16"))
    ],
)
def test_a_model_that_is_cast_computes_in_that_type(tiny_model, scheme, before, after):
    """For few positions, which the kernel may compute, and for many; its tokens are those of whole weights."""
    from mpt_eqx import generate, quantize

    made = quantize(cast(tiny_model, before), scheme, embeddings=True)
    expected = whole(made)(TOKENS).astype(jnp.float32)
    other = cast(made, after)
    few, many = jax.jit(lambda m, t: m(t))(other, TOKENS[:8]), jax.jit(lambda m, t: m(t))(other, TOKENS)
    assert few.dtype == many.dtype == other.dtype == after
    atol = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.25}
    atol = max(atol[before], atol[after])
    np.testing.assert_allclose(many.astype(jnp.float32), expected, atol=atol)
    np.testing.assert_allclose(few.astype(jnp.float32), expected[:8], atol=atol)
    assert np.isfinite(generate(other, TOKENS.tolist(), max_new_tokens=3).logprobs).all()


def test_what_is_no_quantised_weight_is_refused(tiny_model):
    """Whole numbers that were cast, and scales of another size: before anything is computed."""
    from mpt_eqx import MPTError, quantize

    for scheme in SCHEMES:
        model = quantize(tiny_model, scheme)
        message = "weight: expected values of int8 or uint8 and a floating scale, found bfloat16 and .*; cast floating"
        with pytest.raises(MPTError, match=message):
            jax.eval_shape(jax.tree.map(lambda x: x.astype(jnp.bfloat16), model), TOKENS)
        for shape in ((96, 2), (95, 1)):
            scale = jnp.ones(shape, jnp.float32 if scheme == "int8" else jnp.bfloat16)
            changed = eqx.tree_at(lambda m: m.blocks[0].attn.Wqkv.weight.scale, model, scale)
            with pytest.raises(MPTError, match=r"weight: expected a scale of shape \(96, 1\) for .*, found "):
                jax.eval_shape(changed, TOKENS)


SHARDED = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mpt_eqx import MPT, MPTConfig, quantize
config = MPTConfig(d_model=128, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=64, no_bias=True)
model = MPT(config, key=jax.random.key(0))
mesh = Mesh(np.array(jax.devices()), ("x",))
def split(model, spec):
    fits = lambda x: x.ndim == 2 and all(axis is None or n % 4 == 0 for n, axis in zip(x.shape, spec))
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec if fits(x) else P())), model)
for scheme, spec in (("int8", P("x")), ("int4", P(None, "x"))):
    made = quantize(model, scheme)
    of_split = quantize(split(model, spec), scheme)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(of_split), jax.tree.leaves(made), strict=True))
print(len(jax.devices()))
"""


@pytest.mark.slow
def test_weights_are_quantised_where_they_are():
    """Rows or columns on four devices."""
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=300,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "4\n", done.stderr


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int5", "fp8", "INT8", ""])
def test_there_are_two_schemes(tiny_model, scheme):
    from mpt_eqx import ConfigError, quantize

    with pytest.raises(ConfigError, match=f"scheme: expected 'int8' or 'int4', found '{scheme}'; not supported"):
        quantize(tiny_model, scheme)


def test_a_model_is_quantised_once(tiny_model):
    from mpt_eqx import MPTError, quantize

    model = quantize(tiny_model, "int4")
    with pytest.raises(
        MPTError, match="expected weights that are not quantised, found int4; quantise the model it was"
    ):
        quantize(model, "int8")


def test_columns_that_are_no_groups(tiny_config):
    from mpt_eqx import MPT, MPTError, quantize

    model = MPT(tiny_config(d_model=36), key=jax.random.key(0))
    message = (
        r"^blocks.0.attn.Wqkv.weight: expected a multiple of 32 columns for int4, found 108 by 36; int8 takes any$"
    )
    with pytest.raises(MPTError, match=message):
        quantize(model, "int4")
    quantize(model, "int8")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_that_are_not_finite(tiny_model, scheme, value):
    from mpt_eqx import MPTError, quantize

    broken = eqx.tree_at(
        lambda m: m.blocks[1].ffn.up_proj.weight, tiny_model, replace_fn=lambda w: w.at[3, 7].set(value)
    )
    with pytest.raises(MPTError, match=r"blocks.1.ffn.up_proj.weight: expected finite numbers, found NaN or infinity"):
        quantize(broken, scheme)


def test_a_part_of_a_model(tiny_model, tmp_path):
    """It runs, but config.json has no words for it."""
    from mpt_eqx import MPTError, quantize, save_pretrained

    for scheme in SCHEMES:
        part = eqx.tree_at(lambda m: m.blocks[0], quantize(tiny_model, scheme), tiny_model.blocks[0])
        assert part(TOKENS).shape == (12, 61)
        with pytest.raises(
            MPTError, match=f"expected all of its matrices quantised alike, or none, found 4 in {scheme};"
        ):
            save_pretrained(part, tmp_path)
    mixed = eqx.tree_at(lambda m: m.blocks[0], part, quantize(tiny_model, "int8").blocks[0])
    with pytest.raises(MPTError, match="found 8 in int4 and int8; make it with mpt_eqx.quantize"):
        save_pretrained(mixed, tmp_path)
    assert not list(tmp_path.iterdir())


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=some(SCHEMES, ["int4"]))
def saved(request, tiny_model, tmp_path):
    """A model and its directory."""
    from mpt_eqx import quantize, save_pretrained

    model = quantize(tiny_model, request.param)
    save_pretrained(model, tmp_path)
    return types.SimpleNamespace(model=model, directory=tmp_path, scheme=request.param)


def rewrite(directory, tensors=lambda held: held, **keys):
    """Changes the tensors and the keys of config.json."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | keys))
    save_file(tensors(load_file(directory / "model.safetensors")), directory / "model.safetensors")


@pytest.mark.parametrize("size", some(["5GB", "20KB", 1000], ["20KB"]))
@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_and_loaded(tiny_model, tmp_path, scheme, dtype, embeddings, mmap, size):
    from mpt_eqx import checkpoint_info, from_pretrained, quantize, save_pretrained

    model = quantize(jax.tree.map(lambda x: x.astype(dtype), tiny_model), scheme, embeddings=embeddings)
    save_pretrained(model, tmp_path, max_shard_size=size)
    assert_same(from_pretrained(tmp_path, mmap=mmap), model)
    info = checkpoint_info(tmp_path)
    assert info.problems == () and info.quantization == (scheme, embeddings)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    # A quant_method that it does not know, transformers would skip, and draw the weights at random.
    assert config["quantization_config"] == {"method": "mpt_eqx", "scheme": scheme, "embeddings": embeddings}


@pytest.mark.parametrize("name", some([*CASES, "f_bf16", "hf_fp16"], [*CASES[::2], "hf_fp16"]))
@pytest.mark.parametrize("scheme", some(SCHEMES, ["int4"]))
def test_every_kind_of_model_comes_back(golden, tmp_path, name, scheme):
    from mpt_eqx import from_pretrained, quantize, save_pretrained

    model = quantize(golden(name).model, scheme)
    save_pretrained(model, tmp_path)
    assert_same(from_pretrained(tmp_path), model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_names_of_transformer_engine(tiny_config, tmp_path, scheme):
    from mpt_eqx import MPT, FFNConfig, from_pretrained, quantize, save_pretrained

    model = quantize(MPT(tiny_config(ffn_config=FFNConfig(ffn_type="te_ln_mlp")), key=jax.random.key(0)), scheme)
    save_pretrained(model, tmp_path)
    assert "transformer.blocks.0.ffn.fc1_weight.scale" in load_file(tmp_path / "model.safetensors")
    assert_same(from_pretrained(tmp_path), model)


def test_what_is_loaded_writes_the_same(saved, prompts):
    from mpt_eqx import from_pretrained, generate

    rows = prompts(4, 11)
    again = generate(from_pretrained(saved.directory), rows, max_new_tokens=16).tokens
    np.testing.assert_array_equal(again, generate(saved.model, rows, max_new_tokens=16).tokens)


def test_the_file_is_used_where_it_is(saved):
    """Values and scales that lie at multiples of 64 are not copied; all of this model's do."""
    from mpt_eqx import checkpoint_info, from_pretrained

    model = from_pretrained(saved.directory)
    views = {tensor.name: tensor.read() for tensor in checkpoint_info(saved.directory).tensors}
    assert all(view.ctypes.data % 64 == 0 for view in views.values())
    weight, name = model.blocks[0].ffn.up_proj.weight, "transformer.blocks.0.ffn.up_proj.weight"
    mapped = Path("/proc/self/maps").read_text().splitlines()
    for array in (weight.values, weight.scale):
        address = array.unsafe_buffer_pointer()
        (line,) = [
            line for line in mapped if int(line.split("-")[0], 16) <= address < int(re.split("[- ]", line)[1], 16)
        ]
        assert line.endswith("model.safetensors"), name


def test_dtype_is_that_of_the_rest(saved):
    """Quantised weights stay as they are to the bit; what is not quantised is converted."""
    from mpt_eqx import CheckpointError, from_pretrained

    model = from_pretrained(saved.directory, dtype="bfloat16")
    weight, before = model.blocks[1].attn.Wqkv.weight, saved.model.blocks[1].attn.Wqkv.weight
    np.testing.assert_array_equal(weight.values, before.values)
    np.testing.assert_array_equal(weight.scale, before.scale)
    assert weight.scale.dtype == before.scale.dtype and weight.dtype == model.wte.weight.dtype == jnp.bfloat16
    assert model(TOKENS).dtype == jnp.bfloat16
    with pytest.raises(
        CheckpointError, match="dtype: expected float64 or float32 or float16 or bfloat16, found 'int8'"
    ):
        from_pretrained(saved.directory, dtype="int8")


SCALE, VALUES = (f"transformer.blocks.0.ffn.up_proj.weight.{part}" for part in ("scale", "values"))
OTHER_TYPES = {"int8": {VALUES: np.uint8, SCALE: np.float16}, "int4": {VALUES: np.int8, SCALE: np.float32}}


def test_arrays_that_do_not_fit(saved):
    """Missing, misshaped or of another type: an error before anything is read."""
    from mpt_eqx import CheckpointError, from_pretrained

    held = load_file(saved.directory / "model.safetensors")
    shape = {name: re.escape(str(list(held[name].shape))) for name in (SCALE, VALUES)}
    for change, message in (
        (lambda h: {k: v for k, v in h.items() if k != SCALE}, rf"1 missing: {SCALE} {shape[SCALE]}"),
        (lambda h: h | {f"{SCALE}.x": h[SCALE]}, f"1 unexpected: {SCALE}.x"),
        (lambda h: h | {SCALE: h[SCALE][:5]}, rf"1 misshaped: {SCALE} \(expected {shape[SCALE]}, found \[5, "),
        (lambda h: h | {SCALE: h[SCALE].reshape(-1)}, rf"1 misshaped: {SCALE} \(expected {shape[SCALE]}, found \["),
        (
            lambda h: h | {VALUES: h[VALUES][:, :7]},
            rf"1 misshaped: {VALUES} \(expected {shape[VALUES]}, found \[128, 7",
        ),
    ):
        rewrite(saved.directory, lambda _, change=change: change(held))
        with pytest.raises(CheckpointError, match=f"config.json and the tensors disagree: .*{message}"):
            from_pretrained(saved.directory)
    for name, dtype in OTHER_TYPES[saved.scheme].items():
        rewrite(saved.directory, lambda _, name=name, dtype=dtype: held | {name: held[name].astype(dtype)})
        message = (
            rf"1 quantised to another type: {name} \(expected {held[name].dtype}, found {np.dtype(dtype)} in model"
        )
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(saved.directory)
    norm = "transformer.norm_f.weight"
    rewrite(saved.directory, lambda _: held | {norm: held[norm].astype(np.int8)})
    with pytest.raises(
        CheckpointError, match=rf"1 of another type than float64, .*: {norm} \(int8, model.safetensors\)"
    ):
        from_pretrained(saved.directory)


def test_a_scale_that_is_not_finite(saved):
    from mpt_eqx import CheckpointError, from_pretrained

    rewrite(saved.directory, lambda held: held | {SCALE: np.full_like(held[SCALE], np.nan)})
    with pytest.raises(CheckpointError, match=f"{SCALE} holds NaN or infinity"):
        from_pretrained(saved.directory, check_finite=True)


def test_config_and_tensors_disagree(saved, tiny_model):
    from mpt_eqx import CheckpointError, from_pretrained, save_pretrained

    with pytest.raises(
        CheckpointError, match="config.json has no quantization_config, the tensors hold 16 of quantised"
    ):
        from_pretrained(saved.directory, config_overrides={"quantization_config": None})
    with pytest.raises(
        CheckpointError, match="2 missing: transformer.wte.weight.values .*1 unexpected: transformer.wte"
    ):
        from_pretrained(saved.directory, config_overrides={"quantization_config": {"embeddings": True}})
    save_pretrained(tiny_model, saved.directory)
    config = json.loads((saved.directory / "config.json").read_text())
    assert "quantization_config" not in config
    rewrite(saved.directory, quantization_config={"method": "mpt_eqx", "scheme": saved.scheme, "embeddings": False})
    with pytest.raises(
        CheckpointError, match="config.json has a quantization_config, the tensors hold none of quantised"
    ):
        from_pretrained(saved.directory)


def test_a_head_in_the_file_of_a_tied_model_with_quantised_embedding(tiny_model, tmp_path):
    from mpt_eqx import CheckpointError, from_pretrained, quantize, save_pretrained

    save_pretrained(quantize(tiny_model, "int8", embeddings=True), tmp_path)
    rewrite(tmp_path, lambda held: held | {"lm_head.weight": np.asarray(tiny_model.wte.weight)})
    with pytest.raises(CheckpointError, match="1 unexpected: lm_head.weight"):
        from_pretrained(tmp_path)


def test_a_configuration_that_int4_does_not_fit(tiny_config, tmp_path):
    from mpt_eqx import MPT, ConfigError, from_pretrained, quantize, save_pretrained

    save_pretrained(quantize(MPT(tiny_config(d_model=36), key=jax.random.key(0)), "int8"), tmp_path)
    message = "config.json: blocks.0.attn.Wqkv.weight: expected a multiple of 32 columns for int4, found 108 by 36"
    with pytest.raises(ConfigError, match=message):
        from_pretrained(tmp_path, config_overrides={"quantization_config": {"scheme": "int4"}})


OURS = {"method": "mpt_eqx", "scheme": "int8", "embeddings": False}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "or method 'mpt_eqx', found 'gptq'; take the checkpoint that"),
        ({"quant_method": "awq"}, "found 'awq'; take"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "found 'bitsandbytes'; take"),
        ({"quant_method": "mpt_eqx", **OURS}, "found 'mpt_eqx'; take"),
        ({}, "found None; take"),
        ({"bits": 4}, "found None; take"),
        (OURS | {"scheme": "int3"}, "quantization_config.scheme: expected 'int8' or 'int4', found 'int3'; not"),
        (OURS | {"scheme": ["int8"]}, "quantization_config.scheme: expected 'int8' or 'int4', found "),
        (OURS | {"embeddings": 1}, "quantization_config.embeddings: expected true or false, found 1"),
        ({"method": "mpt_eqx"}, "expected null or an object of method, scheme and embeddings, found {'method'"),
        (OURS | {"group": 7}, "expected null or an object of method, scheme and embeddings, found "),
        ("int8", "expected null or an object of method, scheme and embeddings, found 'int8'"),
    ],
    ids=[
        *("gptq", "awq", "bitsandbytes", "quant_method of ours", "empty", "no method", "scheme", "list", "embeddings"),
        *("keys missing", "key unknown", "text"),
    ],
)  # fmt: skip
def test_other_ways_to_quantise_are_refused_by_name(content, message, tmp_path):
    from mpt_eqx import ConfigError, MPTConfig, from_pretrained

    config = json.loads((GOLDEN / "hf_default" / "config.json").read_text())
    with pytest.raises(ConfigError, match=f"^(?=quantization_config).*{re.escape(message)}"):
        MPTConfig.from_dict(config | {"quantization_config": content})
    with pytest.raises(ConfigError, match=re.escape(message)):
        from_pretrained(GOLDEN / "hf_default", config_overrides={"quantization_config": content})


def test_no_quantisation_is_none():
    from mpt_eqx import from_pretrained

    model = from_pretrained(GOLDEN / "hf_default", config_overrides={"quantization_config": None})
    assert isinstance(model.blocks[0].ffn.up_proj.weight, jax.Array)


@pytest.mark.parametrize("embeddings", some([False, True], [True]))
@pytest.mark.parametrize("scheme", some(SCHEMES, ["int4"]))
def test_convert_writes_what_quantize_makes(one_layer, tmp_path, scheme, embeddings):
    from mpt_eqx import SHIPPED_MODEL, from_pretrained, quantize
    from mpt_eqx.checkpoint import convert

    source = SHIPPED_MODEL if is_long() else one_layer
    for dtype in (None, "float32"):
        convert(source, tmp_path / "m", quantize=scheme, embeddings=embeddings, dtype=dtype, max_shard_size="1MB")
        made = quantize(from_pretrained(source, dtype=dtype), scheme, embeddings=embeddings)
        assert_same(from_pretrained(tmp_path / "m"), made)
    convert(tmp_path / "m", tmp_path / "again", dtype="bfloat16")
    assert_same(from_pretrained(tmp_path / "again"), from_pretrained(tmp_path / "m", dtype="bfloat16"))


def test_what_convert_refuses(saved, tiny_config, tmp_path):
    from mpt_eqx import MPT, CheckpointError, ConfigError, MPTError, save_pretrained
    from mpt_eqx.checkpoint import convert

    with pytest.raises(
        CheckpointError, match=f"expected weights that are not quantised, found {saved.scheme}; convert"
    ):
        convert(saved.directory, tmp_path / "n", quantize="int8")
    with pytest.raises(ConfigError, match="embeddings: expected quantize='int8' or 'int4' with it, found none"):
        convert(saved.directory, tmp_path / "n", embeddings=True)
    with pytest.raises(ConfigError, match="scheme: expected 'int8' or 'int4', found 'q4'"):
        convert(saved.directory, tmp_path / "n", quantize="q4")
    save_pretrained(MPT(tiny_config(d_model=36), key=jax.random.key(0)), tmp_path / "odd")
    with pytest.raises(MPTError, match=r"Wqkv.weight: expected a multiple of 32 columns for int4"):
        convert(tmp_path / "odd", tmp_path / "n", quantize="int4")
    assert not (tmp_path / "n").exists()


def test_on_the_command_line(one_layer, tmp_path, capsys):
    from mpt_eqx.cli import main

    assert main(["convert", str(one_layer), str(tmp_path / "m"), "--quantize", "int4", "--embeddings"]) == 0
    assert main(["inspect", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^quantised   int4 weights, embedding included$", out, re.MULTILINE)
    assert re.search(r"^types       bfloat16, uint8$", out, re.MULTILINE)
    assert re.search(r"transformer.wte.weight.values +uint8 +\[4096, 96\]$", out, re.MULTILINE)
    assert main(["convert", str(one_layer), str(tmp_path / "n"), "--quantize", "int8"]) == 0
    assert main(["inspect", str(tmp_path / "n")]) == 0
    assert re.search(r"^quantised   int8 weights, embedding not quantised$", capsys.readouterr().out, re.MULTILINE)
    assert main(["generate", "The", "--model", str(tmp_path / "m"), "--max-new-tokens", "3"]) == 0
    assert main(["convert", str(one_layer), str(tmp_path / "x"), "--quantize", "int7"]) == 1


def test_the_pages_figures_of_quality_are_the_committed_ones():
    root = Path(__file__).parent.parent
    found = json.loads((root / "benchmarks" / "results" / "quality.json").read_text())
    for page in (root / "docs" / "quantization.md", root / "benchmarks" / "results" / "quality.md"):
        text = page.read_text()
        assert f"on {found['tokens']:,} tokens" in text
        for row in found["weights"]:
            assert f"| {' | '.join(map(str, row.values()))} |" in text
    kl = {row["weights"]: row["KL"] for row in found["weights"]}
    assert kl["int8"] < 0.001 and kl["int4"] < 0.05
