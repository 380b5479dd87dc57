"""What `mpt-eqx train` shows and writes of a run: progress, log.jsonl, curve.png."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any


class Log:
    """The progress bar and log.jsonl, in which a run that goes on replaces the steps that it does again."""

    def __init__(self, output: Path, steps: int) -> None:
        self._output, self._steps = output, steps
        self._bar: Any = None
        self._file: Any = None

    def __call__(self, record: dict[str, Any]) -> None:
        """Writes what happened in a step."""
        from tqdm import tqdm

        if self._file is None:
            self._output.mkdir(parents=True, exist_ok=True)
            lines = self.lines()
            before = [line for line in lines if line["step"] < record["step"]]
            self._file = open(self._output / "log.jsonl", "a" if before == lines else "w", encoding="utf-8")  # noqa: SIM115
            if before != lines:
                self._file.writelines(json.dumps(line) + "\n" for line in before)
            self._bar = tqdm(total=self._steps, initial=record["step"] - 1, unit="step", disable=None)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
        self._bar.update()
        if shown := {name: record[name] for name in ("eval_loss", "sample") if name in record}:
            self._bar.write(f"step {record['step']}: {json.dumps(shown, ensure_ascii=False)}", file=sys.stderr)

    def lines(self) -> list[dict[str, Any]]:
        """Returns what log.jsonl has; a line that a crash has torn is left out."""
        path, found = self._output / "log.jsonl", []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def close(self) -> None:
        """Ends both."""
        if self._file is not None:
            self._file.close()
            self._bar.close()

    def draw(self) -> None:
        """Draws curve.png, if matplotlib is there."""
        try:
            import matplotlib
        except ImportError:
            return
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        lines = self.lines()
        figure, axes = plt.subplots(3, figsize=(7, 7), sharex=True, layout="constrained")
        for axis, name in zip(axes, ("loss", "learning_rate", "grad_norm"), strict=True):
            axis.plot([line["step"] for line in lines], [line[name] for line in lines])
            axis.set_ylabel(name.replace("_", " "))
        measured = [line for line in lines if "eval_loss" in line]
        axes[0].plot([line["step"] for line in measured], [line["eval_loss"] for line in measured], "o-")
        axes[-1].set_xlabel("step")
        figure.savefig(self._output / "curve.png")
        plt.close(figure)
