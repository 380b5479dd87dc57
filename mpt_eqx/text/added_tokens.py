"""The tokens that a checkpoint's files name beside its vocabulary: added ones, and special ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mpt_eqx.config.json_file import read_json_object
from mpt_eqx.errors import CheckpointError, printable
from mpt_eqx.text.checks import backend_errors

if TYPE_CHECKING:
    import tokenizers

FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
LARGEST = 64 * 2**20
"""The bytes that a file of tokens may have."""


class NamedToken(NamedTuple):
    """A token that a file names.

    Attributes:
        id: its id, None where no file says it.
        special: whether it is no text, and left out of decoded text.
        flags: how `tokenizers.AddedToken` finds it in text.
    """

    id: int | None
    special: bool
    flags: dict[str, bool]


def named_tokens(directory: Path) -> dict[str, NamedToken]:
    """Returns the tokens that files in a directory name, in the order of their ids.

    The files are tokenizer_config.json (`added_tokens_decoder`), added_tokens.json and special_tokens_map.json.

    Raises:
        CheckpointError: an id is no whole number, two files disagree about one, or two tokens have the same.
        ConfigError: a file is no JSON object.
    """
    settings = read_settings(directory)
    special = _special(read_settings(directory, "special_tokens_map.json")) | _special(settings)
    found = {name: NamedToken(None, True, flags) for name, flags in special.items() if name}
    listed: list[tuple[str, Any, bool, dict[str, bool]]] = [
        (name, id_, False, {}) for name, id_ in read_settings(directory, "added_tokens.json").items()
    ]
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise CheckpointError(
            f"{directory / 'tokenizer_config.json'}: expected added_tokens_decoder as an object, found "
            f"{type(decoder).__name__}"
        )
    for id_, token in decoder.items():
        if isinstance(token, dict) and isinstance(name := token.get("content"), str):
            number = int(id_) if id_.isdecimal() and id_.isascii() and len(id_) < 11 else id_
            listed.append((name, number, bool(token.get("special")), _flags(token)))
    for name, number, is_special, flags in listed:
        if not name or isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**31:
            raise CheckpointError(
                f"{directory}: expected a whole number for the added token '{printable(name)}', found "
                f"{printable(repr(number))}"
            )
        known = found.get(name)
        if known is not None and known.id not in (None, number):
            raise CheckpointError(
                f"{directory}: expected one id for the added token '{printable(name)}', found {known.id} in "
                f"added_tokens.json and {number} in tokenizer_config.json"
            )
        is_special = is_special or name in special
        found[name] = NamedToken(number, is_special, flags or (known.flags if known else {}))
    owners: dict[int, str] = {}
    for name, token in found.items():
        if token.id is not None and owners.setdefault(token.id, name) != name:
            raise CheckpointError(
                f"{directory}: expected one added token with id {token.id}, found '{printable(owners[token.id])}' and "
                f"'{printable(name)}'"
            )
    return dict(sorted(found.items(), key=lambda item: -1 if item[1].id is None else item[1].id))


def add_named_tokens(backend: "tokenizers.Tokenizer", directory: Path) -> None:
    """Adds to a tokenizer what files name and it does not have as added tokens.

    A special token without an id is added only where the vocabulary has it: no other could have been trained.

    Raises:
        CheckpointError: as `named_tokens`, or a token cannot have the id that a file says.
        ConfigError: as `named_tokens`.
    """
    import tokenizers

    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    for name, (id_, special, flags) in named_tokens(directory).items():
        known = backend.token_to_id(name)
        if known is not None and id_ not in (None, known):
            raise CheckpointError(
                f"{directory}: expected id {known} for the token '{printable(name)}', as its vocabulary has it, found "
                f"{id_} in tokenizer_config.json or added_tokens.json; make the files agree"
            )
        if name not in there and (known is not None or id_ is not None):
            token = tokenizers.AddedToken(name, special=special, **{"normalized": not special, **flags})
            with backend_errors(str(directory), CheckpointError):
                (backend.add_special_tokens if special else backend.add_tokens)([token])
            known = backend.token_to_id(name)
        if id_ is not None and known != id_:
            raise CheckpointError(
                f"{directory}: expected added tokens whose ids go on from the vocabulary's without a gap, found "
                f"'{printable(name)}' with id {id_}, which would become {known}; fill the gap with tokens that no text "
                f"has"
            )


def read_settings(directory: Path, name: str = "tokenizer_config.json") -> dict[str, Any]:
    """Returns the content of a JSON file in a directory; nothing if there is no such file.

    Raises:
        ConfigError: it is no JSON object.
    """
    path = directory / name
    return read_json_object(path, max_bytes=LARGEST, any_keys=True) if path.is_file() else {}


def _special(content: Mapping[str, Any]) -> dict[str, dict[str, bool]]:
    """Returns the special tokens that a file names, and how they are found."""
    values: list[Any] = []
    for key, value in content.items():
        if key.endswith("_token"):
            values.append(value)
        elif key == "additional_special_tokens" and isinstance(value, list):
            values += value
    found: dict[str, dict[str, bool]] = {}
    for value in values:
        name = value.get("content") if isinstance(value, dict) else value
        if isinstance(name, str):
            found[name] = _flags(value) if isinstance(value, dict) else {}
    return found


def _flags(token: Mapping[str, Any]) -> dict[str, bool]:
    return {key: token[key] for key in FLAGS if isinstance(token.get(key), bool)}
