"""nemo_llm: pretrain, fine-tune and align language models with every Megatron-Core parallelism, on CPU or GPU."""

__version__ = "0.1.0"
