"""From a configuration to a `TrainingRun`: model, optimizer, schedule, data."""

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from nemo_llm.config import RunConfig
from nemo_llm.models.build import build_model_chunks
from nemo_llm.parallel.runtime import ParallelRuntime
from nemo_llm.tasks import pretrain
from nemo_llm.training.batch_ramp import build_batch_ramp
from nemo_llm.training.batches import build_loaders
from nemo_llm.training.optimizer import build_optimizer
from nemo_llm.training.state import TrainingRun, TrainState


def build_training_run(cfg: RunConfig, runtime: ParallelRuntime) -> TrainingRun:
    """Build every object of a run at step 0.

    Raises:
        ConfigError, InputError: a model that Megatron refuses, data that cannot be read, tokens beyond the vocabulary.
    """
    tokenizer, sets, loader, validation = build_loaders(cfg, runtime)
    vocab_size = cfg.model.vocab_size or tokenizer.vocab_size
    model = wrap_data_parallel(cfg, build_model_chunks(cfg, runtime, vocab_size))
    optimizer = build_optimizer(cfg, model)
    connect_schedule(cfg, model, optimizer)
    return TrainingRun(
        cfg=cfg,
        runtime=runtime,
        model=model,
        optimizer=optimizer,
        forward_backward=get_forward_backward_func(),
        forward_step=pretrain.forward_step,
        loader=loader,
        validation=validation,
        data=sets,
        tokenizer=tokenizer,
        ramp=build_batch_ramp(cfg.trainer.global_batch_size, cfg.trainer.rampup_batch_size),
        state=TrainState(),
    )


def wrap_data_parallel(cfg: RunConfig, chunks: list[torch.nn.Module]) -> list[DistributedDataParallel]:
    """Give each chunk Megatron's gradient buffers; gradients are summed over data-parallel ranks, in fp32 if asked."""
    layout = cfg.parallelism
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=cfg.precision.grad_reduce_in_fp32,
        overlap_grad_reduce=layout.overlap_grad_reduce,
        overlap_param_gather=layout.overlap_param_gather,
        use_distributed_optimizer=layout.use_distributed_optimizer,
        average_in_collective=False,
        bucket_size=cfg.performance.ddp_bucket_size,
    )
    return [
        # With interleaving Megatron overlaps the reduction of the first chunk alone: the others would wait on the
        # pipeline and delay it.
        DistributedDataParallel(get_model_config(chunk), ddp_config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]


def connect_schedule(cfg: RunConfig, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Hang on Megatron's config the callables that its schedules look for there."""
    config = get_model_config(model[0])
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss if cfg.precision.params_dtype == "fp16" else None
    if cfg.parallelism.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in model]
        config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
