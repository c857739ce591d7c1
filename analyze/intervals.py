"""Intervals over held-out prompts and over seeds, the win rate at equal length, the best of N."""

import math
import statistics

import numpy

RESAMPLES = 1000  # of the bootstrap
# 0.975 quantiles of Student's t, for 1, 2, 3 … degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(statistic, *values: list[float], seed: int = 1) -> dict[str, float]:
    """value, low and high of statistic(*values), whose arrays [..., P] become [...]."""
    arrays = [numpy.array(part, dtype=float) for part in values]
    count = len(arrays[0])
    drawn = numpy.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    low, high = numpy.quantile(statistic(*(array[drawn] for array in arrays)), [0.025, 0.975])
    return {"value": float(statistic(*arrays)), "low": float(low), "high": float(high)}


def over_seeds(values: list[float]) -> dict[str, float]:
    """Mean of one value per seed with Student's 95 % interval, for 1 to 10 seeds: without a limit
    (low and high are infinite) for one, which says nothing of others."""
    middle = statistics.mean(values)
    if len(values) == 1:
        return {"value": middle, "low": -math.inf, "high": math.inf}
    error = statistics.stdev(values) / math.sqrt(len(values))
    reach = STUDENT[len(values) - 2] * error
    return {"value": middle, "low": middle - reach, "high": middle + reach}


def mean(values: numpy.ndarray) -> numpy.ndarray:
    """Mean over the prompts."""
    return values.mean(-1)


def length_controlled(wins: numpy.ndarray, gaps: numpy.ndarray) -> numpy.ndarray:
    """Win rate at equal length, of wins and gaps d in tokens, [..., P] each.

    Where all gaps are the same there is nothing to learn of the length: the plain win rate.
    """
    spread = gaps.std(-1, keepdims=True)
    x = numpy.tanh(gaps / numpy.where(spread > 0, spread, numpy.inf))
    features = numpy.stack([numpy.ones_like(x), x], -1)  # [..., P, 2]
    weights, penalty = numpy.zeros(features[..., 0, :].shape), 1e-3
    for _ in range(25):  # Newton's method on the log-likelihood of (1)
        p = 1 / (1 + numpy.exp(-(features @ weights[..., None])[..., 0]))
        slope = ((wins - p)[..., None] * features).sum(-2) - penalty * weights
        curvature = numpy.swapaxes(features, -1, -2) @ (features * (p * (1 - p))[..., None])
        curvature = curvature + penalty * numpy.eye(2)
        weights = weights + numpy.linalg.solve(curvature, slope[..., None])[..., 0]
    return 1 / (1 + numpy.exp(-weights[..., 0]))


def kl_bound(n: int) -> float:
    """The most that the KL of the best of n from what was sampled can be, in nats."""
    return math.log(n) - (n - 1) / n


def best_of_mean(rewards: numpy.ndarray, values: numpy.ndarray, n: int) -> float:
    """Mean over prompts and draws of the value of the best of n, from rewards and values [P, M].

    All n of the M samples are equally likely to be drawn, so that the i-th smallest reward is the
    best of n with probability C(i − 1, n − 1) / C(M, n).
    """
    count = rewards.shape[1]
    chances = [math.comb(i, n - 1) / math.comb(count, n) for i in range(count)]
    ranked = numpy.take_along_axis(values, rewards.argsort(1), 1)
    return float((ranked * chances).sum(1).mean())
