"""Every cross-section check: refused with key and value in the message, accepted once put right."""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from nemo_llm.config import RunConfig
from nemo_llm.config.checks import RUN_CHECKS, SETTING_CHECKS, check, find_problems
from nemo_llm.config.compose.load import compose, decode, to_dict
from nemo_llm.errors import ConfigError

# (arguments, processes, key, words of the message, arguments that put it right)
# fmt: off
LATENT = "model.mla={q_lora_rank:null,kv_lora_rank:33,qk_head_dim:16,qk_pos_emb_head_dim:8,v_head_dim:16}"
SELECTIVE = "parallelism.recompute_granularity=selective parallelism.recompute_modules="
UNIFORM = "parallelism.recompute_granularity=full parallelism.recompute_method=uniform parallelism.recompute_num_layers"
CASES: list[tuple[str, int, str, list[str], str | None]] = [
    (f"model=gpt_tiny {LATENT}", 1, "model.num_query_groups", ["every head"], "model.num_query_groups=6"),
    (f"model=gpt_tiny {LATENT} parallelism=tp2", 2, "model.mla.kv_lora_rank", ["41 rows"], None),
    (f"model=gpt_tiny {LATENT} model.rotary_percent=0.5", 1, "model.position_embedding_type", ["rotary"],
     "model.rotary_percent=1.0"),
    (f"model=gpt_tiny {LATENT} model.rope_scaling={{type:linear,factor:2.0}}", 1, "model.rope_scaling.type", ["yarn"],
     "model.rope_scaling=null"),
    (f"model=gpt_tiny {LATENT} peft=lora", 1, "peft.kind", ["latent"], None),
    (f"model=gpt_tiny {LATENT} precision=fp8_tensorwise", 1, "precision.fp8", ["latent"], "precision=bf16"),
    (f"model=gpt_tiny {LATENT} model.attn_logit_softcapping=20.0", 1, "model.attn_logit_softcapping", ["latent"],
     "model.attn_logit_softcapping=null"),
    (f"model=gpt_tiny {LATENT} model.qk_layernorm=true", 1, "model.qk_layernorm", ["latent"],
     "model.qk_layernorm=false"),
    ("model=gpt_tiny model.mcore_overrides={qk_clip:true}", 1, "model.mcore_overrides.qk_clip", ["not built"],
     "model.mcore_overrides={}"),
    ("model=gpt_tiny model.mcore_overrides={hidden_size:64}", 1, "model.mcore_overrides.hidden_size",
     ["model.hidden_size"], "model.mcore_overrides={}"),
    ("model=gpt_tiny model.mcore_overrides={glu_linear_ofset:1.0}", 1, "model.mcore_overrides.glu_linear_ofset",
     ["glu_linear_offset"], "model.mcore_overrides={}"),
    ("model=moe_tiny model.mcore_overrides={moe_token_drop_policy:last}", 1,
     "model.mcore_overrides.moe_token_drop_policy", ["'last'", "probs or position"], "model.mcore_overrides={}"),
    ("model=moe_tiny model.mcore_overrides={moe_expert_capacity_factor:2.5}", 1,
     "model.mcore_overrides.moe_expert_capacity_factor", ["more tokens than there are"],
     "model.mcore_overrides={moe_expert_capacity_factor:2.0}"),
    ("model=gpt_tiny model.mcore_overrides={no_rope_freq:9}", 1, "model.mcore_overrides.no_rope_freq",
     ["num_layers"], "model.mcore_overrides={no_rope_freq:4}"),
    ("model=gpt_tiny optim.name=muon", 1, "optim.name", ["optim=muon"], "optim.name=adam"),
    ("model=gpt_tiny optim=muon peft=lora", 1, "optim.name", ["lora", "AdamW"], None),
    ("model=gpt_tiny optim=muon performance.offload_optimizer_moments=true", 1,
     "performance.offload_optimizer_moments", ["momentum"], "performance.offload_optimizer_moments=false"),
    ("model=moe_tiny optim=muon parallelism=tp2 parallelism.use_distributed_optimizer=true", 2,
     "parallelism.expert_tensor_parallel_size", ["experts"], "parallelism.expert_tensor_parallel_size=1"),
    ("model=gpt_tiny performance.offload_activation_layers=2 performance.compile_layers=true", 1,
     "performance.offload_activation_layers", ["compiled"], "performance.compile_layers=false"),
    ("model=gpt_tiny performance.offload_activation_layers=2 parallelism.recompute_granularity=full", 1,
     "performance.offload_activation_layers", ["full"], "performance.offload_activation_layers=0"),
    ("model=gpt_tiny performance.offload_activation_layers=2 parallelism=tp2 parallelism.overlap_grad_reduce=true "
     "parallelism.use_distributed_optimizer=true", 4, "performance.offload_activation_layers", ["announce"],
     "parallelism.overlap_grad_reduce=false"),
    ("model=gpt_tiny parallelism=tp4", 4, "model.num_attention_heads", ["6", "= 4", "1 or 2", "4 or 8"],
     "model.num_attention_heads=8 model.num_query_groups=4"),
    ("model=gpt_tiny parallelism=tp4 model.num_attention_heads=8", 4, "model.num_query_groups", ["2", "= 4"],
     "model.num_query_groups=4"),
    ("model=gpt_tiny parallelism=tp2 model.ffn_hidden_size=511", 2, "model.ffn_hidden_size", ["511", "510 or 512"],
     "model.ffn_hidden_size=512"),
    ("model=gpt_tiny parallelism=tp2 model.make_vocab_size_divisible_by=63", 2,
     "model.make_vocab_size_divisible_by", ["63", "= 2", "62 or 64"], "model.make_vocab_size_divisible_by=64"),
    ("model=gpt_tiny parallelism=tp2 model.make_vocab_size_divisible_by=63 model.vocab_size=567", 2,
     "model.make_vocab_size_divisible_by", ["63", "567 rows"], None),
    ("model=gpt_tiny model.num_query_groups=4", 1, "model.num_query_groups", ["4", "= 6", "1, 2, 3 or 6"],
     "model.num_query_groups=3"),
    ("model=gpt_tiny model.hidden_size=190", 1, "model.hidden_size", ["190", "= 6", "186 or 192"],
     "model.hidden_size=192"),
    ("model=gpt_tiny model.rotary_percent=0.1", 1, "model.rotary_percent", ["0.1", "even"],
     "model.rotary_percent=0.5"),
    ("model=gpt_tiny parallelism.sequence_parallel=true", 1, "parallelism.sequence_parallel", ["True", "above 1"],
     "parallelism.sequence_parallel=false"),
    ("model=moe_tiny parallelism=tp2 parallelism.sequence_parallel=false", 2,
     "parallelism.sequence_parallel", ["False", "= 2", "mixture"], "parallelism.sequence_parallel=true"),
    ("model=gpt_tiny parallelism=cp2 data.seq_length=130", 2, "data.seq_length", ["130", "= 4", "128 or 132"],
     "data.seq_length=132"),
    ("model=gpt_tiny parallelism=tp2 data.seq_length=127", 2, "data.seq_length", ["127", "126 or 128"],
     "data.seq_length=128"),
    ("model=gpt_126m data.seq_length=4096", 1, "data.seq_length", ["4096", "2048"],
     "model.max_position_embeddings=4096"),
    ("model=gpt_tiny parallelism=cp2 model.num_attention_heads=3 model.num_query_groups=1", 2,
     "model.num_attention_heads", ["3", "= 2", "all_gather"], "parallelism.cp_comm_type=all_gather"),
    ("model=gpt_tiny parallelism=cp2 parallelism.cp_comm_type=p2p model.transformer_impl=torch", 2,
     "parallelism.cp_comm_type", ["p2p", "Transformer Engine"], "parallelism.cp_comm_type=all_gather"),
    ("model=llama3_1b model.rope_scaling.type=yarn model.rotary_percent=0.5", 1, "model.rotary_percent",
     ["0.5", "YaRN"], "model.rotary_percent=1.0"),
    ("model=gpt_tiny parallelism=pp2 model.num_layers=5", 2, "model.num_layers", ["5", "= 2", "4 or 6", "1 or 5"],
     "model.num_layers=6"),
    ("model=gpt_tiny parallelism=pp2_vp2 model.num_layers=6", 2, "model.num_layers", ["6", "2 x 2", "4 or 8"],
     "model.num_layers=8"),
    ("model=gpt_tiny parallelism=pp2 model.num_layers=5", 2, "model.num_layers", ["5"],
     "parallelism.pipeline_model_parallel_layout='Et*3|t*2L'"),
    ("model=gpt_tiny parallelism=pp2 parallelism.pipeline_model_parallel_layout='Et|tt|L'", 2,
     "parallelism.pipeline_model_parallel_layout", ["Et|tt|L", "3 stages", "is 2", "Et*2|t*2L"],
     "parallelism.pipeline_model_parallel_layout='Et|ttt,L'"),
    ("model=gpt_tiny parallelism=pp2 parallelism.pipeline_model_parallel_layout='Et|ttL'", 2,
     "parallelism.pipeline_model_parallel_layout", ["Et|ttL", "3 layers", "4"],
     "parallelism.pipeline_model_parallel_layout='E|t*4L'"),
    ("model=gpt_tiny parallelism=pp2 parallelism.pipeline_model_parallel_layout='Exx|ttL'", 2,
     "parallelism.pipeline_model_parallel_layout", ["Exx|ttL", "notation"],
     "parallelism.pipeline_model_parallel_layout='E(tt|)*1ttL'"),
    ("model=gpt_tiny parallelism.virtual_pipeline_model_parallel_size=2", 1,
     "parallelism.virtual_pipeline_model_parallel_size", ["2", "above 1"],
     "parallelism.virtual_pipeline_model_parallel_size=null"),
    ("model=gpt_tiny parallelism=pp2 parallelism.virtual_pipeline_model_parallel_size=1", 2,
     "parallelism.virtual_pipeline_model_parallel_size", ["1", "null"],
     "parallelism.virtual_pipeline_model_parallel_size=null"),
    ("model=gpt_tiny model.rotary_local_base=10000", 1, "model.window_size", ["null", "layers with a window"],
     "model.rotary_local_base=null"),
    ("model=gpt_tiny task=sft", 1, "task.name", ["sft", "no source"], "task=pretrain"),
    ("model=gpt_tiny peft=prompt_tuning peft.num_virtual_tokens=128", 1, "peft.num_virtual_tokens",
     ["128", "data.seq_length = 128"], "peft.num_virtual_tokens=20"),
    ("model=gpt_tiny parallelism=ep2", 2, "parallelism.expert_model_parallel_size", ["2", "no mixture"],
     "parallelism.expert_model_parallel_size=1"),
    ("model=gpt_tiny parallelism=tp2 parallelism.expert_tensor_parallel_size=1", 2,
     "parallelism.expert_tensor_parallel_size", ["1", "no mixture"], "parallelism.expert_tensor_parallel_size=null"),
    ("model=moe_tiny peft=lora peft.base_weights=nf4 parallelism.expert_tensor_parallel_size=2", 2,
     "parallelism.expert_tensor_parallel_size", ["2", "whole layers"], "peft.base_weights=null"),
    ("model=moe_tiny parallelism=ep2 model.moe.num_moe_experts=3", 2,
     "model.moe.num_moe_experts", ["3", "= 2", "1 or 3"], "model.moe.num_moe_experts=6"),
    ("model=moe_tiny parallelism=tp2 model.moe.moe_ffn_hidden_size=255", 2,
     "model.moe.moe_ffn_hidden_size", ["255", "= 2"], "parallelism.expert_tensor_parallel_size=1"),
    ("model=moe_tiny parallelism=tp2 model.moe.moe_shared_expert_intermediate_size=33", 2,
     "model.moe.moe_shared_expert_intermediate_size", ["33", "= 2", "32 or 34"],
     "model.moe.moe_shared_expert_intermediate_size=34"),
    ("model=moe_tiny model.moe.moe_router_topk=5", 1, "model.moe.moe_router_topk", ["5", "= 4"],
     "model.moe.moe_router_topk=4"),
    ("model=moe_tiny model.moe.moe_router_topk=1", 1, "model.moe.moe_router_pre_softmax", ["False"],
     "model.moe.moe_router_pre_softmax=true"),
    ("model=moe_tiny model.add_bias_linear=true", 1, "model.add_bias_linear", ["True"],
     "model.add_bias_linear=false"),
    ("model=moe_tiny model.moe.moe_router_load_balancing_type=global_aux_loss", 1,
     "model.moe.moe_router_load_balancing_type", ["global_aux_loss", "data-parallel"],
     "model.moe.moe_router_load_balancing_type=seq_aux_loss"),
    ("model=moe_tiny model.moe.moe_router_load_balancing_type=sinkhorn", 1,
     "model.moe.moe_aux_loss_coeff", ["0.01", "sinkhorn"], "model.moe.moe_aux_loss_coeff=0.0"),
    ("model=moe_tiny model.moe.moe_router_load_balancing_type=sinkhorn model.moe.moe_aux_loss_coeff=0 parallelism=cp2",
     2, "model.moe.moe_router_load_balancing_type", ["sinkhorn", "= 2"],
     "model.moe.moe_router_load_balancing_type=aux_loss"),
    ("model=gpt_tiny parallelism=tp2", 3,
     "parallelism", ["3 processes", "multiple of 2", "2 or 4"], None),
    ("model=moe_tiny parallelism=ep2", 3, "parallelism.expert_model_parallel_size", ["3 processes", "multiple of 2"],
     None),
    ("model=gpt_tiny trainer.devices=2 trainer.num_nodes=2", 1, "trainer.devices", ["2", "is 4", "1 processes"],
     "trainer.devices=null trainer.num_nodes=null"),
    ("model=gpt_tiny parallelism=dp trainer.devices=3", 4, "trainer.devices", ["3", "4 processes"],
     "trainer.devices=null"),
    ("model=gpt_tiny parallelism=dp trainer.num_nodes=3", 4, "trainer.num_nodes", ["3", "4 processes"],
     "trainer.num_nodes=2"),
    ("model=gpt_tiny parallelism.overlap_param_gather=true parallelism.overlap_grad_reduce=true", 1,
     "parallelism.overlap_param_gather", ["True", "use_distributed_optimizer"],
     "parallelism.use_distributed_optimizer=true"),
    ("model=gpt_tiny parallelism=dp parallelism.overlap_grad_reduce=false", 1,
     "parallelism.overlap_param_gather", ["True", "overlap_grad_reduce"], "parallelism.overlap_param_gather=false"),
    ("model=gpt_tiny trainer.global_batch_size=20", 1, "trainer.global_batch_size", ["20", "8 x 1 = 8", "16 or 24"],
     "trainer.micro_batch_size=4"),
    ("model=gpt_tiny parallelism=dp trainer.global_batch_size=20 trainer.micro_batch_size=5", 3,
     "trainer.global_batch_size", ["20", "5 x 3 = 15", "15 or 30"], "trainer.global_batch_size=30"),
    ("model=gpt_tiny parallelism=pp2_vp2 trainer.global_batch_size=24", 2,
     "trainer.global_batch_size", ["24", "3 micro-batches", "= 2", "16 or 32"], "trainer.global_batch_size=32"),
    ("model=gpt_tiny trainer.rampup_batch_size={start_global_batch_size:64,increment:8,ramp_samples:100}", 1,
     "trainer.rampup_batch_size.start_global_batch_size", ["64", "= 32"],
     "trainer.rampup_batch_size.start_global_batch_size=8"),
    ("model=gpt_tiny trainer.rampup_batch_size={start_global_batch_size:8,increment:16,ramp_samples:100}", 1,
     "trainer.rampup_batch_size.increment", ["16", "24"], "trainer.rampup_batch_size.increment=8"),
    ("model=gpt_tiny trainer.rampup_batch_size={start_global_batch_size:4,increment:28,ramp_samples:100}", 1,
     "trainer.rampup_batch_size.start_global_batch_size", ["4", "by 8"], "trainer.micro_batch_size=4"),
    ("model=gpt_tiny optim.sched.warmup_steps=300", 1, "optim.sched.warmup_steps", ["300", "= 300"],
     "optim.sched.decay_steps=400"),
    ("model=gpt_tiny optim.sched.min_lr=1.0", 1, "optim.sched.min_lr", ["1.0", "0.003", "0.0003"],
     "optim.sched.min_lr=0.0"),
    ("model=gpt_tiny optim/sched=wsd optim.sched.wsd_decay_steps=null", 1,
     "optim.sched.wsd_decay_steps", ["None", "60"], "optim.sched.wsd_decay_steps=60"),
    ("model=gpt_tiny optim/sched=wsd optim.sched.wsd_decay_steps=280", 1,
     "optim.sched.wsd_decay_steps", ["280", "270"], "optim.sched.wsd_decay_steps=270"),
    ("model=gpt_tiny parallelism.recompute_granularity=full parallelism.recompute_num_layers=1", 1,
     "parallelism.recompute_method", ["None", "uniform"], "parallelism.recompute_method=block"),
    ("model=gpt_tiny parallelism.recompute_granularity=full parallelism.recompute_method=block", 1,
     "parallelism.recompute_num_layers", ["None"], "parallelism.recompute_num_layers=1"),
    ("model=gpt_tiny parallelism.recompute_num_layers=1", 1, "parallelism.recompute_num_layers", ["1", "full"],
     "parallelism.recompute_num_layers=null"),
    ("model=gpt_tiny parallelism.recompute_granularity=selective parallelism.recompute_modules=[attention]", 1,
     "parallelism.recompute_modules", ["'attention'", "core_attn"], "parallelism.recompute_modules=[mlp]"),
    (f"model=gpt_tiny {SELECTIVE}[moe]", 1, "parallelism.recompute_modules", ["'moe'"],
     "parallelism.recompute_modules=[mlp]"),
    (f"model=gpt_tiny {SELECTIVE}[]", 1, "parallelism.recompute_modules", ["[]", "named"],
     "parallelism.recompute_modules=[mlp]"),
    ("model=gpt_tiny parallelism.recompute_modules=[mlp]", 1, "parallelism.recompute_modules", ["selective alone"],
     "parallelism.recompute_granularity=selective"),
    (f"model=gpt_tiny {SELECTIVE}[layernorm] model.norm_placement=post", 1, "parallelism.recompute_modules",
     ["'layernorm'", "post"], "parallelism.recompute_modules=[core_attn]"),
    (f"model=gpt_tiny {SELECTIVE}[mlp] model.parallel_residual=true", 1, "parallelism.recompute_modules",
     ["'mlp'", "parallel_residual"], "parallelism.recompute_modules=[layernorm]"),
    (f"model=moe_tiny {SELECTIVE}[mlp]", 1, "parallelism.recompute_modules", ["'mlp'", "experts"],
     "model.moe.moe_layer_freq=2"),
    (f"model=moe_tiny {SELECTIVE}[moe_act]", 1, "parallelism.recompute_modules", ["'moe_act'", "moe_grouped_gemm"],
     "parallelism.recompute_modules=[moe]"),
    (f"model=moe_tiny {SELECTIVE}[shared_experts]", 1, "parallelism.recompute_modules", ["'shared_experts'"],
     "model.moe.moe_shared_expert_intermediate_size=64"),
    (f"model=moe_tiny {SELECTIVE}[moe,shared_experts] model.moe.moe_shared_expert_intermediate_size=64", 1,
     "parallelism.recompute_modules", ["part of moe"], "parallelism.recompute_modules=[shared_experts]"),
    (f"model=gpt_tiny {SELECTIVE}[mla_up_proj]", 1, "parallelism.recompute_modules", ["latent attention"],
     "parallelism.recompute_modules=[mlp]"),
    (f"model=gpt_1b precision=fp8_delayed trainer.check_only=true {SELECTIVE}[layernorm]", 1,
     "parallelism.recompute_modules", ["delayed"], "precision=fp8_tensorwise"),
    (f"model=gpt_tiny {UNIFORM}=3", 1, "parallelism.recompute_num_layers", ["3", "1, 2 or 4"],
     "parallelism.recompute_num_layers=2"),
    (f"model=gpt_tiny parallelism=pp2 {UNIFORM}=4", 2, "parallelism.recompute_num_layers", ["4", "have 2 layers"],
     "parallelism.recompute_num_layers=2"),
    (f"model=gpt_tiny parallelism=pp2 parallelism.pipeline_model_parallel_layout='Ettt|tL' {UNIFORM}=3", 2,
     "parallelism.recompute_num_layers", ["3", "1 or 3 layers"], "parallelism.recompute_num_layers=1"),
    (f"model=gpt_tiny {UNIFORM}=5 parallelism.recompute_method=block", 1, "parallelism.recompute_num_layers",
     ["5", "more than the 4"], "parallelism.recompute_num_layers=4"),
    ("model=gpt_1b precision=fp8_delayed model.transformer_impl=torch trainer.check_only=true", 1,
     "precision.fp8.fp8_recipe", ["'delayed'", "Transformer Engine"], "precision=fp8_tensorwise"),
    ("model=gpt_1b precision=fp8_tensorwise model.transformer_impl=torch parallelism=tp2", 2,
     "parallelism.tensor_model_parallel_size", ["2", "whole weights"], "parallelism.tensor_model_parallel_size=1"),
    ("model=gpt_1b precision=fp8_tensorwise model.transformer_impl=torch model.ffn_hidden_size=1000", 1,
     "model.ffn_hidden_size", ["1000", "multiples of 16"], "model.ffn_hidden_size=1008"),
    ("model=gpt_1b precision=fp8_delayed precision.params_dtype=fp32 trainer.check_only=true", 1,
     "precision.params_dtype", ["'fp32'", "bf16"], "precision.params_dtype=bf16"),
    ("model=llama3_1b model.position_embedding_type=none", 1,
     "model.position_embedding_type", ["'none'", "rope_scaling"], "model.rope_scaling=null"),
    ("model=llama3_1b model.rope_scaling.low_freq_factor=null", 1,
     "model.rope_scaling.low_freq_factor", ["None", "llama3"], "model.rope_scaling.low_freq_factor=1.0"),
    ("model=gpt_tiny model.layer_spec=mine.layers", 1,
     "model.layer_spec", ["'mine.layers'", "package.module:function"], "model.layer_spec='mine.layers:build'"),
    ("model=gpt_tiny model.layer_spec_settings={width:3}", 1,
     "model.layer_spec_settings", ["'width': 3", "model.layer_spec"], "model.layer_spec_settings={}"),
    ("model=gpt_tiny exp_manager.create_wandb_logger=true exp_manager.enabled=false", 1,
     "exp_manager.create_wandb_logger", ["True", "exp_manager.enabled"], "exp_manager.create_wandb_logger=false"),
    ("model=gpt_tiny exp_manager.create_wandb_logger=true exp_manager.wandb_logger_kwargs={entity:me}", 1,
     "exp_manager.wandb_logger_kwargs", ["'entity': 'me'", "project"], "exp_manager.wandb_logger_kwargs.project=p"),
    ("model=gpt_tiny checkpoint.resume=/no/such/run", 1, "checkpoint.resume", ["/no/such/run"],
     "checkpoint.resume=never"),
    ("model=gpt_tiny data.blend=[1.0,/no/such/data]", 1,
     "data.blend[0].path", ["/no/such/data.bin", "/no/such/data.idx"], "data=mock"),
    ("model=gpt_tiny data.blend=[{name:a,text:/no/such.jsonl}]", 1, "data.blend[0].path", ["/no/such.jsonl"],
     "data=mock"),
    ("model=gpt_tiny data.blend=[{name:a,text:'asset:shakespear'}]", 1,
     "data.blend[0].path", ["asset:shakespear", "did you mean asset:shakespeare"], "data=mock"),
    ("model=gpt_tiny data.tokenizer.path=/no/such/tokenizer", 1, "data.tokenizer.path", ["/no/such/tokenizer"],
     "data.tokenizer.path='asset:gpt2'"),
]
# fmt: on


@cache
def composed_groups(groups: tuple[str, ...]) -> RunConfig:
    return compose(groups)


def composed(arguments: str) -> RunConfig:
    """What ``compose(arguments.split())`` makes; groups are composed once and keys set in the mapping, for speed."""
    parsed = [OverridesParser.create().parse_override(argument) for argument in arguments.split()]
    groups = [f"{one.key_or_group}={one.value()}" for one in parsed if "." not in one.key_or_group]
    mapping = to_dict(composed_groups(tuple(groups)))
    for one in parsed:
        *path, leaf = one.key_or_group.split(".")
        if path:
            place = mapping
            for part in path:
                place = place[part]
            place[leaf] = one.value()
    return decode(mapping)


def test_helper_composes_as_hydra_does() -> None:
    arguments = "model=gpt_tiny optim/sched=wsd optim.lr=1.0 trainer.rampup_batch_size={increment:1,ramp_samples:1,start_global_batch_size:1}"  # noqa: E501
    assert composed(arguments) == compose(arguments.split())


@pytest.mark.parametrize(("arguments", "processes", "key", "words", "repair"), CASES, ids=[case[0] for case in CASES])
def test_check(arguments: str, processes: int, key: str, words: list[str], repair: str | None) -> None:
    cfg = composed(arguments)
    before = to_dict(cfg)
    found = find_problems(cfg, processes)
    text = "\n".join(str(problem) for problem in found if problem.key == key)
    for word in words:
        assert word in text, [str(problem) for problem in found]
    assert to_dict(cfg) == before, "checks never change a value"
    if repair is not None:
        repaired = {argument.partition("=")[0] for argument in repair.split()}
        kept = [argument for argument in arguments.split() if argument.partition("=")[0] not in repaired]
        if repair == "data=mock":
            kept = [argument for argument in kept if not argument.startswith("data.")]
        assert key not in {
            problem.key for problem in find_problems(composed(" ".join([*kept, *repair.split()])), processes)
        }


def test_every_check_has_a_case() -> None:
    """Each registered check yields a problem in at least one case."""
    unused = {function.__name__ for function in (*SETTING_CHECKS, *RUN_CHECKS)}
    for arguments, processes, *_ in CASES:
        cfg = composed(arguments)
        setting = cfg.model_setting
        unused -= {function.__name__ for function in SETTING_CHECKS if list(function(setting, processes))}
        unused -= {function.__name__ for function in RUN_CHECKS if list(function(cfg, processes))}
    assert not unused


def test_missing_indexed_file_next_to_a_present_one(tmp_path: Path) -> None:
    (tmp_path / "web.bin").write_bytes(b"")
    cfg = composed(f"model=gpt_tiny data.blend=[1.0,{tmp_path}/web]")
    (problem,) = find_problems(cfg, 1)
    assert "web.idx" in problem.rule
    assert "web.bin" not in problem.rule
    (tmp_path / "web.idx").write_bytes(b"")
    assert not find_problems(cfg, 1)


def test_prefix_with_suffix_is_put_right(tmp_path: Path) -> None:
    (problem,) = find_problems(composed(f"model=gpt_tiny data.blend=[1.0,{tmp_path}/web.bin]"), 1)
    assert problem.fix == f"write {tmp_path}/web"


def test_fp8_needs_transformer_engine_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_llm.config.checks.recipe.find_spec", lambda _name: None)
    found = {problem.key: str(problem) for problem in find_problems(composed("model=gpt_1b precision=fp8_delayed"), 1)}
    assert "delayed" in found["precision.fp8.fp8_recipe"]
    assert "without Transformer Engine" in found["precision.fp8.fp8_recipe"]
    assert not find_problems(composed("model=gpt_1b precision=fp8_tensorwise"), 1)
    loggers = find_problems(composed("model=gpt_tiny exp_manager.create_mlflow_logger=true"), 1)
    assert [problem.key for problem in loggers] == ["exp_manager.create_mlflow_logger"]


def test_all_problems_of_all_checks_come_together() -> None:
    cfg = composed(
        "model=gpt_tiny parallelism=tp4 trainer.global_batch_size=3 optim.sched.min_lr=1.0 data.seq_length=126"
    )
    with pytest.raises(ConfigError) as caught:
        check(cfg, 4)
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {
        "model.num_attention_heads",
        "model.num_query_groups",
        "data.seq_length",
        "trainer.global_batch_size",
        "optim.sched.min_lr",
    }


@pytest.mark.parametrize(
    ("model", "parallelism", "processes"),
    [
        ("gpt_tiny", "single", 1),
        ("gpt_tiny", "dp", 4),
        ("gpt_tiny", "tp2", 2),
        ("gpt_tiny", "tp2_pp2", 4),
        ("gpt_tiny", "pp2_vp2", 2),
        ("gpt_tiny", "cp2", 2),
        ("moe_tiny", "single", 1),
        ("moe_tiny", "ep2", 2),
        ("moe_tiny", "tp2_ep2", 4),
        ("moe_tiny", "tp2_ep2", 2),
        ("gpt_126m", "dp", 8),
        ("gpt_1b", "single", 1),
        ("gpt_5b", "dp", 8),
        ("gpt_7b", "tp2", 8),
        ("gpt_20b", "tp4", 32),
        ("gpt_175b", "tp8_pp8_vp6", 128),
        ("llama3_1b", "single", 1),
        ("llama3_8b", "tp2", 8),
        ("llama3_8b", "cp2", 8),
    ],
)
def test_shipped_combinations_pass(model: str, parallelism: str, processes: int) -> None:
    assert find_problems(composed_groups((f"model={model}", f"parallelism={parallelism}")), processes) == []


def test_checks_do_not_stumble_over_each_other() -> None:
    """A configuration wrong in several ways at once yields problems, never an exception."""
    cfg = composed("model=moe_tiny parallelism=tp8_pp8_vp6 model.num_attention_heads=5 data.seq_length=7")
    moe = dataclasses.replace(cfg.model, moe=dataclasses.replace(cfg.model.moe, num_moe_experts=3, moe_router_topk=9))
    assert len(find_problems(dataclasses.replace(cfg, model=moe), 7)) >= 6
