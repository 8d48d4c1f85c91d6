"""The gate of every conversion: the same tokens through Hugging Face's model and ours, logits compared in float32."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nemo_llm.checkpoint.folder import TOKENIZER_FOLDER_NAME
from nemo_llm.checkpoint.saved_run import SavedRun
from nemo_llm.config import ModelConfig
from nemo_llm.config.shipped import one_cpu, reference_fp32
from nemo_llm.errors import CheckpointError
from nemo_llm.families.registry import read_hf_config
from nemo_llm.parallel.runtime import own_runtime
from nemo_llm.tokenizers.tokenizer import load_tokenizer_from_folder

# Real text where a tokenizer is there, since trained models behave on it as they do in use.
_TEXT = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and "
    "nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of the "
    "world. In 1815 the armies met at Waterloo; 3.14159 is the ratio of a circumference to its diameter. def f(x): "
    "return x ** 2 + 1\n"
)
_SEED = 1234


@dataclass(frozen=True, slots=True)
class GateSettings:
    """What is compared, and how close it must be.

    Attributes:
        last: compare one long text of random tokens, and the logits of its last tokens, so many; None: two short texts
            and all of their logits.
    """

    tokens: int
    tolerance: float
    layer_by_layer: bool = False
    last: int | None = None


@dataclass(frozen=True, slots=True)
class GateReport:
    """The comparison of one conversion.

    Attributes:
        tokens: places at which logits were compared, each over the whole vocabulary.
        text: whether they were real text.
        max_difference, mean_difference: of the logits, absolute.
        largest_logit: largest absolute value among theirs.
        top1_agreement: share of places where both name the same next token.
        kl_divergence: of our distribution from theirs, mean over the places, in nats.
        tolerance: in parts of the largest logit, or of 1.
        passed: the largest difference is within it.
        layers: largest difference of the residual stream, relative to its largest value, after the embedding (0) and
            each layer; where it was asked for, or the comparison failed.
        first_diverging: the first of them that is beyond the tolerance.
        sampled_layers: the layers that were compared, where not all were; ``layers`` then counts among these.
        length: of each text.
        beyond: what a long text has shown: the lengths of the configuration that it is longer than, and the difference.
        texts: how many texts have the same token ids in transformers' tokenizer.
        not_seen: lengths of the configuration that no text was longer than.
    """

    tokens: int
    text: bool
    max_difference: float
    mean_difference: float
    largest_logit: float
    top1_agreement: float
    kl_divergence: float
    tolerance: float
    passed: bool
    layers: list[float] = field(default_factory=list)
    first_diverging: str | None = None
    sampled_layers: list[int] = field(default_factory=list)
    length: int = 0
    beyond: str | None = None
    not_seen: list[str] = field(default_factory=list)
    texts: int = 0

    def __str__(self) -> str:
        text = (
            f"gate: {'passed' if self.passed else 'FAILED'}: {self.tokens} tokens{' of text' if self.text else ''}, "
            f"logits differ by at most {self.max_difference:.2e} (mean {self.mean_difference:.1e}, largest logit "
            f"{self.largest_logit:.1f}), top-1 agreement {self.top1_agreement:.4f}, KL {self.kl_divergence:.1e}"
        )
        if self.sampled_layers:
            text += f"\n  compared: embedding, output and layers {', '.join(map(str, self.sampled_layers))} alone"
        if self.texts:
            text += f"\n  tokenizer: {self.texts} texts have the token ids of transformers' own"
        if self.beyond:
            text += f"\n  {self.beyond}"
        if self.not_seen:
            text += f"\n  not seen: texts longer than {', '.join(self.not_seen)}; they take too much memory here"
        if self.layers:
            rows = (f"  after {_place(number)}: {value:.1e}" for number, value in enumerate(self.layers))
            text += "\n" + "\n".join(rows)
        return text

    def raise_if_different(self, consequence: str) -> None:
        """Fail the conversion.

        Raises:
            CheckpointError: says by how much, and where it begins.
        """
        if not self.passed:
            where = f"; the first difference is after {self.first_diverging}" if self.first_diverging else ""
            raise CheckpointError(f"the two models compute different logits{where}.\n{self}\n{consequence}")


@dataclass(frozen=True, slots=True)
class Outputs:
    """What one model makes of the tokens: logits [b, s, v] and the residual stream after every layer [b, s, h]."""

    logits: torch.Tensor
    hidden: list[torch.Tensor]


def compare(hf_folder: Path, our_folder: Path, settings: GateSettings) -> GateReport:
    """Run transformers' model and ours, one after the other, on CPU in float32."""
    config = read_hf_config(hf_folder)
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    limits = {"vocab_size": config["vocab_size"], "max_position_embeddings": longest}
    last = settings.last
    sides = Sides(lambda tokens: run_theirs(hf_folder, tokens, last), lambda tokens: run_ours(our_folder, tokens, last))
    return compare_sides(sides, limits, our_folder, settings)


@dataclass(frozen=True, slots=True)
class Sides:
    """The two models that are compared: each takes token ids [b, s]."""

    theirs: Callable[[torch.Tensor], Outputs]
    ours: Callable[[torch.Tensor], Outputs]


def compare_sides(sides: Sides, limits: Mapping[str, Any], text_folder: Path, settings: GateSettings) -> GateReport:
    """Run another program's model and ours, one after the other, on CPU in float32.

    Args:
        limits: ``vocab_size`` and ``max_position_embeddings`` (None: unknown) of the model.
        text_folder: a checkpoint of ours with the tokenizer, if there is one.
    """
    tokens, is_text = _tokens(text_folder, limits, settings)
    return judge(sides.theirs(tokens), sides.ours(tokens), settings, is_text)


def judge(theirs: Outputs, ours: Outputs, settings: GateSettings, is_text: bool) -> GateReport:
    """The figures of the comparison."""
    vocabulary = theirs.logits.shape[-1]
    mine = ours.logits[..., :vocabulary]
    difference = (theirs.logits - mine).abs()
    largest = float(theirs.logits.abs().max())
    worst = float(difference.max())
    passed = math.isfinite(worst) and worst <= settings.tolerance * max(1.0, largest)
    expected, actual = theirs.logits.log_softmax(-1), mine.log_softmax(-1)
    layers = []
    if settings.layer_by_layer or not passed:
        for a, b in zip(theirs.hidden, ours.hidden, strict=True):
            layers.append(float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)))
    first = next((n for n, value in enumerate(layers) if not value <= 10 * settings.tolerance), None)
    return GateReport(
        tokens=difference.shape[0] * difference.shape[1],
        length=settings.tokens if settings.last is not None else difference.shape[1],
        text=is_text,
        max_difference=worst,
        mean_difference=float(difference.mean()),
        largest_logit=largest,
        top1_agreement=float((theirs.logits.argmax(-1) == mine.argmax(-1)).float().mean()),
        kl_divergence=float((expected.exp() * (expected - actual)).sum(-1).mean()),
        tolerance=settings.tolerance,
        passed=passed,
        layers=layers,
        first_diverging=None if passed else _place(first) if first is not None else "the last layer (norm or output)",
    )


def _place(number: int) -> str:
    return "the embedding" if number == 0 else f"layer {number - 1}"


def _tokens(our_folder: Path, limits: Mapping[str, Any], settings: GateSettings) -> tuple[torch.Tensor, bool]:
    """Two rows of token ids, or one long one [b, length], and whether they are text."""
    length, generator = settings.tokens, torch.Generator().manual_seed(_SEED)
    if settings.last is not None:
        # Random: a text that repeats itself looks the same within a window and without one.
        return torch.randint(limits["vocab_size"], (1, length), generator=generator), False
    length = min(length, limits["max_position_embeddings"] or length)
    if (our_folder / TOKENIZER_FOLDER_NAME).is_dir():
        ids = load_tokenizer_from_folder(our_folder / TOKENIZER_FOLDER_NAME).encode(_TEXT * (1 + length // 20))
        if max(ids) < limits["vocab_size"]:
            return torch.tensor([ids[:length], ids[7 : 7 + length]]), True
    return torch.randint(limits["vocab_size"], (2, length), generator=generator), False


def run_theirs(folder: Path, tokens: torch.Tensor, last: int | None = None) -> Outputs:
    """Plain transformers; logits of the ``last`` tokens alone, where that is given."""
    return forward_theirs(load_theirs(folder), tokens, last)


def their_config(folder: Path) -> dict[str, Any]:
    """What transformers makes of ``config.json``: every key of its class, those that the file lacks too."""
    from transformers import AutoConfig

    return dict(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).to_dict())


def load_theirs(folder: Path) -> Any:
    """Transformers' model of a folder, in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()


def forward_theirs(model: Any, tokens: torch.Tensor, last: int | None = None) -> Outputs:
    """Logits and the residual stream of a model of transformers, or of one that peft has put an adapter on."""
    hidden: list[torch.Tensor] = []

    def keep(_module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if not hidden:
            hidden.append(inputs[0].clone())
        hidden.append((output[0] if isinstance(output, tuple) else output).clone())

    layers = find_layers(model)
    handles = [layer.register_forward_hook(keep) for layer in layers]
    if last is not None:
        output = model.get_output_embeddings()
        handles.append(output.register_forward_pre_hook(lambda _module, inputs: (inputs[0][:, -last:],)))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits.float()
    for handle in handles:
        handle.remove()
    return Outputs(logits, hidden)


def find_layers(model: Any) -> Any:
    """The list of decoder layers of a transformers model: the longest list of modules in it."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda modules: (len(modules) == model.config.num_hidden_layers, len(modules)))


def run_ours(folder: Path, tokens: torch.Tensor, last: int | None = None) -> Outputs:
    """Our model as training builds it, on one process; ``last`` as in `run_theirs`."""
    with float32_model(saved_model(SavedRun.at(folder))) as chunk:
        from nemo_llm.checkpoint.weights import load_weights

        load_weights([chunk], folder)
        return forward_ours(chunk, tokens, last)


def forward_ours(chunk: Any, tokens: torch.Tensor, last: int | None = None) -> Outputs:
    """Logits and the residual stream of one chunk that is the whole model."""
    return forward_megatron(chunk, tokens, chunk.finish_logits, last)


def forward_megatron(
    chunk: Any, tokens: torch.Tensor, finish: Callable[[torch.Tensor], torch.Tensor], last: int | None = None
) -> Outputs:
    """As `forward_ours`, of any ``GPTModel``; ``finish`` is what its logits go through."""
    hidden: list[torch.Tensor] = []

    def keep(_module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if not hidden:
            given = keywords["hidden_states"] if "hidden_states" in keywords else inputs[0]
            hidden.append(given.transpose(0, 1).clone())
        hidden.append((output[0] if isinstance(output, tuple) else output).transpose(0, 1).clone())

    handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in chunk.decoder.layers]
    if last is not None:
        cut = chunk.output_layer.register_forward_pre_hook(lambda _module, inputs: (inputs[0][-last:], *inputs[1:]))
        handles.append(cut)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    chunk.eval()
    with torch.no_grad():
        logits = finish(chunk(tokens, positions, attention_mask=None)).float()
    for handle in handles:
        handle.remove()
    return Outputs(logits, hidden)


def saved_model(saved: SavedRun) -> ModelConfig:
    """The model section of a checkpoint, its vocabulary known."""
    model = saved.sections.model
    if model.vocab_size is not None:
        return model
    return replace(model, vocab_size=load_tokenizer_from_folder(saved.tokenizer).vocab_size)


@contextmanager
def float32_model(model: ModelConfig) -> Iterator[Any]:
    """A model in float32 on the CPU of this process alone, its vocabulary known; weights are not loaded."""
    with own_runtime(one_cpu()) as runtime:
        # Megatron is imported after the runtime has put the CPU in the place of CUDA, where there is none.
        from nemo_llm.models.build import build_model_chunks

        (chunk,) = build_model_chunks(reference_fp32(model), runtime, model.vocab_size or 0)
        yield chunk
