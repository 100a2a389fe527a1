"""`python -m chaos --seed N --events N --plane real|embedded`: the long run; `make chaos` calls it. Exit status: 1 after a violation."""

from __future__ import annotations

import argparse
import random
import statistics
import sys

from chaos.runner import ChaosError, Run
from chaos.world import default_plane, world


def main() -> int:
    """Run and report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="default: a new one, which is printed")
    parser.add_argument("--events", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--plane", choices=("real", "embedded"), default=default_plane(), help="default: %(default)s")
    parser.add_argument("--state", help="directory of the sandbox, kept with its logs; default: a temporary one")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}, {options.events} events, {options.plane} plane", flush=True)
    with world(options.plane, state=options.state) as made:
        run = Run(made, seed, options.events, say=lambda text: print(text, flush=True))
        try:
            run.run()
        except ChaosError as error:
            print(error, file=sys.stderr)
            return 1
    settling = statistics.quantiles(run.settle_seconds, n=10)
    print(
        f"{run.happened} events and {run.tracker.starts} engine starts without a violation; "
        f"settled in {statistics.median(run.settle_seconds):.1f} s (median), {settling[-1]:.1f} s (p90), "
        f"{max(run.settle_seconds):.1f} s at most"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
