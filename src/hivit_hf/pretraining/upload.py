# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Uploads of checkpoints in the background: training neither waits for the network nor stops at its errors."""

from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi
from transformers.utils import logging

from .checkpoint import Checkpoints


logger = logging.get_logger(__name__)


class HubUpload:
    """
    Keeps the newest checkpoint in a repository, to load with `from_pretrained`, or to download and resume from.

    One upload runs at a time; checkpoints that are saved meanwhile are left out, but the last one of a run never is.

    Args:
        repository: created if it does not exist.
        private: whether a new repository is private.
        checkpoints: do not delete what is being uploaded.

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
        """Uploads a checkpoint unless another upload is running."""
        if self.running is not None and not self.running.done():
            return
        self._end()
        self.checkpoints.in_use = checkpoint
        self.running = self.api.upload_folder(
            repo_id=self.repository,
            folder_path=checkpoint,
            commit_message=checkpoint.name,
            delete_patterns="*",  # files of another number of ranks
            run_as_future=True,
        )

    def finish(self, checkpoint: Path):
        """Waits for the running upload, and uploads the last checkpoint if that was another one."""
        if self.running is not None:
            uploaded = self._end()
            if uploaded == checkpoint:
                return
        self.begin(checkpoint)
        self._end()

    def _end(self) -> Path | None:
        """Waits for the running upload, if any; returns the checkpoint that is on the Hub now, or None."""
        if self.running is None:
            return None
        error, checkpoint = self.running.exception(), self.checkpoints.in_use
        self.running = self.checkpoints.in_use = None
        if error is not None:
            logger.error(f"{checkpoint.name} could not be uploaded to {self.repository} ({error}); the run continues.")
            return None
        return checkpoint
