"""Talks with a model in the terminal, word by word as it answers; `mpt-eqx chat` is the same with more to it.

    python examples/chat.py                                            the model that ships with mpt_eqx
    python examples/chat.py --model ./mpt-7b-chat --template chatml

Each turn reads only what is new: what was read before is a prefix that the next turn goes on from. Needs the extra
`text`: pip install 'mpt_eqx[text]'.
"""

import argparse

import jax

from mpt_eqx import SHIPPED_MODEL, from_pretrained, prefill, stream
from mpt_eqx.text import load_tokenizer


def main() -> None:
    """Reads a line, answers it, until there is no other line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="directory or Hub repository id")
    parser.add_argument("--template", help="chatml, mpt-instruct, or a Jinja template (default: the checkpoint's own)")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    args = parser.parse_args()

    model, tokenizer = from_pretrained(args.model), load_tokenizer(args.model)
    ends = [*tokenizer.eos_token_ids, *tokenizer.ids_of(["<|im_end|>"])]
    messages: list[dict[str, str]] = []
    prefix = None
    while True:
        try:
            messages.append({"role": "user", "content": input("> ")})
        except EOFError:
            return
        tokens = tokenizer.apply_chat_template(messages, chat_template=args.template)
        if prefix is not None and prefix.tokens.tolist() == tokens[: len(prefix)]:
            prefix = prefill(model, tokens[len(prefix) :], prefix=prefix)
        else:
            prefix = prefill(model, tokens)
        made = stream(
            model, [], prefix=prefix, max_new_tokens=args.max_new_tokens, eos_token_ids=ends,
            temperature=0.7, top_p=0.95, key=jax.random.key(len(messages)),
        )  # fmt: skip
        answer = ""
        for piece in tokenizer.decode_stream(token for token in made if token not in ends):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
