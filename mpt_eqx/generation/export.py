"""export_model: prefill and decode as StableHLO programs that run without this library, and the weights beside them."""

import dataclasses
import functools
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from mpt_eqx.checkpoint.atomic import replace_file, write_synced
from mpt_eqx.checkpoint.formats.safetensors import write_safetensors
from mpt_eqx.checkpoint.names import named_leaves, with_leaves
from mpt_eqx.checkpoint.save import to_write
from mpt_eqx.errors import CheckpointError, GenerationError, ShardingError
from mpt_eqx.generation.buckets import DECODE_CHUNK
from mpt_eqx.generation.decode import read_sequence
from mpt_eqx.generation.sampling_params import SamplingOptions, SamplingParams, check_options
from mpt_eqx.generation.state import DecodeState, one_row, scan_row
from mpt_eqx.generation.steps import chosen_step
from mpt_eqx.generation.validate import check_count, check_model
from mpt_eqx.model import MPT
from mpt_eqx.model.leaves import leaf_name, named_arrays
from mpt_eqx.model.mpt import max_len_hint
from mpt_eqx.ops.switches import host_function

T = TypeVar("T")

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
CARD, WEIGHTS = "card.json", "weights.safetensors"
SIGNATURES = {
    "prefill": (("weights", "tokens", "lengths"), ("state",)),
    "decode": (("weights", "options", "key", "state"), ("state", "output")),
}
WINDOW = (
    "By JAX's promise a program runs with releases of JAX up to six months after the one that wrote it, and with those "
    "of up to three weeks before it."
)


@host_function
def export_model(
    model: MPT,
    directory: str | Path,
    *,
    prompt_length: int,
    max_new_tokens: int,
    batch_size: int = 1,
    platforms: Sequence[str] = ("cpu",),
    **options: Unpack[SamplingOptions],
) -> None:
    """Writes generation as two programs that run without this library, by `jax.export`, and the weights beside them.

    The directory gets weights.safetensors, the programs prefill.jax and decode.jax, and card.json, which lists what
    they take and return, in order. `examples/run_exported.py` runs them with JAX, NumPy, safetensors and flatbuffers
    alone. The tokens are those of `generate` with the same options and key, where rounding decides nothing: the
    programs are plain XLA, without the CPU kernel. An earlier artefact in the directory is replaced; the card is
    written last.

    The programs are:

    * `prefill(weights, tokens Int["B T"], lengths Int["B"]) -> state`, with prompts padded on the right;
    * `decode(weights, options, key, state) -> state, output`, which decodes up to eight more tokens of each row:
      `output` has their `tokens`, their `logprobs` as in `Decoded`, and `counts`, how many of each row count.
      `state["done"]` says which rows have ended. Log-probabilities are NaN also where ids or lengths are not valid.

    Args:
        model: the model, on one device; also a quantised one, or with adapters.
        directory: where to write; made if it does not exist.
        prompt_length: T, the tokens of the longest prompt, ≥ 1.
        max_new_tokens: for how many new tokens there is room, ≥ 1.
        batch_size: B, ≥ 1.
        platforms: what the programs run on: "cpu", "cuda", "rocm", "tpu".
        **options: as in `generate`: values that the card has as defaults. They are inputs of `decode`.

    Raises:
        GenerationError: an argument is not valid, prompt and new tokens exceed max_seq_len, or flatbuffers is missing
            (extra `export`).
        ShardingError: the model is sharded over a mesh.
        CheckpointError: the directory cannot be written.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise GenerationError(
            "export_model needs the flatbuffers library; install it with pip install 'mpt_eqx[export]'"
        )
    model = check_model(model)
    if model.layout is not None:
        raise ShardingError("model: expected one on a single device, found one on a mesh; load it without mesh=")
    check_count("prompt_length", prompt_length)
    check_count("batch_size", batch_size)
    params = check_options(model.config, max_new_tokens, options, caller="export_model")
    if (total := prompt_length + max_new_tokens) > model.config.max_seq_len:
        raise GenerationError(
            f"prompt_length: {prompt_length} tokens and max_new_tokens={max_new_tokens} exceed "
            f"max_seq_len={model.config.max_seq_len}; {max_len_hint(model.config, total)}"
        )
    if isinstance(platforms, str) or not platforms or not set(platforms) <= set(PLATFORMS):
        raise GenerationError(f"platforms: expected some of {', '.join(PLATFORMS)}, in a list, found {platforms!r}")
    sizes = {"batch_size": batch_size, "prompt_length": prompt_length, "max_new_tokens": max_new_tokens}
    programs = _programs(model, params, sizes, tuple(platforms))
    tensors = [to_write(name, [leaf]) for name, leaf in named_leaves(model).items()]
    files: dict[str, Callable[[Path], None]] = {WEIGHTS: functools.partial(write_safetensors, tensors=tensors)}
    for name, program in programs.items():
        files[f"{name}.jax"] = functools.partial(write_synced, content=bytes(program.serialize()))
    card = json.dumps(_card(programs, params, sizes), indent=1) + "\n"
    files[CARD] = functools.partial(write_synced, content=card.encode())
    directory = Path(directory)
    try:
        (directory / CARD).unlink(missing_ok=True)
        for name, write in files.items():
            replace_file(directory / name, write)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written ({error})") from error


def _programs(model: MPT, params: SamplingParams, sizes: dict[str, int], platforms: tuple[str, ...]) -> dict[str, Any]:
    """Returns the two programs by name, as `jax.export` has them."""
    from jax import export

    rows, room = sizes["batch_size"], sizes["max_new_tokens"]
    tokens, lengths = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((rows, sizes["prompt_length"]), (rows,)))
    like = jax.eval_shape(functools.partial(_prefill, model, room), tokens, lengths)

    # Dicts, because JAX knows them by itself; no other library is there when the programs are read.
    def prefill(weights: dict[str, Array], tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> dict[str, Array]:
        return dict(named_arrays(_prefill(with_leaves(model, weights), room, tokens, lengths)))

    def decode(
        weights: dict[str, Array], options: dict[str, Array], key: UInt32[Array, "2"], state: dict[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        given = _filled(params, options)
        given = eqx.tree_at(lambda p: p.max_new_tokens, given, jnp.minimum(given.max_new_tokens, room))
        after, output = _decode(with_leaves(model, weights), given, key, _filled(like, state), min(DECODE_CHUNK, room))
        return dict(named_arrays(after)), output

    def exported(function: Callable[..., Any], *args: Any) -> Any:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        # What a program does not use stays among its inputs, so that they are those that the card lists.
        return export.export(jax.jit(function, keep_unused=True), platforms=platforms)(*shapes)

    weights, options, state = named_leaves(model), dict(named_arrays(params)), dict(named_arrays(like))
    key = jax.ShapeDtypeStruct((2,), np.uint32)
    return {
        "prefill": exported(prefill, weights, tokens, lengths),
        "decode": exported(decode, weights, options, key, state),
    }


def _prefill(model: MPT, room: int, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> DecodeState:
    """Returns the state of B rows, each with an axis of one, after their prompts."""

    def row(tokens: Int[Array, " T"], length: Int[Array, ""]) -> DecodeState:
        size, vocab_size = tokens.shape[0], model.config.vocab_size
        known = (tokens >= 0) & (tokens < vocab_size) | (jnp.arange(size) >= length)
        valid = (length >= 1) & (length <= size) & jnp.all(known)
        state = read_sequence(model, tokens, length, {}, max_new_tokens=room, as_bits=model.dtype.itemsize == 2)
        return dataclasses.replace(state, not_finite=jnp.where(valid, state.not_finite, 0))

    return jax.vmap(row)(tokens, lengths)


def _decode(
    model: MPT, params: SamplingParams, key: UInt32[Array, "2"], state: DecodeState, steps: int
) -> tuple[DecodeState, dict[str, Array]]:
    """Returns the state after `steps` more tokens of each row, and what `decode` of the artefact returns."""
    typed = jax.random.wrap_key_data(key, impl="threefry2x32")
    params = jax.tree.map(lambda x: x[None], params)

    def row(state: DecodeState, number: Int[Array, ""]) -> tuple[DecodeState, dict[str, Array]]:
        def one(state: DecodeState, _: None) -> tuple[DecodeState, tuple[Array, Array, Array]]:
            after, output = chosen_step((model, params, typed, ()), state, False, number[None], one_row)
            wrong = (after.not_finite[0] >= 0) | (after.nothing_left[0] >= 0)
            return after, (output.tokens[0], jnp.where(wrong, jnp.nan, output.logprobs[0]), ~state.done[0])

        state, (tokens, logprobs, counts) = scan_row(one, state, None, steps)
        return state, {"tokens": tokens, "logprobs": logprobs, "counts": jnp.sum(counts, dtype=jnp.int32)}

    return jax.vmap(row)(state, jnp.arange(len(state.tokens)))


def _filled(tree: T, arrays: Mapping[str, Array]) -> T:
    """Returns the tree with the arrays of these names."""
    filled: T = jax.tree_util.tree_map_with_path(lambda path, _: arrays[leaf_name(path)], tree)
    return filled


def _card(programs: Mapping[str, Any], params: SamplingParams, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Returns what card.json says."""
    first = programs["prefill"]
    return {
        "format": "mpt_eqx export 1",
        "jax": jax.__version__,
        "calling_convention_version": first.calling_convention_version,
        "platforms": list(first.platforms),
        "compatibility": WINDOW,
        **sizes,
        "steps": min(DECODE_CHUNK, sizes["max_new_tokens"]),
        "key": "the two uint32 of a key of threefry2x32; row i draws its n-th token with fold_in(fold_in(key, i), n)",
        "options": {name: {"dtype": x.dtype.name, "value": x.tolist()} for name, x in named_arrays(params)},
        "programs": {name: _described(name, program) for name, program in programs.items()},
    }


def _described(name: str, program: Any) -> dict[str, Any]:
    """Returns what the card says of a program: its file, what it takes and returns in order, and its custom calls."""
    args, _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    results = jax.tree.unflatten(program.out_tree, program.out_avals)
    inputs, outputs = SIGNATURES[name]
    return {
        "file": f"{name}.jax",
        "custom_calls": sorted(set(re.findall(r"stablehlo\.custom_call @([\w.$]+)", str(program.mlir_module())))),
        "inputs": _listed(inputs, args),
        "outputs": _listed(outputs, results if len(outputs) > 1 else (results,)),
    }


def _listed(names: Sequence[str], trees: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {"name": f"{name}.{inner}".rstrip("."), "shape": list(x.shape), "dtype": x.dtype.name}
        for name, tree in zip(names, trees, strict=True)
        for inner, x in named_arrays(tree)
    ]
