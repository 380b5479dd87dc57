"""Loading: from files to the leaves of an MPT, tensor by tensor, without torch."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import DTypeLike

from mpt_eqx.checkpoint.diagnose import has_float64, stored_types
from mpt_eqx.checkpoint.formats.tensors import FLOAT_NAMES, TensorInfo, release_pages
from mpt_eqx.checkpoint.host_arrays import aligned_copy, is_equal, is_finite, is_zero_copy, loaded_dtype
from mpt_eqx.checkpoint.hub import find_checkpoint
from mpt_eqx.checkpoint.info import CheckpointInfo, raise_if_blocked, read_checkpoint
from mpt_eqx.checkpoint.load_sharded import load_sharded
from mpt_eqx.checkpoint.names import EMBEDDING, HEAD, canonical_name, with_leaves
from mpt_eqx.checkpoint.progress import byte_bar, is_shown, summary
from mpt_eqx.config import ShardingRules
from mpt_eqx.errors import CheckpointError, ShardingError, first_of
from mpt_eqx.model import MPT
from mpt_eqx.sharding.mesh import assert_same_mesh
from mpt_eqx.sharding.multihost import assert_same_across_processes, run_or_raise_everywhere
from mpt_eqx.sharding.shard import with_layout
from mpt_eqx.surgery.quantization import skeleton

READERS = 4  # tensors that are copied at the same time


def from_pretrained(
    source: str | Path,
    *,
    dtype: DTypeLike | None = None,
    device: jax.Device | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    config_overrides: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    mmap: bool = True,
    check_finite: bool = False,
    progress: bool | None = None,
) -> MPT:
    """Returns the model of a checkpoint; every tensor must be there once, with the right shape.

    Args:
        source: a directory, a .safetensors, .bin, .pt or .gguf file, a Hub repository id "owner/name", or such a file
            in a repository, "owner/name/file.gguf". A local path takes precedence.
        dtype: "float32", "bfloat16", "float16" or "float64" to convert to; None keeps the stored type, or several
            where `save_pretrained` wrote several, and gives float32 for quantised GGUF. Weights quantised by
            `mpt_eqx.quantize` stay quantised; then it is the type of the others and of computations.
        device: device of the weights; None for JAX's default device.
        mesh: devices over which the weights are sharded, as by `mpt_eqx.sharding.shard`; each reads its shards only.
        rules: how they are sharded, such as `mpt_eqx.sharding.FSDP`.
        revision: branch, tag or commit of the repository.
        subfolder: directory within `source` that holds the checkpoint.
        cache_dir: where downloads are kept instead of huggingface_hub's own cache.
        token: access token, or True for the one stored by `hf auth login`.
        local_files_only: use only what is in the cache.
        config_overrides: keys of config.json to replace, nested as there, such as {"max_seq_len": 4096}. None
            takes away a key that is not known.
        ignore: names of tensors in the files that are no part of the model, such as ["score.*"] for another head; * is
            any text. Without it they are an error.
        mmap: on CPU, use aligned tensors of the right type in the mapped file without copying them. The file must not
            be changed in place while the model lives. False copies all tensors.
        check_finite: raise if a tensor holds NaN or infinity.
        progress: show bars on stderr and a summary at the end; None for when stderr is a terminal.

    Raises:
        CheckpointError: no checkpoint is there, it cannot be read, or its tensors do not fit its configuration.
        ConfigError: its config.json is not one of a supported MPT.
        ShardingError: mesh, rules and model do not fit together; `device` is given, too, or one of the two is not.
    """
    started = time.monotonic()
    if (mesh is None) != (rules is None) or (mesh is not None and device is not None):
        given = [name for name, value in (("device", device), ("mesh", mesh), ("rules", rules)) if value is not None]
        raise ShardingError(f"expected mesh and rules together, or device alone, found {' and '.join(given)}")

    def describe() -> tuple[CheckpointInfo, dict[str, TensorInfo], np.dtype | None]:
        place = find_checkpoint(
            source,
            revision=revision,
            subfolder=subfolder,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            progress=progress,
        )
        info = read_checkpoint(place, config_overrides, ignore)
        raise_if_blocked(info)
        return info, weights(info), target_dtype(info, dtype)

    several = mesh is not None and mesh.is_multi_process
    if mesh is not None:
        assert_same_mesh(mesh)
    info, tensors, target = run_or_raise_everywhere(describe) if several else describe()
    show = is_shown(progress)
    outside = target or info.weight_dtype
    assert outside is not None  # one of the two is there
    model = skeleton(info.config, info.quantization, outside)
    if mesh is None or rules is None:
        arrays = _load(info, tensors, target, device, mmap, check_finite, show)
    else:
        if several:
            assert_same_across_processes(
                config=info.config.to_dict(), rules=rules, dtype=target and target.name, quantization=info.quantization
            )
        model = with_layout(model, mesh, rules)

        def read() -> dict[str, jax.Array]:
            return load_sharded(info, tensors, model, target, mmap, check_finite, show)

        arrays = run_or_raise_everywhere(read) if several else read()
    if show:
        line = summary(info.parameters, arrays, time.monotonic() - started)
        print(f"loaded {info.directory.name}: {line}", file=sys.stderr)
    loaded: MPT = with_leaves(model, arrays)
    return loaded


def weights(info: CheckpointInfo) -> dict[str, TensorInfo]:
    """Returns the tensors of the model by canonical name.

    Raises:
        CheckpointError: a tied model has an lm_head, and it is not the embedding again.
    """
    named = {name: tensor for tensor in info.tensors if (name := canonical_name(tensor.name)) is not None}
    if info.config.tie_word_embeddings and HEAD in named:
        head = named[HEAD].read()
        if not is_equal(head, named[EMBEDDING].read()):
            raise CheckpointError(
                f"{info.directory}: {HEAD} differs from {EMBEDDING}, although config.json ties them; "
                f"load with config_overrides={{'tie_word_embeddings': False}} to use both"
            )
        release_pages(head)
        del named[HEAD]
    return named


def target_dtype(info: CheckpointInfo, dtype: DTypeLike | None) -> np.dtype | None:
    """Returns the type that the weights of a checkpoint are loaded in, None if each is in its own.

    Args:
        info: the checkpoint.
        dtype: the type that is asked for; None for the one that is stored.

    Raises:
        CheckpointError: `dtype` is no type for weights, is None where the tensors have several types, or is one that
            JAX has switched off.
    """
    stored = stored_types(info.tensors)
    if dtype is None and info.weight_dtype is not None:
        if "float64" in stored and not has_float64():
            raise CheckpointError(
                f"{info.directory}: {stored['float64']} would be float64, which JAX has switched off; "
                f"pass dtype='float32', or set jax_enable_x64"
            )
        return None
    if dtype is None and len(stored) > 1 and not info.format.startswith("GGUF"):
        examples = [f"{name} ({kind})" for kind, name in stored.items()]
        raise CheckpointError(
            f"{info.directory}: expected tensors of one type, found {first_of(examples)}; pass dtype="
        )
    wanted = dtype if dtype is not None else next(iter(stored)) if len(stored) == 1 else "float32"
    try:
        target = jax.numpy.dtype(wanted)
    except TypeError:
        target = None
    if target is None or target.name not in FLOAT_NAMES:
        raise CheckpointError(f"dtype: expected {' or '.join(FLOAT_NAMES)}, found {dtype!r}")
    if target == np.float64 and not has_float64():
        raise CheckpointError(
            f"{info.directory}: the weights would be float64, which JAX has switched off; "
            f"pass dtype='float32', or set jax_enable_x64"
        )
    return target


def _load(
    info: CheckpointInfo,
    tensors: Mapping[str, TensorInfo],
    dtype: np.dtype | None,
    device: jax.Device | None,
    mmap: bool,
    check_finite: bool,
    progress: bool,
) -> dict[str, jax.Array]:
    """Returns the arrays of a model on one device by canonical name; arguments as in `load_sharded`."""
    (place,) = jax.device_put(np.zeros(()), device).devices()
    zero_copy = mmap and place.platform == "cpu"

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        view, wanted = tensor.read(), loaded_dtype(name, tensor, dtype)
        if check_finite and not is_finite(view):
            raise CheckpointError(f"{info.directory / tensor.file}: {tensor.name} holds NaN or infinity")
        return view if zero_copy and is_zero_copy(view, wanted) else aligned_copy(view, wanted)

    total = sum(tensor.size * loaded_dtype(name, tensor, dtype).itemsize for name, tensor in tensors.items())
    names, is_gguf = list(tensors), info.format.startswith("GGUF")
    if is_gguf:
        # The largest first, so that the memory for dequantising is free again before the weights fill it.
        names.sort(key=lambda name: -tensors[name].size)
    arrays: dict[str, jax.Array] = {}
    # Several at a time, because copies wait for the disk; but dequantising needs memory of its own.
    with (
        byte_bar(f"loading {info.directory.name}", total, progress) as bar,
        ThreadPoolExecutor(1 if is_gguf else READERS) as pool,
    ):
        for name, array in zip(names, _in_order(pool, read, names), strict=True):
            # In this thread, because JAX's settings may have been made for it alone.
            arrays[name] = jax.device_put(array, device)
            bar.update(array.nbytes)
    return arrays


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[str], np.ndarray], names: Iterable[str]
) -> Iterator[np.ndarray]:
    """Yields the results in order; after an error those that have not begun are cancelled."""
    futures = [pool.submit(function, name) for name in names]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
