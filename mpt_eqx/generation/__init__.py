"""Generation: sampling, prefill and decode, beam search."""

from mpt_eqx.generation import sampling as sampling
from mpt_eqx.generation.beam_search import beam_search as beam_search
from mpt_eqx.generation.decode import Decoded as Decoded
from mpt_eqx.generation.decode import decode as decode
from mpt_eqx.generation.defaults import generation_defaults as generation_defaults
from mpt_eqx.generation.export import export_model as export_model
from mpt_eqx.generation.generate import GenerateResult as GenerateResult
from mpt_eqx.generation.generate import generate as generate
from mpt_eqx.generation.generate import stream as stream
from mpt_eqx.generation.prefix import Prefix as Prefix
from mpt_eqx.generation.prefix import prefill as prefill
from mpt_eqx.generation.sampling_params import SamplingParams as SamplingParams
from mpt_eqx.generation.warmup import warmup as warmup
