"""Packing trials: on cores and memory as plain values, then whole ones with engines that share a GPU in virtual time."""

from __future__ import annotations

import pytest

from tightship.core.memory import Context, Ledger, Reserve
from tightship.profiler.engine import EngineInfo, EngineSettings
from tightship.profiler.fleet import Sizes, packed_settings
from tightship.profiler.sharing import CoreSharing, engine_cores
from unit.profiler.fakes import FakeDevice

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


def kv(batch: int) -> int:
    return batch * 1000


@pytest.mark.parametrize(
    ("total", "pair", "others", "replicas", "batch", "kv_of"),
    [
        (80, (64, 2), [], 2, 64, 64),
        (80, (64, 2), [(64, 4), (128, 3)], 4, 128, 128),
        # 4 x (4 + 2 GiB) fit, 4 x (4 + 4 GiB) don't: more engines come before more KV cache
        (30, (64, 2), [(128, 4), (256, 2)], 4, 128, 128),
        # eight replicas of 64 fit 48 GiB, but not with the KV cache that the pair itself needs
        (48, (512, 2), [(64, 8)], 2, 512, 512),
        # what can't be run at all sizes nothing
        (30, (64, 2), [(1024, 8)], 2, 64, 64),
    ],
)
def test_a_group_serves_its_pair_and_as_many_others_as_fit(
    total: int, pair: tuple[int, int], others: list[tuple[int, int]], replicas: int, batch: int, kv_of: int
) -> None:
    given = sizes(total * GIB)
    group = given.group(pair, others)
    assert (group.replicas, group.batch) == (replicas, batch)
    assert group.kv_tokens == kv(kv_of)
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
