"""What the driver takes of the card beside what it charges to the process, bytes. No torch.

Measured with benchmarks/probe_driver.py on an H200 (driver 580.159, 2026-11-28): NVML's used memory of the whole GPU less what it was
before the process came, against NVML's figure of the process.
"""

from __future__ import annotations

__all__ = ["DRIVER_BYTES", "LATER_BYTES", "PageTables", "page_table_bytes"]

DRIVER_BYTES = 9_240_576  # 8.8 MiB, from the moment that a process has its CUDA context
# Modules that a first use does not reach, such as kernels for a shape of their own: 2 MiB in the runs measured.
LATER_BYTES = 4 * 2**20
_GRANULE = 2 * 2**20  # the driver takes device memory in pages of 2 MiB
_PAGE, _ENTRY = 4096, 8  # pinned host memory is mapped in pages of 4 KiB with 8 bytes each, huge pages or not
_SPARE = 3 * 2**19  # 1.5 MiB of tables come with the context (seen: between 1.25 and 1.9)
_KEPT = 4 * 2**20  # stay beyond what is needed when memory is unpinned (seen: 2 to 4 MiB)


def page_table_bytes(pinned_bytes: int) -> int:
    """Device memory that the page tables of so much pinned host memory take."""
    needed = -(-pinned_bytes // _PAGE) * _ENTRY - _SPARE
    return max(0, -(-needed // _GRANULE) * _GRANULE)


class PageTables:
    """The page tables on the card while host memory is pinned and unpinned: a little of what was taken stays."""

    def __init__(self) -> None:
        self.held_bytes = 0

    def grown(self, pinned_bytes: int) -> int:
        """What they would hold with so much pinned in all."""
        return max(self.held_bytes, page_table_bytes(pinned_bytes))

    def update(self, pinned_bytes: int) -> None:
        """Bytes pinned in all now."""
        needed = page_table_bytes(pinned_bytes)
        self.held_bytes = max(needed, min(self.held_bytes, needed + _KEPT))
