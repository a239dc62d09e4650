"""The reference network and its training: a small ReLU network, seeded, on one thread."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Final

import numpy as np
import torch

HIDDEN: Final = (64, 32)
BATCH: Final = 512
LEARNING_RATE: Final = 2e-3
WEIGHT_DECAY: Final = 1e-4


def _forward(parameters: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    for i in range(0, len(parameters) - 2, 2):
        x = torch.relu(torch.nn.functional.linear(x, parameters[i], parameters[i + 1]))
    return torch.nn.functional.linear(x, parameters[-2], parameters[-1])


def train(
    x: np.ndarray,
    y: np.ndarray,
    n_classes: int,
    *,
    epochs: int,
    seed: int,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Fit ``features → 64 → 32 → classes`` by AdamW on the class-weighted cross entropy.

    The same arguments give the same bits on the same CPU model and torch version: initial
    weights and the order of the batches come from ``seed``, sums run on one thread.

    Parameters
    ----------
    x : ndarray of float32, shape (n, features)
        Normalised and clipped.
    y : ndarray of int64, shape (n,)
    epochs : int
    progress : callable, optional
        Called after each epoch with its number from 1 and its mean loss.

    Returns
    -------
    weights, biases : list of ndarray of float32
        Of each layer, shapes (out, in) and (out,).

    Notes
    -----
    Initial weights: He et al. (2015), "Delving Deep into Rectifiers". Optimiser: Loshchilov and
    Hutter (2019), "Decoupled Weight Decay Regularization", with a cosine schedule.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generator = torch.Generator().manual_seed(seed)
        sizes = (x.shape[1], *HIDDEN, n_classes)
        parameters: list[torch.Tensor] = []
        for fan_in, fan_out in pairwise(sizes):
            weight = torch.randn(fan_out, fan_in, generator=generator) * (2.0 / fan_in) ** 0.5
            parameters += [weight.requires_grad_(), torch.zeros(fan_out, requires_grad=True)]
        inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
        counts = torch.bincount(targets, minlength=n_classes).clamp(min=1)
        class_weights = len(y) / (n_classes * counts.float())
        optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        batches = -(-len(x) // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * batches)
        for epoch in range(epochs):
            order = torch.randperm(len(x), generator=generator)
            total = 0.0
            for start in range(0, len(x), BATCH):
                chosen = order[start : start + BATCH]
                optimiser.zero_grad()
                loss = torch.nn.functional.cross_entropy(
                    _forward(parameters, inputs[chosen]), targets[chosen], weight=class_weights
                )
                loss.backward()
                optimiser.step()
                schedule.step()
                total += float(loss.detach()) * len(chosen)
            if progress is not None:
                progress(epoch + 1, total / len(x))
        arrays = [parameter.detach().numpy().copy() for parameter in parameters]
    finally:
        torch.set_num_threads(threads)
    return arrays[0::2], arrays[1::2]
