"""Data: tokenizers, indexed datasets, blends, samples and the micro-batch loader. Imports neither torch nor Megatron."""
