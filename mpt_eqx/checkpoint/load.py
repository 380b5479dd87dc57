"""Loading: from files to the leaves of an MPT, tensor by tensor, without torch."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import DTypeLike

from mpt_eqx.checkpoint.arrays import CHUNK, aligned_copy, byte_bar, finite, kept_dtype, usable
from mpt_eqx.checkpoint.diagnose import stored_types
from mpt_eqx.checkpoint.formats.safetensors import DTYPES
from mpt_eqx.checkpoint.formats.tensors import TensorInfo
from mpt_eqx.checkpoint.info import CheckpointInfo, read_checkpoint
from mpt_eqx.checkpoint.load_sharded import load_sharded
from mpt_eqx.checkpoint.names import EMBEDDING, HEAD, canonical_name, with_leaves
from mpt_eqx.config import ShardingRules
from mpt_eqx.errors import CheckpointError, ShardingError, first_of
from mpt_eqx.model import MPT
from mpt_eqx.sharding.multihost import assert_same_across_processes, run_or_raise_everywhere
from mpt_eqx.sharding.shard import assert_same_mesh, with_layout
from mpt_eqx.surgery.quantization import with_zeros

FLOATS = {dtype.name: dtype for dtype in DTYPES.values()}
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
    mmap: bool = True,
    check_finite: bool = False,
    progress: bool | None = None,
) -> MPT:
    """Returns the model of a checkpoint; every tensor must be there once, with the right shape.

    Args:
        source: a directory, a .safetensors, .bin, .pt or .gguf file, a Hub repository id "owner/name", or such a file
            in a repository, "owner/name/file.gguf". What is on the disk wins.
        dtype: "float32", "bfloat16", "float16" or "float64" to convert to; None keeps what is stored, and makes
            float32 of quantised GGUF. Weights that `mpt_eqx.quantize` made stay as they are; then it is the type of
            the others and of computations.
        device: where the weights go; None means JAX's default device.
        mesh: devices among which the weights are shared, each getting its part of the files only, as with
            `mpt_eqx.sharding.shard`.
        rules: how, such as `mpt_eqx.sharding.FSDP`.
        revision: branch, tag or commit of the repository.
        subfolder: directory within `source` that holds the checkpoint.
        cache_dir: where downloads are kept instead of huggingface_hub's own cache.
        token: access token, or True for the one stored by `hf auth login`.
        local_files_only: use only what is in the cache.
        config_overrides: keys of config.json to replace, nested as there, such as {"max_seq_len": 4096}.
        mmap: on CPU, use tensors that lie suitably in the file (64-byte aligned, in the wanted type) where they are.
            The file must then stay as it is while the model lives. False copies all.
        check_finite: refuse tensors that hold NaN or infinity.
        progress: bars on stderr, and a line at the end; None means if stderr is a terminal.

    Raises:
        CheckpointError: no checkpoint is there, it cannot be read, or its tensors do not fit its configuration.
        ConfigError: its config.json is not one of a supported MPT.
        ShardingError: mesh, rules and model do not fit together; `device` is given, too, or one of the two is not.
    """
    started = time.monotonic()
    if (mesh is None) != (rules is None) or (mesh is not None and device is not None):
        given = [name for name, value in (("device", device), ("mesh", mesh), ("rules", rules)) if value is not None]
        raise ShardingError(f"expected mesh and rules together, or device alone, found {' and '.join(given)}")

    def looked_at() -> tuple[CheckpointInfo, np.dtype]:
        info = read_checkpoint(
            source,
            revision=revision,
            subfolder=subfolder,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            config_overrides=config_overrides,
            progress=progress,
        )
        refuse_problems(info)
        return info, target_dtype(info, dtype)

    several = mesh is not None and mesh.is_multi_process
    if mesh is not None:
        assert_same_mesh(mesh)
    info, target = run_or_raise_everywhere(looked_at) if several else looked_at()
    shown = sys.stderr.isatty() if progress is None else progress
    key = jax.random.key(0)
    skeleton = eqx.filter_eval_shape(lambda: with_zeros(MPT(info.config, key=key), info.quantization, target))
    if mesh is None or rules is None:
        arrays = _read(info, target, device, mmap, check_finite, shown)
    else:
        if several:
            assert_same_across_processes(
                config=info.config.to_dict(), rules=rules, dtype=target.name, quantization=info.quantization
            )
        skeleton = with_layout(skeleton, mesh, rules)

        def read() -> dict[str, jax.Array]:
            return load_sharded(info, weights(info), skeleton, target, mmap, check_finite, shown)

        arrays = run_or_raise_everywhere(read) if several else read()
    if shown:
        seconds = time.monotonic() - started
        print(f"loaded {info.directory.name}: {summary(info, arrays, seconds)}", file=sys.stderr)
    return with_leaves(skeleton, arrays)


def refuse_problems(info: CheckpointInfo) -> None:
    """Raises a CheckpointError if anything keeps the checkpoint from being loaded."""
    if info.unsettled:
        raise CheckpointError(f"{info.directory}: config.json and the tensors disagree: {'; '.join(info.unsettled)}")


def weights(info: CheckpointInfo) -> dict[str, TensorInfo]:
    """Returns the tensors that the model has, by canonical name.

    Raises:
        CheckpointError: a tied model has an lm_head, and it is not the embedding again.
    """
    named = {name: tensor for tensor in info.tensors if (name := canonical_name(tensor.name)) is not None}
    if info.config.tie_word_embeddings and HEAD in named:
        head, embedding = (named[name].read().reshape(-1) for name in (HEAD, EMBEDDING))
        if not all(
            np.array_equal(head[at : at + CHUNK], embedding[at : at + CHUNK]) for at in range(0, len(head), CHUNK)
        ):
            raise CheckpointError(
                f"{info.directory}: {HEAD} differs from {EMBEDDING}, although config.json ties them; "
                f"load with config_overrides={{'tie_word_embeddings': False}} to use both"
            )
        del named[HEAD]
    return named


def target_dtype(info: CheckpointInfo, dtype: DTypeLike | None) -> np.dtype:
    """Returns the type that the weights of a checkpoint are to have.

    Raises:
        CheckpointError: `dtype` is no type for weights, is not given where the tensors have several, or is one that
            JAX has switched off.
    """
    stored = stored_types(info.tensors)
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
    if target is None or target.name not in FLOATS:
        raise CheckpointError(f"dtype: expected {' or '.join(FLOATS)}, found {dtype!r}")
    if target == np.float64 and not jax.config.read("jax_enable_x64"):
        raise CheckpointError(
            f"{info.directory}: the weights would be float64, which JAX has switched off; "
            f"pass dtype='float32', or set jax_enable_x64"
        )
    return target


def summary(info: CheckpointInfo, arrays: Mapping[str, jax.Array], seconds: float) -> str:
    """Returns a line on what was read: parameters, bytes, types, seconds, and the most memory this process has used."""
    types = " and ".join(sorted({array.dtype.name for array in arrays.values()}))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (
        f"{info.parameters:,} parameters, {sum(array.nbytes for array in arrays.values()) / 1e9:.2f} GB {types}, "
        f"{seconds:.1f} s, peak memory {peak / 1e9:.2f} GB"
    )


def _read(
    info: CheckpointInfo, dtype: np.dtype, device: jax.Device | None, mmap: bool, check_finite: bool, progress: bool
) -> dict[str, jax.Array]:
    """Returns the arrays by canonical name."""
    (place,) = jax.device_put(np.zeros(()), device).devices()
    on_cpu = place.platform == "cpu"
    named = weights(info)

    def one(name: str) -> np.ndarray:
        tensor = named[name]
        view, wanted = tensor.read(), kept_dtype(name, tensor, dtype)
        if check_finite and not finite(view):
            raise CheckpointError(f"{info.directory / tensor.file}: {tensor.name} holds NaN or infinity")
        if not (mmap and on_cpu and usable(view, wanted)):
            view = aligned_copy(view, wanted)
        return view

    total = sum(tensor.size * kept_dtype(name, tensor, dtype).itemsize for name, tensor in named.items())
    bar = byte_bar(f"loading {info.directory.name}", total, progress)
    arrays = {}
    quantised = info.format.startswith("GGUF")
    if quantised:
        # The largest first, so that what they need on the way is given back before the memory is full.
        named = dict(sorted(named.items(), key=lambda item: -item[1].size))
    # Several at a time, because copies wait for the disk; but quantised tensors need memory of their own on the way.
    with bar, ThreadPoolExecutor(1 if quantised else READERS) as pool:
        for name, array in zip(named, _in_order(pool, one, named), strict=True):
            # In this thread, because JAX's settings may have been made for it alone.
            arrays[name] = jax.device_put(array, device)
            bar.update(array.nbytes)
    return arrays


def _in_order(pool: ThreadPoolExecutor, function: Any, names: Any) -> Iterator[np.ndarray]:
    """Yields the results in order; the first error ends what has not begun."""
    futures = [pool.submit(function, name) for name in names]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
