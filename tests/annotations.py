"""The check of annotated types and shapes that the tests run with."""

import beartype

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
