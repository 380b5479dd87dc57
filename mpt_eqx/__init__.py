"""MosaicML's MPT language models in JAX with Equinox."""

import gc as _gc
from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING

_collects = _gc.isenabled()
_gc.disable()  # what is imported stays: looking through it for garbage takes a tenth of the time
try:
    from mpt_eqx.checkpoint import checkpoint_info as checkpoint_info
    from mpt_eqx.checkpoint import from_pretrained as from_pretrained
    from mpt_eqx.checkpoint import save_pretrained as save_pretrained
    from mpt_eqx.config import ActFnConfig as ActFnConfig
    from mpt_eqx.config import AttnConfig as AttnConfig
    from mpt_eqx.config import BlockOverride as BlockOverride
    from mpt_eqx.config import FFNConfig as FFNConfig
    from mpt_eqx.config import InitConfig as InitConfig
    from mpt_eqx.config import MPTConfig as MPTConfig
    from mpt_eqx.config import RopeHFConfig as RopeHFConfig
    from mpt_eqx.config import TemperatureTuning as TemperatureTuning
    from mpt_eqx.config import count_flops as count_flops
    from mpt_eqx.errors import CheckpointError as CheckpointError
    from mpt_eqx.errors import ConfigError as ConfigError
    from mpt_eqx.errors import GenerationError as GenerationError
    from mpt_eqx.errors import Interrupted as Interrupted
    from mpt_eqx.errors import MPTError as MPTError
    from mpt_eqx.errors import ShardingError as ShardingError
    from mpt_eqx.evaluation import Perplexity as Perplexity
    from mpt_eqx.evaluation import Score as Score
    from mpt_eqx.evaluation import perplexity as perplexity
    from mpt_eqx.evaluation import score as score
    from mpt_eqx.generation import Decoded as Decoded
    from mpt_eqx.generation import GenerateResult as GenerateResult
    from mpt_eqx.generation import Prefix as Prefix
    from mpt_eqx.generation import SamplingParams as SamplingParams
    from mpt_eqx.generation import beam_search as beam_search
    from mpt_eqx.generation import decode as decode
    from mpt_eqx.generation import export_model as export_model
    from mpt_eqx.generation import generate as generate
    from mpt_eqx.generation import generation_defaults as generation_defaults
    from mpt_eqx.generation import prefill as prefill
    from mpt_eqx.generation import sampling as sampling
    from mpt_eqx.generation import stream as stream
    from mpt_eqx.generation import warmup as warmup
    from mpt_eqx.model import MPT as MPT
    from mpt_eqx.model import KVCache as KVCache
    from mpt_eqx.model.stacked import unstack as unstack
    from mpt_eqx.surgery.quantization import quantize as quantize
    from mpt_eqx.surgery.stacking import stack as stack
finally:
    if _collects:
        _gc.enable()

if TYPE_CHECKING:
    from mpt_eqx import interp as interp
    from mpt_eqx import lora as lora
    from mpt_eqx import sharding as sharding
    from mpt_eqx import surgery as surgery
    from mpt_eqx import text as text
    from mpt_eqx import train as train

__version__ = "0.1.0"

SHIPPED_MODEL = _Path(__file__).parent / "pydoc-3m"
"""Directory of the small trained model that ships with the package; its README.md says what it is."""

SHIPPED_ADAPTER = SHIPPED_MODEL.with_name("pydoc-3m-answers")
"""Directory of an adapter for it that answers questions about Python, for `lora.load`."""

_SUBMODULES = ("interp", "lora", "sharding", "surgery", "text", "train")

if not TYPE_CHECKING:

    def __getattr__(name):
        """Imports a submodule when it is first asked for."""
        if name in _SUBMODULES:
            return _import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
