"""Multi-host training and generation: every process runs this script, and all their devices form one mesh.

On one machine, in two terminals, with two simulated CPU devices each:

    python examples/distributed.py --coordinator localhost:9876 --processes 2 --process 0 --cpu-devices 2
    python examples/distributed.py --coordinator localhost:9876 --processes 2 --process 1 --cpu-devices 2

Under Slurm, one process per machine; JAX finds the coordinator, as on TPU pods and Kubernetes:

    srun --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 python examples/distributed.py --model ./mpt-30b --tp 8

All processes must be able to read the checkpoint; each reads only its shards. Needs no extra.
"""

import argparse

import equinox as eqx
import jax
import numpy as np
import optax

from mpt_eqx import MPT, SHIPPED_MODEL, from_pretrained, generate, save_pretrained, sharding
from mpt_eqx.train import next_token_loss


def main() -> None:
    """Loads onto a mesh of all devices, trains on random tokens, generates, and optionally saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinator", help="host:port of process 0 (default: found by JAX)")
    parser.add_argument("--processes", type=int, help="number of processes; with --coordinator")
    parser.add_argument("--process", type=int, help="index of this process; with --coordinator")
    parser.add_argument("--cpu-devices", type=int, help="simulate this many CPU devices in each process")
    parser.add_argument("--model", default=SHIPPED_MODEL, help="directory or Hub repository id")
    parser.add_argument("--tp", type=int, default=1, help="size of the tensor-parallel axis (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="training steps (default: %(default)s)")
    parser.add_argument("--save", help="directory for the trained model (default: not saved)")
    args = parser.parse_args()
    if args.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    jax.distributed.initialize(args.coordinator, args.processes, args.process)

    mesh = sharding.make_mesh(fsdp=jax.device_count() // args.tp, tp=args.tp)
    model = from_pretrained(args.model, mesh=mesh, rules=sharding.FSDP_TP)
    optimizer = optax.adamw(1e-4)

    @eqx.filter_jit(donate="all")
    def step(model: MPT, opt_state: optax.OptState, tokens: jax.Array) -> tuple[MPT, optax.OptState, jax.Array]:
        loss, gradients = eqx.filter_value_and_grad(next_token_loss)(model, tokens)
        updates, opt_state = optimizer.update(gradients, opt_state, model)
        return eqx.apply_updates(model, updates), opt_state, loss

    def say(text: str) -> None:
        if jax.process_index() == 0:
            print(text, flush=True)

    say(f"{jax.process_count()} processes, {jax.device_count()} devices, mesh {dict(mesh.shape)}")
    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))  # outside of jit: sharded like the weights
    random = np.random.default_rng(0)  # the same in every process; the loss shards the batch
    for number in range(args.steps):
        sharding.assert_same_across_processes(step=number)
        tokens = random.integers(0, model.config.vocab_size, (2 * mesh.shape["fsdp"], 128), np.int32)
        model, opt_state, loss = step(model, opt_state, model.layout.replicate(tokens))
        say(f"step {number}: loss {float(loss):.4f}")
    result = generate(model, [1, 2, 3], max_new_tokens=8)  # all processes call it and get the result
    say(f"tokens: {result.tokens[0].tolist()}")
    if args.save:
        save_pretrained(model, args.save)  # written by process 0, one gathered tensor at a time
        say(f"saved to {args.save}")


if __name__ == "__main__":
    main()
