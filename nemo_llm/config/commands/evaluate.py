"""Configuration of ``python -m nemo_llm.evaluate``."""

from dataclasses import dataclass

from nemo_llm.config.commands.generate import ModelPlace
from nemo_llm.config.sections.data import parse_split
from nemo_llm.config.sections.fields import NonEmptyStr, NonNegativeInt, PathStr, PositiveInt, Section


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationConfig(Section):
    """A file of texts and labels, classified by a head, or by the likelihood of the labels' words."""

    file: PathStr
    text_key: NonEmptyStr
    label_key: NonEmptyStr
    label_words: dict[str, NonEmptyStr] | None
    num_fewshot: NonNegativeInt
    shots_file: PathStr | None
    split: NonEmptyStr | None = None

    def __post_init__(self) -> None:
        if self.split is not None:
            parse_split(self.split)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(ModelPlace):
    """What to measure and of which checkpoints."""

    checkpoint: PathStr | list[PathStr]
    every_checkpoint: bool
    texts: PathStr | list[PathStr] | None
    text_key: NonEmptyStr
    window: PositiveInt | None
    context: PositiveInt
    tasks: dict[str, PathStr | list[PathStr]]
    task_shots: dict[str, PathStr]
    num_fewshot: NonNegativeInt | None
    classification: ClassificationConfig | None
    prompt_templates: list[PathStr]
    limit: PositiveInt | None
    prefix_token: NonEmptyStr | None
    batch_size: PositiveInt
    seed: NonNegativeInt
    output: PathStr | None
    report: PathStr | None
