# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""
Manifests of checkpoints: size and checksum of every file, and of the manifest itself, checked before loading.

Checksums find damage, not attackers, who can write a manifest of their own. Therefore each file that a run reads back
is also tried before: tensors, containers and numbers, and nothing that would have to be called to be made.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import xxhash
from accelerate.utils import load
from safetensors import safe_open

from .sharded_files import check_sharded


MANIFEST = "manifest.json"
AVERAGE = "average.safetensors"  # beside the weights of a checkpoint, if a moving average of them is kept
NEVER_READ = "training_args.bin"  # `Trainer` writes it for people
REMEDY = " Resume from another checkpoint."
TENSORS = {".bin", ".pt", ".pth", ".pkl"}


class DamagedCheckpointError(ValueError):
    """A checkpoint that is not as it was saved: which file, and what is wrong with it."""

    def __init__(self, checkpoint: Path, what: str):
        super().__init__(f"{checkpoint} is damaged: {what}.{REMEDY}")
        self.checkpoint, self.what = checkpoint, what


@dataclass(frozen=True)
class WholeCheckpoint:
    """
    A checkpoint all of whose files are as they were saved.

    Args:
        path: its folder.
        manifest: what is written about it.
        damaged: sentences about newer ones, which are not.
    """

    path: Path
    manifest: dict
    damaged: tuple[str, ...] = ()


def write_manifest(checkpoint: Path, facts: Mapping):
    """Writes `facts` and the sizes and checksums of all files of a checkpoint, after everything else is written."""
    names = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    files = {name: _fingerprint(checkpoint / name) for name in names if name != MANIFEST}
    manifest = {**facts, "files": files}
    manifest["checksum"] = _checksum(manifest)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _fingerprint(path: Path) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    return {"bytes": path.stat().st_size, "xxh3_128": digest}


def _checksum(manifest: Mapping) -> str:
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())


def read_manifest(checkpoint: Path) -> dict:
    """
    The manifest of a checkpoint; its files are not looked at.

    Raises:
        ValueError: if the folder is no checkpoint, or the manifest is not as it was written.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    except OSError as error:
        raise ValueError(f"{checkpoint} is no checkpoint: {MANIFEST} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(checkpoint, f"{MANIFEST} is no JSON") from error
    if not isinstance(manifest, dict) or manifest.get("checksum") != _checksum(manifest):
        raise DamagedCheckpointError(checkpoint, f"{MANIFEST} is not what was saved (its checksum differs)")
    step, files = manifest.get("step"), manifest.get("files")
    if type(step) is not int or step < 0 or not isinstance(files, dict):
        raise DamagedCheckpointError(checkpoint, f"{MANIFEST} has the step {step!r}, or no list of files")
    return manifest


def check_checkpoint(checkpoint: Path) -> dict:
    """
    The manifest of a checkpoint, after all of its files were checked.

    Raises:
        ValueError: if the folder is no checkpoint; a `DamagedCheckpointError` if a file is missing, has another content
            than was saved, or holds what is not loaded.
    """
    manifest = read_manifest(checkpoint)
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not path.is_file():
            raise DamagedCheckpointError(checkpoint, f"{name} is missing")
        try:
            found = _fingerprint(path)
        except OSError as error:
            raise DamagedCheckpointError(checkpoint, f"{name} cannot be read ({error.strerror})") from error
        if found != expected:
            now, was = (entry.get("bytes") if isinstance(entry, dict) else None for entry in (found, expected))
            why = "its checksum differs" if now == was else f"{now} bytes, saved were {was}"
            raise DamagedCheckpointError(checkpoint, f"{name} is not what was saved ({why})")
    for name in manifest["files"]:
        try:
            _try_to_read(checkpoint / name)
        except Exception as error:  # each reader has its own
            why = f"{type(error).__name__}: {error}".splitlines()[0][:150].rstrip(".")
            what = f"{name} does not hold just tensors, numbers and text ({why})"
            raise DamagedCheckpointError(checkpoint, what) from error
    return manifest


def _try_to_read(path: Path):
    """Raises an exception if a file cannot be read, or could only be read by calling what it names."""
    if path.name == NEVER_READ:
        return
    if path.suffix == ".safetensors":
        with safe_open(path, "pt"):
            pass
    elif path.suffix in TENSORS:
        load(str(path), map_location="cpu", weights_only=True, mmap=True)  # the tensors stay on the disk
    elif path.suffix == ".json":
        json.loads(path.read_bytes())
    elif path.name == ".metadata":
        check_sharded(path.parent)


def newest_whole(checkpoints: Sequence[Path]) -> WholeCheckpoint:
    """
    The first whole one of some checkpoints.

    Args:
        checkpoints: newest first, at least one.

    Raises:
        ValueError: if none is whole: what is wrong with the first.
    """
    problems = []
    for checkpoint in checkpoints:
        try:
            manifest = check_checkpoint(checkpoint)
        except ValueError as error:
            problems.append(error)
            continue
        damaged = tuple(str(problem).removesuffix(REMEDY) for problem in problems)
        return WholeCheckpoint(checkpoint, manifest, damaged)
    if len(problems) > 1:
        raise ValueError(f"{problems[0]} The {len(problems) - 1} before it are damaged, too.")
    raise problems[0]


@contextmanager
def loading(checkpoint: str | Path) -> Iterator[None]:
    """Inside, what a reader makes of unsuitable content is a ValueError that names the checkpoint."""
    try:
        yield
    except (ValueError, RuntimeError, OSError):
        raise  # a sentence already, or a lack of memory
    except Exception as error:
        what = f"it does not fit this run ({type(error).__name__}: {error})"
        raise DamagedCheckpointError(Path(checkpoint), what) from error
