"""Ranks that end a piece of work together: an error on one is raised on all of them."""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from nemo_llm.errors import NemoLlmError


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
    """For a block without collectives: the first rank's error in it (or that of the lowest) is raised on every rank.

    Without this the others would wait in their next collective until its time limit.
    """
    error: NemoLlmError | OSError | None = None
    try:
        yield
    except (NemoLlmError, OSError) as caught:
        error = caught
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors: list[Exception | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        found = next((other for other in errors if other is not None), None)
        if found is not None:
            raise found
    elif error is not None:
        raise error
