"""An application on a loopback port, and an engine that does what a test tells it to."""

import threading
import time
from contextlib import contextmanager

import uvicorn


@contextmanager
def on_port(app):
    """Runs an application in a thread with uvicorn, and yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


@contextmanager
def one_layer_served(one_layer):
    """Serves a layer of the shipped model with the real engine, and yields its address, the engine and the model."""
    from mpt_eqx import from_pretrained
    from mpt_eqx.serve import Engine
    from mpt_eqx.serve.app import create_app
    from mpt_eqx.serve.settings import Settings

    model = from_pretrained(one_layer, dtype="float32")
    engine = Engine({"pydoc": model}, slots=4, context=256, edits=True, warm=False)
    engine.start()
    assert engine.wait_until_ready(300) == "ready"
    try:
        with on_port(create_app(engine, {"pydoc": shipped(place=one_layer)}, Settings(edits=True))) as url:
            yield url, engine, model
    finally:
        engine.stop()


class ScriptedEngine:
    """Answers each request with the events of a script, in a thread of its own.

    Attributes:
        script: a function of a request and its ticket; yields events, or raises what `submit` is to raise.
        requests: all that were submitted.
        tickets: of all submissions.
    """

    def __init__(self, script, context=256):
        self.script, self._context, self._health = script, context, "ready"
        self.requests, self.tickets = [], []

    def context(self, model):
        return self._context

    def health(self):
        return self._health

    def submit(self, requests):
        from mpt_eqx.serve import Ticket

        ticket = Ticket()
        self.requests += [request for request, _ in requests]
        self.tickets.append(ticket)
        runs = [(self.script(request, ticket), send) for request, send in requests]
        for events, send in runs:
            threading.Thread(target=self._run, args=(events, send), daemon=True).start()
        return ticket

    @staticmethod
    def _run(events, send):
        for event in events:
            send(event)


def saying(tokens, size=3):
    """Returns a script: the same new tokens for each request, in chunks, each with the log-probability −its place."""
    from mpt_eqx.serve import Chunk, End, Prompt

    def script(request, ticket):
        prompt = request.prompt
        top = [(0, -0.5), (1, -1.5)][: request.top_logprobs]
        asked = request.prompt_logprobs
        said = tokens[: request.max_new_tokens]
        ends = set(request.sampling.eos_token_ids.tolist())
        n = next((n + 1 for n, token in enumerate(said) if token in ends), None)
        if request.until is not None:
            n = next((n for n in range(1, (n or len(said)) + 1) if request.until(said[:n])), n)
        reason, said = ("length" if n is None else "stop"), said[:n]

        def events():
            yield Prompt(2, [-1.0] * (len(prompt) - 1) if asked else [], [top] * (len(prompt) - 1) if asked else [])
            for at in range(0, len(said), size):
                some = said[at : at + size]
                yield Chunk(some, [-float(at + n) for n in range(len(some))], [top for _ in some])
            yield End(reason)

        return events()

    return script


def shipped(name="pydoc", place=None, **given):
    """Returns the shipped model, or that of a directory, as clients see it."""
    from mpt_eqx import SHIPPED_MODEL
    from mpt_eqx.config import MPTConfig
    from mpt_eqx.serve.settings import ServedModel
    from mpt_eqx.text import load_tokenizer

    place = place or SHIPPED_MODEL
    config = MPTConfig.from_json_file(place / "config.json")
    values = {"defaults": {"temperature": 0.0}, "chat_template": None, "created": 1_700_000_000}
    return ServedModel(name=name, config=config, tokenizer=load_tokenizer(place), **{**values, **given})
