#!/usr/bin/env python3
"""Serve the models of `opencode` to every app that speaks OpenAI's chat completions API.

    python3 opencode_proxy.py --port 4141        serve; apps use http://localhost:4141/v1
    python3 -m unittest -v                       run the tests (in the folder that holds them)

The map: one streamed answer
    The sections of this file stand in the order in which they use each other: `http` is among the
    last, and its ProxyHandler._chat is where a request begins. The thread of the connection runs
    it from top to bottom:

    request = parse_chat_request(body)           the client's words, checked
    model = pool.ready(look).resolve(name)       which of opencode's models is meant
    pool.run(request, model, look)               a Turn waits for an OpencodeProcess, opens a
                                                 session in it and prompts it with "-"
      -> POST /turn                              the plugin in opencode asks what to tell opencode
      -> POST /request {url, body}               opencode is about to send its request: the plugin
                                                 asks for the body; a WireFormat makes it from the
                                                 client's words, quirks repair it for the service
      <- upstream, data, data, ...               the plugin relays the answer as lines of stdout;
                                                 the WireFormat makes Events of it
    answer.take(event)                           makes chunks, which the handler writes at once
    turn.leave()                                 after the last event: the session is cancelled,
                                                 the process serves the next turn or ends

    opencode only logs in and talks to the provider: it has no tools, no files and no memory.

When the client hangs up
    Every wait for opencode or the provider calls `look` at least every LOOK_SECONDS. It raises
    ClientDisconnected, the stack unwinds, and `finally` gives everything back: Turn.leave cancels
    the session in opencode, which drops the connection to the provider (`init.signal` of the
    plugin's fetch aborts), and takes the turn from its process. A client that takes nothing of
    its answer has WRITE_SECONDS; one that leaves while its body is read is logged with 408.

When a process dies
    Its thread (Pool._live) reads the end of its stdout, retires it, and puts a letter into the
    inbox of each of its turns. Before the plugin sends a body, it says so on that stdout. A turn
    whose body was not sent yet waits for another process, at most MAX_ATTEMPTS in all; one whose
    body was sent fails with 502: nothing is ever sent twice. A process that hangs, or whose stdout
    something that it started keeps open, may still send what it has: that counts as sent.

Threads
    main                  waits for a signal
    server                accepts connections
    one a connection      reads requests, runs their turns, alone writes to its socket
    one a choice          of a request with n > 1: runs that turn
    one an image          fetches it
    one a process         starts it, reads its stdout, waits for its end
    asks, one an ask      accept, and answer, the plugins' asks; put letters into inboxes
    prove                 reads the catalog and starts the first process, then ends
    Pool._tend            measures processes, starts the next one when it is time
    CatalogWatch._watch   reads the catalog again when the user's files change
    LogWriter._run        writes the log, which may have to wait for its reader

Locks
    Pool._lock            processes, their accounts, the queue of turns; nothing slow under it
    Child._lock           stdin of a process: whole lines, not closed under a writer
    Opencode._lock        what is made in the private directory
    ProxyServer._lock     the connections, and how much of requests is held in memory
    Thoughts._lock        what is remembered of answers
    LogWriter._lock       its thread, and how many lines were dropped

Protocol with the plugin (JSON-RPC lines of stdout, HTTP over a Unix socket)
    POST /turn/SESSION                 -> {system, conversation, params, effort}
    POST /request/SESSION {url, body}  -> 200 the body to send, with further headers in X-Headers;
                                          204 send opencode's own; 410 nobody waits: send nothing
    POST /more/SESSION                 -> 200 when the client has taken what was relayed so far
    proxy/loaded, proxy/warm           the plugin runs; the start-up proof came as far as it should
    proxy/sending                      the request leaves as soon as this line is in the pipe
    proxy/upstream {status, headers}   the provider begins to answer
    proxy/data {text}                  a piece of the answer, at most 64 Ki characters
    proxy/end                          the end of the answer
    proxy/refused {status, headers, body}
    proxy/error {network, message}     no answer, or not the whole of it
    proxy/delta, proxy/finish          of an answer in a format that only opencode knows

Glossary
    turn       one choice of a request being answered      letter   what reaches a turn's inbox
    ask        the plugin's request to Python              event    a delta, or a turn's finish
    exchange   what a turn says to the provider, and       chunk    OpenAI's object in a stream
               how it understands the answer               quirk    a fact about a service beyond
    fresh      a process that has served nothing                    its wire format
    worn       one that serves only where no other can     target   where a body goes
    foreign    a wire format that only opencode knows      look     see "When the client hangs up"
    reasoning  what a model says before its answer, for    thought  what is remembered with a call,
               the client to read                                   for the provider to see again

Facts about opencode were observed with versions 1.17.0 and 1.18.33.
"""

from __future__ import annotations

import signal
import sys

if sys.platform == "win32":
    sys.exit("opencode_proxy does not run on Windows itself: run it in WSL")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before `serve` looks for Ctrl-C

import abc
import argparse
import base64
import collections
import contextlib
import email.message
import errno
import fcntl
import hashlib
import hmac
import http.client
import http.server
import importlib
import io
import ipaddress
import itertools
import json
import math
import os
import pathlib
import queue
import re
import resource
import secrets
import select
import shutil
import socket
import socketserver
import ssl
import string
import subprocess
import tempfile
import threading
import time
import urllib.parse
import uuid
import zlib
from collections.abc import (
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, NamedTuple, NoReturn, Union

__version__ = "3.0.0"
Json = dict[str, Any]
DEFAULT_MODEL = "github-copilot/gpt-4.1"
# GitHub took gpt-4.1 out of Copilot in June 2026: these take its place, in this order.
SUCCESSORS = ("github-copilot/gpt-5-mini", "github-copilot/gpt-5.4-mini", "github-copilot/gpt-5.5")
MIN_OPENCODE = (1, 17, 0)  # older ones send no session header or keep sessions on disk
LOOK_SECONDS = 0.25  # the longest wait for opencode or a provider without a look at the client
SHORT_LOOK_SECONDS = 0.02  # between looks at what is about to happen, where nothing tells of it

# ------------------------------------------------------------------------------------------- limits
# Each says what it protects, or what it protects against.

# What one client may ask for.
MAX_CHOICES = 8  # each is a turn of its own
MAX_STOP_SEQUENCES = 64  # each is looked for in every delta
MAX_BODIES_BYTES = 512 << 20  # memory: bodies of all requests that are read, wait or are answered
MAX_HEAD_BYTES = 64 << 10  # memory: the head of a request, all its lines together
MAX_READ_AHEAD_BYTES = 64 << 10  # memory: what a client sends while its request is being answered
MAX_JSON_VALUES = 1_000_000  # memory: values in a body, and time to read them
BYTES_PER_JSON_VALUE = 64  # about, while a body is read: `{},` takes 25 times its size
MAX_DECODED_BYTES = 1 << 20  # memory: what is made at once of a compressed body
ZSTD_WINDOW_LOG = 23  # memory: 8 MiB, the largest that HTTP allows (RFC 9659)
MAX_DRAIN_BYTES = 64 << 20  # of a refused body that is read, so that the client reads the refusal
DRAIN_SECONDS = 5.0  # for reading a refused body

# Images that are fetched for a service that does not.
MAX_IMAGES = 32  # of a request: each has a thread
MAX_IMAGE_BYTES = 20 << 20  # memory: one image
MAX_REDIRECTS = 3  # of one image: servers that send the proxy around
IMAGE_SECONDS = 10.0  # for all images of a request

# What is remembered of answers for the requests that follow them.
MAX_THOUGHTS_BYTES = 64 << 20  # memory: all thoughts; an answer's are some kilobytes
MAX_THOUGHT_BYTES = 4 << 20  # memory: the thought of one call
THOUGHT_SECONDS = 3600.0  # a conversation that rests for longer goes on without

# Connections: threads and open files.
MAX_CONNECTIONS = 2000  # each has a thread
ACCEPT_PAUSE_SECONDS = 0.1  # after a connection for which no file may be opened
RESERVED_FILES = 200  # of the open files that are allowed, for the pipes of the processes
IDLE_SECONDS = 60.0  # a connection without a complete head of a request
BODY_SECONDS = 120.0  # a request whose body does not arrive
WRITE_SECONDS = 60.0  # a client that takes nothing of its answer
SEND_BUFFER_BYTES = 256 << 10  # memory: what a client has not taken of its answer yet
PING_SECONDS = 15.0  # middleboxes close a stream that is silent for long
MAX_LOG_LINES = 1000  # memory: lines of the log that nobody reads
FLUSH_SECONDS = 1.0  # at the end, for lines of the log that nobody reads

# Processes that run away, hang or grow.
MAX_LINE_BYTES = 16 << 20  # memory: a line of a process's output
MAX_EVENT_BYTES = 16 << 20  # memory: an event of a provider's stream
LINE_HEAD_BYTES = 4 << 10  # of a line that is too long: enough to tell whose it is
MAX_WORDS_CHARACTERS = 500  # of what a process said last, in an error
MAX_STDERR_BYTES = 4 << 10  # memory: the end of what a process says on stderr
MAX_ERROR_CHARACTERS = 64 << 10  # memory: the beginning of an answer that may be no stream
MAX_TURNS_PER_PROCESS = 32  # answers that are lost when a process dies
MIN_MEMORY_BYTES = 3 << 30  # a machine with less does not bear processes that collect no garbage
LARGE_HEAP_BYTES = 256 << 20  # memory: opencode's heap between two collections of garbage
WORN_GROWTH_BYTES = 400 << 20  # memory: a fresh process takes the place of one that grew by more
MAX_GROWTH_BYTES = 900 << 20  # memory: one that grew by more serves nothing more
MAX_ATTEMPTS = 3  # processes that may fail a request before it fails
START_SECONDS = 60.0  # a process that does not answer the proxy
ASK_SECONDS = 30.0  # a process that asks, and does not take the answer
PS_SECONDS = 5.0  # a `ps` that does not end
LAST_WORDS_SECONDS = 0.5  # for what a process that has ended says on stderr, and its code
STOP_SECONDS = 2.0  # a process that does not end: from SIGTERM to SIGKILL

# When things are done again.
WORN_SECONDS = 1800.0  # a process of this age is replaced
CATALOG_SECONDS = 6 * 3600.0  # the catalog is read again: providers change their models
KEEP_WARM_SECONDS = 300.0  # processes beyond --spares that could serve more end when idle so long
TEND_SECONDS = 5.0  # between looks at the user's files and the processes
MAX_RETRY_SECONDS = 60.0  # between starts of processes while they fail
MAX_WAITED_RETRY_SECONDS = 2.0  # between starts while they fail and requests wait for a process
FINISH_SECONDS = 3.0  # for the rest of an answer (its usage) after the finish_reason
CUT_SECONDS = 1.0  # for the rest of an answer (its usage) after a stop sequence
MAX_EVENTS_AHEAD = 256  # memory: of all choices of a request, while their client reads slowly
NEW_SECONDS = 60.0  # an empty private directory of this age was given up when it was made
RETRY_SECONDS = 0.5  # until the next start after one that failed; then twice as long
QUEUE_RETRY_SECONDS = 5  # told to clients that are refused for want of room

# ------------------------------------------------------------------------------------------- errors
# An APIError passes from anywhere to the handler, which writes it to the client.

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
MAX_ERROR_DEPTH = 8  # of objects and JSON texts around what an error says
MAX_PAGE_CHARACTERS = 300  # of a page that stands for a reason
MAX_RETRY_AFTER_SECONDS = 7 * 86400.0  # longer is no time, or no number of seconds
ANTHROPIC_OVERLOADED = 529  # no status of HTTP's; OpenAI says 503
# What an answer that is an error has, and what an answer has that is none.
ERROR_FIELDS = ("error", "errors")
ANSWER_FIELDS = frozenset(("choices", "usage", "output", "content"))
ANSWER_KINDS = ("response.", "message", "content_block", "ping", "chat.completion")
# Where an error says to a person what it is, best first.
MESSAGE_FIELDS = (
    "message",
    "detail",
    "msg",
    "error_message",
    "error_msg",
    "status_msg",
    "error_description",
    "error",
    "errors",
    "reason",
    "title",
    "description",
)
# Codes and types of errors that come in answers of status 200, by the status that they mean; an
# error's letters only. What is not here is 502.
ERROR_WORDS: dict[int, tuple[str, ...]] = {
    400: (
        "badrequest",
        "badrequesterror",
        "contentfilter",
        "contentpolicyviolation",
        "contextlengthexceeded",
        "contextwindowexceeded",
        "failedprecondition",
        "invalidargument",
        "invalidimage",
        "invalidparameter",
        "invalidprompt",
        "invalidrequest",
        "invalidrequesterror",
        "invalidvalue",
        "missingrequiredparameter",
        "modelmaxprompttokensexceeded",
        "stringabovemaxlength",
        "unsupportedparameter",
        "unsupportedvalue",
    ),
    401: ("authenticationerror", "invalidapikey", "unauthenticated", "unauthorized"),
    402: ("billingerror", "insufficientcredits", "paymentrequired"),
    403: ("forbidden", "permissiondenied", "permissionerror"),
    404: ("modelnotfound", "notfound", "notfounderror"),
    413: ("requesttoolarge",),
    429: (
        "insufficientquota",
        "quotaexceeded",
        "ratelimit",
        "ratelimited",
        "ratelimiterror",
        "ratelimitexceeded",
        "ratelimitreached",
        "requests",
        "resourceexhausted",
        "tokens",
        "toomanyrequests",
        "usagelimitreached",
        "usagenotincluded",
    ),
    503: (
        "engineoverloaded",
        "engineoverloadederror",
        "insufficientsystemresource",
        "modeloverloaded",
        "overloaded",
        "overloadederror",
        "serverisoverloaded",
        "serveroverloaded",
        "serviceunavailable",
        "serviceunavailableerror",
        "slowdown",
        "unavailable",
    ),
    504: ("deadlineexceeded", "gatewaytimeout", "timeout", "timeouterror"),
}
# Of opencode's words for an error: advice for those who run it by hand.
USELESS_WORDS = r"(?s)Internal error: |(For more information, pass `verbose|Was there a typo in).*"


class APIError(Exception):
    """A failure as the client is told of it; `type` follows from `status` where it is not given."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        usual_type = "invalid_request_error" if status < 500 else "server_error"
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type, self.headers = type or ERROR_TYPES.get(status, usual_type), dict(headers or {})

    def body(self) -> Json:
        """Return OpenAI's error object."""
        return {"error": {name: vars(self)[name] for name in ("message", "type", "param", "code")}}


class ClientDisconnected(Exception):
    """The client hung up: nobody is left to answer."""


class StartError(Exception):
    """The proxy cannot start; the text tells a person what to do."""


class ProcessFailed(Exception):
    """An opencode process ended, broke its protocol or was too slow; the text says which.

    `status` and `code` are what the client is told where no other process can take its place.
    """

    def __init__(self, text: str, status: int = 502, code: str = "opencode_failed") -> None:
        super().__init__(text)
        self.status = status
        self.code = code


def start_thread(target: Callable[..., None], *arguments: Any) -> None:
    """Run `target` on a thread of its own; raise APIError where no more threads are allowed."""
    try:
        threading.Thread(target=target, args=arguments, daemon=True).start()
    except RuntimeError as error:
        raise APIError(503, f"Too much goes on at once: {error}", code="too_busy") from None


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """Return the error for a request that is wrong in its field `param`."""
    return APIError(400, message, param=param, code=code)


def upstream_error(status: int, headers: Mapping[str, str], body: str) -> APIError:
    """Return what a provider's refusal means; `body` is an error object or a gateway's page.

    Where `status` is none of an error (a page with status 200), the body may say the status.
    """
    value: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(body, parse_int=float)  # an int takes quadratic time
    error = error_in(value)
    message = message_of(error)
    if not message:
        reason = http.client.responses.get(status, "error")
        page = text_of_page(body)[:MAX_PAGE_CHARACTERS]
        message = f"The model's provider answered {status} {reason}: {page}".rstrip(": ")
    if not 400 <= status <= 599:
        status = status_of(error)
    kept = {name.title(): text for name, text in headers.items() if name.startswith("retry-after")}
    return APIError(
        status,
        message,
        word_in(error, "type"),
        word_in(error, "param"),
        word_in(error, "code"),
        kept or retry_headers(status, error, message),
    )


def stream_error(value: Json) -> APIError:
    """Return what an error means that a provider reports in an answer which has status 200."""
    error = error_in(value)
    status = status_of(error)
    message = message_of(error) or "The model's provider reported an error without a reason"
    error_type = word_in(error, "type")
    code = word_in(error, "code")
    if code is None and status == 429:
        code = "rate_limit_exceeded"
    elif code is None and status != 400:
        code = error_type or word_in(error, "status")
    return APIError(
        status,
        message,
        error_type,
        word_in(error, "param"),
        code,
        retry_headers(status, error, message),
    )


def is_error(message: Json) -> bool:
    """Tell whether a provider's JSON, which should be a part of an answer, is an error."""
    kind = str(message.get("type") or message.get("object"))
    if kind in ("error", "response.failed") or message.get("error") or message.get("errors"):
        return True
    if (message.get("x_groq") or {}).get("error"):
        return True
    if (message.get("base_resp") or {}).get("status_code"):  # MiniMax's
        return True
    if kind.startswith(ANSWER_KINDS) or not ANSWER_FIELDS.isdisjoint(message):
        return False
    return any(isinstance(message.get(name), str) for name in ("message", "detail", "msg"))


def error_in(value: Any) -> Any:
    """Return the innermost object, list or text in a provider's JSON that tells of an error."""
    if isinstance(value, list) and value:  # Gemini's way
        value = value[0]
    if not isinstance(value, dict):
        return value
    for name in ("response", "x_groq"):  # where /responses and Groq have it
        holder = value.get(name)
        if isinstance(holder, dict) and holder.get("error"):
            return holder["error"]
    for name in (*ERROR_FIELDS, "base_resp"):
        error = value.get(name)
        if isinstance(error, str) and message_of({**value, name: None}):
            return value  # the error's name, beside what it means
        if error:
            return error
    if value.get("type") in ("error", "response.failed"):  # the event's, not the error's
        return {**value, "type": None}
    return value


def message_of(error: Any, depth: int = 0) -> str:
    """Return what an error says to a person, "" where it says nothing.

    Gateways wrap what the service behind them said: as an object, as JSON in a text, as a list of
    errors, or beside words of their own that say nothing.
    """
    if depth > MAX_ERROR_DEPTH:
        return ""
    if isinstance(error, str):
        return message_of_text(error, depth)
    if isinstance(error, list):
        messages = [message_of(item, depth + 1) for item in error]
        return "; ".join(dict.fromkeys(message for message in messages if message))
    if not isinstance(error, dict):
        return ""
    message = ""
    for name in MESSAGE_FIELDS:
        message = message or message_of(error.get(name), depth + 1)
    metadata = error.get("metadata")
    raw = message_of(metadata.get("raw"), depth + 1) if isinstance(metadata, dict) else ""
    if raw and raw not in message:  # OpenRouter's: what the service behind it said
        message = f"{message}: {raw}" if message else raw
    place = error.get("loc")
    if message and isinstance(place, list):  # FastAPI's
        message = f"{'.'.join(str(step) for step in place)}: {message}"
    return message


def message_of_text(text: str, depth: int) -> str:
    """Return what a text says that may be JSON or a page."""
    text = text.strip()
    if text.startswith(("{", "[")):
        with contextlib.suppress(ValueError, RecursionError):
            return message_of(json.loads(text, parse_int=float), depth + 1) or text
    if text.startswith("<"):
        return text_of_page(text)[:MAX_PAGE_CHARACTERS]
    return text


def text_of_page(page: str) -> str:
    """Return the text of a page, in linear time: what is never closed reaches to the end."""
    text = re.sub(r"(?s)<(script|style).*?(</\1>|\Z)|<[^<>]*(>|\Z)", " ", page)
    return " ".join(text.split())


def word_in(error: Any, name: str) -> str | None:
    """Return a field of an error where it is a text."""
    value = error.get(name) if isinstance(error, dict) else None
    return value if isinstance(value, str) and value else None


def letters_of(value: Any) -> str:
    """Return the letters of a provider's word, which are the same however it spells it."""
    return re.sub("[^a-z]+", "", str(value).lower())


def status_of(error: Any) -> int:
    """Return the HTTP status that an error in an answer means, 502 where it does not say."""
    if not isinstance(error, dict):
        return 502
    for name in ("code", "status", "status_code", "statusCode", "type"):
        value = error.get(name)
        if isinstance(value, bool):
            continue
        if re.fullmatch(r"[45][0-9][0-9](\.0)?", str(value)):
            number = int(str(value)[:3])
            return 503 if number == ANTHROPIC_OVERLOADED else number
        for status, words in ERROR_WORDS.items():
            if letters_of(value) in words:
                return status
    return 502


def retry_headers(status: int, error: Any, message: str) -> dict[str, str]:
    """Return the header that says when to try again, if the error in an answer says it."""
    if status not in (429, 503) or not isinstance(error, dict):
        return {}
    seconds = retry_seconds(error, message)
    if seconds is None or not 0 <= seconds <= MAX_RETRY_AFTER_SECONDS:
        return {}
    return {"Retry-After": str(math.ceil(seconds))}


def retry_seconds(error: Json, message: str) -> float | None:
    """Return the seconds after which to try again, from an error's fields or its words."""
    for name in ("retry_after", "retry_after_seconds", "retryAfter", "resets_in_seconds"):
        value = error.get(name)
        if isinstance(value, (int, float)):
            return float(value)
    details = error.get("details")  # Google's
    for detail in details if isinstance(details, list) else ():
        delay = detail.get("retryDelay") if isinstance(detail, dict) else None
        if isinstance(delay, str) and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?s", delay):
            return float(delay[:-1])
    told = re.search(
        r"(?i)(?:try again|retry) (?:in|after) ([0-9]{1,6}(?:\.[0-9]{1,6})?) ?(m?s)", message
    )
    if told is None:
        return None
    return float(told[1]) / (1000 if told[2].lower() == "ms" else 1)


def turn_error(error: Json) -> APIError:
    """Return the error for a turn that failed without a refusal by the provider."""
    text = str(error.get("message") or "opencode gave no reason")
    text = re.sub(USELESS_WORDS, "", text).rstrip()
    if error.get("network") is None:
        return APIError(502, f"The answer failed: {text}", code="upstream_failed")
    message = f"The connection to the model's provider failed: {text}"
    return APIError(502, message, code="upstream_unreachable")


# ------------------------------------------------------------------------------------------ request
# From the bytes of a body to a ChatRequest, or to an APIError 400 whose `param` names the field.
# Checked is what the wire formats rely on, and what would change an answer's meaning; fields that
# the program does not know pass. One function checks one kind of object, `Fields` knows its place.

MAX_DIGITS = 4300  # of a number: reading it takes quadratic time on some Pythons
MAX_TOKENS = (1 << 31) - 1  # what every provider's integer holds
TOO_DEEP = "The body is too deeply nested"

KIND_NAMES = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}

# The fields of a request whose kinds are known; null means absent, as at OpenAI.
FIELDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "messages": (list,),
    "n": (int,),
    "stream": (bool,),
    "stream_options": (dict,),
    "max_tokens": (int,),
    "max_completion_tokens": (int,),
    "stop": (str, list),
    "seed": (int,),
    "temperature": (float,),
    "top_p": (float,),
    "presence_penalty": (float,),
    "frequency_penalty": (float,),
    "logit_bias": (dict,),
    "logprobs": (bool,),
    "top_logprobs": (int,),
    "reasoning_effort": (str,),
    "verbosity": (str,),
    "response_format": (dict,),
    "tools": (list,),
    "tool_choice": (str, dict),
    "parallel_tool_calls": (bool,),
    "functions": (list,),
    "function_call": (str, dict),
    "modalities": (list,),
    "audio": (dict,),
    "prediction": (dict,),
    "web_search_options": (dict,),
    "metadata": (dict,),
    "store": (bool,),
    "service_tier": (str,),
    "prompt_cache_key": (str,),
    "safety_identifier": (str,),
    "user": (str,),
}
LIMITS = {
    "n": MAX_CHOICES,
    "max_tokens": MAX_TOKENS,
    "max_completion_tokens": MAX_TOKENS,
}

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
PART_TYPES = ("text", "refusal", "image_url", "input_audio", "file")
TOOL_TYPES = ("function", "custom")  # the first is meant where none is given
TOOL_MODES = ("none", "auto", "required")
RESPONSE_FORMATS = ("text", "json_object", "json_schema")
CALL_TEXT = {"function": "arguments", "custom": "input"}  # where a call of each type has its text
FILE_FIELDS = ("file_data", "file_id", "filename")
TOOL_FIELDS = ("name", "description", "parameters", "strict", "format")
LOW_EFFORT_TOKENS = 4096  # the largest budget to think that means a low effort
MEDIUM_EFFORT_TOKENS = 12288
IMAGE_URL = re.compile(r"(?i)(https?://|data:[^,]*,)")


class ChatRequest(NamedTuple):
    """A validated request body; `body` is what the client sent, less the fields that were null."""

    body: Json
    messages: list[Json]
    model: str | None
    stream: bool
    include_usage: bool
    choices: int
    stop: tuple[str, ...]
    max_tokens: int | None
    legacy_functions: bool  # the client calls tools functions, and so must the answer


def parse_chat_request(data: bytes) -> ChatRequest:
    """Return the request that `data`, a JSON body, holds; raise APIError 400 where it is wrong."""
    body = {}
    for name, value in parse_json_object(data).items():
        if value is not None:
            body[name] = value
    understand(body)
    check_body(body)

    legacy_functions = "functions" in body and "tools" not in body
    modernize(body)
    return ChatRequest(
        body=body,
        messages=body["messages"],
        model=body.get("model") or None,
        stream=body.get("stream", False),
        include_usage=body.get("stream_options", {}).get("include_usage") is True,
        choices=body.get("n", 1),
        stop=stop_sequences(body),
        max_tokens=body.get("max_completion_tokens", body.get("max_tokens")),
        legacy_functions=legacy_functions,
    )


def stop_sequences(body: Json) -> tuple[str, ...]:
    """Return what ends an answer; an empty sequence means nothing."""
    stop = body.get("stop", [])
    if isinstance(stop, str):
        stop = [stop]
    return tuple(text for text in stop if text)


def parse_json_object(data: bytes) -> Json:
    """Return the JSON object in `data`, UTF-8 (RFC 8259); raise APIError 400 for anything else."""
    try:
        body = read_json(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise invalid(f"The body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise invalid("The body must be a JSON object")
    return body


def read_number(text: str) -> float:
    """Return the int or float in `text`; refuse NaN, Infinity, and what cannot be written again."""
    digits = text.lstrip("-")
    if digits.isdigit() and len(digits) <= MAX_DIGITS:
        return int(text)
    if len(digits) > MAX_DIGITS or not math.isfinite(float(text)):
        raise ValueError(f"{text[:40]} is no number, or too long or large a one")
    return float(text)


read_json = json.JSONDecoder(
    parse_int=read_number,
    parse_float=read_number,
    parse_constant=read_number,
).decode


# For texts in which models and clients leave newlines and tabs as they are.
read_lenient_json = json.JSONDecoder(
    parse_int=read_number,
    parse_float=read_number,
    parse_constant=read_number,
    strict=False,
).decode


class Fields:
    """An object in a request: its fields, and the param by which an error names each of them.

    Every method raises APIError 400 where a field is not what it must be.
    """

    def __init__(self, value: Any, param: str = "") -> None:
        if param:
            require(value, param, dict)
        self.value: Json = value
        self.param = param  # "" for the body itself

    def param_of(self, name: str) -> str:
        return f"{self.param}.{name}" if self.param else name

    def has(self, name: str) -> bool:
        return self.value.get(name) is not None

    def need(self, name: str, *kinds: type) -> Any:
        """Return a field that must be there, and of one of `kinds`."""
        value = self.value.get(name)
        require(value, self.param_of(name), *kinds)
        return value

    def may(self, name: str, *kinds: type) -> None:
        """Check a field that may be absent, or null."""
        if self.has(name):
            self.need(name, *kinds)

    def word(self, name: str, words: Sequence[str], default: str | None = None) -> str:
        """Return a field that must be one of `words`, or `default` where it is absent or empty."""
        value = self.value.get(name) or default
        if value not in words:
            param = self.param_of(name)
            raise invalid(f"{param} must be one of {', '.join(words)}", param)
        return str(value)

    def inner(self, name: str) -> Fields:
        """Return the object in a field that must be there."""
        return Fields(self.value.get(name), self.param_of(name))

    def each(self, name: str) -> Iterator[Fields]:
        """Yield the objects in an array that may be absent."""
        if self.has(name):
            for item, param in numbered(self.value[name], self.param_of(name)):
                yield Fields(item, param)


def require(value: Any, param: str, *kinds: type) -> None:
    """Raise APIError 400 unless `value` is of one of `kinds`; an int is a float too."""
    kind = type(value)  # not isinstance: True would be an int
    if kind in kinds or (kind is int and float in kinds):
        return
    names = " or ".join(KIND_NAMES[kind] for kind in kinds)
    raise invalid(f"{param} must be {names}", param)


def numbered(value: Any, param: str) -> Iterator[tuple[Any, str]]:
    """Yield each item of an array with the param that names it; raise APIError 400 for no array."""
    require(value, param, list)
    for index, item in enumerate(value):
        yield item, f"{param}[{index}]"


def check_body(body: Json) -> None:
    """Raise APIError 400 unless the fields that the program knows are as OpenAI has them."""
    for name, kinds in FIELDS.items():
        if name in body:
            require(body[name], name, *kinds)
    for name, limit in LIMITS.items():
        if not 1 <= body.get(name, 1) <= limit:
            raise invalid(f"{name} must be from 1 to {limit}", name)
    if not body.get("messages"):
        raise invalid("messages is required, and must not be empty", "messages")

    fields = Fields(body)
    for message in fields.each("messages"):
        check_message(message)
    for tool in fields.each("tools"):
        if tool.need("type", str) in TOOL_TYPES:  # others are some provider's own
            check_tool(tool)
    for function in fields.each("functions"):
        check_function(function)
    check_tool_choice(fields)
    check_function_choice(fields)
    check_response_format(fields)
    check_stop(fields)


def check_message(message: Fields) -> None:
    role = message.word("role", ROLES)
    if role != "assistant" or message.has("content"):
        check_content(message)
    if role == "tool":
        message.need("tool_call_id", str)
    if role == "function":
        message.need("name", str)

    for call in message.each("tool_calls"):
        check_call(call)
    if message.has("function_call"):
        call = message.inner("function_call")
        call.need("name", str)
        call.need("arguments", str)


def check_content(message: Fields) -> None:
    content = message.need("content", str, list)
    if isinstance(content, list):
        for part in message.each("content"):
            check_part(part)


def check_part(part: Fields) -> None:
    """Check a part of a content; what it holds is in the field that its type names.

    Types that the program does not know may be a provider's own.
    """
    part_type = part.need("type", str)
    if part_type not in PART_TYPES:
        return
    if part_type in ("text", "refusal"):
        part.need(part_type, str)
        return
    inner = part.inner(part_type)
    if part_type == "image_url":
        check_image(inner)
    elif part_type == "input_audio":
        inner.need("data", str)
        inner.need("format", str)
    else:
        for name in FILE_FIELDS:
            inner.may(name, str)


def check_image(image: Fields) -> None:
    image.may("detail", str)
    if not IMAGE_URL.match(image.need("url", str)):
        param = image.param_of("url")
        raise invalid(f"{param} must be an http, https or data URL", param)


def check_call(call: Fields) -> None:
    call.need("id", str)
    call_type = call.word("type", TOOL_TYPES, default="function")
    inner = call.inner(call_type)
    inner.need("name", str)
    inner.need(CALL_TEXT[call_type], str)


def check_tool(tool: Fields) -> None:
    tool_type = tool.word("type", TOOL_TYPES, default="function")
    check_function(tool.inner(tool_type))


def check_function(function: Fields) -> None:
    function.need("name", str)
    function.may("parameters", dict)
    if function.has("format"):
        function.inner("format").may("type", str)


def check_tool_choice(fields: Fields) -> None:
    """Check `tool_choice`: a mode, a tool, or a list of tools that are allowed."""
    if not fields.has("tool_choice"):
        return
    if isinstance(fields.value["tool_choice"], str):
        fields.word("tool_choice", TOOL_MODES)
        return
    choice = fields.inner("tool_choice")
    choice_type = choice.word("type", (*TOOL_TYPES, "allowed_tools"), default="function")
    if choice_type != "allowed_tools":
        check_tool(choice)
        return
    allowed = choice.inner("allowed_tools")
    allowed.word("mode", ("auto", "required"))
    allowed.need("tools", list)
    for tool in allowed.each("tools"):
        check_tool(tool)


def check_function_choice(fields: Fields) -> None:
    """Check `function_call`, the deprecated `tool_choice`."""
    if not fields.has("function_call"):
        return
    if isinstance(fields.value["function_call"], str):
        fields.word("function_call", TOOL_MODES)
    else:
        check_function(fields.inner("function_call"))


def check_response_format(fields: Fields) -> None:
    if fields.has("response_format"):
        response_format = fields.inner("response_format")
        if response_format.word("type", RESPONSE_FORMATS) == "json_schema":
            response_format.need("json_schema", dict)


def check_stop(fields: Fields) -> None:
    stop = fields.value.get("stop")
    if not isinstance(stop, list):
        return
    for text, param in numbered(stop, "stop"):
        require(text, param, str)
    if len(stop) > MAX_STOP_SEQUENCES:
        raise invalid(f"stop may have at most {MAX_STOP_SEQUENCES} sequences", "stop")


def understand(body: Json) -> None:
    """Say in `body`, which is not checked yet, in a chat completion's words what is in others.

    Clients mix in the words of /responses: its types of parts, and flat tools.
    """
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            message["content"] = [understood_part(part) for part in content]
    tools = body.get("tools")
    if isinstance(tools, list):
        body["tools"] = [understood_tool(tool) for tool in tools]
    if "tool_choice" in body:
        body["tool_choice"] = understood_tool(body["tool_choice"])
    if isinstance(body.get("tool_choice"), str):  # in Google's and Anthropic's words
        choice = body["tool_choice"]
        body["tool_choice"] = {"validated": "auto", "any": "required"}.get(choice, choice)


def understood_part(part: Any) -> Any:
    """Return a content part in a chat completion's words."""
    if not isinstance(part, dict):
        return part
    part_type = part.get("type")
    if part_type in ("input_text", "output_text"):
        return {**part, "type": "text"}
    if part_type == "image_url" and isinstance(part.get("image_url"), str):
        return {**part, "image_url": {"url": part["image_url"]}}
    if part_type == "input_image" and isinstance(part.get("image_url"), str):
        return moved_inside(part, "image_url", {"image_url": "url", "detail": "detail"})
    if part_type == "input_file":
        return moved_inside(part, "file", {name: name for name in FILE_FIELDS})
    return part


def understood_tool(tool: Any) -> Any:
    """Return a tool, or a choice of one, with its fields in an inner object."""
    if not isinstance(tool, dict) or "name" not in tool:
        return tool
    tool_type = tool.get("type")
    if tool_type not in TOOL_TYPES or tool_type in tool:
        return tool
    return moved_inside(tool, tool_type, {name: name for name in TOOL_FIELDS})


def moved_inside(outer: Json, new_type: str, names: Mapping[str, str]) -> Json:
    """Return an object with some of its fields, under new names, in an inner one of its type."""
    inner = {}
    moved: Json = {"type": new_type}
    for name, value in outer.items():
        if name in names:
            inner[names[name]] = value
        elif name != "type":
            moved[name] = value
    moved[new_type] = inner
    return moved


def effort_of(body: Json) -> Any:
    """Return how hard the model shall think, in OpenAI's, OpenRouter's or Anthropic's words."""
    if body.get("reasoning_effort"):
        return body["reasoning_effort"]
    reasoning = body.get("reasoning")
    if isinstance(reasoning, dict):
        if reasoning.get("enabled") is False:
            return "none"
        if isinstance(reasoning.get("effort"), str):
            return reasoning["effort"]
        return effort_of_budget(reasoning.get("max_tokens"))
    thinking = body.get("thinking")
    if isinstance(thinking, dict):
        if thinking.get("type") == "disabled":
            return "none"
        return effort_of_budget(thinking.get("budget_tokens"))
    return None


def effort_of_budget(budget: Any) -> str | None:
    """Return the effort that a number of tokens to think means, None for no number."""
    if type(budget) is not int:
        return None
    if budget <= LOW_EFFORT_TOKENS:
        return "low"
    if budget <= MEDIUM_EFFORT_TOKENS:
        return "medium"
    return "high"


def modernize(body: Json) -> None:
    """Say the deprecated functions, function_call and role "function" in `body` as tools."""
    functions = body.pop("functions", None)
    choice = body.pop("function_call", None)
    if functions is not None and "tools" not in body:
        body["tools"] = []
        for function in functions:
            body["tools"].append({"type": "function", "function": function})
        if isinstance(choice, dict):
            choice = {"type": "function", "function": choice}
        if choice is not None:
            body["tool_choice"] = choice
    for index, message in enumerate(body["messages"]):
        modernize_message(message, index)


def modernize_message(message: Json, index: int) -> None:
    """Say a message's deprecated words in today's; a call's id is made of its place."""
    call = message.pop("function_call", None)
    if call is not None:
        message["tool_calls"] = [{"id": f"call_{index}", "type": "function", "function": call}]
    if message["role"] == "function":  # answers the call in the message before it
        del message["name"]
        message["role"] = "tool"
        message["tool_call_id"] = f"call_{index - 1}"


# ------------------------------------------------------------------------------------- wire formats
# What passes between Python and a provider, each format in both directions; no socket, process or
# clock. For other formats what a client says is first put in /responses' words; what a format has
# no place for is a 400, here or from the provider.

MAX_CLAUDE_TOKENS = 32000  # asked of /messages where the client sets no limit, as opencode does
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9Q"
    "DwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SYSTEM_ROLES = ("system", "developer")
# Fields of opencode's body that it sets for its own agent: they say nothing about the client's
# request. (The plugin leaves the conversation out before it asks.)
AGENT_FIELDS = (
    "max_completion_tokens",
    "max_output_tokens",
    "max_tokens",
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "reasoning_effort",
    "response_format",
    "stop",
    "stop_sequences",
    "stream_options",
    "temperature",
    "tool_choice",
    "tools",
    "top_k",
    "top_p",
    "user",
    "verbosity",
)
# Fields of a chat completion that the proxy or opencode sets itself.
PROXY_FIELDS = ("model", "stream", "n", "stream_options")
PASSED_TO_RESPONSES = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "temperature",
    "top_p",
    "user",
)
CALL_ITEMS = {"function": "function_call", "custom": "custom_tool_call"}  # in /responses
MAX_ARGUMENTS_DEPTH = 100  # of a call's arguments; what is deeper stays text
MAX_ESCAPE_CHARACTERS = 6  # of an escape in a JSON string
WORD_CHARACTERS = string.ascii_letters + string.digits + "+-."  # of a JSON number or literal
CLOSERS = {"{": "}", "[": "]"}
# A string is not matched as a whole: of a long one that would take a hundred times its size.
JSON_ESCAPE_QUOTE_OR_BRACKET = re.compile(r'\\.|["\[\]{}]', re.DOTALL)
NO_RESULT = "No result"  # of a call, where a client has cut it off its history
ORPHAN_RESULT = "Result of a tool:"  # before one whose call a client has cut off its history
JSON_ONLY = "Answer with a single JSON object and nothing else: no Markdown, no explanation."
# What /messages calls the choices of tools.
CLAUDE_CHOICES = {
    "none": "none",
    "auto": "auto",
    "required": "any",
    "function": "tool",
}
CALL_DELTA = {"function_call_arguments": "function", "custom_tool_call_input": "custom"}
# The texts of /responses, by the names of their events: where a chat completion has them.
TEXT_FIELDS = {
    "output_text": "content",
    "refusal": "refusal",
    "reasoning_text": "reasoning_content",
    "reasoning_summary_text": "reasoning_content",
}
GROUP_OF_PART = {  # the names of the events of each type of part
    "output_text": "output_text",
    "refusal": "refusal",
    "reasoning_text": "reasoning_text",
    "summary_text": "reasoning_summary_text",
}
CALL_OF_ITEM = {"function_call": "function", "custom_tool_call": "custom"}
ITEMS_OF_ANSWERS = ("message", "reasoning", *CALL_OF_ITEM)
# Letters of what providers and opencode call their reasons to end an answer, an error first: it
# may also name what failed. What has none of them is "stop".
FINISH_WORDS = {
    "error": (
        "abort",
        "cancel",
        "error",
        "exception",
        "fail",
        "insufficient",
        "interrupt",
        "malformed",
        "missingthought",
        "overload",
        "timeout",
        "toomany",
        "unavailable",
        "unexpected",
    ),
    "content_filter": (
        "blocked",
        "blocklist",
        "filter",
        "guardrail",
        "moderation",
        "policy",
        "prohibited",
        "recitation",
        "refus",
        "safety",
        "sensitive",
        "spii",
    ),
    "length": (
        "compaction",
        "contextwindow",
        "incomplete",
        "length",
        "limit",
        "maxoutput",
        "maxtoken",
        "pause",
        "truncat",
    ),
    "tool_calls": ("function", "tool"),
}
NO_REASONS = (
    "",
    "finishreasonunspecified",
    "inprogress",
    "none",
    "null",
    "queued",
    "undefined",
    "unknown",
    "unspecified",
)
KEEP_ALIVES = ("", "null", "[]", "{}", "ping", "pong", "keepalive", "keep-alive", "heartbeat")
# What providers call reasoning in a chat completion: DeepSeek, Copilot, OpenRouter and Groq.
REASONING_FIELDS = ("reasoning_content", "reasoning_text", "reasoning")
# Of a message that has calls: what its provider may want to see again.
THOUGHT_FIELDS = ("reasoning_content", "reasoning_text", "reasoning_opaque", "reasoning_details")
SILENT_FIELDS = frozenset(
    ("annotations", "reasoning_content", "reasoning_details", "reasoning_opaque")
)
BAD_DATA = "The provider sent bad data"
TOO_LARGE = "The provider sent too large an event"
MAX_EXCERPT_CHARACTERS = 200  # of bad data, which may be a gateway's words


class Event(NamedTuple):
    """A choice's delta as OpenAI would send it; the last has a finish_reason, perhaps usage.

    `frame` has fields of the provider's that belong beside the choices, where they are new.
    """

    delta: Json
    logprobs: Any = None
    finish_reason: str | None = None
    usage: Json | None = None
    frame: Json | None = None


class SSEReader:
    """Finds the data of the events in a text/event-stream that comes in pieces of any size.

    Takes linear time: each piece is looked at once, and put together with others once.
    """

    def __init__(self) -> None:
        self._newlines = io.IncrementalNewlineDecoder(None, translate=True)
        self._is_begun = False
        self._line: list[str] = []  # the pieces of the line that has not ended
        self._lines: list[str] = []  # the lines of the event that has not ended
        self._size = 0  # of these two

    def feed(self, text: str) -> list[str]:
        """Return the data of the events that `text` completes; raise APIError for a huge one."""
        if text and not self._is_begun:
            self._is_begun = True
            text = text.removeprefix("\ufeff")
        return self._split(self._newlines.decode(text))

    def end(self) -> list[str]:
        """Return what the last event holds: some providers forget its blank line."""
        return self._split(self._newlines.decode("", final=True) + "\n\n")

    @property
    def is_between_events(self) -> bool:
        """Whether nothing has come of the event that has not ended."""
        return self._size == 0

    def _split(self, text: str) -> list[str]:
        events = []
        *ended, rest = text.split("\n")
        for piece in ended:
            self._line.append(piece)
            line = "".join(self._line)
            self._line.clear()
            if line:
                self._lines.append(line)
                self._grow(len(piece))
                continue
            events += self._data()
            self._lines.clear()
            self._size = 0
        if rest:
            self._line.append(rest)
            self._grow(len(rest))
        return events

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > MAX_EVENT_BYTES:
            raise APIError(502, TOO_LARGE, code="incomplete_answer")

    def _data(self) -> list[str]:
        """Return the data of the event in `_lines`, if any."""
        data = [line[5:].removeprefix(" ") for line in self._lines if line.startswith("data:")]
        if any(data):
            return ["\n".join(data)]
        if self._lines and self._lines[0].startswith(("{", "<")):
            return ["\n".join(self._lines)]  # an error that a gateway put into the stream as it is
        return []


class ToolCall:
    """A call of a tool, as far as it has come."""

    def __init__(self, place: Any, call_type: str) -> None:
        self.place = place  # what the provider says to number it
        self.type = call_type
        self.their_id = ""  # the provider's, which may not be its alone
        self.id = ""  # the client's
        self.name = ""
        self.index: int | None = None  # the client's, once it is sent
        self.pieces: list[str] = []  # of its text
        self.fields: Json = {}  # others, until it is sent

    @property
    def is_complete(self) -> bool:
        """Whether its text is all that it can be: JSON, where it is a function's arguments."""
        if self.type != "function" or not self.pieces:
            return True
        # This is asked at every piece of some providers' calls: most are told without reading all.
        closer = CLOSERS.get(self.pieces[0].lstrip()[:1])
        end = self.pieces[-1].rstrip()
        if closer and end and not end.endswith(closer):
            return False
        text = "".join(self.pieces)
        if not text.strip():
            return True
        try:
            json.loads(text, parse_int=float)  # an int takes quadratic time
        except (ValueError, RecursionError):
            return False
        return True


class ToolCalls:
    """Makes OpenAI's calls of the pieces that a provider sends.

    In OpenAI's own streams a call's first piece has its id, its name and the index that all its
    pieces have. Others number every call 0 or not at all, give no ids or a new one with each
    piece, or name a call late. A client hears of a call when its name is known, and its index and
    id are ours where the provider's do not tell it from others.
    """

    def __init__(self) -> None:
        self._by_place: dict[Any, ToolCall] = {}  # the last one at each
        self._by_id: dict[str, ToolCall] = {}
        self._calls: list[ToolCall] = []  # in the order in which they came
        self._sent = 0

    def __len__(self) -> int:
        return self._sent

    @property
    def are_complete(self) -> bool:
        """Whether none was cut off in the middle."""
        return all(call.is_complete for call in self._calls)

    def add(self, place: Any, piece: Json) -> list[Json]:
        """Return the entries of a delta's `tool_calls` that a piece of a call means.

        Arguments:
            place: what the provider numbers the call; None for one that is whole.
        """
        call_type = "custom" if piece.get("custom") else "function"
        text_name = CALL_TEXT[call_type]
        inner = drop_empty(piece.get(call_type) or {})
        call_id = str(piece.get("id") or "")
        name = text_or_nothing(inner.pop("name", None))
        text = inner.pop(text_name, None)
        if isinstance(text, (dict, list)):  # Ollama's way
            text = compact_json(text)
        text = text_or_nothing(text)

        call = self._find(place, call_id, name)
        if call is None:
            call = ToolCall(place, call_type)
            self._calls.append(call)
            if place is not None:
                self._by_place[place] = call
        call.their_id = call.their_id or call_id
        if call_id and call_id not in self._by_id:
            self._by_id[call_id] = call
            call.id = call.id or call_id
        if text:
            call.pieces.append(text)

        fields = drop_empty({**piece, "index": None, "id": None, "type": None, call_type: inner})
        if call.index is not None:
            return self._more(call, text, fields)
        call.name = name
        call.fields.update(fields)
        return [self._begin(call)] if name else []

    @property
    def sent(self) -> list[ToolCall]:
        """The calls that the client knows."""
        return [call for call in self._calls if call.index is not None]

    def place_of(self, call_id: str, default: Any) -> Any:
        """Return where the call with an id is, `default` where it is not known."""
        call = self._by_id.get(call_id)
        return call.place if call else default

    def text_at(self, place: Any) -> str:
        """Return what has come of the text of the last call there."""
        call = self._by_place.get(place)
        return "".join(call.pieces) if call else ""

    def finish_at(self, place: Any) -> list[Json]:
        """Return what the client has still to hear of a call that is complete."""
        call = self._by_place.get(place)
        return self._finish(call) if call else []

    def finish(self) -> list[Json]:
        """Return what the client has still to hear of, now that all calls are complete."""
        return [entry for call in self._calls for entry in self._finish(call)]

    def _finish(self, call: ToolCall) -> list[Json]:
        if call.index is None:  # it never got a name
            return [self._begin(call)] if call.pieces else []
        if call.pieces or call.type != "function":
            return []
        call.pieces.append("{}")
        return self._more(call, "{}", {})

    def _find(self, place: Any, call_id: str, name: str) -> ToolCall | None:
        """Return the call that a piece belongs to, None where it begins another."""
        if place is None:
            return None
        here = self._by_place.get(place)
        if here and call_id and here.their_id == call_id:
            return here  # some repeat the id with every piece

        # An id that is known tells more than the place; with a name at another place it is one
        # that the provider gave to two calls.
        call = self._by_id.get(call_id)
        if call and (call.place == place or not name):
            return call
        if here is None or self._is_another(here, call_id, name):
            return None
        return here

    @staticmethod
    def _is_another(call: ToolCall, call_id: str, name: str) -> bool:
        """Tell whether a piece where `call` is, with an unknown id or none, begins another."""
        has_other_id = bool(call_id and call.their_id)
        is_named_again = bool(name and call.name)
        if has_other_id and is_named_again:
            return True  # Ollama numbers every call 0, and gives each an id
        if has_other_id:
            # Poolside gives the later pieces of a call another id: it goes on until it is complete.
            return bool(call.pieces) and call.is_complete
        if not is_named_again:
            return False  # OpenAI's own way: only the first piece has the id and the name
        if call.pieces:
            # Gemini numbers every call 0, without ids. MiniMax at NVIDIA repeats the name with each
            # piece of a call: it goes on until it is complete.
            return name != call.name or call.is_complete
        return name != call.name and not call.their_id  # Gemini's, of a call without arguments

    def _begin(self, call: ToolCall) -> Json:
        """Return the first that a client hears of a call."""
        call.index = self._sent
        self._sent += 1
        call.id = call.id or f"call_{uuid.uuid4().hex}"
        inner = {"name": call.name, CALL_TEXT[call.type]: "".join(call.pieces)}
        inner.update(call.fields.pop(call.type, {}))
        return {
            "index": call.index,
            "id": call.id,
            "type": call.type,
            call.type: inner,
            **call.fields,
        }

    def _more(self, call: ToolCall, text: str, fields: Json) -> list[Json]:
        """Return what a client hears of a call that it knows."""
        inner = fields.pop(call.type, {})
        if text:
            inner = {CALL_TEXT[call.type]: text, **inner}
        if inner:
            fields = {call.type: inner, **fields}
        return [{"index": call.index, **fields}] if fields else []


class TextParts:
    """Puts the parts of a text into one, which is all that a chat completion has room for.

    A blank line stands between two parts. What points into a part by characters is moved to where
    the part begins.
    """

    def __init__(self) -> None:
        self._part: Any = None  # which one came last
        self._size = 0
        self.start = 0  # where it begins

    def add(self, part: Any, text: str) -> str:
        """Return `text`, a piece of a part, as the whole text goes on with it."""
        if not text:
            return ""
        if part != self._part or not self._size:
            if self._size:
                text = f"\n\n{text}"
                self.start = self._size + 2
            self._part = part
        self._size += len(text)
        return text

    @property
    def end(self) -> int:
        """Where the last part ends, so far."""
        return self._size


def text_or_nothing(value: Any) -> str:
    """Return a provider's text, "" for none; raise TypeError for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} instead of a text")
    return value


def require_objects(values: Any) -> None:
    """Raise TypeError unless `values` is an array of objects."""
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise TypeError("no array of objects")


def finish_reason_of(reason: Any) -> str | None:
    """Return what OpenAI calls a provider's reason to end, None for none.

    Raises:
        APIError: where the reason is that the provider failed.
    """
    word = letters_of(reason or "")
    if word in NO_REASONS:
        return None
    finish_reason = "stop"
    for known, parts in FINISH_WORDS.items():
        if any(part in word for part in parts):
            finish_reason = known
            break
    if finish_reason == "error":
        status = status_of({"code": reason})
        message = f"The provider ended its answer with an error: {reason}"
        raise APIError(status, message, code="incomplete_answer")
    return finish_reason


def token_usage(prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> Json:
    """Return OpenAI's usage; cached and reasoning tokens are counted among the others."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def count_in(counts: Json, *names: str) -> int:
    """Return the number of tokens that the first of `names` has which is there, 0 without any."""
    for name in names:
        if isinstance(counts.get(name), (int, float)):
            return int(counts[name])
    return 0


def url_citation(url: str, title: str, start: int, end: int) -> Json:
    """Return an annotation of the text from `start` to `end`."""
    citation = {"start_index": start, "end_index": end, "title": title, "url": url}
    return {"type": "url_citation", "url_citation": citation}


def take_reasoning(said: Json) -> str:
    """Take the reasoning out of a delta or a message; some providers send it under two names."""
    reasoning = ""
    for name in REASONING_FIELDS:
        other = text_or_nothing(said.pop(name, None))
        reasoning = reasoning or other
    return reasoning or details_text(said.get("reasoning_details"))


def texts_in(content: list[Any]) -> str:
    """Return the text of a content that comes in parts."""
    texts = []
    for part in content:
        if part["type"] == "text":
            texts.append(text_or_nothing(part["text"]))
    return "".join(texts)


def reasoning_in(content: list[Any]) -> str:
    """Return the reasoning in a content that comes in parts, a blank line between two of them."""
    texts = []
    for part in content:
        text = part.get("thinking") if part["type"] == "thinking" else None
        if isinstance(text, list):
            text = texts_in(text)
        if text:
            texts.append(text_or_nothing(text))
    return "\n\n".join(texts)


def details_text(details: Any) -> str:
    """Return what OpenRouter's `reasoning_details` say that a person can read."""
    texts = []
    for detail in details or ():
        texts.append(text_or_nothing(detail.get("text") or detail.get("summary")))
    return "".join(texts)


def part_of(message: Json) -> tuple[Any, str, Any]:
    """Return which part of the output an event of /responses tells of."""
    index = message.get("output_index")
    if message.get("summary_index") is not None:
        return index, "summary", message["summary_index"]
    return index, "content", message.get("content_index") or 0


def claude_annotation(citation: Json, start: int, end: int) -> Json:
    """Return what a text of Claude's cites: a page, or a document of the client's own."""
    url = citation.get("url") or citation.get("source")
    title = citation.get("title") or citation.get("document_title")
    if url:
        return url_citation(str(url), str(title or ""), start, end)
    quoted = {"start_index": start, "end_index": end, "filename": title}
    quoted["quote"] = citation.get("cited_text")
    return {"type": "file_citation", "file_citation": drop_empty(quoted)}


def annotation_of(theirs: Any, start: int = 0) -> Any:
    """Return an annotation, which /responses writes flat, as chat completions have it.

    Arguments:
        start: where in the whole text the part begins that the annotation points into.
    """
    if not isinstance(theirs, dict):
        return theirs
    kind = str(theirs.get("type") or "url_citation")
    if isinstance(theirs.get(kind), dict):
        return theirs
    fields = {name: value for name, value in theirs.items() if name != "type"}
    for name in ("start_index", "end_index", "index"):
        if isinstance(fields.get(name), int):
            fields[name] += start
    return {"type": kind, kind: fields}


def json_bytes(value: Any) -> bytes:
    """Return `value` as JSON of few bytes; a lone surrogate, no UTF-8, becomes U+FFFD."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:
        units = text.encode("utf-16-le", "surrogatepass")
        return units.decode("utf-16-le", "replace").encode()


def compact_json(value: Any) -> str:
    return json_bytes(value).decode()


def copy_json(value: Any) -> Any:
    """Return a copy of a JSON value that shares nothing with it that could be changed."""
    if isinstance(value, dict):
        fields = {}
        for name, item in value.items():
            fields[name] = copy_json(item)
        return fields
    if isinstance(value, list):
        items = []
        for item in value:
            items.append(copy_json(item))
        return items
    return value


def objects_in(value: Any) -> Iterator[Json]:
    """Yield every object in a JSON value, at any depth."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def has_type(value: Any, *types: str) -> bool:
    """Tell whether an object of one of these types is in a JSON value."""
    return any(each.get("type") in types for each in objects_in(value))


def drop_empty(fields: Json) -> Json:
    return {name: value for name, value in fields.items() if value not in (None, "", [], {})}


def parts_of(message: Json) -> list[Json]:
    """Return what a message says as a list of content parts, its refusal among them."""
    content = message.get("content")
    parts: list[Json] = []
    if isinstance(content, str) and content:
        parts.append({"type": "text", "text": content})
    elif isinstance(content, list):
        parts.extend(content)
    refusal = message.get("refusal")
    if isinstance(refusal, str) and refusal:
        parts.append({"type": "refusal", "refusal": refusal})
    return parts


def text_of(content: Any) -> str:
    """Return the text of a content, be it a string or a list of parts."""
    texts = []
    for part in parts_of({"content": content}):
        if part["type"] in ("text", "refusal"):
            texts.append(part[part["type"]])
    return "".join(texts)


def flatten(outer: Json) -> Json:
    """Return a tool, choice or format as /responses has it: the inner object's fields on top."""
    outer_type = outer.get("type") or "function"
    inner = outer.get(outer_type)
    if not isinstance(inner, dict):
        return outer  # it is flat, or some provider's own

    flat: Json = {"type": outer_type}
    for name, value in inner.items():
        if value is not None:
            flat[name] = value
    if isinstance(outer.get("cache_control"), dict):
        flat["cache_control"] = outer["cache_control"]  # Anthropic's
    return flat


def flatten_tool(tool: Json) -> Json:
    """Return a tool as /responses has it; the format of a custom one may hold a grammar."""
    flat = flatten(tool)
    if isinstance(flat.get("format"), dict):
        flat = {**flat, "format": flatten(flat["format"])}
    return flat


def flat_tools(request: ChatRequest) -> list[Json]:
    return [flatten_tool(tool) for tool in request.body.get("tools", [])]


def flat_tool_choice(request: ChatRequest) -> Any:
    """Return the choice of tools as /responses has it: a mode, a tool, or those allowed."""
    choice = request.body.get("tool_choice", "auto")
    if isinstance(choice, str):
        return choice
    flat = flatten(choice)
    if flat["type"] == "allowed_tools":
        flat["tools"] = [flatten_tool(tool) for tool in flat["tools"]]
    return flat


def convert_messages(request: ChatRequest) -> Iterator[tuple[str, list[Json], str]]:
    """Yield each message's role, what it says as parts and items of /responses, and its param."""
    call_types: dict[str, str] = {}  # by the calls' ids
    for message, param in numbered(request.messages, "messages"):
        said = convert_parts(message, param)
        for call in message.get("tool_calls") or ():
            call_type = call.get("type") or "function"
            call_types[call["id"]] = call_type
            said.append(convert_call(call, call_type))
        if message["role"] == "tool":
            call_type = call_types.get(message["tool_call_id"], "function")
            said = [convert_result(message, call_type, said)]
        yield message["role"], said, param


def convert_parts(message: Json, param: str) -> list[Json]:
    """Return a message's content parts in /responses' words, without texts that say nothing."""
    is_assistant = message["role"] == "assistant"
    text_type = "output_text" if is_assistant else "input_text"
    converted: list[Json] = []
    for part in parts_of(message):
        part_type = part["type"]
        if part_type not in PART_TYPES or part_type == "input_audio":
            raise invalid(f"This model takes no content part {part_type[:40]}", param)
        inner = part[part_type]
        mark = drop_empty({"cache_control": part.get("cache_control")})
        if part_type == "image_url":
            image = {**inner, "type": "input_image", "image_url": inner["url"], "url": None}
            converted.append(drop_empty({**image, **mark}))
        elif part_type == "file":
            converted.append(drop_empty({**inner, "type": "input_file", **mark}))
        elif part_type == "refusal" and is_assistant:
            converted.append({"type": "refusal", "refusal": inner, **mark})
        elif inner.strip():
            converted.append({"type": text_type, "text": inner, **mark})
    if converted and message.get("cache_control"):
        converted[-1]["cache_control"] = message["cache_control"]
    return converted


def convert_call(call: Json, call_type: str) -> Json:
    """Return a call of a tool as an item of /responses."""
    text_name = CALL_TEXT[call_type]
    inner = call[call_type]
    return {
        "type": CALL_ITEMS[call_type],
        "call_id": call["id"],
        "name": inner["name"],
        text_name: inner[text_name],
    }


def convert_result(message: Json, call_type: str, parts: list[Json]) -> Json:
    """Return what a tool has answered as an item of /responses."""
    output = message["content"]
    if isinstance(output, list):
        output = parts
    result = {
        "type": CALL_ITEMS[call_type] + "_output",
        "call_id": message["tool_call_id"],
        "output": output,
    }
    if message.get("cache_control"):
        result["cache_control"] = message["cache_control"]
    return result


class Target(NamedTuple):
    """Where a body goes: the wire format, the model, opencode's name for the provider, the host."""

    wire_format: type[WireFormat]
    model: Model
    provider: str
    host: str


class WireFormat(abc.ABC):
    """One choice's exchange with a provider in an HTTP dialect, in both directions.

    An encoder makes what the format itself wants: a result for each call, in /messages turns that
    alternate, texts and stop sequences that say something. What services insist on beyond that is a
    quirk. There is one exception, `takes_reasoning_back`: only the encoder can tell what it puts
    back from what the client says. Only the thread of the request uses it.
    """

    ending = ""  # of the URL's path

    def __init__(
        self, request: ChatRequest, target: Target, thoughts: Thoughts | None = None
    ) -> None:
        self.request = request
        self.target = target
        self._thoughts = thoughts or Thoughts()
        self.finish_reason: str | None = None
        self.usage: Json | None = None
        self._calls = ToolCalls()
        self._content_text = TextParts()
        self._reasoning_text = TextParts()
        self._before_call: list[Json] = []  # thoughts, for the call that follows
        self._open: set[Any] = set()  # parts of the answer that have begun and not ended
        self._has_answered = False  # more than reasoning and sources has come
        self._goes_on = False  # behind a finish_reason, which some gateways put into every chunk
        self._frame: Json = {}  # what the client's chunks have in common, in the provider's words
        self._is_frame_new = False

    def body(self, theirs: Json) -> bytes:
        """Return the JSON to send in place of `theirs`; raise APIError 400 where that cannot be."""
        body = self._encode(theirs)
        self._restore_thoughts(body)
        return finished_body(body, self.target)

    @abc.abstractmethod
    def _restore_thoughts(self, body: Json) -> None:
        """Put what is remembered of calls where this format wants it."""

    def _thought_of(self, call_id: Any) -> Json:
        return self._thoughts.recall(self.target.model.name, str(call_id))

    @abc.abstractmethod
    def _encode(self, theirs: Json) -> Json:
        """Return the client's request in this format, with what opencode says of the model."""

    @abc.abstractmethod
    def _decode(self, message: Json) -> Iterator[Event]:
        """Yield what a message of the provider's means."""

    def events(self, data: str) -> Iterator[Event]:
        """Yield what one SSE datum, or a whole answer, means.

        What comes behind a finish_reason shows that the answer goes on: it was not the last.

        Raises:
            APIError: where it is a failure or rubbish.
        """
        is_late = self.finish_reason is not None
        try:
            for event in self._events(data.strip()):
                if not event.delta.keys() <= SILENT_FIELDS:
                    self._has_answered = True
                    self._goes_on = is_late
                if self._is_frame_new:
                    event = event._replace(frame=self._take_frame())
                yield event
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise APIError(502, BAD_DATA, code="incomplete_answer") from error

    def end(self, is_proven: bool = False) -> Iterator[Event]:
        """Yield what remains, the finish last; raise APIError where the answer is not complete.

        Some providers give no reason to finish.

        Arguments:
            is_proven: the provider said in another way that this is the end.
        """
        if self.finish_reason is None:
            if not (is_proven and self._has_answered and self._calls.are_complete):
                text = "The provider did not finish its answer"
                raise APIError(502, text, code="incomplete_answer")
            self.finish_reason = "stop"
        if self.finish_reason == "stop" and self._calls:
            self.finish_reason = "tool_calls"
        if self.finish_reason == "tool_calls":
            yield from self._call_events(self._calls.finish())
        yield Event({}, None, self.finish_reason, self.usage, self._take_frame())

    def _store_before_call(self, call_id: Any) -> None:
        """Store the thoughts that stand before a call, each with the first call behind it."""
        if self._before_call and isinstance(call_id, str):
            thought = {"before": self._before_call}
            self._thoughts.store(self.target.model.name, call_id, thought)
            self._before_call = []

    @property
    def is_finished(self) -> bool:
        """Whether only the rest of the answer, its usage, is still to come."""
        return self.finish_reason is not None and not self._goes_on

    @property
    def is_between_parts(self) -> bool:
        """Whether all parts of the answer that have begun have ended."""
        return not self._open

    def _events(self, data: str) -> Iterator[Event]:
        if data.strip('"').lower() in KEEP_ALIVES or data.startswith(":"):
            return
        if data.strip("[]").upper() == "DONE":
            yield from self.end(is_proven=True)
            return
        try:
            message = read_json(data)
        except ValueError:
            excerpt = message_of(data)[:MAX_EXCERPT_CHARACTERS]
            raise APIError(502, f"{BAD_DATA}: {excerpt}", code="incomplete_answer") from None
        if isinstance(message, list):  # Gemini's way
            message = message[0]
        if is_error(message):
            raise stream_error(message)
        yield from self._decode(message)

    def _finish(self, reason: Any) -> None:
        if reason:
            self.finish_reason = finish_reason_of(reason) or self.finish_reason

    def _note_frame(self, name: str, value: Any) -> None:
        """Note a field that belongs into the frame of all that the client gets."""
        if isinstance(value, str) and value and self._frame.get(name) != value:
            self._frame[name] = value
            self._is_frame_new = True

    def _take_frame(self) -> Json | None:
        """Return what the client has not heard of the frame."""
        if not self._is_frame_new:
            return None
        self._is_frame_new = False
        return dict(self._frame)

    def _content(self, part: Any, text: str, logprobs: Any = None) -> Event:
        return Event({"content": self._content_text.add(part, text)}, logprobs)

    def _reasoning(self, part: Any, text: str) -> Event:
        return Event({"reasoning_content": self._reasoning_text.add(part, text)})

    def _call(self, place: Any, piece: Json) -> Iterator[Event]:
        return self._call_events(self._calls.add(place, piece))

    @staticmethod
    def _call_events(entries: list[Json]) -> Iterator[Event]:
        for entry in entries:
            yield Event({"tool_calls": [entry]})


# Kimi numbers the calls of every conversation anew: "functions.f:0" (2025).
COUNTED_ID = re.compile(r".*:[0-9]+|.{0,8}")


def thought_key(call_id: str, name: str, text: str) -> str:
    """Return by what a thought of a call is remembered: its id, where that is a random one.

    With an id that other conversations may have, its name and arguments must be the same, too, or
    one would get the thoughts of another. Clients write arguments anew, with other blanks, another
    order, or 1 for 1.0; some fill in defaults, which is why a random id is enough.
    """
    if not COUNTED_ID.fullmatch(call_id):
        return call_id
    with contextlib.suppress(ValueError, RecursionError):
        text = json.dumps(json.loads(text or "{}", parse_int=float), sort_keys=True)
    return f"{call_id} {hashed(f'{name} {text}', 24)}"


class ChatCompletions(WireFormat):
    """/chat/completions: the client's own words, and the provider's."""

    ending = "/chat/completions"

    def __init__(
        self, request: ChatRequest, target: Target, thoughts: Thoughts | None = None
    ) -> None:
        super().__init__(request, target, thoughts)
        self._sources_sent: set[str] = set()
        self._message_thoughts = Message()  # what came along with calls, in the provider's words
        self._call_thoughts: dict[str, Json] = {}  # what came with single ones, by their ids

    def _encode(self, theirs: Json) -> Json:
        body = without_agent_fields(theirs)
        for name, value in self.request.body.items():
            if name not in PROXY_FIELDS:
                body[name] = value
        stream_options = self.request.body.get("stream_options", {})
        body["stream_options"] = {**stream_options, "include_usage": True}
        return body

    def _restore_thoughts(self, body: Json) -> None:
        """Put back fields of messages that have calls, and of the calls, where they are missing."""
        body["messages"] = [self._with_thoughts(message) for message in body["messages"]]

    def _with_thoughts(self, message: Json) -> Json:
        calls = message.get("tool_calls")
        if not calls:
            return message

        message_fields: Json = {}
        restored_calls = []
        for call in calls:
            call_type = call.get("type") or "function"
            inner = call[call_type]
            key = thought_key(call["id"], inner["name"], inner[CALL_TEXT[call_type]])
            thought = self._thought_of(key)
            restored_calls.append({**thought.get("call", {}), **call})
            message_fields.update(thought.get("message", {}))
        if not takes_reasoning_back(self.target):
            message_fields.pop("reasoning_content", None)
        return {**message_fields, **message, "tool_calls": restored_calls}

    def _decode(self, message: Json) -> Iterator[Event]:
        for name in ("service_tier", "system_fingerprint"):
            self._note_frame(name, message.get(name))
        self._count(message.get("usage") or (message.get("x_groq") or {}).get("usage"))

        is_whole = False
        for choice in message.get("choices") or ():  # one, or its text and its calls apart
            if choice.get("error"):
                raise stream_error(choice)
            is_streamed = choice.get("delta") is not None
            said = choice["delta"] if is_streamed else choice.get("message")
            is_whole = is_whole or bool(said and not is_streamed)
            yield from self._said(said or {}, choice.get("logprobs"), is_streamed)
            self._count(choice.get("usage"))  # Moonshot's
            self._finish(choice.get("finish_reason"))
        if "citations" in message or "search_results" in message:
            yield from self._sources(message)
        if is_whole:
            yield from self.end(is_proven=True)

    def _said(self, theirs: Json, logprobs: Any, is_streamed: bool) -> Iterator[Event]:
        """Yield a delta or a message in OpenAI's words."""
        said = drop_empty({**theirs, "role": None})
        is_plain = said.keys() <= {"content"} and isinstance(said.get("content", ""), str)
        if not is_plain:
            said = self._translated(said, is_streamed)
        if said or logprobs:
            yield Event(said, logprobs)

    def _translated(self, said: Json, is_streamed: bool) -> Json:
        """Return a delta or a message of more than a text in OpenAI's words."""
        self._note_message_thoughts(said)
        content = said.pop("content", None)
        calls = said.pop("tool_calls", [])
        legacy_call = said.pop("function_call", None)
        require_objects(said.get("reasoning_details", []))
        require_objects([said.get("audio", {})])
        reasoning = take_reasoning(said)
        if isinstance(content, list):  # Mistral's
            reasoning += reasoning_in(content)
            content = texts_in(content)

        delta = {"reasoning_content": reasoning, "content": text_or_nothing(content), **said}
        delta["refusal"] = text_or_nothing(said.get("refusal"))
        if isinstance(said.get("annotations"), list):
            delta["annotations"] = [annotation_of(theirs) for theirs in said["annotations"]]
        delta["tool_calls"] = []
        for position, call in enumerate(calls):
            place = position if call.get("index") is None else call["index"]
            entries = self._calls.add(place if is_streamed else None, call)
            self._note_call_thoughts(call, entries)
            delta["tool_calls"] += entries
        if legacy_call:
            delta["tool_calls"] += self._calls.add("function_call", {"function": legacy_call})
        return drop_empty(delta)

    def _note_message_thoughts(self, said: Json) -> None:
        """Keep what of a delta the provider wants to see again."""
        for name in THOUGHT_FIELDS:
            if name in said:
                self._message_thoughts.add({name: said[name]})

    def _note_call_thoughts(self, piece: Json, entries: list[Json]) -> None:
        """Keep what of a call the provider wants to see again (Gemini's signature)."""
        if not isinstance(piece.get("extra_content"), dict):
            return
        for entry in entries:
            if entry.get("id"):
                self._call_thoughts[entry["id"]] = {"extra_content": piece["extra_content"]}

    def end(self, is_proven: bool = False) -> Iterator[Event]:
        """Yield what remains; remember what came along with the calls."""
        self._remember()
        yield from super().end(is_proven)

    def _remember(self) -> None:
        message = self._message_thoughts.whole()
        message_fields = {name: message[name] for name in THOUGHT_FIELDS if name in message}
        for call in self._calls.sent:
            call_fields = self._call_thoughts.get(call.id, {})
            if message_fields or call_fields:
                thought = {"message": message_fields, "call": call_fields}
                key = thought_key(call.id, call.name, "".join(call.pieces))
                self._thoughts.store(self.target.model.name, key, thought)

    def _count(self, usage: Json | None) -> None:
        """Take a usage, which is OpenAI's, and more: every field passes."""
        if not usage:
            return
        prompt_details = usage.get("prompt_tokens_details") or {}
        completion_details = usage.get("completion_tokens_details") or {}
        cached_names = ("cached_tokens", "prompt_cache_hit_tokens")  # Moonshot's, DeepSeek's
        self.usage = token_usage(
            count_in(usage, "prompt_tokens"),
            count_in(usage, "completion_tokens"),
            count_in({**usage, **drop_empty(prompt_details)}, *cached_names),
            count_in({**usage, **drop_empty(completion_details)}, "reasoning_tokens"),
        )
        for name, value in drop_empty(usage).items():
            known = self.usage.get(name, value)
            if isinstance(value, dict) and isinstance(known, dict):
                self.usage[name] = {**known, **drop_empty(value)}
            elif isinstance(value, type(known)):
                self.usage[name] = value

    def _sources(self, message: Json) -> Iterator[Event]:
        """Yield, once, the pages that Perplexity and xAI name beside the answer."""
        annotations = []
        for source in [*(message.get("search_results") or ()), *(message.get("citations") or ())]:
            page = {"url": source} if isinstance(source, str) else source
            url = text_or_nothing(page.get("url"))
            if url and url not in self._sources_sent:
                self._sources_sent.add(url)
                title = text_or_nothing(page.get("title"))
                annotations.append(url_citation(url, title, 0, 0))
        if annotations:
            yield Event({"annotations": annotations})


def with_outputs(items: list[Json]) -> list[Json]:
    """Return the items of a conversation with one output for each call, and none without a call.

    OpenAI: "No tool output found for function call", "No tool call found for function call
    output". Calls may have the same id: clients use one again. An output belongs to the last call
    before it that has its id and no output yet.
    """
    answered: set[int] = set()  # places of calls that have an output
    orphans: set[int] = set()  # places of outputs that have no call
    waiting: dict[str, list[int]] = {}  # the places of calls without an output, by id
    for place, item in enumerate(items):
        if "call_id" not in item:
            continue
        if "output" not in item:
            waiting.setdefault(item["call_id"], []).append(place)
        elif waiting.get(item["call_id"]):
            answered.add(waiting[item["call_id"]].pop())
        else:
            orphans.add(place)

    paired = []
    for place, item in enumerate(items):
        if place in orphans:
            item = output_as_message(item)
        paired.append(item)
        if "call_id" in item and "output" not in item and place not in answered:
            output_type = item["type"] + "_output"
            output = {"type": output_type, "call_id": item["call_id"], "output": NO_RESULT}
            paired.append(output)
    return paired


def output_as_message(item: Json) -> Json:
    """Return an output without a call as a message of the user."""
    output = item["output"]
    if isinstance(output, str):
        text = f"{ORPHAN_RESULT} {output}".strip()
        return {"role": "user", "content": [{"type": "input_text", "text": text}]}
    heading = {"type": "input_text", "text": ORPHAN_RESULT}
    return {"role": "user", "content": [heading, *output]}


class Responses(WireFormat):
    """/responses: OpenAI's, Copilot's GPT models, ChatGPT subscriptions, Azure, xAI.

    The place of a call is its output_index in a tuple: one that is missing is a place as well,
    where None would mean to ToolCalls a call that is whole.
    """

    ending = "/responses"

    def __init__(
        self, request: ChatRequest, target: Target, thoughts: Thoughts | None = None
    ) -> None:
        super().__init__(request, target, thoughts)
        self._streamed: set[Any] = set()  # parts of which a piece has come
        self._fields: set[str] = set()  # of a message, of which a piece has come
        self._cited: set[Any] = set()  # parts of which a citation has come

    def _encode(self, theirs: Json) -> Json:
        request = self.request.body
        body = without_agent_fields(theirs)
        for name in PASSED_TO_RESPONSES:
            if name in request:
                body[name] = request[name]

        body["input"] = self._input()
        body["max_output_tokens"] = self.request.max_tokens
        body["text"] = self._text(body.get("text"))
        body["tools"] = self._tools()
        if body["tools"]:
            body["tool_choice"] = flat_tool_choice(self.request)
        if request.get("logprobs"):
            body["include"] = [*body.get("include", ()), "message.output_text.logprobs"]
            body["top_logprobs"] = request.get("top_logprobs", 0)
        return drop_empty(body)

    def _restore_thoughts(self, body: Json) -> None:
        """Put reasoning before the call that followed it, and before what was said with that."""
        items: list[Json] = []
        for item in body["input"]:
            thoughts = []
            if item.get("type") in CALL_OF_ITEM:
                thoughts = self._thought_of(item["call_id"]).get("before", [])
            place = len(items)
            if thoughts and items and items[-1].get("role") == "assistant":
                place -= 1
            items[place:place] = thoughts
            items.append(item)
        body["input"] = items

    def _input(self) -> list[Json]:
        """Return the conversation: what a message says, then the calls that it makes."""
        items = []
        for role, said, _ in convert_messages(self.request):
            for item in objects_in(said):
                item.pop("cache_control", None)  # Anthropic's
            parts = [item for item in said if "call_id" not in item]
            if parts or role not in ("assistant", "tool"):
                nothing = {"type": "input_text", "text": ""}
                items.append({"role": role, "content": parts or [nothing]})
            items += [item for item in said if "call_id" in item]
        return with_outputs(items)

    def _text(self, theirs: Json | None) -> Json:
        """Return how the text shall be: its verbosity and its format."""
        text = {**(theirs or {})}
        if self.request.body.get("verbosity"):
            text["verbosity"] = self.request.body["verbosity"]
        if "response_format" in self.request.body:
            text["format"] = flatten(self.request.body["response_format"])
        return text

    def _tools(self) -> list[Json]:
        tools = []
        for tool in flat_tools(self.request):
            tool = {**tool}
            tool.pop("cache_control", None)  # Anthropic's
            if tool["type"] == "function":
                tool.setdefault("strict", False)  # which /responses takes for true
            tools.append(tool)
        return tools

    def _decode(self, message: Json) -> Iterator[Event]:
        if message.get("object") == "response":  # a whole one, not streamed
            yield from self._completed(message, "completed")
            return
        group, _, step = str(message.get("type")).removeprefix("response.").rpartition(".")
        if step == "delta":
            yield from self._delta(group, message)
        elif step == "done":
            yield from self._done(group, message)
        elif group == "output_item" and step == "added":
            yield from self._item(message, is_done=False)
        elif group == "output_text.annotation":
            yield from self._annotation(part_of(message), message.get("annotation"))
        elif step in ("created", "in_progress"):
            self._note_response(message.get("response") or {})
        elif step in ("completed", "incomplete", "cancelled"):
            yield from self._completed(message["response"], step)

    def _delta(self, group: str, message: Json) -> Iterator[Event]:
        """Yield a piece of a text or of a call."""
        delta = text_or_nothing(message.get("delta"))
        if group in TEXT_FIELDS:
            yield from self._say(group, part_of(message), delta, message.get("logprobs"))
        elif group in CALL_DELTA and delta:
            call_type = CALL_DELTA[group]
            piece = {call_type: {CALL_TEXT[call_type]: delta}}
            yield from self._call((message.get("output_index"),), piece)

    def _done(self, group: str, message: Json) -> Iterator[Event]:
        """Yield what was never streamed of a text, a part, a call or an item that is whole."""
        part = part_of(message)
        if group in TEXT_FIELDS:
            text = message.get("refusal" if group == "refusal" else "text")
            yield from self._rest(group, part, text, message.get("logprobs"))
        elif group in ("content_part", "reasoning_summary_part"):
            yield from self._part(part, message.get("part") or {})
        elif group in CALL_DELTA:
            call_type = CALL_DELTA[group]
            text = message.get(CALL_TEXT[call_type])
            yield from self._rest_of_call(message.get("output_index"), call_type, {}, text)
        elif group == "output_item":
            yield from self._item(message, is_done=True)

    def _item(self, message: Json, is_done: bool) -> Iterator[Event]:
        """Yield what an item of the output says: a call's name, and what was never streamed."""
        item = message.get("item") or {}
        index = message.get("output_index")
        if is_done:
            self._open.discard(index)
        elif item.get("type") in ITEMS_OF_ANSWERS:
            self._open.add(index)
        call_type = CALL_OF_ITEM.get(str(item.get("type")))
        if is_done and item.get("type") == "reasoning":
            self._note_thought(item)
        if is_done and call_type is not None:
            self._store_before_call(item.get("call_id"))
        if call_type is not None:
            head = {"id": item.get("call_id") or item.get("id"), "name": item["name"]}
            text = item.get(CALL_TEXT[call_type]) if is_done else ""
            yield from self._rest_of_call(index, call_type, head, text)
        if call_type is not None and is_done:
            yield from self._call_events(self._calls.finish_at((index,)))
        elif is_done:
            yield from self._parts(index, item)

    def _note_thought(self, item: Json) -> None:
        """Keep a reasoning that can be shown again: without an id, which nobody stores."""
        if item.get("encrypted_content"):
            kept = {"type": "reasoning", "summary": item.get("summary") or []}
            kept["encrypted_content"] = item["encrypted_content"]
            self._before_call.append(kept)

    def _parts(self, index: Any, item: Json) -> Iterator[Event]:
        """Yield what was never streamed of the texts of an item."""
        for number, part in enumerate(item.get("summary") or ()):
            yield from self._part((index, "summary", number), part)
        for number, part in enumerate(item.get("content") or ()):
            yield from self._part((index, "content", number), part)

    def _part(self, part: Any, theirs: Json) -> Iterator[Event]:
        """Yield what was never streamed of a part of a message or of a reasoning."""
        group = GROUP_OF_PART.get(str(theirs.get("type")))
        if group is None:
            return
        text = theirs.get("refusal" if group == "refusal" else "text")
        yield from self._rest(group, part, text, theirs.get("logprobs"))
        if part not in self._cited:
            for annotation in theirs.get("annotations") or ():
                yield from self._annotation(part, annotation)

    def _rest(self, group: str, part: Any, text: Any, logprobs: Any) -> Iterator[Event]:
        """Yield a part's text where no piece of it was streamed."""
        if part not in self._streamed:
            yield from self._say(group, part, text_or_nothing(text), logprobs)

    def _say(self, group: str, part: Any, text: str, logprobs: Any) -> Iterator[Event]:
        """Yield a piece of the text of a part."""
        entries = self._logprobs(logprobs)
        if text:
            self._streamed.add(part)
        if not text and entries is None:
            return
        field = TEXT_FIELDS[group]
        self._fields.add(field)
        if field == "content":
            yield self._content(part, text, entries)
        elif field == "reasoning_content":
            yield self._reasoning(part, text)
        else:
            yield Event({field: text})

    def _rest_of_call(self, index: Any, call_type: str, head: Json, text: Any) -> Iterator[Event]:
        """Yield a call's name, where it was not known, and its text, where none was streamed."""
        call_id = text_or_nothing(head.get("id"))
        place = self._calls.place_of(call_id, default=(index,))
        if self._calls.text_at(place):
            text = None
        inner = {"name": head.get("name"), CALL_TEXT[call_type]: text_or_nothing(text)}
        yield from self._call(place, {"id": call_id, call_type: inner})

    def _annotation(self, part: Any, theirs: Any) -> Iterator[Event]:
        """Yield a citation; where its part and its item are whole they repeat it."""
        self._cited.add(part)
        yield Event({"annotations": [annotation_of(theirs, self._content_text.start)]})

    def _logprobs(self, theirs: Any) -> Json | None:
        """Return log probabilities in chat completions' shape, None without any."""
        if not self.request.body.get("logprobs") or not theirs:
            return None
        entries = []
        for entry in theirs:
            others = [{"bytes": None, **other} for other in entry.get("top_logprobs") or ()]
            entries.append({"bytes": None, **entry, "top_logprobs": others})
        return {"content": entries, "refusal": None}

    def _note_response(self, response: Json) -> None:
        self._note_frame("service_tier", response.get("service_tier"))

    def _completed(self, response: Json, status: str) -> Iterator[Event]:
        """Yield the end of the answer, and before it all of an answer of which nothing came."""
        self._note_response(response)
        self._count(response.get("usage") or {})
        has_reasoned = "reasoning_content" in self._fields
        has_spoken = "content" in self._fields or "refusal" in self._fields
        has_come = {"reasoning": has_reasoned, "message": has_spoken}  # calls know it themselves
        for index, item in enumerate(response.get("output") or ()):
            if not has_come.get(item.get("type")):
                yield from self._item({"item": item, "output_index": index}, is_done=True)
        details = response.get("incomplete_details") or {}
        self._finish(details.get("reason") or response.get("status") or status)
        yield from self.end(is_proven=True)

    def _count(self, usage: Json) -> None:
        if usage:
            self.usage = token_usage(
                count_in(usage, "input_tokens"),
                count_in(usage, "output_tokens"),
                count_in(usage.get("input_tokens_details") or {}, "cached_tokens"),
                count_in(usage.get("output_tokens_details") or {}, "reasoning_tokens"),
            )


def turns_of(request: ChatRequest) -> tuple[list[Json], list[Json]]:
    """Return alternating turns, results first in each, and the blocks of the system's text.

    A system message in the middle stays there, in the user's turn; the last of nothing but system
    messages is the user's.
    """
    turns: list[Json] = []
    system: list[Json] = []
    last = len(request.messages) - 1
    for index, (role, said, param) in enumerate(convert_messages(request)):
        blocks = [block_of(item, param) for item in said]
        if role in SYSTEM_ROLES and not turns and index != last:
            system += blocks
        elif role == "assistant":
            add_blocks(turns, "assistant", blocks)
        elif blocks or role not in SYSTEM_ROLES or not turns:
            add_blocks(turns, "user", blocks or [{"type": "text", "text": "."}])  # never ""
    if not turns:
        raise invalid("This model needs a message of the user", "messages")
    pair_results(turns)
    return turns, system


def pair_results(turns: list[Json]) -> None:
    """Give each call one result in the next turn, and say other results as text.

    Clients cut their histories anywhere; Anthropic: "tool_use ids were found without tool_result
    blocks immediately after", "unexpected tool_use_id found in tool_result blocks".
    """
    calls: list[str] = []  # of the turn before
    for turn in turns:
        if turn["role"] == "user":
            turn["content"] = with_results(turn["content"], calls)
        calls = []
        for block in turn["content"]:
            if block["type"] == "tool_use":
                calls.append(block["id"])
    if calls:
        turns.append({"role": "user", "content": with_results([], calls)})


def with_results(blocks: list[Json], calls: list[str]) -> list[Json]:
    """Return a turn of the user with one result for each of `calls`, before all else.

    Calls may have the same id: clients use one again.
    """
    waiting = collections.Counter(calls)  # calls without a result
    results: list[Json] = []
    others: list[Json] = []
    for block in blocks:
        if block["type"] != "tool_result":
            others.append(block)
        elif waiting[block["tool_use_id"]] > 0:
            waiting[block["tool_use_id"]] -= 1
            results.append(block)
        else:
            others += result_as_text(block["content"])
    for call_id in waiting.elements():
        results.append({"type": "tool_result", "tool_use_id": call_id, "content": NO_RESULT})
    return [*results, *others]


def result_as_text(content: Any) -> list[Json]:
    """Return the blocks that say the content of a result without a call."""
    if isinstance(content, str):
        return [{"type": "text", "text": f"{ORPHAN_RESULT} {content}".strip()}]
    return [{"type": "text", "text": ORPHAN_RESULT}, *content]


def add_blocks(turns: list[Json], role: str, blocks: list[Json]) -> None:
    """Add blocks to the last turn, or in a new one where the last is of the other role."""
    if not blocks:
        return
    if not turns or turns[-1]["role"] != role:
        turns.append({"role": role, "content": []})
    turns[-1]["content"] += blocks


def wants_json_object(request: ChatRequest) -> bool:
    return bool(request.body.get("response_format", {}).get("type") == "json_object")


def mark_for_cache(body: Json) -> None:
    """Let the provider keep the prompt for the next request, unless the client has marks."""
    if marked_in(body):
        return
    if body["system"]:
        body["system"][-1]["cache_control"] = {"type": "ephemeral"}
    body["messages"][-1]["content"][-1]["cache_control"] = {"type": "ephemeral"}


def block_of(item: Json, param: str) -> Json:
    """Return a part or item of /responses as a content block, with the client's mark on it."""
    block = plain_block_of(item, param)
    if "cache_control" in item:
        block["cache_control"] = item["cache_control"]
    return block


def plain_block_of(item: Json, param: str) -> Json:
    """Return a part or item of /responses as a content block; `param` names its message."""
    item_type = item["type"]
    if item_type in ("input_text", "output_text"):
        return {"type": "text", "text": item["text"]}
    if item_type == "refusal":
        return {"type": "text", "text": item["refusal"]}
    if item_type == "function_call":
        return tool_use_block(item)
    if item_type == "function_call_output":
        return tool_result_block(item, param)
    if item_type == "input_image":
        return {"type": "image", "source": source_of(item["image_url"])}
    if item_type == "input_file" and item.get("file_data"):
        document = {"type": "document", "source": source_of(item["file_data"])}
        return drop_empty({**document, "title": item.get("filename")})
    raise invalid("This model takes no custom tools, nor files by their ids", param)


def tool_use_block(item: Json) -> Json:
    return {
        "type": "tool_use",
        "id": item["call_id"],
        "name": item["name"],
        "input": read_arguments(item["arguments"]),
    }


def tool_result_block(item: Json, param: str) -> Json:
    """Return a result; a mark on a part of it stands on the result, where alone it may be."""
    result = {"type": "tool_result", "tool_use_id": item["call_id"]}
    content = item["output"]
    if isinstance(content, list):
        content = []
        for part in item["output"]:
            block = block_of(part, param)
            mark = block.pop("cache_control", None)
            if mark is not None:
                result["cache_control"] = mark
            content.append(block)
    result["content"] = content
    return result


def read_arguments(text: str) -> Json:
    """Return the arguments of a call as an object, whatever a model or a client has made of them.

    They may be cut off by a limit of tokens or hold raw newlines; some are no object. What cannot
    be read stands in the object as text.
    """
    value = lenient_json(text)
    if isinstance(value, str):  # some clients encode twice
        value = lenient_json(value)
    if value is None:
        return {}
    if isinstance(value, dict):
        return value
    return {"arguments": value}


def lenient_json(text: str) -> Any:
    """Return the value in a JSON text that may be cut off, None for nothing, or the text."""
    if not text.strip():
        return None
    closers, is_shallow = open_brackets(text)
    if not is_shallow:
        return text
    for candidate in closed_texts(text, closers):
        try:
            return read_lenient_json(candidate)
        except (ValueError, RecursionError):
            continue
    return text


def open_brackets(text: str) -> tuple[str, bool]:
    """Return what closes the brackets that a JSON text leaves open, and whether it is shallow."""
    closers: list[str] = []
    is_in_string = False
    for token in JSON_ESCAPE_QUOTE_OR_BRACKET.finditer(text):
        word = token.group()
        if word == '"':
            is_in_string = not is_in_string
        elif is_in_string:
            continue
        elif word in CLOSERS:
            closers.append(CLOSERS[word])
        elif word in CLOSERS.values() and closers:
            closers.pop()
        if len(closers) > MAX_ARGUMENTS_DEPTH:
            return "", False
    if is_in_string:
        closers.append('"')
    return "".join(reversed(closers)), True


def closed_texts(text: str, closers: str) -> Iterator[str]:
    """Yield a JSON text, then what it may have been meant to be where it was cut off."""
    yield text
    if not closers:
        return
    if closers.startswith('"'):
        for escape_size in range(MAX_ESCAPE_CHARACTERS):  # of an escape that was cut off
            whole = text[: len(text) - escape_size]
            yield whole + closers
            yield whole + '":null' + closers[1:]
        return
    whole = text.rstrip(", \t\r\n")
    yield whole + closers
    yield whole + "null" + closers
    yield whole + ":null" + closers
    without_word = whole.rstrip(WORD_CHARACTERS).rstrip(", \t\r\n")
    yield without_word + closers
    yield without_word + "null" + closers


def source_of(url: str) -> Json:
    """Return where an image or a document is: in the request itself, or at a URL."""
    head, _, data = url.partition(";base64,")
    if not data:
        return {"type": "url", "url": url}
    media_type = head.partition(":")[2].partition(";")[0].lower()
    if media_type == "image/jpg":
        media_type = "image/jpeg"
    return {"type": "base64", "media_type": media_type, "data": data}


class Messages(WireFormat):
    """/messages: Anthropic's, and Copilot's Claude models."""

    ending = "/messages"

    def __init__(
        self, request: ChatRequest, target: Target, thoughts: Thoughts | None = None
    ) -> None:
        super().__init__(request, target, thoughts)
        self._blocks: dict[Any, Json] = {}  # as they began
        self._citations: dict[Any, list[Json]] = {}  # of the blocks that have not ended
        self._starts: dict[Any, int] = {}  # where in the whole text that of a block begins
        self._run = 0  # the texts that follow each other without anything between them
        self._tokens: Json = {}  # by the provider's names

    def _encode(self, theirs: Json) -> Json:
        turns, system = turns_of(self.request)
        if wants_json_object(self.request):
            system.append({"type": "text", "text": JSON_ONLY})

        body = without_agent_fields(theirs)
        body.update(self._sampling())
        body["system"] = system
        body["messages"] = turns
        body["max_tokens"] = self._max_tokens(theirs)
        body["stop_sequences"] = [text for text in self.request.stop if text.strip()]
        body["metadata"] = drop_empty({"user_id": self.request.body.get("user")})
        body["output_config"] = self._output_config(body.get("output_config"))
        choice = self._tool_choice()  # a wrong one is an error even where there are no tools
        body["tools"] = self._tools()
        if body["tools"]:
            body["tool_choice"] = choice
        mark_for_cache(body)
        return drop_empty(body)

    def _restore_thoughts(self, body: Json) -> None:
        """Put blocks of thinking before the call that followed them, and before its text."""
        for turn in body["messages"]:
            blocks: list[Json] = []
            place = 0  # behind the last call
            for block in turn["content"]:
                blocks.append(block)
                if block["type"] == "tool_use":
                    thoughts = self._thought_of(block["id"]).get("before", [])
                    blocks[place:place] = thoughts
                    place = len(blocks)
            turn["content"] = blocks

    def _sampling(self) -> Json:
        """Return how words are picked: the temperature ends at 1, where OpenAI's ends at 2."""
        sampling = {}
        if "temperature" in self.request.body:
            sampling["temperature"] = min(self.request.body["temperature"], 1)
        if "top_p" in self.request.body:
            sampling["top_p"] = self.request.body["top_p"]
        return sampling

    def _max_tokens(self, theirs: Json) -> int:
        """Return the limit, which must be there: the client's, and room to think where there is."""
        limit = self.target.model.output_limit or theirs.get("max_tokens") or MAX_CLAUDE_TOKENS
        requested = self.request.max_tokens or min(limit, MAX_CLAUDE_TOKENS)
        thinking = theirs.get("thinking") or {}
        with_thinking = requested + thinking.get("budget_tokens", 0)
        return int(max(requested, min(with_thinking, limit)))

    def _output_config(self, theirs: Json | None) -> Json:
        """Return opencode's, which holds the effort, and the schema of the answer."""
        config = {**(theirs or {})}
        json_schema = self.request.body.get("response_format", {}).get("json_schema")
        if json_schema:
            config["format"] = {"type": "json_schema", "schema": json_schema.get("schema", {})}
        return config

    def _tools(self) -> list[Json]:
        tools = []
        for tool, param in numbered(flat_tools(self.request), "tools"):
            if tool["type"] == "custom":
                raise invalid("This model takes no custom tools", param)
            if tool["type"] == "function":
                schema = tool.get("parameters")
                tool = {**tool, "input_schema": schema, "parameters": None, "type": None}
            tools.append(drop_empty(tool))
        return tools

    def _tool_choice(self) -> Json:
        choice = flat_tool_choice(self.request)
        if isinstance(choice, str):
            choice = {"type": choice}
        if choice["type"] in ("allowed_tools", "custom"):
            raise invalid("This model takes no such choice of tools", "tool_choice")
        choice = {**choice, "type": CLAUDE_CHOICES[choice["type"]]}
        if self.request.body.get("parallel_tool_calls") is False and choice["type"] != "none":
            choice["disable_parallel_tool_use"] = True
        return choice

    def _decode(self, message: Json) -> Iterator[Event]:
        kind = message.get("type")
        index = message.get("index")
        if kind == "message_start":
            self._count((message.get("message") or {}).get("usage"))
        elif kind == "content_block_start":
            yield from self._begin_block(index, message.get("content_block") or {})
        elif kind == "content_block_delta":
            yield from self._delta(index, message.get("delta") or {})
        elif kind == "content_block_stop":
            yield from self._end_block(index)
        elif kind == "message_delta":
            self._count(message.get("usage"))
            self._finish((message.get("delta") or {}).get("stop_reason"))
        elif kind == "message_stop":
            yield from self.end(is_proven=True)
        elif kind == "message":  # a whole one, not streamed
            yield from self._whole(message)

    def _whole(self, message: Json) -> Iterator[Event]:
        self._count(message.get("usage"))
        for index, block in enumerate(message.get("content") or ()):
            yield from self._begin_block(index, block)
            yield from self._end_block(index)
        self._finish(message.get("stop_reason"))
        yield from self.end(is_proven=True)

    def _begin_block(self, index: Any, block: Json) -> Iterator[Event]:
        """Yield what is in a block from its beginning."""
        kind = block.get("type")
        self._open.add(index)
        self._blocks[index] = block
        if kind in ("thinking", "redacted_thinking"):
            self._before_call.append(dict(block))
        self._citations[index] = [*(block.get("citations") or ())]
        if kind == "tool_use":
            self._before_call = [block for block in self._before_call if is_signed(block)]
            self._store_before_call(block["id"])
            piece = {"id": block["id"], "function": {"name": block["name"]}}
            yield from self._call(index, piece)
        elif kind in ("text", "thinking"):
            yield from self._say(index, block)
        if kind != "text":
            self._run += 1

    def _delta(self, index: Any, delta: Json) -> Iterator[Event]:
        """Yield a piece of a block."""
        if delta.get("citation"):
            self._citations.setdefault(index, []).append(delta["citation"])
        text = text_or_nothing(delta.get("partial_json"))
        block = self._blocks.get(index) or {}
        if block.get("type") == "thinking" and self._before_call:
            self._add_to_thought(self._before_call[-1], delta)
        if text and block.get("type") == "tool_use":
            yield from self._call(index, {"function": {"arguments": text}})
        yield from self._say(index, delta)

    @staticmethod
    def _add_to_thought(thought: Json, delta: Json) -> None:
        """Complete a block of thinking, which goes back exactly as it came."""
        for name in ("thinking", "signature"):
            piece = text_or_nothing(delta.get(name))
            if piece:
                thought[name] = text_or_nothing(thought.get(name)) + piece

    def _say(self, index: Any, piece: Json) -> Iterator[Event]:
        """Yield a piece of text or reasoning.

        A sentence that cites is several blocks of text, so a blank line stands only between texts
        with something else between them.
        """
        text = text_or_nothing(piece.get("text"))
        reasoning = text_or_nothing(piece.get("thinking"))
        if text:
            yield self._content(self._run, text)
            self._starts.setdefault(index, self._content_text.end - len(text))
        if reasoning:
            yield self._reasoning(index, reasoning)

    def _end_block(self, index: Any) -> Iterator[Event]:
        """Yield what is known of a block at its end: the input of a call, and what a text cites."""
        self._open.discard(index)
        block = self._blocks.get(index) or {}
        if block.get("type") == "tool_use":
            if block.get("input") and not self._calls.text_at(index):
                yield from self._call(index, {"function": {"arguments": block["input"]}})
            yield from self._call_events(self._calls.finish_at(index))
        annotations = []
        for citation in self._citations.pop(index, ()):
            start = self._starts.get(index, self._content_text.end)
            annotations.append(claude_annotation(citation, start, self._content_text.end))
        if annotations:
            yield Event({"annotations": annotations})

    def _count(self, usage: Json | None) -> None:
        """Take counts of tokens; a later one has only those that have changed."""
        for name, value in (usage or {}).items():
            if isinstance(value, int):
                self._tokens[name] = value
        if not usage:
            return
        tier = usage.get("service_tier")
        self._note_frame("service_tier", "default" if tier == "standard" else tier)
        cached = count_in(self._tokens, "cache_read_input_tokens")
        written = count_in(self._tokens, "cache_creation_input_tokens")
        prompt = count_in(self._tokens, "input_tokens") + cached + written
        self.usage = token_usage(prompt, count_in(self._tokens, "output_tokens"), cached)


def is_signed(block: Json) -> bool:
    """Tell whether Anthropic would take a block of thinking for its own."""
    return bool(block.get("signature") or block.get("data"))


WIRE_FORMATS = (ChatCompletions, Responses, Messages)


def target_of(url: str, model: Model) -> Target | None:
    """Return where a body for `url` goes, None where only opencode knows its wire format."""
    parts = urllib.parse.urlsplit(url)
    for wire_format in WIRE_FORMATS:
        if parts.path.endswith(wire_format.ending):
            return Target(wire_format, model, provider_of(model.name), parts.hostname or "")
    return None


def without_agent_fields(theirs: Json) -> Json:
    """Return what opencode's body says of the model: its name there, its effort, `store`..."""
    return {name: value for name, value in theirs.items() if name not in AGENT_FIELDS}


def finished_body(body: Json, target: Target) -> bytes:
    """Return a body as its service takes it, as JSON; `body` itself stays as it is."""
    try:
        finished = copy_json(body)
        repair(finished, target)
        return json_bytes(finished)
    except RecursionError:
        raise invalid(TOO_DEEP) from None


class OpencodeFormat:
    """An answer in a format that opencode alone knows: it reads it, and the plugin reports.

    The conversation was handed to opencode as text; see `foreign_conversation`.
    """

    is_between_parts = True
    is_finished = False  # all comes at once with the finish_reason

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.usage: Json | None = None

    def events(self, data: str) -> Iterator[Event]:
        """Yield nothing: the body of the answer does not come here."""
        return iter(())

    def report(self, params: Json) -> Iterator[Event]:
        """Yield what a `delta` or a `finish` of the plugin means."""
        if "finish" not in params:
            name = "reasoning_content" if params.get("type") == "reasoning" else "content"
            yield Event({name: params.get("text") or ""})
            return
        self._count(params.get("tokens"))
        self.finish_reason = finish_reason_of(params["finish"])
        yield from self.end()

    def end(self, is_proven: bool = False) -> Iterator[Event]:
        """Yield the last event; raise APIError where the answer is not complete."""
        if self.finish_reason is None:
            raise APIError(502, "The provider did not finish its answer", code="incomplete_answer")
        yield Event({}, None, self.finish_reason, self.usage)

    def _count(self, tokens: Json | None) -> None:
        """Take opencode's counts, in which neither cached nor reasoning tokens are in another."""
        if not tokens:
            return
        cache = tokens.get("cache") or {}
        cached = count_in(cache, "read")
        reasoning = count_in(tokens, "reasoning")
        prompt = count_in(tokens, "input") + cached + count_in(cache, "write")
        completion = count_in(tokens, "output") + reasoning
        self.usage = token_usage(prompt, completion, cached, reasoning)


def foreign_conversation(request: ChatRequest) -> Json:
    """Return what opencode needs to ask in a format that it alone knows.

    Raises:
        APIError: 400 for what is more than text.
    """
    turns, system = turns_of(request)
    conversation = []
    for turn in turns:
        conversation.append({"role": turn["role"], "parts": turn["content"]})
        require_text(turn["content"])
    require_text(system)
    for name in ("tools", "response_format"):
        if request.body.get(name) not in (None, [], {"type": "text"}):
            raise invalid(f"This program sends this model no {name}", name)
    params = {
        "temperature": request.body.get("temperature"),
        "topP": request.body.get("top_p"),
        "maxOutputTokens": request.max_tokens,
    }
    return {
        "system": [block["text"] for block in system],
        "conversation": conversation,
        "params": drop_empty(params),
        "effort": effort_of(request.body),
    }


def require_text(blocks: list[Json]) -> None:
    for block in blocks:
        if block["type"] != "text":
            raise invalid("This program sends this model nothing but text", "messages")


def chat_conversation(request: ChatRequest) -> Json:
    """Return the least from which opencode derives the same headers as from the whole request."""
    last_role = "user"
    has_image = False
    for message in request.messages:
        if message["role"] not in SYSTEM_ROLES:
            last_role = message["role"]
        for part in parts_of(message):
            has_image = has_image or part["type"] == "image_url"
    return stub_conversation(last_role != "user", has_image, effort_of(request.body))


def stub_conversation(is_agent: bool, has_image: bool, effort: str | None = None) -> Json:
    """Return a conversation of no content for opencode.

    It ends with a tool's result where `is_agent`, else with the user, and shows an image or none:
    Copilot's headers tell such requests apart.
    """
    parts: list[Json] = [{"type": "text", "text": "-"}]
    if has_image:
        parts.append({"type": "file", "mime": "image/png", "url": PIXEL})
    conversation: list[Json] = [{"role": "user", "parts": parts}]
    if is_agent:
        state = {
            "status": "completed",
            "input": {},
            "output": "-",
            "title": "",
            "metadata": {},
            "time": {"start": 0, "end": 0},
        }
        call = {"type": "tool", "callID": "call", "tool": "t", "state": state}
        conversation.append({"role": "assistant", "parts": [call]})
    return {"system": [], "conversation": conversation, "params": {}, "effort": effort}


# ------------------------------------------------------------------------------------------- quirks
# What services insist on beyond their formats: a catalogue of small functions, each with the format
# and the condition that it applies under, and what was observed of whom. `repair` applies those
# that match in the order of this file, to converted and to passed-through bodies alike. A body is
# the repairer's own, to be changed in place; of a passed-through one `parse_native_request` has
# checked what quirks rely on, all else may be anything.

INSTRUCTIONS = "Answer the user."  # where a client has none, and the service insists on some
CONTINUE = "Please continue."  # the user's, where an assistant's message may not be the last
NO_REASONING = "."  # for Kimi, which takes "" for missing and words for its own
MIN_RESPONSES_TOKENS = 16
MIN_THINKING_TOKENS = 1024
MAX_THINKING_TOKENS = 16000  # what opencode asks for
MAX_CALL_ID_CHARACTERS = 64
MAX_CHAT_CALL_ID_CHARACTERS = 40
MAX_CACHE_MARKS = 4  # Anthropic's
MISTRAL_ID = re.compile("[a-zA-Z0-9]{9}")
CLAUDE_VERSION = re.compile(r"claude-[a-z]+-(\d+)(?:[.-](\d{1,2}))?(?!\d)")
MEDIA_TYPES = (  # of images, by how their bytes begin
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
)
DATA_IMAGE = re.compile(r"(?i)data:(image/[^;,]*)(;(?:[^,]*;)?base64,)")
# Keywords of a JSON schema below which are schemas: by name, in a list, or one.
SCHEMA_MAPS = ("properties", "$defs", "definitions", "patternProperties")
SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SCHEMA_SINGLES = ("items", "additionalProperties", "not")
COMBINERS = ("anyOf", "oneOf", "allOf")
STUB_NAME = "_noop"
STUB_TEXT = "Not a tool: it is here because earlier messages have calls. Never call it."
STUB_SCHEMA: Json = {"type": "object", "properties": {"reason": {"type": "string"}}}
# Of chat completions: what OpenAI's own service has, and no other that speaks as it does.
ONLY_OPENAI = (
    "metadata",
    "prediction",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
)
GOOGLE_REFUSES = (
    "frequency_penalty",
    "logit_bias",
    "parallel_tool_calls",
    "presence_penalty",
    "reasoning",
    "seed",
    "top_k",
    "user",
)
MISTRAL_TAKES = (
    "frequency_penalty",
    "max_tokens",
    "messages",
    "model",
    "n",
    "parallel_tool_calls",
    "presence_penalty",
    "prompt_cache_key",
    "prompt_mode",
    "random_seed",
    "reasoning_effort",
    "response_format",
    "safe_prompt",
    "stop",
    "stream",
    "temperature",
    "tool_choice",
    "tools",
    "top_p",
)
MISTRAL_MESSAGE_TAKES: dict[str, tuple[str, ...]] = {
    "system": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "tool_calls", "prefix"),
    "tool": ("role", "content", "tool_call_id", "name"),
}
PLAIN_MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id", "function_call")
CHATGPT_TAKES = (
    "include",
    "input",
    "instructions",
    "model",
    "parallel_tool_calls",
    "prompt_cache_key",
    "reasoning",
    "service_tier",
    "store",
    "stream",
    "text",
    "tool_choice",
    "tools",
)
COPILOT_RESPONSES_TAKES = (
    *(name for name in CHATGPT_TAKES if name != "service_tier"),
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "safety_identifier",
    "temperature",
    "top_logprobs",
    "top_p",
    "truncation",
    "user",
)
COPILOT_BETAS = (
    "advanced-tool-use-2025-11-20",
    "context-management-2025-06-27",
    "interleaved-thinking-2025-05-14",
)
CONTEXT_BETA = "context-management-2025-06-27"
COPILOT_TOOL_REFUSES = ("strict", "eager_input_streaming", "defer_loading", "input_examples")
CLAUDE_SCHEMA_TAKES = (
    "$defs",
    "$id",
    "$ref",
    "$schema",
    "additionalProperties",
    "allOf",
    "anyOf",
    "const",
    "default",
    "definitions",
    "description",
    "enum",
    "format",
    "items",
    "properties",
    "required",
    "title",
    "type",
)
CLAUDE_STRING_FORMATS = (
    "date",
    "date-time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "time",
    "uri",
    "uuid",
)
BILLING_LINE = "x-anthropic-billing-header:"  # Claude Code's, in a block of its own

Formats = Union[type[WireFormat], tuple[type[WireFormat], ...]]
Condition = Callable[[Target], bool]
Repair = Callable[[Json, Target], None]
EVERY_FORMAT = (ChatCompletions, Responses, Messages)
# What formats whose tools are flat call a function.
FUNCTION_TYPES: dict[type[WireFormat], tuple[str | None, ...]] = {
    Responses: ("function",),
    Messages: (None, "custom"),
}


class Quirk(NamedTuple):
    """A fact about a service: where it holds, and what makes a body right there."""

    wire_format: Formats
    condition: Condition
    repair: Repair


QUIRKS: list[Quirk] = []


def quirk(wire_format: Formats, condition: Condition) -> Callable[[Repair], Repair]:
    """Put the function that follows into the catalogue, for one wire format or several."""

    def register(function: Repair) -> Repair:
        QUIRKS.append(Quirk(wire_format, condition, function))
        return function

    return register


def repair(body: Json, target: Target) -> None:
    """Change a body in its own format to what the target is known to take."""
    for each in QUIRKS:
        if issubclass(target.wire_format, each.wire_format) and each.condition(target):
            each.repair(body, target)


# -- conditions


def always(target: Target) -> bool:
    return True


def is_at(target: Target, *domains: str) -> bool:
    host = "." + target.host
    return any(host.endswith("." + domain) for domain in domains)


def is_named(target: Target, *words: str) -> bool:
    """Tell whether one of the words is in the model's name, without its provider."""
    name = target.model.bare_name.lower()
    return any(word in name for word in words)


def is_chatgpt(target: Target) -> bool:
    """Tell whether a ChatGPT subscription answers."""
    return is_at(target, "chatgpt.com")


def is_copilot(target: Target) -> bool:
    return target.provider.startswith("github-copilot")


def is_openai_reasoner(target: Target) -> bool:
    """Tell whether it is GPT-5 or newer, or a model of the o series, wherever it runs."""
    name = target.model.bare_name.lower().rpartition("/")[2]
    return re.match(r"gpt-[5-9]|o\d", name) is not None


def is_copilot_reasoner(target: Target) -> bool:
    return is_copilot(target) and is_openai_reasoner(target)


def is_claude(target: Target) -> bool:
    return is_named(target, "claude")


def is_copilot_claude(target: Target) -> bool:
    return is_copilot(target) and is_claude(target)


def is_gemini(target: Target) -> bool:
    return is_named(target, "gemini") or is_google(target)


def is_copilot_gemini(target: Target) -> bool:
    return is_copilot(target) and is_gemini(target)


def is_google(target: Target) -> bool:
    return target.provider == "google" or is_at(target, "googleapis.com")


def is_anthropic(target: Target) -> bool:
    return target.provider == "anthropic" or is_at(target, "anthropic.com")


def is_not_anthropic(target: Target) -> bool:
    return not is_anthropic(target)


def is_mistral(target: Target) -> bool:
    return target.provider == "mistral" or is_at(target, "mistral.ai")


def is_deepseek(target: Target) -> bool:
    return is_named(target, "deepseek") or is_at(target, "deepseek.com")


def is_moonshot(target: Target) -> bool:
    providers = ("moonshotai", "moonshotai-cn", "kimi-for-coding")
    return target.provider in providers or is_at(target, "moonshot.ai", "moonshot.cn", "kimi.com")


def is_kimi(target: Target) -> bool:
    return is_moonshot(target) or is_named(target, "kimi")


def takes_reasoning_back(target: Target) -> bool:
    """Tell whether a service takes its `reasoning_content` back: DeepSeek, Kimi (2026).

    Others refuse the field, or have other names for it.
    """
    return is_deepseek(target) or is_kimi(target)


def is_openrouter(target: Target) -> bool:
    return target.provider == "openrouter" or is_at(target, "openrouter.ai")


def is_xai(target: Target) -> bool:
    return target.provider == "xai" or is_at(target, "x.ai")


def is_groq_or_cerebras(target: Target) -> bool:
    is_one = target.provider in ("groq", "cerebras")
    return is_one or is_at(target, "groq.com", "cerebras.ai")


def is_openai(target: Target) -> bool:
    """Tell whether OpenAI's own service answers, or Azure's, which is the same."""
    is_azure = target.provider.startswith("azure") or is_at(target, "azure.com")
    return is_azure or target.provider == "openai" or is_at(target, "openai.com")


def is_openai_or_copilot(target: Target) -> bool:
    return is_openai(target) or is_copilot(target)


def is_compatible(target: Target) -> bool:
    """Tell whether it is a service that speaks as OpenAI does, with words of its own.

    A model of OpenAI's is OpenAI's service behind a gateway: it takes OpenAI's words.
    """
    return not (is_openai(target) or is_copilot(target) or is_openai_reasoner(target))


def has_only_its_own_fields(target: Target) -> bool:
    return is_compatible(target) and not is_openrouter(target)  # which passes them on


def takes_no_sampling(target: Target) -> bool:
    return not target.model.takes_temperature or is_copilot_reasoner(target)


def takes_no_sampling_in_chat(target: Target) -> bool:
    """Tell so where the catalog knows: of a user's own provider opencode just assumes it."""
    return takes_no_sampling(target) and (is_copilot(target) or is_openai(target))


def claude_version(target: Target) -> tuple[int, int]:
    """Return a Claude's generation, (0, 0) of those before 4 and of other models."""
    match = CLAUDE_VERSION.search(target.model.bare_name.lower())
    if match is None:
        return 0, 0
    return int(match[1]), int(match[2] or 0)


def takes_no_prefill(target: Target) -> bool:
    return claude_version(target) >= (4, 6)


def thinks_as_it_likes(target: Target) -> bool:
    """Tell whether it is a Claude that takes neither a budget nor ways to pick words."""
    return claude_version(target) >= (4, 7)


def thinks_by_budget(target: Target) -> bool:
    return (0, 0) < claude_version(target) < (4, 6)


def thinks_always(target: Target) -> bool:
    return is_named(target, "claude-fable-", "claude-mythos-")


def calls_no_tool_by_force(target: Target) -> bool:
    return thinks_always(target) and claude_version(target) >= (5, 1)


# -- what quirks look at


def objects(value: Any) -> list[Json]:
    """Return the objects of a list; of anything else nothing."""
    if not isinstance(value, list):
        return []
    return [item for item in value if isinstance(item, dict)]


def messages_of(body: Json, *roles: str) -> list[Json]:
    """Return the messages of a body that have one of the roles."""
    return [each for each in objects(body.get("messages")) if each.get("role") in roles]


def blocks_of(body: Json, *types: str) -> list[Json]:
    """Return the blocks of these types in the turns of /messages, not those in results."""
    blocks = []
    for message in objects(body.get("messages")):
        for block in objects(message.get("content")):
            if block.get("type") in types:
                blocks.append(block)
    return blocks


def is_last_of_assistant(body: Json) -> bool:
    messages = objects(body.get("messages"))
    return bool(messages) and messages[-1].get("role") == "assistant"


def functions_of(body: Json, target: Target) -> list[Json]:
    """Return the objects that hold the functions' names and schemas."""
    functions = []
    for tool in objects(body.get("tools")):
        if target.wire_format is ChatCompletions:
            functions += objects([tool.get("function")])
        elif tool.get("type") in FUNCTION_TYPES[target.wire_format]:
            functions.append(tool)
    return functions


def schema_name(target: Target) -> str:
    """Return what a format calls the schema of a function's arguments."""
    return "input_schema" if target.wire_format is Messages else "parameters"


def schemas_in(schema: Any) -> Iterator[Json]:
    """Yield a schema and those within it, the outer first: it may be changed meanwhile."""
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, dict):
            continue
        yield node
        for name in SCHEMA_MAPS:
            if isinstance(node.get(name), dict):
                waiting.extend(node[name].values())
        for name in (*SCHEMA_LISTS, *SCHEMA_SINGLES):
            if isinstance(node.get(name), list):
                waiting.extend(node[name])
            else:
                waiting.append(node.get(name))


def keep_only(fields: Json, names: Sequence[str]) -> None:
    for name in list(fields):
        if name not in names:
            del fields[name]


def drop(fields: Json, *names: str) -> None:
    for name in names:
        fields.pop(name, None)


def hashed(text: str, size: int) -> str:
    """Return `size` letters and digits that stand for a text, each time the same."""
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:size]


class CallIds:
    """Gives the calls of a conversation ids that a service takes, and the same to their results.

    Clients use an id again in a later turn, and two ids may become one by what `make` does. A
    result belongs to the last call before it that had its id; of several with one id in one
    turn, to each in turn. What an id becomes depends on nothing that comes after it.
    """

    def __init__(self, make: Callable[[str], str]) -> None:
        self._make = make
        self._used: set[str] = set()
        self._counts: dict[str, int] = {}  # calls that would have got the same id
        self._ids: dict[str, list[str]] = {}  # new ones, by the old ones, of calls without results
        self._has_results = False  # since the last call

    def call(self, holder: Json, name: str) -> None:
        """Change the id of a call, which `holder` has as `name`."""
        old = holder.get(name)
        if not isinstance(old, str):
            return
        if self._has_results:
            self._has_results = False
            self._ids.clear()
        first = self._make(old)
        new = first
        while new in self._used:
            self._counts[first] = self._counts.get(first, 1) + 1
            new = self._make(f"{old}_{self._counts[first]}")
        self._used.add(new)
        self._ids.setdefault(old, []).append(new)
        holder[name] = new

    def result(self, holder: Json, name: str) -> None:
        """Change the id of the call that a result names."""
        old = holder.get(name)
        if not isinstance(old, str):
            return
        self._has_results = True
        ids = self._ids.get(old) or [self._make(old)]
        holder[name] = ids[0]
        if len(ids) > 1:
            del ids[0]


# -- everywhere


@quirk(EVERY_FORMAT, always)
def describe_parameters(body: Json, target: Target) -> None:
    """OpenAI, Anthropic and others refuse functions whose schema is missing or {} (2025)."""
    name = schema_name(target)
    for function in functions_of(body, target):
        if not function.get(name):
            function[name] = {"type": "object", "properties": {}}


@quirk(ChatCompletions, always)
def name_media_type_of_url(body: Json, target: Target) -> None:
    """Gemini and Claude refuse an image whose bytes are not what its type says (2026)."""
    for part in objects_in(body.get("messages")):
        image = part.get("image_url")
        if isinstance(image, dict):
            image["url"] = with_media_type(image.get("url"))


@quirk(Responses, always)
def name_media_type_of_input(body: Json, target: Target) -> None:
    """OpenAI refuses an image whose bytes are not what its type says (2025)."""
    for part in objects_in(body.get("input")):
        if part.get("type") == "input_image" and "image_url" in part:
            part["image_url"] = with_media_type(part["image_url"])


@quirk(Messages, always)
def name_media_type_of_source(body: Json, target: Target) -> None:
    """Anthropic: "The image was specified using the image/png media type, but..." (2025)."""
    for block in objects_in(body.get("messages")):
        source = block.get("source")
        if block.get("type") != "image" or not isinstance(source, dict):
            continue
        if source.get("type") == "base64":
            media_type = media_type_of(source.get("data"))
            source["media_type"] = media_type or source.get("media_type")


def media_type_of(data: Any) -> str:
    """Return what an image in base64 is, "" where its first bytes do not say it."""
    try:
        beginning = base64.b64decode(str(data)[:16])
    except ValueError:
        return ""
    for magic, media_type in MEDIA_TYPES:
        if beginning.startswith(magic):
            return media_type
    is_webp = beginning[:4] == b"RIFF" and beginning[8:12] == b"WEBP"
    return "image/webp" if is_webp else ""


def with_media_type(url: Any) -> Any:
    """Return a URL; in a `data:` one the type of an image is what its bytes are."""
    match = DATA_IMAGE.match(url) if isinstance(url, str) else None
    if match is None:
        return url
    start = match.end()
    media_type = media_type_of(url[start : start + 16]) or match[1]
    return f"data:{media_type}{match[2]}{url[start:]}"


# -- /chat/completions, of all services


@quirk(ChatCompletions, always)
def drop_nulls(body: Json, target: Target) -> None:
    """Z.ai, Copilot and Mistral refuse fields that are null, as `refusal` is (2025)."""
    for name in [name for name, value in body.items() if value is None]:
        del body[name]
    for message in objects(body.get("messages")):
        for name in list(message):
            if message[name] is None and name != "content":
                del message[name]


@quirk(ChatCompletions, always)
def drop_empty_calls(body: Json, target: Target) -> None:
    """Copilot and OpenAI: `tool_calls` that is empty is "too short" (2025); "" is no name."""
    for message in objects(body.get("messages")):
        for name in ("tool_calls", "annotations", "name", "refusal"):
            if message.get(name) in ("", []):
                del message[name]


@quirk((ChatCompletions, Messages), always)
def drop_empty_tools(body: Json, target: Target) -> None:
    """Copilot, vLLM and others refuse `tools: []`; OpenAI a choice without tools (2025)."""
    if not body.get("tools"):
        drop(body, "tools", "tool_choice", "parallel_tool_calls")


@quirk(ChatCompletions, takes_no_sampling_in_chat)
def drop_sampling_in_chat(body: Json, target: Target) -> None:
    """gpt-5-mini at Copilot: "'temperature' does not support 0.1 with this model" (2025)."""
    drop(body, "temperature", "top_p")


@quirk(ChatCompletions, always)
def say_effort_once(body: Json, target: Target) -> None:
    """OpenRouter refuses `reasoning`, which opencode sets there, beside an effort (2026)."""
    effort = body.get("reasoning_effort")
    if effort is None:
        return
    theirs = body.pop("reasoning", None)
    if is_openrouter(target):
        budget = theirs if isinstance(theirs, dict) else {}
        drop(budget, "max_tokens")
        body["reasoning"] = {**budget, "effort": effort}
        del body["reasoning_effort"]


@quirk(ChatCompletions, is_compatible)
def say_system(body: Json, target: Target) -> None:
    """DeepSeek: "developer is not one of ['system', ...]"; most know OpenAI's first roles."""
    for message in messages_of(body, "developer"):
        message["role"] = "system"


@quirk(ChatCompletions, is_compatible)
def say_max_tokens(body: Json, target: Target) -> None:
    """Mistral refuses `max_completion_tokens`, others ignore it; Snowflake wants it (2025)."""
    if target.provider == "snowflake-cortex":
        return
    limit = body.pop("max_completion_tokens", None)
    if limit is not None:
        body["max_tokens"] = limit


@quirk(ChatCompletions, has_only_its_own_fields)
def drop_what_only_openai_has(body: Json, target: Target) -> None:
    """Google, Mistral and Groq refuse what they do not know, of OpenAI's own service (2025)."""
    drop(body, *ONLY_OPENAI)


@quirk((ChatCompletions, Messages), is_not_anthropic)
def drop_billing_line(body: Json, target: Target) -> None:
    """Copilot: "x-anthropic-billing-header is a reserved keyword" (2026); Claude Code's."""
    for holder in (body, *messages_of(body, *SYSTEM_ROLES)):
        name = "system" if holder is body else "content"
        blocks = objects(holder.get(name))
        kept = [each for each in blocks if not str(each.get("text")).startswith(BILLING_LINE)]
        if len(kept) < len(blocks):
            holder[name] = kept


# -- Copilot, /chat/completions


@quirk(ChatCompletions, is_copilot_reasoner)
def rename_max_tokens(body: Json, target: Target) -> None:
    """Copilot: "'max_tokens' is not supported... Use 'max_completion_tokens'" (2025)."""
    limit = body.pop("max_tokens", None)
    if limit is not None:
        body.setdefault("max_completion_tokens", limit)


@quirk(ChatCompletions, is_copilot_reasoner)
def drop_stop(body: Json, target: Target) -> None:
    """gpt-5-mini at Copilot: "'stop' is not supported"; the proxy cuts by itself (2025)."""
    drop(body, "stop")


@quirk(ChatCompletions, is_copilot)
def drop_text_that_says_nothing(body: Json, target: Target) -> None:
    """Claude at Copilot refuses an assistant's "" beside calls: "must be non-empty" (2025)."""
    for message in messages_of(body, "assistant"):
        if message.get("content") == "" and message.get("tool_calls"):
            message["content"] = None


@quirk(ChatCompletions, is_copilot)
def add_stub_tool(body: Json, target: Target) -> None:
    """Copilot's Claude refuses calls in the history without `tools` (2025), as opencode says."""
    has_calls = bool(messages_of(body, "tool"))
    for message in messages_of(body, "assistant"):
        has_calls = has_calls or bool(message.get("tool_calls"))
    if has_calls and not body.get("tools"):
        function = {"name": STUB_NAME, "description": STUB_TEXT, "parameters": STUB_SCHEMA}
        body["tools"] = [{"type": "function", "function": copy_json(function)}]


@quirk(ChatCompletions, is_copilot)
def drop_strict(body: Json, target: Target) -> None:
    """Copilot's Claude and Gemini back ends refuse `strict` of a function (2026-08)."""
    if is_claude(target) or is_gemini(target):
        for function in functions_of(body, target):
            drop(function, "strict")


@quirk(ChatCompletions, is_copilot_gemini)
def drop_effort(body: Json, target: Target) -> None:
    """Copilot's Gemini has no efforts (2026), as opencode says."""
    drop(body, "reasoning_effort", "reasoning")


@quirk(ChatCompletions, is_copilot_gemini)
def say_media_type(body: Json, target: Target) -> None:
    """Copilot's Gemini: "image media type is required", beside the URL (2025)."""
    for part in objects_in(body.get("messages")):
        for image in objects([part.get("image_url")]):
            match = DATA_IMAGE.match(str(image.get("url")))
            if match is not None:
                image["media_type"] = match[1]


# -- Gemini, wherever it speaks /chat/completions


@quirk(ChatCompletions, is_gemini)
def say_system_to_gemini(body: Json, target: Target) -> None:
    """Gemini has no role `developer`, at Copilot neither (2026)."""
    say_system(body, target)


@quirk(ChatCompletions, is_gemini)
def name_results(body: Json, target: Target) -> None:
    """Gemini: "function_response.name: cannot be empty", also at Copilot (2025)."""
    names: dict[Any, Any] = {}  # of the functions, by the ids of their calls
    for message in objects(body.get("messages")):
        for call in objects(message.get("tool_calls")):
            function = call.get("function")
            if isinstance(function, dict):
                names[str(call.get("id"))] = function.get("name")
        name = names.get(str(message.get("tool_call_id")))
        if message.get("role") == "tool" and not message.get("name") and name:
            message["name"] = name


@quirk(ChatCompletions, is_gemini)
def simplify_schemas_for_gemini(body: Json, target: Target) -> None:
    """Gemini: a bare 400 for enums of numbers, lists of types, arrays without items (2026)."""
    for function in functions_of(body, target):
        for schema in schemas_in(function.get("parameters")):
            say_one_type(schema)
            say_enum_in_strings(schema)
            say_items(schema)
            require_what_is_there(schema)


def say_one_type(schema: Json) -> None:
    """Put the types of a list where Gemini wants them: null apart, others as alternatives."""
    types = schema.get("type")
    if not isinstance(types, list):
        return
    names = [name for name in types if name != "null"]
    if len(names) < len(types):
        schema["nullable"] = True
    del schema["type"]
    if len(names) == 1:
        schema["type"] = names[0]
    elif names:
        schema["anyOf"] = [{"type": name} for name in names]
    else:
        schema["type"] = "null"


def say_enum_in_strings(schema: Json) -> None:
    """Make the values of an enum strings; of an array it is dropped."""
    values = schema.get("enum")
    if not isinstance(values, list):
        return
    if schema.get("type") == "array":
        del schema["enum"]
        return
    schema["enum"] = [value if isinstance(value, str) else compact_json(value) for value in values]
    if schema.get("type") in ("integer", "number", "boolean"):
        schema["type"] = "string"


def say_items(schema: Json) -> None:
    """Say of an array what its items are: one schema."""
    say_one_schema_of_items(schema)
    if schema.get("type") == "array" and not schema.get("items"):
        schema["items"] = {"type": "string"}


def say_one_schema_of_items(schema: Json) -> None:
    """Put the first schema in the place of a list of them, one for each item."""
    items = schema.get("items")
    if isinstance(items, list):
        schema["items"] = items[0] if items else {}


def require_what_is_there(schema: Json) -> None:
    """Require no property that is not described, and none of what is no object."""
    properties = schema.get("properties")
    required = schema.get("required")
    if isinstance(required, list) and isinstance(properties, dict):
        schema["required"] = [name for name in required if str(name) in properties]
    if schema.get("type") not in (None, "object"):
        drop(schema, "properties", "required")


@quirk(ChatCompletions, is_google)
def drop_what_google_refuses(body: Json, target: Target) -> None:
    """Google: 'Unknown name "frequency_penalty": Cannot find field', and others (2025)."""
    drop(body, *GOOGLE_REFUSES)


# -- Mistral


@quirk(ChatCompletions, is_mistral)
def say_seed_and_choice_to_mistral(body: Json, target: Target) -> None:
    """Mistral calls the seed `random_seed`, and a call that must be "any" (2025)."""
    if "seed" in body:
        body["random_seed"] = body.pop("seed")
    if body.get("tool_choice") == "required":
        body["tool_choice"] = "any"


@quirk(ChatCompletions, is_mistral)
def shorten_ids_for_mistral(body: Json, target: Target) -> None:
    """Mistral: "Tool call id was X but must be a-z, A-Z, 0-9, with a length of 9" (2025)."""
    rename_chat_calls(body, CallIds(mistral_id))


def mistral_id(call_id: str) -> str:
    return call_id if MISTRAL_ID.fullmatch(call_id) else hashed(call_id, 9)


def rename_chat_calls(body: Json, ids: CallIds) -> None:
    for message in objects(body.get("messages")):
        for call in objects(message.get("tool_calls")):
            ids.call(call, "id")
        if message.get("role") == "tool":
            ids.result(message, "tool_call_id")


@quirk(ChatCompletions, is_mistral)
def answer_before_the_user(body: Json, target: Target) -> None:
    """Mistral: "Unexpected role 'user' after role 'tool'" (2025); opencode says "Done."."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return
    answered = []
    last_role = None
    for message in messages:
        role = message.get("role")
        if last_role == "tool" and role == "user":
            answered.append({"role": "assistant", "content": "Done."})
        answered.append(message)
        last_role = role
    body["messages"] = answered


@quirk(ChatCompletions, is_mistral)
def mark_prefix(body: Json, target: Target) -> None:
    """Mistral: "Expected last role User or Tool (or Assistant with prefix True)" (2025)."""
    if is_last_of_assistant(body):
        body["messages"][-1].setdefault("prefix", True)


@quirk(ChatCompletions, is_mistral)
def keep_what_mistral_takes(body: Json, target: Target) -> None:
    """Mistral: "Extra inputs are not permitted" for each field that it does not know (2025)."""
    keep_only(body, MISTRAL_TAKES)
    for message in objects(body.get("messages")):
        taken = MISTRAL_MESSAGE_TAKES.get(str(message.get("role")))
        if taken is not None:
            keep_only(message, taken)


# -- DeepSeek, Kimi, xAI, Groq, Cerebras


@quirk(ChatCompletions, is_deepseek)
def say_that_deepseek_reasoned(body: Json, target: Target) -> None:
    """DeepSeek: "`reasoning_content`... must be passed back to the API"; "" will do (2026)."""
    for message in messages_of(body, "assistant"):
        message.setdefault("reasoning_content", "")


@quirk(ChatCompletions, is_moonshot)
def say_that_kimi_reasoned(body: Json, target: Target) -> None:
    """Kimi: "reasoning_content is missing in assistant tool call message"; not "" (2026)."""
    for message in messages_of(body, "assistant"):
        if message.get("tool_calls"):
            message.setdefault("reasoning_content", NO_REASONING)


@quirk(ChatCompletions, is_moonshot)
def say_thinking_once(body: Json, target: Target) -> None:
    """Kimi: "cannot specify both 'thinking' and 'reasoning_effort'" (2026)."""
    if "thinking" in body:
        drop(body, "reasoning_effort")


@quirk(ChatCompletions, is_kimi)
def simplify_schemas_for_kimi(body: Json, target: Target) -> None:
    """Kimi refuses what stands beside a `$ref`, and lists of items (2025), as opencode says."""
    for function in functions_of(body, target):
        for schema in schemas_in(function.get("parameters")):
            if isinstance(schema.get("$ref"), str):
                keep_only(schema, ("$ref",))
            say_one_schema_of_items(schema)


@quirk(ChatCompletions, is_xai)
def drop_what_grok_refuses(body: Json, target: Target) -> None:
    """xAI: "Argument not supported on this model: presencePenalty", nor `stop` (2025)."""
    drop(body, "presence_penalty", "frequency_penalty", "stop")


@quirk(ChatCompletions, is_xai)
def drop_effort_of_grok(body: Json, target: Target) -> None:
    """xAI: grok-4, its fast ones and grok-3 refuse `reasoning_effort` (2025)."""
    name = target.model.bare_name
    if re.fullmatch(r"grok-(4(-\d{4}|-fast.*|-1-fast.*)?|3|code-fast-1)", name):
        drop(body, "reasoning_effort")


@quirk(ChatCompletions, is_groq_or_cerebras)
def drop_reasoning(body: Json, target: Target) -> None:
    """Groq and Cerebras: "property 'reasoning_content' is unsupported" on messages (2025)."""
    for message in objects(body.get("messages")):
        keep_only(message, PLAIN_MESSAGE)
        for call in objects(message.get("tool_calls")):
            drop(call, "extra_content")


# -- /responses


@quirk(Responses, takes_no_sampling)
def drop_sampling(body: Json, target: Target) -> None:
    """Models that the catalog says so of refuse `temperature` and `top_p` (2025)."""
    drop(body, "temperature", "top_p")


@quirk(Responses, always)
def raise_max_output_tokens(body: Json, target: Target) -> None:
    """OpenAI refuses less than 16 on /responses; apps try with 1 or 5 (2025)."""
    limit = body.get("max_output_tokens")
    if limit is not None:
        body["max_output_tokens"] = max(limit, MIN_RESPONSES_TOKENS)


@quirk(Responses, always)
def shorten_call_ids(body: Json, target: Target) -> None:
    """OpenAI, Copilot: "'input[1].call_id': string too long", more than 64 (2026)."""
    ids = CallIds(lambda call_id: short_id(call_id, MAX_CALL_ID_CHARACTERS))
    for item in objects(body.get("input")):
        if str(item.get("type")).endswith("_output"):
            ids.result(item, "call_id")
        else:
            ids.call(item, "call_id")


def short_id(call_id: str, limit: int) -> str:
    """Return the id of a call, another one where it is empty or has more characters."""
    if 0 < len(call_id) <= limit:
        return call_id
    return "call_" + hashed(call_id, 24)


@quirk(ChatCompletions, is_openai_or_copilot)
def shorten_chat_call_ids(body: Json, target: Target) -> None:
    """OpenAI, Copilot: "'messages[1].tool_calls[0].id': string too long", more than 40 (2025)."""
    ids = CallIds(lambda call_id: short_id(call_id, MAX_CHAT_CALL_ID_CHARACTERS))
    rename_chat_calls(body, ids)


@quirk(Responses, always)
def drop_reasoning_of_nothing(body: Json, target: Target) -> None:
    """OpenAI: "'reasoning' was provided without its required following item" (2025)."""
    items = body.get("input")
    if not isinstance(items, list):
        return
    kept: list[Json] = []
    role = "user"  # of what follows
    for item in reversed(items):
        is_reasoning = item.get("type") == "reasoning"
        if not is_reasoning:
            role = item.get("role") or "assistant"
        if not is_reasoning or role == "assistant":
            kept.append(item)
    kept.reverse()
    body["input"] = kept


@quirk(Responses, always)
def summarize_reasoning(body: Json, target: Target) -> None:
    """OpenAI: "Missing required parameter" for a reasoning without `summary` (2025)."""
    for item in objects(body.get("input")):
        if item.get("type") == "reasoning":
            item.setdefault("summary", [])


@quirk(Responses, is_copilot)
def drop_item_ids(body: Json, target: Target) -> None:
    """Copilot refuses ids of items, longer than 64, "", or not with their content (2026)."""
    for item in objects(body.get("input")):
        if item.get("type") != "item_reference":
            drop(item, "id")


@quirk(Responses, is_copilot)
def keep_what_copilot_takes(body: Json, target: Target) -> None:
    """Copilot: "service_tier is not supported"; it knows no `client_metadata` (2026)."""
    keep_only(body, COPILOT_RESPONSES_TAKES)


@quirk(Responses, is_copilot)
def drop_image_generation(body: Json, target: Target) -> None:
    """Copilot: "The requested tool image_generation is not supported" (2026)."""
    tools = body.get("tools")
    if not isinstance(tools, list):
        return
    body["tools"] = [tool for tool in tools if tool.get("type") != "image_generation"]
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "image_generation":
        body["tool_choice"] = "auto"


@quirk(Responses, is_copilot)
def drop_tools_that_are_none(body: Json, target: Target) -> None:
    """Copilot and OpenAI refuse a choice of tools where there are none (2025)."""
    if "tools" in body and not body["tools"]:
        drop(body, "tools", "tool_choice", "parallel_tool_calls")


@quirk(Responses, is_copilot)
def describe_namespaces(body: Json, target: Target) -> None:
    """Some of Copilot's back ends refuse a namespace, as Codex has, that says nothing (2026)."""
    for tool in objects(body.get("tools")):
        if tool.get("type") == "namespace" and not tool.get("description"):
            tool["description"] = str(tool.get("name"))


@quirk(Responses, is_copilot)
def say_detail_low_or_high(body: Json, target: Target) -> None:
    """gpt-5.5 at Copilot: "image detail has to be either 'low' or 'high'" (2026)."""
    for part in objects_in(body.get("input")):
        if part.get("type") == "input_image" and part.get("detail") not in ("low", "high"):
            drop(part, "detail")


# -- chatgpt.com, /responses


@quirk(Responses, is_chatgpt)
def say_input_as_list(body: Json, target: Target) -> None:
    """chatgpt.com: "Input must be a list" (2025)."""
    text = body.get("input")
    if isinstance(text, str):
        content = [{"type": "input_text", "text": text}]
        body["input"] = [{"role": "user", "content": content}]


@quirk(Responses, is_chatgpt)
def take_system_messages_as_instructions(body: Json, target: Target) -> None:
    """chatgpt.com: "System messages are not allowed"; it has `instructions` (2025)."""
    items = body.get("input")
    if not isinstance(items, list):
        return
    for item in items:
        if item.get("role") == "system":
            item["role"] = "developer"
    if body.get("instructions"):
        return
    texts = []
    while len(items) > 1 and is_developer_message(items[0]):
        texts.append(responses_text(items.pop(0)))
    body["instructions"] = "\n\n".join(texts)


def is_developer_message(item: Json) -> bool:
    """Tell whether an item is a message; Codex also sends tools under the role "developer"."""
    return item.get("type", "message") == "message" and item.get("role") == "developer"


@quirk(Responses, is_chatgpt)
def add_instructions(body: Json, target: Target) -> None:
    """chatgpt.com: "Instructions are required" (2025)."""
    if not body.get("instructions"):
        body["instructions"] = INSTRUCTIONS


@quirk(Responses, is_chatgpt)
def store_nothing(body: Json, target: Target) -> None:
    """chatgpt.com: "Store must be set to false" (2025)."""
    body["store"] = False


@quirk(Responses, is_chatgpt)
def stream_always(body: Json, target: Target) -> None:
    """chatgpt.com: "Stream must be set to true" (2025)."""
    body["stream"] = True


@quirk(Responses, is_chatgpt)
def keep_what_chatgpt_takes(body: Json, target: Target) -> None:
    """chatgpt.com: "Unsupported parameter" for what a subscription cannot choose (2025)."""
    keep_only(body, CHATGPT_TAKES)


def responses_text(item: Json) -> str:
    """Return the text of an input message."""
    content = item.get("content")
    if not isinstance(content, list):
        return str(content)
    return "\n\n".join(str(part.get("text", "")) for part in content)


# -- /messages: the conversation


@quirk(Messages, always)
def put_system_messages_into_turns(body: Json, target: Target) -> None:
    """Anthropic: 'Unexpected role "system"', which Claude Code sends since 2.1.154 (2026)."""
    turns: list[Json] = []
    system: list[Json] = []  # of messages before the first turn
    for message in body["messages"]:
        if message.get("role") not in SYSTEM_ROLES:
            turns.append(message)
        elif not turns:
            system += blocks_in(message)
        else:
            add_reminders(turns, message)
    if system:
        body["system"] = [*content_blocks(body.get("system")), *system]
    body["messages"] = turns


def add_reminders(turns: list[Json], message: Json) -> None:
    """Add what a system's message says to the last turn, or in a new one of the user."""
    if turns[-1].get("role") != "user":
        turns.append({"role": "user", "content": []})
    turn = turns[-1]
    if isinstance(turn["content"], str):
        turn["content"] = content_blocks(turn["content"])
    turn["content"] += [as_reminder(block) for block in blocks_in(message)]


def content_blocks(content: Any) -> list[Json]:
    """Return a content as blocks, be it a string or blocks already."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return objects(content)


def blocks_in(message: Json) -> list[Json]:
    return content_blocks(message.get("content"))


def as_reminder(block: Json) -> Json:
    """Return what a system's block says as the user's turn has it."""
    if block.get("type") != "text":
        return block
    text = f"<system-reminder>\n{block.get('text')}\n</system-reminder>"
    return {**block, "text": text}


@quirk(Messages, is_copilot)
def say_references_as_text(body: Json, target: Target) -> None:
    """Copilot: "Input tag 'tool_reference' found", in results of a search of tools (2026)."""
    for block in objects_in(body["messages"]):
        if block.get("type") == "tool_reference":
            name = block.get("tool_name")
            block.clear()
            block.update({"type": "text", "text": f"[tool: {name}]"})


@quirk(Messages, always)
def drop_blocks_that_say_nothing(body: Json, target: Target) -> None:
    """Anthropic: "text content blocks must be non-empty", nor only white (2024)."""
    turns = []
    for message in body["messages"]:
        message["content"] = without_empty(message["content"])
        for block in objects(message["content"]):
            if block.get("type") == "tool_result" and isinstance(block.get("content"), list):
                block["content"] = without_empty(block["content"])
        if message["content"]:
            turns.append(message)
    body["messages"] = turns
    if "system" in body:
        body["system"] = without_empty(body["system"])
        if not body["system"]:
            del body["system"]


def without_empty(content: Any) -> Any:
    """Return a content without blocks of text or thinking that have neither word nor signature."""
    if isinstance(content, str):
        return content if content.strip() else ""
    if not isinstance(content, list):
        return content
    kept = []
    for block in content:
        name = {"text": "text", "thinking": "thinking"}.get(str(block.get("type")))
        text = block.get(name) if name else None
        is_empty = name is not None and not str(text or "").strip()
        if not is_empty or is_signed(block):
            kept.append(block)
    return kept


@quirk(Messages, always)
def say_ids_once(body: Json, target: Target) -> None:
    """Anthropic: "tool_use ids must be unique", and match '^[a-zA-Z0-9_-]+$' (2025)."""
    ids = CallIds(claude_id)
    for block in blocks_of(body, "tool_use", "tool_result"):
        if block["type"] == "tool_use":
            ids.call(block, "id")
        else:
            ids.result(block, "tool_use_id")


def claude_id(call_id: str) -> str:
    """Return the id of a call in the characters that Anthropic takes."""
    return re.sub("[^a-zA-Z0-9_-]|^$", "_", call_id)


@quirk(Messages, takes_no_prefill)
def end_with_the_user(body: Json, target: Target) -> None:
    """Claude 4.6 and newer: "does not support assistant message prefill" (2026)."""
    if is_last_of_assistant(body):
        body["messages"].append({"role": "user", "content": CONTINUE})


@quirk(Messages, always)
def strip_end_of_prefill(body: Json, target: Target) -> None:
    """Anthropic: "final assistant content cannot end with trailing whitespace" (2024)."""
    if not is_last_of_assistant(body):
        return
    last = body["messages"][-1]
    if isinstance(last["content"], str):
        last["content"] = last["content"].rstrip()
    elif last["content"] and last["content"][-1].get("type") == "text":
        block = last["content"][-1]
        block["text"] = str(block.get("text", "")).rstrip()


# -- /messages: thinking and sampling


def thinking_type(body: Json) -> str:
    """Return how Claude is told to think, "" where nothing is said."""
    thinking = body.get("thinking")
    return str(thinking.get("type")) if isinstance(thinking, dict) else ""


def is_thinking(body: Json) -> bool:
    return thinking_type(body) in ("enabled", "adaptive")


def forces_tool(body: Json) -> bool:
    choice = body.get("tool_choice")
    return isinstance(choice, dict) and choice.get("type") in ("any", "tool")


def stop_thinking(body: Json) -> None:
    """Leave out `thinking`, and the edits of the conversation that need it."""
    del body["thinking"]
    management = body.get("context_management")
    if not isinstance(management, dict):
        return
    kept = []
    for edit in objects(management.get("edits")):
        if not str(edit.get("type")).startswith("clear_thinking"):
            kept.append(edit)
    management["edits"] = kept
    if not kept:
        del body["context_management"]


def first_block(message: Json) -> str:
    """Return the type of a turn's first block, "text" where its content is a string."""
    content = message["content"]
    if not isinstance(content, list) or not content:
        return "text"
    return str(content[0].get("type"))


@quirk(Messages, calls_no_tool_by_force)
def choose_no_tool_by_force(body: Json, target: Target) -> None:
    """Fable and Mythos 5.1: 'tool_choice: type "tool" and "any" are not supported' (2026)."""
    if forces_tool(body):
        choice = body["tool_choice"]
        choice["type"] = "auto"
        drop(choice, "name")


@quirk(Messages, thinks_always)
def think_even_if_told_not_to(body: Json, target: Target) -> None:
    """Fable and Mythos refuse `thinking: disabled` (2026)."""
    if thinking_type(body) == "disabled":
        stop_thinking(body)


@quirk(Messages, thinks_as_it_likes)
def think_without_budget(body: Json, target: Target) -> None:
    """Claude 4.7 and newer refuse `enabled` with a budget; they show no thinking unless asked."""
    if thinking_type(body) == "enabled":
        body["thinking"] = {"type": "adaptive", "display": "summarized"}


@quirk(Messages, thinks_by_budget)
def think_with_budget(body: Json, target: Target) -> None:
    """Claude 4.5 and older refuse `adaptive`, which Claude Code sends to any (2026)."""
    if thinking_type(body) != "adaptive":
        return
    budget = min(int(body.get("max_tokens") or 0) // 2, MAX_THINKING_TOKENS)
    if budget < MIN_THINKING_TOKENS:
        stop_thinking(body)
    else:
        body["thinking"] = {"type": "enabled", "budget_tokens": budget}


@quirk(Messages, always)
def think_only_with_earlier_thinking(body: Json, target: Target) -> None:
    """Claude, told to think, refuses a result whose call has no thinking before it (2025)."""
    if thinking_type(body) != "enabled":
        return
    messages = body["messages"]
    if not messages or first_block(messages[-1]) != "tool_result":
        return
    if len(messages) < 2 or first_block(messages[-2]) not in ("thinking", "redacted_thinking"):
        stop_thinking(body)


@quirk(Messages, always)
def think_only_unforced(body: Json, target: Target) -> None:
    """Anthropic: "Thinking may not be enabled when tool_choice forces tool use" (2025)."""
    if is_thinking(body) and (forces_tool(body) or is_last_of_assistant(body)):
        stop_thinking(body)


@quirk(Messages, takes_no_sampling)
def drop_sampling_of_claude(body: Json, target: Target) -> None:
    """Models that the catalog says so of refuse `temperature` and `top_p` (2026)."""
    drop(body, "temperature", "top_p")


@quirk(Messages, thinks_as_it_likes)
def drop_sampling_of_new_claude(body: Json, target: Target) -> None:
    """Claude 4.7 and newer: "temperature is deprecated for this model"; all three (2026)."""
    drop(body, "temperature", "top_p", "top_k")


@quirk(Messages, always)
def drop_sampling_while_thinking(body: Json, target: Target) -> None:
    """Claude, told to think, takes no `temperature` but 1, and nearly no `top_p` (2025)."""
    if is_thinking(body):
        drop(body, "temperature", "top_p", "top_k")


@quirk(Messages, always)
def choose_temperature_or_top_p(body: Json, target: Target) -> None:
    """Claude since 4.1: "`temperature` and `top_p` cannot both be specified" (2025)."""
    if body.get("temperature") is not None:
        drop(body, "top_p")


@quirk(Messages, is_claude)
def keep_to_output_limit(body: Json, target: Target) -> None:
    """Claude: "max_tokens: 64000 > 32000, which is the maximum allowed" (2025)."""
    limit = target.model.output_limit
    requested = body.get("max_tokens")
    if limit and requested is not None:
        body["max_tokens"] = min(requested, limit)


@quirk(Messages, is_claude)
def think_less_than_may_be_said(body: Json, target: Target) -> None:
    """Claude: "max_tokens must be greater than thinking.budget_tokens", at least 1024 (2025)."""
    limit = body.get("max_tokens")
    if thinking_type(body) != "enabled" or limit is None:
        return
    budget = body["thinking"].get("budget_tokens")
    if not isinstance(budget, int) or budget < limit:
        return
    if limit <= MIN_THINKING_TOKENS:
        stop_thinking(body)
    else:
        body["thinking"]["budget_tokens"] = limit - 1


# -- /messages: tools and schemas


@quirk(Messages, always)
def open_schemas_of_tools(body: Json, target: Target) -> None:
    """Anthropic: "does not support oneOf, allOf, or anyOf at the top level" (2025)."""
    for tool in functions_of(body, target):
        schema = tool["input_schema"]
        if not isinstance(schema, dict):
            continue
        schema["type"] = "object"
        if not isinstance(schema.get("properties"), dict):
            schema["properties"] = {}
        for name in COMBINERS:
            for branch in objects(schema.pop(name, None)):
                add_branch(schema, branch, is_needed=name == "allOf")


def add_branch(schema: Json, branch: Json, is_needed: bool) -> None:
    """Add the properties of one alternative, or of one part, to those of an object."""
    properties = branch.get("properties")
    if isinstance(properties, dict):
        for name, described in properties.items():
            schema["properties"].setdefault(name, described)
    required = branch.get("required")
    if is_needed and isinstance(required, list):
        if not isinstance(schema.get("required"), list):
            schema["required"] = []
        schema["required"] += required


@quirk(Messages, is_copilot)
def drop_fields_of_tools(body: Json, target: Target) -> None:
    """Copilot: "tools.0.custom.eager_input_streaming: Extra inputs are not permitted" (2026)."""
    for tool in objects(body.get("tools")):
        drop(tool, *COPILOT_TOOL_REFUSES)
        if isinstance(tool.get("input_schema"), dict):
            drop(tool["input_schema"], "$schema")


@quirk(Messages, is_claude)
def simplify_strict_tools(body: Json, target: Target) -> None:
    """Anthropic: "tools.0.custom: For 'array' type, property 'maxItems' is not supported"."""
    for tool in functions_of(body, target):
        if tool.get("strict"):
            simplify_for_claude(tool["input_schema"])


@quirk(Messages, is_claude)
def simplify_schema_of_answer(body: Json, target: Target) -> None:
    """Anthropic: "For 'integer' type, property 'minimum' is not supported" (2025-11)."""
    config = body.get("output_config")
    for holder in (body.get("output_format"), (config or {}).get("format")):
        if isinstance(holder, dict):
            simplify_for_claude(holder.get("schema"))


def simplify_for_claude(schema: Any) -> None:
    """Close every object, and let descriptions say what Anthropic's grammar cannot."""
    for node in schemas_in(schema):
        if isinstance(node.get("$ref"), str) and node is not schema:
            keep_only(node, ("$ref",))
            continue
        if "oneOf" in node:
            node.setdefault("anyOf", node.pop("oneOf"))
        describe_rest(node)
        if node.get("type") == "object" or "properties" in node:
            node["additionalProperties"] = False


def describe_rest(schema: Json) -> None:
    """Move what Anthropic's grammar lacks into the description."""
    texts = [schema["description"]] if isinstance(schema.get("description"), str) else []
    size = len(texts)
    for name in list(schema):
        value = schema[name]
        is_known = name in CLAUDE_SCHEMA_TAKES
        if name == "format":
            is_known = value in CLAUDE_STRING_FORMATS
        if not is_known:
            del schema[name]
            texts.append(f"{name}: {compact_json(value)}")
    if len(texts) > size:
        schema["description"] = "; ".join(texts)


@quirk(Messages, is_copilot)
def add_stub_tool_for_claude(body: Json, target: Target) -> None:
    """Copilot's Claude refuses calls in the history without `tools` (2025), as opencode says."""
    if blocks_of(body, "tool_use", "tool_result") and not body.get("tools"):
        tool = {"name": STUB_NAME, "description": STUB_TEXT, "input_schema": STUB_SCHEMA}
        body["tools"] = [copy_json(tool)]


# -- /messages: marks for the cache, and fields


@quirk(Messages, is_copilot)
def put_mark_on_last_block(body: Json, target: Target) -> None:
    """Copilot: "cache_control: Extra inputs are not permitted" on top of a body (2026)."""
    mark = body.pop("cache_control", None)
    blocks = blocks_of(body, "text", "image", "document", "tool_use", "tool_result")
    if isinstance(mark, dict) and blocks:
        blocks[-1].setdefault("cache_control", mark)


@quirk(Messages, always)
def mark_results_as_whole(body: Json, target: Target) -> None:
    """Anthropic: "cache_control may not be specified within tool_result.content" (2026)."""
    for result in blocks_of(body, "tool_result"):
        for block in objects(result.get("content")):
            mark = block.pop("cache_control", None)
            if mark:
                result.setdefault("cache_control", mark)


@quirk(Messages, is_copilot)
def mark_plainly(body: Json, target: Target) -> None:
    """Copilot: "cache_control.ephemeral.scope: Extra inputs are not permitted", nor ttl (2026)."""
    for holder in marked_in(body):
        holder["cache_control"] = {"type": "ephemeral"}


@quirk(Messages, always)
def keep_four_marks(body: Json, target: Target) -> None:
    """Anthropic: "A maximum of 4 blocks with cache_control may be provided" (2024)."""
    holders = marked_in(body)
    for holder in holders[1 : len(holders) - MAX_CACHE_MARKS + 1]:
        del holder["cache_control"]  # the first is that of tools or system, the last are new


def marked_in(body: Json) -> list[Json]:
    """Return what is marked for the cache, in the order of the prompt."""
    holders = [*objects(body.get("tools")), *objects(body.get("system"))]
    for message in objects(body.get("messages")):
        holders += objects(message.get("content"))
    return [holder for holder in holders if isinstance(holder.get("cache_control"), dict)]


@quirk(Messages, is_copilot)
def drop_speed(body: Json, target: Target) -> None:
    """Copilot does not know Anthropic's `speed` (2026)."""
    drop(body, "speed")


# -- headers of requests that are passed through


def repair_headers(headers: dict[str, str], body: Json, target: Target) -> dict[str, str]:
    """Return the client's headers as a service takes them, to be sent besides opencode's.

    Copilot: "unsupported beta header(s): context-1m-2025-08-07"; it takes the three that VS Code
    sends, and `context_management` in a body only with the beta of it (2026).
    """
    if not is_copilot(target):
        return headers
    repaired = {**headers}
    betas = [beta.strip() for beta in repaired.pop("anthropic-beta", "").split(",")]
    if "context_management" in body:
        betas.append(CONTEXT_BETA)
    kept = [beta for beta in COPILOT_BETAS if beta in betas]
    if kept:
        repaired["anthropic-beta"] = ",".join(kept)
    return repaired


# ---------------------------------------------------------------------------------------- thoughts
# What a provider gives along with a call, and wants to see again when the call's result comes:
# thinking blocks with signatures, encrypted reasoning, thought signatures. Clients of chat
# completions have no place for it, so the proxy remembers. A decoder stores, an encoder of the same
# model puts back; where nothing is known, all is as if there were no thoughts.


class Thoughts:
    """Remembers what stood before a call, by the model and the id of the call.

    In memory only, bounded by bytes and age; the oldest go first. Ids of calls are the providers'
    random ones, so nobody reaches another's; where they may not be, `thought_key` adds to them what
    is called. `_lock` protects everything: turns of all threads store and recall.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, str], tuple[float, str]] = {}  # when, as JSON; oldest first
        self._size = 0  # characters of all

    def store(self, model: str, call_id: str, thought: Json) -> None:
        """Remember `thought`, what belongs to the call `call_id` of `model`."""
        text = json.dumps(thought)
        if not thought or not call_id or len(text) > MAX_THOUGHT_BYTES:
            return
        key = (model, call_id)
        with self._lock:
            self._forget(key)
            self._entries[key] = (time.monotonic(), text)
            self._size += len(text)
            self._trim()

    def recall(self, model: str, call_id: str) -> Json:
        """Return what belongs to a call, {} where nothing is known."""
        with self._lock:
            self._trim()
            _, text = self._entries.get((model, call_id), (0.0, "{}"))
        thought: Json = json.loads(text)
        return thought

    def _forget(self, key: tuple[str, str]) -> None:
        _, text = self._entries.pop(key, (0.0, ""))
        self._size -= len(text)

    def _trim(self) -> None:
        """Forget what is too old, or too much, the oldest first."""
        too_old = time.monotonic() - THOUGHT_SECONDS
        while self._entries:
            key, (stored_at, _) = next(iter(self._entries.items()))
            if stored_at > too_old and self._size <= MAX_THOUGHTS_BYTES:
                return
            self._forget(key)


# ----------------------------------------------------------------------------------------- exchange
# What one choice says to the provider and understands of its answer, as the plugin reports it: a
# ChatExchange in the wire format that opencode uses, a NativeExchange in the client's own.


BLANKS = "\ufeff \t\r\n"  # before a JSON text: gateways send some while they wait for it
SSE_FIELD = re.compile("(data|event|id|retry|):")


class BodyReader:
    """Finds the data in the body of an answer: the events of a stream, or one JSON text.

    Which of the two it is, its first character tells. What is neither, a page or a sentence of a
    gateway, `rubbish` returns.
    """

    def __init__(self) -> None:
        self._sse = SSEReader()
        self._first = ""  # character that is no blank
        self._pieces: list[str] = []  # of the JSON text, or of what has no data yet
        self._size = 0  # of these
        self._has_data = False
        self.is_cut = False  # it has ended in the middle of an event

    def feed(self, text: str) -> list[str]:
        """Return the data that `text` completes; raise APIError where it is too large."""
        if not self._first:
            self._first = text.lstrip(BLANKS)[:1]
        if self._is_json:
            self._keep(text)
            if self._size > MAX_EVENT_BYTES:
                raise APIError(502, TOO_LARGE, code="incomplete_answer")
            return []
        if not self._has_data and self._size < MAX_ERROR_CHARACTERS:
            self._keep(text)
        if self._first == "<":  # a page
            return []
        return self._note(self._sse.feed(text))

    def end(self) -> list[str]:
        """Return what the end of the body completes."""
        if self._is_json:
            return ["".join(self._pieces).lstrip(BLANKS)]
        is_half_way = not self._sse.is_between_events
        data = self._note(self._sse.end())
        self.is_cut = is_half_way and not data
        return data

    @property
    def rubbish(self) -> str:
        """What a body says that has no data at all."""
        if self._has_data or self._is_json:
            return ""
        lines = "".join(self._pieces).splitlines()
        return "\n".join(line for line in lines if not SSE_FIELD.match(line)).strip(BLANKS)

    @property
    def _is_json(self) -> bool:
        return self._first in ("{", "[")

    def _keep(self, text: str) -> None:
        self._size += len(text)
        self._pieces.append(text)

    def _note(self, data: list[str]) -> list[str]:
        if data and not self._has_data:
            self._has_data = True
            self._pieces.clear()
        return data


class StopSequences:
    """Cuts a text that comes in pieces at a stop sequence, and holds back what may be one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self.held = ""  # what may be the beginning of one
        self.is_cut = False

    def before(self, text: str) -> str:
        """Return what of the text held back and of `text` is before any of the sequences."""
        text = self.held + text
        ends = []
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0:
                ends.append((start + len(stop), start))
        if ends:
            self.is_cut = True
            self.held = ""
            _, start = min(ends)  # the first that is whole
            return text[:start]

        held_size = max(self._size_of_beginning(stop, text) for stop in self._stops)
        shown_size = len(text) - held_size
        self.held = text[shown_size:]
        return text[:shown_size]

    @staticmethod
    def _size_of_beginning(stop: str, text: str) -> int:
        """Return how much of `stop` the text ends with."""
        for size in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:size]):
                return size
        return 0


MAX_FENCE_CHARACTERS = 64  # of a fence's line with the blanks around it
FENCE_LINE = re.compile(r"\s*```(?i:json)?[ \t\r]*\n")
MAY_BE_FENCE_LINE = re.compile(r"\s*(`{0,3}|```(?i:j|js|jso|json)?[ \t\r]*)")
FENCE_END_CHARACTERS = "` \t\r\n"


class Fence:
    """Removes a fence of Markdown around a whole text that comes in pieces.

    Claude puts one around the JSON object that it was told to give. Held back are the beginning
    while it may be a fence's line, and an end that may be the closing one.
    """

    def __init__(self) -> None:
        self._held = ""
        self._is_begun = False  # the first line is known
        self._is_fenced = False

    def feed(self, text: str) -> str:
        """Return what can be shown now."""
        self._held += text
        if not self._is_begun:
            fence = FENCE_LINE.match(self._held)
            is_short = len(self._held) <= MAX_FENCE_CHARACTERS
            if fence is None and is_short and MAY_BE_FENCE_LINE.fullmatch(self._held):
                return ""
            self._is_begun = True
            self._is_fenced = fence is not None
            if fence is not None:
                self._held = self._held[fence.end() :]
        size = len(self._held)
        if self._is_fenced:
            end = len(self._held.rstrip(FENCE_END_CHARACTERS))
            size = max(end, size - MAX_FENCE_CHARACTERS)
        shown = self._held[:size]
        self._held = self._held[size:]
        return shown

    def end(self) -> str:
        """Return what remains, less the closing fence."""
        rest = self._held
        self._held = ""
        if self._is_fenced and rest.strip() == "```":
            return ""
        return rest


class Exchange(abc.ABC):
    """One choice's words to the provider, and what its answer means.

    A turn calls it as the plugin reports: `conversation`, `body`, then `begin`, `feed` for each
    piece and `end`, or `refused`. `headers` are to be sent besides opencode's. The last event has a
    finish_reason. What its methods raise, APIError, ends the turn.
    """

    headers: Mapping[str, str]

    @property
    def patience(self) -> float | None:
        """The seconds that the rest of a finished answer is worth, None before it is finished."""
        return None

    @abc.abstractmethod
    def conversation(self, is_foreign: bool) -> Json:
        """Return what the plugin tells opencode of the conversation; raise APIError 400."""

    @abc.abstractmethod
    def body(self, url: str, theirs: Json) -> bytes | None:
        """Return the body to send to `url` in place of `theirs`, which is opencode's own.

        None where only opencode knows the wire format: then it sends its own.
        """

    @abc.abstractmethod
    def begin(self, status: int, headers: Json) -> Iterator[Any]:
        """Yield what the head of the provider's answer means."""

    @abc.abstractmethod
    def feed(self, text: str) -> Iterator[Any]:
        """Yield the events in a piece of the answer."""

    @abc.abstractmethod
    def end(self) -> Iterator[Any]:
        """Yield the last events, at the end of the provider's answer or of the patience with it."""

    @abc.abstractmethod
    def refused(self, status: int, headers: Json, body: str) -> Iterator[Any]:
        """Yield what the provider's refusal means, or raise it as an APIError."""

    def report(self, params: Json) -> Iterator[Any]:
        """Yield the events in a report of the plugin on an answer that opencode reads."""
        return iter(())


class ChatExchange(Exchange):
    """A chat completion, in the wire format that opencode uses for the model.

    Not every format cuts at stop sequences, so this does. An answer without a reason to finish is
    complete where the provider says so in another way: by `[DONE]`, or by the proper end of a body
    in which nothing is half-way. The end of a body without a length or chunks proves nothing: a
    connection that drops looks the same.
    """

    def __init__(
        self, request: ChatRequest, model: Model, thoughts: Thoughts | None = None
    ) -> None:
        self.headers: dict[str, str] = {}  # to send besides opencode's
        self._request = request
        self._model = model
        self._thoughts = thoughts
        self._format: WireFormat | OpencodeFormat = OpencodeFormat()
        self._body = BodyReader()
        self._stops = StopSequences(request.stop)
        self._fence: Fence | None = None
        self._is_framed = True  # the end of the body is told from a dropped connection
        self._is_over = False

    def conversation(self, is_foreign: bool) -> Json:
        if is_foreign:
            return foreign_conversation(self._request)
        return chat_conversation(self._request)

    def body(self, url: str, theirs: Json) -> bytes | None:
        target = target_of(url, self._model)
        if target is None:
            return None
        self._format = target.wire_format(self._request, target, self._thoughts)
        if target.wire_format is Messages and wants_json_object(self._request):
            self._fence = Fence()
        body: bytes = self._format.body(theirs)
        return body

    def begin(self, status: int, headers: Json) -> Iterator[Event]:
        self._is_framed = "content-length" in headers or "transfer-encoding" in headers
        return iter(())

    def feed(self, text: str) -> Iterator[Event]:
        for data in self._body.feed(text):
            yield from self._shown(self._format.events(data))

    def report(self, params: Json) -> Iterator[Event]:
        if isinstance(self._format, OpencodeFormat):
            yield from self._shown(self._format.report(params))

    def end(self) -> Iterator[Event]:
        for data in self._body.end():
            yield from self._shown(self._format.events(data))
        if self._body.rubbish:
            raise upstream_error(200, {}, self._body.rubbish)
        if self._stops.is_cut:
            self._format.finish_reason = "stop"  # the provider may not have come to say it
        is_proven = self._is_framed and self._format.is_between_parts and not self._body.is_cut
        yield from self._shown(self._format.end(is_proven))

    def refused(self, status: int, headers: Json, body: str) -> Iterator[Event]:
        raise upstream_error(status, headers, body)

    @property
    def patience(self) -> float | None:
        if self._stops.is_cut:
            wants_usage = self._request.include_usage or not self._request.stream
            return CUT_SECONDS if wants_usage else 0.0
        return FINISH_SECONDS if self._format.is_finished else None

    def _shown(self, events: Iterator[Event]) -> Iterator[Event]:
        """Yield the events less what is behind a stop sequence; nothing once the last has come."""
        for event in events:
            if self._is_over:
                return
            if event.finish_reason is not None:
                self._is_over = True
                yield from self._last(event)
            elif not self._stops.is_cut:
                yield self._before_stop(event)

    def _before_stop(self, event: Event) -> Event:
        text = event.delta.get("content")
        if not text or not (self._request.stop or self._fence):
            return event
        if self._fence is not None:
            text = self._fence.feed(text)
        if self._request.stop:
            text = self._stops.before(text)
        return event._replace(delta={**event.delta, "content": text})

    def _last(self, event: Event) -> Iterator[Event]:
        if self._fence is not None and not self._stops.is_cut:
            rest = Event({"content": self._fence.end()})
            self._fence = None  # the rest has passed it, and has only stop sequences to pass
            yield self._before_stop(rest)
        if self._stops.held:
            yield Event({"content": self._stops.held})
        if self._stops.is_cut:
            event = event._replace(finish_reason="stop")
        yield event


class NativeRequest(NamedTuple):
    """A request in a wire format's own words, to be passed through; `headers` go with it."""

    body: Json
    wire_format: type[WireFormat]
    model: str | None
    headers: dict[str, str]
    choices: int = 1


class Piece(NamedTuple):
    """A piece of an answer that is passed through: the first is its head, the last says "stop"."""

    text: str = ""
    status: int = 0
    headers: Any = None
    finish_reason: str | None = None


# What quirks rely on in a body that is passed through; a null is the provider's to judge.
NATIVE_FIELDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "messages": (list,),
    "input": (str, list),
    "system": (str, list),
    "instructions": (str, list),
    "tools": (list,),
    "tool_choice": (str, dict),
    "thinking": (dict,),
    "reasoning": (dict,),
    "text": (dict,),
    "output_config": (dict,),
    "max_tokens": (int,),
    "max_output_tokens": (int,),
    "temperature": (float,),
    "top_p": (float,),
}
NEEDS_STORE = ("previous_response_id", "conversation", "background", "store")
PASSED_ANSWER_HEADERS = ("content-type", "retry-after", "retry-after-ms")


def parse_native_request(
    data: bytes, wire_format: type[WireFormat], headers: dict[str, str]
) -> NativeRequest:
    """Return the request in `data`; raise APIError 400 for what needs a store."""
    body = parse_json_object(data)
    try:
        check_native_body(Fields(body), wire_format)
    except RecursionError:
        raise invalid(TOO_DEEP) from None
    for name in NEEDS_STORE:
        if name == "store" and wire_format is not Responses:
            continue
        if body.get(name):
            raise invalid(f"{name} needs a store of responses, and there is none here", name)
    return NativeRequest(body, wire_format, body.get("model"), headers)


def check_native_body(fields: Fields, wire_format: type[WireFormat]) -> None:
    """Raise APIError 400 unless the fields that quirks look at are of the kinds they must be."""
    if wire_format is Messages:
        fields.need("messages", list)
    for name, kinds in NATIVE_FIELDS.items():
        fields.may(name, *kinds)
    for name in ("messages", "input", "tools", "system"):
        if not isinstance(fields.value.get(name), list):
            continue
        for item in fields.each(name):
            check_native_content(item, is_needed=name == "messages")


def check_native_content(item: Fields, is_needed: bool) -> None:
    """Check that what a turn or an item says is a text, or objects."""
    if is_needed:
        item.need("content", str, list)
    if isinstance(item.value.get("content"), list):
        for part in item.each("content"):
            check_native_content(part, is_needed=False)


class StableIds:
    """Gives each item of a /responses stream one id in all events: the first one seen.

    Copilot names the same item differently in every event (2026), so that clients lose arguments or
    give up. Only where ids differ is anything rewritten; an event leaves when it is complete. (It
    cuts the events itself: an SSEReader gives their data, and here every byte must go on.)
    """

    EVENT_END = re.compile(r"\r?\n\r?\n")

    def __init__(self) -> None:
        self._rest: list[str] = []  # pieces of the event that is not complete
        self._last = ""  # the last characters of these: its end may be cut in two
        self._ids: dict[Any, str] = {}  # by output_index

    def feed(self, text: str) -> str:
        """Return the events that `text` completes."""
        end = 0
        for match in self.EVENT_END.finditer(self._last + text):
            end = match.end() - len(self._last)
        if end <= 0:
            self._rest.append(text)
            self._last = (self._last + text)[-3:]
            return ""
        complete = "".join((*self._rest, text[:end]))
        self._rest = [text[end:]]
        self._last = text[end:][-3:]

        events = []
        start = 0
        for match in self.EVENT_END.finditer(complete):
            events.append(self._repaired(complete[start : match.end()]))
            start = match.end()
        return "".join(events)

    def end(self) -> str:
        """Return what is left at the end of the answer."""
        return "".join(self._rest)

    def _repaired(self, event: str) -> str:
        lines = event.split("\n")  # `splitlines` also splits at U+2028, which JSON may hold
        data = [line[len("data:") :] for line in lines if line.startswith("data:")]
        try:
            message = json.loads("\n".join(data))
            pairs = list(self._items_of(message))
        except (ValueError, TypeError, AttributeError, RecursionError):
            return event  # it is the client's to judge
        for index, item_id in pairs:
            first = self._ids.setdefault(index, item_id)
            if item_id != first:
                event = event.replace(json.dumps(item_id), json.dumps(first))
        return event

    @staticmethod
    def _items_of(message: Json) -> Iterator[tuple[Any, str]]:
        """Yield the place and the id of each item that an event speaks of."""
        items = [(message.get("output_index"), message.get("item") or {})]
        items.append((message.get("output_index"), {"id": message.get("item_id")}))
        response = message.get("response") or {}
        items.extend(enumerate(response.get("output") or ()))
        for index, item in items:
            item_id = item.get("id")
            if index is not None and isinstance(item_id, str) and item_id:
                yield index, item_id


class WholeResponse:
    """Collects the stream of an answer of /responses into the one object that it ends with."""

    def __init__(self) -> None:
        self._sse = SSEReader()
        self._items: dict[int, Any] = {}  # that are done, by their place
        self._response: Any = None

    def feed(self, text: str) -> None:
        for data in self._sse.feed(text):
            self._take(data)

    def end(self) -> str:
        """Return the object as JSON; raise APIError 502 where it never came."""
        for data in self._sse.end():
            self._take(data)
        if not isinstance(self._response, dict):
            text = "The provider did not finish its answer"
            raise APIError(502, text, code="incomplete_answer")
        if not self._response.get("output"):  # as chatgpt.com has it
            self._response["output"] = [self._items[index] for index in sorted(self._items)]
        return compact_json(self._response)

    def _take(self, data: str) -> None:
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            return  # a comment, or a ping
        if not isinstance(event, dict):
            return
        if is_error(event):
            raise stream_error(event)
        index = event.get("output_index")
        if event.get("type") == "response.output_item.done" and isinstance(index, int):
            self._items[index] = event.get("item")
        elif event.get("type") in ("response.completed", "response.incomplete"):
            self._response = event.get("response")


class NativeExchange(Exchange):
    """A request and its answer in the client's own wire format, which the client judges itself.

    It is made with `thoughts` as every exchange is, and needs none: the client's own format has a
    place for them.
    """

    def __init__(
        self, request: NativeRequest, model: Model, thoughts: Thoughts | None = None
    ) -> None:
        self.headers = request.headers
        self._request = request
        self._model = model
        self._ids: StableIds | None = None  # where the answer's need repair
        self._is_whole = False  # the client wants one object of a service that only streams
        self._whole: WholeResponse | None = None  # of such a stream

    def conversation(self, is_foreign: bool) -> Json:
        # The least from which opencode derives the request's headers.
        body = self._request.body
        said = body.get("input") or body.get("messages")
        is_agent = False
        if isinstance(said, list):
            spoken = [item for item in said if item.get("role") not in SYSTEM_ROLES]
            last = spoken[-1] if spoken else {"role": "user"}
            is_agent = last.get("role") != "user" or has_type(last, "tool_result")
        has_image = has_type(said, "image", "input_image")
        return stub_conversation(is_agent, has_image)

    def body(self, url: str, theirs: Json) -> bytes | None:
        """Return the client's body for the real model; raise APIError 400 for another format."""
        target = target_of(url, self._model)
        if target is None or target.wire_format is not self._request.wire_format:
            raise self._wrong_endpoint(target)
        body = {**self._request.body}
        for name in ("model", "store"):
            if name in theirs:
                body[name] = theirs[name]
        self.headers = repair_headers(self._request.headers, body, target)
        self._is_whole = is_chatgpt(target) and not body.get("stream")
        return finished_body(body, target)

    def begin(self, status: int, headers: Json) -> Iterator[Piece]:
        passed = {}
        for name in PASSED_ANSWER_HEADERS:
            if name in headers:
                passed[name] = headers[name]
        is_stream = passed.get("content-type", "").startswith("text/event-stream")
        if is_stream and self._is_whole:
            self._whole = WholeResponse()
            return
        if is_stream and self._request.wire_format is Responses:
            self._ids = StableIds()
        yield Piece("", status, passed)

    def feed(self, text: str) -> Iterator[Piece]:
        if self._whole is not None:
            self._whole.feed(text)
            return
        if self._ids is not None:
            text = self._ids.feed(text)
        if text:
            yield Piece(text)

    def end(self) -> Iterator[Piece]:
        if self._whole is not None:
            response = self._whole.end()
            yield Piece("", 200, {"content-type": "application/json"})
            yield Piece(response, finish_reason="stop")
            return
        rest = self._ids.end() if self._ids is not None else ""
        yield Piece(rest, finish_reason="stop")

    def refused(self, status: int, headers: Json, body: str) -> Iterator[Piece]:
        yield from self.begin(status, headers)
        yield Piece(self._refusal(status, headers, body), finish_reason="stop")

    def _refusal(self, status: int, headers: Json, body: str) -> str:
        """Return a refusal's body, in the format's words where it is in chatgpt.com's alone."""
        detail = None
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            detail = json.loads(body, parse_int=float).get("detail")
        if detail is None:
            return body
        error = upstream_error(status, headers, body).body()
        if self._request.wire_format is Messages:
            error = {"type": "error", **error}
        return compact_json(error)

    def _wrong_endpoint(self, target: Target | None) -> APIError:
        spoken = target.wire_format.ending if target else "a format of its own"
        return invalid(
            f"The model {self._model.name} speaks {spoken}: use /v1/chat/completions,"
            " which serves every model",
            "model",
            "wrong_endpoint",
        )


# ------------------------------------------------------------------------------------------- answer
# Frames the events of all choices of a request as OpenAI does: chunks of a stream, or one object.

SSE_DONE, SSE_PING = b"data: [DONE]\n\n", b": keep-alive\n\n"
SSE_JSON = json.JSONEncoder(separators=(",", ":")).encode  # made once, not for every event
CHARACTERS_PER_TOKEN = 4  # about, where a provider does not count


def sse_data(value: Json) -> bytes:
    """Return one server-sent event that carries `value`."""
    return b"data: " + SSE_JSON(value).encode() + b"\n\n"


# How the pieces of a message's fields add up. What the names below say of them is text that goes
# on from piece to piece; any other field of an object is said once or repeated, as an id, a type
# and a signature are, and the last counts.
CALL_TEXTS = frozenset(("arguments", "input"))
AUDIO_TEXTS = frozenset(("data", "transcript"))
DETAIL_TEXTS = frozenset(("text", "summary", "data"))


def joined_object(pieces: Iterable[Json], texts: frozenset[str] = frozenset()) -> Json:
    """Return the object that pieces add up to: the fields named in `texts` go on, else the last."""
    whole: Json = {}
    parts: dict[str, list[str]] = {}
    for piece in pieces:
        for name, value in piece.items():
            if value is None:
                continue
            whole[name] = value
            if name in texts and isinstance(value, str):
                parts.setdefault(name, []).append(value)
    for name, values in parts.items():
        whole[name] = "".join(values)
    return whole


def joined_calls(pieces: Iterable[Json]) -> list[Json]:
    """Return the calls that entries of `tool_calls` add up to, by their indexes."""
    by_index: dict[int, list[Json]] = {}
    for piece in pieces:
        by_index.setdefault(piece["index"], []).append(piece)
    calls = []
    for same in by_index.values():
        call = joined_object(same)
        del call["index"]
        for call_type in CALL_TEXT:
            inner = [piece[call_type] for piece in same if call_type in piece]
            if inner:
                call[call_type] = joined_object(inner, CALL_TEXTS)
        calls.append(call)
    return calls


def joined_details(pieces: Iterable[Any]) -> list[Any]:
    """Return what entries of OpenRouter's `reasoning_details` add up to.

    Pieces of one detail have its index and its type; without an index they follow each other.
    """
    details: list[tuple[Any, list[Json]]] = []
    places: dict[Any, list[Json]] = {}
    for piece in pieces:
        key = (str(piece.get("index")), str(piece.get("type")))
        same = places.get(key)
        if same is not None and piece.get("index") is None and details[-1][0] != key:
            same = None
        if same is not None and is_other(same, piece):
            same = None
        if same is None:
            same = places[key] = []
            details.append((key, same))
        same.append(piece)
    return [joined_object(same, DETAIL_TEXTS) for _, same in details]


def is_other(same: list[Json], piece: Json) -> bool:
    """Tell whether the id of a detail's piece is another than that of the pieces before."""
    detail_id = piece.get("id")
    if not detail_id:
        return False
    known_ids = (other["id"] for other in same if other.get("id"))
    return bool(next(known_ids, detail_id) != detail_id)  # the first is that of all


# OpenAI's messages have null for the content that one of these stands for. Anything else has a
# text, if an empty one: also reasoning that was cut off before the answer.
INSTEAD_OF_CONTENT = {"tool_calls", "function_call", "refusal", "audio"}


class Message:
    """The message that the deltas of a choice add up to, each field by what it means."""

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}  # of the fields, in the order in which they came

    def add(self, delta: Json) -> None:
        """Take a delta."""
        for name, value in delta.items():
            if value is not None:
                self._values.setdefault(name, []).append(value)

    def whole(self) -> Json:
        """Return the message."""
        content = None if self._values.keys() & INSTEAD_OF_CONTENT else ""
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        for name, values in self._values.items():
            message[name] = self._joined(name, values)
        return message

    def _joined(self, name: str, values: list[Any]) -> Any:
        if name == "function_call":
            return joined_object(values, CALL_TEXTS)
        if name == "audio":
            return joined_object(values, AUDIO_TEXTS)
        if name == "tool_calls":
            return joined_calls(itertools.chain.from_iterable(values))
        if name == "reasoning_details":
            return joined_details(itertools.chain.from_iterable(values))
        return self._joined_unknown(values)

    @staticmethod
    def _joined_unknown(values: list[Any]) -> Any:
        """Return what values add up to: text and lists go on, of anything else the last counts."""
        if all(isinstance(value, str) for value in values):
            return "".join(values)
        if all(isinstance(value, list) for value in values):
            return list(itertools.chain.from_iterable(values))
        if all(isinstance(value, dict) for value in values):
            return joined_object(values)
        return values[-1]


class Logprobs:
    """The log probabilities of a choice, whose pieces each have those of their tokens."""

    def __init__(self) -> None:
        self._lists: dict[str, list[Any]] = {}
        self._has_come = False

    def add(self, logprobs: Any) -> None:
        """Take a piece's."""
        if not isinstance(logprobs, dict):
            return
        self._has_come = True
        for name, entries in logprobs.items():
            if isinstance(entries, list):
                self._lists.setdefault(name, []).extend(entries)

    def whole(self) -> Json | None:
        """Return all of them, None where a provider gave none."""
        if not self._has_come:
            return None
        return {"content": None, "refusal": None, **self._lists}


class UsageSum:
    """The tokens of a request: those of its prompt once, those of its choices together."""

    def __init__(self) -> None:
        self._prompt: Json = {}  # what begins with prompt_
        self._is_prompt_counted = False  # by a provider
        self._answers: Json = {}  # all else, added up
        self._answer_tokens = 0

    def add(self, usage: Json, is_prompt_counted: bool) -> None:
        """Take the usage of a choice that has ended.

        Arguments:
            usage: with prompt_tokens, completion_tokens and total_tokens at least.
            is_prompt_counted: by the provider; otherwise it is an estimate.
        """
        prompt = {}
        for name, value in usage.items():
            if name.startswith("prompt_"):
                prompt[name] = value
            elif name != "total_tokens":
                self._answers[name] = added(self._answers.get(name), value)
        self._answer_tokens += usage["total_tokens"] - usage["prompt_tokens"]
        if not self._prompt or (is_prompt_counted and not self._is_prompt_counted):
            self._prompt = prompt
            self._is_prompt_counted = is_prompt_counted

    def whole(self) -> Json:
        """Return the usage of the request, {} before a choice has ended."""
        if not self._prompt:
            return {}
        prompt_tokens = self._prompt["prompt_tokens"]
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._answers["completion_tokens"],
            "total_tokens": prompt_tokens + self._answer_tokens,
            **self._prompt,
            **self._answers,
        }


def added(total: Any, value: Any) -> Any:
    """Return the sum of two counts, or of the counts in two objects; of anything else the last."""
    if isinstance(total, dict) and isinstance(value, dict):
        return {**total, **{name: added(total.get(name), value[name]) for name in value}}
    if type(total) in (int, float) and type(value) in (int, float):
        return total + value
    return value


class Answer:
    """One answer: what its chunks, or the whole of it, have in common, and what it adds up to."""

    def __init__(self, request: ChatRequest, model: Model) -> None:
        self._request = request
        is_known = request.model in (model.name, model.name.partition("/")[2])
        self._frame: Json = {
            "id": "chatcmpl-" + uuid.uuid4().hex,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": request.model if is_known else model.name,
            "system_fingerprint": "fp_opencode",
        }
        self._chunk_head = ""  # what is the same in all chunks
        self._chunk_tail = '],"usage":null}\n\n' if request.include_usage else "]}\n\n"
        self._messages = [Message() for _ in range(request.choices)]
        self._logprobs = [Logprobs() for _ in range(request.choices)]
        self._finish_reasons: list[str | None] = [None] * request.choices
        self._characters = [0] * request.choices
        self._usage = UsageSum()
        self._set_chunk_head()

    @property
    def usage(self) -> Json:
        """The tokens of the choices that have ended."""
        return self._usage.whole()

    def take(self, index: int, event: Event) -> bytes:
        """Return the chunks that an event of a choice means; nothing where the whole is wanted."""
        delta = event.delta
        finish_reason = event.finish_reason
        if event.frame:
            self._frame.update(event.frame)
            self._set_chunk_head()
        if self._request.legacy_functions:
            delta = legacy_delta(delta)
            if finish_reason == "tool_calls":
                finish_reason = "function_call"
        for value in delta.values():
            self._characters[index] += len(str(value))
        if finish_reason is not None:
            self._finish_reasons[index] = finish_reason
            self._count(index, event.usage or {})

        if not self._request.stream:
            self._messages[index].add(delta)
            self._logprobs[index].add(event.logprobs)
            return b""
        chunks = b""
        if delta or event.logprobs:
            chunks += self._chunk(index, delta, event.logprobs, None)
        if finish_reason is not None:
            chunks += self._chunk(index, {}, None, finish_reason)
        return chunks

    def head(self) -> bytes:
        """Return the chunks that name the role, the first ones of a stream."""
        role = {"role": "assistant", "content": ""}
        indexes = range(self._request.choices)
        return b"".join(self._chunk(index, role, None, None) for index in indexes)

    def tail(self) -> bytes:
        """Return the last events of a stream: the usage where it was asked for, and the end."""
        if not self._request.include_usage:
            return SSE_DONE
        return sse_data({**self._frame, "choices": [], "usage": self.usage}) + SSE_DONE

    def whole(self) -> Json:
        """Return the chat.completion."""
        choices = []
        for index, message in enumerate(self._messages):
            choice = {
                "index": index,
                "message": message.whole(),
                "logprobs": self._logprobs[index].whole(),
                "finish_reason": self._finish_reasons[index],
            }
            choices.append(choice)
        frame = {**self._frame, "object": "chat.completion"}
        return {**frame, "choices": choices, "usage": self.usage}

    def _set_chunk_head(self) -> None:
        frame = SSE_JSON({**self._frame, "choices": []})
        self._chunk_head = "data: " + frame[: -len("]}")]

    def _chunk(self, index: int, delta: Json, logprobs: Any, finish_reason: str | None) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return (self._chunk_head + SSE_JSON(choice) + self._chunk_tail).encode()

    def _count(self, index: int, counted: Json) -> None:
        """Count the tokens of a choice that has ended; what the provider did not is estimated."""
        characters = 0
        for message in self._request.messages:
            characters += len(text_of(message.get("content")))
        usage = {
            "prompt_tokens": 1 + characters // CHARACTERS_PER_TOKEN,
            "completion_tokens": 1 + self._characters[index] // CHARACTERS_PER_TOKEN,
        }
        for name, value in counted.items():
            if value is not None:
                usage[name] = value
        if not usage.get("total_tokens"):
            usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        self._usage.add(usage, counted.get("prompt_tokens") is not None)


def legacy_delta(delta: Json) -> Json:
    """Return a delta in the words of those who call tools functions: there is room for one."""
    if "tool_calls" not in delta:
        return delta
    others = {name: value for name, value in delta.items() if name != "tool_calls"}
    for call in delta["tool_calls"]:
        if call["index"] == 0 and "function" in call:
            others["function_call"] = call["function"]
    return others


# ----------------------------------------------------------------------------------------- opencode
# Where opencode is, which models it offers, and what each of its processes is started with.
# Nothing here runs a process: CatalogWatch has one print the models, make_catalog reads them.

CONFIG_FILES = ("opencode.json", "opencode.jsonc", "config.json")
INSTALLED = ("~/.opencode/bin", "~/.local/bin", "~/bin", "/usr/local/bin", "/opt/homebrew/bin")


def find_opencode(path: str | None) -> str:
    """Return the absolute path of opencode.

    `path` is what the user says; without it opencode is looked for on PATH and where its installers
    put it. Raises StartError where there is none.
    """
    name = os.path.expanduser(path or "opencode")
    folders = [os.environ.get("PATH", "")]
    for folder in INSTALLED:
        folders.append(os.path.expanduser(folder))

    program = shutil.which(name, path=os.pathsep.join(folders))
    if not program:
        raise StartError(
            f"{path or 'opencode'}: not found or not executable; install opencode "
            "(npm install -g opencode-ai) or say where it is with --opencode"
        )
    return os.path.abspath(program)


def user_folder(variable: str, default: str) -> pathlib.Path:
    """Return opencode's folder below an XDG base directory; it looks there on every system."""
    base = os.environ.get(variable) or os.path.expanduser(default)
    return pathlib.Path(base) / "opencode"


class Model(NamedTuple):
    """What the catalog says of a model; `name` is provider/model, a limit of 0 is not known."""

    name: str
    takes_temperature: bool = True
    output_limit: int = 0  # tokens
    context_length: int = 0  # tokens
    title: str = ""  # for people

    @property
    def provider(self) -> str:
        """Return opencode's name of the provider."""
        return provider_of(self.name)

    @property
    def bare_name(self) -> str:
        """Return the name without the provider."""
        return self.name.partition("/")[2]


class Catalog(NamedTuple):
    """The models that opencode offers, and the one that answers when no other is asked for."""

    models: Mapping[str, Model]
    default: str  # in `models` where its provider is connected, and has it
    providers: frozenset[str] = frozenset()  # the connected ones
    free_model: str = ""  # one of opencode's own cloud, that needs no login
    trimmed: Json = {}  # in the shape of models.dev's api.json, with which opencode starts faster

    @property
    def names(self) -> tuple[str, ...]:
        """Return the models' names, the default first."""
        return tuple(sorted(self.models, key=lambda name: (name != self.default, name)))

    def resolve(self, name: str | None, exact: bool = False) -> Model:
        """Return the model that a request means by `name`.

        In this order: the very name; a bare name at the default model's provider, then at another
        connected one; other spellings of it (see `canonical_name`), in the same order. Then a bare
        name means the default model or, where the model matters (`exact`: its wire format must be
        the client's), the newest one of the same family. Raises APIError 404 or, where nobody is
        logged in, 503.
        """
        requested = name or self.default
        model = find_model(self, requested)
        if model is None and exact:
            model = newest_relative(self, requested)
        elif model is None and "/" not in requested:
            requested = self.default
            model = self.models.get(requested)
        if model is not None:
            return model

        provider = provider_of(requested if "/" in requested else self.default)
        usual = {provider_of(self.default), provider_of(DEFAULT_MODEL)}
        if provider not in self.providers and (provider in usual or not self.providers):
            raise APIError(503, self.not_logged_in(), code="provider_not_logged_in")
        raise model_not_found(requested)

    def not_logged_in(self) -> str:
        """Return what a person has to do before there is an answer."""
        text = (
            f"opencode is not logged in to {provider_of(self.default)}: run `opencode auth login`"
        )
        if self.free_model and not self.providers:
            text += (
                f"; without any login, --model {self.free_model} uses a free model of opencode's "
                "cloud, where your prompts go then"
            )
        return text


def provider_of(name: str) -> str:
    """Return the provider's part of a model's full name."""
    return name.partition("/")[0]


def model_not_found(name: str) -> APIError:
    """Return the error for a model that opencode does not offer."""
    message = (
        f"The model `{name}` does not exist or its provider is not logged in "
        "(`opencode auth login`); GET /v1/models lists the models"
    )
    return APIError(404, message, param="model", code="model_not_found")


def find_model(catalog: Catalog, name: str) -> Model | None:
    """Return the model of a name in any spelling, None where it is not offered."""
    if name in catalog.models:
        return catalog.models[name]

    provider, slash, rest = name.partition("/")
    if slash and provider in catalog.providers:
        candidates = [model for model in catalog.models.values() if model.provider == provider]
        bare_name = rest
    else:  # without a provider, or behind a word that other gateways put there
        candidates = by_provider(catalog)
        bare_name = name.rpartition("/")[2]

    for model in candidates:
        if model.bare_name == bare_name:
            return model
    canonical = canonical_name(bare_name)
    for model in candidates:
        if canonical_name(model.bare_name) == canonical:
            return model
    return None


def by_provider(catalog: Catalog) -> list[Model]:
    """Return the models of the default's provider, then the others, by their names."""
    own = provider_of(catalog.default)
    return sorted(catalog.models.values(), key=lambda model: (model.provider != own, model.name))


def canonical_name(bare_name: str) -> str:
    """Return what all spellings of a model's name have in common.

    Upper case, a dot or a dash in a version, the day of the version, `:latest` and Claude Code's
    `[1m]` (a window of a million tokens) mean no other model.
    """
    name = bare_name.lower()
    name = re.sub(r"\[1m\]$|[:-]latest$", "", name)
    name = re.sub(r"[-@](20\d{6}|20\d\d-\d\d-\d\d)$", "", name)
    return name.replace(".", "-")


# Words by which the makers of models tell the sizes and kinds of one generation apart.
FAMILY_WORDS = frozenset(
    ("haiku", "sonnet", "opus", "mini", "nano", "codex", "max", "pro", "flash", "lite", "fast")
)


def newest_relative(catalog: Catalog, name: str) -> Model | None:
    """Return the newest model of a name's family (claude haiku, gpt mini), None without any."""
    family = family_of(name.rpartition("/")[2])
    relatives = []
    for model in by_provider(catalog):
        if family_of(model.bare_name) == family:
            relatives.append(model)
    return max(relatives, key=version_of, default=None)


def family_of(bare_name: str) -> tuple[str, frozenset[str]]:
    """Return the maker's word for its models, and the words for their size."""
    words = canonical_name(bare_name).split("-")
    return words[0], FAMILY_WORDS.intersection(words)


def version_of(model: Model) -> list[int]:
    """Return the numbers in a model's name: a newer one's are greater."""
    numbers = re.findall(r"\d+", canonical_name(model.bare_name))
    return [int(number) for number in numbers]


def parse_models(text: str) -> list[Json]:
    """Return the models in the output of `opencode models --verbose`: each a name, then JSON."""
    decoder = json.JSONDecoder()
    models = []
    start = text.find("\n{")
    while start >= 0:
        model, end = decoder.raw_decode(text, start + 1)
        models.append(model)
        start = text.find("\n{", end)
    return models


def make_catalog(listed: Iterable[Json], logins: Iterable[str], requested: str | None) -> Catalog:
    """Return the catalog.

    `listed` is what opencode printed of each model, `logins` are the providers in auth.json,
    `requested` is the default model that the user chose, perhaps without its provider. Raises
    LookupError, TypeError or ValueError where opencode printed something else.
    """
    logins = set(logins)
    listed = sorted(listed, key=lambda entry: len(entry["id"]))  # a model before its modes
    free_model = first_free(listed)
    is_cloud_chosen = "opencode" in logins or provider_of(requested or "") == "opencode"
    if not is_cloud_chosen and not os.environ.get("OPENCODE_API_KEY"):
        # opencode's own cloud is offered to everybody: only who chose it may be sent there
        listed = [entry for entry in listed if entry["providerID"] != "opencode"]

    models = {}
    for entry in listed:
        model = read_model(entry)
        models[model.name] = model
    providers = frozenset(entry["providerID"] for entry in listed)
    catalog = Catalog(models, DEFAULT_MODEL, providers, free_model, trim(listed, logins))
    return catalog._replace(default=choose_default(catalog, requested))


def first_free(listed: Iterable[Json]) -> str:
    """Return the name of a model that opencode's cloud gives away, "" where none is listed."""
    names = [entry["id"] for entry in listed if entry["providerID"] == "opencode"]
    if not names:
        return ""
    return "opencode/" + ("big-pickle" if "big-pickle" in names else min(names))


def read_model(entry: Json) -> Model:
    """Return a model from what opencode printed of it."""
    limit = entry["limit"]
    return Model(
        f"{entry['providerID']}/{entry['id']}",
        entry["capabilities"]["temperature"],
        limit["output"],
        limit.get("context", 0),
        entry.get("name", ""),
    )


def choose_default(catalog: Catalog, requested: str | None) -> str:
    """Return the name of the model that answers when no other is asked for.

    It is the one that the user chose, whether it is offered or not; else the usual one, or its
    successor; else a model of such a name at any provider; else the first of all.
    """
    if requested:
        model = find_model(catalog, requested)
        if model is not None:
            return model.name
        return requested if "/" in requested else f"{provider_of(DEFAULT_MODEL)}/{requested}"

    usual = (DEFAULT_MODEL, *SUCCESSORS)
    for name in usual:
        if name in catalog.models:
            return name
    for name in usual:
        model = find_model(catalog, name.partition("/")[2])
        if model is not None:
            return model.name
    return min(catalog.models, default=DEFAULT_MODEL)


def trim(listed: Iterable[Json], logins: Iterable[str]) -> Json:
    """Return models.dev's catalog of the listed models alone: opencode starts faster with it.

    opencode 1.18 makes no session where auth.json names a provider that the catalog lacks.
    """
    trimmed: Json = {}
    for name in logins:
        trimmed[name] = {"id": name, "name": name, "env": [], "models": {}}

    for entry in listed:
        name = entry["providerID"]
        api = entry["api"]
        provider = trimmed.setdefault(name, {"id": name, "name": name, "env": [], "models": {}})
        provider["npm"] = api["npm"]
        provider["api"] = api["url"]

        models = provider["models"]
        base = models.get(api["id"])
        if base is not None and entry["id"].startswith(api["id"] + "-"):
            mode = entry["id"][len(api["id"]) + 1 :]  # gpt-5.5-fast is "fast" of gpt-5.5
            modes = base.setdefault("experimental", {"modes": {}})["modes"]
            modes[mode] = mode_entry(entry)
        else:
            models[entry["id"]] = model_entry(entry)
    return trimmed


def model_entry(entry: Json) -> Json:
    """Return a model as models.dev describes it, from what opencode printed of it."""
    able = entry["capabilities"]
    efforts = list(entry.get("variants") or {})
    return {
        "id": entry["id"],
        "name": entry.get("name", ""),
        "limit": entry.get("limit", ""),
        "release_date": entry.get("release_date", ""),
        "attachment": able["attachment"],
        "reasoning": able["reasoning"],
        "temperature": able["temperature"],
        "interleaved": able.get("interleaved", False),
        "tool_call": able["toolcall"],
        "provider": {"npm": entry["api"]["npm"], "api": entry["api"]["url"]},
        "modalities": {
            "input": [kind for kind, is_able in able["input"].items() if is_able],
            "output": [kind for kind, is_able in able["output"].items() if is_able],
        },
        "reasoning_options": [{"type": "effort", "values": efforts}] if efforts else [],
    }


def mode_entry(entry: Json) -> Json:
    """Return a mode of a model: the fields, in snake case, and headers that it adds."""
    body = {}
    for name, value in entry["options"].items():
        snake_case = re.sub("[A-Z]", lambda letter: "_" + letter[0].lower(), name)
        body[snake_case] = value
    return {"provider": {"body": body, "headers": entry["headers"]}}


class PrivateDirectory:
    """The folder in the temp folder where everything that processes need lies.

    It belongs to whoever holds the lock on it (flock), not to a pid: these repeat in containers
    and mean nothing across PID namespaces. The kernel gives the lock back when the proxy ends, so
    that the next one knows what a killed proxy has left. systemd-tmpfiles passes over what is
    locked; what another cleaner removes, `restore` makes again. Other users may put what they like
    under such a name. Used under its owner's lock.
    """

    PREFIX = "opencode_proxy-"
    MAX_SOCKET_PATH_BYTES = 100  # 104 on macOS, 108 on Linux, with the byte that ends it
    LONGEST_NAME = "12345678/ask"  # of a socket behind the prefix
    ONLY_A_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW  # to open a FIFO would wait

    def __init__(self) -> None:
        """Make it; raise OSError where that is not possible."""
        base = self.base_folder(tempfile.gettempdir())
        self._remove_abandoned(base)
        self.path = pathlib.Path(tempfile.mkdtemp(prefix=self.PREFIX, dir=base))
        self._locked_descriptor = self._locked(self.path)

    @classmethod
    def base_folder(cls, temporary: str) -> str:
        """Return the folder to make it in: /tmp where a socket's path would be too long else."""
        longest = os.path.join(temporary, cls.PREFIX + cls.LONGEST_NAME)
        if len(os.fsencode(longest)) > cls.MAX_SOCKET_PATH_BYTES:
            return "/tmp"
        return temporary

    def restore(self) -> None:
        """Make it again where it was removed; raise OSError where another has taken its name."""
        if not self._is_there():
            self.path.mkdir(mode=0o700)
            removed = self._locked_descriptor
            self._locked_descriptor = self._locked(self.path)
            os.close(removed)

    def _is_there(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.lstat(self.path), os.fstat(self._locked_descriptor))
        return False

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._locked_descriptor)

    @classmethod
    def _locked(cls, path: pathlib.Path) -> int:
        """Return a locked descriptor of a folder."""
        descriptor = os.open(path, cls.ONLY_A_FOLDER)
        with contextlib.suppress(OSError):  # a file system without locks: nobody will take it away
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor

    @classmethod
    def _remove_abandoned(cls, base: str) -> None:
        for path in pathlib.Path(base).glob(cls.PREFIX + "*"):
            with contextlib.suppress(OSError):  # in use, of another user, or gone by now
                cls._remove_if_abandoned(path)

    @classmethod
    def _remove_if_abandoned(cls, path: pathlib.Path) -> None:
        """Remove a folder that nobody has locked; raise OSError where somebody has."""
        descriptor = os.open(path, cls.ONLY_A_FOLDER)
        try:
            age = time.time() - os.fstat(descriptor).st_mtime
            if age < NEW_SECONDS and not os.listdir(path):
                return  # its proxy has not locked it yet
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


# Of the proxy's environment: opencode's own settings, but for logins and the user's configuration;
# and what would make opencode speak to a collector of traces, or to systemd.
NOT_INHERITED = re.compile(
    r"OPENCODE(?!_(API_KEY|AUTH_CONTENT)$)|OTEL_|NOTIFY_SOCKET|BUN_INSPECT_PRELOAD"
)
DISABLED_FEATURES = (
    "AUTOUPDATE",
    "CLAUDE_CODE",
    "EXTERNAL_SKILLS",
    "FFF",  # it leaves a library of 5.6 MB in the temp folder for every process
    "MODELS_FETCH",
    "PROJECT_CONFIG",
)
NEVER_MILLISECONDS = 10**9  # opencode gives an answer up after 5 minutes; 1.17.0 refuses `false`


class Opencode:
    """The installed opencode, and what every process of it is started with.

    `catalog` and `trim` are exchanged as a whole, by the thread of the CatalogWatch or of a
    process, and read by all; to `foreign`, which goes with the catalog, the threads of turns add.
    `_lock` is for what is made in the private directory. `pids` are those of all processes that
    run, for `reap_orphans`.
    """

    def __init__(self, path: str, requested_model: str | None = None) -> None:
        """Make the private directory and listen for asks.

        Raises StartError where that fails, or the user's OPENCODE_CONFIG_CONTENT is not JSON.
        """
        self.path = path
        self.requested_model = requested_model  # the default that the user chose
        self.version = ""
        self.catalog = Catalog({}, requested_model or DEFAULT_MODEL)
        self.trim = True  # whether processes start with the trimmed catalog
        self.foreign: set[str] = set()  # models whose wire format was found to be none of ours
        self.pids: set[int] = set()
        self._auth = user_folder("XDG_DATA_HOME", "~/.local/share") / "auth.json"
        self._config = user_folder("XDG_CONFIG_HOME", "~/.config")
        self._config_file = path_in("OPENCODE_CONFIG")
        self._config_folder = path_in("OPENCODE_CONFIG_DIR")
        self._config_content = read_config_content(os.environ.get("OPENCODE_CONFIG_CONTENT", ""))
        self._cache = user_folder("XDG_CACHE_HOME", "~/.cache")
        self.collecting = "rarely"  # how often the newest process collects garbage
        self._collects_rarely = True  # until a process says that it cannot
        self._is_small = memory_of_machine() < MIN_MEMORY_BYTES
        self._lock = threading.Lock()
        try:
            self._directory = PrivateDirectory()
            self.asks = Asks(self._directory.path / "ask")
        except OSError as error:
            raise StartError(f"no folder can be made for temporary files: {error}") from None
        self._models = self._directory.path / "models.json"
        self._plugin = self._directory.path / "plugin.js"
        self._preload = self._directory.path / "preload.js"

    def close(self) -> None:
        """Remove the private directory."""
        self.asks.close()
        self._directory.close()

    def logins(self) -> Json:
        """Return the user's auth.json: a login for each provider."""
        with contextlib.suppress(OSError, TypeError, ValueError):
            return dict(json.loads(self._auth.read_text(encoding="utf-8")))
        return {}

    def signature(self) -> Any:
        """Return a value that changes when the user logs in or out or edits the configuration."""
        logins = self.logins()
        for login in logins.values():
            if isinstance(login, dict) and login.get("type") == "oauth":
                login.update(access="", refresh="", expires=0)  # opencode itself renews these

        files = []
        for path in self._configuration_files():
            with contextlib.suppress(OSError):
                status = path.stat()
                files.append((path, status.st_mtime_ns, status.st_size, status.st_ino))
        return logins, files

    def _configuration_files(self) -> list[pathlib.Path]:
        paths = [self._config / name for name in CONFIG_FILES]
        if self._config_folder is not None:
            paths += [self._config_folder / name for name in CONFIG_FILES]
        if self._config_file is not None:
            paths.append(self._config_file)
        return paths

    def use_catalog(self, catalog: Catalog) -> None:
        """Make `catalog` the one that later processes start with; raise OSError on a full disk."""
        with self._lock:
            self._directory.restore()
            write_whole(self._models, json.dumps(catalog.trimmed))
        self.catalog = catalog
        self.foreign = set()  # the user may have changed a provider's package

    def new_home(self) -> pathlib.Path:
        """Return a new private home for a process.

        Nothing of it stays where its making fails; raises OSError then.
        """
        with self._lock:
            self._restore()
            home = pathlib.Path(tempfile.mkdtemp(prefix="process-", dir=self._directory.path))
        try:
            self._furnish(home)
        except OSError:
            shutil.rmtree(home, ignore_errors=True)
            raise
        return home

    def _restore(self) -> None:
        """Make what all processes share, also again after a cleaner of temp folders."""
        self._directory.restore()
        self.asks.restore()
        for path, text in ((self._plugin, PLUGIN), (self._preload, PRELOAD)):
            if not path.exists():
                write_whole(path, text)
        if self.catalog.trimmed and not self._models.exists():
            write_whole(self._models, json.dumps(self.catalog.trimmed))

        ripgrep = self._directory.path / "rg"  # opencode downloads it where there is none
        if not ripgrep.exists():
            write_whole(ripgrep, "#!/bin/sh\nexit 1\n")
            ripgrep.chmod(0o700)

    def _furnish(self, home: pathlib.Path) -> None:
        """Make the folders of a home; link the user's login, configuration and packages in."""
        packages = home / "cache/opencode/packages"
        packages.mkdir(parents=True)
        for name in ("data/opencode", "state", "tmp", "cwd", "home"):
            (home / name).mkdir(parents=True)

        (home / "data/opencode/auth.json").symlink_to(self._auth)
        self._furnish_configuration(self._config, home / "config/opencode")
        if self._config_folder is not None:
            self._furnish_configuration(self._config_folder, home / "config/more")
        self._link_packages(packages)

    def _furnish_configuration(self, source: pathlib.Path, target: pathlib.Path) -> None:
        """Make a folder of configuration: the user's files, and the files that these refer to."""
        (target / "node_modules").mkdir(parents=True)
        for name in CONFIG_FILES:
            if (source / name).exists():
                (target / name).symlink_to(source / name)
                link_references(source / name, target)

        # Without these opencode first waits for an npm install.
        (target / "package.json").write_text("{}")
        (target / "package-lock.json").write_text(
            '{"packages":{"":{"dependencies":{"@opencode-ai/plugin":"*"}}}}'
        )

    def _link_packages(self, target: pathlib.Path) -> None:
        """Link what the user's opencode has installed from npm, or each process would do it."""
        installed = self._cache / "packages"
        for package in (*installed.glob("[!@]*"), *installed.glob("@*/*")):
            link = target / package.relative_to(installed)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(package)

    def environment(self, home: pathlib.Path, is_acp: bool) -> dict[str, str]:
        """Return the environment of a process in `home`: an `acp` one, or one that lists models."""
        preload = self._preload if self._collects_rarely else None
        variables = engine_variables(preload, self._is_small)
        for name, value in os.environ.items():
            if not NOT_INHERITED.match(name):
                variables[name] = value

        for feature in DISABLED_FEATURES:
            variables["OPENCODE_DISABLE_" + feature] = "1"
        around_proxy = with_loopback(os.environ.get("NO_PROXY", ""), os.environ.get("no_proxy", ""))
        variables["NO_PROXY"] = around_proxy
        variables["no_proxy"] = around_proxy
        variables["OPENCODE_DB"] = ":memory:"
        variables["OPENCODE_LOG_LEVEL"] = "ERROR"
        variables["OPENCODE_SERVER_PASSWORD"] = secrets.token_hex(16)
        variables["OPENCODE_PROXY_SOCKET"] = str(self.asks.path)
        variables.update(self._folders(home))
        variables.update(self._users_configuration(home, is_acp))
        return variables

    def note_timers(self, are_closed: bool) -> None:
        """Note whether a process could close the timers by which it collects garbage."""
        if are_closed:
            self.collecting = "rarely"
        elif self._collects_rarely:
            self.collecting = "at every token"
            self._collects_rarely = False  # the next process starts in another way
        else:
            self.collecting = "at every token" if self._is_small else "never"

    def _folders(self, home: pathlib.Path) -> dict[str, str]:
        """Return the variables that say where a process finds and leaves things."""
        path = os.environ.get("PATH", os.defpath)
        return {
            "PATH": path + os.pathsep + str(self._directory.path),
            "PWD": str(home / "cwd"),
            "TMPDIR": str(home / "tmp"),
            "OPENCODE_TEST_HOME": str(home / "home"),
            "XDG_CACHE_HOME": str(home / "cache"),
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_DATA_HOME": str(home / "data"),
            "XDG_STATE_HOME": str(home / "state"),
        }

    def _users_configuration(self, home: pathlib.Path, is_acp: bool) -> dict[str, str]:
        """Return the variables for what the user has configured and, for `acp`, ours over it."""
        variables = {}
        if self._config_file is not None:
            variables["OPENCODE_CONFIG"] = str(self._config_file)
        if self._config_folder is not None:
            variables["OPENCODE_CONFIG_DIR"] = str(home / "config/more")

        content = self._config_content
        models = self._cache / "models.json"
        if is_acp:
            content = merge_configuration(content, self._configuration())
            if self.trim:
                models = self._models
        if content:
            variables["OPENCODE_CONFIG_CONTENT"] = json.dumps(content)
        if models.exists():
            variables["OPENCODE_MODELS_PATH"] = str(models)
        return variables

    def _configuration(self) -> Json:
        # No text of a client may get in here: opencode expands {file:...} and {env:...}.
        catalog = self.catalog
        providers: Json = {}
        for name in catalog.providers:
            options = {"headerTimeout": NEVER_MILLISECONDS, "chunkTimeout": NEVER_MILLISECONDS}
            providers[name] = {"options": options}

        permission = {"*": "deny", "doom_loop": "allow"}
        agent = {"mode": "primary", "prompt": "-", "permission": permission}
        return {
            "autoupdate": False,
            "snapshot": False,
            "lsp": False,
            "formatter": False,
            "share": "disabled",
            "compaction": {"auto": False},
            "default_agent": "proxy",
            "agent": {"proxy": agent, "title": {"disable": True}},
            "model": catalog.default,
            "plugin": [self._plugin.as_uri()],
            "provider": providers,
            "enabled_providers": sorted(providers),
        }


def write_whole(path: pathlib.Path, text: str) -> None:
    """Write a file at once: others may be reading it, and a full disk must not leave half of it."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def path_in(variable: str) -> pathlib.Path | None:
    """Return the path in an environment variable, made absolute: processes work elsewhere."""
    value = os.environ.get(variable)
    return pathlib.Path(os.path.abspath(value)) if value else None


FILE_REFERENCE = re.compile(r"\{file:([^}]+)\}")


def link_references(path: pathlib.Path, target: pathlib.Path) -> None:
    """Link the files that a configuration file names by {file:...} to where opencode looks.

    opencode takes a relative name from the folder of the file, which is `target` for a process. A
    file that cannot be read, or a name that leads out of the process's home, is left to opencode.
    """
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for name in FILE_REFERENCE.findall(path.read_text(encoding="utf-8")):
            if os.path.isabs(name) or name.startswith("~/"):
                continue
            link = pathlib.Path(os.path.normpath(target / name))
            if link.parents[0] == target or target.parents[1] in link.parents:
                link.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    link.symlink_to(os.path.normpath(path.parent / name))


JSON_STRING_OR_COMMENT = re.compile(r'("(?:[^"\\]|\\.)*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
JSON_STRING_OR_TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])', re.DOTALL)


def read_config_content(text: str) -> Json:
    """Return the user's OPENCODE_CONFIG_CONTENT, JSON with comments; raise StartError.

    The files that it names are taken from the folder that the proxy was started in.
    """
    if not text.strip():
        return {}
    text = JSON_STRING_OR_COMMENT.sub(lambda match: match[1] or " ", text)
    text = JSON_STRING_OR_TRAILING_COMMA.sub(lambda match: match[1] or "", text)
    text = FILE_REFERENCE.sub(absolute_reference, text)
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise StartError(f"OPENCODE_CONFIG_CONTENT is not valid: {error}") from None


def absolute_reference(reference: re.Match[str]) -> str:
    """Return a {file:...} whose name does not depend on the folder that opencode works in."""
    name = reference[1]
    if name.startswith("~/"):
        return reference[0]
    return "{file:" + os.path.abspath(name) + "}"


def merge_configuration(users: Json, ours: Json) -> Json:
    """Return the user's configuration with ours over it; of plugins both are kept."""
    merged = dict(users)
    for name, value in ours.items():
        other = merged.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            merged[name] = merge_configuration(other, value)
        elif name == "plugin" and isinstance(other, list):
            merged[name] = other + value
        else:
            merged[name] = value
    return merged


def with_loopback(*hosts: str) -> str:
    """Return the values of NO_PROXY in one, completed, so that opencode's requests reach itself.

    Bun sends even requests to 127.0.0.1, and over Unix sockets, to the proxy in HTTP_PROXY.
    """
    names: list[str] = []
    for name in (",".join(hosts) + ",127.0.0.1,localhost,::1").split(","):
        name = name.strip()
        if name and name not in names:
            names.append(name)
    return ",".join(names)


def engine_variables(preload: pathlib.Path | None, is_small: bool) -> dict[str, str]:
    """Return the settings of opencode's JavaScript engine.

    `preload` is what keeps it from collecting garbage at every token, None where that did not work:
    then none is collected, but on a machine that is too small for that. The slowest compiler is
    left out: a process is soon gone.
    """
    variables = {"BUN_JSC_useFTLJIT": "0", "BUN_GC_TIMER_DISABLE": "1"}
    if preload is not None:
        variables["BUN_INSPECT_PRELOAD"] = str(preload)
        variables["BUN_JSC_largeHeapSize"] = str(LARGE_HEAP_BYTES)
        variables["BUN_JSC_collectionTimerMaxPercentCPU"] = "0.0001"
    elif not is_small:
        variables["BUN_JSC_useGC"] = "0"
    return variables


def memory_of_machine() -> int:
    """Return the bytes of memory of this machine, or of the control group that this runs in."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        groups = pathlib.Path("/proc/self/cgroup").read_text()
        for path in cgroup_limit_files(groups):
            with contextlib.suppress(OSError, ValueError):  # it is not there, or says "max"
                sizes.append(int(pathlib.Path(path).read_text()))
    return min(sizes)


def cgroup_limit_files(groups: str) -> list[str]:
    """Return the files that can limit the memory of this process, given its /proc/self/cgroup.

    Every group above counts as well: systemd's MemoryMax of a slice, a container's limit. A line
    is `0::/path` (version 2) or `N:memory:/path` (version 1); see cgroups(7).
    """
    files = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = "/sys/fs/cgroup"
            name = "memory.max"
        elif "memory" in controllers.split(","):
            root = "/sys/fs/cgroup/memory"
            name = "memory.limit_in_bytes"
        else:
            continue
        group = pathlib.PurePosixPath(path)
        for folder in (group, *group.parents):
            files.append(f"{root}{str(folder).rstrip('/')}/{name}")
    return files


# ------------------------------------------------------------------------------------------- asks
# What the plugins ask, over HTTP on a Unix socket in the private directory: nothing of it is on
# disk, and no other user can connect. Each ask has a connection and a thread of its own, so that
# none holds up another; it is answered by the turn of its session.


class Reply(NamedTuple):
    """What a plugin is to send in place of opencode's body: None means that this goes itself."""

    headers: Mapping[str, str]
    body: bytes | None


class Asked(abc.ABC):
    """Answers the asks of a session, each on a thread of the asks."""

    @abc.abstractmethod
    def answer_turn(self) -> Json:
        """Return what opencode is to be told of the conversation."""

    def answer_request(self, session_id: str, question: Json) -> Reply | None:
        """Return the body to send to the provider, None where nobody waits for its answer."""
        return None

    def may_hand_over(self, session_id: str) -> bool:
        """Return whether the last of that body may go to opencode, which makes it handed over."""
        return False

    def note_hand_over(self, session_id: str, failure: str) -> None:
        """Note how the answer to a request went: whole, or not, for the reason `failure`."""
        return

    def answer_more(self, session_id: str) -> bool:
        """Wait until the client has taken what was sent; return whether it wants the rest."""
        return False


class WarmUp(Asked):
    """The turn of a process's start-up proof, which sends nothing."""

    TURN = {
        "warmup": True,
        "system": [],
        "params": {},
        "conversation": [{"role": "user", "parts": [{"type": "text", "text": "-"}]}],
    }

    def answer_turn(self) -> Json:
        """Return a user's shortest text."""
        return self.TURN


class Asks:
    """Owns the server that the plugins ask, and knows whose each session is.

    `turns` maps a session to who answers for it. It changes by single steps that need no lock.
    `restore` is called under the lock of Opencode.
    """

    def __init__(self, path: pathlib.Path) -> None:
        """Listen at `path`; raise OSError where that is not possible."""
        self.path = path
        self.turns: dict[str, Asked] = {}
        self._server = self._listen()

    def _listen(self) -> AskServer:
        server = AskServer(str(self.path), self.turns)
        arguments = (LOOK_SECONDS,)
        threading.Thread(target=server.serve_forever, args=arguments, daemon=True).start()
        return server

    def restore(self) -> None:
        """Listen again where a cleaner of temp folders has removed the socket."""
        if not self.path.is_socket():
            self.close()
            self._server = self._listen()

    def close(self) -> None:
        """Listen no more. A thread that still answers ends with its process."""
        self._server.shutdown()
        self._server.server_close()


class AskServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Accepts the plugins' connections."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path: str, turns: Mapping[str, Asked]) -> None:
        self.turns = turns
        super().__init__(path, AskHandler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a plugin that has left: its process, or its client, is gone."""


class AskHandler(http.server.BaseHTTPRequestHandler):
    """Answers one ask: POST /turn/SESSION, /request/SESSION or /more/SESSION.

    The status is 200, 204 (send opencode's own body), or 410: nobody waits for this session.
    """

    server: AskServer
    protocol_version = "HTTP/1.1"
    timeout = ASK_SECONDS  # of a plugin that stopped in the middle

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: it is within the program."""

    def do_POST(self) -> None:
        """Pass the ask to the turn of its session."""
        _, kind, session_id = self.path.split("/")
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        turn = self.server.turns.get(session_id)
        if turn is None:
            self._send(410)
        elif kind == "turn":
            self._send(200, json.dumps(turn.answer_turn()).encode())
        elif kind == "request":
            self._hand_over(turn, session_id, question)
        else:
            self._send(200 if turn.answer_more(session_id) else 410)

    def _hand_over(self, turn: Asked, session_id: str, question: Json) -> None:
        """Answer with the body to send to the provider, and tell the turn how that went.

        The turn counts as handed over before the last byte leaves: whatever opencode has got whole
        may be sent by it, and must not be sent again.
        """
        reply = turn.answer_request(session_id, question)
        if reply is None:
            self._send(410)
            return
        try:
            self._send_reply(turn, session_id, reply)
        except OSError as error:
            turn.note_hand_over(session_id, f"opencode did not take its request: {error}")
        else:
            turn.note_hand_over(session_id, "")

    def _send_reply(self, turn: Asked, session_id: str, reply: Reply) -> None:
        headers = {"X-Headers": json.dumps(dict(reply.headers))}
        if reply.body is None:
            may_go = turn.may_hand_over(session_id)
            self._send_head(204 if may_go else 410, 0, headers)
            return
        self._send_head(200, len(reply.body), headers)
        body = memoryview(reply.body)
        self.wfile.write(body[:-1])
        if turn.may_hand_over(session_id):
            self.wfile.write(body[-1:])

    def _send(self, status: int, body: bytes = b"") -> None:
        self._send_head(status, len(body), {})
        self.wfile.write(body)

    def _send_head(self, status: int, size: int, headers: Mapping[str, str]) -> None:
        self.close_connection = True
        self.send_response_only(status)
        self.send_header("Connection", "close")
        if status != 204:
            self.send_header("Content-Length", str(size))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


# --------------------------------------------------------------------------------------- processes
# Child is a program with pipes, the only user of Popen; OpencodeProcess is one that speaks ACP:
# JSON-RPC 2.0, a message a line. One thread runs a process from its start to its end: it alone
# reads what the program prints, and puts each message into the inbox of the turn that it belongs
# to. Any thread may write, a line on stdin at once or not at all: they are all short.

STARTING = "starting"  # it is being proven
READY = "ready"
RETIRED = "retired"  # it gets no more turns, and ends when it has none
JSON_RPC = b'{"jsonrpc"'
SESSION_UPDATE = b'{"jsonrpc":"2.0","method":"session/update"'  # neither ordered nor fast: ignored
SESSION_ID = re.compile(rb'"sessionId":"([^"]+)"')
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# What opencode says of a request that failed, as each one does that the plugin has answered.
FAILED_REQUESTS = re.compile(r"^.*code: -32603[^{]*\{[^}]*\}[,; ]*\}[,; ]*")
PROMPT = [{"type": "text", "text": "-"}]  # what matters is told by the plugin
Trace = Callable[[str, Json, int], None]  # takes an arrow, a JSON-RPC message, its size in bytes


class Child:
    """A program in a process group of its own, with its pipes, from its start to its end.

    `spawn`, `lines` and `close` are its thread's. `_lock` keeps what is written to stdin whole, and
    stdin from being closed, and its number used again, under a writer.
    """

    def __init__(self, opencode: Opencode) -> None:
        self.opencode = opencode
        self.home = pathlib.Path()
        self.pid = 0  # until it is started
        self.returncode = 0
        self.stdout_has_ended = False  # nobody is left who could print more
        self._popen: Any = None
        self._poll = select.poll()
        self._stderr_tail = b""
        self._stderr_has_ended = False
        self._noise = b""  # the last line of stdout that was no message
        self._stop_at = math.inf  # when it is killed, as it was told to end before
        self._lock = threading.Lock()

    def spawn(self, *arguments: str, stdout: Any = subprocess.PIPE) -> None:
        """Start opencode with `arguments`, its stdout a file or a pipe.

        Raises OSError where there is no room for its home, ProcessFailed where it cannot be run.
        """
        self.home = self.opencode.new_home()
        try:
            self._popen = subprocess.Popen(
                [self.opencode.path, *arguments],
                bufsize=0,
                start_new_session=True,
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=subprocess.PIPE,
                cwd=self.home / "cwd",
                env=self.opencode.environment(self.home, is_acp=arguments[0] == "acp"),
            )
        except OSError as error:
            raise ProcessFailed(f"{self.opencode.path} cannot be run: {error.strerror}") from None
        self.pid = self._popen.pid
        self.opencode.pids.add(self.pid)
        os.set_blocking(self._popen.stdin.fileno(), False)
        for pipe in (self._popen.stdout, self._popen.stderr):
            if pipe is not None:
                self._poll.register(pipe.fileno(), select.POLLIN)

    def lines(self) -> Iterator[bytes | None]:
        """Yield each line that it prints, and None at least every LOOK_SECONDS without one.

        Of a line that is too long only the beginning is yielded. Ends when the program does, or
        closes its stdout.
        """
        rest = bytearray()
        while True:
            block = self._read_stdout()
            if block is None:
                yield None
                continue
            if not block:
                break

            rest += block
            if b"\n" in block:
                *lines, last = bytes(rest).split(b"\n")
                rest = bytearray(last)
                yield from lines
            if len(rest) > MAX_LINE_BYTES:
                yield bytes(rest[:LINE_HEAD_BYTES])
                rest.clear()
        yield bytes(rest)

    def runs_on(self) -> bool:
        """Wait for a program whose stdout is a file, LOOK_SECONDS at most; tell whether it runs."""
        if self._stderr_has_ended:  # it ends, or a wrapper has redirected stderr
            self._kill_when_late()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(LOOK_SECONDS)
        else:
            self._read_stdout()
        return self._popen.poll() is None

    def _read_stdout(self) -> bytes | None:
        """Return what is there of stdout, b"" at its end, None after LOOK_SECONDS without it."""
        self._kill_when_late()
        stdout = self._popen.stdout and self._popen.stdout.fileno()
        stderr = self._popen.stderr.fileno()
        ready = [number for number, _ in self._poll.poll(1000 * LOOK_SECONDS)]
        if stderr in ready:
            self._read_stderr()
        if stdout in ready:
            block = os.read(stdout, 1 << 18)
            self.stdout_has_ended = not block
            return block
        if not ready and self._popen.poll() is not None and not self._poll.poll(0):
            return b""  # something that it started keeps stdout open
        return None

    def _read_stderr(self) -> None:
        number = self._popen.stderr.fileno()
        text = os.read(number, 1 << 16)
        self._stderr_tail = (self._stderr_tail + text)[-MAX_STDERR_BYTES:]
        if not text:
            self._poll.unregister(number)
            self._stderr_has_ended = True

    def read_last_words(self) -> None:
        """Read what a program says on stderr behind the end of its stdout, if it comes soon."""
        if self.pid == 0:
            return
        poll = select.poll()
        poll.register(self._popen.stderr.fileno(), select.POLLIN)
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while not self._stderr_has_ended and time.monotonic() < deadline:
            if poll.poll(1000 * LAST_WORDS_SECONDS):
                self._read_stderr()

    def write_line(self, line: bytes) -> None:
        """Write a line to its stdin; raise ProcessFailed where it does not read.

        Where it has ended nothing happens: whoever reads its stdout tells that.
        """
        with self._lock, contextlib.suppress(OSError, ValueError):
            if self._popen.stdin.write(line) != len(line):
                raise self.failed("opencode does not read its input")

    def stop(self) -> None:
        """Tell it to end; what has not ended after STOP_SECONDS is killed by its thread."""
        if self._stop_at == math.inf:
            self._stop_at = time.monotonic() + STOP_SECONDS
            self._signal(signal.SIGTERM)

    def _kill_when_late(self) -> None:
        if time.monotonic() >= self._stop_at:
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # gone; macOS says EPERM
                os.killpg(self.pid, number)

    def close(self) -> None:
        """End the program and what it started, and give back what it had."""
        if self.pid:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(STOP_SECONDS)
            self._signal(signal.SIGKILL)
            with self._lock:
                self._popen.__exit__(None, None, None)  # closes the pipes, waits for its end
            self.returncode = self._popen.returncode
            self.opencode.pids.discard(self.pid)
        if self.home != pathlib.Path():
            shutil.rmtree(self.home, ignore_errors=True)

    def ended(self, text: str = "opencode ended") -> ProcessFailed:
        """Return the error `text` for the program's end, or that it was killed.

        The end comes a moment behind that of its pipes.
        """
        code = None
        if self.pid:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._popen.wait(LAST_WORDS_SECONDS)
        if code == -signal.SIGKILL:
            return self.failed("opencode was killed, perhaps for want of memory")
        return self.failed(text)

    def failed(self, text: str) -> ProcessFailed:
        """Return the error `text`, with what the program said last, without colours."""
        words = (self._stderr_tail.strip() or self._noise).decode("utf-8", "replace")
        words = " ".join(COLOUR.sub("", words).split())
        words = FAILED_REQUESTS.sub("", words)[-MAX_WORDS_CHARACTERS:]
        return ProcessFailed(f"{text}: {words}" if words else text)

    def memory(self) -> int:
        """Return the resident bytes of the program and what it started, 0 where nothing tells."""
        with contextlib.suppress(OSError, ValueError, IndexError, subprocess.SubprocessError):
            if sys.platform == "linux":
                return self._memory_by_proc()
            return self._memory_by_ps()
        return 0

    def _memory_by_proc(self) -> int:
        pages = 0
        pids = [str(self.pid)]
        for pid in pids:  # which grows by the children of its members
            folder = pathlib.Path("/proc", pid)
            pages += int((folder / "statm").read_text().split()[1])
            pids += (folder / "task" / pid / "children").read_text().split()
        return pages * os.sysconf("SC_PAGE_SIZE")

    def _memory_by_ps(self) -> int:
        command = ["ps", "-A", "-o", "pgid=", "-o", "rss="]
        rows = subprocess.check_output(command, timeout=PS_SECONDS).decode().splitlines()
        kilobytes = 0
        for row in rows:
            group, size = row.split()
            if int(group) == self.pid:
                kilobytes += int(size)
        return 1024 * kilobytes


class OpencodeProcess(Child):
    """An `opencode acp` process, from its start to its end.

    `start` and `serve` are its thread's. `state`, `turns`, `served`, `size` and `idle_since` are
    the pool's account of it, under the pool's lock. `_replies` says whose the reply to a request's
    number is; it and `_sessions_ahead` change by single steps that need no lock.
    """

    def __init__(self, opencode: Opencode, trace: Trace | None = None) -> None:
        super().__init__(opencode)
        self.catalog = opencode.catalog
        self.is_trimmed = opencode.trim
        self.state = STARTING
        self.turns: set[Turn] = set()
        self.served = 0  # turns, also those that it has still
        self.size_when_ready = 0
        self.size = 0
        self.born = time.monotonic()
        self.idle_since = self.born
        self.new_session: Json = {}  # the parameters of session/new
        self._sessions_ahead: list[Json] = []  # one, until it is taken
        self._trace = trace
        self._numbers = itertools.count(1)
        self._replies: dict[int, Turn] = {}
        self._lines = self.lines()
        self._reports: set[str] = set()  # the kinds of the plugin's reports while it starts

    @property
    def is_fresh(self) -> bool:
        """Tell whether it has served nothing."""
        return self.served == 0

    @property
    def growth(self) -> int:
        """Return the bytes by which it has grown: catalogs and plugins make some large at once."""
        return 0 if self.is_fresh else self.size - self.size_when_ready

    def start(self) -> frozenset[str]:
        """Start it, prove that it works, and return the models that it offers.

        The proof goes as far as a request would leave, and sends nothing. Raises StartError where
        the user has to do something, ProcessFailed for everything else.
        """
        self.spawn("acp", "--hostname", "127.0.0.1", "--port", "0")
        self.new_session = {"cwd": str(self.home / "cwd"), "mcpServers": []}
        answer = self._call("initialize", {"protocolVersion": 1, "clientCapabilities": {}})
        self._check_version(str((answer.get("agentInfo") or {}).get("version", "")))

        session = self._call("session/new", self.new_session)
        if "loaded" not in self._reports:
            raise self.failed(f"opencode {self.opencode.version} did not load the proxy's plugin")
        self._warm_up(session["sessionId"])
        self._sessions_ahead.append(self._call("session/new", self.new_session))
        self.size_when_ready = self.size = self.memory()
        return models_of(session)[0]

    def take_session(self) -> Json | None:
        """Return the session that was opened ahead, so that the first turn need not wait for it."""
        with contextlib.suppress(IndexError):  # another turn has it
            return self._sessions_ahead.pop()
        return None

    def _check_version(self, version: str) -> None:
        self.opencode.version = version
        numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
        if (0, 0, 0) < numbers < MIN_OPENCODE:  # a build of one's own says 0.0.0
            oldest = ".".join(str(number) for number in MIN_OPENCODE)
            raise StartError(
                f"opencode {version} is too old: {oldest} or newer is needed (opencode upgrade)"
            )

    def _warm_up(self, session_id: str) -> None:
        turns = self.opencode.asks.turns
        turns[session_id] = WarmUp()
        reason = ""
        try:
            self._call("session/prompt", {"sessionId": session_id, "prompt": PROMPT})
        except ProcessFailed as failure:  # as it should: the plugin ends the turn by refusing it
            reason = f" ({failure})"
        finally:
            del turns[session_id]
        if "warm" not in self._reports:
            name = f"opencode {self.opencode.version}"
            raise self.failed(f"{name} did not reach the model in the start-up proof{reason}")

    def _call(self, method: str, params: Json) -> Json:
        """Send a request while it starts, and return the result."""
        number = self.request(method, params)
        deadline = time.monotonic() + START_SECONDS
        for line in self._lines:
            if time.monotonic() > deadline:
                raise self.failed(f"opencode did not answer {method} within {START_SECONDS:.0f} s")
            message = self._parse(line)
            if message is None:
                continue
            if message.get("id") == number:
                return result_of(message, method)
            self._note_report(message)
        raise self.ended()

    def _note_report(self, message: Json) -> None:
        kind = str(message.get("method")).partition("proxy/")[2]
        if kind == "loaded" and kind not in self._reports:  # it is told more than once
            self.opencode.note_timers(message["params"].get("hasClosedTimers") is True)
        self._reports.add(kind)

    def serve(self) -> None:
        """Pass messages on until the process ends."""
        for line in self._lines:
            message = self._parse(line)
            if message is None:
                continue
            if "method" not in message:
                self._pass_reply(message)
            elif "id" in message:  # opencode asks for a permission, a file...
                refusal = {"code": -32601, "message": "refused"}
                self._write({"id": message["id"], "error": refusal})
            else:
                self._pass_report(message["method"], message.get("params") or {})

    def _pass_reply(self, message: Json) -> None:
        number: Any = message.get("id")
        turn = self._replies.pop(number, None)
        if turn is not None:
            turn.inbox.put(Letter("reply", self, number, message))

    def _pass_report(self, method: str, params: Json) -> None:
        session_id: Any = params.get("sessionId")
        turn = self.opencode.asks.turns.get(session_id)
        if isinstance(turn, Turn) and method.startswith("proxy/"):
            kind = method[len("proxy/") :]
            turn.inbox.put(Letter(kind, self, session_id, params))

    def _parse(self, line: bytes | None) -> Json | None:
        """Return the message in a line, None where there is none.

        A line that cannot be read becomes the failure of the turn that it belongs to.
        """
        if not line or SESSION_UPDATE in line:
            return None
        start = line.find(JSON_RPC)
        if start < 0:  # a plugin of the user's prints, perhaps
            self._noise = line.strip()[:200] or self._noise
            return None
        try:
            message: Json = json.loads(line[start:].decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return self._unreadable(line)
        if self._trace is not None:
            self._trace("<-", message, len(line))
        return message

    def _unreadable(self, line: bytes) -> Json | None:
        session = SESSION_ID.search(line)
        if session is None:
            return None
        params = {
            "sessionId": session[1].decode("utf-8", "replace"),
            "message": "opencode printed a line that cannot be read, or that is too long",
        }
        return {"method": "proxy/unreadable", "params": params}

    def request(self, method: str, params: Json, turn: Turn | None = None) -> int:
        """Send a request, whose reply is for `turn`; return its number.

        Raises ProcessFailed where the process does not read.
        """
        number = next(self._numbers)
        if turn is not None:
            self._replies[number] = turn
        self._write({"id": number, "method": method, "params": params})
        return number

    def cancel(self, session_id: str) -> None:
        """Tell opencode to give up what it does in a session."""
        with contextlib.suppress(ProcessFailed):
            self._write({"method": "session/cancel", "params": {"sessionId": session_id}})

    def forget(self, number: int) -> None:
        """Let the reply to a request go to nobody."""
        self._replies.pop(number, None)

    def _write(self, message: Json) -> None:
        line = json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n"
        if self._trace is not None:
            self._trace("->", message, len(line))
        self.write_line(line)


def result_of(reply: Json, method: str) -> Json:
    """Return the result in a reply; raise ProcessFailed where it is an error."""
    if "error" in reply:
        raise ProcessFailed(f"opencode refused {method}: {reply['error']['message']}")
    return reply.get("result") or {}


def models_of(session: Json) -> tuple[frozenset[str], str]:
    """Return the models that a new session offers, and the one that it has."""
    for option in session.get("configOptions") or ():
        if option.get("id") == "model":
            offered = frozenset(choice["value"] for choice in option.get("options", ()))
            return offered, option.get("currentValue", "")
    return frozenset(), ""


# ------------------------------------------------------------------------------------------- turns
# A Turn is one choice of a request on its way from the queue to its last event: straight-line code
# on the thread that wants the events. Its only wait is `_next_letter`. What other threads have to
# say to it (the pool, the thread of its process, those of the asks) they put into its inbox.


class Letter(NamedTuple):
    """What reaches a turn from another thread.

    `kind` is "process" (it was given `process`), "failed" (the reason is in `content`), "ended"
    (likewise, and its stdout was read to its end: it can send nothing more), "reply" (of opencode),
    "request" (the plugin asks for the body), "hand over" (how the answer to that went), or one of
    the plugin's reports. `about` is the session, or the number of the request, that it belongs to.
    """

    kind: str
    process: OpencodeProcess | None = None
    about: Any = None
    content: Any = None


class Outgoing(NamedTuple):
    """The request that opencode wants to send, and where the plugin waits for what to send."""

    url: str
    body: Json
    replies: queue.SimpleQueue[Reply]


Look = Callable[[], None]  # is called every LOOK_SECONDS; what it raises gives the wait up
Events = Generator[Any, None, None]  # of an answer: Event or Piece; the last has a finish_reason


class Turn(Asked):
    """One choice of a request.

    `process` is set by the pool, under its lock. `handed_over` says that the body is with opencode:
    from then on nothing may be sent again, unless that process ended without having sent it.
    `session_id` says whether somebody still waits for what opencode asks. `_lock` protects these
    two together: either the turn has left its session, or the body is handed over. Everything else
    is its own thread's; the methods that run on the threads of the asks put letters into the inbox.
    """

    def __init__(
        self,
        index: int,
        pool: Pool,
        new_exchange: Callable[[], Exchange],
        model: Model,
        timeout: float,
    ) -> None:
        self.index = index
        self.inbox: queue.SimpleQueue[Letter] = queue.SimpleQueue()
        self.process: OpencodeProcess | None = None
        self.has_begun = False  # the first event has come
        self.handed_over = False
        self.session_id = ""
        self._lock = threading.Lock()
        self._pool = pool
        self._new_exchange = new_exchange
        self._model = model
        self._timeout = timeout
        self._conversation: Json = {}  # what opencode is told of it
        self._request_number = 0  # of the last request to opencode
        self._is_prompted = False  # opencode's turn runs: it has to be cancelled, also at the end
        self._is_sending = False  # the body is on its way to the provider
        self._look: Look = lambda: None
        self._look_at = 0.0

    def events(self, look: Look) -> Events:
        """Yield the events of the answer; iterate it under contextlib.closing.

        A process that fails before it may have sent the body is replaced by another one. Raises
        APIError, and whatever `look` raises.
        """
        self._look = look
        try:
            for attempt in range(1, MAX_ATTEMPTS + 1):
                process = None
                try:
                    process = self._wait_for_process()
                    yield from self._attempt(process)
                    return
                except ProcessFailed as failure:
                    if self._pool.closing.is_set():  # it did not fail: it was told to end
                        raise shutting_down() from None
                    if not self.leave(failed=process, again=attempt < MAX_ATTEMPTS):
                        raise APIError(failure.status, str(failure), code=failure.code) from None
        finally:
            self.leave()

    def leave(self, failed: OpencodeProcess | None = None, again: bool = False) -> bool:
        """Give the process up, or the place in the queue; safe to call twice.

        `failed` is the process whose fault it is: it gets no more turns. With `again` the turn
        waits for another process, unless its body was handed over. Returns whether it waits.
        """
        self._end_session()  # from here on nothing can be handed over any more
        again = again and not self.handed_over
        self._pool.release(self, failed, again)
        return again

    def _end_session(self) -> None:
        """Leave the session; opencode stops its turn in it and drops the provider's connection.

        Also after a whole answer, whose end the plugin mostly has not seen by then.
        """
        with self._lock:
            session_id = self.session_id
            self.session_id = ""
        self._pool.opencode.asks.turns.pop(session_id, None)
        if self.process is not None:
            self.process.forget(self._request_number)
            if self._is_prompted:
                self.process.cancel(session_id)
        self._is_prompted = False

    def _attempt(self, process: OpencodeProcess) -> Events:
        exchange = self._new_exchange()
        self._prepare(process, exchange)
        for event in self._relay(exchange):
            if not self.has_begun:
                self.has_begun = True
                self._pool.look_again()  # now there is time to start a fresh process
            yield event

    def _wait_for_process(self) -> OpencodeProcess:
        while True:
            letter = self._next_without_failure(math.inf)
            if letter is not None and letter.kind == "process" and letter.process is not None:
                return letter.process

    def _prepare(self, process: OpencodeProcess, exchange: Exchange) -> None:
        """Bring opencode to where it would send its request, and let the plugin have the body."""
        foreign = self._pool.opencode.foreign
        is_foreign = self._model.name in foreign
        outgoing = self._prompt(process, exchange, is_foreign)
        body = exchange.body(outgoing.url, outgoing.body)

        if body is None and not is_foreign:
            foreign.add(self._model.name)  # opencode itself must know the conversation: once more
            self._end_session()
            outgoing = self._prompt(process, exchange, is_foreign=True)
            body = exchange.body(outgoing.url, outgoing.body)
        outgoing.replies.put(Reply(exchange.headers, body))

    def _prompt(self, process: OpencodeProcess, exchange: Exchange, is_foreign: bool) -> Outgoing:
        """Open a session and prompt it; return the request that opencode wants to send."""
        session = process.take_session()
        if session is None:
            session = self._call(process, "session/new", process.new_session)
        offered, current = models_of(session)
        name = self._model.name
        if name not in offered:  # opencode would take another model
            raise model_not_found(name)

        session_id = session["sessionId"]
        self._conversation = exchange.conversation(is_foreign)
        self.session_id = session_id
        self._pool.opencode.asks.turns[session_id] = self
        if current != name:
            self._call(process, "session/set_model", {"sessionId": session_id, "modelId": name})

        params = {"sessionId": session_id, "prompt": PROMPT}
        self._request_number = process.request("session/prompt", params, self)
        self._is_prompted = True
        outgoing: Outgoing = self._wait_for("request").content
        return outgoing

    def _call(self, process: OpencodeProcess, method: str, params: Json) -> Json:
        self._request_number = process.request(method, params, self)
        return result_of(self._wait_for("reply").content, method)

    def _relay(self, exchange: Exchange) -> Events:
        """Yield what the provider's answer means, until it is over.

        Once it has a finish_reason only its usage is awaited, for `exchange.patience` seconds:
        what comes instead, silence, a dropped connection or the end of the process, ends it well.
        """
        heard_at = time.monotonic()
        while True:
            is_finished = exchange.patience is not None
            letter = self._next_letter(heard_at + self._limit(exchange.patience))
            failure = self._silence() if letter is None else self._failure_in(letter)
            if failure is not None and not is_finished:
                raise failure

            if letter is None or failure is not None:
                events: Iterable[Any] = exchange.end()
            else:
                events = self._read(exchange, letter)

            for event in events:
                yield event
                if event.finish_reason is not None:
                    return
            if not is_finished:
                heard_at = time.monotonic()

    def _limit(self, patience: float | None) -> float:
        """Return how many seconds of silence are borne."""
        if not self.handed_over:
            return START_SECONDS
        return self._timeout if patience is None else patience

    def _silence(self) -> ProcessFailed:
        """Return the error for silence that lasted too long; the process may be what hangs."""
        if not self.handed_over:
            return ProcessFailed("opencode does not take its request")
        text = f"The model's provider sent nothing for {self._timeout:g} seconds"
        return ProcessFailed(text, 504, "timeout")

    def _read(self, exchange: Exchange, letter: Letter) -> Iterable[Any]:
        """Return the events that a letter means."""
        content = letter.content
        if letter.kind == "upstream":
            return exchange.begin(content["status"], content["headers"])
        if letter.kind == "data":
            return exchange.feed(content["text"])
        if letter.kind == "end":
            return exchange.end()
        if letter.kind == "refused":
            return exchange.refused(content["status"], content["headers"], content["body"])
        if letter.kind in ("delta", "finish"):
            return exchange.report(content)
        if letter.kind == "sending":
            self._is_sending = True
        if letter.kind == "more":
            content.put(True)  # the client has taken everything before it
        return ()

    def _wait_for(self, kind: str) -> Letter:
        while True:
            letter = self._next_without_failure(time.monotonic() + START_SECONDS)
            if letter is None:
                raise ProcessFailed(f"opencode did not go on within {START_SECONDS:.0f} s")
            if letter.kind == kind:
                return letter

    def _next_without_failure(self, deadline: float) -> Letter | None:
        """Return what `_next_letter` does; raise the failure that a letter tells of."""
        letter = self._next_letter(deadline)
        failure = None if letter is None else self._failure_in(letter)
        if failure is not None:
            raise failure
        return letter

    def _next_letter(self, deadline: float) -> Letter | None:
        """Return the next letter that still concerns the turn, None where there is none in time.

        Raises whatever `look` raises.
        """
        while True:
            now = time.monotonic()
            if now >= self._look_at:
                self._look()
                self._look_at = time.monotonic() + LOOK_SECONDS
            try:
                letter = self.inbox.get(timeout=max(0.0, min(deadline, self._look_at) - now))
            except queue.Empty:
                if time.monotonic() >= deadline:
                    return None
                continue
            if not self._is_late(letter):
                return letter

    def _is_late(self, letter: Letter) -> bool:
        """Tell whether a letter comes from a process, a session or a request that it has left."""
        if letter.process is not self.process:
            return True
        return letter.about not in (None, self.session_id, self._request_number)

    def _failure_in(self, letter: Letter) -> ProcessFailed | APIError | None:
        """Return the failure that a letter tells of: of the process, or of opencode's turn.

        Also notes where that turn is over.
        """
        content = letter.content
        if letter.kind == "ended":
            self._take_back()
            return ProcessFailed(content)
        if letter.kind == "failed" or (letter.kind == "hand over" and content):
            return ProcessFailed(content)
        if letter.kind == "unreadable":
            return ProcessFailed(content["message"])

        if self._is_prompted and letter.kind in ("reply", "end", "refused", "error"):
            self._is_prompted = False  # opencode's own turn ends now: there is nothing to cancel
            if letter.kind == "reply":
                return turn_error(content.get("error") or {})
            if letter.kind == "error":
                return turn_error(content)
        return None

    def _take_back(self) -> None:
        """Let the body go to another process where the one that has ended did not send it."""
        self._end_session()  # from here on nothing can be handed over any more
        if not self._is_sending:
            self.handed_over = False

    # -- on the threads of the asks

    def answer_turn(self) -> Json:
        return self._conversation

    def answer_request(self, session_id: str, question: Json) -> Reply | None:
        """Let the turn's own thread make the body; return None where nobody waits any more."""
        replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        outgoing = Outgoing(question["url"], question["body"], replies)
        self.inbox.put(Letter("request", self.process, session_id, outgoing))
        reply: Reply | None = self._answer(session_id, replies)
        return reply

    def answer_more(self, session_id: str) -> bool:
        """Wait until the client has taken what was sent; return whether it wants the rest."""
        replies: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.inbox.put(Letter("more", self.process, session_id, replies))
        return self._answer(session_id, replies) is not None

    def _answer(self, session_id: str, replies: queue.SimpleQueue[Any]) -> Any:
        while session_id == self.session_id:
            with contextlib.suppress(queue.Empty):
                return replies.get(timeout=LOOK_SECONDS)
        return None

    def may_hand_over(self, session_id: str) -> bool:
        """Return whether the last of the body may go to opencode, which makes it handed over.

        False where the turn has left: another process may have its body by now.
        """
        with self._lock:
            if session_id != self.session_id:
                return False
            self.handed_over = True
            return True

    def note_hand_over(self, session_id: str, failure: str) -> None:
        """Note how the answer to a request went: whole, or not, for the reason `failure`.

        The letter also ends the wait for the hand-over: from now on the provider's time counts.
        """
        self.inbox.put(Letter("hand over", self.process, session_id, failure))


def together(turns: list[Turn], look: Look) -> Generator[tuple[int, Any], None, None]:
    """Yield the events of several turns as they come, each behind the index of its turn.

    Each turn runs on a thread of its own: its time-outs do not wait for a client that reads slowly.
    The queue between them is bounded, so that such a client slows its turns down.
    """
    events: queue.Queue[Any] = queue.Queue(MAX_EVENTS_AHEAD)
    is_given_up = threading.Event()
    without_thread = list(turns)
    running = len(turns)
    try:
        while without_thread:
            start_thread(follow, without_thread[0], events, is_given_up)
            del without_thread[0]
        while running:
            look()
            with contextlib.suppress(queue.Empty):
                index, event = events.get(timeout=LOOK_SECONDS)
                if isinstance(event, Exception):
                    raise event
                if event is None:
                    running -= 1
                else:
                    yield index, event
    finally:
        is_given_up.set()
        for turn in without_thread:
            turn.leave()


def follow(turn: Turn, events: queue.Queue[Any], is_given_up: threading.Event) -> None:
    """Put a turn's events into `events`, each behind its index; then None, or what it raised."""

    def look() -> None:
        if is_given_up.is_set():
            raise ClientDisconnected("the request was given up")

    def put(event: Any) -> None:
        while True:
            look()
            with contextlib.suppress(queue.Full):
                events.put((turn.index, event), timeout=LOOK_SECONDS)
                return

    with contextlib.suppress(ClientDisconnected):
        try:
            with contextlib.closing(turn.events(look)) as own:
                for event in own:
                    put(event)
            put(None)
        except ClientDisconnected:
            raise
        except Exception as error:  # told on the thread of the request
            put(error)


# -------------------------------------------------------------------------------------------- pool
# Who answers whom. The pool owns the processes and the queue of turns: whatever changes them does
# so inside `_changing`, which then calls `_match`, the one place that decides which turn gets a
# process, which process starts and which ends. Nothing slow happens under its lock.


def shutting_down() -> APIError:
    """Return the error for requests that the end of the program cuts off."""
    return APIError(503, "The server is shutting down", code="shutting_down")


class Pool:
    """Owns every opencode process and the queue of turns.

    A turn gets a process that is ready, a fresh one or one that may serve more; where there is
    none, one starts for it. Besides, --spares fresh processes are kept ready. A process that has
    served --requests-per-process turns, has grown or is old, is worn: as soon as another can take
    its place it gets no turns, and it ends when it answers none. With the default of 1 every
    process is worn by its first answer: under load one process is shared until a fresh one is up.

    `_lock` protects `_processes` and their accounts (state, turns, served, size, idle_since),
    `_waiting`, `_turns` (those that have a process) and the account of failed starts. Each process
    has a thread from its start to its end (`_live`); the pool's own thread (`_tend`) looks at all
    of them from time to time. Which models there are is the matter of `watch`.
    """

    def __init__(self, opencode: Opencode, settings: Any, trace: Trace | None = None) -> None:
        self.opencode = opencode
        self.closing = threading.Event()
        self.last_error = ""  # "": all is well
        self._error_at = 0.0  # by the clock on the wall
        self.thoughts = Thoughts()
        self.watch = CatalogWatch(opencode, self)
        self._settings = settings
        self._trace = trace
        self._spares = 1  # until it is proven that there can be any
        self._wake = threading.Event()  # lets `_tend` look at once
        self._tender = threading.Thread(target=self._tend, daemon=True)

        self._lock = threading.Lock()
        self._processes: set[OpencodeProcess] = set()
        self._waiting: collections.deque[Turn] = collections.deque()
        self._turns: set[Turn] = set()
        self._failed_starts = 0  # one after the other
        self._failed_at = math.inf  # when the last one failed; nothing starts before the proof

    # -- for the handlers of requests

    def ready(self, look: Look) -> Catalog:
        """Return the catalog that the user's files mean, once it is there.

        Raises APIError where opencode cannot be used at all, and whatever `look` raises.
        """
        return self.watch.ready(look)

    def run(
        self,
        request: Any,
        model: Model,
        look: Look,
        exchange_class: Callable[[Any, Model, Thoughts], Exchange] = ChatExchange,
    ) -> Generator[tuple[int, Any], None, None]:
        """Yield each event of the answer behind the index of its choice.

        Iterate it under contextlib.closing. `look` is called at least every LOOK_SECONDS; what it
        raises gives the request up. Raises APIError.
        """

        def new_exchange() -> Exchange:
            return exchange_class(request, model, self.thoughts)

        turns = []
        for index in range(request.choices):
            turns.append(Turn(index, self, new_exchange, model, self._settings.timeout))
        self._admit(turns)

        if len(turns) > 1:
            yield from together(turns, look)
            return
        with contextlib.closing(turns[0].events(look)) as events:
            for event in events:
                yield 0, event

    def _admit(self, turns: list[Turn]) -> None:
        """Put the turns of a request into the queue; raise APIError where it is full."""
        limit = self._settings.max_queue
        with self._changing():
            if self.closing.is_set():
                raise shutting_down()
            requests = sum(turn.index == 0 for turn in self._waiting)
            if requests + len(self._turns) >= self._settings.max_concurrency + limit:
                raise APIError(
                    503,
                    f"All {limit} places in the queue are taken: try again later",
                    code="queue_full",
                    headers={"Retry-After": str(QUEUE_RETRY_SECONDS)},
                )
            self._waiting.extend(turns)
            if self._failed_starts > 0:
                self._wake.set()  # the pause is shorter while somebody waits

    def look_again(self) -> None:
        """Decide anew who is served, started and ended: something has happened."""
        with self._changing():
            pass

    def release(self, turn: Turn, failed: OpencodeProcess | None, again: bool) -> None:
        """Take a turn out of the queue or away from its process.

        `failed` is a process that gets no more turns. `again`: the turn is the next to get another
        one. Safe to call twice.
        """
        with self._changing():
            process = turn.process
            turn.process = None
            self._turns.discard(turn)
            if process is not None:
                process.turns.discard(turn)
                process.idle_since = time.monotonic()
            if failed is not None:
                failed.state = RETIRED

            is_waiting = turn in self._waiting
            if is_waiting and not again:
                self._waiting.remove(turn)
            if again and not is_waiting:
                self._waiting.appendleft(turn)

    # -- decisions

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Let the pool be changed, then do what follows from it, the slow part without the lock."""
        with self._lock:
            yield
            started, ended = self._match()
        for process in ended:
            process.stop()
        for process in started:
            self._launch(process)

    def _match(self) -> tuple[list[OpencodeProcess], list[OpencodeProcess]]:
        """Give processes to turns; return the processes that are to be started, and to be ended.

        One decision at a time: after each the rest is counted anew.
        """
        if self.closing.is_set():
            return [], list(self._processes)
        for process in self._in(READY):
            if process.catalog is not self.opencode.catalog or process.growth > MAX_GROWTH_BYTES:
                process.state = RETIRED
        self._assign()

        started = []
        while self._lacks_a_process():
            process = OpencodeProcess(self.opencode, self._trace)
            self._processes.add(process)
            started.append(process)

        surplus = self._surplus()
        while surplus is not None:
            surplus.state = RETIRED
            surplus = self._surplus()
        return started, [process for process in self._in(RETIRED) if not process.turns]

    def _assign(self) -> None:
        """Give a process to each turn that waits, in order of arrival, as long as there is room."""
        while self._waiting and len(self._turns) < self._settings.max_concurrency:
            process = self._best()
            if process is None:
                return
            turn = self._waiting.popleft()
            turn.process = process
            turn.inbox.put(Letter("process", process))
            self._turns.add(turn)
            process.turns.add(turn)
            process.served += 1

    def _best(self) -> OpencodeProcess | None:
        """Return the process to use next, the newest of its kind.

        One that has begun and may serve more comes before a fresh one, a worn one last.
        """

        def rank(process: OpencodeProcess) -> tuple[bool, bool, float]:
            return not self._is_worn(process), not process.is_fresh, process.born

        able = [
            process for process in self._in(READY) if len(process.turns) < MAX_TURNS_PER_PROCESS
        ]
        return max(able, key=rank, default=None)

    def _is_worn(self, process: OpencodeProcess) -> bool:
        """Tell whether a process gets a turn only where no other is there."""
        if process.growth > WORN_GROWTH_BYTES:
            return True
        if time.monotonic() > process.born + WORN_SECONDS:
            return True
        return bool(process.served >= self._settings.requests_per_process)

    def _in(self, state: str) -> list[OpencodeProcess]:
        return [process for process in self._processes if process.state == state]

    def _lacks_a_process(self) -> bool:
        """Tell whether one more is to be started.

        A start takes the processor from answers: unless somebody waits, or nobody could be served,
        it comes when at most one turn runs, whose first event is there.
        """
        if time.monotonic() < self._start_at():
            return False
        starting = len(self._in(STARTING))
        places = self._settings.max_concurrency - len(self._turns)
        waiting = min(len(self._waiting), places)
        if waiting > 0:
            return bool(starting * MAX_TURNS_PER_PROCESS < waiting)

        is_quiet = len(self._turns) <= 1 and all(turn.has_begun for turn in self._turns)
        is_logged_in = self.opencode.catalog.default in self.opencode.catalog.models
        if not is_logged_in or not (is_quiet or self._best() is None):
            return False
        return len(self._able()) + starting < self._spares

    def _able(self) -> list[OpencodeProcess]:
        return [process for process in self._in(READY) if not self._is_worn(process)]

    def _surplus(self) -> OpencodeProcess | None:
        """Return an idle process that nobody needs, the oldest; None where there is none."""
        able = len(self._able())
        for process in sorted(self._in(READY), key=lambda process: process.born):
            if process.turns:
                continue
            if self._is_worn(process):
                is_replaced = able > 0 or self._spares == 0
                if is_replaced:
                    return process
            elif able > self._spares:
                idle_seconds = time.monotonic() - process.idle_since
                if process.is_fresh or idle_seconds > KEEP_WARM_SECONDS:
                    return process
        return None

    # -- the life of a process

    def _launch(self, process: OpencodeProcess) -> None:
        try:
            threading.Thread(target=self._live, args=(process,), daemon=True).start()
        except RuntimeError as error:  # no more threads are allowed
            with self._lock:  # nothing follows from it: the next look comes when it is due
                self._processes.discard(process)
                self._note_failed_start(str(error))

    def _live(self, process: OpencodeProcess) -> None:
        """Run a process from its start to its end, on its own thread."""
        failure = ""
        try:
            offered = process.start()
            is_good = self.watch.judge(process, offered)
            with self._changing():
                process.state = READY if is_good else RETIRED
                self._failed_starts = 0
            process.serve()
        except Exception as error:  # also an answer in a shape that was never seen
            failure = reason_of(error)
        with self._lock:
            is_expected = process.state == RETIRED or self.closing.is_set()
            process.state = RETIRED  # whatever it still holds, it gets no more turns

        process.read_last_words()
        kind = "failed"  # it may still send what it has, or what it started may
        if process.stdout_has_ended and not failure:
            kind = "ended"
        failure = failure or str(process.ended())
        with self._lock:
            for turn in process.turns:
                turn.inbox.put(Letter(kind, process, None, failure))
        process.stop()
        process.close()

        with self._changing():
            self._processes.discard(process)
            if not is_expected and process.is_fresh:
                self._note_failed_start(failure)
        if not is_expected and self._tender.is_alive():  # before that, `prove` says it
            log(f"warning: {printable(failure)}")

    def _start_at(self) -> float:
        """Return when a process may start again: after failed starts there is a growing pause."""
        limit = MAX_WAITED_RETRY_SECONDS if self._waiting else MAX_RETRY_SECONDS
        return self._failed_at + retry_pause(self._failed_starts, limit)

    def _note_failed_start(self, failure: str) -> None:
        """Let the next start wait; tell the turns that wait for a process. Under the lock."""
        self.note_error(failure)
        self._failed_starts += 1
        self._failed_at = time.monotonic()
        self._wake.set()  # so that the next look comes when the pause is over
        if self._best() is None and not self._in(STARTING):
            places = self._settings.max_concurrency - len(self._turns)
            for turn in itertools.islice(self._waiting, places):  # the others wait for a place
                turn.inbox.put(Letter("failed", None, None, failure))

    def prove(self) -> None:
        """Read the catalog and start the first process; raise StartError saying what is wrong."""
        try:
            self.watch.begin()
            self._check_default()
            if self.opencode.catalog.default in self.opencode.catalog.models:
                self._start_first()
        except Exception as error:
            failure = reason_of(error)
            self.watch.failure = failure
            if isinstance(error, StartError):
                raise
            raise StartError(f"opencode cannot be used: {failure}") from None
        with self._changing():
            self._spares = self._settings.spares
            self._failed_at = -math.inf
        self._tender.start()
        self.watch.start()

    def _check_default(self) -> None:
        """Raise StartError where the user chose a model that a connected provider has not."""
        catalog = self.opencode.catalog
        name = catalog.default
        if name not in catalog.models and provider_of(name) in catalog.providers:
            offered = ", ".join(model.name for model in by_provider(catalog)[:12])
            raise StartError(f"--model {name} is not offered; these are, among others: {offered}")

    def _start_first(self) -> None:
        """Wait until a process is ready; raise StartError where MAX_ATTEMPTS have failed."""
        while not self.closing.wait(SHORT_LOOK_SECONDS):
            with self._changing():
                self._failed_at = -math.inf  # the next may start, and at once
                if self._in(READY):
                    return
                if self._failed_starts >= MAX_ATTEMPTS:
                    raise StartError(self.last_error)

    def _tend(self) -> None:
        """Look at the processes, from time to time and when woken."""
        while not self.closing.is_set():
            pause = self._start_at() - time.monotonic()
            if not 0 < pause < TEND_SECONDS:
                pause = TEND_SECONDS
            self._wake.wait(pause)
            self._wake.clear()
            try:
                self._measure()
            except Exception as error:  # a full disk, a defect: it must not be the last look
                self.note_error(reason_of(error))

    def _measure(self) -> None:
        """Note how large the processes are, and which have lost their homes; then decide anew."""
        with self._lock:
            processes = self._in(READY)
        sizes = [(process, process.memory()) for process in processes]
        homeless = [process for process in processes if not process.home.is_dir()]
        reap_orphans(self.opencode.pids)
        with self._changing():
            for process, size in sizes:
                process.size = size
            for process in homeless:  # a cleaner of temp folders was there
                process.state = RETIRED

    def note_error(self, text: str) -> None:
        """Keep what went wrong, for /health."""
        self.last_error = text
        self._error_at = time.time()

    def note_success(self) -> None:
        """Forget what went wrong before a request was answered, unless starts still fail."""
        if self._failed_starts == 0:
            self.last_error = ""

    def health(self) -> Json:
        """Return what /health tells of opencode and its processes."""
        catalog = self.opencode.catalog
        reason = None
        error_at = None
        if self.last_error:
            error_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._error_at))
        with self._lock:
            running = len(self._turns)
            waiting = len(self._waiting)
            spares = sum(process.is_fresh for process in self._in(READY))
            if not self.watch.is_ready:
                reason = "starting"
            elif self._failed_starts > 0 and not self._in(READY):
                reason = f"opencode does not start: {self.last_error}"
            elif catalog.default not in catalog.models:
                reason = catalog.not_logged_in()
        return {
            "status": "unhealthy" if reason else "healthy",
            "reason": reason,
            "opencode": self.opencode.version or None,
            "model": catalog.default,
            "running": running,
            "waiting": waiting,
            "spares": spares,
            "collecting": self.opencode.collecting,
            "last_error": self.last_error or None,
            "last_error_at": error_at,
        }

    def close(self) -> None:
        """End every process and wait for that, but not for ever."""
        with self._changing():
            self.closing.set()
        self._wake.set()
        self.watch.wake()
        deadline = time.monotonic() + 3 * STOP_SECONDS
        while self._is_busy() and time.monotonic() < deadline:
            time.sleep(SHORT_LOOK_SECONDS)
        self.opencode.close()

    def _is_busy(self) -> bool:
        return bool(self._processes) or self._tender.is_alive() or self.watch.is_alive


def retry_pause(failures: int, limit: float) -> float:
    """Return how many seconds to wait after so many failures: each time twice as long."""
    doublings = min(failures - 1, 10)  # a thousand would be too large for a float
    return min(limit, RETRY_SECONDS * 2.0**doublings)


def reason_of(error: Exception) -> str:
    """Return what a person reads of an error: our own words, else also what kind it is."""
    if isinstance(error, (ProcessFailed, StartError, APIError)):
        return str(error)
    return repr(error)


def reap_orphans(own: set[int]) -> None:
    """Take leave of what ended processes have left behind, where it falls to us: as process 1.

    `own` are the pids that somebody else waits for.
    """
    with contextlib.suppress(ChildProcessError):
        while os.getpid() == 1:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid in own:
                return
            os.waitpid(ended.si_pid, 0)


# ----------------------------------------------------------------------------------- catalog watch
# Which models there are, as the user's files mean it by now.


class CatalogWatch:
    """Has opencode print its models, and again when the user's files change or time has passed.

    `begin` runs on the thread that proves opencode, everything after it on the watch's own thread;
    any thread may ask whether the catalog is `ready`, and `judge` a process. `_signature` is of the
    files that the catalog was made from, None until there is one; it, `_renew_at` and `_difference`
    change by single steps that need no lock. Whatever goes wrong in a renewal, requests are
    answered with what there is.
    """

    def __init__(self, opencode: Opencode, pool: Pool) -> None:
        self.failure = ""  # why opencode cannot be used at all
        self._opencode = opencode
        self._pool = pool
        self._signature: Any = None
        self._renew_at = math.inf
        self._difference: frozenset[str] = frozenset()  # that caused the last renewal
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def is_ready(self) -> bool:
        """Tell whether there is a catalog."""
        return self._signature is not None

    @property
    def is_alive(self) -> bool:
        """Tell whether its thread runs."""
        return self._thread.is_alive()

    def ready(self, look: Look) -> Catalog:
        """Return the catalog that the user's files mean, once it is there."""
        while self._signature is None or self._signature != self._opencode.signature():
            if self.failure:
                message = f"opencode cannot be used: {self.failure}"
                raise APIError(503, message, code="opencode_failed")
            self.wake()
            look()
            time.sleep(SHORT_LOOK_SECONDS)
        return self._opencode.catalog

    def wake(self) -> None:
        """Let the watch look at once."""
        self._wake.set()

    def begin(self) -> None:
        """Read the catalog for the first time; raise ProcessFailed or OSError if that fails."""
        self._read()

    def start(self) -> None:
        """Watch from now on."""
        self._thread.start()

    def judge(self, process: OpencodeProcess, offered: frozenset[str]) -> bool:
        """Tell whether a process may serve, by the models that it offers.

        Where a process with the trimmed catalog lacks some, the trimming may be the cause (a key in
        the environment brings models, too): an untrimmed one will tell. Where it is not, the
        catalog is out of date: it was read before the network was there, or the provider has
        changed its models. It is read again, once for each such difference.
        """
        catalog = process.catalog
        expected = catalog.models.keys() - {catalog.default}
        if process.is_trimmed and not expected <= offered:
            self._opencode.trim = False
            return False

        difference = frozenset(offered - {catalog.default}) ^ expected
        if difference and difference != self._difference:
            self._difference = difference
            self._renew_at = 0.0
            self.wake()
        return True

    def _watch(self) -> None:
        while not self._pool.closing.is_set():
            self._wake.wait(TEND_SECONDS)
            self._wake.clear()
            if self._is_due() and not self._pool.closing.is_set():
                self._renew()

    def _is_due(self) -> bool:
        if time.monotonic() > self._renew_at:
            return True
        return bool(self._opencode.signature() != self._signature)

    def _renew(self) -> None:
        """Read the catalog again; the old one stays where that fails."""
        signature = self._opencode.signature()
        try:
            self._read()
        except Exception as error:  # of whatever kind: requests must not wait for ever
            self._pool.note_error(reason_of(error))
            self._renew_at = time.monotonic() + MAX_RETRY_SECONDS
            self._signature = signature
        self._pool.look_again()

    def _read(self) -> None:
        """Read the catalog, again where the user's files change meanwhile; make it the current one.

        At its first start opencode itself completes the user's opencode.json.
        """
        for _ in range(MAX_ATTEMPTS):
            signature = self._opencode.signature()
            catalog = self._list()
            if signature == self._opencode.signature():
                break
        self._opencode.trim = True
        if catalog != self._opencode.catalog or signature != self._signature:
            self._opencode.use_catalog(catalog)  # processes with another one end
            self._pool.thoughts = Thoughts()  # another login's: its answers may still add to those
        self._renew_at = time.monotonic() + CATALOG_SECONDS
        self._signature = signature

    def _list(self) -> Catalog:
        """Ask opencode which models it offers; raise ProcessFailed with its own words."""
        reason = ""
        for _ in range(2):
            logins = self._opencode.logins()
            output = self._output()
            try:
                return make_catalog(parse_models(output), logins, self._opencode.requested_model)
            except (LookupError, TypeError, ValueError) as error:
                reason = repr(error)
        raise ProcessFailed(f"`opencode models` printed no models: {reason}")

    def _output(self) -> str:
        """Return what `opencode models` prints.

        Into a file: into a pipe, opencode at times ends before all of it is through.
        """
        deadline = time.monotonic() + START_SECONDS
        with tempfile.TemporaryFile() as output:
            with contextlib.closing(Child(self._opencode)) as child:
                child.spawn("models", "--verbose", stdout=output)
                while child.runs_on():
                    if self._pool.closing.is_set() or time.monotonic() > deadline:
                        child.stop()
            if child.returncode:
                raise child.ended(f"`opencode models` failed with exit code {child.returncode}")
            output.seek(0)
            return output.read().decode("utf-8", "replace")


# ------------------------------------------------------------------------------------------- images
# GitHub Copilot takes no URLs of images, and apps with an image store send nothing else: for it the
# proxy fetches them and sends what they hold. What a client names must not be reached on its behalf
# in a private network: every address of every hop is looked at, and the one that was looked at is
# connected to.


class TimedSocket(socket.socket):
    """A socket that reads until its deadline, however little comes at a time."""

    deadline = 0.0

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        """Receive as a socket does; raise OSError behind the deadline."""
        self.settimeout(time_left(self.deadline))
        return super().recv_into(*arguments, **options)


class TimedTLSSocket(TimedSocket, ssl.SSLSocket):
    """The same over TLS."""


class PinnedConnection(http.client.HTTPConnection):
    """A connection to a host at an address that was looked at, which ends at a deadline."""

    def __init__(self, host: str, port: int, address: str, deadline: float) -> None:
        super().__init__(host, port)
        self._address = address
        self._deadline = deadline

    def connect(self) -> None:
        """Connect, in time."""
        address = (self._address, self.port)
        connected = socket.create_connection(address, time_left(self._deadline))
        self._use(TimedSocket(fileno=connected.detach()))

    def _use(self, connected: Any) -> None:
        self.sock = connected
        connected.deadline = self._deadline
        connected.settimeout(time_left(self._deadline))


class PinnedTLSConnection(PinnedConnection):
    """The same over TLS, whose certificate is checked for the host's name."""

    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        """Connect, in time; raise OSError where the certificate is not the host's."""
        super().connect()
        context = ssl.create_default_context()
        context.sslsocket_class = TimedTLSSocket
        self._use(context.wrap_socket(self.sock, server_hostname=self.host))


class ImageError(Exception):
    """An image cannot be fetched; the text tells why, `url` which one."""

    def __init__(self, text: str, url: str = "") -> None:
        super().__init__(text)
        self.url = url


def fetch_images(urls: Sequence[str], look: Look) -> dict[str, str]:
    """Return a data URL for each of `urls`.

    They are fetched at once, each on a thread of its own, and given up together. Raises ImageError,
    and what `look` raises.
    """
    results: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    deadline = time.monotonic() + IMAGE_SECONDS
    if len(urls) > MAX_IMAGES:
        raise ImageError(f"there are more than {MAX_IMAGES} to fetch", urls[MAX_IMAGES])
    for url in urls:
        start_thread(fetch_into, url, deadline, results)

    fetched: dict[str, str] = {}
    while len(fetched) < len(urls):
        look()
        with contextlib.suppress(queue.Empty):
            url, result = results.get(timeout=LOOK_SECONDS)
            if isinstance(result, ImageError):
                raise result
            fetched[url] = result
        if time.monotonic() > deadline + LOOK_SECONDS:  # a name server may take longer
            missing = next(url for url in urls if url not in fetched)
            raise ImageError(f"it did not come within {IMAGE_SECONDS:.0f} s", missing)
    return fetched


def fetch_into(url: str, deadline: float, results: queue.SimpleQueue[tuple[str, Any]]) -> None:
    """Put a URL and its image, as a data URL, or an ImageError into `results`."""
    result: Any
    try:
        result = fetch_image(url, deadline)
    except ImageError as error:
        result = ImageError(str(error), url)
    except OSError as error:
        result = ImageError(str(error) or type(error).__name__, url)
    except (http.client.HTTPException, ValueError):  # they quote the URL, which may hold a key
        result = ImageError("its URL, or what its server answered, is malformed", url)
    results.put((url, result))


def fetch_image(url: str, deadline: float) -> str:
    """Return what is at a URL as a data URL; raise ImageError, or what http.client raises."""
    for _ in range(1 + MAX_REDIRECTS):
        with contextlib.closing(connection_to(url, deadline)) as connection:
            path = urllib.parse.urlsplit(url)._replace(scheme="", netloc="", fragment="").geturl()
            connection.request("GET", path or "/", headers={"Accept": "image/*"})
            response = connection.getresponse()
            location = response.getheader("Location")
            if response.status in (301, 302, 303, 307, 308) and location:
                url = urllib.parse.urljoin(url, location)
                continue
            if response.status != 200:
                raise ImageError(f"its server answered {response.status}")

            media_type = response.headers.get_content_type()
            if response.headers.get_content_maintype() != "image":
                raise ImageError(f"it is no image but {media_type}")
            data = read_image(response)
            return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
    raise ImageError(f"it leads to another place more than {MAX_REDIRECTS} times")


def read_image(response: Any) -> bytes:
    """Return the body of a response; raise ImageError if it is too large, OSError if too slow."""
    data = bytearray()
    while True:
        piece = response.read1(1 << 16)
        if not piece:
            return bytes(data)
        data += piece
        if len(data) > MAX_IMAGE_BYTES:
            raise ImageError(f"it is larger than {MAX_IMAGE_BYTES} bytes")


def connection_to(url: str, deadline: float) -> PinnedConnection:
    """Return a connection, not yet open, to the host of a URL; raise ImageError, OSError."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise ImageError("it leads to what is no web server")
    kind = PinnedTLSConnection if parts.scheme == "https" else PinnedConnection
    port = parts.port or kind.default_port

    found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = [str(address[0]) for *_, address in found]
    for address in addresses:
        if not is_public(address):
            raise ImageError("its address is not a public one")
    return kind(parts.hostname, port, addresses[0], deadline)


def is_public(address: str) -> bool:
    """Tell whether an IP address is one of the internet's, whatever IPv4 address is inside it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = []
    if isinstance(ip, ipaddress.IPv6Address):
        for other in (ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())):
            if other is not None:
                inner.append(other)
        if ip in NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if not inner and ip not in GLOBAL_UNICAST:
            return False
    return all(one.is_global and not one.is_multicast for one in inner or [ip])


NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
# RFC 4291. To Python the site-local fec0::/10 is global, where virtual machines reach their host.
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")


def time_left(deadline: float) -> float:
    """Return the seconds until a deadline; raise OSError behind it."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError(f"it did not come within {IMAGE_SECONDS:.0f} s")
    return seconds


def image_places(body: Json) -> Iterator[tuple[Json, str, str]]:
    """Yield where a body, in any wire format, names an image by an http or https URL.

    Each is the object, its key, and the param that names it. Only messages and items hold images.
    """
    for name in ("messages", "input"):
        pending: list[tuple[Any, str]] = [(body.get(name), name)]
        while pending:
            value, param = pending.pop()
            if isinstance(value, list):
                for index, item in enumerate(value):
                    pending.append((item, f"{param}[{index}]"))
            elif isinstance(value, dict):
                key = image_key(value)
                if key:
                    yield value, key, f"{param}.{key}"
                for inner in ("content", "image_url", "output"):
                    pending.append((value.get(inner), f"{param}.{inner}"))
                if value.get("type") == "image":  # others have documents as their sources
                    pending.append((value.get("source"), f"{param}.source"))


def image_key(value: Json) -> str:
    """Return the key under which an object holds the URL of an image, "" where it holds none."""
    for key in ("image_url", "url"):
        url = value.get(key)
        is_image = key == "image_url" or value.get("type", "image_url") in ("url", "image_url")
        if isinstance(url, str) and is_image and re.match("(?i)https?://", url):
            return key
    return ""


def wants_images_fetched(model: Model) -> bool:
    """Tell whether a model's service takes no URLs of images (GitHub Copilot, 2026)."""
    return model.provider.startswith("github-copilot")


def put_image(holder: Json, key: str, data_url: str) -> None:
    """Put a data URL in the place of a URL; /messages has other words for that."""
    if holder.get("type") != "url":
        holder[key] = data_url
        return
    media_type, _, data = data_url[len("data:") :].partition(";base64,")
    holder.clear()
    holder.update({"type": "base64", "media_type": media_type, "data": data})


# --------------------------------------------------------------------------------------------- http
# From sockets to requests and back.
#
# A connection has one thread, which alone uses its socket and runs each request from top to bottom:
# http.server parses the head from the lines that ClientConnection lets pass, `_dispatch` refuses
# what it must, and the rest is a method that ROUTES names. Where that waits for the pool, the pool
# calls `_look`, and what `_look` raises gives the request up. So a request ends in one of two ways:
# its method returns, or an exception reaches `handle_one_request`, which answers and logs it.
#
# What can be read in two ways is refused. In a head, LF alone ends a line too (RFC 9112, 2.2).


class LineForm(NamedTuple):
    """What a line that a client sends must look like, and the status of one that is too long."""

    name: str
    pattern: re.Pattern[bytes]
    status: int = 431


REQUEST_LINE = LineForm("request line", re.compile(rb"[^\r\n\0]*\r?\n"), 414)
HEADER_LINE = LineForm(
    "header line", re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*)?\r?\n")
)
CHUNK_SIZE = LineForm("chunk size", re.compile(rb"[0-9A-Fa-f]{1,16}[ \t]*(;[^\r\n\0]*)?\r\n"))
CHUNK_END = LineForm("chunk end", re.compile(rb"\r\n"))
TRAILER = LineForm("trailer", re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*)?\r\n"))

zstd: Any = None
with contextlib.suppress(ImportError):  # before Python 3.14
    zstd = importlib.import_module("compression.zstd")

CONTENT_LENGTH = re.compile(r"[ \t]*([0-9]{1,18})[ \t]*(,[ \t]*\1[ \t]*)*")  # the same, repeated
HUNG_UP = getattr(select, "POLLRDHUP", 0)  # where there is none, only a reset is noticed
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# Web pages on this machine, and what is no web page.
OWN_ORIGIN = re.compile(
    r"https?://(([a-z0-9-]+\.)*localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1\])(:[0-9]{1,5})?"
    r"|(app|capacitor|file|tauri|vscode-file|vscode-webview)://[!-~]*"
)
# Names that nobody can have on the internet.
OWN_HOST = re.compile(r"(.+\.)?localhost|.+\.internal|[0-9.]+|\[[0-9a-f:.]+\]")
JSON_MARKS = (b",", b":", b"[", b"{")  # each but the last stands before a value or a key
SEQUENCE_NUMBER = '"sequence_number":'
PASSED_HEADERS = ("anthropic-beta", "anthropic-version")
EVENT_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would collect it
}


def body_length(headers: email.message.Message, version: str) -> int | None:
    """Return the bytes of a request's body, None where it comes in HTTP chunks.

    Raises: APIError 400 for a head whose body could be said to end in two places (RFC 9112, 6).
    """
    unclear = invalid("Bad request: Host, Content-Length or Transfer-Encoding is not clear")
    is_old = version == "HTTP/1.0"
    if len(headers.get_all("Host", [])) != 1 and not is_old:
        raise unclear

    codings = headers.get_all("Transfer-Encoding")
    if codings is not None:  # even an empty one: somebody before us may have read it otherwise
        coding = ",".join(codings).strip(" \t").lower()
        if coding != "chunked" or is_old or "Content-Length" in headers:
            raise unclear
        return None

    length = CONTENT_LENGTH.fullmatch(",".join(headers.get_all("Content-Length", ["0"])))
    if length is None:
        raise unclear
    return int(length[1])


def check_origin(origin: str, allowed: Sequence[str]) -> None:
    """Refuse the web page `origin` unless it is this machine's own, or one of `allowed`."""
    if origin in allowed or OWN_ORIGIN.fullmatch(origin):
        return
    if "*" in allowed and origin != "null":
        return
    page = printable(origin)
    raise APIError(
        403,
        f"Web pages of {page} may not use the proxy; the option --cors-origin {page} allows them",
        code="origin_not_allowed",
    )


def check_host(host: str, own_names: Sequence[str]) -> None:
    """Refuse a request to a name that somebody may have given to this machine's address.

    A web page whose own name leads to 127.0.0.1 has no foreign origin. (DNS rebinding)
    """
    name = re.sub(r"\.?(:[0-9]*)?$", "", host.lower())
    if name in own_names or OWN_HOST.fullmatch(name):
        return
    raise APIError(
        403,
        f"{printable(name)} is not a name of this machine; --host with it, or --api-key, allows it",
        code="host_not_allowed",
    )


def has_key(headers: email.message.Message, keys: Sequence[str]) -> bool:
    """Tell whether a request brings one of `keys`; where there are none, it needs none."""
    if not keys:
        return True

    authorization = headers.get("Authorization", "")
    given = [
        re.sub("(?i)^bearer +", "", authorization).strip(),
        headers.get("X-Api-Key", ""),
        headers.get("Api-Key", ""),
    ]

    matches = False
    for text in given:
        for key in keys:  # always all of them: the time tells nothing
            if hmac.compare_digest(text.encode("latin-1", "replace"), key.encode()):
                matches = True
    return matches


def route_of(target: str) -> str:
    """Return the path in a request's target as ROUTES has it: without host, query and /v1."""
    path = re.sub(r"^[A-Za-z]+://[^/?]*", "", target).partition("?")[0]
    path = re.sub("//+", "/", path)
    path = re.sub(r"^/v1(?=/|$)", "", path)
    return path.rstrip("/") or "/"


def no_route(target: str, base_url: str) -> APIError:
    """Return the error for a path that is none of ROUTES, with a hint at what is wrong with it."""
    path = printable(target.partition("?")[0])
    route = route_of(target)
    if re.search("/v1/|/models/", route + "/") or route.endswith(tuple(ROUTES)):
        url = base_url
        if route.endswith("/messages"):  # Anthropic's clients add /v1 themselves
            url = base_url[: -len("/v1")]
        hint = f"the base URL to use is {url}"
    else:
        hint = f"this serves chat only, at {base_url}/chat/completions, /responses or /messages"
    return APIError(404, f"There is nothing at {path}: {hint}", code="unknown_url")


def wrong_method(method: str, path: str, route: Route) -> APIError:
    """Return the error for a method that a path does not have."""
    usual_method = "POST"
    if "GET" in route.methods:
        usual_method = "GET"
    return APIError(
        405,
        f"{path} wants {usual_method}, not {method}",
        code="not_allowed",
        headers={"Allow": ", ".join(route.methods)},
    )


def decoded(pieces: Iterator[bytes], coding: str) -> Iterator[bytes]:
    """Return a body's pieces without its Content-Encoding; raise APIError 415 for an unknown one.

    No piece is larger than MAX_DECODED_BYTES, whatever becomes of the bytes that came.
    """
    if coding in ("", "identity"):
        return pieces
    if coding in ("gzip", "deflate"):
        return inflated(pieces, coding)
    if coding == "zstd" and zstd is not None:
        return unpacked(pieces)

    known = "gzip, deflate"
    if zstd is not None:
        known = "gzip, deflate, zstd"
    raise APIError(
        415,
        f"The Content-Encoding of a body may be {known}, or none",
        code="unsupported_content_encoding",
        headers={"Accept-Encoding": known},
    )


def inflated(pieces: Iterator[bytes], coding: str) -> Iterator[bytes]:
    """Yield what was compressed by gzip or deflate; raise APIError 400 for what was not."""
    first = next(pieces, b"")
    window = 31  # gzip, and nothing else
    if coding == "deflate":
        window = 15
        if first and first[0] & 15 != 8:  # some leave zlib's head out
            window = -15
    decoder = zlib.decompressobj(window)
    try:
        for piece in itertools.chain([first], pieces):
            rest = piece
            while rest:
                yield decoder.decompress(rest, MAX_DECODED_BYTES)
                rest = decoder.unconsumed_tail
        yield decoder.flush()
    except zlib.error:
        raise invalid(f"The body is not valid {coding}") from None
    if not decoder.eof or decoder.unused_data:
        raise invalid(f"The body is not valid {coding}")


def unpacked(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield what was compressed by zstd; raise APIError 400 for what was not."""
    options = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
    decoder = zstd.ZstdDecompressor(options=options)
    try:
        for piece in pieces:
            yield decoder.decompress(piece, MAX_DECODED_BYTES)
            while not decoder.needs_input and not decoder.eof:
                yield decoder.decompress(b"", MAX_DECODED_BYTES)
    except (zstd.ZstdError, EOFError):
        raise invalid("The body is not valid zstd") from None
    if not decoder.eof or decoder.unused_data:
        raise invalid("The body is not valid zstd")


def count_values(data: bytes) -> int:
    """Return about how many values JSON has, or more: marks in its texts count, too."""
    return sum(data.count(mark) for mark in JSON_MARKS)


def check_values(data: bytes) -> int:
    """Return `count_values`; refuse very many, which take many times their size, by APIError 413.

    Takes linear time and little memory, whatever `data` is.
    """
    count = count_values(data)
    if count <= MAX_JSON_VALUES:
        return count
    without_escapes = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    is_too_much = without_escapes.count(b'"') > 4 * MAX_JSON_VALUES  # two a text, two texts a value
    if not is_too_much:
        without_texts = re.sub(rb'"[^"]*"', b"", without_escapes)
        is_too_much = count_values(without_texts) > MAX_JSON_VALUES
    if is_too_much:
        text = f"The body has more than {MAX_JSON_VALUES} values"
        raise APIError(413, text, code="body_too_large")
    return count


def model_object(model: Model, catalog: Catalog, created: int) -> Json:
    """Return what /v1/models tells of a model: what is the default provider's has its bare name."""
    listed: Json = {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": model.provider,
    }
    if model.provider == provider_of(catalog.default) and "/" not in model.bare_name:
        listed["id"] = model.bare_name
    if model.title:
        listed["name"] = model.title
    if model.context_length:
        listed["context_length"] = model.context_length
    if model.output_limit:
        listed["max_output_tokens"] = model.output_limit
    return listed


def estimate_tokens(body: Json) -> int:
    """Return about how many tokens a request to /messages has, its images and files aside."""
    characters = 0
    pending: list[Any] = [body]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            characters += len(value)
        elif isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, dict):
            for name, inner in value.items():
                if name != "data":  # base64
                    pending.append(inner)
    return 1 + characters // CHARACTERS_PER_TOKEN


def printable(text: str) -> str:
    """Return text of a client as it may stand in a log or a message."""
    return re.sub(r"[^\x20-\x7e]", "?", text)[:200]


def write_http_chunk(data: bytes, is_last: bool) -> bytes:
    """Return `data` in HTTP's chunked coding, its end included if it `is_last`."""
    chunk = b""
    if data:
        chunk = b"%x\r\n%b\r\n" % (len(data), data)
    if is_last:
        chunk += b"0\r\n\r\n"
    return chunk


class ClientConnection(io.BufferedIOBase):
    """A client's socket, as http.server's `rfile` and `wfile`; only its own thread uses it.

    What a client sends while its request is being answered is kept in `_read_ahead`, so that one
    that hangs up is noticed although bytes come before the end.
    """

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._socket = connection
        self._read_ahead = bytearray()
        self._next_line = REQUEST_LINE  # what readline() returns
        self._head_left = 0  # bytes that the rest of the head may have
        self._deadline = 0.0  # for all that is read
        self._is_in_body = False
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    def expect_head(self, seconds: float) -> None:
        """Let what is read next be the head of a request, which must be there in `seconds`."""
        self._next_line = REQUEST_LINE
        self._head_left = MAX_HEAD_BYTES
        self._deadline = time.monotonic() + seconds
        self._is_in_body = False

    def expect_body(self, seconds: float) -> None:
        """Let what is read next be a body, which must be there in `seconds`."""
        self._deadline = time.monotonic() + seconds
        self._is_in_body = True

    def is_open(self) -> bool:
        """Keep what the client has sent; tell whether it is still there."""
        room = MAX_READ_AHEAD_BYTES - len(self._read_ahead)
        if room <= 0:
            return not self._has_hung_up()
        try:
            self._socket.settimeout(0.0)
            data = self._socket.recv(room)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._read_ahead += data
        return bool(data)

    def readline(self, size: int | None = -1, /) -> bytes:
        """Return the next line of a head; http.server calls it."""
        line = self._head_line()
        while self._next_line is REQUEST_LINE and line in (b"\r\n", b"\n"):
            line = self._head_line()  # some send an empty line behind a body (RFC 9112, 2.2)
        self._next_line = HEADER_LINE
        return line

    def _head_line(self) -> bytes:
        line = self.read_line(self._next_line, self._head_left)
        self._head_left -= len(line)
        return line

    def read_line(self, form: LineForm, limit: int = MAX_HEAD_BYTES) -> bytes:
        """Return the next line; raise APIError unless it looks like `form`, in `limit` bytes."""
        searched = 0
        while True:
            end = self._read_ahead.find(b"\n", searched, limit)
            if end >= 0:
                break
            searched = len(self._read_ahead)
            if searched >= limit:
                raise APIError(form.status, f"The {form.name} is too long")
            self._receive()

        line = self._take(end + 1)
        if not form.pattern.fullmatch(line):
            raise invalid(f"Bad request: a {form.name} is malformed")
        return line

    def read_some(self, limit: int) -> bytes:
        """Return from 1 to `limit` bytes."""
        if not self._read_ahead:
            self._receive()
        return self._take(limit)

    def write(self, data: Any, /) -> int:
        """Write all of `data`, as long as the client takes some of it every WRITE_SECONDS."""
        rest = memoryview(data)
        try:
            self._socket.settimeout(WRITE_SECONDS)
            while rest:
                sent = self._socket.send(rest)
                rest = rest[sent:]
        except OSError as error:
            raise ClientDisconnected(f"the client does not read: {error}") from None
        return len(data)

    def _has_hung_up(self) -> bool:
        """Tell whether the client has closed its side, behind what nobody has read yet."""
        poller = select.poll()
        poller.register(self._socket, HUNG_UP)
        return bool(poller.poll(0))

    def _take(self, count: int) -> bytes:
        data = bytes(self._read_ahead[:count])
        del self._read_ahead[:count]
        return data

    def _receive(self) -> None:
        """Wait for more of the request; raise where none comes before the deadline."""
        data = b""
        seconds = self._deadline - time.monotonic()
        if seconds > 0:
            with contextlib.suppress(OSError):
                self._socket.settimeout(seconds)
                data = self._socket.recv(MAX_READ_AHEAD_BYTES - len(self._read_ahead))
        if data:
            self._read_ahead += data
        elif self._is_in_body:
            raise APIError(408, "The body did not arrive", code="body_timeout")
        else:
            raise ClientDisconnected("the request did not arrive")


class ProxyHandler(http.server.BaseHTTPRequestHandler):
    """Answers the requests of one connection, one after the other.

    `setup` makes what belongs to the connection, `_begin_request` what belongs to a request.
    """

    server: ProxyServer
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.1"  # of a request line that names none
    request_version = "HTTP/1.1"  # until the first head is there

    # -- the life of a request

    def setup(self) -> None:
        self._client = ClientConnection(self.request)
        self.rfile = self._client
        self.wfile = self._client

    def _begin_request(self) -> None:
        self.command = "-"
        self.path = "-"
        self._route = "-"
        self._request_id = uuid.uuid4().hex
        self._origin = ""  # the web page that asks, if it may
        self._body_left: int | None = None  # bytes to read of it; None: its end is not known
        self._status = 0  # of the response, once its head is sent
        self._answer: Answer | None = None  # that is sent in pieces
        self._passed: PassedAnswer | None = None  # a provider's own, that is passed through
        self._facts: dict[str, str] = {}  # for the log
        self._is_worth_a_line = True  # of the log
        self._begin_clock()

    def _begin_clock(self) -> None:
        self._started = time.monotonic()
        self._last_write = self._started

    def handle_one_request(self) -> None:
        """Wait for a request, answer it, and log it."""
        self._begin_request()
        self._client.expect_head(IDLE_SECONDS)
        self.server.mark_idle(self.request)
        try:
            super().handle_one_request()
        except APIError as error:
            self._fail(error, error.message)
        except ClientDisconnected as error:
            self.close_connection = True
            if self.command != "-":  # otherwise an idle connection has ended
                self._status = 499
            self._facts["error"] = json.dumps(printable(str(error)))
        except Exception as error:  # a defect of this program must not take others' requests
            defect = APIError(500, "internal error", code="internal_error")
            self._fail(defect, f"internal error: {error!r}")
        if self._status and self._is_worth_a_line:
            self._log_request()

    def _dispatch(self) -> None:
        """Refuse a request whose head is wrong, or let its route answer it."""
        self._begin_clock()
        request_id = self.headers.get("X-Request-Id", "")
        if REQUEST_ID.fullmatch(request_id):
            self._request_id = request_id
        self._route = route_of(self.path)
        self._check_head()

        route = ROUTES.get(self._route)
        if self._route.startswith("/models/"):
            route = ROUTES["/models"]
        if route is None:
            raise no_route(self.path, self.server.base_url)
        if self.command != "OPTIONS" and not route.is_public:
            self._check_key()
        if self.command not in route.methods:
            raise wrong_method(self.command, self._route, route)

        if self.command != "POST":
            self._discard_body()
        self.server.mark_busy(self.request)
        if self.command == "OPTIONS":
            self._tell_browser(route)
        else:
            route.serve(self)

    do_GET = _dispatch
    do_HEAD = _dispatch
    do_POST = _dispatch
    do_PUT = _dispatch
    do_PATCH = _dispatch
    do_DELETE = _dispatch
    do_OPTIONS = _dispatch

    def _check_head(self) -> None:
        settings = self.server.settings
        self._body_left = body_length(self.headers, self.request_version)

        origin = self.headers.get("Origin")
        if origin is not None:
            check_origin(origin, settings.cors_origin)
            self._origin = origin

        is_trusting = self.server.on_loopback and not settings.api_key
        if is_trusting and self._route != "/health":
            own_names = (settings.host.lower(), socket.gethostname().lower())
            check_host(self.headers.get("Host", "localhost"), own_names)

    def _check_key(self) -> None:
        if not has_key(self.headers, self.server.settings.api_key):
            raise APIError(
                401,
                "The API key is missing or wrong",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _look(self) -> None:
        """Raise where nobody waits for the answer any more; keep a silent stream alive."""
        if not self._client.is_open():
            raise ClientDisconnected("the client hung up")
        if self.server.pool.closing.is_set():
            raise shutting_down()
        is_silent = time.monotonic() - self._last_write >= PING_SECONDS
        if is_silent and self._is_between_events():
            self._write(SSE_PING)

    def _is_between_events(self) -> bool:
        """Tell whether a comment may come next in what the client reads."""
        if self._passed is not None:
            return self._passed.is_between_events
        return self._answer is not None

    def _fail(self, error: APIError, cause: str) -> None:
        """Tell the client of an error, by the response or, where that has begun, at its end."""
        self._facts["error"] = json.dumps(printable(cause))
        if error.status >= 500 and "model" in self._facts:
            self.server.pool.note_error(error.message)
        try:
            self._send_error(error)
            if self._body_left != 0:
                self.server.mark_idle(self.request)
                self._drain()
        except (APIError, ClientDisconnected, OSError):
            self.close_connection = True

    def _drain(self) -> None:
        """Read what is left of a refused body: closing at once would reset the refusal away."""
        self._client.expect_body(DRAIN_SECONDS)
        self.request.shutdown(socket.SHUT_WR)
        left = MAX_DRAIN_BYTES
        while left > 0:
            left -= len(self._client.read_some(left))

    def _log_request(self) -> None:
        path = self.path.partition("?")[0]  # keys may stand behind it
        request = printable(f"{self.command or '-'} {path}")
        client = self.client_address[0].removeprefix("::ffff:")  # IPv4 by way of IPv6
        words = [client, request, str(self._status)]
        for name, value in self._facts.items():
            words.append(f"{name}={value}")
        words.append(f"seconds={time.monotonic() - self._started:.3f}")
        words.append(f"id={self._request_id}")
        log(" ".join(words))

    # -- what http.server calls

    def handle_expect_100(self) -> bool:
        return True  # _read_body sends the interim answer: a refusal comes instead of it

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        # Not `message`: it quotes the request line, in which there may be a key.
        raise APIError(int(code), f"Bad request: {http.client.responses[code]}")

    # -- the body of a request

    def _read_body(self) -> bytes:
        """Return the body as it was before it was encoded; it counts until the request is over."""
        coding = self.headers.get("Content-Encoding", "").strip().lower()
        body = bytearray()
        for piece in decoded(self._body_pieces(), coding):
            self.server.add_bytes(self.request, len(piece))
            body += piece
            self._check_size(len(body))
        data = bytes(body)
        values = check_values(data)
        self.server.add_bytes(self.request, values * BYTES_PER_JSON_VALUE)
        return data

    def _discard_body(self) -> None:
        """Read a body that is of no use, or it would be taken for the next request."""
        for _ in self._body_pieces():
            pass

    def _body_pieces(self) -> Iterator[bytes]:
        """Yield the body as it comes; raise APIError 413 where it is larger than it may be."""
        self._check_size(self._body_left or 0)
        self._let_it_come()
        self._client.expect_body(BODY_SECONDS)
        if self._body_left is None:
            yield from self._read_chunked()
            self._body_left = 0
        while self._body_left > 0:
            piece = self._client.read_some(self._body_left)
            self._body_left -= len(piece)
            yield piece

    def _let_it_come(self) -> None:
        """Send the go-ahead to a client that waits for it."""
        is_waiting = self.headers.get("Expect", "").lower() == "100-continue"
        if is_waiting and self._body_left != 0 and self.request_version != "HTTP/1.0":
            self._client.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _read_chunked(self) -> Iterator[bytes]:
        total = 0
        while True:
            line = self._client.read_line(CHUNK_SIZE)
            left = int(line.partition(b";")[0], 16)
            if left == 0:
                break
            total += left
            self._check_size(total)
            while left > 0:
                piece = self._client.read_some(left)
                left -= len(piece)
                yield piece
            self._client.read_line(CHUNK_END)

        limit = MAX_HEAD_BYTES
        line = self._client.read_line(TRAILER, limit)
        while line != b"\r\n":
            limit -= len(line)
            line = self._client.read_line(TRAILER, limit)

    def _check_size(self, size: int) -> None:
        limit = self.server.settings.max_body_size
        if size > limit:
            raise APIError(413, f"--max-body-size is {limit} bytes", code="body_too_large")

    # -- responses

    def _send(self, status: int, headers: Mapping[str, str], body: Json | bytes | None) -> None:
        """Send a response; where `body` is None its head alone, and HTTP chunks follow."""
        self._status = status
        if self._body_left != 0 or self.server.stopping or self.request_version == "HTTP/1.0":
            self.close_connection = True
        if isinstance(body, dict):
            headers = {**headers, "Content-Type": "application/json"}
            body = json.dumps(body).encode() + b"\n"

        self.send_response_only(status)
        for name, value in {**self._common_headers(), **headers}.items():
            self.send_header(name, re.sub(r"[^\x20-\x7e]", "", value))
        if body is None and self.request_version != "HTTP/1.0":
            self.send_header("Transfer-Encoding", "chunked")
        if body is not None and status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body and self.command != "HEAD":
            self._client.write(body)

    def _common_headers(self) -> dict[str, str]:
        headers = {
            "Server": "opencode_proxy/" + __version__,
            "Date": self.date_time_string(),
            "X-Request-Id": self._request_id,
            "Access-Control-Expose-Headers": "X-Request-Id, Retry-After",
            "Vary": "Origin",
        }
        if self._origin:
            headers["Access-Control-Allow-Origin"] = self._origin
        if self.close_connection:
            headers["Connection"] = "close"
        return headers

    def _send_error(self, error: APIError) -> None:
        body = error.body()
        if "/messages" in self._route:
            body = {"type": "error", **body}
        if not self._status:
            self._send(error.status, error.headers, body)
        elif self._answer is not None:
            self._write(sse_data(body) + SSE_DONE, is_last=True)
        elif self._passed is not None and self._passed.is_between_events:
            self._write(self._passed.failure(error), is_last=True)
        else:  # it must not look complete
            self.close_connection = True

    def _write(self, data: bytes, is_last: bool = False) -> None:
        """Write a piece of a body; the first one of a stream of ours comes behind its head."""
        if data and self._answer is not None and not self._status:
            self._send(200, EVENT_STREAM, None)
            data = self._answer.head() + data
        if self.request_version != "HTTP/1.0":
            data = write_http_chunk(data, is_last)
        if data:
            self._client.write(data)
            self._last_write = time.monotonic()

    # -- the routes

    def _tell_browser(self, route: Route) -> None:
        """Answer what a browser asks before a web page's request."""
        allowed = ", ".join(route.methods)
        headers = {
            "Allow": allowed,
            "Access-Control-Allow-Methods": allowed,
            "Access-Control-Allow-Headers": self.headers.get("Access-Control-Request-Headers", "*"),
        }
        if "Access-Control-Request-Private-Network" in self.headers:
            headers["Access-Control-Allow-Private-Network"] = "true"
        self._send(204, headers, b"")

    def _health(self) -> None:
        """Tell how the proxy is; only who may use it is told more than a word."""
        health = {**self.server.pool.health(), "version": __version__}
        status = 503
        if health["status"] == "healthy":
            status = 200
        self._is_worth_a_line = self.server.note_health(status)
        if not has_key(self.headers, self.server.settings.api_key):
            health = {"status": health["status"], "version": __version__}
        self._send(status, {}, health)

    def _models(self) -> None:
        catalog = self.server.pool.ready(self._look)
        created = self.server.created
        requested = urllib.parse.unquote(self._route[len("/models/") :])
        if requested:
            model = find_model(catalog, requested)
            if model is None:
                raise model_not_found(requested)
            self._send(200, {}, model_object(model, catalog, created))
            return
        listed = [model_object(catalog.models[name], catalog, created) for name in catalog.names]
        self._send(200, {}, {"object": "list", "data": listed})

    def _chat(self) -> None:
        if self.headers.get_content_type() == "multipart/form-data":
            raise APIError(415, "The body must be JSON", code="unsupported_media_type")
        request = parse_chat_request(self._read_body())
        model = self.server.pool.ready(self._look).resolve(request.model)
        self._note_model(model, request.model)
        self._fetch_images(request.body, model)

        answer = Answer(request, model)
        if request.stream:
            self._answer = answer
        with contextlib.closing(self.server.pool.run(request, model, self._look)) as events:
            for index, event in events:
                self._note_first()
                self._write(answer.take(index, event))

        self.server.pool.note_success()
        self._facts["in"] = str(answer.usage["prompt_tokens"])
        self._facts["out"] = str(answer.usage["completion_tokens"])
        if request.stream:
            self._write(answer.tail(), is_last=True)
        else:
            self._send(200, {}, answer.whole())

    def _responses(self) -> None:
        self._pass_through(Responses)

    def _messages(self) -> None:
        self._pass_through(Messages)

    def _count_tokens(self) -> None:
        body = parse_json_object(self._read_body())
        self._send(200, {}, {"input_tokens": estimate_tokens(body)})

    def _pass_through(self, wire_format: type[WireFormat]) -> None:
        """Answer a request in a wire format's own words by what the provider says, unchanged.

        Where a stream is silent for long, a comment comes between two of its events.
        """
        headers = {name: self.headers[name] for name in PASSED_HEADERS if name in self.headers}
        request = parse_native_request(self._read_body(), wire_format, headers)
        model = self.server.pool.ready(self._look).resolve(request.model, exact=True)
        self._note_model(model, request.model)
        self._fetch_images(request.body, model)

        pieces = self.server.pool.run(request, model, self._look, NativeExchange)
        with contextlib.closing(pieces):
            for _, piece in pieces:
                self._note_first()
                if piece.status:
                    self._send(piece.status, piece.headers, None)
                    self._passed = PassedAnswer(wire_format, piece.status, piece.headers)
                if piece.text and self._passed is not None:
                    self._passed.take(piece.text)
                self._write(piece.text.encode("utf-8", "surrogatepass"))
        if self._passed is not None:
            self._facts.update(self._passed.facts())
        if "error" not in self._facts:
            self.server.pool.note_success()
        self._write(b"", is_last=True)

    def _fetch_images(self, body: Json, model: Model) -> None:
        """Put the images themselves where `body` has their URLs, if the service wants that.

        Raises APIError 400 for one that cannot be had, 413 where they are too much together.
        """
        if not self.server.settings.fetch_images or not wants_images_fetched(model):
            return
        places = list(image_places(body))
        urls = list(dict.fromkeys(holder[key] for holder, key, _ in places))
        try:
            images = fetch_images(urls, self._look)
        except ImageError as error:
            param = next(param for holder, key, param in places if holder[key] == error.url)
            raise invalid(f"The image cannot be fetched: {error}", param) from None

        size = sum(len(images[holder[key]]) for holder, key, _ in places)
        self._check_size(size)
        self.server.add_bytes(self.request, size)
        for holder, key, _ in places:
            put_image(holder, key, images[holder[key]])

    def _note_model(self, model: Model, requested: str | None) -> None:
        """Tell the log which model answers, and which one the client had named instead."""
        self._facts["model"] = model.name
        if requested and requested not in (model.name, model.bare_name):
            self._facts["asked"] = printable(requested).replace(" ", "?")

    def _note_first(self) -> None:
        """Tell the log when the answer began."""
        if "first" not in self._facts:
            self._facts["first"] = f"{time.monotonic() - self._started:.3f}"


TOKEN_COUNT = re.compile(r'"(input|output)_tokens": ?([0-9]{1,18})')
TOKEN_COUNT_CHARACTERS = 40  # at most, of such a count


class PassedAnswer:
    """What must be known of an answer that is passed through: for the log, and for its end.

    An event stream can end so between two events. Anything else can only be cut. (It searches the
    text and parses nothing: that serves every format, streamed or whole, complete or cut off.)
    """

    def __init__(
        self, wire_format: type[WireFormat], status: int, headers: Mapping[str, str]
    ) -> None:
        self._wire_format = wire_format
        self._status = status
        self._headers = headers
        self._refusal = ""  # the beginning of a refusal's body
        self._counts: dict[str, int] = {}  # of tokens
        self._tail = ""  # of what was sent: a count may be cut
        self._is_stream = headers.get("content-type", "").startswith("text/event-stream")
        self._end = "\n\n"  # of what was sent, without carriage returns
        self._number = 0  # of the next event, in /responses

    @property
    def is_between_events(self) -> bool:
        return self._is_stream and self._end == "\n\n"

    def take(self, text: str) -> None:
        """Note a piece that was sent."""
        self._end = (self._end + text[-4:].replace("\r", ""))[-2:]
        if self._status >= 400:
            self._refusal = (self._refusal + text)[:MAX_ERROR_CHARACTERS]
        sent = self._tail + text
        for name, count in TOKEN_COUNT.findall(sent):
            self._counts[name] = int(count)  # the last one counts
        self._tail = sent[-TOKEN_COUNT_CHARACTERS:]
        _, found, rest = text.rpartition(SEQUENCE_NUMBER)
        number = re.match("[ ]*([0-9]{1,18})", rest[:30])
        if found and number is not None:
            self._number = int(number[1]) + 1

    def facts(self) -> dict[str, str]:
        """Return what the log tells of the answer: a refusal's words, tokens in and out."""
        if self._status >= 400:
            error = upstream_error(self._status, self._headers, self._refusal)
            return {"error": json.dumps(printable(error.message))}
        names = {"input": "in", "output": "out"}
        return {names[name]: str(count) for name, count in self._counts.items()}

    def failure(self, error: APIError) -> bytes:
        """Return the events that tell of an error, in the format's own words."""
        if self._wire_format is not Responses:
            words = {"type": error.type, "message": error.message}
            return named_event({"type": "error", "error": words})
        event = {
            "type": "error",
            "code": error.code,
            "message": error.message,
            "param": error.param,
            "sequence_number": self._number,
        }
        # Codex does not know that one: it waits for the end of the response.
        failed = {
            "type": "response.failed",
            "sequence_number": self._number + 1,
            "response": {
                "object": "response",
                "status": "failed",
                "error": {"code": error.code or "server_error", "message": error.message},
                "output": [],
            },
        }
        return named_event(event) + named_event(failed)


def named_event(event: Json) -> bytes:
    """Return a server-sent event whose name is its type."""
    return f"event: {event['type']}\n".encode() + sse_data(event)


class Route(NamedTuple):
    """What serves a path; every path is found below /v1, too."""

    methods: tuple[str, ...]
    serve: Callable[[ProxyHandler], None]
    is_public: bool = False  # it needs no key


GET = ("GET", "HEAD", "OPTIONS")
POST = ("OPTIONS", "POST")
ROUTES = {
    "/": Route(GET, ProxyHandler._health, is_public=True),
    "/health": Route(GET, ProxyHandler._health, is_public=True),
    "/models": Route(GET, ProxyHandler._models),
    "/chat/completions": Route(POST, ProxyHandler._chat),
    "/responses": Route(POST, ProxyHandler._responses),
    "/messages": Route(POST, ProxyHandler._messages),
    "/messages/count_tokens": Route(POST, ProxyHandler._count_tokens),
}


NO_MORE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class ProxyServer(http.server.ThreadingHTTPServer):
    """Accepts connections, one daemon thread each, as many as there may be; owns the pool.

    A connection is idle while it has no complete head of a request: then it may be ended, to make
    room or because the server stops. Otherwise it is busy, and the bytes of its request's body
    count until that is answered. `_lock` protects `_idle`, whose first is idle for longest,
    `_busy`, which counts each one's bytes, and `_told_health`.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, settings: argparse.Namespace, pool: Pool) -> None:
        self.settings = settings
        self.pool = pool
        self.created = int(time.time())  # of the models, as far as anybody knows
        self.stopping = False
        self._lock = threading.Lock()
        self._idle: dict[socket.socket, None] = {}
        self._busy: dict[socket.socket, int] = {}
        self._total_bytes = 0  # of all in `_busy`
        self._told_health = 200  # the status that /health had last
        self._max_connections = max(16, min(MAX_CONNECTIONS, raise_file_limit() - RESERVED_FILES))

        self.address_family, address = listening_address(settings.host)
        super().__init__((address, settings.port), ProxyHandler)
        address = str(self.server_address[0])
        self.server_port = self.server_address[1]
        self.on_loopback = address.startswith("127.") or address == "::1"
        self.base_url = f"http://{self._host_name()}:{self.server_port}/v1"

    def server_bind(self) -> None:
        if not self.settings.host and self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks the host's name up

    def _host_name(self) -> str:
        """Return a name of this machine that leads here, as it is in a URL."""
        host: str = self.settings.host
        if host in ("0.0.0.0", "::", ""):
            return "localhost"
        if ":" in host:
            return f"[{host}]"
        return host

    # -- what becomes of connections

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; where no file may be opened for it, make room and wait a little."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in NO_MORE_FILES:
                self._end_idle(1)
                time.sleep(ACCEPT_PAUSE_SECONDS)
            raise

    @property
    def requests(self) -> int:
        """How many requests are being answered."""
        return len(self._busy)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Admit a connection, for which an idle one may have to go."""
        with self._lock:
            is_full = len(self._idle) + len(self._busy) >= self._max_connections
        if is_full and not self._end_idle(1):
            return False
        self.mark_idle(request)
        return True

    def mark_idle(self, connection: socket.socket) -> None:
        """Note that a connection has no request: it may be ended."""
        with self._lock:
            self._forget(connection)
            self._idle[connection] = None

    def mark_busy(self, connection: socket.socket) -> None:
        """Note that a connection has a request."""
        with self._lock:
            self._forget(connection)
            self._busy[connection] = 0

    def add_bytes(self, connection: socket.socket, size: int) -> None:
        """Count bytes of a request's body; raise APIError 503 where they are too many in all."""
        limit = max(MAX_BODIES_BYTES, self.settings.max_body_size)
        with self._lock:
            self._busy[connection] += size
            self._total_bytes += size
            is_too_much = self._total_bytes > limit
        if is_too_much:
            raise APIError(
                503,
                "Too much is being asked at once: try again later",
                code="too_busy",
                headers={"Retry-After": str(QUEUE_RETRY_SECONDS)},
            )

    def note_health(self, status: int) -> bool:
        """Note what /health was told; return whether that is news."""
        with self._lock:
            is_news = status != self._told_health
            self._told_health = status
        return is_news

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._forget(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log(f"{client_address[0]} connection failed: {sys.exc_info()[1]!r}")

    def _forget(self, connection: socket.socket) -> None:
        self._idle.pop(connection, None)
        self._total_bytes -= self._busy.pop(connection, 0)

    def _end_idle(self, limit: int) -> int:
        """End connections, the longest idle first; return how many."""
        with self._lock:
            idle = list(self._idle)[:limit]
            for connection in idle:
                del self._idle[connection]
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        return len(idle)

    # -- the end

    def stop(self, grace: float, hurry: Callable[[float], Any]) -> None:
        """Let answers finish for `grace` seconds, or until `hurry(seconds)` is true; end all."""
        self.stopping = True
        self.shutdown()
        self.server_close()
        self._end_idle(MAX_CONNECTIONS)
        self._wait_for_answers(grace, hurry)
        self.pool.closing.set()  # handlers see it first, and tell their clients
        self._wait_for_answers(STOP_SECONDS, time.sleep)
        self.pool.close()

    def _wait_for_answers(self, seconds: float, hurry: Callable[[float], Any]) -> None:
        deadline = time.monotonic() + seconds
        while self._busy and time.monotonic() < deadline:
            if hurry(0.02):
                return


def listening_address(host: str) -> tuple[socket.AddressFamily, str]:
    """Return the family and the address to listen on: without `host` all, of IPv6 and IPv4."""
    if host:
        return socket.getaddrinfo(host, None)[0][0], host
    if has_both_families():
        return socket.AF_INET6, "::"
    return socket.AF_INET, "0.0.0.0"


def has_both_families() -> bool:
    """Tell whether one socket can listen on IPv6 and IPv4, and the machine has both."""
    if not socket.has_dualstack_ipv6():
        return False
    with socket.socket(socket.AF_INET6) as probe, contextlib.suppress(OSError):
        probe.bind(("::1", 0))
        return True
    return False


def raise_file_limit() -> int:
    """Let this process have as many files open as it may; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(soft, min(hard, 10240))  # as many as macOS allows
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (OSError, ValueError):  # somebody forbids it
        return soft
    return limit


# ---- the log


class LogWriter:
    """Writes lines to a file on a thread of its own, and drops those that come too fast for it.

    So a log that nobody reads (a full pipe, a terminal under Ctrl-S) holds up nothing but this
    thread. It writes past Python's buffers: their lock would hold up the end of the program.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor  # None: there is nothing to write to
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_LOG_LINES)  # None: it is closed
        self._lock = threading.Lock()  # protects `_thread` and `_dropped`
        self._thread: threading.Thread | None = None
        self._dropped = 0

    def write(self, line: str) -> None:
        """Write a line soon, or never; return at once."""
        if self._descriptor is None:
            return
        with self._lock:
            self._start()
            if self._dropped:
                line = f"({self._dropped} lines are missing here: nobody read the log)\n{line}"
            try:
                self._lines.put_nowait(line)
                self._dropped = 0
            except queue.Full:
                self._dropped += 1

    def close(self, seconds: float) -> None:
        """Wait until all lines are written, but not for much longer than `seconds`."""
        thread = self._thread
        if thread is None:
            return
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=seconds)
            thread.join(seconds)
        with self._lock:
            self._thread = None

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, daemon=True)
            with contextlib.suppress(RuntimeError):  # no more threads are allowed: another time
                thread.start()
                self._thread = thread

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            if line is None:
                return
            self._write_all(f"{line}\n".encode("utf-8", "backslashreplace"))

    def _write_all(self, data: bytes) -> None:
        assert self._descriptor is not None
        with contextlib.suppress(OSError):
            while data:
                written = os.write(self._descriptor, data)
                data = data[written:]


def stderr_descriptor() -> int | None:
    """Return where stderr goes, None where it is closed."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # it is None, or no file
        return None


def is_journal(descriptor: int | None) -> bool:
    """Tell whether a descriptor leads to systemd's journal (systemd.exec(5)).

    That the variable is there does not say so: terminals inherit it.
    """
    if descriptor is not None:
        with contextlib.suppress(OSError):
            status = os.fstat(descriptor)
            return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return False


LOG = LogWriter(stderr_descriptor())
LOGS_TO_JOURNAL = is_journal(stderr_descriptor())


def log(text: str) -> None:
    """Write one line to stderr, with the time unless the journal adds it."""
    stamp = ""
    if not LOGS_TO_JOURNAL:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S ")
    LOG.write(stamp + text)


# ------------------------------------------------------------------------------------- command line
# Settings, the systemd units, and the life of the program: listen, prove meanwhile that opencode
# works, wait for a signal, stop. A StartError becomes an exit code here and nowhere else.

FAILED = b"!"  # what `prove` writes where signals write their number
DAY_SECONDS = 86400.0  # the longest of times
VARIABLE_PREFIX = "OPENCODE_PROXY_"
TEST_PREFIX = "OPENCODE_PROXY_TEST_"  # what the tests are told
EPILOG = """\
Each option is an environment variable, too: --max-queue is OPENCODE_PROXY_MAX_QUEUE, and several
keys or origins are separated by spaces. The option wins."""


class Option(NamedTuple):
    """What the environment means for an option that the command line does not give."""

    name: str
    default: Any
    parse: Callable[[str], Any]
    is_unset_by_empty: bool = True  # otherwise an empty variable is a value, too


class SettingsParser:
    """The options of the command line, each of which may come from the environment instead.

    argparse knows no defaults. What it does not find is looked for in the environment afterwards,
    so that a variable that is wrong is named as what it is, and only where it counts.
    """

    def __init__(self) -> None:
        self._parser = argparse.ArgumentParser(
            prog="opencode_proxy.py",
            description="Serve the models of opencode through OpenAI's chat completions API.",
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._group: Any = self._parser
        self._options: list[Option] = []
        self._from_environment: set[str] = set()  # names of options

    def group(self, title: str) -> None:
        """Begin a group of options in --help."""
        self._group = self._parser.add_argument_group(title)

    def value(
        self,
        name: str,
        default: Any,
        metavar: str,
        help: str,
        parse: Callable[[str], Any] = str,
        is_unset_by_empty: bool = True,
    ) -> None:
        """Add an option that has a value."""
        if default is True:
            help += " (default: yes)"
        elif default not in (None, ""):
            help += f" (default: {default})"
        self._group.add_argument("--" + name, metavar=metavar, type=parse, help=help)
        self._options.append(Option(name, default, parse, is_unset_by_empty))

    def values(self, name: str, metavar: str, help: str) -> None:
        """Add an option that may be repeated."""
        self._group.add_argument("--" + name, metavar=metavar, action="append", help=help)
        self._options.append(Option(name, [], words, is_unset_by_empty=False))

    def flag(self, name: str, help: str) -> None:
        """Add an option without a value."""
        self._group.add_argument("--" + name, action="store_const", const=True, help=help)
        self._options.append(Option(name, False, yes_or_no))

    def action(self, name: str, **how: Any) -> None:
        """Add an option, as argparse has it, that the environment cannot give."""
        self._group.add_argument("--" + name, **how)

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Return the settings; end the program with code 2 where they are wrong."""
        settings = self._parser.parse_args(argv)
        for option in self._options:
            attribute = option.name.replace("-", "_")
            if getattr(settings, attribute) is None:
                setattr(settings, attribute, self._environment_value(option))
        known = {variable_name(option.name) for option in self._options}
        settings.unknown_variables = unknown_variables(known)
        return settings

    def fail(self, name: str, reason: str) -> NoReturn:
        """End the program with code 2 and the reason, which lies in an option."""
        source = f"argument --{name}"
        if name in self._from_environment:
            source = variable_name(name)
        self._parser.error(f"{source}: {reason}")

    def _environment_value(self, option: Option) -> Any:
        text = os.environ.get(variable_name(option.name))
        if text is None or (text == "" and option.is_unset_by_empty):
            return option.default
        self._from_environment.add(option.name)
        try:
            return option.parse(text)
        except argparse.ArgumentTypeError as error:
            self.fail(option.name, str(error))


def variable_name(option: str) -> str:
    return VARIABLE_PREFIX + option.upper().replace("-", "_")


def unknown_variables(known: Collection[str]) -> list[str]:
    """Return the environment's variables that look like settings, but are none."""
    unknown = []
    for name in sorted(os.environ):
        is_setting = name.startswith(VARIABLE_PREFIX) and not name.startswith(TEST_PREFIX)
        if is_setting and name not in known:
            unknown.append(name)
    return unknown


def words(text: str) -> list[str]:
    """Return the words of a text; one without words is one empty word."""
    return text.split() or [""]


def yes_or_no(text: str) -> bool:
    """Return what a variable says of a flag."""
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def whole_number(least: int, greatest: int) -> Callable[[str], int]:
    """Return what reads a whole number from `least` to `greatest`."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            value = int(text)
            if least <= value <= greatest:
                return value
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number from {least} to {greatest}"
        )

    return parse


def seconds_from(least: float) -> Callable[[str], float]:
    """Return what reads a number of seconds, from `least` to a day."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = float(text)
            if least <= value <= DAY_SECONDS:
                return value
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number from {least:g} to {DAY_SECONDS:g}"
        )

    return parse


def model_name(text: str) -> str:
    if not all(text.split("/")):
        raise argparse.ArgumentTypeError(f"{text!r} is neither provider/model nor a model's name")
    return text


def add_network_options(parser: SettingsParser) -> None:
    parser.group("where it listens, and who may use it")
    parser.value(
        "host",
        "",
        "ADDRESS",
        "address to listen on (default: all that the machine has, of IPv6 and IPv4)",
    )
    parser.value("port", 4141, "N", "port to listen on", whole_number(0, 65535))
    parser.values("api-key", "KEY", "a key that clients must bring; may be repeated")
    parser.value(
        "api-key-file",
        None,
        "FILE",
        "a file with such keys, one a line; a line that begins with # is a comment",
        is_unset_by_empty=False,  # that would let everybody in
    )
    parser.values(
        "cors-origin",
        "ORIGIN",
        "a further web page that may use the proxy, or * for all; may be repeated",
    )


def add_opencode_options(parser: SettingsParser) -> None:
    parser.group("opencode and its models")
    parser.value(
        "model",
        None,
        "P/M",
        f"the model that answers when none is asked for (default: {DEFAULT_MODEL} or a successor)",
        model_name,
    )
    parser.value(
        "opencode",
        None,
        "PATH",
        "the opencode program (default: where its installers put it)",
    )
    parser.value(
        "spares",
        1,
        "N",
        "opencode processes that wait for requests, started ahead; with 0 nothing runs without one",
        whole_number(0, 10000),
    )
    parser.value(
        "requests-per-process",
        1,
        "N",
        "requests that an opencode process serves before a fresh one takes its place",
        whole_number(1, 10000),
    )


def add_limit_options(parser: SettingsParser) -> None:
    parser.group("limits")
    parser.value(
        "max-concurrency",
        64,
        "N",
        "requests that are answered at the same time",
        whole_number(1, 10000),
    )
    parser.value(
        "max-queue",
        1000,
        "N",
        "requests that may wait for that; more are refused",
        whole_number(0, 10000),
    )
    parser.value(
        "max-body-size",
        64 << 20,
        "BYTES",
        "the largest request",
        whole_number(1, 1 << 40),
    )
    parser.value(
        "fetch-images",
        True,
        "yes|no",
        "whether images at URLs are fetched for services that take none (GitHub Copilot)",
        yes_or_no,
    )


def add_time_options(parser: SettingsParser) -> None:
    parser.group("times")
    parser.value(
        "timeout",
        300.0,
        "SECONDS",
        "how long a model's provider may be silent",
        seconds_from(0.1),
    )
    parser.value(
        "grace",
        10.0,
        "SECONDS",
        "how long running answers may go on when the program is stopped",
        seconds_from(0.0),
    )


def add_other_options(parser: SettingsParser) -> None:
    parser.group("other")
    parser.flag("verbose", "log the messages exchanged with opencode, without their contents")
    parser.action(
        "systemd-unit",
        nargs="?",
        const="user",
        choices=("user", "system"),
        metavar="user|system",
        help="print a systemd unit for this copy of the program, and end",
    )
    parser.action("version", action="version", version="opencode_proxy " + __version__)


def read_settings(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the settings of the command line and the environment; end with code 2 if wrong."""
    parser = SettingsParser()
    add_network_options(parser)
    add_opencode_options(parser)
    add_limit_options(parser)
    add_time_options(parser)
    add_other_options(parser)
    settings = parser.parse(argv)

    for key in settings.api_key:
        if not key.strip():
            parser.fail("api-key", "a key is empty, which would let everybody in")
    if settings.api_key_file is not None:
        settings.api_key += read_keys(parser, settings.api_key_file)
    settings.cors_origin = [text.rstrip("/").lower() for text in settings.cors_origin if text]
    return settings


def read_keys(parser: SettingsParser, path: str) -> list[str]:
    """Return the keys in a file."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.fail("api-key-file", str(error))
    keys = []
    for line in text.splitlines():
        key = line.strip()
        if key and not key.startswith("#"):
            keys.append(key)
    if not keys:
        parser.fail("api-key-file", "there is no key in it, which would let everybody in")
    return keys


# -- systemd. MemoryDenyWriteExecute is missing: opencode compiles JavaScript.

USER_UNIT = """\
[Unit]
Description=OpenAI's chat completions API for the models of opencode

[Service]
{service}
# settings, and the key as OPENCODE_PROXY_API_KEY=...; for its owner's eyes only
EnvironmentFile=-%h/.config/opencode_proxy.env

[Install]
WantedBy=default.target
"""

SYSTEM_UNIT = """\
[Unit]
Description=OpenAI's chat completions API for the models of opencode
After=network-online.target
Wants=network-online.target

[Service]
{service}
User={user}
Environment={home}
ReadWritePaths={data}
PrivateTmp=yes
PrivateDevices=yes
ProtectSystem=strict
ProtectHome=read-only
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RestrictNamespaces=yes
CapabilityBoundingSet=
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
# settings, and the key as OPENCODE_PROXY_API_KEY=...; for its owner's eyes only
EnvironmentFile=-/etc/opencode_proxy.env

[Install]
WantedBy=multi-user.target
"""

SERVICE = """\
ExecStart={command}
Type=notify
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
SystemCallArchitectures=native"""


def systemd_unit(kind: str, opencode: str) -> str:
    """Return a systemd unit, `kind` "user" or "system", for this copy of the program."""
    words = [unit_word(sys.executable)]
    for word in (os.path.abspath(__file__), "--opencode", opencode):
        words.append(unit_word(word.replace("$", "$$")))  # behind the program a $ is a variable
    service = SERVICE.format(command=" ".join(words))
    if kind == "user":
        return USER_UNIT.format(service=service)
    return SYSTEM_UNIT.format(
        service=service,
        user=os.environ.get("USER") or os.environ.get("LOGNAME") or "root",
        home=unit_word("HOME=" + os.path.expanduser("~")),
        data=unit_word(f"-{user_folder('XDG_DATA_HOME', '~/.local/share')}"),
    )


def unit_word(text: str) -> str:
    """Return a text as one word of a unit (systemd.syntax(7))."""
    if not re.fullmatch(r"[\w@%$/.:+,=-]+", text):
        text = json.dumps(text, ensure_ascii=False)
    return text.replace("%", "%%")


def notify(state: str) -> None:
    """Tell systemd about the service's state, where it wants to know (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path.startswith("@"):  # a name that is in no folder
        path = "\0" + path[1:]
    if path:
        manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with manager, contextlib.suppress(OSError):
            manager.sendto(state.encode(), path)


# -- the life of the program


def serve(settings: argparse.Namespace) -> None:
    """Run the server until a signal tells it to stop; raise StartError where it cannot start."""
    failures: list[Exception] = []
    with stop_signals() as (waker, wakened):
        server = make_server(settings)
        for name in settings.unknown_variables:
            log(f"warning: {name} is in the environment, but there is no such setting")
        threads = [
            threading.Thread(target=server.serve_forever),
            threading.Thread(target=prove, args=(server, waker, failures)),
        ]
        for thread in threads:
            thread.start()

        has_failed = wakened.recv(1) == FAILED
        notify("STOPPING=1")
        if server.requests > 0 and not has_failed:
            log(
                f"stopping: {server.requests} running requests may go on for"
                f" {settings.grace:g} seconds; another Ctrl-C ends them now"
            )

        def is_signalled(seconds: float) -> bool:
            readable, _, _ = select.select([wakened], [], [], seconds)
            return bool(readable)

        server.stop(settings.grace, is_signalled)
        for thread in threads:
            thread.join()
    if has_failed:
        raise failures[0]


@contextlib.contextmanager
def stop_signals() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Let signals that end the program arrive as bytes in the second of two sockets.

    The interpreter itself writes to the first one: a handler could want a lock that what it
    interrupts holds. So the handlers do nothing.
    """
    waker, wakened = socket.socketpair()
    with waker, wakened:
        waker.setblocking(False)
        previous_descriptor = signal.set_wakeup_fd(waker.fileno())
        previous = {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            previous[number] = signal.signal(number, lambda number, frame: None)
        try:
            yield waker, wakened
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_descriptor)


def make_server(settings: argparse.Namespace) -> ProxyServer:
    """Return a server that listens; raise StartError where there cannot be one."""
    path = find_opencode(settings.opencode)
    log(f"starting {path} ...")
    trace = None
    if settings.verbose:
        trace = trace_message
    try:
        pool = Pool(Opencode(path, settings.model), settings, trace)
    except OSError as error:  # the current folder is gone, and a variable names a file in it
        raise StartError(f"the files of opencode cannot be found: {error}") from None
    try:
        return ProxyServer(settings, pool)
    except (OSError, UnicodeError) as error:
        pool.close()
        address = f"port {settings.port}"
        if settings.host:
            address = f"{settings.host}:{settings.port}"
        reason = getattr(error, "strerror", None) or error
        raise StartError(f"cannot listen on {address}: {reason}") from None


def trace_message(arrow: str, message: Json, size: int) -> None:
    """Log a message exchanged with opencode; its contents are nobody's business."""
    log(f"{arrow} {message.get('method', 'reply')} {size} bytes")


def prove(server: ProxyServer, waker: socket.socket, failures: list[Exception]) -> None:
    """Prove that opencode works, and tell the log what runs; a failure ends the program."""
    try:
        server.pool.prove()
        if not server.stopping:
            announce(server)
            notify("READY=1")
            announce_login(server)
    except Exception as error:  # also a defect: a proxy that never gets ready helps nobody
        failures.append(error)
        waker.send(FAILED)


def announce(server: ProxyServer) -> None:
    """Tell the log what runs, and what is worth a warning."""
    settings = server.settings
    health = server.pool.health()
    model = health["model"]
    version = health["opencode"] or "(not logged in)"
    log(f"opencode_proxy {__version__} with opencode {version}, model {model}")
    log(f"base URL for apps: {server.base_url}")
    if not settings.model and model != DEFAULT_MODEL:
        log(
            f"warning: {DEFAULT_MODEL} is not offered, {model} answers instead; choose with --model"
        )
    if health["reason"]:
        log(f"warning: {health['reason']}")
    if not settings.api_key and not server.on_loopback:
        log(
            "warning: whoever reaches this port can use your models;"
            " set --api-key or --host 127.0.0.1"
        )


def announce_login(server: ProxyServer) -> None:
    """Wait until the user has logged in, where that is wanting, and tell the log."""
    if server.pool.health()["reason"] is None:
        return
    while not server.pool.closing.wait(LOOK_SECONDS):
        health = server.pool.health()
        if health["reason"] is None:
            log(f"ready: model {health['model']} answers now")
            return


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    settings = read_settings(argv)
    try:
        if settings.systemd_unit:
            print(systemd_unit(settings.systemd_unit, find_opencode(settings.opencode)), end="")
        else:
            serve(settings)
    except StartError as error:
        LOG.write(f"opencode_proxy: {error}")
        return 1
    finally:
        LOG.close(FLUSH_SECONDS)
    return 0


# ------------------------------------------------------------------------------------------- plugin
# JavaScript that every opencode process loads: it knows opencode's hooks and Bun's fetch, and no
# provider's JSON. It asks Python what to tell opencode of a turn, asks for the body to send when
# opencode is about to send its own, sends it once, and relays the answer; opencode is refused.

# Why opencode collects garbage at every token, and how not to. Bun 1.3.14, which opencode 1.17.0 to
# 1.18.33 carry, looks at its heap whenever the event loop turns, and collects 16 ms after the size
# has changed; collecting changes it: 62 collections a second, of 7 to 15 ms, as long as an answer
# streams. (https://github.com/oven-sh/bun/pull/35356 mends that; BUN_GC_TIMER_DISABLE, which is
# set always, has an effect from then on.) On Linux its two timers are timerfds of the process, one
# after the other: a one-shot with the interval 0, and a repeating one of a second. Closing both
# ends it; /dev/null holds their numbers, so that whoever still uses them hits nothing else.
# The preload does it 30 to 70 ms after the start and, with a ballast of memory that is never
# touched, keeps Bun from collecting while opencode loads: beside it nothing has grown. Nobody holds
# the ballast, and it goes with the first full collection: as long as it counts, garbage may grow by
# its size, 20 MB a request. Where the preload did not run, the plugin closes the timers.
# Where not exactly these two are found (another Bun, macOS, no /proc) it closes none and says so:
# later processes collect no garbage at all. When every opencode that is supported carries the
# mended Bun, CLOSE_TIMERS, PRELOAD, Opencode._collects_rarely and BUN_JSC_useGC can go.

CLOSE_TIMERS = r"""
import { closeSync, openSync, readdirSync, readFileSync, readlinkSync } from "node:fs"
const periodOf = (fd) => { // "seconds, nanoseconds" of a timer, undefined for other files
  try {
    if (!readlinkSync("/proc/self/fd/" + fd).endsWith("[timerfd]")) return undefined
    const info = readFileSync("/proc/self/fdinfo/" + fd, "latin1")
    return info.match(/it_interval: \((\d+, \d+)\)/)?.[1]
  } catch { return undefined }
}
const closeTimers = () => { // returns whether it did
  try {
    const repeating = readdirSync("/proc/self/fd").map(Number)
      .filter((fd) => periodOf(fd) === "1, 0" && periodOf(fd - 1) === "0, 0")
    if (repeating.length !== 1) return false
    for (const fd of [repeating[0] - 1, repeating[0]]) {
      closeSync(fd)
      openSync("/dev/null", "r") // the lowest free number: this one
    }
    return true
  } catch { return false }
}
"""

PRELOAD = (
    CLOSE_TIMERS
    + r"""
delete process.env.BUN_INSPECT_PRELOAD // not for what opencode starts
globalThis.opencodeProxyHasClosedTimers = closeTimers()
const BALLAST_BYTES = 2 ** 31
try {
  new ArrayBuffer(BALLAST_BYTES)
} catch {} // no room for it (RLIMIT_AS, strict overcommit): the start collects garbage
"""
)

PLUGIN = (
    CLOSE_TIMERS
    + r"""
import { edenGC } from "bun:jsc"
const HEADER = "x-opencode-proxy-session"
const WINDOW = 1 << 20 // characters of an answer that are relayed before the client has taken them
const PIECE = 1 << 16 // characters in a line, at most
const MAX_REFUSAL = 1 << 16 // characters of a refusal's body
const timeout = false // of fetch: Bun's own is 5 silent minutes, but Python's --timeout counts
const IDLE_MILLISECONDS = 150 // after the last turn, until its garbage is collected: it takes 25 ms

// The module is instantiated more than once: what it knows lies where all of them find it.
const proxy = (globalThis.opencodeProxy ??= { turns: new Map(), fetch: globalThis.fetch })

const report = (kind, sessionId, params, written) => {
  const message = { jsonrpc: "2.0", method: "proxy/" + kind, params: { sessionId, ...params } }
  process.stdout.write(JSON.stringify(message) + "\n", written)
}

// Reports that the request leaves now. What is in the pipe is read, also if this process is killed:
// so Python knows whether a request may have left.
const reportSending = (sessionId) => new Promise((resolve, reject) => {
  report("sending", sessionId, {}, (error) => error ? reject(error) : resolve())
})

const ask = async (kind, sessionId, question) => {
  const unix = process.env.OPENCODE_PROXY_SOCKET
  const init = { method: "POST", body: JSON.stringify(question), unix, timeout }
  const answer = await proxy.fetch(`http://localhost/${kind}/${sessionId}`, init)
  if (!answer.ok) throw new Error("nobody waits for this answer")
  return answer
}

const begin = async (sessionId) => {
  const turn = await (await ask("turn", sessionId, {})).json()
  proxy.turns.set(sessionId, { types: {}, ...turn })
}

const relay = async (sessionId, stream) => {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true }) // or it drops a U+FEFF of a chunk
  let sent = 0
  for await (const bytes of stream) {
    let text = decoder.decode(bytes, { stream: true })
    while (text) {
      // not between the halves of a character beyond U+FFFF
      const isHalf = text.length > PIECE && /[\ud800-\udbff]/.test(text[PIECE - 1])
      const piece = text.slice(0, isHalf ? PIECE - 1 : PIECE)
      text = text.slice(piece.length)
      report("data", sessionId, { text: piece })
      sent += piece.length
      if (sent < WINDOW) continue
      await ask("more", sessionId, {})
      sent = 0
    }
  }
}

const exchange = async (sessionId, turn, target, init) => {
  // Python knows the conversation: it is told of everything else
  const { messages, input, instructions, system, contents, prompt, ...body } = JSON.parse(init.body)
  const url = String(target?.url ?? target)
  const reply = await ask("request", sessionId, { url, body })
  const headers = JSON.parse(reply.headers.get("x-headers"))
  for (const [name, value] of Object.entries(headers)) init.headers.set(name, value)
  turn.isOurs = reply.status === 200 // otherwise opencode's own body goes: it reads the answer
  if (turn.isOurs) init.body = await reply.arrayBuffer()

  await reportSending(sessionId)
  const answer = await proxy.fetch(target, init)
  const head = { status: answer.status, headers: Object.fromEntries(answer.headers) }
  if (!answer.ok) {
    const body = (await answer.text()).slice(0, MAX_REFUSAL)
    return report("refused", sessionId, { ...head, body })
  }
  report("upstream", sessionId, head)
  if (!turn.isOurs) return answer
  await relay(sessionId, answer.body)
  return report("end", sessionId)
}

const fetchOnce = async (input, init) => {
  if (input instanceof Request && input.headers.has(HEADER)) { // so do some login plugins
    const { url, headers, signal } = input
    return fetchOnce(url, { method: "POST", headers, signal, body: await input.text() })
  }
  // Before each request opencode's own Copilot plugin asks opencode's own server whether it is an
  // agent's: GET /session/ID/message/MESSAGE (has it the parts of a summary?) and GET /session/ID
  // (has it a parent?). It has not: `{}` says so at once, the server would take 0.09 s.
  const lookedUp = new URL(input?.url ?? input).pathname.split("/")[2]
  if (proxy.turns.get(lookedUp)?.isMakingHeaders) return Response.json({})
  const headers = new Headers(init?.headers)
  const sessionId = headers.get(HEADER)
  if (!sessionId) return proxy.fetch(input, init)

  headers.delete(HEADER)
  // For opencode, in place of an answer that it shall not read: its turn always ends by this error,
  // as it does not retry a 400.
  const refusal = () =>
    Response.json({ error: { message: "answered by the proxy" } }, { status: 400 })
  const turn = proxy.turns.get(sessionId)
  if (!turn || turn.warmup) return refusal()
  try {
    return (await exchange(sessionId, turn, input, { ...init, headers, timeout })) ?? refusal()
  } catch (error) {
    report("error", sessionId, { network: error?.code, message: String(error?.message ?? error) })
    return refusal()
  }
}
if (globalThis.fetch === proxy.fetch) globalThis.fetch = Object.assign(fetchOnce, proxy.fetch)

const asMessages = (user, conversation) => conversation.map(({ role, parts }, m) => {
  const [id, sessionID] = [`${user.id}_${m}`, user.sessionID]
  const reply = { parentID: user.id, mode: user.agent, ...user.model, path: { cwd: "/", root: "/" },
    cost: 0, tokens: { input: 0, output: 0, reasoning: 0, cache: { read: 0, write: 0 } } }
  return { info: { ...user, ...(role !== "user" && reply), id, role },
    parts: parts.map((part, p) => ({ id: `prt_${m}_${p}`, sessionID, messageID: id, ...part })) }
})

// Collects the garbage of the turns that are over, while there is no other.
const collectWhenIdle = () => {
  clearTimeout(proxy.collecting)
  const collect = () => { if (proxy.turns.size === 0) edenGC() }
  if (proxy.isCalm) proxy.collecting = setTimeout(collect, IDLE_MILLISECONDS)
}

const sessionOf = ({ sessionID, part, info }) => sessionID ?? part?.sessionID ?? info?.sessionID

// Forgets a turn that opencode is done with.
const forget = ({ properties }) => {
  if (properties.status?.type !== "idle") return
  if (proxy.turns.delete(sessionOf(properties))) collectWhenIdle()
}

// Reports what an answer says that opencode reads: one in a format that only opencode knows.
const reportForeign = ({ type, properties }) => {
  const { info, part, partID, delta, status, error } = properties
  const id = sessionOf(properties)
  const turn = proxy.turns.get(id)
  if (!turn || turn.isOurs || turn.warmup) return
  if (type === "message.part.updated") turn.types[part.id] = part.type
  if (type === "message.part.delta") report("delta", id, { type: turn.types[partID], text: delta })
  if (info?.finish) report("finish", id, { finish: info.finish, tokens: info.tokens })
  if (type === "session.error" || status?.type === "retry")
    report("error", id, { message: status?.message ?? error?.data?.message ?? error?.name })
}

const hooks = {
  config: async (config) => // nothing of the user's coding set-up runs
    Object.assign(config, { mcp: {}, instructions: [], command: {}, lsp: false, formatter: false }),
  "chat.message": async (_, { message }) => begin(message.sessionID),
  "experimental.chat.messages.transform": async (_, { messages: all }) => {
    const user = all.find(({ info }) => info.role === "user").info
    all.splice(0, all.length, ...asMessages(user, proxy.turns.get(user.sessionID).conversation))
  },
  "experimental.chat.system.transform": async ({ sessionID }, { system }) =>
    system.splice(0, system.length, ...proxy.turns.get(sessionID).system),
  "chat.params": async ({ sessionID, model, message }, output) => {
    const turn = proxy.turns.get(sessionID)
    Object.assign(output, { temperature: undefined, topP: undefined, topK: undefined }, turn.params)
    // the effort that opencode picks by itself goes, the client's comes
    const { [message.model.variant]: picked, [turn.effort]: chosen } = model.variants ?? {}
    for (const key of ["reasoningEffort", "textVerbosity", ...Object.keys(picked ?? {})])
      delete output.options[key]
    if (turn.effort) Object.assign(output.options, chosen ?? { reasoningEffort: turn.effort })
    model.capabilities.input.image = true // the provider judges, not opencode
    turn.isMakingHeaders = true
    if (turn.warmup) report("warm", sessionID)
  },
  "chat.headers": async ({ sessionID }, { headers }) => { // runs after opencode's own
    proxy.turns.get(sessionID).isMakingHeaders = false
    headers[HEADER] = sessionID
  },
  event: async ({ event }) => {
    reportForeign(event)
    forget(event)
  },
}
export const OpencodeProxy = async () => {
  proxy.isCalm ??= globalThis.opencodeProxyHasClosedTimers || closeTimers()
  report("loaded", undefined, { hasClosedTimers: proxy.isCalm })
  return hooks
}
"""
)


if __name__ == "__main__":
    sys.exit(main())
