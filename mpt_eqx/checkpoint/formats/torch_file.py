"""Torch files without torch: what is in them is described, never run.

A torch file is a pickle that says how tensors are made from storages, and the storages' bytes: in a zip archive (since
torch 1.6) or one after another (before). A pickle is a program for a small machine with a stack. Python's own machine
makes whatever the program asks for, and a short program can keep it busy for ever. So here is another machine, which
knows thirty operations and makes nothing but numbers, texts, lists, dicts and descriptions of tensors. Names of
functions and classes are looked up in a list of exact names and stand for themselves: nothing is imported or called.
Every tensor's geometry is checked against its storage, every storage's length against the file. Whatever else happens
is a CheckpointError.
"""

import io
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mpt_eqx.checkpoint.formats.tensors import MAX_RANK, TensorInfo
from mpt_eqx.errors import CheckpointError, first_of, printable

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
DICT = "collections OrderedDict"
TENSOR = "torch._utils _rebuild_tensor_v2"
PARAMETER = "torch._utils _rebuild_parameter"
# What Composer writes beside the weights: times, states of random number generators, versions. Nobody asks for it
# here, so each stands for itself, and for all that would be made of it. Protocol 2 says __builtin__ for builtins.
BESIDE = {
    *("datetime timedelta", "datetime datetime", "collections defaultdict", "_codecs encode"),
    *("numpy dtype", "numpy ndarray", "torch Size", "torch device", "torch.torch_version TorchVersion"),
    *(f"__builtin__ {name}" for name in ("dict", "list", "set", "int", "float", "bytearray")),
    *(f"numpy.{core}.multiarray {name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
}
MAX_PICKLE = 64 * 2**20
MAX_OPERATIONS = 2_000_000
MAX_TEXT = 2**16
MAX_DIRECTORY = 4 * 2**20
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


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


class _Name(NamedTuple):
    """A function or class of `DICT`, `TENSOR`, `PARAMETER` or `BESIDE`, or something made by one of the last kind."""

    name: str


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
        tensors = [_tensor_info(name, value, storages, file) for name, value in _state_dict(content).items()]
    except _Refused as error:
        raise CheckpointError(f"{file}: {error}") from None
    except Exception as error:
        # Damage shows in many ways; none of them may leave this module under another name.
        text = printable(" ".join(str(error).split()), limit=200)
        raise CheckpointError(f"{file}: expected a torch file, found a damaged one ({text})") from None
    # Tensors may share a storage, as a tied lm_head does. That at most doubles them, unless somebody means to fill the
    # memory from a small file.
    total = sum(tensor.size * np.dtype(tensor.dtype).itemsize for tensor in tensors)
    if total > 2 * len(data):
        raise CheckpointError(
            f"{file}: expected tensors of not more than twice the file's {len(data)} bytes, found {total} bytes of them"
        )
    return tensors


def _tensor_info(name: str, tensor: _Tensor, storages: Mapping[str, np.ndarray], file: Path) -> TensorInfo:
    def read() -> np.ndarray:
        flat = storages[tensor.storage.key].view(tensor.storage.dtype)[tensor.offset :]
        strides = [step * flat.itemsize for step in tensor.stride]
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

    return TensorInfo(name, tensor.shape, tensor.storage.dtype.name, file.name, read)


class _InParts(io.FileIO):
    """A file of which nothing long can be read at once: zipfile reads a directory as long as the file says it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        asked = MAX_DIRECTORY + 1 if size is None or not 0 <= size <= MAX_DIRECTORY else size
        content = super().read(asked)
        if len(content) > MAX_DIRECTORY:
            raise _Refused(f"expected an archive with a directory of at most {MAX_DIRECTORY} bytes, found more")
        return content


def _read_zip(file: Path, data: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    with _InParts(file) as f, zipfile.ZipFile(f) as archive:
        members = archive.infolist()
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        raise _Refused("two members of the archive have one name")
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise _Refused(f"expected one data.pkl in the archive, found {first_of(pickles) or 'none'}")
    root = pickles[0].removesuffix("data.pkl")
    if outside := [name for name in names if not name.startswith(root)]:
        raise _Refused(f"expected every member of the archive in {printable(root)}, found {first_of(outside)}")
    found = {member.filename.removeprefix(root): _member(member, data) for member in members}
    if bytes(found.get("byteorder", b"little")) != b"little":
        raise _Refused("expected little-endian numbers, found big-endian ones")
    loaded: dict[str, np.ndarray] = {}

    def storage(kind: _StorageType, key: str, numel: int) -> _Storage:
        if (part := found.get(f"data/{key}")) is None:
            raise _Refused(f"storage '{printable(key)}' is not in the archive")
        if len(part) != numel * kind.dtype.itemsize:
            raise _Refused(
                f"storage '{printable(key)}': expected {numel * kind.dtype.itemsize} bytes, found {len(part)}"
            )
        loaded[key] = part
        return _Storage(key, kind.dtype, numel)

    return _unpickle(bytes(found["data.pkl"][:MAX_PICKLE]), storage)[0], loaded


def _member(member: zipfile.ZipInfo, data: np.ndarray) -> np.ndarray:
    """Returns the bytes of a stored member, after its local header has confirmed what the directory says."""
    name = printable(member.orig_filename)
    local = bytes(data[member.header_offset : member.header_offset + 30])
    flags, method, packed, size, name_length, extra_length = (
        int.from_bytes(local[at : at + width], "little")
        for at, width in ((6, 2), (8, 2), (18, 4), (22, 4), (26, 2), (28, 2))
    )
    if (member.compress_type or method) != zipfile.ZIP_STORED or (member.flag_bits | flags) & 0x2041:
        raise _Refused(f"{name}: expected a stored member, found a compressed or encrypted one")
    after_name = member.header_offset + 30 + name_length
    extra = bytes(data[after_name : after_name + extra_length])
    start = after_name + extra_length
    if 2**32 - 1 in (size, packed):
        sizes = zip((size, packed), _long_sizes(extra), strict=True)
        size, packed = (long if short == 2**32 - 1 else short for short, long in sizes)
    # Where torch writes, the sizes stand after the member, and zeros here.
    after = flags & 8 and (size, packed) == (0, 0)
    if (
        local[:4] != b"PK\x03\x04"
        or bytes(data[member.header_offset + 30 : after_name]) != member.filename.encode()
        or not (after or (size, packed) == (member.file_size, member.compress_size))
    ):
        raise _Refused(f"{name}: the archive's directory and the member's own header disagree")
    if member.file_size != member.compress_size or start + member.file_size > len(data):
        raise _Refused(f"{name}: expected {member.file_size} bytes, found the end of the file")
    return data[start : start + member.file_size]


def _long_sizes(extra: bytes) -> tuple[int, int]:
    """Returns a member's size and its compressed size from its header's extra fields, where long ones stand."""
    while len(extra) >= 4:
        kind, length = int.from_bytes(extra[:2], "little"), int.from_bytes(extra[2:4], "little")
        if kind == 1 and length >= 16:
            return int.from_bytes(extra[4:12], "little"), int.from_bytes(extra[12:20], "little")
        extra = extra[4 + length :]
    raise _Refused("expected the sizes of a member in its header, found none")


def _read_legacy(data: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    head = bytes(data[:MAX_PICKLE])
    if head[257:262] == b"ustar":
        raise _Refused("expected a file of torch 0.1.10 or later, found an older one, a tar archive")
    wanted: dict[str, _Storage] = {}

    def storage(kind: _StorageType, key: str, numel: int) -> _Storage:
        if (first := wanted.setdefault(key, _Storage(key, kind.dtype, numel))) != (key, kind.dtype, numel):
            raise _Refused(f"storage '{printable(key)}': expected one type and length, found two")
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
    if (
        not isinstance(keys, list)
        or len(keys) != len(wanted)
        or not all(isinstance(key, str) for key in keys)
        or set(keys) != set(wanted)
    ):
        raise _Refused("the storages that tensors use are not those that the file lists")
    storages = {}
    for key in keys:
        numel = int.from_bytes(bytes(data[at : at + 8]), "little")
        size = wanted[key].numel * wanted[key].dtype.itemsize
        if numel != wanted[key].numel or at + 8 + size > len(data):
            raise _Refused(
                f"storage '{printable(key)}': expected {wanted[key].numel} numbers, found {numel} or the file's end"
            )
        storages[key] = data[at + 8 : at + 8 + size]
        at += 8 + size
    return content, storages


def _unpickle(stream: bytes, storage: Callable[[_StorageType, str, int], _Storage]) -> tuple[Any, int]:
    """Returns what the first pickle in a stream describes, and the pickle's length.

    Only texts and small numbers become keys, and no object is shown in an error: of a few hundred operations that put
    one tuple into the next three times, neither hash() nor repr() would ever come to an end.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under the marks
    memo: dict[int, Any] = {}
    argument: Any

    def to_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, below.pop()
        return items

    for count, (opcode, argument, position) in enumerate(pickletools.genops(io.BytesIO(stream)), start=1):
        if count > MAX_OPERATIONS:
            raise _Refused(f"expected a pickle of tensors, found more than {MAX_OPERATIONS} operations")
        match opcode.name:
            case "BINUNICODE":
                if len(argument) > MAX_TEXT:
                    raise _Refused(f"expected names, found a text of {len(argument)} characters")
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                if argument > count:
                    raise _Refused(
                        f"expected a pickle of tensors, found memo index {argument} after {count} operations"
                    )
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "MARK":
                below.append(stack)
                stack = []
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE":
                items = to_mark()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple([stack.pop() for _ in range(int(opcode.name[-1]))][::-1]))
            case "APPEND":
                _extend(stack[-2], [stack.pop()])
            case "APPENDS":
                items = to_mark()
                _extend(stack[-1], items)
            case "SETITEM":
                items = [stack.pop(), stack.pop()][::-1]
                _set(stack[-1], items)
            case "SETITEMS":
                items = to_mark()
                _set(stack[-1], items)
            case "BUILD":
                # The state of an object: attributes of a dict, of which tensors need none.
                stack.pop()
                if not isinstance(stack[-1], dict) and not _is_beside(stack[-1]):
                    raise ValueError("the state of something that has none")
            case "GLOBAL":
                stack.append(_named(argument))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(_made(stack.pop(), arguments))
            case "BINPERSID":
                stack.append(_stored(stack.pop(), storage))
            case "POP":
                # Of a mark, if there is nothing above it.
                if stack:
                    stack.pop()
                else:
                    to_mark()
            case "POP_MARK":
                to_mark()
            case "PROTO":
                if argument != 2:
                    raise _Refused(f"expected pickle protocol 2, found {argument}")
            case "STOP":
                (content,) = stack
                if below or position is None:
                    raise ValueError("a mark without an end")
                return content, position + 1
            case _:
                raise _Refused(f"expected a pickle of tensors, found the operation {opcode.name}")
    raise _Refused("expected a whole pickle, found its beginning")


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not _is_beside(target):
        raise ValueError("items of something that has none")


def _set(target: Any, items: list[Any]) -> None:
    if _is_beside(target):
        return
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("items of something that has none")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Numbers have hashes that a file can choose: larger ones could all fall in one place of the dict.
        if type(key) is not str and not (type(key) is int and 0 <= key < 2**31):
            raise _Refused(f"expected texts and small numbers as keys of a dict, found {type(key).__name__}")
        target[key] = value


def _named(name: str) -> Any:
    """Returns what stands for a function or class; its module and name come with a space between."""
    module, _, kind = name.partition(" ")
    if module == "torch" and kind in STORAGES:
        return _StorageType(STORAGES[kind])
    if name not in (DICT, TENSOR, PARAMETER) and name not in BESIDE:
        shown = printable(name).replace(" ", ".")
        raise _Refused(f"expected nothing but tensors, found {shown}, which is not loaded")
    return _Name(name)


def _made(function: Any, arguments: Any) -> Any:
    """Returns what a call of one of the known names would make of its arguments."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise ValueError("a call of something else than a function")
    if function.name == DICT:
        if arguments:
            raise _Refused(f"expected an OrderedDict without arguments, found {len(arguments)}")
        return {}
    if function.name == TENSOR:
        # A storage, offset, size and stride, and up to three that are of no use here.
        if not 4 <= len(arguments) <= 7:
            raise ValueError(f"a tensor made of {len(arguments)} things")
        return _checked(*arguments[:4])
    if function.name == PARAMETER:
        if not 1 <= len(arguments) <= 3 or not isinstance(arguments[0], _Tensor):
            raise _Refused(f"expected a tensor in a parameter, found {_kind(arguments[0]) if arguments else 'nothing'}")
        return arguments[0]
    return function


def _stored(pid: Any, storage: Callable[[_StorageType, str, int], _Storage]) -> _Storage:
    """Returns the storage of a persistent id: "storage", its type, key, device and length."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or type(pid[0]) is not str or pid[0] != "storage":
        raise _Refused(f"expected a storage, found {type(pid).__name__}")
    kind, key, _, numel = pid[1:5]
    if not isinstance(kind, _StorageType) or not isinstance(key, str) or not _is_count(numel):
        raise _Refused("expected a storage, found something else under its name")
    if len(pid) == 6 and pid[5] is not None:
        raise _Refused("views between storages, as in files before torch 0.4, are not supported")
    return storage(kind, key, numel)


def _checked(storage: Any, offset: Any, size: Any, stride: Any) -> _Tensor:
    """Returns the description of a tensor, after its geometry has been compared with its storage."""
    if (
        not isinstance(storage, _Storage)
        or not isinstance(size, tuple)
        or not isinstance(stride, tuple)
        # The lengths first: otherwise a long tuple would be looked through for each of many tensors.
        or len(size) != len(stride)
        or len(size) > MAX_RANK
        or not all(map(_is_count, (offset, *size, *stride)))
    ):
        raise _Refused("expected a tensor's offset, size and stride, found something else in their place")
    empty = 0 in size
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    room = storage.numel
    for n in size:
        # Division, because products of hostile sizes would not fit; a tensor never has more numbers than its storage.
        room = room // n if n else room
    if not empty and (last >= storage.numel or room < 1):
        raise _Refused(f"a tensor of size {list(size)} does not fit into its storage of {storage.numel} numbers")
    return _Tensor(storage, 0 if empty else offset, size, stride)


def _state_dict(content: Any) -> dict[str, _Tensor]:
    """Returns the tensors by name: the object itself, or what a Composer checkpoint has under state and model."""
    for key in ("state", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(inner := content.get(key), dict):
            content = inner
    if not isinstance(content, dict) or not content:
        raise _Refused(f"expected tensors under names, found {_kind(content)}")
    others = [
        f"'{printable(str(name))}' ({_kind(value)})"
        for name, value in content.items()
        if not isinstance(value, _Tensor) or not isinstance(name, str)
    ]
    if others:
        raise _Refused(f"expected tensors under names, found {len(others)} other things: {first_of(others)}")
    return content


def _kind(value: Any) -> str:
    return value.name.replace(" ", ".") if isinstance(value, _Name) else type(value).__name__


def _is_beside(value: Any) -> bool:
    return isinstance(value, _Name) and value.name in BESIDE


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
