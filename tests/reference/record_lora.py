"""Records what PEFT computes with an adapter that mpt_eqx.lora wrote; needs the extra `reference`.

python tests/reference/record_lora.py tests/golden/peft_ours
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import equinox as eqx
import jax
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mpt_eqx import from_pretrained, lora
from mpt_eqx.model.leaves import with_fields

THEIRS = Path(__file__).parent.parent / "golden" / "peft_wqkv_ffn"
TARGETS = ("Wqkv", "out_proj", "up_proj", "down_proj")


def adapted():
    """Returns the base with adapters on all of its linear maps, neither A nor B zero, scaled by alpha / √rank."""
    keys = iter(jax.random.split(jax.random.key(7), 100))

    def change(node):
        if not isinstance(node, lora.LoRALinear):
            return node
        b = 0.3 * jax.random.normal(next(keys), node.lora_B.weight.shape)
        return eqx.tree_at(lambda adapter: adapter.lora_B.weight, with_fields(node, rslora=True), b)

    model = from_pretrained(THEIRS / "base")
    model = lora.add(model, rank=4, alpha=3.0, targets=TARGETS, dropout=0.1, key=jax.random.key(6))
    return jax.tree.map(change, model, is_leaf=lambda node: isinstance(node, lora.LoRALinear))


def main(directory):
    lora.save(adapted(), directory / "adapter", base="peft_wqkv_ffn/base")
    plain = AutoModelForCausalLM.from_pretrained(THEIRS / "base")
    model = PeftModel.from_pretrained(plain, directory / "adapter").eval()
    kept = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    written = load_file(directory / "adapter" / "adapter_model.safetensors")
    assert len(kept) == len(written) == 16
    for name, tensor in kept.items():
        assert torch.equal(tensor, written[name.replace(".default", "")]), name
    with torch.no_grad():
        logits = model(load_file(THEIRS / "expected.safetensors")["input_ids"]).logits
    save_file({"logits": logits}, directory / "expected.safetensors")
    content = {name: version(name) for name in ("peft", "transformers", "torch")}
    content["script"] = "tests/reference/record_lora.py"
    (directory / "case.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
