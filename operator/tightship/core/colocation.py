"""How much several engines on one GPU slow each other down: prediction from what one engine alone showed.

Each engine alternates between work on the GPU and work of its own (host code, gaps between kernels). Alone, a step takes
t_1, of which the GPU is busy a share u: a demand D = u t_1 on the shared server and a think time Z = t_1 - D. R engines are
then a closed queueing network with one server, which exact mean value analysis solves (Reiser and Lavenberg, 1980):

    W_n = D (1 + Q_{n-1}),   Q_n = n W_n / (W_n + Z),   t_R = Z + W_R

Only the ratio t_R / t_1 matters to latency and throughput, and it depends on u and R alone. No parameter is fitted. What
must hold: exact at R = 1, 1 <= t_R / t_1 <= R, growing in R and in u; u = 1 predicts no gain from packing.
"""

from __future__ import annotations


def slowdown(gpu_utilization: float, replicas: int) -> float:
    """t_R / t_1: how many times longer a step takes when `replicas` equal engines share the GPU.

    Args:
        gpu_utilization: the share of time one engine alone keeps the GPU busy (NVML `utilization.gpu`), 0 to 1.
        replicas: engines on the GPU, at least 1.

    Raises:
        ValueError: an argument out of its range.
    """
    if not 0 <= gpu_utilization <= 1:
        raise ValueError(f"GPU utilization {gpu_utilization} is not between 0 and 1")
    if replicas < 1:
        raise ValueError(f"{replicas} replicas are fewer than 1")
    think = 1 - gpu_utilization
    waiting, queued = gpu_utilization, 0.0
    for engines in range(1, replicas + 1):
        waiting = gpu_utilization * (1 + queued)
        queued = engines * waiting / (waiting + think)
    # Written as a difference, since think + waiting misses 1 by a rounding error at R = 1.
    return min(max(1 + (waiting - gpu_utilization), 1.0), float(replicas))


def packed_throughput(throughput: float, gpu_utilization: float, replicas: int) -> float:
    """Tokens per second of all `replicas` together, R T_1 t_1 / t_R, from one engine's `throughput` alone."""
    return replicas * throughput / slowdown(gpu_utilization, replicas)


def packed_latency(latency: float, gpu_utilization: float, replicas: int) -> float:
    """Seconds of a latency with `replicas` engines running, L_1 t_R / t_1, from its value alone."""
    return latency * slowdown(gpu_utilization, replicas)
