"""How tests compile: as users do where they are about compiled code, with plainer machine code elsewhere."""

import jax
import jax.numpy as jnp
import pytest
from conftest import AS_USERS, sort
from jax._src import compiler


@pytest.mark.optimized
def test_what_is_about_compiled_code_is_compiled_as_users_compile(pytestconfig, monkeypatch):
    """JAX asks the function that conftest replaces, once for each program, and gets the options of users."""
    if not pytestconfig.option.quick:
        pytest.skip("all are compiled as users compile")
    found, options = [], compiler.get_compile_options
    monkeypatch.setattr(compiler, "get_compile_options", lambda *a, **k: found.append(options(*a, **k)) or found[-1])
    for optimized in (True, False):
        monkeypatch.setattr(sort, "optimized", optimized)
        jax.jit(lambda x: jnp.cumsum(x)).lower(jax.ShapeDtypeStruct((3,), jnp.float32)).compile()
    with_them, without = (dict(each.env_option_overrides) for each in found)
    assert with_them == AS_USERS and without == {}
