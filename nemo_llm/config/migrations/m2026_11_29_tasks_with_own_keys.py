"""Each task has its own keys: heads, which have no z-loss, carried its weight until then."""

from typing import Any


def change(saved: dict[str, Any]) -> dict[str, Any]:
    """Without the key that never had an effect."""
    task = saved.get("task")
    if isinstance(task, dict) and task.get("name") in ("classification", "score"):
        task.pop("z_loss_coeff", None)
    return saved
