"""Which lengths the load's requests have, where they come from, and how a load starts in the steady state.

At a random moment of a steady closed loop, the requests in flight are not a fair sample: long ones are met more often (in
proportion to their output length) and each is somewhere in its middle. `Lengths.aged` draws such a request: prompt = input + age,
output = what is left. So a load has neither ramp nor a wave of requests that all end together.

What a load has in flight is a small sample, whose mean context is off by 1/sqrt(B) of a request's spread, and that weighs on all that is measured
before these requests have made room for others. `Lengths.aged_evenly` and `Lengths.fresh_evenly` don't draw them one by one but as a rotated
additive recurrence (quasi-Monte Carlo: Cranley and Patterson, SIAM Journal on Numerical Analysis 13, 1976): each by itself has the distribution
it should, and however many of them there are, together they are spread over it evenly. Ages are so on the whole only, and by lot within an
eighth of an output: requests that end at even distances would never prefill together, and p95 and p99 are made of those that do. What such
requests have in common hardly fluctuates, so where it is that fluctuation which counts, they are drawn by lot.

Lengths are read from text (`parse_lengths`) in the forms they come in; what is no length is refused with its line and value, never skipped.
What can't serve is left out and counted, in `Lengths.notes`: answers of fewer than two tokens (they have no time between tokens),
conversations without a question and its answer, requests longer than the engine accepts, and, above 100,000 requests, all but that many, drawn
without replacement by a seed.
"""

from __future__ import annotations

import json
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final, Literal

MOST_PAIRS: Final = 100_000
"""Requests kept of a larger set: means of so many are known to a few thousandths."""
OUTPUT_LEAST: Final = 2
_GOLDEN: Final = (math.sqrt(5) - 1) / 2
_SILVER: Final = math.sqrt(2) - 1
"""Steps of additive recurrences: the multiples of the first fill the unit interval more evenly than those of any other number, however many
are taken, and of the second nearly so. Of the pairs tried these two fill the square best: the mean context of 32 requests in flight varies 0.41 times
as much as by lot, that of 256 0.26 times (ShareGPT-like lengths)."""
_PARTS: Final = 8
"""Parts of an output within which ages are by lot: that adds an eighth of the error of ages that are wholly by lot."""
_INPUT_NAMES: Final = ("input", "prompt_tokens", "input_tokens", "input_len", "prompt_len", "contexttokens")
_OUTPUT_NAMES: Final = ("output", "completion_tokens", "output_tokens", "output_len", "generatedtokens")
_ASKS: Final = frozenset({"human", "user"})
_ANSWERS: Final = frozenset({"gpt", "assistant"})
_FORMS: Final = (
    "lines of `input,output` in tokens, JSON of [input, output] pairs or of objects with the keys input and output, "
    "or a ShareGPT file with conversations"
)

Basis = Literal["Means", "Lengths"]
Tokenize = Callable[[str], int]


@dataclass(frozen=True)
class Length:
    """Tokens of one request."""

    input: int
    output: int


class Lengths:
    """The workload as a set of (input, output) lengths, each equally likely."""

    def __init__(self, pairs: Sequence[Length], *, basis: Basis = "Lengths", notes: Sequence[str] = ()) -> None:
        """Raises ValueError for an empty set, or a request without input or output."""
        if not pairs or any(pair.input < 1 or pair.output < 1 for pair in pairs):
            raise ValueError(f"a workload needs requests of at least one token in and one out, not {list(pairs)[:3]}")
        self.pairs = tuple(pairs)
        self.basis: Basis = basis
        """Whether this is a set of lengths, or stands for means alone."""
        self.notes = tuple(notes)
        """What was left out, in words."""
        self.mean_input = sum(pair.input for pair in pairs) / len(pairs)
        self.mean_output = sum(pair.output for pair in pairs) / len(pairs)
        self.longest = max(pair.input + pair.output for pair in pairs)
        # By their context half-way, which is what steps cost by: neighbours in the order are alike.
        self._ordered = sorted(pairs, key=lambda pair: (2 * pair.input + pair.output, pair.output))
        self._by_output = list(accumulate(pair.output for pair in self._ordered))

    @classmethod
    def constant(cls, input_tokens: int, output_tokens: int) -> Lengths:
        """Every request alike: what is known of a workload given by its means."""
        return cls([Length(input_tokens, output_tokens)], basis="Means")

    @classmethod
    def parse(cls, text: str, tokenize: Tokenize | None = None, *, seed: int = 0) -> Lengths:
        """The lengths that a text holds; see `parse_lengths`.

        Raises:
            ValueError: there are none, or something is none; with line or entry and value.
        """
        pairs, notes = _parse(text, tokenize, seed)
        return cls(pairs, notes=notes)

    def fitting(self, max_model_len: int) -> Lengths:
        """The same without requests of more than `max_model_len` tokens, prompt and answer together; `notes` says how many those were.

        Raises:
            ValueError: none is left.
        """
        fit = [pair for pair in self.pairs if pair.input + pair.output <= max_model_len]
        dropped = len(self.pairs) - len(fit)
        if not dropped:
            return self
        if not fit:
            shortest = min(pair.input + pair.output for pair in self.pairs)
            raise ValueError(
                f"the shortest request has {shortest} tokens, prompt and answer, and the engine takes {max_model_len} (max_model_len): "
                "raise maxModelLen or give shorter lengths"
            )
        note = (
            f"{dropped} of {len(self.pairs)} requests are longer than max_model_len {max_model_len} and were left out"
        )
        return Lengths(fit, basis=self.basis, notes=[*self.notes, note])

    def fresh(self, rng: random.Random) -> Length:
        """A request as it arrives, independent of all others."""
        return self.pairs[0] if len(self.pairs) == 1 else rng.choice(self.pairs)

    def aged(self, rng: random.Random) -> Length:
        """A request as it is met in flight, independent of all others, restated as a new one: input + age tokens in, output - age out."""
        pair = rng.choices(self._ordered, cum_weights=self._by_output)[0]
        age = rng.randrange(pair.output)
        return Length(pair.input + age, pair.output - age)

    def fresh_evenly(self, rng: random.Random) -> Iterator[Length]:
        """Requests as they arrive, without end, spread evenly over the set; `rng` places the first of them."""
        place = rng.random()
        while True:
            yield self._ordered[int(place * len(self._ordered))]
            place = (place + _GOLDEN) % 1

    def aged_evenly(self, rng: random.Random) -> Iterator[Length]:
        """Requests as they are met in flight, without end, restated as `aged` does, and spread evenly over lengths and ages.

        Each is met with a probability proportional to its output, at an age that is uniform in [0, output). `rng` places the first of them, and
        each within an eighth of its output.
        """
        place, age = rng.random(), rng.random()
        while True:
            pair = self._ordered[bisect_right(self._by_output, place * self._by_output[-1])]
            aged = int((int(age * _PARTS) + rng.random()) / _PARTS * pair.output)
            yield Length(pair.input + aged, pair.output - aged)
            place, age = (place + _SILVER) % 1, (age + _GOLDEN) % 1


def parse_lengths(text: str, tokenize: Tokenize | None = None, *, seed: int = 0) -> list[Length]:
    """The requests' lengths in a text.

    Accepted are
    - lines of two whole numbers, `input,output` (or with tabs, spaces, semicolons between); `#` starts a comment. A heading may
      come first; if it names the columns (input, prompt_tokens, input_tokens, input_len; output, completion_tokens, ...) there
      may be others;
    - JSON, or one JSON value a line, of `[input, output]` or of objects with such keys;
    - ShareGPT's form, a JSON list of objects with `conversations` of `{"from": "human" | "gpt", "value": TEXT}`: of each, the first
      question that is answered, as benchmark tools take it.

    Args:
        text: what to read.
        tokenize: number of tokens of a text; only conversations need it (`model.tokenizer`).
        seed: by which 100,000 requests are drawn from a larger set, before conversations are counted.

    Raises:
        ValueError: no request is left, or something is none; with line or entry, the value, and what is expected.
    """
    return _parse(text, tokenize, seed)[0]


@dataclass(frozen=True)
class _Talk:
    """A question and its answer."""

    question: str
    answer: str


def _parse(text: str, tokenize: Tokenize | None, seed: int) -> tuple[list[Length], list[str]]:
    text = text.removeprefix("\ufeff")
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    found = list(_json_entries(text) if first[:1] in ("[", "{") else _line_entries(text))
    entries = [entry for entry in found if entry is not None]
    notes = []
    if len(found) > len(entries):
        notes.append(f"{len(found) - len(entries)} of {len(found)} conversations have no question with an answer")
    if len(entries) > MOST_PAIRS:
        notes.append(f"{MOST_PAIRS} of {len(entries)} requests were drawn at random, seed {seed}")
        entries = random.Random(seed).sample(entries, MOST_PAIRS)
    lengths = [_counted(entry, tokenize) for entry in entries]
    pairs = [length for length in lengths if length.output >= OUTPUT_LEAST and length.input >= 1]
    if len(pairs) < len(lengths):
        notes.append(
            f"{len(lengths) - len(pairs)} of {len(lengths)} requests have no prompt or fewer than {OUTPUT_LEAST} output tokens and were left out"
        )
    if not pairs:
        said = f" ({'; '.join(notes)})" if notes else ""
        raise ValueError(f"there is no request in it{said}: expected are {_FORMS}")
    return pairs, notes


def _counted(entry: Length | _Talk, tokenize: Tokenize | None) -> Length:
    if isinstance(entry, Length):
        return entry
    if tokenize is None:
        raise ValueError(
            "conversations are texts, and without the model's tokenizer their tokens can't be counted: give lengths in tokens, or the model"
        )
    return Length(tokenize(entry.question), tokenize(entry.answer))


def _line_entries(text: str) -> Iterator[Length | _Talk | None]:
    """Of lines of numbers."""
    columns, width, begun = (0, 1), 2, False
    for number, raw in enumerate(text.splitlines(), 1):
        fields = _fields(raw.partition("#")[0].strip())
        if not fields:
            continue
        if not begun:
            begun = True
            heading = _heading(fields)
            if heading is not None:
                columns, width = heading, len(fields)
                continue
        where = f"line {number}"
        if len(fields) != width:
            raise ValueError(f"{where}, {_shown(raw)}, has {len(fields)} fields and not {width}: expected are {_FORMS}")
        yield _length(where, *(_number(fields[column]) for column in columns))


def _fields(line: str) -> list[str]:
    for separator in (",", ";", "\t"):
        if separator in line:
            return [field.strip() for field in line.split(separator)]
    return line.split()


def _heading(fields: list[str]) -> tuple[int, int] | None:
    """The columns that a heading names, by its names or its order; None when it is no heading."""
    if any(field[:1].isdigit() or field[:1] in ("-", "+", ".", "[") for field in fields):
        return None
    names = [field.strip("\"'").lower() for field in fields]
    found = tuple(
        next((index for index, name in enumerate(names) if name in known), -1)
        for known in (_INPUT_NAMES, _OUTPUT_NAMES)
    )
    if min(found) >= 0:
        return found[0], found[1]
    return (0, 1) if len(fields) == 2 else None


def _number(field: str) -> Any:
    """A whole number if it is one, else the text, for the error to show."""
    bare = field.strip("\"'")
    return int(bare) if bare.isdecimal() and len(bare) < 10 else field


def _json_entries(text: str) -> Iterator[Length | _Talk | None]:
    """Of one JSON document, or one JSON value a line."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        yield from _json_lines(text, error)
        return
    except RecursionError as error:
        raise ValueError(f"JSON nested too deeply to be lengths: expected are {_FORMS}") from error
    if isinstance(document, dict) or _is_pair(document):
        document = [document]
    for number, value in enumerate(document, 1):
        yield _entry(f"entry {number}", value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and not isinstance(value[0], (list, dict))


def _json_lines(text: str, whole: json.JSONDecodeError) -> Iterator[Length | _Talk | None]:
    first = True
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if first:  # then it isn't one value a line either, but one document that breaks off somewhere
                raise ValueError(f"line {whole.lineno} is no JSON: {whole.msg} at column {whole.colno}") from error
            raise ValueError(f"line {number}, {_shown(line)}, is no JSON: {error.msg}") from error
        first = False
        yield _entry(f"line {number}", value)


def _entry(where: str, value: Any) -> Length | _Talk | None:
    """A request; None for a conversation without a question that is answered."""
    if isinstance(value, list) and len(value) == 2:
        return _length(where, *value)
    if isinstance(value, dict):
        turns = value.get("conversations", value.get("conversation"))
        if isinstance(turns, list):
            return _talk(where, turns)
        names = {str(key).lower(): key for key in value}
        keys = [next((names[name] for name in known if name in names), None) for known in (_INPUT_NAMES, _OUTPUT_NAMES)]
        if None not in keys:
            return _length(where, *(value[key] for key in keys))
    raise ValueError(f"{where}, {_shown(json.dumps(value))}, is no request: expected are {_FORMS}")


def _talk(where: str, turns: list[Any]) -> _Talk | None:
    said = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise ValueError(
                f"{where}, turn {number}, {_shown(json.dumps(turn))}, is no turn: expected is an object with from and value"
            )
        said.append((turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))))
    for (asker, question), (answerer, answer) in pairwise(said):
        if asker in _ASKS and answerer in _ANSWERS and isinstance(question, str) and isinstance(answer, str):
            return _Talk(question, answer)
    return None


def _length(where: str, prompt: Any, output: Any) -> Length:
    for name, value, least in (("input", prompt, 1), ("output", output, 0)):
        if type(value) is not int or not least <= value < 10**9:
            raise ValueError(
                f"{where}: {name} {_shown(repr(value))} is no number of tokens: expected is a whole number from {least}"
            )
    return Length(prompt, output)


def _shown(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 60 else text[:57] + "..."


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
