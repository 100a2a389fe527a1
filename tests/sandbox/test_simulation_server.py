"""The simulated vLLM as clients, operators and profilers meet it."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from simulation_helpers import Machine, Process, machine, mean_itl, wait_for
from tightship.sandbox.simulation.costs import MODELS
from tightship.sandbox.simulation.device import DRIVER_SHARE
from tightship.sandbox.simulation.engine import Engine, Scheduling
from tightship.sandbox.simulation.experiment import run, sharegpt_lengths
from tightship.sandbox.simulation.gpu import Gpu, Memory
from tightship.sandbox.simulation.serving.arguments import parse, size

RESERVED = 80 * 2**30 // DRIVER_SHARE
MODEL = "facebook/opt-1.3b"
PACKABLE = ("--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", "16G", "--max-num-batched-tokens", "2048")
BATCH = 32


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with machine(tmp_path_factory.mktemp("server")) as one:
        yield one


@pytest.fixture(scope="module")
def engine(host: Machine) -> Process:
    one = host.engine(
        *PACKABLE,
        *("--max-num-seqs", str(BATCH), "--served-model-name", MODEL, "opt", "--no-enable-prefix-caching"),
        VLLM_SERVER_DEV_MODE="1",
    )
    wait_for("the engine is healthy", one.healthy)
    return one


def events(engine: Process, path: str, body: dict[str, object]) -> list[dict[str, object]]:
    """Stream a request; return its events, without the last one that says it is done."""
    with httpx.Client(base_url=f"http://127.0.0.1:{engine.port}") as client:
        response = client.post(path, json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    assert data.pop() == "[DONE]"
    return [json.loads(line) for line in data]


def refused(engine: Process, path: str, body: object) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as failure:
        engine.post(path, body)
    return failure.value.code, json.loads(failure.value.read())["error"]["message"]


def test_the_small_endpoints(engine: Process) -> None:
    assert engine.get("/health") == engine.get("/ping") == ""
    assert json.loads(engine.get("/version"))["version"].startswith("0.33.0")
    models = json.loads(engine.get("/v1/models"))["data"]
    assert [(card["id"], card["root"], card["max_model_len"]) for card in models] == [
        (MODEL, MODEL, 2048),
        ("opt", MODEL, 2048),
    ]
    config = json.loads(engine.get("/server_info?config_format=json"))["vllm_config"]
    assert config["scheduler_config"] == {"max_num_seqs": BATCH, "max_num_batched_tokens": 2048}
    assert config["compilation_config"]["cudagraph_capture_sizes"] == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        engine.get("/v2/models")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        engine.get("/v1/completions")


def test_a_chat_is_answered_with_sentences(engine: Process) -> None:
    body = {"model": "opt", "messages": [{"role": "user", "content": "How do I pack a ship?"}]}
    answer = engine.post("/v1/chat/completions", body)
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert re.fullmatch(r"[A-Z][\w ,.]+\.", choice["message"]["content"])
    assert answer["usage"]["completion_tokens"] > 10
    assert engine.post("/v1/chat/completions", body)["choices"][0]["message"] == choice["message"]


def test_a_chat_streams_the_same_text(engine: Process) -> None:
    body = {
        "model": "opt",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        "max_tokens": 9,
    }
    whole = engine.post("/v1/chat/completions", body)
    parts = events(engine, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}  # type: ignore[index]
    *chunks, last = parts
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)  # type: ignore[index]
    assert text.lstrip() == whole["choices"][0]["message"]["content"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {part["id"] for part in parts} == {parts[0]["id"]}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "length"]  # type: ignore[index]


def test_lengths_are_exact_and_counted_in_every_chunk(engine: Process) -> None:
    body = {
        "model": MODEL,
        "prompt": list(range(100, 150)),
        "max_tokens": 40,
        "min_tokens": 40,
        "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    *chunks, last = events(engine, "/v1/completions", body)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]  # type: ignore[index]
    assert counts == list(range(1, 41))
    assert last["usage"] == {"prompt_tokens": 50, "total_tokens": 90, "completion_tokens": 40}


def test_several_prompts_and_choices_are_several_choices(engine: Process) -> None:
    answer = engine.post("/v1/completions", {"prompt": ["one two", "three"], "n": 2, "max_tokens": 3})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"] == {"prompt_tokens": 3 + 2, "total_tokens": 17, "completion_tokens": 12}


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/completions", {"model": "gpt-9", "prompt": "a"}, 404, "The model `gpt-9` does not exist."),
        ("/v1/completions", {"prompt": [5] * 2000, "max_tokens": 49}, 400, "maximum context length is 2048 tokens"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens must be at least 1"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 2, "min_tokens": 3}, 400, "min_tokens must be less"),
        ("/v1/completions", {"prompt": {}}, 400, "prompt must be"),
        ("/v1/completions", b"{", 400, "Expecting"),
        ("/v1/completions", [], 400, "must be a JSON object"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages must be"),
        ("/v1/chat/completions", {"messages": ["hi"]}, 400, "get"),
    ],
)
def test_bad_requests_are_refused(engine: Process, path: str, body: object, status: int, says: str) -> None:
    code, message = refused(engine, path, body)
    assert code == status
    assert says in message


def test_metrics_have_the_names_and_labels_of_vllm(engine: Process) -> None:
    engine.post("/v1/completions", {"prompt": [1] * 20, "max_tokens": 5, "ignore_eos": True})
    families = {family.name: family for family in text_string_to_metric_families(engine.get("/metrics"))}
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    counters = ("num_preemptions", "prompt_tokens", "generation_tokens", "request_success")
    histograms = (
        *("inter_token_latency_seconds", "request_time_per_output_token_seconds", "time_to_first_token_seconds"),
        *("e2e_request_latency_seconds", "request_prompt_tokens", "request_generation_tokens"),
    )
    for names, kind in ((gauges, "gauge"), (counters, "counter"), (histograms, "histogram")):
        for name in names:
            family = families[f"vllm:{name}"]
            assert family.type == kind
            for sample in family.samples:
                assert (sample.labels["model_name"], sample.labels["engine"]) == (MODEL, "0")
    assert families["vllm:generation_tokens"].samples[0].name == "vllm:generation_tokens_total"
    (info,) = families["vllm:cache_config_info"].samples
    blocks, block_size = int(info.labels["num_gpu_blocks"]), int(info.labels["block_size"])
    assert blocks == 16 * 2**30 // (block_size * MODELS["opt-1.3b"].kv_bytes_per_token)
    assert int(info.labels["kv_cache_size_tokens"]) == blocks * block_size
    assert info.labels["gpu_memory_utilization"] == "0.3"


def test_a_client_that_leaves_frees_its_place(engine: Process) -> None:
    def running() -> float:
        families = text_string_to_metric_families(engine.get("/metrics"))
        return next(family.samples[0].value for family in families if family.name == "vllm:num_requests_running")

    body = {"prompt": [1] * 10, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=f"http://127.0.0.1:{engine.port}") as client:
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert running() == 1
        wait_for("the request is gone", lambda: running() == 0)


def test_two_engines_over_http_are_as_fast_as_in_virtual_time(host: Machine, engine: Process) -> None:
    """The same finite run, alone and packed, in real time behind HTTP and in process."""
    other = host.engine(*PACKABLE, "--max-num-seqs", str(BATCH))
    wait_for("the second engine is healthy", other.healthy)
    for ports, requests in (((engine.port,), 120), ((engine.port, other.port), 160)):
        lengths = sharegpt_lengths(requests, seed=1)
        shares = [lengths[number :: len(ports)] for number in range(len(ports))]
        virtual = []
        for seed in range(3):
            scheduling = Scheduling(BATCH, 2048, 2048, 5000)
            loads = [(Engine(scheduling, MODELS["opt-1.3b"].costs), share) for share in shares]
            virtual.append(run(Gpu("GPU-1", "H100", Memory(0), seed=seed), loads).mean_itl)
        real = asyncio.run(mean_itl([(port, BATCH, share) for port, share in zip(ports, shares, strict=True)]))
        assert real == pytest.approx(sum(virtual) / 3, rel=0.10), f"{len(ports)} engines"


def ended(process: Process, status: int = 1) -> str:
    assert process.wait() == status, process.output
    return process.output


def test_an_engine_that_wants_more_than_is_free_fails_with_the_message_of_vllm(host: Machine, engine: Process) -> None:
    output = ended(host.engine("--gpu-memory-utilization", "0.9"))
    assert re.search(
        r"ValueError: Free memory on device cuda:0 \(\d+\.\d\d/80\.00 GiB\) on startup is less than desired GPU memory "
        r"utilization \(0\.9, 72\.00 GiB\)\. Decrease GPU memory utilization or reduce GPU memory used by other processes\.",
        output,
    )


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--colour",), 2, "api_server.py: error: unrecognized arguments: --colour"),
        (("--max-num-seqs", "many"), 2, "argument --max-num-seqs: invalid int value: 'many'"),
        (
            ("--model", "facebook/opt-9b"),
            1,
            "OSError: facebook/opt-9b is not a local folder and is not a valid model identifier",
        ),
        (("--model", "/models/nothing"), 1, "Invalid repository ID or local directory specified: '/models/nothing'"),
        (
            ("--max-model-len", "9999"),
            1,
            "User-specified max_model_len (9999) is greater than the derived max_model_len",
        ),
        (("--gpu-memory-utilization", "0.05"), 1, "No available memory for the cache blocks"),
        (
            ("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", "100M"),
            1,
            "To serve at least one request with the model's max seq len (2048), (0.38 GiB KV cache is needed",
        ),
        (
            ("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", "79G"),
            1,
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
    ],
)
def test_what_vllm_refuses_is_refused(host: Machine, arguments: tuple[str, ...], status: int, says: str) -> None:
    assert says in ended(host.engine(*arguments), status)


def test_a_gpu_too_small_for_the_weights_runs_out_of_memory(tmp_path: Path) -> None:
    with machine(tmp_path, memory="8Gi") as small:
        output = ended(small.engine("--model", "meta-llama/Llama-2-7b-hf"))
    assert (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 12.55 GiB. GPU 0 has a total capacity of 8.00"
        in output
    )
    assert "Engine core initialization failed. See root cause above." in output


def test_without_a_gpu_there_is_no_device(host: Machine) -> None:
    assert "Failed to infer device type" in ended(host.engine(NVIDIA_VISIBLE_DEVICES="void"))


def test_a_local_directory_is_a_model(host: Machine, tmp_path: Path) -> None:
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
        "vocab_size": 8000,
        "max_position_embeddings": 1024,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    small = ("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", "1G")
    one = host.engine("--model", str(tmp_path), *small)
    wait_for("the engine is healthy", one.healthy)
    assert json.loads(one.get("/v1/models"))["data"][0]["max_model_len"] == 1024
    assert one.post("/v1/completions", {"prompt": "hi", "max_tokens": 4})["usage"]["completion_tokens"] == 4
    one.popen.kill()


def test_sigterm_ends_it_well_and_a_shutdown_timeout_lets_it_finish(tmp_path: Path) -> None:
    with machine(tmp_path) as own:
        one = own.engine(*PACKABLE, "--shutdown-timeout", "20")
        wait_for("the engine is healthy", one.healthy)
        body = {"prompt": [1] * 10, "max_tokens": 150, "ignore_eos": True, "stream": True}
        with (
            httpx.Client(base_url=f"http://127.0.0.1:{one.port}") as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            one.popen.send_signal(signal.SIGTERM)
            assert sum('"text"' in line for line in lines) == 149
        assert "Application shutdown complete" in ended(one, 0)
        wait_for("the memory is back", lambda: own.gpu()["used"] == RESERVED)


def test_a_dead_engine_says_so_until_its_process_ends(tmp_path: Path) -> None:
    with machine(tmp_path) as own:
        one = own.engine(*PACKABLE)
        wait_for("the engine is healthy", one.healthy)
        body = {"prompt": [1] * 10, "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with (
            httpx.Client(base_url=f"http://127.0.0.1:{one.port}") as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            own.control("lose")
            assert "EngineCore encountered an issue" in "".join(lines)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            one.get("/health")
        assert "CUDA error: GPU is lost" in ended(one)


def test_sampling_that_sorts_takes_memory_that_no_step_took_before(tmp_path: Path) -> None:
    """Rows with top_p grow the engine; where a neighbour has left no room, that kills it as on hardware."""
    body = {"prompt": ["a b c"] * 64, "max_tokens": 3}
    with machine(tmp_path) as own:
        one = own.engine(*PACKABLE[:4], "--max-num-seqs", "64", "--max-num-batched-tokens", "256")
        wait_for("the engine is healthy", one.healthy)
        one.post("/v1/completions", body)
        before = own.gpu()["used"]
        one.post("/v1/completions", {**body, "top_p": 0.9})
        assert own.gpu()["used"] > before
        one.post("/v1/completions", {**body, "top_p": 0.9})
        two = own.engine(*PACKABLE[:4], "--max-num-seqs", "64", "--max-num-batched-tokens", "256")
        wait_for("the second engine is healthy", two.healthy)
        with own.device() as hog:
            free = hog.request("open", uuid=own.uuid)["free"]
            hog.request("alloc", bytes=free)
            with pytest.raises(urllib.error.HTTPError, match="500"):
                two.post("/v1/completions", {**body, "top_p": 0.9})
            assert "torch.OutOfMemoryError: CUDA out of memory" in ended(two)
        assert one.healthy()


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--max_num_seqs=8"], "max_num_seqs", 8),
        (["--max-model-len", "1k"], "max_model_len", 1000),
        (["--kv-cache-memory-bytes", "2G"], "kv_cache_memory_bytes", 2**31),
        (["--cudagraph-capture-sizes", "8", "1"], "capture_sizes", (8, 1)),
        (["--compilation-config", '{"cudagraph_capture_sizes": [4]}'], "capture_sizes", (4,)),
        (["-cc.mode=3", "-O2"], "capture_sizes", None),
        (["--no-enable-prefix-caching"], "prefix_caching", False),
        (["--enable-chunked-prefill"], "chunked_prefill", True),
        (["--max-num-se", "3"], "max_num_seqs", 3),
        (["--api-key", "a", "b"], "api_key", ("a", "b")),
        (["--trust-remote-code", "--dtype", "float16"], "dtype", "float16"),
    ],
)
def test_arguments_are_read_as_vllm_reads_them(arguments: list[str], name: str, value: object) -> None:
    assert getattr(parse(["--model", MODEL, *arguments]), name) == value


def test_defaults_depend_on_the_gpu_as_in_vllm() -> None:
    options = parse(["--model", MODEL])
    large, small = 80 * 2**30, 40 * 2**30
    assert (options.sequences(large), options.token_budget(large)) == (1024, 8192)
    assert (options.sequences(small), options.token_budget(small)) == (256, 2048)
    assert options.graph_sizes(1024)[-1] == 512
    assert options.graph_sizes(8) == (1, 2, 4, 8, 16)
    assert parse(["--model", MODEL, "--enforce-eager"]).graph_sizes(8) == ()


@pytest.mark.parametrize(("text", "value"), [("12", 12), ("1.5k", 1500), ("2K", 2048), ("1t", 10**12)])
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "1.5", "1.5K", "k", "1x"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="no size"):
        size(text)
