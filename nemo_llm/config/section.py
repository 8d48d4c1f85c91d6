"""What every configuration section shares: the strict base class and the ranges that fields may have."""

from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Interval, MinLen


class Section:
    """Base of the configuration dataclasses: tells the decoder to refuse keys that are not fields."""

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


Scalar = bool | int | float | str | None

PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
DropoutFraction = Annotated[float, Interval(ge=0, lt=1)]
NonEmptyStr = Annotated[str, MinLen(1)]
