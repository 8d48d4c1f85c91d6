"""Configuration of NeMo's launcher or of Megatron-LM becomes a model file of ours, and no key goes missing unsaid."""

import math
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_llm.config.catalog import known_keys, nearest
from nemo_llm.config.import_tables import MEGATRON, MEGATRON_LEFT, NEMO, NEMO_LEFT, Table
from nemo_llm.errors import InputError


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one foreign key."""

    key: str
    value: Any
    became: str
    """``mapped``, ``left`` (nothing to set here), or ``unmapped`` (it means something that was not taken over)."""
    text: str

    def __str__(self) -> str:
        return f"{self.became:8}  {self.key} = {_short(self.value)}  ->  {self.text}"


@dataclass(slots=True)
class Imported:
    """Keys of ours, and a row for each foreign key."""

    keys: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


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


def _blend(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    numbers = [_number(item) if isinstance(item, str) else item for item in items]
    return numbers if len(numbers) > 1 else [1.0, numbers[0]]


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
    "precision": _choose({"bf16": "bf16", "bf16-mixed": "bf16", "16": "fp16", "16-mixed": "fp16", "32": "fp32"}),
    "nemo_norm": _choose({"rmsnorm": "RMSNorm", "layernorm": "LayerNorm", "layernorm1p": "LayerNorm1p"}),
    "nemo_activation": _choose({name: name for name in _GLU}),
    "nemo_optimizer": _choose({"distributed_fused_adam": True, "fused_adam": False, "mcore_distributed_optim": True}),
    "nemo_schedule": _choose({"CosineAnnealing": "cosine", "WarmupAnnealing": "linear"}),
    "nemo_window": lambda value: None if value is None else int(value[0]) + 1,
    "schedule": _choose({"cosine": "cosine", "linear": "linear", "constant": "constant", "WSD": "wsd"}),
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
        return _import_nemo(_flatten(_read_yaml(text, path)))
    return _import_megatron(read_arguments(text))


def import_nemo_model(path: Path) -> dict[str, Any]:
    """Keys of our model section from ``model_config.yaml`` of a ``.nemo`` archive.

    Raises:
        InputError: it cannot be read, or says something of the model that was not taken over.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = {"model": OmegaConf.to_container(OmegaConf.create(text), resolve=False)}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise InputError(f"{path.name}: not readable as YAML: {error}") from None
    result = _import_nemo(_flatten(tree))
    of_model = [row for row in result.rows if row.became == "unmapped" and row.text.startswith("model.")]
    if of_model:
        raise InputError(f"{path.name}: cannot be taken over:\n  " + "\n  ".join(str(row) for row in of_model))
    section: dict[str, Any] = {}
    for key, value in result.keys.items():
        first, _, rest = key.partition(".")
        if first != "model":
            continue
        parent, _, leaf = rest.rpartition(".")
        (section.setdefault(parent, {}) if parent else section)[leaf] = value
    return section


def _import_nemo(given: Mapping[str, Any]) -> Imported:
    result = Imported()
    # NeMo's defaults where a launcher file says nothing (megatron_gpt_config.yaml).
    defaults = {
        "model.activation": "gelu",
        "model.normalization": "layernorm",
        "model.bias": True,
        "model.share_embeddings_and_output_weights": True,
        "model.position_embedding_type": "learned_absolute",
    }
    _translate(result, {**defaults, **given}, NEMO, NEMO_LEFT)
    keys = result.keys
    activation = keys.pop("model.activation_func", "gelu")
    keys["model.activation_func"], keys["model.gated_linear_unit"] = _GLU[activation]
    if keys.get("model.normalization") == "LayerNorm1p":
        keys["model.normalization"], keys["model.layernorm_zero_centered_gamma"] = "LayerNorm", True
    keys.setdefault("model.add_qkv_bias", keys["model.add_bias_linear"])
    keys.setdefault("optim.sched.decay_steps", keys.get("trainer.max_steps"))
    _finish(result)
    return result


def _import_megatron(given: Mapping[str, Any]) -> Imported:
    result = Imported()
    # Megatron-LM's defaults (megatron/training/arguments.py).
    defaults = {
        "position-embedding-type": "learned_absolute",
        "normalization": "LayerNorm",
        "norm-epsilon": 1e-5,
        "hidden-dropout": 0.1,
        "attention-dropout": 0.1,
    }
    _translate(result, {**defaults, **given}, MEGATRON, MEGATRON_LEFT)
    keys = result.keys
    keys.setdefault("model.activation_func", "gelu")
    keys.setdefault("model.gated_linear_unit", False)
    keys.setdefault("model.add_bias_linear", True)
    keys.setdefault("model.add_qkv_bias", keys["model.add_bias_linear"])
    keys.setdefault("model.share_embeddings_and_output_weights", True)
    batch = keys.get("trainer.global_batch_size")
    for key in ("trainer.max_steps", "optim.sched.decay_steps", "optim.sched.warmup_steps"):
        if isinstance(keys.get(key), _Samples):
            keys[key] = -(-int(keys[key]) // int(batch)) if batch else int(keys[key])
    if any(key.startswith("precision.fp8.") for key in keys):
        result.groups["precision"] = "fp8_delayed"
    _finish(result)
    return result


class _Samples(int):
    """A number of samples that stands for steps."""


def _finish(result: Imported) -> None:
    """Sizes that follow from others where a file leaves them out."""
    keys = result.keys
    if not keys.get("model.ffn_hidden_size") and "model.hidden_size" in keys:
        keys["model.ffn_hidden_size"] = 4 * keys["model.hidden_size"]
    if not keys.get("model.num_query_groups") and "model.num_attention_heads" in keys:
        keys["model.num_query_groups"] = keys["model.num_attention_heads"]
    moe = {key for key in keys if key.startswith("model.moe.")}
    if not keys.get("model.moe.num_moe_experts"):
        for key in moe:
            del keys[key]
    else:
        keys.setdefault("model.moe.moe_ffn_hidden_size", keys.get("model.ffn_hidden_size"))
    if "precision" in keys:
        result.groups.setdefault("precision", keys.pop("precision"))
    keys.pop("precision", None)


def _translate(result: Imported, given: Mapping[str, Any], table: Table, left: Mapping[str, str]) -> None:
    for key, value in given.items():
        if key in table:
            target, codec = table[key]
            if "${" in str(value):
                result.rows.append(Row(key, value, "unmapped", f"{target}: refers to what this file does not set"))
                continue
            try:
                decoded = _decode(codec, value)
            except (_NotTakenError, ValueError, TypeError) as error:
                result.rows.append(Row(key, value, "unmapped", f"{target}: {error}"))
                continue
            targets = target.split(", ")
            parts = decoded if len(targets) > 1 else [decoded]
            result.keys.update(zip(targets, parts, strict=True))
            result.rows.append(Row(key, value, "mapped", f"{target} = {_short(decoded)}"))
            continue
        reason = next((text for start, text in left.items() if key.startswith(start)), None)
        if reason is not None:
            result.rows.append(Row(key, value, "left", reason))
        else:
            meant = nearest(key, table)
            hint = f"; nearest known: {meant}" if meant else ""
            result.rows.append(Row(key, value, "unmapped", f"no counterpart is known{hint}"))


def _decode(codec: str, value: Any) -> Any:
    if codec.startswith("flag:"):
        return codec.removeprefix("flag:")
    if codec == "steps":
        return _Samples(value)
    return CODECS[codec](value)


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
        section[leaf] = int(value) if isinstance(value, _Samples) else value
    defaults: list[Any] = [{"family@model": "gpt3"}]
    if "moe" in tree["model"]:
        defaults.append({"family@model.moe": "moe"})
    defaults += ["_self_", *({f"override /{group}": choice} for group, choice in result.groups.items())]
    body = yaml.safe_dump({"defaults": defaults, **tree}, sort_keys=False, width=120)
    return f"# @package _global_\n# Imported from {source}; tokenizer and data files have to be named anew.\n{body}"


def _read_yaml(text: str, path: Path) -> dict[str, Any]:
    """Nested mappings, with the launcher's arithmetic done and paths that cannot be resolved left as they stand."""
    try:
        tree = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise InputError(f"input={path}: not readable as YAML: {error}") from None
    plain: Any = OmegaConf.to_container(tree, resolve=False)
    if not isinstance(plain, dict) or "model" not in plain:
        raise InputError(f"input={path}: no `model` section; expected a training file of NeMo-Framework-Launcher")
    return {str(key): value for key, value in plain.items()}


_ARITHMETIC = re.compile(r"\$\{(multiply|divide_ceil|divide_floor):\s*([^,]+),\s*(.+)\}$")


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, Mapping) and node:
            for key, value in node.items():
                walk(value, f"{prefix}{key}.")
        else:
            flat[prefix[:-1]] = node

    walk(tree, "")
    return {key: _resolve(value, key, flat) for key, value in flat.items()}


def _resolve(value: Any, key: str, flat: Mapping[str, Any]) -> Any:
    """``${multiply:4, ${.hidden_size}}`` and references to other keys of the file; the rest stays as it stands."""
    if not isinstance(value, str):
        return value
    if found := re.fullmatch(r"\$\{([.\w]+)\}", value):
        name = found[1].removeprefix("training.")
        target = f"{key.rpartition('.')[0]}{name}" if name.startswith(".") else name
        return _resolve(flat[target], target, flat) if target in flat else value
    if found := _ARITHMETIC.match(value):
        try:
            first, second = (int(_resolve(part.strip(), key, flat)) for part in found.groups()[1:])
        except ValueError:
            return value
        return {"multiply": first * second, "divide_ceil": -(-first // second), "divide_floor": first // second}[
            found[1]
        ]
    return value


def read_arguments(text: str) -> dict[str, Any]:
    """Arguments in a text or a shell script, with variables that it sets itself put in.

    Lists of arguments in quotes (``"--lr 1e-4"``) count; what no branch of an ``if`` decides is taken as it stands, the
    first mention of an argument first.
    """
    variables: dict[str, str] = {}
    words: list[str] = []
    for line in text.replace("\\\n", " ").splitlines():
        try:
            parts = shlex.split(line, comments=True)
        except ValueError:
            continue
        if parts and (found := re.fullmatch(r"(?:export )?(\w+)=([^(]*)", parts[0])):
            variables.setdefault(found[1], _expand(found[2], variables))
            continue
        words += [word for part in parts for word in _expand(part, variables).split()]
    found_arguments: dict[str, Any] = {}
    for number, word in enumerate(words):
        if not re.match(r"--[A-Za-z]", word):
            continue
        name, _, inline = word.removeprefix("--").partition("=")
        values = [inline] if inline else _values_after(words, number)
        decoded = [_number(value.strip("'\"")) for value in values]
        value: Any = True if not decoded else decoded[0] if len(decoded) == 1 else decoded
        found_arguments.setdefault(name.replace("_", "-"), value)
    return found_arguments


def _values_after(words: list[str], number: int) -> list[str]:
    values = []
    for word in words[number + 1 :]:
        if word.startswith("--") or word in (")", "(", "fi", "else", "torchrun") or "=(" in word:
            break
        values.append(word.rstrip(")"))
    return [value for value in values if value]


def _expand(text: str, variables: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        name, default = found[1] or found[3], found[2]
        return variables.get(name, (default or "").removeprefix(":-").strip('"') or found[0])

    return re.sub(r"\$\{(\w+)(:-[^}]*)?\}|\$(\w+)", value, text)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
