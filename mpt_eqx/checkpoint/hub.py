"""Where a checkpoint is: a local directory, or a repository of the Hugging Face Hub, through huggingface_hub."""

import os
from pathlib import Path

from mpt_eqx.errors import CheckpointError

FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def find_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    patterns: tuple[str, ...] = FILES,
) -> Path:
    """Returns the local directory of a checkpoint, after downloading what of a Hub repository is not cached yet.

    Args:
        source: a directory, or a repository id "owner/name". A directory of that name wins.
        revision: branch, tag or commit of the repository.
        subfolder: directory within `source` that holds the checkpoint.
        cache_dir: where downloads are kept instead of huggingface_hub's own cache.
        token: access token, or True for the one stored by `hf auth login`.
        local_files_only: use only what is in the cache.
        patterns: which files to download.

    Raises:
        CheckpointError: there is no such directory, or the repository cannot be had.
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        directory = directory / (subfolder or "")
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory; check subfolder={subfolder!r}")
        return directory
    if directory.exists():
        raise CheckpointError(
            f"{source}: expected a directory, found a file; pass the directory that holds config.json"
        )
    if _looks_like_a_path(source):
        raise CheckpointError(f"{source}: no such directory")

    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            str(source),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=[f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns],
        )
    except hub.HFValidationError as error:
        raise CheckpointError(
            f"{source}: no such directory, and not a repository id, which looks like owner/name"
        ) from error
    except hub.GatedRepoError as error:
        raise CheckpointError(
            f"{source}: the repository is gated; ask for access on its page, then pass token= or run `hf auth login`"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{source}: no such directory, and no such repository on the Hub (or a private one: pass token=); "
            f"the original mosaicml/mpt-* repositories have been reported gone since December 2025"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise CheckpointError(f"{source}: the repository has no revision {revision!r}") from error
    except hub.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{source}: no such directory, and not completely in the Hub's local cache, while the Hub itself is out of "
            f"reach (no connection, HF_HUB_OFFLINE, or local_files_only=True)"
        ) from error
    except (hub.HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{source}: no such directory, and the Hub cannot be reached ({_line(error)})") from error
    return find_checkpoint(snapshot, subfolder=subfolder)


def _looks_like_a_path(source: str | Path) -> bool:
    text = os.fspath(source)
    first, *rest = Path(text).parts or ("",)
    return (
        isinstance(source, Path)
        or text.startswith((".", "~", os.sep))
        or len(rest) != 1
        or text.endswith(os.sep)
        or Path(first).is_dir()
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
