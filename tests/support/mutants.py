"""Run mutmut on an embedded PostgreSQL, and judge what it found: what `scripts/mutate` does once it is installed."""

import json
import os
import re
import shutil
import subprocess
import sys

from devtools import ROOT
from devtools.postgres import server, temporary_home


def _try_mutants(names: list[str]) -> dict[str, int]:
    """Return the exit code of each mutant's tests, or of mutmut: 33 is `no tests`, 37 is `wrong types`."""
    shutil.rmtree(ROOT / "mutants", ignore_errors=True)
    with temporary_home() as home, server(home) as url:
        # Where mutants are named, mutmut first runs their tests by id, and fails if pytest does not find one. Otherwise
        # it would take that for a mutant's death. pytest escapes an id made by `ids=repr` anew in each collection.
        command = ("mutmut", "run", "--max-children", "2", *(names or ["*"]))
        # Half of the writer's simulation: it runs for each of the writer's mutants.
        environment = {"CC_TEST_DATABASE_URL": url, "CC_TEST_EXAMPLES": "1000"}
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | environment)
    found = [json.loads(path.read_text())["exit_code_by_key"] for path in (ROOT / "mutants").rglob("*.meta")]
    return {name: code for codes in found for name, code in codes.items() if code is not None}


def _change(mutant: str) -> str:
    """Return the lines that a mutant removes and adds, `- before` and `+ after`."""
    shown = subprocess.run(("mutmut", "show", mutant), check=True, cwd=ROOT, capture_output=True, text=True).stdout
    return "\n".join(map(" ".join, re.findall(r"^([-+])(?!\1\1 ) *(.*)$", shown, re.MULTILINE)))


if __name__ == "__main__":
    tried = _try_mutants(sys.argv[1:])
    missed = [name for name, code in tried.items() if code in (0, 5, 33)]
    for name in missed:
        print(f"\n{name}\n{_change(name)}")
    share = 1 - len(missed) / len(tried)
    print(f"\n{share:.1%} killed: {len(missed)} of {len(tried)} mutants survived.")
    sys.exit(share < 0.9)
