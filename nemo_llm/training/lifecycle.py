"""Open the run folder on all ranks and close it with a word on how the run ended."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from nemo_llm.checkpoint.folder import find_checkpoint
from nemo_llm.errors import ExitCode, NemoLlmError
from nemo_llm.log import get_logger
from nemo_llm.run.folder import RunDir, open_run_dir, write_exit
from nemo_llm.training.loop import Ending
from nemo_llm.training.state import TrainingRun
from nemo_llm.training.text_sample import sample_text
from nemo_llm.training.unigram import count_tokens, unigram_entropy_nats

_log = get_logger(__name__)


@contextlib.contextmanager
def open_run(run: TrainingRun) -> Iterator[None]:
    """Make or reopen the run folder and hold it; whatever ends the block is written to ``exit.json``.

    The first rank does the work and tells the others the folder, or why there is none.
    """
    opened: RunDir | None = None
    answer: list[object] = [None]
    if run.runtime.is_first_rank:
        try:
            opened = open_run_dir(run.cfg)
            answer = [opened.path]
            for change in opened.changes:
                _log.info("changed since the run began: %s", change)
        except NemoLlmError as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], NemoLlmError):
        raise answer[0]
    run.run_dir = Path(str(answer[0]))
    with opened or contextlib.nullcontext():
        try:
            yield
        except BaseException as error:
            if opened is not None:
                code = error.exit_code if isinstance(error, NemoLlmError) else ExitCode.FAILED
                write_exit(opened.path, code, f"{type(error).__name__}: {error}", run.state.step)
            raise


def close_run(run: TrainingRun, ending: Ending) -> None:
    """Print what came of the run and write ``exit.json``; on the first rank, after work that all ranks share."""
    text = sample_text(run) if run.cfg.sample.enabled and ending.code is ExitCode.DONE else None
    if not run.runtime.is_first_rank:
        return
    lines = [f"ended at step {run.state.step}: {ending.reason}"]
    lines += [_compare_with_unigram(run, name, result.loss) for name, result in ending.validation.items()]
    if text is not None:
        lines += [f"sample from {find_checkpoint(run.run_dir)}:", _indented(text)]
    lines += [
        f"run folder   {run.run_dir}",
        f"checkpoints  {run.run_dir / 'checkpoints'}",
        f"metrics      {run.run_dir / 'metrics.jsonl'}",
    ]
    print("\n".join(lines), flush=True)
    write_exit(run.run_dir, ending.code, ending.reason, run.state.step)


def _compare_with_unigram(run: TrainingRun, name: str, loss: float) -> str:
    source = run.validation[name].source
    count = min(len(source), run.cfg.trainer.val_steps * run.cfg.trainer.global_batch_size)
    samples = (source[index] for index in range(count))
    classes = run.cfg.model.head
    if classes is not None:
        if len(classes) == 1:
            return f"validation {name}: mean squared error {loss:.4f}"
        labels = (sample.labels[sample.loss_mask > 0] for sample in samples if sample.labels is not None)
        entropy = unigram_entropy_nats(count_tokens(labels, len(classes)))
        return f"validation {name}: loss {loss:.4f} nats; entropy of its labels {entropy:.4f} nats"
    counts = count_tokens((sample.tokens[1:][sample.loss_mask > 0] for sample in samples), run.tokenizer.vocab_size)
    entropy = unigram_entropy_nats(counts)
    return f"validation {name}: loss {loss:.4f} nats; {beside_unigram(loss, entropy)}"


def beside_unigram(loss: float, entropy: float) -> str:
    """How a loss compares with the entropy of the same tokens by their frequencies alone, both in nats."""
    better = entropy - loss
    how = f"better by {better:.4f}" if better >= 0 else f"worse by {-better:.4f}: it has not learned these tokens yet"
    return f"unigram entropy of the same tokens {entropy:.4f} nats; the model is {how}"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
