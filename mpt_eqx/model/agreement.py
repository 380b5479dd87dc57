"""Whether the sizes of a model are those of its configuration, where others would pass unnoticed or explain nothing."""

from typing import Any

from mpt_eqx.errors import MPTError

RESIZE = "mpt_eqx.surgery.resize_vocab(model, {found}) makes them agree"
BY_HAND = "make an MPT of a config that says so and put the weights there with equinox.tree_at"


def check_agreement(model: Any, error: type[MPTError] = MPTError) -> None:
    """Raises an `error` where `model.config` says other sizes than the embedding, the head and the blocks have."""
    config = model.config
    sizes = (
        ("wte", "vocab_size", RESIZE), ("lm_head", "vocab_size", RESIZE), ("wpe", "max_seq_len", BY_HAND)
    )  # fmt: skip
    for name, key, way in sizes:
        found, rows = _rows(getattr(model, name)), getattr(config, key)
        if found is not None and found != rows:
            what = f"expected {rows} rows, as config.{key} says, found {found}"
            raise error(f"{name}.weight: {what}; {way.format(found=found)}")
    if (count := len(model.blocks)) != config.n_layers:
        way = f"mpt_eqx.surgery.keep_blocks(model, range({count})) makes them agree"
        if config.block_overrides is not None:
            way = (
                "mpt_eqx.surgery.keep_blocks(model, indices) of the model before keeps block_overrides with its blocks"
            )
        raise error(f"blocks: expected {config.n_layers}, as config.n_layers says, found {count}; {way}")


def _rows(module: Any) -> int | None:
    """Returns the number of rows of a module's weight, quantised or not; None for something else, such as a wrapper."""
    weight = getattr(module, "weight", None)
    shape = getattr(getattr(weight, "values", weight), "shape", None)
    return shape[0] if isinstance(shape, tuple) and len(shape) == 2 else None
