"""Products and attention on the CPU: a compiled kernel, where it could be compiled."""

from mpt_eqx.ops.cpu.call import DTYPES, attention, available, has_bfloat16_dot, has_tiles, matmul, missing

__all__ = ["DTYPES", "attention", "available", "has_bfloat16_dot", "has_tiles", "matmul", "missing"]
