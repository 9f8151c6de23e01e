"""``nox -s bench``: what this project costs over the bare tools, as ratios measured in one run."""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from devtools import posargs
from devtools.sandbox import SANDBOX
from kohya_mps.core.errors import StepFailed
from kohya_mps.core.installation import Installation
from kohya_mps.core.process import RUN_MARK, ProcessResult, clean_environ, end_leftovers, stream, uv
from kohya_mps.core.report import Check, Report, say
from kohya_mps.core.run_lock import exclusive_lock
from kohya_mps.core.settings import PROBES, ROOT, Settings, load
from kohya_mps.gui import serve
from kohya_mps.install import accelerate_launch, environment, lockfile, training_step
from kohya_mps.install.setup import installed
from kohya_mps.train import runs, start

PARTS = ("venv", "payload", "nothing", "train_step", "list", "generation", "training", "rehearse", "gui")


# On the disk that the environments are on: links from uv's cache do not cross file systems.
_SCRATCH = SANDBOX.parent


class Row(msgspec.Struct, frozen=True):
    """One comparison: medians of both sides, in ``unit``, and the ratio that is allowed."""

    work: str
    against: str
    medians: tuple[float, ...]
    unit: str
    at_most: float

    @property
    def ours(self) -> float:
        """What the work costs with this project."""
        return self.medians[0]

    @property
    def bare(self) -> float:
        """What it costs with the bare tools."""
        return self.medians[1]

    @property
    def ratio(self) -> float:
        """Ours in bare's."""
        return self.ours / self.bare if self.bare else float("inf")

    def check(self) -> Check:
        """The comparison as a row of the report; it fails above the limit."""
        detail = f"{self.ours:.2f} against {self.bare:.2f} {self.unit}: {self.ratio:.2f} x, at most {self.at_most:g} x"
        return Check.of(f"{self.work} / {self.against}", self.ratio <= self.at_most, detail)


class BenchOptions(msgspec.Struct, frozen=True):
    """What is measured, and how often each side runs."""

    parts: tuple[str, ...]
    times: int


def parse_options(arguments: Sequence[str]) -> BenchOptions:
    """The options of ``nox -s bench``."""
    parser = posargs.parser("bench", "Compare with the bare tools.")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part; repeatable")
    parser.add_argument("--times", type=int, default=5, help="how often each side runs")
    parsed = parser.parse_args(arguments)
    return BenchOptions(tuple(parsed.only or PARTS), parsed.times)


def run(settings: Settings, options: BenchOptions) -> Report:
    """Measure the parts that were asked for, alternating both sides, and report the ratios."""
    measures: dict[str, Callable[[Settings, Path, int], list[Row]]] = {
        "venv": _venv,
        "payload": _payload,
        "nothing": _nothing,
        "train_step": _train_step,
        "list": _list,
        "generation": _generation,
        "training": _training,
        "rehearse": _rehearse,
        "gui": _gui,
    }
    rows: list[Row] = []
    _SCRATCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_SCRATCH) as directory:
        for part in options.parts:
            say(f"measuring {part}")
            rows += measures[part](settings, Path(directory), options.times)
    data = [{**msgspec.structs.asdict(row), "ratio": round(row.ratio, 3)} for row in rows]
    report = Report("Bench", tuple(row.check() for row in rows), {"rows": data})
    (ROOT / "bench.json").write_bytes(msgspec.json.format(msgspec.json.encode(data)))
    return report


def _run(command: Sequence[str], *, env: dict[str, str] | None = None, cwd: Path = ROOT) -> ProcessResult:
    done = stream(command, cwd=cwd, env=env or clean_environ(), on_output=lambda _: None)
    if done.returncode:
        raise StepFailed(f"{' '.join(command[:4])} … ended with {done.returncode}: {done.last_line}")
    return done


def _alternating(times: int, *sides: Callable[[], float]) -> tuple[float, ...]:
    """The median of each side; the first round warms the caches and does not count."""
    rounds = [[side() for side in sides] for _ in range(times + 1)][1:]
    return tuple(statistics.median(column) for column in zip(*rounds, strict=True))


def _tool(name: str) -> str:
    """The tool that README's first command installed, which is what people type; else this session's."""
    installed_first = ROOT / ".venv" / "bin" / name
    return str(installed_first if installed_first.exists() else Path(sys.prefix) / "bin" / name)


def _own_environment(**variables: str) -> dict[str, str]:
    """For our own front ends, as a person's shell would start them."""
    return {**os.environ, **variables}


def _venv(settings: Settings, scratch: Path, times: int) -> list[Row]:
    lock = str(settings.profile.lock_file)
    python = environment.find_python(settings.profile).path

    def ours() -> float:
        home = scratch / "home"
        took = _run([_tool("nox"), "-s", "venv"], env=_own_environment(KOHYA_HOME=str(home))).seconds
        shutil.rmtree(home)
        return took

    def bare() -> float:
        venv = scratch / "bare"
        took = _run([uv(), "venv", "--python", python, str(venv)]).seconds
        took += _run(
            [uv(), "pip", "sync", "--python", str(venv / "bin/python"), "--require-hashes", lock]
        ).seconds
        shutil.rmtree(venv)
        return took

    measured = _alternating(times, ours, bare)
    return [Row("nox -s venv, warm cache", "uv venv and uv pip sync", measured, "s", 1.3)]


def _payload(settings: Settings, scratch: Path, times: int) -> list[Row]:
    # pip asks the markers of the machine it runs on: it gets the Mac's part of the lock alone.
    pins = lockfile.read(settings.profile.lock_file).pins
    on_a_mac = [pin for pin in pins if pin.applies(lockfile.MAC_ARM64)]
    lines = [" ".join([f"{p.name}=={p.version}", *(f"--hash={h}" for h in p.hashes)]) for p in on_a_mac]
    (scratch / "mac.txt").write_text("\n".join(lines), encoding="utf-8")
    lock, target, version = str(scratch / "mac.txt"), scratch / "payload", settings.profile.python
    wheels_only = ["--require-hashes", "--only-binary", ":all:", "--python-version", version]
    tags = [f"macosx_{major}_0_{kind}" for major in range(11, 15) for kind in ("arm64", "universal2")]
    tags += ["macosx_10_9_universal2", "macosx_10_13_universal2"]

    def timed(command: Sequence[str]) -> float:
        took = _run(command).seconds
        shutil.rmtree(target)
        return took

    def ours() -> float:
        platform = ["--python-platform", "aarch64-apple-darwin"]
        return timed([uv(), "pip", "install", *platform, *wheels_only, "--target", str(target), "-r", lock])

    def pip() -> float:
        platforms = [part for tag in tags for part in ("--platform", tag)]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *wheels_only, *platforms]
        return timed([*command, "--target", str(target), "-r", lock])

    return [Row("macOS payload with uv", "pip install", _alternating(min(times, 2), ours, pip), "s", 0.05)]


def _nothing(settings: Settings, scratch: Path, times: int) -> list[Row]:
    generation = installed(Installation(settings.home))
    lock, python = str(settings.profile.lock_file), str(generation.python)

    def ours() -> float:
        return _run([_tool("invoke"), "setup", "--no-verify"], env=_own_environment()).seconds

    def bare() -> float:
        took = _run(["git", "-C", str(settings.home), "status"]).seconds
        dry = [uv(), "pip", "sync", "--dry-run", "--python", python, "--require-hashes", lock]
        return took + _run(dry).seconds

    def look() -> float:
        return _run([_tool("invoke"), "status"], env=_own_environment()).seconds

    setup, tools, status = _alternating(times, ours, bare, look)
    against = "git status and uv pip sync --dry-run"
    return [
        Row("invoke setup --no-verify, nothing to do", against, (setup, tools), "s", 3),
        Row("invoke status", against, (status, tools), "s", 3),
    ]


def _train_step(settings: Settings, scratch: Path, times: int) -> list[Row]:
    apart = msgspec.structs.replace(settings, home=SANDBOX)
    generation = installed(Installation(SANDBOX))
    checkout = Installation(settings.home).root
    model = training_step.prepare_model(generation, Installation(SANDBOX).verification, "sd15", "small")
    ours: list[ProcessResult] = []
    bare: list[ProcessResult] = []
    for _ in range(min(times, 3) + 1):
        ours.append(_run([_tool("nox"), "-s", "train_step"], env=_own_environment()))
        options = training_step.TrainingStepOptions()
        command, place = training_step.trainer_command(
            apart, generation, checkout, model, scratch / "out", options
        )
        bare.append(_run(command, env=accelerate_launch.environ(generation, offline=True), cwd=place))
        shutil.rmtree(scratch / "out")
    seconds = tuple(statistics.median(done.seconds for done in side[1:]) for side in (ours, bare))
    memory = tuple(statistics.median(done.peak_bytes / 1e6 for done in side[1:]) for side in (ours, bare))
    against = "accelerate launch of the same command"
    return [
        Row("nox -s train_step, once built", against, seconds, "s", 1.2),
        Row("nox -s train_step, peak memory", against, memory, "MB", 1.05),
    ]


def _list(settings: Settings, scratch: Path, times: int) -> list[Row]:
    empty = scratch / "empty"
    empty.mkdir()
    (empty / "tasks.py").write_text("from invoke.tasks import task\n\n\n@task\ndef nothing(c):\n    pass\n")

    def ours() -> float:
        return _run([_tool("invoke"), "--list"], env=_own_environment()).seconds

    def bare() -> float:
        return _run([_tool("invoke"), "--list"], env=_own_environment(), cwd=empty).seconds

    measured = _alternating(max(times, 10), ours, bare)
    return [Row("invoke --list", "invoke --list of an empty tasks.py", measured, "s", 1.5)]


def _generation(settings: Settings, scratch: Path, times: int) -> list[Row]:
    lock = lockfile.read(settings.profile.lock_file)
    python = environment.find_python(settings.profile).path
    for name in ("first", "second"):
        environment.install(scratch / name, python, lock)
    first = _disk(scratch / "first")
    both = _disk(scratch / "first", scratch / "second")
    shutil.rmtree(scratch / "first")
    shutil.rmtree(scratch / "second")
    added = (both - first) / 1e6
    return [Row("disk of a second generation", "the first", (added, first / 1e6), "MB", 0.05)]


def _training(settings: Settings, scratch: Path, times: int) -> list[Row]:
    """Seconds per step in steady state, from what both sides wrote for TensorBoard."""
    home = Installation(settings.home)
    generation = installed(home)
    model = training_step.prepare_model(generation, home.verification, "sd15", "small")
    project = scratch / "training"
    project.mkdir()
    file = project / runs.SETTINGS
    file.write_text(_SMALL_TRAINING.format(model=model), encoding="utf-8")

    def pace(run: runs.Run) -> float:
        lora = str(run.output / "bench.safetensors")
        printed = accelerate_launch.probe(
            generation, PROBES / "inspect_run.py", str(run.tensorboard), lora, "lora_up"
        )
        shutil.rmtree(run.path)
        found = msgspec.json.decode(printed, type=training_step.TrainedLora)
        assert found.seconds_per_step is not None  # it made more than one step
        return found.seconds_per_step * 1000

    def ours() -> float:
        _run([_tool("invoke"), "train", str(project)], env=_own_environment())
        return pace(runs.find(project))

    def bare() -> float:
        run = runs.new(file)
        shutil.copyfile(file, run.settings)
        planned = start.plan(home, file, project)
        script = [str(PROBES / "small_trainer.py"), str(planned.trainer)]
        command = accelerate_launch.argv(generation, *script, *start.trainer_arguments(planned, run))
        _run(command, env=accelerate_launch.environ(generation), cwd=project)
        return pace(run)

    measured = _alternating(times, ours, bare)
    return [Row("invoke train, a step", "accelerate launch of the same settings", measured, "ms", 1.03)]


_SMALL_TRAINING = """
pretrained_model_name_or_path = "{model}/model"
tokenizer_cache_dir = "{model}/tokenizers"
train_data_dir = "{model}/images"
caption_extension = ".txt"
resolution = "64,64"
network_module = "networks.lora"
network_dim = 4
output_name = "bench"
output_dir = "output"
optimizer_type = "AdamW"
learning_rate = 1e-4
max_train_steps = 150
seed = 42
sdpa = true
cache_latents = true
max_data_loader_n_workers = 0
"""


def _rehearse(settings: Settings, _scratch: Path, times: int) -> list[Row]:
    from devtools.rehearsal import runner
    from devtools.rehearsal.record import Record

    def seconds(record: Record) -> float:
        if record.error:
            raise StepFailed(f"the training on {record.device} failed: {record.error}")
        return record.seconds

    training = runner.Training("lora with AdamW", "", ("lora", "AdamW", "20"))
    rounds: list[tuple[float, float]] = []
    with exclusive_lock(Installation(SANDBOX)):
        stage = runner.prepare(settings, builtin=True)
        for _ in range(min(times, 3)):
            pair = runner.requests(stage, training, stage.work / "bench", fallback=False)
            runner.run(stage, pair, jobs=1)
            rounds.append((seconds(runner.result(pair[0])), seconds(runner.result(pair[1]))))
    measured = tuple(statistics.median(column) for column in zip(*rounds, strict=True))
    return [Row("training on the simulated device", "the same on the CPU", measured, "s", 2.5)]


def _gui(settings: Settings, scratch: Path, times: int) -> list[Row]:
    """Until the page answers; ``settings`` name a home with the page in it."""
    home = Installation(settings.home)
    generation = installed(home)
    address = serve.Address(serve.LOOPBACK, _free_port())
    where = ["--listen", address.host, "--server_port", str(address.port), "--headless", "--noverify"]

    def timed(command: Sequence[str], environ: Mapping[str, str], answered: Callable[[], bool]) -> float:
        mark, ended, took = uuid.uuid4().hex, threading.Event(), list[float]()
        said.clear()
        started = time.monotonic()

        def watch() -> None:
            while not answered():
                if ended.wait(0.05):
                    return
            took.append(time.monotonic() - started)
            end_leftovers(mark)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        done = stream(command, cwd=home.root, env={**environ, RUN_MARK: mark}, on_output=said.append)
        ended.set()
        watcher.join()
        if not took:
            raise StepFailed(f"{' '.join(command[:3])} … ended with {done.returncode}: {done.last_line}")
        return took[0]

    said: list[bytes] = []

    def ours() -> float:
        # It asks the page itself; asking besides would have the page answer twice.
        command = [_tool("invoke"), "--search-root", str(ROOT), "gui", "--port", str(address.port)]
        printed = f"  {address.url}\n".encode()
        environ = _own_environment(KOHYA_HOME=str(home.root))
        return timed(command, environ, lambda: printed in b"".join(said))

    def bare() -> float:
        variables = accelerate_launch.environ(generation) | {"GRADIO_ANALYTICS_ENABLED": "False"}
        return timed([str(generation.python), "kohya_gui.py", *where], variables, address.answers)

    against = "python kohya_gui.py of the same environment"
    return [Row("invoke gui until it answers", against, _alternating(min(times, 3), ours, bare), "s", 1.1)]


def _free_port() -> int:
    with socket.create_server((serve.LOOPBACK, 0)) as server:
        return int(server.getsockname()[1])


def _disk(*trees: Path) -> int:
    """Bytes on disk, a file that several names link to counted once."""
    seen: dict[tuple[int, int], int] = {}
    for tree in trees:
        for directory, folders, files in os.walk(tree):
            for name in (*folders, *files):
                stat = os.lstat(os.path.join(directory, name))  # noqa: PTH118 -- 25,000 times
                seen[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return sum(seen.values())


if __name__ == "__main__":
    posargs.run(sys.argv[1:], parse_options, lambda options: run(load(), options))
