"""Jinja in a sandbox: templates come from elsewhere, and none may reach Python's inside. Their errors name the line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_llm.errors import InputError


def sandbox(**settings: Any) -> ImmutableSandboxedEnvironment:
    """An environment with Jinja's ``settings``, in which templates change none of what they are given."""
    environment = ImmutableSandboxedEnvironment(**settings)
    environment.globals["dict"] = _DictMaker()
    environment.globals["namespace"] = _Namespace
    return environment


class SandboxedTemplate:
    """A template with the file or name that it came from, for messages."""

    def __init__(self, source: str, origin: str, environment: ImmutableSandboxedEnvironment) -> None:
        """Raises InputError where the source is no Jinja template, with the line."""
        self.source, self.origin = source, origin
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{origin}, line {error.lineno}: no Jinja template ({error.message})") from None
        except RecursionError:
            raise InputError(f"{origin}: no Jinja template (nested too deep)") from None

    def fill(self, values: Mapping[str, Any], subject: str, verb: str = "") -> str:
        """The text with these variables.

        Raises:
            InputError: whatever the template leads to: ``subject``, the template's line, ``verb`` and the reason.
        """
        try:
            return self._template.render(values)
        except Exception as error:  # a template may fail in any way
            kind = "" if isinstance(error, jinja2.TemplateError) and str(error) else f"{type(error).__name__}: "
            raise InputError(f"{subject}{_line_of(error)}{verb}: {kind}{error}") from None


def read_source(path: Path) -> str:
    """The text of a template's file.

    Raises:
        InputError: it cannot be read, or is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def _line_of(error: BaseException) -> str:
    """``, line N`` of the template in which `error` was raised."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f", line {line}"


class _DictMaker:
    """What templates call as ``dict``: no class whose attributes lead elsewhere."""

    def __call__(self, *values: Any, **named: Any) -> dict:
        return dict(*values, **named)

    def fromkeys(self, *values: Any) -> dict:
        return dict.fromkeys(*values)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's ``namespace`` without names that begin with an underscore."""

    def __init__(self, /, *values: Any, **named: Any) -> None:
        names = dict(*values, **named)
        for name in names:
            _check_name(name)
        super().__init__(names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace holds no name that begins with _, received {name!r}")
