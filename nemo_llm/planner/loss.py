"""Bytes at the end of the forward pass: hidden states around the output projection, logits and the loss over them."""

from nemo_llm.config.checks.code_paths import fused_chunk_tokens
from nemo_llm.config.sections.arithmetic import padded_vocab_size
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.planner.activations import DTYPE_BYTES, boundary_bytes, tokens_per_rank


def chunk_bytes(cfg: RunConfig, padded_vocab: int) -> float:
    """One chunk of logits of the fused projection and loss; all logits where the two are not fused."""
    tokens = tokens_per_rank(cfg)
    chunk = min(tokens, fused_chunk_tokens(cfg) or tokens)
    width = padded_vocab / cfg.parallelism.tensor_model_parallel_size
    return chunk * width * DTYPE_BYTES[cfg.precision.params_dtype]


def loss_bytes(cfg: RunConfig, padded_vocab: int) -> float:
    """Bytes beside the layers' activations while the loss is computed, at their most, on the last pipeline stage.

    The last layer's output, the final norm's (gathered too, under sequence parallelism), the gradient that the loss
    hands back for it; and the logits, or after them what autograd is given for the output matrix where the matrix is no
    embedding of the same stage.
    """
    element = DTYPE_BYTES[cfg.precision.params_dtype]
    whole = tokens_per_rank(cfg) * cfg.model.hidden_size * element
    ends = 2 * boundary_bytes(cfg) + whole + (whole if cfg.parallelism.sequence_parallel else 0.0)
    if cfg.model.head is not None:  # whole on every rank
        return ends + tokens_per_rank(cfg) * len(cfg.model.head) * (element + 8)
    announced = 0.0
    if not cfg.model.share_embeddings_and_output_weights and cfg.peft is None:
        announced = padded_vocab * cfg.model.hidden_size * element / cfg.parallelism.tensor_model_parallel_size
    return ends + max(logits_bytes(cfg, padded_vocab), announced)


def logits_bytes(cfg: RunConfig, padded_vocab: int) -> float:
    """Bytes of logits and of what is made of them, at their most.

    Fused, one chunk is in memory at a time and becomes its gradient in place; under a cap three float32 copies stand
    beside it. Whole logits have two float32 copies (before and behind the softmax, then the softmax and its gradient),
    one more in their own format where the vocabulary's padding is masked, and two where they are capped.
    """
    element, capped = DTYPE_BYTES[cfg.precision.params_dtype], cfg.model.final_logit_softcapping is not None
    logits = chunk_bytes(cfg, padded_vocab)
    if fused_chunk_tokens(cfg) is not None:
        return logits * (1 + (3 * 4 / element if capped else 0))
    padded = padded_vocab != cfg.model.vocab_size
    return logits * (1 + 2 * 4 / element + (1 if padded else 0) + (2 if capped else 0))


def vocabulary(cfg: RunConfig, tokenizer_vocab_size: int) -> int:
    """Rows of the embedding: the model's own number of tokens, or the tokenizer's, padded."""
    return padded_vocab_size(cfg.model.vocab_size or tokenizer_vocab_size, cfg.model.make_vocab_size_divisible_by)
