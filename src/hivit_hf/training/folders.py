# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""
Atomic folders: written beside their place, flushed to the disk, then renamed.

Whatever fails on the way, the folder is there whole, old or new, or not at all.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError


DELETED = ".deleted"  # end of the name of a folder that is being deleted


class FolderError(ValueError):
    """A folder that must not or cannot be written: why, and how to fix it."""


def refuse_output(out_dir: Path, overwrite: bool, keep: Iterable[Path], written: Iterable[str]):
    """
    FolderError if `out_dir` must not be written; checked before time is spent.

    Args:
        keep: what must not be deleted.
        written: patterns of the files that the caller writes, `model.safetensors` or `samples/*`, and of its folders,
            `samples/`; only those are ever replaced.
    """
    if out_dir.is_symlink() and not out_dir.exists():
        raise FolderError(f"{out_dir} is a link to nowhere. Choose another folder.")
    if not out_dir.exists():
        return
    if not overwrite:
        raise FolderError(f"{out_dir} exists. Choose another folder, or give --overwrite.")
    if not out_dir.is_dir():
        raise FolderError(f"{out_dir} is a file, not a folder. Choose another name.")
    target = out_dir.resolve()
    if Path.cwd().is_relative_to(target):
        raise FolderError(f"{out_dir} is where this command runs: choose another folder.")
    for path in keep:
        if path.resolve().is_relative_to(target):
            raise FolderError(f"{out_dir} holds {path}, which --overwrite would delete. Choose another folder.")
    foreign = [name for name in _names(out_dir) if not any(fnmatchcase(name, pattern) for pattern in written)]
    if foreign:
        shown = ", ".join(ascii(name.rstrip("/"))[1:-1] for name in foreign[:4])
        raise FolderError(
            f"{out_dir} holds {shown}, which this command did not write, so --overwrite does not delete it. Choose "
            "another folder."
        )


def _names(folder: Path) -> list[str]:
    """All that is in a folder, at any depth; folders end with a slash."""
    paths = sorted(folder.rglob("*"))
    return [path.relative_to(folder).as_posix() + "/" * path.is_dir() for path in paths]


@contextmanager
def written_whole(out_dir: Path, overwrite: bool, keep: Iterable[Path], written: Iterable[str]) -> Iterator[Path]:
    """A folder to write into that becomes `out_dir` if all goes well, and vanishes otherwise."""
    refuse_output(out_dir, overwrite, keep, written)
    out_dir = out_dir.resolve()
    made = [parent for parent in out_dir.parents if not parent.exists()]
    partial = None
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name[:40]}.", dir=out_dir.parent))
        yield partial
        partial.chmod(0o777 & ~_umask())
        flush_folder(partial)
        refuse_output(out_dir, overwrite, keep, written)  # it may have appeared meanwhile
        replace_folder(partial, out_dir)
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            raise FolderError(f"{out_dir} could not be written, and nothing of it was left: {error}.") from error
        raise


def replace_folder(partial: Path, final: Path, aside: Path | None = None):
    """
    Renames a flushed folder to `final`; a folder of that name is deleted, or comes back if renaming fails.

    Args:
        partial: the new folder, on the same file system.
        aside: where the old folder is between the two renames; a new name beside it if not given. What lies there is
            deleted.
    """
    old = None
    if final.exists():
        old = aside or Path(tempfile.mkdtemp(prefix=f".{final.name[:40]}.", dir=final.parent))
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    try:
        os.replace(partial, final)
    except OSError:
        if old is not None:
            os.replace(old, final)
        raise
    _flush_entry(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path):
    """Deletes a folder. It is renamed before, so that a kill on the way leaves `.NAME.deleted`, not half of it."""
    aside = folder.with_name(f".{folder.name}{DELETED}")
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):
        os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def replace_file(path: Path, text: str):
    """Writes a file beside its place, flushes it and renames it, so that readers see the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    _flush_entry(partial)
    os.replace(partial, path)
    _flush_entry(path.parent)


def flush_folder(folder: Path):
    """Flushes all files of a folder to the disk, not only to the system's cache."""
    for path in [*folder.rglob("*"), folder]:
        _flush_entry(path)


def _flush_entry(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
