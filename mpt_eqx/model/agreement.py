"""Whether the sizes of a model are those of its configuration, where others would pass unnoticed or explain nothing."""

from typing import Any

from mpt_eqx.errors import MPTError


def check_agreement(model: Any, error: type[MPTError] = MPTError) -> None:
    """Raises an `error` where `model.config` says other sizes than the embedding, the head and the blocks have."""
    config = model.config
    asked = [("wte.weight", model.wte.weight, "vocab_size", config.vocab_size)]
    if model.lm_head is not None:
        asked.append(("lm_head.weight", model.lm_head.weight, "vocab_size", config.vocab_size))
    if model.wpe is not None:
        asked.append(("wpe.weight", model.wpe.weight, "max_seq_len", config.max_seq_len))
    for name, weight, key, rows in asked:
        found = _rows(weight)
        if found is not None and found != rows:
            way = f"mpt_eqx.surgery.resize_vocab(model, {found}) makes them agree"
            if model.wpe is not None and weight is model.wpe.weight:
                way = "make an MPT of a config that says so and put the weights there with equinox.tree_at"
            raise error(f"{name}: expected {rows} rows, as config.{key} says, found {found}; {way}")
    if len(model.blocks) != config.n_layers:
        raise error(
            f"blocks: expected {config.n_layers}, as config.n_layers says, found {len(model.blocks)}; make an MPT of a "
            f"config that says so and put the blocks there with equinox.tree_at"
        )


def _rows(weight: Any) -> int | None:
    """Returns the number of rows of a weight, quantised or not; None for something else, such as a wrapper."""
    shape = getattr(getattr(weight, "values", weight), "shape", None)
    return shape[0] if isinstance(shape, tuple) and len(shape) == 2 else None
