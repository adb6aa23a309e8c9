import asyncpg
import pytest
from pydantic import ValidationError

from backend.cc.config import Settings
from backend.cc.database import Database
from backend.cc.errors import DatabaseUnavailableError
from backend.cc.records import EventRecord
from backend.cc.services.logging import log_l1

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


@pytest.mark.parametrize("wrong", ["mysql://u:secret@h/d", "u:secret@h", "secret", "postgresql://u:p@x:secret@h/d"])
def test_what_is_no_postgresql_url_is_refused_without_repeating_it(wrong: str) -> None:
    with pytest.raises(ValidationError, match="database_url") as raised:
        Settings(database_url=wrong)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "parameter", ["client_encoding", "direct_tls", "prepared_statement_cache_size", "service", "ssl"]
)
def test_a_url_parameter_that_the_service_does_not_know_is_refused_by_name(parameter: str) -> None:
    with pytest.raises(ValidationError, match=f"has unknown parameters: {parameter}. A server's setting is") as raised:
        Settings(database_url=f"{URL}?{parameter}=secret")
    assert "secret" not in str(raised.value)


def test_every_unknown_url_parameter_is_named_at_once() -> None:
    with pytest.raises(ValidationError, match="has unknown parameters: client_encoding, service"):
        Settings(database_url=f"{URL}?service=x&sslmode=require&client_encoding=x")


async def test_a_setting_of_the_server_is_written_as_an_option(database_url: str) -> None:
    settings = Settings(database_url=f"{database_url}&options=-c%20work_mem%3D7MB")
    connection = await asyncpg.connect(settings.database_url.get_secret_value())
    assert await connection.fetchval("SHOW work_mem") == "7MB"
    await connection.close()


@pytest.mark.parametrize("port", ["99999", "0", "one", "-1"])
async def test_a_port_that_does_not_exist_is_an_outage_with_a_hint_at_its_cause(port: str) -> None:
    async with Database(Settings(database_url=f"postgresql://u:secret@/d?host=h&port={port}")) as database:
        with pytest.raises(DatabaseUnavailableError, match="a parameter in it is wrong$"):
            await log_l1(database.idle, EventRecord("e", {}))


def test_several_hosts_in_front_of_the_path_are_refused_with_the_way_to_write_them() -> None:
    with pytest.raises(ValidationError, match=r"hosts \?host=one,two&port=5432,5432"):
        Settings(database_url="postgresql://u:p@one:5432,two:5432/d")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CC_DB_POOL_SIZE", "0"),
        ("CC_DB_TIMEOUT_SECONDS", "0"),
        ("CC_MAX_BODY_BYTES", "-1"),
        ("CC_DEBUG_ROUTES", "perhaps"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOGFIRE_TOKEN", "secret")
    with pytest.raises(ValidationError, match=name.lower()) as raised:
        Settings()
    assert "secret" not in str(raised.value)


def test_no_secret_shows_when_settings_are_printed() -> None:
    settings = Settings(database_url=URL, logfire_token="secret")
    assert "secret" not in f"{settings!r} {settings} {settings.model_dump_json()}"


@pytest.mark.parametrize("token", ["", " ", "\n"])
def test_an_empty_variable_and_one_of_spaces_count_as_absent(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("LOGFIRE_TOKEN", token)
    assert Settings().tracing()["token"] is None


def test_the_share_of_traces_is_a_number_of_0_to_1(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().tracing()["sample_rate"] == 1
    monkeypatch.setenv("LOGFIRE_TRACE_SAMPLE_RATE", "0.1")
    assert Settings().tracing()["sample_rate"] == 0.1
    monkeypatch.setenv("LOGFIRE_TRACE_SAMPLE_RATE", "10")
    with pytest.raises(ValidationError, match="logfire_trace_sample_rate"):
        Settings()


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings(database_url=URL).cc_db_pool_size = 5  # type: ignore[misc]


def test_spaces_around_a_token_are_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGFIRE_TOKEN", " token\n")
    assert Settings().tracing()["token"] == "token"


def test_a_disabled_sdk_is_refused_because_records_would_have_no_trace_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with pytest.raises(ValidationError, match="otel_sdk_disabled\n.*must not be true"):
        Settings()


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
def test_either_otlp_endpoint_turns_tracing_on(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert not Settings().tracing()["otlp"]
    monkeypatch.setenv(name, "http://127.0.0.1:4318")
    assert Settings().tracing()["otlp"]
