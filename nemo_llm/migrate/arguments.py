"""Command-line arguments out of a text or a shell script, without running it."""

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

# Arguments of Megatron-LM that take several values; any other takes one at most.
_MANY = (
    "data-path train-data-path valid-data-path test-data-path rampup-batch-size recompute-modules cp-comm-type "
    "profile-ranks iterations-to-skip hierarchical-context-parallel-sizes moe-router-load-balancing-type "
    "moe-aux-loss-coeff mrope-section tiktoken-special-tokens high-priority-stream-groups"
)
_LONGEST_QUOTATION = 200  # lines
_END = re.compile(r"-[A-Za-z-]|[|;&<>]|\d?>|[()]+$|.*\.py$|(then|fi|else|do|done|torchrun|python3?|srun|exec)$|\w+\+?=")


def mentions(text: str) -> Iterator[tuple[str, Any]]:
    """Every argument with its value (True where it has none) in a text or a shell script, in order, repeated ones too.

    Variables that the script sets itself are put in. Lists of arguments in quotes (``"--lr 1e-4"``) and in arrays
    count; what no branch of an ``if`` decides is taken as it stands.
    """
    words = _words(text)
    for number, word in enumerate(words):
        if not re.match(r"--[A-Za-z]", word):
            continue
        name, has_value, inline = word.removeprefix("--").partition("=")
        name = name.replace("_", "-")
        values = [inline.rstrip(";")] if has_value else _values_after(words, number, name)
        decoded = [_number(value.strip("'\"")) for value in values]
        yield name.rstrip(")"), True if not decoded else decoded[0] if len(decoded) == 1 else decoded


def _words(text: str) -> list[str]:
    variables: dict[str, str] = {}
    words: list[str] = []
    for parts in _lines(text):
        while parts and (found := re.fullmatch(r"(\w+)(\+?)=(.*)", parts[0], re.DOTALL)):
            name, appended, value = found[1], found[2], found[3]
            if value.startswith("("):  # an array: its items count where they stand
                parts[0] = value[1:]
                break
            value = _expand(value, variables)
            if appended or re.search(rf"\$\{{?{name}\b", found[3]):
                variables[name] = f"{variables.get(name, '')}{value}" if appended else value
            else:
                variables.setdefault(name, value)
            parts = parts[1:]
        words += [word for part in parts for word in _expand(part, variables).split()]
    return words


def _lines(text: str) -> Iterator[list[str]]:
    """Words of each command: continued lines are one, and so are the lines of one quotation."""
    lines = re.sub(r"\\[ \t]*\r?\n", " ", text).splitlines()
    while lines:
        for count in range(1, min(len(lines), _LONGEST_QUOTATION) + 1):
            try:
                parts = shlex.split("\n".join(lines[:count]), comments=True)
            except ValueError:  # a quotation that is still open
                continue
            break
        else:
            count, parts = 1, lines[0].split()
        lines = lines[count:]
        while parts and parts[0] in ("export", "declare", "local", "readonly"):
            parts = parts[1:]
        yield parts


def _values_after(words: list[str], number: int, name: str) -> list[str]:
    values: list[str] = []
    for word in words[number + 1 :]:
        if _END.match(word) or (values and name not in _MANY.split()):
            break
        last = word.endswith(";") or (word.endswith(")") and "(" not in word)  # of a command, of an array
        values.append(word.rstrip(";").rstrip(")") if last else word)
        if last:
            break
    return [value for value in values if value]


def _expand(text: str, variables: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        name, default = found[1] or found[3], found[2]
        return variables.get(name, (default or "").removeprefix(":-").strip('"') or found[0])

    return re.sub(r"\$\{(\w+)(:-[^}]*)?\}|\$(\w+)", value, text)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
