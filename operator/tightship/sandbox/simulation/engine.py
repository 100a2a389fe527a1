"""A vLLM engine without clock or I/O: scheduler, KV-cache blocks, and what each step costs.

`Engine.plan` decides the next step from what is waiting and running, and says what it costs on the host and on the GPU;
whoever drives the engine lets that time pass, in virtual or in real time, and calls `Engine.complete` with the moment the
step ended. One plan is outstanding at a time.

Scheduling follows vLLM: continuous batching up to `max_num_seqs`, a token budget per step, blocks of KV cache taken as
contexts grow, and preemption by recomputation of the youngest request when none is left. A prefill interrupts decoding
(the published figures were measured that way) or, with `chunked_prefill`, shares steps with it. There is no prefix cache.

Invariants: blocks in use never exceed the cache; at most `max_num_seqs` requests run; a request gets exactly `output`
tokens; a step has at most `max_num_batched_tokens` tokens, except that decoding is never starved by the budget.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from .costs import Cost, CostModel

# Share of the cache kept free when a request is admitted, so that the running ones can grow for a while.
WATERMARK = 0.01


@dataclass(frozen=True)
class Scheduling:
    """An engine's settings, under vLLM's names. Sizes in tokens, `num_blocks` in blocks of `block_size` tokens."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_blocks: int
    block_size: int = 16
    chunked_prefill: bool = False


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside an engine. Token counts; times in seconds of the driver's clock."""

    prompt: int
    output: int
    arrived: float = 0.0
    generated: int = 0
    # Tokens whose keys and values are in the cache, and how many of them there must be before decoding can go on.
    computed: int = 0
    target: int = 0
    blocks: int = 0
    admitted: float | None = None
    first_token: float | None = None
    last_token: float = 0.0
    preemptions: int = 0
    aborted: bool = False

    @property
    def finished(self) -> bool:
        """Whether all its tokens are generated."""
        return self.generated >= self.output


@dataclass(frozen=True)
class Step:
    """One step: requests with the number of their prompt tokens to compute, requests that decode one token, the cost."""

    prefills: list[tuple[Sequence, int]]
    decodes: list[Sequence]
    cost: Cost


@dataclass(frozen=True)
class Outcome:
    """What a step brought: who got a token, who finished with it, and the gaps between tokens in seconds, counted.

    `prompt_tokens` are counted as vLLM counts them: a prompt as a whole with its first token, however many steps computed it, and
    what is computed again after a preemption not at all.
    """

    tokens: list[Sequence]
    finished: list[Sequence]
    gaps: dict[float, int]
    prompt_tokens: int


@dataclass
class Engine:
    """The engine's state; see the module's docstring."""

    scheduling: Scheduling
    costs: CostModel
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    preemptions: int = 0
    peak_blocks: int = 0

    def __post_init__(self) -> None:
        self._free = self.scheduling.num_blocks

    @property
    def blocks_used(self) -> int:
        """Blocks of KV cache in use."""
        return self.scheduling.num_blocks - self._free

    @property
    def cache_usage(self) -> float:
        """Share of the KV cache in use, 0 to 1."""
        return self.blocks_used / self.scheduling.num_blocks

    def add(self, sequence: Sequence) -> None:
        """Queue a request.

        Raises:
            ValueError: it has no prompt, asks for no output, or doesn't fit the model's context length.
        """
        longest = self.scheduling.max_model_len
        if sequence.prompt < 1 or sequence.output < 1:
            raise ValueError(f"a request needs a token in and out, not {sequence.prompt} and {sequence.output}")
        if sequence.prompt + sequence.output > longest:
            raise ValueError(f"{sequence.prompt} tokens in and {sequence.output} out exceed max_model_len {longest}")
        sequence.target = sequence.prompt
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Drop a request; what a step under way computes for it is thrown away."""
        sequence.aborted = True
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def plan(self, now: float = 0.0) -> Step | None:
        """Decide the next step, or None when there is nothing to do."""
        if self.scheduling.chunked_prefill:
            return self._plan_mixed(now)
        prefills = self._schedule_prefills(self.scheduling.max_num_batched_tokens, now)
        if prefills:
            tokens = sum(count for _, count in prefills)
            return Step(prefills, [], self.costs.prefill(tokens, len(self.running)))
        decodes = self._schedule_decodes()
        return Step([], decodes, self._decode_cost(decodes)) if decodes else None

    def complete(self, step: Step, now: float) -> Outcome:
        """Account for a step that ended at `now`."""
        tokens: list[Sequence] = []
        finished: list[Sequence] = []
        gaps: dict[float, int] = {}
        prompt_tokens = 0
        for sequence, count in step.prefills:
            if not sequence.aborted:
                sequence.computed += count
                if sequence.computed == sequence.target:
                    tokens.append(sequence)
        for sequence in step.decodes:
            if not sequence.aborted:
                sequence.computed += 1
                tokens.append(sequence)
        for sequence in tokens:
            sequence.generated += 1
            if sequence.first_token is None:
                sequence.first_token = now
                prompt_tokens += sequence.prompt
            else:
                gap = now - sequence.last_token
                gaps[gap] = gaps.get(gap, 0) + 1
            sequence.last_token = now
            if sequence.generated >= sequence.output:
                finished.append(sequence)
        if finished:
            for sequence in finished:
                self._release(sequence)
            self.running = [sequence for sequence in self.running if not sequence.finished]
        return Outcome(tokens, finished, gaps, prompt_tokens)

    def _plan_mixed(self, now: float) -> Step | None:
        decodes = self._schedule_decodes()
        prefills = self._schedule_prefills(self.scheduling.max_num_batched_tokens - len(decodes), now)
        if not prefills:
            return Step([], decodes, self._decode_cost(decodes)) if decodes else None
        tokens = sum(count for _, count in prefills)
        if not decodes:
            return Step(prefills, [], self.costs.prefill(tokens, len(self.running)))
        return Step(prefills, decodes, self._decode_cost(decodes).plus_prefill(self.costs.prefill_token * tokens))

    def _decode_cost(self, decodes: list[Sequence]) -> Cost:
        return self.costs.decode(len(decodes), sum(sequence.computed for sequence in decodes))

    def _schedule_prefills(self, budget: int, now: float) -> list[tuple[Sequence, int]]:
        """Go on with prompts under way, then admit waiting requests, oldest first, within the token budget."""
        prefills: list[tuple[Sequence, int]] = []
        for sequence in self.running:
            if sequence.computed < sequence.target and budget > 0:
                count = min(budget, sequence.target - sequence.computed)
                prefills.append((sequence, count))
                budget -= count
        while self.waiting and budget > 0 and len(self.running) < self.scheduling.max_num_seqs:
            sequence = self.waiting[0]
            # A prompt is cut only where it must be: in mixed steps, or when it exceeds a whole step.
            whole = min(sequence.target, self.scheduling.max_num_batched_tokens)
            if (not self.scheduling.chunked_prefill and whole > budget) or not self._admit(sequence):
                break
            self.waiting.popleft()
            if sequence.admitted is None:
                sequence.admitted = now
            self.running.append(sequence)
            count = min(budget, sequence.target)
            prefills.append((sequence, count))
            budget -= count
        return prefills

    def _admit(self, sequence: Sequence) -> bool:
        """Take the blocks of a request's whole prompt, if that leaves the watermark (nobody running: if it fits)."""
        need = -(-(sequence.target + 1) // self.scheduling.block_size)
        keep = int(self.scheduling.num_blocks * WATERMARK) if self.running else 0
        if need + keep > self._free:
            return False
        self._take(sequence, need)
        return True

    def _schedule_decodes(self) -> list[Sequence]:
        """Return who decodes next, each with a block for its next token; the youngest give way when blocks run out."""
        size = self.scheduling.block_size
        decodes: list[Sequence] = []
        preempted = 0
        for sequence in list(self.running):
            if sequence.computed < sequence.target or not sequence.blocks:
                continue
            if sequence.computed >= sequence.blocks * size:
                while not self._free and self.running[-1] is not sequence:
                    preempted += self._preempt()
                if not self._free:
                    self._preempt()
                    break
                self._take(sequence, 1)
            decodes.append(sequence)
        return [sequence for sequence in decodes if sequence.blocks] if preempted else decodes

    def _preempt(self) -> int:
        """Put the youngest running request back to the front of the queue; it computes its whole context again."""
        sequence = self.running.pop()
        self._release(sequence)
        sequence.target = sequence.prompt + sequence.generated
        sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)
        return 1

    def _take(self, sequence: Sequence, count: int) -> None:
        sequence.blocks += count
        self._free -= count
        self.peak_blocks = max(self.peak_blocks, self.blocks_used)

    def _release(self, sequence: Sequence) -> None:
        self._free += sequence.blocks
        sequence.blocks = 0
