"""Manifests of checkpoints: what is damaged, what is hostile, and the newest that is neither."""

import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dist_cp
import xxhash
from safetensors.torch import save_file

from hivit_hf.training.manifest import MANIFEST, check_checkpoint, newest_whole, read_manifest, write_manifest
from hivit_hf.training.sharded_files import check_sharded
from support.damage import Hostile, damages, flip_a_bit, plants, reseal


def make(folder: Path, step: int = 3) -> Path:
    """A checkpoint with a file of each kind."""
    (folder / "sharded").mkdir(parents=True)
    save_file({"weights": torch.arange(64.0)}, folder / "model.safetensors")
    torch.save({"state": {0: {"exp_avg": torch.ones(5)}}, "param_groups": [{"lr": 0.1}]}, folder / "optimizer.bin")
    torch.save({"torch_manual_seed": torch.get_rng_state()}, folder / "random_states_0.pkl")
    (folder / "config.json").write_text("{}")
    (folder / "sharded" / "notes.txt").write_text("in a folder inside")
    write_manifest(folder, {"step": step})
    return folder


def test_a_whole_checkpoint(tmp_path):
    manifest = check_checkpoint(make(tmp_path / "checkpoint"))
    assert manifest["step"] == 3 and set(manifest["files"]) == {
        "config.json",
        "model.safetensors",
        "optimizer.bin",
        "random_states_0.pkl",
        "sharded/notes.txt",
    }
    (tmp_path / "checkpoint" / ".gitattributes").touch()  # as the Hub adds
    assert check_checkpoint(tmp_path / "checkpoint") == read_manifest(tmp_path / "checkpoint") == manifest


def test_every_damage_is_named(tmp_path):
    checkpoint, count = make(tmp_path / "checkpoint"), 0
    for name in damages(checkpoint):
        with pytest.raises(ValueError, match=rf"checkpoint is (damaged|no checkpoint): .*{name} .*\.$"):
            check_checkpoint(checkpoint)
        count += 1
    assert count == 6 * 5 + 9
    check_checkpoint(checkpoint)


def test_manifests_that_agree_but_make_no_sense(tmp_path):
    checkpoint = make(tmp_path / "checkpoint")
    for step in (1.5, -1, True, None, "7"):
        reseal(checkpoint, step=step)
        with pytest.raises(ValueError, match=r"manifest.json has the step"):
            check_checkpoint(checkpoint)
    (tmp_path / "outside").touch()
    for name in ("../outside", str(tmp_path / "outside")):
        manifest = read_manifest(make(tmp_path / "other"))
        del manifest["checksum"]
        manifest["files"] = {name: manifest["files"]["config.json"]}
        manifest["checksum"] = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
        (tmp_path / "other" / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="outside is missing"):
            check_checkpoint(tmp_path / "other")
        shutil.rmtree(tmp_path / "other")


def test_hostile_files_are_not_run(tmp_path):
    checkpoint, trace = make(tmp_path / "checkpoint"), tmp_path / "trace"
    refused = set()
    for name in plants(checkpoint, trace):
        with suppress(ValueError):
            check_checkpoint(checkpoint)
            continue
        with pytest.raises(ValueError, match=f"{name} does not hold just tensors, numbers and text"):
            check_checkpoint(checkpoint)
        refused.add(name)
    assert not trace.exists()
    assert refused == {
        "config.json",
        "custom_checkpoint_0.pkl",
        "model.safetensors",
        "optimizer.bin",
        "pytorch_model.bin",
        "random_states_0.pkl",
    }  # what is no text is not read
    (checkpoint / "optimizer.bin").write_bytes(pickle.dumps(Hostile(trace)))  # without an archive around it
    reseal(checkpoint)
    with pytest.raises(ValueError, match=r"optimizer.bin does not hold just tensors"):
        check_checkpoint(checkpoint)
    assert not trace.exists()


def test_hostile_files_of_sharded_checkpoints_are_not_run(tmp_path):
    """The index, and what is no tensor."""
    folder, trace = tmp_path / "sharded", tmp_path / "trace"
    hyperparameters = {"lr": 0.1, "betas": (0.9, 0.95), "foreach": None}
    dist_cp.save({"weights": torch.ones(3), "group": hyperparameters}, checkpoint_id=folder)
    check_sharded(folder)
    dist_cp.save({"weights": torch.ones(3), "group": {**hyperparameters, "lr": Hostile(trace)}}, checkpoint_id=folder)
    with pytest.raises(pickle.UnpicklingError):
        check_sharded(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(trace)))
    with pytest.raises(pickle.UnpicklingError, match="which no index needs"):
        check_sharded(folder)
    assert not trace.exists()


def test_the_newest_whole_one(tmp_path):
    oldest, middle, newest = (make(tmp_path / str(step), step) for step in (1, 2, 3))
    assert newest_whole([newest, middle, oldest]).path == newest
    flip_a_bit(newest / "model.safetensors")
    (middle / MANIFEST).unlink()
    found = newest_whole([newest, middle, oldest])
    assert (found.path, found.manifest["step"], len(found.damaged)) == (oldest, 1, 2)
    assert found.damaged[0] == f"{newest} is damaged: model.safetensors is not what was saved (its checksum differs)."
    (oldest / "config.json").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is not .* The 2 before it are damaged, too\."):
        newest_whole([newest, middle, oldest])
