"""Makes what docs/sharding.md shows: `python docs/sharding.py` writes the picture and the table there.

Nothing of the models is allocated, and no devices are needed.
"""

import re
from pathlib import Path

from jax.sharding import AbstractMesh

from mpt_eqx import MPTConfig, sharding
from mpt_eqx.sharding.specs import abstract_model

HERE = Path(__file__).parent
MODELS = ("mpt-7b", "mpt-30b", "mpt-70b")
MESHES = (
    ("DATA_PARALLEL", {"dp": 8}),
    ("SEQUENCE_PARALLEL", {"dp": 2, "sp": 4}),
    ("FSDP", {"fsdp": 8}),
    ("TENSOR_PARALLEL", {"tp": 8}),
    ("FSDP_TP", {"fsdp": 2, "tp": 4}),
    ("FSDP_TP", {"fsdp": 8, "tp": 8}),
)


def table() -> str:
    """Returns gigabytes of weights on each device as Markdown."""
    lines = [f"| rules | mesh | {' | '.join(MODELS)} |", "|---|---|" + "---|" * len(MODELS)]
    models = [abstract_model(MPTConfig.preset(model), "bfloat16") for model in MODELS]
    for name, axes in MESHES:
        mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
        cells = []
        for model in models:
            last = sharding.explain(model, mesh, getattr(sharding, name)).splitlines()[-1]
            nbytes = int(re.search(r"devices ([\d,]+)", last)[1].replace(",", ""))
            cells.append(f"{nbytes / 1e9:.2f}")
        lines.append(f"| {name} | {', '.join(f'{axis}={size}' for axis, size in axes.items())} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(fsdp: int = 2, tp: int = 4) -> str:
    """Returns an SVG of a mesh under FSDP_TP: what each device has of Wq, of the cache and of the batch."""
    cell, side, left, top = 150, 72, 70, 58
    width, height = left + tp * cell, top + fsdp * cell + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" text-anchor="middle">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left + tp * cell / 2}" y="18" font-size="14">mesh axis tp: heads, MLP, vocabulary</text>',
        f'<text transform="translate(18 {top + fsdp * cell / 2}) rotate(-90)" font-size="14">mesh axis fsdp</text>',
    ]
    for column in range(tp):
        parts.append(f'<text x="{left + (column + 0.5) * cell}" y="42">tp {column}</text>')
    for row in range(fsdp):
        parts.append(f'<text transform="translate(48 {top + (row + 0.5) * cell}) rotate(-90)">fsdp {row}</text>')
        for column in range(tp):
            x, y = left + column * cell, top + row * cell
            matrix, batch = (x + 16, y + 44), (x + 108, y + 44)
            parts += [
                f'<rect x="{x + 4}" y="{y + 4}" width="{cell - 8}" height="{cell - 8}" rx="6" fill="#f4f6fa" '
                f'stroke="#8a94a6"/>',
                f'<text x="{x + cell / 2}" y="{y + 22}">device {row * tp + column}</text>',
                f'<text x="{matrix[0] + side / 2}" y="{matrix[1] - 6}" font-size="10">Wq</text>',
                f'<rect x="{matrix[0]}" y="{matrix[1]}" width="{side}" height="{side}" fill="white" stroke="#8a94a6"/>',
                f'<rect x="{matrix[0] + row * side / fsdp}" y="{matrix[1] + column * side / tp}" '
                f'width="{side / fsdp}" height="{side / tp}" fill="#2f6fd0"/>',
                f'<text x="{batch[0] + 10}" y="{batch[1] - 6}" font-size="10">batch</text>',
                f'<rect x="{batch[0]}" y="{batch[1]}" width="20" height="{side}" fill="white" stroke="#8a94a6"/>',
                f'<rect x="{batch[0]}" y="{batch[1] + row * side / fsdp}" width="20" height="{side / fsdp}" '
                f'fill="#d9822b"/>',
                f'<text x="{matrix[0] + side / 2}" y="{matrix[1] + side + 14}" font-size="9">rows: heads</text>',
            ]
    text = "blue: the part of Wq [heads, embed] that a device keeps; orange: its rows of the batch"
    parts += [f'<text x="{width / 2}" y="{height - 16}">{text}</text>', "</svg>", ""]
    return "\n".join(parts)


def main() -> None:
    """Writes both."""
    page = HERE / "sharding.md"
    before, _, rest = page.read_text().partition("<!-- table -->\n")
    page.write_text(f"{before}<!-- table -->\n{table()}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")
    (HERE / "mesh.svg").write_text(picture())


if __name__ == "__main__":
    main()
