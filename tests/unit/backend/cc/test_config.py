import os
import subprocess
import sys

import asyncpg
import pytest
from pydantic import ValidationError

from backend.cc.config import Settings
from devtools import ROOT

URL = "postgresql://u:secret@h/d"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("postgres://u:p@h/d", "postgresql://u:p@h/d"),
        ("postgresql://u:p@h:5433/d?sslmode=require", "postgresql://u:p@h:5433/d?sslmode=require"),
        ("postgresql+asyncpg://u:p@h/d", "postgresql://u:p@h/d"),
        ("postgresql+psycopg://u:p@h/d", "postgresql://u:p@h/d"),
        ("postgresql://u:a%40b%2Fc%25d@h/d", "postgresql://u:a%40b%2Fc%25d@h/d"),
        ("postgresql://u:a/b#c?d%e@h/d", "postgresql://u:a%2Fb%23c%3Fd%25e@h/d"),
        ("postgresql:///d?host=/run/postgresql", "postgresql:///d?host=%2Frun%2Fpostgresql"),
        (" postgresql://u:p@h/d\n", "postgresql://u:p@h/d"),
    ],
)
def test_a_database_url_is_read_in_any_form_a_user_writes_it(written: str, read: str) -> None:
    assert Settings(database_url=written).database_url.get_secret_value() == read


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("mysql://u:secret@h/d", "must begin with postgres://"),
        ("u:secret@h", "is no database URL"),
        ("secret", "is no database URL"),
        ("postgresql://u:p@x:secret@h/d", "is no database URL"),
        ("postgresql://u:secret@one:5432,two:5432/d", r"hosts \?host=one,two&port=5432,5432"),
        (f"{URL}?client_encoding=secret", "client_encoding. .* a server's setting options=-c name=value"),
        (f"{URL}?ssl=secret&sslmode=require&direct_tls=1", r"has unknown parameters: direct_tls, ssl\."),
        (f"{URL}?sslrootcert=system", "name a file of certificates"),
        (f"{URL}?connect_timeout=5&channel_binding=require", "channel_binding, connect_timeout. Leave out channel_b"),
    ],
)
def test_another_url_is_refused_with_what_is_wrong_and_without_repeating_it(wrong: str, said: str) -> None:
    with pytest.raises(ValidationError, match=f"^1 validation error for Settings\ndatabase_url\n.*{said}") as raised:
        Settings(database_url=wrong)
    assert "secret" not in str(raised.value)


async def test_a_setting_of_the_server_is_written_as_an_option(database_url: str) -> None:
    settings = Settings(database_url=f"{database_url}&options=-c%20work_mem%3D7MB")
    connection = await asyncpg.connect(settings.database_url.get_secret_value())
    assert await connection.fetchval("SHOW work_mem") == "7MB"
    await connection.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", ""),
        ("CC_DB_BATCH_SIZE", "0"),
        ("CC_DB_POOL_SIZE", "0"),
        ("CC_DB_TIMEOUT_SECONDS", "0"),
        ("CC_DEBUG_ROUTES", "perhaps"),
        ("CC_MAX_BODY_BYTES", "-1"),
        ("LOGFIRE_TOKEN", "secret\nsecret"),
        ("LOGFIRE_TRACE_SAMPLE_RATE", "10"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-api-key: secret=="),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-api-key=secret\nsecret"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "x-api-key=secrét"),
        ("OTEL_SDK_DISABLED", "true"),  # records would have no trace id
    ],
)
def test_a_wrong_setting_is_an_error_that_names_the_variable_and_not_its_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("LOGFIRE_TOKEN", "secret")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match=f"^1 validation error for Settings\n{name.lower()}\n") as raised:
        Settings()
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("headers", ["api-key=a%20b", " x=a b , y = c=d", "x=", "authorization=Basic%20YTpi=="])
def test_headers_are_names_and_values(headers: str) -> None:
    Settings(otel_exporter_otlp_headers=headers, otel_exporter_otlp_traces_headers=headers)


def test_no_secret_shows_when_settings_are_printed() -> None:
    settings = Settings(database_url=URL, logfire_token="secret", otel_exporter_otlp_headers="key=secret")
    assert "secret" not in f"{settings!r} {settings} {settings.model_dump_json()}"


@pytest.mark.parametrize(("value", "token"), [(" token\n", "token"), ("", None), (" \n", None)])
def test_spaces_around_a_token_are_no_part_of_it(
    monkeypatch: pytest.MonkeyPatch, value: str, token: str | None
) -> None:
    monkeypatch.setenv("LOGFIRE_TOKEN", value)
    assert Settings().tracing()["token"] == token


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
def test_either_otlp_endpoint_turns_tracing_on(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert not Settings().tracing()["otlp"]
    monkeypatch.setenv(name, "http://127.0.0.1:4318")
    assert Settings().tracing()["otlp"]


def test_a_propagator_that_is_not_installed_does_not_stop_the_start() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OTEL_PROPAGATORS": "b3"}
    subprocess.run([sys.executable, "-c", "import backend.cc.cc_main"], env=environment, check=True)
