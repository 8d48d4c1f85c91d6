"""Supervised fine-tuning: next-token prediction on the answers of conversations."""

from collections.abc import Iterator

from nemo_llm.config.sections.data import blend_entries
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import Problem
from nemo_llm.tasks.pretrain import Pretrain


class Sft(Pretrain):
    """As `Pretrain`, with conversations, whose masks say what counts, among the sources."""

    def check(self, sections: RunConfig) -> Iterator[Problem]:
        """The model has an output layer, and there are conversations."""
        yield from super().check(sections)
        if all(entry.kind != "chat" for entry in blend_entries(sections.data.blend, "data.blend")):
            fix = "add data=chat 'data.blend=[{name: mine, chat: FILE}]', or set task=pretrain"
            yield Problem("task.name", "sft", "no source of data.blend holds conversations", fix)
