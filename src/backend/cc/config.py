"""The service's settings, and how a database URL is read."""

import re
from typing import Annotated, Any, Final, Literal

from pydantic import Field, Secret, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

# asyncpg sends any other parameter to the server as a setting. The server then refuses, or changes the encoding.
_URL_PARAMETER: Final = re.compile(
    "application_name|database|dbname|host|krbsrvname|gsslib|options|passfile|password|port|target_session_attrs|user"
    "|ssl(_max_protocol_version|_min_protocol_version|cert|crl|key|mode|negotiation|password|rootcert)"
)
_URL_HINT: Final = "is no database URL. In a password @ : / are written %40 %3A %2F; hosts ?host=one,two&port=5432,5432"
_PARAMETER_HINT: Final = "Leave out channel_binding and connect_timeout; write a server's setting options=-c name=value"


class Settings(BaseSettings):
    """The service's configuration, from environment variables of the same names. README.md explains each."""

    # An error names the variable and doesn't show its value, which may be a password.
    model_config = SettingsConfigDict(env_ignore_empty=True, hide_input_in_errors=True, str_strip_whitespace=True)

    database_url: SecretStr  # postgres://, postgresql:// or postgresql+asyncpg://
    # Logfire's write token; without it nothing is sent there. Logfire prints one that it can't put into a header.
    logfire_token: Secret[Annotated[str, Field(pattern="^[!-~]*$")]] = Secret("")
    logfire_environment: str | None = None  # name of the deployment, shown in traces
    logfire_trace_sample_rate: float = Field(default=1.0, ge=0, le=1)  # the share of traces that are recorded
    logfire_console: bool = False  # whether to print spans to standard output too
    # Any OTLP backend, and the same for traces alone: the full address, path included. The SDK reads these by itself.
    otel_exporter_otlp_endpoint: str | None = None
    otel_exporter_otlp_traces_endpoint: str | None = None
    otel_exporter_otlp_headers: SecretStr | None = None  # its key: name=value, separated by commas
    otel_exporter_otlp_traces_headers: SecretStr | None = None
    otel_sdk_disabled: Literal["false", "False"] = "false"  # if it were true, records would have no trace id
    cc_db_pool_size: int = Field(default=10, ge=1)  # connections at most, in each worker process
    cc_db_batch_size: int = Field(default=16, ge=1)  # records written in one round trip, at most; 1 turns batches off
    cc_db_timeout_seconds: float = Field(default=5.0, gt=0)  # of a record or a commit, waiting included
    cc_debug_routes: bool = True  # whether POST /test-log exists
    cc_distributed_tracing: bool = False  # whether to continue the trace that a caller's `traceparent` names
    cc_max_body_bytes: int = Field(default=1_048_576, ge=0)  # a larger request body is answered 413

    @field_validator("database_url")
    @classmethod
    def _as_dsn(cls, value: SecretStr) -> SecretStr:
        # asyncpg reads the URL as libpq does: sslmode, a socket's directory, several hosts. SQLAlchemy reads it first,
        # because it copes with characters in a password that were not escaped.
        try:
            url = make_url(value.get_secret_value())
        except (ArgumentError, ValueError):
            raise ValueError(_URL_HINT) from None
        if url.get_backend_name() not in ("postgres", "postgresql"):
            raise ValueError("must begin with postgres://, postgresql:// or postgresql+asyncpg://")
        if unknown := sorted(name for name in url.query if not _URL_PARAMETER.fullmatch(name)):
            raise ValueError(f"has unknown parameters: {', '.join(unknown)}. {_PARAMETER_HINT}")
        if url.query.get("sslrootcert") == "system":  # asyncpg takes it for a file, and without sslmode for nothing
            raise ValueError("can't have sslrootcert=system: name a file of certificates")
        return SecretStr(url.set(drivername="postgresql").render_as_string(hide_password=False))

    @field_validator("otel_exporter_otlp_headers", "otel_exporter_otlp_traces_headers")
    @classmethod
    def _as_headers(cls, value: SecretStr | None) -> SecretStr | None:
        for header in value.get_secret_value().split(",") if value else ():
            if not re.fullmatch(r" *[\w.-]+ *=[ -~]*", header, re.ASCII):
                raise ValueError("must be name=value, separated by commas, in printable ASCII")
        return value

    def tracing(self) -> dict[str, Any]:
        """Return what `common.logger_logfire.configure_logfire` is told: where spans go, and what is cc's on them."""
        return {
            "token": self.logfire_token.get_secret_value() or None,
            "environment": self.logfire_environment,
            "otlp": bool(self.otel_exporter_otlp_endpoint or self.otel_exporter_otlp_traces_endpoint),
            "console": self.logfire_console,
            "distributed_tracing": self.cc_distributed_tracing,
            "sample_rate": self.logfire_trace_sample_rate,
            "unscrubbed": ("mem0.event_type", "mem0.record_id"),
        }
