"""The kinds of sources by name. A new kind is a file here and a dataclass in `nemo_llm.config.sections.sources`."""

from typing import Any

from nemo_llm.config.sections.sources import SourceSection
from nemo_llm.data.sources.chats import ChatKind
from nemo_llm.data.sources.indexed import IndexedKind
from nemo_llm.data.sources.kind import SourceKind
from nemo_llm.data.sources.labelled_texts import LabelledKind
from nemo_llm.data.sources.mock import MockKind
from nemo_llm.data.sources.raw_text import TextKind

KINDS: dict[str, type[SourceKind[Any]]] = {
    "indexed": IndexedKind,
    "text": TextKind,
    "chat": ChatKind,
    "labelled": LabelledKind,
    "mock": MockKind,
}


def source_kind(entry: SourceSection) -> SourceKind[Any]:
    """The source that an entry of a blend describes."""
    return KINDS[entry.kind](entry)
