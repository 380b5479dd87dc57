"""Steps of decoding on the CPU at the speed its memory is read: a compiled kernel, where it could be compiled."""

from mpt_eqx.ops.cpu.call import DTYPES, attention, available, matmul, missing

__all__ = ["DTYPES", "attention", "available", "matmul", "missing"]
