"""FLAP: prune what fluctuates least, and put its mean in a bias (arXiv:2312.11983, CASIA-IVA-Lab/FLAP).

A column of o_proj or down_proj whose input is nearly constant can be replaced by a bias. One threshold cuts heads and
neurons of all layers.

Formula
-------
X_j is the input of column j over all calibration tokens (`metrics` in `lib/prune.py`, the defaults of `main.py`):

    wifv   var(X_j) sum_i W_ij^2     the default
    ifv    var(X_j)
    wifn   ||X_j||_2 mean_i |W_ij|

The code squares this once more for o_proj. Then it standardises the columns of each projection (z-score, per layer),
and a head is worth the mean of its columns. What remains has the weight asked for: a head counts as many parameters as
4 d_h / 3 neurons. That is `allocator=threshold` ("AL-AM"); `allocator=uniform` is "UL-UM". `compensation=bias` is the
paper's.

Faithful or interpreted
-----------------------
The paper's formula, with an exact variance; GQA is ours. WIFN, the allocation and the bias agree with the code.

* The code's variance (`lib/layerwrapper.py`) is none: it leaves the first sequence out and weights sequence k by
  k / (k + 1). With few sequences some units differ, 26 of 1,152 neurons with 32 of them. With 512 nearly none do.
* The code counts 170 neurons for a head of 128 channels, 4 d_h / 3 in whole numbers.
* KV groups take the place of heads, which are equal in MHA. A unit counts what it removes of the ratio's denominator;
  under kv_cache, neurons stay.
* The "MM" modes, in which a person fixes the number of heads, are not offered. `allocator=tied` fixes the attention's
  share.
* A layer keeps at least one group and one neuron.

Cost
----
One forward pass, layer by layer: only one layer's moments are in memory. The bias takes a second one. No gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator, Global
from kvp.strategies.compensation.compensate import Bias, Compensation
from kvp.strategies.signals.moments import Moments
from kvp.strategies.templates.projections import ProjectionStrategy
from kvp.types import Kind

Metric = Literal["wifv", "ifv", "wifn"]


@options
class FLAP(ProjectionStrategy):
    """Cut the KV groups and neurons whose contribution to the residual stream fluctuates least.

    Attributes:
        metric: "wifv", "ifv" or "wifn"; see the table above.
    """

    allocator: Allocator = Global(multiple_of=1, max_ratio=1.0, per_cost=False)
    compensation: Compensation | None = Bias()
    metric: Metric = "wifv"

    @override
    def columns(self, kind: Kind, weight: Tensor, inputs: Moments) -> Tensor:
        match self.metric:
            case "wifv":
                raw = inputs.scatter / inputs.count * weight.square().sum(0)
            case "ifv":
                raw = inputs.scatter / inputs.count
            case _:
                raw = inputs.gram.sqrt() * weight.abs().mean(0)
        if kind == "kv_group":
            raw = raw.square()
        return (raw - raw.mean()) / raw.std().clamp(min=torch.finfo(raw.dtype).tiny)
