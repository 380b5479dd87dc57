"""Documents of any lengths as rows of one length."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from mpt_eqx.errors import MPTError
from mpt_eqx.train.loss import IGNORED

Row = dict[str, Int[np.ndarray, " T"]]


class Packed(Iterator[Row]):
    """The rows that `pack` makes, one after another.

    Attributes:
        state: where the next row begins: how many documents are used up (`documents`), and how many tokens of the one
            after them (`offset`). Save it with the run, and hand it to `pack` to go on with the same documents.
    """

    def __init__(
        self, documents: Iterable[Sequence[int]], length: int, eos: int | None, state: Mapping[str, int]
    ) -> None:
        self.state = {"documents": state["documents"], "offset": state["offset"]}
        self._rest = itertools.islice(iter(documents), state["documents"], None)
        self._length, self._eos = length, eos
        self._document: Sequence[int] = ()  # what is left of the one that is begun
        if state["offset"]:
            begun = self._next_document()
            if begun is None or len(begun) <= state["offset"]:
                raise MPTError(
                    f"state: expected more than {state['offset']} tokens in document {state['documents']}, found "
                    f"{0 if begun is None else len(begun)}; are these the documents that the state is of?"
                )
            self._document = begun[state["offset"] :]

    def __next__(self) -> Row:
        """Returns the next row; the last is padded."""
        tokens, ids, labels = (np.full(self._length, value, np.int32) for value in (self._eos or 0, -1, IGNORED))
        filled, number = 0, 0
        while filled < self._length:
            starts = not self.state["offset"]
            if starts:
                document = self._next_document()
                if document is None:
                    break
                self._document = document
            part = self._document[: self._length - filled]
            here = slice(filled, filled + len(part))
            tokens[here], ids[here], labels[here] = part, number, part
            if starts and len(part):
                labels[filled] = IGNORED  # nothing of its document stands before it
            self._document = self._document[len(part) :]
            whole = not len(self._document)
            self.state = {
                "documents": self.state["documents"] + whole,
                "offset": 0 if whole else self.state["offset"] + len(part),
            }
            filled, number = here.stop, number + bool(len(part))
        if not filled:
            raise StopIteration
        return {"tokens": tokens, "sequence_ids": ids, "labels": labels}

    def _next_document(self) -> Sequence[int] | None:
        document = next(self._rest, None)
        if document is None:
            return None
        found = np.asarray(document)
        if found.ndim != 1 or (found.size and not np.issubdtype(found.dtype, np.integer)):
            raise MPTError(
                f"documents: expected token ids of one document each, found an array of {found.dtype} and shape "
                f"{found.shape}; encode text with mpt_eqx.text.load_tokenizer"
            )
        ids = [] if not found.size else found.tolist()
        return ids if self._eos is None else [*ids, self._eos]


def pack(
    documents: Iterable[Sequence[int]],
    length: int,
    *,
    eos: int | None = None,
    state: Mapping[str, int] | None = None,
) -> Packed:
    """Returns an iterator over rows of `length` tokens that hold the documents one after another.

    A document that does not fit goes on in the next row; no token is left out, and none comes twice. Each row is a
    mapping of arrays `tokens`, `sequence_ids` (0 for the first document in the row, −1 for the padding of the last row)
    and `labels` (the tokens; −100 for the first of a document and for padding), as `next_token_loss` takes them. A
    model without attn_uses_sequence_id sees the documents before, too: leave `sequence_ids` out then.

    Args:
        documents: token ids of each document; an empty one takes no room, but for its `eos`.
        length: of a row, ≥ 2.
        eos: put at the end of each document; None for nothing.
        state: `state` of an earlier iterator over the same documents, to go on where it was; None for the start.

    Raises:
        MPTError: an argument is not valid; when a row is asked for, if a document is no sequence of token ids.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise MPTError(f"length: expected a whole number ≥ 2, found {length!r}")
    state = {"documents": 0, "offset": 0} if state is None else state
    wrong = set(state) != {"documents", "offset"} or not all(isinstance(n, int) and n >= 0 for n in state.values())
    if wrong:
        raise MPTError(f"state: expected what `state` of an iterator of `pack` was, found {dict(state)!r}")
    return Packed(documents, length, eos, state)
