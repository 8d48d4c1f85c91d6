"""From a configuration to a `TrainingRun`: model, optimizer, schedule, data.

The gradients of the step before are forgotten without a pass over all of them. The gradient of a linear layer's weight
is a sum of our matrix products, straight in Megatron's fp32 buffer. Zeros are not written there only for the first
product to add to them: that one overwrites what is left of the step before (`kernels.matmul.take_stale`). Everything
else is zeroed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config, unwrap_model

from nemo_llm.checkpoint.fingerprint import weights_fingerprint
from nemo_llm.checkpoint.folder import resolve_checkpoint
from nemo_llm.checkpoint.new_tokens import new_tokens
from nemo_llm.checkpoint.saved_run import SavedRun
from nemo_llm.config import RunConfig
from nemo_llm.config.sections.batch_ramp import build_batch_ramp
from nemo_llm.kernels.matmul import take_stale
from nemo_llm.log import get_logger
from nemo_llm.megatron.optimizer import skip_empty_walk
from nemo_llm.models.build import build_model_chunks
from nemo_llm.models.describe_backend import describe_choices
from nemo_llm.models.language_model import LanguageModel
from nemo_llm.models.layers.experts import GroupedExperts
from nemo_llm.models.layers.fp8 import Fp8Linear
from nemo_llm.models.layers.linear import WholeLinear, weights_with_product
from nemo_llm.models.warm_kernels import choose_products, warm_kernels
from nemo_llm.optim.build import build_optimizer
from nemo_llm.parallel.runtime import ParallelRuntime
from nemo_llm.peft.attach import attach_peft, count_parameters
from nemo_llm.peft.four_bit import quantize_base
from nemo_llm.peft.hf_format import CONFIG_FILE, load_hf_adapter
from nemo_llm.peft.state import load_adapter
from nemo_llm.tasks import build_task
from nemo_llm.training.batches import build_loaders
from nemo_llm.training.resume import load_first_weights
from nemo_llm.training.state import TrainingRun, TrainState

_log = get_logger(__name__)


def build_training_run(cfg: RunConfig, runtime: ParallelRuntime) -> TrainingRun:
    """Build every object of a run at step 0.

    Raises:
        ConfigError, InputError: a model that Megatron refuses, data that cannot be read, tokens beyond the vocabulary.
    """
    tokenizer, sets, loader, validation = build_loaders(cfg, runtime)
    ramp = build_batch_ramp(cfg.trainer.global_batch_size, cfg.trainer.rampup_batch_size)
    _log.info("data\n%s", sets.describe(ramp.consumed_samples(cfg.trainer.max_steps)))
    setting, vocab_size = cfg.model_setting, cfg.model.vocab_size or tokenizer.vocab_size
    warm_kernels(setting, runtime, vocab_size)
    chunks = build_model_chunks(setting, runtime, vocab_size)
    base_fingerprint = "" if cfg.peft is None else freeze_and_adapt(cfg, chunks, runtime)
    for line in describe_choices(setting, runtime.device):
        _log.info("%s", line)
    choose_products(setting, chunks, runtime.device)
    model = wrap_data_parallel(cfg, chunks)
    if not cfg.performance.compile_layers:  # which would make constants of the marks
        for chunk in model:
            mark_overwritten(chunk)
    optimizer = build_optimizer(cfg, model, runtime)
    skip_empty_walk()
    connect_schedule(cfg, model, optimizer)
    return TrainingRun(
        cfg=cfg,
        runtime=runtime,
        model=model,
        optimizer=optimizer,
        forward_backward=get_forward_backward_func(),
        task=build_task(cfg.task),
        loader=loader,
        validation=validation,
        data=sets,
        tokenizer=tokenizer,
        ramp=ramp,
        state=TrainState(),
        base_fingerprint=base_fingerprint,
    )


def freeze_and_adapt(cfg: RunConfig, chunks: list[torch.nn.Module], runtime: ParallelRuntime) -> str:
    """Load the weights that stay frozen, and put adapters beside them; returns the fingerprint of the former.

    Comes before gradient buffers and optimizer, which then hold what is trained and nothing else.
    """
    assert cfg.peft is not None
    if cfg.checkpoint.init_from is not None:
        load_first_weights(cfg, runtime, chunks)
    fingerprint = weights_fingerprint(chunks, runtime.device)
    if cfg.peft.base_weights == "nf4":
        quantize_base(chunks, runtime.groups)
    attach_peft(cfg.model_setting, chunks, runtime)
    if cfg.peft.init_from is not None:
        start = Path(cfg.peft.init_from)
        if (start / CONFIG_FILE).is_file():
            load_hf_adapter(chunks, start, cfg.peft)
        else:
            load_adapter(chunks, SavedRun.open(start).folder, fingerprint)
    if cfg.checkpoint.init_from is not None:
        _warn_of_new_tokens(resolve_checkpoint(Path(cfg.checkpoint.init_from)))
    trained = count_parameters(chunks, runtime)
    _log.info("%s: %s trained parameters beside frozen weights %s", cfg.peft.kind, f"{trained:,}", fingerprint)
    return fingerprint


def _warn_of_new_tokens(base: Path) -> None:
    """Say that rows which were made for new tokens are frozen: nothing else would show it."""
    if new := new_tokens(base):
        shown = ", ".join(new[:5]) + (", ..." if len(new) > 5 else "")
        _log.warning(
            "%s: %d tokens are new there (%s), and their rows of embedding and output layer stay frozen beside an "
            "adapter. Train all weights first (peft=null) if they have to be learned",
            *(base, len(new), shown),
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
    config.finalize_model_grads_func = _sum_gradients
    config.grad_scale_func = optimizer.scale_loss if cfg.precision.params_dtype == "fp16" else None
    if cfg.parallelism.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in model]
        config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]


def _sum_gradients(model: list[torch.nn.Module], _num_tokens: torch.Tensor | None = None, **settings: Any) -> None:
    """Megatron's sum over ranks, without its division by the number of tokens (`update_weights`)."""
    for chunk in model:
        zero_untouched(chunk)
    finalize_model_grads(model, None, **settings)


def mark_overwritten(chunk: DistributedDataParallel) -> None:
    """Mark the weights of this chunk whose gradients nothing writes but our products.

    Experts tell nobody that a weight's gradient is there where gradients are summed over ranks at the end alone.
    """
    for module in unwrap_model(chunk).modules():
        if isinstance(module, GroupedExperts):
            module.announces_gradients = chunk.ddp_config.overlap_grad_reduce
    for weight in _written_by_products(unwrap_model(chunk)):
        if hasattr(weight, "main_grad"):  # not frozen
            weight.overwrites_gradient = True


def zero_untouched(chunk: DistributedDataParallel) -> None:
    """Zero what is still stale after the last backward pass: weights that this step did not use."""
    for parameter in chunk.params_with_grad:
        if take_stale(parameter.main_grad):
            parameter.main_grad.zero_()


def _written_by_products(model: LanguageModel) -> Iterator[torch.nn.Parameter]:
    yield from weights_with_product(model, WholeLinear.product, Fp8Linear.product)
    for module in model.modules():
        if isinstance(module, GroupedExperts) and module.is_plain():
            yield from module.weights()
    # One that is the embedding too gets gradients from both.
    if model.fuses_loss and not model.share_embeddings_and_output_weights:
        yield model.output_weight
