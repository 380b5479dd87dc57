"""Loading: from files to the leaves of an MPT, tensor by tensor, without torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import DTypeLike

from mpt_eqx.checkpoint.info import DTYPES, CheckpointInfo, TensorInfo, checkpoint_info
from mpt_eqx.checkpoint.names import EMBEDDING, HEAD, canonical_name, with_leaves
from mpt_eqx.errors import CheckpointError, first_of
from mpt_eqx.model import MPT


def from_pretrained(
    source: str | Path,
    *,
    dtype: DTypeLike | None = None,
    device: jax.Device | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    config_overrides: Mapping[str, Any] | None = None,
    check_finite: bool = False,
    progress: bool | None = None,
) -> MPT:
    """Returns the model of a checkpoint; every tensor must be there once, with the right shape.

    Args:
        source: a directory, or a Hub repository id "owner/name". A directory of that name wins.
        dtype: "float32", "bfloat16" or "float16" to convert to; None keeps what is stored.
        device: where the weights go; None means JAX's default device.
        revision: branch, tag or commit of the repository.
        subfolder: directory within `source` that holds the checkpoint.
        cache_dir: where downloads are kept instead of huggingface_hub's own cache.
        token: access token, or True for the one stored by `hf auth login`.
        local_files_only: use only what is in the cache.
        config_overrides: keys of config.json to replace, nested as there, such as {"max_seq_len": 4096}.
        check_finite: refuse tensors that hold NaN or infinity.
        progress: a bar on stderr; None means if stderr is a terminal.

    Raises:
        CheckpointError: no checkpoint is there, it cannot be read, or its tensors do not fit its configuration.
        ConfigError: its config.json is not one of a supported MPT.
    """
    info = checkpoint_info(
        source,
        revision=revision,
        subfolder=subfolder,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        config_overrides=config_overrides,
    )
    if info.problems:
        raise CheckpointError(f"{info.directory}: config.json and the tensors disagree: {'; '.join(info.problems)}")
    target = _target_dtype(info, dtype)
    arrays = _read(info, target, device, check_finite, progress)
    head_is_tied = HEAD in arrays and info.config.tie_word_embeddings
    if head_is_tied and not np.array_equal(arrays[HEAD], arrays[EMBEDDING]):
        raise CheckpointError(
            f"{info.directory}: {HEAD} differs from {EMBEDDING}, although config.json ties them; "
            f"load with config_overrides={{'tie_word_embeddings': False}} to use both"
        )
    skeleton = eqx.filter_eval_shape(MPT, info.config, key=jax.random.key(0))
    return with_leaves(skeleton, arrays)


def _target_dtype(info: CheckpointInfo, dtype: DTypeLike | None) -> np.dtype:
    stored = {tensor.dtype: tensor.name for tensor in info.tensors}
    if dtype is None:
        if len(stored) > 1:
            examples = [f"{name} ({kind})" for kind, name in stored.items()]
            raise CheckpointError(
                f"{info.directory}: expected tensors of one type, found {first_of(examples)}; pass dtype="
            )
        return jax.numpy.dtype(next(iter(stored)))
    try:
        target = jax.numpy.dtype(dtype)
    except TypeError:
        target = None
    if target is None or target.name not in DTYPES.values():
        raise CheckpointError(f"dtype: expected {' or '.join(DTYPES.values())}, found {dtype!r}")
    return target


def _read(
    info: CheckpointInfo, dtype: np.dtype, device: jax.Device | None, check_finite: bool, progress: bool | None
) -> dict[str, jax.Array]:
    from safetensors import safe_open
    from tqdm import tqdm

    by_file: dict[str, list[TensorInfo]] = {}
    for tensor in info.tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    arrays = {}
    bar = tqdm(
        total=sum(tensor.size * jax.numpy.dtype(tensor.dtype).itemsize for tensor in info.tensors),
        desc=f"loading {info.directory.name}",
        unit="B",
        unit_scale=True,
        disable=None if progress is None else not progress,
        leave=False,
    )
    with bar:
        for file, tensors in by_file.items():
            with safe_open(info.directory / file, framework="np") as opened:
                for tensor in tensors:
                    if (name := canonical_name(tensor.name)) is None:
                        continue
                    array = opened.get_tensor(tensor.name)
                    if check_finite and not np.isfinite(array).all():
                        raise CheckpointError(f"{info.directory / file}: {tensor.name} holds NaN or infinity")
                    bar.update(array.nbytes)
                    arrays[name] = jax.device_put(array.astype(dtype, copy=False), device)
    return arrays
