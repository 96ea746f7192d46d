"""Environment in which the threads of torch wait awake for each other, but briefly.

    os.environ.update(briefly(os.environ))
    import torch

A small model passes thousands of barriers a step. To wake a thread that sleeps at one takes tens of microseconds,
longer than many an operation. A thread that stays awake for milliseconds, the default of OpenMP, takes its core from
whoever else wants it. So a thread waits awake for as long as a wake-up takes, then sleeps.
"""

from __future__ import annotations

from collections.abc import Mapping

# GNU's OpenMP, which torch brings on Linux, counts rounds: 2,000 take about 40 microseconds. Others read the policy.
BRIEFLY = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}


def briefly(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which threads wait briefly, unless it says already how they wait."""
    chosen = any(name in environment for name in BRIEFLY)
    return {**environment} if chosen else {**environment, **BRIEFLY}
