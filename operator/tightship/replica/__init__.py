"""The parent of vLLM in a replica pod.

    python3 -m tightship.replica -- python3 -m vllm.entrypoints.openai.api_server ...

It makes replicas safe to put on one GPU. What must always hold:

- at most one engine of a pack is between its start and its first healthy answer (`start.lock`);
- no engine runs on a GPU that its pack no longer holds (`holder.lock`);
- an engine starts only when the driver shows it the pack's GPU, with MPS where the pack has it, and enough free memory;
- in-flight requests get their time before the engine is told to stop, and SIGKILL comes last;
- whatever ends the pod is in its termination message: `Reason: words with numbers`.

Standard library only: it runs in the user's engine image.
"""
