"""What Megatron-Core's distributed checkpoints keep private, and the reader of their files; see megatron/patches.py."""

from collections.abc import Callable
from typing import Any

from megatron.core.dist_checkpointing.strategies import torch as strategy


def read_files_by(reader: Callable[..., Any]) -> None:
    """Let Megatron open every checkpoint of this process through ``reader(folder, cache_metadata=False)``."""
    strategy._get_filesystem_reader = reader


def with_keys_of_shards(state: dict, keep_only_main_replica: bool) -> dict:
    """This sharded state dict, with lists of shards by the names under which they are stored."""
    renamed, _, _ = strategy._replace_state_dict_keys_with_sharded_keys(state, keep_only_main_replica)
    return renamed
