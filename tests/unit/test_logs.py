from __future__ import annotations

import json
import logging

import pytest

from belay_server.configuration.settings import Settings, SettingsError
from belay_server.runtime import logs

NEEDED = {"DATABASE_URL": "postgresql://nowhere/", "REDIS_URL": "redis://nowhere/"}


def settings(**environ: str) -> Settings:
    return Settings.from_environ({**NEEDED, **environ})


@pytest.fixture
def logged(capsys):
    """Yield a function that returns the log output; restore the process's logging afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    yield lambda: capsys.readouterr().err
    root.handlers = handlers
    root.setLevel(level)
    for name in ("belay_server", "belay_workers", "belay"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    logs.in_request({})
    logs.about_run(None)


def test_a_json_line_has_the_fields_of_its_request_and_run(logged):
    logs.configure(settings(BELAY_LOG_FORMAT="json"))
    logs.in_request({"request_id": "r-1", "method": "GET"})
    logs.about_run({"run_id": "run-1", "attempt": 2})
    logging.getLogger("anybody").warning("said %s", "this", extra={"attempt": 3})
    line = json.loads(logged())
    assert (line["level"], line["logger"], line["message"]) == ("WARNING", "anybody", "said this")
    assert (line["request_id"], line["method"], line["run_id"]) == ("r-1", "GET", "run-1")
    assert line["attempt"] == 3
    assert line["timestamp"].endswith("+00:00")


def test_a_text_line_has_the_ids_of_its_run(logged):
    logs.configure(settings())
    log = logging.getLogger("belay_server.test")
    log.info("before")
    logs.about_run({"run_id": "run-1", "thread_id": "t", "attempt": 1})
    log.info("during")
    logs.about_run(None)
    log.info("after")
    before, during, after = logged().splitlines()
    assert before.endswith("INFO belay_server.test: before")
    assert during.endswith("INFO belay_server.test: during [run_id=run-1 attempt=1]")
    assert after.endswith("INFO belay_server.test: after")


def test_only_belays_loggers_log_below_info(logged):
    logs.configure(settings(BELAY_LOG_LEVEL="debug"))
    logging.getLogger("belay_server.test").debug("ours")
    logging.getLogger("httpcore").debug("headers")
    written = logged()
    assert "ours" in written
    assert "headers" not in written


def test_the_log_level_setting_takes_precedence_over_the_command_line(logged):
    logs.configure(settings(BELAY_LOG_LEVEL="error"), logging.INFO)
    logging.getLogger("belay_server.test").warning("a warning")
    logging.getLogger("anybody").warning("a warning")
    assert logged() == ""


@pytest.mark.parametrize("name", ["BELAY_LOG_FORMAT", "BELAY_LOG_LEVEL"])
def test_an_unknown_log_setting_is_refused(name):
    with pytest.raises(SettingsError, match=name):
        settings(**{name: "loud"})


@pytest.mark.parametrize(
    "words", ["a\nINFO app: forged", "a\r\nb", "\x1b[31mred", "\x00", "\x85next", "\u2028line"]
)
def test_a_message_cannot_forge_a_log_line(logged, words):
    logs.configure(settings())
    logs.in_request({"request_id": "r-1"})
    logging.getLogger("belay_server.test").warning("asked for %s", words)
    written = logged()
    assert len(written.splitlines()) == 1
    assert "\x1b" not in written
    assert written.endswith("[request_id=r-1]\n")


def log_exception(message, words):
    error = ValueError(words)
    try:
        raise error
    except ValueError:
        logging.getLogger("belay_server.test").warning("%s", message, exc_info=True)


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("words", ["a\n2026-11-30 CRITICAL forged", "a\rb", "\x1b[31mred", "\x85c"])
def test_an_exception_cannot_forge_a_log_line(logged, words, log_format):
    logs.configure(settings(BELAY_LOG_FORMAT=log_format))
    log_exception("a graph failed", words)
    first, *rest = logged().removesuffix("\n").split("\n")
    assert "a graph failed" in first
    assert all(line.startswith("    ") for line in rest)
    assert not {"\x1b", "\r"} & set("".join([first, *rest]))
    if log_format == "json":
        assert words in json.loads(first)["exc_info"]
    else:
        assert "\x85" not in "".join(rest)


def test_the_urls_that_graphs_request_are_not_logged(logged):
    logs.configure(settings())
    logging.getLogger("httpx").info("HTTP Request: GET http://127.0.0.1/store/items?key=secret")
    assert logged() == ""


def test_arguments_that_do_not_fit_a_message_raise_nothing(logged):
    logs.configure(settings())
    logging.getLogger("belay_server.test").warning(*("one %s, two %s", "one"))
    assert "not enough arguments" in logged()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_message_and_an_exception_have_a_bound(logged, log_format):
    logs.configure(settings(BELAY_LOG_FORMAT=log_format))
    words = "x" * 1_000_000 + "the end"
    log_exception(f"failed: {words}", words)
    written = logged()
    assert len(written) < 50_000
    assert "Traceback" in written
    assert written.count("the end") == 2
    assert "characters left out" in written


@pytest.mark.parametrize(
    ("words", "arguments", "shown"),
    [
        (
            "Invalid request from ip=1.2.3.4: Invalid HTTP request line: 'GET /x?token=secret'",
            (),
            "Invalid request from ip=1.2.3.4: Invalid HTTP request line",
        ),
        ("Error handling request %s", ("/x?token=secret",), "Error handling request /x"),
        ("Error handling request %s %s", ("GET", "/x"), "Error handling request GET /x"),
        ("Worker (pid:%s) exited with code %s: what's wrong?", (1, 3), None),
    ],
)
def test_records_of_the_web_server_do_not_quote_the_request(words, arguments, shown):
    record = logging.LogRecord("gunicorn.error", logging.WARNING, "", 1, words, arguments, None)
    expected = record.getMessage() if shown is None else shown
    assert logs.without_request_lines(record)
    assert record.getMessage() == expected
