"""A Jinja2 sandbox with limits on memory and time, for templates that come with a checkpoint.

Jinja's own sandbox keeps a template away from Python's internals, but allows `'a' * 10**9` and nested long loops. This
one allows only the filters, methods and globals that prompts need, and meters everything that can grow: operators,
calls, filters and output, and, by rewriting the parsed template, loops, slices, `~`, comparisons and literal lists.
The time limit is CPU time of the thread, so that it does not depend on the load of the machine.

The environment is the one that transformers gives to chat templates: trimmed blocks, break and continue,
`raise_exception`, `strftime_now`, and a `tojson` that does not escape HTML.
"""

import functools
import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from datetime import datetime
from types import CodeType
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
MAX_SIZE = 1_000_000  # characters of the output, and of any intermediate value
MAX_TOTAL = 16 * MAX_SIZE  # characters of all intermediate values together
MAX_SECONDS = 1.0  # CPU time
MAX_WORK = 200_000_000  # comparisons of characters in one call, which cannot be ended: about 0.1 s
ITEM_SIZE = 64  # cost of an item of a list, in characters: about its bytes

# Allowed names. Jinja's others escape HTML or can produce large values from small ones.
FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items", "last"),
    *("length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr"),
    *("sort", "string", "title", "unique", "upper"),
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
NOT_ASCII = "[^\x00-\x7f\U000f0000-\U0010ffff]"  # but for escapes of untrusted text
# Python searches forward in linear time; from the right, and for any of many characters, it compares each with each.
QUADRATIC = {"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"}
FORBIDDEN_TAGS: dict[type[nodes.Node], str] = {
    nodes.Extends: "extends",
    nodes.Include: "include",
    nodes.Import: "import",
    nodes.FromImport: "from",
    nodes.EvalContextModifier: "autoescape",
    nodes.ScopedEvalContextModifier: "autoescape",
}


def render(text: str, variables: Mapping[str, Any], *, origin: str) -> str:
    """Returns the output of a template.

    Args:
        text: the template.
        variables: its variables, besides the globals.
        origin: the template's file or argument, for error messages.

    Raises:
        MPTError: it is no Jinja template, refuses the variables, fails, or exceeds a limit.
    """
    if (size := len(text.encode())) > MAX_TEMPLATE:
        raise MPTError(f"{origin}: expected a template of at most {MAX_TEMPLATE:,} bytes, found {size:,}")
    meter = Meter()
    try:
        environment = _Environment(meter)
        template = environment.template_class.from_code(environment, _compiled(text), environment.make_globals(None))
        output: list[str] = []
        size = 0
        for piece in template.generate(variables):
            meter.check_time()
            if (size := size + len(piece)) > MAX_SIZE:
                raise LimitExceeded(f"the template writes more than {MAX_SIZE:,} characters; shorten the messages")
            output.append(piece)
        return "".join(output)
    except LimitExceeded as error:
        raise MPTError(f"{origin}: {error}") from None
    except Refusal as error:
        raise MPTError(f"{origin}: the template does not take these messages: {shortened(error)}") from None
    except TemplateSyntaxError as error:
        found = shortened(error.message)
        raise MPTError(
            f"{origin}, line {error.lineno}: expected a chat template, found something else ({found})"
        ) from None
    except Exception as error:  # a template can raise anything that operators raise
        raise MPTError(f"{origin}: the template failed ({type(error).__name__}: {shortened(error)})") from None


@functools.lru_cache(maxsize=16)  # compiling takes ten times as long as rendering, and a file has many conversations
def _compiled(text: str) -> CodeType:
    """Returns the code of a template; it finds filters and meter in the environment that it is run in."""
    environment = _Environment(Meter())
    return environment.compile(_MeterInserter().visit(environment.parse(text)))


class LimitExceeded(Exception):
    """A template exceeded a limit. Not a ValueError, which Jinja's own filters catch."""


class Refusal(Exception):
    """A template called raise_exception."""


class Meter:
    """The size of the values of one rendering so far, and its deadline."""

    def __init__(self) -> None:
        self._total = 0
        self._deadline = time.thread_time() + MAX_SECONDS

    def check_time(self) -> None:
        """Raises after the deadline."""
        if time.thread_time() > self._deadline:
            raise LimitExceeded(f"the template runs for more than {MAX_SECONDS:g} s")

    def timed(self, value: Any) -> Any:
        """Returns the value before the deadline."""
        self.check_time()
        return value

    def counted(self, value: Any, *, shallow: bool = False) -> Any:
        """Returns a new value after adding its size to the total; `shallow` if its items are not new."""
        self.check_time()
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return self.iterate(value)
        size = size_of(value)
        _check_size(size)
        self._total += ITEM_SIZE * len(value) if shallow and isinstance(value, (list, tuple, dict)) else size
        if self._total > MAX_TOTAL:
            raise LimitExceeded(f"the template makes more than {MAX_TOTAL:,} characters in intermediate values")
        return value

    def iterate(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yields the values until the deadline."""
        for value in values:
            self.check_time()
            yield value

    def join(self, separator: str, values: Iterable[Any]) -> str:
        """Returns values as text with a separator between them."""
        parts, size = [], 0
        for value in self.iterate(values):
            parts.append(value if type(value) is str else str(value))
            size += len(parts[-1]) + len(separator)
            _check_size(size - len(separator))
        return self.counted(str(separator).join(parts))

    def replace(self, text: str, old: str, new: str, count: int = -1) -> str:
        """Returns `text` with the first `count` occurrences of `old` replaced, or with all."""
        found = text.count(old)
        _check_size(len(text) + (found if count < 0 else min(found, count)) * len(new))
        return self.counted(text.replace(old, new, count))


def _check_work(text: str, *arguments: object) -> None:
    """Raises before a call that would compare each character of a text with each of its arguments' too often."""
    if len(text) * sum(len(argument) for argument in arguments if isinstance(argument, str)) > MAX_WORK:
        raise LimitExceeded(f"the template searches or strips with more than {MAX_WORK:,} comparisons in one call")


def size_of(value: Any) -> int:
    """Returns the approximate size of a value in characters; shared items count each time, sizes stop at MAX_SIZE.

    A large integer counts the square of its bits, like the work of dividing it.
    """
    size, stack = 0, [value]
    while stack and size <= MAX_SIZE:
        item = stack.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, int):
            size += item.bit_length() ** 2 // ITEM_SIZE
        elif isinstance(item, (dict, list, tuple, KeysView, ValuesView, ItemsView)):
            size += ITEM_SIZE * len(item)
            if size <= MAX_SIZE:
                stack.extend(item)
                stack.extend(item.values() if isinstance(item, dict) else ())
    return size


def shortened(message: object, *, limit: int = 300) -> str:
    """Returns a message cut to `limit` characters, because a template can make it arbitrarily long."""
    text = str(message)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise LimitExceeded(f"the template makes a value of more than {MAX_SIZE:,} characters")


class _Environment(ImmutableSandboxedEnvironment):
    """The environment of one rendering."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, meter: Meter):
        # Not optimised: constant folding would happen before anything is metered.
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
            "tojson": lambda *args, **kwargs: meter.join("", json_parts(*args, **kwargs)),
            "trim": self._metered(trim),
            # Inserted by _MeterInserter; no template can write such a name.
            "(iterate)": meter.iterate,
            "(count)": functools.partial(meter.counted, shallow=True),
            "(join)": functools.partial(meter.join, ""),
            "(time)": meter.timed,
        }
        self.globals = {
            "dict": dict,
            "namespace": _Namespace,
            "raise_exception": raise_exception,
            "range": safe_range,
            "strftime_now": strftime_now,
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may use an attribute: the methods above and those of Jinja's own objects."""
        for kind, names in METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return isinstance(obj, (LoopContext, Macro, Namespace)) and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Raises at once; Jinja's default would be rendered as empty text."""
        raise SecurityError(f"a template may not use .{attribute} of {type(obj).__name__}")

    def wrap_str_format(self, value: Any) -> None:
        """Leaves str.format to `is_safe_attribute`, which forbids it because of its widths."""

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, a macro or a method."""
        self.meter.check_time()
        name, owner = getattr(obj, "__name__", None), getattr(obj, "__self__", None)
        if isinstance(owner, str) and name in ("join", "replace"):
            return getattr(self.meter, name)(owner, *args, **kwargs)
        if isinstance(owner, str) and name in QUADRATIC:
            _check_work(owner, *args, *kwargs.values())
        return self.meter.counted(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes a binary operator after estimating the size of its result."""
        if operator == "%" and isinstance(left, str):
            raise SecurityError("text is not formatted with % here")
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_size((left.bit_length() * max(right, 0)) ** 2 // ITEM_SIZE)
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, (str, list, tuple)) and isinstance(other, int):
                    _check_size(size_of(one) * other)
        return self.meter.counted(super().call_binop(context, operator, left, right), shallow=True)

    def concat(self, pieces: Iterable[str]) -> str:
        """Joins the output of a macro or a block."""
        return self.meter.join("", pieces)

    @staticmethod
    @pass_context
    def _as_text(context: Any, value: Any) -> str:
        """Returns the output of `{{ value }}`."""
        return value if type(value) is str else context.environment.meter.counted(str(value))

    @staticmethod
    @pass_environment
    def _join(environment: "_Environment", values: Any, d: Any = "", attribute: Any = None) -> str:
        if attribute is not None:
            values = map(make_attrgetter(environment, attribute), values)
        return environment.meter.join(_text(d), values)

    def _metered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # keeps Jinja's marks on the function
        def metered(*args: Any, **kwargs: Any) -> Any:
            self.meter.check_time()
            return self.meter.counted(function(*args, **kwargs), shallow=True)

        return metered


class _Namespace(Namespace):
    """A namespace whose text does not contain its values, which could be nested without limit."""

    def __repr__(self) -> str:
        return "namespace"


class _MeterInserter(NodeTransformer):
    """Adds filters that meter to a parsed template, where Jinja has no hook."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Returns the metered node."""
        if type(node) in FORBIDDEN_TAGS:
            raise TemplateSyntaxError(f"{FORBIDDEN_TAGS[type(node)]} has no place in a chat template", node.lineno)
        self.generic_visit(node)
        if isinstance(node, nodes.For):
            if node.recursive:
                raise TemplateSyntaxError("recursive loops are not supported", node.lineno)
            node.iter = _filtered("(iterate)", node.iter)
        elif isinstance(node, nodes.Concat):
            return _filtered("(join)", nodes.List(node.nodes, lineno=node.lineno))
        elif (
            isinstance(node, (nodes.List, nodes.Dict))
            or (isinstance(node, nodes.Tuple) and node.ctx == "load")
            or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice))
        ):
            return _filtered("(count)", node)
        elif isinstance(node, (nodes.Compare, nodes.Test)):
            return _filtered("(time)", node)
        return node


def _filtered(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def raise_exception(message: object) -> None:
    """Ends the rendering; templates call it for messages that they do not support."""
    raise Refusal(message)


def strftime_now(format: str) -> str:
    """Returns the current time formatted by strftime."""
    if len(format) > 100:
        raise LimitExceeded("strftime_now: expected a format of at most 100 characters")
    return datetime.now().strftime(format)


def trim(value: Any, chars: str | None = None) -> str:
    """Returns a value as text without white space, or any of `chars`, at its ends."""
    text = _text(value)
    _check_work(text, chars)
    return text.strip(chars)


def json_parts(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> Iterator[str]:
    """Yields the parts of a value as JSON in which <, > and & are not escaped.

    `ensure_ascii` keeps the characters of planes 15 and 16, which are escapes of untrusted text.
    """
    if len(json.dumps([indent, separators])) > 40 or (isinstance(indent, int) and indent > 16):
        raise LimitExceeded("tojson: expected an indent of at most 16 and short separators")
    encoder = json.JSONEncoder(ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    for part in encoder.iterencode(value):
        yield re.sub(NOT_ASCII, lambda found: json.dumps(found[0])[1:-1], part) if ensure_ascii else part
