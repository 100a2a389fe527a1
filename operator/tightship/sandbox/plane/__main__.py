"""``python -m tightship.sandbox.plane``: serves a plane until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path

from tightship.sandbox.plane.plane import Plane, Timing


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tightship.sandbox.plane", description=__doc__)
    parser.add_argument("--bind", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=6443, help="port to listen on; 0 picks a free one")
    parser.add_argument("--unix-socket", help="also listen on this path")
    parser.add_argument("--service-cidr", default="10.96.0.0/16", help="where cluster IPs come from")
    parser.add_argument("--tls-cert", help="PEM certificate: speak https on the port")
    parser.add_argument("--tls-key", help="PEM key of --tls-cert")
    parser.add_argument("--ca-cert", help="PEM certificate that clients trust")
    parser.add_argument(
        "--node-grace", type=float, default=Timing.node_grace, help="seconds until a silent node is lost"
    )
    parser.add_argument(
        "--eviction", type=float, help="seconds that pods stay on a lost node (default: their tolerations)"
    )
    parser.add_argument(
        "--job-backoff", type=float, default=Timing.job_backoff, help="seconds before a Job's first retry"
    )
    parser.add_argument("--kubeconfig", help="write a kubeconfig for an administrator here")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the controllers do")
    return parser.parse_args(argv)


async def serve(options: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT."""

    def ready(plane: Plane) -> None:
        if options.kubeconfig:
            Path(options.kubeconfig).write_text(plane.kubeconfig(), encoding="utf-8")

    plane = Plane(
        options.bind,
        options.port,
        options.unix_socket,
        options.service_cidr,
        tls_cert=options.tls_cert,
        tls_key=options.tls_key,
        ca_cert=options.ca_cert,
        timing=Timing(options.node_grace, options.eviction, options.job_backoff),
    )
    await plane.start()
    ready(plane)
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
