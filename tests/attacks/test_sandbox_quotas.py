"""What one program could take from everybody else: what the kernel counts per user or machine, or does not count."""

import errno
import os
import platform
import re
import resource
import struct
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from diffucoder.errors import SandboxError
from diffucoder.grading import sandbox, syscalls
from diffucoder.grading.grade import grade
from diffucoder.grading.sandbox import ExecutionResult, Limits, Sandbox

ROOMY = Limits(seconds=60, memory=1 << 30, processes=12)
HEAD = (
    "import array, asyncio, ctypes, errno, fcntl, mmap, os, resource, select, signal, socket, subprocess, sys, time\n"
)
HEAD += "libc = ctypes.CDLL(None, use_errno=True)\n"


def printed(program: str, box: Sandbox, limits: Limits = ROOMY) -> str:
    result = box.run(HEAD + program, limits)
    assert result.status == "ok", result
    return result.stdout


# The filter, as the kernel would run it


def action(machine: str, number: int, *arguments: int, architecture: int | None = None) -> int:
    """What the filter decides about a call: 0 if it is allowed, else the error's number."""
    if architecture is None:
        architecture = syscalls.MACHINES[machine]
    facts = struct.pack("<IIQ", number, architecture, 0)
    facts += struct.pack("<6Q", *arguments, *[0] * (6 - len(arguments)))
    steps = [*struct.iter_unpack("<HBBI", syscalls.system_call_filter(machine))]
    position = 0
    value = 0
    while True:
        opcode, if_true, if_false, operand = steps[position]
        position += 1
        if opcode == 0x06:
            return 0 if operand == 0x7FFF0000 else operand & 0xFFFF
        if opcode == 0x20:
            (value,) = struct.unpack_from("<I", facts, operand)
        else:
            holds = {0x15: value == operand, 0x25: value > operand, 0x45: value & operand != 0}[opcode]
            position += if_true if holds else if_false


@pytest.mark.parametrize("machine", syscalls.MACHINES)
def test_the_filter_allows_what_is_in_the_table_and_nothing_else(machine: str) -> None:
    column = [*syscalls.MACHINES].index(machine)
    allowed = {numbers[column] for numbers in syscalls.ALLOWED.values()}
    with_arguments = {rule[0][column] for rule in syscalls.ALLOWED_WITH.values()}
    with_arguments |= {rule[0][column] for rule in syscalls.ALLOWED_WITHOUT.values()}
    for number in {*range(600)} - with_arguments:
        assert (action(machine, number) == 0) == (number in allowed), number
    for numbers, index, values in syscalls.ALLOWED_WITH.values():
        for value in (*values, *range(100), 1024, 1026, 1031, 0x5412):
            arguments = [7] * index + [value]
            assert action(machine, numbers[column], *arguments) == (0 if value in values else errno.EPERM)
            arguments[index] += 1 << 32  # which the kernel does not read
            assert action(machine, numbers[column], *arguments) == (0 if value in values else errno.EPERM)


@pytest.mark.parametrize("machine", syscalls.MACHINES)
def test_calls_of_other_machines_are_denied(machine: str) -> None:
    for architecture in (0x40000003, 0x40000028, 0xC000003E, 0xC00000B7, 0):  # i386, arm, x86_64, aarch64
        if architecture != syscalls.MACHINES[machine]:
            assert action(machine, 0, architecture=architecture) == errno.EPERM
    assert action(machine, 0x40000000) == errno.ENOSYS  # read, as x32 numbers it


@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")],
    ids=syscalls.MACHINES,
)
def test_the_numbers_are_those_of_the_kernel(column: int, header: str) -> None:
    if not Path(header).exists():
        pytest.skip("the kernel's headers are not installed")
    known: dict[str, int] = {}
    for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", Path(header).read_text()):
        known[name] = int(number)
    known["newfstatat"] = known.get("fstatat", 262)  # its name in the generic header
    known.setdefault("fchmodat2", 452)
    tables: dict[str, int | None] = {}
    for name, numbers in {**syscalls.ALLOWED, **syscalls.ABSENT, **syscalls.UNSUPPORTED}.items():
        tables[name] = numbers[column]
    for name, rule in {**syscalls.ALLOWED_WITH, **syscalls.ALLOWED_WITHOUT}.items():
        tables[name] = rule[0][column]
    for name, given in tables.items():
        assert known.get(name) == given or (given is None and column == 1), name


# What a program cannot have


@pytest.mark.parametrize(
    "expression",
    [
        pytest.param("libc.vmsplice(p[1], 0, 0, 0)", id="pages of its own in a pipe"),
        pytest.param("libc.splice(f, 0, p[1], 0, 9, 0)", id="pages of a file in a pipe"),
        pytest.param("libc.sendfile(p[1], f, 0, 9)", id="pages of a file in a pipe by sendfile"),
        pytest.param("libc.tee(p[0], p[1], 9, 0)", id="pages of a pipe in a pipe"),
        pytest.param("libc.fcntl(p[1], 1031, 1 << 20)", id="a larger pipe"),
        pytest.param("libc.fcntl(f, 1024, 0)", id="a lease of a file"),
        pytest.param("libc.fcntl(f, 1026, 1)", id="signals about a folder"),
        pytest.param("libc.syscall(206, 9, bytes(8))", id="asynchronous I/O"),
        pytest.param("libc.syscall(425, 1, bytes(999))", id="io_uring"),
        pytest.param("libc.memfd_create(b'x', 0)", id="memory with a descriptor"),
        pytest.param("libc.syscall(447, 0)", id="secret memory"),
        pytest.param("libc.syscall(323, 0)", id="faults of its own"),
        pytest.param("libc.syscall(248, b'user', b'x', b'x', 1, -3)", id="a key"),
        pytest.param("libc.syscall(250, 0, -3, 1)", id="a keyring"),
        pytest.param("libc.inotify_init1(0)", id="watches of files"),
        pytest.param("libc.fanotify_init(0, 0)", id="watches of file systems"),
        pytest.param("libc.epoll_create1(0)", id="watches of descriptors"),
        pytest.param("libc.signalfd(-1, bytes(128), 0)", id="signals by descriptor"),
        pytest.param("libc.timerfd_create(0, 0)", id="timers by descriptor"),
        pytest.param("libc.timer_create(0, 0, bytes(8))", id="timers"),
        pytest.param("libc.mq_open(b'/x', 66, 0o600, None)", id="message queues"),
        pytest.param("libc.shmget(0, 4096, 0o1600)", id="System V memory"),
        pytest.param("libc.semget(0, 1, 0o1600)", id="System V semaphores"),
        pytest.param("libc.msgget(0, 0o1600)", id="System V queues"),
        pytest.param("libc.mlock(libc.environ, 1)", id="locked pages"),
        pytest.param("libc.mlockall(1)", id="all pages locked"),
        pytest.param("-(libc.mmap(0, 4096, 3, 0x40022, -1, 0) & 1)", id="huge pages of the machine's pool"),
        pytest.param("libc.prlimit(os.getppid(), 7, bytes(16), 0)", id="limits of others"),
        pytest.param("libc.sched_setaffinity(0, 8, bytes([255] * 8))", id="processors"),
        pytest.param("libc.sched_setscheduler(0, 3, bytes(8))", id="another scheduler"),
        pytest.param("libc.syscall(251, 1, 0, 0)", id="priority of I/O"),
        pytest.param("libc.syscall(298, bytes(128), 0, -1, -1, 0)", id="performance counters"),
        pytest.param("libc.syscall(321, 0, bytes(128), 128)", id="programs of the kernel"),
        pytest.param("libc.syscall(272, 0x10000000)", id="a user namespace"),
        pytest.param("libc.syscall(308, f, 0)", id="another namespace"),
        pytest.param("libc.syscall(434, os.getpid(), 0)", id="a descriptor of a process"),
        pytest.param("libc.syscall(312, 1, 2, 0, 0, 0)", id="a comparison of processes"),
        pytest.param("libc.syscall(310, os.getpid(), 0, 0, 0, 0, 0)", id="memory of a process"),
        pytest.param("libc.personality(0x0040000)", id="another personality"),
        pytest.param("libc.ioctl(0, 0x5412, b'x')", id="input for a terminal"),
        pytest.param("libc.ioctl(0, 0x5423, bytes(4))", id="a line discipline"),
        pytest.param("libc.setsockopt(s, 1, 26, bytes(16), 16)", id="a filter of a socket"),
        pytest.param("libc.setsockopt(s, 1, 7, bytes(4), 4)", id="a larger buffer of a socket"),
        pytest.param("libc.prctl(22, 2, bytes(16), 0, 0)", id="a filter of calls"),
        pytest.param("libc.prctl(4, 1, 0, 0, 0)", id="being traceable"),
        pytest.param("libc.sendmsg(s, bytes(56), 0)", id="messages with descriptors"),
        pytest.param("libc.sendmmsg(s, bytes(64), 1, 0)", id="many of them"),
        pytest.param("libc.syscall(444, 0, 0, 1)", id="rules of Landlock"),
        pytest.param("libc.syscall(188, b'program.py', b'user.x', b'x', 1, 0)", id="extended attributes"),
        pytest.param("libc.syscall(435, bytes(88), 88)", id="processes by clone3"),
        pytest.param("libc.syscall(0x40000000 + 39)", id="calls of x32"),
    ]
    + [
        pytest.param(f"libc.socket({family}, {kind}, 0)", id=f"sockets of family {family}, kind {kind}")
        for family in (2, 10, 15, 16, 17, 29, 30, 31, 38, 40, 44)
        for kind in (1, 3, 5)
    ]
    + [
        pytest.param(f"libc.socketpair({family}, 5, 0, bytes(8))", id=f"a pair of family {family}")
        for family in (2, 30)
    ],
)
def test_the_kernel_gives_no_such_thing(expression: str, box: Sandbox) -> None:
    if platform.machine() != "x86_64" and "syscall(" in expression:
        pytest.skip("the number is that of x86_64")
    setup = "p, f, s = os.pipe(), os.open('program.py', os.O_RDWR), socket.socketpair()[0].detach()\n"
    expected = (str(errno.EPERM), str(errno.ENOSYS), str(errno.EOPNOTSUPP))
    assert printed(f"{setup}print({expression}, ctypes.get_errno())", box).split() in [
        ["-1", each] for each in expected
    ]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="code of x86_64")
def test_a_32_bit_call_does_nothing(box: Sandbox) -> None:
    program = r"""
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20 (getpid); int 0x80; ret
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))())
"""
    result = box.run(HEAD + program, ROOMY)
    assert result.stdout == "-1\n" or result.detail == "signal SIGSEGV"  # where the kernel has no 32-bit calls


def test_no_descriptor_can_be_sent_by_any_process(box: Sandbox) -> None:
    program = """
send = '''
import array, socket
a, b = socket.socketpair()
a.sendmsg([b"x"], [(socket.SOL_SOCKET, getattr(socket, "SCM_RIGHTS", 1), array.array("i", [0]))])
'''
for command in (f"exec({send!r})", send):
    print(subprocess.run([sys.executable, "-c", command], capture_output=True, text=True).stderr.split()[-5:])
try:
    exec(send)
except PermissionError as error:
    print(error)
"""
    lines = printed(program, box).splitlines()
    assert len(lines) == 3
    assert all("not" in line for line in lines)


def test_what_waits_in_local_sockets_is_bounded(box: Sandbox) -> None:
    program = """
server = socket.socket(socket.AF_UNIX)
server.bind("socket")
server.listen(4096)
for count in range(1000):
    client = socket.socket(socket.AF_UNIX)
    client.setblocking(False)
    try:
        client.connect("socket")
    except BlockingIOError:
        break
    client.close()
print(count)
"""
    assert int(printed(program, box)) <= 17


def test_terminals_and_signals_are_few(box: Sandbox) -> None:
    program = """
opened = []
while len(opened) < 60:
    try:
        opened.append(os.open("/dev/ptmx", os.O_RDWR))
    except OSError:
        break
print(len(opened))
signal.pthread_sigmask(signal.SIG_BLOCK, [40])
for queued in range(1000):
    if libc.sigqueue(os.getpid(), 40, None):
        break
print(queued)
"""
    terminals, signals = map(int, printed(program, box).split())
    assert terminals <= 16
    assert signals <= 64


def test_memory_in_pipes_ends_with_the_descriptors(box: Sandbox) -> None:
    program = """
held = 0
pipes = []
try:
    while len(pipes) < 1000:
        pipes.append(os.pipe())
        os.set_blocking(pipes[-1][1], False)
        held += os.write(pipes[-1][1], bytes(1 << 20))
except OSError:
    print(held)
"""
    assert int(printed(program, box)) <= 32 * 65536


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give workers users of their own")
def test_every_worker_has_a_user_of_its_own() -> None:
    with Sandbox(2) as two:
        programs = ["import os, time\ntime.sleep(0.5)\nprint(os.getuid())"] * 2
        assert {result.stdout for result in two.run_many(programs, ROOMY)} == {"65534\n"}
        users = [os.stat(f"/proc/{worker.process.pid}").st_uid for worker in two._idle]
    mapped = Path("/proc/self/uid_map").read_text().split()
    if int(mapped[2]) > 0x7FFFFFFF:
        assert len({*users}) == len(users) == 2
        assert all(0x70000000 <= user <= 0x7FFFFFFF for user in users)


# What honest programs need


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(
            """
async def answer(reader, writer):
    data = await reader.readexactly(1_000_000)
    writer.writelines([data, b"x"])
    await writer.drain()
    writer.close()
async def main():
    server = await asyncio.start_unix_server(answer, "socket")
    reader, writer = await asyncio.open_unix_connection("socket")
    writer.write(bytes(1_000_000))
    assert len(await reader.read()) == 1_000_001
    child = await asyncio.create_subprocess_exec("echo", "hi", stdout=asyncio.subprocess.PIPE)
    assert (await child.communicate())[0] == b"hi\\n"
    assert await asyncio.to_thread(lambda: 5) == 5
asyncio.run(main())
""",
            id="asyncio",
        ),
        pytest.param(
            """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.shared_memory import SharedMemory
def square(x):
    return x * x
if __name__ == "__main__":
    for method in multiprocessing.get_all_start_methods():
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.map(square, range(4)) == [0, 1, 4, 9]
    with multiprocessing.Manager() as manager:
        names = manager.dict(a=1)
        names["b"] = 2
        assert len(names) == 2
    queue = multiprocessing.Queue()
    multiprocessing.Process(target=queue.put, args=(3,)).start()
    assert queue.get() == 3
    with ProcessPoolExecutor(2) as pool:
        assert [*pool.map(square, range(3))] == [0, 1, 4]
    memory = SharedMemory(create=True, size=100)
    memory.close()
    memory.unlink()
""",
            id="multiprocessing",
        ),
        pytest.param(
            """
import pty, shutil, sqlite3, tempfile, termios, threading
base = sqlite3.connect("base.db")
base.execute("pragma journal_mode=wal")
base.execute("create table names (name)")
base.commit()
with tempfile.TemporaryDirectory() as folder:
    shutil.copy2("base.db", folder)
    shutil.copytree(folder, "copy")
    shutil.make_archive("copy", "gztar", folder)
    os.mkfifo(f"{folder}/fifo")
with open("lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    fcntl.lockf(lock, fcntl.LOCK_EX)
    os.posix_fallocate(lock.fileno(), 0, 9)
outer, inner = pty.openpty()
assert os.isatty(inner) and termios.tcgetattr(inner)
heard = []
signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.01)
thread = threading.Thread(target=heard.append, args=(2,))
thread.start()
thread.join()
while len(heard) < 2:
    time.sleep(0.01)
one, other = socket.socketpair()
assert one.sendmsg([b"a", b"b"]) == 2 and other.recv(9) == b"ab"
resource.setrlimit(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS))
assert mmap.mmap(-1, 4096).madvise(mmap.MADV_NORMAL) is None
""",
            id="files, locks, terminals, timers, sockets",
        ),
        pytest.param(
            """
script = "seq 3 | sort -r | head -1; cp program.py copy; tar cf t.tar copy; gzip t.tar; timeout 9 nice true"
script += "; cp -p copy other; cp -a copy third; sed -i s/a/b/ copy; install -m 600 copy fourth"
ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
assert ended.stdout == "3\\n" and ended.returncode == 0 and "not permitted" not in ended.stderr, ended
""",
            id="commands of a shell",
        ),
    ],
)
def test_honest_programs_have_what_they_need(program: str, box: Sandbox) -> None:
    assert printed(program, box) == ""


# Failures of the machine are no verdicts


def test_a_lack_of_descriptors_is_waited_for() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Sandbox(1) as one:
        opened = len(os.listdir("/proc/self/fd"))
        later = threading.Timer(1.5, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 2, hard))
        later.start()
        try:
            assert grade("def f(x):\n    return x\n", ["assert f(2) == 2"], sandbox=one).passed
        finally:
            later.join()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_lack_that_lasts_is_an_error_which_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_PAUSES", (0.0, 0.0, 0.0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Sandbox(1) as one:
        opened = len(os.listdir("/proc/self/fd"))
        for spare in range(8):
            resource.setrlimit(resource.RLIMIT_NOFILE, (opened + spare, hard))
            try:
                with pytest.raises(SandboxError, match="cannot start"):
                    one.run("pass")
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert len(os.listdir("/proc/self/fd")) == opened
        assert one.run("print(1)").stdout == "1\n"


def test_a_program_runs_again_if_the_machine_ran_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([0, 1, 1, 2, 2, 2])
    runs = []
    original = Sandbox._run_in_any

    def counted(self: Sandbox, program: bytes, limits: Limits, stdin: bytes) -> ExecutionResult:
        runs.append(program)
        result = original(self, program, limits, stdin)
        return result if len(runs) == 3 else replace(result, status="killed", detail="signal SIGKILL")

    monkeypatch.setattr(Sandbox, "_run_in_any", counted)
    monkeypatch.setattr(sandbox, "_out_of_memory_kills", lambda: next(counts))
    with Sandbox(1) as one:
        assert one.run("print(1)").status == "ok"
    assert len(runs) == 3
