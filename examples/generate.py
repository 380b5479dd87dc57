"""Batched generation: continues several prompts of different lengths in one call, with sampling.

    python examples/generate.py                                       the model that ships with mpt_eqx
    python examples/generate.py --model ./mpt-7b --prompt "Once" --prompt "In a hole in the ground"

Needs the extra `text`: pip install 'mpt_eqx[text]'.
"""

import argparse

import jax

from mpt_eqx import SHIPPED_MODEL, from_pretrained, generate
from mpt_eqx.text import load_tokenizer


def main() -> None:
    """Prints each continuation with its mean log-probability."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="directory or Hub repository id")
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prompts = args.prompt or ["The zip() function", "Return True if", "class collections.OrderedDict"]

    tokenizer = load_tokenizer(args.model)
    model = from_pretrained(args.model)
    result = generate(
        model,
        [tokenizer.encode(prompt) for prompt in prompts],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=0.95,
        eos_token_ids=tokenizer.eos_token_ids,
        key=jax.random.key(args.seed),
    )
    for prompt, tokens, length, logprobs in zip(prompts, result.tokens, result.lengths, result.logprobs, strict=True):
        print(f"--- {logprobs[:length].mean():.2f} nats per token")
        print(prompt + tokenizer.decode(tokens[:length]))


if __name__ == "__main__":
    main()
