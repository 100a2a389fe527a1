"""`python3 -m tightship.replica -- COMMAND...`: run COMMAND, a vLLM server, as a replica of a pack."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tightship.replica.outcome import EXIT_STATUS, Reason, RefusalError, leave_message, say
from tightship.replica.settings import TERMINATION_MESSAGE_PATH, Settings
from tightship.replica.supervisor import Supervisor


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise the command after `--`; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    try:
        if not command:
            raise RefusalError(Reason.INVALID_SETTINGS, "usage: python3 -m tightship.replica -- COMMAND [ARGUMENT...]")
        settings = Settings.from_environment(os.environ)
    except RefusalError as refusal:
        say(str(refusal))
        leave_message(Path(os.environ.get("TIGHTSHIP_TERMINATION_MESSAGE") or TERMINATION_MESSAGE_PATH), str(refusal))
        return EXIT_STATUS[refusal.reason]
    return Supervisor(settings, command, os.environ).run()


if __name__ == "__main__":
    raise SystemExit(main())
