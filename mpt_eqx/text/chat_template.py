"""Chat templates: messages as a prompt, in which special tokens in user messages are plain text.

A template comes from the checkpoint (chat_template.jinja, else tokenizer_config.json) or is one of two built-ins. It
writes the text of control tokens, such as <|im_end|>, and the messages between them. If its output were simply
encoded, a message that contains <|im_end|> would end its own turn. So:

1. A control token is an added token of the tokenizer, except runs of white space, which GPT-NeoX's vocabulary adds as
   ordinary text. Each has a distinguishing character, its first one that is not a letter or digit if it has one.
2. Roles and contents are passed to the template as `UntrustedText`, in which these characters are escaped.
3. The output is split at the control tokens, which only the template can have written, and then unescaped.
4. For encoding, the control tokens get private names in a tokenizer of the same model that knows no other name for
   them. The whole prompt is encoded at once, so that words next to a control token are tokenised as usual.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpt_eqx.config.json_file import read_json_object
from mpt_eqx.errors import CheckpointError, MPTError
from mpt_eqx.text.checks import check_unicode
from mpt_eqx.text.sentencepiece import SentencePieceBackend
from mpt_eqx.text.untrusted_text import Escapes, UntrustedText, private_characters, unescape

if TYPE_CHECKING:
    import tokenizers

# A piece of a prompt: its text, and its id if it is a control token.
Piece = tuple[str, int | None]

# llm-foundry's default for chat models.
CHATML = """
{%- for message in messages -%}
    {{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""

# The format of MosaicML's instruct models, which were trained on one instruction and one response; turns repeat it.
INSTRUCT = """
{%- set intro = 'Below is an instruction that describes a task. '
    ~ 'Write a response that appropriately completes the request.' -%}
{%- for message in messages -%}
    {%- if message.role == 'system' and loop.first -%}
        {{ message.content + '\\n\\n' + intro }}
    {%- else -%}
        {%- if loop.first %}{{ intro }}{% endif -%}
        {%- if message.role == 'user' -%}
            {{ '\\n\\n### Instruction:\\n' + message.content }}
        {%- elif message.role == 'assistant' -%}
            {{ '\\n\\n### Response:\\n' + message.content }}
        {%- else -%}
            {{ raise_exception('expected a first system, then user and assistant, found ' + message.role) }}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif -%}
"""

BUILT_IN = {"chatml": CHATML, "mpt-instruct": INSTRUCT}


def chat_pieces(
    backend: "tokenizers.Tokenizer | SentencePieceBackend",
    messages: Sequence[Mapping[str, Any]],
    *,
    directory: Path | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
) -> list[Piece]:
    """Returns the prompt that a template makes of messages, in pieces: ordinary text and control tokens.

    The texts of the pieces, joined, are the prompt. The template reads `messages`, `add_generation_prompt`, and
    `bos_token`, `eos_token` and the other special tokens of tokenizer_config.json; `tools` and `documents` are none.

    Args:
        backend: the tokenizer, for its added tokens.
        messages: dicts of role and content, at least one; a content is a text or a list of text parts.
        directory: the checkpoint, for its template and the names of its special tokens.
        chat_template: "chatml", "mpt-instruct", or a template; None for the checkpoint's own.
        add_generation_prompt: whether the prompt ends where the assistant's answer begins.

    Raises:
        MPTError: invalid messages, no template, or one that fails, refuses the messages or exceeds a limit; or jinja2
            is not installed.
        CheckpointError, ConfigError: a file of the checkpoint is invalid.
    """
    try:
        from mpt_eqx.text import template_sandbox
    except ImportError as error:
        raise MPTError(
            "the jinja2 library is needed for chat templates; install it with pip install 'mpt_eqx[text]'"
        ) from error
    messages = joined_messages(messages)
    template, origin = find_template(chat_template, directory)
    special = special_tokens(directory)
    for text in (template, *special.values()):
        check_unicode(text, origin)
    contents = [text for message in messages for text in message.values()]
    distinguishing = {_distinguishing_character(text) for text in control_tokens(backend)}
    escapes = Escapes.of(private_characters(distinguishing, [template, *special.values(), *contents]))
    variables = {
        **special,
        "tools": None,
        "documents": None,
        "messages": [{key: UntrustedText(text, escapes) for key, text in message.items()} for message in messages],
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        rendered = template_sandbox.render(template, variables, origin=origin)
    except MPTError as error:
        raise MPTError(unescape(str(error), escapes)) from None
    check_unicode(rendered, f"{origin}: what the template writes")
    return [(unescape(text, escapes), id_) for text, id_ in _split(rendered, backend)]


def encode_pieces(backend: "tokenizers.Tokenizer | SentencePieceBackend", pieces: Sequence[Piece]) -> list[int]:
    """Returns the token ids of a prompt in pieces, without the tokens that tokenizer.json adds to every text.

    Raises:
        MPTError: the tokenizer's model encodes ordinary text as a control token, or its ids have gaps.
    """
    import tokenizers

    if isinstance(backend, SentencePieceBackend):
        return backend.encode_pieces(pieces)
    controls = control_tokens(backend)
    names = private_characters({id_ for _, id_ in pieces if id_ is not None}, [text for text, _ in pieces])
    tokens = _added(backend)
    spaces = {id_: token for id_, token in tokens.items() if token.content not in controls}
    clone = tokenizers.Tokenizer(backend.model)
    clone.normalizer, clone.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    size = clone.get_vocab_size()
    if any(clone.id_to_token(size + at) is not None for at in range(len(names) + len(spaces))):
        raise MPTError("tokenizer.json: expected ids without gaps where control tokens are to be encoded, found gaps")
    clone.add_tokens([*spaces.values(), *(tokenizers.AddedToken(name, normalized=False) for name in names.values())])
    added = {**{id_: token.content for id_, token in spaces.items()}, **names}
    ids = {clone.token_to_id(name): id_ for id_, name in added.items()}
    text = "".join(text if id_ is None else names[id_] for text, id_ in pieces)
    encoded = [ids.get(id_, id_) for id_ in clone.encode(text, add_special_tokens=False).ids]
    unknown = backend.token_to_id(getattr(backend.model, "unk_token", None) or "")
    # An added word that the model also knows is an ordinary word.
    words = {id_ for id_, token in tokens.items() if token.content.isalnum() and not token.special}
    guarded = set(controls.values()) - words - {unknown}
    if [i for i in encoded if i in guarded] != [i for _, i in pieces if i in guarded]:
        raise MPTError(
            "messages: expected text that can be encoded as ordinary text, found the text of a special token that this "
            "tokenizer's model knows as a word; take it out of the messages"
        )
    return encoded


def joined_messages(messages: Any) -> list[dict[str, str]]:
    """Returns messages whose contents are text: lists of text parts are joined.

    Raises:
        MPTError: it is not a non-empty list of dicts of role and content, the role a text, the content a text or a list
            of parts {"type": "text", "text": …}.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        found = "none" if isinstance(messages, (list, tuple)) else type(messages).__name__
        raise MPTError(f"messages: expected a list of at least one message, found {found}")
    return [_joined_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


def _joined_message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise MPTError(f"{where}: expected a dict of role and content, found {type(message).__name__}")
    if set(message) != {"role", "content"}:
        found = ", ".join(sorted(map(repr, message))) or "an empty dict"
        raise MPTError(f"{where}: expected a dict of 'role' and 'content', found {found}")
    texts = {}
    for key, text in message.items():
        if key == "content" and isinstance(text, (list, tuple)):
            text = "".join(_part(part, f"{where}.content[{at}]") for at, part in enumerate(text))
        if not isinstance(text, str):
            raise MPTError(f"{where}.{key}: expected text, found {type(text).__name__}")
        check_unicode(text, f"{where}.{key}")
        texts[key] = text
    return texts


def _part(part: Any, where: str) -> str:
    """Returns the text of a part of a message."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        found = type(part).__name__ if kind is None else f"one of type {kind!r:.40}"
        raise MPTError(
            f'{where}: expected a part {{"type": "text", "text": …}}, found {found}; this model reads text only'
        )
    return str(part["text"])


def find_template(chat_template: str | None, directory: Path | None) -> tuple[str, str]:
    """Returns the text of the template and its origin for error messages: the argument's name or the file.

    Raises:
        MPTError: `chat_template` is neither a built-in's name nor a template, or it is None and there is no default.
        CheckpointError, ConfigError: a file of the checkpoint is invalid.
    """
    names = " or ".join(map(repr, BUILT_IN))
    if chat_template is not None:
        if isinstance(chat_template, str) and chat_template in BUILT_IN:
            return BUILT_IN[chat_template], f"chat_template {chat_template!r}"
        if isinstance(chat_template, str) and ("{%" in chat_template or "{{" in chat_template):
            return chat_template, "chat_template"
        found = repr(chat_template)
        found = found if len(found) < 60 else f"{found[:60]}…"
        raise MPTError(f"chat_template: expected {names} or the text of a Jinja template, found {found}")
    if directory is not None:
        path = directory / "chat_template.jinja"
        if path.is_file():
            return _read(path), str(path)
        path = directory / "tokenizer_config.json"
        template = read_json_object(path).get("chat_template") if path.is_file() else None
        if template is not None:
            origin = f"{path}: chat_template"
            return _default(template, origin), origin
    raise MPTError(
        f"{directory or 'tokenizer'}: expected a chat template, found neither chat_template.jinja nor chat_template in "
        f"tokenizer_config.json; pass chat_template={names}"
    )


def special_tokens(directory: Path | None) -> dict[str, str]:
    """Returns the special tokens of tokenizer_config.json by name (eos_token, …), as templates read them."""
    path = directory / "tokenizer_config.json" if directory is not None else None
    tokens = {}
    for key, value in (read_json_object(path) if path is not None and path.is_file() else {}).items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            tokens[key] = text
    return tokens


def control_tokens(backend: "tokenizers.Tokenizer | SentencePieceBackend") -> dict[str, int]:
    """Returns the text and id of every added token that is not white space only."""
    return {token.content: id_ for id_, token in _added(backend).items() if token.content.strip()}


def _split(rendered: str, backend: "tokenizers.Tokenizer | SentencePieceBackend") -> Iterator[Piece]:
    """Yields the control tokens of a text, as the tokenizer finds them, and the text between them."""
    import tokenizers

    controls = control_tokens(backend)
    # A model without words finds the added tokens only; the text between two of them is one unknown word.
    finder = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
    finder.add_tokens(
        [
            tokenizers.AddedToken(
                token.content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False
            )
            for token in _added(backend).values()
            if token.content in controls
        ]
    )
    ids = {finder.token_to_id(text): id_ for text, id_ in controls.items()}
    encoding = finder.encode(rendered, add_special_tokens=False)
    for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        yield rendered[start:end], ids.get(id_)


def _added(backend: "tokenizers.Tokenizer | SentencePieceBackend") -> dict[int, Any]:
    return dict(sorted(backend.get_added_tokens_decoder().items()))


def _distinguishing_character(token: str) -> str:
    """Returns the character of a control token that is escaped in messages."""
    return next((c for c in token if not c.isalnum() and not c.isspace() and c not in "\"'\\"), token.strip()[0])


def _default(template: Any, origin: str) -> str:
    """Returns the template of tokenizer_config.json: a text, or the one named "default" in a list."""
    if isinstance(template, str):
        return template
    found = type(template).__name__
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        if isinstance(default := named.get("default"), str):
            return default
        found = f"a list with {', '.join(map(repr, named)) or 'nothing'}"
    raise CheckpointError(f"{origin}: expected a text or a list with a template named 'default', found {found}")


def _read(path: Path) -> str:
    from mpt_eqx.text.template_sandbox import MAX_TEMPLATE

    if (size := path.stat().st_size) > MAX_TEMPLATE:
        raise CheckpointError(f"{path}: expected a template of at most {MAX_TEMPLATE:,} bytes, found {size:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: expected text in UTF-8, found something else ({error})") from None
