"""From raw text to clean documents, by datatrove's filters and deduplication. Needs the extra ``data``."""
