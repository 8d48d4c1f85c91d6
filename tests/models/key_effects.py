"""What one change of a configuration does to a tiny model: its figures, its parameters, or nothing."""

import dataclasses
from typing import Any

BASE = (
    "+model=gpt_tiny", "data=mock", "tokenizer=byte", "trainer.accelerator=cpu", "data.seq_length=32",
    "trainer.global_batch_size=2", "trainer.micro_batch_size=2", "model.num_layers=2", "model.hidden_size=32",
    "model.num_attention_heads=4", "model.num_query_groups=2", "model.ffn_hidden_size=48", "optim.lr=1e-2",
    "optim.sched.warmup_steps=0", "exp_manager.enabled=false",
)  # fmt: skip
EXPERTS = (
    "model.moe={num_moe_experts:8,moe_router_topk:2,moe_ffn_hidden_size:32,moe_aux_loss_coeff:0.01,"
    "moe_z_loss_coeff:null,moe_router_load_balancing_type:aux_loss,moe_router_score_function:softmax,"
    "moe_router_pre_softmax:false,moe_token_dispatcher_type:alltoall,moe_shared_expert_intermediate_size:32,"
    "moe_layer_freq:1,moe_grouped_gemm:false}"
)
LATENT = "model.mla={q_lora_rank:16,kv_lora_rank:16,qk_head_dim:8,qk_pos_emb_head_dim:4,v_head_dim:8}"
YARN = (
    "model.rope_scaling={type:yarn,factor:4.0,original_max_position_embeddings:4096,beta_fast:32.0,beta_slow:1.0,"
    "mscale:1.0,mscale_all_dim:0.5}"
)
LLAMA3 = (
    "model.rope_scaling={type:llama3,factor:4.0,low_freq_factor:1.0,high_freq_factor:4.0,"
    "original_max_position_embeddings:16}"
)
MODELS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "experts": (EXPERTS,),
    "bf16 experts": (EXPERTS, "precision=bf16"),
    "sigmoid experts": (EXPERTS, "model.moe.moe_router_score_function=sigmoid"),
    "one expert": (EXPERTS, "model.moe.moe_router_topk=1", "model.moe.moe_router_pre_softmax=true"),
    "latent": (LATENT, "model.num_query_groups=4"),
    "latent yarn": (LATENT, "model.num_query_groups=4", YARN),
    "learned": ("model.position_embedding_type=learned_absolute",),
    "plain MLP": ("model.gated_linear_unit=false",),
    "window": ("model.window_size=8",),
    "local": ("model.window_size=8", "model.window_attn_skip_freq=2", "model.rotary_local_base=100.0"),
    "normed heads": ("model.qk_layernorm=true",),
    "yarn": (YARN,),
    "llama3": (LLAMA3,),
}


def changed(model: str, change: dict[str, Any]) -> Any:
    """The configuration of a model of `MODELS` with some keys set; keys are dotted, below ``model``."""
    from nemo_llm.config.compose.load import compose, decode, to_dict

    settings = [*BASE, *MODELS[model]]
    if any(setting.startswith("precision=") for setting in settings):
        settings.remove("+model=gpt_tiny")
        settings = ["+model=gpt_1b", "model.share_embeddings_and_output_weights=true", *settings]
    mapping = to_dict(compose(settings))
    for key, value in change.items():
        *path, leaf = key.split(".")
        place = mapping["model"]
        for part in path:
            place = place[part]
        place[leaf] = value
    return decode(mapping)


@dataclasses.dataclass(frozen=True)
class Effect:
    """Loss and norm of each step, parameters at the start (names, shapes, sums), and Megatron's configuration."""

    figures: list[tuple[float, float]]
    parameters: list[tuple[str, tuple[int, ...], float]]
    config: dict[str, Any]

    @property
    def numbers(self) -> tuple[Any, ...]:
        """What a key that changes the arithmetic changes."""
        return self.figures, self.parameters


def effects(cases: list[tuple[str, dict[str, Any]]], steps: int) -> list[Effect]:
    """Run each case; on one rank."""
    from megatron.core.utils import get_model_config

    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    runtime, found = None, []
    for model, change in cases:
        cfg = changed(model, change)
        runtime = runtime or start_runtime(cfg.runtime_setting)
        run = build_training_run(cfg, runtime)
        (chunk,) = run.model
        parameters = [(name, tuple(p.shape), float(p.detach().double().sum())) for name, p in chunk.named_parameters()]
        config = dict(vars(get_model_config(chunk)))
        config = {name: value for name, value in config.items() if isinstance(value, bool | int | float | str)}
        results = [train_step(run) for _ in range(steps)]
        found.append(Effect([(result.loss, result.grad_norm) for result in results], parameters, config))
    return found
