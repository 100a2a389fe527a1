"""A simulated vLLM: what the sandbox's engine image has in the place of the real one."""

__version__ = "0.33.0+simulated"
