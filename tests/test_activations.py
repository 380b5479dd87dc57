"""Activations: values and gradients as torch computes them, and their place in config.json."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, some
from safetensors import safe_open

CASES = json.loads((GOLDEN / "activations" / "case.json").read_text())["cases"]
# Relative, absolute of values, absolute of gradients. In float32: rounding of a few steps. In 16 bits torch rounds
# values once, as here, but takes some gradients from values that it has rounded before.
TOLERANCE = {"float32": (2e-6, 1e-6, 3e-6), "bfloat16": (2**-7, 1e-3, 2**-7), "float16": (2**-10, 1e-4, 2**-10)}


def config_with(act):
    from mpt_eqx import MPTConfig

    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 97, "attn_config": {"alibi": True}}
    return MPTConfig.from_dict({**sizes, "ffn_config": {"ffn_act_fn": act}})


@functools.cache
def computed(dtype):
    """Returns of each case its value and gradient: one program, because compiling takes the time."""
    from mpt_eqx.model.activations import make_activation

    def value_and_gradient(act, x):
        return act(x), jax.grad(lambda x: act(x).astype(jnp.float32).sum())(x)

    acts = {case: make_activation(config_with(act)) for case, act in CASES.items()}
    with safe_open(GOLDEN / "activations" / "expected.safetensors", "np") as f:
        x = jnp.asarray(f.get_tensor(f"{dtype}.x"))
    return x.dtype, jax.jit(lambda x: {case: value_and_gradient(act, x) for case, act in acts.items()})(x)


@pytest.fixture(scope="module")
def recorded():
    with safe_open(GOLDEN / "activations" / "expected.safetensors", "np") as f:
        return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", some(TOLERANCE, ["float32", "bfloat16"]))
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_torch(recorded, case, dtype):
    of_x, found = computed(dtype)
    value, grad = found[case]
    assert value.dtype == grad.dtype == of_x
    rtol, *atols = TOLERANCE[dtype]
    for found, name, atol in zip((value, grad), ("value", "grad"), atols, strict=True):
        wanted = recorded[f"{dtype}.{case}.{name}"].astype(np.float32)
        np.testing.assert_allclose(found.astype(np.float32), wanted, rtol=rtol, atol=atol, err_msg=name)


def test_every_activation_is_recorded():
    from mpt_eqx.config.parts import ACTIVATIONS

    assert {act["name"] for act in CASES.values()} == set(ACTIVATIONS)


@pytest.mark.parametrize("case", CASES)
def test_an_activation_is_written_with_all_its_arguments_and_no_others(case):
    """As the recording script passed them to torch, and as llm-foundry does."""
    from mpt_eqx import MPTConfig

    config = config_with(CASES[case])
    written = json.loads(json.dumps(config.to_dict()))
    assert written["ffn_config"]["ffn_act_fn"] == CASES[case]
    assert MPTConfig.from_dict(written) == config


@pytest.mark.parametrize("name", [case for case, act in CASES.items() if case == act["name"]])
def test_arguments_that_are_left_out_are_those_of_torch(name):
    assert config_with({"name": name}) == config_with(CASES[name])


def test_inplace_is_taken_where_torch_has_it_and_changes_nothing():
    from mpt_eqx import ConfigError

    assert config_with({"name": "elu", "inplace": True}) == config_with({"name": "elu"})
    with pytest.raises(ConfigError, match="ffn_act_fn.inplace: expected no such key with 'gelu', which takes approxim"):
        config_with({"name": "gelu", "inplace": True})


ACT = "ffn_config.ffn_act_fn"


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ({"name": "hardshrink", "lambd": 0.5}, f"{ACT}.name: expected 'gelu' or 'quick_gelu' or 'relu' or"),
        ({"name": "softmax"}, "or 'hardtanh' or 'hardsigmoid' or 'hardswish', found 'softmax'; not supported"),
        ({"name": None}, f"{ACT}.name: expected 'gelu' or"),
        ({"name": "relu", "approximate": "none"}, f"{ACT}.approximate: expected no such key with 'relu', which takes"),
        ({"name": "celu", "beta": 2.0}, f"{ACT}.beta: expected no such key with 'celu', which takes alpha"),
        ({"name": "silu", "magic": 1}, f"{ACT}.magic: expected no such key with 'silu', which takes no arguments"),
        ({"name": "celu", "alpha": 0}, f"{ACT}.alpha: expected a finite number but 0, found 0"),
        ({"name": "softplus", "beta": 0}, f"{ACT}.beta: expected a finite number but 0, found 0"),
        ({"name": "softplus", "threshold": "x"}, f"{ACT}.threshold: expected a finite number, found 'x'"),
        ({"name": "hardtanh", "min_val": 2.0}, f"{ACT}.min_val: expected at most max_val=1.0, found 2.0"),
        ({"name": "hardtanh", "max_val": None}, f"{ACT}.max_val: expected a finite number, found None"),
        ({"name": "elu", "alpha": float("inf")}, f"{ACT}.alpha: expected a finite number, found inf"),
    ],
)  # fmt: skip
def test_what_is_no_activation_is_refused_by_name(act, message):
    import re

    from mpt_eqx import ConfigError

    with pytest.raises(ConfigError, match=re.escape(message)):
        config_with(act)


def test_an_argument_of_another_activation_is_refused_in_python_too():
    from mpt_eqx import ActFnConfig, ConfigError

    with pytest.raises(ConfigError, match=f"^{ACT}.alpha: expected no such key with 'relu'$"):
        ActFnConfig(name="relu", alpha=0.5)


def test_another_activation_replaces_the_arguments_too():
    """So config_overrides can name one for a checkpoint whose file has arguments; the same name keeps the others."""
    from mpt_eqx.config.dialects import override

    d = {"ffn_config": {"ffn_act_fn": {"name": "hardtanh", "min_val": -2.0, "max_val": 2.0}}}
    assert override(d, {"ffn_config": {"ffn_act_fn": {"name": "relu"}}}) == {
        "ffn_config": {"ffn_act_fn": {"name": "relu"}}
    }
    changed = override(d, {"ffn_config": {"ffn_act_fn": {"max_val": 3.0}}})
    assert changed["ffn_config"]["ffn_act_fn"] == {"name": "hardtanh", "min_val": -2.0, "max_val": 3.0}


def test_equal_activations_do_not_compile_a_model_again():
    """They are static fields of a model: equal and of the same hash if of the same name and arguments."""
    from mpt_eqx.model.activations import make_activation

    one, same, other = (make_activation(config_with({"name": "elu", "alpha": alpha})) for alpha in (0.5, 0.5, 0.6))
    assert one == same != other and hash(one) == hash(same)
