"""A product of a weight with a few vectors on the CPU, at the speed its memory is read; compiled where it can be."""

from mpt_eqx.kernel.call import available, matvec, missing

__all__ = ["available", "matvec", "missing"]
