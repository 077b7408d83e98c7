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


def made_up(**times: list[float]) -> dict:
    """Return a result of so many milliseconds: peers by name, floors by what they are."""
    from compare import Timed
    from jobs import COPY, FILL, PLAIN

    floors = {"fill": FILL, "plain": PLAIN, "copy": COPY}
    ways = []
    for name, ms in times.items():
        peer, way = ("floor", floors[name]) if name in floors else (name, "")
        moved = 2 * 10**9 if name == "copy" else 0
        ways.append(
            Timed(peer, way, first_ms=1.0, repeats_ms=ms, cpu_ms=ms, peak_mb=2.0, idle_mb=1.0,
                  moved=moved)
        )  # fmt: skip
    return {"job": "gradients", "model": "mlp", "examples": 8, "bytes": 10**9, "ways": ways}


def sketched(*arrays: np.ndarray) -> list[dict]:
    spec = importlib.util.spec_from_file_location("serve", FOLDER / "workers" / "serve.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return [module.sketched(array) for array in arrays]


@pytest.mark.more
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


@pytest.mark.more
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
    ours = Process("perjac", PEERS["perjac"], work, tmp_path, {}, 120, 1)
    liar = Process("liar", Peer(str(worker)), work, tmp_path, {}, 3, 1)
    cell = Cell("gradient_norms", JOBS["gradient_norms"], 4, tmp_path)
    try:
        assert cell.check(ours)
        assert not cell.check(liar)
        liar = Process("liar", Peer(str(worker)), work, tmp_path, {}, 3, 1)
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


def test_making_an_environment_again_keeps_what_is_there(monkeypatch, tmp_path):
    import environments

    steps = []
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setattr(environments, "_step", lambda name, command: steps.append(command))
    fetched = tmp_path / "torch" / "lib" / "fetched"
    fetched.parent.mkdir(parents=True)
    fetched.touch()
    (tmp_path / "torch" / "made").write_text("torch==1.0")
    environments.make("torch")
    assert fetched.exists()
    assert any(part.startswith("keras==") for part in steps[-1])
    count = len(steps)
    environments.make("torch")
    assert len(steps) == count


@pytest.mark.parametrize(
    ("offset", "factor", "exponent"), [(0, 0.5, 1), (2, 0.03, 1), (1, 0.5, 2), (0, 3, 0.5)]
)
def test_exponents_of_known_laws(offset, factor, exponent):
    from fit import power

    sizes = 2 ** np.arange(8)
    costs = offset + factor * sizes**exponent
    exact = power(sizes, costs)
    assert exact.exponent == pytest.approx(exponent, abs=1e-4)
    np.testing.assert_allclose(exact(sizes), costs, rtol=1e-4)
    assert exact.error < 1e-3
    errors = []
    for seed in range(20):
        noise = np.exp(0.02 * np.random.default_rng(seed).standard_normal(8))
        found = power(sizes, costs * noise)
        errors.append((found.exponent - exponent) / found.error)
    assert 0.4 < np.std(errors) < 3  # the error that is told is the one that is made


def test_a_fit_needs_more_points_than_it_has_unknowns():
    from fit import power

    with pytest.raises(ValueError, match="at least four"):
        power([1, 2, 4], [1, 2, 4])


def test_ratios_of_made_up_times():
    from summary import Standing, geometric_mean, losses, means

    first = Standing.of(
        made_up(perjac=[9, 10, 30], JAX=[80], TensorFlow=[40], BackPACK=[5], Opacus=[7, 20, 21],
                fill=[4], plain=[1], copy=[20])
    )  # fmt: skip
    assert [way.peer for way in first.others] == ["BackPACK", "Opacus", "TensorFlow", "JAX"]
    assert first.ratio(first.quickest(special=True)) == pytest.approx(0.5)
    assert first.ratio(first.quickest(special=False)) == pytest.approx(4)
    assert first.floor_ratios() == pytest.approx((2.5, 2.0))
    assert first.bandwidth() == pytest.approx((100.0, 100.0))
    second = Standing.of(made_up(perjac=[10], JAX=[90]))
    assert second.quickest(special=True) is None
    assert second.floor_ratios() == (None, None)
    assert geometric_mean([]) is None
    found = means([first, second])
    assert found["the quickest specialist"] == (pytest.approx(0.5), 1)
    assert found["the quickest general-purpose way"] == (pytest.approx(6), 2)
    assert found["the quickest of all"] == (pytest.approx((0.5 * 9) ** 0.5), 2)
    told = losses([first, second])
    assert told.count("\n") == 0
    assert "BackPACK takes 0.50 of perjac's time (5.0 against 10.0 ms)" in told
    assert losses([second]) == "Nowhere in this run."


def test_a_floor_below_a_job_without_perjac_is_no_ratio():
    from summary import Standing, losses, means, text

    alone = Standing.of(made_up(JAX=[1.0], fill=[1.0]))
    assert losses([alone]) == "Nowhere in this run."
    assert means([alone])["the quickest of all"] == (None, 0)
    assert "not measured" in text([alone])


def test_the_page_is_written_from_the_records(tmp_path):
    import report
    import scaling

    about = {
        "machine": "a made-up machine", "cores": 4, "threads": 4, "clock": "wall",
        "load": [0.0, 0.1], "python": "3", "repeats": 1, "versions": {"perjac": "9"},
        "absent": {}, "carried": False, "device": "cpu",
    }  # fmt: skip
    page = tmp_path / "performance.md"
    results = [made_up(perjac=[10.0], JAX=[42.0], Opacus=[8.0], copy=[20.0])]
    report.write(tmp_path, results, about)
    run_report = [sys.executable, str(FOLDER / "report.py"), str(tmp_path / "latest.json")]
    subprocess.run([*run_report, "--page", str(page)], check=True, capture_output=True)
    text = page.read_text()
    assert "$" not in text
    assert "JAX 4.20" in text
    assert "Opacus takes 0.80" in text
    assert "![Ratios to perjac's time](performance_ratios.png)" in text
    assert (tmp_path / "performance_ratios.png").exists()
    assert "make bench-scaling" in text.split("## Cost against size")[1][:200]

    points = [
        {"size": n, "ms": 3.0 * n, "mb": 10.0 * n, "limit_bytes": 75 * 10**6} for n in (1, 2, 4, 8)
    ]
    found = {"machine": "", "threads": 4, "clock": "wall", "limit": "75MB",
             "series": [scaling.fitted("B", "weights", points)]}  # fmt: skip
    scaling.write(tmp_path, found)
    report.write(tmp_path / "carried", results, {**about, "carried": True})
    subprocess.run([*run_report, "--page", str(page)], check=True, capture_output=True)
    text = page.read_text()
    assert "| 3, 24 | 1.00 ± 0.00 | 0 | 10.0, 80.0 | 1.00 ± 0.00 | **not at 8** |" in text
    assert (tmp_path / "performance_scaling.png").exists()
    assert "no GPU was found" in text
    assert "| 1000.0 | 100.0 | 100.0 | 100% |" in text


@pytest.mark.more
def test_programs_are_carried_checked_and_timed(tmp_path):
    folder = tmp_path / "carried"
    jobs = ["--jobs", "weights", "gradient_norms"]
    carry = [sys.executable, str(FOLDER / "carry.py"), str(folder), "--models", "tiny", *jobs]
    subprocess.run(carry, check=True, capture_output=True)
    file = folder / "tiny" / "carried.json"
    about = json.loads(file.read_text())
    about["jobs"]["gradient_norms"]["expected"][0]["projections"][0] += 1.0
    file.write_text(json.dumps(about))
    command = [sys.executable, str(folder / "benchmarks" / "run.py"), "--carried", str(folder),
               "--peers", "JAX", "floor", "--repeats", "1", "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "latest.json").read_text())
    rows, norms = found["results"]
    assert rows["bytes"] == 4 * 4 * 3 * (6 * 5 + 5 + 5 * 3 + 3)
    ways = {(way["peer"], way["way"]): way for way in rows["ways"]}
    assert 0 < ways["perjac", ""]["error"] < 1e-5
    assert 0 < ways["JAX", ""]["error"] < 1e-5
    assert ways["floor", "memory copied"]["moved"] > 10**8
    assert all(way["repeats_ms"] for way in rows["ways"])
    for way in norms["ways"]:  # what was expected is wrong: so must all be that were right
        assert way["peer"] == "floor" or "wrong answer" in way["left_out"]
    assert "**no GPU was found**" in (tmp_path / "latest.md").read_text()


@pytest.mark.more
def test_costs_are_measured_as_something_grows(tmp_path):
    command = [sys.executable, str(FOLDER / "scaling.py"), "--axes", "K", "--jobs", "weights",
               "--points", "4", "--repeats", "1", "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (series,) = json.loads((tmp_path / "scaling.json").read_text())["series"]
    weights = 64 * 128 + 128 + 128 * 256 + 256
    for point in series["points"]:
        answer_mb = 32 * point["size"] * weights * 4 / 1e6
        # Arrays below a quarter of a megabyte are given out, and counted, elsewhere.
        assert 0.98 * answer_mb < point["mb"] < 4 * answer_mb + 20
        assert point["ms"] > 0
    assert [point["size"] for point in series["points"]] == [2, 4, 8, 16]
    assert 0.8 < series["mb"]["exponent"] < 1.2
    assert (tmp_path / "scaling.png").stat().st_size > 1000
