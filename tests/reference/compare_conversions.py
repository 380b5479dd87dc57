"""What is written for transformers and llama.cpp, in those programs themselves; not part of the suite.

Needs the extras `reference` and `bench`; run with `just reference`. Without one of the programs its tests are skipped.
"""

import ctypes
import hashlib
import typing
from pathlib import Path

import census
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from test_programs import RECORDED, THEIR_ATTENTION, THEIR_TYPES, rows
from test_tokenizers import KINDS, TEXTS, trained

from mpt_eqx import SHIPPED_MODEL, CheckpointError, from_pretrained, score
from mpt_eqx.checkpoint import convert
from mpt_eqx.text import load_tokenizer

CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
CASES = [name for name in CASES if "train" not in name and name not in ("hf_ignored_keys",)]
ENTRIES = sorted({e["config"] for e in census.REPOSITORIES.values() if e["config"] and e["outcome"] == "runs"})
# llama.cpp's GELU is the tanh formula, read from a table of float16; logits here have a standard deviation of 3.
GELU = 0.02
# The largest difference of a logit to float32 on the shipped model, whose logits have a standard deviation of 3.2.
TYPES = {"F16": 0.1, "BF16": 0.2, "Q8_0": 1.0, "Q4_0": 10.0}


def places(directory, of):
    """The golden cases, and a small checkpoint of each entry of the census."""
    if of in CASES:
        return GOLDEN / of
    weights = next(e["weights"] for e in census.REPOSITORIES.values() if e["config"] == of)
    (directory / "source").mkdir()
    census.write(directory / "source", of, weights)
    return directory / "source"


def converted(source, target, program, **options):
    """Returns whether all was kept; nothing where nothing can be written."""
    try:
        convert(source, target, program=program, **options)
    except CheckpointError as error:
        assert "computes as it is" in str(error) or "no place for" in str(error), error
        if "no place for" in str(error):
            pytest.skip(f"{program} has no such model")
        convert(source, target, program=program, lossy=True, **options)
        return False
    return True


def logits_of(place, tokens):
    return np.asarray(from_pretrained(place, dtype="float32")(jnp.asarray(tokens)))


@pytest.mark.parametrize("name", [*CASES, *ENTRIES])
def test_transformers_computes_what_is_written_for_it(name, tmp_path):
    """The model itself where nothing was refused, and otherwise the one that the lossy file says."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    source = places(tmp_path, name)
    whole = converted(source, tmp_path / "m", "transformers", dtype="float32")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(report.values()), report
    tokens = np.arange(20) % theirs.config.vocab_size
    with torch.no_grad():
        found = theirs(torch.from_numpy(tokens)[None]).logits[0].numpy()
    np.testing.assert_allclose(logits_of(source if whole else tmp_path / "m", tokens), found, atol=1e-4, rtol=0)


def test_the_recorded_types_are_those_of_transformers_classes():
    configuration = pytest.importorskip("transformers.models.mpt.configuration_mpt")
    for kind, recorded in (
        (configuration.MptConfig, THEIR_TYPES),
        (configuration.MptAttentionConfig, THEIR_ATTENTION),
    ):
        for key, expected in recorded.items():
            theirs = kind.__annotations__[key]
            names = {
                str if typing.get_origin(one) is typing.Literal else typing.get_origin(one) or one
                for one in typing.get_args(theirs) or (theirs,)
            }
            literal = typing.get_origin(theirs) is typing.Literal
            assert ({str} if literal else names) == set(typing.get_args(expected) or (expected,)), key


class Llama:
    """A GGUF file in llama.cpp."""

    def __init__(self, path, vocab_only=False):
        import llama_cpp as ll

        self.ll, options = ll, ll.llama_model_default_params()
        options.vocab_only = vocab_only
        self.model = ll.llama_model_load_from_file(str(path).encode(), options)
        assert self.model, f"llama.cpp does not load {path}"
        self.vocab = ll.llama_model_get_vocab(self.model)

    def logits(self, tokens):
        ll, params = self.ll, self.ll.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 512
        params.type_k = params.type_v = 0  # float32
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = 0
        context = ll.llama_init_from_model(self.model, params)
        batch = ll.llama_batch_init(512, 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = (
                int(token),
                i,
                1,
                0,
                1,
            )
        assert ll.llama_decode(context, batch) == 0
        size = ll.llama_vocab_n_tokens(self.vocab)
        address = ctypes.addressof(ll.llama_get_logits(context).contents)
        array = (ctypes.c_float * (size * len(tokens))).from_address(address)
        found = np.ctypeslib.as_array(array).reshape(len(tokens), size).copy()
        ll.llama_batch_free(batch)
        ll.llama_free(context)
        return found

    def ids(self, text):
        data, ids = text.encode(), (self.ll.llama_token * 4096)()
        count = self.ll.llama_tokenize(self.vocab, data, len(data), ids, 4096, True, True)
        return list(ids[:count])


@pytest.mark.parametrize("name", [*CASES, *ENTRIES])
def test_llama_cpp_computes_what_is_written_for_it(name, tmp_path):
    pytest.importorskip("llama_cpp")
    source = places(tmp_path, name)
    whole = converted(source, tmp_path / "m.gguf", "llama.cpp", type="F32")
    if from_pretrained(tmp_path / "m.gguf").config.attn_config.qk_ln:
        pytest.skip("llama.cpp ends in a failed assertion")
    tokens = np.arange(20) % 60
    found = Llama(tmp_path / "m.gguf").logits(tokens)
    wanted = logits_of(source if whole else tmp_path / "m.gguf", tokens)
    assert np.abs(found - wanted).max() < GELU * max(1, wanted.std() / 3)


def test_how_far_llama_cpp_is_off(tmp_path):
    """On the shipped model; the figures are those of docs/numerics.md. Shown with -s."""
    pytest.importorskip("llama_cpp")
    text = (SHIPPED_MODEL / "README.md").read_text()
    tokens = load_tokenizer(SHIPPED_MODEL).encode(text)[:500]
    model = from_pretrained(SHIPPED_MODEL, dtype="float32")
    wanted = np.asarray(model(jnp.asarray(tokens)))
    (nats,) = score(model, [tokens])

    def loss(logits):
        logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        rows = np.arange(len(tokens) - 1)
        return -np.mean((logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[rows, tokens[1:]])

    assert abs(loss(wanted) + nats.total / (len(tokens) - 1)) < 1e-4
    print(f"\nours: {loss(wanted):.4f} nats a token, logits' std {wanted.std():.2f}")
    for kind, most in {"F32": 0.05, **TYPES}.items():
        convert(SHIPPED_MODEL, tmp_path / "m.gguf", program="llama.cpp", type=kind)
        found = Llama(tmp_path / "m.gguf").logits(tokens)
        off = np.abs(found - wanted)
        same = np.abs(found - logits_of(tmp_path / "m.gguf", tokens))
        print(
            f"{kind}: off by {off.max():.2g} at most, {off.mean():.2g} in the mean; {loss(found) - loss(wanted):+.4f} "
            f"nats; {same.max():.2g} and {same.mean():.2g} from ours on the same file"
        )
        assert off.max() < most


@pytest.mark.parametrize("kind", ["the shipped one", "unigram", "bpe"])
def test_llama_cpp_makes_the_same_ids(kind, tmp_path):
    pytest.importorskip("llama_cpp")
    from test_gguf_vocabulary import checkpoint

    source = SHIPPED_MODEL
    if kind in KINDS:
        source = checkpoint(tmp_path / "m", {"spiece.model": trained(kind.split()[0], **KINDS[kind])})
    convert(source, tmp_path / "m.gguf", program="llama.cpp", lossy=True)
    theirs, ours = Llama(tmp_path / "m.gguf", vocab_only=True), load_tokenizer(source)
    # What it does otherwise with SentencePiece models is refused by name: bytes, and symbols such as a newline.
    for text in ["the function returns", "a dictionary of values", *([] if kind in KINDS else TEXTS[:6])]:
        assert theirs.ids(text) == ours.encode(text), text


@pytest.mark.parametrize("kind", RECORDED)
def test_blocks_are_recorded_from_ggml(kind):
    import gguf

    llama_cpp = pytest.importorskip("llama_cpp")
    (path,) = (Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so")
    quantize = getattr(ctypes.CDLL(str(path)), f"quantize_row_{kind.lower()}_ref")
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    large = np.random.default_rng(1).standard_normal((2048, 1024)).astype(np.float32)
    for values in (rows(), large):
        out = np.zeros(values.size // 32 * size, np.uint8)
        quantize(*(a.ctypes.data_as(ctypes.c_void_p) for a in (values, out)), ctypes.c_int64(values.size))
        assert out.tobytes() == gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).tobytes()
        assert len(values) > 8 or hashlib.sha256(out.tobytes()).hexdigest() == RECORDED[kind]
