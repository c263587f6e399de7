"""
python model_cards/render.py [--check]

Renders the card of each checkpoint of `hivit_hf.hub.model_zoo.CHECKPOINTS`, the tables of checkpoints here and in the
main README, and the model ids in the Space's metadata; with --check it only reports which of them are out of date.
"""

import argparse
import re
import sys
from pathlib import Path

from hivit_hf import HiViTConfig
from hivit_hf.hub.cards import render_card
from hivit_hf.hub.model_zoo import CHECKPOINTS, SPACE_CHECKPOINTS


CARDS = Path(__file__).parent
SPACE = CARDS.parent / "examples" / "space" / "README.md"
RESULTS = CARDS.parent / "benchmarks" / "results"
BEGIN, END = "<!-- checkpoints: begin -->\n", "<!-- checkpoints: end -->\n"
WEIGHTS = {"original": "published by the authors", "unpublished": "never published", "own": "ours"}


def table(cards: str) -> str:
    """The checkpoints, their repositories, and whether they are there; `cards` is the way to the cards' folder."""
    lines = ["| checkpoint | repository on the Hub | uploaded | original weights |", "|---|---|---|---|"]
    for name, about in CHECKPOINTS.items():
        repository = f"`{about.repo_id}`"
        if about.uploaded:
            repository = f"[{repository}](https://huggingface.co/{about.repo_id}/tree/{about.revision})"
        state = "yes" if about.uploaded else "not yet"
        lines.append(f"| [{about.title}]({cards}{name}.md) | {repository} | {state} | {WEIGHTS[about.weights]} |")
    return "\n".join(lines) + "\n"


def with_table(path: Path, cards: str) -> str:
    """The text of a file with a fresh table between its marks."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + table(cards) + END + rest.split(END)[1]


def with_models(path: Path) -> str:
    """The text of the Space's README with the repositories of its models in the metadata."""
    lines = "".join(f"- {CHECKPOINTS[name].repo_id}\n" for name in SPACE_CHECKPOINTS.values())
    return re.sub(r"(?<=^models:\n)(- .*\n)*", lines, path.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)


def rendered() -> dict[Path, str]:
    """What each file should hold."""
    files = {
        CARDS / f"{name}.md": render_card(about, HiViTConfig(**about.arguments), results_dir=RESULTS)
        for name, about in CHECKPOINTS.items()
    }
    files[CARDS / "README.md"] = with_table(CARDS / "README.md", "")
    files[CARDS.parent / "README.md"] = with_table(CARDS.parent / "README.md", "model_cards/")
    files[SPACE] = with_models(SPACE)
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="Only report outdated files; exit with 1 if there are any."
    )
    check = parser.parse_args().check
    files = rendered()
    obsolete = set(CARDS.glob("*.md")) - set(files)
    stale = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if check:
        problems = [f"{path.name} is out of date" for path in stale] + [f"{p.name} is obsolete" for p in obsolete]
        sys.exit(f"{', '.join(problems)}: run make cards" if problems else 0)
    for path in stale:
        path.write_text(files[path], encoding="utf-8")
    for path in obsolete:
        path.unlink()
    print(f"{len(files)} files, {len(stale)} of them changed")


if __name__ == "__main__":
    main()
