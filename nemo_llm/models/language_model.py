"""Megatron-Core's ``GPTModel`` with the few things it lacks: our loss, padded-vocabulary masking, logit caps."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_llm.config import ModelConfig
from nemo_llm.config.sections.arithmetic import padded_vocab_size
from nemo_llm.megatron.models import become
from nemo_llm.models.layers.classification_head import ScoreHead, head_losses
from nemo_llm.models.layers.embedding import Embedding
from nemo_llm.models.layers.linear_cross_entropy import (
    LinearCrossEntropy,
    LossInputs,
    LossRule,
    VocabParallelCrossEntropy,
)
from nemo_llm.models.layers.rope_scaling import LocalRotaryEmbedding, ScaledRotaryEmbedding
from nemo_llm.models.layers.router import Router, position_facts


class OutputLayer(ColumnParallelLinear):
    """Megatron's output projection, which can also go straight to the losses.

    The projection must run as a call of this module: Megatron waits for a parameter that is gathered late in a hook
    before the forward pass of the module that owns it.
    """

    def forward(self, hidden: torch.Tensor, *inputs: Any, loss: LossInputs | None = None, **settings: Any) -> Any:
        """As Megatron's; with ``loss`` the losses and hits, ``[T]`` each, of ``hidden`` ``[T, h]``."""
        if loss is None:
            return super().forward(hidden, *inputs, **settings)
        weight = loss.tied_weight if loss.tied_weight is not None else self.weight
        return LinearCrossEntropy.apply(hidden, weight, loss.labels, loss.loss_mask, loss.rule)


class LanguageModel(GPTModel):
    """One pipeline chunk of a decoder-only language model.

    Args:
        config: Megatron's configuration.
        block_spec: layers of this chunk.
        model: our model section.
        vocab_size: number of tokens the tokenizer knows; the weights are padded to ``padded_vocab_size``.
        z_loss_coeff: weight of the squared log-partition in the loss.
        fused_chunk_tokens: tokens of a chunk of the fused projection and loss; None computes whole logits.
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
        fused_chunk_tokens: int | None,
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
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights and model.head is None,
            **stage,
        )
        if model.rotary_local_base is not None:
            self.rotary_pos_emb = LocalRotaryEmbedding(model, self.pg_collection.cp)
        elif model.rope_scaling is not None and model.mla is None:
            self.rotary_pos_emb = ScaledRotaryEmbedding(model, self.pg_collection.cp)
        if self.pre_process:
            become(self.embedding.word_embeddings, Embedding)
        if self.pre_process and model.embedding_multiplier is not None:
            factor = model.embedding_multiplier
            self.embedding.word_embeddings.register_forward_hook(lambda _module, _inputs, output: output * factor)
        self.known_tokens = vocab_size
        self.z_loss_coeff = z_loss_coeff
        self.final_logit_softcapping = model.final_logit_softcapping
        self.fused_chunk_tokens = fused_chunk_tokens
        self.output_positions: torch.Tensor | None = None
        """Where logits or losses are wanted, as numbers ``position * b + row``; None: everywhere. For inference."""
        self.rotary_table: torch.Tensor | None = None
        """Angles ``[longest, 1, r]`` by position, while tokens are decoded at positions of their own; else None."""
        self.post_process: bool
        self.score: ScoreHead | None = None
        if self.post_process and model.head is not None:
            del self.output_layer
            self.score = ScoreHead(config, len(model.head), self.pg_collection)
        elif self.post_process:
            become(self.output_layer, OutputLayer)
        self.routes = any(isinstance(module, Router) for module in self.modules())
        if fused_chunk_tokens is not None and config.gradient_accumulation_fusion:
            self._announce_empty_gradient()

    @property
    def fuses_loss(self) -> bool:
        """Whether this chunk ends the model, and with the output projection and the loss in one."""
        return self.post_process and self.score is None and self.fused_chunk_tokens is not None

    @property
    def output_weight(self) -> torch.Tensor:
        """The output projection's ``[v/tp, h]``, of a chunk that ends the model: its own or the embedding's."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def _announce_empty_gradient(self) -> None:
        """Undo Megatron's mark on a matrix that is embedding and output layer of one chunk.

        By the mark (``zero_out_wgrad``) what autograd delivers is added to the gradient buffer, zeros at the least.
        Here both uses add to the buffer themselves.
        """
        if self.pre_process and self.post_process and self.share_embeddings_and_output_weights:
            self.output_weight.zero_out_wgrad = False

    def sharded_state_dict(self, *arguments: Any, **settings: Any) -> dict:
        """As Megatron's, which looks for an output layer in every chunk that ends a model; a head stands for none."""
        ends_model, self.post_process = self.post_process, self.post_process and self.score is None
        try:
            return super().sharded_state_dict(*arguments, **settings)
        finally:
            self.post_process = ends_model

    def forward(
        self,
        *inputs: torch.Tensor | None,
        loss_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        **settings: Any,
    ) -> torch.Tensor:
        """As Megatron's; both masks, ``[b, s/cp]``, say over which tokens the routers take their losses."""
        facts = position_facts(loss_mask, padding_mask) if self.routes and loss_mask is not None else None
        return super().forward(*inputs, loss_mask=loss_mask, padding_mask=facts, **settings)

    def _preprocess(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        **settings: Any,
    ) -> tuple:
        """Embedding and rotary angles, the angles of ``position_ids`` while tokens are decoded; and facts for routers.

        Megatron's second result is the angles, its sixth goes to the layers (megatron/patches.toml, `model_steps`). It
        cuts the sixth for sequence parallelism on the first stage alone.
        """
        parts = super()._preprocess(input_ids, position_ids, **settings)
        if padding_mask is not None:
            tp = self.pg_collection.tp
            facts = padding_mask.chunk(tp.size(), 1)[tp.rank()] if self.config.sequence_parallel else padding_mask
            parts = (*parts[:5], facts, *parts[6:])
        if self.rotary_table is None or parts[1] is None:
            return parts
        return parts[0], self.rotary_table[position_ids.t()], *parts[2:]

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        *inputs: Any,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        **settings: Any,
    ) -> torch.Tensor:
        """Logits or losses of the last stage; losses come from the fused projection when a loss mask is given."""
        if self.output_positions is not None and self.post_process:
            hidden_states = hidden_states.flatten(0, 1)[self.output_positions][:, None]
        if self.score is not None:
            logits = self.score(hidden_states)
            return logits.transpose(0, 1) if labels is None else head_losses(logits, labels, self.training)
        if not self.post_process or labels is None or loss_mask is None or self.fused_chunk_tokens is None:
            settings["loss_mask"] = loss_mask
            return super()._postprocess(hidden_states, *inputs, labels=labels, **settings)
        return self._fused_losses(hidden_states, labels, loss_mask, self.fused_chunk_tokens)

    def _fused_losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor, chunk_tokens: int
    ) -> torch.Tensor:
        """As `compute_language_model_loss`, from ``hidden`` [s/cp(/tp), b, h], without the whole logits."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=group)
        elif group.size() > 1:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        weight = self.output_weight
        here = self.share_embeddings_and_output_weights and self.pre_process
        rule = LossRule(
            known_here=self.known_tokens - group.rank() * weight.shape[0],
            z_coeff=self.z_loss_coeff if self.training else 0.0,
            softcapping=self.final_logit_softcapping,
            chunk_tokens=chunk_tokens,
            tied=here,
            group=group,
        )
        s, b, _ = hidden.shape
        inputs = LossInputs(labels.t().reshape(-1), loss_mask.t().reshape(-1), rule, weight if here else None)
        losses, hits = self.output_layer(hidden.flatten(0, 1), loss=inputs)
        if self.training:
            return losses.view(s, b).t()
        return torch.stack((losses, hits)).view(2, s, b).transpose(1, 2)

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
