"""What docs/deploy.md describes, as far as it can be judged without Docker and without systemd as the first process."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "deploy.md").read_text(encoding="utf-8")
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    compose = yaml.safe_load((REPOSITORY / "compose.yaml").read_text(encoding="utf-8"))
    assert list(compose["secrets"]) == compose["services"]["diffucoder"]["secrets"]
    service: dict[str, Any] = compose["services"]["diffucoder"]
    return service


def unit() -> str:
    return PAGE.partition("```ini\n")[2].partition("```")[0]


def test_the_composed_service_can_do_little_else_than_serve(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert not any("KEY" in word for word in service.get("environment", ()))  # a secret is read from its file


def test_options_given_to_the_server_are_those_it_has(service: dict[str, Any]) -> None:
    told = subprocess.run([sys.executable, "-m", "diffucoder.cli", "serve", "--help"], capture_output=True, text=True)
    given = [*service["command"], *re.findall(r'"(--\S+?)"', DOCKERFILE), *re.findall(r"(?<=\s)--[\w-]+", unit())]
    options = {word for word in given if word.startswith("--")}
    assert {"--host", "--api-key-file", "--set"} <= options
    assert all(option in told.stdout for option in options)


def test_the_image_is_given_what_it_copies() -> None:
    let_through = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = " ".join(re.findall(r"^COPY (?!--)(.*) \S+$", DOCKERFILE, re.MULTILINE)).split()
    assert set(copied) == let_through
    assert all((REPOSITORY / name).exists() for name in copied)


def test_torchs_range_is_the_packages_own() -> None:
    ranges = [
        re.findall(r'"(torch>=[^"]*)"', text) for text in (DOCKERFILE, (REPOSITORY / "pyproject.toml").read_text())
    ]
    assert ranges[0] == ranges[1] != []


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not here")
def test_the_unit_is_one_that_systemd_understands_and_finds_hardened(tmp_path: Path) -> None:
    file = tmp_path / "diffucoder.service"
    file.write_text(unit().replace("/opt/diffucoder/bin/diffucoder", sys.executable), encoding="utf-8")
    for check in (["verify", "--man=no"], ["security", "--offline=yes", "--threshold=20"]):  # of 100, 14 when written
        done = subprocess.run(["systemd-analyze", *check, str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        assert file.name not in done.stderr, done.stderr  # a key it does not know is told there, and forgiven
