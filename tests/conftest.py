"""Fixtures shared by all tests: the root on sys.path, and real data where it is at hand
(LLM_DATA_DIR)."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if "LLM_DATA_DIR" not in os.environ and (ROOT.parent / "shared" / "data").is_dir():
    os.environ["LLM_DATA_DIR"] = str(ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def data_dir():
    """The folder of real data (tinyshakespeare.txt, wikitext-2/, stories260K/, ...); tests that
    need it skip without it."""
    folder = os.environ.get("LLM_DATA_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no real data at hand: set LLM_DATA_DIR")
    return Path(folder)
