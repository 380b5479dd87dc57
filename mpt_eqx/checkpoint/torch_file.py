"""Torch files without torch: what is in them is described, never run.

A torch file is a pickle that says how tensors are made from storages, and the storages' bytes: in a zip archive (since
torch 1.6) or one after another (before). A pickle is a program, so it is read with four locks: its operations are
looked through before it is loaded, against a list and with bounds; the names it may call are a list of exact names,
each answered with an object of our own; every tensor's geometry is checked against its storage; every storage's length
against the file. Whatever else happens is a CheckpointError.
"""

import collections
import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mpt_eqx.checkpoint.tensors import TensorInfo
from mpt_eqx.errors import CheckpointError, first_of

STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
OPCODES = {
    *("PROTO", "STOP", "GLOBAL", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "MARK", "POP", "POP_MARK"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "EMPTY_DICT", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NEWTRUE", "NEWFALSE", "NONE"),
    *("BINPERSID", "REDUCE", "SETITEM", "SETITEMS", "BUILD"),
}
MAX_PICKLE = 64 * 2**20
MAX_OPCODES = 4_000_000
MAX_TEXT = 2**16
MAX_RANK = 8
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


# What a pickle gets to hold in its hands. None of these has a __dict__ or a __setstate__, so that the operation BUILD,
# which sets an object's state, cannot change one after it has been checked.
class _StorageType(NamedTuple):
    dtype: np.dtype


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Refused(Exception):
    """What is wrong with a file, without its name."""


def read_torch(file: Path) -> list[TensorInfo]:
    """Returns the tensors of a torch file, zipped or legacy, as views of the file.

    Raises:
        CheckpointError: the file is damaged, or holds anything but tensors under names.
    """
    try:
        # A read-only map: nothing is copied until a tensor is asked for.
        data = np.memmap(file, mode="r")
        if bytes(data[:2]) == b"PK":
            content, storages = _read_zip(file, data)
        else:
            content, storages = _read_legacy(data)
        return [_tensor_info(name, value, storages, file) for name, value in _state_dict(content).items()]
    except _Refused as error:
        raise CheckpointError(f"{file}: {error}") from None
    except Exception as error:
        # Damage shows in many ways; none of them may leave this module under another name.
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file}: expected a torch file, found a damaged one ({text})") from None


def _tensor_info(name: str, tensor: _Tensor, storages: Mapping[str, np.ndarray], file: Path) -> TensorInfo:
    def read() -> np.ndarray:
        flat = storages[tensor.storage.key].view(tensor.storage.dtype)[tensor.offset :]
        strides = [step * flat.itemsize for step in tensor.stride]
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

    return TensorInfo(name, tensor.shape, tensor.storage.dtype.name, file.name, read)


def _read_zip(file: Path, data: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        raise _Refused("two members of the archive have one name")
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise _Refused(f"expected one data.pkl in the archive, found {first_of(pickles) or 'none'}")
    root = pickles[0].removesuffix("data.pkl")
    found = {member.filename.removeprefix(root): _member(member, data) for member in members}
    if bytes(found.get("byteorder", b"little")) != b"little":
        raise _Refused("expected little-endian numbers, found big-endian ones")
    loaded: dict[str, np.ndarray] = {}

    def storage(kind: _StorageType, key: str, numel: int) -> _Storage:
        if f"data/{key}" not in found:
            raise _Refused(f"storage {key!r} is not in the archive")
        if len(found[f"data/{key}"]) != numel * kind.dtype.itemsize:
            raise _Refused(
                f"storage {key!r}: expected {numel * kind.dtype.itemsize} bytes, found {len(found[f'data/{key}'])}"
            )
        loaded[key] = found[f"data/{key}"]
        return _Storage(key, kind.dtype, numel)

    return _unpickle(bytes(found["data.pkl"][:MAX_PICKLE]), storage)[0], loaded


def _member(member: zipfile.ZipInfo, data: np.ndarray) -> np.ndarray:
    """Returns the bytes of a stored member, after its local header has confirmed what the directory says."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise _Refused(f"{member.filename}: expected a stored member, found a compressed or encrypted one")
    local = bytes(data[member.header_offset : member.header_offset + 30])
    name_length, extra_length = (int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
    start = member.header_offset + 30 + name_length + extra_length
    name = bytes(data[member.header_offset + 30 : member.header_offset + 30 + name_length])
    if local[:4] != b"PK\x03\x04" or name != member.orig_filename.encode():
        raise _Refused(f"{member.filename}: the archive's directory and the member's own header disagree")
    if member.file_size != member.compress_size or start + member.file_size > len(data):
        raise _Refused(f"{member.filename}: expected {member.file_size} bytes, found the end of the file")
    return data[start : start + member.file_size]


def _read_legacy(data: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    head = bytes(data[:MAX_PICKLE])
    if head[257:262] == b"ustar":
        raise _Refused("expected a file of torch 0.1.10 or later, found an older one, a tar archive")
    wanted: dict[str, _Storage] = {}

    def storage(kind: _StorageType, key: str, numel: int) -> _Storage:
        if (first := wanted.setdefault(key, _Storage(key, kind.dtype, numel))) != (key, kind.dtype, numel):
            raise _Refused(f"storage {key!r}: expected one type and length, found two")
        return first

    at, parts = 0, []
    for _ in range(5):
        part, length = _unpickle(head[at:], storage)
        parts.append(part)
        at += length
    magic, protocol, system, content, keys = parts
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL:
        raise _Refused("expected a torch file, found another pickle")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _Refused("expected little-endian numbers, found big-endian ones")
    if not isinstance(keys, list) or set(keys) != set(wanted) or len(keys) != len(wanted):
        raise _Refused("the storages that tensors use are not those that the file lists")
    storages = {}
    for key in keys:
        numel = int.from_bytes(bytes(data[at : at + 8]), "little")
        size = wanted[key].numel * wanted[key].dtype.itemsize
        if numel != wanted[key].numel or at + 8 + size > len(data):
            raise _Refused(f"storage {key!r}: expected {wanted[key].numel} numbers, found {numel} or the file's end")
        storages[key] = data[at + 8 : at + 8 + size]
        at += 8 + size
    return content, storages


def _unpickle(stream: bytes, storage: Callable[[_StorageType, str, int], _Storage]) -> tuple[Any, int]:
    """Returns the object of the first pickle in a stream, and the pickle's length."""
    length = _scan(stream)

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "torch" and name in STORAGES:
                return _StorageType(STORAGES[name])
            if (module, name) not in _CALLABLE:
                raise _Refused(f"expected nothing but tensors, found {module}.{name}, which is not loaded")
            return _CALLABLE[module, name]

        def persistent_load(self, pid: Any) -> _Storage:
            if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
                raise _Refused(f"expected a storage, found {pid!r:.80}")
            kind, key, _, numel = pid[1:5]
            if not isinstance(kind, _StorageType) or not isinstance(key, str) or not _is_count(numel):
                raise _Refused(f"expected a storage, found {pid!r:.80}")
            if len(pid) == 6 and pid[5] is not None:
                raise _Refused("views between storages, as in files before torch 0.4, are not supported")
            return storage(kind, key, numel)

    return Unpickler(io.BytesIO(stream[:length])).load(), length


def _scan(stream: bytes) -> int:
    """Looks through the first pickle's operations and returns its length; nothing is run."""
    operations = pickletools.genops(io.BytesIO(stream))
    for count, (opcode, argument, position) in enumerate(operations, start=1):
        assert position is not None
        if opcode.name not in OPCODES or count > MAX_OPCODES:
            raise _Refused(f"expected a pickle of tensors, found the operation {opcode.name} ({count} so far)")
        # The memo is an array: one large index would make it grow to that size.
        if opcode.name in ("BINPUT", "LONG_BINPUT") and (argument or 0) > count:
            raise _Refused(f"expected a pickle of tensors, found the memo index {argument} after {count} operations")
        if isinstance(argument, str) and len(argument) > MAX_TEXT:
            raise _Refused(f"expected names, found a text of {len(argument)} characters")
        if opcode.name == "PROTO" and argument != 2:
            raise _Refused(f"expected pickle protocol 2, found {argument}")
        if opcode.name == "STOP":
            return position + 1
    raise _Refused("expected a whole pickle, found its beginning")


class _RebuildTensor:
    """What torch._utils._rebuild_tensor_v2 is answered with."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, size: Any, stride: Any, *unused: Any) -> _Tensor:
        return _checked(storage, offset, size, stride)


class _RebuildParameter:
    """What torch._utils._rebuild_parameter is answered with."""

    __slots__ = ()

    def __call__(self, data: Any, *unused: Any) -> _Tensor:
        if not isinstance(data, _Tensor):
            raise _Refused(f"expected a tensor in a parameter, found {data!r:.80}")
        return data


def _checked(storage: Any, offset: Any, size: Any, stride: Any) -> _Tensor:
    """Returns the description of a tensor, after its geometry has been compared with its storage."""
    if (
        not isinstance(storage, _Storage)
        or not isinstance(size, tuple)
        or not isinstance(stride, tuple)
        or not all(map(_is_count, (offset, *size, *stride)))
        or len(size) != len(stride)
        or len(size) > MAX_RANK
    ):
        raise _Refused(f"expected a tensor's offset, size and stride, found {(offset, size, stride)!r:.120}")
    empty = 0 in size
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    room = storage.numel
    for n in size:
        # Division, because products of hostile sizes would not fit; a tensor never has more numbers than its storage.
        room = room // n if n else room
    if not empty and (last >= storage.numel or room < 1):
        raise _Refused(f"a tensor of size {size!r:.80} does not fit into its storage of {storage.numel} numbers")
    return _Tensor(storage, 0 if empty else offset, size, stride)


_CALLABLE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
}


def _state_dict(content: Any) -> dict[str, _Tensor]:
    """Returns the tensors by name: the object itself, or what a Composer checkpoint has under state and model."""
    for key in ("state", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(inner := dict.get(content, key), dict):
            content = inner
    if not isinstance(content, dict) or not content:
        raise _Refused(f"expected tensors under names, found {type(content).__name__}")
    items = dict(dict.items(content))
    others = [
        f"{name!r:.80} ({type(value).__name__})"
        for name, value in items.items()
        if not isinstance(value, _Tensor) or not isinstance(name, str)
    ]
    if others:
        raise _Refused(f"expected tensors under names, found {len(others)} other things: {first_of(others)}")
    return items


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
