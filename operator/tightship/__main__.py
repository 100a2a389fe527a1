"""Composition root and command line (`tightship --help`)."""


def main() -> int:
    """Run the command line; returns the exit status."""
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
