"""`mpt-eqx serve`: a server with OpenAI's interface."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpt_eqx.cli._train_options import SCHEME, mesh_axes
from mpt_eqx.cli.options import add_loading, add_model, count, keep_compiled, read_overrides
from mpt_eqx.errors import MPTError

if TYPE_CHECKING:
    from mpt_eqx.serve.settings import Settings

KEY_VARIABLE = "MPT_EQX_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
ANYWHERE = ("", "0.0.0.0", "::")

DESCRIPTION = """Serves a model with OpenAI's interface under /v1, and a chat page at /. Without M it serves the small
model that ships with mpt_eqx, and with it an adapter that answers questions about Python's functions. Needs the extra
`serve`. Lines about requests go to stdout as JSON, everything else to stderr."""

EPILOG = """examples:
  mpt-eqx serve                                            then open http://127.0.0.1:8000
  mpt-eqx serve ./mpt-7b-chat --quantize int8 --slots 16   16 sequences at a time
  mpt-eqx serve ./mpt-7b --adapter sql=./sql --adapter ./legal      models mpt-7b, mpt-7b:sql and mpt-7b:legal
  mpt-eqx serve ./mpt-7b --host 0.0.0.0 --api-key-file key --allow-host gpu1     for other machines, too

SIGTERM and Ctrl-C end it: requests that have begun are completed first. A second one ends it at once."""


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "serve", parents=[shared], help="a server with OpenAI's interface", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_model(parser, "model", nargs="?")
    parser.set_defaults(model=None, run=run)
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="[NAME=]DIR",
        help="serve a LoRA adapter in PEFT's files, too, as model BASE:NAME (default: the directory's name); a "
        "tokenizer, chat template and generation_config.json in it win over the model's; may be repeated",
    )  # fmt: skip
    parser.add_argument("--name", metavar="BASE", help="what clients call the model (default: the end of its path)")
    parser.add_argument(
        "--template", metavar="T",
        help="chatml (MosaicML's chat models), mpt-instruct (its instruct models) or a file with a Jinja template "
        "(default: the adapter's or the checkpoint's own)",
    )  # fmt: skip
    parser.add_argument("--quantize", type=SCHEME, metavar="Q", help="weights in int8 or int4 (default: no change)")
    parser.add_argument(
        "--mesh", type=mesh_axes, metavar="AXES",
        help="devices by axis: tp shares heads and hidden units, fsdp weights, such as tp=4 (default: one device)",
    )  # fmt: skip
    add_loading(parser, adapter=False)
    _add_capacity(parser.add_argument_group("capacity"))
    _add_network(parser.add_argument_group("network"))


def _add_capacity(group: Any) -> None:
    group.add_argument(
        "--slots", type=count(1), default=8, metavar="N",
        help="sequences of a model that are decoded at a time (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--context", type=count(2), metavar="N", help="most tokens of prompt and answer (default: max_seq_len)"
    )
    group.add_argument(
        "--cache-memory", type=size, metavar="SIZE",
        help="fail at the start if the KV caches of all slots need more, such as 8GB (default: no limit)",
    )  # fmt: skip
    group.add_argument(
        "--prefix-memory", type=size, default=512 * 2**20, metavar="SIZE",
        help="most memory of prefixes that are kept for prompts that begin alike; 0 keeps none (default: 512MiB)",
    )  # fmt: skip
    group.add_argument(
        "--max-queue", type=count(0), default=64, metavar="N",
        help="sequences that may wait for a slot; more get 429 (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--timeout", type=seconds, default=600.0, metavar="S",
        help="seconds that a request may take, waiting included (default: %(default)g)",
    )  # fmt: skip
    group.add_argument(
        "--drain-timeout", type=seconds, default=30.0, metavar="S",
        help="seconds that requests have to end after SIGTERM; then they end with an error (default: %(default)g)",
    )  # fmt: skip
    group.add_argument("--edits", action="store_true", help="allow edits of activations in requests (default: no)")
    group.add_argument(
        "--warmup", action=argparse.BooleanOptionalAction, default=True,
        help="compile everything before requests are taken; without it the first ones wait (default: yes)",
    )  # fmt: skip


def _add_network(group: Any) -> None:
    group.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (default: %(default)s)")
    group.add_argument(
        "--port", type=port, default=8000, metavar="P", help="port; 0 is any that is free (default: %(default)s)"
    )
    group.add_argument(
        "--api-key", action="append", default=[], metavar="K",
        help="key that requests must have; may be repeated. Others on this machine can see it in the list of "
        f"processes: rather give it in ${KEY_VARIABLE} or in a file (default: everybody may ask)",
    )  # fmt: skip
    group.add_argument("--api-key-file", metavar="F", help="file with keys, one a line (default: none)")
    group.add_argument(
        "--allow-host", action="append", default=[], metavar="H",
        help="name that requests may call this machine by, in the Host header; * is any; may be repeated (default: "
        "localhost and --host; addresses always may)",
    )  # fmt: skip
    group.add_argument(
        "--allow-origin", action="append", default=[], metavar="O",
        help="origin of web pages that may ask, such as https://example.com (CORS); may be repeated (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--max-body", type=size, default=2**20, metavar="SIZE", help="largest body of a request (default: 1MiB)"
    )
    group.add_argument("--no-page", action="store_true", help="no pages at / and /docs (default: they are there)")
    group.add_argument("--no-access-log", action="store_true", help="no lines about requests (default: on stdout)")


def run(args: argparse.Namespace) -> int:
    """Serves until it is told to end, and returns the exit code."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MPTError(f"serving needs the extra `serve` ({error}): pip install 'mpt_eqx[serve]'") from None
    from mpt_eqx.cli._serve_models import load_models
    from mpt_eqx.cli._serve_process import bind, serve_until_told
    from mpt_eqx.serve import Engine
    from mpt_eqx.serve.app import create_app
    from mpt_eqx.serve.guards import guard
    from mpt_eqx.serve.metrics import Metrics
    from mpt_eqx.sharding.explain import readable_bytes

    settings = read_settings(args)
    read_overrides(args)
    if args.host not in LOOPBACK and not settings.api_keys:
        say(f"warning: whoever reaches {args.host} may use the model; --api-key-file F asks them for a key")
    if not args.no_compile_cache:
        keep_compiled(args.compile_cache)
    with bind(args.host, args.port) as listener:  # before minutes of loading
        models, served = load_models(args)
        engine = Engine(
            models, slots=args.slots, context=args.context, cache_bytes=args.cache_memory,
            prefix_bytes=args.prefix_memory, max_queue=args.max_queue, edits=args.edits, warm=args.warmup,
        )  # fmt: skip
        stats = engine.stats()
        for name, model in models.items():
            say(f"{name}: {model.config.num_parameters():,} parameters, {engine.context(name):,} tokens of context")
        say(
            f"weights {readable_bytes(stats.weight_bytes)}, KV caches {readable_bytes(stats.cache_bytes)} for "
            f"{stats.slots} slots, prefixes up to {readable_bytes(args.prefix_memory)}"
        )
        metrics = Metrics(engine)
        guarded = guard(create_app(engine, served, settings, metrics), settings, metrics.observe_request)
        log = None if args.no_access_log else sys.stdout
        return serve_until_told(guarded, engine, listener, drain_timeout=args.drain_timeout, log=log, say=say)


def say(text: str) -> None:
    """Writes a line to stderr."""
    print(f"mpt-eqx: {text}", file=sys.stderr, flush=True)


def read_settings(args: argparse.Namespace) -> "Settings":
    """Returns how requests are treated.

    Raises:
        MPTError: a key, a host or an origin is not valid.
    """
    from mpt_eqx.serve.settings import Settings

    for origin in args.allow_origin:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin):
            raise MPTError(f"--allow-origin: expected an origin such as https://example.com, found {origin!r:.100}")
    for name in args.allow_host:
        if name != "*" and not re.fullmatch(r"[\w.-]+", name):
            raise MPTError(f"--allow-host: expected a name without a port, found {name!r:.100}")
    if not args.max_body:
        raise MPTError("--max-body: expected at least 1 byte, found 0")
    own = () if args.host in (*ANYWHERE, *LOOPBACK) else (f"[{args.host}]" if ":" in args.host else args.host,)
    return Settings(
        api_keys=read_keys(args), hosts=(*Settings.hosts, *own, *args.allow_host), origins=tuple(args.allow_origin),
        max_body=args.max_body, timeout=args.timeout, edits=args.edits, page=not args.no_page,
    )  # fmt: skip


def read_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """Returns the keys of the command line, the file and the environment.

    Raises:
        MPTError: one of them is empty or cannot stand in a header, or the file cannot be read. An empty one would let
            everybody in where somebody meant to close.
    """
    keys = [("--api-key", key) for key in args.api_key]
    if args.api_key_file is not None:
        try:
            lines = Path(args.api_key_file).read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            what = getattr(error, "strerror", None) or error
            raise MPTError(f"--api-key-file: expected a file with keys, found {args.api_key_file} ({what})") from None
        found = [line.strip() for line in lines if line.strip()]
        keys += [("--api-key-file", key) for key in found or [""]]
    if (key := os.environ.get(KEY_VARIABLE)) is not None:
        keys.append((f"${KEY_VARIABLE}", key))
    for where, key in keys:
        if not re.fullmatch(r"[!-~]+", key):
            what = "characters that are no visible ASCII" if key else "nothing"
            raise MPTError(f"{where}: expected a key of visible ASCII characters without spaces, found {what}")
    return tuple(dict.fromkeys(key for _, key in keys))


UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def size(text: str) -> int:
    """Returns the bytes of a size such as 512MB or 2GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]I?|)B?", text.upper(), re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(f"expected a size such as 512MB or 2GiB, found {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


def seconds(text: str) -> float:
    """Returns a number of seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, found {text!r}")
    return value


def port(text: str) -> int:
    """Returns the number of a port."""
    value = count(0)(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, found {text!r}")
    return value
