"""The one room where this project touches Megatron-Core's insides; patches.toml declares every touch."""
