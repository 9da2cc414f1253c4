"""`fastlm watch`: the report of runs that are under way, in a browser, made anew as they go on."""

from __future__ import annotations

from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from plotly.offline import get_plotlyjs

from fastlm.config import WatchConfig
from fastlm.errors import UserError
from fastlm.report.page import Report, page
from fastlm.report.runs import read_runs

LIBRARY = "/plotly.js"


def watch(cfg: WatchConfig) -> int:
    """Serve the page until interrupted; UserError where a folder is no run or the port is taken."""
    live_page(cfg.runs)  # a mistake is told before anything is served
    handler = partial(Handler, cfg.runs, cfg.host)
    try:
        server = ThreadingHTTPServer((cfg.host, cfg.port), handler)
    except OSError as error:
        place = f"{cfg.host}:{cfg.port}"
        raise UserError(
            f"cannot serve at {place}: {error.strerror}; choose another --port"
        ) from None
    with server:
        print(f"http://{cfg.host}:{server.server_port}, until Ctrl-C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


def live_page(runs: tuple[str, ...]) -> str:
    """The page as the runs stand now, without what would need their models."""
    records, table, settings = read_runs(runs)
    unscored = "this page follows the runs; fastlm report has their samples"
    return page(Report(records, table, settings, {}, "", unscored, ""), LIBRARY)


class Handler(BaseHTTPRequestHandler):
    """Answers for two paths, the page and the charting library, and for nothing else."""

    def __init__(self, runs: tuple[str, ...], host: str, *connection: object) -> None:
        self.runs = runs
        self.host = host
        super().__init__(*connection)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (self.host, "localhost"):
            # another site's name may lead here (DNS rebinding), and that site would read the answer
            self.send_error(403, "unknown host")
        elif self.path == LIBRARY:
            self.answer("text/javascript", get_plotlyjs())
        elif self.path == "/":
            try:
                self.answer("text/html", live_page(self.runs))
            except UserError as error:
                self.send_error(503, str(error).splitlines()[0])
        else:
            self.send_error(404)

    def answer(self, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "max-age=3600" if self.path == LIBRARY else "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *words: object) -> None:
        """Say nothing of requests: the terminal is the user's."""
