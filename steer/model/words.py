"""Words of a text: does it hold an answer?"""

from __future__ import annotations

import re


def holds(text: str, part: str) -> bool:
    """The part stands in the text, whatever its case, and no letter or digit goes on at an end that is a Latin letter or a digit: `4` is
    not in `42`. Scripts that write no spaces have no such ends."""
    first = r"(?<![^\W_])" if part[0].isascii() and part[0].isalnum() else ""
    last = r"(?![^\W_])" if part[-1].isascii() and part[-1].isalnum() else ""
    return re.search(first + re.escape(part) + last, text, re.IGNORECASE) is not None
