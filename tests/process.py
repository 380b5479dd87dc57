"""One of two processes with two devices each: computes what one device does, or nothing, and answers in JSON."""

import json
import sys
import time
from pathlib import Path

import jax
from sharded import ODD, PROMPTS, TOKENS, largest, local_bytes, trained, written

from mpt_eqx import MPT, MPTConfig, MPTError, beam_search, from_pretrained, generate, save_pretrained, sharding
from mpt_eqx.checkpoint.host_arrays import gather_to_host

PORT, RANK, CHECKPOINT, DIRECTORY, COMPUTES = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_disable_most_optimizations", True)
jax.distributed.initialize(f"localhost:{PORT}", 2, RANK, initialization_timeout=60)


def loaded(**changed) -> MPT:
    return from_pretrained(CHECKPOINT, **{"mesh": mesh, "rules": sharding.FSDP_TP, "dtype": "float32", **changed})


def refused(function) -> dict:
    """What was said, and after how many seconds."""
    started = time.monotonic()
    try:
        function()
    except MPTError as error:
        return {"said": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - started}
    return {"said": None}


mesh = sharding.make_mesh(fsdp=2, tp=2)


def answer() -> dict:
    """What is computed, and what is said where the two differ."""
    model = loaded()
    tokens = model.layout.replicate(TOKENS)
    computed = trained(model, tokens)
    save_pretrained(computed["step"], Path(DIRECTORY) / "trained")
    there = Path(DIRECTORY) / f"none{RANK}" if RANK else CHECKPOINT
    other = sharding.FSDP if RANK else sharding.FSDP_TP
    moved = sharding.shard(from_pretrained(CHECKPOINT, dtype="float32"), mesh, sharding.FSDP_TP)
    # Tensors of odd sizes come last in a file.
    odd = sharding.shard(MPT(MPTConfig(**ODD), key=jax.random.key(0)), sharding.make_mesh(fsdp=4), sharding.FSDP)
    save_pretrained(odd, Path(DIRECTORY) / "odd")
    return {
        "moved": largest(*([gather_to_host(leaf) for leaf in jax.tree.leaves(m)] for m in (moved, model))),
        "bytes": local_bytes(model),
        "logits": gather_to_host(computed["logits"]).tolist(),
        "loss": float(computed["loss"]),
        **{name: tokens.tolist() for name, tokens in written(model).items()},
        "beams": beam_search(model, PROMPTS, num_beams=3, max_new_tokens=6).tokens.tolist(),
        "refused": {
            "config": refused(lambda: loaded(config_overrides={"max_seq_len": 16 + RANK})),
            "rules": refused(lambda: loaded(rules=other)),
            "file": refused(lambda: from_pretrained(there, mesh=mesh, rules=sharding.FSDP)),
            "dtype": refused(lambda: loaded(dtype="bfloat16" if RANK else "float32")),
            "step": refused(lambda: sharding.assert_same_across_processes(step=10 + RANK)),
            "prompts": refused(lambda: generate(model, [[1, 2, 3 + RANK]], max_new_tokens=2)),
            "axes": refused(lambda: loaded(mesh=sharding.make_mesh(fsdp=4), rules=other)),
            "invalid": refused(lambda: generate(model, [[RANK * 99]], max_new_tokens=2)),
            "length": refused(lambda: generate(model, [[1]], max_new_tokens=2, return_logits=bool(RANK))),
            "options": refused(
                lambda: generate(model, [[1]], max_new_tokens=2, temperature=1.0, key=jax.random.key(RANK))
            ),
            "save": refused(lambda: save_pretrained(model, Path("/proc/nowhere"))),
        },
    }  # fmt: skip


print(json.dumps(answer() if COMPUTES == "computes" else {}), flush=True)
loaded(config_overrides={"max_seq_len": 16 + RANK})  # ends both
