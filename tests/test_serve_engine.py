"""The engine: many requests on a few slots, each with the tokens that `generate` gives it alone."""

import ctypes
import dataclasses
import threading
import time
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import is_long
from test_generate import counting_compiles

V = 61
WAIT = 60


class Asked:
    """A request that was submitted, and what came of it."""

    def __init__(self, request):
        self.request, self.events, self.ended, self.begun = request, [], threading.Event(), threading.Event()

    def send(self, event):
        from mpt_eqx.serve import Chunk, End, Failure

        self.events.append(event)
        if isinstance(event, Chunk):
            self.begun.set()
        if isinstance(event, End | Failure):
            self.ended.set()

    def wait(self):
        assert self.ended.wait(WAIT), "no end"
        return self

    def all(self, name):
        from mpt_eqx.serve import Chunk

        return [one for event in self.events if isinstance(event, Chunk) for one in getattr(event, name)]

    @property
    def tokens(self):
        return self.all("tokens")

    @property
    def failure(self):
        from mpt_eqx.serve import Failure

        assert isinstance(self.events[-1], Failure), self.events
        return self.events[-1].kind, self.events[-1].message


def request(prompt, max_new_tokens=20, sampling=None, **rest):
    from mpt_eqx import SamplingParams
    from mpt_eqx.serve import Request

    return Request("model", tuple(prompt), max_new_tokens, SamplingParams(**(sampling or {})), **rest)


def submit(engine, *requests):
    asked = [Asked(one) for one in requests]
    ticket = engine.submit([(one.request, one.send) for one in asked])
    return asked, ticket


def answers(engine, *requests):
    return [one.wait() for one in submit(engine, *requests)[0]]


def alone(model, asked, **rest):
    """What `generate` makes of a request."""
    from mpt_eqx import generate

    one = asked.request
    key = jax.random.fold_in(jax.random.key(one.seed), one.choice)[None]
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")
    options = {name: getattr(one.sampling, name).item() for name in names}
    options = {name: value for name, value in options.items() if value != getattr(request([1]).sampling, name)}
    ends = [token for token in one.sampling.eos_token_ids.tolist() if token >= 0]
    result = generate(
        model, [list(one.prompt)], max_new_tokens=one.max_new_tokens, key=key, eos_token_ids=ends, **options, **rest
    )
    length = result.lengths[0]
    return SimpleNamespace(
        tokens=result.tokens[0, :length].tolist(), logprobs=result.logprobs[0, :length].tolist(), result=result
    )


@pytest.fixture(scope="module")
def make():
    """Makes engines, and stops them at the end."""
    from mpt_eqx.serve import Engine

    made = []

    def one(model, **options):
        made.append(Engine({"model": model}, **{"slots": 3, "warm": False, **options}))
        made[-1].start()
        assert made[-1].wait_until_ready(WAIT) == "ready"
        return made[-1]

    yield one
    for engine in made:
        engine.stop()


@pytest.fixture(scope="module")
def engine(make, one_block_model):
    return make(one_block_model, edits=True)


MANY = (
    {"prompt": range(5)},
    {"prompt": range(40), "sampling": {"temperature": 1.3, "top_k": 20}, "seed": 4},
    {"prompt": [7] * 9, "max_new_tokens": 3, "sampling": {"repetition_penalty": 1.5}},
    {"prompt": range(60, 1, -1), "max_new_tokens": 41, "sampling": {"temperature": 0.9, "top_p": 0.8}, "seed": 2**40},
    {"prompt": [3], "sampling": {"eos_token_ids": range(0, V, 3), "min_new_tokens": 4}},
    {"prompt": range(33), "max_new_tokens": 30, "sampling": {"no_repeat_ngram_size": 2}},
    {"prompt": range(8, 50), "sampling": {"temperature": 0.5}, "seed": 1, "choice": 3},
    {"prompt": range(2), "max_new_tokens": 1},
)


def test_each_request_gets_the_tokens_that_generate_gives_it(engine, one_block_model, kernel):
    """To the bit, whoever else is in the batch: eight requests of all kinds on three slots.

    In `just test` three of them are compared.
    """
    from mpt_eqx.serve import End

    found = answers(engine, *(request(**each) for each in MANY))
    for asked in found if is_long() else found[1:6:2]:
        wanted = alone(one_block_model, asked)
        assert asked.tokens == wanted.tokens and asked.all("logprobs") == wanted.logprobs
        assert asked.events[-1] == End(wanted.result.finish_reasons[0])


def test_a_slow_model_decodes_and_reads_in_small_steps(make, one_layer, monkeypatch, kernel):
    """One token at a time, so that none waits for the next; prompts in chunks of 32. Not a bit changes."""
    from mpt_eqx import from_pretrained
    from mpt_eqx.serve import Chunk, lane

    sizes, original = [], lane.prefill_outputs
    monkeypatch.setattr(lane, "SLOW_STEP", -1)
    monkeypatch.setattr(lane, "SLOW_READ", -1)
    monkeypatch.setattr(lane, "prefill_outputs", lambda *args: (sizes.append(args[2].shape[1]), original(*args))[1])
    model = from_pretrained(one_layer)
    engine = make(model, slots=2)
    (first,), _ = submit(engine, request(range(40), 200, {"temperature": 1.0}, seed=1))
    assert first.begun.wait(WAIT)
    (second,) = answers(engine, request([7] * 120, 9))
    first.wait()
    assert sizes == [32] * 6  # 40 tokens in two, and 120 in four instead of one
    for asked in (first, second):
        wanted = alone(model, asked)
        assert asked.tokens == wanted.tokens and asked.all("logprobs") == wanted.logprobs
        assert all(len(event.tokens) == 1 for event in asked.events if isinstance(event, Chunk))


def test_it_does_not_matter_when_a_request_comes(engine):
    (wanted,) = answers(engine, request([1, 2, 3], 30, {"temperature": 1.0}, seed=5))
    (early,), _ = submit(engine, request(range(50), 100))
    assert early.begun.wait(WAIT)
    (late,) = answers(engine, request([1, 2, 3], 30, {"temperature": 1.0}, seed=5))
    assert late.tokens == wanted.tokens and late.all("logprobs") == wanted.all("logprobs")
    early.wait()


def test_choices_are_the_rows_of_generate(engine, one_block_model):
    from mpt_eqx import generate

    found = answers(engine, *(request([4, 5], 9, {"temperature": 1.5}, seed=11, choice=n) for n in range(4)))
    wanted = generate(
        one_block_model, [4, 5], max_new_tokens=9, temperature=1.5, num_return_sequences=4, key=jax.random.key(11)
    )
    assert [one.tokens for one in found] == wanted.tokens.tolist()


def test_log_probabilities_of_the_likeliest(engine, one_block_model):
    (asked,) = answers(engine, request([1, 2], 5, top_logprobs=4))
    logits = alone(one_block_model, asked, return_logits=True).result.logits[0]
    wanted = np.asarray(jax.nn.log_softmax(logits))
    for place, top in enumerate(asked.all("top")):
        assert [token for token, _ in top] == np.argsort(-wanted[place])[:4].tolist()
        np.testing.assert_allclose([x for _, x in top], np.sort(wanted[place])[::-1][:4], rtol=1e-5)
    assert len(asked.all("top")) == 5 and all(not one.all("top") for one in answers(engine, request([1, 2], 5)))


@pytest.mark.parametrize("new", [0, 6])
def test_log_probabilities_of_the_prompt(engine, one_block_model, new):
    from mpt_eqx import score
    from mpt_eqx.serve import Prompt

    prompt = np.random.default_rng(0).integers(V, size=70).tolist()
    (asked,) = answers(engine, request(prompt, new, prompt_logprobs=True, top_logprobs=1))
    (wanted,) = score(one_block_model, [prompt])
    first = asked.events[0]
    assert isinstance(first, Prompt) and len(first.logprobs) == len(first.top) == 69 and len(asked.tokens) == new
    np.testing.assert_allclose(first.logprobs, wanted.logprobs, rtol=1e-5, atol=1e-5)
    greedy = [top[0][0] == token for top, token in zip(first.top, prompt[1:], strict=True)]
    assert greedy == wanted.is_greedy.tolist()


def test_bias_bans_and_forces_tokens(engine):
    free, banned, forced = answers(
        engine, request([1], 6), request([1], 6, bias={n: -100.0 for n in range(30)}), request([1], 6, bias={9: 100.0})
    )
    assert min(banned.tokens) >= 30 and set(forced.tokens) == {9} and free.tokens != banned.tokens


def test_a_function_of_the_tokens_ends_a_sequence(engine):
    from mpt_eqx.serve import End

    (whole,) = answers(engine, request([5, 6], 20))
    seen = []

    def until(tokens):
        seen.append(list(tokens))
        return len(tokens) == 11

    (asked,) = answers(engine, request([5, 6], 20, until=until))
    assert asked.tokens == whole.tokens[:11] and asked.events[-1] == End("stop")
    assert seen == [whole.tokens[:n] for n in range(1, 12)]


class Counting:
    """Allows the tokens 10, 11, 12, … in turn, then the end."""

    def __init__(self, count):
        self.left = [*range(10, 10 + count), 0]

    def mask(self):
        return np.arange(V) == self.left[0]

    def accept(self, token):
        assert token == self.left.pop(0)


def test_an_answer_is_what_its_constraint_allows(engine):
    ends = {"eos_token_ids": [0]}
    (before,) = answers(engine, request([2, 2], 12, ends))
    first, free, other = answers(
        engine, request([1], 20, ends, constraint=Counting(5)), request([2, 2], 12, ends),
        request([1], 20, ends, constraint=Counting(9)),
    )  # fmt: skip
    assert first.tokens == [10, 11, 12, 13, 14, 0] and other.tokens == [*range(10, 19), 0]
    assert free.tokens == before.tokens  # others in the batch are not constrained


def test_edits_are_those_of_generate(engine, one_block_model):
    """A vector is added from a position on, in its own row only."""
    from mpt_eqx.interp import Add

    vector = 5 * np.random.default_rng(1).normal(size=32).astype(np.float32)
    edits = {"blocks.0.hook_resid_post": Add(vector, positions=slice(3, None))}
    edited, plain = answers(engine, request(range(6), 12, edits=edits), request(range(6), 12))
    assert edited.tokens == alone(one_block_model, edited, edits=edits).tokens != plain.tokens
    assert plain.tokens == alone(one_block_model, plain).tokens


def test_prompts_that_begin_alike_are_read_once(engine, one_block_model):
    system = np.random.default_rng(2).integers(V, size=90).tolist()
    first, second, third = (answers(engine, request([*system, *rest], 8))[0] for rest in ([1, 2], [3], [1, 2]))
    assert [one.events[0].cached for one in (first, second, third)] == [0, 90, 91]
    for asked in (first, second, third):
        assert asked.tokens == alone(one_block_model, asked).tokens
    stats = engine.stats()
    assert stats.cached_tokens >= 181 and 0 < stats.prefix_bytes <= 512 * 2**20


def test_no_request_compiles_anything(make, one_block_model):
    """Everything was compiled ahead: for other lengths, options, biases, edits, constraints and log-probabilities."""
    from mpt_eqx.interp import Add

    jax.clear_caches()
    engine = make(one_block_model, edits=True, warm=True)
    edits = {"blocks.0.hook_resid_post": Add(np.ones(32, np.float32))}
    system = [5] * 100
    with counting_compiles() as compiles:
        answers(engine, *(request(**each) for each in MANY))
        answers(engine, request([1], 9, top_logprobs=3), request(range(60), 2, prompt_logprobs=True))
        answers(
            engine,
            request([1], 9, bias={3: 1.0}),
            request([1], 9, {"eos_token_ids": [0]}, constraint=Counting(2)),
            request([2], 9),
        )
        answers(engine, request([1], 9, edits=edits), request(system, 9))
        answers(engine, request([*system, 1, 2], 9))
    assert compiles == []


def test_a_long_prompt_does_not_stall_the_others(make, tiny_config):
    """Between two chunks of it the others decode."""
    from mpt_eqx import MPT
    from mpt_eqx.serve import Chunk, Prompt

    engine = make(MPT(tiny_config(n_layers=1, max_seq_len=2048), key=jax.random.key(0)), slots=2)
    order = []
    short, long = Asked(request([1], 400)), Asked(request([2] * 1500, 1))
    for name, one in (("short", short), ("long", long)):
        one.send = lambda event, name=name, send=one.send: (order.append((name, type(event))), send(event))[1]
    engine.submit([(short.request, short.send)])
    assert short.begun.wait(WAIT)
    order.clear()
    engine.submit([(long.request, long.send)])
    long.wait()
    before = order[: order.index(("long", Prompt))]
    assert before.count(("short", Chunk)) >= 4
    short.wait()


def test_clients_take_turns(make, one_block_model):
    """One that asks for much does not keep another waiting."""
    engine = make(one_block_model, slots=1)
    many = [request([n], 9, client="busy") for n in range(6)]
    order = []
    asked = [Asked(one) for one in [*many, request([9], 9, client="other")]]
    for number, one in enumerate(asked):
        one.send = lambda event, number=number, send=one.send: (order.append(number), send(event))[1]
    engine.submit([(one.request, one.send) for one in asked])
    for one in asked:
        one.wait()
    assert list(dict.fromkeys(order)) == [0, 6, 1, 2, 3, 4, 5]


def holds(what):
    """Whether it holds before long."""
    until = time.monotonic() + WAIT
    while not what() and time.monotonic() < until:
        time.sleep(0.01)
    return what()


def test_each_model_has_its_slots_and_weights_that_models_share_count_once(one_block_model):
    """A model and the same with an adapter, which share all but the adapter's arrays."""
    from mpt_eqx import lora
    from mpt_eqx.serve import Engine

    adapted = lora.add(one_block_model, rank=2, targets=["Wqkv"], key=jax.random.key(0))
    maps = lambda m: (m.blocks[0].attn.Wqkv.lora_A.weight, m.blocks[0].attn.Wqkv.lora_B.weight)  # noqa: E731
    random = [jax.random.normal(jax.random.key(n), weight.shape) for n, weight in enumerate(maps(adapted))]
    adapted, added = eqx.tree_at(maps, adapted, random), sum(weight.nbytes for weight in random)
    engine = Engine({"base": one_block_model, "base:adapter": adapted}, slots=3, edits=True, warm=False)
    engine.start()
    assert engine.wait_until_ready(WAIT) == "ready"
    names = ["base", "base:adapter"] * 3
    found = answers(engine, *(dataclasses.replace(request([n], 9), model=name) for n, name in enumerate(names)))
    for asked, name in zip(found, names, strict=True):
        assert asked.tokens == alone({"base": one_block_model, "base:adapter": adapted}[name], asked).tokens
    assert found[0].tokens != alone(adapted, found[0]).tokens
    weights = sum(x.nbytes for x in jax.tree.leaves(one_block_model) if isinstance(x, jax.Array))
    stats = engine.stats()
    assert stats.weight_bytes == weights + added and stats.slots == 6
    caches = [lane._slots.state.cache for lane in engine._lanes.values()]
    assert stats.cache_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    engine.stop()


def test_nothing_is_left_of_five_hundred_requests(make, one_block_model):
    """No slot, no thread, no event: every answer is the same at the end as at the beginning."""
    engine = make(one_block_model, slots=3, edits=True, max_queue=500, prefix_bytes=10**6)
    (first,) = answers(engine, request([1, 2], 9))
    threads = threading.active_count()
    before = len(jax.live_arrays())
    for round in range(5):
        asked, ticket = submit(
            engine, *(request([n % V, 2, round], 1 + n % (20 if is_long() else 8)) for n in range(100))
        )
        if round % 2:
            ticket.cancel()
        assert all(one.wait().ended for one in asked)
    (last,) = answers(engine, request([1, 2], 9))
    assert last.tokens == first.tokens and threading.active_count() == threads
    assert (engine.stats().active, engine.stats().queued) == (0, 0) and len(jax.live_arrays()) <= before + 50
    assert holds(lambda: sum(engine.stats().ended.values()) == 502)


def slow(engine):
    """A request that runs until it is cancelled, or nearly so."""
    (asked,), ticket = submit(engine, request([1], 250))
    assert asked.begun.wait(WAIT)
    return asked, ticket


def test_who_goes_away_frees_a_slot(make, one_block_model):
    engine = make(one_block_model, slots=1)
    running, ticket = slow(engine)
    (waiting,), other = submit(engine, request([2], 5))
    ticket.cancel()
    assert running.wait().failure == ("cancelled", "the request was cancelled") and waiting.wait().tokens
    running, ticket = slow(engine)
    (waiting,), other = submit(engine, request([2], 5))
    other.cancel()  # in the queue
    assert waiting.wait().failure[0] == "cancelled" and not waiting.tokens
    ticket.cancel()
    running.wait()
    assert (engine.stats().active, engine.stats().queued) == (0, 0)
    assert engine.stats().ended == {"cancelled": 3, "length": 1}


def test_a_request_has_a_deadline(make, one_block_model):
    engine = make(one_block_model, slots=1)
    _, ticket = slow(engine)
    (waiting,), _ = submit(engine, request([2], 5, deadline=time.monotonic() + 0.05))
    assert waiting.wait().failure == ("deadline", "the request took longer than it may")
    ticket.cancel()
    (late,) = answers(engine, request([2], 250, deadline=time.monotonic() + 1e-3))
    assert late.failure[0] == "deadline"


def test_the_queue_is_bounded(make, one_block_model):
    from mpt_eqx.serve import QueueFullError

    engine = make(one_block_model, slots=1, max_queue=2)
    _, ticket = slow(engine)
    waiting, _ = submit(engine, request([2], 5), request([3], 5))
    with pytest.raises(QueueFullError, match="2 requests wait, of at most 2; try again later"):
        submit(engine, request([4], 5))
    ticket.cancel()
    assert all(len(one.wait().tokens) == 5 for one in waiting)


def failing_step(monkeypatch, error):
    """The next step raises."""
    from mpt_eqx.serve import lane

    original = lane.decode_slots

    def once(*args):
        monkeypatch.setattr(lane, "decode_slots", original)
        raise error

    monkeypatch.setattr(lane, "decode_slots", once)


def test_after_a_step_that_failed_the_engine_serves_on(make, one_block_model, monkeypatch):
    engine = make(one_block_model, edits=True)
    wanted = answers(engine, request([1, 2], 9))[0].tokens
    running, _ = slow(engine)
    failing_step(monkeypatch, RuntimeError("out of memory"))
    assert running.wait().failure == ("internal", "a step of the computation failed")
    assert answers(engine, request([1, 2], 9))[0].tokens == wanted
    assert engine.health() == "ready" and engine.stats().rebuilds == 1


def test_when_the_thread_dies_everybody_is_told(make, one_block_model):
    from mpt_eqx.serve import UnavailableError

    engine = make(one_block_model, slots=1)
    running, _ = slow(engine)
    (waiting,), _ = submit(engine, request([2], 5))
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(engine._thread.ident), ctypes.py_object(SystemExit))
    assert waiting.wait().failure == ("unavailable", "the server stopped before the answer was complete")
    assert running.wait().failure[0] in ("internal", "unavailable")
    assert engine.health() == "dead"
    with pytest.raises(UnavailableError, match="the server takes no requests: it is dead"):
        submit(engine, request([1]))


def test_a_step_that_does_not_end_is_told(make, one_block_model, monkeypatch):
    from mpt_eqx.serve import lane

    engine, go_on = make(one_block_model, slots=1, stuck_after=0.05), threading.Event()
    original = lane.decode_slots
    monkeypatch.setattr(lane, "decode_slots", lambda *args: (go_on.wait(WAIT), original(*args))[1])
    (asked,), _ = submit(engine, request([1], 5))
    assert holds(lambda: engine.health() == "stuck")
    go_on.set()
    assert len(asked.wait().tokens) == 5 and holds(lambda: engine.health() == "ready")


def test_draining_ends_what_was_begun(make, one_block_model):
    from mpt_eqx.serve import UnavailableError

    engine = make(one_block_model, slots=1)
    running, _ = slow(engine)
    (waiting,), _ = submit(engine, request([2], 5))
    engine.drain()
    assert engine.health() == "draining"
    with pytest.raises(UnavailableError, match="it is draining"):
        submit(engine, request([1]))
    assert len(running.wait().tokens) == 250 and len(waiting.wait().tokens) == 5
    engine._thread.join(WAIT)
    assert engine.health() == "stopped"


def test_stopping_tells_everybody(make, one_block_model):
    engine = make(one_block_model, slots=1)
    running, _ = slow(engine)
    engine.stop()
    assert running.wait().failure[0] == "unavailable" and engine.health() == "stopped"


@pytest.mark.parametrize("name", ["until", "constraint"])
def test_a_function_that_raises_fails_its_request_only(engine, name):
    def broken(*_):
        raise KeyError

    function = broken if name == "until" else SimpleNamespace(mask=broken, accept=broken)
    bad, good = answers(engine, request([1], 9, **{name: function}), request([2], 9))
    assert bad.failure == ("internal", "a function of this request failed") and len(good.tokens) == 9


def test_who_takes_no_events_ends_alone(engine):
    from mpt_eqx.serve import Chunk

    def send(event):
        raise RuntimeError("the loop is closed")

    engine.submit([(request([1], 250), send)])
    (asked,) = answers(engine, request([2], 9))
    assert len(asked.tokens) == 9 and any(isinstance(event, Chunk) for event in asked.events)
    assert holds(lambda: engine.stats().active == 0)


def test_no_token_is_left(engine):
    (asked,) = answers(engine, request([1], 90, {"no_repeat_ngram_size": 1}))
    kind, message = asked.failure
    assert kind == "invalid" and message.startswith("no token is left to choose from for new token ")
    assert len(asked.tokens) == len(set(asked.tokens)) == int(message.split("new token ")[1].split(";")[0])


def test_logits_that_are_not_finite(make, one_block_model):
    broken = eqx.tree_at(lambda m: m.norm_f.weight, one_block_model, jnp.full(32, jnp.nan))
    engine = make(broken, edits=True)
    for asked in answers(engine, request([1], 5), request(range(9), 0, prompt_logprobs=True)):
        kind, message = asked.failure
        assert kind == "internal" and message.startswith("the model's logits are not finite; look for NaN")
        assert not asked.tokens


INVALID = (
    ({"prompt": []}, "prompt: expected at least one token, found none"),
    ({"prompt": [V]}, "prompt: expected token ids from 0 to 60, found 61"),
    ({"prompt": [1], "max_new_tokens": -1}, "max_new_tokens: expected a whole number ≥ 0, found -1"),
    ({"prompt": [1], "max_new_tokens": 256}, "prompt: 1 tokens and max_new_tokens=256 are 257, of at most 256"),
    ({"prompt": [1], "bias": {-1: 2.0}}, "bias: expected token ids from 0 to 60, found -1"),
    ({"prompt": [1], "top_logprobs": 21}, "top_logprobs: expected 0 to 20, found 21"),
    ({"prompt": [1], "sampling": {"eos_token_ids": range(33)}}, "eos_token_ids: expected at most 32, found more"),
)


@pytest.mark.parametrize(("fields", "message"), INVALID)
def test_requests_that_are_not_valid(engine, fields, message):
    from mpt_eqx import GenerationError

    with pytest.raises(GenerationError) as error:
        submit(engine, request(**fields))
    assert str(error.value) == message


def test_other_models_and_edits_are_refused(engine, make, one_block_model):
    from mpt_eqx import GenerationError
    from mpt_eqx.interp import Add, Scale

    with pytest.raises(GenerationError, match="model: expected one of model, found 'other'"):
        submit(engine, dataclasses.replace(request([1]), model="other"))
    vector = np.ones(32, np.float32)
    for edits in (
        {"blocks.0.hook_resid_post": Scale(vector)},
        {"blocks.0.hook_resid_pre": Add(vector)},
        {"blocks.0.hook_resid_post": Add(vector, positions=[1])},
    ):
        with pytest.raises(GenerationError, match=r"edits: expected Add\(vector, positions=slice\(…\)\) of 32 numbers"):
            submit(engine, request([1], edits=edits))
    with pytest.raises(GenerationError, match="edits: expected none, because this engine was made without edits=True"):
        submit(make(one_block_model), request([1], edits={"blocks.0.hook_resid_post": Add(vector)}))


WRONG = (
    ({"slots": 0}, "slots: expected a whole number ≥ 1, found 0"),
    ({"context": 257}, "context: expected at most max_seq_len=256, found 257"),
    ({"context": 1}, "context: expected a whole number ≥ 2, found 1"),
    ({"max_queue": -1}, "max_queue: expected a whole number ≥ 0, found -1"),
    ({"prefix_bytes": -1}, "prefix_bytes: expected a whole number ≥ 0, found -1"),
    (
        {"cache_bytes": 1000},
        "cache_bytes: expected at least 524320 for 8 slots of 256 tokens, found 1000; give fewer slots, a smaller "
        "context, or more memory",
    ),
)


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_engines_that_cannot_be_made(one_block_model, options, message):
    from mpt_eqx import GenerationError
    from mpt_eqx.serve import Engine

    with pytest.raises(GenerationError) as error:
        Engine({"model": one_block_model}, **options)
    assert str(error.value) == message


def test_the_cache_of_prefixes_keeps_the_newest_that_fit(one_block_model):
    from mpt_eqx.generation.state import empty_state
    from mpt_eqx.serve.prefixes import PrefixCache

    state = empty_state(one_block_model, 1, 256)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    kept, small = PrefixCache(5 * size // 2), PrefixCache(size - 1)
    a, b, c = (np.full(40, n, np.int32) for n in range(3))
    kept.keep(a, state)
    kept.keep(b, state)
    assert kept.longest(np.append(a, np.int32(7)))[0] == 40 and kept.longest(a)[0] == 39 and kept.size == 2 * size
    kept.keep(c, state)  # b was used the longest ago
    assert kept.longest(np.append(b, np.int32(7))) == (0, None) and kept.longest(np.append(a, np.int32(7)))[0] == 40
    kept.keep(np.append(a, [1, 2]).astype(np.int32), state)  # in place of a
    kept.keep(a, state)  # which the longer one serves
    assert kept.size == 2 * size and kept.longest(np.append(a, np.int32([1, 3])))[0] == 41
    kept.keep(a[:20], state)  # not worth it
    small.keep(b, state)  # too large
    assert (kept.size, small.size) == (2 * size, 0)
    kept.clear()
    assert kept.size == 0
