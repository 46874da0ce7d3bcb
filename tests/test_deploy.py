"""Dockerfile, compose.yaml and deploy/: what can be checked without an engine. `make
docker-test` builds and runs the image."""

import contextlib
import fnmatch
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import yaml
from conftest import ROOT
from test_serve import Stub, running, until

import serve
import train

sys.path.insert(0, str(ROOT / "deploy"))
from docker_test import client, tiny_model  # noqa: E402

WINGS = ("training", "engine", "formats", "server")

DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
ALERTS = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
OURS = ("serve", "gpu", "replica", "train")  # services that run our image


def interpolated(text, **given):
    """As Compose does it: ${NAME:-default}."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: given.get(m[1], m[2]), text)


def compose(**given):
    return yaml.safe_load(interpolated((ROOT / "compose.yaml").read_text(), **given))["services"]


def instruction(name):
    """The last Dockerfile instruction of that name."""
    return re.findall(rf"^{name} (.*)$", DOCKERFILE, re.M)[-1]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def process(*command, log, **more):
    """A process whose words go to a file; ended as one ends a server."""
    with open(log, "w") as words:
        p = subprocess.Popen(
            list(map(str, command)), stdout=words, stderr=subprocess.STDOUT, **more
        )
    try:
        yield p
    finally:
        p.terminate()
        try:
            p.wait(15)
        except subprocess.TimeoutExpired:
            p.kill()
            raise


# ---------------------------------------------------------------------------------------- the image
def matches(path, pattern):
    """Whether a .dockerignore pattern names this path or a folder that it lies in; * stops at a
    slash."""
    parts, wanted = path.split("/"), pattern.split("/")
    pairs = zip(parts, wanted)
    return len(parts) >= len(wanted) and all(fnmatch.fnmatch(part, want) for part, want in pairs)


def sent_to_the_build():
    """Files of the repository that .dockerignore lets through: the last pattern that matches
    decides."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    sent = []
    for path in tracked.stdout.split():
        deciding = [rule for rule in rules if matches(path, rule.removeprefix("!"))]
        if not deciding or deciding[-1].startswith("!"):
            sent.append(path)
    return sent


def test_the_image_gets_every_program_and_nothing_else():
    sent = sent_to_the_build()
    programs = [*ROOT.glob("*.py"), *(p for wing in WINGS for p in (ROOT / wing).glob("*.py"))]
    others = {"engine/forward.cpp", "ui.html", "requirements.txt"}
    assert set(sent) == {str(p.relative_to(ROOT)) for p in programs} | others


def test_stages_that_are_named_exist_and_cpu_is_the_default():
    stages = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.M)
    assert stages[-1] == "cpu" and set(re.findall(r"--from=(\S+)", DOCKERFILE)) <= set(stages)
    assert {
        service["build"]["target"] for service in compose().values() if "build" in service
    } <= set(stages)


def test_the_cpu_image_has_no_tools_and_no_user_root():
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)$(.*?)(?=^FROM|\Z)", DOCKERFILE, re.M | re.S))
    for stage in ("image", "cuda"):  # cpu is image and two copies
        assert re.findall(r"^USER (\S+)$", stages[stage], re.M)[-1] == "1000:1000"
    assert not re.search("apt-get|pip|USER|RUN", stages["cpu"]) and not re.search(
        "apt-get|pip", stages["image"]
    )
    assert "http" not in instruction("CMD") and json.loads(instruction("ENTRYPOINT")) == ["python"]


def test_secrets_of_pip_are_mounted_and_never_copied():
    installs = [
        line for line in DOCKERFILE.splitlines() if line.startswith("RUN") and "pip install" in line
    ]
    assert len(installs) == 2 and all(
        "--mount=type=secret,id=pip.conf" in line for line in installs
    )
    assert not re.search(r"^(COPY|ADD) .*pip\.conf", DOCKERFILE, re.M)


# ------------------------------------------------------------------------------ what compose starts
def test_our_services_are_confined():
    for name, service in compose().items():
        assert (
            service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"]
        ), name
        if name in (*OURS, "nginx"):
            assert (
                service["read_only"]
                and service["tmpfs"] == ["/tmp"]
                and int(service["user"].split(":")[0])
            ), name
        assert name in OURS or re.search(r":v?\d+\.\d+", service["image"]), f"{name}: no version"


def test_ports_are_open_to_this_machine_only_unless_asked():
    ports = [port for service in compose().values() for port in service.get("ports", [])]
    assert (
        len(ports) == 5 and len({p.split(":")[1] for p in ports}) == 5
    )  # no two services want the same
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert compose(BIND="0.0.0.0")["serve"]["ports"] == ["0.0.0.0:8000:8000"]
    assert compose(BIND="0.0.0.0")["prometheus"]["ports"] == ["127.0.0.1:9090:9090"]


def test_only_serve_starts_without_a_profile():
    services = compose()
    assert [name for name, service in services.items() if "profiles" not in service] == ["serve"]
    assert {p for service in services.values() for p in service.get("profiles", [])} == {
        "gpu",
        "scale",
        "monitoring",
        "train",
    }
    assert services["replica"]["deploy"] == {"replicas": 2} and "ports" not in services["replica"]
    assert services["gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == [
        "gpu"
    ]


def test_what_is_mounted_exists_and_models_are_read_only():
    for name, service in compose().items():
        for mount in service.get("volumes", []):
            source = mount["source"]
            if source.startswith("./deploy"):
                assert (ROOT / source).is_file() and mount["read_only"], name
            if mount["target"] == "/model":
                assert mount["read_only"] and mount["bind"] == {"create_host_path": False}
            if source.startswith(("./data", "./runs")):  # Docker would make it root's
                assert mount["bind"] == {"create_host_path": False}, name
    written = [m["target"] for m in compose()["train"]["volumes"] if not m.get("read_only")]
    assert written == ["/app/data", "/app/runs"]


def test_a_training_is_not_asked_for_its_health():
    assert compose()["train"]["healthcheck"] == {"disable": True}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A tiny model under compose's command for `serve`, as a process of this machine -> its
    port, and the process."""
    folder, port = tmp_path_factory.mktemp("model"), str(free_port())
    tiny_model(folder)
    here = {"/model": str(folder), "8000": port, "0.0.0.0": "127.0.0.1"}
    command = [here.get(word, word) for word in compose()["serve"]["command"]]
    log = folder / "log"
    with process(
        *json.loads(instruction("ENTRYPOINT")), *command, log=log, cwd=ROOT, env=environment()
    ) as p:
        until(lambda: "\nready" in log.read_text() or p.poll() is not None, 60)
        assert p.poll() is None, log.read_text()
        yield SimpleNamespace(port=port, url=f"http://127.0.0.1:{port}")
    assert p.returncode in (0, -signal.SIGTERM), (
        log.read_text()
    )  # Compose ends it with SIGTERM, and uvicorn passes that on


def environment():
    """`python` is the one that runs the tests, as in the image it is the one with the libraries."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_the_command_of_serve_serves(served, capsys):
    """Asked what `make docker-test` asks."""
    with contextlib.suppress(FileNotFoundError):  # no /proc here
        client(served.url, 60)
        seen = json.loads(capsys.readouterr().out)
        assert seen["end"] == "[DONE]" and seen["tokens"] == 16 and seen["page"] and seen["metrics"]
    assert httpx.get(served.url + "/v1/models").json()["data"][0]["id"] == "demo"


def test_replica_and_gpu_run_the_command_of_serve():
    services = compose()
    assert services["replica"]["command"][:-2] == services["serve"]["command"]
    assert services["gpu"]["command"] == [*services["serve"]["command"], "--device", "cuda"]
    assert (
        json.loads(instruction("CMD")) == services["serve"]["command"][:-2]
    )  # less the model's name


def health(port):
    command = json.loads(instruction("HEALTHCHECK").partition("CMD ")[2])
    words = [word.replace("8000", port) for word in command]
    behind_a_proxy = {**environment(), "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run(words, env=behind_a_proxy, capture_output=True).returncode


def test_the_health_check_tells_a_server_from_none(served):
    assert health(served.port) == 0
    assert health(str(free_port())) != 0
    with running(Stub()) as broken:
        broken.service.client.broken = "the engine failed"  # alive, but not ready
        assert health(str(broken.port)) != 0


def test_the_command_of_train_trains(tmp_path, monkeypatch):
    script, *flags = compose()["train"]["command"]
    assert script == "train.py" and compose(PRESET="125m")["train"]["command"][1:] == [
        "--preset",
        "125m",
    ]
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    smaller = [
        "--data",
        tmp_path / "text.txt",
        "--steps",
        1,
        "--layers",
        1,
        "--dim",
        32,
        "--out",
        tmp_path / "out",
        "--sample",
        0,
    ]
    monkeypatch.setattr(sys, "argv", [script, *map(str, [*flags, *smaller])])
    train.main()
    assert (tmp_path / "out/model.safetensors").is_file()


def test_sigterm_ends_a_server_within_its_grace_period():
    grace = compose()["serve"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > serve.Args.drain


# --------------------------------------------------------------------------------------- monitoring
def names_in(text):
    return set(re.findall(r"llm:\w+", text))


def test_every_metric_that_is_drawn_or_watched_is_one_the_server_has(served):
    """And every metric that the server has is drawn."""
    text = httpx.get(served.url + "/metrics").text
    samples = set(re.findall(r"^(llm:\w+)(?:\{| )", text, re.M))
    drawn, watched = (
        names_in(" ".join(QUERIES)),
        names_in(" ".join(rule["expr"] for rule in ALERTS)),
    )
    assert drawn | watched <= samples
    families = {
        name
        for name in re.findall(r"^# TYPE (llm:\w+) ", text, re.M)
        if not name.endswith("_created")
    }
    assert len(families) > 10 and all(
        any(name.startswith(family) for name in drawn) for family in families
    )
    for label in ("status", "finished_reason", "le"):
        assert f'{label}="' in text


def test_prometheus_asks_the_services_of_compose_on_their_port():
    config = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
    found = config["scrape_configs"][0]["dns_sd_configs"][0]
    assert set(found["names"]) == set(OURS) - {"train"} and found["port"] == 8000
    assert config["scrape_configs"][0]["job_name"] == "llm"
    assert set(re.findall(r'job="(\w+)"', str(ALERTS) + str(QUERIES))) == {"llm"}
    mounted = {m["target"] for m in compose()["prometheus"]["volumes"]}
    assert {
        "/etc/prometheus/prometheus.yml",
        *(f"/etc/prometheus/{name}" for name in config["rule_files"]),
    } <= mounted


def test_grafana_finds_its_source_and_its_dashboard():
    source = yaml.safe_load((ROOT / "deploy/grafana/source.yml").read_text())["datasources"][0]
    provider = yaml.safe_load((ROOT / "deploy/grafana/dashboards.yml").read_text())["providers"][0]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in compose()
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}
    mounted = {m["target"] for m in compose()["grafana"]["volumes"]}
    home = compose()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home in mounted and home.startswith(provider["options"]["path"])


@pytest.mark.parametrize("file", ["Dockerfile", "compose.yaml", "demo.sh", "Makefile"])
def test_lines_have_a_hundred_columns(file):
    lines = (ROOT / file).read_text().splitlines()
    assert not [n for n, line in enumerate(lines, 1) if len(line) > 100]


def test_panels_have_their_own_number_and_place():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(taken)) == len(taken) and max(x for x, _ in taken) < 24


promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="needs promtool: apt-get install prometheus"
)
CASES = {  # alert: series over the first minutes at 1 m steps, and the minute by which it fires
    "LLMDown": ({'up{job="llm", instance="a"}': "1 0x20"}, 5),
    "LLMNowhere": ({}, 5),
    "LLMStalled": (
        {
            'llm:num_requests_running{instance="a"}': "1x20",
            'llm:generation_tokens_total{instance="a"}': "7x20",
            'llm:prompt_tokens_total{instance="a"}': "9x20",
        },
        8,
    ),
    "LLMErrors": (
        {
            'llm:http_requests_total{instance="a", status="500"}': "0+2x30",
            'llm:http_requests_total{instance="a", status="200"}': "0+60x30",
            'llm:e2e_request_latency_seconds_count{instance="a"}': "0+50x30",
        },
        15,
    ),
    "LLMRefuses": ({'llm:http_requests_total{instance="a", status="429"}': "0+60x30"}, 15),
    "LLMQueueSlow": (
        {
            'llm:request_queue_time_seconds_bucket{instance="a", le="5"}': "0+1x30",
            'llm:request_queue_time_seconds_bucket{instance="a", le="10"}': "0+10x30",
            'llm:request_queue_time_seconds_bucket{instance="a", le="+Inf"}': "0+10x30",
        },
        15,
    ),
    "LLMFirstTokenSlow": (
        {
            'llm:time_to_first_token_seconds_bucket{instance="a", le="10"}': "0+1x30",
            'llm:time_to_first_token_seconds_bucket{instance="a", le="30"}': "0+10x30",
            'llm:time_to_first_token_seconds_bucket{instance="a", le="+Inf"}': "0+10x30",
        },
        15,
    ),
    "LLMPreempts": ({'llm:num_preemptions_total{instance="a"}': "0+60x30"}, 25),
}
QUIET = {
    'up{job="llm", instance="a"}': "1x30",
    'llm:num_requests_running{instance="a"}': "2x30",
    'llm:generation_tokens_total{instance="a"}': "0+100x30",
    'llm:prompt_tokens_total{instance="a"}': "0+100x30",
    'llm:http_requests_total{instance="a", status="200"}': "0+60x30",
    'llm:num_preemptions_total{instance="a"}': "0x30",
    'llm:e2e_request_latency_seconds_count{instance="a"}': "0+50x30",
    'llm:time_to_first_token_seconds_bucket{instance="a", le="10"}': "0+10x30",
    'llm:time_to_first_token_seconds_bucket{instance="a", le="+Inf"}': "0+10x30",
}


@promtool
def test_each_alert_fires_for_its_trouble_and_none_without(tmp_path):
    assert set(CASES) == {rule["alert"] for rule in ALERTS}

    def case(series, minute, fires):
        asked = [
            {
                "expr": "count by (alertname) "
                f'(ALERTS{{alertname="{alert}", alertstate="firing"}})',
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1}]
                if alert == fires
                else [],
            }
            for alert in ([fires] if fires else CASES)
        ]
        given = [{"series": name, "values": values} for name, values in series.items()]
        return {"interval": "1m", "input_series": given, "promql_expr_test": asked}

    tests = [case(*what, alert) for alert, what in CASES.items()] + [case(QUIET, 28, None)]
    rules = [str(ROOT / "deploy/alerts.yml")]
    (tmp_path / "test.yml").write_text(json.dumps({"rule_files": rules, "tests": tests}))
    for check in (
        ["check", "config", ROOT / "deploy/prometheus.yml"],
        ["test", "rules", tmp_path / "test.yml"],
    ):
        done = subprocess.run(["promtool", *map(str, check)], text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("prometheus"), reason="needs Prometheus: apt-get install prometheus"
)
def test_prometheus_answers_every_query_of_the_dashboard(served, tmp_path):
    config = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ROOT / "deploy/alerts.yml")]
    config["scrape_configs"] = [
        {"job_name": "llm", "static_configs": [{"targets": [f"127.0.0.1:{served.port}"]}]}
    ]
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    address = f"127.0.0.1:{free_port()}"
    with process(
        "prometheus",
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address={address}",
        log=tmp_path / "log",
    ):
        with httpx.Client(base_url=f"http://{address}/api/v1", timeout=10) as client:

            def answer(query):
                with contextlib.suppress(httpx.TransportError):
                    query = query.replace("$__rate_interval", "8s").replace("$instance", ".*")
                    said = client.get("/query", params={"query": query})
                    assert said.status_code in (200, 503), said.text  # 503 until it has started
                    return said.status_code == 200 and said.json()["data"]["result"]

            until(lambda: answer('up{job="llm"} == 1'))
            for _ in range(6):  # so that all that is counted moves between two scrapes
                httpx.post(
                    served.url + "/v1/completions",
                    json={"prompt": "the quick", "max_tokens": 8},
                    timeout=60,
                )
                httpx.get(served.url + "/nothing")
                time.sleep(0.4)
            until(lambda: all(answer(query) for query in QUERIES if "5.." not in query), 15)
            assert not [
                rule
                for rule in client.get("/rules").json()["data"]["groups"][0]["rules"]
                if rule["health"] == "err"
            ]


# ------------------------------------------------------------------------------------- the balancer
@contextlib.contextmanager
def balanced(folder, *servers, burst=200):
    """deploy/nginx.conf before these servers in place of Docker's names -> its URL."""
    port, text = free_port(), (ROOT / "deploy/nginx.conf").read_text()
    text = text.replace("burst=200", f"burst={burst}")
    replica = re.search(r"server replica:8000 resolve (.*);", text)
    text = text.replace(
        replica[0], "".join(f"server 127.0.0.1:{server.port} {replica[1]};" for server in servers)
    )
    text = (
        text.replace("listen 8080;", f"listen 127.0.0.1:{port};")
        .replace("/tmp/", f"{folder}/")
        .replace("auto;", "1;")
    )
    (folder / "nginx.conf").write_text(text)
    command = ["nginx", "-c", folder / "nginx.conf", "-p", folder, "-e", "stderr"]
    checked = subprocess.run([*map(str, command), "-t"], text=True, capture_output=True)
    assert "test is successful" in checked.stderr, checked.stderr
    with process(*command, "-g", "daemon off;", log=folder / "log"):
        until(lambda: reachable(port))
        yield f"http://127.0.0.1:{port}"


def reachable(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def folder(tmp_path):
    tmp_path.chmod(0o777)
    for parent in list(tmp_path.parents)[:3]:  # nginx's workers leave root
        with contextlib.suppress(PermissionError):
            parent.chmod(parent.stat().st_mode | 0o011)
    return tmp_path


nginx = pytest.mark.skipif(
    not shutil.which("nginx"), reason="needs nginx: apt-get install nginx-light"
)
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@nginx
def test_tokens_pass_the_balancer_one_by_one(folder):
    with running(Stub("abcdefgh", delay=0.05)) as one, balanced(folder, one) as url:
        with httpx.stream(
            "POST", url + "/v1/chat/completions", json={**CHAT, "stream": True}
        ) as answer:
            times = [time.monotonic() for piece in answer.iter_raw() if b'"content":"' in piece]
        assert len(times) > 4 and times[-1] - times[0] > 0.2
        assert (
            httpx.get(url + "/metrics").status_code == 404
            and httpx.get(url + "/nginx").text == "alive\n"
        )


@nginx
def test_requests_go_to_the_replica_that_works(folder):
    """One replica shuts down, then is gone: nobody notices. Two that are full say 429, and none
    at all is a 503 that is JSON."""
    full = {"concurrency": 1, "queue": 0}
    with running(Stub("abcd", delay=0.01), **full) as two:
        with running(Stub("abcd"), **full) as one, balanced(folder, one, two) as url:

            def ask():
                return httpx.post(url + "/v1/chat/completions", json=CHAT, timeout=20)

            one.service.draining = True
            assert [ask().status_code for _ in range(6)] == [200] * 6 and not one.engine.made
            until(lambda: two.service.client.jobs == {})  # its place is free
            one.service.draining = False
            for server in (one, two):  # both are full
                server.service.client.jobs["held"] = None
            assert ask().status_code == 429 and int(ask().headers["retry-after"])
            assert "requests are running" in ask().text  # a replica's answer, as it is
            for server in (one, two):
                del server.service.client.jobs["held"]
            assert ask().status_code == 200
            stopped = SimpleNamespace(port=one.port)
    with balanced(folder, stopped, SimpleNamespace(port=two.port)) as url:
        answer = httpx.post(url + "/v1/chat/completions", json=CHAT)
        assert (
            answer.status_code == 503
            and answer.json()["error"]["message"]
            and answer.headers["retry-after"] == "5"
        )
    with running(Stub("abcd")) as three, balanced(folder, stopped, three) as url:
        assert [
            httpx.post(url + "/v1/chat/completions", json=CHAT).status_code for _ in range(6)
        ] == [200] * 6


@nginx
def test_a_flood_from_one_address_ends_at_the_balancer(folder):
    with running(Stub()) as one, balanced(folder, one, burst=2) as url, httpx.Client() as client:
        answers = [client.get(url + "/v1/models") for _ in range(40)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert 3 <= len(answers) - len(refused) and refused
        assert refused[0].json()["error"]["type"] == "rate_limit_error"
        assert refused[0].headers["retry-after"] == "1"


@nginx
def test_a_caller_who_leaves_the_balancer_ends_its_request(folder):
    with running(Stub("abcdefgh" * 50, delay=0.02)) as one, balanced(folder, one) as url:
        with httpx.stream(
            "POST", url + "/v1/chat/completions", json={**CHAT, "stream": True}
        ) as answer:
            next(
                piece
                for piece in answer.iter_raw()
                if b'"content":"' in piece and b'"content":""' not in piece
            )
        until(lambda: one.engine.cancelled and not one.engine.live)


@nginx
def test_who_the_client_is_says_the_balancer_and_not_the_client(folder):
    server = running(Stub(), rate_limit=1, trusted_proxy="127.0.0.1")
    with server as one, balanced(folder, one) as url:
        for address, status in (("6.6.6.6", 200), ("7.7.7.7", 429)):
            answer = httpx.get(url + "/v1/models", headers={"X-Forwarded-For": address})
            assert answer.status_code == status
    replica = compose()["replica"]
    assert replica["command"][-2:] == ["--trusted-proxy", "*"]
    assert "ports" not in replica
