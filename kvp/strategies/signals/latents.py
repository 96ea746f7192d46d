"""One latent for values and for keys that do not turn: the directions that both together lose least without.

With V and K the rows of v_proj and of the keys that do not turn, l = [V x; K x] is what a token gives. A latent c = A l
of r rows reconstructs l as B c. What is lost, per token, is

    w_v tr(O^T O (I - B A)_v S (I - B A)_v^T) + w_k tr(Q (I - B A)_k C (I - B A)_k^T),

| matrix | is |
| ------ | -- |
| O | the columns of o_proj of all query heads, one below the other |
| Q | second moment of the queries of these keys, summed over the query heads |
| S | second moment of what attention makes of l, mean over the query heads |
| C | second moment of l, centred over a sample, because softmax ignores what all logits share |
| w_v, w_k | worth of a mean square of the output, and of the logits |

For a given A the best B_v = S_v A^T (A S A^T)^-1, and B_k likewise with C. A has no closed form, as S and C differ.
With M = (S + C) / 2 for both, A = U^T M^(-1/2), and U are the eigenvectors of
M^(1/2) diag(w_v O^T O, w_k Q) M^(1/2), best first. Row j of A is then worth what the best B gains by it beside the rows
before it. (Joint principal components of keys and values are TransMLA's, arXiv:2502.07864; the weights and metrics here
are ours.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvp.models.masks import edited
from kvp.models.shapes import CHANNELS_PER_PAIR, layer_shapes
from kvp.strategies.compensation.sequential import at_work
from kvp.strategies.signals.head_moments import Heads, output_columns, rope_gains
from kvp.strategies.signals.heads import roots
from kvp.strategies.signals.moments import TINY
from kvp.strategies.signals.walk import Visit

RIDGE = 1e-6  # of M in S and C, so that directions without variance stay solvable


@dataclass(frozen=True)
class Latent:
    """The latent of a layer with one KV head; n = v_head_dim + still channels of keys.

    Attributes:
        visit: The layer.
        still: Channels of keys and queries that do not turn.
        rows: (n, in) V and K, a bias as the last column.
        encoder: (v_head_dim, n) A, best row first.
        attended: (n, n) S.
        centred: (n, n) C.
        worth: (v_head_dim,) what each row is worth beside those before it.
    """

    visit: Visit
    still: Tensor
    rows: Tensor
    encoder: Tensor
    attended: Tensor
    centred: Tensor
    worth: Tensor

    def edits(self, kept: int) -> dict[str, Tensor]:
        """Return v_proj, q_latent_proj and o_proj that read and write the first `kept` rows; the rest is zero."""
        encoder, values = self.encoder[:kept], len(self.encoder)
        of_values, of_keys = (best_decoder(moment, encoder) for moment in (self.attended, self.centred))
        scale = self.attended.diagonal()[:values].mean().sqrt()  # else LoRA's steps would differ by matrix
        rows, decoder = scale * encoder @ self.rows, torch.cat([of_values[:values], of_keys[values:]]) / scale
        return read_from_latent(self.visit, still_queries(self.visit, self.still), rows, decoder)


@dataclass(frozen=True)
class Principal:
    """The joint principal components of values and still keys, l = [V x; K x / r].

    Attributes:
        visit: The layer.
        query: (heads, still channels, in) what asks for K x / r.
        rows: (n, in) V and K / r, a bias as the last column.
        directions: (n, n) orthonormal columns, best first.
        energies: (v_head_dim,) mean square of l along each of the first.
    """

    visit: Visit
    query: Tensor
    rows: Tensor
    directions: Tensor
    energies: Tensor

    def edits(self, kept: int) -> dict[str, Tensor]:
        """Return v_proj, q_latent_proj and o_proj that read and write the first `kept` components; the rest is zero."""
        best = self.directions[:, :kept]
        return read_from_latent(self.visit, self.query, best.T @ self.rows, best)


def principal(
    visit: Visit, query: Tensor, key: Tensor, still: Tensor, moment: Tensor, balanced: bool
) -> Principal:
    """Return the joint principal components of the layer visited.

    Args:
        visit: The layer, of one KV head.
        query: (heads, channels, in) queries.
        key: (channels, in) keys.
        still: The pairs that do not turn.
        moment: (in, in) second moment of the inputs.
        balanced: Whether r makes the channels of still keys as large as those of values, in the mean; else it is 1.
    """
    value = Heads(visit).rows("v")[0]
    channels = torch.cat([still, still + len(key) // CHANNELS_PER_PAIR])
    rows, ratio = torch.cat([value, key[channels]]), 1.0
    if balanced and len(channels):
        sizes = torch.einsum("ni,ij,nj->n", rows, moment, rows).clamp(min=TINY).sqrt()
        ratio = (sizes[len(value) :].mean() / sizes[: len(value)].mean()).item()
        rows = torch.cat([value, key[channels] / ratio])
    energies, directions = torch.linalg.eigh(rows @ moment @ rows.T)
    asked = query[:, channels] * (ratio * rope_gains(visit, channels))[:, None]
    return Principal(visit, asked, rows, directions.flip(-1), energies.flip(-1)[: len(value)].clamp(min=0))


def read_from_latent(visit: Visit, query: Tensor, rows: Tensor, decoder: Tensor) -> dict[str, Tensor]:
    """Return v_proj, q_latent_proj and o_proj of a latent of `kept` channels; the rest is zero.

    Args:
        visit: The layer, of one KV head.
        query: (heads, still channels, in) queries of the keys that do not turn.
        rows: (kept, in) what gives the latent.
        decoder: (v_head_dim + still channels, kept) what gives values and still keys from it.
    """
    heads, columns = Heads(visit), output_columns(visit)[0]
    values, kept = columns.shape[-1], len(rows)
    value, asked = rows.new_zeros(values, rows.shape[1]), query.new_zeros(len(query), values, query.shape[2])
    output = torch.zeros_like(columns)
    value[:kept] = rows
    asked[:, :kept] = decoder[values:].T @ query
    output[..., :kept] = columns @ decoder[:values]
    return {
        **heads.edits("v", value[None]),
        **heads.edits("q_latent", asked[None]),
        f"{heads.name('o')}.weight": heads.stored(output.transpose(0, 1).flatten(1)),
    }


def still_queries(visit: Visit, still: Tensor) -> Tensor:
    """Return (heads, still channels, in) the queries of keys that do not turn, as large as they were with RoPE."""
    return Heads(visit).rows("q")[0][:, still] * rope_gains(visit, still)[:, None]


def best_decoder(moment: Tensor, encoder: Tensor) -> Tensor:
    """Return B (n, kept), the least squares of l by c = A l under a second moment (n, n) of l."""
    crossed = moment @ encoder.T
    return torch.linalg.solve(encoder @ crossed, crossed.T).T


def find_latent(visit: Visit, still: Tensor, value_weight: float, key_weight: float) -> Latent:
    """Return the latent of the layer visited.

    Args:
        visit: The layer, of one KV head.
        still: Channels of keys that do not turn.
        value_weight: w_v.
        key_weight: w_k.
    """
    heads = Heads(visit)
    value, key = heads.rows("v")[0], heads.rows("k")[0, 0][still]
    attended, centred, queries = _moments(visit, value, key, still_queries(visit, still))
    outputs = output_columns(visit)[0].flatten(0, 1)
    by_output = value_weight * outputs.T @ outputs
    by_logit = key_weight * queries
    root, inverse = roots((attended + centred) / 2)
    attended, centred = attended + RIDGE * root @ root, centred + RIDGE * root @ root
    loss = torch.block_diag(by_output, by_logit)
    basis = torch.linalg.eigh(root @ loss @ root).eigenvectors.flip(-1)
    encoder = basis.T[: len(value)] @ inverse
    worth = _gains(attended, encoder, by_output, slice(len(value)))
    worth += _gains(centred, encoder, by_logit, slice(len(value), None))
    return Latent(visit, still, torch.cat([value, key]), encoder, attended, centred, worth)


def _gains(moment: Tensor, encoder: Tensor, loss: Tensor, part: slice) -> Tensor:
    """Return what each row of A takes off the loss of a part of l, the rows before it given."""
    gram = encoder @ moment @ encoder.T
    for ridge in (0, RIDGE, 1e-4, 1e-2, 1):  # the first is enough unless tokens are fewer than directions
        gram.diagonal().add_(ridge * gram.diagonal().mean().abs() + TINY)
        factor, singular = torch.linalg.cholesky_ex(gram)
        if not singular:
            break
    fresh = torch.linalg.solve_triangular(factor, encoder @ moment[:, part], upper=False)
    return ((fresh @ loss) * fresh).sum(1)


def _moments(visit: Visit, value: Tensor, key: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return S, C and Q, float64; attention runs a second time, with the keys in the place of the values."""
    heads = Heads(visit)
    entry, output = heads.name("q"), heads.name("o")
    rows, queries = (at_work(each.to(visit.states[0].dtype)) for each in (torch.cat([value, key]), query))
    attended, centred = (value.new_zeros(len(rows), len(rows)) for _ in range(2))
    asked = value.new_zeros(len(key), len(key))
    read, samples = [], sum(len(states) for states in visit.states)
    for states, inputs in zip(visit.states, visit.inputs(entry, output), strict=True):
        x = at_work(heads.extended(inputs[entry]))
        given = (x @ rows.T).unflatten(0, states.shape[:2])
        given = (given - given.mean(1, keepdim=True)).flatten(0, 1)
        centred += (given.T @ given).double() / (samples * states.shape[1])
        ask = (x @ queries.flatten(0, 1).T).unflatten(1, queries.shape[:2]).flatten(0, 1)
        asked += (ask.T @ ask).double() / (samples * states.shape[1])
        read.append(at_work(inputs[output]).unflatten(1, (heads.queries, -1)))
    padded = torch.zeros_like(value)
    padded[: len(key)] = key
    with edited(visit.model, heads.edits("v", padded[None])):
        for values, inputs in zip(read, visit.inputs(output), strict=True):
            of_keys = at_work(inputs[output]).unflatten(1, (heads.queries, -1))[..., : len(key)]
            both = torch.cat([values, of_keys], -1).flatten(0, 1)
            attended += (both.T @ both).double() / (heads.queries * sum(len(each) for each in read))
    return attended, centred, asked


def still_channels(visit: Visit, first: int | None) -> Tensor:
    """Return the channels of the one key head whose pairs are `first` or slower; None: no pair is."""
    shape = layer_shapes(visit.model.config)[visit.layer]
    assert shape.rope_pairs is not None, "joined heads name their pairs"
    pairs = torch.tensor(shape.rope_pairs[0])
    slots = (pairs >= (len(pairs) if first is None else first)).nonzero().flatten()
    return torch.cat([slots, slots + len(pairs)])
