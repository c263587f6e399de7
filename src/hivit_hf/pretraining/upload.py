# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints to the Hub, in the background: training never waits for the network, nor ends because of it."""

from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi
from transformers.utils import logging

from .checkpoint import Checkpoints


logger = logging.get_logger(__name__)


class HubUpload:
    """
    A repository that holds the newest checkpoint: it loads with `from_pretrained`, and downloaded it can be resumed.

    One upload runs at a time; checkpoints that come meanwhile are left out, but the last one of a run never is.

    Args:
        repository: made if it does not exist.
        private: whether it is made a private one.
        checkpoints: what is being uploaded is not deleted there meanwhile.

    Raises:
        ValueError: if the repository cannot be written.
    """

    def __init__(self, repository: str, private: bool, checkpoints: Checkpoints):
        self.api, self.checkpoints = HfApi(), checkpoints
        self.running: Future | None = None
        try:
            self.repository = self.api.create_repo(repository, private=private, exist_ok=True).repo_id
        except Exception as error:  # the network, the token, the name: the library says which
            raise ValueError(
                f"hub_model_id {repository} cannot be written ({error}). Log in with `hf auth login`, or leave it out."
            ) from error

    def begin(self, checkpoint: Path):
        """Uploads a checkpoint unless another one is on its way."""
        if self.running is not None and not self.running.done():
            return
        self._end()
        self.checkpoints.in_use = checkpoint
        self.running = self.api.upload_folder(
            repo_id=self.repository,
            folder_path=checkpoint,
            commit_message=checkpoint.name,
            delete_patterns="*",  # files of another number of processes
            run_as_future=True,
        )

    def finish(self, checkpoint: Path):
        """Waits for what is on its way, and uploads the last checkpoint if that was another one."""
        if self.running is not None:
            uploaded = self._end()
            if uploaded == checkpoint:
                return
        self.begin(checkpoint)
        self._end()

    def _end(self) -> Path | None:
        """Waits for the upload, if there is one; returns what is on the Hub now, or None."""
        if self.running is None:
            return None
        error, checkpoint = self.running.exception(), self.checkpoints.in_use
        self.running = self.checkpoints.in_use = None
        if error is not None:
            logger.error(f"{checkpoint.name} could not be uploaded to {self.repository} ({error}); the run goes on.")
            return None
        return checkpoint
