#!/usr/bin/env python3
"""Measure opencode_proxy beside a direct connection, all on this machine and in one run (Linux).

    python3 .ci/benchmark.py [--opencode PATH] [--quick] [--only NAME,...] [--url NAME=URL ...]
    python3 .ci/benchmark.py --versus PROGRAM [--rounds N]      beside another copy of the program

See rig.py for what runs. An answer takes one second where the name of the measure says nothing
else. First content and "all done", of several requests at once when the last one was, are medians
in seconds. A token's delay is from the provider's write to the client's read, in milliseconds.
Memory is PSS in MB, of the program and its opencode processes. "Spaced" means that a fresh process
was ready and nothing else went on; what a request costs includes the processes that it has
started. With --versus every measure runs with both programs, one right after the other, and the
ratios new/old stand at the end: those above 1.05 are marked.

The commit before, for --versus: git show HEAD~:opencode_proxy.py > /tmp/old.py
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
LOOK_SECONDS = 0.3  # between looks at the memory
IDLE_SECONDS = 2.0  # until a process has collected its garbage
DELAY_TOKENS = 200
DELAY_INTERVAL = 0.02
PAUSELESS_TOKENS = 20_000
MUCH_WORSE = 1.05  # a ratio that is marked
SHARED = "any"  # whose the measures are that no copy of the program takes part in
NEW = "new"
OLD = "old"


# --------------------------------------------------------------------------------- what is measured


class Figure(typing.NamedTuple):
    """A column of the table; those that are compared are the better the less they are."""

    title: str
    form: str
    is_compared: bool = True


FIGURES = {
    "requests": Figure("requests", ".0f", is_compared=False),
    "correct": Figure("correct", ".0f", is_compared=False),
    "first": Figure("first content", ".3f"),
    "more": Figure("more than direct", "+.3f", is_compared=False),
    "delay_p50": Figure("token delay p50", ".2f"),
    "delay_p99": Figure("p99", ".2f"),
    "end": Figure("all done", ".2f"),
    "cpu": Figure("CPU s per request", ".2f"),
    "rest": Figure("MB at rest", ".0f"),
    "most": Figure("MB at most", ".0f"),
    "posts": Figure("POSTs per request", ".2f", is_compared=False),
    "size": Figure("prompt bytes", ".0f", is_compared=False),
}


class Answer(typing.NamedTuple):
    """What came of a question, in seconds after it was asked."""

    first: float  # content
    delays: list[float]  # of the tokens
    end: float
    is_correct: bool


def ask(url, question):
    """Ask the server at a base URL; nothing is parsed until the answer has ended."""
    start = time.monotonic()
    pieces = []
    try:
        pieces.extend(rig.exchange(url, question.body))
    except (rig.Refused, OSError, http.client.HTTPException) as error:
        print(f"a request failed: {error!r}", file=sys.stderr)
        pieces.clear()
    end = time.monotonic()

    texts = list(texts_of(pieces, question.stream))
    first = texts[0][0] - start if texts else math.nan
    delays = []
    for arrival, text in texts:
        for token in text.split():
            delays.append(arrival - float(token.rpartition(":")[2]))
    whole = "".join(text for _, text in texts)
    return Answer(first, delays, end - start, question.is_answered_by(whole))


def texts_of(pieces, is_stream):
    """Yield (time, text) of the content in an answer."""
    key = "delta" if is_stream else "message"
    for arrival, event in rig.events(pieces):
        for choice in event.get("choices", []):
            text = choice[key].get("content")
            if text:
                yield arrival, text


def ask_all(url, questions):
    """Ask questions at once, each in a thread of its own; return the answers."""
    with concurrent.futures.ThreadPoolExecutor(len(questions)) as threads:
        waiting = [threads.submit(ask, url, question) for question in questions]
        return [future.result() for future in waiting]


def median(values):
    """Return the median of what was measured, not-a-number where nothing was."""
    measured = [value for value in values if not math.isnan(value)]
    return statistics.median(measured) if measured else math.nan


def percentile(values, percent):
    """Return the value that so many percent do not exceed, not-a-number where there is none."""
    if not values:
        return math.nan
    place = math.ceil(len(values) * percent / 100) - 1
    return sorted(values)[place]


def figures_of(waves, others=()):
    """Return what answers tell, in waves that were asked at once; `others` only are correct."""
    answers = []
    ends = []
    for wave in waves:
        answers.extend(wave)
        ends.append(max(answer.end for answer in wave))

    delays = []
    for answer in answers:
        delays.extend(answer.delays)
    everything = [*answers, *others]
    return {
        "requests": len(everything),
        "correct": sum(answer.is_correct for answer in everything),
        "first": median(answer.first for answer in answers),
        "delay_p50": percentile(delays, 50) * 1000,
        "delay_p99": percentile(delays, 99) * 1000,
        "end": median(ends),
    }


class Cost:
    """What a stretch of time costs: POSTs, and of a process tree processor time and memory."""

    def __init__(self, provider, pid=None, watches_memory=True):
        self._provider = provider
        self._pid = pid
        self._watches_memory = watches_memory and pid is not None
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._first_post = 0
        self._cpu_before = 0.0
        self.cpu = math.nan
        self.most = math.nan
        self.sizes: list[int] = []

    def __enter__(self):
        self._first_post = len(self._provider.posts())
        if self._pid is not None:
            self._cpu_before = rig.cpu_seconds(self._pid)
        if self._watches_memory:
            self.most = rig.pss(rig.tree(self._pid))
        self._watcher.start()
        return self

    def _watch(self):
        while self._watches_memory and not self._ended.wait(LOOK_SECONDS):
            self.most = max(self.most, rig.pss(rig.tree(self._pid)))

    def __exit__(self, *_):
        self._ended.set()
        self._watcher.join()
        posts = self._provider.posts()
        self.sizes = [size for _, size in posts[self._first_post :]]
        if self._pid is not None:
            self.cpu = rig.cpu_seconds(self._pid) - self._cpu_before

    def figures(self, requests):
        """Return what so many requests have cost."""
        return {
            "cpu": self.cpu / requests,
            "most": self.most,
            "posts": len(self.sizes) / requests,
            "size": median(self.sizes),
        }


class ProviderProcess:
    """The provider, as a process of its own."""

    def __init__(self):
        command = [sys.executable, rig.__file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.url = self._process.stdout.readline().strip()

    def posts(self):
        """Return (mark, size) of each POST so far."""
        with urllib.request.urlopen(self.url + "/posts") as response:
            return json.load(response)

    def close(self):
        self._process.communicate()


# -------------------------------------------------------------------------------------- the results


class Results:
    """The figures by row and by program; what is measured in several rounds is their median."""

    def __init__(self):
        self._rounds: dict[str, dict[str, list[dict[str, float]]]] = {}

    def add(self, row, label, figures):
        by_label = self._rounds.setdefault(row, {})
        by_label.setdefault(label, []).append(figures)
        print(f"  {row} ({label})", file=sys.stderr)

    def figure(self, row, label, name):
        """Return one figure, not-a-number where it was not measured."""
        rounds = self._rounds.get(row, {}).get(label, [])
        return median(figures.get(name, math.nan) for figures in rounds)

    def faults(self):
        """Return the rows in which an answer was not the right one."""
        rows = []
        for row, by_label in self._rounds.items():
            for label, rounds in by_label.items():
                if any(figures["correct"] < figures["requests"] for figures in rounds):
                    rows.append(f"{row} ({label})")
        return rows

    def print_table(self, label, shows_shared):
        """Print the rows of one program, and perhaps those of none."""
        print_row(["", *[figure.title for figure in FIGURES.values()]])
        print_row(["---"] * (1 + len(FIGURES)))
        for row, by_label in self._rounds.items():
            for its_label in by_label:
                if its_label == label or (its_label == SHARED and shows_shared):
                    self._print_figures(row, its_label)

    def _print_figures(self, row, label):
        cells = [row]
        for name, figure in FIGURES.items():
            value = self.figure(row, label, name)
            cells.append("" if math.isnan(value) else format(value, figure.form))
        print_row(cells)

    def print_ratios(self):
        """Print new/old of what both programs were measured in."""
        names = [name for name, figure in FIGURES.items() if figure.is_compared]
        print_row(["new / old", *[FIGURES[name].title for name in names]])
        print_row(["---"] * (1 + len(names)))
        for row, by_label in self._rounds.items():
            if NEW in by_label and OLD in by_label:
                print_row([row, *[self._ratio(row, name) for name in names]])

    def _ratio(self, row, name):
        new = self.figure(row, NEW, name)
        old = self.figure(row, OLD, name)
        if math.isnan(new) or math.isnan(old) or old == 0:
            return ""
        ratio = f"{new / old:.2f}"
        return f"**{ratio}** worse" if new / old > MUCH_WORSE else ratio


def print_row(cells):
    print("| " + " | ".join(cells) + " |")


# ------------------------------------------------------------------------------------- the measures


class Bench:
    """What all measures share: the provider, a HOME, the results, how much is asked."""

    def __init__(self, folder, options, provider):
        self.folder = folder
        self.options = options
        self.provider = provider
        self.results = Results()
        self.many = 3 if options.quick else 10
        self.environment = rig.make_home(folder, provider.url)

    def ask_server(self, row, url, waves, at_once=1, **question):
        """Measure a server that is none of our processes."""
        answers = []
        with Cost(self.provider) as cost:
            for _ in range(waves):
                questions = [rig.Question(**question) for _ in range(at_once)]
                answers.append(ask_all(url, questions))
        requests = waves * at_once
        figures = {**figures_of(answers), **cost.figures(requests)}
        self.results.add(row, SHARED, figures)

    def direct(self):
        self.ask_server("direct", self.provider.url, self.many)

    def direct_delays(self):
        question = {"tokens": DELAY_TOKENS, "interval": DELAY_INTERVAL}
        for at_once in (1, 16):
            row = f"direct, {DELAY_TOKENS} tokens, {at_once} at once"
            self.ask_server(row, self.provider.url, 1, at_once, **question)

    def direct_prompts(self):
        for name, part in prompts():
            self.ask_server(f"direct, {name}", self.provider.url, 3, tokens=4, parts=[part])

    def rivals(self):
        for pair in self.options.url:
            name, _, url = pair.partition("=")
            self.ask_server(f"{name}, back to back", url, self.many)
            for at_once, waves in ((4, 3), (16, 2), (64, 1)):
                self.ask_server(f"{name}, {at_once} at once", url, waves, at_once)

    def opencode_run(self):
        """`opencode run`, a process for each request, prints the answer when it is complete."""
        waves = []
        with Cost(self.provider, os.getpid()) as cost:
            for _ in range(3):
                waves.append([self._run_opencode(rig.Question())])
        figures = {**figures_of(waves), **cost.figures(len(waves))}
        self.results.add("opencode run", SHARED, figures)

    def _run_opencode(self, question):
        command = [self.options.opencode, "run", "--model", "github-copilot/gpt-5-mini"]
        start = time.monotonic()
        done = subprocess.run(
            [*command, question.text],
            env=self.environment,
            cwd=self.folder,
            text=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        seconds = time.monotonic() - start
        return Answer(seconds, [], seconds, question.is_answered_by(done.stdout))


class Measures:
    """The measures of one copy of the program, by the names that --only takes."""

    def __init__(self, bench, label, program):
        self._bench = bench
        self._label = label
        self._program = program

    def _proxy(self, *arguments):
        bench = self._bench
        return rig.Proxy(self._program, bench.options.opencode, bench.environment, *arguments)

    def _ask(self, row, proxy, waves, at_once=1, settles=True, watches_memory=True, **question):
        """Ask `waves` times so many questions at once, each when all is settled; add a row."""
        answers = []
        proxy.settle()
        with Cost(self._bench.provider, proxy.pid, watches_memory) as cost:
            for _ in range(waves):
                if settles:
                    proxy.settle()
                questions = [rig.Question(**question) for _ in range(at_once)]
                answers.append(ask_all(proxy.url, questions))
            proxy.settle()
        self._add(row, answers, cost.figures(waves * at_once))

    def _add(self, row, waves, cost, others=()):
        figures = {**figures_of(waves, others), **cost}
        direct = self._bench.results.figure("direct", SHARED, "first")
        figures["more"] = figures["first"] - direct
        self._bench.results.add(row, self._label, figures)

    def _add_memory(self, row, answers, memory):
        """Add a row that is about memory: of its answers only whether they are right."""
        correct = sum(answer.is_correct for answer in answers)
        figures = {"requests": len(answers), "correct": correct, **memory}
        self._bench.results.add(row, self._label, figures)

    def rest(self):
        with self._proxy() as proxy:
            proxy.settle()
            memory = {"rest": rig.pss(rig.tree(proxy.pid))}
            answer = ask(proxy.url, rig.Question())
        self._add_memory("at rest", [answer], memory)

    def spaced(self):
        with self._proxy() as proxy:
            self._ask("spaced", proxy, self._bench.many)

    def back_to_back(self):
        with self._proxy() as proxy:
            self._ask("back to back", proxy, self._bench.many, settles=False)

    def at_once(self):
        for at_once, waves in ((4, 3), (16, 2), (64, 1)):
            with self._proxy() as proxy:
                self._ask(f"{at_once} at once", proxy, waves, at_once)

    def delays(self):
        """Ask for long answers; nobody looks at the memory meanwhile, which would delay them."""
        question = {"tokens": DELAY_TOKENS, "interval": DELAY_INTERVAL}
        for at_once in (1, 16):
            with self._proxy() as proxy:
                row = f"{DELAY_TOKENS} tokens, {at_once} at once"
                self._ask(row, proxy, 1, at_once, watches_memory=False, **question)

    def cold(self):
        with self._proxy("--spares", "0") as proxy:
            self._ask("cold (--spares 0)", proxy, self._bench.many // 2 + 1)

    def reuse(self):
        """Ask one process many questions, and look at it before it is replaced."""
        count = 15 if self._bench.options.quick else 50
        # With one more, or the process would end before anybody has looked at it.
        with self._proxy("--requests-per-process", str(count + 1)) as proxy:
            proxy.settle()
            answers = []
            with Cost(self._bench.provider, proxy.pid) as cost:
                for _ in range(count):
                    answers.append([ask(proxy.url, rig.Question())])
            rig.tests.eventually(proxy.is_quiet, rig.PATIENCE_SECONDS)
            time.sleep(IDLE_SECONDS)
            figures = cost.figures(count)
            figures["cpu"] = rig.cpu_seconds(proxy.pid) / count  # with the start
            figures["rest"] = max(rig.pss([pid]) for pid in proxy.opencodes())
        self._add(f"{count} in one process (at rest: that process)", answers, figures)

    def open_webui(self):
        """A message; when it is answered 3 tasks at once; the next message 1 s later."""
        messages = []
        others = []
        with self._proxy() as proxy:
            proxy.settle()
            with Cost(self._bench.provider, proxy.pid) as cost:
                for _ in range(2 if self._bench.options.quick else 5):
                    message, tasks = self._converse(proxy)
                    messages.append([message])
                    others.extend(tasks)
                    proxy.settle()
        requests = len(messages) + len(others)
        row = "Open WebUI, the next message"
        self._add(row, messages, cost.figures(requests), others)

    def _converse(self, proxy):
        first = ask(proxy.url, rig.Question())
        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            tasks = []
            for _ in range(3):
                tasks.append(threads.submit(ask, proxy.url, rig.Question(stream=False)))
            time.sleep(1)
            message = ask(proxy.url, rig.Question())
            return message, [first, *[task.result() for task in tasks]]

    def pauseless(self):
        with self._proxy() as proxy:
            row = f"{PAUSELESS_TOKENS} tokens without a pause"
            self._ask(row, proxy, 3, tokens=PAUSELESS_TOKENS, interval=0)

    def idle(self):
        with self._proxy() as proxy, contextlib.ExitStack() as stack:
            proxy.settle()
            before = rig.pss([proxy.pid])
            address = urllib.parse.urlsplit(proxy.url)
            for _ in range(IDLE_CONNECTIONS):
                connection = socket.create_connection((address.hostname, address.port))
                stack.enter_context(connection)
            time.sleep(1)
            memory = {"rest": before, "most": rig.pss([proxy.pid])}
            answer = ask(proxy.url, rig.Question())
        row = f"the program alone (at most: {IDLE_CONNECTIONS} idle connections)"
        self._add_memory(row, [answer], memory)

    def prompts(self):
        with self._proxy() as proxy:
            for name, part in prompts():
                self._ask(name, proxy, 3, tokens=4, parts=[part])


def prompts():
    """Yield (name, content part) of large prompts."""
    for megabytes in (20, 60):
        size = megabytes * 1_000_000
        image = "data:image/png;base64,iVBORw0KGgo" + "A" * (size + 1)
        yield f"{megabytes} MB of image", {"type": "image_url", "image_url": {"url": image}}
        yield f"{megabytes} MB of text", {"type": "text", "text": "a word " * (size // 7)}


SHARED_MEASURES = {
    "delays": Bench.direct_delays,
    "prompts": Bench.direct_prompts,
    "rivals": Bench.rivals,
    "opencode_run": Bench.opencode_run,
}
MEASURES = {
    "rest": Measures.rest,
    "spaced": Measures.spaced,
    "back_to_back": Measures.back_to_back,
    "at_once": Measures.at_once,
    "delays": Measures.delays,
    "cold": Measures.cold,
    "reuse": Measures.reuse,
    "open_webui": Measures.open_webui,
    "pauseless": Measures.pauseless,
    "idle": Measures.idle,
    "prompts": Measures.prompts,
}
NAMES = list(dict.fromkeys([*MEASURES, *SHARED_MEASURES]))


def run_measures(bench, copies, names):
    """Run the measures in turn, each with every copy, in the other order at each step."""
    bench.direct()
    for name in names:
        if name in SHARED_MEASURES:
            SHARED_MEASURES[name](bench)

    for _ in range(bench.options.rounds):
        for name in names:
            if name in MEASURES:
                for copy in copies:
                    MEASURES[name](copy)
                copies.reverse()


def report(results, is_compared):
    """Print the tables; return whether every answer was right."""
    results.print_table(NEW, shows_shared=True)
    if is_compared:
        print("\nThe other copy of the program (old):\n")
        results.print_table(OLD, shows_shared=False)
        print()
        results.print_ratios()

    faults = results.faults()
    for row in faults:
        print(f"not every answer was right: {row}", file=sys.stderr)
    return not faults


def read_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rig.add_options(parser)
    parser.add_argument("--versus", metavar="PROGRAM", help="another copy of the program")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="of every measure")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--only", metavar="NAME,...", help=f"some of: {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="a third of the requests")
    options = parser.parse_args()
    options.only = options.only.split(",") if options.only else NAMES
    for name in options.only:
        if name not in NAMES:
            parser.error(f"--only knows {', '.join(NAMES)}")
    if options.versus and not os.path.isfile(options.versus):
        parser.error(f"--versus: there is no {options.versus}")
    return options


def main():
    options = read_options()
    with tempfile.TemporaryDirectory() as name:
        provider = ProviderProcess()
        bench = Bench(pathlib.Path(name), options, provider)
        copies = [Measures(bench, NEW, options.program)]
        if options.versus:
            copies.append(Measures(bench, OLD, options.versus))
        try:
            run_measures(bench, copies, options.only)
        finally:
            provider.close()
            is_right = report(bench.results, is_compared=len(copies) > 1)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
