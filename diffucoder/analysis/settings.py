"""Settings of the analysis of order, for questions that the paper leaves open. No torch: they become options."""

from typing import Literal

from pydantic import Field

from diffucoder.config import Settings


class Conventions(Settings):
    """How AR-ness is counted where the paper leaves it open. Left to right is 1, except with `include`."""

    boundary: Literal["exclude", "include", "prompt"] = Field(
        default="exclude",
        description="the first k commitments of local AR-ness@k: exclude them, include them as failures, or count the "
        "prompt as read in order before them (prompt)",
    )
    ordered: bool = Field(
        default=False,
        description="the k positions before a token must be committed from left to right, not in any order",
    )
    several: Literal["left_to_right", "surest_first", "at_once"] = Field(
        default="left_to_right",
        description="order of the tokens of one step: left_to_right, surest_first, or at_once (none follows another)",
    )
    span: Literal["answer", "interrupted", "canvas"] = Field(
        default="answer",
        description="part that is measured: answer (with its terminator, without padding), interrupted (the answer, "
        "where padding between its tokens breaks a run), or canvas (all of it)",
    )
