"""Text in and out, and what is wrong where there is no tokenizer."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def tokenizer():
    from mpt_eqx import SHIPPED_MODEL
    from mpt_eqx.text import load_tokenizer

    return load_tokenizer(SHIPPED_MODEL)


def test_the_shipped_tokenizer(tokenizer):
    assert tokenizer.vocab_size == 4096 and tokenizer.eos_token_ids == (0,)
    assert len(tokenizer.encode("The function returns a dictionary.")) < 12


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30).filter(lambda text: "<|endoftext|>" not in text))
def test_any_text_comes_back_whole_and_piece_by_piece(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert "".join(tokenizer.decode_stream(tokens)) == text


def test_the_name_of_a_special_token_is_that_token(tokenizer):
    """Which is no text, and is left out of what comes back."""
    tokens = tokenizer.encode("a<|endoftext|>b")
    assert tokens == [*tokenizer.encode("a"), 0, *tokenizer.encode("b")] and tokenizer.decode(tokens) == "ab"


def test_no_character_is_cut_in_half(tokenizer):
    text = "naïve 🙂 日本"
    pieces = list(tokenizer.decode_stream(tokenizer.encode(text)))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert len(tokenizer.encode("🙂")) > 1


def test_tokens_that_end_within_a_character(tokenizer):
    tokens = tokenizer.encode("Hi 🙂")[:-1]
    assert "".join(tokenizer.decode_stream(tokens)) == tokenizer.decode(tokens)


def test_special_tokens_are_left_out(tokenizer):
    assert tokenizer.decode([0, *tokenizer.encode("x"), 0]) == "x"
    assert list(tokenizer.decode_stream([0])) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab", max_size=3), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_are_found_across_pieces(pieces, stops):
    from mpt_eqx.text import until_stop

    text = "".join(pieces)
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    seen = "".join(until_stop(pieces, stops))
    assert text.startswith(seen) and not any(stop in seen for stop in stops)
    if not ends:
        assert seen == text


def test_the_first_stop_string_ends_the_text():
    from mpt_eqx.text import until_stop

    assert list(until_stop(["ab", "cd", "ef"], ["de", "f"])) == ["ab", "c"]


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"generation_config.json": {"eos_token_id": [3, 4]}, "config.json": {"eos_token_id": 5}}, (3, 4)),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 5}}, (5,)),
        ({"tokenizer_config.json": {"eos_token": "<|endoftext|>"}}, (0,)),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|endoftext|>"}}}, (0,)),
        ({"tokenizer_config.json": {"eos_token": "none"}}, ()),
        ({}, ()),
    ],
)
def test_where_the_ends_come_from(tmp_path, files, ids):
    from mpt_eqx import SHIPPED_MODEL
    from mpt_eqx.text import load_tokenizer

    shutil.copy(SHIPPED_MODEL / "tokenizer.json", tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).eos_token_ids == ids


def changed(tmp_path, **changes):
    from mpt_eqx import SHIPPED_MODEL

    content = json.loads((SHIPPED_MODEL / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **changes}))
    return content


def test_the_size_of_the_vocabulary_is_the_highest_id_and_one(tmp_path):
    import tokenizers

    from mpt_eqx.text import Tokenizer, load_tokenizer

    content = changed(tmp_path)
    end, word = content["added_tokens"][0], {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
    changed(tmp_path, added_tokens=[end, {"id": 4096, "content": "    ", "special": False, **word}])
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 4097 and tokenizer.encode("a    ")[-1] == 4096
    for vocabulary, size in (({"a": 0, "b": 700}, 701), ({}, 0)):
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
        assert Tokenizer(backend, ()).vocab_size == size


def test_added_tokens_keep_their_ids_or_are_refused(tmp_path):
    from mpt_eqx import CheckpointError
    from mpt_eqx.text import load_tokenizer

    content = changed(tmp_path)
    changed(
        tmp_path, added_tokens=[*content["added_tokens"], {**content["added_tokens"][0], "id": 5000, "content": "<x>"}]
    )
    with pytest.raises(
        CheckpointError, match=r"tokenizer.json: .* found '<x>' with id 5000, which would become 4096; fill"
    ):
        load_tokenizer(tmp_path)


def test_no_text_is_cut_or_filled_up(tmp_path):
    from mpt_eqx.text import load_tokenizer

    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    changed(tmp_path)
    whole = load_tokenizer(tmp_path).encode("one two three four")
    changed(tmp_path, truncation=cut, padding={**fill, "pad_token": "<|endoftext|>"})
    assert load_tokenizer(tmp_path).encode("one two three four") == whole and 2 < len(whole) < 9


def test_no_tokenizer(tmp_path):
    from mpt_eqx import CheckpointError
    from mpt_eqx.text import load_tokenizer

    with pytest.raises(CheckpointError, match=r"expected tokenizer.json, found no such file; give token ids"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: expected a tokenizer, found something else"):
        load_tokenizer(tmp_path)


def test_without_the_extra(monkeypatch, tmp_path):
    import sys

    from mpt_eqx import MPTError
    from mpt_eqx.text import load_tokenizer

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MPTError, match=r"install it with pip install 'mpt_eqx\[text\]'"):
        load_tokenizer(tmp_path)
