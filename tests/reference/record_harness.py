"""Records what lm-evaluation-harness makes of the shipped model through transformers: tests/golden/harness.

Needs the extra `reference`, and lm-eval with accelerate: `python tests/reference/record_harness.py`.
"""

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": tempfile.mkdtemp()}
TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))
MODEL = TESTS.parent / "mpt_eqx" / "pydoc-3m"


def main():
    import lm_eval
    from harness import GOLDEN, SETTINGS, TASKS, numbers, write_tasks
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as directory:
        manager = TaskManager(include_path=str(write_tasks(Path(directory))), include_defaults=False)
        recorded = {}
        for name, settings in SETTINGS.items():
            results = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(MODEL), "dtype": "float32", "max_length": settings["max_length"]},
                tasks=list(TASKS),
                num_fewshot=settings["num_fewshot"],
                task_manager=manager,
                batch_size=1,
                device="cpu",
                bootstrap_iters=0,
            )
            recorded[name] = numbers(results)
    versions = {name: version(name) for name in ("lm_eval", "transformers", "torch")}
    text = json.dumps({"versions": versions, **recorded}, ensure_ascii=False)
    (GOLDEN / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
