"""What README and pages say is true: code, output, links, figures, the tests they name, the drawing of the rooms."""

import ast
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "mpt_eqx"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted(DOCS.rglob("*.md"))
JUSTFILE = (ROOT / "Justfile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def named(path):
    return str(path.relative_to(ROOT))


def script(name):
    """Returns one of the scripts of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fences(path):
    """Returns (language, content, what the block right after it shows as output) of each fenced block."""
    text = path.read_text()
    found = list(re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    for block, following in zip(found, [*found[1:], None], strict=False):
        shown = following is not None and following[1] == "text" and not text[block.end() : following.start()].strip()
        yield block[1], block[2], following[2] if shown else None


def with_language(language):
    return [path for path in PAGES if any(name == language for name, *_ in fences(path))]


# What they call, other pages and tests call, too.
LONG = ("index.md", "migrating.md", "quantization.md", "sharding.md", "surgery.md")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if path.name in LONG else path for path in with_language("python")],
    ids=named,
)
def test_blocks_of_python_run_and_print_what_is_shown(path, one_layer, tmp_path, monkeypatch, capsys):
    """A page's blocks run one after another; in the README each stands alone."""
    monkeypatch.chdir(tmp_path)
    if path.name in (
        "generation.md",
        "lora.md",
        "migrating.md",
        "quantization.md",
        "serving.md",
        "sharding.md",
    ):  # what they print is the same for any model
        monkeypatch.setattr("mpt_eqx.SHIPPED_MODEL", one_layer)
    names = {}
    for number, (language, code, shown) in enumerate(fences(path)):
        if language == "python":
            names = {} if path.name == "README.md" else names
            with jax.numpy_dtype_promotion("standard"):  # JAX's default, as users run them
                exec(compile(code, f"{path.name}, block {number}", "exec"), names)
            printed = capsys.readouterr().out
            assert printed == (shown or ""), (code, printed)


def known_flags(words):
    """Returns an error for a command of the page, or None: its program, recipe, extra, script and flags exist."""
    from mpt_eqx.cli import _parser

    program, *rest = words
    flags = {word.split("=")[0] for word in rest if word.startswith("--")}
    if program == "mpt-eqx":
        try:
            _parser().parse_args(rest)
        except SystemExit as stopped:
            return stopped.code and f"mpt-eqx: {rest}"
        return None
    if program == "just":
        return None if re.search(rf"^{rest[0]}\b.*:", JUSTFILE, re.MULTILINE) else f"no recipe {rest[0]}"
    if program == "pip":
        extras = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        unknown = {one for many in extras for one in many.split(",")} - set(
            PYPROJECT["project"]["optional-dependencies"]
        )
        return f"no extra {unknown}" if unknown else None
    if program == "python" and rest[0] == "-m":
        return None if importlib.util.find_spec(rest[1]) else f"no module {rest[1]}"
    if program in ("python", "bash"):
        if rest[0] == "script.py":
            return None
        file = ROOT / rest[0]
        missing = sorted(flag for flag in flags if not file.is_file() or f'"{flag}"' not in file.read_text())
        return f"{rest[0]}: {missing or 'no such file'}" if missing or not file.is_file() else None
    return f"not a command that this test knows: {program}"


PREFIXES = re.compile(r"^(?:srun (?:--\S+ )+|XLA_FLAGS=\S+ )")


@pytest.mark.parametrize("path", with_language("sh"), ids=named)
def test_blocks_of_commands_name_what_there_is(path):
    for language, block, _ in fences(path):
        for line in block.splitlines() if language == "sh" else ():
            for command in PREFIXES.sub("", line).split(" && "):
                assert known_flags(shlex.split(command, comments=True)) is None, command


COMMAND = re.compile(r"`((?:mpt-eqx|just|python|bash) [^`]+)`")


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_commands_in_a_sentence_name_what_there_is(path):
    for command in COMMAND.findall(re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)):
        words = shlex.split(command)
        if words[0] == "mpt-eqx":  # often without the arguments that it needs
            sources = "".join(file.read_text() for file in (PACKAGE / "cli").glob("*.py"))
            missing = [
                word
                for word in words[1:2] + [w for w in words if w[:2] == "--" and w != "--help"]
                if f'"{word}"' not in sources
            ]
            assert not missing, command
        else:
            assert known_flags(words) is None, command


def anchors(path):
    """Returns the anchors of a page's headings, as Markdown's table of contents makes them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_pictures_and_anchors_are_there(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            there = path if not file else (path.parent / file).resolve()
            assert there.is_file(), target
            assert DOCS in there.parents or path.parent == ROOT, f"{target}: the site has only what is in docs/"
            assert not anchor or anchor in anchors(there), target


def test_the_navigation_has_every_page():
    config = (ROOT / "mkdocs.yml").read_text()
    assert sorted(re.findall(r": (\S+\.md)$", config, re.MULTILINE)) == sorted(
        str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")
    )


def public_names():
    """Returns what `mpt_eqx` and its public modules export: imports that repeat the name, and constants."""
    for module in ("", "interp", "lora", "serve", "sharding", "surgery", "train", "text"):
        dotted = f"mpt_eqx.{module}".rstrip(".")
        body = ast.parse((PACKAGE / module / "__init__.py").read_text()).body
        for node in [*body, *(inner for outer in body if isinstance(outer, ast.Try) for inner in outer.body)]:
            if isinstance(node, ast.ImportFrom):
                yield from (f"{dotted}.{alias.name}" for alias in node.names if alias.asname == alias.name)
            elif isinstance(node, ast.Assign) and re.match(r"[A-Z]", node.targets[0].id):
                yield f"{dotted}.{node.targets[0].id}"


def test_the_api_pages_have_exactly_the_public_names():
    written = [
        name for path in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)$", path.read_text(), re.M)
    ]
    rooms = ("interp", "lora", "serve", "sharding", "surgery", "train", "text", "errors")
    public = set(public_names())
    twice = {name for name in public if name.count(".") == 2 and f"mpt_eqx.{name.split('.')[-1]}" in public}
    assert sorted(written) == sorted(public - {f"mpt_eqx.{room}" for room in rooms} - twice)


def test_the_readme_is_short_and_has_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert "\npip install '.[text]' && mpt-eqx generate \"The zip() function\"\n" in text
    assert "\npip install -e '.[dev]' && just test\n" in text
    run = (ROOT / ".ci" / "run").read_text()
    assert "command_of \"pip install '.[text]'\"" in run and "command_of \"pip install -e '.[dev]'\"" in run


TEST_NAME = re.compile(r"`(test_\w+)(?:\[([^`]+)\])?`")


def test_every_test_that_a_page_names_exists(pytestconfig):
    """Functions are found in the sources; ids of parameters among what was collected, of the files that were."""
    functions = {
        node.name
        for file in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    names = [match.groups() for path in PAGES for match in TEST_NAME.finditer(path.read_text())]
    assert len(names) > 80
    assert {function for function, _ in names} <= functions, {function for function, _ in names} - functions
    collected = pytestconfig.collected_names
    known = {name.split("[")[0] for name in collected}
    missing = {f"{name}[{id_}]" for name, id_ in names if id_ and name in known} - collected
    assert not missing, missing


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_tables_hold_the_committed_figures(path):
    """The tables that come from the benchmarks are what `python docs/tables.py` writes."""
    assert script("tables").filled(path.read_text()) == path.read_text()


def test_pictures_are_what_their_scripts_draw():
    assert script("tables").chart() == (DOCS / "speed.svg").read_text()
    assert script("architecture").picture() == (DOCS / "architecture.svg").read_text()


def test_the_shipped_models_figures_are_those_of_its_training():
    from mpt_eqx import SHIPPED_MODEL

    figures = json.loads((SHIPPED_MODEL / "training.json").read_text())["test_nats_per_byte"]
    page, card = (DOCS / "index.md").read_text(), (SHIPPED_MODEL / "README.md").read_text()
    for name in ("nats", "gzip", "xz", "xz_after"):
        assert f"{figures[name]:.3f}" in card
    for name in ("nats", "gzip", "xz"):
        assert f"{figures[name]:.2f}" in page


@pytest.mark.parametrize("name", ["speed", "speed_amx"])
def test_the_speed_page_is_written_from_the_measurements(name):
    sys.path.insert(0, str(ROOT))  # the benchmarks are not installed
    from benchmarks.speed.report import markdown

    results = ROOT / "benchmarks" / "results"
    written = markdown(json.loads((results / f"{name}.json").read_text()))
    assert written.strip() == (results / f"{name}.md").read_text().strip()


def rooms_that_are_imported():
    """Returns for each room of the package the other rooms that any of its modules imports, wherever in the module."""
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    rooms -= {"__init__", "__main__"}
    imported = {room: set() for room in rooms}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: imports are absolute"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                package, _, rest = name.partition(".")
                if package == "mpt_eqx" and room in rooms and rest.split(".")[0] in rooms - {room}:
                    imported[room].add(rest.split(".")[0])
    return imported


def test_the_arrows_of_the_drawing_are_the_imports():
    drawn = {room: set(arrows) for room, (_, arrows) in script("architecture").ROOMS.items()}
    assert drawn == rooms_that_are_imported()


def test_imports_go_one_way():
    rooms = script("architecture").ROOMS
    order = list(rooms)
    for room, (_, arrows) in rooms.items():
        assert list(arrows) == [other for other in order[: order.index(room)] if other in arrows]


def defines(file, name):
    return re.search(rf"^((?:async )?def|class) {name}\b|^{name}(: .*)? = ", (PACKAGE / file).read_text(), re.MULTILINE)


def test_the_table_of_places_is_true():
    page = (DOCS / "architecture.md").read_text()
    rows = re.findall(r"^\|[^|]*\| `([\w/]+\.\w+)`, `(\w+)` \|", page, re.MULTILINE)
    assert len(rows) > 15
    for file, name in rows:
        assert defines(file, name), (file, name)


def test_the_flows_are_true():
    """Each step of a flow is defined where the page says, and a step before it names it."""
    flows = (DOCS / "architecture.md").read_text().split("\n## From ")[1:]
    assert len(flows) == 4
    for flow in flows:
        steps = re.findall(r"^\d+\. `([\w/]+\.py)`, `([\w.]+)`", flow, re.MULTILINE)
        assert len(steps) >= 4, flow
        for number, (file, name) in enumerate(steps):
            *owner, function = name.split(".")
            source = (PACKAGE / file).read_text()
            assert defines(file, owner[0]) if owner else defines(file, function), (file, name)
            assert re.search(rf"\bdef {function}\b", source), (file, name)
            if number:
                before = "".join((PACKAGE / file).read_text() for file, _ in steps[:number])
                assert function == "__call__" or re.search(rf"\b{function}\b", before), name


def test_the_workflow_tests_what_the_package_says_it_supports():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    classifiers = "\n".join(PYPROJECT["project"]["classifiers"])
    versions = re.findall(r"Python :: (3\.\d+)", classifiers)
    assert versions and all(f'"{version}"' in workflow for version in versions)
    assert ".ci/oldest.txt" in workflow and "macos" in workflow and "just test-all" in workflow
