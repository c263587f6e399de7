"""Pre-training runs: what they leave behind, signals, kills, rollbacks, uploads, full disks, errors of one rank."""

import json
import os
import signal
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.testing import assert_close

import kill_test
from hivit_hf import HiViTForMaskedImageModeling
from hivit_hf.pretraining import run as run_module
from support.pretraining import nan_at, train_and_save


def test_a_run_leaves_a_model_a_log_and_images(make_run, tmp_path):
    train_and_save(make_run(ema_decay=0.9, eval_steps=10))
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
    assert [line["step"] for line in log if "eval_loss" in line] == [10, 20, 24]
    with Image.open(output / "images" / "reconstructions-00000024.png") as image:
        assert image.width > 500
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "latest",
        "step-00000020",
        "step-00000024",
    ]


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_saves_and_stops_and_the_rest_is_exact(signal_number, make_run, tmp_path, capsys):
    train_and_save(make_run(output_dir=str(tmp_path / "reference"), ema_decay=0.9))
    run = make_run(ema_decay=0.9)
    step = run.training.step

    def interrupted(number, batches, stop=False):
        if number == 12:
            os.kill(os.getpid(), signal_number)
        return step(number, batches, stop)

    run.training.step = interrupted
    assert not run.train()
    assert "--resume_from_checkpoint latest" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() in ("step-00000013\n", "step-00000014\n")
    train_and_save(make_run(resume_from_checkpoint="latest", ema_decay=0.9))
    kill_test.compare(tmp_path / "reference", tmp_path / "run")
    averages = [(tmp_path / run / "model_ema" / "model.safetensors").read_bytes() for run in ("reference", "run")]
    assert averages[0] == averages[1]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "processes", "workers"), [("parquet", 1, 2), ("tar", 2, 0)])
def test_killed_runs_are_exact(layout, processes, workers, tmp_path):
    result = kill_test.kill_test(tmp_path, layout, processes, workers, kills=2)
    assert result["kills"] == 2


def test_a_loss_that_is_not_finite_rolls_back_and_continues(make_run, tmp_path, capsys):
    run = make_run()
    seen = nan_at(run, [12])
    train_and_save(run)
    assert seen == [*range(13), *range(10, 24)]
    assert "loss nan in step 13" in capsys.readouterr().out
    records = kill_test.records(tmp_path / "run")[0]
    once, again = (record["samples"] for record in records[11])
    assert once != again  # other data
    assert all(
        tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / "model" / "model.safetensors").values()
    )


def test_the_third_loss_that_is_not_finite_stops_the_run(make_run):
    """Also if the run was begun again in between."""
    run = make_run(stop_after_steps=12)
    nan_at(run, [6, 7])
    assert run.train()
    run = make_run(resume_from_checkpoint="latest")
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
    run = make_run(push_to_hub=True, hub_model_id="me/run", hub_private_repo=False, save_steps=10)
    assert run.train()
    run.end()
    assert uploaded == ["step-00000010", "step-00000020", "step-00000024", "last step-00000024"]


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_counted_over_resumptions(workers, make_run, tmp_path):
    rows = [{"bytes": kill_test.jpeg(n) if n % 10 else b"no image", "path": f"{n}.jpg"} for n in range(40)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "bad.parquet")
    (tmp_path / "data").mkdir()
    (tmp_path / "bad.parquet").rename(tmp_path / "data" / "bad.parquet")
    changes = {"dataset_name": [str(tmp_path / "data")], "max_bad_fraction": 0.2, "dataloader_num_workers": workers}
    assert make_run(stop_after_steps=9, **changes).train()
    assert make_run(resume_from_checkpoint="latest", **changes).train()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    counts = {line["step"]: line["bad_images"] for line in log if "bad_images" in line}
    assert counts[24] == pytest.approx(24 * 16 / 9, abs=4)  # one of ten, so one for nine good ones
    assert counts[5] < counts[9] < counts[15] < counts[24]


def test_a_full_disk_does_not_end_the_run(make_run, tmp_path, caplog):
    run = make_run(report_to="tensorboard")
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
    assert "The tracker cannot write in step 5 (No space left on device); the run continues without it" in caplog.text
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
    train_and_save(run)
    assert "in step 10 at learning rate" in capsys.readouterr().out
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


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


def wait_for_steps(process, output, number: int):
    while kill_test.num_logged(output) < number:
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.slow
def test_a_second_run_on_the_same_folder_is_refused(tmp_path):
    command = kill_test.command(kill_test.write_images(tmp_path / "data", "parquet"), tmp_path / "run", 1, 2, 20_000)
    first = kill_test.start(command)
    wait_for_steps(first, tmp_path / "run", 5)
    second = kill_test.start(command)
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 2 and f"run is in use by another run (process {first.pid} on " in errors.decode()
    assert first.poll() is None
    kill_test.kill(first)


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_stop(tmp_path):
    """Only torchrun is killed, as by a scheduler, and the same command is given again at once."""
    data = kill_test.write_images(tmp_path / "data", "parquet")
    command = kill_test.command(data, tmp_path / "reference", 2, 0, 400)
    kill_test.finish(kill_test.start(command))
    command = [part.replace("reference", "run") for part in command]
    process = kill_test.start(command)
    wait_for_steps(process, tmp_path / "run", 10)
    process.kill()
    process.wait()
    before = kill_test.num_logged(tmp_path / "run")
    time.sleep(3)
    stopped = kill_test.num_logged(tmp_path / "run")
    time.sleep(1)
    assert kill_test.num_logged(tmp_path / "run") == stopped < 400 and stopped < before + 200
    kill_test.finish(kill_test.start(command))
    kill_test.compare(tmp_path / "reference", tmp_path / "run")
