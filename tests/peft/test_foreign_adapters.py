"""Adapters made by ``peft`` itself: read with the same logits, or refused by the name of what would be left out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.peft.test_against_peft import LENGTH, MODEL, VOCAB, _copy_base, _hf_model
from tests.ranks import RankPool

ATTENTION = ["q_proj", "v_proj"]
REGEX = r".*\.1\.(self_attn|mlp)\.(o_proj|down_proj)"
# What LoraConfig is made with, and what names the refusal; None where the adapter is read.
LORA: dict[str, tuple[dict[str, Any], str | None]] = {
    "plain": ({"target_modules": ATTENTION}, None),
    "all-linear": ({"target_modules": "all-linear"}, None),
    "a regular expression": ({"target_modules": REGEX}, None),
    "exclude_modules": ({"target_modules": "all-linear", "exclude_modules": ["k_proj"]}, None),
    "layers_to_transform": ({"target_modules": ATTENTION, "layers_to_transform": [1]}, None),
    "layers_pattern": ({"target_modules": ATTENTION, "layers_to_transform": 0, "layers_pattern": "layers"}, None),
    "rank_pattern": ({"target_modules": ATTENTION, "rank_pattern": {"v_proj": 2}, "use_rslora": True}, None),
    "use_dora": ({"target_modules": "all-linear", "use_dora": True, "rank_pattern": {"down_proj": 2}}, None),
    "fan_in_fan_out": ({"target_modules": ATTENTION, "fan_in_fan_out": True}, None),
    "gaussian": ({"target_modules": ATTENTION, "init_lora_weights": "gaussian"}, None),
    "orthogonal": ({"target_modules": ATTENTION, "init_lora_weights": "orthogonal"}, None),
    "no init": ({"target_modules": ATTENTION, "init_lora_weights": False, "lora_dropout": 0.1}, None),
    "alpha_pattern": ({"target_modules": ATTENTION, "alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
    "lora_bias": ({"target_modules": ATTENTION, "lora_bias": True}, "lora_bias"),
    "bias": ({"target_modules": ATTENTION, "bias": "all"}, "bias='all'"),
    "bias of the layers": ({"target_modules": ATTENTION, "bias": "lora_only"}, "bias='lora_only'"),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, "lora_embedding_"),
    "embedding alone": ({"target_modules": ["embed_tokens"]}, "lora_embedding_"),
    "output layer": ({"target_modules": ["lm_head", "q_proj"]}, "lm_head"),
    "modules_to_save": ({"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}, "modules_to_save"),
    "a norm": ({"target_modules": ATTENTION, "modules_to_save": ["input_layernorm"]}, "modules_to_save"),
    "tokens": ({"target_modules": ATTENTION, "trainable_token_indices": [1, 5]}, "trainable_token_indices"),
    "parameters": ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_parameters"),
    "pissa": ({"target_modules": ATTENTION, "init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "pissa_niter_4": ({"target_modules": ATTENTION, "init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    "olora": ({"target_modules": ATTENTION, "init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    "mica": ({"target_modules": ATTENTION, "init_lora_weights": "mica"}, "init_lora_weights='mica'"),
    "layer_replication": ({"target_modules": ATTENTION, "layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "alora": ({"target_modules": ATTENTION, "alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens"),
}
OTHERS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, None),
    "ia3 at outputs": ("IA3Config", {"target_modules": ["o_proj", "up_proj"], "feedforward_modules": []}, None),
    "ia3 at an input": ("IA3Config", {"target_modules": ["q_proj"], "feedforward_modules": ["q_proj"]}, "q_proj"),
    "ia3 behind down_proj": ("IA3Config", {"target_modules": ["down_proj"], "feedforward_modules": []}, "down_proj"),
    "ia3 and more": (
        "IA3Config",
        {"target_modules": ["k_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head"]},
        "modules_to_save",
    ),
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 4}, None),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 4}, "P_TUNING"),
    "prefix tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 4}, "PREFIX_TUNING"),
    "AdaLoRA": ("AdaLoraConfig", {"target_modules": ATTENTION, "total_step": 10}, "ADALORA"),
    "LoHa": ("LoHaConfig", {"target_modules": ATTENTION}, "LOHA"),
    "LoKr": ("LoKrConfig", {"target_modules": ATTENTION}, "LOKR"),
    "OFT": ("OFTConfig", {"target_modules": ATTENTION}, "OFT"),
    "VeRA": ("VeraConfig", {"target_modules": ["q_proj"]}, "VERA"),
    "norms": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}, "LN_TUNING"),
    "trained tokens": ("TrainableTokensConfig", {"token_indices": [1]}, "TRAINABLE_TOKENS"),
}
CASES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    **{name: ("LoraConfig", {"r": 4, "lora_alpha": 8, **keys}, refused) for name, (keys, refused) in LORA.items()},
    **OTHERS,
}
# Keys of LoraConfig set by hand in the file, since making such an adapter needs data, a GPU or another library.
BY_HAND: dict[str, Any] = {
    "init_lora_weights": "corda",
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "monteclora_config": {"samples": 2},
    "velora_config": {"groups": 2},
    "kasa_config": {"beta": 0.1},
    "arrow_config": {"top_k": 2},
    "megatron_config": {"hidden_size": 64},
    "ensure_weight_tying": True,
    "a_key_of_tomorrow": 3,
}


def _make(config: Any, folder: str, **save: Any) -> None:
    """An adapter on the model of the sibling test, every trained value drawn at random."""
    import peft
    import torch

    torch.manual_seed(1)
    adapted = peft.get_peft_model(_hf_model(), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder, **save)


def _logits_of_peft(folder: str, ids: Any) -> Any:
    import peft
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(_hf_model(), folder).eval()(input_ids=ids).logits[:, -LENGTH:]


def _our_logits(folder: str, ids: Any) -> Any:
    """Through the keys that the folder gives, as `convert_checkpoint` and a run with ``peft.init_from`` have them."""
    import torch
    from megatron.core.utils import unwrap_model

    from nemo_llm.config.compose.load import compose
    from nemo_llm.models.build import build_model_chunks
    from nemo_llm.parallel.runtime import own_runtime
    from nemo_llm.peft.attach import attach_peft
    from nemo_llm.peft.hf_format import load_hf_adapter, section_of_folder

    section = section_of_folder(Path(folder))
    cfg = compose([*MODEL, f"peft={section['kind']}"])
    assert cfg.peft is not None
    cfg = replace(cfg, peft=replace(cfg.peft, **section))
    assert cfg.peft is not None
    with own_runtime(cfg.runtime_setting) as runtime, torch.no_grad():
        chunks = build_model_chunks(cfg.model_setting, runtime, VOCAB)
        _copy_base(_hf_model(), unwrap_model(chunks[0]))
        attach_peft(cfg.model_setting, chunks, runtime)
        load_hf_adapter(chunks, Path(folder), cfg.peft)
        virtual = -1 - torch.arange(cfg.peft.virtual_tokens).expand(len(ids), -1)
        whole = torch.cat((virtual, ids), 1)
        logits = chunks[0].eval()(whole, torch.arange(whole.shape[1]).expand(len(ids), -1), None)
    return logits[:, -LENGTH:, :VOCAB]


def outcomes(folder: str) -> dict[str, float | str]:
    """For each case the largest difference of logits, or the refusal."""
    import peft
    import torch

    from nemo_llm.errors import InputError

    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    found: dict[str, float | str] = {}
    for number, (name, (config, keys, _)) in enumerate(CASES.items()):
        at = f"{folder}/{number}"
        _make(getattr(peft, config)(task_type="CAUSAL_LM", **keys), at)
        try:
            ours = _our_logits(at, ids)
        except InputError as error:
            found[name] = str(error)
            continue
        found[name] = float((ours - _logits_of_peft(at, ids)).abs().max())
    return found


def test_every_kind_is_read_as_peft_reads_it_or_refused(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(outcomes, 1, str(tmp_path))[0]
    wrong = {}
    for name, (_, _, refused) in CASES.items():
        outcome = found[name]
        if refused is None:
            fits = isinstance(outcome, float) and outcome < 1e-5
        else:
            fits = isinstance(outcome, str) and refused in outcome and "fix:" in outcome
        if not fits:
            wrong[name] = outcome
    assert not wrong


def changed_folders(folder: str) -> dict[str, str]:
    """Refusals of one plain adapter with one thing changed in its files, and of tensors and layers left over."""
    import peft
    import torch
    from safetensors.torch import load_file, save_file

    from nemo_llm.errors import InputError

    ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    plain = peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, task_type="CAUSAL_LM")
    found: dict[str, str] = {}

    def outcome(at: str) -> str:
        try:
            _our_logits(at, ids)
        except InputError as error:
            return str(error)
        return "read"

    _make(plain, f"{folder}/embeddings", save_embedding_layers=True)
    found["save_embedding_layers"] = outcome(f"{folder}/embeddings")
    at = Path(folder) / "plain"
    _make(plain, str(at))
    settings, weights = at / "adapter_config.json", at / "adapter_model.safetensors"
    config, tensors = json.loads(settings.read_text()), load_file(weights)
    for key, value in {**BY_HAND, "untouched": None}.items():
        settings.write_text(json.dumps({**config, key: value}))
        found[key] = outcome(str(at))
    settings.write_text(json.dumps(config))
    some = next(iter(tensors))
    for place, name in {
        "layer": some.replace("layers.0", "layers.7"),
        "module": some.replace("q_proj", "qkv_proj"),
        "leaf": some.replace("lora_A.weight", "lora_C.weight"),
    }.items():
        save_file({**tensors, name: tensors[some].clone()}, weights)
        found[place] = outcome(str(at))
    return found


def test_a_key_or_a_tensor_that_is_not_understood_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(changed_folders, 1, str(tmp_path))[0]
    assert found.pop("untouched") == "read"
    assert "embed_tokens" in found.pop("save_embedding_layers")
    for key in BY_HAND:
        assert f"{key}=" in found.pop(key)
    assert "layers.7" in found.pop("layer")
    assert "qkv_proj" in found.pop("module")
    assert "lora_C" in found.pop("leaf")
    assert not found


def test_keys_of_peft_are_known_or_unset_by_default() -> None:
    """A key of a later peft whose default is not "unset" would refuse every adapter."""
    import peft

    from nemo_llm.peft.hf_format import _UNDERSTOOD, _VALUES, _WITHOUT_EFFECT

    for kind, config in {
        "LORA": peft.LoraConfig,
        "IA3": peft.IA3Config,
        "PROMPT_TUNING": peft.PromptTuningConfig,
    }.items():
        known = f"{_WITHOUT_EFFECT} {_UNDERSTOOD[kind]}".split()
        for key, value in config().to_dict().items():
            unset = value is None or value is False or value in ("", [], {})
            assert key in known or unset or value in _VALUES[key], (kind, key, value)


def other_scale(folder: str) -> str:
    """The refusal of a run whose scale is not that of the adapter that it starts from."""
    import peft

    from nemo_llm.config.compose.load import compose
    from nemo_llm.errors import InputError
    from nemo_llm.models.build import build_model_chunks
    from nemo_llm.parallel.runtime import own_runtime
    from nemo_llm.training.setup import freeze_and_adapt

    _make(peft.LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, task_type="CAUSAL_LM"), folder)
    keys = ["peft=lora", "peft.rank=4", "peft.target_modules=[linear_q, linear_v]", f"peft.init_from={folder}"]
    cfg = compose([*MODEL, *keys])
    with own_runtime(cfg.runtime_setting) as runtime, pytest.raises(InputError) as caught:
        freeze_and_adapt(cfg, build_model_chunks(cfg.model_setting, runtime, VOCAB), runtime)
    cfg = compose([*MODEL, *keys, "peft.alpha=6"])
    with own_runtime(cfg.runtime_setting) as runtime:
        freeze_and_adapt(cfg, build_model_chunks(cfg.model_setting, runtime, VOCAB), runtime)
    return str(caught.value)


def test_a_run_with_another_scale_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    assert "set peft.alpha=6 and peft.use_rslora=false" in ranks.run(other_scale, 1, str(tmp_path / "adapter"))[0]
