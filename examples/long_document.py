"""Long contexts: continues a document far longer than the model was trained on, as MPT-7B-StoryWriter does.

    python examples/long_document.py                                   the model that ships with mpt_eqx, 4,000 tokens
    python examples/long_document.py --model ./mpt-7b-storywriter --text book.txt --tokens 65536

ALiBi extrapolates to any length, so only `max_seq_len` has to be raised when the model is loaded. Blockwise attention
makes memory linear in the number of tokens. Needs the extra `text`: pip install 'mpt_eqx[text]'.
"""

import argparse
import resource
import time
from pathlib import Path
from pydoc_data.topics import topics

import jax

from mpt_eqx import SHIPPED_MODEL, from_pretrained, prefill, stream
from mpt_eqx.text import load_tokenizer


def main() -> None:
    """Prefills the document, then streams a continuation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="directory or Hub repository id")
    parser.add_argument("--text", type=Path, help="a file (default: pages of Python's language reference)")
    parser.add_argument("--tokens", type=int, default=4000, help="length of the prompt (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    args = parser.parse_args()
    text = args.text.read_text() if args.text else "\n\n".join(topics.values())

    tokenizer = load_tokenizer(args.model)
    document = tokenizer.encode(text)[: args.tokens]
    model = from_pretrained(
        args.model, config_overrides={"max_seq_len": max(2048, len(document) + args.max_new_tokens)}
    )
    start = time.monotonic()
    prefix = prefill(model, document)
    print(f"{len(prefix)} tokens of prefill in {time.monotonic() - start:.1f} s, with compilation")
    tokens = stream(
        model, [], prefix=prefix, max_new_tokens=args.max_new_tokens, temperature=0.8, top_p=0.95,
        repetition_penalty=1.05, eos_token_ids=tokenizer.eos_token_ids, key=jax.random.key(0),
    )  # fmt: skip
    for piece in tokenizer.decode_stream(tokens):
        print(piece, end="", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"\n{time.monotonic() - start:.1f} s in total; peak memory {peak:.2f} GB")


if __name__ == "__main__":
    main()
