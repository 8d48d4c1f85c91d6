"""The check of memory before a run: none was made."""

ADDED = {"trainer.check_memory": False}
