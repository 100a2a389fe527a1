"""The profiler's ports in virtual time, on the simulation's own layers: a whole profile at full size within seconds.

- `clock`: an event loop whose seconds pass at once, and the profiler's clock on it;
- `disturbance`: what a machine does to an engine: noise of its speed, and faults;
- `engine`: engines that share one simulated GPU, each behind the profiler's `Engine` and `Channel`;
- `launcher`: the profiler's `Launcher` and `Device` on one simulated GPU, memory accounted as vLLM takes it at its start;
- `sharing`: the profiler's `Sharing` on such a GPU;
- `settings`: models, GPUs and workloads as published, and three kinds of packing;
- `reference`: the published procedure, an engine's start for every batch and 2,000 prompts each, in the same simulation;
- `profile`: the profiler from beginning to end on one of those settings;
- `agreement`: the two held against each other: what they choose, what they measure, what they cost.

Nothing here models anything: memory, costs and scheduling are `sandbox.simulation`'s, as are vLLM's command line and messages.
What must hold: virtual time only, so the same inputs give the same result on any machine, however busy; engines that wait for
the GPU get it in the order in which they became ready.
"""
