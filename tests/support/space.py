"""The Space, started as its users start it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from transformers import BitImageProcessor

from hivit_hf import HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling
from support.networks import TINY
from support.nonsense import encoded, noise
from support.patience import PATIENCE_S


SPACE = Path(__file__).parents[2] / "examples" / "space"
NAMES = dict(enumerate(["tench", "goldfish", "great white shark"]))


def write_models(root: Path, redraw=lambda model: model) -> Path:
    """A folder with a classifier, an autoencoder, an image that is neither upload nor sample, and a sample."""
    root.mkdir(parents=True, exist_ok=True)
    network = {name: value for name, value in TINY.items() if name != "num_labels"}
    redraw(HiViTForImageClassification(HiViTConfig(**network, id2label=NAMES))).save_pretrained(root / "classifier")
    redraw(HiViTForMaskedImageModeling(HiViTConfig(**network))).save_pretrained(root / "autoencoder")
    for name in ("classifier", "autoencoder"):
        size = {"height": 64, "width": 64}
        BitImageProcessor(size=size, do_center_crop=False).save_pretrained(root / name)
    (root / "image.png").write_bytes(encoded(noise(64, 64)))
    (root / "samples").mkdir()
    (root / "samples" / "sample.png").write_bytes(encoded(noise(64, 64)))
    return root


@contextmanager
def running_space(models: Path) -> Iterator[str]:
    """The address of a Space with these models, with a proxy in its environment that does not answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(SPACE / "app.py"), "--port", str(port), "--samples", str(models / "samples")]
    command += ["--classifier", str(models / "classifier"), "--autoencoder", str(models / "autoencoder")]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(models / "uploads"), "GRADIO_ANALYTICS_ENABLED": "False"}
    environment |= {"http_proxy": "http://127.0.0.1:9", "no_proxy": "example.com"}
    with open(models / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=models, env=environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + PATIENCE_S
        while True:
            assert process.poll() is None, (models / "log.txt").read_text()
            assert time.monotonic() < end, (models / "log.txt").read_text()
            try:
                httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        assert process.poll() is None, (models / "log.txt").read_text()[-2000:]
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE_S)


class Client:
    """Requests to a running Space, as its page and scripts send them."""

    def __init__(self, address: str):
        self.http = httpx.Client(base_url=f"{address}/gradio_api", timeout=PATIENCE_S, trust_env=False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.close()

    def upload(self, content: bytes) -> dict:
        """An uploaded image, as a request names it."""
        path = self.http.post("/upload", files={"files": ("image.png", content)}).json()[0]
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    def run(self, name: str, *data) -> dict:
        """The answer of the page's function `name`."""
        return self.http.post(f"/run/{name}", json={"data": data}).json()

    def call(self, name: str, *data) -> str:
        """The events that its other interface answers with."""
        event = self.http.post(f"/call/{name}", json={"data": data}).json()["event_id"]
        return self.http.get(f"/call/{name}/{event}").text
