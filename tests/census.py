"""The public checkpoints of census.json, as small random ones in the same dialect; needs neither JAX nor torch."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import torch_bytes

CENSUS = json.loads((Path(__file__).parent / "census.json").read_text())
THEIRS = json.loads((Path(__file__).parent / "census_transformers.json").read_text())
REPOSITORIES = {entry["repository"]: entry for entry in CENSUS["repositories"]}

EARLY = (("norm_1", "ln_1"), ("norm_2", "ln_2"), ("norm_f", "ln_f"), ("ffn.up_proj", "mlp.mlp_up"))
EARLY = (*EARLY, ("ffn.down_proj", "mlp.mlp_down"))
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def config_of(name):
    """Returns the content of a config.json."""
    entry = CENSUS["configs"][name]
    if "config" in entry:
        return entry["config"]
    content = merged(config_of(entry["like"]), entry["changes"])
    for path in entry.get("without", ()):
        *part, key = path.split(".")
        if part:
            content[part[0]] = {name: value for name, value in content[part[0]].items() if name != key}
        else:
            del content[key]
    return content


def merged(content, changes):
    """Returns a content with keys replaced, nested ones one by one."""
    both = {
        key: value for key, value in changes.items() if isinstance(value, dict) and isinstance(content.get(key), dict)
    }
    return {**content, **changes, **{key: merged(content[key], value) for key, value in both.items()}}


def halved(heads):
    """Returns a number of heads, halved to at most eight if it can be: 24, 48 and 12 become 6, 20 becomes 5."""
    while heads > 8 and heads % 2 == 0:
        heads //= 2
    return heads


def shrunk(content):
    """Returns a config.json with small sizes: one layer, heads of width 4, 96 tokens, at most 64 positions.

    Heads are halved to at most eight where they can be, so that they are a power of two or none as before, and share
    keys as before.
    """
    heads = content.get("n_heads", 16)
    small = {"d_model": 4 * halved(heads), "hidden_size": 4 * halved(heads), "n_heads": halved(heads), "n_layers": 1}
    small |= {"vocab_size": 96, "max_seq_len": 64}
    content = {**content, **{key: value for key, value in small.items() if key in content}}
    attn_config = content.get("attn_config", {})
    if "kv_n_heads" in attn_config:
        shared = attn_config["kv_n_heads"] * halved(heads) // heads
        content["attn_config"] = {**attn_config, "kv_n_heads": shared}
    return content


def tensors_of(name, content):
    """Returns random weights by their names in the file: norms near 1, and queries, keys and values that reach 6."""
    entry = CENSUS["configs"][name]
    has = entry.get("tensors", ())
    d, heads = content.get("d_model", content.get("hidden_size")), content["n_heads"]
    shared = d * content.get("attn_config", {}).get("kv_n_heads", heads) // heads
    hidden = d * content.get("expansion_ratio", content.get("mlp_ratio", 4))
    shapes = {"wte.weight": (content["vocab_size"], d), "norm_f.weight": (d,)}
    if "wpe" in has:
        shapes["wpe.weight"] = (content["max_seq_len"], d)
    for i in range(content["n_layers"]):
        block = {"norm_1": (d,), "attn.Wqkv": (d + 2 * shared, d), "attn.out_proj": (d, d), "norm_2": (d,)}
        block |= {"ffn.up_proj": (hidden, d), "ffn.down_proj": (d, hidden)}
        block |= {"attn.q_ln": (d,), "attn.k_ln": (shared,)} if "q_ln" in has else {}
        shapes |= {f"blocks.{i}.{part}.weight": shape for part, shape in block.items()}
    if "bias" in has:
        biased = {part: shape for part, shape in shapes.items() if part not in ("wte.weight", "wpe.weight")}
        shapes |= {part.replace("weight", "bias"): shape[:1] for part, shape in biased.items()}
    rng, arrays = np.random.default_rng(len(name)), {}
    for part, shape in shapes.items():
        spread = (3 if "Wqkv" in part else 1) / np.sqrt(shape[-1]) if len(shape) > 1 else 0.3
        array = rng.normal(size=shape) * spread + (len(shape) == 1 and part.endswith("weight"))
        arrays[f"transformer.{early(part) if entry.get('early_names') else part}"] = array
    if "lm_head" in has:
        arrays["lm_head.weight"] = arrays["transformer.wte.weight"]
    return {part: array.astype(TYPES[content.get("torch_dtype", "float32")]) for part, array in arrays.items()}


def early(part):
    """Returns the name that a tensor had in early 2023."""
    for today, then in EARLY:
        part = part.replace(today, then)
    return part


def write_config(directory, name):
    """Writes the small config.json."""
    (directory / "config.json").write_text(json.dumps(shrunk(config_of(name))))


def write(directory, name, weights, change=None):
    """Writes the small checkpoint of a config, in files of these names: torch's or safetensors, whole or in shards.

    `change` makes other tensors, as pairs of name and array, of those that a config has.
    """
    from safetensors.numpy import save_file

    write_config(directory, name)
    arrays = tensors_of(name, shrunk(config_of(name)))
    arrays = dict(change(arrays)) if change else arrays
    files = [file for file in weights if not file.endswith(".json")]
    parts = [dict(list(arrays.items())[i :: len(files)]) for i in range(len(files))]
    for file, part in zip(files, parts, strict=True):
        if file.endswith(".safetensors"):
            save_file(part, directory / file, metadata={"format": "pt"})
        else:
            torch_bytes.write_zip(directory / file, *torch_bytes.of_arrays(part))
    for index in weights:
        if index.endswith(".json"):
            where = {tensor: file for file, part in zip(files, parts, strict=True) for tensor in part}
            size = sum(array.nbytes for array in arrays.values())
            (directory / index).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}))


def meant(content):
    """Returns what a config.json means, as far as `transcribed` needs it."""
    attn = {**content, **content.get("attn_config", {})}
    native = "model_type" in content.get("attn_config", {})
    d, heads = content.get("d_model", content.get("hidden_size")), content["n_heads"]
    return SimpleNamespace(
        n_heads=heads,
        kv_heads=attn.get("kv_n_heads", heads),
        head_size=d // heads,
        d_model=d,
        n_layers=content["n_layers"],
        logit_scale=content.get("logit_scale"),
        attn_config=SimpleNamespace(
            alibi=attn.get("alibi", native),
            alibi_bias_max=attn.get("alibi_bias_max", 8),
            clip_qkv=attn.get("clip_qkv", attn.get("attn_clip_qkv")),
            qk_ln=attn.get("qk_ln", attn.get("attn_qk_ln", False)),
        ),
    )


def today(tensors):
    """Returns tensors in float64 under the names of today."""
    held = {}
    for name, array in tensors.items():
        for new, old in EARLY:
            name = name.replace(old, new)
        held[name] = array.astype(np.float64)
    return held


def expected(name, tokens):
    """Returns the logits of the small checkpoint of a config."""
    content = shrunk(config_of(name))
    return transcribed(today(tensors_of(name, content)), meant(content), tokens)


def transcribed(w, config, tokens):
    """The logits by the formulas of the 2023 models, in float64 and one head after the other.

    Args:
        w: the tensors by name; an `lm_head.weight` counts for the output alone.
        config: what is not to be seen from the tensors: heads, clip, norms of q and k, ALiBi, logit_scale.
        tokens: a list of ids.
    """
    attn, (n, k, h), t = config.attn_config, (config.n_heads, config.kv_heads, config.head_size), len(tokens)
    m = 2 ** math.ceil(math.log2(n))
    slopes = [2.0 ** -(i * attn.alibi_bias_max / m) for i in range(1, m + 1)]
    slopes = slopes if m == n else (slopes[1::2] + slopes[0::2])[:n]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def attention(x, name):
        qkv = linear(x, f"{name}.Wqkv")
        if attn.clip_qkv is not None:
            qkv = np.clip(qkv, -attn.clip_qkv, attn.clip_qkv)
        q, keys, values = np.split(qkv, [n * h, (n + k) * h], axis=1)
        if attn.qk_ln:
            q, keys = norm(q, f"{name}.q_ln"), norm(keys, f"{name}.k_ln")
        out = np.zeros((t, n * h))
        for head in range(n):
            mine, shared = slice(head * h, head * h + h), slice(head // (n // k) * h, (head // (n // k) + 1) * h)
            scores = q[:, mine] @ keys[:, shared].T / math.sqrt(h)
            for i in range(t):
                seen = scores[i, : i + 1] + (slopes[head] * (np.arange(i + 1) - i) if attn.alibi else 0)
                weights = np.exp(seen - seen.max())
                out[i, mine] = weights / weights.sum() @ values[: i + 1, shared]
        return linear(out, f"{name}.out_proj")

    x = w["transformer.wte.weight"][tokens]
    if not attn.alibi:
        x = x + w["transformer.wpe.weight"][:t]
    for i in range(config.n_layers):
        name = f"transformer.blocks.{i}"
        x = x + attention(norm(x, f"{name}.norm_1"), f"{name}.attn")
        hidden = linear(norm(x, f"{name}.norm_2"), f"{name}.ffn.up_proj")
        gelu = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))
        x = x + linear(gelu(hidden), f"{name}.ffn.down_proj")
    logits = norm(x, "transformer.norm_f") @ w.get("lm_head.weight", w["transformer.wte.weight"]).T
    return logits if config.logit_scale is None else logits / math.sqrt(config.d_model)
