"""Megatron's notation for uneven pipeline stages, parsed without Megatron.

``E`` embedding, ``t`` transformer layer, ``m`` multi-token-prediction layer, ``L`` loss; ``|`` ends a stage; ``x*3``
repeats one letter or bar, ``(...)*3`` a group; commas are decoration. Stages are listed chunk by chunk: with PP 2 and
two chunks, ``Et|tt|tt|tL`` gives stage 0 the first and third part.
"""

import re
from dataclasses import dataclass

_REPEATED_GROUP = re.compile(r"\(([^()]+)\)\*(\d+)")
_REPEATED_LETTER = re.compile(r"([^*()])\*(\d+)")
_LETTERS = "EtmL"


@dataclass(frozen=True, slots=True)
class LayoutStage:
    """What one part of a layout string holds."""

    num_layers: int
    has_embedding: bool
    has_loss: bool


def parse_pipeline_layout(layout: str) -> tuple[LayoutStage, ...]:
    """Stages of a layout string in execution order (chunk 0 of every rank, then chunk 1, ...).

    Raises:
        ValueError: the string is not in the notation; the message names the part.
    """
    unrolled = layout.replace(",", "").replace(" ", "")
    for pattern in (_REPEATED_GROUP, _REPEATED_LETTER):
        unrolled = pattern.sub(lambda match: match.group(1) * int(match.group(2)), unrolled)
    if strange := sorted(set(unrolled) - set(_LETTERS) - {"|"}):
        raise ValueError(f"{''.join(strange)!r} is not part of the notation (E, t, m, L, |, *n, parentheses)")
    if "m" in unrolled:
        raise ValueError("'m' (multi-token prediction) is not supported")
    flat = unrolled.replace("|", "")
    if not (flat.startswith("E") and flat.endswith("L")) or flat.count("E") != 1 or flat.count("L") != 1:
        raise ValueError("it must start with the embedding E, end with the loss L, and hold each of them once")
    return tuple(LayoutStage(part.count("t"), "E" in part, "L" in part) for part in unrolled.split("|"))
