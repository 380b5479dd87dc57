"""Checkpoints: directories of config.json and safetensors, and what the Hub holds of them."""

from mpt_eqx.checkpoint.info import CheckpointInfo as CheckpointInfo
from mpt_eqx.checkpoint.info import TensorInfo as TensorInfo
from mpt_eqx.checkpoint.info import checkpoint_info as checkpoint_info
from mpt_eqx.checkpoint.load import from_pretrained as from_pretrained
from mpt_eqx.checkpoint.save import save_pretrained as save_pretrained
