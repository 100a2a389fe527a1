"""An engine's last words: the one line of its output that says why it stopped.

vLLM prints the cause early, in the process that hit it, and consequences after it ("Engine core initialization failed. See root cause
above."). So: an argument parser's complaint if there is one, else the last exception that is no mere consequence, else the
last lines as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

_PREFIX: Final = re.compile(
    r"^(?:\([A-Za-z0-9_ -]+pid=\d+\)\s*)?(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+[\d-]+\s+[\d:.]+\s+\[[^\]]*\]\s?)?"
)
_ARGPARSE: Final = re.compile(r"^\S+: error: .+")
_EXCEPTION: Final = re.compile(
    r"^(?:[A-Za-z_][\w.]*\.)?(?:[A-Z]\w*(?:Error|Exception|Exit)|OutOfMemory\w*)\b(?::\s.+)?$"
)
_CONSEQUENCES: Final = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "Executor failed",
    "EngineDeadError",
    "EngineGenerateError",
    "CancelledError",
    "SystemExit",
)
_CONTINUED: Final = re.compile(r"validation errors? for \S+$|:\s*$")
_MEMORY: Final = re.compile(
    r"out of memory|OutOfMemoryError|OutOfMemory\b|Free memory on device .* less than|No available memory for the cache blocks"
    r"|larger than the available KV cache memory|Available memory on node .* less than",
    re.IGNORECASE,
)
LONGEST: Final = 2000


def plain(line: str) -> str:
    """A line of vLLM's output without process and logger prefix."""
    return _PREFIX.sub("", line.rstrip(), count=1)


def last_words(lines: Sequence[str]) -> str:
    """The cause in the last lines of an engine's output, at most 2,000 characters; "" for no output at all."""
    texts = [plain(line) for line in lines]
    for text in reversed(texts):
        if _ARGPARSE.match(text.strip()):
            return text.strip()[:LONGEST]
    causes = [
        index
        for index, text in enumerate(texts)
        if _EXCEPTION.match(text.strip()) and not any(mark in text for mark in _CONSEQUENCES)
    ]
    if causes:
        return _with_detail(texts, causes[-1])[:LONGEST]
    said = [text.strip() for text in texts if text.strip()]
    return " | ".join(said[-3:])[-LONGEST:]


def _with_detail(texts: Sequence[str], index: int) -> str:
    """An exception's line, and the two after it when they carry the message (as pydantic's do)."""
    line = texts[index].strip()
    if _CONTINUED.search(line):
        return " ".join([line, *(text.strip() for text in texts[index + 1 : index + 3])])
    return line


def is_memory(words: str) -> bool:
    """Whether last words speak of memory that did not suffice, on the device or for the KV cache."""
    return bool(_MEMORY.search(words))
