"""Where a checkpoint is: on the disk, or in a repository of the Hugging Face Hub, through huggingface_hub."""

import glob
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mpt_eqx.checkpoint.checkpoint_files import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    INDEX,
    TORCH_INDEX,
    adapter_error,
    files_of,
    read_index,
    series_of,
    weight_names,
)
from mpt_eqx.checkpoint.companions import PATTERNS, TEMPLATES
from mpt_eqx.checkpoint.formats.detect import SUFFIXES, WeightFile
from mpt_eqx.checkpoint.formats.safetensors import DTYPES
from mpt_eqx.checkpoint.formats.tensors import TensorInfo
from mpt_eqx.checkpoint.progress import is_shown
from mpt_eqx.errors import CheckpointError, first_of

T = TypeVar("T")

# What is downloaded besides the weights, as patterns of names.
SMALL = ("config.json", "adapter_config.json", f"{TEMPLATES}/*.jinja", *PATTERNS)


class _Repository(NamedTuple):
    """A repository, and how to get at it.

    Attributes:
        source: as the user wrote it.
        id: owner/name.
        file: path in it of the one weight file that is meant, or "".
        folder: path in it of the checkpoint's directory, or "".
        options: revision, cache_dir and token.
        offline: use only what is in the cache.
    """

    source: str
    id: str
    file: str
    folder: str
    options: dict[str, Any]
    offline: bool

    def place(self, snapshot: str, name: str = "") -> Path:
        """A file of the checkpoint, or its directory, on the disk."""
        return Path(snapshot, self.folder, name)


class Headers(NamedTuple):
    """The headers of a repository's safetensors.

    Attributes:
        directory: where the small files were downloaded to.
        files: the tensors of each weight file, whose `read` raises.
        weight_map: which file holds each tensor, if there is an index.
        bytes: size of the weight files.
    """

    directory: Path
    files: list[WeightFile]
    weight_map: dict[str, str]
    bytes: int


def find_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    with_weights: bool = True,
    progress: bool | None = None,
) -> Path:
    """Returns the local directory of a checkpoint, after downloading the files of a repository that are not cached.

    Where `source` names a file, on the disk or in a repository, that file is returned.

    Args:
        source: a directory, a file, a repository id "owner/name", or a weight file in one. A local path takes
            precedence.
        revision: branch, tag or commit of the repository.
        subfolder: directory within `source` that holds the checkpoint.
        cache_dir: where downloads are kept instead of huggingface_hub's own cache.
        token: access token, or True for the one stored by `hf auth login`.
        local_files_only: use only what is in the cache.
        with_weights: whether to download weights.
        progress: show huggingface_hub's bars on stderr; None for when stderr is a terminal.

    Raises:
        CheckpointError: there is no such directory, or the repository cannot be had.
    """
    if (local := _local(source, subfolder)) is not None:
        return local
    repository = _repository(source, revision, subfolder, cache_dir, token, local_files_only)

    def find() -> Path:
        reached, names = _listed(repository) if with_weights else (repository, {})
        chosen = _chosen(reached, names) if with_weights else []
        snapshot = _download(reached, chosen, progress)
        if chosen and chosen[0] in (INDEX, TORCH_INDEX):
            shards = sorted(set(read_index(reached.place(snapshot, chosen[0])).values()))
            snapshot = _download(reached, [*chosen, *shards], progress)
        return reached.place(snapshot, chosen[0] if repository.file and chosen else "")

    place = _explained(repository, find)
    if not place.exists():
        raise CheckpointError(f"{source}: the repository has no directory {subfolder!r}; check subfolder=")
    return place


def fetch_headers(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Headers | None:
    """Returns the headers of the safetensors in a repository, after downloading the small files.

    None where that is of no use: the source is on the disk, the Hub is out of reach, or the format is another. Then
    `find_checkpoint` finds the files. Arguments as there.

    Raises:
        CheckpointError: the repository cannot be had, or its weights are damaged.
    """
    if _local(source, subfolder) is not None:
        return None
    repository = _repository(source, revision, subfolder, cache_dir, token, local_files_only)

    def fetch() -> Headers | None:
        reached, names = _listed(repository)
        chosen = _chosen(reached, names)
        if reached.offline or not chosen[0].endswith((".safetensors", INDEX)):
            return None
        indexed = chosen == [INDEX]
        snapshot = _download(reached, chosen if indexed else [], False)
        index = read_index(reached.place(snapshot, INDEX)) if indexed else {}
        shards = sorted(set(index.values())) if indexed else chosen
        if absent := [name for name in shards if name not in names]:
            raise CheckpointError(
                f"{source}: expected the files that {INDEX} names; the repository does not have {first_of(absent)}"
            )
        # The snapshot is called as its commit.
        files = [_remote_file(reached, name, Path(snapshot).name) for name in shards]
        return Headers(reached.place(snapshot), files, index, sum(names[name] for name in shards))

    return _explained(repository, fetch)


def _local(source: str | Path, subfolder: str | None) -> Path | None:
    """Returns the directory or file on the disk; None if `source` may name a repository."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / (subfolder or "")
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such directory; check subfolder={subfolder!r}")
        return path
    if path.is_file():
        return path
    if _looks_like_a_path(source):
        raise CheckpointError(f"{source}: no such directory")
    return None


def _looks_like_a_path(source: str | Path) -> bool:
    text = os.fspath(source)
    first, *rest = Path(text).parts or ("",)
    return (
        isinstance(source, Path)
        or text.startswith((".", "~", os.sep))
        or "\\" in text  # of a path on Windows, and in no repository id
        or not rest
        or (len(rest) > 1 and not text.endswith(SUFFIXES))
        or text.endswith(os.sep)
        or Path(first).is_dir()
    )


def _repository(
    source: str | Path,
    revision: str | None,
    subfolder: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    offline: bool,
) -> _Repository:
    owner, name, *path = str(source).split("/")
    file = "/".join(path)
    if subfolder and file:
        raise CheckpointError(f"{source}: names a file, so that subfolder={subfolder!r} cannot be meant; leave it out")
    folder = PurePosixPath(file).parent.as_posix() if file else (subfolder or "").strip("/")
    options = {"revision": revision, "cache_dir": cache_dir, "token": token}
    return _Repository(str(source), f"{owner}/{name}", file, "" if folder == "." else folder, options, offline)


def _listed(repository: _Repository) -> tuple[_Repository, Mapping[str, int]]:
    """Returns the files in the checkpoint's directory with their sizes.

    While the Hub is out of reach they are those in the cache, and the returned repository is offline.
    """
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    refused: Exception | None = None
    if not repository.offline:
        options = {key: repository.options[key] for key in ("revision", "token")}
        try:
            listed = HfApi().model_info(repository.id, files_metadata=True, **options).siblings or ()
            paths = {PurePosixPath(file.rfilename): file.size or 0 for file in listed}
            return repository, {
                path.name: size for path, size in paths.items() if path.parent == PurePosixPath(repository.folder)
            }
        except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError):
            raise
        except hub.HfHubHTTPError as error:
            refused = error
        except Exception:
            pass  # no connection: the transport beneath the Hub's library has errors of its own
        repository = repository._replace(offline=True)
    try:
        directory = repository.place(_download(repository, [], False))
    except hub.LocalEntryNotFoundError as error:
        raise refused or error from None
    found = directory.iterdir() if directory.is_dir() else ()
    return repository, {path.name: path.stat().st_size for path in found if path.is_file()}


def _chosen(repository: _Repository, names: Collection[str]) -> list[str]:
    """Returns the names of the files to download first: the weights, or their index."""
    where = "the Hub's local cache, while the Hub is out of reach" if repository.offline else "the repository"
    if repository.file:
        name = PurePosixPath(repository.file).name
        if name not in names:
            held = first_of(weight_names(names)) or "no weights"
            raise CheckpointError(f"{repository.source}: expected this file in {where}, found {held}")
        if re.fullmatch(ADAPTER_WEIGHTS, name):
            raise _adapter_error(repository)
        return series_of(name, names) or [name]
    if not names and repository.folder:
        raise CheckpointError(
            f"{repository.source}: expected a directory {repository.folder!r} in {where}, found none; check subfolder="
        )
    found = weight_names(names)
    if ADAPTER in names and not found:
        raise _adapter_error(repository)
    if found and series_of(found[0], names) == found:
        return found
    if len(found) > 1:
        example = PurePosixPath(repository.id, repository.folder, found[0])
        raise CheckpointError(
            f"{repository.source}: expected one file of weights or an index of several, found {first_of(found)}; "
            f"pass one of them, such as '{example}'"
        )
    if not found:
        raise CheckpointError(f"{repository.source}: expected weights in {where}, found none of {', '.join(SUFFIXES)}")
    return found


def _adapter_error(repository: _Repository) -> CheckpointError:
    directory = repository.place(_download(repository, [], False))
    return adapter_error(Path(repository.source), files_of(directory))


def _download(repository: _Repository, names: Collection[str], progress: bool | None) -> str:
    """Downloads the named files of the checkpoint and the small ones there are; returns the snapshot's directory."""
    from huggingface_hub import snapshot_download
    from tqdm import tqdm

    class NoBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    folder = glob.escape(repository.folder)
    snapshot: str = snapshot_download(
        repository.id,
        local_files_only=repository.offline,
        allow_patterns=[PurePosixPath(folder, name).as_posix() for name in (*SMALL, *map(glob.escape, names))],
        tqdm_class=None if is_shown(progress) else NoBar,
        **repository.options,
    )
    return snapshot


def _remote_file(repository: _Repository, name: str, commit: str) -> WeightFile:
    """Returns the tensors of a safetensors file from its header, which is all that is fetched."""
    from huggingface_hub import HfApi

    header = HfApi().parse_safetensors_file_metadata(
        repository.id,
        PurePosixPath(repository.folder, name).as_posix(),
        revision=commit,
        token=repository.options["token"],
    )

    def read() -> np.ndarray:
        raise CheckpointError(f"{repository.source}: only the header of {name} was fetched; use from_pretrained")

    tensors = [
        TensorInfo(
            tensor, tuple(entry.shape), DTYPES[entry.dtype].name if entry.dtype in DTYPES else entry.dtype, name, read
        )
        for tensor, entry in header.tensors.items()
    ]
    return WeightFile("safetensors", tensors, None)


def _explained(repository: _Repository, function: Callable[[], T]) -> T:
    """Returns function(); any error of the Hub's library becomes a CheckpointError that explains it."""
    try:
        return function()
    except CheckpointError:
        raise
    except Exception as error:  # the transport beneath the Hub's library has errors of its own
        raise CheckpointError(f"{repository.source}: {_reason(repository, error)}") from error


def _reason(repository: _Repository, error: BaseException) -> str:
    from huggingface_hub import errors as hub

    if isinstance(error, hub.LocalEntryNotFoundError) and isinstance(error.__cause__, hub.HfHubHTTPError):
        error = error.__cause__  # the cache was looked into because the Hub gave this answer
    status = getattr(getattr(error, "response", None), "status_code", None)
    match error:
        case hub.HFValidationError():
            return "no such directory, and not a repository id, which looks like owner/name"
        case hub.GatedRepoError():
            return "the repository is gated; ask for access on its page, then pass token= or run `hf auth login`"
        case hub.RevisionNotFoundError():
            return f"the repository has no revision {repository.options['revision']!r}"
        case hub.SafetensorsParsingError():
            return f"expected safetensors, found something else or a part ({_line(error)})"
        case hub.HfHubHTTPError() if status == 404 or isinstance(error, hub.RepositoryNotFoundError):
            return (
                "no such directory, and no such repository on the Hub (or a private one: pass token=); the original "
                "mosaicml/mpt-* repositories have been reported gone since December 2025: use a local copy, a "
                "re-upload under another owner, or a GGUF file"
            )
        case hub.HfHubHTTPError():
            advice = "pass token=, or another one" if status in (401, 403) else "try again later"
            return f"no such directory, and the Hub answers with status {status}; {advice} ({_line(error)})"
        case hub.LocalEntryNotFoundError() if hasattr(error, "snapshot_path"):  # since huggingface_hub 2
            return (
                f"only a part of it is in the Hub's local cache, and the Hub itself is out of reach; "
                f"download it again with a connection ({_line(error)})"
            )
        case hub.LocalEntryNotFoundError():
            return (
                "no such directory, and not completely in the Hub's local cache, while the Hub itself is out of reach "
                "(no connection, HF_HUB_OFFLINE, or local_files_only=True)"
            )
    return f"the download from the Hub broke off; try again ({_line(error)})"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
