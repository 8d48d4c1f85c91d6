"""Conversion of weights between formats, each ending in a comparison of logits."""
