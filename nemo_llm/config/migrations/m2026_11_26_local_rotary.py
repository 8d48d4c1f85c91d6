"""Gemma 3: layers with a window had the rotary base of all others."""

ADDED = {"model.rotary_local_base": None}
