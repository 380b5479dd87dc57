"""How fast the library is, beside others on the same weights. Nothing here is imported by `import mpt_eqx`."""
