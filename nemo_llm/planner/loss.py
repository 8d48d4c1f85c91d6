"""Bytes at the end of the forward pass: hidden states around the output projection, logits and the loss over them."""

from nemo_llm.config.checks.code_paths import fused_chunk_tokens
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.planner.activations import DTYPE_BYTES, boundary_bytes, tokens_per_rank


def chunk_bytes(setting: ModelSetting, padded_vocab: int) -> float:
    """One chunk of logits of the fused projection and loss; all logits where the two are not fused."""
    tokens = tokens_per_rank(setting)
    chunk = min(tokens, fused_chunk_tokens(setting) or tokens)
    width = padded_vocab / setting.parallelism.tensor_model_parallel_size
    return chunk * width * DTYPE_BYTES[setting.precision.params_dtype]


def loss_bytes(setting: ModelSetting, padded_vocab: int) -> float:
    """Bytes beside the layers' activations while the loss is computed, at their most, on the last pipeline stage.

    The last layer's output, the final norm's (gathered too, under sequence parallelism), the gradient that the loss
    hands back for it; and the logits, or after them what autograd is given for the output matrix where the matrix is no
    embedding of the same stage.
    """
    element = DTYPE_BYTES[setting.precision.params_dtype]
    whole = tokens_per_rank(setting) * setting.model.hidden_size * element
    ends = 2 * boundary_bytes(setting) + whole + (whole if setting.parallelism.sequence_parallel else 0.0)
    if setting.model.head is not None:  # whole on every rank
        return ends + tokens_per_rank(setting) * len(setting.model.head) * (element + 8)
    announced = 0.0
    if not setting.model.share_embeddings_and_output_weights and setting.peft is None:
        announced = padded_vocab * setting.model.hidden_size * element / setting.parallelism.tensor_model_parallel_size
    return ends + max(logits_bytes(setting, padded_vocab), announced)


def logits_bytes(setting: ModelSetting, padded_vocab: int) -> float:
    """Bytes of logits and of what is made of them, at their most.

    Fused, one chunk is in memory at a time and becomes its gradient in place; under a cap three float32 copies stand
    beside it. Whole logits have two float32 copies (before and behind the softmax, then the softmax and its gradient),
    one more in their own format where the vocabulary's padding is masked, and two where they are capped.
    """
    element, capped = DTYPE_BYTES[setting.precision.params_dtype], setting.model.final_logit_softcapping is not None
    logits = chunk_bytes(setting, padded_vocab)
    if fused_chunk_tokens(setting) is not None:
        return logits * (1 + (3 * 4 / element if capped else 0))
    padded = padded_vocab != setting.model.vocab_size
    return logits * (1 + 2 * 4 / element + (1 if padded else 0) + (2 if capped else 0))
