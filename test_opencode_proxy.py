"""Tests of opencode_proxy, ordered like the program. Run with `python3 -m unittest -v` in this folder.

Pure functions are tested by tables; faults that the real opencode cannot be made to show by a fake one; everything
else by the real opencode, whose provider is a loopback server of this file (Upstream). Tests that need opencode or a
client library skip where it is missing, and fail instead when OPENCODE_PROXY_TEST_ALL=1 (as in CI).
"""
from __future__ import annotations

import asyncio
import contextlib
import http.client
import http.server
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock

import opencode_proxy as proxy

HERE = pathlib.Path(__file__).resolve().parent
DEADLINE = 120.0  # for what must happen; long, because machines are slow when they are busy
ALL = os.environ.get("OPENCODE_PROXY_TEST_ALL") == "1"


def eventually(condition, seconds=DEADLINE):
    """Return the first true value of `condition()`, or its last one after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > deadline:
            return value
        time.sleep(0.02)


def missing(what):
    """Skip a test for want of `what`, or fail it where everything must be there."""
    if ALL:
        raise AssertionError(what + " is missing, and OPENCODE_PROXY_TEST_ALL=1")
    raise unittest.SkipTest(what + " is missing")


# ------------------------------------------------------------------------------------------- loopback upstream

class Upstream(http.server.ThreadingHTTPServer):
    """A model provider on loopback: records each request, answers as `respond(exchange)` says."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        self.exchanges = []
        self.respond = answer_text
        super().__init__(("127.0.0.1", 0), Exchange)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def handle_error(self, request, client_address):
        pass

    def close(self):
        self.shutdown()
        self.thread.join()
        self.server_close()


class Exchange(http.server.BaseHTTPRequestHandler):
    """One request to the upstream."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def finish(self):
        if not self.wfile.closed:
            super().finish()

    def do_POST(self):
        self.raw = self.rfile.read(int(self.headers["Content-Length"]))
        self.body = json.loads(self.raw)
        self.format = "/".join(urlpath(self.path)[-2:]) if self.path.endswith("completions") else urlpath(self.path)[-1]
        self.closed_by_client = threading.Event()
        self.server.exchanges.append(self)
        self.server.respond(self)

    def do_GET(self):  # opencode looks for a list of models at some providers
        self.send_error(404)

    def log_message(self, *args):
        pass

    def begin(self, status=200, content_type="text/event-stream", **headers):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()

    def send(self, *events):
        for event in events:
            name = f"event: {event['type']}\n" if isinstance(event, dict) and self.format == "messages" else ""
            data = event if isinstance(event, str) else json.dumps(event)
            self.wfile.write(f"{name}data: {data}\n\n".encode())

    def wait_closed(self):
        """Wait until the other side closes the connection."""
        self.connection.settimeout(DEADLINE)
        with contextlib.suppress(OSError):
            if self.connection.recv(1) == b"":
                self.closed_by_client.set()

    def drop(self):
        """Close the connection in the middle of an answer, with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        for stream in (self.rfile, self.wfile, self.connection):
            stream.close()
        self.close_connection = True


def urlpath(path):
    return path.partition("?")[0].strip("/").split("/")


USAGE = {"prompt_tokens": 11, "completion_tokens": 20, "total_tokens": 31,
         "prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 7}}


def chat_chunk(delta, finish=None):
    return {"id": "up", "object": "chat.completion.chunk", "created": 1, "model": "m",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def stream_of(wire_format, parts, finish="stop"):
    """Return the provider's events for an answer: `parts` are ("text"|"thought", text) or ("call", id, name, pieces)."""
    return {"chat/completions": chat_stream, "responses": responses_stream, "messages": messages_stream}[wire_format](
        parts, finish)


def chat_stream(parts, finish):
    events, calls = [chat_chunk({"role": "assistant", "content": ""})], 0
    for part in parts:
        if part[0] == "text":
            events.append(chat_chunk({"content": part[1]}))
        elif part[0] == "thought":
            events.append(chat_chunk({"reasoning_content": part[1]}))
        else:
            events.append(chat_chunk({"tool_calls": [{"index": calls, "id": part[1], "type": "function",
                                                      "function": {"name": part[2], "arguments": ""}}]}))
            events += [chat_chunk({"tool_calls": [{"index": calls, "function": {"arguments": piece}}]}) for piece in part[3]]
            calls += 1
    usage = {**chat_chunk({}), "choices": [], "usage": USAGE}
    return [*events, chat_chunk({}, finish), usage, "[DONE]"]


def responses_stream(parts, finish):
    events = [{"type": "response.created", "response": {"id": "r", "created_at": 1, "model": "m"}}]
    for index, part in enumerate(parts):
        place = {"output_index": index, "item_id": f"i{index}"}
        if part[0] == "text":
            item = {"type": "message", "id": f"i{index}", "role": "assistant", "content": []}
            events += [{"type": "response.output_item.added", **place, "item": item},
                       {"type": "response.output_text.delta", **place, "content_index": 0, "delta": part[1]},
                       {"type": "response.output_item.done", **place, "item": item}]
        elif part[0] == "thought":
            item = {"type": "reasoning", "id": f"i{index}", "summary": []}
            events += [{"type": "response.output_item.added", **place, "item": item},
                       {"type": "response.reasoning_summary_part.added", **place, "summary_index": 0},
                       {"type": "response.reasoning_summary_text.delta", **place, "summary_index": 0, "delta": part[1]},
                       {"type": "response.output_item.done", **place, "item": item}]
        else:
            item = {"type": "function_call", "id": f"i{index}", "call_id": part[1], "name": part[2], "arguments": ""}
            events += [{"type": "response.output_item.added", **place, "item": item}]
            events += [{"type": "response.function_call_arguments.delta", **place, "delta": piece} for piece in part[3]]
            events += [{"type": "response.output_item.done", **place,
                        "item": {**item, "arguments": "".join(part[3]), "status": "completed"}}]
    usage = {"input_tokens": 11, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 20,
             "output_tokens_details": {"reasoning_tokens": 7}}
    why = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(finish)
    kind = "response.incomplete" if why else "response.completed"
    details = {"incomplete_details": {"reason": why}} if why else {}
    return [*events, {"type": kind, "response": {"usage": usage, **details}}]


def messages_stream(parts, finish):
    usage = {"input_tokens": 7, "cache_read_input_tokens": 4, "output_tokens": 1}
    events = [{"type": "message_start", "message": {"id": "m", "type": "message", "role": "assistant", "model": "m",
                                                    "content": [], "usage": usage}}]
    for index, part in enumerate(parts):
        if part[0] == "text":
            block, deltas = {"type": "text", "text": ""}, [{"type": "text_delta", "text": part[1]}]
        elif part[0] == "thought":
            block, deltas = {"type": "thinking", "thinking": ""}, [{"type": "thinking_delta", "thinking": part[1]}]
        else:
            block = {"type": "tool_use", "id": part[1], "name": part[2], "input": {}}
            deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in part[3]]
        events += [{"type": "content_block_start", "index": index, "content_block": block}]
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        events += [{"type": "content_block_stop", "index": index}]
    reason = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}[finish]
    return [*events, {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": {"output_tokens": 20}},
            {"type": "message_stop"}]


def answering(*parts, finish="stop"):
    """Return a `respond` that streams an answer of `parts` in the wire format that it is asked in."""
    def respond(exchange):
        exchange.begin()
        exchange.send(*stream_of(exchange.format, parts, finish))
    return respond


answer_text = answering(("text", "Hel"), ("text", "lo "), ("text", "w\u00f6r\u2028ld"))


def failing(status, body, content_type="application/json", **headers):
    """Return a `respond` that refuses."""
    def respond(exchange):
        data = body if isinstance(body, str) else json.dumps(body)
        exchange.begin(status, content_type, Content_Length=str(len(data.encode())), **headers)
        exchange.wfile.write(data.encode())
    return respond


# ------------------------------------------------------------------------------------------------------- proxies

def settings(**changes):
    """Return the settings of a command line without arguments, with `changes`."""
    values = proxy.read_settings([])
    vars(values).update({"host": "127.0.0.1", "port": 0, **changes})
    return values


class Running:
    """A proxy in this process."""

    closed = False

    def __init__(self, opencode_path, **changes):
        self.settings = settings(**changes)
        self.opencode = proxy.Opencode(opencode_path, self.settings.model)
        self.pool = proxy.Pool(self.opencode, self.settings.max_concurrency, self.settings.max_queue,
                               self.settings.spares, self.settings.requests_per_process)
        self.server = proxy.ProxyServer(self.settings, self.pool)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()
        try:
            self.pool.prove()
        except BaseException:
            self.close()
            raise

    def close(self, grace=0.0):
        if self.closed:
            return
        self.closed = True
        self.server.stop(grace, time.sleep)
        self.thread.join()

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)

    def request(self, method, path, body=None, headers=None):
        """Return (status, headers, body) of one request on a connection of its own."""
        with contextlib.closing(self.connect()) as connection:
            data = body if body is None or isinstance(body, (bytes, str)) else json.dumps(body)
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def chat(self, content="hi", **fields):
        """Return (status, answer) of a chat request that is not streamed."""
        body = {"messages": [{"role": "user", "content": content}], **fields}
        status, _, data = self.request("POST", "/v1/chat/completions", body)
        return status, json.loads(data)

    def stream(self, content="hi", **fields):
        """Return the data of the SSE events of a streamed chat request: objects and "[DONE]"."""
        body = {"messages": [{"role": "user", "content": content}], "stream": True, **fields}
        status, headers, data = self.request("POST", "/v1/chat/completions", body)
        assert status == 200, (status, data)
        return sse_events(data)

    def raw(self, data, half_close=False):
        """Return all bytes that the server answers to `data` until it closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE) as connection:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))


def sse_events(data):
    """Return what is in the events of an SSE stream; fail on anything that is not an event or a comment."""
    events = []
    for block in data.decode().split("\n\n"):
        if block.startswith("data: "):
            events.append(block[6:] if block == "data: [DONE]" else json.loads(block[6:]))
        elif block and not block.startswith(":"):
            raise AssertionError(f"not an event: {block!r}")
    return events


def deltas_of(events):
    """Return the deltas of the chunks among `events`."""
    return [choice["delta"] for event in events if event != "[DONE]" for choice in event.get("choices", ())]


def children():
    """Return the command lines of this process's descendants."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid=,stat=,args="], stdout=subprocess.PIPE, check=True).stdout.decode()
    rows = [line.split(None, 3) for line in found.splitlines()]
    mine, result = {str(os.getpid())}, []
    for pid, parent, stat, args in sorted(rows, key=lambda row: int(row[0])):
        if parent in mine and not args.startswith("ps -eo"):
            mine.add(pid)
            result.append(f"{pid} {stat} {args}")
    return result


def run_directories():
    return list(pathlib.Path(tempfile.gettempdir()).glob("opencode-proxy-*"))


# ---------------------------------------------------------------------------------------------- the real opencode

def real_opencode():
    try:
        return proxy.find_opencode(os.environ.get("OPENCODE_PROXY_TEST_OPENCODE"))
    except proxy.StartError:
        missing("opencode")


CHAT, RESPONSES, MESSAGES = "github-copilot/gpt-5-mini", "github-copilot/gpt-5.4-mini", "github-copilot/claude-sonnet-4.6"
OLD_CLAUDE = "github-copilot/claude-3-5-sonnet"
FORMATS = {"chat/completions": CHAT, "responses": RESPONSES, "messages": MESSAGES}


def make_home(folder, upstream, **more):
    """Make a HOME whose opencode is logged in to GitHub Copilot, at `upstream`; return the environment for it."""
    login = {"github-copilot": {"type": "oauth", "refresh": "x", "access": "x", "expires": 0}}
    copilot = {"options": {"baseURL": upstream.url},
               "models": {name: {"provider": {"npm": "@ai-sdk/anthropic"}} for name in ("claude-sonnet-4.6", "claude-3-5-sonnet")}}
    local = {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": upstream.url + "/v1", "apiKey": "k"}, "models": {"m": {}}}
    google = {"npm": "@ai-sdk/google", "options": {"baseURL": upstream.url + "/google", "apiKey": "k"}, "models": {"m": {}}}
    config = {"provider": {"github-copilot": copilot, "local": local, "other": google}, **more}
    for path, content in ((".local/share/opencode/auth.json", login), (".config/opencode/opencode.json", config)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    return {"HOME": str(folder)}


XDG = ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME")


class RealCase(unittest.TestCase):
    """A proxy with the real opencode and an upstream, shared by the tests of a class."""

    changes = {"requests_per_process": 40, "timeout": 30.0}

    @classmethod
    def setUpClass(cls):
        path = real_opencode()
        cls.resources = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            cls.folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            cls.upstream = Upstream()
            stack.callback(cls.upstream.close)
            clean = {name: value for name, value in os.environ.items() if name not in XDG}
            stack.enter_context(unittest.mock.patch.dict(os.environ, {**clean, **make_home(cls.folder, cls.upstream)}, clear=True))
            cls.proxy = Running(path, **cls.changes)
            stack.callback(cls.proxy.close)
            stack.enter_context(unittest.mock.patch.object(proxy, "log", lambda text: cls.logged.append(text)))
            cls.logged = []
            cls.resources = stack.pop_all()

    @classmethod
    def tearDownClass(cls):
        cls.resources.close()

    def setUp(self):
        self.upstream.respond = answer_text
        self.upstream.exchanges.clear()

    def exchange(self):
        """Return the one exchange with the upstream that the test led to."""
        self.assertEqual(len(self.upstream.exchanges), 1)
        return self.upstream.exchanges[0]


# ------------------------------------------------------------------------------------------------------- errors

class ErrorTest(unittest.TestCase):
    def test_type_follows_status(self):
        for status, kind in ((400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"),
                             (404, "invalid_request_error"), (413, "invalid_request_error"), (429, "rate_limit_error"),
                             (500, "server_error"), (503, "server_error")):
            self.assertEqual(proxy.APIError(status, "m").body(),
                             {"error": {"message": "m", "type": kind, "param": None, "code": None}})

    def test_upstream_error(self):
        def seen(status, body, headers=()):
            error = proxy.upstream_error(status, dict(headers), body)
            return error.status, error.message, error.type, error.param, error.code, error.headers
        table = [
            ((429, '{"error":{"message":"slow","type":"tokens","param":"p","code":"rate"}}', {"retry-after": "7"}),
             (429, "slow", "tokens", "p", "rate", {"Retry-After": "7"})),
            ((400, '{"error":{"message":"no","code":17}}'), (400, "no", "invalid_request_error", None, None, {})),
            ((401, '{"type":"error","error":{"type":"authentication_error","message":"key"}}'),
             (401, "key", "authentication_error", None, None, {})),
            ((403, '{"error":"forbidden"}'), (403, "forbidden", "permission_error", None, None, {})),
            ((422, '{"detail":"wrong"}'), (422, "wrong", "invalid_request_error", None, None, {})),
            ((502, "<html><head><title>502 Bad</title><style>p{}</style></head><body><p>gate\nway</p></body></html>"),
             (502, "The model's provider answered 502 Bad Gateway: 502 Bad gate way", "server_error", None, None, {})),
            ((500, ""), (500, "The model's provider answered 500 Internal Server Error", "server_error", None, None, {})),
            ((302, "[1]"), (502, "The model's provider answered 302 Found: [1]", "invalid_request_error", None, None, {})),
        ]
        table[-1] = (table[-1][0], (502, table[-1][1][1], "server_error", None, None, {}))
        for arguments, expected in table:
            with self.subTest(arguments):
                self.assertEqual(seen(*arguments), expected)
        page = "<html><style>" + "p{}" * 9000 + '</style><p>Unicorn!<img src="data:image/png;base64,' + "A" * 9000  # cut off
        self.assertEqual(seen(502, page)[1], "The model's provider answered 502 Bad Gateway: Unicorn!")
        for body in ("<" * 65536, "<script" * 9000, "<style><" * 9000, "<a" * 30000, "[" * 65536):  # takes no time, and is not an exception
            self.assertEqual(seen(500, body)[0], 500)


# ------------------------------------------------------------------------------------------------------ request

def chat_body(**fields):
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()


class RequestTest(unittest.TestCase):
    def test_defaults(self):
        request = proxy.parse_chat_request(chat_body())
        self.assertEqual((request.model, request.stream, request.include_usage, request.choices, request.stop,
                          request.legacy_functions), (None, False, False, 1, (), False))

    def test_fields(self):
        request = proxy.parse_chat_request(chat_body(model="m", stream=True, stream_options={"include_usage": True}, n=2,
                                                     stop="x", temperature=None, anything={"goes": 1}))
        self.assertEqual((request.model, request.stream, request.include_usage, request.choices, request.stop),
                         ("m", True, True, 2, ("x",)))
        self.assertNotIn("temperature", request.body)
        self.assertEqual(request.body["anything"], {"goes": 1})

    def test_good_messages(self):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        for message in (
                {"role": "system", "content": "s"}, {"role": "developer", "content": [{"type": "text", "text": "s"}]},
                {"role": "user", "content": ""}, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "assistant"}, {"role": "tool", "tool_call_id": "c", "content": "r"},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y"}}]},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
                {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]},
                {"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]},
                {"role": "user", "content": "x", "name": "n", "unknown": [1]}):
            with self.subTest(message):
                proxy.parse_chat_request(json.dumps({"messages": [message]}).encode())

    def assert_invalid(self, data, param=None, text=""):
        with self.assertRaises(proxy.APIError) as caught:
            proxy.parse_chat_request(data)
        self.assertEqual((caught.exception.status, caught.exception.type, caught.exception.param),
                         (400, "invalid_request_error", param), data[:100])
        self.assertIn(text, caught.exception.message)

    def test_not_json(self):
        for data, text in ((b"", "JSON"), (b"{", "JSON"), (b"nul", "JSON"), (b"[]", "object"), (b'"x"', "object"), (b"\xff{}", "UTF-8"),
                           (b'{"a":"\xed\xa0\x80"}', "UTF-8"), (b'{"a":NaN}', "NaN"), (b'{"a":-Infinity}', "Infinity"),
                           (b'{"a":1e999}', "too large"), (b"[" * 100000, "nested"), (b'{"a":' * 100000, "nested"), (b"{}\0", "JSON")):
            with self.subTest(data[:20]):
                self.assert_invalid(data, text=text)

    def test_huge_integer(self):
        data = chat_body()[:-1] + b',"seed":' + b"9" * 5000 + b"}"
        try:
            request = proxy.parse_chat_request(data)
        except proxy.APIError as error:  # Python limits the digits of an integer since 3.10.7
            self.assertEqual(error.status, 400)
        else:
            self.assertEqual(len(str(request.body["seed"])), 5000)

    def test_bad_fields(self):
        wrong = {proxy.STRING: 1, proxy.NUMBER: "1", proxy.INTEGER: 1.5, proxy.BOOLEAN: 1, proxy.OBJECT: [], proxy.ARRAY: {}}
        for name, kinds in proxy.FIELDS.items():
            value = True if len(kinds) > 1 else wrong[kinds[0]]
            with self.subTest(name):
                self.assert_invalid(chat_body(**{name: value}), name, name)
        for name in ("temperature", "max_tokens"):
            self.assert_invalid(chat_body(**{name: True}), name)

    def test_bad_values(self):
        for fields, param in (
                ({"n": 0}, "n"), ({"n": 9}, "n"), ({"stop": ["a", 1]}, "stop[1]"), ({"tools": [1]}, "tools[0]"),
                ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
                ({"functions": [{}]}, "functions[0].name"), ({"function_call": {}}, "function_call.name"),
                ({"tool_choice": {"type": "function", "function": "f"}}, "tool_choice.function"),
                ({"tool_choice": {"function": {"name": 1}}}, "tool_choice.function.name"), ({"stop": ["x"] * 65}, "stop"),
                ({"response_format": {"type": "json_schema"}}, "response_format.json_schema")):
            with self.subTest(fields):
                self.assert_invalid(chat_body(**fields), param)

    def test_bad_messages(self):
        image = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
        for messages, param in (
                (None, "messages"), ("x", "messages"), ([], "messages"), ([1], "messages[0]"),
                ([{"role": "user"}], "messages[0].content"), ([{"role": "user", "content": None}], "messages[0].content"),
                ([{"content": "x"}], "messages[0].role"), ([{"role": ["user"], "content": "x"}], "messages[0].role"),
                ([{"role": "user", "content": 1}], "messages[0].content"),
                ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
                ([{"role": "user", "content": [{"type": "video"}]}], "messages[0].content[0].type"),
                ([{"role": "user", "content": [{"type": ["text"]}]}], "messages[0].content[0].type"),
                ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
                ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages[0].content[0].image_url"),
                ([{"role": "user", "content": [image]}], "messages[0].content[0].image_url.url"),
                ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
                ([{"role": "function", "content": "x"}], "messages[0].name"),
                ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].id"),
                ([{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}],
                 "messages[0].tool_calls[0].function.arguments")):
            with self.subTest(messages):
                self.assert_invalid(json.dumps({"messages": messages}).encode(), param)

    def test_fuzz(self):
        """Whatever comes, it is a request or a 400."""
        seeded = random.Random(4141)
        parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                 {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, {"type": "file", "file": {"file_data": "data:a/b;base64,AAAA"}}]
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
        good = chat_body(messages=[
            {"role": "system", "content": "s"}, {"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": parts[:2]}, {"role": "assistant", "function_call": call["function"]},
            {"role": "function", "name": "f", "content": "r"}],
            tools=[{"type": "function", "function": {"name": "f"}}], tool_choice={"type": "function", "function": {"name": "f"}}, stop=["a"], n=2,
            stream_options={"include_usage": True}, response_format={"type": "json_schema", "json_schema": {}}, functions=[{"name": "f"}], function_call={"name": "f"})
        values = [None, True, 0, -1, 1.5, "", "x", "text", "function", "custom", [], {}, [None], {"a": None}, [[]], "\ud800", 10 ** 30, "[NaN]", "1e999"]
        keys = ["text", "refusal", "type", "function", "name", "arguments", "content", "file", "image_url", "json_schema", "tool_calls", "tool_choice"]
        for _ in range(int(os.environ.get("OPENCODE_PROXY_TEST_FUZZ", "5000"))):
            if seeded.random() < 0.3:
                data = bytearray(good)
                for _ in range(seeded.randint(1, 8)):
                    data[seeded.randrange(len(data))] = seeded.randrange(256)
            else:
                body = json.loads(good)
                for _ in range(seeded.randint(1, 4)):
                    target = body
                    while isinstance(target, (dict, list)) and target:
                        key = seeded.choice(list(target) if isinstance(target, dict) else range(len(target)))
                        if not isinstance(target[key], (dict, list)) or seeded.random() < 0.3:
                            key = seeded.choice(keys) if isinstance(target, dict) and seeded.random() < 0.2 else key
                            target[key] = json.loads(json.dumps(seeded.choice(values)))
                            break
                        target = target[key]
                data = json.dumps(body).encode()
            try:
                envelope = proxy.envelope(proxy.parse_chat_request(bytes(data)))
                json.dumps(envelope, allow_nan=False)  # which JavaScript could not read
                for overlay in envelope["overlays"].values():
                    json.loads(overlay["add"])
            except proxy.APIError as error:
                self.assertEqual(error.status, 400, data)

    def test_too_deep(self):
        """What can just be read may be too deep to be written."""
        for depth in range(300, 1000, 7):
            deep = b"[" * depth + b"]" * depth
            call = {"id": "c", "function": {"name": "f", "arguments": deep.decode()}}
            for data in (chat_body()[:-1] + b',"x":' + deep + b"}", chat_body(messages=[{"role": "assistant", "tool_calls": [call]}])):
                with contextlib.suppress(proxy.APIError):
                    json.loads(proxy.prompt_of(proxy.parse_chat_request(data)))

    def test_legacy_functions(self):
        request = proxy.parse_chat_request(json.dumps({
            "functions": [{"name": "f", "parameters": {}}], "function_call": {"name": "f"}, "messages": [
                {"role": "user", "content": "q"}, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                {"role": "function", "name": "f", "content": "r"}]}).encode())
        self.assertTrue(request.legacy_functions)
        self.assertEqual(request.body["tools"], [{"type": "function", "function": {"name": "f", "parameters": {}}}])
        self.assertEqual(request.body["tool_choice"], {"type": "function", "function": {"name": "f"}})
        self.assertEqual(request.messages[1:], [
            {"role": "assistant", "content": None,
             "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "r"}])
        self.assertNotIn("functions", request.body)


# ----------------------------------------------------------------------------------------------------- envelope

def envelope_of(*messages, **fields):
    return proxy.envelope(proxy.parse_chat_request(json.dumps({"messages": list(messages), **fields}).encode()))


USER = {"role": "user", "content": "q"}


class EnvelopeTest(unittest.TestCase):
    def test_conversation(self):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
        envelope = envelope_of({"role": "system", "content": "s"}, USER, {"role": "developer", "content": [{"type": "text", "text": "d"}]},
                               {"role": "assistant", "content": "t", "tool_calls": [call]},
                               {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "r"}]})
        self.assertEqual(envelope["system"], ["s", "d"])
        state = {"status": "completed", "input": {"a": 1}, "output": "r", "title": "", "metadata": {}, "time": {"start": 0, "end": 0}}
        self.assertEqual(envelope["conversation"], [
            {"role": "user", "parts": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "parts": [{"type": "text", "text": "t"}, {"type": "tool", "callID": "c", "tool": "f", "state": state}]}])

    def test_results_belong_to_the_call_before_them(self):
        call = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
        turn = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "1"}]
        envelope = envelope_of(*turn, turn[0], {"role": "tool", "tool_call_id": "c", "content": "2"}, turn[0])
        self.assertEqual([part["state"]["output"] for turn in envelope["conversation"] for part in turn["parts"]], ["1", "2", ""])
        twice = [{"role": "assistant", "tool_calls": [call, {**call, "type": None}]}, *({**turn[1], "content": text} for text in "12")]
        envelope = envelope_of(*turn, *twice)
        self.assertEqual([part["state"]["output"] for turn in envelope["conversation"] for part in turn["parts"]], ["1", "1", "2"])

    def test_arguments_that_are_not_json(self):
        for arguments in ("", "{", "[NaN]", "1e999", "[" * 100000):
            call = {"id": "c", "function": {"name": "f", "arguments": arguments}}
            envelope = envelope_of({"role": "assistant", "tool_calls": [call, {"id": "d", "type": "custom", "custom": {}}]})
            (part,) = envelope["conversation"][0]["parts"]
            self.assertEqual(part["state"]["input"], {})

    def test_only_system(self):
        self.assertEqual(envelope_of({"role": "system", "content": "s"})["conversation"],
                         [{"role": "user", "parts": [{"type": "text", "text": " "}]}])

    def test_chat_completions_is_verbatim(self):
        fields = {"temperature": 0.5, "seed": 12345678901234567890, "logit_bias": {"50256": -100}, "unknown": {"z": 1.0, "a": None}}
        overlay = envelope_of(USER, model="m", stream=True, n=2, **fields)["overlays"]["chat/completions"]
        self.assertEqual(overlay["add"], '{"messages":[{"role":"user","content":"q"}],"temperature":0.5,"seed":12345678901234567890,'
                                         '"logit_bias":{"50256":-100},"unknown":{"z":1.0,"a":null}}')
        self.assertIn("max_tokens", overlay["remove"])
        self.assertIn("unknown", overlay["remove"])
        self.assertNotIn("model", overlay["remove"])

    def test_text_survives(self):
        for text in ("w\u00f6rld \u2028 \U0001f600", "\ud800 lone", "{file:/etc/passwd} {env:HOME}", "/help", '"\\\n\0'):
            add = envelope_of({"role": "user", "content": text})["overlays"]["chat/completions"]["add"]
            add.encode()
            self.assertEqual(json.loads(add)["messages"][0]["content"], text)

    def test_attachments_pass_as_markers(self):
        payload = "QUJD" * 1000
        envelope = envelope_of({"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:image/JPEG;base64," + payload, "detail": "low"}},
            {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
            {"type": "input_audio", "input_audio": {"data": payload, "format": "mp3"}},
            {"type": "file", "file": {"file_data": "data:application/pdf;base64," + payload, "filename": "f.pdf"}},
            {"type": "image_url", "image_url": {"url": "data:image/svg+xml,<svg/>"}}, {"type": "file", "file": {"file_id": "f"}}]})
        self.assertEqual(json.dumps(envelope).count(payload), 3)
        token = envelope["token"]
        (first, _), (second, _), (third, _) = envelope["payloads"]
        self.assertEqual([first, second, third], [token + "0001", token + "0002", token + "0003"])
        markers = [token + f"{n:04x}" for n in range(4, 10)]
        self.assertEqual(envelope["conversation"][0]["parts"],
                         [{"type": "file", "mime": "image/png", "url": "data:image/png;base64," + marker} for marker in markers])
        self.assertEqual([found for found, _ in envelope["overlays"]["responses"]["replace"]],
                         [f'"type":"input_image","image_url":"data:image/png;base64,{marker}"' for marker in markers])
        self.assertEqual([found for found, _ in envelope["overlays"]["messages"]["replace"]],
                         [f'"type":"image","source":{{"type":"base64","media_type":"image/png","data":"{marker}"}}' for marker in markers])
        audio = f'"type":"input_audio","input_audio":{{"data":"{second}","format":"mp3"}}'
        self.assertEqual([meant for _, meant in envelope["overlays"]["responses"]["replace"]], [
            f'"type":"input_image","image_url":"data:image/JPEG;base64,{first}","detail":"low"', '"type":"input_image","image_url":"https://example.com/a.png"',
            audio, f'"type":"input_file","file_data":"data:application/pdf;base64,{third}","filename":"f.pdf"',
            '"type":"input_image","image_url":"data:image/svg+xml,<svg/>"', '"type":"input_file","file_id":"f"'])
        self.assertEqual([meant for _, meant in envelope["overlays"]["messages"]["replace"]], [
            f'"type":"image","source":{{"type":"base64","media_type":"image/jpeg","data":"{first}"}}',
            '"type":"image","source":{"type":"url","url":"https://example.com/a.png"}', audio,
            f'"type":"document","source":{{"type":"base64","media_type":"application/pdf","data":"{third}"}},"title":"f.pdf"',
            '"type":"image","source":{"type":"url","url":"data:image/svg+xml,<svg/>"}', '"type":"file","file":{"file_id":"f"}'])

    def test_hostile_attachments_take_no_time(self):
        """Each of these took quadratic time once: it would be hours."""
        for url in ("data:" + "a" * (1 << 22) + ",x", "data:" + ";base64" * (1 << 19) + ",x", "data:" + ";" * (1 << 22) + ";base64,x"):
            envelope_of({"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]})

    def test_base64_with_line_breaks_is_left_as_it_is(self):
        url = "data:image/png;base64,AAAA\nBBBB\n"
        envelope = envelope_of({"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]})
        self.assertEqual(envelope["payloads"], [])
        self.assertEqual(json.loads(envelope["overlays"]["chat/completions"]["add"])["messages"][0]["content"][0]["image_url"]["url"], url)
        self.assertIn(json.dumps(url), envelope["overlays"]["responses"]["replace"][0][1])
        self.assertIn('"data":"AAAA\\nBBBB\\n"', envelope["overlays"]["messages"]["replace"][0][1])

    def test_odd_tools(self):
        tools = [{"type": "function", "function": {"name": "f", "description": None, "parameters": {}}}, {"type": "custom", "custom": {"name": "c"}}]
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}
        overlays = envelope_of(USER, tools=tools, tool_choice=choice)["overlays"]
        none = {"type": "object", "properties": {}}
        self.assertEqual(json.loads(overlays["responses"]["add"]), {"tool_choice": choice, "tools": [
            {"type": "function", "name": "f", "description": None, "parameters": none, "strict": False}, tools[1]]})
        self.assertEqual(json.loads(overlays["messages"]["add"]), {"tool_choice": choice, "tools": [{"name": "f", "input_schema": none}, tools[1]]})

    def test_tools_for_each_format(self):
        function = {"name": "a.b", "description": "d", "parameters": {"type": "object", "properties": {"2": {}, "1": {}}}, "strict": True}
        tool = {"type": "function", "function": function}
        schema = '{"type":"object","properties":{"2":{},"1":{}}}'
        responses_tool = '"tools":[{"type":"function","name":"a.b","description":"d","parameters":' + schema + ',"strict":true}]'
        messages_tool = '"tools":[{"name":"a.b","description":"d","input_schema":' + schema + "}]"
        one = {"type": "function", "function": {"name": "a.b"}}
        for choice, in_responses, in_messages in (
                ("auto", '"auto"', '{"type":"auto"}'), ("none", '"none"', '{"type":"none"}'), ("required", '"required"', '{"type":"any"}'),
                (one, '{"type":"function","name":"a.b"}', '{"type":"tool","name":"a.b"}')):
            overlays = envelope_of(USER, tools=[tool], tool_choice=choice)["overlays"]
            self.assertEqual(overlays["responses"]["add"], "{" + responses_tool + ',"tool_choice":' + in_responses + "}")
            self.assertEqual(overlays["messages"]["add"], "{" + messages_tool + ',"tool_choice":' + in_messages + "}")
        overlays = envelope_of(USER, tools=[tool], parallel_tool_calls=False)["overlays"]
        self.assertEqual(overlays["responses"]["add"], '{"parallel_tool_calls":false,' + responses_tool + "}")
        self.assertEqual(overlays["messages"]["add"],
                         "{" + messages_tool + ',"tool_choice":{"type":"auto","disable_parallel_tool_use":true}}')

    def test_response_format(self):
        wanted = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "object"}}}
        overlays = envelope_of(USER, response_format=wanted, verbosity="low")["overlays"]
        self.assertEqual(overlays["responses"]["merge"], {"text": {"verbosity": "low", "format": {
            "type": "json_schema", "name": "n", "strict": True, "schema": {"type": "object"}}}})
        self.assertEqual(overlays["messages"]["merge"], {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}})
        overlays = envelope_of(USER, response_format={"type": "json_object"})["overlays"]
        self.assertEqual((overlays["responses"]["merge"], overlays["messages"]["merge"]), ({"text": {"format": {"type": "json_object"}}}, {}))

    def test_own_settings(self):
        envelope = envelope_of(USER, temperature=0, top_p=1, max_tokens=5, max_completion_tokens=6, reasoning_effort="high", stop="x", user="u")
        self.assertEqual(envelope["params"], {"temperature": 0, "topP": 1, "maxOutputTokens": 6})
        self.assertEqual(envelope["effort"], "high")
        self.assertEqual(envelope["overlays"]["messages"]["add"], '{"stop_sequences":["x"],"metadata":{"user_id":"u"}}')


# ----------------------------------------------------------------------------------------------------- opencode

class CatalogTest(unittest.TestCase):
    catalog = proxy.Catalog(("p/a", "p/b", "q/a"), "p/a", frozenset({"p", "q"}))

    def test_resolve(self):
        for name, model in ((None, "p/a"), ("", "p/a"), ("p/b", "p/b"), ("b", "p/b"), ("q/a", "q/a"), ("gpt-3.5-turbo", "p/a")):
            self.assertEqual(self.catalog.resolve(name), model)

    def test_not_offered(self):
        for name in ("p/c", "x/a", "q/b", "/", "p/"):
            with self.assertRaises(proxy.APIError) as caught:
                self.catalog.resolve(name)
            self.assertEqual((caught.exception.status, caught.exception.code, caught.exception.param), (404, "model_not_found", "model"))

    def test_not_logged_in(self):
        catalog = proxy.Catalog((), proxy.DEFAULT_MODEL, frozenset({"q"}))
        for name in (None, "gpt-4", "github-copilot/gpt-4.1", "github-copilot/other"):
            with self.assertRaises(proxy.APIError) as caught:
                catalog.resolve(name)
            self.assertEqual(caught.exception.status, 503)
            self.assertIn("opencode auth login", caught.exception.message)

    def test_default_and_successors(self):
        def default(names, wanted=None, logins=("github-copilot",)):
            models = [fake_model(name) for name in names]
            catalog = proxy.make_catalog(models, logins, wanted)
            return catalog.default, catalog.models, catalog.declared
        mini, four, copilot = "github-copilot/gpt-5-mini", "github-copilot/gpt-4.1", "github-copilot/"
        self.assertEqual(default([mini, four]), (four, (four, mini), False))
        self.assertEqual(default([copilot + "gpt-5.5", copilot + "x", mini]), (mini, (mini, copilot + "gpt-5.5", copilot + "x"), False))
        self.assertEqual(default([copilot + "x"]), (four, (four, copilot + "x"), True))
        self.assertEqual(default([mini], four), (four, (four, mini), True))
        self.assertEqual(default([mini, "q/a"], "q/a"), ("q/a", ("q/a", mini), False))
        self.assertEqual(default(["opencode/free", mini]), (mini, (mini,), False))  # a cloud service that nobody chose
        self.assertEqual(default(["opencode/free"], "opencode/free"), ("opencode/free", ("opencode/free",), False))
        self.assertEqual(default(["q/a"]), (four, ("q/a",), False))

    def test_parse_models(self):
        text = "p/a\n" + json.dumps({"id": "a", "note": "\n{"}, indent=2) + "\np/b\n" + json.dumps({"id": "b"}, indent=2) + "\n"
        self.assertEqual([model["id"] for model in proxy.parse_models("\n" + text)], ["a", "b"])
        self.assertEqual(proxy.parse_models("nothing"), [])


def fake_model(name):
    provider, _, model = name.partition("/")
    able = {"text": True, "audio": False, "image": False, "video": False, "pdf": False}
    return {"id": model, "providerID": provider, "name": model, "api": {"id": model, "url": "", "npm": "x"}, "status": "active",
            "cost": {"input": 0, "output": 0, "cache": {"read": 0, "write": 0}}, "limit": {"context": 0, "output": 0},
            "capabilities": {"temperature": True, "reasoning": False, "attachment": False, "toolcall": True, "input": able, "output": able,
                             "interleaved": False}, "release_date": "", "variants": {}}


# ------------------------------------------------------------------------------------------------------- process

def parsed(wire_format, events):
    """Return what a parser makes of a provider's events, neighbouring pieces of a tool call joined."""
    parser, found = proxy.PARSERS[wire_format](), []
    for event in events:
        found += parser.feed(event if isinstance(event, str) else json.dumps(event))
        if found and isinstance(found[-1], proxy.Finish):
            break
    return found


class ParserTest(unittest.TestCase):
    usage = proxy.usage_of(11, 20, 4, 7)

    def test_answers(self):
        parts = [("thought", "hm"), ("text", "a"), ("call", "c1", "f", ['{"a": ', "1.0}"]), ("call", "c2", "a.b", [])]
        for wire_format in FORMATS:
            usage = self.usage if wire_format != "messages" else proxy.usage_of(11, 20, 4, 0)
            empty = [] if wire_format == "chat/completions" else [proxy.ToolCallDelta(1, "{}")]
            self.assertEqual(parsed(wire_format, stream_of(wire_format, parts, "tool_calls")), [
                proxy.ReasoningDelta("hm"), proxy.TextDelta("a"), proxy.ToolCallDelta(0, "", "c1", "f"), proxy.ToolCallDelta(0, '{"a": '),
                proxy.ToolCallDelta(0, "1.0}"), proxy.ToolCallDelta(1, "", "c2", "a.b"), *empty, proxy.Finish("tool_calls", usage)], wire_format)

    def test_finish_reasons(self):
        for wire_format in FORMATS:
            for finish in ("stop", "length", "content_filter"):
                self.assertEqual(parsed(wire_format, stream_of(wire_format, [("text", "x")], finish))[-1].reason, finish, wire_format)
        self.assertEqual(parsed("chat/completions", [chat_chunk({}, "eos"), "[DONE]"])[-1].reason, "stop")

    def test_usage(self):
        for told, expected in (({"prompt_tokens": 3, "completion_tokens": 4}, proxy.usage_of(3, 4, 0, 0)), (None, proxy.usage_of(0, 0, 0, 0)),
                               ({**USAGE, "extra": 1}, {**USAGE, "extra": 1})):
            self.assertEqual(parsed("chat/completions", [{"choices": [], "usage": told}, chat_chunk({}, "stop"), "[DONE]"])[-1].usage, expected)
        usage = {"input_tokens": 1, "cache_read_input_tokens": 2, "cache_creation_input_tokens": 3, "output_tokens": 1}
        events = [{"type": "message_start", "message": {"usage": usage}}, {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 9}},
                  {"type": "message_stop"}]
        self.assertEqual(parsed("messages", events)[-1].usage, proxy.usage_of(6, 9, 2, 0))

    def test_odd_but_understood(self):
        for delta, event in (
                ({"reasoning_text": "r"}, proxy.ReasoningDelta("r")), ({"reasoning": "r"}, proxy.ReasoningDelta("r")), ({"refusal": "no"}, proxy.TextDelta("no")),
                ({"content": [{"type": "text", "text": "a"}]}, proxy.TextDelta("a")),
                ({"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": None}}]}, proxy.ToolCallDelta(0, "", "c", "f"))):
            self.assertEqual(parsed("chat/completions", [chat_chunk(delta)]), [event])
        made = parsed("chat/completions", [chat_chunk({"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "{}"}}]})])
        self.assertRegex(made[0].id, "^call_[0-9a-f]{32}$")
        self.assertEqual(made[1], proxy.ToolCallDelta(0, "{}"))
        calls = [{"index": 0, "id": name, "function": {"name": name, "arguments": "{}"}} for name in ("c", "d")]  # all of one index
        more = {"index": 0, "id": "other", "function": {"arguments": " "}}  # a new id without a name is no new call
        self.assertEqual(parsed("chat/completions", [chat_chunk({"tool_calls": [call]}) for call in [*calls, more]]), [
            proxy.ToolCallDelta(0, "", "c", "c"), proxy.ToolCallDelta(0, "{}"), proxy.ToolCallDelta(1, "", "d", "d"),
            proxy.ToolCallDelta(1, "{}"), proxy.ToolCallDelta(1, " ")])
        again = [chat_chunk({"tool_calls": [{"index": 0, "id": name, "function": {"name": "f", "arguments": name}}]}) for name in "abac"]
        self.assertEqual([(delta.index, delta.arguments) for delta in parsed("chat/completions", again)],
                         [(0, ""), (0, "a"), (1, ""), (1, "b"), (0, "a"), (2, ""), (2, "c")])
        late = [chat_chunk({"tool_calls": [{"index": 0, **more, "function": {"name": "f"}}]}) for more in ({}, {"id": "c"})]
        self.assertEqual(len(parsed("chat/completions", late)), 1)
        block = {"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1.0}}}
        self.assertEqual(parsed("messages", [block, {"type": "content_block_stop", "index": 1}]),
                         [proxy.ToolCallDelta(0, "", "c", "f"), proxy.ToolCallDelta(0, '{"a":1.0}')])

    def test_failures(self):
        for wire_format, data, status, text in (
                ("chat/completions", "{no", 502, "not an answer"), ("chat/completions", "[" * 100000, 502, "not an answer"), ("chat/completions", "[]", 502, "not an answer"),
                ("chat/completions", '{"choices":[1]}', 502, "not an answer"), ("chat/completions", "[DONE]", 502, "without saying why"),
                ("chat/completions", '{"error":{"message":"busy","code":429}}', 429, "busy"), ("chat/completions", '{"error":"x"}', 502, "x"),
                ("responses", '{"type":"response.failed","response":{"error":{"code":"server_error","message":"m"}}}', 502, "m"),
                ("responses", '{"type":"error","code":"c","message":"m"}', 502, "m"),
                ("messages", '{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}', 502, "Overloaded"),
                ("messages", '{"type":"content_block_delta","index":5,"delta":{"partial_json":"x"}}', 502, "not an answer")):
            with self.subTest(data), self.assertRaises(proxy.APIError) as caught:
                proxy.PARSERS[wire_format]().feed(data)
            self.assertEqual(caught.exception.status, status)
            self.assertIn(text, caught.exception.message)

    def test_fuzz(self):
        """Whatever a provider sends, it is events or an APIError."""
        seeded = random.Random(4141)
        values = [None, True, 0, -1, "", "x", [], {}, [None], {"a": None}, 1.5]
        for _ in range(3000):
            wire_format = seeded.choice(list(FORMATS))
            events = [event for event in stream_of(wire_format, [("text", "x"), ("call", "c", "f", ["{}"]), ("thought", "t")], "stop") if isinstance(event, dict)]
            target = event = json.loads(json.dumps(seeded.choice(events)))
            while True:
                key = seeded.choice(list(target) if isinstance(target, dict) else range(len(target)))
                if not isinstance(target[key], (dict, list)) or not target[key] or seeded.random() < 0.3:
                    target[key] = json.loads(json.dumps(seeded.choice(values)))
                    break
                target = target[key]
            with contextlib.suppress(proxy.APIError):
                json.dumps([proxy.Choice(("x",)).deltas(found) for found in proxy.PARSERS[wire_format]().feed(json.dumps(event))])

    def test_reports_of_the_plugin(self):
        parser = proxy.OpencodeParser()
        for method, params, events in (
                ("delta", {"type": "text", "text": "x"}, [proxy.TextDelta("x")]), ("delta", {"type": "reasoning", "text": "x"}, [proxy.ReasoningDelta("x")]),
                ("finish", {"finish": "length", "tokens": None}, [proxy.Finish("length", proxy.usage_of(0, 0, 0, 0))]),
                ("finish", {"finish": "content-filter", "tokens": {"input": 7, "output": 13, "reasoning": 7, "cache": {"read": 4, "write": 2}}},
                 [proxy.Finish("content_filter", proxy.usage_of(13, 20, 4, 7))]), ("upstream", {}, [])):
            self.assertEqual(proxy.to_events("proxy/" + method, params, parser), events)
        self.assertEqual(proxy.to_events("proxy/delta", {"type": "text", "text": "x"}, proxy.ChatParser()), [])
        for method, params, status, text in (
                ("finish", {"finish": "unknown"}, 502, "without saying why"), ("error", {"message": "Internal error: x"}, 502, "The answer failed: x"),
                ("error", {"network": "ECONNREFUSED", "message": "no"}, 502, "connection to the model's provider failed: no"), ("end", {}, 502, "without saying why"),
                ("error", {"status": 418, "headers": {}, "body": "{}"}, 418, "418")):
            with self.assertRaises(proxy.APIError) as caught:
                proxy.to_events("proxy/" + method, params, proxy.OpencodeParser())
            self.assertEqual(caught.exception.status, status)
            self.assertIn(text, caught.exception.message)


class InboxTest(unittest.TestCase):
    def test_order_end_and_silence(self):
        inbox = proxy.Inbox()
        inbox.put(b"a")
        inbox.put(b"b")
        self.assertEqual((inbox.get(0), inbox.get(0), inbox.get(0.01)), (b"a", b"b", None))
        inbox.close()
        self.assertEqual(inbox.get(0), b"")

    def test_interruption_comes_first(self):
        inbox = proxy.Inbox()
        inbox.put(b"a")
        inbox.interrupt(proxy.ClientDisconnected())
        self.assertRaises(proxy.ClientDisconnected, inbox.get, 0)

    def test_bounded(self):
        inbox, block = proxy.Inbox(), b"x" * (proxy.MAX_INBOX_BYTES // 2)
        writer = threading.Thread(target=lambda: [inbox.put(block) for _ in range(4)])
        writer.start()
        self.assertTrue(eventually(lambda: inbox._size == 2 * len(block)))
        self.assertTrue(writer.is_alive())
        self.assertEqual([len(inbox.get(DEADLINE)) for _ in range(4)], [len(block)] * 4)
        writer.join()


# ------------------------------------------------------------------------------------------------------ response

class ResponseTest(unittest.TestCase):
    def test_stop_filter_at_every_split(self):
        for text, stops, expected in (("one STOP two", ("STOP",), "one "), ("aab", ("ab",), "a"), ("abcab", ("abd", "cab"), "ab"),
                                      ("no stop", ("x", "opz"), "no stop"), ("xyz", ("yz", "xy"), ""), ("aaa", ("aaaa",), "aaa")):
            for first in range(len(text) + 1):
                for second in range(first, len(text) + 1):
                    stop = proxy.StopFilter(stops)
                    shown = ""
                    for piece in (text[:first], text[first:second], text[second:]):
                        if not stop.hit:
                            shown += stop.feed(piece)
                    self.assertEqual((shown + stop.flush(), stop.hit), (expected, expected != text), (text, first, second))

    def test_choice(self):
        choice = proxy.Choice()
        deltas = [delta for event in (
            proxy.ReasoningDelta("r"), proxy.TextDelta("t"), proxy.ToolCallDelta(0, "", "c", "f"), proxy.ToolCallDelta(0, '{"a":'), proxy.Silence(),
            proxy.ToolCallDelta(1, "", "d", "g"), proxy.ToolCallDelta(0, " 1}"), proxy.ToolCallDelta(1, "{}"), proxy.Finish("tool_calls", USAGE))
            for delta in choice.deltas(event)]
        self.assertEqual(deltas, [
            {"reasoning_content": "r"}, {"content": "t"},
            {"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]},
            {"tool_calls": [{"index": 1, "id": "d", "type": "function", "function": {"name": "g", "arguments": ""}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}]}, {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]}])
        self.assertEqual((choice.finish_reason, choice.usage), ("tool_calls", USAGE))
        self.assertEqual(proxy.message_of(deltas), {
            "role": "assistant", "content": "t", "refusal": None, "reasoning_content": "r", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
                {"id": "d", "type": "function", "function": {"name": "g", "arguments": "{}"}}]})

    def test_choice_with_legacy_functions(self):
        choice = proxy.Choice(legacy_functions=True)
        deltas = [delta for event in (proxy.ToolCallDelta(0, "", "c", "f"), proxy.ToolCallDelta(0, "{"), proxy.ToolCallDelta(1, "", "d", "g"),
                                         proxy.ToolCallDelta(0, "}"), proxy.ToolCallDelta(1, "{}"), proxy.Finish("tool_calls", USAGE))
                  for delta in choice.deltas(event)]
        self.assertEqual(deltas[:2], [{"function_call": {"name": "f", "arguments": ""}}, {"function_call": {"arguments": "{"}}])
        self.assertEqual(proxy.message_of(deltas), {"role": "assistant", "content": None, "refusal": None,
                                                    "function_call": {"name": "f", "arguments": "{}"}})
        self.assertEqual(choice.finish_reason, "function_call")

    def test_choice_cut_at_stop(self):
        choice = proxy.Choice(("##",))
        self.assertEqual(choice.deltas(proxy.TextDelta("a#")) + choice.deltas(proxy.TextDelta("#b")), [{"content": "a"}])
        self.assertEqual((choice.finish_reason, choice.usage), ("stop", None))
        choice = proxy.Choice(("##",))
        choice.deltas(proxy.TextDelta("a#"))
        self.assertEqual(choice.deltas(proxy.Finish("length", USAGE)), [{"content": "#"}])
        self.assertEqual(choice.finish_reason, "length")

    def test_empty_answer(self):
        self.assertEqual(proxy.message_of([]), {"role": "assistant", "content": "", "refusal": None})

    def test_total_usage(self):
        self.assertEqual(proxy.total_usage([USAGE]), USAGE)
        self.assertEqual(proxy.total_usage([USAGE, USAGE])["prompt_tokens_details"], {"cached_tokens": 8})
        self.assertEqual(proxy.total_usage([USAGE, USAGE])["total_tokens"], 62)
        self.assertIsNone(proxy.total_usage([USAGE, None]))
        self.assertEqual(proxy.total_usage([{"a": 1, "b": None, "c": {"d": 1}}, {"a": 2, "b": 3, "c": None}]), {"a": 3, "b": None, "c": {"d": 1}})

    def test_bytes(self):
        with unittest.mock.patch("time.time", lambda: 7.9), unittest.mock.patch("uuid.uuid4", lambda: unittest.mock.Mock(hex="u")):
            plain, counted = proxy.Completion("p/m"), proxy.Completion("p/m", include_usage=True)
        head = b'data: {"id":"chatcmpl-u","object":"chat.completion.chunk","created":7,"model":"p/m","system_fingerprint":"fp_opencode","choices":['
        self.assertEqual(plain.chunk(0, {"content": '"\u2028\ud800'}),
                         head + b'{"index":0,"delta":{"content":"\\"\\u2028\\ud800"},"logprobs":null,"finish_reason":null}]}\n\n')
        self.assertEqual(counted.chunk(1, {}, "stop"), head + b'{"index":1,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}\n\n')
        self.assertEqual(counted.usage_chunk({"a": 1}), head + b'],"usage":{"a":1}}\n\n')
        choice = proxy.Choice()
        choice.deltas(proxy.Finish("stop", USAGE))
        self.assertEqual(plain.whole([(choice, [{"content": "x"}])]), {
            "id": "chatcmpl-u", "object": "chat.completion", "created": 7, "model": "p/m", "system_fingerprint": "fp_opencode", "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "x", "refusal": None}, "logprobs": None, "finish_reason": "stop"}],
            "usage": USAGE})


# --------------------------------------------------------------------------------------------- a fake opencode

FAKE = r'''
import json, os, signal, subprocess, sys, threading, time
MODE = os.environ.get("FAKE_MODE", "")
NAMES = (os.environ.get("FAKE_MODELS") or "github-copilot/gpt-5-mini github-copilot/gpt-5.4-mini local/m").split()
if sys.argv[1] == "models":
    if MODE == "models-odd":
        print("a/b\n" + os.environ["FAKE_ODD"])
        sys.exit()
    if MODE == "models-fail":
        sys.exit("\x1b[91mError: \x1b[0mConfig file at /x/opencode.json is not valid JSON(C)")
    models = json.loads(os.environ["FAKE_CATALOG"])
    for name in NAMES:
        print(name + "\n" + json.dumps({**models, "id": name.partition("/")[2], "providerID": name.partition("/")[0]}, indent=2))
    sys.exit()

def out(**message):
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}, separators=(",", ":")) + "\n")
    sys.stdout.flush()

def tell(method, session, **params):
    out(method="proxy/" + method, params={"sessionId": session, **params})

def delta(session, text, kind="text"):
    tell("delta", session, type=kind, text=text)

def turn(session, envelope):
    if envelope.get("warmup"):
        if MODE == "no-warm":
            return
        return tell("warm", session)
    words = envelope["conversation"][-1]["parts"][0]["text"].split() if envelope["conversation"][-1]["parts"] else [""]
    act, count = words[0] if words else "", int(words[1]) if len(words) > 1 and words[1].isdigit() else 1
    if act == "die-first":
        os._exit(3)
    tell("upstream", session, **({"format": "chat/completions"} if act == "deltas" else {}))
    if act == "die":
        sys.stderr.write("last words\n"); sys.stderr.flush(); delta(session, "a"); os._exit(3)
    if act == "rubbish":
        delta(session, "a"); sys.stdout.write("Segmentation fault\n"); sys.stdout.flush(); time.sleep(60)
    if act == "long-line":
        block = "x" * (1 << 20)
        for _ in range(100):
            sys.stdout.write(block)
        sys.stdout.flush(); time.sleep(60)
    if act == "flood":
        for _ in range(200):
            sys.stderr.write("e" * 100000 + "\n")
    if act == "stubborn":
        delta(session, "a"); time.sleep(60)
    if act == "grandchild":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]); os._exit(0)
    if act == "escaped":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(5)"], start_new_session=True); os._exit(0)
    if act == "silent":
        time.sleep(count)
    if act == "pause":
        delta(session, "a"); time.sleep(count)
    if act == "ask":
        out(id=99, method="session/request_permission", params={"sessionId": session})
        delta(session, json.loads(sys.stdin.readline())["error"]["message"])
    if act == "deltas":
        def sse(data):
            return json.dumps({"jsonrpc": "2.0", "method": "proxy/sse", "params": {"sessionId": session, "data": data}}) + "\n"
        chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{"index": 0, "delta": {"content": "tok "}}]}
        sys.stdout.write(sse(json.dumps(chunk)) * count)
        sys.stdout.write(sse(json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})) + sse("[DONE]"))
        sys.stdout.flush()
    elif act == "slowly":
        for index in range(count):
            delta(session, str(index) + " "); time.sleep(0.05)
    elif act != "nothing":
        delta(session, " ".join(words))
    tell("finish", session, finish="stop", tokens={"input": 1, "output": 2})

if MODE == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if MODE == "crash":
    sys.exit("cannot start")
if MODE == "hang":
    time.sleep(60)
sessions = 0
if MODE == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
for line in iter(sys.stdin.readline, ""):
    message = json.loads(line)
    method, number = message.get("method"), message.get("id")
    if method == "initialize":
        time.sleep(float(os.environ.get("FAKE_START", "0")))
        if MODE != "no-plugin":
            tell("loaded", None)
        out(id=number, result={"agentInfo": {"version": "1.16.9" if MODE == "old" else "1.18.33"}})
    elif method == "session/new":
        sessions += 1
        config = json.loads(os.environ["OPENCODE_CONFIG_CONTENT"])
        if MODE == "loses" and "OPENCODE_MODELS_PATH" in os.environ:
            NAMES = NAMES[:-1]
        offered = [{"value": name} for name in NAMES] + [{"value": config["model"]}] * (MODE == "declares")
        out(id=number, result={"sessionId": "ses_%d_%d" % (os.getpid(), sessions), "configOptions": [
            {"id": "model", "currentValue": config["model"], "options": offered}]})
        if MODE == "deaf":
            time.sleep(60)
    elif method == "session/set_model":
        out(id=number, result={})
    elif method == "session/prompt":
        envelope = json.loads(message["params"]["prompt"][0]["text"])
        if MODE == "blind" and "fifo" in envelope:
            os._exit(3)
        if MODE == "slow" and "fifo" in envelope:
            time.sleep(60)
        if "fifo" in envelope:
            with open(envelope["fifo"]) as fifo:
                envelope = json.load(fifo)
        turn(message["params"]["sessionId"], envelope)
        out(id=number, error={"code": -32603, "message": "Internal error: over"})
'''


class FakeCase(unittest.TestCase):
    """A proxy with a fake opencode, new for every test."""

    changes = {}
    environment = {}

    def setUp(self):
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.before = children()
        stack.callback(self.assert_nothing_left)
        self.folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (self.folder / "tmp").mkdir()
        stack.enter_context(unittest.mock.patch.object(tempfile, "tempdir", str(self.folder / "tmp")))
        self.fake = self.folder / "opencode"
        self.fake.write_text(f"#!{sys.executable}\n{FAKE}")
        self.fake.chmod(0o700)
        self.auth = self.folder / ".local/share/opencode/auth.json"
        self.auth.parent.mkdir(parents=True)
        self.auth.write_text("{}")
        clean = {name: value for name, value in os.environ.items() if name not in XDG and not name.startswith("OPENCODE_PROXY")}
        self.clean = {**clean, "HOME": str(self.folder), "FAKE_CATALOG": json.dumps(fake_model("x/y")), **self.environment}
        stack.enter_context(unittest.mock.patch.dict(os.environ, self.clean, clear=True))
        self.logged = []
        stack.enter_context(unittest.mock.patch.object(proxy, "log", self.logged.append))
        self.stack = stack

    def start(self, **changes):
        running = Running(str(self.fake), **{"spares": 0, **self.changes, **changes})
        self.stack.callback(running.close)
        return running

    @staticmethod
    def post(body=b"", *headers, path="/v1/chat/completions", version="1.1", host="Host: x\r\n"):
        lines = "".join(header + "\r\n" for header in headers)
        return f"POST {path} HTTP/{version}\r\n{host}{lines}\r\n".encode() + body

    def post_chat(self, **fields):
        """Return the bytes of a whole chat request."""
        body = chat_body(**fields)
        return self.post(body, f"Content-Length: {len(body)}")

    def assert_nothing_left(self):
        gone = eventually(lambda: not self.leftovers(), 30)
        self.assertTrue(gone, self.leftovers())
        self.assertEqual([thread.name for thread in threading.enumerate() if thread is not threading.main_thread()
                          and not eventually(lambda: not thread.is_alive(), 30)], [])

    def leftovers(self):
        known = {line.split()[0] for line in self.before}
        return [line for line in children() if line.split()[0] not in known] + (
            list((self.folder / "tmp").iterdir()) if (self.folder / "tmp").exists() else [])


class FaultTest(FakeCase):
    def fails(self, running, content, status, text, **fields):
        got, answer = running.chat(content, **fields)
        self.assertEqual(got, status, answer)
        self.assertIn(text, answer["error"]["message"])
        self.assertEqual(running.chat("well")[1]["choices"][0]["message"]["content"], "well")

    def test_child_that_dies(self):
        running = self.start()
        self.fails(running, "die", 502, "opencode ended: last words")
        self.fails(running, "die-first", 502, "opencode ended")
        events = running.stream("die")
        self.assertEqual(deltas_of(events), [{"role": "assistant", "content": ""}, {"content": "a"}])
        self.assertEqual(events[-2]["error"]["code"], "opencode_failed")
        self.assertEqual(events[-1], "[DONE]")

    def test_child_that_prints_rubbish(self):
        self.fails(self.start(), "rubbish", 502, "Segmentation fault")

    def test_child_that_prints_a_long_line(self):
        self.fails(self.start(), "long-line", 502, "a line of more than")

    def test_child_that_floods_stderr(self):
        status, answer = self.start().chat("flood")
        self.assertEqual((status, answer["choices"][0]["message"]["content"]), (200, "flood"))

    def test_child_that_ignores_sigterm(self):
        os.environ["FAKE_MODE"] = "stubborn"
        with unittest.mock.patch.object(proxy, "STOP_SECONDS", 0.3):
            running = self.start(timeout=0.5)
            self.fails(running, "stubborn", 504, "sent nothing for 0.5 seconds")
            self.assertTrue(eventually(lambda: not running.pool._processes))

    def test_child_that_does_not_read(self):
        running = self.start(timeout=0.5)
        os.environ["FAKE_MODE"] = "deaf"
        status, answer = running.chat("x" * 500_000)
        self.assertEqual((status, answer["error"]["code"]), (502, "opencode_failed"))

    def test_grandchild_that_holds_the_pipe(self):
        self.fails(self.start(), "grandchild", 502, "opencode ended")

    def test_grandchild_that_leaves_the_group(self):
        self.fails(self.start(), "escaped", 502, "opencode ended")

    def test_requests_of_the_child_are_refused(self):
        self.assertEqual(self.start().chat("ask")[1]["choices"][0]["message"]["content"], "refusedask")

    def test_silence(self):
        running = self.start(timeout=0.5)
        self.fails(running, "silent 30", 504, "sent nothing for 0.5 seconds")
        events = running.stream("pause 30")
        self.assertEqual(events[-2]["error"]["code"], "timeout")
        self.assertEqual([choice["finish_reason"] for event in events[:-2] for choice in event["choices"]], [None, None])

    def test_pings(self):
        with unittest.mock.patch.object(proxy, "PING_SECONDS", 0.2):
            running = self.start()
            for content in ("silent 1", "pause 1"):
                body = {"messages": [{"role": "user", "content": content}], "stream": True}
                _, _, data = running.request("POST", "/v1/chat/completions", body)
                self.assertGreaterEqual(data.count(b": keep-alive\n\n"), 2)
                self.assertTrue(data.startswith(b'data: {"id":"chatcmpl-'), data[:50])
                self.assertEqual(deltas_of(sse_events(data))[0], {"role": "assistant", "content": ""})
                self.assertTrue(data.endswith(b"data: [DONE]\n\n"))
            self.assertEqual(running.chat("silent 1")[0], 200)

    def test_error_after_a_ping_is_an_event(self):
        with unittest.mock.patch.object(proxy, "PING_SECONDS", 0.2):
            events = self.start(timeout=0.7).stream("silent 30")
        self.assertEqual((events[-2]["error"]["code"], events[-1]), ("timeout", "[DONE]"))

    def test_client_that_leaves(self):
        running = self.start()
        for stream in (True, False):
            with running.connect().sock or socket.create_connection(("127.0.0.1", running.port)) as connection:
                connection.sendall(self.post_chat(messages=[{"role": "user", "content": "silent 60"}], stream=stream))
                self.assertTrue(eventually(lambda: running.pool._processes))
            self.assertTrue(eventually(lambda: not running.pool._processes, 30))  # half of what the child would take
        self.assertTrue(eventually(lambda: len([line for line in self.logged if " 499 " in line]) == 2), self.logged)

    def test_slow_client_does_not_fill_the_memory(self):
        running = self.start()
        body = json.dumps({"messages": [{"role": "user", "content": "deltas 300000"}], "stream": True})
        with socket.create_connection(("127.0.0.1", running.port), timeout=DEADLINE) as connection:
            connection.sendall(f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            self.assertTrue(connection.recv(100).startswith(b"HTTP/1.1 200"))
            process = next(iter(running.pool._processes))
            self.assertTrue(eventually(lambda: process.inbox._size >= proxy.MAX_INBOX_BYTES))
            time.sleep(0.3)
            self.assertLess(process.inbox._size, proxy.MAX_INBOX_BYTES + (1 << 17))


class StartTest(FakeCase):
    def refused(self, text, **changes):
        with self.assertRaises(proxy.StartError) as caught:
            self.start(**changes)
        self.assertIn(text, str(caught.exception))

    def test_what_does_not_work_is_said(self):
        for mode, text in (("models-fail", "Config file at /x/opencode.json is not valid JSON(C)"), ("crash", "opencode ended: cannot start"),
                           ("old", "opencode 1.16.9 is too old: 1.17.0 or newer"), ("no-plugin", "did not load the proxy's plugin"),
                           ("no-warm", "did not reach the model in the start-up proof")):
            os.environ["FAKE_MODE"] = mode
            with self.subTest(mode):
                self.refused(text)
        os.environ["FAKE_MODE"] = "models-odd"
        for odd in ('{"id": "b", "providerID": "a"}', "{broken", "{}"):
            os.environ["FAKE_ODD"] = odd
            with self.subTest(odd):
                self.refused("opencode cannot be used: ")

    def test_opencode_that_hangs(self):
        os.environ["FAKE_MODE"] = "hang"
        with unittest.mock.patch.object(proxy, "START_SECONDS", 0.5):
            self.refused("opencode did not answer initialize within")

    def test_opencode_that_cannot_be_run(self):
        self.fake.write_text("#!/no/such/interpreter\n")
        self.refused("cannot be run")

    def test_find_opencode(self):
        self.assertEqual(proxy.find_opencode(str(self.fake)), str(self.fake))
        for path, text in ((str(self.folder), "not executable"), ("/no/such/file", "not found")):
            with self.assertRaisesRegex(proxy.StartError, text):
                proxy.find_opencode(path)
        os.environ["PATH"] = "/nowhere"
        if not any(pathlib.Path(folder, "opencode").exists() for folder in ("/usr/local/bin", "/opt/homebrew/bin")):
            with self.assertRaisesRegex(proxy.StartError, "npm install -g opencode-ai"):
                proxy.find_opencode(None)
        installed = self.folder / ".opencode/bin/opencode"
        installed.parent.mkdir(parents=True)
        shutil.copy2(self.fake, installed)
        self.assertEqual(proxy.find_opencode(None), str(installed))

    def test_not_logged_in(self):
        os.environ["FAKE_MODELS"] = "opencode/free"
        running = self.start(spares=1)
        status, answer = running.chat()
        self.assertEqual((status, answer["error"]["code"]), (503, "provider_not_logged_in"))
        status, _, health = running.request("GET", "/health")
        self.assertEqual((status, json.loads(health)["status"]), (503, "unhealthy"))
        self.assertIn("opencode auth login", json.loads(health)["reason"])
        self.assertIn("warning: opencode is not logged in to github-copilot: run `opencode auth login`", proxy.banner(running.server))

        os.environ["FAKE_MODELS"] = "github-copilot/gpt-5-mini"  # the user logs in
        self.auth.write_text('{"github-copilot":{}}')
        self.assertEqual(running.chat("now")[1]["choices"][0]["message"]["content"], "now")
        self.assertEqual(running.request("GET", "/health")[0], 200)

    def test_model_of_the_command_line(self):
        os.environ["FAKE_MODE"] = "declares"
        running = self.start(model="github-copilot/gpt-4.1")
        self.assertEqual(running.chat()[1]["model"], "github-copilot/gpt-4.1")
        self.assertEqual(running.pool.catalog().models[0], "github-copilot/gpt-4.1")
        self.assertNotIn("is not offered", " ".join(proxy.banner(running.server)))

    def test_model_that_opencode_does_not_take(self):
        running = self.start(model="github-copilot/gpt-4.1")  # declared, but not among what the session offers
        status, answer = running.chat()
        self.assertEqual((status, answer["error"]["code"]), (404, "model_not_found"))

    def test_early_requests_wait_for_the_proof(self):
        started, proven = threading.Event(), []
        real = proxy.Pool._read_catalog

        def slowly(pool):
            started.set()
            time.sleep(0.5)
            proven.append(time.monotonic())
            return real(pool)

        with unittest.mock.patch.object(proxy.Pool, "_read_catalog", slowly):
            values = settings(spares=0)
            pool = proxy.Pool(proxy.Opencode(str(self.fake)), spares=0)
            server = proxy.ProxyServer(values, pool)
            threads = [threading.Thread(target=server.serve_forever), threading.Thread(target=pool.prove)]
            for thread in threads:
                thread.start()
            started.wait()
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.server_port)) as connection:
                connection.request("GET", "/v1/models")
                self.assertEqual(connection.getresponse().status, 200)
                self.assertTrue(proven)
            server.stop(0, time.sleep)
            for thread in threads:
                thread.join()


class LoadTest(FakeCase):
    def test_hundred_at_once(self):
        running, answers = self.start(max_concurrency=4, max_queue=200), {}
        most = [0]

        def ask(number):
            most[0] = max(most[0], len(running.pool._processes))
            answers[number] = running.chat(f"number {number} x")

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, (status, answer) in answers.items():
            self.assertEqual((status, answer["choices"][0]["message"]["content"]), (200, f"number {number} x"))
        self.assertEqual(len(answers), 100)
        self.assertLessEqual(most[0], 4)

    def test_queue(self):
        running = self.start(max_concurrency=1, max_queue=1)
        order = []

        def ask(name, content):
            order.append((name, running.chat(content)[0]))

        first = threading.Thread(target=ask, args=("first", "silent 5"))
        first.start()
        self.assertTrue(eventually(lambda: running.pool._processes))
        second = threading.Thread(target=ask, args=("second", "x"))
        second.start()
        self.assertTrue(eventually(lambda: running.pool.slots.waiting()))
        status, headers, body = running.request("POST", "/v1/chat/completions", chat_body())
        self.assertEqual((status, json.loads(body)["error"]["code"], headers["Retry-After"]), (503, "queue_full", "5"))
        first.join()
        second.join()
        self.assertEqual(order, [("first", 200), ("second", 200)])

    def test_waiting_client_that_leaves_frees_its_place(self):
        running = self.start(max_concurrency=1, max_queue=1)
        request = self.post_chat(messages=[{"role": "user", "content": "silent 60"}])
        with socket.create_connection(("127.0.0.1", running.port)) as first:
            first.sendall(request)
            self.assertTrue(eventually(lambda: running.pool._processes))
            with socket.create_connection(("127.0.0.1", running.port)) as second:
                second.sendall(request)
                self.assertTrue(eventually(lambda: running.pool.slots.waiting()))
            self.assertTrue(eventually(lambda: not running.pool.slots.waiting(), 30))
            self.assertEqual(len(running.pool.turns), 1)
        self.assertEqual(running.chat("x")[0], 200)

    def test_spare(self):
        running = self.start(spares=1)
        self.assertEqual(running.pool.status()["spares"], 1)
        spare = running.pool._spares[0].result()
        self.assertEqual(running.chat("x")[0], 200)
        self.assertTrue(eventually(lambda: running.pool.status()["spares"] == 1))
        self.assertIsNot(running.pool._spares[0].result(), spare)
        self.assertTrue(eventually(lambda: not spare.alive()))

    def test_long_prompts_pass_through_a_fifo(self):
        running = self.start(spares=1, requests_per_process=5)
        process = running.pool._spares[0].result()
        for long in ("x" * (1 << 20), "y" * (3 << 20), "z" * 5000):
            self.assertEqual(running.chat(long)[1]["choices"][0]["message"]["content"], long)
        self.assertEqual(process.served, 3)
        self.assertEqual([path.is_fifo() for path in process.home.glob("prompt-*")], [True, True])  # nothing is on disk

    def test_long_prompts_that_are_not_read(self):
        body = chat_body(messages=[{"role": "user", "content": "x" * (3 << 20)}])
        for mode, seconds, expected in (("blind", 60.0, 502), ("slow", 1.0, 504)):
            with self.subTest(mode), unittest.mock.patch.dict(os.environ, {"FAKE_MODE": mode}):
                self.assertEqual(self.start(timeout=seconds).request("POST", "/v1/chat/completions", body)[0], expected)

    def test_spare_that_died(self):
        running = self.start(spares=1)
        os.kill(running.pool._spares[0].result()._popen.pid, signal.SIGKILL)
        self.assertEqual(running.chat("x")[0], 200)

    def test_reused_spare_that_died(self):
        running = self.start(requests_per_process=5)
        self.assertEqual(running.chat("x")[0], 200)
        self.assertTrue(eventually(lambda: running.pool.status()["spares"] == 1))
        with unittest.mock.patch.object(running.pool._spares[0].result(), "_request", side_effect=proxy.ProcessDied("opencode ended")):
            self.assertEqual(running.chat("x")[0], 200)

    def test_reuse_with_as_many_spares_as_turns(self):
        running = self.start(requests_per_process=50, spares=1, max_concurrency=1)
        with unittest.mock.patch.object(running.pool, "new_process", wraps=running.pool.new_process) as started:
            for _ in range(6):
                self.assertEqual(running.chat("x")[0], 200)
                self.assertTrue(eventually(lambda: running.pool.status()["spares"] >= 1))
        self.assertLessEqual(started.call_count, 1)

    def test_clients_that_leave_with_the_finish_chunk_do_no_harm(self):
        running = self.start(requests_per_process=1000, spares=1)
        with unittest.mock.patch.object(running.pool, "_fail", wraps=running.pool._fail) as failed:
            for _ in range(40):
                with socket.create_connection(("127.0.0.1", running.port), timeout=DEADLINE) as connection:
                    connection.sendall(self.post_chat(stream=True))
                    got = b""
                    while b'"finish_reason":"stop"' not in got:
                        block = connection.recv(65536)
                        self.assertTrue(block)
                        got += block
                self.assertTrue(eventually(lambda: not running.pool.turns))
            self.assertEqual(running.chat("x")[0], 200)
        failed.assert_not_called()

    def test_client_that_leaves_while_its_process_starts(self):
        running = self.start(max_concurrency=1)
        with unittest.mock.patch.dict(os.environ, {"FAKE_START": "60"}):
            with socket.create_connection(("127.0.0.1", running.port)) as connection:
                running.pool._spares_wanted = 1
                running.pool.replenish()  # a spare that takes a minute to start
                connection.sendall(self.post_chat())
                self.assertTrue(eventually(lambda: running.pool.status()["running"] and not running.pool._spares))
            self.assertTrue(eventually(lambda: not running.pool.turns, 20))
            self.assertEqual(len(running.pool._spares), 1)

    def test_no_more_threads(self):
        """Where the system refuses a thread, a request fails and nothing else."""
        running = self.start(requests_per_process=2)
        start = threading.Thread.start
        for name in ("_read_stdout", "_reap", "_discard", "_prepare"):
            refused = []

            def start_or_fail(thread, name=name, refused=refused):
                target = getattr(thread, "_target", None)
                cells = [cell.cell_contents for cell in getattr(target, "__closure__", None) or ()]
                if name in [getattr(found, "__name__", "") for found in [target, *cells]] and not refused:
                    refused.append(name)
                    raise RuntimeError("can't start new thread")
                start(thread)

            with unittest.mock.patch.object(threading.Thread, "start", start_or_fail):
                statuses = [running.chat("x")[0] for _ in range(4)]
                self.assertTrue(eventually(lambda: not running.pool.turns))
            self.assertEqual(refused, [name])
            self.assertLessEqual(sum(status != 200 for status in statuses), 1, name)
            self.assertEqual(running.chat("x")[0], 200)

    def test_spare_that_dies_when_it_is_used(self):
        running = self.start(spares=1)
        process = running.pool._spares[0].result()
        with unittest.mock.patch.object(process, "_call", side_effect=proxy.ProcessDied("opencode ended")):
            self.assertEqual(running.chat("x", model="local/m")[0], 200)

    def test_spare_that_keeps_dying(self):
        running = self.start(spares=1)
        os.environ["FAKE_MODE"] = "no-warm"
        self.assertEqual(running.chat("x")[0], 200)
        self.assertTrue(eventually(lambda: running.pool.last_error))
        self.assertGreater(running.pool._retry_at, time.monotonic())
        os.environ["FAKE_MODE"] = ""
        self.assertEqual(running.chat("x")[0], 200)

    def test_spares_that_died_or_are_old_are_replaced(self):
        with unittest.mock.patch.object(proxy, "TEND_SECONDS", 0.1):
            running = self.start(spares=1)
            for end in (lambda process: os.kill(process._popen.pid, signal.SIGKILL),
                        lambda process: setattr(process, "born", process.born - proxy.SPARE_SECONDS)):
                old = running.pool._spares[0].result()
                end(old)
                self.assertTrue(eventually(lambda: running.pool.status()["spares"] == 1 and running.pool._spares[0].result() is not old))

    def test_opencode_that_was_exchanged(self):
        running = self.start()
        os.environ["FAKE_MODE"] = "old"
        status, answer = running.chat("x")
        self.assertEqual((status, answer["error"]["code"]), (502, "opencode_failed"))
        self.assertIn("too old", json.loads(running.request("GET", "/health")[2])["last_error"])

    def test_health_tells_that_opencode_does_not_start(self):
        with unittest.mock.patch.multiple(proxy, TEND_SECONDS=0.1, MAX_RETRY_SECONDS=0.1):
            running = self.start(spares=1)
            os.environ["FAKE_MODE"] = "crash"
            os.kill(running.pool._spares[0].result()._popen.pid, signal.SIGKILL)
            self.assertTrue(eventually(lambda: running.request("GET", "/health")[0] == 503))
            self.assertIn("opencode does not start: opencode ended: cannot start", json.loads(running.request("GET", "/health")[2])["reason"])
            os.environ["FAKE_MODE"] = ""
            self.assertTrue(eventually(lambda: running.request("GET", "/health")[0] == 200))

    def test_models_that_a_trimmed_catalog_would_lose(self):
        os.environ["FAKE_MODE"] = "loses"
        running = self.start()
        self.assertIsNone(running.opencode.catalog.trimmed)
        self.assertEqual(running.chat("x", model="local/m")[0], 200)

    def test_catalog_that_could_not_be_read_is_read_again(self):
        with unittest.mock.patch.multiple(proxy, TEND_SECONDS=0.1, MAX_RETRY_SECONDS=0.1):
            running = self.start()
            os.environ.update(FAKE_MODE="models-fail", FAKE_MODELS="github-copilot/gpt-5-mini new/model")
            self.auth.write_text('{"new":{}}')
            self.assertTrue(eventually(lambda: "failed" in running.pool.last_error))
            os.environ["FAKE_MODE"] = ""
            self.assertTrue(eventually(lambda: "new/model" in running.pool.catalog().models))

    def test_new_login_renews_catalog_and_spares(self):
        with unittest.mock.patch.object(proxy, "TEND_SECONDS", 0.1):
            running = self.start(spares=1)
            old = running.pool._spares[0].result()
            os.environ["FAKE_MODELS"] = "github-copilot/gpt-5-mini new/model"
            self.auth.write_text('{"new":{}}')
            self.assertTrue(eventually(lambda: "new/model" in running.pool.catalog().models))
            self.assertTrue(eventually(lambda: running.pool.status()["spares"] == 1 and running.pool._spares[0].result() is not old))
            self.assertEqual(running.chat("x", model="new/model")[1]["model"], "new/model")

    def test_reuse(self):
        running = self.start(requests_per_process=3, spares=1)
        pids, threads, answers = set(), [], {}

        def ask(number):
            answers[number] = running.chat(f"number {number} x")[1]["choices"][0]["message"]["content"]

        for number in range(12):
            pids |= {process._popen.pid for process in running.pool._processes}
            threads.append(threading.Thread(target=ask, args=(number,)))
            threads[-1].start()
            if number % 2:
                threads[-1].join()
        for thread in threads:
            thread.join()
        self.assertEqual(answers, {number: f"number {number} x" for number in range(12)})
        self.assertLess(len(pids), 12)

    def test_reuse_only_after_a_clean_turn(self):
        running = self.start(requests_per_process=50, timeout=0.5)
        running.chat("x")
        self.assertTrue(eventually(lambda: running.pool.status()["spares"] == 1))
        pid = next(iter(running.pool._processes))._popen.pid
        self.assertEqual(running.chat("silent 30")[0], 504)
        self.assertEqual(running.chat("x")[0], 200)
        self.assertNotIn(pid, [process._popen.pid for process in running.pool._processes])

    def test_reused_processes_end_when_idle(self):
        with unittest.mock.patch.object(proxy, "KEEP_WARM_SECONDS", 0.5), unittest.mock.patch.object(proxy, "TEND_SECONDS", 0.1):
            running = self.start(requests_per_process=50)
            running.chat("x")
            self.assertTrue(eventually(lambda: not running.pool._processes))

    def test_choices_each_have_a_process(self):
        running = self.start(max_concurrency=2)
        status, answer = running.chat("x", n=5)
        self.assertEqual([choice["index"] for choice in answer["choices"]], [0, 1, 2, 3, 4])
        self.assertEqual(answer["usage"]["total_tokens"], 15)
        events = running.stream("slowly 3", n=2, stream_options={"include_usage": True})
        for index in (0, 1):
            mine = [c for event in events[:-1] for c in event["choices"] if c["index"] == index]
            self.assertEqual("".join(c["delta"].get("content", "") for c in mine), "0 1 2 ")
            self.assertEqual(mine[-1]["finish_reason"], "stop")
        self.assertEqual(events[-2]["usage"]["total_tokens"], 6)
        status, answer = running.chat("die", n=3)
        self.assertEqual(status, 502)

    def test_choice_that_is_cut_ends_and_cannot_fail_any_more(self):
        class Turn(proxy.Turn):
            def __init__(self, *events):
                self.told, self._events, self.is_cut = threading.Event(), events, False

            def interrupt(self, error):
                self.told.set()

            def events(self):
                for event in self._events:
                    if isinstance(event, threading.Event):
                        event.wait(DEADLINE)
                    elif isinstance(event, Exception):
                        raise event
                    else:
                        yield event

        first = Turn(proxy.TextDelta("a STOP b"))
        first._events += (first.told, proxy.APIError(502, "broke off"))
        second = Turn(proxy.TextDelta("fine"), first.told, proxy.Finish("stop", USAGE))
        handler = proxy.ProxyHandler.__new__(proxy.ProxyHandler)
        handler._facts, handler._started = {}, 0.0
        choices = [proxy.Choice(("STOP",)), proxy.Choice(("STOP",))]
        events = proxy.run_turns([first, second])
        shown = [(index, deltas) for index, _, deltas in handler._deltas(choices, [first, second], events)]
        self.assertEqual(sorted(shown, key=lambda pair: pair[0]), [(0, [{"content": "a "}]), (1, [{"content": "fine"}]), (1, [])])
        self.assertTrue(first.is_cut)

    def test_stop_sequence_ends_the_process(self):
        running = self.start()
        status, answer = running.chat("slowly 1000", stop=["5 6"])
        self.assertEqual(answer["choices"][0], {"index": 0, "message": {"role": "assistant", "content": "0 1 2 3 4 ", "refusal": None},
                                                "logprobs": None, "finish_reason": "stop"})
        self.assertIsNone(answer["usage"])
        self.assertTrue(eventually(lambda: not running.pool._processes))
        self.assertEqual(len(running.stream("slowly 1000", stop="5")), 8)


# --------------------------------------------------------------------------------------------------------- http

class HTTPTest(FakeCase):
    def answer(self, running, data, half_close=True):
        """Return the status and body of the last answer to `data`, and how many answers came.

        A client that closes its side has hung up: `half_close` is for requests that do not wait for a model.
        """
        got = running.raw(data, half_close)
        self.assertNotIn(b"Traceback", got)
        head, _, body = got[got.rindex(b"HTTP/1.1 "):].partition(b"\r\n\r\n")
        return int(head.split()[1]), body, got.count(b"HTTP/1.1 ")

    def test_routes(self):
        running = self.start()
        status, headers, body = running.request("GET", "/v1/models")
        self.assertEqual(json.loads(body), {"object": "list", "data": [
            {"id": name, "object": "model", "created": running.server.created, "owned_by": name.partition("/")[0]}
            for name in ("github-copilot/gpt-5-mini", "github-copilot/gpt-5.4-mini", "local/m")]})
        for path in ("/v1/models/local/m", "/models/local%2Fm", "/v1/models/local%2fm?x=1", "http://h/v1/models/local/m"):
            self.assertEqual(json.loads(running.request("GET", path)[2])["id"], "local/m", path)
        self.assertEqual(json.loads(running.request("GET", "/v1/models/gpt-5.4-mini")[2])["id"], "github-copilot/gpt-5.4-mini")
        for path in ("/v1/models/nothing", "/v1/models/local/none"):
            status, _, body = running.request("GET", path)
            self.assertEqual((status, json.loads(body)["error"]["code"]), (404, "model_not_found"))
        self.assertEqual(json.loads(running.request("GET", "/health")[2]), {
            "status": "healthy", "reason": None, "version": proxy.__version__, "opencode": "1.18.33", "model": "github-copilot/gpt-5-mini",
            "running": 0, "waiting": 0, "spares": 0, "last_error": None})
        about = running.request("GET", "/")[2].decode()
        self.assertEqual(about.splitlines()[1:], ["status: healthy", f"base URL for apps: http://127.0.0.1:{running.port}/v1"])
        self.assertEqual(running.request("POST", "/chat/completions", chat_body())[0], 200)
        for path in ("/nothing", "/v1", "/v1/completions", "/v1/v1/models", "/modelsx", "//", "/v1models"):
            self.assertEqual(running.request("GET", path)[0], 200 if path in ("//", "/v1") else 404, path)
        self.assertIn(b"HTTP/1.1 404", running.raw(b"GET http://[/v1/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))

    def test_methods(self):
        running = self.start()
        for method, path, allow in (("GET", "/v1/chat/completions", "OPTIONS, POST"), ("DELETE", "/v1/models", "GET, HEAD, OPTIONS"),
                                    ("PUT", "/health", "GET, HEAD, OPTIONS")):
            status, headers, body = running.request(method, path)
            self.assertEqual((status, headers["Allow"], json.loads(body)["error"]["code"]), (405, allow, "method_not_allowed"))
        status, headers, body = running.request("HEAD", "/v1/models")
        self.assertEqual((status, body), (200, b""))
        self.assertGreater(int(headers["Content-Length"]), 100)
        status, headers, body = running.request("OPTIONS", "/v1/models")
        self.assertEqual((status, headers["Allow"], headers["Access-Control-Allow-Methods"]), (204, "GET, HEAD, OPTIONS", None))
        status, body, _ = self.answer(running, b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertEqual((status, json.loads(body)["error"]["type"]), (501, "server_error"))

    def test_model_in_the_answer(self):
        running = self.start()
        for asked, answered in ((None, "github-copilot/gpt-5-mini"), ("gpt-5-mini", "gpt-5-mini"), ("github-copilot/gpt-5.4-mini",) * 2,
                                ("gpt-3.5-turbo", "github-copilot/gpt-5-mini"), ("local/m", "local/m"), ("m", "github-copilot/gpt-5-mini")):
            self.assertEqual(running.chat("x", model=asked)[1]["model"], answered)
        status, answer = running.chat("x", model="no/such")
        self.assertEqual((status, answer["error"]["code"], answer["error"]["param"]), (404, "model_not_found", "model"))
        self.assertIn("GET /v1/models", answer["error"]["message"])

    def test_keep_alive_and_pipelining(self):
        running = self.start()
        body = chat_body()
        one = self.post(body, f"Content-Length: {len(body)}")
        get, end = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        bad = self.post(b"{}", "Content-Length: 2")
        status, _, count = self.answer(running, one + get + bad + one + end, half_close=False)
        self.assertEqual((status, count), (200, 5))
        with_body = b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nGET /"
        self.assertEqual(self.answer(running, with_body + get)[::2], (200, 2))

    def test_refused_bodies_are_not_taken_for_requests(self):
        running = self.start(api_key=["k"])
        body = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        for data in (self.post(body, f"Content-Length: {len(body)}"), self.post(body, f"Content-Length: {len(body)}", path="/none")):
            status, answer, count = self.answer(running, data + body)
            self.assertIn(status, (401, 404))
            self.assertEqual(count, 1)

    def test_framing(self):
        running = self.start()
        body = chat_body()
        length = f"Content-Length: {len(body)}"
        for headers, expected in (
                ([length], 200), ([length, length], 200), ([f"{length}, {len(body)}"], 200), (["Content-Length: +5"], 400), (["Content-Length: 1_0"], 400),
                (["Content-Length: -1"], 400), (["Content-Length: 5", "Content-Length: 6"], 400), (["Content-Length: "], 400),
                (["Content-Length: \u0665"], 400), (["Content-Length: 99999999999999999999"], 400), ([length, "Transfer-Encoding: chunked"], 400),
                (["Transfer-Encoding: gzip"], 501), (["Transfer-Encoding: gzip, chunked"], 501), (["Content-Length : 5"], 400),
                ([length, "Host: y"], 400), ([length, "X Y: 1"], 400), ([length, "no colon"], 400), ([length, "X: " + "y" * 70000], 431),
                ([length] + [f"X-{n}: y" for n in range(120)], 431), (["Content-Length: 99999999999"], 413)):
            with self.subTest(headers=str(headers)[:60]):
                status, answer, _ = self.answer(running, self.post(body, *headers, "Connection: close"), half_close=expected != 200)
                self.assertEqual(status, expected, answer)
                self.assertIn("choices" if expected == 200 else "error", json.loads(answer))
        self.assertEqual(self.answer(running, self.post(body, length, host=""))[0], 400)
        self.assertEqual(self.answer(running, self.post(body, length, host="", version="1.0"), half_close=False)[0], 200)
        for data, expected in ((b"GET\r\n\r\n", 400), (b"GET /health HTTP/x\r\n\r\n", 400), (b"GET /health HTTP/2.0\r\n\r\n", 505),
                               (b"GET / " + b"x" * 70000 + b"\r\n\r\n", 414), (b"\x16\x03\x01\x02\x00\r\n\r\n", 400)):
            status, answer, _ = self.answer(running, data)
            self.assertEqual(status, expected, data[:30])
            self.assertIn("error", json.loads(answer))

    def test_chunked_body(self):
        running = self.start()
        body = chat_body()
        chunked = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(body[n:n + 7]), body[n:n + 7]) for n in range(0, len(body), 7)) + b"0\r\nTrailer: x\r\n\r\n"
        get = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        status, _, count = self.answer(running, self.post(chunked, "Transfer-Encoding: Chunked") + get, half_close=False)
        self.assertEqual((status, count), (200, 2))
        for bad in (b"x\r\n", b"-1\r\n\r\n", b"2\r\nabc\r\n0\r\n\r\n", b"ffffffffffffffffff\r\n"):
            status, answer, count = self.answer(running, self.post(bad, "Transfer-Encoding: chunked") + get)
            self.assertEqual((status, count), (400, 1), bad)
        self.assertEqual(self.answer(running, self.post(b"fffffffff\r\n", "Transfer-Encoding: chunked"))[0], 413)

    def test_body_limit_with_a_readable_refusal(self):
        running = self.start(max_body_size=1000)
        for size in (1001, 5_000_000):
            with contextlib.closing(running.connect()) as connection:
                connection.putrequest("POST", "/v1/chat/completions")
                connection.putheader("Content-Length", str(size))
                connection.endheaders()
                connection.send(b"x" * size)
                response = connection.getresponse()
                self.assertEqual((response.status, json.loads(response.read())["error"]["code"]), (413, "body_too_large"))
        self.assertEqual(running.chat("x" * 900)[0], 200)
        status, headers, _ = running.request("POST", "/v1/chat/completions", b"x" * 1001, {"Origin": "http://localhost:3000"})
        self.assertEqual((status, headers["Access-Control-Allow-Origin"]), (413, "http://localhost:3000"))  # or the page could not read it

    def test_expect_continue(self):
        running = self.start(api_key=["k"])
        body = chat_body()
        for headers, expected in (([], b"HTTP/1.1 401"), (["Authorization: Bearer k"], b"HTTP/1.1 100")):
            with socket.create_connection(("127.0.0.1", running.port), timeout=DEADLINE) as connection:
                connection.sendall(self.post(b"", f"Content-Length: {len(body)}", "Expect: 100-continue", "Connection: close", *headers))
                self.assertEqual(connection.recv(12), expected)
                if not headers:
                    continue
                connection.sendall(body)
                self.assertIn(b"HTTP/1.1 200", b"".join(iter(lambda: connection.recv(65536), b"")))

    def test_has_hung_up_does_not_wait(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(3600.0)
            self.assertFalse(proxy.has_hung_up(ours))
            theirs.sendall(b"x")
            self.assertFalse(proxy.has_hung_up(ours))
            self.assertEqual((ours.recv(1), ours.gettimeout()), (b"x", 3600.0))
            theirs.close()
            self.assertTrue(proxy.has_hung_up(ours))
        self.assertTrue(proxy.has_hung_up(ours))

    def test_slow_requests_end(self):
        with unittest.mock.patch.multiple(proxy, IDLE_SECONDS=0.5, BODY_SECONDS=0.5):
            running = self.start()
            self.assertEqual(running.raw(b"GET / HT"), b"")
            self.assertEqual(running.raw(b""), b"")
            self.assertEqual(self.answer(running, self.post(b"{", "Content-Length: 10"), half_close=False)[0], 408)
            with socket.create_connection(("127.0.0.1", running.port), timeout=DEADLINE) as connection:
                with contextlib.suppress(OSError):  # a drip does not extend the deadline
                    for _ in range(40):
                        connection.sendall(b"G")
                        time.sleep(0.05)
                    self.fail("the connection stayed open")

    def test_thousand_idle_connections(self):
        most = min(1000, (proxy.open_files_allowed() - 300) // 2)
        self.assertGreater(most, 300)
        with unittest.mock.patch.object(proxy, "IDLE_SECONDS", 600.0):
            self.crowd(self.start(), most, range(most, most + 1))

    def test_connections_are_bounded(self):
        with unittest.mock.patch.object(proxy, "MAX_CONNECTIONS", 50):
            self.crowd(self.start(), 120, range(30, 100))  # a thread may start before the last one has counted itself

    def test_busy_connections_are_bounded_too(self):
        with unittest.mock.patch.object(proxy, "MAX_CONNECTIONS", 5), contextlib.ExitStack() as stack:
            running = self.start()
            busy = self.post(b"{", "Content-Length: 10")
            held = [stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=DEADLINE)) for _ in range(5)]
            for connection in held:
                connection.sendall(busy)
            self.assertTrue(eventually(lambda: list(running.server._handlers.values()) == [False] * 5))
            with contextlib.suppress(ConnectionError):
                self.assertEqual(running.raw(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"), b"")
            held[0].sendall(b" " * 9)
            self.assertIn(b"400", held[0].recv(100))
            self.assertTrue(eventually(lambda: True in running.server._handlers.values()))  # idle again: it makes room
            self.assertEqual(running.request("GET", "/health")[0], 200)

    def crowd(self, running, count, held):
        """Open `count` connections, half of them with half a request; assert how many are held and that others are served."""
        with contextlib.ExitStack() as stack:
            for number in range(count):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=DEADLINE))
                connection.sendall(b"GET / HTTP/1.1\r\n" if number % 2 else b"")
            self.assertTrue(eventually(lambda: len(running.server._handlers) in held), len(running.server._handlers))
            self.assertEqual(running.chat("x")[0], 200)

    def test_http_1_0(self):
        running = self.start()
        body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
        got = running.raw(self.post(body, f"Content-Length: {len(body)}", version="1.0"))
        head, _, data = got.partition(b"\r\n\r\n")
        self.assertNotIn(b"chunked", head)
        self.assertEqual(sse_events(data)[-1], "[DONE]")
        got = running.raw(b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /health HTTP/1.0\r\n\r\n")
        self.assertEqual([got.count(text) for text in (b"200 OK", b"Connection: keep-alive", b"Connection: close")], [2, 1, 1])

    def test_stream_bytes(self):
        running = self.start()
        body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
        got = running.raw(self.post(body, f"Content-Length: {len(body)}", "Connection: close"))
        self.assertTrue(got.endswith(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"), got[-60:])
        for header in (b"Transfer-Encoding: chunked", b"Content-Type: text/event-stream", b"X-Accel-Buffering: no", b"Cache-Control: no-cache"):
            self.assertIn(header, got)

    def test_api_keys(self):
        running = self.start(api_key=["first", "se cond\u20ac"])
        for headers, expected in (({}, 401), ({"Authorization": "Bearer first"}, 200), ({"authorization": "bearer first"}, 200),
                                  ({"X-Api-Key": "first"}, 200), ({"X-Api-Key": "se cond\u20ac".encode()}, 200), ({"Authorization": "Bearer firs"}, 401), ({"Authorization": "Bearer"}, 401),
                                  ({"Authorization": "Basic first"}, 401), ({"X-Api-Key": "\xff"}, 401)):
            status, answer_headers, body = running.request("GET", "/v1/models", headers=headers)
            self.assertEqual(status, expected, headers)
            if status == 401:
                self.assertEqual(json.loads(body)["error"]["code"], "invalid_api_key")
                self.assertEqual(answer_headers["WWW-Authenticate"], "Bearer")
        self.assertEqual(running.request("POST", "/chat/completions", chat_body())[0], 401)
        self.assertEqual(running.request("GET", "/health")[0], 200)
        self.assertEqual(running.request("OPTIONS", "/v1/models")[0], 204)
        self.assertNotIn("first", " ".join(self.logged))

    def test_origins(self):
        running = self.start(cors_origin=["https://app.example"])
        for origin, allowed in (("http://localhost:3000", True), ("https://127.0.0.1", True), ("http://[::1]:80", True), ("https://app.example", True),
                                ("https://evil.example", False), ("null", False), ("http://localhost.evil.example", False), ("", False),
                                ("http://localhost:3000\u00e9", False)):
            status, headers, body = running.request("POST", "/v1/chat/completions", chat_body(), {"Origin": origin})
            self.assertEqual((status, headers["Access-Control-Allow-Origin"]), (200, origin) if allowed else (403, None), origin)
            if not allowed:
                self.assertEqual(json.loads(body)["error"]["code"], "origin_not_allowed")
        status, headers, _ = running.request("OPTIONS", "/v1/chat/completions", headers={
            "Origin": "https://app.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"})
        self.assertEqual((status, headers["Access-Control-Allow-Origin"], headers["Access-Control-Allow-Methods"],
                          headers["Access-Control-Allow-Headers"], headers["Vary"]),
                         (204, "https://app.example", "OPTIONS, POST", "authorization,content-type", "Origin"))
        body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True})
        status, headers, _ = running.request("POST", "/v1/chat/completions", body, {"Origin": "https://app.example"})
        self.assertEqual(headers["Access-Control-Allow-Origin"], "https://app.example")
        everyone = self.start(cors_origin=["*"])
        self.assertEqual(everyone.request("GET", "/v1/models", headers={"Origin": "https://any.example"})[0], 200)
        self.assertEqual(everyone.request("GET", "/v1/models", headers={"Origin": "null"})[0], 403)

    def assert_logged(self, pattern):
        self.assertTrue(eventually(lambda: any(re.search(pattern, line) for line in self.logged)), (pattern, self.logged))

    def test_log(self):
        running = self.start()
        running.request("POST", "/v1/chat/completions", chat_body(), {"X-Request-Id": "abc-1"})
        self.assert_logged(r"^127\.0\.0\.1 POST /v1/chat/completions 200 model=github-copilot/gpt-5-mini first=\d+\.\d+ "
                           r"in=1 out=2 seconds=\d+\.\d+ id=abc-1$")
        status, headers, _ = running.request("GET", "/nothing", headers={"X-Request-Id": "a b\u00e9"})
        self.assertRegex(headers["X-Request-Id"], "^[0-9a-f]{32}$")
        self.assert_logged(r' GET /nothing 404 error="There is nothing at /nothing" seconds=\S+ id=' + headers["X-Request-Id"])
        self.answer(running, b"GET /a\x1b[31m\x00b HTTP/1.1\r\nHost: x\r\n\r\n")
        running.request("POST", "/v1/chat/completions", b'{"messages":"SECRET"}')
        running.chat("SECRET")
        self.assertTrue(eventually(lambda: len(self.logged) == 5))
        for line in self.logged:
            self.assertRegex(line, r"^[\x20-\x7e]+$")
            self.assertNotIn("SECRET", line)

    def test_defects_are_contained(self):
        running = self.start()
        with unittest.mock.patch.object(proxy, "envelope", side_effect=ZeroDivisionError("x")):
            status, answer = running.chat()
        self.assertEqual((status, answer["error"]["code"]), (500, "internal_error"))
        self.assert_logged("internal error: ZeroDivisionError")
        self.assertEqual(running.chat()[0], 200)

    def test_fuzz(self):
        """Whatever bytes come, the connection is answered in JSON or closed, and the next request is served."""
        running, seeded = self.start(max_body_size=2000), random.Random(4141)
        body = chat_body()
        good = [self.post(body, f"Content-Length: {len(body)}", path="/v1/models"), b"GET /v1/models/local%2Fm HTTP/1.1\r\nHost: x\r\n\r\n",
                self.post(b"5\r\n{\"a\":\r\n0\r\n\r\n", "Transfer-Encoding: chunked", "Expect: 100-continue"), b"OPTIONS / HTTP/1.0\r\nOrigin: null\r\n\r\n"]
        with unittest.mock.patch.multiple(proxy, IDLE_SECONDS=2.0, BODY_SECONDS=2.0, DRAIN_SECONDS=0.5):
            for _ in range(int(os.environ.get("OPENCODE_PROXY_TEST_FUZZ", "3000")) // 3):
                data = bytearray(b"".join(seeded.choice(good) for _ in range(seeded.randint(1, 3))))
                for _ in range(seeded.randint(0, 6)):
                    place = seeded.randrange(len(data))
                    data[place:place + seeded.randint(0, 3)] = bytes(seeded.choice(b"\r\n\0 :;,0123456789abcXYZ\xff/") for _ in range(seeded.randint(0, 3)))
                with contextlib.suppress(ConnectionError):
                    got = running.raw(bytes(data), half_close=True)
                    self.assertNotIn(b"Traceback", got)
                    self.assertNotIn(b"internal_error", got, data)
        self.assertEqual(running.chat()[0], 200)
        self.assertFalse([line for line in self.logged if "internal error" in line or "connection failed" in line])


# ------------------------------------------------------------------------------------------------- command line

class CommandTest(FakeCase):
    def command(self, *arguments, **environment):
        """Start the program; return its process. `self.lines` gets what it writes."""
        command = [sys.executable, "-W", "error::ResourceWarning", str(HERE / "opencode_proxy.py"), "--opencode", str(self.fake), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={
            **self.clean, "TMPDIR": str(self.folder / "tmp"), **environment}, cwd=self.folder, universal_newlines=True)
        self.stack.callback(process.stdout.close)
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        self.lines = []
        return process

    def run_to_end(self, *arguments, **environment):
        process = self.command(*arguments, **environment)
        return process.communicate(timeout=DEADLINE)[0], process.returncode

    def serving(self, *arguments, **environment):
        """Start the program; return its process and port when it serves."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        process = self.command("--host", "127.0.0.1", "--port", str(port), *arguments, **environment)
        for line in iter(process.stdout.readline, ""):
            self.lines.append(line.rstrip())
            if "base URL" in line:
                break
        return process, port

    def asking(self, port, content, stream=True):
        """Send a chat request; return the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        self.stack.callback(connection.close)
        connection.request("POST", "/v1/chat/completions", json.dumps({"messages": [{"role": "user", "content": content}], "stream": stream}))
        return connection

    def test_version_and_bad_values(self):
        self.assertEqual(self.run_to_end("--version"), (f"opencode_proxy {proxy.__version__}\n", 0))
        for arguments in (["--port", "x"], ["--port", "70000"], ["--timeout", "0"], ["--timeout", "nan"], ["--max-concurrency", "0"],
                          ["--model", "bare"], ["--spares", "-1"], ["--api-key-file", "/no/such/file"], ["--api-key-file", os.devnull],
                          ["--api-key-file", ""],
                          ["--api-key", ""], ["--nonsense"]):
            output, code = self.run_to_end(*arguments)
            self.assertEqual((code, output.count("Traceback")), (2, 0), output)
            self.assertIn("error: ", output.splitlines()[-1])

    def test_failures_are_one_line(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            for arguments, text in ((["--host", "127.0.0.1", "--port", str(taken.getsockname()[1])], "cannot listen on 127.0.0.1:"),
                                    (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid:"),
                                    (["--opencode", "/no/such"], "--opencode /no/such: not found")):
                output, code = self.run_to_end(*arguments)
                self.assertEqual((code, len(output.splitlines())), (1, 1), output)
                self.assertIn(text, output)
        output, code = self.run_to_end("--port", "0", "--host", "127.0.0.1", FAKE_MODE="models-fail")
        self.assertEqual((code, len(output.splitlines())), (1, 1), output)
        self.assertIn("is not valid JSON(C)", output)

    def test_environment_and_options(self):
        for name, value, attribute, expected in (
                ("PORT", "7", "port", 7), ("API_KEY", "a b", "api_key", ["a", "b"]), ("CORS_ORIGIN", "*", "cors_origin", ["*"]),
                ("MAX_BODY_SIZE", "9", "max_body_size", 9), ("MODEL", "p/m", "model", "p/m"), ("VERBOSE", "1", "verbose", True), ("VERBOSE", "0", "verbose", False),
                ("API_KEY", "", "api_key", []), ("CORS_ORIGIN", "https://App.example/ http://b", "cors_origin", ["https://app.example", "http://b"])):
            with unittest.mock.patch.dict(os.environ, {"OPENCODE_PROXY_" + name: value}):
                self.assertEqual(getattr(proxy.read_settings([]), attribute), expected)
        with unittest.mock.patch.dict(os.environ, {"OPENCODE_PROXY_PORT": "7", "OPENCODE_PROXY_API_KEY": "a"}):
            settings = proxy.read_settings(["--port", "8", "--api-key", "c"])
            self.assertEqual((settings.port, settings.api_key), (8, ["c"]))
        keys = self.folder / "keys"
        keys.write_text("one\ntwo\n")
        self.assertEqual(proxy.read_settings(["--api-key-file", str(keys), "--api-key", "c"]).api_key, ["c", "one", "two"])
        output, code = self.run_to_end(OPENCODE_PROXY_PORT="x")
        self.assertEqual((code, output.splitlines()[-1]), (2, "opencode_proxy.py: error: argument --port: invalid int value: 'x'"))

    def test_verbose_shows_no_contents(self):
        process, port = self.serving("--verbose")
        self.asking(port, "SECRET").getresponse().read()
        process.terminate()
        seen = process.stdout.read()
        self.assertRegex(seen, r"-> session/prompt \d+ bytes\n")
        self.assertRegex(seen, r"<- proxy/delta \d+ bytes\n")
        self.assertNotIn("SECRET", seen)

    def test_banner(self):
        process, port = self.serving("--model", "local/m", "--api-key", "k")
        self.assertRegex(self.lines[0], rf"opencode_proxy {proxy.__version__} with opencode 1\.18\.33, model local/m$")
        self.assertTrue(self.lines[1].endswith(f"base URL for apps: http://127.0.0.1:{port}/v1"))
        running = self.start(host="0.0.0.0")
        self.assertEqual(proxy.banner(running.server)[1:], [
            f"base URL for apps: http://localhost:{running.port}/v1",
            "warning: github-copilot/gpt-4.1 is not offered, github-copilot/gpt-5-mini answers instead; choose with --model",
            "warning: whoever reaches this port can use your models; set --api-key or --host 127.0.0.1"])

    def test_sigterm_lets_answers_finish(self):
        process, port = self.serving("--spares", "1")
        answer = self.asking(port, "slowly 20").getresponse()
        answer.readline()
        process.send_signal(signal.SIGTERM)
        self.assertTrue(eventually(lambda: self.refuses(port)))
        self.assertEqual(sse_events(answer.read().partition(b"\n")[2])[-1], "[DONE]")
        self.assertEqual(process.wait(DEADLINE), 0)

    def test_sighup_stops_unless_it_is_ignored(self):
        self.addCleanup(signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, signal.SIG_DFL))
        process, _ = self.serving()
        process.send_signal(signal.SIGHUP)
        self.assertEqual(process.wait(DEADLINE), 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        process, port = self.serving()
        process.send_signal(signal.SIGHUP)
        self.assertEqual(self.health(port)["status"], "healthy")
        process.terminate()
        self.assertEqual(process.wait(DEADLINE), 0)

    def test_sigterm_ends_answers_after_the_grace(self):
        for signals in (1, 2):
            process, port = self.serving("--grace", "0.5" if signals == 1 else "60")
            stream = self.asking(port, "pause 60").getresponse()
            stream.readline()
            whole = self.asking(port, "silent 60", stream=False)
            self.assertTrue(eventually(lambda: self.health(port)["running"] == 2))
            for _ in range(signals):
                process.send_signal(signal.SIGINT)
                time.sleep(0.2)
            events = sse_events(stream.read().partition(b"\n\n")[2])
            self.assertEqual((events[-2]["error"]["code"], events[-1]), ("shutting_down", "[DONE]"))
            response = whole.getresponse()
            self.assertEqual((response.status, json.loads(response.read())["error"]["code"]), (503, "shutting_down"))
            self.assertEqual(process.wait(DEADLINE), 0)

    def test_sigkill_leaves_no_opencode(self):
        process, port = self.serving("--spares", "1")
        self.asking(port, "slowly 1000").getresponse().readline()
        mine = [line for line in children() if str(self.fake) in line and "acp" in line]
        self.assertGreaterEqual(len(mine), 1)
        process.kill()
        process.wait()

        def alive():
            return subprocess.run(["ps", "-p", ",".join(line.split()[0] for line in mine), "-o", "pid="], stdout=subprocess.PIPE).stdout.strip()
        self.assertTrue(eventually(lambda: not alive()))
        self.assertEqual(len(run_directories()), 1)  # SIGKILL leaves it; the next start takes it away
        self.start().close()
        self.assertEqual(run_directories(), [])

    def refuses(self, port):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return True
        return False

    def health(self, port):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)) as connection:
            connection.request("GET", "/health")
            return json.loads(connection.getresponse().read())


# ------------------------------------------------------------------------------------------------------- README

class ReadmeTest(unittest.TestCase):
    text = (HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else ""

    def rows(self, heading):
        """Return the rows of the first table below a heading."""
        table = self.text.partition(f"\n{heading}\n")[2].partition("\n|---")[2].partition("\n")[2].partition("\n\n")[0]
        return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]

    def test_options_are_those_of_the_program(self):
        with unittest.mock.patch.dict(os.environ, {"COLUMNS": "200"}):
            parser = proxy.build_parser()
        documented = {row[0].strip("`").replace("\\|", "|").split()[0]: row for row in self.rows("## Options")}
        actions = {action.option_strings[-1]: action for action in parser._actions if action.option_strings[-1] not in ("--help", "--version")}
        self.assertEqual(list(documented), [name for name in actions if name not in ("--verbose", "--systemd-unit")] + ["--verbose", "--systemd-unit"])
        for name, action in actions.items():
            shown, default, meaning = documented[name]
            self.assertEqual(default, "" if action.default in (None, False) else str(action.default), name)
            self.assertTrue(action.help.startswith(meaning.replace("`", "")), (action.help, meaning))
            self.assertTrue(action.nargs == "?" or shown.strip("`") == " ".join(filter(None, (name, action.metavar))), shown)

    def test_every_known_field_has_a_line(self):
        named = set(re.findall(r"`([a-z_.]+)`", " ".join(row[0] for row in self.rows("## What becomes of each field"))))
        self.assertEqual({*proxy.FIELDS, "messages"} - {"stream_options"} - named, set())

    def test_messages_are_those_of_the_program(self):
        source = (HERE / "opencode_proxy.py").read_text(encoding="utf-8")
        plain = re.sub(r"\"\s*\n\s*f?\"", "", source)
        for row in self.rows("## When something does not work"):
            for message in re.findall(r"`([^`]+)`", row[0]):
                pieces = [piece for piece in re.split(r"\b\d[\d.:]*\b|\bX\b|\.\.\.|github-copilot|Address already in use", message) if len(piece.strip()) > 8]
                for piece in pieces:
                    self.assertIn(piece.strip(" :"), plain, message)

    def test_length_and_plist(self):
        import plistlib
        self.assertLessEqual(len(self.text.splitlines()), 200)
        plist = plistlib.loads(self.text.partition("```xml\n")[2].partition("```")[0].encode())
        self.assertEqual((plist["Label"], plist["KeepAlive"]), ("opencode-proxy", True))


class SystemdTest(unittest.TestCase):
    def test_units(self):
        for kind in ("user", "system"):
            with self.subTest(kind):
                unit = proxy.systemd_unit(kind, "/opt/bin/opencode")
                python, program = proxy.unit_word(os.path.abspath(sys.executable)), proxy.unit_word(str(HERE / "opencode_proxy.py"))
                self.assertIn(f"ExecStart={python} {program} --opencode /opt/bin/opencode\n", unit)
                self.assertNotIn("{", unit)
        for text, word in (("/a/b-c.1", "/a/b-c.1"), ("/a b", '"/a b"'), ("/100%", "/100%%"), ("/$x", "/$$x"), ('/"', '"/\\""')):
            self.assertEqual(proxy.unit_word(text), word)

    def test_systemd_takes_them(self):
        if not shutil.which("systemd-analyze"):
            raise unittest.SkipTest("systemd-analyze is missing")
        with tempfile.TemporaryDirectory() as folder:
            for kind in ("user", "system"):
                path = pathlib.Path(folder, f"opencode-proxy-{kind}.service")
                program = pathlib.Path(folder, "open code %")
                program.touch(0o700)
                path.write_text(proxy.systemd_unit(kind, str(program)))
                done = subprocess.run(["systemd-analyze", "verify", "--man=no", *(["--user"] if kind == "user" else []), str(path)],
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "XDG_RUNTIME_DIR": folder}, check=False)
                mine = [line for line in done.stdout.decode().splitlines() if path.name in line]
                self.assertEqual((done.returncode, mine), (0, []), done.stdout.decode())

    def test_notify(self):
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            for name in (f"{folder}/notify", *(["@opencode-proxy-test"] if sys.platform == "linux" else [])):
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                    manager.bind("\0" + name[1:] if name.startswith("@") else name)
                    manager.settimeout(DEADLINE)
                    with unittest.mock.patch.dict(os.environ, {"NOTIFY_SOCKET": name}):
                        proxy.notify("READY=1")
                    self.assertEqual(manager.recv(100), b"READY=1")
        proxy.notify("READY=1")


class RealWireTest(RealCase):
    """What the model receives and what the client gets, on the three wire formats."""

    def test_chat_completions_is_verbatim(self):
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "w\u00f6rld \u2028 {file:/etc/passwd} {env:HOME}", "name": "n"},
                    {"role": "assistant", "content": None, "tool_calls": [
                        {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{ "a": 1.0 }'}}]},
                    {"role": "tool", "tool_call_id": "c", "content": "r"}, {"role": "developer", "content": "D"}, {"role": "user", "content": "/help"}]
        fields = {"temperature": 0, "top_p": 1.0, "max_tokens": 5, "max_completion_tokens": 6, "stop": ["zz"], "seed": 12345678901234567890,
                  "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"7": 1}, "user": "u", "reasoning_effort": "low",
                  "verbosity": "low", "metadata": {"a": "b"}, "service_tier": "auto", "store": False, "prediction": {"type": "content", "content": "x"},
                  "web_search_options": {}, "logprobs": True, "top_logprobs": 2, "unknown": {"2": [1, None], "1": 1.0}}
        for model in (CHAT, "local/m"):
            self.upstream.exchanges.clear()
            status, answer = self.proxy.chat(model=model, messages=messages, **fields)
            self.assertEqual((status, answer["choices"][0]["message"]["content"]), (200, "Hello w\u00f6r\u2028ld"))
            sent = {**self.exchange().body}
            sent.pop("stream_options", None)  # opencode's own, for a provider that has to be asked for its token counts
            self.assertEqual(sent, {"model": model.partition("/")[2], "stream": True, "messages": messages, **fields})
            self.assertIn(b'"seed":12345678901234567890', self.exchange().raw)
            self.assertIn(b'"unknown":{"2":[1,null],"1":1.0}', self.exchange().raw)
        self.upstream.exchanges.clear()
        self.proxy.stream(stream_options={"include_usage": True})
        default = self.proxy.opencode.catalog.default.partition("/")[2].encode()  # 1.17.0 still has gpt-4.1
        self.assertEqual(self.exchange().raw, b'{"model":"%b","stream":true,"messages":[{"role":"user","content":"hi"}],'
                                              b'"stream_options":{"include_usage":true}}' % default)
        self.assertEqual(self.exchange().headers["x-initiator"], "user")

    def test_stream_bytes(self):
        status, headers, data = self.proxy.request("POST", "/v1/chat/completions", {
            "model": CHAT, "messages": [{"role": "user", "content": "hi"}], "stream": True, "stream_options": {"include_usage": True}})
        head = json.loads(data.split(b"\n\n")[0][6:])
        self.assertRegex(head["id"], "^chatcmpl-[0-9a-f]{32}$")
        self.assertLess(abs(head["created"] - time.time()), 600)
        frame = (f'data: {{"id":"{head["id"]}","object":"chat.completion.chunk","created":{head["created"]},"model":"github-copilot/gpt-5-mini",'
                 '"system_fingerprint":"fp_opencode","choices":[')
        chunk = frame + '{"index":0,"delta":%s,"logprobs":null,"finish_reason":%s}],"usage":null}\n\n'
        expected = [chunk % ('{"role":"assistant","content":""}', "null"), chunk % ('{"content":"Hel"}', "null"), chunk % ('{"content":"lo "}', "null"),
                    chunk % ('{"content":"w\\u00f6r\\u2028ld"}', "null"), chunk % ("{}", '"stop"'),
                    frame + '],"usage":' + json.dumps(USAGE, separators=(",", ":")) + "}\n\n", "data: [DONE]\n\n"]
        self.assertEqual(data.decode(), "".join(expected))
        self.assertEqual((status, headers["Content-Type"], headers["Transfer-Encoding"]), (200, "text/event-stream; charset=utf-8", "chunked"))

    def test_other_formats(self):
        messages = [{"role": "system", "content": "S"}, {"role": "developer", "content": "D"}, {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"}, {"role": "user", "content": [{"type": "text", "text": "c"}]}]
        fields = {"temperature": 0.5, "top_p": 0.5, "max_tokens": 50, "user": "u"}
        bodies = {
            RESPONSES: {"model": "gpt-5.4-mini", "stream": True, "store": False, "max_output_tokens": 50, "user": "u", "input": [
                {"role": "developer", "content": "S"}, {"role": "developer", "content": "D"}, {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "b"}]}, {"role": "user", "content": [{"type": "input_text", "text": "c"}]}]},
            OLD_CLAUDE: {"model": "claude-3-5-sonnet", "stream": True, "max_tokens": 50, "temperature": 0.5, "metadata": {"user_id": "u"},
                         "system": [{"type": "text", "text": "S"}, {"type": "text", "text": "D"}], "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
                {"role": "user", "content": [{"type": "text", "text": "c"}]}]}}
        for model, body in bodies.items():
            self.upstream.exchanges.clear()
            status, answer = self.proxy.chat(messages=messages, model=model, **fields)
            self.assertEqual((status, answer["choices"][0]["message"]["content"], answer["model"]), (200, "Hello w\u00f6r\u2028ld", model))
            self.assertEqual({key: answer["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")},
                             {"prompt_tokens": 11, "completion_tokens": 20, "total_tokens": 31})
            # opencode marks what Anthropic may cache, and leaves out what it knows a model not to take: temperature and
            # top_p together (Claude), or at all (models that reason)
            self.assertEqual(without(self.exchange().body, "cache_control"), body)

    def test_finish_reasons(self):
        for model in FORMATS.values():
            for finish in ("stop", "length", "content_filter"):
                self.upstream.respond = answering(("text", "x"), finish=finish)
                with self.subTest(model=model, finish=finish):
                    self.assertEqual(self.proxy.chat(model=model)[1]["choices"][0]["finish_reason"], finish)
                    chunks = self.proxy.stream(model=model)[:-1]
                    self.assertEqual([chunk["choices"][0]["finish_reason"] for chunk in chunks], [None, None, finish])

    def test_empty_answer(self):
        self.upstream.respond = answering()
        for model in FORMATS.values():
            status, answer = self.proxy.chat(model=model)
            self.assertEqual((status, answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]), (200, "", "stop"))
        self.assertEqual(len(self.upstream.exchanges), 3)

    def test_deltas_arrive_as_they_come(self):
        go_on = threading.Event()

        def respond(exchange):
            first, *rest = stream_of(exchange.format, [("text", "one"), ("text", "two")], "stop")
            place = next(n for n, event in enumerate(rest) if "one" in json.dumps(event)) + 1
            exchange.begin()
            exchange.send(first, *rest[:place])
            go_on.wait(DEADLINE)
            exchange.send(*rest[place:])

        self.upstream.respond = respond
        for model in FORMATS.values():
            go_on.clear()
            with contextlib.closing(self.proxy.connect()) as connection:
                connection.request("POST", "/v1/chat/completions", json.dumps(
                    {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": True}))
                response = connection.getresponse()
                data = b""
                while b'"one"' not in data:  # the upstream is still in the middle of its answer
                    data += response.readline()
                self.assertNotIn(b'"two"', data)
                go_on.set()
                self.assertIn(b'"two"', response.read())

    def test_client_hangs_up(self):
        def respond(exchange):
            exchange.begin()
            exchange.send(chat_chunk({"content": "one"}))
            exchange.wait_closed()

        self.upstream.respond = respond
        for stream in (True, False):
            self.upstream.exchanges.clear()
            body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": stream})
            with socket.create_connection(("127.0.0.1", self.proxy.port), timeout=DEADLINE) as connection:
                connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                self.assertTrue(eventually(lambda: self.upstream.exchanges))
                if stream:
                    self.assertIn(b"200 OK", connection.recv(20))
            start = time.monotonic()
            self.assertTrue(self.upstream.exchanges[0].closed_by_client.wait(DEADLINE))
            report("client hangs up", "stream" if stream else "whole", "-", time.monotonic() - start, 1)

    def test_reasoning(self):
        self.upstream.respond = lambda exchange: (exchange.begin(), exchange.send(
            chat_chunk({"reasoning_text": "hm"}), *chat_stream([("text", "x")], "stop")))
        self.assertEqual(self.proxy.chat()[1]["choices"][0]["message"]["reasoning_content"], "hm")
        self.upstream.respond = answering(("thought", "hm"), ("thought", "mm"), ("text", "x"))
        for model in ("local/m", RESPONSES, MESSAGES):
            self.upstream.exchanges.clear()
            status, answer = self.proxy.chat(model=model, reasoning_effort="high")
            self.assertEqual(answer["choices"][0]["message"], {"role": "assistant", "content": "x", "refusal": None, "reasoning_content": "hmmm"}, model)
            self.assertEqual(deltas_of(self.proxy.stream(model=model))[1:3], [{"reasoning_content": "hm"}, {"reasoning_content": "mm"}])
            first, second = (exchange.body for exchange in self.upstream.exchanges)
            if model == RESPONSES:
                self.assertEqual((first["reasoning"]["effort"], second.get("reasoning")), ("high", None))
                self.assertEqual(answer["usage"]["completion_tokens_details"], {"reasoning_tokens": 7})
            elif model == MESSAGES:
                self.assertEqual((first["thinking"]["type"], first["output_config"]["effort"], "thinking" in second), ("adaptive", "high", False))

    TOOLS = [{"type": "function", "function": {"name": name, "description": "d", "parameters": {
        "type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "number"}}, "required": ["b"], "additionalProperties": False}}}
        for name in ("bash", "task", "edit", "a.b")]

    def test_tools(self):
        target = self.folder / "made-by-bash"
        arguments = ['{"command": "touch ', f'{target}", "n": 1.0,', ' "big": 12345678901234567890}']
        self.upstream.respond = answering(("text", "Let me "), ("call", "call_1", "bash", arguments), ("call", "call_2", "a.b", ["{}"]),
                                          ("call", "call_3", "a.b", ["{}"]), ("call", "call_4", "a.b", ["{}"]), finish="tool_calls")
        calls = [{"id": "call_1", "type": "function", "function": {"name": "bash", "arguments": "".join(arguments)}}] + [
            {"id": f"call_{n}", "type": "function", "function": {"name": "a.b", "arguments": "{}"}} for n in (2, 3, 4)]
        for wire_format, model in [*FORMATS.items(), ("chat/completions", "local/m")]:
            self.upstream.exchanges.clear()
            status, answer = self.proxy.chat(model=model, tools=self.TOOLS, tool_choice="auto", parallel_tool_calls=True)
            self.assertEqual(answer["choices"][0], {"index": 0, "logprobs": None, "finish_reason": "tool_calls", "message": {
                "role": "assistant", "content": "Let me ", "refusal": None, "tool_calls": calls}}, model)
            functions = [tool["function"] for tool in self.TOOLS]
            self.assertEqual(self.exchange().body["tools"], {
                "chat/completions": self.TOOLS,
                "responses": [{"type": "function", **function, "strict": False} for function in functions],
                "messages": [{"name": f["name"], "description": "d", "input_schema": f["parameters"]} for f in functions]}[wire_format])
            self.assertIn(b'{"b":{"type":"string"},"a":{"type":"number"}}', self.exchange().raw)
            self.upstream.exchanges.clear()
            deltas = deltas_of(self.proxy.stream(model=model, tools=self.TOOLS))
            expected = [{"role": "assistant", "content": ""}, {"content": "Let me "}]
            for index, call in enumerate(calls):
                expected.append({"tool_calls": [{"index": index, **call, "function": {"name": call["function"]["name"], "arguments": ""}}]})
                expected += [{"tool_calls": [{"index": index, "function": {"arguments": piece}}]} for piece in (["{}"] if index else arguments)]
            self.assertEqual(deltas, [*expected, {}], model)
            self.exchange()
        self.assertFalse(target.exists())

    def test_tool_results(self):
        call = {"id": "call_1", "type": "function", "function": {"name": "bash", "arguments": '{"b":"x"}'}}
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "t", "tool_calls": [call, {**call, "id": "call_2"}]},
                    {"role": "tool", "tool_call_id": "call_1", "content": "r1"}, {"role": "tool", "tool_call_id": "call_2", "content": "r2"}]
        expected = {
            "responses": ("input", [
                {"role": "user", "content": [{"type": "input_text", "text": "q"}]}, {"role": "assistant", "content": [{"type": "output_text", "text": "t"}]},
                {"type": "function_call", "call_id": "call_1", "name": "bash", "arguments": '{"b":"x"}'},
                {"type": "function_call", "call_id": "call_2", "name": "bash", "arguments": '{"b":"x"}'},
                {"type": "function_call_output", "call_id": "call_1", "output": "r1"}, {"type": "function_call_output", "call_id": "call_2", "output": "r2"}]),
            "messages": ("messages", [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "t"}, {"type": "tool_use", "id": "call_1", "name": "bash", "input": {"b": "x"}},
                                                  {"type": "tool_use", "id": "call_2", "name": "bash", "input": {"b": "x"}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": "r1"},
                                             {"type": "tool_result", "tool_use_id": "call_2", "content": "r2"}]}]),
            "chat/completions": ("messages", messages)}
        for wire_format, model in FORMATS.items():
            self.upstream.exchanges.clear()
            self.assertEqual(self.proxy.chat(model=model, messages=messages, tools=self.TOOLS)[0], 200)
            key, value = expected[wire_format]
            self.assertEqual(without(self.exchange().body[key], "cache_control"), value)
            self.assertEqual(self.exchange().headers["x-initiator"], "agent")

    def test_tool_choice_of_the_old_api(self):
        self.upstream.respond = answering(("call", "c", "f", ['{"a":1}']), finish="tool_calls")
        status, answer = self.proxy.chat(functions=[{"name": "f", "parameters": {"type": "object"}}], function_call={"name": "f"})
        self.assertEqual(answer["choices"][0]["message"], {"role": "assistant", "content": None, "refusal": None,
                                                           "function_call": {"name": "f", "arguments": '{"a":1}'}})
        self.assertEqual(answer["choices"][0]["finish_reason"], "function_call")
        self.assertEqual(self.exchange().body["tool_choice"], {"type": "function", "function": {"name": "f"}})

    PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="

    def test_images(self):
        url = "http://127.0.0.1:1/never-fetched.png"
        content = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + self.PNG, "detail": "high"}},
                   {"type": "image_url", "image_url": {"url": url}}]
        expected = {
            "chat/completions": content,
            "responses": [{"type": "input_text", "text": "see"},
                          {"type": "input_image", "image_url": "data:image/jpeg;base64," + self.PNG, "detail": "high"}, {"type": "input_image", "image_url": url}],
            "messages": [{"type": "text", "text": "see"}, {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": self.PNG}},
                         {"type": "image", "source": {"type": "url", "url": url}}]}
        for wire_format, model in FORMATS.items():
            self.upstream.exchanges.clear()
            self.assertEqual(self.proxy.chat(content, model=model)[0], 200)
            exchange = self.exchange()
            self.assertEqual(without(exchange.body["input" if wire_format == "responses" else "messages"][0]["content"], "cache_control"), expected[wire_format])
            self.assertEqual((exchange.headers["Copilot-Vision-Request"], exchange.headers["x-initiator"]), ("true", "user"))

    def test_images_that_tools_return(self):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        image = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + self.PNG}}
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "see"}, image]}]
        expected = {
            "chat/completions": messages[2:],
            "responses": [{"type": "function_call_output", "call_id": "c", "output": "see"}, {"role": "user", "content": [
                {"type": "input_text", "text": "Attached media from tool result:"}, {"type": "input_image", "image_url": image["image_url"]["url"]}]}],
            "messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [
                {"type": "text", "text": "see"}, {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": self.PNG}}]}]}]}
        for wire_format, model in FORMATS.items():
            self.upstream.exchanges.clear()
            self.assertEqual(self.proxy.chat(model=model, messages=messages)[0], 200)
            exchange = self.exchange()
            self.assertEqual(without(exchange.body["input" if wire_format == "responses" else "messages"][2:], "cache_control"), expected[wire_format])
            self.assertEqual((exchange.headers["Copilot-Vision-Request"], exchange.headers["x-initiator"]), ("true", "agent"))

    def test_many_images(self):
        urls = [f"data:image/png;base64,{self.PNG.rstrip('=')}{number:04d}" for number in range(100)]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        for wire_format, model in FORMATS.items():
            self.upstream.exchanges.clear()
            self.assertEqual(self.proxy.chat(content, model=model)[0], 200)
            sent = re.findall(rb"[A-Za-z0-9+/]{80,}", self.exchange().raw)
            self.assertEqual([f"data:image/png;base64,{text.decode()}" for text in sent], urls, wire_format)

    def test_big_image(self):
        payload = self.PNG.rstrip("=") * 180000
        payload = payload[:len(payload) // 4 * 4]
        for model in FORMATS.values():
            self.upstream.exchanges.clear()
            content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + payload}}]
            self.assertEqual(self.proxy.chat(content, model=model)[0], 200)
            self.assertIn(payload.encode(), self.exchange().raw)

    def test_files_and_audio(self):
        pdf = {"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBERi0=", "filename": "f.pdf"}}
        audio = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
        self.assertEqual(self.proxy.chat([pdf, audio], model=CHAT)[0], 200)
        self.assertEqual(self.exchange().body["messages"][0]["content"], [pdf, audio])
        for model, key, part in (
                (RESPONSES, "input", {"type": "input_file", "filename": "f.pdf", "file_data": "data:application/pdf;base64,JVBERi0="}),
                (MESSAGES, "messages", {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}, "title": "f.pdf"})):
            self.upstream.exchanges.clear()
            self.assertEqual(self.proxy.chat([pdf], model=model)[0], 200)
            self.assertEqual(without(self.exchange().body[key][0]["content"], "cache_control"), [part])

    def test_what_a_format_cannot_carry_is_the_providers_to_refuse(self):
        audio = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
        self.upstream.respond = failing(400, {"error": {"message": "no audio here"}})
        for model, key in ((MESSAGES, "messages"), (RESPONSES, "input")):
            self.upstream.exchanges.clear()
            status, answer = self.proxy.chat([audio], model=model)
            self.assertEqual((status, answer["error"]["message"]), (400, "no audio here"))
            self.assertEqual(without(self.exchange().body[key][0]["content"], "cache_control"), [audio])

    def test_response_format(self):
        schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "number"}}, "required": ["b", "a"], "additionalProperties": False}
        wanted = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
        for model, key, value in ((CHAT, "response_format", wanted), (MESSAGES, "output_config", {"format": {"type": "json_schema", "schema": schema}}),
                                  (RESPONSES, "text", {"format": {"type": "json_schema", "name": "n", "strict": True, "schema": schema}})):
            self.upstream.exchanges.clear()
            self.assertEqual(self.proxy.chat(model=model, response_format=wanted)[0], 200)
            self.assertEqual(self.exchange().body[key], value)
        for kind in ("json_object", "text"):
            for model, key, value in ((CHAT, "response_format", {"type": kind}), (RESPONSES, "text", {"format": {"type": kind}}), (MESSAGES, "output_config", None)):
                self.upstream.exchanges.clear()
                self.assertEqual(self.proxy.chat(model=model, response_format={"type": kind})[0], 200)
                self.assertEqual(self.exchange().body.get(key), value)

    def test_stop(self):
        self.upstream.respond = answering(("text", "one ST"), ("text", "OP two"))
        for model, key, value in ((CHAT, "stop", "STOP"), (RESPONSES, "stop", None), (MESSAGES, "stop_sequences", ["STOP"])):
            self.upstream.exchanges.clear()
            events = self.proxy.stream(model=model, stop="STOP")
            self.assertEqual("".join(delta.get("content", "") for delta in deltas_of(events)), "one ")
            self.assertEqual(events[-2]["choices"][0]["finish_reason"], "stop")
            self.assertEqual(self.exchange().body.get(key), value)

    def test_several_choices(self):
        self.upstream.respond = lambda exchange: answering(("text", f"answer {self.upstream.exchanges.index(exchange)}"))(exchange)
        status, answer = self.proxy.chat(n=3)
        self.assertEqual([choice["index"] for choice in answer["choices"]], [0, 1, 2])
        self.assertEqual({choice["message"]["content"] for choice in answer["choices"]}, {"answer 0", "answer 1", "answer 2"})
        self.assertEqual((answer["usage"]["prompt_tokens"], answer["usage"]["total_tokens"]), (33, 93))
        self.assertEqual(len(self.upstream.exchanges), 3)
        self.assertEqual([exchange.body.get("n") for exchange in self.upstream.exchanges], [None] * 3)

    def test_another_wire_format(self):
        """What the proxy does not parse, opencode reads: text, reasoning, parameters and refusals go through."""
        def respond(exchange):
            exchange.begin()
            for parts, more in (([{"text": "hm", "thought": True}], {}), ([{"text": "Hel"}], {}), ([{"text": "lo"}], {"finishReason": "MAX_TOKENS"})):
                exchange.send({"candidates": [{"content": {"role": "model", "parts": parts}, **more}], "usageMetadata": {
                    "promptTokenCount": 11, "candidatesTokenCount": 13, "thoughtsTokenCount": 7, "totalTokenCount": 31, "cachedContentTokenCount": 4}})
        self.upstream.respond = respond
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
        status, answer = self.proxy.chat(model="other/m", messages=messages, max_tokens=50)
        self.assertEqual(answer["choices"], [{"index": 0, "logprobs": None, "finish_reason": "length", "message": {
            "role": "assistant", "content": "Hello", "refusal": None, "reasoning_content": "hm"}}])
        self.assertEqual(answer["usage"], USAGE)
        sent = self.exchange().body
        self.assertEqual((sent["contents"], sent["systemInstruction"], sent["generationConfig"]["maxOutputTokens"], "tools" in sent),
                         ([{"role": "user", "parts": [{"text": "a"}]}], {"parts": [{"text": "S"}]}, 50, False))
        self.assertEqual([delta.get("content") for delta in deltas_of(self.proxy.stream(model="other/m"))[2:4]], ["Hel", "lo"])
        self.upstream.exchanges.clear()
        self.upstream.respond = failing(429, {"error": {"message": "slow down"}})
        status, answer = self.proxy.chat(model="other/m")
        self.assertEqual((status, answer["error"]["message"], len(self.upstream.exchanges)), (429, "slow down", 1))
        self.upstream.exchanges.clear()
        status, answer = self.proxy.chat([{"type": "image_url", "image_url": {"url": "https://x/y"}}], model="other/m")
        self.assertEqual((status, len(self.upstream.exchanges)), (502, 0))
        self.assertIn("attachments cannot be sent", answer["error"]["message"])

    def test_interleaved_requests_do_not_mix(self):
        def respond(exchange):
            word = exchange.body["messages"][-1]["content"]
            exchange.begin()
            for _ in range(10):
                exchange.send(chat_chunk({"content": word + " "}))
                time.sleep(0.01)
            exchange.send(chat_chunk({}, "stop"), "[DONE]")

        self.upstream.respond = respond
        answers = {}

        def ask(number):
            answers[number] = self.proxy.chat(f"word{number}")[1]["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(answers, {number: f"word{number} " * 10 for number in range(12)})
        self.assertEqual(len(self.upstream.exchanges), 12)

    def test_model_that_is_not_offered(self):
        for name in ("github-copilot/no-such", "anthropic/claude", "opencode/big-pickle"):
            status, answer = self.proxy.chat(model=name)
            self.assertEqual((status, answer["error"]["code"]), (404, "model_not_found"))
        self.assertEqual(self.upstream.exchanges, [])

    def test_models(self):
        names = [model["id"] for model in json.loads(self.proxy.request("GET", "/v1/models")[2])["data"]]
        self.assertEqual(names[0], self.proxy.opencode.catalog.default)
        self.assertIn("local/m", names)
        self.assertEqual({name.partition("/")[0] for name in names}, {"github-copilot", "local", "other"})
        self.assertIsNotNone(self.proxy.opencode.catalog.trimmed)
        self.assertEqual(self.proxy.server.health()["opencode"], self.proxy.opencode.version)


def without(value, key):
    """Return `value` without the entries `key` at any depth."""
    if isinstance(value, dict):
        return {name: without(entry, key) for name, entry in value.items() if name != key}
    return [without(entry, key) for entry in value] if isinstance(value, list) else value


REPORT = []


def report(fault, kind, outcome, seconds, posts):
    """Note a row of the table of faults, which is printed after the tests."""
    REPORT.append(f"| {fault} | {kind} | {outcome} | {seconds:.2f} s | {posts} |")


def tearDownModule():
    if REPORT:
        print("\n| fault | request | client got | after | upstream POSTs |\n|---|---|---|---|---|\n" + "\n".join(REPORT), file=sys.stderr)


class RealFaultTest(RealCase):
    """What goes wrong at the provider, and what the client gets: at once, and exactly once."""

    changes = {"requests_per_process": 40, "timeout": 10.0, "spares": 2}

    def check(self, name, respond, status, kind, text, headers=None, posts=1, begun=False, **fields):
        """Ask whole and streamed; assert the error, or, where the answer has `begun`, the error event."""
        for stream in (False, True):
            self.upstream.respond = respond
            self.upstream.exchanges.clear()
            self.assertTrue(eventually(lambda: self.proxy.pool.status()["spares"]))
            start = time.monotonic()
            body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream, **fields}
            got, got_headers, data = self.proxy.request("POST", "/v1/chat/completions", body)
            seconds = time.monotonic() - start
            if stream and begun:
                events = sse_events(data)
                self.assertEqual((got, events[-1]), (200, "[DONE]"))
                error = events[-2]["error"]
                self.assertEqual(sum(delta.get("content") == "part" for delta in deltas_of(events[:-2])), 1, "no text twice")
                self.assertNotIn("finish_reason\":\"stop", data.decode())
            else:
                self.assertEqual(got, status, data)
                error = json.loads(data)["error"]
            self.assertEqual(error["type"], kind)
            self.assertIn(text, error["message"])
            for key, value in (headers or {}).items():
                self.assertEqual(got_headers[key], value)
            self.assertEqual(len(self.upstream.exchanges), posts)
            report(name, "stream" if stream else "whole", f"{'event ' + str(error['code']) if stream and begun else got} {kind}", seconds, posts)
        self.upstream.respond = answer_text
        self.assertEqual(self.proxy.chat(**fields)[0], 200)

    def test_refusals(self):
        error = {"error": {"message": "the upstream's words", "type": None, "code": "its_code", "param": "its_param"}}
        for status, kind in ((400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"), (404, "invalid_request_error"),
                             (413, "invalid_request_error"), (429, "rate_limit_error"), (500, "server_error"), (503, "server_error")):
            with self.subTest(status):
                self.check(str(status), failing(status, error), status, kind, "the upstream's words")

    def test_refusals_in_the_other_formats(self):
        for model in (RESPONSES, MESSAGES):
            self.check("429 " + model.partition("/")[2], failing(429, {"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}}), 429,
                       "rate_limit_error", "slow down", model=model)

    def test_retry_after(self):
        self.check("429 with Retry-After", failing(429, {"error": {"message": "slow down"}}, Retry_After="17"), 429, "rate_limit_error", "slow down",
                   {"Retry-After": "17"})

    def test_gateway_page(self):
        self.check("502, an HTML page", failing(502, "<html><body><h1>Bad gateway</h1></body></html>", "text/html"), 502, "server_error", "Bad gateway")

    def test_context_length(self):
        self.check("400 context length", failing(400, {"error": {"message": "maximum context length exceeded", "code": "context_length_exceeded"}}), 400,
                   "invalid_request_error", "maximum context length")

    def test_dropped_mid_stream(self):
        def respond(exchange):
            exchange.begin()
            exchange.send(chat_chunk({"content": "part"}))
            time.sleep(0.3)
            exchange.drop()
        self.check("connection dropped mid-stream", respond, 502, "server_error", "", begun=True)

    def test_dropped_before_the_answer(self):
        self.check("connection dropped before the answer", lambda exchange: exchange.drop(), 502, "server_error", "connection to the model's provider failed")

    def test_stalls(self):
        def before(exchange):
            exchange.wait_closed()

        def within(exchange):
            exchange.begin()
            exchange.send(chat_chunk({"content": "part"}))
            exchange.wait_closed()
        self.check("stalled before the first byte (--timeout 10)", before, 504, "server_error", "sent nothing for 10 seconds")
        self.check("stalled mid-stream (--timeout 10)", within, 504, "server_error", "sent nothing for 10 seconds", begun=True)

    def test_rubbish(self):
        def rubbish(exchange):
            exchange.begin()
            exchange.wfile.write(b"\x00\xff<html>not SSE</html>\n\ndata: {not json\n\n")
        self.check("garbage instead of SSE", rubbish, 502, "server_error", "")

    def test_no_finish_reason(self):
        def respond(exchange):
            exchange.begin()
            exchange.send(chat_chunk({"content": "part"}), "[DONE]")
        self.check("stream without finish_reason", respond, 502, "server_error", "without saying why", begun=True)

    def test_error_in_the_stream(self):
        def respond(exchange):
            exchange.begin()
            exchange.send({"error": {"message": "overloaded", "code": 500}})
        self.check("error object in the stream", respond, 500, "server_error", "overloaded")

    def test_nothing_left(self):
        self.proxy.chat()
        self.upstream.respond = failing(500, "no")
        self.proxy.chat()
        self.assertTrue(eventually(lambda: len([line for line in children() if "acp" in line]) <= 6))
        home = [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]
        self.assertEqual(sorted(home), [".config/opencode/opencode.json", ".local/share/opencode/auth.json"])


class UnreachableTest(RealCase):
    def test_connection_refused_and_unknown_name(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            nobody = free.getsockname()[1]
        config = self.folder / ".config/opencode/opencode.json"
        changed = json.loads(config.read_text())
        for name, url in (("refused", f"http://127.0.0.1:{nobody}/v1"), ("noname", "http://no.such.name.invalid/v1")):
            changed["provider"][name] = {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": url, "apiKey": "k"}, "models": {"m": {}}}
        config.write_text(json.dumps(changed))  # a changed configuration is noticed
        for name in ("refused/m", "noname/m"):
            start = time.monotonic()
            status, answer = self.proxy.chat(model=name)
            self.assertEqual((status, answer["error"]["code"]), (502, "upstream_unreachable"), answer)
            report({"refused/m": "connection refused"}.get(name, "name not resolved"), "whole", "502 server_error", time.monotonic() - start, 0)


class IsolationTest(RealCase):
    """The default: a process for each request, and nothing of the user's coding set-up in it."""

    changes = {"spares": 1, "timeout": 30.0}

    @classmethod
    def setUpClass(cls):
        cls.trap = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.trap.cleanup)
        trap = pathlib.Path(cls.trap.name)
        touch = ["sh", "-c", f"touch {trap}/ran-$0; sleep 60", "x"]
        more = {"mcp": {"m": {"type": "local", "command": touch}}, "instructions": ["/etc/passwd"], "lsp": {"l": {"command": touch, "extensions": [".x"]}},
                "command": {"c": {"template": f"!`touch {trap}/ran-command`"}}, "permission": {"*": "allow"}, "share": "auto",
                "formatter": {"f": {"command": touch, "extensions": [".x"]}}, "agent": {"build": {"prompt": "PROMPT OF THE USER"}}}
        real = make_home
        with unittest.mock.patch.dict(globals(), {"make_home": lambda folder, upstream: real(folder, upstream, **more)}):
            super().setUpClass()
        plugins = cls.folder / ".config/opencode/plugin"
        plugins.mkdir()
        (plugins / "p.js").write_text(f'import fs from "fs"; fs.writeFileSync("{trap}/ran-plugin", ""); export const P = async () => ({{}})')
        (cls.folder / ".config/opencode/AGENTS.md").write_text("AGENTS OF THE USER")
        (cls.folder / ".claude").mkdir()
        (cls.folder / ".claude/CLAUDE.md").write_text("CLAUDE OF THE USER")

    def test_nothing_of_the_user_reaches_the_model(self):
        for content in ("hi", "/c", "@general hello", "!touch x"):
            self.upstream.exchanges.clear()
            self.assertEqual(self.proxy.chat(content)[0], 200)
            self.assertEqual(self.exchange().body["messages"], [{"role": "user", "content": content}])
            self.assertEqual(sorted(self.exchange().body), ["messages", "model", "stream"])
        self.assertEqual(list(pathlib.Path(self.trap.name).iterdir()), [])

    def test_each_request_has_a_process_and_leaves_nothing(self):
        self.assertTrue(eventually(lambda: self.proxy.pool.status()["spares"]))
        before = next(iter(self.proxy.pool._processes))
        run = self.proxy.opencode.run_directory
        self.assertEqual(run.stat().st_mode & 0o777, 0o700)
        self.assertEqual(before.home.stat().st_mode & 0o777, 0o700)
        self.assertEqual(self.proxy.chat("the secret words")[0], 200)
        self.assertTrue(eventually(lambda: not before.alive() and not before.home.exists()))
        self.assertTrue(eventually(lambda: self.proxy.pool.status()["spares"]))
        after = next(iter(self.proxy.pool._processes))
        self.assertIsNot(before, after)
        for root in (run, self.folder):
            for path in (pathlib.Path(folder, name) for folder, _, names in os.walk(root) for name in names):
                with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                    self.assertNotIn(b"the secret words", path.read_bytes() if path.is_file() else b"", path)
        self.assertNotIn("the secret words", " ".join(children()))

    def test_port_of_opencode_has_a_password(self):
        self.assertTrue(eventually(lambda: self.proxy.pool.status()["spares"]))
        process = self.proxy.pool._spares[0].result()
        pids = {line.split()[0] for line in children() if "acp" in line} | {str(process._popen.pid)}
        ports, inodes = set(), set()
        for pid in pids:
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                inodes |= {os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")}
        for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                ports.add(int(fields[1].split(":")[1], 16))
        self.assertTrue(ports)
        for port in ports:
            for path in ("/config", "/session", "/provider", "/"):
                with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)) as connection:
                    connection.request("GET", path)
                    self.assertEqual(connection.getresponse().status, 401, path)


class LoginTest(unittest.TestCase):
    """Starting with the real opencode where something is not as it should be."""

    def setUp(self):
        self.path = real_opencode()
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.upstream = Upstream()
        stack.callback(self.upstream.close)
        clean = {name: value for name, value in os.environ.items() if name not in XDG and not name.endswith("_API_KEY")}
        stack.enter_context(unittest.mock.patch.dict(os.environ, {**clean, "HOME": str(self.folder)}, clear=True))
        stack.enter_context(unittest.mock.patch.object(proxy, "log", lambda text: None))
        self.stack = stack

    def test_login_while_running(self):
        running = Running(self.path)
        self.stack.callback(running.close)
        status, answer = running.chat()
        self.assertEqual((status, answer["error"]["code"]), (503, "provider_not_logged_in"))
        self.assertEqual(json.loads(running.request("GET", "/v1/models")[2])["data"], [])
        make_home(self.folder, self.upstream)
        self.assertEqual(running.chat()[1]["choices"][0]["message"]["content"], "Hello w\u00f6r\u2028ld")
        self.assertIn(CHAT, [model["id"] for model in json.loads(running.request("GET", "/v1/models")[2])["data"]])

    def test_model_that_the_catalog_lacks(self):
        make_home(self.folder, self.upstream)
        running = Running(self.path, model=proxy.DEFAULT_MODEL)
        self.stack.callback(running.close)
        self.assertEqual(self.upstream.exchanges, [])  # the warm-up sends nothing
        status, answer = running.chat()
        self.assertEqual((status, answer["model"]), (200, "github-copilot/gpt-4.1"))
        self.assertEqual(self.upstream.exchanges[0].body["model"], "gpt-4.1")

    def test_login_plugin_that_wraps_fetch(self):
        """A plugin that the user has from npm may be the login to a provider, and may put a Request together by itself."""
        name = "opencode-proxy-test-login"  # which no registry has: it must not be installed again
        package = self.folder / f".cache/opencode/packages/{name}@1.0.0"
        plugin = package / "node_modules" / name
        plugin.mkdir(parents=True)
        dependencies = {"dependencies": {name: "1.0.0"}}
        (package / "package.json").write_text(json.dumps(dependencies))
        (package / "package-lock.json").write_text(json.dumps({"lockfileVersion": 3, "packages": {"": dependencies, f"node_modules/{name}": {"version": "1.0.0"}}}))
        (plugin / "package.json").write_text(json.dumps({"name": name, "version": "1.0.0", "type": "module", "main": "index.js"}))
        (plugin / "index.js").write_text("""export const Login = async () => ({ auth: { provider: "local", methods: [],
            loader: async () => ({ fetch: (url, init) => fetch(new Request(url, { ...init, headers: { ...init.headers, "x-login": "yes" } })) }) } })""")
        make_home(self.folder, self.upstream, plugin=[f"{name}@1.0.0"])
        (self.folder / ".local/share/opencode/auth.json").write_text('{"local":{"type":"api","key":"k"}}')
        running = Running(self.path, model="local/m")
        self.stack.callback(running.close)
        self.assertEqual(running.chat("q", seed=7)[1]["choices"][0]["message"]["content"], "Hello w\u00f6r\u2028ld")
        (exchange,) = self.upstream.exchanges
        self.assertEqual(exchange.headers["x-login"], "yes")
        self.assertIsNone(exchange.headers["x-opencode-proxy-session"])
        self.assertEqual({key: exchange.body[key] for key in ("messages", "seed")}, {"messages": [{"role": "user", "content": "q"}], "seed": 7})

    def test_configuration_that_opencode_rejects(self):
        make_home(self.folder, self.upstream)
        (self.folder / ".config/opencode/opencode.json").write_text('{"provider": [}')
        with self.assertRaisesRegex(proxy.StartError, "opencode.json") as caught:
            Running(self.path)
        self.assertNotIn("\x1b", str(caught.exception))

    def test_the_program_and_its_end(self):
        """The program as a user runs it; killed, it leaves no opencode behind."""
        make_home(self.folder, self.upstream)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for end, code in ((signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)):
            temporary = self.folder / f"tmp{code}"
            temporary.mkdir()
            program = subprocess.Popen([sys.executable, str(HERE / "opencode_proxy.py"), "--host", "127.0.0.1", "--port", str(port), "--opencode", self.path],
                                       stderr=subprocess.PIPE, universal_newlines=True, env={**os.environ, "TMPDIR": str(temporary)})
            self.stack.callback(program.stderr.close)
            self.stack.callback(program.kill)
            while "base URL" not in program.stderr.readline():
                self.assertIsNone(program.poll())
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)) as connection:
                connection.request("POST", "/v1/chat/completions", chat_body())
                self.assertEqual(connection.getresponse().status, 200)
                running = [line for line in children() if "acp" in line]
                self.assertTrue(running)
            program.send_signal(end)
            self.assertEqual(program.wait(DEADLINE), code)
            pids = [line.split()[0] for line in running]
            gone = eventually(lambda: not any(pathlib.Path("/proc", pid).exists() for pid in pids))
            self.assertTrue(gone)
            if end is signal.SIGTERM:
                self.assertEqual(list(temporary.iterdir()), [])

    def test_refreshed_login_reaches_the_users_file(self):
        """opencode renews logins by writing auth.json: the link in a process's home must lead to the user's file."""
        make_home(self.folder, self.upstream)
        opencode = proxy.Opencode(self.path)
        self.stack.callback(opencode.close)
        home = opencode.new_home()
        environment = opencode.environment(home, None)
        self.assertEqual(environment["BUN_JSC_useGC"], "0")
        subprocess.run([self.path, "auth", "logout", "github-copilot"], env=environment, cwd=home / "cwd", stdin=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=DEADLINE, check=False)
        self.assertTrue((home / "data/opencode/auth.json").is_symlink())


# ------------------------------------------------------------------------------------------------- real clients

class OpenAIClientTest(RealCase):
    """The `openai` library, unchanged."""

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
        self.client = self.openai.OpenAI(base_url=f"http://127.0.0.1:{self.proxy.port}/v1", api_key="any", max_retries=1)
        self.addCleanup(self.client.close)

    HELLO = [{"role": "user", "content": "hi"}]

    def test_models(self):
        names = [model.id for model in self.client.models.list()]
        self.assertEqual(names[0], self.proxy.opencode.catalog.default)
        self.assertEqual(self.client.models.retrieve(CHAT).id, CHAT)
        with self.assertRaises(self.openai.NotFoundError):
            self.client.models.retrieve("no/such")

    def test_whole_and_streamed(self):
        answer = self.client.chat.completions.create(model="gpt-5-mini", messages=self.HELLO)
        self.assertEqual((answer.choices[0].message.content, answer.model, answer.usage.total_tokens), ("Hello w\u00f6r\u2028ld", "gpt-5-mini", 31))
        with self.client.chat.completions.create(model=CHAT, messages=self.HELLO, stream=True, stream_options={"include_usage": True}) as stream:
            chunks = list(stream)
        self.assertEqual("".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]), "Hello w\u00f6r\u2028ld")
        self.assertEqual(chunks[-1].usage.completion_tokens_details.reasoning_tokens, 7)
        with self.client.chat.completions.stream(model=CHAT, messages=self.HELLO) as stream:
            self.assertEqual(stream.get_final_completion().choices[0].message.content, "Hello w\u00f6r\u2028ld")

    def test_async(self):
        async def ask():
            async with self.openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{self.proxy.port}/v1", api_key="any") as client:
                stream = await client.chat.completions.create(model=CHAT, messages=self.HELLO, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        self.assertEqual(asyncio.run(ask()), "Hello w\u00f6r\u2028ld")

    def test_tools(self):
        def respond(exchange):
            if exchange.body["messages"][-1]["role"] == "tool":
                return answering(("text", "It is " + exchange.body["messages"][-1]["content"]))(exchange)
            return answering(("call", "call_1", "weather", ['{"city": "Par', 'is"}']), finish="tool_calls")(exchange)
        self.upstream.respond = respond
        tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]
        messages = list(self.HELLO)
        with self.client.chat.completions.stream(model=CHAT, messages=messages, tools=tools) as stream:
            message = stream.get_final_completion().choices[0].message
        self.assertEqual((message.tool_calls[0].function.name, message.tool_calls[0].function.arguments), ("weather", '{"city": "Paris"}'))
        messages += [message.model_dump(exclude_none=True, exclude={"parsed"}), {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}]
        answer = self.client.chat.completions.create(model=CHAT, messages=messages, tools=tools)
        self.assertEqual(answer.choices[0].message.content, "It is sunny")

    def test_parse_with_a_schema(self):
        from pydantic import BaseModel

        class City(BaseModel):
            name: str
            people: int

        self.upstream.respond = answering(("text", '{"name":"Paris",'), ("text", '"people":2000000}'))
        for model in FORMATS.values():
            answer = self.client.chat.completions.parse(model=model, messages=self.HELLO, response_format=City)
            self.assertEqual(answer.choices[0].message.parsed, City(name="Paris", people=2000000))

    def test_errors_and_retries(self):
        for status, error, posts in ((400, self.openai.BadRequestError, 1), (401, self.openai.AuthenticationError, 1), (403, self.openai.PermissionDeniedError, 1),
                                     (404, self.openai.NotFoundError, 1), (429, self.openai.RateLimitError, 2), (500, self.openai.InternalServerError, 2)):
            self.upstream.exchanges.clear()
            self.upstream.respond = failing(status, {"error": {"message": "the words", "code": "c"}}, Retry_After="0")
            with self.assertRaises(error) as caught:
                self.client.chat.completions.create(model=CHAT, messages=self.HELLO)
            self.assertIn("the words", str(caught.exception))
            self.assertEqual((caught.exception.code, len(self.upstream.exchanges)), ("c", posts))
        with self.assertRaises(self.openai.BadRequestError) as caught:
            self.client.chat.completions.create(model=CHAT, messages=[])
        self.assertEqual(caught.exception.param, "messages")

    def test_retry_succeeds(self):
        self.upstream.respond = lambda exchange: (failing(429, "{}", Retry_After="0") if len(self.upstream.exchanges) == 1 else answer_text)(exchange)
        self.assertEqual(self.client.chat.completions.create(model=CHAT, messages=self.HELLO).choices[0].message.content, "Hello w\u00f6r\u2028ld")

    def test_error_in_the_stream(self):
        def respond(exchange):
            exchange.begin()
            exchange.send(chat_chunk({"content": "part"}))
            time.sleep(0.2)
            exchange.drop()
        self.upstream.respond = respond
        with self.assertRaises(self.openai.APIError):
            for _ in self.client.chat.completions.create(model=CHAT, messages=self.HELLO, stream=True):
                pass


AI_SDK = r"""
import { createOpenAICompatible } from "@ai-sdk/openai-compatible"
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai"
import { z } from "zod"
const provider = createOpenAICompatible({ name: "proxy", baseURL: process.argv[2], includeUsage: true, supportsStructuredOutputs: true })
const model = provider(process.argv[3])
const out = {}
const whole = await generateText({ model, prompt: "plain" })
Object.assign(out, { text: whole.text, tokens: whole.usage.totalTokens })
const stream = streamText({ model, prompt: "plain" })
out.pieces = []
for await (const piece of stream.textStream) out.pieces.push(piece)
const weather = tool({ description: "d", inputSchema: z.object({ city: z.string() }), execute: async ({ city }) => "sunny in " + city })
out.tools = (await generateText({ model, prompt: "tools", tools: { weather }, stopWhen: stepCountIs(3) })).text
out.object = (await generateObject({ model, prompt: "object", schema: z.object({ name: z.string() }) })).object
console.log(JSON.stringify(out))
"""


class AISDKTest(RealCase):
    """Vercel's `ai` SDK with `@ai-sdk/openai-compatible`, in the folder that OPENCODE_PROXY_TEST_NPM names."""

    @classmethod
    def setUpClass(cls):
        folder = pathlib.Path(os.environ.get("OPENCODE_PROXY_TEST_NPM") or "/nowhere")
        if not (folder / "node_modules/ai").exists() or not shutil.which("node"):
            missing("the ai SDK (npm install ai @ai-sdk/openai-compatible zod; its folder in OPENCODE_PROXY_TEST_NPM)")
        super().setUpClass()
        script = tempfile.NamedTemporaryFile("w", suffix=".mjs", dir=folder)  # noqa: SIM115
        cls.addClassCleanup(script.close)
        script.write(AI_SDK)
        script.flush()
        cls.script = script.name

    def test_text_stream_tools_and_object(self):
        def respond(exchange):
            last = exchange.body["messages"][-1]
            content = last["content"] if isinstance(last["content"], str) else "".join(part.get("text", "") for part in last["content"])
            if last["role"] == "tool":
                return answering(("text", "It is " + json.loads(content) if content.startswith('"') else "It is " + content))(exchange)
            if content == "tools":
                return answering(("call", "call_1", "weather", ['{"city":"Paris"}']), finish="tool_calls")(exchange)
            if content == "object":
                return answering(("text", '{"name":"Paris"}'))(exchange)
            return answer_text(exchange)
        self.upstream.respond = respond
        node = subprocess.run(["node", self.script, f"http://127.0.0.1:{self.proxy.port}/v1", CHAT], capture_output=True,
                              timeout=2 * DEADLINE, check=False)
        self.assertEqual(node.returncode, 0, node.stderr.decode())
        self.assertEqual(json.loads(node.stdout), {
            "text": "Hello w\u00f6r\u2028ld", "tokens": 31, "pieces": ["Hel", "lo ", "w\u00f6r\u2028ld"], "tools": "It is sunny in Paris", "object": {"name": "Paris"}})


if __name__ == "__main__":
    unittest.main()
