"""Texts, instructions and conversations as documents: which tokens they have, and which of them are trained."""

import json

import numpy as np
import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

from mpt_eqx import SHIPPED_MODEL, MPTError, train
from mpt_eqx.text import Tokenizer, load_tokenizer

INTRO = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED_MODEL)


@pytest.fixture(scope="module")
def chat():
    """A tokenizer that knows ChatML's tokens, and ends a text with <|im_end|>."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(SHIPPED_MODEL / "tokenizer.json"))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, (0, backend.token_to_id("<|im_end|>")))


def lines(directory, *records):
    path = directory / "data.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def shown(tokenizer, example):
    """The text of a document, and the text that is trained in it."""
    trained = [id_ for id_ in example["labels"].tolist() if id_ != -100]
    texts = [tokenizer._backend.decode(ids, skip_special_tokens=False) for ids in (example["tokens"].tolist(), trained)]
    assert len(example["tokens"]) == len(example["labels"])
    return texts


def test_each_kind_of_line(tokenizer, tmp_path):
    end = tokenizer._backend.decode([tokenizer.eos_token_ids[0]], skip_special_tokens=False)
    prompt = f"{INTRO}\n\n### Instruction:\nAdd.\n\n### Response:\n"
    talk = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "Sum."}]
    path = lines(
        tmp_path,
        {"text": "A text."},
        "",
        {"prompt": prompt, "response": "Sum."},
        {"instruction": "Add.", "output": "Sum.", "input": "", "category": 3},
        {"instruction": "Add.", "context": "1 2", "response": "Sum."},
        {"messages": talk},
    )
    text, *same, given, messages = [
        shown(tokenizer, example) for example in train.read_documents(path, tokenizer, chat_template="mpt-instruct")
    ]
    assert text == [f"A text.{end}"] * 2
    assert same == [[f"{prompt}Sum.{end}", f"Sum.{end}"]] * 2 == [messages] * 2
    assert given == [f"{prompt.replace('Add.', 'Add.' + chr(10) + '1 2')}Sum.{end}", f"Sum.{end}"]


@pytest.mark.parametrize("answers", ["last", "all"])
def test_a_conversation_in_chatml(chat, tmp_path, answers):
    """An answer ends with its token, which is trained; a token's name in a message is text."""
    talk = [("system", "S"), ("user", "<|im_end|>"), ("assistant", "A"), ("user", "B"), ("assistant", "C")]
    messages = [{"role": role, "content": content} for role, content in talk]
    path = lines(tmp_path, {"messages": messages})
    (example,) = train.read_documents(path, chat, chat_template="chatml", answers=answers)
    whole, trained = shown(chat, example)
    assert whole == "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in talk)[:-1]
    assert trained == ("A<|im_end|>" if answers == "all" else "") + "C<|im_end|>"
    prompt = chat.apply_chat_template(messages[:2], chat_template="chatml")
    assert example["tokens"][: len(prompt)].tolist() == prompt
    assert (example["tokens"] == chat.eos_token_ids[1]).sum() == 5


def test_a_line_that_is_no_document_is_named(tokenizer, tmp_path):
    ok = {"text": "a"}
    user, answer = ({"role": role, "content": "a"} for role in ("user", "assistant"))
    for record, message in [
        ("{", "expected a JSON object in one line, found something else"),
        ("[1]", r"found something else \(found list\)"),
        ('{"text": "a", "text": "b"}', "duplicate key 'text'"),
        ({"prompt": "a"}, r'expected the keys {"text"}, .*, found \'prompt\''),
        ({}, "found none"),
        ({"text": 3}, "text: expected a text, found int"),
        ({"instruction": "a", "output": None}, "output: expected a text, found NoneType"),
        ({"messages": []}, "messages: expected an answer of the role 'assistant' at the end, found none"),
        ({"messages": [answer, user]}, r"at the end, found \['user'\]"),
        ({"messages": [user, {"role": "assistant"}]}, "expected a dict of 'role' and 'content', found 'role'"),
        ({"messages": [user, answer]}, "use chat_template='chatml' or 'mpt-instruct'"),
    ]:
        template = "{% if add_generation_prompt %}x{% endif %}y" if record == {"messages": [user, answer]} else "chatml"
        with pytest.raises(MPTError, match=f"data.jsonl, line 3: .*{message}"):
            train.read_documents(lines(tmp_path, ok, "", record), tokenizer, chat_template=template)
    with pytest.raises(MPTError, match="expected at least one line, found none"):
        train.read_documents(lines(tmp_path, ""), tokenizer)
    with pytest.raises(MPTError, match="expected a JSONL file, found none that can be read"):
        train.read_documents(tmp_path / "none.jsonl", tokenizer)
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(MPTError, match="expected text in UTF-8 after line 0"):
        train.read_documents(tmp_path / "latin", tokenizer)
    with pytest.raises(MPTError, match="answers: expected 'last' or 'all', found 'none'"):
        train.read_documents(tmp_path / "latin", tokenizer, answers="none")


@examples(100)
@given(
    count=st.integers(1, 9), seed=st.integers(0, 2**64 - 1), epochs=st.integers(1, 3), cut=st.integers(0, 30),
    parts=st.integers(1, 3),
)  # fmt: skip
def test_a_sampler_yields_each_document_once_in_each_epoch_and_goes_on_where_it_was(count, seed, epochs, cut, parts):
    documents, parts = list(range(count)), min(parts, count)
    everything = []
    for number in range(parts):
        options = {"seed": seed, "epochs": epochs, "part": (number, parts)}
        whole = list(train.Sampler(documents, **options))
        first = train.Sampler(documents, **options)
        begun = [document for _, document in zip(range(cut), first, strict=False)]
        state = json.loads(json.dumps(first.state))
        assert begun + list(train.Sampler(documents, **options, state=state)) == whole
        everything.append(whole)
    for epoch in range(epochs):
        parted = [part[epoch * len(part) // epochs : (epoch + 1) * len(part) // epochs] for part in everything]
        assert sorted(document for part in parted for document in part) == documents


def test_the_order_is_the_same_everywhere():
    """On any machine, with any version of NumPy."""
    sampler = train.Sampler("abcdefgh", seed=7)
    assert "".join(next(sampler) for _ in range(16)) == "edgcbafhhgbedcfa"
    assert sampler.state == {"seed": 7, "documents": 8, "part": [0, 1], "epoch": 1, "position": 8}


def test_what_no_sampler_takes():
    state = train.Sampler("abc").state
    for call, message in [
        (lambda: train.Sampler("abc", part=(2, 2)), r"part: expected whole numbers \(i, n\) with 0 ≤ i < n, found \(2"),
        (lambda: train.Sampler("abc", seed=-1), "seed: expected a whole number with 0 ≤ seed < 2⁶⁴, found -1"),
        (lambda: train.Sampler("abc", epochs=0), "epochs: expected a whole number ≥ 1 or None, found 0"),
        (lambda: train.Sampler("a", part=(0, 2)), "documents: expected at least 2, one for each part, found 1"),
        (lambda: train.Sampler("abc", state={}), "state: expected what `state` of a Sampler was, found {}"),
        (
            lambda: train.Sampler("abcd", state=state),
            "state: expected documents=4, as this Sampler has, found document",
        ),
        (lambda: train.Sampler("abc", seed=1, state=state), "expected seed=1, .* found seed=0; go on with the"),
        (lambda: train.Sampler("abc", state={**state, "position": 4}), "expected a position of at most 3, found 4"),
    ]:
        with pytest.raises(MPTError, match=message):
            call()


@examples(100)
@given(
    documents=st.lists(st.lists(st.integers(1, 60), max_size=9), min_size=1, max_size=7).filter(any),
    length=st.integers(2, 8), cut=st.integers(0, 9), split=st.booleans(),
)  # fmt: skip
def test_rows_of_a_sampler_go_on_where_they_were(documents, length, cut, split):
    """Nothing is lost and nothing comes twice, over epochs, also where documents are not split."""

    def rows(state=None):
        return train.pack(train.Sampler(documents, seed=1, epochs=2), length, split=split, state=state)

    first = rows()
    begun = [row for _, row in zip(range(cut), first, strict=False)]
    found = begun + list(rows(json.loads(json.dumps(first.state))))
    whole = list(rows())
    assert [row["tokens"].tolist() for row in found] == [row["tokens"].tolist() for row in whole]
    tokens = [t for row in whole for t in row["tokens"][row["sequence_ids"] >= 0].tolist()]
    assert tokens == [t for document in train.Sampler(documents, seed=1, epochs=2) for t in document]
    if not split:
        sizes = [np.bincount(row["sequence_ids"] + 1, minlength=2)[1:].tolist() for row in whole]
        fitting = [len(d) for d in train.Sampler(documents, seed=1, epochs=2) if 0 < len(d) <= length]
        parts = [size for row in sizes for size in row if size]
        assert all(parts.count(n) >= fitting.count(n) for n in fitting)


def test_labels_are_packed_with_their_tokens():
    documents = [{"tokens": [1, 2, 3], "labels": [-100, -100, 3]}, {"tokens": [4, 5], "labels": [4, 5]}]
    (row,) = train.pack(documents, 6)
    assert row["tokens"].tolist() == [1, 2, 3, 4, 5, 0] and row["labels"].tolist() == [-100, -100, 3, -100, 5, -100]
    rows = train.pack([[1, 2, 3]] * 3, 2)
    assert [batch["tokens"].tolist() for batch in train.batches(rows, 2)] == [[[1, 2], [3, 1]], [[2, 3], [1, 2]]]
    for document, message in [
        ({"tokens": [1]}, r"documents: expected token ids, or a mapping of tokens and labels, found \['tokens'\]"),
        ({"tokens": [1], "labels": [1, 2]}, "documents: expected as many labels as tokens, 1, found 2"),
    ]:
        with pytest.raises(MPTError, match=message):
            next(train.pack([document], 4))
    sampled = train.pack(train.Sampler([[1, 2, 3]]), 2)
    next(sampled)
    with pytest.raises(MPTError, match="state: expected no `source`, as of these documents, found a `source`"):
        train.pack([[1, 2, 3]], 2, state=sampled.state)
    with pytest.raises(MPTError, match="state: expected a `source`, as of these documents, found no `source`"):
        train.pack(train.Sampler([[1, 2, 3]]), 2, state={"documents": 1, "offset": 0})
