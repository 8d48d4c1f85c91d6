"""What indexing will do, written down before it starts: settings, inputs, and the shards that they are cut into."""

from dataclasses import asdict, dataclass

from nemo_llm.config.sections.data import TokenizerConfig
from nemo_llm.corpus.shards import Inputs, TextFormat, cut_inputs


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """All that decides the ids: two runs with equal settings and inputs write the same files."""

    tokenizer: TokenizerConfig
    text_key: str
    plain_text: str
    encoding: str
    append_eod: bool
    on_bad_record: str

    @property
    def text_format(self) -> TextFormat:
        """How documents stand in the input files."""
        return TextFormat(self.text_key, self.plain_text, self.encoding)


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """Settings, and the inputs with their shards in order."""

    fingerprint: str
    settings: IndexSettings
    inputs: Inputs

    def identity(self) -> dict:
        """Return what must agree for an interrupted run to go on, as plain values."""
        settings = asdict(self.settings)
        settings["tokenizer"] = self.fingerprint
        return {"format": 1, "settings": settings, "inputs": [list(entry) for entry in self.inputs.files]}


def make_plan(inputs: list[str], settings: IndexSettings, fingerprint: str) -> IndexPlan:
    """Return the plan for files, folders and globs; raises InputError for missing files or an encoding unknown here."""
    return IndexPlan(fingerprint, settings, cut_inputs(inputs, settings.text_format))
