"""The simulation under a name of its own: in an engine image `tightship` is what the init container injected."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[3])]
