"""Token ids that the model has no row for are refused before they reach it, wherever they come from."""

import json
from types import SimpleNamespace

import pytest
import torch

from nemo_llm.config.sections.sources import MockSource
from nemo_llm.data.build import build_train_and_validation
from nemo_llm.errors import InputError
from nemo_llm.tokenizers.tokenizer import Tokenizer
from nemo_llm.training.batches import DeviceBatches
from tests.data.test_chat import chat_config


def test_text_is_refused_at_start(data_config, demo_tokenizer: Tokenizer) -> None:
    words = r"source shakespeare: .*data\.bin holds token id 2\d\d\d, but the model knows 300; set model\.vocab_size to"
    with pytest.raises(InputError, match=words):
        build_train_and_validation(data_config(), demo_tokenizer, 1, vocab_size=300)
    build_train_and_validation(data_config(), demo_tokenizer, 1, vocab_size=demo_tokenizer.vocab_size)
    build_train_and_validation(data_config(), demo_tokenizer, 1, vocab_size=100_000)


def test_random_text_stays_within_the_model(data_config, demo_tokenizer: Tokenizer) -> None:
    mock = MockSource(name="m", num_documents=50, mean_document_length=30)
    config = data_config(blend=(mock,), split=None)
    sets = build_train_and_validation(config, demo_tokenizer, 1, vocab_size=300)
    assert max(sets.train[index].tokens.max() for index in range(10)) == 299


def test_a_conversation_is_refused_when_it_is_read(data_config, demo_tokenizer: Tokenizer, tmp_path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"prompt": "To be, or not to be?", "completion": "That is the question."}) + "\n")
    config = chat_config(data_config, str(path))
    source = build_train_and_validation(config, demo_tokenizer, 1, vocab_size=300).train
    runtime = SimpleNamespace(
        dp_rank=0,
        dp_size=1,
        cp_rank=0,
        device=torch.device("cpu"),
        parallelism=SimpleNamespace(context_parallel_size=1),
    )

    def batches(vocab_size: int | None) -> DeviceBatches:
        trainer = SimpleNamespace(micro_batch_size=1)
        return DeviceBatches(source, SimpleNamespace(trainer=trainer), runtime, 0, vocab_size)

    with pytest.raises(InputError, match=r"samples 2 to 3 hold token id \d+, but the model knows 300; set model"):
        batches(300).micro_batches(2, 2)
    largest = max(int(batch["tokens"].max()) for batch in batches(None).micro_batches(0, 2))
    assert largest >= 300
    assert len(batches(demo_tokenizer.vocab_size).micro_batches(0, 2)) == 2
