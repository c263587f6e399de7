# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Where a run begins: its output folder, the checkpoint that it resumes from, and whether that is of the same run."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerState

from .arguments import HiViTTrainingArguments, identity
from .manifest import DamagedCheckpointError, WholeCheckpoint, newest_whole, read_manifest
from .output_folders import ARGUMENTS, enter_folder, refuse_foreign


RESULTS = ("eval_results.json", "all_results.json", "trainer_state.json")  # as `Trainer` names them
# what a folder of a model has, as patterns
MODEL_FILES = ("*_hivit.py", "*config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
OVERLAYS = ("overlays.png", "detections.png")  # of evaluations of dense tasks
Decision = TypeVar("Decision")


def decided_by_main(decide: Callable[[], Decision]) -> Decision:
    """What the main process decides, in all processes; its ValueError, too. All of them call it."""
    state, outcome = PartialState(), [None, None]
    if state.is_main_process:
        try:
            outcome[0] = decide()
        except ValueError as error:
            outcome[1] = str(error)
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def claim_folder(
    output: Path,
    resume_from_checkpoint: str | None,
    checkpoints: Callable[[], Sequence[Path]],
    overwritten: Iterable[str],
) -> WholeCheckpoint | None:
    """
    Makes and locks the output folder of a run. Returns the checkpoint to resume from, checked, or None for a new run.

    Args:
        output: the output folder.
        resume_from_checkpoint: None, `latest`, or the folder of a checkpoint.
        checkpoints: returns those in the output folder, newest first.
        overwritten: patterns of the files that a new run would overwrite.

    Raises:
        ValueError: for a folder that holds another run or a model, is in use, or cannot be written, and if no
            checkpoint to resume from is whole.
    """
    latest, existing = resume_from_checkpoint == "latest", checkpoints()
    given = None if resume_from_checkpoint is None or latest else Path(resume_from_checkpoint)
    own = bool(existing) and (latest or (given and given.resolve() in [path.resolve() for path in existing]))

    if given is not None:
        read_manifest(given)  # the wrong folder is told first

    def refuse():
        if not own:
            refuse_existing_run(output, next(iter(checkpoints()), None))
            refuse_foreign(output, overwritten)

    refuse()
    enter_folder(output)
    refuse()  # another run may have been there first
    if given is not None:
        return newest_whole([given])
    if not (latest and existing):
        return None
    found = newest_whole(checkpoints())
    for damage in found.damaged:
        print(f"{damage} Resuming from {found.path.name}, the newest whole one.", flush=True)
    return found


def find_checkpoint(args: HiViTTrainingArguments, *others: Any) -> str | None:
    """
    The checkpoint that a run resumes from, or None for a new run, whose output folder is made. All processes call it.

    Args:
        args: the arguments of the training.
        others: the other dataclasses of arguments.

    Raises:
        ValueError: for a folder that holds another run or a model, is in use, or cannot be written, and for a
            resumption of nothing, of what is damaged, or of a run with other arguments.
    """
    if args.show_layer_table and args.resume_from_checkpoint is None:
        return None
    return decided_by_main(lambda: _find_checkpoint(args, *others))


def _find_checkpoint(args: HiViTTrainingArguments, *others: Any) -> str | None:
    output, given = Path(args.output_dir), args.resume_from_checkpoint
    existing = trainer_checkpoints(output)
    missing = (given == "latest" and not existing) or (given not in (None, "latest") and not is_checkpoint(Path(given)))
    if missing:
        raise ValueError(
            f"There is no checkpoint to resume at {output if given == 'latest' else given}: leave out "
            "--resume_from_checkpoint to begin."
        )
    if given is None:
        refuse_existing_run(output, next(iter(existing), None) if args.do_train else None)
        for path in sorted(output.iterdir()) if output.is_dir() else []:
            if path.name in RESULTS or path.name.startswith("checkpoint-"):
                raise ValueError(f"{output} holds {path.name} of another run: give another --output_dir.")
    overwritten = (*RESULTS, *OVERLAYS, *((*MODEL_FILES, "README.md") if args.do_train else ()))
    found = claim_folder(output, given, lambda: trainer_checkpoints(output), overwritten)
    if found is None:
        return None
    check_trainer_state(found)
    was = found.path.resolve().parent / ARGUMENTS
    if was.exists():
        check_same_arguments(was.parent, read_arguments(was), identity(args, *others))
    return str(found.path)


def trainer_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of `Trainer` in an output folder, newest first."""
    numbered = [path for path in output.glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    return sorted(filter(Path.is_dir, numbered), key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is, or was, a checkpoint of `Trainer`."""
    return (path / "trainer_state.json").exists() or (path.is_dir() and path.name.startswith("checkpoint-"))


def check_trainer_state(checkpoint: WholeCheckpoint):
    """ValueError if the state of `Trainer` in a checkpoint is not one, or of another step than the manifest's."""
    try:
        step = TrainerState.load_from_json(checkpoint.path / "trainer_state.json").global_step
    except Exception as error:  # of many classes, for JSON of any kind
        raise DamagedCheckpointError(checkpoint.path, f"trainer_state.json is not of Trainer ({error})") from error
    if step != checkpoint.manifest["step"]:
        raise DamagedCheckpointError(checkpoint.path, f"trainer_state.json is of step {step!r}")


def read_arguments(path: Path) -> dict:
    """The arguments that `save_arguments` has written. ValueError if they cannot be read."""
    try:
        arguments = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{path} is damaged: it is no JSON object. Without the file, resuming does not compare the arguments."
        )
    return arguments


def refuse_existing_run(output: Path, latest: str | Path | None):
    """ValueError if an output folder has a checkpoint, the latest of which is given, although nothing is resumed."""
    if latest is not None:
        raise ValueError(
            f"{output} holds a run, at {Path(latest).name}: give --resume_from_checkpoint latest, or another "
            "--output_dir."
        )


def check_same_arguments(run: Path, was: dict, now: dict, hints: Mapping[str, str] = MappingProxyType({})):
    """
    ValueError if the arguments of a resumption differ from those of its run, by name.

    Args:
        run: folder of the run or checkpoint.
        was, now: arguments of the run, and of the resumption.
        hints: what else can be done about an argument.
    """
    if not was.keys() <= now.keys():
        raise ValueError(f"{run} holds another kind of run: resume it with the script that began it.")
    for name, value in was.items():
        if now[name] != value:
            raise ValueError(
                f"{run} was begun with {name}={value}, now it is {now[name]}: a resumption must have the same "
                f"arguments. Set it back, or begin a new run in another --output_dir.{hints.get(name, '')}"
            )


def save_arguments(args: HiViTTrainingArguments, *others: Any):
    """Writes what a resumption must share with this run to the output folder. An evaluation leaves a training's."""
    path = Path(args.output_dir) / ARGUMENTS
    if args.process_index == 0 and (args.do_train or not path.exists()):
        path.write_text(json.dumps(identity(args, *others), indent=1) + "\n")
