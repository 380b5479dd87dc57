"""The package as a whole: what it imports, its house rules, and the model that ships with it."""

import ast
import re
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import pytest
from command import python

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mpt_eqx"
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = (
    "torch", "transformers", "flax", "tokenizers", "fastapi", "matplotlib", "llama_cpp", "mpt_eqx.cli",
    "jax.experimental.pallas.triton",
)  # fmt: skip


def test_importing_brings_nothing_heavy_and_starts_nothing():
    out = python(
        "import gc, os, sys; before = dict(os.environ); import mpt_eqx\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], dict(os.environ) == before, gc.isenabled())\n"
        "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    )
    assert out.split("\n")[:2] == ["[] True True", "False"]


def test_generating_brings_no_torch(one_layer):
    out = python(
        "import sys; from mpt_eqx.cli import main\n"
        f"main(['generate', 'The', '--model', {str(one_layer)!r}, '--max-new-tokens', '4'])\n"
        "print([m for m in ('torch', 'transformers', 'flax') if m in sys.modules])"
    )
    assert out.endswith("\n[]\n")


BORDER = (
    "generate.py",
    "decode.py",
    "run.py",
    "prefix.py",
    "beam.py",
    "score.py",
    "perplexity.py",
    "optimizers.py",
    "packing.py",
    "step.py",
    "state.py",
    "adapters.py",
    "sampler.py",
    "documents.py",
    "export.py",
    "requests.py",
)  # they check their arguments themselves


def test_shapes_are_checked_in_the_tests():
    """Every module that annotates shapes is checked here, but for the border with messages of its own."""
    import jaxtyping
    from conftest import CHECKED

    from mpt_eqx.ops.attention import alibi_bias

    with pytest.raises(jaxtyping.TypeCheckError):
        alibi_bias(jnp.ones((2, 2)), jnp.arange(3), jnp.arange(3))
    with pytest.raises(jaxtyping.TypeCheckError):
        alibi_bias(jnp.ones(2), jnp.ones(3), jnp.arange(3))
    rooms = tuple(str(PACKAGE.joinpath(*room.split("."))) for room in CHECKED)
    for path in MODULES:
        if re.search(r"(Float|Float32|Int|Bool)\[", path.read_text()) and path.name not in BORDER:
            assert str(path).startswith(rooms), path


def test_shapes_are_not_checked_for_users_but_arguments_are():
    """In a process without the checks of these tests."""
    out = python(
        "import jax, jax.numpy as jnp; from mpt_eqx import MPT, MPTConfig, MPTError\n"
        "from mpt_eqx.ops.attention import alibi_bias\n"
        "print(alibi_bias(jnp.ones(2), jnp.ones(3), jnp.arange(3)).shape)\n"
        "config = MPTConfig(d_model=8, n_heads=1, n_layers=1, vocab_size=8, max_seq_len=8)\n"
        "model = jax.jit(lambda: MPT(config, key=jax.random.key(0)))()\n"
        "try: model(jnp.arange(4), mask=jnp.ones(3, bool))\n"
        "except MPTError as error: print(error)"
    )
    assert out == "(2, 3, 3)\nmask: expected the shape of tokens, (4,), found (3,)\n"


ORDER = (
    *(
        "errors",
        "config",
        "ops",
        "model",
        "interp",
        "sharding",
        "surgery",
        "checkpoint",
        "lora",
        "generation",
        "evaluation",
        "text",
        "train",
        "lm_eval",
        "serve",
        "cli",
    ),
)
APART = {("train", "generation"), ("text", "generation")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_house_rules(path):
    """Files that can be read, no stringified annotations (they hide shapes), no torch, imports that point one way."""
    tree, room = ast.parse(path.read_text()), path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert ast.get_docstring(tree) and len(path.read_text().splitlines()) <= 400
    for node in ast.walk(tree):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            assert module.split(".")[0] not in ("__future__", "torch", "transformers", "flax", "llama_cpp")
            if module.startswith("mpt_eqx.") and room in ORDER:
                imported = module.split(".")[1]
                assert ORDER.index(imported) <= ORDER.index(room) and (room, imported) not in APART


def test_the_model_is_short_and_knows_no_platform():
    sources = {path.stem: path.read_text() for path in (PACKAGE / "model").glob("*.py")}
    plain = ("mpt", "block", "attention", "ffn", "norms", "linear", "alibi", "kv_cache")
    assert sum(len(sources[name].splitlines()) for name in plain) <= 900
    for source in sources.values():
        assert not re.search(r"backend|platform|barrier|cuda|\bcpu\b|\bgpu\b|custom_(jvp|vjp|vmap)", source)


def test_the_measuring_command_is_small():
    """Comparisons with other programs stand in benchmarks/speed."""
    assert sum(len((PACKAGE / "cli" / name).read_text().splitlines()) for name in ("bench.py", "_measure.py")) <= 300


FORWARD = [path for path in MODULES if path.parent.name == "model" and path.name != "init.py"]


@pytest.mark.parametrize("path", FORWARD, ids=lambda path: path.name)
def test_no_string_is_compared_in_a_forward_pass(path):
    """What a configuration asks for is chosen when a model is built: in __init__ and in make_… functions."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and not function.name.startswith(("__init__", "make_")):
            for compare in (node for node in ast.walk(function) if isinstance(node, ast.Compare)):
                for side in ast.walk(compare):
                    assert not (isinstance(side, ast.Constant) and isinstance(side.value, str)), function.name


def test_the_shipped_model(shipped):
    from mpt_eqx import SHIPPED_MODEL

    assert {leaf.dtype.name for leaf in (shipped.wte.weight, shipped.norm_f.weight)} == {"bfloat16"}
    assert 2e6 <= shipped.config.num_parameters() <= 5e6
    assert sum(path.stat().st_size for path in SHIPPED_MODEL.iterdir()) <= 8_000_000
    names = {path.name for path in SHIPPED_MODEL.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= names


def test_the_shipped_adapter(shipped):
    from mpt_eqx import SHIPPED_ADAPTER, lora

    assert sum(path.stat().st_size for path in SHIPPED_ADAPTER.iterdir()) <= 500_000
    assert lora.load(shipped, SHIPPED_ADAPTER).blocks[0].ffn.down_proj.rank == 12


def test_the_shipped_model_has_learned_to_write_documentation(shipped):
    """Its loss on text nobody trained on is far below what gzip needs (1.99 nats per byte on such documents)."""
    from mpt_eqx import SHIPPED_MODEL
    from mpt_eqx.text import load_tokenizer
    from mpt_eqx.train import next_token_loss

    text = (
        "Return a new list containing all items from the iterable in ascending order. If the optional argument is "
        "given, it must be a function of one argument that is called for each element; the default value is None."
    )
    tokens = [0, *load_tokenizer(SHIPPED_MODEL).encode(text)]
    nats = float(eqx.filter_jit(next_token_loss)(shipped, jnp.asarray([tokens]))) * (len(tokens) - 1)
    assert nats / len(text.encode()) < 0.9
