"""What happens to numbers on their way through a network: nothing, observing, fake quantisation.

`models.execute.run` interprets an architecture and asks a `Numerics` at each weight, bias and
point. `FloatNumerics` leaves all as it is, `ObservingNumerics` shows every point to its observer,
`SchemeNumerics` quantises by a finished scheme, and `TrainedNumerics`
(`models/training_quantised.py`) by scales that are learnt along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from models.scheme import UINT8_MAX, Scheme


class Numerics(Protocol):
    """What happens to numbers on their way; every method takes and gives tensors of one shape."""

    quantised: bool

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """A layer's weight as it is served, as float."""
        ...

    def bias(self, name: str, bias: Tensor, point: str) -> Tensor:
        """A layer's bias, whose input comes from ``point``."""
        ...

    def point(self, name: str, values: Tensor) -> Tensor:
        """Values at a quantisation point."""
        ...

    def scale(self, name: str) -> Tensor:
        """Scale of a point, for the operations that count in its steps."""
        ...

    def wide(self, values: Tensor, scale: float, limit: int) -> Tensor:
        """State kept as wider integers: rounded to ``scale``, saturating at ``limit`` steps."""
        ...

    def keeps(self, name: str) -> bool:
        """Whether a layer or operation stays in floating point."""
        ...


class FloatNumerics:
    """Nothing happens."""

    quantised = False

    def weight(self, name: str, weight: Tensor) -> Tensor:
        return weight

    def bias(self, name: str, bias: Tensor, point: str) -> Tensor:
        return bias

    def point(self, name: str, values: Tensor) -> Tensor:
        return values

    def scale(self, name: str) -> Tensor:
        raise AssertionError("a float network has no scales")

    def wide(self, values: Tensor, scale: float, limit: int) -> Tensor:
        return values

    def keeps(self, name: str) -> bool:
        return True


class ObservingNumerics(FloatNumerics):
    """Float, and every point's values go to its observer.

    Parameters
    ----------
    observers : mapping of str to observer
        See `models.observers`; a point without one is passed over.
    skip : int
        Steps at the start of each sequence that only fill the state.
    """

    def __init__(self, observers: Mapping[str, Any], skip: int = 0) -> None:
        self._observers = observers
        self.skip = skip
        self._steps: dict[str, int] = {}

    def begin(self) -> None:
        """A new batch of sequences starts."""
        self._steps = {}

    def point(self, name: str, values: Tensor) -> Tensor:
        observer = self._observers.get(name)
        if observer is not None:
            if values.dim() == 2:  # one step of a recurrent cell
                step = self._steps[name] = self._steps.get(name, 0) + 1
                seen = values if step > self.skip else values[:0]
            else:
                seen = values[:, self.skip :]
            if seen.numel():
                observer.update(seen.detach().numpy())
        return values


class _Quantise(torch.autograd.Function):
    """Fake quantisation with learnt step size (Esser et al. 2020, LSQ; Jain et al. 2020, TQT)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: int) -> Tensor:
        steps = values / scale
        codes = steps.round().clamp_(-zero_point, UINT8_MAX - zero_point)
        ctx.save_for_backward(steps, codes)
        ctx.zero_point = zero_point
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        steps, codes = ctx.saved_tensors
        inside = (steps >= -ctx.zero_point) & (steps <= UINT8_MAX - ctx.zero_point)
        per_step = torch.where(inside, codes - steps, codes)
        to_scale = (gradient * per_step).sum() / (gradient.numel() * UINT8_MAX) ** 0.5
        return gradient * inside, to_scale, None


class _Round(torch.autograd.Function):
    """Round half to even; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


quantise = _Quantise.apply
round_through = _Round.apply


class SchemeNumerics:
    """Fake quantisation with the scales of a finished scheme."""

    quantised = True

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self._scales = {
            name: torch.tensor(point.scale, dtype=torch.float32)
            for name, point in scheme.points.items()
        }

    def weight(self, name: str, weight: Tensor) -> Tensor:
        if name in self.scheme.kept:
            return weight.half().float() if self.scheme.kept[name] == "fp16" else weight
        layer = self.scheme.integer_layer(name, weight.detach().numpy(), None, 1.0)
        real = layer.weight.astype(np.float32) * layer.weight_scale[:, None].astype(np.float32)
        return torch.from_numpy(real)

    def bias(self, name: str, bias: Tensor, point: str) -> Tensor:
        if name in self.scheme.kept:
            return bias
        values = bias.detach().numpy()
        layer = self.scheme.integer_layer(
            name,
            np.zeros((len(values), 1), dtype=np.float32),
            values,
            self.scheme.points[point].scale,
        )
        assert layer.bias is not None
        return torch.from_numpy((layer.bias * layer.bias_scale).astype(np.float32))

    def point(self, name: str, values: Tensor) -> Tensor:
        return quantise(values, self._scales[name], self.scheme.points[name].zero_point)

    def scale(self, name: str) -> Tensor:
        return self._scales[name]

    def wide(self, values: Tensor, scale: float, limit: int) -> Tensor:
        return wide_steps(values, scale, limit)

    def keeps(self, name: str) -> bool:
        return name in self.scheme.kept


def wide_steps(values: Tensor, scale: float, limit: int) -> Tensor:
    """Round to multiples of ``scale`` and saturate; the gradient passes inside."""
    return round_through(values / scale).clamp(-limit, limit) * scale


FLOAT: Final = FloatNumerics()
