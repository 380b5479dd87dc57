"""The published recipes: their numbers, and that their optimizers follow them."""

import jax.numpy as jnp
import optax
import pytest


@pytest.fixture
def recipes():
    from mpt_eqx.train import RECIPES

    return RECIPES


# Read from the yamls in github.com/mosaicml/llm-foundry, scripts/train/yamls.
PUBLISHED = {
    "mpt-125m": {"learning_rate": 6e-4, "b2": 0.95, "batch_size": 256, "length": 2048, "steps": 4800},
    "mpt-7b": {"learning_rate": 1.2e-4, "b2": 0.95, "batch_size": 1024, "length": 2048, "steps": 63900},
    "mpt-30b": {"learning_rate": 1e-4, "b2": 0.95, "batch_size": 2048, "length": 2048, "steps": 143100},
    "mpt-7b-dolly-sft": {"learning_rate": 5e-6, "b2": 0.999, "batch_size": 48, "length": 2048, "epochs": 2},
    "mpt-30b-instruct": {"learning_rate": 9.65e-6, "b2": 0.95, "batch_size": 72, "length": 8192, "epochs": 8},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_those_that_were_published(recipes, name):
    recipe, pretraining = recipes[name], "steps" in PUBLISHED[name]
    assert {field: getattr(recipe, field) for field in PUBLISHED[name]} == PUBLISHED[name]
    schedule = (recipe.schedule, recipe.warmup_steps, recipe.floor)
    assert schedule == (("cosine", 100, 0.1) if pretraining else ("linear", 50, 0.0))
    assert (recipe.weight_decay, recipe.max_grad_norm) == (0.0, 1.0)
    assert recipe.source.startswith(f"scripts/train/yamls/{'pretrain' if pretraining else 'finetune'}/")


def test_all_are_tested(recipes):
    assert set(recipes) == set(PUBLISHED)


@pytest.mark.parametrize("name", ["mpt-125m", "mpt-30b-instruct"])
def test_the_optimizer_of_a_recipe_steps_by_its_rate(recipes, name):
    """Of a constant gradient, AdamW's step is the learning rate: half of the peak in the middle of the warm-up."""
    recipe = recipes[name]
    optimizer = recipe.optimizer(1000)
    weights = {"w": jnp.ones(3)}
    state = optimizer.init(weights)
    for _ in range(recipe.warmup_steps // 2 + 1):
        updates, state = optimizer.update({"w": jnp.full(3, 0.1)}, state, weights)
    assert updates["w"] == pytest.approx(-recipe.learning_rate / 2, rel=1e-4)
    assert optax.apply_updates(weights, updates)["w"].shape == (3,)


def test_a_recipe_in_epochs_asks_for_steps(recipes):
    from mpt_eqx import MPTError

    with pytest.raises(MPTError, match=r"total_steps: expected a number of steps, because .* 2 epochs"):
        recipes["mpt-7b-dolly-sft"].optimizer()
    with pytest.raises(MPTError, match=r"warmup_steps: expected .* found 50"):
        recipes["mpt-7b-dolly-sft"].optimizer(40)
