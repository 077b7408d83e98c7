"""Long work tells how far it is, to whoever listens, on a terminal or not."""

from __future__ import annotations

import io

import keras
import numpy as np

import perjac as pj
from perjac import progress
from perjac.cli import screen


def test_methods_tell_how_many_points_are_done(monkeypatch):
    monkeypatch.setattr("perjac.saliency._problem._POINTS", 16)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    told = []
    with progress.heard(lambda done, total: told.append((done, total))):
        pj.saliency.integrated_gradients(pj.Engine(model), np.ones((2, 3), "f4"), 0, steps=20)
    assert [done for done, total in told if total == 40] == [16, 32, 40]
    progress.tell(1, 2)  # nobody listens any more
    assert (1, 2) not in told


def test_a_long_part_gets_a_line_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(screen, "_QUIET", -1.0)
    out = io.StringIO()
    for part in screen.Screen(out, out).track([0, 1], "Batches"):
        progress.tell(1000, 5000)
        progress.tell(5000, 5000)
        assert part in (0, 1)
    assert out.getvalue().splitlines() == [
        "1,000 of 5,000 points", "Batches: 1 of 2", "1,000 of 5,000 points", "Batches: 2 of 2"
    ]  # fmt: skip


def test_a_terminal_gets_bars():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    for _ in screen.Screen(out, out).track(range(3), "Batches"):
        progress.tell(1, 2)
    assert "Batches" in out.getvalue()
    assert "100%" in out.getvalue()


def test_a_terminal_shows_what_is_being_done():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out, pipe = Terminal(), io.StringIO()
    for where in (out, pipe):
        shown = screen.Screen(where, where)
        with progress.read(shown.show), progress.doing("tracing the model"):
            pass
        shown.say("Done")
    assert out.getvalue() == "\r\x1b[KTracing the model …\r\x1b[KDone\n"
    assert pipe.getvalue() == "Done\n"


def test_what_a_block_is_part_of_is_told_again_at_its_end():
    said = []
    with progress.read(said.append), progress.doing("outer"):
        with progress.doing("inner"):
            pass
        with progress.doing("other"):
            pass
    assert said == ["outer", "inner", "outer", "other", "outer", ""]
