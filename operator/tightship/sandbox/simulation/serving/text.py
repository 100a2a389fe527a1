"""Text for completions: plain sentences, cut into tokens, so that an answer reads as one and no time goes into making it.

A response is a walk through a fixed ring of sentences from a start its request picks; a token is a word or a sign, with
the space before it. Every token's JSON string is made once.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence

_SENTENCES = """
A small model leaves most of a large accelerator idle, because each step waits for memory and not for arithmetic.
When more requests share a step, every weight that is read serves more of them, and throughput rises almost for free.
Past a certain batch that gain fades, while the memory that each further request takes stays the same.
The room that is left can hold a second copy of the model, which works while the first one waits for its host.
Two copies queue for the same memory, so each of them becomes a little slower, and both together do more.
Whether that is worth it depends on the latency that somebody has promised to somebody else.
It is therefore wise to measure first, to change one thing at a time, and to write down what was seen.
Good numbers come with the conditions under which they were taken, and with the doubt that remains.
A queue in front of a busy server grows slowly at first and then all at once.
Nobody minds a short wait that is announced, and everybody minds a long one that is not.
The harbour was quiet in the morning, and the crew counted the crates before they went on board.
What is packed well needs no rope, and what is packed badly will find the one loose plank.
They sailed when the wind turned, with every hold full and the deck clear.
By evening the lamps along the shore had become a thin bright line behind them.
"""

_PIECES = re.compile(r"\w+|[^\w\s]")
_MEAN_SENTENCES = 4


def count_tokens(text: str) -> int:
    """Return how many tokens a text has for the simulation: its words and signs, and one for its beginning."""
    return 1 + len(_PIECES.findall(text))


def _tokens() -> tuple[list[str], list[int]]:
    tokens: list[str] = []
    starts: list[int] = []
    for sentence in _SENTENCES.strip().splitlines():
        starts.append(len(tokens))
        tokens += [piece if piece in ",." else f" {piece}" for piece in _PIECES.findall(sentence)]
    return tokens, starts


TOKENS, _STARTS = _tokens()
# The same tokens as the inside of a JSON string, ready to be joined into a chunk.
FRAGMENTS = [json.dumps(token)[1:-1].encode() for token in TOKENS]
COUNT = len(TOKENS)


def start(prompt: str | Sequence[int], seed: int) -> int:
    """Return where in the ring the response to a prompt begins: at a sentence, always the same one."""
    return _STARTS[_hash(prompt, seed) % len(_STARTS)]


def natural_length(prompt: str | Sequence[int], seed: int) -> int:
    """Return after how many tokens the response to a prompt ends by itself: at the end of a sentence."""
    first = _STARTS.index(start(prompt, seed))
    number = 1 + _hash(prompt, seed + 1) % (2 * _MEAN_SENTENCES - 1)
    ends = [*_STARTS[1:], COUNT]
    lengths = [end - begin for begin, end in zip(_STARTS, ends, strict=True)]
    return sum(lengths[(first + step) % len(lengths)] for step in range(number))


def render(begin: int, count: int) -> str:
    """Return `count` tokens of the ring from `begin` as text."""
    return "".join(TOKENS[(begin + step) % COUNT] for step in range(count))


def _hash(prompt: str | Sequence[int], seed: int) -> int:
    data = prompt if isinstance(prompt, str) else ",".join(map(str, prompt))
    return zlib.crc32(f"{seed}:{data}".encode())
