"""Chat templates: a list of messages as one prompt, in which nothing that a message says can act as a control token.

A template comes from the checkpoint (chat_template.jinja, else tokenizer_config.json) or is one of two built-ins. It
writes the text of control tokens, such as <|im_end|>, and between them what the messages say. If the written text
were simply encoded, a message with <|im_end|> in it would end its own turn. So where a control token begins must have
been written by the template:

1. Each control token (an added token of the tokenizer, but for runs of white space, which GPT-NeoX's vocabulary adds
   as ordinary text) has a character that is not a letter or digit, mostly its first one. While the template runs,
   these characters are replaced in roles and contents by stand-ins: private characters that no text here has. So no
   cut, join or change of case that a template makes can put a control token together from what messages say.
2. Templates look into messages too. Contents are therefore strings that replace the characters in what they are
   compared with as well: `'</think>' in content`, `content.split('<')`, `content == '<b>'` answer as if nothing had
   been replaced, and lengths and white space are the same anyway.
3. What the template has written is cut at the control tokens, and the stand-ins are turned back. To encode it, the
   control tokens are given private names in a tokenizer of the same model that knows no other name for them. Only
   then is all of it encoded, at once, so that words next to a control token come out as they always do.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpt_eqx.config.json_file import read_json_object
from mpt_eqx.errors import CheckpointError, MPTError

if TYPE_CHECKING:
    import tokenizers

# A piece of a prompt: its text, and the id of the control token it is, if it is one.
Piece = tuple[str, int | None]

# llm-foundry's default for chat models.
CHATML = """
{%- for message in messages -%}
    {{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""

# What MosaicML's instruct models were trained on, which is one instruction and one response; more of them repeat.
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

PRIVATE = range(0xF0000, 0x10FFFE)  # the private planes; their few non-characters do no harm


def chat_pieces(
    backend: "tokenizers.Tokenizer",
    messages: Sequence[Mapping[str, str]],
    *,
    directory: Path | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
) -> list[Piece]:
    """Returns the prompt that a template makes of messages, in pieces: ordinary text and control tokens.

    The texts of the pieces, joined, are the prompt. The template reads `messages`, `add_generation_prompt`, and
    `bos_token`, `eos_token` and their like from tokenizer_config.json; `tools` and `documents` are none.

    Args:
        backend: the tokenizer, for its added tokens.
        messages: dicts of role and content, at least one.
        directory: where the checkpoint is, for its template and the names of its special tokens.
        chat_template: "chatml", "mpt-instruct", or a template; None for the checkpoint's own.
        add_generation_prompt: whether the prompt ends where the assistant begins to speak.

    Raises:
        MPTError: messages of another form, no template, or one that fails, does not take the messages or is too
            expensive; or jinja2 is not installed.
        CheckpointError, ConfigError: a file of the checkpoint is not what it should be.
    """
    try:
        from mpt_eqx.text import template_sandbox
    except ImportError as error:
        raise MPTError(
            "the jinja2 library is needed for chat templates; install it with pip install 'mpt_eqx[text]'"
        ) from error
    check_messages(messages)
    template, origin = find_template(chat_template, directory)
    special = special_tokens(directory)
    for text in (template, *special.values()):
        _check_unicode(text, origin)
    controls = control_tokens(backend)
    said = [text for message in messages for text in message.values()]
    stand_ins = _private({_mark(text) for text in controls}, [template, *special.values(), *said])
    variables = {
        **special,
        "tools": None,
        "documents": None,
        "messages": [{key: Said(text, stand_ins) for key, text in message.items()} for message in messages],
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        written = template_sandbox.render(template, variables, origin=origin)
    except MPTError as error:
        raise MPTError(_replaced(str(error), stand_ins, back=True)) from None
    _check_unicode(written, f"{origin}: what the template writes")
    return [(_replaced(text, stand_ins, back=True), id_) for text, id_ in _cut(written, backend)]


def encode_pieces(backend: "tokenizers.Tokenizer", pieces: Sequence[Piece]) -> list[int]:
    """Returns the token ids of a prompt in pieces; tokens that tokenizer.json adds to every text are not added.

    Raises:
        MPTError: the tokenizer's model makes a control token of ordinary text, or its ids have gaps.
    """
    import tokenizers

    controls = control_tokens(backend)
    names = _private({id_ for _, id_ in pieces if id_ is not None}, [text for text, _ in pieces])
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
    # A word that was added, and that the model knows too, is an ordinary word.
    words = {id_ for id_, token in tokens.items() if token.content.isalnum() and not token.special}
    guarded = set(controls.values()) - words - {unknown}
    if [i for i in encoded if i in guarded] != [i for _, i in pieces if i in guarded]:
        raise MPTError(
            "messages: expected text that can be encoded as ordinary text, found the text of a special token that this "
            "tokenizer's model knows as a word; take it out of the messages"
        )
    return encoded


def check_messages(messages: Any) -> None:
    """Raises MPTError unless `messages` are dicts of role and content, both text, and at least one."""
    if not isinstance(messages, (list, tuple)) or not messages:
        found = "none" if isinstance(messages, (list, tuple)) else type(messages).__name__
        raise MPTError(f"messages: expected a list of at least one message, found {found}")
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise MPTError(f"messages[{at}]: expected a dict of role and content, found {type(message).__name__}")
        if set(message) != {"role", "content"}:
            found = ", ".join(sorted(map(repr, message))) or "an empty dict"
            raise MPTError(f"messages[{at}]: expected a dict of 'role' and 'content', found {found}")
        for key, text in message.items():
            if not isinstance(text, str):
                raise MPTError(f"messages[{at}].{key}: expected text, found {type(text).__name__}")
            _check_unicode(text, f"messages[{at}].{key}")


def find_template(chat_template: str | None, directory: Path | None) -> tuple[str, str]:
    """Returns the text of the template to use, and what messages call it: the argument or its file.

    Raises:
        MPTError: `chat_template` is neither a built-in's name nor a template, or is None and there is no other.
        CheckpointError, ConfigError: a file of the checkpoint is not what it should be.
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
    """Returns the special tokens that tokenizer_config.json names: eos_token and their like, as templates read them."""
    path = directory / "tokenizer_config.json" if directory is not None else None
    tokens = {}
    for key, value in (read_json_object(path) if path is not None and path.is_file() else {}).items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            tokens[key] = text
    return tokens


def control_tokens(backend: "tokenizers.Tokenizer") -> dict[str, int]:
    """Returns the text and id of every added token that is not white space only."""
    return {token.content: id_ for id_, token in _added(backend).items() if token.content.strip()}


class Said(str):
    """What a message says, with stand-ins for the characters that mark control tokens.

    It is the text with stand-ins, so whatever a template makes of it keeps them. Its methods take and compare
    ordinary text.
    """

    stand_ins: Mapping[str, str]

    def __new__(cls, text: str, stand_ins: Mapping[str, str]) -> "Said":
        """Returns `text` with its characters replaced."""
        self = super().__new__(cls, _replaced(text, stand_ins))
        self.stand_ins = stand_ins
        return self

    def __hash__(self) -> int:
        return hash(_replaced(str(self), self.stand_ins, back=True))

    def __repr__(self) -> str:
        return _replaced(repr(_replaced(str(self), self.stand_ins, back=True)), self.stand_ins)

    def __iter__(self) -> Iterator[str]:
        return map(self._again, super().__iter__())

    def replace(self, old: Any, new: Any, count: Any = -1, /) -> Any:
        """Returns the text with `old` replaced; `new` is the template's, and stays as it is."""
        return self._again(super().replace(_replaced(str(old), self.stand_ins), new, count))

    def _again(self, value: Any) -> Any:
        """Returns what a method made of this text: what is text, as what a message says."""
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._again, value))
        if not isinstance(value, str):
            return value
        text = str.__new__(Said, value)
        text.stand_ins = self.stand_ins
        return text


def _comparing(name: str) -> Any:
    """Returns a method of str for `Said` that puts the stand-ins into its arguments."""

    def method(self: Said, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_replaced_within(arg, self.stand_ins) for arg in args)
        kwargs = {key: _replaced_within(arg, self.stand_ins) for key, arg in kwargs.items()}
        return self._again(getattr(str, name)(self, *args, **kwargs))

    method.__name__ = name
    return method


def _of_letters(name: str) -> Any:
    """Returns a method of str for `Said` that works on the text itself, where a stand-in could be a letter's."""

    def method(self: Said, *args: Any) -> Any:
        text, *others = (
            _replaced(arg, self.stand_ins, back=True) if isinstance(arg, str) else arg for arg in (self, *args)
        )
        result = getattr(str, name)(text, *others)
        return Said(result, self.stand_ins) if isinstance(result, str) else result

    method.__name__ = name
    return method


for _name in (
    *("__eq__", "__ne__", "__contains__", "__getitem__", "count", "endswith", "find", "index", "lstrip", "partition"),
    *("removeprefix", "removesuffix", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines"),
    *("startswith", "strip"),
):
    setattr(Said, _name, _comparing(_name))
for _name in (
    *("__lt__", "__le__", "__gt__", "__ge__", "capitalize", "isalnum", "isalpha", "isdecimal", "isdigit", "islower"),
    *("isnumeric", "isspace", "istitle", "isupper", "lower", "title", "upper"),
):
    setattr(Said, _name, _of_letters(_name))


def _cut(written: str, backend: "tokenizers.Tokenizer") -> Iterator[Piece]:
    """Yields the pieces of a text: its control tokens, found as the tokenizer finds them, and what is between them."""
    import tokenizers

    controls = control_tokens(backend)
    # A model of no words, so that only the added tokens are found; what is between them is one unknown word.
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
    encoding = finder.encode(written, add_special_tokens=False)
    for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        yield written[start:end], ids.get(id_)


def _added(backend: "tokenizers.Tokenizer") -> dict[int, Any]:
    return dict(sorted(backend.get_added_tokens_decoder().items()))


def _mark(token: str) -> str:
    """Returns the character of a control token that only a template can write."""
    return next((c for c in token if not c.isalnum() and not c.isspace() and c not in "\"'\\"), token.strip()[0])


def _private(things: Iterable[Any], texts: Iterable[str]) -> dict[Any, str]:
    """Returns a private character for each of the things, which none of the texts has."""
    things, used = sorted(things), set().union(*texts)
    unused = list(islice((chr(code) for code in PRIVATE if chr(code) not in used), len(things)))
    if len(unused) < len(things):
        raise MPTError("messages: expected a few private characters that they do not use, found nearly all used")
    return dict(zip(things, unused, strict=True))


def _replaced(text: str, stand_ins: Mapping[str, str], *, back: bool = False) -> str:
    for character, stand_in in stand_ins.items():
        text = str.replace(text, *((stand_in, character) if back else (character, stand_in)))
    return text


def _replaced_within(value: Any, stand_ins: Mapping[str, str]) -> Any:
    if isinstance(value, tuple):
        return tuple(_replaced_within(item, stand_ins) for item in value)
    return _replaced(value, stand_ins) if isinstance(value, str) else value


def _default(template: Any, origin: str) -> str:
    """Returns the template of tokenizer_config.json: a text, or the one named default of several."""
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


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MPTError(
            f"{where}: expected text, found half of a character ({text[error.start]!r}) at {error.start}; "
            f"decode it with errors='replace'"
        ) from None
