"""Damaged and hostile checkpoints."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from hivit_hf.training.manifest import MANIFEST, write_manifest


# what a run writes for people, and for those who load the model without the package
NEVER_READ = {"training_args.bin", "configuration_hivit.py", "modeling_hivit.py"}


class Hostile:
    """A pickle of it creates a file when it is read without limits."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def files_of(checkpoint: Path) -> list[Path]:
    """All files of a checkpoint but its manifest."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)


def flip_a_bit(path: Path):
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def reseal(checkpoint: Path, **changes):
    """Writes the manifest anew, as somebody who wants to deceive would."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    write_manifest(checkpoint, {**manifest, **changes})


def damages(checkpoint: Path) -> Iterator[str]:
    """Damages a checkpoint in one way after the other, and repairs it; the name of the file each time."""
    for path in [*files_of(checkpoint), checkpoint / MANIFEST]:
        content = path.read_bytes()
        for damaged in (b"", bytes(len(content)), content[: len(content) // 2], None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            yield path.name
            path.write_bytes(content)
        flip_a_bit(path)
        yield path.name
        path.write_bytes(content)
    path, content = checkpoint / MANIFEST, (checkpoint / MANIFEST).read_text()
    steps = [json.dumps(json.loads(content) | {"step": step}) for step in (1.5, 10**9, None, "7")]
    for text in ("{}", "[]", "null", "7", "[" * 100_000, *steps):
        path.write_text(text)
        yield path.name
        path.write_text(content)


def plants(checkpoint: Path, trace: Path) -> Iterator[str]:
    """Puts what would create the file `trace` into one file after the other; the manifest agrees. The names."""
    for path in [*files_of(checkpoint), checkpoint / "custom_checkpoint_0.pkl", checkpoint / "pytorch_model.bin"]:
        content = path.read_bytes() if path.exists() else None
        torch.save(Hostile(trace), path)
        reseal(checkpoint)
        yield path.name
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        reseal(checkpoint)
