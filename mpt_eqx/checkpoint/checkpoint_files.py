"""The files of a checkpoint on the disk: which of a directory's files count, and reading them while they are replaced.

During a save a new config.json may exist under a temporary name; `atomic` describes the steps.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from mpt_eqx.checkpoint.formats.detect import SUFFIXES
from mpt_eqx.config.json_file import read_json_object
from mpt_eqx.config.validation import shown
from mpt_eqx.errors import CheckpointError, ConfigError, first_of, printable

T = TypeVar("T")

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_WEIGHTS = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
SHARD = r"model-(?:([0-9a-f]{8})-)?\d{5}-of-\d{5}\.safetensors"
SERIES = r"(.+)-(\d{5})-of-(\d{5})(\.\w+)"
# What trainers keep beside the weights.
STATE = r"training_args\.bin|(optimizer|scheduler|scaler|rng_state|random_states|trainer_state)(_\d+)*\.(bin|pt|pth)"
# Formats of weights that are not read, by how their files' names end.
OTHERS = {".msgpack": "Flax", ".h5": "TensorFlow", ".onnx": "ONNX", ".xml": "OpenVINO", ".ot": "Rust"}
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = r"adapter_model\.(safetensors|bin)"
PENDING = r"(.+)\.mpt_eqx-([0-9a-f]{8})"
MAX_INDEX = 4 * 2**20
MAX_SHARDS = 10_000
ATTEMPTS = 200  # to read a checkpoint that is being replaced


class CheckpointFiles(NamedTuple):
    """The files that a checkpoint consists of.

    Attributes:
        directory: where they are.
        config: config.json, None without one.
        weights: the weight files.
        weight_map: tensor → name of its file, as the index says; empty without an index.
    """

    directory: Path
    config: Path | None
    weights: list[Path]
    weight_map: dict[str, str]


def read_consistently(place: Path, read: Callable[[CheckpointFiles], T]) -> T:
    """Returns read(files) of one checkpoint, also while another process replaces it.

    It is read again until its files are the same before and after. So nothing is read half from the old checkpoint and
    half from the new one.

    Args:
        place: directory or weight file of the checkpoint.
        read: opens the files. What is open stays as it is, whatever becomes of its name.

    Raises:
        CheckpointError: as `read`, the files are not those of a checkpoint, or they keep changing.
        ConfigError: as `read`.
    """
    for _ in range(ATTEMPTS):
        before, weights = _stamps(place), []
        try:
            files = find_files(place)
            weights = [(path, _stamp(path)) for path in files.weights]
            result = read(files)
        except (CheckpointError, ConfigError, OSError):
            if _stamps(place) == before and all(_stamp(path) == stamp for path, stamp in weights):
                raise
        else:
            if _stamps(place) == before and all(_stamp(path) == stamp for path, stamp in weights):
                return result
    raise CheckpointError(
        f"{place}: expected files that stay as they are while they are read, found them replaced {ATTEMPTS} times; "
        f"wait until nothing writes there"
    )


def find_files(place: Path) -> CheckpointFiles:
    """Returns the files of the checkpoint in a directory, or of a weight file and the config.json beside it.

    Raises:
        CheckpointError: there are no weights but those of an adapter, several that could be meant, an index that is
            wrong, or shards without one of which some are missing.
    """
    directory = place if place.is_dir() else place.parent
    found = files_of(directory)
    config = found.get(CONFIG)
    if not place.is_dir():
        if re.fullmatch(ADAPTER_WEIGHTS, place.name):
            raise adapter_error(directory, found)
        # A shard cannot be loaded without the others.
        shards = series_of(place.name, found)
        return CheckpointFiles(directory, config, [found[name] for name in shards] if shards else [place], {})
    names = weight_names(found)
    if ADAPTER in found and not names:
        raise adapter_error(directory, found)
    if names and (shards := series_of(names[0], found)) == names:
        return CheckpointFiles(directory, config, [found[name] for name in names], {})
    if len(names) != 1:
        others = [f"{name} of {OTHERS[Path(name).suffix]}" for name in found if Path(name).suffix in OTHERS]
        none = f"no weights{' but ' if others else ''}{first_of(others)}"
        several = f"several files and no index: {first_of(names)}; pass one of them"
        raise CheckpointError(
            f"{directory}: expected {WEIGHTS}, {TORCH_WEIGHTS}, an index of shards or one GGUF file, "
            f"found {several if names else none}"
        )
    path = found[names[0]]
    if path.name not in (INDEX, TORCH_INDEX):
        return CheckpointFiles(directory, config, [path], {})
    weight_map = read_index(path)
    shards = sorted(set(weight_map.values()))
    if absent := [name for name in shards if name not in found]:
        raise CheckpointError(
            f"{directory}: expected the files that {path.name} names; missing: {first_of(absent)}; "
            f"if it was downloaded, the download is not complete"
        )
    return CheckpointFiles(directory, config, [found[name] for name in shards], weight_map)


def files_of(directory: Path) -> dict[str, Path]:
    """Returns the files of a directory by name, and those of an unfinished save under their final names.

    Files with unprintable names are left out.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    try:
        found = {path.name: path for path in sorted(directory.iterdir()) if _is_plain(path)}
        pending = [match for name in found if (match := re.fullmatch(PENDING, name))]
        if pending and INDEX in found and WEIGHTS not in found:
            start = index_start(found[INDEX])
            found |= {match[1]: found[match[0]] for match in pending if f'"model-{match[2]}-' in start}
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error})") from None
    return found


def index_start(path: Path) -> str:
    """Returns the beginning of an index, long enough to name a shard."""
    with open(path, encoding="utf-8", errors="replace") as f:
        return f.read(2**16)


def weight_names(names: Collection[str]) -> list[str]:
    """Returns which of the files in a directory is the one with the weights, or the index of such files.

    Looked for in transformers' order; then any one file of a known format. None, or several, if that is not clear.
    """
    for name in (WEIGHTS, INDEX, TORCH_WEIGHTS, TORCH_INDEX):
        if name in names:
            return [name]
    others = sorted(name for name in names if Path(name).suffix in SUFFIXES)
    others = [name for name in others if not re.fullmatch(f"{STATE}|{ADAPTER_WEIGHTS}", name)]
    # Shards without an index are what a killed save left; unless there is nothing else.
    return [name for name in others if not re.fullmatch(SHARD, name)] or others


def series_of(name: str, names: Collection[str]) -> list[str]:
    """Returns the shards that belong together with one of them, by their numbers; empty if it is no shard of several.

    Raises:
        CheckpointError: some are missing, or they are of a format whose shards are no files of their own.
    """
    match = re.fullmatch(SERIES, name)
    if match is None or int(match[3]) < 2 or int(match[3]) > MAX_SHARDS:
        return []
    wanted = [f"{match[1]}-{i:05}-of-{match[3]}{match[4]}" for i in range(1, int(match[3]) + 1)]
    if missing := [name for name in wanted if name not in names]:
        raise CheckpointError(
            f"{name}: expected all {int(match[3])} shards beside each other, missing: {first_of(missing)}; if they "
            f"were downloaded, the download is not complete"
        )
    if match[4] == ".gguf":
        raise CheckpointError(
            f"{name}: expected a GGUF file in one piece, found one of {int(match[3])}; join them with llama.cpp's "
            f"llama-gguf-split --merge"
        )
    return wanted


def adapter_error(directory: Path, found: Mapping[str, Path]) -> CheckpointError:
    """Returns the error for a directory of PEFT's adapter files: what they are for, and how to load them."""
    try:
        content = read_json_object(found[ADAPTER])
    except (KeyError, ConfigError):
        content = {}
    kind, base = (content.get(key) for key in ("peft_type", "base_model_name_or_path"))
    kind, base = (printable(text) if isinstance(text, str) else None for text in (kind, base))
    of = f"for the base model '{base}'" if base else "for a base model that it does not name"
    return CheckpointError(
        f"{directory}: expected a whole model, found an adapter of PEFT ({kind or 'of unknown type'}) {of}; load that "
        f"first, and then the adapter with mpt_eqx.lora.load(model, directory)"
    )


def read_index(path: Path) -> dict[str, str]:
    """Returns which file holds each tensor.

    Raises:
        CheckpointError: it is no index, or names something else than files beside it.
    """
    try:
        weight_map = read_json_object(path, max_bytes=MAX_INDEX).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(
            f"{path}: expected a 'weight_map' from tensor names to file names, found {shown(weight_map)}"
        )
    # The name is checked, not where it leads: the Hub's cache is made of links.
    names = sorted(set(weight_map.values()))
    if strange := [n for n in names if n != Path(n).name or n in ("", ".", "..") or "\\" in n or not n.isprintable()]:
        raise CheckpointError(f"{path}: expected names of files beside it, found {first_of(strange)}")
    return weight_map


def _is_plain(path: Path) -> bool:
    return path.name.isprintable() and path.is_file()


def _stamps(place: Path) -> object:
    """Returns what changes when the config.json, the index or the one weight file of a checkpoint is replaced."""
    try:
        found = files_of(place if place.is_dir() else place.parent)
    except CheckpointError as error:
        return str(error)
    weights = [found[name] for name in weight_names(found)] if place.is_dir() else [place]
    return [_stamp(path) for path in (*weights, *(found[name] for name in (CONFIG, INDEX) if name in found))]


def _stamp(path: Path) -> tuple[str, int, int] | str:
    """Returns what changes when a file is replaced or written to."""
    try:
        status = path.stat()
    except OSError as error:
        return str(error)
    return str(path), status.st_ino, status.st_mtime_ns
