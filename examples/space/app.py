"""
python examples/space/app.py [--classifier demo_output/model] [--autoencoder demo_output/pretrained] [--port 7860]

A Gradio Space: classification, masked reconstruction with patches to click, and the features of the three stages.
Without arguments it loads the models of `make demo`, or else the checkpoints on the Hub. README.md lists the
environment variables that correspond to the flags.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

import gradio as gr
from studio import STAGES, Source, Studio, file_within

from hivit_hf.hub.handler import RequestError
from hivit_hf.hub.model_zoo import CHECKPOINTS, SPACE_CHECKPOINTS


DEMO_FOLDERS = {"classifier": "demo_output/model", "autoencoder": "demo_output/pretrained"}
CSS = """
.gradio-container { max-width: 1120px !important; margin: 0 auto !important; }
#image img { width: 100%; height: 100%; object-fit: contain; }
.pixels img { image-rendering: pixelated; width: 100%; border-radius: 8px; }
.pixels .icon-button-wrapper { display: none; }
.masked img { cursor: pointer; }
#words { color: light-dark(#b91c1c, #ff8f8f); font-weight: 600; }
.caption { text-align: center; opacity: 0.75; }
"""
FONTS = [gr.themes.Font(name) for name in ("system-ui", "Segoe UI", "Helvetica", "sans-serif")]
THEME = gr.themes.Soft(font=FONTS)
INTRODUCTION = """# HiViT
A hierarchical vision transformer: it classifies an image, reconstructs masked patches, and shows its features
([paper](https://arxiv.org/abs/2205.14949))."""

UNPINNED = "No revision is given, so the models may change with their repositories:"


def port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 65535, got {text!r}")
    return int(text)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in DEMO_FOLDERS:
        for flag, what in [
            (name, f"Folder or Hub id of the {name}."),
            (f"{name}_revision", "Revision of that id; main if empty."),
        ]:
            parser.add_argument(f"--{flag}", default=os.environ.get(f"HIVIT_{flag.upper()}"), help=what)
    parser.add_argument("--samples", type=Path, default=Path("demo_output/samples"), help="Folder of sample images.")
    parser.add_argument("--port", type=port, help="Port of the page; the first free one from 7860 on if not given.")
    return parser.parse_args(argv)


def find_source(arguments: argparse.Namespace, name: str) -> Source:
    """
    The model of the flags, else that of `make demo`, else the checkpoint on the Hub.

    Raises:
        ValueError: if there is none of them, or a revision without its repository.
    """
    given, revision = getattr(arguments, name), getattr(arguments, f"{name}_revision")
    if given:
        return Source(given, revision)
    if revision:
        raise ValueError(f"--{name}_revision {revision} needs a repository: give --{name} ID as well.")
    if Path(DEMO_FOLDERS[name]).exists():
        return Source(DEMO_FOLDERS[name])
    about = CHECKPOINTS[SPACE_CHECKPOINTS[name]]
    if about.uploaded:
        return Source(about.repo_id, about.revision)
    raise ValueError(f"There is no {name}: run `make demo` first, or give --{name} FOLDER.")


def in_words(otherwise: list):
    """Errors become a message on the page, the last of the outputs; the others are `otherwise` then."""

    def decorate(function):
        @functools.wraps(function)
        def answer(*arguments):
            try:
                return *function(*arguments), ""
            except RequestError as error:
                return *otherwise, str(error)

        return answer

    return decorate


def shown_image(caption: str, *classes: str) -> gr.Image:
    """An output image with its caption below: a label would cover the patches."""
    with gr.Column(min_width=140):
        image = gr.Image(
            label=caption,
            show_label=False,
            container=False,
            interactive=False,
            format="png",
            buttons=[],
            elem_classes=["pixels", *classes],
        )
        gr.Markdown(caption, elem_classes=["caption"])
    return image


def build(studio: Studio, samples: list[str]) -> gr.Blocks:
    """The page."""

    nothing, as_it_was = [None, [], None, None, *([None] * len(STAGES))], [gr.skip()] * 3

    def uploaded(path):
        return file_within(path, folder)

    @in_words(otherwise=nothing)
    def look(path, ratio):
        path = uploaded(path)
        if path is None:  # it was removed
            return nothing
        mask = studio.draw_mask(ratio)
        return studio.classify(path), mask, *studio.reconstruct(path, mask), *studio.features(path)

    @in_words(otherwise=as_it_was)
    def mask_again(path, ratio):
        mask = studio.draw_mask(ratio)
        return mask, *studio.reconstruct(uploaded(path), mask)

    @in_words(otherwise=as_it_was)
    def click(path, mask, event: gr.SelectData):
        mask = studio.toggle_at(mask, event.index)
        return mask, *studio.reconstruct(uploaded(path), mask)

    with gr.Blocks(title="HiViT") as page:
        gr.Markdown(INTRODUCTION)
        if studio.may_change:
            gr.Markdown(f"{UNPINNED} {', '.join(studio.may_change)}.", elem_id="unpinned")
        mask = gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                sources = ["upload", "clipboard"]
                image = gr.Image(sources=sources, label="Image", height=300, elem_id="image")
                # the file as it came: Gradio itself would stumble over what is no image
                image.preprocess = lambda payload: None if payload is None else payload.path or ""
                folder = image.GRADIO_CACHE  # of uploads; Gradio copies the samples to it
                words = gr.Markdown(elem_id="words")
                if samples:
                    gr.Examples([[sample] for sample in samples], image, label="Samples", examples_per_page=12)
            with gr.Column(scale=5, min_width=320), gr.Tabs():
                with gr.Tab("Classify"):
                    classes = gr.Label(num_top_classes=5, label="Classes", elem_id="classes")
                with gr.Tab("Reconstruct"):
                    with gr.Row(equal_height=True):
                        ratio = gr.Slider(0, 0.95, studio.mask_ratio, step=0.05, label="Mask ratio", scale=4)
                        ratio.preprocess = lambda payload: payload  # checked by the studio
                        again = gr.Button("Mask other patches", scale=1, min_width=170)
                    with gr.Row():
                        masked = shown_image("Visible patches: click one to mask or unmask it", "masked")
                        filled = shown_image("Masked patches reconstructed")
                with gr.Tab("Features"):
                    gr.Markdown(
                        "The first three principal components of each stage's features as red, green and blue: similar "
                        "features have similar colors."
                    )
                    with gr.Row():
                        stages = [shown_image(name.replace("stage", "Stage ")) for name in STAGES]
        image.change(
            look, [image, ratio], [classes, mask, masked, filled, *stages, words], api_name="look", queue=False
        )
        ratio.release(mask_again, [image, ratio], [mask, masked, filled, words], api_name="mask", queue=False)
        again.click(mask_again, [image, ratio], [mask, masked, filled, words], api_name=False, queue=False)
        masked.select(click, [image, mask], [mask, masked, filled, words], api_name=False, queue=False)
    return page


def reach_itself_without_proxy():
    """Gradio asks its own page whether it is there, which a proxy of the environment cannot reach."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    hosts = ",".join([*filter(None, [known]), "localhost", "127.0.0.1", "::1"])
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = hosts


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        studio = Studio(*(find_source(arguments, name) for name in DEMO_FOLDERS))
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    samples = sorted(str(path) for path in arguments.samples.glob("*.*")) if arguments.samples.is_dir() else []
    page = build(studio, samples)
    reach_itself_without_proxy()
    try:
        page.launch(server_port=arguments.port, css=CSS, theme=THEME, footer_links=[], show_error=True)
    except OSError as error:
        print(
            f"error: no page on port {arguments.port or 'from 7860 on'}, {error} Give another --port.", file=sys.stderr
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
