"""The OpenAI-compatible server's entry point, as in vLLM."""

import sys

from tightship_simulation.serving.main import main  # type: ignore[import-not-found]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
