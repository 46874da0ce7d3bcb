"""tests/fuzz.py: whatever is in a file, a request or a schema, it is used or refused in a line, in
under 2 s and 500 MB."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("cases", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_mutated_file_request_or_schema_crashes(cases):
    command = [sys.executable, "tests/fuzz.py", "--cases", str(cases), "--seed", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{cases:,} cases, 0 failures" in done.stdout
