"""Lengths as they come in, what is refused and what is left out; and that a load of them starts in the steady state."""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from tightship.core.memory import context_from_lengths
from tightship.profiler import lengths as module
from tightship.profiler.lengths import Length, Lengths, parse_lengths
from tightship.profiler.model import tokenizer
from tightship.sandbox.simulation.costs import OPT_1_3B
from tightship.sandbox.simulation.engine import Engine, Scheduling, Sequence
from tightship.sandbox.simulation.experiment import sharegpt_lengths

THREE = [Length(5, 10), Length(7, 3), Length(100, 2)]


def words(text: str) -> int:
    """A tokenizer that is easy to foresee."""
    return len(text.split())


def talk(*turns: tuple[str, str], key: str = "conversations") -> dict[str, object]:
    return {"id": "x", key: [{"from": who, "value": text} for who, text in turns]}


# --- what is accepted ---


@pytest.mark.parametrize(
    "text",
    [
        "5,10\n7,3\n100,2\n",
        "5\t10\n7\t3\n100\t2",
        "5 10\n  7   3\n\n100 2",
        "5; 10\n7; 3\n100; 2",
        "# made by hand\ninput,output\n5,10  # short\n7,3\n100,2\n",
        "Eingabe,Ausgabe\n5,10\n7,3\n100,2",
        '"input","output"\n"5","10"\n"7","3"\n"100","2"\n',
        "completion_tokens,prompt_tokens\n10,5\n3,7\n2,100",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,5,10\n2023-11-16 18:17:04,7,3\n2023,100,2",
        "\ufeff5,10\r\n7,3\r\n100,2\r\n",
        "[[5, 10], [7, 3], [100, 2]]",
        "[5, 10]\n[7, 3]\n\n[100, 2]\n",
        '{"input": 5, "output": 10}\n{"prompt_tokens": 7, "completion_tokens": 3, "more": "x"}\n{"input_len": 100, "output_len": 2}',
        '[{"input_tokens": 5, "output_tokens": 10},\n [7, 3],\n {"input": 100, "output": 2}]',
    ],
)
def test_lengths_are_read_in_the_forms_they_come_in(text: str) -> None:
    assert parse_lengths(text) == THREE


def test_one_request_is_a_set_too() -> None:
    assert (
        parse_lengths("5,10") == parse_lengths("[5, 10]") == parse_lengths('{"input": 5, "output": 10}') == [THREE[0]]
    )


def test_of_a_conversation_the_first_question_that_is_answered_counts() -> None:
    conversations = [
        talk(("human", "one two three"), ("gpt", "four five"), ("human", "x"), ("gpt", "y z")),
        talk(("gpt", "hello there you"), ("human", "why"), ("gpt", "because of that"), key="conversation"),
        {"conversations": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]},
        talk(("human", "nobody answers")),
        talk(("human", "short"), ("gpt", "ok")),
        talk(),
    ]
    wanted = [Length(3, 2), Length(1, 3), Length(2, 2)]
    for text in (json.dumps(conversations), "\n".join(map(json.dumps, conversations))):
        found = Lengths.parse(text, words)
        assert list(found.pairs) == wanted
    assert found.basis == "Lengths"
    assert found.notes == (
        "2 of 6 conversations have no question with an answer",
        "1 of 4 requests have no prompt or fewer than 2 output tokens and were left out",
    )


# --- what is refused: with where, what and what is expected ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no request in it: expected are lines of `input,output`"),
        ("# nothing\n\n", "there is no request in it"),
        ("[" * 100_000, "JSON nested too deeply to be lengths"),
        ("5,10\n7", "line 2, 7, has 1 fields and not 2"),
        ("5,10\n7,3,9", "line 2, 7,3,9, has 3 fields and not 2"),
        ("5,10\n7,three", "line 2: output 'three' is no number of tokens: expected is a whole number from 0"),
        ("5,10\n7,-3", "line 2: output '-3'"),
        ("5,10\n7,3.5", "line 2: output '3.5'"),
        ("5,10\n0,3", "line 2: input 0 is no number of tokens: expected is a whole number from 1"),
        ("5,10\n7,9999999999", "line 2: output '9999999999'"),
        ("[[5, 10], [7, true]]", "entry 2: output True"),
        ("[[5, 10], [7, 3, 1]]", "entry 2, [7, 3, 1], is no request"),
        ('[5, 10]\n{"input": 5}', 'line 2, {"input": 5}, is no request'),
        ("[5, 10]\nseven", "line 2, seven, is no JSON"),
        ("[[5, 10],\n [7, 3],\n [9", "line 3 is no JSON"),
        ('[{"conversations": [7, 3]}]', "entry 1, turn 1, 7, is no turn"),
        ("[5, 1]\n[6, 0]", "there is no request in it (2 of 2 requests have no prompt or fewer than 2 output tokens"),
        (json.dumps([talk(("human", "a b"), ("gpt", "c d"))]), "without the model's tokenizer"),
        ("who knows\nwhat this is", "line 2"),
    ],
)
def test_what_is_no_length_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"expected|JSON|tokenizer") as refused:
        parse_lengths(text)
    assert words in str(refused.value)


# --- what is left out is counted ---


def test_of_a_huge_set_a_seeded_sample_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PAIRS", 500)
    text = "\n".join(f"{1 + index},{2 + index}" for index in range(2000))
    first, again, other = (Lengths.parse(text, seed=seed) for seed in (1, 1, 2))
    assert len(set(first.pairs)) == 500
    assert first.pairs == again.pairs != other.pairs
    assert first.notes == ("500 of 2000 requests were drawn at random, seed 1",)
    assert abs(first.mean_input - 1000) < 4 * 577 / math.sqrt(500)


def test_only_the_conversations_drawn_are_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PAIRS", 3)
    asked: list[str] = []

    def tokenize(text: str) -> int:
        asked.append(text)
        return 5

    parse_lengths(json.dumps([talk(("human", "q"), ("gpt", "a"))] * 10), tokenize)
    assert len(asked) == 6


def test_requests_that_the_engine_would_refuse_are_left_out() -> None:
    lengths = Lengths(THREE)
    assert lengths.fitting(102) is lengths
    fitting = lengths.fitting(101)
    assert fitting.pairs == tuple(THREE[:2])
    assert fitting.notes == ("1 of 3 requests are longer than max_model_len 101 and were left out",)
    assert fitting.longest == 15
    with pytest.raises(ValueError, match=r"shortest request has 10 tokens, prompt and answer, and the engine takes 9"):
        lengths.fitting(9)


def test_means_are_told_from_lengths() -> None:
    assert Lengths.constant(5, 10).basis == "Means"
    assert Lengths.constant(5, 10).fitting(15).basis == "Means"
    assert Lengths([Length(5, 10)]).basis == "Lengths"


# --- the model's tokenizer ---


def test_a_model_that_is_not_here_cannot_count(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer of org/name isn't on this machine .* fetch the model first"):
        tokenizer("org/name", {"HF_HOME": str(tmp_path)})


def test_without_a_library_texts_cannot_be_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("tokenizers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="neither tokenizers nor transformers can be imported"):
        tokenizer(str(tmp_path), {})


ROOT = Path(__file__).resolve().parents[3]

COUNT = """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers
from tightship.profiler.model import tokenizer
words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
words.save(sys.argv[1] + "/tokenizer.json")
count = tokenizer(sys.argv[1], {})
print(count("a b a"), count(""), count("b " * 1000))
open(sys.argv[1] + "/tokenizer.json", "w").write("{}")
try:
    tokenizer(sys.argv[1], {})
except ValueError as error:
    print(error)
"""


def test_texts_are_counted_by_the_models_own_tokenizer(tmp_path: Path, engine_python: Path) -> None:
    command = [str(engine_python), "-c", COUNT, str(tmp_path)]
    path = {"PYTHONPATH": str(ROOT / "operator"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=path, capture_output=True, text=True, check=False, timeout=120)
    counts, refusal = done.stdout.splitlines() or [done.stderr, ""]
    assert counts == "3 0 1000"
    assert "tokenizer.json can't be used" in refusal


# --- the steady state ---


SHAREGPT = [Length(*pair) for pair in sharegpt_lengths(2000, seed=3)]


def test_requests_in_flight_have_the_context_that_the_ledger_counts_with() -> None:
    lengths, count = Lengths(SHAREGPT), 40_000
    drawn = list(islice(lengths.aged_evenly(random.Random(7)), count))
    contexts = [one.input for one in drawn]
    wanted = context_from_lengths(((pair.input, pair.output) for pair in SHAREGPT), block_size=0)
    assert abs(statistics.fmean(contexts) + 0.5 - wanted.mean) < 0.1 * wanted.std / math.sqrt(count)  # ages are whole
    assert abs(statistics.pstdev(contexts) / wanted.std - 1) < 0.01
    ends = [one.input + one.output for one in drawn]
    assert statistics.fmean(ends) > 1.3 * (lengths.mean_input + lengths.mean_output)  # long ones are met more often


def spread(drawn: Callable[[random.Random], Iterable[Length]], mean: Callable[[Length], float], count: int) -> float:
    """Standard deviation of the mean of so many drawn requests, over a hundred seeds."""
    return statistics.pstdev(
        statistics.fmean(map(mean, islice(drawn(random.Random(seed)), count))) for seed in range(100)
    )


@pytest.mark.parametrize("count", [32, 64, 100, 256])
def test_however_many_there_are_they_are_spread_evenly(count: int) -> None:
    lengths = Lengths(SHAREGPT)

    def by_lot(rng: random.Random) -> Iterator[Length]:
        while True:
            yield lengths.aged(rng)

    context = spread(lengths.aged_evenly, lambda one: one.input, count)
    assert context < 0.6 * spread(by_lot, lambda one: one.input, count)
    arriving = spread(lengths.fresh_evenly, lambda one: one.input + one.output / 2, count)
    independent = statistics.pstdev(pair.input + pair.output / 2 for pair in SHAREGPT) / math.sqrt(count)
    assert arriving < 0.5 * independent


@pytest.mark.parametrize("count", [16, 64, 100])
def test_requests_of_one_length_are_met_at_even_ages(count: int) -> None:
    for seed in range(20):
        ages = [one.input - 1 for one in islice(Lengths.constant(1, 800).aged_evenly(random.Random(seed)), count)]
        eighths = Counter(age // 100 for age in ages)
        assert all(abs(eighths[part] - count / 8) <= 2 for part in range(8))


def test_requests_of_one_length_end_together_as_often_as_by_lot() -> None:
    """p95 and p99 are made of the steps in which several prompts meet."""
    lengths, count, output, seeds = Lengths.constant(1, 300), 128, 300, 50

    def together(drawn: Callable[[random.Random], Iterator[Length]]) -> float:
        ends = [Counter(one.output for one in islice(drawn(random.Random(seed)), count)) for seed in range(seeds)]
        return sum(number > 1 for each in ends for number in each.values()) / (seeds * output)

    def by_lot(rng: random.Random) -> Iterator[Length]:
        while True:
            yield lengths.aged(rng)

    assert together(by_lot) == pytest.approx(0.07, abs=0.01)
    assert together(lengths.aged_evenly) == pytest.approx(together(by_lot), rel=0.15)


Start = Callable[[Lengths, random.Random], Iterator[Length]]


def generation_rate(start: Start, batch: int, seconds: float, seed: int) -> float:
    """Tokens per second of a closed loop on the simulated OPT-1.3B, from when all its first requests have had a token."""
    lengths, rng = Lengths(SHAREGPT), random.Random(seed)
    scheduling = Scheduling(max_num_seqs=batch, max_num_batched_tokens=2048, max_model_len=2048, num_blocks=20_000)
    engine = Engine(scheduling, OPT_1_3B.costs)
    first = [Sequence(drawn.input, drawn.output) for drawn in islice(start(lengths, rng), batch)]
    for sequence in first:
        engine.add(sequence)
    now, began, tokens = 0.0, None, 0
    while began is None or now < began + seconds:
        step = engine.plan(now)
        assert step is not None
        now += step.cost.host + step.cost.gpu
        outcome = engine.complete(step, now)
        tokens += len(outcome.tokens) if began is not None else 0
        for _ in outcome.finished:
            fresh = lengths.fresh(rng)
            engine.add(Sequence(fresh.input, fresh.output))
        if began is None and all(sequence.first_token is not None for sequence in first):
            began = now
    return tokens / (now - began)


def test_a_load_that_starts_in_the_steady_state_needs_no_ramp() -> None:
    long_run = generation_rate(Lengths.aged_evenly, 256, 300.0, seed=1)
    warm = statistics.fmean(generation_rate(Lengths.aged_evenly, 256, 5.0, seed) for seed in range(6))
    cold = statistics.fmean(generation_rate(Lengths.fresh_evenly, 256, 5.0, seed) for seed in range(6))
    assert abs(warm / long_run - 1) < 0.015
    assert abs(cold / long_run - 1) > 0.10
