"""`mpt-eqx score`: log-likelihoods of continuations."""

import argparse
from typing import Any

from mpt_eqx.cli._lines import Record, add_output, at_line, done_lines, encoded, read_texts, write_answers
from mpt_eqx.cli.options import add_loading, add_model, add_prefix_token, find, find_prefix_token, load

BATCH = 64
"""Lines that are written at a time."""

DESCRIPTION = """Scores continuations of prompts. Each line of the file is a JSON object with a "prompt", which may be
empty, and a "continuation". The object is written with these keys added: "tokens", the continuation's ids; "logprobs",
the log-probability of each in nats; "is_greedy", whether no token is more likely than each; and "total", the sum."""

EPILOG = """example:
  echo '{"prompt": "The zip() function", "continuation": " returns"}' > pairs.jsonl
  mpt-eqx score pairs.jsonl

Prompt and continuation are encoded as one text; spaces at the end of the prompt count as the continuation's, as in
lm-evaluation-harness.
"""


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers `commands`; `shared` holds the options of every command."""
    parser = commands.add_parser(
        "score", parents=[shared], help="log-likelihoods of given texts", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("file", metavar="FILE", help="JSONL file with prompts and continuations")
    add_model(parser, "--model")
    add_prefix_token(parser)
    add_output(parser)
    add_loading(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the lines with their scores to --output or stdout, and returns the exit code."""
    from mpt_eqx.evaluation import score
    from mpt_eqx.generation.validate import check_sequences
    from mpt_eqx.text.pairs import encode_pair

    lines = read_texts(args.file, ("prompt", "continuation"), ("tokens", "logprobs", "is_greedy", "total"))
    done = done_lines(args, lines)
    place, tokenizer = find(args)
    before = find_prefix_token(args, tokenizer)
    pairs = encoded(
        args.file, lines, lambda record: encode_pair(tokenizer, record["prompt"], record["continuation"], before)
    )
    model = load(place, args, tokenizer)
    for (number, _), (tokens, _) in zip(lines, pairs, strict=True):
        with at_line(args.file, number):
            check_sequences(model.config, tokens)

    def scored(first: int, records: list[Record]) -> list[Record]:
        here = pairs[first : first + len(records)]
        scores = score(
            model, [tokens for tokens, _ in here], prefix_lengths=[given for _, given in here], progress=False
        )
        return [
            {
                "tokens": tokens[given:],
                "logprobs": each.logprobs.tolist(),
                "is_greedy": each.is_greedy.tolist(),
                "total": each.total,
            }
            for (tokens, given), each in zip(here, scores, strict=True)
        ]

    return write_answers(args, lines, done, BATCH, scored)
