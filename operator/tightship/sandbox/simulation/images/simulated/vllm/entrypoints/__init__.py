"""Entry points, as in vLLM."""
