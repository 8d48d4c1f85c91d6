"""Linear layers and the embedding of our own against Megatron's: the same values and gradients, bit by bit on CPU."""

import pytest

from tests.ranks import RankPool


def _linear(column: bool, bias: bool, frozen: bool) -> list[bool]:
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_llm.megatron.models import offer_gradient_accumulation
    from nemo_llm.models.layers.linear import WholeColumnLinear, WholeRowLinear
    from nemo_llm.models.layers.main_grad import accumulate

    offer_gradient_accumulation(accumulate)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=2,
        gradient_accumulation_fusion=True,
        use_cpu_initialization=True,
    )
    settings = {"config": config, "init_method": torch.nn.init.normal_, "bias": bias, "skip_bias_add": False}
    settings |= {"tp_group": dist.group.WORLD} | ({} if column else {"input_is_parallel": True})
    kinds = (ColumnParallelLinear, WholeColumnLinear) if column else (RowParallelLinear, WholeRowLinear)
    theirs, ours = (kind(24, 40, **settings) for kind in kinds)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for layer in (theirs, ours):
        layer.weight.requires_grad_(not frozen)
        layer.weight.main_grad, layer.weight.grad_added_to_main_grad = torch.ones(40, 24), False
        x = torch.randn(5, 3, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output, _ = layer(x)
        (output * torch.arange(40.0)).sum().backward()
        announced = layer.weight.grad_added_to_main_grad
        results.append((output.detach(), x.grad, layer.weight.main_grad, layer.bias.grad if bias else x, announced))
    return [a == b if isinstance(a, bool) else torch.equal(a, b) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("column", [True, False])
@pytest.mark.parametrize(("bias", "frozen"), [(False, False), (True, False), (False, True)])
def test_whole_linear_equals_megatrons(ranks: RankPool, column: bool, bias: bool, frozen: bool) -> None:
    assert ranks.run(_linear, 1, column, bias, frozen) == [[True] * 5]


def _embedding(scattered: bool) -> list[float]:
    """Largest differences of output and gradient from Megatron's, on this rank."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_llm.models.layers.embedding import Embedding

    world = dist.get_world_size()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        use_cpu_initialization=True,
        tensor_model_parallel_size=world,
        sequence_parallel=scattered,
    )
    layers = [
        kind(64, 8, init_method=torch.nn.init.normal_, reduce_scatter_embeddings=scattered, config=config)
        for kind in (VocabParallelEmbedding, Embedding)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    tokens = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(2))
    results = []
    for layer in layers:
        # Three of the rows are given already, as by an earlier micro-batch.
        layer.weight.main_grad = torch.zeros(64 // world, 8)
        layer.weight.main_grad[:3] = 1.0
        layer.weight.grad_added_to_main_grad = False
        output = layer(tokens)
        (output * torch.arange(8.0)).sum().backward()
        if not layer.weight.grad_added_to_main_grad:
            layer.weight.main_grad += layer.weight.grad
        results.append((output.detach(), layer.weight.main_grad))
    return [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize(("world_size", "scattered"), [(1, False), (2, False), (2, True)])
def test_embedding_equals_megatrons(ranks: RankPool, world_size: int, scattered: bool) -> None:
    for output, gradient in ranks.run(_embedding, world_size, scattered):
        assert output == 0.0
        assert gradient < 1e-5
