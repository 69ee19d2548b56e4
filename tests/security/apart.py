"""A piece of work → what became of it in a process of its own: error, time, memory, and what it did outside."""

import gc
import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WATCHED = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.spawn",
    "subprocess.Popen",
    "os.startfile",
    "pty.spawn",
)


@dataclass
class Outcome:
    """What became of it.

    Attributes:
        value: what the work returned, of text, number and list; else None.
        error: the class of what it raised, and its words.
        seconds: of processor time, which other programs on the machine do not lengthen.
        grown_bytes: by which the process was larger at its largest than when the work began.
        ran: what it started outside this process, as Python's own audit tells.
    """

    value: Any = None
    error: tuple[str, str] | None = None
    seconds: float = 0.0
    grown_bytes: int = 0
    ran: list[str] = field(default_factory=list)


def apart(work: Callable[[], Any], limit_seconds: float = 60.0) -> Outcome:
    """Runs `work` in a fork of this process, in which everything is imported already."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # Counted is the work: not a measurement of coverage, which nobody reads here, nor the garbage of earlier tests.
        sys.settrace(None)
        gc.freeze()
        os.close(reader)
        signal.setitimer(signal.ITIMER_REAL, limit_seconds)  # its default action ends the process
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(_watched(work), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return (
        pickle.loads(told) if told else Outcome(error=("killed", f"took longer than {limit_seconds:g} s, or crashed"))
    )


def _watched(work: Callable[[], Any]) -> Outcome:
    outcome = Outcome()
    sys.addaudithook(lambda event, _: outcome.ran.append(event) if event in WATCHED else None)
    # More than this is more than any of the tests allows; without it a failing test could end the machine.
    held = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 if Path("/proc/self/statm").exists() else 0
    if held:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 3 * 2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    clock = time.process_time()
    try:
        value = work()
        outcome.value = value if isinstance(value, (str, int, list)) else None
    except BaseException as error:
        outcome.error = (type(error).__name__, str(error))
    outcome.seconds = time.process_time() - clock
    outcome.grown_bytes = max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held)
    return outcome
