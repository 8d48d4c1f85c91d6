"""Fields of Megatron that nothing reads: accepted as overrides until then, refused by name since."""

DROPPED = tuple(
    f"model.mcore_overrides.{name}"
    for name in ("mtp_num_layers", "mtp_loss_scaling_factor", "softmax_type", "qk_clip*")
)
