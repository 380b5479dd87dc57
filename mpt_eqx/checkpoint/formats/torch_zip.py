"""Torch files since torch 1.6: a zip archive of one pickle and the bytes of each storage, uncompressed."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mpt_eqx.checkpoint.formats.pickle_machine import MAX_PICKLE, InvalidTorchFile, Storage, StorageType, unpickle
from mpt_eqx.errors import first_of, printable

MAX_DIRECTORY = 4 * 2**20


class _BoundedReads(io.FileIO):
    """A file whose reads are bounded, because zipfile reads a directory as long as the file says it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        asked = MAX_DIRECTORY + 1 if size is None or not 0 <= size <= MAX_DIRECTORY else size
        content = super().read(asked)
        if len(content) > MAX_DIRECTORY:
            raise InvalidTorchFile(f"expected an archive with a directory of at most {MAX_DIRECTORY} bytes, found more")
        return content


def read_zip(file: Path, data: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns the content of a file, its tensors as views of storages, and the bytes of the storages by key.

    Args:
        file: the file.
        data: its bytes, mapped.

    Raises:
        InvalidTorchFile: the archive is none of torch's.
        Exception: the file is damaged; of any kind.
    """
    with _BoundedReads(file) as f, zipfile.ZipFile(f) as archive:
        members = archive.infolist()
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        raise InvalidTorchFile("two members of the archive have one name")
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise InvalidTorchFile(f"expected one data.pkl in the archive, found {first_of(pickles) or 'none'}")
    root = pickles[0].removesuffix("data.pkl")
    if outside := [name for name in names if not name.startswith(root)]:
        raise InvalidTorchFile(f"expected every member of the archive in {printable(root)}, found {first_of(outside)}")
    found = {member.filename.removeprefix(root): _member(member, data) for member in members}
    if bytes(found.get("byteorder", b"little")) != b"little":
        raise InvalidTorchFile("expected little-endian numbers, found big-endian ones")
    loaded: dict[str, np.ndarray] = {}

    def storage(kind: StorageType, key: str, numel: int) -> Storage:
        if (part := found.get(f"data/{key}")) is None:
            raise InvalidTorchFile(f"storage '{printable(key)}' is not in the archive")
        if len(part) != numel * kind.dtype.itemsize:
            raise InvalidTorchFile(
                f"storage '{printable(key)}': expected {numel * kind.dtype.itemsize} bytes, found {len(part)}"
            )
        loaded[key] = part
        return Storage(key, kind.dtype, numel)

    return unpickle(bytes(found["data.pkl"][:MAX_PICKLE]), storage)[0], loaded


def _member(member: zipfile.ZipInfo, data: np.ndarray) -> np.ndarray:
    """Returns the bytes of a member; raises unless its local header and the archive's directory agree."""
    name = printable(member.orig_filename)
    local = bytes(data[member.header_offset : member.header_offset + 30])
    flags, method, packed, size, name_length, extra_length = (
        int.from_bytes(local[at : at + width], "little")
        for at, width in ((6, 2), (8, 2), (18, 4), (22, 4), (26, 2), (28, 2))
    )
    if (member.compress_type or method) != zipfile.ZIP_STORED or (member.flag_bits | flags) & 0x2041:
        raise InvalidTorchFile(f"{name}: expected a stored member, found a compressed or encrypted one")
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
        raise InvalidTorchFile(f"{name}: the archive's directory and the member's own header disagree")
    if member.file_size != member.compress_size or start + member.file_size > len(data):
        raise InvalidTorchFile(f"{name}: expected {member.file_size} bytes, found the end of the file")
    return data[start : start + member.file_size]


def _long_sizes(extra: bytes) -> tuple[int, int]:
    """Returns a member's size and compressed size from the zip64 field among its header's extra fields."""
    while len(extra) >= 4:
        kind, length = int.from_bytes(extra[:2], "little"), int.from_bytes(extra[2:4], "little")
        if kind == 1 and length >= 16:
            return int.from_bytes(extra[4:12], "little"), int.from_bytes(extra[12:20], "little")
        extra = extra[4 + length :]
    raise InvalidTorchFile("expected the sizes of a member in its header, found none")
