"""`tightship sandbox run`: what becomes of the command it runs, with no sandbox around it."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from tightship.sandbox import cli


@pytest.mark.parametrize(
    ("command", "status"),
    [("true", 0), ("exit 7", 7), ("kill -INT $$", 130), ("kill -KILL $$", 137)],
)
def test_the_exit_status_is_what_a_shell_says_of_the_command(
    command: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sandbox(*_: Any, **__: Any) -> AbstractContextManager[SimpleNamespace]:
        return nullcontext(SimpleNamespace(environment=lambda: dict(os.environ)))

    monkeypatch.setattr(cli, "Sandbox", sandbox)
    assert cli.main(["run", "--", "sh", "-c", command]) == status
