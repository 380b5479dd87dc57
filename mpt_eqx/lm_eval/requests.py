"""What requests and arguments of the harness mean: prompts that are cut, batches, options, keys, devices."""

import inspect
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from mpt_eqx.errors import GenerationError, MPTError

BATCH_TOKENS = 8192
"""For how many tokens the caches have room where the batch size is "auto"."""

# What a task may say in generation_kwargs, beside `until`, `do_sample` and the number of tokens.
OPTIONS = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens"),
)

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Its texts, or None for a window of a long text; the tokens that are given, and those that are scored."""

Plan = tuple[dict[str, Any], int, list[str]]
"""Options of `generate`, how many new tokens, and what ends a text."""


def read_plan(gen_kwargs: dict[str, Any], max_gen_toks: int) -> Plan:
    """Returns what generation_kwargs of a task say; `max_gen_toks` is the number of new tokens where they do not.

    Raises:
        GenerationError: they have an option that `generate` does not know, or draw without a temperature.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    given = dict(normalize_gen_kwargs(gen_kwargs, max_gen_toks))
    stops, count, draws = given.pop("until"), given.pop("max_gen_toks"), given.pop("do_sample")
    if wrong := sorted(set(given) - set(OPTIONS)):
        raise GenerationError(
            f"generation_kwargs: expected some of until, max_gen_toks, do_sample, {', '.join(OPTIONS)}, "
            f"found {wrong[0]}"
        )
    if draws and not given.get("temperature"):
        raise GenerationError("generation_kwargs: expected a temperature above 0 with do_sample, found none")
    options = {"temperature": 0.0} | {name: value for name, value in given.items() if value is not None}
    return options, count, [stop for stop in stops if stop]


def request_keys(seed: int, requests: Sequence[tuple[str, Any]]) -> Callable[[list[int]], Key[Array, " B"]]:
    """Returns a function from numbers of requests to their keys.

    A key depends on the seed, on what the request says, and on how many alike come before it, so that what is drawn
    depends neither on its batch nor on its place.
    """
    seen: Counter[int] = Counter()
    numbers = []
    for request in requests:
        content = zlib.crc32(repr(request).encode())
        numbers.append((content, seen[content]))
        seen[content] += 1

    def one(numbers: Array) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), numbers[0]), numbers[1])

    return lambda batch: jax.vmap(one)(jnp.asarray([numbers[i] for i in batch], jnp.uint32))


def cut(request: Request, max_length: int) -> tuple[list[int], int]:
    """Returns the tokens of a request, without what does not fit on the left, and how many of them are given.

    The last token is not read, and so one more than max_length fit.

    Raises:
        GenerationError: there is nothing to score, or more than fits.
    """
    texts, context, continuation = request
    if not 0 < len(continuation) <= max_length:
        raise GenerationError(
            f"expected a continuation of 1 to max_length={max_length} tokens, found {len(continuation)} in "
            f"{texts!r:.200}"
        )
    row = [*context, *continuation][-(max_length + 1) :]
    return row, len(row) - len(continuation)


def batches_of_tokens(order: list[int], lengths: list[int], most: int) -> Iterator[list[int]]:
    """Yields numbers in their order, as many at a time as have `most` tokens together, and at least one."""
    batch: list[int] = []
    room = most
    for i in order:
        if batch and lengths[i] > room:
            yield batch
            batch, room = [], most
        batch.append(i)
        room -= lengths[i]
    if batch:
        yield batch


def batches_of_rows(
    prompts: list[list[int]], plans: list[Plan], batch_size: int | str, max_batch_size: int
) -> Iterator[list[int]]:
    """Yields the numbers of requests whose texts are generated together: alike in options, and near in length."""
    order = sorted(range(len(prompts)), key=lambda i: (repr(plans[i]), -len(prompts[i]), prompts[i]))
    for _, alike in itertools.groupby(order, key=lambda i: repr(plans[i])):
        left = list(alike)
        while left:
            fit = BATCH_TOKENS // (len(prompts[left[0]]) + plans[left[0]][1])
            rows = batch_size if isinstance(batch_size, int) else min(max(fit, 1), max_batch_size)
            yield left[:rows]
            left = left[rows:]


def up_to(text: str, last: str) -> str:
    """Returns a prompt up to the end of its last message, which the template may have stripped of white space.

    Raises:
        MPTError: the template does not write that message.
    """
    at = text.rfind(last.strip())
    if at < 0:
        raise MPTError("chat_template: expected it to write the last message, which is to be continued, found none")
    whole = last.lstrip()
    return text[: at + len(whole if text.startswith(whole, at) else last.strip())]


def read_batch_size(given: int | str) -> int | str:
    """Returns a number of rows, or "auto" (also for "auto:4").

    Raises:
        GenerationError: it is neither.
    """
    if isinstance(given, str) and given.split(":")[0] == "auto":
        return "auto"
    number = int(given) if isinstance(given, str) and given.isdecimal() else given
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise GenerationError(f'batch_size: expected a whole number ≥ 1 or "auto", found {given!r}')
    return number


def find_device(name: str | None) -> jax.Device | None:
    """Returns JAX's device of a torch name; None, its default, for those that say nothing.

    Raises:
        GenerationError: there is no such device.
    """
    if name in (None, "cuda", "cuda:0", "auto"):
        return None
    platform, _, number = str(name).partition(":")
    try:
        return jax.devices({"cuda": "gpu"}.get(platform, platform))[int(number or 0)]
    except (RuntimeError, IndexError, ValueError):
        found = ", ".join(f"{device.platform}:{device.id}" for device in jax.devices())
        raise GenerationError(f"device: expected {found}, or cuda:0 for JAX's default, found {name!r}") from None


def check_known(function: Callable[..., Any], others: dict[str, Any]) -> None:
    """Raises if there are other arguments than the function has, but for trust_remote_code."""
    if unknown := sorted(set(others) - {"trust_remote_code"}):
        known = [name for name in inspect.signature(function).parameters if name != "others"]
        raise GenerationError(f"model_args: expected some of {', '.join(known)}, found {', '.join(unknown)}")
