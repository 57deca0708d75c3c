"""Randomized smoothing: an L2 certificate for any classifier, by counting its answers to noise.

Shapes: B noisy images, N images of a set, K classes, CHW channels and sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from moe.valid_fields import CheckedFields, Count, InsideOne, Positive

ABSTAIN = -1
BISECTIONS = 60

Classify = Callable[[Tensor], Tensor]
"""From images (B, C, H, W) to classes (B,)."""


class Smoothed(NamedTuple):
    """What the smoothed classifier provably answers inside an L2 ball; ``ABSTAIN``: nothing."""

    answer: int
    radius: float


@dataclass(frozen=True, kw_only=True)
class Smoothing(CheckedFields):
    """``g(x) = argmax_c P[f(x + e) = c]``, ``e ~ N(0, sigma^2 I)``.

    Cohen, Rosenfeld and Kolter, ICML 2019 (arXiv:1902.02918): if c has probability at least
    ``p > 1/2`` under the noise, g answers c within ``sigma Phi^-1(p)`` in L2. p is the exact
    one-sided Clopper-Pearson bound from fresh noise, so that a radius is wrong with probability
    ``alpha`` at most, for each image. The noise is not clipped to [0, 1]. The certificate is one of
    g, not of f: who deploys f alone has none.

    Attributes:
        sigma: Deviation of the noise, in pixel units.
        choose: Noisy images from which the class is chosen (n0).
        samples: Those from which its probability is bounded (n).
        alpha: Chance of an error, for each image.
        batch: Noisy images at a time.

    Raises:
        ValueError: A setting is out of its range.
    """

    sigma: Positive = 0.25
    choose: Count = 100
    samples: Count = 1000
    alpha: InsideOne = 0.001
    batch: Count = 500

    def certify(self, classify: Classify, x_CHW: Tensor, generator: torch.Generator) -> Smoothed:
        """Choose a class, bound its probability, and turn that into a radius; or abstain."""
        answer = int(self.count(classify, x_CHW, self.choose, generator).argmax())
        counts_K = self.count(classify, x_CHW, self.samples, generator)
        hits = int(counts_K[answer]) if answer < len(counts_K) else 0
        lower = lower_bound(hits, self.samples, self.alpha)
        if lower <= 0.5:
            return Smoothed(ABSTAIN, 0.0)
        return Smoothed(answer, self.sigma * NormalDist().inv_cdf(lower))

    def predict(self, classify: Classify, x_CHW: Tensor, generator: torch.Generator) -> int:
        """Answer what g does, wrong with probability ``alpha`` at most; or abstain.

        The two most frequent classes are told apart by a two-sided binomial test.
        """
        counts_K = self.count(classify, x_CHW, self.samples, generator)
        first, second = (int(n) for n in torch.cat([counts_K, counts_K.new_zeros(1)]).topk(2)[0])
        answer = int(counts_K.argmax())
        chance = min(1.0, 2 * tail(first, first + second, 0.5))
        return answer if chance <= self.alpha else ABSTAIN

    @torch.no_grad()
    def count(
        self, classify: Classify, x_CHW: Tensor, samples: int, generator: torch.Generator
    ) -> Tensor:
        """Count the classes of noisy copies of one image, (K,) or as many as occurred."""
        counts_K = torch.zeros(0, dtype=torch.int64)
        for start in range(0, samples, self.batch):
            shape = (min(self.batch, samples - start), *x_CHW.shape)
            noise_BCHW = torch.randn(shape, generator=generator, dtype=x_CHW.dtype)
            found_B = classify(x_CHW + self.sigma * noise_BCHW.to(x_CHW.device)).cpu()
            more_K = torch.bincount(found_B, minlength=len(counts_K))
            more_K[: len(counts_K)] += counts_K
            counts_K = more_K
        return counts_K


def lower_bound(hits: int, trials: int, alpha: float) -> float:
    """Clopper and Pearson's one-sided lower bound of a probability, exact (Biometrika, 1934).

    The p at which so many hits or more have probability alpha: ``P[Bin(n, p) >= k] = alpha``; no p
    below is compatible with what was seen. Found from below to 1e-18.

    Raises:
        ValueError: There are no trials, or more hits than trials.
    """
    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"hits must be in 0..n with n at least 1, got {hits} of {trials}")
    if hits == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(hits, trials, middle) <= alpha else (low, middle)
    return low


def tail(hits: int, trials: int, p: float) -> float:
    """``P[Bin(n, p) >= k]``, summed in log space."""
    if hits <= 0:
        return 1.0
    if not 0 < p < 1:
        return float(p >= 1)
    k = torch.arange(hits, trials + 1, dtype=torch.float64)
    n = torch.tensor(float(trials), dtype=torch.float64)
    log_B = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    terms = log_B + k * math.log(p) + (n - k) * math.log1p(-p)
    return min(1.0, float(terms.logsumexp(0).exp()))
