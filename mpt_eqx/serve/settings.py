"""What the server is told at its start."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mpt_eqx.config import MPTConfig
from mpt_eqx.text import Tokenizer


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model as clients see it; its weights are the engine's.

    Attributes:
        name: what stands in `model` of a request: "base", or "base:adapter".
        config: its configuration.
        tokenizer: its tokenizer.
        defaults: options of generation where a request has none, as `generation_defaults` returns them.
        chat_template: a built-in template or the text of one; None for the tokenizer's own.
        created: when it was loaded, in seconds since 1970.
    """

    name: str
    config: MPTConfig
    tokenizer: Tokenizer
    defaults: Mapping[str, Any]
    chat_template: str | None
    created: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """How requests are treated.

    Attributes:
        api_keys: of which a request must have one; none lets everybody in.
        hosts: the names that may stand in the Host header, without port; "*" allows all.
        origins: of pages on other hosts that browsers let in (CORS).
        max_body: bytes of a request's body, ≥ 1.
        timeout: seconds that a request may take, waiting included, > 0.
        edits: whether requests may have `edits`.
        page: whether there is a chat page at "/", and a description of the interface at "/docs".
    """

    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    origins: tuple[str, ...] = ()
    max_body: int = 2**20
    timeout: float = 600.0
    edits: bool = False
    page: bool = True
