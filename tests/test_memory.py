"""Memory of loading, measured in processes of their own on a checkpoint of almost a gigabyte."""

import json
import subprocess
import sys

import equinox as eqx
import jax
import ml_dtypes
import numpy as np
import pytest
import torch_bytes as tb

LAYERS, WIDTH, VOCABULARY = 9, 2048, 16384
TENSOR = VOCABULARY * WIDTH * 2  # bytes of the largest
MEASURE = """
import json, sys, time
import jax
from pathlib import Path
from mpt_eqx import from_pretrained
jax.devices(), jax.device_put(1.0)

def memory():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(fields[key].split()[0]) * 1024 for key in ("VmHWM", "RssAnon", "RssFile")}

import threading
most, stop = [0], threading.Event()
def watch():
    while not stop.wait(0.002):
        most[0] = max(most[0], memory()["RssAnon"])
from_pretrained(sys.argv[3])
before = memory()["RssAnon"]
thread = threading.Thread(target=watch); thread.start()
started = time.monotonic()
model = from_pretrained(sys.argv[1], **json.loads(sys.argv[2]))
jax.block_until_ready(jax.tree.leaves(model))
seconds = time.monotonic() - started
after = memory()["RssAnon"]
stop.set(); thread.join()
size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
print(json.dumps({"peak": max(most[0], after) - before, "left": after - before, "size": size, "seconds": seconds}))
"""


def numbers(count):
    rng = np.random.default_rng(count)
    bits = rng.integers(0, 2**16, count, np.uint16)
    yield ((bits & 0x807F) | 0x3C00).tobytes()


def write_every_format(root):
    """The same model, 0.97 GB in bfloat16, in every format."""
    from test_formats import write_gguf

    from mpt_eqx import MPT, AttnConfig, MPTConfig, from_pretrained, save_pretrained
    from mpt_eqx.checkpoint.differences import differences  # noqa: F401
    from mpt_eqx.checkpoint.names import named_leaves

    config = MPTConfig(
        d_model=WIDTH,
        n_heads=16,
        n_layers=LAYERS,
        vocab_size=VOCABULARY,
        no_bias=True,
        attn_config=AttnConfig(alibi=True),
    )
    skeleton = eqx.filter_eval_shape(MPT, config, key=jax.random.key(0))
    shapes = {name: leaf.shape for name, leaf in named_leaves(skeleton).items()}
    for name in ("zip", "legacy", "gguf", "q8_0"):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config.to_dict()))
    content = tb.of_shapes(shapes, "bfloat16", numbers)
    tb.write_zip(root / "zip" / "pytorch_model.bin", *content)
    model = from_pretrained(root / "zip")
    stream, storages = tb.of_arrays({name: np.asarray(leaf) for name, leaf in named_leaves(model).items()}, legacy=True)
    tb.write_legacy(root / "legacy" / "pytorch_model.bin", stream, storages)
    save_pretrained(model, root / "safetensors")
    write_gguf(root / "gguf" / "model.gguf", model)
    write_gguf(root / "q8_0" / "model.gguf", from_pretrained(root / "zip", dtype="float32"), "Q8_0")
    small = MPT(MPTConfig.preset("mpt-small-cpu"), key=jax.random.key(0))
    save_pretrained(small, root / "small")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("large")
    write_every_format(root)
    return root


def measure(root, name, **options):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, root / name, json.dumps(options), root / "small"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_aligned_file_needs_no_memory_of_its_own(checkpoints):
    found = measure(checkpoints, "safetensors")
    assert found["size"] > 450e6
    assert found["peak"] < 0.05 * found["size"], found


@pytest.mark.parametrize("name", ["safetensors", "zip", "legacy", "gguf"])
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_copies_need_the_weights_and_one_tensor(checkpoints, name, dtype):
    found = measure(checkpoints, name, dtype=dtype, mmap=False)
    assert found["size"] > 450e6
    largest = TENSOR * (2 if dtype == "float32" else 1)
    assert found["peak"] < 1.05 * found["size"] + largest, found


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_dequantising_needs_the_weights_and_one_tensor(checkpoints, dtype):
    found = measure(checkpoints, "q8_0", dtype=dtype)
    assert found["peak"] < 1.05 * found["size"] + 2 * TENSOR, found


def test_the_numbers_are_the_same_in_every_format(checkpoints):
    from mpt_eqx import checkpoint_info

    wanted = {t.name: t.read() for t in checkpoint_info(checkpoints / "safetensors").tensors}
    for name in ("zip", "legacy", "gguf"):
        for tensor in checkpoint_info(checkpoints / name).tensors:
            assert tensor.dtype == "bfloat16" and tensor.read().dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(tensor.read().view(np.uint16), wanted[tensor.name].view(np.uint16))
