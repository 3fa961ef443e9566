"""Requests that schemathesis makes from the server's own `/openapi.json`: no 5xx. `FUZZ_EXAMPLES` sets their number.

It knows the protocol from another side than `strategies`: what the published schema allows, and what it does not.
"""

import os
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from diffucoder import DiffuCoder
from diffucoder.decoding.params import DecodingParams
from diffucoder.serving.app import create_app
from diffucoder.serving.settings import EngineSettings, ServerSettings

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "12"))  # of each operation


@pytest.fixture(scope="module")
def published() -> Any:
    coder = DiffuCoder.load(dtype=torch.float32, device="cpu")
    limits = EngineSettings(deadline=2.0)
    app = create_app(coder, ServerSettings(decoding=DecodingParams(new_tokens=2), engine=limits))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_no_request_is_a_server_error(published: Any) -> None:
    # not schema.parametrize(): its lazy form needs an older pytest
    for operation in published.get_all_operations():
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            send(operation.ok(), mode)


def send(operation: Any, mode: GenerationMode) -> None:
    """Send requests to an operation that its schema allows, or that it does not allow."""

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=HealthCheck)
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        case.validate_response(case.call(), checks=[not_a_server_error])

    with suppress(Unsatisfiable):  # an operation without parameters allows everything
        check()
