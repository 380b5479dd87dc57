"""perplexity: how likely a text of any length is, in windows that slide over it."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int

from mpt_eqx.errors import GenerationError
from mpt_eqx.evaluation.score import score
from mpt_eqx.generation.validate import check_count, check_ids
from mpt_eqx.model import MPT


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How likely a text of n tokens is.

    Attributes:
        logprobs: the log-probability of each token, in nats.
        contexts: how many tokens the model saw before each.
    """

    logprobs: Float32[np.ndarray, " n"]
    contexts: Int[np.ndarray, " n"]

    @property
    def nats(self) -> float:
        """The negative log-likelihood of the whole text, in nats."""
        return -float(self.logprobs.sum(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """The exponential of the nats per token."""
        return float(np.exp(self.nats / len(self.logprobs)))

    def curve(self, points: int = 64) -> list[tuple[float, float]]:
        """Returns, for at most so many groups of tokens of similar contexts, the mean context and the nats per token.

        The groups are of nearly equal size.
        """
        order = np.argsort(self.contexts, kind="stable")
        groups = np.array_split(order, min(points, len(order)))
        return [(float(self.contexts[g].mean()), -float(self.logprobs[g].mean(dtype=np.float64))) for g in groups]


def perplexity(
    model: MPT,
    tokens: Sequence[int],
    *,
    prefix_token: int,
    length: int | None = None,
    stride: int | None = None,
    progress: bool | None = None,
) -> Perplexity:
    """Returns the log-probability of every token of a text, from windows of `length` tokens that move by `stride`.

    A window scores the tokens that the one before it has not, each given all that stand before it in the window. So
    each token but those of the first window has at least length − stride tokens before it. With stride = length these
    are the windows of lm-evaluation-harness's loglikelihood_rolling.

    Args:
        model: the model.
        tokens: token ids of the text, at least one.
        prefix_token: the id before the text, given which its first token is scored. MPT models were trained on texts
            that each end with <|endoftext|>.
        length: tokens that the model sees at most, from 1 to max_seq_len, which None stands for.
        stride: tokens from one window to the next, from 1 to length; None: half of length. A smaller one gives each
            token more context, and takes length / stride times the computation.
        progress: as in `score`.

    Raises:
        GenerationError: an argument is not valid, or logits are NaN or infinite.
    """
    config = model.config
    length = config.max_seq_len if length is None else length
    check_count("length", length)
    stride = max(length // 2, 1) if stride is None else stride
    check_count("stride", stride)
    if length > config.max_seq_len:
        raise GenerationError(f"length: expected at most max_seq_len={config.max_seq_len}, found {length}")
    if stride > length:
        raise GenerationError(f"stride: expected at most length={length}, found {stride}")
    if not len(tokens):
        raise GenerationError("tokens: expected at least one, found none")
    check_ids("prefix_token", [prefix_token], config.vocab_size)
    text = [prefix_token, *tokens]
    windows = [(max(end - length, 0), begin, end) for begin, end in spans(len(tokens), length, stride)]
    scores = score(
        model,
        [text[start : end + 1] for start, _, end in windows],
        prefix_lengths=[begin - start + 1 for start, begin, _ in windows],
        progress=progress,
    )
    contexts = [np.arange(begin, end) - start + 1 for start, begin, end in windows]
    return Perplexity(np.concatenate([each.logprobs for each in scores]), np.concatenate(contexts))


def spans(count: int, length: int, stride: int) -> list[tuple[int, int]]:
    """Returns where the tokens that each window scores begin and end, of a text of `count` tokens."""
    ends = [*range(min(length, count), count, stride), count]
    return list(zip([0, *ends], ends, strict=False))
