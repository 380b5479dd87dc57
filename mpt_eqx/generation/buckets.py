"""The sizes that programs are compiled for: of the KV cache, of a prompt's chunks, of a chunk of decode steps.

Every other size is rounded up to one of these, so that few programs serve prompts of all lengths.
"""

from collections.abc import Iterator

from mpt_eqx.config import MPTConfig
from mpt_eqx.ops.platform import is_default

MIN_CACHE = 512
"""The smallest KV cache, in tokens. The next size is four times that, then each twice the one before."""

MANY_ROWS = 8
"""Rows from which on there is a cache of half of that, too: what it saves is worth one more program."""

PREFILL_CHUNKS = (256, 128, 32)
"""Prompt tokens per prefill call: the largest of which more than half is left, else the smallest."""

WIDE_PREFILL_CHUNKS = (2048, 512, 128, 32)
"""The same on a GPU or TPU, where reading the weights takes as long as the products of hundreds of tokens."""

MAX_WIDE_TOKENS = 8192
"""Tokens of all rows in a wide chunk of more than 512, so that what a layer computes takes little memory."""

DECODE_CHUNK = 8
"""Decode steps between two host syncs."""

MIN_EOS = 8
"""The end-of-sequence tokens that every program has room for."""


def cache_bucket(config: MPTConfig, length: int, rows: int = 1) -> int:
    """Returns the capacity of the KV cache that holds `length` tokens in each of so many rows."""
    size = MIN_CACHE if length <= MIN_CACHE else max(4 * MIN_CACHE, next_power_of_two(length))
    if rows >= MANY_ROWS and length <= MIN_CACHE // 2:
        size = MIN_CACHE // 2
    return min(size, max(config.max_seq_len, length))


def prefill_chunks(rows: int) -> tuple[int, ...]:
    """Returns the sizes of chunks in which prompts of so many rows are prefilled, the largest first."""
    if is_default("cpu"):
        return PREFILL_CHUNKS
    return tuple(size for size in WIDE_PREFILL_CHUNKS if size <= 512 or size * rows <= MAX_WIDE_TOKENS)


def prefill_buckets(length: int, rows: int) -> Iterator[int]:
    """Yields the sizes of the chunks in which prompts of at most `length` tokens are prefilled, in so many rows."""
    sizes = prefill_chunks(rows)
    while length > 0:
        size = next((size for size in sizes if length > size // 2), sizes[-1])
        yield size
        length -= size


def decode_bucket(chunk: int, max_new_tokens: int) -> int:
    """Returns the number of decode steps per call: at most `chunk`, and few more than max_new_tokens."""
    return min(chunk, next_power_of_two(max_new_tokens))


def eos_bucket(count: int) -> int:
    """Returns the room for `count` end-of-sequence tokens."""
    return max(MIN_EOS, next_power_of_two(count))


def next_power_of_two(n: int) -> int:
    """Returns the smallest power of two ≥ n."""
    return 1 << max(n - 1, 0).bit_length()
