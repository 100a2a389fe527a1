"""`tightship run`: its options and where they come from, its probes, its logs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import aiohttp
import pytest

from tightship.__main__ import COMMANDS, main, parser
from tightship.logs import JSONFormatter
from tightship.operator_main import Options, options
from tightship.telemetry.metrics import Metrics
from tightship.telemetry.server import Health, TelemetryServer


def parse(*arguments: str) -> Options:
    return options(parser("run").parse_args(["run", *arguments]))


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IMAGE", "RESYNC", "LEADER_ELECT", "LOG_LEVEL", "MAX_CONCURRENT_PROFILES", "NAMESPACE", "GPU_NAMING"):
        monkeypatch.delenv(f"TIGHTSHIP_{name}", raising=False)


def test_defaults_are_those_of_the_settings() -> None:
    assert parse("--namespace=tightship-system") == Options()


def test_the_command_line_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTSHIP_IMAGE", "from-environment:1")
    monkeypatch.setenv("TIGHTSHIP_RESYNC", "60")
    assert parse().settings.operator_image == "from-environment:1"
    chosen = parse("--image=given:2")
    assert chosen.settings.operator_image == "given:2"
    assert chosen.settings.resync == 60


def test_without_leader_election_there_is_no_lease() -> None:
    assert parse("--leader-elect=false").lease is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("RESYNC", "0"),
        ("RESYNC", "soon"),
        ("LEADER_ELECT", "perhaps"),
        ("MAX_CONCURRENT_PROFILES", "0"),
        ("LOG_LEVEL", "loud"),
        ("GPU_NAMING", "cdi-cri"),
    ],
)
def test_a_bad_value_in_the_environment_is_refused(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"TIGHTSHIP_{variable}", value)
    with pytest.raises(SystemExit, match="2"):
        parse()
    assert f"--{variable.lower().replace('_', '-')}" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: tightship {command}")


def test_help_lists_every_command_and_version_prints_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    listed = capsys.readouterr().out
    assert all(f"    {command} " in listed for command in COMMANDS)
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("tightship ")


@pytest.fixture
def record() -> Iterator[logging.LogRecord]:
    try:
        raise ValueError("why")
    except ValueError as error:
        caught = (type(error), error, error.__traceback__)
        yield logging.LogRecord("tightship.x", logging.ERROR, __file__, 1, "failed: %s\nsecond line", ("a",), caught)


def test_a_json_log_line_is_one_line_with_its_traceback(record: logging.LogRecord) -> None:
    line = JSONFormatter().format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert (told["level"], told["logger"], told["msg"]) == ("error", "tightship.x", "failed: a\nsecond line")
    assert "ValueError: why" in told["error"]


async def test_probes_say_what_is_missing() -> None:
    health, metrics = Health(), Metrics()
    metrics.reconciled("LLMService", "ok", 0.1)
    server = TelemetryServer(health, metrics, host="127.0.0.1", port=0)
    await server.start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:

            async def ask(path: str) -> tuple[int, str]:
                async with session.get(path) as answer:
                    return answer.status, (await answer.text()).strip()

            assert await ask("/healthz") == (200, "ok")
            assert await ask("/readyz") == (503, "starting")
            health.waiting = None
            assert await ask("/readyz") == (200, "ok")
            health.problem = "lease lost"
            assert await ask("/healthz") == (503, "lease lost")
            assert await ask("/readyz") == (503, "lease lost")
            exposed = (await ask("/metrics"))[1]
            assert 'tightship_operator_reconciles_total{kind="LLMService",outcome="ok"} 1.0' in exposed
    finally:
        await server.stop()
