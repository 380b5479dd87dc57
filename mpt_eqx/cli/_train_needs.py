"""What a run of `mpt-eqx train` needs, before anything is allocated for it."""

import math
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpt_eqx.cli.train import Plan

SIZE = 2048
"""Rows and columns of the two matrices whose product is timed: 3 arrays of at most 16 MiB are all that it holds."""


def needs(plan: "Plan") -> str:
    """Returns what a run needs, for which its step is compiled, and nothing of it computed."""
    import equinox as eqx
    import jax

    from mpt_eqx.train import count_step_flops

    recipe = plan.recipe
    shapes = _placed(eqx.filter_eval_shape(plan.shapes), plan.optimizer)
    layout = shapes.model.layout
    devices = 1 if layout is None else math.prod(layout.mesh.shape.values())
    size = (recipe.batch_size, recipe.length)
    where = None if layout is None else layout.sharding(size, "batch", None)
    row = jax.ShapeDtypeStruct(size, "int32", sharding=where)
    given, rest = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    batch = dict.fromkeys(("tokens", "labels", "sequence_ids"), row)
    one = jax.jit(
        lambda given, batch: eqx.filter(plan.step(eqx.combine(given, rest), batch), eqx.is_array), donate_argnums=0
    )
    trained = sum(math.prod(x.shape) for x in _arrays(eqx.filter(shapes.model, shapes.trainable)))
    whole = shapes.model.config.num_parameters() + (trained if plan.options.lora else 0)
    during = one.lower(given, batch).compile().memory_analysis()
    working = "an unknown amount" if during is None else _mb(during.temp_size_in_bytes)
    state, weights = _bytes(shapes), _bytes(shapes.model)
    rows, tokens = plan.epoch
    operations = recipe.batch_size * count_step_flops(shapes.model, recipe.length, trainable=shapes.trainable)
    # Devices that a CPU plays share its cores.
    apart = min(devices, jax.process_count()) if jax.default_backend() == "cpu" else devices
    rate = apart * _operations_per_second(plan.options.compute_dtype or "float32")
    lines = {
        "weights": f"{trained:,} trained of {whole:,}",
        "data": f"{rows:,} rows of {recipe.length} tokens in a pass, {tokens:,} trained tokens",
        "steps": f"{plan.steps:,} of {recipe.batch_size} rows, {plan.steps * recipe.batch_size / rows:.3g} passes, "
        f"{plan.steps * recipe.batch_size * recipe.length:,} tokens",
        "rate": f"{recipe.learning_rate:g} after {recipe.warmup_steps} steps, then {recipe.schedule} to "
        f"{recipe.learning_rate * recipe.floor:g}",
        "operations": f"{operations:.3g} in a step",
        "time": f"{_duration(operations / rate)} a step and {_duration(plan.steps * operations / rate)} in all, if all "
        f"of it ran at the {rate:.3g} operations per second of large products, measured here"
        + (f" on one of {apart}" if apart > 1 else "")
        + "; expect more",
        "memory": f"{_mb(state)} of state ({_mb(weights)} of weights) and {working} during a step, on "
        + ("one device" if devices == 1 else f"each of {devices} devices"),
        "disk": f"{_mb(_bytes(shapes, whole=True))} for each saved state, of which 3 stay",
    }
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


def _placed(state: Any, optimizer: Any) -> Any:
    """Returns the shapes of a state with where they lie on the mesh of its model, if it is on one."""
    import equinox as eqx
    import jax
    import optax

    from mpt_eqx.sharding.specs import named_shardings

    if state.model.layout is None:
        return state

    def at(leaf: Any, where: Any) -> Any:
        return leaf if where is None else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    model = jax.tree.map(at, state.model, named_shardings(state.model), is_leaf=lambda node: node is None)
    trained = eqx.filter(model, state.trainable)
    kept = optax.tree.map_params(optimizer, lambda leaf, weight: at(leaf, weight.sharding), state.opt_state, trained)
    return eqx.tree_at(lambda s: (s.model, s.opt_state), state, (model, kept))


def _arrays(tree: Any) -> list[Any]:
    import jax

    return [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]


def _bytes(tree: Any, *, whole: bool = False) -> int:
    """Returns the bytes of the arrays of a tree, in all or on one device."""
    total = 0
    for x in _arrays(tree):
        where = None if whole else getattr(x, "sharding", None)
        shape = x.shape if where is None else where.shard_shape(x.shape)
        total += math.prod(shape) * getattr(x.dtype, "itemsize", 8)
    return total


def _operations_per_second(dtype: str) -> float:
    """Returns how many operations this process's first device does in a second, in a product of two matrices."""
    import jax
    import jax.numpy as jnp

    device = jax.local_devices()[0]
    a = jax.device_put(jnp.ones((SIZE, SIZE), dtype), device)
    product = jax.jit(lambda a: a @ a).lower(a).compile()
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        jax.block_until_ready(product(a))
        seconds.append(time.perf_counter() - started)
    return 2 * SIZE**3 / min(seconds[1:])


def _duration(seconds: float) -> str:
    """Returns a time with the unit that fits."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "s")):
        if seconds >= size or size == 1:
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
