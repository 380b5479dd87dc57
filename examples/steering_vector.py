"""A steering vector: a direction of the residual stream that makes the model write of errors.

    python examples/steering_vector.py                                 the model that ships with mpt_eqx
    python examples/steering_vector.py --model ./mpt-7b --layer 12 --strengths -1 0 1 2 --output steering.svg

The vector is the mean difference, at the last position, between prompts that speak of errors and prompts that do not
(Turner et al., 2023; Rimsky et al., 2024). It is added to the stream after one block, at each position from the second
on. The picture has the probability that the next word speaks of errors, over the strength. Needs the extras `text` and
`plot`.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from mpt_eqx import SHIPPED_MODEL, from_pretrained, generate, interp
from mpt_eqx.text import load_tokenizer

ERRORS = ("Raised when the {} is", "Raise ValueError if the {} is", "An exception is raised if the {} is")
OTHERS = ("Returned when the {} is", "Return True if the {} is", "A string is returned if the {} is")
NOUNS = ("path", "name", "value", "key")
PROMPTS = ("This method", "The function", "If the file is not")
TARGETS = (" exception", " error", " raised", " ValueError")


def padded(prompts: list[list[int]]):
    """Returns the prompts in one array, padded on the right, and their lengths."""
    longest = max(map(len, prompts))
    return jnp.array([row + [0] * (longest - len(row)) for row in prompts]), jnp.array([len(row) for row in prompts])


@eqx.filter_jit
def mean_at_the_end(model, place, tokens, lengths):
    """Returns the mean activation [D] at the last token of each prompt."""

    def last(row, length):
        return interp.run(model, row, capture=(place,)).activations[place][length - 1]

    return jax.vmap(last)(tokens, lengths).mean(0)


@eqx.filter_jit
def target_logprobs(model, place, tokens, lengths, vectors, targets):
    """Returns the log-probability that one of the targets comes next [S, B], with each of the vectors [S, D] added."""

    def one(vector, row, length):
        edits = {place: interp.Add(vector, positions=slice(1, None))}
        logprobs = jax.nn.log_softmax(interp.run(model, row, edits=edits).logits[length - 1])
        return jax.nn.logsumexp(logprobs[targets])

    return jax.vmap(jax.vmap(one, (None, 0, 0)), (0, None, None))(vectors, tokens, lengths)


def main() -> None:
    """Prints the probabilities and a continuation at each strength, and draws the probabilities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="directory or Hub repository id")
    parser.add_argument("--layer", type=int, default=3, help="the block after which it is added (default: %(default)s)")
    parser.add_argument("--strengths", type=float, nargs="+", default=[-4, -2, 0, 1, 2, 3, 4, 6, 8], help="factors")
    parser.add_argument("--max-new-tokens", type=int, default=12, help="of the continuations (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("steering_vector.png"), help="a picture, .png or .svg")
    args = parser.parse_args()

    model, tokenizer = from_pretrained(args.model, dtype="float32"), load_tokenizer(args.model)

    def encode(text):
        return [*tokenizer.eos_token_ids[:1], *tokenizer.encode(text)]

    place = f"blocks.{args.layer}.hook_resid_post"
    means = [
        mean_at_the_end(model, place, *padded([encode(prompt.format(noun)) for prompt in prompts for noun in NOUNS]))
        for prompts in (ERRORS, OTHERS)
    ]
    vector = means[0] - means[1]
    prompts = [encode(prompt) for prompt in PROMPTS]
    targets = jnp.array([tokenizer.encode(target)[0] for target in TARGETS])
    vectors = jnp.array(args.strengths)[:, None] * vector
    logprobs = target_logprobs(model, place, *padded(prompts), vectors, targets)

    print(f"added after block {args.layer}: a vector of length {jnp.linalg.norm(vector):.1f}, times the strength")
    edits = [{place: interp.Add(steer, positions=slice(1, None))} for steer in vectors]  # of each row
    result = generate(model, [prompts[-1]] * len(edits), max_new_tokens=args.max_new_tokens, edits=edits)
    for strength, row, tokens in zip(args.strengths, logprobs, result.tokens, strict=True):
        text = PROMPTS[-1] + tokenizer.decode(tokens)
        print(f"strength {strength:4g}: log-probability {row.mean():6.2f}; {text!r}")

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for prompt, curve in zip(PROMPTS, logprobs.T, strict=True):
        axes.semilogy(args.strengths, jnp.exp(curve), "o-", label=f"“{prompt} …”")
    axes.axvline(0, color="gray", linewidth=1)
    axes.set(xlabel="strength", ylabel="probability", title=f"next: {', '.join(word.strip() for word in TARGETS)}")
    axes.legend()
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
