"""export_model: an artefact that generates in a process that cannot import this library."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from command import python

EXAMPLE = Path(__file__).parent.parent / "examples" / "run_exported.py"
KEY, NEW, LONGEST = 5, 11, 9
SAMPLED = {"temperature": 1.0, "top_k": 20, "eos_token_ids": [39], "pad_token_id": 3}


def exported(model, directory, **options):
    from mpt_eqx import export_model

    export_model(model, directory, prompt_length=LONGEST, max_new_tokens=NEW, batch_size=3, **options)
    return directory


@pytest.fixture(scope="module")
def artefact(one_block_model, tmp_path_factory):
    directory = exported(one_block_model, tmp_path_factory.mktemp("exported"), **SAMPLED)
    return directory, json.loads((directory / "card.json").read_text())


@functools.cache
def loaded(directory):
    """Returns the card, the weights and the two programs, as the example has them: it finds them compiled."""
    from jax import export
    from safetensors.numpy import load_file

    card = json.loads((directory / "card.json").read_text())
    prefill, decode = (export.deserialize((directory / f"{name}.jax").read_bytes()) for name in card["programs"])
    weights = jax.device_put(load_file(directory / "weights.safetensors"))
    return card, weights, jax.jit(prefill.call), jax.jit(decode.call, donate_argnums=3)


def run(directory, rows, key=0, **changed):
    """Returns new tokens, log-probabilities and counts of each row, which is padded with what is no token."""
    card, weights, prefill, decode = loaded(directory)
    options = {name: option["value"] for name, option in card["options"].items()} | changed
    options = {name: np.asarray(value, card["options"][name]["dtype"]) for name, value in options.items()}
    tokens = np.asarray([[*row, *[61] * (LONGEST - len(row))] for row in rows], np.int32)
    state = prefill(weights, tokens, np.asarray([len(row) for row in rows], np.int32))
    outputs = []
    for _ in range(0, NEW, card["steps"]):
        state, output = decode(weights, options, jax.random.key_data(jax.random.key(key)), state)
        outputs.append(output)
    assert np.all(state["done"])
    joined = (np.concatenate([output[name] for output in outputs], 1)[:, :NEW] for name in ("tokens", "logprobs"))
    return *joined, sum(output["counts"] for output in outputs)


def test_it_generates_where_this_library_cannot_be_imported(one_block_model, artefact):
    """By the example, greedily and with draws: the tokens of `generate` with the same key."""
    from mpt_eqx import generate

    prompt, directory = [5, 6, 7], artefact[0]
    calls = [["--set", "temperature=0"], ["--seed", str(KEY)]]
    out = python(
        "import runpy, sys\n"
        "class Blocked:\n"
        "    @staticmethod\n"
        "    def find_spec(name, *_):\n"
        "        if name.split('.')[0] in ('mpt_eqx', 'equinox', 'jaxtyping'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked)\n"
        "try: import mpt_eqx\n"
        "except ImportError as error: print(error)\n"
        f"for args in {calls}:\n"
        f"    sys.argv = ['run_exported.py', {str(directory)!r}, *'{' '.join(map(str, prompt))}'.split(), *args]\n"
        f"    runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
    )
    wanted = ["mpt_eqx"]
    for options in ({**SAMPLED, "temperature": 0.0}, {**SAMPLED, "key": jax.random.key(KEY)}):
        found = generate(one_block_model, [prompt] * 3, max_new_tokens=NEW, **options)
        wanted += [" ".join(map(str, row[:n])) for row, n in zip(found.tokens, found.lengths, strict=True)]
    assert out.splitlines() == wanted and len(set(wanted)) > 4


def test_rows_are_those_of_generate_and_options_are_inputs(one_block_model, artefact, prompts):
    """Of any lengths; a row ends where it ends in `generate`, and other options need no other program."""
    from mpt_eqx import generate

    rows = prompts(1, 4, LONGEST)
    for changed in ({}, {"temperature": 3.0, "top_p": 0.9, "repetition_penalty": 1.3, "max_new_tokens": 5}):
        options = {**SAMPLED, "max_new_tokens": NEW, **changed}
        wanted = generate(one_block_model, rows, key=jax.random.key(KEY), **options)
        tokens, logprobs, counts = run(artefact[0], rows, KEY, **changed)
        new = options["max_new_tokens"]
        np.testing.assert_array_equal(tokens[:, :new], wanted.tokens)
        np.testing.assert_array_equal(counts, wanted.lengths)
        np.testing.assert_allclose(logprobs[:, :new], wanted.logprobs, atol=1e-4)
        assert (tokens[:, new:] == SAMPLED["pad_token_id"]).all() and not logprobs[:, new:].any()


def test_what_is_not_valid_gives_nan_in_its_row_alone(artefact):
    """An id that the model does not have, and no token at all."""
    _, logprobs, _ = run(artefact[0], [[5, 61, 7], [5, 6, 7], []])
    assert np.isnan(logprobs).all(axis=1).tolist() == [True, False, True] and np.isfinite(logprobs[1]).all()


def test_the_programs_hold_no_weights_and_no_call_of_ours(one_block_model, artefact):
    """The card lists their inputs and outputs as they are, and the weights have a checkpoint's names."""
    from jax import export
    from safetensors.numpy import load_file

    directory, card = artefact
    assert card["platforms"] == ["cpu"] and card["jax"] == jax.__version__
    assert "six months" in card["compatibility"] and "three weeks" in card["compatibility"]
    weights = load_file(directory / "weights.safetensors")
    np.testing.assert_array_equal(weights["transformer.wte.weight"], one_block_model.wte.weight)
    for name, described in card["programs"].items():
        program = export.deserialize((directory / described["file"]).read_bytes())
        text = program.mlir_module()
        assert "mpt_eqx" not in "".join(described["custom_calls"]) and "@mpt_eqx" not in text
        assert max(map(len, text.splitlines())) < 10_000  # a line with a weight in it would be longer
        for listed, found in (("inputs", program.in_avals), ("outputs", program.out_avals)):
            shapes = [(tuple(one["shape"]), one["dtype"]) for one in described[listed]]
            assert shapes == [(x.shape, x.dtype.name) for x in found], name
        given = [one["name"].removeprefix("weights.") for one in described["inputs"]]
        assert [one for one in given if one in weights] == sorted(weights)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4", "adapters"])
def test_models_of_all_kinds_are_exported(one_block_model, prompts, tmp_path, kind):
    """Also for a platform that is not here."""
    from mpt_eqx import generate, lora, quantize

    model, rows = one_block_model, prompts(2, 3, 7)
    if kind == "bfloat16":
        model = jax.tree.map(lambda x: x.astype(kind), model)
    elif kind == "adapters":
        model = lora.add(model, rank=2, key=jax.random.key(1))
    else:
        model = quantize(model, kind)
    tokens, _, _ = run(exported(model, tmp_path, platforms=("cpu", "cuda")), rows)
    np.testing.assert_array_equal(tokens, generate(model, rows, max_new_tokens=NEW).tokens)
    calls = json.loads((tmp_path / "card.json").read_text())["programs"]["decode"]["custom_calls"]
    assert not any("mpt_eqx" in name or "cudnn" in name for name in calls)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt_length": 0}, "prompt_length: expected a whole number ≥ 1, found 0"),
        ({"batch_size": 1.5}, "batch_size: expected a whole number ≥ 1, found 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number ≥ 1, found 0"),
        ({"prompt_length": 250}, "prompt_length: 250 tokens and max_new_tokens=11 exceed max_seq_len=256; "),
        ({"platforms": "cpu"}, "platforms: expected some of cpu, cuda, rocm, tpu, in a list, found 'cpu'"),
        ({"platforms": ["gpu"]}, "platforms: expected some of cpu, cuda, rocm, tpu, in a list, found ['gpu']"),
        ({"top_p": 2}, "top_p: expected a number with 0 < top_p ≤ 1, found 2"),
        ({"topk": 2}, "topk: expected an option of export_model, found an unknown name; did you mean top_k"),
    ],
)
def test_arguments_that_are_not_valid(one_block_model, tmp_path, changed, message):
    from mpt_eqx import GenerationError, export_model

    with pytest.raises(GenerationError) as raised:
        export_model(one_block_model, tmp_path / "new", **{"prompt_length": 9, "max_new_tokens": NEW, **changed})
    assert str(raised.value).startswith(message) and not (tmp_path / "new").exists()


def test_models_on_a_mesh_and_missing_libraries(one_block_model, tmp_path, monkeypatch):
    from mpt_eqx import GenerationError, ShardingError, export_model, sharding

    sizes = {"prompt_length": 2, "max_new_tokens": 2}
    sharded = sharding.shard(one_block_model, sharding.make_mesh(fsdp=1, tp=1), sharding.FSDP_TP)
    with pytest.raises(ShardingError, match="expected one on a single device, found one on a mesh; load it without"):
        export_model(sharded, tmp_path, **sizes)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GenerationError, match=r"flatbuffers library; install it with pip install 'mpt_eqx\[export\]'"):
        export_model(one_block_model, tmp_path, **sizes)


def test_a_directory_that_cannot_be_written(one_block_model, artefact, tmp_path, monkeypatch):
    """No card is left of what was there, so that nothing runs two halves."""
    from mpt_eqx import CheckpointError
    from mpt_eqx.generation import export

    monkeypatch.setattr(export, "_programs", lambda *_: {})
    monkeypatch.setattr(export, "_card", lambda *_: {})
    (tmp_path / "card.json").write_text("{}")
    (tmp_path / "weights.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="weights.safetensors: expected a file to replace, or nothing, "):
        exported(one_block_model, tmp_path)
    assert not (tmp_path / "card.json").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.*"):
        exported(one_block_model, tmp_path / "file")
