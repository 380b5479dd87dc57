"""What follows from the figures of several implementations: ratios, and whether they computed the same."""

from collections.abc import Sequence
from typing import Any

import numpy as np

OURS, OURS_XLA = "mpt_eqx", "mpt_eqx (plain XLA)"

FIRST_CALLS = ("first", "prefill", "decode")
"""What is called once and again, so that seconds of compilation follow."""

TOLERANCE = {"float32": 0.005, "bfloat16": 0.03, "int8": 0.06, "int4": 0.5}
"""How far logits may be from mpt_eqx in the widest dtype: the root mean square of the difference over their deviation.

In float32 not less, because llama.cpp reads GELU from a table of 16 bits. The others are twice what random weights of
the reference size lose, in 4 bits one and a half times; only another computation would lose more.
"""


def agreement(expected: np.ndarray, found: np.ndarray, dtype: str) -> dict[str, Any]:
    """Returns how far logits are from the expected ones, and whether that is within the tolerance."""
    error = found.astype(np.float64) - expected
    difference = float(np.sqrt(np.mean(error**2)) / expected.std())
    return {
        "difference": difference,
        "largest_difference": float(np.abs(error).max()),
        "tolerance": TOLERANCE[dtype],
        "agrees": bool(difference <= TOLERANCE[dtype]),  # False where it is NaN
        "same_next_token": bool(found.argmax() == expected.argmax()),
    }


def disagreement(result: dict[str, Any]) -> str:
    """Returns a line on a result whose logits are not those of the others."""
    found = result["agreement"]
    return (
        f"{result['implementation']}, {result['dtype']}: its logits differ from those of mpt_eqx in the widest dtype "
        f"by {found['difference']:.3g} of their standard deviation, expected at most {found['tolerance']}; "
        f"its figures are worth nothing"
    )


def compile_seconds(result: dict[str, Any]) -> float | None:
    """Returns how much longer the first calls of `FIRST_CALLS` took than the median of later ones, all together."""
    runs = [run for what in FIRST_CALLS for run in result.get(what, {}).values() if "median_seconds" in run]
    return sum(max(0.0, run["first_seconds"] - run["median_seconds"]) for run in runs) if runs else None


def ratios(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns our tokens per second over every other's; adds to each result those of a batch over those of one row."""
    by = {(result["implementation"], result["dtype"]): result for result in results}
    found = []
    for (name, dtype), result in by.items():
        ours = by.get((OURS, dtype))
        for what in ("prefill", "decode", "score"):
            for size, run in result.get(what, {}).items():
                mine = ours.get(what, {}).get(size, {}).get("tokens_per_s") if ours else None
                if name != OURS and mine and "tokens_per_s" in run:
                    ratio = mine / run["tokens_per_s"]
                    found.append({"over": name, "dtype": dtype, "what": what, "size": size, "ratio": ratio})
        one = result["decode"].get("1", {}).get("tokens_per_s")
        for size, run in result["decode"].items():
            if one and size != "1" and "tokens_per_s" in run:
                run["over_one_row"] = run["tokens_per_s"] / one
    return found
