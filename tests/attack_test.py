"""
python tests/attack_test.py [--groups "command lines" datasets] [--said]

Attacks the scripts, the converter, the image reader and the Space, each attack in a process of its own with limits of
time and memory, and counts what comes of it: refused in words, held (rightly accepted, as the damage changes nothing),
or failed. Minutes on two CPU cores. Exit code 1 if an attack failed.
"""

import argparse
import importlib
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("src", "tests", "conversion", "examples")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of forks

from support import attacks  # noqa: E402
from support.attacks import command_lines, damage, files, image_files, pickles, requests  # noqa: E402
from support.attacks.ground import Ground  # noqa: E402
from support.space import Client, running_space, write_models  # noqa: E402


Outcomes = Iterator[tuple[str, str, str]]  # name of an attack, what came of it, what there is to say


def attempted(listed: Iterator[attacks.Attack]) -> Outcomes:
    for attack in listed:
        importlib.import_module(attack.script)  # once, before the forks
        yield attack.name, *attacks.attempt(attack)


def of_requests(scratch: Path) -> Outcomes:
    with running_space(write_models(scratch)) as address, Client(address) as client:
        yield from requests.attacks(client, scratch)


# a group of attacks -> its outcomes, in a folder of its own; each list of attacks is in a module of support/attacks
GROUPS: dict[str, Callable[[Path], Outcomes]] = {
    "command lines": lambda scratch: attempted(command_lines.attacks(Ground(scratch))),
    "datasets": lambda scratch: attempted(files.dataset_attacks(Ground(scratch))),
    "models": lambda scratch: attempted(files.model_attacks(Ground(scratch))),
    "checkpoints": lambda scratch: attempted(pickles.attacks(scratch)),
    "damage": lambda scratch: attempted(damage.attacks(scratch)),
    "images": lambda scratch: attempted(image_files.attacks(scratch)),
    "requests": of_requests,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS, help="Groups of attacks (all).")
    parser.add_argument("--said", action="store_true", help="Print what each refusal says.")
    arguments = parser.parse_args(argv)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    counts, failures = {}, []
    for group in arguments.groups:
        counts[group], began = Counter(), time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)
            for name, outcome, said in GROUPS[group](Path(scratch) / "ground"):
                counts[group][outcome] += 1
                if outcome == attacks.FAILED:
                    failures.append(f"{group}: {name}: {said}")
                    print(f"failed: {failures[-1]}", flush=True)
                elif arguments.said:
                    print(f"{outcome}: {name}: {said}", flush=True)
            os.chdir(ROOT)
        print(f"{group}: {sum(counts[group].values())} tried in {time.perf_counter() - began:.0f} s", flush=True)
    print(f"\n{'':<16}{'tried':>10}{attacks.REFUSED:>18}{attacks.HELD:>10}{attacks.FAILED:>8}")
    for group, count in [*counts.items(), ("together", sum(counts.values(), Counter()))]:
        numbers = (sum(count.values()), count[attacks.REFUSED], count[attacks.HELD], count[attacks.FAILED])
        print("{:<16}{:>10}{:>18}{:>10}{:>8}".format(group, *numbers))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
