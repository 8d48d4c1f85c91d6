"""What is said at start about kernels and backends, and why."""

from typing import Any

import pytest
import torch

from nemo_llm.config.compose.load import compose
from nemo_llm.models.describe_backend import describe_choices

CASES = [
    ("+model=llama3_1b",
     "layers: the torch backend's, bf16 (model.transformer_impl=auto, Transformer Engine is not installed)"),
    ("+model=llama3_1b", "attention: cuDNN's kernels before FlashAttention's"),
    ("+model=llama3_1b",
     "matrix products: PyTorch's choice of kernel; the fastest of cuBLASLt's kernels with its bits"),
    ("+model=llama3_1b", "loss: with the output projection, 4,096 tokens at a time"),
    ("+model=llama3_1b performance.compile_layers=true",
     "matrix products: PyTorch's choice of kernel; no other tried (performance.compile_layers=true)"),
    ("+model=llama3_1b precision=fp8_tensorwise model.transformer_impl=torch",
     "layers: the torch backend's, bf16 with FP8 products (tensorwise) (model.transformer_impl=torch)"),
    ("+model=llama3_1b precision=fp16", "loss: from whole logits (fp16)"),
    ("+model=llama3_1b performance.gradient_accumulation_fusion=false",
     "weight gradients: added apart (performance.gradient_accumulation_fusion=false)"),
    ("+model=gemma2_2b data.seq_length=8192",
     "attention: cuDNN's kernels before FlashAttention's; windows and capped scores by FlexAttention"),
    ("+model=mistral_7b data.seq_length=4096", "attention: cuDNN's kernels before FlashAttention's"),
    ("+model=llama3_1b data.reset_attention_mask=true performance.flex_attention=false",
     "attention: cuDNN's kernels before FlashAttention's; document masks by a matrix of all scores "
     "(performance.flex_attention=false)"),
    ("+model=llama3_1b data.reset_attention_mask=true model.attention_dropout=0.1",
     "attention: cuDNN's kernels before FlashAttention's; document masks by a matrix of all scores "
     "(model.attention_dropout=0.1)"),
    ("+model=gpt_tiny data.reset_attention_mask=true model.kv_channels=8",
     "attention: cuDNN's kernels before FlashAttention's; document masks by a matrix of all scores "
     "(heads of 8 channels)"),
    ("+model=gpt_tiny",
     "matrix products: PyTorch's choice of kernel; no other tried (parameters in fp32)"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "line"), CASES)
def test_choices_on_hopper(options: str, line: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert line in describe_choices(compose(options.split()).model_setting, torch.device("cuda"))


def test_an_older_gpu_has_pytorchs_choices(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    lines = describe_choices(compose(["+model=llama3_1b"]).model_setting, torch.device("cuda"))
    assert "attention: PyTorch's choice of kernels" in lines
    assert "matrix products: PyTorch's choice of kernel; no other tried (a GPU before Hopper)" in lines


def test_a_spec_of_the_user_is_named_and_its_parts_are_not_known(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    lines = describe_choices(
        compose(["+model=llama3_1b", "model.layer_spec=mine:layers"]).model_setting, torch.device("cuda")
    )
    assert lines[0] == "layers: model.layer_spec=mine:layers"
    assert [line.split(":")[0] for line in lines[1:]] == ["loss", "weight gradients"]


def test_a_cpu_needs_one_line() -> None:
    lines = describe_choices(compose(["+model=gpt_tiny"]).model_setting, torch.device("cpu"))
    assert lines == ["layers: the torch backend's, fp32 (model.transformer_impl=auto, no CUDA device)"]
