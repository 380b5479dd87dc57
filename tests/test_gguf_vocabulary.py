"""Tokenizers in GGUF files that are written here: the same ids as from the files that they were made of."""

import json

import numpy as np
import pytest
from conftest import GOLDEN, examples
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizers import KINDS, TEXTS, trained

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
MORE = "a<word>b<|im_start|> c<|im_end|>"


def checkpoint(directory, files, rows=5000):
    """A checkpoint of a small model with so many rows, and these files about text."""
    import equinox as eqx
    import jax

    from mpt_eqx import MPT, AttnConfig, MPTConfig, save_pretrained

    config = MPTConfig(
        d_model=8, n_heads=1, n_layers=1, vocab_size=rows, no_bias=True, attn_config=AttnConfig(alibi=True)
    )
    shapes = eqx.filter_eval_shape(lambda: MPT(config, key=jax.random.key(0)))
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
    model = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype) if is_shape(leaf) else leaf, shapes, is_leaf=is_shape
    )
    save_pretrained(model, directory)
    for name, content in files.items():
        (directory / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return directory


def shipped(change=lambda content: None):
    """The shipped tokenizer.json with a few added tokens, changed."""
    import tokenizers

    from mpt_eqx import SHIPPED_MODEL

    backend = tokenizers.Tokenizer.from_file(str(SHIPPED_MODEL / "tokenizer.json"))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.add_tokens([tokenizers.AddedToken("<word>", normalized=False)])
    content = json.loads(backend.to_str())
    change(content)
    return content


def header(path):
    """The entries about the tokenizer; the library's own reader takes seconds for a vocabulary."""
    from mpt_eqx.checkpoint.formats.gguf_tokenizer import _tokenizer_entries

    return _tokenizer_entries(np.memmap(path, mode="r").data)


def template(content):
    content["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {
                    "<|im_start|>": {"id": "<|im_start|>", "ids": [4096], "tokens": ["<|im_start|>"]},
                    "<|im_end|>": {"id": "<|im_end|>", "ids": [4097], "tokens": ["<|im_end|>"]},
                },
            },
        ],
    }  # fmt: skip


def spaced(content):
    content["pre_tokenizer"]["add_prefix_space"] = True


def composed(content):
    content["normalizer"] = {"type": "NFC"}
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


BYTE_LEVEL = {
    "plain": (lambda content: None, []),
    "NFC": (composed, []),
    "tokens at both ends": (template, []),
    "a space first": (spaced, ["no space is put before a text"]),
}


@pytest.fixture(scope="module", params=BYTE_LEVEL)
def byte_level(request, tmp_path_factory):
    from mpt_eqx.checkpoint import convert
    from mpt_eqx.text import load_tokenizer

    change, problems = BYTE_LEVEL[request.param]
    files = {
        "tokenizer.json": shipped(change),
        "tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}, "chat_template": TEMPLATE},
        "generation_config.json": {"eos_token_id": [4097, 0]},
    }
    source = checkpoint(tmp_path_factory.mktemp("bpe") / "m", files)
    info = convert(source, source / "m.gguf", program="llama.cpp", lossy=True)
    assert [one.consequence for one in info.lost] == problems
    (source.parent / "alone").mkdir()
    path = (source / "m.gguf").rename(source.parent / "alone" / "m.gguf")
    return load_tokenizer(source), load_tokenizer(path), path


@examples(40)
@given(st.text(max_size=40) | st.sampled_from([*TEXTS, MORE]))
def test_ids_are_those_of_tokenizer_json(byte_level, text):
    one, other, _ = byte_level
    assert one.encode(text) == other.encode(text)
    assert one.decode(one.encode(text)) == other.decode(other.encode(text))


def test_the_header_says_the_rest(byte_level):
    """What ends a text, in which order; how to chat; and tokens that no text has for rows without one."""
    from mpt_eqx import checkpoint_info

    one, other, path = byte_level
    assert one.eos_token_ids == other.eos_token_ids == (4097, 0)
    assert one.vocab_size == other.vocab_size == 4099
    message = [{"role": "user", "content": "Hi <|im_start|>"}]
    assert one.apply_chat_template(message) == other.apply_chat_template(message)
    assert checkpoint_info(path).config.eos_token_id == (4097, 0)
    found = header(path)
    tokens = found["ggml.tokens"]
    assert len(tokens) == 5000 and tokens[4096:4100] == ["<|im_start|>", "<|im_end|>", "<word>", "[PAD4099]"]
    assert found["ggml.token_type"][4095:4101] == [1, 3, 3, 4, 5, 5]
    assert found["ggml.pre"] in ("gpt-2", "mpt") and found["ggml.eot_token_id"] == 0


LOST = {
    "unigram": "a character without a token becomes the unknown token, and not bytes",
    "bpe": "a space is put before what follows a symbol that the model never splits",
    "unigram without bytes": "a space is put before a text",
}


@pytest.fixture(scope="module", params=KINDS)
def pieces(request, tmp_path_factory):
    pytest.importorskip("sentencepiece")
    from mpt_eqx.checkpoint import convert
    from mpt_eqx.text import load_tokenizer

    proto = trained(request.param.split()[0], **KINDS[request.param])
    files = {"spiece.model": proto, "added_tokens.json": {"<word>": 4098}}
    files["tokenizer_config.json"] = {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True, "added_tokens_decoder": {"4099": {"content": "<|im_start|>", "special": True}},
    }  # fmt: skip
    source = checkpoint(tmp_path_factory.mktemp("spm") / "m", files)
    info = convert(source, source / "m.gguf", program="llama.cpp", lossy=True)
    lost = [one.consequence for one in info.lost]
    assert lost == [LOST[request.param]]
    (source.parent / "alone").mkdir()
    path = (source / "m.gguf").rename(source.parent / "alone" / "m.gguf")
    return load_tokenizer(source), load_tokenizer(path), path


@examples(40)
@given(st.text(max_size=30) | st.sampled_from([*TEXTS, MORE, "the key <|user|> raises", "</s> <unk> <0x41>"]))
def test_ids_are_those_of_the_sentencepiece_model(pieces, text):
    one, other, _ = pieces
    assert one.encode(text) == other.encode(text)
    assert one.decode(one.encode(text)) == other.decode(other.encode(text))


def test_gpt2s_two_files(tmp_path):
    """vocab.json and merges.txt, with tokens that other files name, and begin every text with one."""
    from mpt_eqx.checkpoint import convert
    from mpt_eqx.text import load_tokenizer

    model = shipped()["model"]
    settings = {"add_bos_token": True, "bos_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer"}
    files = {
        "vocab.json": model["vocab"], "tokenizer_config.json": settings, "added_tokens.json": {"<word>": 4096},
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""]).encode(),
    }  # fmt: skip
    source = checkpoint(tmp_path / "m", files)
    assert convert(source, tmp_path / "m.gguf", program="llama.cpp").lost == ()
    one, other = load_tokenizer(source), load_tokenizer(tmp_path / "m.gguf")
    for text in (*TEXTS, MORE):
        assert one.encode(text) == other.encode(text)
    assert one.encode("a")[0] == 0 and 4096 in one.encode(MORE)


def test_other_vocabularies_in_json():
    from mpt_eqx.checkpoint.formats.gguf_vocabulary import read_vocabulary

    settings = json.dumps({"tokenizer_class": "BertTokenizer"}).encode()
    found = read_vocabulary({"vocab.json": b"{}", "merges.txt": b"", "tokenizer_config.json": settings}, 5000)
    reason = "vocab.json is not one of a tokenizer like GPT-2's"
    assert found.problems == [f"left out, because {reason}: the file takes token ids only"]


def test_a_class_that_puts_tokens_at_the_ends():
    """And one that puts no space after a special token, which llama.cpp does."""
    from mpt_eqx.checkpoint.formats.gguf_vocabulary import read_vocabulary

    settings = json.dumps({"tokenizer_class": "LlamaTokenizerFast", "legacy": False}).encode()
    model = trained("bpe", **KINDS["bpe"])
    found = read_vocabulary({"tokenizer.model": model, "tokenizer_config.json": settings}, 5000)
    assert found.entries["add_bos_token"] is True and found.entries["add_eos_token"] is False
    assert found.problems == [LOST["bpe"], "a space is put before what follows a special token, too"]


def test_the_header_says_which_model_of_sentencepiece(pieces):
    one, other, path = pieces
    assert one.eos_token_ids == other.eos_token_ids
    found = header(path)
    assert found["ggml.model"] in ("llama", "t5")
    assert len(found["ggml.scores"]) == len(found["ggml.token_type"]) == len(found["ggml.tokens"]) == 5000
    assert found["ggml.add_bos_token"] is True and found["ggml.add_eos_token"] is False


def test_a_sentencepiece_model_that_changes_text(tmp_path):
    """llama.cpp does not do that for this kind of model."""
    from mpt_eqx import CheckpointError
    from mpt_eqx.checkpoint import convert

    source = checkpoint(tmp_path / "m", {"tokenizer.model": trained("bpe")})
    with pytest.raises(
        CheckpointError, match="tokenizer='llama': a text is not normalised, as this SentencePiece model"
    ):
        convert(source, tmp_path / "m.gguf", program="llama.cpp")


def changed(path, value):
    def change(content):
        *parts, last = path.split(".")
        for part in parts:
            content = content[part]
        content[last] = value

    return change


LEFT_OUT = {
    "no byte-level BPE": changed("model.byte_fallback", True),
    "other words than GPT-2's": changed("pre_tokenizer", {"type": "Whitespace"}),
    "another normalizer than NFC": changed("normalizer", {"type": "Lowercase"}),
    "ignore_merges": changed("model.ignore_merges", True),
    "dropout": changed("model.dropout", 0.1),
    "continuing_subword_prefix": changed("model.continuing_subword_prefix", "##"),
    "end_of_word_suffix": changed("model.end_of_word_suffix", "</w>"),
    "a post_processor that is not known": changed(
        "post_processor", {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}
    ),
}


@pytest.mark.parametrize("reason", LEFT_OUT)
def test_tokenizers_that_cannot_be_written(reason):
    from mpt_eqx.checkpoint.formats.gguf_vocabulary import read_vocabulary

    files = {"tokenizer.json": json.dumps(shipped(LEFT_OUT[reason])).encode()}
    found = read_vocabulary(files, 5000)
    assert found.model == "no_vocab" and not found.tokens
    assert found.problems == [f"left out, because tokenizer.json has {reason}: the file takes token ids only"]


def test_what_is_left_out_is_refused_by_name(tmp_path):
    from mpt_eqx import CheckpointError, MPTError
    from mpt_eqx.checkpoint import convert
    from mpt_eqx.text import load_tokenizer

    source = checkpoint(tmp_path / "m", {"tokenizer.json": shipped(LEFT_OUT["ignore_merges"])})
    with pytest.raises(
        CheckpointError, match="tokenizer='no_vocab': left out, because tokenizer.json has ignore_merges"
    ):
        convert(source, tmp_path / "m.gguf", program="llama.cpp")
    convert(source, tmp_path / "m.gguf", program="llama.cpp", lossy=True)
    with pytest.raises(MPTError, match="expected tokenizer.json, found no such file"):
        load_tokenizer(tmp_path / "m.gguf")


def test_an_added_token_that_takes_a_space_with_it():
    from mpt_eqx.checkpoint.formats.gguf_vocabulary import read_vocabulary

    content = shipped()
    content["added_tokens"][-1]["lstrip"] = True
    found = read_vocabulary({"tokenizer.json": json.dumps(content).encode()}, 5000)
    assert found.problems == ["an added token takes no space beside it, and is found within words: '<word>'"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": b"{"}, "expected the files of a tokenizer, found damaged ones"),
        ({"tokenizer.json": b"[]"}, "found damaged ones .tokenizer.json is no JSON object"),
        ({"tokenizer.json": b"{}"}, "found damaged ones .'model'"),
        ({"spiece.model": b"\x0a\x80"}, "found damaged ones"),
        ({"spiece.model": b"\x0a\x05abc"}, "found damaged ones .a SentencePiece model ends early"),
        ({"spiece.model": b"\x0b"}, "found damaged ones .a SentencePiece model has a field of the unknown kind 3"),
        (
            {"spiece.model": trained("unigram"), "added_tokens.json": b'{"x": 9999}'},
            "expected at most 5000 tokens in the",
        ),
    ],
)
def test_damaged_files_and_too_many_tokens(files, message):
    from mpt_eqx import CheckpointError
    from mpt_eqx.checkpoint.formats.gguf_vocabulary import read_vocabulary

    with pytest.raises(CheckpointError, match=message):
        read_vocabulary(files, 5000)


def test_more_tokens_than_rows(tmp_path):
    from mpt_eqx import CheckpointError
    from mpt_eqx.checkpoint import convert

    source = checkpoint(tmp_path / "m", {"tokenizer.json": shipped()}, rows=4096)
    with pytest.raises(
        CheckpointError, match=r"at most 4096 tokens in the tokenizer, .* found 4099; .*resize_vocab\(model, 4099\)"
    ):
        convert(source, tmp_path / "m.gguf", program="llama.cpp")


def test_a_model_without_a_tokenizer_takes_ids(tmp_path):
    from mpt_eqx import from_pretrained
    from mpt_eqx.checkpoint import convert, save_gguf

    info = convert(GOLDEN / "hf_default", tmp_path / "m.gguf", program="llama.cpp")
    assert info.lost == ()
    model = from_pretrained(tmp_path / "m.gguf")
    source = checkpoint(tmp_path / "s", {"tokenizer.json": shipped()})
    save_gguf(from_pretrained(source), tmp_path / "n.gguf", companions_from=source)
    assert from_pretrained(tmp_path / "n.gguf").config.vocab_size == 5000 != model.config.vocab_size
