"""A trained model ready to be asked: loaded from a checkpoint onto any layout of TP, PP and EP."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model

from nemo_llm.checkpoint.manifest import verify
from nemo_llm.checkpoint.saved_run import SavedRun
from nemo_llm.checkpoint.weights import load_weights
from nemo_llm.config import PrecisionConfig
from nemo_llm.config.checks import setting_problems
from nemo_llm.config.checks.code_paths import qkv_in_one
from nemo_llm.config.commands.generate import ModelPlace
from nemo_llm.config.sections.model_setting import ModelSetting, RuntimeSetting
from nemo_llm.config.shipped import reference_fp32, shipped
from nemo_llm.errors import ConfigError, Problem
from nemo_llm.inference.graphs import DecodeGraphs
from nemo_llm.log import get_logger
from nemo_llm.models.build import build_model_chunks
from nemo_llm.models.layers.kv_cache import KVCache, cacheable_attentions, connect_cache
from nemo_llm.parallel.runtime import ParallelRuntime
from nemo_llm.tokenizers.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer_from_folder

_log = get_logger(__name__)

# On a GPU decoding looks at multiples of this many slots, so that few shapes (and CUDA graphs) occur.
_GPU_SLOT_STEP = 256


def for_inference(saved: SavedRun, place: ModelPlace, world_size: int) -> ModelSetting:
    """What builds a trained model for ``place.parallelism``, whatever concerned its training.

    Raises:
        ConfigError: a layout that this model or these processes do not allow.
    """
    # A token at a time cannot be split over the sequence, and there are no micro-batches to interleave.
    layout = replace(
        place.parallelism,
        sequence_parallel=False,
        virtual_pipeline_model_parallel_size=None,
        recompute_granularity=None,
    )
    # Chunks of logits stay in a CPU's cache. On a GPU the fused loss would be compiled for every number of tokens.
    on_cpu = place.accelerator == "cpu" or not torch.cuda.is_available()
    setting = reference_fp32(replace(saved.sections.model, transformer_impl="torch"))
    performance = replace(
        setting.performance,
        fused_linear_cross_entropy=on_cpu,
        cross_entropy_chunk_tokens=256,
        gradient_accumulation_fusion=False,
        # One kernel for any length; the rotation alone would be compiled for every length of prompts.
        fused_rope=not on_cpu and qkv_in_one(setting.model, layout),
        compile_layers=False,
        flex_attention=False,  # compiled for every length of prompts
    )
    precision = shipped(PrecisionConfig, f"precision/{place.dtype or saved.sections.precision.params_dtype}")
    setting = replace(setting, parallelism=layout, precision=precision, performance=performance)
    # Lengths, sequence parallelism for experts under TP, and ways of balancing experts matter in training alone.
    trained = ("data.seq_length", "parallelism.sequence_parallel", "model.moe.moe_router_load_balancing_type")
    problems = [problem for problem in setting_problems(setting, world_size) if problem.key not in trained]
    if layout.context_parallel_size > 1:
        rule = "generation and evaluation do not split a sequence"
        problems.append(
            Problem("parallelism.context_parallel_size", layout.context_parallel_size, rule, "set it to 1, or use TP")
        )
    if problems:
        raise ConfigError(problems)
    return setting


@dataclass(frozen=True)
class LoadedFolder:
    """A checkpoint that was found, and what its model is built from, on which processes."""

    folder: Path
    setting: ModelSetting
    runtime: RuntimeSetting
    tokenizer: Tokenizer


def open_checkpoint(place: ModelPlace, path: Path, world_size: int) -> LoadedFolder:
    """Find the checkpoint and read what is not weights.

    Raises:
        InputError, ConfigError, CheckpointNotFoundError: each names what is missing and the fix.
    """
    saved = SavedRun.open(path)
    tokenizer = load_tokenizer_from_folder(saved.tokenizer)
    if isinstance(tokenizer, HuggingFaceTokenizer) and (bos := tokenizer.unsaved_bos()) is not None:
        _log.warning(
            "%s: its tokenizer.json puts %s before a text, and this checkpoint was saved without: texts are read as "
            "they were until now. To have it, convert the model again (tools/convert_checkpoint.py, from its Hugging "
            "Face folder; a trained one to format hf and back)",
            saved.folder,
            bos,
        )
    setting = for_inference(saved, place, world_size)
    runtime = RuntimeSetting(parallelism=setting.parallelism, accelerator=place.accelerator)
    return LoadedFolder(saved.folder, setting, runtime, tokenizer)


class InferenceModel:
    """One rank's part of a model, with which all ranks compute together; every method is a collective of all ranks.

    Every data-parallel rank computes the same: ranks beyond TP x PP bring nothing but the experts that they hold.
    """

    def __init__(
        self, setting: ModelSetting, runtime: ParallelRuntime, tokenizer: Tokenizer, chunk: torch.nn.Module
    ) -> None:
        self.setting, self.runtime, self.tokenizer = setting, runtime, tokenizer
        self.chunk: Any = unwrap_model(chunk).eval()
        self.vocab_size = min(tokenizer.vocab_size, self.chunk.known_tokens)
        self.max_length = setting.model.max_position_embeddings
        self.num_stages = dist.get_world_size(runtime.groups.pp)
        self.classes: tuple[str, ...] = setting.model.head or ()
        # Megatron's embedding under TP and its experts wait for the device, which a recorded step must not.
        alone = runtime.parallelism.model_parallel_size == 1 and setting.model.moe is None and setting.model.mla is None
        self.records_graphs = runtime.device.type == "cuda" and alone
        self._stage_ranks = dist.get_process_group_ranks(runtime.groups.pp)
        attentions = cacheable_attentions(self.chunk)
        if attentions is None:
            problem = Problem(
                "model.layer_spec",
                setting.model.layer_spec,
                "has an attention without a cache",
                "set model.layer_spec=null",
            )
            raise ConfigError([problem])
        self._attentions = attentions

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    def new_cache(self, num_slots: int) -> KVCache:
        """A cache for one batch whose sequences do not exceed ``num_slots``.

        Raises:
            ConfigError: the model has a head and cannot continue a text.
        """
        self._need_tokens()
        on_cpu = self.device.type == "cpu"
        # The kernels take keys and values of the same width.
        fused = not on_cpu and self.setting.performance.fused_kernels and self.setting.model.mla is None
        return KVCache(num_slots, 1 if on_cpu else _GPU_SLOT_STEP, fused)

    @torch.no_grad()
    def read_prompts(self, cache: KVCache, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor | None:
        """Fill the cache from ``tokens`` ``[b, s]``, padded at the right; logits ``[b, vocabulary]`` after each row.

        None on all but the last pipeline stage.
        """
        rows, length = tokens.shape
        cache.read_prompts()
        positions = torch.arange(length, device=tokens.device).expand(rows, length)
        wanted = (lengths - 1) * rows + torch.arange(rows, device=tokens.device)
        self.chunk.output_positions, self.chunk.rotary_table = wanted, None
        connect_cache(self._attentions, cache)
        try:
            return self._logits(self._through_stages(tokens, positions))
        finally:
            self.chunk.output_positions = None
            connect_cache(self._attentions, None)

    @torch.no_grad()
    def decode(
        self, cache: KVCache, tokens: torch.Tensor, positions: torch.Tensor, longest: int
    ) -> torch.Tensor | None:
        """One more token of each row, ``[b]`` at ``positions`` ``[b]``; logits as from `read_prompts`.

        On a GPU the result is overwritten by the next call.
        """
        connect_cache(self._attentions, cache)
        self.chunk.rotary_table = self._rotary_table(cache.num_slots)
        try:
            if self.records_graphs:
                if cache.recorded is None:
                    cache.recorded = DecodeGraphs(self._recordable_step, cache, len(tokens), self.chunk.config)
                return cache.recorded(tokens, positions, longest)
            cache.decode_at(positions, longest)
            return self._logits(self._through_stages(tokens[:, None], positions[:, None]))
        finally:
            self.chunk.rotary_table = None
            connect_cache(self._attentions, None)

    def _recordable_step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits = self._logits(self.chunk(tokens[:, None], positions[:, None], attention_mask=None))
        assert logits is not None
        return logits

    @torch.no_grad()
    def losses(self, tokens: torch.Tensor, labels: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of labels, and 1 where a label is the likeliest token: ``[2, n]`` on every rank.

        Args:
            tokens: ``[b, s]``, padded at the right.
            labels: ``[n]``, of the places ``wanted``.
            wanted: ``[n]``, numbers ``position * b + row``.

        Raises:
            ConfigError: the model has a head and gives tokens no likelihood.
        """
        self._need_tokens()
        rows, length = tokens.shape
        positions = torch.arange(length, device=tokens.device).expand(rows, length)
        self.chunk.output_positions = wanted
        try:
            # The output is [2, 1, n]: Megatron's first dimension is the position, which here numbers the places.
            result = self._through_stages(tokens, positions, labels[None])
        finally:
            self.chunk.output_positions = None
        return self._from_last_stage(result, (2, 1, len(labels)))[:, 0]

    @torch.no_grad()
    def head_logits(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """What the head says at the last token of each row: ``[b, classes]`` float32 on every rank.

        Args:
            tokens: ``[b, s]``, padded at the right.
            lengths: ``[b]``, tokens of each row.
        """
        rows, length = tokens.shape
        positions = torch.arange(length, device=tokens.device).expand(rows, length)
        self.chunk.output_positions = (lengths - 1) * rows + torch.arange(rows, device=tokens.device)
        try:
            result = self._through_stages(tokens, positions)
        finally:
            self.chunk.output_positions = None
        # The output is [1, b, classes]: Megatron's first dimension is the position, which here numbers the rows.
        return self._from_last_stage(result, (1, rows, len(self.classes)))[0]

    def _from_last_stage(self, result: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
        """A float32 output of the last stage, on every rank."""
        if self.num_stages > 1:
            if result is None:
                result = torch.empty(shape, dtype=torch.float32, device=self.device)
            result = result.contiguous()
            dist.broadcast(result, self.runtime.last_stage_rank, group=self.runtime.groups.pp)
        assert result is not None
        return result

    def _need_tokens(self) -> None:
        if self.classes:
            rule = "a head in place of the output layer tells classes or scores and knows no tokens"
            fix = "ask for classification=..., or name a checkpoint of a language model"
            raise ConfigError([Problem("model.head", list(self.classes), rule, fix)])

    def agree(self, tokens: torch.Tensor | None, rows: int) -> torch.Tensor:
        """The tokens ``[rows]`` that the last stage's first rank chose, on every rank."""
        if tokens is None:
            tokens = torch.empty(rows, dtype=torch.int64, device=self.device)
        if self.runtime.world_size > 1:
            # The last rank of the world is on a last stage: pipeline stages vary slowest.
            dist.broadcast(tokens, self.runtime.world_size - 1)
        return tokens

    def _through_stages(
        self, tokens: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Run all pipeline stages; the output of the last one, None on the others."""
        stage, group = self.runtime.pp_rank, self.runtime.groups.pp
        rows, length = tokens.shape
        if stage > 0:
            hidden = torch.empty(
                length, rows, self.setting.model.hidden_size, dtype=self.chunk.config.params_dtype, device=self.device
            )
            dist.recv(hidden, self._stage_ranks[stage - 1], group=group)
            self.chunk.set_input_tensor(hidden)
        mask = None if labels is None else torch.ones_like(labels)
        output = self.chunk(tokens, positions, attention_mask=None, labels=labels, loss_mask=mask)
        if self.runtime.is_last_pipeline_stage:
            return output
        dist.send(output.contiguous(), self._stage_ranks[stage + 1], group=group)
        return None

    def _logits(self, output: torch.Tensor | None) -> torch.Tensor | None:
        """[1, b, v/tp] or [b, 1, v/tp] -> [b, vocabulary] in float32."""
        if output is None:
            return None
        local = self.chunk.finish_logits(output.flatten(0, 1))
        return gather_from_tensor_model_parallel_region(local)[:, : self.vocab_size].float()

    def _rotary_table(self, longest: int) -> torch.Tensor | None:
        if self.setting.model.position_embedding_type != "rope" or self.setting.model.mla is not None:
            return None
        return self.chunk.rotary_pos_emb(longest)[:, 0]


def load_model(opened: LoadedFolder, runtime: ParallelRuntime, how: str) -> InferenceModel:
    """Build the model on these ranks and read its weights.

    Args:
        how: which part of the files to compare with their hashes first (``full``, ``sampled``, ``sizes``).

    Raises:
        CheckpointError: damaged files, or weights of another model.
    """
    verify(opened.folder, how, (runtime.rank, runtime.world_size))  # type: ignore[arg-type]
    chunks = build_model_chunks(opened.setting, runtime, opened.setting.model.vocab_size or opened.tokenizer.vocab_size)
    load_weights(chunks, opened.folder)
    return InferenceModel(opened.setting, runtime, opened.tokenizer, chunks[0])
