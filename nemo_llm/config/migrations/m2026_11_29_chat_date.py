"""The day that chat templates write: it was that of each start, which no value says; null refuses such a template."""

ADDED = {"data.chat.date": None}
