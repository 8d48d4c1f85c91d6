"""Prompt tuning (arXiv:2104.08691) and p-tuning (arXiv:2103.10385): learned vectors in place of some tokens.

In a sample the id ``-1 - i`` stands for virtual token ``i``. Ids travel as all others do, so pipeline, context and
sequence parallelism need to know nothing of it.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import VocabParallelEmbedding

from nemo_llm.peft.adapter import Adapter, Placement


class PromptAdapter(Adapter):
    """Vectors of the virtual tokens; with ``encoder_size`` they are the output of an MLP on learned vectors.

    Args:
        embedding: the word embedding whose ids they join.
        num_tokens: virtual tokens.
        encoder_size: width of the MLP; None trains the vectors themselves.
        pg_collection: Megatron's process groups.
    """

    def __init__(
        self, embedding: VocabParallelEmbedding, num_tokens: int, encoder_size: int | None, pg_collection: object
    ) -> None:
        super().__init__()
        # The embedding returns this rank's tokens alone when it scatters by itself.
        self.scattered = bool(embedding.reduce_scatter_embeddings)
        self.group = embedding.tp_group
        self.encoded = encoder_size is not None
        weight = embedding.weight
        h = weight.shape[1]
        shapes: dict[str, tuple[int, ...]] = {"vectors": (num_tokens, h)}
        if encoder_size is not None:
            e = encoder_size
            shapes |= {"w0": (e, h), "b0": (e,), "w2": (e, e), "b2": (e,), "w4": (h, e), "b4": (h,)}
        rank, size = self.group.rank(), self.group.size()
        replica = dist.get_rank(pg_collection.dp_cp)  # type: ignore[attr-defined]
        for name, shape in shapes.items():
            self.add(
                name,
                weight.new_zeros(shape),
                Placement(f"prompt.{name}", None, (rank, size), replica),
                tensor_model_parallel=False,
                sequence_parallel=self.scattered,
                allreduce=True,
            )

    def initial_std(self, placement: Placement) -> float | None:
        """Of vectors that of embeddings; of the MLP's matrices one over the root of their width."""
        leaf = placement.name.rpartition(".")[2]
        if leaf.startswith("b"):
            return None
        return 0.02 if leaf == "vectors" else getattr(self, leaf).shape[1] ** -0.5

    def table(self) -> torch.Tensor:
        """Vectors of all virtual tokens, ``[num_tokens, h]``."""
        if not self.encoded:
            return self.vectors
        hidden = F.relu(F.linear(self.vectors, self.w0, self.b0))
        hidden = F.relu(F.linear(hidden, self.w2, self.b2))
        return F.linear(hidden, self.w4, self.b4)

    def replace(self, ids: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """``embedded`` with the vectors of virtual tokens where ``ids`` ``[b, s]`` are negative."""
        if self.scattered:
            ids = ids.t().chunk(self.group.size(), 0)[self.group.rank()]
        rows = self.table()[(-1 - ids).clamp(min=0)]
        return torch.where((ids < 0)[..., None], rows, embedded)
