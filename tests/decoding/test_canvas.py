"""Canvas: what can be decoded, and what is refused."""

from typing import Any

import pytest
import torch
from scripted import MASK, PAD, Scripted, canvas, rugged

from diffucoder.decoding.canvas import Canvas
from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.step import Sequence, denoise
from diffucoder.errors import PromptError


def test_masks_are_put_behind_prompts_of_any_length() -> None:
    made = canvas([1, 2, 3], [4], new_tokens=2)
    assert made.tokens.tolist() == [[1, 2, 3, MASK, MASK], [PAD, PAD, 4, MASK, MASK]]
    assert made.valid.tolist() == [[True] * 5, [False, False, True, True, True]]
    assert made.masked.tolist() == [[False] * 3 + [True] * 2] * 2
    assert made.tokens.dtype == torch.int64


def test_masks_within_a_prompt_are_holes() -> None:
    made = canvas([1, MASK, 3], new_tokens=0)
    assert made.masked.tolist() == [[False, True, False]]


def test_masks_on_padding_are_no_holes() -> None:
    ids, valid = torch.tensor([[MASK, 1, 2]]), torch.tensor([[False, True, True]])
    assert Canvas.from_prompts(ids, valid=valid, new_tokens=1, mask_id=MASK).masked.tolist() == [[False] * 3 + [True]]


def test_int32_ids_and_masks_of_ones_are_understood() -> None:
    ids, valid = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([[0, 1]])
    made = Canvas.from_prompts(ids, valid=valid, new_tokens=1, mask_id=MASK)
    assert made.tokens.dtype == torch.int64
    assert made.valid.tolist() == [[False, True, True]]


@pytest.mark.parametrize(
    ("ids", "changes", "said"),
    [
        ([[1, 2]], {"valid": [[True, False]]}, "row 0 has padding right of a token"),
        ([[1, 2]], {"new_tokens": 0}, "nothing to decode"),
        ([[1, 2]], {"new_tokens": -1}, "new_tokens=-1"),
        ([[1, 2]], {"valid": [[True]]}, "does not fit"),
        ([1, 2], {}, "rows, length"),
        ([[1.5, 2.0]], {}, "rows, length"),
        ([[]], {}, "rows, length"),
    ],
    ids=str,
)
def test_what_cannot_be_decoded_is_refused(ids: list[Any], changes: dict[str, Any], said: str) -> None:
    if "valid" in changes:
        changes = {**changes, "valid": torch.tensor(changes["valid"])}
    with pytest.raises(PromptError, match=said):
        Canvas.from_prompts(torch.tensor(ids), **{"new_tokens": 2, "mask_id": MASK, **changes})


@pytest.mark.parametrize(
    ("ids", "changes", "said"),
    [
        ([[1, 2], [MASK, 2]], {}, "row 1 begins with a mask"),
        ([[1, MASK]], {"valid": [[False, True]]}, "row 0 begins with a mask"),
        ([[1, 2]], {"valid": [[False, False]]}, "row 0 begins with a mask"),
    ],
    ids=str,
)
def test_masks_that_a_shifted_model_cannot_score_are_refused(ids: Any, changes: dict[str, Any], said: str) -> None:
    changes = {name: torch.tensor(value) for name, value in changes.items()}
    made = Canvas.from_prompts(torch.tensor(ids), new_tokens=2, mask_id=MASK, **changes)
    made.check_scorable(0)  # a model without the shift scores them all
    with pytest.raises(PromptError, match=said):
        made.check_scorable(1)
    with pytest.raises(PromptError, match=said):
        next(denoise(Scripted(rugged), made, DecodingParams()))  # type: ignore[arg-type]


def test_a_canvas_of_ones_own_must_fit_together() -> None:
    tokens = torch.tensor([[1, MASK]])
    with pytest.raises(PromptError, match="do not fit"):
        Canvas(tokens=tokens, valid=tokens > 0, sample=torch.zeros(2), mask_id=MASK)


def test_samples_are_consecutive_rows_with_numbers_of_their_own() -> None:
    made = canvas([1], [2], new_tokens=1).repeat(3)
    assert made.tokens[:, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert made.sample.tolist() == [0, 1, 2, 0, 1, 2]
    assert made.repeat(2).sample.tolist() == [0, 1, 2, 3, 4, 5] * 2


def test_the_end_is_the_first_terminator_that_was_generated() -> None:
    made = canvas([7, 1], [7, 2], new_tokens=3, terminators=(7, 5))
    for row, finished, end in ((0, [7, 1, 3, 5, 7], 3), (1, [7, 2, 3, 3, 3], 5)):
        sequence = Sequence(made, DecodingParams(), row=row)
        sequence.tokens = torch.tensor(finished)
        assert sequence.answer_end == end
