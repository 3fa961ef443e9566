"""Verdicts: honest programs get what they deserve, and the usual ways of not earning a pass do not work."""

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from machine import in_time

from diffucoder.errors import ConfigError, SandboxError
from diffucoder.grading.grade import Call, call, grade, grade_many
from diffucoder.grading.runner import Child
from diffucoder.grading.sandbox import Limits, Sandbox, isolation, run
from diffucoder.grading.values import Opaque, from_json, to_json

GOOD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"]


@pytest.fixture(autouse=True, scope="module")
def isolated() -> None:
    try:
        isolation()
    except SandboxError as error:
        pytest.skip(str(error))


def test_results_that_only_look_like_plain_data() -> None:
    view = "def f():\n    return memoryview(b'abcd').cast('H')\n"
    assert not grade(view, ["assert f() == b'abcd'"]).passed
    assert grade(view, ["assert len(f()) == 2"]).passed


def test_a_good_program_passes() -> None:
    verdict = grade(GOOD, TESTS)
    assert (verdict.passed, verdict.passed_tests, verdict.total_tests) == (True, 3, 3)
    assert (verdict.status, verdict.detail) == ("ok", "")
    assert verdict.seconds > 0


def test_each_test_counts_for_itself() -> None:
    verdict = grade(GOOD, [TESTS[0], "assert add(1, 1) == 3", TESTS[1], "add(1)", "add(", TESTS[2]])
    assert (verdict.passed, verdict.passed_tests, verdict.total_tests) == (False, 3, 6)
    assert (verdict.status, verdict.detail) == ("failed", "test 2: AssertionError: assert add(1, 1) == 3; it gave 2")


def test_each_test_gets_a_fresh_program() -> None:
    assert grade("seen = []", ["seen.append(1); assert seen == [1]"] * 2).passed


@pytest.mark.parametrize(
    ("program", "status", "detail"),
    [
        ("def add(a, b:\n", "failed", "SyntaxError"),
        ("raise ValueError('no\\nway')", "failed", "ValueError: no way"),
        ("x = bytearray(1 << 40)", "failed", "MemoryError"),
        ("import os; os.abort()", "killed", "Aborted"),
        ("input()", "failed", "EOFError"),
        ("  \n", "no program", "empty"),
        ("\0", "failed", "null bytes"),
        ("x = '\ud800'", "failed", "UnicodeEncodeError"),
    ],
)
def test_a_broken_program_fails_every_test(program: str, status: str, detail: str) -> None:
    verdict = grade(program, TESTS)
    assert (verdict.passed_tests, verdict.total_tests, verdict.status) == (0, 3, status)
    assert detail in verdict.detail


def test_what_a_script_does_when_started_is_left_out() -> None:
    assert grade(GOOD + "if __name__ == '__main__':\n    add(int(input()), 1)\n", TESTS).passed


def test_classes_can_look_up_their_module() -> None:
    program = "import pickle\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
    assert grade(program, ["assert pickle.loads(pickle.dumps(P(1))) == P(1)"]).passed


def test_an_endless_loop_in_one_test_does_not_spoil_the_others() -> None:
    program = "def f(n):\n    while n == 0: pass\n    return n\n"
    verdict = grade(program, ["assert f(1) == 1", "assert f(0) == 0", "assert f(2) == 2"], Limits(seconds=1.5))
    assert (verdict.passed_tests, verdict.status) == (2, "timeout")
    assert verdict.detail.startswith("test 2:")


def test_a_slow_test_may_use_what_the_others_left() -> None:
    program = "import time\ndef f(seconds):\n    time.sleep(seconds)\n"
    assert grade(program, ["f(1)"] + ["f(0)"] * 3, Limits(seconds=3)).passed  # 1 s, where a fair share is 0.75


GROWS = "def f(x, seen=[]):\n    seen.append(x)\n    return len(seen)\n"


@pytest.mark.parametrize("second", ["assert f(2) == 1", "assert f(2) == 1 and f"])
def test_tests_that_run_together_see_what_the_ones_before_left(second: str) -> None:
    tests = ["assert f(1) == 1", second]
    assert grade(GROWS, tests).passed
    verdict = grade(GROWS, tests, together=True)
    assert (verdict.passed, verdict.status) == (False, "failed")
    in_order = ["assert f(1) == 1", second.replace("== 1", "== 2")]
    assert grade(GROWS, in_order, together=True).passed
    assert not grade(GROWS, in_order[::-1], together=True).passed


def test_tests_that_run_together_end_at_the_first_failure() -> None:
    verdict = grade("def f(x):\n    return 1 // x\n", [f"assert f({x}) == {x}" for x in (1, 0, 1)], together=True)
    assert (verdict.passed_tests, verdict.total_tests) == (1, 3)
    assert verdict.detail == "test 2: ZeroDivisionError: integer division or modulo by zero"
    assert "did not run" in verdict.tests[2].detail


STATEFUL = """
import itertools
count = itertools.count()
cache = {}
def f(x, seen=[]):
    cache[x] = cache.get(x, 0) + 1
    seen.append(next(count))
    return seen if x else cache
"""


@pytest.mark.parametrize(
    "tests",
    [
        ["f(1) == [0]", "f(1) == [0, 1]", "f(0) == {1: 2, 0: 1}"],
        ["f(1) == [0]", "f(1) == [1]"],
        ["f(1) == [0]", "f(0) is cache", "f(1) == [0, 1, 2]", "len(f(0)) == 2"],
        ["f(1) == [0]", "f(0) is not cache", "f(1) == [0, 1, 2]"],
        ["f(1)[0] == 0", "len(set(f(1))) == 2", "sum(f(2)) == 3", "f(0).keys() == {0, 1, 2}", "not f(0).get"],
        ["f(0) == {0: 1}", "f(0).items() == {(0, 2)}", "f(0) == {0: 3}", "sorted(f([])) == [0]"],
    ],
)
def test_tests_that_run_together_pass_where_plain_python_passes(tests: list[str]) -> None:
    asserts = [f"assert {test}" for test in tests]
    plain = run("\n".join([STATEFUL, *asserts]))
    assert grade(STATEFUL, asserts, together=True).status == plain.status


@pytest.mark.parametrize(("seconds", "status"), [(1.0, "ok"), (4.0, "timeout")])
def test_who_sleeps_has_no_more_time_than_who_computes(seconds: float, status: str) -> None:
    program = "import time\ndef f(x):\n    time.sleep(x)\n    return x\n"
    verdict = grade(program, [f"assert f({seconds}) == {seconds}"], Limits(seconds=3.0), together=True)
    assert (verdict.status, verdict.passed) == (status, status == "ok")


def test_an_answer_may_be_much_larger_than_what_a_program_prints() -> None:
    assert grade("def f(n):\n    return list(range(n))\n", ["assert len(f(100_000)) == 100_000"]).passed


def answering(program: str) -> Child:
    """A child that has answered the only question, or has ended."""
    job = {"kind": "value", "program": program, "output": 1000}
    child = Child(job, [("f()", (), 1.0)])
    assert select.select([child.pipe], [], [], 60)[0]
    while child.spent() and time.monotonic() < child.begin + 60 and not ended(child.process):
        time.sleep(0.01)
    return child


def ended(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_an_answer_that_is_there_is_in_time_however_late_the_runner_looks() -> None:
    child = answering("def f():\n    return 4\n")
    answers = list(child.answers(1.0, until=child.begin - 1.0))
    os.close(child.pipe)
    assert [(answer.status, answer.content) for answer in answers] == [("ok", b"4")]


def test_a_child_without_an_answer_at_the_end_of_the_clock_is_late() -> None:
    child = Child({"kind": "value", "program": "import time\ntime.sleep(60)\n", "output": 1000}, [("f()", (), 1.0)])
    (answer,) = child.answers(60.0, until=time.monotonic() + 0.2)
    child.kill()
    os.close(child.pipe)
    assert (answer.status, answer.content) == ("timeout", b'"clock: it waited too long for a processor"')


def test_seconds_of_a_child_are_those_asleep_and_on_a_processor_but_not_those_that_it_waits_for_one() -> None:
    program = "import time\nwhile time.process_time() < 1.0: pass\ntime.sleep(0.5)\n"
    rivals = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        child = Child({"kind": "value", "program": program, "output": 1000}, [("1", (), 60.0)])
        (answer,) = child.answers(60.0, until=time.monotonic() + 120)
        elapsed = time.monotonic() - child.begin
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()
    os.close(child.pipe)
    assert answer.status == "ok"
    assert 1.4 < child.used < min(1.9, elapsed)


def test_a_program_finds_its_own_source() -> None:
    program = "import inspect\ndef f():\n    return inspect.getsource(f), open(__file__).read(), __name__\n"
    (outcome,) = call(program, [Call("f()")])
    assert outcome.value == (program.partition("\n")[2], program, "program")


def test_an_endless_loop_in_the_program_fails_all_in_time() -> None:
    with in_time(24):  # five times 0.5 and 20 on a machine that is busy, and what it takes to start and to end
        verdict = grade("while True: pass", TESTS, Limits(seconds=0.5))
    assert (verdict.passed_tests, verdict.status) == (0, "timeout")


def test_processes_left_behind_do_not_hold_the_verdict_up() -> None:
    program = GOOD + "import os, time\nif os.fork() == 0:\n    os.setpgrp()\n    time.sleep(60)\n"
    with in_time(4):
        verdict = grade(program, TESTS)
    assert verdict.passed


WALK = """
import sys
from types import FrameType
def values(thing, depth=0):
    if isinstance(thing, bytes):
        yield thing
    elif depth < 4 and isinstance(thing, (list, tuple, set)):
        for each in thing:
            yield from values(each, depth + 1)
    elif depth < 4 and isinstance(thing, dict):
        yield from values(list(thing.values()), depth + 1)
frame, found = sys._getframe(), []
while frame:
    found += [*values(dict(frame.f_locals)), *values(dict(frame.f_globals))]
    frame = frame.f_back
import os
for secret in found:
    for pipe in range(3, 20):
        try:
            os.write(pipe, secret)
        except OSError:
            pass
os._exit(0)
"""


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("import sys; sys.exit(0)", id="sys.exit(0)"),
        pytest.param("import os; os._exit(0)", id="os._exit(0)"),
        pytest.param("raise SystemExit", id="SystemExit"),
        pytest.param("import sys\ndef add(a, b): sys.exit(0)", id="sys.exit within the test"),
        pytest.param("import os\ndef add(a, b): os._exit(0)", id="os._exit within the test"),
        pytest.param("import os\nfor i in range(9): print(i, 'ok', flush=True)\nos._exit(0)", id="printing results"),
        pytest.param("import os\nfor fd in range(99):\n  try: os.write(fd, b'0 ok \\n1 ok \\n2 ok \\n')\n"
                     "  except OSError: pass\nos._exit(0)", id="writing to every file"),
        pytest.param("import atexit, os\natexit.register(os._exit, 0)\nraise ValueError", id="an exit handler"),
        pytest.param("import builtins\nbuiltins.AssertionError = Exception\nadd = max", id="another AssertionError"),
        pytest.param("import os\nos._exit = os.write = lambda *a: None\nadd = max", id="a patched os"),
        pytest.param("import os\nopen(f'/proc/{os.getppid()}/fd/1', 'w').write('0 ok \\n1 ok \\n2 ok \\n')",
                     id="the runner's stdout"),
        pytest.param("import os\nopen('/proc/1/fd/1', 'w').write('0 ok \\n1 ok \\n2 ok \\n')",
                     id="the supervisor's stdout"),
        pytest.param("import os\nos.kill(os.getppid(), 9)", id="killing the runner"),
        pytest.param("import os\nif os.fork(): os._exit(0)\nadd = max", id="leaving it to a child"),
        pytest.param(WALK, id="variables up the stack"),
    ],
)  # fmt: skip
def test_a_pass_cannot_be_had_by(program: str) -> None:
    verdict = grade(program, ["assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert add(3, 4) == 7"])
    assert (verdict.passed, verdict.passed_tests) == (False, 0), verdict


LIAR = """
class Liar:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __lt__(self, other): return True
    def __abs__(self): return self
    def __sub__(self, other): return self
    __rsub__ = __sub__
    __hash__ = None
def add(a, b): return Liar()
"""


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(LIAR, id="an object that equals everything"),
        pytest.param(LIAR.replace("class Liar:", "class Liar(int):"), id="a number that equals everything"),
        pytest.param(LIAR.replace("class Liar:", "class Liar(float):"), id="a float that equals everything"),
        pytest.param("import sys\nsys.settrace(lambda *a: None)\nabs = set = lambda *a: 3\nadd = lambda a, b: 0",
                     id="shadowed built-ins"),
        pytest.param("import gc, os\nfor x in gc.get_objects():\n  if isinstance(x, (bytes, str)) and len(x) == 32:\n"
                     "    os.write(4, b'=' + (x if isinstance(x, bytes) else x.encode()))\nadd = max",
                     id="secrets found in memory"),
        pytest.param("import os\nfor fd in range(3, 9):\n  try: os.write(fd, b'ready\\n=true\\n')\n"
                     "  except OSError: pass\nos._exit(0)", id="answers forged beforehand"),
    ],
)  # fmt: skip
def test_where_the_answer_is_elsewhere_a_pass_cannot_be_had_by(program: str) -> None:
    verdict = grade(program, ["assert add(1, 2) == 5", "assert abs(add(2, 2) - 4.5) < 0.1", "assert 9 == add(3, 4)"])
    assert (verdict.passed_tests, verdict.trusted) == (0, True), verdict


def test_a_dictionary_that_unpacks_another_is_compared_as_a_whole() -> None:
    tests = ["assert f(2) == {**{'a': 1}, 'b': 2}"]
    assert grade("def f(x):\n    return {'a': 1, 'b': 2}\n", tests).passed
    assert not grade("def f(x):\n    return {'b': 2}\n", tests).passed


def test_what_runs_beside_the_program_is_not_trusted() -> None:
    verdict = grade(GOOD, ["assert add(1, 2) == 3", "assert add(1, 2) == add(2, 1)", "x = add(1, 1)\nassert x == 2"])
    assert verdict.passed
    assert not verdict.trusted
    assert [test.trusted for test in verdict.tests] == [True, False, False]


def test_the_first_failure_is_told() -> None:
    verdict = grade("def f(x):\n    y = 1\n    return y / x\n", ["assert f(1) == 1", "assert f(0) == 0"])
    assert verdict.detail == "test 2: ZeroDivisionError: division by zero"


# Values that come back


@pytest.mark.parametrize(
    "value",
    [
        "None", "True", "0", "-1", "2**63", "-(10**5000)", "1.5", "float('inf')", "1j", "'a'", "'\\ud800'", "b'x'",
        "[]", "[1, [2]]", "(1,)", "{1, 2}", "frozenset({(1, 2)})", "{'a': [1], (1, 2): None}", "'x' * 100_000",
    ],
)  # fmt: skip
def test_plain_data_comes_back_as_it_is(value: str) -> None:
    (outcome,) = call("", [Call(value)], Limits(output=1 << 20))
    assert outcome.status == "ok"
    assert outcome.value == eval(value)
    assert type(outcome.value) is type(eval(value))


def test_subclasses_come_back_as_what_they_are_made_of() -> None:
    program = "from collections import *\nimport enum\nclass C(enum.IntEnum):\n    a = 3\nP = namedtuple('P', 'x')\n"
    calls = ["Counter('aab')", "P(1)", "C.a", "OrderedDict(a=1).keys()", "__import__('fractions').Fraction(1, 2)"]
    values = [outcome.value for outcome in call(program, [Call(each) for each in calls])]
    assert values == [{"a": 2, "b": 1}, (1,), 3, {"a"}, 0.5]


def test_what_is_no_data_equals_nothing() -> None:
    nested = "x = []\nx.append(x)\nclass Any:\n    __eq__ = lambda *a: True\n"
    outcomes = call(nested, [Call("Any()"), Call("iter([])"), Call("x")])
    assert [isinstance(outcome.value, Opaque) for outcome in outcomes] == [True, True, False]
    assert outcomes[0].value != 1
    assert [type(member) for member in outcomes[2].value] == [Opaque]


def test_calls_are_put_to_one_process_with_their_arguments() -> None:
    program = "seen = []\ndef f(x):\n    seen.append(x)\n    return len(seen)\n"
    calls = [Call("f(*_)", ({1, 2},)), Call("f(*_)", ((1, 2j),)), Call("seen")]
    assert [outcome.value for outcome in call(program, calls)] == [1, 2, [{1, 2}, (1, 2j)]]


def test_a_call_that_does_not_end_costs_only_itself() -> None:
    program = "import os\ndef f(x):\n    while x == 1: pass\n    if x == 2: os._exit(0)\n    return x\n"
    outcomes = call(program, [Call("f(*_)", (x,), 1.0) for x in range(4)])
    assert [(outcome.status, outcome.value) for outcome in outcomes] == [
        ("ok", 0),
        ("timeout", None),
        ("failed", None),
        ("ok", 3),
    ]


def test_calls_may_end_at_the_first_failure() -> None:
    outcomes = call("def f(x): return 1 // x", [Call("f(*_)", (x,)) for x in (1, 0, 1)], until_failure=True)
    assert [outcome.status for outcome in outcomes] == ["ok", "failed"]


def test_a_value_too_large_to_carry_is_a_failure() -> None:
    (outcome,) = call("", [Call("'x' * 10_000_000")], Limits(output=1 << 16))
    assert (outcome.status, outcome.detail) == ("killed", "output: gave more than 65536 bytes")


def test_the_same_program_gets_the_same_verdict_a_hundred_times_from_many_threads() -> None:
    program = "def f(x):\n    return {3: 1 // (x - 2), 1: 5}.get(x)\n"
    verdicts = grade_many([(program, ["assert f(1) == 5", "assert f(2) == 0", "assert f(3) == 2"])] * 100, workers=4)
    assert len({(v.passed_tests, v.status, v.detail) for v in verdicts}) == 1


@pytest.mark.parametrize("tests", [[], (), "assert True"])
def test_tests_must_be_a_list_of_at_least_one(tests: list[str]) -> None:
    with pytest.raises(ConfigError, match="list of one or more"):
        grade(GOOD, tests)


def test_many_are_graded_in_order() -> None:
    pairs = [(GOOD, [f"assert add({n}, 0) == 2"]) for n in range(6)]
    assert [verdict.passed for verdict in grade_many(pairs, workers=2)] == [n == 2 for n in range(6)]


def test_without_a_sandbox_grading_works_when_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SandboxError):
        grade(GOOD, TESTS)
    with Sandbox(1, unsafe=True) as unsafe:
        verdict = grade(GOOD, TESTS, sandbox=unsafe)
    assert (verdict.passed, verdict.passed_tests, verdict.status) == (True, 3, "ok")


def test_who_sleeps_is_timed_out_and_who_waits_for_a_processor_is_not() -> None:
    program = "import time\ndef f(x):\n    time.sleep(x)\n    return x\n"
    outcomes = call(program, [Call("f(*_)", (60,), 0.2), Call("f(*_)", (0,), 2.0)], Limits(seconds=5))
    assert [outcome.status for outcome in outcomes] == ["timeout", "ok"]
    busy = "def f(x):\n    while True: pass\n"
    with in_time(4):
        (outcome,) = call(busy, [Call("f(*_)", (1,), 0.3)], Limits(seconds=5))
    assert outcome.status == "timeout"


def test_a_list_too_large_to_carry_is_compared_by_its_digest() -> None:
    program = "def f(last):\n    return [('ab',) * 100] * 300_000 + [(last,)]\n"
    calls = [Call("f(*_)", (last,), 60) for last in (1, 1, 2)]
    one, same, other = (outcome.value for outcome in call(program, calls, Limits(seconds=60, memory=2 << 30)))
    assert one == same != other
    assert from_json(to_json(one)) == one


# What an assert gives in the program's own process, it gives here


AS_IN_PYTHON = """
import itertools
class Number:
    __int__ = lambda self: 4
    __float__ = lambda self: 0.5
    __abs__ = lambda self: 4
    __round__ = lambda self, digits=0: digits
class Sized:
    __index__ = lambda self: 4
def endless(x): return itertools.count(x)
def breaks(x):
    yield x
    raise ValueError
def number(): return Number()
def sized(): return Sized()
def nested(depth, kind=list):
    value = kind()
    for _ in range(depth):
        value = kind([value])
    return value
def text(x): return x
"""


@pytest.mark.parametrize(
    ("test", "passes"),
    [
        ("assert any(endless(0))", True),
        ("assert all(endless(0))", False),
        ("assert not all(endless(0))", True),
        ("assert any(endless(0)) == True", True),
        ("assert any(breaks(1))", True),
        ("assert any(breaks(0))", False),
        ("assert not any(breaks(0))", False),
        ("assert all(breaks(0)) == False", True),
        ("assert all(breaks(1))", False),
        ("assert any(number())", False),
        ("assert int(number()) == 4", True),
        ("assert int(sized()) == 4", True),
        ("assert int(number()) == 5", False),
        ("assert float(number()) == 0.5", True),
        ("assert 0 < float(number()) < 1", True),
        ("assert abs(number()) == 4", True),
        ("assert round(number(), 3) == 3", True),
        ("assert int(text('4')) == 4", True),
        ("assert int(text('x')) == 4", False),
        ("assert len(nested(900)) == 1", True),
        ("assert isinstance(nested(900, tuple), tuple)", True),
        ("assert nested(900, tuple) != ()", True),
        ("assert (nested(900) == [[]]) == False", True),
        ("assert nested(2000) > []", True),
        ("assert nested(900, frozenset) == 1", False),
        ("assert len(nested(900, frozenset)) == 1", True),
        ("assert text('%d') % 3 == '3'", True),
        ("assert text('%5.2f|') % 3 == ' 3.00|'", True),
        ("assert text('%d*%s') % (3, 'a') == '3*a'", True),
        ("assert text(b'%d') % 3 == b'3'", True),
        ("assert text('%d') % 3 == '4'", False),
        ("assert text('%*d') % (5, 3) == 3", False),
    ],
)
def test_an_assert_gives_what_it_gives_in_python(test: str, passes: bool) -> None:
    (verdict,) = grade(AS_IN_PYTHON, [test], Limits(seconds=5)).tests
    assert (verdict.passed, verdict.trusted) == (passes, True), verdict
    names: dict[str, object] = {}
    exec(AS_IN_PYTHON, names)
    try:
        exec(test, names)
    except Exception:
        assert not passes
    else:
        assert passes


def test_results_that_are_nested_deep_can_be_told_apart() -> None:
    program = AS_IN_PYTHON + "def loop():\n    value = {}\n    value[1] = [value, value]\n    return value\n"
    expressions = ["nested(900)", "nested(901)", "nested(900, tuple)", "loop()", "[nested(900)] * 3", "nested(50_000)"]
    outcomes = call(program, [Call(each) for each in expressions], Limits(output=1 << 20))
    first, second, third, loop, several, deepest = [outcome.value for outcome in outcomes]
    assert first != second
    assert third != first
    assert several == [first] * 3
    assert isinstance(loop[1][0], Opaque)
    assert from_json(to_json(first)) == first
    assert outcomes[-1].status == "failed"  # beyond what can be hashed and printed
    assert deepest is None


@pytest.mark.parametrize(
    "parts",
    [
        "[]", '[["list",1]]', '[["list",-1]]', '[["data",1],["data",2]]', '[["dict",1]]', '[["what",0]]', "3",
        '[["data",1],["subclass",1],["list"]]', '[["data",{"set":[[1]]}]]', '[["list",0],["set",1]]', '[["list","x"]]',
        '[["data",1],["dict",1]]', '[["data",{"deep":[["list",0]]}],["list",1]]',
    ],
)  # fmt: skip
def test_no_forged_nesting_is_an_answer(parts: str) -> None:
    program = f"import os\nos.write(4, b'ready\\n={{\"deep\":{parts}}}\\n')\nos._exit(0)\n"
    (outcome,) = call(program, [Call("f()")])
    assert (outcome.status, outcome.value) == ("failed", None)
