"""What importing costs, what the public names are, and what the package never does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffucoder

SOURCES = sorted(Path(diffucoder.__file__).parent.rglob("*.py"))


def loaded_by(program: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `program`."""
    tell = "import sys; sys.stdout.flush(); print('loaded', *{name.partition('.')[0] for name in sys.modules})"
    ended = subprocess.run([sys.executable, "-c", f"{program}\n{tell}"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.rpartition("loaded ")[2].split())


@pytest.mark.parametrize(
    "program",
    [
        "import diffucoder, diffucoder.config, diffucoder.errors; dir(diffucoder)",
        "import diffucoder.grading.grade, diffucoder.grading.extract",
        "import recipes.tiny.problems",
        "from diffucoder import DecodingParams; DecodingParams(steps=3)",
        "import sys; sys.argv = ['diffucoder', '--help']\n"
        "from diffucoder.cli import main\ntry: main()\nexcept SystemExit as end: assert not end.code",
    ],
)
def test_what_needs_no_model_loads_no_torch(program: str) -> None:
    assert loaded_by(program).isdisjoint({"torch", "transformers", "numpy"})


def test_grading_completions_loads_no_torch() -> None:
    loaded = loaded_by("import diffucoder.evaluation.run, diffucoder.evaluation.samples")
    assert loaded.isdisjoint({"torch", "transformers"})


def test_help_greets_and_names_every_command() -> None:
    command = [sys.executable, "-m", "diffucoder.cli", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert all(name in ended.stdout for name in ("generate", "infill", "chat", "evaluate", "models", "bench"))


def test_the_public_names_are_few_sorted_and_resolve() -> None:
    assert diffucoder.__all__ == sorted(set(diffucoder.__all__)) == dir(diffucoder)
    assert len(diffucoder.__all__) <= 15
    for name in diffucoder.__all__:
        assert getattr(diffucoder, name).__name__ == name


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Decoder'; public names: Canvas, .*load_denoiser"):
        diffucoder.Decoder  # noqa: B018  # the look-up is the test


def test_remote_code_is_never_trusted() -> None:
    trusting = re.compile(r"trust_remote_code\W*[=:]\s*(?!False)")
    assert [path.name for path in SOURCES if trusting.search(path.read_text(encoding="utf-8"))] == []


def test_every_module_says_what_it_is_for() -> None:
    assert [path.name for path in SOURCES if not path.read_text(encoding="utf-8").startswith('"""')] == []
