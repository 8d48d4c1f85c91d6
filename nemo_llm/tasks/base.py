"""What a task is: all that the training loop asks of what is optimised. Imports no torch at module level."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from nemo_llm.config.sections.fields import Section
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import Problem

if TYPE_CHECKING:
    from torch import Tensor

MicroBatch = dict[str, "Tensor"]
"""``tokens``, ``labels``, ``loss_mask``, ``position_ids``: ``[b, s/cp]``; ``padding``, bool ``[b, s/cp]``, absent when
every position is filled; ``document_ids``: ``[b, s]``, absent when documents may see each other."""

LossSum = tuple["Tensor", "Tensor", dict[str, "Tensor"]]
"""The sum that is differentiated, the number of learned tokens as Megatron wants it (int32), and the named sums."""

Model = Callable[..., "Tensor"]
ForwardStep = tuple["Tensor", Callable[["Tensor"], LossSum]]


class Task(ABC):
    """One way of learning, made from its own section of the configuration (``cfg.task``).

    A task adds up and names. The gradient of the sum that `forward_step` gives is divided once, by the optimizer, by
    the `denominator` of the global batch.
    """

    source_kinds: frozenset[str]
    """Kinds of sources (`BlendSource.kind`) that it learns from; others are refused."""

    def __init__(self, section: Section) -> None:
        self.section = section

    @abstractmethod
    def check(self, sections: RunConfig) -> Iterator[Problem]:
        """Problems between this task and the other sections; no tensor exists yet."""

    @abstractmethod
    def forward_step(self, batches: Iterator[MicroBatch], model: Model) -> ForwardStep:
        """Run one micro-batch through this pipeline stage, as Megatron's schedules call it.

        The closure turns the last stage's output into the sums over this rank's share of the micro-batch: detached
        scalars, ``tokens`` (how many are learned) among them. Data- and context-parallel ranks add up, and a position
        lies on one of the latter. The names in evaluation may be others than in training, and are else the same.
        """

    @abstractmethod
    def denominator(self, sums: "Mapping[str, Tensor]") -> "Tensor":
        """What the gradient is divided by, above 0: tokens, answers, pairs or a constant, over the global batch."""

    @abstractmethod
    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What is logged, by the names of ``metrics.jsonl``, ``loss`` among them; ``val_`` precedes in validation."""

    def describe(self, figures: Mapping[str, float], num_tokens: int) -> str:
        """The line of a validation set with `num_tokens` learned tokens."""
        return " | ".join([*(f"{name} {value:.4f}" for name, value in figures.items()), f"{num_tokens} tokens"])

    def compare(self, figures: Mapping[str, float], _entropy: Callable[[], float]) -> str:
        """The last validation, for the end of a run; beside the entropy (nats) of its labels where that says much."""
        return " | ".join(f"{name} {value:.4f}" for name, value in figures.items())


class TokenMean(Task):
    """The mean loss over the positions that the loss mask counts; what they are to give is in the labels."""

    unit = "tokens"
    """What a counted position is one of."""
    accuracy: str | None = "accuracy"
    """What the share of right guesses is called; None where nothing is right or wrong."""

    def forward_step(self, batches: Iterator[MicroBatch], model: Model) -> ForwardStep:
        """Losses of one micro-batch."""
        batch = next(batches)
        return token_losses(batch, model), lambda losses: sum_losses(losses, batch["loss_mask"])

    def denominator(self, sums: "Mapping[str, Tensor]") -> "Tensor":
        """Tokens, at least one."""
        return sums["tokens"].clamp(min=1)

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean loss, and in evaluation the share of right guesses."""
        tokens = max(sums["tokens"], 1)
        figures = {"loss": sums["loss"] / tokens}
        if self.accuracy is not None and "hits" in sums:
            figures["accuracy"] = sums["hits"] / tokens
        return figures

    def describe(self, figures: Mapping[str, float], num_tokens: int) -> str:
        """Loss, accuracy where there is one, and how much was counted."""
        right = f"{self.accuracy} {figures['accuracy']:.1%} | " if "accuracy" in figures else ""
        return f"loss {figures['loss']:.4f} | {right}{num_tokens} {self.unit}"


class HeadMean(TokenMean):
    """The mean loss over texts of a head in place of the output layer."""

    source_kinds = frozenset({"labelled"})
    unit = "texts"
    names: tuple[range, str, str]
    """How many ``model.head`` has to hold, in words too, and an example."""

    def check(self, sections: RunConfig) -> Iterator[Problem]:
        """The head fits, and nothing asks for tokens."""
        task, head, (allowed, words, example) = sections.task.name, sections.model.head or (), self.names
        if len(head) not in allowed or len(set(head)) < len(head):
            rule = f"task={task} needs {words}"
            yield Problem("model.head", sections.model.head, rule, f"set model.head={example}")
        if sections.data.labelled is None:
            yield Problem("data.labelled", None, f"is needed by task={task}", "choose data=labelled")
        for key, value, off in (
            ("evaluation.interval", sections.evaluation.interval, "null"),
            ("sample.enabled", sections.sample.enabled, "false"),
        ):
            if value:
                yield Problem(key, value, f"needs the logits of tokens, and task={task} has none", f"set {key}={off}")


def token_losses(batch: MicroBatch, model: Model) -> "Tensor":
    """What this pipeline stage makes of a micro-batch: on the last one the losses that `sum_losses` takes."""
    return model(
        batch["tokens"],
        batch["position_ids"],
        attention_mask=batch.get("document_ids"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        padding_mask=batch.get("padding"),
    )


def sum_losses(losses: "Tensor", loss_mask: "Tensor") -> LossSum:
    """Sum the losses of the tokens that count.

    Args:
        losses: ``[b, s/cp]`` per token; in evaluation ``[2, b, s/cp]``, the second row being 1 for a right guess.
        loss_mask: ``[b, s/cp]``, 1 where the token counts.

    Returns:
        The sum (differentiable), the number of tokens (int32), and ``loss``, ``tokens`` and in evaluation ``hits`` in
        float64.
    """
    mask = loss_mask.float()
    per_token = losses if losses.dim() == 2 else losses[0]
    total, counted = (per_token * mask).sum(), mask.sum()
    sums = {"loss": total.detach().double(), "tokens": counted.double()}
    if losses.dim() == 3:
        sums["hits"] = (losses[1] * mask).sum().double()
    return total, counted.int(), sums
