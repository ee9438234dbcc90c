"""What every package's tests share: the `arch` fixture, GPU tests skipped where none is, and no run of nothing."""

import importlib.util
import os

import pytest

from flashrnn_core.archs import ARCHS

collect_ignore = ["docs/conf.py"]  # no test: it belongs to Sphinx


def pytest_generate_tests(metafunc):
    """A test that takes `arch` runs for every architecture, or for the one that FLASHRNN_ARCH names."""
    if "arch" in metafunc.fixturenames:
        wanted = os.environ.get("FLASHRNN_ARCH")
        chosen = [arch for arch in ARCHS if wanted in (None, arch.name)]
        if not chosen:
            raise pytest.UsageError(f"FLASHRNN_ARCH={wanted}: expected one of {[arch.name for arch in ARCHS]}")
        metafunc.parametrize("arch", [pytest.param(a, id=a.name, marks=pytest.mark.arch) for a in chosen])


def pytest_collection_modifyitems(items):
    if any("gpu" in item.keywords for item in items) and not _has_gpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


def _has_gpu():
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def pytest_sessionfinish(session, exitstatus):
    """Zero tests run is a failure: pytest itself passes a run in which every test was skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    ran = reporter is None or session.config.option.collectonly or reporter.stats.get("passed")
    if exitstatus == pytest.ExitCode.OK and not ran:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
