"""How much memory work takes, and how many cases at once fit into what may be used."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch

from knowpatch.errors import OptionError

log = logging.getLogger(__name__)

MOST = 10
"""Cases at once."""
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Meter:
    """Seconds and peak memory of a block of work.

    The peak is that of the process (where the system cannot measure it, what is in use when the
    block ends) and of the accelerator that the model is on.
    """

    def __init__(self, device: torch.device) -> None:
        # Every accelerator's module in torch has these; the processor's has not.
        self._backend: Any = getattr(torch, device.type, None)
        self.seconds, self.peak = 0.0, 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Measure the block."""
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # Linux: forget the peak so far
        if counted := hasattr(self._backend, "reset_peak_memory_stats"):
            self._backend.reset_peak_memory_stats()
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds = perf_counter() - start
            self.peak = peak() + (self._backend.max_memory_allocated() if counted else 0)


def peak() -> int:
    """Bytes of the process at its peak, where the system tells, else now."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = _STATUS.read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return in_use()


def in_use() -> int:
    """Bytes of the process now."""
    return int(psutil.Process().memory_info().rss)


def check_room(limit: int | None) -> None:
    """OptionError if what is loaded takes all that may be used."""
    used = in_use()
    if limit is not None and used >= limit:
        raise OptionError(
            f"the model alone takes {used / 1e6:.0f} MB of the {limit / 1e6:.0f} MB that "
            "may be used: give more memory, or load it in bfloat16 or 8 bits"
        )


class Budget:
    """How many cases to take at once, so that memory stays below a limit.

    It starts with few where a limit is given, and goes by what each round took.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.start = peak() if limit is None else in_use()
        self.cases = MOST if limit is None else 1

    def used(self, bytes_: int) -> None:
        """A round with `self.cases` cases came to a peak of `bytes_`."""
        if self.limit is None:
            return
        each = max(bytes_ - self.start, 1) / self.cases
        fits = int((self.limit - self.start) // each)
        if fits < 1:
            log.warning(
                "one case at a time takes %.0f MB, more than the %.0f MB that may be used",
                bytes_ / 1e6,
                self.limit / 1e6,
            )
        self.cases = max(1, min(MOST, fits, 2 * self.cases))
