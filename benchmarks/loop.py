"""
python benchmarks/loop.py [--steps 12]

The overhead of a pre-training step beside forward, backward and optimizer: the loop of examples/pretrain_mim.py on
base-mae, with images read by a data loading worker, against the bare step on a batch in memory, in turn. Also the
fraction of time spent waiting for data. Writes benchmarks/results/loop_DEVICE.json.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from tqdm.auto import tqdm

from hivit_hf.pretraining.arguments import PretrainingArguments, PretrainingDataArguments, PretrainingModelArguments
from hivit_hf.pretraining.data import to_device
from hivit_hf.pretraining.log import WaitClock
from hivit_hf.pretraining.run import make_accelerator
from measure import write


sys.path.append(str(Path(__file__).parents[1] / "examples"))
from pretrain_mim import prepare


def write_images(folder: Path, number: int = 256):
    """Parquet with crops of the two photographs of scikit-learn, 500x375."""
    folder.mkdir()
    for shard in range(4):
        rows = []
        for index in range(number // 4):
            photo = Image.fromarray(load_sample_image(("china.jpg", "flower.jpg")[index % 2]))
            left = index % (photo.width - 500)
            file = io.BytesIO()
            photo.crop((left, shard * 8, left + 500, shard * 8 + 375)).save(file, "JPEG", quality=92)
            rows.append({"bytes": file.getvalue(), "path": f"{shard}-{index}.jpg"})
        pq.write_table(pa.table({"image": rows}), folder / f"{shard}.parquet")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="Number of measured steps of each.")
    parser.add_argument("--batch_size", type=int, default=8, help="Images per step.")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        write_images(Path(scratch) / "data")
        training_args = PretrainingArguments(
            output_dir=str(Path(scratch) / "run"),
            per_device_train_batch_size=arguments.batch_size,
            effective_batch_size=arguments.batch_size,
            bf16=torch.cuda.is_available(),
            dataloader_num_workers=1,
            report_to=["none"],
            seed=0,
        )
        data_args = PretrainingDataArguments(
            dataset_name=[str(Path(scratch) / "data")], images_per_epoch=256, max_eval_samples=8
        )
        run = prepare(make_accelerator(training_args), PretrainingModelArguments(), data_args, training_args)
        device = run.accelerator.device
        batches, clock, ready = iter(run.loader), WaitClock(), None
        loop_s, bare_s, waited_s = [], [], []

        def synchronize():
            if device.type == "cuda":
                torch.cuda.synchronize()

        for step in tqdm(range(arguments.steps + 2), desc="steps", unit="step"):
            synchronize()
            start = time.perf_counter()
            clock.waited_s = 0.0
            raw = clock.wait_for(batches)
            ready = to_device(raw, device, data_args)
            result = run.training.step(step, [ready])
            run.step += 1
            run.log.add_samples(run.step, [raw], result.loss)
            synchronize()
            middle = time.perf_counter()
            run.training.optimizer.zero_grad()
            with run.accelerator.autocast():
                loss = run.training.model(**ready).loss
            run.accelerator.backward(loss)
            run.training.optimizer.step()
            synchronize()
            if step >= 2:
                loop_s.append(middle - start)
                bare_s.append(time.perf_counter() - middle)
                waited_s.append(clock.waited_s)
    ratios = [loop / bare for loop, bare in zip(loop_s, bare_s)]
    results = {
        "batch_size": arguments.batch_size,
        "loop_step_s": statistics.median(loop_s),
        "bare_step_s": statistics.median(bare_s),
        "loop_over_bare": statistics.median(ratios),
        "data_wait_fraction": sum(waited_s) / sum(loop_s),
    }
    print(json.dumps(results, indent=1))
    print("written:", write(f"loop_{device.type}", results, device.type))


if __name__ == "__main__":
    main()
