"""Worth of queries, keys and values to an attention's output: slopes of the loss, and errors of refits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvp.models.family import family_of
from kvp.models.masks import edited, masked, masks_of
from kvp.models.shapes import layer_shapes
from kvp.strategies.compensation.sequential import Products, at_work
from kvp.strategies.signals.gradients import backward_by_sample
from kvp.strategies.signals.heads import Turned
from kvp.strategies.signals.importance import announce_memory
from kvp.strategies.signals.walk import Visit, walk
from kvp.strategies.target import Target
from kvp.types import Plan, Space

NEGLIGIBLE = 1e-6  # of a space's energy
RIDGE = 0.1  # of the refit that measures worth: the default of compensation=sequential


def output_slopes(target: Target, gradient_checkpointing: bool = False) -> Tensor:
    """Return (layers,) the mean square, over tokens and channels, of the derivative by an attention's output.

    Of the sum of the losses of a sample's tokens, in nats; zero for a layer without attention.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    announce_memory(target, "output", gradient_checkpointing)
    family, shapes = family_of(target.config), layer_shapes(target.config)
    slopes = torch.zeros(len(shapes), dtype=torch.float64)
    assert target.calibration is not None
    samples, length = target.calibration.shape

    def watch(layer: int, output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            of_the_sum = gradient.double() * (length - 1)  # each sample's loss is a mean
            slopes[layer] += of_the_sum.square().mean().item() * len(gradient) / samples

        output.register_hook(add)

    hooks = [
        (f"{family.layers}.{n}.{family.attention}.{family.o}", lambda inputs, output, n=n: watch(n, output))
        for n, shape in enumerate(shapes)
        if shape.num_key_value_heads
    ]
    backward_by_sample(
        target.model, hooks, target.batches, "slopes", gradient_checkpointing=gradient_checkpointing
    )
    return slopes


def visits_of_heads(target: Target) -> Iterator[Visit]:
    """Walk through the layers that have an attention."""
    shapes = layer_shapes(target.config)
    visits = walk(target.model, target.batches, "heads", offload=True)
    return (visit for visit in visits if shapes[visit.layer].num_key_value_heads)


def lost_per_energy(
    visit: Visit, turned: Turned, energies: Mapping[Space, Tensor], folded: int | None
) -> dict[Space, float]:
    """Return what the attention's output loses per energy, without the lower half of a space.

    It is 1 where that half holds no energy, as the ratio of two roundings has no meaning and may be negative.

    Args:
        visit: The layer.
        turned: Its heads in their new basis.
        energies: (groups, pairs) or (groups, v_head_dim) per space, in that basis.
        folded: The first folded pair; None: no pair is.
    """
    plans, gone = [], []
    for space, energy in energies.items():
        order = energy.argsort(dim=1, descending=True)
        half = order.shape[1] // 2
        keep = {space: order[:, :half].sort(dim=1).values}
        plans.append(Plan(keep, turned.edits, folded=folded))
        gone.append(energy.gather(1, order[:, half:]).sum().item())
    lost = refit_errors(visit, plans)
    least = [NEGLIGIBLE * energy.sum().item() for energy in energies.values()]
    return {
        space: lost[n] / gone[n] if lost[n] > 0 and gone[n] > least[n] else 1.0
        for n, space in enumerate(energies)
    }


def refit_errors(visit: Visit, plans: Sequence[Plan]) -> list[float]:
    """Return, per plan, the mean square error of a refitted o_proj against the dense output, summed over channels.

    The plans differ in what they keep, and in nothing else; one that keeps all pairs needs no pass of its own.
    """
    family = family_of(visit.model.config)
    output = f"{visit.name}.{family.attention}.{family.o}"
    errors = []
    with edited(visit.model, plans[0].edits):
        weight = at_work(visit.model.get_parameter(f"{output}.weight").detach())
        with masked(visit.model, replace(plans[0], keep={})):
            whole = [at_work(inputs[output]) for inputs in visit.inputs(output)]
        wanted = [x @ weight.T for x in whole]
        for plan in plans:
            stays = masks_of(visit.model.config, plan).get(output, {}).get(1, torch.ones(weight.shape[1]) > 0)
            products = Products(intercept=False)
            with masked(visit.model, plan):
                same = all(space.kind == "vo" for space in plan.keep)
                arriving = whole if same else (inputs[output] for inputs in visit.inputs(output))
                for y, z in zip(wanted, arriving, strict=True):
                    products.add(y, z[:, stays.to(z.device)])
            ridge = RIDGE * stays.double().mean().item()  # of all columns, zero or not
            errors.append(products.residual(weight[:, stays.to(weight.device)].double(), ridge))
    return errors
