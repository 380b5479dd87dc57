"""lm-evaluation-harness: the numbers of its model for transformers, in any batch and order, and the command `eval`."""

import importlib
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from command import run
from conftest import some
from harness import GOLDEN, SETTINGS, TASKS, numbers, write_tasks


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    from mpt_eqx import MPTError

    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval" or "mpt_eqx.lm_eval" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MPTError, match=r"needed for its tasks; install it with pip install 'mpt_eqx\[eval\]'"):
        importlib.import_module("mpt_eqx.lm_eval")
    done = run("eval", "--tasks", "choices")
    assert done.returncode == 1 and "mpt_eqx[eval]" in done.stderr


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """The tasks of these tests, offline."""
    room = tmp_path_factory.mktemp("harness")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_DATASETS_CACHE": str(room / "cache"), "HF_DATASETS_OFFLINE": "1"}.items():
            patch.setenv(name, value)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        pytest.importorskip("lm_eval")
        from lm_eval.tasks import TaskManager

        yield TaskManager(include_path=str(write_tasks(room / "tasks")), include_defaults=False)


@pytest.fixture(scope="module")
def make(manager, one_layer):
    """Returns a model of one layer as the harness makes it."""
    from lm_eval.api.registry import get_model

    import mpt_eqx.lm_eval  # noqa: F401

    loaded = {}

    def make(batch_size=8, device="cuda:0", **given):
        key = repr((batch_size, device, given))
        if key not in loaded:
            given = {"pretrained": str(one_layer), "dtype": "float32", "max_length": 128} | given
            args = {"batch_size": batch_size, "max_batch_size": None, "device": device}
            loaded[key] = get_model("mpt-eqx").create_from_arg_obj(given, args)
        return loaded[key]

    return make


def requests(*args):
    return [SimpleNamespace(args=each) for each in args]


@pytest.mark.parametrize("name", some(SETTINGS, ["truncated"]))
def test_answers_are_those_of_the_harness_through_transformers(manager, name):
    """Choices of several tokens, long texts, and generated ones; with prompts that fit, and that are cut."""
    import lm_eval

    import mpt_eqx.lm_eval  # noqa: F401
    from mpt_eqx import SHIPPED_MODEL

    expected = json.loads((GOLDEN / "expected.json").read_text())[name]
    given = {"pretrained": str(SHIPPED_MODEL), "dtype": "float32", "max_length": SETTINGS[name]["max_length"]}
    results = lm_eval.simple_evaluate(
        model="mpt-eqx", model_args=given, tasks=list(TASKS), num_fewshot=SETTINGS[name]["num_fewshot"],
        task_manager=manager, batch_size=7, device="cuda:0", bootstrap_iters=0,
    )  # fmt: skip
    found = numbers(results)
    assert found["metrics"]["choices"] == expected["metrics"]["choices"]
    assert found["metrics"]["questions"] == expected["metrics"]["questions"]
    assert found["metrics"]["texts"] == pytest.approx(expected["metrics"]["texts"], rel=1e-5)
    for (total, greedy), (wanted, wanted_greedy) in zip(
        found["answers"]["choices"], expected["answers"]["choices"], strict=True
    ):
        assert total == pytest.approx(wanted, abs=1e-3) and greedy == wanted_greedy
    np.testing.assert_allclose(found["answers"]["texts"], expected["answers"]["texts"], atol=1e-3, rtol=0)
    assert found["answers"]["questions"] == expected["answers"]["questions"]
    assert results["config"]["model_num_parameters"] == 3443136 and results["config"]["model_dtype"] == "float32"


def documents(name):
    return [json.loads(line)["text"] for line in (GOLDEN / f"{name}.jsonl").read_text().splitlines()]


def test_neither_batch_size_nor_order_changes_a_bit(make):
    pairs = [(text, f" {choice}") for text in documents("choices")[:6] for choice in ("is called.", "no", "the last.")]
    texts = [(text,) for text in documents("texts")]
    options = {"until": ["."], "max_gen_toks": 8}
    drawn = {**options, "do_sample": True, "temperature": 0.9, "top_k": 50}
    asked = documents("questions")[:7]
    prompts = [(text, options) for text in asked] + [(text, drawn) for text in [asked[0], *asked[:6]]]

    def answers(lm, seed=None):
        def shuffled(ask, args):
            order = list(range(len(args)))
            if seed is not None:
                random.Random(seed).shuffle(order)
            found = dict(zip(order, ask(requests(*(args[i] for i in order)), disable_tqdm=True), strict=True))
            return [found[i] for i in range(len(args))]

        generated = shuffled(lm.generate_until, prompts)
        generated[7:9] = sorted(generated[7:9])  # of equal requests, the one that comes first gets the first draw
        return shuffled(lm.loglikelihood, pairs), shuffled(lm.loglikelihood_rolling, texts), generated

    first = answers(make(1))
    assert len(set(first[2][7:9])) == 2
    for batch_size, seed in ((7, None), (32, 1)):
        assert answers(make(batch_size), seed) == first


def test_contexts(make):
    """None, one that ends with spaces, one that is cut on the left, and one for which there is no room at all."""
    from mpt_eqx import score

    lm = make()
    encode = lm.tokenizer.encode

    def expected(row, n):
        (found,) = score(lm.model, [row], prefix_lengths=[len(row) - n])
        return found.total, bool(found.is_greedy.all())

    def found(*pairs):
        return lm.loglikelihood(requests(*pairs), disable_tqdm=True)

    word = encode("Return the value")
    assert found(("", "Return the value")) == [expected([0, *word], len(word))]
    assert found(("", "<|endoftext|>Return the value")) == [expected([0, *word], len(word))]
    assert found(("Return  ", "the")) == found(("Return", "  the"))
    whole = encode("Return the value")
    assert found(("Return", " the value")) == [expected(whole, len(whole) - len(encode("Return")))]
    long = encode("a b c d e f g h " * 40)
    assert len(long) > 300
    ends = encode("a b c d e f g h " * 40 + "the end")
    n = len(ends) - len(encode("a b c d e f g h " * 40))
    assert found(("a b c d e f g h " * 40, "the end"))[0] == pytest.approx(expected(ends[-129:], n + 1), abs=50)
    text = lm.tokenizer.decode(long[:128])
    assert encode(text) == long[:128]
    assert found(("", text)) == [expected([0, *long[:128]], 128)]


def test_a_text_is_scored_in_windows_that_predict_each_token_once(make):
    from mpt_eqx import score

    lm = make()
    tokens = [0, *lm.tokenizer.encode("a b c d e f g h " * 40)]
    assert len(tokens) > 300
    rows, at = [], 1
    while at < len(tokens):
        end = min(at + 128, len(tokens))
        rows.append((tokens[max(end - 129, 0) : end], end - at))
        at = end
    scores = score(lm.model, [row for row, _ in rows], prefix_lengths=[len(row) - n for row, n in rows])
    found = lm.loglikelihood_rolling(requests(("a b c d e f g h " * 40,), ("",)), disable_tqdm=True)
    assert found == [sum(each.total for each in scores), 0.0]


def test_texts_end_at_stop_strings_across_tokens(make):
    """At the one that comes first, and that the harness cuts at; without any, after as many tokens as it says."""
    from mpt_eqx import generate

    lm = make(1)

    def likeliest(tokens):
        found = generate(lm.model, tokens, max_new_tokens=8, eos_token_ids=[0], vocab_size=4096)
        return found.tokens[0, : found.lengths[0]].tolist()

    def found(prompt="If", **options):
        return lm.generate_until(requests((prompt, options)), disable_tqdm=True)[0]

    whole = likeliest(lm.tokenizer.encode("If"))
    text, before = lm.tokenizer.decode(whole), lm.tokenizer.decode(whole[:3])
    across = text[len(before) - 1 : len(before) + 1]  # the end of the third token, and the beginning of the next
    assert text.index(across) == len(before) - 1
    assert found(until=[across, "never"], max_gen_toks=8) == text[: text.index(across)]
    assert found(until=across, max_new_tokens=8) == text[: text.index(across)]
    assert found(max_gen_toks=8) == text == found(until=[""], max_tokens=8, temperature=0.0)
    assert found("", max_gen_toks=8) == lm.tokenizer.decode(likeliest([0]))
    cut = lm.tokenizer.encode("x " * 200)[-(128 - 8) :]
    assert found("x " * 200, max_gen_toks=8) == lm.tokenizer.decode(likeliest(cut))


@pytest.mark.parametrize(
    ("ask", "args", "message"),
    [
        ("loglikelihood", ("Return", ""), r"continuation of 1 to max_length=128 tokens, found 0 in \('Return', ''\)"),
        ("loglikelihood", ("a", " b c" * 90), "expected a continuation of 1 to max_length=128 tokens, found 1"),
        ("generate_until", ("a", {"max_gen_toks": 128}), "max_gen_toks: expected less than max_length=128, .* 128"),
        ("generate_until", ("a", {"num_beams": 2}), "generation_kwargs: expected some of until, .*, found num_beams"),
        ("generate_until", ("a", {"do_sample": True}), "a temperature above 0 with do_sample, found none"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_answered_is_an_error(make, ask, args, message):
    from mpt_eqx import GenerationError

    with pytest.raises(GenerationError, match=message):
        getattr(make(), ask)(requests(args), disable_tqdm=True)


def test_chat_templates(make, one_layer):
    messages = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "The answer is "}]
    chatml = make(chat_template="chatml")
    assert chatml.apply_chat_template(messages[:1]) == "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n"
    # A beginning of the answer is continued.
    assert chatml.apply_chat_template(messages, add_generation_prompt=False) == (
        "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\nThe answer is "
    )
    own = make()
    assert own.apply_chat_template(messages[:1]) == " Hi "
    assert own.chat_template(True) == json.loads((one_layer / "tokenizer_config.json").read_text())["chat_template"]
    assert own.chat_template(False) is None and own.tokenizer_name == str(one_layer).replace("/", "__")
    assert "<|im_start|>" in chatml.chat_template("chatml")
    only_user = make(chat_template="{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
                     "{% for m in messages %}{{ m.content | trim }};{% endfor %}")  # fmt: skip
    system = {"role": "system", "content": "Be brief."}
    assert only_user.apply_chat_template([system, *messages]) == "Hi;The answer is;"
    assert only_user.apply_chat_template(messages, add_generation_prompt=False) == "Hi;The answer is"


def test_chat_templates_that_do_not_fit_are_errors(make):
    from mpt_eqx import MPTError

    with pytest.raises(MPTError, match="expected the one that the model was made with, None, found 'chatml'; give the"):
        make().chat_template("chatml")
    refuses = make(chat_template="{{ raise_exception('no') }}")
    with pytest.raises(MPTError, match="no"):
        refuses.apply_chat_template([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    with pytest.raises(MPTError, match="chat_template: expected it to write the last message, .*, found none"):
        make(chat_template="{{ 'nothing' }}").apply_chat_template([{"role": "user", "content": "y"}], False)


def test_what_begins_a_text(make):
    """The tokenizer's own habits, or that token before each text, once."""
    plain, with_bos = make(), make(add_bos_token=True)
    ids = plain.tokenizer.encode("Return")
    assert plain.tok_encode("Return") == ids and with_bos.tok_encode("Return") == [0, *ids]
    assert with_bos.tok_encode("<|endoftext|>Return") == [0, *ids]
    assert with_bos.tok_encode("Return", add_special_tokens=False) == ids
    assert make(prefix_token_id=7).prefix_token_id == 7 and plain.prefix_token_id == plain.eot_token_id == 0


def test_models_are_made_as_model_args_say(make, one_layer, tmp_path):
    import jax

    from mpt_eqx import from_pretrained, lora
    from mpt_eqx.lm_eval import MPTLM
    from mpt_eqx.text import load_tokenizer

    model = from_pretrained(one_layer)
    assert MPTLM(model, tokenizer=load_tokenizer(one_layer)).max_length == 1024
    assert make(max_length=4096).model.config.max_seq_len == 4096  # ALiBi goes on
    assert make(dtype="auto", device="cpu", trust_remote_code=True).model.wte.weight.dtype == "bfloat16"
    assert make("auto:4").batch_size == "auto" and make("3").batch_size == 3
    adapted = lora.add(model, rank=2, key=jax.random.key(0))
    lora.save(adapted, tmp_path)
    small = make(quantize="int8", peft=str(tmp_path))
    total = make().loglikelihood(requests(("a", " b")), disable_tqdm=True)[0][0]
    assert small.loglikelihood(requests(("a", " b")), disable_tqdm=True)[0][0] == pytest.approx(total, abs=0.2)
    assert type(small.model.blocks[0].attn.Wqkv).__name__ != type(model.blocks[0].attn.Wqkv).__name__


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": "many"}, 'batch_size: expected a whole number ≥ 1 or "auto", found \'many\''),
        ({"batch_size": 0}, "batch_size: expected a whole number ≥ 1 or"),
        ({"device": "tpu:1"}, "device: expected cpu:0, or cuda:0 for JAX's default, found 'tpu:1'"),
        ({"device": "cpu:7"}, "device: expected cpu:0"),
        ({"max_length": 0}, "max_length: expected a whole number ≥ 1, found 0"),
        ({"max_gen_toks": 0}, "max_gen_toks: expected a whole number ≥ 1, found 0"),
        ({"parallelize": True}, "model_args: expected some of pretrained, tokenizer, .*, found parallelize"),
        ({"pretrained": "model"}, "tokenizer: expected one beside a model, found none; give its checkpoint"),
        ({"pretrained": "model", "tokenizer": "its", "max_length": 2048}, "at most the model's max_seq_len=1024"),
        ({"tokenizer": "endless"}, "prefix_token_id: expected the id that begins a text, found no end-of-text token"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_an_error(make, one_layer, given, message):
    from mpt_eqx import GenerationError
    from mpt_eqx.lm_eval import MPTLM

    lm = make()
    known = {"model": lm.model, "its": lm.tokenizer, "endless": SimpleNamespace(eos_token_ids=(), bos_token_id=None)}
    given = {name: known.get(value, value) if isinstance(value, str) else value for name, value in given.items()}
    with (
        mock.patch("mpt_eqx.lm_eval.model.load_tokenizer", lambda source: source),
        pytest.raises(GenerationError, match=message),
    ):
        MPTLM(**{"pretrained": str(one_layer), **given})


def test_what_is_cached_is_not_computed_again(make, tmp_path, monkeypatch):
    """And what was computed before an end in the middle is in the cache."""
    from lm_eval.api.model import CachingLM

    from mpt_eqx.lm_eval import model

    lm = make(1, max_length=8)
    pairs = requests(*((text, " is not") for text in documents("choices")[:4]))
    expected = lm.loglikelihood(pairs, disable_tqdm=True)
    calls = []

    def failing(*args, original=model.score, **kwargs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(model, "score", failing)
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    with pytest.raises(KeyboardInterrupt):
        cached.loglikelihood(pairs)
    kept = len(cached.dbdict)
    assert 0 < kept < 4
    monkeypatch.undo()
    assert cached.loglikelihood(pairs) == expected and len(cached.dbdict) == 4
    monkeypatch.setattr(model, "score", failing)
    assert cached.loglikelihood(pairs) == expected
    lm.set_cache_hook(mock.Mock())


def test_the_command(manager, one_layer, tmp_path):
    """Its table on stdout, the harness's files, few-shot examples, a chat template and a cache."""
    asked = ("eval", "--model", one_layer, "--tasks", "choices,questions", "--include-path", manager.include_path)
    more = (
        "--limit",
        1,
        "--num-fewshot",
        1,
        "--batch-size",
        1,
        "--dtype",
        "float32",
        "--template",
        "chatml",
        "--system",
        "Be brief.",
    )
    done = run(*asked, *more, "--output", tmp_path, "--cache", tmp_path / "answers", "--no-compile-cache")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| ") and "exact_match" in done.stdout and "bootstrapping" not in done.stdout
    files = {path.name.split("_20")[0] for path in tmp_path.rglob("*.json*")}
    assert files == {"results", "samples_choices", "samples_questions"}
    results = json.loads(next(tmp_path.rglob("results*.json")).read_text())
    assert results["results"]["choices"]["acc,none"] in (0.0, 1.0)
    assert (
        results["config"]["model_args"]["pretrained"] == str(one_layer) and "<|im_start|>" in results["chat_template"]
    )
    sample = json.loads(next(tmp_path.rglob("samples_choices*")).read_text().splitlines()[0])
    assert sample["arguments"]["gen_args_0"]["arg_0"].startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert list(tmp_path.glob("answers*.db"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks", "choices,nothing"], "--tasks: expected names of tasks, found nothing; python -m mpt_eqx.lm_eval"),
        (["--tasks", ","], "--tasks: expected names of tasks, found none"),
        (["--tasks", "choices", "--include-path", "nowhere"], "--include-path: expected a directory, found none at"),
        (["--tasks", "choices", "--output", "file"], "--output: expected a directory, found none at "),
    ],
)  # fmt: skip
def test_what_the_command_cannot_do_is_an_error(manager, args, message, tmp_path, monkeypatch):
    import lm_eval.tasks

    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **given: real(**{**given, "include_defaults": False}))
    done = run("eval", "--include-path", manager.include_path, *args)
    assert done.returncode == 1 and message in done.stderr and not done.stdout


def test_files_that_the_harness_could_not_write_are_an_error(manager, one_layer, tmp_path, monkeypatch):
    """It would only log that, at the end."""
    from lm_eval.loggers import EvaluationTracker

    monkeypatch.setattr(EvaluationTracker, "save_results_samples", lambda *args, **kwargs: None)
    asked = ("eval", "--model", one_layer, "--tasks", "choices", "--include-path", manager.include_path)
    done = run(*asked, "--limit", 1, "--output", tmp_path, "--no-compile-cache")
    assert done.returncode == 1 and "--output: expected 2 files" in done.stderr and "found 1 written" in done.stderr


def test_the_harness_s_own_command_line_knows_the_model(manager, capsys, monkeypatch):
    """Where it asks entry points, and where `python -m mpt_eqx.lm_eval` starts it."""
    import tomllib

    from lm_eval.api.registry import get_model

    from mpt_eqx.lm_eval import MPTLM, __main__

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert get_model("mpt-eqx") is MPTLM
    assert project["entry-points"]["lm_eval.models"] == {"mpt-eqx": f"{MPTLM.__module__}:{MPTLM.__name__}"}
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--help"])
    monkeypatch.setenv("DISABLE_MULTIPROC", "")
    with pytest.raises(SystemExit, match="0"):
        __main__.main()
    assert "lm-eval run" in capsys.readouterr().out


@pytest.mark.slow
def test_the_harness_s_own_command_line_runs_the_model(manager, one_layer, tmp_path):
    """With all its own tasks, which takes it a while to find."""
    import os
    import subprocess

    from command import environment

    model = f"pretrained={one_layer},dtype=float32,max_length=128"
    command = [sys.executable, "-m", "mpt_eqx.lm_eval", "run", "--model", "mpt-eqx", "--model_args", model]
    more = [
        "--tasks",
        "choices",
        "--include_path",
        manager.include_path,
        "--limit",
        "2",
        "--output_path",
        str(tmp_path),
    ]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": os.environ["HF_DATASETS_CACHE"]}
    done = subprocess.run(
        [*command, *more], capture_output=True, text=True, env={**environment(), **offline}, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert "|choices|" in done.stdout and list(tmp_path.rglob("results*.json"))
