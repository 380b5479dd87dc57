"""The package as a distribution: version, lazy submodules, declared dependencies, types, other platforms."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from command import python

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
MODULES = sorted((ROOT / "mpt_eqx").rglob("*.py"))
# Where the name of a distribution is not the name that is imported.
DISTRIBUTIONS = {
    "orbax": "orbax-checkpoint",
    "llama_cpp": "llama-cpp-python",
    # What another one requires.
    "jaxlib": "jax",
    "pydantic": "fastapi",
    "starlette": "fastapi",
}


def distribution(requirement):
    """Returns the normalised name of a requirement such as `huggingface_hub>=1.0`."""
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_submodules_are_there_after_the_import():
    """Lazily; and neither they nor the version bring in the extras' packages."""
    out = python(
        "import sys, mpt_eqx\n"
        "print('mpt_eqx.text' in sys.modules, 'mpt_eqx.train' in sys.modules)\n"
        "print(all(name in dir(mpt_eqx) for name in ('sharding', 'surgery', 'text', 'train', 'sampling', 'MPT')))\n"
        "print(mpt_eqx.train.next_token_loss.__name__, mpt_eqx.sharding.shard.__name__)\n"
        "print(mpt_eqx.text.load_tokenizer.__name__, mpt_eqx.surgery.resize_vocab.__name__)\n"
        "print(mpt_eqx.sampling.top_k.__name__)\n"
        "print([name for name in ('tokenizers', 'jinja2', 'torch', 'matplotlib') if name in sys.modules])\n"
        "print(mpt_eqx.__version__)"
    )
    from mpt_eqx import __version__

    assert out.splitlines() == [
        "False False", "True", "next_token_loss shard", "load_tokenizer resize_vocab", "top_k", "[]", __version__
    ]  # fmt: skip


def test_an_unknown_attribute_is_an_attribute_error():
    import mpt_eqx

    with pytest.raises(AttributeError, match="module 'mpt_eqx' has no attribute 'trainer'"):
        _ = mpt_eqx.trainer


def test_the_version_has_one_source():
    import mpt_eqx

    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    source = ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{mpt_eqx.__version__}"' in source.read_text()
    assert f"## {mpt_eqx.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_package_is_typed():
    """The wheel takes the whole directory, so that the marker is in it."""
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["mpt_eqx"] and not {"include", "exclude"} & set(wheel)
    assert (ROOT / "mpt_eqx" / "py.typed").is_file()


def test_importing_needs_no_module_of_posix():
    """As on Windows, where there is neither fcntl nor resource."""
    python(
        "import sys; sys.modules.update(dict.fromkeys(('fcntl', 'resource', 'pwd', 'termios')))\n"
        "import mpt_eqx, mpt_eqx.sharding, mpt_eqx.text, mpt_eqx.train, mpt_eqx.cli"
    )


def imports(path):
    """Yields (top-level package, whether it is imported with the module) for what a module imports."""
    tree = ast.parse(path.read_text())
    inside = {
        node
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(outer, ast.If) and ast.unparse(outer.test) == "TYPE_CHECKING")
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            yield name.split(".")[0], node not in inside


def test_every_imported_package_is_declared():
    """Module-level imports are in `dependencies` (in `text` for templates), imports in functions in any extra."""
    always = {distribution(requirement) for requirement in PROJECT["dependencies"]}
    extras = {
        name: {distribution(requirement) for requirement in requirements}
        for name, requirements in PROJECT["optional-dependencies"].items()
    }
    used = set()
    for path in MODULES:
        for name, at_once in imports(path):
            if name in sys.stdlib_module_names or name == "mpt_eqx":
                continue
            wanted = DISTRIBUTIONS.get(name, name.replace("_", "-"))
            used.add(wanted)
            # What is imported only when a chat template is rendered, or by those who have the harness, or serve.
            lazy = extras["text"] if path.name == "template_sandbox.py" else set()
            lazy = extras["eval"] if path.parent.name == "lm_eval" else lazy
            lazy = extras["serve"] if path.parent.name == "serve" else lazy
            known = always | lazy if at_once else always.union(*extras.values())
            assert wanted in known, f"{path.relative_to(ROOT)} imports {name}"
    # The optimisers that users train with, and what checks the shapes in annotations for who installs jaxtyping's hook.
    assert always - used <= {"optax", "beartype"}


def test_the_oldest_versions_are_the_lower_bounds():
    pins = dict(
        line.split("==") for line in (ROOT / ".ci" / "oldest.txt").read_text().split("\n") if line and line[0] != "#"
    )
    text = PROJECT["optional-dependencies"]["text"]
    bounds = dict(requirement.split(">=") for requirement in (*PROJECT["dependencies"], *text))
    assert pins.pop("jaxlib") == bounds["jax"]
    assert pins == bounds
