#!/usr/bin/env python3
"""Ask opencode_proxy mixed requests at once while its processes are killed (Linux).

    python3 .ci/soak.py [--opencode PATH] [--requests N] [--seconds N] [--kill SECONDS] [--seed N]

Some clients hang up, and now and then a process of the real opencode gets SIGKILL, all at random.
Every answer must be its own, no choice may be POSTed twice, nothing may be lost but what was
killed after its body had been handed over, and nothing may be left over.
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
import typing

import rig

AT_ONCE = 16
# A busy opencode POSTs a body some milliseconds after it was handed over, which nobody but the
# program can tell. Mostly none to two requests are lost so in a run; without a second process for
# what was not handed over it would be ten for each kill.
UNSEEN_PER_KILL = 2
SOON_SECONDS = 2.0  # after a kill its victims' clients have been told
LEAVE_SECONDS = 1.5  # within which a client hangs up
SPARES = 1  # the default
MORE_FILES = 4  # and threads than at first may be there at the end
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

    ports: typing.ClassVar[dict[str, list[int]]] = {}

    def answer(self, body, mark, tokens, interval):
        self.ports.setdefault(mark, []).append(self.client_address[1])
        if b'"tools":[' not in body:
            return super().answer(body, mark, tokens, interval)
        call = {"index": 0, "id": "call_1", "type": "function"}
        self.event({"tool_calls": [{**call, "function": {"name": "tell", "arguments": ""}}]})
        for piece in ('{"text": ', f'"{mark}"', "}"):
            self.event({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
            self.wfile.flush()
            time.sleep(interval)
        return self.event({}, "tool_calls")


class Client:
    """A request, and what became of it: `lost` says what it was told, `wrong` what may not be."""

    def __init__(self, chance):
        self.kind = chance.choice(KINDS)
        self.choices = 2 if "choices" in self.kind else 1
        self.question = rig.Question(
            chance.randint(1, 30),
            chance.uniform(0, 0.05),
            stream="stream" in self.kind,
            **FIELDS.get(self.kind.split()[-1], {}),
        )
        self.leaves = "hang-up" in self.kind and chance.uniform(0.001, LEAVE_SECONDS)
        self.lost, self.wrong, self.ended = "", "", 0.0

    def ask(self, url):
        data, leave_at = b"", time.monotonic() + (self.leaves or rig.PATIENCE_SECONDS)
        try:
            response = rig.exchange(url, self.question.body, self.leaves or rig.PATIENCE_SECONDS)
            with contextlib.closing(response):
                for arrival, piece in response:
                    data += piece
                    if arrival > leave_at:
                        break
        except rig.Refused as error:
            self.lost = str(error)
        except (OSError, http.client.HTTPException) as error:
            self.wrong = "" if self.leaves else repr(error)
        self.ended = time.monotonic()
        if set(re.findall(rb"mark[0-9a-f]{12}", data)) - {self.question.mark.encode()}:
            self.wrong = "an answer to somebody else"
        elif not (self.leaves or self.lost or self.wrong):
            self._judge(data)

    def _judge(self, data):
        """Find out whether an answer that has ended is whole."""
        texts, arguments, finished = [""] * self.choices, "", set()
        for _, event in rig.events([(0, data)]):
            self.lost = self.lost or json.dumps(event.get("error", ""))[2:-2]
            for choice in event.get("choices", ()):
                delta = choice["delta" if self.question.stream else "message"]
                texts[choice["index"]] += delta.get("content") or ""
                for call in delta.get("tool_calls") or ():
                    arguments += call["function"]["arguments"]
                if choice["finish_reason"]:
                    finished.add(choice["index"])
        if "tools" in self.kind:
            right = arguments == f'{{"text": "{self.question.mark}"}}'
        else:
            right = all(self.question.is_answered_by(text) for text in texts)
        if not self.lost and not (right and len(finished) == self.choices):
            self.wrong = "cut, and nothing says so"
        if self.question.stream and not data.endswith(b"data: [DONE]\n\n"):
            self.wrong = "a stream without an end"


class Killer(threading.Thread):
    """Kills opencode processes now and then; knows when, and their connections' ports."""

    def __init__(self, chance, proxy, seconds):
        super().__init__(daemon=True)
        self.chance, self.proxy, self.seconds, self.end = chance, proxy, seconds, threading.Event()
        self.times, self.ports = [], set()

    def run(self):
        while not self.end.wait(self.chance.uniform(0.5, 1.5) * self.seconds):
            pids = self.proxy.opencodes()
            with contextlib.suppress(OSError, IndexError):  # there is none, or not any more
                pid = self.chance.choice(pids)
                os.kill(pid, signal.SIGSTOP)  # or it could connect while its ports are read
                self.ports |= rig.ports_of(pid)
                os.kill(pid, signal.SIGKILL)
                self.times.append(time.monotonic())


def faults_of(clients, killer, unseen):
    """Yield what is wrong with the answers; put what was never POSTed into `unseen`."""
    for client in clients:
        ports = Provider.ports.get(client.question.mark, [])
        name = f"{client.kind} {client.question.mark}, {len(ports)} POSTs"
        if client.wrong:
            yield f"{name}: {client.wrong} {client.lost}"
        if len(ports) > client.choices:
            yield f"{name}: POSTed again"
        if client.lost and not killer.ports.intersection(ports):
            killed = any(0 <= client.ended - moment < SOON_SECONDS for moment in killer.times)
            if len(ports) == client.choices or not killed:
                yield f"{name}: lost, and not killed: {client.lost}"
            else:
                unseen.append(client)


def leftovers(proxy, folder, files):
    """Yield what is there when all is quiet, and when the proxy has ended, but should not be."""
    proxy.settle()
    if not rig.wait_until(lambda: len(rig.tree(proxy.pid)) <= 1 + SPARES, 60):
        yield f"left over: {len(rig.tree(proxy.pid)) - 1} processes, {proxy.health()}"
    if not rig.wait_until(lambda: proxy.open_files() <= files + MORE_FILES, 10):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rig.add_options(parser)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=300, help="ask nothing more after these")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill", type=float, default=4, help="one process every so many seconds")
    options = parser.parse_args()
    start, chance, unseen = time.monotonic(), random.Random(options.seed), []
    clients = [Client(chance) for _ in range(options.requests)]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        environment = rig.make_home(folder, rig.serve(Provider))
        with rig.Proxy(options.program, options.opencode, environment) as proxy:
            proxy.settle()
            files, killer = proxy.open_files(), Killer(chance, proxy, options.kill)
            killer.start()

            def ask(client):
                if time.monotonic() - start < options.seconds:
                    client.ask(proxy.url)

            with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
                list(threads.map(ask, clients))
            killer.end.set()
            killer.join()
            asked = [client for client in clients if client.ended]
            faults = [*faults_of(asked, killer, unseen), *leftovers(proxy, folder, files)]
        if faults:
            print(proxy.log.read_text()[-4000:], file=sys.stderr)
    if len(unseen) > UNSEEN_PER_KILL * len(killer.times):
        faults += [f"{client.kind} was lost without a POST: {client.lost}" for client in unseen]
    print(*faults, sep="\n", end="\n" if faults else "")
    lost, left = sum(bool(client.lost) for client in asked), sum(bool(c.leaves) for c in asked)
    print(
        f"{len(asked)} requests in {time.monotonic() - start:.0f} s, {left} hung up, {lost} lost "
        f"to {len(killer.times)} kills ({len(unseen)} before the POST): {len(faults)} faults "
        f"(seed {options.seed})"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
