"""``python -m tightship.sandbox.plane``: serves a plane until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys

from tightship.sandbox.plane.plane import Plane


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tightship.sandbox.plane", description=__doc__)
    parser.add_argument("--bind", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=6443, help="port to listen on; 0 picks a free one")
    parser.add_argument("--unix-socket", help="also listen on this path")
    parser.add_argument("--service-cidr", default="10.96.0.0/16", help="where cluster IPs come from")
    parser.add_argument("--kubeconfig", help="write a kubeconfig for an administrator here")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the controllers do")
    return parser.parse_args(argv)


async def serve(options: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT."""
    plane = Plane(options.bind, options.port, options.unix_socket, options.service_cidr)
    await plane.start()
    if options.kubeconfig:
        with open(options.kubeconfig, "w", encoding="utf-8") as file:
            file.write(plane.kubeconfig())
    print(f"serving on {plane.url}", flush=True)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()
    await plane.stop()


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _arguments(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING)
    asyncio.run(serve(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
