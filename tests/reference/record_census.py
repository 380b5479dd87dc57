"""Records what transformers does with the small checkpoint of every config in census.json.

python tests/reference/record_census.py  (needs the extra `reference`)
"""

import json
import re
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers

ROOM = Path(__file__).parent.parent
sys.path.insert(0, str(ROOM))
import census  # noqa: E402

TOKENS = list(range(12))


def outcome(name, weights):
    """Returns how transformers refuses a checkpoint, or how far its logits are from those of the formulas."""
    with tempfile.TemporaryDirectory() as directory:
        census.write(Path(directory), name, weights)
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, trust_remote_code=False
            ).eval()
            with torch.no_grad():
                logits = model(torch.tensor([TOKENS])).logits[0].numpy()
        except Exception as error:  # whatever it is, a user would see it
            text = " ".join(f"{type(error).__name__}: {error}".replace(directory, "…").split())
            return {"refuses": re.split(r"\. | \(value", text)[0]}
    return {"off_by": float(f"{np.abs(logits - census.expected(name, TOKENS)).max():.2g}")}


def main():
    """Writes census_transformers.json."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = {}
    for entry in census.REPOSITORIES.values():
        name, files = entry["config"], entry["weights"]
        if name and name not in found and entry["outcome"] == "runs":
            found[name] = outcome(name, files)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    text = json.dumps({**versions, "outcomes": found}, indent=1)
    (ROOM / "census_transformers.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
