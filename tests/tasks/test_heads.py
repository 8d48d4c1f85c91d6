"""Heads for classes and scores: against transformers, on every layout, with adapters, and measured by ``evaluate``."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_llm.config.checks import check
from nemo_llm.config.compose.load import compose
from nemo_llm.data.build import build_train_and_validation
from nemo_llm.data.sources.labelled_texts import place_of
from nemo_llm.errors import ConfigError, InputError
from nemo_llm.tokenizers.tokenizer import load_tokenizer
from tests.parity.layouts import DENSE
from tests.peft.test_against_peft import MODEL, _copy_base, _hf_model
from tests.ranks import RankPool

VOCAB, LENGTH, STEPS = 2048, 64, 3
CLASSES = ["calm", "loud", "odd"]
WORDS = ["river", "stone", "lamp", "seven", "quiet", "orange", "bridge", "copper", "window", "morning"]
LAYOUTS = [
    layout
    for layout in DENSE
    if layout.name in ("TP2 SP", "CP2 all-to-all", "PP2 VPP2", "TP2 SP PP2 distributed optimizer")
]


def texts() -> list[dict[str, Any]]:
    """Texts of different lengths; the class is in their last word."""
    return [
        {
            "text": " ".join([WORDS[(n + i) % 10] for i in range(n % 7 + 1)] + [f"is {CLASSES[n % 3]}"]) + f" {n}",
            "label": CLASSES[n % 3],
            "score": (n % 5) / 2,
        }
        for n in range(60)
    ]


def _keys(folder: str, *overrides: str) -> list[str]:
    model = [key for key in MODEL if not key.startswith(("tokenizer", "data.", "model.vocab_size"))]
    return [
        *model,
        f"model.vocab_size={VOCAB}",
        "model.num_layers=4",
        "tokenizer=demo",
        "data=labelled",
        f"data.blend=[{{name: t, labelled: {folder}/texts.jsonl}}]",
        f"data.seq_length={LENGTH}",
        f"data.cache_dir={folder}/cache",
        "trainer.global_batch_size=8",
        "optim.lr=1e-3",
        "optim.sched.warmup_steps=1",
        *overrides,
    ]


CLASSIFY = ("task=classification", f"model.head=[{','.join(CLASSES)}]")
SCORE = ("task=score", "model.head=[score]", "data.labelled.label_key=score")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("heads")
    (path / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in texts()))
    return path


def against_transformers(folder: str, task: tuple[str, ...]) -> tuple[float, float, float]:
    """Largest difference of logits of packed texts, losses of both; one process."""
    import torch
    from megatron.core.utils import unwrap_model
    from transformers import LlamaForSequenceClassification

    from nemo_llm.models.build import build_model_chunks
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.tasks import build_task
    from nemo_llm.training.batches import build_loaders

    cfg = compose(_keys(folder, *task, "model.num_layers=2"))
    runtime = start_runtime(cfg.runtime_setting)
    base = _hf_model(VOCAB)
    base.config.num_labels, base.config.pad_token_id = len(cfg.model.head or ()), 0
    theirs = LlamaForSequenceClassification(base.config).float().eval()
    theirs.model.load_state_dict(base.model.state_dict())
    torch.nn.init.normal_(theirs.score.weight)

    chunks = build_model_chunks(cfg.model_setting, runtime, VOCAB)
    chunk: Any = unwrap_model(chunks[0])
    with torch.no_grad():
        chunk.output_layer = torch.nn.Linear(1, 1)  # what the shared copying of weights fills
        chunk.output_layer.weight = torch.nn.Parameter(torch.empty(VOCAB, cfg.model.hidden_size))
        _copy_base(base, chunk)
        del chunk.output_layer
        chunk.score.weight.copy_(theirs.score.weight)

    if cfg.peft is not None:
        theirs = _with_lora(theirs, chunks, (cfg, runtime), folder)
    _, _, loader, _ = build_loaders(cfg, runtime)
    batch = loader.micro_batches(0, 8)[0]
    logits = chunk(batch["tokens"], batch["position_ids"], attention_mask=batch["document_ids"])
    output, to_sums = build_task(cfg.task).forward_step(iter([batch]), chunk)
    loss, count, _ = to_sums(output)
    differences, losses = [], []
    for row, column in batch["loss_mask"].nonzero().tolist():
        document = batch["document_ids"][row] == batch["document_ids"][row, column]
        start = int(document.nonzero()[0])
        label = batch["labels"][row, column]
        label = label if len(cfg.model.head or ()) == 1 else label.long()
        out = theirs(batch["tokens"][row, start : column + 1][None], labels=label[None])
        differences.append(float((out.logits[0] - logits[row, column]).abs().max()))
        losses.append(float(out.loss))
    assert len(losses) == int(count) > 8, "several texts share a sample"
    return max(differences), float(loss) / int(count), sum(losses) / len(losses)


def _with_lora(theirs: Any, chunks: list, built: tuple, folder: str) -> Any:
    """Both with peft's LoRA and head, every trained value drawn at random; ours through peft's files."""
    import peft
    import torch
    from safetensors.torch import load_file

    from nemo_llm.peft.adapter import KEY_PREFIX, adapter_state
    from nemo_llm.peft.attach import attach_peft
    from nemo_llm.peft.hf_format import WEIGHTS_FILE, load_hf_adapter, to_hf_weights

    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=linears, task_type="SEQ_CLS")
    adapted = peft.get_peft_model(theirs, settings)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(f"{folder}/peft")
    cfg, runtime = built
    attach_peft(cfg.model_setting, chunks, runtime)
    load_hf_adapter(chunks, Path(folder) / "peft", cfg.peft)
    state = {key.removeprefix(KEY_PREFIX): shard.data for key, shard in adapter_state(chunks).items()}
    again = to_hf_weights(state, {"kind": "lora"})
    saved = load_file(f"{folder}/peft/{WEIGHTS_FILE}")
    assert set(again) == set(saved)
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())
    return adapted.eval()


LORA = (*CLASSIFY, "peft=lora", "peft.rank=4", "peft.alpha=8")


@pytest.mark.parametrize("task", [CLASSIFY, SCORE, LORA], ids=["classes", "score", "classes with peft"])
def test_logits_and_losses_are_those_of_transformers(task: tuple[str, ...], ranks: RankPool, folder: Path) -> None:
    difference, ours, theirs = ranks.run(against_transformers, 1, str(folder), task)[0]
    assert difference < 1e-4
    assert ours == pytest.approx(theirs, abs=1e-4)


def train(folder: str, overrides: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
    """Loss and gradient norm of each step: classes with all weights, classes with LoRA, a score."""
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    runtime, rows = None, {}
    for name, task in (("classes", CLASSIFY), ("lora", (*CLASSIFY, "peft=lora", "peft.rank=4")), ("score", SCORE)):
        cfg = compose(_keys(folder, *task, *overrides))
        runtime = runtime or start_runtime(cfg.runtime_setting)
        run = build_training_run(cfg, runtime)
        rows[name] = [(result.loss, result.grad_norm) for result in (train_step(run) for _ in range(STEPS))]
    return rows


@pytest.fixture(scope="module")
def single(ranks: RankPool, folder: Path) -> dict[str, list]:
    return ranks.run(train, 1, str(folder), ())[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_equals_one_process(layout: Any, ranks: RankPool, folder: Path, single: dict[str, list]) -> None:
    for rows in ranks.run(train, layout.processes, str(folder), layout.overrides):
        for name, expected in single.items():
            for got, wanted in zip(rows[name], expected, strict=True):
                assert got == pytest.approx(wanted, rel=2e-5), name


def write_base(folder: str) -> str:
    """A checkpoint of a language model with random weights."""
    from tests.inference.world import save_random_model

    return save_random_model(folder, "gpt_tiny")


def train_head(folder: str, base: str) -> tuple[list[float], float]:
    """A head with LoRA on that model: losses of some steps, and of the last batch again from the checkpoint."""
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.run.folder import to_plain, write_config
    from nemo_llm.training.checkpoint import load_checkpoint, save_checkpoint
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import forward_backward, train_step

    cfg = compose(
        [
            "+model=from_checkpoint",
            f"model.checkpoint_path={base}",
            "data=labelled",
            f"data.blend=[{{name: t, labelled: {folder}/texts.jsonl}}]",
            "data.seq_length=64",
            f"data.cache_dir={folder}/cache",
            "peft=lora",
            "precision=fp32",
            "trainer.accelerator=cpu",
            "trainer.global_batch_size=8",
            "optim.lr=1e-2",
            "optim.sched.warmup_steps=1",
            *CLASSIFY,
        ]
    )
    runtime = start_runtime(cfg.runtime_setting)
    run = build_training_run(cfg, runtime)
    run.run_dir = Path(folder) / "run"
    run.run_dir.mkdir()
    write_config(run.run_dir, to_plain(cfg))
    losses = [train_step(run).loss for _ in range(12)]
    step = save_checkpoint(run)
    losses.append(forward_backward(run, run.loader.micro_batches(0, 8))[0].loss)
    again = build_training_run(cfg, runtime)
    load_checkpoint(again, step)
    return losses, forward_backward(again, again.loader.micro_batches(0, 8))[0].loss


def merge(folder: str) -> None:
    """The tool's work, in a rank that is up."""
    from nemo_llm.convert.peft_adapters import merge_checkpoint

    merge_checkpoint(Path(folder) / "run", Path(folder) / "merged")


def measure(folder: str, *overrides: str) -> None:
    """``python -m nemo_llm.evaluate`` on the texts that training did not see."""
    from nemo_llm.config.commands.data import compose_tool
    from nemo_llm.config.commands.evaluate import EvaluateConfig
    from nemo_llm.evaluate import main

    wanted = f"file: {folder}/texts.jsonl, text_key: text, label_key: label, label_words: null"
    keys = [f"checkpoint={folder}/merged", "accelerator=cpu", f"output={folder}/all.json", f"report={folder}/all.html"]
    wanted = f"classification={{{wanted}, num_fewshot: 0, shots_file: null, split: '80,20'}}"
    main(compose_tool("evaluate", EvaluateConfig, [*keys, wanted, *overrides]))


def test_from_a_language_model_to_figures(ranks: RankPool, folder: Path) -> None:
    """Trained, saved, loaded, merged, and measured on the texts kept back, on one process and on two."""
    (folder / "lm").mkdir()
    base = ranks.run(write_base, 1, str(folder / "lm"))[0]
    losses, resumed = ranks.run(train_head, 1, str(folder), base)[0]
    assert losses[-1] < 0.5 * losses[0]
    assert resumed == pytest.approx(losses[-1], rel=1e-6), "the head came back with the adapter"
    ranks.run(merge, 1, str(folder))

    ranks.run(measure, 1, str(folder))
    (result,) = json.loads((folder / "all.json").read_text())
    (part,) = result["classification"]
    held_out = [record for record in texts() if place_of(record["text"]) >= 0.8]
    assert part["template"] is None
    assert part["figures"]["num_examples"] == len(held_out) > 0
    right = [a == b["label"] for a, b in zip(part["predictions"], held_out, strict=True)]
    assert part["figures"]["accuracy"]["value"] == pytest.approx(sum(right) / len(right))
    assert sum(map(sum, part["figures"]["confusion"])) == len(held_out)
    assert "taken for" in (folder / "all.html").read_text(), "the picture of the confusion matrix"

    pipeline = ("parallelism.pipeline_model_parallel_size=2",)
    ranks.run(measure, 2, str(folder), *pipeline)
    (staged,) = json.loads((folder / "all.json").read_text())
    for one, two in zip(part["scores"], staged["classification"][0]["scores"], strict=True):
        assert two == pytest.approx(one, abs=1e-5)
    with pytest.raises(AssertionError, match="knows no tokens"):
        ranks.run(measure, 1, str(folder), f"texts={folder}/texts.jsonl")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a", "label": "quiet"}, "none of model.head"),
        ({"label": "calm"}, "no text in the field 'text'"),
        ({"text": "a"}, "no field 'label'"),
        ({"text": "", "label": "calm"}, "is empty"),
        ({"text": "word " * 99, "label": "calm"}, "data.seq_length"),
    ],
)
def test_bad_records_are_named_with_file_and_line(record: dict, message: str, tmp_path: Path) -> None:
    good = json.dumps({"text": "a", "label": "calm"})
    (tmp_path / "t.jsonl").write_text(f"{good}\n{json.dumps(record)}\n")
    keys = _keys(str(tmp_path), *CLASSIFY, "data.labelled.too_long=error")
    cfg = compose([key.replace("texts.jsonl", "t.jsonl") for key in keys])
    with pytest.raises(InputError, match=rf"t\.jsonl:2: .*{message}"):
        build_train_and_validation(cfg.data, load_tokenizer(cfg.data.tokenizer), 1, classes=cfg.model.head or ())


def test_equal_texts_stay_on_one_side(tmp_path: Path) -> None:
    """However often texts occur and in which order: what is kept back is the same."""
    rows = [{"text": f"text {n % 50}", "label": "calm"} for n in range(100)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = compose(_keys(str(tmp_path), *CLASSIFY, "data.packing=none"))
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    sets = build_train_and_validation(cfg.data, tokenizer, 1, classes=cfg.model.head or ())

    def seen(source: Any, count: int) -> set[str]:
        samples = (source[number] for number in range(count))
        return {tokenizer.decode(sample.tokens[: int(sample.loss_mask.argmax()) + 1].tolist()) for sample in samples}

    validation = sets.validation["split"]
    kept = seen(validation, len(validation))
    assert kept == {f"text {n}" for n in range(50) if place_of(f"text {n}") >= 0.8}
    assert seen(sets.train, 100 - len(validation)) == {f"text {n}" for n in range(50)} - kept
    assert 0 < len(kept) < 25


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("task=classification",), "model.head"),
        (("task=classification", "model.head=[one]"), "two or more"),
        (("task=score", "model.head=[one,two]"), "one name"),
        (("model.head=[one,two]",), "predicts tokens"),
        ((*CLASSIFY, "data=demo"), "of kind text, and task=classification learns from labelled"),
        ((*CLASSIFY, "sample.enabled=true"), "sample.enabled"),
    ],
)
def test_what_does_not_go_together(keys: tuple[str, ...], message: str, folder: Path) -> None:
    given = [key for key in _keys(str(folder)) if "data=demo" not in keys or not key.startswith("data")]
    with pytest.raises(ConfigError, match=message):
        check(compose([*given, *keys]), 1)
