"""Durations and quantities: what people write, what we print, and that both agree."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightship.api.units import (
    exact_quantity,
    format_cpu,
    format_duration,
    format_quantity,
    parse_cpu,
    parse_duration,
    parse_quantity,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("13.89ms", 0.01389), ("1m30s", 90), ("1.5s", 1.5), ("0", 0), ("100us", 1e-4), ("100µs", 1e-4),
        ("1h0.5s", 3600.5), (".5s", 0.5), ("5.s", 5), ("7ns", 7e-9), ("+2s", 2),
    ],
)  # fmt: skip
def test_durations_are_read_exactly(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "15", "ms", "15 ms", "-1s", "1d", "1.2.3s", "1s2", "١s", "nan", "1e3s"])
def test_what_is_no_duration_is_refused_with_the_text_named(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.01389, "13.89ms"), (90, "1m30s"), (0.9999999999, "1s"), (59.9999999, "1m"), (0, "0s"), (3e-10, "0s"),
        (123.4567, "2m3.457s"), (259200, "72h"), (1.5, "1.5s"), (2e-6, "2us"), (5e-9, "5ns"), (3600.5, "1h0.5s"),
    ],
)  # fmt: skip
def test_durations_are_printed_as_go_does(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_no_text_for_what_is_no_duration(seconds: float) -> None:
    with pytest.raises(ValueError, match="duration"):
        format_duration(seconds)


@given(st.floats(min_value=1e-6, max_value=1e6))
def test_a_printed_duration_reads_back_within_its_digits(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("64Gi", 64 << 30), ("16G", 16 * 10**9), ("500Mi", 500 << 20), ("1e9", 10**9), ("1E3", 1000), ("1.5Gi", 3 << 29),
        ("1500m", 2), ("8E", 8 * 10**18), (1024, 1024), ("0", 0), ("0.1Ki", 103), ("1e-1", 1), ("+1k", 1000), (1.5, 2),
    ],
)  # fmt: skip
def test_quantities_are_read_exactly_and_rounded_up(text: str | int | float, amount: int) -> None:
    assert parse_quantity(text) == amount


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1), ("1500m", Fraction(3, 2)), ("80Gi", 80 * 2**30), ("1k", 1000), (2, 2), ("0.5", Fraction(1, 2)), ("-1Gi", -(2**30)),
        (".5", Fraction(1, 2)), ("1.", 1), ("1n", Fraction(1, 10**9)), ("12E", 12 * 10**18), ("1E3", 1000),
    ],
)  # fmt: skip
def test_quantities_are_numbers_of_either_sign(text: str | int, number: Fraction) -> None:
    assert exact_quantity(text) == number


@pytest.mark.parametrize("text", ["", "x", "1Xi", "Gi", " 1", "--1", True])
def test_what_is_no_number_is_no_quantity(text: str | bool) -> None:
    with pytest.raises(ValueError, match="is not a quantity"):
        exact_quantity(text)


@pytest.mark.parametrize("text", ["", "Gi", "64 Gi", "64GB", "-1Gi", "1KI", "1e9999", "12E", True, "nan", "1K"])
def test_what_is_no_quantity_is_refused_with_the_text_named(text: str | bool) -> None:
    with pytest.raises(ValueError, match="quantity"):
        parse_quantity(text)


@pytest.mark.parametrize(("text", "millicores"), [("500m", 500), (2, 2000), ("1.5", 1500), ("0.1", 100), ("1u", 1)])
def test_cpu_counts_in_thousandths(text: str | int, millicores: int) -> None:
    assert parse_cpu(text) == millicores


@given(st.integers(min_value=0, max_value=1 << 62))
def test_a_printed_size_reads_back_exactly_and_never_longer_than_its_digits(amount: int) -> None:
    assert parse_quantity(format_quantity(amount)) == amount
    assert len(format_quantity(amount)) <= len(str(amount))


@pytest.mark.parametrize(
    ("amount", "text"), [(64 << 30, "64Gi"), (16 * 10**9, "16G"), (11469 << 20, "11469Mi"), (0, "0"), (3, "3")]
)
def test_sizes_are_printed_short(amount: int, text: str) -> None:
    assert format_quantity(amount) == text


@given(st.integers(min_value=0, max_value=10**6))
def test_a_printed_cpu_reads_back(millicores: int) -> None:
    assert parse_cpu(format_cpu(millicores)) == millicores


@pytest.mark.parametrize("form", [format_quantity, format_cpu])
def test_negative_amounts_have_no_text(form: object) -> None:
    with pytest.raises(ValueError, match="-1"):
        form(-1)  # type: ignore[operator]
