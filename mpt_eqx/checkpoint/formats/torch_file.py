"""Torch files without torch: the state dict of a file of either layout, as views of the mapped file.

`torch_zip` reads the layout since torch 1.6, `torch_legacy` the one before, and `pickle_machine` the pickle in both.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpt_eqx.checkpoint.formats.pickle_machine import InvalidTorchFile, TensorView, describe
from mpt_eqx.checkpoint.formats.tensors import TensorInfo
from mpt_eqx.checkpoint.formats.torch_legacy import read_legacy
from mpt_eqx.checkpoint.formats.torch_zip import read_zip
from mpt_eqx.errors import CheckpointError, first_of, printable


def read_torch(file: Path) -> list[TensorInfo]:
    """Returns the tensors of a torch file, zipped or legacy, as views of the file.

    Raises:
        CheckpointError: the file is damaged, or holds anything but tensors under names.
    """
    try:
        # A read-only map: nothing is copied until a tensor is asked for.
        data = np.memmap(file, mode="r")
        if bytes(data[:2]) == b"PK":
            content, storages = read_zip(file, data)
        else:
            content, storages = read_legacy(data)
        tensors = [_tensor_info(name, value, storages, file) for name, value in _state_dict(content).items()]
    except InvalidTorchFile as error:
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


def _tensor_info(name: str, tensor: TensorView, storages: Mapping[str, np.ndarray], file: Path) -> TensorInfo:
    def read() -> np.ndarray:
        flat = storages[tensor.storage.key].view(tensor.storage.dtype)[tensor.offset :]
        strides = [step * flat.itemsize for step in tensor.stride]
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

    return TensorInfo(name, tensor.shape, tensor.storage.dtype.name, file.name, read)


def _state_dict(content: Any) -> dict[str, TensorView]:
    """Returns the tensors by name: of a Composer checkpoint those under "state" and "model"."""
    for key in ("state", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(inner := content.get(key), dict):
            content = inner
    if not isinstance(content, dict) or not content:
        raise InvalidTorchFile(f"expected tensors under names, found {describe(content)}")
    others = [
        f"'{printable(str(name))}' ({describe(value)})"
        for name, value in content.items()
        if not isinstance(value, TensorView) or not isinstance(name, str)
    ]
    if others:
        raise InvalidTorchFile(f"expected tensors under names, found {len(others)} other things: {first_of(others)}")
    return content
