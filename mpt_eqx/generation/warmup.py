"""Compiling ahead of the first prompt."""

import time
from collections.abc import Sequence

import jax
import numpy as np

from mpt_eqx.generation.decode import decode, empty_state, read
from mpt_eqx.generation.loop import (
    CHUNK,
    agree_on_arguments,
    capacity_for,
    chunk_for,
    everywhere,
    piece_sizes,
    with_room,
)
from mpt_eqx.generation.validate import check_count, check_key, check_options, check_prompts
from mpt_eqx.model import MPT


def warmup(
    model: MPT, *, batch_sizes: Sequence[int], prompt_lengths: Sequence[int], max_new_tokens: int
) -> dict[tuple[int, int], float]:
    """Compiles what `generate` and `stream` need for these shapes, so that no later call of theirs waits for it.

    What return_logits, num_return_sequences and a prefix need besides is compiled when they are first asked for.

    Args:
        model: the model.
        batch_sizes: numbers of prompts, each ≥ 1.
        prompt_lengths: tokens of the longest prompt, each ≥ 1; others that need the same sizes are covered too.
        max_new_tokens: as in `generate`.

    Returns:
        Seconds for each (batch size, prompt length); nearly none where an earlier one has compiled the same.

    Raises:
        GenerationError: an argument is not valid, or a length exceeds max_seq_len.
    """
    agree_on_arguments(locals())
    config = model.config
    options = check_options(config, max_new_tokens=max_new_tokens)
    for name, counts in (("batch_sizes", batch_sizes), ("prompt_lengths", prompt_lengths)):
        for count in counts:
            check_count(name, count)
    max_new_tokens = int(max_new_tokens)
    for length in prompt_lengths:
        check_prompts(config, [[0] * length], max_new_tokens=max_new_tokens)
    fixed = (model, *everywhere(model, (options, check_key(None, 0.0))))
    chunk = chunk_for(CHUNK, max_new_tokens)
    seconds = {}
    for rows in batch_sizes:
        for length in prompt_lengths:
            started = time.monotonic()
            first = capacity_for(config, length + min(chunk, max_new_tokens))
            state = empty_state(model, rows, first)
            for size in sorted(set(piece_sizes(length))):
                piece, ends = np.zeros((rows, size), np.int32), np.zeros(rows, np.int32)
                state = read(model, state, *everywhere(model, (piece, ends)))
            for made in range(chunk, max_new_tokens + chunk, chunk):
                needed = length + min(made, max_new_tokens)
                if made == chunk or needed > state.cache.capacity:
                    state, _ = decode(fixed, with_room(model, state, needed), chunk, False)
            jax.block_until_ready(state)
            seconds[rows, length] = time.monotonic() - started
    return seconds
