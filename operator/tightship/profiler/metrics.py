"""What the profiler reads from an engine's `/metrics`: a small parser of the Prometheus text format and the few families that matter.

vLLM labels every sample with `engine` and `model_name`; counters and gauges are summed over engines, which for the one engine the
profiler starts is the value itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_SAMPLE: Final = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$")
_LABEL: Final = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
_ESCAPES: Final = {"\\n": "\n", '\\"': '"', "\\\\": "\\"}

GENERATION_TOKENS: Final = "vllm:generation_tokens_total"
PROMPT_TOKENS: Final = "vllm:prompt_tokens_total"
PREEMPTIONS: Final = "vllm:num_preemptions_total"
RUNNING: Final = "vllm:num_requests_running"
WAITING: Final = "vllm:num_requests_waiting"
KV_USAGE: Final = "vllm:kv_cache_usage_perc"
ITL_SUM: Final = "vllm:inter_token_latency_seconds_sum"
ITL_COUNT: Final = "vllm:inter_token_latency_seconds_count"
CACHE_INFO: Final = "vllm:cache_config_info"

_WANTED: Final = frozenset(
    {GENERATION_TOKENS, PROMPT_TOKENS, PREEMPTIONS, RUNNING, WAITING, KV_USAGE, ITL_SUM, ITL_COUNT}
)


@dataclass(frozen=True)
class EngineSample:
    """An engine's counters and gauges at one moment."""

    at: float
    """When, in seconds of the profiler's clock."""
    generation_tokens: float = 0.0
    prompt_tokens: float = 0.0
    preemptions: float = 0.0
    running: float = 0.0
    waiting: float = 0.0
    kv_usage: float = 0.0
    """Share of the KV cache in use, 0..1."""
    itl_sum: float = 0.0
    """Sum of the engine's own inter-token latencies, seconds."""
    itl_count: float = 0.0


def parse_sample(text: str, at: float) -> EngineSample:
    """Read an engine's sample from its exposition text; families that are missing count as zero."""
    sums: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in _WANTED:
            value = _value(line)
            if value is not None:
                sums[name] = sums.get(name, 0.0) + value
    return EngineSample(
        at=at,
        generation_tokens=sums.get(GENERATION_TOKENS, 0.0),
        prompt_tokens=sums.get(PROMPT_TOKENS, 0.0),
        preemptions=sums.get(PREEMPTIONS, 0.0),
        running=sums.get(RUNNING, 0.0),
        waiting=sums.get(WAITING, 0.0),
        kv_usage=sums.get(KV_USAGE, 0.0),
        itl_sum=sums.get(ITL_SUM, 0.0),
        itl_count=sums.get(ITL_COUNT, 0.0),
    )


def parse_cache_info(text: str) -> dict[str, str]:
    """The labels of `vllm:cache_config_info`: the engine's cache settings by name; empty when the engine has none."""
    for line in text.splitlines():
        if line.startswith(CACHE_INFO + "{"):
            match = _SAMPLE.match(line)
            if match is not None:
                return {name: _unescape(value) for name, value in _LABEL.findall(match[2])}
    return {}


def _value(line: str) -> float | None:
    match = _SAMPLE.match(line)
    if match is None:
        return None
    try:
        return float(match[3])
    except ValueError:
        return None


def _unescape(value: str) -> str:
    return re.sub(r"\\.", lambda found: _ESCAPES.get(found[0], found[0][1]), value)
