"""Builds the CPU image, starts it as it should be run - no network, a root that is read-only, no
privileges - and asks it.

    make docker-test                       # a tiny model with random weights, made inside the image
    make docker-test MODEL=runs/demo-dpo   # one of yours

Where a Docker engine answers it is `docker build` and `docker run`. Elsewhere, as root on Debian
or Ubuntu, buildah builds the same Dockerfile on a base that debootstrap makes (apt-get install
buildah debootstrap), and Linux namespaces run what it built.
"""

import argparse
import contextlib
import inspect
import json
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
IMAGE = "llm:cpu"
LIMIT = 1_200_000_000  # bytes that the image may take on the disk
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")


# --------------------------------- what runs inside the image: its source is sent to a python there
def tiny_model(folder):
    """A model folder with random weights and a tokenizer of 270 tokens."""
    from chat import CHATML_TEMPLATE
    from model import Config, Transformer
    from tokenizer import Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tok = Tokenizer.train(
        ["the quick brown fox jumps over the lazy dog"], 270, special_tokens=special
    )
    tok.chat_template = CHATML_TEMPLATE
    tok.save(folder)
    shape = Config(
        "qwen3",
        tok.vocab_size,
        32,
        64,
        2,
        2,
        1,
        16,
        256,
        bos_token_id=tok.bos_id,
        eos_token_id=tok.eos_id,
    )
    Transformer(shape).save_pretrained(folder)


def client(url, patience):
    """Beside the server, in its network: waits until it is ready, then asks what a user asks.

    Prints one line of JSON. Its source is sent to another Python, so it imports what it needs."""
    import json
    import os
    import time
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    def ask(path, body=None):
        data = body and json.dumps(body).encode()
        request = Request(url + path, data, {"content-type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    begin, ready = time.monotonic(), None
    while ready is None:
        try:
            ready = ask("/ready")
        except URLError as error:
            if time.monotonic() - begin > patience:
                raise SystemExit(f"not ready after {patience} s: {error}") from None
            time.sleep(0.1)
    seen = {"ready": ready, "seconds": round(time.monotonic() - begin, 1), "health": ask("/health")}

    usage = {"include_usage": True}
    body = {"max_tokens": 16, "temperature": 0, "stream": True, "stream_options": usage}
    question = {"role": "user", "content": "Reverse this list: fox plum iron"}
    try:
        text = ask("/v1/chat/completions", body | {"messages": [question]})
    except HTTPError:  # a model without a chat template
        text = ask("/v1/completions", body | {"prompt": "The quick brown fox"})
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    chunks = [json.loads(event) for event in events[:-1]]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    said = [c.get("text") or c.get("delta", {}).get("content") or "" for c in choices]
    seen["said"] = "".join(said)
    seen["end"] = events[-1]
    seen["tokens"] = chunks[-1]["usage"]["completion_tokens"]

    seen["page"] = "<html" in ask("/")
    seen["metrics"] = "llm:generation_tokens_total" in ask("/metrics")
    status = dict(line.split(":", 1) for line in open("/proc/1/status"))
    seen["users"] = [int(number) for number in status["Uid"].split()]
    seen["privileges"] = status["CapEff"].strip()
    seen["networks"] = sorted(os.listdir("/sys/class/net"))
    print(json.dumps(seen))


def contents():
    """Prints as JSON what has no business in the image, and what lies in the program's folder."""
    import json
    import os
    import shutil

    found = [tool for tool in ("g++", "gcc", "cc", "make", "cmake", "git") if shutil.which(tool)]
    for at, folders, files in os.walk("/"):
        folders[:] = [
            name
            for name in folders
            if os.path.join(at, name) not in ("/proc", "/sys", "/dev", "/model")
        ]
        ours = at.startswith(("/venv", "/app")) and "/licenses" not in at
        found += [
            os.path.join(at, name)
            for name in folders + files
            if name == ".git"
            or ours
            and name in ("tests", "docs")
            or at.endswith(".cache")
            and name == "pip"
        ]
    print(json.dumps({"found": found, "app": sorted(os.listdir("/app"))}))


def program(function, *arguments):
    """The command that calls a function in another python."""
    return "python", "-c", f"{inspect.getsource(function)}\n{function.__name__}(*{arguments!r})"


# ---------------------------------------------------------------------------- commands and settings
def run(*command, show=False, **more):
    """-> what the command printed. A failure ends the program with the command and its last
    words."""
    out = {} if show else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, text=True, **out, **more)
    if done.returncode:
        said = (done.stdout or "")[-3000:]
        raise SystemExit(f"{' '.join(command)[:300]}: exit status {done.returncode}\n{said}")
    return (done.stdout or "").strip()


def pip_settings(folder):
    """Where this machine's pip looks, for the pip in the build -> (arguments of build, folders
    of this machine they speak of)."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], text=True, capture_output=True
    )  # nothing without pip
    said = (line.partition("=") for line in listing.stdout.splitlines())
    found = {
        key.rpartition(".")[2].replace("_", "-"): value.strip("'\"").replace("\\n", " ")
        for key, _, value in said
    }
    places = {
        key: found[key].split()
        for key in ("index-url", "extra-index-url", "find-links", "trusted-host")
        if key in found
    }
    lines, arguments = (
        ["[global]", *(f"{key} = {' '.join(urls)}" for key, urls in places.items())],
        [],
    )
    if authority := found.get("cert"):
        shutil.copyfile(authority, folder / "ca.pem")
        lines.append("cert = /run/secrets/ca.pem")
        arguments.append(f"--secret=id=ca.pem,src={folder}/ca.pem")
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    arguments.append(f"--secret=id=pip.conf,src={folder}/pip.conf")
    if "TORCH_INDEX" in os.environ or places:  # a pip that was told where to look is left to it
        arguments.append(f"--build-arg=TORCH_INDEX={os.environ.get('TORCH_INDEX', '')}")
    paths = [
        Path(unquote(urlsplit(url).path))
        for urls in places.values()
        for url in urls
        if url.startswith(("/", "file:"))
    ]
    # the pages of an index point beside its folder "simple"
    return arguments, sorted(
        {str(p.parent if p.name == "simple" else p) for p in paths if p.is_dir()} - {"/"}
    )


# ------------------------------------------------------------------------ an engine, or without one
class Docker:
    """With a Docker engine."""

    name, container = "docker", ""

    def build(self, folder):
        base = [f"--build-arg=BASE={os.environ['BASE']}"] if "BASE" in os.environ else []
        run(
            "docker",
            "build",
            "--target=cpu",
            f"--tag={IMAGE}",
            *base,
            *pip_settings(folder)[0],
            str(ROOT),
            show=True,
            env={**os.environ, "DOCKER_BUILDKIT": "1"},
        )
        self.config = json.loads(
            run("docker", "image", "inspect", "--format={{json .Config}}", IMAGE)
        )

    def start(self, model, *arguments, writable=False):
        """The image with these arguments (or its own) -> the process."""
        self.container = f"llm-test-{secrets.token_hex(4)}"
        return subprocess.Popen(
            [
                "docker",
                "run",
                "--rm",
                f"--name={self.container}",
                "--network=none",
                "--read-only",
                "--tmpfs=/tmp",
                "--cap-drop=ALL",
                "--security-opt=no-new-privileges",
                f"--volume={model}:/model{'' if writable else ':ro'}",
                IMAGE,
                *arguments,
            ]
        )

    def inside(self, *command, root=False):
        """The command that runs a command in the running container, as its user or as root."""
        return ["docker", "exec", "-i", *(["--user=0"] if root else []), self.container, *command]

    def stop(self):
        run("docker", "stop", "--time=40", self.container)

    def close(self):
        subprocess.run(["docker", "rm", "--force", self.container], capture_output=True)


class Buildah:
    """Without one: buildah's build; mount, network and process namespaces in place of `docker
    run`."""

    name = "buildah"
    # argv: root of the image's files, model, ro or rw, user, then the command. The last remount
    # makes the root read-only.
    enter = """set -e; root=$1 model=$2 mode=$3 user=$4; shift 4
        mount --make-rprivate /
        mount --bind "$root" "$root"
        mount --bind "$model" "$root/model"
        mount -o "remount,bind,$mode" "$root/model"
        mount -t proc proc "$root/proc"
        mount -t sysfs -o ro sysfs "$root/sys"
        mount --rbind /dev "$root/dev"
        mount -t tmpfs tmpfs "$root/tmp"
        mount -o remount,bind,ro "$root"
        ip link set lo up
        exec chroot --userspec="$user" "$root" "$@" """

    def __init__(self):
        tools = ("buildah", "debootstrap", "unshare", "nsenter", "ip")
        missing = [tool for tool in tools if not shutil.which(tool)]
        if missing:
            raise SystemExit(
                f"no Docker engine answers, and there is no {', '.join(missing)}: "
                "apt-get install buildah debootstrap iproute2"
            )
        if os.geteuid():
            raise SystemExit("without a Docker engine this needs root: sudo make docker-test")
        os.environ.setdefault("STORAGE_DRIVER", "vfs")  # plain folders, which work everywhere
        os.environ["BUILDAH_ISOLATION"] = "chroot"
        self.container = None

    def base(self, folder):
        """A Debian with Python like the host's -> the image's name. Made once: `buildah rmi` it
        to have it made anew."""
        system = platform.freedesktop_os_release()
        suite = (
            system.get("VERSION_CODENAME", "bookworm")
            if system.get("ID") == "debian"
            else "bookworm"
        )
        name = f"localhost/llm-base:{suite}"
        if not run("buildah", "images", "--quiet", "--filter", f"reference={name}"):
            files = folder / "base"
            run(
                "debootstrap",
                "--variant=minbase",
                "--include=python3,python3-venv,ca-certificates",
                suite,
                str(files),
                MIRROR,
            )
            for rest in (
                "var/cache/apt/archives",
                "var/lib/apt/lists",
                "usr/share/doc",
                "usr/share/man",
                "usr/share/locale",
            ):
                shutil.rmtree(files / rest)  # as the slim images do
            made = run("buildah", "from", "scratch")
            run("buildah", "add", "--quiet", made, str(files), "/")
            run("buildah", "commit", "--quiet", "--rm", made, name)
            shutil.rmtree(files)
        return name

    def build(self, folder):
        base, (arguments, local) = os.environ.get("BASE") or self.base(folder), pip_settings(folder)
        run(
            "buildah",
            "build",
            "--format=docker",
            "--target=cpu",
            f"--tag={IMAGE}",
            f"--build-arg=BASE={base}",
            *arguments,
            *(f"--volume={path}:{path}:ro" for path in local),
            str(ROOT),
            show=True,
        )
        self.container = run("buildah", "from", "--pull-never", IMAGE)
        self.files = run("buildah", "mount", self.container)
        self.config = json.loads(run("buildah", "inspect", "--type=image", IMAGE))["Docker"][
            "config"
        ]

    def command(self, *command):
        """With the image's variables and folder, and no others."""
        return ["env", "-i", f"--chdir={self.config['WorkingDir']}", *self.config["Env"], *command]

    def start(self, model, *arguments, writable=False):
        command = self.command(*self.config["Entrypoint"], *(arguments or self.config["Cmd"]))
        self.server = subprocess.Popen(
            [
                "unshare",
                "--mount",
                "--net",
                "--pid",
                "--fork",
                "--kill-child",
                "sh",
                "-c",
                self.enter,
                "sh",
                self.files,
                model,
                "rw" if writable else "ro",
                self.config["User"],
                *command,
            ]
        )
        return self.server

    def first(self):
        """The number of the container's first process, 0 where there is none."""
        with contextlib.suppress(OSError, IndexError):
            return int(
                Path(f"/proc/{self.server.pid}/task/{self.server.pid}/children")
                .read_text()
                .split()[0]
            )
        return 0

    def inside(self, *command, root=False):
        user, _, group = "0:0".partition(":") if root else self.config["User"].partition(":")
        return [
            "nsenter",
            f"--target={self.first()}",
            "--mount",
            "--net",
            "--pid",
            "--root",
            f"--setuid={user}",
            f"--setgid={group}",
            *self.command(*command),
        ]

    def stop(self):
        os.kill(self.first(), signal.SIGTERM)

    def close(self):
        if self.container:
            run("buildah", "umount", self.container)
            run("buildah", "rm", self.container)


# ----------------------------------------------------------------------------------------- the test
def expect(what, holds, shown=""):
    print(f"{'ok  ' if holds else 'FAIL'} {what}{f': {shown}' if shown != '' else ''}", flush=True)
    return bool(holds)


def model_folder(engine, given, folder):
    """A copy of the given model, or a tiny one made by the image, readable by the image's user."""
    path = folder / "model"
    if given:
        shutil.copytree(given, path, ignore=shutil.ignore_patterns("state"))
        run("chmod", "-R", "a+rX", str(path))
    else:
        path.mkdir(mode=0o777)
        path.chmod(0o777)
        if engine.start(str(path), *program(tiny_model, "/model")[1:], writable=True).wait(120):
            raise SystemExit("the image could not make a model")
    return str(path)


def last_line(engine, *command, root=False):
    """The last line that a command prints inside the container."""
    return run(*engine.inside(*command, root=root)).splitlines()[-1]


def observe(engine, model):
    """Start the container, look at everything, stop it -> {what: what was seen}."""
    server = engine.start(model)

    def up():
        alive = subprocess.run(engine.inside("true"), capture_output=True).returncode == 0
        return alive or server.poll() is not None

    def touch(path):
        done = subprocess.run(
            engine.inside("touch", path, root=True), text=True, capture_output=True
        )
        return done.stderr.strip()

    try:
        until(up)
        seen = json.loads(last_line(engine, *program(client, "http://127.0.0.1:8000", 120)))
        seen |= json.loads(last_line(engine, *program(contents)))
        library = "from engine import native; print(native.library()._name)"
        seen["library"] = last_line(engine, "python", "-c", library)
        probe = engine.inside(*engine.config["Healthcheck"]["Test"][1:])
        seen["healthy"] = subprocess.run(probe).returncode == 0
        seen["root"], seen["model"] = touch("/probe"), touch("/model/probe")
        outside = [f"--exclude=/{name}" for name in ("model", "proc", "sys", "dev")]
        kilobytes = last_line(engine, "du", "-sxk", *outside, "/", root=True).split()[0]
        seen["size"] = int(kilobytes) * 1024
        begin = time.monotonic()
        engine.stop()
        server.wait(60)
        seen["stopping"] = time.monotonic() - begin
    finally:
        if server.poll() is None:
            server.kill()
    return seen


def examine(engine, model):
    """Everything that is checked -> [bool]"""
    seen = observe(engine, model)
    alive = '"alive"' in seen["health"] and '"ready"' in seen["ready"]
    ended = seen["end"] == "[DONE]" and seen["tokens"] > 0
    answer = f"{seen['tokens']} tokens, {seen['said'][:60]!r}"
    found, app, size = seen["found"], set(seen["app"]), seen["size"]
    about = {"README.md", "Makefile", "Dockerfile", "deploy", "tests", "docs"}
    checks = [
        ("/health and /ready answer", alive, seen["ready"]),
        ("ready soon after the start", seen["seconds"] < 120, f"{seen['seconds']} s"),
        ("a streamed answer ends as it should", ended, answer),
        ("the page and /metrics are there", seen["page"] and seen["metrics"], ""),
        ("HEALTHCHECK finds it healthy", seen["healthy"], ""),
        ("forward.cpp came compiled", seen["library"].startswith("/app/"), seen["library"]),
        ("its user is not root", all(seen["users"]), seen["users"][0]),
        ("it has no privileges", int(seen["privileges"], 16) == 0, seen["privileges"]),
        ("it needs no network", seen["networks"] == ["lo"], "only loopback"),
        ("the root is read-only, even for root", "Read-only" in seen["root"], seen["root"]),
        ("so is the model", "Read-only" in seen["model"], seen["model"]),
        ("SIGTERM ends it", seen["stopping"] < 10, f"{seen['stopping']:.1f} s"),
        ("no compilers, tests, docs, caches or history", not found, ", ".join(found[:5])),
        ("only the program in /app", "serve.py" in app and not about & app, f"{len(app)} entries"),
        (f"it takes less than {LIMIT / 1e9} GB", size < LIMIT, f"{size / 1e9:.3f} GB"),
    ]
    return [expect(*one) for one in checks]


def until(what, seconds=30):
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise SystemExit("the container did not start")
        time.sleep(0.1)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="",
        help="a model folder; without it a tiny one with random weights is made",
    )
    args = parser.parse_args()
    if args.model and not Path(args.model, "config.json").is_file():
        raise SystemExit(f"{args.model}: no model folder (it has no config.json)")
    answers = (
        shutil.which("docker")
        and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    )
    engine = Docker() if answers else Buildah()
    with tempfile.TemporaryDirectory(prefix="llm-docker-") as folder, contextlib.closing(engine):
        Path(folder).chmod(0o755)
        begin = time.monotonic()
        engine.build(Path(folder))
        print(f"\n{engine.name} built {IMAGE} in {time.monotonic() - begin:.0f} s\n", flush=True)
        held = examine(engine, model_folder(engine, args.model, Path(folder)))
    print(f"\n{sum(held)} passed, {len(held) - sum(held)} failed")
    return not all(held)


if __name__ == "__main__":
    sys.exit(main())
