"""The commands that need no cluster, one module each: `add_parser(subparsers)` fills in its options, `run(args)` does it."""
