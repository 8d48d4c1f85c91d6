"""nemo_llm: train language models with every Megatron-Core parallelism, from a laptop CPU to a Slurm cluster.

Importing the package is cheap: neither torch nor Megatron-Core is imported until a run is set up.
"""

__version__ = "0.1.0"
