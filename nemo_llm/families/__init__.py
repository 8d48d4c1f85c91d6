"""Families of models as tables: names of tensors, transforms, configuration fields. No torch."""
