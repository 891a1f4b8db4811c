"""Tests of opencode_proxy, in the program's order. Run with `python3 -m unittest` in this folder.

Tables test pure functions. FakeCase has a fake opencode, RealCase the real one, and on loopback a
provider, Upstream, or Services: a login as it really is. Where the real opencode or a client's
library is missing, tests are skipped, or fail with OPENCODE_PROXY_TEST_ALL=1.

Nothing here waits for a while and hopes: a test waits for what must happen (`eventually`), and
where the program waits for a time to pass, a Clock is put on.
"""

import asyncio
import base64
import calendar
import concurrent.futures
import contextlib
import errno
import functools
import gzip
import http.client
import http.server
import io
import itertools
import json
import os
import pathlib
import random
import re
import resource
import select
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
import types
import unittest.mock
import urllib.parse
import zlib
from typing import Any, NamedTuple

import opencode_proxy as proxy

HERE = pathlib.Path(__file__).resolve().parent
DEADLINE = 120.0  # for what must happen; long, because machines are slow when they are busy
SOON = 30.0  # the same where a time-out of the program would end it too, later


def eventually(condition, seconds=DEADLINE):
    """Return the first true value of `condition()`, or its last one after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() >= deadline:
            return value
        time.sleep(0.02)


def at_once(call, items):
    """Return [call(item) for item in items], called at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(items)) as threads:
        return list(threads.map(call, items))


def missing(what):
    """Skip a test for want of `what`, or fail it where everything must be there."""
    if os.environ.get("OPENCODE_PROXY_TEST_ALL") == "1":
        raise AssertionError(what + " is missing")
    raise unittest.SkipTest(what + " is missing")


class Clock:
    """Python's `time`, for the program alone, which a test can put on by `ahead` seconds."""

    def __init__(self):
        self.ahead = 0.0

    def monotonic(self):
        return time.monotonic() + self.ahead

    def __getattr__(self, name):
        return getattr(time, name)


class SlowLock:
    """A lock that others get first, where two want it at about the same time."""

    def __init__(self):
        self._lock = threading.Lock()

    def acquire(self, *arguments, **more):
        time.sleep(0.005)
        return self._lock.acquire(*arguments, **more)

    def release(self):
        self._lock.release()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *error):
        self.release()


# ------------------------------------------------------------------------- a provider on loopback
CHAT = "github-copilot/gpt-5-mini"
RESPONSES = "github-copilot/gpt-5.4-mini"
MESSAGES = "github-copilot/claude-sonnet-4.6"
FORMATS = {"chat/completions": CHAT, "responses": RESPONSES, "messages": MESSAGES}
OAUTH = {"type": "oauth", "refresh": "gho_x", "access": "gho_x", "expires": 0}


def format_of(path):
    """Return the wire format that a request's path ends with, or the path."""
    bare = path.partition("?")[0]
    for name in FORMATS:
        if bare.endswith("/" + name):
            return name
    return path


class LoopbackServer(http.server.ThreadingHTTPServer):
    """A server on a free port, at `url`; it has a thread, and one for each connection."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self.thread.start()

    def handle_error(self, request, client_address):
        """Say nothing: clients that leave in the middle are what many tests are about."""

    def close(self):
        self.shutdown()
        self.thread.join()
        self.server_close()


class Upstream(LoopbackServer):
    """A provider of models: records each request, answers as `respond(exchange)` says.

    `exchanges` only grows, by single steps that need no lock.
    """

    def __init__(self):
        self.exchanges = []
        self.respond = answer_text
        super().__init__(Exchange)

    def login(self):
        """Return what leads to this provider: auth.json, opencode.json, environment variables."""
        claude = {"claude-sonnet-4.6": {"provider": {"npm": "@ai-sdk/anthropic"}}}
        hasty = {"headerTimeout": 1000, "chunkTimeout": 1000}
        copilot = {"models": claude, "options": {"baseURL": self.url, **hasty}}
        own = {"options": {"baseURL": self.url + "/v1", "apiKey": "k"}, "models": {"m": {}}}
        providers = {
            "github-copilot": copilot,
            "other": {"npm": "@ai-sdk/google", **own},
            "local": {"npm": "@ai-sdk/openai-compatible", **own},
        }
        return {"github-copilot": OAUTH}, {"provider": providers}, {}

    def models(self, exchange):
        """Return the list of models that a service has, None where it has none."""

    def refusal(self, exchange):
        """Return what a service says of a body that it does not take, None where it does."""


class Exchange(http.server.BaseHTTPRequestHandler):
    """One request, over TLS to a `host` or not: its `path`, `headers`, `raw`, `body`, `format`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    host = ""

    def log_message(self, *arguments):
        pass

    def finish(self):
        if not self.wfile.closed:
            super().finish()
        self.request.close()

    @functools.cached_property
    def body(self):
        return json.loads(self.raw)

    def do_CONNECT(self):
        self.host = self.path.partition(":")[0]
        self.server.hosts.append(self.host)
        if self.host not in (COPILOT, CHATGPT):
            self.send_error(502)
            return
        self.send_response(200)
        self.end_headers()
        self.request = self.server.context.wrap_socket(self.request, server_side=True)
        self.setup()

    def do_GET(self):
        """Answer with the list of models, for which opencode looks at some providers."""
        models = self.server.models(self)
        if models is None:
            failing(404, "")(self)
        else:
            failing(200, models)(self)

    def do_POST(self):
        self.raw = self.rfile.read(int(self.headers["Content-Length"]))
        self.format = format_of(self.path)
        self.closed_by_client = threading.Event()
        self.server.exchanges.append(self)
        refusal = self.server.refusal(self)
        if refusal is None:
            self.server.respond(self)
        else:
            failing(400, {"error": {"message": refusal}})(self)

    def begin(self, status=200, content_type="text/event-stream", **headers):
        """Send the head of an answer; `headers` have _ for -."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Connection", "close")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def send(self, *events):
        """Send events of a stream: objects, or text that is no JSON."""
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
RESPONSES_USAGE = {
    "input_tokens": 11,
    "input_tokens_details": {"cached_tokens": 4},
    "output_tokens": 20,
    "output_tokens_details": {"reasoning_tokens": 7},
    "total_tokens": 31,
}
MESSAGES_USAGE = {"input_tokens": 7, "cache_read_input_tokens": 4, "output_tokens": 1}
CUTS = {"length": "max_output_tokens", "content_filter": "content_filter"}
STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}


# An answer as events of each wire format: `parts` are ("text", text), ("thought", text) or
# ("call", id, name, pieces of the arguments).


def chat_chunk(delta, finish=None, **more):
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "up", "object": "chat.completion.chunk", "choices": [choice], **more}


def chat_deltas(parts):
    yield {"role": "assistant", "content": ""}
    calls = 0
    for kind, text, *call in parts:
        if kind == "text":
            yield {"content": text}
        elif kind == "thought":
            yield {"reasoning_content": text}
        else:
            name, pieces = call
            function = {"name": name, "arguments": ""}
            first = {"index": calls, "id": text, "type": "function", "function": function}
            yield {"tool_calls": [first]}
            for piece in pieces:
                yield {"tool_calls": [{"index": calls, "function": {"arguments": piece}}]}
            calls += 1


def chat_stream(parts, finish="stop"):
    events = [chat_chunk(delta) for delta in chat_deltas(parts)]
    events.append(chat_chunk({}, finish))
    events.append(chat_chunk({}, choices=[], usage=USAGE))
    events.append("[DONE]")
    return events


def responses_item(index, kind, texts, *call):
    """Return an item of /responses, empty and whole, its deltas' name, and its pieces."""
    item = {"id": f"i{index}"}
    if kind == "text":
        item.update({"type": "message", "role": "assistant", "content": []})
        return item, item, "output_text", texts
    if kind == "thought":
        item.update({"type": "reasoning", "summary": []})
        return item, item, "reasoning_summary_text", texts
    name, pieces = call
    item.update({"type": "function_call", "call_id": texts, "name": name, "arguments": ""})
    return item, {**item, "arguments": "".join(pieces)}, "function_call_arguments", pieces


def together(parts):
    """Return parts, those of one kind that follow each other as one part of several texts."""
    whole = []
    for kind, text, *call in parts:
        if call:
            whole.append((kind, text, *call))
        elif whole and whole[-1][0] == kind:
            whole[-1][1].append(text)
        else:
            whole.append((kind, [text]))
    return whole


def responses_stream(parts, finish="stop"):
    events = []

    def add(step, **more):
        events.append({"type": "response." + step, **more})

    add("created", response={"id": "r", "created_at": 1, "model": "m"})
    for index, part in enumerate(together(parts)):
        empty, whole, name, pieces = responses_item(index, *part)
        place = {"output_index": index, "item_id": empty["id"]}
        add("output_item.added", item=empty, **place)
        for piece in pieces:
            add(name + ".delta", delta=piece, **place)
        add("output_item.done", item=whole, **place)
    response = {"id": "r", "usage": RESPONSES_USAGE}
    if finish in CUTS:
        add("incomplete", response={**response, "incomplete_details": {"reason": CUTS[finish]}})
    else:
        add("completed", response=response)
    return events


def messages_block(kind, text, *call):
    """Return an empty content block of /messages, and its deltas."""
    if kind == "text":
        return {"type": "text", "text": ""}, [{"type": "text_delta", "text": text}]
    if kind == "thought":
        delta = {"type": "thinking_delta", "thinking": text}
        return {"type": "thinking", "thinking": ""}, [delta]
    name, pieces = call
    block = {"type": "tool_use", "input": {}, "id": text, "name": name}
    return block, [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]


def messages_stream(parts, finish="stop"):
    message = {"id": "m", "type": "message", "role": "assistant", "model": "m", "content": []}
    events = [{"type": "message_start", "message": {**message, "usage": MESSAGES_USAGE}}]
    for index, part in enumerate(parts):
        block, deltas = messages_block(*part)
        events.append({"type": "content_block_start", "index": index, "content_block": block})
        for delta in deltas:
            events.append({"type": "content_block_delta", "index": index, "delta": delta})
        events.append({"type": "content_block_stop", "index": index})
    end = {"stop_reason": STOP_REASONS[finish]}
    events.append({"type": "message_delta", "delta": end, "usage": {"output_tokens": 20}})
    events.append({"type": "message_stop"})
    return events


STREAMS = {
    "chat/completions": chat_stream,
    "responses": responses_stream,
    "messages": messages_stream,
}


def answering(*parts, finish="stop"):
    """Return a `respond` that streams `parts`, in the format asked in, with usage if asked for."""

    def respond(exchange):
        events = STREAMS[exchange.format](parts, finish)
        options = exchange.body.get("stream_options") or {}
        if exchange.format == "chat/completions" and not options.get("include_usage"):
            del events[-2]
        exchange.begin()
        exchange.send(*events)

    return respond


answer_text = answering(("text", "Hel"), ("text", "lo "), ("text", "w\u00f6r\u2028ld"))


def failing(status, body, content_type="application/json", **headers):
    """Return a `respond` that refuses, or answers with a whole `body`."""

    def respond(exchange):
        text = body if isinstance(body, str) else json.dumps(body)
        data = text.encode()
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
COPILOT = "api.githubcopilot.com"
CHATGPT = "chatgpt.com"
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


# What the services were reported to refuse, in 2025 and 2026: each rule has words, and whether a
# body breaks it.
CHATGPT_TAKES = {
    *("include", "input", "instructions", "model", "parallel_tool_calls", "prompt_cache_key"),
    *("reasoning", "service_tier", "store", "stream", "text", "tool_choice", "tools"),
}
NO_GRAMMAR = {"minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength", "pattern"}
NO_TOOL_FIELDS = {"strict", "eager_input_streaming", "defer_loading", "input_examples"}


def first_broken(rules):
    """Return the words of the first rule that is broken, None where all are kept."""
    for words, is_broken in rules:
        if is_broken:
            return words
    return None


def objects_with(value, *names):
    """Return the objects in a JSON value that have one of these names."""
    return [each for each in proxy.objects_in(value) if not each.keys().isdisjoint(names)]


def objects_of(value, *types):
    return [each for each in proxy.objects_in(value) if each.get("type") in types]


def is_gpt_5(body):
    return body["model"].startswith("gpt-5")


def rules_of_chatgpt(body):
    roles = [item.get("role") for item in proxy.objects(body.get("input"))]
    return (
        ("Instructions are required", not body.get("instructions")),
        ("Store must be set to false", body.get("store") is not False),
        ("Stream must be set to true", body.get("stream") is not True),
        ("Input must be a list", not isinstance(body.get("input"), list)),
        ("System messages are not allowed", "system" in roles),
        ("Unsupported parameter", bool(body.keys() - CHATGPT_TAKES)),
    )


def rules_of_copilot_responses(body):
    items = proxy.objects(body.get("input"))
    ids = [str(item.get("call_id", "")) for item in items]
    items_after = [*items[1:], {"role": "user"}]
    lonely = False
    for item, after in zip(items, items_after):
        if item.get("type") == "reasoning" and after.get("role") == "user":
            lonely = True
    return (
        ("max_output_tokens: below 16", body.get("max_output_tokens", 16) < 16),
        ("service_tier is not supported", "service_tier" in body),
        ("Unknown parameter", "client_metadata" in body),
        ("ids of items", any("id" in item for item in items)),
        ("call_id: too long", any(len(call_id) > 64 for call_id in ids)),
        ("image_generation", bool(objects_of(body.get("tools"), "image_generation"))),
        ("temperature", is_gpt_5(body) and bool({"temperature", "top_p"} & body.keys())),
        ("a reasoning without its following item", lonely),
        ("an empty list of tools", body.get("tools") == []),
    )


def rules_of_copilot_chat(body):
    messages = body["messages"]
    has_calls = bool(objects_with(messages, "tool_calls"))
    sampling = {"temperature", "top_p", "stop", "max_tokens"}
    return (
        ("not with GPT-5", is_gpt_5(body) and bool(sampling & body.keys())),
        ("tools: empty", body.get("tools") == []),
        ("tool_calls: empty", any(message.get("tool_calls") == [] for message in messages)),
        ("calls, but no tools", has_calls and not body.get("tools")),
        ("null", any(message.get("refusal", "") is None for message in messages)),
    )


def rules_of_gemini(body):
    results = [message for message in body["messages"] if message["role"] == "tool"]
    schemas = list(proxy.objects_in(body.get("tools")))
    arrays = [each for each in schemas if each.get("type") == "array"]
    numbers = [each for each in schemas if each.get("type") == "integer" and "enum" in each]
    return (
        ("developer", any(each["role"] == "developer" for each in body["messages"])),
        ("a result without a name", not all(each.get("name") for each in results)),
        ("a list of types", any(isinstance(each.get("type"), list) for each in schemas)),
        ("an array without items", not all(each.get("items") for each in arrays)),
        ("an enum of numbers", bool(numbers)),
    )


def rules_of_claude(body):
    messages = body["messages"]
    texts = [block["text"] for block in objects_of(messages, "text")]
    ids = [block["id"] for block in objects_of(messages, "tool_use")]
    schemas = [tool.get("input_schema", {"type": "object"}) for tool in body.get("tools", [])]
    combined = [each for each in schemas if {"anyOf", "oneOf", "allOf"} & each.keys()]
    is_forced = body.get("tool_choice", {}).get("type") in ("any", "tool")
    answer = body.get("output_config", {}).get("format", {}).get("schema", {})
    objects = objects_of(answer, "object")
    is_open = any(each.get("additionalProperties") is not False for each in objects)
    limit = LIMITS[body["model"]]
    return (
        ("max_tokens", body["max_tokens"] > limit),
        ("temperature and top_p: not both", {"temperature", "top_p"} <= body.keys()),
        ('Unexpected role "system"', any(each["role"] == "system" for each in messages)),
        ("no prefill", messages[-1]["role"] == "assistant"),
        ("tool_use ids must be unique", len(set(ids)) < len(ids)),
        ("an id of other characters", not all(re.fullmatch("[\\w-]+", each) for each in ids)),
        ("text must be non-empty", not all(text.strip() for text in texts)),
        ("thinking and a forced tool", is_forced and "thinking" in body),
        ("anyOf on top", bool(combined)),
        ("type: Field required", not all("type" in schema for schema in schemas)),
        ("what the grammar lacks", is_open or bool(objects_with(answer, *NO_GRAMMAR))),
    )


def rules_of_copilot_claude(body):
    tools = body.get("tools", [])
    marks = [each["cache_control"] for each in objects_with(body, "cache_control")]
    return (
        ("Extra inputs", any(NO_TOOL_FIELDS & tool.keys() for tool in tools)),
        ("cache_control on top", "cache_control" in body),
        ("cache_control.scope", any("scope" in mark for mark in marks)),
        ("tool_reference", bool(objects_of(body["messages"], "tool_reference"))),
        ("calls, but no tools", bool(objects_of(body["messages"], "tool_use")) and not tools),
    )


def offer(name, endpoints, limit, efforts):
    """Return a model as GitHub lists it."""
    supports = dict.fromkeys(("streaming", "tool_calls", "vision", "parallel_tool_calls"), True)
    if efforts:
        supports["reasoning_effort"] = efforts.split()
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


def server_context():
    """Return what a server on loopback speaks TLS with."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(KEY_PAIR)
        file.flush()
        context.load_cert_chain(file.name)
    return context


class Services(Upstream):
    """A CONNECT proxy to the services that a login leads to; `hosts` are what was asked for."""

    def __init__(self):
        self.hosts = []
        self.context = server_context()
        super().__init__()

    def login(self):
        chatgpt = {**OAUTH, "access": "a.b.c", "expires": 99999999999999, "accountId": "account"}
        variables = {
            "HTTPS_PROXY": self.url,
            "NO_PROXY": "127.0.0.1,localhost",
            "NODE_TLS_REJECT_UNAUTHORIZED": "0",
        }
        return {"github-copilot": OAUTH, "openai": chatgpt}, {}, variables

    def models(self, exchange):
        if (exchange.host, exchange.path) != (COPILOT, "/models"):
            return None
        return {"data": [offer(*row) for row in OFFERS]}

    def refusal(self, exchange):
        """Return why the service refuses a body, None where it takes it."""
        body = exchange.body
        if exchange.host == CHATGPT:
            return first_broken(rules_of_chatgpt(body))
        if exchange.format == "responses":
            return first_broken(rules_of_copilot_responses(body))
        if exchange.format == "messages":
            return first_broken((*rules_of_claude(body), *rules_of_copilot_claude(body)))
        rules = rules_of_copilot_chat(body)
        if body["model"].startswith("gemini"):
            rules = (*rules, *rules_of_gemini(body))
        return first_broken(rules)


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
        if isinstance(body, (dict, list)):
            body = json.dumps(body)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        with contextlib.closing(connection):
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

    @contextlib.contextmanager
    def streaming(self, content="hi", **fields):
        """Yield a connection on which a streamed chat request was sent: getresponse() is next."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        with contextlib.closing(connection):
            body = chat_body(content, stream=True, **fields)
            connection.request("POST", "/v1/chat/completions", body)
            yield connection

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
        try:
            self.server = proxy.ProxyServer(values, self.pool)
        except BaseException:
            self.pool.close()
            raise
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


def lines_until(response, text):
    """Read a streamed answer up to the line that has `text`; return its lines."""
    lines = []
    while True:
        line = response.readline()
        assert line, f"{text} did not come, only {lines}"
        lines.append(line)
        if text in line:
            return lines


def sse_events(data):
    """Return what is in the events of an SSE stream; fail on what is no event and no comment."""
    events = []
    for block in data.decode().split("\n\n"):
        if block == "data: [DONE]":
            events.append("[DONE]")
        elif block.startswith("data: "):
            events.append(json.loads(block[6:]))
        elif block and not block.startswith(":"):
            raise AssertionError(f"not an event: {block!r}")
    return events


def deltas_of(events):
    """Return the deltas of the chunks among `events`."""
    deltas = []
    for event in events:
        if event != "[DONE]":
            deltas += [choice["delta"] for choice in event.get("choices", ())]
    return deltas


def children(parent=None):
    """Return [pid, state, command] of each descendant of this process, or of `parent`."""
    command = ["ps", "-eo", "pid=,ppid=,stat=,args="]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode()
    rows = [line.split(None, 3) for line in output.splitlines()]
    family = {str(parent or os.getpid())}
    found = []
    for _ in range(9):  # generations
        family.update(row[0] for row in rows if row[1] in family)
    for pid, above, state, arguments in rows:
        if above in family and arguments != " ".join(command):
            found.append([int(pid), state, arguments])
    return found


def opencode_pids(parent=None):
    """Return the processes of opencode, without zombies, that serve this process or `parent`."""
    pids = []
    for pid, state, arguments in children(parent):
        if "acp" in arguments.split() and not state.startswith("Z"):
            pids.append(pid)
    return pids


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
    files = {
        ".local/share/opencode/auth.json": logins,
        ".config/opencode/opencode.json": {**own_config, **config},
    }
    for path, content in files.items():
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
# Speaks as opencode with the plugin does, and is its own provider. FAKE_MODE is Python that it runs
# when it starts, and may change `fake`. The last user message is the answer, or, where it begins
# with "do ", a script in Python that makes one. A journal beside it tells what happened.
FAKE = r'''
import itertools, json, os, signal, socket, sys, threading, time

HERE = os.path.dirname(os.path.abspath(__file__))
WINDOW = 1 << 20  # characters of an answer that are relayed before the client has taken them
PIECE = 60000  # of them in a line
ABLE = dict.fromkeys(("temperature", "reasoning", "attachment", "toolcall"), True)
ENTRY = {
    "api": {"id": "any", "url": "", "npm": "x"},
    "limit": {"output": 0},
    "capabilities": {**ABLE, "input": {}, "output": {}},
}


class Over(Exception):
    """The session is cancelled, or nobody waits for its answer."""


class Session:
    """One session; its turn runs on a thread of its own."""

    def __init__(self, name, model):
        self.name = name
        self.model = model
        self.text = ""  # the last user message
        self.order = 0  # among the answers of this process
        self.has_begun = False  # the answer
        self.sent = 0  # characters of it since the client has taken all
        self.cancelled = threading.Event()
        self.asking = None  # the socket of the ask that is waiting for its answer

    def cancel(self):
        note("cancelled", os.getpid(), self.text[:60])
        self.cancelled.set()
        if self.asking is not None:
            try:
                self.asking.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # answered meanwhile

    # -- what scripts call

    def rest(self, seconds):
        if self.cancelled.wait(seconds):
            raise Over("cancelled")

    def hold(self, name="go"):
        """Wait until the test lets go."""
        while not os.path.exists(os.path.join(HERE, name)):
            self.rest(0.02)

    def report(self, kind, **params):
        send(method="proxy/" + kind, params={"sessionId": self.name, **params})

    def data(self, text):
        """Relay a piece of the provider's answer."""
        if not self.has_begun:
            self.has_begun = True
            self.report("upstream", status=200, headers={"content-type": "text/event-stream"})
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            self.report("data", text=piece)
            self.sent += len(piece)
            if self.sent >= WINDOW:
                note("waits", self.name)
                self.ask("more", {})
                self.sent = 0

    def chunk(self, delta, finish=None, **more):
        choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
        return "data: " + json.dumps({"id": "x", "choices": choices, **more}) + "\n\n"

    def say(self, text):
        self.data(self.chunk({"content": text}))

    def do(self, script):
        own = {"session": self, "order": self.order}
        for name in ("rest", "hold", "report", "data", "chunk", "say"):
            own[name] = getattr(self, name)
        exec(script, {**globals(), **own})

    # -- its turn

    def run(self, number):
        try:
            self.turn()
            send(id=number, error={"code": -32603, "message": "Internal error: over"})
        except Over:
            send(id=number, result={"stopReason": "cancelled"})
        del fake.sessions[self.name]

    def turn(self):
        told = json.loads(self.ask("turn", {})[1])
        if told.get("warmup"):
            if fake.reaches_model:
                self.report("warm")
            return
        self.do(fake.before_request)
        body = self.body_to_send(told)
        self.do(fake.before_sending)
        self.report("sending")
        note("sent", self.name, json.dumps(body)[:4000])
        try:
            self.answer(body)
        except OSError as error:
            self.report("error", network=None, message=str(error))

    def body_to_send(self, told):
        """Ask the proxy for a body, as the plugin does when opencode is about to send its own."""
        name = self.model.partition("/")[2]
        own = {"model": name, "stream": True}
        url = "http://127.0.0.1" + fake.paths.get(self.model, "/chat/completions")
        headers, data = self.ask("request", {"url": url, "body": own})
        if data is None:
            return {**own, "contents": told["conversation"]}
        note("headers", self.name, headers.get("x-headers"))
        return json.loads(data)

    def answer(self, body):
        """Be the provider."""
        said = body.get("messages") or body.get("input") or body["contents"]
        content = said[-1].get("content") or said[-1]["parts"]
        self.text = content if isinstance(content, str) else content[-1]["text"]
        self.order = next(fake.orders)
        note("post", os.getpid(), self.text[:60])
        if self.text.startswith(("do ", "do\n")):
            self.do(self.text[3:])
        else:
            self.say(self.text)
        if self.model in fake.paths:
            self.report("end")
            return
        usage = {"prompt_tokens": 1, "completion_tokens": 1000, "total_tokens": 1001}
        self.data(self.chunk({}, "stop", usage=usage) + "data: [DONE]\n\n")
        self.report("end")
        note("answered", os.getpid())

    def ask(self, kind, question):
        """Return the headers and the body that the proxy answers; None for a body of our own."""
        data = json.dumps(question)
        request = f"POST /{kind}/{self.name} HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n{data}"
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(os.environ["OPENCODE_PROXY_SOCKET"])
            self.asking = connection
            self.rest(0)
            connection.sendall(request.encode())
            status, headers, data = self.read(connection.makefile("rb"), kind)
        except OSError as error:
            self.rest(0)
            note("broken", os.getpid(), kind)
            self.report("error", network=None, message="asking the proxy: " + repr(error))
            raise Over("the answer broke off")
        finally:
            self.asking = None
            connection.close()
        if status not in (200, 204):
            note("refused", status, kind)
            self.report("error", network=None, message="nobody waits for this answer")
            raise Over("nobody waits")
        return headers, data if status == 200 else None

    def read(self, stream, kind):
        """Return the status, the headers and the body of an answer; an OSError if it is cut."""
        status = int(self.line(stream).split()[1])
        headers = {}
        header = self.line(stream)
        while header:
            name, _, value = header.partition(": ")
            headers[name.lower()] = value
            header = self.line(stream)
        data = b""
        if kind == "request" and fake.in_request:
            data = stream.read(1000)
            self.do(fake.in_request)
        size = int(headers.get("content-length", 0))
        data += stream.read(size - len(data))
        if len(data) < size:
            raise OSError("the body is cut")
        return status, headers, data

    def line(self, stream):
        line = stream.readline()
        if not line:
            raise OSError("the answer is cut")
        return line.decode().rstrip("\r\n")


class Fake:
    """What this opencode is like; FAKE_MODE changes it."""

    def __init__(self):
        self.is_acp = sys.argv[1] == "acp"  # otherwise it lists the models
        self.version = "1.18.33"
        self.names = [
            "github-copilot/gpt-5-mini",
            "github-copilot/gpt-5.4-mini",
            "github-copilot/claude-sonnet-4.6",
            "local/m",
            "other/m",
        ]
        self.paths = {  # of requests to models that do not speak chat completions
            "github-copilot/gpt-5.4-mini": "/responses",
            "github-copilot/claude-sonnet-4.6": "/v1/messages",
            "other/m": "/v1beta/models/m:streamGenerateContent?alt=sse",
        }
        self.loads_plugin = True
        self.reaches_model = True
        self.makes_sessions = True
        self.before_request = ""  # scripts: before it asks for a body, while it reads that, and
        self.in_request = ""
        self.before_sending = ""  # before it says that it sends it
        self.sessions = {}
        self.sessions_made = 0  # the first proves that it works, the second is opened ahead
        self.orders = itertools.count()
        self.output = threading.Lock()

    def list_models(self):
        note("models", os.getpid())
        for name in self.names:
            provider, _, model = name.partition("/")
            entry = {**ENTRY, "id": model, "providerID": provider}
            print(name, json.dumps(entry), sep="\n")

    def serve(self):
        for line in sys.stdin.buffer:
            message = json.loads(line)
            if "method" in message:
                self.obey(message.get("id"), message["method"], message["params"])
            else:
                note("reply", message["error"]["message"])
        os._exit(0)

    def obey(self, number, method, params):
        session = self.sessions.get(params.get("sessionId"))
        if method == "initialize":
            if self.loads_plugin:
                send(method="proxy/loaded", params={})
            send(id=number, result={"agentInfo": {"version": self.version}})
        elif method == "session/new":
            self.open_session(number)
        elif method == "session/set_model":
            session.model = params["modelId"]
            send(id=number, result={})
        elif method == "session/prompt":
            threading.Thread(target=session.run, args=(number,), daemon=True).start()
        elif method == "session/cancel" and session is not None:
            session.cancel()

    def open_session(self, number):
        name = f"ses_{os.getpid()}_{number}"
        note("session", os.getpid(), number)
        if self.sessions_made >= 2 and not self.makes_sessions:
            while not os.path.exists(os.path.join(HERE, "sessions")):
                time.sleep(0.02)
            send(id=number, error={"code": -32603, "message": "no sessions today"})
            return
        self.sessions_made += 1
        model = json.loads(os.environ["OPENCODE_CONFIG_CONTENT"])["model"]
        self.sessions[name] = Session(name, model)
        options = [{"value": name} for name in self.names]
        offer = {"id": "model", "currentValue": model, "options": options}
        send(id=number, result={"sessionId": name, "configOptions": [offer]})


def note(*words):
    with open(os.path.join(HERE, "journal"), "a") as journal:
        journal.write(" ".join(map(str, words)) + "\n")


def write(text, descriptor=1):
    rest = text.encode("utf-8", "surrogateescape")
    with fake.output:
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def line(**message):
    return json.dumps({"jsonrpc": "2.0", **message}, separators=(",", ":")) + "\n"


def send(**message):
    write(line(**message))


fake = Fake()
if fake.is_acp:
    note("start", os.getpid())
exec(os.environ.get("FAKE_MODE", ""))
if fake.is_acp:
    fake.serve()
else:
    fake.list_models()
'''
# Scripts for messages.
PID = "do say(str(os.getpid()))"
DIE = "do say('a'); write('last words\\n', 2); os._exit(3)"
PAUSE = "do say('a'); rest(600)"
SLOWLY = "do for n in range(2000): say('%d ' % n); rest(0.05)"
# What FAKE_MODE may be.
FAILS = "if fake.is_acp: sys.exit('no memory')"
LISTS_LATE = """
if not fake.is_acp:
    note("listing")
    while not os.path.exists(HERE + "/list"):
        time.sleep(0.02)
"""


class FakeCase(unittest.TestCase):
    """A proxy with the fake opencode, new for every test, of which nothing may be left."""

    def setUp(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.stack.callback(self.assert_nothing_left, threading.enumerate())
        self.folder = pathlib.Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.tmp = self.folder / "tmp"
        self.tmp.mkdir()
        self.patch(tempfile, tempdir=str(self.tmp))
        self.auth = self.folder / ".local/share/opencode/auth.json"
        self.auth.parent.mkdir(parents=True)
        self.auth.write_text("{}")
        self.fake = self.folder / "opencode"
        self.fake.write_text(f"#!{sys.executable} -IS\n{FAKE}")
        self.fake.chmod(0o700)
        variables = {**clean_environment(), "HOME": str(self.folder)}
        self.stack.enter_context(unittest.mock.patch.dict(os.environ, variables, clear=True))
        self.logged = []
        self.patch(proxy, log=self.logged.append)
        self.patch(proxy, LOOK_SECONDS=0.05, RETRY_SECONDS=0.02)  # hundreds of tests wait for these
        self.background = self.stack.enter_context(concurrent.futures.ThreadPoolExecutor(64))

    def patch(self, target, **values):
        """Give attributes of `target` other values until the test ends."""
        self.stack.enter_context(unittest.mock.patch.multiple(target, **values))

    def wind(self):
        """Put the program's clock under the test's control."""
        clock = Clock()
        self.patch(proxy, time=clock)
        return clock

    def result_later(self, clock, seconds, answer):
        """Return an answer's result, for which more than so many seconds pass again and again.

        Once would not do: a letter may be on its way, from which on a time-out counts.
        """

        def has_come():
            clock.ahead += seconds
            return answer.done()

        eventually(has_come)
        return answer.result()

    def mode(self, script):
        """Let the fakes that start from now on be as `script` makes them."""
        os.environ["FAKE_MODE"] = script

    def let_go(self, name="go"):
        """Let the scripts go on that call hold()."""
        (self.folder / name).touch()

    def start(self, **changes):
        """Return a running proxy, without spares where `changes` want none."""
        running = Running(str(self.fake), **{"spares": 0, **changes})
        self.stack.callback(running.close)
        return running

    def journal(self, kind, text=""):
        """Return what the fakes noted with `text`.

        Kinds: models, start, session, post, sent, headers, waits, cancelled, reply, and for asks
        that were not answered broken and refused.
        """
        journal = self.folder / "journal"
        lines = journal.read_text().splitlines() if journal.exists() else []
        found = []
        for line in lines:
            first, _, rest = line.partition(" ")
            if first == kind and text in rest:
                found.append(rest)
        return found

    def noted(self, kind, text="", count=1):
        """Tell whether the fakes come to note something `count` times."""
        return eventually(lambda: len(self.journal(kind, text)) >= count)

    def only(self, running, **expected):
        """Wait until nothing is answered and one process is left; return its pid."""
        self.assertTrue(running.becomes(running=0, **expected))
        self.assertTrue(eventually(lambda: len(opencode_pids()) == 1))
        return opencode_pids()[0]

    def assert_error(self, reply, status, code, text=""):
        """Check a (status, answer) for an error."""
        got, answer = reply
        self.assertEqual((got, answer["error"]["code"]), (status, code), answer)
        self.assertIn(text, answer["error"]["message"])

    def assert_nothing_left(self, before):
        def left():
            threads = set(threading.enumerate()).difference(before)
            return [*threads, *children(), *self.tmp.glob("*")]

        self.assertTrue(eventually(lambda: not left(), SOON), left())


# ------------------------------------------------------------------------------------------- errors
UNKNOWN_REASON = "The model's provider answered "
BAD_REQUEST = "invalid_request_error"
PAGE = (
    "<html><head><title>502 Bad</title><style>p{}</style></head>"
    "<body><p>gate\nway</p></body></html>"
)
OPENAI_ERROR = '{"error":{"message":"slow","type":"tokens","param":"p","code":"rate"}}'
ANTHROPIC_ERROR = '{"type":"error","error":{"type":"authentication_error","message":"key"}}'
NESTED = {"error": {"message": "inner words", "type": "invalid_request_error"}}
BURIED = '{"error":' * 20 + '"no"' + "}" * 20
RAW = {"message": "Provider returned error", "metadata": {"raw": json.dumps(NESTED)}}
# Status and body of a refusal; status, message, type, param and code of the error.
REFUSALS = {
    "OpenAI's": (429, OPENAI_ERROR, (429, "slow", "tokens", "p", "rate")),
    "a number as code": (
        400,
        '{"error":{"message":"no","code":17}}',
        (400, "no", BAD_REQUEST, None, None),
    ),
    "Anthropic's": (401, ANTHROPIC_ERROR, (401, "key", "authentication_error", None, None)),
    "a word": (403, '{"error":"forbidden"}', (403, "forbidden", "permission_error", None, None)),
    "a word beside what it means": (
        404,
        '{"status":404,"error":"Not Found","message":"no such model"}',
        (404, "no such model", BAD_REQUEST, None, None),
    ),
    "only a message": (429, '{"message":"slow"}', (429, "slow", "rate_limit_error", None, None)),
    "ChatGPT's": (422, '{"detail":"wrong"}', (422, "wrong", BAD_REQUEST, None, None)),
    "FastAPI's": (
        422,
        '{"detail":[{"loc":["body","n"],"msg":"too large"},{"msg":"x"},{"msg":"x"}]}',
        (422, "body.n: too large; x", BAD_REQUEST, None, None),
    ),
    "Mistral's message that is an object": (
        422,
        '{"object":"error","message":{"detail":[{"loc":["m"],"msg":"missing"}]}}',
        (422, "m: missing", BAD_REQUEST, None, None),
    ),
    "Cloudflare's list": (
        400,
        '{"success":false,"errors":[{"code":7009,"message":"a"},{"message":"b"}]}',
        (400, "a; b", BAD_REQUEST, None, None),
    ),
    "OpenRouter's raw text": (
        400,
        json.dumps({"error": {**RAW, "code": 400}}),
        (400, "Provider returned error: inner words", BAD_REQUEST, None, None),
    ),
    "OpenRouter's raw page": (
        502,
        json.dumps({"error": {**RAW, "metadata": {"raw": PAGE}}}),
        (502, "Provider returned error: 502 Bad gate way", "server_error", None, None),
    ),
    "JSON in a message": (
        400,
        json.dumps({"error": {"message": json.dumps(NESTED)}}),
        (400, "inner words", BAD_REQUEST, None, None),
    ),
    "Gemini's array": (
        404,
        '[{"error":{"message":"gone","code":404}}]',
        (404, "gone", BAD_REQUEST, None, None),
    ),
    "a number that is too long to read": (
        400,
        '{"message":"no","n":' + "9" * 9999 + "}",
        (400, "no", BAD_REQUEST, None, None),
    ),
    "a page": (
        502,
        PAGE,
        (502, UNKNOWN_REASON + "502 Bad Gateway: 502 Bad gate way", "server_error", None, None),
    ),
    "nothing": (
        500,
        "",
        (500, UNKNOWN_REASON + "500 Internal Server Error", "server_error", None, None),
    ),
    "a reason that is buried too deep": (
        500,
        BURIED,
        (500, f"{UNKNOWN_REASON}500 Internal Server Error: {BURIED}", "server_error", None, None),
    ),
    "an error that is null": (
        599,
        '{"error":null}',
        (599, UNKNOWN_REASON + '599 error: {"error":null}', "server_error", None, None),
    ),
    "an empty list": (
        400,
        "[]",
        (400, UNKNOWN_REASON + "400 Bad Request: []", BAD_REQUEST, None, None),
    ),
    "a status that is no error": (
        302,
        "[1]",
        (502, UNKNOWN_REASON + "302 Found: [1]", "server_error", None, None),
    ),
}
RATE = {"code": "rate_limit_exceeded"}
RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.2s"}
# An error in an answer of status 200; its status, code and Retry-After.
ERRORS_IN_ANSWERS = {
    "a context that is too long": ({"code": "context_length_exceeded"}, 400, None),
    "a rate limit": (RATE, 429, None),
    "a rate limit with a time": ({**RATE, "message": "Please try again in 1.8s."}, 429, "2"),
    "... in milliseconds": ({**RATE, "message": "try again in 20ms"}, 429, "1"),
    "... as a field": ({"code": "usage_limit_reached", "resets_in_seconds": 90}, 429, "90"),
    "... as Google says it": ({"code": 429, "details": [RETRY_INFO]}, 429, "35"),
    "... that is no time": ({"code": 429, "retry_after": -1}, 429, None),
    "... with details that are none": ({"code": 429, "details": True}, 429, None),
    "... that is no number": ({"code": 429, "details": [{"retryDelay": "1.2.3s"}]}, 429, None),
    "a quota": ({"code": "insufficient_quota", "message": "again in 5s"}, 429, None),
    "Anthropic's overload": ({"type": "overloaded_error"}, 503, None),
    "an overload with a time": ({"code": 503, "message": "retry after 5s"}, 503, "5"),
    "a server's error with a time": ({"code": 500, "message": "retry after 5s"}, 500, None),
    "Anthropic's number for it": ({"code": 529}, 503, None),
    "an overload at OpenAI": ({"code": "server_is_overloaded"}, 503, None),
    "Anthropic's rate limit": ({"type": "rate_limit_error"}, 429, None),
    "Anthropic's bad request": ({"type": "invalid_request_error"}, 400, None),
    "Google's words": ({"status": "RESOURCE_EXHAUSTED"}, 429, None),
    "Google's numbers": ({"code": 503, "status": "UNAVAILABLE"}, 503, None),
    "a number that is a text": ({"code": "429"}, 429, None),
    "a server's error": ({"code": "server_error"}, 502, None),
    "an unknown number": ({"code": 1302}, 502, None),
    "a code that is no code": ({"code": True}, 502, None),
}
CODES_IN_ANSWERS = {
    "the provider's": ({"code": "insufficient_quota", "type": "x"}, "insufficient_quota"),
    "OpenAI's for a rate limit": ({"type": "rate_limit_error"}, "rate_limit_exceeded"),
    "the type": ({"type": "overloaded_error"}, "overloaded_error"),
    "none for a bad request": ({"type": "invalid_request_error"}, None),
    "none where a number says it": ({"code": 500}, None),
}


class ErrorTest(unittest.TestCase):
    def test_a_refusal_passes_with_its_reason(self):
        for name, (status, body, expected) in REFUSALS.items():
            with self.subTest(name):
                error = proxy.upstream_error(status, {}, body)
                facts = (error.status, error.message, error.type, error.param, error.code)
                self.assertEqual(facts, expected)

    def test_a_refusal_passes_with_its_time_to_try_again(self):
        headers = {"retry-after": "7", "retry-after-ms": "7000", "server": "x"}
        error = proxy.upstream_error(429, headers, OPENAI_ERROR)
        self.assertEqual(error.headers, {"Retry-After": "7", "Retry-After-Ms": "7000"})

    def test_the_time_in_a_refusals_headers_counts_before_that_in_its_words(self):
        body = '{"error": {"message": "Please try again in 30s."}}'
        for name, headers, expected in (
            ("in both", {"retry-after": "7"}, {"Retry-After": "7"}),
            ("in its words alone", {}, {"Retry-After": "30"}),
        ):
            with self.subTest(name):
                self.assertEqual(proxy.upstream_error(429, headers, body).headers, expected)

    def test_an_error_in_an_answer_has_the_status_that_it_means(self):
        for name, (theirs, status, retry_after) in ERRORS_IN_ANSWERS.items():
            with self.subTest(name):
                error = proxy.stream_error({"error": {"message": "m", **theirs}})
                facts = (error.status, error.headers.get("Retry-After"))
                self.assertEqual(facts, (status, retry_after))

    def test_an_error_in_an_answer_has_a_code(self):
        for name, (theirs, code) in CODES_IN_ANSWERS.items():
            with self.subTest(name):
                error = proxy.stream_error({"error": {"message": "m", **theirs}})
                self.assertEqual((error.message, error.code), ("m", code))

    def test_hostile_bodies_take_linear_time(self):
        cut_off = (
            "<html><style>" + "p{}" * 9000 + "</style><p>Unicorn!"
            '<img src="data:image/png;base64,' + "A" * 9000
        )
        message = proxy.upstream_error(502, {}, cut_off).message
        self.assertEqual(message, UNKNOWN_REASON + "502 Bad Gateway: Unicorn!")

        def seconds(piece, count):
            started = time.process_time()
            self.assertEqual(proxy.upstream_error(500, {}, piece * count).status, 500)
            return time.process_time() - started

        for piece in ("<", "<script", "<style><", "<a", "[", '{"a":', "9", " ", "<!--", "</script"):
            with self.subTest(piece):
                few = min(seconds(piece, 4000) for _ in range(3))
                many = min(seconds(piece, 64000) for _ in range(3))  # quadratic: 256 times as long
                self.assertLess(many, 100 * few + 0.02)

    def test_a_turn_that_failed_says_why_without_advice(self):
        closed = "The socket was closed."
        advice = " For more information, pass `verbose: true` in"
        typo = "No. Was there a typo in the url or port?"
        connection = "The connection to the model's provider failed: "
        for name, error, message, code in (
            ("opencode's", {"message": "Internal error: x"}, "x", None),
            ("without a reason", {}, "opencode gave no reason", None),
            ("with advice", {"message": typo}, "No.", None),
            ("the network's", {"network": "ECONNRESET", "message": closed + advice}, closed, 1),
        ):
            with self.subTest(name):
                error = proxy.turn_error(error)
                words = connection if code else "The answer failed: "
                code = "upstream_unreachable" if code else "upstream_failed"
                facts = (error.status, error.message, error.code)
                self.assertEqual(facts, (502, words + message, code))


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
    "no type": ("[1].type", [TEXT, {"video": "x"}]),
    "a list as type": ("[0].type", [{"type": ["text"]}]),
    "a text without text": ("[0].text", [{"type": "text"}]),
    "an image that is a text": ("[0].image_url.url", [{"type": "image_url", "image_url": "x"}]),
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
    "an object as type of a format": (
        "[0].custom.format.type",
        [changed(CUSTOM_TOOL, format={"type": {}})],
    ),
}
BAD_CHOICES = {
    "an unknown mode": ("", "maybe"),
    "no mode": ("", ""),
    "an empty object": (".function", {}),
    "an unknown type": (".type", {"type": "mcp"}),
    "a list as type": (".type", {"type": ["function"]}),
    "a flat function without a name": (".function.name", {"type": "function", "name": 1}),
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


# ------------------------------------------------------------------------------------- wire formats
WIRE_PNG = "data:image/png;base64,QUJD"
AT_CHAT, AT_RESPONSES, AT_MESSAGES = (
    "https://x.example/v1/" + path for path in ("chat/completions", "responses", "messages")
)
AT_OPENAI = "https://api.openai.com/v1/chat/completions"
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
EMPTY_SCHEMA = {"type": "object", "properties": {}}
SCHEMA = {"name": "n", "strict": True, "schema": OBJECT}


def text(words, kind="text"):
    return {"type": kind, "text": words}


def said(role, *content):
    return {"role": role, "content": list(content)}


def asks(call_id, arguments, kind="function"):
    inner = {"name": "f", {"function": "arguments", "custom": "input"}[kind]: arguments}
    return {"role": "assistant", "tool_calls": [{"id": call_id, "type": kind, kind: inner}]}


def wire(url=AT_CHAT, messages=(USER,), model=WARM, thoughts=None, **fields):
    body = json.dumps({"messages": list(messages), **fields}).encode()
    target = proxy.target_of(url, model)
    return target.wire_format(proxy.parse_chat_request(body), target, thoughts)


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
    "messages": [*CONVERSATION[:-1], said("user", text("\ufffd \u2028é"))],
    "tools": [
        TOOLS[0],
        {"type": "function", "function": {"name": "g", "parameters": EMPTY_SCHEMA}},
    ],
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
        said("user", text("\ufffd \u2028é", "input_text")),
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
        {"name": "g", "input_schema": EMPTY_SCHEMA},
    ],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    "output_config": {
        "effort": "low",
        "format": {"type": "json_schema", "schema": OBJECT},
    },
    "system": [{**text("s"), **MARK}],
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
            text("d"),
        ),
        said("assistant", text("no")),
        said("user", {**text("\ufffd \u2028é"), **MARK}),
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
        "an assistant whose refusal is empty",
        AT_RESPONSES,
        {"messages": [USER, {"role": "assistant", "content": "a", "refusal": ""}, USER]},
        {
            "input": [
                said("user", text("q", "input_text")),
                said("assistant", text("a", "output_text")),
                said("user", text("q", "input_text")),
            ]
        },
    ),
    Row(
        "opencode's limit, and no tools",
        AT_MESSAGES,
        {},
        {"max_tokens": 32000, "tool_choice": None},
        {"max_tokens": 128000},
    ),
    Row(
        "a client's limit above opencode's",
        AT_MESSAGES,
        {"max_tokens": 64000},
        {"max_tokens": 64000},
        {"max_tokens": 32000},
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
LATE_SYSTEM = said("system", text("now"))


def used(call_id):
    return {"type": "tool_use", "id": call_id, "name": "f", "input": {}}


def result(call_id, content="r"):
    return {"type": "tool_result", "tool_use_id": call_id, "content": content}


def called(call_id):
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": "{}"}


def output_of(call_id, output="r"):
    return {"type": "function_call_output", "call_id": call_id, "output": output}


HISTORY_ROWS = (
    Row(
        "an id in two turns, and two ids that become one",
        AT_MESSAGES,
        {
            "messages": [
                asks("c", "{}"),
                DONE,
                asks("c", "{}"),
                DONE,
                asks("c.", "{}"),
                {**DONE, "tool_call_id": "c."},
                asks("c_", "{}"),
                {**DONE, "tool_call_id": "c_"},
            ]
        },
        {
            "messages": [
                said("assistant", used("c")),
                said("user", result("c")),
                said("assistant", used("c_2")),
                said("user", result("c_2")),
                said("assistant", used("c_")),
                said("user", result("c_")),
                said("assistant", used("c__2")),
                said("user", {**result("c__2"), **MARK}),
            ]
        },
    ),
    Row(
        "one id for two calls of a turn, and three results",
        AT_MESSAGES,
        {"messages": [asks("c", "{}"), asks("c", "{}"), DONE, {**DONE, "content": "s"}, DONE]},
        {
            "messages": [
                said("assistant", used("c"), used("c_2")),
                said(
                    "user",
                    result("c"),
                    result("c_2", "s"),
                    {**text("Result of a tool: r"), **MARK},
                ),
            ]
        },
    ),
    Row(
        "a result without a call",
        AT_MESSAGES,
        {"messages": [DONE]},
        {"messages": [said("user", {**text("Result of a tool: r"), **MARK})]},
    ),
    Row(
        "two results of one call",
        AT_MESSAGES,
        {"messages": [asks("c", "{}"), DONE, {**DONE, "content": "s"}]},
        {
            "messages": [
                said("assistant", used("c")),
                said("user", result("c"), {**text("Result of a tool: s"), **MARK}),
            ]
        },
    ),
    Row(
        "a call without a result, in the middle and at the end",
        AT_MESSAGES,
        {"messages": [asks("c", "{}"), USER, asks("d", "{}")]},
        {
            "messages": [
                said("assistant", used("c")),
                said("user", result("c", "No result"), text("q")),
                said("assistant", used("d")),
                said("user", {**result("d", "No result"), **MARK}),
            ]
        },
    ),
    Row(
        "a call without a result, and a result without a call, on /responses",
        AT_RESPONSES,
        {"messages": [asks("c", "{}"), {**DONE, "tool_call_id": "x"}]},
        {
            "input": [
                called("c"),
                output_of("c", "No result"),
                said("user", text("Result of a tool: r", "input_text")),
            ]
        },
    ),
    Row(
        "one id for two calls of a turn, and three results, on /responses",
        AT_RESPONSES,
        {"messages": [asks("c", "{}"), asks("c", "{}"), DONE, {**DONE, "content": "s"}, DONE]},
        {
            "input": [
                called("c"),
                called("c_2"),
                output_of("c"),
                output_of("c_2", "s"),
                said("user", text("Result of a tool: r", "input_text")),
            ]
        },
    ),
    Row(
        "an id in two turns, the first without a result, on /responses",
        AT_RESPONSES,
        {"messages": [asks("c", "{}"), USER, asks("c", "{}"), DONE]},
        {
            "input": [
                called("c"),
                output_of("c", "No result"),
                said("user", text("q", "input_text")),
                called("c_2"),
                output_of("c_2"),
            ]
        },
    ),
    Row(
        "a system message in the middle",
        AT_MESSAGES,
        {"messages": [SYSTEM, USER, LATE_SYSTEM, USER]},
        {
            "system": [{**text("s"), **MARK}],
            "messages": [said("user", text("q"), text("now"), {**text("q"), **MARK})],
        },
    ),
    Row(
        "nothing but system messages",
        AT_MESSAGES,
        {"messages": [SYSTEM, LATE_SYSTEM]},
        {
            "system": [{**text("s"), **MARK}],
            "messages": [said("user", {**text("now"), **MARK})],
        },
    ),
    Row(
        "the client's own marks",
        AT_MESSAGES,
        {
            "messages": [said("user", {**text("a"), **MARK}, text("b"))],
            "tools": [{**TOOLS[1], **MARK}],
        },
        {
            "messages": [said("user", {**text("a"), **MARK}, text("b"))],
            "tools": [{"name": "g", "input_schema": EMPTY_SCHEMA, **MARK}],
        },
    ),
    Row(
        "a mark on a result, and on a part of one",
        AT_MESSAGES,
        {
            "messages": [
                asks("c", "{}"),
                {**DONE, **MARK},
                asks("d", "{}"),
                {**DONE, "tool_call_id": "d", "content": [{**text("r"), **MARK}]},
                USER,
            ]
        },
        {
            "messages": [
                said("assistant", used("c")),
                said("user", {**result("c"), **MARK}),
                said("assistant", used("d")),
                said("user", {**result("d", [text("r")]), **MARK}, text("q")),
            ]
        },
    ),
    Row(
        "more marks than four",
        AT_MESSAGES,
        {"messages": [said("user", *[{**text("a"), **MARK}] * 5)]},
        {
            "messages": [
                said("user", {**text("a"), **MARK}, text("a"), *[{**text("a"), **MARK}] * 3)
            ]
        },
    ),
    Row(
        "marks where nobody knows them",
        AT_RESPONSES,
        {"messages": [{**said("user", text("a")), **MARK}], "tools": [{**TOOLS[0], **MARK}]},
        {"input": [said("user", text("a", "input_text"))]},
    ),
    Row(
        "a JSON object",
        AT_MESSAGES,
        {"response_format": {"type": "json_object"}},
        {"system": [{**text(proxy.JSON_ONLY), **MARK}]},
    ),
    Row(
        "parts in the words of /responses",
        AT_CHAT,
        {
            "messages": [
                said(
                    "user",
                    text("a", "input_text"),
                    {"type": "input_image", "image_url": WIRE_PNG, "detail": "low"},
                    {"type": "image_url", "image_url": WIRE_PNG},
                    {"type": "input_file", **PDF},
                    {"type": "video_url", "video_url": {"url": "x"}},
                )
            ]
        },
        {
            "messages": [
                said(
                    "user",
                    text("a"),
                    {"type": "image_url", "image_url": {"url": WIRE_PNG, "detail": "low"}},
                    WIRE_IMAGE,
                    {"type": "file", "file": PDF},
                    {"type": "video_url", "video_url": {"url": "x"}},
                )
            ]
        },
    ),
    Row(
        "flat tools, and a flat choice",
        AT_CHAT,
        {
            "tools": [{"type": "function", **FUNCTION}],
            "tool_choice": {"type": "function", "name": "f"},
        },
        {"tools": [TOOLS[0]], "tool_choice": NAMED},
    ),
    Row(
        "an empty schema",
        AT_RESPONSES,
        {"tools": [{"type": "function", "function": {"name": "g", "parameters": {}}}]},
        {"tools": [{"type": "function", "name": "g", "strict": False, "parameters": EMPTY_SCHEMA}]},
    ),
)
HEARD = {"type": "input_audio", "input_audio": {"data": "x", "format": "mp3"}}
FILE_BY_ID = {"type": "file", "file": {"file_id": "i"}}
# Arguments in a history, and the object that Anthropic gets.
ODD_ARGUMENTS = {
    "nothing": ("", {}),
    "null": ("null", {}),
    "an array": ("[1]", {"arguments": [1]}),
    "a number": ("1", {"arguments": 1}),
    "a text": ('"x"', {"arguments": "x"}),
    "encoded twice": ('"{\\"a\\":1}"', {"a": 1}),
    "a raw newline": ('{"a":"x\ny"}', {"a": "x\ny"}),
    "cut off behind a colon": ('{"a":', {"a": None}),
    "cut off in a text": ('{"path": "a', {"path": "a"}),
    "cut off in an escape": ('{"a":"x\\u00', {"a": "x"}),
    "cut off behind a backslash": ('{"a":"x\\', {"a": "x"}),
    "cut off in a name": ('{"a":1,"b', {"a": 1, "b": None}),
    "cut off behind a name": ('{"a":1,"b"', {"a": 1, "b": None}),
    "cut off behind a comma": ('{"a":[1,', {"a": [1]}),
    "cut off in a word": ('{"a":tr', {"a": None}),
    "NaN": ('{"a":NaN}', {"arguments": '{"a":NaN}'}),
    "no JSON": ("ls -l", {"arguments": "ls -l"}),
    "a surrogate": ("\ud800", {"arguments": "\ufffd"}),
    "too deep": ("[" * 100000, {"arguments": "[" * 100000}),
}
# What has no place in a format, and the param of the 400 that says so.
NO_PLACE = {
    "audio": (AT_RESPONSES, said("user", HEARD), {}, "messages[0]"),
    "a file by its id": (AT_MESSAGES, said("user", FILE_BY_ID), {}, "messages[0]"),
    "a call of a custom tool": (AT_MESSAGES, asks("c", "i", "custom"), {}, "messages[0]"),
    "a custom tool": (AT_MESSAGES, USER, {"tools": [CUSTOM]}, "tools[0]"),
    "a choice of those allowed": (AT_MESSAGES, USER, {"tool_choice": ALLOWED}, "tool_choice"),
    "a part of an unknown type": (AT_MESSAGES, said("user", {"type": "x"}), {}, "messages[0]"),
}
# The same for formats that only opencode knows: it is handed nothing but text.
NO_TEXT = {
    "tools": (USER, {"tools": TOOLS}, "tools"),
    "a call": (asks("c", "{}"), {}, "messages"),
    "a format": (USER, {"response_format": {"type": "json_object"}}, "response_format"),
    "an image": (said("user", WIRE_IMAGE), {}, "messages"),
}


FENCED = {
    "a fence": ('```json\n{"a": 1}\n```', '{"a": 1}'),
    "a fence without a word": ("```\n{}\n```\n", "{}"),
    "none": ('{"a": "```"}', '{"a": "```"}'),
    "code in the text": ('```json\n{"a": "```x"}\n```', '{"a": "```x"}'),
    "another language": ("```js\n1\n```", "```js\n1\n```"),
    "nothing but a fence's beginning": ("``", "``"),
    "cut off": ('```json\n{"a":', '{"a":'),
}
EFFORTS = {
    "OpenAI's": ({"reasoning_effort": "low", "reasoning": {"effort": "high"}}, "low"),
    "OpenRouter's": ({"reasoning": {"effort": "high"}}, "high"),
    "OpenRouter's budget": ({"reasoning": {"max_tokens": 1024}}, "low"),
    "OpenRouter's switch": ({"reasoning": {"enabled": False}}, "none"),
    "the largest low budget": ({"reasoning": {"max_tokens": 4096}}, "low"),
    "the largest middle budget": ({"thinking": {"budget_tokens": 12288}}, "medium"),
    "a middle budget": ({"thinking": {"type": "enabled", "budget_tokens": 8000}}, "medium"),
    "a large budget": ({"thinking": {"type": "enabled", "budget_tokens": 32000}}, "high"),
    "no thinking": ({"thinking": {"type": "disabled"}}, "none"),
    "nonsense": ({"thinking": 1, "reasoning": []}, None),
}


class BodyTest(unittest.TestCase):
    """An encoder says in its format what the client says in chat completions."""

    maxDiff = None

    def test_chat_completions_has_everything(self):
        theirs = {**THEIRS, "usage": {"include": True}}
        body = wire(AT_OPENAI, CONVERSATION, **FIELDS).body(theirs)
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

    def test_text_is_utf8_and_a_lone_surrogate_is_replaced(self):
        body = wire(AT_CHAT, CONVERSATION).body({})
        self.assertIn('"\ufffd \u2028é"'.encode(), body)

    def test_surrogates_that_are_a_pair_are_a_character(self):
        self.assertEqual(proxy.json_bytes("\ud83d\ude00\udc00a"), '"\U0001f600\ufffda"'.encode())

    def test_fields_and_messages(self):
        for row in (*BODY_ROWS, *HISTORY_ROWS):
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

    def test_arguments_are_an_object_whatever_they_were(self):
        for name, (arguments, expected) in ODD_ARGUMENTS.items():
            with self.subTest(name):
                body = json.loads(wire(AT_MESSAGES, [asks("c", arguments), DONE]).body({}))
                self.assertEqual(body["messages"][0]["content"][0]["input"], expected)

    def test_arguments_are_read_in_linear_time(self):
        for text in ('{"a":"' + "\\" * 1000001, '{"a":"' + "," * 1000000, '{"a' * 300000):
            start = time.process_time()
            proxy.read_arguments(text)
            self.assertLess(time.process_time() - start, 5)

    def test_what_is_read_takes_memory_of_its_size(self):
        for name, function, text in (
            ("arguments", proxy.read_arguments, '{"a":"' + "x\\n" * 300000 + '"}'),
            ("an image", proxy.with_media_type, "data:image/png" + ";" * 900000 + ","),
        ):
            with self.subTest(name):
                tracemalloc.start()
                self.addCleanup(tracemalloc.stop)
                function(text)
                _, peak = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                self.assertLess(peak, 8 * len(text))

    def test_a_fence_around_a_whole_text_is_removed(self):
        for name, (text, expected) in FENCED.items():
            for size in (1, 3, 1000):
                with self.subTest(name, size=size):
                    fence = proxy.Fence()
                    shown = ""
                    for start in range(0, len(text), size):
                        shown += fence.feed(text[start : start + size])
                    self.assertEqual(shown + fence.end(), expected)

    def test_a_fence_is_looked_for_in_linear_time(self):
        for beginning, piece in (("", " "), ("```json\n", "`")):
            with self.subTest(beginning):
                fence = proxy.Fence()
                fence.feed(beginning)
                shown = 0
                start = time.process_time()
                for _ in range(50000):
                    shown += len(fence.feed(piece))
                self.assertLess(time.process_time() - start, 5)
                self.assertEqual(shown + len(fence.end()), 50000)

    def test_efforts_are_understood(self):
        for name, (fields, expected) in EFFORTS.items():
            with self.subTest(name):
                request = wire(AT_CHAT, **fields).request
                self.assertEqual(proxy.chat_conversation(request)["effort"], expected)

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
CHATGPT_NEEDS = {"instructions": "i", "store": False, "stream": True}


class QuirkRow(NamedTuple):
    """What a quirk makes of a body at a target; equal: it leaves it as it is."""

    quirk: str
    name: str
    url: str
    before: dict[str, Any]
    after: dict[str, Any]
    model: proxy.Model = WARM


FIRST_ROWS = (
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
        {"input": [HELLO_ITEM], "instructions": "a\n\nb\n\nc", "store": False, "stream": True},
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
            "stream": True,
        },
    ),
    QuirkRow(
        "add_instructions",
        "none",
        AT_CHATGPT,
        {"input": [HELLO_ITEM], "store": False},
        {"input": [HELLO_ITEM], **CHATGPT_NEEDS, "instructions": "Answer the user."},
    ),
    QuirkRow(
        "store_nothing",
        "asked to store",
        AT_CHATGPT,
        {"instructions": "i", "store": True},
        CHATGPT_NEEDS,
    ),
    QuirkRow(
        "think_only_with_earlier_thinking",
        "a call without them",
        AT_MESSAGES,
        {"messages": [USER, CALLED, RESULT], "thinking": THINKING},
        {"messages": [USER, CALLED, RESULT]},
    ),
    QuirkRow(
        "think_only_with_earlier_thinking",
        "a result without a call",
        AT_MESSAGES,
        {"messages": [RESULT], "thinking": THINKING},
        {"messages": [RESULT]},
    ),
    QuirkRow(
        "think_only_with_earlier_thinking",
        "a call with them",
        AT_MESSAGES,
        {"messages": [USER, THOUGHT, RESULT], "thinking": THINKING},
        {"messages": [USER, THOUGHT, RESULT], "thinking": THINKING},
    ),
    QuirkRow(
        "think_only_with_earlier_thinking",
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


def named(name, **fields):
    return proxy.Model(name, **fields)


GEMINI = named("github-copilot/gemini-3-pro")
GOOGLE = named("google/gemini-3-pro")
OLD_CLAUDE = named("github-copilot/claude-sonnet-4.5")
NEW_CLAUDE = named("github-copilot/claude-opus-4.7")
ANTHROPIC = named("anthropic/claude-sonnet-4-5-20250929")
SONNET = named("anthropic/claude-sonnet-4-6")
FABLE = named("anthropic/claude-fable-5.1")
DEEPSEEK = named("deepseek/deepseek-chat")
KIMI = named("moonshotai/kimi-k2.6")
GROK = named("xai/grok-4-fast")
GROQ = named("groq/qwen3")
OPENROUTER = named("openrouter/z-ai/glm-5")
HASHED_ID = "call_b30855e510446ac34706c5ac"
LONG_ID = "c" * 65


def chat_tool(**function):
    return {"type": "function", "function": {"name": "f", **function}}


def flat_tool(**fields):
    return {"type": "function", "name": "f", **fields}


def claude_tool(**fields):
    return {"name": "f", "input_schema": EMPTY_SCHEMA, **fields}


def called(call_id, **more):
    """Return an assistant's message of /chat/completions with a call of f."""
    function = {"name": "f", "arguments": "{}"}
    call = {"id": call_id, "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call], **more}


def result_of(call_id, **more):
    return {"role": "tool", "tool_call_id": call_id, "content": "r", **more}


def use(call_id):
    return {"type": "tool_use", "id": call_id, "name": "f", "input": {}}


def used(call_id, content="r"):
    return {"type": "tool_result", "tool_use_id": call_id, "content": content}


def picture(media_type, data):
    return {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{data}"}}


def shown(media_type, data):
    source = {"type": "base64", "media_type": media_type, "data": data}
    return {"type": "image", "source": source}


def input_picture(**fields):
    return said("user", {"type": "input_image", "image_url": "https://x/a.png", **fields})


def spoken(*messages, **fields):
    """Return a body of messages."""
    return {"messages": list(messages), **fields}


JPEG_DATA = base64.b64encode(b"\xff\xd8\xff\xe0 and so on").decode()
WEBP_DATA = base64.b64encode(b"RIFF\x00\x00\x00\x00WEBP and so on").decode()
UNKNOWN_DATA = base64.b64encode(b"an image of another kind").decode()
ASSISTANT = {"role": "assistant", "content": "a"}
DEVELOPER = {"role": "developer", "content": "s"}
STUB = {
    "name": "_noop",
    "description": "Not a tool: it is here because earlier messages have calls. Never call it.",
}
STUB_PARAMETERS = {"type": "object", "properties": {"reason": {"type": "string"}}}
CLAUDE_STUB = {**STUB, "input_schema": STUB_PARAMETERS}
CHAT_STUB = {"type": "function", "function": {**STUB, "parameters": STUB_PARAMETERS}}
EVERYWHERE_ROWS = (
    QuirkRow(
        "describe_parameters",
        "none, in a chat completion",
        AT_CHAT,
        {"tools": [chat_tool()]},
        {"tools": [chat_tool(parameters=EMPTY_SCHEMA)]},
    ),
    QuirkRow(
        "describe_parameters",
        "{}, in /responses",
        AT_RESPONSES,
        {"tools": [flat_tool(parameters={}), {"type": "web_search"}]},
        {"tools": [flat_tool(parameters=EMPTY_SCHEMA), {"type": "web_search"}]},
    ),
    QuirkRow(
        "describe_parameters",
        "null, in /messages",
        AT_MESSAGES,
        spoken(USER, tools=[claude_tool(input_schema=None), {"type": "bash_20250124"}]),
        spoken(USER, tools=[claude_tool(), {"type": "bash_20250124"}]),
    ),
    QuirkRow(
        "name_media_type_of_url",
        "a JPEG that is called a PNG",
        AT_CHAT,
        spoken(said("user", picture("image/png", JPEG_DATA))),
        spoken(said("user", picture("image/jpeg", JPEG_DATA))),
    ),
    QuirkRow(
        "name_media_type_of_url",
        "one of a kind that is not known",
        AT_CHAT,
        spoken(said("user", picture("image/heic", UNKNOWN_DATA))),
        spoken(said("user", picture("image/heic", UNKNOWN_DATA))),
    ),
    QuirkRow(
        "name_media_type_of_input",
        "a WebP",
        AT_RESPONSES,
        {"input": [input_picture(image_url=f"data:image/jpg;base64,{WEBP_DATA}")]},
        {"input": [input_picture(image_url=f"data:image/webp;base64,{WEBP_DATA}")]},
    ),
    QuirkRow(
        "name_media_type_of_source",
        "in a tool's result",
        AT_MESSAGES,
        spoken(CALLED, said("user", used("c", [shown("image/png", JPEG_DATA)]))),
        spoken(CALLED, said("user", used("c", [shown("image/jpeg", JPEG_DATA)]))),
    ),
    QuirkRow(
        "drop_nulls",
        "in a body and in a message",
        AT_CHAT,
        spoken(USER, {**ASSISTANT, "refusal": None, "tool_calls": None}, tools=None, stop=None),
        spoken(USER, ASSISTANT),
    ),
    QuirkRow(
        "drop_empty_calls",
        "an assistant's",
        AT_CHAT,
        spoken({**ASSISTANT, "tool_calls": [], "annotations": [], "name": "", "refusal": ""}),
        spoken(ASSISTANT),
    ),
    QuirkRow(
        "drop_empty_tools",
        "a choice of nothing",
        AT_CHAT,
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {},
    ),
    QuirkRow("drop_empty_tools", "Claude", AT_MESSAGES, spoken(USER, tools=[]), spoken(USER)),
    QuirkRow(
        "drop_sampling_in_chat",
        "GPT-5 at Copilot",
        AT_CHAT,
        {**SAMPLING, "seed": 1},
        {"seed": 1},
        GPT_5,
    ),
    QuirkRow(
        "drop_sampling_in_chat",
        "a user's own provider, of which nothing is known",
        AT_CHAT,
        SAMPLING,
        SAMPLING,
        COLD,
    ),
    QuirkRow(
        "say_effort_once",
        "OpenRouter",
        AT_CHAT,
        {"reasoning": {"max_tokens": 9, "exclude": True}, "reasoning_effort": "low"},
        {"reasoning": {"exclude": True, "effort": "low"}},
        OPENROUTER,
    ),
    QuirkRow(
        "say_system", "a user's provider", AT_CHAT, spoken(DEVELOPER, USER), spoken(SYSTEM, USER)
    ),
    QuirkRow(
        "say_system",
        "GPT-5 behind a gateway",
        AT_CHAT,
        spoken(DEVELOPER, USER),
        spoken(DEVELOPER, USER),
        named("p/openai/gpt-5.4"),
    ),
    QuirkRow(
        "say_max_tokens",
        "a user's provider",
        AT_CHAT,
        {"max_completion_tokens": 9},
        {"max_tokens": 9},
    ),
    QuirkRow(
        "say_max_tokens",
        "Snowflake",
        AT_CHAT,
        {"max_completion_tokens": 9},
        {"max_completion_tokens": 9},
        named("snowflake-cortex/claude-4-sonnet"),
    ),
    QuirkRow(
        "say_max_tokens",
        "Azure",
        "https://a.openai.azure.com/v1/chat/completions",
        {"max_completion_tokens": 9},
        {"max_completion_tokens": 9},
    ),
    QuirkRow(
        "drop_what_only_openai_has",
        "a user's provider",
        AT_CHAT,
        {"store": False, "metadata": {"a": "b"}, "service_tier": "flex", "seed": 1},
        {"seed": 1},
    ),
    QuirkRow(
        "drop_what_only_openai_has",
        "OpenRouter, which passes it on",
        AT_CHAT,
        {"store": False, "metadata": {"a": "b"}},
        {"store": False, "metadata": {"a": "b"}},
        OPENROUTER,
    ),
    QuirkRow(
        "drop_billing_line",
        "Claude Code at Copilot",
        AT_MESSAGES,
        spoken(USER, system=[text("x-anthropic-billing-header: cch=1;"), text("s")]),
        spoken(USER, system=[text("s")]),
        OLD_CLAUDE,
    ),
    QuirkRow(
        "drop_billing_line",
        "Claude Code at Anthropic",
        AT_MESSAGES,
        spoken(USER, system=[text("x-anthropic-billing-header: cch=1;")]),
        spoken(USER, system=[text("x-anthropic-billing-header: cch=1;")]),
        ANTHROPIC,
    ),
)
LOOSE_SCHEMA = {
    "type": "object",
    "properties": {
        "enum": {"type": "integer", "enum": [1, 2]},
        "a": {"type": ["array", "null"], "items": {"type": "integer"}, "enum": [1]},
        "b": {"type": ["string", "integer"]},
        "c": {"type": "array"},
        "d": {"type": "array", "items": [{"type": "string"}]},
        "e": {"type": "string", "properties": {}, "required": []},
        "f": {"type": ["null"]},
    },
    "required": ["enum", "gone"],
}
TIGHT_SCHEMA = {
    "type": "object",
    "properties": {
        "enum": {"type": "string", "enum": ["1", "2"]},
        "a": {"type": "array", "items": {"type": "integer"}, "nullable": True},
        "b": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        "c": {"type": "array", "items": {"type": "string"}},
        "d": {"type": "array", "items": {"type": "string"}},
        "e": {"type": "string"},
        "f": {"type": "null", "nullable": True},
    },
    "required": ["enum"],
}
COPILOT_CHAT_ROWS = (
    QuirkRow("drop_stop", "GPT-5", AT_CHAT, {"stop": ["x"], "seed": 1}, {"seed": 1}, GPT_5),
    QuirkRow("drop_stop", "Gemini", AT_CHAT, {"stop": ["x"]}, {"stop": ["x"]}, GEMINI),
    QuirkRow(
        "shorten_chat_call_ids",
        "41 characters, and 40",
        AT_CHAT,
        spoken(
            called("c" * 41),
            result_of("c" * 41),
            called("c" * 40),
            result_of("c" * 40),
            tools=[CHAT_STUB],
        ),
        spoken(
            called("call_" + proxy.hashed("c" * 41, 24)),
            result_of("call_" + proxy.hashed("c" * 41, 24)),
            called("c" * 40),
            result_of("c" * 40),
            tools=[CHAT_STUB],
        ),
        GPT_5,
    ),
    QuirkRow(
        "drop_text_that_says_nothing",
        "beside a call",
        AT_CHAT,
        spoken(called("c", content=""), result_of("c"), tools=[CHAT_STUB]),
        spoken(called("c"), result_of("c"), tools=[CHAT_STUB]),
        OLD_CLAUDE,
    ),
    QuirkRow(
        "add_stub_tool",
        "a call in the history",
        AT_CHAT,
        spoken(USER, called("c"), result_of("c")),
        spoken(USER, called("c"), result_of("c"), tools=[CHAT_STUB]),
        OLD_CLAUDE,
    ),
    QuirkRow("add_stub_tool", "no call", AT_CHAT, spoken(USER), spoken(USER), OLD_CLAUDE),
    QuirkRow(
        "drop_strict",
        "Claude",
        AT_CHAT,
        {"tools": [chat_tool(strict=True, parameters=OBJECT)]},
        {"tools": [chat_tool(parameters=OBJECT)]},
        OLD_CLAUDE,
    ),
    QuirkRow(
        "drop_effort",
        "Gemini",
        AT_CHAT,
        {"reasoning_effort": "low", "seed": 1},
        {"seed": 1},
        GEMINI,
    ),
    QuirkRow(
        "say_media_type",
        "Gemini",
        AT_CHAT,
        spoken(said("user", picture("image/png", JPEG_DATA))),
        spoken(
            said(
                "user",
                {
                    "type": "image_url",
                    "image_url": {
                        "url": f"data:image/jpeg;base64,{JPEG_DATA}",
                        "media_type": "image/jpeg",
                    },
                },
            )
        ),
        GEMINI,
    ),
    QuirkRow(
        "say_system_to_gemini",
        "at Copilot",
        AT_CHAT,
        spoken(DEVELOPER, USER),
        spoken(SYSTEM, USER),
        GEMINI,
    ),
    QuirkRow(
        "name_results",
        "at Copilot",
        AT_CHAT,
        spoken(called("c"), result_of("c"), tools=[CHAT_STUB]),
        spoken(called("c"), result_of("c", name="f"), tools=[CHAT_STUB]),
        GEMINI,
    ),
    QuirkRow(
        "simplify_schemas_for_gemini",
        "at Copilot",
        AT_CHAT,
        {"tools": [chat_tool(parameters=LOOSE_SCHEMA)]},
        {"tools": [chat_tool(parameters=TIGHT_SCHEMA)]},
        GEMINI,
    ),
)
COMPATIBLE_ROWS = (
    QuirkRow(
        "drop_what_google_refuses",
        "penalties",
        AT_CHAT,
        {"frequency_penalty": 1, "presence_penalty": 1, "seed": 1, "user": "u", "top_p": 1},
        {"top_p": 1},
        GOOGLE,
    ),
    QuirkRow(
        "say_seed_and_choice_to_mistral",
        "both",
        AT_CHAT,
        {"seed": 1, "tool_choice": "required", "tools": [chat_tool(parameters=OBJECT)]},
        {"random_seed": 1, "tool_choice": "any", "tools": [chat_tool(parameters=OBJECT)]},
        MISTRAL,
    ),
    QuirkRow(
        "shorten_ids_for_mistral",
        "one id in two turns, and one that is right",
        AT_CHAT,
        spoken(
            called("call_1"),
            result_of("call_1"),
            called("call_1"),
            result_of("call_1"),
            called("abcdefgh9"),
            result_of("abcdefgh9"),
        ),
        spoken(
            called("74196fe72"),
            result_of("74196fe72"),
            called("dec5657d3"),
            result_of("dec5657d3"),
            called("abcdefgh9"),
            result_of("abcdefgh9"),
        ),
        MISTRAL,
    ),
    QuirkRow(
        "answer_before_the_user",
        "behind a result",
        AT_CHAT,
        spoken(called("abcdefgh9"), result_of("abcdefgh9"), USER),
        spoken(
            called("abcdefgh9"),
            result_of("abcdefgh9"),
            {"role": "assistant", "content": "Done."},
            USER,
        ),
        MISTRAL,
    ),
    QuirkRow(
        "mark_prefix",
        "an assistant's message at the end",
        AT_CHAT,
        spoken(USER, ASSISTANT),
        spoken(USER, {**ASSISTANT, "prefix": True}),
        MISTRAL,
    ),
    QuirkRow(
        "keep_what_mistral_takes",
        "the provider",
        AT_CHAT,
        spoken(
            {**USER, "name": "n"},
            {**ASSISTANT, "reasoning_content": "r"},
            USER,
            stream_options={"include_usage": True},
            user="u",
            stream=True,
        ),
        spoken(USER, ASSISTANT, USER, stream=True),
        MISTRAL,
    ),
    QuirkRow(
        "keep_what_mistral_takes",
        "the host",
        "https://api.mistral.ai/v1/chat/completions",
        {"stream_options": {"include_usage": True}},
        {},
    ),
    QuirkRow(
        "keep_what_mistral_takes",
        "a host that is called like it",
        "https://notmistral.ai/v1/chat/completions",
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": True}},
    ),
    QuirkRow(
        "say_that_deepseek_reasoned",
        "with and without",
        AT_CHAT,
        spoken(USER, ASSISTANT, {**ASSISTANT, "reasoning_content": "r"}, USER),
        spoken(
            USER,
            {**ASSISTANT, "reasoning_content": ""},
            {**ASSISTANT, "reasoning_content": "r"},
            USER,
        ),
        DEEPSEEK,
    ),
    QuirkRow(
        "say_that_kimi_reasoned",
        "a call",
        AT_CHAT,
        spoken(ASSISTANT, called("c"), result_of("c")),
        spoken(ASSISTANT, called("c", reasoning_content="."), result_of("c")),
        KIMI,
    ),
    QuirkRow(
        "say_thinking_once",
        "both",
        AT_CHAT,
        {"thinking": {"type": "enabled"}, "reasoning_effort": "low"},
        {"thinking": {"type": "enabled"}},
        KIMI,
    ),
    QuirkRow(
        "simplify_schemas_for_kimi",
        "a reference and a list",
        AT_CHAT,
        {
            "tools": [
                chat_tool(
                    parameters={
                        "$defs": {"n": {"type": "array", "items": [OBJECT, {}]}},
                        "properties": {"a": {"$ref": "#/$defs/n", "description": "d"}},
                    }
                )
            ]
        },
        {
            "tools": [
                chat_tool(
                    parameters={
                        "$defs": {"n": {"type": "array", "items": OBJECT}},
                        "properties": {"a": {"$ref": "#/$defs/n"}},
                    }
                )
            ]
        },
        KIMI,
    ),
    QuirkRow(
        "drop_what_grok_refuses",
        "penalties and stops",
        AT_CHAT,
        {"presence_penalty": 1, "frequency_penalty": 1, "stop": ["x"], "seed": 1},
        {"seed": 1},
        GROK,
    ),
    QuirkRow(
        "drop_effort_of_grok",
        "grok-4-fast",
        AT_CHAT,
        {"reasoning_effort": "low"},
        {},
        GROK,
    ),
    QuirkRow(
        "drop_effort_of_grok",
        "one that has it",
        AT_CHAT,
        {"reasoning_effort": "low"},
        {"reasoning_effort": "low"},
        named("xai/grok-3-mini"),
    ),
    QuirkRow(
        "drop_reasoning",
        "on messages",
        AT_CHAT,
        spoken(
            USER,
            {**ASSISTANT, "reasoning_content": "r", "reasoning": "r", "refusal": "x"},
            USER,
        ),
        spoken(USER, ASSISTANT, USER),
        GROQ,
    ),
)
REASONING_ITEM = {"type": "reasoning", "summary": [], "encrypted_content": "e"}
CALL_ITEM = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
OUTPUT_ITEM = {"type": "function_call_output", "call_id": "c", "output": "r"}
RESPONSES_ROWS = (
    QuirkRow(
        "shorten_call_ids",
        "more than 64 characters",
        AT_RESPONSES,
        {"input": [{**CALL_ITEM, "call_id": LONG_ID}, {**OUTPUT_ITEM, "call_id": LONG_ID}]},
        {"input": [{**CALL_ITEM, "call_id": HASHED_ID}, {**OUTPUT_ITEM, "call_id": HASHED_ID}]},
    ),
    QuirkRow(
        "shorten_call_ids",
        "two that are alike in one turn",
        AT_RESPONSES,
        {"input": [CALL_ITEM, CALL_ITEM, OUTPUT_ITEM, OUTPUT_ITEM]},
        {
            "input": [
                CALL_ITEM,
                {**CALL_ITEM, "call_id": "c_2"},
                OUTPUT_ITEM,
                {**OUTPUT_ITEM, "call_id": "c_2"},
            ]
        },
    ),
    QuirkRow(
        "drop_reasoning_of_nothing",
        "at the end, and before the user",
        AT_RESPONSES,
        {"input": [REASONING_ITEM, CALL_ITEM, REASONING_ITEM, HELLO_ITEM, REASONING_ITEM]},
        {"input": [REASONING_ITEM, CALL_ITEM, HELLO_ITEM]},
    ),
    QuirkRow(
        "summarize_reasoning",
        "without a summary",
        AT_RESPONSES,
        {"input": [{"type": "reasoning", "encrypted_content": "e"}, CALL_ITEM]},
        {"input": [REASONING_ITEM, CALL_ITEM]},
    ),
    QuirkRow(
        "drop_item_ids",
        "of all kinds",
        AT_RESPONSES,
        {"input": [{**REASONING_ITEM, "id": "r" * 400}, {**CALL_ITEM, "id": ""}]},
        {"input": [REASONING_ITEM, CALL_ITEM]},
        GPT_5,
    ),
    QuirkRow(
        "keep_what_copilot_takes",
        "Codex",
        AT_RESPONSES,
        {"input": "q", "client_metadata": {}, "service_tier": "flex", "user": "u"},
        {"input": "q", "user": "u"},
        GPT_5,
    ),
    QuirkRow(
        "drop_image_generation",
        "beside another",
        AT_RESPONSES,
        {
            "tools": [{"type": "image_generation"}, {"type": "web_search"}],
            "tool_choice": {"type": "image_generation"},
        },
        {"tools": [{"type": "web_search"}], "tool_choice": "auto"},
        GPT_5,
    ),
    QuirkRow(
        "drop_tools_that_are_none",
        "a choice of nothing",
        AT_RESPONSES,
        {"tools": [], "tool_choice": "auto", "user": "u"},
        {"user": "u"},
        GPT_5,
    ),
    QuirkRow(
        "describe_namespaces",
        "one that says nothing",
        AT_RESPONSES,
        {"tools": [{"type": "namespace", "name": "n", "description": "", "tools": []}]},
        {"tools": [{"type": "namespace", "name": "n", "description": "n", "tools": []}]},
        GPT_5,
    ),
    QuirkRow(
        "say_detail_low_or_high",
        "auto and low",
        AT_RESPONSES,
        {"input": [input_picture(detail="auto"), input_picture(detail="low")]},
        {"input": [input_picture(), input_picture(detail="low")]},
        GPT_5,
    ),
    QuirkRow(
        "say_input_as_list",
        "a text",
        AT_CHATGPT,
        {"input": "q", **CHATGPT_NEEDS},
        {"input": [HELLO_ITEM], **CHATGPT_NEEDS},
    ),
    QuirkRow(
        "stream_always",
        "a whole answer",
        AT_CHATGPT,
        {**CHATGPT_NEEDS, "stream": False},
        CHATGPT_NEEDS,
    ),
    QuirkRow(
        "keep_what_chatgpt_takes",
        "all of it",
        AT_CHATGPT,
        {**CHATGPT_NEEDS, **SAMPLING, "max_output_tokens": 99, "user": "u", "truncation": "auto"},
        CHATGPT_NEEDS,
    ),
)
REMINDER = text("<system-reminder>\ns\n</system-reminder>")
GO_ON = {"role": "user", "content": "Please continue."}
TURN_ROWS = (
    QuirkRow(
        "put_system_messages_into_turns",
        "at the beginning, behind a result and behind an answer",
        AT_MESSAGES,
        spoken(SYSTEM, USER, CALLED, RESULT, SYSTEM, ASSISTANT, {"role": "system", "content": "s"}),
        spoken(
            USER,
            CALLED,
            said("user", *RESULT["content"], REMINDER),
            ASSISTANT,
            said("user", REMINDER),
            system=[text("s")],
        ),
    ),
    QuirkRow(
        "say_references_as_text",
        "in a result",
        AT_MESSAGES,
        spoken(
            CALLED,
            said("user", used("c", [{"type": "tool_reference", "tool_name": "t"}])),
            tools=[CLAUDE_STUB],
        ),
        spoken(CALLED, said("user", used("c", [text("[tool: t]")])), tools=[CLAUDE_STUB]),
        OLD_CLAUDE,
    ),
    QuirkRow(
        "drop_blocks_that_say_nothing",
        "texts, thoughts, turns and a system's",
        AT_MESSAGES,
        spoken(
            said("user", text("q"), text(" ")),
            said("assistant", {"type": "thinking", "thinking": ""}, text("\n")),
            said("user", used("c", [text(""), text("r")])),
            system="",
        ),
        spoken(said("user", text("q")), said("user", used("c", [text("r")]))),
    ),
    QuirkRow(
        "drop_blocks_that_say_nothing",
        "a thought that is signed",
        AT_MESSAGES,
        spoken(said("assistant", {"type": "thinking", "thinking": "", "signature": "s"}), USER),
        spoken(said("assistant", {"type": "thinking", "thinking": "", "signature": "s"}), USER),
    ),
    QuirkRow(
        "say_ids_once",
        "in two turns, in one turn, and two that become one",
        AT_MESSAGES,
        spoken(
            said("assistant", use("c")),
            said("user", used("c")),
            said("assistant", use("c"), use("c")),
            said("user", used("c"), used("c")),
            said("assistant", use("a.b"), use("a_b")),
            said("user", used("a_b"), used("a.b")),
        ),
        spoken(
            said("assistant", use("c")),
            said("user", used("c")),
            said("assistant", use("c_2"), use("c_3")),
            said("user", used("c_2"), used("c_3")),
            said("assistant", use("a_b"), use("a_b_2")),
            said("user", used("a_b_2"), used("a_b")),
        ),
    ),
    QuirkRow(
        "end_with_the_user",
        "Claude 4.6",
        AT_MESSAGES,
        spoken(USER, ASSISTANT),
        spoken(USER, ASSISTANT, GO_ON),
        SONNET,
    ),
    QuirkRow(
        "end_with_the_user",
        "Claude 4.5",
        AT_MESSAGES,
        spoken(USER, ASSISTANT),
        spoken(USER, ASSISTANT),
        ANTHROPIC,
    ),
)
FORCED = {"type": "tool", "name": "f"}
LONG_THINKING = {"type": "enabled", "budget_tokens": 2000}
CLEARING = {"edits": [{"type": "clear_thinking_20251015"}, {"type": "clear_tool_uses_20250919"}]}
THINKING_ROWS = (
    QuirkRow(
        "choose_no_tool_by_force",
        "Fable 5.1",
        AT_MESSAGES,
        spoken(USER, tools=[claude_tool()], tool_choice=FORCED),
        spoken(USER, tools=[claude_tool()], tool_choice={"type": "auto"}),
        FABLE,
    ),
    QuirkRow(
        "think_even_if_told_not_to",
        "Fable",
        AT_MESSAGES,
        spoken(USER, thinking={"type": "disabled"}),
        spoken(USER),
        FABLE,
    ),
    QuirkRow(
        "think_without_budget",
        "Claude 4.7",
        AT_MESSAGES,
        spoken(USER, thinking=LONG_THINKING),
        spoken(USER, thinking={"type": "adaptive", "display": "summarized"}),
        NEW_CLAUDE,
    ),
    QuirkRow(
        "think_with_budget",
        "Claude 4.5",
        AT_MESSAGES,
        spoken(USER, max_tokens=8000, thinking={"type": "adaptive"}),
        spoken(USER, max_tokens=8000, thinking={"type": "enabled", "budget_tokens": 4000}),
        ANTHROPIC,
    ),
    QuirkRow(
        "think_with_budget",
        "Claude 4, whose day is no version",
        AT_MESSAGES,
        spoken(USER, max_tokens=8000, thinking={"type": "adaptive"}),
        spoken(USER, max_tokens=8000, thinking={"type": "enabled", "budget_tokens": 4000}),
        named("anthropic/claude-sonnet-4-20250514"),
    ),
    QuirkRow(
        "think_with_budget",
        "Claude 4.5 with the least room for it",
        AT_MESSAGES,
        spoken(USER, max_tokens=2048, thinking={"type": "adaptive"}),
        spoken(USER, max_tokens=2048, thinking={"type": "enabled", "budget_tokens": 1024}),
        ANTHROPIC,
    ),
    QuirkRow(
        "think_with_budget",
        "Claude 4.5 without room for it",
        AT_MESSAGES,
        spoken(USER, max_tokens=2000, thinking={"type": "adaptive"}),
        spoken(USER, max_tokens=2000),
        ANTHROPIC,
    ),
    QuirkRow(
        "think_only_unforced",
        "a tool that must be called",
        AT_MESSAGES,
        spoken(
            USER,
            tools=[claude_tool()],
            tool_choice=FORCED,
            thinking=LONG_THINKING,
            context_management=CLEARING,
        ),
        spoken(
            USER,
            tools=[claude_tool()],
            tool_choice=FORCED,
            context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
        ),
        ANTHROPIC,
    ),
    QuirkRow(
        "think_only_unforced",
        "an answer that has begun",
        AT_MESSAGES,
        spoken(USER, ASSISTANT, thinking=LONG_THINKING),
        spoken(USER, ASSISTANT),
        ANTHROPIC,
    ),
    QuirkRow(
        "drop_sampling_of_claude",
        "the catalog says so",
        AT_MESSAGES,
        spoken(USER, **SAMPLING),
        spoken(USER),
        COLD,
    ),
    QuirkRow(
        "drop_sampling_of_new_claude",
        "Claude 4.7",
        AT_MESSAGES,
        spoken(USER, **SAMPLING, top_k=5),
        spoken(USER),
        NEW_CLAUDE,
    ),
    QuirkRow(
        "keep_to_output_limit",
        "more than the model has",
        AT_MESSAGES,
        spoken(USER, max_tokens=64000),
        spoken(USER, max_tokens=32000),
        named("anthropic/claude-opus-4-1", output_limit=32000),
    ),
    QuirkRow(
        "think_less_than_may_be_said",
        "as many as may be said",
        AT_MESSAGES,
        spoken(USER, max_tokens=2000, thinking=LONG_THINKING),
        spoken(USER, max_tokens=2000, thinking={"type": "enabled", "budget_tokens": 1999}),
        ANTHROPIC,
    ),
    QuirkRow(
        "think_less_than_may_be_said",
        "too few to think",
        AT_MESSAGES,
        spoken(USER, max_tokens=1024, thinking=LONG_THINKING),
        spoken(USER, max_tokens=1024),
        ANTHROPIC,
    ),
)
UNION_SCHEMA = {
    "anyOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {}}}],
    "allOf": [{"properties": {"c": {}}, "required": ["c"]}],
}
OPEN_SCHEMA = {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "required": ["c"]}
ANSWER_SCHEMA = {
    "type": "object",
    "properties": {
        "pattern": {"type": "string", "pattern": "^a", "format": "phone"},
        "n": {"type": "integer", "description": "d", "minimum": 1, "maximum": 5},
        "l": {"type": "array", "maxItems": 3, "items": {"type": "object"}},
        "o": {"oneOf": [{"type": "string", "format": "date"}, {"$ref": "#/$defs/x", "title": "t"}]},
    },
    "additionalProperties": True,
}
CLOSED_SCHEMA = {
    "type": "object",
    "properties": {
        "pattern": {"type": "string", "description": 'pattern: "^a"; format: "phone"'},
        "n": {"type": "integer", "description": "d; minimum: 1; maximum: 5"},
        "l": {
            "type": "array",
            "items": {"type": "object", "additionalProperties": False},
            "description": "maxItems: 3",
        },
        "o": {"anyOf": [{"type": "string", "format": "date"}, {"$ref": "#/$defs/x"}]},
    },
    "additionalProperties": False,
}
PLAIN_MARK = {"cache_control": {"type": "ephemeral"}}
LONG_MARK = {"cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "global"}}
TOOL_ROWS = (
    QuirkRow(
        "open_schemas_of_tools",
        "alternatives on top",
        AT_MESSAGES,
        spoken(USER, tools=[claude_tool(input_schema=UNION_SCHEMA)]),
        spoken(USER, tools=[claude_tool(input_schema=OPEN_SCHEMA)]),
    ),
    QuirkRow(
        "drop_fields_of_tools",
        "Claude Code",
        AT_MESSAGES,
        spoken(
            USER,
            tools=[
                claude_tool(
                    strict=True,
                    eager_input_streaming=True,
                    defer_loading=True,
                    input_examples=[],
                    input_schema={"$schema": "s", **EMPTY_SCHEMA},
                )
            ],
        ),
        spoken(USER, tools=[claude_tool()]),
        OLD_CLAUDE,
    ),
    QuirkRow(
        "simplify_strict_tools",
        "at Anthropic",
        AT_MESSAGES,
        spoken(USER, tools=[claude_tool(input_schema=ANSWER_SCHEMA, strict=True)]),
        spoken(USER, tools=[claude_tool(input_schema=CLOSED_SCHEMA, strict=True)]),
        ANTHROPIC,
    ),
    QuirkRow(
        "simplify_schema_of_answer",
        "every keyword",
        AT_MESSAGES,
        spoken(USER, output_config={"format": {"type": "json_schema", "schema": ANSWER_SCHEMA}}),
        spoken(USER, output_config={"format": {"type": "json_schema", "schema": CLOSED_SCHEMA}}),
        ANTHROPIC,
    ),
    QuirkRow(
        "add_stub_tool_for_claude",
        "a call in the history",
        AT_MESSAGES,
        spoken(USER, CALLED, RESULT),
        spoken(USER, CALLED, RESULT, tools=[CLAUDE_STUB]),
        OLD_CLAUDE,
    ),
    QuirkRow(
        "put_mark_on_last_block",
        "on top",
        AT_MESSAGES,
        spoken(said("user", text("a"), text("b")), **PLAIN_MARK),
        spoken(said("user", text("a"), {**text("b"), **PLAIN_MARK})),
        OLD_CLAUDE,
    ),
    QuirkRow(
        "mark_results_as_whole",
        "inside of one",
        AT_MESSAGES,
        spoken(CALLED, said("user", used("c", [{**text("r"), **PLAIN_MARK}]))),
        spoken(CALLED, said("user", {**used("c", [text("r")]), **PLAIN_MARK})),
    ),
    QuirkRow(
        "mark_plainly",
        "Claude Code at Copilot",
        AT_MESSAGES,
        spoken(USER, system=[{**text("s"), **LONG_MARK}], tools=[{**claude_tool(), **LONG_MARK}]),
        spoken(USER, system=[{**text("s"), **PLAIN_MARK}], tools=[{**claude_tool(), **PLAIN_MARK}]),
        OLD_CLAUDE,
    ),
    QuirkRow(
        "mark_plainly",
        "Claude Code at Anthropic",
        AT_MESSAGES,
        spoken(USER, system=[{**text("s"), **LONG_MARK}]),
        spoken(USER, system=[{**text("s"), **LONG_MARK}]),
        ANTHROPIC,
    ),
    QuirkRow(
        "keep_four_marks",
        "six",
        AT_MESSAGES,
        spoken(
            said("user", *({**text(str(number)), **PLAIN_MARK} for number in range(5))),
            system=[{**text("s"), **PLAIN_MARK}],
        ),
        spoken(
            said(
                "user",
                text("0"),
                text("1"),
                {**text("2"), **PLAIN_MARK},
                {**text("3"), **PLAIN_MARK},
                {**text("4"), **PLAIN_MARK},
            ),
            system=[{**text("s"), **PLAIN_MARK}],
        ),
    ),
    QuirkRow("drop_speed", "fast", AT_MESSAGES, spoken(USER, speed="fast"), spoken(USER), GPT_5),
)
QUIRK_ROWS = (
    *EVERYWHERE_ROWS,
    *COPILOT_CHAT_ROWS,
    *COMPATIBLE_ROWS,
    *RESPONSES_ROWS,
    *TURN_ROWS,
    *THINKING_ROWS,
    *TOOL_ROWS,
    *FIRST_ROWS,
)
# The betas that a client sends, the body beside them, and those that go out.
BETA_ROWS = {
    "those that Copilot refuses": (
        OLD_CLAUDE,
        "context-1m-2025-08-07, interleaved-thinking-2025-05-14,output-128k-2025-02-19",
        {},
        {"anthropic-version": "v", "anthropic-beta": "interleaved-thinking-2025-05-14"},
    ),
    "nothing that Copilot takes": (
        OLD_CLAUDE,
        "tool-search-tool-2025-10-19",
        {},
        {"anthropic-version": "v"},
    ),
    "an edit of the context at Copilot": (
        OLD_CLAUDE,
        "",
        {"context_management": CLEARING},
        {"anthropic-version": "v", "anthropic-beta": "context-management-2025-06-27"},
    ),
    "Anthropic": (
        ANTHROPIC,
        "context-1m-2025-08-07",
        {},
        {"anthropic-version": "v", "anthropic-beta": "context-1m-2025-08-07"},
    ),
}
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

    def test_bodies_that_are_passed_through_before_and_after(self):
        for row in QUIRK_ROWS:
            target = proxy.target_of(row.url, row.model)
            if target.wire_format is proxy.ChatCompletions or row.before.get("store"):
                continue
            with self.subTest(row.quirk, row=row.name):
                exchange = native(row.url, row.model, **row.before)
                body = json.loads(exchange.body(row.url, {"model": "real"}))
                self.assertEqual(body, {"model": "real", **row.after})

    def test_what_was_repaired_once_stays_as_it_is(self):
        for row in QUIRK_ROWS:
            with self.subTest(row.quirk, row=row.name):
                body = json.loads(json.dumps(row.after))
                proxy.repair(body, proxy.target_of(row.url, row.model))
                self.assertEqual(body, row.after)

    def test_the_headers_that_go_with_a_body(self):
        for name, (model, betas, fields, expected) in BETA_ROWS.items():
            with self.subTest(name):
                headers = {"anthropic-version": "v", "anthropic-beta": betas}
                data = json.dumps(spoken(USER, **fields)).encode()
                request = proxy.parse_native_request(data, proxy.Messages, headers)
                exchange = proxy.NativeExchange(request, model)
                exchange.body(AT_MESSAGES, {})
                self.assertEqual(exchange.headers, expected)

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

    def test_ids_are_made_unique_in_linear_time(self):
        for name, call_ids in (
            ("one id", ["c"] * 50000),
            ("ids that become one", [f"c{chr(0x4E00 + number)}" for number in range(20000)] * 2),
        ):
            with self.subTest(name):
                body = spoken(said("assistant", *[use(call_id) for call_id in call_ids]))
                start = time.process_time()
                proxy.say_ids_once(body, None)
                self.assertLess(time.process_time() - start, 5)
                found = {block["id"] for block in body["messages"][0]["content"]}
                self.assertEqual(len(found), len(call_ids))

    def test_what_is_put_together_is_so_in_linear_time(self):
        count = 40000
        reminders = [LATE_SYSTEM] * count
        combined = {"type": "object", "allOf": [{"required": ["a"]}] * count}
        tools = [{"name": "f", "input_schema": combined}]
        for name, body, quirk in (
            ("systems", spoken(*reminders), proxy.put_system_messages_into_turns),
            ("reminders", spoken({**USER}, *reminders), proxy.put_system_messages_into_turns),
            ("schemas", {"tools": tools}, proxy.open_schemas_of_tools),
        ):
            with self.subTest(name):
                target = proxy.target_of(AT_MESSAGES, WARM)
                start = time.process_time()
                quirk(body, target)
                self.assertLess(time.process_time() - start, 5)

    def test_a_quirk_says_what_was_observed(self):
        for quirk in proxy.QUIRKS:
            self.assertTrue(quirk.repair.__doc__, quirk.repair.__name__)

    def test_converted_bodies_are_repaired(self):
        fields = {"max_tokens": 1, "temperature": 0.5, "top_p": 0.9}
        for url, expected in (
            (AT_RESPONSES, {"max_output_tokens": 16, "temperature": 0.5, "top_p": 0.9}),
            (AT_CHATGPT, {"instructions": "Answer the user.", "store": False, "stream": True}),
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
                "stream": True,
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
                    for model in (COLD, GPT_5, OLD_CLAUDE, NEW_CLAUDE, ANTHROPIC, FABLE):
                        exchange = proxy.NativeExchange(request, model)
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


def collected(*events):
    """Return the pieces of an answer of chatgpt.com to a request that does not stream."""
    exchange = native(AT_CHATGPT, input="q")
    exchange.body(AT_CHATGPT, {})
    pieces = [*exchange.begin(200, {"content-type": "text/event-stream"})]
    for event in events:
        pieces += exchange.feed(f"data: {json.dumps(event)}\n\n")
    return [*pieces, *exchange.end()]


class NativeTest(unittest.TestCase):
    """A body in a format's own words goes to the provider as it is, but for quirks."""

    def test_the_client_gets_what_it_says_and_opencode_the_models_name(self):
        exchange = native(AT_MESSAGES, messages=[USER], max_tokens=5, any={"b": 1.0, "a": "\u2028"})
        self.assertEqual(
            exchange.body(AT_MESSAGES, {"model": "real", "tools": [{}], "max_tokens": 9}),
            '{"model":"real","messages":[{"role":"user","content":"q"}],"max_tokens":5,'
            '"any":{"b":1.0,"a":"\u2028"}}'.encode(),
        )

    def test_a_stream_becomes_the_object_that_the_client_wants(self):
        item = {"type": "message", "role": "assistant"}
        head, body = collected(
            {"type": "response.created", "response": {"id": "r"}},
            {"type": "response.output_item.done", "output_index": 0, "item": item},
            {"type": "response.completed", "response": {"id": "r", "output": []}},
        )
        self.assertEqual(head.headers, {"content-type": "application/json"})
        self.assertEqual(json.loads(body.text), {"id": "r", "output": [item]})
        self.assertEqual(body.finish_reason, "stop")

    def test_items_of_a_collected_answer_stand_in_their_places_whichever_ends_first(self):
        done = [
            {"type": "response.output_item.done", "output_index": index, "item": {"id": str(index)}}
            for index in (1, 0)
        ]
        _, body = collected(*done, {"type": "response.completed", "response": {"output": []}})
        self.assertEqual(json.loads(body.text), {"output": [{"id": "0"}, {"id": "1"}]})

    def test_what_opencode_says_of_storing_counts(self):
        exchange = native(AT_RESPONSES, input="q")
        self.assertEqual(
            exchange.body(AT_RESPONSES, {"model": "real", "store": False}),
            b'{"model":"real","input":"q","store":false}',
        )

    def test_a_stream_that_ends_early_or_fails_is_a_502_instead_of_an_object(self):
        created = {"type": "response.created", "response": {"id": "r"}}
        failed = {"type": "response.failed", "response": {"error": {"message": "no"}}}
        for events in ((), (created,), (created, failed)):
            with self.subTest(events):
                self.assertEqual(error(collected, *events)[0], 502)

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

    def test_a_content_that_is_too_deep_to_be_checked_is_a_400(self):
        depth = 2 * sys.getrecursionlimit()  # 3.13 and newer can read it
        data = b'{"input": [{"content": ' + b'[{"content": ' * depth + b"1" + b"}]" * depth + b"}]}"
        status, _, _ = error(proxy.parse_native_request, data, proxy.Responses, {})
        self.assertEqual(status, 400)


def call_delta(index, arguments, call_id=None, kind="function", name="f", **more):
    """Return a delta with a piece of a call: the first one, which names it, where it has an id."""
    inner = {"name": name} if call_id else {}
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
    name = "content_block" if kind == "start" else "delta"
    return {"type": "content_block_" + kind, "index": index, name: piece}


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


# ------------------------------------------------------------------------- what providers really send
def function_call(arguments, name="weather", **more):
    """Return a piece of a call as providers send it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def sent_calls(*pieces, finish="stop"):
    """Return a stream of chat completions with a chunk for each piece of a call."""
    return (*(chunk(call=piece) for piece in pieces), chunk(finish), "[DONE]")


def got_calls(*calls, call_type="function"):
    """Return the message of calls: (id, name, text) each; an id that is ours is "ours"."""
    text_name = {"function": "arguments", "custom": "input"}[call_type]
    tool_calls = []
    for call_id, name, words in calls:
        inner = {"name": name, text_name: words}
        tool_calls.append({"id": call_id, "type": call_type, call_type: inner})
    return {"tool_calls": tool_calls}


def whole_chat(finish="stop", *others, **message):
    """Return a chat completion that was not streamed."""
    choices = [{"index": 0, "message": message, "finish_reason": finish}, *others]
    return {"object": "chat.completion", "choices": choices}


def cited(url, title, start, end):
    fields = {"start_index": start, "end_index": end, "title": title, "url": url}
    return {"type": "url_citation", "url_citation": fields}


def details(*pieces, **more):
    """Return a chunk with OpenRouter's reasoning."""
    return chunk(reasoning=more.get("text"), reasoning_details=list(pieces))


OSLO, ROME = '{"town":"Oslo"}', '{"town":"Rome"}'
OSLO_AND_ROME = got_calls(("ours", "weather", OSLO), ("ours", "weather", ROME))
A_AND_B = got_calls(("a", "weather", OSLO), ("b", "weather", ROME))
STREAMED_CALLS = {
    "Gemini's, without ids, all with index 0": (
        sent_calls(function_call(OSLO, index=0), function_call(ROME, index=0)),
        OSLO_AND_ROME,
    ),
    "with empty ids": (
        sent_calls(function_call(OSLO, index=0, id=""), function_call(ROME, index=0, id="")),
        OSLO_AND_ROME,
    ),
    "without indexes": (sent_calls(function_call(OSLO), function_call(ROME)), OSLO_AND_ROME),
    "in one chunk, with one index": (
        (chunk(tool_calls=[function_call(OSLO, index=0), function_call(ROME, index=0)]), "[DONE]"),
        OSLO_AND_ROME,
    ),
    "in one chunk, without indexes": (
        (chunk("stop", tool_calls=[function_call(OSLO), function_call(ROME)]),),
        OSLO_AND_ROME,
    ),
    "with ids, all with index 0": (
        sent_calls(
            function_call("", index=0, id="a"),
            {"index": 0, "id": "", "function": {"name": None, "arguments": OSLO}},
            function_call("", index=0, id="b"),
            {"index": 0, "id": "", "function": {"name": None, "arguments": ROME}},
        ),
        A_AND_B,
    ),
    "with the id and the name in every piece": (
        sent_calls(
            function_call('{"town":', index=0, id="a"),
            function_call('"Oslo"}', index=0, id="a"),
            function_call('{"town":', index=1, id="b"),
            function_call('"Rome"}', index=1, id="b"),
        ),
        A_AND_B,
    ),
    "with another id in every piece": (
        sent_calls(
            function_call("", index=0, id="a"),
            {"index": 0, "id": "x", "function": {"arguments": '{"town":'}},
            {"index": 0, "id": "y", "function": {"arguments": '"Oslo"}'}},
        ),
        got_calls(("a", "weather", OSLO)),
    ),
    "with the name in every piece, and no id": (
        sent_calls(function_call('{"town":', index=0), function_call('"Oslo"}', index=0)),
        got_calls(("ours", "weather", OSLO)),
    ),
    "with a name that comes after the id": (
        sent_calls(
            {"index": 0, "id": "a", "type": "function"},
            {"index": 0, "function": {"name": "weather"}},
            {"index": 0, "function": {"arguments": OSLO}},
        ),
        got_calls(("a", "weather", OSLO)),
    ),
    "with a name that comes after the arguments": (
        sent_calls(
            {"index": 0, "id": "a", "function": {"arguments": OSLO}},
            {"index": 0, "function": {"name": "weather"}},
        ),
        got_calls(("a", "weather", OSLO)),
    ),
    "another name after the arguments have begun": (
        sent_calls(function_call("{}", "f", index=0), function_call("{}", "g", index=0)),
        got_calls(("ours", "f", "{}"), ("ours", "g", "{}")),
    ),
    "two of one name without arguments": (
        sent_calls(function_call("{}", "f", index=0), function_call("{}", "f", index=0)),
        got_calls(("ours", "f", "{}"), ("ours", "f", "{}")),
    ),
    "of several names whose arguments never come": (
        sent_calls(function_call("", "f", index=0), function_call(None, "g", index=0)),
        got_calls(("ours", "f", "{}"), ("ours", "g", "{}")),
    ),
    "with one id for two": (
        sent_calls(function_call(OSLO, index=0, id="a"), function_call(ROME, index=1, id="a")),
        got_calls(("a", "weather", OSLO), ("ours", "weather", ROME)),
    ),
    "of a custom tool whose input never comes": (
        sent_calls({"index": 0, "id": "a", "type": "custom", "custom": {"name": "f"}}),
        got_calls(("a", "f", ""), call_type="custom"),
    ),
    "with pieces that alternate": (
        sent_calls(
            function_call("", index=0, id="a"),
            function_call("", index=1, id="b"),
            {"index": 0, "function": {"arguments": OSLO}},
            {"index": 1, "function": {"arguments": ROME}},
        ),
        A_AND_B,
    ),
    "with arguments that are an object": (
        sent_calls(function_call({"town": "Oslo"}, index=0)),
        got_calls(("ours", "weather", OSLO)),
    ),
    "in the deprecated words": (
        (
            chunk(function_call={"name": "weather", "arguments": ""}),
            chunk(function_call={"arguments": OSLO}),
            chunk("function_call"),
        ),
        got_calls(("ours", "weather", OSLO)),
    ),
    "without a finish_reason": (
        (chunk(call=function_call(OSLO, index=0, id="a")), "[DONE]"),
        got_calls(("a", "weather", OSLO)),
    ),
}
CLAUDE_DETAIL = {"type": "reasoning.text", "format": "anthropic-claude-v1", "index": 0}
SECRET_DETAIL = {"type": "reasoning.encrypted", "format": "openai-responses-v1", "index": 0}
THINKING_PART = {"type": "thinking", "thinking": [text("h"), text("m")]}
PAGES = {"citations": ["https://a", "https://b"]}
SEARCHED = {"search_results": [{"title": "A", "url": "https://a", "date": None}]}
FLAT_CITATION = {"type": "url_citation", "url": "https://a", "title": "A"}
NESTED_CITATION = {"type": "url_citation", "url_citation": {"url": "https://a", "title": "A"}}
CHAT_ANSWERS = {
    "no finish_reason, but [DONE]": (
        (chunk(content="Hel"), chunk(content="lo"), "[DONE]"),
        {"content": "Hello"},
    ),
    "no finish_reason, but the end": ((chunk(content="Hello"),), {"content": "Hello"}),
    "what is no data between the data": (
        (
            ": keepalive",
            "null",
            chunk(content="a"),
            "[]",
            "{}",
            "ping",
            '"ping"',
            ": OPENROUTER PROCESSING",
            chunk("stop", content="b"),
            "[DONE]",
        ),
        {"content": "ab"},
    ),
    "a finish_reason in every chunk": (
        (chunk("stop", content="a"), chunk("stop", content="b"), "[DONE]"),
        {"content": "ab"},
    ),
    "a gateway's note beside the choices": (
        ({**chunk(content="a"), "message": "queued"}, chunk("stop", content="b")),
        {"content": "ab"},
    ),
    "Mistral's thoughts": (
        (
            chunk(content=[{"type": "thinking", "thinking": [text("h")]}]),
            chunk(content=[{"type": "thinking", "thinking": [text("m")]}]),
            chunk("stop", content=[text("a"), {"type": "reference", "reference_ids": [1]}]),
        ),
        {"reasoning_content": "hm", "content": "a"},
    ),
    "Mistral's thoughts, whole": (
        whole_chat(content=[THINKING_PART, THINKING_PART, text("a")]),
        {"reasoning_content": "hm\n\nhm", "content": "a"},
    ),
    "reasoning under two names": (
        (chunk(reasoning="hm", reasoning_content="hm"), chunk("stop", content="a")),
        {"reasoning_content": "hm", "content": "a"},
    ),
    "OpenRouter's reasoning of Claude": (
        (
            details({**CLAUDE_DETAIL, "text": "Let"}, text="Let"),
            details({**CLAUDE_DETAIL, "text": " me"}, text=" me"),
            details({**CLAUDE_DETAIL, "signature": "sig"}),
            chunk("stop", content="a"),
        ),
        {
            "reasoning_content": "Let me",
            "reasoning_details": [{**CLAUDE_DETAIL, "text": "Let me", "signature": "sig"}],
            "content": "a",
        },
    ),
    "OpenRouter's reasoning of GPT": (
        (
            details({"type": "reasoning.summary", "summary": "pl", "index": 0}, text="pl"),
            details({"type": "reasoning.summary", "summary": "an", "index": 0}, text="an"),
            details({**SECRET_DETAIL, "data": "x", "id": "rs_1"}),
            details({**SECRET_DETAIL, "data": "y", "id": "rs_2"}),
            chunk("stop", content="a"),
        ),
        {
            "reasoning_content": "plan",
            "reasoning_details": [
                {"type": "reasoning.summary", "summary": "plan", "index": 0},
                {**SECRET_DETAIL, "data": "x", "id": "rs_1"},
                {**SECRET_DETAIL, "data": "y", "id": "rs_2"},
            ],
            "content": "a",
        },
    ),
    "OpenRouter's details alone, without indexes": (
        (
            details({"type": "reasoning.text", "text": "h", "id": None}),
            details({"type": "reasoning.text", "text": "m"}),
            chunk("stop", content="a"),
        ),
        {
            "reasoning_content": "hm",
            "reasoning_details": [{"type": "reasoning.text", "text": "hm"}],
            "content": "a",
        },
    ),
    "OpenRouter's details whose id comes late": (
        (
            details({"type": "reasoning.text", "text": "h", "index": 0}),
            details({"type": "reasoning.text", "text": "m", "index": 0, "id": "rs_1"}),
            chunk("stop", content="a"),
        ),
        {
            "reasoning_content": "hm",
            "reasoning_details": [
                {"type": "reasoning.text", "text": "hm", "index": 0, "id": "rs_1"}
            ],
            "content": "a",
        },
    ),
    "Perplexity's pages, in every chunk": (
        (
            {**PAGES, **SEARCHED, **chunk(content="a")},
            {**PAGES, **SEARCHED, **chunk("stop", content="b")},
        ),
        {
            "content": "ab",
            "annotations": [cited("https://a", "A", 0, 0), cited("https://b", "", 0, 0)],
        },
    ),
    "Perplexity's chunks, which hold all so far": (
        (
            {
                "object": "chat.completion",
                "choices": [{"delta": {"content": "a"}, "message": {"content": "a"}}],
            },
            {
                "object": "chat.completion",
                "choices": [
                    {
                        "delta": {"content": "b"},
                        "message": {"content": "ab"},
                        "finish_reason": "stop",
                    }
                ],
            },
        ),
        {"content": "ab"},
    ),
    "xAI's pages, behind the answer": (
        (chunk("stop", content="a"), {"choices": [], "citations": ["https://a"]}, "[DONE]"),
        {"content": "a", "annotations": [cited("https://a", "", 0, 0)]},
    ),
    "a flat citation": (
        (chunk("stop", content="a", annotations=[FLAT_CITATION]),),
        {"content": "a", "annotations": [NESTED_CITATION]},
    ),
    "Copilot's Claude, whole: its text and its calls apart": (
        whole_chat(
            "tool_calls",
            {"message": {"tool_calls": [function_call(OSLO, id="a")]}, "finish_reason": "stop"},
            content="I look",
        ),
        {"content": "I look", **got_calls(("a", "weather", OSLO))},
    ),
    "whole, with calls and without ids and indexes": (
        whole_chat("eos", content="a", tool_calls=[function_call(OSLO), function_call(ROME)]),
        {"content": "a", **OSLO_AND_ROME},
    ),
    "whole, with one id for two calls": (
        whole_chat(tool_calls=[function_call(OSLO, id="a"), function_call(ROME, id="a")]),
        got_calls(("a", "weather", OSLO), ("ours", "weather", ROME)),
    ),
    "whole, without a finish_reason": (whole_chat(None, content="a"), {"content": "a"}),
    "whole, in an array": ([whole_chat(content="a")], {"content": "a"}),
    "audio": (
        (
            chunk(audio={"id": "au", "data": "QU", "transcript": "h"}),
            chunk(audio={"data": "JD", "transcript": "i", "expires_at": 1}),
            chunk("stop"),
        ),
        {"audio": {"id": "au", "data": "QUJD", "transcript": "hi", "expires_at": 1}},
    ),
    "Gemini's signature of a call": (
        sent_calls(function_call(OSLO, index=0, id="a", extra_content={"google": {"s": "x"}})),
        {
            "tool_calls": [
                function_call(OSLO, id="a", extra_content={"google": {"s": "x"}}),
            ]
        },
    ),
}


def item(item_type="message", *parts, **fields):
    """Return an item of an output of /responses."""
    name = "summary" if item_type == "reasoning" else "content"
    return {"type": item_type, name: list(parts), **fields}


def output(*items, status="completed", **more):
    """Return an answer of /responses that was not streamed."""
    return {"object": "response", "status": status, "output": list(items), **more}


def wrote(words, index=0, part=0, group="output_text", **more):
    """Return an event with a piece of a text."""
    place = "summary_index" if "summary" in group else "content_index"
    return event(f"{group}.delta", index, delta=words, **{place: part}, **more)


COMPLETED = event("completed", response={})
SAID_A, SAID_B = text("a", "output_text"), text("b", "output_text")
CALL_ITEM = {"type": "function_call", "call_id": "a", "name": "weather"}
FULL_CALL_ITEM = {**CALL_ITEM, "arguments": OSLO}
ONE_CALL = got_calls(("a", "weather", OSLO))
SOURCE = {
    "type": "url_citation",
    "start_index": 0,
    "end_index": 1,
    "title": "A",
    "url": "https://a",
}
SOURCED_B = {**SAID_B, "annotations": [SOURCE]}
RESPONSES_ANSWERS = {
    "text only in output_text.done": (
        (event("output_text.done", text="a"), COMPLETED),
        {"content": "a"},
    ),
    "text only in content_part.done": (
        (event("content_part.done", part=SAID_A), COMPLETED),
        {"content": "a"},
    ),
    "text only in output_item.done": (
        (event("output_item.done", content=[SAID_A]), COMPLETED),
        {"content": "a"},
    ),
    "text only in completed": (
        (event("completed", response=output(item("message", SAID_A))),),
        {"content": "a"},
    ),
    "text in all of them": (
        (
            wrote("a"),
            event("output_text.done", text="a"),
            event("content_part.done", part=SAID_A),
            event("output_item.done", content=[SAID_A]),
            event("completed", response=output(item("message", SAID_A))),
        ),
        {"content": "a"},
    ),
    "a refusal only in refusal.done": (
        (event("refusal.done", refusal="no"), COMPLETED),
        {"refusal": "no"},
    ),
    "two message items": (
        (wrote("a", 0), wrote("a", 0), wrote("b", 1), COMPLETED),
        {"content": "aa\n\nb"},
    ),
    "two text items of a message": (
        (wrote("a", 0, 0), wrote("b", 0, 1), COMPLETED),
        {"content": "a\n\nb"},
    ),
    "parts and items of reasoning": (
        (
            wrote("**First**", 0, 0, "reasoning_summary_text"),
            wrote("**Sec", 0, 1, "reasoning_summary_text"),
            wrote("ond**", 0, 1, "reasoning_summary_text"),
            wrote("raw", 1, 0, "reasoning_text"),
            wrote("a", 2),
            COMPLETED,
        ),
        {"reasoning_content": "**First**\n\n**Second**\n\nraw", "content": "a"},
    ),
    "reasoning only in its item": (
        (
            event("output_item.done", 0, "reasoning", summary=[text("hm", "summary_text")]),
            wrote("a", 1),
            COMPLETED,
        ),
        {"reasoning_content": "hm", "content": "a"},
    ),
    "a citation in the second item": (
        (
            wrote("aaaa", 0),
            wrote("b", 1),
            event("output_text.annotation.added", 1, annotation=SOURCE),
            event("content_part.done", 1, part=SOURCED_B),
            event("output_item.done", 1, content=[SOURCED_B]),
            COMPLETED,
        ),
        {"content": "aaaa\n\nb", "annotations": [cited("https://a", "A", 6, 7)]},
    ),
    "a citation only in completed": (
        (event("completed", response=output(item("message", SAID_A), item("message", SOURCED_B))),),
        {"content": "a\n\nb", "annotations": [cited("https://a", "A", 3, 4)]},
    ),
    "a citation of a file": (
        (
            wrote("a"),
            event(
                "output_text.annotation.added",
                annotation={"type": "file_citation", "file_id": "f", "index": 1},
            ),
            COMPLETED,
        ),
        {
            "content": "a",
            "annotations": [
                {"type": "file_citation", "file_citation": {"file_id": "f", "index": 1}}
            ],
        },
    ),
    "arguments only in arguments.done": (
        (
            event("output_item.added", 0, "function_call", call_id="a", name="weather"),
            event("function_call_arguments.done", arguments=OSLO),
            COMPLETED,
        ),
        ONE_CALL,
    ),
    "a call only in completed": (
        (event("completed", response=output(FULL_CALL_ITEM)),),
        ONE_CALL,
    ),
    "calls in all events, without an index": (
        (
            {"type": "response.output_item.added", "item": CALL_ITEM},
            {"type": "response.function_call_arguments.delta", "delta": OSLO},
            {"type": "response.output_item.done", "item": FULL_CALL_ITEM},
            {"type": "response.output_item.added", "item": {**CALL_ITEM, "call_id": "b"}},
            {"type": "response.function_call_arguments.delta", "delta": ROME},
            {"type": "response.completed", "response": output(FULL_CALL_ITEM)},
        ),
        A_AND_B,
    ),
    "[DONE] instead of completed": ((wrote("a"), "[DONE]"), {"content": "a"}),
    "[DONE] behind completed": ((wrote("a"), COMPLETED, "[DONE]"), {"content": "a"}),
    "the end behind items that are whole": (
        (
            event("output_item.added"),
            wrote("a"),
            event("output_item.done", content=[SAID_A]),
        ),
        {"content": "a"},
    ),
    "whole": (
        output(
            item("reasoning", text("h", "summary_text"), text("m", "summary_text")),
            item("message", SAID_A, {"type": "refusal", "refusal": "no"}),
            FULL_CALL_ITEM,
            {"type": "web_search_call", "status": "completed"},
        ),
        {"reasoning_content": "h\n\nm", "content": "a", "refusal": "no", **ONE_CALL},
    ),
}


def claude(*blocks, stop_reason="end_turn", **more):
    """Return an answer of /messages that was not streamed."""
    return {"type": "message", "content": list(blocks), "stop_reason": stop_reason, **more}


def blocks(*pieces, stop_reason="end_turn"):
    """Return a stream of /messages: for each block how it begins, and its deltas."""
    stream = []
    for index, (start, *deltas) in enumerate(pieces):
        stream.append(block("start", index, start))
        stream += [block("delta", index, delta) for delta in deltas]
        stream.append(block("stop", index))
    stream.append({"type": "message_delta", "delta": {"stop_reason": stop_reason}})
    return (*stream, {"type": "message_stop"})


def thinks(words):
    return {"type": "thinking_delta", "thinking": words}


def cites(**citation):
    return {"type": "citations_delta", "citation": citation}


THINKING_BLOCK = {"type": "thinking", "thinking": ""}
TOOL_BLOCK = {"type": "tool_use", "id": "a", "name": "weather", "input": {}}
OSLO_BLOCK = {**TOOL_BLOCK, "input": {"town": "Oslo"}}
OSLO_DELTA = {"type": "input_json_delta", "partial_json": OSLO}
SEARCH_BLOCK = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
CITED_BLOCK = {**text("b"), "citations": [{"url": "https://a", "title": "A", "cited_text": "x"}]}
MESSAGES_ANSWERS = {
    "two blocks of thought": (
        blocks(
            (THINKING_BLOCK, thinks("h"), thinks("m")),
            (THINKING_BLOCK, thinks("x")),
            (text("a"),),
        ),
        {"reasoning_content": "hm\n\nx", "content": "a"},
    ),
    "texts around a search": (
        blocks((text("a"),), (SEARCH_BLOCK, OSLO_DELTA), (text("b"), text("c", "text_delta"))),
        {"content": "a\n\nbc"},
    ),
    "a sentence that cites": (
        blocks(
            (text("On "),),
            (text("b"), cites(url="https://a", title="A"), text("c", "text_delta")),
            (text("."),),
        ),
        {"content": "On bc.", "annotations": [cited("https://a", "A", 3, 5)]},
    ),
    "a citation of a document": (
        blocks((text("b"), cites(document_title="T", cited_text="x"))),
        {
            "content": "b",
            "annotations": [
                {
                    "type": "file_citation",
                    "file_citation": {
                        "start_index": 0,
                        "end_index": 1,
                        "filename": "T",
                        "quote": "x",
                    },
                }
            ],
        },
    ),
    "input where the block begins": (blocks((OSLO_BLOCK,), stop_reason="tool_use"), ONE_CALL),
    "input in both places": (
        blocks((OSLO_BLOCK, OSLO_DELTA), stop_reason="tool_use"),
        ONE_CALL,
    ),
    "no stop_reason": (blocks((text("a"),), stop_reason=None), {"content": "a"}),
    "no stop_reason for a call": (blocks((OSLO_BLOCK,), stop_reason=None), ONE_CALL),
    "the end behind blocks that are whole": (
        blocks((text("a"),))[:-2],
        {"content": "a"},
    ),
    "whole": (
        claude({"type": "thinking", "thinking": "hm"}, text("a"), CITED_BLOCK, OSLO_BLOCK),
        {
            "reasoning_content": "hm",
            "content": "ab",
            "annotations": [cited("https://a", "A", 1, 2)],
            **ONE_CALL,
        },
    ),
}
ANSWERS = [
    (name, url, data, message)
    for url, rows in (
        (AT_CHAT, STREAMED_CALLS),
        (AT_CHAT, CHAT_ANSWERS),
        (AT_RESPONSES, RESPONSES_ANSWERS),
        (AT_MESSAGES, MESSAGES_ANSWERS),
    )
    for name, (data, message) in rows.items()
]


CHAT_DELTAS = [
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
]
FULL_ENTRY = {"bytes": None, **ENTRY, "top_logprobs": [{"bytes": None, **ENTRY}]}
RESPONSES_DELTAS = [
    {"reasoning_content": "p"},
    ({"content": "a"}, {"content": [FULL_ENTRY], "refusal": None}),
    {"refusal": "no"},
    call_delta(0, "", "c1"),
    call_delta(0, "{}"),
    call_delta(1, "", "c2"),
    call_delta(1, '{"late":1}'),
    call_delta(2, "", "c3"),
    call_delta(2, "{}"),
    call_delta(3, "", "c4", "custom"),
    call_delta(3, "x", kind="custom"),
]
MESSAGES_DELTAS = [
    {"reasoning_content": "r"},
    {"content": "a"},
    {"content": "b"},
    call_delta(0, "", "c1"),
    call_delta(0, '{"x":1.0}'),
    call_delta(1, "", "c2"),
    call_delta(1, "{}"),
]
STREAMS_WITH_EVERYTHING = {
    "chat completions": (AT_CHAT, CHAT_STREAM, CHAT_DELTAS, {**usage_of(3, 4, 2), "x": 1}),
    "responses": (AT_RESPONSES, RESPONSES_STREAM, RESPONSES_DELTAS, usage_of(11, 20, 4, 7)),
    "messages": (AT_MESSAGES, MESSAGES_STREAM, MESSAGES_DELTAS, usage_of(11, 20, 4)),
}
# Reasons to finish by what they are called, in chat completions.
FINISH_REASONS = {
    "stop": ("stop", "STOP", "end_turn", "stop_sequence", "eos", "COMPLETE", "other"),
    "length": (
        "length",
        "MAX_TOKENS",
        "max_tokens",
        "max-tokens",
        "max_output_tokens",
        "max_length",
        "model_length",
        "token_limit",
        "model_context_window_exceeded",
        "pause_turn",
    ),
    "content_filter": (
        "content_filter",
        "content-filter",
        "contentFilter",
        "content_filter: RECITATION",
        "SAFETY",
        "RECITATION",
        "PROHIBITED_CONTENT",
        "IMAGE_SAFETY",
        "SPII",
        "refusal",
        "sensitive",
    ),
    "tool_calls": ("tool_calls", "tool-calls", "TOOL_USE", "function_call", "toolUse"),
}
FAILED_REASONS = (
    "error",
    "ERROR",
    "insufficient_system_resource",
    "network_error",
    "MALFORMED_FUNCTION_CALL",
    "UNEXPECTED_TOOL_CALL",
    "abort",
    "cancelled",
)
NO_ANSWERS = {
    "JSON that is cut off": ("{no", "The provider sent bad data: {no"),
    "a gateway's sentence": ("upstream gone", "The provider sent bad data: upstream gone"),
    "a page": ("<p>Unicorn!</p>", "The provider sent bad data: Unicorn!"),
    "JSON that is too deep": ("[" * 100000, "The provider sent bad data"),
    "a number that is none": ('{"a":NaN}', 'The provider sent bad data: {"a":NaN}'),
    "a text": ('"x"', "The provider sent bad data"),
    "choices that are none": ('{"choices":[1]}', "The provider sent bad data"),
    "content that is no text": (json.dumps(chunk(content=5)), "The provider sent bad data"),
    "an end before an answer": ("[DONE]", "The provider did not finish its answer"),
}


class EventTest(unittest.TestCase):
    def test_streams_that_have_everything(self):
        for name, (url, stream, deltas, usage) in STREAMS_WITH_EVERYTHING.items():
            with self.subTest(name):
                found, last = events(url, *stream, logprobs=True)
                self.assertEqual(found, deltas)
                self.assertEqual(last, proxy.Event({}, None, "tool_calls", usage))

    def test_logprobs_that_were_not_asked_for_do_not_come(self):
        self.assertEqual(events(AT_RESPONSES, *RESPONSES_STREAM)[0][1], {"content": "a"})

    def test_finish_reasons_are_openais(self):
        for expected, reasons in FINISH_REASONS.items():
            for reason in reasons:
                with self.subTest(reason):
                    last = events(AT_CHAT, chunk(content="x"), chunk(reason), "[DONE]")[1]
                    self.assertEqual(last.finish_reason, expected)

    def test_a_failure_as_finish_reason_is_an_error(self):
        for reason in FAILED_REASONS:
            with self.subTest(reason):
                status, _, message = error(events, AT_CHAT, chunk(content="x"), chunk(reason))
                self.assertIn(status, (502, 503))
                self.assertEqual(message, f"The provider ended its answer with an error: {reason}")

    def test_what_is_no_answer_says_what_it_is(self):
        for name, (data, message) in NO_ANSWERS.items():
            with self.subTest(name):
                self.assertEqual(error(events, AT_CHAT, data), (502, None, message))

    def test_damaged_streams_are_events_or_an_error(self):
        """Whatever a provider sends, it is events that can be sent on, or an APIError."""
        seeded = random.Random(4141)
        streams = [row[:2] for row in STREAMS_WITH_EVERYTHING.values()]
        streams += [(url, data) for _, url, data, *_ in ANSWERS if isinstance(data, tuple)]
        streams += [(url, (data,)) for _, url, data, *_ in ANSWERS if isinstance(data, dict)]
        for _ in range(6000):
            url, stream = seeded.choice(streams)
            messages = json.loads(json.dumps(stream))
            damage(seeded, messages)
            with contextlib.suppress(proxy.APIError):
                self.answer(url, messages)

    def answer(self, url, messages):
        """Write an answer to what may be anything, whole and streamed."""
        for stream in (False, True):
            made = wire(url, logprobs=True, stream=stream)
            answer = proxy.Answer(made.request, WARM)
            for datum in messages:
                for found in made.events(datum if isinstance(datum, str) else json.dumps(datum)):
                    answer.take(0, found)
            json.dumps(answer.whole(), allow_nan=False)

    def test_events_in_every_split(self):
        stream = (
            "data: a\n: hi\n\ndata:b\ndata:  c\nid: 1\n\nevent: x\n\n"
            "data:\n\ndata: \u2028d\n\ndata: \ufeffe"
        )
        for whole in (stream.replace("\n", ends) for ends in ("\n", "\r", "\r\n")):
            for size in range(1, len(whole) + 1):
                reader, found = proxy.SSEReader(), []
                for start in range(0, len(whole), size):
                    found += reader.feed(whole[start : start + size]) + reader.feed("")
                self.assertEqual(found + reader.end(), ["a", "b\n c", "\u2028d", "\ufeffe"])

    def test_a_byte_order_mark_is_one_only_at_the_beginning(self):
        reader = proxy.SSEReader()
        found = reader.feed("") + reader.feed("\ufeff") + reader.feed("data: a\n\n")
        self.assertEqual(found + reader.feed("\ufeffdata: b\n\n"), ["a"])

    def test_an_event_that_is_too_large_is_an_error(self):
        reader = proxy.SSEReader()
        pieces = ["data: "] + ["x" * 1000000] * 20
        message = error(lambda: [reader.feed(piece) for piece in pieces])[2]
        self.assertEqual(message, "The provider sent too large an event")

    def test_a_large_event_in_small_pieces_takes_linear_time(self):
        def seconds(count):
            reader = proxy.SSEReader()
            started = time.process_time()
            reader.feed("data: ")
            for _ in range(count):
                reader.feed("x" * 4096)
            self.assertEqual(len(reader.end()[0]), 4096 * count)
            return time.process_time() - started

        few = min(seconds(375) for _ in range(3))
        many = min(seconds(3000) for _ in range(3))  # 8 times as much; quadratic: 64 times as long
        self.assertLess(many, 24 * few + 0.05)

    def test_what_comes_in_many_pieces_that_repeat_themselves_takes_linear_time(self):
        def seconds(pieces, count):
            first, more, last = pieces
            body = body_text((first, *[more] * count, last, chunk("stop"), "[DONE]"))
            exchange = exchange_at(AT_CHAT)
            started = time.process_time()
            tell(exchange, body)
            return time.process_time() - started

        detail = details({"type": "reasoning.text", "index": 0, "id": "d", "text": "abcd"})
        for name, pieces in (
            ("a call", [chunk(call=function_call(piece)) for piece in ('{"a":"', "abcd", '"}')]),
            ("reasoning", [detail] * 3),
        ):
            with self.subTest(name):
                few = min(seconds(pieces, 1500) for _ in range(3))
                many = seconds(pieces, 12000)  # 8 times as much; quadratic: 64 times as long
                self.assertLess(many, 24 * few + 0.05)

    def test_damaged_bytes_of_a_stream_are_events_or_an_error(self):
        seeded = random.Random(4141)
        for name, (url, stream, *_) in STREAMS_WITH_EVERYTHING.items():
            whole = body_text(stream).encode()
            for _ in range(300):
                data = bytearray(whole)
                for _ in range(seeded.randint(0, 8)):
                    data[seeded.randrange(len(data))] = seeded.choice(b'\n\r:{}[]"\\,dx\0\xff')
                words = data.decode("utf-8", "replace")
                cut = seeded.randrange(len(words))
                with self.subTest(name, words=words), contextlib.suppress(proxy.APIError):
                    tell(exchange_at(url), words[:cut], words[cut:])


# --------------------------------------------------------------------------------- exchange, answer
def tell(exchange, *pieces):
    """Return the events of an answer whose body comes in pieces."""
    found = []
    for piece in pieces:
        found += exchange.feed(piece)
    if found and found[-1].finish_reason is not None:
        return found
    return found + list(exchange.end())


def body_text(data):
    """Return the body of an answer: a stream of what is in a tuple, or JSON."""
    if not isinstance(data, tuple):
        return json.dumps(data)
    texts = [datum if isinstance(datum, str) else json.dumps(datum) for datum in data]
    return "".join(f"data: {words}\n\n" for words in texts)


def exchange_at(url, **fields):
    exchange = proxy.ChatExchange(proxy.parse_chat_request(chat_body(**fields)), WARM)
    exchange.body(url, {"model": "m"})
    return exchange


def answered(url, *pieces, **fields):
    """Return the choice that a client gets whole, or that its chunks add up to."""
    request = proxy.parse_chat_request(chat_body(**fields))
    answer = proxy.Answer(request, WARM)
    data = b"".join(answer.take(0, found) for found in tell(exchange_at(url, **fields), *pieces))
    if not request.stream:
        return answer.whole()["choices"][0]

    message = proxy.Message()
    for datum in data.decode().split("\n\n")[:-1]:
        choice = json.loads(datum[6:])["choices"][0]
        message.add(choice["delta"])
    return {**choice, "message": message.whole()}


def without_ids(message):
    """Return a message in which the ids that are ours are "ours"."""
    words = re.sub('"call_[0-9a-f]{32}"', '"ours"', json.dumps(message))
    return json.loads(words)


HALF = '{"town":'
HALF_WAY = {
    "in the middle of an event": (AT_CHAT, (chunk(content="a"),), 'data: {"choi'),
    "in the middle of a field": (AT_CHAT, (chunk(content="a"),), "dat"),
    "in the middle of a call, with [DONE]": (
        AT_CHAT,
        (chunk(call=function_call(HALF, index=0)), "[DONE]"),
        "",
    ),
    "in the middle of a call": (AT_CHAT, (chunk(call=function_call(HALF, index=0)),), ""),
    "before an answer": (AT_CHAT, (chunk(role="assistant"),), ""),
    "among thoughts": (AT_CHAT, (chunk(reasoning="hm"),), ""),
    "in the middle of an item": (
        AT_RESPONSES,
        (event("output_item.added"), wrote("a")),
        "",
    ),
    "in the middle of a block": (AT_MESSAGES, blocks((text("a"),))[:1], ""),
}
# Bodies of status 200 that are no answer; the status, the code and words of the error.
ERROR_BODIES = {
    "an error": ({"error": {"message": "no", "code": 429}}, 429, "rate_limit_exceeded", "no"),
    "an error with a status of its own": ({"code": 400, "message": "bad"}, 400, None, "bad"),
    "a list of errors": ({"errors": [{"message": "a"}]}, 502, None, "a"),
    "MiniMax's": (
        {"base_resp": {"status_code": 1004, "status_msg": "login"}, "choices": None},
        502,
        None,
        "login",
    ),
    "an error in a stream": (({"error": {"message": "no"}},), 502, None, "no"),
    "OpenAI's in a stream": (
        (chunk(content="a"), {"error": {"message": "m", "code": "insufficient_quota"}}),
        429,
        "insufficient_quota",
        "m",
    ),
    "an error in a choice": (
        (chunk(content="a"), {"choices": [{"error": {"code": 502, "message": "gone"}}]}),
        502,
        None,
        "gone",
    ),
    "an error in a whole choice": (
        {"choices": [{"error": {"code": 429, "message": "slow"}, "message": {}}]},
        429,
        "rate_limit_exceeded",
        "slow",
    ),
    "Groq's": (({"x_groq": {"error": "over"}, "choices": []},), 502, None, "over"),
    "OpenRouter's in a stream": (
        ({"error": RAW, **chunk("error")},),
        502,
        None,
        "Provider returned error: inner words",
    ),
    "a message without an answer": (({"message": "gone", "code": "x"},), 502, "x", "gone"),
    "JSON that is cut off": ('{"half": ', 502, "incomplete_answer", "bad data"),
    "a page": ("<html>\n\n<b>Unicorn!</b></html>", 502, None, "200 OK: Unicorn!"),
    "a sentence": ("upstream connect error: reset", 502, None, "200 OK: upstream connect"),
    "nothing": ("", 502, "incomplete_answer", "did not finish"),
    "nothing but comments": (": ping\n\n: ping\n\n", 502, "incomplete_answer", "did not"),
    "an error that a gateway wrote into the stream": (
        body_text((chunk(content="a"),)) + '{\n"error": {"message": "lost"}\n}\n',
        502,
        None,
        "lost",
    ),
}
FAILED = {"code": "rate_limit_exceeded", "message": "Please try again in 11.054s."}
ERRORS_OF_FORMATS = {
    "a failed response": (AT_RESPONSES, event("failed", response={"error": FAILED}), 429),
    "a failed response, whole": (AT_RESPONSES, {**output(status="failed"), "error": FAILED}, 429),
    "a response whose context is too long": (
        AT_RESPONSES,
        event("failed", response={"error": {"code": "context_length_exceeded", "message": "m"}}),
        400,
    ),
    "an error event": (AT_RESPONSES, {"type": "error", **FAILED}, 429),
    "an error event with an error": (AT_RESPONSES, {"type": "error", "error": FAILED}, 429),
    "a failed response without a reason": (AT_RESPONSES, event("failed", response={}), 502),
    "Claude's overload": (
        AT_MESSAGES,
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
        503,
    ),
    "Claude's rate limit": (
        AT_MESSAGES,
        {"type": "error", "error": {"type": "rate_limit_error", "message": "m"}},
        429,
    ),
}
HELLO_CHUNK = chunk("stop", content="hi")
HELLO_USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
HELLO_STREAM = body_text(({**HELLO_CHUNK, "usage": HELLO_USAGE},))
HELLO_WHOLE = json.dumps({**whole_chat(content="hi"), "usage": HELLO_USAGE})
HELLO_BODIES = {
    "a stream": HELLO_STREAM + "data: [DONE]\n\n",
    "a stream without [DONE]": HELLO_STREAM,
    "a stream without a last blank line": HELLO_STREAM.rstrip(),
    "a stream behind a byte order mark": "\ufeff" + HELLO_STREAM,
    "a whole answer": HELLO_WHOLE,
    "a whole answer behind blanks": "\n \n\n" + HELLO_WHOLE,
}
TIER = {"service_tier": "flex"}
CHAT_FRAME = {"system_fingerprint": "fp_1", "service_tier": "flex"}
CLAUDE_USAGE = {"input_tokens": 3, "output_tokens": 4, "service_tier": "standard"}
# Where providers tell of tokens and of themselves.
FACTS = {
    "OpenAI": (
        ({**HELLO_CHUNK, **CHAT_FRAME}, {"choices": [], **CHAT_FRAME, "usage": HELLO_USAGE}),
        AT_CHAT,
        HELLO_USAGE,
        CHAT_FRAME,
    ),
    "Groq": (({**HELLO_CHUNK, "x_groq": {"usage": HELLO_USAGE}},), AT_CHAT, HELLO_USAGE, {}),
    "Moonshot": (
        ({"choices": [{**HELLO_CHUNK["choices"][0], "usage": HELLO_USAGE}]},),
        AT_CHAT,
        HELLO_USAGE,
        {},
    ),
    "DeepSeek": (
        ({**HELLO_CHUNK, "usage": {**HELLO_USAGE, "prompt_cache_hit_tokens": 1}},),
        AT_CHAT,
        {**HELLO_USAGE, "prompt_tokens_details": {"cached_tokens": 1}},
        {},
    ),
    "counts that are none": (
        ({**HELLO_CHUNK, "usage": {"prompt_tokens": "x", "completion_tokens": 2}},),
        AT_CHAT,
        usage_of(0, 2),
        {},
    ),
    "/responses": (
        (
            event("created", response={"service_tier": "auto"}),
            wrote("hi"),
            event("completed", response={**TIER, "usage": {"input_tokens": 5}}),
        ),
        AT_RESPONSES,
        usage_of(5, 0),
        TIER,
    ),
    "/responses, whole": (
        output(item("message", SAID_A), **TIER, usage={"input_tokens": 5, "output_tokens": 2}),
        AT_RESPONSES,
        usage_of(5, 2),
        TIER,
    ),
    "/messages, whole": (
        claude(text("a"), usage=CLAUDE_USAGE),
        AT_MESSAGES,
        usage_of(3, 4),
        {"service_tier": "default"},
    ),
}
STOPS = {
    "in the middle": (["END"], "some ENEND more", "some EN"),
    "the one that is whole first": (["b", "abc"], "xabcx", "xa"),
    "the longest that ends there": (["abcd", "bc", "c"], "xabcd", "xa"),
    "one that begins again": (["aab"], "aaaab", "aa"),
    "of line ends": (["\n\n"], "a\nb\n\nc", "a\nb"),
    "none": ([], "abc", "abc"),
    "one that does not come": (["zz"], "abz", "abz"),
}


class ExchangeTest(unittest.TestCase):
    def assert_fails(self, status, words, call, *arguments):
        with self.assertRaisesRegex(proxy.APIError, re.escape(words)) as caught:
            call(*arguments)
        self.assertEqual(caught.exception.status, status)
        return caught.exception

    def test_a_json_object_comes_without_a_fence_from_claude_alone(self):
        fenced = '```json\n{"a":1}\n```'
        delta = {"type": "content_block_delta", "index": 0}
        said_by_claude = []
        for piece in ("``", "`json\n{", '"a":1}\n`', "``"):
            said_by_claude.append({**delta, "delta": {"type": "text_delta", "text": piece}})
        said_by_claude.append({"type": "message_delta", "delta": {"stop_reason": "end_turn"}})
        said_by_claude.append({"type": "message_stop"})
        pieces = [f"data: {json.dumps(message)}\n\n" for message in said_by_claude]
        for name, expected in (("json_object", '{"a":1}'), ("text", fenced)):
            for stream in (False, True):
                with self.subTest(name, stream=stream):
                    fields = {"response_format": {"type": name}, "stream": stream}
                    choice = answered(AT_MESSAGES, *pieces, **fields)
                    self.assertEqual(choice["message"]["content"], expected)

    def test_a_stop_sequence_in_a_fence_is_the_end_of_the_text(self):
        block = {"type": "text", "text": "```json\n{}END\n"}
        message = {"type": "message", "content": [block], "stop_reason": "max_tokens"}
        fields = {"response_format": {"type": "json_object"}, "stop": "END"}
        choice = answered(AT_MESSAGES, json.dumps(message), **fields)
        self.assertEqual((choice["message"]["content"], choice["finish_reason"]), ("{}", "stop"))

    def test_what_providers_send_is_understood_whole_and_streamed(self):
        for name, url, data, expected in ANSWERS:
            message = {"role": "assistant", "content": None, "refusal": None, **expected}
            finish_reason = "tool_calls" if "tool_calls" in expected else "stop"
            for stream in (False, True):
                with self.subTest(name, url=url, stream=stream):
                    choice = without_ids(answered(url, body_text(data), stream=stream))
                    self.assertEqual(choice["message"], message)
                    self.assertEqual(choice["finish_reason"], finish_reason)

    def test_what_was_cut_off_is_an_error(self):
        for name, (url, data, rest) in HALF_WAY.items():
            with self.subTest(name):
                text = body_text(data) + rest
                error = self.assert_fails(502, "The provider", tell, exchange_at(url), text)
                self.assertEqual(error.code, "incomplete_answer")

    def test_the_end_of_a_body_counts_where_it_is_told_from_a_dropped_connection(self):
        stream = body_text((chunk(content="a"),))
        for headers in ({"content-length": "9"}, {"transfer-encoding": "chunked"}):
            exchange = exchange_at(AT_CHAT)
            list(exchange.begin(200, headers))
            self.assertEqual(tell(exchange, stream)[-1].finish_reason, "stop")
        exchange = exchange_at(AT_CHAT)
        list(exchange.begin(200, {"connection": "close"}))
        self.assert_fails(502, "did not finish", tell, exchange, stream)

    def test_an_answer_that_is_an_error_passes_its_reason(self):
        for name, (body, status, code, words) in ERROR_BODIES.items():
            with self.subTest(name):
                body = body if isinstance(body, str) else body_text(body)
                error = self.assert_fails(status, words, tell, exchange_at(AT_CHAT), body)
                self.assertEqual(error.code, code)

    def test_errors_of_each_format_have_the_status_that_they_mean(self):
        for name, (url, message, status) in ERRORS_OF_FORMATS.items():
            with self.subTest(name):
                is_whole = message.get("object") == "response"
                body = body_text(message if is_whole else (message,))
                error = self.assert_fails(status, "", tell, exchange_at(url), body)
                is_timed = "again" in error.message
                self.assertEqual(error.headers, {"Retry-After": "12"} if is_timed else {})

    def test_a_refusal_is_an_error(self):
        refused = exchange_at(AT_CHAT).refused
        self.assert_fails(403, "no", refused, 403, {}, '{"error": "no"}')

    def test_bodies_in_pieces(self):
        for name, body in HELLO_BODIES.items():
            for pieces in ([body], body, [body[:9], body[9:]]):
                with self.subTest(name, pieces=len(pieces)):
                    first, last = tell(exchange_at(AT_CHAT), *pieces)
                    self.assertEqual(first, proxy.Event({"content": "hi"}))
                    self.assertEqual(last.finish_reason, "stop")
                    self.assertEqual({**last.usage, **HELLO_USAGE}, last.usage)

    def test_large_whole_answers(self):
        words = "x" * (1 << 20)
        body = json.dumps(whole_chat(content=words))
        choice = answered(AT_CHAT, body[:5], body[5:])
        self.assertEqual(choice["message"]["content"], words)
        exchange = exchange_at(AT_CHAT)
        huge = ['{"x": "', *["x" * (1 << 20)] * 17]
        self.assert_fails(502, "too large", tell, exchange, *huge)

    def test_answers_of_formats_that_only_opencode_knows(self):
        exchange = exchange_at("https://x.example/v1/generate")
        found = []
        for params in (
            {"type": "reasoning", "text": "hm"},
            {"type": "text", "text": "a"},
            {
                "finish": "length",
                "tokens": {
                    "input": 5,
                    "output": 2,
                    "reasoning": 3,
                    "cache": {"read": 4, "write": 2},
                },
            },
        ):
            found += exchange.report(params)
        deltas = [{"reasoning_content": "hm"}, {"content": "a"}, {}]
        self.assertEqual([event.delta for event in found], deltas)
        self.assertEqual(found[-1].finish_reason, "length")
        self.assertEqual(found[-1].usage, usage_of(11, 5, 4, 3))

    def test_usage_and_frame_of_each_provider(self):
        for name, (data, url, usage, frame) in FACTS.items():
            with self.subTest(name):
                found = tell(exchange_at(url), body_text(data))
                self.assertEqual({**found[-1].usage, **usage}, found[-1].usage)
                frames = {}
                for event in found:
                    frames.update(event.frame or {})
                self.assertEqual(frames, frame)

    def test_stop_at_every_split(self):
        for name, (stops, text, shown) in STOPS.items():
            splits = [(text[:at], text[at:]) for at in range(len(text) + 1)]
            for pieces in [*splits, tuple(text)]:
                with self.subTest(name, pieces=pieces):
                    exchange = exchange_at(AT_CHAT, stop=stops)
                    data = (*(chunk(content=piece) for piece in pieces), chunk("length"))
                    *found, last = tell(exchange, body_text(data))
                    texts = [event.delta.get("content", "") for event in found]
                    self.assertEqual("".join(texts), shown)
                    self.assertEqual(last.finish_reason, "length" if shown == text else "stop")

    CUT = body_text((chunk(content="a EN"), chunk(content="D b"), chunk(content="c")))

    def test_what_comes_behind_a_stop_sequence_is_its_usage(self):
        usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
        for data, counted in (((), None), ((usage,), 2)):
            *found, last = tell(exchange_at(AT_CHAT, stop="END"), self.CUT + body_text(data))
            self.assertEqual([event.delta["content"] for event in found], ["a ", ""])
            self.assertEqual(last.finish_reason, "stop")
            self.assertEqual((last.usage or {}).get("completion_tokens"), counted)

    def test_logprobs_of_text_that_is_held_back_come(self):
        choice = {"delta": {"content": "EN"}, "logprobs": {"content": [ENTRY]}}
        silent = {"delta": {"content": ""}, "logprobs": {"content": [ENTRY]}}
        stream = body_text(({"choices": [choice]}, {"choices": [silent]}, chunk("stop")))
        for stops in ("END", []):
            found = tell(exchange_at(AT_CHAT, stop=stops), stream)
            self.assertEqual([bool(event.logprobs) for event in found[:2]], [True, True])

    def test_patience_with_a_finished_answer(self):
        finished = body_text((chunk("length", content="EN"),))
        for name, text, fields, patience in (
            ("not finished", "", {}, None),
            ("cut, and its usage is wanted", self.CUT, {}, proxy.CUT_SECONDS),
            ("cut", self.CUT, {"stream": True}, 0.0),
            ("finished", finished, {"stream": True}, proxy.FINISH_SECONDS),
        ):
            with self.subTest(name):
                exchange = exchange_at(AT_CHAT, stop="END", **fields)
                list(exchange.feed(text))
                self.assertEqual(exchange.patience, patience)

    def test_a_finish_reason_in_every_chunk_cuts_nothing_off(self):
        exchange = exchange_at(AT_CHAT)
        for patience in (proxy.FINISH_SECONDS, None, None):
            list(exchange.feed(body_text((chunk("stop", content="a"),))))
            self.assertEqual(exchange.patience, patience)

    def test_what_was_held_back_comes_with_the_end(self):
        exchange = exchange_at(AT_CHAT, stop="END")
        list(exchange.feed(body_text((chunk("length", content="EN"),))))
        held, last = exchange.end()
        self.assertEqual((held.delta, last.finish_reason), ({"content": "EN"}, "length"))


class AnswerTest(unittest.TestCase):
    def answer(self, *events, **fields):
        """Return an answer that has taken events, with the index of a choice each, and its bytes."""
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
            '"choices":\\[$',
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

    CALLS = [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"id": "c", "type": "function", "function": {"name": "g", "arguments": "1"}},
    ]
    DELTAS = [
        {"reasoning_content": "th"},
        {"reasoning_content": "ink"},
        {"content": "a"},
        {"tool_calls": [{**CALLS[0], "index": 0, "function": {"name": "f"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]},
        {"tool_calls": [{**CALLS[1], "index": 1}]},
        {"annotations": [{"at": 1}]},
        {"annotations": [{"at": 2}]},
        {"unknown": {"id": "i", "type": "t"}, "words": "x", "flag": True},
        {"unknown": {"id": "i", "type": "t", "more": 1}, "words": "y", "flag": False},
    ]
    EVENTS = (*((0, delta) for delta in DELTAS), (0, {}, None, "tool_calls"))

    def test_a_whole_answer_is_what_its_deltas_add_up_to(self):
        answer, said = self.answer(*self.EVENTS, model="other")
        whole = answer.whole()
        self.assertEqual((said, whole["object"], whole["model"]), (b"", "chat.completion", "p/m"))
        message = {
            "role": "assistant",
            "content": "a",
            "refusal": None,
            "reasoning_content": "think",
            "tool_calls": self.CALLS,
            "annotations": [{"at": 1}, {"at": 2}],
            "unknown": {"id": "i", "type": "t", "more": 1},
            "words": "xy",
            "flag": False,
        }
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}
        self.assertEqual(whole["choices"], [choice])

    def test_an_empty_answer_has_an_empty_text(self):
        message = self.answer((0, {}, None, "stop"))[0].whole()["choices"][0]["message"]
        self.assertEqual(message, {"role": "assistant", "content": "", "refusal": None})

    # Row: a delta of an answer without a text; its content.
    WITHOUT_TEXT = (
        ({"reasoning_content": "cut off by a limit"}, ""),
        ({"tool_calls": [{**CALLS[0], "index": 0}]}, None),
        ({"refusal": "no"}, None),
        ({"audio": {"id": "a"}}, None),
    )

    def test_only_what_stands_for_a_text_makes_it_null(self):
        for delta, expected in self.WITHOUT_TEXT:
            with self.subTest(delta):
                answer = self.answer((0, delta), (0, {}, None, "length"))[0]
                self.assertEqual(answer.whole()["choices"][0]["message"]["content"], expected)

    def test_who_calls_tools_functions_gets_one_call(self):
        choice = self.answer(*self.EVENTS, functions=[])[0].whole()["choices"][0]
        self.assertEqual(choice["message"]["function_call"], self.CALLS[0]["function"])
        self.assertNotIn("tool_calls", choice["message"])
        self.assertEqual(choice["finish_reason"], "function_call")

    def test_logprobs_add_up(self):
        pieces = ({"content": [1], "refusal": None}, None, {"content": [2]}, {"refusal": [3]})
        events = [(0, {"content": "x"}, logprobs) for logprobs in pieces]
        choice = self.answer(*events, (0, {}, None, "stop"))[0].whole()["choices"][0]
        self.assertEqual(choice["logprobs"], {"content": [1, 2], "refusal": [3]})

    def test_logprobs_without_text_are_streamed(self):
        _, said = self.answer((0, {}, {"content": [1]}), stream=True)
        choice = json.loads(said[6:])["choices"][0]
        self.assertEqual((choice["delta"], choice["logprobs"]), ({}, {"content": [1]}))

    def test_the_providers_fingerprint_and_tier_are_in_the_frame(self):
        frame = {"system_fingerprint": "fp_1", "service_tier": "default"}
        event = (0, {"content": "x"}, None, None, None, frame)
        for chunk in (
            json.loads(self.answer(event, stream=True)[1][6:]),
            self.answer(event)[0].whole(),
        ):
            self.assertEqual({**chunk, **frame}, chunk)

    TOLD = {
        "prompt_tokens": 5,
        "completion_tokens": 7,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 3},
        "cost": 0.5,
        "is_byok": True,
    }

    def test_tokens_of_a_prompt_count_once_and_those_of_choices_add_up(self):
        for name, second, prompt, completion, total, reasoning, cost in (
            ("counted", self.TOLD, 5, 14, 19, 6, 1.0),
            ("not counted", None, 5, 10, 15, 3, 0.5),
            ("without the prompt", {"completion_tokens": 4}, 5, 11, 16, 3, 0.5),
        ):
            with self.subTest(name):
                answer = self.answer(
                    (0, {"content": "x"}),
                    (1, {"content": "x" * 8}),
                    (1, {}, None, "stop", second),
                    (0, {}, None, "stop", self.TOLD),
                    n=2,
                )[0]
                expected = {
                    **self.TOLD,
                    "prompt_tokens": prompt,
                    "completion_tokens": completion,
                    "total_tokens": total,
                    "completion_tokens_details": {"reasoning_tokens": reasoning},
                    "cost": cost,
                }
                self.assertEqual(answer.usage, expected)


# ------------------------------------------------------------------------------------- the catalog
class TrimmedTest(unittest.TestCase):
    """The catalog with which opencode starts faster."""

    @staticmethod
    def trimmed(*names):
        able = dict.fromkeys(("temperature", "reasoning", "attachment", "toolcall"), True)
        listed = []
        for name in names:
            provider, _, model = name.partition("/")
            entry = {
                "id": model,
                "providerID": provider,
                "api": {"id": model[:1], "npm": "n", "url": "u"},
                "capabilities": {**able, "input": {}, "output": {}},
                "limit": {"output": 9},
                "options": {"serviceTier": "priority"},
                "headers": {},
            }
            listed.append(entry)
        return proxy.make_catalog(listed, ["login"], None).trimmed

    def test_a_fast_model_is_a_mode_of_another(self):
        trimmed = self.trimmed("a/m-fast", "a/m")
        fast = {"provider": {"body": {"service_tier": "priority"}, "headers": {}}}
        self.assertEqual(trimmed["a"]["models"]["m"]["experimental"], {"modes": {"fast": fast}})

    def test_only_connected_providers_are_in_it(self):
        self.assertEqual(set(self.trimmed("a/m", "opencode/free")), {"a", "login"})


# --------------------------------------------------------------------------------------- processes
class FaultTest(FakeCase):
    """A process that does what it should not; the next request is answered all the same."""

    NOISE = r"""write('Segmentation fault\n\n{}\n[1]\n{"jsonrpc"\nhas printed this')"""
    ORPHAN = """do
import subprocess
words = ["sh", "-c", f"while test -e {HERE}/orphans; do sleep 0.1; done"]
subprocess.Popen(words, start_new_session=%s)
os._exit(0)
"""
    ORPHANS = {"in its group": ORPHAN % False, "in a session of its own": ORPHAN % True}
    LATE_FAULTS = {
        "a dropped connection": "report('error', network='ECONNRESET', message='reset'); rest(600)",
        "an end of the process": "os._exit(3)",
    }
    BROKEN_LINES = {
        "too long": "report('data', text='x' * (17 << 20))",
        "broken off": "write(line(method='proxy/data', params=own)[:-9] + '\\n')",
        "no JSON": "write(line(method='proxy/data', params=own)[:-3] + '}]\\n')",
    }

    def assert_fails(self, running, content, text):
        """Check that one request fails with 502, and the next one is answered."""
        self.assert_error(running.chat(content), 502, "opencode_failed", text)
        self.assertEqual(running.content("well"), "well")

    def test_a_child_that_dies_fails_its_answer_with_its_last_words(self):
        self.assert_fails(self.start(spares=1), DIE, "opencode ended: last words")

    def test_a_child_that_dies_ends_a_stream_with_an_error(self):
        events = self.start().stream(DIE)
        self.assertIn({"content": "a"}, deltas_of(events))
        self.assertEqual((events[-2]["error"]["code"], events[-1]), ("opencode_failed", "[DONE]"))

    def test_what_comes_behind_a_finish_reason_prolongs_no_answer(self):
        self.patch(proxy, FINISH_SECONDS=0.3)
        running = self.start(timeout=600.0)
        script = """do data(chunk({'content': 'a'}, 'stop'))
while True:
    data(': ping\\n\\n')
    rest(0.02)
"""
        answer = self.background.submit(running.content, script)
        self.assertEqual(answer.result(SOON), "a")

    def test_what_was_handed_over_is_not_sent_twice(self):
        running = self.start(spares=1)
        self.assert_fails(running, "do os._exit(3)", "opencode ended")
        self.assertEqual(len(self.journal("post", "_exit")), 1)

    def test_what_opencode_asks_for_again_is_not_handed_over_again(self):
        script = """do
note("asks", 1)
session.ask("request", {"url": "http://127.0.0.1/chat/completions", "body": {}})
note("sends", 1)
"""
        running = self.start(spares=1, timeout=600.0)
        with running.send(script):
            self.assertTrue(self.noted("asks"))
        self.assertTrue(running.becomes(SOON, running=0))
        self.assertTrue(self.noted("cancelled"))
        self.assertEqual(self.journal("sends"), [])

    def test_orphans_that_keep_the_pipes_open_hold_nobody_up(self):
        alive = self.folder / "orphans"
        alive.touch()
        running = self.start(spares=1)
        self.stack.callback(alive.unlink)
        for name, script in self.ORPHANS.items():
            with self.subTest(name):
                answer = self.background.submit(running.chat, script)
                self.assert_error(answer.result(SOON), 502, "opencode_failed", "opencode ended")
                self.assertEqual(running.content("well"), "well")

    def test_what_a_process_started_ends_with_it_even_deaf_to_sigterm(self):
        fifo = self.folder / "fifo"
        os.mkfifo(fifo)
        heard = self.background.submit(fifo.read_bytes)  # until all that write to it have ended
        script = """do
import subprocess
words = ["sh", "-c", "trap '' TERM; echo deaf; exec sleep 600"]
subprocess.Popen(words, stdout=open(HERE + "/fifo", "wb"))
hold()
os._exit(0)
"""
        running = self.start(spares=1)
        answer = self.background.submit(running.chat, script)
        self.assertTrue(self.noted("post"))
        self.let_go()
        self.assert_error(answer.result(), 502, "opencode_failed")
        self.assertEqual(heard.result(DEADLINE), b"deaf\n")

    def assert_given_to_another_process(self, first_mode, text="well"):
        """Check that a request is answered whose process ends as `first_mode` makes it."""
        self.mode(first_mode)
        running = self.start(spares=1, requests_per_process=100)
        self.mode("")
        self.assertEqual(running.content(text), text)
        self.assertEqual(len(self.journal("start")), 2)
        self.assertEqual(len(self.journal("post")), 1)

    def test_a_request_that_was_not_asked_for_is_given_to_another_process(self):
        self.assert_given_to_another_process("fake.before_request = 'os._exit(3)'")

    def test_a_body_that_was_not_handed_over_in_full_is_given_to_another_process(self):
        self.assert_given_to_another_process("fake.in_request = 'os._exit(3)'", "x" * (2 << 20))

    def test_a_body_that_was_not_sent_when_its_process_ended_is_given_to_another_one(self):
        self.assert_given_to_another_process("fake.before_sending = 'os._exit(3)'")

    def test_a_body_that_may_still_be_sent_when_a_wrapper_was_killed_is_not_sent_again(self):
        program = self.fake.with_name("wrapped")
        self.fake.rename(program)
        wrapper = f"import subprocess, sys\nsubprocess.call([{str(program)!r}, *sys.argv[1:]])"
        self.fake.write_text(f"#!{sys.executable} -IS\n{wrapper}\n")
        self.fake.chmod(0o700)
        self.mode("fake.before_sending = 'note(\"wrapper\", os.getppid()); hold()'")
        running = self.start(spares=1, requests_per_process=100)
        self.mode("")
        answer = self.background.submit(running.chat, "well")
        self.assertTrue(self.noted("wrapper"))
        os.kill(int(self.journal("wrapper")[0]), signal.SIGKILL)
        self.assert_error(answer.result(), 502, "opencode_failed", "opencode was killed")
        self.assertEqual(self.journal("post"), [])  # nor did another one

    def test_a_process_that_was_killed_is_told_in_the_log_and_replaced(self):
        """The kernel does that where memory is short: also while nobody asks."""
        running = self.start(spares=1)
        first = self.only(running, spares=1)
        os.kill(first, signal.SIGKILL)
        warning = "warning: opencode was killed, perhaps for want of memory"
        self.assertTrue(eventually(lambda: warning in self.logged), self.logged)
        self.assertNotEqual(self.only(running, spares=1), first)

    def test_a_body_that_was_given_up_is_not_sent_and_the_next_one_is_whole(self):
        self.mode("""fake.in_request = 'note("reading"); hold("read")'""")
        running = self.start(spares=1, requests_per_process=100, timeout=600.0)
        with running.send("x" * (6 << 20)):
            self.assertTrue(self.noted("reading"))
        self.assertTrue(running.becomes(SOON, running=0))
        self.assertTrue(self.noted("cancelled"))
        self.let_go("read")
        text = "y" * (2 << 20)
        self.assertEqual(running.content(text), text)
        self.assertEqual(self.journal("post", "xxx"), [])
        self.assertEqual(len(self.journal("start")), 1)

    def test_a_slow_body_holds_up_no_other(self):
        slow_first = """
if not os.path.exists(HERE + "/first"):
    open(HERE + "/first", "w").close()
    note("reading")
    hold("read")
"""
        self.mode(f"fake.in_request = {slow_first!r}")
        running = self.start(spares=1, requests_per_process=100, timeout=600.0)
        slow = self.background.submit(running.content, "x" * (2 << 20))
        self.assertTrue(self.noted("reading"))
        text = "y" * (2 << 20)
        self.assertEqual(running.content(text), text)
        self.assertFalse(slow.done())
        self.let_go("read")
        self.assertEqual(slow.result(), "x" * (2 << 20))
        self.assertEqual(len(self.journal("start")), 1)

    def test_what_plugins_print_is_skipped_and_the_last_of_it_told(self):
        self.mode(f"if fake.is_acp: {self.NOISE}")
        running = self.start()
        self.assertEqual(running.content(f"do {self.NOISE}; say('well')"), "well")
        script = f"do {self.NOISE}; os._exit(3)"
        self.assert_fails(running, script, "opencode ended: has printed this")

    def test_what_opencode_asks_for_is_refused(self):
        script = """do send(id=9, method='fs/read_text_file', params={})
while 'reply' + ' refused' not in open(HERE + '/journal').read(): rest(0.02)"""
        self.assertEqual(self.start().content(script), "")

    def test_a_full_stderr_stops_nothing(self):
        script = "do write(('e' * 100000 + '\\n') * 200, 2); say('well')"
        self.assertEqual(self.start().content(script), "well")

    def test_a_line_that_cannot_be_used_fails_its_answer_and_no_other(self):
        running = self.start(spares=1, requests_per_process=100)
        for name, script in self.BROKEN_LINES.items():
            with self.subTest(name):
                posts = len(self.journal("post"))
                answer = f"do say(str(os.getpid())); hold('{name}'); say(' b')"
                other = self.background.submit(running.content, answer)
                self.assertTrue(self.noted("post", count=posts + 1))
                script = f"own = {{'sessionId': session.name, 'text': 'abc'}}; {script}; rest(600)"
                reply = running.chat(f"do note('pid', os.getpid()); {script}")
                self.let_go(name)
                self.assertEqual(other.result(), self.journal("pid")[-1] + " b")
                self.assert_error(reply, 502, "opencode_failed")

    def test_what_fails_behind_the_finish_reason_takes_nothing(self):
        running = self.start(spares=1)
        for name, script in self.LATE_FAULTS.items():
            with self.subTest(name):
                script = f"do say('all'); data(chunk({{}}, 'stop')); {script}"
                self.assertEqual(running.content(script), "all")
                events = running.stream(script)
                self.assertEqual(deltas_of(events)[-2:], [{"content": "all"}, {}])
                self.assertEqual(events[-1], "[DONE]")

    def test_a_defect_in_one_of_several_choices_is_an_internal_error(self):
        running = self.start()
        defect = RecursionError("a defect of the program")  # which is a RuntimeError
        with unittest.mock.patch.object(proxy, "chat_conversation", side_effect=defect):
            status, answer = running.chat(n=2)
        self.assertEqual((status, answer["error"]["type"]), (500, "server_error"))

    def test_a_silent_provider_fails_the_request_after_the_time_out(self):
        clock = self.wind()
        running = self.start(spares=1, timeout=300.0)
        answer = self.background.submit(running.chat, PAUSE)
        self.assertTrue(self.noted("post", PAUSE))
        reply = self.result_later(clock, 301, answer)
        self.assert_error(reply, 504, "timeout", "sent nothing for 300 seconds")
        self.assertEqual(running.content("well"), "well")

    def test_a_provider_has_its_time_although_it_is_silent_from_the_beginning(self):
        handed_over = threading.Event()
        note_hand_over = proxy.Turn.note_hand_over

        def note(turn, session_id, failure):
            note_hand_over(turn, session_id, failure)
            handed_over.set()

        self.patch(proxy.Turn, note_hand_over=note)
        clock = self.wind()
        running = self.start(spares=1, timeout=300.0)
        answer = self.background.submit(running.content, "do hold(); say('well')")
        self.assertTrue(handed_over.wait(SOON))
        clock.ahead += proxy.START_SECONDS + 1  # what opencode has before the hand-over
        self.assertTrue(self.noted("post"))
        self.let_go()
        self.assertEqual(answer.result(), "well")

    def test_a_child_that_ignores_sigterm_is_killed(self):
        self.patch(proxy, STOP_SECONDS=0.3)
        self.mode("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
        running = self.start(spares=1)
        (first,) = opencode_pids()
        self.assertEqual(running.content("well"), "well")

        def is_gone():
            running.pool.look_again()  # others' requests put nothing off
            return first not in opencode_pids()

        self.assertTrue(eventually(is_gone, SOON))


class TurnTest(unittest.TestCase):
    """What reaches a turn from what it has left."""

    def turn(self):
        pool = types.SimpleNamespace(
            closing=threading.Event(),
            opencode=types.SimpleNamespace(asks=types.SimpleNamespace(turns={}), foreign=set()),
            release=lambda turn, failed, again: None,
        )
        return proxy.Turn(0, pool, lambda: None, WARM, timeout=1.0)

    def test_a_process_that_was_left_fails_nothing_any_more(self):
        reached = proxy.APIError(400, "reached")
        left = types.SimpleNamespace()
        process = types.SimpleNamespace(take_session=unittest.mock.Mock(side_effect=reached))
        process.forget = process.cancel = lambda about: None
        turn = self.turn()
        turn.process = process
        turn.inbox.put(proxy.Letter("failed", left, None, "opencode ended"))
        turn.inbox.put(proxy.Letter("process", process))
        with unittest.mock.patch.object(proxy, "MAX_ATTEMPTS", 1):
            self.assertEqual(error(turn.events, lambda: None)[2], "reached")

    def test_a_body_is_handed_over_to_the_session_of_its_turn_alone(self):
        turn = self.turn()
        turn.session_id = "ses_1"
        self.assertFalse(turn.may_hand_over("ses_0"))
        self.assertFalse(turn.handed_over)
        self.assertTrue(turn.may_hand_over("ses_1"))
        self.assertTrue(turn.handed_over)

    def test_no_body_is_handed_over_once_its_turn_has_left(self):
        turn = self.turn()
        turn.session_id = "ses_1"
        self.assertTrue(turn.leave(again=True))
        self.assertFalse(turn.may_hand_over("ses_1"))
        self.assertFalse(turn.handed_over)


class PingTest(FakeCase):
    """A stream that is silent for long is kept alive by comments."""

    PING = b": keep-alive\n"

    def setUp(self):
        super().setUp()
        self.clock = self.wind()

    @contextlib.contextmanager
    def silence(self):
        """Let more time pass, again and again, than a stream may be silent."""
        is_over = threading.Event()

        def pass_time():
            while not is_over.wait(0.05):
                self.clock.ahead += proxy.PING_SECONDS

        passing = self.background.submit(pass_time)
        try:
            yield
        finally:
            is_over.set()
            passing.result()

    def assert_ping(self, connection):
        """Wait for a ping; return the answer, of which it is the last line that was read."""
        with self.silence():
            answer = connection.getresponse()
            lines_until(answer, self.PING)
        return answer

    def test_pings_in_the_queue(self):
        running = self.start(max_concurrency=1, timeout=86400.0)
        with running.send(PAUSE):
            self.assertTrue(self.noted("post", PAUSE))
            with running.streaming("queued") as connection:
                self.assertTrue(running.becomes(waiting=1))
                self.assert_ping(connection)

    def test_pings_before_the_first_token_and_between_tokens(self):
        running = self.start(timeout=86400.0)
        script = "do hold('one'); say('first'); hold('two'); say('second')"
        with running.streaming(script) as connection:
            self.assertTrue(self.noted("post"))
            answer = self.assert_ping(connection)
            self.let_go("one")
            lines_until(answer, b'"first"')
            with self.silence():
                lines_until(answer, self.PING)
            self.let_go("two")
            lines_until(answer, b'"second"')

    def test_a_stream_begins_with_the_role_and_not_with_a_ping(self):
        running = self.start(timeout=86400.0)
        with running.streaming("do hold()") as connection:
            self.assertTrue(self.noted("post"))
            with self.silence():
                answer = connection.getresponse()
                self.assertEqual(answer.readline()[:22], b'data: {"id":"chatcmpl-')

    def test_pings_between_events_that_are_passed_through_and_within_none(self):
        running = self.start(timeout=86400.0)
        script = r"do data('data: 1\n\n'); hold('one'); data('data: '); hold('two'); data('2\n\n')"
        body = {"model": "claude-sonnet-4.6", "stream": True, "max_tokens": 9}
        body["messages"] = [{"role": "user", "content": script}]
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=DEADLINE)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/messages", json.dumps(body))
            answer = connection.getresponse()
            lines_until(answer, b"data: 1")
            with self.silence():
                lines_until(answer, self.PING)
            self.let_go("one")
            data = b""
            while not data.endswith(b"data: "):
                data += answer.read(1)
            later = self.clock.ahead + 20 * proxy.PING_SECONDS
            with self.silence():
                self.assertTrue(eventually(lambda: self.clock.ahead > later))
            self.let_go("two")
            self.assertEqual(answer.readline(), b"2\n")

    def test_an_error_after_pings_is_an_event(self):
        running = self.start(timeout=86400.0)
        with running.streaming("do hold()") as connection:
            self.assertTrue(self.noted("post"))
            answer = self.assert_ping(connection)
            self.clock.ahead += 86401
            lines_until(answer, b'"code":"timeout"')
            lines_until(answer, b"data: [DONE]")


class LeavingTest(FakeCase):
    """Clients that leave, or read late: their session ends, and nothing else."""

    PIPELINED = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    LONG = "data(chunk({'content': 'tok ' * 1000}) * 800)"  # 3.2 MB
    # Row: what is sent after the request, whether it is streamed.
    LEAVERS = {
        "streamed": (b"", True),
        "whole": (b"", False),
        "with an empty line": (b"\r\n", True),
        "with another request": (PIPELINED, False),
    }

    def test_a_client_that_leaves_ends_its_session_and_no_other(self):
        running = self.start(timeout=600.0, spares=1, requests_per_process=100)
        pid = running.content(PID)
        for number, (name, (after, stream)) in enumerate(self.LEAVERS.items(), 1):
            with self.subTest(name):
                with running.send(PAUSE, after, stream=stream):
                    self.assertTrue(self.noted("post", PAUSE, number))
                self.assertTrue(running.becomes(SOON, running=0))
                self.assertTrue(self.noted("cancelled", PAUSE, number))
        self.assertEqual(self.journal("cancelled", PAUSE), [f"{pid} {PAUSE}"] * number)
        self.assertEqual(running.content(PID), pid)

    def test_a_client_that_leaves_while_opencode_does_not_go_on_is_noticed(self):
        self.mode("fake.before_request = 'note(\"stuck\"); rest(600)'")
        running = self.start(timeout=600.0, spares=1, requests_per_process=100)
        with running.send("x"):
            self.assertTrue(self.noted("stuck"))
        self.assertTrue(running.becomes(SOON, running=0))
        self.assertTrue(self.noted("cancelled"))
        self.assertEqual(self.journal("post"), [])

    def test_an_opencode_that_does_not_go_on_fails_the_request_at_last(self):
        clock = self.wind()
        self.mode("fake.before_request = 'note(\"stuck\"); rest(600)'")
        running = self.start(timeout=600.0)
        answer = self.background.submit(running.chat, "x")
        for attempt in range(proxy.MAX_ATTEMPTS):
            self.assertTrue(self.noted("stuck", count=attempt + 1))
            clock.ahead += proxy.START_SECONDS + 1
        self.assert_error(answer.result(), 502, "opencode_failed", "did not go on within")
        self.assertEqual(self.journal("post"), [])

    def test_clients_that_read_late_get_everything_and_fill_no_memory(self):
        running = self.start(timeout=600.0)
        script = f"do hold(); {self.LONG}"
        after = b"GET / HTTP/1.0\r\n\r\n"
        with running.send(script, after, stream=True, n=2) as client:
            self.assertTrue(self.noted("post", count=2))
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            self.let_go()
            self.assertTrue(eventually(lambda: len(set(self.journal("waits"))) == 2))
            self.assertLess(tracemalloc.get_traced_memory()[1], 8 << 20)
            tracemalloc.stop()
            data = b"".join(iter(lambda: client.recv(1 << 20), b""))
        self.assertEqual(data.count(b"tok "), 1600000)

    def test_a_slow_client_runs_into_no_time_out_of_the_provider(self):
        """What has come lies unread meanwhile, of two choices."""
        clock = self.wind()
        running = self.start(timeout=20.0)
        with running.streaming(f"do {self.LONG}", n=2) as connection:
            self.assertTrue(eventually(lambda: len(set(self.journal("waits"))) == 2))
            clock.ahead += 21
            data = connection.getresponse().read()
        self.assertNotIn(b'"error"', data)
        self.assertEqual(data.count(b"tok "), 1600000)

    def test_a_slow_client_gets_the_usage_that_the_provider_counted(self):
        """One choice's usage lies unread while the client does not take the other's text."""
        clock = self.wind()
        self.patch(proxy, FINISH_SECONDS=40.0)
        running = self.start(timeout=600.0)
        script = """do
if order == 0:
    hold("finished")
    data(chunk({"content": "tok " * 1000}) * 800)
else:
    say("first")
    data(chunk({}, "stop"))
    hold("usage")
"""
        options = {"include_usage": True}
        with running.streaming(script, n=2, stream_options=options) as connection:
            answer = connection.getresponse()
            lines_until(answer, b'"first"')
            self.let_go("finished")
            self.assertTrue(self.noted("waits"))
            self.let_go("usage")
            self.assertTrue(self.noted("answered"))
            clock.ahead += 41
            data = answer.read()
        self.assertIn(b'"completion_tokens":2000', data)


class StartTest(FakeCase):
    """Starts that fail, stall or come early."""

    INVALID = r"\x1b[91mError: \x1b[0mopencode.json is not valid JSON(C)"
    # Row: how opencode is, what the program says of it.
    USELESS = {
        "too little memory": (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "opencode was killed, perhaps for want of memory",
        ),
        "invalid configuration": (
            f"if not fake.is_acp: sys.exit('{INVALID}')",
            "Error: opencode.json is not valid",
        ),
        "no models": (
            r"if not fake.is_acp: sys.exit(print('a/b\n{}'))",
            "opencode cannot be used: ",
        ),
        "ends at once": (FAILS, "opencode ended: no memory"),
        "old version": ("fake.version = '1.16.9'", "1.16.9 is too old: 1.17.0 or newer"),
        "no plugin": ("fake.loads_plugin = False", "did not load the proxy's plugin"),
        "no request": (
            "fake.reaches_model = False",
            "did not reach the model in the start-up proof",
        ),
    }

    def test_what_does_not_work_is_said(self):
        for name, (mode, text) in self.USELESS.items():
            with self.subTest(name), self.assertRaisesRegex(proxy.StartError, re.escape(text)):
                self.mode(mode)
                self.start()

    def test_a_wrapper_that_redirects_stderr_is_waited_for(self):
        self.patch(proxy, STOP_SECONDS=0.1)
        redirect = "os.dup2(os.open(os.devnull, os.O_WRONLY), 2)"
        self.mode(f"if not fake.is_acp: {redirect}; time.sleep(1)")
        running = self.start()
        self.mode("")
        self.assertEqual(running.content("well"), "well")

    def test_an_opencode_that_does_not_answer_is_said(self):
        self.patch(proxy, START_SECONDS=0.7)
        self.mode("if fake.is_acp: time.sleep(600)")
        text = "opencode did not answer initialize within"
        with self.assertRaisesRegex(proxy.StartError, text):
            self.start()

    def test_opencode_reaches_itself_around_a_proxy_however_its_variable_is_spelled(self):
        os.environ.update(NO_PROXY="a.example", no_proxy="b.example")
        self.mode("note('around', os.environ['NO_PROXY'], os.environ['no_proxy'])")
        self.start()
        hosts = "a.example,b.example,127.0.0.1,localhost,::1"
        self.assertEqual(set(self.journal("around")), {f"{hosts} {hosts}"})

    def test_a_process_that_cannot_close_its_timers_is_the_last_that_tries(self):
        names = "('BUN_INSPECT_PRELOAD', 'BUN_JSC_useGC')"
        self.mode(f"if fake.is_acp: note('engine', *map(os.environ.get, {names}))")
        self.patch(proxy, memory_of_machine=lambda: proxy.MIN_MEMORY_BYTES)
        running = self.start(spares=1)
        self.assertEqual(running.health()["collecting"], "at every token")
        self.assertEqual(running.content("uses the first"), "uses the first")
        self.assertTrue(eventually(lambda: running.health()["collecting"] == "never"))
        first, second = self.journal("engine")
        self.assertRegex(first, "^/.*/preload.js None$")
        self.assertEqual(second, "None 0")

    def test_a_program_that_cannot_be_run_is_said(self):
        self.fake.write_text("#!/no/such/interpreter\n")
        with self.assertRaisesRegex(proxy.StartError, "cannot be run"):
            self.start()

    def test_a_login_that_is_missing_is_said_and_noticed_when_it_comes(self):
        self.mode("fake.names = ['opencode/free']")
        running = self.start(spares=1)
        self.assert_error(running.chat(), 503, "provider_not_logged_in")
        self.assertIn("opencode auth login", running.health()["reason"])
        self.mode("")
        self.auth.write_text('{"github-copilot":{}}')
        self.assertEqual(running.content("now"), "now")

    def test_a_model_that_a_session_does_not_offer_is_refused(self):
        """Without it, opencode would take another one."""
        self.mode("if fake.is_acp: fake.names.remove('local/m')")
        running = self.start()
        self.assert_error(running.chat(model="local/m"), 404, "model_not_found")
        self.assertEqual(self.journal("post"), [])

    def test_early_requests_wait_for_the_proof(self):
        with unittest.mock.patch.object(proxy.Pool, "prove"):
            running = self.start(spares=1)
        early = self.background.submit(running.content, "well")
        self.assertEqual(running.health()["reason"], "starting")
        self.assertFalse(early.done())
        running.pool.prove()
        self.assertEqual(early.result(), "well")

    def test_an_opencode_that_stops_working_and_is_repaired_is_told_by_health(self):
        self.patch(proxy, TEND_SECONDS=0.1, MAX_RETRY_SECONDS=0.1)
        reason = "opencode does not start: opencode ended: no memory"
        for spares in (0, 1):
            with self.subTest(spares=spares):
                self.mode("")
                running = self.start(spares=spares)
                self.mode(FAILS)
                for pid in opencode_pids():
                    os.kill(pid, signal.SIGKILL)
                self.assertTrue(eventually(lambda: running.chat()[0] == 502))
                self.assertTrue(running.becomes(http=503, status="unhealthy", reason=reason))
                self.mode("")
                self.assertEqual(running.content("well"), "well")
                self.assertTrue(running.becomes(http=200, status="healthy"))
                running.close()

    def test_starts_that_fail_again_and_again_end_nothing(self):
        self.patch(proxy, TEND_SECONDS=0.01, MAX_RETRY_SECONDS=0.0, MAX_WAITED_RETRY_SECONDS=0.02)
        running = self.start(spares=1)
        full = OSError(28, "No space left on device")
        with unittest.mock.patch.object(tempfile, "mkdtemp", side_effect=full) as mkdtemp:
            os.kill(opencode_pids()[0], signal.SIGKILL)
            self.assertTrue(eventually(lambda: mkdtemp.call_count > 30))
            self.assert_error(running.chat(), 502, "opencode_failed", "No space left on device")
        self.assertEqual(running.content("well"), "well")

    def test_pauses_between_failed_starts_grow_up_to_their_limit(self):
        pauses = [proxy.retry_pause(failures, 2.0) for failures in (1, 2, 3, 7, 8, 1100)]
        self.assertEqual(pauses, [0.02, 0.04, 0.08, 1.28, 2.0, 2.0])

    def test_starts_that_stall_hold_nobody_up(self):
        running = self.start()
        disk = threading.Event()
        start = subprocess.Popen

        def stalled_start(*words, **more):
            disk.wait(DEADLINE)
            return start(*words, **more)

        with unittest.mock.patch.object(subprocess, "Popen", side_effect=stalled_start):
            answer = self.background.submit(running.content, "well")
            self.assertTrue(running.becomes(SOON, waiting=1))
            with running.send("x"):
                self.assertTrue(running.becomes(SOON, waiting=2))
            self.assertTrue(running.becomes(SOON, waiting=1))
            disk.set()
            self.assertEqual(answer.result(), "well")

    # -- back-off, and what the machine refuses

    def crowd(self, running, script):
        """Let one answer fill its process; others wait for a start then."""
        self.patch(proxy, MAX_TURNS_PER_PROCESS=1)
        answer = self.background.submit(running.content, script)
        self.assertTrue(self.noted("post"))
        return answer

    def test_health_tells_of_starts_that_fail_although_a_request_is_answered(self):
        self.patch(proxy, RETRY_SECONDS=600.0, MAX_RETRY_SECONDS=600.0)  # it fails once
        running = self.start(spares=1)
        self.mode(FAILS)
        answer = self.background.submit(running.content, "do say('a'); hold()")
        self.assertTrue(eventually(lambda: running.health()["last_error"]))
        self.let_go()
        self.assertEqual(answer.result(), "a")
        self.assertEqual(running.health()["last_error"], "opencode ended: no memory")

    def test_a_waiting_request_fails_after_a_few_failed_starts(self):
        running = self.start()
        answer = self.crowd(running, "do hold(); say('first')")
        before = len(self.journal("start"))
        self.mode(FAILS)
        self.assert_error(running.chat(), 502, "opencode_failed", "no memory")
        self.assertLessEqual(len(self.journal("start")), before + proxy.MAX_ATTEMPTS)
        self.let_go()
        self.assertEqual(answer.result(), "first")

    def test_a_failed_start_fails_nobody_who_waits_for_a_place(self):
        self.patch(proxy, MAX_TURNS_PER_PROCESS=1, MAX_WAITED_RETRY_SECONDS=0.02)
        running = self.start(spares=1, max_concurrency=1)
        self.mode(FAILS)
        answer = self.background.submit(running.content, "do say('first'); hold()")
        self.assertTrue(self.noted("post"))
        waiting = self.background.submit(running.content, "second")
        self.assertTrue(running.becomes(waiting=1))
        self.assertTrue(self.noted("start", count=3 + 2 * proxy.MAX_ATTEMPTS))
        self.assertEqual(running.health()["waiting"], 1)
        self.mode("")
        self.let_go()
        self.assertEqual((answer.result(), waiting.result()), ("first", "second"))

    def test_a_request_that_comes_during_a_long_pause_shortens_it(self):
        self.patch(proxy, TEND_SECONDS=600.0, RETRY_SECONDS=600.0, MAX_RETRY_SECONDS=600.0)
        self.patch(proxy, MAX_WAITED_RETRY_SECONDS=0.3)
        running = self.start(spares=1)
        self.mode(FAILS)
        os.kill(opencode_pids()[0], signal.SIGKILL)
        self.assertTrue(eventually(lambda: running.health()["last_error"]))
        self.mode("")
        self.assertEqual(running.content("well"), "well")

    def test_starts_that_fail_pause_although_requests_wait(self):
        pause = 0.3
        self.patch(proxy, RETRY_SECONDS=pause, MAX_WAITED_RETRY_SECONDS=pause)
        running = self.start()
        answer = self.crowd(running, "do hold(); say('first')")
        self.mode("if fake.is_acp: note('failed', time.monotonic()); sys.exit('no memory')")
        self.assertEqual(running.chat()[0], 502)
        self.let_go()
        answer.result()
        times = [float(text) for text in self.journal("failed")]
        self.assertGreater(len(times), 1)
        for earlier, later in zip(times, times[1:]):
            self.assertGreaterEqual(later - earlier, 0.9 * pause)  # it takes some time to start

    def without_threads(self):
        """Return a patch under which the program gets no threads, but connections do."""
        refused = RuntimeError("can't start new thread")
        names = {**vars(threading), "Thread": unittest.mock.Mock(side_effect=refused)}
        return unittest.mock.patch.object(proxy, "threading", types.SimpleNamespace(**names))

    def test_a_refused_thread_of_a_process_fails_the_request_and_is_no_end(self):
        running = self.start()
        answer = self.crowd(running, "do hold(); say('first')")
        with self.without_threads():
            self.assert_error(running.chat(), 502, "opencode_failed", "can't start new thread")
        self.let_go()
        self.assertEqual(answer.result(), "first")
        self.assertTrue(running.becomes(running=0, waiting=0))
        self.assertEqual(running.content("well"), "well")

    def test_a_refused_thread_of_a_choice_fails_the_request_and_is_no_end(self):
        running = self.start(spares=1, requests_per_process=100)
        with self.without_threads():
            status, answer = running.chat("x", n=2)
        self.assertIn(status, (500, 502, 503))
        self.assertIn("error", answer)
        self.assertTrue(running.becomes(running=0, waiting=0))
        self.assertEqual(running.content("well"), "well")

    def test_a_refused_limit_of_files_does_not_matter(self):
        for error in (ValueError("not allowed"), PermissionError(1, "not permitted")):
            with self.subTest(repr(error)):
                with unittest.mock.patch.object(resource, "setrlimit", side_effect=error):
                    running = self.start()
                self.assertEqual(running.content("well"), "well")


class DirectoryTest(FakeCase):
    """The private directory: who owns it, what is left of it, what is made again."""

    def leave_one(self):
        """Return the private directory that a killed proxy has left."""
        before = set(self.tmp.iterdir())
        script = "import os, opencode_proxy as p; o = p.Opencode('x'); os.kill(os.getpid(), 9)"
        variables = {**os.environ, "TMPDIR": str(self.tmp), "PYTHONPATH": str(HERE)}
        killed = subprocess.run([sys.executable, "-c", script], env=variables, check=False)
        self.assertEqual(killed.returncode, -signal.SIGKILL)
        (left,) = set(self.tmp.iterdir()) - before
        return left

    def homes(self):
        """Return the homes of processes."""
        return list(self.tmp.glob("*/process-*"))

    def start_without_processes(self):
        """Return a running proxy whose next request starts a process."""
        running = self.start()
        self.assertTrue(eventually(lambda: not self.homes()))
        return running

    def test_what_a_killed_proxy_left_is_removed(self):
        left = self.leave_one()
        self.start()
        self.assertFalse(left.exists())

    def test_what_a_killed_proxy_of_the_same_pid_left_is_removed(self):
        """In a container all of them are process 1."""
        left = self.leave_one()
        renamed = left.with_name(re.sub(r"-\d+-", f"-{os.getpid()}-", left.name))
        left.rename(renamed)
        self.start()
        self.assertFalse(renamed.exists())

    def test_what_a_living_proxy_owns_is_not_removed(self):
        """Whatever its pid means here: it may have another namespace."""
        first = self.start()
        (own,) = self.tmp.iterdir()
        with unittest.mock.patch.object(os, "kill", side_effect=ProcessLookupError):
            second = self.start()
        self.assertTrue(own.exists())
        self.assertEqual(first.content("well"), "well")
        self.assertEqual(second.content("well"), "well")

    def test_what_another_proxy_is_just_making_is_not_removed(self):
        new = self.tmp / (proxy.PrivateDirectory.PREFIX + "new")
        new.mkdir()
        self.start()
        self.assertTrue(new.exists())
        new.rmdir()

    def test_what_a_cleaner_of_temp_folders_removes_is_made_again(self):
        self.patch(proxy, TEND_SECONDS=0.1)
        for spares in (0, 1):
            with self.subTest(spares=spares):
                running = self.start(spares=spares)
                self.assertTrue(eventually(lambda: len(opencode_pids()) == spares))
                before = opencode_pids()
                for path in self.tmp.iterdir():
                    shutil.rmtree(path, ignore_errors=True)
                self.assertTrue(eventually(lambda: not set(before) & set(opencode_pids())))
                self.assertEqual(running.content("well"), "well")
                self.assertEqual(running.content("again"), "again")
                running.close()

    def test_a_fifo_of_such_a_name_holds_nobody_up(self):
        """Any user can make one in /tmp."""
        fifo = self.tmp / (proxy.PrivateDirectory.PREFIX + "fifo")
        os.mkfifo(fifo)
        started = self.background.submit(self.start)
        try:
            self.assertEqual(started.result(SOON).content("well"), "well")
        finally:
            os.close(os.open(fifo, os.O_RDWR))  # ends the wait of whoever opens it
            fifo.unlink()

    def test_a_folder_that_another_has_put_in_its_place_is_not_used(self):
        """What lies in there would run, with the user's rights."""
        running = self.start_without_processes()
        (own,) = self.tmp.iterdir()
        shutil.rmtree(own)
        own.mkdir()
        (own / "plugin.js").touch()
        self.assert_error(running.chat(), 502, "opencode_failed", "File exists")
        shutil.rmtree(own)
        self.assertEqual(running.content("well"), "well")

    def test_what_a_full_disk_cut_off_is_not_used(self):
        def write_half(path, text, encoding=None):
            path.write_bytes(text.encode()[: len(text) // 2])
            raise OSError(28, "No space left on device")

        running = self.start_without_processes()
        (own,) = self.tmp.iterdir()
        shutil.rmtree(own)
        with unittest.mock.patch.object(pathlib.Path, "write_text", write_half):
            self.assert_error(running.chat(), 502, "opencode_failed", "No space left on device")
        self.assertEqual(running.content("well"), "well")
        self.assertEqual((own / "plugin.js").read_text(), proxy.PLUGIN)
        self.assertEqual((own / "preload.js").read_text(), proxy.PRELOAD)

    def test_a_catalog_that_a_cleaner_removes_is_there_for_the_next_process(self):
        self.mode("if fake.is_acp: note('catalog', os.environ.get('OPENCODE_MODELS_PATH'))")
        running = self.start()
        (catalog,) = self.tmp.glob("*/models.json")
        catalog.unlink()
        self.assertEqual(running.content("well"), "well")
        self.assertTrue(catalog.exists())
        self.assertEqual(set(self.journal("catalog")), {str(catalog)})

    def test_a_home_that_could_not_be_made_is_removed(self):
        running = self.start_without_processes()
        full = OSError(28, "No space left on device")
        with unittest.mock.patch.object(pathlib.Path, "symlink_to", side_effect=full):
            self.assert_error(running.chat(), 502, "opencode_failed", "No space left on device")
        self.assertEqual(self.homes(), [])
        self.assertEqual(running.content("well"), "well")


class LoadTest(FakeCase):
    """Who is answered by which process, and when one starts or ends."""

    def test_a_process_serves_as_many_requests_as_it_may(self):
        for limit in (1, 3):
            with self.subTest(limit=limit):
                running = self.start(spares=1, requests_per_process=limit)
                pids = [self.only(running, spares=1)]
                for _ in range(2):
                    answers = {running.content(PID) for _ in range(limit)}
                    self.assertEqual(answers, {str(pids[-1])})
                    self.assertTrue(eventually(lambda: pids[-1] not in opencode_pids()))
                    pids.append(self.only(running, spares=1))
                self.assertEqual(self.journal("start")[-3:], [str(pid) for pid in pids])
                running.close()

    def test_requests_of_a_burst_share_a_process(self):
        """None starts while answers wait for their first token."""
        running = self.start(spares=1)
        used = self.only(running, spares=1)
        texts = [f"do hold(); say('{number}')" for number in range(16)]
        answers = self.background.submit(at_once, running.content, texts)
        self.assertTrue(self.noted("post", count=16))
        self.assertEqual(self.journal("start"), [str(used)])
        self.let_go()
        self.assertEqual(answers.result(), [str(number) for number in range(16)])
        self.assertTrue(eventually(lambda: used not in opencode_pids()))
        self.only(running, spares=1)
        self.assertEqual(len(self.journal("start")), 2)

    def test_a_process_starts_when_the_only_answer_has_begun(self):
        self.patch(proxy, TEND_SECONDS=600.0)  # at once, not at the next look
        running = self.start(spares=1)
        with running.send(PAUSE):
            self.assertTrue(running.becomes(running=1, spares=1))

    def test_no_process_starts_before_the_only_answer_has_begun(self):
        running = self.start(spares=1)
        self.only(running, spares=1)
        made = unittest.mock.patch.object(proxy, "OpencodeProcess", wraps=proxy.OpencodeProcess)
        with made as new_process:
            answer = self.background.submit(running.content, "do hold(); say('well')")
            self.assertTrue(self.noted("post"))
            new_process.assert_not_called()
            self.let_go()
            self.assertEqual(answer.result(), "well")
            self.assertTrue(eventually(lambda: new_process.called))

    def test_a_process_is_kept_warm_from_the_end_of_its_last_answer(self):
        clock = self.wind()
        running = self.start(requests_per_process=100, timeout=86400.0)
        script = "do hold(); say(str(os.getpid()))"
        answer = self.background.submit(running.content, script)
        self.assertTrue(self.noted("post"))
        clock.ahead += proxy.KEEP_WARM_SECONDS + 1
        self.let_go()
        pid = answer.result()
        self.assertTrue(running.becomes(running=0))
        self.assertEqual(running.content(PID), pid)

    def test_nothing_is_kept_of_sessions_that_are_over(self):
        running = self.start(spares=1, requests_per_process=100)
        for script in ("well", DIE):
            running.chat(script)
        with running.send(PAUSE):
            self.assertTrue(self.noted("post", PAUSE))
            self.assertEqual(len(running.pool.opencode.asks.turns), 1)
        self.assertTrue(running.becomes(SOON, running=0))
        self.assertEqual(running.pool.opencode.asks.turns, {})

    def test_the_queue_is_answered_in_order_and_has_an_end(self):
        running = self.start(max_concurrency=1, max_queue=2)
        answers = []
        for number in range(3):
            script = f"do hold(); say('{number}')"
            answers.append(self.background.submit(running.content, script))
            self.assertTrue(running.becomes(running=1, waiting=number))
        self.assert_error(running.chat(), 503, "queue_full")
        self.let_go()
        self.assertEqual([answer.result() for answer in answers], ["0", "1", "2"])
        self.assertEqual([post[-3] for post in self.journal("post")], ["0", "1", "2"])

    def test_waiting_clients_that_leave_free_their_places_and_their_prompts(self):
        running = self.start(max_concurrency=1, max_queue=24, timeout=600.0)
        with running.send(PAUSE):
            self.assertTrue(self.noted("post"))
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            clients = [running.send("x" * (5 << 20)) for _ in range(24)]
            self.assertTrue(running.becomes(waiting=24))
            self.assertGreater(tracemalloc.get_traced_memory()[0], 100 << 20)
            for client in clients:
                client.close()
            self.assertTrue(running.becomes(SOON, waiting=0))
            self.assertTrue(eventually(lambda: tracemalloc.get_traced_memory()[0] < 10 << 20, SOON))
            tracemalloc.stop()
        self.assertEqual(running.content("well"), "well")

    def test_choices_share_a_process(self):
        running = self.start(max_concurrency=1, max_queue=0, spares=1, requests_per_process=100)
        _, answer = running.chat(PID, n=3)
        texts = {choice["message"]["content"] for choice in answer["choices"]}
        self.assertEqual(texts, {running.content(PID)})
        self.assertEqual(sorted(choice["index"] for choice in answer["choices"]), [0, 1, 2])

    def test_choices_stop_each_for_itself_and_the_process_goes_on(self):
        self.patch(proxy, CUT_SECONDS=0.2)
        running = self.start(spares=1, requests_per_process=100)
        pid = running.content(PID)
        for choice in running.chat(SLOWLY, n=2, stop=["5 6"])[1]["choices"]:
            self.assertEqual(choice["finish_reason"], "stop")
            self.assertEqual(choice["message"]["content"], "0 1 2 3 4 ")
        self.assertTrue(self.noted("cancelled", SLOWLY, 2))
        self.assertEqual(self.journal("cancelled", SLOWLY), [f"{pid} {SLOWLY}"] * 2)
        self.assertEqual(running.content(PID), pid)

    def test_a_choice_that_fails_fails_its_request(self):
        running = self.start(spares=1)
        self.assert_error(running.chat(DIE, n=3), 502, "opencode_failed")
        self.assertTrue(running.becomes(running=0, waiting=0))  # no choice tries another process
        self.assertEqual(running.content("well"), "well")

    # -- replacing

    def assert_replaced(self, running, old):
        """Check that a process ends, and another one answers."""
        self.assertTrue(eventually(lambda: old not in opencode_pids()))
        self.assertNotEqual(running.content(PID), str(old))

    def test_a_process_that_died_is_replaced(self):
        self.patch(proxy, TEND_SECONDS=0.1, MAX_RETRY_SECONDS=0.1)
        running = self.start(spares=1, requests_per_process=100)
        os.kill(self.only(running), signal.SIGKILL)
        self.assertTrue(self.noted("start", count=2))
        self.assertEqual(running.content("well"), "well")

    def test_a_process_that_grew_old_is_replaced(self):
        clock = self.wind()
        self.patch(proxy, TEND_SECONDS=0.1)
        running = self.start(spares=1, requests_per_process=100)
        old = self.only(running)
        clock.ahead += proxy.WORN_SECONDS + 1
        self.assert_replaced(running, old)

    def test_a_process_that_grew_while_it_served_is_replaced(self):
        self.patch(proxy, TEND_SECONDS=0.1)
        for growth in (proxy.WORN_GROWTH_BYTES, proxy.MAX_GROWTH_BYTES):
            with self.subTest(growth=growth):
                running = self.start(spares=1, requests_per_process=100)
                old = self.only(running)
                self.assertEqual(running.content(PID), str(old))
                size = growth + (1 << 30)
                with unittest.mock.patch.object(proxy.Child, "memory", return_value=size):
                    self.assert_replaced(running, old)
                running.close()

    def test_a_process_that_grew_too_much_serves_nothing_more_even_if_it_is_the_only_one(self):
        self.patch(proxy, TEND_SECONDS=0.05, MAX_RETRY_SECONDS=0.05)
        running = self.start(spares=1, requests_per_process=100)
        answer = self.background.submit(running.content, "do say('a'); hold(); say('b')")
        self.assertTrue(self.noted("post"))
        self.mode(FAILS)
        size = proxy.MAX_GROWTH_BYTES + (1 << 30)
        with unittest.mock.patch.object(proxy.Child, "memory", return_value=size):
            self.assertTrue(eventually(lambda: running.chat()[0] == 502, SOON))
        self.let_go()
        self.assertEqual(answer.result(), "ab")

    def test_a_fresh_process_of_any_size_is_kept(self):
        self.patch(proxy, TEND_SECONDS=0.02)
        with unittest.mock.patch.object(proxy.Child, "memory", return_value=4 << 30) as memory:
            running = self.start(spares=1)
            fresh = self.only(running)
            self.assertTrue(eventually(lambda: memory.call_count > 20))
            self.assertEqual(self.journal("start"), [str(fresh)])
            self.assertEqual(running.content(PID), str(fresh))

    def test_processes_that_nobody_needs_end_one_by_one(self):
        """Two fresh ones with one spare: one of them stays."""
        self.patch(proxy, MAX_TURNS_PER_PROCESS=1)
        running = self.start(spares=1)
        first = self.only(running)
        self.mode("while not os.path.exists(HERE + '/start'): time.sleep(0.02)")
        with running.send("do say('a'); hold()") as busy:
            self.assertTrue(self.noted("post"))
            with running.send("x"), running.send("y"):
                self.assertTrue(running.becomes(waiting=2))
                self.assertTrue(self.noted("start", count=3))
            self.assertTrue(running.becomes(waiting=0))
            self.let_go("start")
            others = {int(pid) for pid in self.journal("start")} - {first}
            self.assertTrue(eventually(lambda: len(others & set(opencode_pids())) == 1))
            self.let_go()
            lines_until(busy.makefile("rb"), b'"chat.completion"')
        self.assertIn(int(running.content(PID)), others)

    # -- processes that fail a turn

    def test_a_process_that_fails_a_turn_is_given_no_waiting_one(self):
        self.mode("fake.makes_sessions = False")
        running = self.start(spares=1, max_concurrency=1, requests_per_process=100)
        self.mode("")
        first = self.only(running)
        running.content("takes the session that was opened ahead")
        answers = []
        for text in ("first", "second"):
            answers.append(self.background.submit(running.content, text))
            self.assertTrue(running.becomes(running=1, waiting=len(answers) - 1))
        self.let_go("sessions")
        self.assertEqual([answer.result() for answer in answers], ["first", "second"])
        sessions = [note for note in self.journal("session") if note.startswith(f"{first} ")]
        self.assertEqual(len(sessions), 3)  # of its proof, ahead, and of the turn that it failed

    def test_a_request_whose_process_failed_is_the_next_to_get_another(self):
        self.mode("fake.before_request = 'hold(\"fail\"); os._exit(3)'")
        running = self.start(spares=1, max_concurrency=1)
        self.mode("")
        answers = []
        for text in ("first", "second"):
            answers.append(self.background.submit(running.content, text))
            self.assertTrue(running.becomes(running=1, waiting=len(answers) - 1))
        self.let_go("fail")
        self.assertEqual([answer.result() for answer in answers], ["first", "second"])
        posts = [post.partition(" ")[2] for post in self.journal("post")]
        self.assertEqual(posts, ["first", "second"])

    def test_a_process_that_hangs_after_the_hand_over_serves_nothing_more(self):
        self.patch(proxy, STOP_SECONDS=0.3)
        clock = self.wind()
        running = self.start(spares=1, requests_per_process=100, timeout=30.0)
        first = self.only(running)
        answer = self.background.submit(running.chat, "do hold('never')")
        self.assertTrue(self.noted("post"))
        os.kill(first, signal.SIGSTOP)
        self.assert_error(self.result_later(clock, 31, answer), 504, "timeout")
        self.assertEqual(running.content("well"), "well")
        self.assertTrue(eventually(lambda: first not in opencode_pids(), SOON))

    def test_a_process_whose_stdout_has_ended_is_given_no_turn(self):
        self.mode("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
        running = self.start(spares=1, requests_per_process=100)
        self.mode("")
        first = self.only(running)
        self.assertEqual(running.content("first"), "first")
        self.patch(proxy, STOP_SECONDS=600.0, START_SECONDS=600.0)  # it is there for long
        self.stack.callback(os.kill, first, signal.SIGKILL)
        (session,) = self.journal("session", str(first))[1:]
        self.background.submit(running.chat, "do os.close(1); rest(600)")
        self.assertTrue(self.noted("post", "os.close"))
        self.assertEqual(running.content("second"), "second")
        self.assertIn(first, opencode_pids())

    def test_a_turn_that_leaves_while_it_is_given_a_process_leaves_that_too(self):
        """Locks are slow here, so that the one often happens in the middle of the other."""
        names = {**vars(threading), "Lock": SlowLock}
        self.patch(proxy, threading=types.SimpleNamespace(**names), LOOK_SECONDS=0.01)
        running = self.start(spares=1, max_concurrency=1, timeout=600.0)
        for number in range(12):
            script = f"do say('a'); hold('{number}')"
            with running.send(script):
                self.assertTrue(self.noted("post", script))
                with running.send("x"):
                    self.assertTrue(running.becomes(waiting=1))
                    self.let_go(str(number))
            self.assertTrue(running.becomes(running=0, waiting=0))
        self.only(running)


class WatchTest(FakeCase):
    """The user's files and opencode's models are watched, and everything is renewed with them."""

    NEW = "one/model"
    # What opencode may print for its models, and no program foresees.
    ODD_LISTS = {
        "too deep": r"""print('a/b\n{"id":' + '[' * 200000)""",
        "no capabilities": r"""print('a/b\n{"id": "b", "providerID": "a", "capabilities": 5}')""",
        "cut off": r"""print('a/b\n{"id": ')""",
    }

    def setUp(self):
        super().setUp()
        self.patch(proxy, TEND_SECONDS=0.05, MAX_RETRY_SECONDS=0.1)

    def log_in(self, *providers):
        """Change the user's logins."""
        new = self.auth.with_suffix(".new")
        new.write_text(json.dumps({provider: {} for provider in providers}))
        os.replace(new, self.auth)

    def assert_serves(self, running, model):
        """Check that a model comes to be there."""
        self.assertTrue(eventually(lambda: running.chat(model=model)[0] == 200))

    def test_changed_files_renew_all_processes_and_end_no_answer(self):
        running = self.start(spares=1, requests_per_process=100)
        config = self.folder / ".config/opencode/opencode.json"
        config.parent.mkdir(parents=True)
        changes = {
            self.auth: '{"local":{"type":"api","key":"k"}}',
            config: '{"provider":{"local":{}}}',
        }
        for path, text in changes.items():
            with self.subTest(path.name):
                old = self.only(running)
                with running.send(PAUSE):
                    self.assertTrue(running.becomes(running=1))
                    path.write_text(text)
                    self.assertNotEqual(running.content(PID), str(old))
                    self.assertIn(old, opencode_pids())  # it finishes what it has begun
                self.assertTrue(eventually(lambda: old not in opencode_pids()))

    def test_tokens_that_opencode_renews_are_no_other_login(self):
        def signature(**fields):
            self.auth.write_text(json.dumps({"github-copilot": {**OAUTH, **fields}}))
            return running.pool.opencode.signature()

        running = self.start()
        first = signature()
        self.assertEqual(signature(access="a", refresh="r", expires=1), first)
        self.assertNotEqual(signature(enterpriseUrl="x.example"), first)

    def test_a_catalog_that_could_not_be_read_is_read_again(self):
        running = self.start()
        self.mode("if not fake.is_acp: note('failed', 1); sys.exit('no memory')")
        self.log_in("one")
        self.assertTrue(self.noted("failed"))
        self.assertEqual(running.content("well"), "well")
        self.mode(f"fake.names.append('{self.NEW}')")
        self.assert_serves(running, self.NEW)

    def test_whatever_goes_wrong_in_a_renewal_requests_are_answered(self):
        running = self.start(spares=1)
        for name, script in self.ODD_LISTS.items():
            with self.subTest(name):
                self.mode(f"if not fake.is_acp: note('odd', 1); {script}; sys.exit()")
                self.log_in(name)
                self.assertTrue(self.noted("odd"))
                self.assertEqual(running.content("well"), "well")

    # Answers with a call, and with what was thought before it.
    CALL = """do
function = {"name": "f", "arguments": "{}"}
data(chunk({"reasoning_opaque": "a secret"}))
hold()
data(chunk({"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": function}]}))
"""

    def sent_after(self, answer):
        """Return the body of a request that goes on after an answer with a call."""
        said = answer["choices"][0]["message"]
        kept = {name: said[name] for name in ("role", "tool_calls")}
        result = {"role": "tool", "tool_call_id": "c", "content": "result"}
        self.running.chat(messages=[{"role": "user", "content": "q"}, kept, result])
        return self.journal("sent")[-1]

    def test_what_was_thought_for_one_login_is_not_sent_with_the_next(self):
        self.running = self.start(spares=1, requests_per_process=100)
        self.let_go()
        _, answer = self.running.chat(self.CALL)
        self.assertIn("a secret", self.sent_after(answer))
        self.log_in("one")
        self.assertNotIn("a secret", self.sent_after(answer))

    def test_what_is_thought_while_the_user_logs_in_anew_is_not_sent_with_the_next_login(self):
        self.running = self.start(spares=1, requests_per_process=100)
        chat = self.background.submit(self.running.chat, self.CALL)
        self.assertTrue(self.noted("post"))
        self.log_in("one")
        self.assertEqual(self.running.content("well"), "well")
        self.let_go()
        _, answer = chat.result()
        self.assertNotIn("a secret", self.sent_after(answer))

    def test_a_login_while_the_catalog_is_read_is_noticed(self):
        self.mode(LISTS_LATE)
        starting = self.background.submit(self.start, spares=1)
        self.assertTrue(self.noted("listing"))
        self.log_in("one")
        self.mode(f"fake.names.append('{self.NEW}')")
        self.let_go("list")
        self.assert_serves(starting.result(), self.NEW)

    def test_models_that_are_cut_off_are_read_once_more(self):
        cut_off_first = r"""
if not fake.is_acp and not os.path.exists(HERE + "/cut"):
    open(HERE + "/cut", "w").close()
    sys.exit(print('a/b\n{"id": '))
"""
        self.mode(cut_off_first)
        self.assertEqual(self.start().content("well"), "well")
        self.assertTrue((self.folder / "cut").exists())

    # -- the trimmed catalog

    def trimmed(self):
        """Tell of each process, in the order of their starts, whether its catalog is trimmed."""
        return [note == "True" for note in self.journal("trimmed")]

    def mode_of_models(self, script):
        """Let fakes note whether their catalog is trimmed, and then have other models."""
        note = "if fake.is_acp: note('trimmed', 'OPENCODE_MODELS_PATH' in os.environ)"
        self.mode(f"{note}\n{script}")

    def test_a_model_that_the_trimmed_catalog_loses_is_offered_untrimmed(self):
        lose = (
            "if fake.is_acp and 'OPENCODE_MODELS_PATH' in os.environ: fake.names.remove('local/m')"
        )
        self.mode_of_models(lose)
        running = self.start()
        self.assertEqual(running.content("x", model="local/m"), "x")
        self.assertFalse(self.trimmed()[-1])

    def test_a_model_that_vanished_leaves_the_catalog_trimmed(self):
        self.mode_of_models("")
        running = self.start(spares=1)
        self.mode_of_models("fake.names.remove('local/m')")
        self.assertEqual(running.content("used"), "used")  # the next process has one model less
        self.assertTrue(eventually(lambda: running.chat(model="local/m")[0] == 404))
        self.assertEqual(running.content("well"), "well")
        self.assertTrue(eventually(lambda: self.trimmed()[-1]))
        self.assertIsNone(running.health()["last_error"])

    def test_a_renewal_trims_again(self):
        lose = (
            "if fake.is_acp and 'OPENCODE_MODELS_PATH' in os.environ: fake.names.remove('local/m')"
        )
        self.mode_of_models(lose)
        running = self.start(spares=1)
        self.assertEqual(running.content("x", model="local/m"), "x")
        self.mode_of_models(f"fake.names.append('{self.NEW}')")
        self.log_in("one")
        self.assert_serves(running, self.NEW)
        self.assertTrue(running.becomes(spares=1))
        self.assertTrue(self.trimmed()[-1])

    def test_a_process_with_other_models_renews_the_catalog(self):
        """At a start before the network is there opencode has the list that it was built with."""
        self.mode("fake.names.remove('local/m')")
        running = self.start(spares=1)
        self.mode(f"fake.names.append('{self.NEW}')")
        self.assertEqual(running.content("used"), "used")
        self.assert_serves(running, self.NEW)
        self.assertIsNone(running.health()["last_error"])

    def test_models_that_only_processes_have_renew_the_catalog_once(self):
        self.mode(f"if fake.is_acp: fake.names.append('{self.NEW}')")
        running = self.start(spares=1)
        self.assertTrue(self.noted("models", count=2))
        used = self.only(running, spares=1)
        self.assertEqual(running.content("used"), "used")
        self.assertTrue(eventually(lambda: used not in opencode_pids()))
        self.only(running, spares=1)
        opencode = running.pool.opencode
        signature = unittest.mock.patch.object(opencode, "signature", wraps=opencode.signature)
        with signature as looks:  # once a look, three times a renewal
            self.assertTrue(eventually(lambda: looks.call_count > 5))
        self.assertEqual(len(self.journal("models")), 2)


class ForeignTest(FakeCase):
    """A wire format that only opencode knows: its own body goes, and it reads the answer."""

    ANSWER = """do
report("upstream", status=200, headers={})
report("delta", type="reasoning", text="hm")
report("delta", type="text", text="Hel")
report("delta", type="text", text="lo")
report("finish", finish="length", tokens={"input": 7, "output": 13, "reasoning": 7,
                                          "cache": {"read": 4, "write": 0}})
"""
    MESSAGE = {
        "role": "assistant",
        "content": "Hello",
        "refusal": None,
        "reasoning_content": "hm",
    }
    TOOL = {"type": "function", "function": {"name": "f"}}
    # Row: fields of a request that opencode cannot be told of, the one that is named.
    REFUSED = {
        "tools": ({"tools": [TOOL]}, "tools"),
        "a format": ({"response_format": {"type": "json_object"}}, "response_format"),
    }

    def test_an_answer_that_opencode_reads(self):
        running = self.start()
        _, answer = running.chat(self.ANSWER, model="other/m", max_tokens=50)
        choice = {"index": 0, "logprobs": None, "finish_reason": "length", "message": self.MESSAGE}
        self.assertEqual(answer["choices"], [choice])
        self.assertEqual(answer["usage"]["completion_tokens_details"]["reasoning_tokens"], 7)
        self.assertEqual(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 4)

    def test_opencode_is_told_the_conversation(self):
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": self.ANSWER}]
        self.start().chat(model="other/m", messages=messages)
        sent = json.loads(self.journal("sent")[-1].partition(" ")[2])
        self.assertEqual(sent["contents"][-1]["parts"], [{"type": "text", "text": self.ANSWER}])

    def test_only_the_first_request_finds_out_that_a_format_is_foreign(self):
        running = self.start(spares=1, requests_per_process=100)
        running.content("takes the session that was opened ahead")
        sessions = []
        for _ in range(2):
            before = len(self.journal("session"))
            running.content(self.ANSWER, model="other/m")
            sessions.append(len(self.journal("session")) - before)
        self.assertEqual(sessions, [2, 1])
        self.assertEqual(len(self.journal("post")), 3)

    def test_a_format_that_changed_with_the_catalog_is_found_out_anew(self):
        running = self.start(spares=1)
        running.content(self.ANSWER, model="other/m")
        self.assertEqual(running.chat(model="other/m", tools=[self.TOOL])[0], 400)
        self.mode("fake.paths.clear()")
        self.auth.write_text('{"other":{}}')

        def has_changed():
            return running.chat("well", model="other/m", tools=[self.TOOL])[0] == 200

        self.assertTrue(eventually(has_changed))

    def test_what_opencode_itself_has_sent_is_not_sent_twice(self):
        running = self.start(spares=1)
        reply = running.chat("do os._exit(3)", model="other/m")
        self.assert_error(reply, 502, "opencode_failed", "opencode ended")
        self.assertEqual(len(self.journal("post", "_exit")), 1)

    def test_a_refusal_that_opencode_gets_is_passed_on(self):
        body = json.dumps({"error": {"message": "slow down"}})
        script = f"do report('refused', status=429, headers={{}}, body={body!r})"
        status, answer = self.start().chat(script, model="other/m")
        self.assertEqual((status, answer["error"]["message"]), (429, "slow down"))

    def test_what_opencode_cannot_be_told_is_refused(self):
        running = self.start()
        for name, (fields, param) in self.REFUSED.items():
            with self.subTest(name):
                status, answer = running.chat(model="other/m", **fields)
                self.assertEqual((status, answer["error"]["param"]), (400, param))
        self.assertEqual(self.journal("post"), [])


class PassThroughTest(FakeCase):
    """Requests in a provider's own format go there, and the answers come back, byte for byte."""

    # Row: path, model, fields around the message.
    BODIES = {
        "responses": ("/v1/responses", RESPONSES, "input", {"reasoning": {"effort": "low"}}),
        "messages": ("/v1/messages", MESSAGES, "messages", {"max_tokens": 7, "temperature": 1.0}),
    }
    ENDS = (  # of what was sent when the connection drops, whether the client is told
        ("lines of Unix", "\n\n", True),
        ("lines of the Internet", "\r\n\r\n", True),
        ("half an event", "\n", False),
        ("half an event, lines of the Internet", "\r\n", False),
    )
    ANSWER = 'event: a\r\ndata: {"text": "w\u00f6r"}\r\n\r\n: odd\n\ndata: [DONE]\n\n'

    def ask(self, running, name, script, model=None, **headers):
        """Return the answer to a request in a format, and the body that was asked with."""
        path, own_model, messages, fields = self.BODIES[name]
        body = {
            "model": (model or own_model).partition("/")[2],
            messages: [{"role": "user", "content": script}],
            **fields,
            "stream": True,
        }
        return running.request("POST", path, body, headers), body

    def test_bodies_and_answers_are_not_touched(self):
        running = self.start(spares=1, requests_per_process=100)
        for name in self.BODIES:
            with self.subTest(name):
                (status, _, data), body = self.ask(running, name, f"do data({self.ANSWER!r})")
                self.assertEqual((status, data), (200, self.ANSWER.encode()))
                sent = json.loads(self.journal("sent")[-1].partition(" ")[2])
                self.assertIn(sent.pop("store", False), (False,))
                self.assertEqual(sent, body)

    def test_an_error_follows_whole_events_only(self):
        running = self.start(spares=1, requests_per_process=100)
        for name, end, is_told in self.ENDS:
            with self.subTest(name):
                script = f"do data({'data: 1' + end!r}); report('error', network='x', message='y')"
                try:
                    (status, _, data), _ = self.ask(running, "messages", script)
                except http.client.IncompleteRead as cut:
                    data = cut.partial
                self.assertEqual(b"event: error\n" in data, is_told, data)

    def test_headers_of_the_format_go_along_and_no_others(self):
        beta = "interleaved-thinking-2025-05-14"  # one that Copilot takes
        headers = {"anthropic-beta": beta, "X-Private": "p"}
        self.ask(self.start(), "messages", "do data('x')", **headers)
        sent = json.loads(self.journal("headers")[-1].partition(" ")[2])
        self.assertEqual(sent, {"anthropic-beta": beta})

    def test_refusals_are_passed_on_as_they_are(self):
        script = (
            "do report('refused', status=429, headers={'retry-after': '3'}, body='{\"odd\": 1}')"
        )
        running = self.start(spares=1, requests_per_process=100)
        for name in self.BODIES:
            with self.subTest(name):
                (status, headers, data), _ = self.ask(running, name, script)
                self.assertEqual((status, data), (429, b'{"odd": 1}'))
                self.assertEqual(headers["Retry-After"], "3")

    def test_a_refusal_does_not_make_health_forget_an_error(self):
        running = self.start(spares=1, requests_per_process=100)
        self.assertEqual(running.chat(DIE)[0], 502)
        refused = "do report('refused', status=429, headers={}, body='no')"
        for name in self.BODIES:
            with self.subTest(name):
                self.assertEqual(self.ask(running, name, refused)[0][0], 429)
                self.assertIsNotNone(running.health()["last_error"])
        self.assertEqual(self.ask(running, "messages", "do data('x')")[0][0], 200)
        self.assertIsNone(running.health()["last_error"])

    def test_a_model_of_another_format_is_refused(self):
        running = self.start(spares=1, requests_per_process=100)
        for name in self.BODIES:
            with self.subTest(name):
                (status, _, data), _ = self.ask(running, name, "x", model=CHAT)
                error = json.loads(data)["error"]
                self.assertEqual(status, 400)
                self.assertRegex(error["message"], "gpt-5-mini .*/chat/completions")
        self.assertEqual(self.journal("post"), [])

    def test_a_model_that_is_not_there_is_refused(self):
        running = self.start()
        for name in self.BODIES:
            with self.subTest(name):
                (status, _, data), _ = self.ask(running, name, "x", model="any/gpt-none")
                self.assertEqual(status, 404)
                self.assertEqual("type" in json.loads(data), name == "messages")

    def test_a_client_that_leaves_ends_its_session(self):
        running = self.start(timeout=600.0)
        body = json.dumps({"model": "gpt-5.4-mini", "stream": True, "input": PAUSE}).encode()
        head = f"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        with socket.create_connection(("127.0.0.1", running.port)) as client:
            client.sendall(head.encode() + b"\r\n\r\n" + body)
            self.assertTrue(self.noted("session", count=2))
        self.assertTrue(running.becomes(SOON, running=0))


class ProgramTest(FakeCase):
    """The program as a user runs it: its output, its end, its exit code."""

    def run_program(self, *arguments, start=(str(HERE / "opencode_proxy.py"),), before=()):
        """Return the program, started with the fake opencode on a free port of loopback."""
        options = ["--opencode", str(self.fake), "--host", "127.0.0.1", "--port", "0"]
        program = subprocess.Popen(
            [*before, sys.executable, *start, *options, *arguments],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            env={**os.environ, "TMPDIR": str(self.tmp)},
            preexec_fn=hear_signals,
        )
        self.stack.callback(program.stderr.close)
        self.stack.callback(program.wait)
        self.stack.callback(program.kill)
        return program

    def client_of(self, program):
        """Wait for the line that tells the base URL; return a client and the lines before."""
        lines = []
        for line in program.stderr:
            lines.append(line)
            found = re.search(r"base URL for apps: http://127\.0\.0\.1:(\d+)/v1$", line)
            if found:
                return Client(int(found[1])), lines
        raise AssertionError(f"the program ended: {lines}")

    def test_it_tells_what_runs_and_where(self):
        program = self.run_program()
        _, lines = self.client_of(program)
        start = f"starting {self.fake} ...\n"
        works = f"opencode_proxy {proxy.__version__} with opencode 1.18.33, model {CHAT}\n"
        stamp = len("2026-01-01 00:00:00 ")
        self.assertEqual([line[stamp:] for line in lines[:2]], [start, works])

    def test_the_names_it_offers_can_be_chosen_as_they_are(self):
        program = self.run_program("--model", "local/nope")
        *_, refusal = program.communicate(timeout=DEADLINE)[1].splitlines()
        self.assertIn("--model local/nope is not offered; these are, among others: ", refusal)
        for name in refusal.rpartition(": ")[2].split(", "):
            self.assertIn("/", name)

    def test_signals_end_it_with_code_0_and_nothing_is_left(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with self.subTest(number.name):
                program = self.run_program()
                client, _ = self.client_of(program)
                self.assertEqual(client.content("well"), "well")
                program.send_signal(number)
                self.assertEqual(program.wait(DEADLINE), 0)
                self.assertEqual(list(self.tmp.iterdir()), [])

    def test_a_running_answer_is_finished_before_the_end(self):
        program = self.run_program("--grace", "600")
        client, _ = self.client_of(program)
        answer = self.background.submit(client.content, "do hold(); say('well')")
        self.assertTrue(self.noted("post"))
        program.send_signal(signal.SIGTERM)
        self.assertTrue(eventually(lambda: not self.is_listening(client.port)))
        self.let_go()
        self.assertEqual(answer.result(), "well")
        self.assertEqual(program.wait(DEADLINE), 0)

    def test_a_second_signal_ends_running_answers(self):
        program = self.run_program("--grace", "600")
        client, _ = self.client_of(program)
        answer = self.background.submit(client.chat, PAUSE)
        self.assertTrue(self.noted("post"))
        program.send_signal(signal.SIGTERM)
        self.assertTrue(eventually(lambda: not self.is_listening(client.port)))
        program.send_signal(signal.SIGTERM)
        self.assert_error(answer.result(), 503, "shutting_down")
        self.assertEqual(program.wait(DEADLINE), 0)

    @staticmethod
    def is_listening(port):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    def test_a_current_folder_that_is_gone_is_said_where_a_file_in_it_is_named(self):
        gone = self.folder / "gone"
        gone.mkdir()
        os.environ["OPENCODE_CONFIG"] = "mine.json"
        leave = ("sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', str(gone))
        program = self.run_program(before=leave)
        *_, last = program.communicate(timeout=DEADLINE)[1].splitlines()
        self.assertIn("opencode_proxy: the files of opencode cannot be found: ", last)
        self.assertEqual(program.returncode, 1)

    def test_an_opencode_that_does_not_work_ends_it_with_code_1_and_its_words(self):
        self.mode(FAILS)
        program = self.run_program()
        self.assertEqual(program.wait(DEADLINE), 1)
        last = program.stderr.read().splitlines()[-1]
        self.assertEqual(last, "opencode_proxy: opencode ended: no memory")

    def test_a_failed_start_tells_waiting_clients_why_and_waits_for_none(self):
        self.mode(LISTS_LATE + "    sys.exit('no memory')")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        program = self.run_program("--grace", "600", "--port", str(port))
        self.assertTrue(self.noted("listing"))
        self.assertTrue(eventually(lambda: self.is_listening(port)))
        with Client(port).send("early") as waiting:
            self.assertTrue(Client(port).becomes(reason="starting"))
            self.let_go("list")
            data = b"".join(iter(lambda: waiting.recv(1 << 16), b""))
        self.assertIn(b"no memory", data)
        self.assertEqual(program.wait(DEADLINE), 1)

    def test_a_temp_folder_that_cannot_be_written_is_said(self):
        refused = PermissionError(13, "Permission denied")
        with unittest.mock.patch.object(tempfile, "mkdtemp", side_effect=refused):
            with unittest.mock.patch.object(proxy.LOG, "write") as write:
                self.assertEqual(proxy.main(["--opencode", str(self.fake), "--port", "0"]), 1)
        text = write.call_args.args[0]
        self.assertRegex(text, "^opencode_proxy: .*Permission denied")

    def test_a_port_that_is_taken_is_said(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            program = self.run_program("--port", str(taken.getsockname()[1]))
            self.assertEqual(program.wait(DEADLINE), 1)
        self.assertIn("Address already in use", program.stderr.read())

    def test_killed_it_leaves_no_opencode_behind(self):
        program = self.run_program()
        self.client_of(program)
        pids = opencode_pids(program.pid)
        self.assertTrue(pids)
        program.kill()
        program.wait()
        self.assertTrue(eventually(lambda: not any(map(self.is_alive, pids))))
        shutil.rmtree(self.tmp)

    @staticmethod
    def is_alive(pid):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return not pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].startswith(" Z")

    def isolation(self):
        """Return the command that runs a program as process 1 of a namespace."""
        isolate = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        if os.getuid() != 0:
            isolate += ["--user", "--map-root-user"]
        try:
            trial = subprocess.run([*isolate, "true"], stderr=subprocess.DEVNULL, check=False)
        except OSError:
            self.skipTest("there is no unshare")
        if trial.returncode != 0:
            self.skipTest("namespaces are not allowed here")
        return isolate

    def test_as_process_1_it_takes_leave_of_orphans(self):
        path = f"import sys; sys.path.insert(0, {str(HERE)!r})"
        program = f"{path}; import opencode_proxy as p; p.TEND_SECONDS = 0.1; p.main()"
        program = self.run_program(start=("-c", program), before=self.isolation())
        client, _ = self.client_of(program)
        script = """do
import subprocess
words = f"(sleep 0.1; echo orphan >>{HERE}/journal)&"
subprocess.run(["sh", "-c", words], start_new_session=True)
"""
        self.assertEqual(client.content(script), "")
        self.assertTrue(self.noted("orphan"))

        def zombies():
            return [row for row in children(program.pid) if row[1].startswith("Z")]

        self.assertTrue(eventually(lambda: not zombies(), SOON), zombies())
        self.assertEqual(client.content("well"), "well")


class LeftTurn(proxy.Asked):
    """A turn that leaves its session while the plugin reads the body."""

    def __init__(self, body):
        self.body = body

    def answer_turn(self):
        return {}

    def answer_request(self, session_id, question):
        return proxy.Reply({}, self.body)


class AsksTest(unittest.TestCase):
    """What plugins ask, over a socket of their own."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.asks = proxy.Asks(pathlib.Path(folder.name, "ask"))
        self.addCleanup(self.asks.close)

    def answer(self, data):
        """Return all that comes back for `data`."""
        with socket.socket(socket.AF_UNIX) as plugin:
            plugin.settimeout(DEADLINE)
            plugin.connect(str(self.asks.path))
            plugin.sendall(data)
            return b"".join(iter(lambda: plugin.recv(1 << 16), b""))

    def test_opencode_never_has_all_of_what_would_be_sent_for_a_turn_that_has_left(self):
        question = b'{"url": "u", "body": 1}'
        head_of_question = b"POST /request/ses_1 HTTP/1.1\r\nContent-Length: 23\r\n\r\n"
        for name, body, expected in (
            ("ours", b"body", (b"200", b"bod")),
            ("opencode's own", None, (b"410", b"")),
        ):
            with self.subTest(name):
                self.asks.turns["ses_1"] = LeftTurn(body)
                head, _, rest = self.answer(head_of_question + question).partition(b"\r\n\r\n")
                self.assertEqual((head.split()[1], rest), expected)

    def test_a_plugin_that_stops_in_the_middle_is_given_up(self):
        short = proxy.AskHandler.timeout / 300
        with unittest.mock.patch.object(proxy.AskHandler, "timeout", short):
            self.assertEqual(
                self.answer(b"POST /turn/s HTTP/1.1\r\nContent-Length: 9\r\n\r\n"), b""
            )


class ChildTest(unittest.TestCase):
    """A program with pipes, whatever it does with them."""

    def start(self, script, path="/bin/sh"):
        """Return a running shell script."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        home = pathlib.Path(folder.name)
        (home / "cwd").mkdir()
        opencode = types.SimpleNamespace(
            path=path,
            pids=set(),
            new_home=lambda: home,
            environment=lambda home, is_acp: dict(os.environ),
        )
        child = proxy.Child(opencode)
        child.spawn("-c", script)
        self.addCleanup(child.close)
        self.addCleanup(child.stop)
        return child

    def test_a_line_without_end_is_not_kept(self):
        with unittest.mock.patch.object(proxy, "MAX_LINE_BYTES", 1 << 16):
            child = self.start("head -c 4000000 /dev/zero")
            lines = [line for line in child.lines() if line is not None]
        self.assertLessEqual(max(len(line) for line in lines), 1 << 16)

    def test_a_program_that_closes_its_stderr_is_not_looked_at_all_the_time(self):
        child = self.start("exec 2>&-; sleep 1")
        looks = len(list(child.lines()))
        self.assertLess(looks, 50)

    def test_a_program_that_was_killed_is_told_as_such_although_its_pipes_end_first(self):
        child = self.start("exec >&- 2>&-; sleep 0.1; kill -9 $$")
        self.assertEqual(list(child.lines())[-1], b"")
        self.assertIn("opencode was killed", str(child.ended()))

    def test_a_program_that_does_not_read_is_an_error(self):
        child = self.start("sleep 600")
        with self.assertRaisesRegex(proxy.ProcessFailed, "opencode does not read its input"):
            for _ in range(100):
                child.write_line(b"x" * (1 << 16))

    def test_memory_is_that_of_a_program_and_of_what_it_started(self):
        large = "x = b'x' * (64 << 20); print('there', flush=True); import time; time.sleep(600)"
        child = self.start(f'"{sys.executable}" -c "{large}" & wait')
        self.assertIn(b"there", child.lines())
        self.assertGreater(child.memory(), 64 << 20)


class MachineTest(unittest.TestCase):
    """What the machine says of itself decides how processes run."""

    GIB = 1 << 30
    # Row: /proc/self/cgroup, the files that may hold a limit.
    GROUPS = {
        "version 2": (
            "0::/system.slice/proxy.service\n",
            [
                "/sys/fs/cgroup/system.slice/proxy.service/memory.max",
                "/sys/fs/cgroup/system.slice/memory.max",
                "/sys/fs/cgroup/memory.max",
            ],
        ),
        "version 1": (
            "7:cpu:/a\n6:memory:/docker/b\n",
            [
                "/sys/fs/cgroup/memory/docker/b/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory/docker/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            ],
        ),
        "version 1 with others": (
            "6:cpu,memory:/\n1:name=systemd:/\n",
            ["/sys/fs/cgroup/memory/memory.limit_in_bytes"],
        ),
        "a container": ("0::/\n", ["/sys/fs/cgroup/memory.max"]),
        "a path with a colon": (
            "0::/a:b\n",
            ["/sys/fs/cgroup/a:b/memory.max", "/sys/fs/cgroup/memory.max"],
        ),
        "none": ("", []),
    }
    # Row: the temp folder, where the private one is made.
    FOLDERS = {
        "short": ("/tmp", "/tmp"),
        "of a user on macOS": (
            "/var/folders/ab/" + 30 * "c" + "/T",
            "/var/folders/ab/" + 30 * "c" + "/T",
        ),
        "too long": ("/var/" + 90 * "x", "/tmp"),
        "too long in bytes": ("/var/" + 40 * "\u00f6", "/tmp"),
    }

    def test_limits_of_all_control_groups_above_are_looked_at(self):
        for name, (groups, files) in self.GROUPS.items():
            with self.subTest(name):
                self.assertEqual(proxy.cgroup_limit_files(groups), files)

    def test_garbage_is_collected_rarely_else_never_and_always_where_memory_is_short(self):
        preload = pathlib.Path("/x/preload.js")
        for name, arguments, expected in (
            ("rarely", (preload, False), (str(preload), None)),
            ("rarely on a small machine", (preload, True), (str(preload), None)),
            ("never", (None, False), (None, "0")),
            ("always on a small machine", (None, True), (None, None)),
        ):
            with self.subTest(name):
                variables = proxy.engine_variables(*arguments)
                names = ("BUN_INSPECT_PRELOAD", "BUN_JSC_useGC")
                self.assertEqual(tuple(variables.get(name) for name in names), expected)

    def test_the_path_of_a_socket_is_never_too_long(self):
        for name, (temporary, folder) in self.FOLDERS.items():
            with self.subTest(name):
                self.assertEqual(proxy.PrivateDirectory.base_folder(temporary), folder)

    def memory_by_ps(self, script):
        """Return what a process of group 7 is told to need by a `ps` that is a script."""
        with contextlib.ExitStack() as stack:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "ps").write_text("#!/bin/sh\n" + script)
            (folder / "ps").chmod(0o700)
            path = f"{folder}{os.pathsep}{os.environ['PATH']}"
            stack.enter_context(unittest.mock.patch.dict(os.environ, PATH=path))
            stack.enter_context(unittest.mock.patch.object(sys, "platform", "darwin"))
            child = proxy.Child(None)
            child.pid = 7
            return child.memory()

    def test_on_macos_ps_tells_the_memory_of_a_group(self):
        rows = "echo '  7  100'; echo '  8 1000'; echo '7 20'"
        self.assertEqual(self.memory_by_ps(rows), 120 * 1024)

    def test_a_ps_that_hangs_or_fails_tells_nothing(self):
        with unittest.mock.patch.object(proxy, "PS_SECONDS", 0.2):
            for script in ("exec sleep 600", "exit 1", "echo rubbish"):
                with self.subTest(script):
                    self.assertEqual(self.memory_by_ps(script), 0)


class OrphanTest(FakeCase):
    """As process 1 of a container, the proxy takes leave of what processes have left behind."""

    def test_orphans_are_taken_leave_of_and_own_processes_are_not(self):
        orphan = subprocess.Popen(["true"])
        own = subprocess.Popen(["false"])
        self.addCleanup(orphan.wait)
        here = os.getpid()

        def zombies():
            return {pid for pid, state, _ in children(here) if state.startswith("Z")}

        self.assertTrue(eventually(lambda: {orphan.pid, own.pid} <= zombies()))
        with unittest.mock.patch.object(os, "getpid", return_value=1):
            proxy.reap_orphans({own.pid})
            self.assertEqual(own.wait(), 1)  # where another has waited for it, Python says 0
            proxy.reap_orphans(set())
        self.assertNotIn(orphan.pid, zombies())


# --------------------------------------------------------------------------------------------- http
COMPLETIONS = "/v1/chat/completions"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
END = "Connection: close"
NATIVE = json.dumps({"model": "b/m", "messages": [], "input": "hi"}).encode()
LENGTH = f"Content-Length: {len(chat_body())}"


def post(body, *headers, path=COMPLETIONS, version="1.1", host="Host: localhost"):
    """Return a POST as it is sent."""
    lines = "".join(header + "\r\n" for header in (host, *headers) if header)
    return f"POST {path} HTTP/{version}\r\n{lines}\r\n".encode() + body


def post_chat(*headers, version="1.1", **fields):
    """Return a chat request as it is sent."""
    body = chat_body(**fields)
    return post(body, f"Content-Length: {len(body)}", *headers, version=version)


def in_chunks(body, size):
    """Return a body in HTTP chunks of `size` bytes, without the last one."""
    pieces = []
    for start in range(0, len(body), size):
        piece = body[start : start + size]
        pieces.append(b"%x ;ext=1\r\n%b\r\n" % (len(piece), piece))
    return b"".join(pieces)


def headers_of(*lines):
    """Return the headers in lines."""
    return http.client.parse_headers(io.BytesIO("\r\n".join((*lines, "", "")).encode()))


class StubPool:
    """Answers what `respond(request, look)` yields, as a pool does."""

    content = (0, proxy.Event({"content": "yes"}))
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    finish = (0, proxy.Event({}, finish_reason="stop", usage=usage))

    def __init__(self, *names):
        models = {name: proxy.Model(name) for name in names}
        self.catalog = proxy.Catalog(models, names[0], frozenset("ab"))
        self.closing = threading.Event()
        self.respond = lambda request, look: iter([self.content, self.finish])
        self.running = 0
        self.errors = []
        self.reason = None
        self.failure = None  # raised where opencode is to be proven

    def prove(self):
        if self.failure is not None:
            raise self.failure

    def ready(self, look):
        return self.catalog

    def run(self, request, model, look, exchange=None):
        self.running += 1
        try:
            yield from self.respond(request, look)
        finally:
            self.running -= 1

    def wait(self, look, event=None):
        """Yield the end of the answer once `event` is set, never without one."""
        while event is None or not event.wait(0.02):
            look()
            time.sleep(0.01)
        yield self.finish

    def note_error(self, text):
        self.errors.append(text)

    def note_success(self):
        self.errors.clear()

    def health(self):
        return {
            "status": "unhealthy" if self.reason else "healthy",
            "reason": self.reason,
            "opencode": "1.18.33",
            "model": self.catalog.default,
            "last_error": None,
        }

    def close(self):
        self.closing.set()


class HTTPCase(unittest.TestCase):
    """Servers on a stub pool; what the test asks goes to the one started last."""

    def setUp(self):
        self.logged = []
        patch = unittest.mock.patch.object(proxy, "log", self.logged.append)
        patch.start()
        self.addCleanup(patch.stop)

    def patch(self, **values):
        """Give attributes of the program other values until the test ends."""
        patch = unittest.mock.patch.multiple(proxy, **values)
        patch.start()
        self.addCleanup(patch.stop)

    def start(self, **changes):
        self.pool = StubPool("a/first", "a/second", "b/m")
        self.server = proxy.ProxyServer(settings(**changes), self.pool)
        self.client = Client(self.server.server_port)
        thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(self.server.stop, 0.0, time.sleep)

    def connect(self, data=b""):
        """Return a connection on which `data` was sent."""
        connection = socket.create_connection(("127.0.0.1", self.server.server_port), DEADLINE)
        self.addCleanup(connection.close)
        connection.sendall(data)
        return connection

    def rest(self, connection):
        """Return what comes until the server closes the connection."""
        data = b""
        while True:
            piece = connection.recv(1 << 16)
            if not piece:
                return data
            data += piece

    def answer(self, data):
        """Return the status and body of the last answer to `data`, and how many came."""
        with contextlib.closing(self.connect(data)) as connection:
            got = self.rest(connection)
        last = got[got.rindex(b"HTTP/1.1 ") :]
        head, _, body = last.partition(b"\r\n\r\n")
        return int(head.split()[1]), body, got.count(b"HTTP/1.1 ")

    def request(self, method, path, body=None, headers=()):
        """Return status, headers and JSON of one request on a connection of its own."""
        status, headers, data = self.client.request(method, path, body, headers)
        if headers["Content-Type"] == "application/json" and data:
            data = json.loads(data)
        return status, headers, data

    def error(self, *request):
        """Return status, code and message of a refusal."""
        status, _, body = self.request(*request)
        return status, body["error"]["code"], body["error"]["message"]

    def assert_logged(self, pattern):
        def is_logged():
            return any(re.search(pattern, line) for line in self.logged)

        self.assertTrue(eventually(is_logged), (pattern, self.logged))


class HeadTest(unittest.TestCase):
    """The pure functions that judge a head."""

    LENGTHS = (  # name, bytes of the body (None: in chunks), headers
        ("no body", 0, ()),
        ("a length", 5, ("Content-Length: 5",)),
        ("the same twice", 5, ("Content-Length: 5", "Content-Length: 5")),
        ("the same twice in one", 5, ("Content-Length: 5, 5",)),
        ("chunks", None, ("Transfer-Encoding: Chunked",)),
    )
    UNCLEAR = (
        ("a sign", ("Content-Length: +5",)),
        ("an underscore", ("Content-Length: 1_0",)),
        ("nothing", ("Content-Length:",)),
        ("no ASCII digit", ("Content-Length: \u0665",)),
        ("two lengths", ("Content-Length: 5", "Content-Length: 6")),
        ("two lengths in one", ("Content-Length: 5,55",)),
        ("a number of 20 digits", ("Content-Length: 99999999999999999999",)),
        ("a length and chunks", ("Content-Length: 5", "Transfer-Encoding: chunked")),
        ("another coding", ("Transfer-Encoding: gzip",)),
        ("a further coding", ("Transfer-Encoding: gzip, chunked",)),
        ("chunks twice", ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked")),
        ("an empty coding beside a length", ("Transfer-Encoding:", "Content-Length: 5")),
        ("a second host", ("Host: y",)),
    )

    def test_length_of_a_body(self):
        for name, expected, lines in self.LENGTHS:
            with self.subTest(name):
                headers = headers_of("Host: x", *lines)
                self.assertEqual(proxy.body_length(headers, "HTTP/1.1"), expected)

    def test_lengths_that_are_not_clear(self):
        for name, lines in self.UNCLEAR:
            with self.subTest(name), self.assertRaises(proxy.APIError) as caught:
                proxy.body_length(headers_of("Host: x", *lines), "HTTP/1.1")
            self.assertEqual(caught.exception.status, 400, name)

    def test_an_old_client_needs_no_host_and_sends_no_chunks(self):
        self.assertEqual(proxy.body_length(headers_of(), "HTTP/1.0"), 0)
        with self.assertRaises(proxy.APIError):
            proxy.body_length(headers_of(), "HTTP/1.1")
        with self.assertRaises(proxy.APIError):
            proxy.body_length(headers_of("Transfer-Encoding: chunked"), "HTTP/1.0")

    ORIGINS = (  # name, origin, whether it may ask
        ("localhost", "http://localhost:3000", True),
        ("IPv4", "https://127.0.0.1", True),
        ("IPv6", "http://[::1]:80", True),
        ("an app", "app://x", True),
        ("Tauri", "tauri://localhost", True),
        ("VS Code's view", "vscode-webview://1d", True),
        ("VS Code's file", "vscode-file://vscode-app", True),
        ("a name below localhost", "http://app.localhost:8080", True),
        ("any address of this machine", "http://0.0.0.0:3000", True),
        ("Capacitor", "capacitor://localhost", True),
        ("a file", "file://", True),
        ("one that was allowed", "https://app.example", True),
        ("any other", "https://evil.example", False),
        ("a sandbox", "null", False),
        ("a name that ends so", "http://evillocalhost", False),
        ("a name that begins so", "https://localhost.evil.example", False),
        ("nothing", "", False),
        ("a letter more", "http://localhost:3000\xe9", False),
    )

    def test_origins(self):
        for name, origin, is_allowed in self.ORIGINS:
            with self.subTest(name):
                if is_allowed:
                    proxy.check_origin(origin, ["https://app.example"])
                    continue
                with self.assertRaises(proxy.APIError) as caught:
                    proxy.check_origin(origin, ["https://app.example"])
                self.assertEqual(caught.exception.code, "origin_not_allowed")

    def test_a_star_allows_all_that_have_a_name(self):
        proxy.check_origin("https://any.example", ["*"])
        with self.assertRaises(proxy.APIError) as caught:
            proxy.check_origin("null", ["*"])
        self.assertIn("--cors-origin null allows them", caught.exception.message)

    HOSTS = (
        ("localhost", "localhost", True),
        ("in capitals, with a dot and a port", "LocalHost.:80", True),
        ("below localhost", "x.localhost:1", True),
        ("IPv4", "1.2.3.4", True),
        ("IPv6", "[::1]:4141", True),
        ("an own name", "me:1", True),
        ("Docker's name", "host.docker.internal", True),
        ("a name that begins so", "localhost.evil.example:4141", False),
        ("a name that begins with an address", "1.2.3.4.x", False),
        ("any other", "evil.example", False),
    )

    def test_hosts(self):
        for name, host, is_own in self.HOSTS:
            with self.subTest(name):
                if is_own:
                    proxy.check_host(host, ["me"])
                    continue
                with self.assertRaises(proxy.APIError) as caught:
                    proxy.check_host(host, ["me"])
                self.assertEqual(caught.exception.code, "host_not_allowed")

    KEYS = (
        ("none", (), False),
        ("bearer", ("Authorization: bearer kee1",), True),
        ("Anthropic's", ("X-Api-Key: kee1",), True),
        ("with a space and a letter", ("X-Api-Key: se cond\u20ac",), True),
        ("no word behind it", ("Authorization: Bearer",), False),
        ("one of two", ("Authorization: Bearer x", "X-Api-Key: kee1"), True),
        ("empty", ("api-key:",), False),
        ("basic", ("Authorization: Basic kee1",), False),
        ("longer", ("api-key: kee12",), False),
    )

    def test_keys(self):
        for name, lines, is_known in self.KEYS:
            with self.subTest(name):
                headers = headers_of(*lines)
                self.assertEqual(proxy.has_key(headers, ["kee1", "se cond\u20ac"]), is_known)
        self.assertTrue(proxy.has_key(headers_of(), []))

    VALUES = (  # name, JSON, whether it is too much for ten values
        ("a few", b'{"a": [1, 2, {"b": "c"}]}', False),
        ("objects", b"[" + b"{}," * 10 + b"{}]", True),
        ("numbers", b"[" + b"1," * 10 + b"1]", True),
        ("texts", b"[" + b'"",' * 100 + b'""]', True),
        ("marks in a text", b'{"a": "' + b"[{:," * 100 + b'"}', False),
        ("quotes in a text", b'{"a": "' + rb"\",\"," * 100 + b'"}', False),
        ("a backslash at the end of a text", rb'["\\", ' + b"1," * 10 + b'"x"]', True),
        ("a text without an end", b'["' + b"," * 100, True),
    )

    def test_values_of_json_are_counted(self):
        with unittest.mock.patch.object(proxy, "MAX_JSON_VALUES", 10):
            for name, data, is_too_much in self.VALUES:
                with self.subTest(name):
                    if not is_too_much:
                        proxy.check_values(data)
                        continue
                    with self.assertRaises(proxy.APIError) as caught:
                        proxy.check_values(data)
                    self.assertEqual(caught.exception.status, 413)

    def test_values_are_counted_in_linear_time_and_little_memory(self):
        for name, data in (
            ("objects", b"{}," * (1 << 22)),
            ("texts", b'"",' * (1 << 22)),
            ("quotes", b'"' * (1 << 23) + b"," * (1 << 22)),
            ("backslashes", b"\\" * (1 << 23) + b"," * (1 << 22)),
        ):
            with self.subTest(name):
                tracemalloc.start()
                with self.assertRaises(proxy.APIError):
                    proxy.check_values(data)
                _, peak = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                self.assertLess(peak, 4 * len(data))

    MODELS = (  # name, model, what is listed of it
        ("the default provider's", proxy.Model("a/m"), {"id": "m", "owned_by": "a"}),
        ("another's", proxy.Model("b/m"), {"id": "b/m", "owned_by": "b"}),
        ("a name with a slash", proxy.Model("a/x/m"), {"id": "a/x/m", "owned_by": "a"}),
        (
            "one that is known well",
            proxy.Model("a/m", output_limit=7, title="M 1", context_length=9),
            {
                "id": "m",
                "owned_by": "a",
                "name": "M 1",
                "context_length": 9,
                "max_output_tokens": 7,
            },
        ),
    )

    def test_models_as_they_are_listed(self):
        catalog = proxy.Catalog({}, "a/first")
        for name, model, expected in self.MODELS:
            with self.subTest(name):
                listed = {"object": "model", "created": 5, **expected}
                self.assertEqual(proxy.model_object(model, catalog, 5), listed)

    def test_tokens_are_estimated_by_characters(self):
        image = {"type": "base64", "media_type": "image/png", "data": "A" * 4000}
        content = [{"type": "text", "text": "x" * 400}, {"type": "image", "source": image}]
        body = {"messages": [{"role": "user", "content": content}], "system": "y" * 400}
        self.assertTrue(200 <= proxy.estimate_tokens(body) <= 220)

    ROUTES = (
        ("as it is", "/models", "/models"),
        ("below /v1", "/v1/models", "/models"),
        ("with a query", "/v1/models?key=k", "/models"),
        ("a proxy's", "http://localhost/v1/models", "/models"),
        ("too many slashes", "//v1//chat/completions/", "/chat/completions"),
        ("the root", "/", "/"),
        ("/v1 alone", "/v1", "/"),
        ("a name that begins so", "/v1x", "/v1x"),
    )

    def test_routes(self):
        for name, target, expected in self.ROUTES:
            with self.subTest(name):
                self.assertEqual(proxy.route_of(target), expected)


class HTTPTest(HTTPCase):
    # -- routes

    def test_health(self):
        self.start()
        expected = {**self.pool.health(), "version": proxy.__version__}
        for path in ("/health", "/v1", "/"):
            with self.subTest(path):
                status, _, body = self.request("GET", path)
                self.assertEqual((status, body), (200, expected))
        self.pool.reason = "ill"
        status, _, body = self.request("GET", "/health")
        self.assertEqual((status, body["reason"]), (503, "ill"))

    def listed(self, name, provider):
        created = self.server.created
        return {"id": name, "object": "model", "created": created, "owned_by": provider}

    def test_models(self):
        self.start()
        second = self.listed("second", "a")
        other = self.listed("b/m", "b")
        models = [self.listed("first", "a"), second, other]
        status, _, body = self.request("GET", "/v1/models")
        self.assertEqual((status, body), (200, {"object": "list", "data": models}))
        for path, expected in (
            ("/v1/models/b/m", other),
            ("/models/b%2Fm?x=1", other),
            ("http://localhost/v1/models/b/m", other),
            ("//v1//models/b/m/", other),
            ("/models/second", second),
            ("/models/a/second", second),
        ):
            with self.subTest(path):
                status, _, body = self.request("GET", path)
                self.assertEqual((status, body), (200, expected))
        self.assertEqual(self.error("GET", "/v1/models/none")[:2], (404, "model_not_found"))
        self.assertEqual(self.error("GET", "/v1/models/b/none")[:2], (404, "model_not_found"))

    def test_head(self):
        self.start()
        status, headers, body = self.request("HEAD", "/v1/models")
        self.assertEqual((status, body), (200, b""))
        self.assertGreater(int(headers["Content-Length"]), 100)

    def test_methods_that_a_path_does_not_have(self):
        self.start()
        for method, path, allowed, text in (
            ("GET", COMPLETIONS, "OPTIONS, POST", "/chat/completions wants POST, not GET"),
            ("DELETE", "/v1/models", "GET, HEAD, OPTIONS", "/models wants GET, not DELETE"),
        ):
            with self.subTest(path):
                status, headers, body = self.request(method, path)
                self.assertEqual((status, headers["Allow"]), (405, allowed))
                self.assertEqual(body["error"]["message"], text)

    def test_tokens_are_counted(self):
        self.start()
        body = {"model": "any", "messages": [{"role": "user", "content": "x" * 400}]}
        status, _, answer = self.request("POST", "/v1/messages/count_tokens", body)
        self.assertEqual((status, answer), (200, {"input_tokens": 102}))
        refusal = self.request("POST", "/v1/messages/count_tokens", b"x")[2]
        self.assertEqual(refusal["type"], "error")

    def test_paths_that_are_wrong_get_a_hint(self):
        self.start()
        use = "the base URL to use is " + self.server.base_url
        chat = "this serves chat only, at "
        for path, hint in (
            ("/v1/v1/models/x", use),
            ("/v1/v1", use),
            ("/v1x", chat),
            ("/v1/chat/completions/chat/completions", use),
            ("/v1/embeddings", chat),
            ("/v1/completions", chat),
        ):
            with self.subTest(path):
                status, code, message = self.error("POST", path + "?secret", b"{}")
                self.assertEqual((status, code), (404, "unknown_url"))
                self.assertTrue(message.startswith(f"There is nothing at {path}: {hint}"), message)

    # -- framing

    def test_one_request_after_another(self):
        """Bodies are neither left nor taken for requests."""
        self.start()
        unwanted = HEALTH.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\nGET /")
        bad = post(b"{}", "Content-Length: 2")
        last = HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        status, _, count = self.answer(post_chat() + unwanted + bad + post_chat(stream=True) + last)
        self.assertEqual((status, count), (200, 5))

    def test_the_body_of_a_refused_request_is_no_request(self):
        self.start()
        inner = HEALTH
        length = f"Content-Length: {len(inner)}"
        for name, refused in (
            ("no such path", post(inner, length, path="/x")),
            ("a strange page", post(inner, length, "Origin: https://x")),
        ):
            with self.subTest(name):
                self.assertEqual(self.answer(refused + HEALTH)[2], 1)

    HEADS = (  # name, status, headers
        ("a length", 200, (LENGTH,)),
        ("the same twice", 200, (LENGTH, LENGTH)),
        ("any type", 200, (LENGTH, "Content-Type: message/rfc822")),
        ("too large", 413, ("Content-Length: 99999999999",)),
        ("a form", 415, (LENGTH, "Content-Type: multipart/form-data; boundary=x")),
        ("a sign", 400, ("Content-Length: +5",)),
        ("a space before the colon", 400, ("Content-Length : 5",)),
        ("mbox", 400, ("From x", LENGTH)),
        ("no colon", 400, (LENGTH, "no colon")),
        ("CR alone", 400, (LENGTH, "X: a\rContent-Length: 3")),
        ("NUL", 400, (LENGTH, "X: a\0b")),
        ("folded", 400, (LENGTH, " folded: 1")),
        ("CR twice", 400, (LENGTH, "X: a\r")),
        ("a long line", 431, (LENGTH, "X: " + "y" * 70000)),
        ("many lines", 431, (LENGTH, *["X: y"] * 120)),
        ("many long lines", 431, (LENGTH, *["X: " + "y" * 4000] * 20)),
    )

    def test_heads(self):
        self.start(max_body_size=5000)
        for name, expected, headers in self.HEADS:
            with self.subTest(name):
                status, body, count = self.answer(post(chat_body(), *headers, END))
                self.assertEqual((status, count), (expected, 1), body)
                key = "choices" if expected == 200 else "error"
                self.assertIn(key, json.loads(body))

    REQUEST_LINES = (
        ("LF alone", 200, post_chat(END).replace(b"\r\n", b"\n")),
        ("no host", 400, post(chat_body(), LENGTH, host="")),
        ("a method alone", 400, b"GET\r\n\r\n"),
        ("an unknown method", 501, HEALTH.replace(b"GET", b"BREW")),
        ("HTTP/2", 505, b"GET /health HTTP/2.0\r\n\r\n"),
        ("TLS", 400, b"\x16\x03\0\r\n\r\n"),
        ("a long line", 414, b"GET / " + b"x" * 70000),
        ("CR alone", 400, b"GET /\rX HTTP/1.1\r\n\r\n"),
        ("empty lines before", 200, b"\r\n\n\r\n" + post_chat(END)),
        ("empty lines without end", 414, b"\r\n" * 40000),
    )

    def test_request_lines(self):
        self.start()
        for name, expected, data in self.REQUEST_LINES:
            with self.subTest(name):
                status, body, _ = self.answer(data)
                self.assertEqual(status, expected)
                self.assertIn("choices" if expected == 200 else "error", json.loads(body))

    CHUNKS = (  # name, status, answers, what is sent
        ("good", 200, 2, in_chunks(chat_body(), 7) + b"0\r\nTrailer: 1\r\n\r\n"),
        ("no size", 400, 1, b"x\r\n"),
        ("a sign", 400, 1, b"-1\r\n\r\n"),
        ("longer than its size", 400, 1, b"2\r\nabc\r\n0\r\n\r\n"),
        ("LF behind the size", 400, 1, b"2\n{}\r\n0\r\n\r\n"),
        ("LF behind the chunk", 400, 1, b"2\r\n{}\n0\r\n\r\n"),
        ("LF at the end", 400, 1, b"0\r\n\n"),
        ("CR in an extension", 400, 1, b"2;a\rb\r\n{}\r\n0\r\n\r\n"),
        ("a long extension", 431, 1, b"2;" + b"x" * 70000 + b"\r\n{}\r\n0\r\n\r\n"),
        ("a trailer without a colon", 400, 1, b"0\r\nX y\r\n\r\n"),
        ("a long size", 400, 1, b"f" * 18 + b"\r\n"),
        ("one byte each", 200, 2, in_chunks(chat_body(), 1) + b"0\r\n\r\n"),
        ("many trailers", 431, 1, b"0\r\n" + b"X: y\r\n" * 20000),
        ("too large", 413, 1, b"1389\r\n"),
    )

    def test_chunks(self):
        self.start(max_body_size=5000)
        for name, expected, answers, chunked in self.CHUNKS:
            with self.subTest(name):
                data = post(chunked, "Transfer-Encoding: Chunked") + post_chat(END)
                status, _, count = self.answer(data)
                self.assertEqual((status, count), (expected, answers))

    def test_an_old_client_is_not_told_to_go_on(self):
        self.start()
        got = self.rest(self.connect(post_chat("Expect: 100-continue", version="1.0")))
        self.assertTrue(got.startswith(b"HTTP/1.1 200"), got[:40])

    RAW = zlib.compressobj(wbits=-15)
    GZIP = gzip.compress(chat_body())
    ENCODED = (  # name, status, coding, body
        ("gzip", 200, "gzip", GZIP),
        ("in capitals", 200, "GZIP", GZIP),
        ("deflate", 200, "deflate", zlib.compress(chat_body())),
        ("deflate without its head", 200, "deflate", RAW.compress(chat_body()) + RAW.flush()),
        ("nothing", 200, "identity", chat_body()),
        ("too large when decoded", 413, "gzip", gzip.compress(b" " * 20_000_000)),
        ("broken off", 400, "gzip", GZIP[:-9]),
        ("something behind it", 400, "gzip", GZIP + b"x"),
        ("no gzip", 400, "gzip", chat_body()),
        ("no deflate", 400, "deflate", b"\xff\xff"),
        ("empty", 400, "gzip", b""),
        ("unknown", 415, "br", b"x"),
        ("two", 415, "gzip, gzip", GZIP),
    )

    def test_encoded_bodies(self):
        self.start(max_body_size=1_000_000)
        for name, expected, coding, data in self.ENCODED:
            with self.subTest(name):
                coded = {"Content-Encoding": coding}
                status, headers, body = self.request("POST", COMPLETIONS, data, coded)
                self.assertEqual(status, expected, body)
                if status == 415:
                    self.assertIn("may be gzip, deflate", body["error"]["message"])
                    self.assertIn("gzip, deflate", headers["Accept-Encoding"])

    @unittest.skipUnless(proxy.zstd, "this Python has no zstd")
    def test_zstd(self):
        self.start(max_body_size=1_000_000)
        good = proxy.zstd.compress(chat_body())
        for name, expected, data in (
            ("good", 200, good),
            ("too large when decoded", 413, proxy.zstd.compress(b" " * 20_000_000)),
            ("broken off", 400, good[:-3]),
            ("no zstd", 400, chat_body()),
            ("something behind it", 400, good + b"x"),
        ):
            with self.subTest(name):
                coded = {"Content-Encoding": "zstd"}
                self.assertEqual(self.request("POST", COMPLETIONS, data, coded)[0], expected)

    FUZZED = (
        post_chat("X-Request-Id: a", "Authorization: Bearer k", END),
        post_chat("Origin: http://localhost", stream=True),
        post(in_chunks(chat_body(), 9) + b"0\r\n\r\n", "Transfer-Encoding: chunked"),
        post_chat("Expect: 100-continue"),
        HEALTH,
        HEALTH.replace(b"GET /health", b"OPTIONS /v1/models"),
        HEALTH.replace(b"/health", b"http://localhost/v1/models/a/first?x=1"),
    )

    @staticmethod
    def damage(seeded, data):
        """Return bytes of which some are changed, lost, doubled or made up."""
        damaged = bytearray(data)
        for _ in range(seeded.randint(1, 4)):
            start = seeded.randrange(len(damaged))
            end = start + seeded.choice((0, 1, 1, 2, 20))
            piece = seeded.choice(
                (b"", b"\r\n", b"\n", b" ", b":", b"\0", b"\xff", b"0", b"chunked")
            )
            if seeded.random() < 0.3:
                piece = bytes(damaged[start:end]) * 2
            damaged[start:end] = piece or seeded.choice((b"", b"9"))
        return bytes(damaged)

    def assert_answers_are_whole(self, data):
        """Every answer in `data` has JSON, or events, or is an interim one."""
        stream = io.BytesIO(data)
        while stream.tell() < len(data):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                line = stream.readline()
                self.assertTrue(line, data)
                head += line
            self.assertRegex(head, rb"\AHTTP/1\.1 [1-5][0-9][0-9] ")
            length = re.search(rb"Content-Length: ([0-9]+)", head)
            if length:
                body = stream.read(int(length[1]))
                self.assertEqual(len(body), int(length[1]))
                if body:
                    json.loads(body)
            elif b"text/event-stream" in head:
                self.assertIn(b"[DONE]", stream.read())

    def test_fuzz(self):
        """Whatever comes, what is answered is JSON, or the connection is closed."""
        self.start()
        seeded = random.Random(16)
        for number in range(600):
            data = self.damage(seeded, seeded.choice(self.FUZZED))
            with self.subTest(number=number, data=data):
                connection = self.connect(data)
                connection.shutdown(socket.SHUT_WR)
                answers = b""
                with contextlib.suppress(ConnectionResetError):
                    answers = self.rest(connection)
                connection.close()
                if b"HEAD" not in data:
                    self.assert_answers_are_whole(answers)
        self.assertEqual(self.request("POST", COMPLETIONS, chat_body())[0], 200)
        self.assertNotIn("internal error", " ".join(self.logged))
        self.assertNotIn("connection failed", " ".join(self.logged))

    def test_an_answer_that_ends_while_the_server_stops_ends_its_connection(self):
        self.start()
        may_end = threading.Event()
        self.pool.respond = lambda request, look: self.pool.wait(look, may_end)
        connection = self.connect(post_chat())
        self.assertTrue(eventually(lambda: self.pool.running == 1))
        stop = threading.Thread(target=self.server.stop, args=(DEADLINE, time.sleep))
        stop.start()
        self.addCleanup(stop.join)
        self.addCleanup(may_end.set)
        self.assertTrue(eventually(lambda: self.server.stopping))
        may_end.set()
        head, _, body = self.rest(connection).partition(b"\r\n\r\n")
        self.assertIn(END.encode(), head)
        self.assertEqual(json.loads(body)["object"], "chat.completion")

    def test_a_refused_client_hears_the_end_although_its_body_never_comes(self):
        self.patch(DRAIN_SECONDS=600.0)
        self.start(api_key=["k"])
        connection = self.connect(post(b"{", "Content-Length: 1999"))
        self.assertIn(b'"code": "invalid_api_key"', self.rest(connection))
        connection.close()

    def test_a_refused_body_that_never_comes_is_no_request_any_more(self):
        """It would hold up the end of the server."""
        self.patch(DRAIN_SECONDS=600.0)
        self.start(max_body_size=10)
        connection = self.connect(post(b"{", "Content-Length: 1999"))
        self.assertIn(b'"code": "body_too_large"', self.rest(connection))
        self.assertEqual(self.server.requests, 0)

    # -- bounds

    def test_a_large_body_is_refused_so_that_the_client_reads_it(self):
        self.start(max_body_size=2000)
        page = {"Origin": "http://localhost:3000"}  # may read the refusal, as others can
        status, headers, body = self.request("POST", COMPLETIONS, b"x" * 5_000_000, page)
        self.assertEqual((status, body["error"]["code"]), (413, "body_too_large"))
        self.assertEqual(headers["Access-Control-Allow-Origin"], page["Origin"])

    def test_bodies_are_bounded_in_all(self):
        self.patch(MAX_BODIES_BYTES=3000)
        self.start(max_body_size=2000)
        self.pool.respond = lambda request, look: self.pool.wait(look)
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
        self.pool.respond = lambda request, look: iter([self.pool.finish])
        self.assertTrue(eventually(lambda: self.pool.running == 0))
        self.assertEqual(self.request("POST", COMPLETIONS, chat_body(**big))[0], 200)

    def test_images_that_are_fetched_are_bounded_as_the_bodies_are_that_hold_them(self):
        picture = {"type": "image_url", "image_url": {"url": "https://x.example/a.png"}}
        body = chat_body([picture, picture])
        self.patch(MAX_BODIES_BYTES=4000, wants_images_fetched=lambda model: True)
        for name, count, limit, expected in (
            ("each place counts", 700, 1400, (413, "body_too_large")),
            ("all that is held counts", 1900, 4000, (503, "too_busy")),
        ):
            with self.subTest(name):
                image = "data:image/png;base64," + "A" * count
                self.patch(fetch_images=lambda urls, look, image=image: dict.fromkeys(urls, image))
                self.start(max_body_size=limit)
                self.assertEqual(self.error("POST", COMPLETIONS, body)[:2], expected)

    def test_json_of_many_values_is_refused(self):
        self.patch(MAX_JSON_VALUES=1000)
        self.start()
        body = chat_body(user="," * 5000)
        self.assertEqual(self.request("POST", COMPLETIONS, body)[0], 200)
        body = chat_body(tools=[{}] * 1000)
        self.assertEqual(self.error("POST", COMPLETIONS, body)[:2], (413, "body_too_large"))

    def test_values_of_json_count_as_memory(self):
        self.patch(MAX_BODIES_BYTES=50_000)
        self.start(max_body_size=20_000)
        body = b"[" + b"1," * 2000 + b"1]"
        self.assertEqual(self.error("POST", COMPLETIONS, body)[:2], (503, "too_busy"))

    NEEDS_NO_BODY = (  # name, beginning of a request that needs no key, and has a body
        ("GET", b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1999\r\n\r\n"),
        ("HEAD", b"HEAD / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1999\r\n\r\n"),
        ("OPTIONS", b"OPTIONS /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 1999\r\n\r\n"),
    )

    def test_a_body_of_no_use_counts_nothing(self):
        self.patch(MAX_BODIES_BYTES=6000)  # less than these bodies, more than two that count
        self.start(max_body_size=2000, api_key=["k"])
        for name, head in self.NEEDS_NO_BODY:
            with self.subTest(name):
                for _ in range(3):
                    self.connect(head + b"x" * 1900)
        key = {"Authorization": "Bearer k"}
        for _ in range(20):
            status, _, _ = self.request("POST", COMPLETIONS, chat_body(user="x" * 1800), key)
            self.assertEqual(status, 200)

    def test_a_connection_with_a_body_of_no_use_makes_room(self):
        self.patch(MAX_CONNECTIONS=20)
        refused = post(b"", "Content-Length: 1999")
        for name, head in (*self.NEEDS_NO_BODY, ("a refused one", refused)):
            with self.subTest(name):
                self.start(api_key=["k"])
                for _ in range(20):
                    self.connect(head)
                for _ in range(20):  # each needs the place of another one
                    connection = self.connect(HEALTH)
                    self.assertEqual(connection.recv(12), b"HTTP/1.1 200")

    def test_accepting_pauses_where_no_file_may_be_opened(self):
        self.start()
        failure = OSError(errno.EMFILE, "too many open files")
        with unittest.mock.patch.object(socket.socket, "accept", side_effect=failure) as accept:
            client = socket.socket()
            self.addCleanup(client.close)
            client.connect(("127.0.0.1", self.server.server_port))
            self.assertTrue(eventually(lambda: accept.call_count > 2))
            count = accept.call_count
            time.sleep(0.5)
            self.assertLess(accept.call_count - count, 20)
        self.assertEqual(self.request("GET", "/health")[0], 200)

    def test_slow_requests_end(self):
        self.patch(IDLE_SECONDS=0.5, BODY_SECONDS=0.5)
        self.start()
        for name, data in (("nothing", b""), ("half a line", b"GET / HT")):
            with self.subTest(name):
                self.assertEqual(self.rest(self.connect(data)), b"")
        connection = self.connect(post(b"{", "Content-Length: 10"))
        self.assertIn(b"body_timeout", self.rest(connection))

    def test_a_drip_does_not_extend_the_deadline(self):
        self.patch(IDLE_SECONDS=0.5)
        self.start()
        connection = self.connect()

        def is_refused():
            try:
                connection.sendall(b"G")
            except OSError:
                return True
            return False

        self.assertTrue(eventually(is_refused))

    NEXT = (
        ("nothing", b""),
        ("an empty line", b"\r\n"),
        ("a request", HEALTH),
        ("half a request", post(b"x" * 30000, "Content-Length: 90000")),
        ("more than is kept", b"x" * 70000 if hasattr(select, "POLLRDHUP") else b""),
    )

    def test_clients_that_hang_up(self):
        """They are noticed also where bytes of a next request come before the end."""
        self.start()
        self.pool.respond = lambda request, look: self.pool.wait(look)
        for name, following in self.NEXT:
            for stream in (False, True):
                with self.subTest(name, stream=stream):
                    connection = self.connect(post_chat(stream=stream) + following)
                    self.assertTrue(eventually(lambda: self.pool.running == 1))
                    connection.close()
                    self.assertTrue(eventually(lambda: self.pool.running == 0, SOON))
        self.assert_logged(' 499 model=a/first error="the client hung up"')

    def test_clients_that_read_slowly_get_everything(self):
        self.start()
        piece = (0, proxy.Event({"content": "x" * (1 << 16)}))
        self.pool.respond = lambda request, look: iter([piece] * 200 + [self.pool.finish])
        self.patch(WRITE_SECONDS=1.0)
        connection = self.connect(post_chat(END))
        started = time.monotonic()
        size = 0
        while True:
            data = connection.recv(1 << 17)
            if not data:
                break
            size += len(data)
            time.sleep(0.02)
        self.assertGreater(size, 200 << 16)
        self.assertGreater(time.monotonic() - started, proxy.WRITE_SECONDS)

    def test_clients_that_read_nothing_are_left(self):
        self.start()
        piece = (0, proxy.Event({"content": "x" * (1 << 16)}))
        self.pool.respond = lambda request, look: iter([piece] * 200 + [self.pool.finish])
        self.patch(WRITE_SECONDS=1.0)
        self.connect(post_chat(stream=True))
        self.assert_logged(" 499 .*the client does not read")

    def test_idle_connections_make_room(self):
        self.patch(MAX_CONNECTIONS=20)
        self.start()
        idle = [self.connect(b"GET / HTTP/1.1\r\n" * (number % 2)) for number in range(60)]
        self.assertEqual(self.request("POST", COMPLETIONS, chat_body())[0], 200)
        for connection in idle[:20]:
            self.assertEqual(self.rest(connection), b"")

    def test_connections_that_ask_do_not_make_room(self):
        self.patch(MAX_CONNECTIONS=20)
        self.start()
        unfinished = post(b"{", "Content-Length: 10", "Expect: 100-continue", END)
        busy = [self.connect(unfinished) for _ in range(20)]
        for connection in busy:
            self.assertEqual(connection.recv(12), b"HTTP/1.1 100")
        with contextlib.suppress(ConnectionError):
            self.assertEqual(self.rest(self.connect(HEALTH)), b"")
        busy[0].sendall(b" " * 9)
        self.assertIn(b"HTTP/1.1 400", self.rest(busy[0]))
        self.assertTrue(eventually(self.is_healthy))

    def is_healthy(self):
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            return self.request("GET", "/health")[0] == 200
        return False

    def test_a_refused_thread_closes_its_connection_only(self):
        self.start()
        refused = RuntimeError("can't start new thread")
        with unittest.mock.patch.object(threading.Thread, "start", side_effect=refused):
            self.assertEqual(self.rest(self.connect()), b"")
        self.assert_logged("connection failed: RuntimeError")
        self.assertEqual(self.request("GET", "/health")[0], 200)

    def test_a_refused_limit_of_files_is_lived_with(self):
        with unittest.mock.patch.object(proxy.resource, "setrlimit", side_effect=ValueError):
            self.start()
        self.assertEqual(self.request("GET", "/health")[0], 200)

    # -- answers

    def test_a_stream(self):
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

    def test_a_stream_to_an_old_client_has_no_chunks(self):
        self.start()
        got = self.rest(self.connect(post_chat(version="1.0", stream=True)))
        self.assertRegex(got, rb"(?s)\r\n\r\ndata: .*}\n\ndata: \[DONE]\n\n$")

    SLOW_DOWN = {"message": "slow down", "type": "rate_limit_error", "param": None, "code": None}

    def test_a_silent_stream_is_kept_alive_until_it_fails(self):
        self.start()
        go_on = threading.Event()

        def respond(request, look):
            yield from self.pool.wait(look, go_on)
            raise proxy.APIError(429, "slow down", headers={"Retry-After": "7"})

        self.pool.respond = respond
        self.patch(PING_SECONDS=0.1)
        connection = self.connect(post_chat(END, stream=True))
        got = b""
        while got.count(proxy.SSE_PING) < 2:
            got += connection.recv(1 << 16)
        self.assertLess(got.index(b'"role":"assistant"'), got.index(proxy.SSE_PING))
        go_on.set()
        end = proxy.sse_data({"error": self.SLOW_DOWN}) + proxy.SSE_DONE + b"\r\n0\r\n\r\n"
        self.assertTrue(self.rest(connection).endswith(end))

    def test_a_stream_that_fails_at_once_is_a_refusal(self):
        self.start()

        def respond(request, look):
            raise proxy.APIError(429, "slow down", headers={"Retry-After": "7"})

        self.pool.respond = respond
        status, headers, body = self.request("POST", COMPLETIONS, chat_body(stream=True))
        self.assertEqual((status, headers["Retry-After"]), (429, "7"))
        self.assertEqual(body, {"error": self.SLOW_DOWN})

    def test_a_defect_is_an_internal_error(self):
        self.start()
        self.pool.respond = lambda request, look: iter([self.pool.content, 7])
        answer = self.error("POST", COMPLETIONS, chat_body())
        self.assertEqual(answer, (500, "internal_error", "internal error"))
        self.assertIn(b'"internal_error"', self.rest(self.connect(post_chat(END, stream=True))))
        self.assert_logged(' 500 .*error="internal error: TypeError')
        self.assertEqual(self.pool.errors, ["internal error"] * 2)

    def test_a_passed_answer_is_as_it_came(self):
        self.start()
        head = proxy.Piece("", 201, {"content-type": "text/x", "retry-after": "3"})
        pieces = (head, proxy.Piece("a\u2028"), proxy.Piece("b", finish_reason="stop"))
        self.pool.respond = lambda request, look: ((0, piece) for piece in pieces)
        for path in ("/v1/responses", "/v1/messages"):
            with self.subTest(path):
                status, headers, body = self.request("POST", path, NATIVE)
                self.assertEqual((status, body), (201, "a\u2028b".encode()))
                self.assertEqual((headers["Content-Type"], headers["Retry-After"]), ("text/x", "3"))

    def test_the_tokens_of_a_passed_answer_are_known_however_it_is_cut(self):
        usage = '{"usage": {"input_tokens": 12,"output_tokens":345}}'
        for size in (1, 3, 20, 30, 1000):
            with self.subTest(size=size):
                passed = proxy.PassedAnswer(proxy.Messages, 200, {})
                for start in range(0, len(usage), size):
                    passed.take(usage[start : start + size])
                self.assertEqual(passed.facts(), {"in": "12", "out": "345"})

    def broken(self, path, kind, *texts):
        """Return the body of an answer that is passed through, and fails behind `texts`."""

        def respond(request, look):
            yield 0, proxy.Piece("", 200, {"content-type": kind})
            for text in texts:
                yield 0, proxy.Piece(text)
            raise proxy.APIError(502, "broken", code="upstream_failed")

        self.start()
        self.pool.respond = respond
        length = f"Content-Length: {len(NATIVE)}"
        request = post(NATIVE, length, END, path=path)
        return self.rest(self.connect(request)).partition(b"\r\n\r\n")[2]

    CREATED = 'data: {"type":"response.created","sequence_number":41}\n\n'
    RESPONSES_ERROR = {
        "type": "error",
        "code": "upstream_failed",
        "message": "broken",
        "param": None,
        "sequence_number": 42,
    }
    RESPONSES_FAILED = {
        "type": "response.failed",
        "sequence_number": 43,
        "response": {
            "object": "response",
            "status": "failed",
            "error": {"code": "upstream_failed", "message": "broken"},
            "output": [],
        },
    }
    MESSAGES_ERROR = {"type": "error", "error": {"type": "server_error", "message": "broken"}}

    def test_a_passed_stream_that_fails_says_why(self):
        for path, expected in (
            ("/v1/responses", (self.RESPONSES_ERROR, self.RESPONSES_FAILED)),
            ("/v1/messages", (self.MESSAGES_ERROR,)),
        ):
            with self.subTest(path):
                got = self.broken(path, "text/event-stream", self.CREATED[:-1], "\n")
                events = b""
                for event in expected:
                    events += f"event: {event['type']}\n".encode() + proxy.sse_data(event)
                chunk = b"%x\r\n%b\r\n" % (len(events), events)
                self.assertTrue(got.endswith(b"\r\n" + chunk + b"0\r\n\r\n"), got)

    def test_a_passed_answer_that_fails_elsewhere_is_cut(self):
        for name, kind, text in (
            ("in an event", "text/event-stream; charset=utf-8", "data: {"),
            ("no stream", "application/json", "{}\n\n"),
        ):
            with self.subTest(name):
                got = self.broken("/v1/responses", kind, text)
                self.assertEqual(got, b"%x\r\n%b\r\n" % (len(text), text.encode()))

    # -- who may ask

    def test_a_refusal_comes_instead_of_the_go_ahead(self):
        self.start(api_key=["kee1"])
        head = [LENGTH, "Expect: 100-continue", END]
        self.assertEqual(self.connect(post(b"", *head)).recv(12), b"HTTP/1.1 401")
        connection = self.connect(post(b"", *head, "api-key: kee1"))
        self.assertEqual(connection.recv(12), b"HTTP/1.1 100")
        connection.sendall(chat_body())
        self.assertIn(b"HTTP/1.1 200", self.rest(connection))

    def test_api_keys(self):
        self.start(api_key=["kee1"])
        status, headers, _ = self.request("GET", "/v1/models")
        self.assertEqual((status, headers["WWW-Authenticate"]), (401, "Bearer"))
        self.assertEqual(self.error("POST", COMPLETIONS, chat_body())[:2], (401, "invalid_api_key"))
        key = {"Authorization": "Bearer kee1"}
        self.assertEqual(self.request("GET", "/v1/models", None, key)[0], 200)
        self.assertEqual(self.request("GET", "/health", None, {"Host": "any.example"})[0], 200)
        self.assertNotIn("kee1", " ".join(self.logged))

    def test_without_a_key_health_is_a_word(self):
        """What it says of errors may be of others' requests."""
        self.start(api_key=["k"])
        word = {"status": "healthy", "version": proxy.__version__}
        self.assertEqual(self.request("GET", "/health")[2], word)
        self.assertEqual(self.request("GET", "/", None, {"X-Api-Key": "x"})[2], word)
        everything = {**self.pool.health(), "version": proxy.__version__}
        self.assertEqual(self.request("GET", "/health", None, {"X-Api-Key": "k"})[2], everything)

    def test_origins(self):
        self.start()
        for origin, expected in (
            ("http://localhost:3000", (200, "http://localhost:3000")),
            ("https://evil.example", (403, None)),
        ):
            with self.subTest(origin):
                status, headers, _ = self.request("GET", "/v1/models", None, {"Origin": origin})
                self.assertEqual((status, headers["Access-Control-Allow-Origin"]), expected)
        self.assert_logged('403 error="Web pages of https://evil.example may not .*')

    def test_what_a_browser_asks_first(self):
        self.start()
        wanted = {"Origin": "app://x", "Access-Control-Request-Headers": "authorization,x-y"}
        status, headers, body = self.request("OPTIONS", COMPLETIONS, None, wanted)
        self.assertEqual((status, body, headers["Vary"]), (204, b"", "Origin"))
        self.assertEqual(headers["Access-Control-Allow-Origin"], "app://x")
        self.assertEqual(headers["Access-Control-Allow-Methods"], "OPTIONS, POST")
        self.assertEqual(headers["Access-Control-Allow-Headers"], "authorization,x-y")

    def test_a_page_elsewhere_may_come_to_this_network(self):
        self.start()
        name = "Access-Control-Allow-Private-Network"
        wanted = {"Origin": "app://x", "Access-Control-Request-Private-Network": "true"}
        self.assertEqual(self.request("OPTIONS", COMPLETIONS, None, wanted)[1][name], "true")
        del wanted["Access-Control-Request-Private-Network"]
        self.assertIsNone(self.request("OPTIONS", COMPLETIONS, None, wanted)[1][name])

    @unittest.skipUnless(proxy.has_both_families(), "this machine has no IPv6")
    def test_both_families_are_listened_on(self):
        self.start(host="")
        for address in ("127.0.0.1", "::1"):
            with self.subTest(address):
                path = "/from/" + address
                connection = http.client.HTTPConnection(address, self.server.server_port)
                with contextlib.closing(connection):
                    connection.request("GET", path)
                    self.assertEqual(connection.getresponse().status, 404)
                self.assert_logged(f"^{re.escape(address)} GET {path} 404")
        self.assertFalse(self.server.on_loopback)
        self.assertEqual(self.server.base_url, f"http://localhost:{self.server.server_port}/v1")

    def test_without_ipv6_ipv4_is_listened_on(self):
        self.patch(has_both_families=lambda: False)
        self.start(host="")
        self.assertEqual(self.server.server_address[0], "0.0.0.0")
        self.assertEqual(self.request("GET", "/health")[0], 200)

    def test_a_strange_host_is_refused_where_nothing_else_would_refuse(self):
        """A web page may give its own name to this machine's address."""
        strange = {"Host": "evil.example"}
        for name, expected, path, changes in (
            ("on loopback", 403, "/", {}),
            ("a balancer", 200, "/health", {}),
            ("with a key", 401, "/v1/models", {"api_key": ["k"]}),
            ("on every address", 200, "/", {"host": ""}),
        ):
            with self.subTest(name):
                self.start(**changes)
                self.assertEqual(self.request("GET", path, None, strange)[0], expected)

    def test_own_names(self):
        self.start()
        self.assertEqual(self.request("GET", "/", None, {"Host": socket.gethostname()})[0], 200)

    # -- the log

    def test_a_request_is_one_line(self):
        self.start()
        self.request("POST", COMPLETIONS, chat_body(model="gpt x"), {"X-Request-Id": "id-1"})
        number = r"[0-9]+\.[0-9]{3}"
        self.assert_logged(
            rf"^127\.0\.0\.1 POST {COMPLETIONS} 200 model=a/first asked=gpt\?x first={number}"
            rf" in=1 out=2 seconds={number} id=id-1$"
        )

    def test_a_query_is_not_logged(self):
        """It may be a key."""
        self.start()
        self.request("GET", "/v1/models?key=secret")
        self.answer(b"GET /v1/models?key=secret x HTTP/1.1\r\n\r\n")
        self.answer(b"GET /v1/models?key=secret HTTP/3.0\r\n\r\n")
        self.answer(b"secret /v1/models HTTP/1.1\r\n\r\n")
        self.assert_logged("GET /v1/models 200 ")
        self.assert_logged(" 505 ")
        self.assert_logged(" 501 ")
        self.assertNotIn("secret", " ".join(self.logged).replace("secret /v1", ""))

    def test_polls_of_health_are_logged_where_it_changes(self):
        self.start()
        for reason in (None, None, "ill", "ill", None, None):
            self.pool.reason = reason
            for path in ("/health", "/"):
                self.request("GET", path)
        self.request("GET", "/none")
        self.assert_logged("GET /none 404")
        statuses = [re.search(" ([0-9]{3}) ", line)[1] for line in self.logged]
        self.assertEqual(statuses, ["503", "200", "404"])

    # -- the end

    def stopped(self, grace, go_on):
        """Return what an idle and a busy client get from a server that stops."""
        self.start()
        let_go = threading.Event()
        self.pool.respond = lambda request, look: self.pool.wait(look, let_go)
        idle = self.connect()
        busy = self.connect(post_chat())
        self.assertTrue(eventually(lambda: self.pool.running == 1))
        thread = threading.Thread(target=self.server.stop, args=(grace, time.sleep))
        thread.start()
        answers = [self.rest(idle)]
        if go_on:
            let_go.set()
        answers.append(self.rest(busy))
        thread.join()
        return answers

    def test_answers_may_end_while_the_server_stops(self):
        idle, busy = self.stopped(DEADLINE, go_on=True)
        self.assertEqual(idle, b"")
        self.assertTrue(busy.startswith(b"HTTP/1.1 200"))

    def test_answers_are_errors_where_the_server_cannot_wait(self):
        idle, busy = self.stopped(0.1, go_on=False)
        self.assertEqual(idle, b"")
        self.assertTrue(busy.startswith(b"HTTP/1.1 503"))


class HealthTest(FakeCase):
    def test_an_error_is_told_with_its_time_until_all_is_well(self):
        running = self.start(spares=1)
        before = int(time.time())
        self.assertEqual(running.chat(DIE)[0], 502)
        health = running.health()
        self.assertIn("last words", health["last_error"])
        told = time.strptime(health["last_error_at"], "%Y-%m-%dT%H:%M:%SZ")
        self.assertTrue(before <= calendar.timegm(told) <= time.time())

        self.assertEqual(running.content("well"), "well")
        health = running.health()
        self.assertEqual((health["last_error"], health["last_error_at"]), (None, None))


class LogTest(unittest.TestCase):
    def setUp(self):
        self.reader, self.writer = os.pipe()
        self.addCleanup(os.close, self.reader)
        self.addCleanup(os.close, self.writer)

    def new_log(self):
        log = proxy.LogWriter(self.writer)
        self.addCleanup(log.close, DEADLINE)
        return log

    def fill(self):
        """Fill the pipe, so that nobody can write to it."""
        os.set_blocking(self.writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.writer, b"x" * 4096)
        os.set_blocking(self.writer, True)

    def read_until(self, end):
        text = ""
        while end not in text:
            text += os.read(self.reader, 1 << 16).decode()
        return text.lstrip("x")

    def test_lines_are_written_in_order(self):
        log = self.new_log()
        for line in ("one", "two\ud800", "last"):
            log.write(line)
        log.close(DEADLINE)
        self.assertEqual(self.read_until("last\n"), "one\ntwo\\ud800\nlast\n")

    def test_lines_are_dropped_where_nobody_reads(self):
        self.fill()
        with unittest.mock.patch.object(proxy, "MAX_LOG_LINES", 10):
            log = self.new_log()
        for number in range(100):
            log.write(str(number))
        log.close(0.01)  # does not wait for what nobody reads
        text = self.read_until("9\n")
        log.write("last")
        text += self.read_until("last\n")
        self.assertRegex(text, r"(?s)\A0\n1\n.*9\n\([0-9]+ lines are missing here: .*\nlast\n\Z")

    def test_that_lines_are_missing_is_told_once(self):
        self.fill()
        with unittest.mock.patch.object(proxy, "MAX_LOG_LINES", 10):
            log = self.new_log()
        for number in range(100):
            log.write(str(number))
        text = self.read_until("9\n")
        for line in ("one", "two"):
            log.write(line)
        text += self.read_until("two\n")
        self.assertEqual(text.count("lines are missing here"), 1, text)

    def test_a_line_that_is_taken_in_parts_is_written_whole(self):
        write = os.write
        in_parts = unittest.mock.patch.object(os, "write", lambda file, data: write(file, data[:3]))
        log = self.new_log()
        with in_parts:
            log.write("a long line")
            log.close(DEADLINE)
        self.assertEqual(os.read(self.reader, 1 << 16), b"a long line\n")

    def test_without_stderr_nothing_is_written(self):
        log = proxy.LogWriter(None)
        log.write("a line")
        log.close(DEADLINE)


# ------------------------------------------------------------------------------------- command line
class SettingsTest(unittest.TestCase):
    def settings(self, *arguments, **environment):
        with unittest.mock.patch.dict(os.environ, environment):
            return proxy.read_settings(arguments)

    def assert_refused(self, text, *arguments, **environment):
        """Check that the program ends with code 2, and says `text`."""
        with contextlib.ExitStack() as stack:
            stderr = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            caught = stack.enter_context(self.assertRaises(SystemExit))
            self.settings(*arguments, **environment)
        self.assertEqual(caught.exception.code, 2)
        self.assertIn(text, stderr.getvalue())

    def test_defaults(self):
        expected = {
            "host": "",
            "port": 4141,
            "model": None,
            "api_key": [],
            "cors_origin": [],
            "spares": 1,
            "max_concurrency": 64,
            "max_queue": 1000,
            "requests_per_process": 1,
            "verbose": False,
        }
        settings = vars(self.settings())
        self.assertEqual({**settings, **expected}, settings)

    BAD = (  # arguments, what is said
        (("--port", "x"), "argument --port: 'x' is not a whole number from 0 to 65535"),
        (("--port", "70000"), "argument --port: "),
        (("--timeout", "0"), "argument --timeout: '0' is not a number from 0.1 to 86400"),
        (("--timeout", "nan"), "argument --timeout: "),
        (("--max-concurrency", "0"), "argument --max-concurrency: "),
        (("--requests-per-process", "0"), "argument --requests-per-process: "),
        (("--model", "a/"), "argument --model: 'a/' is neither provider/model nor a model's name"),
        (("--model", "/m"), "argument --model: "),
        (("--spares", "-1"), "argument --spares: "),
        (("--api-key-file", "/no/such/file"), "argument --api-key-file: "),
        (("--api-key-file", os.devnull), "argument --api-key-file: there is no key in it"),
        (("--api-key-file", ""), "argument --api-key-file: "),
        (("--api-key", ""), "argument --api-key: a key is empty"),
        (("--api-key", "", "--api-key", "k"), "argument --api-key: a key is empty"),
        (("--nonsense",), "unrecognized arguments"),
        (("--systemd-unit", "x"), "argument --systemd-unit: "),
    )

    def test_bad_options(self):
        for arguments, text in self.BAD:
            with self.subTest(" ".join(arguments)):
                self.assert_refused(text, *arguments)

    BAD_VARIABLES = (  # name, value, what is said
        ("PORT", "x", "OPENCODE_PROXY_PORT: 'x' is not a whole number from 0 to 65535"),
        ("GRACE", "-1", "OPENCODE_PROXY_GRACE: "),
        ("VERBOSE", "maybe", "OPENCODE_PROXY_VERBOSE: 'maybe' is neither true nor false"),
        ("API_KEY", "", "OPENCODE_PROXY_API_KEY: a key is empty"),
        ("API_KEY", " ", "OPENCODE_PROXY_API_KEY: a key is empty"),
        ("API_KEY", "\n", "OPENCODE_PROXY_API_KEY: a key is empty"),
        ("API_KEY_FILE", "", "OPENCODE_PROXY_API_KEY_FILE: "),
        ("API_KEY_FILE", "/no/such/file", "OPENCODE_PROXY_API_KEY_FILE: "),
    )

    def test_bad_variables_are_named(self):
        for name, value, text in self.BAD_VARIABLES:
            with self.subTest(name, value=value):
                self.assert_refused("error: " + text, **{"OPENCODE_PROXY_" + name: value})

    GOOD_VARIABLES = (
        ("port", "7", 7),
        ("port", "", 4141),
        ("model", "p/m", "p/m"),
        ("grace", "1", 1.0),
        ("max_body_size", "9", 9),
        ("verbose", "1", True),
        ("verbose", "true", True),
        ("verbose", "No", False),
        ("verbose", "0", False),
        ("verbose", "", False),
        ("api_key", "a b", ["a", "b"]),
        ("cors_origin", "", []),
        ("cors_origin", "https://A.x/ *", ["https://a.x", "*"]),
    )

    def test_good_variables(self):
        for name, value, expected in self.GOOD_VARIABLES:
            with self.subTest(name, value=value):
                settings = self.settings(**{"OPENCODE_PROXY_" + name.upper(): value})
                self.assertEqual(getattr(settings, name), expected)

    def test_the_option_wins(self):
        settings = self.settings("--port", "8", OPENCODE_PROXY_PORT="x")
        self.assertEqual(settings.port, 8)
        two = ("--api-key", "c", "--api-key", "d")
        self.assertEqual(self.settings(*two, OPENCODE_PROXY_API_KEY="").api_key, ["c", "d"])

    def test_keys_of_a_file_are_added(self):
        with tempfile.NamedTemporaryFile() as keys:
            pathlib.Path(keys.name).write_text("# a comment\none\n\n two words \r\n#three\n")
            settings = self.settings("--api-key", "c", OPENCODE_PROXY_API_KEY_FILE=keys.name)
            self.assertEqual(settings.api_key, ["c", "one", "two words"])
            self.assert_refused("empty", "--api-key-file", keys.name, OPENCODE_PROXY_API_KEY="")

    def test_unknown_variables(self):
        settings = self.settings(OPENCODE_PROXY_PROT="1", OPENCODE_PROXY_TEST_X="1")
        self.assertEqual(settings.unknown_variables, ["OPENCODE_PROXY_PROT"])

    def test_help_names_every_option(self):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), self.assertRaises(SystemExit):
            self.settings("--help")
        for name in vars(self.settings()):
            if name != "unknown_variables":
                self.assertIn("--" + name.replace("_", "-"), output.getvalue())


class SystemdTest(unittest.TestCase):
    ODD = '/opt/$HOME 100%/open"code'
    IN_BOTH = (
        "ExecStart=/py$thon ",
        "KillMode=mixed\n",
        "NoNewPrivileges=yes\n",
        "SystemCallArchitectures=native\n",
    )
    IN_SYSTEM = (
        "Environment=HOME=/h$o",
        'ReadWritePaths="-/d$x y/opencode"',
        "After=network-online.target",
        "CapabilityBoundingSet=",
        "PrivateTmp=yes",
        "SystemCallFilter=@system-service",
        "EnvironmentFile=-/etc/opencode_proxy.env",
        "WantedBy=multi-user.target",
    )
    IN_USER = ("EnvironmentFile=-%h/.config/opencode_proxy.env", "WantedBy=default.target")

    def unit(self, kind):
        environment = {"HOME": "/h$o", "XDG_DATA_HOME": "/d$x y"}
        with contextlib.ExitStack() as stack:
            stack.enter_context(unittest.mock.patch.dict(os.environ, environment))
            stack.enter_context(unittest.mock.patch.object(sys, "executable", "/py$thon"))
            return proxy.systemd_unit(kind, self.ODD)

    def test_units(self):
        for kind, lines in (("user", self.IN_USER), ("system", self.IN_SYSTEM)):
            unit = self.unit(kind)
            with self.subTest(kind):
                program = 'opencode_proxy.py --opencode "/opt/$$HOME 100%%/open\\"code"\n'
                self.assertIn(program, unit)
                self.assertNotRegex(unit, r"[{}]|  ")
                for beginning in self.IN_BOTH:
                    self.assertIn("\n" + beginning, unit)
                for line in lines:
                    self.assertIn(f"\n{line}\n", unit)
        self.assertNotIn("network-online", self.unit("user"))

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is missing")
    def test_systemd_takes_them(self):
        folder = self.enter(tempfile.TemporaryDirectory())
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

    def enter(self, manager):
        """Enter a context until the test ends."""
        value = manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)
        return value

    def notified(self, name, address):
        """Return what systemd is told on a socket that is named so."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(address)
            manager.settimeout(DEADLINE)
            with unittest.mock.patch.dict(os.environ, {"NOTIFY_SOCKET": name}):
                proxy.notify("READY=1")
            return manager.recv(100)

    def test_notify(self):
        path = self.enter(tempfile.TemporaryDirectory()) + "/notify"
        self.assertEqual(self.notified(path, path), b"READY=1")

    @unittest.skipUnless(sys.platform == "linux", "only Linux has such names")
    def test_notify_on_a_name_in_no_folder(self):
        got = self.notified("@opencode-proxy-test", "\0opencode-proxy-test")
        self.assertEqual(got, b"READY=1")

    def test_nobody_is_notified_without_systemd(self):
        with unittest.mock.patch.dict(os.environ):
            os.environ.pop("NOTIFY_SOCKET", None)
            proxy.notify("READY=1")


class FindOpencodeTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        environment = {"PATH": str(self.folder / "bin"), "HOME": str(self.folder)}
        patch = unittest.mock.patch.dict(os.environ, environment)
        patch.start()
        self.addCleanup(patch.stop)

    def install(self, path, mode=0o700):
        program = self.folder / path
        program.parent.mkdir(parents=True)
        program.touch(mode)
        return str(program)

    def test_where_the_option_says(self):
        path = self.install("here/mine")
        self.assertEqual(proxy.find_opencode(path), path)
        self.assertEqual(proxy.find_opencode("~/here/mine"), path)

    def test_on_the_path_before_where_installers_put_it(self):
        installed = self.install(".opencode/bin/opencode")
        self.assertEqual(proxy.find_opencode(None), installed)
        on_path = self.install("bin/opencode")
        self.assertEqual(proxy.find_opencode(None), on_path)

    def test_what_cannot_be_run_is_not_found(self):
        path = self.install("here/mine", 0o600)
        for name, wanted in (("nothing", str(self.folder / "none")), ("a file", path)):
            with self.subTest(name), self.assertRaises(proxy.StartError) as caught:
                proxy.find_opencode(wanted)
            self.assertIn(f"{wanted}: not found or not executable", str(caught.exception))


class ServeTest(unittest.TestCase):
    """The life of the program, on a stub pool."""

    def setUp(self):
        self.logged = []
        self.pool = StubPool("a/first")
        self.patch(
            log=self.logged.append,
            Pool=lambda opencode, settings, trace: self.pool,
            Opencode=lambda path, model: None,
            find_opencode=lambda path: "/opencode",
        )

    def patch(self, **values):
        patch = unittest.mock.patch.multiple(proxy, **values)
        patch.start()
        self.addCleanup(patch.stop)

    def is_logged(self, text):
        return any(text in line for line in self.logged)

    def serve(self, act, **changes):
        """Run the server, while a thread waits for its readiness, does `act` and ends it."""
        values = settings(**changes)
        before = signal.getsignal(signal.SIGTERM)

        def end():
            if eventually(lambda: self.is_logged("base URL"), SOON):
                act()
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=end)
        thread.start()
        try:
            proxy.serve(values)
        finally:
            thread.join()
        self.assertEqual(signal.getsignal(signal.SIGTERM), before)
        self.assertTrue(self.pool.closing.is_set())

    def port(self):
        line = next(line for line in self.logged if "base URL" in line)
        return int(re.search(r":([0-9]+)/", line)[1])

    def test_it_serves_until_a_signal(self):
        answers = []

        def act():
            answers.append(Client(self.port()).content())

        self.serve(act)
        self.assertEqual(answers, ["yes"])
        self.assertEqual(self.logged[0], "starting /opencode ...")
        model = f"opencode_proxy {proxy.__version__} with opencode 1.18.33, model a/first"
        self.assertIn(model, self.logged)

    def test_what_it_warns_of(self):
        def act():
            pass

        self.pool.reason = "not logged in"
        self.serve(act, host="", unknown_variables=["OPENCODE_PROXY_PROT"])
        for text in (
            "warning: OPENCODE_PROXY_PROT is in the environment, but there is no such setting",
            "warning: github-copilot/gpt-4.1 is not offered, a/first answers instead",
            "warning: not logged in",
            "warning: whoever reaches this port can use your models",
        ):
            with self.subTest(text):
                self.assertTrue(self.is_logged(text), self.logged)

    def test_a_login_that_comes_late_is_told(self):
        def log_in():
            self.pool.reason = None
            self.assertTrue(eventually(lambda: self.is_logged("ready: model a/first answers now")))

        self.pool.reason = "not logged in"
        self.serve(log_in)
        self.assertTrue(self.is_logged("ready: "))

    def test_who_waits_for_running_answers_is_told_so(self):
        def ask():
            connection = socket.create_connection(("127.0.0.1", self.port()), DEADLINE)
            self.addCleanup(connection.close)
            connection.sendall(post_chat())
            self.assertTrue(eventually(lambda: self.pool.running == 1))
            threading.Thread(target=end_when_told).start()

        def end_when_told():
            if eventually(lambda: self.is_logged("another Ctrl-C ends them now"), SOON):
                os.kill(os.getpid(), signal.SIGINT)

        self.pool.respond = lambda request, look: self.pool.wait(look)
        self.serve(ask, grace=10 * DEADLINE)
        text = "stopping: 1 running requests may go on for 1200 seconds"
        self.assertTrue(self.is_logged(text), self.logged)

    def test_under_nohup_a_hang_up_stays_ignored(self):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGHUP, before)
        handlers = []
        self.serve(lambda: handlers.append(signal.getsignal(signal.SIGHUP)))
        self.assertEqual(handlers, [signal.SIG_IGN])

    def test_opencode_that_does_not_work_ends_it(self):
        self.pool.failure = proxy.StartError("broken")
        with self.assertRaises(proxy.StartError) as caught:
            proxy.serve(settings())
        self.assertEqual(str(caught.exception), "broken")
        self.assertTrue(self.pool.closing.is_set())

    def test_a_port_that_is_taken(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with self.assertRaises(proxy.StartError) as caught:
                proxy.serve(settings(port=port))
        self.assertIn(f"cannot listen on 127.0.0.1:{port}: Address", str(caught.exception))
        self.assertTrue(self.pool.closing.is_set())


def hear_signals():
    """Let a new process hear them: what a shell starts in the background, or nohup, does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class MainTest(unittest.TestCase):
    """The program as a process, on a stub pool."""

    PROGRAM = """\
import sys
import opencode_proxy as proxy
import test_opencode_proxy as tests

proxy.Pool = lambda opencode, settings, trace: tests.StubPool("a/first")
proxy.Opencode = lambda path, model: None
if "--opencode" not in sys.argv:
    proxy.find_opencode = lambda path: "/opencode"
sys.exit(proxy.main())
"""

    def start(self, *arguments, **options):
        """Return the program, started on a free port of loopback."""
        program = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, "--host", "127.0.0.1", "--port", "0", *arguments],
            cwd=HERE,
            env={**clean_environment(), "PYTHONDONTWRITEBYTECODE": "1"},
            preexec_fn=hear_signals,
            **{"stderr": subprocess.PIPE, "universal_newlines": True, **options},
        )
        self.addCleanup(self.end, program)
        return program

    def end(self, program):
        program.kill()
        program.wait()
        for stream in (program.stdout, program.stderr):
            if stream is not None:
                stream.close()

    def wait_for_port(self, program):
        line = ""
        while "base URL" not in line:
            line = program.stderr.readline()
            self.assertTrue(line, "it has ended")
        return int(re.search(r":([0-9]+)/", line)[1])

    def test_lines_have_the_time_unless_the_journal_adds_it(self):
        for name, inode_of, first_line in (
            ("the journal", lambda status: status.st_ino, "starting /opencode ...\n"),
            (
                "a journal that something else writes to",
                lambda status: 1,
                "[-0-9]{10} [:0-9]{8} .*",
            ),
        ):
            reader, writer = os.pipe()
            status = os.fstat(writer)
            stream = f"{status.st_dev}:{inode_of(status)}"
            with unittest.mock.patch.dict(os.environ, JOURNAL_STREAM=stream):
                self.start(stderr=writer)
            os.close(writer)
            with self.subTest(name), open(reader) as log:
                self.assertRegex(log.readline(), r"\A" + first_line)

    def test_it_answers_and_ends(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with self.subTest(number):
                program = self.start()
                self.assertEqual(Client(self.wait_for_port(program)).content(), "yes")
                program.send_signal(number)
                self.assertEqual(program.wait(DEADLINE), 0)
                self.assertNotIn("Traceback", program.stderr.read())

    def test_a_unit_is_printed(self):
        program = self.start("--systemd-unit", stdout=subprocess.PIPE)
        output, _ = program.communicate(timeout=DEADLINE)
        self.assertEqual(program.returncode, 0)
        self.assertIn("--opencode /opencode\n", output)

    def test_what_cannot_start_says_why(self):
        program = self.start("--opencode", "/no/such")
        _, errors = program.communicate(timeout=DEADLINE)
        self.assertEqual(program.returncode, 1)
        self.assertTrue(errors.startswith("opencode_proxy: /no/such: not found"), errors)

    def test_a_log_that_nobody_reads_holds_nothing_up(self):
        """Requests are answered, and a signal ends the program."""
        program = self.start()
        client = Client(self.wait_for_port(program))
        for _ in range(1200):
            self.assertEqual(client.request("GET", "/none")[0], 404)
        program.send_signal(signal.SIGTERM)
        self.assertEqual(program.wait(DEADLINE), 0)

    def test_without_stderr_it_serves(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = (sys.executable, self.PROGRAM)
        program = subprocess.Popen(
            ["sh", "-c", f'exec "$0" -c "$1" --host 127.0.0.1 --port {port} 2>&-', *words],
            cwd=HERE,
            env=clean_environment(),
        )
        self.addCleanup(self.end, program)

        def is_served():
            with contextlib.suppress(OSError):
                return Client(port).content() == "yes"
            return program.poll() is not None

        self.assertTrue(eventually(is_served))
        program.send_signal(signal.SIGTERM)
        self.assertEqual(program.wait(DEADLINE), 0)

    def test_ctrl_c_while_it_is_loaded_gives_no_traceback(self):
        with tempfile.TemporaryDirectory() as folder:
            slow = "print('loading', flush=True)\nimport time\ntime.sleep(600)\n"
            pathlib.Path(folder, "argparse.py").write_text(slow)
            program = subprocess.Popen(
                [sys.executable, str(HERE / "opencode_proxy.py")],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**clean_environment(), "PYTHONPATH": folder},
                preexec_fn=hear_signals,
            )
            self.addCleanup(self.end, program)
            self.assertEqual(program.stdout.readline(), b"loading\n")
            program.send_signal(signal.SIGINT)
            self.assertEqual(program.wait(DEADLINE), -signal.SIGINT)
            self.assertEqual(program.stderr.read(), b"")

    def test_windows_gets_one_clear_line(self):
        words = "import sys; sys.platform = 'win32'; import opencode_proxy"
        done = subprocess.run(
            [sys.executable, "-B", "-c", words], cwd=HERE, stderr=subprocess.PIPE, check=False
        )
        expected = b"opencode_proxy does not run on Windows itself: run it in WSL\n"
        self.assertEqual((done.returncode, done.stderr), (1, expected))


class ReadmeTest(unittest.TestCase):
    VARIABLE = (
        r"\bX\b|POST|^opencode|port 4141: Address.*|64|1,000|300 seconds|github-copilot|1\.17\.0"
    )

    def setUp(self):
        self.text = self.read("README.md")

    def read(self, name):
        """Return the text of a file of the repository; skip where the tests stand alone."""
        path = HERE / name
        if not path.exists():
            missing(name)
        return path.read_text(encoding="utf-8")

    def test_the_reference_tells_of_every_field(self):
        text = self.read(".github/REFERENCE.md")
        rows = text.partition("| field |")[2].partition("\n\n")[0]
        for name in proxy.FIELDS:
            with self.subTest(name):
                self.assertIn(f"`{name}`", rows)

    def test_the_reference_tells_of_every_quirk(self):
        text = self.read(".github/REFERENCE.md")
        table = text.partition("| what was observed |")[2].partition("\n\n")[0]
        expected = []
        for quirk in proxy.QUIRKS:
            formats = quirk.wire_format
            if not isinstance(formats, tuple):
                formats = (formats,)
            endings = ", ".join(f"`{each.ending}`" for each in formats)
            where = f"`{quirk.condition.__name__}`"
            if quirk.condition is proxy.always:
                where = "every service"
            observed = quirk.repair.__doc__.splitlines()[0]
            expected.append(f"| {endings} | {where} | {observed} |")
        self.assertEqual(table.splitlines()[2:], expected)

    def test_it_tells_of_every_option(self):
        rows = self.text.partition("| option |")[2].partition("\n\n")[0]
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout), self.assertRaises(SystemExit):
            proxy.read_settings(["--help"])
        options = set(re.findall(r"--[a-z-]+", stdout.getvalue().partition("\n\n")[2]))
        for name in sorted(options - {"--help"}):
            with self.subTest(name):
                self.assertIn(f"| `{name}", rows)

    def test_its_links_lead_to_files(self):
        for name in re.findall(r"\]\((?!http)([^)#]+)\)", self.text):
            with self.subTest(name):
                self.assertTrue((HERE / name).exists())

    def messages(self):
        """Return the constant pieces of the messages that it explains."""
        table = self.text.partition("| message |")[2].partition("\n\n")[0]
        pieces = []
        for row in table.splitlines()[2:]:
            message = row.split("|")[1]
            for quoted in re.findall("`([^`]+)`", message):
                pieces += re.split(self.VARIABLE, quoted)
        return [piece.strip() for piece in pieces]

    def test_it_quotes_the_program(self):
        program = (HERE / "opencode_proxy.py").read_text(encoding="utf-8")
        program = re.sub(r'"\s+f?"', "", program)  # of texts that are split over lines
        pieces = self.messages()
        self.assertGreater(len(pieces), 10)
        for piece in pieces:
            with self.subTest(piece):
                self.assertTrue(piece in program, piece)  # not all of it on failure


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

    FIELDS = {
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
    # Of these: what a service is known to refuse, and what it gets instead.
    REPAIRED = {
        CHAT: (("temperature", "top_p", "stop"), {}),
        "local/m": (("max_completion_tokens", "store", "metadata"), {"max_tokens": 6}),
    }
    DELTAS = (
        '{"role":"assistant","content":""}',
        '{"content":"Hel"}',
        '{"content":"lo "}',
        '{"content":"w\\u00f6r\\u2028ld"}',
    )
    CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    # Row: messages, opencode's headers for them: x-initiator, Copilot-Vision-Request.
    INITIATORS = {
        "a question": ([{"role": "user", "content": "q"}], "user", None),
        "a picture": ([{"role": "user", "content": [PICTURE]}], "user", "true"),
        "a tool's picture": (
            [
                {"role": "user", "content": "q"},
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c", "content": [PICTURE]},
            ],
            "agent",
            "true",
        ),
    }

    def each_format(self):
        """Yield (format, model), each as a subtest with a provider that was asked for nothing."""
        for name, model in FORMATS.items():
            with self.subTest(name):
                self.upstream.exchanges.clear()
                yield name, model

    def test_a_body_is_the_clients_own(self):
        text = "w\u00f6rld \u2028 {file:/etc/passwd} {env:HOME} /help"
        for model, (refused, more) in self.REPAIRED.items():
            with self.subTest(model):
                self.upstream.exchanges.clear()
                self.assertEqual(self.proxy.content(text, model=model, **self.FIELDS), HELLO)
                taken = {name: self.FIELDS[name] for name in self.FIELDS if name not in refused}
                expected = {
                    "model": model.partition("/")[2],
                    "stream": True,
                    "messages": [{"role": "user", "content": text}],
                    **taken,
                    "stream_options": {"include_usage": True},
                    **more,
                }
                self.assertEqual(self.exchange().raw.decode(), proxy.compact_json(expected))

    def test_the_providers_never_see_the_mark_of_a_session(self):
        for _, model in self.each_format():
            self.proxy.content(model=model)
            self.assertIsNone(self.exchange().headers["x-opencode-proxy-session"])

    def test_a_stream_is_openais_to_the_byte(self):
        body = chat_body(model=CHAT, stream=True, stream_options={"include_usage": True})
        status, headers, data = self.proxy.request("POST", "/v1/chat/completions", body)
        self.assertEqual(status, 200)
        self.assertEqual(headers["Content-Type"], "text/event-stream; charset=utf-8")
        self.assertEqual(headers["Transfer-Encoding"], "chunked")
        head = json.loads(data.split(b"\n\n")[0][6:])
        self.assertRegex(head["id"], "^chatcmpl-[0-9a-f]{32}$")
        frame = (
            f'data: {{"id":"{head["id"]}","object":"chat.completion.chunk",'
            f'"created":{head["created"]},"model":"{CHAT}",'
            '"system_fingerprint":"fp_opencode","choices":['
        )
        chunk = frame + '{"index":0,"delta":%s,"logprobs":null,"finish_reason":%s}],"usage":null}'
        expected = [chunk % (delta, "null") for delta in self.DELTAS]
        expected.append(chunk % ("{}", '"stop"'))
        usage = json.dumps(USAGE, separators=(",", ":"))
        expected.append(f'{frame}],"usage":{usage}}}')
        expected.append("data: [DONE]")
        self.assertEqual(data.decode(), "\n\n".join(expected) + "\n\n")

    def test_finish_reasons(self):
        for _, model in self.each_format():
            for finish in ("stop", "length", "content_filter"):
                self.upstream.respond = answering(("text", "x"), finish=finish)
                *chunks, _ = self.proxy.stream(model=model)
                reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
                self.assertEqual(reasons, [None, None, finish])

    def test_empty_answers_and_empty_questions(self):
        self.upstream.respond = answering()
        for _, model in self.each_format():
            for content in ("hi", "", []):
                self.assertEqual(self.proxy.content(content, model=model), "")

    def test_headers_tell_who_asks_and_whether_there_are_pictures(self):
        for _, model in self.each_format():
            for name, (messages, initiator, vision) in self.INITIATORS.items():
                with self.subTest(name):
                    self.upstream.exchanges.clear()
                    status, answer = self.proxy.chat(model=model, messages=messages)
                    self.assertEqual(status, 200, answer)
                    headers = self.exchange().headers
                    self.assertEqual(headers["x-initiator"], initiator)
                    self.assertEqual(headers["Copilot-Vision-Request"], vision)

    def test_an_effort_reaches_the_model(self):
        for name, model in self.each_format():
            self.proxy.content(model=model, reasoning_effort="high")
            body = self.exchange().body
            efforts = {
                "chat/completions": body.get("reasoning_effort"),
                "responses": body.get("reasoning", {}).get("effort"),
                "messages": body.get("output_config", {}).get("effort"),
            }
            self.assertEqual(efforts[name], "high")

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
        for _, model in self.each_format():
            go_on.clear()
            with self.proxy.streaming(model=model) as connection:
                answer = connection.getresponse()
                lines_until(answer, b'"one"')  # the provider is in the middle of its answer
                go_on.set()
                lines_until(answer, b'"two"')

    def test_every_character_arrives_wherever_a_chunk_begins(self):
        """Also U+FEFF, which Bun's TextDecoder drops at the beginning of a chunk if it may."""
        go_on = threading.Event()

        def respond(exchange):
            exchange.begin()
            exchange.send(chat_chunk({"content": "one"}))
            data = json.dumps(chat_chunk({"content": "\ufefftwo\U0001f600"}), ensure_ascii=False)
            before, mark, after = f"data: {data}\n\n".partition("\ufeff")
            exchange.wfile.write(before.encode())
            go_on.wait(DEADLINE)
            exchange.wfile.write((mark + after).encode())
            exchange.send(chat_chunk({}, "stop"), "[DONE]")

        self.upstream.respond = respond
        with self.proxy.streaming() as connection:
            answer = connection.getresponse()
            lines_until(answer, b'"one"')  # which came in one chunk with the beginning of the next
            go_on.set()
            lines = lines_until(answer, b"two")
        self.assertIn(rb'"content":"\ufefftwo\ud83d\ude00"', lines[-1])

    def test_a_client_that_hangs_up_ends_the_request_to_the_provider(self):
        def respond(exchange):
            exchange.begin()
            exchange.send(chat_chunk({"content": "one"}))
            exchange.wait_closed()

        leavers = {
            "streamed": (True, b""),
            "whole": (False, b""),
            "with another request": (False, b"\r\nGET / HTTP/1.1\r\n"),
        }
        for name, (stream, after) in leavers.items():
            with self.subTest(name):
                self.upstream.respond = respond
                self.upstream.exchanges.clear()
                with self.proxy.send(stream=stream, after=after):
                    self.assertTrue(eventually(lambda: self.upstream.exchanges))
                self.assertTrue(self.exchange().closed_by_client.wait(SOON - 10))
                self.upstream.respond = answer_text
                self.assertEqual(self.proxy.content(), HELLO)

    def test_a_stop_sequence_ends_the_answer_and_the_usage_is_the_providers(self):
        self.upstream.respond = answering(("text", "one ST"), ("text", "OP two"))
        fields = {"chat/completions": [], "responses": [], "messages": ["stop_sequences"]}
        for name, model in self.each_format():
            _, answer = self.proxy.chat(model=model, stop="STOP")
            choice = answer["choices"][0]
            self.assertEqual(choice["message"]["content"], "one ")
            self.assertEqual(choice["finish_reason"], "stop")
            self.assertEqual(answer["usage"]["total_tokens"], 31)
            sent = [field for field in self.exchange().body if "stop" in field]
            self.assertEqual(sent, fields[name])

    def test_large_prompts(self):
        payload = (PNG.rstrip("=") * 180000)[: 4 << 22]
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + payload}}
        for _, model in self.each_format():
            self.assertEqual(self.proxy.content([picture], model=model), HELLO)
            self.assertIn(payload.encode(), self.exchange().raw)

    def test_models_that_are_not_there_are_refused(self):
        for name in ("github-copilot/no-such", "anthropic/claude", "opencode/big-pickle"):
            with self.subTest(name):
                status, answer = self.proxy.chat(model=name)
                self.assertEqual((status, answer["error"]["code"]), (404, "model_not_found"))
        self.assertEqual(self.upstream.exchanges, [])

    def test_models_of_connected_providers_are_listed_the_default_first(self):
        listed = json.loads(self.proxy.request("GET", "/v1/models")[2])["data"]
        self.assertEqual(listed[0]["id"], self.proxy.health()["model"].partition("/")[2])
        providers = {model["owned_by"] for model in listed}
        self.assertEqual(providers, {"github-copilot", "local", "other"})


class RealCallTest(RealCase):
    """Text, reasoning and calls of tools, on the three wire formats."""

    PIECES = ['{"command": "x', '", "n": 1.0,', ' "big": 12345678901234567890}']
    PARTS = (
        ("thought", "hm"),
        ("text", "Let me "),
        ("call", "c1", "bash", PIECES),
        ("call", "c2", "a.b", ["{}"]),
    )
    TOOLS = [{"type": "function", "function": {"name": name}} for name in ("bash", "a.b")]
    CALLS = [
        {
            "id": "c1",
            "type": "function",
            "function": {"name": "bash", "arguments": "".join(PIECES)},
        },
        {"id": "c2", "type": "function", "function": {"name": "a.b", "arguments": "{}"}},
    ]
    MESSAGE = {
        "role": "assistant",
        "content": "Let me ",
        "refusal": None,
        "reasoning_content": "hm",
        "tool_calls": CALLS,
    }

    def setUp(self):
        super().setUp()
        self.upstream.respond = answering(*self.PARTS, finish="tool_calls")

    def test_a_whole_answer(self):
        choice = {
            "index": 0,
            "logprobs": None,
            "finish_reason": "tool_calls",
            "message": self.MESSAGE,
        }
        for name, model in FORMATS.items():
            with self.subTest(name):
                _, answer = self.proxy.chat(model=model, tools=self.TOOLS)
                self.assertEqual(answer["choices"], [choice])
                self.assertEqual((answer["model"], answer["usage"]["total_tokens"]), (model, 31))

    def test_a_stream(self):
        for name, model in FORMATS.items():
            with self.subTest(name):
                deltas = deltas_of(self.proxy.stream(model=model, tools=self.TOOLS))
                self.assertEqual(deltas[1], {"reasoning_content": "hm"})
                self.assertEqual(deltas[2], {"content": "Let me "})
                calls = []
                for delta in deltas:
                    calls += delta.get("tool_calls", ())
                self.assertEqual([call["index"] for call in calls if call.get("id")], [0, 1])
                texts = [call["function"].get("arguments") for call in calls if call["index"] == 0]
                self.assertEqual([text for text in texts if text], self.PIECES)


class RealForeignTest(RealCase):
    """What the proxy does not parse, opencode reads: text, reasoning, parameters, refusals."""

    PARTS = (
        ({"text": "hm", "thought": True}, {}),
        ({"text": "Hel"}, {}),
        ({"text": "lo"}, {"finishReason": "MAX_TOKENS"}),
    )
    COUNTS = {
        "promptTokenCount": 11,
        "candidatesTokenCount": 13,
        "thoughtsTokenCount": 7,
        "totalTokenCount": 31,
        "cachedContentTokenCount": 4,
    }
    CHOICE = {
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
    MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
    # Row: the parameter that is named, fields that opencode cannot be told of.
    REFUSED = {
        "messages": {"content": [PICTURE]},
        "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "response_format": {"response_format": {"type": "json_object"}},
    }

    def respond(self, exchange):
        exchange.begin()
        for part, more in self.PARTS:
            content = {"role": "model", "parts": [part]}
            candidates = [{"content": content, **more}]
            exchange.send({"candidates": candidates, "usageMetadata": self.COUNTS})

    def test_text_reasoning_usage_and_parameters(self):
        self.upstream.respond = self.respond
        for number in range(2):  # the first one finds out that the format is foreign
            with self.subTest(number=number):
                self.upstream.exchanges.clear()
                fields = {"messages": self.MESSAGES, "max_tokens": 50}
                _, answer = self.proxy.chat(model="other/m", **fields)
                self.assertEqual(answer["choices"], [self.CHOICE])
                self.assertEqual(answer["usage"], USAGE)
                sent = self.exchange().body
                self.assertEqual(sent["contents"], [{"role": "user", "parts": [{"text": "a"}]}])
                self.assertEqual(sent["systemInstruction"], {"parts": [{"text": "S"}]})
                self.assertEqual(sent["generationConfig"]["maxOutputTokens"], 50)

    def test_a_refusal_is_passed_on(self):
        self.upstream.respond = failing(429, {"error": {"message": "slow down"}})
        status, answer = self.proxy.chat(model="other/m")
        self.assertEqual((status, answer["error"]["message"]), (429, "slow down"))
        self.exchange()

    def test_an_answer_that_breaks_off_fails_at_once(self):
        """opencode would ask for it again, which nobody answers."""
        has_come = threading.Event()

        def respond(exchange):
            exchange.begin(Content_Length="9999")
            exchange.send(
                {"candidates": [{"content": {"role": "model", "parts": [{"text": "a"}]}}]}
            )
            has_come.wait(DEADLINE)
            exchange.drop()

        self.upstream.respond = respond
        with self.proxy.streaming(model="other/m") as connection:
            answer = connection.getresponse()
            lines_until(answer, b'"content":"a"')
            has_come.set()
            self.assertIn(b'"upstream_failed"', answer.read())
        self.exchange()

    def test_what_opencode_cannot_be_told_is_refused(self):
        for param, fields in self.REFUSED.items():
            with self.subTest(param):
                status, answer = self.proxy.chat(model="other/m", **fields)
                self.assertEqual((status, answer["error"]["param"]), (400, param))
        self.assertEqual(self.upstream.exchanges, [])


class RealPassThroughTest(RealCase):
    """Requests in a provider's own format go there as they are, and so do the answers."""

    # Row: the model, the body without it.
    BODIES = {
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
    ANSWER = b'event: a\r\ndata: {"text": "w\xc3\xb6r"}\r\n\r\n: odd\n\ndata: [DONE]\n\n'

    def respond(self, exchange):
        exchange.begin(content_type="text/event-stream; x=y")
        exchange.wfile.write(self.ANSWER)

    def each_body(self, **fields):
        """Yield (path, body), each as a subtest with a provider that was asked for nothing."""
        for path, (model, body) in self.BODIES.items():
            with self.subTest(path):
                self.upstream.exchanges.clear()
                yield path, {"model": model.partition("/")[2], **body, **fields}

    def check_sent(self, body):
        sent = dict(self.exchange().body)
        self.assertIn(sent.pop("store", False), (False,))
        self.assertEqual(sent, body)

    def test_streams(self):
        self.upstream.respond = self.respond
        for path, body in self.each_body(stream=True):
            status, _, data = self.proxy.request("POST", path, body)
            self.assertEqual((status, data), (200, self.ANSWER))
            self.check_sent(body)

    def test_characters_that_fill_many_lines_of_the_plugin_arrive_whole(self):
        """What has come while it waits for the client is one long piece to it."""
        answer_more = proxy.Turn.answer_more

        def respond(exchange):
            exchange.begin()
            exchange.wfile.write(answer)
            has_sent.set()

        def answer_late(turn, session_id):
            has_sent.wait(DEADLINE)
            return answer_more(turn, session_id)

        self.upstream.respond = respond
        has_sent = threading.Event()
        answer = b"data: %b\n\n" % (700000 * "x\U0001f600").encode()
        model, body = self.BODIES["/v1/responses"]
        body = {"model": model, **body, "stream": True}
        with unittest.mock.patch.object(proxy.Turn, "answer_more", answer_late):
            _, _, data = self.proxy.request("POST", "/v1/responses", body)
        self.assertTrue(data == answer, data[:100])  # a diff of them takes minutes

    def test_whole_answers(self):
        self.upstream.respond = failing(200, '{"n": 1.0}')
        for path, body in self.each_body(stream=False):
            status, _, data = self.proxy.request("POST", path, body)
            self.assertEqual((status, data), (200, b'{"n": 1.0}'))
            self.check_sent(body)

    def test_headers_of_the_format_go_along_and_no_others(self):
        self.upstream.respond = self.respond
        for path, body in self.each_body():
            beta = "interleaved-thinking-2025-05-14"  # one that Copilot takes
            headers = {"anthropic-beta": beta, "X-Private": "p"}
            self.proxy.request("POST", path, body, headers)
            self.assertEqual(self.exchange().headers["anthropic-beta"], beta)
            self.assertIsNone(self.exchange().headers["X-Private"])

    def test_refusals_come_back_as_they_are(self):
        self.upstream.respond = failing(429, '{"odd": 1}', Retry_After="3")
        for path, body in self.each_body():
            status, headers, data = self.proxy.request("POST", path, body)
            self.assertEqual((status, data), (429, b'{"odd": 1}'))
            self.assertEqual(headers["Retry-After"], "3")


class RealFaultTest(RealCase):
    """Every fault reaches the client at once, once, and with one POST."""

    changes = {"requests_per_process": 40, "timeout": 3.0}
    PART = chat_chunk({"content": "part"})
    ERROR = {"error": {"message": "the words", "code": "c"}}

    def check(self, respond, status, code, text, broken=None, model=CHAT):
        """Ask whole and streamed; `broken` is the error's code where a stream has begun."""
        self.upstream.respond = respond
        self.upstream.exchanges.clear()
        got, answer = self.proxy.chat(model=model)
        self.assertEqual((got, answer["error"]["code"]), (status, code), answer)
        self.assertIn(text, answer["error"]["message"])
        if broken is None:
            body = chat_body(model=model, stream=True)
            got, _, data = self.proxy.request("POST", "/v1/chat/completions", body)
            self.assertEqual((got, json.loads(data)["error"]["code"]), (status, code))
        else:
            events = self.proxy.stream(model=model)
            self.assertEqual(deltas_of(events[:-2])[1:], [{"content": "part"}])
            self.assertEqual((events[-2]["error"]["code"], events[-1]), (broken, "[DONE]"))
        self.assertEqual(len(self.upstream.exchanges), 2)

    @staticmethod
    def begun(*events, then=None):
        """Return a `respond` that sends `events`, and then does something else or ends."""

        def respond(exchange):
            exchange.begin()
            exchange.send(*events)
            if then is not None:
                then(exchange)

        return respond

    def test_refusals_have_the_providers_status_and_words(self):
        for status in (400, 401, 403, 404, 413, 429, 500, 503):
            with self.subTest(status=status):
                self.check(failing(status, self.ERROR), status, "c", "the words")

    def test_refusals_in_all_formats(self):
        for name, model in FORMATS.items():
            with self.subTest(name):
                self.check(failing(429, self.ERROR), 429, "c", "the words", model=model)

    def test_a_refusal_that_is_longer_than_a_line_may_be_is_passed_on(self):
        page = failing(503, "x" * (17 << 20), "text/plain")
        self.check(page, 503, None, "xxx")

    def test_a_refusal_in_html_is_read(self):
        page = failing(502, "<html><b>Unicorn!</b></html>", "text/html")
        self.check(page, 502, None, "Unicorn!")

    def test_retry_after_is_passed_on(self):
        self.upstream.respond = failing(429, "{}", Retry_After="7")
        _, headers, _ = self.proxy.request("POST", "/v1/chat/completions", chat_body())
        self.assertEqual(headers["Retry-After"], "7")

    def test_broken_answers_are_errors(self):
        cut = "incomplete_answer"
        silent = self.begun(then=Exchange.wait_closed)
        silent_later = self.begun(self.PART, then=Exchange.wait_closed)
        rows = {
            "dropped": (Exchange.drop, 502, "upstream_unreachable", "connection", None),
            "cut off": (self.begun(self.PART), 502, cut, "did not finish", cut),
            "an error": (self.begun(self.PART, self.ERROR), 502, "c", "the words", "c"),
            "rubbish": (self.begun("rubbish"), 502, cut, "bad data", None),
            "an error with 200": (failing(200, self.ERROR), 502, "c", "the words", None),
            "silence": (silent, 504, "timeout", "nothing for 3 seconds", None),
            "silence later": (silent_later, 504, "timeout", "nothing for 3", "timeout"),
        }
        for name, (respond, status, code, text, broken) in rows.items():
            with self.subTest(name):
                self.check(respond, status, code, text, broken)

    def test_an_answer_that_is_dropped_in_the_middle_is_an_error(self):
        """It is dropped when the client has its beginning: a reset may overtake data."""
        has_part = threading.Event()

        def respond(exchange):
            exchange.begin()
            exchange.send(self.PART)
            has_part.wait(DEADLINE)
            exchange.drop()

        self.upstream.respond = respond
        with self.proxy.streaming() as connection:
            answer = connection.getresponse()
            lines_until(answer, b'"part"')
            has_part.set()
            lines_until(answer, b'"code":"incomplete_answer"')
            lines_until(answer, b"data: [DONE]")
        self.exchange()

    def test_an_end_without_a_reason_counts_where_the_body_has_a_length(self):
        stream = body_text((self.PART,))
        self.upstream.respond = failing(200, stream, "text/event-stream")
        self.assertEqual(self.proxy.content(), "part")

    def test_an_answer_that_ends_before_its_length_is_an_error(self):
        has_part = threading.Event()

        def respond(exchange):
            exchange.begin(Content_Length="9999")
            exchange.send(self.PART)
            has_part.wait(DEADLINE)

        self.upstream.respond = respond
        with self.proxy.streaming() as connection:
            answer = connection.getresponse()
            lines_until(answer, b'"part"')
            has_part.set()
            lines_until(answer, b'"code":"upstream_unreachable"')
            lines_until(answer, b"data: [DONE]")
        self.exchange()

    WHOLE_ANSWERS = {
        "chat/completions": whole_chat(content="part"),
        "responses": output(item("message", text("part", "output_text"))),
        "messages": claude(text("part")),
    }

    def test_answers_that_are_no_streams(self):
        for name, answer in self.WHOLE_ANSWERS.items():
            self.upstream.respond = failing(200, answer)
            self.assertEqual(self.proxy.content(model=FORMATS[name]), "part", name)

    def test_answers_that_do_not_end(self):
        def respond(exchange):
            exchange.begin()
            exchange.send(self.PART, chat_chunk({}, "stop"))
            exchange.wait_closed()

        self.upstream.respond = respond
        with unittest.mock.patch.object(proxy, "FINISH_SECONDS", 0.5):
            self.assertEqual(self.proxy.content(), "part")
        self.assertTrue(self.exchange().closed_by_client.wait(DEADLINE))

    def test_slow_answers_are_not_cut(self):
        """opencode's own time-outs, a second in Upstream.login, do nothing."""

        def respond(exchange):
            time.sleep(2)
            exchange.begin()
            exchange.send(chat_chunk({"content": "a"}))
            time.sleep(2)
            exchange.send(chat_chunk({"content": "b"}, "stop"), "[DONE]")

        self.upstream.respond = respond
        self.assertEqual(self.proxy.content(), "ab")
        self.exchange()


# Bun gives up a request that is silent for five minutes, or for so many seconds (it counts fours).
SOON_SILENT = {"BUN_CONFIG_HTTP_IDLE_TIMEOUT": "1"}


class RealLoadTest(RealCase):
    """Answers in one process do not disturb one another."""

    changes = {"requests_per_process": 40, "timeout": 600.0, "spares": 1}
    CHUNKS = 4000
    TEXT = 10000 * "x"

    @classmethod
    def setUpClass(cls):
        patch = unittest.mock.patch.dict(os.environ, SOON_SILENT)
        patch.start()
        cls.addClassCleanup(patch.stop)
        super().setUpClass()

    def respond(self, exchange):
        if b"other" in exchange.raw:
            exchange.begin()
            exchange.send(chat_chunk({"content": "one"}))
            self.go_on.wait(DEADLINE)
            exchange.send(chat_chunk({"content": "two"}, "stop"), "[DONE]")
            return
        exchange.begin()
        with contextlib.suppress(OSError):
            for _ in range(self.CHUNKS):
                exchange.send(chat_chunk({"content": self.TEXT}))
            exchange.send(chat_chunk({}, "stop"), "[DONE]")
        self.has_sent.set()

    def test_a_client_that_reads_slowly_harms_nobody(self):
        """40 MB wait for it while another answer goes on; then it gets all of them."""
        self.go_on = threading.Event()
        self.has_sent = threading.Event()
        self.upstream.respond = self.respond
        with self.proxy.streaming("other") as other, self.proxy.streaming("slow") as slow:
            answer = other.getresponse()
            lines_until(answer, b'"one"')
            self.assertTrue(eventually(lambda: len(self.upstream.exchanges) == 2))
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            self.has_sent.wait(10)  # it pauses, until all that can be is sent and has piled up
            self.go_on.set()
            lines_until(answer, b"data: [DONE]")
            self.assertLess(tracemalloc.get_traced_memory()[1], 8 << 20)
            tracemalloc.stop()
            data = slow.getresponse().read()
        self.assertNotIn(b'"error"', data)
        self.assertEqual(data.count(self.TEXT.encode()), self.CHUNKS)

    def test_a_client_that_rests_for_long_gets_the_rest_of_its_answer(self):
        self.has_sent = threading.Event()
        self.upstream.respond = self.respond
        with self.proxy.streaming() as connection:
            answer = connection.getresponse()
            time.sleep(6)
            data = answer.read()
        self.assertNotIn(b'"error"', data)
        self.assertEqual(data.count(self.TEXT.encode()), self.CHUNKS)


class RealFilesTest(unittest.TestCase):
    """The user's files, and what is left of them all."""

    LOGIN_PLUGIN = """
        console.log("hello")
        process.stdout.write("no newline")
        const loader = async () => ({
          fetch: (url, init) => {
            console.log("asked")
            const headers = { ...init.headers, "x-login": "yes" }
            return fetch(new Request(url, { ...init, headers }))
          },
        })
        export const Login = async () => ({ auth: { provider: "local", methods: [], loader } })
    """
    COUNTING_PLUGIN = """
        import { appendFileSync } from "node:fs"
        const count = () => appendFileSync("FILE", globalThis.opencodeProxy.turns.size + "\\n")
        export const Count = async () => ({ event: async () => { setTimeout(count) } })
    """

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

    def test_a_changed_configuration_reaches_running_processes(self):
        config = self.folder / ".config/opencode/opencode.json"
        running = self.start({"requests_per_process": 50})
        for key in ("first", "second"):
            changed = json.loads(config.read_text())
            changed["provider"]["local"]["options"]["apiKey"] = key
            config.write_text(json.dumps(changed))
            self.assertEqual(running.content(model="local/m"), HELLO)
            authorization = self.upstream.exchanges[-1].headers["Authorization"]
            self.assertEqual(authorization, "Bearer " + key)

    def test_a_renewed_token_is_no_new_login(self):
        auth = self.folder / ".local/share/opencode/auth.json"
        running = self.start({"requests_per_process": 50})
        before = opencode_pids()
        login = json.loads(auth.read_text())
        login["github-copilot"]["refresh"] = "gho_new"
        auth.write_text(json.dumps(login))
        self.assertEqual(running.content(), HELLO)
        self.assertEqual(self.upstream.exchanges[-1].headers["Authorization"], "Bearer gho_new")
        self.assertTrue(set(before) & set(opencode_pids()))

    def test_plugins_of_the_user_print_and_log_in(self):
        """This one puts a Request together by itself."""
        plugin = self.folder / "login.js"
        plugin.write_text(self.LOGIN_PLUGIN)
        self.start(plugin=[plugin.as_uri()]).close()
        auth = self.folder / ".local/share/opencode/auth.json"
        auth.write_text('{"local":{"type":"api","key":"k"}}')
        running = Running(self.path, model="local/m")
        self.stack.callback(running.close)
        self.assertEqual(running.content("q", seed=7), HELLO)
        (exchange,) = self.upstream.exchanges
        self.assertEqual((exchange.headers["x-login"], exchange.body["seed"]), ("yes", 7))

    def test_a_request_that_a_plugin_of_the_user_put_together_has_its_time(self):
        def respond(exchange):
            time.sleep(6)
            answer_text(exchange)

        self.upstream.respond = respond
        self.stack.enter_context(unittest.mock.patch.dict(os.environ, SOON_SILENT))
        plugin = self.folder / "login.js"
        plugin.write_text(self.LOGIN_PLUGIN)
        self.start(plugin=[plugin.as_uri()]).close()
        auth = self.folder / ".local/share/opencode/auth.json"
        auth.write_text('{"local":{"type":"api","key":"k"}}')
        running = Running(self.path, model="local/m")
        self.stack.callback(running.close)
        self.assertEqual(running.content(), HELLO)

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

    def test_no_tool_server_of_the_user_is_started(self):
        trace = self.folder / "started"
        server = {"type": "local", "command": ["touch", str(trace)]}
        running = self.start(mcp={"mine": server})
        self.assertEqual(running.content(), HELLO)
        self.assertFalse(trace.exists())

    def test_opencode_keeps_nothing_of_answers_that_are_over(self):
        """A plugin of the user's counts what ours keeps, behind each event of opencode."""
        counts = self.folder / "counts"
        plugin = self.folder / "count.js"
        plugin.write_text(self.COUNTING_PLUGIN.replace("FILE", str(counts)))
        running = self.start({"requests_per_process": 50}, plugin=[plugin.as_uri()])
        for _ in range(2):
            self.assertEqual(running.content(), HELLO)
        self.assertTrue(eventually(lambda: counts.read_text().endswith("\n0\n"), SOON))
        self.assertIn("1\n", counts.read_text())

    def test_nothing_of_the_machine_is_sent_and_no_prompt_is_left(self):
        notes = self.folder / "AGENTS.md"
        notes.write_text("Answer like a pirate.")
        running = self.start({"spares": 0}, instructions=[str(notes)], username="somebody")
        known = set(self.folder.rglob("*"))
        self.assertEqual(running.content("a private prompt", tools=[]), HELLO)
        (exchange,) = self.upstream.exchanges
        self.assertIsNone(SYSTEM_PROMPT.search(exchange.raw))
        running.close()
        self.assertEqual(opencode_pids(), [])
        for path in set(self.folder.rglob("*")) - known:
            if path.is_file():
                self.assertNotIn(b"private prompt", path.read_bytes(), path)

    @staticmethod
    def listening_addresses(pid):
        """Return the (host, port) that a process listens on, as /proc/net/tcp writes them."""
        inodes = {os.readlink(path) for path in pathlib.Path(f"/proc/{pid}/fd").iterdir()}
        addresses = []
        for line in pathlib.Path("/proc/net/tcp").read_text().splitlines():
            row = line.split()
            if row[3] == "0A" and f"socket:[{row[9]}]" in inodes:
                addresses.append(row[1].split(":"))
        return addresses

    def test_the_port_of_opencode_has_a_password(self):
        self.start()
        (pid,) = opencode_pids()
        addresses = self.listening_addresses(pid)
        self.assertTrue(addresses)
        for host, port in addresses:
            self.assertEqual(host, "0100007F")
            connection = http.client.HTTPConnection("127.0.0.1", int(port, 16), timeout=DEADLINE)
            with contextlib.closing(connection):
                connection.request("GET", "/config")
                self.assertEqual(connection.getresponse().status, 401)

    def living_in(self, folder):
        """Return the processes that work in a folder below this one."""
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):
                if os.readlink(path).startswith(str(folder)):
                    found.append(path)
        return found

    def run_program(self, temporary):
        """Start the program as a user does; return it and a client, when it serves."""
        variables = {**clean_environment(), **make_home(self.folder, self.upstream)}
        words = [sys.executable, str(HERE / "opencode_proxy.py"), "--opencode", self.path]
        program = subprocess.Popen(
            [*words, "--host", "127.0.0.1", "--port", "0"],
            stderr=subprocess.PIPE,
            universal_newlines=True,
            env={**variables, "TMPDIR": str(temporary)},
        )
        self.stack.callback(program.stderr.close)
        self.stack.callback(program.kill)
        for line in program.stderr:
            found = re.search(r"base URL for apps: http://127.0.0.1:(\d+)/v1", line)
            if found:
                return program, Client(int(found[1]))
        raise AssertionError(f"it ended with {program.wait()}")

    def test_a_killed_program_leaves_no_opencode_and_the_next_removes_its_files(self):
        temporary = self.folder / "tmp"
        temporary.mkdir()
        for end, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
            program, client = self.run_program(temporary)
            self.assertEqual(client.content(), HELLO)
            self.assertTrue(self.living_in(temporary))
            program.send_signal(end)
            self.assertEqual(program.wait(DEADLINE), code)
            self.assertTrue(eventually(lambda: not self.living_in(temporary)))
        self.assertEqual(list(temporary.glob("opencode*proxy-*")), [])


ODD_REQUESTS = {
    "lists that are empty": {
        "tools": [],
        "messages": [USER, {**ASSISTANT, "tool_calls": []}, USER],
    },
    "calls without tools": {"messages": [USER, called("c"), result_of("c")]},
    "a long id, twice": {
        "messages": [
            USER,
            called(LONG_ID),
            result_of(LONG_ID),
            called(LONG_ID),
            result_of(LONG_ID),
        ]
    },
    "schemas of every kind": {
        "tools": [
            chat_tool(parameters=LOOSE_SCHEMA, strict=False),
            {"type": "function", "function": {"name": "g"}},
        ]
    },
    "words that are not everywhere": {"service_tier": "auto", "stop": ["x"], **SAMPLING},
    "an answer that has begun": {"messages": [USER, ASSISTANT]},
}
ODD_NATIVE_REQUESTS = {
    "Codex at Copilot": (
        "/v1/responses",
        CHAT,
        {
            "input": [{**HELLO_ITEM, "id": "i" * 400}, REASONING_ITEM],
            "tools": [{"type": "image_generation"}],
            "client_metadata": {},
            "service_tier": "flex",
            "max_output_tokens": 1,
            **SAMPLING,
        },
    ),
    "a text for ChatGPT": (
        "/v1/responses",
        LIVE["chatgpt"],
        {"input": "q", "stream": True, "max_output_tokens": 9, "user": "u"},
    ),
    "Claude Code at Copilot": (
        "/v1/messages",
        MESSAGES,
        {
            "max_tokens": 64000,
            "system": [{**text("s"), **LONG_MARK}],
            "messages": [USER, CALLED, RESULT, SYSTEM, CALLED, RESULT, ASSISTANT],
            "thinking": LONG_THINKING,
            "tools": [claude_tool(strict=True, eager_input_streaming=True, defer_loading=True)],
            "tool_choice": {"type": "any"},
            **PLAIN_MARK,
            **SAMPLING,
        },
    ),
}


class RealLoginTest(RealCase):
    """With a login as it really is: GPT over /responses, Claude over /messages, ChatGPT."""

    provider = Services
    REQUESTS = {
        "plain": {},
        "with what some services refuse": {
            "max_tokens": 1,
            "temperature": 0.5,
            "top_p": 0.5,
            "user": "u",
            "stop": ["\n\n"],
            "metadata": {"a": "b"},
        },
        "with a system message": {
            "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}],
        },
    }

    def test_the_models_are_those_that_github_lists(self):
        listed = json.loads(self.proxy.request("GET", "/v1/models")[2])["data"]
        names = [model["id"] for model in listed]
        live = {name for name in names if "/" not in name}  # the default provider's
        self.assertEqual(live, {row[0] for row in OFFERS})

    def test_each_model_is_asked_in_its_own_format_and_takes_it(self):
        for service, model in LIVE.items():
            for name, fields in self.REQUESTS.items():
                with self.subTest(f"{service}, {name}"):
                    self.upstream.exchanges.clear()
                    status, answer = self.proxy.chat(model=model, **fields)
                    self.assertEqual(status, 200, answer)
                    self.assertEqual(answer["usage"]["total_tokens"], 31)
                    expected = "responses" if service == "chatgpt" else service
                    self.assertEqual(self.exchange().format, expected)

    def test_what_services_refuse_is_put_into_words_that_they_take(self):
        for service, model in LIVE.items():
            for name, fields in ODD_REQUESTS.items():
                with self.subTest(f"{service}, {name}"):
                    status, answer = self.proxy.chat(model=model, **fields)
                    self.assertEqual(status, 200, answer)

    def test_what_services_refuse_of_bodies_that_are_passed_through(self):
        for name, (path, model, fields) in ODD_NATIVE_REQUESTS.items():
            with self.subTest(name):
                status, _, data = self.proxy.request("POST", path, {"model": model, **fields})
                self.assertEqual(status, 200, data)

    def test_a_whole_answer_of_a_service_that_only_streams(self):
        body = {"model": LIVE["chatgpt"], "input": "q"}
        status, headers, data = self.proxy.request("POST", "/v1/responses", body)
        self.assertEqual((status, headers["Content-Type"]), (200, "application/json"), data)
        self.assertEqual(json.loads(data)["output"][0]["type"], "message")

    def test_chatgpt_gets_instructions_and_stores_nothing(self):
        self.proxy.content(model=LIVE["chatgpt"], **self.REQUESTS["with a system message"])
        body = self.exchange().body
        self.assertEqual((body["instructions"], body["store"]), ("S", False))
        content = [{"type": "input_text", "text": "q"}]
        self.assertEqual(body["input"], [{"role": "user", "content": content}])

    def test_nobody_else_is_talked_to(self):
        for model in LIVE.values():
            self.proxy.content(model=model)
        self.assertLessEqual(set(self.upstream.hosts), {COPILOT, CHATGPT})

    def test_claude_is_asked_for_no_more_than_it_has(self):
        for model, limit in ((MESSAGES, 32000), ("github-copilot/claude-opus-4.6", 8000)):
            with self.subTest(model):
                self.upstream.exchanges.clear()
                self.assertEqual(self.proxy.content(model=model), HELLO)
                self.assertEqual(self.exchange().body["max_tokens"], limit)

    def test_efforts_and_sampling(self):
        fields = {"reasoning_effort": "low", "temperature": 0.5}
        self.assertEqual(self.proxy.content(model=CHAT, **fields), HELLO)
        body = self.exchange().body
        self.assertEqual(body["reasoning"]["effort"], "low")
        self.assertNotIn("temperature", body)
        self.assertNotIn("prompt_cache_key", body)


# ------------------------------------------------------------------------------------- real clients
class RealOpenAITest(RealCase):
    """The `openai` library, unchanged, on all wire formats."""

    HELLO = [{"role": "user", "content": "hi"}]
    WEATHER = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }

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

    def each_model(self):
        """Yield the model of each wire format, as a subtest."""
        for name, model in FORMATS.items():
            with self.subTest(name):
                yield model

    def test_whole_answers(self):
        for model in self.each_model():
            answer = self.create(model=model, messages=self.HELLO)
            self.assertEqual(answer.choices[0].message.content, HELLO)
            self.assertEqual(answer.usage.total_tokens, 31)

    def test_streams_with_usage(self):
        for model in self.each_model():
            fields = {"stream": True, "stream_options": {"include_usage": True}}
            with self.create(model=model, messages=self.HELLO, **fields) as stream:
                *chunks, last = list(stream)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            self.assertEqual((text, last.usage.total_tokens), (HELLO, 31))

    def test_asynchronous_streams(self):
        async def ask(model):
            url = str(self.client.base_url)
            async with self.openai.AsyncOpenAI(base_url=url, api_key="any") as client:
                create = client.chat.completions.create
                stream = await create(model=model, messages=self.HELLO, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        for model in self.each_model():
            self.assertEqual(asyncio.run(ask(model)), HELLO)

    def test_lists_of_models(self):
        names = [model.id for model in self.client.models.list()]
        self.assertEqual(self.client.models.retrieve(names[0]).id, names[0])

    def test_a_tool_is_called_and_its_result_answered(self):
        call = ("call", "call_1", "weather", ['{"city": "Par', 'is"}'])

        def respond(exchange):
            if b"sunny" in exchange.raw:
                answering(("text", "It is sunny"))(exchange)
            else:
                answering(call, finish="tool_calls")(exchange)

        self.upstream.respond = respond
        for model in self.each_model():
            fields = {"model": model, "tools": [self.WEATHER]}
            with self.client.chat.completions.stream(messages=self.HELLO, **fields) as stream:
                message = stream.get_final_completion().choices[0].message
            (called,) = message.tool_calls
            self.assertEqual(called.function.name, "weather")
            self.assertEqual(called.function.arguments, '{"city": "Paris"}')
            said = message.model_dump(exclude_none=True, exclude={"parsed"})
            result = {"role": "tool", "tool_call_id": called.id, "content": "sunny"}
            answer = self.create(messages=[*self.HELLO, said, result], **fields)
            self.assertEqual(answer.choices[0].message.content, "It is sunny")

    def test_schemas(self):
        from pydantic import BaseModel

        class City(BaseModel):
            name: str

        self.upstream.respond = answering(("text", '{"name":'), ("text", '"Paris"}'))
        for model in self.each_model():
            parse = self.client.chat.completions.parse
            answer = parse(model=model, messages=self.HELLO, response_format=City)
            self.assertEqual(answer.choices[0].message.parsed, City(name="Paris"))
            self.assertIn(b'"json_schema"', self.upstream.exchanges[-1].raw)

    def test_its_responses(self):
        stream = self.client.responses.create(model="gpt-5.4-mini", input="hi", stream=True)
        events = list(stream)
        text = ""
        for event in events:
            if event.type == "response.output_text.delta":
                text += event.delta
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


# ------------------------------------------------------------- clients of /responses and /messages
def changing_ids(events):
    """Return events of /responses as Copilot sends them: another id for an item in each."""
    numbers = itertools.count()
    changed = []
    for event in json.loads(json.dumps(events)):
        for holder in (event, event.get("item"), *(event.get("response") or {}).get("output", ())):
            if not isinstance(holder, dict):
                continue
            for name in ("id", "item_id"):
                if name in holder and not str(holder[name]).startswith("resp_"):
                    holder[name] = f"{holder[name]}{next(numbers):060}"
        changed.append(event)
    return changed


def copilot_responses(*items):
    """Return the events of an answer of /responses, of ("text", text) and ("call", name, text)."""
    head = {"id": "resp_1", "object": "response", "created_at": 1, "model": "gpt-5.4-mini"}
    head.update({"parallel_tool_calls": True, "tool_choice": "auto", "tools": []})
    steps = [("created", {"response": {**head, "status": "in_progress", "output": []}})]
    output = []
    for index, (kind, *words) in enumerate(items):
        make = message_steps if kind == "text" else call_steps
        item, more = make(f"item{index}_", *words)
        place = {"output_index": index}
        added = {**item, "status": "in_progress"}
        added.update({"content": []} if kind == "text" else {"arguments": ""})
        steps.append(("output_item.added", {**place, "item": added}))
        for name, fields in more:
            steps.append((name, {**place, "item_id": item["id"], **fields}))
        steps.append(("output_item.done", {**place, "item": item}))
        output.append(item)
    usage = {
        "input_tokens": 11,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 7},
        "total_tokens": 31,
    }
    whole = {**head, "status": "completed", "output": output, "usage": usage}
    steps.append(("completed", {"response": whole}))
    events = []
    for number, (name, fields) in enumerate(steps):
        events.append({"type": f"response.{name}", "sequence_number": number, **fields})
    return changing_ids(events)


def message_steps(item_id, text):
    """Return a message of /responses and the events that stream it."""
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    item = {"id": item_id, "type": "message", "role": "assistant", "status": "completed"}
    place = {"content_index": 0}
    return {**item, "content": [part]}, [
        ("content_part.added", {**place, "part": {**part, "text": ""}}),
        ("output_text.delta", {**place, "delta": text[:3], "logprobs": []}),
        ("output_text.delta", {**place, "delta": text[3:], "logprobs": []}),
        ("output_text.done", {**place, "text": text, "logprobs": []}),
        ("content_part.done", {**place, "part": part}),
    ]


def call_steps(item_id, name, arguments):
    """Return a call of /responses and the events that stream it."""
    item = {"id": item_id, "type": "function_call", "status": "completed", "call_id": "call_1"}
    return {**item, "name": name, "arguments": arguments}, [
        ("function_call_arguments.delta", {"delta": arguments}),
        ("function_call_arguments.done", {"name": name, "arguments": arguments}),
    ]


def weather_service(*words):
    """Return a `respond` that says `words` and calls `weather`, then answers what that has said."""

    def respond(exchange):
        has_result = b"sunny" in exchange.raw
        parts = [("text", "It is sunny")]
        if not has_result:
            parts = [*words, ("call", "call_1", "weather", ['{"city": "Par', 'is"}'])]
        if exchange.format != "responses":
            answering(*parts, finish="stop" if has_result else "tool_calls")(exchange)
            return
        items = []
        for kind, text, *call in parts:
            items.append(("call", call[0], "".join(call[1])) if call else (kind, text))
        exchange.begin()
        exchange.send(*copilot_responses(*items))

    return respond


class RealResponsesClientTest(RealCase):
    """The `openai` library's own /responses, while Copilot changes ids in every event."""

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
        self.client = self.openai.OpenAI(base_url=url, api_key="any", max_retries=0)
        self.addCleanup(self.client.close)
        self.upstream.respond = weather_service(("text", "Let me see"))

    TOOL = {
        "type": "function",
        "name": "weather",
        "strict": False,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }

    def test_its_stream_helper_puts_a_call_together(self):
        fields = {"model": "gpt-5.4-mini", "tools": [self.TOOL]}
        with self.client.responses.stream(input="How is it?", **fields) as stream:
            events = list(stream)
            response = stream.get_final_response()
        message, call = response.output
        self.assertEqual(message.content[0].text, "Let me see")
        self.assertEqual((call.name, call.arguments), ("weather", '{"city": "Paris"}'))
        ids = {event.item_id for event in events if hasattr(event, "item_id")}
        self.assertEqual(ids, {message.id, call.id})

    def test_its_parser_reads_a_schema(self):
        from pydantic import BaseModel

        class City(BaseModel):
            name: str

        def respond(exchange):
            exchange.begin()
            exchange.send(*copilot_responses(("text", '{"name": "Paris"}')))

        self.upstream.respond = respond
        fields = {"model": "gpt-5.4-mini", "text_format": City}
        with self.client.responses.stream(input="Where?", **fields) as stream:
            response = stream.get_final_response()
        self.assertEqual(response.output_parsed, City(name="Paris"))


class RealAnthropicTest(RealCase):
    """The `anthropic` library, unchanged."""

    TOOL = {
        "name": "weather",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    }

    @classmethod
    def setUpClass(cls):
        try:
            import anthropic
        except ImportError:
            missing("the library anthropic (pip install anthropic)")
        cls.anthropic = anthropic
        super().setUpClass()

    def setUp(self):
        super().setUp()
        url = f"http://127.0.0.1:{self.proxy.port}"
        self.client = self.anthropic.Anthropic(base_url=url, api_key="any", max_retries=0)
        self.addCleanup(self.client.close)
        self.upstream.respond = weather_service(("text", "Let me see"))
        self.fields = {"model": "claude-sonnet-4-6", "max_tokens": 100, "tools": [self.TOOL]}

    def test_a_tool_loop(self):
        question = {"role": "user", "content": "How is it?"}
        with self.client.messages.stream(messages=[question], **self.fields) as stream:
            message = stream.get_final_message()
        text, call = message.content
        self.assertEqual((text.text, call.input), ("Let me see", {"city": "Paris"}))
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        messages = [question, {"role": "assistant", "content": message.content}]
        messages.append({"role": "user", "content": [result]})
        with self.client.messages.stream(messages=messages, **self.fields) as stream:
            self.assertEqual(stream.get_final_text(), "It is sunny")

    def test_tokens_are_estimated(self):
        message = {"role": "user", "content": "x" * 400}
        count = self.client.messages.count_tokens(
            model="claude-haiku-4-5-20251001", messages=[message]
        )
        self.assertGreaterEqual(count.input_tokens, 100)
        self.assertLess(count.input_tokens, 150)


class RealPydanticAITest(RealCase):
    """pydantic-ai's own models of /responses and /messages, streamed with a tool."""

    @classmethod
    def setUpClass(cls):
        if sys.version_info < (3, 10):
            raise unittest.SkipTest("pydantic-ai needs Python 3.10")
        try:
            import pydantic_ai
            import pydantic_ai.models.anthropic
            import pydantic_ai.models.openai
            import pydantic_ai.providers.anthropic
            import pydantic_ai.providers.openai
        except ImportError:
            missing("the library pydantic-ai (pip install 'pydantic-ai-slim[openai,anthropic]')")
        cls.library = pydantic_ai
        super().setUpClass()

    def model(self, name):
        """Return pydantic-ai's model for a wire format."""
        url = f"http://127.0.0.1:{self.proxy.port}"
        models, providers = self.library.models, self.library.providers
        if name == "responses":
            provider = providers.openai.OpenAIProvider(base_url=url + "/v1", api_key="any")
            return models.openai.OpenAIResponsesModel("gpt-5.4-mini", provider=provider)
        provider = providers.anthropic.AnthropicProvider(base_url=url, api_key="any")
        return models.anthropic.AnthropicModel("claude-sonnet-4-6", provider=provider)

    async def ask(self, name):
        model = self.model(name)
        agent = self.library.Agent(model)

        @agent.tool_plain
        def weather(city: str) -> str:
            return "sunny in " + city

        async with model.client, agent.run_stream("How is it?") as result:
            async for _ in result.stream_text():
                pass
            return await result.get_output()

    def test_a_streamed_tool_loop(self):
        self.upstream.respond = weather_service()  # it takes a text for the whole answer
        for name in ("responses", "messages"):
            with self.subTest(name):
                self.upstream.exchanges.clear()
                answer = asyncio.run(self.ask(name))
                posts = [exchange.format for exchange in self.upstream.exchanges]
                self.assertEqual((answer, posts), ("It is sunny", [name, name]))


NATIVE_AI_SDK = r"""
import { createAnthropic } from "@ai-sdk/anthropic"
import { createOpenAI } from "@ai-sdk/openai"
import { stepCountIs, streamText, tool } from "ai"
import { z } from "zod"
const [baseURL] = process.argv.slice(2)
const execute = async ({ city }) => "sunny in " + city
const weather = tool({ description: "d", inputSchema: z.object({ city: z.string() }), execute })
const options = { prompt: "How is it?", tools: { weather }, stopWhen: stepCountIs(3) }
const ask = async (model) => {
  const texts = []
  for await (const piece of streamText({ model, ...options }).textStream) texts.push(piece)
  return texts.join("")
}
const openai = createOpenAI({ baseURL, apiKey: "any" })
const anthropic = createAnthropic({ baseURL, apiKey: "any" })
const responses = await ask(openai.responses("gpt-5.4-mini"))
const messages = await ask(anthropic("claude-sonnet-4-6"))
console.log(JSON.stringify({ responses, messages }))
"""


class RealNativeAISDKTest(RealCase):
    """The `ai` SDK's own models of OpenAI and Anthropic, unchanged."""

    def test_streamed_tool_loops(self):
        if not NPM or not shutil.which("node"):
            missing("the npm packages ai, @ai-sdk/openai and @ai-sdk/anthropic")
        self.upstream.respond = weather_service(("text", "Let me see"))
        script = pathlib.Path(NPM) / "native.mjs"
        script.write_text(NATIVE_AI_SDK)
        url = f"http://127.0.0.1:{self.proxy.port}/v1"
        run = subprocess.run(
            ["node", str(script), url],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE,
            check=False,
        )
        self.assertEqual(run.returncode, 0, run.stdout)
        text = "Let me seeIt is sunny"
        answers = json.loads(run.stdout.splitlines()[-1])
        self.assertEqual(answers, {"responses": text, "messages": text})


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
        for requested in (None, "gpt-5-mini", "acme/m"):
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
                str(path.relative_to(folder)): os.readlink(path)
                for path in pathlib.Path(folder).rglob("*")
                if path.is_symlink()
            }
            self.assertEqual(
                links,
                {
                    "proxy/home/config/opencode/key": f"{source}/key",
                    "proxy/home/config/opencode/keys/key": f"{source}/keys/key",
                    "proxy/home/config/above": f"{source.parent}/above",
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


class NativeRefusalTest(unittest.TestCase):
    """What a service refuses, in words that the client's library reads."""

    ROWS = (
        ("the format's own words", proxy.Responses, '{"error": {"message": "no"}}', None),
        ("a page", proxy.Responses, "<html>", None),
        (
            "chatgpt.com's words",
            proxy.Responses,
            '{"detail": "no"}',
            {
                "error": {
                    "message": "no",
                    "type": "invalid_request_error",
                    "param": None,
                    "code": None,
                }
            },
        ),
        (
            "the same where Anthropic's are wanted",
            proxy.Messages,
            '{"detail": "no"}',
            {
                "type": "error",
                "error": {
                    "message": "no",
                    "type": "invalid_request_error",
                    "param": None,
                    "code": None,
                },
            },
        ),
    )

    def test_a_reason_is_where_clients_look_for_it(self):
        for name, wire_format, body, expected in self.ROWS:
            with self.subTest(name):
                request = proxy.NativeRequest({}, wire_format, "m", {})
                exchange = proxy.NativeExchange(request, proxy.Model("p/m"))
                head, refusal = exchange.refused(400, {}, body)
                self.assertEqual(head.status, 400)
                if expected is None:
                    self.assertEqual(refusal.text, body)
                else:
                    self.assertEqual(json.loads(refusal.text), expected)

    def test_a_system_message_at_the_end_is_no_agents_turn(self):
        for name, last in (("a user's", USER), ("a system's", SYSTEM)):
            with self.subTest(name):
                body = {"messages": [USER, last]}
                request = proxy.NativeRequest(body, proxy.Messages, "m", {})
                exchange = proxy.NativeExchange(request, proxy.Model("p/m"))
                self.assertEqual(
                    exchange.conversation(False), proxy.stub_conversation(False, False)
                )


class StableIdsTest(unittest.TestCase):
    """One id for an item in all events of an answer that is passed through."""

    @staticmethod
    def stream(*events, ends="\n"):
        """Return events as they come, a comment and an odd one among them."""
        blocks = [": hi"]
        for event in events:
            blocks.append(f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}")
        blocks += ["data: {broken", "data: [DONE]"]
        return "".join(block.replace("\n", ends) + 2 * ends for block in blocks)

    @staticmethod
    def events(first, added, delta, done, other, last, other_last):
        """Return the events of an answer of two items, which have these ids."""
        return (
            {"type": "response.created", "response": {"id": first, "output": []}},
            {"type": "response.output_item.added", "output_index": 0, "item": {"id": added}},
            {
                "type": "response.output_text.delta",
                "output_index": 0,
                "item_id": delta,
                "x": "\u2028",
            },
            {"type": "response.output_item.done", "output_index": 0, "item": {"id": done}},
            {"type": "response.output_item.added", "output_index": 1, "item": {"id": other}},
            {
                "type": "response.completed",
                "response": {"output": [{"id": last}, {"id": other_last}]},
            },
        )

    def feed(self, text, size):
        ids = proxy.StableIds()
        pieces = [ids.feed(text[start : start + size]) for start in range(0, len(text), size)]
        return "".join((*pieces, ids.end()))

    def test_items_keep_the_first_id_that_was_seen_and_all_else_its_bytes(self):
        changing = self.events("r", "a/1+=", "a2", "a3", "b1", "a4", "b2")
        stable = self.events("r", "a/1+=", "a/1+=", "a/1+=", "b1", "a/1+=", "b1")
        for ends in ("\n", "\r\n"):
            text = self.stream(*changing, ends=ends) + "data: cut off"
            expected = self.stream(*stable, ends=ends) + "data: cut off"
            for size in (1, 2, 3, 7, 64, len(text)):
                with self.subTest(ends=ends, size=size):
                    self.assertEqual(self.feed(text, size), expected)

    def test_an_event_leaves_when_it_is_complete(self):
        ids = proxy.StableIds()
        self.assertEqual(ids.feed("data: 1\n"), "")
        self.assertEqual(ids.feed("\ndata: 2\n"), "data: 1\n\n")
        self.assertEqual(ids.feed("\ndata"), "data: 2\n\n")
        self.assertEqual(ids.end(), "data")

    def test_a_large_event_in_small_pieces_takes_linear_time(self):
        def seconds(count):
            ids = proxy.StableIds()
            started = time.process_time()
            for _ in range(count):
                ids.feed("x" * 100)
            return time.process_time() - started

        few = min(seconds(1000) for _ in range(3))
        self.assertLess(min(seconds(16000) for _ in range(3)), 64 * few + 0.02)


# ---------------------------------------------------------------------------------------- thoughts
class ThoughtsTest(unittest.TestCase):
    """What is remembered, for how long, and for whom."""

    def test_a_thought_belongs_to_a_call_of_a_model(self):
        thoughts = proxy.Thoughts()
        thoughts.store("p/m", "c1", {"before": [1]})
        self.assertEqual(thoughts.recall("p/m", "c1"), {"before": [1]})
        self.assertEqual(thoughts.recall("p/m", "c1"), {"before": [1]})
        for name, model, call_id in (("another model", "p/n", "c1"), ("another call", "p/m", "c2")):
            with self.subTest(name):
                self.assertEqual(thoughts.recall(model, call_id), {})

    def test_what_comes_back_is_nobody_elses_object(self):
        thoughts = proxy.Thoughts()
        thoughts.store("p/m", "c", {"a": []})
        thoughts.recall("p/m", "c")["a"].append(1)
        self.assertEqual(thoughts.recall("p/m", "c"), {"a": []})

    def test_the_oldest_go_first(self):
        size = len(json.dumps({"text": "x"}))
        thoughts = proxy.Thoughts()
        with unittest.mock.patch.object(proxy, "MAX_THOUGHTS_BYTES", 2 * size):
            for call_id in ("a", "b", "a", "c"):
                thoughts.store("p/m", call_id, {"text": "x"})
            known = [bool(thoughts.recall("p/m", call_id)) for call_id in "abc"]
        self.assertEqual(known, [True, False, True])

    def test_after_an_hour_they_are_forgotten(self):
        thoughts = proxy.Thoughts()
        thoughts.store("p/m", "c", {"text": "x"})
        later = time.monotonic() + proxy.THOUGHT_SECONDS
        with unittest.mock.patch.object(proxy.time, "monotonic", return_value=later + 1):
            self.assertEqual(thoughts.recall("p/m", "c"), {})

    def test_a_huge_one_is_not_kept(self):
        thoughts = proxy.Thoughts()
        thoughts.store("p/m", "c", {"text": "x" * (proxy.MAX_THOUGHT_BYTES + 1)})
        self.assertEqual(thoughts.recall("p/m", "c"), {})

    def test_a_thought_stands_before_the_first_call_behind_it_alone(self):
        thinking = {**THINKING_BLOCK, "thinking": "hm", "signature": "s"}
        calls = ({**TOOL_BLOCK, "id": "a"}, {**TOOL_BLOCK, "id": "b"})
        thoughts = proxy.Thoughts()
        form = wire(AT_MESSAGES, thoughts=thoughts)
        for message in blocks((thinking,), *((call,) for call in calls), stop_reason="tool_use"):
            list(form.events(json.dumps(message)))
        self.assertEqual(thoughts.recall(WARM.name, "a"), {"before": [thinking]})
        self.assertEqual(thoughts.recall(WARM.name, "b"), {})

    def test_a_thought_goes_back_before_the_text_that_came_with_its_call(self):
        call = {**asks("c", "{}"), "content": "I look"}
        for url, name, thought in (
            (AT_RESPONSES, "input", {"type": "reasoning", "summary": [], "encrypted_content": "x"}),
            (AT_MESSAGES, "messages", {**THINKING_BLOCK, "signature": "s"}),
        ):
            with self.subTest(name):
                thoughts = proxy.Thoughts()
                form = wire(url, [USER, call, DONE], thoughts=thoughts)
                thoughts.store(WARM.name, "c", {"before": [thought]})
                said_with_call = json.loads(form.body({}))[name][1:]
                if url == AT_MESSAGES:
                    said_with_call = said_with_call[0]["content"]
                self.assertEqual(said_with_call[0], thought)
                self.assertIn("I look", json.dumps(said_with_call[1]))


REASONERS = {
    "DeepSeek": (DEEPSEEK, True),
    "Kimi": (KIMI, True),
    "DeepSeek behind a gateway": (named("openrouter/deepseek/deepseek-r1"), True),
    "another model": (named("openrouter/z-ai/glm-5"), False),
    "another model of a provider called so": (named("my-deepseek/m"), False),
}


class RestoredThoughtsTest(unittest.TestCase):
    def test_reasoning_goes_back_to_who_takes_it(self):
        for name, (model, takes_it) in REASONERS.items():
            with self.subTest(name):
                thoughts = proxy.Thoughts()
                fields = {"reasoning_content": "r", "reasoning_opaque": "o"}
                key = proxy.thought_key("c", "f", "{}")
                thoughts.store(model.name, key, {"message": fields, "call": {}})
                form = wire(AT_CHAT, [asks("c", "{}"), DONE], model, thoughts)
                message = json.loads(form.body({}))["messages"][0]
                self.assertEqual(message.get("reasoning_opaque"), "o")
                self.assertEqual(message.get("reasoning_content"), "r" if takes_it else None)

    # Row: the id of a call with {"a": 1.0, "b": 2}; its arguments in the history; what they get.
    CALLED_AGAIN = {
        "the call as a client writes it": ("functions.f:0", '{ "b": 2, "a": 1 }', "hm"),
        "a call of another conversation": ("functions.f:0", '{"a":3}', proxy.NO_REASONING),
        "a short id of another conversation": ("call_0", '{"a":3}', proxy.NO_REASONING),
        "a client that fills in defaults": ("call_Zb8CcXyWv1dTKQ", '{"a":1,"b":2,"c":0}', "hm"),
    }

    def test_reasoning_goes_back_with_its_own_call_where_ids_are_used_again(self):
        for name, (call_id, arguments, reasoning) in self.CALLED_AGAIN.items():
            with self.subTest(name):
                thoughts = proxy.Thoughts()
                call = function_call('{"a":1.0,"b":2}', "f", index=0, id=call_id)
                form = wire(AT_CHAT, model=KIMI, thoughts=thoughts)
                for datum in (chunk(reasoning_content="hm"), chunk("tool_calls", call=call)):
                    list(form.events(json.dumps(datum)))
                list(form.end())
                messages = [asks(call_id, arguments), DONE]
                body = json.loads(wire(AT_CHAT, messages, KIMI, thoughts).body({}))
                self.assertEqual(body["messages"][0]["reasoning_content"], reasoning)


class ReasoningService:
    """A provider that gives its reasoning along with each call, and refuses a call without it.

    It calls a tool three times, then answers; `step` counts the calls that it sees in a request.
    """

    CALLS = 3

    def __call__(self, exchange):
        step = exchange.raw.count(b'"city-')
        lost = [number for number in range(step) if not self.is_there(exchange, number)]
        if lost:
            words = f"the reasoning of call {lost[0]} is missing"
            failing(400, {"error": {"message": words}})(exchange)
            return
        if step == self.CALLS:
            answering(("text", "done"))(exchange)
            return
        exchange.begin()
        exchange.send(*getattr(self, exchange.format.split("/")[0])(step))

    def is_there(self, exchange, number):
        """Tell whether the reasoning of a call stands right before it, exactly as it was given."""
        body = exchange.body
        if exchange.format == "messages":
            blocks = [block for turn in body["messages"] for block in turn["content"]]
            call = next(n for n, block in enumerate(blocks) if block.get("id") == f"id-{number}")
            return {**blocks[call - 1], "cache_control": None} == {
                "type": "thinking",
                "thinking": f"hm {number}",
                "signature": f"sig-{number}",
                "cache_control": None,
            }
        if exchange.format == "responses":
            items = body["input"]
            call = next(n for n, item in enumerate(items) if item.get("call_id") == f"id-{number}")
            reasoning = {"type": "reasoning", "summary": [], "encrypted_content": f"enc-{number}"}
            return items[call - 1] == reasoning
        said = [m for m in body["messages"] if m["role"] == "assistant"][number]
        signature = {"google": {"thought_signature": f"sig-{number}"}}
        return (
            said["reasoning_opaque"] == f"opaque-{number}"
            and said["reasoning_text"] == f"hm {number}"
            and said["tool_calls"][0]["extra_content"] == signature
        )

    @staticmethod
    def arguments(step):
        return json.dumps({"a": f"city-{step}"})

    def messages(self, step):
        events = messages_stream(
            [("thought", f"hm {step}"), ("call", f"id-{step}", "f", [self.arguments(step)])],
            "tool_calls",
        )
        signature = {"type": "signature_delta", "signature": f"sig-{step}"}
        delta = {"type": "content_block_delta", "index": 0, "delta": signature}
        stop = events.index({"type": "content_block_stop", "index": 0})
        return [*events[:stop], delta, *events[stop:]]

    def responses(self, step):
        item = {"type": "reasoning", "id": "rs", "summary": []}
        item["encrypted_content"] = f"enc-{step}"
        done = {"type": "response.output_item.done", "output_index": 9, "item": item}
        events = responses_stream([("call", f"id-{step}", "f", [self.arguments(step)])])
        return [events[0], done, *events[1:]]

    def chat(self, step):
        function = {"name": "f", "arguments": self.arguments(step)}
        call = {"index": 0, "id": f"id-{step}", "type": "function", "function": function}
        call["extra_content"] = {"google": {"thought_signature": f"sig-{step}"}}
        return [
            chat_chunk({"reasoning_text": f"hm {step}", "reasoning_opaque": f"opaque-{step}"}),
            chat_chunk({"tool_calls": [call]}),
            chat_chunk({}, "tool_calls"),
            "[DONE]",
        ]


class RealThoughtsTest(RealCase):
    """A tool loop of clients that know nothing of reasoning, at providers that insist on it."""

    TOOL = {"type": "function", "function": {"name": "f"}}

    def ask(self, model, messages, is_streamed):
        """Return the message that answers, as a client keeps it, without any reasoning."""
        fields = {"model": model, "messages": messages, "tools": [self.TOOL]}
        if not is_streamed:
            status, answer = self.proxy.chat(**fields)
            self.assertEqual(status, 200, answer)
            said = answer["choices"][0]["message"]
            kept = {name: said[name] for name in ("role", "content", "tool_calls") if name in said}
            for call in kept.get("tool_calls", ()):
                call.pop("extra_content", None)
            return kept
        message = proxy.Message()
        for delta in deltas_of(self.proxy.stream(**fields)):
            message.add(delta)
        whole = message.whole()
        calls = [
            {"id": call["id"], "type": "function", "function": call["function"]}
            for call in whole.get("tool_calls", ())
        ]
        return {"role": "assistant", "content": whole["content"], "tool_calls": calls}

    def loop(self, model, is_streamed, after_call=lambda: None):
        """Answer calls until there are none; return what was said last, and how many POSTs."""
        messages = [{"role": "user", "content": "q"}]
        for _ in range(ReasoningService.CALLS + 1):
            said = self.ask(model, messages, is_streamed)
            messages.append({name: value for name, value in said.items() if value})
            if not said.get("tool_calls"):
                break
            (call,) = said["tool_calls"]
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": "r"})
            after_call()
        return said["content"], len(self.upstream.exchanges)

    def test_a_loop_of_three_calls_passes(self):
        self.upstream.respond = ReasoningService()
        for name, model in FORMATS.items():
            for is_streamed in (False, True):
                with self.subTest(name, is_streamed=is_streamed):
                    self.proxy.pool.thoughts = proxy.Thoughts()
                    self.upstream.exchanges.clear()
                    self.assertEqual(self.loop(model, is_streamed), ("done", 4))

    def test_what_is_forgotten_is_not_invented(self):
        self.upstream.respond = answering(("call", "c", "f", ["{}"]), finish="tool_calls")
        for name, model in FORMATS.items():
            with self.subTest(name):
                self.upstream.exchanges.clear()
                said = self.ask(model, [{"role": "user", "content": "q"}], False)
                self.proxy.pool.thoughts = proxy.Thoughts()
                result = {"role": "tool", "tool_call_id": "c", "content": "r"}
                self.ask(model, [{"role": "user", "content": "q"}, said, result], False)
                raw = self.upstream.exchanges[-1].raw
                for word in (b"thinking", b'encrypted_content":', b"reasoning_opaque"):
                    self.assertNotIn(word, raw)


# ------------------------------------------------------------------------------------------- images
class ImageStore(http.server.BaseHTTPRequestHandler):
    """Serves what its path names: an image, something else, or the way to another place."""

    PNG = base64.b64decode(PNG)
    protocol_version = "HTTP/1.1"
    log_message = unittest.mock.Mock()

    def do_GET(self):
        name, _, argument = self.path[1:].partition("?")
        if name == "drip":
            self.drip(*urllib.parse.unquote_to_bytes(argument).split(b"&"))
            return
        status, headers, body = 200, {"Content-Type": "image/png"}, self.PNG
        if name == "page":
            headers, body = {"Content-Type": "text/html"}, b"<html>"
        elif name == "gone":
            status, body = 404, b""
        elif name == "large":
            body = b"x" * (proxy.MAX_IMAGE_BYTES + 1)
        elif name == "slow":
            self.server.released.wait(DEADLINE)
        elif name == "moved":
            status, headers, body = 302, {"Location": urllib.parse.unquote(argument)}, b""
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def drip(self, beginning, piece):
        """Answer with a beginning, and then with a piece now and then, as long as somebody reads."""
        self.close_connection = True
        with contextlib.suppress(ConnectionError):
            self.wfile.write(beginning)
            while not self.server.released.wait(0.02):
                self.wfile.write(piece)


class ImageStoreCase(unittest.TestCase):
    """A store of images on loopback, which counts as public, but for 127.0.0.2."""

    def setUp(self):
        self.store = LoopbackServer(ImageStore)
        self.store.released = threading.Event()
        self.url = self.store.url
        self.addCleanup(self.store.close)
        self.addCleanup(self.store.released.set)
        patch = unittest.mock.patch.object(
            proxy, "is_public", lambda address: address != "127.0.0.2"
        )
        patch.start()
        self.addCleanup(patch.stop)


class ImageTest(ImageStoreCase):
    DATA_URL = "data:image/png;base64," + PNG

    def fetch(self, *paths):
        return proxy.fetch_images([self.url + path for path in paths], lambda: None)

    def test_images_come_as_data_urls_wherever_they_are_by_now(self):
        twice = "/moved?" + urllib.parse.quote(self.url + "/moved?/a.png")
        paths = ("/a.png", "/moved?/a.png", twice)
        expected = {self.url + path: self.DATA_URL for path in paths}
        self.assertEqual(self.fetch(*paths), expected)

    def test_what_is_no_image_of_the_internet_is_refused(self):
        private = urllib.parse.quote(f"http://127.0.0.2:{self.store.server_port}/a.png")
        named = urllib.parse.quote(f"http://me@127.0.0.1:{self.store.server_port}/a.png")
        for name, path, words in (
            ("a page", "/page", "it is no image but text/html"),
            ("gone", "/gone", "its server answered 404"),
            ("too large", "/large", "it is larger than"),
            ("a private address behind a public one", "/moved?" + private, "not a public one"),
            ("a file", "/moved?file%3A///etc/passwd", "no web server"),
            ("a user's name", "/moved?" + named, "no web server"),
            ("in a circle", "/moved?" + "%2Fmoved%3F" * 3 + "/a.png", "more than 3 times"),
        ):
            with self.subTest(name), self.assertRaisesRegex(proxy.ImageError, words) as caught:
                self.fetch("/a.png", path)
            self.assertEqual(caught.exception.url, self.url + path)

    def test_the_reason_quotes_nothing_of_the_url(self):
        """It goes into the log, and a URL may hold a key."""
        for url in (self.url + "/my image.png?key=secret", "http://127.0.0.1:secret/a.png"):
            with self.subTest(url), self.assertRaises(proxy.ImageError) as caught:
                proxy.fetch_images([url], lambda: None)
            self.assertEqual(
                str(caught.exception), "its URL, or what its server answered, is malformed"
            )

    def test_what_does_not_come_in_time_is_given_up(self):
        with unittest.mock.patch.object(proxy, "IMAGE_SECONDS", 0.2):
            with self.assertRaisesRegex(proxy.ImageError, "did not come|timed out"):
                self.fetch("/slow")

    def test_what_never_ends_holds_no_thread(self):
        before = set(threading.enumerate())
        for name, beginning, piece in (
            ("a head", "HTTP/1.1 200 OK\r\nX: ", "x"),
            ("heads", "", "HTTP/1.1 100 Continue\r\n\r\n"),
            ("a body", "HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n", "x"),
        ):
            with self.subTest(name), unittest.mock.patch.object(proxy, "IMAGE_SECONDS", 0.2):
                with self.assertRaisesRegex(proxy.ImageError, "did not come|timed out"):
                    self.fetch("/drip?" + urllib.parse.quote(f"{beginning}&{piece}"))
                self.assertTrue(eventually(lambda: set(threading.enumerate()) <= before, SOON))

    def test_over_tls_images_come_from_who_is_trusted_and_in_time(self):
        self.store.socket = server_context().wrap_socket(self.store.socket, server_side=True)
        self.url = self.url.replace("http:", "https:")
        with self.assertRaisesRegex(proxy.ImageError, "certificate"):
            self.fetch("/a.png")

        def trusting_context():
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            return context

        with unittest.mock.patch.object(ssl, "create_default_context", trusting_context):
            self.assertEqual(self.fetch("/a.png"), {self.url + "/a.png": self.DATA_URL})
            drip = urllib.parse.quote("HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n&x")
            before = set(threading.enumerate())
            with unittest.mock.patch.object(proxy, "IMAGE_SECONDS", 0.5):
                with self.assertRaisesRegex(proxy.ImageError, "did not come|timed out"):
                    self.fetch("/drip?" + drip)
            self.assertTrue(eventually(lambda: set(threading.enumerate()) <= before, SOON))

    def test_a_refused_thread_is_said(self):
        refused = RuntimeError("can't start new thread")
        with unittest.mock.patch.object(threading.Thread, "start", side_effect=refused):
            with self.assertRaises(proxy.APIError) as caught:
                self.fetch("/a.png")
        self.assertEqual((caught.exception.status, caught.exception.code), (503, "too_busy"))

    def test_a_client_that_leaves_ends_the_wait(self):
        gone = unittest.mock.Mock(side_effect=proxy.ClientDisconnected("the client hung up"))
        with self.assertRaises(proxy.ClientDisconnected):
            proxy.fetch_images([self.url + "/slow"], gone)

    ADDRESSES = (
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
        ("64:ff9b:1::7f00:1", False),
        ("fec0::2", False),
        ("::127.0.0.1", False),
    )

    def test_only_addresses_of_the_internet_are_public(self):
        unittest.mock.patch.stopall()
        is_public = self.real_is_public
        for address, expected in self.ADDRESSES:
            with self.subTest(address):
                self.assertEqual(is_public(address), expected)

    real_is_public = staticmethod(proxy.is_public)

    URL = "https://x.example/a.png"
    PLACES = (
        (
            "chat completions",
            {
                "messages": [
                    {"content": [{"type": "image_url", "image_url": {"url": URL, "detail": "low"}}]}
                ]
            },
            {
                "messages": [
                    {
                        "content": [
                            {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}}
                        ]
                    }
                ]
            },
            "messages[0].content[0].image_url.url",
        ),
        (
            "a plain string",
            {"messages": [{"content": [{"type": "image_url", "image_url": URL}]}]},
            {"messages": [{"content": [{"type": "image_url", "image_url": DATA_URL}]}]},
            "messages[0].content[0].image_url",
        ),
        (
            "responses",
            {"input": [{"output": [{"type": "input_image", "image_url": URL}]}]},
            {"input": [{"output": [{"type": "input_image", "image_url": DATA_URL}]}]},
            "input[0].output[0].image_url",
        ),
        (
            "messages",
            {"messages": [{"content": [{"type": "image", "source": {"type": "url", "url": URL}}]}]},
            {
                "messages": [
                    {
                        "content": [
                            {
                                "type": "image",
                                "source": {
                                    "type": "base64",
                                    "media_type": "image/png",
                                    "data": PNG,
                                },
                            }
                        ]
                    }
                ]
            },
            "messages[0].content[0].source.url",
        ),
    )

    def test_every_format_has_its_place_for_an_image(self):
        for name, before, after, param in self.PLACES:
            with self.subTest(name):
                body = json.loads(json.dumps(before))
                ((holder, key, place),) = proxy.image_places(body)
                proxy.put_image(holder, key, self.DATA_URL)
                self.assertEqual((body, place), (after, param))

    def test_other_urls_stay(self):
        document = {"type": "document", "source": {"type": "url", "url": self.URL}}
        data = {"type": "image_url", "image_url": {"url": self.DATA_URL}}
        body = {
            "messages": [{"content": [document, data, {"type": "text", "text": self.URL}]}],
            "user": self.URL,
        }
        self.assertEqual(list(proxy.image_places(body)), [])


class RealImageTest(RealCase, ImageStoreCase):
    """Copilot gets what is at a URL; other services get the URL, and fetch it themselves."""

    def setUp(self):
        RealCase.setUp(self)
        ImageStoreCase.setUp(self)

    def ask(self, model, path="/a.png"):
        part = {"type": "image_url", "image_url": {"url": self.url + path}}
        return self.proxy.chat([part], model=model)

    def test_copilot_gets_the_image_itself(self):
        for name, model in FORMATS.items():
            with self.subTest(name):
                self.upstream.exchanges.clear()
                self.assertEqual(self.ask(model)[0], 200)
                self.assertIn(PNG.encode(), self.exchange().raw)
                self.assertNotIn(self.url.encode(), self.exchange().raw)

    def test_others_get_the_url(self):
        self.assertEqual(self.ask("local/m")[0], 200)
        self.assertIn(self.url.encode(), self.exchange().raw)

    def test_what_cannot_be_fetched_is_a_400_that_says_why(self):
        status, answer = self.ask(CHAT, "/page")
        error = answer["error"]
        self.assertEqual((status, error["param"]), (400, "messages[0].content[0].image_url.url"))
        self.assertIn("it is no image but text/html", error["message"])
        self.assertEqual(self.upstream.exchanges, [])

    def test_without_fetching_the_service_is_asked(self):
        with unittest.mock.patch.object(self.proxy.server.settings, "fetch_images", False):
            self.assertEqual(self.ask(CHAT)[0], 200)
        self.assertIn(self.url.encode(), self.exchange().raw)


if __name__ == "__main__":
    unittest.main()
