"""vLLM's command line: every option of its parser, with the types that lead to argparse's own complaints.

`arguments.json` lists the option strings by how they take values, as vLLM's parser has them. Options that mean nothing
to a simulation are accepted and ignored, as they would be on hardware that they don't matter for; one that vLLM doesn't
know ends in usage and exit status 2, as there. As in vLLM, underscores in names stand for dashes, and sub-options of a
configuration (`--compilation-config.x`, `-cc.x`) are accepted.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_GRAPH_SIZE = 512
_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_LARGE_GPU = 70 * 2**30
_HUGE_GPU = 160 * 2**30


@dataclass(frozen=True)
class Options:
    """What the simulation heeds. Sizes in bytes or tokens; None where vLLM finds its own value."""

    model: str
    served_names: tuple[str, ...]
    revision: str | None
    host: str | None
    port: int
    dtype: str
    seed: int
    api_key: tuple[str, ...]
    max_model_len: int | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    block_size: int
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    capture_sizes: tuple[int, ...] | None
    enforce_eager: bool
    chunked_prefill: bool
    prefix_caching: bool
    shutdown_timeout: int

    def sequences(self, gpu_memory: int) -> int:
        """Return max_num_seqs, or vLLM's default for a GPU of that many bytes."""
        return self.max_num_seqs or (1024 if gpu_memory >= _LARGE_GPU else 256)

    def token_budget(self, gpu_memory: int) -> int:
        """Return max_num_batched_tokens, or vLLM's default for a GPU of that many bytes."""
        if self.max_num_batched_tokens:
            return self.max_num_batched_tokens
        default = 16384 if gpu_memory >= _HUGE_GPU else 8192 if gpu_memory >= _LARGE_GPU else 2048
        return max(default, self.sequences(gpu_memory))

    def graph_sizes(self, sequences: int) -> tuple[int, ...]:
        """Return the batch sizes for which CUDA graphs are captured."""
        if self.enforce_eager:
            return ()
        if self.capture_sizes is not None:
            return tuple(sorted(set(self.capture_sizes)))
        largest = min(2 * sequences, MAX_GRAPH_SIZE)
        sizes = [1, 2, 4, *range(8, 256, 8), *range(256, MAX_GRAPH_SIZE + 1, 16)]
        return tuple(size for size in sizes if size <= largest)


def parse(arguments: Sequence[str]) -> Options:
    """Read vLLM's command line.

    Raises:
        SystemExit: with status 2 after argparse's usage and message, as vLLM's own parser would.
    """
    parser = _parser()
    values = vars(parser.parse_args([_dashed(argument) for argument in arguments if not _suboption(argument)]))
    model = values["model"] or values["model_tag"] or "Qwen/Qwen3-0.6B"
    if values["max_num_seqs"] is not None and values["max_num_seqs"] < 1:
        parser.error(f"argument --max-num-seqs: must be at least 1, not {values['max_num_seqs']}")
    return Options(
        model=model,
        served_names=tuple(values["served_model_name"] or (model,)),
        revision=values["revision"],
        host=values["host"],
        port=8000 if values["port"] is None else values["port"],
        dtype=values["dtype"] or "auto",
        seed=values["seed"] or 0,
        api_key=tuple(values["api_key"] or ()),
        max_model_len=values["max_model_len"],
        max_num_seqs=values["max_num_seqs"],
        max_num_batched_tokens=values["max_num_batched_tokens"],
        block_size=values["block_size"] or 16,
        gpu_memory_utilization=_default(values["gpu_memory_utilization"], 0.92),
        kv_cache_memory_bytes=_optional_size(parser, "kv-cache-memory-bytes", values["kv_cache_memory_bytes"]),
        capture_sizes=_capture_sizes(parser, values["compilation_config"], values["cudagraph_capture_sizes"]),
        enforce_eager=bool(values["enforce_eager"]),
        chunked_prefill=bool(values["enable_chunked_prefill"]),
        prefix_caching=values["enable_prefix_caching"] is not False,
        shutdown_timeout=values["shutdown_timeout"] or 0,
    )


def size(text: str) -> int:
    """Read a number as vLLM does: `k`, `m`, `g`, `t` are powers of 1000, capitals of 1024 and without a fraction.

    Raises:
        ValueError: it is none of those.
    """
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kKmMgGtT])?", text.strip())
    if match is None or ("." in match[1] and (match[2] is None or match[2].isupper())):
        raise ValueError(f"no size: {text!r}")
    return int(float(match[1]) * _SUFFIXES[match[2]]) if match[2] else int(match[1])


size.__name__ = "human_readable_int"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="api_server.py", description="Simulated vLLM OpenAI-compatible server.")
    parser.add_argument("model_tag", nargs="?")
    known: dict[str, list[list[str]]] = json.loads(Path(__file__).with_name("arguments.json").read_text())
    kinds: dict[str, dict[str, Any]] = {
        "flag": {"action": "store_true", "default": None},
        "list": {"nargs": "+"},
        "optional": {"nargs": "?"},
        "int": {"type": int},
        "float": {"type": float},
        "size": {"type": size},
        "text": {},
    }
    for kind, options in known.items():
        for names in options:
            if kind == "boolean":
                positive = [name for name in names if not name.startswith("--no-")]
                parser.add_argument(*positive, action=argparse.BooleanOptionalAction, default=None)
            else:
                parser.add_argument(*names, **kinds[kind])
    return parser


def _dashed(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _suboption(argument: str) -> bool:
    return bool(re.match(r"(--[\w-]+-config|-cc)\.[\w.]+=|-O\d?$|-O=", argument))


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def _optional_size(parser: argparse.ArgumentParser, name: str, text: str | None) -> int | None:
    if text is None or text == "None":
        return None
    try:
        return size(text)
    except ValueError:
        parser.error(f"argument --{name}: invalid human_readable_int value: {text!r}")


def _capture_sizes(
    parser: argparse.ArgumentParser, configuration: str | None, sizes: list[str] | None
) -> tuple[int, ...] | None:
    try:
        if sizes is not None:
            return tuple(int(text) for text in sizes)
        values = json.loads(configuration) if configuration else {}
        found = values.get("cudagraph_capture_sizes") if isinstance(values, dict) else None
        return None if found is None else tuple(int(number) for number in found)
    except (ValueError, TypeError) as error:
        parser.error(f"argument --compilation-config/-cc: Value {configuration or sizes} cannot be converted: {error}")
