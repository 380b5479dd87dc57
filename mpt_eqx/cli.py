"""The command line `mpt-eqx`. Text goes to stdout, everything else to stderr."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mpt_eqx import SHIPPED_MODEL, MPTConfig
from mpt_eqx.errors import GenerationError, MPTError

CHUNK = 8  # tokens between two looks at what has been made

EXAMPLES = """examples:
  mpt-eqx generate "The zip() function"                      the small model that ships with mpt_eqx
  mpt-eqx generate "Once" --model ./mpt-7b --temperature 0    a local checkpoint, likeliest tokens
  echo "json.dumps(obj" | mpt-eqx generate --seed 3           the prompt from stdin, another draw
  mpt-eqx inspect ./mpt-7b                                    what a checkpoint holds, and what is wrong with it
  mpt-eqx convert ./mpt-7b ./mpt-7b-aligned                   torch files or GGUF to safetensors that load at once
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 ok, 1 failure with one line on stderr, 2 bad use."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except MPTError as error:
        if args.debug:
            raise
        print(f"mpt-eqx: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our text has had enough
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpt-eqx",
        description="MosaicML's MPT language models in JAX, without torch.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    shared.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub repository")

    generate = commands.add_parser(
        "generate", parents=[shared], help="continue a prompt", description="Writes how a prompt goes on, to stdout."
    )
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue; from stdin when left out")
    generate.add_argument(
        "--model", default=str(SHIPPED_MODEL), metavar="M",
        help="directory, weight file or Hub repository id (default: the small model that ships with mpt_eqx)",
    )  # fmt: skip
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most so many (default: 128)")
    generate.add_argument(
        "--temperature", type=float, metavar="T",
        help="0 for the likeliest tokens, more for variety (default: the checkpoint's generation_config.json, else 0)",
    )  # fmt: skip
    generate.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    generate.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens of probability P only"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, another text (default: 0)")
    generate.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16 (default: as stored)")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="S", help="end before this text; may be repeated"
    )
    generate.add_argument("--json", action="store_true", help="one JSON object instead of streamed text")
    generate.set_defaults(run=_generate)

    inspect = commands.add_parser(
        "inspect", parents=[shared], help="show what a checkpoint holds",
        description="Reads a checkpoint's headers and shows what it holds; exit code 1 if it cannot be loaded.",
    )  # fmt: skip
    inspect.add_argument(
        "model", nargs="?", default=str(SHIPPED_MODEL), metavar="M", help="directory, weight file or Hub repository id"
    )
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser(
        "convert", parents=[shared], help="rewrite a checkpoint as safetensors that load at once",
        description="Writes any readable checkpoint as aligned safetensors, one tensor at a time, with its tokenizer.",
    )  # fmt: skip
    convert.add_argument("source", metavar="SRC", help="directory, weight file or Hub repository id")
    convert.add_argument("destination", metavar="DST", help="directory to write to")
    convert.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16 (default: as stored)")
    convert.add_argument("--max-shard-size", default="5GB", metavar="S", help="largest file (default: 5GB)")
    convert.set_defaults(run=_convert)
    return parser


def _generate(args: argparse.Namespace) -> int:
    import jax

    from mpt_eqx.checkpoint import from_pretrained
    from mpt_eqx.checkpoint.hub import find_checkpoint
    from mpt_eqx.generation import stream
    from mpt_eqx.text import load_tokenizer, until_stop
    from mpt_eqx.text.tokenizer import generation_config

    if any(not stop for stop in args.stop):
        raise GenerationError("--stop: expected some text, found an empty string")
    prompt = args.prompt if args.prompt is not None else sys.stdin.read().removesuffix("\n")
    place = find_checkpoint(args.model, revision=args.revision)
    directory = place.parent if place.is_file() else place
    tokenizer = load_tokenizer(directory)
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise GenerationError("PROMPT: expected some text, found an empty prompt")
    options = _sampling(args, generation_config(directory))
    model = from_pretrained(place, dtype=args.dtype)

    note = _Note()
    note.show("compiling …")
    started = time.monotonic()
    new_tokens: list[int] = []
    moments: list[float] = []

    def noted():
        for token in stream(
            model, tokens, max_new_tokens=args.max_new_tokens, chunk_size=CHUNK, eos_token_ids=tokenizer.eos_token_ids,
            key=jax.random.key(args.seed), **options,
        ):  # fmt: skip
            note.clear()
            moments.append(time.monotonic())
            new_tokens.append(token)
            yield token

    text = ""
    try:
        for piece in until_stop(tokenizer.decode_stream(noted()), args.stop):
            text += piece
            if not args.json:
                print(prompt + piece if text == piece else piece, end="", flush=True)
    finally:
        note.clear()
    ended = new_tokens[-1] in tokenizer.eos_token_ids
    stopped = ended or any(stop in tokenizer.decode(new_tokens) for stop in args.stop)
    if args.json:
        record = {
            "prompt": prompt,
            "text": text,
            "tokens": new_tokens,
            "finish_reason": "stop" if stopped else "length",
        }
        print(json.dumps(record))
    else:
        print("" if text else prompt)
    print(_speed(len(tokens), started, moments), file=sys.stderr)
    return 0


def _sampling(args: argparse.Namespace, defaults: dict) -> dict:
    """Returns how to choose tokens: what the call says, else what the checkpoint's generation_config.json says."""
    sampled = bool(defaults.get("do_sample"))
    options = {}
    for name, greedy in (("temperature", 0.0), ("top_k", None), ("top_p", None)):
        given = getattr(args, name)
        default = defaults.get(name, 1.0 if name == "temperature" else None) if sampled else greedy
        options[name] = default if given is None else given
    return options


def _speed(prompt_tokens: int, started: float, moments: list[float]) -> str:
    """Returns a line on how fast it went: after the first chunk, or over all where that one was the only one."""
    counts = f"{prompt_tokens} prompt tokens, {len(moments)} new tokens"
    if len(moments) > CHUNK:
        return f"{counts}, {(len(moments) - CHUNK) / (moments[-1] - moments[0]):.1f} tokens/s"
    return f"{counts}, {len(moments) / (time.monotonic() - started):.1f} tokens/s with compilation"


def _inspect(args: argparse.Namespace) -> int:
    from mpt_eqx.checkpoint import checkpoint_info

    info = checkpoint_info(args.model, revision=args.revision)
    config, files = info.config, sorted({tensor.file for tensor in info.tensors})
    rows = [
        ("directory", info.directory),
        ("format", f"{info.format}, {len(files)} file{'s' * (len(files) != 1)}, {info.bytes / 1e6:,.1f} MB"),
        ("parameters", f"{info.parameters:,} in {len(info.tensors)} tensors"),
        ("types", ", ".join(sorted({tensor.dtype for tensor in info.tensors}))),
        (
            "layers",
            f"{config.n_layers} of width {config.d_model}, {config.n_heads} heads over {config.kv_heads} of keys and "
            f"values, {config.ffn_config.ffn_type} {config.ffn_hidden_size}",
        ),
        (
            "vocabulary",
            f"{config.vocab_size:,}, output matrix {'tied' if config.tie_word_embeddings else 'of its own'}",
        ),
        ("positions", f"{_positions(config)}, max_seq_len {config.max_seq_len:,}"),
        ("tokenizer", "tokenizer.json" if (Path(info.directory) / "tokenizer.json").is_file() else "none"),
    ]
    for name, value in rows:
        print(f"{name:<12}{value}")
    for tensor in info.tensors:
        print(f"  {tensor.name:<48} {tensor.dtype:<9} {list(tensor.shape)}")
    for problem in info.problems:
        print(f"mpt-eqx: problem: {problem}", file=sys.stderr)
    return 1 if info.problems else 0


def _convert(args: argparse.Namespace) -> int:
    from mpt_eqx.checkpoint import convert

    started = time.monotonic()
    info = convert(
        args.source, args.destination, dtype=args.dtype, max_shard_size=args.max_shard_size, revision=args.revision
    )
    seconds = time.monotonic() - started
    print(f"{args.destination}: {info.parameters:,} parameters from {info.format} in {seconds:.1f} s", file=sys.stderr)
    return 0


def _positions(config: MPTConfig) -> str:
    attn = config.attn_config
    kinds = [
        *([f"ALiBi, alibi_bias_max {attn.alibi_bias_max:g}"] if attn.alibi else []),
        *([f"rotary, rope_theta {attn.rope_theta:g}"] if attn.rope else []),
        *(["learned"] if config.learned_pos_emb else []),
    ]
    return " and ".join(kinds) or "none"


class _Note:
    """A word on stderr while nothing else is to be seen; nothing when stderr is not a terminal."""

    def __init__(self) -> None:
        self._length = 0

    def show(self, text: str) -> None:
        if sys.stderr.isatty():
            self._length = len(text)
            print(text, end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._length:
            print("\r" + " " * self._length + "\r", end="", file=sys.stderr, flush=True)
            self._length = 0
