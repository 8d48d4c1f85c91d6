"""Which layers lie on which pipeline stage and model chunk; pure Python, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_llm.config.sections.parallelism import ParallelismConfig
from nemo_llm.config.sections.pipeline_layout import parse_pipeline_layout


@dataclass(frozen=True, slots=True)
class PipelineStage:
    """One model chunk: its layers (global numbers from 0), and whether it embeds tokens or computes the loss."""

    pp_rank: int
    vp_rank: int
    layers: range
    has_embedding: bool
    has_loss: bool


@dataclass(frozen=True, slots=True)
class StagePlan:
    """All model chunks of a pipeline, in execution order (chunk 0 of every stage, then chunk 1, ...)."""

    pp: int
    vp: int
    stages: tuple[PipelineStage, ...]

    def stage(self, pp_rank: int, vp_rank: int = 0) -> PipelineStage:
        """The chunk `vp_rank` of pipeline stage `pp_rank`."""
        return self.stages[vp_rank * self.pp + pp_rank]

    def chunks(self, pp_rank: int) -> tuple[PipelineStage, ...]:
        """All chunks of pipeline stage `pp_rank`."""
        return tuple(self.stage(pp_rank, vp_rank) for vp_rank in range(self.vp))

    def num_layers(self, pp_rank: int) -> int:
        """Layers that pipeline stage `pp_rank` holds, over all its chunks."""
        return sum(len(chunk.layers) for chunk in self.chunks(pp_rank))

    def table(self) -> str:
        """The plan as text: one row a pipeline stage, one column a chunk."""
        header = ["stage"] + ([f"chunk {vp_rank}" for vp_rank in range(self.vp)] if self.vp > 1 else ["layers"])
        rows = [[str(rank), *(_describe(chunk) for chunk in self.chunks(rank))] for rank in range(self.pp)]
        return format_table([header, *rows])


def plan_stages(num_layers: int, parallelism: ParallelismConfig) -> StagePlan:
    """Stages for `num_layers` layers: even, or as `pipeline_model_parallel_layout` says.

    Raises:
        ValueError: the layers do not divide evenly, or the layout string disagrees with the sizes or the layer count.
    """
    pp = parallelism.pipeline_model_parallel_size
    vp = parallelism.virtual_pipeline_model_parallel_size or 1
    if parallelism.pipeline_model_parallel_layout is None:
        per_chunk, rest = divmod(num_layers, pp * vp)
        if rest or not per_chunk:
            raise ValueError(f"{num_layers} layers do not divide evenly over {pp} stages x {vp} chunks")
        counts = [per_chunk] * (pp * vp)
        embedding, loss = 0, pp * vp - 1
    else:
        parts = parse_pipeline_layout(parallelism.pipeline_model_parallel_layout)
        counts = [part.num_layers for part in parts]
        if len(parts) != pp * vp:
            raise ValueError(f"the layout has {len(parts)} stages, but PP x VPP is {pp} x {vp} = {pp * vp}")
        if sum(counts) != num_layers:
            raise ValueError(f"the layout has {sum(counts)} layers, but the model has {num_layers}")
        embedding = next(place for place, part in enumerate(parts) if part.has_embedding)
        loss = next(place for place, part in enumerate(parts) if part.has_loss)
    stages = []
    for place, count in enumerate(counts):
        vp_rank, pp_rank = divmod(place, pp)
        first = sum(counts[:place])
        stages.append(PipelineStage(pp_rank, vp_rank, range(first, first + count), place == embedding, place == loss))
    return StagePlan(pp, vp, tuple(stages))


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """`rows` (the first is the header) as aligned plain text: first column left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _describe(chunk: PipelineStage) -> str:
    layers = {0: [], 1: [f"{chunk.layers.start}"]}.get(
        len(chunk.layers), [f"{chunk.layers.start}-{chunk.layers.stop - 1}"]
    )
    parts = ["embedding"] * chunk.has_embedding + layers + ["loss"] * chunk.has_loss
    return " + ".join(parts) or "(empty)"
