"""The benchmarks' harness: answers are checked before they are timed, and who is absent is said."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Let the benchmarks' modules be found, and forget them afterwards: their names are short."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(FOLDER)):
            del sys.modules[name]


def run(out: pathlib.Path, *options: str) -> dict:
    """Run the benchmarks and return what they wrote."""
    command = [sys.executable, str(FOLDER / "run.py"), "--models", "tiny", "--out", str(out)]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "latest.json").read_text())


def sketched(*arrays: np.ndarray) -> list[dict]:
    spec = importlib.util.spec_from_file_location("serve", FOLDER / "workers" / "serve.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return [module.sketched(array) for array in arrays]


@pytest.mark.slow
def test_every_way_is_checked_and_timed(tmp_path):
    found = run(tmp_path, "--peers", "TensorFlow", "floor", "--repeats", "2",
                "--jobs", "weights", "inputs", "gradient_norms", "clipped_sum")  # fmt: skip
    for result in found["results"]:
        peers = {way["peer"] for way in result["ways"]}
        assert {"perjac", "TensorFlow", "floor"} <= peers
        for way in result["ways"]:
            assert not way["left_out"]
            assert len(way["repeats_ms"]) == 2
            assert min(way["repeats_ms"]) > 0
            assert way["peak_mb"] > 0
            if way["peer"] == "TensorFlow":
                assert way["error"] < 1e-5
    assert len(found["results"]) == 4
    text = (tmp_path / "latest.md").read_text()
    assert "one batch gradient" in text
    assert "TensorFlow: vectorized_map" in text
    assert (tmp_path / "latest.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_missing_environment_is_reported(tmp_path):
    found = run(tmp_path, "--peers", "BackPACK", "--jobs", "gradient_norms", "--repeats", "1",
                "--python", f"torch={tmp_path / 'nowhere'}")  # fmt: skip
    assert "there is no Python at" in found["about"]["absent"]["BackPACK"]
    assert "Left out: BackPACK: no environment" in (tmp_path / "latest.md").read_text()


@pytest.mark.slow
def test_a_wrong_answer_a_crash_and_a_sleeper_are_found_out(tmp_path):
    from compare import Cell
    from jobs import JOBS
    from peers import PEERS, Peer
    from process import Process

    worker = tmp_path / "by_liar.py"
    worker.write_text(
        "import os, sys, time\n"
        f"sys.path[:0] = [{str(FOLDER / 'workers')!r}, {str(FOLDER)!r}]\n"
        "import numpy as np, serve\n"
        "from serve import Way\n"
        "def gradient_norms(work):\n"
        "    wrong = np.ones(len(work.x))\n"
        "    def one(way): return Way(way, lambda found: [found])\n"
        "    return {'wrong': one(lambda: wrong), 'shape': one(lambda: wrong[1:]),\n"
        "            'error': one(lambda: 1 / 0), 'sleep': one(lambda: time.sleep(99)),\n"
        "            'after': one(lambda: wrong)}\n"
        "serve.serve({'gradient_norms': gradient_norms}, {})\n"
    )
    work = tmp_path / "work.npz"
    writer = FOLDER / "workers" / "write_work.py"
    subprocess.run([sys.executable, str(writer), "tiny", "4", str(work)], check=True)
    ours = Process("perjac", PEERS["perjac"], work, {}, 120, 1)
    liar = Process("liar", Peer(str(worker)), work, {}, 3, 1)
    cell = Cell("gradient_norms", JOBS["gradient_norms"], 4, tmp_path)
    try:
        assert cell.check(ours)
        assert not cell.check(liar)
        liar = Process("liar", Peer(str(worker)), work, {}, 3, 1)
        assert cell.check(liar)
        cell.time({"perjac": ours, "liar": liar}, 1)
    finally:
        ours.end()
        liar.end()
    told = {timed.way: timed.left_out for timed in cell.timed if timed.peer == "liar"}
    assert "wrong answer" in told["wrong"]
    assert "shapes" in told["shape"]
    assert "ZeroDivisionError" in told["error"]
    assert "took longer" in told["sleep"]
    assert "wrong answer" in told["after"]
    assert not any(timed.repeats_ms for timed in cell.timed if timed.peer == "liar")
    assert len(cell.timed[0].repeats_ms) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a: a * 1.001,
        lambda a: a[::-1],
        lambda a: a.transpose(0, 2, 1),
        lambda a: np.where(np.arange(a.size).reshape(a.shape) == 7, -a, a),
        lambda a: a * np.nan,
    ],
    ids=["scaled", "examples_swapped", "axes_swapped", "one_sign", "nan"],
)
def test_sketches_tell_answers_apart(wrong):
    from compare import difference

    right = np.random.default_rng(0).standard_normal((5, 4, 4)).astype("f4")
    assert difference(sketched(right), sketched(wrong(right))) > 5e-4
    noise = np.float32(1e-7) * np.random.default_rng(1).standard_normal(right.shape)
    assert difference(sketched(right), sketched(right + noise)) < 1e-6


def test_every_peer_has_a_worker_and_an_environment_that_is_known():
    from environments import ENVIRONMENTS
    from jobs import JOBS
    from peers import PEERS

    for peer in PEERS.values():
        file = FOLDER / "workers" / peer.worker
        assert file.exists()
        assert peer.environment is None or peer.environment in ENVIRONMENTS
        assert any(job in file.read_text() for job in JOBS)


def test_an_environment_not_made_says_how(monkeypatch, tmp_path):
    import environments

    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    with pytest.raises(environments.NoEnvironment, match="environments.py torch"):
        environments.found("torch")
    (tmp_path / "torch.failed").write_text("could not be made: no space left\n")
    with pytest.raises(environments.NoEnvironment, match="no space left"):
        environments.found("torch")
