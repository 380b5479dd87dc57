"""A prompt and what follows it as token ids, of which only the latter count."""

from mpt_eqx.errors import MPTError
from mpt_eqx.text.tokenizer import Tokenizer


def encode_pair(tokenizer: Tokenizer, prompt: str, continuation: str, prefix_token: int) -> tuple[list[int], int]:
    """Returns the token ids of both texts, and how many of them are the prompt's.

    As in lm-evaluation-harness, both are encoded as one text, spaces at the end of the prompt count as the
    continuation's, and `prefix_token` stands for an empty prompt.

    Args:
        tokenizer: of the model.
        prompt: the text that is given; it may be empty.
        continuation: the text after it.
        prefix_token: the id before a text.

    Raises:
        MPTError: nothing follows the prompt, or a text cannot be encoded.
    """
    tokens, stripped = tokenizer.encode(prompt + continuation), prompt.rstrip()
    if stripped:
        given = len(tokenizer.encode(stripped))
    else:
        tokens, given = after(prefix_token, tokens), 1
    if len(tokens) <= given:
        raise MPTError("continuation: expected some text, found none that adds a token")
    return tokens, given


def after(prefix_token: int, tokens: list[int]) -> list[int]:
    """Returns the token ids of a text after `prefix_token`, which the tokenizer may have put there."""
    return tokens if tokens[:1] == [prefix_token] else [prefix_token, *tokens]
