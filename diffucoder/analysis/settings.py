"""Settings of the analysis of order: what the paper leaves open. No torch: the command line makes options of them."""

from typing import Literal

from pydantic import Field

from diffucoder.config import Settings


class Conventions(Settings):
    """How AR-ness is counted where the paper leaves it open. Left to right is 1, except with `include`."""

    boundary: Literal["exclude", "include", "prompt"] = Field(
        default="exclude",
        description="the first k commitments of local AR-ness@k: exclude them, include them as failures, or count the "
        "prompt as read in order before them",
    )
    ordered: bool = Field(
        default=False,
        description="the k positions before a token must be committed from left to right, not in any order",
    )
    several: Literal["left_to_right", "surest_first", "at_once"] = Field(
        default="left_to_right",
        description="tokens of a step come left_to_right, surest_first, or at_once (then none follows another)",
    )
    span: Literal["answer", "interrupted", "canvas"] = Field(
        default="answer",
        description="what is measured: the answer with its terminator, as if no padding had been committed; the same "
        "interrupted by the padding that was committed between its tokens; or all of the canvas",
    )
