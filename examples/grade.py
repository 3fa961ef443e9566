"""Run and grade programs in the sandbox.

Needs Linux and bubblewrap. Tests are asserts. A program that crashes or hangs is a result, not an error. Prints for
each program whether it passed, its share of passed tests, and what went wrong first.

Output:
    right   True  1.0 ok
    wrong   False 0.5 failed: test 2: AssertionError: assert double(5) == 10; it gave 7
    crashes False 0.0 failed: test 1: ZeroDivisionError: division by zero
    hangs   False 0.0 timeout: test 1: ...
"""

from diffucoder.grading.grade import grade
from diffucoder.grading.sandbox import Limits, Sandbox

PROGRAMS = {
    "right": "def double(n):\n    return n * 2\n",
    "wrong": "def double(n):\n    return n + 2\n",
    "crashes": "def double(n):\n    return n / 0\n",
    "hangs": "def double(n):\n    while True:\n        pass\n",
}
TESTS = ["assert double(2) == 4", "assert double(5) == 10"]

with Sandbox(workers=1) as sandbox:
    for name, program in PROGRAMS.items():
        verdict = grade(program, TESTS, Limits(seconds=1), sandbox=sandbox)
        reason = f"{verdict.status}: {verdict.detail}".removesuffix(": ")
        print(f"{name:<7} {verdict.passed!s:<5} {verdict.pass_rate} {reason}")
