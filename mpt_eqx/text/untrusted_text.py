"""Text that cannot form control tokens, whatever a template does with it.

The characters that distinguish control tokens are escaped: each is replaced by one private-use character. A template
may cut, join or change the case of the text, and it still contains none of the distinguishing characters. Templates
also look into messages, so the arguments of the text's methods are escaped as well: `'</think>' in content`,
`content.split('<')` and `content == '<b>'` give the same answers as for the original text, and lengths are unchanged.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from mpt_eqx.errors import MPTError

PRIVATE_USE = range(0xF0000, 0x10FFFE)  # planes 15 and 16; their few non-characters do no harm

# Methods that compare with their arguments, or return parts of the text.
COMPARING = (
    *("__contains__", "__getitem__", "count", "endswith", "find", "index", "lstrip", "partition"),
    *("removeprefix", "removesuffix", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines"),
    *("startswith", "strip"),
)
# Methods for which it matters that an escaped character is a letter.
CHARACTERISING = (
    *("capitalize", "isalnum", "isalpha", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle"),
    *("isupper", "lower", "title", "upper"),
)
ORDERING = ("__lt__", "__le__", "__gt__", "__ge__")


class Escapes(NamedTuple):
    """Which character stands for which, as tables of `str.translate`."""

    escaped: dict[int, str]
    original: dict[int, str]

    @classmethod
    def of(cls, characters: Mapping[str, str]) -> "Escapes":
        """Returns the tables of a mapping from the original to the escaped character."""
        return cls(
            {ord(original): escaped for original, escaped in characters.items()},
            {ord(escaped): original for original, escaped in characters.items()},
        )


def private_characters(things: Iterable[Any], texts: Iterable[str]) -> dict[Any, str]:
    """Returns a private-use character for each of the things; none of the texts contains it."""
    things, used = sorted(things), set().union(*texts)
    unused = list(islice((chr(code) for code in PRIVATE_USE if chr(code) not in used), len(things)))
    if len(unused) < len(things):
        raise MPTError("messages: expected a few private characters that they do not use, found nearly all used")
    return dict(zip(things, unused, strict=True))


def escape(value: Any, escapes: Escapes) -> Any:
    """Returns a text, or a tuple of texts, with its characters replaced by their escapes; other values as they are."""
    if isinstance(value, tuple):
        return tuple(escape(item, escapes) for item in value)
    if not isinstance(value, str):
        return value
    return str.translate(value, escapes.escaped)


def unescape(text: str, escapes: Escapes) -> str:
    """Returns the original of an escaped text."""
    return str.translate(text, escapes.original)


class UntrustedText(str):
    """An escaped text whose methods take ordinary text; what they return is untrusted, too."""

    escapes: Escapes

    def __new__(cls, text: str, escapes: Escapes) -> "UntrustedText":
        """Escapes `text`."""
        return cls._of_escaped(escape(str(text), escapes), escapes)

    @classmethod
    def _of_escaped(cls, value: Any, escapes: Escapes) -> Any:
        """Returns the result of a method of str, in which every text is untrusted."""
        if isinstance(value, (list, tuple)):
            return type(value)(cls._of_escaped(item, escapes) for item in value)
        if not isinstance(value, str):
            return value
        text = super().__new__(cls, value)
        text.escapes = escapes
        return text

    # A list compares a text with each of its items in one call, so each comparison costs no more than the shorter one.
    def __eq__(self, other: object) -> Any:
        if isinstance(other, str) and len(other) != len(self):
            return False
        return str.__eq__(self, escape(other, self.escapes))

    def __ne__(self, other: object) -> Any:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __hash__(self) -> int:
        return hash(unescape(self, self.escapes))

    def __repr__(self) -> str:
        return str(escape(repr(unescape(self, self.escapes)), self.escapes))

    def __iter__(self) -> Iterator[str]:
        return (self._of_escaped(character, self.escapes) for character in super().__iter__())

    def replace(self, old: Any, new: Any, count: Any = -1, /) -> Any:
        """Returns the text with `old` replaced by `new`, which comes from the template and is not escaped."""
        return self._of_escaped(super().replace(escape(str(old), self.escapes), new, count), self.escapes)


def _comparing(name: str) -> Any:
    """Returns a method of str that escapes its arguments."""

    def method(self: UntrustedText, *args: Any, **kwargs: Any) -> Any:
        args = tuple(escape(arg, self.escapes) for arg in args)
        kwargs = {key: escape(arg, self.escapes) for key, arg in kwargs.items()}
        return self._of_escaped(getattr(str, name)(self, *args, **kwargs), self.escapes)

    method.__name__ = name
    return method


def _characterising(name: str) -> Any:
    """Returns a method of str that is computed on the original text and escapes its result."""

    def method(self: UntrustedText, *args: Any) -> Any:
        texts = [unescape(arg, self.escapes) if isinstance(arg, str) else arg for arg in (self, *args)]
        result = getattr(str, name)(*texts)
        return UntrustedText(result, self.escapes) if isinstance(result, str) else result

    method.__name__ = name
    return method


def _ordering(name: str) -> Any:
    """Returns a comparison that is computed on the original text, as far as it can matter."""

    def method(self: UntrustedText, other: Any) -> Any:
        if not isinstance(other, str):
            return NotImplemented
        size = min(len(self), len(other)) + 1
        texts = [unescape(str.__getitem__(text, slice(size)), self.escapes) for text in (self, other)]
        return getattr(str, name)(*texts)

    method.__name__ = name
    return method


for _name in COMPARING:
    setattr(UntrustedText, _name, _comparing(_name))
for _name in ORDERING:
    setattr(UntrustedText, _name, _ordering(_name))
for _name in CHARACTERISING:
    setattr(UntrustedText, _name, _characterising(_name))
