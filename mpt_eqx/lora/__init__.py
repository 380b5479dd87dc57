"""LoRA: adapters of low rank on the linear maps of a model that stays as it is, read and written as PEFT does."""

from mpt_eqx.lora.adapters import add as add
from mpt_eqx.lora.adapters import merge as merge
from mpt_eqx.lora.adapters import remove as remove
from mpt_eqx.lora.adapters import trainable as trainable
from mpt_eqx.lora.files import load as load
from mpt_eqx.lora.files import save as save
from mpt_eqx.lora.linear import LoRALinear as LoRALinear
