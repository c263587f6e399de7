"""What `attack_test.py` runs by hand, by group; and that its judgment is right."""

import importlib
import sys
import time

import pytest

from hivit_hf.data.datasets import open_splits
from support.attacks import (
    FAILED,
    HELD,
    REFUSED,
    Attack,
    attempt,
    command_lines,
    damage,
    files,
    image_files,
    pickles,
)
from support.attacks.ground import Ground
from support.limits import call_limited


EVERY_4 = {"save_strategy": "steps", "save_steps": 4}


def failures(attacks) -> list[tuple[str, str]]:
    found = []
    for attack in attacks:
        importlib.import_module(attack.script)
        outcome, said = attempt(attack)
        if outcome == FAILED:
            found.append((attack.name, said))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("attacks", [command_lines.attacks, files.dataset_attacks, files.model_attacks])
def test_scripts_refuse_in_words(attacks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert failures(attacks(Ground(tmp_path / "ground"))) == []


@pytest.mark.slow
@pytest.mark.parametrize("attacks", [pickles.attacks, damage.attacks, image_files.attacks])
def test_readers_refuse_in_words(attacks, tmp_path):
    assert failures(attacks(tmp_path / "ground")) == []


@pytest.fixture
def script(monkeypatch, tmp_path):
    """A module whose `main` is the given function; returns the outcome of attacking it."""

    def make(main, **changes):
        module = type(sys)("attacked")
        module.main = main
        monkeypatch.setitem(sys.modules, "attacked", module)
        return attempt(Attack("it", "attacked", ("x",), **changes))

    return make


def test_what_counts_as_refused(script, tmp_path, monkeypatch):
    def refuses(arguments):
        print("error: It does not fit.", file=sys.stderr)
        return 2

    assert script(refuses, words="does .* fit") == (REFUSED, "error: It does not fit.")
    assert script(refuses, words="other")[0] == FAILED
    (tmp_path / "ran").touch()
    assert script(refuses, never=tmp_path / "ran") == (FAILED, "it ran code")
    assert script(lambda arguments: 0)[0] == FAILED
    assert script(lambda arguments: 0, may_pass=True)[0] == HELD
    assert script(lambda arguments: 2)[0] == FAILED
    assert script(lambda arguments: {}["missing"])[0] == FAILED
    assert script(lambda arguments: len(bytes(3 * 2**30)))[0] == FAILED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "changes"),
    [
        ("pretrain_mim", {}),
        ("pretrain_mim", {"save_steps": 1}),
        ("finetune_classification", {}),
        ("extract_features", {}),
        ("linear_probe", {}),
        ("evaluate_classification", {}),
    ],
)
def test_a_full_disk_is_named(script, changes, tmp_path, monkeypatch):
    """No file can be longer than 5000 bytes, as if the disk were full then."""
    monkeypatch.chdir(tmp_path)
    ground = Ground(tmp_path / "ground")
    line = ground.line(script, **changes)
    open_splits(str(ground.images))  # in the cache of `datasets`, which is elsewhere
    main = importlib.import_module(script).main
    ending = call_limited(main, line, file_bytes=5000)
    assert ending.code == 2 and "Traceback" not in ending.said, ending.said
    said = ending.said.splitlines()[-1]
    assert "error: " in said and f"{ground.scratch / 'out1'}" in said, said  # a progress bar may stand before it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "name", "changes"),  # name of the file or folder in the output that is waited for
    [
        ("pretrain_mim", "", {}),
        ("pretrain_mim", "log.jsonl", {"dataloader_num_workers": 2}),
        ("finetune_classification", "", {}),
        (
            "finetune_classification",
            "checkpoint-4",
            {"dataloader_num_workers": 2, **EVERY_4},
        ),
    ],
)
def test_ctrl_c_is_a_sentence(script, name, changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ground = Ground(tmp_path / "ground")
    line = ground.line(script, num_train_epochs=5000, **changes)
    main = importlib.import_module(script).main
    ending = call_limited(main, line, interrupt_after=str(ground.scratch / "out1" / name))
    assert ending.code == 130 and "Traceback" not in ending.said, ending.said
    assert "error: stopped by Ctrl-C" in ending.said.splitlines()[-1]


@pytest.mark.parametrize("script", ["convert", "export_onnx", "push_to_hub"])
def test_ctrl_c_of_other_scripts(script, monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    module = importlib.import_module(script)
    monkeypatch.setattr(module, "run", interrupted)
    assert module.main(["a", "b"]) == 130
    assert capsys.readouterr().err.startswith("error: stopped by Ctrl-C")


@pytest.mark.slow
def test_a_full_disk_is_named_by_the_converter_and_exports(tmp_path):
    classifier = Ground(tmp_path / "ground").classifier
    damage.write_sound(tmp_path / "x.pth")
    lines = {"convert": [tmp_path / "x.pth"], "export_onnx": [classifier], "push_to_hub": [classifier]}
    for script, line in lines.items():
        out = tmp_path / f"out_{script}"
        line += [out, *(["--no_onnx"] if script == "push_to_hub" else [])]
        ending = call_limited(importlib.import_module(script).main, list(map(str, line)), file_bytes=5000)
        assert ending.code == 2 and "Traceback" not in ending.said, ending.said
        assert f"error: {out} c" in ending.said and "be written" in ending.said, ending.said


def test_limits(tmp_path):
    def hangs(arguments):
        while True:
            pass

    assert call_limited(hangs, [], seconds=1).code is None
    assert call_limited(lambda arguments: time.sleep(60), [], seconds=0).code is None
    assert call_limited(lambda arguments: len(bytearray(2**28)) and 3, []).code == 3
    assert "MemoryError" in call_limited(lambda arguments: len(bytearray(2**28)) and 3, [], max_bytes=2**27).said
    assert call_limited(lambda arguments: (tmp_path / "x").write_bytes(bytes(10**6)), [], file_bytes=1000).code == 1
