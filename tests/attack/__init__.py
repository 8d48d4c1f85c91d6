"""Hostile files: what readers of foreign files do with them."""
