"""Training: windows of consecutive rows, AdamW, class-weighted cross entropy; resumable, seeded.

The same arguments give the same bits on the same CPU model and torch version: initial weights and
the order of the windows come from the seed, sums run on one thread. After each epoch everything
that the next one needs is written to one npz file, and an interrupted run goes on from there to
the same result.

Sources: Loshchilov and Hutter (2019), "Decoupled Weight Decay Regularization", with a cosine
schedule; Pascanu, Mikolov and Bengio (2013) for the clipped gradient.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from feeds.errors import InputError
from models.architectures import architecture
from models.execute import arrays, run, tensors
from models.numerics import FLOAT, Numerics
from models.operations import Spec
from models.sequences import NO_LABEL, TRAIN, Dataset

STEPS: Final = 64  # rows of a window that count
ROWS_A_BATCH: Final = 1_024
LEARNING_RATE: Final = 2e-3
WEIGHT_DECAY: Final = 1e-4
GREATEST_GRADIENT: Final = 1.0
BETAS: Final = (0.9, 0.999)
EPSILON: Final = 1e-8


class TrainableNumerics(Numerics, Protocol):
    """Numerics with parameters of their own."""

    def begin(self) -> None:
        """A new pass starts: weights may have changed."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """What is learnt besides the weights, by name."""
        ...


class Plan(NamedTuple):
    """How long and how fast.

    Attributes
    ----------
    epochs : int
    seed : int
    learning_rate : float
        Greatest; it rises over the first twentieth and falls to 0 by a cosine.
    rows_a_batch : int
        Rows that count in one update.
    most_rows : int
        Rows that count in one epoch, at most; 0 for all.
    """

    epochs: int
    seed: int
    learning_rate: float = LEARNING_RATE
    rows_a_batch: int = ROWS_A_BATCH
    most_rows: int = 0


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order: torch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def windows(data: Dataset, part: int, context: int, steps: int, offset: int) -> np.ndarray:
    """First counting rows of windows that tile the streams.

    Parameters
    ----------
    context : int
        Rows before, of the same stream.
    steps : int
        Rows that count in each window.
    offset : int
        0 to ``steps - 1``: where the tiling starts.

    Returns
    -------
    ndarray of int64
        Windows in which some row of the part has a label.
    """
    found = [np.empty(0, dtype=np.int64)]
    useful = np.concatenate(([0], np.cumsum((data.part == part) & (data.label != NO_LABEL))))
    for first, after in data.streams():
        begin = np.arange(first + context + offset, after - steps + 1, steps)
        found.append(begin[useful[begin + steps] > useful[begin]])
    return np.concatenate(found)


def _gather(data: Dataset, begin: np.ndarray, context: int, steps: int) -> tuple[Tensor, Tensor]:
    rows = begin[:, None] + np.arange(-context, steps)
    counted = rows[:, context:]
    label = np.where(data.part[counted] == TRAIN, data.label[counted], NO_LABEL)
    return torch.from_numpy(np.asarray(data.x[rows])), torch.from_numpy(label)


class _Adam:
    """AdamW whose whole state is a dict of arrays, so that a run can be resumed without pickle."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self.parameters = parameters
        self.first = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self.second = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self.updates = 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        norm = float(
            torch.sqrt(sum((g.square().sum() for g in gradients.values()), torch.zeros(())))
        )
        shrink = min(1.0, GREATEST_GRADIENT / (norm + 1e-12))
        self.updates += 1
        for name, gradient in gradients.items():
            value, slow, fast = self.parameters[name], self.first[name], self.second[name]
            gradient = gradient * shrink
            slow.mul_(BETAS[0]).add_(gradient, alpha=1.0 - BETAS[0])
            fast.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1.0 - BETAS[1])
            debiased = slow / (1.0 - BETAS[0] ** self.updates)
            spread = (fast / (1.0 - BETAS[1] ** self.updates)).sqrt_().add_(EPSILON)
            if name.endswith(".weight"):
                value.mul_(1.0 - rate * WEIGHT_DECAY)
            value.addcdiv_(debiased, spread, value=-rate)
            self.parameters[name].grad = None

    def save(self) -> dict[str, np.ndarray]:
        """Moments and count."""
        state = {f"first.{name}": value.numpy() for name, value in self.first.items()}
        state |= {f"second.{name}": value.numpy() for name, value in self.second.items()}
        return state | {"updates": np.array(self.updates)}

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Go on from `save`."""
        for name in self.parameters:
            self.first[name] = torch.from_numpy(state[f"first.{name}"].copy())
            self.second[name] = torch.from_numpy(state[f"second.{name}"].copy())
        self.updates = int(state["updates"])


def train(
    spec: Spec,
    data: Dataset,
    parameters: dict[str, np.ndarray],
    plan: Plan,
    *,
    numerics: TrainableNumerics | None = None,
    teacher: Mapping[str, np.ndarray] | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, np.ndarray]:
    """Fit a network to the training part.

    Parameters
    ----------
    parameters : dict of ndarray
        Where to start; see `models.shapes.initial_parameters`.
    numerics : TrainableNumerics, optional
        For quantisation-aware training; its parameters are learnt along.
    teacher : mapping of ndarray, optional
        Parameters of a float network of the same spec whose probabilities are learnt in place of
        the labels.
    checkpoint : Path, optional
        A file that is written after each epoch, and from which a run goes on.
    progress : callable, optional
        Called with updates done, updates in all, and the running mean loss.

    Returns
    -------
    dict of ndarray of float32
        The trained parameters.

    Raises
    ------
    InputError
        If the data has no whole window to train on, or a checkpoint is another run's.
    """
    with one_thread():
        return _train(spec, data, parameters, plan, numerics, teacher, checkpoint, progress)


def _train(
    spec: Spec,
    data: Dataset,
    parameters: dict[str, np.ndarray],
    plan: Plan,
    numerics: TrainableNumerics | None,
    teacher: Mapping[str, np.ndarray] | None,
    checkpoint: Path | None,
    progress: Callable[[int, int, float], None] | None,
) -> dict[str, np.ndarray]:
    context = architecture(spec).context
    steps = STEPS if context else 1
    a_batch = max(1, plan.rows_a_batch // steps)
    counted = min(plan.most_rows or len(data), int((data.part == TRAIN).sum()))
    an_epoch = max(1, counted // (a_batch * steps))
    total = plan.epochs * an_epoch
    weights = tensors(parameters)
    learnt = dict(weights)
    if numerics is not None:
        learnt |= {f"numerics.{name}": value for name, value in numerics.parameters().items()}
    learnt = {name: value for name, value in learnt.items() if _is_learnt(name)}
    for value in learnt.values():
        value.requires_grad_(True)
    adam = _Adam(learnt)
    taught = None if teacher is None else tensors(teacher)
    label = data.label[data.rows_of(TRAIN)]
    counts = np.maximum(np.bincount(label, minlength=spec.n_classes), 1)
    class_weights = torch.from_numpy((len(label) / (spec.n_classes * counts)).astype(np.float32))
    start = 0
    if checkpoint is not None and checkpoint.exists():
        start = _resume(checkpoint, plan, weights, learnt, adam)
    mean_loss = float("nan")
    for epoch in range(start, plan.epochs):
        rng = np.random.default_rng((plan.seed, epoch))
        begin = windows(data, TRAIN, context, steps, int(rng.integers(steps)))
        if len(begin) < 1:
            raise InputError(
                "no stream of the training part is long enough",
                where="the tapes",
                expected=f"{context + steps} rows in a row",
                fix="take longer tapes, or an architecture with less memory",
            )
        rng.shuffle(begin)
        for update in range(an_epoch):
            chosen = np.take(
                begin, np.arange(update * a_batch, (update + 1) * a_batch), mode="wrap"
            )
            x, target = _gather(data, chosen, context, steps)
            if numerics is not None:
                numerics.begin()
            scores, _ = run(
                spec,
                weights,
                x,
                numerics=FLOAT if numerics is None else numerics,
                training=numerics is None,
            )
            scores = scores[:, context:].reshape(-1, spec.n_classes)
            if taught is None:
                loss = torch.nn.functional.cross_entropy(
                    scores, target.reshape(-1), weight=class_weights, ignore_index=NO_LABEL
                )
            else:
                with torch.no_grad():
                    wanted, _ = run(spec, taught, x)
                counts_here = target.reshape(-1) != NO_LABEL
                loss = torch.nn.functional.kl_div(
                    scores[counts_here].log_softmax(dim=1),
                    wanted[:, context:].reshape(-1, spec.n_classes)[counts_here].log_softmax(dim=1),
                    reduction="batchmean",
                    log_target=True,
                )
            loss.backward()
            done = epoch * an_epoch + update
            adam.step(plan.learning_rate * _share_of_rate(done, total))
            now = float(loss.detach())
            mean_loss = now if mean_loss != mean_loss else 0.98 * mean_loss + 0.02 * now
            if progress is not None:
                progress(done + 1, total, mean_loss)
        if checkpoint is not None:
            _write_checkpoint(checkpoint, plan, epoch + 1, weights, learnt, adam)
    return arrays(weights)


def _is_learnt(name: str) -> bool:
    return not name.endswith((".norm.mean", ".norm.variance"))


def _share_of_rate(done: int, total: int) -> float:
    warm = max(1, total // 20)
    if done < warm:
        return (done + 1) / warm
    return 0.5 * (1.0 + float(np.cos(np.pi * (done - warm) / max(1, total - warm))))


def _fingerprint(plan: Plan) -> str:
    return f"{plan.epochs} {plan.seed} {plan.learning_rate} {plan.rows_a_batch} {plan.most_rows}"


def _write_checkpoint(
    path: Path,
    plan: Plan,
    epochs: int,
    weights: dict[str, Tensor],
    learnt: dict[str, Tensor],
    adam: _Adam,
) -> None:
    state: dict[str, Any] = {f"weight.{n}": v.detach().numpy() for n, v in weights.items()}
    state |= {f"learnt.{n}": v.detach().numpy() for n, v in learnt.items()}
    state |= {f"adam.{n}": v for n, v in adam.save().items()}
    state |= {"epochs": np.array(epochs), "plan": np.array(_fingerprint(plan))}
    whole = path.with_suffix(".partial.npz")
    np.savez(whole, **state)
    os.replace(whole, path)  # a run that is cut off leaves the checkpoint before


def _resume(
    path: Path,
    plan: Plan,
    weights: dict[str, Tensor],
    learnt: dict[str, Tensor],
    adam: _Adam,
) -> int:
    with np.load(path, allow_pickle=False) as file:
        state = {name: file[name] for name in file.files}
    if str(state["plan"]) != _fingerprint(plan):
        raise InputError(
            "the checkpoint belongs to another run",
            where=str(path),
            expected=f"epochs, seed, rate, batch, rows: {_fingerprint(plan)}",
            found=str(state["plan"]),
            fix="name another --out, or remove the file to start anew",
        )
    with torch.no_grad():
        for name, value in weights.items():
            value.copy_(torch.from_numpy(state[f"weight.{name}"]))
        for name, value in learnt.items():
            value.copy_(torch.from_numpy(state[f"learnt.{name}"]))
    adam.load({n.removeprefix("adam."): v for n, v in state.items() if n.startswith("adam.")})
    return int(state["epochs"])
