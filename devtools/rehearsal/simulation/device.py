"""The simulated device: tensors that report ``mps:0``, hold a CPU tensor, and compute with it.

A tensor carries the MPS dispatch key. Exactly the overloads that a Mac's torch registers under
that key have a dummy kernel here. So torch's own dispatcher does what it does on a Mac: an
overload without a kernel is decomposed or refused, and autograd uses the same formulas. Each
overload that arrives is recorded, checked against what the real device refuses, and computed
on the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..operators import Operators, Served
from ..record import Kind
from . import refusals
from .recorder import Recorder

DEVICE = torch.device("mps:0")
_CPU = torch.device("cpu")

# The random generators of the device, by the address of the C++ object. They are kept so that
# no other object gets the same address.
GENERATORS: dict[int, Any] = {}

# Composite operators that look up their device in C++ and call one of its kernels; builds for
# Linux leave that branch out. Each with the kernel that serves it on a Mac:
# ATen/native/Convolution.cpp, Copy.cpp and TensorConversions.cpp of torch 2.5.1.
BY_DEVICE = {
    "convolution": "_mps_convolution",
    "_convolution": "_mps_convolution",
    "convolution_overrideable": "_mps_convolution",
    "convolution_backward": "mps_convolution_backward",
    "_to_copy": "_copy_from",
    "clone": "_copy_from",
    "copy_": "_copy_from",
}

# Composite operators that only allocate: inside there is an ``empty`` and at most a ``fill_``.
_ALLOCATE = {
    "empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full",
    "new_empty_strided", "rand_like", "randn_like", "randint_like", "randint_like.low_dtype", "zeros", "ones",
    "full", "rand", "randn", "randint", "randint.low", "scalar_tensor", "arange", "linspace", "eye",
}  # fmt: skip

# Composite operators whose decomposition the simulation cannot follow: they make a view of the
# storage without the dispatcher, or change a tensor's shape in place.
_CLOSED = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided_", "detach", "detach_", "is_pinned", "lift",
    "lift_fresh", "resize_", "set_.source_Tensor", "unsafe_chunk", "unsafe_split.Tensor",
    "unsafe_split_with_sizes",
}  # fmt: skip

# Arguments may be on different devices (ATen/native/Copy.cpp, TensorAdvancedIndexing.cpp).
_ACROSS_DEVICES = {"copy_", "_to_copy", "set_.source_Tensor"}
_INDEXING = {"index.Tensor", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index.Tensor"}

# These return something that is not a tensor of the device.
_NOT_ON_THE_DEVICE = {"_local_scalar_dense", "is_same_size", "equal", "item", "is_nonzero"}


class SimulatedTensor(torch.Tensor):
    """A tensor on the simulated device; ``cpu_tensor`` is the CPU tensor with its values."""

    cpu_tensor: torch.Tensor
    simulator: Simulator

    @staticmethod
    def __new__(cls: type[SimulatedTensor], cpu_tensor: torch.Tensor) -> SimulatedTensor:
        tensor: SimulatedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            cpu_tensor.size(),
            strides=cpu_tensor.stride(),
            storage_offset=cpu_tensor.storage_offset(),
            dtype=cpu_tensor.dtype,
            layout=cpu_tensor.layout,
            device=DEVICE,
        )
        tensor.cpu_tensor = cpu_tensor
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return cls.simulator.run(func, args, kwargs or {})

    @property
    def is_mps(self) -> bool:
        return True

    def __repr__(self, **_options: Any) -> str:
        return f"simulated mps {self.cpu_tensor!r}"

    # torch.nn.Module.to() then swaps a parameter's content and keeps the parameter, as it
    # does on a Mac, where the two kinds of tensor are compatible.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["cpu_tensor"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_rest: Any) -> SimulatedTensor:
        return SimulatedTensor(inner["cpu_tensor"])

    # Programs compare these to find out what shares memory.
    def data_ptr(self) -> int:
        return self.cpu_tensor.data_ptr()

    def untyped_storage(self) -> Any:
        return self.cpu_tensor.untyped_storage()

    def numpy(self, **_options: Any) -> Any:
        raise TypeError(
            "can't convert mps:0 device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def tolist(self) -> Any:
        return self.cpu_tensor.tolist()

    # The values are saved; the loader decides to which device they go.
    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.cpu_tensor.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> SimulatedTensor:
        copy: Any = SimulatedTensor(self.cpu_tensor.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy


class _Everywhere(TorchDispatchMode):
    """Lets the simulator see what is created on the device, such as by ``torch.zeros``."""

    def __init__(self, simulator: Simulator) -> None:
        super().__init__()
        self.simulator = simulator

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.simulator.run(func, args, kwargs or {})


class Simulator:
    """Runs every operation of the device.

    Args:
        operators: what a Mac's torch of this version registers.
        recorder: notes everything that happens.
        fallback: whether ``PYTORCH_ENABLE_MPS_FALLBACK=1`` is assumed: operators without
            kernel then run on the CPU instead of raising.
    """

    def __init__(self, operators: Operators, recorder: Recorder, *, fallback: bool) -> None:
        self.operators = operators
        self.recorder = recorder
        self.fallback = fallback
        self._mode = _Everywhere(self)
        self.library = torch.library.Library("aten", "IMPL")
        self._plans: dict[Any, _Plan] = {}
        self._refusals = refusals.Refusals(operators.torch, operators.texts)
        self._python = {name: _function(path) for name, path in operators.python.items()}

    def install(self) -> None:
        """Register the dummy kernels and see every operation from now on, in all threads."""
        SimulatedTensor.simulator = self
        for name in sorted(self.operators.registered):
            self.library.impl(name, _never_reached, "MPS")
        self._mode.__enter__()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation; without a tensor of the device it is the CPU's own."""
        simulated, others = _tensors(args, kwargs)
        target = kwargs.get("device")
        arrives = target is not None and torch.device(target).type == "mps"
        if not simulated and not arrives:
            return func(*args, **kwargs)
        plan = self._plans.get(func) or self._plan(func)
        self.recorder.operator(plan.name, plan.served, plan.by)
        if arrives:
            self._check_generator(plan, kwargs)
        elif others and plan.name not in _ACROSS_DEVICES:
            self._check_devices(plan, args, others)
        if plan.served is Served.MISSING:
            self._missing(func)
        elif plan.served is Served.FALLBACK:
            self.recorder.finding(Kind.FALLBACK, plan.name)
        if plan.decomposition is not None and simulated:
            with self._mode:  # so that the parts are seen, too
                return plan.decomposition(*args, **kwargs)
        if refusal := self._refusals.reason(plan.name, args, kwargs):
            self._refuse(Kind.REFUSED, plan.name, refusal)
        return self._compute(plan, args, kwargs, simulated, leaves=target is not None and not arrives)

    def _compute(
        self,
        plan: _Plan,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        simulated: list[SimulatedTensor],
        leaves: bool,
    ) -> Any:
        """Compute with the CPU tensors; the outcome is on the device unless the operation ``leaves`` it."""
        if kwargs:
            kwargs = {key: _on_cpu(value) for key, value in kwargs.items()}
            if kwargs.get("device") is not None and not leaves:
                kwargs["device"] = _CPU
                kwargs.pop("pin_memory", None)
        outcome = plan.cpu(*[_on_cpu(value) for value in args], **kwargs)
        if leaves or plan.name in _NOT_ON_THE_DEVICE:
            return outcome
        if isinstance(outcome, torch.Tensor):
            return self._arrive(plan, outcome, simulated)
        if isinstance(outcome, (list, tuple)):
            return type(outcome)(
                self._arrive(plan, part, simulated) if isinstance(part, torch.Tensor) else part
                for part in outcome
            )
        return outcome

    def _arrive(
        self, plan: _Plan, cpu_tensor: torch.Tensor, simulated: list[SimulatedTensor]
    ) -> torch.Tensor:
        for tensor in simulated:  # an operation in place returns its argument
            if tensor.cpu_tensor is cpu_tensor:
                if tensor.shape != cpu_tensor.shape or tensor.stride() != cpu_tensor.stride():
                    _reshape(tensor, plan.name)
                return tensor
        if error := self._refusals.dtype(cpu_tensor.dtype):
            kind = Kind.FLOAT64 if cpu_tensor.dtype == torch.float64 else Kind.REFUSED
            self._refuse(kind, f"{plan.name} to {cpu_tensor.dtype}", error)
        return SimulatedTensor(cpu_tensor)

    def _check_generator(self, plan: _Plan, kwargs: dict[str, Any]) -> None:
        generator = kwargs.get("generator")
        if generator is not None and generator._cdata not in GENERATORS:
            error = RuntimeError("Expected a 'mps' device type for generator but found 'cpu'")
            self._refuse(Kind.MIXED, plan.name, error)

    def _check_devices(self, plan: _Plan, args: tuple[Any, ...], others: list[torch.Tensor]) -> None:
        indexed = args[0] if plan.name in _INDEXING else None
        if error := refusals.devices(others, indexed):
            self._refuse(Kind.MIXED, plan.name, error)

    def _missing(self, func: Any) -> None:
        if self.fallback:
            self.recorder.finding(Kind.MISSING, func.name())
            return
        error = NotImplementedError(
            f"The operator '{func.name()}' is not currently implemented for the MPS device."
        )
        self._refuse(Kind.MISSING, func.name(), error)

    def _refuse(self, kind: Kind, what: str, error: Exception) -> NoReturn:
        self.recorder.finding(kind, what, f"{type(error).__name__}: {error}")
        raise error

    def _plan(self, func: Any) -> _Plan:
        plan = self._plans[func] = _Plan(func, self.operators, self._python)
        return plan


class _Plan:
    """What is done with an overload; decided when it arrives for the first time."""

    def __init__(self, func: Any, operators: Operators, python: dict[str, Callable[..., Any]]) -> None:
        namespace, _, name = func.name().partition("::")
        self.name = name if namespace == "aten" else func.name()
        implicit = _has(func, "CompositeImplicitAutograd")
        explicit = _explicit_key(func)
        self.served = operators.served(self.name, implicit or explicit is not None)
        self.by = _kernel_behind(self.name, operators) if self.served is Served.COMPOSITE else ""
        # Without a decomposition the CPU's kernel is called; linear_backward has none there.
        self.cpu: Callable[..., Any] = _linear_backward if self.name == "linear_backward" else func
        self.decomposition: Callable[..., Any] | None = None
        if self.served is Served.PYTHON:
            self.decomposition = python[self.name]
        elif self.served is Served.COMPOSITE and implicit:
            self.decomposition = func.decompose
        elif (
            self.served is Served.COMPOSITE
            and not self.by
            and self.name not in _ALLOCATE | _CLOSED
            and not func.is_view
        ):
            self.decomposition = lambda *args, **kwargs: func._op_dk(explicit, *args, **kwargs)


def _kernel_behind(name: str, operators: Operators) -> str:
    """The MPS kernel that a composite operator calls where the dispatcher does not see it.

    These are the operators that choose by device, and those that make an empty result and call
    their ``.out`` variant, which would then have to change the result's shape.
    """
    out = f"{name}.out"
    return BY_DEVICE.get(name, out if out in operators.kernels else "")


def _reshape(tensor: SimulatedTensor, name: str) -> None:
    """Give a tensor the shape that an operation in place gave to its CPU tensor."""
    cpu_tensor = tensor.cpu_tensor
    try:
        as_strided_ = torch.ops.aten.as_strided_.default
        as_strided_._op_dk(
            _explicit_key(as_strided_),
            tensor,
            cpu_tensor.size(),
            cpu_tensor.stride(),
            cpu_tensor.storage_offset(),
        )
    except RuntimeError as error:
        raise NotImplementedError(
            f"the rehearsal cannot follow how {name} changes a shape in place"
        ) from error


def _explicit_key(func: Any) -> Any:
    """The dispatch key under which an overload has a kernel for every backend; None without one."""
    for key in ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"):
        if _has(func, key):
            return getattr(torch._C.DispatchKey, key)
    return None


def _has(func: Any, key: str) -> bool:
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), getattr(torch._C.DispatchKey, key))
    )


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _tensors(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[SimulatedTensor], list[torch.Tensor]]:
    """The tensors of the device among the arguments, and the others. Called for every operation."""
    simulated: list[SimulatedTensor] = []
    others: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, SimulatedTensor):
            simulated.append(value)
        elif isinstance(value, torch.Tensor):
            others.append(value)
        elif isinstance(value, (list, tuple)):
            for part in value:
                if isinstance(part, SimulatedTensor):
                    simulated.append(part)
                elif isinstance(part, torch.Tensor):
                    others.append(part)
    return simulated, others


def _on_cpu(value: Any) -> Any:
    if isinstance(value, SimulatedTensor):
        return value.cpu_tensor
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(part) for part in value)
    return value


def _never_reached(*_args: Any, **_kwargs: Any) -> Any:
    raise AssertionError("a dummy MPS kernel was reached: the simulation let a tensor through")


def _linear_backward(
    tensor: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor, output_mask: list[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients that ``mps_linear_backward`` computes (native_functions.yaml has no CPU kernel for it)."""
    rows = gradient.reshape(-1, gradient.shape[-1])
    return (
        gradient @ weight if output_mask[0] else None,
        rows.t() @ tensor.reshape(-1, tensor.shape[-1]) if output_mask[1] else None,
        rows.sum(0) if output_mask[2] else None,
    )
