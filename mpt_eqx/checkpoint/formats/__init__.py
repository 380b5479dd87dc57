"""The formats of weight files: each file here reads one, without torch."""
