"""What a real model holds, measured on warm ranks: parameters, and bytes saved for the backward pass.

Megatron is imported in the functions, which run on the ranks; the test process itself stays without it.
"""

from typing import Any

from nemo_llm.config.compose.load import compose

VOCAB_SIZE = 2048


def count_local_parameters(overrides: tuple[str, ...]) -> int:
    """Elements of all parameters that this rank holds."""
    from nemo_llm.models.build import build_model_chunks
    from nemo_llm.parallel.runtime import start_runtime, stop_runtime

    cfg = compose(overrides)
    runtime = start_runtime(cfg.runtime_setting)
    try:
        chunks = build_model_chunks(cfg.model_setting, runtime, VOCAB_SIZE)
        return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    finally:
        stop_runtime()


def count_trained_parameters(overrides: tuple[str, ...]) -> int:
    """Elements of the parameters that this rank trains beside a frozen model."""
    from nemo_llm.models.build import build_model_chunks
    from nemo_llm.parallel.runtime import start_runtime, stop_runtime
    from nemo_llm.peft.attach import attach_peft

    cfg = compose(overrides)
    runtime = start_runtime(cfg.runtime_setting)
    try:
        chunks = build_model_chunks(cfg.model_setting, runtime, VOCAB_SIZE)
        attach_peft(cfg.model_setting, chunks, runtime)
        parameters = (parameter for chunk in chunks for parameter in chunk.parameters())
        return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    finally:
        stop_runtime()


def measure_layer_bytes(overrides: tuple[str, ...]) -> int:
    """Bytes that the first layer's forward pass saves for its backward pass, each storage once, weights left out."""
    import torch
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from nemo_llm.models.build import build_model_chunks
    from nemo_llm.parallel.runtime import start_runtime, stop_runtime

    cfg = compose(overrides)
    runtime = start_runtime(cfg.runtime_setting)
    try:
        model = build_model_chunks(cfg.model_setting, runtime, VOCAB_SIZE)[0]
        layer = next(module for module in model.modules() if isinstance(module, TransformerLayer))
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        saved: dict[int, torch.Tensor] = {}  # kept alive, or a later tensor could take the address of a freed one

        def note(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        shape = (cfg.data.seq_length, cfg.trainer.micro_batch_size, cfg.model.hidden_size)
        hidden = torch.randn(shape, requires_grad=True)
        rotary = _rotary(model, cfg.data.seq_length)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
        return sum(t.untyped_storage().nbytes() for place, t in saved.items() if place not in weights)
    finally:
        stop_runtime()


def _rotary(model: Any, seq_length: int) -> Any:
    language_model = next((module for module in model.modules() if hasattr(module, "rotary_pos_emb")), None)
    return None if language_model is None else language_model.rotary_pos_emb(seq_length)
