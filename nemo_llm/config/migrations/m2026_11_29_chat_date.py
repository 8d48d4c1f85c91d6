"""The day that chat templates see: it was today's."""

ADDED = {"data.chat.date": None}
