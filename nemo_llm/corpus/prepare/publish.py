"""The last stage: check all counts, write the report, and move the result to its place by one rename."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

import nemo_llm
from nemo_llm.corpus.prepare.counts import StepCounts, check_stage
from nemo_llm.corpus.prepare.page import report_page
from nemo_llm.corpus.prepare.plan import PreparePlan
from nemo_llm.corpus.prepare.steps import EXAMPLES, task_file
from nemo_llm.errors import InputError
from nemo_llm.storage.atomic_files import UNFINISHED, write_json

MANIFEST = "manifest.json"


class Publish(PipelineStep):
    """Writes the report and publishes; the folder of the unfinished run keeps only its logs."""

    type = "PUBLISH"
    name = "result"

    def __init__(self, plan: PreparePlan) -> None:
        super().__init__()
        self._plan = plan

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002 - datatrove's
        """Publish, unless an earlier attempt has just done it."""
        plan = self._plan
        if published(plan) is not None:
            return
        steps: list[StepCounts] = []
        for stage in plan.stages()[:-1]:
            steps += check_stage(plan, stage, steps)
        plan.inputs.check_unchanged("prepared")
        report = _report(plan, steps)
        if not report["output"]["documents"]:
            raise InputError(f"no document is left: {_most_dropped(report)}; nothing is published. Loosen the rules")
        write_json(plan.result / "report.json", report)
        (plan.result / "report.html").write_text(report_page(report), encoding="utf-8")
        write_json(plan.result / MANIFEST, {"key": plan.key(), "identity": plan.identity()})
        for left_over in (plan.result / "documents").glob(f".*{UNFINISHED}*"):
            left_over.unlink()
        if plan.output.exists():
            plan.output.rename(plan.work / "replaced")
        plan.result.rename(plan.output)
        shutil.rmtree(plan.work / "stages", ignore_errors=True)


def published(plan: PreparePlan) -> dict[str, Any] | None:
    """Return the report of a result that was made by this very plan, else None."""
    try:
        if json.loads((plan.output / MANIFEST).read_text(encoding="utf-8"))["key"] != plan.key():
            return None
        report: dict[str, Any] = json.loads((plan.output / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError):
        return None
    return report


def _report(plan: PreparePlan, steps: list[StepCounts]) -> dict[str, Any]:
    reading = next(step for step in steps if step.name == "reading")
    written = next(step for step in reversed(steps) if step.name == "documents")
    moving = [step for step in steps if step.name != "earlier stage" and (step.given or step.totals["dropped"])]
    paths = [task_file(plan.result / "documents", rank, plan.compression) for rank in range(len(plan.tasks))]
    evaluation = next((step for step in steps if step.name == "evaluation sets"), None)
    masks = next((step for step in steps if step.name == "masks"), None)
    return {
        "format": 1,
        "made_by": f"nemo_llm {nemo_llm.__version__}",
        "input": {
            "files": len(plan.inputs.files),
            "bytes": sum(size for _, size, _ in plan.inputs.files),
            "records": reading.taken,
            "documents": reading.given,
            "characters": reading.totals["characters"],
        },
        "output": {
            "files": len(paths),
            "bytes": sum(path.stat().st_size for path in paths),
            "documents": written.taken,
            "characters": written.totals["characters"],
        },
        "steps": [_step(plan, step) for step in moving if step.name != "masks"],
        "masks": {}
        if masks is None
        else {"documents": masks.totals["documents with masks"], **masks.starting("mask_")},
        "evaluation_sets": {} if evaluation is None else _evaluation(evaluation, steps),
        "not_applied": _not_applied(plan),
        "lengths": {"before": _lengths(reading), "after": _lengths(written)},
        "rules": asdict(plan.rules),
    }


def _step(plan: PreparePlan, step: StepCounts) -> dict[str, Any]:
    folders = {
        "reading": "unreadable",
        "Gopher Repetition": "gopher_repetition",
        "Gopher Quality": "gopher_quality",
        "C4 Quality": "c4",
        "FineWeb Quality": "fineweb",
        "exact deduplication": "exact_deduplication",
        "near-duplicates (MinHash)": "minhash",
    }
    folder = plan.result / "dropped" / folders.get(step.name, step.name)
    lines = {label: count for label, count in step.starting("line-filter-").items() if count}
    return {
        "step": step.name,
        "in": step.taken,
        "out": step.given,
        "dropped": step.dropped(),
        "seconds": round(step.seconds, 3),
        "examples": _examples(folder),
        **({"lines_removed": lines} if lines else {}),
    }


def _examples(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Return a few dropped documents of each reason."""
    found: dict[str, list[dict[str, str]]] = {}
    for record in _records(folder):
        examples = found.setdefault(record["reason"], [])
        if len(examples) < EXAMPLES:
            examples.append({"source": record["source"], "text": record["text"][:400]})
    return found


def _records(folder: Path) -> Iterator[dict[str, str]]:
    for path in sorted(folder.glob("*.jsonl"))[:20]:  # with save_dropped there may be millions
        with path.open(encoding="utf-8") as stream:
            for _, line in zip(range(1000), stream, strict=False):
                yield json.loads(line)


def _evaluation(index: StepCounts, steps: list[StepCounts]) -> dict[str, dict[str, int]]:
    finding = next(step for step in steps if step.name == "decontamination")
    contaminated = {name.partition("-")[2]: count for name, count in finding.starting("contaminated_").items()}
    short = index.starting("short_")
    return {
        name: {"items": items, "too_short": short.get(name, 0), "documents_dropped": contaminated.get(name, 0)}
        for name, items in index.starting("items_").items()
    }


def _not_applied(plan: PreparePlan) -> list[str]:
    if plan.rules.language is None or plan.language_model is not None:
        return []
    return ["language: no model is at hand; set data_prep.language.model to a fastText file such as lid.176.ftz"]


def _lengths(step: StepCounts) -> dict[str, int]:
    """Documents by length: ``"64"`` counts those of 64 to 127 characters."""
    bins = {int(bits): count for bits, count in step.starting("length_").items()}
    return {str(1 << (bits - 1) if bits else 0): bins[bits] for bits in sorted(bins)}


def _most_dropped(report: dict[str, Any]) -> str:
    reasons: Counter[str] = Counter()
    for step in report["steps"]:
        for reason, count in step["dropped"].items():
            reasons[f"{step['step']}: {reason}"] += count
    return ", ".join(f"{count:,} x {reason}" for reason, count in reasons.most_common(3))
