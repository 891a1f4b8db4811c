"""What the benchmark and the soak share: a model's provider, questions, the program's processes.

The provider, on loopback, does what a question asks for: so many tokens, one every so many
seconds (one second in all where nothing else is said). Each token carries the question's own
mark, so that an answer to somebody else is noticed, and says when it was sent, so that its delay
is known. The program runs as a user runs it, with the real opencode, in a HOME of its own.

What the tests have too is theirs: the provider is one of theirs that reads questions.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
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
import time
import urllib.parse
import urllib.request

TOP = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = TOP / "opencode_proxy.py"
sys.path.insert(0, str(TOP))

import test_opencode_proxy as tests  # noqa: E402

QUESTION = re.compile(rb"(mark[0-9a-f]{12}) tokens=(\d+) interval=([0-9.]+)")
PATIENCE_SECONDS = 120.0  # of every single wait; what takes longer has failed
PIECE_BYTES = 1 << 16  # in which tokens without an interval leave
QUIET_SECONDS = 0.3  # what uses less than QUIET_SHARE of a processor for so long is quiet
QUIET_SHARE = 0.1


# ---------------------------------------------------------------------------------- the provider


class Chunks(io.RawIOBase):
    """Writes a body in chunks: its connection is used again, as those of real providers are."""

    def __init__(self, plain):
        self._plain = plain

    def writable(self):
        return True

    def write(self, data):
        self._plain.write(tests.proxy.write_http_chunk(data, is_last=False))
        return len(data)

    def close(self):
        if not self.closed:
            self._plain.write(tests.proxy.write_http_chunk(b"", is_last=True))
        super().close()


class Provider(tests.Upstream):
    """Answers questions in chat completions; `GET /posts` tells the marks and sizes so far."""

    def __init__(self):
        self.posts = []
        super().__init__()
        self.respond = self.answer

    def models(self, exchange):
        """Return what GET tells at a path."""
        return self.posts if exchange.path == "/posts" else None

    def answer(self, exchange):
        """Answer one question, which is not kept: it may be large."""
        self.exchanges.remove(exchange)
        mark, tokens, interval = read_question(exchange.raw)
        self.posts.append((mark, len(exchange.raw)))

        exchange.send_response(200)
        exchange.send_header("Content-Type", "text/event-stream")
        exchange.send_header("Transfer-Encoding", "chunked")
        exchange.end_headers()
        plain = exchange.wfile
        with io.BufferedWriter(Chunks(plain), PIECE_BYTES) as exchange.wfile:
            self.answer_question(exchange, mark, tokens, interval)
            exchange.send("[DONE]")
        exchange.wfile = plain

    def answer_question(self, exchange, mark, tokens, interval):
        """Send the events of an answer."""
        for number in range(tokens):
            token = f"{mark}:{number}:{time.monotonic():.6f} "
            exchange.send(tests.chat_chunk({"content": token}))
            self.rest(exchange, interval)
        exchange.send(tests.chat_chunk({}, "stop"))

    def rest(self, exchange, interval):
        """Let pass the time between two events, if there is to be any."""
        if interval:
            exchange.wfile.flush()
            time.sleep(interval)


def read_question(body):
    """Return the mark, the tokens and the interval that a body asks for."""
    question = QUESTION.search(body)
    if question is None:  # one of opencode's own
        return "", 1, 0.0
    mark, tokens, interval = question.groups()
    return mark.decode(), int(tokens), float(interval)


# ------------------------------------------------------------------------------------ the client


class Question:
    """A request whose answer is known; `parts` are more parts of its message."""

    def __init__(self, tokens=20, interval=0.05, parts=(), stream=True, **fields):
        self.mark = f"mark{secrets.token_hex(6)}"
        self.tokens = tokens
        self.stream = stream
        self.text = f"{self.mark} tokens={tokens} interval={interval}"

        content = self.text
        if parts:
            content = [{"type": "text", "text": self.text}, *parts]
        messages = [{"role": "user", "content": content}]
        self.body = json.dumps({"messages": messages, "stream": stream, **fields}).encode()

    def is_answered_by(self, text):
        """Tell whether `text` is the whole answer, and the answer to this question."""
        numbered = [token.rpartition(":")[0] for token in text.split()]
        return numbered == [f"{self.mark}:{number}" for number in range(self.tokens)]


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

        piece = response.read1(1 << 16)
        while piece:
            yield time.monotonic(), piece
            piece = response.read1(1 << 16)


def events(pieces):
    """Yield (time, event) of the pieces of an event stream, or of the one object that they are."""
    rest = b""
    for arrival, piece in [*pieces, (time.monotonic(), b"\n")]:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith((b"data: {", b"{")):
                yield arrival, json.loads(line[line.index(b"{") :])


# --------------------------------------------------------------------------------- the processes
# Read from /proc and not from `ps`, as the tests do: it is read while something is measured.


def stat(pid):
    """Return the fields of a process in the kernel's list from its state on; [] if it is gone."""
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def tree(pid):
    """Return the ids of a process and its descendants."""
    children = {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        fields = stat(path.name)
        if fields:
            children.setdefault(int(fields[1]), []).append(int(path.name))

    family = [pid]
    for member in family:  # grows meanwhile
        family.extend(children.get(member, []))
    return family


def cpu_seconds(pid):
    """Return the processor time of a process tree so far, ended children included."""
    ticks = 0
    for member in tree(pid):
        for field in stat(member)[11:15]:
            ticks += int(field)
    return ticks / os.sysconf("SC_CLK_TCK")


def pss(pids):
    """Return the memory of processes in MB, shared pages divided among those that share them."""
    kilobytes = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
            for size in re.findall(r"^Pss:\s+(\d+)", text, re.M):
                kilobytes += int(size)
    return kilobytes / 1024


def ports_of(pid):
    """Return the local ports of a process's TCP connections."""
    sockets = {os.readlink(path) for path in pathlib.Path(f"/proc/{pid}/fd").iterdir()}
    rows = pathlib.Path(f"/proc/{pid}/net/tcp").read_text().splitlines()
    ports = set()
    for row in rows[1:]:  # connections, its own and those of everybody else
        fields = row.split()
        if f"socket:[{fields[9]}]" in sockets:
            ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


class Login:
    """What leads opencode to the provider at a URL, as the tests' upstreams tell it."""

    def __init__(self, url):
        self.url = url

    def login(self):
        """Return the contents of auth.json and opencode.json, and environment variables."""
        login = {"type": "oauth", "refresh": "x", "access": "x", "expires": 0}
        provider = {"github-copilot": {"options": {"baseURL": self.url}}}
        return {"github-copilot": login}, {"provider": provider}, {}


def make_home(folder, url):
    """Make a HOME whose opencode is logged in to GitHub Copilot at `url`; return an environment."""
    (folder / "tmp").mkdir()
    variables = tests.make_home(folder, Login(url))
    return {**tests.clean_environment(), **variables, "TMPDIR": str(folder / "tmp")}


class Proxy:
    """The program as a user runs it; a context that ends with it."""

    def __init__(self, program, opencode, environment, *arguments):
        self.has_spares = arguments[:2] != ("--spares", "0")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.url = self.address + "/v1"

        command = [sys.executable, program, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--opencode", opencode, *arguments]
        self.log = pathlib.Path(environment["HOME"], "proxy.log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stderr=log)
        self.pid = self.process.pid

    def __enter__(self):
        tests.eventually(self._has_begun, PATIENCE_SECONDS)
        if not self.health():
            self.stop()
            raise SystemExit(f"the proxy did not start:\n{self.log.read_text()}")
        return self

    def __exit__(self, *_):
        self.stop()

    def _has_begun(self):
        return self.health() or self.process.poll() is not None

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
        if not tests.eventually(self._is_settled, PATIENCE_SECONDS):
            print("the proxy does not settle", file=sys.stderr)

    def _is_settled(self):
        if not self.has_spares:
            return not self.opencodes() and self.is_quiet()
        return self.health().get("spares") and self.is_quiet()

    def is_quiet(self):
        """Watch the program and its processes for a moment; tell whether they did nothing."""
        before = cpu_seconds(self.pid)
        time.sleep(QUIET_SECONDS)
        return cpu_seconds(self.pid) - before < QUIET_SECONDS * QUIET_SHARE

    def opencodes(self):
        """Return the ids of the processes that the proxy has started and that still run."""
        return [pid for pid in tree(self.pid)[1:] if stat(pid)[:1] not in ([], ["Z"])]

    def open_files(self):
        """Return how many files the proxy has open and how many threads it has."""
        files = os.listdir(f"/proc/{self.pid}/fd")
        threads = os.listdir(f"/proc/{self.pid}/task")
        return len(files) + len(threads)


def add_options(parser):
    """Add what says which program runs with which opencode."""
    parser.add_argument("--program", default=str(PROGRAM), metavar="PATH", help="the proxy")
    parser.add_argument("--opencode", type=find_opencode, default="opencode", metavar="PATH")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what was started, too


def find_opencode(path):
    program = shutil.which(path)
    if not program:
        raise argparse.ArgumentTypeError("opencode was not found: say where it is")
    return os.path.abspath(program)


if __name__ == "__main__":  # the provider as a process, until stdin closes
    with contextlib.closing(Provider()) as provider:
        print(provider.url, flush=True)
        sys.stdin.read()
