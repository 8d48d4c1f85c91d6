"""Parameter-efficient fine-tuning: small trained parts beside frozen weights, on any parallel layout."""
