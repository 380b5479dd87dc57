"""replace: a model with other modules in it, found by name."""

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx

from mpt_eqx.errors import MPTError
from mpt_eqx.model import MPT
from mpt_eqx.model.agreement import check_agreement
from mpt_eqx.model.leaves import is_array, named_arrays, with_fields
from mpt_eqx.model.stacked import StackedBlocks, unstack
from mpt_eqx.surgery.stacking import stack

OWN = ("config", "layout", "remat")
"""Fields of a model that other functions change: their values are no parts of it."""


def replace(model: MPT, where: str | Sequence[str] | Callable[[MPT], Any], fn: Callable[[Any], Any]) -> MPT:
    """Returns the model with fn(part) in place of each part that `where` names, as `equinox.tree_at` with replace_fn.

    A part may be a module, such as "blocks.0.attn.Wqkv", an array ("norm_f.weight"), or a setting that is no leaf
    ("blocks.*.ffn.act"). A module in its place has to take and return what the part did. What wraps the embedding
    needs a `weight`, too, where the output matrix is the embedding.

    `save_pretrained` refuses a model with other modules or settings than its configuration asks for.

    Args:
        model: a model. A stacked one is unstacked for it, and stacked again.
        where: a name or a pattern of names, in which * stands for anything and ? for one letter, or several of these;
            of parts within each other the outer one counts, and a setting needs its own name in the last place. Or a
            function that returns parts of the (unstacked) model, as in `equinox.tree_at`.
        fn: gets a part and returns what stands in its place; called in the order of the model.

    Raises:
        MPTError: nothing matches, the message has names near to it; a part of the same kind has other shapes, so that
            the configuration would not agree; or blocks of a stacked model are no longer alike.
    """
    check_function(fn)
    single = unstack(model)
    if callable(where):
        if isinstance(found := where(single), list | tuple) and not found:
            raise MPTError("where: expected a function that returns parts of the model, found one that returns none")
        changed = eqx.tree_at(where, single, replace_fn=lambda part: _checked("where", part, fn(part)))
    else:
        changed = _changed(single, "", make_matcher(single, where), fn)
    check_agreement(changed)
    return stack(changed) if isinstance(model.blocks, StackedBlocks) else changed


def check_function(fn: Any) -> None:
    """Raises an MPTError unless fn can be called."""
    if not callable(fn):
        raise MPTError(f"fn: expected a function of a part of the model, found {fn!r:.80}")


def make_matcher(model: MPT, where: Any) -> Callable[[str, bool], bool]:
    """Returns which names, and whether of a setting, some patterns match; an error if one of them matches none."""
    patterns = [where] if isinstance(where, str) else list(where) if isinstance(where, list | tuple) else []
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise MPTError(f"where: expected a name, a pattern such as 'blocks.*.attn.Wqkv' or a function, found {where!r}")

    def matches(pattern: str, name: str, is_setting: bool) -> bool:
        if is_setting and name.rpartition(".")[2] != pattern.rpartition(".")[2]:
            return False
        return fnmatch.fnmatchcase(name, pattern)

    known = list(_names(model, ""))
    for pattern in patterns:
        if not any(matches(pattern, *named) for named in known):
            starred = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in known)
            near = difflib.get_close_matches(re.sub(r"\.\d+(?=\.|$)", ".*", pattern), starred, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"a model has {', '.join(list(starred)[:8])}, …"
            raise MPTError(f"where: expected the name of a part of the model, or a pattern, found {pattern!r}; {hint}")
    return lambda name, is_setting: any(matches(pattern, name, is_setting) for pattern in patterns)


def _parts(node: Any) -> list[tuple[str, Any, bool]]:
    """Returns name, value and whether it is a setting, for each part that a node has."""
    if isinstance(node, eqx.Module) and dataclasses.is_dataclass(node):
        parts = [
            (field.name, getattr(node, field.name), bool(field.metadata.get("static")))
            for field in dataclasses.fields(node)
            if not (isinstance(node, MPT) and field.name in OWN)
        ]
    elif isinstance(node, dict):
        parts = [(str(key), value, False) for key, value in node.items()]
    elif type(node) in (list, tuple):
        parts = [(str(i), value, False) for i, value in enumerate(node)]
    else:
        return []
    return [part for part in parts if part[1] is not None]


def _names(node: Any, prefix: str) -> Iterator[tuple[str, bool]]:
    """Yields the name of each part, and whether it is a setting."""
    for key, value, is_setting in _parts(node):
        yield f"{prefix}{key}", is_setting
        if not is_setting:
            yield from _names(value, f"{prefix}{key}.")


def _changed(node: Any, prefix: str, matches: Callable[[str, bool], bool], fn: Callable[[Any], Any]) -> Any:
    """Returns a node with fn(part) in place of the parts within it that match."""
    new: dict[str, Any] = {}
    for key, value, is_setting in _parts(node):
        name = f"{prefix}{key}"
        if matches(name, is_setting):
            new[key] = _checked(name, value, fn(value))
        elif not is_setting and (changed := _changed(value, f"{name}.", matches, fn)) is not value:
            new[key] = changed
    if not new:
        return node
    if isinstance(node, eqx.Module):
        return with_fields(node, **new)
    if isinstance(node, dict):
        return {key: new.get(str(key), value) for key, value in node.items()}
    return type(node)(new.get(str(i), value) for i, value in enumerate(node))


def _checked(name: str, old: Any, new: Any) -> Any:
    """Returns the new part; an error if it is of the old one's kind and has other shapes."""
    if type(old) is type(new) or (is_array(old) and is_array(new)):
        shapes = [
            {leaf_name: list(leaf.shape) for leaf_name, leaf in named_arrays({name: part})} for part in (old, new)
        ]
        for leaf, shape in shapes[0].items():
            if shapes[1].get(leaf, shape) != shape:
                raise MPTError(
                    f"{leaf}: expected {shape}, a size that model.config says, found {shapes[1][leaf]}; resize_vocab "
                    f"and keep_blocks of mpt_eqx.surgery change both, equinox.tree_at the weights alone"
                )
    return new
