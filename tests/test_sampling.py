"""The functions of sampling equal recorded values and plain float64 formulas, and stop when a formula is changed."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, examples, is_long, one_in, some
from hypothesis import given, settings
from hypothesis import strategies as st
from mutate import mutant
from safetensors.numpy import load_file

CASE = json.loads((GOLDEN / "logits_processors" / "case.json").read_text())["ops"]
EXPECTED = load_file(GOLDEN / "logits_processors" / "expected.safetensors")

# The function of each class, and the option that it takes.
CLASSES = {
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "MinPLogitsWarper": ("min_p", "min_p"),
    "TypicalLogitsWarper": ("typical_p", "mass"),
    "EpsilonLogitsWarper": ("epsilon_cutoff", "epsilon"),
    "EtaLogitsWarper": ("eta_cutoff", "epsilon"),
    "RepetitionPenaltyLogitsProcessor": ("repetition_penalty", "penalty"),
    "NoRepeatNGramLogitsProcessor": ("no_repeat_ngram", "ngram_size"),
}
# min_tokens_to_keep is 6, 4 and 3 there; the functions always keep one and have no such option.
KEEP_MORE = ("topk3_keep6", "topp0.2_keep4", "minp0.9_keep3")
OPS = tuple(op for op in CASE if op not in KEEP_MORE)
# Rows with equal logits, of which top_p may keep one or the other.
TIES = (0, 1)

NEUTRAL = {
    "temperature": (1.0,),
    "top_k": (16, 17, 50000),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "no_repeat_ngram": (0,),
}
OPTIONS = {
    "temperature": (0.3, 0.7, 1.5, 30.0),
    "top_k": (1, 2, 7, 15),
    "top_p": (0.0, 0.2, 0.6, 0.97),
    "min_p": (0.01, 0.1, 0.6, 1.0),
    "typical_p": (0.0, 0.2, 0.6, 0.97),
    "epsilon_cutoff": (0.001, 0.05, 0.2, 0.99),
    "eta_cutoff": (0.001, 0.05, 0.2, 0.99),
    "repetition_penalty": (0.5, 1.1, 1.3, 5.0),
    "no_repeat_ngram": (1, 2, 3, 5),
}
FUNCTIONS = tuple(NEUTRAL)
WITH_TOKENS = ("repetition_penalty", "no_repeat_ngram")
V, T = 16, 14


@functools.cache
def function(name, jit=False):
    from mpt_eqx import sampling

    return jax.jit(getattr(sampling, name)) if jit else getattr(sampling, name)


def call(name, logits, option, tokens=None, mask=None, jit=False):
    """The function's result; tokens go to those that take them."""
    context = (tokens, mask) if name in WITH_TOKENS else ()
    return function(name, jit)(logits, *context, option)


def row(seed=0, dtype=np.float32):
    """Logits (some filtered out already), tokens with padding on both sides, and their mask."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=V).astype(np.float32) * 2
    logits[rng.choice(V, 4, replace=False)] = -np.inf
    tokens, mask = placed(rng.integers(4, size=9).tolist(), 2, rng.integers(-1, V + 1, size=T))
    return jnp.asarray(logits).astype(dtype), tokens, mask


def placed(real, left, garbage):
    """Arrays of tokens and mask with the real tokens after `left` others."""
    tokens, mask = np.array(garbage), np.zeros(T, bool)
    tokens[left : left + len(real)], mask[left : left + len(real)] = real, True
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)


def check_recorded(sampling, op):
    """Runs an op's functions one after the other and compares each row with what transformers gave."""
    everything = jnp.ones(EXPECTED["input_ids"].shape[1], bool)
    for i, logits in enumerate(EXPECTED["scores"]):
        found = jnp.asarray(logits)
        for step in CASE[op]:
            name, option = CLASSES[step["cls"]]
            context = (jnp.asarray(EXPECTED["input_ids"][i], jnp.int32), everything) if name in WITH_TOKENS else ()
            found = getattr(sampling, name)(found, *context, step[option])
        found, wanted = np.asarray(found), EXPECTED[f"out.{op}"][i]
        if i in TIES and any(step["cls"] == "TopPLogitsWarper" for step in CASE[op]):
            found, wanted = np.sort(found), np.sort(wanted)
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_recorded(op):
    from mpt_eqx import sampling

    check_recorded(sampling, op)


def test_every_class_that_was_recorded_is_compared():
    assert {step["cls"] for op in OPS for step in CASE[op]} == set(CLASSES)
    assert {op for op in CASE if any(step.get("min_tokens_to_keep", 1) > 1 for step in CASE[op])} == set(KEEP_MORE)


# Plain formulations, in float64. Those of filters give what is kept. Float32 cannot tell what lies within `slack` of a
# border: with slack > 0 all of it is kept, with slack < 0 none.


def probabilities(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def entropy(probs):
    return -sum(p * np.log(p) for p in probs if p > 0)


def plain_min_p(logits, p, slack):
    probs = probabilities(logits)
    return (probs >= p * (1 - slack) * probs.max()) | (logits == logits.max())


def plain_top_p(logits, p, slack):
    order = np.argsort(-logits, kind="stable")
    probs = probabilities(logits)[order]
    kept = np.zeros(logits.shape, bool)
    kept[order] = (np.cumsum(probs) - probs < p + slack) | (np.arange(len(logits)) == 0)
    return kept | (p == 1)


def plain_typical_p(logits, p, slack):
    probs = probabilities(logits)
    with np.errstate(divide="ignore"):
        atypical = np.abs(-np.log(probs) - entropy(probs))
    total = 0.0
    for token in np.argsort(atypical):
        total += probs[token]
        if total >= p + slack:
            break
    # Another logit at the border may come before this one in float32.
    border = set(logits[np.isclose(atypical, atypical[token], rtol=0, atol=abs(slack))])
    return (atypical <= atypical[token] + (slack if len(border) > 1 else 1e-9)) | (p == 1)


def plain_epsilon_cutoff(logits, e, slack):
    return (probabilities(logits) >= e * (1 - slack)) | (logits == logits.max())


def plain_eta_cutoff(logits, e, slack):
    probs = probabilities(logits)
    eta = min(e, np.sqrt(e) * np.exp(-entropy(probs)))
    return (probs >= eta * (1 - slack)) | (logits == logits.max())


def plain_repetition_penalty(logits, real, penalty):
    out = logits.copy()
    for token in set(real):
        out[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
    return out


def plain_no_repeat_ngram(logits, real, n):
    out = logits.copy()
    for start in range(len(real) - n + 1):
        *before, last = real[start : start + n] or [None]
        if n and before == real[len(real) - n + 1 :]:
            out[last] = -np.inf
    return out


FILTERS = {
    "top_p": plain_top_p,
    "min_p": plain_min_p,
    "typical_p": plain_typical_p,
    "epsilon_cutoff": plain_epsilon_cutoff,
    "eta_cutoff": plain_eta_cutoff,
}


def check_filter(call, name, logits, option):
    """Compares a filter with its plain formulation, and tells whether no logit was too near to the border to judge."""
    found = np.asarray(call(jnp.asarray(logits), option))
    plain = FILTERS[name]
    surely, maybe = (plain(logits.astype(np.float64), option, slack) & np.isfinite(logits) for slack in (-1e-5, 1e-5))
    kept = np.isfinite(found)
    assert (surely <= kept).all() and (kept <= maybe).all() and kept.any()
    np.testing.assert_array_equal(found, np.where(kept, logits, -np.inf))
    return (surely == maybe).all()


def check_tokens(call, name, logits, real, left, garbage, option):
    """Compares a function that sees tokens with its plain formulation, which sees no padding."""
    plain = {"repetition_penalty": plain_repetition_penalty, "no_repeat_ngram": plain_no_repeat_ngram}[name]
    found = call(jnp.asarray(logits), *placed(real, left, garbage), option)
    # XLA flushes what is below the smallest normal number of float32 to 0.
    wanted = plain(logits.astype(np.float64), real, option)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=np.finfo(np.float32).tiny)
    return found


def logit_rows(size):
    number = st.one_of(st.just(-np.inf), st.integers(-40, 40).map(lambda x: x / 8), st.floats(-30, 30, width=32))
    rows = st.lists(number, min_size=size, max_size=size).map(lambda x: np.array(x, np.float32))
    return rows.filter(lambda x: np.isfinite(x).any())


any_logits = st.sampled_from([1, 3, V]).flatmap(logit_rows)
any_probability = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([1e-4, 0.05, 0.5]))
any_real = st.lists(st.integers(0, 2), max_size=10)
any_garbage = st.lists(st.integers(-1, 3) | st.just(V), min_size=T, max_size=T)


@pytest.mark.parametrize("name", FILTERS)
@examples(100, least=30)
@given(any_logits, any_probability)
def test_filters_equal_their_plain_formulation(name, logits, option):
    check_filter(function(name, jit=True), name, logits, option)


@examples(100)
@given(st.lists(st.integers(-40, 40), min_size=2, max_size=30), st.integers(1, 40))
def test_top_k_keeps_the_largest_and_what_equals_the_last_of_them(eighths, k):
    logits = np.array(eighths, np.float32) / 8
    threshold = np.sort(logits)[::-1][min(k, len(logits)) - 1]
    found = function("top_k")(jnp.asarray(logits), k)
    np.testing.assert_array_equal(found, np.where(logits >= threshold, logits, -np.inf))


@settings(max_examples=100, deadline=None)
@given(logit_rows(V), any_real, st.integers(0, 4), any_garbage, st.integers(0, 4), any_garbage, st.floats(0.1, 10))
def test_repetition_penalty_is_plain_wherever_the_tokens_stand(logits, real, left, garbage, left2, garbage2, penalty):
    call = function("repetition_penalty", jit=True)
    one = check_tokens(call, "repetition_penalty", logits, real, left, garbage, penalty)
    np.testing.assert_array_equal(call(logits, *placed(real, left2, garbage2), penalty), one)


@settings(max_examples=200, deadline=None)
@given(logit_rows(V), any_real, st.integers(0, 4), any_garbage, st.integers(0, 4), any_garbage, st.integers(0, 12))
def test_no_repeat_ngram_is_plain_wherever_the_tokens_stand(logits, real, left, garbage, left2, garbage2, n):
    call = function("no_repeat_ngram", jit=True)
    one = check_tokens(call, "no_repeat_ngram", logits, real, left, garbage, n)
    np.testing.assert_array_equal(call(logits, *placed(real, left2, garbage2), n), one)


@pytest.mark.parametrize(
    ("real", "n", "banned"),
    [
        ([1, 2, 3, 1, 2], 3, [3]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 3, [3, 4]),
        ([1, 2, 3, 1, 2], 2, [3]),
        ([1, 2, 3, 1, 2], 1, [1, 2, 3]),
        ([5, 5, 5], 2, [5]),
        ([5, 5], 3, []),
        ([1, 2, 3, 1, 2], 5, []),
        ([1, 2, 3, 1, 2], 2**31 - 1, []),
        ([], 1, []),
        ([], 2, []),
    ],
)
def test_what_no_repeat_ngram_bans(real, n, banned):
    tokens, mask = placed(real, 3, [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2])
    found = function("no_repeat_ngram")(jnp.zeros(V), tokens, mask, n)
    assert np.flatnonzero(np.isneginf(found)).tolist() == banned


def test_tokens_of_small_types():
    logits = jnp.arange(300.0)
    for name in WITH_TOKENS:
        for dtype in (jnp.int8, jnp.int16, jnp.int32):
            found = function(name)(logits, jnp.array([7, 3, 9], dtype), jnp.array([False, True, True]), 1)
            wanted = [3, 9] if name == "no_repeat_ngram" else []
            assert np.flatnonzero(np.asarray(found) != np.arange(300)).tolist() == wanted


@pytest.mark.parametrize("dtype", some(["float32", "bfloat16", "float16"], ["bfloat16"]))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_neutral_values_change_nothing(name, dtype):
    spread = jnp.array([-jnp.inf, 90, -90, 60, -0.0, 0.0, 1e-6, *np.linspace(-9, 9, V - 7)]).astype(dtype)
    for logits, tokens, mask in (row(0, dtype), (spread, jnp.arange(T), jnp.ones(T, bool))):
        for option in NEUTRAL[name]:
            found = call(name, logits, option, tokens, mask)
            assert found.dtype == logits.dtype
            np.testing.assert_array_equal(found.astype(jnp.float32), logits.astype(jnp.float32))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_filtered_already_stays_so(name):
    logits, tokens, mask = row(1)
    for left in (V, 3, 1, 0):
        fewer = jnp.where(jnp.arange(V) < left, logits.at[0].set(-1.0), -jnp.inf)
        for option in (*OPTIONS[name], *NEUTRAL[name]):
            found = np.asarray(call(name, fewer, option, tokens, mask, jit=True))
            assert not np.isnan(found).any() and np.isneginf(found[np.isneginf(fewer)]).all()
            if left and name != "no_repeat_ngram":
                assert np.isfinite(found).any()
    if name not in WITH_TOKENS:
        # Also where probabilities are too small for float32, or all equal.
        for logits in (jnp.array([0.0, -200.0, -300.0]), jnp.array([1e30, -1e30, 3.0]), jnp.full(3, -7.0)):
            for option in OPTIONS[name]:
                found = np.asarray(call(name, logits, option, jit=True))
                assert np.isfinite(found).any() and not np.isnan(found).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_low_precision_rounds_the_result_alone(name, dtype):
    for seed in range(3):
        logits, tokens, mask = row(seed, dtype)
        for option in OPTIONS[name]:
            found = call(name, logits, option, tokens, mask, jit=True)
            wanted = call(name, logits.astype(jnp.float32), option, tokens, mask, jit=True).astype(dtype)
            assert found.dtype == jnp.dtype(dtype)
            np.testing.assert_array_equal(found.astype(jnp.float32), wanted.astype(jnp.float32))


@pytest.mark.parametrize("name", one_in(3, FUNCTIONS))
def test_rows_with_traced_options_equal_each_row_alone(name):
    """Under jit and vmap, each row with an option of its own, and compiled once for all of their values."""
    traced = []

    def rows(logits, options, tokens, mask):
        traced.append(name)
        return jax.vmap(lambda *row: call(name, *row))(logits, options, tokens, mask)

    logits, tokens, mask = (jnp.stack(x) for x in zip(*(row(seed) for seed in range(4)), strict=True))
    compiled = jax.jit(rows)
    for turn in range(3):
        options = np.roll((*OPTIONS[name][:3], NEUTRAL[name][0]), turn)
        found = compiled(logits, jnp.asarray(options, jnp.float32 if options.dtype.kind == "f" else None), tokens, mask)
        for i, option in enumerate(options.tolist()):
            np.testing.assert_allclose(found[i], call(name, logits[i], option, tokens[i], mask[i]), rtol=1e-6)
    assert traced == [name]


def same_alone_and_among_others(rows, logits):
    """Compares a function of several rows with itself on one row."""
    sizes = (2, 3, 8, len(logits)) if is_long() else (3, 8)
    alone = np.concatenate([rows(logits[i : i + 1]) for i in range(max(sizes))])
    for n in sizes:
        np.testing.assert_array_equal(np.asarray(rows(logits[:n])).view(np.int32), alone[:n].view(np.int32))


# Of 50,432 entries, more than 4,096, a reduction by XLA sums 3 or 8 rows in another order than one.
@pytest.mark.optimized
@pytest.mark.parametrize("v", some([61, 4096, 50432], [4096]))
@pytest.mark.parametrize("name", ["log_softmax", "_entropy"])
def test_a_sum_has_the_same_bits_alone_and_among_others(name, v):
    logits = np.random.default_rng(v).normal(size=(40, v)).astype(np.float32) * 2
    same_alone_and_among_others(jax.jit(jax.vmap(function(name))), logits)


@pytest.mark.optimized
@pytest.mark.parametrize("v", some([61, 4096], [4096]))
def test_a_row_keeps_the_same_entries_alone_and_among_others(v):
    """Each of the filters, which are one program."""
    from mpt_eqx import sampling

    logits = np.random.default_rng(v).normal(size=(40, v)).astype(np.float32) * 2
    compiled = jax.jit(jax.vmap(sampling._truncate, in_axes=(None, 0, None)))
    for name in (*FILTERS, "top_k"):
        rule = jnp.asarray(getattr(sampling, name.upper()))
        for option in OPTIONS[name]:
            same_alone_and_among_others(
                lambda x, option=option, rule=rule: compiled(rule, x, jnp.float32(option)), logits
            )


def test_top_k_and_top_p_tell_what_is_equal():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        logits = jnp.array([-1.0, 0.0, 2.0, -0.0, 2.0, -1.0, -jnp.inf, 0.0], dtype)
        for k, kept in ((1, [2, 4]), (3, [1, 2, 3, 4, 7]), (6, [0, 1, 2, 3, 4, 5, 7])):
            assert np.flatnonzero(np.isfinite(function("top_k")(logits, k).astype(np.float32))).tolist() == kept
        # Probabilities are 0.399 twice, 0.054 three times and 0.020 twice.
        for p, kept in ((0.0, [2]), (0.3, [2]), (0.5, [2, 4]), (0.8, [1, 2, 4]), (0.86, [1, 2, 3, 4])):
            assert np.flatnonzero(np.isfinite(function("top_p")(logits, p).astype(np.float32))).tolist() == kept


def test_no_repeat_ngram_needs_memory_for_a_row_alone():
    t, v = 8192, 50432
    shapes = [((v,), jnp.float32), ((t,), jnp.int32), ((t,), bool), ((), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    memory = function("no_repeat_ngram", jit=True).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 32 * (t + v)


# For each function an expression of it and what takes its place; capital letters stand for any expression.
MUTATIONS = [
    ("temperature", "A / B", "A * B"),
    ("_truncate", "jnp.where(rule == TOP_K, 1, A)", "A"),
    ("_truncate", "jnp.where(rule == TYPICAL_P, A, B)", "B"),
    ("_truncate", "A + entropy", "A"),
    ("_truncate", "jnp.abs(A)", "A"),
    ("_truncate", "_highest(A, B, value, C)", "_highest(A, B, value / 2, C)"),
    ("_truncate", "_highest(A, B, C, rule == TOP_P)", "_highest(A, B, C, rule != TOP_P)"),
    ("_truncate", "A | ((rule != TOP_K) & B)", "A"),
    ("_truncate", "A | ((rule != TOP_K) & B)", "A | B"),
    ("_truncate", "jnp.minimum", "jnp.maximum"),
    ("_truncate", "jnp.sqrt(value)", "value"),
    ("_truncate", "-entropy", "entropy"),
    ("_truncate", "value * A.max()", "value"),
    ("_truncate", "rule == ETA_CUTOFF", "rule != ETA_CUTOFF"),
    ("_truncate", "A >= B", "A > 2 * B"),
    ("_truncate", "A | (logits == B)", "A"),
    ("repetition_penalty", "A < 0", "A > 0"),
    ("repetition_penalty", "_among(A, mask, B)", "_among(A, mask | True, B)"),
    ("no_repeat_ngram", "jnp.asarray(n, A) - 1", "jnp.asarray(n, A)"),
    ("no_repeat_ngram", "mask & A", "A"),
    ("no_repeat_ngram", "A >= B - C", "A >= 0"),
    ("no_repeat_ngram", "A & (B >= 0)", "A"),
    ("no_repeat_ngram", "jnp.roll(A, B)", "jnp.roll(A, -B)"),
    ("no_repeat_ngram", "tokens[A - B]", "tokens[B - 1]"),
    ("no_repeat_ngram", "jax.lax.fori_loop(1, A + 1, B, C)", "jax.lax.fori_loop(1, A, B, C)"),
    ("no_repeat_ngram", "jax.lax.fori_loop(1, A, B, C)", "jax.lax.fori_loop(2, A, B, C)"),
    ("no_repeat_ngram", "A & (B == C)", "B == C"),
    ("_entropy", "jnp.isneginf(A)", "A > 0"),
    ("_entropy", "jnp.exp(A) * A", "jnp.exp2(A) * A"),
    ("log_softmax", "jnp.log", "jnp.log1p"),
    ("_sum", "tree_sum(A)", "A"),
    ("_ordered", "A - B", "B"),
    ("_highest", "31 - A", "30 - A"),
    ("_highest", "_sum(A) >= B", "_sum(A) > B"),
    ("_highest", "keys > A", "keys >= A"),
    ("_highest", "keys == A", "keys != A"),
    ("_highest", "places >= A", "places <= A"),
    ("_highest", "-jnp.arange(A, dtype=B)", "jnp.arange(A, dtype=B)"),
    ("_highest", "jnp.finfo(A).tiny", "0"),
    ("_among", "jnp.where(A, B, vocab_size)", "jnp.where(A, B, 0)"),
]


# Which functions a helper is part of.
PART_OF = {
    "_truncate": ("top_k", *FILTERS),
    "_highest": ("top_k", "top_p", "typical_p"),
    "_entropy": ("typical_p", "eta_cutoff"),
    "log_softmax": ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    "_sum": (*FILTERS,),
    "_ordered": ("top_k", "top_p", "typical_p"),
    "_among": WITH_TOKENS,
}


def check(sampling, names, ops=OPS):
    """Compares functions with the recorded values, and with plain formulations on drawn rows.

    Half of those rows have equal logits, and each has one of nearly no probability.
    Gives for each row that was drawn whether no logit of it was too near to a border to judge.
    """
    rng, clear = np.random.default_rng(0), []
    for name in names:
        compiled = jax.jit(getattr(sampling, name))
        for turn in range(60):
            logits = np.where(rng.random(V) < 0.2, -np.inf, rng.normal(size=V) * 2).astype(np.float32)
            if turn % 2:
                logits = np.round(logits)
            logits[0] = -60
            option = (*OPTIONS[name], NEUTRAL[name][0])[turn % 5]
            if name in FILTERS:
                clear.append(check_filter(compiled, name, logits, option))
            elif name in WITH_TOKENS:
                real, garbage = rng.integers(3, size=turn % 11).tolist(), rng.integers(-1, 3, size=T)
                check_tokens(compiled, name, logits, real, turn % 4, garbage, option)
    for op in ops:
        if any(CLASSES[step["cls"]][0] in names for step in CASE[op]):
            check_recorded(sampling, op)
    return clear


def test_the_checks_pass_and_judge_nearly_every_row():
    """With the recorded values they pass in `test_recorded`."""
    from mpt_eqx import sampling

    assert np.mean(check(sampling, FUNCTIONS, ops=())) > 0.98


@pytest.mark.parametrize(
    ("name", "part", "other"), one_in(8, MUTATIONS), ids=[f"{m[0]}: {m[1]} → {m[2]}" for m in MUTATIONS]
)
def test_the_checks_notice_a_mutation(name, part, other):
    from mpt_eqx import sampling

    with pytest.raises(AssertionError):
        check(mutant(sampling, name, part, other), PART_OF.get(name, (name,)))
