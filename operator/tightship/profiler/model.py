"""What the model's own files say: its vocabulary, its tokenizer, and the commit its name on the hub resolved to.

Read from the model's directory, or from the hub's cache once an engine has fetched it there. Vocabulary and commit are conveniences: without them
prompts use low token ids, which every vocabulary has, and the commit stays unknown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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
    directory, commit = _find(model, revision, environ)
    config = _config(directory)
    text = config.get("text_config")
    size = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    return ModelFiles(size if isinstance(size, int) and size > 1 else SMALL_VOCABULARY, commit)


def tokenizer(model: str, environ: Mapping[str, str], revision: str | None = None) -> Callable[[str], int]:
    """The number of tokens of a text by the model's own tokenizer, without the special tokens that open or close a prompt.

    Uses the `tokenizers` library on the model's tokenizer.json, else `transformers` on whatever the model has; vLLM carries both.

    Raises:
        ValueError: the model's files are not there, hold no tokenizer, or neither library is installed.
    """
    directory, _ = _find(model, revision, environ)
    file = directory / "tokenizer.json"
    if not is_folder(directory):
        raise ValueError(
            f"the tokenizer of {model} isn't on this machine ({directory} is no folder): fetch the model first"
        )
    if file.is_file():
        try:
            from tokenizers import Tokenizer  # noqa: PLC0415 (only where conversations are to be counted)
        except ImportError:
            pass
        else:
            try:
                fast = Tokenizer.from_file(str(file))
            except Exception as error:  # the library raises bare Exception for a file that is none
                raise ValueError(f"{file} can't be used: {error}") from error
            return lambda text: len(fast.encode(text, add_special_tokens=False).ids)
    try:
        from transformers import AutoTokenizer  # noqa: PLC0415 (seconds to import)
    except ImportError:
        raise ValueError(
            f"neither tokenizers nor transformers can be imported, so the texts for {model} can't be counted: install tokenizers, or "
            "give lengths in tokens"
        ) from None
    try:
        slow = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} holds no tokenizer that can be used: {error}") from error
    return lambda text: len(slow.encode(text, add_special_tokens=False))


def is_folder(path: str | Path) -> bool:
    """Whether this is a folder here; what is longer than a path can be is none."""
    try:
        return Path(path).is_dir()
    except OSError:
        return False


def _find(model: str, revision: str | None, environ: Mapping[str, str]) -> tuple[Path, str | None]:
    """The model's folder and commit."""
    return (Path(model), None) if is_folder(model) else _snapshot(model, revision or "main", environ)


def _snapshot(model: str, revision: str, environ: Mapping[str, str]) -> tuple[Path, str | None]:
    home = Path(environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    cached = Path(environ.get("HF_HUB_CACHE") or home / "hub") / ("models--" + model.replace("/", "--"))
    try:
        commit = (cached / "refs" / revision).read_text().strip()
    except OSError:
        commit = revision
    directory = cached / "snapshots" / commit
    return directory, commit if is_folder(directory) else None


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
