"""Simulated GPUs and engines: what the sandbox puts in the place of the one thing a developer's machine lacks.

Layers, lowest first:

- `gpu`: memory and time of one GPU, as plain values that are told the time;
- `costs`: what a step of a model costs, from published single-replica figures;
- `engine`: a vLLM engine's scheduler and cache on top of those, still without clock or I/O;
- `experiment`: a finite run of several engines on one GPU in virtual time;
- `device`: the server that holds a sandbox's GPUs in real time, and `client`, how processes reach it;
- `images/simulated`: what the simulated engine image carries (a `vllm`, `pynvml`, and the nvidia tools).

Everything here needs the standard library only and imports its neighbours relatively: the engine image loads this
folder under a name of its own, since `tightship` there is what the init container injected, and nothing else.
"""
