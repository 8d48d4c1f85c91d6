"""Whether a run may be resumed with a configuration that differs from the one it was started with.

A key may change when it leaves three things alone: the meaning of the saved state (model, optimizer moments), the order
of the data (a pure function of data, seed and batch sizes), and what is optimised. Everything else may change, and
every change is listed for the user. A key that is named nowhere here is refused, and a test finds it.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nemo_llm.errors import NO_VALUE, ConfigError, Problem

# Patterns of dotted keys; * matches dots too.
CHANGEABLE_KEYS = (
    # A label, in logs and in the loggers. (run.dir is where the run lies and is not compared: folders move.)
    "run.name",
    # How long the run goes and how often it reports. The learning rate does not follow max_steps.
    "trainer.max_steps",
    "trainer.max_time_minutes",
    "trainer.val_interval",
    "trainer.val_steps",
    "trainer.log_interval",
    "trainer.warmup_log_steps",
    "trainer.check_only",
    "trainer.check_memory",
    "trainer.first_step_timeout_minutes",
    "trainer.step_timeout_minutes",
    "trainer.stop_deadline_minutes",
    "trainer.straggler_interval",
    # What happens to a bad step; good ones do not see it.
    "trainer.bad_step_policy",
    "trainer.max_bad_steps",
    "trainer.spike_sigmas",
    "trainer.spike_window",
    # Where and how the same computation is done: checkpoints hold no layout, the data order knows samples and not
    # micro-batches. Sums are taken in another order, so results agree within rounding and not bit by bit. (A router's
    # loss is a mean over a micro-batch: where there is one, `_fixed_by_router` takes its size out of this list.)
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.micro_batch_size",
    "trainer.deterministic",
    "parallelism.*",
    "performance.*",
    "cluster.*",
    "model.transformer_impl",
    "model.moe.moe_token_dispatcher_type",
    "model.moe.moe_grouped_gemm",
    # The optimizer's state means the same whatever these are, and each applies from the next step on: lowering the
    # learning rate after a spike, or decaying a WSD run early, is why people resume. The betas and epsilon are not
    # here: the saved moments are averages that were taken with them.
    "optim.lr",
    "optim.weight_decay",
    "optim.clip_grad",
    "optim.sched.*",
    # Arithmetic of one step, without state of its own; params_dtype and fp8_param decide what the state is.
    "precision.name",
    "precision.grad_reduce_in_fp32",
    "precision.initial_loss_scale",
    "precision.min_loss_scale",
    "precision.loss_scale_window",
    "precision.hysteresis",
    "precision.fp8.fp8",
    "precision.fp8.fp8_recipe",
    "precision.fp8.fp8_amax_*",
    # How data is fetched, not which.
    "data.name",
    "data.cache_dir",
    "data.prefetch",
    # What is measured and written on the side.
    "data.validation.*",
    "evaluation.*",
    "checkpoint.*",
    "exp_manager.*",
    "sample.*",
)

# The rest of `RunConfig`: a test holds every key to one of the lists. A key with a pattern in both may change.
FIXED_KEYS = (
    # What the saved weights are, and what they are trained for.
    "model.*",
    "peft.*",
    "task.*",
    "precision.params_dtype",
    "precision.fp8.fp8_param",
    # What the optimizer's state means.
    "optim.name",
    "optim.adam_*",
    "optim.muon.*",
    # Which samples come in which order, and how many make a step.
    "trainer.seed",
    "trainer.global_batch_size",
    "trainer.rampup_batch_size*",
    "data.tokenizer.*",
    "data.blend*",
    "data.split",
    "data.seq_length*",
    "data.packing",
    "data.chat*",
    "data.labelled*",
    "data.fim*",
    "data.reset_*",
    "data.eod_mask_loss",
    "data.text_key",
)

_NOT_COMPARED = ("run.dir",)


@dataclass(frozen=True, slots=True)
class Change:
    """One key whose value differs from the saved one; `NO_VALUE` stands for a key that is not there."""

    key: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.after!r}"


# Overrides that changed nothing when they were accepted, and are refused by name since: a run resumes without them.
_NEVER_READ = (
    "model.mcore_overrides.mtp_num_layers",
    "model.mcore_overrides.mtp_loss_scaling_factor",
    "model.mcore_overrides.softmax_type",
    "model.mcore_overrides.qk_clip*",
)


def compare_configs(
    saved: Mapping[str, Any], new: Mapping[str, Any], also_allowed: Sequence[str] = ()
) -> tuple[list[Change], list[Change]]:
    """Changes from `saved` to `new`, both nested plain mappings: (changed and allowed, changed and forbidden).

    Args:
        saved: configuration that the run was started with; may lack keys that later versions added.
        new: configuration to go on with.
        also_allowed: patterns of dotted keys that the user allows beside `CHANGEABLE_KEYS`.
    """
    patterns = (*CHANGEABLE_KEYS, *_NEVER_READ, *also_allowed)
    fixed = _fixed_by_router(new)
    allowed: list[Change] = []
    forbidden: list[Change] = []
    for change in _differences(saved, new):
        if change.key not in _NOT_COMPARED:
            matches = any(fnmatchcase(change.key, pattern) for pattern in patterns) and change.key not in fixed
            (allowed if matches else forbidden).append(change)
    return allowed, forbidden


def check_agreement(
    saved: Mapping[str, Any], new: Mapping[str, Any], source: Path, also_allowed: Sequence[str] = ()
) -> list[Change]:
    """Allowed changes from `saved`, which was read from `source`, to `new`; list them for the user.

    Raises:
        ConfigError: naming every key that a resume may not change, with both values.
    """
    allowed, forbidden = compare_configs(saved, new, also_allowed)
    if forbidden:
        fixed = _fixed_by_router(new)
        raise ConfigError(
            Problem(
                change.key,
                change.after,
                f"{source} was made with {change.before!r}, and a resume may not change this key"
                + fixed.get(change.key, ""),
                f"set {change.key} back to {change.before!r} to go on, or start anew in another run.dir"
                if change.before is not NO_VALUE
                else "remove the key to go on, or start anew in another run.dir",
            )
            for change in forbidden
        )
    return allowed


def _fixed_by_router(config: Mapping[str, Any]) -> dict[str, str]:
    """Keys that this configuration's router fixes although they are changeable elsewhere, each with the reason."""
    moe = config.get("model", {}).get("moe") or {}
    balance = moe.get("moe_router_load_balancing_type")
    weighed = balance in ("aux_loss", "seq_aux_loss") and moe.get("moe_aux_loss_coeff")
    if not (weighed or balance == "sinkhorn" or moe.get("moe_z_loss_coeff")):
        return {}
    reason = (
        ": the router is balanced over the tokens of a micro-batch, so another size would train something else "
        "(parallelism.recompute_granularity, context and tensor parallelism save memory without that)"
    )
    return {"trainer.micro_batch_size": reason}


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[Change]:
    """Keys that differ, in order; a list is one value, and so is a section that the other side has as null."""
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, NO_VALUE), after.get(name, NO_VALUE)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif not _same(old, new):
            yield Change(prefix + name, old, new)


def _at_home(value: object) -> object:
    """`value` with the home folder for ``~`` in paths: earlier versions saved them as they were written."""
    if isinstance(value, str) and value.startswith("~/"):
        return os.path.expanduser(value)
    if isinstance(value, Mapping):
        return {key: _at_home(part) for key, part in value.items()}
    return [_at_home(part) for part in value] if isinstance(value, list) else value


def _same(before: object, after: object) -> bool:
    """Equal; a key absent on one side equals null and an empty mapping, as for keys that a later version added."""
    absent: tuple[object, ...] = (NO_VALUE, None, {})
    return _at_home(before) == _at_home(after) or (before in absent and after in absent)
