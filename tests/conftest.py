"""Devices, hypothesis profiles, and what several tests share."""

import os
import signal

import hypothesis
import pytest
import torch

# No test depends on how fast the machine is: without a deadline, and without the check that data are drawn fast enough.
no_hurry = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("default", **no_hurry, max_examples=20, derandomize=True, database=None)
hypothesis.settings.register_profile("quick", parent=hypothesis.settings.get_profile("default"), max_examples=4)
hypothesis.settings.register_profile("search", **no_hurry, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("STBP_CUDA_HYPOTHESIS", "default"))

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


def pytest_configure() -> None:
    # A shell lets what it starts in the background ignore SIGINT, and processes that tests start and interrupt inherit
    # that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(scope="session")
def hasty_compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The C++ compiler without its optimisations, where only that it compiles counts."""
    script = tmp_path_factory.mktemp("compiler") / "c++"
    script.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="session", params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    return request.param
