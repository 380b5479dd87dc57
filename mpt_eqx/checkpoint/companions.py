"""What a checkpoint says about text, in files beside its weights and in keys of its config.json.

None of it changes the model, and all of it is needed by whoever writes text with the model: so it is kept wherever a
checkpoint is made from another.
"""

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpt_eqx.checkpoint.checkpoint_files import CONFIG, files_of, weight_names
from mpt_eqx.checkpoint.formats.gguf_tokenizer import read_gguf_tokenizer
from mpt_eqx.config.json_file import read_json_object
from mpt_eqx.errors import CheckpointError

PATTERNS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "tokenizer.model.*", "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model"),
    *("spm.model", "*.tiktoken", "normalizer.json", "preprocessor_config.json"),
)
"""The files, as patterns of names. Code of a tokenizer (tokenization_….py) is left behind."""

TOKENIZERS = {
    *("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.model", "spm.model"),
    "sentencepiece.bpe.model",
}
"""Those that are a tokenizer by themselves."""

TEMPLATES = "additional_chat_templates"
"""The directory in which transformers keeps chat templates besides the first."""

MAX_BYTES = 64 * 2**20  # of one file; the largest tokenizers have 40 MB

TEXT_KEYS = {
    *("bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class", "tokenizer_name"),
    *("prefix", "task_specific_params", "max_length", "min_length", "do_sample", "early_stopping", "num_beams"),
    *("num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
    *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
    *("num_return_sequences", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
}
"""The keys of config.json."""


def read_companions(place: Path) -> dict[str, bytes]:
    """Returns the files about text of a checkpoint, in its directory or in the header of its GGUF file, by name.

    Args:
        place: the directory, or a weight file in it.

    Raises:
        CheckpointError: one cannot be read, or is too large to be one.
    """
    directory = place.parent if place.is_file() else place
    found = {name: path for name, path in files_of(directory).items() if is_companion(name)}
    if (templates := directory / TEMPLATES).is_dir():
        found |= {f"{TEMPLATES}/{name}": path for name, path in files_of(templates).items() if name.endswith(".jinja")}
    try:
        for path in found.values():
            if (size := path.stat().st_size) > MAX_BYTES:
                raise CheckpointError(f"{path}: expected at most {MAX_BYTES} bytes, found {size}; move it away")
        files = {name: path.read_bytes() for name, path in found.items()}
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error})") from None
    return files if TOKENIZERS & files.keys() else {**gguf_files(place), **files}


def gguf_files(place: Path) -> dict[str, bytes]:
    """Returns the files of the tokenizer in the header of a GGUF file; none where the weights are of another format.

    Raises:
        CheckpointError: the header is damaged, or the tokenizer is of an unknown kind.
    """
    path = place
    if place.is_dir():
        names = weight_names(files_of(place))
        path = place / names[0] if len(names) == 1 else place
    return read_gguf_tokenizer(path) if path.is_file() and path.suffix == ".gguf" else {}


def is_companion(name: str) -> bool:
    """Returns whether a file of this name is about text."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS)


def text_keys(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns what the content of a config.json says about text; nothing for None."""
    return {key: value for key, value in (config or {}).items() if key in TEXT_KEYS and value is not None}


def read_text_keys(directory: Path) -> dict[str, Any]:
    """Returns what the config.json in a directory says about text; nothing without one.

    Raises:
        ConfigError: it is no JSON object.
    """
    path = files_of(directory).get(CONFIG)
    return {} if path is None else text_keys(read_json_object(path))
