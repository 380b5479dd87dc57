"""Prefix caching: prefills a long text once and continues it in several ways.

    python examples/prefix.py                                          the model that ships with mpt_eqx
    python examples/prefix.py --model ./mpt-7b-instruct --text report.txt --ending "In short," --ending "The risks are"

Needs the extra `text`: pip install 'mpt_eqx[text]'.
"""

import argparse
import time
from pathlib import Path
from pydoc_data.topics import topics

from mpt_eqx import SHIPPED_MODEL, from_pretrained, generate, prefill, warmup
from mpt_eqx.text import load_tokenizer


def main() -> None:
    """Prints the time of the prefill and of each continuation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="directory or Hub repository id")
    parser.add_argument("--text", type=Path, help="a file (default: a page of Python's language reference)")
    parser.add_argument("--ending", action="append", help="what follows the text; may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    args = parser.parse_args()
    text = args.text.read_text() if args.text else topics["for"]
    endings = args.ending or ["\n\nNote that", "\n\nFor example", "\n\nChanged in version"]

    model, tokenizer = from_pretrained(args.model), load_tokenizer(args.model)
    document = tokenizer.encode(text)
    warmup(model, batch_sizes=[1], prompt_lengths=[len(document)], max_new_tokens=args.max_new_tokens)

    start = time.monotonic()
    prefix = prefill(model, document)
    print(f"{len(prefix)} tokens of prefill in {time.monotonic() - start:.2f} s")
    for ending in endings:
        start = time.monotonic()
        result = generate(
            model, tokenizer.encode(ending), prefix=prefix, max_new_tokens=args.max_new_tokens,
            repetition_penalty=1.1, eos_token_ids=tokenizer.eos_token_ids,
        )  # fmt: skip
        new_text = tokenizer.decode(result.tokens[0, : result.lengths[0]])
        print(f"--- {time.monotonic() - start:.2f} s\n…{ending.strip()}{new_text}")


if __name__ == "__main__":
    main()
