"""Text from a trained model: loading it on any layout, the KV cache, sampling, decoding."""
