"""Checkpoints: safetensors, torch files and GGUF, in directories, alone, or on the Hub; writing the first and last."""

from mpt_eqx.checkpoint.convert import convert as convert
from mpt_eqx.checkpoint.formats.tensors import TensorInfo as TensorInfo
from mpt_eqx.checkpoint.info import CheckpointInfo as CheckpointInfo
from mpt_eqx.checkpoint.info import checkpoint_info as checkpoint_info
from mpt_eqx.checkpoint.load import from_pretrained as from_pretrained
from mpt_eqx.checkpoint.programs import save_gguf as save_gguf
from mpt_eqx.checkpoint.save import save_pretrained as save_pretrained
