"""docs/architecture.md names what is there, and the house has no room that it does not name."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PICTURE = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")


def tree() -> list[str]:
    """Every path of the page's first block, whose indentation says what lies in what."""
    block = re.findall(r"^```\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)[0]
    paths: list[str] = []
    folders: list[str] = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r" {2,}", line.strip())[0].split()
        folders[depth:] = []
        paths += ["/".join([*folders, name]).replace("//", "/") for name in names if name != "..."]
        folders.append(names[0].rstrip("/"))
    return paths


def test_every_path_of_the_tree_exists():
    paths = tree()
    assert len(paths) > 40
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_file_that_the_walk_names_exists():
    named = re.findall(r"`((?:fastlm|train|kernels|bench|tests)/[\w./]*)`", PAGE)
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []
    linked = re.findall(r"\]\(([\w./-]+)\)", PAGE)
    assert [link for link in linked if not (ROOT / "docs" / link).exists()] == []


def test_every_file_of_the_picture_exists():
    named = re.findall(r">((?:\w+/)+(?:\w+\.py)?)<", PICTURE)
    assert len(named) > 12
    missing = [
        path
        for path in named
        if not (ROOT / path).exists() and not (ROOT / "fastlm" / path).exists()
    ]
    assert missing == []


def test_every_room_is_in_the_tree():
    paths = {path.rstrip("/") for path in tree()}
    rooms = {f"fastlm/{path.name}" for path in (ROOT / "fastlm").iterdir() if path.is_dir()}
    rooms |= {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "bench").iterdir()
        if path.is_dir() and (path / "__init__.py").exists()
    }
    assert {room for room in rooms if not room.endswith("__pycache__")} <= paths
