"""Run an unchanged sd-scripts trainer so that its run can be followed, stopped and resumed exactly.

usage: resumable_trainer.py REQUEST TRAINER.py [TRAINER OPTIONS]

REQUEST is JSON: the files ``steps``, ``begun``, ``ended`` and ``stop`` of the run, and ``resume``,
a saved state or null. The trainer's files stay as they are; this script wraps functions that the
trainer calls:

- each step's numbers are written to ``steps``, one JSON object a line; the end is written to ``ended``;
- a loss that is not finite ends the run before anything is saved from it;
- SIGINT, SIGTERM or the file ``stop`` end the run after the step, with its state saved;
- a checkpoint gets its name only when it is complete, and none is begun on a full disk;
- ``resume`` continues from a saved state with the losses of a run that was never interrupted.

The trainer's own ``--resume`` is not exact. The pinned one (2e0fcc50, train_network.py, lines 1243
to 1262 and 1338 to 1343) loads the random state of the middle of an epoch and then draws the
epoch's order from it, which gives another order. With ``--skip_until_initial_step`` it counts the
steps of the last epoch only. Here the run is replayed from its first step without computing
anything: epochs, counters, learning rates and the order of the pictures are the same as before.
At the saved step the state is loaded.
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

# Disk space that stays free for the log and the samples.
SPARE_BYTES = 64_000_000


class NotFinite(Exception):
    """The loss is NaN or infinite: all further steps would be useless."""


class DiskFull(Exception):
    """The disk has less free space than the next checkpoint needs."""


class NoExactResume(Exception):
    """The saved state lacks what an exact resume needs."""


# -- Complete files ----------------------------------------------------------------------------


def check_room(directory: Path, needed: int) -> None:
    """Refuse to begin a file when the disk has no room for its ``needed`` bytes.

    Raises:
        DiskFull: there is not enough free space.
    """
    free = shutil.disk_usage(directory).free
    if free < needed + SPARE_BYTES:
        raise DiskFull(
            f"{directory} has {free / 1e6:.0f} MB left; the checkpoint needs {needed / 1e6:.0f} MB more"
        )


@contextlib.contextmanager
def complete(final: Path) -> Iterator[Path]:
    """Give a path to write a file or a folder to; it gets its final name when all of it is written."""
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
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save_completely() -> None:
    """Give saved files of weights their names only when they are complete.

    It has to run before other modules import the functions that it replaces.
    """
    save_file, save = safetensors.torch.save_file, torch.save

    def complete_save_file(tensors: dict[str, torch.Tensor], filename: Any, metadata: Any = None) -> None:
        final = Path(filename)
        check_room(final.parent, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        with complete(final) as unfinished:
            save_file(tensors, unfinished, metadata)

    def complete_save(obj: Any, f: Any, *arguments: Any, **options: Any) -> None:
        if not isinstance(f, str | os.PathLike):
            save(obj, f, *arguments, **options)
            return
        with complete(Path(f)) as unfinished:
            save(obj, unfinished, *arguments, **options)

    safetensors.torch.save_file, torch.save = complete_save_file, complete_save


# -- Random states -----------------------------------------------------------------------------


def data_random() -> dict[str, Any]:
    """The random states that decide augmentations and captions."""
    return {"python": random.getstate(), "numpy": np.random.get_state()}


def all_random() -> dict[str, Any]:
    """All random states; accelerate 1.3.0 saves CUDA's, but not MPS's (checkpointing.py)."""
    state = data_random() | {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_random(state: dict[str, Any]) -> None:
    """Set the states that :func:`all_random` returned, or those in ``before_fetch``."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state:
        torch.mps.set_rng_state(state["mps"])


# -- The watched training ----------------------------------------------------------------------


class Watch:
    """The state of the running training, and what the wrapped functions do.

    ``batches`` counts the batches that were trained, ``fetches`` the batches that were read:
    accelerate reads one ahead. ``losses`` has one loss for each batch; ``mean_loss`` is that of the
    last step, over its batches and all processes. ``between_steps`` are the random states of
    Python and numpy that the next step has to start with.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        self.steps_file, self.begun_file, self.ended_file, self.stop_file = (
            Path(request[name]) for name in ("steps", "begun", "ended", "stop")
        )
        self.resume = Path(request["resume"]) if request["resume"] else None
        self.output_dir = ""  # the trainer's, once it has read its arguments
        self.target = 0  # the step at which the replay ends
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
        """Called when the trainer is ready for its first step."""
        self.rank, self.total = accelerator.process_index, args.max_train_steps
        if self.resume:
            self._prepare_replay(args)
        if accelerator.is_local_main_process:
            begun = {
                "total": self.total,
                "device": str(accelerator.device),
                "processes": accelerator.num_processes,
                "pid": os.getpid(),
            }
            write_json(self.begun_file, begun)

    def _prepare_replay(self, args: Any) -> None:
        assert self.resume is not None
        extras = self.resume / f"watched_{self.rank}.pt"
        if not extras.is_file():
            raise NoExactResume(
                f"{self.resume} was not saved by a run of as many processes: no {extras.name}"
            )
        state = json.loads((self.resume / "train_state.json").read_text(encoding="utf-8"))
        self.target = int(state["current_step"])
        self.saved = torch.load(extras, weights_only=False)  # this script wrote it
        self.replaying = True
        # The replay saves nothing. Saving begins again with the step after the loaded one.
        self.postponed = (args.save_every_n_steps, args.save_every_n_epochs)
        args.save_every_n_steps = args.save_every_n_epochs = None

    def _end_replay(self, accelerator: Any) -> None:
        accelerator.load_state(str(self.resume))
        restore_random(self.saved["random"])
        self.before_fetch, self.mean_loss = self.saved["before_fetch"], self.saved["mean_loss"]
        self.between_steps = data_random()
        self.replaying = False

    # Steps

    def batch(self, original: Callable[..., torch.Tensor], *arguments: Any, **options: Any) -> torch.Tensor:
        """Replaces ``process_batch``: the loss of a batch."""
        if not options.get("is_train", True):
            return torch.zeros(()) if self.replaying else original(*arguments, **options)
        self.batches += 1
        if self.replaying:
            loss = self.saved["losses"][self.batches - 1]
            self.losses.append(loss)
            return torch.tensor(loss)
        self.restore_between_steps()
        loss = original(*arguments, **options)
        self.unread.append(loss.detach())
        return loss

    def step_done(self, accelerator: Any, args: Any, step: int) -> None:
        """Called when the optimizer has made a step, before anything of it is saved."""
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
        self.between_steps = data_random()

    def restore_between_steps(self) -> None:
        """Set Python's and numpy's random states back to those after the last step.

        Drawing samples and saving use random numbers, the first time in a process more than later.
        So a resumed run would flip other pictures. The trainer restores torch's states itself.
        """
        if self.between_steps:
            random.setstate(self.between_steps["python"])
            np.random.set_state(self.between_steps["numpy"])
            self.between_steps = {}

    def _read_losses(self, accelerator: Any) -> None:
        # The trainer itself reads the loss right after this, so this adds no wait for the device.
        own = [float(loss) for loss in self.unread]
        self.losses += own
        mean = torch.stack(self.unread).mean()
        self.unread.clear()
        shared = accelerator.reduce(mean, "mean") if accelerator.num_processes > 1 else mean
        self.mean_loss = float(shared)
        if not math.isfinite(self.mean_loss):
            raise NotFinite(f"the loss of step {self.step} is {self.mean_loss}")

    def after_step(self, accelerator: Any, args: Any) -> None:
        """End the run after this step if the stop file exists.

        Raises:
            SystemExit: the state is saved and the run has ended.
        """
        if self.stop_at == math.inf and self.stop_file.exists():
            # Processes are never more than one step apart, because each step needs all of
            # them. So all have read by the end of the next step what rank 0 writes now.
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
        """Write a line for the optimizer step, however many batches it had."""
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
        """Replaces ``Accelerator.save_state``: the state is complete and has what an exact resume needs."""
        final = Path(directory)
        check_room(final.parent, state_bytes(accelerator))
        with complete(final) as unfinished:
            result = original(accelerator, str(unfinished), **options)
            torch.save(self._extras(), unfinished / "watched_0.pt")
            for other in final.parent.glob(".watched_*.pt"):
                other.rename(unfinished / other.name[1:])
        return result

    def before_barrier(self) -> None:
        """Write this process's part of a state; only the first process saves the state itself."""
        if self.rank and self.batches and not self.replaying and self.output_dir:
            torch.save(self._extras(), Path(self.output_dir) / f".watched_{self.rank}.pt")

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
        """Replaces ``DatasetGroup.__getitem__``: a replay reads only the batches still to be trained."""
        if get_worker_info() is not None or not group.watched:
            return original(group, index)
        self.fetches += 1
        if self.replaying:
            if self.fetches <= self.saved["batches"]:
                return {}
            restore_random(self.saved["before_fetch"])
        else:
            drawn = self.between_steps or data_random()
            self.restore_between_steps()
            self.before_fetch = drawn | {"torch": torch.get_rng_state()}
        return original(group, index)

    def order(self, original: Callable[..., Iterator[int]], sampler: Any, group_type: Any) -> Iterator[int]:
        """Replaces ``RandomSampler.__iter__``: the order of an epoch's batches."""
        if isinstance(sampler.data_source, group_type):
            sampler.data_source.watched = True
            if self.replaying and sampler.generator is None:
                torch.set_rng_state(self.saved["epoch_start"])
            self.epoch_start = torch.get_rng_state()
        yield from original(sampler)

    # The end

    def ended(self, how: str, error: str = "") -> None:
        """Write how the run ended; only the first process of each machine does."""
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            write_json(self.ended_file, {"how": how, "step": self.step, "error": error})


def state_bytes(accelerator: Any) -> int:
    """The size of a saved state in bytes: the trained weights and the optimizers' states."""
    total = 0
    for optimizer in accelerator._optimizers:
        for group in optimizer.param_groups:
            total += sum(p.numel() * p.element_size() for p in group["params"])
        for state in optimizer.state.values():
            total += sum(t.numel() * t.element_size() for t in state.values() if isinstance(t, torch.Tensor))
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
    """Replace a function by a wrapper that receives the original as its first argument."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **options: wrapper(original, *arguments, **options))


def trainers_library() -> Any:
    """sd-scripts' ``library/train_util.py``; the trainer's folder has to be on ``sys.path``."""
    return importlib.import_module("library.train_util")


def attach(watch: Watch) -> None:
    """Wrap what the trainer calls."""
    attach_to_library(watch)
    attach_to_data(watch)
    attach_to_accelerate(watch)


def attach_to_library(watch: Watch) -> None:
    """Wrap sd-scripts' functions that the trainer calls before its first step and after each step."""
    train_util = trainers_library()

    def verify(original: Callable[..., Any], args: Any) -> None:
        original(args)
        watch.output_dir = args.output_dir
        attach_to_trainer(watch, sys.modules["__main__"])

    def sample(
        original: Callable[..., Any], pipeline: Any, accelerator: Any, args: Any, epoch: Any, step: int,
        *rest: Any, **options: Any,
    ) -> None:  # fmt: skip
        # The trainer calls it before the first step, after each step and after each epoch, in every process.
        if step == 0:
            watch.begin(args, accelerator)
        elif epoch is None:
            replayed = watch.replaying
            watch.step_done(accelerator, args, step)
            if replayed:
                watch.after_step(accelerator, args)
                return
        if watch.replaying:
            return
        original(pipeline, accelerator, args, epoch, step, *rest, **options)
        if epoch is None and step:
            watch.after_step(accelerator, args)

    wrap(train_util, "verify_training_args", verify)
    wrap(train_util, "sample_images_common", sample)


def attach_to_data(watch: Watch) -> None:
    """Wrap how the trainer orders and reads its batches."""
    groups = trainers_library().DatasetGroup

    def fetch(original: Callable[..., Any], group: Any, index: int) -> Any:
        return watch.fetch(original, group, index)

    def order(original: Callable[..., Any], sampler: Any) -> Iterator[int]:
        return watch.order(original, sampler, groups)

    groups.watched = False
    wrap(groups, "__getitem__", fetch)
    wrap(RandomSampler, "__iter__", order)


def attach_to_accelerate(watch: Watch) -> None:
    """Wrap saving, and everything that a replay leaves out."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler
    from accelerate.utils import DistributedType

    def unless_replaying(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return None if watch.replaying else original(*arguments, **options)

    def barrier(original: Callable[..., Any], accelerator: Any) -> None:
        watch.before_barrier()
        original(accelerator)

    def prepare_model(original: Callable[..., Any], accelerator: Any, model: Any, **options: Any) -> Any:
        # accelerate 1.3.0 does not give frozen models to DDP on GPUs, but does on CPUs, where DDP
        # refuses them (accelerator.py, lines 1461 and 1599).
        frozen = not any(parameter.requires_grad for parameter in model.parameters())
        if frozen and accelerator.distributed_type == DistributedType.MULTI_CPU:
            options["evaluation_mode"] = True
        return original(accelerator, model, **options)

    wrap(Accelerator, "prepare_model", prepare_model)
    wrap(Accelerator, "save_state", watch.save_state)
    wrap(Accelerator, "wait_for_everyone", barrier)
    for owner, name in (
        (Accelerator, "backward"),
        (Accelerator, "clip_grad_norm_"),
        (AcceleratedOptimizer, "step"),
        (AcceleratedScheduler, "step"),
    ):
        wrap(owner, name, unless_replaying)


def attach_to_trainer(watch: Watch, main: Any) -> None:
    """Wrap the trainer's own methods; its script runs as ``__main__``.

    Raises:
        SystemExit: the script has no class, or several, with ``process_batch``.
    """
    trainers = [
        kind for kind in vars(main).values() if isinstance(kind, type) and hasattr(kind, "process_batch")
    ]
    if len(trainers) != 1:
        raise SystemExit(f"{main.__file__}: {len(trainers)} classes have process_batch, expected one")

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
    # The trainer is the script itself, or the last of several scripts that each run the next one.
    trainer = next(argument for argument in sys.argv if argument.endswith("_network.py"))
    sys.path.insert(0, str(Path(trainer).resolve().parent))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: watch.stop_file.touch())
    save_completely()
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
