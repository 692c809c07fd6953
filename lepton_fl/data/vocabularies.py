"""Public code lists that a study may name instead of listing codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Names of a code list's groups, and the group that a code in normal text belongs to."""

    groups: tuple[str, ...]
    group_of: Callable[[str], int | None]


# ISO 18245: retail financial services, merchant category codes; first and last code of each range.
_MERCHANTS = (
    (1, 1499, "agricultural"),
    (1500, 2999, "contracted"),
    (3000, 3299, "airlines"),
    (3300, 3499, "car-rental"),
    (3500, 3999, "lodging"),
    (4000, 4799, "transport"),
    (4800, 4999, "utilities"),
    (5000, 5599, "retail"),
    (5600, 5699, "clothing"),
    (5700, 7299, "miscellaneous"),
    (7300, 7999, "business"),
    (8000, 8999, "professional"),
    (9000, 9999, "government"),
)


def _merchant_group(code: str) -> int | None:
    # Normal text has no leading zeros; a spreadsheet loses them too, so 0742 and 742 are one code.
    if not (code.isascii() and code.isdigit() and len(code) <= 4):
        return None
    number = int(code)
    return next((i for i, (first, last, _) in enumerate(_MERCHANTS) if first <= number <= last), None)


VOCABULARIES = {
    "iso18245": Vocabulary(tuple(name for _, _, name in _MERCHANTS), _merchant_group),
}
"""By the name that `vocabulary = "..."` uses."""
