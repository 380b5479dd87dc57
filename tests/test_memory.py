"""Memory of loading, saving and converting, each in a process of its own, on a checkpoint of 0.16 GB.

An OS memory limit (RLIMIT_DATA: all memory that is the process's own, be it for a moment) proves that no more was
needed; what was measured on the way is for the tables.
"""

import json
import subprocess
import sys
from contextlib import contextmanager

import equinox as eqx
import jax
import ml_dtypes
import numpy as np
import pytest
import torch_bytes as tb
from conftest import some

LAYERS, WIDTH, VOCABULARY = 6, 1024, 4096
TENSOR = VOCABULARY * WIDTH * 2  # bytes of the largest
SIZE = 2 * (LAYERS * (12 * WIDTH**2 + 2 * WIDTH) + VOCABULARY * WIDTH + WIDTH)  # bytes of the weights in bfloat16
NOISE = 48_000_000  # bytes of threads, of the allocator, and of what JAX and Python make on the way
MEASURE = """
import collections, json, os, resource, sys, threading, time
from pathlib import Path
import jax
import mpt_eqx.checkpoint.load as loading
from mpt_eqx import from_pretrained, save_pretrained, sharding
from mpt_eqx.checkpoint import convert

def memory():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(fields[key].split()[0]) * 1024 for key in ("VmHWM", "VmRSS", "VmData", "RssAnon")}

def mapped(suffix):
    "Bytes of the files that are in memory because they were read through a map."
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split()[0][-1] != ":":
            counts = line.endswith(suffix)
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total

def read():
    return int(Path("/proc/self/io").read_text().split()[1])

def measure(action, source, small, target, limit, readers, options):
    axes = options.pop("mesh", None)
    jax.config.update("jax_num_cpu_devices", 4 if axes else 1)
    jax.devices(), jax.device_put(1.0)
    if axes:
        options |= {"mesh": sharding.make_mesh(**axes), "rules": sharding.FSDP_TP}
    loading.READERS = readers
    from_pretrained(small)
    loaded = {key: options.pop(key) for key in ("mesh", "rules") if key in options and action == "save"}
    model = from_pretrained(source, **loaded) if action == "save" else None
    most, stop = [0], threading.Event()
    def watch():
        while not stop.wait(0.002):
            most[0] = max(most[0], memory()["RssAnon"])
    thread = threading.Thread(target=watch); thread.start()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before, read_before = memory(), read()
    if limit is not None:
        most_data = before["VmData"] + int(limit)
        resource.setrlimit(resource.RLIMIT_DATA, (most_data, most_data))
    started = time.monotonic()
    if action == "load":
        model = from_pretrained(source, **options)
        jax.block_until_ready(jax.tree.leaves(model))
    elif action == "save":
        save_pretrained(model, target, **options)
    else:
        convert(source, target, **options)
    parts = collections.Counter()
    for leaf in jax.tree.leaves(model):
        for shard in leaf.addressable_shards:
            parts[shard.device.id] += shard.data.nbytes
    seconds, read_after = time.monotonic() - started, read()
    stop.set(); thread.join()
    after = memory()
    return {
        "peak": max(most[0], after["RssAnon"]) - before["RssAnon"], "seconds": seconds, "VmHWM": after["VmHWM"],
        "resident": after["VmHWM"] - before["VmRSS"],
        "size": sum(leaf.nbytes for leaf in jax.tree.leaves(model)), "parts": list(parts.values()),
        "mapped": mapped((".safetensors", ".bin", ".gguf")), "read": read_after - read_before,
    }

for line in sys.stdin:
    receive, send = os.pipe()
    if not (child := os.fork()):
        try:
            result = measure(**json.loads(line))
        except BaseException as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        os.write(send, json.dumps(result).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as f:
        answer = f.read()
    status = os.waitpid(child, 0)[1]
    print(answer or json.dumps({"error": f"wait status {status}"}), flush=True)
"""


def numbers(count):
    rng = np.random.default_rng(count)
    bits = rng.integers(0, 2**16, count, np.uint16)
    yield ((bits & 0x807F) | 0x3C00).tobytes()


def write_foreign(root):
    """The file of root/safetensors as another library writes it: its tensors are not aligned to 64 bytes."""
    whole = (root / "safetensors" / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    (root / "foreign").mkdir()
    (root / "foreign" / "config.json").write_bytes((root / "safetensors" / "config.json").read_bytes())
    with open(root / "foreign" / "model.safetensors", "wb") as f:
        f.write(end.to_bytes(8, "little") + whole[8:end] + b" " * 8)
        f.write(memoryview(whole)[end:])


def configuration(width=WIDTH, layers=LAYERS, vocabulary=VOCABULARY):
    from mpt_eqx import AttnConfig, MPTConfig

    return MPTConfig(
        d_model=width, n_heads=16, n_layers=layers, vocab_size=vocabulary, no_bias=True,
        attn_config=AttnConfig(alibi=True),
    )  # fmt: skip


def write_zip(directory, config):
    """A torch file of random weights in bfloat16."""
    from mpt_eqx import MPT
    from mpt_eqx.checkpoint.names import named_leaves

    skeleton = eqx.filter_eval_shape(MPT, config, key=jax.random.key(0))
    shapes = {name: leaf.shape for name, leaf in named_leaves(skeleton).items()}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    tb.write_zip(directory / "pytorch_model.bin", *tb.of_shapes(shapes, "bfloat16", numbers))


def write_small(root):
    """What is loaded once before anything is measured."""
    from mpt_eqx import MPT, MPTConfig, save_pretrained

    save_pretrained(MPT(MPTConfig.preset("mpt-small-cpu"), key=jax.random.key(0)), root / "small")


def write_every_format(root, config):
    """The same model in bfloat16 in every format."""
    from test_formats import write_gguf

    from mpt_eqx import from_pretrained, save_pretrained
    from mpt_eqx.checkpoint.names import named_leaves

    write_small(root)
    write_zip(root / "zip", config)
    for name in ("legacy", "gguf", "q8_0"):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config.to_dict()))
    model = from_pretrained(root / "zip")
    stream, storages = tb.of_arrays({name: np.asarray(leaf) for name, leaf in named_leaves(model).items()}, legacy=True)
    tb.write_legacy(root / "legacy" / "pytorch_model.bin", stream, storages)
    save_pretrained(model, root / "safetensors")
    save_pretrained(model, root / "shards", max_shard_size="40MB")
    write_foreign(root)
    write_gguf(root / "gguf" / "model.gguf", model)
    write_gguf(root / "q8_0" / "model.gguf", from_pretrained(root / "zip", dtype="float32"), "Q8_0")


@contextmanager
def measuring(root):
    """Yields a function that measures an action on one of the checkpoints under `root`, below a limit in bytes."""
    command = [sys.executable, "-W", "ignore", "-c", MEASURE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:

        def measure(name, *, action="load", limit=None, readers=4, **options):
            order = {"action": action, "source": str(root / name), "small": str(root / "small"), "limit": limit}
            order |= {"target": str(root / "written"), "readers": readers, "options": options}
            process.stdin.write(json.dumps(order) + "\n")
            return json.loads(process.stdout.readline())

        yield measure
        process.stdin.close()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("large")
    write_every_format(root, configuration())
    return root


@pytest.fixture(scope="module")
def measure(checkpoints):
    with measuring(checkpoints) as measure:
        yield measure


@pytest.mark.parametrize("name", ["safetensors", "shards"])
def test_an_aligned_file_needs_no_memory_of_its_own(measure, name):
    found = measure(name, limit=NOISE)
    assert found.get("size") == SIZE, found
    assert found["peak"] < NOISE


@pytest.mark.parametrize("name", ["safetensors", "shards"])
def test_an_aligned_file_is_not_read(measure, name):
    """But for its header: so loading it takes as long as loading a small one."""
    found = measure(name)
    assert 0 < found["mapped"] < 2e6 and found["read"] < 2e6, found


@pytest.mark.parametrize(
    "name", some(["safetensors", "shards", "zip", "legacy", "gguf"], ["safetensors", "zip", "gguf"])
)
@pytest.mark.parametrize("dtype", some([None, "float32", "float16"], ["float16"]))
def test_copies_need_the_weights_and_one_tensor(measure, name, dtype):
    times = 2 if dtype == "float32" else 1
    most = times * (SIZE + TENSOR) + NOISE
    found = measure(name, limit=most, dtype=dtype, mmap=False)
    assert found.get("size") == times * SIZE, found
    assert found["peak"] < most


@pytest.mark.parametrize("name", some(["foreign", "zip", "legacy", "gguf"], ["foreign", "zip"]))
@pytest.mark.parametrize("dtype", some([None, "float32"], [None]))
def test_what_is_copied_is_in_memory_once(measure, name, dtype):
    """The pages of the mapped file are released as it is copied: of 1.15 of the weights, 1 is the copies."""
    found = measure(name, dtype=dtype, mmap=name == "foreign")
    assert found["size"] < found["resident"] < 1.15 * found["size"], found
    assert found["mapped"] < 0.02 * SIZE


def test_where_pages_cannot_be_released_they_stay(tmp_path, monkeypatch):
    from mpt_eqx.checkpoint.formats.tensors import release_pages

    (tmp_path / "file").write_bytes(bytes(range(256)) * 256)
    mapped, own = np.memmap(tmp_path / "file", mode="r"), np.arange(5)
    for array in (mapped[:0], mapped[10:20], mapped[7:60_000], mapped[::-3], own, own[()]):
        release_pages(array)
    monkeypatch.delattr("mmap.MADV_DONTNEED")
    release_pages(mapped)
    assert bytes(mapped) == bytes(range(256)) * 256 and own.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", some([None, "bfloat16"], ["bfloat16"]))
def test_dequantising_needs_the_weights_and_one_tensor(measure, dtype):
    times = 2 if dtype is None else 1
    most = times * (SIZE + TENSOR) + NOISE
    found = measure("q8_0", limit=most, dtype=dtype)
    assert found.get("size") == times * SIZE, found
    assert found["peak"] < most


@pytest.mark.parametrize(("name", "mmap"), [("safetensors", True), ("zip", False)])
def test_a_look_at_every_number_needs_one_tensor_more(measure, name, mmap):
    found = measure(name, limit=NOISE + TENSOR + (0 if mmap else SIZE), mmap=mmap, check_finite=True)
    assert found.get("size") == SIZE, found


@pytest.mark.parametrize(
    ("action", "name", "dtype", "tensors"),
    [
        ("save", "zip", None, 1),
        pytest.param("convert", "zip", None, 1, marks=pytest.mark.slow),
        ("convert", "zip", "float32", 3),
        pytest.param("convert", "q8_0", "bfloat16", 5, marks=pytest.mark.slow),
    ],
)
def test_writing_needs_a_tensor_or_two(measure, action, name, dtype, tensors):
    """Not the weights: the largest tensor, in its new type where that is another; gguf makes two of float32 first."""
    most = NOISE + tensors * TENSOR
    options = {"max_shard_size": "80MB", **({} if action == "save" else {"dtype": dtype})}
    found = measure(name, action=action, limit=most, **options)
    assert "error" not in found and found["peak"] < most, found


MESH = {"fsdp": 2, "tp": 2}


@pytest.mark.parametrize("name", some(["safetensors", "zip", "shards"], ["zip"]))
def test_every_device_of_a_mesh_gets_its_share(measure, name):
    """A fourth of the weights for each of four devices, and never more than one tensor besides."""
    most = SIZE + TENSOR + NOISE
    found = measure(name, limit=most, mmap=False, mesh=MESH)
    assert found.get("size") == SIZE, found
    assert len(found["parts"]) == 4 and max(found["parts"]) < 1.05 * SIZE / 4
    assert found["peak"] < most


@pytest.mark.slow
def test_saving_from_a_mesh_gathers_a_tensor_at_a_time(measure):
    """Wqkv from its three sections, so a little more than the largest tensor twice."""
    most = NOISE + 2 * TENSOR
    found = measure("zip", action="save", limit=most, mesh=MESH)
    assert "error" not in found and found["peak"] < most, found


@pytest.fixture(scope="module")
def deep(checkpoints):
    """A model of 0.41 GB, so that what quantising needs, whatever the size, is little beside it."""
    write_zip(checkpoints / "deep", configuration(layers=16))
    return "deep"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", some(["int8", "int4"], ["int4"]))
def test_quantising_a_checkpoint_needs_a_tensor(measure, deep, scheme):
    """Not the weights: what one tensor becomes, a few rows in float32 nine times, and XLA's compiler."""
    most = NOISE + 100_000_000 + 2 * TENSOR
    found = measure(deep, action="convert", limit=most, quantize=scheme)
    assert "error" not in found and found["peak"] < most, found


@pytest.mark.slow
def test_the_numbers_are_the_same_in_every_format(checkpoints):
    from mpt_eqx import checkpoint_info

    wanted = {t.name: t.read() for t in checkpoint_info(checkpoints / "safetensors").tensors}
    for name in ("shards", "zip", "legacy", "gguf"):
        for tensor in checkpoint_info(checkpoints / name).tensors:
            assert tensor.dtype == "bfloat16" and tensor.read().dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(tensor.read().view(np.uint16), wanted[tensor.name].view(np.uint16))
