"""Checkpoint folders: complete or invisible, every file hashed, weights without a layout."""
