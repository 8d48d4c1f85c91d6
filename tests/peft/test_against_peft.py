"""Adapters against Hugging Face ``peft`` on the same weights: logits, and gradients of one step."""

from pathlib import Path

import pytest

from nemo_llm.errors import InputError
from tests.ranks import RankPool

TOLERANCE = 1e-4
KINDS = ("lora", "dora", "ia3", "prompt_tuning", "p_tuning")
HIDDEN, LAYERS, HEADS, GROUPS, FFN, VOCAB, LENGTH, VIRTUAL = 64, 2, 4, 2, 96, 384, 24, 8
MODEL = [
    "+model=llama3_1b",
    f"model.num_layers={LAYERS}",
    f"model.hidden_size={HIDDEN}",
    f"model.ffn_hidden_size={FFN}",
    f"model.num_attention_heads={HEADS}",
    f"model.num_query_groups={GROUPS}",
    "model.kv_channels=null",
    f"model.vocab_size={VOCAB}",
    "model.rope_scaling=null",
    "model.rotary_base=10000.0",
    "model.share_embeddings_and_output_weights=false",
    "model.max_position_embeddings=128",
    "tokenizer=byte",
    f"data.seq_length={LENGTH}",
    "precision=fp32",
    "trainer.accelerator=cpu",
]


def _hf_model(vocab: int = VOCAB):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        intermediate_size=FFN,
        vocab_size=vocab,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).float().eval()


def _with_peft(kind: str, model):
    """The model with one of peft's adapters, every trained value drawn at random."""
    import peft
    import torch

    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    configs = {
        "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=linears, task_type="CAUSAL_LM"),
        "dora": lambda: peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=linears, use_dora=True, task_type="CAUSAL_LM"
        ),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        ),
        "prompt_tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=VIRTUAL, task_type="CAUSAL_LM"),
        "p_tuning": lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=VIRTUAL, encoder_hidden_size=HIDDEN, task_type="CAUSAL_LM"
        ),
    }
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, configs[kind]())
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted.eval()


def _copy_base(hf, chunk) -> None:
    """Weights of the Hugging Face model into ours (one process)."""
    import torch

    theirs, ours = hf.state_dict(), dict(chunk.named_parameters())
    head = HIDDEN // HEADS
    with torch.no_grad():
        vocab = theirs["lm_head.weight"].shape[0]
        ours["embedding.word_embeddings.weight"][:vocab].copy_(theirs["model.embed_tokens.weight"])
        ours["output_layer.weight"][:vocab].copy_(theirs["lm_head.weight"])
        ours["decoder.final_layernorm.weight"].copy_(theirs["model.norm.weight"])
        for layer in range(LAYERS):
            a, b = f"decoder.layers.{layer}.", f"model.layers.{layer}."
            q, k, v = (theirs[f"{b}self_attn.{x}_proj.weight"].view(GROUPS, -1, head, HIDDEN) for x in "qkv")
            ours[f"{a}self_attention.linear_qkv.weight"].copy_(torch.cat((q, k, v), 1).reshape(-1, HIDDEN))
            ours[f"{a}self_attention.linear_proj.weight"].copy_(theirs[f"{b}self_attn.o_proj.weight"])
            gate, up = theirs[f"{b}mlp.gate_proj.weight"], theirs[f"{b}mlp.up_proj.weight"]
            ours[f"{a}mlp.linear_fc1.weight"].copy_(torch.cat((gate, up)))
            ours[f"{a}mlp.linear_fc2.weight"].copy_(theirs[f"{b}mlp.down_proj.weight"])
            ours[f"{a}input_layernorm.weight"].copy_(theirs[f"{b}input_layernorm.weight"])
            ours[f"{a}pre_mlp_layernorm.weight"].copy_(theirs[f"{b}post_attention_layernorm.weight"])


def _copy_p_tuning(adapter, hf) -> None:
    import torch

    theirs = hf.prompt_encoder["default"]
    pairs = {"vectors": theirs.embedding.weight}
    for ours, place in (("0", 0), ("2", 2), ("4", 4)):
        pairs |= {f"w{ours}": theirs.mlp_head[place].weight, f"b{ours}": theirs.mlp_head[place].bias}
    with torch.no_grad():
        for name, value in pairs.items():
            getattr(adapter, name).copy_(value)


def _hf_gradients(adapted, kind: str) -> dict:
    """Gradients by the names that an exported adapter has."""
    found = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            plain = name.replace(".default", "")
            if plain.endswith("magnitude_vector.weight"):
                plain = plain.removesuffix(".weight")
            found[plain] = parameter.grad
    return found


def compare(kind: str, folder: str) -> tuple[float, float, float]:
    """Largest differences of logits, gradients and (LoRA, DoRA, IA3) logits after merging; one process."""
    import torch
    from megatron.core.utils import unwrap_model

    from nemo_llm.config.compose.load import compose
    from nemo_llm.models.build import build_model_chunks
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.peft.adapter import KEY_PREFIX, adapted_modules, merge_adapters
    from nemo_llm.peft.attach import attach_peft
    from nemo_llm.peft.hf_format import load_hf_adapter, to_hf_weights

    peft_keys = {
        **dict.fromkeys(("lora", "dora"), ("peft.rank=4", "peft.alpha=8")),
        **dict.fromkeys(("prompt_tuning", "p_tuning"), (f"peft.num_virtual_tokens={VIRTUAL}",)),
    }
    cfg = compose([*MODEL, f"peft={kind}", *peft_keys.get(kind, ())])
    runtime = start_runtime(cfg.runtime_setting)
    base = _hf_model()
    chunks = build_model_chunks(cfg.model_setting, runtime, VOCAB)
    _copy_base(base, unwrap_model(chunks[0]))
    attach_peft(cfg.model_setting, chunks, runtime)
    adapted = _with_peft(kind, base)
    if kind == "p_tuning":
        _copy_p_tuning(next(adapted_modules(chunks)).adapter, adapted)
    else:
        adapted.save_pretrained(folder)
        load_hf_adapter(chunks, Path(folder), cfg.peft)

    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=generator)
    weights = torch.randn(2, LENGTH, VOCAB, generator=generator) / VOCAB
    theirs = adapted(input_ids=ids).logits[:, -LENGTH:]
    (theirs * weights).sum().backward()
    virtual = -1 - torch.arange(cfg.peft.virtual_tokens).expand(2, -1)
    whole = torch.cat((virtual, ids), 1)
    positions = torch.arange(whole.shape[1]).expand(2, -1)

    def forward() -> torch.Tensor:
        return chunks[0](whole, positions, None)[:, -LENGTH:, :VOCAB]

    ours = forward()
    (ours * weights).sum().backward()
    logits = float((ours - theirs).abs().max())
    merged = 0.0
    if kind in ("lora", "dora", "ia3"):
        undo = merge_adapters(chunks)
        merged = float((forward() - ours).abs().max())
        undo()
        assert torch.equal(forward(), ours)
    expected = _hf_gradients(adapted, kind)
    if kind == "p_tuning":
        adapter = next(adapted_modules(chunks)).adapter
        encoder = dict(adapted.prompt_encoder["default"].named_parameters())
        names = {"vectors": "embedding.weight", **{f"w{i}": f"mlp_head.{i}.weight" for i in (0, 2, 4)}}
        pairs = [(getattr(adapter, a).grad, encoder[b].grad) for a, b in names.items()]
    elif kind == "prompt_tuning":
        pairs = [(next(adapted_modules(chunks)).adapter.vectors.grad, next(iter(expected.values())))]
    else:
        state = {
            shard.key.removeprefix(KEY_PREFIX): getattr(module.adapter, name).grad
            for module in adapted_modules(chunks)
            for name, shard in module.adapter.shards()
        }
        found = to_hf_weights(state, {"kind": kind})
        assert set(found) == set(expected)
        pairs = [(found[name], expected[name]) for name in found]
    assert all(float(b.abs().max()) > 0 for _, b in pairs)
    return logits, max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs), merged


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_peft(kind: str, ranks: RankPool, tmp_path: Path) -> None:
    logits, gradients, merged = ranks.run(compare, 1, kind, str(tmp_path))[0]
    assert logits < TOLERANCE
    assert gradients < TOLERANCE
    assert merged < 1e-5


def test_a_bottleneck_has_no_form_there_and_is_refused() -> None:
    from nemo_llm.peft.hf_format import to_hf_weights

    with pytest.raises(InputError, match=r"peft\.kind = 'adapter'.*no such form"):
        to_hf_weights({}, {"kind": "adapter"})
