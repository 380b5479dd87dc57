"""`mpt-eqx train` and the loop behind it: resumed to the bit, dry runs, adapters, logs, and what ends a run."""

import json
import os
import re
import signal

import equinox as eqx
import jax
import numpy as np
import pytest
from command import run
from safetensors.numpy import load_file

TINY = {
    "d_model": 8,
    "n_heads": 1,
    "n_layers": 1,
    "vocab_size": 4096,
    "max_seq_len": 32,
    "attn_config": {"alibi": True},
}


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A directory with texts, questions, and the configuration of a tiny model, in which commands run."""
    monkeypatch.chdir(tmp_path)
    texts = [{"text": f"The function number {i} returns {i} things."} for i in range(9)]
    questions = [{"instruction": f"What is {i}?", "output": f"It is {i}."} for i in range(4)]
    for name, records in (("texts", texts), ("questions", questions)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "tiny.json").write_text(json.dumps({"model_type": "mpt", **TINY}))
    return tmp_path


def train(output, *args, data="texts.jsonl", new="tiny.json"):
    new = () if new is None else ("--new", new)
    return run("train", *new, "--data", data, "--output", output, "--batch-size", 2, "--length", 16, *args)


def log_of(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def untimed(lines):
    return [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in lines]


def stop_at(step, monkeypatch):
    """Sends SIGTERM before that step, which is still done."""
    from mpt_eqx.cli._train_log import Log

    write = Log.__call__

    def stopping(log, record):
        write(log, record)
        if record["step"] == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Log, "__call__", stopping)


def test_a_run_that_was_stopped_goes_on_to_the_bit(room, monkeypatch):
    options = ("--steps", 6, "--learning-rate", 1e-2, "--accumulate", 2, "--eval-data", "texts.jsonl")
    whole = train("whole", *options)
    assert (whole.returncode, whole.stdout) == (0, "whole/model\n"), whole.stderr
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        stopped = train("parts", *options)
    assert stopped.returncode == 0 and stopped.stdout == ""
    assert "stopped and saved after step 3 of 6; the same command goes on" in stopped.stderr
    assert not (room / "parts" / "model").exists()
    assert train("parts", *options).returncode == 0
    for name in ("model/model.safetensors", "model/tokenizer.json", "states/step-00000006/arrays.safetensors"):
        assert (room / "parts" / name).read_bytes() == (room / "whole" / name).read_bytes(), name
    lines = log_of(room / "parts")
    assert untimed(lines) == untimed(log_of(room / "whole"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[-1]["eval_loss"] < lines[0]["eval_loss"]
    assert (room / "parts" / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_a_log_loses_the_steps_that_are_done_again(tmp_path):
    from mpt_eqx.cli._train_log import Log

    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = Log(tmp_path, 4)
    log({"step": 3, "loss": 1.0})
    log.close()
    assert log.lines() == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_a_dry_run_reads_no_weights_and_writes_nothing(room, one_layer, monkeypatch):
    from mpt_eqx import MPT, MPTConfig, lora
    from mpt_eqx.train import count_step_flops

    def refuse(*args, **options):
        raise AssertionError("it loads weights")

    monkeypatch.setattr("mpt_eqx.from_pretrained", refuse)
    done = train("run", "--dry-run", "--steps", 5, "--model", one_layer, "--lora", 2, new=None)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["weights"] == "1,536 trained of 1,230,912"
    assert lines["steps"].startswith("5 of 2 rows, ") and lines["steps"].endswith(", 160 tokens")
    assert lines["rate"] == "0.0002 after 0 steps, then linear to 0"
    key = jax.random.key(0)
    adapted = lora.add(MPT(MPTConfig.from_json_file(one_layer / "config.json"), key=key), rank=2, key=key)
    operations = 2 * count_step_flops(adapted, 16, trainable=lora.trainable)
    assert lines["operations"] == f"{operations:.3g} in a step"
    assert lines["memory"].startswith("2.5 MB of state (2.5 MB of weights) and ")
    assert re.match(
        r"\S+ s a step and \S+ s in all, if all of it ran at the \S+ operations per second of", lines["time"]
    )
    assert set(lines) == {"weights", "data", "steps", "rate", "operations", "time", "memory", "disk"}
    assert not (room / "run").exists()


def test_an_adapter_changes_nothing_else(room, one_layer):
    from mpt_eqx import from_pretrained, lora

    options = ("--model", one_layer, "--lora", 2, "--lora-targets", "Wqkv,out_proj", "--steps", 2)
    done = train("run", *options, "--learning-rate", 1e-2, data="questions.jsonl", new=None)
    assert (done.returncode, done.stdout) == (0, "run/adapter\n"), done.stderr
    model = from_pretrained(one_layer)
    loaded = lora.load(model, room / "run" / "adapter")
    assert all(
        np.any(np.asarray(x.lora_B.weight)) for x in (loaded.blocks[0].attn.Wqkv, loaded.blocks[0].attn.out_proj)
    )
    saved = load_file(room / "run" / "states" / "step-00000002" / "arrays.safetensors")
    base = {name: x for name, x in saved.items() if name.startswith("model") and "lora" not in name}
    kept = [np.asarray(x).tobytes() for x in jax.tree.leaves(model) if eqx.is_array_like(x)]
    assert len(base) == len(kept) and all(x.tobytes() in kept for x in base.values())


@pytest.mark.slow
def test_an_adapter_with_dropout_by_lion_in_stacked_blocks(room, one_layer):
    """Options that change what is compiled, and the sample in between, all in one run."""
    options = ("--lora", 2, "--lora-dropout", 0.5, "--optimizer", "lionw", "--blocks", "stacked", "--remat", "offload")
    done = train("run", "--model", one_layer, *options, "--mesh", "fsdp=1", "--steps", 1, "--warmup-steps", 0, new=None)
    assert (done.returncode, done.stdout) == (0, "run/adapter\n"), done.stderr
    assert log_of(room / "run")[0]["learning_rate"] == pytest.approx(2e-5)
    settings = json.loads((room / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["lora_dropout"] == 0.5
    saved = load_file(room / "run" / "states" / "step-00000001" / "arrays.safetensors")
    assert saved["model.blocks.block.attn.Wqkv.lora_A.weight"].ndim == 3


def test_what_is_frozen_stays(room, one_layer):
    done = train("run", "--freeze", "wte.*,blocks.*", "--steps", 1, "--learning-rate", 1e-2, "--model", one_layer,
                 "--save-dtype", "float32", "--sample", "The", new=None)  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = load_file(one_layer / "model.safetensors"), load_file(room / "run" / "model" / "model.safetensors")
    moved = {name for name in after if np.any(after[name] != before[name].astype(np.float32))}
    assert moved == {"transformer.norm_f.weight"} and log_of(room / "run")[0]["sample"]


def test_what_is_not_finite_ends_a_run_and_the_last_state_stays(room):
    done = train("run", "--steps", 9, "--save-every", 1, "--learning-rate", 1e38, "--warmup-steps", 1)
    assert done.returncode == 1
    assert "expected a finite number at step 3, found" in done.stderr
    assert sorted(path.name for path in (room / "run" / "states").iterdir() if path.is_dir())[0] == "step-00000001"
    assert not (room / "run" / "model").exists()


def test_a_run_whose_states_cannot_be_read_leaves_all_as_it_is(room):
    assert train("run", "--steps", 1).returncode == 0
    torn = room / "run" / "states" / "step-00000001" / "arrays.safetensors"
    torn.write_bytes(torn.read_bytes()[:-8])
    before = {path: path.read_bytes() for path in (room / "run").rglob("*") if path.is_file()}
    done = train("run", "--steps", 2)
    assert done.returncode == 1 and "expected a state that can be read, found 1 that cannot" in done.stderr
    assert {path: path.read_bytes() for path in (room / "run").rglob("*") if path.is_file()} == before


def test_flags_win_over_a_file_which_wins_over_the_preset(room):
    (room / "run.toml").write_text(
        'new = "tiny.json"\ndata = "texts.jsonl"\noutput = "run"\npreset = "mpt-7b-dolly-sft"\nlength = 16\n'
        "batch_size = 4\nlearning_rate = 1e-3\nepochs = 40\n"
    )
    out = run("train", "run.toml", "--learning-rate", 3e-3, "--dry-run").stdout
    assert "\nrate        0.003 after 50 steps, then linear to 0\n" in out and " of 4 rows, " in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat = 1", "expected options such as learning_rate, found 'learning_rat'"),
        ("steps = true", "steps: expected a number, found True"),
        ('steps = "5"', "steps: expected a number, found '5'"),
        ("data = 5", "data: expected a text, found 5"),
        ("steps = 0", "steps: expected a whole number ≥ 1, found '0'"),
        ("learning_rate = -1", "learning_rate: expected a number > 0, found '-1'"),
        ("floor = 2", "floor: expected a number from 0 to 1, found '2'"),
        ('mesh = "pp=2"', "mesh: expected each of dp, fsdp, tp, sp at most once, found 'pp=2'"),
        ('mesh = "tp=x"', "mesh: expected a whole number ≥ 1, found 'x'"),
        ('schedule = "x"', "schedule: expected cosine or linear, found 'x'"),
        ('lora_targets = ["x"]', "lora_targets: expected some of Wqkv, Wq"),
        ("steps =", "expected a TOML file, found none that can be read"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(room, text, message):
    (room / "run.toml").write_text(text)
    done = run("train", "run.toml", "--output", "run")
    assert done.returncode == 1 and f"run.toml: {message}" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--output", "run"), "--data: expected a path, found none"),
        (("--data", "texts.jsonl"), "--output: expected a path, found none"),
        (("--lora", 2, "--freeze", "*"), "--lora and --freeze: expected one of them, found both"),
        (("--lora", 2, "--new", "tiny.json"), "--lora and --new: expected one of them, found both"),
        (("--quantize", "int8"), "--quantize: expected --lora with it, found none"),
        (("--lora-alpha", 2), "--lora-alpha: expected --lora with it, found none"),
        (("--preset", "x"), "--preset: expected mpt-125m or mpt-7b or "),
        (("--length", 2000), "--length: expected at most max_seq_len=1024, found 2000"),
        (("--batch-size", 3, "--accumulate", 2), "--accumulate: expected a divisor of --batch-size 3, found 2"),
        (("--new", "small.json"), "--new: expected a vocab_size of at least 4096, as the tokenizer of --model has,"),
        (("--model", "int8"), "--model: expected floating weights, found int8; give --lora"),
        (("--process", 1), "--process: expected --coordinator with it, found none"),
        (("--coordinator", "auto"), "--coordinator: expected --mesh with it, of the devices of all"),
        (("--coordinator", "here", "--mesh", "dp=1"), "--coordinator: expected a process 0 at here, found none"),
        (("--mesh", "fsdp=3"), "--mesh: expected dp × fsdp to divide the 8 rows that are computed at a time"),
        (("--mesh", "tp=999"), "mesh: expected at most "),
        (("--lora-dropout", 0.1), "--lora-dropout: expected --lora with it, found none"),
        (("--data", "none.txt"), "none.txt: expected text in UTF-8, found none that can be read"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_flags_is_said(room, one_layer, args, message):
    from mpt_eqx import from_pretrained, quantize, save_pretrained

    (room / "small.json").write_text(json.dumps({"model_type": "mpt", **TINY, "vocab_size": 9}))
    if "int8" in args and "--model" in args:
        save_pretrained(quantize(from_pretrained(one_layer), "int8"), room / "int8", companions_from=one_layer)
    both = () if "expected a path" in message else ("--data", "texts.jsonl", "--output", "run")
    done = run("train", *both, *args)
    assert done.returncode == 1 and message in done.stderr


def test_a_text_file_is_one_document(tmp_path):
    from mpt_eqx import SHIPPED_MODEL
    from mpt_eqx.cli.train import read_data
    from mpt_eqx.text import load_tokenizer

    tokenizer = load_tokenizer(SHIPPED_MODEL)
    (tmp_path / "a.txt").write_text("One line.\n\nAnother.")
    (document,) = read_data(str(tmp_path / "a.txt"), tokenizer, None)
    assert tokenizer.decode(document["tokens"][:-1].tolist()) == "One line.\n\nAnother."
    assert document["tokens"][-1] in tokenizer.eos_token_ids


def test_the_mean_loss_counts_each_token_once():
    from mpt_eqx import MPT, MPTConfig
    from mpt_eqx.train import mean_loss, next_token_loss, pack

    config = MPTConfig.from_dict({"model_type": "mpt", **TINY, "vocab_size": 32, "emb_pdrop": 0.5})
    model = MPT(config, key=jax.random.key(0))
    rows = [{name: row[name] for name in ("tokens", "labels")} for row in pack([range(1, 12), range(20)], 8)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    expected = eqx.filter_jit(next_token_loss)(eqx.nn.inference_mode(model), **batch)
    assert mean_loss(model, rows, 3) == pytest.approx(float(expected), rel=1e-6)


def test_the_loop_refuses_numbers_and_rows_that_count_nothing(tmp_path):
    from mpt_eqx import MPTError, train

    with pytest.raises(MPTError, match="save_every: expected a whole number ≥ 1, found 0"):
        train.run(None, None, None, tmp_path, steps=1, batch_size=1, save_every=0)
    with pytest.raises(MPTError, match="rows: expected tokens that count, found none"):
        train.mean_loss(None, [], 2)
