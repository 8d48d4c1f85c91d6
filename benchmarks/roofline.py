"""The floor under a training step on one GPU: every matrix product, and every byte that must pass through its memory.

``python -m benchmarks.roofline +model=llama3_1b trainer.global_batch_size=16 trainer.micro_batch_size=8 [--gpus N] [--step-ms MS]`` prints a
table for pre-norm models in bf16 with fp32 master weights and gradients: what each part computes and moves, the time it needs at
the ceilings, and with the time of a step the share that is reached. Nothing is run. The ceilings are an H100's: 8192^3 in bf16
and a device copy (``--matrix-tflops``, ``--terabytes-per-second``).

A part's floor is the larger of its two times. Elementwise passes are those that cannot be left out unless they are merged with
a product or into each other further than any published system does it: each reads and writes what its neighbours need, once.
"""

import argparse
import sys
from dataclasses import dataclass

from nemo_llm.config import RunConfig
from nemo_llm.config.sections.arithmetic import padded_vocab_size
from nemo_llm.config.sections.model import ModelConfig
from nemo_llm.planner.flops import flops_per_token, matmul_weights
from nemo_llm.planner.parameters import count_parameters, is_moe_layer

_BF16, _FP32 = 2, 4


@dataclass(frozen=True)
class RooflinePart:
    """Floating-point operations and bytes of one part in a step of one GPU."""

    name: str
    flops: float
    bytes: float

    def milliseconds(self, tflops: float, terabytes: float) -> float:
        """The floor: by computing or by moving, whichever takes longer."""
        return max(self.flops / tflops, self.bytes / terabytes) / 1e9


def parts_of_step(cfg: RunConfig, gpus: int, vocab_size: int) -> list[RooflinePart]:
    """Everything that one of ``gpus`` data-parallel GPUs does in a step, without recomputation."""
    model, length = cfg.model, cfg.data.seq_length
    tokens = cfg.trainer.global_batch_size * length // gpus
    vocabulary = padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by)
    parameters = count_parameters(model, vocabulary).total
    micro_batches = tokens // length // cfg.trainer.micro_batch_size
    return [
        RooflinePart("matrix products", 6.0 * matmul_weights(model, vocabulary) * tokens, _product_bytes(model, tokens, vocabulary, micro_batches)),
        _attention(model, length, tokens, vocabulary),
        RooflinePart("norms, and adding residuals", 0.0, _norm_bytes(model, tokens)),
        RooflinePart("activation of the MLP", 0.0, _activation_bytes(model, tokens)),
        RooflinePart("split and rotation of QKV", 0.0, 4.0 * _BF16 * _qkv_width(model) * tokens * model.num_layers),
        RooflinePart("tokens to experts and back", 0.0, _routing_bytes(model, tokens)),
        RooflinePart("loss from logits", 0.0, 2.0 * _BF16 * vocabulary * tokens),
        # Looked up and written; on the way back read, and added to a row each of which is there at most once a token.
        RooflinePart("embedding", 0.0, (3 * _BF16 + 2 * _FP32) * model.hidden_size * tokens),
        # Read: weight, gradient, two moments. Written: weight, two moments, the weight in bf16. Over GPUs a part each.
        RooflinePart("AdamW", 0.0, (7 * _FP32 + _BF16) * parameters / gpus),
        RooflinePart("norm of gradients, and zeroing", 0.0, _FP32 * parameters / gpus + _FP32 * parameters),
        RooflinePart("(gradients to fp32, in the products)", 0.0, 2.0 * _FP32 * parameters * micro_batches),
    ]  # fmt: skip


def _qkv_width(model: ModelConfig) -> int:
    return (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim


def _mlp_rows(model: ModelConfig, layer: int) -> tuple[int, int]:
    """(hidden units, how many experts a token passes through) of this layer's MLP."""
    if model.moe is not None and is_moe_layer(model, layer):
        return model.moe.moe_ffn_hidden_size, model.moe.moe_router_topk
    return model.ffn_hidden_size, 1


def _product_bytes(model: ModelConfig, tokens: int, vocabulary: int, micro_batches: int) -> float:
    """Inputs, outputs and weights of all three products of every linear layer, once each."""
    widths = model.num_layers * (model.hidden_size + _qkv_width(model))
    widths += model.num_layers * (model.num_attention_heads * model.head_dim + model.hidden_size)
    for layer in range(model.num_layers):
        units, experts = _mlp_rows(model, layer)
        widths += experts * (2 * model.hidden_size + (3 if model.gated_linear_unit else 2) * units)
    widths += model.hidden_size + vocabulary
    return _BF16 * (3.0 * widths * tokens + 2.0 * matmul_weights(model, vocabulary) * micro_batches)


def _attention(model: ModelConfig, length: int, tokens: int, vocabulary: int) -> RooflinePart:
    """With the scores computed again on the way back (FlashAttention, arXiv:2205.14135): 14 operations for 12."""
    causal = flops_per_token(model, length, vocabulary).causal - 6.0 * matmul_weights(model, vocabulary)
    inner = model.num_attention_heads * model.head_dim
    # q, k and v twice, and their gradients; the output written, then read with its gradient.
    moved = 3 * _qkv_width(model) + 3 * inner
    return RooflinePart("attention", causal * tokens * 14 / 12, float(_BF16 * moved * tokens * model.num_layers))


def _norm_bytes(model: ModelConfig, tokens: int) -> float:
    """A layer: read and write, read twice and write twice, add; on the way back three reads and a write each."""
    each_layer = 2 + 4 + 3 + 2 * 4
    return float(_BF16 * model.hidden_size * tokens * (each_layer * model.num_layers + 2 + 3))


def _activation_bytes(model: ModelConfig, tokens: int) -> float:
    gated = model.gated_linear_unit
    passes = (3 + 5) if gated else (2 + 3)  # read and write forward; input and gradient read, gradient written back
    width = sum(units * experts for units, experts in (_mlp_rows(model, n) for n in range(model.num_layers)))
    return float(_BF16 * passes * width * tokens)


def _routing_bytes(model: ModelConfig, tokens: int) -> float:
    """Copies of tokens made for their experts, outputs added up; the same on the way back."""
    copies = sum(_mlp_rows(model, n)[1] for n in range(model.num_layers) if is_moe_layer(model, n))
    layers = sum(is_moe_layer(model, n) for n in range(model.num_layers))
    return float(_BF16 * model.hidden_size * tokens * 4 * (copies + layers))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", type=int, default=1, help="data-parallel, with the distributed optimizer")
    parser.add_argument("--step-ms", type=float, default=None, help="measured time of a step")
    parser.add_argument("--matrix-tflops", type=float, default=794.0)
    parser.add_argument("--terabytes-per-second", type=float, default=3.03)
    arguments, overrides = parser.parse_known_args()

    from nemo_llm.config.compose.load import compose
    from nemo_llm.tokenizers.tokenizer import load_tokenizer

    cfg = compose(overrides)
    vocab_size = cfg.model.vocab_size or load_tokenizer(cfg.data.tokenizer).vocab_size
    parts = [part for part in parts_of_step(cfg, arguments.gpus, vocab_size) if part.flops or part.bytes]
    ceilings = (arguments.matrix_tflops, arguments.terabytes_per_second)
    print("| part | TFLOP | GB | floor, ms |\n|---|--:|--:|--:|")
    total = 0.0
    for part in parts:
        floor = part.milliseconds(*ceilings)
        hidden = part.name.startswith("(")
        total += 0.0 if hidden else floor
        shown = f"({floor:.1f})" if hidden else f"{floor:.1f}"
        print(f"| {part.name} | {part.flops / 1e12:.1f} | {part.bytes / 1e9:.1f} | {shown} |")
    tokens = cfg.trainer.global_batch_size * cfg.data.seq_length // arguments.gpus
    print(f"| sum: {tokens / total * 1e3:,.0f} tokens/s | | | {total:.1f} |")
    if arguments.step_ms is not None:
        print(f"\n{arguments.step_ms:.1f} ms measured: {total / arguments.step_ms:.1%} of the floor's speed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
