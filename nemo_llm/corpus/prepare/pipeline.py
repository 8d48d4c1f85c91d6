"""Which steps each stage consists of."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
from datatrove.pipeline.filters.c4_filters import C4QualityFilter
from datatrove.pipeline.filters.fineweb_quality_filter import FineWebQualityFilter
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter

from nemo_llm.corpus.prepare.decontamination import IndexEvaluationSets
from nemo_llm.corpus.prepare.plan import PreparePlan, common_folder
from nemo_llm.corpus.prepare.publish import Publish
from nemo_llm.corpus.prepare.steps import (
    BoundedSignature,
    Dropped,
    LengthFilter,
    LocalLanguageFilter,
    MaskPersonalData,
    ReadShards,
    ReadStage,
    WriteStage,
)


def text_of(document: Document) -> str:
    """What exact deduplication compares. (datatrove asks for this function's annotation.)"""
    return document.text


def build_steps(plan: PreparePlan, stage: str) -> list[PipelineStep]:
    """Return fresh steps of a stage, for one task."""
    match stage:
        case "evaluation_index":
            assert plan.rules.decontamination is not None
            folder = plan.folder("evaluation_index")
            return [
                IndexEvaluationSets(plan.rules.decontamination, plan.evaluation_files, folder, plan.rules.word_language)
            ]
        case "filter":
            return [_reader(plan), *_filters(plan), WriteStage(plan.folder("filtered"))]
        case "exact_signatures" | "exact_find" | "exact_filter":
            return _exact(plan, stage)
        case "minhash_signatures" | "minhash_buckets" | "minhash_clusters":
            return _minhash(plan, stage)
        case "finish":
            return _finish(plan)
        case "publish":
            return [Publish(plan)]
    raise AssertionError(stage)


def documents_before_finish(plan: PreparePlan) -> Path:
    """Folder of the documents that the last stage of documents reads, and MinHash too."""
    return plan.folder("unique" if plan.rules.exact_deduplication else "filtered")


def _reader(plan: PreparePlan) -> PipelineStep:
    bad = _dropped(plan, "unreadable", "unreadable")
    return ReadShards(plan.tasks, plan.text_format, common_folder(plan.inputs), plan.stop_at_bad, bad)


def _dropped(plan: PreparePlan, rule: str, reason: str) -> Any:
    return Dropped(plan.result / "dropped" / rule, reason, plan.save_dropped)


def _filters(plan: PreparePlan) -> list[PipelineStep]:
    rules, language = plan.rules, plan.rules.word_language
    steps: list[PipelineStep] = []
    if rules.length is not None:
        steps.append(LengthFilter(rules.length, _dropped(plan, "length", "length")))
    if rules.language is not None and plan.language_model is not None:
        steps.append(LocalLanguageFilter(rules.language, plan.language_model, _dropped(plan, "language", "language")))
    for name, rule, step, reason in (
        ("gopher_repetition", rules.gopher_repetition, GopherRepetitionFilter, "repetition"),
        ("gopher_quality", rules.gopher_quality, GopherQualityFilter, "quality"),
        ("c4", rules.c4, C4QualityFilter, "c4"),
        ("fineweb", rules.fineweb, FineWebQualityFilter, "fineweb"),
    ):
        if rule is not None:
            writer = _dropped(plan, name, reason)
            steps.append(step(**asdict(rule), exclusion_writer=writer, language=language))
    if rules.decontamination is not None and rules.decontamination.sets:
        writer = _dropped(plan, "decontamination", "contaminated")
        config = NGramsDecontConfig(n_grams=rules.decontamination.n_grams)
        steps.append(NGramsDecontFilter(str(plan.folder("evaluation_index")), config, writer, language))
    return steps


def _exact(plan: PreparePlan, stage: str) -> list[PipelineStep]:
    config = ExactDedupConfig(content_getter=text_of)
    reader = ReadStage(plan.folder("filtered"))
    signatures, duplicates = plan.folder("exact_signatures"), plan.folder("exact_duplicates")
    if stage == "exact_signatures":
        return [reader, ExactDedupSignature(str(signatures), config, plan.finders)]
    os.makedirs(duplicates, exist_ok=True)  # datatrove makes it with the first duplicate, and later lists it
    if stage == "exact_find":
        return [ExactFindDedups(str(signatures), str(duplicates), config, lines_to_buffer=1000)]
    writer = _dropped(plan, "exact_deduplication", "duplicate")
    return [reader, ExactDedupFilter(str(duplicates), config, writer), WriteStage(plan.folder("unique"))]


def _minhash(plan: PreparePlan, stage: str) -> list[PipelineStep]:
    assert plan.rules.minhash is not None
    config = MinhashConfig(**asdict(plan.rules.minhash))
    signatures, pairs = plan.folder("minhash_signatures"), plan.folder("minhash_pairs")
    if stage == "minhash_signatures":
        signer = BoundedSignature(str(signatures), config, plan.rules.word_language)
        return [ReadStage(documents_before_finish(plan)), signer]
    if stage == "minhash_buckets":
        return [MinhashDedupBuckets(str(signatures), str(pairs), config=config, lines_to_buffer=1000)]
    return [MinhashDedupCluster(str(pairs), str(plan.folder("minhash_removals")), config, lines_to_buffer=1000)]


def _finish(plan: PreparePlan) -> list[PipelineStep]:
    steps: list[PipelineStep] = [ReadStage(documents_before_finish(plan))]
    if plan.rules.minhash is not None:
        writer = _dropped(plan, "minhash", "near-duplicate")
        steps.append(MinhashDedupFilter(str(plan.folder("minhash_removals")), writer))
    if plan.rules.masks is not None:
        steps.append(MaskPersonalData(plan.rules.masks))
    return [*steps, WriteStage(plan.result / "documents", plan.compression)]
