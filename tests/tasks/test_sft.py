"""Fine-tuning on conversations against trl's SFTTrainer: the loss of every step, on one process, TP2 and PP2."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.peft.test_against_peft import MODEL, _copy_base, _hf_model
from tests.ranks import RankPool

STEPS, BATCH, VOCAB, LENGTH, LR = 20, 4, 2048, 128, 1e-3
WORDS = ["river", "stone", "lamp", "seven", "quiet", "orange", "bridge", "copper", "window", "morning"]
LAYOUTS = {
    "one process": (1, ()),
    "TP2": (2, ("parallelism.tensor_model_parallel_size=2",)),
    "PP2": (2, ("parallelism.pipeline_model_parallel_size=2",)),
}


def records() -> list[dict[str, Any]]:
    """Conversations of one turn, of different lengths."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Say {WORDS[n % 10]} {n % 4 + 1} times."}],
            "completion": [{"role": "assistant", "content": " ".join([WORDS[n % 10]] * (n % 4 + 1)) + "."}],
        }
        for n in range(STEPS * BATCH)
    ]


def _config(folder: str, overrides: tuple[str, ...] = ()):
    from nemo_llm.config.compose.load import compose

    model = [key for key in MODEL if not key.startswith(("tokenizer", "data.", "model.vocab_size"))]
    return compose(
        [
            *model,
            f"model.vocab_size={VOCAB}",
            "tokenizer=demo",
            "task=sft",
            "data=chat",
            f"data.blend=[{{name: c, chat: {folder}/chats.jsonl}}]",
            "data.chat.template=chatml",
            "data.split=null",
            "data.packing=none",
            f"data.seq_length={LENGTH}",
            f"data.cache_dir={folder}/cache",
            f"checkpoint.init_from={folder}/base",
            f"trainer.global_batch_size={BATCH}",
            f"optim.lr={LR}",
            f"optim.sched.min_lr={LR}",
            "optim/sched=constant",
            "optim.sched.warmup_steps=0",
            "optim.adam_beta1=0.9",
            "optim.adam_beta2=0.999",
            "optim.adam_eps=1e-8",
            "optim.weight_decay=0.0",
            "optim.clip_grad=1.0",
            *overrides,
        ]
    )


def write_base(folder: str) -> None:
    """A small Hugging Face model as a checkpoint of ours."""
    from megatron.core.utils import unwrap_model

    from nemo_llm.checkpoint.folder import writing
    from nemo_llm.checkpoint.weights import save_weights
    from nemo_llm.models.build import build_model_chunks
    from nemo_llm.parallel.runtime import start_runtime

    cfg = _config(folder)
    chunks = build_model_chunks(cfg.model_setting, start_runtime(cfg.runtime_setting), VOCAB)
    _copy_base(_hf_model(VOCAB), unwrap_model(chunks[0]))
    with writing(Path(folder) / "base" / "step_00000000") as temporary:
        save_weights(chunks, temporary)


def our_losses(folder: str, overrides: tuple[str, ...]) -> tuple[list[float], list[int]]:
    """Loss of each step, and the number of each record in the order in which they came."""
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.resume import resume
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    cfg = _config(folder, overrides)
    run = build_training_run(cfg, start_runtime(cfg.runtime_setting))
    resume(run)
    losses = [train_step(run).loss for _ in range(STEPS)]
    source = run.data.train.sources[0]
    return losses, [source.documents_of(index)[0][0] for index in range(STEPS * BATCH)]


def trl_losses(order: list[int], folder: Path) -> list[float]:
    """The same records in the same order through trl."""
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from nemo_llm.assets import resolve_path
    from nemo_llm.conversation.template import NAMED_TEMPLATES

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    file = resolve_path("asset:demo", "tokenizers")
    file = file / "tokenizer.json" if file.is_dir() else file
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = NAMED_TEMPLATES["chatml"]
    torch.manual_seed(0)
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        adam_beta2=0.999,
        max_grad_norm=1.0,
        logging_steps=1,
        packing=False,
        completion_only_loss=True,
        max_length=LENGTH,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    every = records()
    data = Dataset.from_list([every[number] for number in order])
    trainer = InOrder(_hf_model(VOCAB).train(), arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def folder(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records and base model."""
    path = tmp_path_factory.mktemp("sft")
    (path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records()))
    ranks.run(write_base, 1, str(path))
    return path


@pytest.fixture(scope="module")
def expected(ranks: RankPool, folder: Path) -> list[float]:
    """Losses of trl."""
    _, order = ranks.run(our_losses, 1, str(folder), ())[0]
    return trl_losses(order, folder)


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_are_those_of_trl(name: str, ranks: RankPool, folder: Path, expected: list[float]) -> None:
    processes, overrides = LAYOUTS[name]
    losses, _ = ranks.run(our_losses, processes, str(folder), overrides)[0]
    assert len(expected) == STEPS
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[-1] < losses[0] - 1.0


def logged_rows(folder: str) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl`` of a run whose batch grows from four conversations to eight."""
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.run.metrics import read_metrics
    from nemo_llm.training.loop import train
    from nemo_llm.training.resume import resume
    from nemo_llm.training.setup import build_training_run

    cfg = _config(
        folder,
        (
            "trainer.global_batch_size=8",
            "trainer.rampup_batch_size={start_global_batch_size: 4, increment: 4, ramp_samples: 12}",
            "trainer.max_steps=6", "trainer.log_interval=1", "trainer.warmup_log_steps=1", "trainer.val_interval=null",
            "checkpoint.save_interval=null", "checkpoint.save_final=false", "exp_manager.enabled=false",
        ),
    )  # fmt: skip
    run = build_training_run(cfg, start_runtime(cfg.runtime_setting))
    resume(run)
    run.run_dir = Path(folder) / "logged"
    run.run_dir.mkdir()
    train(run)
    return read_metrics(run.run_dir)


def test_speed_counts_every_position_and_learned_tokens_apart(ranks: RankPool, folder: Path) -> None:
    rows = ranks.run(logged_rows, 1, str(folder))[0]
    samples = [4, 4, 4, 8, 8, 8]
    assert [row["consumed_samples"] for row in rows] == [sum(samples[: step + 1]) for step in range(6)]
    for row, count in zip(rows, samples, strict=True):
        assert row["tokens_per_second"] * row["step_time_seconds"] == pytest.approx(count * LENGTH)
        assert row["learned_tokens_per_second"] * row["step_time_seconds"] == pytest.approx(row["learned_tokens"])
        assert 0 < row["learned_tokens"] < count * LENGTH / 4
