"""Run generated programs in isolation: program → ExecutionResult.

Needs Linux and bubblewrap 0.8 or later. A program has no network, no capabilities and an empty home, sees no other
process, and has limits on time, memory, output, files and processes. A system call filter denies tracing, mounting and
new namespaces (`docs/sandbox.md`). `unsafe=True` is not a sandbox: a plain process with rlimits.

A worker is warm: bubblewrap with a fork server in it (`forkserver`), which starts a program in milliseconds.
"""

import marshal
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any, BinaryIO, Literal, Self

from diffucoder.errors import ConfigError, SandboxError
from diffucoder.grading.syscalls import MACHINES, system_call_filter

Status = Literal["ok", "failed", "timeout", "killed"]

_NOBODY = 65534
_FIRST_USER = 0x70000000  # to 0x7FFFFFFF: numbers that distributions and containers leave free
_PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3")  # that of a venv may be in a private home, out of reach
_PAGE = 4096  # bytes; the smallest file takes so many of a tmpfs
_START = 30.0  # seconds that a program may take to start, on a busy machine
_GRACE = 30.0  # seconds that a supervisor, on a busy machine, may be late before its worker is killed
_CLOSE = 2.0  # seconds in which a worker ends by itself
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before a worker that did not start is tried again
_RUNS = 3  # of a program, where the machine runs out of memory meanwhile, or somebody kills its sandbox
_KILLED_FROM_OUTSIDE = "the sandbox was killed from outside"
_MAX_JOBS = 5000  # programs that a worker runs before it is replaced
# A fixed hash seed: the same program ends the same way every time, even if it prints a set.
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
_HOME = "/home/nobody"
_ENVIRONMENT |= {"USER": "nobody", "LOGNAME": "nobody", "SHELL": "/bin/sh"}  # HOME is that of a job
_ACCOUNTS = {
    "passwd": f"nobody:x:{_NOBODY}:{_NOBODY}:nobody:{_HOME}:/bin/sh\n",
    "group": f"nogroup:x:{_NOBODY}:\n",
    "hosts": "127.0.0.1 localhost\n127.0.1.1 sandbox\n",
}  # files of /etc


@dataclass(frozen=True)
class Limits:
    """What one run may use."""

    seconds: float = 5.0  # on the clock, from the start of the program
    memory: int = 512 << 20  # bytes of address space, per process
    output: int = 64 << 10  # bytes of stdout, and as many of stderr
    files: int = 16 << 20  # bytes of the working folder, and of one file
    processes: int = 8  # processes and threads, the program's first included

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value <= 0:
                raise ConfigError(f"limits.{each.name}={value} must be above 0; the default is {each.default}")


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class ExecutionResult:
    """How a run ended."""

    status: Status  # "failed": an exit code above 0; "killed": by a signal, or for a limit other than time
    stdout: str
    stderr: str
    seconds: float
    memory: int  # peak resident bytes; 0 if the whole sandbox was killed
    detail: str  # one line: the exception, the signal or the limit


class Sandbox:
    """A pool of warm workers, safe to share between threads. They start when they are needed and live until `close`."""

    def __init__(self, workers: int | None = None, *, packages: Sequence[Path] = (), unsafe: bool = False) -> None:
        """Run at most `workers` programs at a time (default: one per core), which import from the folders `packages`.

        Raises SandboxError where programs cannot be isolated.
        """
        for folder in packages:
            if not folder.is_dir():
                raise ConfigError(f"packages: {str(folder)!r} is not a folder; give one that holds Python packages")
        self.workers = workers or os.cpu_count() or 1
        self.packages = [folder.resolve() for folder in packages]
        self.unsafe = unsafe
        if not unsafe:
            isolation()
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._idle: list[_Worker] = []
        self._free = BoundedSemaphore(self.workers)
        # bubblewrap dies with the thread that started it, so a thread that lives as long as the pool starts them
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="sandbox")

    def run(self, program: str, limits: Limits = DEFAULT_LIMITS, *, stdin: str | bytes = "") -> ExecutionResult:
        """Run a Python program as `__main__`. A crash is a result, not an error."""
        if self._process != os.getpid():  # the workers are those of the parent process
            self._reset()
        source = program.encode(errors="surrogatepass")
        size = -(-len(source) // _PAGE) * _PAGE
        if size > limits.files:
            raise ConfigError(f"the program takes {size} bytes, above limits.files={limits.files}; raise the limit")
        data = stdin.encode(errors="surrogatepass") if isinstance(stdin, str) else stdin
        with self._free:
            for _ in range(_RUNS):
                kills = _out_of_memory_kills()
                result = self._run_in_any(source, limits, data)
                if _out_of_memory_kills() == kills and result.detail != _KILLED_FROM_OUTSIDE:
                    break
            return result

    def _run_in_any(self, program: bytes, limits: Limits, stdin: bytes) -> ExecutionResult:
        """Run in an idle worker, or in a new one.

        Where none starts, the machine may lack processes, descriptors or memory for a while. Raises SandboxError if
        none has started after a minute.
        """
        # no worker is idle, or it ended while it was idle and nothing of the program has run
        with suppress(IndexError, SandboxError):
            return self._run_in(self._idle.pop(), program, limits, stdin)
        for pause in _PAUSES:
            with suppress(SandboxError):
                return self._run_in(self._new_worker(), program, limits, stdin)
            time.sleep(pause)
        return self._run_in(self._new_worker(), program, limits, stdin)

    def _new_worker(self) -> "_Worker":
        try:
            return self._starter.submit(_Worker, self.packages, unsafe=self.unsafe).result()
        except SandboxError:
            raise
        except (OSError, RuntimeError) as error:  # no descriptors; no thread
            raise SandboxError(f"cannot start a sandbox: {error}; raise the limits of this process (ulimit)") from error

    def _run_in(self, worker: "_Worker", program: bytes, limits: Limits, stdin: bytes) -> ExecutionResult:
        """Run in a worker, which is idle or closed afterwards. Raises SandboxError if the program did not start."""
        try:
            return worker.run(program, limits, stdin)
        finally:
            if worker.healthy:
                self._idle.append(worker)
            else:
                worker.close()

    def run_many(self, programs: Iterable[str], limits: Limits = DEFAULT_LIMITS) -> Iterator[ExecutionResult]:
        """Run programs side by side. Results come in order."""
        with ThreadPoolExecutor(self.workers) as pool:
            yield from pool.map(lambda program: self.run(program, limits), programs)

    def close(self) -> None:
        """End all workers. A later run starts new ones."""
        if self._process == os.getpid():
            while self._idle:
                self._idle.pop().close()
            self._starter.shutdown()
        self._reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run(
    program: str, limits: Limits = DEFAULT_LIMITS, *, stdin: str | bytes = "", unsafe: bool = False
) -> ExecutionResult:
    """Run one program in a sandbox of its own. For many programs keep a `Sandbox`, which starts only once."""
    with Sandbox(1, unsafe=unsafe) as sandbox:
        return sandbox.run(program, limits, stdin=stdin)


def isolation() -> None:
    """Raise SandboxError, with the reason and the remedy, where programs cannot be isolated."""
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"no isolation on {sys.platform}: it needs Linux; run there, or pass unsafe=True")
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxError("no bwrap on PATH; install it with `apt-get install bubblewrap`, or pass unsafe=True")
    if platform.machine() not in MACHINES:
        raise SandboxError(f"no system call filter for {platform.machine()}; run on {' or '.join(MACHINES)}")
    try:
        _try_to_isolate(bwrap)
    except SandboxError as error:
        raise SandboxError(
            f"bubblewrap cannot isolate here ({error}); it must be 0.8 or later and allowed to make user namespaces "
            "(sysctl user.max_user_namespaces; in a container, a seccomp profile that permits unshare)"
        ) from error


@cache  # of a success: an error is not cached, because its cause may pass
def _try_to_isolate(bwrap: str) -> None:
    with closing(_Worker((), unsafe=False)) as worker:
        worker.run(b"", DEFAULT_LIMITS, b"")


def _bubblewrap(packages: Sequence[Path], files: dict[str, int]) -> list[str]:
    """The command that runs the system's Python in bubblewrap. `files` of /etc are read from descriptors."""
    command = [shutil.which("bwrap") or "bwrap", "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    command += ["--unshare-uts", "--unshare-cgroup-try", "--uid", str(_NOBODY), "--gid", str(_NOBODY)]
    command += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1"]
    for path in ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache"):
        command += ["--ro-bind-try", path, path]
    for number, folder in enumerate(packages):
        command += ["--ro-bind", str(folder), f"/packages/{number}"]
    for name, descriptor in files.items():
        command += ["--file", str(descriptor), f"/etc/{name}"]
    # each job mounts its own /proc, /tmp, /dev/shm, /dev/pts and home over these
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--dir", _HOME]
    # The root, /dev and /tmp are tmpfs without a bound: a program that writes there could fill the machine's memory.
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--remount-ro", "/tmp", "--chdir", "/tmp", "--"]
    return [*command, next(filter(os.path.exists, _PYTHONS), _PYTHONS[0])]


class _Worker:
    """One warm sandbox: the process of bubblewrap, and the host's end of the socket to its fork server."""

    def __init__(self, packages: Sequence[Path], *, unsafe: bool) -> None:
        self.unsafe = unsafe
        self.healthy = True  # whether it may get another job
        self.jobs = 0
        self.control, worker_control = socket.socketpair()
        self.replies = self.control.makefile("rb")
        try:
            with worker_control:
                self.process = self._start(worker_control, packages)
        except (OSError, subprocess.SubprocessError) as error:
            self.replies.close()
            self.control.close()
            program = "python" if unsafe else "bwrap"
            raise SandboxError(f"cannot start {program}: {_last_line(str(error))}; is it installed?") from error

    def _start(self, control: socket.socket, packages: Sequence[Path]) -> subprocess.Popen[bytes]:
        user: dict[str, Any] = {}  # Any: keywords of Popen, which differ in type
        command = [sys.executable]
        folders = [*map(str, packages)]
        filters = ""
        with ExitStack() as pipes:
            files: dict[str, int] = {}
            if not self.unsafe:
                for name, text in _ACCOUNTS.items():
                    files[name] = pipes.enter_context(_pipe_with(text)).fileno()
                command = _bubblewrap(packages, files)
                folders = [f"/packages/{number}" for number in range(len(packages))]
                filters = system_call_filter(platform.machine()).hex()
                # root escapes RLIMIT_NPROC even in bubblewrap, and an escape should end as nobody
                if os.geteuid() == 0:
                    user = {"user": _own_user(self.control.fileno()), "group": _NOBODY, "extra_groups": []}
            # not -I, which would drop the hash seed
            command += ["-s", "-S", "-c", source_of("forkserver.py"), filters, *folders]
            return subprocess.Popen(
                command,
                stdin=control.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                env=_ENVIRONMENT,
                pass_fds=[*files.values()],
                start_new_session=True,
                **user,
            )

    def run(self, program: bytes, limits: Limits, stdin: bytes) -> ExecutionResult:
        """Run one program. Raises SandboxError if it did not start. A worker that is not `healthy` must be closed."""
        self.healthy = False
        self.jobs += 1
        with tempfile.TemporaryDirectory(prefix="diffucoder-") if self.unsafe else nullcontext("/tmp") as folder:
            home = folder if self.unsafe else _HOME
            job = {"folder": folder, "home": home, "program": program, "stdin": stdin, **asdict(limits)}
            self._send(job)
            return self._receive(limits)

    def _send(self, job: dict[str, Any]) -> None:
        """Send a job and wait until its program has started."""
        try:
            self.control.settimeout(_START)
            self.control.sendall(marshal.dumps(job, 2))
            if self.replies.readline() == b"started\n":
                return
        except OSError:
            pass
        reason = _last_line(self.close()) or "no reason given"
        raise SandboxError(reason if reason.startswith("bwrap") else f"the sandbox did not start: {reason}")

    def _receive(self, limits: Limits) -> ExecutionResult:
        """Read the report that `forkserver.watch` writes, and that the job is gone."""
        begin = time.monotonic()
        try:
            self.control.settimeout(limits.seconds + _GRACE)
            limit, code, memory, seconds, *lengths = self.replies.readline().decode().split()
            stdout, stderr = [self.replies.read(int(length)).decode(errors="replace") for length in lengths]
            self.healthy = self.replies.readline() == b"gone\n" and self.jobs < _MAX_JOBS
        except TimeoutError:  # the machine is too busy to end the program from inside
            status, detail = _ending("timeout", 0, "", limits)
            return ExecutionResult(status, "", "", time.monotonic() - begin, 0, detail)
        except (OSError, ValueError):
            detail = "the whole sandbox was killed"
            with suppress(subprocess.TimeoutExpired):
                if self.process.wait(_CLOSE) == -signal.SIGKILL:  # by no program, since bubblewrap is outside
                    detail = _KILLED_FROM_OUTSIDE
            return ExecutionResult("killed", "", "", time.monotonic() - begin, 0, detail)
        status, detail = _ending(limit, int(code), stderr, limits)
        return ExecutionResult(status, stdout, stderr, float(seconds), int(memory), detail)

    def close(self) -> str:
        """End the whole tree. Return what bubblewrap and the fork server wrote to stderr."""
        if self.control.fileno() < 0:
            return ""
        self.replies.close()
        self.control.close()  # fork server and supervisor then end by themselves, unless they hang
        try:
            errors = self.process.communicate(timeout=_CLOSE)[1]
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            errors = self.process.communicate()[1]
        return str(errors, errors="replace")


def _pipe_with(text: str) -> BinaryIO:
    """A pipe from which a process can read a short text."""
    reading, writing = os.pipe()
    with open(writing, "w") as file:
        file.write(text)
    return open(reading, "rb")


def _own_user(number: int) -> int:
    """A user that no other worker has, so that what the kernel counts per user is per worker; else nobody.

    `number` is one that no other worker of this process has. A container may have fewer users.
    """
    user = _FIRST_USER + (os.getpid() % (1 << 22) << 6) + number % 64
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        if first <= user < first + count:
            return user
    return _NOBODY


def _out_of_memory_kills() -> int:
    """How many processes Linux has killed for lack of memory; 0 where it does not say."""
    with suppress(OSError), open("/proc/vmstat") as file:
        for line in file:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _ending(limit: str, code: int, stderr: str, limits: Limits) -> tuple[Status, str]:
    """Status and detail of a run that ended at a limit, or with an exit code."""
    if limit == "output":
        return "killed", f"output: printed more than {limits.output} bytes"
    if limit == "timeout":
        return "timeout", f"seconds: ran longer than {limits.seconds:g}"
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return "killed", f"signal {names.get(-code, -code)}"  # a real-time signal has no name
    if code > 0:
        return "failed", _last_line(stderr) or f"exit code {code}"
    return "ok", ""


@cache
def source_of(name: str) -> str:
    """The source of a file of this folder that runs inside."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _last_line(text: str) -> str:
    return "".join(text.strip().splitlines()[-1:]).strip()[:500]
