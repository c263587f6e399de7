# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Output folders of trainings: what a run must find there, and whether it resumes the run that it says."""

import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from .arguments import HiViTTrainingArguments, identity


ARGUMENTS = "arguments.json"  # in the output folder: what a resumption must share
RESULTS = ("eval_results.json", "all_results.json", "trainer_state.json")  # as `Trainer` names them


def find_checkpoint(args: HiViTTrainingArguments, *others: Any) -> str | None:
    """
    The checkpoint that a run resumes from, or None for a new run, whose output folder is made.

    Args:
        args: the arguments of the training.
        others: the other dataclasses of arguments.

    Raises:
        ValueError: for a folder that holds another run or cannot be written, and for a resumption of nothing, or of a
            run with other arguments.
    """
    output = Path(args.output_dir)
    latest = get_last_checkpoint(str(output)) if output.is_dir() else None
    if args.resume_from_checkpoint is None:
        if not args.show_layer_table:
            _refuse_used(output, latest if args.do_train else None)
            make_output_dir(output)
        return None
    found = latest if args.resume_from_checkpoint == "latest" else args.resume_from_checkpoint
    if found is None or not (Path(found) / "trainer_state.json").exists():
        raise ValueError(
            f"There is no checkpoint to resume at {found or output}: leave out --resume_from_checkpoint to begin."
        )
    _check_arguments(Path(found).resolve().parent / ARGUMENTS, identity(args, *others))
    return found


def _refuse_used(output: Path, latest: str | None):
    if latest is not None:
        raise ValueError(
            f"{output} holds a run, at {Path(latest).name}: give --resume_from_checkpoint latest, or another "
            "--output_dir."
        )
    for path in sorted(output.iterdir()) if output.is_dir() else []:
        if path.name in RESULTS or path.name.startswith("checkpoint-"):
            raise ValueError(f"{output} holds {path.name} of another run: give another --output_dir.")


def _check_arguments(path: Path, now: dict):
    if not path.exists():
        return
    was = json.loads(path.read_text())
    if not was.keys() <= now.keys():
        raise ValueError(f"{path.parent} holds another kind of run: resume it with the script that began it.")
    for name, value in was.items():
        if now[name] != value:
            raise ValueError(
                f"{path.parent} was begun with {name}={value}, now it is {now[name]}: a resumption must have the same "
                "arguments. Set it back, or begin a new run in another --output_dir."
            )


def make_output_dir(output: Path):
    """Makes the output folder. Raises ValueError if it cannot be made."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{output} cannot be written ({error.strerror}). Choose another --output_dir.") from error


def save_arguments(args: HiViTTrainingArguments, *others: Any):
    """Writes what a resumption must share with this run to the output folder."""
    if args.process_index == 0:
        (Path(args.output_dir) / ARGUMENTS).write_text(json.dumps(identity(args, *others), indent=1) + "\n")
