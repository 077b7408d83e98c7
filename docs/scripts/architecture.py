"""Draws the rooms of perjac from its code, and lists the functions that one warm call enters.

python docs/scripts/architecture.py            rewrites docs/architecture.svg and .md
python docs/scripts/architecture.py --check    fails where they are not what the code says
"""

from __future__ import annotations

import argparse
import ast
import collections
import os
import pathlib
import re
import sys
from collections.abc import Callable

DOCS = pathlib.Path(__file__).parents[1]
HOUSE = DOCS.parent / "src" / "perjac"
PICTURE, PAGE = DOCS / "architecture.svg", DOCS / "architecture.md"

# From the roof to the ground, as tests/test_house.py holds them.
FLOORS = [
    ["cli"],
    ["callbacks"],
    ["saliency", "data"],
    ["engine"],
    ["_core.runtime"],
    ["fisher", "_core.planning"],
    ["jacobian", "gradients", "_rows"],
    ["_core.autodiff"],
    ["_core.rules"],
    ["_core.graph"],
    ["_core.factors"],
    ["_core.model"],
    ["_core.backend"],
]
# Imported from everywhere, so that arrows to them would say nothing.
_GROUND = ["progress", "pjrt", "_drawing", "errors", "_version"]

_WIDTH, _ROW, _BOX, _TALL, _MARGIN = 720, 58, 148, 36, 14
_STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1c2430 }
.small { font-size: 11px; fill: #5a6475 }
.public { fill: #e7f0fa; stroke: #2166ac }
.inner { fill: #f4f4f1; stroke: #8a8f98 }
path { fill: none; stroke: #2166ac; stroke-opacity: 0.28 }
"""


def room_of(module: str) -> str:
    """Return the room of a module named from perjac on: `_core.graph`, `saliency`, `engine`."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "_core" else parts[0]


def read() -> tuple[dict[str, int], collections.Counter[tuple[str, str]]]:
    """Return how many files each room has, and how many import statements lead to another room."""
    files: dict[str, int] = collections.Counter()
    doors: collections.Counter[tuple[str, str]] = collections.Counter()
    for path in HOUSE.rglob("*.py"):
        name = ".".join(path.relative_to(HOUSE).with_suffix("").parts)
        room = room_of(name)
        if path.name != "__init__.py":
            files[room] += 1
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            if node.module == "perjac":
                names = [alias.name for alias in node.names]
            elif node.module.startswith("perjac."):
                inner = node.module.removeprefix("perjac.")
                names = [f"{inner}.{alias.name}" for alias in node.names]
            else:
                continue
            for other in {room_of(n) for n in names} - {room}:
                doors[room, other] += 1
    return files, doors


def picture() -> str:
    """Return the rooms as an SVG: imports lead down, thicker where there are more."""
    files, doors = read()
    places = {}
    for row, rooms in enumerate(FLOORS):
        for n, room in enumerate(rooms):
            x = _WIDTH / 2 + (n - (len(rooms) - 1) / 2) * (_BOX + 40) - _BOX / 2
            places[room] = (x, _MARGIN + row * _ROW)
    lines, boxes = [], []
    for (one, other), count in sorted(doors.items()):
        if one not in places or other not in places:
            continue
        (x, y), (u, v) = places[one], places[other]
        rows = (v - y) / _ROW
        side = 1 if (x + u) / 2 + _BOX / 2 >= _WIDTH / 2 and len(one) % 2 else -1
        bend = 0 if rows <= 1 else side * (60 + 18 * rows)
        x, u = x + _BOX / 2, u + _BOX / 2
        width = 1 + min(count, 24) / 4
        lines.append(
            f'<path d="M{x:.0f} {y + _TALL:.0f} C{x + bend:.0f} {y + _TALL + 22:.0f} '
            f'{u + bend:.0f} {v - 22:.0f} {u:.0f} {v:.0f}" stroke-width="{width:.1f}">'
            f"<title>{one} imports {other} in {count} places</title></path>"
        )
    for room, (x, y) in places.items():
        kind = "inner" if room.startswith("_") else "public"
        size = "1 file" if files[room] == 1 else f"{files[room]} files"
        boxes.append(
            f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" width="{_BOX}" height="{_TALL}" rx="5"/>'
            f'<text x="{x + _BOX / 2:.0f}" y="{y + 16:.0f}" text-anchor="middle">{room}</text>'
            f'<text class="small" x="{x + _BOX / 2:.0f}" y="{y + 30:.0f}" text-anchor="middle">'
            f"{size}</text>"
        )
    height = 2 * _MARGIN + len(FLOORS) * _ROW - (_ROW - _TALL)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
            f'aria-label="The packages of perjac, from the command line down">',
            f"<style>{_STYLE}</style>",
            *lines,
            *boxes,
            "</svg>\n",
        ]
    )


def walk(call: Callable[[], object]) -> list[tuple[str, str, int]]:
    """Return (file, function, line) for each function of perjac that a warm call enters.

    Comprehensions, lambdas and generators belong to the function around them; a function that calls
    another one several times over is listed once in a row.
    """
    for _ in range(3):
        call()
    house, found = str(HOUSE) + os.sep, []

    def entered(frame, event, _):
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(house):
            return
        if code.co_name.startswith("<"):
            return
        hop = (code.co_filename.removeprefix(house), code.co_qualname, code.co_firstlineno)
        if not found or found[-1] != hop:
            found.append(hop)

    sys.setprofile(entered)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def walks() -> dict[str, list[tuple[str, str, int]]]:
    """Return the walks of the two calls that the page shows."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import numpy as np

    import perjac as pj

    dense = keras.layers.Dense(3, activation="tanh", name="dense")
    model = keras.Sequential([keras.Input((4,)), dense, keras.layers.Dense(2, name="last")])
    model.compile(loss="mse")
    x, y = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
    engine = pj.Engine(model)
    return {
        'engine.jacobian(x)["dense/kernel"]': walk(lambda: engine.jacobian(x)["dense/kernel"]),
        "engine.gradients(x, y).norms()": walk(lambda: engine.gradients(x, y).norms()),
    }


def page(text: str) -> str:
    """Return the page with the walks as the code has them now."""
    told = []
    for title, hops in walks().items():
        files = len({file for file, _, _ in hops})
        told.append(f"`{title}`: {len(hops)} functions in {files} files.\n")
        told.append("```text")
        told += [f"{file}:{line}  {name}" for file, name, line in hops]
        told.append("```\n")
    between = r"(?s)(?<=<!-- walks -->\n).*(?=<!-- end of walks -->)"
    return re.sub(between, lambda _: "\n".join(told), text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    drawn, text = picture(), PAGE.read_text()
    if check:
        return int(drawn != PICTURE.read_text())
    PICTURE.write_text(drawn)
    PAGE.write_text(page(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
