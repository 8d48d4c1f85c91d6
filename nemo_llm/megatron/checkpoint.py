"""What Megatron-Core keeps private of its distributed checkpoints, and the reader of their files (patches.toml)."""

from collections.abc import Callable
from typing import Any

from megatron.core.dist_checkpointing.strategies import torch as strategy


def read_files_by(reader: Callable[..., Any]) -> None:
    """Let Megatron open every checkpoint of this process through ``reader(folder, cache_metadata=False)``."""
    strategy._get_filesystem_reader = reader


by_stored_names = strategy._replace_state_dict_keys_with_sharded_keys
"""A sharded state dict as lists of shards by the names under which they are stored, and how to come back."""
