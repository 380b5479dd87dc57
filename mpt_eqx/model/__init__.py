"""The modules of an MPT: shape-typed, for one sequence; a batch is `jax.vmap`."""

from mpt_eqx.model.kv_cache import KVCache as KVCache
from mpt_eqx.model.mpt import MPT as MPT
