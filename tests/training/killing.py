"""Processes that die: forked from one that has imported everything, killed at a step, a moment or a write to the disk.

Writes are seen with ptrace, from outside the process, so that those of Rust and C++ libraries count too. Linux only.
"""

import contextlib
import ctypes
import gc
import hashlib
import os
import shutil
import signal
import struct
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_sft import finetune
from lora_sft.training import trainer as training


def fork(action: Callable[[], object], log: Path | None = None) -> int:
    """Runs `action` in a copy of this process → its id. The copy exits with 0, or with 3 after an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads, and ours are asleep
        child = os.fork()
    if child:
        return child
    status = 3
    try:
        gc.freeze()  # what the parent made is not looked through again by every collection
        errors = os.open(os.devnull if log is None else log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        sys.stdout = sys.stderr = os.fdopen(errors, "w", buffering=1)  # pytest has put others in their place
        action()
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """Waits → exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_a_process(action: Callable[[], object], log: Path) -> int:
    """Runs `action` in a copy of this process, and waits for its end → as `ended`."""
    return ended(fork(action, log))


@contextlib.contextmanager
def watched(batches: Path, die_at: tuple[int, int] | None = None) -> Iterator[None]:
    """Notes the rows of every micro-batch in a file: `step hash`; and dies before micro-batch (step, number) is run."""
    kept = training.Trainer.training_step
    counts: dict[int, int] = {}

    def step(self, model, inputs, *args, **kwargs):
        now = self.state.global_step
        if (now, counts.get(now, 0)) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        counts[now] = counts.get(now, 0) + 1
        rows = inputs["input_ids"].numpy().tobytes()
        with batches.open("a") as file:
            file.write(f"{now} {hashlib.sha256(rows).hexdigest()}\n")
        return kept(self, model, inputs, *args, **kwargs)

    training.Trainer.training_step = step
    try:
        yield
    finally:
        training.Trainer.training_step = kept


def train(base: Path, rows: object, folder: Path, batches: Path, die_at: tuple[int, int] | None = None, **settings):
    """A run, or the part of it until it dies."""
    with watched(batches, die_at):
        finetune(base, rows, output_dir=folder, **settings)


# --- killed at the n-th write --------------------------------------------------------------------------

TRACE_ME, SYSCALL, SET_OPTIONS, GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
MARK_SYSCALLS, FOLLOW_THREADS, DIE_TOGETHER = 1, 8, 0x100000
ENTRY, WALL = 1, 0x40000000
X86, ARM = 0xC000003E, 0xC00000B7
OPENS = {X86: {2: 1, 257: 2}, ARM: {56: 2}}
"""System calls that open files, and which argument holds the flags."""
CHANGES = {
    X86: {1, 18, 20, 40, 74, 75, 76, 77, 82, 83, 84, 86, 87, 90, 91, 258, 260, 263, 264, 265, 266, 285, 296, 316, 326},
    ARM: {33, 34, 35, 36, 37, 38, 45, 46, 47, 52, 53, 64, 66, 68, 70, 71, 82, 83, 276, 285},
}
"""write, pwrite64, writev, sendfile, fsync, fdatasync, truncate, rename, mkdir, rmdir, link, unlink, chmod and their
relatives."""


def killed_at_write(action: Callable[[], object], number: int) -> bool:
    """Runs `action` in a copy of this process, and kills it before its `number`-th change of the file system.

    Returns:
        Whether there were so many; if not, `action` came to its end.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long

    def traced() -> None:
        if libc.ptrace(TRACE_ME, 0, None, None):
            raise OSError(ctypes.get_errno(), "ptrace is not allowed here")
        os.kill(os.getpid(), signal.SIGSTOP)
        action()

    child = fork(traced)
    _, status = os.waitpid(child, WALL)
    if not os.WIFSTOPPED(status):
        raise OSError("the process could not be traced")
    options = MARK_SYSCALLS | FOLLOW_THREADS | DIE_TOGETHER
    libc.ptrace(SET_OPTIONS, child, None, ctypes.c_void_p(options))
    libc.ptrace(SYSCALL, child, None, None)
    seen, killed, code = 0, False, None
    while True:
        try:
            thread, status = os.waitpid(-1, WALL)
        except ChildProcessError:
            break
        if not os.WIFSTOPPED(status):
            if thread == child:
                code = os.waitstatus_to_exitcode(status)
            continue
        deliver = os.WSTOPSIG(status)
        if deliver == signal.SIGTRAP | 0x80:
            deliver = 0
            seen += _changes_files(libc, thread)
            if seen == number and not killed:
                killed = True
                os.kill(child, signal.SIGKILL)
        elif deliver in (signal.SIGTRAP, signal.SIGSTOP):
            deliver = 0
        libc.ptrace(SYSCALL, thread, None, ctypes.c_void_p(deliver))
    if not killed and code != 0:
        raise RuntimeError(f"the process ended with {code}")
    return killed


def _changes_files(libc: ctypes.CDLL, thread: int) -> bool:
    """Whether a stopped thread is about to change files."""
    info = ctypes.create_string_buffer(88)
    libc.ptrace(GET_SYSCALL_INFO, thread, ctypes.c_void_p(len(info)), ctypes.cast(info, ctypes.c_void_p))
    operation, architecture = info.raw[0], struct.unpack_from("<I", info.raw, 4)[0]
    if operation != ENTRY:
        return False
    call, *arguments = struct.unpack_from("<7Q", info.raw, 24)
    if call in OPENS[architecture]:
        flags = arguments[OPENS[architecture][call]]
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    return call in CHANGES[architecture]


def kill_every_write_of_a_save(step: int, folder: Path, cases: Path) -> None:
    """To be called before training, in a process of its own: at the save of a step it dies at every write of it.

    A copy of the output folder as each death left it goes to `cases/N`. The process itself exits there.
    """
    kept = training.Trainer._save_checkpoint

    def save(self, model, trial):
        if self.state.global_step != step:
            return kept(self, model, trial)
        self.checkpoints.wait()
        before = cases.parent / "before"
        shutil.copytree(folder, before)

        def once() -> None:
            kept(self, model, trial)
            self.checkpoints.wait()

        number = 1
        while killed_at_write(once, number):
            folder.rename(cases / str(number))
            shutil.copytree(before, folder)
            number += 1
        os._exit(0)

    training.Trainer._save_checkpoint = save
