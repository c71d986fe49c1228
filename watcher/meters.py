"""Volume meters: how many bytes were written to a partition. Events say when to look, the meter says how much."""

from typing import Protocol


class Meter(Protocol):
    """One partition's written bytes. A reading is a few system calls, cheap enough for once a second."""

    @property
    def kind(self) -> str:
        """`xfs`, `blockdev`, `ext4` or `growth`."""

    def read(self) -> int:
        """Bytes written since some fixed time in the past, never going down; raises OSError if the source is gone."""

    @property
    def immediate(self) -> bool:
        """True if a write counts at once (XFS statistics), False if at writeback (block devices)."""
