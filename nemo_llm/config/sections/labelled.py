"""The ``data.labelled`` section: texts with a class or a score each."""

from dataclasses import dataclass
from typing import Literal

from nemo_llm.config.sections.fields import NonEmptyStr, Section


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledConfig(Section):
    """Read by blend sources of the form ``{name: ..., labelled: FILE}``; the text is in ``data.text_key``."""

    label_key: NonEmptyStr
    """The field of the label: a name in ``model.head``, or a number for ``task=score``."""
    too_long: Literal["truncate", "drop", "error"]
    """What happens to a text longer than ``data.seq_length`` tokens; counted in the cache's manifest."""
