"""What runs inside the sandbox: a fork server, and for every job a supervisor and the program itself.

For: `sandbox`, which hands this file's source to the system's Python inside bubblewrap. Nothing imports it, and it
imports nothing but the standard library, of any version from 3.9 on.

    zygote       process 1 of bubblewrap's namespaces; a warm interpreter that forks for every job it is sent
    supervisor   process 1 of the job's own namespaces (user, pid, mount, ipc): mounts a fresh /proc, /tmp, /dev/shm and
                 /dev/pts, drops all capabilities, takes a system call filter and the limits, forks; tells the host over
                 `line` how the program ended, then ends, and all of its namespaces with it; also when the host hangs up
    program      has all of that from its supervisor; it is `__main__`

A program cannot name the supervisor's parent, nor trace, read or kill the supervisor, which is process 1. What it
leaves behind (processes, files, IPC) goes with its namespaces, so the next job finds none of it.
"""

from __future__ import annotations

import _sitebuiltins
import _thread
import atexit
import builtins
import gc
import marshal
import os
import resource
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from types import TracebackType

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x8000000, 0x10000000, 0x20000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38
SECCOMP_MODE_FILTER = 2
EPERM, ENOSYS = 1, 38
AF_UNIX = 1

# What programs ask for most. Imported once here, they cost a job nothing.
WARM = """bisect collections copy dataclasses datetime decimal fractions functools hashlib heapq itertools json math
operator random re signal string typing"""

# System calls that no program under test needs, and that kernels had holes behind: x86_64 and aarch64 numbers.
DENIED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "mount_setattr": (442, 442),
    "setns": (308, 268),
    "unshare": (272, 97),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "syslog": (103, 116),
    "acct": (163, 89),
    "swapon": (167, 224),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    # memory that no limit counts: tmpfs has bounds, and does for programs that share memory
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "setsid": (112, 157),  # a new session would not give way to others
}
CLONE, CLONE3, SOCKET = (56, 220), (435, 435), (41, 198)
AUDIT_ARCH = (0xC000003E, 0xC00000B7)
NAMESPACES = 0x7E020000  # every CLONE_NEW... flag that clone takes


def serve(control: socket.socket, isolated: bool) -> dict[str, bytes]:
    """Fork for every job; returns only in a program's own process: its files, the program among them."""
    while True:
        head, fds, _, _ = socket.recv_fds(control, 8, 4)
        if not head:  # the host is gone, or done
            os._exit(0)
        child = clone() if isolated else os.fork()
        if child == 0:
            # read here, so that no job's data ever lies in the fork server's memory
            job = marshal.loads(take(control, int.from_bytes(head, "big")))
            control.close()
            return supervise(fds, isolated, *job)
        for fd in fds:
            os.close(fd)
        status = os.waitpid(child, 0)[1] if child > 0 else -1
        control.sendall(b"." if status in (0, signal.SIGKILL) else b"!")  # the second is how an unsafe job ends


def take(stream: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = stream.recv(min(size - len(data), 1 << 20))
        if not chunk:
            os._exit(1)
        data += chunk
    return bytes(data)


def clone() -> int:
    """fork() into namespaces of its own, which Python has no call for."""
    flags = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC | signal.SIGCHLD
    return int(libc.syscall(CLONE[machine], flags, 0, 0, 0, 0))


def supervise(
    fds: list[int], isolated: bool, folder: str, limits: dict[str, int], contents: dict[str, bytes]
) -> dict[str, bytes]:
    """Prepare the job, fork, watch over the program; returns in the program's process."""
    *streams, line = fds
    for target, fd in enumerate(streams):
        os.dup2(fd, target)
        os.close(fd)
    os.setsid()
    if isolated:
        enter(limits["FSIZE"])
    os.chdir(folder)
    for name, content in contents.items():
        os.makedirs(os.path.dirname(os.path.abspath(name)), exist_ok=True)
        with open(name, "wb") as file:
            file.write(content)
    give_way()
    limit(limits, isolated)
    if isolated:
        confine()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # to process 1 of a namespace the default is to do nothing
    os.write(line, b"started ")
    begin = time.monotonic()
    program = os.fork()
    if program == 0:
        os.close(line)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if isolated:
            libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # its own files in /proc are its own again
        return contents
    for target in range(3):  # so that the program's end closes them
        os.close(target)
    _thread.start_new_thread(lambda: os.read(line, 1) or end(isolated), ())  # the host hung up
    reaped = 0
    while reaped != program:  # process 1 also reaps orphans
        reaped, status, usage = os.wait4(-1, 0)
    memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    os.write(line, b"%d %d %f " % (os.waitstatus_to_exitcode(status), memory, time.monotonic() - begin))
    return end(isolated)


def give_way() -> None:
    """Run behind everything else, but do not starve: Linux schedules a session as a group, and nice works inside it.

    Where memory runs out, die before anything else.
    """
    os.nice(19)
    for name, value in (("autogroup", "10"), ("oom_score_adj", "1000")):
        with suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(value)


def end(isolated: bool) -> dict[str, bytes]:
    """Leave, with everything that the program started."""
    if not isolated:
        os.killpg(0, 9)
    os._exit(0)  # as process 1 it takes its namespace along


def enter(size: int) -> None:
    """In the new namespaces: be the same user, mount what is the job's own, forbid to go deeper."""
    for name, text in (("setgroups", "deny"), ("gid_map", f"{user} {user} 1"), ("uid_map", f"{user} {user} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    bounded = b"size=%d,nr_inodes=4096,mode=755" % size
    for path in (b"/tmp", b"/dev/shm"):
        check(libc.mount(b"tmpfs", path, b"tmpfs", MS_NOSUID | MS_NODEV, bounded), f"mount {path!r}")
    check(libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None), "mount /proc")
    terminals = b"newinstance,ptmxmode=0666,mode=620"
    check(libc.mount(b"devpts", b"/dev/pts", b"devpts", MS_NOSUID | MS_NOEXEC, terminals), "mount /dev/pts")
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")


def limit(limits: dict[str, int], isolated: bool) -> None:
    for name, value in limits.items():
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (OSError, ValueError):
            if isolated:  # macOS refuses some
                raise


def confine() -> None:
    """No capability, no privilege to gain, no eyes on this process, no switch in /proc, few ways into the kernel."""
    flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
    check(libc.mount(None, b"/proc", None, flags, None), "remount /proc")
    header = ctypes.create_string_buffer((0x20080522).to_bytes(4, sys.byteorder) + bytes(4), 8)
    check(libc.capset(header, ctypes.create_string_buffer(24)), "capset")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    # nobody in here may trace this process or open its files in /proc, same user or not
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")
    code = ctypes.create_string_buffer(filters, len(filters))
    program = struct.pack("@HP", len(filters) // 8, ctypes.addressof(code))
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(program), 0, 0), "seccomp")


def system_call_filter() -> bytes:
    """A seccomp program in BPF: deny what DENIED names, new namespaces, and sockets that are not local."""
    load, equal, masked, back = 0x20, 0x15, 0x45, 0x06  # ld [k]; jeq; jset; ret
    allow, error = 0x7FFF0000, 0x00050000
    number, architecture, first = 0, 4, 16  # offsets in struct seccomp_data; the low half of the first argument

    def does(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return code.to_bytes(2, "little") + bytes((yes, no)) + k.to_bytes(4, "little")

    def when(call: int, *then: bytes) -> bytes:
        return does(equal, call, 0, len(then)) + b"".join(then)

    refuse = does(back, error | EPERM)
    program = [does(load, architecture), does(equal, AUDIT_ARCH[machine], 1, 0), refuse, does(load, number)]
    if machine == 0:  # x32 calls would pass by their other numbers
        program += [does(0x35, 0x40000000, 0, 1), refuse]
    program += [when(calls[machine], refuse) for calls in DENIED.values()]
    program += [when(CLONE3[machine], does(back, error | ENOSYS))]  # its flags cannot be read here; libc falls back
    program += [when(CLONE[machine], does(load, first), does(masked, NAMESPACES, 0, 1), refuse, does(back, allow))]
    program += [when(SOCKET[machine], does(load, first), does(equal, AF_UNIX, 1, 0), refuse, does(back, allow))]
    return b"".join([*program, does(back, allow)])


def check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def become(contents: dict[str, bytes]) -> None:
    """Run the program as `__main__`, with tracebacks that begin in it."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        while trace is not None and trace.tb_frame.f_code.co_filename == here:
            trace = trace.tb_next
        sys.__excepthook__(kind, error.with_traceback(trace), trace)

    here = sys._getframe().f_code.co_filename
    path = os.path.abspath("program.py")
    main = type(sys)("__main__")
    main.__file__ = path
    vars(builtins).update({name: _sitebuiltins.Quitter(name, "Ctrl-D") for name in ("exit", "quit")})
    sys.modules["__main__"], sys.argv, sys.excepthook = main, [path], show
    code = 0
    # registered first, it is called last, and saves the slow end of an interpreter whose memory is all shared
    atexit.register(lambda: leave(code))
    try:
        exec(compile(contents["program.py"], path, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    except BaseException:
        code = 1
        raise


def leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # whatever the program made of it
            code = code or 120  # as the interpreter would
    os._exit(code & 0xFF)


if __name__ == "__main__":
    isolated = sys.argv[2] == "isolated"
    if isolated:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        machine = ["x86_64", "aarch64"].index(os.uname().machine)
        user = os.geteuid()
        filters = system_call_filter()
    sys.path += sys.argv[3:]
    for module in WARM.split():
        __import__(module)
    gc.freeze()  # a collection in a program would copy all of it
    become(serve(socket.socket(fileno=int(sys.argv[1])), isolated))
