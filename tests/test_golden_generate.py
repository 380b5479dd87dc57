"""Greedy runs of transformers with penalties and a least length: their tokens, and what padding meant to them."""

import jax.numpy as jnp
import numpy as np
import pytest

RUNS = ("rep_penalty", "rep_penalty_0_8", "rep_penalty_eos", "no_repeat_ngram2", "min_new_tokens")


def generated(case, run):
    """Our result of a recorded run, its options, the recorded tokens, and the prompts with and without padding."""
    from mpt_eqx import generate

    given = case.case["runs"][run]["args"]
    options = {key: value for key, value in given.items() if key not in ("do_sample", "eos_token_id")}
    options["eos_token_ids"] = [] if given["eos_token_id"] is None else [given["eos_token_id"]]
    padded, real = case.expected["input_ids"], case.expected["attention_mask"].astype(bool)
    rows = [row[here].tolist() for row, here in zip(padded, real, strict=True)]
    result = generate(case.model, rows, return_logits=True, **options)
    return result, options, case.expected[f"{run}.sequences"][:, padded.shape[1] :], padded.tolist(), rows


def opened(case, result, options, prompts):
    """What may come at each step of a result, after these prompts, as logits."""
    from mpt_eqx import SamplingParams
    from mpt_eqx.generation.sampling import process_logits

    rows = []
    for prompt, tokens, logits in zip(prompts, result.tokens.tolist(), result.logits, strict=True):
        so_far = jnp.asarray([[*prompt, *tokens]] * len(tokens), jnp.int32)
        lengths = len(prompt) + jnp.arange(len(tokens))
        params = SamplingParams(**options).of_rows(len(tokens))
        rows.append(process_logits(jnp.asarray(logits), params, so_far, lengths, jnp.zeros_like(lengths)))
    return np.stack(rows)


@pytest.mark.parametrize("run", RUNS)
def test_generate_as_transformers_does(golden, run):
    result, _, wanted, *_ = generated(golden("hf_generate"), run)
    length = wanted.shape[1]  # of the longest row, where all have ended
    np.testing.assert_array_equal(result.tokens[:, :length], wanted)
    assert (result.tokens[:, length:] == 0).all()


def test_the_penalty_does_not_count_padding(golden):
    """Neither there nor here: with padding for tokens the recorded scores would not be what they are."""
    case = golden("hf_generate")
    result, options, _, padded, rows = generated(case, "rep_penalty")
    wanted = case.expected["rep_penalty.scores"]
    np.testing.assert_allclose(opened(case, result, options, rows), wanted, atol=1e-4, rtol=0)
    assert np.abs(opened(case, result, options, padded) - wanted).max() > 0.5


def test_padding_changes_no_token_where_no_sequence_comes_twice(golden):
    """There padding is part of these sequences, here it is not; the recorded tokens are the same with it."""
    case = golden("hf_generate")
    result, options, wanted, padded, rows = generated(case, "no_repeat_ngram2")
    for prompts in (padded, rows):
        np.testing.assert_array_equal(np.argmax(opened(case, result, options, prompts), axis=-1), wanted)
