"""Which tensors a model must have on either side, and what is wrong with those that a folder has."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemo_llm.checkpoint.state_files import TensorInfo
from nemo_llm.convert.transforms import TRANSFORMS, AttentionShape
from nemo_llm.errors import InputError
from nemo_llm.families.shapes import our_shape
from nemo_llm.families.spec import Family, Link, links

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Mapped:
    """A model's table, filled in: what to convert, in order."""

    family: Family
    model: Mapping[str, Any]
    shape: AttentionShape
    links: tuple[Link, ...]

    @classmethod
    def of(cls, family: Family, model: Mapping[str, Any]) -> "Mapped":
        """For a model section whose vocabulary is known."""
        return cls(family, model, AttentionShape.of(model), tuple(links(family, model)))

    def to_ours(self, link: Link, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The slice of our tensor."""
        return TRANSFORMS[link.transform].to_ours(tensors, self.shape)

    def to_theirs(self, link: Link, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Their tensors of the slice, in the order of ``link.names``."""
        return TRANSFORMS[link.transform].to_theirs(tensor, self.shape)

    def our_shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shape of every tensor of ours."""
        return {link.key: (*link.axes, *our_shape(link.key, self.model)) for link in self.links}

    def their_infos(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, TensorInfo]:
        """Every tensor of theirs, in the order of the table.

        Args:
            dtypes: type by key of ours.
        """
        infos = {}
        for link in self.links:
            slice_ = torch.empty(our_shape(link.key, self.model), device="meta")
            for name, tensor in zip(link.names, self.to_theirs(link, slice_), strict=True):
                infos[name] = TensorInfo(tuple(tensor.shape), dtypes[link.key])
        return infos

    def check_theirs(self, infos: Mapping[str, TensorInfo], where: str) -> None:
        """Compare names and shapes in a Hugging Face folder with those that this model has.

        Raises:
            InputError: listing what is missing, in excess or of another shape.
        """
        tied = "lm_head.weight" if self.model["share_embeddings_and_output_weights"] else None
        given = {
            name: info.shape for name, info in infos.items() if not name.endswith(self.family.ignored) and name != tied
        }
        any_type = dict.fromkeys((link.key for link in self.links), torch.float32)
        expected = {name: info.shape for name, info in self.their_infos(any_type).items()}
        _compare(given, expected, where)

    def check_ours(self, infos: Mapping[str, TensorInfo], where: str) -> None:
        """Compare a checkpoint of ours with what this model has.

        Raises:
            InputError: listing what is missing, in excess or of another shape.
        """
        _compare({key: info.shape for key, info in infos.items()}, self.our_shapes(), where)


def _compare(given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    problems = []
    spare = [name for name in given if name not in expected]
    for name, shape in expected.items():
        if name not in given:
            near = difflib.get_close_matches(name, spare, 1)
            problems.append(f"missing: {name} {list(shape)}" + (f" (nearest there: {near[0]})" if near else ""))
        elif given[name] != shape:
            problems.append(f"shape: {name} is {list(given[name])}, and the configuration makes it {list(shape)}")
    for name in spare:
        near = difflib.get_close_matches(name, expected, 1)
        problems.append(f"unexpected: {name} {list(given[name])}" + (f" (nearest known: {near[0]})" if near else ""))
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise InputError(
            f"{where}: the tensors are not those of the model that its configuration describes:\n  "
            + "\n  ".join([*problems[:_SHOWN], *more])
        )
