"""Errors that users meet, and the exit code that each one ends a program with."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every program in this project."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    INCOMPLETE = 3
    PREEMPTED = 75
    HANG = 76
    BUSY = 77

    def of_process(self) -> int:
        """The code to end this process with: 0 for PREEMPTED under the agent that slurm/agent.sh looks after.

        torchrun's agent starts ranks anew that end with any code of their own, and shows nobody the code; the scripts
        read the run's ``exit.json``.
        """
        return 0 if self is ExitCode.PREEMPTED and "NEMO_LLM_UNDER_AGENT" in os.environ else int(self)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a configuration, in the words that the user sees.

    Attributes:
        key: dotted key, for example ``model.num_attention_heads`` (empty for a problem of no single key).
        value: the value received; `NO_VALUE` when there is none to show, as for a missing key.
        rule: what is allowed, as a full sentence without the final stop.
        fix: what to write instead; empty where the rule already says it.
    """

    key: str
    value: object
    rule: str
    fix: str

    def __str__(self) -> str:
        shown = "" if self.value is NO_VALUE else f" = {_shorten(repr(self.value))}"
        head = f"{self.key}{shown}: " if self.key else ""
        return f"{head}{self.rule}" + (f"\n      fix: {self.fix}" if self.fix else "")


class _NoValue:
    """Type of `NO_VALUE`: told apart from None, which is a value that a user may have written."""

    def __repr__(self) -> str:
        return "<nothing>"


NO_VALUE = _NoValue()

_MAX_SHOWN_CHARACTERS = 200


def _shorten(text: str) -> str:
    if len(text) <= _MAX_SHOWN_CHARACTERS:
        return text
    return text[:_MAX_SHOWN_CHARACTERS] + "..."


class NemoLlmError(Exception):
    """Base of the errors that end a program with one message and no traceback."""

    exit_code = ExitCode.FAILED


class InputError(NemoLlmError):
    """A file, folder or argument that cannot be used. The message names it, the value received and the fix."""

    exit_code = ExitCode.BAD_INPUT


class ConfigError(InputError, ValueError):
    """A configuration that cannot be run; carries every problem found, not only the first.

    It is a ValueError so that the decoder collects those that a section's ``__post_init__`` raises.
    """

    def __init__(self, problems: str | Iterable[Problem]):
        self.problems = (Problem("", NO_VALUE, problems, ""),) if isinstance(problems, str) else tuple(problems)
        count = len(self.problems)
        title = "1 problem in the configuration" if count == 1 else f"{count} problems in the configuration"
        lines = [f"  {number}. {problem}" for number, problem in enumerate(self.problems, start=1)]
        super().__init__("\n".join([f"{title}:", *lines]))


class RunBusyError(InputError):
    """Another process works in the run folder: nothing is wrong with the input, and a later start may well succeed."""

    exit_code = ExitCode.BUSY


class CheckpointError(NemoLlmError):
    """A checkpoint could not be written or read."""


class CheckpointNotFoundError(CheckpointError, InputError):
    """No complete checkpoint lies where one was asked for."""

    exit_code = ExitCode.BAD_INPUT


class CheckpointDamagedError(CheckpointError, InputError):
    """A checkpoint's file is missing, truncated or does not match its checksum; the message names the file."""

    exit_code = ExitCode.BAD_INPUT


class CheckpointRefusedError(CheckpointError, InputError):
    """It holds something else than is asked for, or a newer version wrote it, or a file of it points out of its folder
    or asks for what no checkpoint needs.
    """

    exit_code = ExitCode.BAD_INPUT
