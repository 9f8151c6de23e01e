"""Run an unchanged sd-scripts trainer, and see to what it does not see to by itself.

usage: resumable_trainer.py ORDERS TRAINER.py [TRAINER OPTIONS]

ORDERS is JSON: the files ``steps``, ``begun``, ``ended`` and ``stop`` of the run, and ``resume``,
a saved state or null. The trainer's files stay as they are; functions that it calls are wrapped:

- each step's numbers go to ``steps``, one JSON object a line; the end goes to ``ended``;
- a loss that is not finite ends the run before anything is saved from it;
- SIGINT, SIGTERM or the file ``stop`` end the run after the step, its state saved;
- a checkpoint appears under its name when it is whole, and is not begun on a full disk;
- ``resume`` goes on from a saved state with the losses of a run that was never interrupted.

The last one is why this is no mere ``--resume``. The pinned trainer's (2e0fcc50, train_network.py,
lines 1243 to 1262 and 1338 to 1343) loads the random state of the middle of an epoch and then
draws the epoch's order from it, so that the order is another one; with
``--skip_until_initial_step`` it counts the steps of the last epoch only. Here the run is played
again from its first step with nothing computed: epochs, counters, learning rates and the order
of the pictures come about as they did, and at the saved step the state is loaded.
"""

import contextlib
import importlib
import json
import math
import os
import random
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import safetensors.torch
import torch
from torch.utils.data import RandomSampler, get_worker_info

# Left free beside what is saved: the log and the samples need some, too.
SPARE_BYTES = 64_000_000


class NotFinite(Exception):
    """The loss is NaN or infinite: nothing that follows would be worth anything."""


class DiskFull(Exception):
    """There is less free disk than the next checkpoint needs."""


class NoExactResume(Exception):
    """The saved state does not hold what an exact continuation needs."""


# -- Whole files -------------------------------------------------------------------------------


def check_room(place: Path, needed: int) -> None:
    """Refuse to begin a file that the disk has no room for."""
    free = shutil.disk_usage(place).free
    if free < needed + SPARE_BYTES:
        raise DiskFull(
            f"{place} has {free / 1e6:.0f} MB left; the checkpoint needs {needed / 1e6:.0f} MB more"
        )


@contextlib.contextmanager
def whole(final: Path) -> Iterator[Path]:
    """A place to write to that takes its name when it was written to its end."""
    unfinished = final.with_name(f".{final.name}.unfinished")
    remove(unfinished)
    try:
        yield unfinished
        for file in [unfinished] if unfinished.is_file() else unfinished.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
    except BaseException:
        remove(unfinished)
        raise
    replaced = final.with_name(f".{final.name}.replaced")
    if final.is_dir():
        final.rename(replaced)
    unfinished.replace(final)
    remove(replaced)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save_wholly() -> None:
    """Make every saved file of weights appear whole; has to come before others import the functions."""
    save_file, save = safetensors.torch.save_file, torch.save

    def whole_save_file(tensors: dict[str, torch.Tensor], filename: Any, metadata: Any = None) -> None:
        final = Path(filename)
        check_room(final.parent, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        with whole(final) as unfinished:
            save_file(tensors, unfinished, metadata)

    def whole_save(obj: Any, f: Any, *arguments: Any, **options: Any) -> None:
        if not isinstance(f, str | os.PathLike):
            save(obj, f, *arguments, **options)
            return
        with whole(Path(f)) as unfinished:
            save(obj, unfinished, *arguments, **options)

    safetensors.torch.save_file, torch.save = whole_save_file, whole_save


# -- Random states -----------------------------------------------------------------------------


def drawn_random() -> dict[str, Any]:
    """What decides augmentations and captions."""
    return {"python": random.getstate(), "numpy": np.random.get_state()}


def all_random() -> dict[str, Any]:
    """The same with torch's; accelerate 1.3.0 saves CUDA's but not MPS' (checkpointing.py)."""
    state = drawn_random() | {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_random(state: dict[str, Any]) -> None:
    """Set what :func:`all_random` took, or ``before_fetch``."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state:
        torch.mps.set_rng_state(state["mps"])


# -- The watch ---------------------------------------------------------------------------------


class Watch:
    """What is known of the running training, and what the wrapped functions do.

    ``batches`` counts the batches that were trained, ``fetches`` those that were read:
    accelerate reads one ahead. ``losses`` has one for each batch, ``mean_loss`` is the last
    step's, over its batches and all processes. ``between_steps`` are the random states of
    Python and numpy that the next step has to find.
    """

    def __init__(self, orders: dict[str, Any]) -> None:
        self.steps_file, self.begun_file, self.ended_file, self.stop_file = (
            Path(orders[name]) for name in ("steps", "begun", "ended", "stop")
        )
        self.resume = Path(orders["resume"]) if orders["resume"] else None
        self.target = 0  # the step that is played up to
        self.saved: dict[str, Any] = {}  # what this process saved beside the state
        self.replaying = False
        self.step = self.total = 0
        self.batches = self.fetches = 0
        self.losses: list[float] = []
        self.unread: list[torch.Tensor] = []
        self.epoch_start: torch.Tensor | None = None
        self.before_fetch: dict[str, Any] = {}
        self.stop_at = math.inf
        self.stopped = False
        self.logged = self._last_logged()
        self.log = self.steps_file.open("a", encoding="utf-8", buffering=1)
        self.rank = 0
        self.process = psutil.Process()
        self.postponed: tuple[Any, Any] | None = None
        self.mean_loss = math.nan
        self.between_steps: dict[str, Any] = {}

    def _last_logged(self) -> int:
        lines = self.steps_file.read_text(encoding="utf-8").splitlines() if self.steps_file.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    # Resuming

    def begin(self, args: Any, accelerator: Any) -> None:
        """The trainer is ready for its first step."""
        self.rank, self.total = accelerator.process_index, args.max_train_steps
        if self.resume:
            self._prepare_replay(args)
        if accelerator.is_local_main_process:
            about = {
                "total": self.total,
                "device": str(accelerator.device),
                "processes": accelerator.num_processes,
                "pid": os.getpid(),
            }
            write_json(self.begun_file, about)

    def _prepare_replay(self, args: Any) -> None:
        assert self.resume is not None
        extras = self.resume / f"watched_{self.rank}.pt"
        if not extras.is_file():
            raise NoExactResume(
                f"{self.resume} was not saved by a run of as many processes: no {extras.name}"
            )
        state = json.loads((self.resume / "train_state.json").read_text(encoding="utf-8"))
        self.target = int(state["current_step"])
        self.saved = torch.load(extras, weights_only=False)  # our own file
        self.replaying = True
        # Nothing is saved again on the way; from the step after the loaded one on, it is.
        self.postponed = (args.save_every_n_steps, args.save_every_n_epochs)
        args.save_every_n_steps = args.save_every_n_epochs = None

    def _end_replay(self, accelerator: Any) -> None:
        accelerator.load_state(str(self.resume))
        restore_random(self.saved["random"])
        self.before_fetch, self.mean_loss = self.saved["before_fetch"], self.saved["mean_loss"]
        self.between_steps = drawn_random()
        self.replaying = False

    # Steps

    def batch(self, original: Callable[..., torch.Tensor], *arguments: Any, **options: Any) -> torch.Tensor:
        """``process_batch``: the loss of a batch."""
        if not options.get("is_train", True):
            return torch.zeros(()) if self.replaying else original(*arguments, **options)
        self.batches += 1
        if self.replaying:
            loss = self.saved["losses"][self.batches - 1]
            self.losses.append(loss)
            return torch.tensor(loss)
        self.undisturbed()
        loss = original(*arguments, **options)
        self.unread.append(loss.detach())
        return loss

    def step_done(self, accelerator: Any, args: Any, step: int) -> None:
        """The optimizer has made a step; nothing of it was saved yet."""
        self.step = step
        if self.postponed and not self.replaying:
            args.save_every_n_steps = self.postponed[0]
            self.postponed = None
        if self.replaying:
            if step >= self.target:
                self._end_replay(accelerator)
                args.save_every_n_epochs = self.postponed[1] if self.postponed else None
            return
        self._read_losses(accelerator)
        self.between_steps = drawn_random()

    def undisturbed(self) -> None:
        """Take back what was drawn from Python's and numpy's random numbers since the last step.

        Drawing samples and saving use them, the first time in a process more than later: a
        resumed run would flip other pictures. The trainer looks after torch's itself.
        """
        if self.between_steps:
            random.setstate(self.between_steps["python"])
            np.random.set_state(self.between_steps["numpy"])
            self.between_steps = {}

    def _read_losses(self, accelerator: Any) -> None:
        # The trainer reads the loss itself right after this: no further wait for the device.
        own = [float(loss) for loss in self.unread]
        self.losses += own
        mean = torch.stack(self.unread).mean()
        self.unread.clear()
        shared = accelerator.reduce(mean, "mean") if accelerator.num_processes > 1 else mean
        self.mean_loss = float(shared)
        if not math.isfinite(self.mean_loss):
            raise NotFinite(f"the loss of step {self.step} is {self.mean_loss}")

    def after_step(self, accelerator: Any, args: Any) -> None:
        """Stop here, when that was asked for."""
        if self.stop_at == math.inf and self.stop_file.exists():
            # Processes are never more than one step apart, because each step needs all of
            # them: what rank 0 writes now, the others have read at the end of the next one.
            if accelerator.num_processes == 1:
                self.stop_at = self.step
            elif text := self.stop_file.read_text(encoding="ascii"):
                self.stop_at = int(text)
            elif self.rank == 0:
                self.stop_at = self.step + 1
                write_text(self.stop_file, str(self.stop_at))
        if self.step < self.stop_at or self.step >= self.total:
            return
        accelerator.wait_for_everyone()
        if self.rank == 0 and self.step > self.target:
            train_util = trainers_library()
            name = train_util.default_if_none(args.output_name, train_util.DEFAULT_STEP_NAME)
            accelerator.save_state(
                str(Path(args.output_dir) / train_util.STEP_STATE_NAME.format(name, self.step))
            )
        self.stopped = True
        accelerator.wait_for_everyone()
        accelerator.end_training()
        raise SystemExit(0)

    def write_step(self, logs: dict[str, Any], step: int, epoch: int) -> None:
        """One line for each optimizer step, however many batches it had."""
        if self.replaying or step <= self.logged or "loss/current" not in logs:
            return
        self.logged = step
        line = {
            "step": step,
            "epoch": epoch,
            "time": time.time(),
            "loss": self.mean_loss,
            "average": logs["loss/average"],
            "memory": self._memory(),
            "rates": {name[3:]: float(value) for name, value in logs.items() if name.startswith("lr/")},
        }
        self.log.write(json.dumps(line) + "\n")

    def _memory(self) -> int:
        if torch.cuda.is_initialized():
            return int(torch.cuda.memory_reserved())
        if torch.backends.mps.is_available():
            return int(torch.mps.driver_allocated_memory())
        return int(self.process.memory_info().rss)

    # States

    def save_state(
        self, original: Callable[..., Any], accelerator: Any, directory: str, **options: Any
    ) -> Any:
        """``Accelerator.save_state``, whole, with what an exact continuation needs."""
        final = Path(directory)
        check_room(final.parent, state_bytes(accelerator))
        with whole(final) as unfinished:
            result = original(accelerator, str(unfinished), **options)
            torch.save(self._extras(), unfinished / "watched_0.pt")
            for other in final.parent.glob(".watched_*.pt"):
                other.rename(unfinished / other.name[1:])
        return result

    def before_barrier(self, output: str | None) -> None:
        """The other processes leave theirs for the first one: the trainer saves in that one alone."""
        if self.rank and self.batches and not self.replaying and output:
            torch.save(self._extras(), Path(output) / f".watched_{self.rank}.pt")

    def _extras(self) -> dict[str, Any]:
        return {
            "batches": self.batches,
            "losses": self.losses,
            "mean_loss": self.mean_loss,
            "random": all_random() | self.between_steps,
            "epoch_start": self.epoch_start,
            "before_fetch": self.before_fetch,
        }

    # Data

    def fetch(self, original: Callable[..., Any], group: Any, index: int) -> Any:
        """``DatasetGroup.__getitem__``: read a batch; while playing again only one that is still to be trained."""
        if get_worker_info() is not None or not group.watched:
            return original(group, index)
        self.fetches += 1
        if self.replaying:
            if self.fetches <= self.saved["batches"]:
                return {}
            restore_random(self.saved["before_fetch"])
        else:
            drawn = self.between_steps or drawn_random()
            self.undisturbed()
            self.before_fetch = drawn | {"torch": torch.get_rng_state()}
        return original(group, index)

    def order(self, original: Callable[..., Iterator[int]], sampler: Any, group_type: Any) -> Iterator[int]:
        """``RandomSampler.__iter__``: the order of an epoch's batches."""
        if isinstance(sampler.data_source, group_type):
            sampler.data_source.watched = True
            if self.replaying and sampler.generator is None:
                torch.set_rng_state(self.saved["epoch_start"])
            self.epoch_start = torch.get_rng_state()
        yield from original(sampler)

    # The end

    def ended(self, how: str, error: str = "") -> None:
        """Say how it ended; the first process of each machine speaks."""
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            write_json(self.ended_file, {"how": how, "step": self.step, "error": error})


def state_bytes(accelerator: Any) -> int:
    """How large a saved state will be: the trained weights and what the optimizers keep."""
    total = 0
    for optimizer in accelerator._optimizers:
        for group in optimizer.param_groups:
            total += sum(p.numel() * p.element_size() for p in group["params"])
        for kept in optimizer.state.values():
            total += sum(t.numel() * t.element_size() for t in kept.values() if isinstance(t, torch.Tensor))
    return total


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace a small file in one step."""
    write_text(path, json.dumps(data))


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


# -- Wrapping ----------------------------------------------------------------------------------


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a function by one that receives the original as its first argument."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **options: wrapper(original, *arguments, **options))


def trainers_library() -> Any:
    """sd-scripts' ``library/train_util.py``; the trainer's folder has to be importable."""
    return importlib.import_module("library.train_util")


def attach(watch: Watch) -> None:
    """Wrap what the trainer calls."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler

    train_util = trainers_library()
    output: list[str] = []

    def verify(original: Callable[..., Any], args: Any) -> None:
        original(args)
        output.append(args.output_dir)
        attach_to_trainer(watch, sys.modules["__main__"])

    def sample(
        original: Callable[..., Any], pipeline: Any, accelerator: Any, args: Any, epoch: Any, step: int,
        *rest: Any, **options: Any,
    ) -> None:  # fmt: skip
        # Called after each step, after each epoch and before the first step, in every process.
        if step == 0:
            watch.begin(args, accelerator)
        elif epoch is None:
            played = watch.replaying
            watch.step_done(accelerator, args, step)
            if played:
                watch.after_step(accelerator, args)
                return
        if watch.replaying:
            return
        original(pipeline, accelerator, args, epoch, step, *rest, **options)
        if epoch is None and step:
            watch.after_step(accelerator, args)

    def unless_replaying(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return None if watch.replaying else original(*arguments, **options)

    def barrier(original: Callable[..., Any], accelerator: Any) -> None:
        watch.before_barrier(output[0] if output else None)
        original(accelerator)

    def fetch(original: Callable[..., Any], group: Any, index: int) -> Any:
        return watch.fetch(original, group, index)

    def order(original: Callable[..., Any], sampler: Any) -> Iterator[int]:
        return watch.order(original, sampler, train_util.DatasetGroup)

    wrap(train_util, "verify_training_args", verify)
    wrap(train_util, "sample_images_common", sample)
    train_util.DatasetGroup.watched = False
    wrap(train_util.DatasetGroup, "__getitem__", fetch)
    wrap(RandomSampler, "__iter__", order)
    wrap(Accelerator, "prepare_model", prepare_model)
    wrap(Accelerator, "save_state", watch.save_state)
    wrap(Accelerator, "wait_for_everyone", barrier)
    wrap(Accelerator, "backward", unless_replaying)
    wrap(Accelerator, "clip_grad_norm_", unless_replaying)
    wrap(AcceleratedOptimizer, "step", unless_replaying)
    wrap(AcceleratedScheduler, "step", unless_replaying)


def prepare_model(original: Callable[..., Any], accelerator: Any, model: Any, **options: Any) -> Any:
    """Keep models that are not trained out of DDP.

    accelerate 1.3.0 leaves frozen models alone on GPUs; on CPUs it hands them to DDP, which
    refuses them (accelerator.py, lines 1461 and 1599).
    """
    from accelerate.utils import DistributedType

    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    if frozen and accelerator.distributed_type == DistributedType.MULTI_CPU:
        options["evaluation_mode"] = True
    return original(accelerator, model, **options)


def attach_to_trainer(watch: Watch, main: Any) -> None:
    """Wrap the trainer's own methods; its script is the running ``__main__``."""
    trainers = [
        kind for kind in vars(main).values() if isinstance(kind, type) and hasattr(kind, "process_batch")
    ]
    if len(trainers) != 1:
        raise SystemExit(f"{main.__file__}: has no one trainer with process_batch: not known here")

    def log_step(
        original: Callable[..., Any],
        trainer: Any,
        accelerator: Any,
        logs: dict[str, Any],
        global_step: int,
        epoch: int,
    ) -> None:
        watch.write_step(logs, global_step, epoch)
        original(trainer, accelerator, logs, global_step, epoch)

    def log(original: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        if not watch.replaying:
            original(*arguments, **options)

    wrap(trainers[0], "process_batch", watch.batch)
    wrap(trainers[0], "step_logging", log_step)
    wrap(trainers[0], "accelerator_logging", log)


def main() -> None:
    watch = Watch(json.loads(sys.argv[1]))
    script = Path(sys.argv[2])
    sys.argv = sys.argv[2:]
    # The trainer is the script, or the last one of a chain of scripts that run each other.
    trainer = next(argument for argument in sys.argv if argument.endswith("_network.py"))
    sys.path.insert(0, str(Path(trainer).resolve().parent))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: watch.stop_file.touch())
    save_wholly()
    attach(watch)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except BaseException as error:
        if watch.stopped:
            watch.ended("stopped")
        else:
            watch.ended("failed", f"{type(error).__name__}: {error}")
        raise
    if watch.step == 0:
        watch.ended("failed", "the trainer ended before its first step")
        raise SystemExit(1)
    watch.ended("finished")


if __name__ == "__main__":
    main()
