"""Parity is tested on every device: here `engines` is a backend on a device, and `twins` are two."""

import pytest


@pytest.fixture(scope="module")
def engines(placed):
    """Each installed backend on each device of this machine in turn."""
    return placed


@pytest.fixture(scope="module")
def twins(placed_twins):
    """Both backends on the CPU, and each other device of one beside the CPU of the other; or a skip."""
    return placed_twins
