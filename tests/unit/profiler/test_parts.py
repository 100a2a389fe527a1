"""The small parts: histogram, metrics, lengths, last words, ladder, budget, figures."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Set
from dataclasses import dataclass
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightship import decide
from tightship.api.v1alpha1 import batchprofile as api
from tightship.core.curve import Latency, Metric, Objective, Point, Statistic
from tightship.profiler import points
from tightship.profiler.budget import Budget, Cost
from tightship.profiler.engine import EngineSettings
from tightship.profiler.gpu import GIB
from tightship.profiler.histogram import Histogram
from tightship.profiler.job import make_job
from tightship.profiler.ladder import Goals, Noise, next_batch, rungs
from tightship.profiler.lastwords import is_memory, last_words, plain
from tightship.profiler.lengths import Length, Lengths, Prompts
from tightship.profiler.metrics import parse_cache_info, parse_sample
from tightship.profiler.windows import filled, lived
from unit.profiler.fakes import FakeDevice, VirtualClock, in_virtual_time, make_profile

# --- histogram ---


@given(st.lists(st.floats(1e-5, 1e3), min_size=1, max_size=300), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_quantiles_are_those_of_the_sorted_values_within_a_quarter_percent(values: list[float], share: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    rank = max(1, -int(-share * len(values) // 1))
    assert histogram.quantile(share) == pytest.approx(sorted(values)[rank - 1], rel=0.003)
    assert histogram.mean == pytest.approx(sum(values) / len(values))


def test_a_gap_with_k_tokens_weighs_k() -> None:
    histogram = Histogram()
    histogram.add(0.010, weight=3)
    histogram.add(0.050)
    assert histogram.count == 4
    assert histogram.mean == pytest.approx(0.020)
    assert histogram.quantile(0.75) == pytest.approx(0.010, rel=0.003)


def test_an_empty_histogram_knows_nothing() -> None:
    assert Histogram().mean is None
    assert Histogram().quantile(0.5) is None


# --- metrics ---

EXPOSITION = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a{b} c"} 31.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 7.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:num_preemptions_total{engine="0",model_name="m"} 4.0
vllm:generation_tokens_total{engine="0",model_name="m"} 1.2345e+06
vllm:generation_tokens_created{engine="0",model_name="m"} 1.79e+09
vllm:inter_token_latency_seconds_sum{engine="0",model_name="m"} 12.5
vllm:inter_token_latency_seconds_count{engine="0",model_name="m"} 1000.0
vllm:cache_config_info{block_size="16",engine="0",kv_cache_size_tokens="None",note="a \\"b\\" c",num_gpu_blocks="211"} 1.0
"""


def test_a_sample_holds_what_matters() -> None:
    sample = parse_sample(EXPOSITION, at=5.0)
    assert (sample.at, sample.running, sample.waiting, sample.kv_usage) == (5.0, 31, 2, 0.25)
    assert (sample.preemptions, sample.generation_tokens, sample.prompt_tokens) == (4, 1234500, 0)
    assert sample.itl_sum / sample.itl_count == pytest.approx(0.0125)


def test_cache_info_is_read_from_labels() -> None:
    info = parse_cache_info(EXPOSITION)
    assert info["num_gpu_blocks"] == "211"
    assert info["note"] == 'a "b" c'
    assert parse_cache_info("nothing") == {}


# --- lengths ---


def test_requests_in_flight_are_length_biased_and_aged() -> None:
    lengths = Lengths([Length(10, 100), Length(10, 300)])
    rng = random.Random(1)
    evenly = list(islice(lengths.aged_evenly(rng), 20_000))
    by_lot = [lengths.aged(rng) for _ in range(20_000)]
    # P(long) = 300 / 400; what is left is uniform in 1..output: mean 0.25 x 50.5 + 0.75 x 150.5
    for drawn, within in ((evenly, 0.001), (by_lot, 0.03)):
        assert sum(one.output for one in drawn) / len(drawn) == pytest.approx(125.5, rel=within)
        assert all(one.output >= 1 and one.input + one.output in (110, 310) for one in drawn)


@pytest.mark.parametrize(
    ("requests", "seconds", "first_tokens", "by_lot", "enough"),
    [
        (64, 5.0, 20, False, True),
        (64, 4.9, 64, False, False),
        (64, 9.9, 19, False, False),
        (64, 10.0, 0, False, True),
        (64, 9.9, 64, True, False),
        (128, 9.9, 99, False, False),
        (128, 5.0, 100, False, True),
        (4, 5.0, 1, False, True),
        (4, 5.0, 0, False, False),
        (1, 10.0, 0, False, True),
        (512, 2.5, 100, False, True),
        (512, 4.9, 512, True, False),
        (512, 5.0, 512, True, True),
    ],
)
def test_half_a_life_is_enough_for_an_even_load_with_its_first_tokens(
    requests: int, seconds: float, first_tokens: int, by_lot: bool, enough: bool
) -> None:
    assert lived(seconds, requests, 10.0, first_tokens, by_lot=by_lot) is enough


@pytest.mark.parametrize(
    ("batch", "running", "crowded", "share"),
    [
        (2, 1.9, False, 0.95),
        (8, 7.84, False, 1.0),
        (8, 7.6, False, 0.95),
        (8, 7.6, True, 1.0),
        (8, 1.0, False, 0.5),
        (16, 15.0, False, 1.0),
    ],
)
def test_the_gaps_between_requests_are_left_out_of_small_batches(
    batch: int, running: float, crowded: bool, share: float
) -> None:
    assert filled(batch, running, crowded=crowded) == pytest.approx(share)


def test_prompts_have_the_exact_length_also_beyond_the_pool() -> None:
    prompts = Prompts(vocabulary=50, seed=3)
    for tokens in (1, 7, 70_000):
        text = prompts.draw(tokens)
        ids = [int(token) for token in text.strip(b"[]").split(b",")]
        assert len(ids) == tokens
        assert 5 <= min(ids) <= max(ids) < 50


def test_a_workload_needs_tokens() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Lengths.constant(0, 5)


# --- last words ---

ENGINE_CORE = """\
(APIServer pid=12) INFO 11-23 06:51:26 [utils.py:347] Using LBHNC KV cache layout.
(EngineCore pid=34) ERROR 11-23 06:51:28 [core.py:900] EngineCore failed to start.
(EngineCore pid=34) ERROR 11-23 06:51:28 [core.py:900] Traceback (most recent call last):
(EngineCore pid=34) ERROR 11-23 06:51:28 [core.py:900] ValueError: Free memory on device cuda:0 (10.0/79.2 GiB) on startup is less than asked.
(EngineCore pid=34) Process EngineCore:
(APIServer pid=12) Traceback (most recent call last):
(APIServer pid=12) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
""".splitlines()

PYDANTIC = """\
    raise ValidationError
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, Invalid repository ID or local directory specified: '/models/none'.
Please verify the following requirements:
""".splitlines()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (ENGINE_CORE, "Free memory on device cuda:0 (10.0/79.2 GiB)"),
        (PYDANTIC, "Invalid repository ID or local directory specified: '/models/none'"),
        (["usage: api_server.py [-h]", "api_server.py: error: unrecognized arguments: --nope"], "--nope"),
        (["x", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."], "CUDA out of memory"),
        (["a", "b", "", "Segmentation fault"], "a | b | Segmentation fault"),
        ([], ""),
    ],
    ids=["root cause, not its consequence", "pydantic", "argparse", "oom", "no exception", "nothing"],
)
def test_last_words_name_the_cause(lines: list[str], words: str) -> None:
    assert words in last_words(lines)


@pytest.mark.parametrize(
    ("words", "memory"),
    [
        (last_words(ENGINE_CORE), True),
        ("ValueError: No available memory for the cache blocks. Try increasing", True),
        ("(2.00 GiB KV cache is needed, which is larger than the available KV cache memory (1.00 GiB)", True),
        ("error: unrecognized arguments: --memory", False),
    ],
)
def test_memory_is_told_from_other_causes(words: str, memory: bool) -> None:
    assert is_memory(words) is memory


def test_prefixes_go() -> None:
    assert plain("(Worker pid=1) WARNING 11-23 06:51:24 [cpu.py:114] hello") == "hello"
    assert plain("hello INFO") == "hello INFO"


# --- ladder ---


def make_point(batch: int, throughput: float, **more: int) -> Point:
    return Point(batch=batch, throughput=throughput, **more)


@pytest.mark.parametrize(
    ("measured", "top", "batch", "reason"),
    [
        ([], 1024, 1, "next"),
        ([make_point(1, 100)], 1024, 2, "next"),
        ([make_point(1, 100), make_point(2, 190), make_point(4, 300)], 4, None, "engine's largest"),
        ([make_point(1, 100), make_point(2, 101)], 8, None, "1.010 times"),
        ([make_point(1, 100), make_point(4, 300)], 8, 2, "next"),
        ([make_point(1, 100), make_point(2, 190, requests=1000, preemptions=11)], 8, None, "KV cache is full"),
        ([make_point(1, 100), make_point(2, 190, requests=1000, preemptions=9)], 8, 4, "next"),
        ([make_point(1, 1000), make_point(2, 1900), make_point(4, 2000), make_point(8, 390)], 16, None, "times"),
        ([make_point(2, 100), make_point(1, 60), make_point(4, 180)], 6, 6, "next"),
    ],
)
def test_the_ladders_next_batch(measured: list[Point], top: int, batch: int | None, reason: str) -> None:
    for order in (measured, measured[::-1]):
        step = next_batch(order, top)
        assert step.batch == batch
        assert reason in step.reason


def test_noise_does_not_end_the_ladder() -> None:
    flat = [make_point(1, 100), make_point(2, 100)]
    assert next_batch(flat, 8, noise=Noise({1: 0.03, 2: 0.03})).batch is None
    assert next_batch(flat, 8, noise=Noise({1: 0.03, 2: 0.30})).batch == 4


@pytest.mark.parametrize(
    ("measured", "undriven", "batch", "reason"),
    [
        ([1, 2], {4}, 8, "next"),  # one alone may be chance
        ([1, 2], {4, 8}, None, "could not drive batch 8"),
        ([1, 2, 8], {4}, 16, "next"),
        ([1, 2, 8], {4, 16}, 32, "next"),
        ([], {1}, 2, "next"),
        ([], {1, 2, 4, 8}, 16, "next"),  # a machine that is busy at first
        ([8], {1, 2, 4}, 16, "next"),  # or whose load is too late for small batches for good
        ([8], {1, 2, 4, 16, 32}, None, "could not drive batch 32, nor the one before it"),
        ([], {1, 2, 4, 8, 16}, None, "could not drive batch 16, nor the 4 before it"),
    ],
)
def test_a_ladder_that_cannot_be_driven_ends(
    measured: list[int], undriven: set[int], batch: int | None, reason: str
) -> None:
    step = next_batch([make_point(each, 90 * each) for each in measured], 64, noise=Noise(undriven=undriven))
    assert (step.batch, reason in step.reason) == (batch, True)


def test_no_objective_shortens_the_ladder() -> None:
    slow = [Point(batch, 90.0 * batch, Latency(mean=batch / 1000)) for batch in (1, 2, 4)]
    assert next_batch(slow, 64, Goals([mean_itl(0.001)], efficiency_floor=0.99)).batch == 8


# --- bisection ---


def mean_itl(maximum: float) -> Objective:
    return Objective(Metric.INTER_TOKEN_LATENCY, Statistic.MEAN, maximum)


def sweep(
    latency: Callable[[int], float],
    throughput: Callable[[int], float],
    goals: Goals,
    *,
    top: int = 256,
    fits: int = 10_000,
    undriven: Set[int] = frozenset(),
) -> list[int]:
    """The batches beyond the ladder, in order, of a machine with these curves that preempts above `fits`."""
    points: list[Point] = []
    refused: set[int] = set()
    proposed: list[int] = []
    while True:
        step = next_batch(points, top, goals, Noise(undriven=refused))
        if step.batch is None:
            return [batch for batch in proposed if batch not in rungs(top)]
        assert step.batch not in proposed, "nothing is measured twice"
        proposed.append(step.batch)
        if step.batch in undriven:
            refused.add(step.batch)
            continue
        preemptions = 100 if step.batch > fits else 0
        points.append(
            Point(
                step.batch,
                throughput(step.batch),
                Latency(mean=latency(step.batch)),
                requests=100,
                preemptions=preemptions,
            )
        )


def itl(batch: int) -> float:
    """10 ms and 0.2 ms a request."""
    return 0.010 + 0.0002 * batch


def rate(batch: int) -> float:
    """What keeps that pace brings."""
    return batch / itl(batch)


@pytest.mark.parametrize(
    ("goals", "fits", "beyond"),
    [
        (Goals(), 10_000, []),
        # 30 ms hold up to 100: 64 and 128, then halves down to 8
        (Goals([mean_itl(0.030)]), 10_000, [96, 112, 104]),
        # the step grows with the batch: 16 at 128
        (Goals([mean_itl(0.0500)]), 10_000, [192, 224, 208]),
        # below 8 the ladder itself is fine enough
        (Goals([mean_itl(0.0107)]), 10_000, []),
        # nothing meets it, or all do
        (Goals([mean_itl(0.001)]), 10_000, []),
        (Goals([mean_itl(1.0)]), 10_000, []),
        # T(B) / (B T(1)) = 10.2 / (10 + 0.2 B) > 0.3 up to 120
        (Goals(efficiency_floor=0.3), 10_000, [96, 112, 120]),
        # the stricter of the two counts: one gap, not two
        (Goals([mean_itl(0.030)], efficiency_floor=0.3), 10_000, [96, 112, 104]),
        (Goals([mean_itl(0.050)], efficiency_floor=0.3), 10_000, [96, 112, 120]),
        # memory: 90 fit; the first probe is where the mean context fills the cache
        (Goals(), 90, [96, 80, 88]),
        (Goals(full_batch=91), 90, [88, 112, 104, 96]),
        (Goals(full_batch=100), 90, [96, 80, 88]),
        (Goals(full_batch=3000), 90, [96, 80, 88]),
        # an objective that binds below needs no word on memory
        (Goals([mean_itl(0.0143)], full_batch=91), 90, [24]),
    ],
    ids=str,
)
def test_bisection_is_placed_by_what_limits_the_batch(goals: Goals, fits: int, beyond: list[int]) -> None:
    assert sweep(itl, rate, goals, fits=fits) == beyond


def test_bisection_goes_round_a_batch_that_cannot_be_driven() -> None:
    assert sweep(itl, rate, Goals([mean_itl(0.030)]), undriven={96}) == [96, 80, 88]


def test_a_statistic_that_is_not_known_places_nothing() -> None:
    points = [Point(batch, rate(batch)) for batch in rungs(256)]
    assert next_batch(points, 256, Goals([mean_itl(0.030)])).batch is None


@given(
    st.integers(0, 1_000_000), st.integers(1, 2000), st.floats(0.0, 0.3), st.floats(0.0, 0.5), st.floats(0.0105, 0.2)
)
def test_whatever_the_noise_a_sweep_ends_and_asks_for_nothing_twice(
    seed: int, top: int, noise: float, floor: float, maximum: float
) -> None:
    rng = random.Random(seed)

    def noisy(curve: Callable[[int], float]) -> Callable[[int], float]:
        return lambda batch: curve(batch) * (1 + rng.uniform(-noise, noise))

    goals = Goals([mean_itl(maximum)], floor, full_batch=rng.randrange(1, 3000))
    beyond = sweep(noisy(itl), noisy(rate), goals, top=top, fits=rng.randrange(1, 3000))
    assert len(beyond) <= 5
    assert all(batch % 8 == 0 for batch in beyond)


@given(st.floats(0.0115, 0.06))
def test_bisection_finds_the_batch_within_a_step(maximum: float) -> None:
    points = {*rungs(256), *sweep(itl, rate, Goals([mean_itl(maximum)]))}
    best = max(batch for batch in points if itl(batch) <= maximum)
    exact = (maximum - 0.010) / 0.0002
    assert best <= exact < best + max(8, best // 8) or best == 256


@given(st.integers(1, 5000))
def test_rungs_rise_from_one_to_the_top(top: int) -> None:
    batches = rungs(top)
    assert batches[0] == 1
    assert batches[-1] == top
    assert batches == sorted(set(batches))


# --- budget ---


@dataclass
class Hand:
    """A clock set by hand."""

    time: float = 100.0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


def test_the_first_start_is_free_and_all_after_it_counts() -> None:
    clock = Hand()
    budget = Budget(600, spent=40, clock=clock)
    clock.time += 300
    assert budget.spent == 40
    budget.engine_healthy(300)
    clock.time += 10
    budget.engine_healthy(30)
    assert budget.spent == 50
    assert budget.left == 550
    assert budget.for_sweep < 550 - 15


def test_work_is_bound_by_the_budget_once_an_engine_has_been_healthy() -> None:
    async def story() -> None:
        clock = VirtualClock()
        budget = Budget(60, spent=20, clock=clock)
        began = clock.now()

        async def launch(seconds: float) -> str:
            await clock.sleep(seconds)
            budget.engine_healthy(seconds)
            return "healthy"

        assert await budget.bound(launch(3600)) == "healthy"
        assert clock.now() - began == 3600
        with pytest.raises(asyncio.TimeoutError):
            await budget.bound(launch(41))
        assert clock.now() - began == pytest.approx(3640, abs=0.1)

    in_virtual_time(story)


def test_work_that_starts_the_first_engine_itself_has_the_whole_budget_after_it() -> None:
    async def story() -> float:
        clock = VirtualClock()
        budget = Budget(60, spent=0, clock=clock)
        began = clock.now()

        async def work() -> None:
            await clock.sleep(300)
            budget.engine_healthy(300)
            await clock.sleep(300)

        with pytest.raises(asyncio.TimeoutError):
            await budget.bound(work())
        return clock.now() - began

    assert in_virtual_time(story) == pytest.approx(360, abs=0.1)


def test_bound_work_ends_with_who_waits_for_it() -> None:
    ended: list[str] = []

    async def story() -> None:
        clock = VirtualClock()
        budget = Budget(60, spent=0, clock=clock)

        async def work() -> None:
            try:
                await clock.sleep(1000)
            finally:
                ended.append("work")

        waiting = asyncio.get_running_loop().create_task(budget.bound(work()))
        await clock.sleep(1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert ended == ["work"]

    in_virtual_time(story)


def test_levels_share_the_sweeps_time() -> None:
    budget = Budget(120, spent=0, clock=Hand())
    assert budget.for_level(11) == pytest.approx(budget.for_sweep / 11)
    assert budget.for_level(1) == 20


@pytest.mark.parametrize(
    ("seconds", "start", "sweep", "confirmation", "trials"),
    [
        # a story: half a ladder, a replica alone, one packing trial
        (45, 1.5, 19, 12, 11),
        (60, 1.5, 33, 12, 12),
        (75, 1.5, 45, 12, 15),
        # the default: the ladder, its bisection and the rest at leisure
        (1200, 45, 600, 45 + 36 + 30, 240),
        # engines too slow for trials in this time: nothing is kept for them
        (180, 60, 40, 70, 0),
    ],
)
def test_every_phase_leaves_something_to_those_after_it(
    seconds: float, start: float, sweep: float, confirmation: float, trials: float
) -> None:
    clock = Hand()
    budget = Budget(seconds, spent=0, clock=clock)
    budget.engine_healthy(start)
    assert budget.for_sweep >= sweep
    clock.time += budget.for_sweep
    clock.time += budget.for_baseline
    assert budget.left >= confirmation + trials
    clock.time += confirmation
    assert budget.for_trials >= trials


@given(st.floats(10, 5000), st.floats(0, 600), st.booleans())
def test_no_phase_is_given_more_than_there_is(seconds: float, start: float, packing: bool) -> None:
    budget = Budget(seconds, spent=0, clock=Hand(), packing=packing)
    budget.engine_healthy(start)
    assert 0 <= budget.for_sweep <= budget.for_baseline <= budget.left == budget.for_trials == seconds
    assert budget.for_arrivals <= 30


def test_cost_goes_to_the_innermost_phase_and_on_from_attempt_to_attempt() -> None:
    clock = Hand()
    cost = Cost(api.Cost(starts="10", sweep="5"), clock)
    clock.time += 100  # in no phase: counted nowhere
    with cost.in_phase("sweep"):
        clock.time += 1
        with cost.in_phase("starts"):
            clock.time += 2
            assert cost.seconds("starts") == 12
        clock.time += 4

    def fail() -> None:
        with cost.in_phase("trials"):
            clock.time += 8
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    spent = cost.report()
    assert [float(part) for part in (spent.starts, spent.sweep, spent.trials)] == [12, 10, 8]


# --- figures ---


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (9032.84, "9032.8"),
        (0.575123, "0.5751"),
        (95.21, "95.21"),
        (1e-7, "0"),
        (0.00002, "0.00002"),
        (411.0, "411"),
    ],
)
def test_decimals_have_no_exponent(value: float, text: str) -> None:
    assert points.decimal(value) == text


def test_a_point_comes_back_as_it_was_measured_and_unresolved_statistics_are_not_measured() -> None:
    point = api.Point.model_validate(
        {
            "batch": 96,
            "totalTokensPerSecond": "9032.8",
            "interTokenLatency": {"mean": "13.89ms", "p95": "16ms", "p99": "31ms"},
            "gpuUtilization": "0.575",
            "unresolved": ["p99"],
        }
    )
    curve = points.curve([point])
    assert curve is not None
    one = curve.points[0]
    assert (one.throughput, one.gpu_utilization) == (9032.8, 0.575)
    assert one.inter_token_latency.mean == pytest.approx(0.01389)
    assert (one.inter_token_latency.p95, one.inter_token_latency.p99) == (pytest.approx(0.016), None)
    assert points.curve([]) is None


def test_the_profiler_reads_points_and_trials_as_the_operator_does() -> None:
    measured = {
        "batch": 96,
        "totalTokensPerSecond": "9032.8",
        "interTokenLatency": {"mean": "13.89ms", "p95": "16ms", "p99": "31ms"},
        "timeToFirstToken": {"mean": "40ms", "p95": "80ms"},
        "kvCacheTokensPeak": 40_000,
        "requestsPerSecond": "20",
        "runningMean": "95.8",
        "requests": 200,
        "preemptions": 1,
        "gpuUtilization": "0.575",
        "memoryUtilization": "0.3",
        "halfWidth": "0.021",
        "unresolved": ["p95", "p99"],
    }
    packed = {name: value for name, value in measured.items() if name != "kvCacheTokensPeak"} | {
        "replicas": 2,
        "memory": "30Gi",
        "kvCache": "8Gi",
    }
    profile = {"status": {"points": [measured], "trials": [packed]}}
    assert points.curve([api.Point.model_validate(measured)]) == decide.curve_from_profile(profile)
    trial = points.trial(api.Trial.model_validate(packed))
    assert (trial,) == decide.trials_from_profile(profile)
    assert trial.non_kv == 7 * GIB


# --- the job ---


@pytest.mark.parametrize(
    ("accelerator", "expected"),
    [
        ({"device": "cuda"}, 8),
        ({"device": "cpu"}, 8),
        ({"device": "cpu", "cores": 4, "coresPerReplica": 2}, 2),
        ({"device": "cpu", "cores": 2, "coresPerReplica": 2}, 1),
        ({"device": "cpu", "cores": 64, "coresPerReplica": 1}, 8),
    ],
)
def test_no_more_replicas_are_tried_than_a_pack_has_cores_for(accelerator: dict[str, object], expected: int) -> None:
    profile = make_profile()
    key = profile.spec.key.to_dict() | {"accelerator": accelerator}
    profile = api.BatchProfile.model_validate({"spec": {"key": key}})
    assert make_job(profile, "/model", FakeDevice(kind="cpu"), {}).max_replicas == expected


# --- the engine's command line ---


def test_our_arguments_come_last_and_win() -> None:
    settings = EngineSettings(
        model="m", max_num_seqs=96, args=("--dtype=float16", "--enable-prefix-caching"), capture_sizes=(1, 2)
    )
    arguments = settings.arguments(port=1234)
    assert arguments[:2] == ["--model", "m"]
    assert arguments.index("--enable-prefix-caching") < arguments.index("--no-enable-prefix-caching")
    assert arguments[arguments.index("--cudagraph-capture-sizes") + 1 :][:2] == ["1", "2"]
    assert arguments[arguments.index("--host") + 1] == "127.0.0.1"


@pytest.mark.parametrize("flag", ["--enforce-eager", "--compilation-config={}", "-O0", "--cudagraph_capture_sizes"])
def test_a_users_own_graph_settings_stand(flag: str) -> None:
    settings = EngineSettings(model="m", max_num_seqs=8, args=(flag,), capture_sizes=(1, 2))
    assert "--cudagraph-capture-sizes" not in settings.arguments(port=1)


def test_the_environment_can_lose_a_variable() -> None:
    settings = EngineSettings(model="m", max_num_seqs=8, environment={"VLLM_CPU_KVCACHE_SPACE": None, "A": "1"})
    environ = settings.environ({"VLLM_CPU_KVCACHE_SPACE": "4", "B": "2"})
    assert "VLLM_CPU_KVCACHE_SPACE" not in environ
    assert (environ["A"], environ["B"]) == ("1", "2")
