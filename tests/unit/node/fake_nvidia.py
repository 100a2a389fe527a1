"""Programs in place of NVIDIA's two: they print what a test put into `state.json`, and the daemon runs until told to quit."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SMI = """#!{python} -S
import json, sys
state = json.load(open({state!r}))
if state["smi"] is None:
    print("No devices were found", file=sys.stderr)
    sys.exit(6)
assert sys.argv[1:] == ["--query-gpu=uuid,name,memory.total,driver_version", "--format=csv,noheader,nounits"]
print(state["smi"])
"""

CONTROL = """#!{python} -S
import json, os, signal, sys, time
folder = {folder!r}
state = json.load(open({state!r}))
def note(event):
    with open(folder + "/journal", "a") as journal:
        journal.write(json.dumps({{"event": event, "pid": os.getpid(), "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}}) + "\\n")
if sys.argv[1:] == ["-f"]:
    def on_term(number, frame):
        note("term")
        sys.exit(0)
    signal.signal(signal.SIGTERM, on_term)
    note("daemon")
    while not os.path.exists(folder + "/quit") or state["deaf"]:
        time.sleep(0.02)
        if state["crash"]:
            sys.exit(3)
    note("quit")
    sys.exit(0)
assert sys.argv[1:] == []
if state["down"]:
    print("Cannot find MPS control daemon process", file=sys.stderr)
    sys.exit(1)
for line in sys.stdin:
    words = line.split()
    if words[0] == "get_server_list":
        print("\\n".join(str(pid) for pid in state["servers"]))
    elif words[0] == "get_server_status":
        print("FAULT" if int(words[1]) in state["faulty"] else "ACTIVE")
    elif words[0] == "ps":
        print("PID       ID    SERVER    DEVICE             NAMESPACE     COMMAND")
        for pid in state["clients"]:
            print(f"{{pid:<9}} 1     44        GPU-00000000-000   4026531836    python3")
    elif words[0] == "get_client_list":
        print("\\n".join(str(pid) for pid in state["clients"]))
    elif words[0] == "terminate_client":
        note(" ".join(words))
    elif words[0] == "quit":
        open(folder + "/quit", "w").close()
"""


class Fakes:
    """The two programs in a folder of their own, and the state they show."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self._state: dict[str, Any] = {
            "smi": "GPU-1, NVIDIA H100 80GB HBM3, 81559, 550.54.15",
            "servers": [], "faulty": [], "clients": [], "down": False, "deaf": False, "crash": False,
        }  # fmt: skip
        self.show()
        for name, text in (("nvidia-smi", SMI), ("nvidia-cuda-mps-control", CONTROL)):
            program = self.bin / name
            program.write_text(text.format(python=sys.executable, folder=str(folder), state=str(folder / "state.json")))
            program.chmod(0o755)

    @property
    def path(self) -> str:
        return f"{self.bin}{os.pathsep}{os.environ['PATH']}"

    def show(self, **changes: Any) -> None:
        """Change what the programs show from now on."""
        self._state |= changes
        partial = self.folder / "state.part"
        partial.write_text(json.dumps(self._state))
        partial.replace(self.folder / "state.json")

    def events(self, kind: str) -> list[dict[str, Any]]:
        journal = self.folder / "journal"
        lines = journal.read_text().splitlines() if journal.exists() else []
        return [event for line in lines if (event := json.loads(line))["event"] == kind]
