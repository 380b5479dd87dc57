"""Fine-tuning: the shipped model learns to answer questions about Python, as an adapter over frozen weights.

    python examples/finetune.py my-run                  about two minutes on two idle CPU cores, then the figures
    python examples/finetune.py my-run --epochs 9       the adapter that ships beside the model, about seven minutes
    mpt-eqx chat --adapter my-run/adapter               ask it

The model that ships with mpt_eqx goes on with documentation, and answers nothing. The questions are made of docstrings
and signatures of the Python that runs this script ("What does zip() do?", "What arguments does str.split take?");
nothing is downloaded. Two sets are held out: one phrasing of each kind of question, and every tenth function.
Needs the extra `text`: pip install 'mpt_eqx[text]'.
"""

import argparse
import builtins
import importlib
import inspect
import json
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import jax

from mpt_eqx import SHIPPED_MODEL, from_pretrained, generate, lora, train
from mpt_eqx.text import load_tokenizer
from mpt_eqx.text.chat_template import BUILT_IN

# Each question was trained alone, and stands alone in a chat, too.
TEMPLATE = (
    "{%- if messages[0].role == 'system' %}{{ raise_exception('expected no system message') }}{% endif -%}\n"
    "{%- set messages = messages[-1:] -%}" + BUILT_IN["mpt-instruct"].rstrip()
)
TARGETS = ("Wqkv", "out_proj", "up_proj", "down_proj")
TYPES = (str, list, dict, set, tuple, int, float)
MODULES = ("json", "math", "os.path")
WHAT = ("What does {}() do?", "What is {} for?", "Explain {}().", "{}() does what?", "Can you tell me what {} does?")
TAKES = ("What arguments does {} take?", "How do I call {}()?", "Which parameters does {}() have?")
SHOWN = ("What does zip() do?", "Explain len.", "Can you tell me what str.split does?", "How do I call dict.get()?")


def functions() -> Iterator[tuple[str, object]]:
    """Yields the name, as one writes it, and the object of each public function, method and class."""
    owners = [("", builtins), *((kind.__name__, kind) for kind in TYPES)]
    owners += [(name, importlib.import_module(name)) for name in MODULES]
    for owner_name, owner in owners:
        for name in getattr(owner, "__all__", None) or sorted(vars(owner)):
            obj = getattr(owner, name)
            an_error = isinstance(obj, type) and issubclass(obj, BaseException)
            if callable(obj) and not name.startswith("_") and not an_error:
                yield f"{owner_name}.{name}".removeprefix("."), obj


def first_sentence(obj: object) -> str | None:
    """Returns the first sentence of a docstring, without the signatures that may stand before it."""
    signature = r"^[\w.]+\(.*?\)(?=[ :]|$) *(-+> *([\w.]+ (-+ )?(?=[A-Z]))?|:)? *"
    for paragraph in (inspect.getdoc(obj) or "").split("\n\n"):
        text = re.sub(signature, "", " ".join(paragraph.split()))
        if found := re.match(r"[A-Z](.+?[^.\s]\.(?=\s|$)|[^.]+$)", text):
            sentence = found[0].removesuffix(".") + "."
            return sentence if 15 < len(sentence) < 160 else None
    return None


def call(name: str, obj: object) -> str | None:
    """Returns how a function is called, where Python knows."""
    try:
        text = str(inspect.signature(obj)).split(" -> ")[0]
    except (TypeError, ValueError):
        return None
    text = re.sub(r"\((self|cls)(, /)?(, )?", "(", text).replace(", /", "").replace("/, ", "")
    return f"{name}{text}." if len(text) < 60 and " at 0x" not in text else None


def questions() -> dict[str, list[dict[str, str]]]:
    """Returns records to train on, and those that are held out: in another phrasing, and of other functions."""
    parts: dict[str, list[dict[str, str]]] = {"train": [], "phrasings": [], "functions": []}
    for number, (name, obj) in enumerate(functions()):
        for answer, (*phrasings, held_out) in ((first_sentence(obj), WHAT), (call(name, obj), TAKES)):
            if answer:
                part = "functions" if number % 10 == 9 else "train"
                asked = phrasings[:1] if part == "functions" else phrasings
                parts[part] += [{"instruction": text.format(name), "output": answer} for text in asked]
                if part == "train":
                    parts["phrasings"].append({"instruction": held_out.format(name), "output": answer})
    return parts


def answers(model, tokenizer, asked: list[str]) -> list[tuple[str, bool]]:
    """Returns the likeliest answer to each question, and whether it ended by itself."""
    messages = [[{"role": "user", "content": text}] for text in asked]
    prompts = [tokenizer.apply_chat_template(one, chat_template="mpt-instruct") for one in messages]
    result = generate(model, prompts, max_new_tokens=48, eos_token_ids=tokenizer.eos_token_ids, progress=False)
    texts = [tokenizer.decode(row[:n].tolist()) for row, n in zip(result.tokens, result.lengths, strict=True)]
    return [(text.strip(), why == "stop") for text, why in zip(texts, result.finish_reasons, strict=True)]


def right(model, tokenizer, records: list[dict[str, str]]) -> dict[str, float]:
    """Returns the share of questions that are answered with the words of the docstring, and of answers that end."""
    made = answers(model, tokenizer, [record["instruction"] for record in records])
    good = [text.startswith(record["output"]) for (text, _), record in zip(made, records, strict=True)]
    return {"n": len(records), "right": sum(good) / len(good), "ended": sum(end for _, end in made) / len(made)}


def main() -> None:
    """Trains, measures, and writes the adapter with its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of the run; started again, it goes on with its newest state")
    parser.add_argument("--model", default=SHIPPED_MODEL, help="directory or Hub repository id")
    parser.add_argument("--epochs", type=float, default=2.5, help="passes over the questions (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=12, help="of the adapter (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="the highest (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--measured", type=int, default=200, help="questions of each kind (default: %(default)s)")
    args = parser.parse_args()

    # The data: JSONL, as read_documents takes it, in rows of whole questions; the loss is on the answers.
    tokenizer, rows = load_tokenizer(args.model), {}
    parts = questions()
    args.directory.mkdir(parents=True, exist_ok=True)
    for name, records in parts.items():
        path = args.directory / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        rows[name] = train.read_documents(path, tokenizer)
        print(f"{name}: {len(records)} questions, such as {records[0]}")
    held_out = {
        name: random.Random(0).sample(parts[name], min(args.measured, len(parts[name])))
        for name in ("phrasings", "functions")
    }
    packed = {name: list(train.pack(rows[name], args.length, split=False))[:32] for name in held_out}

    # The model: no question in a row sees the others. What is trained is the adapter alone.
    def base():
        overrides = {"attn_config": {"attn_uses_sequence_id": True}}
        return from_pretrained(args.model, dtype="float32", config_overrides=overrides)

    per_epoch = sum(1 for _ in train.pack(rows["train"], args.length, split=False)) / args.batch
    steps = max(round(args.epochs * per_epoch), 2)
    rate = train.cosine_with_warmup(args.learning_rate, steps, warmup_steps=min(20, steps // 2), floor=0.05)
    optimizer = train.decoupled_adamw(rate, b2=0.99, weight_decay=0.0)

    def start():
        model = lora.add(base(), rank=args.rank, targets=TARGETS, key=jax.random.key(0))
        return train.TrainState.create(model, optimizer, trainable=lora.trainable)

    def losses(model) -> dict[str, float]:
        return {f"loss_{name}": train.mean_loss(model, packed[name], args.batch) for name in packed}

    def figures(model) -> dict[str, object]:
        return losses(model) | {name: right(model, tokenizer, records) for name, records in held_out.items()}

    def log(record) -> None:
        if record["step"] % max(steps // 10, 1) == 0 or "loss_phrasings" in record:
            print(", ".join(f"{name} {value:.6g}" for name, value in record.items()), flush=True)

    before, shown = figures(base()), answers(base(), tokenizer, SHOWN)
    began = time.monotonic()
    state = train.run(
        start,
        train.make_train_step(optimizer, max_grad_norm=1.0),
        lambda place: train.pack(train.Sampler(rows["train"], seed=0), args.length, split=False, state=place),
        args.directory / "states",
        steps=steps,
        batch_size=args.batch,
        save_every=max(steps // 4, 1),
        evaluate=losses,
        eval_every=max(steps // 4, 1),
        log=log,
    )
    print(f"{time.monotonic() - began:.0f} s")

    # What is left: an adapter in 16 bits, in PEFT's files, with the tokenizer and the template of its prompts.
    adapter, frozen = eqx.partition(state.model, lora.trainable(state.model))
    model = eqx.combine(jax.tree.map(lambda x: x.astype("bfloat16"), adapter), frozen)
    out = args.directory / "adapter"
    lora.save(model, out, base=Path(args.model).name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(args.model) / name, out)
    (out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (out / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": 0, "pad_token_id": 0}))

    adapted = lora.load(base(), out)
    count, size = (sum(x.size for x in jax.tree.leaves(eqx.filter(x, eqx.is_array))) for x in (adapter, adapted))
    unchanged = bool(eqx.tree_equal(lora.remove(state.model), base()))
    after = figures(adapted)
    print(f"{count:,} of {size:,} numbers were trained; the others are unchanged to the bit: {unchanged}")
    for text, (old, _), (new, _) in zip(SHOWN, shown, answers(adapted, tokenizer, SHOWN), strict=True):
        print(f"--- {text}\nbefore: {old}\nafter:  {new}")
    content = {"steps": steps, "trained": count, "before": before, "after": after}
    (out / "figures.json").write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content))


if __name__ == "__main__":
    main()
