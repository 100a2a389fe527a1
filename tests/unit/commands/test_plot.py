"""`tightship plot`: what is in the picture, and what the files are. How it looks is for eyes."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from tightship import decide
from tightship.__main__ import main as tightship
from tightship.commands import plot
from tightship.commands.manifest import read_profile
from tightship.core.curve import Metric, Objective, Statistic

SAMPLES = Path(__file__).resolve().parents[3] / "docs" / "samples"
MEASURED = str(SAMPLES / "batchprofile-measured.yaml")
IMPORTED = str(SAMPLES / "batchprofile-imported.yaml")
ITL = Objective(Metric.INTER_TOKEN_LATENCY, Statistic.MEAN, 0.04)


def picture(file: str, *objectives: Objective, **changes: Any) -> plot.Picture:
    profile = {**read_profile(file), **changes}
    return plot.picture(profile, decide.decision_from_profile(profile, objectives), floor=0.1, reserve="5%")


def test_what_is_drawn_of_a_whole_profile() -> None:
    shown = picture(MEASURED, ITL)
    assert shown.title == "facebook/opt-1.3b on NVIDIA-H100-64GB"
    one = shown.series[0]
    assert (one.replicas, [mark.batch for mark in one.measured][:4]) == (1, [1, 8, 16, 32])
    assert one.measured[-1].eligible is False
    two = next(each for each in shown.series if each.replicas == 2)
    assert [(mark.batch, mark.throughput, mark.latencies) for mark in two.measured] == [
        (96, 12313.9, (pytest.approx(0.01898),)),
        (256, 14669.5, (pytest.approx(0.03707),)),
    ]
    by_curve, large = two.predicted
    assert by_curve is not None
    assert large is not None
    assert by_curve.latencies[0] == pytest.approx(0.0189, rel=0.05)
    # What both trials stayed behind the prediction, their geometric mean, is taken off every estimate.
    behind = ((12313.9 / by_curve.throughput) * (14669.5 / large.throughput)) ** 0.5
    estimated = {mark.batch: mark for mark in two.estimated}
    assert estimated[96].throughput == pytest.approx(behind * by_curve.throughput)
    assert len(estimated) == len(one.measured)
    # The choice lies on its line.
    three = next(each for each in shown.series if each.replicas == 3)
    assert shown.chosen is not None
    on_the_line = next(mark for mark in three.estimated if mark.batch == shown.chosen.batch)
    assert (shown.chosen.replicas, on_the_line.throughput) == (3, pytest.approx(shown.chosen.throughput))
    assert shown.applied is not None
    assert (shown.applied.batch, shown.applied.throughput) == (256, 14669.5)
    assert shown.floor == pytest.approx(38.14)
    assert shown.baseline is not None
    assert (shown.baseline.batch, shown.baseline.throughput) == (768, 11864.8)
    assert shown.chosen is not None
    assert shown.memory is not None
    assert shown.memory.replicas == shown.chosen.replicas
    assert shown.memory.replicas * shown.memory.each + shown.memory.reserve <= shown.memory.total == 65247 << 20
    assert f"batch {shown.chosen.batch} with {shown.chosen.replicas} replica" in shown.subtitle


def test_the_replica_of_the_confirmation_run_is_drawn(tmp_path: Path) -> None:
    document = yaml.safe_load(Path(MEASURED).read_text())
    document["spec"]["results"]["confirmation"] = {
        "batch": 96,
        "totalTokensPerSecond": "8900",
        "interTokenLatency": {"mean": "41ms"},
        "agrees": False,
    }
    shown = picture(MEASURED, ITL, spec=document["spec"])
    assert shown.confirmed == plot.Mark(96, 8900, (pytest.approx(0.041),), eligible=False)
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(document))
    output = tmp_path / "profile.svg"
    assert tightship(["plot", "-f", str(path), "--itl", "40ms", "-o", str(output)]) == 0
    assert "as a replica (confirmation run)" in output.read_text()


def test_a_bare_curve_shows_what_it_has() -> None:
    shown = picture(IMPORTED)
    assert [each.replicas for each in shown.series] == [1]
    assert (shown.memory, shown.baseline) == (None, None)
    assert shown.panels == (plot.Panel(),)
    assert shown.chosen is not None
    assert shown.chosen_latencies == (pytest.approx(0.02927),)


def test_a_profile_without_batch_1_has_no_floor() -> None:
    document = yaml.safe_load(Path(IMPORTED).read_text())
    results = document["spec"]["results"]
    results["points"] = [point for point in results["points"] if point["batch"] > 1]
    assert picture(IMPORTED, spec=document["spec"]).floor is None


def test_an_objective_that_nothing_meets_is_drawn_without_a_choice(tmp_path: Path) -> None:
    shown = picture(MEASURED, Objective(Metric.INTER_TOKEN_LATENCY, Statistic.MEAN, 0.001))
    assert (shown.chosen, shown.memory) == (None, None)
    assert shown.subtitle == "no choice: SLOInfeasible"
    assert tightship(["plot", "-f", MEASURED, "--itl", "1ms", "-o", str(tmp_path / "a.png")]) == 0


@pytest.mark.parametrize(
    "words", [(), ("--itl", "40ms"), ("--itl", "200ms", "--statistic", "p99", "--efficiency-floor", "0")]
)
@pytest.mark.parametrize("file", [MEASURED, IMPORTED])
def test_svg_says_in_text_what_it_shows(tmp_path: Path, file: str, words: tuple[str, ...]) -> None:
    output = tmp_path / "a.svg"
    assert tightship(["plot", "-f", file, "-o", str(output), *words]) == 0
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", output.read_text())
    assert "facebook/opt-1.3b on NVIDIA-H100-64GB" in texts
    assert "1 replica, measured" in texts
    assert "the choice" in texts
    assert {"1", "8", "64", "512"} <= set(texts)
    assert ("efficiency floor (one replica)" in texts) == ("--efficiency-floor" not in words)
    assert any("(tokens/s)" in text for text in texts)
    assert any("latency (ms)" in text for text in texts)
    if words:
        assert f"SLO: {words[1]}" in texts
    if file == MEASURED:
        assert {
            "2 replicas, estimated",
            "2 replicas, measured",
            "4 replicas, measured",
            "engine's default batch (768)",
        } <= set(texts)
        assert any(text.startswith("memory: ") for text in texts)


def test_the_same_profile_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        assert tightship(["plot", "-f", MEASURED, "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_png(tmp_path: Path) -> None:
    output = tmp_path / "a.PNG"
    assert tightship(["plot", "-f", MEASURED, "--itl", "40ms", "-o", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    assert len(output.read_bytes()) > 20_000


class Tags(HTMLParser):
    """Counts what a page holds, and collects what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.fetched += [
            value for name, value in attrs if name in ("src", "href", "xlink:href") and value and value[0] != "#"
        ]


def test_html_is_one_page_with_every_candidate(tmp_path: Path) -> None:
    profile = read_profile(MEASURED)
    hostile = {
        **profile,
        "spec": {**profile["spec"], "key": {**profile["spec"]["key"], "model": {"source": "hf://a/<script>b&c"}}},
    }
    file, output = tmp_path / "p.yaml", tmp_path / "a.html"
    file.write_text(yaml.safe_dump(hostile))
    assert tightship(["plot", "-f", str(file), "--itl", "40ms", "-o", str(output)]) == 0
    text = output.read_text()
    tags = Tags()
    tags.feed(text)
    answer = decide.decision_from_profile(profile, [ITL])
    assert tags.count["tr"] == 1 + len(answer.candidates)
    assert tags.count["svg"] == 1
    assert "script" not in tags.count
    assert tags.fetched == []
    assert text.count('class="chosen"') == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-f", MEASURED, "-o", "a.pdf"), "the name must end in .png, .svg or .html"),
        (("-f", MEASURED, "-o", "/nowhere/a.png"), "/nowhere/a.png can't be written: No such file or directory"),
        (("-f", "/nowhere.yaml", "-o", "a.png"), "No such file or directory"),
        (("-f", str(SAMPLES / "llmservice-opt.yaml"), "-o", "a.png"), "holds LLMService, no BatchProfile"),
    ],
)
def test_what_is_wrong_is_said_in_words(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    assert tightship(["plot", *words]) == plot.EXIT_USAGE
    assert said in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert tightship(["plot", "-f", MEASURED, "-o", "a.png"]) == plot.EXIT_USAGE
    assert "pip install 'tightship[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "metadata", "title"),
    [
        ({"key": {"model": {"source": "hf://a/$\\bad{$"}}}, {}, "a/$\\bad{$ on a GPU"),
        ({"key": {"model": {"source": "hf://<b>/x"}}}, {}, "&lt;b&gt;/x on a GPU"),
        ({"key": {"model": "opt"}}, ["opt"], "a model on a GPU"),
    ],
)
def test_a_strange_name_is_a_heading_like_any_other(spec: Any, metadata: Any, title: str, tmp_path: Path) -> None:
    points = [{"batch": 1, "totalTokensPerSecond": 300}, {"batch": 8, "totalTokensPerSecond": 2000}]
    profile = tmp_path / "profile.yaml"
    profile.write_text(
        yaml.safe_dump({"kind": "BatchProfile", "metadata": metadata, "spec": spec, "status": {"points": points}})
    )
    output = tmp_path / "a.svg"
    assert tightship(["plot", "-f", str(profile), "-o", str(output)]) == 0
    assert title in output.read_text()
