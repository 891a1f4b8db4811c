"""Tests of opencode_proxy, in the program's order. Run with `python3 -m unittest` in this folder.

Tables test pure functions. FakeCase has a fake opencode, RealCase the real one, and on loopback a
provider, Upstream, or Services: a login as it really is. Where the real opencode or a client's
library is missing, tests are skipped, or fail with OPENCODE_PROXY_TEST_ALL=1.
"""

import asyncio
import concurrent.futures
import contextlib
import http.server
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import unittest.mock
from typing import Any, NamedTuple

import opencode_proxy as proxy

HERE = pathlib.Path(__file__).resolve().parent
DEADLINE = 120.0  # for what must happen; long, because machines are slow when they are busy
SOON = 30.0  # the same where a time-out of the program would end it too, later


def eventually(condition, seconds=DEADLINE):
    """Return the first true value of `condition()`, or its last one after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def at_once(call, items):
    """Return [call(item) for item in items], called at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(items)) as threads:
        return list(threads.map(call, items))


def missing(what):
    """Skip a test for want of `what`, or fail it where everything must be there."""
    everything = os.environ.get("OPENCODE_PROXY_TEST_ALL") == "1"
    raise (AssertionError if everything else unittest.SkipTest)(what + " is missing")


# ------------------------------------------------------------------------- a provider on loopback
CHAT, RESPONSES, MESSAGES = (
    "github-copilot/" + name for name in ("gpt-5-mini", "gpt-5.4-mini", "claude-sonnet-4.6")
)
FORMATS = {"chat/completions": CHAT, "responses": RESPONSES, "messages": MESSAGES}
OAUTH = {"type": "oauth", "refresh": "gho_x", "access": "gho_x", "expires": 0}


class Upstream(http.server.ThreadingHTTPServer):
    """A provider of models: records each request, answers as `respond(exchange)` says."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        self.exchanges, self.respond = [], answer_text
        self.handle_error = lambda *arguments: None
        super().__init__(("127.0.0.1", 0), Exchange)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self.thread.start()

    def login(self):
        """Return what leads to this provider: auth.json, opencode.json, environment variables."""
        claude = {"claude-sonnet-4.6": {"provider": {"npm": "@ai-sdk/anthropic"}}}
        copilot = {
            "models": claude,
            "options": {"baseURL": self.url, "headerTimeout": 1000, "chunkTimeout": 1000},
        }
        own = {"options": {"baseURL": self.url + "/v1", "apiKey": "k"}, "models": {"m": {}}}
        providers = {
            "github-copilot": copilot,
            "other": {"npm": "@ai-sdk/google", **own},
            "local": {"npm": "@ai-sdk/openai-compatible", **own},
        }
        return {"github-copilot": OAUTH}, {"provider": providers}, {}

    def close(self):
        self.shutdown()
        self.thread.join()
        self.server_close()


class Exchange(http.server.BaseHTTPRequestHandler):
    """One request, over TLS to a `host` or not: its `path`, `headers`, `raw`, `body`, `format`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    host, log_message = "", unittest.mock.Mock()

    def finish(self):
        if not self.wfile.closed:
            super().finish()
        self.request.close()

    def do_CONNECT(self):
        self.host = self.path.partition(":")[0]
        self.server.hosts.append(self.host)
        known = self.host in (COPILOT, CHATGPT)
        self.send_response(200 if known else 502)
        self.end_headers()
        if known:
            self.request = self.server.context.wrap_socket(self.request, server_side=True)
            self.setup()

    def do_GET(self):  # opencode looks for a list of models at some providers
        listed = (self.host, self.path) == (COPILOT, "/models")
        failing(*((200, {"data": [*map(offer, OFFERS)]}) if listed else (404, "")))(self)

    def do_POST(self):
        self.raw = self.rfile.read(int(self.headers["Content-Length"]))
        self.body = json.loads(self.raw)
        self.format = next((name for name in FORMATS if f"/{name}?" in self.path + "?"), self.path)
        self.closed_by_client = threading.Event()
        self.server.exchanges.append(self)
        service = {COPILOT: self.format, CHATGPT: CHATGPT}.get(self.host)
        broken = [text for asked, breaks, text in RULES if asked == service and breaks(self.body)]
        respond = failing(400, {"error": {"message": broken[0]}}) if broken else self.server.respond
        respond(self)

    def begin(self, status=200, content_type="text/event-stream", **headers):
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Connection": "close", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def send(self, *events):
        for event in events:
            name = f"event: {event['type']}\n" if "type" in event else ""
            data = event if isinstance(event, str) else json.dumps(event)
            self.wfile.write(f"{name}data: {data}\n\n".encode())

    def wait_closed(self):
        """Wait until the other side closes the connection, which sets `closed_by_client`."""
        self.connection.settimeout(DEADLINE)
        with contextlib.suppress(ConnectionResetError):
            self.connection.recv(1)
        self.closed_by_client.set()

    def drop(self):
        """Close the connection in the middle of an answer, with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        for stream in (self.rfile, self.wfile, self.connection):
            stream.close()
        self.close_connection = True


USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 20,
    "total_tokens": 31,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 7},
}


def chat_chunk(delta, finish=None, **more):
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "up", "object": "chat.completion.chunk", "choices": [choice], **more}


# An answer as events of each wire format: `parts` are ("text", text), ("thought", text) or
# ("call", id, name, pieces of the arguments).


def chat_stream(parts, finish="stop"):
    deltas, calls = [{"role": "assistant", "content": ""}], 0
    for kind, text, *call in parts:
        if call:
            first = {"id": text, "type": "function", "function": {"name": call[0], "arguments": ""}}
            more = [{"function": {"arguments": piece}} for piece in call[1]]
            deltas += [{"tool_calls": [{"index": calls, **delta}]} for delta in (first, *more)]
            calls += 1
        else:
            deltas.append({"content" if kind == "text" else "reasoning_content": text})
    chunks = [chat_chunk(delta) for delta in deltas]
    return [*chunks, chat_chunk({}, finish), chat_chunk({}, choices=[], usage=USAGE), "[DONE]"]


def responses_stream(parts, finish="stop"):
    kinds = {
        "text": ({"type": "message", "role": "assistant", "content": []}, "output_text"),
        "thought": ({"type": "reasoning", "summary": []}, "reasoning_summary_text"),
        "call": ({"type": "function_call", "arguments": ""}, "function_call_arguments"),
    }
    steps = [("created", {"response": {"id": "r", "created_at": 1, "model": "m"}})]
    for index, (kind, text, *call) in enumerate(parts):
        item, name = {"id": f"i{index}", **kinds[kind][0]}, kinds[kind][1]
        item.update({"call_id": text, "name": call[0]} if call else {})
        done = {**item, "arguments": "".join(call[1])} if call else item
        pieces = [(name + ".delta", {"delta": piece}) for piece in (call[1] if call else [text])]
        steps += [
            (step, {"output_index": index, "item_id": item["id"], **more})
            for step, more in (
                ("output_item.added", {"item": item}),
                *pieces,
                ("output_item.done", {"item": done}),
            )
        ]
    response = {
        "id": "r",
        "usage": {
            "input_tokens": 11,
            "input_tokens_details": {"cached_tokens": 4},
            "output_tokens": 20,
            "output_tokens_details": {"reasoning_tokens": 7},
            "total_tokens": 31,
        },
    }
    reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(finish)
    response.update({"incomplete_details": {"reason": reason}} if reason else {})
    steps.append(("incomplete" if reason else "completed", {"response": response}))
    return [{"type": "response." + step, **more} for step, more in steps]


def messages_stream(parts, finish="stop"):
    kinds = {
        "text": ({"type": "text", "text": ""}, "text_delta", "text"),
        "thought": ({"type": "thinking", "thinking": ""}, "thinking_delta", "thinking"),
        "call": ({"type": "tool_use", "input": {}}, "input_json_delta", "partial_json"),
    }
    message = {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "usage": {"input_tokens": 7, "cache_read_input_tokens": 4, "output_tokens": 1},
    }
    events = [{"type": "message_start", "message": message}]
    for index, (kind, text, *call) in enumerate(parts):
        block, name, key = kinds[kind]
        block = {**block, "id": text, "name": call[0]} if call else block
        deltas = [{"type": name, key: piece} for piece in (call[1] if call else [text])]
        events += [
            {"type": "content_block_" + step, "index": index, **more}
            for step, more in (
                ("start", {"content_block": block}),
                *[("delta", {"delta": delta}) for delta in deltas],
                ("stop", {}),
            )
        ]
    reason = {
        "stop": "end_turn",
        "length": "max_tokens",
        "tool_calls": "tool_use",
        "content_filter": "refusal",
    }[finish]
    return [
        *events,
        {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": {"output_tokens": 20}},
        {"type": "message_stop"},
    ]


STREAMS = {
    "chat/completions": chat_stream,
    "responses": responses_stream,
    "messages": messages_stream,
}


def answering(*parts, finish="stop"):
    """Return a `respond` that streams `parts`, in the format asked in, with usage if asked for."""

    def respond(exchange):
        events = STREAMS[exchange.format](parts, finish)
        asked = (exchange.body.get("stream_options") or {}).get("include_usage")
        if exchange.format == "chat/completions" and not asked:
            del events[-2]
        exchange.begin()
        exchange.send(*events)

    return respond


answer_text = answering(("text", "Hel"), ("text", "lo "), ("text", "w\u00f6r\u2028ld"))


def failing(status, body, content_type="application/json", **headers):
    """Return a `respond` that refuses."""

    def respond(exchange):
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        exchange.begin(status, content_type, Content_Length=str(len(data)), **headers)
        exchange.wfile.write(data)

    return respond


# ------------------------------------------------------------------------ a login as it really is
# For TLS on loopback; known to everybody, trusted by nobody.
KEY_PAIR = """-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIE5Lw+ExRn9L3ku3YmVJschrt4TY58QVutQn8LZuHa/woAoGCCqGSM49AwEHoUQDQgAEnmwtqVyvqaiZ6sJBWlgu
jm0FZpGguYj5rr2H7zA3qMlgwlE3ROmieUAAqkhy/pGVcV7Wx9ESuYtjt1tIuYC7PA==
-----END EC PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBFDCBuwIUT6MwgKnZEAVfe4pHnizW6rnizdkwCgYIKoZIzj0EAwIwDDEKMAgGA1UEAwwBeDAgFw0yNjExMjQyMjE5MzZa
GA8yMTI2MTAzMTIyMTkzNlowDDEKMAgGA1UEAwwBeDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABJ5sLalcr6momerCQVpY
Lo5tBWaRoLmI+a69h+8wN6jJYMJRN0TponlAAKpIcv6RlXFe1sfRErmLY7dbSLmAuzwwCgYIKoZIzj0EAwIDSAAwRQIgPq2n
XdFd99hcKjspygq8xuPbu2ZKG8e80hn2Pu8+KNECIQCdGKLWSqgTmb5X5QJcHEy4TXaX+jh3rGZYh2FuInY9kg==
-----END CERTIFICATE-----
"""
COPILOT, CHATGPT = "api.githubcopilot.com", "chatgpt.com"
# What GitHub lists: a name, its endpoints, the most tokens of an answer, reasoning efforts.
OFFERS = (
    ("gpt-5-mini", "/chat/completions /responses", 64000, "low medium high"),
    ("gpt-5.4-mini", "/responses", 128000, "low medium high xhigh"),
    ("claude-sonnet-4.6", "/v1/messages /chat/completions", 32000, "low high"),
    ("claude-opus-4.6", "/v1/messages", 8000, ""),
    ("gemini-2.5-pro", "/chat/completions", 64000, ""),
)
LIVE = {
    "chat/completions": "github-copilot/gemini-2.5-pro",
    "responses": CHAT,
    "messages": MESSAGES,
    "chatgpt": "openai/gpt-5.4",
}
LIMITS = {name: limit for name, _, limit, _ in OFFERS}
CHATGPT_REFUSES = {"max_output_tokens", "temperature", "top_p", "user", "metadata"}
# What the services refuse: ChatGPT or a format of GitHub's, whether it does, what it says then.
RULES = (
    (CHATGPT, lambda body: not body.get("instructions"), "Instructions are required"),
    (CHATGPT, lambda body: body.get("store") is not False, "Store must be set to false"),
    (CHATGPT, lambda body: CHATGPT_REFUSES & body.keys(), "Unsupported parameter"),
    ("responses", lambda body: body.get("max_output_tokens", 16) < 16, "max: below 16"),
    ("messages", lambda body: body["max_tokens"] > LIMITS[body["model"]], "max_tokens"),
    ("messages", lambda body: {"temperature", "top_p"} <= body.keys(), "not both"),
)


def offer(row):
    """Return a model as GitHub lists it."""
    name, endpoints, limit, efforts = row
    supports = {
        "streaming": True,
        "tool_calls": True,
        "vision": True,
        "parallel_tool_calls": True,
        **({"reasoning_effort": efforts.split()} if efforts else {}),
    }
    limits = {
        "max_context_window_tokens": 200000,
        "max_prompt_tokens": 128000,
        "max_output_tokens": limit,
    }
    return {
        "id": name,
        "name": name,
        "version": name,
        "object": "model",
        "vendor": "any",
        "model_picker_enabled": True,
        "policy": {"state": "enabled"},
        "supported_endpoints": endpoints.split(),
        "capabilities": {"type": "chat", "family": name, "limits": limits, "supports": supports},
    }


class Services(Upstream):
    """A CONNECT proxy to the services that a login leads to; `hosts` are what was asked for."""

    def __init__(self):
        self.hosts, self.context = [], ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(KEY_PAIR)
            file.flush()
            self.context.load_cert_chain(file.name)
        super().__init__()

    def login(self):
        chatgpt = {**OAUTH, "access": "a.b.c", "expires": 99999999999999, "accountId": "account"}
        return (
            {"github-copilot": OAUTH, "openai": chatgpt},
            {},
            {
                "HTTPS_PROXY": self.url,
                "NO_PROXY": "127.0.0.1,localhost",
                "NODE_TLS_REJECT_UNAUTHORIZED": "0",
            },
        )


# ---------------------------------------------------------------------------------------- proxies
def settings(**changes):
    """Return the settings of a command line without arguments, with `changes`."""
    values = proxy.read_settings([])
    vars(values).update({"host": "127.0.0.1", "port": 0, **changes})
    return values


def chat_body(content="hi", **fields):
    return json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode()


class Client:
    """What an app does with the proxy at a port of loopback."""

    def __init__(self, port):
        self.port = port

    def request(self, method, path, body=None, headers=None):
        """Return (status, headers, body) of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        with contextlib.closing(connection):
            body = json.dumps(body) if isinstance(body, (dict, list)) else body
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def chat(self, content="hi", **fields):
        """Return (status, answer) of a chat request that is not streamed."""
        status, _, data = self.request("POST", "/v1/chat/completions", chat_body(content, **fields))
        return status, json.loads(data)

    def content(self, content="hi", **fields):
        """Return the text that answers a chat request."""
        status, answer = self.chat(content, **fields)
        assert status == 200, (status, answer)
        return answer["choices"][0]["message"]["content"]

    def stream(self, content="hi", **fields):
        """Return what is in the SSE events of a streamed chat request: objects and "[DONE]"."""
        body = chat_body(content, stream=True, **fields)
        status, _, data = self.request("POST", "/v1/chat/completions", body)
        assert status == 200, (status, data)
        return sse_events(data)

    def send(self, content="hi", after=b"", **fields):
        """Return a connection on which a chat request was sent, and then the bytes `after`."""
        body = chat_body(content, **fields)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE)
        connection.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body + after)
        return connection

    def health(self):
        """Return what /health tells, its HTTP status included."""
        status, _, data = self.request("GET", "/health")
        return {"http": status, **json.loads(data)}

    def becomes(self, seconds=DEADLINE, **expected):
        """Tell whether /health comes to tell what is `expected`."""
        return eventually(lambda: expected.items() <= self.health().items(), seconds)


class Running(Client):
    """A proxy in this process, proven."""

    def __init__(self, opencode_path, **changes):
        values = settings(**changes)
        self.pool = proxy.Pool(proxy.Opencode(opencode_path, values.model), values, None)
        self.server = proxy.ProxyServer(values, self.pool)
        super().__init__(self.server.server_port)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()
        try:
            self.pool.prove()
        except BaseException:
            self.close()
            raise

    def close(self):
        if self.thread.is_alive():
            self.server.stop(0, time.sleep)
            self.thread.join()


def sse_events(data):
    """Return what is in the events of an SSE stream; fail on what is no event and no comment."""
    events = []
    for block in data.decode().split("\n\n"):
        if block.startswith("data: "):
            events.append(block[6:] if block == "data: [DONE]" else json.loads(block[6:]))
        elif block and not block.startswith(":"):
            raise AssertionError(f"not an event: {block!r}")
    return events


def deltas_of(events):
    """Return the deltas of the chunks among `events`."""
    return [
        choice["delta"]
        for event in events
        if event != "[DONE]"
        for choice in event.get("choices", ())
    ]


def children(parent=None):
    """Return [pid, state, command] of each descendant of this process, or of `parent`."""
    command = ["ps", "-eo", "pid=,ppid=,stat=,args="]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode()
    rows = [line.split(None, 3) for line in output.splitlines()]
    family = {str(parent or os.getpid())}
    for _ in range(9):  # generations
        family.update(row[0] for row in rows if row[1] in family)
    return [
        [int(pid), state, args]
        for pid, above, state, args in rows
        if above in family and args != " ".join(command)
    ]


def opencode_pids(parent=None):
    """Return the processes of opencode, without zombies, that serve this process or `parent`."""
    return [
        pid
        for pid, state, args in children(parent)
        if "acp" in args.split() and not state.startswith("Z")
    ]


def clean_environment():
    """Return this process's environment without what would change a proxy or an opencode."""
    foreign = re.compile(r"XDG_.*_HOME|OPENCODE.*|FAKE_MODE|.*_API_KEY|(?i:.*_proxy)")
    return {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}


def real_opencode():
    try:
        return proxy.find_opencode(os.environ.get("OPENCODE_PROXY_TEST_OPENCODE"))
    except proxy.StartError:
        missing("opencode")


def make_home(folder, upstream, **config):
    """Make a HOME whose opencode is logged in at `upstream`; return the environment for it."""
    logins, own_config, variables = upstream.login()
    for path, content in (
        (".local/share/opencode/auth.json", logins),
        (".config/opencode/opencode.json", {**own_config, **config}),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    return {"HOME": str(folder), **variables}


class RealCase(unittest.TestCase):
    """A proxy with the real opencode and a provider, shared by the tests of a class."""

    provider = Upstream
    changes = {"requests_per_process": 40, "timeout": 30.0}

    @classmethod
    def setUpClass(cls):
        path = real_opencode()
        with contextlib.ExitStack() as stack:
            cls.folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            cls.upstream = cls.provider()
            stack.callback(cls.upstream.close)
            variables = {**clean_environment(), **make_home(cls.folder, cls.upstream)}
            stack.enter_context(unittest.mock.patch.dict(os.environ, variables, clear=True))
            stack.enter_context(unittest.mock.patch.object(proxy, "log", lambda text: None))
            cls.proxy = Running(path, **cls.changes)
            stack.callback(cls.proxy.close)
            cls.addClassCleanup(stack.pop_all().close)

    def setUp(self):
        self.upstream.respond = answer_text
        self.upstream.exchanges.clear()

    def exchange(self):
        """Return the one exchange with the provider that the test led to."""
        self.assertEqual(len(self.upstream.exchanges), 1)
        return self.upstream.exchanges[0]


# -------------------------------------------------------------------------------- a fake opencode
# Speaks as opencode with the plugin does, and is its own provider. It does what it is told in
# Python: by FAKE_MODE when it starts, by the last user message where that begins with "do "; any
# other message is the answer itself. A journal beside it tells what happened.
FAKE = r"""
import json, os, queue, signal, subprocess, sys, threading, time

ACP = sys.argv[1] == "acp"  # otherwise it lists the models
NAMES, VERSION = ["github-copilot/gpt-5-mini", "local/m"], "1.18.33"
LOADS = WARMS = True
DEAF = DIES = False  # when it has got the first line of a request
ABLE = dict.fromkeys(("temperature", "reasoning", "attachment", "toolcall"), True)
ENTRY = {"api": {"id": "any", "url": "", "npm": "x"}, "limit": {"output": 0},
         "capabilities": {**ABLE, "input": {}, "output": {}}}
HERE = os.path.dirname(os.path.abspath(__file__))
OUT, SESSIONS = threading.Lock(), {}

def note(*words):
    with open(HERE + "/journal", "a") as journal:
        journal.write(" ".join(map(str, words)) + "\n")
def write(text, descriptor=1):
    with OUT:
        os.write(descriptor, text.encode())
def out(**message):
    write(json.dumps({"jsonrpc": "2.0", **message}, separators=(",", ":")) + "\n")
def chunk(delta, finish=None, **more):
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return "data: " + json.dumps({"id": "x", "choices": choices, **more}) + "\n\n"
class Session:
    ahead, text, begun = 0, "", False
    def __init__(self, name, model):
        self.name, self.model, self.lines = name, model, queue.Queue()
        self.cancelled = threading.Event()
    def cancel(self):
        note("cancelled", os.getpid(), self.text[:60])
        self.cancelled.set()
        self.lines.put(None)
    def rest(self, seconds):
        if self.cancelled.wait(seconds):
            raise InterruptedError
    def hold(self):  # until the test lets go
        while not os.path.exists(HERE + "/go"):
            self.rest(0.02)
    def line(self):
        line = self.lines.get()
        self.rest(0)
        return line
    def tell(self, kind, **params):
        out(method="proxy/" + kind, params={"sessionId": self.name, **params})
    def data(self, text):
        if not self.begun:
            self.begun = True
            self.tell("upstream", status=200, headers={})
        for start in range(0, len(text), 60000):
            piece = text[start:start + 60000]
            if self.ahead > 1 << 20:
                note("waits", self.name)
            while self.ahead > 1 << 20:
                self.rest(0.02)
            self.ahead += len(piece)
            self.tell("data", text=piece, size=len(piece))
    def say(self, text):
        self.data(chunk({"content": text}))
    def run(self, number):
        try:
            self.turn()
            out(id=number, error={"code": -32603, "message": "Internal error: over"})
        except InterruptedError:
            out(id=number, result={"stopReason": "cancelled"})
        del SESSIONS[self.name]
    def turn(self):
        if self.line().get("warmup"):
            return WARMS and self.tell("warm")
        if DIES:
            os._exit(3)
        theirs = {"model": self.model.partition("/")[2], "stream": True}
        self.tell("outgoing", url="http://127.0.0.1/chat/completions", body=theirs)
        text = self.text = self.line()["messages"][-1]["content"]
        note("post", os.getpid(), text[:60])
        own = {"data": self.data, "say": self.say, "rest": self.rest, "hold": self.hold}
        code = text[3:] if text.startswith("do ") else "say(%r)" % text
        exec(code, {**globals(), **own})
        usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), 1)
        self.data(chunk({}, "stop", usage=usage) + "data: [DONE]\n\n")
        self.tell("end")
def listen():
    for line in FIFO:
        try:
            kind, name, payload = line.decode().rstrip("\n").split(" ", 2)
            session, payload = SESSIONS[name], json.loads(payload)
        except (ValueError, KeyError):
            continue  # broken off, or of a session that is over
        if kind == "taken":
            session.ahead -= payload
        elif kind != "headers":
            session.lines.put(payload)
        if DEAF and kind == "turn" and "warmup" not in payload:
            return note("deaf", os.getpid())
def serve(number, method, params):
    session, result = SESSIONS.get(params.get("sessionId")), {}
    if method == "initialize":
        LOADS and out(method="proxy/loaded", params={})
        result = {"agentInfo": {"version": VERSION}}
    elif method == "session/new":
        name = "ses_%d_%d" % (os.getpid(), number)
        model = json.loads(os.environ["OPENCODE_CONFIG_CONTENT"])["model"]
        SESSIONS[name] = Session(name, model)
        options = [{"value": name} for name in NAMES]
        offer = {"id": "model", "currentValue": model, "options": options}
        result = {"sessionId": name, "configOptions": [offer]}
    elif method == "session/set_model":
        session.model = params["modelId"]
    elif method == "session/cancel":
        return session and session.cancel()
    else:
        return threading.Thread(target=session.run, args=(number,), daemon=True).start()
    out(id=number, result=result)

if ACP:
    note("start", os.getpid())
exec(os.environ.get("FAKE_MODE", ""))
if not ACP:
    for provider, model in (name.split("/") for name in NAMES):
        entry = {**ENTRY, "id": model, "providerID": provider}
        print(provider + "/" + model, json.dumps(entry), sep="\n")
    sys.exit()
FIFO = open(os.environ["OPENCODE_PROXY_FIFO"], "rb")
threading.Thread(target=listen, daemon=True).start()
for message in map(json.loads, sys.stdin.buffer):
    if "method" in message:
        serve(message.get("id"), message["method"], message["params"])
    else:
        note("reply", message["error"]["message"])
os._exit(0)
"""
# Messages that it obeys.
PID = "do say(str(os.getpid()))"
DIE = "do say('a'); write('last words\\n', 2); os._exit(3)"
PAUSE = "do say('a'); rest(600)"
SLOWLY = "do for n in range(2000): say('%d ' % n); rest(0.05)"


class FakeCase(unittest.TestCase):
    """A proxy with the fake opencode, new for every test, of which nothing may be left."""

    def setUp(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.stack.callback(self.assert_nothing_left, threading.enumerate())
        self.folder = pathlib.Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.mode = lambda words: os.environ.update(FAKE_MODE=words)  # of fakes that start then
        self.let_go = (self.folder / "go").touch  # lets the answers go on that hold()
        self.tmp, self.fake = self.folder / "tmp", self.folder / "opencode"
        self.auth = self.folder / ".local/share/opencode/auth.json"
        self.auth.parent.mkdir(parents=True)
        self.auth.write_text("{}")
        self.tmp.mkdir()
        self.patch(tempfile, tempdir=str(self.tmp))
        self.fake.write_text(f"#!{sys.executable} -IS\n{FAKE}")
        self.fake.chmod(0o700)
        variables = {**clean_environment(), "HOME": str(self.folder)}
        self.stack.enter_context(unittest.mock.patch.dict(os.environ, variables, clear=True))
        self.logged = []
        self.patch(proxy, log=self.logged.append)
        self.background = self.stack.enter_context(concurrent.futures.ThreadPoolExecutor(64))

    def patch(self, target, **values):
        """Give attributes of `target` other values until the test ends."""
        self.stack.enter_context(unittest.mock.patch.multiple(target, **values))

    def start(self, **changes):
        """Return a running proxy, without spares where `changes` want none."""
        running = Running(str(self.fake), **{"spares": 0, **changes})
        self.stack.callback(running.close)
        return running

    def journal(self, kind, text=""):
        """Return what the fakes noted with `text`: start, post, cancelled, reply, deaf or waits."""
        journal = self.folder / "journal"
        lines = journal.read_text().splitlines() if journal.exists() else []
        return [line[len(kind) + 1 :] for line in lines if line.startswith(kind) and text in line]

    def assert_nothing_left(self, before):
        def left():
            threads = set(threading.enumerate()).difference(before)
            return [*threads, *children(), *self.tmp.glob("*")]

        self.assertTrue(eventually(lambda: not left(), SOON), left())


# ------------------------------------------------------------------------------------------- errors
class ErrorTest(unittest.TestCase):
    def seen(self, status, body, headers=()):
        error = proxy.upstream_error(status, dict(headers), body)
        return error.status, error.message, error.type, error.param, error.code, error.headers

    def test_upstream_error(self):
        answered, bad = "The model's provider answered ", "invalid_request_error"
        whole = '{"error":{"message":"slow","type":"tokens","param":"p","code":"rate"}}'
        anthropic = '{"type":"error","error":{"type":"authentication_error","message":"key"}}'
        page = (
            "<html><head><title>502 Bad</title><style>p{}</style></head>"
            "<body><p>gate\nway</p></body></html>"
        )
        for status, body, expected in (
            (429, whole, (429, "slow", "tokens", "p", "rate", {"Retry-After": "7"})),
            (400, '{"error":{"message":"no","code":17}}', (400, "no", bad, None, None)),
            (401, anthropic, (401, "key", "authentication_error", None, None, {})),
            (403, '{"error":"forbidden"}', (403, "forbidden", "permission_error")),
            (429, '{"message":"slow"}', (429, "slow", "rate_limit_error")),
            (422, '{"detail":"wrong"}', (422, "wrong", bad)),
            (404, '[{"error":{"message":"gone","code":404}}]', (404, "gone", bad)),
            (400, '{"message":"no","n":' + "9" * 9999 + "}", (400, "no", bad)),
            (502, page, (502, answered + "502 Bad Gateway: 502 Bad gate way", "server_error")),
            (500, "", (500, answered + "500 Internal Server Error", "server_error")),
            (599, '{"error":null}', (599, answered + '599 error: {"error":null}')),
            (302, "[1]", (502, answered + "302 Found: [1]", "server_error", None, None)),
        ):
            headers = {"retry-after": "7"} if status == 429 else {}
            self.assertEqual(self.seen(status, body, headers)[: len(expected)], expected)

    def test_hostile_bodies_take_linear_time(self):
        cut_off = (
            "<html><style>" + "p{}" * 9000 + "</style><p>Unicorn!"
            '<img src="data:image/png;base64,' + "A" * 9000
        )
        self.assertEqual(
            self.seen(502, cut_off)[1], "The model's provider answered 502 Bad Gateway: Unicorn!"
        )
        for piece in ("<", "<script", "<style><", "<a", "[", '{"a":', "9", " ", "<!--", "</script"):

            def seconds(count):
                started = time.process_time()
                self.assertEqual(self.seen(500, piece * count)[0], 500)
                return time.process_time() - started

            few = min(seconds(4000) for _ in range(3))  # quadratic: 256 times as long
            self.assertLess(min(seconds(64000) for _ in range(3)), 100 * few + 0.02, piece)

    def test_turn_error(self):
        closed, advice = "The socket was closed.", " For more information, pass `verbose: true` in"
        for error, message, code in (
            ({"message": "Internal error: x"}, "The answer failed: x", "upstream_failed"),
            ({}, "The answer failed: opencode gave no reason", "upstream_failed"),
            (
                {"message": "No. Was there a typo in the url or port?"},
                "The answer failed: No.",
                "upstream_failed",
            ),
            (
                {"network": "ECONNRESET", "message": closed + advice},
                "The connection to the model's provider failed: " + closed,
                "upstream_unreachable",
            ),
        ):
            found = proxy.turn_error(error)
            self.assertEqual((found.status, found.message, found.code), (502, message, code))


# ------------------------------------------------------------------------------------------ request
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
CUSTOM_CALL = {"id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
FILE = {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:a/b;base64,AAAA"}}
TEXT = {"type": "text", "text": "a"}
TOOL = {"type": "function", "function": {"name": "f"}}
CUSTOM_TOOL = {"type": "custom", "custom": {"name": "f"}}
MAX_INT = (1 << 31) - 1


def changed(part, **fields):
    """Return a content part with other fields below its type."""
    return {**part, part["type"]: {**part[part["type"]], **fields}}


def allowed(*tools, mode="auto"):
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


GOOD = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "developer", "content": [TEXT]},
        {"role": "user", "content": ""},
        {"role": "user", "content": [], "name": "n"},
        {"role": "user", "content": [changed(IMAGE, url="HTTPS://x/y", detail="low")]},
        {"role": "user", "content": [TEXT, IMAGE, changed(IMAGE, detail=None), AUDIO, FILE]},
        {"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}], "unknown": [1]},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CUSTOM_CALL]},
        {"role": "assistant", "tool_calls": [{"id": "c", "function": CALL["function"]}]},
        {"role": "assistant", "tool_calls": None, "function_call": None},
        {"role": "assistant"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "tool", "tool_call_id": "c", "content": []},
        {"role": "tool", "tool_call_id": "c", "content": [TEXT, IMAGE]},
        {"role": "assistant", "function_call": CALL["function"]},
        {"role": "function", "name": "f", "content": "r"},
    ],
    "tools": [
        changed(TOOL, parameters={}),
        {"type": "web_search", "x": 1},
        changed(TOOL, parameters=None),
        changed(CUSTOM_TOOL, format={"type": "text"}),
    ],
    "tool_choice": allowed(TOOL, CUSTOM_TOOL, mode="required"),
    "functions": [{"name": "f"}],
    "stop": ["x"] * proxy.MAX_STOP_SEQUENCES,
    "n": proxy.MAX_CHOICES,
    "max_tokens": MAX_INT,
    "max_completion_tokens": MAX_INT,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "json_schema", "json_schema": {}},
}
GOOD_CHOICES = {
    "none": "none",
    "auto": "auto",
    "required": "required",
    "a function": TOOL,
    "a custom tool": CUSTOM_TOOL,
    "a function without a type": {"function": {"name": "f"}},
    "allowed tools": allowed(CUSTOM_TOOL),
}


def message(**fields):
    """Return the field of a request that has one message, the user's unless `fields` say else."""
    return {"messages": [{"role": "user", "content": "x", **fields}]}


def one(name, *items):
    """Return the field of a request that is a list."""
    return {name: list(items)}


# What is wrong in a request: the param that names it, and the fields of the body.
BAD_MESSAGES = {
    "a text": ("messages", {"messages": "x"}),
    "none": ("messages", {"messages": []}),
    "an empty object": ("messages", {"messages": {}}),
    "an object": ("messages", {"messages": {"a": 1}}),
    "a number": ("messages[0]", one("messages", 1)),
    "no content": ("messages[0].content", one("messages", {"role": "user"})),
    "no role": ("messages[0].role", one("messages", {"content": "x"})),
    "a null as content": ("messages[0].content", message(content=None)),
    "a list as role": ("messages[0].role", message(role=["user"])),
    "a result without an id": ("messages[0].tool_call_id", message(role="tool")),
    "a function's answer without a name": ("messages[0].name", message(role="function")),
    "an unknown role": (
        "messages[1].role",
        one("messages", {"role": "assistant"}, {"role": "robot"}),
    ),
    "a call without arguments": (
        "messages[0].function_call.arguments",
        message(function_call={"name": "f"}),
    ),
}
BAD_CONTENTS = {
    "a number": ("", 1),
    "a text as part": ("[0]", ["x"]),
    "an unknown type": ("[1].type", [TEXT, {"type": "video"}]),
    "a list as type": ("[0].type", [{"type": ["text"]}]),
    "a text without text": ("[0].text", [{"type": "text"}]),
    "an image that is a text": ("[0].image_url", [{"type": "image_url", "image_url": "x"}]),
    "an image in a file": ("[0].image_url.url", [changed(IMAGE, url="file:///etc/passwd")]),
    "a number as detail": ("[0].image_url.detail", [changed(IMAGE, detail=1)]),
    "a file without a file": ("[0].file", [{"type": "file"}]),
    "audio without a format": ("[0].input_audio.format", [changed(AUDIO, format=None)]),
    "a list as file": ("[0].file.file_data", [changed(FILE, file_data=[])]),
}
BAD_CALLS = {
    "an object": ("", {}),
    "a text": ("", ""),
    "a number": ("[0]", [1]),
    "no id": ("[0].id", [{}]),
    "a number as id": ("[1].id", [CALL, {"id": 1}]),
    "no function": ("[0].function", [{"id": "c"}]),
    "an unknown type": ("[0].type", [{"id": "c", "type": "x"}]),
    "a list as type": ("[0].type", [{"id": "c", "type": ["custom"]}]),
    "no arguments": ("[0].function.arguments", [changed(CALL, arguments=None)]),
    "an object as arguments": ("[0].function.arguments", [changed(CALL, arguments={})]),
    "no name": ("[0].custom.name", [changed(CUSTOM_CALL, name=None)]),
    "no input": ("[0].custom.input", [changed(CUSTOM_CALL, input=None)]),
}
BAD_TOOLS = {
    "a number": ("[0]", [1]),
    "no type": ("[0].type", [{}]),
    "no function": ("[0].function", [{"type": "function"}]),
    "no name": ("[0].function.name", [changed(TOOL, name=None)]),
    "a list as parameters": ("[0].function.parameters", [changed(TOOL, parameters=[])]),
    "no custom tool": ("[1].custom", [{"type": "web_search"}, {"type": "custom"}]),
    "a number as name": ("[0].custom.name", [changed(CUSTOM_TOOL, name=1)]),
}
BAD_CHOICES = {
    "an unknown mode": ("", "maybe"),
    "no mode": ("", ""),
    "an empty object": (".function", {}),
    "an unknown type": (".type", {"type": "mcp"}),
    "a list as type": (".type", {"type": ["function"]}),
    "a flat function": (".function", {"type": "function", "name": "f"}),
    "a text as function": (".function", {"type": "function", "function": "f"}),
    "a number as name": (".function.name", {"function": {"name": 1}}),
    "no custom tool": (".custom", {"type": "custom"}),
    "no name": (".custom.name", changed(CUSTOM_TOOL, name=None)),
    "nothing allowed": (".allowed_tools", {"type": "allowed_tools"}),
    "an unknown mode of allowed tools": (".allowed_tools.mode", allowed(TOOL, mode="any")),
    "no allowed tools": (".allowed_tools.tools", changed(allowed(), tools=None)),
    "an allowed tool without a function": (
        ".allowed_tools.tools[1].function",
        allowed(TOOL, {}),
    ),
    "an allowed tool of an unknown type": (
        ".allowed_tools.tools[0].type",
        allowed({"type": "mcp"}),
    ),
}
BAD_OTHERS = {
    "no choices": ("n", {"n": 0}),
    "too many choices": ("n", {"n": proxy.MAX_CHOICES + 1}),
    "no tokens": ("max_tokens", {"max_tokens": 0}),
    "fewer than no tokens": ("max_tokens", {"max_tokens": -1}),
    "too many tokens": ("max_tokens", {"max_tokens": MAX_INT + 1}),
    "far too many tokens": ("max_completion_tokens", {"max_completion_tokens": 10**30}),
    "no tokens of a completion": ("max_completion_tokens", {"max_completion_tokens": 0}),
    "too many sequences": ("stop", {"stop": ["x"] * (proxy.MAX_STOP_SEQUENCES + 1)}),
    "a number as sequence": ("stop[1]", {"stop": ["a", 1]}),
    "no format": ("response_format.type", {"response_format": {}}),
    "an unknown format": ("response_format.type", {"response_format": {"type": "yaml"}}),
    "a list as format": ("response_format.type", {"response_format": {"type": ["text"]}}),
    "no schema": ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
    "a function without a name": ("functions[0].name", {"functions": [{}]}),
    "a number as function": ("functions[1]", {"functions": [{"name": "f"}, 1]}),
    "a text as parameters": (
        "functions[0].parameters",
        {"functions": [{"name": "f", "parameters": "x"}]},
    ),
    "an unknown mode of functions": ("function_call", {"function_call": "maybe"}),
    "a function's choice without a name": ("function_call.name", {"function_call": {}}),
}
LONG_NUMBER = b"9" * (proxy.MAX_DIGITS + 1)
NOT_JSON = {
    "nothing": (b"", "JSON"),
    "an open brace": (b"{", "JSON"),
    "half a word": (b"nul", "JSON"),
    "more than JSON": (b"{}\0", "JSON"),
    "an array": (b"[]", "object"),
    "a text": (b'"x"', "object"),
    "a byte that is no UTF-8": (b"\xff{}", "utf-8"),
    "a surrogate as UTF-8": (b'{"a":"\xed\xa0\x80"}', "utf-8"),
    "NaN": (b'{"a":NaN}', "NaN"),
    "Infinity": (b'{"a":-Infinity}', "Infinity"),
    "a number beyond a float": (b'{"a":1e999}', "1e999 is no number"),
    "deep arrays": (b"[" * 100000, "recursion"),
    "deep objects": (b'{"a":' * 100000, "recursion"),
    "a long number": (LONG_NUMBER, "too long"),
    "a long negative number": (b"-" + LONG_NUMBER, "too long"),
    "a number of 9 MB": (b"9" * 9000000, "too long"),
    "a fraction of 9 MB": (b'{"a":0.' + b"9" * 9000000, "too long"),
}
LEGACY_MESSAGES = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": None, "function_call": CALL["function"]},
    {"role": "function", "name": "f", "content": "r"},
    {"role": "assistant", "content": "x", "function_call": None},
]
MODERN_MESSAGES = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "call_1"}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "r"},
    {"role": "assistant", "content": "x"},
]
FUZZ_RUNS = int(os.environ.get("OPENCODE_PROXY_TEST_FUZZ", "5000"))
FUZZ_WORDS = ("", "x", "text", "function", "custom", "\ud800", "[NaN]", "1e999")
FUZZ_VALUES = (None, True, 0, -1, 1.5, [], {}, [None], {"a": None}, [[]], 10**30, *FUZZ_WORDS)
FUZZ_KEYS = (
    "text",
    "refusal",
    "type",
    "function",
    "name",
    "arguments",
    "content",
    "file",
    "image_url",
    "json_schema",
    "tool_calls",
    "tool_choice",
    "function_call",
)


def damage(seeded, target):
    """Put something else somewhere into a JSON value."""
    while isinstance(target, (dict, list)) and target:
        keys = list(target) if isinstance(target, dict) else range(len(target))
        key = seeded.choice(keys)
        if not isinstance(target[key], (dict, list)) or seeded.random() < 0.3:
            if isinstance(target, dict) and seeded.random() < 0.2:
                key = seeded.choice(FUZZ_KEYS)
            target[key] = json.loads(json.dumps(seeded.choice(FUZZ_VALUES)))
            return
        target = target[key]


def damaged(seeded, data):
    """Return a JSON body with some of its bytes, or of its values, changed."""
    if seeded.random() < 0.3:
        changed_data = bytearray(data)
        for _ in range(seeded.randint(1, 8)):
            changed_data[seeded.randrange(len(data))] = seeded.randrange(256)
        return bytes(changed_data)
    body = json.loads(data)
    for _ in range(seeded.randint(1, 4)):
        damage(seeded, body)
    return json.dumps(body).encode()


class RequestTest(unittest.TestCase):
    def parse(self, **fields):
        return proxy.parse_chat_request(chat_body(**fields))

    def assert_invalid(self, data, param=None, text=""):
        with self.assertRaises(proxy.APIError) as caught:
            proxy.parse_chat_request(data)
        error = caught.exception
        self.assertEqual(
            (error.status, error.type, error.param),
            (400, "invalid_request_error", param),
        )
        self.assertIn(text, error.message)
        self.assertLess(len(error.message), 300)

    def assert_all_invalid(self, table, field=None):
        """Check the rows of a table; those of a `field` hold its value and what is below it."""
        for name, (param, fields) in table.items():
            with self.subTest(name):
                if field is not None:
                    param = field + param
                    value = {field.rpartition(".")[2]: fields}
                    fields = message(**value) if "." in field else value
                self.assert_invalid(chat_body(**fields), param)

    def test_nulls_and_an_empty_model_mean_nothing(self):
        request = self.parse(temperature=None, model="")
        messages = [{"role": "user", "content": "hi"}]
        self.assertEqual(request.body, {"messages": messages, "model": ""})
        self.assertEqual(
            request,
            proxy.ChatRequest(
                body=request.body,
                messages=messages,
                model=None,
                stream=False,
                include_usage=False,
                choices=1,
                stop=(),
                max_tokens=None,
                legacy_functions=False,
            ),
        )

    def test_fields_are_read(self):
        request = self.parse(
            model="m",
            stream=True,
            n=2,
            stop="x",
            stream_options={"include_usage": True},
            max_tokens=5,
            any={"goes": 1},
        )
        self.assertEqual(
            request,
            proxy.ChatRequest(
                body=request.body,
                messages=[{"role": "user", "content": "hi"}],
                model="m",
                stream=True,
                include_usage=True,
                choices=2,
                stop=("x",),
                max_tokens=5,
                legacy_functions=False,
            ),
        )
        self.assertEqual(request.body["any"], {"goes": 1})

    def test_the_newer_limit_counts(self):
        self.assertEqual(self.parse(max_tokens=5, max_completion_tokens=7).max_tokens, 7)

    def test_empty_stop_sequences_mean_nothing(self):
        self.assertEqual(self.parse(stop=["a", "", "b"]).stop, ("a", "b"))

    def test_good_values_pass_unchanged(self):
        body = self.parse(**GOOD).body
        for name in ("tools", "stop", "response_format", "tool_choice"):
            self.assertEqual(body[name], GOOD[name], name)
        self.parse(response_format={"type": "json_object"})

    def test_good_choices_pass_unchanged(self):
        for name, choice in GOOD_CHOICES.items():
            with self.subTest(name):
                self.assertEqual(self.parse(tool_choice=choice).body["tool_choice"], choice)

    def test_bad_messages(self):
        self.assert_all_invalid(BAD_MESSAGES)
        self.assert_invalid(b'{"messages":null}', "messages", "messages is required")

    def test_bad_contents(self):
        self.assert_all_invalid(BAD_CONTENTS, "messages[0].content")

    def test_bad_calls(self):
        self.assert_all_invalid(BAD_CALLS, "messages[0].tool_calls")

    def test_bad_tools(self):
        self.assert_all_invalid(BAD_TOOLS, "tools")

    def test_bad_choices_of_tools(self):
        self.assert_all_invalid(BAD_CHOICES, "tool_choice")

    def test_other_bad_fields(self):
        self.assert_all_invalid(BAD_OTHERS)
        self.assert_invalid(chat_body(max_tokens=0), "max_tokens", "from 1 to 2147483647")

    def test_bad_kinds(self):
        for name, kinds in proxy.FIELDS.items():
            for value in (True, 1, 1.5, "1", [], {}):
                if type(value) in kinds or (type(value) is int and float in kinds):
                    continue
                with self.subTest(name, value=value):
                    self.assert_invalid(chat_body(**{name: value}), name, f"{name} must be a")
        self.assert_invalid(chat_body(top_p="1"), "top_p", "top_p must be a number")
        self.assert_invalid(chat_body(stop=1), "stop", "stop must be a string or an array")

    def test_what_is_no_json(self):
        for name, (data, text) in NOT_JSON.items():
            with self.subTest(name):
                self.assert_invalid(data, text=text)

    def test_json_of_every_kind_is_read(self):
        self.assertEqual(proxy.parse_json_object(b'\xef\xbb\xbf{"a":-1.5e1}'), {"a": -15.0})
        longest = -int(b"9" * proxy.MAX_DIGITS)
        self.assertEqual(self.parse(seed=longest).body["seed"], longest)

    def test_functions_become_tools(self):
        function = {"name": "f", "parameters": {}}
        request = self.parse(
            functions=[function], function_call={"name": "f"}, messages=LEGACY_MESSAGES
        )
        self.assertTrue(request.legacy_functions)
        self.assertEqual(
            request.body,
            {
                "tools": [{"type": "function", "function": function}],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
                "messages": MODERN_MESSAGES,
            },
        )
        self.assertIs(request.messages, request.body["messages"])

    def test_a_mode_of_functions_is_one_of_tools(self):
        self.assertEqual(self.parse(functions=[], function_call="none").body["tool_choice"], "none")

    def test_functions_beside_tools_mean_nothing(self):
        request = self.parse(functions=[{"name": "f"}], function_call="none", tools=[])
        self.assertFalse(request.legacy_functions)
        self.assertEqual(set(request.body), {"messages", "tools"})

    def test_whatever_comes_is_a_request_that_javascript_can_read_or_a_400(self):
        seeded = random.Random(4141)
        good = chat_body(**GOOD)
        for _ in range(FUZZ_RUNS):
            data = damaged(seeded, good)
            try:
                json.dumps(proxy.parse_chat_request(data).body, allow_nan=False)
            except proxy.APIError as error:
                self.assertEqual(error.status, 400, data)


# ------------------------------------------------------------------------------------- command line
class SettingsTest(unittest.TestCase):
    def settings(self, *arguments, **environment):
        with unittest.mock.patch.dict(os.environ, environment):
            return proxy.read_settings(arguments)

    def assert_refused(self, text, *arguments, **environment):
        with (
            unittest.mock.patch.object(sys, "stderr") as stderr,
            self.assertRaises(SystemExit) as caught,
        ):
            self.settings(*arguments, **environment)
        self.assertEqual(caught.exception.code, 2)
        self.assertIn(text, stderr.write.call_args.args[0])

    def test_defaults(self):
        expected = {
            "host": "0.0.0.0",
            "port": 4141,
            "model": None,
            "api_key": [],
            "spares": 1,
            "max_concurrency": 64,
            "max_queue": 64,
            "requests_per_process": 1,
        }
        settings = vars(self.settings())
        self.assertEqual({**settings, **expected}, settings)

    def test_bad_values(self):
        for arguments in (
            "--port x",
            "--port 70000",
            "--timeout 0",
            "--timeout nan",
            "--max-concurrency 0",
            "--requests-per-process 0",
            "--model bare",
            "--model /m",
            "--spares -1",
            "--api-key-file /no/such/file",
            "--api-key-file " + os.devnull,
            "--api-key-file ",
            "--api-key ",
            "--nonsense",
            "--systemd-unit x",
        ):
            self.assert_refused("error: ", *arguments.split(" "))
        self.assert_refused("argument --port: invalid int value: 'x'", OPENCODE_PROXY_PORT="x")
        for key in ("", " ", "\n"):  # it would let everybody in
            self.assert_refused("argument --api-key: empty", OPENCODE_PROXY_API_KEY=key)
            self.assert_refused("argument --api-key: empty", "--api-key", key, "--api-key", "k")
            self.assert_refused("argument --api-key-file: ", OPENCODE_PROXY_API_KEY_FILE=key)
        self.assertEqual(self.settings("--api-key", "k", OPENCODE_PROXY_API_KEY="").api_key, ["k"])

    def test_environment_and_options(self):
        for name, value, expected in (
            ("port", "7", 7),
            ("port", "", 4141),
            ("model", "p/m", "p/m"),
            ("grace", "1", 1.0),
            ("max_body_size", "9", 9),
            ("verbose", "1", True),
            ("verbose", "0", False),
            ("api_key", "a b", ["a", "b"]),
            ("cors_origin", "", []),
            ("cors_origin", "https://A.x/ *", ["https://a.x", "*"]),
        ):
            variable = {"OPENCODE_PROXY_" + name.upper(): value}
            self.assertEqual(getattr(self.settings(**variable), name), expected)
        settings = self.settings(
            "--port",
            "8",
            "--api-key",
            "c",
            "--api-key",
            "d",
            OPENCODE_PROXY_PORT="7",
            OPENCODE_PROXY_API_KEY="a",
        )
        self.assertEqual((settings.port, settings.api_key), (8, ["c", "d"]))
        with tempfile.NamedTemporaryFile() as keys:
            pathlib.Path(keys.name).write_text("one\ntwo\n")
            settings = self.settings("--api-key", "c", OPENCODE_PROXY_API_KEY_FILE=keys.name)
            self.assertEqual(settings.api_key, ["c", "one", "two"])
            self.assert_refused("empty", "--api-key-file", keys.name, OPENCODE_PROXY_API_KEY="")


class SystemdTest(unittest.TestCase):
    def test_units(self):
        odd = '/opt/$HOME 100%/open"code'
        with (
            unittest.mock.patch.dict(os.environ, {"HOME": "/h$o", "XDG_DATA_HOME": "/d$x y"}),
            unittest.mock.patch.object(sys, "executable", "/py$thon"),
        ):
            user, system = (proxy.systemd_unit(kind, odd) for kind in ("user", "system"))
        for unit in (user, system):
            self.assertIn('opencode_proxy.py --opencode "/opt/$$HOME 100%%/open\\"code"\n', unit)
            self.assertIn("\nExecStart=/py$thon ", unit)
            self.assertIn("\nKillMode=mixed\n", unit)
            self.assertIn("\nNoNewPrivileges=yes\n", unit)
            self.assertNotRegex(unit, r"[{}]|  ")
        self.assertNotIn("network-online", user)
        for line in (
            "Environment=HOME=/h$o",
            'ReadWritePaths="-/d$x y/opencode"',
            "After=network-online.target",
            "CapabilityBoundingSet=",
            "PrivateTmp=yes",
            "SystemCallFilter=@system-service",
            "WantedBy=multi-user.target",
        ):
            self.assertIn(f"\n{line}\n", system)

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is missing")
    def test_systemd_takes_them(self):
        with tempfile.TemporaryDirectory() as folder:
            program = pathlib.Path(folder, "open $code %")
            program.touch(0o700)
            for kind in ("user", "system"):
                path = pathlib.Path(folder, f"opencode-proxy-{kind}.service")
                with unittest.mock.patch.object(sys, "executable", str(program)):
                    path.write_text(proxy.systemd_unit(kind, str(program)))
                done = subprocess.run(
                    ["systemd-analyze", "verify", "--" + kind, "--man=no", str(path)],
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    check=False,
                    env={**os.environ, "XDG_RUNTIME_DIR": folder},
                )
                mine = [line for line in done.stdout.splitlines() if path.name in line]
                self.assertEqual((done.returncode, mine), (0, []), done.stdout)

    def test_notify(self):
        with tempfile.TemporaryDirectory() as folder:
            for name in (f"{folder}/notify", "@opencode-proxy-test"):
                if name.startswith("@") and sys.platform != "linux":
                    continue
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                    manager.bind(re.sub("^@", "\0", name))
                    manager.settimeout(DEADLINE)
                    with unittest.mock.patch.dict(os.environ, {"NOTIFY_SOCKET": name}):
                        proxy.notify("READY=1")
                    self.assertEqual(manager.recv(100), b"READY=1")
        proxy.notify("READY=1")


class ReadmeTest(unittest.TestCase):
    text = (HERE / "README.md").read_text(encoding="utf-8")
    VARIABLE = r"\bX\b|^opencode|0\.0\.0\.0:4141: Address.*|64|300 seconds|github-copilot|1\.17\.0"

    def test_it_tells_of_every_field_and_quotes_the_program(self):
        rows = self.text.partition("| field |")[2].partition("\n\n")[0]
        self.assertEqual([name for name in proxy.FIELDS if f"`{name}`" not in rows], [])
        program = (HERE / "opencode_proxy.py").read_text(encoding="utf-8")
        program = re.sub(r'"\s+f?"', "", program)  # of texts that are split over lines
        table = self.text.partition("| message |")[2].partition("\n\n")[0].splitlines()[2:]
        quoted = re.findall("`([^`]+)`", "\n".join(row.split("|")[1] for row in table))
        pieces = [piece.strip() for text in quoted for piece in re.split(self.VARIABLE, text)]
        self.assertGreater(len(pieces), 10)
        self.assertEqual([piece for piece in pieces if piece not in program], [])


# ------------------------------------------------------------------------------------- wire formats
WIRE_PNG = "data:image/png;base64,QUJD"
AT_CHAT, AT_RESPONSES, AT_MESSAGES = (
    "https://x.example/v1/" + path for path in ("chat/completions", "responses", "messages")
)
AT_CHATGPT = "https://chatgpt.com/backend-api/codex/responses"
WARM, COLD = proxy.Model("p/m"), proxy.Model("p/m", takes_temperature=False)
FUNCTION = {"name": "f", "parameters": {"properties": {"2": {}, "1": {}}, "type": "object"}}
TOOLS = [{"type": "function", "function": function} for function in (FUNCTION, {"name": "g"})]
GRAMMAR = {"type": "grammar", "grammar": {"syntax": "lark"}}
CUSTOM = {"type": "custom", "custom": {"name": "c", "format": GRAMMAR}}
ARGUMENTS = '{"b":1.0,\n"a":12345678901234567890}'
USER, SYSTEM = {"role": "user", "content": "q"}, {"role": "system", "content": "s"}
MARK = {"cache_control": {"type": "ephemeral"}}
DONE = {"role": "tool", "tool_call_id": "c", "content": "r"}
WIRE_IMAGE = {"type": "image_url", "image_url": {"url": WIRE_PNG}}
PDF = {"file_data": "data:application/pdf;base64,UERG", "filename": "a.pdf"}
OBJECT = {"type": "object"}
SCHEMA = {"name": "n", "strict": True, "schema": OBJECT}


def text(words, kind="text"):
    return {"type": kind, "text": words}


def said(role, *content):
    return {"role": role, "content": list(content)}


def asks(call_id, arguments, kind="function"):
    inner = {"name": "f", {"function": "arguments", "custom": "input"}[kind]: arguments}
    return {"role": "assistant", "tool_calls": [{"id": call_id, "type": kind, kind: inner}]}


def wire(url=AT_CHAT, messages=(USER,), model=WARM, **fields):
    body = json.dumps({"messages": list(messages), **fields}).encode()
    target = proxy.target_of(url, model)
    return target.wire_format(proxy.parse_chat_request(body), target)


def events(url, *messages, **fields):
    """Return the deltas, with logprobs if any, that messages mean, and the last event."""
    form = wire(url, **fields)
    data = [part if isinstance(part, str) else json.dumps(part) for part in messages]
    *found, last = [event for datum in data for event in form.events(datum)]
    return [event[:2] if event.logprobs else event.delta for event in found], last


def usage_of(prompt, completion, cached=0, reasoning=0):
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def error(function, *arguments):
    """Return the status, param and message of the error that a call raises."""
    try:
        list(function(*arguments))
    except proxy.APIError as error:
        return error.status, error.param, error.message
    raise AssertionError("no error")


# Everything that a conversation can hold and the three formats have.
CONVERSATION = (
    SYSTEM,
    said(
        "user",
        text("look"),
        {"type": "image_url", "image_url": {"url": WIRE_PNG, "detail": "low"}},
        {"type": "file", "file": PDF},
    ),
    {"content": "ok", **asks("c.1", ARGUMENTS)},
    asks("c2", ""),
    USER,
    {**DONE, "tool_call_id": "c.1", "content": [text("r"), WIRE_IMAGE]},
    {**DONE, "tool_call_id": "c2", "content": ""},
    said("developer", text("d")),
    {"role": "assistant", "content": None, "refusal": "no"},
    said("user", text("\ud800 \u2028é")),
)
FIELDS = {
    "temperature": 0.5,
    "top_p": 0.9,
    "max_tokens": 50,
    "stop": ["\n", "END"],
    "user": "u",
    "tools": TOOLS,
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "n": 2,
    "response_format": {"type": "json_schema", "json_schema": SCHEMA},
    "seed": 7,
    "reasoning_effort": "low",
    "metadata": {"k": "v"},
    "stream": True,
    "verbosity": "low",
}
THEIRS = {
    "model": "real",
    "stream": True,
    "max_tokens": 32000,
    "temperature": 1,
    "tools": [{}],
    "prompt_cache_key": "ses_1",
    "service_tier": "flex",
}


# What the three formats make of them.
CHAT_BODY = {
    "model": "real",
    "service_tier": "flex",
    "usage": {"include": True},
    **{name: value for name, value in FIELDS.items() if name != "n"},
    "messages": list(CONVERSATION),
    "stream_options": {"include_usage": True},
}
RESPONSES_BODY = {
    "model": "real",
    "stream": True,
    "service_tier": "flex",
    "store": False,
    "include": ["i"],
    "reasoning": {"effort": "low"},
    "temperature": 0.5,
    "top_p": 0.9,
    "max_output_tokens": 50,
    "user": "u",
    "metadata": {"k": "v"},
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "text": {
        "verbosity": "low",
        "format": {"type": "json_schema", "name": "n", "strict": True, "schema": OBJECT},
    },
    "tools": [
        {"type": "function", "strict": False, **FUNCTION},
        {
            "type": "function",
            "name": "g",
            "strict": False,
            "parameters": {"type": "object", "properties": {}},
        },
    ],
    "input": [
        said("system", text("s", "input_text")),
        said(
            "user",
            text("look", "input_text"),
            {"type": "input_image", "image_url": WIRE_PNG, "detail": "low"},
            {"type": "input_file", **PDF},
        ),
        said("assistant", text("ok", "output_text")),
        {"type": "function_call", "call_id": "c.1", "name": "f", "arguments": ARGUMENTS},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": ""},
        said("user", text("q", "input_text")),
        {
            "type": "function_call_output",
            "call_id": "c.1",
            "output": [
                text("r", "input_text"),
                {"type": "input_image", "image_url": WIRE_PNG},
            ],
        },
        {"type": "function_call_output", "call_id": "c2", "output": ""},
        said("developer", text("d", "input_text")),
        said("assistant", {"type": "refusal", "refusal": "no"}),
        said("user", text("\ud800 \u2028é", "input_text")),
    ],
}
PNG_BLOCK = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"},
}
PDF_BLOCK = {
    "type": "document",
    "source": {"type": "base64", "media_type": "application/pdf", "data": "UERG"},
    "title": "a.pdf",
}
MESSAGES_BODY = {
    "model": "real",
    "stream": True,
    "service_tier": "flex",
    "temperature": 0.5,
    "max_tokens": 50,
    "stop_sequences": ["END"],
    "metadata": {"user_id": "u"},
    "tools": [
        {"name": "f", "input_schema": FUNCTION["parameters"]},
        {"name": "g", "input_schema": {"type": "object"}},
    ],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    "output_config": {
        "effort": "low",
        "format": {"type": "json_schema", "schema": OBJECT},
    },
    "system": [text("s"), {**text("d"), **MARK}],
    "messages": [
        said("user", text("look"), PNG_BLOCK, PDF_BLOCK),
        said(
            "assistant",
            text("ok"),
            {
                "type": "tool_use",
                "id": "c_1",
                "name": "f",
                "input": {"b": 1.0, "a": 12345678901234567890},
            },
            {"type": "tool_use", "id": "c2", "name": "f", "input": {}},
        ),
        said(
            "user",
            {"type": "tool_result", "tool_use_id": "c_1", "content": [text("r"), PNG_BLOCK]},
            {"type": "tool_result", "tool_use_id": "c2", "content": ""},
            text("q"),
        ),
        said("assistant", text("no")),
        said("user", {**text("\ud800 \u2028é"), **MARK}),
    ],
}
FLAT_CUSTOM = {"type": "custom", "name": "c", "format": {"type": "grammar", "syntax": "lark"}}
NAMED = {"type": "function", "function": {"name": "f"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [CUSTOM]}}
FLAT_ALLOWED = {"type": "allowed_tools", "mode": "auto", "tools": [FLAT_CUSTOM]}
THINKING = {"type": "enabled", "budget_tokens": 99}
LINKED_FILE = {"type": "file", "file": {"file_data": "https://x"}}


class Row(NamedTuple):
    """What a client and opencode ask for, and what is in the body then (None: it is absent)."""

    name: str
    url: str
    client: dict[str, Any]
    expected: dict[str, Any]
    theirs: dict[str, Any] = {}


BODY_ROWS = (
    Row(
        "a custom tool, and a choice of those allowed",
        AT_RESPONSES,
        {"tools": [CUSTOM], "tool_choice": ALLOWED},
        {"tools": [FLAT_CUSTOM], "tool_choice": FLAT_ALLOWED},
    ),
    Row(
        "a choice without tools",
        AT_RESPONSES,
        {"tool_choice": "none"},
        {"tools": None, "tool_choice": None},
    ),
    Row(
        "log probabilities",
        AT_RESPONSES,
        {"logprobs": True},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 0},
    ),
    Row(
        "log probabilities beside what opencode includes",
        AT_RESPONSES,
        {"logprobs": True, "top_logprobs": 2},
        {"include": ["i", "message.output_text.logprobs"], "top_logprobs": 2},
        {"include": ["i"]},
    ),
    Row(
        "a call of a custom tool",
        AT_RESPONSES,
        {"messages": [asks("c", "i", "custom"), DONE]},
        {
            "input": [
                {"type": "custom_tool_call", "call_id": "c", "name": "f", "input": "i"},
                {"type": "custom_tool_call_output", "call_id": "c", "output": "r"},
            ]
        },
    ),
    Row(
        "a user who says nothing, on /responses",
        AT_RESPONSES,
        {"messages": [said("user")]},
        {"input": [said("user", text("", "input_text"))]},
    ),
    Row(
        "opencode's limit, and no tools",
        AT_MESSAGES,
        {},
        {"max_tokens": 32000, "tool_choice": None},
        {"max_tokens": 128000},
    ),
    Row(
        "room to think beside the client's limit",
        AT_MESSAGES,
        {"max_tokens": 1},
        {"max_tokens": 100, "thinking": THINKING},
        {"thinking": THINKING},
    ),
    Row(
        "a temperature that only OpenAI has",
        AT_MESSAGES,
        {"temperature": 2},
        {"temperature": 1},
    ),
    Row(
        "a choice of a function",
        AT_MESSAGES,
        {"tools": TOOLS, "tool_choice": NAMED},
        {"tool_choice": {"type": "tool", "name": "f"}},
    ),
    Row(
        "no tool, and not several at once",
        AT_MESSAGES,
        {"tools": TOOLS, "tool_choice": "none", "parallel_tool_calls": False},
        {"tool_choice": {"type": "none"}},
    ),
    Row(
        "a user who says nothing",
        AT_MESSAGES,
        {"messages": [said("user", text(" "))]},
        {"messages": [said("user", {**text("."), **MARK})]},
    ),
    Row(
        "a file at a URL",
        AT_MESSAGES,
        {"messages": [said("user", LINKED_FILE)]},
        {
            "messages": [
                said(
                    "user",
                    {"type": "document", "source": {"type": "url", "url": "https://x"}, **MARK},
                )
            ]
        },
    ),
)
HEARD = {"type": "input_audio", "input_audio": {"data": "x", "format": "mp3"}}
FILE_BY_ID = {"type": "file", "file": {"file_id": "i"}}
BAD_ARGUMENTS = {
    "cut off": '{"a":',
    "an array": "[]",
    "NaN": '{"a":NaN}',
    "a surrogate": "\ud800",
    "too deep": "[" * 100000,
}
# What has no place in a format, and the param of the 400 that says so.
NO_PLACE = {
    "audio": (AT_RESPONSES, said("user", HEARD), {}, "messages[0]"),
    "a file by its id": (AT_MESSAGES, said("user", FILE_BY_ID), {}, "messages[0]"),
    "a call of a custom tool": (AT_MESSAGES, asks("c", "i", "custom"), {}, "messages[0]"),
    "a custom tool": (AT_MESSAGES, USER, {"tools": [CUSTOM]}, "tools[0]"),
    "a choice of those allowed": (AT_MESSAGES, USER, {"tool_choice": ALLOWED}, "tool_choice"),
    "nothing but a system's text": (AT_MESSAGES, SYSTEM, {}, "messages"),
}
# The same for formats that only opencode knows: it is handed nothing but text.
NO_TEXT = {
    "tools": (USER, {"tools": TOOLS}, "tools"),
    "a tool's result": (DONE, {}, "messages"),
    "a format": (USER, {"response_format": {"type": "json_object"}}, "response_format"),
    "an image": (said("user", WIRE_IMAGE), {}, "messages"),
}


class BodyTest(unittest.TestCase):
    """An encoder says in its format what the client says in chat completions."""

    maxDiff = None

    def test_chat_completions_has_everything(self):
        theirs = {**THEIRS, "usage": {"include": True}}
        body = wire(AT_CHAT, CONVERSATION, **FIELDS).body(theirs)
        self.assertEqual(json.loads(body), CHAT_BODY)

    def test_responses_has_everything(self):
        theirs = {**THEIRS, "store": False, "include": ["i"], "reasoning": {"effort": "low"}}
        body = wire(AT_RESPONSES, CONVERSATION, **FIELDS).body(theirs)
        self.assertEqual(json.loads(body), RESPONSES_BODY)

    def test_messages_has_everything(self):
        theirs = {**THEIRS, "output_config": {"effort": "low"}}
        body = wire(AT_MESSAGES, CONVERSATION, **FIELDS).body(theirs)
        self.assertEqual(json.loads(body), MESSAGES_BODY)

    def test_arguments_keep_their_bytes(self):
        body = wire(AT_CHAT, CONVERSATION).body({})
        self.assertIn(('"arguments":' + json.dumps(ARGUMENTS)).encode(), body)

    def test_numbers_and_the_order_of_names_stay(self):
        body = wire(AT_MESSAGES, CONVERSATION, **FIELDS).body({})
        self.assertIn(b'"input":{"b":1.0,"a":12345678901234567890}', body)
        self.assertIn(b'"properties":{"2":{},"1":{}}', body)

    def test_text_is_utf8_and_a_lone_surrogate_is_escaped(self):
        body = wire(AT_CHAT, CONVERSATION).body({})
        self.assertIn('"\\ud800 \u2028é"'.encode(), body)

    def test_fields_and_messages(self):
        for row in BODY_ROWS:
            with self.subTest(row.name):
                body = json.loads(wire(row.url, **row.client).body(row.theirs))
                found = {name: body.get(name) for name in row.expected}
                self.assertEqual(found, row.expected)

    def test_a_body_can_be_made_twice(self):
        for url in (AT_CHAT, AT_RESPONSES, AT_MESSAGES, AT_CHATGPT):
            with self.subTest(url):
                form = wire(url, [SYSTEM, USER, {"role": "assistant", "content": "a "}], **FIELDS)
                self.assertEqual(form.body(THEIRS), form.body(THEIRS))

    def test_what_has_no_place_is_a_400_that_names_the_field(self):
        for name, (url, message, fields, param) in NO_PLACE.items():
            with self.subTest(name):
                status, found, _ = error(wire(url, [message], **fields).body, {})
                self.assertEqual((status, found), (400, param))

    def test_what_is_no_text_is_a_400_where_only_opencode_knows_the_format(self):
        for name, (message, fields, param) in NO_TEXT.items():
            with self.subTest(name):
                request = wire(AT_CHAT, [message], **fields).request
                status, found, _ = error(proxy.foreign_conversation, request)
                self.assertEqual((status, found), (400, param))

    def test_arguments_that_are_no_object_are_a_400(self):
        for name, arguments in BAD_ARGUMENTS.items():
            with self.subTest(name):
                form = wire(AT_MESSAGES, [asks("c", arguments)])
                status, param, _ = error(form.body, {})
                self.assertEqual((status, param), (400, "messages[0].tool_calls"))

    def test_text_for_a_format_that_only_opencode_knows(self):
        form = wire(AT_CHAT, [SYSTEM, USER, USER], temperature=0.5, max_tokens=9, tools=[])
        self.assertEqual(
            proxy.foreign_conversation(form.request),
            {
                "system": ["s"],
                "conversation": [{"role": "user", "parts": [text("q"), text("q")]}],
                "params": {"temperature": 0.5, "maxOutputTokens": 9},
                "effort": None,
            },
        )

    def test_opencode_gets_the_least_that_it_makes_headers_from(self):
        picture = said("user", WIRE_IMAGE)
        for name, messages, is_agent, has_image in (
            ("a user", [USER], False, False),
            ("an image", [picture], False, True),
            ("a result", [picture, asks("c", "{}"), DONE], True, True),
            ("a system's text behind the user's", [USER, SYSTEM], False, False),
            ("only a system's text", [SYSTEM], False, False),
        ):
            with self.subTest(name):
                request = wire(AT_CHAT, messages, reasoning_effort="low").request
                expected = proxy.stub_conversation(is_agent, has_image, "low")
                self.assertEqual(proxy.chat_conversation(request), expected)


# ------------------------------------------------------------------------------------------- quirks
GPT_5 = proxy.Model("github-copilot/gpt-5-mini")
MISTRAL = proxy.Model("mistral/m")
SAMPLING = {"temperature": 0.5, "top_p": 0.9}
CALLED = said("assistant", {"type": "tool_use", "id": "c", "name": "f", "input": {}})
THOUGHT = said("assistant", {"type": "thinking", "thinking": "t", "signature": "s"})
RESULT = said("user", {"type": "tool_result", "tool_use_id": "c", "content": "r"})
SYSTEM_ITEM = said("system", text("a", "input_text"), text("b", "input_text"))
HELLO_ITEM = said("user", text("q", "input_text"))
# What chatgpt.com needs besides, so that the other quirks change nothing.
CHATGPT_NEEDS = {"instructions": "i", "store": False}


class QuirkRow(NamedTuple):
    """What a quirk makes of a body at a target; equal: it leaves it as it is."""

    quirk: str
    name: str
    url: str
    before: dict[str, Any]
    after: dict[str, Any]
    model: proxy.Model = WARM


QUIRK_ROWS = (
    QuirkRow(
        "rename_max_tokens",
        "GPT-5 at Copilot",
        AT_CHAT,
        {"max_tokens": 9},
        {"max_completion_tokens": 9},
        GPT_5,
    ),
    QuirkRow(
        "rename_max_tokens",
        "both limits",
        AT_CHAT,
        {"max_tokens": 9, "max_completion_tokens": 8},
        {"max_completion_tokens": 8},
        proxy.Model("github-copilot/o4-mini"),
    ),
    QuirkRow(
        "rename_max_tokens",
        "GPT-4 at Copilot",
        AT_CHAT,
        {"max_tokens": 9},
        {"max_tokens": 9},
        proxy.Model("github-copilot/gpt-4o"),
    ),
    QuirkRow(
        "rename_max_tokens",
        "GPT-5 elsewhere",
        AT_CHAT,
        {"max_tokens": 9},
        {"max_tokens": 9},
        proxy.Model("openrouter/gpt-5"),
    ),
    QuirkRow(
        "drop_stream_options",
        "the provider",
        AT_CHAT,
        {"stream_options": {"include_usage": True}},
        {},
        MISTRAL,
    ),
    QuirkRow(
        "drop_stream_options",
        "the host",
        "https://api.mistral.ai/v1/chat/completions",
        {"stream_options": {"include_usage": True}},
        {},
    ),
    QuirkRow(
        "drop_stream_options",
        "a host that is called like it",
        "https://notmistral.ai/v1/chat/completions",
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": True}},
    ),
    QuirkRow(
        "say_effort_once",
        "both words",
        AT_CHAT,
        {"reasoning": {"effort": "low"}, "reasoning_effort": "low"},
        {"reasoning_effort": "low"},
    ),
    QuirkRow(
        "say_effort_once",
        "one word",
        AT_CHAT,
        {"reasoning": {"effort": "low"}},
        {"reasoning": {"effort": "low"}},
    ),
    QuirkRow("drop_sampling", "/responses", AT_RESPONSES, SAMPLING, {}, COLD),
    QuirkRow(
        "drop_sampling",
        "/messages",
        AT_MESSAGES,
        {"messages": [USER], **SAMPLING},
        {"messages": [USER]},
        COLD,
    ),
    QuirkRow("drop_sampling", "a model that takes it", AT_RESPONSES, SAMPLING, SAMPLING),
    QuirkRow(
        "raise_max_output_tokens",
        "too few",
        AT_RESPONSES,
        {"max_output_tokens": 1},
        {"max_output_tokens": 16},
    ),
    QuirkRow(
        "raise_max_output_tokens",
        "enough",
        AT_RESPONSES,
        {"max_output_tokens": 17},
        {"max_output_tokens": 17},
    ),
    QuirkRow(
        "raise_max_output_tokens",
        "a null",
        AT_RESPONSES,
        {"max_output_tokens": None},
        {"max_output_tokens": None},
    ),
    QuirkRow(
        "take_system_messages_as_instructions",
        "at the beginning",
        AT_CHATGPT,
        {
            "input": [SYSTEM_ITEM, said("developer", text("c", "input_text")), HELLO_ITEM],
            "store": False,
        },
        {"input": [HELLO_ITEM], "instructions": "a\n\nb\n\nc", "store": False},
    ),
    QuirkRow(
        "take_system_messages_as_instructions",
        "in the middle",
        AT_CHATGPT,
        {"input": [HELLO_ITEM, {"role": "system", "content": "a"}], **CHATGPT_NEEDS},
        {"input": [HELLO_ITEM, {"role": "developer", "content": "a"}], **CHATGPT_NEEDS},
    ),
    QuirkRow(
        "take_system_messages_as_instructions",
        "nothing else",
        AT_CHATGPT,
        {"input": [{"role": "system", "content": "a"}], "store": False},
        {
            "input": [{"role": "developer", "content": "a"}],
            "instructions": "Answer the user.",
            "store": False,
        },
    ),
    QuirkRow(
        "add_instructions",
        "none",
        AT_CHATGPT,
        {"input": [HELLO_ITEM], "store": False},
        {"input": [HELLO_ITEM], "instructions": "Answer the user.", "store": False},
    ),
    QuirkRow(
        "store_nothing",
        "asked to store",
        AT_CHATGPT,
        {"instructions": "i", "store": True},
        CHATGPT_NEEDS,
    ),
    QuirkRow(
        "drop_what_chatgpt_refuses",
        "all of it",
        AT_CHATGPT,
        {**CHATGPT_NEEDS, **SAMPLING, "max_output_tokens": 99, "user": "u", "metadata": {}},
        CHATGPT_NEEDS,
    ),
    QuirkRow(
        "think_only_with_earlier_thoughts",
        "a call without them",
        AT_MESSAGES,
        {"messages": [USER, CALLED, RESULT], "thinking": THINKING},
        {"messages": [USER, CALLED, RESULT]},
    ),
    QuirkRow(
        "think_only_with_earlier_thoughts",
        "a result without a call",
        AT_MESSAGES,
        {"messages": [RESULT], "thinking": THINKING},
        {"messages": [RESULT]},
    ),
    QuirkRow(
        "think_only_with_earlier_thoughts",
        "a call with them",
        AT_MESSAGES,
        {"messages": [USER, THOUGHT, RESULT], "thinking": THINKING},
        {"messages": [USER, THOUGHT, RESULT], "thinking": THINKING},
    ),
    QuirkRow(
        "think_only_with_earlier_thoughts",
        "a model that thinks when it wants to",
        AT_MESSAGES,
        {"messages": [CALLED, RESULT], "thinking": {"type": "adaptive"}},
        {"messages": [CALLED, RESULT], "thinking": {"type": "adaptive"}},
    ),
    QuirkRow(
        "drop_sampling_while_thinking",
        "told to think",
        AT_MESSAGES,
        {"messages": [USER], "thinking": THINKING, **SAMPLING},
        {"messages": [USER], "thinking": THINKING},
    ),
    QuirkRow(
        "drop_sampling_while_thinking",
        "told not to think",
        AT_MESSAGES,
        {"messages": [USER], "thinking": {"type": "disabled"}, "top_p": 0.9},
        {"messages": [USER], "thinking": {"type": "disabled"}, "top_p": 0.9},
    ),
    QuirkRow(
        "choose_temperature_or_top_p",
        "both",
        AT_MESSAGES,
        {"messages": [USER], **SAMPLING},
        {"messages": [USER], "temperature": 0.5},
    ),
    QuirkRow(
        "strip_end_of_prefill",
        "a text",
        AT_MESSAGES,
        {"messages": [USER, {"role": "assistant", "content": "a \n"}]},
        {"messages": [USER, {"role": "assistant", "content": "a"}]},
    ),
    QuirkRow(
        "strip_end_of_prefill",
        "blocks",
        AT_MESSAGES,
        {"messages": [USER, said("assistant", text("a "), text("b "))]},
        {"messages": [USER, said("assistant", text("a "), text("b"))]},
    ),
    QuirkRow(
        "strip_end_of_prefill",
        "a user's text",
        AT_MESSAGES,
        {"messages": [{"role": "user", "content": "a "}]},
        {"messages": [{"role": "user", "content": "a "}]},
    ),
)
NATIVE_BODIES = {
    AT_RESPONSES: {
        "model": "p/m",
        "input": [SYSTEM_ITEM, HELLO_ITEM, {"type": "function_call", "call_id": "c"}],
        "tools": [{"type": "function", "name": "f", "parameters": OBJECT}],
        "reasoning": {"effort": "low"},
        "max_output_tokens": 1,
        **SAMPLING,
    },
    AT_MESSAGES: {
        "model": "p/m",
        "system": [text("s")],
        "messages": [USER, CALLED, RESULT, {"role": "assistant", "content": "a "}],
        "tools": [{"name": "f", "input_schema": OBJECT}],
        "thinking": THINKING,
        "max_tokens": 1,
        **SAMPLING,
    },
}
NATIVE_BODIES[AT_CHATGPT] = NATIVE_BODIES[AT_RESPONSES]


def native(url, model=WARM, **fields):
    """Return the exchange for a body that is passed through."""
    wire_format = proxy.target_of(url, model).wire_format
    data = json.dumps({"model": "m", **fields}).encode()
    request = proxy.parse_native_request(data, wire_format, {})
    return proxy.NativeExchange(request, model)


class QuirkTest(unittest.TestCase):
    maxDiff = None

    def test_bodies_before_and_after(self):
        for row in QUIRK_ROWS:
            with self.subTest(row.quirk, row=row.name):
                body = json.loads(json.dumps(row.before))
                proxy.repair(body, proxy.target_of(row.url, row.model))
                self.assertEqual(body, row.after)

    def test_every_quirk_has_a_row_in_which_it_changes_a_body_by_itself(self):
        changing = set()
        for row in QUIRK_ROWS:
            target = proxy.target_of(row.url, row.model)
            for quirk in proxy.QUIRKS:
                body = json.loads(json.dumps(row.before))
                is_its = quirk.repair.__name__ == row.quirk
                if is_its and issubclass(target.wire_format, quirk.wire_format):
                    quirk.repair(body, target)
                if body != row.before:
                    changing.add(row.quirk)
        self.assertEqual({quirk.repair.__name__ for quirk in proxy.QUIRKS} - changing, set())

    def test_a_quirk_says_what_was_observed(self):
        for quirk in proxy.QUIRKS:
            self.assertTrue(quirk.repair.__doc__, quirk.repair.__name__)

    def test_converted_bodies_are_repaired(self):
        fields = {"max_tokens": 1, "temperature": 0.5, "top_p": 0.9}
        for url, expected in (
            (AT_RESPONSES, {"max_output_tokens": 16, "temperature": 0.5, "top_p": 0.9}),
            (AT_CHATGPT, {"instructions": "Answer the user.", "store": False}),
            (AT_MESSAGES, {"max_tokens": 1, "temperature": 0.5}),
        ):
            with self.subTest(url):
                body = json.loads(wire(url, **fields).body({}))
                del body["messages" if url == AT_MESSAGES else "input"]
                self.assertEqual(body, expected)

    def test_bodies_that_are_passed_through_are_repaired(self):
        exchange = native(AT_CHATGPT, input=[HELLO_ITEM], temperature=0.5)
        self.assertEqual(
            json.loads(exchange.body(AT_CHATGPT, {"model": "real", "store": False, "x": 1})),
            {
                "model": "real",
                "store": False,
                "input": [HELLO_ITEM],
                "instructions": "Answer the user.",
            },
        )

    def test_whatever_is_passed_through_is_a_body_or_a_400(self):
        seeded = random.Random(4141)
        for url, fields in NATIVE_BODIES.items():
            good = json.dumps(fields).encode()
            wire_format = proxy.target_of(url, WARM).wire_format
            for _ in range(FUZZ_RUNS // 5):
                data = damaged(seeded, good)
                try:
                    request = proxy.parse_native_request(data, wire_format, {})
                    exchange = proxy.NativeExchange(request, COLD)
                    exchange.conversation(is_foreign=False)
                    json.loads(exchange.body(url, {}))
                except proxy.APIError as error:
                    self.assertEqual(error.status, 400, data)


NATIVE_PICTURE = said("user", PNG_BLOCK)
NATIVE_CONVERSATIONS = {
    "a text": (AT_RESPONSES, {"input": "q"}, False, False),
    "nothing": (AT_RESPONSES, {"input": []}, False, False),
    "a user's item": (AT_RESPONSES, {"input": [HELLO_ITEM]}, False, False),
    "an image": (AT_RESPONSES, {"input": [said("user", {"type": "input_image"})]}, False, True),
    "an output": (AT_RESPONSES, {"input": [{"type": "function_call_output"}]}, True, False),
    "a user's turn": (AT_MESSAGES, {"messages": [USER]}, False, False),
    "an earlier image": (AT_MESSAGES, {"messages": [NATIVE_PICTURE, USER]}, False, True),
    "a result": (AT_MESSAGES, {"messages": [USER, CALLED, RESULT]}, True, False),
    "an assistant's turn": (AT_MESSAGES, {"messages": [USER, CALLED]}, True, False),
}
BAD_NATIVE = {
    "no model": ("model", {"model": None}),
    "a number as model": ("model", {"model": 1}),
    "messages that are a text": ("messages", {"messages": "x"}),
    "a message that is a text": ("messages[0]", {"messages": ["x"]}),
    "no content": ("messages[0].content", {"messages": [{"role": "user"}]}),
    "a content that is a number": ("messages[0].content", {"messages": [{"content": 1}]}),
    "a part that is a text": ("messages[0].content[0]", {"messages": [said("user", "x")]}),
    "an item that is a text": ("input[0]", {"input": ["x"]}),
    "a tool that is a text": ("tools[0]", {"tools": ["x"]}),
    "a limit that is a text": ("max_output_tokens", {"max_output_tokens": "1"}),
    "thinking that is a boolean": ("thinking", {"thinking": True}),
    "a response before": ("previous_response_id", {"previous_response_id": "resp_1"}),
    "work behind the scenes": ("background", {"background": True}),
    "storing": ("store", {"store": True}),
}


class NativeTest(unittest.TestCase):
    """A body in a format's own words goes to the provider as it is, but for quirks."""

    def test_the_client_gets_what_it_says_and_opencode_the_models_name(self):
        exchange = native(AT_MESSAGES, messages=[USER], max_tokens=5, any={"b": 1.0, "a": "\u2028"})
        self.assertEqual(
            exchange.body(AT_MESSAGES, {"model": "real", "tools": [{}], "max_tokens": 9}),
            '{"model":"real","messages":[{"role":"user","content":"q"}],"max_tokens":5,'
            '"any":{"b":1.0,"a":"\u2028"}}'.encode(),
        )

    def test_opencode_gets_the_least_that_it_makes_headers_from(self):
        for name, (url, fields, is_agent, has_image) in NATIVE_CONVERSATIONS.items():
            with self.subTest(name):
                found = native(url, **fields).conversation(is_foreign=False)
                self.assertEqual(found, proxy.stub_conversation(is_agent, has_image))

    def test_what_quirks_rely_on_is_checked(self):
        for name, (param, fields) in BAD_NATIVE.items():
            with self.subTest(name):
                data = json.dumps({"model": "m", **fields}).encode()
                status, found, _ = error(proxy.parse_native_request, data, proxy.Responses, {})
                self.assertEqual((status, found), (400, param))

    def test_a_model_that_speaks_another_format_is_named(self):
        for url, spoken in ((AT_CHAT, "/chat/completions"), ("https://x/v1/odd", "a format of")):
            status, param, text = error(native(AT_MESSAGES, messages=[USER]).body, url, {})
            self.assertEqual((status, param), (400, "model"))
            self.assertIn(f"p/m speaks {spoken}", text)

    def test_what_is_too_deep_is_a_400(self):
        deep = "x"
        for _ in range(sys.getrecursionlimit()):
            deep = [deep]
        request = proxy.NativeRequest({"input": deep}, proxy.Responses, "m", {})
        exchange = proxy.NativeExchange(request, WARM)
        self.assertIn(error(exchange.body, AT_RESPONSES, {})[2], "The body is too deeply nested")


def call_delta(index, arguments, call_id=None, kind="function", **more):
    inner = {"name": "f"} if call_id else {}
    inner[{"function": "arguments", "custom": "input"}[kind]] = arguments
    head = {"id": call_id, "type": kind} if call_id else {}
    return {"tool_calls": [{"index": index, **head, kind: inner, **more}]}


def chunk(finish_reason=None, call=None, **delta):
    delta.update({"tool_calls": [call]} if call else {})
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def event(kind, index=0, item="message", **fields):
    item = {"type": item, "call_id": f"c{index}", "name": "f", **fields}
    return {"type": "response." + kind, "output_index": index, "item": item, **fields}


def block(kind, index, piece=None):
    return {"type": "content_block_" + kind, "index": index, "delta": piece}


ENTRY = {"token": "a", "logprob": -0.5}
CHAT_STREAM = (
    chunk(role="assistant", content="", refusal=None),
    chunk(reasoning_text="r", reasoning_opaque="o"),
    chunk(reasoning="r"),
    {"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [ENTRY]}}]},
    chunk(content=[{"type": "thinking", "thinking": []}, text("b")]),
    chunk(refusal="no", annotations=[1], audio={"id": "a"}),
    chunk(call={"index": 0, "id": "c1", "function": {"name": "f", "arguments": ""}, "more": 1}),
    chunk(call={"index": 0, "id": None, "function": {"arguments": "{}"}}),
    chunk(call={"index": 0, "id": "c2", "function": {"name": "f", "arguments": "1"}}),  # another
    chunk(call={"index": 1, "id": "c3", "type": "custom", "custom": {"name": "f", "input": ""}}),
    chunk(call={"index": 1, "custom": {"input": "x"}}),
    chunk("tool_calls", {"index": 1}),
    {
        "choices": [],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": None,
            "x": 1,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    },
    "[DONE]",
)
RESPONSES_STREAM = (
    event("created", response={}),
    event("reasoning_summary_text.delta", delta="p"),
    event("output_text.delta", delta="a", logprobs=[{**ENTRY, "top_logprobs": [ENTRY]}]),
    event("refusal.delta", delta="no"),
    event("output_item.added", 1, "function_call"),
    event("function_call_arguments.delta", 1, delta="{}"),
    event("output_item.done", 1, "function_call", arguments="{}"),
    event("output_item.added", 2, "function_call"),
    event("output_item.done", 2, "function_call", arguments='{"late":1}'),
    event("output_item.done", 3, "function_call", arguments=""),
    event("output_item.added", 4, "custom_tool_call"),
    event("custom_tool_call_input.delta", 4, delta="x"),
    event(
        "completed",
        response={
            "usage": {
                "input_tokens": 11,
                "output_tokens": 20,
                "input_tokens_details": {"cached_tokens": 4},
                "output_tokens_details": {"reasoning_tokens": 7},
            }
        },
    ),
)
MESSAGES_STREAM = (
    {
        "type": "message_start",
        "message": {
            "usage": {
                "input_tokens": 5,
                "cache_read_input_tokens": 4,
                "cache_creation_input_tokens": 2,
            }
        },
    },
    {"type": "ping"},
    block("delta", 0, {"type": "thinking_delta", "thinking": "r"}),
    block("delta", 0, {"type": "signature_delta", "signature": "s"}),
    block("stop", 0),
    block("start", 1, text("a")),
    block("delta", 1, text("b", "text_delta")),
    block("start", 2, {"type": "tool_use", "id": "c1", "name": "f", "input": {}}),
    block("delta", 2, {"type": "input_json_delta", "partial_json": '{"x":1.0}'}),
    block("stop", 2),
    block("start", 3, {"type": "tool_use", "id": "c2", "name": "f"}),
    block("stop", 3),
    block("start", 4, {"type": "server_tool_use", "id": "s"}),
    block("stop", 4),
    {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use"},
        "usage": {"output_tokens": 20, "input_tokens": None},
    },
    {"type": "message_stop"},
)


class EventTest(unittest.TestCase):
    def test_streams_that_have_everything(self):
        entry = {"bytes": None, **ENTRY, "top_logprobs": [{"bytes": None, **ENTRY}]}
        self.assertEqual(
            events(AT_CHAT, *CHAT_STREAM),
            (
                [
                    {"reasoning_content": "r", "reasoning_opaque": "o"},
                    {"reasoning_content": "r"},
                    ({"content": "a"}, {"content": [ENTRY]}),
                    {"content": "b"},
                    {"refusal": "no", "annotations": [1], "audio": {"id": "a"}},
                    call_delta(0, "", "c1", more=1),
                    call_delta(0, "{}"),
                    call_delta(1, "1", "c2"),
                    call_delta(2, "", "c3", "custom"),
                    call_delta(2, "x", kind="custom"),
                ],
                ({}, None, "tool_calls", {**usage_of(3, 4, 2), "x": 1}),
            ),
        )
        self.assertEqual(
            events(AT_RESPONSES, *RESPONSES_STREAM, logprobs=True),
            (
                [
                    {"reasoning_content": "p"},
                    ({"content": "a"}, {"content": [entry], "refusal": None}),
                    {"refusal": "no"},
                    call_delta(0, "", "c1"),
                    call_delta(0, "{}"),
                    call_delta(1, "", "c2"),
                    call_delta(1, '{"late":1}'),
                    call_delta(2, "", "c3"),
                    call_delta(2, "{}"),
                    call_delta(3, "", "c4", "custom"),
                    call_delta(3, "x", kind="custom"),
                ],
                ({}, None, "tool_calls", usage_of(11, 20, 4, 7)),
            ),
        )
        self.assertEqual(events(AT_RESPONSES, *RESPONSES_STREAM)[0][1], {"content": "a"})
        self.assertEqual(
            events(AT_MESSAGES, *MESSAGES_STREAM),
            (
                [
                    {"reasoning_content": "r"},
                    {"content": "a"},
                    {"content": "b"},
                    call_delta(0, "", "c1"),
                    call_delta(0, '{"x":1.0}'),
                    call_delta(1, "", "c2"),
                    call_delta(1, "{}"),
                ],
                ({}, None, "tool_calls", usage_of(11, 20, 4)),
            ),
        )

    def test_whole_answer_and_calls_without_ids(self):
        calls = [asks("", arguments)["tool_calls"][0] for arguments in "12"]
        (delta,), last = events(
            AT_CHAT,
            {
                "object": "chat.completion",
                "choices": [
                    {"message": {"content": "a", "tool_calls": calls}, "finish_reason": "eos"}
                ],
            },
        )
        for index, told in enumerate(delta["tool_calls"]):
            self.assertRegex(told["id"], "^call_[0-9a-f]{32}$")
            self.assertEqual([told], call_delta(index, "12"[index], told["id"])["tool_calls"])
        self.assertEqual((delta["content"], last), ("a", ({}, None, "stop", None)))

    def test_endings(self):
        cut = event("incomplete", response={"incomplete_details": {"reason": "max_output_tokens"}})
        refused = {"type": "message_stop", "delta": {"stop_reason": "refusal"}}
        self.assertEqual(events(AT_RESPONSES, cut)[1].finish_reason, "length")
        self.assertEqual(events(AT_MESSAGES, refused)[1].finish_reason, "content_filter")

    def test_failures(self):
        for url, data, status, words in (
            *(
                (AT_CHAT, data, 502, "The provider sent bad data")
                for data in ("{no", "[" * 100000, "[]", '{"a":NaN}', {"choices": [1]})
            ),
            (AT_CHAT, "[DONE]", 502, "The provider did not finish its answer"),
            (AT_CHAT, {"error": {"message": "busy", "code": 429}}, 429, "busy"),
            (AT_RESPONSES, event("failed", response={"error": {"message": "m"}}), 502, "m"),
            (AT_MESSAGES, {"type": "error", "error": {"message": "m"}}, 502, "m"),
        ):
            self.assertEqual(error(events, url, data), (status, None, words))

    def test_fuzz(self):
        """Whatever a provider sends, it is events that can be sent on, or an APIError."""
        seeded = random.Random(4141)
        for _ in range(6000):
            url, stream = seeded.choice(
                (
                    (AT_CHAT, CHAT_STREAM),
                    (AT_RESPONSES, RESPONSES_STREAM),
                    (AT_MESSAGES, MESSAGES_STREAM),
                )
            )
            target = messages = json.loads(json.dumps(stream))
            while target and isinstance(target, (dict, list)):
                holder, keys = target, range(len(target)) if isinstance(target, list) else target
                key = seeded.choice(list(keys))
                target = holder[key] if seeded.random() < 0.8 else None
            holder[key] = seeded.choice((None, True, -1, "x", [], {}, [None], {"a": None}, 1.5))
            with contextlib.suppress(proxy.APIError):
                json.dumps(events(url, *messages, logprobs=True), allow_nan=False)

    def test_events_in_every_split(self):
        stream = (
            "data: a\n: hi\n\ndata:b\ndata:  c\nid: 1\n\nevent: x\n\n"
            "data:\n\ndata: \u2028d\n\ndata: e"
        )
        for whole in (stream.replace("\n", ends) for ends in ("\n", "\r", "\r\n")):
            for size in range(1, len(whole) + 1):
                reader, found = proxy.SSEReader(), []
                for start in range(0, len(whole), size):
                    found += reader.feed(whole[start : start + size]) + reader.feed("")
                self.assertEqual(found + reader.end(), ["a", "b\n c", "\u2028d", "e"])
        error(lambda: [reader.feed("data: " + "x" * 1000000) for _ in range(20)])


# --------------------------------------------------------------------------------- exchange, answer
def tell(exchange, *pieces):
    events = [event for piece in pieces for event in exchange.feed(piece)]
    return events if events and events[-1].finish_reason else events + list(exchange.end())


class ExchangeTest(unittest.TestCase):
    CHAT = "https://x/v1/chat/completions"

    def exchange(self, **fields):
        request = proxy.parse_chat_request(chat_body(**fields))
        exchange = proxy.ChatExchange(request, proxy.Model("p/m"))
        exchange.body(self.CHAT, {"model": "m"})
        return exchange

    def content(self, text, finish=None, **more):
        return f"data: {json.dumps(chat_chunk({'content': text}, finish, **more))}\n\n"

    def assert_fails(self, status, text, call, *arguments, **fields):
        with self.assertRaisesRegex(proxy.APIError, text) as caught:
            call(*arguments, **fields)
        self.assertEqual(caught.exception.status, status)

    def test_stop_at_every_split(self):
        for stops, text, shown in (
            (["END"], "some ENEND more", "some EN"),
            (["b", "abc"], "xabcx", "xa"),
            (["abcd", "bc", "c"], "xabcd", "xa"),
            (["aab"], "aaaab", "aa"),
            (["\n\n"], "a\nb\n\nc", "a\nb"),
            ([], "abc", "abc"),
            (["zz"], "abz", "abz"),
        ):
            for pieces in [(text[:at], text[at:]) for at in range(len(text) + 1)] + [tuple(text)]:
                *events, last = tell(
                    self.exchange(stop=stops),
                    *map(self.content, pieces),
                    self.content("", "length"),
                )
                self.assertEqual("".join(event.delta.get("content", "") for event in events), shown)
                self.assertEqual(last.finish_reason, "length" if shown == text else "stop")

    def test_answers(self):
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        answer = self.content("hi", "stop", usage=usage)
        choice = {"message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
        whole = json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage})
        for text in (answer + "data: [DONE]\n\n", answer, answer.rstrip(), whole, "\n" + whole):
            for pieces in ([text], text, [text[:9], text[9:]]):
                first, last, *_ = tell(self.exchange(), *pieces)
                self.assertEqual(first, proxy.Event({"content": "hi"}))
                self.assertEqual(last.finish_reason, "stop")
                self.assertEqual({**last.usage, **usage}, last.usage)
        for text, status, message in (
            ('{"error": {"message": "no", "code": 429}}', 429, "no"),
            ('data: {"error": {"message": "no"}}', 502, "no"),
            ("", 502, "did not finish"),
            (self.content("cut off"), 502, "did not finish"),
            ('{"half": ', 502, "bad data"),
        ):
            self.assert_fails(status, message, tell, self.exchange(), text)
        self.assert_fails(403, "no", self.exchange().refused, 403, {}, '{"error": "no"}')

    def test_cut_at_a_stop_sequence(self):
        cut = self.content("a EN") + self.content("D b") + self.content("c")
        usage = 'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}\n\n'
        for more, counted in (("", None), (usage, 2)):
            *events, last = tell(self.exchange(stop="END"), cut + more)
            self.assertEqual([event.delta["content"] for event in events], ["a ", ""])
            self.assertEqual(
                (last.finish_reason, (last.usage or {}).get("completion_tokens")), ("stop", counted)
            )
        for text, fields, patience in (
            ("", {}, None),
            (cut, {}, proxy.CUT_SECONDS),
            (cut, {"stream": True}, 0.0),
            (self.content("EN", "length"), {"stream": True}, proxy.FINISH_SECONDS),
        ):
            exchange = self.exchange(stop="END", **fields)
            list(exchange.feed(text))
            self.assertEqual(exchange.patience, patience)
        held, last = list(exchange.end())
        self.assertEqual((held.delta, last.finish_reason), ({"content": "EN"}, "length"))


class AnswerTest(unittest.TestCase):
    def answer(self, *events, **fields):
        request = proxy.parse_chat_request(chat_body("x" * 40, **fields))
        answer = proxy.Answer(request, proxy.Model("p/m"))
        return answer, b"".join(answer.take(index, proxy.Event(*event)) for index, *event in events)

    def test_stream(self):
        answer, said = self.answer(
            (0, {"content": "\u00e9"}),
            (0, {}, None, "stop", {"prompt_tokens": 3}),
            stream=True,
            model="m",
            stream_options={"include_usage": True},
        )
        start = answer.tail().decode().partition('],"usage"')[0]
        self.assertRegex(
            start,
            '^data: {"id":"chatcmpl-[0-9a-f]{32}","object":"chat.completion.'
            'chunk","created":[0-9]+,"model":"m","system_fingerprint":"fp_opencode",'
            '"choices":[[]$',
        )
        deltas = {
            '{"role":"assistant","content":""}': "null",
            '{"content":"\\u00e9"}': "null",
            "{}": '"stop"',
        }
        expected = "".join(
            f'{start}{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":'
            f'{finish}}}],"usage":null}}\n\n'
            for delta, finish in deltas.items()
        )
        expected += start + '],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}'
        self.assertEqual(
            (answer.head() + said + answer.tail()).decode(), expected + "\n\ndata: [DONE]\n\n"
        )
        self.assertEqual(self.answer(stream=True)[0].tail(), b"data: [DONE]\n\n")

    def test_whole(self):
        calls = [
            {"id": "c", "type": "function", "function": {"name": name, "arguments": text}}
            for name, text in (("f", "{}"), ("g", "1"))
        ]
        deltas = [
            {"reasoning_content": "th"},
            {"reasoning_content": "ink"},
            {"content": "a"},
            {"tool_calls": [{**calls[0], "index": 0, "function": {"name": "f"}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]},
            {"tool_calls": [{**calls[1], "index": 1}]},
            {"annotations": [{"at": 1}]},
        ]
        events = [*((0, delta, {"content": [1]}) for delta in deltas), (0, {}, None, "tool_calls")]
        answer, said = self.answer(*events, model="other")
        whole = answer.whole()
        self.assertEqual((said, whole["object"], whole["model"]), (b"", "chat.completion", "p/m"))
        message = {
            "role": "assistant",
            "content": "a",
            "refusal": None,
            "tool_calls": calls,
            "reasoning_content": "think",
            "annotations": [{"at": 1}],
        }
        logprobs = {"content": [1] * len(deltas)}
        self.assertEqual(
            whole["choices"],
            [{"index": 0, "finish_reason": "tool_calls", "logprobs": logprobs, "message": message}],
        )
        empty = self.answer((0, {}, None, "stop"))[0].whole()["choices"][0]["message"]
        self.assertEqual(empty, {"role": "assistant", "content": "", "refusal": None})
        old = self.answer(*events, functions=[])[0].whole()["choices"][0]  # has room for one
        self.assertEqual(old["message"].pop("function_call"), calls[0]["function"])
        self.assertEqual(old["finish_reason"], "function_call")

    def test_usage(self):
        told = {
            "prompt_tokens": 5,
            "completion_tokens": 7,
            "total_tokens": 12,
            "cost": 0.5,
            "prompt_tokens_details": {"cached_tokens": 2},
            "is_byok": True,
        }
        for second, *counts, cached in (
            (told, 10, 14, 24, 1.0, 4),
            (None, 16, 10, 26, 0.5, 2),
            ({"prompt_tokens": 1}, 6, 10, 16, 0.5, 2),
        ):
            answer = self.answer(
                (0, {"content": "x"}),
                (1, {"content": "x" * 8}),
                (1, {}, None, "stop", second),
                (0, {}, None, "stop", told),
                n=2,
            )[0]
            expected = dict(zip(told, (*counts, {"cached_tokens": cached}, True)))
            self.assertEqual(answer.usage, expected)


# ------------------------------------------------------------------------------------- the catalog
class CatalogTest(unittest.TestCase):
    def catalog(self, *names, wanted=None):
        able = dict.fromkeys(("temperature", "reasoning", "attachment", "toolcall"), True)
        return proxy.make_catalog(
            [
                {
                    "id": model,
                    "providerID": provider,
                    "api": {"id": model[:1], "npm": "n", "url": "u"},
                    "capabilities": {**able, "input": {}, "output": {}},
                    "limit": {"output": 9},
                    "options": {"serviceTier": "priority"},
                    "headers": {},
                }
                for provider, _, model in (name.partition("/") for name in names)
            ],
            ["login"],
            wanted,
        )

    def test_names(self):
        own, newer = proxy.DEFAULT_MODEL, proxy.SUCCESSORS[0]
        for names, wanted, asked, found in (
            ((newer, own), None, None, own),
            ((newer,), None, None, newer),
            (("a/m", own), "a/m", None, "a/m"),
            ((own, newer), None, newer, newer),
            ((own, newer), None, newer.partition("/")[2], newer),
            ((own,), None, "gpt-x", own),
            ((own,), None, "a/m", 404),
            (("a/m",), None, None, 503),
            ((), "a/m", None, 503),
        ):
            with self.subTest(names=names, wanted=wanted, asked=asked):
                try:
                    self.assertEqual(self.catalog(*names, wanted=wanted).resolve(asked).name, found)
                except proxy.APIError as error:
                    code = {404: "model_not_found", 503: "provider_not_logged_in"}[found]
                    self.assertEqual((error.status, error.code), (found, code))
        with self.assertRaisesRegex(proxy.APIError, "gpt-x"):
            self.catalog(own).resolve("gpt-x", exact=True)

    def test_trimmed(self):
        trimmed = self.catalog("a/m-fast", "a/m", "opencode/free").trimmed
        fast = {"provider": {"body": {"service_tier": "priority"}, "headers": {}}}
        self.assertEqual(trimmed["a"]["models"]["m"]["experimental"], {"modes": {"fast": fast}})


# --------------------------------------------------------------------------------------- processes
class FaultTest(FakeCase):
    """A process that does what it should not; the next request is answered all the same."""

    def fails(self, running, content, status, text):
        got, answer = running.chat(content)
        self.assertEqual(got, status, answer)
        self.assertIn(text, answer["error"]["message"])
        self.assertEqual(running.content("well"), "well")

    def test_child_that_dies(self):
        """What was handed over is not sent twice."""
        running = self.start(spares=1)
        self.fails(running, DIE, 502, "opencode ended: last words")
        orphan = "do subprocess.Popen(['sleep', '5']%s); os._exit(0)"  # that holds the pipes
        for text in ("do os._exit(3)", orphan % "", orphan % ", start_new_session=True"):
            self.fails(running, text, 502, "opencode ended")
        self.assertEqual(len(self.journal("post")), 8)
        events = running.stream(DIE)
        self.assertIn({"content": "a"}, deltas_of(events))
        self.assertEqual((events[-2]["error"]["code"], events[-1]), ("opencode_failed", "[DONE]"))

    def test_what_was_not_handed_over_is_given_to_another_process(self):
        self.mode("DIES = True")
        running = self.start(spares=1)
        self.mode("")
        self.assertEqual(running.content("well"), "well")
        self.assertEqual([len(self.journal(kind)) for kind in ("start", "post")], [2, 1])

    def test_what_comes_over_the_pipes(self):
        """Plugins print anything, anywhere; opencode asks, which is refused; lines have a bound."""
        noise = "write('Segmentation fault\\n\\n{}\\n[1]\\n{\"jsonrpc\"\\nhas printed this')"
        self.mode(f"ACP and {noise}")
        running = self.start()
        self.assertEqual(running.content(f"do {noise}; say('well')"), "well")
        self.fails(running, f"do {noise}; os._exit(3)", 502, "opencode ended: has printed this")
        self.fails(running, "do write('x' * (32 << 20))", 502, "of over 16777216 bytes")
        ask = (
            "do out(id=9, method='fs/read_text_file', params={})\n"
            "while 'reply refused' not in open(HERE + '/journal').read(): rest(0.02)"
        )
        self.assertEqual(running.content(ask), "")
        on_stderr = "do write(('e' * 100000 + '\\n') * 200, 2); say('well')"
        self.assertEqual(running.content(on_stderr), "well")

    def test_silent_child_that_ignores_sigterm(self):
        self.patch(proxy, STOP_SECONDS=0.3)
        self.mode("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
        running = self.start(timeout=0.5, spares=1)
        self.fails(running, "do time.sleep(600)", 504, "sent nothing for 0.5 seconds")
        first = int(self.journal("start")[0])
        self.assertTrue(eventually(lambda: first not in opencode_pids(), SOON))

    def test_pings(self):
        """In the queue, before the first token and between tokens; an error then is an event."""
        self.patch(proxy, PING_SECONDS=0.1)
        running = self.start(max_concurrency=1, timeout=0.8)
        with running.send(SLOWLY):
            self.assertTrue(running.becomes(running=1))
            with running.send("queued", stream=True) as waiting:
                pieces = iter(lambda: waiting.recv(65536), b"")
                self.assertTrue(any(b": keep-alive\n\n" in piece for piece in pieces))
        body = chat_body("do rest(0.3); say('one'); rest(0.3); say('two'); rest(600)", stream=True)
        data = running.request("POST", "/v1/chat/completions", body)[2]
        self.assertTrue(data.startswith(b'data: {"id":"chatcmpl-'), data[:50])
        for piece in re.split(b"one|two", data):
            self.assertIn(b": keep-alive\n\n", piece)
        self.assertEqual(sse_events(data)[-2]["error"]["code"], "timeout")

    def test_clients_that_leave(self):
        """Whatever they have sent after their request: their session ends, and nothing else."""
        running = self.start(timeout=600.0, spares=1, requests_per_process=100)
        pid = running.content(PID)
        pipelined = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        cases = ((b"", True), (b"", False), (b"\r\n", True), (pipelined, False))
        for number, (after, stream) in enumerate(cases, 1):
            with running.send(PAUSE, after, stream=stream):
                self.assertTrue(eventually(lambda: len(self.journal("post", PAUSE)) == number))
            self.assertTrue(running.becomes(SOON, running=0), after)
            expected = [f"{pid} {PAUSE}"] * number
            self.assertTrue(eventually(lambda: self.journal("cancelled", PAUSE) == expected))
        self.assertEqual(running.content(PID), pid)

    def test_children_that_do_not_read_their_prompt(self):
        """Clients that leave are noticed then, too; at last the request fails."""
        self.patch(proxy, FIFO_SECONDS=600.0)
        self.mode("DEAF = True")
        running = self.start(timeout=600.0)
        with running.send("x" * (5 << 20)):
            self.assertTrue(eventually(lambda: self.journal("deaf")))
        self.assertTrue(running.becomes(SOON, running=0))
        self.patch(proxy, FIFO_SECONDS=0.2)
        self.assertEqual(running.chat("x" * (5 << 20))[0], 502)
        self.assertEqual(self.journal("post"), [])

    def test_clients_that_read_late_get_everything_and_fill_no_memory(self):
        running = self.start(timeout=600.0)
        text = "do hold(); data(chunk({'content': 'tok '}) * 40000)"  # 3.4 MB
        with running.send(text, b"GET / HTTP/1.0\r\n\r\n", stream=True, n=2) as client:
            self.assertTrue(eventually(lambda: len(self.journal("post")) == 2))
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            self.let_go()
            self.assertTrue(eventually(lambda: len(set(self.journal("waits"))) == 2))
            time.sleep(0.5)  # in which all of it would come
            self.assertLess(tracemalloc.get_traced_memory()[1], 5 << 20)
            tracemalloc.stop()
            data = b"".join(iter(lambda: client.recv(1 << 20), b""))
        self.assertEqual(data.count(b'"content":"tok "'), 80000)


class StartTest(FakeCase):
    def test_what_does_not_work_is_said(self):
        self.patch(proxy, START_SECONDS=0.7)
        invalid = "\\x1b[91mError: \\x1b[0mopencode.json is not valid JSON(C)"
        for mode, text in (
            (f"ACP or sys.exit('{invalid}')", "Error: opencode.json is not valid"),
            ("ACP or sys.exit(print('a/b\\n{}'))", "opencode cannot be used: "),
            ("ACP and sys.exit('no memory')", "opencode ended: no memory"),
            ("ACP and time.sleep(9)", "opencode did not answer initialize within"),
            ("VERSION = '1.16.9'", "1.16.9 is too old: 1.17.0 or newer"),
            ("LOADS = False", "did not load the proxy's plugin"),
            ("WARMS = False", "did not reach the model in the start-up proof"),
        ):
            with self.subTest(mode), self.assertRaisesRegex(proxy.StartError, re.escape(text)):
                self.mode(mode)
                self.start()
        self.fake.write_text("#!/no/such/interpreter\n")
        with self.assertRaisesRegex(proxy.StartError, "cannot be run"):
            self.start()

    def test_not_logged_in_and_then_logged_in(self):
        self.mode("NAMES = ['opencode/free']")
        running = self.start(spares=1)
        self.assertEqual(running.chat()[1]["error"]["code"], "provider_not_logged_in")
        self.assertIn("opencode auth login", running.health()["reason"])
        self.mode("")
        self.auth.write_text('{"github-copilot":{}}')
        self.assertEqual(running.content("now"), "now")

    def test_models_that_a_session_does_not_offer(self):
        model = "github-copilot/gpt-4.1"  # of the command line: opencode is told of it
        status, answer = self.start(model=model).chat()
        self.assertEqual((status, answer["error"]["code"]), (404, "model_not_found"))
        self.mode("ACP and 'OPENCODE_MODELS_PATH' in os.environ and NAMES.pop()")
        self.assertEqual(self.start().content("x", model="local/m"), "x")  # the catalog is at fault

    def test_early_requests_wait_for_the_proof(self):
        with unittest.mock.patch.object(proxy.Pool, "prove"):
            running = self.start(spares=1)
        early = self.background.submit(running.content, "well")
        self.assertEqual(running.health()["reason"], "starting")
        self.assertFalse(early.done())
        running.pool.prove()
        self.assertEqual(early.result(), "well")

    def test_directories_that_killed_proxies_left(self):
        dead = subprocess.Popen(["true"])
        dead.wait()
        for name in (f"{dead.pid}-x", "9" * 30, "x", "-1-", f"{os.getpid()}-mine"):
            (self.tmp / f"opencode-proxy-{name}").mkdir()
        self.start().close()
        self.assertEqual(len([*self.tmp.iterdir()]), 4)
        self.assertEqual([*self.tmp.glob(f"*-{dead.pid}-x")], [])
        shutil.rmtree(self.tmp)

    def test_opencode_that_stops_working_and_is_repaired(self):
        """/health tells it, whether there are spares or not."""
        self.patch(proxy, TEND_SECONDS=0.1, MAX_RETRY_SECONDS=0.1)
        for spares in (0, 1):
            running = self.start(spares=spares)
            self.mode("ACP and sys.exit('no memory')")
            for pid in opencode_pids():
                os.kill(pid, signal.SIGKILL)
            self.assertTrue(eventually(lambda: running.chat()[0] == 502))
            reason = "opencode does not start: opencode ended: no memory"
            self.assertTrue(running.becomes(http=503, status="unhealthy", reason=reason))
            self.mode("")
            self.assertEqual(running.content("well"), "well")
            self.assertTrue(running.becomes(http=200, status="healthy"))
            running.close()

    def test_opencode_that_does_not_start_for_a_day(self):
        self.patch(proxy, TEND_SECONDS=0.05, MAX_RETRY_SECONDS=0.0)
        running = self.start(spares=1)
        os.kill(opencode_pids()[0], signal.SIGKILL)
        broken = BlockingIOError(11, "Resource temporarily unavailable")
        with unittest.mock.patch.object(subprocess, "Popen", side_effect=broken) as popen:
            self.assertTrue(eventually(lambda: popen.call_count > 1030))
            self.assertEqual(running.chat()[1]["error"]["code"], "opencode_failed")
        self.assertEqual(running.content("well"), "well")

    def test_starts_that_stall_hold_nobody_up(self):
        running = self.start()
        disk, start = threading.Event(), subprocess.Popen
        with unittest.mock.patch.object(subprocess, "Popen") as popen:
            popen.side_effect = lambda *words, **more: disk.wait(DEADLINE) and start(*words, **more)
            asked = self.background.submit(running.content, "well")
            self.assertTrue(running.becomes(SOON, waiting=1))
            with running.send("x"):
                self.assertTrue(running.becomes(SOON, waiting=2))
            self.assertTrue(running.becomes(SOON, waiting=1))
            disk.set()
            self.assertEqual(asked.result(), "well")

    def test_orphans_in_a_container_are_taken_leave_of(self):
        orphan, here = subprocess.Popen(["true"]), os.getpid()
        with unittest.mock.patch.object(os, "getpid", return_value=1):
            gone = eventually(lambda: proxy.reap_orphans(set()) or not children(here), SOON)
        self.assertTrue(gone)
        orphan.wait()


class LoadTest(FakeCase):
    """Who is answered by which process, and when one starts or ends."""

    def only(self, running, **expected):
        """Wait until nothing is answered and one process is left; return its pid."""
        self.assertTrue(running.becomes(running=0, **expected))
        self.assertTrue(eventually(lambda: len(opencode_pids()) == 1))
        return opencode_pids()[0]

    def test_requests_per_process(self):
        for most in (1, 3):
            running = self.start(spares=1, requests_per_process=most)
            pids = [self.only(running, spares=1)]
            for _ in range(2):
                self.assertEqual({running.content(PID) for _ in range(most)}, {str(pids[-1])})
                pids.append(self.only(running, spares=1))
            self.assertEqual(self.journal("start")[-3:], [str(pid) for pid in pids])
            running.close()

    def test_requests_of_a_burst_share(self):
        """No process starts while answers wait for their first token."""
        running = self.start(spares=1)
        used = self.only(running, spares=1)
        texts = [f"do hold(); say('{number}')" for number in range(16)]
        answers = self.background.submit(at_once, running.content, texts)
        self.assertTrue(eventually(lambda: len(self.journal("post")) == 16))
        self.assertEqual(self.journal("start"), [str(used)])
        self.let_go()
        self.assertEqual(answers.result(), [str(number) for number in range(16)])
        self.assertNotEqual(self.only(running, spares=1), used)
        self.assertEqual(len(self.journal("start")), 2)
        with running.send(PAUSE):  # one starts when the only answer has begun
            self.assertTrue(running.becomes(SOON, running=1, spares=1))

    def test_queue(self):
        running = self.start(max_concurrency=1, max_queue=2)
        answers = []
        for number in range(3):
            text = f"do hold(); say('{number}')"
            answers.append(self.background.submit(running.content, text))
            self.assertTrue(running.becomes(running=1, waiting=number))
        status, answer = running.chat()
        self.assertEqual((status, answer["error"]["code"]), (503, "queue_full"))
        self.let_go()
        self.assertEqual([answer.result() for answer in answers], ["0", "1", "2"])
        self.assertEqual([post[-3] for post in self.journal("post")], ["0", "1", "2"])

    def test_waiting_clients_that_leave(self):
        """Their places are free, and nothing of their prompts is left in memory."""
        running = self.start(max_concurrency=1, max_queue=24, timeout=600.0)
        with running.send(PAUSE):
            self.assertTrue(eventually(lambda: self.journal("post")))
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            clients = [running.send("x" * (5 << 20)) for _ in range(24)]
            self.assertTrue(running.becomes(waiting=24))
            self.assertGreater(tracemalloc.get_traced_memory()[0], 100 << 20)
            for client in clients:
                client.close()
            self.assertTrue(running.becomes(SOON, waiting=0))
            self.assertTrue(eventually(lambda: tracemalloc.get_traced_memory()[0] < 10 << 20, SOON))
        self.assertEqual(running.content("well"), "well")

    def test_choices_share_a_process_and_stop_without_it(self):
        self.patch(proxy, CUT_SECONDS=0.2)
        running = self.start(max_concurrency=1, max_queue=0, spares=1, requests_per_process=100)
        pid = running.content(PID)
        for index, choice in enumerate(running.chat(SLOWLY, n=2, stop=["5 6"])[1]["choices"]):
            self.assertEqual((choice["index"], choice["finish_reason"]), (index, "stop"))
            self.assertEqual(choice["message"]["content"], "0 1 2 3 4 ")
        expected = [f"{pid} {SLOWLY}"] * 2
        self.assertTrue(eventually(lambda: self.journal("cancelled", SLOWLY) == expected))
        self.assertEqual(running.content(PID), pid)
        self.assertEqual(running.chat(DIE, n=3)[0], 502)

    def test_processes_that_died_or_grew_are_replaced(self):
        self.patch(proxy, TEND_SECONDS=0.1, MAX_RETRY_SECONDS=0.1)
        running = self.start(spares=1, requests_per_process=100)
        os.kill(self.only(running), signal.SIGKILL)
        self.assertTrue(eventually(lambda: len(self.journal("start")) == 2))
        for limit in {"WORN_SECONDS": 0.5}, {"WORN_PROCESS_BYTES": 9}, {"MAX_PROCESS_BYTES": 9}:
            with self.subTest(limit), unittest.mock.patch.multiple(proxy, **limit):
                old = self.only(running)
                self.assertEqual(running.content(PID), str(old))
                self.assertTrue(eventually(lambda: old not in opencode_pids()))

    def test_changed_files_of_the_user_renew_everything(self):
        self.patch(proxy, TEND_SECONDS=0.1)
        running = self.start(spares=1, requests_per_process=100)
        config = self.folder / ".config/opencode/opencode.json"
        config.parent.mkdir(parents=True)
        for path, text in (
            (self.auth, '{"local":{"type":"api","key":"k"}}'),
            (config, '{"provider":{"local":{}}}'),
        ):
            old = self.only(running)
            with running.send(PAUSE):
                self.assertTrue(running.becomes(running=1))
                path.write_text(text)
                self.assertNotEqual(running.content(PID), str(old))
                self.assertIn(old, opencode_pids())  # it finishes what it has begun
            self.assertTrue(eventually(lambda: old not in opencode_pids()), text)

    def test_catalog_that_could_not_be_read_is_read_again(self):
        self.patch(proxy, TEND_SECONDS=0.1, MAX_RETRY_SECONDS=0.1)
        running = self.start()
        self.mode("ACP or note('models', 1) or sys.exit('no memory')")
        self.auth.write_text('{"one/model":{}}')
        self.assertTrue(eventually(lambda: self.journal("models")))
        self.assertEqual(running.content("well"), "well")
        self.mode("NAMES.append('one/model')")
        self.assertTrue(eventually(lambda: running.chat(model="one/model")[0] == 200))


# --------------------------------------------------------------------------------------------- http
COMPLETIONS = "/v1/chat/completions"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
END = "Connection: close"


def post(body, *headers, path=COMPLETIONS, version="1.1", host="Host: localhost"):
    lines = "".join(header + "\r\n" for header in (host, *headers) if header)
    return f"POST {path} HTTP/{version}\r\n{lines}\r\n".encode() + body


def post_chat(*headers, version="1.1", **fields):
    body = chat_body(**fields)
    return post(body, f"Content-Length: {len(body)}", *headers, version=version)


class StubPool:
    """Answers what `respond(request)` yields, as a pool does."""

    content = (0, proxy.Event({"content": "yes"}))
    finish = (
        0,
        proxy.Event(
            {},
            finish_reason="stop",
            usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        ),
    )
    last_error, running = "", 0

    def __init__(self, *names):
        self.closing = threading.Event()
        self.close = self.closing.set
        models = {name: proxy.Model(name) for name in names}
        self.catalog = proxy.Catalog(models, names[0], frozenset("ab"))
        self.respond = lambda request: iter([self.content, self.finish])

    def ready(self):
        yield None
        return self.catalog

    def run(self, request, model, exchange=None):
        self.running += 1
        try:
            yield from self.respond(request)
        finally:
            self.running -= 1

    def wait(self, event=None):
        """Yield until `event` is set, for ever without one, then the end of the answer."""
        while event is None or not event.wait(0.02):
            yield None
        yield self.finish

    def health(self):
        return {"status": "healthy", "reason": None, "opencode": "1.18.33", "last_error": None}


class HTTPTest(unittest.TestCase):
    def setUp(self):
        self.logged = []
        patch = unittest.mock.patch.object(proxy, "log", self.logged.append)
        patch.start()
        self.addCleanup(patch.stop)

    def start(self, **changes):
        """Start a server on a stub pool; what the test asks goes to the one started last."""
        self.pool = StubPool("a/first", "a/second", "b/m")
        self.server = proxy.ProxyServer(settings(**changes), self.pool)
        self.client = Client(self.server.server_port)
        thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(self.server.stop, 0.0, time.sleep)

    def connect(self, data=b""):
        connection = socket.create_connection(("127.0.0.1", self.server.server_port), DEADLINE)
        self.addCleanup(connection.close)
        connection.sendall(data)
        return connection

    @staticmethod
    def rest(connection):
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))

    def answer(self, data):
        """Return the status and body of the last answer to `data`, and how many came."""
        got = self.rest(self.connect(data))
        head, _, body = got[got.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
        return int(head.split()[1]), body, got.count(b"HTTP/1.1 ")

    def request(self, method, path, body=None, headers=()):
        """Return status, headers and JSON of one request on a connection of its own."""
        status, headers, data = self.client.request(method, path, body, headers)
        if headers["Content-Type"] == "application/json" and data:
            data = json.loads(data)
        return status, headers, data

    def error(self, *request):
        status, _, body = self.request(*request)
        return status, body["error"]["code"], body["error"]["message"]

    def assert_logged(self, pattern):
        found = eventually(lambda: any(re.search(pattern, line) for line in self.logged))
        self.assertTrue(found, (pattern, self.logged))

    def test_routes(self):
        self.start()
        models = [
            {"id": name, "object": "model", "created": self.server.created, "owned_by": name[0]}
            for name in self.pool.catalog.names
        ]
        health = {**self.pool.health(), "version": proxy.__version__}
        for path, expected in (
            ("/v1/models", {"object": "list", "data": models}),
            ("/v1/models/b/m", models[2]),
            ("/models/b%2Fm?x=1", models[2]),
            ("http://localhost/v1/models/b/m", models[2]),
            ("//v1//models/b/m/", models[2]),
            ("/models/second", models[1]),
            ("/health", health),
            ("/v1", health),
            ("/", health),
        ):
            self.assertEqual(self.request("GET", path)[::2], (200, expected), path)
        self.assertEqual(self.error("GET", "/v1/models/none")[:2], (404, "model_not_found"))
        for path in ("//v1//chat/completions", "/chat/completions?x"):
            self.assertEqual(self.request("POST", path, chat_body())[0], 200, path)
        for method, path, allow in (
            ("GET", COMPLETIONS, "OPTIONS, POST"),
            ("DELETE", "/v1/models", "GET, HEAD, OPTIONS"),
        ):
            status, headers, _ = self.request(method, path)
            self.assertEqual((status, headers["Allow"]), (405, allow))
        status, headers, body = self.request("HEAD", "/v1/models")
        self.assertEqual((status, body), (200, b""))
        self.assertGreater(int(headers["Content-Length"]), 100)
        use, chat = "the base URL to use is " + self.server.base_url, "this serves chat only, at "
        for path, hint in (
            ("/v1/v1/models/x", use),
            ("/v1/v1", use),
            ("/v1x", chat),
            ("/v1/chat/completions/chat/completions", use),
            ("/v1/embeddings", chat),
            ("/v1/completions", chat),
        ):
            status, code, message = self.error("POST", path + "?secret", b"{}")
            self.assertEqual((status, code), (404, "unknown_url"))
            self.assertTrue(message.startswith(f"There is nothing at {path}: {hint}"), message)

    def test_one_request_after_another(self):
        """Bodies are neither left nor taken for requests."""
        self.start()
        last = HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        unwanted = HEALTH.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\nGET /")
        data = post_chat() + unwanted + post(b"{}", "Content-Length: 2") + post_chat(stream=True)
        self.assertEqual(self.answer(data + last)[::2], (200, 5))
        for refused in (
            post(last, f"Content-Length: {len(last)}", path="/x"),
            post(last, f"Content-Length: {len(last)}", "Origin: https://x"),
        ):
            self.assertEqual(self.answer(refused + last)[2], 1)

    def test_framing(self):
        self.start(max_body_size=5000)
        body = chat_body()
        size, length = len(body), f"Content-Length: {len(body)}"
        for expected, *headers in (
            (200, length),
            (200, length, length),
            (200, f"Content-Length: {size}, {size}"),
            (200, length, "Content-Type: message/rfc822"),
            (413, "Content-Length: 99999999999"),
            (415, length, "Content-Type: multipart/form-data; boundary=x"),
            (400, "Content-Length: +5"),
            (400, "Content-Length: 1_0"),
            (400, "Content-Length:"),
            (400, "Content-Length: \u0665"),
            (400, "Content-Length: 5", "Content-Length: 6"),
            (400, "Content-Length: 5,55"),
            (400, "Content-Length : 5"),
            (400, "From x", length),
            (400, "Content-Length: 99999999999999999999"),
            (400, "Transfer-Encoding: gzip"),
            (400, length, "Transfer-Encoding: chunked"),
            (400, length, "Host: y"),
            (400, "Transfer-Encoding: gzip, chunked"),
            (400, length, "no colon"),
            (400, length, "X: a\rContent-Length: 3"),
            (400, length, "X: a\0b"),
            (400, length, " folded: 1"),
            (400, length, "X: a\r"),
            (431, length, "X: " + "y" * 70000),
            (431, length, *["X: y"] * 120),
        ):
            with self.subTest(headers=str(headers)[:60]):
                status, answer, count = self.answer(post(body, *headers, END))
                self.assertEqual((status, count), (expected, 1), answer)
                self.assertIn("choices" if expected == 200 else "error", json.loads(answer))
        for expected, data in (
            (200, post_chat(END).replace(b"\r\n", b"\n")),
            (400, post(body, length, host="")),
            (400, b"GET\r\n\r\n"),
            (501, HEALTH.replace(b"GET", b"BREW")),
            (505, b"GET /health HTTP/2.0\r\n\r\n"),
            (400, b"\x16\x03\0\r\n\r\n"),
            (414, b"GET / " + b"x" * 70000),
            (400, b"GET /\rX HTTP/1.1\r\n\r\n"),
        ):
            self.assertEqual(self.answer(data)[0], expected, data[:30])
        chunks = b"".join(
            b"%x ;ext=1\r\n%b\r\n" % (len(body[n : n + 7]), body[n : n + 7])
            for n in range(0, size, 7)
        )
        for expected, count, chunked in (
            (200, 2, chunks + b"0\r\nTrailer: 1\r\n\r\n"),
            (400, 1, b"x\r\n"),
            (400, 1, b"-1\r\n\r\n"),
            (400, 1, b"2\r\nabc\r\n0\r\n\r\n"),
            (400, 1, b"2\n{}\r\n0\r\n\r\n"),
            (400, 1, b"2\r\n{}\n0\r\n\r\n"),
            (400, 1, b"0\r\n\n"),
            (400, 1, b"2;a\rb\r\n{}\r\n0\r\n\r\n"),
            (431, 1, b"2;" + b"x" * 70000 + b"\r\n{}\r\n0\r\n\r\n"),
            (400, 1, b"0\r\nX y\r\n\r\n"),
            (400, 1, b"f" * 18),
            (413, 1, b"1389\r\n"),
        ):
            data = post(chunked, "Transfer-Encoding: Chunked") + post_chat(END)
            self.assertEqual(self.answer(data)[::2], (expected, count), chunked[:30])

    def test_bodies_are_bounded(self):
        with unittest.mock.patch.object(proxy, "MAX_BODIES_BYTES", 3000):
            self.start(max_body_size=2000)
            page = {"Origin": "http://localhost:3000"}  # may read the refusal, as others can
            status, headers, body = self.request("POST", COMPLETIONS, b"x" * 5_000_000, page)
            self.assertEqual((status, body["error"]["code"]), (413, "body_too_large"))
            self.assertEqual(headers["Access-Control-Allow-Origin"], page["Origin"])
            self.pool.respond = lambda request: self.pool.wait()
            big = {"user": "x" * 1800}
            announced = [self.connect(post(b"{", "Content-Length: 1999")) for _ in range(2)]
            held = self.connect(post_chat(**big))
            self.assertTrue(eventually(lambda: self.pool.running == 1))
            status, headers, body = self.request("POST", COMPLETIONS, chat_body(**big))
            self.assertEqual((status, body["error"]["code"]), (503, "too_busy"))
            self.assertGreater(int(headers["Retry-After"]), 0)
            for connection in announced:  # counted is what has come
                connection.setblocking(False)
                self.assertRaises(BlockingIOError, connection.recv, 1)
            held.close()
            self.pool.respond = lambda request: iter([self.pool.finish])
            self.assertTrue(eventually(lambda: self.pool.running == 0))
            self.assertEqual(self.request("POST", COMPLETIONS, chat_body(**big))[0], 200)

    def test_slow_requests_end(self):
        with unittest.mock.patch.multiple(proxy, IDLE_SECONDS=0.5, BODY_SECONDS=0.5):
            self.start()
            for data in (b"", b"GET / HT"):
                self.assertEqual(self.rest(self.connect(data)), b"")
            connection = self.connect(post(b"{", "Content-Length: 10"))
            self.assertIn(b"body_timeout", self.rest(connection))
            connection = self.connect()
            with self.assertRaises(OSError):  # a drip does not extend the deadline
                for _ in range(100):
                    connection.sendall(b"G")
                    time.sleep(0.05)

    def test_clients_that_hang_up(self):
        """They are noticed also where bytes of a next request come before the end."""
        self.start()
        self.pool.respond = lambda request: self.pool.wait()
        for more in (b"", b"\r\n", HEALTH, post(b"x" * 30000, "Content-Length: 90000")):
            for stream in (False, True):
                connection = self.connect(post_chat(stream=stream) + more)
                self.assertTrue(eventually(lambda: self.pool.running == 1))
                connection.close()
                self.assertTrue(eventually(lambda: self.pool.running == 0, 10), more[:20])
        self.assert_logged(' 499 model=a/first error="the client hung up"')

    def test_clients_that_read_slowly(self):
        self.start()
        piece = (0, proxy.Event({"content": "x" * (1 << 16)}))
        self.pool.respond = lambda request: iter([piece] * 200 + [self.pool.finish])
        with unittest.mock.patch.object(proxy, "WRITE_SECONDS", 1.0):
            steady, started, size = self.connect(post_chat(END)), time.monotonic(), 0
            while data := steady.recv(1 << 17):
                size += len(data)
                time.sleep(0.02)
            self.assertGreater(size, 200 << 16)
            self.assertGreater(time.monotonic() - started, 1.5)
            self.connect(post_chat(stream=True))
            self.assert_logged(" 499 .*the client does not read")

    def test_connections_are_bounded(self):
        with unittest.mock.patch.object(proxy, "MAX_CONNECTIONS", 20):
            self.start()
            idle = [self.connect(b"GET / HTTP/1.1\r\n" * (n % 2)) for n in range(60)]
            self.assertEqual(self.request("POST", COMPLETIONS, chat_body())[0], 200)
            for connection in idle[:20]:
                self.assertEqual(self.rest(connection), b"")
            busy = [
                self.connect(post(b"{", "Content-Length: 10", "Expect: 100-continue", END))
                for _ in range(20)
            ]
            for connection in busy:
                self.assertEqual(connection.recv(12), b"HTTP/1.1 100")
            with contextlib.suppress(ConnectionError):  # those that ask are not ended for it
                self.assertEqual(self.rest(self.connect(HEALTH)), b"")
            busy[0].sendall(b" " * 9)
            self.assertIn(b"HTTP/1.1 400", self.rest(busy[0]))
            self.assertTrue(eventually(lambda: self.request("GET", "/health")[0] == 200))

    def test_streams(self):
        self.start()
        got = self.rest(self.connect(post_chat(END, stream=True)))
        self.assertTrue(got.endswith(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"), got[-60:])
        for header in (
            b"Transfer-Encoding: chunked",
            b"Content-Type: text/event-stream",
            b"X-Accel-Buffering: no",
            b"Cache-Control: no-cache",
        ):
            self.assertIn(header, got)
        got = self.rest(self.connect(post_chat(version="1.0", stream=True)))
        self.assertRegex(got, rb"(?s)\r\n\r\ndata: .*}\n\ndata: \[DONE]\n\n$")
        go_on = threading.Event()

        def respond(request):
            while not go_on.wait(0.02):
                yield None
            raise proxy.APIError(429, "slow down", headers={"Retry-After": "7"})

        self.pool.respond = respond
        with unittest.mock.patch.object(proxy, "PING_SECONDS", 0.1):
            connection, got = self.connect(post_chat(END, stream=True)), b""
            while got.count(proxy.SSE_PING) < 2:
                got += connection.recv(1 << 16)
            self.assertLess(got.index(b'"role":"assistant"'), got.index(proxy.SSE_PING))
            go_on.set()
        error = {"message": "slow down", "type": "rate_limit_error", "param": None, "code": None}
        end = proxy.sse_data({"error": error}) + proxy.SSE_DONE + b"\r\n0\r\n\r\n"
        self.assertTrue(self.rest(connection).endswith(end))
        status, headers, body = self.request("POST", COMPLETIONS, chat_body(stream=True))
        self.assertEqual((status, headers["Retry-After"], body), (429, "7", {"error": error}))
        self.pool.respond = lambda request: iter([self.pool.content, 7])  # a defect
        answer = self.error("POST", COMPLETIONS, chat_body())
        self.assertEqual(answer, (500, "internal_error", "internal error"))
        self.assertIn(b'"internal_error"', self.rest(self.connect(post_chat(END, stream=True))))
        self.assert_logged(' 500 .*error="internal error: TypeError')

    def test_api_keys(self):
        self.start(api_key=["kee1", "se cond\u20ac"])
        head = [f"Content-Length: {len(chat_body())}", "Expect: 100-continue", END]
        self.assertEqual(self.connect(post(b"", *head)).recv(12), b"HTTP/1.1 401")
        connection = self.connect(post(b"", *head, "api-key: kee1"))
        self.assertEqual(connection.recv(12), b"HTTP/1.1 100")
        connection.sendall(chat_body())
        self.assertIn(b"HTTP/1.1 200", self.rest(connection))
        for expected, headers in (
            (401, {}),
            (200, {"authorization": "bearer kee1"}),
            (200, {"X-Api-Key": "kee1"}),
            (200, {"X-Api-Key": "se cond\u20ac".encode()}),
            (401, {"Authorization": "Bearer"}),
            (200, {"Authorization": "Bearer x", "X-Api-Key": "kee1"}),
            (401, {"api-key": ""}),
            (401, {"Authorization": "Basic kee1"}),
            (401, {"X-Api-Key": "\xff"}),
            (401, {"api-key": "kee12"}),
        ):
            status, answered, _ = self.request("GET", "/v1/models", None, headers)
            self.assertEqual(status, expected, headers)
            self.assertEqual(answered["WWW-Authenticate"], "Bearer" if status == 401 else None)
        self.assertEqual(self.error("POST", COMPLETIONS, chat_body())[:2], (401, "invalid_api_key"))
        self.assertEqual(self.request("GET", "/health", None, {"Host": "any.example"})[0], 200)
        self.assertNotIn("kee1", " ".join(self.logged))

    def test_hosts_and_origins(self):
        """Web pages of others get in neither under their own name nor under one of this machine."""
        own, free = "Access-Control-Allow-Origin", "http://localhost:3000"
        for changes, allowed, refused in (
            (
                {"cors_origin": ["https://app.example"]},
                (
                    free,
                    "https://127.0.0.1",
                    "http://[::1]:80",
                    "app://x",
                    "https://app.example",
                    "tauri://localhost",
                    "vscode-webview://1d",
                    "vscode-file://vscode-app",
                ),
                (
                    "https://evil.example",
                    "null",
                    "http://localhost.evil.example",
                    "",
                    free + "\xe9",
                ),
            ),
            ({"cors_origin": ["*"]}, ("https://any.example",), ("null",)),
        ):
            self.start(**changes)
            for origin in (*allowed, *refused):
                status, headers, _ = self.request("GET", "/v1/models", None, {"Origin": origin})
                expected = (200, origin) if origin in allowed else (403, None)
                self.assertEqual((status, headers[own]), expected, origin)
        self.assert_logged('403 error="Web pages of null may not .*--cors-origin null allows them"')
        status, headers, body = self.request(
            "OPTIONS",
            COMPLETIONS,
            None,
            {"Origin": "app://x", "Access-Control-Request-Headers": "authorization,content-type"},
        )
        self.assertEqual(
            (status, body, headers["Vary"], headers[own]), (204, b"", "Origin", "app://x")
        )
        self.assertEqual(headers["Access-Control-Allow-Methods"], "OPTIONS, POST")
        self.assertEqual(headers["Access-Control-Allow-Headers"], "authorization,content-type")
        for expected, path, *hosts in (
            (
                200,
                "/",
                "localhost",
                "LocalHost.:80",
                "x.localhost:1",
                "1.2.3.4",
                "[::1]:4141",
                socket.gethostname(),
                "host.docker.internal",
            ),
            (200, "/health", "evil.example"),
            (403, "/", "localhost.evil.example:4141", "1.2.3.4.x", "evil.example"),
        ):
            for host in hosts:
                self.assertEqual(self.request("GET", path, None, {"Host": host})[0], expected, host)
        self.start(host="0.0.0.0")
        self.assertEqual(self.request("GET", "/", None, {"Host": "evil.example"})[0], 200)

    def test_stop(self):
        """Idle connections end at once; answers have the grace, then they are errors."""
        for grace, expected in ((DEADLINE, b"HTTP/1.1 200"), (0.1, b"HTTP/1.1 503")):
            self.start()
            go_on = threading.Event()
            self.pool.respond = lambda request, go_on=go_on: self.pool.wait(go_on)
            idle, busy = self.connect(), self.connect(post_chat())
            self.assertTrue(eventually(lambda: self.pool.running == 1))
            thread = threading.Thread(target=self.server.stop, args=(grace, time.sleep))
            thread.start()
            self.assertEqual(idle.recv(1), b"")
            if grace == DEADLINE:
                go_on.set()
            self.assertTrue(self.rest(busy).startswith(expected))
            thread.join()


# ----------------------------------------------------------------------- through the real opencode
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJ"
    "RU5ErkJggg=="
)
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PNG}}
HELLO = "Hello w\u00f6r\u2028ld"
SYSTEM_PROMPT = re.compile(rb"agent|opencode|working directory", re.I)


class RealTest(RealCase):
    """What the model receives and what the client gets, on the three wire formats."""

    def test_body_is_the_clients_own(self):
        fields = {
            "temperature": 0,
            "top_p": 1.0,
            "max_completion_tokens": 6,
            "stop": ["zz"],
            "seed": 12345678901234567890,
            "logit_bias": {"7": 1},
            "user": "u",
            "store": False,
            "metadata": {"a": "b"},
            "unknown": {"2": [1, None], "1": 1.0},
        }
        text = "w\u00f6rld \u2028 {file:/etc/passwd} {env:HOME} /help"
        for model in (CHAT, "local/m"):
            self.upstream.exchanges.clear()
            self.assertEqual(self.proxy.content(text, model=model, **fields), HELLO)
            expected = {
                "model": model.partition("/")[2],
                "stream": True,
                "messages": [{"role": "user", "content": text}],
                **fields,
                "stream_options": {"include_usage": True},
            }
            self.assertEqual(self.exchange().raw.decode(), proxy.compact_json(expected))
        self.assertEqual(self.exchange().headers["x-opencode-proxy-session"], None)

    def test_stream_bytes(self):
        body = chat_body(model=CHAT, stream=True, stream_options={"include_usage": True})
        status, headers, data = self.proxy.request("POST", "/v1/chat/completions", body)
        head = json.loads(data.split(b"\n\n")[0][6:])
        self.assertRegex(head["id"], "^chatcmpl-[0-9a-f]{32}$")
        frame = (
            f'data: {{"id":"{head["id"]}","object":"chat.completion.chunk",'
            f'"created":{head["created"]},"model":"{CHAT}",'
            '"system_fingerprint":"fp_opencode","choices":['
        )
        chunk = frame + '{"index":0,"delta":%s,"logprobs":null,"finish_reason":%s}],"usage":null}'
        deltas = (
            '{"role":"assistant","content":""}',
            '{"content":"Hel"}',
            '{"content":"lo "}',
            '{"content":"w\\u00f6r\\u2028ld"}',
        )
        usage = json.dumps(USAGE, separators=(",", ":"))
        expected = [
            *(chunk % (delta, "null") for delta in deltas),
            chunk % ("{}", '"stop"'),
            f'{frame}],"usage":{usage}}}',
            "data: [DONE]",
            "",
        ]
        self.assertEqual(data.decode(), "\n\n".join(expected))
        self.assertEqual(
            (status, headers["Content-Type"], headers["Transfer-Encoding"]),
            (200, "text/event-stream; charset=utf-8", "chunked"),
        )

    def test_answers(self):
        pieces = ['{"command": "x', '", "n": 1.0,', ' "big": 12345678901234567890}']
        parts = (
            ("thought", "hm"),
            ("text", "Let me "),
            ("call", "c1", "bash", pieces),
            ("call", "c2", "a.b", ["{}"]),
        )
        self.upstream.respond = answering(*parts, finish="tool_calls")
        calls = [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "bash", "arguments": "".join(pieces)},
            },
            {"id": "c2", "type": "function", "function": {"name": "a.b", "arguments": "{}"}},
        ]
        tools = [{"type": "function", "function": {"name": name}} for name in ("bash", "a.b")]
        for name, model in FORMATS.items():
            _, answer = self.proxy.chat(model=model, tools=tools)
            self.assertEqual(
                answer["choices"],
                [
                    {
                        "index": 0,
                        "logprobs": None,
                        "finish_reason": "tool_calls",
                        "message": {
                            "role": "assistant",
                            "content": "Let me ",
                            "refusal": None,
                            "reasoning_content": "hm",
                            "tool_calls": calls,
                        },
                    }
                ],
                name,
            )
            self.assertEqual((answer["model"], answer["usage"]["total_tokens"]), (model, 31))
            deltas = deltas_of(self.proxy.stream(model=model, tools=tools))
            self.assertEqual(deltas[1:3], [{"reasoning_content": "hm"}, {"content": "Let me "}])
            told = [call for delta in deltas for call in delta.get("tool_calls", ())]
            self.assertEqual([call["index"] for call in told if call.get("id")], [0, 1], name)
            texts = [call["function"].get("arguments", "") for call in told if call["index"] == 0]
            self.assertEqual([text for text in texts if text], pieces, name)
        self.assertEqual(len(self.upstream.exchanges), 6)

    def test_headers_and_effort(self):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        history = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": [PICTURE]},
        ]
        for messages, expected in (
            ([{"role": "user", "content": "q"}], ("user", None)),
            ([{"role": "user", "content": [PICTURE]}], ("user", "true")),
            (history, ("agent", "true")),
        ):
            for name, model in FORMATS.items():
                self.upstream.exchanges.clear()
                status, answer = self.proxy.chat(
                    model=model, messages=messages, reasoning_effort="high"
                )
                self.assertEqual(status, 200, answer)
                headers, body = self.exchange().headers, self.exchange().body
                found = headers["x-initiator"], headers["Copilot-Vision-Request"]
                self.assertEqual(found, expected, name)
                efforts = (
                    body.get("reasoning_effort"),
                    body.get("reasoning", {}).get("effort"),
                    body.get("output_config", {}).get("effort"),
                )
                self.assertIn("high", efforts, name)

    def test_finish_reasons_and_empty_answers(self):
        for model in FORMATS.values():
            for finish in ("stop", "length", "content_filter"):
                self.upstream.respond = answering(("text", "x"), finish=finish)
                chunks = self.proxy.stream(model=model)[:-1]
                reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
                self.assertEqual(reasons, [None, None, finish], model)
            self.upstream.respond = answering()
            self.assertEqual(self.proxy.content(model=model), "")
            for content in ("", []):
                self.assertEqual(self.proxy.content(content, model=model), "")

    def test_deltas_arrive_as_they_come(self):
        go_on = threading.Event()

        def respond(exchange):
            events = STREAMS[exchange.format]([("text", "one"), ("text", "two")])
            place = next(n for n, event in enumerate(events) if "one" in json.dumps(event)) + 1
            exchange.begin()
            exchange.send(*events[:place])
            go_on.wait(DEADLINE)
            exchange.send(*events[place:])

        self.upstream.respond = respond
        for model in FORMATS.values():
            go_on.clear()
            with self.proxy.send(model=model, stream=True) as connection:
                data = b""
                while b'"one"' not in data:  # the provider is still in the middle of its answer
                    data += connection.recv(65536)
                self.assertNotIn(b'"two"', data)
                go_on.set()
                while b"[DONE]" not in data:
                    data += connection.recv(65536)
                self.assertIn(b'"two"', data)

    def test_clients_hang_up(self):
        def respond(exchange):
            exchange.begin()
            exchange.send(chat_chunk({"content": "one"}))
            exchange.wait_closed()

        self.upstream.respond = respond
        for stream, after in ((True, b""), (False, b""), (False, b"\r\nGET / HTTP/1.1\r\n")):
            self.upstream.exchanges.clear()
            with self.proxy.send(stream=stream, after=after):
                self.assertTrue(eventually(lambda: self.upstream.exchanges))
            self.assertTrue(self.exchange().closed_by_client.wait(SOON - 10))
        self.upstream.respond = answer_text
        self.assertEqual(self.proxy.content(), HELLO)

    def test_stop_and_usage(self):
        self.upstream.respond = answering(("text", "one ST"), ("text", "OP two"))
        for (name, model), key in zip(FORMATS.items(), ("stop", None, "stop_sequences")):
            self.upstream.exchanges.clear()
            _, answer = self.proxy.chat(model=model, stop="STOP")
            choice = answer["choices"][0]
            self.assertEqual(
                (choice["message"]["content"], choice["finish_reason"]), ("one ", "stop"), name
            )
            self.assertEqual(answer["usage"]["total_tokens"], 31, name)
            self.assertEqual([key] if key else [], [k for k in self.exchange().body if "stop" in k])

    def test_a_foreign_format(self):
        """What the proxy does not parse, opencode reads: text, reasoning, parameters, refusals."""

        def respond(exchange):
            usage = {
                "promptTokenCount": 11,
                "candidatesTokenCount": 13,
                "thoughtsTokenCount": 7,
                "totalTokenCount": 31,
                "cachedContentTokenCount": 4,
            }
            exchange.begin()
            for part, more in (
                ({"text": "hm", "thought": True}, {}),
                ({"text": "Hel"}, {}),
                ({"text": "lo"}, {"finishReason": "MAX_TOKENS"}),
            ):
                content = {"role": "model", "parts": [part]}
                candidates = [{"content": content, **more}]
                exchange.send({"candidates": candidates, "usageMetadata": usage})

        self.upstream.respond = respond
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
        for _ in range(2):  # the first one finds out that the format is foreign
            self.upstream.exchanges.clear()
            _, answer = self.proxy.chat(model="other/m", messages=messages, max_tokens=50)
            self.assertEqual(
                answer["choices"],
                [
                    {
                        "index": 0,
                        "logprobs": None,
                        "finish_reason": "length",
                        "message": {
                            "role": "assistant",
                            "content": "Hello",
                            "refusal": None,
                            "reasoning_content": "hm",
                        },
                    }
                ],
            )
            self.assertEqual(answer["usage"], USAGE)
            sent = self.exchange().body
            self.assertEqual(sent["contents"], [{"role": "user", "parts": [{"text": "a"}]}])
            self.assertEqual(sent["systemInstruction"], {"parts": [{"text": "S"}]})
            self.assertEqual(sent["generationConfig"]["maxOutputTokens"], 50)
        self.upstream.respond = failing(429, {"error": {"message": "slow down"}})
        self.upstream.exchanges.clear()
        status, answer = self.proxy.chat(model="other/m")
        self.assertEqual((status, answer["error"]["message"]), (429, "slow down"))
        self.exchange()
        tool = {"type": "function", "function": {"name": "f"}}
        for param, fields in (
            ("messages", {"content": [PICTURE]}),
            ("tools", {"tools": [tool]}),
            ("response_format", {"response_format": {"type": "json_object"}}),
        ):
            status, answer = self.proxy.chat(model="other/m", **fields)
            self.assertEqual((status, answer["error"]["param"]), (400, param))
        self.exchange()

    def test_large_prompts(self):
        payload = PNG.rstrip("=") * 180000
        payload = payload[: len(payload) // 4 * 4]
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + payload}}
        for model in FORMATS.values():
            self.upstream.exchanges.clear()
            self.assertEqual(self.proxy.content([picture], model=model), HELLO)
            self.assertIn(payload.encode(), self.exchange().raw)

    def test_models(self):
        for name in ("github-copilot/no-such", "anthropic/claude", "opencode/big-pickle"):
            status, answer = self.proxy.chat(model=name)
            self.assertEqual((status, answer["error"]["code"]), (404, "model_not_found"))
        self.assertEqual(self.upstream.exchanges, [])
        listed = json.loads(self.proxy.request("GET", "/v1/models")[2])["data"]
        names = [model["id"] for model in listed]
        self.assertEqual(names[0], self.proxy.health()["model"])
        providers = {name.partition("/")[0] for name in names}
        self.assertEqual(providers, {"github-copilot", "local", "other"})

    # -- passed through

    def test_pass_through(self):
        bodies = {
            "/v1/responses": (
                RESPONSES,
                {
                    "input": [{"role": "user", "content": "w\u00f6 1.0"}],
                    "reasoning": {"effort": "low"},
                    "metadata": {"a": "b"},
                },
            ),
            "/v1/messages": (
                MESSAGES,
                {
                    "max_tokens": 7,
                    "temperature": 1.0,
                    "messages": [{"role": "user", "content": "w\u00f6"}],
                },
            ),
        }
        answer = b'event: a\r\ndata: {"text": "w\xc3\xb6r"}\r\n\r\n: odd\n\ndata: [DONE]\n\n'

        def respond(exchange):
            exchange.begin(content_type="text/event-stream; x=y")
            exchange.wfile.write(answer)

        for path, (model, fields) in bodies.items():
            for stream in (True, False):
                self.upstream.exchanges.clear()
                self.upstream.respond = respond if stream else failing(200, '{"n": 1.0}')
                body = {"model": model.partition("/")[2], **fields, "stream": stream}
                status, headers, data = self.proxy.request(
                    "POST", path, body, {"anthropic-beta": "a-1", "X-Private": "p"}
                )
                expected = answer if stream else b'{"n": 1.0}'
                self.assertEqual((status, data), (200, expected), path)
                sent = dict(self.exchange().body)
                self.assertIn(sent.pop("store", False), (False,))
                self.assertEqual(sent, body)
                self.assertEqual(
                    (
                        self.exchange().headers["anthropic-beta"],
                        self.exchange().headers["X-Private"],
                    ),
                    ("a-1", None),
                )
            self.upstream.respond = failing(429, '{"odd": 1}', Retry_After="3")
            status, headers, data = self.proxy.request("POST", path, body)
            self.assertEqual((status, data, headers["Retry-After"]), (429, b'{"odd": 1}', "3"))
            self.upstream.exchanges.clear()
            status, _, data = self.proxy.request("POST", path, {**body, "model": "gpt-5-mini"})
            error = json.loads(data)["error"]
            self.assertEqual((status, error["code"]), (400, "wrong_endpoint"))
            self.assertRegex(error["message"], "gpt-5-mini .*/chat/completions")
            status, _, data = self.proxy.request("POST", path, {**body, "model": "llama-none"})
            self.assertEqual(status, 404)
            self.assertEqual("type" in json.loads(data), path == "/v1/messages")
            self.assertEqual(self.upstream.exchanges, [])


class RealFaultTest(RealCase):
    """Every fault reaches the client at once, once, and with one POST."""

    changes = {"requests_per_process": 40, "timeout": 3.0}
    PART = chat_chunk({"content": "part"})

    def check(self, respond, status, code, text, broken=None, model=CHAT):
        """Ask whole and streamed; `broken` is the error's code where a stream has begun."""
        self.upstream.respond = respond
        self.upstream.exchanges.clear()
        got, answer = self.proxy.chat(model=model)
        self.assertEqual((got, answer["error"]["code"]), (status, code), answer)
        self.assertIn(text, answer["error"]["message"])
        if broken is None:
            got, _, data = self.proxy.request(
                "POST", "/v1/chat/completions", chat_body(model=model, stream=True)
            )
            self.assertEqual((got, json.loads(data)["error"]["code"]), (status, code))
        else:
            events = self.proxy.stream(model=model)
            self.assertEqual(deltas_of(events[:-2])[1:], [{"content": "part"}])
            self.assertEqual((events[-2]["error"]["code"], events[-1]), (broken, "[DONE]"))
        self.assertEqual(len(self.upstream.exchanges), 2)

    def test_refusals(self):
        for status in (400, 401, 403, 404, 413, 429, 500, 503):
            body = {"error": {"message": "the words", "code": "c"}}
            for model in FORMATS.values() if status == 429 else (CHAT,):
                self.check(failing(status, body), status, "c", "the words", model=model)
        self.check(failing(502, "<html><b>Unicorn!</b></html>", "text/html"), 502, None, "Unicorn!")
        self.upstream.respond = failing(429, "{}", Retry_After="7")
        _, headers, _ = self.proxy.request("POST", "/v1/chat/completions", chat_body())
        self.assertEqual(headers["Retry-After"], "7")

    def test_broken_answers(self):
        def begun(*events, then=lambda exchange: None):
            def respond(exchange):
                exchange.begin()
                exchange.send(*events)
                time.sleep(0.2)
                then(exchange)

            return respond

        error = {"error": {"message": "the words", "code": "c"}}
        for respond, status, code, text, broken in (
            (lambda exchange: exchange.drop(), 502, "upstream_unreachable", "connection", None),
            (
                begun(self.PART, then=Exchange.drop),
                502,
                "incomplete_answer",
                "did not finish",
                "incomplete_answer",
            ),
            (begun(self.PART), 502, "incomplete_answer", "did not finish", "incomplete_answer"),
            (begun(self.PART, error), 502, "c", "the words", "c"),
            (begun("rubbish"), 502, "incomplete_answer", "bad data", None),
            (failing(200, error), 502, "c", "the words", None),
            (begun(then=Exchange.wait_closed), 504, "timeout", "nothing for 3 seconds", None),
            (
                begun(self.PART, then=Exchange.wait_closed),
                504,
                "timeout",
                "nothing for 3",
                "timeout",
            ),
        ):
            with self.subTest(text=text, broken=broken):
                self.check(respond, status, code, text, broken)

    def test_answers_that_do_not_end(self):
        def respond(exchange):
            exchange.begin()
            exchange.send(self.PART, chat_chunk({}, "stop"))
            exchange.wait_closed()

        self.upstream.respond = respond
        with unittest.mock.patch.object(proxy, "FINISH_SECONDS", 0.5):
            self.assertEqual(self.proxy.content(), "part")
        self.assertTrue(self.exchange().closed_by_client.wait(DEADLINE))

    def test_slow_answers(self):
        """opencode's own time-outs, a second in Upstream.login, cut nothing."""

        def respond(exchange):
            time.sleep(2)
            exchange.begin()
            exchange.send(chat_chunk({"content": "a"}))
            time.sleep(2)
            exchange.send(chat_chunk({"content": "b"}, "stop"), "[DONE]")

        self.upstream.respond = respond
        self.assertEqual(self.proxy.content(), "ab")
        self.exchange()


class RealFilesTest(unittest.TestCase):
    """The user's files, and the program as a user runs it."""

    def setUp(self):
        self.path = real_opencode()
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.folder = pathlib.Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.upstream = Upstream()
        self.stack.callback(self.upstream.close)

    def start(self, changes=None, **config):
        self.stack.enter_context(unittest.mock.patch.object(proxy, "log", lambda text: None))
        variables = {**clean_environment(), **make_home(self.folder, self.upstream, **config)}
        patch = unittest.mock.patch.dict(os.environ, variables, clear=True)
        self.stack.enter_context(patch)
        running = Running(self.path, **(changes or {}))
        self.stack.callback(running.close)
        return running

    def test_changed_files_reach_running_processes(self):
        auth = self.folder / ".local/share/opencode/auth.json"
        config = self.folder / ".config/opencode/opencode.json"
        running = self.start({"requests_per_process": 50})
        for key in ("k", "second"):
            changed = json.loads(config.read_text())
            changed["provider"]["local"]["options"]["apiKey"] = key
            config.write_text(json.dumps(changed))
            self.assertEqual(running.content(model="local/m"), HELLO)
            authorization = self.upstream.exchanges[-1].headers["Authorization"]
            self.assertEqual(authorization, "Bearer " + key)
        login = json.loads(auth.read_text())
        login["github-copilot"]["refresh"] = "gho_new"
        auth.write_text(json.dumps(login))
        before = opencode_pids()
        self.assertEqual(running.content(), HELLO)  # a renewed token is no new login
        self.assertEqual(self.upstream.exchanges[-1].headers["Authorization"], "Bearer gho_new")
        self.assertTrue(set(before) & set(opencode_pids()))

    def test_plugins_of_the_user(self):
        """One prints, and is the login to a provider that puts a Request together by itself."""
        plugin = self.folder / "login.js"
        plugin.write_text("""console.log("hello"); process.stdout.write("no newline")
            export const Login = async () => ({ auth: { provider: "local", methods: [],
              loader: async () => ({ fetch: (url, init) => { console.log("asked")
                const headers = { ...init.headers, "x-login": "yes" }
                return fetch(new Request(url, { ...init, headers })) } }) } })""")
        self.start(plugin=[plugin.as_uri()]).close()
        auth = self.folder / ".local/share/opencode/auth.json"
        auth.write_text('{"local":{"type":"api","key":"k"}}')
        running = Running(self.path, model="local/m")
        self.stack.callback(running.close)
        self.assertEqual(running.content("q", seed=7), HELLO)
        (exchange,) = self.upstream.exchanges
        self.assertEqual((exchange.headers["x-login"], exchange.body["seed"]), ("yes", 7))

    def test_a_process_that_is_killed_posts_once(self):
        running = self.start()

        def respond(exchange):
            for pid in opencode_pids():
                os.kill(pid, signal.SIGKILL)
            exchange.wait_closed()

        self.upstream.respond = respond
        status, answer = running.chat()
        self.assertEqual((status, answer["error"]["code"]), (502, "opencode_failed"))
        self.assertEqual(len(self.upstream.exchanges), 1)
        self.upstream.respond = answer_text
        self.assertEqual(running.content(), HELLO)

    def test_nothing_of_the_machine_and_nothing_left(self):
        (self.folder / "AGENTS.md").write_text("Answer like a pirate.")
        running = self.start(
            {"spares": 0}, instructions=[str(self.folder / "AGENTS.md")], username="somebody"
        )
        known = set(self.folder.rglob("*"))
        self.assertEqual(running.content("a private prompt", tools=[]), HELLO)
        (exchange,) = self.upstream.exchanges
        self.assertIsNone(SYSTEM_PROMPT.search(exchange.raw))
        running.close()
        self.assertEqual(opencode_pids(), [])
        left = [path for path in self.folder.rglob("*") if path not in known and path.is_file()]
        self.assertEqual([path for path in left if b"private prompt" in path.read_bytes()], [])

    def test_the_port_of_opencode_has_a_password(self):
        self.start()
        (pid,) = opencode_pids()
        inodes = {os.readlink(path) for path in pathlib.Path(f"/proc/{pid}/fd").iterdir()}
        rows = [line.split() for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()]
        ports = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]
        self.assertTrue(ports)
        for address in ports:
            host, port = address.split(":")
            self.assertEqual(host, "0100007F")
            connection = http.client.HTTPConnection("127.0.0.1", int(port, 16), timeout=DEADLINE)
            with contextlib.closing(connection):
                connection.request("GET", "/config")
                self.assertEqual(connection.getresponse().status, 401)

    @staticmethod
    def living_in(folder):
        """Return the processes that work in a folder below this one."""
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):
                found += [path] if os.readlink(path).startswith(str(folder)) else []
        return found

    def test_the_program_and_its_end(self):
        """Killed, it leaves no opencode behind, and the next one removes what it left on disk."""
        variables = {**clean_environment(), **make_home(self.folder, self.upstream)}
        temporary = self.folder / "tmp"
        temporary.mkdir()
        for end, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            program = subprocess.Popen(
                [
                    sys.executable,
                    str(HERE / "opencode_proxy.py"),
                    "--host",
                    "127.0.0.1",
                    "--port",
                    str(port),
                    "--opencode",
                    self.path,
                ],
                stderr=subprocess.PIPE,
                universal_newlines=True,
                env={**variables, "TMPDIR": str(temporary)},
            )
            self.stack.callback(program.stderr.close)
            self.stack.callback(program.kill)
            while "base URL" not in program.stderr.readline():
                self.assertIsNone(program.poll())
            self.assertEqual(Client(port).content(), HELLO)
            self.assertTrue(self.living_in(temporary))
            program.send_signal(end)
            self.assertEqual(program.wait(DEADLINE), code)
            self.assertTrue(eventually(lambda: not self.living_in(temporary)))
        self.assertEqual(list(temporary.glob("opencode-proxy-*")), [])


class RealLoginTest(RealCase):
    """With a login as it really is: GPT over /responses, Claude over /messages, ChatGPT."""

    provider = Services

    def test_live_models_choose_their_formats(self):
        listed = json.loads(self.proxy.request("GET", "/v1/models")[2])["data"]
        names = [model["id"] for model in listed]
        live = {name for name in names if name.startswith("github-copilot/")}
        self.assertEqual(live, {"github-copilot/" + row[0] for row in OFFERS})
        for name, model in LIVE.items():
            self.upstream.exchanges.clear()
            for fields in (
                {},
                {
                    "max_tokens": 1,
                    "temperature": 0.5,
                    "top_p": 0.5,
                    "user": "u",
                    "stop": ["\n\n"],
                    "metadata": {"a": "b"},
                },
                {
                    "messages": [
                        {"role": "system", "content": "S"},
                        {"role": "user", "content": "q"},
                    ]
                },
            ):
                status, answer = self.proxy.chat(model=model, **fields)
                self.assertEqual(
                    (status, answer.get("usage", {}).get("total_tokens")),
                    (200, 31),
                    (model, answer),
                )
            formats = {exchange.format for exchange in self.upstream.exchanges}
            self.assertEqual(formats, {"responses" if name == "chatgpt" else name})
        last = self.upstream.exchanges[-1].body
        self.assertEqual((last["instructions"], last["store"]), ("S", False))
        self.assertEqual(
            last["input"], [{"role": "user", "content": [{"type": "input_text", "text": "q"}]}]
        )
        self.assertLessEqual(set(self.upstream.hosts), {COPILOT, CHATGPT})

    def test_claude_is_asked_for_no_more_than_it_has(self):
        for model, most in ((MESSAGES, 32000), ("github-copilot/claude-opus-4.6", 8000)):
            self.upstream.exchanges.clear()
            self.assertEqual(self.proxy.content(model=model), HELLO)
            self.assertEqual(self.exchange().body["max_tokens"], most)

    def test_efforts_and_sampling(self):
        fields = {"reasoning_effort": "low", "temperature": 0.5}
        self.assertEqual(self.proxy.content(model=CHAT, **fields), HELLO)
        body = self.exchange().body
        self.assertEqual((body["reasoning"]["effort"], "temperature" in body), ("low", False))
        self.assertNotIn("prompt_cache_key", body)


# ------------------------------------------------------------------------------------- real clients
class RealOpenAITest(RealCase):
    """The `openai` library, unchanged, on all wire formats."""

    HELLO = [{"role": "user", "content": "hi"}]

    @classmethod
    def setUpClass(cls):
        try:
            import openai
        except ImportError:
            missing("the library openai (pip install openai)")
        cls.openai = openai
        super().setUpClass()

    def setUp(self):
        super().setUp()
        url = f"http://127.0.0.1:{self.proxy.port}/v1"
        self.client = self.openai.OpenAI(base_url=url, api_key="any", max_retries=1)
        self.addCleanup(self.client.close)
        self.create = self.client.chat.completions.create

    def test_whole_streamed_and_async(self):
        async def ask(model):
            url = str(self.client.base_url)
            async with self.openai.AsyncOpenAI(base_url=url, api_key="any") as client:
                stream = await client.chat.completions.create(
                    model=model, messages=self.HELLO, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        for model in FORMATS.values():
            answer = self.create(model=model, messages=self.HELLO)
            text = answer.choices[0].message.content
            self.assertEqual((text, answer.usage.total_tokens), (HELLO, 31))
            with self.create(
                model=model,
                messages=self.HELLO,
                stream=True,
                stream_options={"include_usage": True},
            ) as stream:
                *chunks, last = list(stream)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            self.assertEqual((text, last.usage.total_tokens), (HELLO, 31))
            self.assertEqual(asyncio.run(ask(model)), HELLO)
        names = [model.id for model in self.client.models.list()]
        self.assertEqual(self.client.models.retrieve(names[0]).id, names[0])

    def test_tools(self):
        def respond(exchange):
            if b"sunny" in exchange.raw:
                return answering(("text", "It is sunny"))(exchange)
            return answering(
                ("call", "call_1", "weather", ['{"city": "Par', 'is"}']), finish="tool_calls"
            )(exchange)

        self.upstream.respond = respond
        tools = [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
                },
            }
        ]
        for model in FORMATS.values():
            messages = list(self.HELLO)
            with self.client.chat.completions.stream(
                model=model, messages=messages, tools=tools
            ) as stream:
                message = stream.get_final_completion().choices[0].message
            call = message.tool_calls[0]
            self.assertEqual(
                (call.function.name, call.function.arguments), ("weather", '{"city": "Paris"}')
            )
            messages += [
                message.model_dump(exclude_none=True, exclude={"parsed"}),
                {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
            ]
            answer = self.create(model=model, messages=messages, tools=tools)
            self.assertEqual(answer.choices[0].message.content, "It is sunny")

    def test_schemas(self):
        from pydantic import BaseModel

        class City(BaseModel):
            name: str

        self.upstream.respond = answering(("text", '{"name":'), ("text", '"Paris"}'))
        for model in FORMATS.values():
            answer = self.client.chat.completions.parse(
                model=model, messages=self.HELLO, response_format=City
            )
            self.assertEqual(answer.choices[0].message.parsed, City(name="Paris"))
            self.assertIn(b'"json_schema"', self.upstream.exchanges[-1].raw)

    def test_responses(self):
        stream = self.client.responses.create(model="gpt-5.4-mini", input="hi", stream=True)
        events = list(stream)
        text = "".join(
            event.delta for event in events if event.type == "response.output_text.delta"
        )
        self.assertEqual((text, events[-1].response.usage.total_tokens), (HELLO, 31))


NPM = os.environ.get("OPENCODE_PROXY_TEST_NPM")
AI_SDK = r"""
import { createOpenAICompatible } from "@ai-sdk/openai-compatible"
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai"
import { z } from "zod"
const [baseURL, name] = process.argv.slice(2)
const options = { name: "proxy", baseURL, includeUsage: true, supportsStructuredOutputs: true }
const model = createOpenAICompatible(options)(name)
const out = {}
const whole = await generateText({ model, prompt: "plain" })
Object.assign(out, { text: whole.text, tokens: whole.usage.totalTokens, pieces: [] })
for await (const piece of streamText({ model, prompt: "plain" }).textStream) out.pieces.push(piece)
const execute = async ({ city }) => "sunny in " + city
const weather = tool({ description: "d", inputSchema: z.object({ city: z.string() }), execute })
const steps = { tools: { weather }, stopWhen: stepCountIs(3) }
out.tools = (await generateText({ model, prompt: "tools", ...steps })).text
const schema = z.object({ name: z.string() })
out.object = (await generateObject({ model, prompt: "object", schema })).object
console.log(JSON.stringify(out))
"""


class RealAISDKTest(RealCase):
    """The `ai` SDK, unchanged, on all wire formats."""

    def test_text_stream_tools_and_object(self):
        if not NPM or not shutil.which("node"):
            missing("the npm packages ai and @ai-sdk/openai-compatible")

        def respond(exchange):
            parts, finish = [("text", "Hel"), ("text", "lo")], "stop"
            if b"sunny in Paris" in exchange.raw:
                parts = [("text", "It is sunny")]
            elif b'"tools"' in exchange.raw and b'"weather"' in exchange.raw:
                parts, finish = [("call", "c1", "weather", ['{"city":"Pa', 'ris"}'])], "tool_calls"
            elif b'"object"' in exchange.raw and b"schema" in exchange.raw:
                parts = [("text", '{"name":"Paris"}')]
            answering(*parts, finish=finish)(exchange)

        self.upstream.respond = respond
        script = pathlib.Path(NPM) / "test.mjs"
        script.write_text(AI_SDK)
        url = f"http://127.0.0.1:{self.proxy.port}/v1"
        for model in FORMATS.values():
            run = subprocess.run(
                ["node", str(script), url, model],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=DEADLINE,
                check=False,
            )
            self.assertEqual(run.returncode, 0, run.stdout)
            self.assertEqual(
                json.loads(run.stdout.splitlines()[-1]),
                {
                    "text": "Hello",
                    "tokens": 31,
                    "pieces": ["Hel", "lo"],
                    "tools": "It is sunny",
                    "object": {"name": "Paris"},
                },
            )


# ---------------------------------------------------------------------------- names, configuration
def listed_model(name, **changes):
    """Return what `opencode models` prints of a model."""
    provider, _, model = name.partition("/")
    able = dict.fromkeys(("temperature", "reasoning", "attachment", "toolcall"), True)
    entry = {
        "id": model,
        "providerID": provider,
        "name": model.title(),
        "api": {"id": model, "npm": "n", "url": "u"},
        "capabilities": {**able, "input": {"text": True, "audio": False}, "output": {"text": True}},
        "limit": {"context": 128000, "output": 16384},
        "options": {},
        "headers": {},
    }
    return {**entry, **changes}


def catalog_of(*names, requested=None, logins=("login",)):
    return proxy.make_catalog([listed_model(name) for name in names], logins, requested)


COPILOT_NAMES = (
    "github-copilot/gpt-5-mini",
    "github-copilot/gpt-5.4-mini",
    "github-copilot/claude-sonnet-4.6",
    "github-copilot/claude-haiku-4.5",
    "openai/gpt-5.5",
    "openai/gpt-5-mini",
    "anthropic/claude-opus-4-5-20251101",
)


class NamesTest(unittest.TestCase):
    """Which model is meant by a name."""

    SPELLINGS = (
        ("no name", None, "github-copilot/gpt-5-mini"),
        ("the name", "openai/gpt-5-mini", "openai/gpt-5-mini"),
        ("bare, at the default provider", "gpt-5-mini", "github-copilot/gpt-5-mini"),
        ("bare, at another provider", "gpt-5.5", "openai/gpt-5.5"),
        ("upper case", "GPT-5-Mini", "github-copilot/gpt-5-mini"),
        ("a dash for the dot", "claude-sonnet-4-6", "github-copilot/claude-sonnet-4.6"),
        ("a dot for the dash", "claude-opus-4.5", "anthropic/claude-opus-4-5-20251101"),
        ("the day", "claude-haiku-4-5-20251001", "github-copilot/claude-haiku-4.5"),
        ("the day with dashes", "gpt-5-mini-2025-08-07", "github-copilot/gpt-5-mini"),
        ("Ollama's suffix", "gpt-5-mini:latest", "github-copilot/gpt-5-mini"),
        ("Claude Code's suffix", "claude-sonnet-4-6[1m]", "github-copilot/claude-sonnet-4.6"),
        ("a word of LiteLLM", "github_copilot/gpt-5-mini", "github-copilot/gpt-5-mini"),
        ("a word of Google", "models/gpt-5.5", "openai/gpt-5.5"),
        ("two words", "x/y/gpt-5.5", "openai/gpt-5.5"),
        ("another spelling with a provider", "openai/GPT-5-5", "openai/gpt-5.5"),
        ("bare and unknown", "gpt-4o", "github-copilot/gpt-5-mini"),
    )

    def test_every_spelling_finds_its_model(self):
        catalog = catalog_of(*COPILOT_NAMES)
        for name, requested, expected in self.SPELLINGS:
            with self.subTest(name):
                self.assertEqual(catalog.resolve(requested).name, expected)

    RELATIVES = (
        ("an older haiku", "claude-3-5-haiku-20241022", "github-copilot/claude-haiku-4.5"),
        ("a newer sonnet", "claude-sonnet-9", "github-copilot/claude-sonnet-4.6"),
        ("an older mini", "gpt-4o-mini", "github-copilot/gpt-5.4-mini"),
        ("without a size", "gpt-4.1", "openai/gpt-5.5"),
        ("a known one", "gpt-5-mini", "github-copilot/gpt-5-mini"),
    )

    def test_where_the_model_matters_the_newest_relative_answers(self):
        catalog = catalog_of(*COPILOT_NAMES)
        for name, requested, expected in self.RELATIVES:
            with self.subTest(name):
                self.assertEqual(catalog.resolve(requested, exact=True).name, expected)

    def test_what_nobody_offers_is_not_found(self):
        catalog = catalog_of(*COPILOT_NAMES)
        for requested, exact in (("github-copilot/gpt-9", False), ("llama-3", True)):
            with self.subTest(requested), self.assertRaises(proxy.APIError) as caught:
                catalog.resolve(requested, exact)
            self.assertEqual(
                (caught.exception.status, caught.exception.code), (404, "model_not_found")
            )

    DEFAULTS = (
        (
            "the usual one",
            ("github-copilot/gpt-4.1", "github-copilot/gpt-5-mini"),
            None,
            "github-copilot/gpt-4.1",
        ),
        ("its successor", COPILOT_NAMES, None, "github-copilot/gpt-5-mini"),
        ("only a ChatGPT login", ("openai/gpt-5.4", "openai/gpt-5.5"), None, "openai/gpt-5.5"),
        ("only another key", ("z/b", "acme/m", "z/a"), None, "acme/m"),
        ("chosen", COPILOT_NAMES, "openai/gpt-5.5", "openai/gpt-5.5"),
        ("chosen by a bare name", COPILOT_NAMES, "gpt-5.5", "openai/gpt-5.5"),
        ("chosen, and not offered", COPILOT_NAMES, "github-copilot/gpt-9", "github-copilot/gpt-9"),
        ("chosen bare, and not offered", COPILOT_NAMES, "gpt-9", "github-copilot/gpt-9"),
        ("nobody is logged in", (), None, "github-copilot/gpt-4.1"),
    )

    def test_the_default_is_the_best_that_is_there(self):
        for name, offered, requested, expected in self.DEFAULTS:
            with self.subTest(name):
                self.assertEqual(catalog_of(*offered, requested=requested).default, expected)

    def test_without_a_login_the_free_models_are_named_but_never_used(self):
        catalog = catalog_of("opencode/some-free", "opencode/big-pickle")
        self.assertEqual(catalog.names, ())
        for requested in (None, "gpt-5-mini"):
            with self.subTest(requested), self.assertRaises(proxy.APIError) as caught:
                catalog.resolve(requested)
            self.assertEqual(caught.exception.code, "provider_not_logged_in")
            self.assertIn("`opencode auth login`", caught.exception.message)
            self.assertIn("--model opencode/big-pickle", caught.exception.message)
            self.assertIn("opencode's cloud", caught.exception.message)

    def test_the_free_models_are_there_for_who_chose_them(self):
        for name, catalog in (
            ("by --model", catalog_of("opencode/big-pickle", requested="opencode/big-pickle")),
            ("by a login", catalog_of("opencode/big-pickle", logins=("opencode",))),
        ):
            with self.subTest(name):
                self.assertEqual(catalog.resolve(None).name, "opencode/big-pickle")

    def test_a_model_knows_its_limits_and_title(self):
        model = catalog_of("acme/m").models["acme/m"]
        self.assertEqual(model, proxy.Model("acme/m", True, 16384, 128000, "M"))


class ConfigurationTest(unittest.TestCase):
    """What a process is given of the user's configuration."""

    NO_PROXY = (
        ("unset", "", "127.0.0.1,localhost,::1"),
        ("others", "a.example, .corp", "a.example,.corp,127.0.0.1,localhost,::1"),
        ("complete", "::1,localhost,127.0.0.1", "::1,localhost,127.0.0.1"),
    )

    def test_requests_to_itself_go_around_a_proxy(self):
        for name, value, expected in self.NO_PROXY:
            with self.subTest(name):
                self.assertEqual(proxy.with_loopback(value), expected)

    def test_content_may_have_comments_and_names_files_of_this_folder(self):
        text = """// a comment, with "quotes"
            {"a": "no // comment", /* , } */ "b": ["{file:k}", "{file:/k}", "{file:~/k}",],}"""
        here = os.path.abspath("k")
        self.assertEqual(
            proxy.read_config_content(text),
            {"a": "no // comment", "b": ["{file:" + here + "}", "{file:/k}", "{file:~/k}"]},
        )
        self.assertEqual(proxy.read_config_content(" "), {})
        for wrong in ("{", "[1]", "1"):
            with self.subTest(wrong), self.assertRaisesRegex(proxy.StartError, "CONFIG_CONTENT"):
                proxy.read_config_content(wrong)

    def test_ours_is_merged_over_the_users(self):
        users = {
            "provider": {"a": {"name": "A", "options": {"x": 1}}},
            "share": "auto",
            "plugin": ["p"],
        }
        ours = {"provider": {"a": {"options": {"y": 2}}}, "share": "disabled", "plugin": ["q"]}
        self.assertEqual(
            proxy.merge_configuration(users, ours),
            {
                "provider": {"a": {"name": "A", "options": {"x": 1, "y": 2}}},
                "share": "disabled",
                "plugin": ["p", "q"],
            },
        )

    def test_files_that_are_named_are_found_beside_the_private_configuration(self):
        with tempfile.TemporaryDirectory() as folder:
            source = pathlib.Path(folder, "user/config/opencode")
            target = pathlib.Path(folder, "proxy/home/config/opencode")
            source.mkdir(parents=True)
            target.mkdir(parents=True)
            for name in (
                "./key",
                "keys/key",
                "../above",
                "/etc/absolute",
                "~/home",
                "../../../../out",
            ):
                (source / "opencode.json").write_text(f'{{"a": "{{file:{name}}}"}}')
                proxy.link_references(source / "opencode.json", target)
            links = {
                str(path.relative_to(pathlib.Path(folder, "proxy"))): os.readlink(path)
                for path in pathlib.Path(folder, "proxy").rglob("*")
                if path.is_symlink()
            }
            self.assertEqual(
                links,
                {
                    "home/config/opencode/key": f"{source}/key",
                    "home/config/opencode/keys/key": f"{source}/keys/key",
                    "home/config/above": f"{source.parent}/above",
                },
            )


class RealConfigurationTest(unittest.TestCase):
    """However a user configures opencode, the proxy knows what plain opencode knows."""

    def provider(self, key):
        options = {"baseURL": self.upstream.url + "/v1", "apiKey": key}
        own = {"npm": "@ai-sdk/openai-compatible", "options": options, "models": {"m": {}}}
        return json.dumps({"provider": {"acme": own}})

    def relative_reference(self):
        (self.folder / ".config/opencode/acme.key").write_text("secret")
        path = self.folder / ".config/dotfiles/opencode.json"
        path.parent.mkdir()
        path.write_text(self.provider("{file:./acme.key}"))
        link = self.folder / ".config/opencode/opencode.json"
        link.unlink()
        link.symlink_to(path)
        return {}

    def relative_file(self):
        (self.folder / "own.json").write_text(self.provider("{file:../key-of-acme}"))
        (self.folder.parent / "key-of-acme").write_text("secret")
        return {"OPENCODE_CONFIG": "own.json"}

    def folder_of_configuration(self):
        (self.folder / "more").mkdir()
        (self.folder / "more/key").write_text("secret")
        (self.folder / "more/opencode.json").write_text(self.provider("{file:key}"))
        return {"OPENCODE_CONFIG_DIR": "more"}

    def content_of_configuration(self):
        (self.folder / "key").write_text("secret")
        return {"OPENCODE_CONFIG_CONTENT": "// mine\n" + self.provider("{file:key}")}

    def company_proxy(self):
        nobody = "http://127.0.0.1:9"
        (self.folder / ".config/opencode/opencode.json").write_text(self.provider("secret"))
        return {"HTTP_PROXY": nobody, "HTTPS_PROXY": nobody, "NO_PROXY": "corp.example"}

    def test_providers_are_found(self):
        path = real_opencode()
        for make in (
            self.relative_reference,
            self.relative_file,
            self.folder_of_configuration,
            self.content_of_configuration,
            self.company_proxy,
        ):
            with self.subTest(make.__name__), contextlib.ExitStack() as stack:
                outer = stack.enter_context(tempfile.TemporaryDirectory())
                self.folder = pathlib.Path(outer, "home")
                self.upstream = Upstream()
                stack.callback(self.upstream.close)
                variables = {**clean_environment(), **make_home(self.folder, self.upstream)}
                stack.callback(os.chdir, os.getcwd())
                os.chdir(self.folder)
                variables.update(make())
                patch = unittest.mock.patch.dict(os.environ, variables, clear=True)
                stack.enter_context(patch)
                stack.enter_context(unittest.mock.patch.object(proxy, "log", lambda text: None))
                running = Running(path)
                stack.callback(running.close)
                self.assertEqual(running.content(model="acme/m"), HELLO)
                key = self.upstream.exchanges[0].headers["Authorization"]
                self.assertEqual(key, "Bearer secret")


class RealMemoryTest(unittest.TestCase):
    """How the real opencode is kept from collecting garbage at every token, and what if not."""

    def start(self, *wrapper):
        """Return a running proxy whose opencode is started by a shell script `wrapper`."""
        program = real_opencode()
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if wrapper:
            script = folder / "opencode"
            script.write_text("\n".join(("#!/bin/sh", *wrapper)).format(program))
            script.chmod(0o700)
            program = str(script)
        upstream = Upstream()
        stack.callback(upstream.close)
        variables = {**clean_environment(), **make_home(folder, upstream)}
        stack.enter_context(unittest.mock.patch.dict(os.environ, variables, clear=True))
        stack.enter_context(unittest.mock.patch.object(proxy, "log", lambda text: None))
        running = Running(program)
        stack.callback(running.close)
        return running

    def collecting(self, running):
        """Return what /health tells before and after the process has been replaced by another."""
        first = running.health()["collecting"]
        self.assertEqual(running.content(), HELLO)
        self.assertTrue(running.becomes(running=0, spares=1))
        return first, running.health()["collecting"]

    @staticmethod
    def repeating_timers():
        """Return how many timers of one second each opencode process has."""
        counts = []
        for pid in opencode_pids():
            infos = pathlib.Path(f"/proc/{pid}/fdinfo").iterdir()
            counts.append(sum("it_interval: (1, 0)" in info.read_text() for info in infos))
        return counts

    @unittest.skipUnless(sys.platform == "linux", "only on Linux the timers can be found")
    def test_the_timers_are_closed_before_opencode_is_loaded(self):
        running = self.start()
        self.assertEqual(self.repeating_timers(), [0])
        self.assertEqual(self.collecting(running), ("rarely", "rarely"))

    @unittest.skipUnless(sys.platform == "linux", "only on Linux the timers can be found")
    def test_the_plugin_closes_them_where_the_preload_did_not_run(self):
        running = self.start("unset BUN_INSPECT_PRELOAD", 'exec {} "$@"')
        self.assertEqual(self.repeating_timers(), [0])
        self.assertEqual(self.collecting(running), ("rarely", "rarely"))

    def test_where_they_are_not_found_later_processes_do_not_collect(self):
        """An empty folder hides what the kernel tells of the files of a process."""
        hide = "mount --bind $(mktemp -d) /proc/$$/fdinfo"
        command = ["unshare", "-m", "sh", "-c", hide]
        if not shutil.which("unshare") or subprocess.run(command, check=False).returncode:
            self.skipTest("mount namespaces are not allowed here")
        running = self.start(f"""exec unshare -m sh -c '{hide}; exec "$0" "$@"' {{}} "$@" """)
        self.assertEqual(self.collecting(running), ("at every token", "never"))

    def test_without_room_for_the_ballast_it_starts_all_the_same(self):
        if not shutil.which("prlimit"):
            self.skipTest("prlimit is missing")
        running = self.start(f'exec prlimit --as={self.address_space()} {{}} "$@"')
        self.assertEqual(self.collecting(running), ("rarely", "rarely"))

    def address_space(self):
        """Return the bytes that opencode reserves, and room for all but a ballast."""
        self.start()
        (pid,) = opencode_pids()
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        peak = int(re.search(r"VmPeak:\s+(\d+)", status)[1]) << 10
        self.doCleanups()
        return peak - (1 << 30)


if __name__ == "__main__":
    unittest.main()
