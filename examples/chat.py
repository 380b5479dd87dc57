"""A chat in the terminal that streams its answers and caches the conversation; `mpt-eqx chat` does the same and more.

    python examples/chat.py                                            the model that ships with mpt_eqx
    python examples/chat.py --model ./mpt-7b-chat --template chatml

Each turn prefills only the new tokens; the earlier ones are a cached prefix. Needs the extra `text`:
pip install 'mpt_eqx[text]'.
"""

import argparse

import jax

from mpt_eqx import SHIPPED_MODEL, from_pretrained, prefill, stream
from mpt_eqx.text import load_tokenizer


def main() -> None:
    """Answers each line of stdin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="directory or Hub repository id")
    parser.add_argument("--template", help="chatml, mpt-instruct, or a Jinja template (default: the checkpoint's own)")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="(default: %(default)s)")
    args = parser.parse_args()

    model, tokenizer = from_pretrained(args.model), load_tokenizer(args.model)
    end_ids = [*tokenizer.eos_token_ids, *tokenizer.ids_of(["<|im_end|>"])]
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
        new = stream(
            model, [], prefix=prefix, max_new_tokens=args.max_new_tokens, eos_token_ids=end_ids,
            temperature=0.7, top_p=0.95, key=jax.random.key(len(messages)),
        )  # fmt: skip
        answer = ""
        for piece in tokenizer.decode_stream(token for token in new if token not in end_ids):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
