"""The peer: Megatron-Core's own model and training step with Transformer Engine, as its documentation advises.

``python -m benchmarks.peer_megatron --model gpt_1b --micro-batch 4 --micro-batches 4 [--fp8]`` on one GPU, or under torchrun, data
parallel: Transformer Engine's layers, fused rotary embedding and cross-entropy, grouped products of experts, distributed
optimizer with fp32 gradients; on several GPUs the reduction of gradients and the gathering of weights overlapped. Random
tokens. Prints one JSON line beginning with RESULT, in the terms of step_speed.
"""

import argparse
import json
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F

SHAPES = {
    "llama3_1b": {"layers": 16, "hidden": 2048, "heads": 32, "groups": 8, "ffn": 8192, "vocab": 128256, "tied": True},
    "llama3_8b": {"layers": 32, "hidden": 4096, "heads": 32, "groups": 8, "ffn": 14336, "vocab": 128256, "tied": False},
    "gpt_1b": {"layers": 24, "hidden": 2048, "heads": 16, "groups": 16, "ffn": 5440, "vocab": 50304, "tied": False, "layer_norm": True},
    "moe": {
        "layers": 6, "hidden": 2048, "heads": 32, "groups": 8, "ffn": 7168, "vocab": 50304, "tied": False, "experts": 8,
    },
}  # fmt: skip


def transformer_config(shape: dict, fp8: bool):
    """Megatron's configuration with what it offers for speed."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings: dict = {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    }
    settings = settings if fp8 else {}
    if "experts" in shape:
        settings |= {
            "num_moe_experts": shape["experts"], "moe_router_topk": 2, "moe_ffn_hidden_size": shape["ffn"],
            "moe_grouped_gemm": True, "moe_token_dispatcher_type": "alltoall", "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 0.02, "moe_permute_fusion": True,
        }  # fmt: skip
    return TransformerConfig(
        num_layers=shape["layers"], hidden_size=shape["hidden"], num_attention_heads=shape["heads"],
        num_query_groups=shape["groups"], ffn_hidden_size=shape["ffn"], bf16=True, params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16, hidden_dropout=0.0, attention_dropout=0.0, gated_linear_unit=True,
        activation_func=F.silu, normalization="LayerNorm" if "layer_norm" in shape else "RMSNorm",
        layernorm_zero_centered_gamma="layer_norm" in shape, add_bias_linear=False, bias_activation_fusion=True,
        bias_dropout_fusion=True, apply_rope_fusion=True, gradient_accumulation_fusion=False,
        cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="te", **settings,
    )  # fmt: skip


def build_step(arguments: argparse.Namespace, shape: dict) -> Callable[[], float]:
    """A function that takes one optimizer step and returns the last micro-batch's loss."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    parallel_state.initialize_model_parallel(1, 1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = transformer_config(shape, arguments.fp8)
    experts = {"num_experts": shape["experts"], "moe_grouped_gemm": True} if "experts" in shape else {}
    model = GPTModel(
        config,
        get_gpt_layer_with_transformer_engine_spec(**experts),
        shape["vocab"],
        arguments.seq,
        position_embedding_type="rope",
        rotary_percent=0.5 if "layer_norm" in shape else 1.0,
        share_embeddings_and_output_weights=shape["tied"],
    )
    overlapped = dist.get_world_size() > 1
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlapped,
        overlap_param_gather=overlapped,
    )
    model = DistributedDataParallel(config, ddp_config, model.cuda().bfloat16())
    settings = {"bf16": True, "params_dtype": torch.bfloat16, "use_distributed_optimizer": True, "clip_grad": 1.0}
    settings["overlap_param_gather"] = overlapped
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-4, **settings), [model])
    config.no_sync_func = model.no_sync if overlapped else None
    config.finalize_model_grads_func = finalize_model_grads
    size = (arguments.micro_batch, arguments.seq + 1)
    positions = torch.arange(arguments.seq, device="cuda").expand(arguments.micro_batch, -1)

    def forward(_batches, module):
        tokens = torch.randint(0, shape["vocab"], size, device="cuda")
        losses = module(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())

        def mean(output):
            loss = output.float().mean()
            return loss, {"loss": loss.detach()}

        return losses, mean

    run = get_forward_backward_func()

    def step() -> float:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = run(
            forward_step_func=forward,
            data_iterator=None,
            model=model,
            num_microbatches=arguments.micro_batches,
            seq_length=arguments.seq,
            micro_batch_size=arguments.micro_batch,
            forward_only=False,
        )
        optimizer.step()
        return losses[-1]["loss"].item()

    return step


def main() -> None:
    """Build, warm up, time, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=SHAPES, default="gpt_1b")
    parser.add_argument("--layers", type=int, default=None, help="fewer than the shape has")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--name", default="Megatron-Core with Transformer Engine")
    arguments = parser.parse_args()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if "RANK" not in os.environ:
        port = str(20000 + os.getpid() % 20000)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    shape = SHAPES[arguments.model]
    take_step = build_step(arguments, {**shape, "layers": arguments.layers or shape["layers"]})
    times = []
    for _ in range(arguments.warm + arguments.steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        loss = take_step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    step = sorted(times[arguments.warm :])[arguments.steps // 2]
    row = {
        "name": arguments.name,
        "devices": dist.get_world_size(),
        "step_ms": round(step * 1e3, 1),
        "tokens_per_second_per_device": round(arguments.micro_batch * arguments.micro_batches * arguments.seq / step),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "loss_last": round(loss, 4),
    }
    if dist.get_rank() == 0:
        print("RESULT", json.dumps(row), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
