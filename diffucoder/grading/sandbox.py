"""Run a generated program in isolation: program → ExecutionResult.

What holds a program (Linux, bubblewrap 0.8 or later):

* Namespaces of its own (user, pid, net, ipc, uts, mount): no network, no other process to see or signal, no home.
  The system's Python is mounted read-only; only tmpfs of bounded size can be written, one being its working folder.
* An unprivileged user without capabilities, `no_new_privs`, no nested user namespaces, an empty environment.
* rlimits for memory, CPU, file size, processes and open files; a wall clock whose end kills the whole tree.
* Output is counted while it is read: who prints more than the limit is killed, and costs no more memory than that.

Inside, a *supervisor* is process 1: it sets the limits, forks, lets the child run the program as `__main__`, and tells
the host how that ended over a socket of its own. When the host closes its side the supervisor ends, and everything in
the namespace with it. The program can neither trace nor read nor kill the supervisor.

What is not covered; attackers need more than this first form:

* No seccomp filter and no Landlock: a hole in the kernel's system calls is a hole in the sandbox. No defence against
  side channels (timing, caches, the machine's figures in /proc).
* Memory is bounded per process, not in sum: at worst `processes × memory + 2 × files`, and what the kernel keeps for
  pipes and inodes comes on top. CPU is bounded by niceness and time; with n processes a run may use n cores.
* All of /usr can be read, with whatever an administrator put there for everyone.
* Before Linux 5.14 `processes` counts what uid 65534 runs on the whole machine, not in one sandbox.
* Root's runs start by fork, not vfork (the price of dropping the user): slow from a process with gigabytes in use.

`unsafe=True` is no sandbox at all: a plain subprocess with rlimits, for machines where nothing better can be had.
"""

import marshal
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from functools import cache
from pathlib import PurePosixPath
from typing import Any, Literal

from diffucoder.errors import ConfigError, SandboxError

Status = Literal["ok", "failed", "timeout", "killed"]

_NOBODY = 65534
_PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3")  # a venv's may live below a private home, out of reach
_PROGRAM = "program.py"
_PAGE = 4096  # what the smallest file takes of a tmpfs
_GRACE = 2.0  # seconds a killed tree may take to close its pipes
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


def run(
    program: str,
    limits: Limits = DEFAULT_LIMITS,
    *,
    stdin: str | None = None,
    files: Mapping[str, str] | None = None,
    unsafe: bool = False,
) -> ExecutionResult:
    """Run a Python program as `__main__`, with `files` in its working folder; a crash is a result, not an exception."""
    contents = _contents(program, files or {}, limits)
    if not unsafe:
        isolation()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="diffucoder-")) if unsafe else "/"
        ours, theirs = map(stack.enter_context, socket.socketpair())
        job = marshal.dumps((theirs.fileno(), unsafe, _rlimits(limits, unsafe), contents), 2)
        process = stack.enter_context(_start(limits, folder, line=theirs, unsafe=unsafe))
        stack.callback(_kill, process)
        theirs.close()
        conversation = _Conversation(process, ours, limits)
        conversation.hold(len(job).to_bytes(8, "big") + job + (stdin or "").encode(errors="surrogatepass"))
    return conversation.result()


def run_many(
    programs: Iterable[str], limits: Limits = DEFAULT_LIMITS, *, workers: int | None = None, unsafe: bool = False
) -> Iterator[ExecutionResult]:
    """Run programs side by side, `workers` at a time (one a core unless said otherwise); results come in order."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        yield from pool.map(lambda program: run(program, limits, unsafe=unsafe), programs)


def isolation() -> str:
    """Name the mechanism that isolates programs here, or raise SandboxError with the reason and the remedy."""
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"no isolation on {sys.platform}: it needs Linux; run there, or pass unsafe=True")
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxError("no bwrap on PATH; install it with `apt-get install bubblewrap`, or pass unsafe=True")
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
    command = [*_isolated(bwrap, DEFAULT_LIMITS), "-c", ""]
    try:
        done = subprocess.run(command, cwd="/", capture_output=True, timeout=30, check=False, **_dropped_user())
    except (OSError, subprocess.SubprocessError) as error:
        return _last_line(str(error))
    return (_last_line(done.stderr.decode(errors="replace")) or "no reason given") if done.returncode else ""


def _python() -> str:
    return next((path for path in _PYTHONS if os.access(path, os.X_OK)), _PYTHONS[0])


def _dropped_user() -> dict[str, Any]:  # Any: Popen's keywords for the user differ in type
    # Root escapes RLIMIT_NPROC, even inside bubblewrap; and nobody is what an escape should end as.
    return {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}


def _isolated(bwrap: str, limits: Limits) -> list[str]:
    command = [bwrap, "--unshare-user", "--disable-userns", "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    command += ["--unshare-uts", "--unshare-cgroup-try", "--uid", str(_NOBODY), "--gid", str(_NOBODY)]
    command += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1", "--clearenv"]
    for name, value in _ENVIRONMENT.items():
        command += ["--setenv", name, value]
    command += ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for path in ("/bin", "/lib", "/lib64"):
        merged = os.path.islink(path)
        command += ["--symlink", os.readlink(path), path] if merged else ["--ro-bind-try", path, path]
    size = ["--size", str(limits.files)]
    command += ["--proc", "/proc", "--dev", "/dev", *size, "--tmpfs", "/dev/shm", *size, "--tmpfs", "/tmp"]
    # The root and /dev are tmpfs without a bound: left writable, a program could fill the machine's memory.
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--"]
    return [*command, _python(), "-s", "-S"]  # not -I, which would drop the hash seed; no environment is left to fear


def _start(limits: Limits, folder: str, *, line: socket.socket, unsafe: bool) -> subprocess.Popen[bytes]:
    python = [sys.executable, "-s", "-S"] if unsafe else _isolated(shutil.which("bwrap") or "bwrap", limits)
    try:
        return subprocess.Popen(
            [*python, "-c", _SUPERVISOR],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=_ENVIRONMENT,
            pass_fds=[line.fileno()],
            start_new_session=True,
            **({} if unsafe else _dropped_user()),
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(f"cannot start {python[0]}: {_last_line(str(error))}; is it installed?") from error


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the whole tree from outside: with bwrap dies process 1, and with that everything in its namespace."""
    if process.returncode is None:  # not reaped yet, so the number is still its own
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


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

    def __init__(self, process: subprocess.Popen[bytes], line: socket.socket, limits: Limits) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.process, self.stdin, self.line, self.limits = process, process.stdin, line, limits
        streams = (process.stdout, process.stderr, line)
        self.kept = {stream.fileno(): bytearray() for stream in streams}
        self.started = time.monotonic()
        self.seconds = 0.0
        self.deadline = self.started + limits.seconds
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
        self.seconds = time.monotonic() - self.started
        with suppress(subprocess.TimeoutExpired):
            # bwrap, left alone, reaps process 1; killed, it would leave a zombie to a container without an init.
            self.process.wait(0.0 if listening else _GRACE)

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
        stdout, stderr, report = (bytes(kept).decode(errors="replace") for kept in self.kept.values())
        started, *ending = report.split()[:4] or [""]
        if not started and self.broken != "timeout":
            reason = _last_line(stderr) or "no reason given"
            raise SandboxError(f"the sandbox did not start: {reason}; isolation() says what it needs")
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


# Runs inside, first as process 1 of the namespace. Its stdin carries the job, then the program's own stdin.
_SUPERVISOR = r"""
import builtins, marshal, os, resource, sys, time
import _sitebuiltins, _thread


def take(size):
    data = bytearray()
    while len(data) < size:
        chunk = os.read(0, size - len(data))
        if not chunk:
            os._exit(1)
        data += chunk
    return bytes(data)


def end():
    if unsafe:
        os.killpg(0, 9)
    os._exit(0)  # and with process 1 ends its namespace


line, unsafe, limits, contents = marshal.loads(take(int.from_bytes(take(8), "big")))
if not unsafe:
    import _ctypes  # ctypes itself takes 4 ms more to import

    PR_SET_DUMPABLE = 4  # off: nobody in here may trace this process or open its files in /proc, same user or not
    if _ctypes.call_function(_ctypes.dlsym(_ctypes.dlopen(None, 2), "prctl"), (PR_SET_DUMPABLE, 0, 0, 0, 0)) != 0:
        sys.exit("prctl: cannot protect the supervisor")
for name, content in contents.items():
    os.makedirs(os.path.dirname(os.path.abspath(name)), exist_ok=True)
    with open(name, "wb") as file:
        file.write(content)
os.nice(19)
for name, value in limits.items():
    kind = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (value, value))
    except (OSError, ValueError):
        if not unsafe:  # macOS refuses some
            raise
os.write(line, b"started ")
begin = time.monotonic()
child = os.fork()
if child:
    _thread.start_new_thread(lambda: os.read(line, 1) or end(), ())  # the host hung up
    pid = 0
    while pid != child:  # process 1 also reaps orphans
        pid, status, usage = os.wait4(-1, 0)
    memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    ending = os.waitstatus_to_exitcode(status), memory, time.monotonic() - begin
    os.write(line, b"%d %d %f " % ending)
    end()

os.close(line)


def show(kind, error, trace):
    while trace is not None and trace.tb_frame.f_code is here:
        trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)


here = sys._getframe().f_code
path = os.path.abspath("program.py")
main = type(sys)("__main__")
main.__file__ = path
builtins.exit = builtins.quit = _sitebuiltins.Quitter("exit", "Ctrl-D")
sys.modules["__main__"], sys.argv, sys.excepthook = main, [path], show
exec(compile(contents["program.py"], path, "exec", dont_inherit=True), main.__dict__)
"""
