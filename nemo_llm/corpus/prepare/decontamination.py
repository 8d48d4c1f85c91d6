"""The index of evaluation sets that datatrove's n-gram filter reads.

datatrove 0.10.1's own indexer imports lighteval, whatever the texts come from. The files that its filter reads are
plain 64-bit hashes, made here by the same functions.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.text import ngrams, simplify_text
from datatrove.utils.word_tokenizers import load_word_tokenizer

from nemo_llm.config.commands.prepare import DecontaminationRule, EvaluationSet
from nemo_llm.corpus.documents import BadRecord, BadRecordError
from nemo_llm.corpus.shards import TextFormat, cut_inputs, read_shard
from nemo_llm.errors import InputError


class IndexEvaluationSets(PipelineStep):
    """Writes the hashes of every run of words in the evaluation sets; counts texts too short to be found."""

    type = "INDEX"
    name = "evaluation sets"

    def __init__(
        self, rule: DecontaminationRule, files: tuple[tuple[str, ...], ...], folder: Path, language: str
    ) -> None:
        super().__init__()
        self._rule, self._files, self._folder, self._language = rule, files, folder, language

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002 - datatrove's
        """Write one file for each set."""
        config = NGramsDecontConfig(n_grams=self._rule.n_grams)
        tokenizer = load_word_tokenizer(self._language)
        hashed = create_hash_func(config.hash_config)
        self._folder.mkdir(parents=True, exist_ok=True)
        for number, (found, files) in enumerate(zip(self._rule.sets, self._files, strict=True)):
            hashes: set[int] = set()
            for texts in _texts(found, files):
                runs = [
                    run
                    for text in texts
                    for run in ngrams(tokenizer.word_tokenize(simplify_text(text, config.norm_config)), config.n_grams)
                ]
                self.stat_update("total", f"items_{found.name}")
                if not runs:
                    self.stat_update(f"short_{found.name}")
                hashes.update(hashed(" ".join(run)) for run in runs)
            if not hashes:
                raise InputError(
                    f"evaluation set {found.name}: no text of it has {self._rule.n_grams} words, so that nothing would "
                    "be found; name its longer fields, or lower data_prep.decontamination.n_grams"
                )
            np.array(sorted(hashes), dtype=np.uint64).tofile(self._folder / f"{number:03d}-{found.name}.index.hashes")


def _texts(found: EvaluationSet, files: tuple[str, ...]) -> Iterator[list[str]]:
    """Yield of each record its fields, and all of them joined as a prompt with its answer would be."""
    text_format = TextFormat(found.fields[0], "line", "utf-8", found.fields[1:])
    for shard in cut_inputs(list(files), text_format).shards:
        for item in read_shard(shard, text_format):
            if isinstance(item, BadRecord):
                raise BadRecordError(item)
            values: list[Any] = [item.text, *(item.fields.get(name, "") for name in found.fields[1:])]
            texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
            texts = [text for text in texts if isinstance(text, str) and text]
            yield [*texts, " ".join(texts)] if len(texts) > 1 else texts
