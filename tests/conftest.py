"""What every test shares. The package is imported inside fixtures only: the type checks are hooked in before that."""

import dataclasses
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import equinox as eqx
import jax
import numpy as np
import pytest
from hypothesis import settings
from jax._src import compilation_cache, compiler
from jax._src.interpreters import mlir
from jaxtyping import install_import_hook
from lowering import collect_rarely, contexts

# Shapes are checked wherever they are annotated, but for the public border (config, generate, command line), which
# checks its arguments itself and has its own messages for them tested.
CHECKED = (
    "ops",
    "sharding",
    "model",
    "interp.edits",
    "checkpoint",
    "surgery",
    "generation.layers",
    "generation.steps",
    "generation.prompts",
    "generation.state",
    "generation.sampling",
    "generation.beam_step",
    "evaluation.chunks",
    "lora.linear",
    "train.cross_entropy",
    "train.loss",
    "train.schedules",
    "serve.slots",
    "serve.lane",
    "serve.prefixes",
    "serve.constraints",
)
install_import_hook([f"mpt_eqx.{room}" for room in CHECKED], "annotations.check")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

settings.register_profile("long")  # of `just test-all`


def is_long() -> bool:
    return settings.get_current_profile_name() == "long"


def examples(count: int, *, least: int = 3) -> settings:
    """So many random examples in `just test-all`; in `just test` a tenth of them, but `least` at least."""
    return settings(max_examples=count if is_long() else max(count // 10, least), deadline=None)


GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent


# With these flags of XLA the passes over a program are the same, and its machine code is plainer and made in one piece:
# most tests take the time to compile, which becomes a fifth. JAX 0.11 has another way to compile fusions, and not the
# last flag.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1" + (
    " --xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
)
# What undoes them for one program.
AS_USERS = {"xla_backend_optimization_level": 3, "xla_cpu_parallel_codegen_split_count": 32} | (
    {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}
)
# How the test that runs has its programs: as users compile them, if it is about compiled code; without the kernel.
sort = SimpleNamespace(optimized=False, way="kernel")


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="compile quickly, but for the tests of compiled code")


def pytest_sessionstart():
    collect_rarely()


def pytest_configure(config):
    if config.option.quick:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
        options = compiler.get_compile_options

        def get_compile_options(*args, env_options_overrides=None, **kwargs):
            overrides = {**(env_options_overrides or {}), **(AS_USERS if sort.optimized else {})}
            return options(*args, env_options_overrides=overrides, **kwargs)

        compiler.get_compile_options = get_compile_options


def sort_of(item) -> SimpleNamespace:
    optimized = item.config.option.quick and item.get_closest_marker("optimized") is not None
    without = hasattr(item, "callspec") and item.callspec.params.get("way") == "XLA"
    return SimpleNamespace(optimized=optimized, way="XLA" if without else "kernel")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture is made: what was compiled for tests of another sort is not for this one."""
    now = sort_of(item)
    if sort != now:
        jax.clear_caches()
        vars(sort).update(vars(now))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Keeps the names of all tests that were collected, before any are deselected: pages name them.

    Those of one sort run one after the other: between two sorts all that was compiled is dropped.
    """
    config.collected_names = {item.name for item in items}
    order = {(True, "kernel"): 0, (True, "XLA"): 1, (False, "XLA"): 2, (False, "kernel"): 3}
    items.sort(key=lambda item: order[sort_of(item).optimized, sort_of(item).way])


# One of each way to know positions, to share keys, and of networks.
KINDS = (
    *("f_mha_alibi", "f_rope_dynamic", "f_learned_pos", "f_gqa_kv2", "f_reuse_kv", "f_reuse_kv_x", "f_temp_tuning"),
    *("f_overrides_sw_nope", "f_sliding_window_rope", "f_torch_dmoe", "f_final_softcap_scale", "f_attn_softcap"),
    *("f_embedding_fraction", "f_pad_token_id", "f_glu_silu", "f_qk_ln", "f_sequence_id", "hf_untied", "hf_maxlen"),
)


def some(names, kept=KINDS):
    """Parameters of a test, of which those that are not `kept` are long proofs."""
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]


def one_in(count, params):
    """Parameters of a test, of which all but the first of each `count` are long proofs."""
    return [
        param
        if i % count == 0
        else pytest.param(*(param if isinstance(param, tuple) else (param,)), marks=pytest.mark.slow)
        for i, param in enumerate(params)
    ]


@contextmanager
def asked_by_line(script: str, **environment: str):
    """Runs one of the helper scripts and yields a function that gives it a line and returns the line it answers."""
    command = [sys.executable, "-W", "ignore", Path(__file__).parent / script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(command, env={**os.environ, **environment}, **pipes) as process:

        def ask(line: str) -> str:
            process.stdin.write(f"{line}\n")
            return process.stdout.readline()

        yield ask
        process.stdin.close()


class Killed(BaseException):
    """Ends a save in this process as a kill would: nothing can be written or removed afterwards."""


@contextmanager
def failing(moment, error):
    """Makes one write, sync, move, removal or new name fail, the n-th of a save; of `Killed` all after it, too."""
    from mpt_eqx.checkpoint import atomic
    from mpt_eqx.checkpoint.formats import safetensors

    count = 0

    def counting(original):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == moment or (error is Killed and moment is not None and count > moment):
                raise error
            return original(*args, **kwargs)

        return call

    class File(io.FileIO):
        write = counting(io.FileIO.write)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "fsync", "unlink", "mkdir", "rmdir"):
            patch.setattr(os, name, counting(getattr(os, name)))
        patch.setattr(Path, "touch", counting(Path.touch))
        for module in (atomic, safetensors):
            patch.setattr(module, "open", lambda path, mode: File(path, mode.replace("b", "")), raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def compiled_once(tmp_path_factory):
    """What one test has compiled is found by the next, in this process and the one beside it: most time goes there."""
    room = tmp_path_factory.getbasetemp()
    room = room.parent if "PYTEST_XDIST_WORKER" in os.environ else room
    jax.config.update("jax_compilation_cache_dir", str(room / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # Where there is no zstandard; at its usual level zlib takes a tenth of the time to compile.
    quick = SimpleNamespace(compress=functools.partial(zlib.compress, level=1), decompress=zlib.decompress)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation_cache, "zlib", quick, raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def lowered_in_one_place():
    """Programs are lowered in one MLIR context after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlir, "make_ir_context", contexts(mlir.make_ir_context))
        yield


@pytest.fixture(autouse=True, scope="module")
def fresh_caches():
    """Drops what a module has compiled: thousands of programs would fill a process's memory maps and end it."""
    yield
    jax.clear_caches()


@pytest.fixture(params=["kernel", "XLA"])
def way(request):
    """Each test runs with the kernel and without; what was compiled the other way is dropped (`sort`)."""
    from mpt_eqx.ops import cpu

    if request.param == "kernel" and not cpu.available():
        pytest.skip(f"no kernel: {cpu.missing()}")
    with mock.patch.object(cpu, "available", cpu.available if request.param == "kernel" else lambda: False):
        yield request.param


@pytest.fixture(scope="session")
def kernel():
    """Skips a test of what only the CPU kernel promises."""
    from mpt_eqx.ops import cpu

    if not cpu.available():
        pytest.skip(f"no kernel: {cpu.missing()}")


def golden_case(name: str, **kwargs) -> SimpleNamespace:
    from safetensors import safe_open

    from mpt_eqx import from_pretrained

    directory = GOLDEN / name
    case = json.loads((directory / "case.json").read_text())
    kwargs.setdefault("dtype", case.get("dtype", "torch.float32").removeprefix("torch."))
    with safe_open(directory / "expected.safetensors", "np") as f:
        expected = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    return SimpleNamespace(
        directory=directory, model=from_pretrained(directory, **kwargs), expected=expected, case=case
    )


@pytest.fixture(scope="session")
def golden():
    """Loads a case of reference data: its model, what is expected of it, and its case.json; `fresh` loads it anew."""
    kept = {}

    def load(name: str, **kwargs) -> SimpleNamespace:
        if kwargs:
            return golden_case(name, **kwargs)
        if name not in kept:
            kept[name] = golden_case(name)
        return kept[name]

    def fresh(name: str, **kwargs) -> SimpleNamespace:
        """Loads a case by the code as it is now, which a test may have changed."""
        from mpt_eqx.surgery.quantization import skeleton

        skeleton.cache_clear()
        try:
            return golden_case(name, **kwargs)
        finally:
            skeleton.cache_clear()

    load.fresh = fresh
    return load


@pytest.fixture(scope="session")
def tiny_config():
    """Makes the configuration of a small model; keywords replace its values."""

    def make(**kwargs):
        from mpt_eqx import AttnConfig, MPTConfig

        values = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 61, "max_seq_len": 256, "no_bias": True}
        return MPTConfig(**{**values, "attn_config": AttnConfig(alibi=True), **kwargs})

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """A small model whose logits are spread enough for greedy decoding to be stable."""
    from mpt_eqx import MPT, InitConfig

    config = tiny_config(init_config=InitConfig(emb_init_std=0.5))
    return MPT(config, key=jax.random.key(3))


@pytest.fixture(scope="session")
def one_block_model(tiny_config):
    """As `tiny_model`, with one block: where more would show no more, programs compile in half of the time."""
    from mpt_eqx import MPT, InitConfig

    return MPT(tiny_config(n_layers=1, init_config=InitConfig(emb_init_std=0.5)), key=jax.random.key(3))


@pytest.fixture(scope="session")
def shipped():
    """The model that ships with the package."""
    from mpt_eqx import SHIPPED_MODEL, from_pretrained

    return from_pretrained(SHIPPED_MODEL)


@pytest.fixture(scope="session")
def one_layer(shipped, tmp_path_factory):
    """A checkpoint of the shipped model's first block and its tokenizer: it compiles in a fraction of the time."""
    from mpt_eqx import MPT, SHIPPED_MODEL, save_pretrained

    directory = tmp_path_factory.mktemp("one-layer")
    model = MPT(dataclasses.replace(shipped.config, n_layers=1), key=jax.random.key(0))
    weights = (shipped.wte, shipped.blocks[:1], shipped.norm_f)
    save_pretrained(eqx.tree_at(lambda m: (m.wte, m.blocks, m.norm_f), model, weights), directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(SHIPPED_MODEL / name, directory)
    return directory


@pytest.fixture
def prompts():
    """Draws prompts of the given lengths for the small model."""

    def make(*lengths: int, seed: int = 0) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        return [rng.integers(61, size=n).tolist() for n in lengths]

    return make
