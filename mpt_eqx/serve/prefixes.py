"""The cache of prefixes: the KV caches of prompts that were read, for prompts that begin alike."""

from collections import OrderedDict

import jax
import numpy as np
from jaxtyping import Int

from mpt_eqx.generation.state import DecodeState

LEAST = 32
"""Tokens that must be alike: fewer are read as fast as a cache is copied."""

MOST = 256
"""The most prompts that are kept, so that to compare with all takes little time."""


class PrefixCache:
    """Keeps as many as fit; the least recently used goes first.

    A kept prompt serves every prompt that begins with some of its tokens, because a token's keys and values depend on
    what stands before it only.
    """

    def __init__(self, limit: int):
        """Keeps nothing yet.

        Args:
            limit: bytes, ≥ 0.
        """
        self.limit = limit
        self._kept: OrderedDict[bytes, tuple[Int[np.ndarray, " T"], DecodeState, int]] = OrderedDict()

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(size for _, _, size in self._kept.values())

    def longest(self, prompt: Int[np.ndarray, " T"]) -> tuple[int, DecodeState | None]:
        """Returns how many of a prompt's tokens a kept state begins with, and that state; 0 and None if too few.

        The last token of the prompt is never among them: from it the next one is chosen.
        """
        best, name = 0, b""
        for key, (tokens, _, _) in self._kept.items():
            both = min(len(tokens), len(prompt) - 1)
            unlike = np.flatnonzero(tokens[:both] != prompt[:both])
            alike = int(unlike[0]) if len(unlike) else both
            if alike > best:
                best, name = alike, key
        if best < LEAST:
            return 0, None
        self._kept.move_to_end(name)
        return best, self._kept[name][1]

    def keep(self, prompt: Int[np.ndarray, " T"], state: DecodeState) -> None:
        """Keeps the state of one row after a prompt, if it fits at all; nobody may donate it from now on.

        Kept prompts that it begins with go: it serves for them, as a longer one that is kept does for it.
        """
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if size > self.limit or len(prompt) <= LEAST:
            return
        for key, (tokens, _, _) in list(self._kept.items()):
            both = min(len(tokens), len(prompt))
            if (tokens[:both] == prompt[:both]).all():
                if len(tokens) > len(prompt):
                    return  # it serves for this one
                del self._kept[key]
        self._kept[prompt.tobytes()] = prompt, state, size
        while self.size > self.limit or len(self._kept) > MOST:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Keeps nothing."""
        self._kept.clear()
