"""Which lengths the load's requests have, and how a load starts in the steady state.

At a random moment of a steady closed loop, the requests in flight are not a fair sample: long ones are met more often (in
proportion to their output length) and each is somewhere in its middle. `Lengths.aged` draws such a request: prompt = input + age,
output = what is left. So a load has neither ramp nor a wave of requests that all end together.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Length:
    """Tokens of one request."""

    input: int
    output: int


class Lengths:
    """The workload as a set of (input, output) lengths, each equally likely."""

    def __init__(self, pairs: Sequence[Length]) -> None:
        """Raises ValueError for an empty set, or a request without input or output."""
        if not pairs or any(pair.input < 1 or pair.output < 1 for pair in pairs):
            raise ValueError(f"a workload needs requests of at least one token in and one out, not {list(pairs)[:3]}")
        self.pairs = tuple(pairs)
        self.mean_input = sum(pair.input for pair in pairs) / len(pairs)
        self.mean_output = sum(pair.output for pair in pairs) / len(pairs)
        self.longest = max(pair.input + pair.output for pair in pairs)
        self._by_output = list(accumulate(pair.output for pair in pairs))

    @classmethod
    def constant(cls, input_tokens: int, output_tokens: int) -> Lengths:
        """Every request alike: what is known of a workload given by its means."""
        return cls([Length(input_tokens, output_tokens)])

    def fresh(self, rng: random.Random) -> Length:
        """A request as it arrives."""
        return self.pairs[0] if len(self.pairs) == 1 else rng.choice(self.pairs)

    def aged(self, rng: random.Random) -> Length:
        """A request as it is met in flight, restated as a new one: input + age tokens in, output - age out."""
        pair = rng.choices(self.pairs, cum_weights=self._by_output)[0]
        age = rng.randrange(pair.output)
        return Length(pair.input + age, pair.output - age)


class Prompts:
    """Prompts of exact length from random token ids, as JSON, without drawing every id anew.

    The engine's prefix cache is off while profiling, so prompts that share stretches cost the same as others.
    """

    _POOL = 65_536

    def __init__(self, vocabulary: int, seed: int) -> None:
        """`vocabulary`: ids are drawn from [5, vocabulary); the first few are special tokens nearly everywhere."""
        rng = random.Random(seed)
        ids = rng.choices(range(min(5, vocabulary - 1), vocabulary), k=self._POOL)
        self._pool = [b"%d" % token for token in ids]
        self._rng = rng

    def draw(self, tokens: int) -> bytes:
        """A JSON list of that many token ids."""
        start = self._rng.randrange(self._POOL)
        ids = self._pool[start : start + tokens]
        while len(ids) < tokens:
            ids += self._pool[: tokens - len(ids)]
        return b"[" + b",".join(ids) + b"]"
