# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""A pre-training run on streams, which can be killed at any moment and goes on as if it had not been."""

import json
import math
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Self

import torch
import xxhash
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.utils import logging

from ..data.seeding import seed_of
from ..data.streaming import (
    SampleStream,
    Source,
    check_disjoint,
    check_shards,
    make_loader,
    open_source,
    read_some,
    stream_states,
)
from ..data.transforms import CenterCrop, RandomCrop, denormalize, normalize
from ..image_processing import evaluation_processor, evaluation_resize
from ..modeling_hivit import HiViTForMaskedImageModeling
from ..probing.neighbors import nearest_neighbor_accuracy
from ..training.figures import figure_to_png
from .arguments import TOPOLOGY, PretrainRecipe
from .checkpoint import Checkpoints, check_resumption, loader_states, read_manifest
from .monitor import reconstruction_grid
from .step import MaskedTraining, Schedule, StepResult
from .upload import HubUpload
from .zero import configure_deepspeed


logger = logging.get_logger(__name__)
MAX_ROLLBACKS = 3


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


class WaitClock:
    """Seconds spent waiting for data, and all others, since it was last asked."""

    def __init__(self):
        self.start, self.waited_s = time.perf_counter(), 0.0

    def wait_for(self, iterator: Iterator):
        start = time.perf_counter()
        item = next(iterator)
        self.waited_s += time.perf_counter() - start
        return item

    def read(self) -> tuple[float, float]:
        """Seconds passed and the share of them spent waiting; starts anew."""
        now = time.perf_counter()
        passed, waited = now - self.start, self.waited_s
        self.start, self.waited_s = now, 0.0
        return passed, waited / max(passed, 1e-9)


def check_writable(folder: Path):
    """ValueError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}). Choose another --output_dir.") from error


class PretrainRun:
    """
    Everything of one run, made from a recipe; `train` does it.

    Raises:
        ValueError: for a recipe that cannot be done, data that cannot be read so, and resumptions that do not fit.
    """

    def __init__(self, recipe: PretrainRecipe, accelerator: Accelerator):
        recipe.check()
        self.recipe, self.accelerator = recipe, accelerator
        self.output = Path(recipe.output_dir)
        self.accumulation = recipe.accumulation_steps(accelerator.num_processes)
        config = recipe.model_config()
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            configure_deepspeed(accelerator, recipe)
        if accelerator.distributed_type == DistributedType.FSDP:
            for name in ("ema_decay", "label_column"):  # both use weights outside of a training step
                if getattr(recipe, name) is not None:
                    raise ValueError(f"{name} needs the whole weights in each process: leave it out with FSDP.")
        self.checkpoints = Checkpoints(
            self.output / "checkpoints", accelerator, recipe.keep_last, recipe.keep_every_steps
        )
        self.step = self.rollbacks = self.bad_images = self.newly_bad = 0
        self.resumed = self._find_checkpoint()
        sources = [open_source(source) for source in self._pinned(recipe.sources())]
        check_shards(sources, accelerator.num_processes, recipe.num_workers)
        crop = RandomCrop(recipe.image_size, tuple(recipe.crop_scale), recipe.flip_probability, config.num_channels)
        self.stream = SampleStream(
            sources,
            crop,
            math.prod(config.grid_size),
            recipe.seed,
            accelerator.process_index,
            accelerator.num_processes,
            recipe.shuffle_window,
            recipe.max_bad_fraction,
        )
        if accelerator.num_processes > 1:
            check_disjoint(self.stream, gather_object)
        set_seed(recipe.seed)
        model = HiViTForMaskedImageModeling(config)
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        schedule = Schedule(recipe.total_steps, recipe.warmup_steps, recipe.learning_rate, recipe.min_learning_rate)
        self.training = MaskedTraining(
            model, accelerator, schedule, recipe.weight_decay, recipe.adam_betas, recipe.clip_norm, recipe.ema_decay
        )
        set_seed(recipe.seed + accelerator.process_index)  # the same weights, but not the same dropped paths
        self.config = config
        self.loader = make_loader(self.stream, recipe.batch_size, recipe.num_workers, accelerator.device.type == "cuda")
        held_out = recipe.held_out()
        if held_out is not None and self.resumed is not None and held_out.name == self.resumed[1]["held_out"][0]:
            held_out = replace(held_out, revision=self.resumed[1]["held_out"][1])
        opened = sources[0] if held_out is None else open_source(held_out)
        self.held_out = [opened.source.name, opened.revision]
        look = CenterCrop(recipe.image_size, evaluation_resize(recipe.image_size), config.num_channels)
        self.images, self.labels = read_some(opened, look, recipe.monitor_images)
        self.upload = None
        if accelerator.is_main_process:
            check_writable(self.output)
            if recipe.hub_model_id is not None:
                self.upload = HubUpload(recipe.hub_model_id, recipe.hub_private, self.checkpoints)

    def _topology(self) -> dict:
        """What is known of a run before its data are opened, as its manifest has it."""
        recipe, accelerator = self.recipe, self.accelerator
        topology = {
            "processes": accelerator.num_processes,
            **{name: getattr(recipe, name) for name in sorted(TOPOLOGY)},
        }
        sharded = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}
        return {
            "recipe": recipe.identity(),
            "topology": topology,
            "sharded_by": sharded.get(accelerator.distributed_type),
        }

    def manifest(self) -> dict:
        """What a resumption is held against, and what it goes on counting from."""
        packages = ["torch", "transformers", "accelerate", "datasets", "torchdata"]
        packages += ["deepspeed"] if self.accelerator.distributed_type == DistributedType.DEEPSPEED else []
        opened = [source.opened for source in self.stream.sources]
        return {
            **self._topology(),
            "shards": [source.dataset.num_shards for source in opened],
            "revisions": [source.revision for source in opened],
            "held_out": self.held_out,
            "versions": {name: version(name) for name in packages},
            "rollbacks": self.rollbacks,
            "bad_images": self.bad_images,
        }

    def _find_checkpoint(self) -> tuple[Path, dict] | None:
        """What is gone on from, and its manifest."""
        recipe, latest = self.recipe, self.checkpoints.latest()
        if not recipe.resume and latest is not None:
            raise ValueError(
                f"{self.output} holds a run, at {latest.name}: give --resume latest, or another --output_dir."
            )
        path = latest if recipe.resume == "latest" else Path(recipe.resume) if recipe.resume else None
        if path is None:
            return None
        manifest = read_manifest(path)
        self.changed_topology = check_resumption(
            path, manifest, self._topology(), recipe.allow_topology_change, recipe.allow_recipe_change
        )
        return path, manifest

    def _pinned(self, sources: list[Source]) -> list[Source]:
        """The commits of Hub datasets that the run began with."""
        if self.resumed is None:
            return sources
        return [replace(source, revision=commit) for source, commit in zip(sources, self.resumed[1]["revisions"])]

    def begin(self):
        """Saves the first checkpoint, or loads the one to go on from. All processes call it."""
        if self.resumed is None:
            if not self.save():
                raise ValueError(f"{self.output} cannot be written. Choose another --output_dir.")
            return
        path, manifest = self.resumed
        now = self.manifest()
        for name in ("shards", "revisions"):
            if manifest[name] != now[name]:
                raise ValueError(
                    f"{path} read other data: its {name} were {manifest[name]}, now they are {now[name]}. Bring the "
                    "files back, or begin a new run in another --output_dir."
                )
        changed = {name: v for name, v in now["versions"].items() if manifest["versions"].get(name) != v}
        if changed:
            self._say(f"resumed with other versions than before: {changed}; numbers may differ in the last digits")
        self.step, self.rollbacks, self.bad_images = (manifest[n] for n in ("step", "rollbacks", "bad_images"))
        if manifest["recipe"] != now["recipe"]:
            self._say("resumed with another recipe than before")
            self.rollbacks = 0
        is_latest = path == self.checkpoints.latest()
        self.checkpoints.load(path)
        self._forget_later_records()
        states = loader_states(path)
        if not self.changed_topology:
            self.loader.load_state_dict(states[self.accelerator.process_index])
            self._say(f"resumed {path.name}")
            if not is_latest:  # else a rollback or a restart would find another one
                self.save()
            return
        set_seed(seed_of(self.recipe.seed, self.step, self.accelerator.process_index) % 2**32)
        repeated = self.stream.begin_after([state for saved in states for state in stream_states(saved)])
        self._say(
            f"resumed {path.name} with other processes, workers or batches: whole shards are not read again in their "
            f"epoch, but {repeated} images are, whose shards were not finished"
        )
        self.save()  # the place in the data is a new one now

    def _forget_later_records(self):
        """What was logged after the checkpoint is done again. The record of samples keeps all, to be compared."""
        path = self.output / "log.jsonl"
        if self.accelerator.is_main_process and path.exists():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                with suppress(json.JSONDecodeError):  # a line that was cut off
                    kept += [line] if json.loads(line)["step"] <= self.step else []
            partial = path.with_suffix(".partial")
            with suppress(OSError):  # a full disk: they stay, and are done again
                partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
                os.replace(partial, path)

    def save(self, stopping: bool = False) -> bool:
        """A checkpoint of the present step; whether it could be written. While stopping there is no time to upload."""
        self._count_bad_images()
        saved = self.checkpoints.save(self.step, self.manifest(), self.loader.state_dict(), self.config.save_pretrained)
        if saved and self.upload is not None and self.step > 0 and not stopping:
            self.upload.begin(self.checkpoints.latest())
        return saved

    def train(self) -> bool:
        """
        Trains to the last step. Returns whether it got there, or was asked to stop.

        Raises:
            FloatingPointError: if the loss is not finite for the third time.
        """
        with StopSignals() as signals:
            finished = self._train(signals)
        if finished:
            self.export()
        return finished

    def finish_upload(self):
        """Waits until the last checkpoint is on the Hub. For the end, when no process waits for another any more."""
        if self.upload is not None:
            self.upload.finish(self.checkpoints.latest())

    def _train(self, signals: StopSignals) -> bool:
        recipe, accelerator = self.recipe, self.accelerator
        self.begin()
        last_step = min(recipe.total_steps, recipe.max_steps or recipe.total_steps)
        batches, clock = iter(self.loader), WaitClock()
        window_loss, window_steps = 0.0, 0
        with tqdm(
            total=last_step,
            initial=self.step,
            desc="pre-training",
            unit="step",
            disable=not accelerator.is_main_process,
        ) as progress:
            while self.step < last_step:
                raw = [clock.wait_for(batches) for _ in range(self.accumulation)]
                self.newly_bad += sum(int(batch["skipped"].sum()) for batch in raw)
                result = self.training.step(self.step, [self._to_device(b) for b in raw], signals.received is not None)
                to_save = result.stop or self.step + 1 in (last_step, self._next_checkpoint())
                if not math.isfinite(result.loss) or (to_save and not self.training.is_finite()):
                    self._roll_back(result)
                    progress.n, window_loss, window_steps = self.step, 0.0, 0
                    continue
                self.step += 1
                self._log_samples(raw, result)
                window_loss, window_steps = window_loss + result.loss, window_steps + 1
                progress.update()
                if self.step % recipe.log_every_steps == 0 or self.step == last_step:
                    self._log(result, window_loss / window_steps, window_steps, *clock.read(), progress)
                    window_loss, window_steps = 0.0, 0
                if self.step % recipe.monitor_every_steps == 0 or self.step == last_step:
                    self._look()
                if to_save:
                    self.save(stopping=result.stop)
                if result.stop and self.step < last_step:
                    self._say(f"stopped by {signals.received or 'a signal'} after step {self.step}: --resume latest")
                    return False
        return True

    def _next_checkpoint(self) -> int:
        every = self.recipe.checkpoint_every_steps
        return (self.step // every + 1) * every

    def _to_device(self, batch: dict) -> dict[str, torch.Tensor]:
        pixels = batch["pixel_values"].to(self.accelerator.device, non_blocking=True)
        pixels = normalize(pixels, tuple(self.recipe.image_mean), tuple(self.recipe.image_std))
        return {"pixel_values": pixels, "noise": batch["noise"].to(self.accelerator.device, non_blocking=True)}

    def _roll_back(self, result: StepResult):
        """The weights of the last checkpoint; the data go on, so what led here is not read again."""
        self.rollbacks += 1
        latest = self.checkpoints.latest()
        text = f"loss {result.loss:.4g} in step {self.step + 1} at learning rate {result.learning_rate:.3g}"
        text += "" if not math.isfinite(result.loss) else ", and weights that are not finite"
        if self.rollbacks >= MAX_ROLLBACKS:
            raise FloatingPointError(
                f"{text}, for the {self.rollbacks}rd time. The last good weights are in {latest}. Lower "
                "base_learning_rate, lengthen warmup_epochs, set clip_norm, or train in bf16."
            )
        self._say(f"{text}: back to {latest.name}, and on with other data")
        self.checkpoints.load(latest)
        self.step = read_manifest(latest)["step"]
        self._forget_later_records()
        self.save()  # with the place in the data, so that a restart does not read the same again

    def _log_samples(self, raw: list[dict], result: StepResult):
        if not self.recipe.log_samples:
            return
        record = {
            "step": self.step,
            "samples": [name for batch in raw for name in batch["sample_id"]],
            "pixels": xxhash.xxh3_64_hexdigest(torch.cat([batch["pixel_values"] for batch in raw]).numpy().tobytes()),
            "mask": xxhash.xxh3_64_hexdigest(torch.cat([batch["noise"] for batch in raw]).numpy().tobytes()),
            "loss": result.loss.hex(),
        }
        self._append(f"samples_rank{self.accelerator.process_index:05d}.jsonl", record)

    def _append(self, name: str, record: dict):
        """A line of a log. A full disk costs the line, not the run."""
        try:
            with open(self.output / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            logger.error(f"{name} could not be written in step {self.step} ({error.strerror}); the run goes on.")

    def _count_bad_images(self):
        """Those of all processes, as all processes know them."""
        newly = torch.tensor(float(self.newly_bad), device=self.accelerator.device)
        self.bad_images += int(self.accelerator.reduce(newly, "sum"))
        self.newly_bad = 0

    def _log(self, result: StepResult, loss: float, steps: int, seconds: float, wait_share: float, progress: tqdm):
        self._count_bad_images()
        if not self.accelerator.is_main_process:
            return
        images_per_second = steps * self.recipe.effective_batch_size / seconds
        values = {
            "loss": loss,
            "learning_rate": result.learning_rate,
            "images_per_second": images_per_second,
            "wait_share": wait_share,
            "epoch": self.step / self.recipe.steps_per_epoch,
            "bad_images": self.bad_images,
        }
        if result.gradient_norm is not None:
            values["gradient_norm"] = result.gradient_norm
        shown = {"loss": f"{loss:.4f}", "lr": f"{result.learning_rate:.2e}"}
        shown |= {"img/s": f"{images_per_second:.0f}", "waiting": f"{wait_share:.1%}"}
        progress.set_postfix(shown, refresh=False)
        self._append("log.jsonl", {"step": self.step, **values})
        self._track(values)

    def _track(self, values: dict):
        try:
            self.accelerator.log(values, step=self.step)
        except OSError as error:
            self._without_trackers(error)

    def _without_trackers(self, error: OSError):
        logger.error(f"The tracker cannot write in step {self.step} ({error.strerror}); the run goes on without it.")
        self.accelerator.trackers = []

    @torch.no_grad()
    def _look(self):
        """Is it working? Loss, reconstructions and a nearest-neighbor probe of the held-out images, always alike."""
        recipe, accelerator = self.recipe, self.accelerator
        model = self.training.bare
        noise = torch.rand(len(self.images), self.stream.num_units, generator=torch.Generator().manual_seed(0))
        losses, features = [], []
        model.eval()
        for images, numbers in zip(self.images.split(recipe.batch_size), noise.split(recipe.batch_size)):
            batch = self._to_device({"pixel_values": images, "noise": numbers})
            with accelerator.autocast():
                losses.append(model(**batch).loss.item() * len(images))
                if self.labels is not None:
                    features.append(model.hivit(batch["pixel_values"]).last_hidden_state.mean(dim=1))
        few = self._to_device({"pixel_values": self.images[:8], "noise": noise[:8]})
        with accelerator.autocast():
            mask = model.draw_mask(few["pixel_values"], few["noise"])
            restored = model.reconstruct(few["pixel_values"], mask).float().cpu()
        model.train()
        values = {"held_out_loss": sum(losses) / len(self.images)}
        if self.labels is not None:
            half = len(self.labels) // 2  # the first half classifies the second
            (known, unknown), (labels, targets) = (
                part.tensor_split([half]) for part in (torch.cat(features), self.labels)
            )
            values["nearest_neighbor_accuracy"] = nearest_neighbor_accuracy(known, labels, unknown, targets)
        if accelerator.is_main_process:
            self._track(values)
            self._append("log.jsonl", {"step": self.step, **values})
            restored = denormalize(restored, recipe.image_mean, recipe.image_std)
            try:
                self._draw(self.images[:8].float() / 255, mask.cpu(), restored)
            except OSError as error:
                logger.error(f"no image of step {self.step} ({error.strerror}); the run goes on.")

    def _draw(self, originals: torch.Tensor, mask: torch.BoolTensor, restored: torch.Tensor):
        originals, restored = (p.expand(-1, 3, -1, -1) if p.shape[1] == 1 else p[:, :3] for p in (originals, restored))
        figure = reconstruction_grid(originals, mask, restored, self.config.patch_size)
        folder = self.output / "images"
        folder.mkdir(exist_ok=True)
        (folder / f"reconstructions-{self.step:08d}.png").write_bytes(figure_to_png(figure))
        for tracker in self.accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            rows = torch.cat([originals, restored]).clamp(0, 1).permute(0, 2, 3, 1).numpy()
            tracker.log_images({"reconstructions": rows}, self.step, **options)

    def export(self):
        """The trained model as a folder for `from_pretrained`, and the moving average beside it."""
        recipe, accelerator = self.recipe, self.accelerator
        state = accelerator.get_state_dict(self.training.model)
        state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}  # of torch.compile
        if accelerator.is_main_process:
            processor = evaluation_processor(recipe.image_size, recipe.image_mean, recipe.image_std)
            folders = {"model": (self.training.bare, state)}
            if self.training.ema is not None:
                folders["model_ema"] = (self.training.ema.module, None)
            for name, (model, weights) in folders.items():
                model.save_pretrained(self.output / name, state_dict=weights)
                processor.save_pretrained(self.output / name)
        self._say(f"the model is in {self.output / 'model'}")
        accelerator.wait_for_everyone()

    def _say(self, text: str):
        if self.accelerator.is_main_process:
            tqdm.write(text)
