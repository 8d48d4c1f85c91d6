"""Heads for classes and scores, and labelled texts: until then every model knew tokens alone."""

ADDED = {"model.head": None, "data.labelled": {"label_key": "label", "too_long": "truncate"}}
