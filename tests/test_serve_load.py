"""Many clients of one server at a time: every answer is the one that it would be alone, and nothing is left behind."""

import ctypes
import gc
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import jax
import pytest
from serving import one_layer_served

CLIENTS = 32
WORDS = ["Return", "the", "list", "of", "a", "string", "if", "key", "value", "is", "not", "None", "each", "item"]


@pytest.fixture(scope="module")
def running(one_layer):
    with one_layer_served(one_layer) as (url, engine, _):
        yield url, engine


@pytest.fixture(scope="module")
def http(running):
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    with httpx.Client(base_url=running[0], timeout=120, limits=limits) as http:
        yield http


def bodies(count, seed=0):
    """Requests of mixed lengths, greedy and with a seed, streamed and not."""
    draw = random.Random(seed)
    return [
        {
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(1, 60))),
            "max_tokens": draw.randint(1, 24),
            "stream": number % 3 == 0,
            **({"temperature": 0} if number % 2 else {"temperature": 1.0, "seed": number}),
        }
        for number in range(count)
    ]


def ask(http, body):
    """The text of an answer."""
    if not body["stream"]:
        found = http.post("/v1/completions", json=body)
        assert found.status_code == 200, found.text
        return found.json()["choices"][0]["text"]
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


def test_answers_to_many_clients_are_those_to_one(running, http):
    """Thirty-two at a time on four slots; prefixes that they share are kept or not, as it comes."""
    asked = bodies(CLIENTS)
    with ThreadPoolExecutor(CLIENTS) as pool:
        together = list(pool.map(lambda body: ask(http, body), asked))
    assert together == [ask(http, body) for body in asked]
    assert len(set(together)) > CLIENTS // 2


def memory() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.slow
def test_nothing_is_left_of_five_hundred_requests(running, http):
    """Complete ones, and ones whose client goes away: no slot, no thread, no array, and little memory."""
    _, engine = running

    def go_away(body):
        with http.stream("POST", "/v1/completions", json={**body, "stream": True, "max_tokens": 150}) as response:
            next(response.iter_lines())

    def wave(seed):
        asked = bodies(125, seed)
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda body: ask(http, body), asked[:100]))
            list(pool.map(go_away, asked[100:]))
        until = time.monotonic() + 60
        while (engine.stats().active or engine.stats().queued) and time.monotonic() < until:
            time.sleep(0.01)
        engine._lanes["pydoc"].prefixes.clear()  # these are left on purpose
        gc.collect()
        return engine.stats().active, engine.stats().queued, threading.active_count(), len(jax.live_arrays()), memory()

    first, *_, last = [wave(seed) for seed in range(4)]
    assert last[:2] == (0, 0) and last[2] <= first[2] + 4  # asyncio's pool may grow up to its size
    assert last[3] <= first[3] + 9
    assert last[4] < first[4] + 64 * 2**20


def test_when_the_engine_dies_under_load_every_client_is_told(one_layer):
    """No answer ends as if it were complete, and nobody waits."""
    with one_layer_served(one_layer) as (url, engine, _), httpx.Client(base_url=url, timeout=60) as http:
        begun = threading.Barrier(5, timeout=60)

        def stream(number):
            body = {"prompt": "The", "max_tokens": 230, "stream": True, "seed": number, "ignore_eos": True}
            with http.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                begun.wait()
                return [line for line in lines if line][-1]

        def wait():
            begun.wait()
            return http.post("/v1/completions", json={"prompt": "The", "max_tokens": 200, "seed": 9})

        with ThreadPoolExecutor(5) as pool:
            streams = [pool.submit(stream, number) for number in range(4)]
            queued = pool.submit(wait)
            while begun.n_waiting and not begun.broken:
                time.sleep(0.001)
            assert ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(engine._thread.ident), ctypes.py_object(SystemExit)
            )
            ends = [one.result(60) for one in streams]
            answer = queued.result(60)
        complete = sum(end == "data: [DONE]" for end in ends)
        assert complete < 4 and all(end == "data: [DONE]" or end.startswith('data: {"error"') for end in ends)
        assert answer.status_code in (500, 503) and answer.json()["error"]["message"]
        assert http.get("/health").status_code == 503
