"""Uploads of checkpoints to the Hub, in the background."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from hivit_hf.pretraining import upload as upload
from hivit_hf.pretraining.upload import HubUpload


class Hub:
    """In the role of `HfApi`: waits until `may_continue`, and fails with `error`."""

    def __init__(self):
        self.done, self.may_continue, self.error = [], threading.Event(), None
        self.pool = ThreadPoolExecutor(1)

    def create_repo(self, repository, private, exist_ok):
        assert private and exist_ok
        if "/" not in repository:
            raise OSError("401 Client Error")
        return SimpleNamespace(repo_id=repository)

    def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns, run_as_future):
        assert run_as_future and delete_patterns == "*" and repo_id == "me/run"

        def work():
            self.may_continue.wait(30)
            if self.error:
                raise self.error
            assert folder_path.is_dir()
            self.done.append(commit_message)

        return self.pool.submit(work)


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(upload, "HfApi", lambda: hub)
    return hub


@pytest.fixture
def checkpoints(tmp_path):
    for number in range(4):
        (tmp_path / f"step-{number}").mkdir()
    return SimpleNamespace(in_use=None, folder=tmp_path)


def test_one_at_a_time_and_the_last_one_never_left_out(hub, checkpoints):
    uploads = HubUpload("me/run", True, checkpoints)
    paths = sorted(checkpoints.folder.iterdir())
    uploads.begin(paths[0])
    uploads.begin(paths[1])  # the first is on its way: this returns at once, and does nothing
    assert checkpoints.in_use == paths[0] and hub.done == []
    hub.may_continue.set()
    uploads.running.result()
    uploads.begin(paths[2])
    uploads.finish(paths[3])
    assert hub.done == ["step-0", "step-2", "step-3"] and checkpoints.in_use is None
    uploads.finish(paths[3])
    assert hub.done[3:] == ["step-3"]


def test_the_last_one_is_not_uploaded_twice(hub, checkpoints):
    uploads = HubUpload("me/run", True, checkpoints)
    hub.may_continue.set()
    uploads.begin(checkpoints.folder / "step-3")
    uploads.finish(checkpoints.folder / "step-3")
    assert hub.done == ["step-3"]


def test_a_failed_upload_is_logged_and_does_not_end_the_run(hub, checkpoints, caplog):
    uploads = HubUpload("me/run", True, checkpoints)
    hub.error = ConnectionError("the Hub is down")
    hub.may_continue.set()
    uploads.begin(checkpoints.folder / "step-1")
    hub.pool.submit(lambda: None).result()
    uploads.begin(checkpoints.folder / "step-2")
    assert "step-1 could not be uploaded to me/run (the Hub is down); the run continues" in caplog.text
    hub.error = None
    uploads.finish(checkpoints.folder / "step-2")


def test_a_repository_that_cannot_be_written_is_refused(hub, checkpoints):
    with pytest.raises(ValueError, match=r"hub_model_id run cannot be written \(401 Client Error\). Log in with"):
        HubUpload("run", True, checkpoints)
