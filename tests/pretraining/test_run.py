"""Pre-training runs on streams: killed, stopped, rolled back, refused; recipes; what they leave behind."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.testing import assert_close

import kill_test
from hivit_hf import HiViTForMaskedImageModeling
from hivit_hf.pretraining import run as run_module
from hivit_hf.pretraining.arguments import PretrainRecipe
from hivit_hf.pretraining.checkpoint import read_manifest
from hivit_hf.pretraining.run import PretrainRun
from hivit_hf.pretraining.step import MaskedTraining, StepResult
from hivit_hf.probing.neighbors import nearest_neighbor_accuracy
from hivit_hf.training.recipe_old import read_recipe


EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = [*sorted((EXAMPLES / "recipes").glob("mae_*.yaml")), EXAMPLES / "recipes" / "smoke_cpu.yaml"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return kill_test.write_images(tmp_path_factory.mktemp("data") / "parquet", "parquet")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


@pytest.fixture
def make_run(data, tmp_path):
    """A function that makes a run of the smoke recipe: 24 steps, a checkpoint every 5."""

    def make(**changes):
        numbers = {"images_per_epoch": 48, "epochs": 8, "checkpoint_every_steps": 5, "log_samples": True}
        numbers |= {"dataset_name": [str(data)], "output_dir": str(tmp_path / "run"), "monitor_images": 16}
        recipe = PretrainRecipe(**{**read_recipe(EXAMPLES / "recipes" / "smoke_cpu.yaml"), **numbers, **changes})
        return PretrainRun(recipe, Accelerator(cpu=True))

    return make


def losses(output, rank=0):
    records = kill_test.records(Path(output))[rank]
    return {step: float.fromhex(done[-1]["loss"]) for step, done in sorted(records.items())}


def test_a_run_leaves_a_model_a_log_and_images(make_run, tmp_path):
    assert make_run(ema_decay=0.9, monitor_every_steps=10).train()
    output = tmp_path / "run"
    loaded = {name: HiViTForMaskedImageModeling.from_pretrained(output / name) for name in ("model", "model_ema")}
    assert not torch.equal(*(model.decoder.head.weight for model in loaded.values()))
    from_checkpoint = HiViTForMaskedImageModeling.from_pretrained(output / "checkpoints" / "step-00000024")
    for name, tensor in loaded["model"].state_dict().items():
        assert_close(from_checkpoint.state_dict()[name], tensor, atol=0, rtol=0)
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    training = [line for line in log if "loss" in line]
    assert [line["step"] for line in training] == [5, 10, 15, 20, 24]
    assert training[-1]["loss"] < training[0]["loss"]
    assert [line["step"] for line in log if "held_out_loss" in line] == [10, 20, 24]
    with Image.open(output / "images" / "reconstructions-00000024.png") as image:
        assert image.width > 500
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "latest",
        "step-00000020",
        "step-00000024",
    ]


def test_learning_rates_follow_the_papers_rule(make_run, tmp_path):
    run = make_run(epochs=8, warmup_epochs=2)
    seen = []
    step = run.training.step

    def note(number, batches, stop=False):
        result = step(number, batches, stop)
        seen.append((result.learning_rate, run.training.optimizer.param_groups[0]["lr"]))
        return result

    run.training.step = note
    run.train()
    peak = 0.01 * 16 / 256
    expected = [peak * (n / 3) / 2 for n in range(6)]
    expected += [peak * 0.5 * (1 + math.cos(math.pi * (n / 3 - 2) / 6)) for n in range(6, 24)]
    assert [told for told, _ in seen] == [used for _, used in seen] == pytest.approx(expected)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops_and_the_rest_is_exact(signal_number, make_run, tmp_path, capsys):
    assert make_run(output_dir=str(tmp_path / "reference"), ema_decay=0.9).train()
    run = make_run(ema_decay=0.9)
    step = run.training.step

    def interrupted(number, batches, stop=False):
        if number == 12:
            os.kill(os.getpid(), signal_number)
        return step(number, batches, stop)

    run.training.step = interrupted
    assert not run.train()
    assert "--resume latest" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() in ("step-00000013\n", "step-00000014\n")
    assert make_run(resume="latest", ema_decay=0.9).train()
    kill_test.compare(tmp_path / "reference", tmp_path / "run")
    averages = [(tmp_path / run / "model_ema" / "model.safetensors").read_bytes() for run in ("reference", "run")]
    assert averages[0] == averages[1]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "processes", "workers"), [("parquet", 1, 2), ("tar", 2, 0)])
def test_killed_runs_are_exact(layout, processes, workers, tmp_path):
    result = kill_test.kill_test(tmp_path, layout, processes, workers, kills=2)
    assert result["kills"] == 2


def test_a_killed_checkpoint_is_not_read(make_run, tmp_path):
    """What was half written when the power went is neither loaded nor in the way."""
    assert make_run(max_steps=7).train()
    partial = tmp_path / "run" / "checkpoints" / ".step-00000010.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert make_run(resume="latest").train()
    assert not partial.exists()


def nan_at(run, numbers):
    step, seen = run.training.step, []

    def broken(number, batches, stop=False):
        result = step(number, batches, stop)
        seen.append(number)
        if number in numbers:
            numbers.remove(number)
            for parameter in run.training.model.parameters():
                parameter.data.fill_(float("nan"))
            return replace(result, loss=float("nan"))
        return result

    run.training.step = broken
    return seen


def test_a_loss_that_is_not_finite_rolls_back_and_reads_on(make_run, tmp_path, capsys):
    run = make_run()
    seen = nan_at(run, [12])
    assert run.train()
    assert seen == [*range(13), *range(10, 24)]
    assert "loss nan in step 13" in capsys.readouterr().out
    records = kill_test.records(tmp_path / "run")[0]
    once, again = (record["samples"] for record in records[11])
    assert once != again  # the data went on
    assert all(
        tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / "model" / "model.safetensors").values()
    )


def test_the_third_loss_that_is_not_finite_stops_the_run(make_run):
    """Also if the run was begun again in between."""
    run = make_run(max_steps=12)
    nan_at(run, [6, 7])
    assert run.train()
    run = make_run(resume="latest")
    nan_at(run, [13])
    with pytest.raises(FloatingPointError, match=r"loss nan in step 14 .* for the 3rd time. The last good weights"):
        run.train()


def test_checkpoints_go_to_the_hub_if_asked(make_run, tmp_path, monkeypatch):
    uploaded = []

    class Upload:
        def __init__(self, repository, private, checkpoints):
            assert (repository, private) == ("me/run", False)

        def begin(self, checkpoint):
            uploaded.append(checkpoint.name)

        def finish(self, checkpoint):
            uploaded.append(f"last {checkpoint.name}")

    monkeypatch.setattr(run_module, "HubUpload", Upload)
    run = make_run(hub_model_id="me/run", hub_private=False, checkpoint_every_steps=10)
    assert run.train()
    run.finish_upload()
    assert uploaded == ["step-00000010", "step-00000020", "step-00000024", "last step-00000024"]


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_counted_over_resumptions(workers, make_run, tmp_path):
    rows = [{"bytes": kill_test.jpeg(n) if n % 10 else b"no image", "path": f"{n}.jpg"} for n in range(40)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "bad.parquet")
    (tmp_path / "data").mkdir()
    (tmp_path / "bad.parquet").rename(tmp_path / "data" / "bad.parquet")
    changes = {"dataset_name": [str(tmp_path / "data")], "max_bad_fraction": 0.2, "num_workers": workers}
    assert make_run(max_steps=9, **changes).train()
    assert make_run(resume="latest", **changes).train()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    counts = {line["step"]: line["bad_images"] for line in log if "bad_images" in line}
    assert counts[24] == pytest.approx(24 * 16 / 9, abs=4)  # one of ten, so one for nine good ones
    assert counts[5] < counts[9] < counts[15] < counts[24]


def test_a_full_disk_does_not_end_the_run(make_run, tmp_path, caplog):
    run = make_run(tracker="tensorboard")
    tracked = []

    class Tracker:
        name = "tensorboard"

        def log(self, values, step, **_):
            tracked.append(step)
            raise OSError(28, "No space left on device")

    run.accelerator.trackers = [Tracker()]
    save_state = run.accelerator.save_state

    def full(folder):
        if run.step == 5:
            raise OSError(28, "No space left on device")
        if run.step == 10:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save_state(folder)

    run.accelerator.save_state = full
    (tmp_path / "run" / "log.jsonl").mkdir()  # nothing can be written there either
    assert run.train()
    for step in (5, 10):
        assert f"The checkpoint of step {step} could not be written" in caplog.text
    assert "log.jsonl could not be written in step 5" in caplog.text
    assert "The tracker cannot write in step 5 (No space left on device); the run goes on without it" in caplog.text
    assert tracked == [5]
    assert {path.name for path in (tmp_path / "run" / "checkpoints").glob("*step*")} == {
        "step-00000020",
        "step-00000024",
    }


def test_weights_that_are_not_finite_are_not_saved(make_run, tmp_path, capsys):
    run = make_run()
    step, broken = run.training.step, [9]

    def poisoned(number, batches, stop=False):
        result = step(number, batches, stop)
        if number in broken:
            broken.remove(number)
            next(run.training.model.parameters()).data[0] = float("nan")  # as an infinite gradient would leave it
        return result

    run.training.step = poisoned
    assert run.train()
    assert "in step 10 at learning rate" in capsys.readouterr().out
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_going_back_to_an_earlier_checkpoint(make_run, tmp_path):
    assert make_run(max_steps=20, keep_last=5).train()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert make_run(resume=str(checkpoints / "step-00000005"), max_steps=12).train()
    assert [path.name for path in sorted(checkpoints.glob("step-*"))] == ["step-00000010", "step-00000012"]
    log = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sorted(log) == log
    assert make_run(resume="latest").train()


def test_a_rollback_after_going_back_stays_on_the_new_path(make_run, tmp_path, capsys):
    assert make_run(max_steps=20, keep_last=5).train()
    run = make_run(resume=str(tmp_path / "run" / "checkpoints" / "step-00000005"), max_steps=12, keep_last=5)
    seen = nan_at(run, [7])
    assert run.train()
    assert seen == [5, 6, 7, *range(5, 12)] and "back to step-00000005" in capsys.readouterr().out
    log = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sorted(log) == log
    elsewhere = make_run(
        resume=str(tmp_path / "run" / "checkpoints" / "step-00000012"), output_dir=str(tmp_path / "elsewhere")
    )
    nan_at(elsewhere, [13])
    assert elsewhere.train()


def test_a_kill_while_a_checkpoint_takes_the_place_of_another(make_run, tmp_path, monkeypatch):
    assert make_run(max_steps=6).train()
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000006").rename(checkpoints / ".step-00000006.old")  # as it is for a moment
    run = make_run(resume="latest", max_steps=9)
    assert run.resumed[1]["step"] == 6 and run.train()
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "latest",
        "step-00000005",
        "step-00000009",
    ]
    replaced, replace = [], os.replace

    def fails_at_the_second(source, target):
        replaced.append(target)
        if len(replaced) == 2:
            raise OSError(28, "No space left on device")
        replace(source, target)

    run = make_run(resume="latest")
    run.begin()
    monkeypatch.setattr(os, "replace", fails_at_the_second)
    assert not run.save()
    assert read_manifest(run.checkpoints.latest())["step"] == 9


def test_what_a_diverged_run_needs_may_change(make_run, capsys):
    assert make_run(max_steps=6).train()
    changes = {"base_learning_rate": 0.001, "warmup_epochs": 3, "clip_norm": 1.0, "max_bad_fraction": 0.5}
    with pytest.raises(ValueError, match=r"warmup_epochs=2.0, now it is 3.0: .* Or give --allow_recipe_change true"):
        make_run(resume="latest", **changes)
    assert make_run(resume="latest", allow_recipe_change=True, max_steps=8, **changes).train()
    assert "resumed with another recipe than before" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"with mask_ratio=0.75, now it is 0.5: a resumption must .* --output_dir\.$"):
        make_run(resume="latest", allow_recipe_change=True, mask_ratio=0.5, **changes)


def test_other_data_are_noticed(make_run, data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    assert make_run(max_steps=2, dataset_name=[str(copy)]).train()
    shutil.copy(copy / "1.parquet", copy / "0.parquet")  # as many shards as before
    (copy / "7.parquet").rename(copy / "8.parquet")
    with pytest.raises(ValueError, match=r"read other data: its revisions were \['files \w+'\], now they are"):
        make_run(resume="latest", dataset_name=[str(copy)]).train()


def test_half_precision_with_clipping_survives_a_loss_that_is_not_finite(make_run):
    """The scaler must not be left between unscaling and its update."""
    run = make_run(clip_norm=0.1)
    run.accelerator.state._mixed_precision, run.accelerator.native_amp = "fp16", True
    run.accelerator.scaler = torch.amp.GradScaler("cpu")
    run.training.optimizer = AcceleratedOptimizer(run.training.optimizer.optimizer, scaler=run.accelerator.scaler)
    run.accelerator._optimizers = [run.training.optimizer]
    batch = run._to_device(next(iter(run.loader)))
    broken = {**batch, "pixel_values": batch["pixel_values"] * float("nan")}
    before = run.training.model.decoder.head.weight.detach().clone()
    assert math.isnan(run.training.step(20, [broken]).loss)
    assert torch.equal(run.training.model.decoder.head.weight, before)
    assert math.isfinite(run.training.step(20, [batch]).loss)
    assert not torch.equal(run.training.model.decoder.head.weight, before)


def test_a_compiled_run_leaves_a_model_that_loads(make_run, data, tmp_path):
    recipe = make_run().recipe
    AcceleratorState._reset_state(True)
    run = PretrainRun(
        replace(recipe, monitor_every_steps=5, ema_decay=0.5), Accelerator(cpu=True, dynamo_backend="eager")
    )
    assert run.train()
    for name in ("model", "model_ema"):
        loaded, info = HiViTForMaskedImageModeling.from_pretrained(tmp_path / "run" / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(run.training.ema.module.state_dict(), loaded.state_dict(), atol=0, rtol=0)


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_first(tmp_path):
    """Workers of the data loader get the signal too, and must not die of it before the run has saved."""
    data = kill_test.write_images(tmp_path / "data", "parquet")
    command = kill_test.command(data, tmp_path / "reference", 2, 2, 60)
    kill_test.finish(kill_test.start(command))
    command = [part.replace("reference", "run") for part in command]
    process = kill_test.start(command)
    while kill_test.num_logged(tmp_path / "run") < 10:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    done = kill_test.num_logged(tmp_path / "run")
    saved = (tmp_path / "run" / "checkpoints" / "latest").read_text()
    assert saved == f"step-{done:08d}\n"
    kill_test.finish(kill_test.start(command))
    assert kill_test.compare(tmp_path / "reference", tmp_path / "run") == (60, 0)


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_others(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for shard in range(2):
        rows = [{"bytes": kill_test.jpeg(n) if shard else b"broken", "path": f"{n}.jpg"} for n in range(300)]
        pq.write_table(pa.table({"image": rows}), data / f"{shard}.parquet")
    process = kill_test.start(kill_test.command(data, tmp_path / "run", 2, 0, 5000))
    _, errors = process.communicate(timeout=120)
    assert process.returncode
    assert "images cannot be read, more than max_bad_fraction" in errors.decode()


def test_checkpoints_that_are_kept(make_run, tmp_path):
    assert make_run(checkpoint_every_steps=2, keep_every_steps=8, keep_last=1).train()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert names == ["step-00000000", "step-00000008", "step-00000016", "step-00000024"]
    manifest = read_manifest(tmp_path / "run" / "checkpoints" / "step-00000016")
    assert manifest["step"] == 16 and manifest["topology"]["processes"] == 1 and "torch" in manifest["versions"]


def test_resumptions_that_do_not_fit(make_run, tmp_path):
    assert make_run(max_steps=6).train()
    with pytest.raises(
        ValueError, match=r"holds a run, at step-00000006: give --resume latest, or another --output_dir"
    ):
        make_run().train()
    with pytest.raises(
        ValueError, match=r"was made with base_learning_rate=0.01, now it is 0.02: a resumption must be"
    ):
        make_run(resume="latest", base_learning_rate=0.02).train()
    with pytest.raises(ValueError, match=r"was made with num_workers=0, now it is num_workers=1: each reader has"):
        make_run(resume="latest", num_workers=1).train()
    with pytest.raises(ValueError, match=r"is no checkpoint: manifest.json cannot be read"):
        make_run(resume=str(tmp_path)).train()
    manifest = tmp_path / "run" / "checkpoints" / "step-00000006" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"processes": 1', '"processes": 4'))
    with pytest.raises(
        ValueError, match=r"made with processes=4, now it is processes=1: .* or give --allow_topology_change true"
    ):
        make_run(resume="latest").train()
    manifest.write_text(manifest.read_text().replace('"sharded_by": null', '"sharded_by": "FSDP"'))
    with pytest.raises(ValueError, match=r"was made with FSDP: resume it with FSDP"):
        make_run(resume="latest", allow_topology_change=True).train()


def test_other_workers_and_batches_go_on_at_shard_boundaries(make_run, tmp_path, capsys):
    assert make_run(max_steps=7).train()
    run = make_run(resume="latest", batch_size=16, num_workers=2, allow_topology_change=True, max_steps=13)
    assert run.train()
    repeated = int(re.search(r"but (\d+) images are, whose shards were not finished", capsys.readouterr().out)[1])
    samples = [record["samples"] for _, (record,) in sorted(kill_test.records(tmp_path / "run")[0].items())]
    assert len({name for step in samples for name in step}) == 153  # 112 before the change, and the others after it
    assert 0 < repeated < 64  # a window, and what came before it of its first shard
    again = make_run(resume="latest", batch_size=16, num_workers=2, allow_topology_change=True)
    assert not again.changed_topology and again.train()


@pytest.mark.slow
def test_other_processes_go_on_at_shard_boundaries(tmp_path):
    data, output = kill_test.write_images(tmp_path / "data", "parquet"), tmp_path / "run"
    two = kill_test.command(data, output, 2, 0, 30)
    kill_test.finish(kill_test.start([*two, "--max_steps=8"]))
    one = kill_test.command(data, output, 1, 2, 30)
    kill_test.finish(kill_test.start([*one, "--allow_topology_change=true"]))
    first, second = kill_test.records(output)
    assert sorted(first) == list(range(1, 31)) and sorted(second) == list(range(1, 9))
    assert read_manifest(output / "checkpoints" / "step-00000030")["topology"]["processes"] == 1
    read = [name for steps in (first, second) for (record,) in steps.values() for name in record["samples"]]
    assert len(set(read)) == kill_test.IMAGES - 7


@pytest.mark.parametrize("batch_size", [2, 4, 16])
def test_accumulation_changes_nothing_but_the_last_digits(batch_size, make_run, tmp_path):
    assert make_run(batch_size=8, output_dir=str(tmp_path / "reference")).train()
    assert make_run(batch_size=batch_size).train()
    reference, found = losses(tmp_path / "reference"), losses(tmp_path / "run")
    assert list(found.values()) == pytest.approx(list(reference.values()), rel=2e-5)
    samples = [kill_test.records(tmp_path / name)[0][24][0]["samples"] for name in ("reference", "run")]
    assert samples[0] == samples[1]


def test_gradients_are_clipped_and_the_average_follows(make_run):
    run = make_run(clip_norm=1e-3, ema_decay=0.5)
    run.begin()
    batches = iter(run.loader)
    run.step = 12
    result = run.training.step(12, [run._to_device(next(batches)) for _ in range(2)])
    assert isinstance(run.training, MaskedTraining) and isinstance(result, StepResult)
    assert result.gradient_norm > 1e-3
    clipped = math.sqrt(
        sum(p.grad.square().sum().item() for p in run.training.model.parameters() if p.grad is not None)
    )
    assert clipped == pytest.approx(1e-3, rel=1e-3)
    for name, parameter in run.training.model.named_parameters():
        average = run.training.ema.module.get_parameter(name)
        if parameter.requires_grad:
            assert_close(average.data, parameter.data)  # the first one
    before = {name: p.clone() for name, p in run.training.ema.module.named_parameters()}
    run.training.step(13, [run._to_device(next(batches)) for _ in range(2)])
    for name, parameter in run.training.model.named_parameters():
        if parameter.requires_grad:
            expected = run.recipe.ema_decay * before[name] + (1 - run.recipe.ema_decay) * parameter
            assert_close(run.training.ema.module.get_parameter(name).data, expected.data)


# -- recipes and flags ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_takes_two_steps(path, data, tmp_path):
    values = read_recipe(path)
    for key in ("title", "source", "cost", "expected_result"):
        assert values[key]
    recipe = PretrainRecipe(**values)
    rate = recipe.learning_rate
    assert path.stem == "smoke_cpu" or rate == pytest.approx(1e-4 * 4096 / 256)
    small = {"batch_size": 1, "effective_batch_size": 2, "num_workers": 0, "max_steps": 2, "compile": False}
    small |= {"dataset_name": [str(data)], "output_dir": str(tmp_path), "monitor_images": 2, "tracker": "none"}
    accelerator = Accelerator(cpu=True, mixed_precision=recipe.mixed_precision)
    run = PretrainRun(replace(recipe, **small), accelerator)
    run.checkpoints.save = lambda *arguments: True  # gigabytes, and tested elsewhere
    assert run.train()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert math.isfinite(log[0]["loss"])
    for file in itertools.chain(tmp_path.rglob("*.safetensors")):
        file.unlink()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": []}, "nothing to read: give --dataset_name"),
        ({"output_dir": None}, "nowhere to write: give --output_dir"),
        ({"dataset_weights": [1.0, 2.0]}, "1 datasets need as many weights"),
        ({"dataset_weights": [0.0]}, "dataset_weights must be positive"),
        ({"mixed_precision": "bf61"}, "mixed_precision must be bf16, fp16 or no, got 'bf61'"),
        ({"tracker": "wandbb"}, "tracker must be tensorboard, wandb or none"),
        ({"batch_size": 0}, "batch_size must be a positive number, got 0"),
        ({"base_learning_rate": float("nan")}, "base_learning_rate must be a positive number"),
        ({"num_workers": -1}, "num_workers must not be negative"),
        ({"flip_probability": 2.0}, r"flip_probability must be in \[0, 1\]"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \(0, 1\), got 1.0. Try 0.9999"),
        ({"warmup_epochs": 8}, "warmup_epochs must be less than epochs 8.0, got 8.0"),
        ({"crop_scale": [0.5]}, "crop_scale must be two shares"),
        ({"images_per_epoch": None}, r"give --images_per_epoch \(ImageNet-1k: 1281167\)"),
        ({"image_mean": [0.5]}, "image_mean needs 3 numbers"),
        ({"keep_every_steps": 7}, "keep_every_steps 7 must be a multiple of checkpoint_every_steps 5"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"image_mean": [float("nan"), 0, 0]}, "image_mean must be numbers"),
        ({"dataset_split": "nonsense"}, "has no sub-folder 'nonsense'. Leave the split out to read all of it"),
        ({"allow_recipe_change": True}, "allow_recipe_change is about resumptions: give --resume as well"),
        ({"allow_topology_change": True}, "is about resumptions: give --resume as well"),
        ({"dataset_revision": "v1"}, "dataset_revision is of datasets of the Hub, but .* are folders"),
        ({"dataset_config": "small"}, "dataset_config is of datasets of the Hub, but .* are folders"),
        ({"label_column": "label"}, "give --eval_dataset_name as well"),
        ({"model": "{"}, "--model must be a JSON object"),
        ({"model": "[1]"}, "--model must be a JSON object"),
        ({"batch_size": "8"}, "batch_size must be a int, got '8'"),
        ({"num_workers": True}, "num_workers must be a int, got True"),
        ({"base_learning_rate": "fast"}, "base_learning_rate must be a float, got 'fast'"),
        ({"adam_betas": [0.9]}, "adam_betas must be two numbers"),
        ({"image_std": [0, 1, 1]}, "image_std must be positive"),
        ({"weight_decay": float("nan")}, "weight_decay must not be negative, got nan"),
        ({"min_learning_rate": 1}, "min_learning_rate must not exceed the highest rate, 0.000625"),
        ({"model": '{"mask_ratio": 0.5}'}, "--model sets mask_ratio, which have flags of their own"),
        ({"model": '{"hiden_size": 64}'}, "no keyword 'hiden_size'"),
        ({"architecture": "huge"}, "no HiViT architecture named 'huge'"),
        ({"mask_ratio": 0.99}, "leaves none"),
        ({"effective_batch_size": 12}, "effective_batch_size 12 is no multiple of 8 images on 1 processes"),
        (
            {"num_workers": 40},
            "16 shards, but 1 processes with 40 workers each need 40: use --dataloader_num_workers 16",
        ),
        ({"image_column": "photo"}, "no column 'photo'"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_before_anything_is_read(changes, message, make_run, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_run(**changes)
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_cannot_be_written(make_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written \(Not a directory\). Choose another"):
        make_run(output_dir=str(tmp_path / "file" / "run")).train()


def test_recipe_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    for text, message in [
        ("epochs: [", "cannot be read"),
        ("just text", "must hold keys and values, got a str"),
        ("epoch: 3", "has epoch, which no recipe has. The keys are .*epochs"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_recipe(path)
    path.write_text("base_learning_rate: 1e-4\nmodel: {patch_size: 8}\ndataset_name: one/name\nepochs: 3\n")
    recipe = PretrainRecipe(**read_recipe(path))
    assert recipe.dataset_name == ["one/name"] and recipe.epochs == 3.0
    assert recipe.base_learning_rate == 1e-4 and recipe.model_config().patch_size == 8


def test_the_command_line(data, tmp_path, capsys, monkeypatch):
    import pretrain_mim

    recipe = ["--config", str(EXAMPLES / "recipes" / "smoke_cpu.yaml"), "--dataset_name", str(data)]
    arguments = [*recipe, "--output_dir", str(tmp_path / "run"), "--max_steps", "3", "--monitor_images", "4"]
    assert pretrain_mim.main([*arguments, "--epochs", "5"]) == 0
    assert read_manifest(tmp_path / "run" / "checkpoints" / "step-00000003")["recipe"]["epochs"] == 5
    capsys.readouterr()
    assert pretrain_mim.main(arguments) == 2
    assert "error: " in capsys.readouterr().err
    monkeypatch.setattr(pretrain_mim, "is_wandb_available", lambda: False)
    assert pretrain_mim.main([*recipe, "--output_dir", str(tmp_path / "wandb"), "--tracker", "wandb"]) == 2
    assert "error: tracker wandb is not installed: pip install wandb" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        pretrain_mim.main([*recipe, "--output_dir", str(tmp_path / "other"), "--warmup_epochs", "50"])
    assert stopped.value.code == 2
    assert "warmup_epochs must be less than epochs" in capsys.readouterr().err
    assert sys.modules["pretrain_mim"].__doc__.count("--resume latest") == 1


def test_accelerate_files():
    kinds = {path.stem: load_config_from_file(str(path)) for path in (EXAMPLES / "accelerate").glob("*.yaml")}
    assert {name: config.num_processes for name, config in kinds.items()} == {
        "one_gpu": 1,
        "eight_gpus": 8,
        "two_nodes": 16,
        "fsdp2": 8,
        "deepspeed": 8,
    }
    assert kinds["deepspeed"].deepspeed_config["zero_stage"] in (1, 2)
    assert kinds["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert kinds["two_nodes"].num_machines == 2


def test_nearest_neighbors_find_what_is_alike():
    labels = torch.arange(60) % 3
    features = torch.nn.functional.one_hot(labels, 8).float() + 0.1 * torch.randn(60, 8)
    for rows, low, high in ((features, 0.95, 1.0), (torch.randn(60, 8), 0.0, 0.7)):
        assert low < nearest_neighbor_accuracy(rows[:30], labels[:30], rows[30:], labels[30:]) <= high
