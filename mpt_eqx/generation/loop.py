"""The loop on the host: prompts are read piece by piece, tokens are made chunk by chunk, the cache grows in between."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key
from tqdm import tqdm

from mpt_eqx.config import MPTConfig
from mpt_eqx.errors import GenerationError
from mpt_eqx.generation.choose import SamplingOptions
from mpt_eqx.generation.decode import Decoded, DecodeState, decode, read, spread
from mpt_eqx.generation.validate import power_of_two
from mpt_eqx.model import MPT
from mpt_eqx.sharding.multihost import assert_same_across_processes

CHUNK = 8
"""Tokens made between two looks of the host."""

PIECES = (256, 128, 32)
"""Tokens of a prompt read at a time: the largest of which more than half is left, else the smallest."""

SMALLEST = 512
"""The smallest cache, in tokens. The next size is four times that, then each twice the one before."""


def chunk_for(chunk: int, max_new_tokens: int) -> int:
    """Returns how many tokens to make at a time: not more than `chunk`, nor many more than there are to make."""
    return min(chunk, power_of_two(max_new_tokens))


def capacity_for(config: MPTConfig, length: int) -> int:
    """Returns the size of the cache for so many tokens: one of a few, so that few are compiled for."""
    size = SMALLEST if length <= SMALLEST else max(4 * SMALLEST, power_of_two(length))
    return min(size, max(config.max_seq_len, length))


def piece_sizes(length: int) -> Iterator[int]:
    """Yields how many tokens of a prompt are read at a time."""
    while length > 0:
        size = next((size for size in PIECES if length > size // 2), PIECES[-1])
        yield size
        length -= size


def read_prompts(
    model: MPT, state: DecodeState, prompts: Sequence[np.ndarray], before: int, progress: tqdm
) -> DecodeState:
    """Returns the state after all prompts.

    Args:
        model: the model.
        state: as many rows, of `before` tokens each. Donated.
        prompts: token ids of each row, of any lengths.
        before: as above.
        progress: counts the tokens of the longest prompt.
    """
    longest = max(map(len, prompts))
    # Behind its prompt a row has its own last token: one that it has not could make NaN of it.
    others = max(prompts, key=len)[:1]
    fillers = [(prompt if len(prompt) else others)[-1:] for prompt in prompts]
    ends = np.asarray([before + len(prompt) for prompt in prompts], np.int32)
    start = 0
    for size in piece_sizes(longest):
        piece = np.empty((len(prompts), size), np.int32)
        for row, prompt, filler in zip(piece, prompts, fillers, strict=True):
            here = prompt[start : start + size]
            row[:] = [*here, *filler.tolist() * (size - len(here))]
        state = read(model, state, *everywhere(model, (piece, ends)))
        # Otherwise the host would be done long before the device, with a copy of the cache waiting for every piece.
        jax.block_until_ready(state.hidden)
        start += size
        progress.update(min(start, longest) - progress.n)
    return state


def everywhere(model: MPT, tree: Any) -> Any:
    """Returns arrays of the host, or of one device, where the devices of the model can read them."""
    return jax.device_put(tree) if model.layout is None else model.layout.replicate(tree)


def agree_on_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuses a call whose arguments are not the same in all processes of its model's mesh.

    It comes before any check of them, which would end one process and leave the others waiting.

    Args:
        arguments: by name, the model among them.

    Raises:
        ShardingError: they differ.
    """
    layout = arguments["model"].layout
    if layout is not None and layout.several_processes:
        left_out = ("model", "prefix", "progress")
        assert_same_across_processes(
            **{name: x for name, x in arguments.items() if name not in left_out and not isinstance(x, Iterator)},
            prefix=len(arguments["prefix"]) if arguments.get("prefix") is not None else 0,
        )


def make_tokens(
    model: MPT,
    state: DecodeState,
    options: SamplingOptions,
    key: Key[Array, ""],
    *,
    length: int,
    max_new_tokens: int,
    chunk: int = CHUNK,
    with_logits: bool = False,
) -> Iterator[Decoded]:
    """Yields the tokens of `chunk` steps at a time, at most max_new_tokens in all, until every row has ended.

    Args:
        model: the model.
        state: after the prompts. Donated.
        options: how to choose.
        key: randomness.
        length: tokens of the longest row so far.
        max_new_tokens: as above.
        chunk: how many steps are made between two looks.
        with_logits: whether to keep the logits of each step.

    Raises:
        GenerationError: the model gave logits that are not finite, or nothing was left to choose from.
    """
    options, key = everywhere(model, (options, key))
    made = 0
    while made < max_new_tokens:
        needed = length + min(made + chunk, max_new_tokens)
        state = with_room(model, state, needed)
        state, decoded = decode((model, options, key), state, chunk, with_logits)
        not_finite, nothing_left, done = jax.device_get((state.not_finite, state.nothing_left, state.done))
        check_finite(not_finite)
        if nothing_left >= 0:
            raise GenerationError(
                f"no token is left to choose from for new token {nothing_left}; loosen no_repeat_ngram_size, "
                f"min_new_tokens or vocab_size"
            )
        last = min(chunk, max_new_tokens - made)
        yield jax.tree.map(lambda x, last=last: x[:last], jax.device_get(decoded))
        made += chunk
        if done.all():
            return


def check_finite(not_finite: int) -> None:
    """Refuses logits that are not finite; −1 stands for none, else for the new token they would have chosen."""
    if not_finite >= 0:
        raise GenerationError(
            f"the logits of new token {not_finite} are not finite; look for NaN or infinity in the weights with "
            f"from_pretrained(…, check_finite=True), or use a wider dtype"
        )


def with_room(model: MPT, state: DecodeState, length: int) -> DecodeState:
    """Returns the state with room for so many tokens in each row; copied into a larger one where it has not."""
    if length <= state.cache.capacity:
        return state
    return spread(state, 1, capacity_for(model.config, length))


def bar(total: int, shown: bool | None) -> tqdm:
    """Returns a bar on stderr that counts tokens, and shows itself after two seconds; None: only in a terminal."""
    disabled = None if shown is None else not shown
    return tqdm(total=total, desc="generating", unit=" tokens", disable=disabled, delay=2, leave=False)
