"""DeepSeek-V2: attention was never latent, and a model of experts had them in every layer or by a frequency."""

ADDED = {"model.mla": None, "model.moe.moe_first_k_dense_replace": None}
