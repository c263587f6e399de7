"""HTTP requests to the Space that name files of the server, or are no requests at all."""

import socket
from collections.abc import Iterator
from pathlib import Path

from support.attacks import FAILED, HELD, REFUSED
from support.nonsense import REFUSALS, is_one_sentence, random_bytes, unreadable
from support.space import NAMES, Client


NEITHER = "The image is neither an upload nor a sample"
DEVICES = [
    "/dev/zero",
    "/dev/stdin",
    "/dev/random",
    "/proc/self/mem",
    "/proc/self/environ",
    "/etc/hostname",
    "/",
    "a\0b",
]
MARKS = [
    {},
    {"meta": {"_type": "x"}},
    {"meta": {}},
    {"url": "x"},
    {"is_stream": True, "orig_name": "x"},
]
FOREIGN = {"meta": {"_type": "gradio.FileData"}}
MALFORMED = [
    {"data": [{"path": "/etc/hostname", **FOREIGN}, 0.5]},
    {"data": []},
    {"data": "x"},
    {},
    [],
    "x",
    None,
    {"data": [[], 0.5]},
    {"data": ["x", 0.5]},
    {"data": [7, 0.5]},
]


def private_files(models: Path) -> list[str]:
    """Paths of files that are neither uploads nor samples; there must be an `uploads` folder."""
    link = models / "uploads" / "link.png"
    if not link.exists():
        link.symlink_to(models / "image.png")
    inside = [
        "image.png",
        "uploads/../image.png",
        "uploads/link.png",
        "uploads",
        "classifier/config.json",
        "samples/sample.png",
    ]
    return [*(str(models / name) for name in inside), "image.png", "../image.png", *DEVICES]


def attacks(client: Client, models: Path) -> Iterator[tuple[str, str, str]]:
    """Sends each request; its name, what came of it, and what there is to say."""
    good = client.upload((models / "image.png").read_bytes())
    before = client.run("look", good, 0.5)["data"][0]

    def told(name, answer, words):
        said = (answer.get("data") or [""])[-1]
        right = words in said and is_one_sentence(said)
        return name, REFUSED if right else FAILED, said if right else str(answer)[:300]

    for path in private_files(models):
        for mark in MARKS:
            for name in ("look", "mask"):
                yield told(f"{name} {path!r} {mark}", client.run(name, {"path": path, **mark}, 0.5), NEITHER)
            said = client.call("look", {"path": path, **mark}, 0.5)
            yield f"call {path!r} {mark}", REFUSED if NEITHER in said else FAILED, said[:300]
        for mark in (FOREIGN, {"meta": None}):  # Gradio refuses these itself
            said = client.call("look", {"path": path, **mark}, 0.5)
            leaked = any(name in said for name in NAMES.values())
            yield f"call {path!r} {mark}", FAILED if leaked else REFUSED, said[:300]
    for name, content in unreadable().items():
        if isinstance(content, bytes):
            yield told(name, client.run("look", client.upload(content), 0.5), REFUSALS[name])
    for number in range(40):
        answer = client.run("look", client.upload(random_bytes(number)), 0.5)
        yield told(f"random bytes {number}", answer, "image") if answer["data"][-1] else (f"{number}", HELD, "")
    yield told("no image", client.run("look", {}, 0.5), "There is no image yet")
    for ratio in ("half", -1, 2, None, [], good):
        yield told(f"ratio {ratio!r}", client.run("look", good, ratio), "a number from 0 to 1, got")
    for body in MALFORMED:
        answer = client.http.post("/run/look", json=body)
        words = answer.json()
        said = words["data"][-1] if answer.status_code == 200 else words.get("error") or words.get("detail")
        leaks = "Traceback" in answer.text or socket.gethostname() in answer.text
        yield f"body {body!r}", REFUSED if said and not leaks else FAILED, answer.text[:300]
    after = client.run("look", good, 0.5)["data"][0]
    yield "an image as before", HELD if after == before else FAILED, str(after)[:300]
