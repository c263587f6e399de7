"""The report of a conversion: `conversion_report.json` for programs, `conversion_report.md` for people."""

import json
from importlib.metadata import version
from pathlib import Path

from checkpoint import Checkpoint, sha256, shown
from hivit_hf import __version__
from key_maps import KeyMap


def describe_versions() -> dict[str, str]:
    return {"hivit_hf": __version__} | {name: version(name) for name in ("torch", "transformers", "safetensors")}


def describe_source(checkpoint: Checkpoint, key_map: KeyMap) -> dict:
    return {
        "file": checkpoint.path.name,
        "sha256": sha256(checkpoint.path),
        "size_bytes": checkpoint.path.stat().st_size,
        "layout": key_map.name,
        "title": key_map.title,
        "entry": checkpoint.entry,
        "entries_left_out": checkpoint.other_entries,
        "classes_left_out": checkpoint.classes_left_out,
        "calls_not_made": checkpoint.calls_not_made,
    }


def write_report(folder: Path, report: dict):
    (folder / "conversion_report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "conversion_report.md").write_text(summary(report) + "\n", encoding="utf-8")


def summary(report: dict) -> str:
    """The report in a few lines of Markdown."""
    source, tensors, proof = report["source"], report["tensors"], report["proof"]
    if "written" in report:
        lines = [f"- {source['class']} of {source['folder']} written as {report['written']['layout']} checkpoint"]
    else:
        model = report["model"]
        lines = [
            f"- Source: `{shown(source['file'])}`, {source['size_bytes']:,} bytes, sha256 `{source['sha256']}`",
            f"- Layout: {source['title']} (`{source['layout']}`)",
            f"- Model: {model['class']}, {model['parameters']:,} parameters, "
            f"{model['dtype']}, {model['image_size']} px",
        ]
    lines.append("- Tensors: " + ", ".join(f"{count} {what}" for what, count in tensors.items()))
    for title in ("dropped", "added"):
        for reason, keys in report.get(title, {}).items():
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            lines.append(f"  - {title}: {', '.join(f'`{shown(key)}`' for key in keys[:4])}{more}: {reason}")
    resized = list(report.get("resized", {}).items())
    lines += [f"  - resized: `{name}`: {how}" for name, how in resized[:3]]
    lines += [f"  - resized: {len(resized) - 3} more likewise"] if len(resized) > 3 else []
    if report.get("cast"):
        cast = report["cast"]
        lines.append(
            f"  - cast: {', '.join(cast['from'])} to {cast['to']}; largest change {cast['largest_change']:.2g}"
        )
    lines.append(
        f"- Proof: written, read again, and compared: {proof['equal']} of {proof['compared']} tensors equal in all of "
        f"{proof['numbers_compared']:,} numbers; largest difference {proof['largest_difference']:g}"
    )
    if source.get("classes_left_out"):
        lines.append("- Never imported: " + ", ".join(f"`{shown(name)}`" for name in source["classes_left_out"]))
    for name in source.get("calls_not_made", []):
        lines.append(f"- **Warning: the file asks to call `{shown(name)}` when it is read. It was not called.**")
    lines.append("- With " + ", ".join(f"{name} {number}" for name, number in report["versions"].items()))
    return "\n".join(lines)
