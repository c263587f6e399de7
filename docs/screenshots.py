"""
python docs/screenshots.py [--demo demo_output]

Takes the images of this folder: the browser page, the Space, and the card of the exported demo model, all with what
`make demo` has left. The page's models must lie in examples/browser/models: see its README.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from markdown_it import MarkdownIt


DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.append(str(ROOT / "tests"))

from chromium import BROWSER_EXAMPLE, browser, serve  # noqa: E402


PORT = 7869
# close to how GitHub shows Markdown
CARD = """<!doctype html><meta charset="utf-8"><style>
body { font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; max-width: 830px; }
body { margin: 32px auto; color: #1f2328; }
h1, h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: 6px; } a { color: #0969da; }
table { border-collapse: collapse; } th, td { border: 1px solid #d1d9e0; padding: 6px 13px; }
tr:nth-child(2n) { background: #f6f8fa; } img { image-rendering: pixelated; }
code { background: #eff1f3; border-radius: 6px; padding: 2px 6px; font-size: 85%; }
pre { background: #f6f8fa; border-radius: 6px; padding: 16px; overflow: auto; }
pre code { background: none; padding: 0; }
blockquote { border-left: 4px solid #d1d9e0; margin: 0; padding: 0 16px; color: #59636e; }
</style><body>"""


def card_page(chromium, folder: Path):
    """The card of an exported folder, its metadata left out, as a site for Markdown shows it."""
    text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    (folder / "card.html").write_text(CARD + html, encoding="utf-8")
    with serve(folder) as address:
        page = chromium.new_page(viewport={"width": 900, "height": 1400})
        page.goto(f"{address}/card.html")
        page.wait_for_timeout(300)
        page.screenshot(path=DOCS / "card.png")


def browser_page(chromium, image: Path):
    with serve(BROWSER_EXAMPLE) as address:
        for name, width, scheme in [("browser", 1000, "light"), ("browser_narrow_dark", 390, "dark")]:
            page = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page.goto(f"{address}/index.html")
            page.wait_for_selector("html[data-ready]")
            page.set_input_files("#file", str(image))
            page.wait_for_selector("#reconstruction:not([hidden])")
            page.evaluate("window.hivit.maskAgain(Float32Array.from({ length: 16 }, (_, n) => (7 * n + 3) % 16))")
            page.wait_for_timeout(400)
            page.screenshot(path=DOCS / f"{name}.png", full_page=True)


def space_pages(chromium, demo: Path, image: Path):
    command = [sys.executable, str(ROOT / "examples" / "space" / "app.py"), "--port", str(PORT)]
    command += ["--classifier", demo / "model", "--autoencoder", demo / "pretrained", "--samples", demo / "samples"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/")
                break
            except OSError:
                time.sleep(0.3)
        page = chromium.new_page(viewport={"width": 1160, "height": 700}, color_scheme="light")
        page.goto(f"http://127.0.0.1:{PORT}/")
        page.set_input_files("#image input[type=file]", str(image))
        page.wait_for_selector("#classes >> text=%")
        for name in ("Classify", "Reconstruct", "Features"):
            page.get_by_role("tab", name=name).click()
            page.wait_for_timeout(1500)  # classes fade in
            page.screenshot(path=DOCS / f"space_{name.lower()}.png")
    finally:
        process.terminate()
        process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo_output"), help="What make demo left.")
    demo = parser.parse_args().demo
    samples = sorted((demo / "samples").glob("*.png"))
    with tempfile.TemporaryDirectory() as temporary, browser() as chromium:
        command = [sys.executable, ROOT / "examples" / "push_to_hub.py", demo / "model", Path(temporary) / "digits"]
        command += ["--title", "HiViT reads handwritten digits", "--license", "apache-2.0"]
        command += ["--description", "A small HiViT for handwritten digits, trained by `make demo`."]
        command += ["--training", "scikit-learn's digits; see `examples/demo_digits.py`.", "--samples", *samples]
        subprocess.run(list(map(str, command)), check=True)
        card_page(chromium, Path(temporary) / "digits")
        browser_page(chromium, samples[5])
        space_pages(chromium, demo, samples[5])


if __name__ == "__main__":
    main()
