"""Steps of decoding on the CPU at the speed its memory is read: a compiled kernel, where it could be compiled."""

from mpt_eqx.ops.cpu.call import attention, available, matmul, missing

__all__ = ["attention", "available", "matmul", "missing"]
