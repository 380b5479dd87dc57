"""Models on a mesh of devices."""

from mpt_eqx.config.sharding_rules import ShardingRules as ShardingRules
from mpt_eqx.sharding.explain import explain as explain
from mpt_eqx.sharding.mesh import make_mesh as make_mesh
from mpt_eqx.sharding.multihost import assert_same_across_processes as assert_same_across_processes
from mpt_eqx.sharding.qkv import split_qkv as split_qkv
from mpt_eqx.sharding.rules import DATA_PARALLEL as DATA_PARALLEL
from mpt_eqx.sharding.rules import FSDP as FSDP
from mpt_eqx.sharding.rules import FSDP_TP as FSDP_TP
from mpt_eqx.sharding.rules import SEQUENCE_PARALLEL as SEQUENCE_PARALLEL
from mpt_eqx.sharding.rules import TENSOR_PARALLEL as TENSOR_PARALLEL
from mpt_eqx.sharding.rules import WEIGHT_AXES as WEIGHT_AXES
from mpt_eqx.sharding.shard import shard as shard
from mpt_eqx.sharding.specs import partition_specs as partition_specs
