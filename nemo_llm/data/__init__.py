"""Data: tokenizers, indexed datasets, blends, samples, the micro-batch loader. Imports neither torch nor Megatron."""
