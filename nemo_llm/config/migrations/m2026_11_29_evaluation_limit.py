"""A limit of time for evaluation while training: there was none, and one of a day ends no evaluation that did end."""

ADDED = {"evaluation.timeout_minutes": 1440}
