"""The router's losses under loss masks and padding, against the objective written apart with transformers' function."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.parity.layouts import model_overrides
from tests.parity.run import largest_difference
from tests.ranks import RankPool

BALANCE, Z = 0.3, 0.05
LENGTH = 48
WORDS = ["river", "stone", "lamp", "seven", "quiet", "orange", "bridge", "copper", "window", "morning"]
SFT = (
    "task=sft",
    "data=chat",
    "data.blend=[{{name: c, chat: {folder}/chats.jsonl}}]",
    "data.chat.template=plain",
    "data.split=null",
)
TEXTS = ("data.blend=[{{name: t, text: {folder}/texts.jsonl}}]", "data.split=null")
# Few learned tokens in much padding; several conversations and padding; ends of documents; nothing masked.
FORMS: dict[str, tuple[str, ...]] = {
    "one conversation a sample": (*SFT, "data.packing=none"),
    "packed conversations, by sequence": (*SFT, "model.moe.moe_router_load_balancing_type=seq_aux_loss"),
    "ends of documents masked": (*TEXTS, "data.packing=best_fit", "data.eod_mask_loss=true"),
    "no mask, by sequence": (*TEXTS, "model.moe.moe_router_load_balancing_type=seq_aux_loss"),
    "no mask": TEXTS,
}
RECOMPUTED = ("recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1")
TP2, PP2 = ("tensor_model_parallel_size=2", "sequence_parallel=true"), ("pipeline_model_parallel_size=2",)
LAYOUTS = {
    "TP2 SP": (2, TP2),
    "EP2": (2, ("expert_model_parallel_size=2",)),
    "PP2": (2, PP2),
    "PP2, full recompute": (2, (*PP2, *RECOMPUTED)),
    "CP2": (2, ("context_parallel_size=2",)),
    "DP2": (2, ()),
    "TP2 SP PP2": (4, (*TP2, *PP2)),
}
SLOW = ("TP2 SP", "PP2")  # parts of others


def write_data(folder: Path) -> None:
    """Conversations and texts of many lengths; the same each time."""
    draw = random.Random(0)
    some = lambda count: " ".join(draw.choice(WORDS) for _ in range(count))  # noqa: E731
    chats = [{"instruction": some(draw.randrange(1, 8)), "output": some(draw.randrange(1, 5))} for _ in range(64)]
    texts = [{"text": some(draw.randrange(3, 9))} for _ in range(200)]
    for name, records in (("chats", chats), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _config(folder: str, form: str, *overrides: str) -> Any:
    from nemo_llm.config.compose.load import compose

    return compose(
        [
            *model_overrides("moe_tiny"),
            *(override.format(folder=folder) for override in FORMS[form]),
            "model.num_layers=2",
            "model.hidden_size=64",
            f"data.seq_length={LENGTH}",
            f"data.cache_dir={folder}/cache",
            "trainer.accelerator=cpu",
            "trainer.global_batch_size=4",
            "trainer.micro_batch_size=2",
            f"model.moe.moe_aux_loss_coeff={BALANCE}",
            f"model.moe.moe_z_loss_coeff={Z}",
            *overrides,
        ]
    )


def train(folder: str, layout: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
    """Loss and gradient norm of two steps, for each form; runs on every rank."""
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    runtime, rows = None, {}
    for form in FORMS:
        cfg = _config(folder, form, *(f"parallelism.{override}" for override in layout))
        runtime = runtime or start_runtime(cfg.runtime_setting)
        run = build_training_run(cfg, runtime)
        rows[form] = [(result.loss, result.grad_norm) for result in (train_step(run) for _ in range(2))]
    return rows


def reference(folder: str) -> dict[str, dict[str, float]]:
    """Loss and gradient norm of the first step by the objective itself, and how much of the batch is what."""
    import torch

    from nemo_llm.models.build import build_model_chunks
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.batches import build_loaders

    rows, runtime = {}, None
    for form in FORMS:
        # Without losses of its own, and with gradients as autograd gives them.
        cfg = _config(
            folder,
            form,
            "model.moe.moe_aux_loss_coeff=0.0",
            "model.moe.moe_z_loss_coeff=null",
            "performance.gradient_accumulation_fusion=false",
            "performance.fused_linear_cross_entropy=false",
        )
        runtime = runtime or start_runtime(cfg.runtime_setting)
        tokenizer, _, loader, _ = build_loaders(cfg, runtime)
        model = build_model_chunks(cfg.model_setting, runtime, tokenizer.vocab_size)[0].train()
        routed = _logits_of_routers(model)
        objective, loss, learned, filled = torch.zeros(()), 0.0, 0.0, 0
        for batch in loader.micro_batches(0, 4):
            routed.clear()
            losses = model(batch["tokens"], batch["position_ids"], batch.get("document_ids"), labels=batch["labels"])
            entropy, tokens = (losses * batch["loss_mask"]).sum(), batch["loss_mask"].sum()
            full = _filled(batch["loss_mask"])
            by_sequence = "by sequence" in form
            objective = objective + entropy + tokens * sum(_losses_of_router(x, full, by_sequence) for x in routed)
            loss, learned, filled = loss + float(entropy), learned + float(tokens), filled + int(full.sum())
        (objective / learned).backward()
        norm = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
        rows[form] = {"loss": loss / learned, "norm": norm, "learned": learned, "filled": filled}
    return rows


def _logits_of_routers(model: Any) -> list:
    """A list to which each router of this model adds the logits of what it is given, as part of the graph."""
    logits: list = []
    for layer in model.decoder.layers:
        layer.mlp.router.register_forward_pre_hook(lambda r, inputs: logits.append(inputs[0] @ r.weight.t()))
    return logits


def _filled(loss_mask: Any) -> Any:
    """[b, s]: which positions hold something. In each form the last token that a sample holds is a learned label."""
    import torch

    last = (loss_mask * torch.arange(1, LENGTH + 1)).amax(1, keepdim=True)
    return torch.arange(LENGTH) <= last


def _losses_of_router(logits: Any, filled: Any, by_sequence: bool) -> Any:
    """Both losses of a layer, of logits [s, b, experts]; transformers' balance is not divided by the top k."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = logits.shape[-1]
    rows = logits.transpose(0, 1)
    groups = zip(rows, filled, strict=True) if by_sequence else [(rows.flatten(0, 1), filled.flatten())]
    balances = [load_balancing_loss_func((x,), experts, 2, full.long()) / 2 for x, full in groups]
    z = torch.logsumexp(rows, -1)[filled].square().mean()
    return BALANCE * sum(balances) / len(balances) + Z * z


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The data; tokenised by the first who reads it."""
    path = tmp_path_factory.mktemp("router")
    write_data(path)
    return str(path)


@pytest.fixture(scope="module")
def single(ranks: RankPool, folder: str) -> dict[str, list]:
    return ranks.run(train, 1, folder, ())[0]


def test_one_process_takes_the_gradient_of_the_objective(ranks: RankPool, folder: str, single: dict) -> None:
    wanted = ranks.run(reference, 1, folder)[0]
    positions = 4 * LENGTH
    assert wanted["one conversation a sample"]["learned"] < positions / 5  # by which they were too strong
    assert wanted["ends of documents masked"]["filled"] < positions
    assert wanted["ends of documents masked"]["learned"] < wanted["ends of documents masked"]["filled"] - 4
    assert wanted["no mask"]["learned"] == wanted["no mask"]["filled"] == positions
    for form, row in wanted.items():
        assert single[form][0] == pytest.approx((row["loss"], row["norm"]), rel=1e-6), form


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS]
)
def test_every_layout_takes_the_same(layout: str, ranks: RankPool, folder: str, single: dict) -> None:
    processes, overrides = LAYOUTS[layout]
    for rank in ranks.run(train, processes, folder, overrides):
        for form in FORMS:
            assert max(largest_difference(single[form], rank[form])) < 1e-5, form


def loads(folder: str) -> list[tuple[float, int]]:
    """(tokens that a layer's bias counts for all experts, positions that hold something), for each layer."""
    from nemo_llm.models.build import build_model_chunks
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.batches import build_loaders

    bias = ("model.mcore_overrides={moe_router_enable_expert_bias:true}", "model.moe.moe_router_score_function=sigmoid")
    cfg = _config(folder, "one conversation a sample", *bias)
    runtime = start_runtime(cfg.runtime_setting)
    tokenizer, _, loader, _ = build_loaders(cfg, runtime)
    model = build_model_chunks(cfg.model_setting, runtime, tokenizer.vocab_size)[0].train()
    batch = loader.micro_batches(0, 2)[0]
    masks = {"loss_mask": batch["loss_mask"], "padding_mask": batch["padding"]}
    model(batch["tokens"], batch["position_ids"], batch.get("document_ids"), labels=batch["labels"], **masks)
    filled = int(_filled(batch["loss_mask"]).sum())
    return [(float(layer.mlp.router.local_tokens_per_expert.sum()), filled) for layer in model.decoder.layers]


def test_the_bias_of_experts_counts_no_padding(ranks: RankPool, folder: str) -> None:
    for counted, filled in ranks.run(loads, 1, folder)[0]:
        assert counted == 2 * filled < 2 * 2 * LENGTH
