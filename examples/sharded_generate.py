"""Sharding: loads a model onto a mesh of devices and generates with all of them.

    python examples/sharded_generate.py --cpu-devices 4 --mesh fsdp=2,tp=2     four simulated CPU devices
    python examples/sharded_generate.py --model ./mpt-30b --mesh tp=8 --rules TENSOR_PARALLEL
    python examples/sharded_generate.py --model ./mpt-30b --mesh fsdp=4,tp=2 --explain

--explain prints the sharding of each weight and loads nothing. Needs the extra `text`: pip install 'mpt_eqx[text]'.
"""

import argparse
import time

import jax
from jax.sharding import AbstractMesh

from mpt_eqx import SHIPPED_MODEL, checkpoint_info, from_pretrained, generate, sharding
from mpt_eqx.text import load_tokenizer

RULES = ("DATA_PARALLEL", "FSDP", "TENSOR_PARALLEL", "FSDP_TP", "SEQUENCE_PARALLEL")


def axes_of(text: str) -> dict[str, int]:
    """Returns the axes of a mesh from a text such as fsdp=2,tp=4."""
    return {name: int(size) for name, _, size in (part.partition("=") for part in text.split(","))}


def main() -> None:
    """Explains the sharding, or loads onto the mesh and continues prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="directory or Hub repository id")
    parser.add_argument("--mesh", type=axes_of, default="fsdp=1,tp=1", help="axes and sizes, such as fsdp=2,tp=4")
    parser.add_argument("--rules", choices=RULES, default="FSDP_TP")
    parser.add_argument("--cpu-devices", type=int, help="simulate this many devices on the CPU")
    parser.add_argument("--explain", action="store_true", help="print the sharding of each weight and exit")
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    args = parser.parse_args()
    rules = getattr(sharding, args.rules)
    if args.explain:
        mesh = AbstractMesh(tuple(args.mesh.values()), tuple(args.mesh))
        print(sharding.explain(checkpoint_info(args.model).config, mesh, rules))
        return
    if args.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)

    tokenizer = load_tokenizer(args.model)
    model = from_pretrained(args.model, mesh=sharding.make_mesh(**args.mesh), rules=rules)
    prompts = args.prompt or ["The zip() function", "Return True if"]
    started = time.monotonic()
    result = generate(
        model,
        [tokenizer.encode(prompt) for prompt in prompts],
        max_new_tokens=args.max_new_tokens,
        eos_token_ids=tokenizer.eos_token_ids,
    )
    for prompt, tokens, length in zip(prompts, result.tokens, result.lengths, strict=True):
        print(f"---\n{prompt}{tokenizer.decode(tokens[:length])}")
    print(f"---\n{result.lengths.sum()} tokens in {time.monotonic() - started:.1f} s with compilation")


if __name__ == "__main__":
    main()
