"""Record small runs with the code of earlier commits: ``python -m tests.golden.make_runs [NAME ...]``.

Each run is a folder ``runs/KIND_COMMIT``. The script checks COMMIT out beside this repository, trains there for three
steps with a checkpoint after the second, and keeps the inputs, the configuration, the metrics and the checkpoint, but
no logs. The third step is in the metrics alone: a resume today has to give the same numbers. runs/README.md has more.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path(__file__).resolve().parent / "runs"
MAX_FOLDER_BYTES = 300_000
MAX_BYTES = 3_000_000
KEPT = ("config.yaml", "metrics.jsonl", "checkpoints")

TINY = [
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.ffn_hidden_size=16",
    "model.num_attention_heads=2",
    "model.num_query_groups=1",
    "model.max_position_embeddings=64",
    "model.make_vocab_size_divisible_by=2",
]
THREE_STEPS = [
    "trainer.accelerator=cpu",
    "trainer.max_steps=3",
    "trainer.global_batch_size=2",
    "trainer.micro_batch_size=1",
    "trainer.log_interval=1",
    "trainer.val_interval=null",
    "optim.lr=1e-2",
    "optim.sched.warmup_steps=1",
    "optim.sched.decay_steps=4",
    "optim.sched.min_lr=1e-3",
    "checkpoint.save_interval=2",
    "checkpoint.save_final=false",
    "sample.enabled=false",
    "exp_manager.create_tensorboard_logger=false",
]
BYTES = ["tokenizer=byte"]
MOCK = ["data=mock", "data.seq_length=32", "data.split=null"]
CHATS = ["task=sft", "data=chat", "data.blend=[{name: mine, chat: chats.jsonl}]", "data.seq_length=128"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ': ' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """One run: the arguments of ``nemo_llm.train``, how many processes, and what writes its inputs into a folder."""

    arguments: list[str]
    processes: int = 1
    write_inputs: Callable[[Path], None] | None = None


def write_chats(folder: Path) -> None:
    """``chats.jsonl``: sums as conversations of two messages."""
    draw = random.Random(0)
    sums = [(draw.randrange(50), draw.randrange(50)) for _ in range(24)]
    lines = [
        {"messages": [{"role": "user", "content": f"{a}+{b}?"}, {"role": "assistant", "content": str(a + b)}]}
        for a, b in sums
    ]
    _write_lines(folder / "chats.jsonl", lines)


def write_chats_and_tokenizer(folder: Path) -> None:
    """``chats.jsonl``, and ``tokenizer/``: a tokenizer of bytes in Hugging Face's form, with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    write_chats(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def write_labelled(folder: Path) -> None:
    """``mails.jsonl``: texts of two labels."""
    draw = random.Random(1)
    words = {"ham": ["meeting", "lunch", "report"], "spam": ["prize", "win", "cash"]}
    labels = [draw.choice(list(words)) for _ in range(24)]
    lines = [{"text": " ".join(draw.choices(words[label], k=4)), "label": label} for label in labels]
    _write_lines(folder / "mails.jsonl", lines)


def write_text(folder: Path) -> None:
    """``text.jsonl``: documents of random words."""
    draw = random.Random(2)
    words = ["whale", "ship", "sea", "captain", "harpoon", "wind"]
    _write_lines(folder / "text.jsonl", [{"text": " ".join(draw.choices(words, k=30))} for _ in range(12)])


def _write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


RECIPES = {
    # Before and after heads for classes and scores.
    "sft_0d8d993": Recipe(
        ["+model=gpt_tiny", *TINY, *BYTES, *CHATS, "data.chat.template=chatml", *THREE_STEPS], 1, write_chats
    ),
    "classes_2a128c1": Recipe(
        [
            "+model=gpt_tiny",
            *TINY,
            *BYTES,
            "task=classification",
            "model.head=[ham,spam]",
            "data=labelled",
            "data.blend=[{name: mails, labelled: mails.jsonl}]",
            "data.seq_length=64",
            *THREE_STEPS,
        ],
        1,
        write_labelled,
    ),
    # Before and after Muon over any layout.
    "experts_2ba4b16": Recipe(
        [
            "+model=moe_tiny",
            *TINY,
            "model.hidden_size=8",
            "model.ffn_hidden_size=8",
            "model.moe.num_moe_experts=3",
            "model.moe.moe_ffn_hidden_size=8",
            *BYTES,
            *MOCK,
            *THREE_STEPS,
        ]
    ),
    "muon_03f665a": Recipe(
        ["+model=gpt_tiny", *TINY, *BYTES, *MOCK, "optim=muon", "precision=bf16", "parallelism=dp", *THREE_STEPS], 2
    ),
    # Before and after the faster step.
    "latent_2db3dea": Recipe(
        [
            "+model=deepseek_v2_lite",
            *TINY,
            "model.hidden_size=8",
            "model.num_query_groups=2",
            "model.vocab_size=null",
            "model.rope_scaling.original_max_position_embeddings=32",
            "model.mla={kv_lora_rank: 8, qk_head_dim: 8, qk_pos_emb_head_dim: 4, v_head_dim: 8}",
            "model.moe.num_moe_experts=2",
            "model.moe.moe_router_topk=1",
            "model.moe.moe_ffn_hidden_size=8",
            "model.moe.moe_shared_expert_intermediate_size=8",
            "precision=fp32",
            *BYTES,
            *MOCK,
            *THREE_STEPS,
        ]
    ),
    "bf16_4b2ce00": Recipe(
        [
            "+model=gpt_tiny",
            *TINY,
            *BYTES,
            "data=blend",
            "data.blend=[{name: mine, text: text.jsonl}]",
            "data.split=null",
            "data.seq_length=32",
            "precision=bf16",
            "parallelism=dp",
            *THREE_STEPS,
        ],
        2,
        write_text,
    ),
    # After FlexAttention for windows, document masks and capped scores; lora_96e171a was recorded before it.
    "windows_7a0a281": Recipe(
        [
            "+model=gemma2_2b",
            *TINY,
            "model.kv_channels=8",
            "model.embedding_multiplier=4.0",
            "model.vocab_size=null",
            "model.window_size=16",
            "precision=bf16",
            "tokenizer=demo",
            "data.tokenizer.path=tokenizer",
            *CHATS,
            *THREE_STEPS,
        ],
        1,
        write_chats_and_tokenizer,
    ),
}


def record(name: str, python: str) -> None:
    """Make ``runs/NAME`` by the code of the commit that it is named after."""
    if (RUNS / name).exists():
        raise SystemExit(f"{RUNS / name} is there already, and no run is recorded twice")
    recipe, commit = RECIPES[name], name.rpartition("_")[2]
    with tempfile.TemporaryDirectory() as temporary:
        source, work = Path(temporary) / "source", Path(temporary) / name
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(source), commit], check=True)
        try:
            work.mkdir()
            if recipe.write_inputs:
                recipe.write_inputs(work)
            _train(recipe, python, source, work)
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(source)], check=True)
        for path in (work / "run").iterdir():
            if path.name not in KEPT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        check_size(work, MAX_FOLDER_BYTES)
        shutil.copytree(work, RUNS / name)
    print(f"{RUNS / name}: {check_size(RUNS / name, MAX_FOLDER_BYTES):,} bytes")


def _train(recipe: Recipe, python: str, source: Path, work: Path) -> None:
    # By its short name: the first lines of config.yaml hold the command as it was given.
    command = ["python", "-m", "nemo_llm.train", *recipe.arguments, "run.dir=run"]
    if recipe.processes > 1:
        launcher = ["python", "-m", "torch.distributed.run", "--no-python", f"--nproc-per-node={recipe.processes}"]
        command = [*launcher, *command]
    environment = {
        **os.environ,
        "PATH": f"{Path(python).absolute().parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(source),
        "NEMO_LLM_CACHE": str(work.parent / "cache"),
    }
    subprocess.run(command, cwd=work, env=environment, check=True)


def check_size(folder: Path, limit: int) -> int:
    """Bytes of the files in ``folder``.

    Raises:
        ValueError: they are more than ``limit``.
    """
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > limit:
        raise ValueError(f"{folder} has {size:,} bytes, more than {limit:,}")
    return size


def main() -> None:
    """Record the runs that were named, or all that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--python", default=sys.executable, help="interpreter with the packages of the commits")
    options = parser.parse_args()
    for name in options.names or [name for name in RECIPES if not (RUNS / name).exists()]:
        record(name, options.python)
    check_size(RUNS, MAX_BYTES)


if __name__ == "__main__":
    main()
