"""Documents into rows: nothing lost, nothing twice, and as each document alone."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

from mpt_eqx import MPTError, train

DOCUMENTS = st.lists(st.lists(st.integers(1, 60), max_size=9), max_size=7)


@examples(100)
@given(documents=DOCUMENTS, length=st.integers(2, 8), eos=st.sampled_from([None, 0]), cut=st.integers(0, 9))
def test_every_token_is_there_once_and_in_order(documents, length, eos, cut):
    """Also when the iterator is given up after some rows, and another goes on from its state."""
    first = train.pack(documents, length, eos=eos)
    rows = [row for _, row in zip(range(cut), first, strict=False)]
    rows += list(train.pack(documents, length, eos=eos, state=dict(first.state)))
    whole = list(train.pack(documents, length, eos=eos))
    assert len(rows) == len(whole)
    for row, other in zip(rows, whole, strict=True):
        assert all(np.array_equal(row[name], other[name]) for name in ("tokens", "sequence_ids", "labels"))
        assert row["tokens"].shape == (length,)
    ended = [document if eos is None else [*document, eos] for document in documents]
    real = [row["tokens"][row["sequence_ids"] >= 0] for row in rows]
    assert [t for row in real for t in row.tolist()] == [t for document in ended for t in document]
    assert all((row["sequence_ids"] >= 0).all() for row in rows[:-1])  # only the last is padded
    predicted = [row["labels"][row["labels"] >= 0] for row in rows]
    assert [t for row in predicted for t in row.tolist()] == [t for document in ended for t in document[1:]]


@pytest.mark.parametrize("positions", ["alibi", "learned"])
def test_packed_documents_are_as_alone(tiny_config, positions):
    """The loss of a row is that of its documents by themselves, each weighted by its tokens."""
    from mpt_eqx import MPT, AttnConfig

    attention = AttnConfig(alibi=positions == "alibi", attn_uses_sequence_id=True)
    config = tiny_config(n_layers=1, learned_pos_emb=positions == "learned", attn_config=attention)
    model = MPT(config, key=jax.random.key(0))
    documents = [np.random.default_rng(n).integers(1, 61, size=n).tolist() for n in (5, 9, 2)]
    (row,) = train.pack(documents, 20)
    batch = {name: jnp.asarray(x)[None] for name, x in row.items()}
    loss = eqx.filter_jit(train.next_token_loss)
    alone = [loss(model, jnp.asarray([document])) for document in documents]
    expected = sum(one * (len(d) - 1) for one, d in zip(alone, documents, strict=True)) / (4 + 8 + 1)
    np.testing.assert_allclose(loss(model, **batch), expected, rtol=1e-5)


def test_positions_begin_anew_in_each_document():
    """Also with padding before, between and within them."""
    from mpt_eqx.model.positions import token_positions

    ids = jnp.asarray([-1, 0, 0, -1, 0, 1, 1, 2, -1])
    assert token_positions(ids >= 0, ids)[ids >= 0].tolist() == [0, 1, 2, 0, 1, 0]


def test_what_is_no_document_or_state():
    for call, message in [
        (lambda: train.pack([], 1), "length: expected a whole number ≥ 2, found 1"),
        (
            lambda: next(train.pack(["text"], 4)),
            "documents: expected token ids of one document each, found an array of <U4",
        ),
        (lambda: next(train.pack([[[1]]], 4)), r"documents: expected token ids .* of int64 and shape \(1, 1\)"),
        (
            lambda: train.pack([[1, 2]], 4, state={"documents": 0}),
            "state: expected what `state` of an iterator of `pack`",
        ),
        (
            lambda: train.pack([[1, 2]], 4, state={"documents": 0, "offset": 5}),
            "state: expected more than 5 tokens in document 0, found 2; are these",
        ),
        (
            lambda: train.pack([[1, 2]], 4, state={"documents": 3, "offset": 1}),
            "more than 1 tokens in document 3, found 0",
        ),
    ]:
        with pytest.raises(MPTError, match=message):
            call()
