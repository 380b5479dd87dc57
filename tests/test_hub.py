"""The Hub, spoken to through huggingface_hub: against a local server with its interface."""

import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import GOLDEN

COMMIT = "0123456789012345678901234567890123456789"
OLD_COMMIT = "a" * 40


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
        status, code = {
            "owner/gated": (401 if "Authorization" not in self.headers else 403, "GatedRepo"),
            "owner/m": (0, ""),
        }.get(repository, (401, "RepoNotFound"))
        if status:
            self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})
        return bool(status)

    def model(self, repository, revision, tree):
        if self.refused(repository):
            return None
        if revision not in ("main", COMMIT, "old", OLD_COMMIT):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = self.server.hub.files
        if tree:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self.answer(200, json.dumps(entries).encode())
        record = {
            "id": repository,
            "sha": COMMIT,
            "private": False,
            "siblings": [{"rfilename": name} for name in files],
        }
        return self.answer(200, json.dumps(record).encode())

    def file(self, repository, file):
        if self.refused(repository):
            return None
        if file not in self.server.hub.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = self.server.hub.files[file]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if file.endswith((".safetensors", ".bin")):
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
        return self.answer(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def answer(self, status, data, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path):
    """A Hub with one repository, owner/m, and a way to load from it in a process with a cache of its own."""
    source = GOLDEN / "hf_sharded"
    files = {path.name: path.read_bytes() for path in source.iterdir() if path.name not in ("expected.safetensors",)}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    state = SimpleNamespace(files=files, requests=[], cut=False, cache=tmp_path / "home")
    server.hub = state
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def load(source, arguments="", **environment):
        script = (
            "from mpt_eqx import from_pretrained, MPTError\n"
            f"try: print(from_pretrained({source!r}, {arguments}).config.num_parameters())\n"
            "except MPTError as error: print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120,
            env={
                "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HOME": str(state.cache), "HF_HUB_DISABLE_XET": "1",
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", **environment,
            },
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    state.load = load
    yield state
    server.shutdown()
    server.server_close()


def test_download_and_offline_afterwards(hub):
    """Through a mirror named by HF_ENDPOINT, with redirects; then from the cache without asking anyone."""
    assert hub.load("owner/m") == "27840"
    assert any("/resolve/" in request and "safetensors" in request for request in hub.requests)
    assert not any("expected" in request or "case.json" in request.split("?")[0] for request in hub.requests)
    hub.requests.clear()
    assert hub.load("owner/m", HF_HUB_OFFLINE="1") == "27840"
    assert hub.load("owner/m", "local_files_only=True") == "27840"
    assert not hub.requests


def test_what_is_cached_is_not_downloaded_again(hub):
    hub.load("owner/m")
    hub.requests.clear()
    assert hub.load("owner/m") == "27840"
    assert not any(request.startswith("GET /cdn") for request in hub.requests)


def test_torch_weights_when_there_are_no_others(hub):
    hub.files.clear()
    source = GOLDEN / "hf_hubstyle"
    hub.files |= {path.name: path.read_bytes() for path in source.iterdir() if path.name != "expected.safetensors"}
    assert hub.load("owner/m") == "27840"
    assert hub.load("owner/m", HF_HUB_OFFLINE="1") == "27840"


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("mosaicml/mpt-7b", "", "mosaicml/mpt-* repositories have been reported gone since December 2025: use a local"),
        ("owner/gated", "", "owner/gated: the repository is gated; ask for access on its page, then pass token="),
        ("owner/gated", "token='hf_x'", "owner/gated: the repository is gated; ask for access on its page"),
        ("owner/m", "revision='none'", "owner/m: the repository has no revision 'none'"),
        ("owner/m", "subfolder='none'", "check subfolder="),
        ("owner/m", "local_files_only=True", "not completely in the Hub's local cache, while the Hub itself is out of"),
    ],
)  # fmt: skip
def test_what_cannot_be_had(hub, source, arguments, message):
    out = hub.load(source, arguments)
    assert message in out and out.startswith(source) and "\n" not in out


def test_a_connection_cut_half_way(hub):
    """Never half a model: an error now, the whole model once the connection holds."""
    hub.cut = True
    out = hub.load("owner/m", HF_HUB_DOWNLOAD_TIMEOUT="2")
    assert out.startswith("owner/m: ") and "27840" not in out
    offline = hub.load("owner/m", HF_HUB_OFFLINE="1")
    assert offline.startswith("owner/m: ") or "the download is not complete" in offline
    hub.cut = False
    assert hub.load("owner/m") == "27840"


def test_a_snapshot_with_a_shard_gone(hub):
    hub.load("owner/m")
    gone = next(hub.cache.rglob("snapshots/*/model-00003-of-00005.safetensors"))
    gone.unlink()
    out = hub.load("owner/m", HF_HUB_OFFLINE="1")
    assert "model-00003-of-00005.safetensors" in out or "only a part of it is in the Hub's local cache" in out
    assert hub.load("owner/m") == "27840"


def test_no_server(hub):
    out = hub.load("owner/m", HF_ENDPOINT="http://127.0.0.1:9")
    assert (out.startswith("owner/m: no such directory, and") and "out of reach" in out) or "cannot be reached" in out
