"""Everything that is to be measured of one model, and the results in a form that tables and files take."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_llm.config.commands.evaluate import ClassificationConfig, EvaluateConfig
from nemo_llm.corpus.documents import expand_inputs, read_documents
from nemo_llm.data.sources.labelled_texts import is_held_out
from nemo_llm.errors import ConfigError, Problem
from nemo_llm.evaluation.classification import (
    Comparison,
    TemplateResult,
    classify,
    classify_by_head,
    compare_templates,
    read_examples,
    split_shots,
)
from nemo_llm.evaluation.harness import TaskFile, find_task_files, run_tasks
from nemo_llm.evaluation.perplexity import PerplexityResult, measure_perplexity
from nemo_llm.evaluation.scorer import Scorer
from nemo_llm.evaluation.templates import Example, PromptTemplate, load_template


@dataclass(frozen=True)
class Suite:
    """What to measure, read and checked before any model is loaded."""

    cfg: EvaluateConfig
    texts: dict[str, list[str]]
    tasks: list[TaskFile]
    templates: list[PromptTemplate]
    shots: list[Example]
    examples: list[Example]
    labels: list[str]


@dataclass(frozen=True)
class ModelResult:
    """Figures of one checkpoint."""

    name: str
    checkpoint: str
    step: int | None
    perplexity: list[PerplexityResult] = field(default_factory=list)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    classification: list[TemplateResult] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)


def read_suite(cfg: EvaluateConfig) -> Suite:
    """Read every file that is named.

    Raises:
        ConfigError: nothing to measure.
        InputError: a file that is missing or cannot be used, with the line.
    """
    if cfg.texts is None and not cfg.tasks and cfg.classification is None:
        rule = "nothing to measure: texts, tasks and classification are all empty"
        raise ConfigError(
            [Problem("texts", None, rule, "add texts=FILE, tasks='{lambada: FILE}' or classification=...")]
        )
    texts = read_texts(cfg.texts, cfg.text_key, cfg.limit)
    tasks = find_task_files(cfg.tasks, cfg.task_shots)
    templates = [load_template(name) for name in cfg.prompt_templates] if cfg.classification is not None else []
    shots, examples, labels = _read_classification(cfg.classification, cfg) if cfg.classification else ([], [], [])
    return Suite(cfg, texts, tasks, templates, shots, examples, labels)


def read_texts(patterns: str | Sequence[str] | None, text_key: str, limit: int | None) -> dict[str, list[str]]:
    """Documents of each pattern (a file, a folder, a glob or ``asset:NAME``), the first ``limit`` of them.

    Raises:
        InputError: nothing there, or a record that cannot be read.
    """
    texts = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        documents = (doc.text for path in expand_inputs(pattern) for doc in read_documents(path, text_key))
        texts[pattern] = list(islice(documents, limit))
    return texts


def measure(suite: Suite, scorer: Scorer, name: str, checkpoint: Path, step: int | None) -> ModelResult:
    """Every figure of one model; a collective of all ranks where the scorer is one."""
    cfg = suite.cfg
    prefix = None
    if cfg.prefix_token is not None:
        prefix = scorer.tokenizer.token_id(cfg.prefix_token)
        if prefix is None:
            rule = "the tokenizer has no such token"
            raise ConfigError([Problem("prefix_token", cfg.prefix_token, rule, "name a token of its vocabulary")])
    perplexity = [
        measure_perplexity(scorer, text, documents, cfg.window, cfg.context, prefix)
        for text, documents in suite.texts.items()
    ]
    tasks = run_tasks(scorer, suite.tasks, cfg.limit, cfg.num_fewshot, prefix) if suite.tasks else {}
    if scorer.classes and cfg.classification is not None:
        classified = [classify_by_head(scorer, suite.examples, cfg.window)]
    else:
        data = (suite.examples, suite.shots, suite.labels)
        classified = [classify(scorer, template, *data) for template in suite.templates]
    comparisons = compare_templates(classified, [example.label for example in suite.examples])
    return ModelResult(name, str(checkpoint), step, perplexity, tasks, classified, comparisons)


def _read_classification(
    section: ClassificationConfig, cfg: EvaluateConfig
) -> tuple[list[Example], list[Example], list[str]]:
    keys = (section.text_key, section.label_key, section.label_words)
    examples = read_examples(section.file, *keys)
    if section.split is not None:
        examples = [example for example in examples if is_held_out(example.text, section.split)]
        if not examples:
            rule = f"leaves none of the texts of {section.file} for validation"
            raise ConfigError([Problem("classification.split", section.split, rule, "give more texts, or set null")])
    pool = read_examples(section.shots_file, *keys) if section.shots_file is not None else None
    words = section.label_words
    labels = list(words.values()) if words is not None else sorted({example.label for example in examples})
    if len(set(labels)) < 2:
        rule = f"{section.file} has one label ({labels[0]}): there is nothing to tell apart"
        raise ConfigError(
            [Problem("classification.label_key", section.label_key, rule, "name the field of the labels")]
        )
    shots, rest = split_shots(examples, section.num_fewshot, cfg.seed, pool)
    return shots, rest[: cfg.limit], labels
