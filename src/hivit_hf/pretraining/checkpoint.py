# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""
Checkpoints that are there whole or not at all.

A checkpoint is written beside the others under another name, flushed to the disk, and only then renamed; the file
`latest` is replaced after that. Whatever dies on the way, the last one named there can be read.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from transformers.utils import logging

from .zero import save_deepspeed


logger = logging.get_logger(__name__)
CHANGEABLE = {
    "base_learning_rate",
    "min_learning_rate",
    "warmup_epochs",
    "weight_decay",
    "clip_norm",
    "mixed_precision",
}


class Checkpoints:
    """
    The checkpoints of one run.

    Args:
        folder: holds `step-00001000` and so on, and `latest`.
        accelerator: saves and loads model, optimizer, scaler and random states, each process its own.
        keep_last: how many of the newest are kept.
        keep_every_steps: those of multiples of it are kept as well; 0 for none.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep_last: int = 2, keep_every_steps: int = 0):
        self.folder, self.accelerator = folder, accelerator
        self.keep_last, self.keep_every_steps = keep_last, keep_every_steps
        self.in_use: Path | None = None  # being uploaded, so not to be deleted

    def save(self, step: int, manifest: dict, loader_state: dict, write_config: Callable[[Path], None]) -> bool:
        """
        Saves the run as it is after `step` steps. Called by all processes; returns whether all of them could.

        Args:
            manifest: what a resumption must agree with; `step` is added.
            loader_state: of this process's data loader.
            write_config: writes the model's configuration into a folder, which makes the checkpoint loadable with
                `from_pretrained`.
        """
        accelerator, final = self.accelerator, self.folder / name_of(step)
        partial = self.folder / f".{final.name}.partial"

        def make_room():
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)

        def write():
            if accelerator.distributed_type == DistributedType.DEEPSPEED:
                save_deepspeed(accelerator, str(partial))
            else:
                accelerator.save_state(str(partial))
            torch.save(loader_state, partial / f"loader_rank{accelerator.process_index:05d}.pt")
            if accelerator.is_main_process:
                write_config(partial)
                (partial / "manifest.json").write_text(json.dumps({"step": step, **manifest}, indent=1) + "\n")

        def install():
            if accelerator.is_main_process:
                self._install(partial, final)

        # each is done by all processes before any begins the next: nobody flushes what another still writes
        for do in (make_room, write, lambda: _flush(partial), install):
            problem = None
            try:
                do()
            except Exception as error:  # each library reports a full disk in its own way
                problem = error
            if problem is not None:
                logger.error(
                    f"The checkpoint of step {step} could not be written ({problem}); the run goes on without it."
                )
            if not self._all_well(problem):
                if accelerator.is_main_process:
                    shutil.rmtree(partial, ignore_errors=True)
                return False
        return True

    def _all_well(self, problem: Exception | None) -> bool:
        flag = torch.tensor(float(problem is not None), device=self.accelerator.device)
        return self.accelerator.reduce(flag, "sum").item() == 0

    def _install(self, partial: Path, final: Path):
        aside = self._aside(final)
        if final.exists():  # of an earlier run of the same steps
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(final, aside)
        try:
            os.replace(partial, final)
        except OSError:
            os.replace(aside, final)
            raise
        pointer = self.folder / ".latest.partial"
        pointer.write_text(final.name + "\n")
        _flush(pointer)
        os.replace(pointer, self.folder / "latest")
        _flush_folder(self.folder)
        for old in [*self.folder.glob(".step-*.old"), *self._superfluous(final)]:
            shutil.rmtree(old, ignore_errors=True)

    def _aside(self, checkpoint: Path) -> Path:
        """Where a checkpoint is while another one of the same step takes its place."""
        return self.folder / f".{checkpoint.name}.old"

    def _superfluous(self, newest: Path) -> list[Path]:
        """Older ones beyond what is kept, and later ones, which an earlier attempt has left on another path."""
        every, earlier = self.keep_every_steps, [path for path in self.all() if path.name <= newest.name]
        later = [path for path in self.all() if path.name > newest.name]
        kept = [path for path in later + earlier if every and step_of(path) % every == 0]
        return [path for path in later + earlier[: -self.keep_last] if path not in kept and path != self.in_use]

    def all(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / "manifest.json").is_file())

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        pointer = self.folder / "latest"
        if not pointer.is_file():
            return None
        checkpoint = self.folder / pointer.read_text().strip()
        return checkpoint if checkpoint.exists() or not self._aside(checkpoint).exists() else self._aside(checkpoint)

    def load(self, path: Path):
        """Loads model, optimizer and scaler, and the random state that this process saved, if it did."""
        self.accelerator.load_state(str(path))


def name_of(step: int) -> str:
    """The folder of a checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def loader_states(path: Path) -> list[dict]:
    """What the data loaders of all processes saved in a checkpoint, by rank."""
    return [torch.load(file, weights_only=True) for file in sorted(path.glob("loader_rank*.pt"))]


def read_manifest(path: Path) -> dict:
    """
    What was written about a checkpoint.

    Raises:
        ValueError: if the folder is no checkpoint.
    """
    try:
        return json.loads((path / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no checkpoint: manifest.json cannot be read ({error}).") from error


def check_resumption(
    path: Path, manifest: dict, now: dict, allow_topology_change: bool = False, allow_recipe_change: bool = False
) -> bool:
    """
    Holds a run against the manifest of the checkpoint that it shall go on from.

    Args:
        manifest: of the checkpoint.
        now: what the run would write; entries that it does not know yet are left out.
        allow_topology_change: whether other processes, workers and batches may go on.
        allow_recipe_change: whether what a run that diverges needs may be another: see `CHANGEABLE`.

    Returns:
        Whether the topology is another one.

    Raises:
        ValueError: what does not fit, and what would.
    """
    for name, value in manifest["recipe"].items():
        if now["recipe"].get(name) != value and not (allow_recipe_change and name in CHANGEABLE):
            hint = " Or give --allow_recipe_change true." if name in CHANGEABLE else ""
            raise ValueError(
                f"{path} was made with {name}={value}, now it is {now['recipe'].get(name)}: a resumption must be of "
                f"the same recipe. Set it back, or begin a new run in another --output_dir.{hint}"
            )
    sharded_by = manifest["sharded_by"]
    if sharded_by != now["sharded_by"]:
        how = f"with {sharded_by}" if sharded_by else f"without {now['sharded_by']}"
        raise ValueError(f"{path} was made {how}: resume it {how}.")
    changed = {name: value for name, value in manifest["topology"].items() if now["topology"][name] != value}
    if changed and not allow_topology_change:
        there = ", ".join(f"{name}={value}" for name, value in changed.items())
        here = ", ".join(f"{name}={now['topology'][name]}" for name in changed)
        raise ValueError(
            f"{path} was made with {there}, now it is {here}: each reader has its own place in the data. Resume with "
            "the same, or give --allow_topology_change true, which reads the unfinished shards again."
        )
    if sharded_by == "DeepSpeed" and "processes" in changed:
        raise ValueError(
            f"{path} was made with {changed['processes']} processes, now there are {now['topology']['processes']}: "
            "DeepSpeed resumes with as many as before only."
        )
    return bool(changed)


def _flush(path: Path):
    """To the disk, not only to the system's cache."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _flush_folder(folder: Path):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
