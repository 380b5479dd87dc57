"""Edits of activations in generation: each row has its own, and its neighbours notice nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import counting_compiles

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [1, 2]]
OPTIONS = {"max_new_tokens": 6, "return_logits": True}


@pytest.fixture(scope="module")
def rows():
    """Edits of all kinds for the first and the last prompt, none for the one between."""
    from mpt_eqx import interp

    rng = np.random.default_rng(0)
    vector, keys = rng.normal(size=(2, 32)).astype(np.float32), rng.normal(size=(4, 8)).astype(np.float32)
    return [
        {
            "blocks.0.hook_resid_post": interp.Add(vector[0], positions=slice(2, None)),
            "blocks.*.attn.hook_z": [interp.Scale(0.5), jnp.tanh],
            "blocks.1.attn.hook_k": interp.Add(keys, positions=[1, 4]),
        },
        None,
        {
            "hook_embed": interp.Replace(vector, positions=[0, 3]),
            "blocks.0.hook_resid_post": interp.Add(vector[1]),
            "blocks.1.attn.hook_pattern": interp.Ablate(np.arange(4)[:, None, None] == 2, positions=slice(3, None)),
            "blocks.1.mlp.hook_post": interp.Scale(2),
            "ln_final.hook_normalized": interp.Scale(1.1),
        },
    ]


def logits_of(model, prompt, tokens, edits):
    """Logits of the new tokens in one forward pass of the whole."""
    from mpt_eqx import interp

    whole = jnp.asarray([*prompt, *tokens])
    return jax.jit(lambda whole: interp.run(model, whole, edits=edits).logits)(whole)[len(prompt) - 1 : -1]


@pytest.mark.slow
def test_a_row_has_its_own_edits(tiny_model, rows):
    """It equals the forward pass of the whole with them; decode and stream give its tokens."""
    from mpt_eqx import decode, generate, stream

    together = generate(tiny_model, PROMPTS, edits=rows, **OPTIONS)
    plain = generate(tiny_model, PROMPTS, **OPTIONS)
    for prompt, edits, tokens, logits, before in zip(
        PROMPTS, rows, together.tokens, together.logits, plain.logits, strict=True
    ):
        np.testing.assert_allclose(logits, logits_of(tiny_model, prompt, tokens, edits), atol=2e-5)
        assert (np.abs(logits - before).max() < 1e-5) == (edits is None)
    assert list(stream(tiny_model, PROMPTS[2], edits=rows[2], max_new_tokens=6)) == together.tokens[2].tolist()
    padded = jnp.asarray([*PROMPTS[0], 0, 0])
    alone = jax.jit(lambda tokens, n: decode(tiny_model, tokens, n, max_new_tokens=6, edits=rows[0]))(padded, 3)
    np.testing.assert_array_equal(alone.tokens, together.tokens[0])


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_with_edits_is_the_same_in_every_bit(kernel, tiny_config, dtype):
    """As alone with its edits; its neighbour is as in a batch without any."""
    from mpt_eqx import MPT, InitConfig, generate, interp

    model = MPT(tiny_config(n_layers=1, init_config=InitConfig(emb_init_std=0.5)), key=jax.random.key(3))
    model = jax.tree.map(lambda x: x.astype(dtype), model)
    edits = {
        "hook_embed": interp.Add(np.linspace(-1, 1, 32, dtype=np.float32), positions=slice(2, None)),
        "blocks.0.attn.hook_z": interp.Scale(0.5),
    }
    options = {"max_new_tokens": 4, "return_logits": True}
    together = generate(model, PROMPTS[:2], edits=[edits, None], **options)
    np.testing.assert_array_equal(together.logits[1], generate(model, PROMPTS[:2], **options).logits[1])
    alone = generate(model, PROMPTS[0], edits=edits, **options)
    np.testing.assert_array_equal(together.logits[0], alone.logits[0])
    np.testing.assert_array_equal(together.tokens[0], alone.tokens[0])


@pytest.mark.slow
@pytest.mark.optimized
def test_rows_with_edits_of_other_kinds_are_the_same_in_every_bit(kernel, tiny_model, rows):
    from mpt_eqx import generate

    together = generate(tiny_model, PROMPTS, edits=rows, **OPTIONS)
    for row in (0, 2):
        alone = generate(tiny_model, PROMPTS[row], edits=rows[row], **OPTIONS)
        np.testing.assert_array_equal(together.logits[row], alone.logits[0])


def test_new_values_never_compile_again(tiny_model):
    from mpt_eqx import generate, interp

    def steered(factor, start):
        edits = {"blocks.1.hook_resid_mid": interp.Scale(factor, positions=slice(start, None))}
        return generate(tiny_model, PROMPTS, edits=edits, **OPTIONS).logits

    first = steered(1.5, 2)
    with counting_compiles() as programs:
        second = steered(0.5, 4)
    assert not programs and np.abs(first - second).max() > 1e-3


def test_several_rows_of_a_prompt_and_a_prefix(tiny_model, rows):
    """Rows of one prompt have its edits; positions count the tokens of a prefix."""
    from mpt_eqx import generate, interp, prefill

    drawn = generate(
        tiny_model, PROMPTS[:2], edits=rows[:2], num_return_sequences=2,
        temperature=1.0, key=jax.random.key(0), **OPTIONS,
    )  # fmt: skip
    np.testing.assert_allclose(drawn.logits[1], logits_of(tiny_model, PROMPTS[0], drawn.tokens[1], rows[0]), atol=2e-5)
    edits = {"blocks.0.hook_attn_out": interp.Scale(3, positions=[4, 5])}
    prefix = prefill(tiny_model, PROMPTS[0])
    continued = generate(tiny_model, [9, 9], prefix=prefix, edits=edits, **OPTIONS)
    whole = generate(tiny_model, [*PROMPTS[0], 9, 9], edits=edits, **OPTIONS)
    np.testing.assert_allclose(continued.logits, whole.logits, atol=2e-5)


def test_messages(tiny_model, golden):
    from mpt_eqx import GenerationError, MPTError, decode, generate, interp, prefill

    prefix = prefill(tiny_model, PROMPTS[0])
    cases = [
        ({"edits": [None, None]}, r"edits: expected one mapping, or a list of one for each of 3 prompts, found 2"),
        (
            {"edits": {"blocks.7.hook_z": 1}},
            "edits: expected the name of a place, or a pattern of some, found 'blocks.7",
        ),
        ({"edits": {"hook_embed": interp.Add(1, positions=[8])}}, "expected positions from 0 to 7, found 8"),
        ({"edits": {"hook_embed": jnp.ones((9, 32))}}, r"hook_embed: expected a value that broadcasts to \(8, 32\)"),
        ({"edits": {"blocks.0.attn.hook_pattern": jnp.ones((4, 1, 3))}}, r"that broadcasts to \(4, 8, 1\)"),
        (
            {"prefix": prefix, "edits": {"hook_embed": interp.Add(1, positions=[2])}},
            "expected positions from 3 on, which are not in the prefix, found 2",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(GenerationError, match=message):
            generate(tiny_model, PROMPTS[::-1] if "prefix" not in arguments else PROMPTS, max_new_tokens=6, **arguments)
    with pytest.raises(GenerationError, match="edits: expected a mapping from places to edits, found int"):
        decode(tiny_model, jnp.arange(3), 3, max_new_tokens=2, edits=3)
    shared = golden("f_reuse_kv").model
    reading = next(i for i, layer in enumerate(shared.config.layers) if layer.kv_from is not None)
    with pytest.raises(MPTError, match="expected no hook_k and hook_v of a block that reads another block's cache"):
        generate(shared, PROMPTS[0], max_new_tokens=2, edits={f"blocks.{reading}.attn.hook_k": interp.Scale(2)})
