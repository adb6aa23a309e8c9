import socket

import pytest

from devtools.ports import HOST, port_of, require_free


@pytest.mark.parametrize(("value", "port"), [(None, 8000), ("", 8000), ("1", 1), ("65535", 65_535)])
def test_a_port_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, value: str | None, port: int) -> None:
    monkeypatch.delenv("PORT", raising=False)
    if value is not None:
        monkeypatch.setenv("PORT", value)
    assert port_of("PORT", 8000) == port


@pytest.mark.parametrize("value", ["0", "65536", "-1", "8000 ", "http", "\u00b2"])
def test_what_is_no_port_is_an_error_that_names_the_variable(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PORT", value)
    with pytest.raises(OSError, match="^PORT must be a port, 1 to 65535$"):
        port_of("PORT", 8000)


def test_a_port_that_is_taken_is_an_error_that_says_how_to_take_another() -> None:
    with socket.create_server((HOST, 0)) as taken, pytest.raises(OSError, match="Another port: PORT=8001"):
        require_free(taken.getsockname()[1], "PORT=8001")
