"""beam_search: what transformers recorded, what a plain search finds, each row by itself, an error for the rest."""

import importlib
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import examples, is_long, one_in
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from mutate import mutant
from test_generate import counting_compiles

ATOL = 1e-4
RUNS = ("beam3", "beam3_ret3", "beam3_eos", "beam3_eos_early", "beam3_eos_lp2", "beam3_eos_lp0", "beam4_rep")


def recorded(case, run):
    """The prompts of a recorded run, without padding, and its arguments as ours."""
    ids, mask = case.expected["input_ids"], case.expected["attention_mask"].astype(bool)
    rows = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    arguments = {key: value for key, value in case.case["runs"][run]["args"].items() if key != "do_sample"}
    eos = arguments.pop("eos_token_id")
    return rows, {**arguments, "eos_token_ids": [] if eos is None else [eos]}


def check_recorded(case, run):
    from mpt_eqx import beam_search

    rows, arguments = recorded(case, run)
    result = beam_search(case.model, rows, **arguments)
    wanted = case.expected[f"{run}.sequences"][:, case.expected["input_ids"].shape[1] :]
    np.testing.assert_array_equal(result.lengths, (case.expected[f"{run}.beam_indices"] >= 0).sum(axis=1))
    # What follows an end is 0 here, which was asked for; transformers takes its first end instead of 0 in beam search.
    here = np.arange(wanted.shape[1]) < result.lengths[:, None]
    np.testing.assert_array_equal(result.tokens[:, : wanted.shape[1]], np.where(here, wanted, 0))
    assert (result.tokens[:, wanted.shape[1] :] == 0).all() and (wanted[~here] == 11).all()
    np.testing.assert_allclose(result.scores, case.expected[f"{run}.sequences_scores"], atol=ATOL, rtol=0)
    stopped = [11 in row[:n] for row, n in zip(wanted, result.lengths, strict=True) if arguments["eos_token_ids"]]
    assert [reason == "stop" for reason in result.finish_reasons] == (stopped or [False] * len(wanted))


@pytest.mark.parametrize("run", RUNS)
def test_recorded(golden, run):
    """Of rows that were padded there too: neither side takes padding for tokens that a penalty counts."""
    check_recorded(golden("hf_generate"), run)


def test_every_recorded_run_is_compared(golden):
    assert {run for run in golden("hf_generate").case["runs"] if run.startswith("beam")} == set(RUNS)


@eqx.filter_jit
def forward(model, rows):
    return jax.vmap(model)(rows)


def plain_logprobs(model, rows):
    """The log-probabilities of the next token of rows of one length, in float64, by the full forward pass."""
    padded = np.zeros((16, 32), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    logits = np.asarray(forward(model, jnp.asarray(padded)), np.float64)[: len(rows)]
    logits = logits[np.arange(len(rows)), [len(row) - 1 for row in rows]]
    largest = logits.max(axis=-1, keepdims=True)
    return logits - largest - np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True))


def plain_allowed(logprobs, row, new, repetition_penalty, no_repeat_ngram_size, min_new_tokens, eos_token_ids):
    """What a search goes by, from the log-probabilities of one row."""
    logprobs = logprobs.copy()
    for token in set(row) if repetition_penalty else ():
        logprobs[token] *= repetition_penalty
    if n := no_repeat_ngram_size:
        for start in range(len(row) - n + 1):
            if row[start : start + n - 1] == row[len(row) - n + 1 :]:
                logprobs[row[start + n - 1]] = -np.inf
    if new < min_new_tokens:
        logprobs[eos_token_ids] = -np.inf
    return logprobs


def plain_search(
    model,
    prompt,
    *,
    num_beams,
    max_new_tokens,
    length_penalty=1.0,
    early_stopping=False,
    repetition_penalty=None,
    no_repeat_ngram_size=None,
    min_new_tokens=0,
    eos_token_ids=(),
):
    """The finished sequences as (score, new tokens), best first: the search in lists and float64."""
    eos = list(eos_token_ids)
    beams, finished = [(0.0, [])], []
    for length in range(1, max_new_tokens + 1):
        found = []
        logprobs = plain_logprobs(model, [[*prompt, *tokens] for _, tokens in beams])
        for (total, tokens), row in zip(beams, logprobs, strict=True):
            so_far = [*prompt, *tokens]
            row = plain_allowed(row, so_far, length - 1, repetition_penalty, no_repeat_ngram_size, min_new_tokens, eos)
            found += [(total + row[i], [*tokens, i]) for i in np.flatnonzero(np.isfinite(row)).tolist()]
        found.sort(key=lambda beam: -beam[0])
        ended = [beam for beam in found[:num_beams] if beam[1][-1] in eos or length == max_new_tokens]
        finished += [(total / length**length_penalty, tokens) for total, tokens in ended]
        finished = sorted(finished, key=lambda sequence: -sequence[0])[:num_beams]
        beams = [beam for beam in found if beam[1][-1] not in eos][:num_beams]
        if not beams:
            break
        judged = max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
        reachable = beams[0][0] / judged**length_penalty
        if len(finished) == num_beams and (early_stopping is True or reachable <= finished[-1][0]):
            break
    return finished


SEARCHES = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(8, 14),
        "length_penalty": st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
        "early_stopping": st.sampled_from([False, True, "never"]),
        "eos_token_ids": st.lists(st.integers(0, 96), max_size=8).map(lambda ids: [*ids, 11]),
        "repetition_penalty": st.sampled_from([None, None, 0.7, 1.3]),
        "no_repeat_ngram_size": st.sampled_from([None, None, 1, 2]),
        "min_new_tokens": st.integers(0, 4),
    }
)
PROMPTS = st.lists(st.integers(0, 96), min_size=1, max_size=10)
GREEDY = {"max_new_tokens": 12, "length_penalty": 0.5, "eos_token_ids": [11, 40, 77], "no_repeat_ngram_size": 2}


@pytest.fixture(scope="module")
def model():
    """The model of the recorded searches."""
    from conftest import GOLDEN

    from mpt_eqx import from_pretrained

    return from_pretrained(GOLDEN / "hf_generate")


def check_plain(model, prompt, search):
    """Scores are what sums over the full forward pass give, sorted, and each token's log-probability is the model's."""
    from mpt_eqx import beam_search

    wanted = plain_search(model, prompt, num_beams=3, **search)
    result = beam_search(model, prompt, num_beams=3, num_return_sequences=3, **search)
    for i, (score, tokens) in enumerate(wanted):
        assert result.tokens[i, : result.lengths[i]].tolist() == tokens
        np.testing.assert_allclose(result.scores[i], score, rtol=1e-5, atol=1e-5)
        logprobs = plain_logprobs(model, [[*prompt, *tokens[:n]] for n in range(len(tokens))])
        np.testing.assert_allclose(
            result.logprobs[i, : len(tokens)], logprobs[np.arange(len(tokens)), tokens], atol=ATOL
        )
        assert (result.logprobs[i, len(tokens) :] == 0).all()
        assert result.finish_reasons[i] == ("stop" if tokens[-1] in search["eos_token_ids"] else "length")
    assert len(wanted) == 3 and (np.diff(result.scores) <= 0).all()


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(PROMPTS, SEARCHES)
def test_a_plain_search_finds_the_same(model, prompt, search):
    check_plain(model, prompt, search)


@pytest.mark.slow
@examples(12)
@given(st.lists(PROMPTS, min_size=3, max_size=3), SEARCHES, st.integers(1, 3))
def test_a_prompt_alone_equals_the_prompt_in_a_batch(model, rows, search, returned):
    """Whatever the others are, and however early or late they end."""
    from mpt_eqx import beam_search

    together = beam_search(model, rows, num_beams=3, num_return_sequences=returned, **search)
    assert together.tokens.shape == (3 * returned, search["max_new_tokens"])
    for i, row in enumerate(rows):
        alone, here = beam_search(model, row, num_beams=3, **search), slice(i * returned, i * returned + 1)
        np.testing.assert_array_equal(alone.tokens, together.tokens[here])
        np.testing.assert_array_equal(alone.lengths, together.lengths[here])
        assert alone.finish_reasons == together.finish_reasons[here]
        np.testing.assert_allclose(alone.logprobs, together.logprobs[here], atol=1e-5)
        np.testing.assert_allclose(alone.scores, together.scores[here], rtol=1e-5, atol=1e-6)


@examples(10, least=2)
@given(PROMPTS, SEARCHES)
@pytest.mark.slow
def test_the_chunks_do_not_show(model, prompt, search):
    from mpt_eqx import beam_search

    beam_module = importlib.import_module("mpt_eqx.generation.beam_search")  # the function has the module's name
    whole = beam_search(model, prompt, num_beams=3, num_return_sequences=3, **search)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beam_module, "DECODE_CHUNK", 3)
        other = beam_search(model, prompt, num_beams=3, num_return_sequences=3, **search)
    np.testing.assert_array_equal(other.tokens, whole.tokens)
    np.testing.assert_allclose(other.scores, whole.scores, rtol=1e-6)
    assert other.finish_reasons == whole.finish_reasons


@settings(max_examples=12, deadline=None, phases=list(Phase) if is_long() else [Phase.explicit])
@example([[5, 9, 2], [7], [1, 2, 3, 4, 5, 6]], {**GREEDY, "min_new_tokens": 2}, False)
@given(st.lists(PROMPTS, min_size=3, max_size=3), SEARCHES, st.sampled_from([True, False]))
def test_one_beam_is_greedy(model, rows, search, early):
    """Without a repetition penalty, which a search applies to log-probabilities, and `generate` to logits."""
    from mpt_eqx import beam_search, generate

    greedy = {key: search[key] for key in ("max_new_tokens", "eos_token_ids", "no_repeat_ngram_size", "min_new_tokens")}
    wanted = generate(model, rows, pad_token_id=5, **greedy)
    penalty = search["length_penalty"]
    found = beam_search(
        model, rows, pad_token_id=5, num_beams=1, length_penalty=penalty, early_stopping=early, **greedy
    )
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.lengths, wanted.lengths)
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5)
    np.testing.assert_allclose(found.scores, wanted.logprobs.sum(axis=1) / wanted.lengths**penalty, rtol=1e-4)
    assert found.finish_reasons == wanted.finish_reasons


@pytest.fixture(scope="module")
def four_tokens(tiny_config):
    """A model whose vocabulary is four tokens."""
    from mpt_eqx import MPT, InitConfig

    return MPT(tiny_config(n_layers=1, vocab_size=4, init_config=InitConfig(emb_init_std=0.5)), key=jax.random.key(5))


def test_with_enough_beams_all_sequences_are_found(four_tokens):
    """Three tokens of a vocabulary of four, of which one ends: 1 + 3 + 9·4 sequences, each with its score."""
    from mpt_eqx import GenerationError, beam_search

    rows, texts = [[0, 1], [2, 0]], list(itertools.product(range(4), repeat=3))
    logits = forward(four_tokens, jnp.asarray([[*row, *text] for row in rows for text in texts]))
    logprobs = np.asarray(jax.nn.log_softmax(logits[:, 1:-1])).reshape(2, len(texts), 3, 4)
    search = {"num_beams": 41, "max_new_tokens": 3, "eos_token_ids": [3]}
    stops = [False, True, "never"] if is_long() else ["never"]
    for penalty, early in itertools.product([-1.0, 0.0, 1.0, 2.0], stops):
        result = beam_search(
            four_tokens, rows, num_return_sequences=40, length_penalty=penalty, early_stopping=early, **search
        )
        for i in range(2):
            sequences = {}
            for text, row in zip(texts, logprobs[i], strict=True):
                length = text.index(3) + 1 if 3 in text else 3
                sequences[text[:length]] = row[np.arange(length), text[:length]].sum() / length**penalty
            wanted, here = sorted(sequences.values(), reverse=True), slice(40 * i, 40 * i + 40)
            np.testing.assert_allclose(result.scores[here], wanted, atol=ATOL)
            found = [tuple(row[:n]) for row, n in zip(result.tokens[here].tolist(), result.lengths[here], strict=True)]
            assert set(found) == set(sequences) and len(found) == len(sequences) == 40
            np.testing.assert_allclose([sequences[text] for text in found], wanted, atol=ATOL)
    with pytest.raises(GenerationError, match="found 40 of num_return_sequences=41 sequences before no token was left"):
        beam_search(four_tokens, rows, num_return_sequences=41, **search)


def test_what_may_not_come_never_does(model):
    """Where beams run out, the sequences there are are returned, and no other is made up."""
    from mpt_eqx import GenerationError, beam_search

    few = {"num_beams": 3, "max_new_tokens": 8, "vocab_size": 3, "no_repeat_ngram_size": 1}
    result = beam_search(model, [0], eos_token_ids=[2], num_return_sequences=2, **few)
    assert sorted(row[:n] for row, n in zip(result.tokens.tolist(), result.lengths, strict=True)) == [[1, 2], [2]]
    assert result.finish_reasons == ["stop", "stop"] and np.isfinite(result.scores).all()
    with pytest.raises(
        GenerationError, match=r"prompts\[0\]: found 2 of num_return_sequences=3 sequences before no tok"
    ):
        beam_search(model, [0], eos_token_ids=[2], num_return_sequences=3, **few)
    with pytest.raises(
        GenerationError, match=r"prompts\[1\]: found 0 of num_return_sequences=1 .*; loosen no_repeat_ng"
    ):
        beam_search(model, [[0], [0, 1, 2], [1]], eos_token_ids=[2], **few)
    with pytest.raises(GenerationError, match=r"prompts\[0\]: found 0 of num_return_sequences=1 sequences"):
        beam_search(model, [0], **few)


def test_after_a_prefix(model):
    from mpt_eqx import beam_search, prefill

    start, rows = [5, 6, 7], [[1, 2, 3, 4], [], [50]]
    search = {"num_beams": 3, "max_new_tokens": 8, "num_return_sequences": 2}
    wanted = beam_search(model, [[*start, *row] for row in rows], **search)
    prefix = prefill(model, start)
    for _ in range(2):  # the prefix is still there
        found = beam_search(model, rows, prefix=prefix, **search)
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-5)


def test_the_cache_grows(tiny_config, prompts, monkeypatch):
    from mpt_eqx import MPT, InitConfig, beam_search
    from mpt_eqx.generation import buckets, state

    config = tiny_config(n_layers=1, max_seq_len=1024, init_config=InitConfig(emb_init_std=0.5))
    model, (prompt,) = MPT(config, key=jax.random.key(3)), prompts(500)
    sizes, repeat = [], state.repeat_and_resize
    for module in (importlib.import_module("mpt_eqx.generation.beam_search"), state):
        monkeypatch.setattr(
            module, "repeat_and_resize", lambda state, n, to: sizes.append((n, to)) or repeat(state, n, to)
        )
    search = {"num_beams": 3, "max_new_tokens": 24, "num_return_sequences": 3}
    found = beam_search(model, prompt, **search)
    monkeypatch.setattr(buckets, "MIN_CACHE", 1024)
    wanted = beam_search(model, prompt, **search)
    assert sizes == [(3, 512), (1, 1024), (3, 1024)]
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-5)


def test_no_prompts_no_rows(tiny_model):
    from mpt_eqx import beam_search

    result = beam_search(tiny_model, [], num_beams=2, max_new_tokens=3, num_return_sequences=2)
    assert result.tokens.shape == (0, 3) and result.scores.shape == (0,) and result.finish_reasons == []


def test_nothing_compiles_again(model, prompts):
    """For other prompts, penalties, ends, lengths, ways to stop and numbers of rows to return."""
    from mpt_eqx import beam_search

    a, b, c = prompts(5, 30, 17)
    beam_search(model, [a, b, b], num_beams=3, max_new_tokens=20)
    with counting_compiles() as compiles:
        beam_search(model, [b, c, a], num_beams=3, max_new_tokens=25, length_penalty=0.3, num_return_sequences=3)
        beam_search(model, [c, a, c], num_beams=3, max_new_tokens=20, eos_token_ids=[1, 2, 3], pad_token_id=4)
        beam_search(model, [c, a, c], num_beams=3, max_new_tokens=20, repetition_penalty=1.3, min_new_tokens=2)
        beam_search(model, [c, a, c], num_beams=3, max_new_tokens=20, no_repeat_ngram_size=2, early_stopping=True)
        beam_search(model, [c, a, c], num_beams=3, max_new_tokens=20, vocab_size=50, early_stopping="never")
    assert compiles == []


def test_a_step_of_beams_needs_the_cache_and_little_else(tiny_model):
    """The cache is donated, and its rows are put in order block by block."""
    from mpt_eqx import SamplingParams
    from mpt_eqx.generation.beam_search import search_options
    from mpt_eqx.generation.beam_step import BeamState, beam_chunk, initial_beams
    from mpt_eqx.generation.state import empty_state

    options = search_options(SamplingParams(max_new_tokens=8), 8, 1.0, False)
    state = BeamState(empty_state(tiny_model, 6, 8192), *initial_beams(2, 3))
    memory = beam_chunk.lower((tiny_model, options, ()), state, 8).compile().compiled.memory_analysis()
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.rows.cache))
    assert memory.alias_size_in_bytes > 0.99 * cache_bytes
    assert memory.temp_size_in_bytes < 0.3 * cache_bytes


def test_logits_that_are_not_finite_are_an_error_and_not_a_token(model):
    from mpt_eqx import GenerationError, beam_search

    broken = eqx.tree_at(lambda m: m.norm_f.weight, model, replace_fn=lambda w: w.at[3].set(jnp.nan))
    with pytest.raises(GenerationError, match="logits of new token 0 are not finite; .*check_finite=True"):
        beam_search(broken, [[1, 2]], num_beams=3, max_new_tokens=8)


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_ctrl_c_leaves_the_best_so_far(golden, monkeypatch, chunks):
    """Of the sequences that have ended and the beams as they are."""
    from mpt_eqx import Interrupted, beam_search

    module = importlib.import_module("mpt_eqx.generation.beam_search")
    case = golden("hf_generate")
    rows, arguments = recorded(case, "beam3_eos")
    whole = beam_search(case.model, rows, **{**arguments, "max_new_tokens": 8 * chunks or 8})
    calls, beam_chunk = [], module.beam_chunk

    def pressed(*args):
        if len(calls) == chunks:
            raise KeyboardInterrupt
        calls.append(1)
        return beam_chunk(*args)

    monkeypatch.setattr(module, "beam_chunk", pressed)
    with pytest.raises(Interrupted) as caught:
        beam_search(case.model, rows, **{**arguments, "max_new_tokens": 24})
    result = caught.value.result
    if not chunks:
        assert set(result.finish_reasons) == {"interrupted"} and not result.lengths.any() and not result.tokens.any()
        return
    np.testing.assert_array_equal(result.tokens[:, : 8 * chunks], whole.tokens)
    assert (result.tokens[:, 8 * chunks :] == 0).all()
    np.testing.assert_array_equal(result.lengths, whole.lengths)
    np.testing.assert_allclose(result.scores, whole.scores, rtol=1e-6)
    unfinished = {"length": "interrupted"}
    assert result.finish_reasons == [unfinished.get(reason, reason) for reason in whole.finish_reasons]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 0}, "num_beams: expected a whole number ≥ 1, found 0"),
        ({"num_beams": 2.0}, "num_beams: expected a whole number ≥ 1, found 2.0"),
        ({"num_beams": True}, "num_beams: expected a whole number ≥ 1, found True"),
        ({"num_return_sequences": 0}, "num_return_sequences: expected a whole number ≥ 1, found 0"),
        ({"num_return_sequences": 4}, "num_return_sequences: expected at most num_beams=3, found 4"),
        ({"length_penalty": float("nan")}, "length_penalty: expected a number from -30 to 30, found nan"),
        ({"length_penalty": float("-inf")}, "length_penalty: expected a number from -30 to 30, found -inf"),
        ({"length_penalty": 10**400}, "length_penalty: expected a number from -30 to 30, found 1000"),
        ({"length_penalty": 20, "max_new_tokens": 100}, "length_penalty: expected a number from -15 to 15, found 20"),
        ({"length_penalty": "long"}, "length_penalty: expected a number from -30 to 30, found 'long'"),
        ({"early_stopping": "always"}, "early_stopping: expected True, False or \"never\", found 'always'"),
        ({"early_stopping": 1}, 'early_stopping: expected True, False or "never", found 1'),
        ({"early_stopping": None}, 'early_stopping: expected True, False or "never", found None'),
        ({"prompts": [[1], []]}, r"prompts\[1\]: expected at least one token, found an empty prompt"),
        ({"prompts": [[61]]}, r"prompts\[0\]: expected token ids from 0 to 60, found 61"),
        ({"prompts": "text"}, "prompts: expected token ids, found text"),
        ({"prompts": [[1] * 250], "max_new_tokens": 7}, "250 tokens and max_new_tokens=7 exceed max_seq_len=256"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number ≥ 1, found 0"),
        ({"min_new_tokens": 5}, "min_new_tokens: expected at most max_new_tokens=4, found 5"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a finite number > 0, found 0"),
        ({"no_repeat_ngram_size": 0}, "no_repeat_ngram_size: expected a whole number ≥ 1, found 0"),
        ({"vocab_size": 62}, "vocab_size: expected at most the model's 61, found 62"),
        ({"eos_token_ids": [61]}, "eos_token_ids: expected token ids from 0 to 60, found 61"),
        ({"pad_token_id": -1}, "pad_token_id: expected token ids from 0 to 60, found -1"),
        ({"temperature": 1.0}, "temperature: expected an option of beam_search, found an unknown name; there are rep"),
    ],
)
def test_bad_arguments(tiny_model, arguments, message):
    from mpt_eqx import GenerationError, beam_search

    with pytest.raises(GenerationError, match=message):
        beam_search(tiny_model, **{"prompts": [[1]], "num_beams": 3, "max_new_tokens": 4, **arguments})


def test_numbers_of_numpy(model):
    from mpt_eqx import beam_search

    search = {"num_beams": 3, "max_new_tokens": 8, "num_return_sequences": 2, "length_penalty": 2.0}
    wanted = beam_search(model, [5, 6], early_stopping=True, **search)
    numbers = {key: np.asarray(value)[()] for key, value in search.items()}
    found = beam_search(model, np.asarray([5, 6]), early_stopping=np.True_, **numbers)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)


# What each shows, the run that notices it, a function, an expression of it, and what takes its place.
OTHER_ENDS = "jnp.where(jnp.tile(A, B), -jnp.inf, C)"
MUTATIONS = [
    ("penalty left out", "beam3_eos_lp2", "length_penalized", "A / B**C", "A / B"),
    ("the end is no token", "beam3_eos", "length_penalized", "A.lengths.astype", "(A.lengths - 1).astype"),
    ("what ended goes on", "beam3_eos", "beam_chunk", OTHER_ENDS, "C"),
    (
        *("only the M best of all go on", "beam3_eos", "beam_chunk", OTHER_ENDS),
        "jnp.where(jnp.tile(A, B) | (C < jax.lax.top_k(C, B)[0][:, -1:]), -jnp.inf, C)",
    ),
    ("no end counts", "beam3_eos", "beam_chunk", "(A[B.tokens] | C) & D", "C & D"),
    ("finished sequences are forgotten", "beam3_eos", "beam_chunk", "merge_finished(A, B)", "A"),
    ("done prompts find more", "beam3_eos_early", "beam_chunk", "(A | B) & ~C", "A | B"),
    ("early_stopping: not at the first", "stops", "is_done", "options.first_found | A", "A"),
    ("early_stopping: always at the first", "stops", "is_done", "options.first_found | A", "True | A"),
    ("early_stopping: never", "stops", "is_done", "A <= B", "False"),
    ("early_stopping: the longest length always", "stops", "is_done", "options.never_early & A", "True & A"),
    ("early_stopping: the longest length at no time", "stops", "is_done", "options.never_early & A", "False & A"),
    ("early_stopping: whatever the penalty", "stops", "is_done", "A & (options.length_penalty > 0)", "A"),
    ("early_stopping: before all have ended", "stops", "is_done", "jnp.isfinite(A) & B", "B"),
    ("early_stopping: not when nothing goes on", "stops", "is_done", "jnp.isneginf(A) | B", "B"),
    (
        *("rows stay where they are", "beam3", "reorder_cache"),
        "jax.lax.dynamic_update_slice_in_dim(A, B[order], C, axis=D)",
        "jax.lax.dynamic_update_slice_in_dim(A, B, C, axis=D)",
    ),
    ("all beams at first", "beam3", "initial_beams", "A[:, 0]", "A[:]"),
    ("penalties do not count", "plain", "beam_chunk", "process_logits(A, B, C, D, E, F)", "A"),
]


STOPS = [
    # early_stopping, length_penalty, the best beam's sum, the worst finished score, and whether the search ends:
    # two tokens of at most four, so that the best beam as it is scores its sum over 2 ** length_penalty
    (False, 1.0, -4.0, -2.1, False),
    (False, 1.0, -4.0, -2.0, True),
    (False, 1.0, -4.0, -1.9, True),
    (False, 1.0, -4.0, -np.inf, False),
    (False, 1.0, -np.inf, -np.inf, True),
    (False, 0.0, -4.0, -4.1, False),
    (False, -1.0, -4.0, -8.1, False),
    (False, -1.0, -4.0, -7.9, True),
    (True, 1.0, -4.0, -2.1, True),
    (True, 1.0, -4.0, -np.inf, False),
    ("never", 1.0, -4.0, -1.1, False),
    ("never", 1.0, -4.0, -0.9, True),
    ("never", 0.0, -4.0, -4.1, False),
    ("never", 0.0, -4.0, -3.9, True),
    ("never", -1.0, -4.0, -8.1, False),
    ("never", -1.0, -4.0, -7.9, True),
]


def check_stops(search):
    from mpt_eqx import SamplingParams
    from mpt_eqx.generation.beam_search import search_options

    params = SamplingParams(max_new_tokens=4)
    for early_stopping, length_penalty, going, worst, wanted in STOPS:
        options = search_options(params, 4, length_penalty, early_stopping)
        finished = eqx.tree_at(lambda s: s.scores, search.no_sequences(1, 2), jnp.asarray([[-0.5, worst]], jnp.float32))
        ends = search.is_done(jnp.asarray([going], jnp.float32), finished, jnp.int32(2), options)
        assert bool(ends[0]) == wanted, (early_stopping, length_penalty, going, worst)


def check(case, run, search):
    """Compares with a recorded run, with a plain search, or with what is known of when a search ends."""
    if run == "stops":
        check_stops(search)
    elif run == "plain":
        check_plain(case.model, [5, 6], {"max_new_tokens": 14, "repetition_penalty": 1.3, "eos_token_ids": [11]})
    else:
        check_recorded(case, run)


@pytest.mark.parametrize("run", ["stops", "plain"])
def test_the_checks_pass(golden, run):
    from mpt_eqx.generation import beam_step

    check(golden("hf_generate"), run, beam_step)


@pytest.mark.parametrize(
    ("run", "function", "part", "other"), one_in(16, [m[1:] for m in MUTATIONS]), ids=[m[0] for m in MUTATIONS]
)
def test_the_checks_notice_a_mutation(golden, monkeypatch, run, function, part, other):
    from mpt_eqx import GenerationError
    from mpt_eqx.generation import beam_step

    module, beam_search = mutant(beam_step, function, part, other), "mpt_eqx.generation.beam_search"
    for name in ("BeamState", "SearchOptions", "initial_beams", "no_sequences", "beam_chunk", "finalize", "backtrace"):
        monkeypatch.setattr(importlib.import_module(beam_search), name, getattr(module, name))
    jax.config.update("jax_disable_most_optimizations", True)  # each is compiled for one run
    try:
        with pytest.raises((AssertionError, GenerationError)):
            check(golden("hf_generate"), run, module)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
