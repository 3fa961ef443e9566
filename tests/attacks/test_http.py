"""Hostile clients of a real server: they hold connections, send little, read nothing, come from another site."""

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest
import uvicorn
from pydantic import ValidationError
from serving import PATIENCE, figure, get, post, serving, stream, wait
from uvicorn.server import ServerState

from diffucoder.cli import main
from diffucoder.errors import ConfigError
from diffucoder.serving import connections
from diffucoder.serving.connections import Connection
from diffucoder.serving.settings import ServerSettings

KEY = "a-key-of-many-letters"
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LONG = {"prompt": "def f(x):\n", "max_tokens": 200}
IMPATIENT = ("--read-timeout", "1", "--write-timeout", "1", "--max-connections", "12")


@pytest.fixture(scope="module")
def impatient() -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A server that waits a second, and has 12 connections."""
    with serving("--dtype", "float32", *IMPATIENT) as started:
        yield started
        assert_no_traceback(started[1])


@pytest.fixture(scope="module")
def guarded() -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A server with a key."""
    with serving("--dtype", "float32", DIFFUCODER_API_KEY=f"\ufeff{KEY} \r\n") as started:
        yield started
        assert_no_traceback(started[1])


def assert_no_traceback(process: "subprocess.Popen[str]") -> None:
    """Stop a server; its log has nothing about mistakes of its own."""
    process.terminate()
    assert process.wait(PATIENCE) == 0
    assert process.stderr is not None
    log = process.stderr.read()
    assert "Traceback" not in log, log


def connect(url: str, sent: str = "") -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
    connection.sendall(sent.encode())
    return connection


def answer(connection: socket.socket) -> str:
    """Everything until the server closes the connection."""
    received = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(2**16):
            received += part
    return received.decode()


def processor_seconds(process: "subprocess.Popen[str]") -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- slow clients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ("", ""),
        ("GET /health HTTP/1.1\r\nHost: x\r\nX: ", ""),
        ("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", "200"),  # and then nothing
        (f"{HEAD}Content-Length: 99\r\n\r\n{{", "408"),
        (f"{HEAD}Transfer-Encoding: chunked\r\n\r\n5\r\n{{", "408"),
        (f"GET /health {HEAD[21:]}Content-Length: 99\r\n\r\n", "408"),
        ("\x16\x03\x01 not HTTP\r\n\r\n", "400"),
    ],
    ids=["nothing", "head", "idle", "body", "chunk", "get", "other"],
)
def test_a_client_that_stops_sending_is_left(
    impatient: tuple[str, "subprocess.Popen[str]"], sent: str, status: str
) -> None:
    with connect(impatient[0], sent) as connection:
        assert answer(connection)[9:12] == status


def test_a_byte_now_and_then_does_not_keep_a_connection(impatient: tuple[str, "subprocess.Popen[str]"]) -> None:
    for sent in ("GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", f"{HEAD}Content-Length: 9999\r\n\r\n"):
        with connect(impatient[0], sent) as connection, suppress(BrokenPipeError, ConnectionResetError):
            connection.settimeout(0.1)
            began = time.monotonic()
            while time.monotonic() - began < PATIENCE:
                connection.sendall(b"x")
                with suppress(TimeoutError):
                    if not connection.recv(2**16):
                        break
            else:
                raise AssertionError("it is still open")


def test_idle_connections_lock_nobody_out(impatient: tuple[str, "subprocess.Popen[str]"]) -> None:
    url, process = impatient
    with ExitStack() as idle:
        for number in range(60):
            idle.enter_context(
                connect(url, ("", "GET / HTTP/1.1\r\nX: ", f"{HEAD}Content-Length: 9\r\n\r\n")[number % 3])
            )
            if number % 10 == 9:
                assert get(f"{url}/health").status_code == 200
        wait(lambda: _connections(process) <= 13)


def _connections(process: "subprocess.Popen[str]") -> int:
    """Sockets of the server."""
    return sum("socket" in os.readlink(entry) for entry in Path(f"/proc/{process.pid}/fd").iterdir())


def test_a_stream_goes_on_while_idle_connections_come(impatient: tuple[str, "subprocess.Popen[str]"]) -> None:
    url, _ = impatient
    with ExitStack() as idle, stream(f"{url}/v1/completions", {**LONG, "stream": True}) as streamed:
        for _ in range(30):
            idle.enter_context(connect(url))
        assert "data: [DONE]" in list(streamed.iter_lines())


def test_few_descriptors_are_enough_and_lines_of_the_log_are_few() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (160, before[1]))
    try:
        started = ExitStack()
        url, process = started.enter_context(serving("--dtype", "float32"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with started, ExitStack() as idle:
        for _ in range(300):
            idle.enter_context(connect(url))
        assert get(f"{url}/health").status_code == 200
        assert get(f"{url}/page/page.js").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None
        assert len(process.stderr.read().splitlines()) < 5


def test_a_client_that_does_not_read_is_left(impatient: tuple[str, "subprocess.Popen[str]"]) -> None:
    url, process = impatient
    wait(lambda: _connections(process) < 4)
    requests = 0
    with connect(url) as connection:
        connection.settimeout(0.5)
        with suppress(TimeoutError, ConnectionResetError, BrokenPipeError):
            while True:
                connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
                requests += 100
        connection.settimeout(PATIENCE)
        time.sleep(3)
        assert answer(connection).count("HTTP/1.1 200 OK") < requests


def test_a_client_that_reads_64_kib_in_time_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(connections, "time", Mock(monotonic=lambda: now))
    transport = Mock(is_closing=lambda: False)

    async def work() -> None:
        nonlocal now
        config = uvicorn.Config(Mock(), log_level="critical")
        config.load()
        settings = ServerSettings()
        state = ServerState()
        connection = Connection(settings=settings, most=9, config=config, server_state=state, app_state={})
        connection.connection_made(transport)
        connection.pause_writing()
        for size in (*range(900_000, 150_000, -70_000), 100_000, 100_000, 100_000):
            assert not transport.abort.called
            transport.get_write_buffer_size.return_value = size
            connection.end_if_late()
            now += settings.write_timeout / 2 + 1
        assert transport.abort.called

    asyncio.run(work())


def test_a_client_that_sends_more_and_leaves_is_noticed(impatient: tuple[str, "subprocess.Popen[str]"]) -> None:
    """Nothing is read of a second request while the first one is answered, so its end is not either."""
    url, _ = impatient
    left = figure(url, "cancelled_total")
    body = json.dumps({**LONG, "max_tokens": 480, "n": 64, "temperature": 1.5})
    with connect(url, f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}") as connection:
        wait(lambda: figure(url, "running") > 0)
        connection.sendall(b"G")
        time.sleep(0.5)
    wait(lambda: figure(url, "running") == 0)
    assert figure(url, "cancelled_total") == left + 1


# --- what is read before the key, and how much of it -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "status"),
    [
        ("Content-Length: 99\r\n\r\n{", "401"),  # not read to its end
        ("Content-Length: 999999999999\r\n\r\n", "401"),
        ("Content-Length: 1\r\n\r\n{", "401"),  # not JSON
        (f"Authorization: Bearer {KEY}x\r\nContent-Length: 1\r\n\r\n{{", "401"),
        (f"Authorization: Bearer {KEY}\r\nContent-Length: 1\r\n\r\n{{", "400"),
        (f"Authorization: Bearer {KEY}\r\nContent-Length: 1048577\r\n\r\n{{", "413"),
        (f"Authorization: Bearer {KEY}\r\nExpect: 100-continue\r\nContent-Length: 999999999999\r\n\r\n", "413"),
    ],
)
def test_the_key_comes_before_the_body_and_the_length_too(
    guarded: tuple[str, "subprocess.Popen[str]"], rest: str, status: str
) -> None:
    with connect(guarded[0], HEAD + rest) as connection:
        assert connection.recv(12).decode().endswith(f" {status}")


@pytest.mark.parametrize("key", ["", f"Authorization: Bearer {KEY}\r\n"], ids=["without", "with"])
@pytest.mark.parametrize("end", ["Connection: close\r\n", ""], ids=["close", "keep"])
def test_chunks_of_one_byte_cost_nothing(guarded: tuple[str, "subprocess.Popen[str]"], key: str, end: str) -> None:
    url, process = guarded
    with connect(url, f"{HEAD}{key}{end}Transfer-Encoding: chunked\r\n\r\n") as connection:
        before = processor_seconds(process)
        connection.sendall(b"1\r\nx\r\n" * 500_000 + b"0\r\n\r\n")
        assert answer(connection)[9:12] in ("400", "401")
        assert processor_seconds(process) - before < 1


def test_chunks_of_a_line_each_are_read(impatient: tuple[str, "subprocess.Popen[str]"]) -> None:
    pieces = [b'{"content":"', *[b"x = 1" for _ in range(1000)], b'"}']
    told = post(f"{impatient[0]}/tokenize", content=iter(pieces), headers={"content-type": "application/json"})
    assert told.status_code == 200


def test_a_client_in_the_middle_of_a_large_body_reads_the_answer(
    impatient: tuple[str, "subprocess.Popen[str]"],
) -> None:
    for length in ("Content-Length: 20000000\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n1312D00\r\n"):
        with connect(impatient[0], HEAD + length) as connection:
            for _ in range(20):
                connection.sendall(b"x" * 1_000_000)
            assert answer(connection)[9:12] == "413"


def test_routes_that_need_the_key_and_those_that_do_not(guarded: tuple[str, "subprocess.Popen[str]"]) -> None:
    url, _ = guarded
    for path in ("/", "/health", "/ready", "/metrics", "/openapi.json", "/page/page.js"):
        assert get(url + path).status_code == 200, path
    for path in ("/v1/models", "/v1/models/tiny", "/nowhere", "/page", "//", "/health/"):
        assert get(url + path).status_code == 401, path
    told = get(f"{url}/v1/models", headers={"authorization": f"bearer  {KEY}", "host": "any.example"})
    assert told.status_code == 200


# --- other sites -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost", "localhost:1", "LOCALHOST", "127.0.0.1:8000", "127.9.9.9", "[::1]:80")),
        *((host, 403) for host in ("attacker.example", "attacker.example:8000", "localhost.attacker.example", "x")),
        *((host, 403) for host in ("127.0.0.1.nip.io", "192.168.1.5", "0.0.0.0", "[::2]", "127.0.0.1@x", "[", "")),
    ],
)
def test_only_its_own_names_are_answered_without_a_key(
    impatient: tuple[str, "subprocess.Popen[str]"], host: str, status: int
) -> None:
    for path in ("/health", "/metrics", "/", "/page/page.js", "/v1/models"):
        assert get(impatient[0] + path, headers={"host": host}).status_code == status
    told = post(f"{impatient[0]}/tokenize", json={"content": "x"}, headers={"host": host})
    assert told.status_code == status


def test_a_client_of_http_1_0_need_not_send_a_host(impatient: tuple[str, "subprocess.Popen[str]"]) -> None:
    with connect(impatient[0], "GET /health HTTP/1.0\r\n\r\n") as connection:
        assert answer(connection)[9:12] == "200"


def test_pages_of_other_sites_may_not_post(impatient: tuple[str, "subprocess.Popen[str]"]) -> None:
    url = f"{impatient[0]}/tokenize"
    for origin in (
        "http://attacker.example",
        "null",
        "http://localhost:3000",
        "http://127.0.0.1:1",
        f"{impatient[0]}.example",
    ):
        told = post(url, json={"content": "x"}, headers={"origin": origin})
        assert told.status_code == 403
        assert "--cors ORIGIN" in told.json()["error"]["message"]
    assert post(url, json={"content": "x"}, headers={"origin": impatient[0]}).status_code == 200


def test_names_and_origins_that_are_allowed(tmp_path: Path) -> None:
    options = ("--allowed-host", "Code.example.org", "--cors", "https://editor.example")
    with serving("--dtype", "float32", *options) as (url, _):
        behind_a_proxy = {"host": "code.example.org", "origin": "https://code.example.org:8443"}
        assert post(f"{url}/tokenize", json={"content": "x"}, headers=behind_a_proxy).status_code == 200
        told = post(f"{url}/tokenize", json={"content": "x"}, headers={"origin": "https://editor.example"})
        assert told.headers["access-control-allow-origin"] == "https://editor.example"
        asked = {"origin": "https://editor.example", "access-control-request-method": "POST"}
        assert httpx.options(f"{url}/tokenize", headers=asked, timeout=PATIENCE).status_code == 200
        assert get(f"{url}/health", headers={"host": "example.org"}).status_code == 403


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_what_a_form_can_send_is_not_json(impatient: tuple[str, "subprocess.Popen[str]"], kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    assert post(f"{impatient[0]}/tokenize", content=b'{"content": "x"}', headers=headers).status_code == 400


def test_browsers_are_told_what_not_to_do(impatient: tuple[str, "subprocess.Popen[str]"]) -> None:
    for path in ("/", "/page/index.html", "/page/page.js", "/health", "/nowhere", "/v1/completions"):
        headers = get(impatient[0] + path).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_no_redirect_repeats_the_host(impatient: tuple[str, "subprocess.Popen[str]"]) -> None:
    assert get(f"{impatient[0]}/page").status_code == 404
    assert get(f"{impatient[0]}/health/").status_code == 404


# --- keys ------------------------------------------------------------------------------------------------------------


def rejected(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line of a server that does not start."""
    monkeypatch.setattr(sys, "argv", ["diffucoder", "serve", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    line = capsys.readouterr().err
    assert ended.value.code == 2
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line


@pytest.mark.parametrize(
    "key", ["hunter2", "passé-partout", "two words long", '"quoted-key-1"', "first-line\nsecond-line", "x" * 600]
)
def test_a_key_that_no_client_could_send_is_rejected_and_never_printed(key: str) -> None:
    with pytest.raises(ConfigError) as error:
        ServerSettings(api_key=key)
    assert "api_key: the key has" in str(error.value)
    assert key[:5] not in str(error.value)
    with pytest.raises(ValidationError) as raw:
        ServerSettings.model_validate({"api_key": key})
    assert key[:5] not in str(raw.value)
    assert KEY not in repr(ServerSettings(api_key=KEY))


@pytest.mark.parametrize(
    "text", [b"hunter2\n", b"\xff\xfeh\0u\0n\0t\0e\0r\0002\0", b"", b" \r\n", b"hunter2 " * 10_000]
)
def test_a_bad_key_file_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: bytes
) -> None:
    (tmp_path / "key").write_bytes(text)
    assert "hunter" not in rejected(monkeypatch, capsys, "--api-key-file", str(tmp_path / "key"))


@pytest.mark.parametrize("value", ["", " \n", "hunter2"])
def test_a_bad_variable_is_not_no_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    monkeypatch.setenv("DIFFUCODER_API_KEY", value)
    line = rejected(monkeypatch, capsys)
    assert "hunter2" not in line
    assert ("$DIFFUCODER_API_KEY is empty" in line) == (not value.strip())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "box.example"])
def test_other_machines_need_a_key_or_the_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: str
) -> None:
    assert "add --no-key" in rejected(monkeypatch, capsys, "--host", host)
    monkeypatch.setenv("DIFFUCODER_API_KEY", KEY)
    assert "leave out one of them" in rejected(monkeypatch, capsys, "--host", host, "--no-key")


def test_all_interfaces_without_a_key_have_names_too() -> None:
    with serving("--dtype", "float32", "--host", "0.0.0.0", "--no-key") as (url, _):
        port = url.rsplit(":", 1)[1]
        assert get(f"http://127.0.0.1:{port}/health").status_code == 200
        assert get(f"http://127.0.0.1:{port}/health", headers={"host": "attacker.example"}).status_code == 403


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_idle_connections_and_half_bodies_do_not_keep_the_server(name: signal.Signals) -> None:
    with serving("--dtype", "float32") as (url, process), ExitStack() as held:
        for sent in ("", "GET / HTTP/1.1\r\n", f"{HEAD}Content-Length: 9\r\n\r\n{{"):
            held.enter_context(connect(url, sent))
        accepted = stream(f"{url}/v1/completions", {**LONG, "max_tokens": 40, "stream": True})
        with accepted as streamed:
            process.send_signal(name)
            assert "data: [DONE]" in list(streamed.iter_lines())
        began = time.monotonic()
        assert process.wait(PATIENCE) == 0
        assert time.monotonic() - began < 15  # it would have waited 20 s for the bodies


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(name: signal.Signals) -> None:
    with serving("--dtype", "float32") as (url, process), ThreadPoolExecutor(1) as pool:
        lost = pool.submit(post, f"{url}/v1/completions", json={**LONG, "n": 64, "max_tokens": 400})
        wait(lambda: figure(url, "running") > 0)
        process.send_signal(name)
        assert process.stderr is not None
        assert process.stderr.readline().startswith("stopping: ")
        process.send_signal(name)
        assert process.wait(PATIENCE) == -name
        with pytest.raises(httpx.HTTPError):
            lost.result()


# --- the event loop --------------------------------------------------------------------------------------------------


def large(unit: str, before: str, after: str) -> bytes:
    count = (2**20 - len(before) - len(after)) // (len(unit) + 1)
    return (before + ",".join([unit] * count) + after).encode()


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("completions", large("1.5", '{"prompt":[', "]}")),
        ("completions", large("[]", '{"prompt":[', "]}")),
        ("completions", large("{}", '{"prompt":[[', "]]}")),
        ("completions", large('"":1', '{"prompt":"x","decoding":{', "}}")),
        ("chat/completions", large("{}", '{"messages":[', "]}")),
        ("chat/completions", large('{"role":"user","content":"x"}', '{"messages":[', "]}")),
        ("chat/completions", large("0", '{"messages":[{"role":"user","content":[', "]}]}")),
        ("chat/completions", large('{"type":"text","text":""}', '{"messages":[{"role":"user","content":[', "]}]}")),
        ("edit", large("{}", '{"text":"x","spans":[', "]}")),
        ("fill", ('{"text":"x",' + ",".join(f'"{n}":1' for n in range(90_000)) + "}").encode()),
    ],
    ids=lambda value: value[:40] if isinstance(value, bytes) else None,
)
def test_many_mistakes_cost_little_more_than_one(
    impatient: tuple[str, "subprocess.Popen[str]"], path: str, content: bytes
) -> None:
    url, process = impatient
    before = processor_seconds(process)
    told = post(f"{url}/v1/{path}", content=content, headers={"content-type": "application/json"})
    assert told.status_code == 400
    assert processor_seconds(process) - before < 1


def test_others_are_answered_while_long_texts_are_read(guarded: tuple[str, "subprocess.Popen[str]"]) -> None:
    url, _ = guarded
    headers = {"authorization": f"Bearer {KEY}"}
    body = {"content": "wörd " * 150_000, "with_pieces": False}
    with ThreadPoolExecutor(4) as pool:
        large = [pool.submit(post, f"{url}/tokenize", json=body, headers=headers) for _ in range(4)]
        answered = short = 0
        while not all(request.done() for request in large):
            answered += get(f"{url}/health").status_code == 200
            short += post(f"{url}/tokenize", json={"content": "x"}, headers=headers).status_code == 200
        assert [request.result().status_code for request in large] == [200] * 4
        assert min(answered, short) > 4  # one or two if it waited for each


def test_long_texts_do_not_pile_up() -> None:
    limits = ("--limit", "max_batch=1", "--limit", "max_waiting=1")
    with serving("--dtype", "float32", *limits) as (url, _), ThreadPoolExecutor(16) as pool:
        body = {"content": "wörd " * 150_000}
        told = list(pool.map(lambda _: post(f"{url}/tokenize", json=body), range(16)))
        statuses = [each.status_code for each in told]
        assert set(statuses) == {200, 429}
        assert all("retry-after" in each.headers for each in told if each.status_code == 429)


# --- small things ----------------------------------------------------------------------------------------------------


def test_head_is_among_the_methods(impatient: tuple[str, "subprocess.Popen[str]"]) -> None:
    assert post(f"{impatient[0]}/health", json={}).headers["allow"] == "GET, HEAD"
    assert get(f"{impatient[0]}/tokenize").headers["allow"] == "POST"


def test_nothing_that_a_client_sends_is_in_the_log() -> None:
    with serving("--dtype", "float32") as (url, process):
        for path in ("/%0a%1b[31mforged", "/v1/models/%0aforged", "/page/%2e%2e/%2e%2e/forged%00"):
            assert get(url + path).status_code in (404, 400)
        with connect(url, "GET /\x1b[31mforged HTTP/1.1\r\nHost: x\r\nUpgrade: forged\r\n\r\n") as connection:
            answer(connection)
        with connect(url, "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: forged\r\n\r\n"):
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None
        assert "forged" not in process.stderr.read()
