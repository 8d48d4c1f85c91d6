"""Checks of the recipe: batch, schedule, precision, data files, loggers."""

from collections.abc import Iterator
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from nemo_llm.assets import ASSET_PREFIX, asset_names, resolve_path
from nemo_llm.config.compose.catalog import nearest
from nemo_llm.config.sections.arithmetic import divisors, either, neighbouring_multiples
from nemo_llm.config.sections.data import Blend, blend_entries
from nemo_llm.config.sections.precision import Fp8Config
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.config.sections.run_services import ExpManagerConfig
from nemo_llm.errors import InputError, Problem
from nemo_llm.tasks import TASKS, build_task


def _data_parallel_size(cfg: RunConfig, world_size: int) -> int | None:
    """Copies of the dense model, or None where the processes do not divide (which another check reports)."""
    copies, rest = divmod(world_size, cfg.parallelism.model_parallel_size)
    return copies if copies and not rest else None


def check_batch(cfg: RunConfig, world_size: int) -> Iterator[Problem]:
    """Every data-parallel rank gets the same whole number of micro-batches."""
    trainer = cfg.trainer
    copies = _data_parallel_size(cfg, world_size)
    if copies is None:
        return
    unit = trainer.micro_batch_size * copies
    whole = f"trainer.micro_batch_size x data-parallel size = {trainer.micro_batch_size} x {copies} = {unit}"
    if trainer.global_batch_size % unit:
        fitting = [
            size for size in divisors(trainer.global_batch_size) if trainer.global_batch_size % (size * copies) == 0
        ]
        smaller = f", or trainer.micro_batch_size to {either(fitting)}" if fitting else ""
        yield Problem(
            "trainer.global_batch_size",
            trainer.global_batch_size,
            f"must be divisible by {whole}",
            f"set it to {either(neighbouring_multiples(trainer.global_batch_size, unit))}{smaller}",
        )
        return
    yield from _interleaving_problems(cfg, trainer.global_batch_size // unit, unit)


def _interleaving_problems(cfg: RunConfig, num_microbatches: int, unit: int) -> Iterator[Problem]:
    """Megatron's interleaved schedule works through micro-batches in groups of the pipeline size."""
    parallel = cfg.parallelism
    pp = parallel.pipeline_model_parallel_size
    if (parallel.virtual_pipeline_model_parallel_size or 1) > 1 and num_microbatches % pp:
        batch = cfg.trainer.global_batch_size
        yield Problem(
            "trainer.global_batch_size",
            batch,
            f"makes {num_microbatches} micro-batches; the interleaved schedule needs a multiple of "
            f"parallelism.pipeline_model_parallel_size = {pp}",
            f"set it to {either(neighbouring_multiples(batch, unit * pp))}, or "
            "parallelism.virtual_pipeline_model_parallel_size=null",
        )


def check_batch_ramp(cfg: RunConfig, world_size: int) -> Iterator[Problem]:
    """Each size on the ramp must run, so start and increment divide like the final size."""
    ramp, trainer = cfg.trainer.rampup_batch_size, cfg.trainer
    copies = _data_parallel_size(cfg, world_size)
    if ramp is None:
        return
    key = "trainer.rampup_batch_size"
    rise = trainer.global_batch_size - ramp.start_global_batch_size
    if rise < 0:
        yield Problem(
            f"{key}.start_global_batch_size",
            ramp.start_global_batch_size,
            f"must be at most trainer.global_batch_size = {trainer.global_batch_size}",
            f"set it to a smaller size, or {key}=null",
        )
    elif rise % ramp.increment:
        yield Problem(
            f"{key}.increment",
            ramp.increment,
            f"must divide the rise from start to trainer.global_batch_size = {rise}",
            f"set it to {either(divisors(rise)[-8:])}",
        )
    if copies is None or rise == 0:
        return
    unit = trainer.micro_batch_size * copies
    if (cfg.parallelism.virtual_pipeline_model_parallel_size or 1) > 1:
        unit *= cfg.parallelism.pipeline_model_parallel_size
    for name, size in (("start_global_batch_size", ramp.start_global_batch_size), ("increment", ramp.increment)):
        if size % unit:
            yield Problem(
                f"{key}.{name}",
                size,
                f"must be divisible by {unit} (micro-batch x data-parallel size, x pipeline size when interleaved)",
                f"set it to {either(neighbouring_multiples(size, unit))}",
            )


def check_schedule(cfg: RunConfig, _world_size: int) -> Iterator[Problem]:
    """The parts of the learning-rate curve fit into its length."""
    optim, sched = cfg.optim, cfg.optim.sched
    if sched.warmup_steps >= sched.decay_steps:
        yield Problem(
            "optim.sched.warmup_steps",
            sched.warmup_steps,
            f"must be below optim.sched.decay_steps = {sched.decay_steps}, which counts the warm-up too",
            f"set it to {sched.decay_steps // 10}, or optim.sched.decay_steps to the length of the whole curve",
        )
    if sched.min_lr > optim.lr:
        yield Problem(
            "optim.sched.min_lr",
            sched.min_lr,
            f"must be at most the peak optim.lr = {optim.lr}",
            f"set it to {optim.lr / 10:g}, a tenth of the peak",
        )
    if sched.name != "wsd":
        return
    if sched.wsd_decay_steps is None:
        yield Problem(
            "optim.sched.wsd_decay_steps",
            None,
            "the wsd schedule needs the length of its final decay",
            f"set it to {max(1, sched.decay_steps // 5)}, a fifth of optim.sched.decay_steps",
        )
    elif sched.wsd_decay_steps > sched.decay_steps - sched.warmup_steps:
        yield Problem(
            "optim.sched.wsd_decay_steps",
            sched.wsd_decay_steps,
            f"must fit behind the warm-up: at most optim.sched.decay_steps - warmup_steps = "
            f"{sched.decay_steps - sched.warmup_steps}",
            f"set it to {max(1, sched.decay_steps // 5)}, a fifth of optim.sched.decay_steps",
        )


def check_offloading(cfg: RunConfig, _world_size: int) -> Iterator[Problem]:
    """Activations are offloaded as autograd saves them: not those of whole recomputed or compiled layers."""
    count = cfg.performance.offload_activation_layers
    key = "performance.offload_activation_layers"
    if count and cfg.parallelism.recompute_granularity == "full":
        rule = "with recompute_granularity=full layers keep nothing that could be offloaded"
        yield Problem(key, count, rule, "set it to 0, or choose recompute_granularity=selective or null")
    if count and cfg.performance.compile_layers:
        yield Problem(key, count, "compiled layers save on their own", "set it to 0, or compile_layers=false")
    layout = cfg.parallelism
    if count and layout.tensor_model_parallel_size > 1 and layout.overlap_grad_reduce:
        # `LinearWithGradAccumulationAndAsyncCommunication` announces the gradient of a weight only
        # where the saved weight has ``grad_added_to_main_grad``, and a copy that a hook handles has not.
        rule = "tensor-parallel layers of Megatron-Core do not announce their gradients then, which the overlap needs"
        yield Problem(key, count, rule, "set it to 0, or parallelism.overlap_grad_reduce=false")


def check_precision(cfg: RunConfig, _world_size: int) -> Iterator[Problem]:
    """FP8 needs two-byte parameters, and Transformer Engine for all recipes but per-tensor current scaling."""
    fp8 = cfg.precision.fp8
    if fp8 is not None and cfg.precision.params_dtype == "fp32":
        rule = "FP8 products go with bf16 or fp16 parameters, not fp32"
        yield Problem("precision.params_dtype", "fp32", rule, "set precision.params_dtype=bf16, or precision.fp8=null")
    installed = find_spec("transformer_engine") is not None
    if cfg.model.transformer_impl == "transformer_engine" and not installed and not cfg.trainer.check_only:
        fix = "install transformer-engine (extra te), or choose model.transformer_impl=auto"
        yield Problem("model.transformer_impl", cfg.model.transformer_impl, "Transformer Engine is not installed", fix)
    auto = cfg.model.transformer_impl == "auto" and not installed and not cfg.trainer.check_only
    if fp8 is not None and (auto or cfg.model.transformer_impl == "torch"):
        yield from _torch_fp8(cfg, fp8)


def _torch_fp8(cfg: RunConfig, fp8: Fp8Config) -> Iterator[Problem]:
    """What the torch backend's own FP8 products cannot do."""
    te = "install transformer-engine (extra te) and set model.transformer_impl=transformer_engine"
    if fp8.fp8_recipe != "tensorwise":
        rule = "without Transformer Engine the scales are those of each tensor (tensorwise)"
        yield Problem("precision.fp8.fp8_recipe", fp8.fp8_recipe, rule, f"choose precision=fp8_tensorwise, or {te}")
    if fp8.fp8_param:
        yield Problem("precision.fp8.fp8_param", True, "needs Transformer Engine", f"set it to false, or {te}")
    tp = cfg.parallelism.tensor_model_parallel_size
    if tp > 1:
        rule = "FP8 without Transformer Engine needs whole weights on each rank"
        yield Problem("parallelism.tensor_model_parallel_size", tp, rule, f"set it to 1, or {te}")
    if cfg.model.moe is not None:
        rule = "FP8 without Transformer Engine has no experts"
        yield Problem("precision.fp8", fp8.fp8_recipe, rule, f"choose precision=bf16, or {te}")
    tokens = cfg.data.seq_length * cfg.trainer.micro_batch_size // cfg.parallelism.context_parallel_size
    sizes = {
        "model.hidden_size": cfg.model.hidden_size,
        "model.ffn_hidden_size": cfg.model.ffn_hidden_size,
        "data.seq_length": tokens,
    }
    for key, size in sizes.items():
        if size is not None and size % 16:
            yield Problem(
                key, size, "FP8 products need multiples of 16 (tokens of a micro-batch too)", "choose another"
            )


def check_optimizer(cfg: RunConfig, _world_size: int) -> Iterator[Problem]:
    """Muon has its section, whole heads on each rank, and what the rest can do with it."""
    muon, layout, model = cfg.optim.muon, cfg.parallelism, cfg.model
    if (cfg.optim.name == "muon") != (muon is not None):
        rule = "optim.name=muon and the section optim.muon go together"
        yield Problem("optim.name", cfg.optim.name, rule, "choose optim=muon or optim=adam")
    if muon is None:
        return
    tp, etp = layout.tensor_model_parallel_size, layout.expert_tensor_parallel_size
    if tp > model.num_query_groups:
        rule = f"Muon needs whole heads of keys on each rank, and model.num_query_groups = {model.num_query_groups}"
        yield Problem("parallelism.tensor_model_parallel_size", tp, rule, "lower it, or choose optim=adam")
    if model.moe is not None and (tp if etp is None else etp) > 1 and layout.use_distributed_optimizer:
        rule = "Muon cannot join experts that are split by tensor parallelism and sharded by the distributed optimizer"
        yield Problem("parallelism.expert_tensor_parallel_size", etp, rule, "set it to 1, or choose optim=adam")
    if cfg.peft is not None:
        yield Problem("optim.name", "muon", f"{cfg.peft.kind} is trained with AdamW", "choose optim=adam")
    if cfg.performance.offload_optimizer_moments:
        rule = "Muon's momentum stays on the GPU"
        yield Problem("performance.offload_optimizer_moments", True, rule, "set it to false, or choose optim=adam")


def check_loggers(cfg: RunConfig, _world_size: int) -> Iterator[Problem]:
    """Loggers that are asked for are installed, and have what they need."""
    for package, key in _wanted_loggers(cfg.exp_manager):
        if find_spec(package) is None:
            rule = f"needs the package {package}, which is not installed"
            yield Problem(key, True, rule, f"install the extra {package}, or set {key}=false")
    yield from logger_problems(cfg.exp_manager)


def _wanted_loggers(manager: ExpManagerConfig) -> Iterator[tuple[str, str]]:
    """Package and key of each logger that is asked for beside TensorBoard's."""
    asked = {"wandb": manager.create_wandb_logger, "mlflow": manager.create_mlflow_logger}
    yield from ((package, f"exp_manager.create_{package}_logger") for package, wanted in asked.items() if wanted)


def logger_problems(manager: ExpManagerConfig) -> Iterator[Problem]:
    """Loggers that the `exp_manager` section asks for and cannot have."""
    for _, key in _wanted_loggers(manager):
        if not manager.enabled:
            fix = f"set exp_manager.enabled=true, or {key}=false"
            yield Problem(key, True, "needs NeMo's exp_manager, and exp_manager.enabled is false", fix)
    if manager.create_wandb_logger and "project" not in manager.wandb_logger_kwargs:
        yield Problem(
            "exp_manager.wandb_logger_kwargs",
            dict(manager.wandb_logger_kwargs),
            "must name the Weights & Biases project",
            "add exp_manager.wandb_logger_kwargs.project=<name>",
        )


def check_resume(cfg: RunConfig, _world_size: int) -> Iterator[Problem]:
    """A checkpoint that is named exists."""
    resume = cfg.checkpoint.resume
    if resume not in ("auto", "never") and not Path(resume).exists():
        yield Problem("checkpoint.resume", resume, "must be auto, never or an existing path", "correct the path")


def _blends(cfg: RunConfig) -> Iterator[tuple[str, Blend]]:
    """Every blend with its key."""
    yield "data.blend", cfg.data.blend
    yield from ((f"data.validation.{name}", blend) for name, blend in cfg.data.validation.items())


def check_data_files(cfg: RunConfig, _world_size: int) -> Iterator[Problem]:
    """Indexed files, texts and tokenizer files that the data section names exist."""
    for key, blend in _blends(cfg):
        for place, source in enumerate(blend_entries(blend, key)):
            if source.prefix is not None:
                yield from _missing_indexed(f"{key}[{place}].prefix", source.prefix)
            if source.text is not None:
                yield from _missing_path(f"{key}[{place}].text", source.text, "text")
            if source.chat is not None:
                yield from _missing_path(f"{key}[{place}].chat", source.chat, "text")
            if source.labelled is not None:
                yield from _missing_path(f"{key}[{place}].labelled", source.labelled, "text")
    if cfg.data.tokenizer.path is not None:
        yield from _missing_path("data.tokenizer.path", cfg.data.tokenizer.path, "tokenizers")


def check_task(cfg: RunConfig, _world_size: int) -> Iterator[Problem]:
    """The task learns from these sources, and agrees with the other sections."""
    task = build_task(cfg.task)
    for key, blend in _blends(cfg):
        for entry in blend_entries(blend, key):
            if entry.kind not in task.source_kinds:
                kinds = " or ".join(sorted(task.source_kinds))
                others = " or ".join(name for name, other in TASKS.items() if entry.kind in other.source_kinds)
                rule = f"is a source of kind {entry.kind}, and task={cfg.task.name} learns from {kinds}"
                yield Problem(key, entry.name, rule, f"give sources of such a kind, or set task={others}")
    yield from task.check(cfg)


def check_fine_tuning(cfg: RunConfig, _world_size: int) -> Iterator[Problem]:
    """Frozen weights in four bits are whole, and virtual tokens leave room for others."""
    if cfg.peft is not None and cfg.peft.base_weights == "nf4":
        yield from _check_four_bits(cfg)
    if cfg.peft is not None and cfg.peft.virtual_tokens >= cfg.data.seq_length:
        yield Problem(
            "peft.num_virtual_tokens",
            cfg.peft.virtual_tokens,
            f"must be below data.seq_length = {cfg.data.seq_length}, in which they count",
            f"set it to {min(20, cfg.data.seq_length // 2)}, or raise data.seq_length",
        )


def _check_four_bits(cfg: RunConfig) -> Iterator[Problem]:
    """Blocks of 64 elements know nothing of a split, and the products are bitsandbytes'."""
    layout = cfg.parallelism
    sizes = {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel_size or 1,
    }
    for key, size in sizes.items():
        if size > 1:
            rule = "peft.base_weights=nf4 holds whole layers on each rank"
            yield Problem(f"parallelism.{key}", size, rule, "set it to 1, or peft.base_weights=null")
    if cfg.precision.fp8 is not None:
        rule = "peft.base_weights=nf4 multiplies in the precision of the activations"
        yield Problem("precision.fp8", cfg.precision.fp8.fp8, rule, "use precision=bf16, or peft.base_weights=null")


def _missing_indexed(key: str, prefix: str) -> Iterator[Problem]:
    missing = [suffix for suffix in (".bin", ".idx") if not Path(prefix + suffix).expanduser().is_file()]
    if missing and prefix.endswith((".bin", ".idx")):
        yield Problem(key, prefix, "must be the path without .bin or .idx", f"write {prefix[:-4]}")
    elif missing:
        files = " and ".join(prefix + suffix for suffix in missing)
        yield Problem(
            key,
            prefix,
            f"there is no {files}",
            f"name raw text as {{name: mine, text: {prefix}}}"
            if Path(prefix).expanduser().exists() or glob(str(Path(prefix).expanduser()))
            else "correct the path, or write the files with tools/index_dataset.py",
        )


def _missing_path(key: str, path: str, kind: str) -> Iterator[Problem]:
    try:
        found = resolve_path(path, kind)
    except InputError:
        names = [f"{ASSET_PREFIX}{name}" for name in asset_names(kind)]
        meant = nearest(path, names)
        fix = f"did you mean {meant}?" if meant else f"write one of {', '.join(names)}, or a path"
        yield Problem(key, path, "is not shipped with the package", fix)
        return
    if not found.exists() and not (kind == "text" and glob(str(found))):
        yield Problem(key, path, "there is no such file or folder", "correct the path")


RECIPE_CHECKS = (
    check_offloading,
    check_optimizer,
    check_batch,
    check_batch_ramp,
    check_schedule,
    check_precision,
    check_loggers,
    check_resume,
    check_data_files,
    check_task,
    check_fine_tuning,
)
