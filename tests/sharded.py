"""Eight devices of a CPU, asked line by line: computes a case on one device and on a mesh, and answers in JSON."""

import contextlib
import dataclasses
import functools
import json
import os
import queue
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import equinox as eqx
import fused
import jax
import numpy as np
import optax
from jax._src import compiler
from jax._src.interpreters import mlir
from lowering import collect_rarely, contexts
from wrappers import make_lora

from mpt_eqx import (
    MPT,
    AttnConfig,
    MPTConfig,
    SamplingParams,
    beam_search,
    decode,
    from_pretrained,
    generate,
    interp,
    lora,
    prefill,
    quantize,
    save_pretrained,
    score,
    serve,
    sharding,
    stack,
    stream,
    surgery,
    train,
    unstack,
)
from mpt_eqx.ops.flash_attention import flash_attention
from mpt_eqx.ops.layout import Layout
from mpt_eqx.train import next_token_loss

GOLDEN = Path(__file__).parent / "golden"
COLLECTIVES = r"= \S+ (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("

TOKENS = np.random.default_rng(0).integers(1, 64, (4, 12)).astype(np.int32)
ODD = {"d_model": 40, "n_heads": 4, "n_layers": 1, "vocab_size": 97, "max_seq_len": 32}
PROMPTS = [row[:7].tolist() for row in TOKENS]
BLOCKS = int(os.environ.get("BLOCKS", "2"))  # of each model: what takes the time is to compile them


def stepped(model, gradients):
    """One step of AdamW; with its usual eps of 1e-8 it would divide rounding errors of gradients by themselves."""
    optimizer = optax.adamw(1e-3, eps=1e-4)
    updates, _ = optimizer.update(gradients, optimizer.init(model), model)
    return eqx.apply_updates(model, updates)


def local_bytes(model) -> list[int]:
    """What each device of this process holds."""
    held = Counter()
    for leaf in jax.tree.leaves(model):
        for part in leaf.addressable_shards:
            held[part.device.id] += part.data.nbytes
    return list(held.values())


def rules_of(name: str, batch: list[str] | None) -> sharding.ShardingRules:
    rules = getattr(sharding, name)
    return rules if batch is None else dataclasses.replace(rules, batch=tuple(batch))


def mesh_of(kind: str, axes: dict[str, int]) -> jax.sharding.Mesh:
    if kind == "explicit":
        return jax.make_mesh(tuple(axes.values()), tuple(axes))
    return sharding.make_mesh(**axes)


def whole(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def largest(ours, theirs) -> float:
    return max(
        float(np.abs(np.subtract(a, b, dtype=np.float64)).max())
        for a, b in zip(whole(ours), whole(theirs), strict=True)
    )


forward = eqx.filter_jit(lambda model, tokens: jax.vmap(model)(tokens))


@eqx.filter_jit
def trained(model, tokens) -> dict:
    """Logits, loss, gradients and the model after a step of AdamW: one program, because compiling takes the time."""
    loss, gradients = eqx.filter_value_and_grad(next_token_loss)(model, tokens)
    return {"logits": forward(model, tokens), "loss": loss, "gradients": gradients, "step": stepped(model, gradients)}


def written(model) -> dict:
    """Tokens, greedy and sampled."""
    sampling = {"temperature": 1.0, "key": jax.random.key(1)}
    return {
        "tokens": generate(model, PROMPTS, max_new_tokens=6).tokens,
        "sampled": generate(model, PROMPTS, max_new_tokens=6, **sampling).tokens,
    }


def computed(model, tokens: bool = True) -> dict:
    """What a model makes of the tokens, and of itself."""
    return {**trained(model, TOKENS), **(written(model) if tokens else {})}


@functools.cache
def checkpoint(case: str) -> Path:
    """The first blocks of a case."""
    model = from_pretrained(GOLDEN / case)
    if model.config.n_layers == BLOCKS:
        return GOLDEN / case
    directory = Path(tempfile.mkdtemp(dir=os.environ.get("ROOM"))) / case
    save_pretrained(surgery.keep_blocks(model, range(BLOCKS)), directory)
    return directory


@functools.cache
def alone(case: str) -> tuple:
    """The model of a case on one device, and what it computes."""
    model = from_pretrained(checkpoint(case), dtype="float32")
    return model, computed(model)


def compare(
    case: str,
    preset: str,
    axes: dict[str, int],
    kind: str = "auto",
    batch: list[str] | None = None,
    tokens: bool = True,
) -> dict:
    """The largest difference between what is computed on a mesh and on one device, of each thing."""
    rules, mesh = rules_of(preset, batch), mesh_of(kind, axes)
    shared = from_pretrained(checkpoint(case), dtype="float32", mesh=mesh, rules=rules)
    model, wanted = alone(case)
    wanted = {"moved": model, **wanted}
    if shared.blocks[0].attn.Wqkv is None and model.blocks[0].attn.Wqkv is not None:
        wanted |= {name: sharding.split_qkv(wanted[name]) for name in ("moved", "gradients", "step")}
    found = {"moved": sharding.shard(model, mesh, rules), **computed(shared, tokens)}
    return {name: largest(found[name], wanted[name]) for name in found}


def streamed(preset: str, axes: dict[str, int]) -> dict:
    """Whether tokens made one by one, and after a prefix, are those of one device."""
    model, wanted = alone("hf_generate")
    shared = sharding.shard(model, sharding.make_mesh(**axes), rules_of(preset, None))
    prefix = prefill(shared, PROMPTS[0][:3])
    after = generate(shared, [PROMPTS[0][3:]], max_new_tokens=6, prefix=prefix).tokens
    return {
        "cache": list(prefix.state.cache.layers[0].k.sharding.spec),
        "stream": list(stream(shared, PROMPTS[0], max_new_tokens=6)) == wanted["tokens"][0].tolist(),
        "prefix": after.tolist() == wanted["tokens"][:1].tolist(),
    }


def decoded(preset: str, axes: dict[str, int], inside: bool) -> dict:
    """Whether `decode` makes the drawn tokens that `generate` does: on a mesh, or `inside` of shard_map."""
    model, wanted = alone("hf_generate")
    mesh, rules = sharding.make_mesh(**axes), rules_of(preset, None)
    names = jax.sharding.PartitionSpec(tuple(axes))
    prompts, numbers = jax.numpy.asarray(PROMPTS), jax.numpy.arange(len(PROMPTS))

    def rows(model, prompts, numbers):
        options = {"sampling": SamplingParams(temperature=1.0), "key": jax.random.key(1)}
        one = functools.partial(decode, model, max_new_tokens=6, **options)
        return jax.vmap(lambda prompt, row: one(prompt, 7, row=row).tokens)(prompts, numbers)

    if inside:
        specs = (jax.sharding.PartitionSpec(), names, names)
        found = jax.jit(jax.shard_map(rows, mesh=mesh, in_specs=specs, out_specs=names))(model, prompts, numbers)
    else:
        found = eqx.filter_jit(rows)(sharding.shard(model, mesh, rules), prompts, numbers)
    return {"tokens": np.array_equal(found, wanted["sampled"])}


def served(preset: str, axes: dict[str, int]) -> dict:
    """Whether the engine gives each request the tokens of one device, greedy and drawn, four on two slots."""
    model, wanted = alone("hf_generate")
    shared = sharding.shard(model, sharding.make_mesh(**axes), rules_of(preset, None))
    engine, found = serve.Engine({"model": shared}, slots=2, warm=False), [queue.Queue() for _ in PROMPTS]
    engine.start()
    assert engine.wait_until_ready(300) == "ready"
    equal = {}
    for name, temperature in (("tokens", 0.0), ("sampled", 1.0)):
        params = SamplingParams(temperature=temperature)
        asked = [serve.Request("model", tuple(row), 6, params, seed=1, choice=n) for n, row in enumerate(PROMPTS)]
        engine.submit([(one, events.put) for one, events in zip(asked, found, strict=True)])
        rows = []
        for events in found:
            row = []
            while not isinstance(event := events.get(timeout=300), serve.End):
                row += event.tokens if isinstance(event, serve.Chunk) else []
            rows.append(row)
        equal[name] = rows == wanted[name].tolist()
    engine.stop()
    return equal


def edited(kind: str, inside: bool) -> dict:
    """How far activations and logits with edits on a mesh, in one pass and generated, are from those of one device."""
    model, mesh = alone("hf_generate")[0], mesh_of(kind, {"fsdp": 2, "tp": 2})
    vector = np.linspace(-1, 1, model.config.d_model, dtype=np.float32)
    edits = {
        "blocks.0.hook_resid_post": interp.Add(vector, positions=slice(3, None)),
        f"blocks.{BLOCKS - 1}.attn.hook_pattern": interp.Scale(0.5),
    }
    runs = [
        eqx.filter_jit(functools.partial(interp.run, edits=each, capture="*.hook_z"))
        for each in (edits, {}, {"hook_embed": interp.Scale(2)})
    ]
    shared, first = sharding.shard(model, mesh, sharding.FSDP_TP), jax.numpy.asarray(PROMPTS[0])
    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        rows = [edits, None, {"hook_embed": interp.Scale(2)}, edits]
        found = generate(shared, PROMPTS, edits=rows, max_new_tokens=3, return_logits=True)
        run = runs[0](shared, first)
    whole_rows = jax.numpy.asarray(np.concatenate([PROMPTS, found.tokens[:, :-1]], axis=1))
    wanted = [runs[i](model, row).logits[6:] for i, row in zip((0, 1, 2, 0), whole_rows, strict=True)]
    return {"run": largest(run, runs[0](model, first)), "generate": largest([*found.logits], wanted)}


def scored(form: str, kind: str, inside: bool = False) -> dict:
    """How far scores on a mesh are from those of one device: of a shared prefix, and of more sequences than rows."""
    model, rows = alone("hf_generate")[0], [PROMPTS[0], *PROMPTS, TOKENS[0], [3, 5]]
    model = {"plain": lambda m: m, "stacked": stack, "int8": lambda m: quantize(m, "int8")}[form](model)
    mesh, options = mesh_of(kind, {"fsdp": 2, "tp": 2}), {"prefix_lengths": [4, 1, 2, 3, 6, 4, 1]}
    shared, wanted = sharding.shard(model, mesh, sharding.FSDP_TP), score(model, rows, **options)
    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        found = score(shared, rows, batch_tokens=1024, **options)
    return {
        "logprobs": largest([each.logprobs for each in found], [each.logprobs for each in wanted]),
        "greedy": all(np.array_equal(a.is_greedy, b.is_greedy) for a, b in zip(found, wanted, strict=True)),
    }


def placed(preset: str, axes: dict[str, int]) -> dict:
    """What is not placed by `partition_specs` as by `shard`: models of several kinds, also from another mesh."""
    model, wanted = alone("hf_generate")
    mesh, rules = mesh_of("auto", axes), rules_of(preset, None)
    elsewhere = sharding.shard(model, mesh_of("auto", {"fsdp": 4}), sharding.FSDP)
    dropout = eqx.filter_jit(MPT)(MPTConfig(**ODD, resid_pdrop=0.1), key=jax.random.key(0))
    models = {"plain": model, "on a mesh": elsewhere, "int8": quantize(model, "int8"), "dropout": dropout}
    models |= {"stacked": stack(model), "there": sharding.shard(model, mesh, rules)}
    wrong = []
    for name, one in models.items():
        split = sharding.split_qkv(one) if rules.heads or rules.kv_heads else one
        specs = sharding.partition_specs(split, rules, None if name == "there" else mesh)
        arrays, rest = eqx.partition(split, eqx.is_array)
        by_hand = eqx.combine(jax.tree.map(put(mesh), arrays, specs), rest)
        pairs = zip(jax.tree.leaves(by_hand), jax.tree.leaves(sharding.shard(one, mesh, rules)), strict=True)
        if not all(a.sharding == b.sharding for a, b in pairs if eqx.is_array(a)):
            wrong.append(name)
        if name == "plain" and largest(forward(by_hand, TOKENS), wanted["logits"]) > 1e-4:
            wrong.append("logits")
    return {"wrong": wrong}


def put(mesh):
    return lambda x, spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))


def wrapped(preset: str, axes: dict[str, int], places: list[str], tokens: bool) -> dict:
    """How far a model with wrapped weights on a mesh is from the same on one device, in its `tokens`, too."""
    mesh, rules = mesh_of("auto", axes), rules_of(preset, None)
    plain = surgery.keep_blocks(from_pretrained(GOLDEN / "hf_generate", dtype="float32"), [0])
    model = surgery.replace(plain, places, make_lora)
    shared = sharding.shard(model, mesh, rules)
    found, wanted = trained(shared, TOKENS), trained(model, TOKENS)
    leaves = jax.tree.leaves(sharding.shard(eqx.filter(found["gradients"], eqx.is_array), mesh, rules))
    alike = {"gradients": all(a.sharding == b.sharding for a, b in zip(leaves, jax.tree.leaves(shared), strict=True))}
    if tokens:
        new = generate(shared, PROMPTS, max_new_tokens=5).tokens
        likely = forward(model, np.concatenate([PROMPTS, new], axis=1)).argmax(axis=-1)[:, 6:-1]
        alike["tokens"] = np.array_equal(new, likely)
    if rules.heads:
        wanted |= {name: sharding.split_qkv(wanted[name]) for name in ("gradients", "step")}
    return {
        "far": {name: value for name in wanted if not (value := largest(found[name], wanted[name])) < 1e-4},
        **alike,
    }


def adapted(preset: str, axes: dict[str, int], targets: list[str], kind: str = "auto") -> dict:
    """What of a step that trains adapters over 8 bits, and of their files, is on a mesh not as on one device."""
    mesh, rules, wrong = mesh_of(kind, axes), rules_of(preset, None), []
    plain = quantize(surgery.keep_blocks(from_pretrained(GOLDEN / "hf_generate", dtype="float32"), [0]), "int8")
    shared, optimizer = sharding.shard(plain, mesh, rules), train.decoupled_adamw(1e-2, eps=1e-3)
    step, after = train.make_train_step(optimizer, max_grad_norm=1.0), []
    for model in (jax.tree.map(jax.numpy.copy, plain), jax.tree.map(jax.numpy.copy, shared)):
        model = lora.add(model, rank=2, targets=targets, key=jax.random.key(0))
        state = train.TrainState.create(model, optimizer, trainable=lora.trainable)
        for _ in range(2):
            state, _ = step(state, {"tokens": TOKENS})
        after.append(state.model)
    files = [tempfile.mkdtemp(dir=os.environ.get("ROOM")) for _ in after]
    for model, directory in zip(after, files, strict=True):
        lora.save(model, directory)
    loaded = [lora.load(shared, directory) for directory in files]
    if largest(eqx.filter(loaded[1], eqx.is_array), eqx.filter(after[1], eqx.is_array)):
        wrong.append("files")
    if largest(*(eqx.filter(model, lora.trainable(model)) for model in loaded)) > 1e-4:
        wrong.append("adapters")
    if largest(forward(after[1], TOKENS), forward(after[0], TOKENS)) > 1e-4:
        wrong.append("logits")
    merged = lora.merge(after[1])
    if largest(forward(merged, TOKENS), forward(after[1], TOKENS)) > 1e-4:
        wrong.append("merged")
    wanted = sharding.shard(lora.merge(after[0]), mesh, rules)
    lies = [a.sharding == b.sharding for a, b in zip(*map(jax.tree.leaves, (merged, wanted)), strict=True)]
    return {"wrong": wrong + ["merged lies elsewhere"] * (not all(lies))}


@functools.cache
def learned_alone(form: str) -> tuple:
    return learned_by(alone(learner(form))[0], form)


def learner(form: str) -> str:
    return "f_torch_dmoe" if form == "experts" else "hf_generate"


def learned_by(model, form: str) -> tuple:
    """The metrics of three steps, and the weights after them: of two micro-batches with other masks, clipped."""
    optimizer = train.decoupled_adamw(1e-3, eps=1e-4, weight_decay=0.1)
    model = jax.tree.map(jax.numpy.copy, stack(model) if form == "stacked" else model)
    state, metrics = train.TrainState.create(model, optimizer), []
    step = train.make_train_step(
        optimizer, accumulate=2, max_grad_norm=0.5, remat="full" if form == "stacked" else "none",
        loss=functools.partial(next_token_loss, moe_loss_weight=0.1 if form == "experts" else None),
    )  # fmt: skip
    mask = np.ones(TOKENS.shape, bool)
    mask[0, 2:] = mask[2, :7] = mask[3] = False
    for _ in range(3):
        state, found = step(state, {"tokens": TOKENS, "mask": mask})
        metrics.append([found[name] for name in ("loss", "grad_norm", "tokens")])
    return metrics, (unstack(state.model) if form == "stacked" else state.model)


def learned(preset: str, axes: dict[str, int], form: str = "plain") -> dict:
    """How far training on a mesh is from training on one device."""
    (wanted, model), rules = learned_alone(form), rules_of(preset, None)
    metrics, found = learned_by(sharding.shard(alone(learner(form))[0], mesh_of("auto", axes), rules), form)
    model = sharding.split_qkv(model) if rules.heads else model
    return {"metrics": largest(metrics, wanted), "weights": largest(found, model)}


def commanded(directory: str, meshes: list[str], options: list[str]) -> dict:
    """How far a run of the command on one mesh that goes on, after half of it, on another is from one on one device."""
    from mpt_eqx.cli import main

    def command(args: list[str]) -> int:
        with contextlib.redirect_stdout(sys.stderr):
            return main(args)

    os.chdir(directory)
    options = ["train", *options, "--steps", "4", "--save-every", "2"]
    assert command([*options, "--output", "alone"]) == 0
    assert command([*options, "--output", "run", "--mesh", meshes[0]]) == 0
    shutil.rmtree("run/states/step-00000004")
    assert command([*options, "--output", "run", "--mesh", meshes[1]]) == 0
    logs = [[json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()] for run in ("alone", "run")]
    return {
        "steps": [line["step"] for line in logs[1]],
        "losses": largest(*([line["loss"] for line in log] for log in logs)),
        "model": (Path(directory) / "run" / "model" / "model.safetensors").is_file(),
        "sharded": Path("run/states/step-00000002/sharded").is_dir(),
    }


def explicit(inside: bool, how: str) -> dict:
    """What is not computed as on one device, with Explicit axes, inside and outside of `jax.set_mesh`."""
    model, wanted = alone("hf_generate")
    mesh, rules, wrong = mesh_of("explicit", {"fsdp": 2, "tp": 2}), sharding.FSDP_TP, []
    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        named = functools.partial(jax.sharding.NamedSharding, mesh)
        replicated = lambda x: jax.device_put(x, named(jax.sharding.PartitionSpec(*(None,) * x.ndim)))  # noqa: E731
        one = sharding.shard(model, mesh, rules) if how == "shard" else jax.tree.map(replicated, model)
        found = trained(one, jax.device_put(TOKENS, named(jax.sharding.PartitionSpec("fsdp", None))))
        wrong += [what for what in ("logits", "loss") if largest(found[what], wanted[what]) > 1e-4]
        if inside and {jax.typeof(x).sharding.mesh for x in jax.tree.leaves(found["step"])} != {mesh.abstract_mesh}:
            wrong.append("other axes after a step")
        if generate(one, PROMPTS, max_new_tokens=6).tokens.tolist() != wanted["tokens"].tolist():
            wrong.append("tokens")
        if inside and largest(forward(model, TOKENS), wanted["logits"]) > 1e-4:
            wrong.append("on no mesh: logits")
    return {"wrong": wrong}


def collectives(preset: str, axes: dict[str, int]) -> dict:
    """What the devices send each other in a forward pass."""
    model = from_pretrained(GOLDEN / "hf_generate", dtype="float32")
    shared = sharding.shard(model, sharding.make_mesh(**axes), rules_of(preset, None))
    rows = eqx.filter_jit(lambda model, tokens: jax.vmap(model)(model.layout.constrain(tokens, "batch", None)))
    text = rows.lower(shared, TOKENS).compile().compiled.as_text()
    return dict(Counter(re.findall(COLLECTIVES, text)))


def by_rows_and_heads(axes: dict[str, int], spec: list[str | None]) -> dict:
    """How far cuDNN's attention and its derivatives on a mesh are from one device's, and what the devices send.

    What is given and what is asked for is sharded as `spec` says.
    """
    mesh, rows, heads, key_heads, t = sharding.make_mesh(**axes), 8, 4, 2, 64
    layout = Layout(mesh, sharding.FSDP_TP)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, n, t, 16) for n in (heads, key_heads, key_heads, heads)]
    *x, slope = (jax.random.normal(key, shape, "bfloat16") for key, shape in zip(keys, shapes, strict=True))
    slopes = jax.numpy.asarray([0.84, 0.3, 0.1, 0.01], "float32")

    def both(layout, slope, *x):
        h, back = jax.vjp(jax.vmap(lambda *row: flash_attention(*row, slopes, 0.3, 20, layout)), *x)
        return h, *back(slope)

    with fused.played():
        wanted = jax.jit(functools.partial(both, None))(slope, *x)
        fused.ASKED.clear()
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        program = (
            jax.jit(functools.partial(both, layout), out_shardings=place)
            .lower(*jax.device_put([slope, *x], place))
            .compile()
        )
        found = program(*jax.device_put([slope, *x], place))
    sent = re.findall(COLLECTIVES, program.as_text())
    return {"asked": fused.ASKED, "sent": sent, "values": largest(found, wanted)}


def by_cudnn(
    preset: str, axes: dict[str, int], key_heads: int = 2, kind: str = "auto", form: str = "plain", run: bool = False
) -> dict:
    """Whether a step of training on a mesh takes cuDNN's attention, what it asks for, and how far it is from blocks."""
    attn = AttnConfig(attn_type="grouped_query_attention", kv_n_heads=key_heads, alibi=True)
    sizes = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 64, "max_seq_len": 64}
    model = MPT(MPTConfig(**sizes, no_bias=True, attn_config=attn), key=jax.random.key(0))
    model = jax.tree.map(lambda x: x.astype("bfloat16"), model)
    model = surgery.remat(stack(model), "dots") if form == "stacked" else model
    tokens = np.random.default_rng(0).integers(1, 64, (8, 40)).astype(np.int32)
    mesh, rules = mesh_of("explicit" if kind == "set" else kind, axes), rules_of(preset, None)
    if kind == "tokens":
        other = mesh_of("explicit", axes)
        tokens = jax.device_put(tokens, jax.sharding.NamedSharding(other, jax.sharding.PartitionSpec(rules.batch)))

    def step(model, tokens):
        return eqx.filter_value_and_grad(next_token_loss)(model, tokens)

    with fused.played(), jax.set_mesh(mesh) if kind == "set" else contextlib.nullcontext():
        shared = sharding.shard(model, mesh, rules)
        taken = "dot_product_attention_fwd" in str(eqx.filter_make_jaxpr(step)(shared, tokens)[0])
        found = eqx.filter_jit(step)(shared, tokens) if run else None
    if not run:
        return {"taken": taken}
    wanted = eqx.filter_jit(step)(sharding.split_qkv(model) if rules.heads else model, tokens)
    pairs = zip(whole(found), whole(wanted), strict=True)
    errors = [np.abs(a.astype("f8") - b.astype("f8")).max() / np.abs(b.astype("f8")).max() for a, b in pairs]
    return {"taken": taken, "asked": fused.ASKED, "values": float(np.max(errors))}


def initialised(preset: str, axes: dict[str, int], options: dict) -> dict:
    """How a model that is made on a mesh differs from one that is made on a device, by programs of these options."""
    jax.clear_caches()  # of programs of others
    usual = compiler.get_compile_options

    def get_compile_options(*args, env_options_overrides=None, **kwargs):
        return usual(*args, env_options_overrides={**(env_options_overrides or {}), **options}, **kwargs)

    compiler.get_compile_options = get_compile_options
    config, key = from_pretrained(checkpoint("hf_generate")).config, jax.random.key(3)
    mesh, rules = sharding.make_mesh(**axes), rules_of(preset, None)
    made = eqx.filter_jit(lambda key: sharding.shard(MPT(config, key=key), mesh, rules))(key)
    fresh = eqx.filter_jit(MPT)(config, key=key)
    moved = sharding.shard(fresh, mesh, rules)
    placed = jax.device_put(fresh, jax.devices()[1])
    again = sharding.shard(sharding.shard(placed, sharding.make_mesh(dp=4), sharding.DATA_PARALLEL), mesh, rules)
    moments = optax.adam(1e-3).init(eqx.filter(made, eqx.is_array))[0]
    compiler.get_compile_options = usual
    models = {"made": made, "moved": moved, "again": again, "first moments": moments.mu, "second moments": moments.nu}
    return {"weights": largest(made, moved), "bytes": {name: local_bytes(model) for name, model in models.items()}}


def saved(case: str, directory: str) -> dict:
    """Whether what is saved from a mesh is what was loaded, and what its tensors are called."""
    mesh = sharding.make_mesh(fsdp=2, tp=2)
    save_pretrained(from_pretrained(GOLDEN / case, mesh=mesh, rules=sharding.FSDP_TP), directory)
    before, after = from_pretrained(GOLDEN / case), from_pretrained(directory)
    return {"weights": largest(before, after), "same": before.config == after.config}


def quantised(scheme: str) -> dict:
    """How far logits of quantised weights on a mesh are from those of one device."""
    model = quantize(alone("hf_generate")[0], scheme)
    shared = sharding.shard(model, sharding.make_mesh(fsdp=2, tp=2), sharding.FSDP_TP)
    later = quantize(sharding.shard(alone("hf_generate")[0], shared.layout.mesh, sharding.FSDP_TP), scheme)
    tokens = [generate(m, PROMPTS, max_new_tokens=6).tokens.tolist() for m in (model, shared)]
    return {
        "logits": largest(forward(shared, TOKENS), forward(model, TOKENS)),
        "later": largest(later, shared),
        "tokens": tokens[0] == tokens[1],
        "bytes": local_bytes(later) == local_bytes(shared),
    }


def stacked(preset: str, axes: dict[str, int], kind: str = "auto") -> dict:
    """How far a stacked model on a mesh is from single blocks on one device, and whether it lies there as those do."""
    model, wanted = alone("hf_generate")
    mesh, rules = mesh_of(kind, axes), rules_of(preset, None)
    one, other = sharding.shard(stack(model), mesh, rules), stack(sharding.shard(model, mesh, rules))
    swapped, found = surgery.keep_blocks(one, range(BLOCKS)[::-1]), trained(one, TOKENS)
    alike = ((one, other), (one, swapped), (unstack(one), sharding.shard(model, mesh, rules)))
    pairs = [pair for trees in alike for pair in zip(*map(jax.tree.leaves, trees), strict=True)]
    return {
        "placed alike": all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in pairs),
        "weights": largest(one, other),
        "logits": largest(found["logits"], wanted["logits"]),
        "gradients": largest(unstack(found["gradients"]), sharding.split_qkv(wanted["gradients"])),
        "bytes": local_bytes(one) == local_bytes(sharding.shard(model, mesh, rules)),
        "lines": sharding.explain(one, mesh, rules).count("blocks.block.attn.Wq.weight"),
    }


def reference(directory: str) -> dict:
    """What one device computes, and how far what two processes saved is from it."""
    model = from_pretrained(GOLDEN / "hf_generate", dtype="float32")
    wanted, odd = computed(model), MPT(MPTConfig(**ODD), key=jax.random.key(0))
    return {
        "trained": largest(from_pretrained(Path(directory) / "trained"), wanted["step"]),
        "odd": largest(from_pretrained(Path(directory) / "odd"), odd),
        "beams": beam_search(model, PROMPTS, num_beams=3, max_new_tokens=6).tokens.tolist(),
        **{name: np.asarray(wanted[name]).tolist() for name in ("logits", "loss", "tokens", "sampled")},
    }


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_disable_most_optimizations", True)  # of LLVM: twice as fast to compile, partitioned alike
    mlir.make_ir_context = contexts(mlir.make_ir_context)
    collect_rarely()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(globals()[name](**arguments)), flush=True)
    os._exit(0)  # to forget all programs one by one takes seconds


if __name__ == "__main__":
    main()
