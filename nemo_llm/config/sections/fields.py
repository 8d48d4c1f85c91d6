"""What every configuration section shares: the strict base class and the ranges that fields may have."""

import os
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Interval, MinLen


class Section:
    """Base of the configuration dataclasses: the decoder refuses keys that are not fields, and numbers without end."""

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}


Scalar = bool | int | float | str | None

PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
DropoutFraction = Annotated[float, Interval(ge=0, lt=1)]
NonEmptyStr = Annotated[str, MinLen(1)]


class HomeExpanded:
    """Marks a text as a path, or as a name that may be one: a ``~`` at its beginning becomes the home folder."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """The decoder's schema; imported here, since ``--help`` does without pydantic."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(expand_home, handler(source))


def expand_home(path: str) -> str:
    """`path` with the home folder in place of ``~`` or ``~user``.

    Raises:
        ValueError: there is no such user.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path}: there is no user of this name; write ./{path} for a file or folder of this name")
    return expanded


PathStr = Annotated[str, MinLen(1), HomeExpanded()]
