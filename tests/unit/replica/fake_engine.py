"""A program in vLLM's place: /health after a while, /metrics from a file, and whatever end a test asks for."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--gpu-memory-utilization", default=None)
    parser.add_argument("--kv-cache-memory-bytes", default=None)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--healthy-after", type=float, default=0)
    parser.add_argument("--in-flight", type=Path)
    parser.add_argument("--hung", action="store_true", help="no step ever ends; else one does between two looks")
    parser.add_argument("--fail", default=None)
    parser.add_argument("--deaf", action="store_true")
    parser.add_argument("--child", action="store_true")
    args = parser.parse_args()

    def note(event: str, **more: object) -> None:
        with args.journal.open("a") as journal:
            journal.write(json.dumps({"event": event, "pid": os.getpid(), "at": time.monotonic(), **more}) + "\n")

    environ = os.environ
    bind, space = environ.get("VLLM_CPU_OMP_THREADS_BIND"), environ.get("VLLM_CPU_KVCACHE_SPACE")
    note("start", share=args.gpu_memory_utilization, bind=bind, space=space)
    if args.child:
        note("child", child=subprocess.Popen(["sleep", "300"]).pid)
    if args.fail:
        print("(EngineCore pid=7) WARNING 01-01 utils.py: OSError: too many open files", flush=True)
        print("ValueError: Free memory on device (3/80 GiB) is less than desired", flush=True)
        print("Traceback of something else", file=sys.stderr, flush=True)
        if args.fail == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(int(args.fail))

    def on_term(number: int, frame: object) -> None:
        note("term")
        if not args.deaf:
            os._exit(0)

    signal.signal(signal.SIGTERM, on_term)
    signal.signal(signal.SIGUSR1, lambda number, frame: note("usr1"))
    steps = 0
    ready_at = time.monotonic() + args.healthy_after

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal steps
            steps += not args.hung
            ready = time.monotonic() >= ready_at
            if self.path == "/health" and ready:
                note("healthy")
            count = args.in_flight.read_text() if args.in_flight else "0"
            body = (
                f'vllm:num_requests_running{{engine="0",model_name="m"}} {count}\n'
                'vllm:num_requests_waiting{engine="0",model_name="m"} 0.0\n'
                f'vllm:generation_tokens_total{{engine="0",model_name="m"}} {1200 + steps}.0\n'
                'vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 7.0\n'
            ).encode()
            self.send_response(200 if ready else 503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *values: object) -> None:
            pass

    ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


main()
