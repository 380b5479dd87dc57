"""Draws docs/architecture.svg: `python docs/architecture.py`. A test compares ROOMS with the imports of the package."""

from pathlib import Path

HERE = Path(__file__).parent

# From the bottom up: what each room is for, and the rooms that it imports from. A room may import from those before it.
ROOMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "errors": ("MPTError and its kinds", ()),
    "config": ("config.json to MPTConfig and back", ("errors",)),
    "ops": ("products, attention, kernels: all that knows platforms", ("errors", "config")),
    "model": ("MPT, Block, Attention, FFN, norms: the formulas", ("errors", "config", "ops")),
    "interp": ("activations captured and edited by name", ("errors", "config", "ops", "model")),
    "sharding": ("rules, shards, several processes", ("errors", "config", "ops", "model")),
    "surgery": ("models changed: quantize", ("errors", "config", "ops", "model", "sharding")),
    "checkpoint": (
        "files to models and back, Hub, formats", ("errors", "config", "ops", "model", "sharding", "surgery"),
    ),
    "lora": (
        "adapters, in PEFT's files", ("errors", "config", "ops", "model", "sharding", "checkpoint"),
    ),
    "generation": (
        "generate, decode, beam search, sampling",
        ("errors", "config", "ops", "model", "interp", "sharding", "checkpoint"),
    ),
    "evaluation": ("log-likelihoods: score", ("errors", "config", "ops", "model", "sharding", "generation")),
    "text": ("tokenizer, chat templates", ("errors", "config", "checkpoint")),
    "train": (
        "loss, steps, optimizers, data, states",
        ("errors", "config", "ops", "model", "sharding", "surgery", "checkpoint", "text"),
    ),
    "lm_eval": (
        "a model of lm-evaluation-harness",
        ("errors", "model", "surgery", "checkpoint", "lora", "generation", "evaluation", "text"),
    ),
    "serve": (
        "many requests at a time; OpenAI's interface",
        ("errors", "config", "ops", "model", "interp", "generation", "text"),
    ),
    "cli": (
        "the commands of mpt-eqx",
        (
            *("errors", "config", "ops", "model", "sharding", "surgery", "checkpoint", "lora", "generation"),
            *("evaluation", "text", "train", "lm_eval", "serve"),
        ),
    ),
}  # fmt: skip

COLOURS = (
    "#0b6e4f", "#c2571a", "#2f6fd0", "#8a3ffc", "#b28600", "#007d79", "#d12771", "#56718f", "#6f4e37", "#198038",
    "#9f1853", "#3d5a80", "#a2191f", "#4d5358", "#005d5d",
)  # fmt: skip
BOX, HEIGHT, GAP, LANE = 490, 48, 12, 24


def picture() -> str:
    """Returns the SVG: a box for each room, and for each a lane of its colour with an arrow into what it imports."""
    names = list(ROOMS)[::-1]
    top = {name: 20 + index * (HEIGHT + GAP) for index, name in enumerate(names)}
    width, height = 20 + BOX + 30 + LANE * (len(names) - 1) + 10, 20 + len(names) * (HEIGHT + GAP) + 24
    right = 20 + BOX
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13" fill="#1f2933">',
        f'<rect width="{width}" height="{height}" rx="8" fill="#f6f7f9"/>',
    ]
    for index, name in enumerate(names):
        colour, imported = (
            COLOURS[index] if ROOMS[name][1] else "#9aa5b1",
            [other for other in names if other in ROOMS[name][1]],
        )
        parts += [
            f'<rect x="20" y="{top[name]}" width="{BOX}" height="{HEIGHT}" rx="6" fill="white" stroke="#9aa5b1"/>',
            f'<rect x="20" y="{top[name]}" width="6" height="{HEIGHT}" rx="3" fill="{colour}"/>',
            f'<text x="38" y="{top[name] + 28}" font-size="15" font-weight="bold">{name}</text>',
            f'<text x="142" y="{top[name] + 28}" font-size="12">{ROOMS[name][0]}</text>',
        ]
        if not imported:
            continue
        lane, start = right + 24 + LANE * (len(names) - 2 - index), top[name] + HEIGHT - 6
        bottom = top[imported[-1]] + _offset(len(names) - index, len(names))
        parts.append(
            f'<path d="M{right} {start:g} H{lane} V{bottom:g}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        )
        for other in imported:
            y = top[other] + _offset(len(names) - index, len(names))
            parts += [
                f'<path d="M{lane} {y:g} H{right + 7}" stroke="{colour}" stroke-width="1.6"/>',
                f'<path d="M{right + 1} {y:g} l8 -2.6 v5.2 z" fill="{colour}"/>',
                f'<circle cx="{lane}" cy="{y:g}" r="2.4" fill="{colour}"/>',
            ]
    text = "Each room imports from those that the arrows of its colour point to, and from no other."
    parts += [f'<text x="20" y="{height - 12}" font-size="12">{text}</text>', "</svg>", ""]
    return "\n".join(parts)


def _offset(lane: int, lanes: int) -> float:
    """Returns how far below the top of a box a lane's arrow ends: no two meet, and all end above where one starts."""
    return 4 + (HEIGHT - 14) * (lane + 0.5) / lanes


if __name__ == "__main__":
    (HERE / "architecture.svg").write_text(picture())
