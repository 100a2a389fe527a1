"""The OpenAI-compatible endpoints on a paced engine.

A request becomes one choice for each prompt and `n`; a choice is a sequence in the engine. Every token of a streamed
choice is one event, put together from parts that were serialised when the request arrived. Answers carry no
log-probabilities; `stop` is ignored; a response without `ignore_eos` ends by itself after a few sentences.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..engine import Engine, Outcome, Sequence
from . import text
from .http import Connection, Request, chunk
from .metrics import Metrics

_DONE = chunk(b"data: [DONE]\n\n")
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


class InvalidRequestError(Exception):
    """A request that is answered with an error; `status` is HTTP's."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Settings:
    """What the server knows of itself."""

    model: str
    served_names: tuple[str, ...]
    max_model_len: int
    version: str
    api_keys: tuple[str, ...] = ()
    # What `/server_info` tells in vLLM's development mode; None when that is off.
    server_info: Mapping[str, Any] | None = None


class Choice:
    """One sequence's part of an answer."""

    __slots__ = ("base", "begin", "head", "index", "job", "mid", "reason", "sequence", "sorts", "tail")

    def __init__(self, job: Job, index: int, sequence: Sequence, begin: int, reason: str, *, sorts: bool) -> None:
        self.job = job
        self.index = index
        self.sequence = sequence
        self.begin = begin
        self.reason = reason
        self.sorts = sorts
        self.head, self.mid, self.tail = job.parts(index)
        self.base = len(self.head) + len(self.mid)

    def event(self, finished: bool) -> bytes:
        """Return the HTTP chunk of the newest token."""
        count = self.sequence.generated
        fragment = text.FRAGMENTS[(self.begin + count - 1) % text.COUNT]
        if finished:
            return chunk(
                b"".join((self.head, fragment, self.job.finishing(self.reason), self._usage(count), self.tail))
            )
        if self.job.continuous:
            return chunk(b"".join((self.head, fragment, self.mid, self._usage(count), self.tail)))
        return b"%x\r\n%b%b%b%b\r\n" % (
            self.base + len(fragment) + len(self.tail),
            self.head,
            fragment,
            self.mid,
            self.tail,
        )

    def _usage(self, count: int) -> bytes:
        return b',"usage":' + usage(self.sequence.prompt, count) if self.job.continuous else b""

    @property
    def response(self) -> str:
        """The whole text."""
        return text.render(self.begin, self.sequence.generated)


class Job:
    """One HTTP request for completions."""

    def __init__(self, connection: Connection, body: Mapping[str, Any], model: str, *, chat: bool) -> None:
        self.connection = connection
        self.model = model
        self.chat = chat
        self.stream = bool(body.get("stream"))
        options = body.get("stream_options") or {}
        self.include_usage = bool(options.get("include_usage"))
        self.continuous = self.include_usage and bool(options.get("continuous_usage_stats"))
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())
        self.choices: list[Choice] = []
        self.open = 0
        # Each prompt once, however many choices it has.
        self.prompt_tokens = 0
        self.write: Callable[[bytes], None] = lambda data: None

    @property
    def _envelope(self) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return (
            f'"id":"{self.id}","object":"{kind}","created":{self.created},"model":{json.dumps(self.model)},"choices":['
        )

    def parts(self, index: int) -> tuple[bytes, bytes, bytes]:
        """Return what stands before a token, between it and the usage, and at the end of an event."""
        opening = f'data: {{{self._envelope}{{"index":{index},'
        if self.chat:
            return (opening + '"delta":{"content":"').encode(), b'"},"logprobs":null,"finish_reason":null}]', b"}\n\n"
        return (opening + '"text":"').encode(), b'","logprobs":null,"finish_reason":null,"stop_reason":null}]', b"}\n\n"

    def finishing(self, reason: str) -> bytes:
        """Return what stands between the last token and the usage."""
        closing = b'"}' if self.chat else b'"'
        return b'%b,"logprobs":null,"finish_reason":"%b","stop_reason":null}]' % (closing, reason.encode())

    def begin(self) -> None:
        """Start the stream; a chat's first event names the role."""
        self.write = self.connection.begin_events()
        for choice in self.choices if self.chat else ():
            event = f'data: {{{self._envelope}{{"index":{choice.index},"delta":{{"role":"assistant","content":""}},'
            self.write(chunk((event + '"logprobs":null,"finish_reason":null}]}\n\n').encode()))

    def finish(self) -> None:
        """End the stream, or answer whole."""
        if not self.stream:
            self.connection.respond_json(200, self._whole())
            return
        if self.include_usage:
            self.write(chunk(f'data: {{{self._envelope}],"usage":'.encode() + usage(*self._counts()) + b"}\n\n"))
        self.write(_DONE)
        self.connection.end_events()

    def fail(self, message: str) -> None:
        """End with an error."""
        error = _error(message, "InternalServerError", 500)
        if self.stream:
            self.write(chunk(b"data: " + json.dumps(error).encode() + b"\n\n") + _DONE)
            self.connection.end_events()
        else:
            self.connection.respond_json(500, error)

    def _counts(self) -> tuple[int, int]:
        return self.prompt_tokens, sum(choice.sequence.generated for choice in self.choices)

    def _whole(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion" if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(choice) for choice in self.choices],
            "usage": json.loads(usage(*self._counts())),
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        content: dict[str, Any] = {"text": choice.response}
        if self.chat:
            content = {"message": {"role": "assistant", "content": choice.response.lstrip()}}
        return {
            "index": choice.index,
            **content,
            "logprobs": None,
            "finish_reason": choice.reason,
            "stop_reason": None,
        }


class Api:
    """Routes, answers, and hands tokens from the engine to their streams."""

    def __init__(self, settings: Settings, engine: Engine, metrics: Metrics) -> None:
        """`engine` is what is counted and aborted; requests go to it through `enqueue`, which its driver replaces."""
        self._settings = settings
        self._engine = engine
        self.enqueue: Callable[[Sequence], None] = engine.add
        self._metrics = metrics
        self._choices: dict[Sequence, Choice] = {}
        self._dead: str | None = None
        self._finished = asyncio.Event()

    async def idle(self) -> None:
        """Return once nothing is in flight."""
        while self._choices:
            self._finished.clear()
            await self._finished.wait()

    @property
    def sorting_rows(self) -> int:
        """Running sequences whose sampling sorts the logits."""
        return sum(choice.sorts for choice in self._choices.values() if choice.sequence.blocks)

    def handle(self, request: Request, connection: Connection) -> None:
        """Answer a request."""
        route = request.method, request.path
        if request.path.startswith("/v1") and not self._authorised(request):
            connection.respond_json(401, {"error": "Unauthorized"})
        elif route in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
            connection.respond(503 if self._dead else 200, b"")
        elif route == ("GET", "/version"):
            connection.respond_json(200, {"version": self._settings.version})
        elif route == ("GET", "/metrics"):
            connection.respond(200, self._render_metrics(), "text/plain; version=0.0.4; charset=utf-8")
        elif route == ("GET", "/v1/models"):
            connection.respond_json(200, self._models())
        elif route == ("GET", "/server_info") and self._settings.server_info is not None:
            connection.respond_json(200, {"vllm_config": self._settings.server_info})
        elif route in (("POST", "/v1/completions"), ("POST", "/v1/chat/completions")):
            self._complete(request, connection, chat=request.path.endswith("/chat/completions"))
        elif request.path in (
            "/health",
            "/version",
            "/metrics",
            "/v1/models",
            "/v1/completions",
            "/v1/chat/completions",
        ):
            connection.respond_json(405, {"detail": "Method Not Allowed"})
        else:
            connection.respond_json(404, {"detail": "Not Found"})

    def deliver(self, outcome: Outcome, now: float) -> None:
        """Hand out the tokens of a step that ended at `now`."""
        choices = self._choices
        for sequence in outcome.tokens:
            choice = choices.get(sequence)
            if choice is not None and choice.job.stream:
                choice.job.write(choice.event(sequence.generated >= sequence.output))
        if outcome.finished:
            self._finished.set()
        for sequence in outcome.finished:
            choice = choices.pop(sequence, None)
            if choice is not None:
                self._count_finished(choice, now)
                choice.job.open -= 1
                if not choice.job.open:
                    choice.job.finish()
        self._count_step(outcome, now)

    def die(self, message: str) -> None:
        """The engine is dead: fail what is in flight and answer nothing more."""
        self._dead = message
        for job in {choice.job for choice in self._choices.values()}:
            job.fail(DEAD)
        self._choices.clear()

    def _authorised(self, request: Request) -> bool:
        keys = self._settings.api_keys
        return not keys or request.headers.get("authorization") in {f"Bearer {key}" for key in keys}

    def _complete(self, request: Request, connection: Connection, *, chat: bool) -> None:
        try:
            if self._dead:
                raise InvalidRequestError(DEAD, 500)
            body = json.loads(request.body)
            if not isinstance(body, dict):
                raise InvalidRequestError("the body must be a JSON object")
            job = self._job(connection, body, chat=chat)
        except InvalidRequestError as error:
            kinds = {404: "NotFoundError", 500: "InternalServerError"}
            kind = kinds.get(error.status, "BadRequestError")
            connection.respond_json(error.status, _error(str(error), kind, error.status))
            return
        except (ValueError, TypeError, AttributeError) as error:
            connection.respond_json(400, _error(str(error), "BadRequestError", 400))
            return
        job.open = len(job.choices)
        connection.on_close = lambda: self._abandon(job)
        if job.stream:
            job.begin()
        for choice in job.choices:
            self._choices[choice.sequence] = choice
            self.enqueue(choice.sequence)

    def _job(self, connection: Connection, body: Mapping[str, Any], *, chat: bool) -> Job:
        model = body.get("model") or self._settings.served_names[0]
        if model not in self._settings.served_names:
            raise InvalidRequestError(f"The model `{model}` does not exist.", 404)
        job = Job(connection, body, model, chat=chat)
        given = body.get("seed")
        seed = given if isinstance(given, int) else 0
        sorts = float(_given(body, "top_p", 1.0)) < 1 or bool(body.get("logprobs")) or int(_given(body, "top_k", 0)) > 0
        prompts = [_chat_prompt(body)] if chat else _prompts(body)
        for prompt in prompts:
            tokens = text.count_tokens(prompt) if isinstance(prompt, str) else len(prompt)
            job.prompt_tokens += tokens
            for number in range(int(_given(body, "n", 1))):
                own = seed + number
                output, reason = self._output(body, prompt, tokens, own, chat=chat)
                sequence = Sequence(tokens, output, arrived=asyncio.get_running_loop().time())
                index = len(job.choices)
                job.choices.append(Choice(job, index, sequence, text.start(prompt, own), reason, sorts=sorts))
        if not job.choices:
            raise InvalidRequestError("nothing was asked for: no prompt, or n is 0")
        return job

    def _output(
        self, body: Mapping[str, Any], prompt: str | list[int], tokens: int, seed: int, *, chat: bool
    ) -> tuple[int, str]:
        """Return how many tokens a choice will have, and why it ends there."""
        longest = self._settings.max_model_len
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        most = int(asked) if asked is not None else (longest - tokens if chat else 16)
        if most < 1:
            raise InvalidRequestError(f"max_tokens must be at least 1, got {most}.")
        if tokens < 1:
            raise InvalidRequestError("The decoder prompt cannot be empty")
        if tokens + most > longest:
            raise InvalidRequestError(
                f"This model's maximum context length is {longest} tokens. However, you requested {most} output tokens "
                f"and your prompt contains at least {tokens} input tokens, for a total of at least {tokens + most} "
                "tokens. Please reduce the length of the input prompt or the number of requested output tokens."
            )
        least = int(_given(body, "min_tokens", 0))
        if least > most:
            raise InvalidRequestError(f"min_tokens must be less than or equal to max_tokens={most}, got {least}.")
        natural = max(least, text.natural_length(prompt, seed))
        return (most, "length") if body.get("ignore_eos") or natural >= most else (natural, "stop")

    def _abandon(self, job: Job) -> None:
        self._finished.set()
        for choice in job.choices:
            if self._choices.pop(choice.sequence, None) is not None:
                self._engine.abort(choice.sequence)
                self._metrics.success["abort"] += 1

    def _count_step(self, outcome: Outcome, now: float) -> None:
        metrics = self._metrics
        metrics.prompt_tokens += outcome.prompt_tokens
        metrics.generation_tokens += len(outcome.tokens)
        for gap, count in outcome.gaps.items():
            metrics.inter_token_latency.observe(gap, count)
        if outcome.prompt_tokens:
            for sequence in outcome.tokens:
                if sequence.generated == 1:
                    metrics.time_to_first_token.observe(now - sequence.arrived)
                    metrics.queue_time.observe(max(0.0, (sequence.admitted or now) - sequence.arrived))

    def _count_finished(self, choice: Choice, now: float) -> None:
        sequence, metrics = choice.sequence, self._metrics
        metrics.success[choice.reason] += 1
        metrics.end_to_end.observe(now - sequence.arrived)
        metrics.request_prompt_tokens.observe(sequence.prompt)
        metrics.request_generation_tokens.observe(sequence.generated)
        if sequence.generated > 1 and sequence.first_token is not None:
            metrics.time_per_output_token.observe((now - sequence.first_token) / (sequence.generated - 1))

    def _render_metrics(self) -> bytes:
        self._metrics.preemptions = self._engine.preemptions
        engine = self._engine
        return self._metrics.render(len(engine.running), len(engine.waiting), engine.cache_usage)

    def _models(self) -> dict[str, Any]:
        created = int(time.time())
        cards = [
            {
                "id": name,
                "object": "model",
                "created": created,
                "owned_by": "vllm",
                "root": self._settings.model,
                "parent": None,
                "max_model_len": self._settings.max_model_len,
            }
            for name in self._settings.served_names
        ]
        return {"object": "list", "data": cards}


def usage(prompt: int, completion: int) -> bytes:
    """Return vLLM's usage object."""
    return b'{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d}' % (prompt, prompt + completion, completion)


def _error(message: str, kind: str, code: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _given(body: Mapping[str, Any], name: str, default: float) -> Any:
    value = body.get(name)
    return default if value is None else value


def _prompts(body: Mapping[str, Any]) -> list[str | list[int]]:
    """Return the prompts of a completion: a text, token ids, or a list of either."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, int) for item in prompt):
            return [prompt]
        if all(isinstance(item, str) or (isinstance(item, list) and item) for item in prompt):
            return list(prompt)
    raise InvalidRequestError("prompt must be a string, a list of strings, token ids, or a list of token ids")


def _chat_prompt(body: Mapping[str, Any]) -> str:
    """Return a chat's messages as one text."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError("messages must be a list with at least one message")
    lines = []
    for message in messages:
        content = message.get("content") or ""
        if isinstance(content, list):
            content = " ".join(str(part.get("text", "")) for part in content)
        lines.append(f"{message.get('role', 'user')}: {content}")
    return "\n".join(lines)
