"""Text in and out, and what is wrong where there is no tokenizer."""

import json
import shutil

import pytest
from conftest import examples
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


def test_tokens_that_begin_a_text_are_added_or_not(tokenizer, tmp_path):
    """Where tokenizer.json adds one; which it is stands in tokenizer_config.json."""
    import tokenizers

    from mpt_eqx import SHIPPED_MODEL
    from mpt_eqx.text import load_tokenizer

    backend = tokenizers.Tokenizer.from_file(str(SHIPPED_MODEL / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text((SHIPPED_MODEL / "config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<|endoftext|>"}}))
    found = load_tokenizer(tmp_path)
    assert found.encode("a") == [0, *tokenizer.encode("a")] and found.bos_token_id == 0
    assert found.encode("a", add_special_tokens=False) == tokenizer.encode("a") and tokenizer.bos_token_id is None


def test_the_text_of_a_chat_template(tokenizer):
    assert tokenizer.chat_template("{{ 1 }}") == "{{ 1 }}" and "<|im_start|>" in tokenizer.chat_template("chatml")
    assert "message.content" in tokenizer.chat_template()


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


def words(decoder):
    """A tokenizer of the letters a and b, whose decoder is of one of the kinds that checkpoints have."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    from mpt_eqx.text import Tokenizer

    letters = [f"{before}{letter}" for before in ("", "▁", "##") for letter in "ab"] + ["▁", "<s>", "[U]"]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: id_ for id_, token in enumerate(letters + raw)}
    if decoder == "WordPiece":
        backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[U]"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    else:
        merges = [("▁", "a"), ("▁", "b")]
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    if decoder == "Metaspace":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if decoder == "Llama":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend, ())


@pytest.mark.parametrize("decoder", ["Metaspace", "Llama", "WordPiece"])
def test_the_space_between_a_prompt_and_what_follows_is_kept(decoder):
    """Whatever the prompt ends with: a word, many special tokens, spaces."""
    tokenizer = words(decoder)
    start, tokens = tokenizer.encode("ab ab"), tokenizer.encode("ba b")
    assert tokenizer.decode(tokens) == "ba b" and "".join(tokenizer.decode_stream(tokens)) == "ba b"
    for prompt in (start, start * 20, [*start, *tokenizer.ids_of(["<s>"]) * 40]):
        assert tokenizer.decode(tokens, prompt=prompt) == " ba b"
        pieces = list(tokenizer.decode_stream(tokens, prompt=prompt))
        assert pieces[0] == " b" and "".join(pieces) == " ba b"
    assert tokenizer.decode([], prompt=start) == "" and list(tokenizer.decode_stream([], prompt=start)) == []


ANY = st.lists(st.text("ab é🙂", max_size=4), min_size=1, max_size=5).map(" ".join)


@examples(200)
@given(ANY, st.integers(0, 40), st.sampled_from(["Metaspace", "Llama", "bytes"]))
def test_a_text_cut_anywhere_comes_back_in_two_parts(tokenizer, text, at, decoder):
    """Also within a character, which then belongs to the second part, and piece by piece."""
    tokenizer = tokenizer if decoder == "bytes" else words(decoder)
    tokens = tokenizer.encode(text)
    whole, head, tail = tokenizer.decode(tokens), tokens[:at], tokens[at:]
    second = tokenizer.decode(tail, prompt=head)
    assert "".join(tokenizer.decode_stream(tail, prompt=head)) == second
    if decoder != "Metaspace":  # which has no bytes to fall back on when it decodes
        assert whole == text and tokenizer.decode(head).rstrip("\ufffd") + second == text


def test_a_stop_string_ends_text_and_generation(tokenizer):
    """In one text or in a stream, wherever tokens begin and end; nothing after it is asked for."""
    text = "One two three four"
    tokens, asked = tokenizer.encode(text), []
    assert tokenizer.decode(tokens[:1]) == "O"
    for stop in ("o th", ["four", "o th"], ("o th",)):
        assert tokenizer.decode(tokens, stop=stop) == "One tw"
        asked.clear()
        stream = tokenizer.decode_stream((asked.append(token) or token for token in tokens), stop=stop)
        assert "".join(stream) == "One tw" and len(asked) < len(tokens)
    assert tokenizer.decode(tokens[1:], prompt=tokens[:1], stop="three") == "ne two "


def test_what_is_no_text_and_no_token(tokenizer):
    from mpt_eqx import MPTError

    for call, message in {
        lambda: tokenizer.encode(b"a"): "text: expected text, found bytes; decode them",
        lambda: tokenizer.encode(["a"]): "text: expected text, found list; give one text at a time",
        lambda: tokenizer.encode("a\udce9"): r"text: expected text, found half of a character \('\\udce9'\) at 1",
        lambda: tokenizer.decode(3): "tokens: expected the token ids of one text, found int",
        lambda: tokenizer.decode("a"): "tokens: expected the token ids of one text, found str",
        lambda: tokenizer.decode([[1], [2]]): r"tokens: expected the token ids of one text, found \[1\]",
        lambda: tokenizer.decode([1.5]): "tokens: expected the token ids of one text, found 1.5",
        lambda: tokenizer.decode([-1]): "tokens: expected token ids ≥ 0, found -1",
        lambda: tokenizer.decode([1], prompt=3): "prompt: expected the token ids of one text, found int",
        lambda: list(tokenizer.decode_stream([-1])): "tokens: expected token ids ≥ 0, found -1",
        lambda: tokenizer.decode_stream(
            [1], stop=["a", ""]
        ): "stop: expected a text or a list of texts, found an empty",
        lambda: tokenizer.decode([1], stop=[3]): "stop: expected a text or a list of texts, found int",
    }.items():
        with pytest.raises(MPTError, match=message):
            call()


def test_tokens_of_any_kind(tokenizer):
    import jax.numpy as jnp
    import numpy as np

    tokens = tokenizer.encode("The zip() function")
    for kind in (tuple, np.asarray, jnp.asarray, iter):
        assert tokenizer.decode(kind(tokens)) == "The zip() function"
    from mpt_eqx import MPTError

    with pytest.raises(MPTError, match=r"found a row of shape \(4,\) in it; decode one row at a time"):
        tokenizer.decode(np.asarray([tokens]))


GIVES_UP = {"Regex": "^(a+)+$"}
TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
# What its library takes as a tokenizer and then panics at.
BROKEN = {
    "pre_tokenizer": {"type": "Split", "pattern": GIVES_UP, "behavior": "Isolated", "invert": False},
    "normalizer": {"type": "Replace", "pattern": GIVES_UP, "content": "x"},
    "chunks": {"type": "FixedLength", "length": 0},
    "post_processor": {**TEMPLATE, "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}]},
    "second": {**TEMPLATE, "single": [{"Sequence": {"id": "B", "type_id": 0}}]},
    "decoder": {"type": "Strip", "content": "a", "start": 99, "stop": 99},
}


def broken(tmp_path, name="pre_tokenizer"):
    """Writes a tokenizer.json that loads and does not work."""
    from mpt_eqx import SHIPPED_MODEL

    content = json.loads((SHIPPED_MODEL / "tokenizer.json").read_text())
    part = {"chunks": "pre_tokenizer", "second": "post_processor"}.get(name, name)
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, part: BROKEN[name]}))
    return tmp_path


@pytest.mark.parametrize("name", BROKEN)
def test_a_tokenizer_that_panics(tmp_path, name, capfd):
    """Its library raises PanicException, which is no Exception."""
    from mpt_eqx import MPTError
    from mpt_eqx.text import load_tokenizer

    tokenizer, word = load_tokenizer(broken(tmp_path, name)), "a" * 40 + "!"
    calls = [
        lambda: tokenizer.decode(tokenizer.encode(word)),
        lambda: list(tokenizer.decode_stream(tokenizer.encode(word))),
    ]
    if name in ("pre_tokenizer", "normalizer", "chunks"):  # templates do without the other parts
        calls[1] = lambda: tokenizer.apply_chat_template([{"role": "user", "content": word}], chat_template="chatml")
    for call in calls[: 1 if name in ("post_processor", "second") else 2]:
        with pytest.raises(MPTError, match=r"tokenizer.json: expected a working tokenizer, found one that fails \("):
            call()
    capfd.readouterr()


def test_whatever_a_tokenizer_raises_is_an_error_of_ours():
    from mpt_eqx import CheckpointError, MPTError
    from mpt_eqx.text.checks import backend_errors

    class PanicException(BaseException):
        pass

    for error in (PanicException("no\n" * 999), ValueError("no"), RecursionError("no")):
        message = r"^x: expected a working tokenizer, found one that fails \(no"
        with pytest.raises(CheckpointError, match=message) as found, backend_errors("x", CheckpointError):
            raise error
        assert len(str(found.value)) < 400
    for error in (KeyboardInterrupt(), SystemExit(), MPTError("ours")):
        with pytest.raises(type(error)), backend_errors("x"):
            raise error


def test_the_bytes_of_single_tokens():
    """Joined, they are the text, special tokens included."""
    from types import SimpleNamespace

    import tokenizers

    from mpt_eqx import SHIPPED_MODEL, MPTError
    from mpt_eqx.text import Tokenizer, load_tokenizer
    from mpt_eqx.text.sentencepiece import SentencePieceBackend

    tokenizer, text = load_tokenizer(SHIPPED_MODEL), "A wörld 🙂\n\n\t<|endoftext|> end"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode() == text
    assert tokenizer.token_bytes(5000) == b"" and '"model"' in tokenizer.to_json()
    pieces = ["\u2581a", "<0xC3>"]
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({piece: id_ for id_, piece in enumerate(pieces)}, pieces[0])
    )
    processor = SimpleNamespace(get_piece_size=lambda: 2, id_to_piece=pieces.__getitem__)
    for backend in (words, SentencePieceBackend(processor, {"<end>": (2, True)})):
        tokenizer = Tokenizer(backend, [])
        assert [tokenizer.token_bytes(id_) for id_ in (0, 1)] == [b" a", b"\xc3"]
    assert tokenizer.token_bytes(2) == b"<end>" and tokenizer.token_bytes(3) == b""
    with pytest.raises(MPTError, match="tokenizer: expected one with a tokenizer.json, found a SentencePiece model"):
        tokenizer.to_json()


def test_text_is_decoded_as_tokens_arrive():
    from mpt_eqx import SHIPPED_MODEL
    from mpt_eqx.text import load_tokenizer

    tokenizer = load_tokenizer(SHIPPED_MODEL)
    ids = tokenizer.encode(" wörld 🙂")
    add = tokenizer.decoder(tokenizer.encode("Hello"))
    pieces = [add(token) for token in (*ids, None)]
    assert "".join(pieces) == " wörld 🙂" and "" in pieces[:-1] and pieces[-1] == ""
    add = tokenizer.decoder()
    assert [add(token) for token in ids[-2:-1]] == [""] and add(None) == "\ufffd"
