"""The system calls that a generated program may make: a seccomp filter, for x86_64 and aarch64.

The filter allows what Python programs need and denies the rest. Most of the rest can reach into the kernel or into
other processes, or takes something that the kernel counts per user or machine, so that one program could take it all.
`forkserver` loads the filter, after the last step that needs another call.
"""

import errno
import socket
import struct
from collections.abc import Iterable

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # the kernel's name of each architecture (AUDIT_ARCH_*)

# Numbers on x86_64 and aarch64. None: aarch64 has only the newer call of the same purpose.
ALLOWED: dict[str, tuple[int, int | None]] = {
    # files
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "creat": (85, None), "openat": (257, 56),
    "openat2": (437, 437), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79),
    "statx": (332, 291), "lseek": (8, 62), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65),
    "writev": (20, 66), "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286), "pwritev2": (328, 287),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "pipe": (22, None), "pipe2": (293, 59),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "close_range": (436, 436),
    "copy_file_range": (326, 285), "fallocate": (285, 47), "fadvise64": (221, 223), "fsync": (74, 82),
    "fdatasync": (75, 83), "truncate": (76, 45), "ftruncate": (77, 46), "flock": (73, 32), "getdents": (78, None),
    "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "link": (86, None), "linkat": (265, 37), "unlink": (87, None), "unlinkat": (263, 35), "symlink": (88, None),
    "symlinkat": (266, 36), "readlink": (89, None), "readlinkat": (267, 78), "mknod": (133, None),
    "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "umask": (95, 166),
    "utime": (132, None), "utimes": (235, None), "utimensat": (280, 88), "futimesat": (261, None),
    "statfs": (137, 43), "fstatfs": (138, 44), "getxattr": (191, 8), "lgetxattr": (192, 9), "fgetxattr": (193, 10),
    "listxattr": (194, 11), "llistxattr": (195, 12), "flistxattr": (196, 13),
    # waiting; no epoll, whose watches are counted per user: Python falls back to poll
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "pause": (34, None),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "eventfd": (284, None), "eventfd2": (290, 19),
    "futex": (202, 98), "get_robust_list": (274, 100), "set_robust_list": (273, 99), "restart_syscall": (219, 128),
    # memory; no memfd, SysV IPC or message queues, which no limit of ours counts, and no locked pages
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216), "msync": (26, 227),
    "madvise": (28, 233),
    # local sockets; no sendmsg, which can leave descriptors in flight: these are counted per user
    "connect": (42, 203), "accept": (43, 202), "accept4": (288, 242), "bind": (49, 200), "listen": (50, 201),
    "sendto": (44, 206), "recvfrom": (45, 207), "recvmsg": (47, 212), "recvmmsg": (299, 243), "shutdown": (48, 210),
    "getsockname": (51, 204), "getpeername": (52, 205), "getsockopt": (55, 209),
    # processes; no setsid, since a new session would have a priority of its own
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "exit": (60, 93),
    "exit_group": (231, 94), "wait4": (61, 260), "waitid": (247, 95), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getpgrp": (111, None),
    "getpgid": (121, 155), "setpgid": (109, 154), "getsid": (124, 156), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158), "getresuid": (118, 148),
    "getresgid": (120, 150), "set_tid_address": (218, 96), "arch_prctl": (158, None), "rseq": (334, 293),
    "getpriority": (140, 141), "setpriority": (141, 140), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "sched_getscheduler": (145, 120), "sched_getparam": (143, 121), "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126), "getcpu": (309, 168), "getrlimit": (97, 163), "setrlimit": (160, 164),
    "getrusage": (98, 165), "times": (100, 153),
    # signals and timers
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "sigaltstack": (131, 132), "alarm": (37, None), "getitimer": (36, 102),
    "setitimer": (38, 103),
    # the system
    "uname": (63, 160), "sysinfo": (99, 179), "time": (201, None), "gettimeofday": (96, 169),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "getrandom": (318, 278), "capget": (125, 90),
}  # fmt: skip

# Calls that are allowed with some arguments: their numbers, the index of the argument, and its values.
ALLOWED_WITH: dict[str, tuple[tuple[int, int], int, set[int]]] = {
    "socket": ((41, 198), 0, {socket.AF_UNIX}),
    "socketpair": ((53, 199), 0, {socket.AF_UNIX}),
    # SO_REUSEADDR, BROADCAST, RCVBUF, KEEPALIVE, LINGER, REUSEPORT, PASSCRED, RCVTIMEO, SNDTIMEO; no filter, no SNDBUF
    "setsockopt": ((54, 208), 2, {2, 6, 8, 9, 13, 15, 16, 20, 21}),
    # F_DUPFD to F_GETOWN, F_OFD_GETLK to F_OFD_SETLKW, F_DUPFD_CLOEXEC, F_GETPIPE_SZ; no F_SETPIPE_SZ, no F_SETLEASE
    "fcntl": ((72, 25), 1, {*range(10), 36, 37, 38, 1030, 1032}),
    # terminals, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX; no TIOCSTI
    "ioctl": ((16, 29), 1, {
        *range(0x5401, 0x5405), 0x5409, 0x540A, 0x540B, *range(0x540E, 0x5412), 0x5413, 0x5414, 0x541B, 0x5421, 0x5429,
        0x5441, 0x5450, 0x5451, 0x80045430, 0x40045431, 0x802C542A, 0x402C542B, 0x402C542C, 0x402C542D,
    }),
    # PR_SET_PDEATHSIG, PR_GET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_CAPBSET_READ,
    # PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS, PR_SET_VMA
    "prctl": ((157, 167), 0, {1, 2, 3, 15, 16, 23, 38, 39, 0x53564D41}),
    "prlimit64": ((302, 261), 0, {0}),  # of the process itself
}  # fmt: skip

# Calls that are allowed without some flags: their numbers, the index of the argument, and the flags.
ALLOWED_WITHOUT: dict[str, tuple[tuple[int, int], int, int]] = {
    "clone": ((56, 220), 0, 0x7E020000),  # new namespaces
    "mmap": ((9, 222), 3, 0x40000),  # MAP_HUGETLB: the pages of a pool of the machine
}

# Calls that seem not to be there, as those that are newer than this table: callers then use older ones.
# The flags of clone3 are in memory, where a filter cannot read them. The timers of timer_create are counted per user.
ABSENT: dict[str, tuple[int, int]] = {"clone3": (435, 435), "timer_create": (222, 107)}

# Calls that seem to meet a file system without extended attributes. Commands that keep permissions then do without.
UNSUPPORTED: dict[str, tuple[int, int]] = {
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip


def system_call_filter(machine: str) -> bytes:
    """The filter of a machine of MACHINES, as a program in BPF.

    A denied call fails with EPERM, one that seems not to be there with ENOSYS, an unsupported one with EOPNOTSUPP.
    """
    load, equal, above, any_bit, give = 0x20, 0x15, 0x25, 0x45, 0x06  # opcodes: ld, jeq, jgt, jset, ret
    number, architecture, arguments = 0, 4, 16  # offsets in struct seccomp_data
    column = [*MACHINES].index(machine)

    def step(opcode: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("<HBBI", opcode, if_true, if_false, operand)

    def on_call(call: int | None, then: Iterable[bytes]) -> list[bytes]:
        then = [*then]
        return [] if call is None else [step(equal, call, 0, len(then)), *then]

    allow = step(give, 0x7FFF0000)
    deny = step(give, 0x00050000 | errno.EPERM)
    absent = step(give, 0x00050000 | errno.ENOSYS)
    unsupported = step(give, 0x00050000 | errno.EOPNOTSUPP)
    # no calls of another architecture, such as 32-bit ones
    program = [step(load, architecture), step(equal, MACHINES[machine], 1, 0), deny, step(load, number)]
    newest = max(numbers[0] for numbers in ALLOWED.values())
    program += [step(above, newest, 0, 1), absent]  # x32 calls too: their numbers begin at 0x40000000
    for table, verdict in ((ALLOWED, allow), (ABSENT, absent), (UNSUPPORTED, unsupported)):
        for numbers in table.values():
            program += on_call(numbers[column], [verdict])
    # The kernel reads 32 bits of each of these arguments.
    for numbers, index, values in ALLOWED_WITH.values():
        then = [step(load, arguments + 8 * index)]
        for value in sorted(values):
            then += [step(equal, value, 0, 1), allow]
        program += on_call(numbers[column], [*then, deny])
    for numbers, index, flags in ALLOWED_WITHOUT.values():
        then = [step(load, arguments + 8 * index), step(any_bit, flags, 0, 1), deny, allow]
        program += on_call(numbers[column], then)
    return b"".join([*program, deny])
