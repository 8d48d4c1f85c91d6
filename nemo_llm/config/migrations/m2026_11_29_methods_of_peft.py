"""Methods of ``peft`` with keys of their own: each held the keys of all, and read those that it had use for."""

from typing import Any

_LOW_RANK = ("lora", "dora")
_READ_BY = {
    "target_modules": (*_LOW_RANK, "ia3", "adapter"),
    **dict.fromkeys(("rank", "ranks", "alpha", "dropout", "use_rslora"), _LOW_RANK),
    "bottleneck_size": ("adapter",),
    "num_virtual_tokens": ("prompt_tuning", "p_tuning"),
    "encoder_hidden_size": ("p_tuning",),
}


def change(saved: dict[str, Any]) -> dict[str, Any]:
    """The section without what its method never read."""
    if isinstance(peft := saved.get("peft"), dict):
        kind = peft.get("kind")
        saved["peft"] = {key: value for key, value in peft.items() if kind in _READ_BY.get(key, (kind,))}
    return saved
