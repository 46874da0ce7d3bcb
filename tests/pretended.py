"""A GPU that is pretended on the CPU: real values under a GPU's rules.

    PYTHONPATH=tests python -m pytest -p pretended tests/engine/test_gpu.py

What fails on a GPU fails here, too: operands on two devices, a copy or a wait while a graph is
recorded, numbers that are read before they have arrived. A graph is the list of its operations, run
again in the memory that they wrote first. The kernels' twins compute, each as one operation. Time,
memory, streams and the kernels themselves are not pretended.
"""

import contextlib
import functools
import os
import sys
import threading
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
CARD = SimpleNamespace(name="pretended", total_memory=80 << 30, multi_processor_count=132)
WAITS = {"item", "tolist", "nonzero", "equal", "__bool__", "__int__", "__float__", "__index__"}
FREE = {"__get__", "__set__", "_has_compatible_shallow_copy_type"}  # of any device, and no work

recording = []  # the operations of the graph that is being recorded; empty, or one list
arriving = []  # (numbers of the CPU, what they will be) of the copies that nothing waited for yet
forbidden = [False]  # whether a wait is an error, as torch.cuda.set_sync_debug_mode says


class OnCard(torch.Tensor):
    """A tensor of the GPU: one of the CPU, whose operations `compute` watches."""

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    device = property(lambda self: GPU)

    def __deepcopy__(self, memo):
        copied = on_card(off_card(self).detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_function__(cls, function, types, inputs=(), options=None):
        return compute(function, inputs, dict(options or {}))


class Watch(TorchFunctionMode):
    """Also what has no tensor among its inputs yet: torch.zeros(3, device="cuda")."""

    def __torch_function__(self, function, types, inputs=(), options=None):
        return compute(function, inputs, dict(options or {}))


def on_card(result):
    """A result of the CPU -> the same as one of the GPU; lists and tuples by their parts."""
    if type(result) is torch.Tensor:
        result.__class__ = OnCard  # no alias, which autograd would take for a view
    elif isinstance(result, (tuple, list)) and not isinstance(result, torch.Size):
        for part in result:
            on_card(part)
    return result


def off_card(tensor):
    with torch._C.DisableTorchFunction():
        return tensor.as_subclass(torch.Tensor) if isinstance(tensor, OnCard) else tensor


def plainly(function, inputs, options):
    with torch._C.DisableTorchFunction():
        return function(*inputs, **options)


def refuse_if_recording(what):
    if recording:
        raise RuntimeError(f"CUDA error: not permitted while a graph is recorded: {what}")


def wait(what):
    """The CPU waits for the GPU: all that is under way arrives."""
    refuse_if_recording(what)
    if forbidden[0] and what != "an event":
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
    for here, numbers in arriving:
        here.copy_(numbers)
    arriving.clear()


def compute(function, inputs, options):
    """An operation of torch -> its result, on the device on which a GPU's program has it."""
    name = getattr(function, "__name__", "")
    tensors = [leaf for leaf in tree_leaves((inputs, options)) if isinstance(leaf, torch.Tensor)]
    there = any(map(is_on_card, tensors))
    if name in FREE:
        result = plainly(function, inputs, options)
        return on_card(result) if there and isinstance(result, torch.Tensor) else result
    if name in ("to", "cpu", "cuda") and tensors:
        return move(name, *inputs, **options)
    if name == "copy_":
        return copy(*inputs, **options)
    if name == "numpy" and there:
        raise TypeError("can't convert a CUDA tensor to numpy")
    options.pop("pin_memory", None)
    if there and name in WAITS:
        wait(name)
    alike = len({is_on_card(tensor) for tensor in tensors if tensor.shape}) <= 1
    if there and name in ("__getitem__", "__setitem__"):
        alike = is_on_card(inputs[0])  # a GPU's tensor takes indices of both
        if any(tensor.dtype == torch.bool for tensor in tensors[1:]):
            wait("a mask as an index")
    if there and not alike:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, cuda and cpu")
    if options.get("device") is not None:
        there = torch.device(options["device"]).type == "cuda"
        options["device"] = "cpu" if there else options["device"]
        if name == "tensor" and there:
            refuse_if_recording("a copy from the CPU")
    result = plainly(function, inputs, options)
    if there and name not in WAITS:
        record(function, inputs, options, on_card(result))
    return result


def is_on_card(tensor):
    return isinstance(tensor, OnCard)


def record(function, inputs, options, result, run=plainly):
    if recording:
        recording[-1].append((run, function, inputs, options, result))


def move(name, tensor, *places, device=None, dtype=None, non_blocking=False, copy=False, **more):
    """tensor.to(...), .cpu(), .cuda()."""
    places = list(places)
    device = {"cpu": "cpu", "cuda": GPU}.get(name, device)
    if places and isinstance(places[0], torch.Tensor):
        device, dtype = places[0].device, places[0].dtype
    elif places:
        for place in places[:2]:
            if isinstance(place, torch.dtype):
                dtype = place
            elif isinstance(place, (torch.device, str)):
                device = place
        non_blocking = non_blocking or places[-1] is True
    here = is_on_card(tensor)
    there = here if device is None else torch.device(device).type == "cuda"
    copy = copy or here != there
    options = dict(more, copy=copy, dtype=dtype or tensor.dtype)
    result = plainly(torch.Tensor.to, (tensor,), options)
    if here and there:
        record(torch.Tensor.to, (tensor,), options, on_card(result))
    elif there:
        refuse_if_recording("a copy from the CPU")
        on_card(result)
    elif here:
        result = off_card(result)
        refuse_if_recording("a copy to the CPU")
        if not non_blocking:
            wait("a copy to the CPU")
        else:
            arriving.append((result, result.clone()))
            result.fill_(float("nan") if result.is_floating_point() else 99)  # until one waits
    return result


def copy(into, source, non_blocking=False):
    """into.copy_(source)."""
    if is_on_card(into) != is_on_card(source):
        refuse_if_recording("a copy between the devices")
    if is_on_card(source) and not is_on_card(into):
        wait("a copy to the CPU")
    plainly(torch.Tensor.copy_, (into, source), {})
    if is_on_card(into):
        record(torch.Tensor.copy_, (into, source), {}, into)
    return into


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self):
        self.operations = []

    def pool(self):
        return 0, 0

    def replay(self):
        refuse_if_recording("a graph")
        for run, function, inputs, options, result in self.operations:
            put(result, run(function, inputs, options))


def put(into, result):
    """Results of an operation that is run again, into the memory of the first time."""
    if isinstance(into, torch.Tensor):
        if into.data_ptr() != result.data_ptr():
            plainly(torch.Tensor.copy_, (into, result), {})
    elif isinstance(into, (tuple, list)):
        for one, other in zip(into, result):
            put(one, other)


@contextlib.contextmanager
def graph(made, pool=None):
    """torch.cuda.graph."""
    refuse_if_recording("a graph")
    recording.append(made.operations)
    try:
        yield
    finally:
        recording.clear()


def stream(*_):
    """torch.cuda.Stream, whose work is done at once; an event is the end of some."""
    event = SimpleNamespace(synchronize=lambda: wait("an event"))
    return SimpleNamespace(
        wait_stream=lambda other: None,
        record_event=lambda: event,
        synchronize=lambda: wait("a stream"),
    )


def one_operation(twin):
    """A kernel's twin counts as one operation, whatever it does inside."""

    def run(function, inputs, options):
        outside = recording[:]
        recording.clear()
        before = forbidden[0]
        forbidden[0] = False
        try:
            return function(*inputs, **options)
        finally:
            forbidden[0] = before
            recording.extend(outside)

    @functools.wraps(twin)
    def watched(*inputs, **options):
        result = run(twin, inputs, options)
        record(twin, inputs, options, result, run)
        return result

    return watched


def forbid_waits(mode):
    forbidden[0] = mode == "error"


def pretend():
    """From here on this process has a GPU."""
    device = torch.device("cuda")
    torch.accelerator.current_accelerator = lambda check_available=False: device
    torch.accelerator.device_count = lambda: 1
    nothing = ("set_device", "empty_cache", "reset_peak_memory_stats", "manual_seed_all")
    made = dict.fromkeys(nothing, lambda *_: None)
    made |= dict(is_available=lambda: True, is_initialized=lambda: True, device_count=lambda: 1)
    made |= dict(current_device=lambda: 0, get_device_name=lambda *_: CARD.name)
    made |= dict(
        get_device_properties=lambda *_: CARD, mem_get_info=lambda *_: (70 << 30, 80 << 30)
    )
    made |= dict(is_bf16_supported=lambda including_emulation=True: True)
    made |= dict(get_rng_state=lambda *_: torch.get_rng_state(), set_rng_state=lambda *_: None)
    made |= dict(Stream=stream, current_stream=stream, CUDAGraph=Graph, graph=graph)
    made |= dict(stream=lambda _: contextlib.nullcontext(), synchronize=lambda *_: wait("all"))
    made |= dict(is_current_stream_capturing=lambda: bool(recording))
    made |= dict(set_sync_debug_mode=forbid_waits)
    for name, value in made.items():
        setattr(torch.cuda, name, value)
    made_generator = torch.Generator

    class Generator:
        def __new__(cls, device=None):
            return made_generator()

    torch.Generator = Generator
    torch.Tensor.pin_memory = lambda tensor: tensor.clone()
    apply = torch.nn.Module._apply

    def apply_in_place(module, function, recurse=True):  # model.cuda() keeps its parameters
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return apply(module, function, recurse)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    torch.nn.Module._apply = apply_in_place
    Watch().__enter__()
    run = threading.Thread.run

    def run_watched(thread):
        with Watch():
            run(thread)

    threading.Thread.run = run_watched
    sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))
    import kernels

    kernels.compiles = lambda device: False
    for name in [name for name in vars(kernels) if name.endswith("_twin")]:
        setattr(kernels, name, one_operation(getattr(kernels, name)))


pretend()
