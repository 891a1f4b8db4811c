#!/usr/bin/env python3
"""Measure opencode_proxy beside a direct connection, all on this machine and in one run (Linux).

    python3 .ci/benchmark.py [--opencode PATH] [--quick] [--only NAME,...] [--url NAME=URL ...]

See rig.py for what runs. Times are medians, in seconds; an answer takes one second where the name
of the measure says nothing else. Of several requests at once "all done" is when the last one was.
"Spaced" means that a fresh process was ready and nothing else went on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import math
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import typing
import urllib.parse
import urllib.request

import rig

IDLE_CONNECTIONS = 500
DELTAS = 20_000
COLUMNS = (
    "",
    "requests",
    "first content",
    "more than direct",
    "ms per token",
    "all done",
    "POSTs",
    "prompt bytes",
    "CPU s",
    "PSS MB",
    "correct",
)


class Answer(typing.NamedTuple):
    """What came of a question, in seconds after it was asked."""

    first: float  # content
    delays: list[float]  # of the tokens
    end: float
    correct: bool


def ask(url, question):
    """Ask the server at a base URL; nothing is parsed until the answer has ended."""
    start, pieces, texts = time.monotonic(), [], []
    try:
        pieces.extend(rig.exchange(url, question.body))
    except (rig.Refused, OSError, http.client.HTTPException) as error:
        print(f"a request failed: {error!r}", file=sys.stderr)
        pieces.clear()
    end = time.monotonic()
    for arrival, event in rig.events(pieces):
        for choice in event.get("choices", ()):
            text = choice["delta" if question.stream else "message"].get("content")
            if text:
                texts.append((arrival, text))
    delays = [
        arrival - float(token.rpartition(":")[2])
        for arrival, text in texts
        for token in text.split()
    ]
    correct = question.is_answered_by("".join(text for _, text in texts))
    return Answer(texts[0][0] - start if texts else math.nan, delays, end - start, correct)


def median(values):
    """Return the median of what was measured, not-a-number where nothing was."""
    measured = [value for value in values if not math.isnan(value)]
    return statistics.median(measured) if measured else math.nan


class Cost:
    """What a stretch of time costs: POSTs, and of a process tree processor time and memory."""

    def __init__(self, bench, pid=None):
        self.bench, self.pid, self.cpu, self.memory, self.sizes = bench, pid, math.nan, math.nan, []
        self._ended, self._watcher = threading.Event(), threading.Thread(target=self._watch)

    def __enter__(self):
        self._posts = len(self.bench.posts())
        self._cpu = rig.cpu_seconds(self.pid) if self.pid else 0.0
        self._watcher.start()
        return self

    def _watch(self):
        while self.pid and not self._ended.wait(0.3):
            self.memory = max(rig.pss(rig.tree(self.pid)), self.memory)

    def __exit__(self, *_):
        self._ended.set()
        self._watcher.join()
        self.sizes = [size for _, size in self.bench.posts()[self._posts :]]
        if self.pid:
            self.cpu = rig.cpu_seconds(self.pid) - self._cpu


class Bench:
    """The provider, the table as it grows, and a method for each measure."""

    def __init__(self, folder, options):
        self.folder, self.options = folder, options
        self.rows, self.notes, self.baseline = [], [], math.nan  # first content of direct
        self.many = 3 if options.quick else 10
        command = [sys.executable, rig.__file__]
        self.provider = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.direct = self.provider.stdout.readline().strip()
        self.environment = rig.make_home(folder, self.direct)

    def posts(self):
        with urllib.request.urlopen(self.direct + "/posts") as response:
            return json.load(response)

    def proxy(self, *arguments):
        return rig.Proxy(self.options.program, self.options.opencode, self.environment, *arguments)

    def measure(self, name, url, waves, at_once=1, before=None, proxy=None, **question):
        """Ask `waves` times so many questions at once, each wave after `before()`; add a row.

        The price of the requests includes what they have started: it ends when `proxy` settles.
        """
        answers, before = [], before or (lambda: None)
        before()
        with Cost(self, proxy and proxy.pid) as cost:
            with concurrent.futures.ThreadPoolExecutor(at_once) as threads:
                for _ in range(waves):
                    before()
                    questions = [rig.Question(**question) for _ in range(at_once)]
                    answers.append(list(threads.map(ask, [url] * at_once, questions)))
            if proxy:
                proxy.settle()
        self.add(name, answers, cost)

    def add(self, name, waves, cost, others=()):
        """Add a row of answers in waves; of `others` only the price and correctness count."""
        answers = [answer for wave in waves for answer in wave]
        first = median(answer.first for answer in answers)
        count = len(answers) + len(others)
        correct = sum(answer.correct for answer in [*answers, *others])
        delay = median(delay for answer in answers for delay in answer.delays) * 1000
        end = median(max(answer.end for answer in wave) for wave in waves)
        if name.startswith("direct"):
            self.baseline = first
        row = (
            name,
            count,
            first,
            first - self.baseline,
            delay,
            end,
            len(cost.sizes) / count,
            median(cost.sizes),
            cost.cpu / count,
            cost.memory,
            correct,
        )
        self.rows.append(row)
        print(f"  {name}: first content {first:.3f}, all done {end:.2f}", file=sys.stderr)

    def table(self):
        print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
        forms = "", "", ".3f", "+.3f", ".1f", ".2f", ".2f", ".0f", ".2f", ".0f", ""
        for row in self.rows:
            cells = [format(value, form) for value, form in zip(row, forms)]
            print("| " + " | ".join(cells).replace("+nan", "-").replace("nan", "-") + " |")
        print("", *self.notes, sep="\n")

    # the measures, by the names that --only takes

    def spaced(self):
        with self.proxy() as proxy:
            self.measure("spaced", proxy.url, self.many, before=proxy.settle, proxy=proxy)

    def back_to_back(self):
        with self.proxy() as proxy:
            proxy.settle()
            self.measure("back to back", proxy.url, self.many, proxy=proxy)

    def at_once(self):
        for count, waves in ((4, 3), (16, 2), (64, 1)):
            with self.proxy() as proxy:
                self.measure(f"{count} at once", proxy.url, waves, count, proxy.settle, proxy)

    def cold(self):
        with self.proxy("--spares", "0") as proxy:
            self.measure(
                "cold (--spares 0)", proxy.url, self.many // 2 + 1, before=proxy.settle, proxy=proxy
            )

    def reuse(self):
        count = 15 if self.options.quick else 50
        with self.proxy("--requests-per-process", str(count)) as proxy:
            self.measure(f"{count} in a row, --requests-per-process {count}", proxy.url, count)
            done = rig.cpu_seconds(proxy.pid)
            proxy.settle()
            settled = rig.cpu_seconds(proxy.pid)
        self.notes.append(
            f"CPU seconds per request, {count} in a row with --requests-per-process {count}, all "
            f"starts included: {done / count:.2f}; with the start of the next process, that has "
            f"served nothing yet: {settled / count:.2f}"
        )

    def open_webui(self):
        """A message; when it is answered 3 tasks at once; the next message 1 s later."""
        messages, others = [], []
        with self.proxy() as proxy, Cost(self, proxy.pid) as cost:
            proxy.settle()
            for _ in range(2 if self.options.quick else 5):
                others.append(ask(proxy.url, rig.Question()))
                with concurrent.futures.ThreadPoolExecutor(3) as threads:
                    tasks = [
                        threads.submit(ask, proxy.url, rig.Question(stream=False)) for _ in range(3)
                    ]
                    time.sleep(1)
                    messages.append([ask(proxy.url, rig.Question())])
                others += [task.result() for task in tasks]
                proxy.settle()
        self.add("Open WebUI, the next message", messages, cost, others)

    def deltas(self):
        rates = []
        for name, target in (("direct", contextlib.nullcontext()), ("proxy", self.proxy())):
            with target as proxy:
                for _ in range(3):
                    if proxy:
                        proxy.settle()
                    question = rig.Question(DELTAS, 0)
                    answer = ask(proxy.url if proxy else self.direct, question)
                    rates.append(DELTAS / (answer.end - answer.first) if answer.correct else 0)
            self.notes.append(f"chunks per second, {name}: {median(rates):,.0f}")
            rates.clear()

    def idle(self):
        with self.proxy() as proxy, contextlib.ExitStack() as stack:
            proxy.settle()
            before = rig.pss([proxy.pid])
            address = urllib.parse.urlsplit(proxy.url)
            for _ in range(IDLE_CONNECTIONS):
                connection = socket.create_connection((address.hostname, address.port))
                stack.enter_context(connection)
            time.sleep(1)
            self.notes.append(
                f"the proxy's own memory: {before:.0f} MB, with {IDLE_CONNECTIONS} "
                f"idle connections {rig.pss([proxy.pid]):.0f} MB"
            )

    def opencode_run(self):
        """`opencode run`, a process for each request, prints the answer when it is complete."""
        waves = []
        with Cost(self, os.getpid()) as cost:
            for _ in range(3):
                question, start = rig.Question(), time.monotonic()
                command = [self.options.opencode, "run", "--model", "github-copilot/gpt-5-mini"]
                done = subprocess.run(
                    [*command, question.text],
                    env=self.environment,
                    cwd=self.folder,
                    text=True,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                )
                taken = time.monotonic() - start
                waves.append([Answer(taken, [], taken, question.is_answered_by(done.stdout))])
        self.add("opencode run", waves, cost)

    def rivals(self):
        for pair in self.options.url:
            name, _, url = pair.partition("=")
            self.measure(f"{name}, back to back", url, self.many)
            for count, waves in ((4, 3), (16, 2), (64, 1)):
                self.measure(f"{name}, {count} at once", url, waves, count)

    def prompts(self):
        with self.proxy() as proxy:
            for megabytes in (20, 60):
                size = megabytes * 1_000_000
                image = "data:image/png;base64,iVBORw0KGgo" + "A" * (size + 1)
                for kind, part in (
                    ("image", {"type": "image_url", "image_url": {"url": image}}),
                    ("text", {"type": "text", "text": "a word " * (size // 7)}),
                ):
                    name = f"{megabytes} MB of {kind}"
                    question = {"tokens": 4, "parts": [part]}
                    self.measure(f"direct, {name}", self.direct, 3, **question)
                    self.measure(name, proxy.url, 3, before=proxy.settle, proxy=proxy, **question)


MEASURES = (
    "spaced",
    "back_to_back",
    "at_once",
    "cold",
    "reuse",
    "open_webui",
    "deltas",
    "idle",
    "rivals",
    "prompts",
    "opencode_run",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rig.add_options(parser)
    parser.add_argument(
        "--url",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="another server to measure, with its base URL",
    )
    parser.add_argument("--only", metavar="NAME,...", help=f"some of: {', '.join(MEASURES)}")
    parser.add_argument("--quick", action="store_true", help="a third of the requests")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else MEASURES
    if not set(names) <= set(MEASURES):
        parser.error(f"--only knows {', '.join(MEASURES)}")
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(pathlib.Path(name), options)
        try:
            bench.measure("direct", bench.direct, bench.many)
            for measure in MEASURES:
                if measure in names:
                    getattr(bench, measure)()
        finally:
            bench.provider.communicate()
            bench.table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
