"""What a platform needs: kernels, the order of sums, placement on devices. The formulas stand in `model`."""
