"""What all tests share: the root on sys.path, real data where it is at hand (LLM_DATA_DIR)."""

import contextlib
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if "LLM_DATA_DIR" not in os.environ and (ROOT.parent / "shared" / "data").is_dir():
    os.environ["LLM_DATA_DIR"] = str(ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def data_dir():
    """The folder of real data (tinyshakespeare.txt, wikitext-2/, ...); tests that need it skip
    without."""
    folder = os.environ.get("LLM_DATA_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no real data at hand: set LLM_DATA_DIR")
    return Path(folder)


def resident(field):
    """This process's memory in bytes: VmRSS is now, VmHWM the most since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) << 10


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def within(seconds=2.0, memory=500 << 20):
    """Context: what is inside may take so much computing, and so many bytes more than before."""
    forget_peak()
    before = resident("VmRSS")
    begin = time.process_time()
    yield
    took = time.process_time() - begin
    grown = resident("VmHWM") - before
    assert took < seconds and grown < memory, f"{took:.1f} s and {grown >> 20} MB"


@pytest.fixture
def full_disk():
    """A context in which no file may grow beyond a size: what a full disk looks like to a
    program."""

    @contextlib.contextmanager
    def limited(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limited
