"""Every public checkpoint of the family: a small random one of its shape, in its dialect, runs or is refused."""

import re

import census
import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

TOKENS = list(range(12))
# What other files of weights begin with: CTranslate2's, OpenVINO's, GGML's.
FOREIGN = {
    "model.bin": b"\6\0\0\0\x08\0MPTSpec\0",
    "openvino_model.bin": bytes(64),
    "mpt-30b-chat.ggmlv0.q4_1.bin": b"lmgg" + bytes(64),
}
# Configs whose generation compiles a program of its own; that of mpt-7b serves the others.
PROGRAMS = {
    *("mpt-7b-storywriter", "mpt-30b-chat, first upload", "mpt-1b-redpajama-200b", "replit-code-v1_5-3b", "krutrim-1"),
    *("replit-hiddensize", "mpt-1b-redpajama-200b-hf-style", "mpt-125m-c4", "titulm-1b", "sea-lion-7b", "sea-lion-3b"),
    *("phogpt-4b", "phogpt-7b5", "precious3-gpt"),
}


def kinds(outcome, slow=()):
    """Returns (config, files) that are alike in several repositories once, by the first one's name."""
    found = {}
    for name, entry in census.REPOSITORIES.items():
        if entry["outcome"] == outcome and entry["config"]:
            found.setdefault((entry["config"], tuple(entry["weights"])), name)
    return [
        pytest.param(*kind, id=name, marks=[pytest.mark.slow] if kind[0] in slow else [])
        for kind, name in found.items()
    ]


@pytest.mark.parametrize(("config", "weights"), kinds("runs"))
def test_it_computes_what_the_formulas_say(tmp_path, config, weights):
    """Those of the 2023 models, in float64."""
    from mpt_eqx import MPTConfig, from_pretrained

    full = MPTConfig.from_dict(census.config_of(config))
    sizes = {e["parameters"] for e in census.REPOSITORIES.values() if e["config"] == config and e["outcome"] == "runs"}
    assert f"{full.num_parameters() / 1e9:.{2 if full.num_parameters() < 1e9 else 1}f}B" in sizes
    census.write(tmp_path, config, weights)
    model = from_pretrained(tmp_path, dtype="float32")
    logits = eqx.filter_jit(model)(jnp.asarray(TOKENS))
    np.testing.assert_allclose(logits, census.expected(config, TOKENS), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("config", "weights"), kinds("runs", slow=PROGRAMS))
def test_it_generates(tmp_path, config, weights):
    from mpt_eqx import from_pretrained, generate

    census.write(tmp_path, config, weights)
    model = from_pretrained(tmp_path, dtype="float32")
    result = generate(model, TOKENS, max_new_tokens=3, return_logits=True)
    logits = eqx.filter_jit(model)(jnp.asarray([*TOKENS, *result.tokens[0].tolist()]))
    np.testing.assert_allclose(logits[11:-1], result.logits[0], atol=1e-4)


def packed(arrays):
    """Returns the weights of linear maps as GPTQ and AWQ keep them: packed, with zeros and scales."""
    for name, array in arrays.items():
        if array.ndim == 2 and "blocks" in name:
            part, rows = name.removesuffix("weight"), len(array)
            yield f"{part}qweight", np.zeros((4, rows), np.int32)
            yield f"{part}qzeros", np.zeros((1, rows // 8), np.int32)
            yield f"{part}scales", np.ones((1, rows), np.float16)
        else:
            yield name, array


def write_refused(directory, entry):
    for file in entry["weights"]:
        foreign = FOREIGN.get(file)
        if foreign is not None or file.endswith((".msgpack", ".xml", ".onnx")):
            (directory / file).parent.mkdir(exist_ok=True)
            (directory / file).write_bytes(foreign or b"x")
    if not any(directory.iterdir()):
        census.write(directory, entry["config"], entry["weights"], packed if "packed" in entry["special"] else None)
    census.write_config(directory, entry["config"])


REFUSED = [name for name, entry in census.REPOSITORIES.items() if entry["outcome"] == "refused"]


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(tmp_path, name):
    from mpt_eqx import MPTError, from_pretrained

    entry = census.REPOSITORIES[name]
    write_refused(tmp_path, entry)
    with pytest.raises(MPTError, match=re.escape(entry["message"])):
        from_pretrained(tmp_path)


def test_an_entry_says_how_sure_it_is():
    for entry in census.CENSUS["configs"].values():
        assert entry["basis"] in ("seen", "excerpt", "derived") and ("config" in entry) != ("like" in entry)
    for entry in census.REPOSITORIES.values():
        assert entry["tokenizer"] in census.CENSUS["tokenizers"] and entry["weights"] and entry["special"]
        assert (entry["outcome"] == "refused") == ("message" in entry) and entry["basis"] in (
            "seen",
            "excerpt",
            "derived",
        )
        assert entry["config"] in census.CENSUS["configs"] or entry["weights"] == ["model.gguf"]
    run = {entry["config"] for entry in census.REPOSITORIES.values() if entry["outcome"] == "runs"} - {None}
    assert census.THEIRS["outcomes"].keys() == run  # recorded anew by tests/reference/record_census.py
    used = {entry["config"] for entry in census.REPOSITORIES.values()} - {None}
    assert used == census.CENSUS["configs"].keys()
