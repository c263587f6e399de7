"""Image files for the reader of the endpoint, the Space and exports."""

import sys
from collections.abc import Iterator
from pathlib import Path

from hivit_hf.hub.handler import RequestError, read_image
from support.attacks import Attack
from support.nonsense import NO_IMAGE, REFUSALS, exotic_files, is_one_sentence, random_bytes, unreadable, unusual_images


def main(arguments: list[str]) -> int:
    """Reads an image file, as a script would."""
    try:
        read_image(Path(arguments[0]).read_bytes())
    except RequestError as error:
        print(f"error: {error}" if is_one_sentence(str(error)) else f"no sentence: {error}", file=sys.stderr)
        return 2
    return 0


def attacks(scratch: Path) -> Iterator[Attack]:
    scratch.mkdir()
    files = [(name, content, REFUSALS[name], False) for name, content in unreadable().items() if type(content) is bytes]
    files += [(f"format {name}", content, NO_IMAGE, False) for name, content in exotic_files().items()]
    files += [(f"random bytes {number}", random_bytes(number), "", True) for number in range(100)]
    files += [(name, content, "", True) for name, content in unusual_images().items()]
    for name, content, words, may_pass in files:
        path = scratch / "image"
        path.write_bytes(content)
        yield Attack(name, "support.attacks.image_files", (path,), words, may_pass)
