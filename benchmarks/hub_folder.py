"""
python benchmarks/hub_folder.py [--rounds 3]

Times the export of the base classifier as a repository, without and with ONNX, and then, in a fresh process each time,
loading that folder by `AutoModelForImageClassification` with its own code, where the package cannot be imported: the
load alone, and with the imports. Medians. Writes benchmarks/results/hub_cpu.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hivit_hf import HiViTConfig, HiViTForImageClassification
from hivit_hf.hub.repository import export
from measure import write


CHILD = """
import json, sys, time
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name == "hivit_hf" else find_spec(name, *rest))
start = time.perf_counter()
from transformers import AutoModelForImageClassification
imported = time.perf_counter()
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
end = time.perf_counter()
print(json.dumps({"load_s": end - imported, "import_and_load_s": end - start}))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="Number of runs of each, of which medians are taken.")
    rounds = parser.parse_args().rounds
    model = HiViTForImageClassification(HiViTConfig.from_architecture("base", num_labels=1000))
    seconds = {"export_without_onnx_s": [], "export_s": [], "load_s": [], "import_and_load_s": []}
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(rounds):
            for name, onnx in [("export_without_onnx_s", False), ("export_s", True)]:
                start = time.perf_counter()
                folder = export(model, Path(temporary) / "hivit-base", onnx=onnx, overwrite=True)
                seconds[name].append(time.perf_counter() - start)
            modules = os.environ | {"HF_MODULES_CACHE": f"{temporary}/modules_{number}"}
            command = [sys.executable, "-c", CHILD, str(folder)]
            loaded = subprocess.run(command, cwd=temporary, env=modules, check=True, capture_output=True, text=True)
            for name, value in json.loads(loaded.stdout.splitlines()[-1]).items():
                seconds[name].append(value)
    results = {name: statistics.median(values) for name, values in seconds.items()}
    print(json.dumps(results, indent=1))
    print("written:", write("hub_cpu", {"rounds": rounds, **results}, "cpu"))


if __name__ == "__main__":
    main()
