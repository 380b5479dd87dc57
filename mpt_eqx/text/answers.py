"""A conversation in parts: what stands before each answer, and the answer, as a model reads and writes them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpt_eqx.errors import MPTError
from mpt_eqx.text.chat_template import Piece

Part = tuple[list[Piece], bool]


def answer_parts(
    messages: Sequence[Mapping[str, Any]], pieces: Callable[[Sequence[Mapping[str, Any]], bool], list[Piece]]
) -> list[Part]:
    """Returns the pieces of a conversation in parts, and of each whether it is an answer, which ends the last one.

    An answer ends with the control token that the template puts after it, if it does.

    Args:
        messages: dicts of role and content; each answer has the role "assistant".
        pieces: returns what the template makes of some messages, True for a prompt that ends where an answer begins.

    Raises:
        MPTError: there is no answer, the last message is none, or the template writes an answer somewhere else than
            where its prompt ends.
    """
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    if roles[-1:] != ["assistant"]:
        raise MPTError(f"messages: expected an answer of the role 'assistant' at the end, found {roles[-1:] or 'none'}")
    parts: list[Part] = []
    done: list[Piece] = []
    for at in (at for at, role in enumerate(roles) if role == "assistant"):
        prompt, whole = _joined(pieces(messages[:at], True)), _joined(pieces(messages[: at + 1], False))
        before, answer = _after(prompt, done), _after(whole, prompt)
        if before is None or answer is None:
            raise MPTError(
                "messages: expected a template that writes an answer where its prompt ends, found one that does not; "
                "use chat_template='chatml' or 'mpt-instruct'"
            )
        if answer and answer[-1][1] is None and not answer[-1][0].strip() and len(answer) > 1:
            answer = answer[:-1]  # the end of a line after <|im_end|>, which nobody has to write
        parts += [(before, False), (answer, True)]
        done = _joined([*prompt, *answer])
    return parts


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Returns pieces of which no two texts stand side by side."""
    joined: list[Piece] = []
    for text, id_ in pieces:
        if id_ is None and joined and joined[-1][1] is None:
            joined[-1] = (joined[-1][0] + text, None)
        elif text or id_ is not None:
            joined.append((text, id_))
    return joined


def _after(pieces: list[Piece], start: list[Piece]) -> list[Piece] | None:
    """Returns what follows a start; None if these pieces have another."""
    if not start:
        return pieces
    *same, (text, id_) = start
    last = len(same)
    if pieces[:last] != same or len(pieces) <= last or pieces[last][1] != id_:
        return None
    rest = pieces[last][0].removeprefix(text) if id_ is None else ""
    if (id_ is None and not pieces[last][0].startswith(text)) or (id_ is not None and pieces[last][0] != text):
        return None
    return [*([(rest, None)] if rest else []), *pieces[last + 1 :]]
