"""The ramp of colours from the first step to the last, and from sure to unsure: in the terminal, pages and drawings.

`canvas.css` defines its ends: blue and orange, which all readers can tell apart, both readable on white and on black.
"""

import re
from functools import cache
from pathlib import Path

_STYLE = Path(__file__).parent / "data" / "canvas" / "canvas.css"


@cache
def _ends() -> list[bytes]:
    """Red, green and blue of the first and of the last."""
    return [bytes.fromhex(end) for end in re.findall(r"--(?:first|last): #(\w{6});", _STYLE.read_text("utf-8"))]


def ramp(share: float) -> str:
    """The colour at a share of the way from the first to the last, as #rrggbb."""
    mixed = [round(first + (last - first) * share) for first, last in zip(*_ends(), strict=True)]
    return f"#{bytes(mixed).hex()}"
