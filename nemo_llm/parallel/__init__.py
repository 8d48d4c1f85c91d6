"""Processes and how a model is spread over them: layout arithmetic (no torch) and the runtime that starts it."""
