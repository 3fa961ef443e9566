"""Oracle 19: decoding, training and serving give what they gave when the fixtures were recorded (`record.py`).

Tokens, steps, passes and texts are compared exactly; log-probabilities, confidences, entropies and losses up to the
rounding of other machines.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from golden_adapter import ask, decode, load_coder, server, train
from golden_cases import DECODING, REQUESTS, TRAINING
from record import PARTS, differences, read, tolerance

from diffucoder.errors import SandboxError
from diffucoder.grading.sandbox import isolation

FIXTURES = {part: read(part) for part in PARTS}


@pytest.fixture(scope="module")
def coder() -> Any:
    return load_coder()


@pytest.fixture(scope="module")
def client(coder: Any) -> Iterator[Any]:
    with server(coder) as client:
        yield client


@pytest.fixture(autouse=True)
def _unaccelerated() -> Iterator[None]:
    """accelerate keeps the state of a process in globals; a run that failed leaves its own behind."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def assert_as_recorded(part: str, name: str, found: Any) -> None:
    different = differences(FIXTURES[part][name], found, name, **tolerance(part))
    assert not different, f"{len(different)} differences:\n" + "\n".join(different[:10])


def test_every_case_has_a_fixture() -> None:
    assert [case["name"] for case in DECODING] == list(FIXTURES["decoding"])
    assert [request["name"] for request in REQUESTS] == list(FIXTURES["server"])
    assert list(TRAINING) == list(FIXTURES["training"])


@pytest.mark.parametrize("case", DECODING, ids=lambda case: case["name"])
def test_decoding(coder: Any, case: dict[str, Any]) -> None:
    assert_as_recorded("decoding", case["name"], decode(coder, case))


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request["name"])
def test_server(client: Any, request_: dict[str, Any]) -> None:
    assert_as_recorded("server", request_["name"], ask(client, request_))


@pytest.mark.parametrize("name", TRAINING)
def test_training(name: str, tmp_path: Path) -> None:
    if TRAINING[name]["stage"] == "grpo":
        try:
            isolation()
        except SandboxError as error:
            pytest.skip(str(error))
    lines, recorded = train(TRAINING[name], tmp_path), FIXTURES["training"][name]
    assert_as_recorded("training", name, {figure: [line[figure] for line in lines] for figure in recorded})
