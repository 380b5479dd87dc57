"""From a model to a changed model."""

from mpt_eqx.surgery.quantize import quantize as quantize
