# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The pre-training loop: it can be killed at any moment, and resumes as if it had not been."""

import math
import signal
from importlib.metadata import version
from pathlib import Path
from typing import Self

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm
from transformers import set_seed

from ..data.seeding import seed_of
from ..data.streaming import SampleStream, make_loader, stream_states
from ..image_processing import evaluation_processor
from ..training.manifest import loading
from .arguments import PretrainingArguments, PretrainingDataArguments, PretrainingModelArguments
from .checkpoint import Checkpoints, Resumption, describe, loader_states
from .data import ValidationImages, to_device
from .log import RunLog, WaitClock
from .monitor import Monitor
from .step import MaskedTraining, StepResult
from .upload import HubUpload


MAX_ROLLBACKS = 3


def make_accelerator(training_args: PretrainingArguments) -> Accelerator:
    """The accelerator of a run. ValueError where its configuration asks for DeepSpeed."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "Pre-training does not run with DeepSpeed: take DDP or FSDP2 (examples/accelerate/eight_gpus.yaml, "
            "fsdp2.yaml)."
        )
    return Accelerator(
        mixed_precision=training_args.mixed_precision,
        dynamo_backend="inductor" if training_args.torch_compile else None,
        log_with=[name for name in training_args.report_to if name != "none"] or None,
        project_dir=training_args.output_dir,
    )


class StopSignals:
    """Notes SIGTERM and SIGUSR1, which schedulers send before they kill, as long as its context lasts."""

    def __enter__(self) -> Self:
        self.received: str | None = None
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        self.received = signal.Signals(number).name


class PretrainingRun:
    """
    The loop over optimizer steps, with checkpoints, evaluations, logs, uploads and rollbacks.

    Raises:
        ValueError: if nothing can be written to the repository of the uploads.
    """

    def __init__(
        self,
        training: MaskedTraining,
        stream: SampleStream,
        validation: ValidationImages,
        checkpoints: Checkpoints,
        resumed: Resumption | None,
        model_args: PretrainingModelArguments,
        data_args: PretrainingDataArguments,
        training_args: PretrainingArguments,
    ):
        self.training, self.stream, self.validation = training, stream, validation
        self.checkpoints, self.resumed = checkpoints, resumed
        self.args, self.data_args, self.arguments = training_args, data_args, (training_args, data_args, model_args)
        self.accelerator, self.output = training.accelerator, Path(training_args.output_dir)
        batch_size, device = training_args.per_device_train_batch_size, self.accelerator.device
        self.accumulation = training_args.accumulation_steps(batch_size, self.accelerator.num_processes)
        self.loader = make_loader(stream, batch_size, training_args.dataloader_num_workers, device.type == "cuda")
        self.log = RunLog(self.output, self.accelerator, training_args.log_samples)
        self.monitor = Monitor(
            validation, training.bare, self.accelerator, data_args, batch_size, self.output / "images"
        )
        self.step = self.rollbacks = self.bad_images = self.newly_bad = 0
        self.finished, self.upload = False, None
        if self.accelerator.is_main_process and training_args.push_to_hub:
            repository = training_args.hub_model_id or self.output.resolve().name
            self.upload = HubUpload(repository, training_args.hub_private_repo, checkpoints)

    # -- checkpoints

    def manifest(self) -> dict:
        """What a resumption is compared with, and the counts that it continues."""
        opened = [source.opened for source in self.stream.sources]
        return {
            **describe(self.accelerator, *self.arguments),
            "shards": [source.dataset.num_shards for source in opened],
            "revisions": [source.revision for source in opened],
            "validation": [self.validation.name, self.validation.revision],
            "versions": {
                name: version(name) for name in ("torch", "transformers", "accelerate", "datasets", "torchdata")
            },
            "rollbacks": self.rollbacks,
            "bad_images": self.bad_images,
        }

    def begin(self):
        """Saves the first checkpoint, or loads the one to resume from. All ranks call it."""
        if self.resumed is not None:
            self._resume(self.resumed)
        elif not self.save():
            raise ValueError(f"{self.output} cannot be written. Choose another --output_dir.")

    def _resume(self, resumed: Resumption):
        path, manifest, now = resumed.path, resumed.manifest, self.manifest()
        for name in ("shards", "revisions"):
            if manifest[name] != now[name]:
                raise ValueError(
                    f"{path} read other data: its {name} were {manifest[name]}, now they are {now[name]}. Bring the "
                    "files back, or begin a new run in another --output_dir."
                )
        changed = {name: v for name, v in now["versions"].items() if manifest["versions"].get(name) != v}
        if changed:
            self.log.say(f"resumes with other versions than before: {changed}; numbers may differ in the last digits")
        self.step, self.rollbacks, self.bad_images = (manifest[n] for n in ("step", "rollbacks", "bad_images"))
        if resumed.changed_recipe:
            self.log.say("resumes with another recipe than before")
            self.rollbacks = 0
        total_steps = self.args.num_steps(self.data_args.images_per_epoch)
        if self.step > total_steps:
            raise ValueError(f"{path} is of step {self.step}, but the run has {total_steps}: it is of another run.")
        is_latest = path == self.checkpoints.latest()
        with loading(path):
            self.accelerator.load_state(str(path))
            states = loader_states(path)
            if not resumed.changed_topology:
                self.loader.load_state_dict(states[self.accelerator.process_index])
        self.log.forget_after(self.step)
        if not resumed.changed_topology:
            self.log.say(f"resumes from {path.name}")
            if not is_latest:  # else a rollback or a restart would find another one
                self.save()
            return
        set_seed(seed_of(self.args.seed, self.step, self.accelerator.process_index) % 2**32)
        repeated = self.stream.begin_after([state for saved in states for state in stream_states(saved)])
        self.log.say(
            f"resumes from {path.name} with other ranks, workers or batches: what was read is not read again in its "
            f"epoch, but {repeated} images are, whose shuffle windows were not finished"
        )
        self.save()  # the place in the data is a new one now

    def save(self, stopping: bool = False) -> bool:
        """Saves a checkpoint; returns whether it could. While stopping there is no time to upload."""
        self._count_bad_images()
        write_config = self.training.bare.config.save_pretrained
        saved = self.checkpoints.save(self.step, self.manifest(), self.loader.state_dict(), write_config)
        if saved and self.upload is not None and self.step > 0 and not stopping:
            self.upload.begin(self.checkpoints.latest())
        return saved

    def _roll_back(self, result: StepResult):
        """Loads the last checkpoint, but not its place in the data, so that other images follow."""
        self.rollbacks += 1
        latest = self.checkpoints.latest()
        text = f"loss {result.loss:.4g} in step {self.step + 1} at learning rate {result.learning_rate:.3g}"
        text += "" if not math.isfinite(result.loss) else ", and weights that are not finite"
        if self.rollbacks >= MAX_ROLLBACKS:
            raise FloatingPointError(
                f"{text}, for the {self.rollbacks}rd time. The last good weights are in {latest}. Lower "
                "base_learning_rate, lengthen warmup_epochs, set max_grad_norm, or train in bf16."
            )
        whole = self.checkpoints.newest_whole()
        for damage in whole.damaged:
            self.log.say(damage)
        self.log.say(f"{text}: back to {whole.path.name}, with other images from there on")
        with loading(whole.path):
            self.accelerator.load_state(str(whole.path))
        self.step = whole.manifest["step"]
        self.log.forget_after(self.step)
        self.save()  # with the place in the data, so that a restart does not read the same again

    # -- training

    def train(self) -> bool:
        """
        Trains to the last step. Returns whether it got there, or was asked to stop.

        Raises:
            FloatingPointError: if the loss is not finite for the third time.
        """
        with StopSignals() as signals:
            self.begin()
            self.finished = self._train(signals)
        return self.finished

    def _train(self, signals: StopSignals) -> bool:
        total_steps = self.args.num_steps(self.data_args.images_per_epoch)
        last_step = min(total_steps, self.args.stop_after_steps or total_steps)
        batches, clock = iter(self.loader), WaitClock()
        loss_sum, num_losses = 0.0, 0  # since the last line of the log
        silent = self.args.disable_tqdm or not self.accelerator.is_main_process
        with tqdm(total=last_step, initial=self.step, desc="pre-training", unit="step", disable=silent) as progress:
            while self.step < last_step:
                raw = [clock.wait_for(batches) for _ in range(self.accumulation)]
                self.newly_bad += sum(int(batch["skipped"].sum()) for batch in raw)
                ready = [to_device(batch, self.accelerator.device, self.data_args) for batch in raw]
                result = self.training.step(self.step, ready, stop=signals.received is not None)
                to_save = result.stop or self.step + 1 in (last_step, self._next_checkpoint())
                if not math.isfinite(result.loss) or (to_save and not self.training.is_finite()):
                    self._roll_back(result)
                    progress.n, loss_sum, num_losses = self.step, 0.0, 0
                    continue
                self.step += 1
                self.log.add_samples(self.step, raw, result.loss)
                loss_sum, num_losses = loss_sum + result.loss, num_losses + 1
                progress.update()
                if self.step % self.args.logging_steps == 0 or self.step == last_step:
                    self._log(result, loss_sum / num_losses, num_losses, clock, progress)
                    loss_sum, num_losses = 0.0, 0
                if self.step % self.args.eval_steps == 0 or self.step == last_step:
                    self.log.add(self.step, self.monitor.evaluate(self.step))
                if to_save:
                    self.save(stopping=result.stop)
                if result.stop and self.step < last_step:
                    why = signals.received or "a signal"
                    self.log.say(f"stopped by {why} after step {self.step}: --resume_from_checkpoint latest")
                    return False
        return True

    def _next_checkpoint(self) -> int:
        every = self.args.save_steps
        return (self.step // every + 1) * every

    def _log(self, result: StepResult, loss: float, num_steps: int, clock: WaitClock, progress: tqdm):
        self._count_bad_images()
        seconds, wait_fraction = clock.read()
        images_per_second = num_steps * self.args.effective_batch_size / seconds
        values = {
            "loss": loss,
            "learning_rate": result.learning_rate,
            "images_per_second": images_per_second,
            "data_wait_fraction": wait_fraction,
            "epoch": self.step / self.args.steps_per_epoch(self.data_args.images_per_epoch),
            "bad_images": self.bad_images,
        }
        if result.gradient_norm is not None:
            values["grad_norm"] = result.gradient_norm
        shown = {"loss": f"{loss:.4f}", "lr": f"{result.learning_rate:.2e}"}
        shown |= {"img/s": f"{images_per_second:.0f}", "waiting": f"{wait_fraction:.1%}"}
        progress.set_postfix(shown, refresh=False)
        self.log.add(self.step, values)

    def _count_bad_images(self):
        """Adds those of all ranks, so that all ranks know them."""
        newly = torch.tensor(float(self.newly_bad), device=self.accelerator.device)
        self.bad_images += int(self.accelerator.reduce(newly, "sum"))
        self.newly_bad = 0

    # -- the end

    def save_model(self):
        """Writes the model as a folder for `from_pretrained`, and the moving average beside it."""
        data_args, training = self.data_args, self.training
        state = self.accelerator.get_state_dict(training.model)
        state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}  # of torch.compile
        if self.accelerator.is_main_process:
            processor = evaluation_processor(training.bare.config.image_size, data_args.image_mean, data_args.image_std)
            folders = {"model": (training.bare, state)}
            if training.ema is not None:
                folders["model_ema"] = (training.ema.module, None)
            for name, (model, weights) in folders.items():
                model.save_pretrained(self.output / name, state_dict=weights)
                processor.save_pretrained(self.output / name)
        self.log.say(f"the model is in {self.output / 'model'}")
        self.accelerator.wait_for_everyone()

    def end(self):
        """Waits for all ranks, as one that leaves early may take the others with it, and for the last upload."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if self.upload is not None and self.finished:
            self.upload.finish(self.checkpoints.latest())
