"""Two small folders from two large ones: embedding, output and a few layers, for the gate of what fits no memory."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_llm.checkpoint.folder import copy_tokenizer
from nemo_llm.checkpoint.saved_run import SavedRun, write_config
from nemo_llm.checkpoint.state_files import NativeReader, NativeWriter
from nemo_llm.convert.hf_files import HfReader, write_safetensors
from nemo_llm.convert.mapping import Mapped
from nemo_llm.families.registry import read_hf_config
from nemo_llm.families.spec import Link

_MAX_SHARD_BYTES = 1 << 40


def write_samples(mapped: Mapped, hf: Path, ours: Path, layers: Sequence[int], folder: Path) -> tuple[Path, Path]:
    """Write the chosen layers of both models, renumbered, below ``folder``; returns the two folders."""
    small = Mapped.of(mapped.family, _smaller(mapped.model, layers))
    pairs = list(_pairs(mapped, small, layers))
    return _write_hf(small, pairs, hf, folder / "hf", layers), _write_ours(pairs, ours, folder / "ours", small.model)


def write_our_sample(mapped: Mapped, ours: Path, layers: Sequence[int], folder: Path) -> Path:
    """As `write_samples`, of our model alone."""
    small = Mapped.of(mapped.family, _smaller(mapped.model, layers))
    return _write_ours(list(_pairs(mapped, small, layers)), ours, folder / "ours", small.model)


def _smaller(model: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The model section with these layers alone."""
    small = {**model, "num_layers": len(layers)}
    if model["moe"]:
        dense = sum(layer < (model["moe"].get("moe_first_k_dense_replace") or 0) for layer in layers)
        small["moe"] = {**model["moe"], "moe_first_k_dense_replace": dense or None}
    return small


def _pairs(large: Mapped, small: Mapped, layers: Sequence[int]) -> Iterator[tuple[Link, Link]]:
    """Each slice of the small model, beside the slice of the large one that it is."""
    sources = {link.place: link for link in large.links}
    for link in small.links:
        stem, layer, expert = link.place
        yield link, sources[stem, None if layer is None else layers[layer], expert]


def _write_hf(small: Mapped, pairs: list[tuple[Link, Link]], source: Path, target: Path, layers: Sequence[int]) -> Path:
    target.mkdir(parents=True)
    config = read_hf_config(source)
    for field in small.family.fields:
        if field.ours == "num_layers":
            config[field.theirs] = len(layers)
        if field.ours == "moe.moe_first_k_dense_replace":
            config[field.theirs] = small.model["moe"]["moe_first_k_dense_replace"] or 0
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][layer] for layer in layers]
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with HfReader(source) as reader:
        names = {new: old for link, origin in pairs for new, old in zip(link.names, origin.names, strict=True)}
        infos = {new: reader.infos[old] for new, old in names.items()}
        tensors: Iterator[tuple[str, torch.Tensor]] = ((new, reader.read(old)) for new, old in names.items())
        write_safetensors(target, infos, tensors, _MAX_SHARD_BYTES)
    return target


def _write_ours(pairs: list[tuple[Link, Link]], source: Path, target: Path, model: Mapping[str, Any]) -> Path:
    (target / "state").mkdir(parents=True)
    reader = NativeReader(source / "state")
    with NativeWriter(target / "state") as writer:
        for link, origin in pairs:
            writer.write(link.key, link.index, link.axes, reader.read(origin.key, origin.index))
    write_config(target, {**SavedRun.at(source).mapping, "model": dict(model)})
    copy_tokenizer(source, target)
    return target
