"""Write a small Llama that a real engine serves on one CPU core: random weights, a trained tokenizer, a chat template.

    python scripts/make_small_llama.py DIRECTORY [--seed N] [--force]

Nothing is downloaded: the weights are drawn from a seeded generator and the byte-level BPE tokenizer is trained on the
text this repository ships (its licence and its documentation). What the model says is nonsense; what it costs is not:
12 layers of hidden size 768 in bfloat16 (87 million parameters, 174 MB on disk) show the same rise and plateau of
throughput over the batch as a large model does on a GPU, which is all that profiling and packing look at.

What must hold: the same seed and the same text give the same files; a finished directory is recognised by
`config.json`, which is moved into place last, so an interrupted run is never taken for a model.

Needs torch, transformers and tokenizers, which every environment that carries vLLM has (`make engine`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 2048
LAYERS = 12
HIDDEN = 768
HEADS = 12
FEED_FORWARD = 2048
POSITIONS = 2048

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def training_files(root: Path) -> list[Path]:
    """The texts the tokenizer learns from, in a fixed order: the licence, then every page of the documentation."""
    files = [root / "LICENSE", *sorted((root / "docs").rglob("*.md"))]
    return [file for file in files if file.is_file()]


def write_tokenizer(directory: Path, files: Sequence[Path]) -> int:
    """Train and save the tokenizer; return the size of its vocabulary (at most VOCABULARY, fewer for little text)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        special_tokens=["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train([str(file) for file in files], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return len(fast)


def write_weights(directory: Path, vocabulary: int, seed: int) -> int:
    """Draw and save the weights and `config.json`; return the number of parameters."""
    import torch  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    disable_progress_bar()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def make_model(target: Path, seed: int) -> str:
    """Write a complete model to `target`; return a line that says what it is.

    Raises FileNotFoundError when the repository's text is not there (the script runs from a checkout).
    """
    files = training_files(ROOT)
    if not files:
        raise FileNotFoundError(f"no text to train the tokenizer on under {ROOT}: run the script from a checkout")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as name:
        work = Path(name)
        vocabulary = write_tokenizer(work, files)
        parameters = write_weights(work, vocabulary, seed)
        for file in sorted(work.iterdir(), key=lambda path: path.name == "config.json"):
            file.chmod(0o644)  # the engine may run as another user than the one who made the model
            shutil.move(str(file), target / file.name)
    size = sum(file.stat().st_size for file in target.iterdir())
    return f"{target}: Llama, {parameters / 1e6:.1f} M parameters, vocabulary {vocabulary}, {size / 1e6:.0f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a small Llama with random weights for the engine on a CPU.")
    parser.add_argument("directory", type=Path, help="where the model goes; made when it is not there")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    parser.add_argument("--force", action="store_true", help="write it anew where a finished model lies already")
    options = parser.parse_args(arguments)
    if (options.directory / "config.json").is_file() and not options.force:
        print(f"{options.directory}: there already")
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(make_model(options.directory, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
