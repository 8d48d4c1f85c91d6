"""FlexAttention: windows, document masks and capped scores were computed with dense masks."""

ADDED = {"performance.flex_attention": False}
