"""Documents of any lengths as rows of one length, and rows as batches."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from mpt_eqx.errors import MPTError
from mpt_eqx.train.loss import IGNORED
from mpt_eqx.train.sampler import Sampler

Row = dict[str, Int[np.ndarray, " T"]]
Document = Sequence[int] | Mapping[str, Any]
KEYS = ({"documents", "offset"}, {"documents", "offset", "source"})


class Packed(Iterator[Row]):
    """The rows that `pack` makes, one after another.

    Attributes:
        state: where the next row begins: how many documents are used up (`documents`), how many tokens of the one after
            them (`offset`), and for documents of a `Sampler` where that one stands (`source`). Save it with the run,
            and hand it to `pack` to go on with the same documents.
    """

    def __init__(
        self, documents: Iterable[Document], length: int, eos: int | None, split: bool, state: Mapping[str, Any]
    ) -> None:
        self._length, self._eos, self._split = length, eos, split
        self._used, self._offset = state["documents"], state["offset"]
        self._document: tuple[np.ndarray, np.ndarray] | None = None  # tokens and labels of one that is begun
        self._sampler = documents if isinstance(documents, Sampler) else None
        if (self._sampler is None) != ("source" not in state) and state != START:
            wanted, found = ("no", "a") if self._sampler is None else ("a", "no")
            raise MPTError(
                f"state: expected {wanted} `source`, as of these documents, found {found} `source`: they are "
                "not those that the state is of"
            )
        if self._sampler is not None:
            if "source" in state:
                self._sampler.go_to(state["source"])
            self._place = self._sampler.state
            self._rest: Iterator[Document] = self._sampler
        else:
            self._rest = itertools.islice(iter(documents), self._used, None)
        if self._offset:
            self._document = self._next_document()
            size = 0 if self._document is None else len(self._document[0])
            if size <= self._offset:
                raise MPTError(
                    f"state: expected more than {self._offset} tokens in document {self._used}, found {size}; are "
                    "these the documents that the state is of?"
                )

    @property
    def state(self) -> dict[str, Any]:
        """Where the next row begins."""
        state = {"documents": self._used, "offset": self._offset}
        if self._sampler is None:
            return state
        return {**state, "source": self._sampler.state if self._document is None else self._place}

    def __next__(self) -> Row:
        """Returns the next row."""
        tokens, ids, labels = (np.full(self._length, value, np.int32) for value in (self._eos or 0, -1, IGNORED))
        filled, number = 0, 0
        while filled < self._length:
            self._document = self._document or self._next_document()
            if self._document is None:
                break
            document, targets = self._document
            if not self._split and not self._offset and filled and len(document) > self._length - filled:
                break
            part = slice(self._offset, self._offset + self._length - filled)
            here = slice(filled, filled + len(document[part]))
            tokens[here], ids[here], labels[here] = document[part], number, targets[part]
            self._offset += here.stop - filled
            filled, number = here.stop, number + (here.stop > filled)
            if self._offset == len(document):
                self._document, self._offset, self._used = None, 0, self._used + 1
        if not filled:
            raise StopIteration
        return {"tokens": tokens, "sequence_ids": ids, "labels": labels}

    def _next_document(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns tokens and labels of the next document; None at the end."""
        if self._sampler is not None:
            self._place = self._sampler.state
        document = next(self._rest, None)
        if document is None:
            return None
        parts = document if isinstance(document, Mapping) else {"tokens": document, "labels": document}
        if not {"tokens", "labels"} <= set(parts):
            raise MPTError(f"documents: expected token ids, or a mapping of tokens and labels, found {list(parts)}")
        tokens, labels = (_as_ids(parts[name], self._eos) for name in ("tokens", "labels"))
        if tokens.shape != labels.shape:
            raise MPTError(f"documents: expected as many labels as tokens, {len(tokens)}, found {len(labels)}")
        labels[:1] = IGNORED  # nothing of its document stands before it
        return tokens, labels


START = {"documents": 0, "offset": 0}


def pack(
    documents: Iterable[Document],
    length: int,
    *,
    eos: int | None = None,
    split: bool = True,
    state: Mapping[str, Any] | None = None,
) -> Packed:
    """Returns an iterator over rows of `length` tokens that hold the documents one after another.

    A document that does not fit goes on in the next row; no token is left out, and none comes twice. Each row is a
    mapping of arrays `tokens`, `sequence_ids` (0 for the first document in the row, −1 for the padding at its end) and
    `labels` (the tokens, or those of the document; −100 for the first of a document and for padding), as
    `next_token_loss` takes them. A model without attn_uses_sequence_id sees the documents before, too: leave
    `sequence_ids` out then.

    Args:
        documents: token ids of each document, or mappings of `tokens` and `labels`; an empty one takes no room, but for
            its `eos`. A `Sampler` is taken where it is.
        length: of a row, ≥ 2.
        eos: put at the end of each document; None for nothing.
        split: False: a document that does not fit begins the next row, and what is left is padding. It goes on in the
            row after that only if it is longer than a row.
        state: `state` of an earlier iterator over the same documents, to go on where it was; None for the start.

    Raises:
        MPTError: an argument is not valid; when a row is asked for, if a document is no sequence of token ids.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise MPTError(f"length: expected a whole number ≥ 2, found {length!r}")
    state = START if state is None else state
    counts = [state.get(name) for name in START]
    if set(state) not in KEYS or not all(isinstance(n, int) and n >= 0 for n in counts):
        raise MPTError(f"state: expected what `state` of an iterator of `pack` was, found {dict(state)!r}")
    return Packed(documents, length, eos, split, state)


def batches(rows: Iterable[Row], size: int) -> Iterator[Row]:
    """Yields `size` rows at a time as one mapping of arrays; fewer than that at the end are left out.

    No row is read before it is asked for, so that the `state` of the rows is that of the batches.

    Args:
        rows: mappings of arrays, such as `pack` makes.
        size: rows of a batch, ≥ 1.
    """
    rows = iter(rows)
    while len(batch := list(itertools.islice(rows, size))) == size:
        yield {name: np.stack([row[name] for row in batch]) for name in batch[0]}


def _as_ids(document: Any, eos: int | None) -> Int[np.ndarray, " N"]:
    found = np.asarray(document)
    if found.ndim != 1 or (found.size and not np.issubdtype(found.dtype, np.integer)):
        raise MPTError(
            f"documents: expected token ids of one document each, found an array of {found.dtype} and shape "
            f"{found.shape}; encode text with mpt_eqx.text.load_tokenizer"
        )
    return np.concatenate([found.astype(np.int32), np.asarray([] if eos is None else [eos], np.int32)])
