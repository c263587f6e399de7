"""Calls in a process of their own, with limits of time and memory."""

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Ending:
    """
    How a call ended.

    Args:
        code: its exit code; negative for a signal, None if it took too long.
        said: what it printed.
        seconds: of processor time.
    """

    code: int | None
    said: str
    seconds: float


def call_limited(
    main: Callable[[list[str]], int],
    arguments: Sequence[str],
    seconds: int = 60,
    max_bytes: int = 2 * 2**30,
    file_bytes: int | None = None,
    interrupt_after: str | None = None,
) -> Ending:
    """
    Calls a script's main function in a fork, which has all modules already.

    Args:
        seconds: of processor time that it may take; of a clock on the wall ten times as many.
        max_bytes: memory that it may add.
        file_bytes: size of the largest file that it can write, as on a disk that is full.
        interrupt_after: sends Ctrl-C as soon as this file exists.
    """
    with tempfile.TemporaryFile() as output:
        before = psutil.Process().memory_info().vms
        child = os.fork()
        if child == 0:
            os._exit(_call(main, arguments, output.fileno(), before + max_bytes, seconds, file_bytes))
        deadline, code, interrupted = time.monotonic() + 10 * seconds, None, False
        while code is None and time.monotonic() < deadline:
            ended, status, usage = os.wait4(child, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
            elif interrupt_after is not None and not interrupted and os.path.exists(interrupt_after):
                os.killpg(child, signal.SIGINT)
                interrupted = True
            else:
                time.sleep(0.01)
        if code is None:
            with suppress(ProcessLookupError):  # it has no group of its own yet
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            usage = os.wait4(child, 0)[2]
        output.seek(0)
        said = output.read().decode(errors="replace")
    spent = usage.ru_utime + usage.ru_stime
    if code == -signal.SIGXCPU:
        code = None
    return Ending(code, said, spent)


def _call(main, arguments, output: int, address_space: int, seconds: int, file_bytes: int | None) -> int:
    """In the fork. Returns the exit code."""
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, errors="backslashreplace", closefd=False)
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
        used = resource.getrusage(resource.RUSAGE_SELF)
        processor = int(used.ru_utime + used.ru_stime) + 1 + seconds  # a fork begins at zero, but let it be sure
        resource.setrlimit(resource.RLIMIT_CPU, (processor, processor + 5))
        if file_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        code = main(list(arguments))
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    return code if isinstance(code, int) else 0 if code is None else 1
