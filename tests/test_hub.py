"""The Hub, spoken to through huggingface_hub: against a local server with its interface."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import jax
import pytest
from conftest import GOLDEN, asked_by_line, one_in

COMMITS = (f"{number:040x}" for number in itertools.count())
# How the Hub answers for repositories that cannot be had: status, X-Error-Code.
REFUSED = {
    "owner/private": (401, "RepoNotFound"),
    "mosaicml/mpt-7b": (404, "RepoNotFound"),
    "owner/bare401": (401, ""),
    "owner/bare404": (404, ""),
    "owner/down": (500, ""),
    "owner/busy": (429, ""),
}


class Hub(BaseHTTPRequestHandler):
    """GET /api/models/… and GET, HEAD /owner/name/resolve/commit/file; weights are redirected, as to a CDN."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server.hub
        hub.requests.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0].strip("/")
        if path.startswith("api/models/"):
            repository, _, revision = path.removeprefix("api/models/").partition("/revision/")
            revision, tree, _ = revision.partition("/tree") if revision else (revision, "", "")
            if "/tree/" in repository:
                repository, _, revision = repository.partition("/tree/")
                tree = "tree"
            return self.model(repository, revision or "main", bool(tree))
        if path.startswith("cdn/"):
            return self.content(path.removeprefix("cdn/"), cut=hub.cut)
        repository, _, rest = path.partition("/resolve/")
        _, _, file = rest.partition("/")
        return self.file(repository, file)

    def refused(self, repository):
        gated = (401 if "Authorization" not in self.headers else 403, "GatedRepo")
        status, code = {"owner/gated": gated, **REFUSED}.get(repository, (0, ""))
        if status:
            self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code} if code else {})
        return bool(status)

    def model(self, repository, revision, tree):
        if self.refused(repository):
            return None
        hub = self.server.hub
        if revision not in ("main", hub.commit):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if tree:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in hub.files.items()
            ]
            return self.answer(200, json.dumps(entries).encode())
        siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
        record = {"id": repository, "sha": hub.commit, "private": False, "siblings": siblings}
        return self.answer(200, json.dumps(record).encode())

    def file(self, repository, file):
        if self.refused(repository):
            return None
        if file not in self.server.hub.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = self.server.hub.files[file]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.server.hub.commit}
        if file.endswith((".safetensors", ".bin", ".pt", ".gguf")):
            place = f"http://localhost:{self.server.server_port}/cdn/{file}"
            headers |= {"Location": place, "X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
            return self.answer(302, b"", headers)
        return self.answer(200, data, headers)

    def content(self, file, cut):
        data = self.server.hub.files[file]
        if cut and self.command == "GET":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return None
        headers, status = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, 200
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
            headers["Content-Range"], status = f"bytes {first}-{last}/{len(data)}", 206
            data = data[first : last + 1]
        if self.command == "GET":
            self.server.hub.sent[file] = self.server.hub.sent.get(file, 0) + len(data)
        return self.answer(status, data, headers)

    def answer(self, status, data, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def files_in(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "expected.safetensors"}


@pytest.fixture(scope="module")
def user():
    """Runs a line of Python in a process of its environment: huggingface_hub reads that once."""
    with asked_by_line("test_hub.py") as ask:
        yield lambda **order: json.loads(ask(json.dumps(order)))


@pytest.fixture(scope="module")
def server():
    """The server, and with it the users' environment, is the same for all tests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def hub(user, server, home):
    """A Hub with one repository, owner/m, and ways to load from it with an empty cache."""
    state = SimpleNamespace(
        files=files_in(GOLDEN / "hf_sharded"), commit=next(COMMITS), requests=[], sent={}, cut=False, cache=home / "hf"
    )
    server.hub = state

    def run(line, **environment):
        environment = {
            "HOME": str(home), "HF_HOME": str(state.cache), "HF_HUB_DISABLE_XET": "1",
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "TERMINAL": "", **environment,
        }  # fmt: skip
        answer = user(line=line, environment=environment)
        assert "Traceback" not in answer["error"], answer["error"]
        state.stderr = answer["error"]
        return answer["out"].strip()

    def load(source, arguments="", **environment):
        return run(f"print(from_pretrained({source!r}, {arguments}).config.num_parameters())", **environment)

    state.run, state.load = run, load
    yield state
    shutil.rmtree(state.cache, ignore_errors=True)


def test_download_and_offline_afterwards(hub):
    """Through a mirror named by HF_ENDPOINT, with redirects; then from the cache without asking anyone."""
    assert hub.load("owner/m") == "27840"
    assert any("/resolve/" in request and "safetensors" in request for request in hub.requests)
    assert not any("expected" in request or "case.json" in request.split("?")[0] for request in hub.requests)
    hub.requests.clear()
    assert hub.load("owner/m", HF_HUB_OFFLINE="1") == "27840"
    assert hub.load("owner/m", "local_files_only=True") == "27840"
    assert hub.run("print(checkpoint_info('owner/m').parameters)", HF_HUB_OFFLINE="1") == "27840"
    assert not hub.requests


def test_what_is_cached_is_not_downloaded_again(hub):
    hub.load("owner/m")
    hub.sent.clear()
    assert hub.load("owner/m") == "27840"
    assert not hub.sent


def test_an_update_is_picked_up(hub):
    """Another commit, in which one file is another."""
    wte = "float(from_pretrained('owner/m').wte.weight[0, 0])"
    before = hub.run(f"print({wte})")
    hub.sent.clear()
    index = json.loads(hub.files["model.safetensors.index.json"])
    shard = index["weight_map"]["transformer.wte.weight"]
    hub.files[shard] = hub.files[shard][:-4] + bytes(4)
    hub.files["config.json"] = hub.files["config.json"].replace(b'"max_seq_len": 64', b'"max_seq_len": 65')
    line = "m = from_pretrained('owner/m'); print(m.config.max_seq_len, float(m.wte.weight[-1, -1]))"
    assert hub.run(line) != "65 0.0"
    hub.commit = next(COMMITS)
    assert hub.run(line) == "65 0.0"
    assert list(hub.sent) == [shard]
    assert hub.run(line, HF_HUB_OFFLINE="1") == "65 0.0"
    assert hub.run(f"print({wte})", HF_HUB_OFFLINE="1") == before


def test_torch_weights_when_there_are_no_others(hub):
    hub.files = files_in(GOLDEN / "hf_hubstyle")
    assert hub.load("owner/m") == "27840"
    assert hub.load("owner/m", HF_HUB_OFFLINE="1") == "27840"
    assert hub.run("print(checkpoint_info('owner/m').format)") == "torch"


@pytest.mark.parametrize("name", ["mpt.pt", "consolidated.00.bin", "mpt.safetensors"])
def test_weights_under_another_name(hub, name):
    source = GOLDEN / "hf_default" if name.endswith("safetensors") else GOLDEN / "hf_bin" / "fp32_zip"
    held = files_in(source)
    (weights,) = (held.pop(file) for file in list(held) if file.endswith((".safetensors", ".bin")))
    hub.files = {**held, name: weights}
    parameters = hub.load(str(source))
    assert int(parameters) > 1000
    assert hub.load("owner/m") == parameters
    assert hub.load("owner/m", HF_HUB_OFFLINE="1") == parameters


@pytest.mark.parametrize("folder", ["", "gguf/"])
def test_one_of_several_gguf_files(hub, tmp_path, folder):
    """Which one is asked before anything is downloaded, and can be said."""
    from test_formats import write_gguf

    from mpt_eqx import from_pretrained

    write_gguf(tmp_path / "m.gguf", from_pretrained(GOLDEN / "hf_default"))
    names = [f"{folder}mpt-F32.gguf", f"{folder}mpt-{'X' * 3}.gguf"]
    hub.files = {name: (tmp_path / "m.gguf").read_bytes() for name in names}
    arguments = f"subfolder={folder.strip('/')!r}" if folder else ""
    assert hub.load("owner/m", arguments) == (
        "owner/m: expected one file of weights or an index of several, found mpt-F32.gguf, mpt-XXX.gguf; "
        f"pass one of them, such as 'owner/m/{names[0]}'"
    )
    assert not hub.sent
    assert hub.load(f"owner/m/{names[0]}") == "27840"
    assert list(hub.sent) == [names[0]]
    assert hub.load(f"owner/m/{names[0]}", HF_HUB_OFFLINE="1") == "27840"
    assert hub.run(f"print(checkpoint_info('owner/m/{names[0]}').format)") == "GGUF (F32)"
    assert hub.load("owner/m/none.gguf") == (
        "owner/m/none.gguf: expected this file in the repository, found "
        + ("no weights" if folder else "mpt-F32.gguf, mpt-XXX.gguf")
    )
    assert hub.load(f"owner/m/{names[1]}", HF_HUB_OFFLINE="1") == (
        f"owner/m/{names[1]}: expected this file in the Hub's local cache, while the Hub is out of reach, "
        "found mpt-F32.gguf"
    )
    assert hub.load(f"owner/m/{names[0]}", "subfolder='x'") == (
        f"owner/m/{names[0]}: names a file, so that subfolder='x' cannot be meant; leave it out"
    )


def test_a_repository_without_weights(hub):
    hub.files = {"config.json": hub.files["config.json"]}
    expected = "owner/m: expected weights in the repository, found none of .safetensors, .bin, .pt, .pth, .gguf"
    assert hub.load("owner/m") == expected
    assert hub.run("print(checkpoint_info('owner/m'))") == expected


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of four megabytes: its headers are a small part of it."""
    from mpt_eqx import MPT, MPTConfig, save_pretrained

    model = MPT(MPTConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=30_000, no_bias=True), key=jax.random.key(0))
    save_pretrained(model, (root := tmp_path_factory.mktemp("large")) / "single")
    save_pretrained(model, root / "sharded", max_shard_size=100_000)
    return root


@pytest.mark.parametrize("name", ["single", "sharded"])
def test_inspecting_fetches_headers_only(hub, large, name):
    from mpt_eqx import checkpoint_info

    hub.files = files_in(large / name)
    line = (
        "i = checkpoint_info({!r}); print(i.format, i.parameters, i.bytes, i.problems, "
        "sorted((t.name, t.shape, t.dtype, t.file) for t in i.tensors))"
    )
    info = checkpoint_info(large / name)
    assert hub.run(line.format("owner/m")) == hub.run(line.format(str(large / name)))
    assert len(hub.sent) == len({tensor.file for tensor in info.tensors})
    assert all(sent <= 100_001 for sent in hub.sent.values()) and sum(hub.sent.values()) < 0.1 * info.bytes
    assert hub.run("checkpoint_info('owner/m').tensors[0].read()").startswith("owner/m: only the header of model")
    offline = hub.run("checkpoint_info('owner/m')", HF_HUB_OFFLINE="1")
    assert ("expected weights in the Hub's local cache" if name == "single" else "only a part of it is in") in offline


def test_headers_that_are_wrong(hub):
    name = "model-00002-of-00005.safetensors"
    good = hub.files[name]
    hub.files[name] = b"x" * 500
    out = hub.run("checkpoint_info('owner/m')")
    assert out.startswith("owner/m: expected safetensors, found something else or a part (")
    hub.files[name] = (2**40).to_bytes(8, "little") + good[8:]
    out = hub.run("checkpoint_info('owner/m')")
    assert out.startswith("owner/m: expected safetensors, found something else or a part (")
    del hub.files[name]
    assert hub.run("checkpoint_info('owner/m')") == (
        "owner/m: expected the files that model.safetensors.index.json names; the repository does not have " + name
    )


GONE = (
    "no such directory, and no such repository on the Hub (or a private one: pass token=); the original mosaicml/mpt-* "
    "repositories have been reported gone since December 2025: use a local copy, a re-upload under another owner, or a "
    "GGUF file"
)
GATED = "the repository is gated; ask for access on its page, then pass token= or run `hf auth login`"
OUT_OF_REACH = (
    "no such directory, and not completely in the Hub's local cache, while the Hub itself is out of reach "
    "(no connection, HF_HUB_OFFLINE, or local_files_only=True)"
)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("mosaicml/mpt-7b", "", GONE),
        ("owner/private", "", GONE),
        ("owner/bare401", "", "no such directory, and the Hub answers with status 401; pass token=, or another one ("),
        ("owner/bare404", "", GONE),
        ("owner/bare404", "revision='v1'", GONE),
        ("owner/gated", "", GATED),
        ("owner/gated", "token='hf_x'", GATED),
        ("owner/down", "", "no such directory, and the Hub answers with status 500; try again later ("),
        ("owner/busy", "", "no such directory, and the Hub answers with status 429; try again later ("),
        ("owner/m", "revision='none'", "the repository has no revision 'none'"),
        (
            "owner/m",
            "subfolder='none'",
            "expected a directory 'none' in the repository, found none; check subfolder=",
        ),
        ("owner/m", "local_files_only=True", OUT_OF_REACH),
        ("owner--m/x", "", "no such directory, and not a repository id, which looks like owner/name"),
    ],
)
def test_what_cannot_be_had(hub, source, arguments, message):
    """Loading, and what needs no weights."""
    out = hub.load(source, arguments)
    assert out.startswith(f"{source}: {message}") and (out.endswith(message) or message.endswith("(")), out
    assert "\n" not in out
    if "subfolder" not in arguments:
        for name in ("load_tokenizer", "checkpoint_info"):
            assert hub.run(f"{name}({source!r}, {arguments})").startswith(f"{source}: {message}")


def test_the_cache_helps_while_the_hub_is_down(hub):
    hub.load("owner/m")
    shutil.copytree(hub.cache / "hub" / "models--owner--m", hub.cache / "hub" / "models--owner--down", symlinks=True)
    assert hub.load("owner/down") == "27840"
    assert hub.run("print(checkpoint_info('owner/down').parameters)") == "27840"


PART = (
    "owner/m: only a part of it is in the Hub's local cache, and the Hub itself is out of reach; "
    "download it again with a connection ("
)


def test_a_connection_cut_half_way(hub):
    """Never half a model: an error now, the whole model once the connection holds."""
    hub.cut = True
    out = hub.load("owner/m", HF_HUB_DOWNLOAD_TIMEOUT="2")
    assert out.startswith("owner/m: the download from the Hub broke off; try again (") and "\n" not in out
    assert hub.load("owner/m", HF_HUB_OFFLINE="1").startswith(PART)
    hub.cut = False
    assert hub.load("owner/m") == "27840"


def test_a_snapshot_with_a_shard_gone(hub):
    hub.load("owner/m")
    gone = next(hub.cache.rglob("snapshots/*/model-00003-of-00005.safetensors"))
    gone.unlink()
    assert hub.load("owner/m", HF_HUB_OFFLINE="1").startswith(PART)
    assert hub.load("owner/m") == "27840"


def test_no_server(hub):
    for line in ("from_pretrained('owner/m')", "checkpoint_info('owner/m')", "load_tokenizer('owner/m')"):
        assert hub.run(line, HF_ENDPOINT="http://127.0.0.1:9") == f"owner/m: {OUT_OF_REACH}"


@pytest.mark.parametrize(
    ("arguments", "terminal", "shown"),
    one_in(2, [("progress=True", "", True), ("", "1", True), ("progress=False", "1", False), ("", "", False)]),
)
def test_progress(hub, tmp_path, arguments, terminal, shown):
    """huggingface_hub's bars and ours come and go together."""
    hub.load("owner/m", arguments, TERMINAL=terminal)
    assert ("Fetching" in hub.stderr) == ("loaded" in hub.stderr) == shown
    assert bool(hub.stderr) == shown
    hub.run(f"convert('owner/m', {str(tmp_path / 'x')!r}, {arguments})", TERMINAL=terminal)
    assert ("converting" in hub.stderr) == shown and bool(hub.stderr) == shown


class Terminal(io.StringIO):
    """A stderr that may say that somebody is looking."""

    def isatty(self):
        return bool(os.environ.get("TERMINAL"))


def follow(order):
    """Runs a line of Python; an error of ours is its output."""
    os.environ["TERMINAL"] = order["environment"]["TERMINAL"]
    out, error = io.StringIO(), Terminal()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        import traceback

        from mpt_eqx import MPTError, checkpoint_info, from_pretrained
        from mpt_eqx.checkpoint import convert
        from mpt_eqx.text import load_tokenizer

        names = {f.__name__: f for f in (checkpoint_info, from_pretrained, convert, load_tokenizer)}
        try:
            exec(order["line"], names)
        except MPTError as refusal:
            print(refusal)
        except BaseException:
            traceback.print_exc()
    return {"out": out.getvalue(), "error": error.getvalue()}


def started(environment):
    """Returns a file to write orders to and one to read answers from, of a new process with this environment."""
    (ordered, order), (answered, answer) = os.pipe(), os.pipe()
    if not os.fork():
        os.close(order)
        os.environ.update(environment)
        with os.fdopen(ordered) as orders, os.fdopen(answer, "w") as answers:
            for line in orders:
                print(json.dumps(follow(json.loads(line))), file=answers, flush=True)
        os._exit(0)
    os.close(ordered), os.close(answer)
    return os.fdopen(order, "w"), os.fdopen(answered)


if __name__ == "__main__":
    import mpt_eqx  # noqa: F401  here, once, for all the processes to come; huggingface_hub is imported in each

    processes = {}
    for line in sys.stdin:
        environment = {key: value for key, value in json.loads(line)["environment"].items() if key != "TERMINAL"}
        key = tuple(environment.items())
        if key not in processes:
            processes[key] = started(environment)
        orders, answers = processes[key]
        print(line, end="", file=orders, flush=True)
        print(answers.readline(), end="", flush=True)
    for orders, _ in reversed(processes.values()):  # each holds those of the processes before it open, too
        orders.close()
        os.wait()
