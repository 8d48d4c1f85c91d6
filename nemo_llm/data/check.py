"""What ``trainer.check_only=true`` says of the data: sources are opened as a run opens them, where that is quick."""

import dataclasses
import os
import tempfile
from pathlib import Path

from nemo_llm.config.sections.data import DataConfig
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.data.build import open_data
from nemo_llm.data.sources.registry import source_kind
from nemo_llm.storage.build_cache import cache_folder
from nemo_llm.tokenizers.tokenizer import Tokenizer

_MOST_BYTES = 1 << 24  # 16 MiB of text take some seconds the first time, and nothing once they are in the cache


def describe_data(config: DataConfig, setting: ModelSetting, tokenizer: Tokenizer, num_train_samples: int) -> str:
    """A table of the sources, with the samples and epochs of a run of this length; or why they were not opened.

    Nothing is left behind where the cache cannot be written, as on a machine that is not the run's.

    Raises:
        ConfigError, InputError: what the run itself would refuse: too little text, another tokenizer, bad records.
    """
    unread = sum(source_kind(entry).unread_bytes() for blend in config.blends().values() for entry in blend)
    if unread > _MOST_BYTES:
        return (
            f"data: not opened by this check, which would have to read {unread / 2**20:,.0f} MiB of text, or of "
            "datasets without a manifest, first; text that tools/index_dataset.py has indexed is checked here"
        )
    with tempfile.TemporaryDirectory() as folder:
        if not _writable(cache_folder(config.cache_dir)):
            config = dataclasses.replace(config, cache_dir=folder)
        return open_data(config, setting, tokenizer).describe(num_train_samples)


def _writable(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)
