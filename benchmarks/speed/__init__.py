"""Speed and memory beside transformers and llama.cpp, on the same weights: `python -m benchmarks.speed`."""
