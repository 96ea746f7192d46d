"""A walk through a decoder, layer by layer, with the calibration states that stand before each layer.

    for visit in walk(model, batches, "norms"):
        for inputs in visit.inputs(f"{visit.name}.mlp.down_proj"):
            ...                                                  # (tokens, intermediate_size) of one batch

One layer's statistics are taken at a time: only the states, the layer at work and these statistics are held. Every
pass runs the model's own forward over some of the layers. None calls a decoder layer by hand, so a change in the
arguments of a layer cannot silently change a number.

Three traps:

* The walk goes on when the loop does. A change that the loop body makes to the layer, and leaves, is seen by the
  layers after it. To undo it once their states are taken, put the undoing into `visit.leaving`.
* `visit.through` spares the walk a pass, but only if it is exhausted, and only in a visit that changes nothing.
* Breaking out of the loop closes the walk: the layer and an offloaded model go back to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from kvp.models.family import family_of
from kvp.models.plans import edits_file, found_or_made
from kvp.models.shapes import layer_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Enough(Exception):
    """End of a pass that has shown what was asked for."""


@dataclass
class Visit:
    """One layer of a walk, and the hidden states that stand before it.

    Attributes:
        model: The whole model; passes run over this one layer of it.
        layer: The index of the layer.
        states: Per batch, (batch, seq_len, hidden_size) before the layer.
        leaving: Closed once the states after the layer are taken. Leave here what undoes a change.
        after: The states after the layer, if `through` has seen them.
    """

    model: PreTrainedModel
    layer: int
    states: list[Tensor]
    leaving: ExitStack
    after: list[Tensor] | None = None

    @property
    def name(self) -> str:
        """Return the name of the layer, such as "model.layers.3"."""
        return f"{family_of(self.model.config).layers}.{self.layer}"

    @torch.no_grad()
    def inputs(self, *names: str) -> Iterator[dict[str, Tensor]]:
        """Yield per batch what goes into the named modules, (tokens, in_features); a pass ends at the last of them."""
        for states in self.states:
            with suppress(Enough), caught_inputs(self.model, names, stop=True) as caught:
                hidden_states(self.model, self.layer, self.layer + 1, inputs_embeds=states)
            yield {name: inputs.flatten(0, -2) for name, inputs in caught.items()}

    @torch.no_grad()
    def through(self, *names: str) -> Iterator[dict[str, Tensor]]:
        """Yield as `inputs` does, in whole passes that the walk need not repeat: for visits that change nothing."""
        after = []
        for states in self.states:
            with caught_inputs(self.model, names) as caught:
                after.append(hidden_states(self.model, self.layer, self.layer + 1, inputs_embeds=states))
            yield {name: inputs.flatten(0, -2) for name, inputs in caught.items()}
        self.after = after  # reached only if the caller exhausts this generator

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """Return per batch the states after the layer as it is now."""
        return [
            hidden_states(self.model, self.layer, self.layer + 1, inputs_embeds=states)
            for states in self.states
        ]


def found_edits(
    visits: Iterable[Visit], make: Callable[[Visit], dict[str, Tensor]], directory: Path
) -> dict[str, Tensor]:
    """Return the edits of all layers visited, a file for each; a killed search resumes at its next layer."""
    edits: dict[str, Tensor] = {}
    for visit in visits:
        edits |= found_or_made(edits_file(directory, visit.layer), partial(make, visit))
    return edits


@torch.no_grad()
def walk(
    model: PreTrainedModel, batches: Sequence[Tensor], desc: str, *, offload: bool = False
) -> Iterator[Visit]:
    """Visit the layers in order; the layers after a visit see what it changed in its own.

    Args:
        model: In eval mode.
        batches: Token ids; none, for a walk without states.
        desc: Title of the progress bar.
        offload: Keep only the layer at work and the states on the model's device, the rest on the CPU.
    """
    device = model.device
    with ExitStack() as stack:
        if offload:
            stack.enter_context(on_cpu(model))
        states = [hidden_states(model, 0, 0, input_ids=ids.to(model.device)).to(device) for ids in batches]
        move(model.get_submodule(family_of(model.config).norm), device)  # passes run through it
        for layer in tqdm(range(len(layer_shapes(model.config))), desc=desc, unit="layer"):
            with ExitStack() as leaving:
                visit = Visit(model, layer, states, leaving)
                module = model.get_submodule(visit.name)
                if offload:
                    leaving.callback(move, module, "cpu")
                    move(module, device)
                yield visit  # the loop body works here, and may change the layer
                states = visit.after or visit.outputs()  # of the layer as the body left it
            # `leaving` is closed: changes are undone, and the layer is back on the CPU


@contextmanager
def on_cpu(model: PreTrainedModel) -> Iterator[torch.device]:
    """Keep the model on the CPU for the time of a `with`; give the device that it is away from."""
    device = model.device
    move(model, "cpu")
    try:
        yield device
    finally:
        move(model, device)


def move(module: nn.Module, device: torch.device | str) -> None:
    """Move the parameters and buffers of a module, in place."""
    module.to(device)


def hidden_states(model: PreTrainedModel, start: int, stop: int, **inputs: Tensor) -> Tensor:
    """Return (batch, seq_len, hidden_size) after the layers [start, stop), before the final norm."""
    norm = family_of(model.config).norm
    with window(model, start, stop), caught_inputs(model, [norm]) as caught:
        model.base_model(use_cache=False, **inputs)
    return caught[norm]


@contextmanager
def caught_inputs(
    model: PreTrainedModel, names: Sequence[str], *, stop: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Catch what goes into the named modules in the passes of a `with`; with `stop` the last one raises `Enough`."""
    caught: dict[str, Tensor] = {}

    def catch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            caught[name] = args[0]
            if stop and len(caught) == len(names):
                raise Enough

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(catch(name)).remove)
        yield caught


@contextmanager
def window(model: PreTrainedModel, start: int, stop: int) -> Iterator[None]:
    """Leave the model only the layers [start, stop), for the time of a `with`: feed it `inputs_embeds`."""
    parent, _, name = family_of(model.config).layers.rpartition(".")
    owner, layers = model.get_submodule(parent), model.get_submodule(f"{parent}.{name}")
    types = getattr(model.config, "layer_types", None)
    assert isinstance(layers, nn.ModuleList)
    setattr(owner, name, layers[start:stop])
    if types:
        model.config.layer_types = types[start:stop]
    try:
        yield
    finally:
        setattr(owner, name, layers)
        if types:
            model.config.layer_types = types
