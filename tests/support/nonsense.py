"""Unusual, damaged and hostile images and requests, and the refusals that they get."""

import base64
import io
import random
import re
import struct
import subprocess

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=file_format, **options)
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


def animation() -> bytes:
    """A GIF of a red, then a blue frame."""
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def hundred_megapixels() -> bytes:
    return encoded(Image.new("1", (10_000, 10_000)))


def unusual_images() -> dict[str, bytes]:
    """Images that can be read, all of them odd."""
    return {
        "animated GIF": animation(),
        "transparent": encoded(Image.new("RGBA", (30, 30), (255, 0, 0, 0))),
        "transparent palette": encoded(Image.new("P", (9, 9)), transparency=0),
        "1x1": encoded(Image.new("RGB", (1, 1))),
        "gray": encoded(Image.new("L", (9, 40))),
        "16 bits": encoded(Image.new("I;16", (9, 9), 40_000)),
        "32 bits": encoded(Image.new("I", (9, 9), 40_000), "TIFF"),
        "floating point": encoded(Image.new("F", (9, 9), 0.6), "TIFF"),
        "1 bit": encoded(Image.new("1", (9, 9))),
        "CMYK": encoded(Image.new("CMYK", (9, 9)), "JPEG"),
        "WebP": encoded(noise(30, 20), "WEBP"),
        "99 times as wide": encoded(Image.new("RGB", (99, 1))),
    }


def exotic_files() -> dict[str, bytes]:
    """Images of formats that Pillow reads and we do not, and more that look like them."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    formats = ["BLP", "DDS", "DIB", "EPS", "ICNS", "ICO", "IM", "JPEG2000", "MSP", "PCX", "PPM", "SGI", "TGA", "XBM"]
    modes = {"BLP": "P", "MSP": "1", "XBM": "1"}
    return {
        **{name: encoded(Image.new(modes.get(name, "RGB"), (32, 32)), name) for name in formats},
        "PostScript": postscript,
        "EPS with a preview": struct.pack("<IIIIIIIIH", 0xC6D3D0C5, 30, len(postscript), 0, 0, 0, 0, 0, 0)[:30]
        + postscript,
        "PDF": encoded(Image.new("RGB", (9, 9)), "PDF"),
        "FITS": b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800),
        "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(80),
    }


def no_process(monkeypatch: pytest.MonkeyPatch) -> list:
    """The programs that are started from now on; none of them really is."""
    started = []

    def refuse(_process, arguments, *_others, **_more):
        started.append(arguments)
        raise OSError("no program is started here")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # or it is known already that there is none
    return started


def floats_with(value: float) -> list[bytes]:
    """Float TIFF files with such a value at the beginning, in the middle, and at the end."""
    found = []
    for place in (0, 40, 80):
        pixels = np.full(81, 0.5, np.float32)
        pixels[place] = value
        found.append(encoded(Image.fromarray(pixels.reshape(9, 9)), "TIFF"))
    return found


def unreadable() -> dict[str, object]:
    """What is no image, or none that is accepted."""
    whole, png = encoded(noise(40, 40), "JPEG"), encoded(noise(40, 40))
    return {
        "text": b"not an image",
        "HTML": b"<html><body>404</body></html>",
        "nothing": b"",
        "zeros": bytes(1000),
        "cut off": whole[: len(whole) // 3],
        "head of a PNG": encoded(noise(9, 9))[:20],
        "broken PNG": png[:60] + bytes(len(png) - 60),
        "100 megapixels": hundred_megapixels(),
        "too thin": encoded(Image.new("1", (9000, 1))),
        "address": "https://example.com/cat.jpg",
        "local file": "file:///etc/hostname",
        "path": "/etc/hostname",
        "more than 16 bits": encoded(Image.new("I", (9, 9), 70_000), "TIFF"),
        "negative": encoded(Image.new("F", (9, 9), -1.0), "TIFF"),
        "no base64": "what is this?",
        "base64 of text": base64.b64encode(b"not an image").decode(),
        "data URI of nothing": "data:image/png;base64,",
        "number": 7,
        "yes": True,
        "object": {"image": "x"},
    }


NO_IMAGE = "not an image that can be read"
# a name of `unreadable()` -> words of the answer
REFUSALS = {
    **dict.fromkeys(["text", "HTML", "zeros", "cut off", "head of a PNG", "base64 of text"], NO_IMAGE),
    **dict.fromkeys(["nothing", "data URI of nothing"], "The image is empty"),
    "broken PNG": "The image is damaged",
    "100 megapixels": "too large: 10000x10000 px are 100 megapixels, at most 64",
    "too thin": "too long and thin: 9000x1 px",
    **dict.fromkeys(["address", "local file"], "Addresses are not fetched"),
    **dict.fromkeys(["path", "no base64"], "The text is not base64"),
    "more than 16 bits": "its values range from 70000 to 70000, not from 0 to 65535",
    "negative": "its values range from -1 to -1, not from 0 to 1",
    "number": "got a int",
    "yes": "got a bool",
    "object": "got a dict",
}


def is_one_sentence(words: str) -> bool:
    """Whether it is a sentence for people: one, of one line and not long, without names of Python's errors."""
    whole = re.fullmatch(r'(?:[A-Z"]|top_k)[^\n]{10,200}\.', words) is not None
    return whole and not re.search(r"[.!?] +[A-Z]|Error\b|Traceback|<class", words)


def random_bytes(number: int) -> bytes:
    """Bytes of any kind, half of them behind the first bytes of a real image."""
    draw = random.Random(number)
    head = draw.choice(
        [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b"RIFF\x10\0\0\0WEBP", b"BM", b"II*\0"]
    )
    return head + draw.randbytes(draw.randrange(200))
