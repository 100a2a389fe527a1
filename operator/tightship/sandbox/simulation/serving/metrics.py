"""vLLM's metrics, under its names and with its labels and buckets, for one engine.

Every sample carries `model_name` and `engine`; `vllm:cache_config_info` carries the cache's settings as labels.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping

_ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


def token_buckets(longest: int) -> tuple[float, ...]:
    """Return 1, 2, 5, 10, ... up to `longest`, as vLLM's histograms of token counts have them."""
    series = (mantissa * 10**exponent for exponent in range(10) for mantissa in (1, 2, 5))
    return tuple(float(value) for value in series if value <= longest)


class Histogram:
    """A Prometheus histogram with fixed upper bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count a value `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def lines(self, name: str, labels: str) -> Iterable[str]:
        """Yield its samples."""
        total = 0
        for bound, count in zip((*map(_number, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {float(total)}'
        yield f"{name}_count{{{labels}}} {float(total)}"
        yield f"{name}_sum{{{labels}}} {self.sum!r}"


class Metrics:
    """What one engine counts. Histograms in seconds or tokens."""

    def __init__(self, model_name: str, max_model_len: int, cache_config: Mapping[str, object]) -> None:
        self._labels = f'engine="0",model_name="{_escape(model_name)}"'
        self._cache_config = {**cache_config, "engine": "0"}
        self.preemptions = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.success = {"stop": 0, "length": 0, "abort": 0, "error": 0, "repetition": 0}
        self.inter_token_latency = Histogram(_ITL)
        self.time_per_output_token = Histogram(_ITL)
        self.time_to_first_token = Histogram(_TTFT)
        self.end_to_end = Histogram(_LATENCY)
        self.queue_time = Histogram(_LATENCY)
        self.request_prompt_tokens = Histogram(token_buckets(max_model_len))
        self.request_generation_tokens = Histogram(token_buckets(max_model_len))

    def render(self, running: int, waiting: int, cache_usage: float) -> bytes:
        """Return the exposition text; `cache_usage` is a share of 1."""
        lines: list[str] = []
        gauges = (
            ("num_requests_running", "Number of requests in model execution batches.", running),
            ("num_requests_waiting", "Number of requests waiting to be processed.", waiting),
            ("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", cache_usage),
        )
        for name, text, value in gauges:
            lines += [*_head(name, "gauge", text), f"vllm:{name}{{{self._labels}}} {float(value)!r}"]
        counters = (
            ("num_preemptions", "Cumulative number of preemption from the engine.", self.preemptions),
            ("prompt_tokens", "Number of prefill tokens processed.", self.prompt_tokens),
            ("generation_tokens", "Number of generation tokens processed.", self.generation_tokens),
        )
        for name, text, value in counters:
            lines += [*_head(f"{name}_total", "counter", text), f"vllm:{name}_total{{{self._labels}}} {float(value)!r}"]
        lines += _head("request_success_total", "counter", "Count of successfully processed requests.")
        for reason, count in self.success.items():
            lines.append(f'vllm:request_success_total{{{self._labels},finished_reason="{reason}"}} {float(count)!r}')
        for name, text, histogram in self._histograms():
            lines += [*_head(name, "histogram", text), *histogram.lines(f"vllm:{name}", self._labels)]
        lines += _head("cache_config_info", "gauge", "Information of the LLMEngine CacheConfig")
        labels = ",".join(f'{name}="{_escape(str(value))}"' for name, value in sorted(self._cache_config.items()))
        lines.append(f"vllm:cache_config_info{{{labels}}} 1.0")
        return ("\n".join(lines) + "\n").encode()

    def _histograms(self) -> tuple[tuple[str, str, Histogram], ...]:
        return (
            ("time_to_first_token_seconds", "Histogram of time to first token in seconds.", self.time_to_first_token),
            ("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", self.inter_token_latency),
            (
                "request_time_per_output_token_seconds",
                "Histogram of time_per_output_token_seconds per request.",
                self.time_per_output_token,
            ),
            ("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", self.end_to_end),
            (
                "request_queue_time_seconds",
                "Histogram of time spent in WAITING phase for request.",
                self.queue_time,
            ),
            ("request_prompt_tokens", "Number of prefill tokens processed.", self.request_prompt_tokens),
            ("request_generation_tokens", "Number of generation tokens processed.", self.request_generation_tokens),
        )


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP vllm:{name} {text}", f"# TYPE vllm:{name} {kind}"]


def _number(value: float) -> str:
    return repr(float(value))


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
