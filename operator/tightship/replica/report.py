"""`python3 -m tightship.replica.report`: which GPU a pod got, as an init container of packs without a holder tells it.

The preflight's line of JSON goes into the termination message, which is the one way from inside a container into the pod's status that
needs no rights. The probe takes the start lock first: it opens the GPU for a moment, and nobody may give memory back while an engine
beside it starts. A refusal ends the container with its reason; the kubelet tries again.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from tightship.replica import preflight
from tightship.replica.locks import FileLock
from tightship.replica.outcome import EXIT_STATUS, Reason, RefusalError, leave_message, say
from tightship.replica.settings import TERMINATION_MESSAGE_PATH, Settings

TICK = 0.2


def report(settings: Settings) -> str:
    """The preflight's line.

    Raises:
        RefusalError: there is no GPU, or no MPS where there must be.
    """
    lock = FileLock(settings.start_lock)
    text = json.dumps({"pod": settings.pod_name, "since": int(time.time())})
    try:
        while not lock.try_acquire(text):
            time.sleep(TICK)
    except OSError as error:
        raise RefusalError(
            Reason.INVALID_SETTINGS, f"the start lock {settings.start_lock} can't be used: {error.strerror}"
        ) from error
    try:
        preflight.check_pipe(settings)
        gpu = preflight.run_probe(settings.probe)
        preflight.check_gpu(settings, gpu)
    finally:
        lock.release()
    figures = {"uuid": gpu.uuid, "name": gpu.name, "total": gpu.total, "free": gpu.free}
    return json.dumps(figures | {"mps": gpu.mps if settings.shared else None})


def main() -> int:
    """Write the line into the termination message; returns the exit status."""
    # The first process of a container has no default action for it.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
    message = Path(os.environ.get("TIGHTSHIP_TERMINATION_MESSAGE") or TERMINATION_MESSAGE_PATH)
    try:
        line = report(Settings.from_environment(os.environ))
    except RefusalError as refusal:
        say(str(refusal))
        leave_message(message, str(refusal))
        return EXIT_STATUS[refusal.reason]
    say(line)
    leave_message(message, line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
