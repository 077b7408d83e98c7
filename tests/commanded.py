"""Commands run as a user types them, in this process."""

from __future__ import annotations

import sys

import pytest

from perjac.cli import main


def run(capfd, *arguments) -> tuple[int, str, str]:
    """Run main in this process; return its exit status and what it printed."""
    before = sys.argv
    sys.argv = ["perjac", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            main.main()
    finally:
        sys.argv = before
    printed = capfd.readouterr()
    return stop.value.code, printed.out, printed.err
