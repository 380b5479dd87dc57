"""Measurements of mpt_eqx, run from the repository root; no part of the installed package."""
