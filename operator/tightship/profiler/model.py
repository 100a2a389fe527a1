"""What the model's own files say: its vocabulary, and the commit its name on the hub resolved to.

Read from the model's directory, or from the hub's cache once an engine has fetched it there. Both are conveniences: without them
prompts use low token ids, which every vocabulary has, and the commit stays unknown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

SMALL_VOCABULARY: Final = 1000


@dataclass(frozen=True)
class ModelFiles:
    """What was found."""

    vocabulary: int
    """Token ids below this are valid."""
    commit: str | None = None


def read_model(model: str, revision: str | None, environ: Mapping[str, str]) -> ModelFiles:
    """Look at a model directory, or at the hub cache's snapshot of `ORGANISATION/NAME` at a revision."""
    directory, commit = (Path(model), None) if Path(model).is_dir() else _snapshot(model, revision or "main", environ)
    config = _config(directory)
    text = config.get("text_config")
    size = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    return ModelFiles(size if isinstance(size, int) and size > 1 else SMALL_VOCABULARY, commit)


def _snapshot(model: str, revision: str, environ: Mapping[str, str]) -> tuple[Path, str | None]:
    home = Path(environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    cached = Path(environ.get("HF_HUB_CACHE") or home / "hub") / ("models--" + model.replace("/", "--"))
    try:
        commit = (cached / "refs" / revision).read_text().strip()
    except OSError:
        commit = revision
    directory = cached / "snapshots" / commit
    return directory, commit if directory.is_dir() else None


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
