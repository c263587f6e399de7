"""Command lines: flags and recipe files as dataclasses, checks beside fields, errors as one sentence."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pytest
from safetensors import SafetensorError

from hivit_hf.configuration_hivit import HiViTConfig
from hivit_hf.training.command_line import (
    all_finite,
    all_positive,
    argument,
    ascending_pair,
    at_most,
    check_fields,
    decay_rate,
    fraction,
    json_object,
    nonnegative,
    one_of,
    one_sentence,
    parse_arguments,
    positive,
    proper_fraction,
    read_recipe,
    run_script,
    within,
)


@dataclass
class Arguments:
    """One field of each kind."""

    _argument_group_name = "things"

    name: str | None = argument(None, "A name.")
    steps: Annotated[int, positive] = argument(3, "A number of steps.")
    rate: Annotated[float | None, nonnegative] = argument(None, "A rate.")
    workers: Annotated[int, nonnegative, at_most(64)] = argument(0, "A number of workers.")
    kind: Annotated[str, one_of("a", "b")] = argument("a", "A kind.")
    overrides: Annotated[str, json_object] = argument("{}", "Changes.")
    scales: list[float] = argument([0.5, 1.0], "Scales.")  # noqa: RUF009
    names: list[str] = argument([], "Names.")  # noqa: RUF009
    fast: bool = argument(False, "Fast.")
    careful: bool = argument(True, "Careful.")
    old: int = argument(0, "Refused.")

    REFUSED = {"old": "it is old"}

    def __post_init__(self):
        check_fields(self)


def parse(*flags) -> Arguments:
    (arguments,) = parse_arguments((Arguments,), "Text.", [str(flag) for flag in flags])
    return arguments


def refused(capsys, *flags) -> str:
    """The sentence that a command line is refused with."""
    with pytest.raises(SystemExit) as ended:
        parse(*flags)
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2 and error[1].startswith("All flags: ") and error[1].endswith(" --help")
    return error[0].split(": error: ")[1]


RECIPE = {"title": "A title", "steps": 5, "rate": None, "scales": [0.1, 0.2], "names": "one", "fast": True}
RECIPE |= {"careful": False, "overrides": {"depths": [1, 2], "flag": True, "nothing": None}}


@pytest.fixture(params=["yaml", "json"])
def recipe(request, tmp_path) -> Path:
    path = tmp_path / f"recipe.{request.param}"
    written = json.dumps(RECIPE)
    if request.param == "yaml":
        written = "title: A title\nsteps: 5\nrate: null\nscales: [1.0e-1, 0.2]\nnames: one\nfast: true\ncareful: no\n"
        written += "overrides: {depths: [1, 2], flag: true, nothing: null}\n"
    path.write_text(written)
    return path


def test_flags():
    assert parse() == Arguments()
    given = parse(
        "--workers", 2, "--steps", 7, "--scales", 1, 2, "--names", "a", "b", "--fast", "--no_careful", "--rate=1e-3"
    )
    assert given == Arguments(None, 7, 1e-3, 2, "a", "{}", [1.0, 2.0], ["a", "b"], True, False)
    assert parse("--careful", "false", "--fast", "true", "--name", "x").name == "x"


def test_recipe_files_have_the_same_keys_and_flags_win(recipe):
    read = parse("--config", recipe)
    assert (read.steps, read.rate, read.scales, read.names) == (5, None, [0.1, 0.2], ["one"])
    assert read.fast is True and read.careful is False
    assert json.loads(read.overrides) == {"depths": [1, 2], "flag": True, "nothing": None}
    changed = parse("--steps", 8, "--config", recipe, "--scales", "0.3", "--names", "x", "y", "--fast", "false")
    assert (changed.steps, changed.scales, changed.names, changed.fast) == (8, [0.3], ["x", "y"], False)
    assert parse(f"--config={recipe}", "--careful").careful is True


def test_lists_of_recipe_files(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("scales: []\nnames: [a, b, 3]\n")
    assert (parse("--config", path).scales, parse("--config", path).names) == ([], ["a", "b", "3"])
    path.write_text("scales: [-1.0, 2]\n")
    assert parse("--config", path).scales == [-1.0, 2.0]
    path.write_text("scales: [-1.5e-7, 2.0e-7]\n")
    assert parse("--config", path).scales == [-1.5e-7, 2e-7]
    assert Arguments().scales is not Arguments().scales


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--step", 3), "There is no flag --step. Did you mean steps?"),
        (("--stepz=3",), "There is no flag --stepz=3. Did you mean steps?"),
        (("--qqqq", 3), "There is no flag --qqqq. See --help."),
        (("--name", "a", "b"), "'b' belongs to no flag, or its flag takes one value only. See --help."),
        (("--steps", "many"), "argument --steps: invalid int value: 'many'"),
        (("--scales", "0.1", "x"), "argument --scales: invalid float value: 'x'"),
        (("--steps",), "argument --steps: expected one argument"),
        (("--steps", 0), "steps must be a positive number, got 0."),
        (("--rate", -1), "rate must not be negative, got -1.0."),
        (("--rate", "nan"), "rate must not be negative, got nan."),
        (("--kind", "c"), "kind must be one of a, b, got 'c'."),
        (("--overrides", "{"), "overrides must be a JSON object such as '{\"name\": 8}', got {."),
        (
            ("--overrides", "[" * 5000),
            f"overrides must be a JSON object such as '{{\"name\": 8}}', got {'[' * 200}... (5000 characters).",
        ),
        (("--workers", 10**9), "workers must be at most 64, got 1000000000."),
        (("--name", "a\0b"), "'a\\x00b' holds a NUL character: leave it out."),
        (("--overrides", "[1]"), "overrides must be a JSON object such as '{\"name\": 8}', got [1]."),
    ],
)
def test_flags_that_do_not_fit(flags, message, capsys):
    assert refused(capsys, *flags) == message


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("stepz: 3", "The recipe {path} has the key stepz, which is no flag. Did you mean steps?"),
        ("config: other.yaml", "The recipe {path} has the key config, which is no flag."),
        ("help: true", "The recipe {path} has the key help, which is no flag."),
        ("- steps", "The recipe {path} must hold keys and values, got a list."),
        ("", "The recipe {path} must hold keys and values, got a NoneType."),
        ("steps: [1", "The recipe {path} cannot be read: while parsing a flow sequence"),
        ("steps: many", "argument --steps: invalid int value: 'many'"),
        ("steps: true", "argument --steps: invalid int value: 'true'"),
        ("steps: [1, 2]", "'2' belongs to no flag, or its flag takes one value only."),
        ("steps: -1", "steps must be a positive number, got -1."),
        ("names: [-a, b]", "The recipe {path} has '-a' in the list names: no item can begin with '-', as flags do."),
        ("names: [[a], b]", "The recipe {path} has a list or mapping within the list names: give plain values."),
        ("steps: " + "[" * 5000, "The recipe {path} is nested too deeply: give keys and values."),
        ("names: &a [a, *a]", "The recipe {path} cannot be read: it has more than 10000 values"),
        ("steps: 1\n" * 200_000, "The recipe {path} cannot be read: it has more than 1000000 characters"),
        ('name: "a\\0b"', "'--name=a\\x00b' holds a NUL character: leave it out."),
        ("overrides: 7", "overrides must be a JSON object"),
        (None, "The recipe {path} cannot be read: [Errno 2] No such file"),
    ],
)
def test_recipe_files_that_do_not_fit(written, message, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    if written is not None:
        path.write_text(written)
    assert refused(capsys, "--config", path).startswith(message.format(path=path))


def test_recipe_files_of_bytes(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00steps")
    with pytest.raises(ValueError, match="cannot be read"):
        read_recipe(tmp_path / "recipe.yaml")


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--steps INT           A number of steps. (default: 3)" in text
    assert "--scales FLOAT ...    Scales. (default: 0.5 1.0)" in text
    assert "--fast                Fast.\n" in text and "--careful, --no_careful" in text
    assert "--old" not in text and "--image-" not in text and "\nthings:\n" in text


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (positive, [1, 0.1], [0, -1, float("inf"), float("nan")]),
        (nonnegative, [0, 2.5], [-1e-9, float("inf"), float("nan")]),
        (fraction, [0, 0.5, 1], [-0.1, 1.1, float("nan")]),
        (proper_fraction, [0.5], [0, 1, float("nan")]),
        (decay_rate, [0, 0.999], [1, -0.1, float("nan")]),
        (within(0, 1, low_included=False), [1e-9, 1], [0, 1.1]),
        (one_of("a", "b"), ["a"], ["c", ""]),
        (ascending_pair("0.1 1", high=1), [[0.1, 1], [0.5, 0.5]], [[0, 1], [1], [0.5, 0.1], [0.1, 2], [1, 1, 1]]),
        (all_positive, [[1, 2], []], [[1, 0], [float("nan")], [float("inf")]]),
        (all_finite, [[-1, 0], []], [[float("nan")], [1, float("inf")]]),
        (json_object, ["{}", '{"a": [1]}'], ["", "{", "[]", "7", "null", "[" * 5000, '{"a": ' * 5000]),
        (at_most(3), [3, -1, 2.5], [4, 10**400, float("inf")]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_checks(check, good, bad):
    for value in good:
        check(value)
    for value in bad:
        with pytest.raises(ValueError, match="must"):
            check(value)


def test_ctrl_c_is_a_sentence(capsys):
    def run(arguments):
        raise KeyboardInterrupt

    assert run_script(run, Arguments()) == 130
    assert capsys.readouterr().err == "error: stopped by Ctrl-C.\n"
    assert run_script(run, SimpleNamespace(save_steps=5)) == 130
    words = "error: stopped by Ctrl-C; --resume_from_checkpoint latest resumes from the last checkpoint.\n"
    assert capsys.readouterr().err == words


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(27, "File too large"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed writing file data/0"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_named(error, capsys):
    def run(*arguments):
        raise error

    assert run_script(run, Arguments(), SimpleNamespace(output_dir="runs/mine")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: runs/mine cannot be written (") and said.count("\n") == 1
    assert said.endswith("): free space there, or choose another --output_dir.\n")
    assert run_script(run, SimpleNamespace(output_file="x/f.parquet")) == 2
    assert "x/f.parquet cannot be written" in capsys.readouterr().err
    assert run_script(run, Arguments()) == 2


def test_values_of_wrong_types_are_a_sentence(capsys):
    assert run_script(lambda: HiViTConfig(hidden_size="wide")) == 2
    said = capsys.readouterr().err
    assert "hidden_size" in said and "Validation" not in said and said.count("\n") == 1


def test_one_sentence():
    assert one_sentence(ValueError("It is\n  so.")) == "It is so."
    assert one_sentence(KeyError()) == "KeyError"
    worker = ValueError("Caught one.\nTraceback (most recent call last):\n  x\nValueError: so.")
    assert one_sentence(worker) == "so."


@pytest.mark.parametrize("error", [ValueError, RuntimeError, FloatingPointError, OSError, ImportError])
def test_scripts_end_with_a_sentence(error, capsys):
    def run(text):
        raise error(text)

    assert run_script(run, "It does not fit.") == 2
    assert capsys.readouterr().err == "error: It does not fit.\n"
    assert run_script(len, "no error") == 0
    with pytest.raises(KeyError):  # ours to mend, with its traceback
        run_script({}.__getitem__, "missing")
