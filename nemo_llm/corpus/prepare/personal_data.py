"""Personal data in text, found by patterns and checked by what patterns cannot see, replaced by a mask of its kind.

Every pattern starts where a run of its characters begins and is bounded, so that the time is linear in the text.
"""

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass

from nemo_llm.config.commands.prepare import MaskRule

_CARD_DIGITS = {  # by issuer's range: the first digits, and how many there are in all
    r"4": (13, 16, 19),
    r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720": (16,),
    r"3[47]": (15,),
    r"6011|64[4-9]|65|62|35(?:2[89]|[3-8])": (16, 17, 18, 19),
    r"30[0-5]|36|38": (14, 15, 16, 17, 18, 19),
}


def _is_public_address(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _is_card_number(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    lengths = [lengths for start, lengths in _CARD_DIGITS.items() if re.match(start, digits)]
    return any(len(digits) in allowed for allowed in lengths) and _luhn(digits)


def _luhn(digits: str) -> bool:
    doubled = [2 * int(digit) for digit in digits[-2::-2]]
    return (sum(map(int, digits[-1::-2])) + sum(value - 9 * (value > 9) for value in doubled)) % 10 == 0


def _is_phone_number(text: str) -> bool:
    return 8 <= len(re.sub(r"\D", "", text)) <= 15


@dataclass(frozen=True, slots=True)
class _Kind:
    mask: str
    pattern: re.Pattern[str]
    valid: Callable[[str], bool]


_EMAIL = _Kind(
    "<EMAIL>",
    re.compile(
        r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9_%+-][A-Za-z0-9._%+-]{0,63}"
        r"@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,8}\.[A-Za-z]{2,24}(?![A-Za-z0-9-])"
    ),
    lambda _: True,
)
_ADDRESS = _Kind(
    "<IP_ADDRESS>",
    re.compile(
        r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)|(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])"
    ),
    _is_public_address,
)
_CARD = _Kind("<CARD_NUMBER>", re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)"), _is_card_number)
_PHONE = _Kind(
    "<PHONE_NUMBER>",
    re.compile(
        r"(?<![\w+])\+\d[\d ().-]{6,22}\d(?!\w)"
        r"|(?<![\w.+-])(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[ .-])[2-9]\d{2}[ .-]\d{4}(?![\w-]|\.\d)"
    ),
    _is_phone_number,
)


class Masker:
    """Replaces what a rule names."""

    def __init__(self, rule: MaskRule) -> None:
        chosen = [
            (rule.emails, _EMAIL),
            (rule.ip_addresses, _ADDRESS),
            (rule.card_numbers, _CARD),
            (rule.phone_numbers, _PHONE),
        ]
        self._kinds = [kind for wanted, kind in chosen if wanted]

    def mask(self, text: str) -> tuple[str, dict[str, int]]:
        """Return the text with its masks, and how many of each there are."""
        counts: dict[str, int] = {}
        for kind in self._kinds:

            def replace(match: re.Match[str], kind: _Kind = kind) -> str:
                if not kind.valid(match.group()):
                    return match.group()
                counts[kind.mask] = counts.get(kind.mask, 0) + 1
                return kind.mask

            text = kind.pattern.sub(replace, text)
        return text, counts
