"""Megatron-Core's ``GPTModel`` with the few things it lacks: our loss, padded-vocabulary masking, logit caps."""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_llm.config import ModelConfig
from nemo_llm.config.arithmetic import padded_vocab_size
from nemo_llm.models.cross_entropy import VocabParallelCrossEntropy


class LanguageModel(GPTModel):
    """One pipeline chunk of a decoder-only language model.

    Args:
        config: Megatron's configuration.
        block_spec: layers of this chunk.
        model: our model section.
        vocab_size: number of tokens the tokenizer knows; the weights are padded to ``padded_vocab_size``.
        z_loss_coeff: weight of the squared log-partition in the loss.
        stage: keyword arguments that place the chunk (``pre_process``, ``post_process``, ``vp_stage``,
            ``pg_collection``).
    """

    def __init__(
        self,
        config: TransformerConfig,
        block_spec: TransformerBlockSubmodules,
        model: ModelConfig,
        vocab_size: int,
        z_loss_coeff: float,
        **stage: object,
    ) -> None:
        super().__init__(
            config,
            block_spec,
            vocab_size=padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by),
            max_sequence_length=model.max_position_embeddings,
            position_embedding_type=model.position_embedding_type,
            rotary_base=model.rotary_base,
            rotary_percent=model.rotary_percent,
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            **stage,
        )
        self.known_tokens = vocab_size
        self.z_loss_coeff = z_loss_coeff
        self.final_logit_softcapping = model.final_logit_softcapping

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Loss of each token: labels ``[b, s/cp]``, logits ``[s/cp, b, v/tp]`` -> ``[b, s/cp]`` float32.

        In evaluation ``[2, b, s/cp]``: the losses, and 1 where the label has the largest logit.
        """
        s, b, _ = logits.shape
        flat = self.finish_logits(logits).flatten(0, 1)
        by_position = labels.transpose(0, 1).reshape(-1)
        z_coeff = self.z_loss_coeff if self.training else 0.0
        losses, hits = VocabParallelCrossEntropy.apply(flat, by_position, z_coeff, self.pg_collection.tp)
        if self.training:
            return losses.view(s, b).transpose(0, 1)
        return torch.stack((losses, hits)).view(2, s, b).transpose(1, 2)

    def finish_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Cap the logits and take the padding of the vocabulary out of the softmax: ``[..., v/tp]`` as it was."""
        if self.final_logit_softcapping is not None:
            logits = self.final_logit_softcapping * torch.tanh(logits / self.final_logit_softcapping)
        first = self.pg_collection.tp.rank() * logits.shape[-1]
        known_here = self.known_tokens - first
        if known_here >= logits.shape[-1]:
            return logits
        padding = torch.arange(logits.shape[-1], device=logits.device) >= known_here
        return logits.masked_fill(padding, torch.finfo(logits.dtype).min)
