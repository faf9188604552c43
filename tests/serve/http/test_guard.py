"""Who is answered: keys, hosts, origins; and what of a request is written down."""

import asyncio
import hashlib
import logging
import shlex
import stat

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from veneer.cli.main import main
from veneer.errors import ConfigError, SourceError
from veneer.serve.http.app import catch_errors
from veneer.serve.http.guard import Guard, check_origins, for_browsers
from veneer.serve.http.keys import ApiKey, ApiKeys, hashed, new_key, read_keys

USE, ADMIN = "use-" + "k" * 20, "admin-" + "k" * 20
KEYS = ApiKeys([ApiKey("use", hashed(USE), "one"), ApiKey("admin", hashed(ADMIN), "two")])


async def whoami(scope, receive, send):
    caller = scope["state"].get("caller")
    await PlainTextResponse(f"{caller.name}:{caller.scope}" if caller else "open")(
        scope, receive, send
    )


def ask(guard, path="/v1/models", url="http://127.0.0.1:8000", method="GET", **headers):
    async def once():
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url=url) as client:
            return await client.request(
                method,
                path,
                headers={name.replace("_", "-"): value for name, value in headers.items()},
            )

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("url", "answered"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://localhost:8000", True),
        ("http://[::1]:8000", True),
        ("http://192.168.0.7", True),
        ("http://box.example", True),
        ("http://BOX.example.:80", True),
        ("http://evil.example", False),
        ("http://127.0.0.1.evil.example", False),
        ("http://localhost.evil.example", False),
    ],
)
def test_a_name_that_is_not_ours_is_not_answered(url, answered):
    found = ask(Guard(whoami, keys=ApiKeys([]), hosts=["box.example"]), url=url)
    assert found.status_code == (200 if answered else 403)
    if not answered:
        assert found.json()["error"]["code"] == "unknown_host"


@pytest.mark.parametrize("host", ["", "[", "a b", "evil.example#localhost", "user@evil.example"])
def test_a_host_that_is_none_is_not_answered(host):
    assert ask(Guard(whoami, keys=ApiKeys([])), host=host).status_code == 403


@pytest.mark.parametrize(
    ("origin", "answered"),
    [
        ("http://127.0.0.1:8000", True),
        ("https://127.0.0.1:8000", True),
        ("https://page.example", True),
        ("http://127.0.0.1:9000", False),
        ("http://evil.example", False),
        ("null", False),
        ("", False),
    ],
)
def test_a_page_of_another_site_is_not_answered(origin, answered):
    found = ask(Guard(whoami, keys=ApiKeys([]), origins=["https://page.example"]), origin=origin)
    assert found.status_code == (200 if answered else 403)


PAGE = "https://page.example"


def preflight(guard, origin, **headers):
    asked = {"origin": origin, "access-control-request-method": "POST", **headers}
    return ask(guard, "/v1/chat/completions", method="OPTIONS", **asked)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/nothing"])
def test_a_page_of_an_origin_that_is_allowed_reads_answers_and_errors(path):
    app = for_browsers(Guard(whoami, keys=KEYS, origins=[PAGE]), [PAGE])
    for headers, status in (({"x-api-key": USE}, 200), ({}, 401)):
        found = ask(app, path, origin=PAGE, **headers)
        assert found.status_code == status
        assert (
            found.headers["access-control-allow-origin"] == PAGE
            and found.headers["vary"] == "Origin"
        )
        assert "x-request-id" in found.headers["access-control-expose-headers"]


def test_a_browser_asks_without_a_key_whether_a_page_may_send_a_request():
    app = for_browsers(
        Guard(whoami, keys=KEYS, origins=["https://PAGE.example"]), ["https://PAGE.example"]
    )
    wanted = "authorization, content-type, x-stainless-lang, anthropic-version"
    private = {"access-control-request-private-network": "true"}
    found = preflight(app, PAGE, **{"access-control-request-headers": wanted, **private})
    assert found.status_code == 200
    assert found.headers["access-control-allow-origin"] == PAGE
    assert found.headers["access-control-allow-headers"] == wanted
    assert "POST" in found.headers["access-control-allow-methods"]
    assert found.headers["access-control-allow-private-network"] == "true"


def test_pages_of_other_origins_are_not_answered_and_cannot_read_why():
    allowing = for_browsers(Guard(whoami, keys=KEYS, origins=[PAGE]), [PAGE])
    for app in (allowing, for_browsers(Guard(whoami, keys=KEYS), [])):
        for found in (
            preflight(app, "http://evil.example"),
            ask(app, origin="http://evil.example"),
        ):
            assert found.status_code in (400, 403)
            assert "access-control-allow-origin" not in found.headers


def test_a_site_that_no_browser_would_name_is_refused_at_the_start():
    check_origins([PAGE, "http://localhost:3000", "http://[::1]:80", "HTTP://Page.example"])
    wrong = [
        "*",
        "page.example",
        f"{PAGE}/",
        f"{PAGE}/app",
        "https://",
        "https://a@b",
        "https://a:x",
        "null",
    ]
    wrong += [
        "https://*",
        "https://*.page.example",
        "https://a b.example",
        "https://a\\b",
        "https://bücher.example",
    ]
    with pytest.raises(ConfigError, match="must name a site") as caught:
        check_origins(wrong)
    assert len(caught.value.faults) == len(wrong)
    assert caught.value.faults[-1].endswith("browsers send xn--bcher-kva.example")


@pytest.mark.parametrize(
    ("allowed", "sent"),
    [
        ("https://Page.example:443", "https://page.example"),
        ("http://page.example:80", "http://page.example"),
        ("http://page.example:443", "http://page.example:443"),
        ("http://[::1]:80", "http://[::1]"),
        ("http://[::1]:8080", "http://[::1]:8080"),
    ],
)
def test_an_origin_is_compared_as_browsers_send_it(allowed, sent):
    check_origins([allowed])
    found = ask(
        for_browsers(Guard(whoami, keys=ApiKeys([]), origins=[allowed]), [allowed]), origin=sent
    )
    assert found.status_code == 200 and found.headers["access-control-allow-origin"] == sent


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"authorization": f"Bearer {USE}"}, "one:use"),
        ({"authorization": f"bearer  {ADMIN}"}, "two:admin"),
        ({"x_api_key": USE}, "one:use"),
        ({}, None),
        ({"authorization": "Bearer "}, None),
        ({"authorization": USE}, None),
        ({"authorization": f"Basic {USE}"}, None),
        ({"authorization": f"Bearer {USE[:-1]}"}, None),
        ({"authorization": f"Bearer {hashed(USE)}"}, None),
    ],
)
def test_a_key_says_who_asks(headers, said):
    found = ask(Guard(whoami, keys=KEYS), **headers)
    if said is None:
        assert found.status_code == 401
        assert found.json()["error"]["type"] == "authentication_error"
        assert found.headers["x-should-retry"] == "false"
    else:
        assert found.text == said


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "An API key is required"),
        ({"authorization": "Bearer wrong"}, "This API key is not one of"),
        ({"x_api_key": "w"}, "not one of"),
    ],
)
def test_a_missing_key_and_a_wrong_one_are_told_apart(headers, said):
    found = ask(Guard(whoami, keys=KEYS), **headers)
    assert found.status_code == 401 and said in found.json()["error"]["message"]


def test_without_keys_everyone_may_do_everything_and_health_needs_none():
    assert ask(Guard(whoami, keys=ApiKeys([]))).text == ":admin"
    for path in ("/healthz", "/readyz"):
        assert ask(Guard(whoami, keys=KEYS), path).text == "open"


def test_anthropics_clients_get_errors_as_they_read_them():
    found = ask(Guard(whoami, keys=KEYS), "/v1/messages").json()
    assert found["type"] == "error" and found["error"]["type"] == "authentication_error"


def test_a_request_has_an_id_which_may_be_given():
    guard = Guard(whoami, keys=ApiKeys([]))
    assert ask(guard, x_request_id="abc-1").headers["x-request-id"] == "abc-1"
    assert len(ask(guard, x_request_id="a b" * 99).headers["x-request-id"]) == 16
    assert ask(Guard(whoami, keys=KEYS)).headers["x-request-id"]


def test_the_log_has_a_line_for_each_request_without_keys_and_queries(caplog):
    counted = []
    guard = Guard(whoami, keys=KEYS, counted=lambda *told: counted.append(told))
    with caplog.at_level(logging.INFO, "veneer.serve"):
        ask(
            guard, "/v1/models/%1B[31m?secret=1", authorization=f"Bearer {USE}", x_request_id="id-1"
        )
    (line,) = caplog.messages
    assert line.startswith("GET /v1/models/") and line.endswith("id-1")
    assert USE not in line and "secret" not in line and "\x1b" not in line
    assert counted == [("/v1/models/\x1b[31m", 200)]


def test_a_bug_is_answered_with_500_and_logged_with_its_traceback(caplog):
    async def divide(request):
        return 1 / 0

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/v1/models",
        "headers": [],
        "query_string": b"",
    }
    request = Request(scope)
    answer = asyncio.run(catch_errors(divide)(request))
    assert answer.status_code == 500 and b"ZeroDivisionError" not in answer.body
    (record,) = caplog.records
    assert record.exc_info[0] is ZeroDivisionError


def test_keys_come_from_a_file_of_hashes_and_from_the_environment(tmp_path):
    file = tmp_path / "keys"
    key = new_key(file, "admin")
    assert (
        key not in file.read_text() and hashlib.sha256(key.encode()).hexdigest() in file.read_text()
    )
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    second = new_key(file, "use")
    file.write_text(file.read_text() + "\n# a comment\n")
    keys = read_keys(file, {"VENEER_API_KEY": USE, "VENEER_ADMIN_KEY": ADMIN})
    assert [keys.caller(each).scope for each in (key, second, USE, ADMIN)] == [
        "admin",
        "use",
        "use",
        "admin",
    ]
    assert keys.caller("other") is None and keys.caller("") is None and keys.caller(None) is None
    assert not read_keys(None, {})


def test_a_file_that_holds_no_keys_is_refused_with_every_line(tmp_path):
    file = tmp_path / "keys"
    with pytest.raises(SourceError, match="--new-key"):
        read_keys(file, {})
    file.write_text("")
    with pytest.raises(ConfigError, match="it has no keys"):
        read_keys(file, {})
    file.write_text(f"use {hashed('a')}\nroot {hashed('b')} x\nmy-plain-key\n")
    with pytest.raises(ConfigError) as caught:
        read_keys(file, {})
    assert len(caught.value.faults) == 2 and "my-plain-key" not in str(caught.value)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not text"):
        read_keys(file, {})
    with pytest.raises(ConfigError, match="a key needs at least 16"):
        read_keys(None, {"VENEER_API_KEY": "short"})


def test_two_keys_of_one_name_are_refused_and_one_key_under_two_names(tmp_path):
    file = tmp_path / "keys"
    line = "use {} {}\n"
    for text, environment, said in [
        (line.format(hashed("a"), "one") + line.format(hashed("b"), "one"), {}, "called one"),
        (f"use {hashed('a')} key-2\nuse {hashed('b')}\n", {}, "called key-2"),
        (line.format(hashed("a"), "veneer_api_key"), {"VENEER_API_KEY": USE}, "veneer_api_key"),
        (line.format(hashed("a"), "one") + line.format(hashed("a"), "two"), {}, "one and two"),
        (line.format(hashed(USE), "one"), {"VENEER_ADMIN_KEY": USE}, "one and veneer_admin_key"),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_keys(file, environment)
        (fault,) = caught.value.faults
        assert said in fault and hashed("a") not in str(caught.value)


def test_the_step_after_a_wrong_file_of_keys_works(tmp_path):
    file = tmp_path / "my keys"
    for content in (None, ""):
        if content is not None:
            file.write_text(content)
        with pytest.raises((SourceError, ConfigError)) as caught:
            read_keys(file, {})
        command = shlex.split(caught.value.next_step.removeprefix("Make one: "))
        assert main(command[1:]) == 0 and read_keys(file, {})
        file.unlink()
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "text").write_text("my-plain-key\n")
    for name in ("folder", "binary", "text"):
        with pytest.raises((SourceError, ConfigError)) as caught:
            read_keys(tmp_path / name, {})
        assert caught.value.next_step.endswith("--keys FILE")
