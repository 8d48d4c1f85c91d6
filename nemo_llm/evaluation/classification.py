"""Classification: by a trained head, or by the label whose words the model finds likeliest after the prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from nemo_llm.corpus.records import find_record_files, read_all_records, text_of
from nemo_llm.data.sources.labelled_texts import text_ids
from nemo_llm.errors import ConfigError, InputError, Problem
from nemo_llm.evaluation.metrics import ClassificationFigures, classification_figures, holm_adjusted, mcnemar_p_value
from nemo_llm.evaluation.scorer import Scorer
from nemo_llm.evaluation.templates import Example, PromptTemplate, choose_shots
from nemo_llm.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class TemplateResult:
    """What one template gave: figures, and each example's prediction and log-likelihoods (or logits) by label."""

    template: str | None
    """None for a head, which reads the text alone."""
    figures: ClassificationFigures
    predictions: list[str]
    scores: list[dict[str, float]]


@dataclass(frozen=True)
class Comparison:
    """Two templates on the same examples: difference of accuracy (first minus second) and how sure it is.

    ``p_value`` is McNemar's exact one, adjusted for the number of comparisons (Holm).
    """

    first: str
    second: str
    difference: float
    p_value: float

    @property
    def significant(self) -> bool:
        return self.p_value < 0.05


def read_examples(pattern: str, text_key: str, label_key: str, words: Mapping[str, str] | None) -> list[Example]:
    """Examples of files of records: a path, a folder or a glob.

    Args:
        words: the word that stands for each label in the file; None takes the labels themselves.

    Raises:
        InputError: no such file or field, with the line.
        ConfigError: a label without a word.
    """
    examples = []
    for path, line, record in read_all_records(find_record_files(pattern)):
        try:
            text, label = text_of(record, text_key), text_of(record, label_key)
        except InputError as error:
            fix = "name the fields with classification.text_key and classification.label_key"
            raise InputError(f"{path}, line {line}: {error}\n      fix: {fix}") from None
        if words is not None and label not in words:
            rule = f"has no word for the label {label!r} ({path}, line {line})"
            raise ConfigError([Problem("classification.label_words", dict(words), rule, f"add {label}: WORD")])
        examples.append(Example(text, words[label] if words is not None else label, record))
    if not examples:
        raise InputError(f"{pattern}: holds no example")
    return examples


def classify(
    scorer: Scorer,
    template: PromptTemplate,
    examples: Sequence[Example],
    shots: Sequence[Example],
    labels: Sequence[str],
) -> TemplateResult:
    """Predict the label of every example: the largest sum of log-likelihoods of the label's tokens."""
    requests = []
    for example in examples:
        prompt = template.render(example, shots, labels)
        requests += [encode_pair(scorer.tokenizer, prompt, f" {label}") for label in labels]
    scored = iter(scorer.score(requests))
    scores = [dict(zip(labels, (value for value, _ in islice(scored, len(labels))), strict=True)) for _ in examples]
    predictions = [max(by_label, key=lambda label: by_label[label]) for by_label in scores]
    figures = classification_figures([example.label for example in examples], predictions, labels)
    return TemplateResult(template.name, figures, predictions, scores)


def classify_by_head(scorer: Scorer, examples: Sequence[Example], window: int | None) -> TemplateResult:
    """Predict the class of every example by the largest logit of the model's head.

    Raises:
        ConfigError: a head that gives a score, or labels that are none of its classes.
    """
    classes = scorer.classes
    problem = None
    if len(classes) == 1:
        fix = "read its error in the validation of the run that trained it"
        problem = Problem("classification", classes[0], "the model's head gives a score and no class", fix)
    elif unknown := sorted({example.label for example in examples} - set(classes)):
        fix = f"name the class of each label: classification.label_words={{{unknown[0]}: {classes[0]}, ...}}"
        problem = Problem(
            "classification.label_words", unknown, f"are no classes of the head ({', '.join(classes)})", fix
        )
    if problem is not None:
        raise ConfigError([problem])
    logits = scorer.classify([text_ids(example.text, scorer.tokenizer)[:window] for example in examples])
    scores = [dict(zip(classes, row, strict=True)) for row in logits]
    predictions = [max(by_class, key=lambda name: by_class[name]) for by_class in scores]
    figures = classification_figures([example.label for example in examples], predictions, classes)
    return TemplateResult(None, figures, predictions, scores)


def compare_templates(results: Sequence[TemplateResult], gold: Sequence[str]) -> list[Comparison]:
    """Every pair of templates, the more accurate one first."""
    ranked = sorted(results, key=lambda result: -result.figures.accuracy.value)
    right = {result.template: [a == b for a, b in zip(result.predictions, gold, strict=True)] for result in ranked}
    pairs = [(a, b) for place, a in enumerate(ranked) for b in ranked[place + 1 :]]
    p_values = holm_adjusted([mcnemar_p_value(right[a.template], right[b.template]) for a, b in pairs])
    return [
        Comparison(str(a.template), str(b.template), a.figures.accuracy.value - b.figures.accuracy.value, p_value)
        for (a, b), p_value in zip(pairs, p_values, strict=True)
    ]


def split_shots(
    examples: Sequence[Example], count: int, seed: int, pool: Sequence[Example] | None
) -> tuple[list[Example], list[Example]]:
    """(solved examples for the prompt, examples to measure on): never the same ones."""
    shots = choose_shots(examples if pool is None else pool, count, seed)
    taken = {id(example) for example in shots}
    return shots, [example for example in examples if id(example) not in taken]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows it, cut where the context's own ids end (as lm-eval does it)."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    before = [*start, *tokenizer.encode(context)]
    whole = [*start, *tokenizer.encode(context + continuation)]
    return (before, whole[len(before) :]) if before else ([tokenizer.eod_id], whole)


def figures_as_rows(figures: ClassificationFigures) -> list[tuple[str, str]]:
    """Name and value of each figure, for tables."""
    rows: list[tuple[str, str]] = [("examples", str(figures.num_examples))]
    for name in ("accuracy", "macro precision", "macro recall", "macro F1"):
        rows.append((name, str(getattr(figures, name.lower().replace(" ", "_")))))
    rows.append(("micro precision, recall, F1", f"{figures.micro_f1:.3f}"))
    rows += [
        (name, f"precision {part.precision:.3f}, recall {part.recall:.3f}, F1 {part.f1:.3f} ({part.support} examples)")
        for name, part in figures.classes.items()
    ]
    return rows
