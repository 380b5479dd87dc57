"""Activations by name: what is captured is what the model computes, and edits change what they say."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import some

KINDS = some(
    [
        *("f_mha_alibi", "f_glu_silu", "f_torch_dmoe", "f_reuse_kv", "f_reuse_kv_x", "f_rope", "f_no_pos", "f_qk_ln"),
        *("f_gqa_kv2", "f_attn_softcap", "f_learned_pos", "f_bias", "f_qk_gn", "f_clip_qkv", "f_sliding_window"),
        *("f_unfused_qkv", "f_rmsnorm", "f_temp_tuning", "f_pad_token_id", "hf_default"),
    ],
    kept=("f_mha_alibi", "f_torch_dmoe"),
)
TOKENS = jnp.asarray([5, 1, 7, 7, 2, 9])
T = len(TOKENS)


@pytest.fixture
def everything(golden):
    """Runs a model of the reference data with every place captured."""
    from mpt_eqx import interp

    def make(name, **kwargs):
        model = golden(name, **kwargs).model
        return model, interp.run(model, TOKENS, capture="*")

    return make


def same_as_computed(model, run, equal):
    """What a model returns by itself is what was captured."""
    states = model.hidden_states(TOKENS)
    equal(run.logits, model(TOKENS))
    equal(run.activations["ln_final.hook_normalized"], states[-1])
    for i in range(len(model.blocks)):
        equal(run.activations[f"blocks.{i}.hook_resid_pre"], states[i])


@pytest.mark.parametrize("name", KINDS)
def test_what_is_captured_is_what_the_model_computes(everything, name):
    from mpt_eqx import interp

    model, run = everything(name)
    if "moe" in name:  # XLA has the products of experts, and fuses them otherwise in a program that returns more
        with jax.enable_x64(True):
            close = partial(np.testing.assert_allclose, atol=1e-12, rtol=0)
            same_as_computed(*everything(name, dtype="float64"), close)
    else:
        same_as_computed(model, run, np.testing.assert_array_equal)
    shapes = {place: tuple(T if n == "T" else n for n in shape) for place, shape in interp.places(model.config).items()}
    found = run.activations
    assert {place: x.shape for place, x in found.items()} == shapes
    for i, block in enumerate(model.blocks):
        of = {place.removeprefix(f"blocks.{i}."): x for place, x in found.items()}
        pattern = of["attn.hook_pattern"]
        np.testing.assert_allclose(pattern.sum(-1), 1, atol=1e-6)
        np.testing.assert_allclose(pattern, jax.nn.softmax(of["attn.hook_attn_scores"], axis=-1), atol=1e-6)
        v = jnp.repeat(of["attn.hook_v"], pattern.shape[0] // of["attn.hook_v"].shape[1], axis=1)
        np.testing.assert_allclose(jnp.einsum("nts,snh->tnh", pattern, v), of["attn.hook_z"], atol=1e-5)
        np.testing.assert_allclose(
            block.attn.out_proj(of["attn.hook_z"].reshape(T, -1)), of["hook_attn_out"], atol=1e-5
        )
        np.testing.assert_allclose(of["hook_resid_pre"] + of["hook_attn_out"], of["hook_resid_mid"], atol=1e-5)
        np.testing.assert_allclose(of["hook_resid_mid"] + of["hook_mlp_out"], of["hook_resid_post"], atol=1e-5)
        if hasattr(block.ffn, "down_proj"):
            np.testing.assert_allclose(block.ffn.down_proj(of["mlp.hook_post"]), of["hook_mlp_out"], atol=1e-5)


@pytest.mark.parametrize("name", some(["f_mha_alibi", "f_torch_dmoe", "f_gqa_kv2"], kept=("f_gqa_kv2",)))
def test_queries_and_keys_make_the_scores(everything, name):
    """Where neither norms nor rotation stand between them."""
    from mpt_eqx.ops.attention import alibi_bias, visible

    model, run = everything(name)
    attn, places = model.blocks[1].attn, jnp.arange(T)
    q, k = (run.activations[f"blocks.1.attn.hook_{name}"] for name in "qk")
    scores = jnp.einsum("tnh,snh->nts", q, jnp.repeat(k, q.shape[1] // k.shape[1], axis=1)) * attn.scale
    scores += alibi_bias(attn.alibi.slopes(), places, places) if attn.alibi else 0
    scores = jnp.where(visible(places, places, None), scores, -jnp.inf)
    np.testing.assert_allclose(run.activations["blocks.1.attn.hook_attn_scores"], scores, atol=1e-5)


def test_hidden_states_equal_the_reference(golden):
    from mpt_eqx import interp

    case = golden("f_mha_alibi")
    tokens = jnp.asarray(case.expected["input_ids"], jnp.int32)
    run = jax.vmap(lambda tokens: interp.run(case.model, tokens, capture=["*.hook_resid_pre", "ln_final.*"]))(tokens)
    assert len(run.activations) == case.model.config.n_layers + 1
    for i, state in enumerate(run.activations.values()):
        np.testing.assert_allclose(state, case.expected[f"hidden.{i}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", some(["f_torch_dmoe", "f_reuse_kv", "f_qk_ln", "f_glu_silu"], kept=("f_reuse_kv",)))
def test_patching_one_place(everything, name):
    """With the same run's activations it changes nothing; with others, the logits and what comes after."""
    from mpt_eqx import interp

    model, run = everything(name)
    names = list(run.activations)
    draw = np.random.default_rng(0)  # for each number, since some places are normalised, which undoes a common factor
    noise = {place: draw.uniform(0.5, 1.5, run.activations[place].shape) for place in names}

    @jax.jit
    def patched(number, noisy):
        def patch(i, place):
            x = run.activations[place] * jnp.where(noisy, noise[place], 1).astype(jnp.float32)
            return lambda own: jnp.where(i == number, x, own)

        edits = {place: patch(i, place) for i, place in enumerate(names)}
        return interp.run(model, TOKENS, edits=edits, capture="*")

    plain = patched(-1, False)
    np.testing.assert_allclose(plain.logits, run.logits, atol=1e-5)
    for i, place in enumerate(names):
        same, other = patched(i, False), patched(i, True)
        np.testing.assert_allclose(same.logits, plain.logits, atol=1e-5, err_msg=place)
        assert jnp.abs(other.logits - plain.logits).max() > 1e-6, place
        before = [earlier for earlier in names[:i] if place.split(".")[:2] != earlier.split(".")[:2]]
        for earlier in before:
            np.testing.assert_array_equal(other.activations[earlier], plain.activations[earlier], err_msg=place)


def test_patching_a_whole_layer_gives_the_other_runs_logits(everything):
    from mpt_eqx import interp

    model, run = everything("f_mha_alibi")
    patched = interp.run(
        model, TOKENS[::-1], edits={"blocks.1.hook_resid_post": run.activations["blocks.1.hook_resid_post"]}
    )
    np.testing.assert_array_equal(patched.logits, run.logits)


def test_without_heads_the_model_has_no_attention(everything):
    from mpt_eqx import interp

    model, run = everything("f_bias")
    outputs = [block.attn.out_proj.weight for block in model.blocks]
    without = eqx.tree_at(
        lambda m: [b.attn.out_proj.weight for b in m.blocks], model, [jnp.zeros_like(w) for w in outputs]
    )
    ablated = interp.run(model, TOKENS, edits={"blocks.*.attn.hook_z": interp.Ablate()})
    np.testing.assert_allclose(ablated.logits, without(TOKENS), atol=1e-6)
    one_head = jnp.arange(model.config.n_heads) == 1
    edited = interp.run(
        model, TOKENS, edits={"blocks.0.attn.hook_z": interp.Ablate(one_head[:, None])}, capture="*hook_z"
    )
    z = edited.activations["blocks.0.attn.hook_z"]
    assert not z[:, 1].any()
    np.testing.assert_array_equal(z[:, ::2], run.activations["blocks.0.attn.hook_z"][:, ::2])


def edited(x, *edits):
    """The output of a block's network after edits of that place."""
    from mpt_eqx import MPTConfig
    from mpt_eqx.interp.edits import resolve_edits

    config = MPTConfig(d_model=x.shape[1], n_heads=4, n_layers=1, vocab_size=9, max_seq_len=9)
    for edit in resolve_edits(config, {"blocks.0.hook_mlp_out": list(edits)}, len(x))["blocks.0.hook_mlp_out"]:
        x = edit("blocks.0.hook_mlp_out", jnp.asarray(x), jnp.arange(len(x)))
    return np.asarray(x)


@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        (None, range(T)), (2, [2]), ([0, 4], [0, 4]), (slice(3, None), [3, 4, 5]), (slice(2), [0, 1]),
        (range(1, 6, 2), [1, 3, 5]),
    ],
)  # fmt: skip
def test_an_edit_applies_at_its_positions(positions, chosen):
    from mpt_eqx import interp

    x, chosen = np.random.default_rng(0).normal(size=(T, 32)).astype(np.float32), list(chosen)
    vector = np.linspace(-1, 1, x.shape[1], dtype=np.float32)
    edits = [
        (interp.Add(vector, positions=positions), lambda x: x + vector),
        (interp.Scale(3, positions=positions), lambda x: x * 3),
        (interp.Ablate(vector > 0, positions=positions), lambda x: np.where(vector > 0, 0, x)),
        (interp.Replace(vector, positions=positions), lambda x: np.broadcast_to(vector, x.shape)),
        (interp.Apply(jnp.tanh, positions=positions), np.tanh),
    ]
    for edit, formula in edits:
        expected = x.copy()
        expected[chosen] = formula(x)[chosen]
        np.testing.assert_allclose(edited(x, edit), expected, rtol=1e-6)
    if isinstance(positions, list):
        own = np.stack([vector, -vector])
        np.testing.assert_array_equal(edited(x, interp.Replace(own, positions=[4, 0]))[[4, 0]], own)
    whole = np.flip(x)
    np.testing.assert_array_equal(edited(x, whole), whole)


def test_edits_of_a_place_are_made_in_the_order_of_names(everything):
    from mpt_eqx import interp

    model, run = everything("f_mha_alibi")
    place = "blocks.1.hook_resid_mid"
    edits = {place: [interp.Add(1), lambda x: x * 2], "blocks.*.hook_resid_mid": interp.Scale(3)}
    found = interp.run(model, TOKENS, edits={**edits, "blocks.0.*resid_mid": interp.Scale(1 / 3)}, capture=place)
    np.testing.assert_allclose(found.activations[place], (run.activations[place] * 3 + 1) * 2, rtol=1e-4, atol=1e-4)


def test_it_works_within_transformations(everything):
    """Under jit, vmap over edits, and grad; new values never compile again."""
    from mpt_eqx import interp

    model, run = everything("f_mha_alibi")
    place, traces = "blocks.0.hook_resid_post", []

    @jax.jit
    @jax.vmap
    def last_logit_and_gradient(vector, position, embeddings):
        traces.append(1)
        edits = {place: interp.Add(vector, positions=position[None]), "hook_embed": embeddings}
        run, back = jax.vjp(lambda edits: interp.run(model, TOKENS, edits=edits).logits[-1, 3], edits)
        return run, back(jnp.ones(()))[0]["hook_embed"]

    rows = jnp.stack([model.wte(TOKENS)] * 2)
    vectors = jnp.zeros((2, model.config.d_model)).at[1, 0].set(1)
    for position in (5, 1):
        found, gradients = last_logit_and_gradient(vectors, jnp.full(2, position), rows)
        np.testing.assert_allclose(found[0], run.logits[-1, 3], atol=1e-5)
        assert jnp.abs(found[1] - found[0]) > 1e-5
    assert len(traces) == 1
    by_embedding = jax.jit(jax.grad(lambda rows: model(TOKENS, embeddings=rows)[-1, 3]))(rows[0])
    np.testing.assert_allclose(gradients[0], by_embedding, atol=1e-5)


@pytest.mark.parametrize("name", some(["f_mha_alibi", "f_reuse_kv", "f_torch_dmoe", "f_qk_ln"], kept=("f_qk_ln",)))
def test_what_is_not_asked_for_is_not_traced(golden, name):
    from mpt_eqx import interp

    model = golden(name).model
    asked = str(jax.make_jaxpr(lambda t: interp.run(model, t).logits)(TOKENS))
    assert asked == str(jax.make_jaxpr(model)(TOKENS))
    captured = jax.make_jaxpr(lambda t: interp.run(model, t, capture="blocks.0.hook_mlp_out").logits)(TOKENS)
    assert str(captured) == asked


def test_dropout_is_off(tiny_config):
    from mpt_eqx import MPT, interp

    model = MPT(tiny_config(resid_pdrop=0.5, emb_pdrop=0.5), key=jax.random.key(0))
    np.testing.assert_array_equal(interp.run(model, TOKENS).logits, eqx.nn.inference_mode(model)(TOKENS))


def test_padding_and_packed_sequences(everything):
    """A padded run has the activations of the run without, at the places of its tokens."""
    from mpt_eqx import interp

    model, run = everything("f_mha_alibi")
    padded = jnp.concatenate([jnp.zeros(2, int), TOKENS])
    found = jax.jit(
        lambda mask: interp.run(model, padded, mask=mask, capture="*.hook_resid_post").activations
    )(jnp.arange(T + 2) >= 2)  # fmt: skip
    for place, x in found.items():
        np.testing.assert_allclose(x[2:], run.activations[place], atol=1e-5)


def test_messages(tiny_model):
    from mpt_eqx import MPTError, interp

    d = tiny_model.config.d_model
    cases = [
        (
            {"capture": "blocks.0.hook_resid_pst"},
            "capture: expected the name of a place, .* did you mean blocks.0.hook_",
        ),
        ({"capture": ["zzz"]}, r"'zzz'; mpt_eqx.interp.places\(model.config\) lists them"),
        ({"edits": {"blocks.9.*": 1}}, "edits: expected the name of a place, or a pattern of some, found 'blocks.9"),
        ({"edits": 3}, "edits: expected a mapping from places to edits, found int"),
        ({"edits": {"hook_embed": "x"}}, "edits: hook_embed: expected an array, a function or an edit, found str"),
        ({"edits": {"hook_embed": jnp.ones((T - 1, d))}}, rf"broadcasts to \(6, {d}\), found one of shape \(5, {d}\)"),
        ({"edits": {"blocks.0.attn.hook_pattern": jnp.ones((1, 1, 5))}}, r"broadcasts to \(4, 6, 6\), found one of"),
        ({"edits": {"hook_embed": interp.Add(1, positions=[1, 6])}}, "expected positions from 0 to 5, found 6"),
        ({"edits": {"hook_embed": interp.Add(1, positions=slice(6, None))}}, "from 0 to 5, found those from 6 on"),
        ({"edits": {"hook_embed": interp.Add(jnp.ones((3, d)), positions=[1, 2])}}, rf"broadcasts to \(2, {d}\)"),
        ({"edits": {"hook_embed": lambda x: x[:1]}}, rf"edits: hook_embed: .* shape \(6, {d}\), found \(1, {d}\)"),
    ]
    for arguments, message in cases:
        with pytest.raises(MPTError, match=message):
            interp.run(tiny_model, TOKENS, **arguments)
    for positions, message in [
        (-1, "positions: expected whole numbers ≥ 0, or a slice of them, found -1"),
        (np.asarray([0.5]), "positions: expected whole numbers ≥ 0"),
        (slice(0, 9, 2), "expected a slice of whole numbers ≥ 0 without a step"),
        (slice(-3, None), "expected a slice of whole numbers ≥ 0 without a step"),
    ]:
        with pytest.raises(MPTError, match=message):
            interp.Add(1, positions=positions)


def test_rows_of_edits_are_stacked():
    """Those that are alike become one; the others are off in the rows that have none of their kind."""
    from mpt_eqx import MPTConfig, interp
    from mpt_eqx.interp.edits import resolve_edits
    from mpt_eqx.model.taps import stack_edits

    config, query = MPTConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=9, max_seq_len=9), jnp.arange(4)
    rows = [
        {"hook_embed": [interp.Add(1.0), jnp.tanh]},
        None,
        {"hook_embed": interp.Add(2.0)},
        {"hook_embed": jnp.tanh},
    ]
    resolved = [resolve_edits(config, row, 9, in_parts=True) for row in rows]
    stacked = stack_edits(resolved)
    x = jnp.full((4, 32), 0.5)

    def edited(edits, x):
        for edit in edits["hook_embed"]:
            x = edit("hook_embed", x, query)
        return x[0, 0]

    found = jax.vmap(edited, in_axes=(0, None))(stacked, x)
    np.testing.assert_allclose(found, [np.tanh(1.5), 0.5, 2.5, np.tanh(0.5)], rtol=1e-6)


def test_embeddings_stand_in_for_tokens(tiny_model):
    from mpt_eqx import MPTError

    rows = tiny_model.wte(TOKENS)
    np.testing.assert_array_equal(tiny_model(TOKENS, embeddings=rows), tiny_model(TOKENS))
    np.testing.assert_array_equal(tiny_model(None, embeddings=np.asarray(rows)), tiny_model(TOKENS))
    other = tiny_model(TOKENS, embeddings=rows[::-1])
    np.testing.assert_array_equal(other, tiny_model(TOKENS[::-1]))
    for embeddings, message in [
        (rows[:3], r"embeddings: expected shape \(6, 32\), found \(3, 32\)"),
        (rows[:, :3], r"embeddings: expected shape \(6, 32\), found \(6, 3\)"),
        (rows[0], r"embeddings: expected shape \(6, 32\), found \(32,\)"),
    ]:
        with pytest.raises(MPTError, match=message):
            tiny_model(TOKENS, embeddings=embeddings)
    with pytest.raises(MPTError, match="tokens: expected the ids of one sequence"):
        tiny_model(5, embeddings=rows)
    with pytest.raises(MPTError, match=r"embeddings: expected shape \(T, 32\), found \(6, 3\)"):
        tiny_model(None, embeddings=rows[:, :3])


@pytest.mark.parametrize("name", ["f_mha_alibi", "f_torch_dmoe"])
def test_the_parts_are_named_in_profiles(golden, name):
    model = golden(name).model
    lowered = jax.jit(lambda tokens: model(tokens)).lower(TOKENS).as_text(debug_info=True)
    for part in ("embed/", "block/attn/", "block/ffn/", "unembed/"):
        assert f"/{part}" in lowered, part
