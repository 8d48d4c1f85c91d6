"""Named prompt templates: Jinja files that turn an example, and others that were solved before it, into a prompt.

A template knows ``text``, all other fields of the record, ``labels`` (the words to choose from) and ``examples``
(solved ones, each with ``text`` and ``label``). What it renders loses the white space at its end; the answer follows
after a space. Templates come from elsewhere: they run in Jinja's sandbox, where attributes that lead to Python's
inside are refused.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined

from nemo_llm.config.compose.catalog import conf_dir, nearest
from nemo_llm.conversation.sandbox import SandboxedTemplate, read_source, sandbox
from nemo_llm.errors import InputError

FOLDER = "prompts"


@dataclass(frozen=True)
class Example:
    """One record of a classification file: its text, the word of its label, all its fields."""

    text: str
    label: str
    fields: Mapping[str, Any]


class PromptTemplate(SandboxedTemplate):
    """A template with the name that tables show."""

    def __init__(self, name: str, source: str, place: str) -> None:
        self.name = name
        super().__init__(source, place, sandbox(undefined=StrictUndefined, keep_trailing_newline=True))

    def render(self, example: Example, shots: Sequence[Example], labels: Sequence[str]) -> str:
        """The prompt of one example, without white space at its end: labels are scored with a space before them.

        Raises:
            InputError: the template uses something that is not there or not allowed, with the template's line.
        """
        examples = [{**shot.fields, "text": shot.text, "label": shot.label} for shot in shots]
        values = {**example.fields, "text": example.text, "labels": list(labels), "examples": examples}
        values.pop("label", None)  # a template that shows the answer measures nothing
        return self.fill(values, self.origin).rstrip()


def load_template(name: str) -> PromptTemplate:
    """A shipped template by its name, or a ``.jinja`` file by its path.

    Raises:
        InputError: there is none; the message lists the shipped ones.
    """
    path = Path(name).expanduser()
    if path.suffix == ".jinja":
        if not path.is_file():
            raise InputError(f"prompt_templates: {name}: there is no such file")
        return PromptTemplate(path.stem, read_source(path), str(path))
    shipped = shipped_templates()
    if name not in shipped:
        guess = nearest(name, shipped)
        hint = f"did you mean {guess}? " if guess else ""
        raise InputError(
            f"prompt_templates: {name}: there is no such template.\n      fix: {hint}shipped are {', '.join(shipped)}; "
            "your own is named by its path, ending in .jinja"
        )
    return PromptTemplate(name, read_source(shipped[name]), str(shipped[name]))


def shipped_templates() -> dict[str, Path]:
    """Names and files of the templates that come with the package."""
    return {path.stem: path for path in sorted((conf_dir() / FOLDER).glob("*.jinja"))}


def choose_shots(pool: Sequence[Example], count: int, seed: int) -> list[Example]:
    """``count`` solved examples, the labels as even as possible, in a mixed order that the seed alone decides."""
    generator = random.Random(seed)
    by_label: dict[str, list[Example]] = {}
    for example in pool:
        by_label.setdefault(example.label, []).append(example)
    for examples in by_label.values():
        generator.shuffle(examples)
    queues = [by_label[label] for label in sorted(by_label)]
    chosen: list[Example] = []
    while len(chosen) < count and any(queues):
        chosen += [queue.pop() for queue in queues if queue][: count - len(chosen)]
    generator.shuffle(chosen)
    return chosen
