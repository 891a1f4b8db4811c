"""What the benchmark and the soak share: a model's provider, questions, the program's processes.

The provider, on loopback, does what a question asks for: so many tokens, one every so many
seconds (one second in all where nothing else is said). Each token carries the question's own
mark, so that an answer to somebody else is noticed, and says when it was sent, so that its delay
is known. The program runs as a user runs it, with the real opencode, in a HOME of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import http.server
import json
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import typing
import urllib.parse
import urllib.request

PROGRAM = pathlib.Path(__file__).resolve().parent.parent / "opencode_proxy.py"
QUESTION = re.compile(rb"(mark[0-9a-f]{12}) tokens=(\d+) interval=([0-9.]+)")
NO_QUESTION = re.fullmatch(rb"()(1)(0)", b"10")  # one of opencode's own
PATIENCE_SECONDS = 120.0  # of every single wait; what takes longer has failed
QUIET_SECONDS, QUIET_SHARE = 0.3, 0.1  # what uses less of a processor for so long is quiet


# ---------------------------------------------------------------------------------- the provider


class Provider(http.server.BaseHTTPRequestHandler):
    """Answers questions in chat completions; `GET /posts` tells the marks and sizes so far."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16  # tokens without an interval between them leave in large pieces
    posts: typing.ClassVar[list[tuple[str, int]]] = []

    def do_GET(self):
        body = json.dumps(self.posts).encode()
        self.send_response(200 if self.path == "/posts" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        mark, tokens, interval = (QUESTION.search(body) or NO_QUESTION).groups()
        self.posts.append((mark.decode(), len(body)))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.answer(body, mark.decode(), int(tokens), float(interval))
        self.write("data: [DONE]\n\n")
        self.write("")

    def answer(self, body, mark, tokens, interval):
        """Write the events of an answer."""
        for number in range(tokens):
            self.event({"content": f"{mark}:{number}:{time.monotonic():.6f} "})
            if interval:
                self.wfile.flush()
                time.sleep(interval)
        self.event({}, "stop")

    def event(self, delta, finish_reason=None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        event = {"id": "x", "object": "chat.completion.chunk", "choices": [choice]}
        self.write(f"data: {json.dumps(event)}\n\n")

    def write(self, text):
        data = text.encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def log_message(self, *args):
        pass


class ProviderServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass  # clients hang up


def serve(handler):
    """Serve on loopback with a handler, in a thread; return the base URL."""
    server = ProviderServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


# ------------------------------------------------------------------------------------ the client


class Question:
    """A request whose answer is known; `parts` are more parts of its message."""

    def __init__(self, tokens=20, interval=0.05, parts=(), **fields):
        self.mark, self.tokens = f"mark{secrets.token_hex(6)}", tokens
        self.text = f"{self.mark} tokens={tokens} interval={interval}"
        content = [{"type": "text", "text": self.text}, *parts] if parts else self.text
        body = {"messages": [{"role": "user", "content": content}], "stream": True, **fields}
        self.stream, self.body = body["stream"], json.dumps(body).encode()

    def is_answered_by(self, text):
        """Tell whether `text` is the whole answer, and the answer to this question."""
        told = [token.rpartition(":")[0] for token in text.split()]
        return told == [f"{self.mark}:{number}" for number in range(self.tokens)]


class Refused(Exception):
    """The server has answered with an error."""


def exchange(url, body, timeout=PATIENCE_SECONDS):
    """Yield (time, bytes) as they arrive of the response to a body; raise Refused, or OSError."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json"}
        connection.request("POST", parts.path + "/chat/completions", body, headers)
        response = connection.getresponse()
        if response.status != 200:
            raise Refused(response.status, response.read())
        while piece := response.read1(1 << 16):
            yield time.monotonic(), piece


def events(pieces):
    """Yield (time, event) of the pieces of an event stream, or of the one object that they are."""
    rest = b""
    for arrival, piece in [*pieces, (time.monotonic(), b"\n")]:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith((b"data: {", b"{")):
                yield arrival, json.loads(line[line.index(b"{") :])


# --------------------------------------------------------------------------------- the processes


def stat(pid):
    """Return the fields of a process in the kernel's list from its state on; [] if it is gone."""
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def tree(pid):
    """Return the ids of a process and its descendants."""
    children = {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        for parent in stat(path.name)[1:2]:
            children.setdefault(int(parent), []).append(int(path.name))
    found = [pid]
    for member in found:
        found += children.get(member, ())
    return found


def cpu_seconds(pid):
    """Return the processor time of a process tree so far, ended children included."""
    ticks = sum(int(field) for member in tree(pid) for field in stat(member)[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def pss(pids):
    """Return the memory of processes in MB, shared pages divided among those that share them."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += sum(map(int, re.findall(r"^Pss:\s+(\d+)", text, re.M)))
    return total / 1024


def ports_of(pid):
    """Return the local ports of a process's TCP connections."""
    sockets = {os.readlink(path) for path in pathlib.Path(f"/proc/{pid}/fd").iterdir()}
    _, *rows = pathlib.Path(f"/proc/{pid}/net/tcp").read_text().splitlines()
    connections = [row.split() for row in rows]  # its own and those of everybody else
    return {
        int(connection[1].rpartition(":")[2], 16)
        for connection in connections
        if f"socket:[{connection[9]}]" in sockets
    }


def wait_until(condition, seconds=PATIENCE_SECONDS):
    """Wait for a condition; return whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def make_home(folder, url):
    """Make a HOME whose opencode is logged in to GitHub Copilot at `url`; return an environment."""
    login = {"type": "oauth", "refresh": "x", "access": "x", "expires": 0}
    config = {"provider": {"github-copilot": {"options": {"baseURL": url}}}}
    (folder / "tmp").mkdir()
    for name, content in (
        (".local/share/opencode/auth.json", {"github-copilot": login}),
        (".config/opencode/opencode.json", config),
    ):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps(content))
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("XDG_", "OPENCODE"))
    }
    return {**environment, "HOME": str(folder), "TMPDIR": str(folder / "tmp")}


class Proxy:
    """The program as a user runs it; a context that ends with it."""

    def __init__(self, program, opencode, environment, *arguments):
        self.spares = 0 if arguments[:2] == ("--spares", "0") else 1
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.url = self.address + "/v1"
        command = [
            sys.executable,
            program,
            "--host",
            "127.0.0.1",
            "--opencode",
            opencode,
            "--port",
            self.address.rpartition(":")[2],
            *arguments,
        ]
        self.log = pathlib.Path(environment["HOME"], "proxy.log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stderr=log)
        self.pid = self.process.pid

    def __enter__(self):
        wait_until(lambda: self.health() or self.process.poll() is not None)
        if not self.health():
            self.stop()
            raise SystemExit(f"the proxy did not start:\n{self.log.read_text()}")
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Ask the program to end, as a service manager does, and wait for that."""
        self.process.terminate()
        self.process.wait(PATIENCE_SECONDS)

    def health(self):
        """Return what /health says, {} where nobody answers."""
        address = self.address + "/health"
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=10) as response:
            return json.load(response)
        return {}

    def settle(self):
        """Wait until what is started ahead is ready and nothing goes on any more."""
        if not wait_until(self._is_settled):
            print("the proxy does not settle", file=sys.stderr)

    def _is_settled(self):
        ready = self.health().get("spares") if self.spares else not self.opencodes()
        if not ready:
            return False
        before = cpu_seconds(self.pid)
        time.sleep(QUIET_SECONDS)
        return cpu_seconds(self.pid) - before < QUIET_SECONDS * QUIET_SHARE

    def opencodes(self):
        """Return the ids of the processes that the proxy has started and that still run."""
        return [pid for pid in tree(self.pid)[1:] if stat(pid)[:1] not in ([], ["Z"])]

    def open_files(self):
        """Return how many files the proxy has open and how many threads it has."""
        return sum(len(os.listdir(f"/proc/{self.pid}/{kind}")) for kind in ("fd", "task"))


def add_options(parser):
    """Add what says which program runs with which opencode."""
    parser.add_argument("--program", default=str(PROGRAM), metavar="PATH", help="the proxy")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what was started, too
    parser.add_argument("--opencode", type=find_opencode, default="opencode", metavar="PATH")


def find_opencode(path):
    found = shutil.which(path)
    if not found:
        raise argparse.ArgumentTypeError("opencode was not found: say where it is")
    return os.path.abspath(found)


if __name__ == "__main__":  # the provider as a process, until stdin closes
    print(serve(Provider), flush=True)
    sys.stdin.read()
