"""JSONL files of texts, instructions and conversations as token ids, with the loss on the answers only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from mpt_eqx.errors import MPTError, printable
from mpt_eqx.text import Tokenizer
from mpt_eqx.text.jsonl import read_jsonl
from mpt_eqx.train.loss import IGNORED

Example = dict[str, Int[np.ndarray, " N"]]
Ids = list[tuple[list[int], bool]]
KINDS = '{"text"}, {"prompt", "response"}, {"instruction", "output"} with "input" if there is one, or {"messages"}'


def read_documents(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    chat_template: str | None = None,
    answers: Literal["last", "all"] = "last",
) -> list[Example]:
    """Returns `tokens` and `labels` of each line of a JSONL file, as `pack` takes them, an end-of-text token last.

    A line is an object with the keys of one of these; each value but `messages` is a text.

    * `text`: all of it is trained.
    * `prompt` and `response`, as in mosaicml/dolly_hhrlhf: they are taken as they are. The response is trained.
    * `instruction`, and `output` or `response`, with `input` or `context` if there is one: the prompt of MosaicML's
      instruct models ("Below is an instruction …"), in which the input is the line after the instruction; or that of
      `chat_template`.
    * `messages`: a list of objects with `role` and `content`, in the checkpoint's chat template or in `chat_template`,
      such as "chatml". The last answer is trained, which must be the last message.

    Other keys and empty lines are passed over. Prompt and answer are encoded apart, as they are when an answer is
    generated. Labels are −100 where nothing is trained.

    Args:
        path: the file, in UTF-8.
        tokenizer: of the model.
        chat_template: as in `Tokenizer.apply_chat_template`.
        answers: "all": every answer of a conversation is trained.

    Raises:
        MPTError: a line is not such an object, or cannot be encoded: the message names the file and the line.
    """
    if answers not in ("last", "all"):
        raise MPTError(f"answers: expected 'last' or 'all', found {answers!r}")
    examples = []
    for number, record in read_jsonl(path):
        try:
            examples.append(_example(_encoded(record, tokenizer, chat_template), tokenizer.eos_token_ids, answers))
        except MPTError as error:
            raise MPTError(f"{path}, line {number}", str(error)) from None
    if not examples:
        raise MPTError(f"{path}: expected at least one line, found none")
    return examples


def _encoded(record: Mapping[str, Any], tokenizer: Tokenizer, chat_template: str | None) -> Ids:
    """Returns a record as parts of token ids, and of each whether it is an answer."""
    if "messages" in record:
        return tokenizer.encode_answers(record["messages"], chat_template=chat_template)
    if "text" in record:
        return [(tokenizer.encode(_text(record, "text")), True)]
    answer = next((key for key in ("response", "output") if key in record), None)
    if answer is None or not {"prompt", "instruction"} & set(record):
        found = ", ".join(printable(repr(key)) for key in record) or "none"
        raise MPTError(f"expected the keys {KINDS}, found {found}")
    if "prompt" in record:
        prompt = tokenizer.encode(_text(record, "prompt"))
        return [(prompt, False), (tokenizer.encode_plain(_text(record, answer)), True)]
    given = next((key for key in ("input", "context") if record.get(key)), None)
    asked = "\n".join(_text(record, key) for key in ("instruction", given) if key is not None)
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": _text(record, answer)}]
    return tokenizer.encode_answers(messages, chat_template=chat_template or "mpt-instruct")


def _text(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise MPTError(f"{key}: expected a text, found {type(record[key]).__name__}")
    return str(record[key])


def _example(parts: Ids, ends: tuple[int, ...], answers: str) -> Example:
    *before, (last, trained) = parts
    if ends and not set(last[-1:]) & set(ends):
        parts = [*before, ([*last, ends[0]], trained)]
    tokens = [id_ for ids, _ in parts for id_ in ids]
    labels = [
        id_ if trained and (answers == "all" or number == len(parts) - 1) else IGNORED
        for number, (ids, trained) in enumerate(parts)
        for id_ in ids
    ]
    return {"tokens": np.asarray(tokens, np.int32), "labels": np.asarray(labels, np.int32)}
