"""A short text from the model in training, on any layout: what a run shows at its end."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from nemo_llm.models.layers.context_parallel import take_local_chunks
from nemo_llm.training.state import TrainingRun
from nemo_llm.training.step import run_schedule
from nemo_llm.training.validation import evaluating


def sample_text(run: TrainingRun) -> str:
    """Continue ``sample.prompt`` by ``sample.max_new_tokens`` tokens; the same text on every rank.

    The whole window is computed anew for each token, through the same pipeline schedule as training: slow and simple.
    """
    settings, length = run.cfg.sample, run.cfg.data.seq_length
    tokens = run.tokenizer.encode(settings.prompt) or [run.tokenizer.eod_id]
    virtual = [-1 - number for number in range(0 if run.cfg.peft is None else run.cfg.peft.virtual_tokens)]
    generator = torch.Generator().manual_seed(run.cfg.trainer.seed)
    with evaluating(run):
        for _ in range(settings.max_new_tokens):
            window = [*virtual, *tokens[-(length - len(virtual)) :]]
            logits = _next_token_logits(run, window)
            tokens.append(_draw(logits, settings.temperature, settings.top_k, generator))
            if tokens[-1] == run.tokenizer.eod_id:
                break
    return run.tokenizer.decode(tokens)


def _next_token_logits(run: TrainingRun, window: list[int]) -> torch.Tensor:
    """Logits [vocabulary] after the last token of the window, on every rank."""
    runtime, length = run.runtime, run.cfg.data.seq_length
    padded = torch.zeros(1, length, dtype=torch.int64, device=runtime.device)
    padded[0, : len(window)] = torch.tensor(window)
    cp = runtime.parallelism.context_parallel_size
    positions = torch.arange(length, device=runtime.device)[None]
    batch = {
        "tokens": take_local_chunks(padded, runtime.cp_rank, cp, 1),
        "position_ids": take_local_chunks(positions, runtime.cp_rank, cp, 1),
    }
    # An interleaved pipeline needs as many micro-batches as stages; all carry the same window.
    count = dist.get_world_size(runtime.groups.pp)
    outputs = run_schedule(run, [batch] * count, _forward_step, forward_only=True, collect_non_loss_data=True)
    vocabulary = run.tokenizer.vocab_size
    row = torch.zeros(vocabulary, device=runtime.device)
    if runtime.is_last_pipeline_stage:
        local = take_local_chunks(positions, runtime.cp_rank, cp, 1)[0] == len(window) - 1
        if local.any():
            row = outputs[0][0][local][0, :vocabulary].float()
        if cp > 1:
            dist.all_reduce(row, group=runtime.groups.cp)
    if count > 1:
        dist.broadcast(row, runtime.last_stage_rank, group=runtime.groups.pp)
    return row


def _forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], attention_mask=None)
    # [b, s/cp, v/tp] -> [b, s/cp, v] on the last stage
    return output, lambda logits, **_: gather_from_tensor_model_parallel_region(logits)


def _draw(logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token id; the likeliest when ``temperature`` is 0."""
    logits = logits.cpu()
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None:
        threshold = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
