"""Models in another process: their weights in memory that both see, the rest as a pickle.

The weights are read from the model and written into one block at each snapshot. The pickle holds
the modules with places in that block instead of tensors, and without what a trainer hung onto them.
"""

import io
import mmap
import os
import pickle
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

Models = Sequence[Any]  # modules, or None
Place = tuple[int, torch.dtype, torch.Size, bool]  # offset, ..., is a parameter

ALIGNMENT = 64  # as torch's own allocator, on which a product's last bit may depend
# A fused head or autocast around the original forward; the sampling process has its own.
WRAPPED = ("forward", "_original_forward")
FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# They let gradients into a frozen embedding; sampling has no gradients.
GRADIENT_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")


def named_tensors(models: Models) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the models, tied ones once, in an order that a copy shares."""
    for i, model in enumerate(models):
        if model is not None:
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                yield f"{i}.{name}", tensor


class Memory:
    """A block that two processes map; it is gone when both have let go of it."""

    def __init__(self, size: int, file: int | None = None) -> None:
        self.size = max(size, 1)
        self.file = _anonymous_file(self.size) if file is None else file
        weakref.finalize(self, os.close, self.file)
        self._bytes = torch.frombuffer(mmap.mmap(self.file, self.size), dtype=torch.uint8)

    def view(self, place: Place) -> Tensor:
        offset, dtype, shape, _ = place
        return self._bytes[offset : offset + dtype.itemsize * shape.numel()].view(dtype).view(shape)


def _anonymous_file(size: int) -> int:
    """A file without a name. Memory where the system can: /dev/shm is small in containers."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("trl_ext_weights")
    else:
        with tempfile.TemporaryFile() as named:
            file = os.dup(named.fileno())
    os.truncate(file, size)
    return file


class Snapshot:
    """The weights of some models as they were when it was last taken."""

    def __init__(self, models: Models) -> None:
        self.models, self.places = models, {}
        offset = 0
        for name, tensor in named_tensors(models):
            _refuse_sharded(name, tensor)
            is_parameter = isinstance(tensor, nn.Parameter)
            self.places[name] = (offset, tensor.dtype, tensor.shape, is_parameter)
            offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.memory = Memory(offset)

    @torch.no_grad()
    def take(self) -> None:
        """Copies the weights of now.

        Raises:
            ValueError: if the models have gained, lost or reshaped a tensor.
        """
        tensors = dict(named_tensors(self.models))
        found = {(name, t.dtype, t.shape) for name, t in tensors.items()}
        known = {(name, dtype, shape) for name, (_, dtype, shape, _) in self.places.items()}
        if found != known:
            changed = {name for name, *_ in found ^ known}
            raise ValueError(
                f"model has changed its tensors since its first snapshot: {sorted(changed)[:3]}. "
                "Make such changes before training starts."
            )
        for name, tensor in tensors.items():
            self.memory.view(self.places[name]).copy_(tensor)

    def pickled_models(self) -> bytes:
        """The models without their weights, for `unpickled_models`.

        Raises:
            ValueError: if a part of a model cannot be sent to another process.
        """
        file = io.BytesIO()
        numbers = {id(t): i for i, (_, t) in enumerate(named_tensors(self.models))}
        try:
            _ModelPickler(file, numbers, self.models).dump(tuple(self.models))
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"model cannot be sent to the sampling process: {error}. Define its classes and "
                "hooks at the top level of a module, or train with schedule='sync'."
            ) from error
        return file.getvalue()


def unpickled_models(data: bytes, memory: Memory, places: Sequence[Place]) -> Models:
    """Models whose weights lie in `memory`."""
    tensors = [
        nn.Parameter(memory.view(place), requires_grad=False) if place[3] else memory.view(place)
        for place in places
    ]
    unpickler = pickle.Unpickler(io.BytesIO(data))
    unpickler.persistent_load = tensors.__getitem__  # type: ignore[method-assign]
    return unpickler.load()


class _ModelPickler(pickle.Pickler):
    """Writes places for weights, and modules without what a trainer hung onto them."""

    def __init__(self, file: io.BytesIO, numbers: dict[int, int], roots: Models) -> None:
        super().__init__(file)
        self._numbers = numbers
        self._roots = [id(root) for root in roots]

    def persistent_id(self, obj: Any) -> int | None:
        return self._numbers.get(id(obj)) if isinstance(obj, Tensor) else None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, RemovableHandle):
            return RemovableHandle, (OrderedDict(),)  # it would bring all hooks along
        if not isinstance(obj, nn.Module):
            return NotImplemented
        wrapped = id(obj) in self._roots or isinstance(obj, PreTrainedModel)
        if not wrapped and "forward" in vars(obj):
            raise ValueError(
                f"model has a {type(obj).__name__} whose forward was replaced, which cannot be "
                "sent to the sampling process. Leave cast_lm_head_to_fp32 and use_liger_kernel at "
                "False, or train with schedule='sync'."
            )
        reduced: Any = obj.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
        function, arguments, state, *rest = reduced
        state = dict(state)
        for name in WRAPPED:
            state.pop(name, None)
        for name in [name for name in state if name.endswith("_hooks")]:
            kept = state[name].items() if name in FORWARD_HOOKS else ()
            state[name] = type(state[name])(
                (key, hook)
                for key, hook in kept
                if getattr(hook, "__name__", "") not in GRADIENT_HOOKS
            )
        return function, arguments, state, *rest


def _refuse_sharded(name: str, tensor: Tensor) -> None:
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or hasattr(tensor, "ds_id"):
        raise ValueError(
            f"model: {name[2:]} is a {type(tensor).__name__} that is sharded or quantised, and "
            "cannot be copied into another process. Use DDP and plain weights, or a vLLM server."
        )
