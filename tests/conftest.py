"""What every test file shares: a quiet TensorFlow, and hypothesis without deadlines."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # bounds below are those of the CPU

os.environ.setdefault("PERJAC_CACHE", "off")  # nothing is known from an earlier run

import hypothesis

# Tracing a model takes a third of a second: few examples, and no deadline for each.
hypothesis.settings.register_profile("perjac", max_examples=8, deadline=None, derandomize=True)
hypothesis.settings.load_profile("perjac")


def pytest_sessionfinish(session):
    """Write docs/coverage.md from what the zoo's tests found, once, where all is gathered."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if hasattr(session.config, "workerinput") or reporter is None:
        return
    passed = reporter.stats.get("passed", [])
    found = [v for report in passed for key, v in report.user_properties if key == "coverage"]
    if found:
        from zoo import page

        page.update(found)
