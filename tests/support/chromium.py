"""A real browser without a window: the Chromium that npm installs beside the browser example, driven by Playwright."""

import http.server
import os
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import brotli
from playwright.sync_api import sync_playwright


BROWSER_EXAMPLE = Path(__file__).parents[2] / "examples" / "browser"
PACKAGE = BROWSER_EXAMPLE / "node_modules" / "@sparticuz" / "chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium_path() -> str:
    """
    Where Chromium is: $CHROMIUM, or the one of the npm package, which is unpacked on first use.

    Raises:
        FileNotFoundError: if there is none; says how to get it.
    """
    if os.environ.get("CHROMIUM"):
        return os.environ["CHROMIUM"]
    packed, unpacked = PACKAGE / "bin" / "chromium.br", PACKAGE / "bin" / "chromium"
    if not packed.exists():
        raise FileNotFoundError(
            "These tests need a browser. `make test` installs one; by hand: npm ci --prefix examples/browser, or set "
            "CHROMIUM to the path of a Chromium or Chrome."
        )
    if not unpacked.exists():
        partial_file = unpacked.with_suffix(f".{os.getpid()}")
        partial_file.write_bytes(brotli.decompress(packed.read_bytes()))
        partial_file.chmod(0o755)
        partial_file.replace(unpacked)
    return str(unpacked)


@contextmanager
def browser():
    """A running Chromium."""
    path = chromium_path()
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield running
        finally:
            running.close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".wasm": "application/wasm"}

    def log_message(self, *arguments):
        pass


@contextmanager
def serve(folder: Path):
    """The address of a folder on the loopback."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
