"""The rooms of the package: imports point one way, and what is private stays in its file."""

import ast
from pathlib import Path

import hivit_hf


PACKAGE = Path(hivit_hf.__file__).parent
TASKS = {"pretraining", "classification", "probing", "segmentation", "detection"}
# what the files of a room may import of the package, besides their own room
LOWEST = {"configuration_hivit", "modeling_hivit", "image_reading"}
ALLOWED = {
    "configuration_hivit": set(),
    "modeling_hivit": {"configuration_hivit"},
    "auto_registration": LOWEST,
    "__init__": {"auto_registration"},
    "image_reading": set(),
    "image_processing": LOWEST,
    "data": {*LOWEST, "image_processing"},
    "training": {*LOWEST, "image_processing", "data"},
    **{task: {*LOWEST, "auto_registration", "image_processing", "data", "training"} for task in TASKS},
    "hub": {*LOWEST, "auto_registration", "image_processing", "data", "training", *TASKS},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path):
    """The module, absolute, and the name of each import of a file."""
    package = ("hivit_hf", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


def violations() -> set[tuple[str, str]]:
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name, room = path.relative_to(PACKAGE).as_posix(), room_of(path)
        for module, imported in imports_of(path):
            root, _, inside = module.partition(".")
            if root == "unittest":
                found.add((name, module))
            elif root == "hivit_hf":
                target = inside.partition(".")[0] or imported
                if target != room and target not in ALLOWED[room]:
                    found.add((name, module))
                if imported.startswith("_") or "._" in inside:
                    found.add((name, f"{module}.{imported}"))
    return found


def test_imports_point_one_way():
    assert not violations()


def test_every_room_is_known():
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} == set(ALLOWED)
