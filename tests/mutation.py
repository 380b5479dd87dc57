"""Changes of a formula that a test has to notice, applied to its syntax tree: no name of a local is pinned by them."""

import ast
import inspect
import types


def mutated(module, function, change):
    """The contents of a module, made anew with `change(node)` in place of nodes of one of its functions.

    `change` returns the node that takes the place of another, or None to leave it; at least one must change.
    """
    tree = ast.parse(inspect.getsource(module))
    (found,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function]
    changes = []

    class Changer(ast.NodeTransformer):
        def visit(self, node):
            node = self.generic_visit(node)
            if (other := change(node)) is None:
                return node
            changes.append(node)
            return other

    Changer().visit(found)
    assert changes, f"nothing to change in {function}"
    made = types.ModuleType(module.__name__)
    exec(compile(ast.fix_missing_locations(tree), module.__file__, "exec"), made.__dict__)
    return made


def constant(old, new):
    """Every number `old` becomes `new`."""
    same = lambda node: isinstance(node, ast.Constant) and node.value == old and type(node.value) is type(old)  # noqa: E731
    return lambda node: ast.Constant(new) if same(node) else None


def right(operator, new):
    """The right side of an operation becomes the number `new`."""

    def change(node):
        same = isinstance(node, ast.BinOp) and isinstance(node.op, operator) and isinstance(node.right, ast.Constant)
        return ast.BinOp(node.left, node.op, ast.Constant(new)) if same else None

    return change


def call(old, new):
    """Calls of the function `old`, as it is spelled, become calls of `new`."""

    def change(node):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) != old:
            return None
        return ast.Call(ast.parse(new, mode="eval").body, node.args, node.keywords)

    return change


def argument(function, number):
    """A call of the function, as it is spelled, becomes its argument of that number."""

    def change(node):
        return node.args[number] if isinstance(node, ast.Call) and ast.unparse(node.func) == function else None

    return change


def left(operator):
    """An operation becomes its left side."""
    return lambda node: node.left if isinstance(node, ast.BinOp) and isinstance(node.op, operator) else None


def reversed_list(node):
    """A list of two stands the other way round."""
    return ast.List(node.elts[::-1], node.ctx) if isinstance(node, ast.List) and len(node.elts) == 2 else None


def unsigned(node):
    """A minus sign goes away."""
    return node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else None


def in_comparisons(change):
    """The change is made to the right side of comparisons only."""

    def changed(node):
        if not isinstance(node, ast.Compare) or (other := change(node.comparators[0])) is None:
            return None
        return ast.Compare(node.left, node.ops, [other])

    return changed
