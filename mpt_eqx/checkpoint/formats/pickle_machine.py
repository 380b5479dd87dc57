"""A machine for the pickles in torch files: it describes what a pickle would make, and runs nothing.

A pickle is a program for a small machine with a stack. Python's own machine makes whatever the program asks for, and a
short program can keep it busy for ever. This one knows thirty operations and makes only numbers, texts, lists, dicts
and descriptions of tensors. Functions and classes are looked up in a list of exact names and stand for themselves:
nothing is imported or called. Every tensor's geometry is checked against its storage.
"""

import io
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mpt_eqx.checkpoint.formats.tensors import MAX_RANK
from mpt_eqx.errors import printable

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
IGNORED_GLOBALS = {
    *("datetime timedelta", "datetime datetime", "collections defaultdict", "_codecs encode"),
    *("numpy dtype", "numpy ndarray", "torch Size", "torch device", "torch.torch_version TorchVersion"),
    *(f"__builtin__ {name}" for name in ("dict", "list", "set", "int", "float", "bytearray")),
    *(f"numpy.{core}.multiarray {name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
}
MAX_PICKLE = 64 * 2**20
MAX_OPERATIONS = 2_000_000
MAX_TEXT = 2**16


class StorageType(NamedTuple):
    """A class of torch's storages, such as torch.FloatStorage: the type of its numbers."""

    dtype: np.dtype


class Storage(NamedTuple):
    """A storage that the pickle refers to: the key under which its bytes are found, and how many numbers it holds."""

    key: str
    dtype: np.dtype
    numel: int


class TensorView(NamedTuple):
    """A tensor: a view of a storage, whose offset and stride count numbers, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Global(NamedTuple):
    """A function or class that may stand in a torch file, or what one of `IGNORED_GLOBALS` would have made."""

    name: str


class InvalidTorchFile(Exception):
    """What is wrong with a file, without its name."""


def unpickle(stream: bytes, storage: Callable[[StorageType, str, int], Storage]) -> tuple[Any, int]:
    """Returns what the first pickle in a stream describes, and the pickle's length in bytes.

    Only texts and small numbers become keys, and no object is shown in an error: of a few hundred operations that put
    one tuple into the next three times, neither hash() nor repr() would ever come to an end.

    Args:
        stream: begins with a pickle of protocol 2.
        storage: returns the storage of a type, key and number of elements, or raises if the file has none such.

    Raises:
        InvalidTorchFile: the pickle makes something else than tensors under names.
        Exception: the pickle is damaged; of any kind.
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
            raise InvalidTorchFile(f"expected a pickle of tensors, found more than {MAX_OPERATIONS} operations")
        match opcode.name:
            case "BINUNICODE":
                if len(argument) > MAX_TEXT:
                    raise InvalidTorchFile(f"expected names, found a text of {len(argument)} characters")
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                if argument > count:
                    raise InvalidTorchFile(
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
                if not isinstance(stack[-1], dict) and not _is_ignored(stack[-1]):
                    raise ValueError("the state of something that has none")
            case "GLOBAL":
                stack.append(_find_class(argument))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(_reduce(stack.pop(), arguments))
            case "BINPERSID":
                stack.append(_persistent_load(stack.pop(), storage))
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
                    raise InvalidTorchFile(f"expected pickle protocol 2, found {argument}")
            case "STOP":
                (content,) = stack
                if below or position is None:
                    raise ValueError("a mark without an end")
                return content, position + 1
            case _:
                raise InvalidTorchFile(f"expected a pickle of tensors, found the operation {opcode.name}")
    raise InvalidTorchFile("expected a whole pickle, found its beginning")


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not _is_ignored(target):
        raise ValueError("items of something that has none")


def _set(target: Any, items: list[Any]) -> None:
    if _is_ignored(target):
        return
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("items of something that has none")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Numbers have hashes that a file can choose: larger ones could all fall in one place of the dict.
        if type(key) is not str and not (type(key) is int and 0 <= key < 2**31):
            raise InvalidTorchFile(f"expected texts and small numbers as keys of a dict, found {type(key).__name__}")
        target[key] = value


def _find_class(name: str) -> Any:
    """Returns what stands for a function or class, given as "module name"."""
    module, _, kind = name.partition(" ")
    if module == "torch" and kind in STORAGES:
        return StorageType(STORAGES[kind])
    if name not in (DICT, TENSOR, PARAMETER) and name not in IGNORED_GLOBALS:
        shown = printable(name).replace(" ", ".")
        raise InvalidTorchFile(f"expected nothing but tensors, found {shown}, which is not loaded")
    return Global(name)


def _reduce(function: Any, arguments: Any) -> Any:
    """Returns a description of what a call of one of the known functions would return."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise ValueError("a call of something else than a function")
    if function.name == DICT:
        if arguments:
            raise InvalidTorchFile(f"expected an OrderedDict without arguments, found {len(arguments)}")
        return {}
    if function.name == TENSOR:
        # A storage, offset, size and stride, and up to three that are of no use here.
        if not 4 <= len(arguments) <= 7:
            raise ValueError(f"a tensor made of {len(arguments)} things")
        return _check_geometry(*arguments[:4])
    if function.name == PARAMETER:
        if not 1 <= len(arguments) <= 3 or not isinstance(arguments[0], TensorView):
            raise InvalidTorchFile(
                f"expected a tensor in a parameter, found {describe(arguments[0]) if arguments else 'nothing'}"
            )
        return arguments[0]
    return function


def _persistent_load(pid: Any, storage: Callable[[StorageType, str, int], Storage]) -> Storage:
    """Returns the storage of a persistent id: "storage", its type, key, device and length."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or type(pid[0]) is not str or pid[0] != "storage":
        raise InvalidTorchFile(f"expected a storage, found {type(pid).__name__}")
    kind, key, _, numel = pid[1:5]
    if not isinstance(kind, StorageType) or not isinstance(key, str) or not _is_count(numel):
        raise InvalidTorchFile("expected a storage, found something else under its name")
    if len(pid) == 6 and pid[5] is not None:
        raise InvalidTorchFile("views between storages, as in files before torch 0.4, are not supported")
    return storage(kind, key, numel)


def _check_geometry(storage: Any, offset: Any, size: Any, stride: Any) -> TensorView:
    """Returns the view of a storage; raises unless all of it lies inside the storage."""
    if (
        not isinstance(storage, Storage)
        or not isinstance(size, tuple)
        or not isinstance(stride, tuple)
        # The lengths first: otherwise a long tuple would be looked through for each of many tensors.
        or len(size) != len(stride)
        or len(size) > MAX_RANK
        or not all(map(_is_count, (offset, *size, *stride)))
    ):
        raise InvalidTorchFile("expected a tensor's offset, size and stride, found something else in their place")
    empty = 0 in size
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    room = storage.numel
    for n in size:
        # Division, because products of hostile sizes would not fit; a tensor never has more numbers than its storage.
        room = room // n if n else room
    if not empty and (last >= storage.numel or room < 1):
        raise InvalidTorchFile(
            f"a tensor of size {list(size)} does not fit into its storage of {storage.numel} numbers"
        )
    return TensorView(storage, 0 if empty else offset, size, stride)


def describe(value: Any) -> str:
    """Returns the kind of a value for an error message, without looking into it."""
    return value.name.replace(" ", ".") if isinstance(value, Global) else type(value).__name__


def _is_ignored(value: Any) -> bool:
    return isinstance(value, Global) and value.name in IGNORED_GLOBALS


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
