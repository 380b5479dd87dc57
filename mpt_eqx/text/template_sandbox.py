"""Jinja2 for templates that come with a checkpoint: sandboxed, and with bounded memory and time.

Jinja's sandbox keeps a template from reaching into Python; it does not keep it from writing `'a' * 10**9`, or four
loops inside each other. Here a template gets only the filters, methods and globals that prompts are made of, and
whatever could grow is metered: operators, calls, filters, what is written, and, by a change to the parsed template,
loops, slices, `~`, comparisons and literal lists. The bound on time is processor time, so that a busy machine refuses
nothing.

The environment is the one transformers gives to chat templates: block lines leave no white space, break and continue,
`raise_exception`, `strftime_now`, and a `tojson` that does not escape HTML.
"""

import functools
import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from datetime import datetime
from typing import Any

from jinja2 import TemplateSyntaxError, nodes, pass_context, pass_environment
from jinja2.defaults import DEFAULT_FILTERS
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter
from jinja2.runtime import LoopContext, Macro, Namespace
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.visitor import NodeTransformer

from mpt_eqx.errors import MPTError

MAX_TEMPLATE = 65_536  # bytes of template
MAX_SIZE = 1_000_000  # characters of what is written, and of any value on the way
MAX_MADE = 16 * MAX_SIZE  # characters of all values together
MAX_SECONDS = 1.0
ITEM = 64  # what an item of a list counts, in characters: about its bytes

# What the template may use. Escaping for HTML has no place in a prompt, and the rest can make much out of little.
FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items", "last"),
    *("length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr"),
    *("sort", "string", "title", "trim", "unique", "upper"),
)
METHODS = {
    str: {
        *("capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdecimal", "isdigit", "islower"),
        *("isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition", "removeprefix"),
        *("removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines"),
        *("startswith", "strip", "title", "upper"),
    },
    dict: {"get", "items", "keys", "values"},
    list: {"count", "index"},
    tuple: {"count", "index"},
}
REFUSED_TAGS: dict[type[nodes.Node], str] = {
    nodes.Extends: "extends",
    nodes.Include: "include",
    nodes.Import: "import",
    nodes.FromImport: "from",
    nodes.EvalContextModifier: "autoescape",
    nodes.ScopedEvalContextModifier: "autoescape",
}


def render(text: str, variables: Mapping[str, Any], *, origin: str) -> str:
    """Returns what a template writes.

    Args:
        text: the template.
        variables: what it can read, besides the globals.
        origin: what messages call the template: its file, or the argument it came from.

    Raises:
        MPTError: it is not a Jinja template, does not take the variables, uses what is not there, or goes past a bound.
    """
    if (size := len(text.encode())) > MAX_TEMPLATE:
        raise MPTError(f"{origin}: expected a template of at most {MAX_TEMPLATE:,} bytes, found {size:,}")
    meter = Meter()
    try:
        environment = _Environment(meter)
        template = environment.from_string(_Metering().visit(environment.parse(text)))
        written: list[str] = []
        total = 0
        for piece in template.generate(variables):
            meter.tick()
            if (total := total + len(piece)) > MAX_SIZE:
                raise Exceeded(f"the template writes more than {MAX_SIZE:,} characters; shorten the messages")
            written.append(piece)
        return "".join(written)
    except Exceeded as error:
        raise MPTError(f"{origin}: {error}") from None
    except Declined as error:
        raise MPTError(f"{origin}: the template does not take these messages: {shortened(error)}") from None
    except TemplateSyntaxError as error:
        found = shortened(error.message)
        raise MPTError(
            f"{origin}, line {error.lineno}: expected a chat template, found something else ({found})"
        ) from None
    except Exception as error:  # a template can raise whatever Python's operators raise
        raise MPTError(f"{origin}: the template failed ({type(error).__name__}: {shortened(error)})") from None


class Exceeded(Exception):
    """A template went past a bound. No ValueError: Jinja's own filters catch those."""


class Declined(Exception):
    """A template called raise_exception."""


class Meter:
    """What one rendering has made so far, and until when it may run."""

    def __init__(self) -> None:
        self._made = 0
        self._until = time.thread_time() + MAX_SECONDS

    def tick(self) -> None:
        """Raises when the time is up."""
        if time.thread_time() > self._until:
            raise Exceeded(f"the template runs for more than {MAX_SECONDS:g} s")

    def passing(self, value: Any) -> Any:
        """Returns the value, if there is time."""
        self.tick()
        return value

    def keep(self, value: Any, *, shared: bool = False) -> Any:
        """Returns a new value, counted; with `shared`, what it holds is not new."""
        self.tick()
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return self.each(value)
        size = size_of(value)
        _check_size(size)
        self._made += ITEM * len(value) if shared and isinstance(value, (list, tuple, dict)) else size
        if self._made > MAX_MADE:
            raise Exceeded(f"the template makes more than {MAX_MADE:,} characters on its way")
        return value

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yields the values as long as there is time."""
        for value in values:
            self.tick()
            yield value

    def join(self, separator: str, values: Iterable[Any]) -> str:
        """Returns values as text with a separator between them."""
        parts, size = [], 0
        for value in self.each(values):
            parts.append(value if type(value) is str else str(value))
            size += len(parts[-1]) + len(separator)
            _check_size(size - len(separator))
        return self.keep(str(separator).join(parts))

    def replace(self, text: str, old: str, new: str, count: int = -1) -> str:
        """Returns `text` with the first `count` occurrences of `old` replaced, or with all."""
        found = text.count(old)
        _check_size(len(text) + (found if count < 0 else min(found, count)) * len(new))
        return self.keep(text.replace(old, new, count))


def size_of(value: Any) -> int:
    """Returns about how many characters a value is, what it shares counted each time; more than MAX_SIZE is not exact.

    A large integer counts the square of its bits, as the work of dividing it does.
    """
    size, waiting = 0, [value]
    while waiting and size <= MAX_SIZE:
        item = waiting.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, int):
            size += item.bit_length() ** 2 // ITEM
        elif isinstance(item, (dict, list, tuple, KeysView, ValuesView, ItemsView)):
            size += ITEM * len(item)
            if size <= MAX_SIZE:
                waiting.extend(item)
                waiting.extend(item.values() if isinstance(item, dict) else ())
    return size


def shortened(message: object, *, limit: int = 300) -> str:
    """Returns a message of which a template may have made any length."""
    text = str(message)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise Exceeded(f"the template makes a value of more than {MAX_SIZE:,} characters")


class _Environment(ImmutableSandboxedEnvironment):
    """The environment of one rendering."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, meter: Meter):
        # Not optimised: that would work out constants before anything is metered.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=["jinja2.ext.loopcontrols"],
            finalize=self._as_text,
        )
        self.meter = meter
        self.filters = {name: self._metered(DEFAULT_FILTERS[name]) for name in FILTERS} | {
            "join": self._join,
            "replace": lambda text, old, new, count=-1: meter.replace(_text(text), _text(old), _text(new), count),
            "safe": lambda value: value,
            "tojson": self._metered(to_json),
            # What _Metering puts in; no template can write such a name.
            "(each)": meter.each,
            "(keep)": functools.partial(meter.keep, shared=True),
            "(join)": functools.partial(meter.join, ""),
            "(tick)": meter.passing,
        }
        self.globals = {
            "dict": dict,
            "namespace": _Namespace,
            "raise_exception": raise_exception,
            "range": safe_range,
            "strftime_now": strftime_now,
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Tells whether the template may use an attribute: the methods above, and what Jinja's own objects offer."""
        for kind, names in METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return isinstance(obj, (LoopContext, Macro, Namespace)) and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Raises at once; Jinja's own would be written as nothing."""
        raise SecurityError(f"a template may not use .{attribute} of {type(obj).__name__}")

    def wrap_str_format(self, value: Any) -> None:
        """Leaves str.format to `is_safe_attribute`, which refuses it: a width can be any number."""

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, a macro or a method."""
        self.meter.tick()
        name, owner = getattr(obj, "__name__", None), getattr(obj, "__self__", None)
        if isinstance(owner, str) and name in ("join", "replace"):
            return getattr(self.meter, name)(owner, *args, **kwargs)
        return self.meter.keep(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Works out a binary operator, if its result is not too large."""
        if operator == "%" and isinstance(left, str):
            raise SecurityError("text is not formatted with % here")
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_size((left.bit_length() * max(right, 0)) ** 2 // ITEM)
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, (str, list, tuple)) and isinstance(other, int):
                    _check_size(size_of(one) * other)
        return self.meter.keep(super().call_binop(context, operator, left, right), shared=True)

    def concat(self, pieces: Iterable[str]) -> str:
        """Joins what a macro or a block has written."""
        return self.meter.join("", pieces)

    @staticmethod
    @pass_context
    def _as_text(context: Any, value: Any) -> str:
        """Returns what `{{ value }}` writes."""
        return value if type(value) is str else context.environment.meter.keep(str(value))

    @staticmethod
    @pass_environment
    def _join(environment: "_Environment", values: Any, d: Any = "", attribute: Any = None) -> str:
        if attribute is not None:
            values = map(make_attrgetter(environment, attribute), values)
        return environment.meter.join(_text(d), values)

    def _metered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # which takes along Jinja's marks of what else to pass
        def metered(*args: Any, **kwargs: Any) -> Any:
            self.meter.tick()
            return self.meter.keep(function(*args, **kwargs), shared=True)

        return metered


class _Namespace(Namespace):
    """A namespace that does not write out what it holds: as it can be changed, that is bounded by nothing."""

    def __repr__(self) -> str:
        return "namespace"


class _Metering(NodeTransformer):
    """Puts the meter into a parsed template, where Jinja offers no hook."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Returns the node, its parts metered, with a filter around it where it needs one."""
        if type(node) in REFUSED_TAGS:
            raise TemplateSyntaxError(f"{REFUSED_TAGS[type(node)]} has no place in a chat template", node.lineno)
        self.generic_visit(node)
        if isinstance(node, nodes.For):
            if node.recursive:
                raise TemplateSyntaxError("recursive loops are not supported", node.lineno)
            node.iter = _filtered("(each)", node.iter)
        elif isinstance(node, nodes.Concat):
            return _filtered("(join)", nodes.List(node.nodes, lineno=node.lineno))
        elif (
            isinstance(node, (nodes.List, nodes.Dict))
            or (isinstance(node, nodes.Tuple) and node.ctx == "load")
            or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice))
        ):
            return _filtered("(keep)", node)
        elif isinstance(node, (nodes.Compare, nodes.Test)):
            return _filtered("(tick)", node)
        return node


def _filtered(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def raise_exception(message: object) -> None:
    """Ends the rendering: what a template calls when it does not take the messages."""
    raise Declined(message)


def strftime_now(format: str) -> str:
    """Returns the present time, as strftime writes it."""
    if len(format) > 100:
        raise Exceeded("strftime_now: expected a format of at most 100 characters")
    return datetime.now().strftime(format)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns a value as JSON, with <, > and & as they are.

    `ensure_ascii` leaves out the private characters of planes 15 and 16, which stand for others while a chat is
    rendered.
    """
    if len(json.dumps([indent, separators])) > 40 or (isinstance(indent, int) and indent > 16):
        raise Exceeded("tojson: expected an indent of at most 16 and short separators")
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:
        text = re.sub("[^\x00-\x7f\U000f0000-\U0010ffff]", lambda found: json.dumps(found[0])[1:-1], text)
    return text
