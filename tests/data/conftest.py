"""What the data tests share: tokenizer and data configurations, and an environment of their own for the cache."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_llm.config.sections.chat import ChatConfig
from nemo_llm.config.sections.data import BlendSource, DataConfig, TokenizerConfig
from nemo_llm.tokenizers.tiktoken_encoder import build_fast_bpe
from nemo_llm.tokenizers.tokenizer import Tokenizer, load_tokenizer


def tokenizer_config(**changes: object) -> TokenizerConfig:
    """The demo tokenizer's configuration with some keys changed."""
    keys: dict = {
        "name": "demo",
        "type": "huggingface",
        "path": "asset:demo",
        "eod_token": None,
        "bos_token": None,
        "parse_special_tokens": False,
        "tiktoken_pattern": None,
        "nemo_class": None,
        "nemo_args": {},
    }
    return TokenizerConfig(**(keys | changes))


CHAT = ChatConfig(
    template="chatml", train_on="answers", too_long="drop", system_prompt=None, prompt_key=None, answer_key=None
)


@pytest.fixture(scope="session")
def demo_tokenizer() -> Tokenizer:
    return load_tokenizer(tokenizer_config())


@pytest.fixture(scope="session")
def proof_cache(demo_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the demo tokenizer's proof, which takes seconds."""
    pytest.importorskip("tiktoken")
    cache = tmp_path_factory.mktemp("proof")
    build_fast_bpe(demo_tokenizer, cache)
    return cache


@pytest.fixture
def data_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """Build a ``DataConfig`` on the shipped texts, with some keys changed and its cache in the test's folder."""

    def build(**changes: object) -> DataConfig:
        keys: dict = {
            "name": "test",
            "tokenizer": tokenizer_config(),
            "blend": (
                BlendSource(name="shakespeare", weight=0.75, text="asset:shakespeare"),
                BlendSource(name="moby_dick", weight=0.25, text="asset:moby_dick"),
            ),
            "validation": {},
            "split": "95,5",
            "seq_length": 64,
            "blend_by": "samples",
            "blend_temperature": 1.0,
            "blend_changes": (),
            "packing": "concatenate",
            "fim": None,
            "seq_length_ramp": None,
            "reset_position_ids": False,
            "reset_attention_mask": False,
            "eod_mask_loss": False,
            "text_key": "text",
            "cache_dir": str(tmp_path / "cache"),
            "prefetch": 2,
            "chat": CHAT,
        }
        return DataConfig(**(keys | changes))

    return build
