"""
python benchmarks/browser.py [--rounds 9]

Opens the page of examples/browser, with the models of its folder `models`, in headless Chromium from the loopback,
each time with an empty cache. Times the page from request to ready, and classifications and reconstructions of a noise
image, one at a time. Medians. Writes
benchmarks/results/browser_cpu.json.
"""

import argparse
import io
import json
import statistics
import sys
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm


sys.path.append(str(Path(__file__).parents[1] / "tests"))

from measure import write
from support.chromium import BROWSER_EXAMPLE, browser, serve


def look(page) -> dict[str, float]:
    """Milliseconds of one image, by the page's own clock."""
    file = io.BytesIO()
    Image.effect_noise((256, 256), 80).convert("RGB").save(file, format="PNG")
    page.set_input_files("#file", {"name": "noise.png", "mimeType": "image/png", "buffer": file.getvalue()})
    page.wait_for_function("window.hivit.current()?.reconstructed")
    found = {"classification_ms": "classified", "reconstruction_ms": "reconstructed"}
    return {name: page.evaluate(f"window.hivit.current().{kind}.milliseconds") for name, kind in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="Number of times the page is opened.")
    rounds = parser.parse_args().rounds
    models = sorted((BROWSER_EXAMPLE / "models").rglob("*.onnx"))
    if not models:
        sys.exit("There are no models: see examples/browser/README.md.")
    times = {"ready_ms": [], "first_classification_ms": [], "classification_ms": [], "reconstruction_ms": []}
    with browser() as chromium, serve(BROWSER_EXAMPLE) as address:
        for _ in tqdm(range(rounds), desc="page", unit="round"):
            context = chromium.new_context()
            page = context.new_page()
            page.goto(f"{address}/index.html")
            page.wait_for_selector("html[data-ready]")
            times["ready_ms"].append(float(page.evaluate("document.documentElement.dataset.ready")))
            times["first_classification_ms"].append(look(page)["classification_ms"])
            page.evaluate("window.hivit.current().reconstructed = null")
            for name, value in look(page).items():
                times[name].append(value)
            context.close()
        version = chromium.version
    results = {"rounds": rounds, "chromium": version}
    results["model_megabytes"] = sum(path.stat().st_size for path in models) / 1e6
    results |= {name: statistics.median(values) for name, values in times.items()}
    results |= {f"slowest_{name}": max(values) for name, values in times.items()}
    print(json.dumps(results, indent=1))
    print("written:", write("browser_cpu", results, "cpu"))


if __name__ == "__main__":
    main()
