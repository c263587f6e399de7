"""Checkpoints and resumptions: what is kept, what must be the same, what may change."""

import json
import os
import re
import shutil

import pytest

import kill_test
import pretrain_mim
from hivit_hf.training.manifest import read_manifest
from support.damage import damages, flip_a_bit, plants, reseal
from support.pretraining import nan_at, train_and_save
from support.refusals import refusal


def test_a_killed_checkpoint_is_not_read(make_run, tmp_path):
    """What was half written when the power went is neither loaded nor in the way."""
    assert make_run(stop_after_steps=7).train()
    partial = tmp_path / "run" / "checkpoints" / ".step-00000010.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert make_run(resume_from_checkpoint="latest").train()
    assert not partial.exists()


def test_going_back_to_an_earlier_checkpoint(make_run, tmp_path):
    assert make_run(stop_after_steps=20, save_total_limit=5).train()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert make_run(resume_from_checkpoint=str(checkpoints / "step-00000005"), stop_after_steps=12).train()
    assert [path.name for path in sorted(checkpoints.glob("step-*"))] == ["step-00000010", "step-00000012"]
    log = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sorted(log) == log
    assert make_run(resume_from_checkpoint="latest").train()


@pytest.mark.slow
def test_a_rollback_after_going_back_stays_on_the_new_path(make_run, tmp_path, capsys):
    assert make_run(stop_after_steps=20, save_total_limit=5).train()
    run = make_run(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoints" / "step-00000005"),
        stop_after_steps=12,
        save_total_limit=5,
    )
    seen = nan_at(run, [7])
    assert run.train()
    assert seen == [5, 6, 7, *range(5, 12)] and "back to step-00000005" in capsys.readouterr().out
    log = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sorted(log) == log
    elsewhere = make_run(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoints" / "step-00000012"),
        output_dir=str(tmp_path / "elsewhere"),
    )
    nan_at(elsewhere, [13])
    assert elsewhere.train()


def test_a_kill_while_a_checkpoint_takes_the_place_of_another(make_run, tmp_path, monkeypatch):
    assert make_run(stop_after_steps=6).train()
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000006").rename(checkpoints / ".step-00000006.old")  # as it is for a moment
    run = make_run(resume_from_checkpoint="latest", stop_after_steps=9)
    assert run.resumed.manifest["step"] == 6 and run.train()
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

    run = make_run(resume_from_checkpoint="latest")
    run.begin()
    monkeypatch.setattr(os, "replace", fails_at_the_second)
    assert not run.save()
    assert read_manifest(run.checkpoints.latest())["step"] == 9


def test_what_a_diverged_run_needs_may_change(make_run, capsys):
    assert make_run(stop_after_steps=6).train()
    changes = {"base_learning_rate": 0.001, "warmup_epochs": 3, "max_grad_norm": 1.0, "max_bad_fraction": 0.5}
    with pytest.raises(ValueError, match=r"base_learning_rate=0.01, now it is 0.001: .* Or give --allow_recipe_change"):
        make_run(resume_from_checkpoint="latest", **changes)
    assert make_run(resume_from_checkpoint="latest", allow_recipe_change=True, stop_after_steps=8, **changes).train()
    assert "resumes with another recipe than before" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"with mask_ratio=0.75, now it is 0.5: a resumption must .* --output_dir\.$"):
        make_run(resume_from_checkpoint="latest", allow_recipe_change=True, mask_ratio=0.5, **changes)


def test_other_data_are_noticed(make_run, data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    assert make_run(stop_after_steps=2, dataset_name=[str(copy)]).train()
    shutil.copy(copy / "1.parquet", copy / "0.parquet")  # as many shards as before
    (copy / "7.parquet").rename(copy / "8.parquet")
    with pytest.raises(ValueError, match=r"read other data: its revisions were \['files \w+'\], now they are"):
        make_run(resume_from_checkpoint="latest", dataset_name=[str(copy)]).train()


def test_checkpoints_that_are_kept(make_run, tmp_path):
    assert make_run(save_steps=2, keep_every_steps=8, save_total_limit=1).train()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert names == ["step-00000000", "step-00000008", "step-00000016", "step-00000024"]
    manifest = read_manifest(tmp_path / "run" / "checkpoints" / "step-00000016")
    assert manifest["step"] == 16 and manifest["num_processes"] == 1 and "torch" in manifest["versions"]


def test_resumptions_that_do_not_fit(make_run, tmp_path):
    assert make_run(stop_after_steps=6).train()
    with pytest.raises(
        ValueError,
        match=r"holds a run, at step-00000006: give --resume_from_checkpoint latest, or another --output_dir",
    ):
        make_run().train()
    with pytest.raises(
        ValueError, match=r"was begun with base_learning_rate=0.01, now it is 0.02: a resumption must have"
    ):
        make_run(resume_from_checkpoint="latest", base_learning_rate=0.02).train()
    with pytest.raises(
        ValueError, match=r"made with dataloader_num_workers=0, now it is dataloader_num_workers=1: each"
    ):
        make_run(resume_from_checkpoint="latest", dataloader_num_workers=1).train()
    with pytest.raises(ValueError, match=r"is no checkpoint: manifest.json cannot be read"):
        make_run(resume_from_checkpoint=str(tmp_path)).train()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000006"
    reseal(checkpoint, num_processes=4)
    with pytest.raises(
        ValueError, match=r"made with num_processes=4, now it is num_processes=1: .* or give --allow_topology_change"
    ):
        make_run(resume_from_checkpoint="latest").train()
    reseal(checkpoint, sharded_by="FSDP")
    with pytest.raises(ValueError, match=r"was made with FSDP: resume it with FSDP"):
        make_run(resume_from_checkpoint="latest", allow_topology_change=True).train()


def test_other_workers_and_batches_resume_at_shard_boundaries(make_run, tmp_path, capsys):
    assert make_run(stop_after_steps=7).train()
    run = make_run(
        resume_from_checkpoint="latest",
        per_device_train_batch_size=16,
        dataloader_num_workers=2,
        allow_topology_change=True,
        stop_after_steps=13,
    )
    assert run.train()
    repeated = int(
        re.search(r"but (\d+) images are, whose shuffle windows were not finished", capsys.readouterr().out)[1]
    )
    samples = [record["samples"] for _, (record,) in sorted(kill_test.records(tmp_path / "run")[0].items())]
    assert len({name for step in samples for name in step}) == 153  # 112 before the change, and the others after it
    assert 0 < repeated < 64  # a window, and what came before it of its first shard
    again = make_run(
        resume_from_checkpoint="latest",
        per_device_train_batch_size=16,
        dataloader_num_workers=2,
        allow_topology_change=True,
    )
    assert not again.resumed.changed_topology and again.train()


@pytest.mark.slow
def test_other_ranks_resume_at_shard_boundaries(tmp_path):
    data, output = kill_test.write_images(tmp_path / "data", "parquet"), tmp_path / "run"
    two = kill_test.command(data, output, 2, 0, 30)
    kill_test.finish(kill_test.start([*two, "--stop_after_steps=8"]))
    one = kill_test.command(data, output, 1, 2, 30)
    kill_test.finish(kill_test.start([*one, "--allow_topology_change"]))
    first, second = kill_test.records(output)
    assert sorted(first) == list(range(1, 31)) and sorted(second) == list(range(1, 9))
    assert read_manifest(output / "checkpoints" / "step-00000030")["num_processes"] == 1
    read = [name for steps in (first, second) for (record,) in steps.values() for name in record["samples"]]
    assert len(set(read)) == kill_test.IMAGES - 7


# -- damaged and hostile checkpoints ---------------------------------------------------------------------------------


def test_every_damage_of_a_checkpoint_is_a_sentence(make_run, make_flags, tmp_path, capsys):
    assert make_run(stop_after_steps=2, ema_decay=0.9).train()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    flags, count = make_flags(resume_from_checkpoint=checkpoint, ema_decay=0.9), 0
    for name in damages(checkpoint):
        said = refusal(pretrain_mim.main, capsys, *flags)
        assert name in said and str(checkpoint) in said
        count += 1
    assert count > 40
    for step in (10**9, 1.5):
        reseal(checkpoint, step=step)
        assert "step" in refusal(pretrain_mim.main, capsys, *flags)
    reseal(checkpoint, step=2, shards=None, versions=[])
    assert "is no checkpoint of pre-training: its manifest has no shards, versions" in refusal(
        pretrain_mim.main, capsys, *flags
    )


def test_no_file_of_a_checkpoint_runs_code(make_run, make_flags, tmp_path, capsys):
    assert make_run(stop_after_steps=2, ema_decay=0.9).train()
    checkpoint, trace, names = tmp_path / "run" / "checkpoints" / "step-00000002", tmp_path / "trace", set()
    flags = make_flags(resume_from_checkpoint=checkpoint, ema_decay=0.9)
    for name in plants(checkpoint, trace):
        assert name in refusal(pretrain_mim.main, capsys, *flags)
        assert not trace.exists(), name
        names.add(name)
    assert names >= {"average.safetensors", "optimizer.bin", "random_states_0.pkl", "loader_rank00000.pt"}


def test_what_is_damaged_is_left_for_the_checkpoint_before_it(make_run, tmp_path, capsys):
    train_and_save(make_run(output_dir=str(tmp_path / "reference")))
    assert make_run(stop_after_steps=13, save_total_limit=3).train()
    checkpoints = tmp_path / "run" / "checkpoints"
    flip_a_bit(checkpoints / "step-00000013" / "optimizer.bin")
    (checkpoints / "step-00000010" / "random_states_0.pkl").unlink()
    capsys.readouterr()
    train_and_save(make_run(resume_from_checkpoint="latest", save_total_limit=3))
    said = capsys.readouterr().out
    for words in (
        "step-00000013 is damaged: optimizer.bin",
        "step-00000010 is damaged: random_states_0.pkl is missing",
    ):
        assert words in said
    assert said.count("Resuming from step-00000005, the newest whole one") == 2
    kill_test.compare(tmp_path / "reference", tmp_path / "run")


def test_the_newest_checkpoint_is_found_without_latest(make_run, tmp_path):
    train_and_save(make_run(output_dir=str(tmp_path / "reference")))
    assert make_run(stop_after_steps=12).train()
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "latest").unlink()
    with pytest.raises(ValueError, match="holds a run, at step-00000012: give --resume_from_checkpoint latest"):
        make_run()
    run = make_run(resume_from_checkpoint="latest")
    assert run.resumed.manifest["step"] == 12
    train_and_save(run)
    kill_test.compare(tmp_path / "reference", tmp_path / "run")
    for checkpoint in checkpoints.glob("step-*"):
        (checkpoint / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"is no checkpoint: manifest.json cannot be read .* 1 before it are damaged"):
        make_run(resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="holds a run"):
        make_run()
    assert len(list(checkpoints.glob("step-*"))) == 2


def test_a_kill_during_a_deletion_leaves_nothing_for_ever(make_run, tmp_path, monkeypatch):
    run, remove = make_run(save_total_limit=1, stop_after_steps=6), shutil.rmtree

    def killed(path, *arguments, **keywords):
        if path.name.endswith("step-00000000.deleted") and path.exists():
            (path / "model.safetensors").unlink()
            raise KeyboardInterrupt
        remove(path, *arguments, **keywords)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    monkeypatch.undo()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert not (checkpoints / "step-00000000").exists() and (checkpoints / ".step-00000000.deleted").exists()
    assert make_run(resume_from_checkpoint="latest", save_total_limit=1).train()
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000024"]


def test_lines_of_the_log_that_are_no_records(make_run, tmp_path, capsys):
    assert make_run(stop_after_steps=10).train()
    log = tmp_path / "run" / "log.jsonl"
    whole = log.read_text()
    log.write_bytes(b'null\n[]\n7\n{}\n{"step": null}\n' + whole.encode() + b'"step"\n\xff\x00\n{"step": 1')
    capsys.readouterr()
    assert make_run(resume_from_checkpoint="latest", stop_after_steps=11).train()
    assert "log.jsonl had 8 damaged lines, which are left out now" in capsys.readouterr().out
    assert log.read_text().startswith(whole)


# -- folders of others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model/config.json", "log.jsonl"])
def test_models_of_others_are_not_overwritten(name, make_flags, tmp_path, capsys):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    for changes in ({}, {"resume_from_checkpoint": "latest"}):
        said = refusal(pretrain_mim.main, capsys, *make_flags(**changes))
        assert f"run holds {name} of a model or another run, which is not overwritten" in said
    assert [entry for entry in (tmp_path / "run").rglob("*") if entry.is_file()] == [path]


def test_a_refused_run_leaves_no_folder(make_flags, tmp_path, capsys):
    flags = make_flags(dataset_name=str(tmp_path / "none"), output_dir=str(tmp_path / "a" / "run"))
    assert "none" in refusal(pretrain_mim.main, capsys, *flags)
    assert not (tmp_path / "a").exists()


def test_a_resumption_from_elsewhere_replaces_no_other_run(make_run, tmp_path):
    assert make_run(stop_after_steps=6).train()
    first = str(tmp_path / "run" / "checkpoints" / "step-00000005")
    other = {"output_dir": str(tmp_path / "other"), "resume_from_checkpoint": first}
    assert make_run(stop_after_steps=8, **other).train()
    with pytest.raises(ValueError, match="other holds a run, at step-00000008: give --resume_from_checkpoint latest"):
        make_run(stop_after_steps=8, **other)
