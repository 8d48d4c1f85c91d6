"""The chat template that a run was tuned with: in checkpoints, in chats, in what is made of adapters, on resuming."""

import json
from pathlib import Path

import pytest

from tests.ranks import RankPool

TURN = [{"role": "user", "content": "Say so."}, {"role": "assistant", "content": "So."}]
LORA = ("peft=lora", "peft.target_modules=[linear_q,linear_v]", "peft.rank=2")
SAID = "<|im_start|>user\nSay so.<|im_end|>\n<|im_start|>assistant\n"


def one_step(folder: str, template: str, overrides: tuple[str, ...]) -> None:
    """Resume from what is there, train a step and save; adapters are exported besides."""
    from nemo_llm.checkpoint.folder import find_checkpoint
    from nemo_llm.config.compose.load import compose
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.peft.hf_format import export_adapter
    from nemo_llm.run.folder import to_plain, write_config
    from nemo_llm.training.checkpoint import load_checkpoint, save_checkpoint
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    cfg = compose(
        [
            "+model=gpt_tiny",
            "tokenizer=demo",
            "task=sft",
            "data=chat",
            f"data.blend=[{{name: c, chat: {folder}/chats.jsonl}}]",
            f"data.chat.template={template}",
            "data.split=null",
            "data.seq_length=64",
            f"data.cache_dir={folder}/cache",
            "trainer.global_batch_size=2",
            "trainer.micro_batch_size=1",
            "trainer.accelerator=cpu",
            *overrides,
        ]
    )
    run = build_training_run(cfg, start_runtime(cfg.runtime_setting))
    run.run_dir = Path(folder) / "run"
    if not run.run_dir.exists():
        run.run_dir.mkdir()
        write_config(run.run_dir, to_plain(cfg))
    elif (found := find_checkpoint(run.run_dir)) is not None:
        load_checkpoint(run, found)
    train_step(run)
    saved = save_checkpoint(run)
    if cfg.peft is not None:
        export_adapter(saved, Path(folder) / "exported", None)


def merge(folder: str) -> None:
    from nemo_llm.convert.peft_adapters import merge_checkpoint

    merge_checkpoint(Path(folder) / "run", Path(folder) / "merged")


def chats(folder: Path) -> Path:
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": TURN}) + "\n" for _ in range(4)))
    return folder


def said(tokenizer: Path) -> str:
    """A question as chat and generation write it with the tokenizer of a checkpoint."""
    from nemo_llm.conversation.prompts import load_chat_prompts
    from nemo_llm.tokenizers.tokenizer import load_tokenizer_from_folder

    loaded = load_tokenizer_from_folder(tokenizer)
    return loaded.decode(load_chat_prompts(loaded, None).encode(TURN[:1]))


def test_it_is_saved_used_and_exported_with_adapters(ranks: RankPool, tmp_path: Path) -> None:
    folder = chats(tmp_path)
    ranks.run(one_step, 1, str(folder), "chatml", LORA)
    ranks.run(merge, 1, str(folder))
    assert said(folder / "run" / "checkpoints" / "step_00000001" / "tokenizer") == SAID
    assert said(folder / "merged" / "tokenizer") == SAID
    kept = (folder / "merged" / "tokenizer" / "chat_template.jinja").read_text()
    assert (folder / "exported" / "chat_template.jinja").read_text() == kept


def test_a_run_does_not_go_on_with_another_one(ranks: RankPool, tmp_path: Path) -> None:
    folder = chats(tmp_path)
    template = folder / "mine.jinja"
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eod_token }}{% endfor %}"
    source += "{% if add_generation_prompt %}assistant: {% endif %}"
    template.write_text(source)
    ranks.run(one_step, 1, str(folder), str(template), ())
    saved = folder / "run" / "checkpoints" / "step_00000001" / "tokenizer"
    assert said(saved) == "user: Say so.<|endoftext|>assistant: "
    template.write_text(source.replace(": ", " - "))
    with pytest.raises(AssertionError, match=r"ConfigError(?s:.*)data\.chat\.template(?s:.*)chat_template\.jinja"):
        ranks.run(one_step, 1, str(folder), str(template), ())
    template.write_text(source)
    ranks.run(one_step, 1, str(folder), str(template), ())
