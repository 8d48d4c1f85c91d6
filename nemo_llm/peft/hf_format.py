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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nemo_llm.checkpoint.inspect import read_tensors, tensors
from nemo_llm.data.chat_template import TEMPLATE_FILE_NAME
from nemo_llm.errors import CheckpointError, InputError
from nemo_llm.models.head import HEAD_PREFIX
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


def export_adapter(checkpoint: Path, output: Path, base_model: str | None) -> dict[str, Any]:
    """Write the adapter of a checkpoint as a folder that plain ``peft`` loads; returns its configuration.

    Args:
        base_model: name or path of the frozen model, noted for whoever loads the folder.

    Raises:
        CheckpointError: no adapter there, or one that PEFT has no form for.
    """
    description = read_description(checkpoint)
    names = [name for name in tensors(checkpoint) if name.startswith(KEY_PREFIX)]
    state = {name.removeprefix(KEY_PREFIX): tensor for name, tensor in read_tensors(checkpoint, names)}
    peft = description["peft"]
    weights = to_hf_weights(state, peft)
    settings = _hf_config(peft, state, base_model)
    output.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, output / WEIGHTS_FILE)
    (output / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    template = checkpoint / "tokenizer" / TEMPLATE_FILE_NAME
    if template.is_file():  # the one that it was tuned with, whatever the base has
        shutil.copyfile(template, output / TEMPLATE_FILE_NAME)
    return settings


def to_hf_weights(state: Mapping[str, torch.Tensor], peft: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """PEFT's tensors by PEFT's names, from ours by ours (without the prefix ``adapter.``)."""
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
        raise CheckpointError(
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
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        saved = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: not readable as an adapter of Hugging Face PEFT: {error}") from None
    kind = {"LORA": "lora", "IA3": "ia3", "PROMPT_TUNING": "prompt_tuning"}.get(settings["peft_type"])
    refused = {
        "peft_type": kind is None,
        "alpha_pattern": bool(settings.get("alpha_pattern")),
        "bias": settings.get("bias", "none") != "none",
        "modules_to_save": bool(settings.get("modules_to_save")),
    }
    for key, is_refused in refused.items():
        if is_refused:
            raise InputError(f"{folder / CONFIG_FILE}: {key}={settings[key]!r} is not built here")
    if kind == "prompt_tuning":
        return {"kind": kind, "num_virtual_tokens": settings["num_virtual_tokens"]}
    modules = {_our_module(name, folder): tensor.shape[0] for name, tensor in saved.items() if _is_first(name)}
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


def _is_first(name: str) -> bool:
    return name.endswith((_LEAVES["lora_a"], _LEAVES["ia3"]))


def _our_module(name: str, folder: Path) -> str:
    """``base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight`` -> our module's whole name."""
    names = {theirs: ours for ours, theirs in _MODULES.items()}
    match = re.fullmatch(rf"{re.escape(_PREFIX)}model\.layers\.(\d+)\.(\w+\.\w+)\..+", name)
    if match is None or match[2] not in names:
        raise InputError(f"{folder / WEIGHTS_FILE}: {name} belongs to no layer that has an adapter here")
    return f"decoder.layers.{match[1]}.{names[match[2]]}"


@torch.no_grad()
def load_hf_adapter(chunks: list[torch.nn.Module], folder: Path, kind: str) -> None:
    """Read a folder of Hugging Face PEFT into the adapters of these chunks, each rank its own part.

    Raises:
        InputError: another method, or tensors that are missing, of another shape, or left over.
    """
    settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    expected = {"lora": "LORA", "dora": "LORA", "ia3": "IA3", "prompt_tuning": "PROMPT_TUNING"}.get(kind)
    if settings["peft_type"] != expected or bool(settings.get("use_dora")) != (kind == "dora"):
        raise InputError(
            f"{folder} holds {settings['peft_type']} (use_dora: {settings.get('use_dora', False)}), and peft.kind is "
            f"{kind}: choose the kind that fits"
        )
    saved = load_file(folder / WEIGHTS_FILE)
    for head in heads(chunks):
        if _PREFIX + _HEAD not in saved or saved[_PREFIX + _HEAD].shape != head.weight.shape:
            raise InputError(f"{folder / WEIGHTS_FILE} has no {_PREFIX}{_HEAD} of shape {list(head.weight.shape)}")
        head.weight.copy_(saved[_PREFIX + _HEAD])
    for module in adapted_modules(chunks):
        for name, shard in module.adapter.shards():
            ours = shard.key.removeprefix(KEY_PREFIX)
            theirs = "prompt_embeddings" if kind == "prompt_tuning" else _hf_name(ours)
            if theirs not in saved:
                raise InputError(f"{folder / WEIGHTS_FILE} has no {theirs}: peft.target_modules name other layers")
            whole = saved[theirs].reshape(-1) if ours.endswith(".ia3") else saved[theirs]
            if tuple(whole.shape) != tuple(shard.global_shape):
                raise InputError(
                    f"{folder / WEIGHTS_FILE}: {theirs} is {list(whole.shape)}, expected {list(shard.global_shape)}; "
                    "set peft.rank and peft.ranks as in its adapter_config.json"
                )
            place = tuple(slice(o, o + n) for o, n in zip(shard.global_offset, shard.local_shape, strict=True))
            getattr(module.adapter, name).copy_(whole[place])


def _hf_name(name: str) -> str:
    return f"{_PREFIX}{_hf_module(name)}.{_LEAVES[name.rpartition('.')[2]]}"
