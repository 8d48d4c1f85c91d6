"""QLoRA: frozen weights stood as they were."""

ADDED = {"peft.base_weights": None}
