"""`mpt-eqx inspect`: shows what a checkpoint contains and what is wrong with it."""

import argparse
import sys
from pathlib import Path
from typing import Any

from mpt_eqx import MPTConfig
from mpt_eqx.cli.options import add_model
from mpt_eqx.config.quantization import Quantization


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "inspect", parents=[shared], help="show what a checkpoint contains",
        description="Reads a checkpoint's headers and shows its contents; exit code 1 if it cannot be loaded.",
    )  # fmt: skip
    add_model(parser, "model", nargs="?")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="PATTERN",
        help="leave out tensors of this name, such as 'score.*'; may be repeated (default: none)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the contents to stdout and problems to stderr; returns 1 if there are problems."""
    from mpt_eqx.checkpoint import checkpoint_info
    from mpt_eqx.checkpoint.names import HEAD, canonical_name

    info = checkpoint_info(args.model, revision=args.revision, ignore=args.ignore)
    config, files = info.config, sorted({tensor.file for tensor in info.tensors})
    # The headers do not say whether it equals the embedding, as it should.
    heads = [tensor.name for tensor in info.tensors if canonical_name(tensor.name) == HEAD]
    tied = "tied" + (f" ({heads[0]} is stored, too; loading checks that it is the same)" if heads else "")
    rows = [
        ("directory", info.directory),
        ("format", f"{info.format}, {len(files)} file{'s' * (len(files) != 1)}, {info.bytes / 1e6:,.1f} MB"),
        ("parameters", f"{info.parameters:,} in {len(info.tensors)} tensors"),
        ("types", ", ".join(sorted({tensor.dtype for tensor in info.tensors}))),
        *([("quantised", _quantised(info.quantization))] if info.quantization else []),
        (
            "layers",
            f"{config.n_layers}, d_model {config.d_model}, {config.n_heads} heads, {config.kv_heads} KV heads, "
            f"{config.ffn_config.ffn_type} {config.ffn_hidden_size}",
        ),
        (
            "vocabulary",
            f"{config.vocab_size:,}, lm_head {tied if config.tie_word_embeddings else 'untied'}",
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


def _quantised(quantization: Quantization) -> str:
    return f"{quantization.scheme} weights, embedding {'included' if quantization.embeddings else 'not quantised'}"


def _positions(config: MPTConfig) -> str:
    attn = config.attn_config
    kinds = [
        *([f"ALiBi, alibi_bias_max {attn.alibi_bias_max:g}"] if attn.alibi else []),
        *([f"rotary, rope_theta {attn.rope_theta:g}"] if attn.rope else []),
        *(["learned"] if config.learned_pos_emb else []),
    ]
    return " and ".join(kinds) or "none"
