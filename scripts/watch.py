"""Runs on a page, while they train or afterwards: `facet watch runs/first`."""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import re
import sys
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from core.cli.errors import CommandParser, UserError, reports_errors
from core.cli.files import atomic_path
from core.cli.text import from_here
from core.data.decode import reason_of
from eval.page.run_page import RunFacts, grids_of, parts_of, render_runs
from scripts.watched import WatchedRun

PORT = 8686
EMBEDDED = 40  # grids of a run in a page that holds them itself, about 0.2 MB each
PICTURE = re.compile(r"/([0-9]{1,4})/([0-9]{1,15})\.png")
LOCAL = ("127.0.0.1", "localhost", "::1")
EPILOG = """
The page shows sample grids over time, curves, scores, warnings, the time left and settings, and renews itself while
training runs; several runs stand side by side. Ctrl-C ends the service, not the training.

examples:
  facet watch runs/first
  facet watch runs/first runs/second --port 9000
  facet watch runs/first --out first.html           one file to send or keep, instead of a service
  ssh -L 8686:localhost:8686 HOST                   to see here what `facet watch` serves on HOST
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = CommandParser(prog="facet watch", description="Show training runs on a page.", epilog=EPILOG)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="write the page, complete in itself, and end")
    parser.add_argument(
        "--port", type=int, default=PORT, help=f"port to serve on (default {PORT}; 0: any that is free)"
    )
    parser.add_argument("--host", default=LOCAL[0], help="address to serve on; the default is for this machine alone")
    options = parser.parse_args(arguments)
    if options.out is not None and options.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {options.out} must end in .html")
    if not 0 <= options.port <= 65_535:
        raise UserError(f"--port {options.port} must be 0 to 65535")
    return options


def embedded(images: int, path: Path) -> str:
    """A picture as the content of a page: a JPEG, a quarter of the PNG; `images` are not needed.

    Raises:
        UserError: it cannot be read.
    """
    made = io.BytesIO()
    try:
        with Image.open(path) as picture:
            picture.convert("RGB").save(made, "JPEG", quality=90, subsampling=0)
    except Exception as error:  # decoders raise nearly anything for damaged files
        raise UserError(f"cannot read {path}: {reason_of(error)}; delete it to go on without it") from error
    return f"data:image/jpeg;base64,{base64.b64encode(made.getvalue()).decode()}"


class PageServer(ThreadingHTTPServer):
    """Serves the page of runs, its news (state.json) and the pictures (RUN/IMAGES.png, numbers both)."""

    allow_reuse_address = sys.platform != "win32"  # where it would let two servers have one port

    def __init__(self, runs: Sequence[WatchedRun], host: str, port: int) -> None:
        self.runs = runs
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        """Bind without looking up the machine's name, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over browsers that went away."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def answer(self, address: str) -> tuple[str, bytes] | None:
        """Kind and content of what an address stands for; None where it stands for nothing."""
        if address == "/":
            return "text/html; charset=utf-8", render_runs(self.facts(), self.now(), live=True).encode()
        if address == "/state.json":
            runs = self.facts()
            state = {"parts": parts_of(runs), "grids": grids_of(runs), "written": self.now()}
            return "application/json", json.dumps(state).encode()
        # Addresses are looked up among the pictures that there are, and never made into paths.
        found = PICTURE.fullmatch(address)
        if found is None or int(found[1]) >= len(self.runs):
            return None
        path = dict(self.runs[int(found[1])].folder.pictures()).get(int(found[2]))
        return None if path is None else ("image/png", path.read_bytes())

    def facts(self) -> list[RunFacts]:
        """All runs as they are now; one that can no longer be read says why."""
        return [self._facts_of(place, run) for place, run in enumerate(self.runs)]

    def _facts_of(self, place: int, run: WatchedRun) -> RunFacts:
        def address(images: int, path: Path) -> str:  # the time lets a browser keep what has not changed
            return f"{place}/{images}.png?{path.stat().st_mtime_ns}"

        try:
            return run.facts(address)
        except (UserError, OSError) as error:
            return RunFacts(run.name, str(run.folder.path), "unreadable", problems=[str(error)])

    def now(self) -> str:
        """When the page was made, in words."""
        return f"As of {time.strftime('%H:%M:%S')}; renews itself."


class Handler(BaseHTTPRequestHandler):
    """Answers GET; other sites that a browser shows cannot ask in its name, since they come under other host names."""

    server: PageServer

    def do_GET(self) -> None:
        """Send what the address stands for."""
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        except ValueError:
            host = None
        if self.server.server_name in LOCAL and host not in LOCAL:
            self.send_error(403, "Ask for localhost")
            return
        address, _, version = self.path.partition("?")
        try:
            found = self.server.answer(address)
        except OSError:  # a picture that has just been deleted
            found = None
        if found is None:
            self.send_error(404)
            return
        kind, content = found
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "max-age=86400, immutable" if version else "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the terminal quiet."""


def serve(runs: Sequence[WatchedRun], host: str, port: int) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: the port or address cannot be had.
    """
    try:
        server = PageServer(runs, host, port)
    except OSError as error:
        raise UserError(f"cannot serve on {host}:{port} ({error.strerror or error}): give another --port") from error
    with server:
        print(
            f"http://{host}:{server.server_port}/ shows {', '.join(run.name for run in runs)}; Ctrl-C ends it",
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


@reports_errors
def main() -> None:
    """Command line entry."""
    options = parse()
    runs = [WatchedRun(path) for path in options.runs]
    if options.out is None:
        serve(runs, options.host, options.port)
        return
    page = render_runs(
        [run.facts(embedded, EMBEDDED) for run in runs], time.strftime("Written on %Y-%m-%d at %H:%M."), live=False
    )
    with atomic_path(options.out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(from_here(f"page: {options.out}"))


if __name__ == "__main__":
    main()
