"""The tokenizer of a checkpoint: encoding, decoding and streaming decoding."""

import importlib
import itertools
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpt_eqx.checkpoint.companions import gguf_files
from mpt_eqx.checkpoint.hub import find_checkpoint
from mpt_eqx.config.json_file import read_json_object
from mpt_eqx.errors import CheckpointError, MPTError
from mpt_eqx.text.added_tokens import add_named_tokens
from mpt_eqx.text.answers import answer_parts
from mpt_eqx.text.byte_bpe import VOCABULARY, load_byte_bpe
from mpt_eqx.text.chat_template import Piece, chat_pieces, encode_pieces, find_template
from mpt_eqx.text.checks import backend_errors, check_text, is_failure, token_id, token_ids
from mpt_eqx.text.sentencepiece import NAMES, SentencePieceBackend, load_sentencepiece
from mpt_eqx.text.stops import until_stop
from mpt_eqx.text.token_bytes import token_bytes

if TYPE_CHECKING:
    import tokenizers

# Tokens of a prompt that are decoded with what follows it: a character has at most four.
CONTEXT = 16


class Tokenizer:
    """A tokenizer.json and its end-of-text tokens.

    Attributes:
        eos_token_ids: end-of-text ids.
        vocab_size: the highest id of the tokenizer plus one; an MPT's embedding may have more rows.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer | SentencePieceBackend",
        eos_token_ids: Sequence[int],
        *,
        directory: str | Path | None = None,
    ):
        """Wraps a tokenizer of the `tokenizers` library.

        Args:
            backend: the tokenizer.
            eos_token_ids: end-of-text ids.
            directory: the checkpoint, whose chat template is read when it is needed.
        """
        self._backend = backend
        self._directory = None if directory is None else Path(directory)
        self._name = "tokenizer" if directory is None else str(Path(directory) / "tokenizer.json")
        self.eos_token_ids = tuple(eos_token_ids)
        # Not the number of tokens, because ids may have gaps.
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text, where tokenizer_config.json or special_tokens_map.json names one."""
        return None if self._directory is None else _named_id(self._directory, "bos_token", self._backend)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of `text`; start and end tokens are added only if tokenizer.json says so.

        Args:
            text: the text; special tokens in it are those tokens.
            add_special_tokens: False adds no start and end tokens.

        Raises:
            MPTError: it is not a text of whole characters, or the tokenizer fails.
        """
        check_text(text, "text")
        with backend_errors(self._name):
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: Sequence[int], *, prompt: Sequence[int] = (), stop: str | Sequence[str] = ()) -> str:
        """Returns the text of token ids without special tokens.

        Args:
            tokens: token ids of one text.
            prompt: token ids that stand before them, whose text is not returned. Many tokenizers drop the space before
                the first word of a text: with the prompt, a continuation keeps it.
            stop: a text, or several, of which the first to occur ends the text that is returned.

        Raises:
            MPTError: these are not token ids, or the tokenizer fails.
        """
        ids, context = token_ids(tokens), self._context(prompt)
        text = self._added_text(self._decoded(context), self._decoded([*context, *ids]))
        return "".join(until_stop([text], stop))

    def ids_of(self, tokens: Iterable[str]) -> list[int]:
        """Returns the ids of those tokens that are in the vocabulary."""
        ids = (self._backend.token_to_id(token) for token in tokens)
        return [id_ for id_ in ids if id_ is not None]

    def decode_stream(
        self, tokens: Iterable[int], *, prompt: Sequence[int] = (), stop: str | Sequence[str] = ()
    ) -> Iterator[str]:
        """Yields the text of token ids in pieces of whole characters.

        If the tokens end within a character, the last piece is what `decode` makes of it. Tokens after a stop string
        are not asked for, so that `decode_stream(stream(model, …), stop=…)` ends the generation there.

        Args:
            tokens: token ids, such as `stream` yields.
            prompt: token ids that stand before them, as in `decode`.
            stop: a text, or several, before the first of which the text ends, wherever tokens begin and end.

        Raises:
            MPTError: as in `decode`.
        """
        return until_stop(map(self.decoder(prompt), itertools.chain(map(token_id, tokens), [None])), stop)

    def decoder(self, prompt: Sequence[int] = ()) -> Callable[[int | None], str]:
        """Returns a function that is given the tokens of a text one by one, and returns what each adds to the text.

        A token that ends within a character adds nothing yet. None stands for the end of the text, and adds the rest.

        Args:
            prompt: token ids that stand before them, as in `decode`.

        Raises:
            MPTError: as in `decode`; so does the function.
        """
        window, mark = self._context(prompt), 0
        shown = self._decoded(window)

        def add(token: int | None) -> str:
            nonlocal window, shown, mark
            if token is not None:
                window.append(token_id(token))
            text = self._decoded(window)
            piece = self._added_text(shown, text)
            if token is not None and (not piece or text.endswith("\ufffd")):
                return ""
            # Of what is shown, the last piece stays: a space at the beginning of the window could be dropped.
            window = window[mark:]
            shown, mark = self._decoded(window), len(window)
            return piece

        return add

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of text that a token stands for; of a special token, those of its name."""
        return token_bytes(self._backend, token)

    def to_json(self) -> str:
        """Returns the tokenizer as tokenizer.json has it.

        Raises:
            MPTError: it is a SentencePiece model, which has no such form.
        """
        if isinstance(self._backend, SentencePieceBackend):
            raise MPTError("tokenizer: expected one with a tokenizer.json, found a SentencePiece model")
        return str(self._backend.to_str())

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """Returns the last tokens of a prompt, and so many that they have some text if any has."""
        ids, count = token_ids(prompt, "prompt"), CONTEXT
        while count < len(ids) and not self._decoded(ids[-count:]).strip():
            count *= 2
        return ids[-count:]

    def _decoded(self, ids: list[int]) -> str:
        with backend_errors(self._name):
            text: str = self._backend.decode(ids)
        return text

    @staticmethod
    def _added_text(before: str, text: str) -> str:
        """Returns what `text` has after the text before it, which may end within a character."""
        if text.startswith(before):
            return text[len(before) :]
        same = (one == other for one, other in zip(before, text, strict=False))
        return text[next((at for at, equal in enumerate(same) if not equal), len(text)) :]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Returns the token ids of the prompt that a chat template makes of messages.

        Special tokens in messages are plain text: `<|im_end|>` in a message does not end its turn. Only the template
        writes control tokens. Tokens that tokenizer.json adds to every text are not added.

        Args:
            messages: dicts of role ("system", "user", "assistant") and content, at least one. A content is a text, or a
                list of parts {"type": "text", "text": …}, which are joined.
            chat_template: "chatml" (llm-foundry's default for chat models), "mpt-instruct" (MosaicML's instruct
                models), or a Jinja template; None for the checkpoint's own, in chat_template.jinja or
                tokenizer_config.json.
            add_generation_prompt: whether the prompt ends where the assistant's answer begins.

        Raises:
            MPTError: invalid messages, no template, or one that fails, refuses the messages or exceeds a limit on time
                or size; or the extra `text` is not installed.
            CheckpointError, ConfigError: a file of the checkpoint is invalid.
        """
        pieces = self.chat_pieces(messages, chat_template=chat_template, add_generation_prompt=add_generation_prompt)
        with backend_errors(self._name):
            return encode_pieces(self._backend, pieces)

    def chat_pieces(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[Piece]:
        """Returns the prompt of `apply_chat_template` as pieces: (text, id if it is a control token or None)."""
        return chat_pieces(
            self._backend, messages,
            directory=self._directory, chat_template=chat_template, add_generation_prompt=add_generation_prompt,
        )  # fmt: skip

    def chat_template(self, name: str | None = None) -> str:
        """Returns the text of a chat template, of which `name` is as in `apply_chat_template`; errors as there."""
        return find_template(name, self._directory)[0]

    def encode_answers(
        self, messages: Sequence[Mapping[str, Any]], *, chat_template: str | None = None
    ) -> list[tuple[list[int], bool]]:
        """Returns the token ids of a conversation in parts, and of each part whether it is an answer, for training.

        What stands before an answer has the ids of the prompt that `apply_chat_template` makes, and an answer those
        that a model is to generate, up to the token that ends it. Arguments as in `apply_chat_template`; the last
        message must be an answer (of the role "assistant").

        Raises:
            MPTError: as in `apply_chat_template`; or the last message is no answer, or the template does not write
                answers where its prompts end.
        """
        parts = answer_parts(
            messages,
            lambda some, prompt: self.chat_pieces(some, chat_template=chat_template, add_generation_prompt=prompt),
        )
        with backend_errors(self._name):
            return [(encode_pieces(self._backend, pieces), is_answer) for pieces, is_answer in parts]

    def encode_plain(self, text: str) -> list[int]:
        """Returns the token ids of a text in which special tokens are plain text, and none are added.

        Raises:
            MPTError: as in `encode`.
        """
        check_text(text, "text")
        with backend_errors(self._name):
            return encode_pieces(self._backend, [(text, None)])


def load_tokenizer(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Tokenizer:
    """Returns the tokenizer of a checkpoint; arguments as in `from_pretrained`.

    It is read from tokenizer.json, else from a SentencePiece model (with the extra `sentencepiece`, whose library makes
    the ids), else from vocab.json and merges.txt, else from the header of a GGUF file, with the tokens that
    tokenizer_config.json, added_tokens.json and special_tokens_map.json add. The end-of-text ids are those of
    generation_config.json, else of config.json, else the eos_token of tokenizer_config.json or special_tokens_map.json,
    else the model's own.

    Raises:
        CheckpointError: there is no checkpoint, no valid tokenizer, or added tokens whose ids cannot be had.
        MPTError: the extra `text` is not installed, or the extra `sentencepiece` where it is needed.
    """
    try:
        importlib.import_module("tokenizers")
    except ImportError as error:
        raise MPTError(
            "the tokenizers library is needed for text; install it with pip install 'mpt_eqx[text]'"
        ) from error
    place = find_checkpoint(
        source,
        revision=revision,
        subfolder=subfolder,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        with_weights=str(source).endswith(".gguf"),
    )
    directory = place.parent if place.is_file() else place
    if any((directory / name).is_file() for name in ("tokenizer.json", *NAMES, VOCABULARY)):
        return _from_directory(directory)
    if not (files := gguf_files(place)):
        raise CheckpointError(
            f"{directory}: expected tokenizer.json, found no such file; give token ids to mpt_eqx.generate instead, or "
            f"copy the tokenizer of the model it was made from, as save_pretrained(…, companions_from=source) does; a "
            f"SentencePiece model ({', '.join(NAMES)}) would do, too, or vocab.json and merges.txt"
        )
    # Written out, so that chat templates and what ends a text are found as in any other checkpoint.
    room = Path(tempfile.mkdtemp(prefix="mpt_eqx-"))
    try:
        for name, content in files.items():
            (room / name).write_bytes(content)
        tokenizer = _from_directory(room)
    except BaseException:
        shutil.rmtree(room, ignore_errors=True)
        raise
    weakref.finalize(tokenizer, shutil.rmtree, room, ignore_errors=True)
    return tokenizer


def _from_directory(directory: Path) -> Tokenizer:
    """Returns the tokenizer whose files are in a directory."""
    import tokenizers

    path = directory / "tokenizer.json"
    if not path.is_file():
        if model := next((directory / name for name in NAMES if (directory / name).is_file()), None):
            spm = load_sentencepiece(model, directory)
            return Tokenizer(spm, _eos_token_ids(directory, spm) or spm.eos_ids(), directory=directory)
        backend = load_byte_bpe(directory)
        return Tokenizer(backend, _eos_token_ids(directory, backend), directory=directory)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises plain Exception, or panics
        if not is_failure(error):
            raise
        raise CheckpointError(f"{path}: expected a tokenizer, found something else ({error!s:.300})") from None
    _check_added_ids(path, backend)
    add_named_tokens(backend, directory)
    # Settings for training batches, which would silently truncate text.
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, _eos_token_ids(directory, backend), directory=directory)


def ends_in_stop(tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str], prompt: Sequence[int] = ()) -> bool:
    """Whether one of the stop strings ends in the newest of some tokens, of which only the last are looked at."""
    # A token has a byte at least, and those at the border may hold parts of characters.
    window = max((len(stop.encode()) for stop in stops), default=0) + 4
    text = tokenizer.decode(tokens[-window:], prompt=prompt)
    return any(stop in text for stop in stops)


def _check_added_ids(path: Path, backend: "tokenizers.Tokenizer") -> None:
    """Raises if the library renumbers an added token, as it silently does where ids have a gap."""
    for token in json.loads(path.read_text(encoding="utf-8")).get("added_tokens") or []:
        if (found := backend.token_to_id(token["content"])) != token["id"]:
            raise CheckpointError(
                f"{path}: expected added tokens whose ids go on from the vocabulary's without a gap, found "
                f"{token['content']!r} with id {token['id']}, which would become {found}; fill the gap with "
                f"tokens that no text has"
            )


def _eos_token_ids(directory: Path, backend: "tokenizers.Tokenizer | SentencePieceBackend") -> list[int]:
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        ids = read_json_object(path).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            return list(ids) if isinstance(ids, list) else [ids]
    id_ = _named_id(directory, "eos_token", backend)
    return [] if id_ is None else [id_]


def _named_id(directory: Path, key: str, backend: "tokenizers.Tokenizer | SentencePieceBackend") -> int | None:
    """Returns the id of the token that the tokenizer's files call `key`."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / name
        token = read_json_object(path).get(key) if path.is_file() else None
        content = token.get("content") if isinstance(token, dict) else token
        id_ = backend.token_to_id(content) if isinstance(content, str) else None
        if id_ is not None:
            return id_
    return None
