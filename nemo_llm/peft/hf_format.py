"""Adapters to and from Hugging Face PEFT's folders (``adapter_config.json`` and ``adapter_model.safetensors``).

Families with the layer names of Llama (Llama, Mistral, Qwen, SmolLM, ...): separate ``q_proj`` and so on, dense MLPs.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nemo_llm.checkpoint.collective_errors import raise_together
from nemo_llm.checkpoint.inspect import read_tensors, tensors
from nemo_llm.checkpoint.saved_run import TEMPLATE_FILE_NAME, SavedRun
from nemo_llm.config.sections.peft import LoraConfig, PeftConfig
from nemo_llm.errors import CheckpointRefusedError, InputError
from nemo_llm.models.layers.classification_head import HEAD_PREFIX
from nemo_llm.peft.adapter import KEY_PREFIX, adapted_modules, heads
from nemo_llm.peft.state import read_description

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_MODULES = {
    "self_attention.linear_q": "self_attn.q_proj",
    "self_attention.linear_k": "self_attn.k_proj",
    "self_attention.linear_v": "self_attn.v_proj",
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.linear_gate": "mlp.gate_proj",
    "mlp.linear_up": "mlp.up_proj",
    "mlp.linear_fc2": "mlp.down_proj",
}
_LEAVES = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
    "ia3": "ia3_l",
}
_PREFIX = "base_model.model."
_HEAD = f"{HEAD_PREFIX}weight"  # by the same name on both sides
_PROMPT = "prompt.vectors"

_KINDS = {"LORA": "lora", "IA3": "ia3", "PROMPT_TUNING": "prompt_tuning"}
# Keys of adapter_config.json that are understood; any other that is set is refused. The first say nothing that the
# tensors do not say (which layers), or nothing about the numbers of a trained adapter.
_WITHOUT_EFFECT = (
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config "
    "target_modules exclude_modules layers_to_transform layers_pattern"
)
_UNDERSTOOD: Mapping[str, str] = {
    # eva_config to loftq_config belong to one init_lora_weights each, qalora_group_size to use_qalora, megatron_core to
    # megatron_config; peft itself decides fan_in_fan_out by the class of each layer.
    "LORA": "r rank_pattern lora_alpha lora_dropout use_rslora use_dora fan_in_fan_out eva_config corda_config "
    "lora_ga_config loftq_config qalora_group_size megatron_core",
    # The shape of each vector says whether feedforward_modules names its layer.
    "IA3": "fan_in_fan_out init_ia3_weights feedforward_modules",
    "PROMPT_TUNING": "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers "
    "prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs",
}
# Keys of which some values are understood.
_VALUES: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),  # the others change the frozen weights as well
    "modules_to_save": ("score", "classifier"),  # the head of a classifier
}
_MERGE = (
    "where peft can merge this adapter (merge_and_unload), merge it, save the whole model, and convert that with "
    "tools/convert_checkpoint.py source_format=hf"
)
_FIXES: Mapping[str, str] = {
    "init_lora_weights": "save it with save_pretrained(..., path_initial_model_for_weight_conversion=...); or, "
    + _MERGE
}


def export_adapter(checkpoint: Path, output: Path, base_model: str | None) -> dict[str, Any]:
    """Write the adapter of a checkpoint as a folder that plain ``peft`` loads; returns its configuration.

    Args:
        base_model: name or path of the frozen model, noted for whoever loads the folder.

    Raises:
        CheckpointRefusedError: no adapter there, or one that PEFT has no form for.
    """
    read_description(checkpoint)  # or there is no adapter
    names = [name for name in tensors(checkpoint) if name.startswith(KEY_PREFIX)]
    state = {name.removeprefix(KEY_PREFIX): tensor for name, tensor in read_tensors(checkpoint, names)}
    saved = SavedRun.at(checkpoint)
    peft = saved.mapping["peft"]
    weights = to_hf_weights(state, peft)
    settings = _hf_config(peft, state, base_model)
    output.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, output / WEIGHTS_FILE)
    (output / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if saved.chat_template is not None:  # the one that it was tuned with, whatever the base has
        shutil.copyfile(saved.chat_template, output / TEMPLATE_FILE_NAME)
    return settings


def to_hf_weights(state: Mapping[str, torch.Tensor], peft: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """PEFT's tensors by PEFT's names, from ours by ours (without the prefix ``adapter.``).

    Raises:
        CheckpointRefusedError: PEFT has no form for them.
    """
    if peft["kind"] == "adapter":
        raise CheckpointRefusedError("peft.kind = 'adapter': Hugging Face PEFT has no such form; keep the checkpoint")
    found = {_PREFIX + _HEAD: state[_HEAD]} if _HEAD in state else {}
    state = {name: tensor for name, tensor in state.items() if name != _HEAD}
    if peft["kind"] in ("prompt_tuning", "p_tuning"):
        return {**found, "prompt_embeddings": _prompt_table(state)}
    for name, tensor in state.items():
        module, leaf = _hf_module(name), name.rpartition(".")[2]
        if leaf == "ia3":
            tensor = tensor[None] if module.endswith("down_proj") else tensor[:, None]
        found[f"{_PREFIX}{module}.{_LEAVES[leaf]}"] = tensor
    return found


def _prompt_table(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Vectors as the embedding sees them: p-tuning's MLP is run once and left behind, as in PEFT."""
    part = {name.removeprefix("prompt."): tensor for name, tensor in state.items()}
    if "w0" not in part:
        return part["vectors"]
    hidden = torch.relu(torch.nn.functional.linear(part["vectors"], part["w0"], part["b0"]))
    hidden = torch.relu(torch.nn.functional.linear(hidden, part["w2"], part["b2"]))
    return torch.nn.functional.linear(hidden, part["w4"], part["b4"])


def _hf_module(name: str) -> str:
    """``decoder.layers.3.self_attention.linear_q.lora_a`` -> ``model.layers.3.self_attn.q_proj``."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)\.\w+", name)
    if match is None or match[2] not in _MODULES:
        raise CheckpointRefusedError(
            f"{name}: Hugging Face PEFT has no place for it in models with Llama's layer names.\n      fix: merge the "
            "adapter into the weights and export those, or adapt attention and gated dense MLPs alone"
        )
    return f"model.layers.{match[1]}.{_MODULES[match[2]]}"


def _hf_config(peft: Mapping[str, Any], state: Mapping[str, torch.Tensor], base_model: str | None) -> dict[str, Any]:
    task = "SEQ_CLS" if _HEAD in state else "CAUSAL_LM"
    common = {"base_model_name_or_path": base_model, "task_type": task, "inference_mode": True}
    state = {name: tensor for name, tensor in state.items() if name != _HEAD}
    kind = peft["kind"]
    if kind in ("prompt_tuning", "p_tuning"):
        vectors = state["prompt.vectors"]
        prompt = {"num_virtual_tokens": vectors.shape[0], "token_dim": vectors.shape[1]}
        if kind == "p_tuning":
            width = state["prompt.w0"].shape[0]
            return {**common, "peft_type": "P_TUNING", **prompt, "encoder_hidden_size": width}
        return {**common, "peft_type": "PROMPT_TUNING", **prompt, "prompt_tuning_init": "RANDOM"}
    modules = sorted({_hf_module(name) for name in state})
    if kind == "ia3":
        forward = [module for module in modules if module.endswith("down_proj")]
        return {**common, "peft_type": "IA3", "target_modules": modules, "feedforward_modules": forward}
    ranks = {_hf_module(name): t.shape[0] for name, t in state.items() if name.endswith("lora_a")}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    return {
        **common,
        "peft_type": "LORA",
        "r": usual,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != usual},
        "lora_alpha": peft["alpha"],
        "lora_dropout": peft["dropout"],
        "use_rslora": peft["use_rslora"],
        "use_dora": kind == "dora",
        "bias": "none",
        "target_modules": modules,
    }


def section_of_folder(folder: Path) -> dict[str, Any]:
    """Keys of the ``peft`` section that describe the adapter in a folder of Hugging Face PEFT.

    Raises:
        InputError: not such a folder, or an adapter that is not built here.
    """
    settings, state = _read_folder(folder)
    kind = _KINDS[settings["peft_type"]]
    if kind == "prompt_tuning":
        return {"kind": kind, "num_virtual_tokens": state[_PROMPT].shape[0]}
    modules = {
        name.rpartition(".")[0]: tensor.shape[0] for name, tensor in state.items() if name.endswith((".lora_a", ".ia3"))
    }
    if kind == "ia3":
        return {"kind": kind, "target_modules": list(modules)}
    usual = Counter(modules.values()).most_common(1)[0][0]
    return {
        "kind": "dora" if settings.get("use_dora") else kind,
        "target_modules": list(modules),
        "rank": usual,
        "ranks": {module: rank for module, rank in modules.items() if rank != usual},
        "alpha": float(settings["lora_alpha"]),
        "dropout": float(settings.get("lora_dropout") or 0.0),
        "use_rslora": bool(settings.get("use_rslora")),
    }


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Settings, and tensors by our names, of a folder of which every setting and every tensor is understood.

    Raises:
        InputError: not readable, or with a setting or a tensor that would have to be left out.
    """
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        saved = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"{folder}: not readable as an adapter of Hugging Face PEFT: {error}") from None
    peft_type = settings.get("peft_type") if isinstance(settings, dict) else None
    if not isinstance(peft_type, str) or peft_type not in _KINDS:
        raise InputError(
            f"{folder / CONFIG_FILE}: peft_type={peft_type!r} is not built here; known are {', '.join(_KINDS)}.\n"
            f"      fix: {_MERGE}"
        )
    _check_settings(folder / CONFIG_FILE, settings)
    names = {_our_name(name, peft_type): name for name in saved}
    if None in names:
        raise InputError(
            f"{folder / WEIGHTS_FILE}: {names[None]}: no adapter here has this tensor, and without it the model would "
            f"not be the one that was trained.\n      fix: {_MERGE}"
        )
    if names.keys() <= {_HEAD}:
        raise InputError(f"{folder / WEIGHTS_FILE}: holds no adapter")
    return settings, {ours: saved[name] for ours, name in names.items() if ours}


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a key that is set and not understood, and one that is missing or of another kind."""
    understood = f"{_WITHOUT_EFFECT} {_UNDERSTOOD[settings['peft_type']]}".split()
    for key, value in settings.items():
        unset = value is None or value is False or value in ("", [], {})
        if unset or key in understood:
            continue
        allowed = _VALUES.get(key, ())
        if all(item in allowed for item in (value if isinstance(value, list) else [value])):
            continue
        only = f" (what can be read: {', '.join(map(repr, allowed))})" if allowed else ""
        raise InputError(f"{path}: {key}={value!r} is not built here{only}.\n      fix: {_FIXES.get(key, _MERGE)}")
    if settings["peft_type"] == "LORA" and not isinstance(settings.get("lora_alpha"), int | float):
        raise InputError(f"{path}: lora_alpha={settings.get('lora_alpha')!r} is no number")


def _our_name(name: str, peft_type: str) -> str | None:
    """``base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight`` -> our tensor's whole name.

    None: no adapter of this type has such a tensor here.
    """
    if name == _PREFIX + _HEAD:
        return _HEAD
    if peft_type == "PROMPT_TUNING":
        return _PROMPT if name == "prompt_embeddings" else None
    modules = {theirs: ours for ours, theirs in _MODULES.items()}
    leaves = {theirs: ours for ours, theirs in _LEAVES.items() if (ours == "ia3") == (peft_type == "IA3")}
    match = re.fullmatch(rf"{re.escape(_PREFIX)}model\.layers\.(\d+)\.(\w+\.\w+)\.(.+)", name)
    if match is None or match[2] not in modules or match[3] not in leaves:
        return None
    return f"decoder.layers.{match[1]}.{modules[match[2]]}.{leaves[match[3]]}"


def load_hf_adapter(chunks: list[torch.nn.Module], folder: Path, peft: PeftConfig) -> None:
    """Read a folder of Hugging Face PEFT into the adapters of these chunks, each rank its own part.

    A collective of all ranks.

    Raises:
        InputError: another method or scale, or tensors that are missing, of another shape, or left over.
    """
    with raise_together():
        settings, state = _read_folder(folder)
        _check_method(folder / CONFIG_FILE, settings, peft)
        used = _copy(chunks, state, folder / WEIGHTS_FILE)
    of_rank: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(of_rank, used)
    if left := sorted(state.keys() - set().union(*of_rank)):
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise InputError(
            f"{folder / WEIGHTS_FILE}: {_hf_name(left[0])}{more} would be left out: the model has no adapter there.\n"
            "      fix: let peft.target_modules name every layer of the folder, on the model that it was trained on"
        )


def _check_method(path: Path, settings: Mapping[str, Any], peft: PeftConfig) -> None:
    expected = {"lora": "LORA", "dora": "LORA", "ia3": "IA3", "prompt_tuning": "PROMPT_TUNING"}.get(peft.kind)
    if settings["peft_type"] != expected or bool(settings.get("use_dora")) != (peft.kind == "dora"):
        raise InputError(
            f"{path.parent} holds {settings['peft_type']} (use_dora: {settings.get('use_dora', False)}), and peft.kind "
            f"is {peft.kind}: choose the kind that fits"
        )
    if not isinstance(peft, LoraConfig):
        return
    alpha, use_rslora = settings["lora_alpha"], bool(settings.get("use_rslora"))
    if (alpha, use_rslora) != (peft.alpha, peft.use_rslora):
        raise InputError(
            f"{path}: lora_alpha={alpha!r}, use_rslora={use_rslora}, and the run has peft.alpha={peft.alpha}, "
            f"peft.use_rslora={peft.use_rslora}: the adapter would be scaled otherwise than it was trained.\n"
            f"      fix: set peft.alpha={alpha} and peft.use_rslora={str(use_rslora).lower()}"
        )


@torch.no_grad()
def _copy(chunks: list[torch.nn.Module], state: Mapping[str, torch.Tensor], path: Path) -> set[str]:
    """Fill heads and adapters; returns the names that were read."""
    used = set()
    for head in heads(chunks):
        if _HEAD not in state or state[_HEAD].shape != head.weight.shape:
            raise InputError(f"{path} has no {_PREFIX}{_HEAD} of shape {list(head.weight.shape)}")
        head.weight.copy_(state[_HEAD])
        used.add(_HEAD)
    for module in adapted_modules(chunks):
        for name, shard in module.adapter.shards():
            ours = shard.key.removeprefix(KEY_PREFIX)
            if ours not in state:
                raise InputError(f"{path} has no {_hf_name(ours)}: peft.target_modules name other layers")
            expected = _hf_shape(ours, shard.global_shape)
            if tuple(state[ours].shape) != expected:
                fix = (
                    "name down_proj, and no other layer, in the feedforward_modules of IA3Config"
                    if ours.endswith(".ia3")
                    else "set peft.rank, peft.ranks and peft.num_virtual_tokens as in its adapter_config.json"
                )
                found = list(state[ours].shape)
                raise InputError(f"{path}: {_hf_name(ours)} is {found}, expected {list(expected)}.\n      fix: {fix}")
            place = tuple(slice(o, o + n) for o, n in zip(shard.global_offset, shard.local_shape, strict=True))
            getattr(module.adapter, name).copy_(state[ours].reshape(shard.global_shape)[place])
            used.add(ours)
    return used


def _hf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """PEFT's shape of our tensor: IA3's vectors lie along what they scale, the inputs of down_proj or outputs."""
    if not name.endswith(".ia3"):
        return tuple(shape)
    return (1, *shape) if _hf_module(name).endswith("down_proj") else (*shape, 1)


def _hf_name(name: str) -> str:
    if name == _HEAD:
        return _PREFIX + _HEAD
    return "prompt_embeddings" if name == _PROMPT else f"{_PREFIX}{_hf_module(name)}.{_LEAVES[name.rpartition('.')[2]]}"
