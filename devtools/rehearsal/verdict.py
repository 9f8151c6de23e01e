"""The report of one rehearsal: whether it trained as on the CPU, and what is different on MPS."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kohya_mps.core.report import Check, Report, Status

from .operators import Served
from .record import Finding, Kind, Operator, Record

#: Losses of two correct devices differ by rounding alone.
TOLERANCE = 1e-5
#: In half precision autocast rounds other operators on MPS than on the CPU: one step of bfloat16.
HALF_TOLERANCE = 2**-8

LIMITS = (
    "Predicted: no MPS device was seen. Not simulated: numerical differences, memory and speed of the real "
    "device, what differs between versions of macOS, shapes larger than these, and refusals inside a kernel "
    "that torch's code states nowhere.",
)


def report(
    name: str,
    profile: str,
    simulated: Record,
    on_cpu: Record,
    *,
    fallback: bool,
    logs: Mapping[str, str],
    precision: str = "no",
) -> Report:
    """Judge a rehearsal against the same training on the CPU.

    Args:
        name: what was trained.
        profile: the profile whose versions were used.
        simulated: the training on the simulated device.
        on_cpu: the same on the CPU.
        fallback: whether ``PYTORCH_ENABLE_MPS_FALLBACK=1`` was assumed.
        logs: by device, the file with what the trainer printed.
        precision: the mixed precision that was trained in.
    """
    checks = (
        trained(simulated, on_cpu, logs),
        losses(simulated, on_cpu, precision),
        operators(simulated, fallback),
        *(finding(one, survived=not simulated.error) for one in simulated.findings),
    )
    extra = {
        "predicted": True,
        "profile": profile,
        "simulated": simulated,
        "cpu": on_cpu,
        "limits": LIMITS,
        "logs": dict(logs),
    }
    title = f"Rehearsal (predicted) of {name}, {profile}, torch {simulated.torch}"
    return Report(title, checks, extra, (*map(_line, simulated.operators), *LIMITS))


def trained(simulated: Record, on_cpu: Record, logs: Mapping[str, str]) -> Check:
    """Check that the training came to its end on the simulated device."""
    if not simulated.error:
        detail = (
            f"{len(simulated.losses)} steps in {simulated.seconds:.1f} s, on the CPU {on_cpu.seconds:.1f} s"
        )
        return Check("training", Status.PASS, detail)
    also = "; the CPU says the same" if same_error(simulated, on_cpu) else ""
    at = f" (at {simulated.error_at})" if simulated.error_at else ""
    return Check("training", Status.FAIL, f"{simulated.error}{at}{also}", f"its log: {logs.get('mps', '')}")


def tolerance(precision: str) -> float:
    """The largest relative difference of losses that two correct devices may have in a mixed precision."""
    return TOLERANCE if precision == "no" else HALF_TOLERANCE


def same_error(simulated: Record, on_cpu: Record) -> bool:
    """Whether a training fails with the same error on the CPU: then MPS is not the reason."""
    return bool(simulated.error) and simulated.error == on_cpu.error


def losses(simulated: Record, on_cpu: Record, precision: str) -> Check:
    """Check that the losses are those of the CPU, except for rounding."""
    if simulated.error or on_cpu.error:
        return Check("losses", Status.SKIP, "there is nothing to compare")
    largest = difference(simulated, on_cpu)
    shown = ", ".join(f"{loss:.6f}" for loss in simulated.losses)
    return Check.of(
        "losses",
        largest <= tolerance(precision),
        f"{shown}; {largest:.1e} relative from the CPU's",
        "the simulation, or an operator's decomposition, computes something else",
    )


def difference(simulated: Record, on_cpu: Record) -> float:
    """The largest relative difference of a loss; infinite when a loss is missing or not finite."""
    if len(simulated.losses) != len(on_cpu.losses) or not simulated.losses:
        return math.inf
    pairs = zip(simulated.losses, on_cpu.losses, strict=True)
    differences = [abs(a - b) / abs(b) if b else abs(a) for a, b in pairs]
    return max(value if math.isfinite(value) else math.inf for value in differences)


def operators(simulated: Record, fallback: bool) -> Check:
    """Check that everything that reached the device is served there."""
    counts = [(simulated.count(served), str(served)) for served in Served]
    detail = f"{len(simulated.operators)} distinct: " + ", ".join(f"{count} {name}" for count, name in counts)
    missing = [operator.name for operator in simulated.operators if operator.served is Served.MISSING]
    if not simulated.operators:
        return Check("operators", Status.SKIP, "none reached the device")
    if missing and fallback:
        return Check("operators", Status.WARN, detail, f"slow on the CPU: {', '.join(missing)}")
    return Check.of("operators", not missing, detail, f"no MPS kernel: {', '.join(missing)}; see --fallback")


def finding(one: Finding, *, survived: bool) -> Check:
    """One finding as a row; an error is a failure unless the program caught it."""
    times = f" ({one.count} times)" if one.count > 1 else ""
    detail = f"{one.what} at {one.where}{times}"
    if one.raises:
        status = Status.WARN if survived else Status.FAIL
        return Check(one.kind, status, f"{detail}: {one.raises}", "the program caught it" if survived else "")
    if one.kind is Kind.CUDA:
        return Check(one.kind, Status.PASS, f"{detail}: harmless, it returned")
    return Check(one.kind, Status.WARN, detail, "computed on the CPU, which is slow")


def _line(operator: Operator) -> str:
    by = f" by {operator.by}" if operator.by else ""
    return f"{operator.name}: {operator.served}{by}, {operator.count} times, first at {operator.where}"
