"""Many prompts, many scores and long texts from the command line."""

import json
import math

import numpy as np
import pytest
from command import run
from conftest import is_long


@pytest.fixture
def written(tmp_path):
    """A function that writes a JSONL file of objects and returns its path."""

    def write(*records, name="in.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


PROMPTS = [
    {"prompt": text, "id": number} for number, text in enumerate(("Return a list of", "The zip() function", "x"))
]


@pytest.fixture(scope="module")
def sampled(one_layer):
    """The arguments of a call that draws, in two batches."""
    sampling = ("--no-defaults", "--temperature", 0.9, "--seed", 7)
    return ("--model", one_layer, "--max-new-tokens", 9, "--dtype", "float32", *sampling)


def test_each_prompt_of_a_file_gets_what_it_gets_alone(one_layer, sampled, written, tmp_path):
    """In order, in batches of any size (of two in `just test`), with the key of its place; its other keys stay."""
    import jax

    from mpt_eqx import from_pretrained, generate
    from mpt_eqx.text import load_tokenizer

    path = written(*PROMPTS)
    done = run("generate", "--input", path, "--batch-size", 2, *sampled)
    assert done.returncode == 0, done.stderr
    model, tokenizer = from_pretrained(one_layer, dtype="float32"), load_tokenizer(one_layer)
    for number, (record, found) in enumerate(zip(PROMPTS, lines_of(done.stdout), strict=True)):
        prompt = tokenizer.encode(record["prompt"])
        result = generate(
            model, [prompt], max_new_tokens=9, temperature=0.9, eos_token_ids=tokenizer.eos_token_ids,
            key=jax.random.fold_in(jax.random.key(7), number)[None],
        )  # fmt: skip
        tokens = result.tokens[0, : result.lengths[0]].tolist()
        text = tokenizer.decode(tokens, prompt=prompt)
        assert found == {**record, "text": text, "tokens": tokens, "finish_reason": result.finish_reasons[0]}
    if is_long():
        assert done.stdout == run("generate", "--input", path, "--batch-size", 3, *sampled).stdout


def test_the_first_line_is_what_a_lone_prompt_gets(sampled, written):
    """Also with a stop string, which ends its text and its tokens, and the call when all rows have one."""
    alone = json.loads(run("generate", PROMPTS[0]["prompt"], "--json", *sampled).stdout)
    stop = alone["text"][2:5]
    for more in ((), ("--stop", stop)):
        alone = json.loads(run("generate", PROMPTS[0]["prompt"], "--json", *sampled, *more).stdout)
        (line,) = lines_of(run("generate", "--input", written(PROMPTS[0]), *sampled, *more).stdout)
        assert line == {**alone, "id": 0}


def test_a_run_that_was_cut_off_goes_on(sampled, written, tmp_path):
    """The lines that are there stay; a torn one is written anew."""
    path, output = written(*PROMPTS), tmp_path / "out.jsonl"
    options = ("--input", path, "--output", output, "--batch-size", 1, *sampled)
    assert run("generate", *options).returncode == 0
    whole = output.read_bytes()
    second = len(b"".join(whole.splitlines(keepends=True)[:2]))
    output.write_bytes(whole[: second - 5])
    done = run("generate", *options)
    assert (
        done.returncode == 1 and "--output: expected no file, found" in done.stderr and "--resume goes" in done.stderr
    )
    assert run("generate", *options, "--resume").returncode == 0
    assert output.read_bytes() == whole
    assert run("generate", *options, "--resume").returncode == 0  # nothing is left
    assert output.read_bytes() == whole


def test_ctrl_c_keeps_what_is_written(sampled, written, tmp_path, monkeypatch):
    from mpt_eqx import Interrupted, generation

    generate, calls = generation.generate, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted(None)
        return generate(*args, **kwargs)

    monkeypatch.setattr(generation, "generate", interrupted)
    output = tmp_path / "out.jsonl"
    done = run("generate", "--input", written(*PROMPTS), "--output", output, "--batch-size", 2, *sampled)
    assert done.returncode == 130
    assert done.stderr.endswith("2 of 3 lines are written; --resume goes on\n")
    assert len(lines_of(output.read_text())) == 2


PAIRS = [
    {"prompt": "The zip() function", "continuation": " returns an iterator"},
    {"prompt": "The zip() function ", "continuation": "returns an iterator", "id": "the space is the continuation's"},
    {"prompt": "", "continuation": "def f"},
]


def test_scores_are_those_of_score(one_layer, written, tmp_path):
    from mpt_eqx import from_pretrained, score
    from mpt_eqx.text import load_tokenizer

    output = tmp_path / "scores.jsonl"
    done = run("score", written(*PAIRS), "--model", one_layer, "--output", output)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    model, tokenizer = from_pretrained(one_layer), load_tokenizer(one_layer)
    found = lines_of(output.read_text())
    for record, line in zip(PAIRS, found, strict=True):
        tokens = tokenizer.encode(record["prompt"] + record["continuation"])
        given = len(tokenizer.encode(record["prompt"].rstrip()))
        if not given:
            tokens, given = [0, *tokens], 1  # <|endoftext|>
        (expected,) = score(model, [tokens], prefix_lengths=[given])
        assert line == {
            **record, "tokens": tokens[given:], "logprobs": expected.logprobs.tolist(),
            "is_greedy": expected.is_greedy.tolist(), "total": expected.total,
        }  # fmt: skip
    assert found[0]["total"] == found[1]["total"]
    other = run("score", written(PAIRS[2]), "--model", one_layer, "--prefix-token", 5)
    assert lines_of(other.stdout)[0]["total"] != found[2]["total"]


@pytest.mark.parametrize(
    ("command", "records", "args", "message"),
    [
        ("generate", [{"prompt": 5}], (), "in.jsonl, line 1: expected a text as 'prompt', found int"),
        ("generate", [{"prompt": "x"}, {"text": "x"}], (), "line 2: expected a text as 'prompt', found no such key"),
        ("generate", [{"prompt": "x", "text": ""}], (), "line 1: 'text' is a key of the answer; rename it"),
        ("generate", [{"prompt": "x"}, {"prompt": ""}], (), "line 2: prompts[0]: expected at least one token"),
        ("generate", [{"prompt": "x" * 9000}], (), "line 1: prompts[0]: "),
        ("generate", [{"prompt": "\ud800"}], (), "line 1: text: expected"),
        ("generate", [], (), "in.jsonl: expected at least one line, found none"),
        ("generate", [{"prompt": "x"}], ("y",), "--input: expected neither PROMPT nor --json with it, found one"),
        ("generate", [{"prompt": "x"}], ("--resume",), "--resume: expected --output FILE, which it goes on with"),
        ("score", [{"prompt": "x", "continuation": ""}], (), "line 1: continuation: expected some text, found none"),
        ("score", [{"prompt": "", "continuation": "x y" * 2000}], (), "line 1: sequences[0]: expected at most max_seq"),
        ("score", [{"prompt": "", "continuation": "x"}], ("--prefix-token", 4096), "expected token ids from 0 to 4095"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_anything_is_written(
    command, records, args, message, written, tmp_path, one_layer
):
    path, output = written(*records), tmp_path / "out.jsonl"
    given = ("--input", path) if command == "generate" else (path,)
    where = () if "--resume" in args else ("--output", output)
    done = run(command, *given, *where, "--model", one_layer, *args)
    assert done.returncode == 1 and message in done.stderr and not output.exists(), done.stderr


@pytest.mark.parametrize(
    "content", [b'{"prompt": "other", "text": ""}\n', b"no line of ours", b"\x00\xff\n{", b"[1]\n"]
)
def test_another_files_answers_are_not_gone_on_with(sampled, written, tmp_path, content):
    """The file stays as it is, also where it has no end of a line."""
    output, before = tmp_path / "out.jsonl", content
    output.write_bytes(content)
    done = run("generate", "--input", written(*PROMPTS), "--output", output, "--resume", *sampled)
    assert done.returncode == 1 and output.read_bytes() == before
    assert "out.jsonl, line 1: expected the answer to line 1 of the input, found something else" in done.stderr
    done = run("generate", "x", "--output", output)
    assert done.returncode == 1 and "--output, --resume: expected --input FILE with them, found none" in done.stderr


# Long texts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_config):
    import jax

    from mpt_eqx import MPT, InitConfig

    return MPT(tiny_config(n_layers=1, max_seq_len=32, init_config=InitConfig(emb_init_std=0.5)), key=jax.random.key(0))


@pytest.mark.parametrize(
    ("count", "length", "stride", "spans"),
    [
        (5, 8, 4, [(0, 5)]),
        (8, 8, 4, [(0, 8)]),
        (9, 8, 4, [(0, 8), (8, 9)]),
        (20, 8, 8, [(0, 8), (8, 16), (16, 20)]),
        (15, 8, 3, [(0, 8), (8, 11), (11, 14), (14, 15)]),
    ],
)
def test_windows(count, length, stride, spans):
    from mpt_eqx.evaluation.perplexity import spans as found

    assert found(count, length, stride) == spans


@pytest.mark.parametrize(("length", "stride"), [(None, None), (32, 32), (8, 1)])
def test_each_token_is_scored_once_given_the_window_before_it(model, prompts, length, stride):
    """By a call of the whole model for each token, with what it does not see behind it."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    from mpt_eqx import perplexity

    (tokens,) = prompts(75)
    result = perplexity(model, tokens, prefix_token=3, length=length, stride=stride)
    assert len(result.logprobs) == len(result.contexts) == 75
    text, most, least = [3, *tokens], length or 32, (length or 32) - (stride or 16)
    assert result.contexts.max() == most and (result.contexts[most:] > least).all()
    whole = eqx.filter_jit(lambda model, tokens: jax.nn.log_softmax(model(tokens, logits_dtype="float32")))
    for place, context in [*enumerate(result.contexts)][::7]:
        seen = text[place + 1 - context : place + 1]
        expected = whole(model, jnp.asarray(seen + [0] * (32 - len(seen))))[len(seen) - 1, tokens[place]]
        np.testing.assert_allclose(result.logprobs[place], expected, atol=2e-5)
    assert result.nats == pytest.approx(-result.logprobs.sum(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nats / 75))


def test_the_curve_is_the_mean_over_groups_of_contexts():
    from mpt_eqx import Perplexity

    result = Perplexity(-np.arange(6, dtype=np.float32), np.asarray([1, 2, 3, 3, 2, 1]))
    assert result.curve(3) == [(1, 2.5), (2, 2.5), (3, 2.5)]
    assert len(result.curve()) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": []}, "tokens: expected at least one, found none"),
        ({"length": 33}, "length: expected at most max_seq_len=32, found 33"),
        ({"length": 0}, "length: expected a whole number ≥ 1, found 0"),
        ({"length": 8, "stride": 9}, "stride: expected at most length=8, found 9"),
        ({"stride": 1.5}, "stride: expected a whole number ≥ 1, found 1.5"),
        ({"prefix_token": 61}, "prefix_token: expected token ids from 0 to 60, found 61"),
    ],
)
def test_bad_arguments_of_perplexity(model, arguments, message):
    from mpt_eqx import GenerationError, perplexity

    with pytest.raises(GenerationError, match=message):
        perplexity(model, **{"tokens": [1, 2], "prefix_token": 0, **arguments})


def test_the_perplexity_of_a_file(one_layer, tmp_path):
    """Per token and per byte, the same from stdin; the picture is drawn."""
    from mpt_eqx import from_pretrained, perplexity
    from mpt_eqx.text import load_tokenizer

    text = "The zip() function returns an iterator – of tuples.\n" * 3
    (tmp_path / "text.txt").write_text(text)
    options = ("--model", one_layer, "--length", 16, "--stride", 16, "--json")
    done = run("perplexity", tmp_path / "text.txt", *options, "--plot", tmp_path / "curve.png")
    assert done.returncode == 0, done.stderr
    tokens = load_tokenizer(one_layer).encode(text)
    expected = perplexity(from_pretrained(one_layer), tokens, prefix_token=0, length=16, stride=16)
    found = json.loads(done.stdout)
    assert found["tokens"] == len(tokens) and found["bytes"] == len(text.encode()) != len(text)
    assert found["nats_per_token"] == pytest.approx(expected.nats / len(tokens))
    assert found["bits_per_byte"] == pytest.approx(expected.nats / len(text.encode()) / math.log(2))
    assert found["curve"] == [list(point) for point in expected.curve()]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert run("perplexity", *options, stdin=text).stdout == done.stdout
    table = run("perplexity", *options[:-1], stdin=text).stdout
    assert f"perplexity{expected.perplexity:>20.4f}\n" in table


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("none.txt",), "none.txt: expected a text file, found none that can be read"),
        (("empty.txt",), "empty.txt: expected some text, found none"),
        (("latin.txt",), "latin.txt: expected text in UTF-8, found the byte 0xe9 at 3; convert it"),
        (("text.txt", "--plot", "curve.pdf"), "--plot: expected a name that ends in .png, found curve.pdf"),
        (("text.txt", "--plot", "none/curve.png"), "--plot: expected a directory for the picture, found none at"),
        (("text.txt", "--stride", 2000), "stride: expected at most length=1024, found 2000"),
    ],
)
def test_bad_arguments_of_the_command(args, message, tmp_path, monkeypatch, one_layer):
    monkeypatch.chdir(tmp_path)
    for name, content in (("empty.txt", b""), ("latin.txt", b"caf\xe9"), ("text.txt", b"x")):
        (tmp_path / name).write_bytes(content)
    done = run("perplexity", *args, "--model", one_layer)
    assert done.returncode == 1 and message in done.stderr, done.stderr


def test_a_picture_needs_its_extra(monkeypatch, one_layer):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("perplexity", "x", "--plot", "curve.png", "--model", one_layer)
    assert done.returncode == 1 and "--plot needs the extra plot: pip install 'mpt_eqx[plot]'" in done.stderr
