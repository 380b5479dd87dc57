"""Torch files before torch 1.6: five pickles, then the storages, one after another."""

from typing import Any

import numpy as np

from mpt_eqx.checkpoint.formats.pickle_machine import MAX_PICKLE, InvalidTorchFile, Storage, StorageType, unpickle
from mpt_eqx.errors import printable

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


def read_legacy(data: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns the content of a file, its tensors as views of storages, and the bytes of the storages by key.

    Args:
        data: the bytes of the file, mapped.

    Raises:
        InvalidTorchFile: it is no torch file, or of a version before 0.1.10.
        Exception: the file is damaged; of any kind.
    """
    head = bytes(data[:MAX_PICKLE])
    if head[257:262] == b"ustar":
        raise InvalidTorchFile("expected a file of torch 0.1.10 or later, found an older one, a tar archive")
    wanted: dict[str, Storage] = {}

    def storage(kind: StorageType, key: str, numel: int) -> Storage:
        if (first := wanted.setdefault(key, Storage(key, kind.dtype, numel))) != (key, kind.dtype, numel):
            raise InvalidTorchFile(f"storage '{printable(key)}': expected one type and length, found two")
        return first

    at, parts = 0, []
    for _ in range(5):
        part, length = unpickle(head[at:], storage)
        parts.append(part)
        at += length
    magic, protocol, system, content, keys = parts
    if magic != MAGIC or protocol != PROTOCOL:
        raise InvalidTorchFile("expected a torch file, found another pickle")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise InvalidTorchFile("expected little-endian numbers, found big-endian ones")
    if (
        not isinstance(keys, list)
        or len(keys) != len(wanted)
        or not all(isinstance(key, str) for key in keys)
        or set(keys) != set(wanted)
    ):
        raise InvalidTorchFile("the storages that tensors use are not those that the file lists")
    storages = {}
    for key in keys:
        numel = int.from_bytes(bytes(data[at : at + 8]), "little")
        size = wanted[key].numel * wanted[key].dtype.itemsize
        if numel != wanted[key].numel or at + 8 + size > len(data):
            raise InvalidTorchFile(
                f"storage '{printable(key)}': expected {wanted[key].numel} numbers, found {numel} or the file's end"
            )
        storages[key] = data[at + 8 : at + 8 + size]
        at += 8 + size
    return content, storages
