#!/usr/bin/env python3
"""Serve the models of `opencode` to every app that speaks OpenAI's chat completions API.

    python3 opencode_proxy.py --port 4141        serve; apps use http://localhost:4141/v1
    python3 -m unittest -v                       run the tests (in the folder that holds them)

The flow of one request, which is also the order of this file:

    HTTP request -> ChatRequest -> envelope -> opencode process -> events -> chunks -> socket

Every request gets an `opencode acp` process of its own: newline-delimited JSON-RPC 2.0 on stdin and stdout. A
small plugin inside it replaces what opencode would say to the model by what the client said (the envelope) and
reports what the model answers. opencode itself only logs in and talks to the provider: it has no tools, no files
and no memory. Facts about opencode were observed with versions 1.17.0 and 1.18.33.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hmac
import http.client
import http.server
import io
import json
import os
import pathlib
import queue
import re
import secrets
import select
import selectors
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Callable, Union

__version__ = "1.0.0"

Json = dict[str, Any]
Trace = Callable[[str, Json, int], None]  # takes an arrow, a JSON-RPC message and its size in bytes

DEFAULT_MODEL = "github-copilot/gpt-4.1"
# GitHub took gpt-4.1 out of Copilot in June 2026: tried in this order when no model was asked for on the command line.
SUCCESSORS = ("github-copilot/gpt-5-mini", "github-copilot/gpt-5.4-mini", "github-copilot/gpt-5.5")
MIN_OPENCODE = (1, 17, 0)  # older ones send no session header or keep sessions on disk

MAX_CHOICES = 8             # `n`: one request must not start an unbounded number of processes
MAX_STOP_SEQUENCES = 64     # `stop`: each is looked for in every delta
MAX_LINE_BYTES = 16 << 20   # one line of a child's stdout: a runaway child must not fill the memory
MAX_PROMPT_LINE = 1 << 20   # opencode reads a line in quadratic time: a longer prompt goes past its reader
MAX_INBOX_BYTES = 1 << 20   # stdout read ahead of a slow client; beyond it the child's pipe fills and the child waits
MAX_STDERR_BYTES = 4 << 10  # what is kept of a child's stderr to explain a failure
MAX_CONNECTIONS = 2000      # threads; one more connection closes the one that has been idle longest
RESERVED_FILES = 200        # of the open files allowed: for the processes' pipes, so that connections cannot take them all
MAX_DRAIN_BYTES = 64 << 20  # unread body taken in after a refusal, so that the client can read the refusal
DRAIN_SECONDS = 5.0         # ... and for how long
IDLE_SECONDS = 60.0         # a connection without a complete request header is closed after this
BODY_SECONDS = 120.0        # a body must have arrived after this
WRITE_SECONDS = 60.0        # a client that takes nothing of its answer for so long has gone
PING_SECONDS = 15.0         # silence after which a stream gets a comment, so that middleboxes keep it open
START_SECONDS = 60.0        # opencode must answer each request of its start within this
STOP_SECONDS = 2.0          # between SIGTERM and SIGKILL
QUEUE_RETRY_SECONDS = 5     # Retry-After of a refusal because everything is busy
SPARE_SECONDS = 1800.0      # a spare is replaced at this age: logins and model lists change
CATALOG_SECONDS = 6 * 3600  # likewise the catalog
MAX_RETRY_SECONDS = 60.0    # between attempts to start a spare when they keep failing
TEND_SECONDS = 15.0         # how often spares are looked after
KEEP_WARM_SECONDS = 300.0   # reused processes beyond --spares end after so long without work
MAX_PROCESS_BYTES = 1 << 30  # a reused process that has grown past this is not used again


# ---------------------------------------------------------------------------------------------------- errors

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class APIError(Exception):
    """A failure as the client is told of it, in OpenAI's shape.

    `type` is derived from `status` where it is not given; `headers` are added to the HTTP response.
    """

    def __init__(self, status: int, message: str, type: str | None = None, param: str | None = None,
                 code: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> Json:
        """Return OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class ClientDisconnected(Exception):
    """The client hung up: nobody is left to answer."""


class ProcessDied(APIError):
    """The opencode process ended, or broke its protocol, before the answer was complete."""

    def __init__(self, message: str, stderr_tail: str = "") -> None:
        super().__init__(502, message + (": " + stderr_tail if stderr_tail else ""), code="opencode_failed")


class RequestRefused(ProcessDied):
    """opencode answered a JSON-RPC request with an error."""


class StartError(Exception):
    """The proxy cannot start; the message tells a person what to do."""


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """Return the error for a request that is wrong in its field `param`."""
    return APIError(400, message, param=param, code=code)


def upstream_error(status: int, headers: Mapping[str, str], body: str) -> APIError:
    """Return what a provider's refusal means for the client: its own status, message, type and code.

    `body` may be OpenAI's error object, another JSON object with a message in it, or a gateway's HTML page.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    answer = answer if isinstance(answer, dict) else {}
    error = answer.get("error", answer)
    error = error if isinstance(error, dict) else {"message": error}
    message = next((error[key] for key in ("message", "detail") if isinstance(error.get(key), str)), None)
    if not message:
        text = " ".join(re.sub(r"(?s)<(script|style).*?(</\1>|\Z)|<[^<>]*(>|\Z)", " ", body).split())  # in linear time
        message = "The model's provider answered {} {}{}".format(
            status, http.client.responses.get(status, ""), ": " + text[:300] if text else "").strip()
    kept = {name.title(): headers[name] for name in ("retry-after", "retry-after-ms") if headers.get(name)}
    text_of = {key: error[key] for key in ("type", "param", "code") if isinstance(error.get(key), str)}
    if text_of.get("type") == "error":  # Anthropic's envelope, not a type
        del text_of["type"]
    return APIError(status if 400 <= status <= 599 else 502, message, headers=kept, **text_of)


# --------------------------------------------------------------------------------------------------- request

NUMBER, INTEGER, STRING, BOOLEAN, OBJECT, ARRAY = "a number", "an integer", "a string", "a boolean", "an object", "an array"

CHECKS: dict[str, Callable[[Any], bool]] = {
    NUMBER: lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    INTEGER: lambda value: isinstance(value, int) and not isinstance(value, bool),
    STRING: lambda value: isinstance(value, str),
    BOOLEAN: lambda value: isinstance(value, bool),
    OBJECT: lambda value: isinstance(value, dict),
    ARRAY: lambda value: isinstance(value, list),
}

# The fields of a request whose types are known; null means absent, as at OpenAI. Others pass unchecked.
FIELDS: dict[str, tuple[str, ...]] = {
    "model": (STRING,), "stream": (BOOLEAN,), "stream_options": (OBJECT,), "n": (INTEGER,), "temperature": (NUMBER,),
    "top_p": (NUMBER,), "max_tokens": (INTEGER,), "max_completion_tokens": (INTEGER,), "stop": (STRING, ARRAY),
    "seed": (INTEGER,), "presence_penalty": (NUMBER,), "frequency_penalty": (NUMBER,), "logit_bias": (OBJECT,),
    "logprobs": (BOOLEAN,), "top_logprobs": (INTEGER,), "user": (STRING,), "reasoning_effort": (STRING,),
    "tools": (ARRAY,), "tool_choice": (STRING, OBJECT), "parallel_tool_calls": (BOOLEAN,), "functions": (ARRAY,),
    "function_call": (STRING, OBJECT), "response_format": (OBJECT,), "metadata": (OBJECT,), "store": (BOOLEAN,),
    "service_tier": (STRING,), "verbosity": (STRING,), "modalities": (ARRAY,), "audio": (OBJECT,),
    "prediction": (OBJECT,), "web_search_options": (OBJECT,), "prompt_cache_key": (STRING,),
    "safety_identifier": (STRING,),
}

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# What a content part of each type must hold: the field, and within it the strings it needs.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "text": ("text", ()), "refusal": ("refusal", ()), "image_url": ("image_url", ("url",)),
    "input_audio": ("input_audio", ("data", "format")), "file": ("file", ()),
}


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A validated request body; `body` is what the client sent, less the fields that were null."""

    body: Json
    messages: list[Json]
    model: str | None
    stream: bool
    include_usage: bool
    choices: int
    stop: tuple[str, ...]
    legacy_functions: bool


def parse_chat_request(data: bytes) -> ChatRequest:
    """Return the request that `data`, a JSON body, holds; raise APIError 400 where it is wrong."""
    body = {key: value for key, value in parse_json_object(data).items() if value is not None}
    for name, kinds in FIELDS.items():
        if name in body:
            require(body[name], kinds, name)
    check_messages(body.get("messages"))
    if not 1 <= body.get("n", 1) <= MAX_CHOICES:
        raise invalid(f"n must be from 1 to {MAX_CHOICES}", "n")
    check_tools(body)
    if body.get("response_format", {}).get("type") == "json_schema":
        require(body["response_format"].get("json_schema"), (OBJECT,), "response_format.json_schema")
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > MAX_STOP_SEQUENCES:
        raise invalid(f"stop may have at most {MAX_STOP_SEQUENCES} sequences", "stop")
    for index, sequence in enumerate(stop):
        require(sequence, (STRING,), f"stop[{index}]")
    legacy = "functions" in body and "tools" not in body
    if "functions" in body or "function_call" in body or any("function_call" in m for m in body["messages"]):
        body = modernized(body)
    return ChatRequest(body=body, messages=body["messages"], model=body.get("model") or None,
                       stream=body.get("stream", False),
                       include_usage=body.get("stream_options", {}).get("include_usage") is True,
                       choices=body.get("n", 1), stop=tuple(s for s in stop if s), legacy_functions=legacy)


def parse_json_object(data: bytes) -> Json:
    """Return the JSON object in `data` (RFC 8259: UTF-8, no NaN, no Infinity); raise APIError 400 otherwise."""
    try:
        body = json.loads(data.decode("utf-8-sig"), parse_constant=not_a_number, parse_float=finite_float)
    except UnicodeDecodeError as error:
        raise invalid(f"The body is not UTF-8: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise invalid("The body is not valid JSON: {}".format(
            "too deeply nested" if isinstance(error, RecursionError) else error)) from None
    if not isinstance(body, dict):
        raise invalid("The body must be a JSON object")
    return body


def not_a_number(text: str) -> Any:
    """Refuse the constants that Python's parser takes although JSON has none."""
    raise ValueError(f"{text} is not JSON")


def finite_float(text: str) -> float:
    """Return the number that `text` holds; refuse one that does not fit and would turn into Infinity."""
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def require(value: Any, kinds: Sequence[str], param: str) -> None:
    """Raise APIError 400 unless `value` is of one of `kinds`."""
    if not any(CHECKS[kind](value) for kind in kinds):
        raise invalid("{} must be {}".format(param, " or ".join(kinds)), param)


def check_messages(messages: Any) -> None:
    """Raise APIError 400 unless `messages` is a conversation of known roles and content parts."""
    if messages is None:
        raise invalid("messages is required", "messages")
    require(messages, (ARRAY,), "messages")
    if not messages:
        raise invalid("messages must not be empty", "messages")
    for index, message in enumerate(messages):
        param = f"messages[{index}]"
        require(message, (OBJECT,), param)
        if message.get("role") not in ROLES:
            raise invalid("{}.role must be one of {}".format(param, ", ".join(ROLES)), param + ".role")
        check_content(message, param)
        if message["role"] == "tool":
            require(message.get("tool_call_id"), (STRING,), param + ".tool_call_id")
        if message["role"] == "function":
            require(message.get("name"), (STRING,), param + ".name")
        if message.get("tool_calls") is not None:
            require(message["tool_calls"], (ARRAY,), param + ".tool_calls")
        for number, call in enumerate(message.get("tool_calls") or ()):
            where = f"{param}.tool_calls[{number}]"
            require(call, (OBJECT,), where)
            require(call.get("id"), (STRING,), where + ".id")
            if is_function_call(call):
                check_function_call(call.get("function"), where + ".function")
        if message.get("function_call") is not None:
            check_function_call(message["function_call"], param + ".function_call")


def is_function_call(call: Json) -> bool:
    """Tell whether a tool call is of a function, as it is where it does not say."""
    return (call.get("type") or "function") == "function"


def check_function_call(call: Any, param: str) -> None:
    """Raise APIError 400 unless `call` has a name and arguments."""
    require(call, (OBJECT,), param)
    for key in ("name", "arguments"):
        require(call.get(key), (STRING,), f"{param}.{key}")


def check_content(message: Json, param: str) -> None:
    """Raise APIError 400 unless the content of `message` is a string, known parts or (assistant) null."""
    content, param = message.get("content"), param + ".content"
    if content is None and message["role"] == "assistant":
        return
    require(content, (STRING, ARRAY), param)
    for index, part in enumerate(content if isinstance(content, list) else ()):
        where = f"{param}[{index}]"
        require(part, (OBJECT,), where)
        if part.get("type") not in list(PARTS):
            raise invalid("{}.type must be one of {}".format(where, ", ".join(PARTS)), where + ".type")
        field, strings = PARTS[part["type"]]
        require(part.get(field), (STRING,) if field in ("text", "refusal") else (OBJECT,), where + "." + field)
        for name in strings:
            require(part[field].get(name), (STRING,), f"{where}.{field}.{name}")
        if field == "image_url" and not re.match(r"(?i)(https?://|data:[^,]*,)", part[field]["url"]):
            raise invalid(f"{where}.image_url.url must be an http, https or data URL", where + ".image_url.url")


def check_tools(body: Json) -> None:
    """Raise APIError 400 unless every tool and function, and the one that is chosen, is an object with a name."""
    for index, tool in enumerate(body.get("tools", ())):
        param = f"tools[{index}]"
        require(tool, (OBJECT,), param)
        require(tool.get("type"), (STRING,), param + ".type")
        if tool["type"] == "function":
            require(tool.get("function"), (OBJECT,), param + ".function")
            require(tool["function"].get("name"), (STRING,), param + ".function.name")
    for index, function in enumerate(body.get("functions", ())):
        require(function, (OBJECT,), f"functions[{index}]")
        require(function.get("name"), (STRING,), f"functions[{index}].name")
    choice, function = demanded_function(body), body.get("function_call")
    if choice is not None:
        require(choice.get("function"), (OBJECT,), "tool_choice.function")
        require(choice["function"].get("name"), (STRING,), "tool_choice.function.name")
    if isinstance(function, dict):
        require(function.get("name"), (STRING,), "function_call.name")


def demanded_function(body: Json) -> Json | None:
    """Return tool_choice where it demands one function, None otherwise."""
    choice = body.get("tool_choice")
    return choice if isinstance(choice, dict) and choice.get("type", "function") == "function" else None


def modernized(body: Json) -> Json:
    """Return `body` with the deprecated functions, function_call and role "function" said as tools.

    opencode reads only tool calls from an answer. The answer is turned back by Choice.
    """
    body = dict(body)
    functions, choice = body.pop("functions", None), body.pop("function_call", None)
    if functions is not None and "tools" not in body:
        body["tools"] = [{"type": "function", "function": function} for function in functions]
        if choice is not None:
            body["tool_choice"] = {"type": "function", "function": choice} if isinstance(choice, dict) else choice
    messages: list[Json] = []
    for index, message in enumerate(body["messages"]):
        message = dict(message)
        call = message.pop("function_call", None)
        if call is not None:
            message["tool_calls"] = [{"id": f"call_{index}", "type": "function", "function": call}]
        if message["role"] == "function":  # the answer to the call in the message before it
            message = {"role": "tool", "tool_call_id": f"call_{index - 1}", "content": message["content"]}
        messages.append(message)
    return {**body, "messages": messages}


# -------------------------------------------------------------------------------------------------- envelope

# What opencode adds by itself, or derives from the client's fields in its own way, and what is therefore taken out
# of a body before the client's own fields are put in.
REMOVED = {
    "chat/completions": ("tools", "tool_choice", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop",
                         "reasoning_effort", "verbosity", "user", "response_format", "messages"),
    "responses": ("tools", "tool_choice"),
    "messages": ("tools", "tool_choice"),
}


def envelope(request: ChatRequest) -> Json:
    """Return what the plugin needs to know of `request`.

    `system` and `conversation` are the client's messages in opencode's shapes (it derives Copilot's headers from
    them, and the bodies of all wire formats but /chat/completions). `overlays` hold, for each wire format, the keys
    to `remove` from the body that opencode built, the objects to `merge` into it, the JSON text to `add` (text, not an
    object: numbers and order of keys stay as they are), and texts to `replace`. `params` and `effort` are opencode's own
    settings.
    """
    body, attachments = request.body, Attachments()
    messages = [attachments.shortened(message) for message in request.messages]
    params = {"temperature": body.get("temperature"), "topP": body.get("top_p"),
              "maxOutputTokens": body.get("max_completion_tokens", body.get("max_tokens"))}
    fields = {"chat/completions": chat_fields(request, messages), "responses": responses_fields(body),
              "messages": messages_fields(body)}
    merged = {"responses": text_settings(body), "messages": output_config(body)}
    conversation = to_conversation(messages, attachments)
    return {
        "system": [text_of(m["content"]) for m in messages if m["role"] in ("system", "developer")],
        "conversation": conversation,
        "params": {key: value for key, value in params.items() if value is not None},
        "effort": body.get("reasoning_effort"),
        "overlays": {name: {"remove": sorted({*REMOVED[name], *added}), "merge": merged.get(name, {}),
                            "add": compact_json(added), "replace": attachments.replacements[name]}
                     for name, added in fields.items()},
        "payloads": attachments.payloads, "token": attachments.token,
    }


def prompt_of(request: ChatRequest) -> str:
    """Return the envelope of `request` in JSON; raise APIError 400 where it is too deeply nested to be written."""
    try:
        return json.dumps(envelope(request))
    except RecursionError:
        raise invalid("The body is too deeply nested") from None


WARM_UP = '{"warmup":true,"system":[],"conversation":[{"role":"user","parts":[{"type":"text","text":"-"}]}]}'


def compact_json(value: Any) -> str:
    """Return `value` as JSON of the fewest bytes; lone surrogates, which UTF-8 has no bytes for, stay escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"))
    return text


def text_of(content: Any) -> str:
    """Return the text of a message's content."""
    if isinstance(content, list):
        return "".join(part.get(part.get("type")) or "" for part in content if part.get("type") in ("text", "refusal"))
    return content or ""


ATTACHED = ("image_url", "input_audio", "file")  # the content parts that are not text


class Attachments:
    """Images, audio and files of a conversation, which pass through opencode only as short markers.

    opencode would scale large images, download http ones and refuse what it does not know. It gets a tiny image with
    a marker for each. When the body leaves, the plugin puts what the wire format says instead of that image
    (`replacements`) and, last, the base64 text of the attachments in its places (`payloads`).
    """

    def __init__(self) -> None:
        self.token = secrets.token_hex(10)  # the plugin lets no body out that still has it
        self.payloads: list[tuple[str, str]] = []
        self.replacements: dict[str, list[tuple[str, str]]] = {"chat/completions": [], "responses": [], "messages": []}
        self._count = 0

    def _marker(self) -> str:
        self._count += 1
        return f"{self.token}{self._count:04x}"  # also valid base64, which no library changes on its way

    def shortened(self, message: Json) -> Json:
        """Return `message` with markers in place of the base64 texts in it."""
        if not isinstance(message.get("content"), list):
            return message
        return {**message, "content": [self._shortened_part(part) for part in message["content"]]}

    def _shortened_part(self, part: Json) -> Json:
        kind = part["type"]
        key = {"image_url": "url", "input_audio": "data", "file": "file_data"}.get(kind)
        value = part[kind].get(key) if key else None
        if not isinstance(value, str):
            return part
        head, comma, payload = value.rpartition(",")
        if not re.fullmatch(r"[A-Za-z0-9+/=]+", payload) or (comma and not head.endswith(";base64")):
            return part
        self.payloads.append((self._marker(), payload))
        return {**part, kind: {**part[kind], key: head + comma + self.payloads[-1][0]}}

    def stand_in(self, part: Json) -> Json:
        """Return the opencode part that stands for `part`, a shortened content part."""
        marker = self._marker()
        url = "data:image/png;base64," + marker
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": marker}}
        for wire_format, found, meant in (("responses", {"type": "input_image", "image_url": url}, responses_part(part)),
                                          ("messages", image, messages_part(part))):
            self.replacements[wire_format].append((compact_json(found)[1:-1], compact_json(meant)[1:-1]))
        return {"type": "file", "mime": "image/png", "url": url}


def responses_part(part: Json) -> Json:
    """Return a content part as /responses has it; what it does not have is left to the provider to refuse."""
    if part["type"] == "image_url":
        detail = part["image_url"].get("detail")
        return {"type": "input_image", "image_url": part["image_url"]["url"], **({"detail": detail} if detail else {})}
    return {"type": "input_file", **part["file"]} if part["type"] == "file" else part


def messages_part(part: Json) -> Json:
    """Return a content part as Anthropic's /messages has it; what it does not have is left to the provider to refuse."""
    kind, url = ("image", part["image_url"]["url"]) if part["type"] == "image_url" else (
        "document", part["file"].get("file_data")) if part["type"] == "file" else ("", None)
    if not isinstance(url, str):
        return part
    head, _, data = url.partition(",")
    head = head.lower()
    source = ({"type": "base64", "media_type": head[5:].partition(";")[0], "data": data}
              if head.startswith("data:") and head.endswith(";base64") else {"type": "url", "url": url})
    title = part["file"].get("filename") if kind == "document" else None
    return {"type": kind, "source": source, **({"title": title} if title else {})}


def to_conversation(messages: Sequence[Json], attachments: Attachments) -> list[Json]:
    """Return `messages` in opencode's shapes: user and assistant turns; a tool's result belongs to its call."""
    results: dict[str, list[Any]] = collections.defaultdict(list)
    conversation: list[Json] = []
    for message in reversed(messages):  # so that a call finds the results that follow it
        if message["role"] == "tool":
            results[message["tool_call_id"]].append(message["content"])
        elif message["role"] == "user":
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else [
                attachments.stand_in(part) if part["type"] in ATTACHED else {"type": "text", "text": text_of([part])}
                for part in content]
            conversation.append({"role": "user", "parts": parts})
        elif message["role"] == "assistant":
            text = text_of(message.get("content"))
            parts = [{"type": "text", "text": text}] if text else []
            calls = [call for call in message.get("tool_calls") or () if is_function_call(call)]
            parts += [tool_part(call, (results[call["id"]] or [""]).pop(), attachments) for call in calls]
            for call in calls:
                results.pop(call["id"], None)
            conversation.append({"role": "assistant", "parts": parts})
    # opencode insists on a user's message
    return conversation[::-1] or [{"role": "user", "parts": [{"type": "text", "text": " "}]}]


def tool_part(call: Json, result: Any, attachments: Attachments) -> Json:
    """Return an assistant's tool call with the content of its result in opencode's shape."""
    try:
        arguments = json.loads(call["function"]["arguments"] or "{}", parse_constant=not_a_number, parse_float=finite_float)
    except (ValueError, RecursionError):
        arguments = {}
    attached = [attachments.stand_in(part) for part in result if part["type"] in ATTACHED] if isinstance(result, list) else []
    state = {"status": "completed", "input": arguments if isinstance(arguments, dict) else {"value": arguments},
             "output": text_of(result), "title": "", "metadata": {}, "time": {"start": 0, "end": 0},
             **({"attachments": attached} if attached else {})}
    return {"type": "tool", "callID": call["id"], "tool": call["function"]["name"], "state": state}


def chat_fields(request: ChatRequest, messages: list[Json]) -> Json:
    """Return the body's fields for /chat/completions: the client's own."""
    own = {key: value for key, value in request.body.items() if key not in ("model", "stream", "stream_options", "n")}
    own["messages"] = messages
    # without it the provider counts no tokens; opencode asks by itself where it knows that the provider can
    return {**own, "stream_options": request.body["stream_options"]} if request.include_usage else own


NO_PARAMETERS: Json = {"type": "object", "properties": {}}


def chosen_function(body: Json) -> str | None:
    """Return the name of the one function that tool_choice demands."""
    choice = demanded_function(body)
    return None if choice is None else choice["function"]["name"]


def responses_fields(body: Json) -> Json:
    """Return what opencode's conversion to /responses loses."""
    fields: Json = {key: body[key] for key in ("parallel_tool_calls", "user", "metadata", "service_tier", "store",
                                         "prompt_cache_key", "safety_identifier") if key in body}
    if body.get("tools"):
        fields["tools"] = [responses_tool(tool) for tool in body["tools"]]
        if "tool_choice" in body:
            name = chosen_function(body)
            fields["tool_choice"] = {"type": "function", "name": name} if name else body["tool_choice"]
    return fields


def responses_tool(tool: Json) -> Json:
    """Return a tool as /responses has it; what is not a function is left to the provider to refuse."""
    if tool["type"] != "function":
        return tool
    function = tool["function"]
    return {"type": "function", "name": function["name"], "description": function.get("description"),
            "parameters": function.get("parameters") or NO_PARAMETERS, "strict": function.get("strict", False)}


def text_settings(body: Json) -> Json:
    """Return what /responses says about the form of the answer."""
    text: Json = {"verbosity": body["verbosity"]} if "verbosity" in body else {}
    wanted = body.get("response_format")
    if wanted:
        text["format"] = {"type": "json_schema", **wanted["json_schema"]} if wanted.get("type") == "json_schema" else wanted
    return {"text": text} if text else {}


def output_config(body: Json) -> Json:
    """Return what /messages says about the form of the answer: it knows schemas, but no json_object."""
    wanted = body.get("response_format", {})
    schema = wanted["json_schema"].get("schema", {}) if wanted.get("type") == "json_schema" else None
    return {"output_config": {"format": {"type": "json_schema", "schema": schema}}} if schema is not None else {}


def messages_fields(body: Json) -> Json:
    """Return what opencode's conversion to Anthropic's /messages loses."""
    fields: Json = {}
    stop = body.get("stop")
    if stop:
        fields["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    if "user" in body:
        fields["metadata"] = {"user_id": body["user"]}
    if body.get("tools"):
        fields["tools"] = [messages_tool(tool) for tool in body["tools"]]
        wanted, name = body.get("tool_choice", "auto"), chosen_function(body)
        kind = {"required": "any", "none": "none"}.get(wanted, "auto") if isinstance(wanted, str) else "tool"
        choice: Json = {"type": kind, **({"name": name} if name else {}), **(wanted if kind == "tool" and not name else {})}
        if body.get("parallel_tool_calls") is False and choice["type"] != "none":
            choice["disable_parallel_tool_use"] = True
        if "tool_choice" in body or "disable_parallel_tool_use" in choice:
            fields["tool_choice"] = choice
    return fields


def messages_tool(tool: Json) -> Json:
    """Return a tool as Anthropic's /messages has it; what is not a function is left to the provider to refuse."""
    if tool["type"] != "function":
        return tool
    function = tool["function"]
    description = {"description": function["description"]} if function.get("description") else {}
    return {"name": function["name"], **description, "input_schema": function.get("parameters") or NO_PARAMETERS}


# ---------------------------------------------------------------------------------------------------- plugin

# Loaded by every opencode process. It knows opencode's hooks but nothing of any provider's JSON: it does what the
# envelope says, lets one POST per session out and reports what comes back, as JSON-RPC notifications on stdout. An
# answer in a known wire format does not pass through opencode at all.
PLUGIN = r"""
import { readFile } from "node:fs/promises"

const HEADER = "x-opencode-proxy-session"
// opencode instantiates a plugin more than once in a process: the state is shared, fetch is wrapped once
const proxy = (globalThis.opencodeProxy ??= { turns: new Map(), fetch: globalThis.fetch })
const report = (method, sessionId, params) =>
  process.stdout.write(JSON.stringify({ jsonrpc: "2.0", method: "proxy/" + method, params: { sessionId, ...params } }) + "\n")

const refuse = (sessionId, error) => { // with a status that opencode does not retry
  if (error) report("error", sessionId, error)
  return Response.json({ error: { message: "refused by opencode_proxy" } }, { status: 400 })
}

const outgoing = (body, overlay, turn) => {
  let text = body
  if (overlay) {
    const kept = JSON.parse(body)
    for (const key of overlay.remove) delete kept[key]
    for (const [key, fields] of Object.entries(overlay.merge)) kept[key] = { ...kept[key], ...fields }
    text = JSON.stringify(kept)
    if (overlay.add !== "{}") text = text.slice(0, -1) + "," + overlay.add.slice(1)
    for (const [found, replacement] of overlay.replace) text = text.replaceAll(found, () => replacement)
  }
  const payloads = new Map(turn.payloads) // put in at once: a copy of the text for each would take all memory
  text = text.replace(new RegExp(turn.token + "[0-9a-f]{4,}", "g"), (marker) => payloads.get(marker) ?? marker)
  if (text.includes(turn.token)) throw new Error("this provider's wire format is not known: attachments cannot be sent")
  return text
}

const relay = async (sessionId, answer) => { // line by line, past opencode, which would take its time with each
  const decoder = new TextDecoder()
  let rest = ""
  const tell = (line) => { if (line.startsWith("data:")) report("sse", sessionId, { data: line.slice(5).trim() }) }
  for await (const bytes of answer.body) {
    const lines = (rest + decoder.decode(bytes, { stream: true })).split("\n")
    rest = lines.pop()
    lines.forEach(tell)
  }
  tell(rest)
  report("end", sessionId)
}

const fetchOnce = async (input, init) => {
  if (input instanceof Request && input.headers.has(HEADER)) // so do some providers' own wrappers of fetch
    [input, init] = [input.url, { method: "POST", headers: input.headers, body: await input.text(), signal: input.signal }]
  const path = new URL(input?.url ?? input).pathname
  // opencode's Copilot hook looks the session up, twice and over HTTP, which takes a third of the time to the first token
  for (const [id, turn] of proxy.turns) if (turn.preparing && path.startsWith(`/session/${id}`)) return Response.json({})
  const headers = new Headers(init?.headers)
  const sessionId = headers.get(HEADER)
  if (!sessionId) return proxy.fetch(input, init)
  headers.delete(HEADER)
  const turn = proxy.turns.get(sessionId)
  if (!turn || turn.posted || turn.warmup) return refuse(sessionId, !turn && { message: "no envelope" })
  turn.posted = true
  const format = Object.keys(turn.overlays).find((name) => path.endsWith("/" + name))
  try {
    const answer = await proxy.fetch(input, { ...init, headers, body: outgoing(init.body, turn.overlays[format], turn) })
    if (!answer.ok) return refuse(sessionId, { status: answer.status, headers: Object.fromEntries(answer.headers),
      body: (await answer.text()).slice(0, 65536) })
    report("upstream", sessionId, { format })
    if (!format) return answer // opencode reads it, and the event hook tells
    turn.relayed = true
    await relay(sessionId, answer)
    return refuse(sessionId) // ends the turn
  } catch (error) {
    return refuse(sessionId, { network: error?.code, message: String(error?.message ?? error) })
  }
}
if (globalThis.fetch === proxy.fetch) globalThis.fetch = Object.assign(fetchOnce, proxy.fetch)

const asMessages = (conversation, user) => conversation.map(({ role, parts }, m) => {
  const id = `${user.id}_${m}`
  const info = role === "user" ? { ...user, id } : { id, role, sessionID: user.sessionID, parentID: user.id,
    mode: user.agent, agent: user.agent, ...user.model, path: { cwd: "/", root: "/" }, cost: 0,
    time: { created: 0, completed: 0 }, tokens: { input: 0, output: 0, reasoning: 0, cache: { read: 0, write: 0 } } }
  return { info, parts: parts.map((part, p) => ({ id: `prt_${m}_${p}`, sessionID: user.sessionID, messageID: id, ...part })) }
})

export const OpencodeProxy = async () => (report("loaded"), {
  config: async (config) => { // nothing of the user's coding set-up runs
    Object.assign(config, { mcp: {}, instructions: [], command: {}, lsp: false, formatter: false })
  },
  "chat.message": async (_, { message, parts }) => { // throws, and nothing is sent, unless it is an envelope
    const envelope = JSON.parse(parts[0].text)
    const turn = envelope.fifo ? JSON.parse(await readFile(envelope.fifo, "utf8")) : envelope
    proxy.turns.set(message.sessionID, { ...turn, relayed: turn.warmup, types: {} })
    parts[0].text = "-"
  },
  "experimental.chat.messages.transform": async (_, { messages }) => {
    const user = messages.find(({ info }) => info.role === "user").info
    messages.splice(0, messages.length, ...asMessages(proxy.turns.get(user.sessionID).conversation, user))
  },
  "experimental.chat.system.transform": async ({ sessionID }, { system }) => {
    system.splice(0, system.length, ...proxy.turns.get(sessionID).system)
  },
  "chat.params": async ({ sessionID, model, message }, output) => {
    const turn = proxy.turns.get(sessionID)
    if (turn.warmup) report("warm", sessionID)
    Object.assign(output, { temperature: undefined, topP: undefined, topK: undefined, maxOutputTokens: undefined }, turn.params)
    // the reasoning effort that opencode picks by itself (the model's first variant) goes, the client's comes
    const picked = model.variants?.[message.model.variant] ?? {}
    for (const key of ["reasoningEffort", "textVerbosity", ...Object.keys(picked)]) delete output.options[key]
    if (turn.effort) Object.assign(output.options, model.variants?.[turn.effort] ?? { reasoningEffort: turn.effort })
    Object.assign(model.capabilities.input, { image: true, audio: true, pdf: true }) // the provider judges, not opencode
    turn.preparing = true
  },
  "chat.headers": async ({ sessionID }, { headers }) => { // runs after opencode's own
    proxy.turns.get(sessionID).preparing = false
    headers[HEADER] = sessionID
  },
  event: async ({ event: { type, properties } }) => {
    const { info, part, status, error, delta } = properties
    const sessionId = properties.sessionID ?? part?.sessionID ?? info?.sessionID
    const turn = proxy.turns.get(sessionId)
    if (type === "session.status" && status.type === "idle" && (turn?.posted || turn?.warmup)) proxy.turns.delete(sessionId)
    if (!turn || turn.relayed) return
    if (type === "message.part.updated") turn.types[part.id] = part.type
    if (type === "message.part.delta") report("delta", sessionId, { type: turn.types[properties.partID], text: delta })
    if (type === "message.updated" && info.role === "assistant" && info.finish)
      report("finish", sessionId, { finish: info.finish, tokens: info.tokens })
    if (type === "session.error") report("error", sessionId, { message: error?.data?.message ?? error?.name })
    if (type === "session.status" && status.type === "retry") report("error", sessionId, { message: status.message })
  },
})
"""


# -------------------------------------------------------------------------------------------------- opencode

def find_opencode(path: str | None) -> str:
    """Return the opencode program at `path`, or on PATH, or where its installers put it; raise StartError."""
    if path:
        found = shutil.which(os.path.expanduser(path))
        if not found:
            raise StartError(f"--opencode {path}: not found or not executable")
        return os.path.abspath(found)
    homes = [os.path.expanduser(folder) for folder in ("~/.opencode/bin", "~/.local/bin", "~/bin")]
    folders = os.pathsep.join([os.environ.get("PATH", ""), *homes, "/usr/local/bin", "/opt/homebrew/bin"])
    found = shutil.which("opencode", path=folders)
    if not found:
        raise StartError("opencode was not found: install it (npm install -g opencode-ai) or say where it is with --opencode")
    return os.path.abspath(found)


def user_folder(variable: str, default: str) -> pathlib.Path:
    """Return opencode's folder below an XDG base directory, on every platform where opencode itself looks for it."""
    return pathlib.Path(os.environ.get(variable) or os.path.expanduser(default)) / "opencode"


# opencode's JavaScript engine collects no garbage (without FIFOs, long lines would then take all memory) and leaves its
# slowest compiler out; see Opencode.environment. What the user has set of these is respected.
ENGINE = {"BUN_JSC_useGC": "0" if hasattr(os, "mkfifo") else "1", "BUN_JSC_useFTLJIT": "0"}
CONFIG_FILES = ("opencode.json", "opencode.jsonc", "config.json")


@dataclasses.dataclass(frozen=True)
class Catalog:
    """The models that opencode offers, and the one that answers when none is asked for.

    `providers` are the connected ones. `default` may be a model that is not offered: it was asked for on the command
    line, or nothing is logged in. `declared` is the default where opencode has to be told of it.
    """

    models: tuple[str, ...]
    default: str
    providers: frozenset[str]
    declared: bool = False
    trimmed: Json | None = None  # the models.dev catalog of the connected providers, for a faster start

    @property
    def ready(self) -> bool:
        """Tell whether the default model's provider is logged in."""
        return self.default.partition("/")[0] in self.providers

    def full_name(self, name: str) -> str | None:
        """Return the offered model that `name` names, in full or as one of the default provider's; None without one."""
        names = (name, "{}/{}".format(self.default.partition("/")[0], name))
        return next((model for model in names if model in self.models), None)

    def resolve(self, name: str | None) -> str:
        """Return the model, as provider/model, that a request for `name` is answered by.

        Raises APIError 404 for a full name that is not offered, 503 where the provider is not logged in.
        """
        model = self.full_name(name or "") or (name if name and "/" in name else self.default)
        if model in self.models or (model == self.default and self.ready):
            return model
        provider = model.partition("/")[0]
        if provider not in self.providers and provider in {m.partition("/")[0] for m in (self.default, DEFAULT_MODEL)}:
            raise APIError(503, not_logged_in(provider), code="provider_not_logged_in")
        raise model_not_found(model)


def not_logged_in(provider: str) -> str:
    """Return what to do about a provider that opencode is not logged in to."""
    return f"opencode is not logged in to {provider}: run `opencode auth login`"


def model_not_found(model: str) -> APIError:
    """Return the error for a model that opencode does not offer."""
    return APIError(404, f"The model `{model}` does not exist or its provider is not logged in (`opencode auth login`); "
                    "GET /v1/models lists the models", param="model", code="model_not_found")


def parse_models(text: str) -> list[Json]:
    """Return the models in what `opencode models --verbose` prints: a provider/model line, then the model's JSON."""
    decoder, models, position = json.JSONDecoder(), [], text.find("\n{")
    while position >= 0:
        model, end = decoder.raw_decode(text, position + 1)
        models.append(model)
        position = text.find("\n{", end)
    return models


def make_catalog(models: Sequence[Json], logins: Iterable[str], wanted: str | None, trim: bool = True) -> Catalog:
    """Return the catalog for what opencode listed, `logins` (the providers in auth.json) and --model.

    opencode offers its own cloud service to everybody: it counts only where the user logged in to it or named it.
    """
    logins = set(logins) | ({"opencode"} if os.environ.get("OPENCODE_API_KEY") else set())
    logins |= {wanted.partition("/")[0]} if wanted else set()
    models = [m for m in models if m["providerID"] != "opencode" or "opencode" in logins]
    names = ["{}/{}".format(m["providerID"], m["id"]) for m in models]
    providers = frozenset(m["providerID"] for m in models)
    default = wanted or next((name for name in (DEFAULT_MODEL, *SUCCESSORS) if name in names), DEFAULT_MODEL)
    declared = default not in names and default.partition("/")[0] in providers
    names = sorted(names + [default] * declared, key=lambda name: (name != default, name))
    return Catalog(tuple(names), default, providers, declared, trimmed_catalog(models, logins) if trim else None)


def trimmed_catalog(models: Sequence[Json], logins: Iterable[str]) -> Json:
    """Return `models` in the shape of models.dev's api.json, which opencode reads at its start.

    A provider that auth.json names must be there, or opencode 1.18 fails to make a session.
    """
    providers: Json = {name: {"id": name, "name": name, "env": [], "models": {}} for name in logins}
    for model in models:
        able, cost, api = model["capabilities"], model["cost"], model["api"]
        entry = {
            "id": model["id"], "name": model["name"], "release_date": model.get("release_date", ""), "limit": model["limit"],
            "attachment": able["attachment"], "reasoning": able["reasoning"], "temperature": able["temperature"],
            "tool_call": able["toolcall"], "interleaved": able.get("interleaved", False), "status": model.get("status"),
            "modalities": {way: [kind for kind, able_to in able[way].items() if able_to] for way in ("input", "output")},
            "cost": {"input": cost["input"], "output": cost["output"], "cache_read": cost["cache"]["read"],
                     "cache_write": cost["cache"]["write"]},
            "reasoning_options": [{"type": "effort", "values": list(model["variants"])}] if model.get("variants") else [],
            "provider": {"npm": api["npm"], "api": api["url"]},
        }
        if entry["status"] not in ("alpha", "beta", "deprecated"):
            del entry["status"]
        provider = providers.setdefault(model["providerID"], {
            "id": model["providerID"], "name": model["providerID"], "env": [], "models": {}})
        provider.update(npm=api["npm"], api=api["url"])
        provider["models"][model["id"]] = entry
    return providers


RUN_PREFIX = "opencode-proxy-"


def remove_stale_directories() -> None:
    """Remove what proxies that were killed have left in the temporary directory."""
    if os.name == "nt":  # where signal 0 is Ctrl-C
        return
    for path in pathlib.Path(tempfile.gettempdir()).glob(RUN_PREFIX + "*"):
        try:
            os.kill(int(path.name[len(RUN_PREFIX):].partition("-")[0]), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)  # of another user: it stays
        except (OSError, ValueError):
            continue


class Opencode:
    """The installed opencode and what every process of it is started with.

    Owns the run directory (mode 0700): the plugin, the trimmed catalog and a private home for each process.
    """

    def __init__(self, path: str, wanted: str | None = None) -> None:
        self.path = path
        self.wanted = wanted
        self.version = ""
        self.catalog = Catalog((), wanted or DEFAULT_MODEL, frozenset())
        remove_stale_directories()
        self.run_directory = pathlib.Path(tempfile.mkdtemp(prefix=f"{RUN_PREFIX}{os.getpid()}-"))
        self._auth = user_folder("XDG_DATA_HOME", "~/.local/share") / "auth.json"
        self._config = user_folder("XDG_CONFIG_HOME", "~/.config")
        self._plugin = self.run_directory / "plugin.js"
        self._plugin.write_text(PLUGIN, encoding="utf-8")
        self._models = self.run_directory / "models.json"
        self._packages = user_folder("XDG_CACHE_HOME", "~/.cache") / "packages"  # plugins and providers from npm
        stub = self.run_directory / "bin" / "rg"  # opencode downloads ripgrep where there is none
        stub.parent.mkdir()
        stub.write_text("#!/bin/sh\nexit 1\n")
        stub.chmod(0o700)

    def login_signature(self) -> tuple[Any, ...]:
        """Return a value that changes when the user logs in or out or edits the configuration."""
        return tuple(self._stat(path) for path in [self._auth, *(self._config / name for name in CONFIG_FILES)])

    @staticmethod
    def _stat(path: pathlib.Path) -> Any:
        try:
            status = path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def logins(self) -> list[str]:
        """Return the providers in the user's auth.json."""
        try:
            return list(json.loads(self._auth.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return []

    def use_catalog(self, catalog: Catalog) -> None:
        """Make `catalog` the one that later processes start with."""
        if catalog.trimmed is not None:
            fresh = self._models.with_suffix(".new")  # processes may be reading the old one
            fresh.write_text(json.dumps(catalog.trimmed), encoding="utf-8")
            os.replace(fresh, self._models)
        self.catalog = catalog

    def new_home(self) -> pathlib.Path:
        """Return a new private directory with everything a process reads or writes, the user's logins linked in."""
        home = pathlib.Path(tempfile.mkdtemp(prefix="process-", dir=self.run_directory))
        for folder in ("config/opencode/node_modules", "data/opencode", "cache/opencode/packages", "state", "tmp", "cwd",
                       "home"):
            (home / folder).mkdir(parents=True)
        for name in CONFIG_FILES:
            if (self._config / name).exists():
                link(self._config / name, home / "config/opencode" / name)
        link(self._auth, home / "data/opencode/auth.json")
        for package in [*self._packages.glob("[!@]*"), *self._packages.glob("@*/*")]:  # or every process would install them
            target = home / "cache/opencode/packages" / package.relative_to(self._packages)
            target.parent.mkdir(exist_ok=True)
            link(package, target)
        # without these, opencode first waits for an npm install
        (home / "config/opencode/package.json").write_text("{}")
        (home / "config/opencode/package-lock.json").write_text(
            json.dumps({"packages": {"": {"dependencies": {"@opencode-ai/plugin": "*"}}}}))
        return home

    def environment(self, home: pathlib.Path, catalog: Catalog | None) -> dict[str, str]:
        """Return the environment of a process that lives in `home` and may use the models of `catalog`.

        The JavaScript engine of opencode (Bun 1.3) spends two thirds of its time on collecting garbage, in steps of
        15 ms that hold up every token, although a process serves one request and is gone. So it is told not to: the
        process takes 300 MB more, starts in two thirds of the time and passes tokens on in 1 ms. Nor does it live long
        enough for its slowest compiler to be of use, which takes a tenth of the processor time of a start.
        """
        kept = ("OPENCODE_CONFIG", "OPENCODE_API_KEY", "OPENCODE_AUTH_CONTENT", "OPENCODE_MODELS_URL")
        environment = {**ENGINE, **{name: value for name, value in os.environ.items()
                                    if name in kept or not name.startswith(("OPENCODE", "OTEL_", "NOTIFY_SOCKET"))}}
        switches = ("FFF", "PROJECT_CONFIG", "CLAUDE_CODE", "EXTERNAL_SKILLS", "AUTOUPDATE", "MODELS_FETCH")
        environment.update({"OPENCODE_DISABLE_" + name: "1" for name in switches})
        environment.update(
            OPENCODE_DB=":memory:", OPENCODE_SERVER_PASSWORD=secrets.token_hex(16), OPENCODE_LOG_LEVEL="ERROR",
            OPENCODE_TEST_HOME=str(home / "home"), XDG_CONFIG_HOME=str(home / "config"), XDG_DATA_HOME=str(home / "data"),
            XDG_STATE_HOME=str(home / "state"), XDG_CACHE_HOME=str(home / "cache"), TMPDIR=str(home / "tmp"),
            PWD=str(home / "cwd"), PATH=os.pathsep.join([os.environ.get("PATH", os.defpath), str(self.run_directory / "bin")]))
        if catalog is None:
            fetched = user_folder("XDG_CACHE_HOME", "~/.cache") / "models.json"
            environment.update({"OPENCODE_MODELS_PATH": str(fetched)} if fetched.exists() else {})
        else:
            environment["OPENCODE_CONFIG_CONTENT"] = json.dumps(self.configuration(catalog))
            environment.update({"OPENCODE_MODELS_PATH": str(self._models)} if catalog.trimmed is not None else {})
        return environment

    def configuration(self, catalog: Catalog) -> Json:
        """Return the configuration of a process: one agent without tools, and only connected providers.

        No text of a client may get in here: opencode expands {file:...} and {env:...}.
        """
        provider, _, model = catalog.default.partition("/")
        return {
            "agent": {"proxy": {"mode": "primary", "prompt": "-", "permission": {"*": "deny", "doom_loop": "allow"}},
                      "title": {"disable": True}},
            "default_agent": "proxy", "share": "disabled", "autoupdate": False, "snapshot": False, "lsp": False,
            "formatter": False, "compaction": {"auto": False}, "plugin": [self._plugin.as_uri()], "model": catalog.default,
            "enabled_providers": sorted(catalog.providers),
            **({"provider": {provider: {"models": {model: {}}}}} if catalog.declared else {}),
        }

    def close(self) -> None:
        """Remove the run directory."""
        shutil.rmtree(self.run_directory, ignore_errors=True)


def link(source: pathlib.Path, target: pathlib.Path) -> None:
    """Make `target` a link to `source`, so that a login renewed by opencode reaches the user's own file."""
    try:
        target.symlink_to(source)
    except OSError:  # Windows without the right to make links
        if source.is_file():
            shutil.copy2(source, target)


# --------------------------------------------------------------------------------------------------- process

@dataclasses.dataclass(frozen=True)
class TextDelta:
    """A piece of the answer's text."""

    text: str


@dataclasses.dataclass(frozen=True)
class ReasoningDelta:
    """A piece of the model's reasoning."""

    text: str


@dataclasses.dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a call of one of the client's tools: first its id and name, then pieces of its arguments."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class Finish:
    """The end of the answer: OpenAI's finish_reason and usage."""

    reason: str
    usage: Json


@dataclasses.dataclass(frozen=True)
class Silence:
    """Nothing has come for PING_SECONDS."""


Event = Union[TextDelta, ReasoningDelta, ToolCallDelta, Finish, Silence]

# The finish_reason for what wire formats and opencode call it; what is not here means "stop".
FINISH_REASONS = {
    "length": "length", "max_tokens": "length", "max_output_tokens": "length", "model_context_window_exceeded": "length",
    "content_filter": "content_filter", "content-filter": "content_filter", "refusal": "content_filter",
    "tool_calls": "tool_calls", "function_call": "tool_calls", "tool-calls": "tool_calls", "tool_use": "tool_calls"}


def usage_of(prompt: Any, completion: Any, cached: Any, reasoning: Any) -> Json:
    """Return OpenAI's usage; cached tokens are among the prompt's, reasoning tokens among the completion's."""
    prompt, completion = prompt or 0, completion or 0
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached or 0},
            "completion_tokens_details": {"reasoning_tokens": reasoning or 0}}


def string(value: Any) -> str:
    """Return `value` where it is a string; raise TypeError otherwise."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


class AnswerParser:
    """Turns the data of a provider's SSE stream into events: the base of a parser for each wire format."""

    def __init__(self) -> None:
        self._calls: dict[Any, int] = {}  # the wire format's own index of a tool call: ours
        self._with_arguments: set[Any] = set()
        self._reason: str | None = None
        self._usage = usage_of(0, 0, 0, 0)

    def feed(self, data: str) -> list[Event]:
        """Return the events that one piece of data means; raise APIError where the provider reports a failure."""
        if data == "[DONE]":
            return [self.end()]
        try:
            message = json.loads(data)
            if message.get("error") or message.get("type") in ("error", "response.failed"):
                raise stream_error(message)
            return list(self.events(message))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise APIError(502, "The model's provider sent what is not an answer", code="incomplete_answer") from error

    def events(self, message: Json) -> Iterator[Event]:
        """Yield the events that a message of the wire format means."""
        raise NotImplementedError

    def end(self) -> Finish:
        """Return the last event, at the end of the stream; raise APIError when the answer is not complete."""
        if self._reason is None:
            raise APIError(502, "The model's provider ended its answer without saying why", code="incomplete_answer")
        return Finish(FINISH_REASONS.get(self._reason, "stop"), self._usage)

    def _begin_call(self, key: Any, call_id: str | None, name: str) -> ToolCallDelta:
        self._calls[key] = index = len(self._calls)
        return ToolCallDelta(index, "", string(call_id or "call_" + uuid.uuid4().hex), string(name))

    def _continue_call(self, key: Any, arguments: str) -> ToolCallDelta:
        self._with_arguments.add(key)
        return ToolCallDelta(self._calls[key], string(arguments))


class ChatParser(AnswerParser):
    """Parses /chat/completions."""

    def __init__(self) -> None:
        super().__init__()
        self._keys: dict[int, tuple[int, str | None]] = {}  # of the call that a piece of an index belongs to

    def events(self, message: Json) -> Iterator[Event]:
        """Yield the events of a chunk."""
        usage = message.get("usage")
        if usage:
            details, more = usage.get("prompt_tokens_details") or {}, usage.get("completion_tokens_details") or {}
            self._usage = {**usage_of(usage.get("prompt_tokens"), usage.get("completion_tokens"), 0, 0), **usage,
                           "prompt_tokens_details": {"cached_tokens": 0, **details},
                           "completion_tokens_details": {"reasoning_tokens": 0, **more}}
        for choice in message.get("choices") or ():
            delta = choice.get("delta") or {}
            # DeepSeek's name for it, Copilot's, OpenRouter's
            reasoning = delta.get("reasoning_content") or delta.get("reasoning_text") or delta.get("reasoning")
            if reasoning:
                yield ReasoningDelta(string(reasoning))
            text = text_of(delta.get("content")) or delta.get("refusal")
            if text:
                yield TextDelta(string(text))
            for call in delta.get("tool_calls") or ():
                yield from self._call(call)
            self._reason = string(choice.get("finish_reason") or self._reason or "") or None

    def _call(self, call: Json) -> Iterator[Event]:
        function = call.get("function") or {}
        index, arguments = call.get("index") or 0, function.get("arguments") or ""
        key = self._keys.get(index)
        # some providers give all calls of an answer the same index
        if key is None or (key[1] and function.get("name") and call.get("id")):
            key = self._keys[index] = (index, call.get("id"))
            if key not in self._calls:
                yield self._begin_call(key, call.get("id"), function.get("name") or "")
        if arguments:
            yield self._continue_call(key, arguments)


class ResponsesParser(AnswerParser):
    """Parses /responses."""

    def events(self, message: Json) -> Iterator[Event]:
        """Yield the events of a response event; of its many kinds, few tell something new."""
        kind, item, key = message.get("type"), message.get("item") or {}, message.get("output_index")
        if kind in ("response.output_text.delta", "response.refusal.delta"):
            yield TextDelta(string(message["delta"]))
        elif kind in ("response.reasoning_summary_text.delta", "response.reasoning_text.delta"):
            yield ReasoningDelta(string(message["delta"]))
        elif kind == "response.output_item.added" and item.get("type") == "function_call":
            yield self._begin_call(key, item["call_id"], item["name"])
        elif kind == "response.function_call_arguments.delta":
            yield self._continue_call(key, message["delta"])
        elif kind == "response.output_item.done" and key in self._calls and key not in self._with_arguments:
            yield self._continue_call(key, item["arguments"] or "{}")
        elif kind in ("response.completed", "response.incomplete"):
            response = message["response"]
            usage = response.get("usage") or {}
            self._usage = usage_of(usage.get("input_tokens"), usage.get("output_tokens"),
                                   (usage.get("input_tokens_details") or {}).get("cached_tokens"),
                                   (usage.get("output_tokens_details") or {}).get("reasoning_tokens"))
            incomplete = response.get("incomplete_details") or {}
            self._reason = string(incomplete.get("reason") or ("tool_calls" if self._calls else "stop"))
            yield self.end()


class MessagesParser(AnswerParser):
    """Parses Anthropic's /messages."""

    def __init__(self) -> None:
        super().__init__()
        self._tokens: Json = {}

    def events(self, message: Json) -> Iterator[Event]:
        """Yield the events of a message event."""
        kind, block, delta = message.get("type"), message.get("content_block") or {}, message.get("delta") or {}
        self._tokens.update((message.get("message") or {}).get("usage") or message.get("usage") or {})
        if kind == "content_block_start" and block.get("type") == "tool_use":
            yield self._begin_call(message["index"], block["id"], block["name"])
            if block.get("input"):
                yield self._continue_call(message["index"], compact_json(block["input"]))
        elif kind == "content_block_delta":
            if delta.get("text"):
                yield TextDelta(string(delta["text"]))
            if delta.get("thinking"):
                yield ReasoningDelta(string(delta["thinking"]))
            if delta.get("partial_json"):
                yield self._continue_call(message["index"], delta["partial_json"])
        elif kind == "content_block_stop" and message["index"] in self._calls.keys() - self._with_arguments:
            yield self._continue_call(message["index"], "{}")
        elif kind == "message_delta":
            self._reason = string(delta.get("stop_reason") or self._reason or "") or None
        elif kind == "message_stop":
            read = self._tokens.get("cache_read_input_tokens") or 0
            prompt = (self._tokens.get("input_tokens") or 0) + read + (self._tokens.get("cache_creation_input_tokens") or 0)
            self._usage = usage_of(prompt, self._tokens.get("output_tokens"), read, 0)
            yield self.end()


class OpencodeParser(AnswerParser):
    """Takes what opencode's own events tell of an answer in another wire format, through the plugin."""

    def report(self, method: str, params: Json) -> list[Event]:
        """Return the events that a report of the plugin means."""
        if method == "proxy/delta":
            return [(ReasoningDelta if params.get("type") == "reasoning" else TextDelta)(params["text"])]
        if method == "proxy/finish":
            tokens = params.get("tokens") or {}
            cache = tokens.get("cache") or {}
            read, reasoning = cache.get("read") or 0, tokens.get("reasoning") or 0
            self._usage = usage_of((tokens.get("input") or 0) + read + (cache.get("write") or 0),
                                   (tokens.get("output") or 0) + reasoning, read, reasoning)
            self._reason = params["finish"] if params["finish"] not in ("unknown", "error") else None
            return [self.end()]
        return []


PARSERS = {"chat/completions": ChatParser, "responses": ResponsesParser, "messages": MessagesParser}


def stream_error(message: Json) -> APIError:
    """Return the error for a failure that the provider reports within its stream."""
    error = message.get("error") or (message.get("response") or {}).get("error") or message
    status = error.get("code") if isinstance(error, dict) else None
    return upstream_error(status if isinstance(status, int) else 502, {}, json.dumps({"error": error}))


class Inbox:
    """Bytes on their way from a reading thread to one consumer; bounded, and interruptible from any thread."""

    def __init__(self) -> None:
        self._blocks: collections.deque[bytes] = collections.deque()
        self._size = 0
        self._error: Exception | None = None
        self._closed = False
        self._changed = threading.Condition()

    def put(self, block: bytes) -> None:
        """Add `block`; wait while the consumer is behind."""
        with self._changed:
            self._changed.wait_for(lambda: self._size < MAX_INBOX_BYTES or self._closed)
            self._blocks.append(block)
            self._size += len(block)
            self._changed.notify_all()

    def get(self, seconds: float) -> bytes | None:
        """Return the next block, b"" at the end, None when `seconds` pass without one; raise an interruption."""
        with self._changed:
            self._changed.wait_for(lambda: self._blocks or self._error or self._closed, seconds)
            if self._error:
                raise self._error
            if self._blocks:
                block = self._blocks.popleft()
                self._size -= len(block)
                self._changed.notify_all()
                return block
            return b"" if self._closed else None

    def interrupt(self, error: Exception) -> None:
        """Make the consumer raise `error` instead of reading on."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def close(self) -> None:
        """End the stream: what is in it can still be read."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has only the latter


class OpencodeProcess:
    """One opencode process: the only user of Popen.

    `start` makes it ready, `prompt` runs a turn, `stop` ends it with everything it started. One thread at a time
    may use it, but `interrupt` and `stop` may come from any.
    """

    ACP = ("acp", "--hostname", "127.0.0.1", "--port", "0")
    MODELS = ("models", "--verbose")

    def __init__(self, opencode: Opencode, arguments: Sequence[str] = ACP, trace: Trace = lambda *_: None) -> None:
        self._opencode = opencode
        self._trace = trace
        self.catalog = opencode.catalog
        self.version = ""
        self.session_id = ""
        self.offered: frozenset[str] = frozenset()
        self.loaded = self.warm = self.posted = False
        self.served = 0
        self.born = self.idle_since = time.monotonic()
        self._model = ""
        self._partial = b""
        self._ready: collections.deque[bytes] = collections.deque()  # complete lines not yet handled
        self._ids = 0
        self._timeout = START_SECONDS
        self.home = opencode.new_home()
        self._command = [opencode.path, *arguments]
        environment = opencode.environment(self.home, self.catalog if arguments is self.ACP else None)
        try:
            self._spawn(environment)
        except OSError as error:
            shutil.rmtree(self.home, ignore_errors=True)
            raise StartError(f"{opencode.path} cannot be run: {error.strerror}") from None

    def _spawn(self, environment: Mapping[str, str]) -> None:
        self.inbox = Inbox()
        self._stderr = b""
        self._stopping = threading.Lock()
        self._popen = subprocess.Popen(  # a group of its own: the npm launcher may be a wrapper around the real program
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.home / "cwd",
            env=environment, bufsize=0, start_new_session=True)
        self._pipes = [pipe for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr) if pipe]
        self._stdin, stdout, stderr = (pipe.fileno() for pipe in self._pipes)
        readers = [threading.Thread(target=self._read_stdout, args=(stdout,), daemon=True),
                   threading.Thread(target=self._read_stderr, args=(stderr,), daemon=True)]
        self._threads = [*readers, threading.Thread(target=self._reap, args=(readers,), daemon=True)]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:  # no more threads are allowed
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            self.stop()
            raise OSError(0, str(error)) from None

    def output(self) -> str:
        """Return all that the process prints; raise StartError with the end of its stderr when it fails."""
        blocks, deadline, name = [], time.monotonic() + START_SECONDS, " ".join(self._command)
        for block in iter(lambda: self.inbox.get(deadline - time.monotonic()), b""):
            if block is None:
                raise StartError(f"`{name}` took longer than {START_SECONDS:.0f} s")
            blocks.append(block)
        returncode = self._popen.wait()
        if returncode:
            raise StartError(f"`{name}` failed: {self.stderr_tail() or returncode}")
        return b"".join(blocks).decode("utf-8", "replace")

    # -- threads

    def _read_stdout(self, descriptor: int) -> None:
        for block in iter(lambda: os.read(descriptor, 1 << 16), b""):
            self.inbox.put(block)

    def _read_stderr(self, descriptor: int) -> None:
        for block in iter(lambda: os.read(descriptor, 1 << 16), b""):
            self._stderr = (self._stderr + block)[-MAX_STDERR_BYTES:]

    def _reap(self, readers: Sequence[threading.Thread]) -> None:
        """Wait for the end of the process, end what it left behind, and close the inbox."""
        self._popen.wait()
        self._signal(KILL)
        for reader in readers:
            reader.join(1.0)  # a grandchild that left the group may hold the pipes for ever
        self.inbox.close()

    # -- life

    def interrupt(self, error: Exception) -> None:
        """Make a running `start` or `prompt` raise `error`."""
        self.inbox.interrupt(error)

    def stop(self) -> None:
        """End the process and its children, and remove its directory; safe to call twice."""
        with self._stopping:
            if self._popen.poll() is None:
                self._signal(signal.SIGTERM)
                try:
                    self._popen.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    self._signal(KILL)
            self.inbox.close()
            for thread in self._threads:
                thread.join(2 * STOP_SECONDS)
            if not any(thread.is_alive() for thread in self._threads):
                for pipe in self._pipes:
                    with contextlib.suppress(OSError):  # EPIPE again on close
                        pipe.close()
            shutil.rmtree(self.home, ignore_errors=True)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone; macOS says so with EPERM
            if hasattr(os, "killpg"):
                os.killpg(self._popen.pid, number)
            else:
                self._popen.terminate()

    def alive(self) -> bool:
        """Tell whether the process still runs."""
        return self._popen.poll() is None

    def stderr_tail(self) -> str:
        """Return the end of what the process wrote to stderr, without colours."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", self._stderr.decode("utf-8", "replace"))
        return " ".join(text.split())[-500:]

    def memory(self) -> int:
        """Return the resident memory of the process in bytes, 0 where the system does not tell."""
        try:
            return int(pathlib.Path(f"/proc/{self._popen.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, IndexError, AttributeError):
            return 0

    # -- JSON-RPC

    def _send(self, message: Json) -> None:
        line = json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n"
        self._trace("->", message, len(line))
        # a child that has stopped reading must not hold this thread for ever: killing it breaks the pipe
        watchdog = threading.Timer(self._timeout, self._signal, [KILL])
        watchdog.daemon = True
        if len(line) > 1 << 15:  # a pipe holds the others
            watchdog.start()
        try:
            view = memoryview(line)
            while view:
                view = view[os.write(self._stdin, view):]
        except OSError:
            for thread in self._threads:
                thread.join(STOP_SECONDS)  # for its last words
            raise ProcessDied("opencode ended", self.stderr_tail()) from None
        finally:
            watchdog.cancel()

    def _request(self, method: str, params: Json) -> int:
        self._ids += 1
        self._send({"id": self._ids, "method": method, "params": params})
        return self._ids

    def _message(self, seconds: float) -> Json | None:
        """Return the next JSON-RPC message that matters, None when `seconds` pass without output."""
        while True:
            while self._ready:
                line = self._ready.popleft()
                if line.startswith(b'{"jsonrpc":"2.0","method":"session/update"') or not line.strip():
                    continue  # ACP's own account of the answer comes later than the plugin's, and not in order
                try:
                    message = json.loads(line.decode("utf-8", "replace"))  # in half the time that the bytes would take
                except ValueError:
                    message = None
                if not isinstance(message, dict):
                    raise ProcessDied("opencode printed something else than JSON-RPC", repr(line[:200]))
                self._trace("<-", message, len(line))
                if "id" in message and "method" in message:
                    self._send({"id": message["id"], "error": {"code": -32601, "message": "refused"}})
                    continue
                return message
            block = self.inbox.get(seconds)
            if block is None:
                return None
            if not block:
                raise ProcessDied("opencode ended", self.stderr_tail())
            *lines, self._partial = (self._partial + block).split(b"\n") if b"\n" in block else [self._partial + block]
            self._ready.extend(lines)
            if len(self._partial) > MAX_LINE_BYTES:
                raise ProcessDied(f"opencode printed a line of more than {MAX_LINE_BYTES} bytes")

    def _call(self, method: str, params: Json) -> Json:
        """Return the result of a request; raise ProcessDied when it is refused or takes too long."""
        number, deadline = self._request(method, params), time.monotonic() + START_SECONDS
        while True:
            message = self._message(deadline - time.monotonic())
            if message is None:
                raise ProcessDied(f"opencode did not answer {method} within {START_SECONDS:.0f} s", self.stderr_tail())
            self.loaded = self.loaded or message.get("method") == "proxy/loaded"
            self.warm = self.warm or message.get("method") == "proxy/warm"
            if message.get("id") == number:
                if "error" in message:
                    raise RequestRefused("opencode refused {}: {}".format(method, message["error"].get("message")))
                return message.get("result") or {}

    # -- session and turn

    def start(self) -> None:
        """Make the process ready for a prompt: protocol, version, a session with the plugin loaded."""
        answer = self._call("initialize", {"protocolVersion": 1, "clientCapabilities": {}})
        self.version = self._opencode.version = str((answer.get("agentInfo") or {}).get("version", ""))
        numbers = tuple(int(number) for number in re.findall(r"\d+", self.version)[:3])
        if numbers and numbers < MIN_OPENCODE and not self.version.startswith("0.0.0"):  # a development build
            raise StartError("opencode {} is too old: {}.{}.{} or newer is needed (opencode upgrade)".format(
                self.version, *MIN_OPENCODE))
        self.new_session()
        if not self.loaded:
            raise ProcessDied(f"opencode {self.version} did not load the proxy's plugin", self.stderr_tail())

    def new_session(self) -> None:
        """Begin a session, which knows nothing of those before it."""
        answer = self._call("session/new", {"cwd": str(self.home / "cwd"), "mcpServers": []})
        self.session_id = answer["sessionId"]
        for option in answer.get("configOptions") or ():
            if option.get("id") == "model":
                self._model = option.get("currentValue", "")
                self.offered = frozenset(choice["value"] for choice in option.get("options", ()))

    def warm_up(self) -> None:
        """Run a prompt up to the point where the plugin would let it out, so that opencode has loaded what it needs."""
        with contextlib.suppress(RequestRefused):
            self._call("session/prompt", self._prompt_params(WARM_UP))
        if not self.warm:
            raise ProcessDied(f"opencode {self.version} did not reach the model in the start-up proof", self.stderr_tail())

    def _prompt_params(self, prompt: str) -> Json:
        return {"sessionId": self.session_id, "prompt": [{"type": "text", "text": prompt}]}

    def _select(self, model: str) -> None:
        """Make sure that the session's model is `model`: opencode silently takes another one where it can not."""
        if model not in self.offered:
            raise model_not_found(model)
        if self._model != model:
            try:
                self._call("session/set_model", {"sessionId": self.session_id, "modelId": model})
            except RequestRefused:
                raise model_not_found(model) from None
            self._model = model

    def prompt(self, model: str, prompt: str, timeout: float) -> Iterator[Event]:
        """Send `prompt`, an envelope in JSON, to `model` and yield what it answers, Finish last.

        Raises APIError: the provider's own refusal, 504 after `timeout` seconds of silence, 502 when the answer
        breaks off.
        """
        self.posted = False
        self._select(model)
        self._timeout = timeout
        self.served += 1
        with self._within_a_line(prompt) as line:
            number = self._request("session/prompt", self._prompt_params(line))
            parser, last = AnswerParser(), time.monotonic()
            while True:
                message = self._message(min(PING_SECONDS, max(0.0, last + timeout - time.monotonic())))
                if message is None:
                    if time.monotonic() >= last + timeout:
                        raise APIError(504, f"The model's provider sent nothing for {timeout:g} seconds", code="timeout")
                    yield Silence()
                    continue
                last, params = time.monotonic(), message.get("params") or {}
                if message.get("id") == number:
                    raise turn_error(message.get("error") or {})
                if params.get("sessionId") != self.session_id:
                    continue
                if message["method"] == "proxy/upstream":
                    self.posted, parser = True, PARSERS.get(params.get("format", ""), OpencodeParser)()
                for event in to_events(message["method"], params, parser):
                    yield event
                    if isinstance(event, Finish):
                        return

    @contextlib.contextmanager
    def _within_a_line(self, prompt: str) -> Iterator[str]:
        """Yield `prompt` or, where it is too long for a line, the FIFO that the plugin can read it from."""
        if len(prompt) <= MAX_PROMPT_LINE or not hasattr(os, "mkfifo"):
            yield prompt
            return
        path = self.home / f"prompt-{self.served}"
        os.mkfifo(path, 0o600)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a writer can open it now, and fails when nobody has it open
        try:
            threading.Thread(target=write_fifo, args=(path, prompt.encode()), daemon=True).start()
            yield compact_json({"fifo": str(path)})
        finally:
            os.close(reader)


def write_fifo(path: pathlib.Path, data: bytes) -> None:
    """Write `data` to a FIFO; it is more than a pipe holds, so its end does not come before somebody reads."""
    with contextlib.suppress(OSError):  # nobody reads any more
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        os.set_blocking(descriptor, True)
        with open(descriptor, "wb") as fifo:
            fifo.write(data)


def to_events(method: str, params: Json, parser: AnswerParser) -> list[Event]:
    """Return the events that a notification of the plugin means; raise APIError where it is a failure."""
    if method == "proxy/sse":
        return parser.feed(params["data"])
    if method == "proxy/end":
        return [parser.end()]
    if method == "proxy/error":
        if "status" in params:
            raise upstream_error(params["status"], params["headers"], params["body"])
        raise turn_error(params)
    return parser.report(method, params) if isinstance(parser, OpencodeParser) else []


def turn_error(error: Json) -> APIError:
    """Return the error for a turn that failed without a refusal by the provider."""
    message = str(error.get("message") or "opencode gave no reason").replace("Internal error: ", "")
    kind = "The connection to the model's provider failed: " if "network" in error else "The answer failed: "
    return APIError(502, kind + message, code="upstream_unreachable" if "network" in error else "upstream_failed")


# ------------------------------------------------------------------------------------------------------ pool

class Slots:
    """The right to run an opencode process: so many at once, so many more waiting in order of arrival."""

    def __init__(self, size: int, queue_size: int) -> None:
        self._free = size
        self._queue_size = queue_size
        self._waiting: collections.deque[Slot] = collections.deque()
        self._lock = threading.Lock()

    def claim(self) -> Slot:
        """Return a slot, or a place in the queue for one; raise APIError 503 when the queue is full."""
        slot = Slot(self)
        with self._lock:
            if self._free:
                self._free -= 1
                slot.grant()
            elif len(self._waiting) < self._queue_size:
                self._waiting.append(slot)
            else:
                raise APIError(503, f"All {self._queue_size} places in the queue are taken: try again later",
                               code="queue_full", headers={"Retry-After": str(QUEUE_RETRY_SECONDS)})
        return slot

    def give_back(self, slot: Slot) -> None:
        """Pass a slot on to the next in the queue, or take one that still waits out of it."""
        with self._lock:
            if slot in self._waiting:
                self._waiting.remove(slot)
            elif self._waiting:
                self._waiting.popleft().grant()
            else:
                self._free += 1

    def waiting(self) -> int:
        """Return how many wait."""
        return len(self._waiting)


class Slot:
    """One claim to run a process."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._news: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def grant(self) -> None:
        """Let `wait` return."""
        self._news.put(None)

    def interrupt(self, error: Exception) -> None:
        """Make `wait` raise `error`."""
        self._news.put(error)

    def wait(self) -> None:
        """Wait until the slot is granted; raise an interruption."""
        error = self._news.get()
        if error is not None:
            raise error

    def release(self) -> None:
        """Give the slot, or the place in the queue, back."""
        self._slots.give_back(self)


class Pool:
    """Owns every opencode process: the running ones, the spares started ahead, and their ends."""

    def __init__(self, opencode: Opencode, concurrency: int = 4, queue_size: int = 64, spares: int = 1,
                 requests_per_process: int = 1, trace: Trace = lambda *_: None) -> None:
        self.opencode = opencode
        self.slots = Slots(concurrency, queue_size)
        self.proven = threading.Event()  # set when the start-up proof has passed, or failed for good
        self.last_error = ""
        self._spares_wanted = spares
        self._most_kept = spares + concurrency if requests_per_process > 1 else spares
        self._requests_per_process = requests_per_process
        self._trace = trace
        self._lock = threading.Lock()
        self._spares: collections.deque[Future[OpencodeProcess]] = collections.deque()
        self._processes: set[OpencodeProcess] = set()
        self.turns: set[Turn] = set()  # the running ones
        self._threads: set[threading.Thread] = set()
        self.failures = 0  # spares that died one after the other
        self._trim = True  # whether processes start with a catalog of the connected providers only
        self._retry_at = 0.0
        self._signature = opencode.login_signature()
        self._catalog_born = time.monotonic()
        self._refreshing: threading.Thread | None = None
        self._closing = threading.Event()

    # -- start and catalog

    def prove(self) -> None:
        """Read the catalog, start a process and run the warm-up; raise StartError saying what did not happen."""
        try:
            catalog = self._read_catalog()
            if catalog.providers:
                process = self._started()
                future: Future[OpencodeProcess] = Future()
                future.set_result(process)
                if not self._add_spare(future):
                    self._discard(process)
            self._thread(self._tend)
        except StartError:
            raise
        except Exception as error:  # also an answer in a shape that was never seen
            reason = str(error) if isinstance(error, (APIError, OSError)) else repr(error)
            raise StartError(f"opencode cannot be used: {reason}") from None
        finally:
            self.proven.set()

    def _read_catalog(self) -> Catalog:
        """Ask opencode which models it offers; raise StartError with its own words when it does not say."""
        process = self.new_process(OpencodeProcess.MODELS)
        try:
            models = parse_models("\n" + process.output())
        finally:
            self._discard(process)
        catalog = make_catalog(models, self.opencode.logins(), self.opencode.wanted, self._trim)
        if catalog != self.opencode.catalog:  # otherwise the spares are still good
            self.opencode.use_catalog(catalog)
        return catalog

    def _started(self, warm: Callable[[], bool] = lambda: True) -> OpencodeProcess:
        """Return a new process that is ready for a request, and warm where `warm` says so once it has started."""
        process = self.new_process()
        try:
            process.start()
            catalog = process.catalog
            whole = catalog.trimmed is None or set(catalog.models) - {catalog.default} <= process.offered
            if whole and warm():
                process.warm_up()
        except BaseException:
            self._discard(process)
            raise
        if not whole:  # the trimmed catalog loses a model, one that a key in the environment brings
            self._discard(process)
            self._trim = False
            self.opencode.use_catalog(dataclasses.replace(catalog, trimmed=None))
            return self._started(warm)
        return process

    def catalog(self) -> Catalog:
        """Return the current catalog; where the user's logins have changed, read it anew in the background."""
        self.proven.wait(3 * START_SECONDS)
        signature = self.opencode.login_signature()
        with self._lock:
            stale = signature != self._signature or time.monotonic() > self._catalog_born + CATALOG_SECONDS
            if stale and self._refreshing is None and not self._closing.is_set():
                self._signature, self._catalog_born = signature, time.monotonic()
                self._refreshing = self._thread(self._refresh)
        return self.opencode.catalog

    def resolve(self, name: str | None) -> str:
        """Return the model for a request that names `name`; what is not there yet may be in a catalog being read."""
        try:
            return self.catalog().resolve(name)
        except APIError:
            refreshing = self._refreshing
            if refreshing is None:
                raise
            refreshing.join(2 * START_SECONDS)
            return self.opencode.catalog.resolve(name)

    def _refresh(self) -> None:
        try:
            self._read_catalog()
        except Exception as error:  # the old catalog stays, for a while
            self.last_error = str(error) or repr(error)
            self._catalog_born = time.monotonic() - CATALOG_SECONDS + MAX_RETRY_SECONDS
        finally:
            self._refreshing = None
        self._end_spares()
        self.replenish()

    # -- processes

    def new_process(self, arguments: Sequence[str] = OpencodeProcess.ACP) -> OpencodeProcess:
        """Start a process that `close` ends."""
        with self._lock:  # registered before it can be forgotten
            if self._closing.is_set():
                raise APIError(503, "The server is shutting down", code="shutting_down")
            process = OpencodeProcess(self.opencode, arguments, self._trace)
            self._processes.add(process)
            return process

    def _discard(self, process: OpencodeProcess, done: Callable[[], None] = lambda: None) -> None:
        """End a process and, whatever happens, call `done`."""
        try:
            process.stop()
            with self._lock:
                self._processes.discard(process)
        finally:
            done()

    def _thread(self, target: Callable[..., None], *args: Any) -> threading.Thread:
        """Start a thread that `close` waits for."""
        def run() -> None:
            try:
                target(*args)
            except Exception as error:  # a defect of this program: one line, and the others go on
                log(f"internal error: {error!r}")
            finally:
                self._threads.discard(thread)
        thread = threading.Thread(target=run, daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:  # no more threads are allowed
            self._threads.discard(thread)
            raise
        return thread

    def take(self, slot: Slot) -> OpencodeProcess | None:
        """Return a spare that is alive and current, None without any; the holder of `slot` waits for one being started."""
        while True:
            with self._lock:
                if not self._spares:
                    return None
                future = self._spares.popleft()
            future.add_done_callback(lambda _: slot.grant())
            try:
                slot.wait()
            except Exception:  # an interruption: somebody else may have the spare
                with self._lock:
                    if not (future.done() and future.exception()):
                        self._spares.appendleft(future)
                raise
            if future.exception():  # it is not this request's fault
                return None
            if self._usable(future.result()):
                return future.result()
            self._discard_soon(future.result())

    def replenish(self) -> None:
        """Start the spares that are missing, in the background."""
        with self._lock:
            missing = self._spares_wanted - len(self._spares)
            if self._closing.is_set() or missing <= 0 or time.monotonic() < self._retry_at or not self.opencode.catalog.ready:
                return
            futures: list[Future[OpencodeProcess]] = [Future() for _ in range(missing)]
            self._spares.extend(futures)
        for future in futures:
            try:
                self._thread(self._prepare, future)
            except RuntimeError as error:
                self._fail(future, error)

    def _prepare(self, future: Future[OpencodeProcess], process: OpencodeProcess | None = None) -> None:
        """Make a new process, or one that has served, ready for a request."""
        try:
            if process is None:  # no warm-up where a request waits already: it is served sooner without
                process = self._started(lambda: future in self._spares)
            else:
                process.new_session()
        except Exception as error:
            if process is not None:
                self._discard(process)
            self._fail(future, error)
        else:
            self.failures = 0
            future.set_result(process)

    def _fail(self, future: Future[OpencodeProcess], error: Exception) -> None:
        self.last_error = str(error) or repr(error)
        self.failures += 1
        self._retry_at = time.monotonic() + min(MAX_RETRY_SECONDS, 2.0 ** self.failures)
        with self._lock, contextlib.suppress(ValueError):
            future.set_exception(error)
            self._spares.remove(future)

    def give_back(self, process: OpencodeProcess, clean: bool, done: Callable[[], None] = lambda: None) -> None:
        """Take back a process after its turn: make it a spare again where that is allowed, or end it.

        Calls `done` when there is room for another process.
        """
        process.idle_since = time.monotonic()
        may_serve = (clean and process.served < self._requests_per_process and self._usable(process)
                     and process.memory() < MAX_PROCESS_BYTES)
        future: Future[OpencodeProcess] = Future()
        if may_serve and self._add_spare(future):
            try:
                self._thread(self._prepare, future, process)
            except RuntimeError as error:
                self._fail(future, error)
            else:
                done()
                return
        self._discard_soon(process, done)

    def _discard_soon(self, process: OpencodeProcess, done: Callable[[], None] = lambda: None) -> None:
        try:
            self._thread(self._discard, process, done)
        except RuntimeError:  # no more threads are allowed
            self._discard(process, done)

    def _usable(self, process: OpencodeProcess) -> bool:
        return (process.alive() and process.catalog is self.opencode.catalog
                and time.monotonic() < process.born + SPARE_SECONDS)

    def _add_spare(self, future: Future[OpencodeProcess]) -> bool:
        with self._lock:
            room = len(self._spares) < self._most_kept and not self._closing.is_set()
            if room:
                self._spares.appendleft(future)
            return room

    def _tend(self) -> None:
        """Replace spares that died or are out of date, and end those that nobody needs, until the pool closes."""
        while not self._closing.wait(TEND_SECONDS):
            self.catalog()
            self._end_spares()
            self.replenish()

    def _end_spares(self) -> None:
        with self._lock:
            ready = [future for future in self._spares if future.done() and not future.exception()]
            unusable = [future for future in ready if not self._usable(future.result())]
            surplus = len(self._spares) - len(unusable) - self._spares_wanted
            idle = [future for future in ready if future not in unusable and
                    future.result().idle_since < time.monotonic() - KEEP_WARM_SECONDS]
            ended = unusable + idle[:max(0, surplus)]
            for future in ended:
                self._spares.remove(future)
        for future in ended:
            self._discard(future.result())

    # -- turns

    def status(self) -> Json:
        """Return what /health tells."""
        with self._lock:
            ready = sum(future.done() and not future.exception() for future in self._spares)
            waiting = self.slots.waiting()
            return {"running": max(0, len(self.turns) - waiting), "waiting": waiting, "spares": ready}

    def interrupt_all(self, error: Exception) -> None:
        """End all running turns with `error`."""
        for turn in list(self.turns):
            turn.interrupt(error)

    def close(self) -> None:
        """Stop every process and wait for the threads."""
        with self._lock:
            self._closing.set()
            processes = list(self._processes)
            self._spares.clear()
        self.proven.set()
        stoppers = [threading.Thread(target=process.stop) for process in processes]
        for thread in stoppers:
            thread.start()
        join_started([*stoppers, *list(self._threads)])
        self.opencode.close()


def join_started(threads: Iterable[threading.Thread]) -> None:
    """Wait, but not for ever, for the end of those of `threads` that have been started."""
    for thread in threads:
        if thread.is_alive():
            thread.join(3 * STOP_SECONDS)


class Turn:
    """One choice of one request: waits for a slot, takes a process, yields its events."""

    def __init__(self, pool: Pool, model: str, prompt: str, timeout: float) -> None:
        self._pool = pool
        self._model = model
        self._prompt = prompt
        self._timeout = timeout
        self._lock = threading.Lock()
        self._target: Slot | OpencodeProcess | None = None
        self._process: OpencodeProcess | None = None  # the one that was used last
        self._clean = False  # whether it may be used again
        self._error: Exception | None = None
        self.is_cut = False

    def interrupt(self, error: Exception) -> None:
        """Make `events` raise `error`, whatever it is waiting for."""
        with self._lock:
            self._error = self._error or error
            if self._target is not None:
                self._target.interrupt(error)

    def cut(self) -> None:
        """End the turn, of which nobody wants more: its failures do not count any more."""
        self.is_cut = True
        self.interrupt(ClientDisconnected())

    def _depend_on(self, target: Slot | OpencodeProcess) -> None:
        with self._lock:
            if self._error is not None:
                raise self._error
            self._target = target

    def events(self) -> Iterator[Event]:
        """Yield the events of the turn; the process is stopped, or kept, when the iteration ends, however it does."""
        slot = self._pool.slots.claim()
        self._pool.turns.add(self)
        try:
            self._depend_on(slot)
            slot.wait()
            spare = self._pool.take(slot)
            if spare is not None:
                try:
                    yield from self._run(spare)
                    return
                except ProcessDied:  # a request never fails because a spare did
                    if spare.posted:
                        raise
                    self._pool.give_back(spare, False)
                    self._process = None
            yield from self._run(None)
        finally:
            self._pool.turns.discard(self)
            if self._process is None:
                slot.release()
            else:  # only then is there room for another process
                self._pool.give_back(self._process, self._clean, slot.release)
            self._pool.replenish()

    def _run(self, process: OpencodeProcess | None) -> Iterator[Event]:
        self._process, self._clean = process, process is not None
        begun = False
        try:
            if process is None:
                process = self._process = self._pool.new_process()
                self._depend_on(process)
                process.start()
            else:
                self._depend_on(process)
            self._clean = False
            for event in process.prompt(self._model, self._prompt, self._timeout):
                self._clean = isinstance(event, Finish)
                yield event
                if not begun and not isinstance(event, Silence):
                    begun = True
                    self._pool.replenish()  # now, and not earlier: a start takes the processor from the first token
        except (StartError, OSError) as error:  # another opencode was installed meanwhile, or the disk is full
            raise APIError(502, f"opencode cannot be started: {error}", code="opencode_failed") from None
        finally:
            with self._lock:
                if self._target is process and self._error is not None:  # it will raise the error at its next read
                    self._clean = False
                self._target = None  # what comes now must not hit the next request of the process


Events = Generator[tuple[int, Event], None, None]  # with the index of the choice


def run_turns(turns: Sequence[Turn]) -> Events:
    """Yield the events of all turns as they come, each with the index of its turn; one failure ends all."""
    if len(turns) == 1:
        yield from ((0, event) for event in turns[0].events())
        return
    events: queue.Queue[tuple[int, Event | Exception | None]] = queue.Queue()

    def pump(index: int, turn: Turn) -> None:
        try:
            for event in turn.events():
                events.put((index, event))
            events.put((index, None))
        except Exception as error:
            events.put((index, error))

    threads = [threading.Thread(target=pump, args=pair, daemon=True) for pair in enumerate(turns)]
    running = len(turns)
    try:
        for thread in threads:
            thread.start()
        while running:
            index, event = events.get()
            if event is None or (isinstance(event, Exception) and turns[index].is_cut):
                running -= 1
            elif isinstance(event, Exception):
                raise event
            else:
                yield index, event
    finally:
        for turn in turns:
            turn.interrupt(ClientDisconnected())
        join_started(threads)


# -------------------------------------------------------------------------------------------------- response

SSE_DONE = b"data: [DONE]\n\n"
SSE_PING = b": keep-alive\n\n"
SSE_JSON = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make an encoder for every event


def sse_data(value: Json) -> bytes:
    """Return one server-sent event that carries `value`."""
    return b"data: " + SSE_JSON(value).encode() + b"\n\n"


class StopFilter:
    """Cuts text before the first of some sequences, also where one is split over deltas.

    Wire formats without a stop parameter leave this to the proxy; with one it never finds anything.
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        self._sequences = sequences
        self._held = ""  # may be the beginning of a sequence
        self.hit = False

    def feed(self, text: str) -> str:
        """Return what of `text`, and of text held back before, may be shown."""
        text = self._held + text
        found = [position for position in map(text.find, self._sequences) if position >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[:min(found)]
        keep = max((size for sequence in self._sequences for size in range(1, min(len(sequence), len(text) + 1))
                    if text.endswith(sequence[:size])), default=0)
        self._held = text[len(text) - keep:]
        return text[:len(text) - keep]

    def flush(self) -> str:
        """Return what was held back when no more text comes."""
        held, self._held = self._held, ""
        return held


class Choice:
    """Turns the events of one choice into OpenAI's deltas."""

    def __init__(self, stop: Sequence[str] = (), legacy_functions: bool = False) -> None:
        self._filter = StopFilter(stop) if stop else None
        self._legacy = legacy_functions
        self.finish_reason: str | None = None
        self.usage: Json | None = None

    def deltas(self, event: Event) -> list[Json]:
        """Return the deltas that `event` means; `finish_reason` is set when it was the last one."""
        if isinstance(event, TextDelta):
            text = self._filter.feed(event.text) if self._filter else event.text
            if self._filter and self._filter.hit:
                self.finish_reason = "stop"
            return [{"content": text}] if text else []
        if isinstance(event, ReasoningDelta):
            return [{"reasoning_content": event.text}]
        if isinstance(event, ToolCallDelta):  # the old API has room for one call
            return [self._call_delta(event)] if not (self._legacy and event.index) else []
        if isinstance(event, Finish):
            self.finish_reason, self.usage = event.reason, event.usage
            if self._legacy and event.reason == "tool_calls":
                self.finish_reason = "function_call"
            held = self._filter.flush() if self._filter else ""
            return [{"content": held}] if held else []
        return []

    def _call_delta(self, call: ToolCallDelta) -> Json:
        function = {**({"name": call.name} if call.id else {}), "arguments": call.arguments}
        if self._legacy:
            return {"function_call": function}
        head = {"id": call.id, "type": "function"} if call.id else {}
        return {"tool_calls": [{"index": call.index, **head, "function": function}]}


def message_of(deltas: Iterable[Json]) -> Json:
    """Return the assistant's message that `deltas` add up to."""
    texts: dict[str, list[str]] = {"content": [], "reasoning_content": []}
    calls: list[Json] = []  # of one tool call or, in the old API, the function call
    message: Json = {"role": "assistant", "content": None, "refusal": None}
    for delta in deltas:
        for key, pieces in texts.items():
            pieces += [delta[key]] if key in delta else []
        for call in delta.get("tool_calls") or ([{"function": delta["function_call"]}] if "function_call" in delta else []):
            if "name" in call["function"]:
                calls.append({**call, "function": {**call["function"], "arguments": []}})
            calls[call.get("index", -1)]["function"]["arguments"].append(call["function"]["arguments"])
    for call in calls:
        call["function"]["arguments"] = "".join(call["function"]["arguments"])
    if texts["content"] or not calls:
        message["content"] = "".join(texts["content"])
    if texts["reasoning_content"]:
        message["reasoning_content"] = "".join(texts["reasoning_content"])
    if calls and "id" in calls[0]:
        message["tool_calls"] = [{"id": call["id"], "type": "function", "function": call["function"]} for call in calls]
    elif calls:
        message["function_call"] = calls[0]["function"]
    return message


def total_usage(usages: Iterable[Json | None]) -> Json | None:
    """Return the sum of the choices' usages; None when a choice was cut off and its usage is not known."""
    total: Json | None = None
    for usage in usages:
        if usage is None:
            return None
        total = usage if total is None else added(total, usage)
    return total


def added(first: Json, second: Json) -> Json:
    """Return the sum of two usages; what is not a number in both is the first's."""
    return {key: added(value, second[key]) if isinstance(value, dict) and isinstance(second.get(key), dict)
            else value + second[key] if CHECKS[NUMBER](value) and CHECKS[NUMBER](second.get(key)) else value
            for key, value in first.items()}


class Completion:
    """The frame of one answer: what all its chunks, or the whole of it, have in common."""

    def __init__(self, model: str, include_usage: bool = False) -> None:
        self._id, self._created, self._model = "chatcmpl-" + uuid.uuid4().hex, int(time.time()), model
        # the part of a chunk before its choices does not change: it is made once
        self._chunk_head = sse_data(self._frame("chat.completion.chunk", choices=[]))[:-4].decode()
        self._chunk_tail = (b',"usage":null' if include_usage else b"") + b"}\n\n"

    def _frame(self, kind: str, **rest: Any) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model,
                "system_fingerprint": "fp_opencode", **rest}

    def chunk(self, index: int, delta: Json, finish_reason: str | None = None) -> bytes:
        """Return the SSE event for one chunk."""
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return (self._chunk_head + SSE_JSON(choice) + "]").encode() + self._chunk_tail

    def usage_chunk(self, usage: Json | None) -> bytes:
        """Return the SSE event that tells the usage of the whole stream."""
        return sse_data(self._frame("chat.completion.chunk", choices=[], usage=usage))

    def whole(self, choices: Sequence[tuple[Choice, list[Json]]]) -> Json:
        """Return the chat.completion for choices and all their deltas."""
        return self._frame("chat.completion", choices=[
            {"index": index, "message": message_of(deltas), "logprobs": None, "finish_reason": choice.finish_reason}
            for index, (choice, deltas) in enumerate(choices)],
            usage=total_usage(choice.usage for choice, _ in choices))


def model_object(name: str, created: int) -> Json:
    """Return OpenAI's description of a model."""
    return {"id": name, "object": "model", "created": created, "owned_by": name.partition("/")[0]}


# ------------------------------------------------------------------------------------------------------ http

class HangupWatcher:
    """Tells when a client that waits for its answer hangs up: one thread for all connections, without polling."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._orders: collections.deque[tuple[int, socket.socket | None, Callable[[], None]]] = collections.deque()
        self._waker, self._wakened = socket.socketpair()
        self._selector.register(self._wakened, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def watch(self, connection: socket.socket, hung_up: Callable[[], None]) -> Iterator[None]:
        """Call `hung_up`, from the watcher's thread, if the client of `connection` goes during the context."""
        descriptor = connection.fileno()  # kept: a closed socket has none, and a new one may get the same
        self._order(descriptor, connection, hung_up)
        try:
            yield
        finally:
            self._order(descriptor, None, hung_up)

    def _order(self, *order: Any) -> None:
        self._orders.append(order)
        self._waker.send(b"-")

    def _run(self) -> None:
        while True:
            # orders last: they may be about a new connection with the number of one that has just been reported
            for key, _ in sorted(self._selector.select(), key=lambda ready: ready[0].data is None):
                if key.data is None:
                    if not self._wakened.recv(4096):
                        return
                    while self._orders:
                        self._obey(*self._orders.popleft())
                else:  # once: it would be reported again and again
                    self._obey(key.fd, None, key.data)
                    if has_hung_up(key.fileobj):  # otherwise it has sent its next request already
                        key.data()

    def _obey(self, descriptor: int, connection: socket.socket | None, hung_up: Callable[[], None]) -> None:
        with contextlib.suppress(KeyError, ValueError, OSError):
            if connection is None:
                self._selector.unregister(descriptor)
            else:
                self._selector.register(connection, selectors.EVENT_READ, hung_up)

    def close(self) -> None:
        """End the thread."""
        self._waker.close()
        self._thread.join()
        self._wakened.close()
        self._selector.close()


def has_hung_up(connection: Any) -> bool:
    """Tell, without waiting, whether a connection is at its end."""
    try:
        with connection.dup() as probe:  # whose own timeout does not touch its owner's
            probe.settimeout(0)
            return not probe.recv(1, socket.MSG_PEEK)
    except BlockingIOError:  # its next request has been read meanwhile
        return False
    except OSError:
        return True


class DeadlineReader(io.RawIOBase):
    """Reads a socket up to a point in time, however slowly the bytes drip."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.deadline = 0.0

    def readable(self) -> bool:
        """Tell io.BufferedReader that it may read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what is there; raise socket.timeout past the deadline."""
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise socket.timeout("the request did not arrive in time")
        self._connection.settimeout(remaining)
        return self._connection.recv_into(buffer)


TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
LOOPBACK_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# What each route is served by; every route also answers without /v1.
ROUTES = {"/": {"GET": "_about"}, "/health": {"GET": "_health"}, "/models": {"GET": "_models"},
          "/chat/completions": {"POST": "_chat"}}
OPEN_ROUTES = ("/", "/health")  # need no key

Deltas = Iterator[tuple[int, Event, list[Json]]]  # the index of a choice, an event of it, what to show of that


class ProxyHandler(http.server.BaseHTTPRequestHandler):
    """Answers the requests of one connection; the only code that writes to the socket."""

    server: ProxyServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        """Read through deadlines instead of without end."""
        super().setup()
        self.rfile: Any
        self.rfile.close()
        self._reader = DeadlineReader(self.connection)
        self.rfile = io.BufferedReader(self._reader)

    def finish(self) -> None:
        """Let the server know that the connection has ended."""
        self.server.forget(self)
        super().finish()

    def version_string(self) -> str:
        """Return the Server header."""
        return "opencode_proxy/" + __version__

    def handle_one_request(self) -> None:
        """Give each request its deadline, and let the server know that the connection is idle until it comes."""
        self._reader.deadline = time.monotonic() + IDLE_SECONDS
        self._facts: Json = {}
        self._started = time.monotonic()
        self._body_left = self._continue_wanted = self._streaming = False
        self._origin = ""  # of the web page that asks, once it is known that it may
        self.server.set_idle(self, True)
        try:
            super().handle_one_request()
        except OSError:  # reset by the client
            self.close_connection = True

    def handle_expect_100(self) -> bool:
        """Leave the interim answer to `_read_body`: a refusal comes instead of it, not after it."""
        self._continue_wanted = True
        return True

    # -- one request

    def _serve(self) -> None:
        """Answer one request, whatever happens; write one log line."""
        self.server.set_idle(self, False)
        self._started = time.monotonic()
        wanted = self.headers.get("X-Request-Id", "")
        self._request_id = wanted if REQUEST_ID.fullmatch(wanted) else uuid.uuid4().hex
        try:
            self._dispatch()
        except APIError as error:
            self._note(error)
            self._send_error(error)
        except (ClientDisconnected, OSError) as error:
            self.close_connection = True
            self._facts.update(status=499, error=str(error) or "the client hung up")
        except Exception as error:  # a defect of this program must not take others' requests with it
            self._facts["error"] = f"internal error: {error!r}"
            self._send_error(APIError(500, "internal error", code="internal_error"))
        finally:
            if self._body_left:
                self._drain()
            self._log()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _serve

    def _dispatch(self) -> None:
        self._body_length = self._framing()
        self._check_origin()
        path = re.sub(r"^[A-Za-z]+://[^/?]*", "", self.path).partition("?")[0]
        path = re.sub(r"^/v1(?=/|$)", "", path).rstrip("/") or "/"
        route, _, model = path.partition("/models/")
        arguments = [urllib.parse.unquote(model)] if model and not route else []
        methods = {"GET": "_model"} if arguments else ROUTES.get(path)
        if methods is None:
            raise APIError(404, f"There is nothing at {printable(path)}", code="unknown_url")
        allowed = sorted({*methods, "OPTIONS", *(("HEAD",) if "GET" in methods else ())})
        if self.command == "OPTIONS":
            preflight = {"Access-Control-Allow-Methods": ", ".join(allowed), "Access-Control-Max-Age": "600",
                         "Access-Control-Allow-Headers": self.headers.get("Access-Control-Request-Headers") or "*"}
            self._send(204, b"", headers={"Allow": ", ".join(allowed), **(preflight if self._origin else {})})
            return
        if path not in OPEN_ROUTES:
            self._check_key()
        name = methods.get("GET" if self.command == "HEAD" else self.command)
        if name is None:
            raise APIError(405, f"{self.command} is not allowed here", code="method_not_allowed",
                           headers={"Allow": ", ".join(allowed)})
        if self.command != "POST":
            self._read_body()  # of no use, but it must not be taken for the next request
        getattr(self, name)(*arguments)

    def _check_origin(self) -> None:
        """Refuse web pages that may not ask."""
        origin = self.headers.get("Origin")
        if origin is None:
            return
        if not (LOOPBACK_ORIGIN.fullmatch(origin) or origin in self.server.settings.cors_origin
                or ("*" in self.server.settings.cors_origin and origin != "null")):
            raise APIError(403, "Web pages of this origin may not use the proxy; --cors-origin allows them",
                           code="origin_not_allowed")
        self._origin = origin

    def _check_key(self) -> None:
        keys = self.server.settings.api_key
        if not keys:
            return
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else self.headers.get("X-Api-Key", "")
        # http.server has decoded the header's bytes as Latin-1
        matches = [hmac.compare_digest(given.encode("latin-1", "replace"), key.encode()) for key in keys]
        if not any(matches):
            raise APIError(401, "The API key is missing or wrong", type="authentication_error", code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})

    # -- request body (RFC 9112, section 6)

    def _framing(self) -> int | None:
        """Return the length of the request's body, None for a chunked one; refuse what could be read in two ways."""
        lengths = {part.strip() for value in self.headers.get_all("Content-Length", []) for part in value.split(",")}
        coding = self.headers.get_all("Transfer-Encoding", [])
        self._body_left = bool(coding) or lengths not in (set(), {"0"})
        problem = ""
        if self.headers.defects or not all(TOKEN.fullmatch(name) for name in self.headers):
            problem = "a header line is malformed"
        elif len(self.headers.get_all("Host", [])) != 1 and self.request_version != "HTTP/1.0":
            problem = "exactly one Host header is required"
        elif coding and (lengths or self.request_version == "HTTP/1.0"):
            problem = "Transfer-Encoding is not allowed here"
        elif len(lengths) > 1 or not all(re.fullmatch("[0-9]{1,18}", length) for length in lengths):
            problem = "Content-Length is not one number"
        if problem:
            self.close_connection = True  # nobody knows where the next request begins
            raise invalid("Bad request: " + problem)
        if coding and [value.strip().lower() for value in coding] != ["chunked"]:
            self.close_connection = True
            raise APIError(501, "Only the transfer coding `chunked` is understood", code="unknown_transfer_coding")
        return None if coding else int(next(iter(lengths), "0"))

    def _check_size(self, size: int) -> None:
        limit = self.server.settings.max_body_size
        if size > limit:
            raise APIError(413, f"The body is larger than {limit} bytes (--max-body-size)", code="body_too_large")

    def _read_body(self) -> bytes:
        """Return the body of the request; raise APIError when it is malformed, too large or late."""
        if not self._body_left:
            return b""
        self._check_size(self._body_length or 0)
        if self._continue_wanted:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._reader.deadline = time.monotonic() + BODY_SECONDS
        try:
            body = self._read_chunked() if self._body_length is None else self.rfile.read(self._body_length)
        except socket.timeout:
            self.close_connection, self._body_left = True, False
            raise APIError(408, f"The body did not arrive within {BODY_SECONDS:.0f} s", code="body_timeout") from None
        if self._body_length is not None and len(body) < self._body_length:
            raise ClientDisconnected("the client left before its body was complete")
        self._body_left = False
        return bytes(body)

    def _read_chunked(self) -> bytes:
        """Return a body in chunked coding (RFC 9112, section 7.1); trailers are read and dropped."""
        body = bytearray()
        while True:
            size = self._line().partition(b";")[0].strip()
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,16}", size):
                self.close_connection = True
                raise invalid("Bad request: malformed chunk size")
            length = int(size, 16)
            if length == 0:
                while self._line():
                    pass
                return bytes(body)
            self._check_size(len(body) + length)
            body += self.rfile.read(length)
            if self._line():
                self.close_connection = True
                raise invalid("Bad request: malformed chunk")

    def _line(self) -> bytes:
        line: bytes = self.rfile.readline(1 << 12)
        if not line.endswith(b"\n"):
            raise ClientDisconnected("the client left before its body was complete")
        return line.rstrip(b"\r\n")

    def _drain(self) -> None:
        """Take in the rest of a refused body for a while: closing at once would reset the refusal away."""
        self.close_connection = True
        self._reader.deadline = time.monotonic() + DRAIN_SECONDS
        left = MAX_DRAIN_BYTES
        with contextlib.suppress(OSError, ValueError):
            self.connection.shutdown(socket.SHUT_WR)
            while left > 0:
                block = self.rfile.read1(1 << 16)
                if not block:
                    return
                left -= len(block)

    # -- responses

    def _send(self, status: int, body: bytes, content_type: str = "application/json",
              headers: Mapping[str, str] | None = None, chunked: bool = False) -> None:
        """Send the head of a response and, unless it is `chunked`, all of its body."""
        self._facts["status"] = status
        self.connection.settimeout(WRITE_SECONDS)
        if self._body_left:
            self.close_connection = True
        if self.request_version == "HTTP/0.9":  # not understood: there is no version to answer in but ours
            self.request_version = "HTTP/1.1"
        self.send_response(status)
        self.send_header("X-Request-Id", self._request_id)
        if self._origin:
            self.send_header("Access-Control-Allow-Origin", self._origin)
            self.send_header("Access-Control-Expose-Headers", "X-Request-Id, Retry-After")
        self.send_header("Vary", "Origin")
        for name, value in (headers or {}).items():
            self.send_header(name, re.sub(r"[^\x20-\x7e]", "", value))
        if chunked and self.request_version == "HTTP/1.0":
            self.close_connection = True
        elif chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif status != 204:
            self.send_header("Content-Length", str(len(body)))
        if body or chunked:
            self.send_header("Content-Type", content_type)
        if self.close_connection or self.request_version == "HTTP/1.0":  # which knows keep-alive only when it is told
            self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, value: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode() + b"\n", headers=headers)

    def _send_error(self, error: APIError) -> None:
        if not self._streaming:  # in the middle of a stream only its end can tell
            with contextlib.suppress(OSError):
                self._send_json(error.body(), error.status, error.headers)
                return
        self.close_connection = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Tell what http.server refuses by itself, also in OpenAI's shape, and close."""
        self.close_connection = True
        self._request_id = uuid.uuid4().hex
        self._facts["error"] = printable(message or http.client.responses.get(code, ""))
        self.command = getattr(self, "command", None) or "-"
        self._send_error(APIError(int(code), self._facts["error"]))
        self._log()

    def _note(self, error: APIError) -> None:
        """Remember an error for the log and, where it is not the client's, for /health."""
        self._facts["error"] = error.message
        if error.status >= 500:
            self.server.pool.last_error = error.message

    def write_http_chunk(self, data: bytes) -> None:
        """Write one piece of a streamed body, in HTTP's chunked coding where the client knows it."""
        if self.request_version == "HTTP/1.0":
            self.wfile.write(data)
        else:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """Write nothing: `_log` does, when the request is over."""

    def log_error(self, format: str, *args: Any) -> None:
        """Write nothing: an idle connection that ended is no news."""

    def _log(self) -> None:
        facts = {"status": "-", **self._facts}
        facts["seconds"] = f"{time.monotonic() - self._started:.3f}"
        path = printable(getattr(self, "path", "-"))
        line = " ".join("{}={}".format(key, value if key != "error" else json.dumps(printable(str(value))))
                        for key, value in facts.items() if key != "status")
        log("{} {} {} {} {} id={}".format(self.client_address[0], printable(self.command or "-"), path,
                                          facts["status"], line, self._request_id))

    # -- routes

    def _about(self) -> None:
        status = self.server.health()
        text = (f"opencode_proxy {__version__}: OpenAI's chat completions API for the models of opencode\n"
                f"status: {status['reason'] or status['status']}\nbase URL for apps: {self.server.base_url()}\n")
        self._send(200, text.encode(), "text/plain; charset=utf-8")

    def _health(self) -> None:
        status = self.server.health()
        self._send_json(status, 200 if status["status"] == "healthy" else 503)

    def _models(self) -> None:
        names = self.server.pool.catalog().models
        self._send_json({"object": "list", "data": [model_object(name, self.server.created) for name in names]})

    def _model(self, name: str) -> None:
        model = self.server.pool.catalog().full_name(name)
        if model is None:
            raise model_not_found(printable(name))
        self._send_json(model_object(model, self.server.created))

    def _chat(self) -> None:
        request = parse_chat_request(self._read_body())
        pool = self.server.pool
        model = pool.resolve(request.model)
        self._facts["model"] = model
        prompt = prompt_of(request)
        turns = [Turn(pool, model, prompt, self.server.settings.timeout) for _ in range(request.choices)]
        shown = request.model if request.model in (model, model.partition("/")[2]) else model
        completion = Completion(shown, request.include_usage)
        choices = [Choice(request.stop, request.legacy_functions) for _ in turns]

        def hung_up() -> None:
            for turn in turns:
                turn.interrupt(ClientDisconnected())

        with self.server.watcher.watch(self.connection, hung_up), contextlib.closing(run_turns(turns)) as events:
            answer = self._deltas(choices, turns, events)
            if request.stream:
                self._stream(choices, answer, completion, request.include_usage)
            else:
                self._complete(choices, answer, completion)

    def _deltas(self, choices: Sequence[Choice], turns: Sequence[Turn], events: Events) -> Deltas:
        """Yield each event with its deltas until every choice is finished; note times and tokens for the log."""
        for index, event in events:
            choice = choices[index]
            if choice.finish_reason is not None:
                continue  # cut off at a stop sequence
            deltas = choice.deltas(event)
            if deltas:
                self._facts.setdefault("first", f"{time.monotonic() - self._started:.3f}")
            if choice.finish_reason is not None:
                if not isinstance(event, Finish):
                    turns[index].cut()
                if all(choice.finish_reason is not None for choice in choices):
                    events.close()  # a client that has its answer may hang up: that is no news for the process any more
            yield index, event, deltas
        usage = total_usage(choice.usage for choice in choices)
        if usage is not None:
            self._facts.update({"in": usage["prompt_tokens"], "out": usage["completion_tokens"]})

    def _complete(self, choices: Sequence[Choice], answer: Deltas, completion: Completion) -> None:
        collected: list[list[Json]] = [[] for _ in choices]
        for index, _, deltas in answer:
            collected[index] += deltas
        self._send_json(completion.whole(list(zip(choices, collected))))

    def _stream(self, choices: Sequence[Choice], answer: Deltas, completion: Completion, include_usage: bool) -> None:
        try:
            for index, event, deltas in answer:
                self._begin_stream(completion, len(choices))
                if isinstance(event, Silence):
                    self.write_http_chunk(SSE_PING)
                for delta in deltas:
                    self.write_http_chunk(completion.chunk(index, delta))
                if choices[index].finish_reason is not None:
                    self.write_http_chunk(completion.chunk(index, {}, choices[index].finish_reason))
            if include_usage:
                self.write_http_chunk(completion.usage_chunk(total_usage(choice.usage for choice in choices)))
        except APIError as error:
            if not self._streaming:
                raise
            self._note(error)
            self.write_http_chunk(sse_data(error.body()))
        self.write_http_chunk(SSE_DONE)
        if self.request_version != "HTTP/1.0":
            self.wfile.write(b"0\r\n\r\n")

    def _begin_stream(self, completion: Completion, choices: int) -> None:
        """Send the response's head and the chunks that name the role, once: from here on an error is an event."""
        if self._streaming:
            return
        self._streaming = True
        self._send(200, b"", "text/event-stream; charset=utf-8", chunked=True,
                   headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        for index in range(choices):
            self.write_http_chunk(completion.chunk(index, {"role": "assistant", "content": ""}))


def printable(text: str) -> str:
    """Return `text` on one line of at most 200 printable ASCII characters."""
    return re.sub(r"[^\x20-\x7e]", "?", text)[:200]


def log(text: str) -> None:
    """Write one line to stderr, with the time unless the journal adds it."""
    stamp = "" if os.environ.get("JOURNAL_STREAM") else time.strftime("%Y-%m-%d %H:%M:%S ")
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(stamp + text + "\n")
        sys.stderr.flush()


def log_message(arrow: str, message: Json, size: int) -> None:
    """Log a JSON-RPC message without its contents: prompts and answers are nobody's business."""
    log("{} {} {} bytes".format(arrow, message.get("method", "reply"), size))


def open_files_allowed() -> int:
    """Return how many files this process may have open, after raising the soft limit to the hard one."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 1 << 20
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for most in (1 << 16, hard, 10240, 4096):  # macOS says that there is no limit, and has one
        with contextlib.suppress(ValueError, OSError):
            if soft < most:
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
                return most
    return soft


class ProxyServer(http.server.ThreadingHTTPServer):
    """Accepts connections, one thread each; owns the pool."""

    request_queue_size = 128
    daemon_threads = True
    block_on_close = False  # `stop` waits, with a deadline

    def __init__(self, settings: argparse.Namespace, pool: Pool) -> None:
        self.settings = settings
        self.pool = pool
        self.watcher = HangupWatcher()
        self.created = int(time.time())
        self._handlers: dict[ProxyHandler, bool] = {}  # idle or not, longest idle first
        self._lock = threading.Lock()
        self._most_handlers = min(MAX_CONNECTIONS, max(16, open_files_allowed() - RESERVED_FILES))
        self.address_family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        try:
            super().__init__((settings.host, settings.port), ProxyHandler)
        except BaseException:
            self.watcher.close()
            raise

    def server_bind(self) -> None:
        """Bind without looking the host's name up, which can take half a minute."""
        if self.address_family == socket.AF_INET6:
            with contextlib.suppress(OSError, AttributeError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.settings.host, self.server_address[1]

    def base_url(self) -> str:
        """Return the URL to give to apps."""
        host = self.settings.host
        host = "localhost" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.server_port}/v1"

    def health(self) -> Json:
        """Return what /health tells: whether requests can be served, and why not."""
        catalog, opencode = self.pool.opencode.catalog, self.pool.opencode
        reason = None
        if not self.pool.proven.is_set():
            reason = "starting"
        elif self.pool.failures >= 3:
            reason = f"opencode does not start: {self.pool.last_error}"
        elif not catalog.ready:
            reason = not_logged_in(catalog.default.partition("/")[0])
        return {"status": "unhealthy" if reason else "healthy", "reason": reason, "version": __version__,
                "opencode": opencode.version or None, "model": catalog.default, **self.pool.status(),
                "last_error": self.pool.last_error or None}

    # -- connections

    def set_idle(self, handler: ProxyHandler, idle: bool) -> None:
        """Note whether `handler` waits for a request; only then may its connection be closed from outside."""
        with self._lock:
            self._handlers.pop(handler, None)
            self._handlers[handler] = idle

    def process_request(self, request: Any, client_address: Any) -> None:
        """Make room for the new connection where there are too many, then serve it in a thread."""
        with self._lock:
            full = len(self._handlers) >= self._most_handlers
        if full and not self._hang_up_idle(1):
            self.shutdown_request(request)  # nothing could tell its client more before it has read the request
        else:
            super().process_request(request, client_address)

    def _hang_up_idle(self, most: int) -> int:
        """Close up to `most` connections, the longest idle first; return how many."""
        with self._lock:
            idle = [handler for handler, is_idle in self._handlers.items() if is_idle][:most]
            for handler in idle:
                del self._handlers[handler]
                with contextlib.suppress(OSError):
                    handler.connection.shutdown(socket.SHUT_RDWR)
        return len(idle)

    def forget(self, handler: ProxyHandler) -> None:
        """Note that the connection of `handler` has ended."""
        with self._lock:
            self._handlers.pop(handler, None)

    def _wait_idle(self, seconds: float, hurry: Callable[[float], Any]) -> None:
        """Wait until no request is being answered, `seconds` have passed or `hurry` says so."""
        deadline = time.monotonic() + seconds
        while not all(list(self._handlers.values())) and time.monotonic() < deadline and not hurry(0.02):
            pass

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what no handler caught, on one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            log(f"{client_address[0]} connection failed: {error!r}")

    def stop(self, grace: float, hurry: Callable[[float], Any]) -> None:
        """Stop accepting, let running answers finish for `grace` seconds, end the rest, stop every process.

        `hurry` waits for so many seconds and tells whether the grace is over.
        """
        self.shutdown()
        self.server_close()
        self._hang_up_idle(MAX_CONNECTIONS)
        self._wait_idle(grace, hurry)
        self.pool.interrupt_all(APIError(503, "The server is shutting down", code="shutting_down"))
        self._wait_idle(STOP_SECONDS, time.sleep)
        self.pool.close()
        self.watcher.close()


# ---------------------------------------------------------------------------------------------- command line

def bounded(kind: Callable[[str], Any], least: float, most: float) -> Callable[[str], Any]:
    """Return a reader of numbers from `least` to `most` for argparse."""
    def read(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:  # also where it is not a number
            raise argparse.ArgumentTypeError(f"{text} is not from {least:g} to {most:g}")
        return value
    read.__name__ = kind.__name__
    return read


def full_model(text: str) -> str:
    """Read a model's full name for argparse."""
    if not all(text.partition("/")):
        raise argparse.ArgumentTypeError(f"{text} is not of the form provider/model")
    return text


COUNT, SOME = bounded(int, 0, 10000), bounded(int, 1, 10000)
SECONDS, SOON = bounded(float, 0, 86400), bounded(float, 0.1, 86400)
# For each group: name, default, reader (none where the option may be repeated), unit, meaning.
OPTIONS: dict[str, list[tuple[str, Any, Callable[[str], Any] | None, str, str]]] = {
    "where": [
        ("host", "0.0.0.0", str, "ADDRESS", "address to listen on"),
        ("port", 4141, bounded(int, 0, 65535), "N", "port to listen on"),
        ("opencode", None, str, "PATH", "the opencode program (default: PATH, then where its installers put it)"),
        ("model", None, full_model, "P/M", f"default model (default: {DEFAULT_MODEL}, or its successor)")],
    "who may ask": [
        ("api-key", None, None, "KEY", "key that clients must show; may be repeated (in the environment: spaces between)"),
        ("api-key-file", None, str, "FILE", "file with such keys, one a line"),
        ("cors-origin", None, None, "ORIGIN", "web pages that may ask besides those on loopback, or *; may be repeated")],
    "how much": [
        ("max-concurrency", 4, SOME, "N", "opencode processes that answer at once"),
        ("max-queue", 64, COUNT, "N", "requests that may wait for one"),
        ("max-body-size", 64 << 20, bounded(int, 1, 1 << 40), "BYTES", "largest request body"),
        ("spares", 1, COUNT, "N", "opencode processes started ahead; 0: none"),
        ("requests-per-process", 1, SOME, "N", "requests that a process may answer, one after the other")],
    "how long": [
        ("timeout", 300.0, SOON, "SECONDS", "longest silence of the model's provider"),
        ("grace", 10.0, SECONDS, "SECONDS", "time for running answers when stopping")],
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; every option is also read from OPENCODE_PROXY_..., which it overrides."""
    parser = argparse.ArgumentParser(
        prog="opencode_proxy.py", description="Serve the models of opencode through OpenAI's chat completions API.",
        epilog="Each option can also be given as an environment variable: --max-queue as OPENCODE_PROXY_MAX_QUEUE.")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, default, reader, unit, meaning in options:
            if reader is None:
                group.add_argument("--" + name, metavar=unit, action="append", help=meaning)
            else:
                variable = "OPENCODE_PROXY_" + name.upper().replace("-", "_")
                group.add_argument("--" + name, metavar=unit, type=reader, default=os.environ.get(variable) or default,
                                   help=meaning + ("" if default is None else f" (default: {default})"))
    parser.add_argument("--verbose", action="store_true",
                        default=os.environ.get("OPENCODE_PROXY_VERBOSE", "").lower() not in ("", "0", "false", "no"),
                        help="log the messages exchanged with opencode, without their contents")
    parser.add_argument("--systemd-unit", nargs="?", const="user", choices=("user", "system"), metavar="user|system",
                        help="print a systemd unit for this copy of the program, and end")
    parser.add_argument("--version", action="version", version="opencode_proxy " + __version__)
    return parser


def read_settings(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the settings of the command line and the environment; end with exit code 2 where they are wrong."""
    parser = build_parser()
    settings = parser.parse_args(argv)
    for name in ("api_key", "cors_origin"):  # argparse would add to a default instead of replacing it
        if getattr(settings, name) is None:
            setattr(settings, name, os.environ.get("OPENCODE_PROXY_" + name.upper(), "").split())
    if settings.api_key_file is not None:
        try:
            keys = pathlib.Path(settings.api_key_file).read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"argument --api-key-file: {error}")
        if not keys:
            parser.error(f"argument --api-key-file: {settings.api_key_file} holds no key")
        settings.api_key += keys
    if not all(key.strip() for key in settings.api_key):
        parser.error("argument --api-key: empty")  # would let everybody in
    settings.cors_origin = [origin.rstrip("/").lower() for origin in settings.cors_origin]  # as browsers send it
    return settings


UNIT = """[Unit]
Description=OpenAI's chat completions API for the models of opencode
Documentation=https://github.com/anomalyco/opencode
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
ExecStart={python} {program} --opencode {opencode}
# settings, and the key as OPENCODE_PROXY_API_KEY=...; the file should be readable by its owner only
EnvironmentFile=-{settings}
Restart=on-failure
RestartSec=5
TimeoutStartSec=180
TimeoutStopSec=60
KillMode=mixed
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
SystemCallArchitectures=native
{more}
[Install]
WantedBy={target}
"""

# What only the system's manager may set. MemoryDenyWriteExecute is missing: opencode's JavaScript engine compiles.
SYSTEM_UNIT = """User={user}
Environment={home}
PrivateTmp=yes
PrivateDevices=yes
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={data}
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RestrictNamespaces=yes
CapabilityBoundingSet=
AmbientCapabilities=
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
"""


def unit_word(text: str) -> str:
    """Return `text` as one word of a systemd unit (systemd.syntax(7), systemd.service(5))."""
    text = text.replace("%", "%%").replace("$", "$$")
    return text if re.fullmatch(r"[\w@%$/.:+,=-]+", text) else json.dumps(text, ensure_ascii=False)


def systemd_unit(kind: str, opencode: str) -> str:
    """Return a systemd unit, `kind` "user" or "system", for this copy of the program and this user."""
    home, user = os.path.expanduser("~"), os.environ.get("USER") or os.environ.get("LOGNAME") or "root"
    data = user_folder("XDG_DATA_HOME", "~/.local/share")
    more = SYSTEM_UNIT.format(user=user, home=unit_word(f"HOME={home}"), data=unit_word(f"-{data}"))
    system = kind == "system"
    python, program = (unit_word(os.path.abspath(path)) for path in (sys.executable, __file__))
    return UNIT.format(python=python, program=program, opencode=unit_word(opencode),
                       settings="/etc/opencode_proxy.env" if system else "%h/.config/opencode_proxy.env",
                       more=more if system else "", target="multi-user.target" if system else "default.target")


def notify(state: str) -> None:
    """Tell systemd about the service's state, where it wants to know (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notification:
            notification.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


def banner(server: ProxyServer) -> list[str]:
    """Return the lines that say what runs, and what is worth a warning."""
    settings, catalog = server.settings, server.pool.opencode.catalog
    lines = ["opencode_proxy {} with opencode {}, model {}".format(
        __version__, server.pool.opencode.version or "(not logged in)", catalog.default),
        f"base URL for apps: {server.base_url()}"]
    if not settings.model and catalog.default != DEFAULT_MODEL:
        lines.append(f"warning: {DEFAULT_MODEL} is not offered, {catalog.default} answers instead; choose with --model")
    if not catalog.ready:
        lines.append("warning: " + not_logged_in(catalog.default.partition("/")[0]))
    if not settings.api_key and settings.host not in ("localhost", "::1") and not settings.host.startswith("127."):
        lines.append("warning: whoever reaches this port can use your models; set --api-key or --host 127.0.0.1")
    return lines


@contextlib.contextmanager
def signals() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield a pair of sockets; for each signal to stop a byte arrives at the second, and none ends the process.

    The interpreter writes the byte. A handler that sets an event could find it locked by the thread it interrupts.
    """
    waker, wakened = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which it is under nohup
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    try:
        yield waker, wakened
    finally:
        signal.set_wakeup_fd(-1)
        waker.close()
        wakened.close()


def serve(settings: argparse.Namespace) -> int:
    """Run the server until it is told to stop; return the exit code."""
    opencode = Opencode(find_opencode(settings.opencode), settings.model)
    pool = Pool(opencode, settings.max_concurrency, settings.max_queue, settings.spares, settings.requests_per_process,
                log_message if settings.verbose else lambda *_: None)
    try:
        server = ProxyServer(settings, pool)
    except OSError as error:
        pool.close()
        raise StartError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from None
    failures: list[StartError] = []
    with signals() as (waker, wakened):
        def prove() -> None:
            try:
                pool.prove()
            except StartError as error:
                failures.append(error)
                waker.send(b"!")
            else:
                for line in banner(server):
                    log(line)
                notify("READY=1")

        threads = [threading.Thread(target=server.serve_forever), threading.Thread(target=prove)]
        for thread in threads:
            thread.start()
        failed = wakened.recv(1) == b"!"
        notify("STOPPING=1")
        server.stop(settings.grace, lambda seconds: select.select([wakened], [], [], seconds)[0])
        for thread in threads:
            thread.join()
    if failed:
        raise failures[0]
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and serve; return the exit code."""
    settings = read_settings(argv)
    try:
        if settings.systemd_unit:
            print(systemd_unit(settings.systemd_unit, find_opencode(settings.opencode)), end="")
            return 0
        return serve(settings)
    except StartError as error:
        print(f"opencode_proxy: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
