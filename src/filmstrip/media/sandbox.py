"""Taking rights away from the process that runs this: memory, files, network, other programs; knows no media.

Decoders are large C libraries fed by strangers. :func:`enter` leaves a process what decoding needs, memory up to a limit,
threads and the descriptors it holds, and nothing else: no file can be opened, no connection made, no program started, no
other process touched. On Linux a system call filter (seccomp, ``Documentation/userspace-api/seccomp_filter.rst``) holds
this from inside the kernel, without needing any privilege itself; elsewhere only the resource limits apply.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2

# The classic BPF instructions that the filter needs (linux/bpf_common.h) and what a filter returns (linux/seccomp.h).
_LOAD_WORD = 0x20
_JUMP_EQUAL = 0x15
_JUMP_AT_LEAST = 0x35
_JUMP_ANY_BIT = 0x45
_RETURN = 0x06
_KILL_PROCESS = 0x80000000
_FAIL_WITH = 0x00050000
_ALLOW = 0x7FFF0000
# Offsets in struct seccomp_data: the call's number, the machine, the low half of the first argument.
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16
_CLONE_THREAD = 0x00010000
_X32_CALLS = 0x40000000

_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Numbers of system calls (arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of Linux 6.12).
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_REFUSED = {
    "x86_64": """
        open 2 creat 85 openat 257 open_by_handle_at 304 name_to_handle_at 303 truncate 76 chdir 80 rename 82
        mkdir 83 rmdir 84 link 86 unlink 87 symlink 88 chmod 90 chown 92 lchown 94 mknod 133 utime 132 utimes 235
        utimensat 280 mkdirat 258 mknodat 259 fchownat 260 futimesat 261 unlinkat 263 renameat 264 linkat 265
        symlinkat 266 fchmodat 268 renameat2 316 setxattr 188 lsetxattr 189 socket 41 connect 42 accept 43 bind 49
        listen 50 socketpair 53 accept4 288 fork 57 vfork 58 execve 59 execveat 322 kill 62 tkill 200
        rt_sigqueueinfo 129 ptrace 101 process_vm_readv 310 process_vm_writev 311 kcmp 312 migrate_pages 256
        setuid 105 setgid 106 setreuid 113 setregid 114 setgroups 116 setresuid 117 setresgid 119 capset 126
        personality 135 unshare 272 setns 308 prlimit64 302 pivot_root 155 chroot 161 mount 165 umount2 166
        swapon 167 swapoff 168 acct 163 reboot 169 sethostname 170 setdomainname 171 settimeofday 164
        clock_settime 227 init_module 175 delete_module 176 finit_module 313 kexec_load 246 kexec_file_load 320
        shmget 29 semget 64 msgget 68 mq_open 240 inotify_init 253 inotify_init1 294 add_key 248 request_key 249
        keyctl 250 perf_event_open 298 bpf 321 userfaultfd 323 fanotify_init 300 quotactl 179 syslog 103 ioperm 173
        iopl 172 memfd_secret 447 setrlimit 160 setpriority 141 sched_setscheduler 144 io_setup 206
    """,
    "aarch64": """
        openat 56 open_by_handle_at 265 name_to_handle_at 264 truncate 45 chdir 49 mkdirat 34 mknodat 33 fchownat 54
        unlinkat 35 renameat 38 linkat 37 symlinkat 36 fchmodat 53 renameat2 276 utimensat 88 setxattr 5 lsetxattr 6
        socket 198 socketpair 199 bind 200 listen 201 accept 202 connect 203 accept4 242 execve 221 execveat 281
        kill 129 tkill 130 rt_sigqueueinfo 138 ptrace 117 process_vm_readv 270 process_vm_writev 271 kcmp 272
        migrate_pages 238 setuid 146 setgid 144 setreuid 145 setregid 143 setgroups 159 setresuid 147 setresgid 149
        capset 91 personality 92 unshare 97 setns 268 prlimit64 261 pivot_root 41 chroot 51 mount 40 umount2 39
        swapon 224 swapoff 225 acct 89 reboot 142 sethostname 161 setdomainname 162 settimeofday 170
        clock_settime 112 init_module 105 delete_module 106 finit_module 273 kexec_load 104 kexec_file_load 294
        shmget 194 semget 190 msgget 186 mq_open 180 inotify_init1 26 add_key 217 request_key 218 keyctl 219
        perf_event_open 241 bpf 280 userfaultfd 282 fanotify_init 262 quotactl 60 syslog 116 memfd_secret 447
        setrlimit 164 setpriority 140 sched_setscheduler 119 io_setup 0
    """,
}
"""Names and numbers of calls that reach beyond the process, by machine."""
_REFUSED_EVERYWHERE = """
    pidfd_send_signal 424 io_uring_setup 425 io_uring_enter 426 io_uring_register 427 open_tree 428 move_mount 429
    fsopen 430 fsconfig 431 fsmount 432 fspick 433 pidfd_open 434 openat2 437 pidfd_getfd 438 process_madvise 440
    mount_setattr 442 quotactl_fd 443 process_mrelease 448
"""
"""From 424 on, numbers are the same on all machines."""


def is_supported() -> bool:
    """Whether this system can filter system calls."""
    return sys.platform == "linux" and platform.machine() in _MACHINES and sys.maxsize > 2**32


def enter(*, max_memory_bytes: int, niceness: int, parent: int) -> None:
    """Give up rights for good, and die with the process ``parent``.

    ``max_memory_bytes`` bounds what is allocated from now on (RLIMIT_DATA: private memory; shared mappings, such as results,
    are not counted). Descriptors that are open stay open. Raises OSError where the kernel refuses.
    """
    os.nice(niceness)
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":
        # If memory runs out all the same, the kernel ends this process and not the server or the engine.
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it went before the line above
            os.kill(os.getpid(), signal.SIGKILL)
        _prctl(_PR_SET_DUMPABLE, 0)
        _limit(resource.RLIMIT_DATA, _private_bytes() + max_memory_bytes)
    else:
        _limit(resource.RLIMIT_DATA, max_memory_bytes)
    if is_supported():
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _filter_system_calls(platform.machine())


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def _private_bytes() -> int:
    """What counts against RLIMIT_DATA already."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024


def _prctl(option: int, argument: int, pointer: object = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(ctypes.c_int(option), ctypes.c_ulong(argument), pointer, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _filter_system_calls(machine: str) -> None:
    program = _program(machine)
    instructions = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))

    description = Program(len(program) // 8, ctypes.cast(instructions, ctypes.c_void_p))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(description))


def _program(machine: str) -> bytes:
    """The filter: calls that reach beyond the process fail, all others pass.

    A list of what is refused, not of what is allowed: C libraries differ in what they call for the same thing, and a
    decoder that dies of a harmless call on somebody's system helps nobody. ``clone`` may make threads but no processes;
    ``clone3``, whose flags a filter cannot see, is "not implemented", upon which the C library takes ``clone``.
    """
    refused = sorted({int(word) for word in (_REFUSED[machine] + _REFUSED_EVERYWHERE).split() if word.isdecimal()})
    body = [
        *((_JUMP_EQUAL, number, "refuse", "next") for number in refused),
        (_JUMP_EQUAL, _CLONE3, "not implemented", "next"),
        (_JUMP_EQUAL, _CLONE[machine], "next", "allow"),
        (_LOAD_WORD, _FIRST_ARGUMENT, "next", "next"),
        (_JUMP_ANY_BIT, _CLONE_THREAD, "allow", "refuse"),
    ]
    head = [
        (_LOAD_WORD, _MACHINE, "next", "next"),
        (_JUMP_EQUAL, _MACHINES[machine], "next", "kill"),
        (_LOAD_WORD, _NUMBER, "next", "next"),
        (_JUMP_AT_LEAST, _X32_CALLS, "refuse", "next"),
    ]
    results = {
        "allow": _ALLOW,
        "refuse": _FAIL_WITH | errno.EACCES,
        "not implemented": _FAIL_WITH | errno.ENOSYS,
        "kill": _KILL_PROCESS,
    }
    lines = [*head, *body]
    targets = {name: len(lines) + place for place, name in enumerate(results)}
    packed = b""
    for place, (code, operand, if_true, if_false) in enumerate(lines):
        jumps = [0 if name == "next" else targets[name] - place - 1 for name in (if_true, if_false)]
        packed += struct.pack("<HBBI", code, *jumps, operand)
    return packed + b"".join(struct.pack("<HBBI", _RETURN, 0, 0, value) for value in results.values())
