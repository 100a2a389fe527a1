"""How virtual engines share their GPU: they wait for it in line anyway, as clients of MPS do, so there is nothing to set up."""

from __future__ import annotations

from collections.abc import Sequence

from tightship.profiler.sharing import Owner


class VirtualSharing:
    """The profiler's `Sharing` where the simulated GPU does it."""

    async def open(self) -> None:
        """Nothing to set up."""

    def environment(self, index: int) -> dict[str, str | None]:
        """Nothing an engine must be told."""
        return {}

    async def prove(self, engines: Sequence[Owner]) -> None:
        """All engines of a GPU share it."""

    async def condition(self) -> str | None:
        """Nothing that could be wrong."""
        return None

    def doubt(self, engines: int) -> str | None:
        """Nothing to doubt."""
        return None

    async def close(self) -> None:
        """Nothing to take down."""
