"""Mutations by syntax tree: a part of a function is found by its shape, so that renaming a local breaks no test."""

import ast
import inspect
import types
from types import ModuleType


def mutant(module: ModuleType, function: str, part: str, other: str) -> ModuleType:
    """Returns a copy of a module in which an expression of a function is another one.

    Args:
        module: the module.
        function: the name of the function.
        part: the expression, which occurs once; a name of one capital letter stands for any expression.
        other: what takes its place; its capital letters are those of `part`.
    """
    tree = ast.parse(inspect.getsource(module))
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
    pattern, count = ast.parse(part, mode="eval").body, 0

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            nonlocal count
            bound: dict[str, ast.AST] = {}
            if isinstance(node, ast.expr) and _match(pattern, node, bound):
                count += 1
                filled = _Fill(bound).visit(ast.parse(other, mode="eval").body)
                if hasattr(node, "ctx"):
                    filled.ctx = node.ctx
                return filled
            return self.generic_visit(node)

    found.body = [Replace().visit(statement) for statement in found.body]
    assert count == 1, f"{part} was found {count} times in {function}"
    mutated = types.ModuleType("mutated")
    exec(compile(ast.fix_missing_locations(tree), "<mutated>", "exec"), mutated.__dict__)
    return mutated


class _Fill(ast.NodeTransformer):
    def __init__(self, bound: dict[str, ast.AST]):
        self.bound = bound

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.bound.get(node.id, node)


def _match(pattern: object, node: object, bound: dict[str, ast.AST]) -> bool:
    """Tells whether a node has the shape of a pattern, and notes what its capital letters stand for."""
    if isinstance(pattern, ast.Name) and len(pattern.id) == 1 and pattern.id.isupper():
        if not isinstance(node, ast.expr):
            return False
        return ast.dump(bound.setdefault(pattern.id, node)) == ast.dump(node)
    if isinstance(pattern, ast.AST):
        same = type(pattern) is type(node)
        fields = [name for name in pattern._fields if name not in ("ctx", "kind")]
        return same and all(_match(getattr(pattern, name), getattr(node, name), bound) for name in fields)
    if isinstance(pattern, list):
        same = isinstance(node, list) and len(pattern) == len(node)
        return same and all(_match(a, b, bound) for a, b in zip(pattern, node, strict=True))
    return pattern == node
