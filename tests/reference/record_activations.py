"""Records values and gradients of every activation as torch computes them; needs the extra `reference`.

python tests/reference/record_activations.py tests/golden/activations
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

# What a config.json says as ffn_act_fn, arguments in full.
CASES = {
    "gelu": {"name": "gelu", "approximate": "none"},
    "gelu_tanh": {"name": "gelu", "approximate": "tanh"},
    "quick_gelu": {"name": "quick_gelu"},
    "relu": {"name": "relu"},
    "relu6": {"name": "relu6"},
    "leaky_relu": {"name": "leaky_relu", "negative_slope": 0.01},
    "leaky_relu_negative": {"name": "leaky_relu", "negative_slope": -0.3},
    "elu": {"name": "elu", "alpha": 1.0},
    "elu_alpha": {"name": "elu", "alpha": 0.3},
    "selu": {"name": "selu"},
    "celu": {"name": "celu", "alpha": 1.0},
    "celu_alpha": {"name": "celu", "alpha": 2.5},
    "silu": {"name": "silu"},
    "mish": {"name": "mish"},
    "softplus": {"name": "softplus", "beta": 1.0, "threshold": 20.0},
    "softplus_beta": {"name": "softplus", "beta": 3.0, "threshold": 6.0},
    "softplus_negative": {"name": "softplus", "beta": -0.5, "threshold": 1.0},
    "softsign": {"name": "softsign"},
    "tanh": {"name": "tanh"},
    "sigmoid": {"name": "sigmoid"},
    "logsigmoid": {"name": "logsigmoid"},
    "hardtanh": {"name": "hardtanh", "min_val": -1.0, "max_val": 1.0},
    "hardtanh_wide": {"name": "hardtanh", "min_val": -0.5, "max_val": 2.0},
    "hardsigmoid": {"name": "hardsigmoid"},
    "hardswish": {"name": "hardswish"},
}
# Kinks, what is close to them, where functions are steep or saturate, and large magnitudes.
KINKS = (0.0, 0.5, 1.0, 2.0, 3.0, 6.0, 20.0)
GRID = sorted(
    {
        *(sign * kink * near for kink in KINKS for near in (0.99, 1.0, 1.01) for sign in (-1, 1)),
        *(
            sign * size
            for size in (1e-30, 1e-8, 1e-3, 0.1, 0.25, 0.75, 1.5, 4.5, 10, 15, 50, 100, 1e4)
            for sign in (-1, 1)
        ),
    }
)


def quick_gelu(x):
    """As llm-foundry 0.22 has it, llmfoundry/models/layers/ffn.py, quickgelu_activation."""
    return x * torch.sigmoid(1.702 * x)


def function(name):
    return quick_gelu if name == "quick_gelu" else getattr(torch.nn.functional, name)


def main(directory):
    recorded = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.tensor(GRID, dtype=dtype)
        prefix = str(dtype).removeprefix("torch.")
        recorded[f"{prefix}.x"] = x
        for case, act in CASES.items():
            leaf = x.clone().requires_grad_()
            arguments = {key: value for key, value in act.items() if key != "name"}
            y = function(act["name"])(leaf, **arguments)
            if case == act["name"]:  # the arguments are torch's own defaults
                assert torch.equal(y, function(act["name"])(leaf))
            y.sum().backward()
            recorded[f"{prefix}.{case}.value"], recorded[f"{prefix}.{case}.grad"] = y.detach(), leaf.grad
            assert torch.isfinite(y).all() and torch.isfinite(leaf.grad).all(), (case, dtype)
    directory.mkdir(exist_ok=True)
    save_file(recorded, directory / "expected.safetensors")
    content = {"torch": torch.__version__, "script": "tests/reference/record_activations.py", "cases": CASES}
    (directory / "case.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
