"""Conversations: from records to messages, by a template to text and tokens, and which of these are learned.

Imports neither torch nor Megatron, nothing of how data are stored and nothing of how a model speaks.
"""
