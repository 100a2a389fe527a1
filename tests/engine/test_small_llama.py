"""The small Llama: the same seed gives the same model, and a finished one is left alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_small_llama.py"


def make(python: Path, directory: Path, *options: str) -> str:
    done = subprocess.run(
        [str(python), str(SCRIPT), str(directory), *options],
        check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip
    return done.stdout


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


def test_the_same_seed_gives_the_same_model(engine_python: Path, tmp_path: Path) -> None:
    said = make(engine_python, tmp_path / "one")
    make(engine_python, tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert "86.5 M parameters" in said

    configuration = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (configuration["num_hidden_layers"], configuration["hidden_size"]) == (12, 768)
    assert (tmp_path / "one" / "chat_template.jinja").is_file()

    before = digests(tmp_path / "one")
    assert "there already" in make(engine_python, tmp_path / "one", "--seed", "1")
    assert digests(tmp_path / "one") == before
