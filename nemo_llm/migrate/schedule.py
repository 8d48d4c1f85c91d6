"""Length of a run and its learning-rate schedule, from Megatron-LM's and NeMo's words into steps of ours.

Ours numbers updates from 1. Megatron-LM (and NeMo's cosine with constant steps) give update number n the rate that ours
has at n - 1, so that their first update has rate 0; corner points and values are the same.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_llm.config.sections.batch_ramp import BatchRamp, build_batch_ramp
from nemo_llm.config.sections.trainer import RampupBatchSize
from nemo_llm.migrate.rows import ImportRow

MAX, DECAY, WARMUP, WSD = (
    "trainer.max_steps",
    "optim.sched.decay_steps",
    "optim.sched.warmup_steps",
    "optim.sched.wsd_decay_steps",
)
_ITERATIONS = {"train-iters", "lr-decay-iters", "lr-warmup-iters", "lr-wsd-decay-iters"}
_SAMPLES = {"train-samples", "lr-decay-samples", "lr-warmup-samples", "lr-wsd-decay-samples"}
MEGATRON_SCHEDULE = _ITERATIONS | _SAMPLES | {"lr-warmup-fraction"}
NEMO_SCHEDULE = frozenset(
    f"model.optim.sched.{name}"
    for name in ("warmup_steps", "warmup_ratio", "constant_steps", "constant_ratio", "max_steps")
)
_LARGEST_DIFFERENCE = 0.01


def megatron_schedule(given: Mapping[str, Any], keys: dict[str, Any]) -> Iterator[ImportRow]:
    """Put max_steps and the schedule's steps into ``keys``; yields what became of each argument.

    Args:
        given: the arguments that the file has, by Megatron-LM's names.
        keys: what was translated so far; batch size and ramp are read here.
    """
    wanted = {name: given[name] for name in MEGATRON_SCHEDULE if given.get(name) is not None}
    bad = {name: value for name, value in wanted.items() if isinstance(value, bool) or not _is_number(value)}
    yield from (ImportRow(name, value, "unmapped", "no number that this file sets") for name, value in bad.items())
    if bad:
        return
    if "train-samples" in wanted:
        yield from _by_samples(wanted, keys)
    elif "train-iters" in wanted:
        yield from _by_iterations(wanted, keys)
    else:
        rule = "neither --train-iters nor --train-samples is given, and Megatron-LM needs one"
        yield ImportRow("train-iters", None, "unmapped", f"{MAX}: {rule}")
        yield from (ImportRow(name, value, "unmapped", f"needs {MAX}") for name, value in wanted.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def _by_iterations(wanted: Mapping[str, Any], keys: dict[str, Any]) -> Iterator[ImportRow]:
    for name in sorted(_SAMPLES & wanted.keys()):
        yield ImportRow(name, wanted[name], "unmapped", "Megatron-LM takes no samples beside --train-iters")
    total = int(wanted["train-iters"])
    decay = int(wanted.get("lr-decay-iters", total))
    fraction = wanted.get("lr-warmup-fraction")
    warmup = wanted.get("lr-warmup-iters", 0) if fraction is None else fraction * decay
    keys |= {MAX: total, DECAY: decay, WARMUP: math.ceil(warmup)}
    yield ImportRow("train-iters", total, "mapped", f"{MAX} = {total}")
    yield _row(wanted, "lr-decay-iters", decay, f"{DECAY} = {decay}")
    yield _row(
        wanted, "lr-warmup-iters" if fraction is None else "lr-warmup-fraction", warmup, _rounded(WARMUP, warmup)
    )
    if "lr-wsd-decay-iters" in wanted:
        keys[WSD] = int(wanted["lr-wsd-decay-iters"])
        yield ImportRow("lr-wsd-decay-iters", keys[WSD], "mapped", f"{WSD} = {keys[WSD]}")


def _by_samples(wanted: Mapping[str, Any], keys: dict[str, Any]) -> Iterator[ImportRow]:
    for name in sorted(_ITERATIONS & wanted.keys()):
        yield ImportRow(name, wanted[name], "unmapped", "Megatron-LM takes no iterations beside --train-samples")
    batch, rampup = keys.get("trainer.global_batch_size"), keys.get("trainer.rampup_batch_size")
    try:
        ramp = build_batch_ramp(int(batch or 0) or _refuse(), None if rampup is None else RampupBatchSize(**rampup))
    except ValueError as error:
        for name in sorted(wanted.keys() - _ITERATIONS):
            yield ImportRow(name, wanted[name], "unmapped", f"samples cannot be turned into steps: {error}")
        return
    total, ramp_samples = int(wanted["train-samples"]), 0 if rampup is None else rampup["ramp_samples"]
    decay = int(wanted.get("lr-decay-samples", total))
    fraction = wanted.get("lr-warmup-fraction")
    warmup = wanted.get("lr-warmup-samples", 0) if fraction is None else fraction * decay
    # Megatron-LM leaves a last batch out that is not whole, but not within the ramp.
    steps = (
        _steps(ramp, total) if rampup is None else max(_steps(ramp, total), _steps(ramp, min(total, ramp_samples)) + 1)
    )
    keys |= {MAX: steps, DECAY: _steps(ramp, decay, whole=False), WARMUP: _steps(ramp, warmup, whole=False)}
    yield ImportRow("train-samples", total, "mapped", f"{MAX} = {steps}")
    yield _row(wanted, "lr-decay-samples", decay, f"{DECAY} = {keys[DECAY]}")
    name = "lr-warmup-samples" if fraction is None else "lr-warmup-fraction"
    yield _row(wanted, name, warmup, f"{WARMUP} = {keys[WARMUP]}")
    if "lr-wsd-decay-samples" in wanted:
        wsd = wanted["lr-wsd-decay-samples"]
        keys[WSD] = keys[DECAY] - _steps(ramp, decay - wsd, whole=False)
        yield ImportRow("lr-wsd-decay-samples", wsd, "mapped", f"{WSD} = {keys[WSD]}")
    share, step = _largest_difference(ramp, (float(warmup), float(decay)), (keys[WARMUP], keys[DECAY]))
    if share > _LARGEST_DIFFERENCE:
        key = "rampup-batch-size" if rampup is not None else "global-batch-size"
        yield ImportRow(
            key,
            given_ramp(rampup) if rampup is not None else batch,
            "unmapped",
            f"between these steps Megatron-LM's rate follows samples and ours steps: at step {step} the two are "
            f"{share:.0%} of the warm-up or decay apart",
        )


def given_ramp(rampup: Mapping[str, int]) -> list[int]:
    """Megatron-LM's three numbers."""
    return [rampup["start_global_batch_size"], rampup["increment"], rampup["ramp_samples"]]


def _refuse() -> int:
    raise ValueError("--global-batch-size is not given")


def _steps(ramp: BatchRamp, samples: float, *, whole: bool = True) -> int:
    """Steps within ``samples``; with ``whole=False`` also the last, which goes beyond."""
    stage = max((s for s in ramp.stages if s.samples_before <= samples), key=lambda s: s.steps_before)
    steps = (samples - stage.samples_before) / stage.global_batch_size
    return stage.steps_before + (math.floor(steps) if whole else math.ceil(steps))


def _largest_difference(ramp: BatchRamp, samples: tuple[float, float], steps: tuple[int, int]) -> tuple[float, int]:
    """Largest difference of the shares done of warm-up and decay, counted in samples and in steps; and the step."""
    corners = {stage.steps_before for stage in ramp.stages} | {steps[0] - 1, steps[0], steps[0] + 1, steps[1] - 1, 1}
    found = (0.0, 0)
    for step in sorted(step for step in corners if 0 < step <= steps[1]):
        shares = [
            _share(float(ramp.consumed_samples(step)), *samples),
            _share(float(step), float(steps[0]), float(steps[1])),
        ]
        found = max(found, (max(abs(a - b) for a, b in zip(*shares, strict=True)), step))
    return found


def _share(position: float, warmup: float, decay: float) -> tuple[float, float]:
    done = min(1.0, position / warmup) if warmup else 1.0
    return done, min(1.0, max(0.0, position - warmup) / (decay - warmup)) if decay > warmup else 1.0


def _row(wanted: Mapping[str, Any], name: str, value: Any, text: str) -> ImportRow:
    return ImportRow(name, value, "mapped" if name in wanted else "default", text)


def _rounded(target: str, value: float) -> str:
    steps = math.ceil(value)
    return f"{target} = {steps}" + ("" if steps == value else f" (rounded up from {value:g})")


def nemo_schedule(given: Mapping[str, Any], keys: dict[str, Any]) -> Iterator[ImportRow]:
    """As `megatron_schedule`, for ``model.optim.sched`` of NeMo (nemo/core/optim/lr_scheduler.py)."""
    start = "model.optim.sched."
    wanted = {key.removeprefix(start): given[key] for key in NEMO_SCHEDULE if given.get(key) is not None}
    name = given.get(f"{start}name")
    if name is None:
        keys |= {"optim.sched.name": "constant", WARMUP: 0}
        yield ImportRow(f"{start}name", None, "default", "optim.sched.name = constant")
    total: Any = wanted.get("max_steps", keys.get(MAX))
    constant, ratio = wanted.get("constant_steps"), wanted.get("constant_ratio")
    misplaced = ratio is not None or constant if name != "CosineAnnealing" else False
    numbers = all(_is_number(value) and not isinstance(value, bool) for value in wanted.values())
    if name not in ("CosineAnnealing", "WarmupAnnealing") or not _is_number(total) or not numbers or misplaced:
        if wanted:
            rule = f"needs a schedule that is known (CosineAnnealing, WarmupAnnealing) and {MAX}; this one is {name}"
            yield from (ImportRow(f"{start}{key}", value, "unmapped", rule) for key, value in sorted(wanted.items()))
        return
    warmup = wanted.get("warmup_steps", int(wanted.get("warmup_ratio", 0) * total))
    hold = constant if constant is not None else int((ratio or 0) * total)
    if total - hold <= warmup:
        rule = f"of {total} steps, {warmup:g} of warm-up and {hold} at the end leave none to decay over"
        yield from (ImportRow(f"{start}{key}", value, "unmapped", rule) for key, value in sorted(wanted.items()))
        return
    if hold:  # up from 0 in `warmup` steps, down to min_lr in what is left, then min_lr for `hold` steps
        keys |= {WARMUP: math.ceil(warmup), DECAY: int(total - hold)}
    else:  # their update 0 has the rate 1 / (warm-up + 1), their last one is number max_steps
        keys |= {WARMUP: math.ceil(warmup) + 1, DECAY: int(total) + 1}
    text = {"warmup": f"{WARMUP} = {keys[WARMUP]}", "constant": f"{DECAY} = {keys[DECAY]}"}
    for key, value in sorted({"warmup_steps": None, **wanted}.items()):
        became = "default" if value is None else "mapped"
        if value is not None or "warmup_ratio" not in wanted:
            yield ImportRow(
                f"{start}{key}",
                warmup if value is None else value,
                became,
                text.get(key.split("_")[0], text["constant"]),
            )
    if "max_steps" not in wanted and not any(key.startswith("constant") for key in wanted):
        yield ImportRow(f"{start}max_steps", total, "default", text["constant"])
