"""The arguments of `generate` that a checkpoint's generation_config.json asks for."""

from pathlib import Path
from typing import Any

from mpt_eqx.checkpoint.hub import find_checkpoint
from mpt_eqx.config.json_file import read_json_object
from mpt_eqx.errors import GenerationError

COUNTS = ("top_k", "no_repeat_ngram_size", "min_new_tokens", "max_new_tokens", "num_return_sequences")
WARPERS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
SUPPORTED = ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "max_new_tokens", "num_return_sequences")

NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "top_h": (),
    "diversity_penalty": (0,),
    "min_length": (0,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1,),
    "renormalize_logits": (False,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "sequence_bias": ({},),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "dola_layers": (),
    "stop_strings": ([],),
}
"""Other keys that change the tokens in transformers, with the values that change nothing; null never does.

`max_length` is not among them: max_new_tokens takes its place here.
"""


def generation_defaults(source: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """Returns the arguments of `generate` that a checkpoint's generation_config.json asks for.

    The tokens of end and padding may stand in config.json instead, where the first file names none.

    Arguments of your own override them in
    `generate(model, prompts, **{**generation_defaults(source), "max_new_tokens": 40})`. Only what the file says is
    returned: without `do_sample` that is greedy decoding, whatever temperature the file has, and transformers' own
    default of top_k 50 is not added.

    Args:
        source: directory, weight file or Hub repository id, as in `from_pretrained`.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        GenerationError: the file asks for something that `generate` does not do, or a value is no number.
        CheckpointError: no checkpoint is there, or the file is no JSON object.
    """
    place = find_checkpoint(source, revision=revision, with_weights=False)
    directory = place.parent if place.is_file() else place
    path, config = directory / "generation_config.json", directory / "config.json"
    asked = {key: value for key, value in read_json_object(path).items() if value is not None} if path.is_file() else {}
    if missing := [key for key in ("eos_token_id", "pad_token_id") if key not in asked and config.is_file()]:
        said = read_json_object(config)
        asked |= {key: said[key] for key in missing if said.get(key) not in (None, -1)}
    if not asked and not path.is_file():
        return {}
    for key, neutral in NEUTRAL.items():
        if key in asked and asked[key] not in neutral:
            instead = "call beam_search" if key == "num_beams" else "take it out of the file"
            raise GenerationError(f"{path}: {key}={asked[key]!r:.60} is not something that generate does; {instead}")
    sampled = asked.get("do_sample", False)
    if not isinstance(sampled, bool):
        raise GenerationError(f"{path}: do_sample: expected true or false, found {sampled!r:.60}")
    asked.setdefault("temperature", 1.0)
    names = (*WARPERS, *SUPPORTED) if sampled else SUPPORTED
    defaults: dict[str, Any] = {} if sampled else {"temperature": 0.0}
    for name in names:
        if name in asked:
            kind, what = (int, "a whole number") if name in COUNTS else (int | float, "a number")
            if isinstance(asked[name], bool) or not isinstance(asked[name], kind):
                raise GenerationError(f"{path}: {name}: expected {what}, found {asked[name]!r:.60}")
            defaults[name] = asked[name]
    if "eos_token_id" in asked:
        ends = asked["eos_token_id"]
        defaults["eos_token_ids"] = tuple(ends) if isinstance(ends, list) else (ends,)
    if "pad_token_id" in asked:
        defaults["pad_token_id"] = asked["pad_token_id"]
    for token in (*defaults.get("eos_token_ids", ()), defaults.get("pad_token_id", 0)):
        if isinstance(token, bool) or not isinstance(token, int):
            raise GenerationError(f"{path}: eos_token_id, pad_token_id: expected token ids, found {token!r:.60}")
    # What transformers writes for "off".
    for name, off in (("top_k", 0), ("no_repeat_ngram_size", 0)):
        if defaults.get(name) == off:
            del defaults[name]
    return defaults
