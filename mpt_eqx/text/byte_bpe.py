"""Byte-level BPE as GPT-2 kept it: vocab.json and merges.txt, without a tokenizer.json."""

from pathlib import Path
from typing import TYPE_CHECKING

from mpt_eqx.checkpoint.formats.gguf_vocabulary import GPT2_CLASSES
from mpt_eqx.errors import CheckpointError, printable
from mpt_eqx.text.added_tokens import add_named_tokens, read_settings
from mpt_eqx.text.checks import backend_errors

if TYPE_CHECKING:
    import tokenizers

VOCABULARY, MERGES = "vocab.json", "merges.txt"
MAX_BYTES = 64 * 2**20


def load_byte_bpe(directory: Path) -> "tokenizers.Tokenizer":
    """Returns the tokenizer of vocab.json and merges.txt, with the tokens that other files add.

    Raises:
        CheckpointError: the files are damaged, or of another kind of tokenizer.
        ConfigError: a file beside them is no JSON object.
    """
    import tokenizers

    settings = read_settings(directory)
    kind = settings.get("tokenizer_class") or "GPT2Tokenizer"
    if not (directory / MERGES).is_file() or kind not in GPT2_CLASSES:
        found = f"tokenizer_class {printable(repr(kind))}" if (directory / MERGES).is_file() else f"no {MERGES}"
        raise CheckpointError(
            f"{directory}: expected tokenizer.json, or {VOCABULARY} and {MERGES} of a tokenizer like GPT-2's, found "
            f"{VOCABULARY} and {found}; convert it once with transformers: "
            f"AutoTokenizer.from_pretrained(directory).save_pretrained(directory) writes tokenizer.json"
        )
    for name in (VOCABULARY, MERGES):
        if (size := (directory / name).stat().st_size) > MAX_BYTES:
            raise CheckpointError(f"{directory / name}: expected at most {MAX_BYTES} bytes, found {size}")
    with backend_errors(str(directory / VOCABULARY), CheckpointError):
        model = tokenizers.models.BPE.from_file(str(directory / VOCABULARY), str(directory / MERGES))
    backend = tokenizers.Tokenizer(model)
    spaced = settings.get("add_prefix_space") is True
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    backend.decoder = tokenizers.decoders.ByteLevel()
    add_named_tokens(backend, directory)
    start = settings.get("bos_token")
    start = start.get("content") if isinstance(start, dict) else start
    if settings.get("add_bos_token") is True and isinstance(start, str) and backend.token_to_id(start) is not None:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[start, "$A"], special_tokens=[(start, backend.token_to_id(start))]
        )
    return backend
