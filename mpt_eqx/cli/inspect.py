"""`mpt-eqx inspect`: what a checkpoint holds, and what is wrong with it."""

import argparse
import sys
from pathlib import Path
from typing import Any

from mpt_eqx import SHIPPED_MODEL, MPTConfig
from mpt_eqx.config.quantization import Quantization


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "inspect", parents=[shared], help="show what a checkpoint holds",
        description="Reads a checkpoint's headers and shows what it holds; exit code 1 if it cannot be loaded.",
    )  # fmt: skip
    parser.add_argument(
        "model", nargs="?", default=str(SHIPPED_MODEL), metavar="M", help="directory, weight file or Hub repository id"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes what the checkpoint holds to stdout, its problems to stderr; exit code 1 if there are any."""
    from mpt_eqx.checkpoint import checkpoint_info
    from mpt_eqx.checkpoint.names import HEAD, canonical_name

    info = checkpoint_info(args.model, revision=args.revision)
    config, files = info.config, sorted({tensor.file for tensor in info.tensors})
    # Whether it is the embedding again, as it should be, is not in the headers.
    heads = [tensor.name for tensor in info.tensors if canonical_name(tensor.name) == HEAD]
    tied = "tied" + (f" ({heads[0]} is there too; that it is the same shows when it is loaded)" if heads else "")
    rows = [
        ("directory", info.directory),
        ("format", f"{info.format}, {len(files)} file{'s' * (len(files) != 1)}, {info.bytes / 1e6:,.1f} MB"),
        ("parameters", f"{info.parameters:,} in {len(info.tensors)} tensors"),
        ("types", ", ".join(sorted({tensor.dtype for tensor in info.tensors}))),
        *([("quantised", _quantised(info.quantization))] if info.quantization else []),
        (
            "layers",
            f"{config.n_layers} of width {config.d_model}, {config.n_heads} heads over {config.kv_heads} of keys and "
            f"values, {config.ffn_config.ffn_type} {config.ffn_hidden_size}",
        ),
        (
            "vocabulary",
            f"{config.vocab_size:,}, output matrix {tied if config.tie_word_embeddings else 'of its own'}",
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
    return (
        f"matrices in {quantization.scheme}, {'the embedding, too' if quantization.embeddings else 'but the embedding'}"
    )


def _positions(config: MPTConfig) -> str:
    attn = config.attn_config
    kinds = [
        *([f"ALiBi, alibi_bias_max {attn.alibi_bias_max:g}"] if attn.alibi else []),
        *([f"rotary, rope_theta {attn.rope_theta:g}"] if attn.rope else []),
        *(["learned"] if config.learned_pos_emb else []),
    ]
    return " and ".join(kinds) or "none"
