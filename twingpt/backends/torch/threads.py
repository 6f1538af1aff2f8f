"""PyTorch's threads on a CPU: fewer while other processes keep cores busy.

It has no twin: MLX computes on threads of its own, whose number it gives no way to change.
"""

from __future__ import annotations

import functools
import os

import torch

from twingpt.backends import host
from twingpt.core.backend import Device


class Threads:
    """As many threads as the cores that others leave free, at most those that PyTorch began with.

    A thread that waits at a barrier for one without a core costs more than it computes. The number is changed after
    two looks that agree, and never where the user has set it, in the environment or by torch.set_num_threads.
    """

    def __init__(self) -> None:
        self.most = self.now = self.wanted = torch.get_num_threads()
        self.others = host.OtherLoad()

    def adapt(self) -> None:
        """Look at the machine, once in a while; to be called by the thread that computes."""
        busy = self.others.read()
        if busy is None or torch.get_num_threads() != self.now:
            return
        before, self.wanted = self.wanted, max(1, min(self.most, host.cores() - round(busy)))
        if before == self.wanted != self.now:
            torch.set_num_threads(self.wanted)
            self.now = self.wanted


@functools.cache
def _threads() -> Threads | None:
    asked_for = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys()
    return None if asked_for else Threads()


def adapt_threads(device: Device) -> None:
    """Compute on the cores that others leave free, where the device is a CPU."""
    if device.kind == "cpu" and (threads := _threads()):
        threads.adapt()
