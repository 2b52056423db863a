"""Expectation-maximisation: the code of lesson 01 beside scikit-learn's GaussianMixture, an iteration.

Both: float64, full covariances, 100,000 points in 32 dimensions, 32 components, one start, floor and number
of threads, an iteration each in turn. scikit-learn is timed by its own `_e_step` and `_m_step` alone, without
initialisation, checks and last E step; a whole `fit` of each is the cross-check. The lesson computes the
features of the data once, before the iterations: that time is printed, and counted in the whole fit.
"""

import time
import warnings

import numpy as np
import sklearn
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_info, threadpool_limits

from course_utils.models.gmm import fast_em, fast_em_step, features

N, D, K, FLOOR, TURNS, STEPS, THREADS = 100_000, 32, 32, 1e-6, 9, 3, 2


def mixture(rng):
    mu, A = rng.normal(size=(K, D)), rng.normal(size=(K, D, D)) / D**0.5
    z = rng.choice(K, size=N, p=rng.dirichlet(np.full(K, 5.0)))
    X = rng.normal(size=(N, D))
    for k in range(K):
        X[z == k] = X[z == k] @ A[k].T + mu[k]
    return X, (np.full(K, 1 / K), X[rng.choice(N, K, replace=False)], np.repeat(np.cov(X.T)[None], K, 0))


def timed(call, *args):
    start, out = time.perf_counter(), call(*args)
    return time.perf_counter() - start, out


def new_peer(start, steps):
    init = {"weights_init": start[0], "means_init": start[1], "precisions_init": np.linalg.inv(start[2])}
    return GaussianMixture(K, reg_covar=FLOOR, tol=0.0, max_iter=steps, **init)


def peer_step(peer, X):
    log_px, log_r = peer._e_step(X)
    peer._m_step(X, log_r)
    return log_px


def in_turn(X, start):
    """Seconds and mean log-likelihoods of every iteration, (TURNS, 2) each: the course, scikit-learn."""
    points, (pi, mu, Sigma) = torch.as_tensor(X), map(torch.as_tensor, start)
    centre = points.mean(0)
    once, chunks = timed(lambda: [features(x) for x in (points - centre).split(2**15)])
    print(f"features of the data, once: {once:.3f} s, {sum(c.nbytes for c in chunks) / 1e6:.0f} MB")
    mu, peer, rows = mu - centre, new_peer(start, 1), []
    peer._initialize_parameters(X, None)
    for _ in range(TURNS):
        a, (pi, mu, Sigma, log_px) = timed(fast_em_step, pi, mu, Sigma, chunks, FLOOR)
        b, peer_log_px = timed(peer_step, peer, X)
        rows.append(((a, b), (log_px.item(), peer_log_px)))
    return np.array(rows).transpose(1, 0, 2)


def main():
    torch.set_num_threads(THREADS)
    print(f"torch {torch.__version__}: {torch.get_num_threads()} threads, scikit-learn {sklearn.__version__}")
    print(*(f"{p['internal_api']} {p['version']}: {p['num_threads']}" for p in threadpool_info()), sep=", ")
    X, start = mixture(np.random.default_rng(0))
    seconds, log_px = in_turn(X, start)
    a, b = np.median(seconds, 0)
    print(f"an iteration, median of {TURNS} turns: course {a:.3f} s, scikit-learn {b:.3f} s")
    print(f"  the fastest: {seconds[:, 0].min():.3f} s and {seconds[:, 1].min():.3f} s")
    print(f"mean log-likelihood, turn {TURNS}: {log_px[-1, 0]:.12f} and {log_px[-1, 1]:.12f}")

    short, _ = timed(new_peer(start, STEPS).fit, X)
    long, peer = timed(new_peer(start, 2 * STEPS).fit, X)
    total, fit = timed(fast_em, torch.as_tensor(X), *map(torch.as_tensor, start), 2 * STEPS, FLOOR)
    print(f"a fit of {2 * STEPS}: course {total:.2f} s, scikit-learn {long:.2f} s: {long / total:.2f} times")
    print(f"  scikit-learn's iteration, by a fit of {STEPS} and that one: {(long - short) / STEPS:.3f} s")
    log_px = np.concatenate([log_px, np.stack([np.array(fit[3]), peer.lower_bounds_], 1)])
    worst = np.abs(log_px[:, 0] / log_px[:, 1] - 1).max()
    print(f"relative difference of the log-likelihood, the largest of all iterations: {worst:.1e}")
    assert worst < 1e-6
    print(f"ratio: {b / a:.2f}")


if __name__ == "__main__":
    warnings.simplefilter("ignore", ConvergenceWarning)
    with threadpool_limits(THREADS):
        main()
