"""Against transformers itself, live; not part of the suite. Needs the extra `reference`; run with `just reference`."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import GOLDEN
from peft import PeftModel

from mpt_eqx import SHIPPED_MODEL, from_pretrained, generate, lora, quantize, save_pretrained

PROMPTS = ("The zip() function", "Return True if", "json.dumps(obj", "class collections.")
CASES = ("hf_default", "hf_heads6", "hf_clip_qkv", "hf_eps", "hf_softmax_scale", "hf_untied", "hf_maxlen", "hf_sharded")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_shipped_model_gives_the_same_greedy_tokens(prompt):
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    sequence = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ours = from_pretrained(SHIPPED_MODEL, dtype="float32")
    result = generate(ours, ids[0].tolist(), max_new_tokens=40)
    np.testing.assert_array_equal(result.tokens[0], sequence[0, ids.shape[1] :].numpy())


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_what_we_save(name, tmp_path):
    model = from_pretrained(GOLDEN / name)
    save_pretrained(model, tmp_path, max_shard_size="40KB")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = np.arange(20) % model.config.vocab_size
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens)[None]).logits[0].numpy()
    np.testing.assert_allclose(model(jnp.asarray(tokens)), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_transformers_refuses_what_is_quantised(scheme, tmp_path):
    """Otherwise it would draw the weights that it does not find at random."""
    save_pretrained(quantize(from_pretrained(GOLDEN / "hf_default"), scheme), tmp_path)
    with pytest.raises(ValueError, match="quantization config from the arguments has no `quant_method`"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_the_recorded_logits_are_transformers_own(name):
    from safetensors.numpy import load_file

    expected = load_file(GOLDEN / name / "expected.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(expected["input_ids"])).logits.numpy()
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5, rtol=0)
    assert json.loads((GOLDEN / name / "case.json").read_text())["reference"].startswith("transformers")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers by its old name
def test_peft_computes_the_recorded_logits_with_an_adapter_of_ours(tmp_path):
    from safetensors.numpy import load_file

    theirs, recorded = GOLDEN / "peft_wqkv_ffn", GOLDEN / "peft_ours"
    lora.save(lora.load(from_pretrained(theirs / "base"), recorded / "adapter"), tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(theirs / "base")
    model = PeftModel.from_pretrained(plain, tmp_path).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(load_file(theirs / "expected.safetensors")["input_ids"])).logits.numpy()
    np.testing.assert_allclose(logits, load_file(recorded / "expected.safetensors")["logits"], atol=1e-5, rtol=0)
