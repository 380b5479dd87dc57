"""Serving: many requests at a time on one model, and the OpenAI interface to it (extra `serve`)."""

from mpt_eqx.serve.engine import Engine, Health, Stats
from mpt_eqx.serve.requests import (
    Chunk,
    Constraint,
    End,
    Event,
    Failure,
    Prompt,
    QueueFullError,
    Request,
    Ticket,
    UnavailableError,
)

__all__ = [
    "Chunk",
    "Constraint",
    "End",
    "Engine",
    "Event",
    "Failure",
    "Health",
    "Prompt",
    "QueueFullError",
    "Request",
    "Stats",
    "Ticket",
    "UnavailableError",
]
