# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Output folders of trainings: what a run must find there, and whether it resumes the run that it says."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
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
            refuse_existing_run(output, latest if args.do_train else None)
            for path in sorted(output.iterdir()) if output.is_dir() else []:
                if path.name in RESULTS or path.name.startswith("checkpoint-"):
                    raise ValueError(f"{output} holds {path.name} of another run: give another --output_dir.")
            make_output_dir(output)
        return None
    found = latest if args.resume_from_checkpoint == "latest" else args.resume_from_checkpoint
    if found is None or not (Path(found) / "trainer_state.json").exists():
        raise ValueError(
            f"There is no checkpoint to resume at {found or output}: leave out --resume_from_checkpoint to begin."
        )
    was = Path(found).resolve().parent / ARGUMENTS
    if was.exists():
        check_same_arguments(was.parent, json.loads(was.read_text()), identity(args, *others))
    return found


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


def make_output_dir(output: Path):
    """Makes the output folder. Raises ValueError if it cannot be made or written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ValueError(f"{output} cannot be written ({error.strerror}). Choose another --output_dir.") from error


def save_arguments(args: HiViTTrainingArguments, *others: Any):
    """Writes what a resumption must share with this run to the output folder."""
    if args.process_index == 0:
        (Path(args.output_dir) / ARGUMENTS).write_text(json.dumps(identity(args, *others), indent=1) + "\n")
