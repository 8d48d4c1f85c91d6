"""Supervised fine-tuning: next-token prediction on the answers of conversations."""

from collections.abc import Iterator

from nemo_llm.config.data import blend_entries
from nemo_llm.config.run import RunConfig
from nemo_llm.errors import Problem
from nemo_llm.tasks.pretrain import Pretrain


class Sft(Pretrain):
    """As `Pretrain`; what counts is in the masks of the conversations, and other sources may be mixed in."""

    def check(self, sections: RunConfig) -> Iterator[Problem]:
        """There is an output layer, and there are conversations."""
        yield from super().check(sections)
        if all(entry.kind != "chat" for entry in blend_entries(sections.data.blend, "data.blend")):
            fix = "add data=chat 'data.blend=[{name: mine, chat: FILE}]', or set task=pretrain"
            yield Problem("task.name", "sft", "no source of data.blend holds conversations", fix)
