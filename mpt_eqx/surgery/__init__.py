"""From a model to a changed model."""

from mpt_eqx.surgery.quantization import quantize as quantize
