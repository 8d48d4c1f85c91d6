"""Speed of a run: tokens per second, TFLOP/s, MFU, the share of time spent waiting for data, and the time left."""

from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from nemo_llm.config.sections.run_services import ClusterConfig
from nemo_llm.planner.flops import FlopsPerToken

if TYPE_CHECKING:
    import torch

# Steps whose median speed the remaining time is reckoned from: enough to shrug off stray slow steps, few enough to
# follow a lasting change.
_ETA_WINDOW_STEPS = 100


@dataclass(frozen=True, slots=True)
class Peak:
    """What a device could do at best: dense, in the precision of the run.

    Attributes:
        name: of the device, as printed beside MFU.
        tflops: 1e12 floating-point operations per second.
    """

    name: str
    tflops: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """Speed over a span of steps. MFU is model TFLOP/s over the peak (arXiv:2204.02311), None without a peak.

    Tokens are positions that the model went through, padding and prompts included. Learned tokens are those with a
    loss; where a text gets classes or a score, it counts as one.
    """

    step_time_seconds: float
    tokens_per_second: float
    tokens_per_second_per_device: float
    learned_tokens_per_second: float
    tflops_per_device: float
    tflops_per_device_full: float
    mfu_causal: float | None
    mfu_full: float | None
    peak: Peak | None
    data_wait_fraction: float
    eta_seconds: float | None
    warm_up: bool


@dataclass(slots=True)
class _Span:
    steps: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    seconds: float = 0.0
    data_wait_seconds: float = 0.0

    def add(self, tokens: int, learned_tokens: int, seconds: float, data_wait_seconds: float) -> None:
        self.steps += 1
        self.tokens += tokens
        self.learned_tokens += learned_tokens
        self.seconds += seconds
        self.data_wait_seconds += data_wait_seconds


class ThroughputMeter:
    """Gathers the times of steps and reports speeds.

    The first `warmup_steps` steps of the process (compilation, allocation, cold caches; also after a resume) are kept
    apart: they count in no later figure and not in the time left. It is told times, and reads no clock of its own.
    """

    def __init__(self, *, flops_per_token: FlopsPerToken, num_devices: int, peak: Peak | None, warmup_steps: int):
        self._flops_per_token = flops_per_token
        self._num_devices = num_devices
        self._peak = peak
        self._warmup_steps_left = warmup_steps
        self._warmup_span = _Span()
        self._span = _Span()
        self._whole = _Span()
        self._pause_seconds = 0.0
        self._seconds_per_token: deque[float] = deque(maxlen=_ETA_WINDOW_STEPS)

    def record_step(self, tokens: int, learned_tokens: int, seconds: float, data_wait_seconds: float) -> None:
        """Take in one step, of all devices.

        Args:
            tokens: positions of its samples, at least one.
            learned_tokens: those with a loss, maybe none.
            seconds: its duration.
            data_wait_seconds: how much of that was waiting for data.
        """
        if self._warmup_steps_left > 0:
            self._warmup_steps_left -= 1
            self._warmup_span.add(tokens, learned_tokens, seconds, data_wait_seconds)
            return
        self._span.add(tokens, learned_tokens, seconds, data_wait_seconds)
        self._whole.add(tokens, learned_tokens, seconds, data_wait_seconds)
        self._seconds_per_token.append(seconds / tokens)

    def record_pause(self, seconds: float) -> None:
        """Take in time between steps (validation, a save): it counts in the time left, not in the speed."""
        if self._warmup_steps_left == 0:
            self._pause_seconds += seconds

    def report(self, tokens_left: int) -> Throughput:
        """Speed since the last report, and the time for `tokens_left`; starts the next span.

        A span with warm-up steps among others reports the others alone; one of nothing else is marked `warm_up`.

        Raises:
            ValueError: no step was recorded since the last report.
        """
        warm_up = self._span.steps == 0
        report = self._throughput(self._warmup_span if warm_up else self._span, warm_up, tokens_left)
        self._warmup_span, self._span = _Span(), _Span()
        return report

    def overall(self) -> Throughput | None:
        """Speed of all steps after the warm-up; None before there is one."""
        return self._throughput(self._whole, False, 0) if self._whole.steps else None

    def _throughput(self, span: _Span, warm_up: bool, tokens_left: int) -> Throughput:
        if span.steps == 0:
            raise ValueError("no step was recorded since the last report")
        per_device = span.tokens / span.seconds / self._num_devices
        causal, full = (
            per_device * flops / 1e12 for flops in (self._flops_per_token.causal, self._flops_per_token.full)
        )
        peak = self._peak
        return Throughput(
            step_time_seconds=span.seconds / span.steps,
            tokens_per_second=span.tokens / span.seconds,
            tokens_per_second_per_device=per_device,
            learned_tokens_per_second=span.learned_tokens / span.seconds,
            tflops_per_device=causal,
            tflops_per_device_full=full,
            mfu_causal=None if peak is None else causal / peak.tflops,
            mfu_full=None if peak is None else full / peak.tflops,
            peak=peak,
            data_wait_fraction=span.data_wait_seconds / span.seconds,
            eta_seconds=self._eta_seconds(tokens_left),
            warm_up=warm_up,
        )

    def _eta_seconds(self, tokens_left: int) -> float | None:
        """Median time per token, which a few slow steps do not move and which follows a growing batch, plus pauses."""
        if not self._seconds_per_token:
            return None
        pauses_per_token = self._pause_seconds / self._whole.tokens
        return tokens_left * (median(self._seconds_per_token) + pauses_per_token)


# Dense bf16 peaks as NVIDIA's data sheets give them (SXM parts), by a word in the device's name.
_KNOWN_PEAKS = {"H200": 989.4, "H100": 989.4, "A100": 312.0, "B200": 2250.0}


def find_peak(cluster: ClusterConfig, device: "torch.device") -> Peak | None:
    """Peak that MFU is measured against: ``cluster.peak_tflops``, else that of a GPU known by name; None on CPU."""
    if cluster.peak_tflops is not None:
        return Peak(cluster.gpu_name or cluster.name, cluster.peak_tflops)
    if device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((Peak(word, tflops) for word, tflops in _KNOWN_PEAKS.items() if word in name), None)
