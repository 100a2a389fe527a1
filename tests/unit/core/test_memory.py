"""The memory ledger against hand-worked numbers and published KV peaks."""

from __future__ import annotations

import dataclasses
import random
import statistics
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightship.core.memory import Context, Ledger, Reserve, context_from_lengths, context_from_means, kv_tokens

GIB = 1 << 30


def make_ledger(total: int = 64 * GIB, non_kv: int = 4 * GIB) -> Ledger:
    return Ledger(total, non_kv, kv_bytes_per_token=1000, block_size=16, context=Context(400, 300), max_model_len=2048)


def test_means_alone_are_taken_as_exponential() -> None:
    context = context_from_means(300, 400, block_size=16)
    assert (context.mean, context.std, context.assumed) == (708.0, 500.0, True)


def test_equal_lengths_spread_only_by_age() -> None:
    """Age is uniform in [0, o): mean o/2, variance o^2/12."""
    context = context_from_lengths([(100, 60)] * 5, block_size=0)
    assert context.mean == 130
    assert context.std == pytest.approx(60 / 12**0.5)


def test_long_outputs_are_in_flight_more_often() -> None:
    """Outputs 10 and 90: nine in ten of those in flight write 90 tokens."""
    context = context_from_lengths([(0, 10), (0, 90)], block_size=16)
    assert context.mean == pytest.approx(0.1 * 5 + 0.9 * 45 + 8)


def test_the_length_formula_agrees_with_drawing_in_flight_requests() -> None:
    draw = random.Random(7)
    lengths = [(draw.randint(1, 500), draw.randint(1, 800)) for _ in range(400)]
    picked = draw.choices(lengths, weights=[output for _, output in lengths], k=40_000)
    contexts = [prompt + draw.random() * output for prompt, output in picked]
    context = context_from_lengths(lengths, block_size=0)
    assert context.mean == pytest.approx(statistics.fmean(contexts), rel=0.02)
    assert context.std == pytest.approx(statistics.pstdev(contexts), rel=0.02)


@pytest.mark.parametrize("lengths", [[], [(10, 0)], [(-1, 5)]])
def test_a_workload_without_output_has_no_context(lengths: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"output|negative"):
        context_from_lengths(lengths, block_size=16)


@pytest.mark.parametrize(
    ("batch", "peak", "expected"),
    [
        (1, None, 2048),  # one request of max_model_len
        (16, None, 16 * 400 + 4 * 300 * 4),  # 11,200: whole blocks already
        (16, 11_201, 11_216),  # the observed peak, rounded up to a block
    ],
)
def test_kv_covers_spread_peak_and_the_longest_request(batch: int, peak: int | None, expected: int) -> None:
    assert make_ledger().kv_tokens(batch, peak) == expected


@pytest.mark.parametrize(("batch", "peak_share", "blocks"), [(16, 0.036, 18573), (96, 0.16, 18525), (256, 0.38, 18446)])
def test_kv_from_mean_lengths_covers_the_published_peaks(batch: int, peak_share: float, blocks: int) -> None:
    """OPT-1.3B on ShareGPT, 111 tokens in and 292 out on average (arXiv:2503.08311, published raw runs)."""
    need = kv_tokens(batch, context_from_means(110.6, 292.0, 16), block_size=16)
    peak = peak_share * blocks * 16
    assert peak <= need <= 1.25 * peak


def test_replicas_fill_what_the_reserve_leaves() -> None:
    ledger = make_ledger(total=60 * GIB, non_kv=10 * GIB - 2_048_000)
    assert ledger.replicas_max(1, Reserve()) == 6
    assert ledger.replicas_max(1, Reserve(share=Fraction(5, 100))) == 5
    assert ledger.replicas_max(1, Reserve(amount=1)) == 5
    assert make_ledger(total=4 * GIB).replicas_max(1, Reserve()) == 0


@given(
    st.integers(1, 1 << 40), st.integers(0, 1 << 38), st.integers(1, 2048), st.integers(0, 1 << 38), st.integers(0, 99)
)
def test_what_fits_never_exceeds_the_device(total: int, non_kv: int, batch: int, amount: int, percent: int) -> None:
    ledger, reserve = make_ledger(total, non_kv), Reserve(amount, Fraction(percent, 100))
    fit = ledger.replicas_max(batch, reserve)
    need = ledger.replica_bytes(batch)
    assert need % (1 << 20) == 0
    assert 0 <= need - non_kv - ledger.kv_bytes(batch) < 1 << 20
    if fit:
        assert fit * need + reserve.of(total) <= total
    assert (fit + 1) * need > ledger.available(reserve)


@given(st.integers(1, 4096), st.integers(0, 10**7), st.integers(1, 256))
def test_kv_is_whole_blocks_and_covers_what_was_seen(batch: int, peak: int, block: int) -> None:
    need = kv_tokens(batch, Context(400, 300), block, 2048, peak)
    assert need % block == 0
    assert need >= max(peak, 2048, batch * 400)


def test_what_replicas_took_together_raises_the_figure_of_their_batch_and_of_larger_ones_and_lowers_none() -> None:
    alone = make_ledger(total=60 * GIB, non_kv=4 * GIB)
    seen = dataclasses.replace(alone, seen=((64, 6 * GIB), (128, 5 * GIB), (256, 3 * GIB), (512, 7 * GIB)))
    assert [seen.non_kv_at(batch) // GIB for batch in (1, 63, 64, 128, 256, 511, 512)] == [4, 4, 6, 6, 6, 6, 7]
    assert seen.replica_bytes(64) - alone.replica_bytes(64) == 2 * GIB
    assert seen.replicas_max(1, Reserve()) > seen.replicas_max(64, Reserve())
