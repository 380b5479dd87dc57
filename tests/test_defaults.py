"""What a checkpoint's generation_config.json asks of generate."""

import json

import pytest
from conftest import GOLDEN


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a checkpoint with the given generation_config.json."""

    def make(content):
        (tmp_path / "config.json").write_bytes((GOLDEN / "hf_default" / "config.json").read_bytes())
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("content", "arguments"),
    [
        ({}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7, "top_k": 5}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8},
            {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8},
        ),
        (
            {"do_sample": True, "epsilon_cutoff": 3e-4, "eta_cutoff": 2e-3},
            {"temperature": 1.0, "epsilon_cutoff": 3e-4, "eta_cutoff": 2e-3},
        ),
        ({"epsilon_cutoff": 3e-4, "eta_cutoff": 0.0}, {"temperature": 0.0}),
        (
            {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 2, "max_new_tokens": 9},
            {
                "temperature": 0.0, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 2,
                "max_new_tokens": 9,
            },
        ),
        ({"eos_token_id": [0, 7], "pad_token_id": 1}, {"temperature": 0.0, "eos_token_ids": (0, 7), "pad_token_id": 1}),
        ({"eos_token_id": 3, "top_k": None}, {"temperature": 0.0, "eos_token_ids": (3,)}),
        ({"do_sample": True, "top_k": 0, "no_repeat_ngram_size": 0, "num_beams": 1}, {"temperature": 1.0}),
        ({"transformers_version": "4.28.1", "use_cache": False, "_from_model_config": True}, {"temperature": 0.0}),
    ],
)  # fmt: skip
def test_what_is_taken(checkpoint, content, arguments):
    from mpt_eqx import generation_defaults

    assert generation_defaults(checkpoint(content)) == arguments


def test_no_file_no_arguments(checkpoint):
    from mpt_eqx import generation_defaults

    directory = checkpoint({})
    (directory / "generation_config.json").unlink()
    assert generation_defaults(directory) == {}


@pytest.mark.slow
def test_the_command_lines_word_is_the_last(tmp_path):
    """Over the file's: another length than its least one, and all of it with --no-defaults."""
    import shutil

    from command import run

    from mpt_eqx import SHIPPED_MODEL

    shutil.copytree(SHIPPED_MODEL, tmp_path / "m")
    content = {"min_new_tokens": 15, "max_new_tokens": 20, "eos_token_id": 0}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(content))
    made = json.loads(run("generate", "The", "--model", tmp_path / "m", "--json").stdout)
    assert len(made["tokens"]) == 20
    made = json.loads(run("generate", "The", "--model", tmp_path / "m", "--json", "--max-new-tokens", 10).stdout)
    assert len(made["tokens"]) == 10
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({**content, "num_beams": 4}))
    assert run("generate", "The", "--model", tmp_path / "m").returncode == 1
    assert run("generate", "The", "--model", tmp_path / "m", "--no-defaults", "--max-new-tokens", 3).returncode == 0


def test_an_argument_at_the_call_wins(shipped):
    import jax
    import numpy as np

    from mpt_eqx import SHIPPED_MODEL, generate, generation_defaults, stream

    defaults = {**generation_defaults(SHIPPED_MODEL), "max_new_tokens": 12}
    assert defaults["temperature"] == 0.7 and defaults["top_p"] == 0.95 and defaults["eos_token_ids"] == (0,)
    greedy = generate(shipped, [5, 6, 7], **{**defaults, "temperature": 0.0})
    np.testing.assert_array_equal(greedy.tokens, generate(shipped, [5, 6, 7], max_new_tokens=12).tokens)
    drawn = generate(shipped, [5, 6, 7], **defaults, key=jax.random.key(0))
    assert list(stream(shipped, [5, 6, 7], **defaults, key=jax.random.key(0))) == drawn.tokens[0].tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 is not something that generate does; call beam_search"),
        (
            {"bad_words_ids": [[5]]},
            r"bad_words_ids=\[\[5\]\] is not something that generate does; take it out of the file",
        ),
        ({"do_sample": "yes"}, "do_sample: expected true or false, found 'yes'"),
        ({"do_sample": True, "temperature": "hot"}, "temperature: expected a number, found 'hot'"),
        ({"do_sample": True, "eta_cutoff": "x"}, "eta_cutoff: expected a number, found 'x'"),
        ({"do_sample": True, "top_k": 50.0}, "top_k: expected a whole number, found 50.0"),
        ({"eos_token_id": "x"}, "eos_token_id, pad_token_id: expected token ids, found 'x'"),
        ({"min_length": 50}, "min_length=50 is not something that generate does"),
        ({"repetition_penalty": True}, "repetition_penalty: expected a number, found True"),
    ],
)
def test_what_is_refused(checkpoint, content, message):
    from mpt_eqx import GenerationError, generation_defaults

    with pytest.raises(GenerationError, match=f"generation_config.json: {message}"):
        generation_defaults(checkpoint(content))
