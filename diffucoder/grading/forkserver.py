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
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from typing import Any

NEW_NAMESPACES = 0x20000 | 0x8000000 | 0x10000000 | 0x20000000  # flags of clone: mount, ipc, user, pid
ANY_NAMESPACE = 0x7E020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
CAPABILITY_VERSION_3 = 0x20080522
MIN_PAUSE = 0.0005  # seconds between two looks at a program
MAX_PAUSE = 0.02

# Modules that programs import most often. The fork server imports them once, so they cost a job nothing.
WARM = """bisect collections copy dataclasses datetime decimal fractions functools hashlib heapq itertools json math
operator random re signal string typing"""

# Numbers of system calls on x86_64 and aarch64. No program under test needs the denied ones; some have had holes.
DENIED = {
    # other processes; a new session would have a priority of its own
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "perf_event_open": (298, 241), "setsid": (112, 157),
    # mounts and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "fsopen": (430, 430),
    "fsmount": (432, 432), "move_mount": (429, 429), "open_tree": (428, 428), "mount_setattr": (442, 442),
    "setns": (308, 268), "unshare": (272, 97), "open_by_handle_at": (304, 265),
    # memory that no limit counts, unlike that of a tmpfs
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # the kernel
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "bpf": (321, 280),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "fanotify_init": (300, 262), "quotactl": (179, 60), "syslog": (103, 116),
    "acct": (163, 89), "swapon": (167, 224), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104),
}  # fmt: skip
CLONE = (56, 220)
CLONE3 = (435, 435)
SOCKET = (41, 198)
AUDIT_ARCHITECTURE = (0xC000003E, 0xC00000B7)


def serve(control: socket.socket, isolated: bool) -> bytes:
    """Fork for every job. Returns only in the process of a program: its source."""
    while True:
        # the supervisor reads the job, so that its data is never in the fork server's memory
        if not control.recv(1, socket.MSG_PEEK):  # the host has closed the socket
            os._exit(0)
        # Python has no function that forks into new namespaces
        child = call("syscall", CLONE[machine], NEW_NAMESPACES | signal.SIGCHLD, 0, 0, 0, 0) if isolated else os.fork()
        if child == 0:
            return supervise(control, isolated)
        os.waitpid(child, 0)
        control.sendall(b"gone\n")


def supervise(control: socket.socket, isolated: bool) -> bytes:
    """Read a job, prepare it, run the program and report its end. Returns in the program's process."""
    with control.makefile("rb") as file:
        job = marshal.load(file)
    source: bytes = job["program"]
    os.setsid()
    if isolated:
        enter_namespaces(job["files"], len(job["stdin"]), job["home"].encode())
    os.chdir(job["folder"])
    os.environ["HOME"] = job["home"]
    write_file("program.py", source)  # for tracebacks
    write_file(".stdin", job.pop("stdin"))
    stdin = os.open(".stdin", os.O_RDONLY)
    os.unlink(".stdin")
    lower_priority()
    set_limits(job, isolated)
    if isolated:
        confine()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # to process 1 of a namespace the default is to do nothing
    stdout, program_stdout = os.pipe()
    stderr, program_stderr = os.pipe()
    control.sendall(b"started\n")
    program = os.fork()
    if program == 0:
        control.detach()  # it is descriptor 0, which the next lines replace
        for target, fd in enumerate((stdin, program_stdout, program_stderr)):
            os.dup2(fd, target)
        for fd in (stdin, stdout, program_stdout, stderr, program_stderr):
            os.close(fd)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return source
    for fd in (stdin, program_stdout, program_stderr):
        os.close(fd)
    os.set_blocking(stdout, False)
    os.set_blocking(stderr, False)
    control.sendall(watch(program, [stdout, stderr], control, job["seconds"], job["output"]))
    # this ends everything that the program started; process 1 takes its namespaces along
    if not isolated:
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


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
    """Exit code and peak memory of the program once it has ended. Process 1 also reaps orphans."""
    while True:
        process, status, usage = os.wait4(-1, os.WNOHANG)
        if process == 0:
            return None
        if process == program:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def enter_namespaces(tmpfs_bytes: int, stdin_bytes: int, home: bytes) -> None:
    """In the new namespaces: stay the same user, mount what belongs to the job, forbid further namespaces."""
    same_user = b"%d %d 1" % (user, user)
    for name, content in (("setgroups", b"deny"), ("gid_map", same_user), ("uid_map", same_user)):
        write_file(f"/proc/self/{name}", content)
    for folder, size in ((b"/tmp", tmpfs_bytes + stdin_bytes), (b"/dev/shm", tmpfs_bytes), (home, tmpfs_bytes)):
        bounds = b"size=%d,nr_inodes=4096,mode=755" % size
        call("mount", b"tmpfs", folder, b"tmpfs", MS_NOSUID | MS_NODEV, bounds)
    call("mount", b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    call("mount", b"devpts", b"/dev/pts", b"devpts", MS_NOSUID | MS_NOEXEC, b"newinstance,ptmxmode=0666,mode=620")
    write_file("/proc/sys/user/max_user_namespaces", b"0")


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
    if isolated:  # else all processes of the user would count
        limits["NPROC"] = job["processes"] + 1  # the supervisor counts too
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
    call("capset", struct.pack("=II", CAPABILITY_VERSION_3, 0), bytes(24))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # other processes of the same user may neither trace this one and its children nor open their files in /proc
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    code = ctypes.create_string_buffer(filters, len(filters))
    program = struct.pack("@HP", len(filters) // 8, ctypes.addressof(code))
    call("prctl", PR_SET_SECCOMP, 2, ctypes.create_string_buffer(program), 0, 0)


def system_call_filter() -> bytes:
    """A seccomp program in BPF that denies what is in DENIED, new namespaces, and sockets that are not local."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06  # opcodes: ld, jeq, jge, jset, ret
    number, architecture, first_argument = 0, 4, 16  # offsets in struct seccomp_data

    def step(opcode: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("<HBBI", opcode, if_true, if_false, operand)

    def on_call(numbers: tuple[int, int], *then: bytes) -> list[bytes]:
        return [step(equal, numbers[machine], 0, len(then)), *then]

    allow = step(give, 0x7FFF0000)
    deny = step(give, 0x00050000 | errno.EPERM)
    program = [step(load, architecture), step(equal, AUDIT_ARCHITECTURE[machine], 1, 0), deny, step(load, number)]
    if machine == 0:  # x32 calls would pass by other numbers
        program += [step(at_least, 0x40000000, 0, 1), deny]
    for numbers in DENIED.values():
        program += on_call(numbers, deny)
    program += on_call(CLONE3, step(give, 0x00050000 | errno.ENOSYS))  # its flags are out of reach; libc falls back
    program += on_call(CLONE, step(load, first_argument), step(any_bit, ANY_NAMESPACE, 0, 1), deny, allow)
    program += on_call(SOCKET, step(load, first_argument), step(equal, socket.AF_UNIX, 1, 0), deny, allow)
    return b"".join([*program, allow])


def call(name: str, *arguments: object) -> int:
    """Call a function of the C library. Raises OSError."""
    result: int = getattr(libc, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name} {arguments[1]!r}: {os.strerror(ctypes.get_errno())}")
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


if __name__ == "__main__":
    isolated = sys.argv[1] == "isolated"
    if isolated:
        libc = ctypes.CDLL(None, use_errno=True)
        machine = ["x86_64", "aarch64"].index(os.uname().machine)
        user = os.geteuid()
        filters = system_call_filter()
    sys.path += sys.argv[2:]
    for module in WARM.split():
        __import__(module)
    gc.freeze()  # a collection in a program would copy all of this
    run_as_main(serve(socket.socket(fileno=0), isolated))
