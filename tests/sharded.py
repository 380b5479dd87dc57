"""Eight devices of a CPU, asked line by line: computes a case on one device and on a mesh, and answers in JSON."""

import dataclasses
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import equinox as eqx
import jax
import numpy as np
import optax

from mpt_eqx import from_pretrained, generate, sharding
from mpt_eqx.model.sections import in_sections
from mpt_eqx.train import next_token_loss

GOLDEN = Path(__file__).parent / "golden"
COLLECTIVES = r"= \S+ (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def rules_of(name: str, batch: list[str] | None) -> sharding.ShardingRules:
    rules = getattr(sharding, name)
    return rules if batch is None else dataclasses.replace(rules, batch=tuple(batch))


def mesh_of(kind: str, axes: dict[str, int]) -> jax.sharding.Mesh:
    if kind == "explicit":
        return jax.make_mesh(tuple(axes.values()), tuple(axes))
    return sharding.make_mesh(**axes)


def whole(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def largest(ours, theirs) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(whole(ours), whole(theirs), strict=True))


def compare(case: str, preset: str, axes: dict[str, int], kind: str = "auto", batch: list[str] | None = None) -> dict:
    """How far logits, gradients and one step of AdamW on a mesh are from those of one device, and if tokens differ."""
    rules, mesh = rules_of(preset, batch), mesh_of(kind, axes)
    alone = from_pretrained(GOLDEN / case, dtype="float32")
    shared = from_pretrained(GOLDEN / case, dtype="float32", mesh=mesh, rules=rules)
    moved = sharding.shard(alone, mesh, rules)
    tokens = np.random.default_rng(0).integers(1, alone.config.vocab_size, (4, 12)).astype(np.int32)
    forward = eqx.filter_jit(lambda model, tokens: jax.vmap(model)(tokens))
    gradient = eqx.filter_jit(eqx.filter_value_and_grad(next_token_loss))
    optimizer = optax.adamw(1e-3)

    def step(model, grads):
        updates, _ = optimizer.update(grads, optimizer.init(model), model)
        return eqx.apply_updates(model, updates)

    (loss, grads), (shared_loss, shared_grads) = gradient(alone, tokens), gradient(shared, tokens)
    fitting = in_sections if shared.blocks[0].attn.Wqkv is None else lambda model: model
    options = {"max_new_tokens": 6, "return_logits": True}
    prompts = [row[:7].tolist() for row in tokens]
    ours, theirs = generate(shared, prompts, **options), generate(alone, prompts, **options)
    sampled = [generate(m, prompts, max_new_tokens=6, temperature=1.0, key=jax.random.key(1)) for m in (shared, alone)]
    return {
        "logits": largest(forward(shared, tokens), forward(alone, tokens)),
        "moved": largest(moved, shared),
        "loss": abs(float(loss) - float(shared_loss)),
        "gradients": largest(shared_grads, fitting(grads)),
        "step": largest(eqx.filter_jit(step)(shared, shared_grads), fitting(step(alone, grads))),
        "tokens": bool(np.array_equal(ours.tokens, theirs.tokens)),
        "sampled": bool(np.array_equal(sampled[0].tokens, sampled[1].tokens)),
    }


def collectives(preset: str, axes: dict[str, int]) -> dict:
    """What the devices send each other in a forward pass."""
    alone = from_pretrained(GOLDEN / "hf_generate", dtype="float32")
    shared = sharding.shard(alone, sharding.make_mesh(**axes), rules_of(preset, None))
    tokens = np.ones((4, 12), np.int32)
    text = eqx.filter_jit(lambda model, tokens: jax.vmap(model)(tokens)).lower(shared, tokens).compile().as_text()
    return dict(Counter(re.findall(COLLECTIVES, text)))


def main() -> None:
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps({"compare": compare, "collectives": collectives}[name](**arguments)), flush=True)


if __name__ == "__main__":
    main()
