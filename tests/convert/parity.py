"""Logits and gradients of a converted model on any layout, beside those of transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nemo_llm.convert.hf_files import HfReader
from tests.convert.cases import TOKENS, batch

LAYOUTS = {
    "one process": (1, ()),
    "TP2": (2, ("parallelism=tp2",)),
    "PP2": (2, ("parallelism=pp2",)),
    "TP2 x PP2": (4, ("parallelism=tp2_pp2",)),
    "EP2": (2, ("parallelism=ep2",)),
}


def run_theirs(model: Any, folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits [b, s, v] of transformers' model, and the gradients of the mean loss of a token by name on the disk."""
    tokens, labels = batch()[:, :-1], batch()[:, 1:]
    model.zero_grad()
    logits = model(tokens, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    # The gradients take the place of the weights, and are saved under the names that the weights have on the disk.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(folder)
    with HfReader(folder) as reader:
        return logits.detach(), {name: reader.read(name) for name in reader.infos}


def measure(checkpoint: str, output: str, overrides: tuple[str, ...]) -> None:
    """On every rank: write ``logits.pt`` and, in our checkpoint's form, the gradients into ``output``."""
    import torch.distributed as dist

    from nemo_llm.checkpoint.weights import load_weights, save_weights
    from nemo_llm.config.compose.load import compose
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import forward_backward

    cfg = compose(
        [
            "+model=from_checkpoint",
            f"model.checkpoint_path='{checkpoint}'",
            "tokenizer=byte",
            "data.blend=[{name: mock, mock: {num_documents: 10, mean_document_length: 50}}]",
            "data.split=null",
            "trainer.accelerator=cpu",
            "precision=fp32",
            "trainer.global_batch_size=2",
            "trainer.micro_batch_size=1",
            f"data.seq_length={TOKENS}",
            *overrides,
            "parallelism.use_distributed_optimizer=false",  # with it a rank has the sums of its own shard alone
        ]
    )
    run = build_training_run(cfg, start_runtime(cfg.runtime_setting))
    load_weights(run.model, Path(checkpoint))
    rows = list(batch())
    batches = [
        {
            "tokens": row[None, :-1],
            "labels": row[None, 1:],
            "loss_mask": torch.ones(1, TOKENS),
            "position_ids": torch.arange(TOKENS)[None],
        }
        for row in rows
    ]
    world_batches = batches if run.runtime.dp_size == 1 else batches[run.runtime.dp_rank :: run.runtime.dp_size]
    logits = _logits(run, batches)
    if dist.get_rank() == dist.get_world_size() - 1:
        torch.save(logits, Path(output) / "logits.pt")
    _, denominator = forward_backward(run, world_batches)
    for chunk in run.model:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad / denominator)
    save_weights(run.model, Path(output))


def _logits(run: Any, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor | None:
    """[b, s, v] on the last pipeline stage."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.core.utils import unwrap_model

    def step(iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> Any:
        given = next(iterator)
        output = model(given["tokens"], given["position_ids"], attention_mask=None)
        chunk = unwrap_model(model)
        output = chunk.finish_logits(output) if chunk.post_process else output
        return output, lambda logits, **_: gather_from_tensor_model_parallel_region(logits)

    outputs = run.forward_backward(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=run.model[0],
        num_microbatches=len(batches),
        seq_length=TOKENS,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return torch.cat(outputs) if run.runtime.is_last_pipeline_stage else None
