"""One property of the sandbox a test; the programs are adversaries, the sandbox is the real one."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from machine import gone, in_time, none_left, own, slowness, wait_for

from diffucoder.errors import ConfigError, SandboxError
from diffucoder.grading import sandbox
from diffucoder.grading.sandbox import ExecutionResult, Limits, Sandbox, isolation

REACH = """
import socket
try:
    socket.create_connection(("127.0.0.1", {port}), timeout=1).close()
    print("reached")
except OSError as error:
    print("refused", error)
"""


@pytest.fixture(autouse=True, scope="module")
def isolated() -> Iterator[None]:
    """After all the adversaries: no process left, no file changed, no memory grown."""
    try:
        isolation()
    except SandboxError as error:
        pytest.skip(str(error))
    others = own("bwrap")  # another module's pool may be warm
    with tempfile.TemporaryDirectory() as folder:  # other processes use that of the machine
        os.chmod(folder, 0o755)
        tempfile.tempdir = folder
        run("pass")
        files, memory = repository(), own_memory()
        yield
        box().close()
        box.cache_clear()
        tempfile.tempdir = None
        assert repository() == files
        assert own_memory() < memory + (50 << 20)
        assert none_left("bwrap", others)
        assert not list(Path(folder).glob("diffucoder-*"))


def repository() -> dict[Path, int]:
    """The package's files, and when each was changed."""
    return {path: path.stat().st_mtime_ns for path in Path(sandbox.__file__).parents[1].rglob("*.py")}


def own_memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@cache
def box() -> Sandbox:
    """One pool for all tests here: what one program did must not matter to the next."""
    return Sandbox(2)


def patient(**limits: Any) -> Limits:
    """Limits of tests that are not about time: a busy machine may take long."""
    return Limits(**{"seconds": 60.0, **limits})


PATIENT = patient()


def run(program: str, limits: Limits = PATIENT, **more: Any) -> ExecutionResult:
    return box().run(program, limits, **more)


def run_many(programs: list[str], limits: Limits = PATIENT) -> list[ExecutionResult]:
    return [*box().run_many(programs, limits)]


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def printed(program: str, limits: Limits = PATIENT) -> str:
    result = run(program, limits)
    assert result.status == "ok", result
    return result.stdout.strip()


# What a run tells


def test_a_program_runs_as_main_and_its_output_comes_back() -> None:
    begin = time.monotonic()
    result = run("import sys\nprint(__name__)\nprint('to stderr', file=sys.stderr)")
    assert (result.status, result.stdout, result.stderr, result.detail) == ("ok", "__main__\n", "to stderr\n", "")
    assert 0 < result.seconds < time.monotonic() - begin
    assert result.memory > 1 << 20


def test_a_crash_is_a_result_with_a_natural_traceback() -> None:
    result = run("def f():\n    return 1 / 0\nf()\n")
    assert (result.status, result.detail) == ("failed", "ZeroDivisionError: division by zero")
    assert "line 2, in f\n    return 1 / 0" in result.stderr
    assert "<string>" not in result.stderr


def test_a_syntax_error_is_a_result() -> None:
    result = run("def f(:\n")
    assert (result.status, result.detail) == ("failed", "SyntaxError: invalid syntax")


def test_exit_codes_and_signals_are_told_apart() -> None:
    leave, die = run_many(["exit(3)", "import os; os.abort()"])
    assert (leave.status, leave.detail) == ("failed", "exit code 3")
    assert (die.status, die.detail) == ("killed", "signal SIGABRT")


def test_stdin_is_delivered_whole() -> None:
    text = "zwölf\n" * 50_000
    result = run("import sys\nprint(len(sys.stdin.read()))", stdin=text)
    assert result.stdout == f"{len(text)}\n"


def test_unread_stdin_does_no_harm() -> None:
    assert run("print('done')", stdin="x" * 1_000_000).stdout == "done\n"


def test_without_stdin_input_ends_at_once() -> None:
    assert run("input()").detail.startswith("EOFError")


def test_a_program_beyond_the_limit_of_files_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"limits\.files"):
        run("#" * (1 << 20) + "\n", patient(files=1 << 20))


def test_unicode_goes_both_ways() -> None:
    assert printed("print('ключ 鍵 🔑')") == "ключ 鍵 🔑"


def test_a_program_of_200_kilobytes_runs() -> None:
    lines = "".join(f"x{index} = {index}\n" for index in range(15_000))
    assert len(lines) > 200_000
    assert printed(lines + "print(x14999)") == "14999"


def test_the_same_program_prints_the_same_set_twice() -> None:
    program = "print({str(n) for n in range(99)})"
    assert printed(program) == printed(program)


# What a program cannot reach


def test_the_network_cannot_be_reached(listener: int) -> None:
    program = REACH.format(port=listener)
    outside = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert outside.stdout == "reached\n"  # the control: it can be reached without a sandbox
    assert printed(program).startswith("refused")


def test_the_environment_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "secret")
    names = printed("import os\nprint(*sorted(os.environ))").split()
    assert set(names) <= {"PATH", "LANG", "PYTHONHASHSEED", "PWD", "HOME", "USER", "LOGNAME", "SHELL"}


def test_the_home_and_the_repository_are_not_there() -> None:
    paths = [str(Path.home()), str(Path(__file__).resolve()), "/etc/shadow", "/root", "/var", "/sys"]
    assert printed(f"import os\nprint([p for p in {paths!r} if os.path.exists(p)])") == "[]"
    assert printed("import os, pwd\nprint(os.listdir('/home'), len(pwd.getpwall()))") == "['nobody'] 1"


def test_nothing_can_be_written_but_the_tmpfs() -> None:
    program = """
import os
written = []
dev = [folder for folder, _, _ in os.walk("/dev")]
for folder in ["/", "/usr", "/usr/bin", "/usr/lib", "/usr/lib/python3", "/etc", "/proc/sys/kernel", "/tmp", *dev]:
    try:
        open(os.path.join(folder, "mark"), "w").close()
        written.append(folder)
    except OSError:
        pass
print(*written)
"""
    assert set(printed(program).split()) == {"/tmp", "/dev/shm"}


def test_the_tmpfs_is_fresh_each_time() -> None:
    assert printed("import os\nopen('left', 'w').close()\nprint(sorted(os.listdir()))") == "['left', 'program.py']"
    assert printed("import os\nprint(os.listdir())") == "['program.py']"


def test_no_other_process_can_be_seen() -> None:
    assert printed("import os\nprint([n for n in os.listdir('/proc') if n.isdigit()])") == "['1', '2']"


def test_the_supervisor_cannot_be_read_traced_or_killed() -> None:
    program = """
import ctypes, os
os.kill(1, 9), os.kill(1, 19)
for path in ("/proc/1/mem", "/proc/1/fd/1", "/proc/1/fd/3", "/proc/1/environ"):
    try:
        open(path, "rb+", buffering=0)
        print("opened", path)
    except OSError:
        pass
print(ctypes.CDLL(None).ptrace(16, 1, 0, 0))  # PTRACE_ATTACH
"""
    assert printed(program) == "-1"


def test_the_program_has_no_capabilities_and_is_nobody() -> None:
    facts = printed("import os\nprint(os.getuid(), open('/proc/self/status').read())")
    assert facts.startswith("65534 ")
    assert "CapEff:\t0000000000000000\n" in facts
    assert "NoNewPrivs:\t1\n" in facts


CALLS = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def tried(*call):
    return (libc.syscall(*call), ctypes.get_errno())
"""


def test_no_process_can_be_traced_nor_its_memory_read() -> None:
    program = """
import os
child = os.fork()
if child == 0:
    import time
    time.sleep(60)
print(libc.ptrace(16, child, 0, 0), libc.ptrace(16, 1, 0, 0), libc.process_vm_readv(1, 0, 0, 0, 0, 0))
"""
    assert printed(CALLS + program) == "-1 -1 -1"


def test_nothing_can_be_mounted_and_no_namespace_made() -> None:
    program = """
print(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.umount2(b"/tmp", 2), libc.umount2(b"/proc", 2))
print(*(libc.unshare(flag) for flag in (0x20000, 0x10000000, 0x20000000, 0x40000000, 0x8000000)))
print(libc.chroot(b"/tmp"), tried(435, 0, 0)[1], tried(56, 0x10000000 | 17, 0, 0, 0, 0))
"""
    mounts, namespaces, others = printed(CALLS + program).splitlines()
    assert set(mounts.split()) == {"-1"}
    assert set(namespaces.split()) == {"-1"}
    assert others == "-1 38 (-1, 1)"  # ENOSYS, EPERM


def test_the_loopback_is_out_of_reach_and_no_socket_but_a_local_one_opens() -> None:
    program = """
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_VSOCK):
    try:
        socket.socket(family, socket.SOCK_RAW if family == socket.AF_PACKET else socket.SOCK_STREAM)
        print("opened", family)
    except OSError as error:
        print(error.errno, end=" ")
a, b = socket.socketpair()
a.send(b"local")
print(b.recv(9))
"""
    assert printed(program) == "1 1 1 1 1 b'local'"


def test_a_signal_to_the_parent_or_to_everybody_changes_nothing() -> None:
    program = """
import os, signal
for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL):
    os.kill(os.getppid(), number)
print(os.getppid())
try:
    os.kill(-1, signal.SIGKILL)
except ProcessLookupError:
    print("nobody else is here")
"""
    assert printed(program) == "1\nnobody else is here"


def test_a_job_finds_nothing_of_the_one_before() -> None:
    leave = """
import os, socket, time
open("/tmp/left", "w").close(), open("/dev/shm/left", "w").close()
bound = socket.socket(socket.AF_UNIX)
bound.bind("\\0left")
if os.fork() == 0:
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    time.sleep(60)
"""
    look = """
import os, socket
socket.socket(socket.AF_UNIX).bind("\\0left")
print(os.listdir("/tmp"), os.listdir("/dev/shm"), [name for name in os.listdir("/proc") if name.isdigit()])
"""
    with Sandbox(1) as one:
        assert one.run(leave).status == "ok"
        assert one.run(look).stdout == "['program.py'] [] ['1', '2']\n"


def test_user_namespaces_cannot_be_nested() -> None:
    assert printed("import ctypes\nprint(ctypes.CDLL(None).unshare(0x10000000))") == "-1"


# What a program cannot exceed


def test_an_endless_loop_ends_in_time() -> None:
    limit = 0.5 * slowness()
    with in_time(limit + 1.5):
        result = run("print('begun', flush=True)\nwhile True: pass", Limits(seconds=limit))
    assert (result.status, result.stdout) == ("timeout", "begun\n")
    assert result.detail == f"seconds: ran longer than {limit:g}"


def test_sleeping_past_the_limit_is_ended() -> None:
    deaf = "import signal, time\nfor n in {*range(1, 32)} - {9, 19}:\n    signal.signal(n, signal.SIG_IGN)\n"
    assert run(deaf + "time.sleep(60)", Limits(seconds=0.5)).status == "timeout"


def test_deep_recursion_is_a_result() -> None:
    assert run("def f(): f()\nf()").detail.startswith("RecursionError")
    assert run("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", Limits(seconds=1)).status != "ok"


def test_open_files_are_limited() -> None:
    program = """
import os
kept = []
try:
    while len(kept) < 10_000:
        kept.append(open("/dev/null"))
except OSError as error:
    print(error.strerror, len(kept) < 64)
"""
    assert printed(program) == "Too many open files True"


def test_the_number_of_files_is_limited() -> None:
    program = """
try:
    for index in range(1_000_000):
        open(str(index), "w").close()
except OSError as error:
    print(error.strerror, index < 10_000)
"""
    assert printed(program) == "No space left on device True"


def test_a_program_of_ten_megabytes_runs() -> None:
    assert printed("x = 1  # " + "x" * 10_000_000 + "\nprint(x)", patient(files=16 << 20)) == "1"


@pytest.mark.parametrize(("program", "detail"), [("print(1)\0", "null bytes"), ("x = '\ud800'", "surrogates")])
def test_source_that_is_no_text_is_a_failure(program: str, detail: str) -> None:
    result = run(program)
    assert (result.status, result.stdout) == ("failed", "")
    assert detail in result.detail or "utf-8" in result.detail


def test_endless_printing_is_ended_at_the_limit() -> None:
    result = run("while True: print('x' * 9999)", patient(output=10_000))
    assert (result.status, len(result.stdout)) == ("killed", 10_000)
    assert "10000 bytes" in result.detail
    assert result.seconds < 45  # of the 60 that it may take


def test_endless_printing_to_stderr_is_ended_too() -> None:
    result = run("import os\nwhile True: os.write(2, b'x' * 9999)", patient(output=10_000))
    assert (result.status, len(result.stderr)) == ("killed", 10_000)


def test_a_program_that_reads_its_own_output_holds_nobody_up() -> None:
    program = """
import os, threading
stdout = open("/proc/self/fd/1", "rb", buffering=0)
def take():
    while True:
        stdout.read(1)
threading.Thread(target=take, daemon=True).start()
while True:
    os.write(1, b"x")
"""
    for _ in range(3):
        assert run(program, Limits(seconds=0.5, output=10 << 20)).status == "timeout"


def test_printing_too_much_at_the_very_end_counts_as_well() -> None:
    assert run("print('x' * 99)", patient(output=50)).status == "killed"


def test_memory_is_limited() -> None:
    result = run("x = bytearray(300 << 20)", patient(memory=200 << 20))
    assert (result.status, result.detail) == ("failed", "MemoryError")


def test_peak_memory_is_told() -> None:
    small, large = run_many(["x = b''", "x = b'x' * (100 << 20)"])
    assert 95 << 20 < large.memory - small.memory < 110 << 20


def test_the_tmpfs_is_bounded() -> None:
    program = """
written = 0
try:
    for index in range(100):
        with open(str(index), "wb", buffering=0) as file:
            written += file.write(bytes(1 << 20))
except OSError as error:
    print(written >> 20, error.strerror)
"""
    megabytes, reason = printed(program, patient(files=4 << 20)).split(maxsplit=1)
    assert (int(megabytes) <= 4, reason) == (True, "No space left on device")


def test_a_file_is_bounded() -> None:
    program = "import os\nfile = os.open('/dev/shm/x', os.O_CREAT | os.O_RDWR)\nos.ftruncate(file, 5 << 20)"
    assert run(program, patient(files=4 << 20)).detail == "OSError: [Errno 27] File too large"


def test_a_fork_bomb_is_held() -> None:
    program = """
import os, time
children = 0
try:
    while children < 1000:
        if os.fork() == 0:
            time.sleep(60)
        children += 1
except BlockingIOError:
    print(children)
"""
    first, second = run_many([program, program], patient(processes=8))
    assert (first.stdout, second.stdout) == ("7\n", "7\n")  # each its own count, though both are the same user


def test_threads_count_as_processes() -> None:
    program = """
import threading, time
try:
    for count in range(1000):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
except RuntimeError:
    print(count)
"""
    assert printed(program, patient(processes=4)) == "3"


def test_the_whole_tree_dies_at_the_timeout() -> None:
    marker = f"marker-{uuid.uuid4()}"
    program = f"""
import os, subprocess, sys, time
if os.fork() == 0:
    os.setpgrp()
    if os.fork() == 0:
        subprocess.Popen(["/usr/bin/python3", "-c", "import time; time.sleep(60)", {marker!r}], preexec_fn=os.setpgrp)
        time.sleep(60)
time.sleep(60)
"""
    seen: list[str] = []
    for seconds in (1.5, 6, 24):  # more where the machine is so busy that the grandchild did not run
        watch = threading.Thread(target=lambda: seen.extend(wait_for(marker, 5)))
        watch.start()
        assert run(program, Limits(seconds=seconds)).status == "timeout"
        watch.join()
        if seen:
            break
    assert seen, "the grandchild never ran, so its death shows nothing"
    assert gone(marker)


def test_what_a_program_leaves_behind_dies_with_it() -> None:
    marker = f"marker-{uuid.uuid4()}"
    program = (
        "import os, subprocess\n"
        f"sleeper = ['/usr/bin/python3', '-c', 'import time; time.sleep(60)', {marker!r}]\n"
        "print(subprocess.Popen(sleeper, preexec_fn=os.setpgrp).poll())"
    )
    with in_time(3):
        assert printed(program) == "None"
    assert gone(marker)


def test_runs_leave_no_zombies_and_no_open_files() -> None:
    def children() -> int:
        return len(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())

    run("")
    before = children(), len(os.listdir("/proc/self/fd"))
    run("")
    run("while True: pass", Limits(seconds=0.2))
    assert (children(), len(os.listdir("/proc/self/fd"))) == before


def test_a_hundred_runs_give_one_result() -> None:
    program = "import random\nrandom.seed(3)\nprint(random.random(), {'b', 'a', 'c'}, hash('x'))"
    results = run_many([program] * 100)
    assert len({(result.status, result.stdout) for result in results}) == 1


def test_a_worker_that_is_killed_while_idle_is_replaced() -> None:
    with Sandbox(1) as one:
        one.run("pass")
        worker = one._idle[0]
        os.killpg(worker.process.pid, 9)
        worker.process.wait()
        assert one.run("print(input())", stdin="again").stdout == "again\n"
        assert one._idle[0] is not worker


def test_a_worker_that_never_starts_is_an_error_after_some_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    class DeadWorker(sandbox._Worker):
        def __init__(self, *packages: Any, unsafe: bool) -> None:
            super().__init__(*packages, unsafe=unsafe)
            started.append(1)
            os.killpg(self.process.pid, 9)
            self.process.wait()

    monkeypatch.setattr(sandbox, "_Worker", DeadWorker)
    monkeypatch.setattr(sandbox, "_PAUSES", (0.0, 0.0))
    with Sandbox(1) as one, pytest.raises(SandboxError):
        one.run("pass")
    assert len(started) == 3


def test_a_forked_process_has_workers_of_its_own() -> None:
    assert printed("print(1)") == "1"
    child = os.fork()
    if child == 0:
        os._exit(0 if run("print(2)").stdout == "2\n" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert printed("print(3)") == "3"


def test_parallel_runs_do_not_disturb_each_other() -> None:
    programs = [f"open('x', 'w').write('{index}')\nprint(open('x').read())" for index in range(20)]
    assert [result.stdout for result in run_many(programs)] == [f"{index}\n" for index in range(20)]


@pytest.mark.parametrize("name", ["seconds", "memory", "output", "files", "processes"])
def test_a_limit_must_be_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"limits\.{name}=0"):
        Limits(**{name: 0})


# Where there is no isolation


def test_without_bubblewrap_a_run_is_refused_with_reason_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SandboxError, match="no bwrap on PATH; install it with `apt-get install bubblewrap`"):
        sandbox.run("print(1)")


def test_where_namespaces_are_refused_a_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to the user that bwrap is started as
        os.chmod(folder, 0o755)
        fake = Path(folder, "bwrap")
        fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", folder)
        with pytest.raises(SandboxError, match=r"cannot isolate here \(bwrap: No permissions"):
            sandbox.run("print(1)")


def test_unsafe_runs_without_isolation_but_with_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    def unsafe(program: str, seconds: float = 60) -> ExecutionResult:
        limits = Limits(seconds=seconds, memory=200 << 20)
        return sandbox.run(program, limits, stdin="in", unsafe=True)

    assert unsafe("print(input())").stdout == "in\n"
    assert unsafe("x = bytearray(300 << 20)").detail == "MemoryError"
    assert unsafe("while True: pass", seconds=1).status == "timeout"


@pytest.mark.parametrize(
    "expression",
    [
        "str(pathlib.Path.home()), os.path.expanduser('~nobody')", "getpass.getuser(), os.getlogin()",
        "pwd.getpwuid(os.getuid()).pw_name, pathlib.Path('/tmp').owner()", "grp.getgrgid(os.getgid()).gr_name",
        "os.listdir(pathlib.Path.home())", "(pathlib.Path.home() / 'a').write_text('a')",
        "tempfile.gettempdir(), bool(tempfile.mkstemp())", "os.cpu_count() > 0", "time.tzname",
        "locale.setlocale(locale.LC_ALL, '')", "socket.gethostname(), socket.gethostbyname('localhost')",
        "len(sys.argv), open(__file__).readline()", "sys.stdin.read(), sys.stdin.isatty()",
    ],
)  # fmt: skip
def test_a_program_finds_what_every_process_has(expression: str) -> None:
    program = f"import getpass, grp, locale, os, pathlib, pwd, socket, sys, tempfile, time\nprint({expression})\n"
    assert printed(program)


def test_the_home_is_empty_for_every_program() -> None:
    program = "import pathlib\nhome = pathlib.Path.home()\nprint(list(home.iterdir()))\n(home / 'a').write_text('a')"
    assert {printed(program) for _ in range(3)} == {"[]"}


def test_a_home_is_as_small_as_the_other_folders() -> None:
    program = "import pathlib\n(pathlib.Path.home() / 'a').write_bytes(bytes(2 << 20))\n"
    assert run(program, patient(files=1 << 20)).status == "failed"
