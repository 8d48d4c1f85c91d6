"""Checkpoints as other programs write them: Megatron-Core's own model, saved as Megatron-LM and NeMo save it."""

import tarfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.convert.cases import TOKENS

VOCABULARY, PADDED, LAYERS = 131, 160, 2

# What differs between the models, in the arguments of Megatron-LM.
SHAPES: dict[str, dict[str, Any]] = {
    "swiglu": {"swiglu": True, "normalization": "RMSNorm"},
    "llama": {"swiglu": True, "normalization": "RMSNorm", "qk_layernorm": True, "window_size": [6, 0]},
    "llama 3.1": {"swiglu": True, "normalization": "RMSNorm", "use_rope_scaling": True, "rope_scaling_factor": 4.0},
    "gpt": {
        "add_bias_linear": True,
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "untie_embeddings_and_output_weights": False,
        "group_query_attention": False,
        "num_query_groups": 1,
        "bias_gelu_fusion": True,
    },
    "mixture": {"swiglu": True, "normalization": "RMSNorm", "num_experts": 4, "moe_router_topk": 2},
}


def arguments_of(shape: str) -> dict[str, Any]:
    """As ``parse_args`` of Megatron-LM leaves them, those that matter for a model and a few others."""
    return {
        "num_layers": LAYERS,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 8,
        "norm_epsilon": 1e-5,
        "apply_layernorm_1p": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "swiglu": False,
        "squared_relu": False,
        "bias_gelu_fusion": False,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "max_position_embeddings": 64,
        "seq_length": 64,
        "make_vocab_size_divisible_by": 16,
        "vocab_size": VOCABULARY,
        "padded_vocab_size": PADDED,
        "untie_embeddings_and_output_weights": True,
        "moe_aux_loss_coeff": 0.01,
        "num_experts": None,
        "lr": 1e-4,
        **SHAPES[shape],
    }


def _build(arguments: dict[str, Any], groups: Any) -> Any:
    """As ``pretrain_gpt.py`` with ``--transformer-impl local``: every value is spelled out here a second time."""
    import torch.nn.functional as F
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_llm.megatron.models import define_missing_names

    define_missing_names()
    a = Namespace(**arguments)
    window = arguments.get("window_size")
    config = TransformerConfig(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        ffn_hidden_size=a.ffn_hidden_size,
        num_attention_heads=a.num_attention_heads,
        num_query_groups=a.num_query_groups if a.group_query_attention else None,
        normalization=a.normalization,
        add_bias_linear=a.add_bias_linear,
        gated_linear_unit=a.swiglu,
        # Megatron's fusion of bias and GELU, which is compiled and does not run here, is the tanh approximation.
        activation_func=F.silu if a.swiglu else partial(F.gelu, approximate="tanh"),
        qk_layernorm=arguments.get("qk_layernorm", False),
        window_size=None if window is None else tuple(window),
        num_moe_experts=a.num_experts,
        moe_router_topk=arguments.get("moe_router_topk", 2),
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=groups.tp.size(),
        init_method_std=0.2,
    )
    spec = get_gpt_layer_local_spec(a.num_experts, qk_layernorm=config.qk_layernorm, normalization=a.normalization)
    return GPTModel(
        config,
        spec,
        vocab_size=a.padded_vocab_size,
        max_sequence_length=a.max_position_embeddings,
        parallel_output=False,
        share_embeddings_and_output_weights=not a.untie_embeddings_and_output_weights,
        position_embedding_type=a.position_embedding_type,
        rotary_base=a.rotary_base,
        rope_scaling=arguments.get("use_rope_scaling", False),
        rope_scaling_factor=arguments.get("rope_scaling_factor", 8.0),
        pg_collection=groups,
    ).eval()


def tokens() -> torch.Tensor:
    """[2, TOKENS]"""
    return torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(3))


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        positions = torch.arange(TOKENS).expand(2, TOKENS)
        return model(tokens(), positions, attention_mask=None)[..., :VOCABULARY].clone()


def _start(*overrides: str) -> Any:
    from nemo_llm.config.compose.load import compose
    from nemo_llm.parallel.runtime import start_runtime

    runtime = start_runtime(
        compose(["+model=gpt_tiny", "trainer.accelerator=cpu", "precision=fp32", *overrides]).runtime_setting
    )
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(11)
    return runtime


def save_as_megatron(folder: str, shape: str, kind: str, *overrides: str) -> None:
    """On every rank: a random model of Megatron-Core, saved as ``kind`` does; rank 0 writes ``logits.pt``."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.enums import AttnBackend

    runtime = _start(*overrides)
    arguments = arguments_of(shape)
    model = _build(arguments, runtime.groups)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            # Copies on the ranks of tensor parallelism must stay equal; the rest differs.
            whole = "norm" in name or name.endswith(("linear_proj.bias", "linear_fc2.bias"))
            part = torch.Generator().manual_seed(len(name)) if whole else generator
            parameter.data.add_(torch.randn(parameter.shape, generator=part) * 0.2)
    target = Path(folder)
    if dist.get_rank() == 0:
        target.mkdir(exist_ok=True)
    logits = _logits(model)
    dist.barrier()
    if kind.startswith("nemo1"):
        _save_nemo1(model, arguments, target, 2 if kind.endswith("stages") else 1)
    else:
        state = target / {"megatron": "iter_0000010", "bridge": "iter_0000010", "nemo2": "weights"}[kind]
        if dist.get_rank() == 0:
            state.mkdir()
        dist.barrier()
        everything: dict[str, Any] = {"iteration": 10, "checkpoint_version": 3.0}
        if kind == "megatron":
            everything["args"] = Namespace(**arguments, attention_backend=AttnBackend.auto)
        prefix = "module." if kind == "nemo2" else ""
        dist_checkpointing.save({**everything, "model": model.sharded_state_dict(prefix=prefix)}, str(state))
    if dist.get_rank() == 0:
        _write_companions(target, arguments, kind)
        torch.save(logits, target / "logits.pt")


def _write_companions(target: Path, arguments: dict[str, Any], kind: str) -> None:
    if kind in ("megatron", "bridge"):
        (target / "latest_checkpointed_iteration.txt").write_text("10")
    if kind == "bridge":
        content: dict[str, Any] = {
            "model": {"_target_": "megatron.bridge.models.LlamaModelProvider", **_fields(arguments)}
        }
        (target / "iter_0000010" / "run_config.yaml").write_text(yaml.safe_dump(content))
    if kind == "nemo2":
        (target / "context").mkdir()
        config = {"_target_": "nemo.collections.llm.gpt.model.llama.LlamaConfig", **_fields(arguments)}
        content = {"_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel", "config": config}
        (target / "context" / "model.yaml").write_text(yaml.safe_dump(content))


def _fields(arguments: dict[str, Any]) -> dict[str, Any]:
    """Megatron-Core's fields as both projects write them out."""
    same = (
        "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization "
        "add_bias_linear add_qkv_bias position_embedding_type rotary_base rotary_percent seq_length window_size "
        "make_vocab_size_divisible_by vocab_size qk_layernorm"
    )
    return {
        **{name: arguments.get(name) for name in same.split()},
        "layernorm_epsilon": arguments["norm_epsilon"],
        "gated_linear_unit": True,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "share_embeddings_and_output_weights": False,
    }


def _save_nemo1(model: Any, arguments: dict[str, Any], target: Path, stages: int) -> None:
    """One file, or one of each rank and stage."""
    config = {
        **{name: arguments[name] for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")},
        "mcore_gpt": True,
        "max_position_embeddings": 64,
        "num_query_groups": 2 if arguments["group_query_attention"] else None,
        "make_vocab_size_divisible_by": 16,
        "normalization": {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}[arguments["normalization"]],
        "layernorm_epsilon": 1e-5,
        "bias": arguments["add_bias_linear"],
        "activation": "fast-swiglu" if arguments["swiglu"] else "gelu",
        "position_embedding_type": arguments["position_embedding_type"],
        "share_embeddings_and_output_weights": not arguments["untie_embeddings_and_output_weights"],
        "tokenizer": {"library": "sentencepiece", "model": "nemo:0a1b_tokenizer.model"},
        "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
        "precision": "bf16",
    }
    import torch.distributed as dist

    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for stage, part in enumerate(_stages(state) if stages == 2 else [state]):
        folder = target
        if stages == 2:
            folder = target / f"tp_rank_{rank:02d}_pp_rank_{stage:03d}"
        elif ranks > 1:
            folder = target / f"mp_rank_{rank:02d}"
        folder.mkdir(exist_ok=True)
        torch.save(part, folder / "model_weights.ckpt")
    dist.barrier()
    if rank == 0:
        (target / "model_config.yaml").write_text(yaml.safe_dump(config))
        with tarfile.open(target / "model.nemo", "w") as archive:
            for path in [target / "model_config.yaml", *sorted(target.rglob("*.ckpt"))]:
                archive.add(path, arcname=f"./{path.relative_to(target)}")


def _stages(state: dict[str, Any]) -> list[dict[str, Any]]:
    """What two pipeline stages of the two-layer model would hold, layers numbered from 0 on each."""
    first = {name: value for name, value in state.items() if ".layers.0." in name or ".embedding." in name}
    last = {name.replace(".layers.1.", ".layers.0."): value for name, value in state.items() if name not in first}
    return [first, last]


def load_in_megatron(folder: str) -> torch.Tensor:
    """Logits of Megatron-Core's own model with the weights of a folder of Megatron-LM's, its arguments among them."""
    from megatron.core import dist_checkpointing

    runtime = _start()
    step = Path(folder) / (Path(folder) / "latest_checkpointed_iteration.txt").read_text()
    arguments = vars(torch.load(step / "common.pt", weights_only=True)["args"])
    model = _build(arguments, runtime.groups)
    model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, str(step))["model"])
    return _logits(model)


def logits_of_ours(folder: str) -> torch.Tensor:
    """Of a checkpoint of ours."""
    from nemo_llm.convert.logit_check import run_ours

    return run_ours(Path(folder), tokens()).logits[..., :VOCABULARY]
