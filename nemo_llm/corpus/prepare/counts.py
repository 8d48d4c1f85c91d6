"""How many documents went into and came out of every step, from the counts that datatrove keeps for each task.

What one step gives must be what the next one takes: a difference means lost or repeated documents, and stops the work.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from nemo_llm.corpus.documents import check_bad_share
from nemo_llm.corpus.prepare.plan import PreparePlan, PrepareStage
from nemo_llm.errors import NemoLlmError

_NAMES = {
    "input files": "reading",
    "exact-deduplication stage 3": "exact deduplication",
    "MinHash stage 4": "near-duplicates (MinHash)",
    "N-grams decontaminate": "decontamination",
}


@dataclass(slots=True)
class StepCounts:
    """A step's counts over all tasks of its stage."""

    stage: str
    name: str
    totals: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def taken(self) -> int:
        """Documents that came in."""
        return self.totals["total"]

    @property
    def given(self) -> int:
        """Documents that went on."""
        return self.totals["forwarded"]

    def dropped(self) -> dict[str, int]:
        """Documents by the reason that they were dropped for, the most frequent first."""
        reasons = Counter(self.starting("dropped_"))
        rest = self.totals["dropped"] - sum(reasons.values())
        if rest:
            reasons["duplicate" if "exact" in self.name else "near-duplicate"] += rest
        return {reason: count for reason, count in reasons.most_common() if count}

    def starting(self, prefix: str) -> dict[str, int]:
        """Counts whose label starts with ``prefix``, by the rest of the label."""
        return {label.removeprefix(prefix): n for label, n in self.totals.items() if label.startswith(prefix)}


def read_counts(plan: PreparePlan, stage: PrepareStage) -> list[StepCounts]:
    """Return the counts of a finished stage's steps, in order."""
    steps: list[StepCounts] = []
    for rank in range(stage.tasks):
        path = plan.logs(stage.name) / "stats" / f"{rank:05d}.json"
        try:
            task = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise NemoLlmError(f"{path}: the counts of a finished task are missing ({error}); restart=true") from error
        steps = steps or [StepCounts(stage.name, _plain_name(entry["name"])) for entry in task]
        for step, entry in zip(steps, task, strict=True):
            for label, value in entry["stats"].items():
                step.totals[label] += int(_total(value))
            step.seconds += _total(entry["time_stats"])
    return steps


def check_stage(plan: PreparePlan, stage: PrepareStage, before: list[StepCounts]) -> list[StepCounts]:
    """Return the counts of a finished stage; ``before`` are those of earlier stages.

    Raises NemoLlmError where documents were lost or repeated, InputError for too many bad records.
    """
    steps = read_counts(plan, stage)
    written = {step.stage: step.taken for step in before if step.name == "documents"}
    source = {"exact_signatures": "filter", "exact_filter": "filter"}.get(stage.name)
    if source is None and written:
        source = list(written)[-1]
    if source is not None and steps[0].name == "earlier stage":
        _same(stage, f"stage {source} wrote", written[source], "were read", steps[0].taken)
    for first, second in pairwise(steps):
        _same(stage, f"{first.name} gave", first.given, f"{second.name} took", second.taken)
        _same(stage, f"{first.name} took", first.taken, "gave or dropped", first.given + first.totals["dropped"])
    if stage.name == "filter":
        check_bad_share(steps[0].dropped(), steps[0].given, plan.max_bad_fraction, _first_bad(plan))
    return steps


def _same(stage: PrepareStage, first: str, number: int, second: str, other: int) -> None:
    if number != other:
        raise NemoLlmError(
            f"stage {stage.name}: {first} {number:,} documents, but {other:,} {second}; something changed the files of "
            "the unfinished run: pass restart=true to begin anew"
        )


def _first_bad(plan: PreparePlan) -> Iterator[str]:
    for place in sorted((plan.result / "dropped" / "unreadable").glob("*.jsonl"))[:1]:
        example = json.loads(place.read_text(encoding="utf-8").partition("\n")[0])
        yield f"{example['source']}: {example['reason']}: {example['text']}"


def _plain_name(name: str) -> str:
    """``🔻 - FILTER: 🥇 Gopher Quality`` is ``Gopher Quality``."""
    plain = name.partition(": ")[2].encode("ascii", "ignore").decode().strip()
    return _NAMES.get(plain, plain)


def _total(value: object) -> float:
    """datatrove writes a count as a number where it is 0 or 1, and as a mapping otherwise."""
    return value["total"] if isinstance(value, dict) else value  # type: ignore[return-value]
