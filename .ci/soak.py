#!/usr/bin/env python3
"""Ask opencode_proxy mixed requests at once while its processes are killed (Linux).

    python3 .ci/soak.py [--opencode PATH] [--requests N] [--seconds N] [--kill SECONDS] [--seed N]

Some clients hang up, and now and then a process of the real opencode gets SIGKILL, all at random.
Every answer must be its own, no choice may be POSTed twice, nothing may be lost but what was
killed after its POST, or MAX_ATTEMPTS times before it, and nothing may be left over.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import threading
import time

import rig

AT_ONCE = 16
MAX_ATTEMPTS = rig.tests.proxy.MAX_ATTEMPTS
# When it is killed, an opencode may have been about to POST some bodies of which the provider has
# heard nothing yet. Mostly none are lost so in a run, once there were seven in 30 kills.
UNHEARD_PER_KILL = 1
LEAVE_SECONDS = 1.5  # within which a client hangs up
SPARES = 1  # the default
MORE_FILES = 4  # and threads than at first may be there at the end
MARK = re.compile(rb"mark[0-9a-f]{12}")
KINDS = (
    "whole",
    "stream",
    "whole tools",
    "stream tools",
    "whole choices",
    "stream choices",
    "whole hang-up",
    "stream hang-up",
)
TEXT = {"type": "object", "properties": {"text": {"type": "string"}}}
FIELDS = {
    "tools": {"tools": [{"type": "function", "function": {"name": "tell", "parameters": TEXT}}]},
    "choices": {"n": 2},
}


class Provider(rig.Provider):
    """Remembers the client's port of each POST; calls the tool where there is one."""

    def __init__(self):
        self.ports = {}
        super().__init__()

    def answer_question(self, exchange, mark, tokens, interval):
        self.ports.setdefault(mark, []).append(exchange.client_address[1])
        if b'"tools":[' in exchange.raw:
            call = ("call", "call_1", "tell", ('{"text": ', f'"{mark}"', "}"))
            self.call_tool(exchange, call, interval)
        else:
            super().answer_question(exchange, mark, tokens, interval)

    def call_tool(self, exchange, call, interval):
        """Send the events of a call."""
        for delta in rig.tests.chat_deltas([call]):
            exchange.send(rig.tests.chat_chunk(delta))
            self.rest(exchange, interval)
        exchange.send(rig.tests.chat_chunk({}, "tool_calls"))


class Reply:
    """What a client has read of a whole answer, or of a streamed one."""

    def __init__(self, data, choices, is_stream):
        self.error = ""
        self.texts = [""] * choices
        self.arguments = ""
        self.finished = set()
        key = "delta" if is_stream else "message"
        for _, event in rig.events([(0, data)]):
            if "error" in event:
                self.error = json.dumps(event["error"])
            for choice in event.get("choices", []):
                self._add(choice, choice[key])

    def _add(self, choice, delta):
        if delta.get("content"):
            self.texts[choice["index"]] += delta["content"]
        for call in delta.get("tool_calls") or []:
            self.arguments += call["function"]["arguments"]
        if choice["finish_reason"]:
            self.finished.add(choice["index"])


class Client:
    """A request, and what became of it: `lost` says what it heard, `wrong` what may not be."""

    def __init__(self, chance):
        self.kind = chance.choice(KINDS)
        self.choices = 2 if "choices" in self.kind else 1
        self.question = rig.Question(
            chance.randint(1, 30),
            chance.uniform(0, 0.05),
            stream="stream" in self.kind,
            **FIELDS.get(self.kind.split()[-1], {}),
        )
        self.leaves = "hang-up" in self.kind
        self.patience = rig.PATIENCE_SECONDS
        if self.leaves:
            self.patience = chance.uniform(0.001, LEAVE_SECONDS)
        self.lost = ""
        self.wrong = ""
        self.began = 0.0
        self.ended = 0.0

    def ask(self, url):
        self.began = time.monotonic()
        data = b""
        try:
            for piece in self._pieces(url):
                data += piece
        except rig.Refused as error:
            self.lost = str(error)
        except (OSError, http.client.HTTPException) as error:
            if not self.leaves:
                self.wrong = repr(error)
        self.ended = time.monotonic()

        marks = {mark.decode() for mark in MARK.findall(data)}
        if marks - {self.question.mark}:
            self.wrong = "an answer to somebody else"
        elif not (self.leaves or self.lost or self.wrong):
            self._judge(data)

    def _pieces(self, url):
        """Yield what arrives until the client hangs up."""
        leave_at = time.monotonic() + self.patience
        response = rig.exchange(url, self.question.body, self.patience)
        with contextlib.closing(response):
            for arrival, piece in response:
                yield piece
                if arrival > leave_at:
                    return

    def _judge(self, data):
        """Find out whether an answer that has ended is whole."""
        reply = Reply(data, self.choices, self.question.stream)
        self.lost = reply.error
        if "tools" in self.kind:
            is_right = reply.arguments == f'{{"text": "{self.question.mark}"}}'
        else:
            is_right = all(self.question.is_answered_by(text) for text in reply.texts)
        is_whole = is_right and len(reply.finished) == self.choices
        if not self.lost and not is_whole:
            self.wrong = "cut, and nothing says so"
        if self.question.stream and not data.endswith(b"data: [DONE]\n\n"):
            self.wrong = "a stream without an end"


class Killer(threading.Thread):
    """Kills opencode processes now and then; knows when, and their connections' ports."""

    def __init__(self, chance, proxy, seconds):
        super().__init__(daemon=True)
        self.chance = chance
        self.proxy = proxy
        self.seconds = seconds
        self.end = threading.Event()
        self.times = []
        self.ports = set()

    def run(self):
        while not self.end.wait(self.chance.uniform(0.5, 1.5) * self.seconds):
            pids = self.proxy.opencodes()
            with contextlib.suppress(OSError, IndexError):  # there is none, or not any more
                self.kill(self.chance.choice(pids))

    def kill(self, pid):
        os.kill(pid, signal.SIGSTOP)  # or it could connect while its ports are read
        self.ports |= rig.ports_of(pid)
        os.kill(pid, signal.SIGKILL)
        self.times.append(time.monotonic())

    def kills_during(self, client):
        """Return how many processes were killed while a client waited."""
        return sum(client.began <= moment <= client.ended for moment in self.times)


def faults_of(clients, provider, killer, unheard):
    """Yield what is wrong with the answers; put those of whose POST nobody knows in `unheard`."""
    for client in clients:
        ports = provider.ports.get(client.question.mark, [])
        kills = killer.kills_during(client)
        name = f"{client.kind} {client.question.mark}, {len(ports)} POSTs, {kills} kills"
        if client.wrong:
            yield f"{name}: {client.wrong} {client.lost}"
        if len(ports) > client.choices:
            yield f"{name}: POSTed again"

        if client.lost and not killer.ports.intersection(ports):
            if len(ports) == client.choices or kills == 0:
                yield f"{name}: lost, and not killed: {client.lost}"
            elif kills < MAX_ATTEMPTS:
                unheard.append(f"{name}: lost without a POST: {client.lost}")


def leftovers(proxy, folder, files):
    """Yield what is there when all is quiet, and when the proxy has ended, but should not be."""

    def has_few_processes():
        return len(rig.tree(proxy.pid)) <= 1 + SPARES

    def has_few_files():
        return proxy.open_files() <= files + MORE_FILES

    proxy.settle()
    if not rig.tests.eventually(has_few_processes, 60):
        yield f"left over: {len(rig.tree(proxy.pid)) - 1} processes, {proxy.health()}"
    if not rig.tests.eventually(has_few_files, 10):
        yield f"left over: the proxy had {files} open files and threads, now {proxy.open_files()}"
    if proxy.health().get("running") != 0:
        yield f"left over: {proxy.health()}"

    proxy.stop()
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                yield f"left over: process {path.parent.name}"
    for path in (folder / "tmp").iterdir():
        yield f"left over: {path}"


def ask_all(clients, url, seconds):
    """Let clients ask, so many at once, for so many seconds; return those that have asked."""
    ask_until = time.monotonic() + seconds

    def ask(client):
        if time.monotonic() < ask_until:
            client.ask(url)

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
        for _ in threads.map(ask, clients):
            pass
    return [client for client in clients if client.ended]


def soak(options, folder):
    """Run it all; return the clients that have asked, the kills, what is wrong, the unheard."""
    chance = random.Random(options.seed)
    clients = [Client(chance) for _ in range(options.requests)]
    unheard = []
    with contextlib.ExitStack() as stack:
        provider = stack.enter_context(contextlib.closing(Provider()))
        environment = rig.make_home(folder, provider.url)
        proxy = stack.enter_context(rig.Proxy(options.program, options.opencode, environment))
        proxy.settle()
        files = proxy.open_files()
        killer = Killer(chance, proxy, options.kill)
        killer.start()
        asked = ask_all(clients, proxy.url, options.seconds)
        killer.end.set()
        killer.join()
        faults = [*faults_of(asked, provider, killer, unheard), *leftovers(proxy, folder, files)]

        if len(unheard) > UNHEARD_PER_KILL * len(killer.times):
            faults += unheard
        if faults:
            print(proxy.log.read_text()[-4000:], file=sys.stderr)
    return asked, len(killer.times), faults, unheard


def read_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rig.add_options(parser)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=300, help="ask nothing more after these")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill", type=float, default=4, help="one process every so many seconds")
    return parser.parse_args()


def main():
    options = read_options()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        asked, kills, faults, unheard = soak(options, pathlib.Path(name))

    for fault in faults:
        print(fault)
    lost = sum(bool(client.lost) for client in asked)
    left = sum(client.leaves for client in asked)
    print(
        f"{len(asked)} requests in {time.monotonic() - start:.0f} s, {left} hung up, {lost} lost "
        f"to {kills} kills ({len(unheard)} without a POST): {len(faults)} faults "
        f"(seed {options.seed})"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
