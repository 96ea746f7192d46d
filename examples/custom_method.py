"""Write a pruning method of your own, and compare it with random channels: python examples/custom_method.py.

A method scores the units of a space; higher = kept. Budget, allocation, surgery and evaluation are kvp's.
"""

from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import override

import kvp
from kvp.models.spaces import fold, members
from kvp.options import options
from kvp.strategies.target import Target
from kvp.strategies.templates.scored import ScoreStrategy
from kvp.types import Kind, Space


@options
class OutputEnergy(ScoreStrategy):
    """Score a value channel by the energy that o_proj makes of it on calibration text: E[x^2] |column|^2."""

    @override
    def kinds(self) -> tuple[Kind, ...]:
        return ("vo",)

    @override
    @torch.no_grad()
    def score(self, target: Target) -> dict[Space, Tensor]:
        outputs = {space: members(target.config, space)[-1] for space in self.spaces(target.config)}
        energy: dict[str, Tensor] = {}

        def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].float().square().sum((0, 1))  # over sequences and tokens
            energy[name] = energy.get(name, torch.zeros_like(squares)) + squares

        modules = {member.name: target.model.get_submodule(member.name) for member in outputs.values()}
        hooks = [module.register_forward_pre_hook(partial(add, name)) for name, module in modules.items()]
        for batch in target.batches:
            target.model(batch.to(target.model.device), use_cache=False)
        for hook in hooks:
            hook.remove()
        return {  # fold sums over the query heads that share a KV head
            space: fold(
                energy[member.name] * modules[member.name].weight.float().square().sum(0), member, space
            )
            for space, member in outputs.items()
        }


if __name__ == "__main__":
    model, tokenizer = kvp.load("smollm2_135m")
    print(f"{'dense':>7}: {kvp.evaluate(model, tokenizer, tasks=[])}")
    for name, strategy in {"mine": OutputEnergy(), "random": kvp.Random(grouping="vo")}.items():
        pruned = kvp.prune(model, tokenizer, strategy, ratio=0.125)
        print(f"{name:>7}: {kvp.evaluate(pruned.model, tokenizer, tasks=[])}")
