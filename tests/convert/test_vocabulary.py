"""A vocabulary that grows: rows, tokenizer, training on, and the way out to Hugging Face."""

from pathlib import Path
from typing import Any

from tests.evaluation.world import import_model, make_hf_model
from tests.ranks import RankPool

TOKENS = ["harpooneer", "zzyzx", "<unheard-of>"]
TEXT = "The harpooneer zzyzx saw <unheard-of> whales."


def extend(folder: str) -> dict[str, Any]:
    """Both checkpoints' rows, and logits of a text without new tokens; one process."""
    import torch

    from nemo_llm.checkpoint.inspect import read_tensors
    from nemo_llm.checkpoint.saved_run import SavedRun
    from nemo_llm.checkpoint.weights import load_weights
    from nemo_llm.convert.logit_check import float32_model, saved_model
    from nemo_llm.convert.vocabulary import extend_vocabulary
    from nemo_llm.tokenizers.tokenizer import load_tokenizer_from_folder

    size = extend_vocabulary(Path(folder) / "ours", Path(folder) / "more", TOKENS, "pieces", special=False)
    found: dict[str, Any] = {"size": size}
    names = ["embedding.word_embeddings.weight", "output_layer.weight"]
    for name in ("ours", "more"):
        place = Path(folder) / name
        found[name] = dict(read_tensors(place, names))
        tokenizer = load_tokenizer_from_folder(place / "tokenizer")
        found[f"{name} ids"] = tokenizer.encode(TEXT)
        with float32_model(saved_model(SavedRun.at(place))) as chunk, torch.no_grad():
            load_weights([chunk], place)
            ids = torch.tensor([tokenizer.encode("The old ship is at sea.")])
            found[f"{name} logits"] = chunk(ids, torch.arange(ids.shape[1])[None], None)[0, :, :2048]
    return found


def extend_by_control_token(folder: str) -> tuple[bool, float]:
    """Whether ordinary text gives the control token, and how far its row is from the mean of all; one process."""
    from nemo_llm.checkpoint.inspect import read_tensors
    from nemo_llm.convert.vocabulary import extend_vocabulary
    from nemo_llm.tokenizers.tokenizer import load_tokenizer_from_folder

    extend_vocabulary(Path(folder) / "ours", Path(folder) / "control", ["<|tool|>"], "mean", special=True)
    tokenizer = load_tokenizer_from_folder(Path(folder) / "control" / "tokenizer")
    ((_, rows),) = read_tensors(Path(folder) / "control", ["output_layer.weight"])
    assert tokenizer.token_id("<|tool|>") == 2048
    return 2048 in tokenizer.encode("a <|tool|> b"), float((rows[2048] - rows[:2048].mean(0)).abs().max())


def train_on(folder: str) -> tuple[float, float]:
    """Training goes on from it, on two ranks that share the vocabulary: first and last loss."""
    from nemo_llm.config.compose.load import compose
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.resume import resume
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    cfg = compose(
        [
            "+model=from_checkpoint",
            f"model.checkpoint_path={folder}/more",
            "precision=fp32",
            "trainer.accelerator=cpu",
            f"data.blend=[{{name: t, text: {folder}/text.txt}}]",
            "data.split=null",
            "data.seq_length=64",
            f"data.cache_dir={folder}/cache",
            "trainer.global_batch_size=2",
            "parallelism.tensor_model_parallel_size=2",
            "optim.lr=3e-3",
            "optim.sched.warmup_steps=0",
        ]
    )
    run = build_training_run(cfg, start_runtime(cfg.runtime_setting))
    resume(run)
    losses = [train_step(run).loss for _ in range(4)]
    return losses[0], losses[-1]


def adapt(folder: str) -> list[str]:
    """Log lines of a run with LoRA on the checkpoint before and the one after it grew."""
    import logging

    from nemo_llm.config.compose.load import compose
    from nemo_llm.models.build import build_model_chunks
    from nemo_llm.parallel.runtime import own_runtime
    from nemo_llm.training import setup

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    setup._log.addHandler(handler)
    for name in ("ours", "more"):
        place = f"{folder}/{name}"
        cfg = compose(
            [
                *("+model=from_checkpoint", f"model.checkpoint_path={place}", "precision=fp32"),
                *("trainer.accelerator=cpu", "data=mock", "peft=lora", "peft.rank=2", f"checkpoint.init_from={place}"),
            ]
        )
        with own_runtime(cfg.runtime_setting) as runtime:
            setup.freeze_and_adapt(
                cfg, build_model_chunks(cfg.model_setting, runtime, cfg.model.vocab_size or 0), runtime
            )
    setup._log.removeHandler(handler)
    return [line for line in lines if "new" in line]


def export(folder: str) -> None:
    """To a folder of Hugging Face's; the conversion compares logits itself."""
    from nemo_llm.config.commands.convert import ConvertConfig
    from nemo_llm.config.commands.data import compose_tool
    from nemo_llm.convert.convert import convert

    keys = ["source_format=nemo_llm", "target_format=hf", f"input={folder}/more", f"output={folder}/out"]
    convert(compose_tool("convert_checkpoint", ConvertConfig, keys))


def test_a_vocabulary_grows(ranks: RankPool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_hf_model(tmp_path / "hf")
    ranks.run(import_model, 1, str(tmp_path))
    found = ranks.run(extend, 1, str(tmp_path))[0]
    assert found["size"] == 2048 + len(TOKENS)
    old = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for name, rows in found["ours"].items():
        more = found["more"][name]
        assert more.shape[0] == 2176, "padded to a multiple of 128"
        assert (more[:2048] == rows[:2048]).all()
        for number, token in enumerate(TOKENS):
            expected = rows[old.encode(token, add_special_tokens=False)].mean(0)
            assert (more[2048 + number] - expected).abs().max() < 1e-6, token
    assert (found["more logits"] - found["ours logits"]).abs().max() < 1e-5

    (tmp_path / "text.txt").write_text(f"{TEXT} " * 40)
    first, last = ranks.run(train_on, 2, str(tmp_path))[0]
    assert last < first - 0.5

    (line,) = ranks.run(adapt, 1, str(tmp_path))[0]
    assert "3 tokens are new there (harpooneer, zzyzx, <unheard-of>)" in line
    assert "frozen" in line

    ranks.run(export, 1, str(tmp_path))
    new = AutoTokenizer.from_pretrained(tmp_path / "out")
    old.add_tokens(TOKENS)
    assert new.encode(TEXT) == old.encode(TEXT) == found["more ids"] != found["ours ids"]
    assert new.decode(new.encode(TEXT)) == TEXT
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == len(new) == 2051


def test_tokens_that_cannot_be_added_and_control_tokens(ranks: RankPool, tmp_path: Path) -> None:
    from tools.extend_vocabulary import main

    make_hf_model(tmp_path / "hf")
    ranks.run(import_model, 1, str(tmp_path))
    (tmp_path / "known.txt").write_text("<|endoftext|>\n")
    assert main([f"{tmp_path}/ours", f"{tmp_path}/more", "--tokens", f"{tmp_path}/known.txt"]) == 2
    assert main([f"{tmp_path}/ours", f"{tmp_path}/more", "--tokens", f"{tmp_path}/none.txt"]) == 2
    assert not (tmp_path / "more").exists()
    in_text, distance = ranks.run(extend_by_control_token, 1, str(tmp_path))[0]
    assert not in_text
    assert distance < 1e-6
