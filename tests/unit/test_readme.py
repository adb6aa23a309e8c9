"""The README says nothing that is not so."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import asyncpg
import httpx
from fastapi import APIRouter, FastAPI

from backend.cc.config import Settings
from devtools import ROOT, serve
from devtools.otlp import otlp_receiver
from devtools.service import running_service

README = (ROOT / "README.md").read_text()
DOCUMENTS = {
    path: path.read_text() for path in (ROOT / "README.md", *ROOT.glob(".github/*.md"), *ROOT.glob("docs/**/*.md"))
}


def blocks(language: str, word: str = "") -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [block for block in found if word in block]


(ROUTER,) = blocks("python", "APIRouter")


async def test_the_endpoint_of_the_readme_writes_what_it_says(
    app: FastAPI, client: httpx.AsyncClient, db: asyncpg.Connection
) -> None:
    names: dict[str, object] = {}
    exec(ROUTER, names)  # noqa: S102 - the README's own code
    router = names["router"]
    assert isinstance(router, APIRouter)
    app.include_router(router)
    response = await client.post("/ask", params={"question": "What is the capital of France?"})
    assert response.status_code == 200
    rows = await db.fetch("SELECT content, tokens_in FROM mem0_cc.prompt_trace")
    assert [tuple(row) for row in rows] == [("What is the capital of France?", 9)]
    assert await db.fetchval("SELECT count(*) FROM mem0_cc.event_log WHERE event_type = 'model.called'") == 1
    assert await db.fetchval("SELECT count(DISTINCT (request_id, trace_id)) FROM mem0_cc.base_log") == 1


def test_the_endpoint_of_the_readme_passes_the_checks_and_the_tests_of_the_service(
    postgres_url: str, tmp_path: Path
) -> None:
    for name in ("docs", "migrations", "scripts", "src", "tests", "README.md", "alembic.ini", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "src").unlink()
    shutil.copytree(ROOT / "src", tmp_path / "src")
    (tmp_path / "src/backend/cc/routers/ask.py").write_text(ROUTER)
    wiring = tmp_path / "src/backend/cc/cc_main.py"
    changed = wiring.read_text().replace("routers import debug_router", "routers import ask, debug_router")
    wiring.write_text(changed.replace("    return app\n", "    app.include_router(ask.router)\n    return app\n"))
    environment = os.environ | {"CC_TEST_DATABASE_URL": postgres_url}
    tests = "pytest tests/unit/test_house.py tests/unit/backend/cc/test_cc_main.py::test_its_documentation_is_one_page"
    for command in ("ruff check src", "ruff format --check src", tests):
        subprocess.run([sys.executable, "-m", *command.split()], cwd=tmp_path, env=environment, check=True)


async def test_the_script_of_the_readme_writes_what_it_says(database_url: str, db: asyncpg.Connection) -> None:
    environment = {"PYTHONPATH": str(ROOT / "src"), "DATABASE_URL": database_url}
    with otlp_receiver() as receiver:
        printed = subprocess.run(  # noqa: ASYNC221 - nothing else runs meanwhile
            [sys.executable, "-W", "error", "-c", *blocks("python", "asyncio.run")],
            env={**os.environ, **environment, "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    assert (
        await db.fetchval("SELECT event_type FROM mem0_cc.event_log WHERE base_log_id = $1", printed) == "job.finished"
    )
    (span,) = [span for span in receiver.spans if span.name == "log_l1 event_log"]
    assert span.resource["service.name"] == "nightly-job"
    assert await db.fetchval("SELECT trace_id FROM mem0_cc.base_log WHERE id = $1", printed) == span.trace_id


def test_the_uvicorn_line_of_the_readme_serves(database_url: str, tmp_path: Path) -> None:
    (line,) = re.findall(r"^uvicorn backend.cc.cc_main:app (.*?) +#", README, re.DOTALL | re.MULTILINE)
    options = shlex.split(line.replace("\\\n", "").replace("0.0.0.0", "127.0.0.1"))  # noqa: S104 - not listened on
    options[options.index("--workers") + 1] = "2"  # of which each takes a second to start
    with running_service(database_url, tmp_path / "log", *options) as service:
        assert httpx.post(f"{service.url}/test-log", json={}).status_code == 200
        assert service.stop() == 0


async def test_the_curl_line_of_the_readme_is_what_serve_prints_and_answers_200(client: httpx.AsyncClient) -> None:
    (line,) = blocks("sh", "curl ")
    assert line.strip() == serve.curl_line(8000)
    body = re.search(r"-d '(.*)'", line)
    assert body
    response = await client.post("/test-log", content=body[1], headers={"content-type": "application/json"})
    (answer,) = blocks("json")
    assert response.json().keys() == set(re.findall(r'"(\w+)":', answer))


def test_the_configuration_table_is_the_settings() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (?:`(.*?)`|none.*?) \| `(.+?)` \| .+ \|$", README, re.MULTILINE)
    described = {name.lower(): default for name, default, _ in rows}
    assert described.keys() == Settings.model_fields.keys()
    Settings(**{name.lower(): example for name, _, example in rows})
    for name, default in described.items():
        value = Settings.model_fields[name].default
        expected = "" if Settings.model_fields[name].is_required() or value is None else str(value)
        assert default == (expected.lower() if isinstance(value, bool) else expected), name


async def test_the_documented_pruning_takes_the_children_along(db: asyncpg.Connection) -> None:
    pruning = re.search(r"^DELETE FROM .*?;$", "".join(DOCUMENTS.values()), re.DOTALL | re.MULTILINE)
    assert pruning
    await db.execute(
        "INSERT INTO mem0_cc.base_log VALUES (gen_random_uuid(), now() - interval '91 days', 'cc', 'old', 't');"
        "INSERT INTO mem0_cc.base_log VALUES (gen_random_uuid(), now(), 'cc', 'new', 't');"
        "INSERT INTO mem0_cc.event_log SELECT id, 'e', '{}' FROM mem0_cc.base_log"
    )
    assert await db.execute(pruning[0]) == "DELETE 1"
    assert await db.fetchval("SELECT count(*) FROM mem0_cc.event_log") == 1


def test_every_file_that_the_documentation_names_exists() -> None:
    for document, text in DOCUMENTS.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (document.parent / target).exists(), f"{document}: {target}"
    for script in re.findall(r"\./scripts/(\w+(?:\.py)?)", "".join(DOCUMENTS.values())):
        path = ROOT / "scripts" / script
        assert os.access(path, os.X_OK), script
