"""A client that owes nothing to the profiler: closed-loop streams against one address, as a user's load would be.

`python service_client.py HOST PORT MODEL --streams 256 --input 64 --output 128 --warmup 20 --seconds 40` prints one line of JSON: tokens per
second (prompt and generated), generated tokens per second, mean time between tokens, requests. Each stream holds one connection; its first
request is as if met in flight (a random age), so that the streams don't end together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from dataclasses import dataclass, field


@dataclass
class Tally:
    """What was seen between `since` and `until`."""

    since: float
    until: float
    tokens: int = 0
    gaps: int = 0
    waited: float = 0.0
    requests: int = 0
    failures: list[str] = field(default_factory=list)

    def arrived(self, now: float, last: float | None, count: int) -> None:
        if self.since <= now < self.until:
            self.tokens += count
            if last is not None:
                self.gaps += count
                self.waited += now - last


async def stream(options: argparse.Namespace, tally: Tally, seed: int) -> None:
    """One connection: request after request until the end."""
    rng = random.Random(seed)
    connection = await asyncio.open_connection(options.host, options.port)
    age = rng.randrange(options.output)
    while time.monotonic() < tally.until:
        await request(options, tally, connection, (options.input + age, options.output - age))
        age = 0
    connection[1].close()


async def request(
    options: argparse.Namespace,
    tally: Tally,
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    lengths: tuple[int, int],
) -> None:
    """One completion of exact length, (prompt, output) tokens."""
    reader, writer = connection
    prompt, output = lengths
    body = json.dumps(
        {
            "model": options.model,
            "prompt": [random.randrange(5, 1000) for _ in range(prompt)],
            "max_tokens": output,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: service\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in answer.split(b"\r\n", 1)[0]:
        raise AssertionError(answer[:200])
    last: float | None = None
    seen = 0
    while True:
        size = int(await reader.readline(), 16)
        chunk = (await reader.readexactly(size + 2))[:-2]
        if not size:
            break
        count = chunk.count(b'"text":')
        if count:
            now = time.monotonic()
            tally.arrived(now, last, count)
            last = now
            seen += count
    assert seen == output, f"{seen} tokens instead of {output}"
    if tally.since <= time.monotonic() < tally.until:
        tally.requests += 1


async def run(options: argparse.Namespace) -> Tally:
    """All streams."""
    start = time.monotonic() + options.warmup
    tally = Tally(start, start + options.seconds)
    tasks = [asyncio.create_task(stream(options, tally, seed)) for seed in range(options.streams)]
    done, _ = await asyncio.wait(tasks, timeout=options.warmup + options.seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        task.cancel()
    for task in done:
        task.result()
    await asyncio.gather(*tasks, return_exceptions=True)
    return tally


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--input", type=int, required=True)
    parser.add_argument("--output", type=int, required=True)
    parser.add_argument("--warmup", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    tally = asyncio.run(run(options))
    rate = tally.tokens / options.seconds
    print(
        json.dumps(
            {
                "totalTokensPerSecond": rate * (1 + options.input / options.output),
                "outputTokensPerSecond": rate,
                "interTokenLatency": tally.waited / max(1, tally.gaps),
                "requests": tally.requests,
            }
        )
    )


if __name__ == "__main__":
    main()
