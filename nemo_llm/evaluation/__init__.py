"""Measuring a model: perplexity, benchmark tasks, classification, prompts against each other, reports."""
