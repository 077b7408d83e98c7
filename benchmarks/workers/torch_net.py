"""A network in torch, channels first, and the way back to Keras's layout.

Chains of layers are built of torch's own modules; other models by Keras, on its torch backend.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from serve import Device, Work
from stateless import stateless
from torch import nn
from torch.func import functional_call

VERSIONS = {"torch": torch.__version__}
_PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device() -> Device:
    """Say what torch runs on."""
    if _PLACE.type == "cpu":
        return Device()
    torch.backends.cudnn.allow_tf32 = False  # as all the others: float32
    cuda = torch.cuda
    return Device(
        cuda.get_device_name(),
        cuda.synchronize,
        cuda.reset_peak_memory_stats,
        lambda: cuda.max_memory_allocated() / 1e6,
        lambda: cuda.memory_allocated() / 1e6,
    )


@dataclasses.dataclass
class Layer:
    """A layer with weights.

    Attributes
    ----------
    name : str
        In the module.
    module : nn.Linear or nn.Conv2d
        Itself.
    before : tuple of int
        (channels, height, width) that were laid flat before it; empty if none were.
    """

    name: str
    module: nn.Module
    before: tuple[int, ...] = ()

    def kernel(self, found: torch.Tensor) -> np.ndarray:
        """Return (..., *weight) of torch's layout in Keras's."""
        if isinstance(self.module, nn.Conv2d):
            return array(found.movedim((-2, -1, -3, -4), (-4, -3, -2, -1)))
        found = array(found.movedim(-1, -2))  # (..., in, out)
        return found[..., self.order(), :] if self.before else found

    def order(self) -> np.ndarray:
        """Return, for each input number in Keras's order, where torch has it."""
        if isinstance(self.module, nn.Conv2d):
            _, channels, *size = self.module.weight.shape
            return _channels_last((channels, *size))
        if self.before:
            return _channels_last(self.before)
        return np.arange(self.module.weight.shape[1])


class Net:
    """The module with the run's weights, and the data in its layout.

    Attributes
    ----------
    module : nn.Sequential
        The network, to logits.
    x, y : torch.Tensor
        Examples with their channels first, and labels.
    layers : list of Layer
        Those with weights, in order.
    """

    def __init__(self, work: Work):
        if not work.about["layers"]:
            raise NotImplementedError("this model is written in Keras only, not in torch's modules")
        modules, self.layers = [], []
        weights = iter(work.weights)
        shape = _channels_first(work.about["shape"])
        before: tuple[int, ...] = ()
        for kind, *args in work.about["layers"]:
            module, after = _built(kind, args, shape)
            if kind == "flatten":
                before = shape
            if kind in ("dense", "conv"):
                layer = Layer(str(len(modules)), module, before)
                _set(layer, next(weights), next(weights))
                self.layers.append(layer)
                before = ()
            modules.append(module)
            shape = after
        self.module = nn.Sequential(*modules).to(_PLACE)
        self.x, self.y = _data(work)

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """The weights by name, in order."""
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def outputs(self, parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of a batch with other weights."""
        return functional_call(self.module, parameters, (x,))

    def canonical(self, found: list[torch.Tensor]) -> list[np.ndarray]:
        """Return (..., *parameter), one for each parameter, in Keras's layout."""
        arrays = []
        for layer, kernel, bias in zip(self.layers, found[::2], found[1::2], strict=True):
            arrays += [layer.kernel(kernel.detach()), array(bias)]
        return arrays

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Cut (..., P) into (..., *parameter)."""
        parameters = list(self.module.parameters())
        parts = flat.split([p.numel() for p in parameters], -1)
        return [
            part.reshape(*flat.shape[:-1], *p.shape)
            for part, p in zip(parts, parameters, strict=True)
        ]

    def factors(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> list[np.ndarray]:
        """Return each layer's A (I, I) and B (O, O) over their traces, and the traces' product."""
        arrays = []
        for layer, (a, b) in zip(self.layers, pairs, strict=True):
            order = layer.order()
            a, b = array(a)[order][:, order], array(b)
            arrays += [a / np.trace(a), b / np.trace(b), np.trace(a) * np.trace(b)]
        return arrays


class KerasNet:
    """A model that only Keras can say, with what torch.func's transforms ask of a `Net`."""

    def __init__(self, work: Work):
        outputs, weights = stateless(work, "torch")
        self.parameters = {str(n): w.detach().to(_PLACE) for n, w in enumerate(weights)}
        self._outputs = outputs
        self.x, self.y = _data(work)

    def outputs(self, parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of a batch with other weights."""
        return self._outputs(list(parameters.values()), x)

    def canonical(self, found: list[torch.Tensor]) -> list[np.ndarray]:
        """Return (..., *parameter): Keras keeps its layout."""
        return [array(part) for part in found]


def net(work: Work) -> Net | KerasNet:
    """Return the run's network."""
    return Net(work) if work.about["layers"] else KerasNet(work)


def array(found: torch.Tensor) -> np.ndarray:
    """Return a tensor of any device as an array."""
    return found.detach().cpu().numpy()


def pictures(found: torch.Tensor, example: torch.Tensor) -> np.ndarray:
    """Return (..., *example) with the channels last, if it is a picture."""
    return array(found.movedim(-3, -1) if example.ndim == 3 else found)


def _data(work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """Return examples, with the channels of pictures first, and labels."""
    x = torch.tensor(work.x)
    if x.ndim == 4:
        # Of one channel, `contiguous` leaves the strides as if it were last, and Opacus 1.6
        # then reads the next convolution's input wrongly.
        x = x.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
    return x.to(_PLACE), torch.tensor(work.y).to(_PLACE)


def _built(kind: str, args: list[int], shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a layer, and the shape of what it gives."""
    if kind == "dense":
        return nn.Linear(shape[0], args[0]), (args[0],)
    if kind == "conv":
        channels, *sides = shape
        filters, size = args
        return nn.Conv2d(channels, filters, size), (filters, *(s - size + 1 for s in sides))
    if kind == "pool":
        return nn.MaxPool2d(args[0]), (shape[0], *(s // args[0] for s in shape[1:]))
    if kind == "flatten":
        return nn.Flatten(), (int(np.prod(shape)),)
    return {"relu": nn.ReLU, "tanh": nn.Tanh}[kind](), shape


def _set(layer: Layer, kernel: np.ndarray, bias: np.ndarray) -> None:
    if isinstance(layer.module, nn.Conv2d):
        weight = kernel.transpose(3, 2, 0, 1)
    else:
        weight = kernel[np.argsort(layer.order())].T
    with torch.no_grad():
        layer.module.weight.copy_(torch.tensor(np.ascontiguousarray(weight)))
        layer.module.bias.copy_(torch.tensor(bias))


def _channels_first(shape: list[int]) -> tuple[int, ...]:
    return (shape[-1], *shape[:-1]) if len(shape) == 3 else tuple(shape)


def _channels_last(shape: tuple[int, ...]) -> np.ndarray:
    """Return where each number of (height, width, channels) is in (channels, height, width)."""
    return np.arange(np.prod(shape)).reshape(shape).transpose(1, 2, 0).ravel()
