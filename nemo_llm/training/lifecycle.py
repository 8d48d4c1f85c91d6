"""Open the run folder on all ranks and close it with a word on how the run ended."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray

from nemo_llm.checkpoint.folder import find_checkpoint
from nemo_llm.errors import ExitCode, InputError, NemoLlmError
from nemo_llm.log import get_logger
from nemo_llm.run.folder import RunDir, open_run_dir, write_exit
from nemo_llm.training.loop import Ending
from nemo_llm.training.state import Measured, TrainingRun
from nemo_llm.training.text_sample import sample_text

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
    lines += [_compare(run, name, result) for name, result in ending.validation.items()]
    if text is not None:
        lines += [f"sample from {find_checkpoint(run.run_dir)}:", _indented(text)]
    lines += [
        f"run folder   {run.run_dir}",
        f"checkpoints  {run.run_dir / 'checkpoints'}",
        f"metrics      {run.run_dir / 'metrics.jsonl'}",
    ]
    print("\n".join(lines), flush=True)
    write_exit(run.run_dir, ending.code, ending.reason, run.state.step)


def _compare(run: TrainingRun, name: str, result: Measured) -> str:
    source = run.validation[name].source
    count = min(len(source), run.cfg.trainer.val_steps * run.cfg.trainer.global_batch_size)
    labels = (source[index].learned_labels for index in range(count))
    outputs = run.cfg.model.outputs(run.tokenizer.vocab_size)
    words = run.task.compare(result.figures, lambda: unigram_entropy_nats(count_tokens(labels, outputs)))
    return f"validation {name}: {words}"


def count_tokens(chunks: Iterable[ArrayLike], vocab_size: int) -> NDArray[np.int64]:
    """How often each token occurs, as ``[vocab_size]``. Counts of several sets or ranks may be added.

    Args:
        chunks: integer arrays of any shape: the targets that the loss is taken over, and no others.
        vocab_size: of the tokenizer.

    Raises:
        InputError: a token that is negative or not below `vocab_size`.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for chunk in chunks:
        tokens = np.asarray(chunk).ravel()
        if tokens.size == 0:
            continue
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"token {low if low < 0 else high} lies outside of the vocabulary of {vocab_size}\n"
                "      fix: prepare the data with the tokenizer of this run, or set model.vocab_size to its size"
            )
        # int64: bincount refuses uint64, and token files hold unsigned kinds.
        counts += np.bincount(tokens.astype(np.int64), minlength=vocab_size)
    return counts


def unigram_entropy_nats(counts: ArrayLike) -> float:
    """Entropy in nats per token of the distribution that `counts` give: the lowest loss of a fixed prediction.

    Raises:
        InputError: there are no tokens.
    """
    present = np.asarray(counts, dtype=np.float64)
    present = present[present > 0]
    if present.size == 0:
        raise InputError("no validation tokens to take the unigram entropy of\n      fix: check data.validation")
    share = present / present.sum()
    return max(0.0, float(-(share * np.log(share)).sum()))  # a single token gives -0.0


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
