"""What can end a measurement early.

ProfilerError
├── EngineError        the engine did not start, died, hung or refused what it was asked
│   ├── DeviceError    no engine can run: there is no device, or it can't be read any more (`tightship.profiler.gpu`)
│   ├── OutOfMemory    the cause was memory: the device's, or too little left for a KV cache
│   └── UnansweredError  it runs, but fails requests or sends no tokens
├── LoadError          the load could not be driven as asked
├── BudgetSpentError   the budget ended while something was under way
├── SharingError       the device can't be shared among engines here (`tightship.profiler.sharing`)
├── LengthsError       the lengths of the workload can't be used, or are not those the profile is of
└── ReportError        the API server refused what was reported: retrying would not help
"""

from __future__ import annotations

from tightship.profiler.lastwords import is_memory


class ProfilerError(Exception):
    """Base of everything this package raises on purpose."""


class EngineError(ProfilerError):
    """The engine did not start, died, hung or refused a request; the message carries its last words."""


class OutOfMemory(EngineError):
    """The engine did not fit: the device's memory, or what was left of it for a KV cache, did not suffice."""


def kind_of(words: str) -> type[EngineError]:
    """What an engine failed of by its last words: `OutOfMemory` where they speak of memory."""
    return OutOfMemory if is_memory(words) else EngineError


class UnansweredError(EngineError):
    """The engine runs, but fails requests or sends no tokens: what its clients saw, without its own words yet."""

    def with_words(self, words: str) -> EngineError:
        """The same with the engine's last words, which its clients can't know; `words` is empty where it said nothing."""
        return kind_of(words)(f"{self}; its last words: {words or 'none'}")


class LoadError(ProfilerError):
    """The load could not be driven as asked."""


class BudgetSpentError(ProfilerError):
    """The budget ended while something was under way, or before it could begin."""


class LengthsError(ProfilerError):
    """The lengths of the workload can't be used, or are not those the profile is of; the message says what to do."""


class ReportError(ProfilerError):
    """The API server refused what was reported, and would refuse it again."""
