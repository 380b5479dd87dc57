"""Tokenizers of other kinds than tokenizer.json: in the header of a GGUF file, and SentencePiece's own."""

import io
import json
import sys

import census
import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

TEXTS = [
    "The function returns a dictionary.", "  two  spaces\n\tand a tab ", "naïve 🙂 日本語 é", "", " ", "<|endoftext|>",
    "x<pad>y", "a\x00b", "\ud7ff￿",
]  # fmt: skip
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}{{ eos_token }}{% endfor %}"


def write_gguf(path, write):
    """Writes a GGUF file of an MPT that has a header only."""
    import gguf

    writer = gguf.GGUFWriter(path, "mpt")
    write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """The shipped tokenizer in a GGUF file, with added tokens, and as tokenizer.json with the same ones."""
    import tokenizers

    from mpt_eqx import SHIPPED_MODEL

    directory = tmp_path_factory.mktemp("bpe")
    backend = tokenizers.Tokenizer.from_file(str(SHIPPED_MODEL / "tokenizer.json"))
    backend.add_special_tokens(["<|im_start|>"])
    backend.add_tokens([tokenizers.AddedToken("<word>", normalized=False)])
    content = json.loads(backend.to_str())
    (directory / "json").mkdir()
    backend.save(str(directory / "json" / "tokenizer.json"))
    vocab = backend.get_vocab()
    tokens = [*sorted(vocab, key=vocab.get), "[PAD4098]", "[PAD4099]"]
    kinds = {token["content"]: 3 if token["special"] else 4 for token in content["added_tokens"]}

    def write(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([5 if token.startswith("[PAD4") else kinds.get(token, 1) for token in tokens])
        writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
        writer.add_eos_token_id(0)
        writer.add_bos_token_id(0)
        writer.add_chat_template(TEMPLATE)

    return write_gguf(directory / "model.gguf", write), directory / "json"


@pytest.fixture(scope="module")
def bpe_loaded(bpe):
    from mpt_eqx.text import load_tokenizer

    return [load_tokenizer(place) for place in bpe]


@examples(40)
@given(st.text(max_size=40) | st.sampled_from([*TEXTS, "a<word>b<|im_start|> c"]))
def test_gguf_gives_the_ids_of_tokenizer_json(bpe_loaded, text):
    one, other = bpe_loaded
    assert one.encode(text) == other.encode(text)
    assert one.decode(one.encode(text)) == other.decode(other.encode(text))


def test_gguf_says_what_ends_a_text_and_how_to_chat(bpe):
    from mpt_eqx.text import load_tokenizer

    for place in (bpe[0], bpe[0].parent):
        tokenizer = load_tokenizer(place)
        assert tokenizer.eos_token_ids == (0,) and tokenizer.vocab_size == 4098  # without what fills rows
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi <|im_start|>"}])
        assert ids[:2] == [0, 4096] and ids[-1] == 0 and ids.count(4096) == 1


def test_gguf_is_converted_with_its_tokenizer(bpe, golden, tmp_path):
    from test_formats import write_gguf as write_model

    from mpt_eqx import from_pretrained, save_pretrained
    from mpt_eqx.checkpoint import convert
    from mpt_eqx.text import load_tokenizer

    def tokenizer(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a", "b", "ab", "<end>"])
        writer.add_token_types([1, 1, 1, 3])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(3)
        writer.add_pad_token_id(3)
        writer.add_bos_token_id(2**31)

    write_model(tmp_path / "m.gguf", golden("hf_default").model, also=tokenizer)
    model = from_pretrained(tmp_path / "m.gguf")
    config = model.config
    assert (config.eos_token_id, config.text_pad_token_id, config.bos_token_id) == (3, 3, None)
    convert(tmp_path / "m.gguf", tmp_path / "converted")
    save_pretrained(model, tmp_path / "saved", companions_from=tmp_path / "m.gguf")
    for name in ("converted", "saved"):
        loaded = load_tokenizer(tmp_path / name)
        assert loaded.encode("abba<end>") == [2, 1, 0, 3] and loaded.eos_token_ids == (3,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.add_tokenizer_model("bert"),
            "expected tokenizer.ggml.model 'gpt2', 'llama' or 't5', found 'bert'; put the",
        ),
        (
            lambda w: w.add_tokenizer_pre("llama-bpe"),
            "expected words as GPT-2 splits them .*found 'llama-bpe'; put the",
        ),
        (
            lambda w: w.add_token_types([1]),
            "expected a tokenizer in its header, found a damaged one .expected a type for",
        ),
        (lambda w: w.add_token_list(["a", "a"]), "found a damaged one .expected tokens that differ, found 1 twice"),
        (lambda w: w.add_uint32("tokenizer.ggml.tokens", 3), "expected a tokenizer in its header, found a damaged one"),
    ],
)
def test_gguf_tokenizers_that_are_none(tmp_path, change, message):
    from mpt_eqx import CheckpointError
    from mpt_eqx.text import load_tokenizer

    class Writer:
        """Later values replace earlier ones."""

        def __init__(self):
            self.calls = {}

        def __getattr__(self, name):
            return lambda *args: self.calls.__setitem__(args[0] if name == "add_uint32" else name, (name, args))

    recorded = Writer()
    recorded.add_tokenizer_model("gpt2")
    recorded.add_token_list(["a", "b"])
    change(recorded)
    if "tokenizer.ggml.tokens" in recorded.calls:
        del recorded.calls["add_token_list"]
    path = write_gguf(tmp_path / "m.gguf", lambda w: [getattr(w, n)(*a) for n, a in recorded.calls.values()])
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(path)


def test_gguf_without_a_tokenizer(tmp_path):
    from mpt_eqx import CheckpointError
    from mpt_eqx.text import load_tokenizer

    path = write_gguf(tmp_path / "m.gguf", lambda writer: None)
    with pytest.raises(CheckpointError, match="expected tokenizer.json, found no such file; give token ids .*Sentence"):
        load_tokenizer(path)


def trained(kind, **options):
    """Trains a SentencePiece model; returns its bytes."""
    import sentencepiece

    text = "the function returns a dictionary of values for each key and raises an error where none is found"
    words = text.split(" ")
    lines = [" ".join(words[i % 17 : i % 17 + 9]) for i in range(60)] + ["ab cd 12 34", "Größe 日本"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=kind, minloglevel=2, hard_vocab_limit=False,
        **{"vocab_size": 340, "byte_fallback": True, "user_defined_symbols": ["<|user|>", "\n"], **options},
    )  # fmt: skip
    return model.getvalue()


KINDS = {
    "unigram": {},
    "bpe": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "unigram without bytes": {"byte_fallback": False, "vocab_size": 80, "add_dummy_prefix": False},
}


@pytest.fixture(scope="module", params=KINDS)
def spm(request, tmp_path_factory):
    """A checkpoint's directory with a SentencePiece model, and the library's own reader of it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    directory = tmp_path_factory.mktemp("spm")
    proto = trained(request.param.split()[0], **KINDS[request.param])
    (directory / ("tokenizer.model" if request.param == "bpe" else "spiece.model")).write_bytes(proto)
    return directory, sentencepiece.SentencePieceProcessor(model_proto=proto)


@examples(40)
@given(st.text(max_size=30) | st.sampled_from([*TEXTS, "the key <|user|> raises", "</s> <unk> <0x41>"]))
def test_ids_are_sentencepieces(spm, text):
    from mpt_eqx.text import load_tokenizer

    directory, library = spm
    tokenizer = load_tokenizer(directory)
    ids = library.encode(text)
    assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == library.decode(ids)
    assert "".join(tokenizer.decode_stream(ids)) == library.decode(ids)
    assert tokenizer.eos_token_ids == (library.eos_id(),) and tokenizer.vocab_size == library.get_piece_size()


# Of the languages that models of this family were trained for.
LANGUAGES = [
    "Žluťoučký kůň úpěl ďábelské ódy.", "Việt Nam có 63 tỉnh thành, dân số trên 100 triệu người.",
    "吾輩は猫である。名前はまだ無い。",
    "ภาษาไทยไม่เว้นวรรคระหว่างคำ", "আমার সোনার বাংলা, আমি তোমায় ভালোবাসি।", "சிங்கப்பூர் ஒரு தீவு நாடு", "한국어 모델입니다.",
    "Nel mezzo del cammin di nostra vita", "हिन्दी में एक वाक्य", "ĳ ﬁ Å ｶﾞ ½ ①", "👩‍👩‍👧‍👦 🇮🇹",
]  # fmt: skip


def test_ids_are_sentencepieces_in_many_languages(spm):
    from mpt_eqx.text import load_tokenizer

    directory, library = spm
    tokenizer = load_tokenizer(directory)
    for text in (*LANGUAGES, " ".join(LANGUAGES), *TEXTS):
        ids = library.encode(text)
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == library.decode(ids)


def test_added_tokens_and_messages(spm, tmp_path):
    import shutil

    from mpt_eqx import MPTError
    from mpt_eqx.text import load_tokenizer

    directory, library = spm
    directory = shutil.copytree(directory, tmp_path / "m")
    size = library.get_piece_size()
    (directory / "added_tokens.json").write_text(json.dumps({"<word>": size, "<|end|>": size + 1}))
    settings = {
        "add_bos_token": True, "eos_token": {"content": "<|end|>"}, "chat_template": "{{ messages[0].content }}<|end|>",
        "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}},
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.eos_token_ids == (size + 1,) and tokenizer.vocab_size == size + 2
    begin, the, key = [library.bos_id()], library.encode("the"), library.encode("key")
    assert tokenizer.encode("the<word>key<|end|>") == [*begin, *the, size, *key, size + 1]
    assert tokenizer.decode(tokenizer.encode("the<word>key<|end|>")) == "the<word>key"
    message = [{"role": "user", "content": "the<|end|>"}]
    assert tokenizer.apply_chat_template(message) == [*library.encode("the<|end|>"), size + 1]
    with pytest.raises(
        MPTError, match="messages: expected text that can be encoded as ordinary text, found the text of"
    ):
        tokenizer.apply_chat_template([{"role": "user", "content": "<|user|>"}])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"spiece.model": b"x"}, "spiece.model: expected a SentencePiece model, found something else"),
        (
            {"added_tokens.json": b'{"<word>": 3}'},
            "expected added tokens from id .* found '<word>' with id 3, which is",
        ),
        ({"added_tokens.json": b'{"<word>": "3"}'}, "expected a whole number for the added token '<word>', found '3'"),
    ],
)
def test_sentencepiece_files_that_are_wrong(tmp_path, files, message):
    from mpt_eqx import CheckpointError
    from mpt_eqx.text import load_tokenizer

    for name, content in {"spiece.model": trained("unigram"), **files}.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


CODE = """def f(x):
    if x:\t# a tab,  two  spaces

        return {'a': [1,\t2]}   \n\n\n\tprint("日本語 é 🙂")  """


def test_whitespace_of_code_is_kept(tmp_path):
    """As replit-code-v1 has it: a unigram model of code, whose special tokens its own files name."""
    sentencepiece = pytest.importorskip("sentencepiece")

    from mpt_eqx.text import load_tokenizer

    proto = trained(
        "unigram", normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        eos_piece="<|endoftext|>", unk_piece="<|unk|>", pad_piece="<|pad|>", pad_id=3, bos_id=-1,
        user_defined_symbols=["    ", "\t", "\n"],
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(proto)
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "unk_token": "<|unk|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    settings = {**names, "bos_token": None, "sep_token": None, "tokenizer_class": "ReplitLMTokenizer"}
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": 2048, "padding_side": "right"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "sp_model_kwargs": {}}))
    library, tokenizer = sentencepiece.SentencePieceProcessor(model_proto=proto), load_tokenizer(tmp_path)
    for text in (*TEXTS[:3], CODE, " ", "\n", "    x"):
        ids = library.encode(text)
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
        assert "".join(tokenizer.decode_stream(ids)) == text
    end = library.eos_id()
    assert tokenizer.eos_token_ids == (end,) and library.id_to_piece(end) == "<|endoftext|>"
    # The token's text is the token, and spaces around it stay.
    both = [*library.encode("a "), end, *library.encode("  b")]
    assert tokenizer.encode("a <|endoftext|>  b") == both and tokenizer.decode(both) == "a   b"


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_what_follows_an_added_token(tmp_path, kind):
    """By itself, or as transformers has it with legacy false: without the space that begins a text."""
    sentencepiece = pytest.importorskip("sentencepiece")

    from mpt_eqx.text import load_tokenizer

    proto, bare = (trained(kind, add_dummy_prefix=prefix) for prefix in (True, False))
    (tmp_path / "tokenizer.model").write_bytes(proto)
    library, without = (sentencepiece.SentencePieceProcessor(model_proto=content) for content in (proto, bare))
    assert library.encode("the") != without.encode("the")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": library.get_piece_size()}))
    for legacy, after in ((None, library), (True, library), (False, without)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
        pieces = [piece.replace("\u2581", " ") for piece in after.encode("key", out_type=str)]
        tokenizer = load_tokenizer(tmp_path)
        ids = tokenizer.encode("the<x>key")
        first = library.encode("the")
        assert ids[: len(first) + 1] == [*first, library.get_piece_size()]
        assert "".join(library.id_to_piece(i) for i in ids[len(first) + 1 :]) == "".join(pieces).replace(" ", "\u2581")
        assert tokenizer.encode("the key") == library.encode("the key")


def test_what_a_class_adds_to_every_text(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")

    from mpt_eqx.text import load_tokenizer

    (tmp_path / "tokenizer.model").write_bytes(trained("bpe"))
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    plain, begin, end = library.encode("the key"), library.bos_id(), library.eos_id()
    for settings, ids in (
        ({}, plain),
        ({"tokenizer_class": "LlamaTokenizer"}, [begin, *plain]),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False, "add_eos_token": True}, [*plain, end]),
        ({"tokenizer_class": "SEABPETokenizer"}, plain),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert load_tokenizer(tmp_path).encode("the key") == ids


KNOWN = {name: entry for name, entry in census.CENSUS["tokenizers"].items() if "." in (entry["reads"] or "")}


@pytest.mark.parametrize("name", KNOWN)
def test_a_tokenizer_of_a_public_checkpoint(tmp_path, name):
    """As the census has it: the files, the special tokens, and code, which is not run."""
    import tokenizers

    from mpt_eqx import SHIPPED_MODEL
    from mpt_eqx.text import load_tokenizer

    entry = KNOWN[name]
    named = list(entry["special"]) or ["<|endoftext|>"]
    end = "<|endoftext|>"
    if entry["reads"] == "tokenizer.json":
        backend = tokenizers.Tokenizer.from_file(str(SHIPPED_MODEL / "tokenizer.json"))
        backend.add_special_tokens(named)
        backend.save(str(tmp_path / "tokenizer.json"))
    else:
        rest = [token for token in named if token not in (end, "<unk>", "<|unk|>", "<|pad|>")]
        pieces = {"eos_piece": end, "eos_id": 1, "unk_id": 0, "bos_id": -1, "pad_id": 3, "control_symbols": rest}
        pieces |= {"unk_piece": next(token for token in named if "unk" in token), "pad_piece": "<|pad|>"}
        pieces |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        (tmp_path / entry["reads"]).write_bytes(trained(entry["kind"].split()[-1].lower(), **pieces))
    settings = {"tokenizer_class": entry["class"], "eos_token": end, "additional_special_tokens": named}
    for file in entry["files"]:
        if file.endswith(".py"):
            (tmp_path / file).write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
        elif file != entry["reads"]:
            (tmp_path / file).write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token_ids == tuple(tokenizer.ids_of([end])) and not (tmp_path / "run").exists()
    for token in named:
        one = tokenizer.encode(token)
        assert one == tokenizer.ids_of([token]) and tokenizer.decode(one) == ""
        assert tokenizer.encode(f"x{token}")[-1:] == one
    text = "def f(x):\n    return x"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture
def two_files(tmp_path):
    """The shipped tokenizer as GPT-2 kept it, and its directory."""
    from mpt_eqx import SHIPPED_MODEL
    from mpt_eqx.text import load_tokenizer

    model = json.loads((SHIPPED_MODEL / "tokenizer.json").read_text())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    names = {"eos_token": "<|endoftext|>", "pad_token": {"content": "<absent>"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    return load_tokenizer(SHIPPED_MODEL), tmp_path


def test_vocab_json_and_merges_txt(two_files):
    from mpt_eqx.text import load_tokenizer

    whole, directory = two_files
    tokenizer = load_tokenizer(directory)
    for text in (*TEXTS, "a  b <|endoftext|>", CODE):
        ids = whole.encode(text)
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == whole.decode(ids)
    assert tokenizer.eos_token_ids == whole.eos_token_ids == (0,) and tokenizer.vocab_size == whole.vocab_size
    spaced = {"add_prefix_space": True, "add_bos_token": True, "bos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(spaced))
    assert load_tokenizer(directory).encode("a") == [0, *whole.encode(" a")]


def test_tokens_that_other_files_add(two_files):
    from mpt_eqx.text import load_tokenizer

    whole, directory = two_files
    size = whole.vocab_size
    (directory / "added_tokens.json").write_text(json.dumps({"<b>": size + 1, "<a>": size}))
    decoder = {f"{size + 2}": {"content": "<c>", "special": True, "rstrip": True}}
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    for _ in range(2):  # beside vocab.json, and beside tokenizer.json
        tokenizer = load_tokenizer(directory)
        assert tokenizer.vocab_size == size + 3
        ids = [size, *whole.encode("x"), size + 1, size + 2, *whole.encode("y")]
        assert tokenizer.encode("<a>x<b><c>  y") == ids and tokenizer.decode(ids) == "<a>x<b>y"
        (directory / "tokenizer.json").write_text(whole._backend.to_str())


def test_an_added_token_may_be_any_text(two_files):
    from mpt_eqx.text import load_tokenizer

    whole, directory = two_files
    (directory / "added_tokens.json").write_text(json.dumps({"\n\n": 4096, "\x00": 4097, "x" * 2000: 4098}))
    ids = load_tokenizer(directory).encode("a\n\n\x00" + "x" * 2000)
    assert ids == [*whole.encode("a"), 4096, 4097, 4098]


def test_ids_are_those_that_transformers_gives(two_files):
    """Recorded with transformers 5.24, from the same files with tokenizer_class GPT2Tokenizer or GPTNeoXTokenizer."""
    from mpt_eqx.text import load_tokenizer

    whole, directory = two_files
    flags = {"special": True, "rstrip": True, "lstrip": False, "single_word": False, "normalized": False}
    decoder = {"4096": {"content": "<a>"}, "4097": {"content": "<b>"}, "4098": {"content": "<c>", **flags}}
    settings = {"eos_token": "<|endoftext|>", "additional_special_tokens": ["return"], "added_tokens_decoder": decoder}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    for _ in range(2):  # beside vocab.json, and beside tokenizer.json
        tokenizer = load_tokenizer(directory)
        ids = tokenizer.encode("<a>x<b><c>  y <|endoftext|> def return")
        assert ids == [4096, 88, 4097, 4098, 89, 221, 0, 445, 221, 1363] and tokenizer.decode(ids) == "<a>x<b>y  def "
        (directory / "tokenizer.json").write_text(whole._backend.to_str())


@examples(60)
@given(st.sampled_from(["vocab.json", "merges.txt", "spiece.model", "added_tokens.json"]), st.data())
def test_damaged_files_give_one_error_or_a_tokenizer(damaged, name, data):
    from mpt_eqx import MPTError
    from mpt_eqx.text import load_tokenizer

    directory, contents = damaged
    for file in ("spiece.model", "vocab.json", "merges.txt", "added_tokens.json"):
        (directory / file).unlink(missing_ok=True)
    for file in ("vocab.json", "merges.txt") if name in ("vocab.json", "merges.txt") else ("spiece.model",):
        (directory / file).write_bytes(contents[file])
    content = bytearray(contents[name])
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    (directory / name).write_bytes(content[: data.draw(st.sampled_from([None, -1, len(content) // 2]))])
    try:
        tokenizer = load_tokenizer(directory)
        tokenizer.decode(tokenizer.encode("the key 日本"))
    except MPTError:
        pass


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A directory, and the content of files of tokenizers, to be damaged."""
    pytest.importorskip("sentencepiece")
    model = trained("bpe")
    letters = {"a": 0, "b": 1, "t": 2, "h": 3, "e": 4, "th": 5, "the": 6, "k": 7, "y": 8}
    contents = {
        "vocab.json": json.dumps(letters).encode(),
        "merges.txt": b"#version: 0.2\nt h\nth e\n",
        "spiece.model": model,
        "added_tokens.json": json.dumps({"<x>": 340, "<y>": 341}).encode(),
    }
    return tmp_path_factory.mktemp("damaged"), contents


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"merges.txt": None}, "expected tokenizer.json, or vocab.json and merges.txt .*no merges.txt; convert"),
        ({"tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}}, "found .* tokenizer_class 'BertTokenizer'"),
        ({"merges.txt": "a b c"}, "vocab.json: expected a working tokenizer, found one that fails .*[Mm]erges"),
        ({"merges.txt": "qq zz"}, "expected a working tokenizer, found one that fails .*out of vocabulary"),
        ({"vocab.json": "[1]"}, "expected a working tokenizer, found one that fails"),
        ({"vocab.json": {"a": -1}}, "expected a working tokenizer, found one that fails"),
        ({"added_tokens.json": {"<a>": 9999}}, "'<a>' with id 9999, which would become 4096"),
        ({"added_tokens.json": {"<a>": 4096, "<b>": 4096}}, "one added token with id 4096, found '<a>' and '<b>'"),
        ({"added_tokens.json": {"return": 4096}}, "expected id .* for the token 'return', as its vocabulary .*4096 in"),
        ({"added_tokens.json": {"<a>": None}}, "expected a whole number for the added token '<a>', found None"),
        ({"added_tokens.json": "["}, "added_tokens.json: expected JSON, found something else"),
        (
            {
                "added_tokens.json": {"<a>": 4096},
                "tokenizer_config.json": {"added_tokens_decoder": {"4097": {"content": "<a>"}}},
            },
            "expected one id for the added token '<a>', found 4096 in added_tokens.json and 4097",
        ),
        ({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, "expected added_tokens_decoder as an object"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "<a>"}}}},
            "expected a whole number for the added token '<a>', found 'x'",
        ),
    ],
)  # fmt: skip
def test_files_of_a_tokenizer_that_are_wrong(two_files, files, message):
    from mpt_eqx import MPTError
    from mpt_eqx.text import load_tokenizer

    for name, content in files.items():
        if content is None:
            (two_files[1] / name).unlink()
        else:
            (two_files[1] / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(MPTError, match=message):
        load_tokenizer(two_files[1])


def test_a_large_vocabulary_is_refused(two_files, monkeypatch):
    from mpt_eqx import CheckpointError
    from mpt_eqx.text import byte_bpe, load_tokenizer

    monkeypatch.setattr(byte_bpe, "MAX_BYTES", 10)
    with pytest.raises(CheckpointError, match="vocab.json: expected at most 10 bytes, found"):
        load_tokenizer(two_files[1])


def test_without_the_wheel(tmp_path, monkeypatch):
    from mpt_eqx import MPTError
    from mpt_eqx.text import load_tokenizer

    (tmp_path / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        MPTError, match=r"needs its library; install it with pip install 'mpt_eqx\[text,sentencepiece\]'"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_in_gguf(tmp_path, kind):
    """With the scores, types and settings in the header, the ids are those of the model it was made from."""
    import sentencepiece

    from mpt_eqx.text import load_tokenizer

    library = sentencepiece.SentencePieceProcessor(model_proto=trained(kind, **KINDS["bpe"]))
    numbers = range(library.get_piece_size())

    def kind_of(i):
        if library.id_to_piece(i) in ("<|user|>", "\n"):
            return 4
        return 2 if library.is_unknown(i) else 3 if library.is_control(i) else 6 if library.is_byte(i) else 1

    def write(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([library.id_to_piece(i) for i in numbers])
        writer.add_token_scores([library.get_score(i) for i in numbers])
        writer.add_token_types([kind_of(i) for i in numbers])
        writer.add_eos_token_id(library.eos_id())

    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", write))
    for text in (*TEXTS, "the key <|user|> raises\nan error"):
        assert tokenizer.encode(text) == library.encode(text)
    assert tokenizer.eos_token_ids == (library.eos_id(),)


def test_nothing_is_left_of_what_was_written_out(bpe, tmp_path, monkeypatch):
    import tempfile

    from mpt_eqx.text import load_tokenizer

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tokenizer = load_tokenizer(bpe[0])
    assert len(list(tmp_path.iterdir())) == 1
    del tokenizer
    assert list(tmp_path.iterdir()) == []
