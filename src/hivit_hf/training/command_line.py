# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""
Command lines: dataclasses as flags through `HfArgumentParser`, recipe files, checks of single fields, exit codes.

A field is declared with its help text, and its checks are annotations beside it:

    layer_decay: Annotated[float, within(0, 1, low_included=False)] = argument(1.0, "Factor ...")

`HfArgumentParser` hands all metadata of a field to argparse, which leaves `huggingface_hub.dataclasses.validated_field`
out: its validators are metadata.
"""

import argparse
import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, get_type_hints

import datasets
import yaml
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import HfArgumentParser
from transformers.utils import logging

from ..configuration_hivit import MAX_IMAGE_SIZE
from ..data.datasets import FULL_DISK
from .output_folders import end_with_launcher, leave_folders


MAX_RECIPE_LENGTH = 1_000_000
ABOUT = ("title", "source", "cost", "expected_result")  # keys of a recipe file that are no flags


def required_argument(help_text: str) -> Any:
    """A field that has no default, of a dataclass with `kw_only=True`."""
    return field(metadata={"help": help_text})


def argument(default: Any, help_text: str) -> Any:
    """A field of a dataclass of arguments, with the help text of its flag."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata={"help": help_text})
    return field(default=default, metadata={"help": help_text})


# -- checks of one value, for annotations; None is not checked ------------------------------------------------------


def positive(value: float):
    """Larger than zero and finite."""
    if not 0 < value < math.inf:  # also of integers that no float can hold
        raise ValueError(f"must be a positive number, got {value}")


def nonnegative(value: float):
    """Zero or larger, and finite."""
    if not 0 <= value < math.inf:
        raise ValueError(f"must not be negative, got {value}")


def at_most(most: float) -> Callable[[float], None]:
    """Up to a bound, beyond which a program would hang."""

    def check(value: float):
        if value > most:
            raise ValueError(f"must be at most {most}, got {value}")

    return check


def within(low: float, high: float, low_included: bool = True, high_included: bool = True) -> Callable[[float], None]:
    """Between two bounds."""

    def check(value: float):
        if not ((low <= value if low_included else low < value) and (value <= high if high_included else value < high)):
            interval = f"{'[' if low_included else '('}{low}, {high}{']' if high_included else ')'}"
            raise ValueError(f"must be in {interval}, got {value}")

    return check


side_px = at_most(MAX_IMAGE_SIZE)
fraction = within(0, 1)
proper_fraction = within(0, 1, low_included=False, high_included=False)
decay_rate = within(0, 1, high_included=False)


def one_of(*choices: str) -> Callable[[str], None]:
    """One of some words."""

    def check(value: str):
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}, got {value!r}")

    return check


def some_of(*choices: Any) -> Callable[[Sequence], None]:
    """A list of some of these values."""

    def check(values: Sequence):
        wrong = [value for value in values if value not in choices]
        if wrong or not values:
            raise ValueError(f"must be some of {', '.join(map(str, choices))}, got {', '.join(map(str, values))}")

    return check


def ascending_pair(example: str, low: float = 0.0, high: float = math.inf) -> Callable[[Sequence[float]], None]:
    """Two numbers above `low` and up to `high`, the smaller one first."""

    def check(values: Sequence[float]):
        if len(values) != 2 or not low < values[0] <= values[1] <= high:
            raise ValueError(f"must be two numbers such as {example}, got {list(values)}")

    return check


def all_positive(values: Sequence[float]):
    """Positive, finite numbers."""
    if not all(value > 0 and math.isfinite(value) for value in values):
        raise ValueError(f"must be positive numbers, got {list(values)}")


def all_finite(values: Sequence[float]):
    """Finite numbers."""
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"must be finite numbers, got {list(values)}")


def json_object(text: str):
    """A JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"must be a JSON object such as '{{\"name\": 8}}', got {shortened(text, 200)}")


def shortened(text: str, most: int = 900) -> str:
    """A text that may come from a file or a command line, at a length that can be read."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


class ResumptionChange:
    """Marks a field that may differ between a run and its resumption."""


MAY_CHANGE = ResumptionChange()
CHANGES_TOPOLOGY = ResumptionChange()  # of pre-training, with --allow_topology_change
CHANGES_RECIPE = ResumptionChange()  # of pre-training, with --allow_recipe_change
OF_THE_MODEL = ResumptionChange()  # of pre-training: where it is left open, a resumption has that of its run


def annotations_of(arguments: Any) -> dict[str, tuple]:
    """What is annotated beside the type of each field: checks and marks."""
    hints = get_type_hints(type(arguments), include_extras=True)
    return {item.name: getattr(hints[item.name], "__metadata__", ()) for item in fields(arguments)}


def check_fields(arguments: Any):
    """Runs the checks beside the fields of a dataclass. Raises ValueError, which names the field."""
    for name, annotated in annotations_of(arguments).items():
        value = getattr(arguments, name)
        for check in annotated:
            if callable(check) and value is not None:
                try:
                    check(value)
                except ValueError as error:
                    raise ValueError(f"{name} {error}.") from error


# -- parsing --------------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Each flag in one spelling, with the type of its value and its default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flag = action.option_strings[-1] if action.dest == "help" else action.option_strings[0]
        if action.nargs in (0, "?"):  # booleans
            return f"{flag}, --no_{action.dest}" if action.default is True else flag
        kind = getattr(action.type, "__name__", "str").replace("string_to_bool", "bool").upper()
        value = f"{{{','.join(action.choices)}}}" if action.choices else kind
        return f"{flag} {value}" + (" ..." if action.nargs == "+" else "")

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, "", argparse.SUPPRESS, []) or isinstance(action.default, bool):
            return action.help
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f"{action.help} (default: {default})"


class ArgumentParser(HfArgumentParser):
    """
    `HfArgumentParser` whose errors are a sentence: there are too many flags to list them each time. Flags that are
    refused (`REFUSED` of a dataclass) are not in the help.
    """

    def __init__(self, classes: Sequence[type], description: str | None):
        super().__init__(
            classes,
            description=description,
            usage="%(prog)s [--config RECIPE] [flags]",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        refused = {name for part in classes for name in getattr(part, "REFUSED", ())}
        for action in self._actions:
            if action.dest in refused or action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {shortened(message)}\nAll flags: {self.prog} --help\n")

    def nearest(self, name: str) -> str:
        """A hint for a flag that does not exist."""
        near = difflib.get_close_matches(name, [action.dest for action in self._actions], 3, 0.6)
        return f" Did you mean {', '.join(near)}?" if near else " See --help."

    def flags_of(self, path: str | Path) -> list[str]:
        """
        A recipe file, YAML or JSON, as flags.

        Raises:
            ValueError: if it cannot be read, or has a key that is no flag.
        """
        names = {action.dest: action for action in self._actions if action.option_strings}
        flags = []
        for name, value in read_recipe(path).items():
            if name in ABOUT or value is None:
                continue
            if name not in names or name in ("help", "config"):
                raise ValueError(f"The recipe {path} has the key {name}, which is no flag.{self.nearest(str(name))}")
            if isinstance(value, list) and not value:
                self.set_defaults(**{name: []})
            elif isinstance(value, list):
                flags += [f"--{name}", *(self._item_of(path, name, item) for item in value)]
            else:
                flags.append(f"--{name}={_as_text(value)}")
        return flags

    def _item_of(self, path: str | Path, name: str, item: Any) -> str:
        """An item of a list as text, which argparse must not take for a flag."""
        if isinstance(item, (list, dict)):
            raise ValueError(f"The recipe {path} has a list or mapping within the list {name}: give plain values.")
        text = _as_text(item)
        if text.startswith("-") and not isinstance(item, (int, float)):
            raise ValueError(
                f"The recipe {path} has {text!r} in the list {name}: no item can begin with '-', as flags do. Write it "
                "otherwise."
            )
        return text


def _as_text(value: Any) -> str:
    if isinstance(value, float) and -math.inf < value < 0:
        return format(Decimal(repr(value)), "f")  # argparse takes -1e-05 for a flag
    return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)


def read_recipe(path: str | Path) -> dict:
    """
    The keys and values of a recipe file, YAML or JSON.

    Raises:
        ValueError: if it cannot be read or holds no keys.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_RECIPE_LENGTH + 1)
        if len(text) > MAX_RECIPE_LENGTH:
            raise ValueError(f"it has more than {MAX_RECIPE_LENGTH} characters")
        values = yaml.safe_load(text)
        _check_nesting(values)
    except RecursionError as error:
        raise ValueError(f"The recipe {path} is nested too deeply: give keys and values.") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The recipe {path} cannot be read: {shortened(' '.join(str(error).split()), 200)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"The recipe {path} must hold keys and values, got a {type(values).__name__}.")
    return values


def _check_nesting(values: Any, most: int = 10_000):
    """ValueError for aliases of YAML that stand for very much, and for values within themselves."""
    waiting, seen = [values], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > most:
            raise ValueError(f"it has more than {most} values")
        waiting += list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def parse_arguments(classes: Sequence[type], description: str | None, argv: Sequence[str] | None = None) -> tuple:
    """
    The dataclasses that a command line asks for: the numbers of a recipe file (`--config`), changed by flags. Exits
    with code 2 and a sentence where they do not fit.

    Args:
        classes: dataclasses, whose `__post_init__` raises ValueError for what does not fit.
        description: for `--help`.
        argv: the command line, that of the process if not given.

    Returns:
        An instance of each class.
    """
    parser = ArgumentParser(classes, description)
    parser.add_argument("--config", help="Recipe file, YAML or JSON, whose keys are these flags; flags win.")
    argv = list(sys.argv[1:] if argv is None else argv)
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    known, flags = config.parse_known_args(argv)
    try:
        recipe = [] if known.config is None or "\0" in known.config else parser.flags_of(known.config)
        for text in [*argv, *recipe]:
            if "\0" in text:
                raise ValueError(f"{shortened(ascii(text), 200)} holds a NUL character: leave it out.")
        *instances, _, unknown = parser.parse_args_into_dataclasses(
            [*recipe, *flags], return_remaining_strings=True, look_for_args_file=False
        )
        if unknown and not unknown[0].startswith("--"):
            raise ValueError(f"{unknown[0]!r} belongs to no flag, or its flag takes one value only. See --help.")
        if unknown:
            raise ValueError(f"There is no flag {unknown[0]}.{parser.nearest(unknown[0].lstrip('-').split('=')[0])}")
    except RecursionError:
        parser.error("a value is nested too deeply: give a plain one.")
    except (ValueError, TypeError, OverflowError, StrictDataclassError) as error:
        parser.error(one_sentence(error))
    return tuple(instances)


# -- running --------------------------------------------------------------------------------------------------------


def one_sentence(error: BaseException) -> str:
    """What happened, without the stack that the error of a data loading worker brings along as text."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # which names the field
    name, module = type(error).__name__, type(error).__module__
    lines = (str(error).strip() or name).splitlines()
    text = lines[-1] if "Traceback (most recent call last)" in str(error) else " ".join(map(str.strip, lines))
    return shortened(text.removeprefix(f"{module}.{name}: ").removeprefix(f"{name}: "))


# what a user can mend, from the package or the libraries below it
MENDABLE = (ValueError, RuntimeError, FloatingPointError, OverflowError, OSError, ImportError, MemoryError)
MENDABLE += (SafetensorError, StrictDataclassError)
FULL = tuple(map(os.strerror, FULL_DISK))
FULL += ("PytorchStreamWriter failed", "file write failed")  # of torch.save, which keeps the reason to itself
INTERRUPTED = 130  # as shells say it


def run_script(run: Callable[..., object], *arguments: Any) -> int:
    """
    Calls the story of a script; what its user can mend becomes a sentence.

    Args:
        run: the function.
        arguments: its arguments.

    Returns:
        The exit code: 0, 2 after a sentence about what does not fit, or 130 after Ctrl-C.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    end_with_launcher()
    try:
        run(*arguments)
    except KeyboardInterrupt:
        resumes = any(getattr(part, "save_steps", None) for part in arguments)
        how = "; --resume_from_checkpoint latest resumes from the last checkpoint" if resumes else ""
        return _leave(f"stopped by Ctrl-C{how}.", INTERRUPTED)
    except MENDABLE as error:
        return _leave(_where_full(error, arguments) or one_sentence(error), 2)
    finally:
        leave_folders()
    return 0


def _leave(sentence: str, code: int) -> int:
    state = PartialState()
    where = f" in process {state.process_index}" if state.num_processes > 1 else ""
    print(f"error{where}: {sentence}", file=sys.stderr, flush=True)
    if state.num_processes > 1:
        leave_folders()
        os._exit(code)  # the others may wait for this process in a collective; the launcher stops them
    return code


def is_disk_full(error: Exception) -> bool:
    """Whether a file could not be written whole."""
    return any(words in str(error) for words in FULL)


def _where_full(error: Exception, arguments: Sequence[Any]) -> str | None:
    """A sentence with the output folder, if the disk is full: the error often names no path."""
    if not is_disk_full(error):
        return None
    flags = ("output_dir", "output_file")
    given = [(flag, getattr(part, flag)) for part in arguments for flag in flags if getattr(part, flag, None)]
    if not given:
        return None
    flag, folder = given[0]
    return (
        f"{folder} cannot be written ({one_sentence(error).rstrip('.')}): free space there, or choose another --{flag}."
    )
