"""Output folders: one run each, nothing left by refused ones, ranks that end with their launcher."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from hivit_hf.training import output_folders
from hivit_hf.training.output_folders import (
    ARGUMENTS,
    LOCK,
    enter_folder,
    leave_folders,
    refuse_existing_file,
    refuse_foreign,
)


HOLDER = """
import os, sys, time
from pathlib import Path
from hivit_hf.training.output_folders import enter_folder
enter_folder(Path(sys.argv[1]))
if os.fork():  # as a data loading worker, which lives a little longer than its killed parent
    print("locked", flush=True)
time.sleep(30)
"""


@pytest.fixture(autouse=True)
def _left():
    yield
    leave_folders()


def test_one_run_per_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(output_folders, "PATIENCE_S", 0.3)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    worker = psutil.Process(holder.pid).children()[0]
    with pytest.raises(ValueError, match=rf"run is in use by another run \(process {holder.pid} on .*\): wait for its"):
        enter_folder(tmp_path / "run")
    enter_folder(tmp_path / "other")
    holder.kill()
    holder.wait()
    enter_folder(tmp_path / "run")  # the worker is still there
    assert worker.is_running()
    worker.kill()
    enter_folder(tmp_path / "run")
    leave_folders()
    assert (tmp_path / "run").is_dir() and not (tmp_path / "run" / LOCK).exists()


def test_a_killed_run_is_waited_for(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({holder.pid}, 9)"])
    enter_folder(tmp_path)
    holder.wait()


def test_what_was_made_for_nothing_is_removed(tmp_path):
    for folder in (tmp_path / "a" / "b", tmp_path / "c", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        enter_folder(folder)
    (tmp_path / "a" / "b" / ARGUMENTS).touch()
    (tmp_path / "c" / "model.safetensors").touch()
    leave_folders()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "there"]
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["model.safetensors"]


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/run cannot be written \(Not a directory\). Choose another"):
        enter_folder(tmp_path / "file" / "run")


def test_files_that_are_not_overwritten(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"holds model.safetensors of a model or another run, which is not"):
        refuse_foreign(tmp_path, ("config.json", "*.safetensors"))
    refuse_foreign(tmp_path, ("*.bin",))
    refuse_existing_file(tmp_path / "new" / "table.parquet", "--output_file")
    for path, words in (
        (tmp_path / "model.safetensors", "exists, and is not overwritten: give another --output_file, or remove it"),
        (tmp_path, "is a folder: give the name of a file to --output_file"),
        (tmp_path / "model.safetensors" / "x", "cannot be written: .* is no folder"),
    ):
        with pytest.raises(ValueError, match=words):
            refuse_existing_file(path, "--output_file")


RANK = """
import os, sys, time
from pathlib import Path
from hivit_hf.training.output_folders import end_with_launcher
end_with_launcher()
Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(600)
"""


@pytest.mark.slow
def test_ranks_end_with_their_launcher(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen([*launcher, str(tmp_path / "rank.py"), str(tmp_path)])
    traces = [tmp_path / "0", tmp_path / "1"]
    while not all(trace.exists() and trace.read_text() for trace in traces):
        assert process.poll() is None
        time.sleep(0.1)
    ranks = [psutil.Process(int(trace.read_text())) for trace in traces]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=5)
    for rank in alive:
        rank.kill()
    assert not alive
