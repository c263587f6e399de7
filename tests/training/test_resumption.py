"""Output folders: new runs, resumptions of the same run, and refusals of all others."""

import json
from pathlib import Path

import pytest
from transformers import TrainerState

from hivit_hf.training.arguments import HiViTTrainingArguments, ModelArguments
from hivit_hf.training.manifest import MANIFEST, write_manifest
from hivit_hf.training.output_folders import ARGUMENTS, leave_folders
from hivit_hf.training.resumption import find_checkpoint, save_arguments
from support.damage import reseal


MODEL = ModelArguments(model_name_or_path="model")


@pytest.fixture(autouse=True)
def _left():
    yield
    leave_folders()


def made(folder: Path, **changes) -> HiViTTrainingArguments:
    return HiViTTrainingArguments(output_dir=str(folder), **changes)


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run with two checkpoints."""
    folder = tmp_path / "run"
    for step in (2, 10):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        TrainerState(global_step=step).save_to_json(checkpoint / "trainer_state.json")
        write_manifest(checkpoint, {"step": step})
    save_arguments(made(folder), MODEL)
    return folder


def test_new_runs(tmp_path):
    assert find_checkpoint(made(tmp_path / "a" / "new"), MODEL) is None
    assert (tmp_path / "a" / "new").is_dir()
    (tmp_path / "a" / "new" / "notes.txt").touch()
    assert find_checkpoint(made(tmp_path / "a" / "new"), MODEL) is None


def test_folders_of_other_runs(run):
    with pytest.raises(ValueError, match=r"run holds a run, at checkpoint-10: give --resume_from_checkpoint latest, o"):
        find_checkpoint(made(run), MODEL)
    with pytest.raises(ValueError, match=r"run holds checkpoint-10 of another run: give another --output_dir"):
        find_checkpoint(made(run, do_train=False), MODEL)
    assert find_checkpoint(made(run, show_layer_table=True), MODEL) is None


@pytest.mark.parametrize("name", ["eval_results.json", "all_results.json", "trainer_state.json"])
def test_folders_of_other_results(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"holds {name} of another run: give another --output_dir"):
        find_checkpoint(made(tmp_path), MODEL)


def test_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"file/run cannot be written \(Not a directory\). Choose another --output_dir"
    ):
        find_checkpoint(made(tmp_path / "file" / "run"), MODEL)


def test_resumptions(run, tmp_path):
    assert find_checkpoint(made(run, resume_from_checkpoint="latest"), MODEL) == str(run / "checkpoint-10")
    first = str(run / "checkpoint-2")
    assert find_checkpoint(made(run, resume_from_checkpoint=first), MODEL) == first
    assert find_checkpoint(made(tmp_path / "other", resume_from_checkpoint=first), MODEL) == first
    free = {"logging_steps": 7, "save_total_limit": 9, "stop_after_steps": 3, "torch_compile": True}
    assert find_checkpoint(made(run, resume_from_checkpoint=first, **free), MODEL) == first


def test_resumptions_of_nothing(run, tmp_path):
    message = "There is no checkpoint to resume at .*: leave out --resume_from_checkpoint to begin"
    for folder, name in ((tmp_path / "none", "latest"), (run, str(tmp_path / "none")), (run, str(run))):
        with pytest.raises(ValueError, match=message):
            find_checkpoint(made(folder, resume_from_checkpoint=name), MODEL)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 5}, "seed=42, now it is 5"),
        ({"layer_decay": 0.5}, "layer_decay=1.0, now it is 0.5"),
        ({"lr_scheduler_type": "constant"}, "lr_scheduler_type=linear, now it is constant"),
        ({"optim": "sgd"}, "optim=adamw_torch, now it is sgd"),
        ({"effective_batch_size": 64}, "learning_rate=6.25e-05, now it is 0.000125"),
        ({"base_learning_rate": 0.123}, "learning_rate=.*, now it is "),
    ],
)
def test_resumptions_with_other_arguments(changes, words, run):
    with pytest.raises(ValueError, match=f"run was begun with .*{words}.*: a resumption must have the same argum"):
        find_checkpoint(made(run, resume_from_checkpoint="latest", **changes), MODEL)


def test_resumptions_of_another_kind_of_run(run, tmp_path):
    other = ModelArguments(model_name_or_path="other")
    args = made(tmp_path / "other", resume_from_checkpoint=str(run / "checkpoint-2"))
    with pytest.raises(ValueError, match="run was begun with model_name_or_path=model, now it is other"):
        find_checkpoint(args, other)
    begun = json.loads((run / ARGUMENTS).read_text())
    (run / ARGUMENTS).write_text(json.dumps(begun | {"jitter_scale": [0.1, 2.0]}))
    with pytest.raises(ValueError, match="run holds another kind of run: resume it with the script that began it"):
        find_checkpoint(args, MODEL)
    (run / ARGUMENTS).unlink()
    assert find_checkpoint(args, MODEL) == str(run / "checkpoint-2")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "adapter_config.json", "README.md"])
def test_models_of_others_are_not_overwritten(name, run, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).touch()
    for changes in ({}, {"resume_from_checkpoint": str(run / "checkpoint-2")}):
        with pytest.raises(ValueError, match=f"holds {name} of a model or another run, which is not overwritten"):
            find_checkpoint(made(tmp_path / "model", **changes), MODEL)
    assert [path.name for path in (tmp_path / "model").iterdir()] == [name]
    assert find_checkpoint(made(tmp_path / "model", do_train=False), MODEL) is None  # which writes none of these


def test_an_evaluation_leaves_the_arguments_of_a_training(run):
    begun = (run / ARGUMENTS).read_text()
    save_arguments(made(run, do_train=False, seed=7), MODEL)
    assert (run / ARGUMENTS).read_text() == begun


def test_a_run_resumed_from_elsewhere_replaces_no_other_run(run, tmp_path):
    (run / "checkpoint-2").rename(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="run holds a run, at checkpoint-10: give --resume_from_checkpoint latest"):
        find_checkpoint(made(run, resume_from_checkpoint=str(tmp_path / "checkpoint-2")), MODEL)


def test_damaged_checkpoints(run, capsys):
    latest = made(run, resume_from_checkpoint="latest")
    (run / "checkpoint-10" / MANIFEST).unlink()  # killed while it was saved
    assert find_checkpoint(latest, MODEL) == str(run / "checkpoint-2")
    said = capsys.readouterr().out
    assert "checkpoint-10 is no checkpoint: manifest.json cannot be read (No such file or directory)." in said
    assert said.endswith("Resuming from checkpoint-2, the newest whole one.\n")
    with pytest.raises(ValueError, match=r"checkpoint-10 is no checkpoint: manifest.json cannot be read"):
        find_checkpoint(made(run, resume_from_checkpoint=str(run / "checkpoint-10")), MODEL)
    for state in ("[]", '{"x": 1}', '{"global_step": 7}', "null"):
        (run / "checkpoint-2" / "trainer_state.json").write_text(state)
        reseal(run / "checkpoint-2")
        with pytest.raises(ValueError, match=r"checkpoint-2 is damaged: trainer_state.json is "):
            find_checkpoint(latest, MODEL)
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"manifest.json cannot be read .* The 1 before it are damaged, too\."):
        find_checkpoint(latest, MODEL)


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"\xff\x00", b"[" * 100_000])
def test_damaged_arguments(content, run):
    (run / ARGUMENTS).write_bytes(content)
    with pytest.raises(ValueError, match=r"arguments.json is damaged: it is no JSON object"):
        find_checkpoint(made(run, resume_from_checkpoint="latest"), MODEL)
