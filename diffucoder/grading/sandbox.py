"""Run generated programs in isolation: program → ExecutionResult.

What holds a program (Linux, bubblewrap 0.8 or later):

* Namespaces: bubblewrap's (user, pid, net, ipc, uts, mount) around a worker, and new ones (user, pid, mount, ipc) for
  every program in it: no network, no other process to see or signal, no home. The system's Python and /proc are
  mounted read-only; what can be written is new every time: two tmpfs of bounded size, one being the working folder,
  and the folder of terminals.
* An unprivileged user without capabilities, `no_new_privs`, no nested user namespaces, an empty environment.
* A seccomp filter: no tracing, mounting, namespaces, keys, BPF, io_uring and the like, no sockets but local ones, no
  memory that outlives its mapping (SysV IPC, memfd), and no new session, which would be scheduled apart.
* rlimits for memory, CPU, file size, processes and open files; a wall clock whose end kills the whole tree. Programs
  run behind everything else, and are the first to be killed where the machine runs out of memory.
* Output is counted while it is read: who prints more than the limit is killed, and costs no more memory than that.

A worker is warm: a fork server (`zygote`, which runs inside) that starts a program in milliseconds. When the host hangs
up on a program, process 1 of its namespaces ends, and everything in them with it; a worker that does not say so in time
is killed and replaced. Landlock is left out: the mounts already say what can be read and written.

What is not covered:

* Side channels: timing, caches, the machine's figures in /proc, the times of the devices in /dev.
* Memory is bounded per process, not in sum: at worst `processes × memory + 2 × files`, and what the kernel keeps for
  pipes, sockets and inodes comes on top. CPU is bounded by niceness and time; with n processes a run may use n cores.
* All of /usr can be read, with whatever an administrator put there for everyone.
* Before Linux 5.14 `processes` counts what uid 65534 runs on the whole machine, not in one sandbox.

`unsafe=True` is no sandbox at all: a plain process with rlimits, for machines where nothing better can be had.
"""

import marshal
import os
import platform
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path, PurePosixPath
from threading import BoundedSemaphore
from typing import IO, Any, Literal, Self

from diffucoder.errors import ConfigError, SandboxError

Status = Literal["ok", "failed", "timeout", "killed"]

_NOBODY = 65534
_PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3")  # a venv's may live below a private home, out of reach
_PROGRAM = "program.py"
_PAGE = 4096  # what the smallest file takes of a tmpfs
_GRACE = 2.0  # seconds a killed tree may take to close its pipes
_START = 30.0  # seconds a worker may take to start, on a machine that is busy
_JOBS = 5000  # programs a worker runs before it is replaced
# A fixed hash seed: the same program ends the same way every time, also where it prints a set.
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}


@dataclass(frozen=True)
class Limits:
    """What one run may take."""

    seconds: float = 5.0  # wall clock, start-up included
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
    memory: int  # peak resident bytes; 0 where the program did not live to tell
    detail: str  # one line: the exception, the signal or the limit


class Sandbox:
    """A pool of warm workers, each bubblewrap with a fork server in it; safe to share between threads.

    A worker runs one program at a time, each in a process and namespaces of its own, and is replaced when it does not
    answer as it should, and in a process that was forked from this one. Workers start as they are needed and live until
    `close`, or the end of a `with` block.
    """

    def __init__(self, workers: int | None = None, *, packages: Sequence[Path] = (), unsafe: bool = False) -> None:
        """At most `workers` at a time (one a core unless said otherwise); `packages` are folders programs import from.

        Raises SandboxError where isolation cannot be had, with the reason and the remedy.
        """
        if workers is not None and workers < 1:
            raise ConfigError(f"workers={workers} must be at least 1; leave it out for one a core")
        self.workers, self.packages, self.unsafe = workers or os.cpu_count() or 1, _folders(packages), unsafe
        if not unsafe:
            isolation()
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._idle: list[_Worker] = []
        self._free = BoundedSemaphore(self.workers)
        # bubblewrap dies with the thread that started it: one that lives as long as this pool
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="sandbox")

    def run(
        self,
        program: str,
        limits: Limits = DEFAULT_LIMITS,
        *,
        stdin: str | bytes = "",
        files: Mapping[str, str] | None = None,
    ) -> ExecutionResult:
        """Run a Python program as `__main__`, with `files` in its working folder; a crash is a result, not an error."""
        if self._process != os.getpid():  # the workers are our parent's
            self._forget()
        contents = _contents(program, files or {}, limits)
        fed = stdin.encode(errors="surrogatepass") if isinstance(stdin, str) else stdin
        with self._free:
            if self._idle:
                with suppress(SandboxError):  # it ended while it was idle; nothing of the program has run
                    return self._run_in(self._idle.pop(), contents, limits, fed)
            return self._run_in(self._starter.submit(self._start).result(), contents, limits, fed)

    def _run_in(self, worker: "_Worker", contents: dict[str, bytes], limits: Limits, stdin: bytes) -> ExecutionResult:
        """Run in this worker, which is idle or gone afterwards. Raises SandboxError where the program did not start."""
        try:
            result = worker.run(contents, limits, stdin)
        except BaseException:
            worker.close()
            raise
        if worker.sound:
            self._idle.append(worker)
        else:
            worker.close()
        return result

    def run_many(self, programs: Iterable[str], limits: Limits = DEFAULT_LIMITS) -> Iterator[ExecutionResult]:
        """Run programs side by side; results come in order."""
        with ThreadPoolExecutor(self.workers) as pool:
            yield from pool.map(lambda program: self.run(program, limits), programs)

    def _start(self) -> "_Worker":
        return _Worker(self.packages, unsafe=self.unsafe)

    def close(self) -> None:
        """End all workers; a later run starts new ones."""
        if self._process == os.getpid():
            while self._idle:
                self._idle.pop().close()
            self._starter.shutdown()
        self._forget()

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
    """Run one program in a sandbox of its own. For many, keep a `Sandbox`: it starts once."""
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
    """Why bubblewrap cannot work here, "" where it can. Asked once a process, for it costs as much as a run."""
    try:
        worker = _Worker((), unsafe=False)
    except SandboxError as error:
        return str(error)
    try:
        worker.run(_contents("", {}, DEFAULT_LIMITS), DEFAULT_LIMITS, b"")
    except SandboxError as error:
        return str(error)
    finally:
        worker.close()
    return ""


def _python() -> str:
    return next((path for path in _PYTHONS if os.access(path, os.X_OK)), _PYTHONS[0])


def _dropped_user() -> dict[str, Any]:  # Any: Popen's keywords for the user differ in type
    # Root escapes RLIMIT_NPROC, even inside bubblewrap; and nobody is what an escape should end as.
    return {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}


def _isolated(packages: Sequence[Path]) -> list[str]:
    command = [shutil.which("bwrap") or "bwrap", "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    command += ["--unshare-uts", "--unshare-cgroup-try", "--uid", str(_NOBODY), "--gid", str(_NOBODY)]
    command += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1", "--clearenv"]
    for name, value in _ENVIRONMENT.items():
        command += ["--setenv", name, value]
    command += ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for path in ("/bin", "/lib", "/lib64"):
        merged = os.path.islink(path)
        command += ["--symlink", os.readlink(path), path] if merged else ["--ro-bind-try", path, path]
    for number, folder in enumerate(packages):
        command += ["--ro-bind", str(folder), f"/packages/{number}"]
    # each job mounts its own over /proc, /tmp and /dev/shm
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    # The root and /dev are tmpfs without a bound: left writable, a program could fill the machine's memory.
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--remount-ro", "/tmp", "--chdir", "/tmp", "--"]
    return [*command, _python(), "-s", "-S"]  # not -I, which would drop the hash seed; no environment is left to fear


def _folders(packages: Sequence[Path]) -> tuple[Path, ...]:
    for folder in packages:
        if not folder.is_dir():
            raise ConfigError(f"packages: {str(folder)!r} is no folder; give one that holds Python packages")
    return tuple(folder.resolve() for folder in packages)


class _Worker:
    """One sandbox: a process that forks for every job, and our end of the socket to it."""

    def __init__(self, packages: Sequence[Path], *, unsafe: bool) -> None:
        self.unsafe, self.jobs, self.sound = unsafe, 0, True
        paths = [str(folder) for folder in packages] if unsafe else [f"/packages/{n}" for n in range(len(packages))]
        self.control, theirs = socket.socketpair()
        command = [sys.executable, "-s", "-S"] if unsafe else _isolated(packages)
        mode = "unsafe" if unsafe else "isolated"
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [*command, "-c", _zygote(), str(theirs.fileno()), mode, *paths],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    cwd="/",
                    env=_ENVIRONMENT,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    **({} if unsafe else _dropped_user()),
                )
        except (OSError, subprocess.SubprocessError) as error:
            self.control.close()
            raise SandboxError(f"cannot start {command[0]}: {_last_line(str(error))}; is it installed?") from error

    def run(self, contents: dict[str, bytes], limits: Limits, stdin: bytes) -> ExecutionResult:
        """Run one job. Afterwards `sound` tells whether the worker may be given another."""
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="diffucoder-")) if self.unsafe else "/tmp"
            line, their_line = (stack.enter_context(end) for end in socket.socketpair())
            pipes = [[stack.enter_context(end) for end in _pipe()] for _ in range(3)]
            (in_r, in_w), (out_r, out_w), (err_r, err_w) = pipes
            theirs: list[IO[bytes] | socket.socket] = [in_r, out_w, err_w, their_line]
            job = marshal.dumps((folder, _rlimits(limits, self.unsafe), contents), 2)
            try:
                socket.send_fds(self.control, [len(job).to_bytes(8, "big")], [each.fileno() for each in theirs])
                self.control.settimeout(_START)
                self.control.sendall(job)
            except OSError:
                raise self._failure() from None
            for each in theirs:
                each.close()
            conversation = _Conversation(in_w, (out_r, err_r), line, limits)
            conversation.hold(stdin)
            line.close()
            self._settle(conversation)
        return conversation.result()

    def _settle(self, conversation: "_Conversation") -> None:
        """Hear from the fork server that the job is gone, or give the worker up."""
        self.control.settimeout(_GRACE if conversation.started else _START)
        try:
            answer = self.control.recv(1)
        except OSError:
            answer = b""
        self.jobs += 1
        self.sound = answer == b"." and self.jobs < _JOBS
        if not conversation.started and conversation.broken != "timeout":
            if answer == b"":
                raise self._failure()
            raise SandboxError(f"the sandbox did not start: {conversation.complaint()}; isolation() says what it needs")

    def _failure(self) -> SandboxError:
        self.close()
        said = _last_line(self.error) or "no reason given"
        return SandboxError(said if said.startswith("bwrap") else f"the sandbox did not start: {said}")

    def close(self) -> None:
        """Kill the whole tree from outside: with bwrap dies process 1, and with that everything in its namespace."""
        if self.control.fileno() < 0:
            return
        self.control.close()  # the fork server then ends by itself, unless it is stuck
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE)
            if self.process.returncode is None:  # not reaped yet, so the number is still its own
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            self.error = stderr.read(65536).decode(errors="replace")


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    reader, writer = os.pipe()
    return open(reader, "rb", buffering=0), open(writer, "wb", buffering=0)


@cache
def _zygote() -> str:
    return Path(__file__).with_name("zygote.py").read_text(encoding="utf-8")


def _contents(program: str, files: Mapping[str, str], limits: Limits) -> dict[str, bytes]:
    """The working folder's files, the program among them; refuses what would land elsewhere or not fit."""
    contents = {_PROGRAM: program.encode(errors="surrogatepass")}
    for name, content in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or str(path) in {".", *contents}:
            raise ConfigError(f"file name {name!r} must be relative, without '..', used once and not {_PROGRAM!r}")
        contents[str(path)] = content.encode(errors="surrogatepass")
    size = sum(-(-len(content) // _PAGE) * _PAGE for content in contents.values())
    if size > limits.files:
        raise ConfigError(f"program and files take {size} bytes, above limits.files={limits.files}; raise the limit")
    return contents


def _rlimits(limits: Limits, unsafe: bool) -> dict[str, int]:
    # CPU lies above the wall clock: the clock decides, this is for what might outlive it.
    values = {"CPU": int(limits.seconds) + 2, "AS": limits.memory, "FSIZE": limits.files, "NOFILE": 64, "CORE": 0}
    # The supervisor and its listener count too. Without a namespace, all of the user's processes would.
    return values if unsafe else {**values, "NPROC": limits.processes + 2}


def _last_line(text: str) -> str:
    return next((line.strip()[:500] for line in reversed(text.splitlines()) if line.strip()), "")


class _Conversation:
    """The host's side of one run: feed stdin, keep what is printed, end it at a limit."""

    def __init__(self, stdin: IO[bytes], outputs: Sequence[IO[bytes]], line: socket.socket, limits: Limits) -> None:
        self.stdin, self.line, self.limits = stdin, line, limits
        self.report = bytearray()  # the supervisor's
        self.kept = {**{stream.fileno(): bytearray() for stream in outputs}, line.fileno(): self.report}
        self.begun = time.monotonic()
        self.seconds = 0.0
        self.deadline = self.begun + limits.seconds
        self.broken = ""  # the limit that ended the run
        self.dying = False

    def hold(self, data: bytes) -> None:
        """Talk until every stream is closed, which is when every process of the tree is gone."""
        unsent = memoryview(data)
        os.set_blocking(self.stdin.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(self.stdin, selectors.EVENT_WRITE)
            for stream in self.kept:
                selector.register(stream, selectors.EVENT_READ)
            listening = set(self.kept)
            while listening and self._has_time():
                for key, _ in selector.select(max(0.0, self.deadline - time.monotonic())):
                    if key.fileobj is self.stdin:
                        unsent = self._send(unsent)
                        if not unsent:
                            selector.unregister(self.stdin)
                            self.stdin.close()
                    elif not self._receive(key.fd):
                        selector.unregister(key.fd)
                        listening.remove(key.fd)
        self.seconds = time.monotonic() - self.begun

    @property
    def started(self) -> bool:
        """Whether the supervisor came as far as the program."""
        return bool(self.report)

    def complaint(self) -> str:
        """The last line of stderr."""
        return _last_line(self._texts()[1]) or "no reason given"

    def _texts(self) -> list[str]:
        return [bytes(kept).decode(errors="replace") for kept in self.kept.values()]

    def _has_time(self) -> bool:
        in_time = time.monotonic() < self.deadline
        if not in_time and not self.dying:
            self._end("timeout")
            return True
        return in_time

    def _end(self, limit: str) -> None:
        """Tell the supervisor to end, and give the tree a little time to be gone."""
        self.broken = self.broken or limit
        if not self.dying:
            self.dying = True
            self.deadline = time.monotonic() + _GRACE
            with suppress(OSError):  # it may have ended first
                self.line.shutdown(socket.SHUT_WR)

    def _send(self, unsent: memoryview) -> memoryview:
        try:
            return unsent[os.write(self.stdin.fileno(), unsent[:65536]) :]
        except BlockingIOError:
            return unsent
        except BrokenPipeError:  # the program ended without reading all of it
            return unsent[:0]

    def _receive(self, stream: int) -> bool:
        """Keep what came, within the limit; False at the stream's end."""
        chunk = os.read(stream, 65536)
        kept = self.kept[stream]
        room = (_PAGE if stream == self.line.fileno() else self.limits.output) - len(kept)
        kept += chunk[:room]
        if len(chunk) > room:
            self._end("output")
        if stream == self.line.fileno() and not chunk:
            self._end("")  # it ended by itself
        return bool(chunk)

    def result(self) -> ExecutionResult:
        stdout, stderr, report = self._texts()
        ending = report.split()[1:4]
        code, memory, seconds = (int(ending[0]), int(ending[1]), float(ending[2])) if ending else (0, 0, self.seconds)
        status: Status = "ok"
        detail = ""
        if self.broken == "output":
            status, detail = "killed", f"output: printed more than {self.limits.output} bytes"
        elif not ending:
            timeout = self.broken == "timeout"
            status = "timeout" if timeout else "killed"
            detail = f"seconds: ran longer than {self.limits.seconds:g}" if timeout else "the whole sandbox was killed"
        elif code < 0:
            status, detail = "killed", _signal_name(-code)
        elif code > 0:
            status, detail = "failed", _last_line(stderr) or f"exit code {code}"
        return ExecutionResult(status, stdout, stderr, seconds, memory, detail)


def _signal_name(number: int) -> str:
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:  # a real-time signal has no name
        return f"signal {number}"
