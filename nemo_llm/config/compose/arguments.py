"""Texts, names and paths of the command line, taken as they stand.

To Hydra's grammar ``What's up? (2+2=4)`` is an error, ``Hello, world`` two values, ``42`` a number and ``a ${b}`` a
reference. So the value of a key that takes text never meets it: a mark stands in its place until everything is
composed. What a key takes is the annotation of its field; the rules are in docs/training.md.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_llm.config.compose.catalog import annotation_at, union_members

_WORDS = ("null", "true", "false", "nan", "inf")  # that are no texts to Hydra
_MARK = re.compile(r"NEMO_LLM_TEXT_(\d+)_")


class Texts:
    """Texts on their way around Hydra and OmegaConf: `literal` and `hide` put marks in their place."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def literal(self, argument: str, section: type) -> str:
        """`argument` in a form that Hydra takes, its value hidden if the key of `section` takes it as it stands."""
        name, equals, value = argument.partition("=")
        if not equals or name.startswith("~"):
            return argument
        annotation = annotation_at(key_of(argument).split("."), section)
        if annotation is None:
            return argument if parse(argument) is not None else f"{name}={self.hide(value)}"
        return f"{name}={self._value(value, annotation)}"

    def hide(self, value: Any) -> str:
        """A value in the grammar of Hydra's command line, each text in it replaced by a mark."""
        return as_hydra(value, self._mark)

    def restore(self, value: Any) -> Any:
        """`value`, which may be nested, with every mark in its texts replaced by what it stands for."""
        if isinstance(value, str):
            return _MARK.sub(lambda mark: self._texts[int(mark[1])], value)
        if isinstance(value, Mapping):
            return {self.restore(key): self.restore(part) for key, part in value.items()}
        return [self.restore(part) for part in value] if isinstance(value, list) else value

    def _mark(self, text: str) -> str:
        self._texts.append(text)
        return f"NEMO_LLM_TEXT_{len(self._texts) - 1}_"

    def _value(self, value: str, annotation: Any) -> str:
        members = [get_args(one)[0] if get_origin(one) is Annotated else one for one in union_members(annotation)]
        takes_text = str in members
        if takes_text and value == "null" and NoneType in members:
            return value
        if takes_text and (quoted := _unquoted(value)) is not None:
            return value if "${" in quoted else self.hide(quoted)  # in quotes, Hydra's rules hold
        kinds = {get_origin(one) or one for one in members} - {str, NoneType}
        if takes_text and not kinds:
            return self.hide(value)
        override = parse(f"key={value}")
        if override is not None and not (takes_text and override.is_sweep_override()):
            found = None if override.is_sweep_override() else override.value()
            if (
                isinstance(found, list)
                and _is_list_of_texts(members)
                and not all(isinstance(one, str) for one in found)
            ):
                return self.hide(_as_texts(value, found))
            if not takes_text or _is_one_of(found, kinds):
                return value
        nested = _nested(value)
        return self.hide(value if nested is None or not _is_one_of(nested, kinds) else nested)


def key_of(argument: str) -> str:
    """The dotted key that an argument sets, without Hydra's signs around it."""
    return argument.partition("=")[0].lstrip("+").partition("@")[0]


def parse(argument: str) -> Override | None:
    """`argument` by Hydra's grammar; None where that cannot read it."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def as_hydra(value: Any, quote: Callable[[str], str] | None = None) -> str:
    """A value in the grammar of Hydra's command line; `quote` writes the texts in it."""
    quote = quote or _quoted
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key(key, quote)}:{as_hydra(part, quote)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(as_hydra(part, quote) for part in value) + "]"
    return quote(value) if isinstance(value, str) else repr(value)


def _key(key: Any, quote: Callable[[str], str]) -> str:
    plain = not isinstance(key, str) or (key.isidentifier() and key.lower() not in _WORDS)
    return str(key) if plain else quote(key)


def _quoted(text: str) -> str:
    """In single quotes. Backslashes mean something to Hydra before a quote, and to OmegaConf before ``${``."""
    text = re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", text)
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + (f"\\{found[2]}" if found[2] else ""), text) + "'"


def _unquoted(value: str) -> str | None:
    """What stands in the quotes of a value that is one quoted string of Hydra's, else None."""
    if len(value) < 2 or value[0] != value[-1] or value[0] not in "'\"":
        return None
    override = parse(f"key={value}")  # which reads nothing else that begins with a quotation mark, but for sweeps
    return None if override is None or override.is_sweep_override() else str(override.value())


def _is_one_of(value: Any, kinds: Sequence[Any] | set[Any]) -> bool:
    if Any in kinds:
        return True
    if isinstance(value, list):
        return bool({list, tuple} & set(kinds))
    if isinstance(value, Mapping):
        return any(kind is dict or hasattr(kind, "__dataclass_fields__") for kind in kinds)
    return type(value) in kinds


def _is_list_of_texts(members: Sequence[Any]) -> bool:
    lists = [get_args(one)[0] for one in members if get_origin(one) in (list, tuple)]
    return bool(lists) and all(get_args(one)[:1] == (str,) or one is str for one in lists)


def _as_texts(value: str, found: list[Any]) -> list[Any]:
    """The items of a list as they were written: ``[007]`` is the text 007. What YAML reads otherwise stays `found`."""
    try:
        items = yaml.load(value, yaml.BaseLoader)
    except yaml.YAMLError:
        return found
    return items if isinstance(items, list) and len(items) == len(found) else found


def _nested(value: str) -> Any:
    """A list or mapping that YAML reads and Hydra's grammar does not, as with ``~`` or ``=`` in a path; else None."""
    if value.strip()[:1] not in ("[", "{"):
        return None
    try:
        return OmegaConf.to_container(OmegaConf.create(value))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError):
        return None
