"""What a step of training is counted to cost, against the step that XLA compiles."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from conftest import some

from mpt_eqx import MPT, AttnConfig, FFNConfig, MPTConfig, MPTError, count_flops, lora, quantize, stack, train
from mpt_eqx.ops import cpu

LENGTH = 128


def model_of(**options):
    sizes = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 96, "max_seq_len": 256}
    return MPT(MPTConfig(**{**sizes, **options}), key=jax.random.key(0))


def adapted(model, *targets):
    return lora.add(model, rank=4, targets=targets, key=jax.random.key(1))


def flops_of_xla(model, trainable):
    """What XLA counts in the compiled step, elementwise work included."""
    optimizer = optax.sgd(1e-3)
    shapes = eqx.filter_eval_shape(lambda: train.TrainState.create(model, optimizer, trainable=trainable))
    given, rest = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    step = train.make_train_step(optimizer)
    batch = {"tokens": jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)}
    one = jax.jit(lambda given, batch: eqx.filter(step(eqx.combine(given, rest), batch), eqx.is_array))
    return one.lower(given, batch).compile().cost_analysis()["flops"]


CASES = {
    "all": (lambda model: model, None),
    "adapters of Wqkv": (lambda model: adapted(model, "Wqkv"), lora.trainable),
    "adapters of up_proj": (lambda model: adapted(model, "up_proj"), lora.trainable),
    "adapters over int8": (lambda model: adapted(quantize(model, "int8"), "out_proj", "down_proj"), lora.trainable),
    "the last block": (lambda model: model, train.named("*blocks.2*")),
    "a network in the first block": (lambda model: model, train.named("*blocks.0.ffn*")),
    "the last norm": (lambda model: model, train.named("*norm_f*")),
    "the embedding": (lambda model: model, train.named("*wte*")),
}


@pytest.mark.parametrize("case", some(list(CASES), ["adapters of Wqkv", "a network in the first block"]))
def test_a_step_costs_what_is_counted(monkeypatch, case):
    """XLA counts elementwise work, too, which is 1 to 4 % here."""
    monkeypatch.setattr(cpu, "available", lambda: False)  # of the kernel's products XLA counts nothing
    change, trainable = CASES[case]
    model = change(model_of(d_model=256, n_layers=3, vocab_size=512, no_bias=True))
    counted = train.count_step_flops(model, LENGTH, trainable=trainable)
    assert 0.96 < counted / flops_of_xla(model, trainable) < 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"no_bias": True, "tie_word_embeddings": False},
        {"learned_pos_emb": False},
        {"attn_config": AttnConfig(attn_type="grouped_query_attention", kv_n_heads=2, fused_qkv=False, qk_ln=True)},
        {"ffn_config": FFNConfig(ffn_type="mptglu")},
        {"ffn_config": FFNConfig(ffn_type="torch_dmoe", moe_num_experts=4, moe_top_k=2)},
        {"ffn_config": FFNConfig(ffn_type="mb_dmoe", moe_num_experts=4, moe_top_k=2)},
    ],
)
def test_with_all_weights_trained_it_is_the_formula(options):
    model = model_of(**options)
    for one in (model, stack(model), eqx.filter_eval_shape(lambda: model)):
        assert train.count_step_flops(one, 100) == count_flops(model.config, 100)


def test_adapters_by_hand():
    """The first Wqkv and A need no gradient of their input, every B needs one."""
    t, d, rank = 100, 64, 4
    model = adapted(model_of(no_bias=True), "Wqkv")
    n, wqkv, a, b = model.config.num_parameters(), 3 * d * d, rank * d, rank * 3 * d
    unused = model.config.max_seq_len * d + d + wqkv  # wpe, the first norm and Wqkv
    whole = 2 * t * (2 * n - unused + 2 * 3 * (a + b) - a) + 2 * 12 * d * t**2
    assert train.count_step_flops(model, t, trainable=lora.trainable) == whole
    assert train.count_step_flops(stack(model), t, trainable=lora.trainable) == whole
    quantized = adapted(quantize(model_of(no_bias=True), "int4", embeddings=True), "Wqkv")
    assert train.count_step_flops(quantized, t, trainable=lora.trainable) == whole


def test_maps_of_one_input_need_no_gradient_for_each_other():
    model = model_of(no_bias=True, n_layers=1, ffn_config=FFNConfig(ffn_type="mptglu"))
    first, second = (
        train.count_step_flops(model, 100, trainable=train.named(f"*ffn.{name}*")) for name in ("gate_proj", "up_proj")
    )
    assert first == second


def test_a_tree_that_is_not_like_the_model_is_refused():
    with pytest.raises(MPTError, match="trainable: expected a tree of booleans like the model, found another tree"):
        train.count_step_flops(model_of(), 10, trainable=[True])
