"""Configuration of NeMo's launcher or of Megatron-LM becomes a model file of ours, and no key goes missing unsaid."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_llm.config.compose.catalog import known_keys, nearest
from nemo_llm.errors import InputError
from nemo_llm.migrate.arguments import mentions
from nemo_llm.migrate.rows import Imported, ImportRow, short
from nemo_llm.migrate.schedule import MEGATRON_SCHEDULE, NEMO_SCHEDULE, megatron_schedule, nemo_schedule
from nemo_llm.migrate.tables import Tables, tables_of
from nemo_llm.migrate.yaml import check_yaml, flatten, read_yaml


class _NotTakenError(Exception):
    """A value that has no counterpart; says why."""


_GLU = {
    "gelu": ("gelu_tanh", False),
    "fast-geglu": ("gelu_tanh", True),
    "geglu": ("gelu_tanh", True),
    "swiglu": ("silu", True),
    "fast-swiglu": ("silu", True),
    "squared-relu": ("squared_relu", False),
    "relu": ("relu", False),
}


def _choose(names: Mapping[str, Any]) -> Callable[[Any], Any]:
    def decode(value: Any) -> Any:
        if str(value) not in names:
            raise _NotTakenError(f"{value!r} is not offered; known are {', '.join(names)}")
        return names[str(value)]

    return decode


def _rampup(value: Any) -> Any:
    if value is None:
        return None
    start, increment, samples = (int(number) for number in value)
    return {"start_global_batch_size": start, "increment": increment, "ramp_samples": samples}


def _duration(value: Any) -> float | None:
    """Lightning's days:hours:minutes:seconds in minutes."""
    if value is None:
        return None
    days, hours, minutes, seconds = (int(part) for part in str(value).split(":"))
    return days * 1440.0 + hours * 60.0 + minutes + seconds / 60.0


def _whole(value: Any) -> int | None:
    return None if value is None else math.ceil(float(value))


def _batches(value: Any) -> int:
    """Lightning takes a share of the data too."""
    if isinstance(value, float) and value <= 1.0:
        raise _NotTakenError("a share of the validation data; say how many steps")
    return int(value)


def _linear_rope(value: Any) -> Any:
    return None if value in (None, 1) else {"type": "linear", "factor": float(value)}


def llama3_rope(value: Any, factor: float = 8.0) -> Any:
    """Scaling of Llama 3.1 with the constants of Megatron-Core and NeMo."""
    constants = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"type": "llama3", "factor": float(factor), **constants} if value else None


def _window(value: Any) -> int | None:
    """(tokens to the left, tokens to the right)"""
    if value is None:
        return None
    left, right = (int(part) for part in (value.strip("()[] ").split(",") if isinstance(value, str) else value))
    if right not in (0, -1):
        raise _NotTakenError("attention to tokens that follow is not built here")
    return None if left < 0 else left + 1


def _count(value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not str(value).isdecimal()):
        raise _NotTakenError("a pattern of layers; a whole number is known alone")
    return None if value is None else int(value)


def _blend(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return items if len(items) > 1 else [1.0, items[0]]


CODECS: Mapping[str, Callable[[Any], Any]] = {
    "same": lambda value: value,
    "text": lambda value: None if value is None else str(value),
    "float": lambda value: None if value is None else float(value),
    "whole": _whole,
    "batches": _batches,
    "not": lambda value: not value,
    "positive": lambda value: value or None,
    "pair": lambda value: [float(item) for item in value],
    "rampup": _rampup,
    "duration": _duration,
    "blend": _blend,
    "linear_rope": _linear_rope,
    "llama3_rope": llama3_rope,
    "window": _window,
    "count": _count,
    "many": lambda value: int(value) if int(value) > 1 else None,
    "names": lambda value: value if isinstance(value, list) else [str(value)],
    "positions": _choose({name: name for name in ("rope", "learned_absolute", "none")}),
    "exchange": _choose({name: name for name in ("p2p", "a2a", "all_gather")}),
    "gradients": _choose({"None": True, "fp32": True, "torch.float32": True, "bf16": False, "torch.bfloat16": False}),
    "precision": _choose(
        {
            **dict.fromkeys(("bf16", "bf16-mixed", "bf16-true"), "bf16"),
            **dict.fromkeys(("16", "16-mixed", "16-true"), "fp16"),
            **dict.fromkeys(("32", "32-true"), "fp32"),
        }
    ),
    "nemo_norm": _choose({"rmsnorm": "RMSNorm", "layernorm": "LayerNorm", "layernorm1p": "LayerNorm1p"}),
    "nemo_activation": _choose({name: name for name in _GLU}),
    "nemo_optimizer": _choose({"distributed_fused_adam": True, "fused_adam": False, "mcore_distributed_optim": True}),
    "nemo_schedule": _choose({"CosineAnnealing": "cosine", "WarmupAnnealing": "linear"}),
    "schedule": _choose({"cosine": "cosine", "linear": "linear", "constant": "constant", "WSD": "wsd"}),
    "wsd_style": _choose({name: name for name in ("exponential", "linear", "cosine", "minus_sqrt")}),
    "swiglu": lambda _: [True, "silu"],
}


def import_file(path: Path, kind: str) -> Imported:
    """Translate a file.

    Args:
        kind: ``nemo``, ``megatron``, or ``auto`` (by the ending).

    Raises:
        InputError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"input={path}: cannot be read: {error}") from None
    if kind == "nemo" or (kind == "auto" and path.suffix in (".yaml", ".yml")):
        return _import_nemo(flatten(read_yaml(text, path)))
    return _import_megatron(list(mentions(text)))


_ELSEWHERE = (
    "\n      fix: write it as a folder of Hugging Face with NeMo's own scripts, and convert that with source_format=hf"
)


def import_nemo_model(path: Path) -> dict[str, Any]:
    """Keys of our model section from ``model_config.yaml`` of a ``.nemo`` archive.

    Raises:
        InputError: it cannot be read, or says something of the model that was not taken over.
    """
    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text, path.name)
        tree = {"model": OmegaConf.to_container(OmegaConf.create(text), resolve=False)}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise InputError(f"{path.name}: not readable as YAML: {error}") from None
    result = _import_nemo(flatten(tree))
    of_model = [row for row in result.rows if row.became == "unmapped" and _changes_the_model(row.key)]
    if of_model:
        raise InputError(f"{path.name}: cannot be taken over:\n  " + "\n  ".join(map(str, of_model)) + _ELSEWHERE)
    section: dict[str, Any] = {}
    for key, value in result.keys.items():
        first, _, rest = key.partition(".")
        if first != "model":
            continue
        parent, _, leaf = rest.rpartition(".")
        (section.setdefault(parent, {}) if parent else section)[leaf] = value
    return section


def _changes_the_model(key: str) -> bool:
    """Whether a key of NeMo says something of what the weights compute."""
    nemo = tables_of("nemo")
    if key in nemo.keys:
        return nemo.keys[key][0].startswith("model.")
    training = key in nemo.training_only.split() or key.startswith(("model.optim.", "model.data.", "model.tokenizer."))
    return key.startswith("model.") and not training


def _import_nemo(given: Mapping[str, Any]) -> Imported:
    result, nemo = Imported(), tables_of("nemo")
    with_experts = bool(given.get("model.num_moe_experts"))
    rest = {key: value for key, value in given.items() if key not in NEMO_SCHEDULE and key != _FUSION}
    _translate(result, rest, nemo)
    defaults = {**nemo.defaults["always"], **(nemo.defaults["with_experts"] if with_experts else {})}
    _fill(result, given, defaults, nemo)
    result.rows += nemo_schedule(given, result.keys)
    keys = result.keys
    activation, gated = _GLU[keys.pop("model.activation_func", "gelu")]
    fused = bool(given.get(_FUSION, True))
    if activation == "gelu_tanh" and not fused:
        activation = "gelu"
    keys["model.activation_func"], keys["model.gated_linear_unit"] = activation, gated
    became = "mapped" if _FUSION in given else "default"
    result.rows.append(ImportRow(_FUSION, fused, became, f"model.activation_func = {activation}"))
    if keys.get("model.normalization") == "LayerNorm1p":
        keys["model.normalization"], keys["model.layernorm_zero_centered_gamma"] = "LayerNorm", True
    if "data.seq_length" not in keys and "model.encoder_seq_length" in given:
        keys["data.seq_length"] = given["model.encoder_seq_length"]
    _finish(result, 4)
    return result


_FUSION = "model.bias_activation_fusion"
# Arguments that are read together below.
_TOGETHER = MEGATRON_SCHEDULE | {
    "bf16", "fp16", "group-query-attention", "num-query-groups", "use-rope-scaling", "rope-scaling-factor",
    "num-layers-per-virtual-pipeline-stage", "no-bias-gelu-fusion",
}  # fmt: skip


def _import_megatron(mentioned: Iterable[tuple[str, Any]]) -> Imported:
    result, megatron = Imported(), tables_of("megatron")
    given: dict[str, Any] = {}
    for name, value in mentioned:
        if given.setdefault(name, value) != value:
            rule = f"given before as {short(given[name])}, which was taken"
            result.rows.append(ImportRow(name, value, "unmapped", rule))
    rest = {key: value for key, value in given.items() if key not in _TOGETHER}
    _translate(result, rest, megatron)
    defaults = dict(megatron.defaults["always"])
    defaults |= megatron.defaults["with_experts"] if given.get("num-experts") else {}
    defaults |= megatron.defaults["with_fp8"] if "fp8-format" in given else {}
    defaults |= megatron.defaults["with_fp16"] if "fp16" in given else {}
    defaults |= {"cp-comm-type": "p2p"} if given.get("context-parallel-size", 1) != 1 else {}
    defaults |= {"lr-wsd-decay-style": "exponential"} if given.get("lr-decay-style") == "WSD" else {}
    defaults |= {"split": "969,30,1"} if "data-path" in given else {}
    _fill(result, given, defaults, megatron)
    for key in megatron.required.split():
        if key not in given:
            result.rows.append(ImportRow(key, None, "unmapped", "not given, and Megatron-LM needs it"))
    _precision(result, given)
    _shape(result, given)
    _batch(result, given)
    result.rows += megatron_schedule(given, result.keys)
    _finish(result, 8 / 3 if given.get("swiglu") else 4)
    return result


def _precision(result: Imported, given: Mapping[str, Any]) -> None:
    named = next((name for name in ("bf16", "fp16") if name in given), None)
    name = named or "fp32"
    if "fp8-format" in given and named != "bf16":
        rule = f"precision: FP8 is built beside bf16 alone, and the parameters are in {name}"
        result.rows.append(ImportRow("fp8-format", given["fp8-format"], "unmapped", rule))
    elif "fp8-format" in given:
        name = f"fp8_{result.keys['precision.fp8.fp8_recipe']}"
    if "fp8-format" not in given:
        for key in [key for key in result.keys if key.startswith("precision.fp8.")]:
            del result.keys[key]
    result.groups["precision"] = name
    became = "default" if named is None else "mapped"
    result.rows.append(ImportRow(named or "bf16", named is not None, became, f"precision = {name}"))


def _shape(result: Imported, given: Mapping[str, Any]) -> None:
    """Keys of the model that several arguments decide together, as Megatron-LM's validate_args has them."""
    keys, rows = result.keys, result.rows
    grouped, groups = bool(given.get("group-query-attention")), given.get("num-query-groups", 1)
    if grouped:
        keys["model.num_query_groups"] = groups
        rows.append(ImportRow("group-query-attention", True, "mapped", f"model.num_query_groups = {groups}"))
    if "num-query-groups" in given and not grouped:
        text = "Megatron-LM reads it beside --group-query-attention alone"
        rows.append(ImportRow("num-query-groups", groups, "left", text))
    scaling, factor = given.get("use-rope-scaling", False), given.get("rope-scaling-factor", 8.0)
    if scaling and keys.get("model.rope_scaling") is None and isinstance(factor, int | float):
        keys["model.rope_scaling"] = llama3_rope(True, factor)
        rows.append(
            ImportRow("use-rope-scaling", True, "mapped", f"model.rope_scaling = {short(keys['model.rope_scaling'])}")
        )
        became = "mapped" if "rope-scaling-factor" in given else "default"
        rows.append(ImportRow("rope-scaling-factor", factor, became, f"model.rope_scaling.factor = {factor}"))
    elif scaling:
        rows.append(ImportRow("use-rope-scaling", True, "unmapped", "model.rope_scaling: beside another scaling"))
    elif "rope-scaling-factor" in given:
        rows.append(ImportRow("rope-scaling-factor", factor, "left", "read beside --use-rope-scaling alone"))
    bias = keys["model.add_bias_linear"]
    if "model.activation_func" not in keys:
        fused = bias and "no-bias-gelu-fusion" not in given
        keys["model.activation_func"] = "gelu_tanh" if fused else "gelu"
        why = "GELU, in the fused kernel its tanh form" if fused else "GELU"
        rows.append(
            ImportRow("swiglu", False, "default", f"model.activation_func = {keys['model.activation_func']} ({why})")
        )
    keys.setdefault("model.gated_linear_unit", False)
    if "no-bias-gelu-fusion" in given:
        text = f"model.activation_func = {keys['model.activation_func']}"
        rows.append(ImportRow("no-bias-gelu-fusion", True, "mapped", text))
    if "num-layers-per-virtual-pipeline-stage" in given:
        _virtual(result, given["num-layers-per-virtual-pipeline-stage"])


def _virtual(result: Imported, layers: Any) -> None:
    keys, key = result.keys, "parallelism.virtual_pipeline_model_parallel_size"
    stages = keys.get("parallelism.pipeline_model_parallel_size", 1)
    total, name = keys.get("model.num_layers"), "num-layers-per-virtual-pipeline-stage"
    if not all(isinstance(number, int) and number > 0 for number in (layers, stages, total)) or total % (
        stages * layers
    ):
        rule = f"{key}: {total} layers on {stages} stages are no whole number of pieces of {layers}"
        result.rows.append(ImportRow(name, layers, "unmapped", rule))
        return
    size = total // (stages * layers)
    keys[key] = size if size > 1 else None
    result.rows.append(ImportRow(name, layers, "mapped", f"{key} = {keys[key]}"))


def _batch(result: Imported, given: Mapping[str, Any]) -> None:
    keys = result.keys
    if keys.get("trainer.val_steps") == 0:
        del keys["trainer.val_steps"]
        keys["trainer.val_interval"] = None
    if "global-batch-size" in given:
        return
    sizes = [given.get(name) for name in ("nproc-per-node", "micro-batch-size")]
    model = [given.get(f"{name}-parallel-size", 1) for name in ("tensor-model", "pipeline-model", "context")]
    numbers = [*sizes, given.get("nnodes", 1), *model]
    whole = all(isinstance(number, int) and number > 0 for number in numbers)
    if not whole or numbers[0] * numbers[2] % math.prod(model):
        rule = (
            "trainer.global_batch_size: not given; its default (micro-batch size x data-parallel size) needs processes"
        )
        result.rows.append(ImportRow("global-batch-size", None, "unmapped", rule))
        return
    batch = numbers[1] * (numbers[0] * numbers[2] // math.prod(model))
    keys["trainer.global_batch_size"] = batch
    result.rows.append(ImportRow("global-batch-size", batch, "default", f"trainer.global_batch_size = {batch}"))


def _finish(result: Imported, mlp_factor: float) -> None:
    """Sizes that follow from others where a file leaves them out.

    Args:
        mlp_factor: inner width of the MLP over the hidden size; 8/3 is rounded down to a multiple of 64.
    """
    keys = result.keys
    if not keys.get("model.ffn_hidden_size") and isinstance(keys.get("model.hidden_size"), int):
        width = int(mlp_factor * keys["model.hidden_size"])
        _derive(result, "model.ffn_hidden_size", width if mlp_factor == 4 else width // 64 * 64)
    if not keys.get("model.num_query_groups") and "model.num_attention_heads" in keys:
        _derive(result, "model.num_query_groups", keys["model.num_attention_heads"])
    if keys.get("model.vocab_size") is None:
        _derive(result, "model.vocab_size", None)  # the tokenizer's
    if keys.get("model.add_bias_linear", False):
        keys["model.add_qkv_bias"] = True
    keys.setdefault("model.add_qkv_bias", False)
    if not keys.get("model.moe.num_moe_experts"):
        for key in [key for key in keys if key.startswith("model.moe.")]:
            del keys[key]
    elif not keys.get("model.moe.moe_ffn_hidden_size"):
        _derive(result, "model.moe.moe_ffn_hidden_size", keys.get("model.ffn_hidden_size"))
    if "precision" in keys:
        result.groups["precision"] = keys.pop("precision")


def _derive(result: Imported, key: str, value: Any) -> None:
    result.keys[key] = value
    result.rows.append(ImportRow(key, value, "default", f"{key} = {value}"))


def _translate(result: Imported, given: Mapping[str, Any], known: Tables) -> None:
    """A row for each key of ``given``, and what is translated into the keys of ``result``."""
    table, as_here = known.keys, known.as_here
    reasons = {name: reason for reason, names in known.left.items() for name in names.split()}
    for key, value in given.items():
        section = next((name for name in reasons if name.endswith(".*") and key.startswith(name[:-1])), key)
        if key in table:
            result.rows.append(_map(result.keys, key, value, table[key]))
        elif key in as_here:
            fits = value is None or str(value) in as_here[key].split()
            text = "what is done here anyway" if fits else f"{as_here[key].replace(' ', ' or ')} is built here alone"
            result.rows.append(ImportRow(key, value, "left" if fits else "unmapped", text))
        elif section in reasons:
            result.rows.append(ImportRow(key, value, "left", reasons[section]))
        elif value is None:
            result.rows.append(ImportRow(key, value, "left", "not set"))
        else:
            meant = nearest(key, table)
            hint = f"; nearest known: {meant}" if meant else ""
            result.rows.append(ImportRow(key, value, "unmapped", f"no counterpart is known{hint}"))


def _fill(result: Imported, given: Mapping[str, Any], defaults: Mapping[str, Any], known: Tables) -> None:
    """What holds there where the file says nothing; targets that some other key has set stay."""
    for key, value in defaults.items():
        if key not in given and not any(target in result.keys for target in known.keys[key][0].split(", ")):
            row = _map(result.keys, key, value, known.keys[key])
            result.rows.append(ImportRow(key, value, "default", row.text))


def _map(keys: dict[str, Any], key: str, value: Any, entry: tuple[str, str]) -> ImportRow:
    """Put the translated value into ``keys``, unless there is none or another key says otherwise."""
    target, codec = entry
    if "$" in str(value):
        return ImportRow(key, value, "unmapped", f"{target}: refers to what this file does not set")
    try:
        decoded = codec.removeprefix("flag:") if codec.startswith("flag:") else CODECS[codec](value)
    except (_NotTakenError, ValueError, TypeError, AttributeError) as error:
        return ImportRow(key, value, "unmapped", f"{target}: {error}")
    targets = target.split(", ")
    parts = dict(zip(targets, decoded if len(targets) > 1 else [decoded], strict=True))
    for name, part in parts.items():
        if part is not None and keys.get(name) not in (None, part):
            return ImportRow(key, value, "unmapped", f"{name}: another key of this file says {short(keys[name])}")
    keys.update({name: part for name, part in parts.items() if part is not None or name not in keys})
    return ImportRow(key, value, "mapped", f"{target} = {short(decoded)}")


def model_file(result: Imported, name: str, source: str) -> str:
    """Content of ``model/<name>.yaml``."""
    tree: dict[str, Any] = {"model": {"name": name}}
    known = known_keys()
    for key, value in result.keys.items():
        assert key in known, f"{key} of the import tables is no key of ours"
        if value is None and key.rpartition(".")[2] in ("ffn_hidden_size", "num_query_groups"):
            continue
        section = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    defaults: list[Any] = [{"family@model": "gpt3"}]
    if "moe" in tree["model"]:
        defaults.append({"family@model.moe": "moe"})
    defaults += ["_self_", *({f"override /{group}": choice} for group, choice in result.groups.items())]
    body = yaml.safe_dump({"defaults": defaults, **tree}, sort_keys=False, width=120)
    return f"# @package _global_\n# Imported from {source}; tokenizer and data files have to be named anew.\n{body}"
