"""Models for other programs: which tensors are written for one, and GGUF files for llama.cpp."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpt_eqx.checkpoint.atomic import replace_file
from mpt_eqx.checkpoint.formats.gguf_vocabulary import Vocabulary, read_vocabulary
from mpt_eqx.checkpoint.formats.gguf_writer import BLOCKS, TYPES, import_gguf, write_gguf
from mpt_eqx.checkpoint.formats.safetensors import TensorToWrite
from mpt_eqx.checkpoint.names import named_leaves
from mpt_eqx.checkpoint.progress import byte_bar
from mpt_eqx.checkpoint.savable import check_savable
from mpt_eqx.checkpoint.save import text_of, to_write, whole_tensors
from mpt_eqx.config import MPTConfig
from mpt_eqx.config.programs import Difference, computed_by, differences
from mpt_eqx.errors import CheckpointError, first_of
from mpt_eqx.model import MPT
from mpt_eqx.model.stacked import unstack
from mpt_eqx.surgery.quantization import skeleton

# What GGUF calls the types of arrays.
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Target(NamedTuple):
    """What is written for a program.

    Attributes:
        config: what it computes.
        tensors: its tensors, by canonical name.
        differences: what it ignores or computes otherwise.
    """

    config: MPTConfig
    tensors: list[TensorToWrite]
    differences: list[Difference]


def save_gguf(
    model: MPT,
    path: str | Path,
    *,
    type: str | None = None,
    companions_from: str | Path | None = None,
    lossy: bool = False,
) -> list[Difference]:
    """Writes a model as a GGUF file for llama.cpp, in one step; returns what llama.cpp ignores of it.

    Matrices, the embedding among them, are written in `type`; norms, biases and learned positions in float32.

    Args:
        model: the model; not a quantised one.
        path: the file, which ends in .gguf.
        type: "F32", "F16", "BF16", "Q8_0" or "Q4_0"; None for that of the model's arrays.
        companions_from: the checkpoint that the model was made from, for its tokenizer, as in `save_pretrained`. None
            for a file that takes token ids only.
        lossy: write what llama.cpp computes of a model, where it does not compute the model itself.

    Raises:
        CheckpointError: llama.cpp does not compute this model, the type does not fit, the file cannot be written, or
            `save_pretrained` would refuse the model.
    """
    path = gguf_path(path)
    model = unstack(model) if isinstance(model, MPT) else model
    quantization, _ = check_savable(model)
    if quantization is not None:
        raise CheckpointError(
            f"model: expected weights that are not quantised, found {quantization.scheme}; quantise what it was made "
            f"from with type='Q8_0' or 'Q4_0'"
        )
    if model.layout is not None and model.layout.several_processes:
        raise CheckpointError(
            "model: expected one process, found a model on several; write it with save_pretrained and convert that"
        )
    tensors = {name: to_write(name, parts) for name, parts in whole_tensors(model).items()}
    files = {} if companions_from is None else text_of(companions_from)[0]
    vocabulary = read_vocabulary(files, model.config.vocab_size)
    target = target_for("llama.cpp", model.config, tensors, lossy, vocabulary)
    write_target(path, target, type, vocabulary, show=False)
    return target.differences


def gguf_path(path: str | Path) -> Path:
    """Returns where a GGUF file is written to.

    Raises:
        CheckpointError: the name does not end in .gguf, or the gguf library is missing.
    """
    path = Path(path)
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path}: expected a file whose name ends in .gguf, found another name")
    import_gguf(path)
    return path


def target_for(
    program: str,
    config: MPTConfig,
    tensors: Mapping[str, TensorToWrite],
    lossy: bool,
    vocabulary: Vocabulary | None = None,
) -> Target:
    """Returns what is written of a model for a program.

    Args:
        program: "transformers", "llama.cpp" or "llm-foundry".
        config: the model's configuration.
        tensors: its tensors by canonical name.
        lossy: accept what the program ignores.
        vocabulary: the tokenizer, for llama.cpp.

    Raises:
        CheckpointError: the program does not compute this model, or, with `lossy`, none with its matrices.
        ConfigError: there is no such program.
    """
    computed = computed_by(program, config)
    found = differences(program, config)
    found += (
        [Difference("tokenizer", vocabulary.model, problem) for problem in vocabulary.problems] if vocabulary else []
    )
    lines = "; ".join(map(str, found))
    chosen, lost = [], []
    for name, leaf in named_leaves(skeleton(computed)).items():
        names = [name] if name in tensors else [name.replace(".Wqkv.", f".{part}.") for part in ("Wq", "Wk", "Wv")]
        parts = [tensors[part] for part in names if part in tensors]
        rows = sum(part.shape[0] for part in parts)
        if len(parts) != len(names) or (rows, *parts[0].shape[1:]) != tuple(leaf.shape):
            lost.append(f"{name} of shape {list(leaf.shape)}")
        else:
            chosen.append(parts[0] if len(parts) == 1 else _joined(name, leaf.shape, parts))
    if lost:
        raise CheckpointError(
            f"expected a model that {program} can compute, found one that it has no place for ({lines}); it asks for "
            f"{first_of(lost)}"
        )
    if found and not lossy:
        raise CheckpointError(
            f"expected a model that {program} computes as it is, found {lines}; lossy=True, or --lossy, writes what "
            f"{program} computes instead"
        )
    return Target(computed, chosen, found)


def write_target(path: Path, target: Target, type: str | None, vocabulary: Vocabulary, *, show: bool) -> None:
    """Writes a GGUF file in one step.

    Args:
        path: the file.
        target: what is written, of `target_for`.
        type: as in `save_gguf`.
        vocabulary: the tokenizer.
        show: whether a bar is shown.

    Raises:
        CheckpointError: the type does not fit, or the file cannot be written.
    """
    matrices = [tensor for tensor in target.tensors if len(tensor.shape) == 2]
    stored = {tensor.dtype.name for tensor in matrices}
    if type is None and (len(stored) > 1 or not stored <= NAMES.keys()):
        raise CheckpointError(
            f"type: expected one with matrices of {' and '.join(sorted(stored))}; pass {' or '.join(TYPES)}"
        )
    type = NAMES[stored.pop()] if type is None else type
    if type not in TYPES:
        raise CheckpointError(f"type: expected {' or '.join(TYPES)}, found {type!r}")
    block = BLOCKS.get(type, 1)
    if odd := [f"{tensor.name} with {tensor.shape[1]}" for tensor in matrices if tensor.shape[1] % block]:
        raise CheckpointError(
            f"type: expected rows of a multiple of {block} for {type}, found {first_of(odd)}; take F16 or BF16"
        )

    def write(new: Path) -> None:
        total = sum(tensor.nbytes for tensor in target.tensors)
        with byte_bar(f"writing {path.name}", total, show) as bar:
            write_gguf(
                new, target.config, target.tensors, type, vocabulary=vocabulary, name=path.stem, progress=bar.update
            )

    try:
        replace_file(path, write)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


def _joined(name: str, shape: Sequence[int], parts: Sequence[TensorToWrite]) -> TensorToWrite:
    """Returns a tensor of parts, one below the other."""
    read: Callable[[], np.ndarray] = lambda: np.concatenate([part.read() for part in parts])  # noqa: E731
    return TensorToWrite(name, tuple(shape), parts[0].dtype, read)
