#!/usr/bin/env python3
"""Measure opencode_proxy beside a direct connection and `opencode run`, all on this machine and in one run (Linux).

    python3 .ci/benchmark.py [--opencode PATH] [--url NAME=URL ...] [--quick]

The model's provider is a process of this program on loopback. It answers with 20 tokens, one every 20 ms, and each
says when it was sent, so that the delay of every token is known. Times are medians, in seconds.
"""
from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import http.client
import http.server
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import opencode_proxy
import test_opencode_proxy as tests

TOKENS, INTERVAL = 20, 0.02
PROMPT = "Say something."
BODY = {"messages": [{"role": "user", "content": PROMPT}], "stream": True}
TICKS = os.sysconf("SC_CLK_TCK")


class Provider(http.server.BaseHTTPRequestHandler):
    """Answers in tokens that say when they were sent; GET tells how many POSTs of how many bytes there were."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    posts: list[int] = []

    def do_GET(self):
        self.answer(json.dumps(self.posts).encode(), "application/json")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.posts.append(len(body))
        if not json.loads(body).get("stream"):
            return self.answer(json.dumps({"choices": [{"message": {"content": "title"}, "finish_reason": "stop"}]}).encode(), "application/json")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(TOKENS):
            self.event(tests.chat_chunk({"content": f"{number}:{time.monotonic():.6f} "}))
            time.sleep(INTERVAL)
        self.event(tests.chat_chunk({}, "stop"))
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def answer(self, body, content_type):
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def event(self, event):
        data = f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def log_message(self, *args):
        pass


class ProviderServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass  # `opencode run` drops its second request


def provide():
    """Serve as the provider until stdin closes; print the port."""
    server = ProviderServer(("127.0.0.1", 0), Provider)
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


def ask(url, body=BODY):
    """Return (first content, delays of the tokens, end, correct) of one streamed request to a base URL."""
    parts = urllib.parse.urlsplit(url)
    start, first, delays, text = time.monotonic(), None, [], ""
    with contextlib.closing(http.client.HTTPConnection(parts.hostname, parts.port, timeout=300)) as connection:
        connection.request("POST", parts.path + "/chat/completions", json.dumps(body, separators=(",", ":")), {"Content-Type": "application/json"})
        response = connection.getresponse()
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            now, choices = time.monotonic(), json.loads(line[6:]).get("choices")
            content = choices and choices[0]["delta"].get("content")
            if content:
                first = first or now
                delays += [now - float(token.partition(":")[2]) for token in content.split()]
                text += content
    correct = [token.partition(":")[0] for token in text.split()] == [str(number) for number in range(TOKENS)]
    return (first or time.monotonic()) - start, delays, time.monotonic() - start, correct


def tree(pid):
    """Return the ids of a process and its descendants."""
    found, parents = {pid}, {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    grown = True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return found


def cpu_seconds(pid):
    """Return the processor time of a process tree so far, ended children included."""
    total = 0
    for member in tree(pid):
        with contextlib.suppress(OSError, IndexError):
            total += sum(map(int, pathlib.Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return total / TICKS


def pss(pids):
    """Return the memory of processes in MB, shared pages divided among those that share them."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total / 1024


class Peak:
    """The largest memory of a process tree during a context."""

    def __init__(self, pid):
        self.pid, self.megabytes, self._end = pid, 0.0, threading.Event()

    def __enter__(self):
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._end.wait(0.3):
            self.megabytes = max(self.megabytes, pss(tree(self.pid)))

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()


class Bench:
    """The provider, the environment that leads opencode to it, and the rows of the table."""

    def __init__(self, folder, opencode):
        self.folder, self.opencode, self.rows = folder, opencode, []
        self.provider = subprocess.Popen([sys.executable, __file__, "--provide"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.port = int(self.provider.stdout.readline())
        upstream = argparse.Namespace(url=f"http://127.0.0.1:{self.port}")
        self.environment = {**{name: value for name, value in os.environ.items() if name not in tests.XDG}, **tests.make_home(folder, upstream)}

    def posts(self):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            connection.request("GET", "/")
            return json.loads(connection.getresponse().read())

    @contextlib.contextmanager
    def proxy(self, *arguments, opencode=None, **environment):
        """Run the proxy; yield its process, with `url`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, str(HERE.parent / "opencode_proxy.py"), "--host", "127.0.0.1", "--port", str(port), "--opencode",
             opencode or self.opencode, *arguments], env={**self.environment, **environment}, stderr=subprocess.PIPE)
        process.url = f"http://127.0.0.1:{port}/v1"
        while b"base URL" not in process.stderr.readline():
            if process.poll() is not None:
                raise SystemExit("the proxy did not start")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        try:
            yield process
        finally:
            process.terminate()
            process.wait()

    def measure(self, name, url, waves, at_once=1, pid=None, before=lambda: None):
        """Ask `waves` times `at_once` requests; add a row to the table."""
        posts, cpu, answers = len(self.posts()), pid and cpu_seconds(pid), []
        with Peak(pid) if pid else contextlib.nullcontext() as peak, concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            for _ in range(waves):
                before()
                answers += pool.map(ask, [url] * at_once)
            if pid:
                time.sleep(1)  # what the last request has started is part of its price
        count, sizes = len(answers), self.posts()[posts:]
        self.rows.append({
            "name": name, "requests": count, "first": statistics.median(answer[0] for answer in answers),
            "token": statistics.median(delay for answer in answers for delay in answer[1]) if answers[0][1] else float("nan"),
            "end": statistics.median(answer[2] for answer in answers), "posts": len(sizes) / count,
            "bytes": statistics.median(sizes) if sizes else 0, "cpu": (cpu_seconds(pid) - cpu) / count if pid else 0.0,
            "pss": peak.megabytes if pid else 0.0, "correct": sum(answer[3] for answer in answers)})
        print(f"  {name} done", file=sys.stderr)
        return max(answer[2] for answer in answers)

    def opencode_run(self, times):
        """Measure `opencode run`, a process for each request, which prints the answer when it is complete."""
        firsts, ends, cpus, peaks, correct, before = [], [], [], [], 0, len(self.posts())
        for _ in range(times):
            start, usage = time.monotonic(), os.times()
            command = [self.opencode, "run", "--model", "github-copilot/gpt-5-mini", PROMPT]
            process = subprocess.Popen(command, env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            with Peak(process.pid) as peak:
                text, first = b"", None
                while block := os.read(process.stdout.fileno(), 65536):
                    text += block
                    if b"0:" in text:
                        first = first or time.monotonic() - start
                process.wait()
            process.stdout.close()
            after = os.times()
            firsts.append(first or time.monotonic() - start)
            ends.append(time.monotonic() - start)
            cpus.append(after.children_user + after.children_system - usage.children_user - usage.children_system)
            peaks.append(peak.megabytes)
            correct += b"19:" in text
        sizes = self.posts()[before:]
        self.rows.append({"name": "opencode run", "requests": times, "first": statistics.median(firsts), "token": float("nan"), "end": statistics.median(ends),
                          "posts": len(sizes) / times, "bytes": max(sizes), "cpu": statistics.median(cpus), "pss": max(peaks), "correct": correct})

    def table(self):
        direct = self.rows[0]
        print("| | requests | first content | more than direct | delay per token | end | POSTs | prompt bytes | CPU s | PSS MB | correct |")
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for row in self.rows:
            print(f"| {row['name']} | {row['requests']} | {row['first']:.3f} | {row['first'] - direct['first']:+.3f} | {row['token'] * 1000:.1f} ms "
                  f"| {row['end']:.2f} | {row['posts']:g} | {row['bytes']:g} | {row['cpu']:.2f} | {row['pss']:.0f} | {row['correct']} |")


def fake_numbers(bench, folder):
    """Return (chunks per second, MB of the proxy with 500 idle connections) with a fake opencode."""
    fake = folder / "fake-opencode"
    fake.write_text(f"#!{sys.executable}\n{tests.FAKE}")
    fake.chmod(0o700)
    with bench.proxy("--spares", "0", opencode=str(fake), FAKE_CATALOG=json.dumps(tests.fake_model("x/y"))) as proxy:
        parts, rates = urllib.parse.urlsplit(proxy.url), []
        for _ in range(5):
            body = json.dumps({"messages": [{"role": "user", "content": "deltas 100000"}], "stream": True})
            with socket.create_connection((parts.hostname, parts.port)) as connection:
                connection.sendall(f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                data, start, end = connection.recv(1 << 16), time.monotonic(), b""
                size = len(data)
                while data:
                    data = connection.recv(1 << 20)
                    size, end = size + len(data), (end + data)[-20:]
                rates.append(100000 / (time.monotonic() - start))
            assert end.endswith(b"data: [DONE]\n\n"), end
            assert size > 100000 * 200, size
        with contextlib.ExitStack() as stack:
            for _ in range(500):
                stack.enter_context(socket.create_connection((parts.hostname, parts.port)))
            time.sleep(1)
            return statistics.median(rates), pss([proxy.pid])


def spare_ready(url):
    """Wait until the proxy at `url` has a spare."""
    parts = urllib.parse.urlsplit(url)
    while True:
        with contextlib.closing(http.client.HTTPConnection(parts.hostname, parts.port)) as connection:
            connection.request("GET", "/health")
            if json.loads(connection.getresponse().read())["spares"]:
                return time.sleep(0.3)
        time.sleep(0.1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--opencode")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="another server to measure, with its base URL")
    parser.add_argument("--quick", action="store_true", help="a third of the requests")
    parser.add_argument("--provide", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.provide:
        return provide()
    many = 3 if options.quick else 10
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        bench = Bench(folder, opencode_proxy.find_opencode(options.opencode))
        try:
            bench.measure("direct", f"http://127.0.0.1:{bench.port}", 2 * many)
            for title, arguments, waves, at_once, spaced in (
                    ("proxy, spaced", (), many, 1, True), ("proxy, back to back", (), many, 1, False), ("proxy, 4 at once", (), 2, 4, False),
                    ("proxy, 16 at once", (), 1, 16, False), ("proxy, cold (--spares 0)", ("--spares", "0"), many // 2 + 1, 1, False)):
                with bench.proxy(*arguments) as proxy:
                    bench.measure(title, proxy.url, waves, at_once, proxy.pid, lambda url=proxy.url, wait=spaced: wait and spare_ready(url))
            with bench.proxy("--requests-per-process", "50") as proxy:
                bench.measure("reuse (50), first wave of 4", proxy.url, 1, 4, proxy.pid)
                time.sleep(2)
                alone = bench.measure("reuse, one alone", proxy.url, 1, 1, proxy.pid)
                wave = bench.measure("reuse, second wave of 4", proxy.url, 1, 4, proxy.pid)
                bench.measure("reuse, 30 back to back", proxy.url, 3 * many, 1, proxy.pid)
            bench.opencode_run(3)
            for pair in options.url:
                title, _, url = pair.partition("=")
                bench.measure(title, url, many)
            rate, memory = fake_numbers(bench, folder)
        finally:
            bench.provider.stdin.close()
            bench.provider.wait()
            bench.provider.stdout.close()
        bench.table()
        rows = {row["name"]: row for row in bench.rows}
        spaced, run = rows["proxy, spaced"], rows["opencode run"]
        print(f"\nfirst content: {run['first'] / spaced['first']:.0f} times sooner than opencode run"
              f"\nCPU per request: {spaced['cpu'] / run['cpu']:.2f} of opencode run"
              f"\nsecond wave of 4, the last one: {wave / alone:.2f} times one alone"
              f"\nfake opencode, 100,000 deltas: {rate:,.0f} chunks per second"
              f"\nthe proxy's own memory with 500 idle connections: {memory:.0f} MB")


if __name__ == "__main__":
    main()
