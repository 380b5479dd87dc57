"""Serving: many requests at a time on one model, and the OpenAI interface to it (extra `serve`)."""

from mpt_eqx.serve.engine import Engine as Engine
from mpt_eqx.serve.engine import Health as Health
from mpt_eqx.serve.engine import Stats as Stats
from mpt_eqx.serve.requests import Chunk as Chunk
from mpt_eqx.serve.requests import Constraint as Constraint
from mpt_eqx.serve.requests import End as End
from mpt_eqx.serve.requests import Event as Event
from mpt_eqx.serve.requests import Failure as Failure
from mpt_eqx.serve.requests import Prompt as Prompt
from mpt_eqx.serve.requests import QueueFullError as QueueFullError
from mpt_eqx.serve.requests import Request as Request
from mpt_eqx.serve.requests import Ticket as Ticket
from mpt_eqx.serve.requests import UnavailableError as UnavailableError
