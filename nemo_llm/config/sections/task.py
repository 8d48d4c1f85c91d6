"""The ``task`` section: one class for each set of keys, which ``task.name`` chooses."""

from dataclasses import dataclass
from typing import Annotated, Literal

from nemo_llm.config.sections.fields import NonNegativeFloat, Section, TaggedBy


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTask(Section):
    """Tasks that predict tokens. `z_loss_coeff` weighs the squared log-partition of the logits (arXiv:2204.02311)."""

    name: Literal["pretrain", "sft"]
    z_loss_coeff: NonNegativeFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadTask(Section):
    """Tasks that train a head in place of the output layer."""

    name: Literal["classification", "score"]


TaskConfig = Annotated[TokenTask | HeadTask, TaggedBy("name")]
