"""Packing trials: on cores and memory as plain values, then whole ones with engines that share a GPU in virtual time."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from tightship.api.units import parse_duration, parse_quantity
from tightship.api.v1alpha1 import batchprofile as api
from tightship.core.advisor import Basis, Limit, Recommendation, advise
from tightship.core.colocation import predict
from tightship.core.curve import Metric, Objective, Statistic
from tightship.core.memory import Context, Ledger, Reserve
from tightship.decide import decision_from_profile
from tightship.profiler import points
from tightship.profiler.budget import Budget
from tightship.profiler.engine import EngineInfo, EngineSettings
from tightship.profiler.fleet import Pair, Sizes, packed_settings
from tightship.profiler.gpu import DeviceError
from tightship.profiler.lengths import Lengths, Prompts
from tightship.profiler.load import ClosedLoop
from tightship.profiler.packed import PackedMeter
from tightship.profiler.sharing import CoreSharing, NotAttachedError, Owner, SharingError, engine_cores
from tightship.profiler.trials import Agenda, Bench, Given, Predicted, Trials, Verdict, better
from tightship.sandbox.virtual.clock import VirtualClock, in_virtual_time
from tightship.sandbox.virtual.disturbance import Faults
from tightship.sandbox.virtual.engine import VirtualEngine
from tightship.sandbox.virtual.launcher import VirtualDevice, VirtualLauncher
from tightship.sandbox.virtual.profile import Profiled, profile
from tightship.sandbox.virtual.settings import NO_GAIN, OPT, PAYS, Packing, Setting
from unit.profiler.fakes import FakeDevice, FakeEngine, FakeModel

GIB = 1 << 30


@pytest.mark.parametrize(
    ("cores", "index", "per_replica", "expected"),
    [
        ({0, 1, 2, 3}, 0, 4, "1,2,3"),
        ({0, 1, 2, 3}, 0, 2, "3"),
        ({0, 1, 2, 3}, 1, 2, "1"),
        ({0, 1, 2, 3, 4, 5}, 0, 3, "4,5"),
        ({0, 1, 2, 3, 4, 5}, 1, 3, "1,2"),
        ({0, 1}, 0, 1, "1"),
        ({0, 1}, 1, 1, "0"),
        ({0, 1}, 0, 2, "1"),
        ({0, 1}, 1, 2, "1"),
        ({5}, 0, 1, "5"),
        ({5}, 3, 4, "5"),
        ({0, 1, 2}, 1, 2, "2"),
    ],
)
def test_cores_of_each_engine(cores: set[int], index: int, per_replica: int, expected: str) -> None:
    assert engine_cores(cores, index, per_replica) == expected


def test_slices_do_not_overlap_while_there_are_cores() -> None:
    slices = [set(engine_cores(set(range(16)), index, 4).split(",")) for index in range(4)]
    assert sum(map(len, slices)) == len(set.union(*slices)) == 12


def test_no_cores_are_refused() -> None:
    with pytest.raises(ValueError, match="engine 0 can't have 1 of 0 cores"):
        engine_cores(set(), 0, 1)


def test_engines_that_share_cores_are_told_of() -> None:
    own, shared = CoreSharing({0, 1, 2, 3}, 2), CoreSharing({0, 1}, 2)
    assert own.doubt(2) is None
    assert shared.doubt(2) == (
        "2 engines of 2 cores each shared the 2 cores this Job may use: replicas with cores of their own do better"
    )
    assert shared.environment(1) == {"VLLM_CPU_OMP_THREADS_BIND": "1"}


def sizes(total: int = 80 * GIB) -> Sizes:
    """Replicas of 4 GiB beside their KV cache; a request in flight takes 1,000 tokens of 16 KiB, so 64 take 1 GiB and a little."""
    ledger = Ledger(
        device_total=total,
        non_kv=4 * GIB,
        kv_bytes_per_token=16 << 10,
        block_size=16,
        context=Context(mean=1000, std=0),
        max_model_len=2048,
    )
    return Sizes(ledger, Reserve(), {})


@pytest.mark.parametrize(
    ("total", "pair", "others", "expected"),
    [
        (80, (64, 2), [], (2, 64)),
        (80, (64, 2), [(64, 4), (128, 3)], (4, 128)),
        # 4 x (4 + 2 GiB) fit, 4 x (4 + 4 GiB) don't: more engines come before more KV cache
        (30, (64, 2), [(128, 4), (256, 2)], (4, 128)),
        # eight replicas of 64 fit 48 GiB, but not with the KV cache that the pair itself needs
        (48, (512, 2), [(64, 8)], (2, 512)),
        # what can't be run at all sizes nothing
        (30, (64, 2), [(1024, 8)], (2, 64)),
    ],
)
def test_a_group_serves_its_pair_and_as_many_others_as_fit(
    total: int, pair: Pair, others: list[Pair], expected: tuple[int, int]
) -> None:
    given = sizes(total * GIB)
    group = given.group(pair, others)
    assert (group.replicas, group.batch) == expected
    assert group.kv_tokens == 1000 * group.batch
    assert given.serves(group, pair)
    assert group.replicas * group.need <= total * GIB


def test_what_does_not_fit_is_said_with_numbers() -> None:
    given = sizes(9 * GIB)
    assert given.fits((64, 1))
    assert not given.fits((64, 2))
    assert given.misfit((64, 2)) == "2 x 4.98 GiB exceed the 9.00 GiB of 9.00 GiB that the reserve leaves"


def test_an_engine_of_a_group_is_started_as_a_replica_with_a_share_of_its_own_need() -> None:
    device = FakeDevice(memory=80 * GIB)
    group = sizes().group((64, 2), [])
    info = EngineInfo(max_num_batched_tokens=8192, capture_sizes=(1, 2, 4))
    settings = packed_settings(
        EngineSettings(model="opt", max_num_seqs=1024, args=("--gpu-memory-utilization=0.9",)), info, group, device
    )
    arguments = settings.arguments(8000)
    share = float(arguments[len(arguments) - 1 - arguments[::-1].index("--gpu-memory-utilization") + 1])
    assert group.need <= share * device.memory <= group.need + device.memory / 10_000
    assert settings.max_num_seqs == 64
    assert settings.kv_cache_bytes == group.kv_bytes
    assert settings.max_num_batched_tokens == 8192
    assert settings.capture_sizes == (1, 2, 4)


# --- whole trials, in virtual time ---


@functools.cache
def measured(setting: Setting, slo: float) -> api.BatchProfileStatus:
    """What the sweep and the confirmation run of a setting leave to the trials."""
    return profile(setting, objectives=[slo], budget=1200.0).status


@dataclass
class FakeSharing:
    """The edge this machine lacks, a GPU's driver: notes what is asked of it, and refuses what it is told to."""

    cannot_open: str | None = None
    attached: int = 99
    """Engines that it finds attached at the most."""
    fault: bool = False
    events: list[str] = field(default_factory=list)

    async def open(self) -> None:
        self.events.append("open")
        if self.cannot_open is not None:
            raise SharingError(self.cannot_open)

    def environment(self, index: int) -> dict[str, str | None]:
        return {"SHARED_AS": str(index)}

    async def prove(self, engines: Sequence[Owner]) -> None:
        self.events.append(f"prove {len(engines)}")
        if len(engines) > self.attached:
            raise NotAttachedError(f"MPSNotAttached: {len(engines)} engines, {self.attached} clients")

    async def condition(self) -> str | None:
        return "the MPS server is in FAULT" if self.fault else None

    def doubt(self, engines: int) -> str | None:
        return None

    async def close(self) -> None:
        self.events.append("close")


class Late(ClosedLoop):
    """A load on a core that is too slow for it: its timers run late."""

    def begin(self):  # type: ignore[no-untyped-def]
        recording = super().begin()
        for _ in range(10_000):
            recording.lateness.add(0.05)
        return recording


class Lingering(VirtualDevice):
    """A device on which an engine that has just ended holds its memory for three seconds more."""

    until: float | None = None

    def used(self) -> int:
        now = asyncio.get_running_loop().time()
        self.until = now + 3.0 if self.until is None else self.until
        return super().used() + (60 * GIB if now < self.until else 0)


class Losing(VirtualDevice):
    """A device that can't be read while `lost` says so."""

    lost: Callable[[], bool]

    def used(self) -> int:
        if self.lost():
            raise DeviceError("the GPU is lost")
        return super().used()


@dataclass
class Story:
    """Trials of a setting, and what can be seen of them afterwards."""

    packing: Packing
    budget: float = 3600.0
    faults: Sequence[Faults] = ()
    sharing: FakeSharing = field(default_factory=FakeSharing)
    pairs: tuple[Pair, ...] | None = None
    """Given ones; else the predicted order."""
    known: dict[Pair, api.Trial] = field(default_factory=dict)
    late: int = 0
    """How many loads run late, the first ones."""
    lingers: bool = False
    lost_with: int | None = None
    """Trials that are kept before the device can't be read any more."""
    max_replicas: int = 4
    cancel_after: float | None = None
    start_seconds: float = 45.0
    free_start: bool = False
    """Whether no engine was started before: then the first start doesn't count."""
    in_flight_most: int = 1_000_000

    def __post_init__(self) -> None:
        self.status = measured(self.packing.setting, self.packing.slo)
        ledger = points.ledger(self.status.memory, 2048)
        assert ledger is not None
        self.sizes = Sizes(
            ledger,
            Reserve(share=points.reserve("5%").share),
            {point.batch: point.kv_cache_tokens_peak for point in self.status.points},
        )
        curve = points.curve(self.status.points)
        assert curve is not None
        self.curve = curve
        self.objectives = (Objective(Metric.INTER_TOKEN_LATENCY, Statistic.MEAN, self.packing.slo),)
        self.kept: list[Pair] = []
        self.trials = dict(self.known)
        self.seconds = 0.0
        self.starting = 0
        self.used_after = -1

    @property
    def agenda(self) -> Agenda:
        if self.pairs is not None:
            return Given(self.pairs)
        return Predicted(
            self.curve,
            self.objectives,
            self.sizes,
            max_replicas=self.max_replicas,
            minimum_gain=1.05,
            efficiency_floor=0.1,
            dedicated=False,
        )

    def run(self) -> Verdict:
        return in_virtual_time(self._run)

    async def _run(self) -> Verdict:
        setting, clock = self.packing.setting, VirtualClock()
        gpu = setting.gpu()
        self.device = Lingering(gpu) if self.lingers else Losing(gpu)
        if isinstance(self.device, Losing):
            self.device.lost = lambda: self.lost_with is not None and len(self.kept) >= self.lost_with
        self.idle = VirtualDevice(gpu).used()
        self.launcher = VirtualLauncher(gpu, start_seconds=self.start_seconds, faults=self.faults)
        began = clock.now()
        budget = Budget(self.budget, 0.0, clock)
        if not self.free_start:
            budget.engine_healthy(self.start_seconds)
        engine = self.status.engine
        assert engine is not None

        async def launch(settings: EngineSettings) -> VirtualEngine:
            assert not self.starting, "two engines were starting at once"
            self.starting += 1
            try:
                launched = await budget.bound(self.launcher.launch(settings, timeout=600.0))
                budget.engine_healthy(self.start_seconds)
                return launched
            finally:
                self.starting -= 1

        def load(engine: VirtualEngine, seed: int) -> ClosedLoop:
            kind = Late if self.late > 0 else ClosedLoop
            self.late -= 1
            return kind(engine.channel(), setting.lengths, Prompts(50_000, seed), clock, seed)

        bench = Bench(
            settings=EngineSettings(model=setting.hub, max_num_seqs=256, args=setting.arguments, max_model_len=2048),
            info=EngineInfo(
                max_num_batched_tokens=engine.max_num_batched_tokens, capture_sizes=tuple(engine.capture_sizes)
            ),
            sizes=self.sizes,
            lengths=setting.lengths,
            steps_needed=0,
            launch=launch,  # type: ignore[arg-type]
            load=load,  # type: ignore[arg-type]
            device=self.device,
            clock=clock,
            sharing=self.sharing,
            left=lambda: budget.left,
            progress=lambda pair, message: None,
            keep=lambda trial: self.kept.append((trial.batch, trial.replicas)),
            idle=self.idle,
            too_many=lambda requests: f"{requests} are too many" if requests > self.in_flight_most else None,
            start_cost=budget.start_cost,
        )
        trials = asyncio.get_running_loop().create_task(Trials(bench, self.agenda, self.trials).run())
        if self.cancel_after is not None:
            asyncio.get_running_loop().call_later(self.cancel_after, trials.cancel)
        try:
            return await trials
        finally:
            self.seconds = clock.now() - began
            self.lost_with = None
            self.used_after = self.device.used()

    def decide(self) -> Recommendation:
        """What the advisor makes of it."""
        return advise(
            self.curve,
            self.objectives,
            ledger=self.sizes.ledger,
            reserve=self.sizes.reserve,
            max_replicas=self.max_replicas,
            trials=[points.trial(trial) for trial in self.trials.values()],
        )


def total(trial: api.Trial) -> float:
    return float(trial.total_tokens_per_second or 0)


def mean_itl(trial: api.Trial) -> float:
    assert trial.inter_token_latency is not None
    return parse_duration(trial.inter_token_latency.mean or "0")


def test_packing_that_pays_is_found_and_chosen() -> None:
    story = Story(PAYS)
    verdict = story.run()
    assert not verdict.exceeded
    best = max(story.trials.values(), key=total)
    alone = max(point.throughput for point in story.curve.points)
    assert best.replicas > 1
    assert total(best) > 1.1 * alone

    answer = story.decide()
    assert answer.basis is Basis.MEASURED
    assert (answer.batch, answer.replicas) == (best.batch, best.replicas)
    # what was measured packed: slower than alone, within the objective
    single = story.curve.at(best.batch)
    assert single is not None
    assert (single.inter_token_latency.mean or 0) < mean_itl(best) <= PAYS.slo
    assert best.running_mean is not None
    assert float(best.running_mean) >= 0.98 * best.batch
    assert float(best.half_width or 1) <= 0.05
    assert float(best.slowest or 0) > 0.95
    # What they took together is what the ledger says of each; the trial's steps are no larger than the confirmation run's worst.
    assert parse_quantity(best.memory or "0") <= best.replicas * story.sizes.ledger.replica_bytes(
        best.batch, story.sizes.peak(best.batch)
    )
    assert verdict.notes[-1].startswith(f"{len(story.trials)} packings were tried, the fastest")


def test_packing_that_does_not_pay_ends_after_one_trial_and_one_replica_is_chosen() -> None:
    story = Story(NO_GAIN)
    story.run()
    assert len(story.trials) == 1
    assert story.decide().replicas == 1


def test_an_objective_held_alone_and_missed_when_packed_leads_to_less_of_it() -> None:
    tight = Packing(OPT, 0.0125, "batch 64 meets it alone with 10.6 ms, and misses it beside a second replica")
    asked = Story(tight, pairs=((64, 2),))
    asked.run()
    alone, packed = asked.curve.at(64), asked.trials[64, 2]
    assert alone is not None
    assert (alone.inter_token_latency.mean or 1) <= tight.slo < mean_itl(packed)
    answer = asked.decide()
    assert (answer.batch, answer.replicas) != (64, 2)
    refused = next(one for one in answer.candidates if (one.batch, one.replicas) == (64, 2))
    assert refused.limits == (Limit.SLO,)

    # The profiler's own order finds what holds the objective packed, or leaves one replica.
    story = Story(tight, known=asked.trials)
    story.run()
    answer = story.decide()
    assert answer.basis is Basis.MEASURED
    if answer.replicas != 1:
        assert mean_itl(story.trials[answer.batch or 0, answer.replicas or 0]) <= tight.slo


def test_the_total_is_that_of_the_published_queue() -> None:
    """Closed queue by exact mean value analysis: the engines' gaps are filled by their neighbours, and nothing else happens."""
    story = Story(PAYS, pairs=((64, 2),))
    story.run()
    trial, predicted = story.trials[64, 2], predict(story.curve, 64, 2)
    assert predicted.inter_token_latency is not None
    assert 0.1 < predicted.utilization < 0.9, "neither alone nor in turns"
    assert mean_itl(trial) == pytest.approx(predicted.inter_token_latency, rel=0.05)
    assert total(trial) == pytest.approx(predicted.total_tokens_per_second, rel=0.05)


def test_a_trial_lasts_until_requests_have_made_room_for_others_as_a_level_does() -> None:
    async def story() -> api.Trial:
        device, clock = FakeDevice(), VirtualClock()
        engines = [
            FakeEngine(FakeModel(host=0.05), EngineSettings(model="m", max_num_seqs=8), device) for _ in range(2)
        ]
        lengths = Lengths.constant(100, 300)
        loads = [
            ClosedLoop(one.channel(), lengths, Prompts(100, seed), clock, seed) for seed, one in enumerate(engines)
        ]
        meter = PackedMeter(engines, loads, device, clock, input_per_output=1 / 3, mean_output=300)
        reading = await meter.measure(2, 30.0, 600.0)
        for load in loads:
            await load.close()
        for one in engines:
            await one.stop()
        assert reading is not None
        return reading.trial

    trial = in_virtual_time(story)
    assert 0.5 * 300 * 0.05 <= parse_duration(trial.window or "0") <= 30
    assert (trial.requests or 0) >= 1
    assert trial.time_to_first_token is not None


def test_memory_that_the_engine_before_still_holds_is_waited_for() -> None:
    story = Story(PAYS, pairs=((64, 2),), lingers=True)
    story.run()
    assert story.kept == [(64, 2)]
    alone = Story(PAYS, pairs=((64, 2),))
    alone.run()
    assert parse_quantity(story.trials[64, 2].memory or "0") == parse_quantity(alone.trials[64, 2].memory or "0")


def test_engines_are_started_one_by_one_as_many_as_needed_and_stopped() -> None:
    story = Story(PAYS, pairs=((64, 2), (32, 2), (64, 3)))
    story.run()
    assert story.kept == [(64, 2), (32, 2), (64, 3)]
    assert len(story.launcher.launched) == 3
    assert [settings.environment["SHARED_AS"] for settings in story.launcher.launched] == ["0", "1", "2"]
    assert {settings.max_num_seqs for settings in story.launcher.launched} == {64}
    assert story.sharing.events == ["open", "prove 1", "prove 2", "prove 3", "close"]
    assert story.used_after == story.idle


def test_pairs_that_need_more_kv_cache_get_a_group_of_their_own() -> None:
    story = Story(PAYS, pairs=((64, 4), (256, 2)), max_replicas=4)
    assert not story.sizes.fits((256, 4))
    story.run()
    assert story.kept == [(64, 4), (256, 2)]
    assert [settings.max_num_seqs for settings in story.launcher.launched] == [64] * 4 + [256] * 2
    assert story.sharing.events.count("open") == 1
    assert story.used_after == story.idle


def test_a_pair_that_can_never_fit_is_said_and_the_others_go_on() -> None:
    story = Story(PAYS, pairs=((256, 8), (64, 2)))
    verdict = story.run()
    assert story.kept == [(64, 2)]
    assert "the trial of 8 x 256 failed: 8 x" in verdict.notes[0]
    assert len(story.launcher.launched) == 2


def test_a_small_budget_gets_one_trial_and_says_what_it_cut() -> None:
    story = Story(PAYS, pairs=((64, 2), (64, 4)), budget=130.0)
    verdict = story.run()
    assert story.kept == [(64, 2)]
    assert verdict.exceeded
    assert "the budget ended the trials (4 x 64 takes" in verdict.notes[-1]
    assert story.seconds <= 130.0 + 5.0


def test_a_budget_too_small_for_any_trial_starts_nothing() -> None:
    story = Story(PAYS, budget=60.0)
    verdict = story.run()
    assert verdict.exceeded
    assert verdict.notes[-1].startswith("no packing was tried: the budget ended the trials")
    assert story.launcher.launched == []
    assert story.sharing.events == []


def test_an_engine_that_hangs_at_its_start_costs_no_more_than_the_budget() -> None:
    done = profile(OPT, objectives=[PAYS.slo], budget=1200.0, faults=[Faults(), Faults(), Faults(start_takes=4000.0)])
    assert done.status.outcome is not None
    assert done.status.outcome.state == "BudgetExceeded"
    assert "an engine was still starting after" in message(done.status)
    assert done.status.trials == []
    assert float(done.status.gpu_seconds or 0) == pytest.approx(1200.0, abs=5)


def test_the_first_engine_of_an_attempt_has_all_the_time_it_takes_for_trials_too() -> None:
    story = Story(PAYS, pairs=((64, 1), (32, 1)), budget=60.0, start_seconds=300.0, free_start=True)
    verdict = story.run()
    assert story.kept == [(64, 1), (32, 1)]
    assert not verdict.exceeded
    assert 300 < story.seconds < 360


def test_requests_that_have_no_sockets_make_no_trial() -> None:
    story = Story(PAYS, pairs=((64, 2), (32, 2)), in_flight_most=100)
    verdict = story.run()
    assert story.kept == [(32, 2)]
    assert verdict.notes[0] == "the trial of 2 x 64 failed: 128 are too many"


def test_engines_that_hang_under_load_fail_the_trial_with_their_last_words() -> None:
    words = "RuntimeError: the scheduler is stuck"
    story = Story(PAYS, pairs=((64, 2),), faults=[Faults(), Faults(hangs_after=1.0, says=words)])
    verdict = story.run()
    assert story.kept == []
    assert "no token has come for" in verdict.notes[0]
    assert f"its last words: engine 2: {words}" in verdict.notes[0]


def test_what_replicas_took_is_without_their_idle_neighbours() -> None:
    story = Story(PAYS, pairs=((64, 4), (64, 2)))
    story.run()
    four, two = (parse_quantity(story.trials[64, replicas].memory or "0") for replicas in (4, 2))
    assert two == pytest.approx(four / 2, rel=0.05)
    trial = points.trial(story.trials[64, 2])
    assert trial.non_kv is not None
    assert trial.non_kv <= story.sizes.ledger.non_kv + (1 << 20)


def test_an_engine_that_does_not_start_as_the_third_leaves_the_pairs_with_two() -> None:
    story = Story(
        PAYS,
        pairs=((64, 3), (32, 4), (64, 2)),
        faults=[Faults(), Faults(), *[Faults(start_fails="RuntimeError: no room")] * 2],
    )
    verdict = story.run()
    assert story.kept == [(64, 2)]
    assert len(story.launcher.launched) == 4, "the third is started twice"
    assert any("no trial with 3 replicas or more: engine 3 did not start" in note for note in verdict.notes)
    assert any("RuntimeError: no room" in note for note in verdict.notes)
    assert story.used_after == story.idle


def test_an_engine_that_did_not_start_by_chance_rules_nothing_out() -> None:
    story = Story(
        PAYS,
        pairs=((64, 3), (32, 4)),
        faults=[Faults(), Faults(), Faults(start_fails="RuntimeError: chance"), Faults()],
    )
    verdict = story.run()
    assert story.kept == [(64, 3), (32, 4)]
    assert len(story.launcher.launched) == 5
    assert any("engine 3 did not start" in note and note.endswith("at the first try") for note in verdict.notes)
    assert story.used_after == story.idle


def test_without_the_time_for_another_start_nothing_is_ruled_out() -> None:
    story = Story(
        PAYS,
        pairs=((64, 3),),
        faults=[Faults(), Faults(), Faults(start_fails="RuntimeError: chance"), Faults()],
        budget=147.0,
    )
    verdict = story.run()
    assert story.trials == {}
    assert verdict.exceeded
    assert len(story.launcher.launched) == 3


def test_engines_that_die_under_load_are_started_anew_once() -> None:
    story = Story(
        PAYS,
        pairs=((64, 2), (32, 2)),
        faults=[Faults(dies_after=50.0)],
        sharing=FakeSharing(fault=True),
    )
    verdict = story.run()
    assert story.kept == [(32, 2)]
    assert any("the trial of 2 x 64 failed: the MPS server is in FAULT" in note for note in verdict.notes)
    assert story.sharing.events.count("open") == story.sharing.events.count("close") == 2
    assert story.used_after == story.idle


def test_engines_that_die_again_end_the_trials() -> None:
    story = Story(
        PAYS,
        pairs=((64, 2), (32, 2), (16, 2)),
        faults=[Faults(dies_after=50.0), Faults(), Faults(dies_after=50.0)],
    )
    verdict = story.run()
    assert story.kept == []
    assert verdict.notes[-1] == "no packing was tried: engines died under load again"
    assert len(story.launcher.launched) == 4
    assert story.used_after == story.idle


def test_a_gpu_that_is_lost_ends_the_trials_and_keeps_those_there_are() -> None:
    story = Story(PAYS, pairs=((64, 2), (32, 2), (64, 3)), lost_with=1)
    verdict = story.run()
    assert story.kept == [(64, 2)]
    assert verdict.notes[-1].endswith(": the GPU is lost")
    assert story.used_after == story.idle


def test_a_resumed_profiler_skips_what_is_there() -> None:
    first = Story(PAYS, pairs=((64, 2),))
    first.run()
    second = Story(PAYS, pairs=((64, 2), (32, 2)), known=first.trials)
    verdict = second.run()
    assert second.kept == [(32, 2)]
    assert verdict.notes[-1].startswith("2 packings were tried, the fastest 2 x 64")


def test_engines_that_are_no_clients_of_mps_are_never_reported_as_packed() -> None:
    story = Story(PAYS, pairs=((64, 2), (32, 2)), sharing=FakeSharing(attached=1))
    verdict = story.run()
    assert story.trials == {}
    assert verdict.notes[-1] == "no packing was tried: MPSNotAttached: 2 engines, 1 clients"
    assert story.used_after == story.idle


def test_where_the_device_cannot_be_shared_it_is_said_and_nothing_is_started() -> None:
    story = Story(PAYS, sharing=FakeSharing(cannot_open="no nvidia-cuda-mps-control in this container"))
    verdict = story.run()
    assert verdict.notes[-1] == "no packing was tried: no nvidia-cuda-mps-control in this container"
    assert story.launcher.launched == []
    assert story.sharing.events == ["open", "close"]


def test_a_load_that_runs_late_refuses_the_trial() -> None:
    story = Story(PAYS, pairs=((64, 2),), late=4)
    verdict = story.run()
    (refused,) = story.trials.values()
    assert refused.total_tokens_per_second is None
    assert refused.message is not None
    assert refused.message in "; ".join(verdict.notes)
    assert any("the trial of 2 x 64 failed: the load" in note for note in verdict.notes)
    assert story.used_after == story.idle


def test_a_load_that_ran_late_once_has_another_chance() -> None:
    story = Story(PAYS, pairs=((64, 2),), late=2)
    story.run()
    (trial,) = story.trials.values()
    assert float(trial.total_tokens_per_second or 0) > 0


@pytest.mark.parametrize("after", [20.0, 60.0, 95.0], ids=["first start", "second start", "trial"])
def test_a_profiler_that_is_stopped_leaves_no_engine_and_no_daemon(after: float) -> None:
    story = Story(PAYS, pairs=((64, 2),), cancel_after=after)
    with pytest.raises(asyncio.CancelledError):
        story.run()
    assert story.used_after == story.idle
    assert story.sharing.events[-1] == "close"


# --- trials as a phase of whole profiles ---


@functools.cache
def packed() -> Profiled:
    """A whole profile with its trials."""
    return profile(OPT, objectives=[PAYS.slo], budget=1200.0)


@functools.cache
def single_replica() -> api.BatchProfileStatus:
    """A finished profile without trials."""
    return profile(OPT, objectives=[PAYS.slo], budget=1200.0, maxReplicasPerGPU=1).status


def message(status: api.BatchProfileStatus) -> str:
    assert status.outcome is not None
    return status.outcome.message or ""


def pairs_of(status: api.BatchProfileStatus) -> list[Pair]:
    return [(trial.batch, trial.replicas) for trial in status.trials]


def test_a_profile_ends_with_trials_each_saved_at_once_and_accounted() -> None:
    done = packed()
    status = done.status
    assert status.outcome is not None
    assert status.outcome.state == "Completed"
    assert len(status.trials) >= 1
    assert f"{len(status.trials)} packing" in message(status)
    assert "tokens/s: " in message(status)
    assert status.cost is not None
    assert float(status.cost.trials) > 10
    assert float(status.cost.starts) >= 45 * done.starts

    counts = [len(written.get("trials", [])) for _, written in done.written]
    assert counts == sorted(counts)
    assert set(counts) == set(range(len(status.trials) + 1))
    stages = {written["progress"]["stage"]: written["progress"] for _, written in done.written}
    assert stages["Trying"]["replicas"] > 1


def test_a_single_replica_is_all_that_was_asked_for() -> None:
    assert single_replica().trials == []
    assert "no packing was tried: at most 1 replica is allowed (maxReplicasPerGPU" in message(single_replica())


def test_a_device_that_holds_one_replica_gets_no_trial_and_the_numbers() -> None:
    done = profile(OPT, objectives=[PAYS.slo], budget=1200.0, memoryReserve="95%")
    assert done.status.trials == []
    assert "no packing was tried: the device holds one replica: 2 x " in message(done.status)


def test_an_engine_that_never_starts_beside_another_leaves_a_complete_profile() -> None:
    faults = [Faults(), Faults(), Faults(), *[Faults(start_fails="RuntimeError: no room")] * 2]
    done = profile(OPT, objectives=[PAYS.slo], budget=1200.0, faults=faults)
    assert done.status.outcome is not None
    assert done.status.outcome.state == "Completed"
    assert done.status.trials, "that no pair can be tried is kept"
    assert not any(trial.total_tokens_per_second for trial in done.status.trials)
    objective = Objective(Metric.INTER_TOKEN_LATENCY, Statistic.MEAN, PAYS.slo)
    answer = decision_from_profile({"status": done.status.to_dict()}, [objective])
    assert (answer.replicas, answer.basis) == (1, Basis.MEASURED), "what could not be tried is no estimate either"
    assert "no trial with 2 replicas or more: engine 2 did not start" in message(done.status)


def test_a_budget_that_ends_between_trials_completes_with_those_there_are() -> None:
    whole = packed()
    needed = float(whole.status.gpu_seconds or 0)
    assert len(whole.status.trials) > 1
    done = profile(OPT, objectives=[PAYS.slo], budget=needed - 60.0)
    assert 1 <= len(done.status.trials) < len(whole.status.trials)
    assert "the budget ended the trials" in message(done.status)
    assert float(done.status.gpu_seconds or 0) <= needed - 60.0 + 5.0
    assert done.status.outcome is not None
    assert (done.status.outcome.state, done.status.outcome.reason) == ("BudgetExceeded", "BudgetExceeded")
    # The curve is whole all the same, and is decided from.
    assert done.status.points == whole.status.points
    objective = Objective(Metric.INTER_TOKEN_LATENCY, Statistic.MEAN, PAYS.slo)
    assert decision_from_profile({"status": done.status.to_dict()}, [objective]).feasible

    # With a larger budget the next attempt makes those that are missing, and nothing twice.
    cut = done.status.model_copy(update={"outcome": None})
    more = profile(OPT, objectives=[PAYS.slo], budget=1200.0, status=cut)
    assert more.status.outcome is not None
    assert more.status.outcome.state == "Completed"
    assert set(pairs_of(done.status)) < set(pairs_of(more.status))
    assert more.status.points == done.status.points
    assert [
        one for one in more.status.trials if (one.batch, one.replicas) in pairs_of(done.status)
    ] == done.status.trials


EXTENSION = {"request": "more", "pairs": [{"batch": 32, "replicas": 4}, {"batch": 64, "replicas": 2}], "budget": "10m"}


def extend(earlier: api.BatchProfileStatus, *, faults: Sequence[Faults] = ()) -> api.BatchProfileStatus:
    """What an extension makes of a finished profile."""
    return profile(OPT, objectives=[PAYS.slo], budget=1200.0, status=earlier, faults=faults, extend=EXTENSION).status


def test_an_extension_tries_the_pairs_asked_for_and_nothing_else() -> None:
    earlier = single_replica()
    assert earlier.trials == []
    status = extend(earlier)
    assert status.outcome is not None
    assert earlier.outcome is not None
    assert (status.outcome.extend, status.outcome.state) == ("more", earlier.outcome.state)
    assert sorted(pairs_of(status)) == [(32, 4), (64, 2)]
    assert status.points == earlier.points
    assert status.memory == earlier.memory
    assert status.confirmation == earlier.confirmation
    assert float(status.gpu_seconds or 0) > float(earlier.gpu_seconds or 0)
    # engines of the earlier profile's settings
    assert earlier.engine is not None
    assert status.engine == earlier.engine


def test_an_extension_that_fails_says_so_and_keeps_what_there_was() -> None:
    earlier = single_replica()
    status = extend(earlier, faults=[Faults(start_fails="RuntimeError: broken")] * 2)
    assert status.outcome is not None
    assert status.outcome.extend == "more"
    assert "engine 1 did not start beside 0 others" in message(status)
    assert status.trials == []
    assert status.points == earlier.points
    assert status.memory == earlier.memory


def test_an_extension_that_is_restarted_has_what_is_left_of_its_budget() -> None:
    earlier = single_replica()
    asked = {"request": "more", "pairs": [{"batch": 64, "replicas": 2}, {"batch": 32, "replicas": 4}], "budget": "200s"}
    whole = profile(OPT, objectives=[PAYS.slo], budget=1200.0, status=earlier, extend=asked)
    assert sorted(pairs_of(whole.status)) == [(32, 4), (64, 2)]
    # The pod was killed as the first of its trials was done; the first engine's start was free.
    cut = next(written for _, written in whole.written if written.get("trials"))
    assert cut["progress"]["extend"] == "more"
    killed = api.BatchProfileStatus.model_validate(cut)
    spent = float(killed.gpu_seconds or 0) - float(earlier.gpu_seconds or 0)
    assert 45 < spent < 100

    def again(request: str) -> tuple[api.BatchProfileStatus, float]:
        extension = asked | {"request": request}
        done = profile(OPT, objectives=[PAYS.slo], budget=1200.0, status=killed, extend=extension).status
        return done, float(done.gpu_seconds or 0) - float(killed.gpu_seconds or 0)

    done, more = again("more")
    assert spent + more <= 200 + 5
    assert "the budget ended the trials" in message(done)
    done, more = again("another")
    assert spent + more > 200 + 5
    assert sorted(pairs_of(done)) == [(32, 4), (64, 2)]


P95 = [{"metric": "InterTokenLatency", "statistic": "p95", "max": "40ms"}]
TTFT = [{"metric": "TimeToFirstToken", "statistic": "mean", "max": "1s"}]


@functools.cache
def hasty() -> api.BatchProfileStatus:
    """A finished profile with one trial, which left its p95 and p99 open and saw no first token."""
    status = extend(single_replica())
    trials = [
        trial.model_copy(
            update={
                "unresolved": ["p95", "p99"],
                "time_to_first_token": None,
                "half_width": "0.01",
                "message": "the first",
            }
        )
        for trial in status.trials
        if (trial.batch, trial.replicas) == (64, 2)
    ]
    return status.model_copy(update={"trials": trials})


@pytest.mark.parametrize(
    ("objectives", "faults", "made"),
    [
        pytest.param([], [], False, id="no objective is of it"),
        pytest.param(P95, [], True, id="it was left open"),
        pytest.param(TTFT, [], True, id="no first token was seen"),
        pytest.param(
            P95, [Faults(), *[Faults(start_fails="RuntimeError: no")] * 2], False, id="it can't be made again"
        ),
    ],
)
def test_a_trial_is_made_again_for_a_statistic_that_it_left_open(
    objectives: list[dict[str, str]], faults: list[Faults], made: bool
) -> None:
    pairs = [{"batch": 64, "replicas": 2}]
    asked = {"request": "again", "pairs": pairs, "budget": "10m", "objectives": objectives}
    done = profile(OPT, objectives=[PAYS.slo], budget=1200.0, status=hasty(), faults=faults, extend=asked)
    (trial,) = done.status.trials
    assert bool(total(trial)) is True, "what was measured stands, whatever becomes of the next one"
    assert ("p95" not in trial.unresolved) is made
    assert (trial.time_to_first_token is not None) is made
    assert (trial.message != "the first") is made
    said = "the trial of 2 x 64 leaves p95 InterTokenLatency unresolved (it takes 500 engine steps: raise profiling.budget)"
    assert (said in message(done.status)) is bool(faults)
    assert done.starts == (2 if made else 3 if faults else 0)


SEEN = api.Latency(mean="1ms", p50="1ms", p90="1ms", p95="1ms", p99="1ms")


@pytest.mark.parametrize(
    ("before", "after", "stays"),
    [
        ((["p99"], "0.01"), ([], "0.05"), "after"),
        ((["p95", "p99"], "0.01"), (["p99"], "0.05"), "after"),
        ((["p99"], "0.02"), (["p99"], "0.01"), "after"),
        ((["p99"], "0.01"), (["p99"], "0.02"), "before"),
        (([], "0.05"), (["p99"], "0.01"), "before"),
        ((["no first token"], "0.01"), (["p99"], "0.05"), "after"),
    ],
)
def test_the_better_measured_trial_stays(
    before: tuple[list[str], str], after: tuple[list[str], str], stays: str
) -> None:
    old, new = (
        api.Trial(
            batch=1,
            replicas=2,
            total_tokens_per_second="1",
            inter_token_latency=SEEN,
            time_to_first_token=None if "no first token" in lacking else SEEN,
            unresolved=[each for each in lacking if each != "no first token"],
            half_width=width,
            message=name,
        )
        for name, (lacking, width) in (("before", before), ("after", after))
    )
    assert better(new, old).message == stays
    assert better(new, None) is new
    assert better(new, api.Trial(batch=1, replicas=2, message="failed")) is new


def test_the_first_measurement_answers_an_extension_too() -> None:
    status = profile(OPT, objectives=[PAYS.slo], budget=1200.0, extend=EXTENSION).status
    assert status.outcome is not None
    assert status.outcome.extend == "more"
    assert {(32, 4), (64, 2)} < set(pairs_of(status))
