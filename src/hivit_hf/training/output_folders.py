# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""
Output folders of runs: made, locked against a second run, and left without a trace if nothing was written.

The lock is one of the operating system (`fcntl.lockf`). It ends with the process that holds it, however that ends, and
its data loading workers do not inherit it. Windows has none of the kind: there, folders are not locked.
"""

import errno
import os
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from platform import node

from transformers.utils import logging


try:
    import fcntl
except ImportError:
    fcntl = None

logger = logging.get_logger(__name__)
LOCK = "_run.lock"  # `Trainer` does not upload what begins with an underscore
ARGUMENTS = "arguments.json"  # what a resumption must share with a run of `Trainer`
PATIENCE_S = 5.0  # a killed run needs a moment to end


@dataclass
class _Held:
    descriptor: int | None
    made: list[Path]  # folders that were not there before, the innermost first


_held: dict[Path, _Held] = {}  # of this process


def enter_folder(output: Path):
    """
    Makes an output folder and locks it for this process, until `leave_folders` or its end.

    Raises:
        ValueError: if it cannot be made or written, or another run has it.
    """
    folder = output.resolve()
    if folder in _held:
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        _held[folder] = _Held(_lock(folder / LOCK), made)
    except OSError as error:
        raise ValueError(f"{output} cannot be written ({error.strerror}). Choose another --output_dir.") from error
    except BlockedError as error:
        raise ValueError(
            f"{output} is in use by another run{error}: wait for its end, or give another --output_dir."
        ) from error


class BlockedError(Exception):
    """Another process has a lock: where it runs."""


def _lock(path: Path) -> int | None:
    """The descriptor of a locked file, or None where the file system has no locks."""
    deadline = time.monotonic() + PATIENCE_S
    while fcntl is not None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logger.warning(f"{path} cannot be locked ({error.strerror}): do not begin a second run there.")
                return None
            if time.monotonic() > deadline:
                raise BlockedError(f" ({holder})" if holder else "") from error
            time.sleep(0.2)
            continue
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {node()}\n".encode())
            return descriptor
        os.close(descriptor)  # its holder has removed it at its end
    return None


def leave_folders():
    """Unlocks the folders of this process, and removes those that it made and wrote nothing to."""
    for folder, held in list(_held.items()):
        with suppress(OSError):
            (folder / LOCK).unlink()
        if held.descriptor is not None:
            os.close(held.descriptor)
        del _held[folder]
        if folder in held.made and folder.is_dir() and os.listdir(folder) == [ARGUMENTS]:  # not a step was taken
            (folder / ARGUMENTS).unlink()
        with suppress(OSError):  # something is in it
            for path in held.made:
                path.rmdir()


def refuse_foreign(output: Path, patterns: Iterable[str]):
    """ValueError if an output folder holds a file that a run would overwrite, by patterns relative to it."""
    for pattern in patterns:
        for path in sorted(output.glob(pattern)):
            raise ValueError(
                f"{output} holds {path.relative_to(output)} of a model or another run, which is not overwritten: give "
                "another --output_dir."
            )


def refuse_existing_file(path: Path, flag: str):
    """ValueError if a file cannot be written, or is there already; checked before time is spent."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file to {flag}.")
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists, and is not overwritten: give another {flag}, or remove it.")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: {parent} is no folder, or is read-only. Give another {flag}.")


def end_with_launcher():
    """A rank of torchrun ends as soon as torchrun is gone: killed alone, it leaves its ranks behind."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_without, args=(os.getppid(),), daemon=True).start()


def _end_without(parent: int):
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
