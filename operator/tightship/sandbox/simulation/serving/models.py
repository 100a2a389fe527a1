"""From `--model` to what the simulation knows of it: a published model, or a local directory's config.json.

Names on the hub are those the simulation has costs for, as if the hub had no others. Messages are those of vLLM,
transformers and huggingface_hub, since people and profilers read them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..costs import MODELS, Model, estimate

_HUB = frozenset({"facebook/opt-1.3b", "meta-llama/llama-2-7b-hf", "meta-llama/llama-2-7b"})
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_INVALID = """Invalid repository ID or local directory specified: '{model}'.
Please verify the following requirements:
1. Provide a valid Hugging Face repository ID.
2. Specify a local directory that contains a recognized configuration file.
   - For Hugging Face models: ensure the presence of a 'config.json'.
   - For Mistral models: ensure the presence of a 'params.json'.
"""


class ModelError(Exception):
    """The model can't be had; `text` is what vLLM would print last."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


def find(name: str) -> Model:
    """Return the model of a hub name or a local directory.

    Raises:
        ModelError: it isn't there, or its configuration says too little.
    """
    path = Path(name)
    if path.is_dir():
        return _local(path)
    if name.lower() in _HUB:
        return MODELS[name.lower().rpartition("/")[2]]
    if path.is_absolute() or not _REPOSITORY.fullmatch(name):
        raise ModelError(f"ValueError: {_INVALID.format(model=name)}")
    raise ModelError(
        f"OSError: {name} is not a local folder and is not a valid model identifier listed on "
        "'https://huggingface.co/models'\nIf this is a private repository, make sure to pass a token having permission "
        "to this repo either by logging in with `hf auth login` or by passing `token=<your_token>`"
    )


def _local(path: Path) -> Model:
    try:
        config = json.loads((path / "config.json").read_text())
    except OSError as error:
        raise ModelError(f"ValueError: {_INVALID.format(model=path)}") from error
    except ValueError as error:
        raise ModelError(
            f"OSError: It looks like the config file at '{path}/config.json' is not a valid JSON file."
        ) from error
    known = MODELS.get(Path(str(config.get("_name_or_path", ""))).name.lower())
    return known or _from_shape(config)


def _from_shape(config: Mapping[str, Any]) -> Model:
    """Estimate from a configuration's shape, under the names OPT, GPT-2, Llama and their kin use."""
    architectures = config.get("architectures") or [""]
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    heads = _number(config, "num_attention_heads", "n_head", default=1)
    kv_heads = _number(config, "num_key_value_heads", default=heads)
    head = _number(config, "head_dim", default=hidden // heads)
    return estimate(
        layers=_number(config, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        intermediate=_number(config, "intermediate_size", "ffn_dim", "n_inner", default=4 * hidden),
        kv_hidden=kv_heads * head,
        vocabulary=_number(config, "vocab_size", default=32000),
        max_model_len=_number(config, "max_position_embeddings", "n_positions", default=2048),
        architecture=str(architectures[0]),
    )


def _number(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    if default is None:
        raise ModelError(f"ValueError: the model's config.json has none of {', '.join(names)}")
    return default
