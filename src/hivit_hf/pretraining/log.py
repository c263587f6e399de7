# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Logs of pre-training: log.jsonl, trackers, samples, messages. A full disk costs a line, not the run."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import xxhash
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers.utils import logging

from ..training.folders import replace_file


logger = logging.get_logger(__name__)


class RunLog:
    """
    The logs of one run.

    Args:
        folder: of the run; holds log.jsonl of the main process, and with `log_samples` samples_rank00000.jsonl and so
            on of each rank.
        accelerator: has the trackers.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, log_samples: bool = False):
        self.folder, self.accelerator, self.log_samples = folder, accelerator, log_samples

    def say(self, text: str):
        """A message above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def add(self, step: int, values: dict):
        """Metrics, to log.jsonl and the trackers."""
        if not self.accelerator.is_main_process:
            return
        self._append("log.jsonl", {"step": step, **values})
        try:
            self.accelerator.log(values, step=step)
        except OSError as error:
            logger.error(f"The tracker cannot write in step {step} ({error.strerror}); the run continues without it.")
            self.accelerator.trackers = []

    def add_samples(self, step: int, batches: Sequence[dict], loss: float):
        """The names of the samples of a step, digests of their crops and masks, and the exact loss."""
        if not self.log_samples:
            return
        record = {
            "step": step,
            "samples": [name for batch in batches for name in batch["sample_id"]],
            "pixels": _digest([batch["pixel_values"] for batch in batches]),
            "mask": _digest([batch["noise"] for batch in batches]),
            "loss": loss.hex(),
        }
        self._append(f"samples_rank{self.accelerator.process_index:05d}.jsonl", record)

    def forget_after(self, step: int):
        """
        Removes the lines of later steps, which are taken again, from log.jsonl, and those that are no records; the
        logs of samples keep all.
        """
        path = self.folder / "log.jsonl"
        if not self.accelerator.is_main_process or not path.is_file():
            return
        kept, lost = [], 0
        with suppress(OSError):  # a full disk: they stay, and are there twice
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                number = _step_of(line)
                kept += [line] if number is not None and number <= step else []
                lost += number is None
            replace_file(path, "".join(f"{line}\n" for line in kept))
        if lost:
            self.say(f"log.jsonl had {lost} damaged lines, which are left out now.")

    def _append(self, name: str, record: dict):
        try:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            logger.error(f"{name} could not be written in step {record['step']} ({error.strerror}); the run continues.")


def _step_of(line: str) -> int | None:
    """The step of a line of log.jsonl; None if it is no record, as one that was cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def _digest(parts: list[torch.Tensor]) -> str:
    return xxhash.xxh3_64_hexdigest(torch.cat(parts).numpy().tobytes())


class WaitClock:
    """Measures the seconds since it was last read, and those of them spent waiting for data."""

    def __init__(self):
        self.start, self.waited_s = time.perf_counter(), 0.0

    def wait_for(self, iterator: Iterator):
        """The next item."""
        start = time.perf_counter()
        item = next(iterator)
        self.waited_s += time.perf_counter() - start
        return item

    def read(self) -> tuple[float, float]:
        """Seconds passed, and the fraction of them spent waiting; sets both to zero."""
        now = time.perf_counter()
        passed, waited = now - self.start, self.waited_s
        self.start, self.waited_s = now, 0.0
        return passed, waited / max(passed, 1e-9)
