"""Settings of the analysis of order: what the paper leaves open. Without torch, since `cli` makes options of them."""

from typing import Literal

from diffucoder.config import Settings


class Conventions(Settings):
    """How AR-ness is counted where the paper leaves it open; one token a step from the left is 1, but by `include`."""

    boundary: Literal["exclude", "include", "prompt"] = "exclude"
    """the first k commitments of local AR-ness@k: left out, failures, or behind a prompt that was read in order"""

    ordered: bool = False
    """the k positions before a token must have come from left to right; else in any order"""

    several: Literal["left_to_right", "surest_first", "at_once"] = "left_to_right"
    """tokens of one step come from left to right, the surest first, or at once, so that none follows another"""

    span: Literal["answer", "canvas"] = "answer"
    """what is measured: the answer with its terminator, or all that was committed"""
