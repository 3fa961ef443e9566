"""The tiny problems: every block and every kind of problem is right, and no split sees another's compositions."""

import random
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

import diffucoder
from diffucoder.errors import ConfigError, SandboxError
from diffucoder.grading.grade import grade_many
from diffucoder.grading.sandbox import isolation
from recipes.tiny.data import held_out as write_held_out
from recipes.tiny.problems import (
    Block,
    Plan,
    Problem,
    draw_examples,
    draw_use,
    load_blocks,
    problems,
    split_of,
    third_person,
    write_problem,
)

SHIPPED = Path(diffucoder.__file__).parent / "data" / "tiny_problems.jsonl.gz"


@pytest.fixture(scope="module")
def training() -> list[Problem]:
    return list(problems("train", 2000, seed=0))


@pytest.fixture(scope="module")
def held_out() -> dict[str, list[Problem]]:
    return {"dev": list(problems("dev", 60, seed=0)), "test": list(problems("test", 150, seed=0))}


def alone(block: Block, rng: random.Random) -> Problem:
    """A problem that asks for nothing but this block."""
    for _ in range(50):  # some constants leave no two inputs with different outputs
        plan = Plan("chain", block.takes, (draw_use(rng, [block]),))
        examples = draw_examples(rng, plan)
        if examples is not None:
            return write_problem(rng, plan, examples)
    raise AssertionError(f"{block.id} gives no problem")


def test_there_are_hundreds_of_blocks_each_with_its_own_id() -> None:
    assert len({block.id for block in load_blocks()}) == len(load_blocks()) > 300


def test_blocks_know_several_different_phrasings() -> None:
    for block in load_blocks():
        assert len(set(block.phrasings)) == len(block.phrasings) > 1, block.id
        assert all(block.phrasings), block.id


def test_no_phrasing_asks_for_two_different_blocks_of_one_type() -> None:
    asked = Counter((block.takes, phrasing) for block in load_blocks() for phrasing in block.phrasings)
    assert [request for request, count in asked.items() if count > 1] == []


def test_every_block_alone_satisfies_its_own_asserts() -> None:
    rng = random.Random(0)
    for block in load_blocks():
        problem = alone(block, rng)
        scope: dict[str, object] = {}
        exec(problem.solution, scope)  # our own table, no model's program
        for test in problem.tests:
            exec(test, scope)


def test_the_solution_follows_the_block_for_any_constants_and_names(training: list[Problem]) -> None:
    for problem in training[:300]:
        scope: dict[str, object] = {}
        exec("\n".join([problem.solution, *problem.tests]), scope)
        assert callable(scope[problem.name])


@pytest.mark.parametrize("kind", ["chain", "branch", "guard"])
def test_solutions_pass_in_the_sandbox_and_a_wrong_program_fails(kind: str, training: list[Problem]) -> None:
    try:
        isolation()
    except SandboxError as error:
        pytest.skip(str(error))
    sample = list(islice((p for p in training if p.composition[0] == kind), 40))
    assert len(sample) == 40
    assert all(verdict.passed for verdict in grade_many((p.solution, p.tests) for p in sample))
    constant = [(f"def {p.name}(value):\n    return None\n", p.tests) for p in sample[:6]]
    assert not any(verdict.passed for verdict in grade_many(constant))


def test_the_request_names_the_function_unless_it_is_called_solve(training: list[Problem]) -> None:
    assert all(problem.name in problem.prompt or problem.name == "solve" for problem in training)


def test_five_asserts_tell_a_problem_from_a_constant(training: list[Problem]) -> None:
    for problem in training:
        assert len(problem.tests) == 5
        assert len({test.partition(" == ")[2] for test in problem.tests}) > 1


def test_no_composition_is_in_two_splits(training: list[Problem], held_out: dict[str, list[Problem]]) -> None:
    train, dev, test = ({p.composition for p in drawn} for drawn in (training, *held_out.values()))
    assert train.isdisjoint(dev)
    assert train.isdisjoint(test)
    assert dev.isdisjoint(test)


def test_splits_share_no_prompt(training: list[Problem], held_out: dict[str, list[Problem]]) -> None:
    prompts = [problem.prompt for drawn in (training, *held_out.values()) for problem in drawn]
    assert len(set(prompts)) == len(prompts)


def test_single_blocks_are_for_training_alone(held_out: dict[str, list[Problem]]) -> None:
    assert all(split_of(("chain", block.id)) == "train" for block in load_blocks())
    assert all(len(problem.composition) > 2 for drawn in held_out.values() for problem in drawn)


def test_every_block_occurs_in_training(training: list[Problem]) -> None:
    known = {block for problem in training for block in problem.composition[1:]}
    assert known == {block.id for block in load_blocks()}


def test_about_a_tenth_of_the_compositions_is_held_out_for_the_test() -> None:
    rng = random.Random(0)
    splits = Counter(split_of(("chain", str(rng.random()), str(rng.random()))) for _ in range(4000))
    assert splits["test"] / 4000 == pytest.approx(0.10, abs=0.02)
    assert splits["dev"] / 4000 == pytest.approx(0.05, abs=0.015)


def test_tens_of_thousands_of_compositions_are_possible(training: list[Problem]) -> None:
    # Chao 1984: from how many kinds are seen once and twice, a lower bound on how many there are
    seen = Counter(Counter(problem.composition for problem in training).values())
    assert sum(seen.values()) + seen[1] ** 2 / (2 * seen[2]) > 20_000


def test_a_seed_fixes_the_problems_and_another_changes_them(training: list[Problem]) -> None:
    assert list(problems("train", 100, seed=0)) == training[:100]
    assert list(problems("train", 100, seed=1)) != training[:100]


def test_asking_for_no_problems_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"count=0 .* at least 1"):
        next(problems("train", 0, seed=0))


@pytest.mark.parametrize(
    ("phrase", "third"),
    [
        ("keep the even numbers", "keeps the even numbers"),
        ("match the words", "matches the words"),
        ("multiply each number by 3", "multiplies each number by 3"),
        ("integer-divide each number", "integer-divides each number"),
        ("upper-case the string", "upper-cases the string"),
        ("play the string", "plays the string"),
    ],
)
def test_requests_are_conjugated(phrase: str, third: str) -> None:
    assert third_person(phrase) == third


def test_asserts_try_both_sides_of_a_condition(training: list[Problem]) -> None:
    conditional = [p for p in training if p.composition[0] != "chain"]
    for problem in conditional[:200]:
        lines = problem.solution.splitlines()
        condition = lines[1].strip().removeprefix("if ").removesuffix(":")
        parameter = lines[0].partition("(")[2].removesuffix("):")
        values = [test.removeprefix(f"assert {problem.name}(").rpartition(") == ")[0] for test in problem.tests]
        assert {bool(eval(f"(lambda {parameter}: {condition})({value})")) for value in values} == {True, False}


def test_the_package_ships_exactly_the_held_out_problems_that_the_generator_makes(tmp_path: Path) -> None:
    write_held_out(tmp_path / "problems.jsonl.gz")
    assert (tmp_path / "problems.jsonl.gz").read_bytes() == SHIPPED.read_bytes()
