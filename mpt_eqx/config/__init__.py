"""MPTConfig: the numbers that decide an MPT, under llm-foundry's own names."""

from mpt_eqx.config.mpt_config import LAYERNORMS as LAYERNORMS
from mpt_eqx.config.mpt_config import RMSNORMS as RMSNORMS
from mpt_eqx.config.mpt_config import LayerConfig as LayerConfig
from mpt_eqx.config.mpt_config import MPTConfig as MPTConfig
from mpt_eqx.config.mpt_config import count_flops as count_flops
from mpt_eqx.config.parts import MOE_TYPES as MOE_TYPES
from mpt_eqx.config.parts import ActFnConfig as ActFnConfig
from mpt_eqx.config.parts import AttnConfig as AttnConfig
from mpt_eqx.config.parts import BlockOverride as BlockOverride
from mpt_eqx.config.parts import FFNConfig as FFNConfig
from mpt_eqx.config.parts import InitConfig as InitConfig
from mpt_eqx.config.parts import RopeHFConfig as RopeHFConfig
from mpt_eqx.config.parts import TemperatureTuning as TemperatureTuning
from mpt_eqx.config.sharding_rules import ShardingRules as ShardingRules
