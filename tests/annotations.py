"""The check of annotated types and shapes that the tests run with."""

import functools

import beartype
from jaxtyping import _decorator

_checked = {}


def check(function):
    """Returns beartype's check of a function that has no body, as jaxtyping makes two for each that it decorates.

    What is local to another function is decorated at every call of that, which took a tenth of the tests' time: the
    checks of one place with the same annotations are made once.
    """
    defaults = (len(function.__defaults__ or ()), tuple(function.__kwdefaults__ or ()))
    key = (function.__module__, function.__qualname__, function.__code__, defaults, repr(function.__annotations__))
    if key not in _checked:
        _checked[key] = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))(function)
    return _checked[key]


def once(make):
    """Returns what `make` made for equal arguments."""
    kept = functools.cache(make)

    @functools.wraps(make)
    def made(*args, **kwargs):
        try:
            return kept(*args, **kwargs)
        except TypeError:  # a default value that has no hash
            return make(*args, **kwargs)

    return made


# The functions without a body, too: each is written as text and compiled.
_decorator._make_fn_with_signature = once(_decorator._make_fn_with_signature)
