"""Many clients of one server: total speed, time to the first token and between tokens, beside llama.cpp's server.

    python -m benchmarks.serving --output DIR                        writes DIR/serving.json; ten minutes, two cores
    python -m benchmarks.serving --output DIR --llama-server FILE    with that binary, not llama-cpp-python's server
    python -m benchmarks.serving --output DIR --tiny                 the shipped model, few requests

Each server is a process that holds the same random weights in bfloat16 (354M numbers), and gets the same requests over
HTTP: prompts of 4 to 40 words, 32 to 160 new tokens, greedy, streamed, from 32 clients that each ask again when they
have their answer. The first token of a request is late by the time that it waits for a slot. llama-cpp-python's server
runs one request after the other; llama.cpp's own batches as this one does. Answers of every number of slots must be
the same texts as those of one slot, and are compared.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIZES = {"d_model": 1024, "n_layers": 24, "n_heads": 16, "vocab_size": 4096, "max_seq_len": 1024}
START_SECONDS = 300
PERCENTILES = (50, 90, 99)


def write_model(directory: Path) -> tuple[Path, Path]:
    """Writes random weights as a checkpoint and as GGUF, with the shipped tokenizer, and returns where."""
    import jax
    import jax.numpy as jnp

    from mpt_eqx import MPT, SHIPPED_MODEL, AttnConfig, InitConfig, MPTConfig, save_pretrained
    from mpt_eqx.checkpoint import save_gguf

    config = MPTConfig(
        **SIZES, attn_config=AttnConfig(alibi=True), no_bias=True, init_config=InitConfig(emb_init_std=0.5)
    )
    model = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        MPT(config, key=jax.random.key(0)),
    )
    checkpoint, gguf = directory / "checkpoint", directory / "model.gguf"
    save_pretrained(model, checkpoint, companions_from=SHIPPED_MODEL)
    save_gguf(model, gguf, type="BF16", companions_from=SHIPPED_MODEL)
    return checkpoint, gguf


def requests(count: int) -> list[dict[str, Any]]:
    """Returns bodies of POST /v1/completions, always the same."""
    draw = random.Random(0)
    words = ["the", "list", "returns", "a", "string", "of", "each", "item", "and", "key", "if", "not", "value", "error"]
    return [
        {
            "prompt": " ".join(draw.choices(words, k=draw.randint(4, 40))),
            "max_tokens": draw.randint(32, 160),
            "temperature": 0,
            "logit_bias": {"0": -100},  # the end of a text, which would make answers shorter
            "stream": True,
        }
        for _ in range(count)
    ]


def answer(port: int, body: dict[str, Any]) -> dict[str, Any]:
    """Returns the text of one request, and when its pieces came, in seconds after it was sent."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_SECONDS)
    started, text, times, reason = time.perf_counter(), "", list[float](), None
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {response.read()[:300]!r}")
    for line in response:
        kind, _, data = line.decode().strip().partition(": ")
        if kind == "data" and data != "[DONE]":
            for choice in json.loads(data).get("choices", ()):
                text += choice.get("text") or ""
                reason = choice.get("finish_reason") or reason
                if choice.get("text"):
                    times.append(time.perf_counter() - started)
    connection.close()
    return {"text": text, "times": times, "reason": reason, "tokens": body["max_tokens"]}


def load(port: int, bodies: Sequence[dict[str, Any]], clients: int) -> dict[str, Any]:
    """Returns the figures of a server that so many clients ask at the same time, and its answers."""
    found: dict[int, dict[str, Any]] = {}
    waiting, lock = iter(enumerate(bodies)), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number, body = next(waiting, (None, None))
            if number is None or body is None:
                return
            found[number] = answer(port, body)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    answers = [found[number] for number in range(len(bodies))]
    assert all(one["reason"] == "length" for one in answers), {one["reason"] for one in answers}
    gaps = [(one["times"][-1] - one["times"][0]) / (one["tokens"] - 1) for one in answers]
    return {
        "tokens_per_s": sum(one["tokens"] for one in answers) / seconds,
        "seconds": seconds,
        "first_token_s": percentiles([one["times"][0] for one in answers]),
        "between_tokens_s": percentiles(gaps),
        "texts": [one["text"] for one in answers],
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Returns some percentiles, each the least value that so many of a hundred do not exceed."""
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) * p // 100, len(ordered) - 1)] for p in PERCENTILES}


@contextlib.contextmanager
def server(command: Sequence[str | Path], port: int, ready: str) -> Iterator[float]:
    """Runs a server until the block ends; the value is how many seconds it took to answer at the path `ready`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            while not _answers(port, ready):
                if process.poll() is not None or time.perf_counter() - started > START_SECONDS:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]}: {log.read()[-3000:].decode(errors='replace')}")
                time.sleep(0.1)
            yield time.perf_counter() - started
        finally:
            process.terminate()


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> None:
    """Measures, and writes the file after each server."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="directory for serving.json")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's llama-server (default: llama-cpp-python's)")
    parser.add_argument("--clients", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--requests", type=int, default=48, help="(default: %(default)s)")
    parser.add_argument("--slots", type=int, nargs="*", default=[1, 8, 16], help="(default: 1 8 16)")
    parser.add_argument("--tiny", action="store_true", help="the shipped model, and few requests")
    args = parser.parse_args()
    from benchmarks.speed.machine import hardware, versions

    bodies = requests(6 if args.tiny else args.requests)
    result: dict[str, Any] = {"hardware": hardware(), "versions": versions(), "clients": args.clients, "servers": {}}
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        if args.tiny:
            from mpt_eqx import SHIPPED_MODEL

            checkpoint, gguf = SHIPPED_MODEL, None
        else:
            checkpoint, gguf = write_model(Path(name))
        texts: list[str] | None = None
        cases: list[tuple[str, list[str | Path], str]] = [
            (
                f"mpt_eqx, {slots} slots",
                [sys.executable, "-m", "mpt_eqx", "serve", checkpoint, "--slots", str(slots)],
                "/health",
            )
            for slots in args.slots
        ]
        if gguf is not None and args.llama_server is not None:
            # The context is shared by all slots.
            most = str(16 * SIZES["max_seq_len"])
            cases.append((
                "llama.cpp, 16 slots",
                [args.llama_server, "-m", gguf, "-np", "16", "-c", most, "-t", "2"],
                "/health",
            ))  # fmt: skip
        elif gguf is not None:
            command = [sys.executable, "-m", "llama_cpp.server", "--model", gguf, "--n_ctx", "1024", "--n_threads", "2"]
            command += ["--interrupt_requests", "false"]  # else a new request ends the one that runs
            cases.append(("llama-cpp-python", command, "/v1/models"))
        for title, command, ready in cases:
            port = free_port()
            with server([*command, "--port", str(port)], port, ready) as start:
                load(port, bodies[:2], 2)
                figures = {"start_s": start, **load(port, bodies, args.clients)}
            found = figures.pop("texts")
            if title.startswith("mpt_eqx"):
                figures["equal_to_the_first"] = texts is None or texts == found
                texts = texts or found
            result["servers"][title] = figures
            print(title, json.dumps(figures), file=sys.stderr, flush=True)
            (args.output / "serving.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
