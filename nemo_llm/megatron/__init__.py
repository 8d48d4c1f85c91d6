"""The one room where this project touches Megatron-Core's insides; megatron/patches.py declares every touch."""
