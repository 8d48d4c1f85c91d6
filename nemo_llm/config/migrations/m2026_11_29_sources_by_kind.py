"""Sources by kind: each had the short forms of every kind, one of them not null; Megatron's flat lists were kept."""

from typing import Any

from nemo_llm.config.sections.sources import with_long_forms


def change(saved: dict[str, Any]) -> dict[str, Any]:
    """The same sources in the form that names their kind."""
    if isinstance(saved.get("data"), dict):
        saved["data"] = with_long_forms(saved["data"])
    return saved
