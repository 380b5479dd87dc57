"""Compiling ahead of the first prompt."""

import time
from collections.abc import Sequence

import jax
import numpy as np

from mpt_eqx.generation.buckets import DECODE_CHUNK, cache_bucket, decode_bucket, prefill_buckets, prefill_chunks
from mpt_eqx.generation.interrupts import held_interrupts
from mpt_eqx.generation.prompts import prefill_prompts, progress_bar
from mpt_eqx.generation.sampling_params import check_options
from mpt_eqx.generation.state import empty_state, ensure_capacity, replicate
from mpt_eqx.generation.steps import decode_chunk, known_options
from mpt_eqx.generation.validate import check_count, check_key, check_model, check_prompts
from mpt_eqx.model import MPT
from mpt_eqx.model.flat import flat
from mpt_eqx.sharding.multihost import check_same_arguments


@check_same_arguments
def warmup(
    model: MPT, *, batch_sizes: Sequence[int], prompt_lengths: Sequence[int], max_new_tokens: int
) -> dict[tuple[int, int], float]:
    """Compiles what `generate` and `stream` need for these shapes, so that later calls compile nothing.

    What return_logits, num_return_sequences, logits_processors and a prefix need besides is compiled at first use; on a
    GPU also what options need that are not the defaults.

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
    model = check_model(model)
    config = model.config
    params = check_options(config, max_new_tokens, {}, caller="warmup", least=0)
    for name, counts in (("batch_sizes", batch_sizes), ("prompt_lengths", prompt_lengths)):
        for count in counts:
            check_count(name, count)
    max_new_tokens = int(max_new_tokens)
    for length in prompt_lengths:
        check_prompts(config, [[0] * length], max_new_tokens=max_new_tokens)
    if not max_new_tokens:  # generate runs nothing
        return {(rows, length): 0.0 for rows in batch_sizes for length in prompt_lengths}
    chunk = decode_bucket(DECODE_CHUNK, max_new_tokens)
    seconds = {}
    for rows in batch_sizes:
        fixed = flat((model, *replicate(model, (params.of_rows(rows), check_key(None, 0.0))), ()))
        asked = known_options(model, params)
        for length in prompt_lengths:
            started = time.monotonic()
            state = empty_state(model, rows, cache_bucket(config, length + min(chunk, max_new_tokens), rows))
            for size in warm_sizes(length, rows):
                prompts = [np.zeros(size, np.int32)] * rows
                state = prefill_prompts(model, state, prompts, 0, progress_bar(size, False))
            for decoded in range(chunk, max_new_tokens + chunk, chunk):
                needed = length + min(decoded, max_new_tokens)
                if decoded == chunk or needed > state.cache.capacity:
                    with held_interrupts():
                        state, _ = decode_chunk(fixed, ensure_capacity(model, state, needed), chunk, False, asked)
            jax.block_until_ready(state)
            seconds[rows, length] = time.monotonic() - started
    return seconds


def warm_sizes(length: int, rows: int) -> list[int]:
    """Returns the sizes of chunks that prompts need of which the longest has `length` tokens."""
    sizes = set(prefill_buckets(length, rows))
    # Beside it there may be shorter ones, which may need any smaller size.
    return sorted(size for size in prefill_chunks(rows) if size in sizes or (rows > 1 and size < max(sizes)))
