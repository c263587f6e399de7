# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""
Checkpoints of pre-training: saved atomically, loaded, and compared with the run that resumes from them.

A checkpoint is written beside the others under another name, flushed to the disk, and only then renamed. Its manifest
has the checksums of its files, and its number among the checkpoints of the run: the newest whole one is resumed from.
The file `latest` names it for people and scripts.
"""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from transformers.utils import logging

from ..training.arguments import identity
from ..training.command_line import CHANGES_RECIPE, CHANGES_TOPOLOGY, OF_THE_MODEL, annotations_of
from ..training.folders import flush_folder, remove_folder, replace_file, replace_folder
from ..training.manifest import WholeCheckpoint, newest_whole, read_manifest, write_manifest
from ..training.resumption import MODEL_FILES, check_same_arguments, claim_folder, decided_by_main
from .arguments import PretrainingArguments


logger = logging.get_logger(__name__)
OVERWRITTEN = ("model/*", "model_ema/*", "images/reconstructions-*.png", "log.jsonl", "samples_rank*.jsonl")
ASIDE = ".old"  # end of the name of a checkpoint while another one of the same step takes its place
KINDS = {"step": int, "number": int, "arguments": dict, "num_processes": int, "sharded_by": (str, type(None))}
KINDS |= {"shards": list, "revisions": list, "validation": list, "versions": dict, "rollbacks": int, "bad_images": int}


class Checkpoints:
    """
    The checkpoints of one run.

    Args:
        folder: holds `step-00001000` and so on, and `latest`.
        accelerator: saves model, optimizer, scaler and random states, of each rank its own.
        save_total_limit: number of newest checkpoints to keep.
        keep_every_steps: checkpoints at multiples of this step are kept as well; 0 for none.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, save_total_limit: int = 2, keep_every_steps: int = 0):
        self.folder, self.accelerator = folder, accelerator
        self.save_total_limit, self.keep_every_steps = save_total_limit, keep_every_steps
        self.in_use: Path | None = None  # being uploaded, so not to be deleted

    def save(self, step: int, manifest: dict, loader_state: dict, write_config: Callable[[Path], None]) -> bool:
        """
        Saves the run after `step` steps. Called by all ranks; returns whether all of them could.

        Args:
            manifest: what a resumption must agree with; `step`, `number` and the checksums are added.
            loader_state: of this rank's data loader.
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
            accelerator.save_state(str(partial))
            torch.save(loader_state, partial / f"loader_rank{accelerator.process_index:05d}.pt")
            if accelerator.is_main_process:
                write_config(partial)

        def seal():
            if accelerator.is_main_process:
                number = 1 + max((number for number, _ in self._numbered()), default=0)
                write_manifest(partial, {"step": step, "number": number, **manifest})

        def install():
            if accelerator.is_main_process:
                self._install(partial, final)

        # each is done by all ranks before any begins the next: none flushes what another still writes
        for do in (make_room, write, seal, lambda: flush_folder(partial), install):
            problem = None
            try:
                do()
            except Exception as error:  # each library reports a full disk in its own way
                problem = error
            if problem is not None:
                logger.error(
                    f"The checkpoint of step {step} could not be written ({problem}); the run continues without it."
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
        replace_folder(partial, final, aside=self._aside(final))  # an earlier attempt may have left the same step
        replace_file(self.folder / "latest", f"{final.name}\n")
        for superfluous in self._superfluous(final):
            remove_folder(superfluous)
        for left in self.folder.glob(".step-*"):  # by a kill
            if left != self.in_use:
                shutil.rmtree(left, ignore_errors=True)

    def _aside(self, checkpoint: Path) -> Path:
        """Where a checkpoint is while another one of the same step takes its place."""
        return self.folder / f".{checkpoint.name}{ASIDE}"

    def _superfluous(self, newest: Path) -> list[Path]:
        """Older ones beyond the limit, and later ones, which an earlier attempt has left on another path."""
        every, earlier = self.keep_every_steps, [path for path in self.all() if path.name <= newest.name]
        later = [path for path in self.all() if path.name > newest.name]
        kept = [path for path in later + earlier if every and step_of(path) % every == 0]
        return [path for path in later + earlier[: -self.save_total_limit] if path not in kept and path != self.in_use]

    def all(self) -> list[Path]:
        """The checkpoints, by step, whole or not."""
        found = [path for path in self.folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
        return sorted(filter(Path.is_dir, found))

    def newest_first(self) -> list[Path]:
        """The checkpoints in the order of saving, the last one first; before them those whose manifest is damaged."""
        numbered = sorted(self._numbered(), reverse=True)
        known = [path for _, path in numbered]
        return [*(path for path in reversed(self.all()) if path not in known), *known]

    def _numbered(self) -> list[tuple[int, Path]]:
        """The checkpoints with a sound manifest, and their numbers in the order of saving."""
        found = []
        for path in [*self.all(), *self.folder.glob(f".step-*{ASIDE}")]:
            with suppress(ValueError):
                number = read_manifest(path).get("number")
                found += [(number, path)] if type(number) is int else []
        return found

    def latest(self) -> Path | None:
        """The newest checkpoint by its manifest, or None; its files are not looked at."""
        return max(self._numbered(), default=(0, None))[1]

    def newest_whole(self) -> WholeCheckpoint:
        """The newest checkpoint that is whole, as the main process finds it. Raises ValueError if there is none."""
        return decided_by_main(lambda: newest_whole(self.newest_first()))


def name_of(step: int) -> str:
    """The folder of a checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def loader_states(path: Path) -> list[dict]:
    """The states of the data loaders of all ranks in a checkpoint, by rank."""
    return [torch.load(file, weights_only=True) for file in sorted(path.glob("loader_rank*.pt"))]


@dataclass(frozen=True)
class Resumption:
    """
    The checkpoint that a run resumes from.

    Args:
        path: its folder.
        manifest: what is written about it.
        changed_topology: whether it was made by another number of ranks or workers, or with another batch size.
        changed_recipe: whether it was made with another learning rate or the like.
    """

    path: Path
    manifest: dict
    changed_topology: bool
    changed_recipe: bool


def describe(accelerator: Accelerator, *arguments: Any) -> dict:
    """The part of a manifest that is known before data are opened."""
    return {
        "arguments": identity(*arguments),
        "num_processes": accelerator.num_processes,
        "sharded_by": "FSDP" if accelerator.distributed_type == DistributedType.FSDP else None,
    }


def check_kinds(path: Path, manifest: dict):
    """ValueError if a manifest is not one of pre-training."""
    wrong = [name for name, kind in KINDS.items() if not isinstance(manifest.get(name), kind)]
    if wrong:
        raise ValueError(f"{path} is no checkpoint of pre-training: its manifest has no {', '.join(wrong)}.")


def find_resumption(checkpoints: Checkpoints, training_args: PretrainingArguments, *others: Any) -> Resumption | None:
    """
    The checkpoint to resume from, or None for a new run. Makes and locks the output folder. All processes call it.

    Raises:
        ValueError: for an output folder that holds another run or a model, is in use, or cannot be written; for a
            resumption from what is damaged, or that does not fit its run.
    """
    found = decided_by_main(
        lambda: claim_folder(
            Path(training_args.output_dir),
            training_args.resume_from_checkpoint,
            checkpoints.newest_first,
            (*OVERWRITTEN, *MODEL_FILES),
        )
    )
    if found is None:
        return None
    path, manifest, arguments = found.path, found.manifest, (training_args, *others)
    check_kinds(path, manifest)
    marks = {name: annotated for part in arguments for name, annotated in annotations_of(part).items()}
    topology = [name for name, annotated in marks.items() if CHANGES_TOPOLOGY in annotated]
    recipe = [name for name, annotated in marks.items() if CHANGES_RECIPE in annotated]
    now, was = describe(checkpoints.accelerator, *arguments), manifest["arguments"]
    left_open = [name for name, annotated in marks.items() if OF_THE_MODEL in annotated and not now["arguments"][name]]
    now["arguments"] |= {name: was[name] for name in left_open if name in was}
    free = topology + (recipe if training_args.allow_recipe_change else [])
    check_same_arguments(
        path,
        {name: value for name, value in was.items() if name not in free},
        now["arguments"],
        dict.fromkeys(recipe, " Or give --allow_recipe_change."),
    )
    if manifest["sharded_by"] != now["sharded_by"]:
        how = f"with {manifest['sharded_by']}" if manifest["sharded_by"] else f"without {now['sharded_by']}"
        raise ValueError(f"{path} was made {how}: resume it {how}.")
    before = {"num_processes": manifest["num_processes"], **{name: was[name] for name in topology}}
    after = {"num_processes": now["num_processes"], **{name: now["arguments"][name] for name in topology}}
    changed = [name for name in before if before[name] != after[name]]
    if changed and not training_args.allow_topology_change:
        there, here = (", ".join(f"{name}={values[name]}" for name in changed) for values in (before, after))
        raise ValueError(
            f"{path} was made with {there}, now it is {here}: each reader has its own place in the data. Resume with "
            "the same, or give --allow_topology_change, which reads unfinished shuffle windows again."
        )
    changed_recipe = any(was[name] != now["arguments"][name] for name in recipe)
    return Resumption(path, manifest, bool(changed), changed_recipe)
