"""Writes torch files without torch, well-formed and otherwise, for the tests of the reader."""

import pickle
import zipfile
from collections.abc import Iterator

import numpy as np

KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "float64": "DoubleStorage"}
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def name_of(module, name):
    return f"c{module}\n{name}\n".encode()


def text(value):
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def integer(value):
    if -(2**31) <= value < 2**31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tuple_of(*items):
    return b"(" + b"".join(items) + b"t"


def call(function, *arguments):
    return function + tuple_of(*arguments) + b"R"


def storage(kind, key, numel, *, legacy=False):
    more = (b"N",) if legacy else ()
    pid = tuple_of(text("storage"), name_of("torch", kind), text(key), text("cpu"), integer(numel), *more)
    return pid + b"Q"


def tensor(stored, shape, stride=None, offset=0):
    stride = stride or tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    sizes = [tuple_of(*map(integer, numbers)) for numbers in (shape, stride)]
    hooks = call(name_of("collections", "OrderedDict"))
    return call(name_of("torch._utils", "_rebuild_tensor_v2"), stored, integer(offset), *sizes, b"\x89", hooks)


def dict_of(entries):
    return b"}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u"


def state_dict(entries):
    """A pickle of {name: object}, from the objects' own pickle operations."""
    return b"\x80\x02" + dict_of(entries) + b"."


def composer(model, other, *, key="0"):
    """The pickle of a whole Composer checkpoint, from the operations of the weights and of one more thing in it.

    Everything it has beside the weights is there: times, states of random number generators, an optimizer's numbers.
    The tensors among them use a storage of 32 floats under `key`.
    """
    one_more = tensor(storage("FloatStorage", key, 32), (32,))
    timedelta = call(name_of("datetime", "timedelta"), b"K\x00", b"K\x05", b"K\x07")
    version = name_of("torch.torch_version", "TorchVersion") + tuple_of(text("2.1.0")) + b"\x81"
    encoded = call(name_of("_codecs", "encode"), text("b"), text("latin1"))
    dtype = call(name_of("numpy", "dtype"), text("u4"), b"\x89", b"\x88")
    dtype += tuple_of(b"K\x03", text("<"), b"N", b"N", b"N", integer(-1), b"K\x00") + b"b"
    array = call(name_of("numpy.core.multiarray", "_reconstruct"), name_of("numpy", "ndarray"), b"K\x00\x85", encoded)
    array += tuple_of(b"K\x01", b"M\x70\x02\x85", dtype, b"\x89", encoded) + b"b"
    rng = dict_of(
        {
            "python": tuple_of(b"K\x03", tuple_of(*[integer(i) for i in (2**31, 2**32 - 1, 7)]), b"N"),
            "numpy": tuple_of(text("MT19937"), array, b"M\x70\x02", b"K\x00", b"G" + bytes(8)),
            "torch": one_more,
        }
    )
    momentum = dict_of({"step": one_more, "exp_avg": one_more})
    factory = call(name_of("collections", "defaultdict"), name_of("__builtin__", "dict"))
    state = dict_of(
        {
            "model": model,
            "optimizers": dict_of({"DecoupledAdamW": dict_of({"state": b"}K\x00" + momentum + b"s", "more": other})}),
            "timestamp": dict_of({"Timestamp": dict_of({"batch": b"K\x05", "total_wct": timedelta})}),
            "callbacks": factory + b"(" + text("SpeedMonitor") + b"}u",
            "metadata": dict_of({"torch_version": version, "world_size": b"K\x08"}),
            "algorithms": b"](" + tuple_of(text("GradientClipping"), b"}") + b"e",
        }
    )
    return b"\x80\x02" + dict_of({"state": state, "rng": b"]" + rng + b"a"}) + b"."


def of_shapes(shapes, dtype, content):
    """As `of_arrays`, with bytes that are made when they are written: content(count) yields them."""
    entries, storages = {}, {}
    for number, (name, shape) in enumerate(shapes.items()):
        count = int(np.prod(shape))
        entries[name] = tensor(storage(KINDS[dtype], str(number), count), shape)
        storages[str(number)] = (count, content(count))
    return state_dict(entries), storages


def of_arrays(arrays, *, legacy=False, nest=()):
    """The pickle of a state dict of arrays, and the storages' bytes by key."""
    entries, storages = {}, {}
    for number, (name, array) in enumerate(arrays.items()):
        stored = storage(KINDS[array.dtype.name], str(number), array.size, legacy=legacy)
        entries[name] = tensor(stored, array.shape)
        storages[str(number)] = (array.size, np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    stream = state_dict(entries)
    for key in reversed(nest):
        stream = b"\x80\x02}(" + text(key) + stream[2:-1] + b"u."
    return stream, storages


def write_zip(path, stream, storages, *, compression=zipfile.ZIP_STORED, byteorder=b"little"):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", stream)
        archive.writestr("archive/byteorder", byteorder)
        for key, (_, content) in storages.items():
            with archive.open(zipfile.ZipInfo(f"archive/data/{key}"), "w", force_zip64=True) as member:
                for part in content if isinstance(content, Iterator) else [content]:
                    member.write(part)
        archive.writestr("archive/version", b"3\n")


def write_legacy(path, stream, storages, *, system=SYSTEM, keys=None):
    with open(path, "wb") as f:
        for part in (0x1950A86A20F9469CFC6C, 1001, system):
            f.write(pickle.dumps(part, protocol=2))
        f.write(stream)
        f.write(pickle.dumps(list(storages) if keys is None else keys, protocol=2))
        for numel, content in storages.values():
            f.write(numel.to_bytes(8, "little"))
            f.write(content)
