"""The simulated vLLM's server: vLLM's command line, start, endpoints and metrics on a simulated engine and GPU.

- `arguments`: vLLM's options, read as its parser does;
- `models`: from `--model` to a shape and costs, or vLLM's error;
- `startup`: memory, phase by phase, with vLLM's own messages when it doesn't suffice;
- `channel`: the connections to the device server and the MPS daemon;
- `pacer`: drives the engine in real time;
- `http`, `api`, `text`, `metrics`: what clients see.

Timings are those of the published engine (vLLM 0.6): prefills interrupt decoding unless `--enable-chunked-prefill` is given.
"""
