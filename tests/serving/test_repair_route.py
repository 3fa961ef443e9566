"""`/v1/repair`: tests run only if the server allows it, its limits hold, and other requests do not wait for it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastapi.testclient import TestClient

from diffucoder import DiffuCoder
from diffucoder.errors import SandboxError
from diffucoder.grading.sandbox import isolation
from diffucoder.serving.app import create_app
from diffucoder.serving.settings import EngineSettings, ServerSettings

BROKEN = "# Given a number, double the number.\ndef double(n):\n    return n + 2\n"


def client(**settings: object) -> TestClient:
    server = ServerSettings(hosts=("testserver",), **settings)
    return TestClient(create_app(DiffuCoder.load(dtype=torch.float32, device="cpu"), server))


def test_tests_run_in_the_sandbox_of_a_server_that_is_told_to() -> None:
    try:
        isolation()
    except SandboxError as error:
        pytest.skip(str(error))
    with client(run_tests=True) as server:
        answer = server.post("/v1/repair", json={"text": BROKEN, "tests": ["assert double(5) == 10"]}).json()
        assert (answer["passed"], answer["passed_tests"], answer["changed"]) == (True, 1, True)
        assert answer["fault"].startswith("test 1: AssertionError")


def test_a_repair_over_the_limits_is_refused_before_it_is_decoded() -> None:
    with client(engine=EngineSettings(max_computed=5000)) as server:
        answer = server.post("/v1/repair", json={"text": "x = (1\n", "passes": 8000})
        assert answer.status_code == 400
        assert "max_computed" in answer.json()["error"]["message"]
        assert "diffucoder_passes_total 0.0" in server.get("/metrics").text
        long = server.post("/v1/repair", json={"text": "x = (1\n" * 50, "passes": 8})
        assert (long.status_code, "raise it" in long.json()["error"]["message"]) == (400, True)


def test_repairs_and_other_requests_are_answered_together() -> None:
    text = BROKEN.replace("n + 2", "m * 2")
    with client(engine=EngineSettings(max_rows=7)) as server, ThreadPoolExecutor(4) as pool:
        repairs = [pool.submit(server.post, "/v1/repair", json={"text": text}) for _ in range(3)]
        short = pool.submit(server.post, "/v1/fill", json={"text": "x = <|hole:2|>\n"})
        assert short.result().status_code == 200
        texts = {repair.result().json()["text"] for repair in repairs}
    assert len(texts) == 1
