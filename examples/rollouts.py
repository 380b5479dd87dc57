"""Rollouts with a reward inside one jit: REINFORCE on what the model writes.

    python examples/rollouts.py                                        the model that ships with mpt_eqx
    python examples/rollouts.py --model ./mpt-1b --steps 40 --letter z --output reward.svg

Each step samples a batch of continuations with `decode` under vmap, gives each the share of its tokens that contain a
letter as its reward, and moves the weights along the policy gradient; all steps are one scan. What the reward costs,
the divergence from the first model in nats per token, is drawn beside it, and a part of it is taken off. The model is
stacked, so that a block is compiled once. Needs the extras `text` and `plot`.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

from mpt_eqx import SHIPPED_MODEL, SamplingParams, decode, from_pretrained, stack
from mpt_eqx.text import load_tokenizer


@eqx.filter_jit
def train(model, prompt, rewarded, key, *, steps, rollouts, new_tokens, learning_rate, penalty):
    """Returns the model after `steps` of REINFORCE, and of each the mean reward, the divergence and a rollout.

    `rewarded` says of each token of the vocabulary whether it counts.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    policy, static = eqx.partition(model, eqx.is_inexact_array)
    sampling = SamplingParams(temperature=1.0)

    def logprobs(policy, tokens):
        logits = eqx.combine(policy, static)(jnp.concatenate([prompt, tokens]))[len(prompt) - 1 : -1]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=-1)[:, 0]

    def loss(policy, tokens, advantages):
        return -(advantages[:, None] * jax.vmap(logprobs, (None, 0))(policy, tokens)).mean()

    def step(carry, key):
        policy, opt_state = carry
        current = eqx.combine(policy, static)

        def roll(key):
            return decode(current, prompt, len(prompt), max_new_tokens=new_tokens, sampling=sampling, key=key)

        out = jax.vmap(roll)(jax.random.split(key, rollouts))
        reward = rewarded[out.tokens].mean(-1)
        first = jax.vmap(logprobs, (None, 0))(eqx.filter(model, eqx.is_inexact_array), out.tokens)
        divergence = (out.logprobs - first).mean(-1)
        score = reward - penalty * divergence
        advantages = (score - score.mean()) / (score.std() + 1e-6)
        updates, opt_state = optimizer.update(jax.grad(loss)(policy, out.tokens, advantages), opt_state)
        return (eqx.apply_updates(policy, updates), opt_state), (reward.mean(), divergence.mean(), out.tokens[0])

    (policy, _), history = jax.lax.scan(step, (policy, optimizer.init(policy)), jax.random.split(key, steps))
    return eqx.combine(policy, static), history


def main() -> None:
    """Prints the reward on the way and a continuation before and after, and draws reward and divergence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="directory or Hub repository id")
    parser.add_argument("--prompt", default="Return the", help="what is continued")
    parser.add_argument("--letter", default="m", help="tokens that contain it are rewarded (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="updates (default: %(default)s)")
    parser.add_argument("--rollouts", type=int, default=16, help="per step (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=12, help="of each rollout (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="default: %(default)s")
    parser.add_argument("--penalty", type=float, default=0.2, help="on each nat of divergence (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("rollouts.png"), help="a picture, .png or .svg")
    args = parser.parse_args()

    model, tokenizer = from_pretrained(args.model, dtype="float32"), load_tokenizer(args.model)
    prompt = jnp.array(tokenizer.encode(args.prompt))
    rewarded = jnp.array([args.letter in tokenizer.decode([i]) for i in range(model.config.vocab_size)], jnp.float32)
    _, (rewards, divergences, said) = train(
        stack(model), prompt, rewarded, jax.random.key(args.seed), steps=args.steps, rollouts=args.rollouts,
        new_tokens=args.new_tokens, learning_rate=args.learning_rate, penalty=args.penalty,
    )  # fmt: skip
    for step in sorted({0, args.steps // 4, args.steps // 2, args.steps - 1}):
        print(f"step {step:3}: mean reward {rewards[step]:.3f}, divergence {divergences[step]:.2f} nats per token")

    for name, tokens in (("before", said[0]), ("after", said[-1])):
        print(f"--- {name}\n{args.prompt}{tokenizer.decode(tokens)}")

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rewards, label="mean reward")
    axes.set(
        xlabel="step", ylabel=f"share of tokens with {args.letter!r}", ylim=(0, None), title="REINFORCE in one jit"
    )
    axes.plot([], [], "C1--", label="divergence")
    axes.legend(loc="upper left")
    other = axes.twinx()
    other.plot(divergences, "C1--")
    other.set(ylabel="nats per token", ylim=(0, None))
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
