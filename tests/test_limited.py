"""Calls in a child of their own: results and errors come back, and what is over a limit is killed."""

import ctypes
import os
import signal
import threading

import pytest

from diffucoder.errors import ConfigError
from diffucoder.limited import Limited, LimitError


def double(value):
    print("not an answer")
    return value * 2


def spin():
    return 9**9**9


def grow():
    return "x" * (1 << 40)


def crash():
    return ctypes.string_at(0)


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(text):
    raise ConfigError(f"{text} is wrong")


def divide(by):
    return 1 / by


@pytest.fixture
def limited():
    limited = Limited(seconds=0.5, memory=1 << 30)
    yield limited
    limited.close()


def test_results_and_the_package_s_errors_come_back(limited):
    assert limited(double, "ä\n") == "ä\nä\n"
    assert limited(double, [1]) == [1, 1]
    with pytest.raises(ConfigError, match="5 is wrong"):
        limited(refuse, 5)
    with pytest.raises(LimitError, match="ZeroDivisionError"):
        limited(divide, 0)


@pytest.mark.parametrize(
    ("function", "reason"), [(spin, "took over 0.5 s"), (grow, "over 1,024 MiB"), (crash, "crashed")]
)
def test_a_call_over_a_limit_is_killed_and_the_next_one_works(limited, function, reason):
    with pytest.raises(LimitError, match=reason):
        limited(function)
    assert limited(double, 4) == 8


def test_threads_have_a_child_each(limited):
    results = []
    threads = [threading.Thread(target=lambda n=n: results.append(limited(double, n))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 2, 4, 6]


def test_nothing_is_left_when_it_is_closed(limited):
    limited(double, 1)
    [child] = limited._idle
    limited.close()
    assert child.returncode is not None


def test_a_child_that_was_killed_from_outside_is_asked_again(limited):
    limited(double, 1)
    [child] = limited._idle
    child.kill()
    child.wait()
    assert limited(double, "x" * 200_000) == "x" * 400_000


def test_a_call_whose_children_are_all_killed_is_an_error(limited):
    with pytest.raises(LimitError, match="crashed"):
        limited(kill_itself)
    assert limited(double, 4) == 8
