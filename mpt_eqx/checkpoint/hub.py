"""Where a checkpoint is: a local directory, or a repository of the Hugging Face Hub, through huggingface_hub."""

import os
from pathlib import Path

from mpt_eqx.errors import CheckpointError

# Downloaded first, then weights of the first kind that the repository has.
FILES = (
    *("config.json", "generation_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)
WEIGHTS = (
    ("model*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ("*.gguf",),
)


def find_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    with_weights: bool = True,
) -> Path:
    """Returns the local directory of a checkpoint, after downloading what of a Hub repository is not cached yet.

    A file that exists is returned as it is.

    Args:
        source: a directory, a file, or a repository id "owner/name". What is on the disk wins.
        revision: branch, tag or commit of the repository.
        subfolder: directory within `source` that holds the checkpoint.
        cache_dir: where downloads are kept instead of huggingface_hub's own cache.
        token: access token, or True for the one stored by `hf auth login`.
        local_files_only: use only what is in the cache.
        with_weights: whether to download weights, too.

    Raises:
        CheckpointError: there is no such directory, or the repository cannot be had.
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        directory = directory / (subfolder or "")
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory; check subfolder={subfolder!r}")
        return directory
    if directory.is_file():
        return directory
    if _looks_like_a_path(source):
        raise CheckpointError(f"{source}: no such directory")

    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    def download(patterns: tuple[str, ...]) -> Path:
        folder = snapshot_download(
            str(source),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=[f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns],
        )
        return Path(folder) / (subfolder or "")

    try:
        snapshot = download(FILES)
        for patterns in WEIGHTS if with_weights else ():
            snapshot = download(patterns)
            if any(path for pattern in patterns for path in snapshot.glob(pattern)):
                break
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
            f"the original mosaicml/mpt-* repositories have been reported gone since December 2025: "
            f"use a local copy, a re-upload under another owner, or a GGUF file"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise CheckpointError(f"{source}: the repository has no revision {revision!r}") from error
    except getattr(hub, "IncompleteSnapshotError", ()) as error:  # since huggingface_hub 2
        raise CheckpointError(
            f"{source}: only a part of it is in the Hub's local cache, and the Hub itself is out of reach; "
            f"download it again with a connection ({_line(error)})"
        ) from error
    except hub.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{source}: no such directory, and not completely in the Hub's local cache, while the Hub itself is out of "
            f"reach (no connection, HF_HUB_OFFLINE, or local_files_only=True)"
        ) from error
    except Exception as error:  # the transport beneath the Hub's library has errors of its own
        raise CheckpointError(
            f"{source}: no such directory, and the Hub cannot be reached or the download broke off ({_line(error)})"
        ) from error
    if not snapshot.is_dir():
        raise CheckpointError(f"{source}: the repository has no directory {subfolder!r}; check subfolder=")
    return snapshot


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
    return " ".join(str(error).split())[:300] or type(error).__name__
