"""The public DeepLOB network with weights that others trained, and what quantising it costs.

The layout is that of the authors' published PyTorch notebook; an npz file of its arrays gives the
weights. Its LSTM stays one ONNX LSTM node: 82 unrolled steps would need 82 copies of one weight,
since ONNX Runtime's optimiser fails where quantised products share one, while the node becomes one
DynamicQuantizeLSTM of int8 weights where ``op_types`` asks for it.

Normalisation stands behind the activation here. It is folded into the next product where no padding
intervenes: into ten of the fourteen convolutions, and not before a (3, 1) or (5, 1) "same" one,
the pooling and the LSTM.

Source: Zhang, Zohren, Roberts (2019), "DeepLOB: Deep Convolutional Neural Networks for Limit Order
Books", and its public implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from torch import nn

from feeds.errors import InputError
from models.dataset import Normalisation, Rows
from models.foreign.check import checked
from models.foreign.folding import with_folded_norms
from models.foreign.passes import MACS, preprocessed, tidied
from models.foreign.quantise import quantise_static
from models.foreign.runtime import fused_nodes, int8_nodes, latency, opened
from models.foreign.torch_module import exported

WINDOW: Final = 100
COLUMNS: Final = 40  # price and size of ten levels of both sides, as in the engine's first features
CLASSES: Final = 3
LEAK: Final = 0.01
CLIP: Final = 4.0  # what the engine's normaliser does to an input, by default
LATENCY_RUNS: Final = 300
# On rows unlike those it was trained on, a few channels of the first block, which normalisation
# multiplies by several hundred, spread so widely that 8 bits lose the others.
WIDE_LAYERS: Final = ("conv1.3", "conv1.6", "conv2.0")
WITH_LSTM: Final = ("Conv", "Gemm", "MatMul", "LSTM")


class DeepLob(nn.Module):
    """float32 (n, 1, 100, 40) to logits (n, 3); attribute names are those of the arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = _block(1, (1, 2), (1, 2), nn.LeakyReLU(LEAK))
        self.conv2 = _block(32, (1, 2), (1, 2), nn.Tanh())
        self.conv3 = _block(32, (1, 10), (1, 1), nn.LeakyReLU(LEAK))
        self.inp1 = nn.Sequential(*_same(32, 1), *_same(64, 3))
        self.inp2 = nn.Sequential(*_same(32, 1), *_same(64, 5))
        self.inp3 = nn.Sequential(nn.MaxPool2d((3, 1), stride=1, padding=(1, 0)), *_same(32, 1))
        self.lstm = nn.LSTM(192, 64, batch_first=True)
        self.fc1 = nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores before the Softmax."""
        x = self.conv3(self.conv2(self.conv1(x)))
        x = torch.cat((self.inp1(x), self.inp2(x), self.inp3(x)), dim=1)
        steps, _ = self.lstm(x.permute(0, 2, 1, 3).squeeze(3))
        return self.fc1(steps[:, -1, :])


def _block(
    channels: int, size: tuple[int, int], stride: tuple[int, int], activation: nn.Module
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for conv in (
        nn.Conv2d(channels, 32, size, stride=stride),
        nn.Conv2d(32, 32, (4, 1)),
        nn.Conv2d(32, 32, (4, 1)),
    ):
        layers += [conv, activation, nn.BatchNorm2d(32)]
    return nn.Sequential(*layers)


def _same(channels: int, rows: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(channels, 64, (rows, 1), padding=(rows // 2, 0))
    return conv, nn.LeakyReLU(LEAK), nn.BatchNorm2d(64)


def deeplob(npz_path: str | Path) -> DeepLob:
    """The network of an npz file's arrays, in evaluation mode.

    Raises
    ------
    InputError
        For a file that cannot be read, and arrays other than the network's.
    """
    module = DeepLob().eval()
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    try:
        with np.load(npz_path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise InputError(
            "cannot read the weights",
            where=str(npz_path),
            expected="an npz file of arrays",
            found=str(error),
            fix="correct the path, or copy the file again",
        ) from None
    for name in sorted(expected.keys() | arrays.keys()):
        found = arrays[name].shape if name in arrays else None
        if expected.get(name) != found:
            raise InputError(
                "not the weights of this network",
                where=f"{npz_path}: {name}",
                expected=str(expected.get(name, "no such array")),
                found="no such array" if found is None else str(found),
                fix="use the arrays of the public DeepLOB network",
            )
    module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return module


def deeplob_onnx(npz_path: str | Path, *, folded: bool = True) -> onnx.ModelProto:
    """The network as a float ONNX graph at batch 1, opset 18, its nodes named as its layers.

    Parameters
    ----------
    npz_path : str or Path
    folded : bool
        With normalisation folded into the next product where no padding intervenes.

    Returns
    -------
    ModelProto
        ``x`` float32 (1, 1, 100, 40) to ``logits`` float32 (1, 3).

    Raises
    ------
    InputError
        See `deeplob`.
    """
    module = deeplob(npz_path)
    example = (torch.zeros(1, 1, WINDOW, COLUMNS),)
    model = checked(exported(module, example, str(npz_path))[0], str(npz_path))
    for node in model.graph.node:
        if node.op_type in MACS:
            node.name = node.input[1].removesuffix(".weight")
        elif node.op_type == "LSTM":
            node.name = "lstm"
    model = tidied(preprocessed(model))
    return with_folded_norms(model) if folded else model


def windows(rows: Rows, *, clip: float = CLIP) -> tuple[np.ndarray, np.ndarray]:
    """Windows of calibration and of comparison: rows of the first and of the last third.

    Parameters
    ----------
    rows : Rows
        Of one or more streams, instrument after instrument.
    clip : float
        Of the normaliser, which is fitted on the first third.

    Returns
    -------
    first, last : ndarray of float32, shape (n, 1, 1, 100, 40)
        Views; a window of the last third may begin before it, and none crosses a stream.

    Raises
    ------
    InputError
        If a third has fewer rows than a window.
    """
    third = len(rows) // 3
    if third < 2 * WINDOW:
        raise InputError(
            "too few rows",
            where="rows",
            expected=f"{6 * WINDOW} or more",
            found=str(len(rows)),
            fix="use a longer stretch of the tape",
        )
    vector = rows.vector[:, :COLUMNS]
    x = Normalisation.fit(vector[:third], clip).apply(vector)
    seen = np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis=0).transpose(0, 2, 1)
    stream = np.cumsum(rows.starts)
    whole = np.flatnonzero(stream[WINDOW - 1 :] == stream[: len(seen)])
    newest = whole + WINDOW - 1
    first, last = whole[newest < third], whole[newest >= len(rows) - third]
    return seen[first][:, None, None], seen[last][:, None, None]


@dataclass(frozen=True)
class Setting:
    """Arguments of `models.foreign.quantise.quantise_static`."""

    observer: str = "percentile-99.99"
    per_channel: bool = True
    symmetric: bool = False
    exclude: tuple[str, ...] = ()
    op_types: tuple[str, ...] | None = None


CHOSEN: Final = Setting("percentile-99.9", exclude=WIDE_LAYERS, op_types=WITH_LSTM)
SETTINGS: Final = (
    *(
        Setting(observer, exclude=exclude)
        for exclude in ((), WIDE_LAYERS)
        for observer in (
            "minmax",
            "moving-average",
            "percentile-99.99",
            "percentile-99.9",
            "coverage-95",
            "entropy",
            "mse",
        )
    ),
    Setting("percentile-99.9", per_channel=False, exclude=WIDE_LAYERS),
    Setting("percentile-99.9", symmetric=True, exclude=WIDE_LAYERS),
    CHOSEN,
)


def measure_deeplob(
    npz: str | Path,
    rows: Rows,
    *,
    settings: Sequence[Setting] = (CHOSEN,),
    clip: float = CLIP,
    most: int | None = None,
) -> dict[str, Any]:
    """Class agreement, size and latency of the static INT8 network against the float one.

    Parameters
    ----------
    npz : str or Path
        Weights; see `deeplob`.
    rows : Rows
        Real features. Normalised and calibrated on the first third, compared on the last.
    settings : sequence of Setting
    clip : float
        See `windows`.
    most : int, optional
        At most so many windows of each third, evenly spaced.

    Returns
    -------
    dict
        ``windows``, ``predicted`` (how often FP32 names each class), ``fp32_bytes``, ``fp32_us``
        (p50, p99), and ``settings``: for each its arguments, ``agreement``, ``size_ratio``,
        ``int8_nodes``, ``fused`` (nodes by operator) and ``int8_us`` (p50, p99).
    """
    first, last = windows(rows, clip=clip)
    if most is not None:
        first, last = (part[:: max(1, -(-len(part) // most))] for part in (first, last))
    model = deeplob_onnx(npz)
    size, example = model.ByteSize(), {"x": np.ascontiguousarray(last[0])}
    expected = _classes(model, last)
    results = []
    for setting in settings:
        feeds = ({"x": window} for window in first)
        int8, _ = quantise_static(model, feeds, **asdict(setting))
        results.append(
            {
                **asdict(setting),
                "agreement": float((_classes(int8, last) == expected).mean()),
                "size_ratio": int8.ByteSize() / size,
                "int8_nodes": int8_nodes(int8),
                "fused": fused_nodes(int8),
                "int8_us": latency(int8, example, LATENCY_RUNS),
            }
        )
    return {
        "windows": len(last),
        "predicted": np.bincount(expected, minlength=CLASSES).tolist(),
        "fp32_bytes": size,
        "fp32_us": latency(model, example, LATENCY_RUNS),
        "settings": results,
    }


def _classes(model: onnx.ModelProto, inputs: np.ndarray) -> np.ndarray:
    """The class that a model names for each window."""
    session = opened(model)
    return np.array([session.run(["logits"], {"x": x})[0].argmax() for x in inputs])
