"""What can end a measurement early.

ProfilerError
├── EngineError        the engine did not start, died, hung or refused what it was asked
│   └── OutOfMemory    the cause was memory: the device's, or too little left for a KV cache
├── LoadError          the load could not be driven as asked
├── SharingError       the device can't be shared among engines here (`tightship.profiler.sharing`)
├── LengthsError       the lengths of the workload can't be used, or are not those the profile is of
└── ReportError        the API server refused what was reported: retrying would not help
"""

from __future__ import annotations


class ProfilerError(Exception):
    """Base of everything this package raises on purpose."""


class EngineError(ProfilerError):
    """The engine did not start, died, hung or refused a request; the message carries its last words."""


class OutOfMemory(EngineError):
    """The engine did not fit: the device's memory, or what was left of it for a KV cache, did not suffice."""


class LoadError(ProfilerError):
    """The load could not be driven as asked."""


class LengthsError(ProfilerError):
    """The lengths of the workload can't be used, or are not those the profile is of; the message says what to do."""


class ReportError(ProfilerError):
    """The API server refused what was reported, and would refuse it again."""
