"""The baselines, transformers and llama.cpp: imported inside functions only, and without importing mpt_eqx."""

import ctypes
import importlib.util
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.speed.implementation import SINGLE_STEPS, Implementation

if TYPE_CHECKING:
    from mpt_eqx import MPTConfig

BASELINES = ("transformers", "llama.cpp")
THEIR_DTYPES = {
    "transformers": {"float32": "float32", "bfloat16": "bfloat16"},
    "llama.cpp": {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"},
}
"""What each calls our dtypes; those that it does not have are not here."""

NEEDS = {"transformers": ("torch", "transformers"), "llama.cpp": ("llama_cpp", "gguf")}
INSTALL = {"transformers": "pip install 'mpt_eqx[reference]'", "llama.cpp": "pip install 'mpt_eqx[bench]'"}


def missing(baseline: str) -> str | None:
    """Returns a line on what a baseline lacks and how to install it, or None where it is installed."""
    absent = [module for module in NEEDS[baseline] if importlib.util.find_spec(module) is None]
    return f"{baseline}: skipped, {' and '.join(absent)} not installed; {INSTALL[baseline]}" if absent else None


# What counts in training only, and is no difference to what is measured.
TRAINING = {
    *("attn_config.attn_pdrop", "resid_pdrop", "emb_pdrop", "embedding_fraction", "pad_token_id"),
    "attn_config.attn_uses_sequence_id",
}


def unsupported(baseline: str, config: "MPTConfig", dtype: str) -> str | None:
    """Returns what of a model a baseline does not support, or None."""
    from mpt_eqx.checkpoint.formats.gguf_writer import BLOCKS
    from mpt_eqx.config.programs import differences

    block = BLOCKS.get(THEIR_DTYPES[baseline][dtype], 1) if baseline == "llama.cpp" else 1
    if config.d_model % block or config.ffn_hidden_size % block:
        return f"d_model {config.d_model} or an FFN of {config.ffn_hidden_size}, no multiples of {block}"
    return next((str(one) for one in differences(baseline, config) if one.key not in TRAINING), None)


def uses_gpu(baseline: str) -> bool:
    """Tells whether an installed baseline can use the GPU."""
    if baseline == "transformers":
        import torch

        return torch.cuda.is_available()
    import llama_cpp

    return bool(llama_cpp.llama_supports_gpu_offload())


def open_transformers(place: str, dtype: str, threads: int) -> Implementation:
    """Returns transformers' own MPT with its own attention and its cache, called without the checks of its generate."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.MptForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype)).eval().to(device)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def forward(tokens: Any, cache: Any) -> tuple[Any, Any]:
        # config.json may switch the cache off.
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def as_tensor(prompts: list[list[int]]) -> Any:
        return torch.tensor(prompts, device=device)

    def prefill(prompt: list[int]) -> Any:
        tokens = as_tensor([prompt])

        def run() -> float:
            started = time.perf_counter()
            forward(tokens, None)[0].argmax(-1).tolist()
            return time.perf_counter() - started

        return run

    def make(prompts: list[list[int]], steps: int) -> Any:
        logits, cache = forward(as_tensor(prompts), None)
        first = logits.argmax(-1, keepdim=True)

        def run() -> tuple[float, list[int]]:
            if more := cache.get_seq_length() - len(prompts[0]):
                cache.crop(-more)
            token, made = first, [first]
            wait()
            started = time.perf_counter()
            for _ in range(steps):
                step_logits, _ = forward(token, cache)
                token = step_logits.argmax(-1, keepdim=True)
                made.append(token)
            wait()
            return time.perf_counter() - started, [int(row[0, 0]) for row in made[:steps]]

        return run

    def score(sequences: list[list[int]]) -> Any:
        tokens = as_tensor(sequences)

        @torch.inference_mode()
        def run() -> tuple[float, list[float]]:
            started = time.perf_counter()
            log_probs = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits[:, :-1].float(), -1)
            totals = log_probs.gather(-1, tokens[:, 1:, None])[..., 0].sum(1).tolist()
            return time.perf_counter() - started, totals

        return run

    def logits(prompt: list[int]) -> np.ndarray:
        _, cache = forward(as_tensor([prompt[:-SINGLE_STEPS]]), None)
        for token in prompt[-SINGLE_STEPS:]:
            out, cache = forward(as_tensor([[token]]), cache)
        return out[0].float().cpu().numpy()

    def facts() -> dict[str, Any]:
        return {
            "sizes": {name: p.numel() * p.element_size() for name, p in model.named_parameters()},
            "attention": str(getattr(model.config, "_attn_implementation", "its own")),
            "device": device,
        }

    return Implementation(prefill, prefill, make, score, logits, facts)


def open_llama_cpp(place: str, dtype: str, threads: int, vocab_size: int) -> Implementation:
    """Returns a GGUF file in llama.cpp, through its C functions.

    Its cache is float32 beside float32 weights, and otherwise float16, which is its default.
    """
    import llama_cpp as ll

    ll.llama_backend_init()
    options = ll.llama_model_default_params()
    options.n_gpu_layers = -1 if ll.llama_supports_gpu_offload() else 0
    model = ll.llama_model_load_from_file(str(place).encode(), options)
    if not model:
        raise RuntimeError(f"llama.cpp does not load {place}")

    class Context:
        """A context of llama.cpp, which is freed with this object."""

        def __init__(self, rows: int, length: int):
            params = ll.llama_context_default_params()
            # Whole blocks for each row, because it rounds up itself and would then have less than was asked for.
            params.n_ctx = rows * -(-length // 256) * 256
            params.n_seq_max = rows
            params.n_batch = max(512, length, rows)
            params.n_threads = params.n_threads_batch = threads
            if dtype == "float32":
                params.type_k = params.type_v = 0  # GGML_TYPE_F32
            self.context = ll.llama_init_from_model(model, params)
            if not self.context:
                raise RuntimeError(f"llama.cpp makes no context for {rows} rows of {length} tokens")
            self.batch = ll.llama_batch_init(params.n_batch, 0, 1)
            self.memory = ll.llama_get_memory(self.context)

        def __del__(self) -> None:
            if self.context:
                ll.llama_batch_free(self.batch)
                ll.llama_free(self.context)

        def forward(self, tokens: list[tuple[int, int, int]], wanted: int) -> np.ndarray:
            """Decodes (token, position, row) triples; returns the logits after the last `wanted` of them."""
            batch = self.batch
            batch.n_tokens = len(tokens)
            for i, (token, position, row) in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0] = row
                batch.logits[i] = i >= len(tokens) - wanted
            if ll.llama_decode(self.context, batch) != 0:
                raise RuntimeError("llama.cpp could not decode the tokens")
            first = ll.llama_get_logits_ith(self.context, len(tokens) - wanted)
            # The rows that were asked for lie one after the other.
            address = ctypes.addressof(first.contents)
            array = (ctypes.c_float * (vocab_size * wanted)).from_address(address)
            return np.ctypeslib.as_array(array).reshape(wanted, vocab_size)

    def prefill(prompt: list[int]) -> Any:
        context = Context(1, len(prompt))

        def run() -> float:
            ll.llama_memory_clear(context.memory, True)
            started = time.perf_counter()
            context.forward([(token, i, 0) for i, token in enumerate(prompt)], 1).argmax()
            return time.perf_counter() - started

        return run

    def make(prompts: list[list[int]], steps: int) -> Any:
        rows, length = len(prompts), len(prompts[0])
        context = Context(rows, length + steps)
        # Each row by itself, so that no batch is larger than a prompt.
        first = []
        for row, prompt in enumerate(prompts):
            logits = context.forward([(token, i, row) for i, token in enumerate(prompt)], 1)
            first.append(int(logits[0].argmax()))

        def run() -> tuple[float, list[int]]:
            for row in range(rows):
                ll.llama_memory_seq_rm(context.memory, row, length, -1)
            tokens, made = first, []
            started = time.perf_counter()
            for step in range(steps):
                made.append(tokens[0])
                logits = context.forward([(token, length + step, row) for row, token in enumerate(tokens)], rows)
                tokens = logits.argmax(axis=1).tolist()
            return time.perf_counter() - started, made

        return run

    def logits(prompt: list[int]) -> np.ndarray:
        context, split = Context(1, len(prompt)), len(prompt) - SINGLE_STEPS
        context.forward([(token, i, 0) for i, token in enumerate(prompt[:split])], 1)
        for i in range(split, len(prompt)):
            last = context.forward([(prompt[i], i, 0)], 1)
        return last[0].copy()

    def facts() -> dict[str, Any]:
        import gguf

        # Sizes in the file: copies that the library keeps, such as repacked weights, are not counted twice.
        names = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(place).tensors}
        sizes = {
            name.replace("token_embd", "transformer.wte").replace("position_embd", "transformer.wpe"): size
            for name, size in names.items()
        }
        return {
            "sizes": sizes,
            "system": ll.llama_print_system_info().decode(),
            "device": "gpu" if options.n_gpu_layers else "cpu",
        }

    return Implementation(prefill, prefill, make, None, logits, facts)
