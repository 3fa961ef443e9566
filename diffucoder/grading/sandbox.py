"""Run generated programs in isolation: program → ExecutionResult. `docs/sandbox.md` has the details.

Protected (Linux, bubblewrap 0.8 or later): a program has no network, home, environment or capabilities, and sees no
other process. It reads the system's Python and writes to a new tmpfs of bounded size. Memory, CPU, output, files,
processes and time have limits. A system call filter denies tracing, mounting and new namespaces. Programs run after
everything else on the machine, and what one of them does is not there for the next.

Not protected: side channels (timing, caches, figures in /proc); the sum of what the limits allow, which is `processes ×
memory + 2 × files + stdin`; what an administrator put into /usr for everyone. `unsafe=True` is not a sandbox: a plain
process with rlimits, for machines that offer nothing better.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path, PurePosixPath
from threading import BoundedSemaphore
from typing import Any, Literal, Self

from diffucoder.errors import ConfigError, SandboxError

Status = Literal["ok", "failed", "timeout", "killed"]

_NOBODY = 65534
_PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3")  # that of a venv may be in a private home, out of reach
_PROGRAM = "program.py"
_PAGE = 4096  # bytes; the smallest file takes so many of a tmpfs
_START = 30.0  # seconds that a program may take to start, on a busy machine
_GRACE = 5.0  # seconds that a supervisor may be late before its worker is killed
_CLOSE = 2.0  # seconds in which a worker ends by itself
_MAX_JOBS = 5000  # programs that a worker runs before it is replaced
# A fixed hash seed: the same program ends the same way every time, even if it prints a set.
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}


@dataclass(frozen=True)
class Limits:
    """What one run may use."""

    seconds: float = 5.0  # on the clock, start-up included
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
    """A pool of warm workers, safe to share between threads.

    A worker runs one program at a time, and is replaced when it misbehaves or when this process was forked. Workers
    start when they are needed and live until `close`, or the end of a `with` block.
    """

    def __init__(self, workers: int | None = None, *, packages: Sequence[Path] = (), unsafe: bool = False) -> None:
        """Run at most `workers` programs at a time (default: one per core), which import from the folders `packages`.

        Raises SandboxError where isolation is not available, with the reason and the remedy.
        """
        if workers is not None and workers < 1:
            raise ConfigError(f"workers={workers} must be at least 1; leave it out for one per core")
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

    def run(
        self,
        program: str,
        limits: Limits = DEFAULT_LIMITS,
        *,
        stdin: str | bytes = "",
        files: Mapping[str, str] | None = None,
    ) -> ExecutionResult:
        """Run a Python program as `__main__`, with `files` in its working folder. A crash is a result, not an error."""
        if self._process != os.getpid():  # the workers are those of the parent process
            self._reset()
        contents = _contents(program, files or {}, limits)
        data = stdin.encode(errors="surrogatepass") if isinstance(stdin, str) else stdin
        with self._free:
            if self._idle:
                with suppress(SandboxError):  # the worker ended while it was idle, and nothing of the program has run
                    return self._run_in(self._idle.pop(), contents, limits, data)
            return self._run_in(self._starter.submit(self._start).result(), contents, limits, data)

    def _start(self) -> "_Worker":
        return _Worker(self.packages, unsafe=self.unsafe)

    def _run_in(self, worker: "_Worker", contents: dict[str, bytes], limits: Limits, stdin: bytes) -> ExecutionResult:
        """Run in a worker, which is idle or closed afterwards. Raises SandboxError if the program did not start."""
        try:
            return worker.run(contents, limits, stdin)
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
    program: str,
    limits: Limits = DEFAULT_LIMITS,
    *,
    stdin: str | bytes = "",
    files: Mapping[str, str] | None = None,
    unsafe: bool = False,
) -> ExecutionResult:
    """Run one program in a sandbox of its own. For many programs keep a `Sandbox`, which starts only once."""
    with Sandbox(1, unsafe=unsafe) as sandbox:
        return sandbox.run(program, limits, stdin=stdin, files=files)


def isolation() -> str:
    """Name the mechanism that isolates programs here, or raise SandboxError with the reason and the remedy."""
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"no isolation on {sys.platform}: it needs Linux; run there, or pass unsafe=True")
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxError("no bwrap on PATH; install it with `apt-get install bubblewrap`, or pass unsafe=True")
    if platform.machine() not in ("x86_64", "aarch64"):
        raise SandboxError(f"no system call filter for {platform.machine()}; run on x86_64 or aarch64")
    if not os.access(_python(), os.X_OK):
        raise SandboxError(f"no {_python()} to run programs; install it with `apt-get install python3`")
    refusal = _refusal(bwrap)
    if refusal:
        raise SandboxError(
            f"bubblewrap cannot isolate here ({refusal}); it must be 0.8 or later and allowed to make user namespaces "
            "(sysctl user.max_user_namespaces; in a container, a seccomp profile that permits unshare)"
        )
    return "bubblewrap"


@cache
def _refusal(bwrap: str) -> str:
    """Why bubblewrap cannot work here, "" where it can. It is tried once per process, since it costs a start."""
    try:
        with closing(_Worker((), unsafe=False)) as worker:
            worker.run(_contents("", {}, DEFAULT_LIMITS), DEFAULT_LIMITS, b"")
    except SandboxError as error:
        return str(error)
    return ""


def _python() -> str:
    return next((path for path in _PYTHONS if os.access(path, os.X_OK)), _PYTHONS[0])


def _bubblewrap(packages: Sequence[Path]) -> list[str]:
    """The command that runs the system's Python in bubblewrap."""
    command = [shutil.which("bwrap") or "bwrap", "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    command += ["--unshare-uts", "--unshare-cgroup-try", "--uid", str(_NOBODY), "--gid", str(_NOBODY)]
    command += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1", "--clearenv"]
    for name, value in _ENVIRONMENT.items():
        command += ["--setenv", name, value]
    command += ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for path in ("/bin", "/lib", "/lib64"):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind-try", path, path]
    for number, folder in enumerate(packages):
        command += ["--ro-bind", str(folder), f"/packages/{number}"]
    # each job mounts its own /proc, /tmp, /dev/shm and /dev/pts over these
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    # The root, /dev and /tmp are tmpfs without a bound: a program that writes there could fill the machine's memory.
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--remount-ro", "/tmp", "--chdir", "/tmp", "--"]
    return [*command, _python(), "-s", "-S"]  # not -I, which would drop the hash seed


class _Worker:
    """One warm sandbox: the process of bubblewrap, and the host's end of the socket to its fork server."""

    def __init__(self, packages: Sequence[Path], *, unsafe: bool) -> None:
        self.unsafe = unsafe
        self.healthy = True  # whether it may get another job
        self.jobs = 0
        self.errors = ""  # stderr of bubblewrap and the fork server, once closed
        user: dict[str, Any] = {}  # Any: keywords of Popen, which differ in type
        if unsafe:
            command = [sys.executable, "-s", "-S", "-c", source_of("forkserver.py"), "unsafe", *map(str, packages)]
        else:
            command = [*_bubblewrap(packages), "-c", source_of("forkserver.py"), "isolated"]
            command += [f"/packages/{number}" for number in range(len(packages))]
            if os.geteuid() == 0:  # root escapes RLIMIT_NPROC even in bubblewrap, and an escape should end as nobody
                user = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
        self.control, worker_control = socket.socketpair()
        self.replies = self.control.makefile("rb")
        try:
            with worker_control:
                self.process = subprocess.Popen(
                    command,
                    stdin=worker_control.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    cwd="/",
                    env=_ENVIRONMENT,
                    start_new_session=True,
                    **user,
                )
        except (OSError, subprocess.SubprocessError) as error:
            self.control.close()
            raise SandboxError(f"cannot start {command[0]}: {_last_line(str(error))}; is it installed?") from error

    def run(self, contents: dict[str, bytes], limits: Limits, stdin: bytes) -> ExecutionResult:
        """Run one program. Raises SandboxError if it did not start. A worker that is not `healthy` must be closed."""
        self.healthy = False
        self.jobs += 1
        with tempfile.TemporaryDirectory(prefix="diffucoder-") if self.unsafe else nullcontext("/tmp") as folder:
            job = {
                "folder": folder,
                "contents": contents,
                "stdin": stdin,
                "rlimits": _rlimits(limits, self.unsafe),
                "seconds": limits.seconds,
                "output": limits.output,
            }
            self._start(job)
            return self._finish(limits)

    def _start(self, job: dict[str, Any]) -> None:
        try:
            self.control.settimeout(_START)
            self.control.sendall(marshal.dumps(job, 2))
            if self.replies.readline() == b"started\n":
                return
        except OSError:
            pass
        self.close()
        reason = _last_line(self.errors) or "no reason given"
        raise SandboxError(reason if reason.startswith("bwrap") else f"the sandbox did not start: {reason}")

    def _finish(self, limits: Limits) -> ExecutionResult:
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
            return ExecutionResult("killed", "", "", time.monotonic() - begin, 0, "the whole sandbox was killed")
        status, detail = _ending(limit, int(code), stderr, limits)
        return ExecutionResult(status, stdout, stderr, float(seconds), int(memory), detail)

    def close(self) -> None:
        """End the whole tree. With bwrap, process 1 of its namespace dies, and with that everything in there."""
        if self.control.fileno() < 0:
            return
        self.replies.close()
        self.control.close()  # fork server and supervisor then end by themselves, unless they hang
        try:
            errors = self.process.communicate(timeout=_CLOSE)[1]
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            errors = self.process.communicate()[1]
        self.errors = errors.decode(errors="replace")


def _ending(limit: str, code: int, stderr: str, limits: Limits) -> tuple[Status, str]:
    """Status and detail of a run that ended at a limit, or with an exit code."""
    if limit == "output":
        return "killed", f"output: printed more than {limits.output} bytes"
    if limit == "timeout":
        return "timeout", f"seconds: ran longer than {limits.seconds:g}"
    if code < 0:
        return "killed", _signal_name(-code)
    if code > 0:
        return "failed", _last_line(stderr) or f"exit code {code}"
    return "ok", ""


@cache
def source_of(name: str) -> str:
    """The source of a file of this folder that runs inside."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _contents(program: str, files: Mapping[str, str], limits: Limits) -> dict[str, bytes]:
    """The files of the working folder, the program among them. Raises ConfigError for what does not fit in there."""
    contents = {_PROGRAM: program.encode(errors="surrogatepass")}
    for name, content in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or str(path) in {".", *contents}:
            raise ConfigError(f"file name {name!r} must be relative, without '..', used once and not {_PROGRAM!r}")
        contents[str(path)] = content.encode(errors="surrogatepass")
    pages = sum(-(-len(content) // _PAGE) for content in contents.values())
    if pages * _PAGE > limits.files:
        raise ConfigError(
            f"program and files take {pages * _PAGE} bytes, above limits.files={limits.files}; raise the limit"
        )
    return contents


def _rlimits(limits: Limits, unsafe: bool) -> dict[str, int]:
    # The limit of CPU time is above that of the clock: the clock decides, this is for what may outlive it.
    rlimits = {"CPU": int(limits.seconds) + 2, "AS": limits.memory, "FSIZE": limits.files, "NOFILE": 64, "CORE": 0}
    if not unsafe:  # without a namespace, all processes of the user would count
        rlimits["NPROC"] = limits.processes + 1  # the supervisor counts too
    return rlimits


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


def _signal_name(number: int) -> str:
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:  # a real-time signal has no name
        return f"signal {number}"
