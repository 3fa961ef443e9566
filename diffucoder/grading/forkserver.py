"""What runs in bubblewrap: a fork server, and for every job a supervisor and the program itself.

`sandbox` passes this file's source to the system's Python. Nothing imports it, and it uses only the standard library of
Python 3.9 and later.

    fork server   process 1 of bubblewrap's namespaces: a warm interpreter that forks for every job it receives
    supervisor    process 1 of the job's own namespaces: mounts what the job may write to, drops all capabilities, takes
                  a system call filter, forks the program, collects its output, enforces the limits and reports
    program       inherits all of that; it is `__main__`

A program cannot name the fork server, nor trace, read or kill the supervisor. Its processes, files and IPC end with the
supervisor, so the next job finds none of them.
"""

from __future__ import annotations

import _sitebuiltins
import atexit
import builtins
import ctypes
import errno
import gc
import marshal
import os
import resource
import select
import selectors
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from typing import Any

NEW_NAMESPACES = 0x38020000  # flags of clone: user, mount, pid and ipc namespaces
NEW_NETWORK = 0x50000000  # flags of unshare: user and network namespaces
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
CAPABILITY_VERSION_3 = 0x20080522
MIN_PAUSE = 0.0005  # seconds between two looks at a program
MAX_PAUSE = 0.02
MAX_TERMINALS = 16
MAX_WAITING = 16  # unaccepted connections of a socket; each may hold 200 kB

# Modules that programs import most often. The fork server imports them once, so they cost a job nothing.
WARM = """bisect collections copy dataclasses datetime decimal fractions functools hashlib heapq itertools json math
operator random re signal string typing"""


def serve(control: socket.socket, isolated: bool) -> bytes:
    """Fork a supervisor for every job, until the host closes the connection.

    Returns only in the process of a program, its source. The program does not run below this function, because what it
    finds up the stack must not be the fork server's.
    """
    # A look at the first byte waits for a job. The supervisor reads it, so its data is never in this process.
    while control.recv(1, socket.MSG_PEEK):
        new_namespaces = (NEW_NAMESPACES | signal.SIGCHLD, 0, 0, 0, 0)
        supervisor = call("syscall", clone, *new_namespaces) if isolated else os.fork()
        if supervisor == 0:
            return supervise(control, isolated)
        os.waitpid(supervisor, 0)
        control.sendall(b"gone\n")
    os._exit(0)


def supervise(control: socket.socket, isolated: bool) -> bytes:
    """Read a job, run its program and report how it ended. Returns only in the program's process: its source.

    Until the host reads `started`, nothing of the program has run: whatever fails before is no fault of the program.
    """
    with control.makefile("rb") as file:
        job = marshal.load(file)
    os.setsid()
    if isolated:
        enter_namespaces(job["files"], len(job["stdin"]), job["home"].encode())
    stdin = fill_folder(job)
    lower_priority()
    set_limits(job, isolated)
    if isolated:
        confine()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # to process 1 of a namespace the default is to do nothing
    stdout, program_stdout = os.pipe()
    stderr, program_stderr = os.pipe()
    program = os.fork()
    if program == 0:
        os.close(stdout)
        os.close(stderr)
        control.detach()  # it is descriptor 0, which becomes stdin
        for stream, fd in enumerate((stdin, program_stdout, program_stderr)):
            os.dup2(fd, stream)
            os.close(fd)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        source: bytes = job["program"]
        return source
    control.sendall(b"started\n")
    for fd in (stdin, program_stdout, program_stderr):
        os.close(fd)
    os.set_blocking(stdout, False)
    os.set_blocking(stderr, False)
    control.sendall(watch(program, [stdout, stderr], control, job["seconds"], job["output"]))
    # this ends everything that the program started; process 1 takes its namespaces along
    if not isolated:
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def fill_folder(job: dict[str, Any]) -> int:
    """Enter the job's folder, and write the program there, for tracebacks. Return a descriptor of stdin."""
    os.chdir(job["folder"])
    os.environ["HOME"] = job["home"]
    write_file("program.py", job["program"])
    write_file(".stdin", job.pop("stdin"))
    stdin = os.open(".stdin", os.O_RDONLY)
    os.unlink(".stdin")
    return stdin


def watch(program: int, streams: list[int], control: socket.socket, seconds: float, max_output: int) -> bytes:
    """Collect what the program prints until it ends or passes a limit. Return the report, as `sandbox` reads it."""
    begin = time.monotonic()
    outputs = {stream: bytearray() for stream in streams}
    limit = "none"
    ending = None
    pause = MIN_PAUSE
    while ending is None and limit == "none":
        late = time.monotonic() - begin > seconds  # first: this process may have to wait before it sees the end
        ending = reap(program)
        if ending:
            pause = 0.0  # there may be output left
        elif late:
            limit = "timeout"
        ready = select.select([control.fileno(), *streams], [], [], pause)[0]
        pause = min(2 * pause, MAX_PAUSE)
        if control.fileno() in ready:  # the host has hung up
            return b""
        for stream in ready:
            pause = MIN_PAUSE
            with suppress(BlockingIOError):  # the program may read from its own stdout, too
                chunk = os.read(stream, 1 << 20)
                room = max_output - len(outputs[stream])
                outputs[stream] += chunk[:room]
                if len(chunk) > room:
                    limit = "output"
                if not chunk:
                    streams.remove(stream)
    stdout, stderr = outputs.values()
    code, memory = ending or (0, 0)
    report = f"{limit} {code} {memory} {time.monotonic() - begin:f} {len(stdout)} {len(stderr)}\n"
    return report.encode() + stdout + stderr


def reap(program: int) -> tuple[int, int] | None:
    """Exit code and peak memory of the program once it has ended, or was stopped. Process 1 also reaps orphans."""
    while True:
        process, status, usage = os.wait4(-1, os.WNOHANG | os.WUNTRACED)
        if process == 0:
            return None
        if process == program:
            # else one that stops the runner, which counts its seconds, would hold this worker for far longer
            code = -os.WSTOPSIG(status) if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
            return code, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def enter_namespaces(tmpfs_bytes: int, stdin_bytes: int, home: bytes) -> None:
    """In the new namespaces: stay the same user, mount what belongs to the job, forbid further namespaces."""
    keep_user()
    for folder, size in ((b"/tmp", tmpfs_bytes + stdin_bytes), (b"/dev/shm", tmpfs_bytes), (home, tmpfs_bytes)):
        bounds = b"size=%d,nr_inodes=4096,mode=755" % size
        call("mount", b"tmpfs", folder, b"tmpfs", MS_NOSUID | MS_NODEV, bounds)
    call("mount", b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    # the machine has a few thousand terminals
    terminals = b"newinstance,ptmxmode=0666,mode=620,max=%d" % MAX_TERMINALS
    call("mount", b"devpts", b"/dev/pts", b"devpts", MS_NOSUID | MS_NOEXEC, terminals)
    write_file("/proc/sys/user/max_user_namespaces", b"0")


def keep_user() -> None:
    """In a new user namespace: stay the same user."""
    same_user = b"%d %d 1" % (user, user)
    for name, content in (("setgroups", b"deny"), ("gid_map", same_user), ("uid_map", same_user)):
        write_file(f"/proc/self/{name}", content)


def limit_connections() -> None:
    """Enter a network namespace that limits waiting connections, for all programs: making one for each takes long."""
    call("unshare", NEW_NETWORK)
    keep_user()
    with suppress(OSError):  # older kernels do not let a namespace choose
        write_file("/proc/sys/net/core/somaxconn", b"%d" % MAX_WAITING)
    drop_capabilities()


def drop_capabilities() -> None:
    call("capset", struct.pack("=II", CAPABILITY_VERSION_3, 0), bytes(24))


def lower_priority() -> None:
    """Run only when nothing else wants the processor, and be the first to be killed when memory runs out."""
    os.nice(19)
    # Linux schedules sessions as groups, in which nice has no effect on other sessions
    for name, value in (("autogroup", b"10"), ("oom_score_adj", b"1000")):
        with suppress(OSError):
            write_file(f"/proc/self/{name}", value)


def set_limits(job: dict[str, Any], isolated: bool) -> None:
    # The limit of CPU time is above that of the clock: the clock decides, this is for what may outlive it.
    limits = {"CPU": int(job["seconds"]) + 2, "AS": job["memory"], "FSIZE": job["files"], "NOFILE": 64, "CORE": 0}
    if isolated:
        # the supervisor counts too; without isolation all processes of the user would count
        limits |= {"NPROC": job["processes"] + 1}
        # what the kernel counts for a user: queued signals, message queues, locked pages
        limits |= {"SIGPENDING": 64, "MSGQUEUE": 0, "MEMLOCK": 0, "NICE": 0, "RTPRIO": 0}
    for name, value in limits.items():
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (OSError, ValueError):
            if isolated:  # macOS does not support some
                raise


def confine() -> None:
    """No capability, no privilege to gain, no look at this process, no switch in /proc, few ways into the kernel."""
    call("mount", None, b"/proc", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    drop_capabilities()
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # other processes of the same user may neither trace this one and its children nor open their files in /proc
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    code = ctypes.create_string_buffer(filters, len(filters))
    program = struct.pack("@HP", len(filters) // 8, ctypes.addressof(code))
    call("prctl", PR_SET_SECCOMP, 2, ctypes.create_string_buffer(program), 0, 0)


def call(name: str, *arguments: object) -> int:
    """Call a function of the C library. Raises OSError."""
    result: int = getattr(libc, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name} {arguments[:2]!r}: {os.strerror(ctypes.get_errno())}")
    return result


def write_file(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def run_as_main(source: bytes) -> None:
    """Run the program as `__main__`."""
    path = os.path.abspath("program.py")
    main = type(sys)("__main__")
    main.__file__ = path
    sys.modules["__main__"] = main
    sys.argv = [path]
    user_name = os.environ["USER"]
    os.getlogin = lambda: user_name  # without a terminal it fails
    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D"))
    code = 0
    # Registered first, this is called last. It skips the slow end of an interpreter whose memory is shared.
    atexit.register(lambda: leave(code))
    try:
        exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    except BaseException as error:
        code = 1
        trace = error.__traceback__ and error.__traceback__.tb_next  # without this function
        sys.excepthook(type(error), error.with_traceback(trace), trace)


def leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # the program may have closed or replaced it
            code = code or 120  # as the interpreter does
    os._exit(code & 0xFF)


def adapt_modules() -> None:
    """Let modules that the fork server has imported do without the system calls that the filter denies."""
    selectors.DefaultSelector = selectors.PollSelector  # type: ignore[misc,assignment]  # not epoll
    socket.socket.sendmsg = send_message  # type: ignore[assignment,method-assign]
    del socket.SCM_RIGHTS  # else multiprocessing sends descriptors to start programs, from Python 3.14 on


def send_message(
    sender: socket.socket, buffers: Any, ancillary: Any = (), flags: int = 0, address: str | bytes | None = None
) -> int:
    """In place of `socket.sendmsg`, whose system call could send descriptors."""
    if [*ancillary]:
        raise PermissionError(errno.EPERM, "ancillary data is not allowed here")
    data = b"".join(buffers)
    return sender.send(data, flags) if address is None else sender.sendto(data, flags, address)


if __name__ == "__main__":
    filters = bytes.fromhex(sys.argv[1])
    isolated = bool(filters)
    if isolated:
        libc = ctypes.CDLL(None, use_errno=True)
        clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]  # the system call, for which Python has no function
        user = os.geteuid()
        limit_connections()
        adapt_modules()
    sys.path += sys.argv[2:]
    for module in WARM.split():
        __import__(module)
    gc.freeze()  # a collection in a program would copy all of this
    run_as_main(serve(socket.socket(fileno=0), isolated))
