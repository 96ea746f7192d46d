"""Gradients and LLM-Pruner's scores by naive loops."""

from __future__ import annotations

import torch
import torch.nn.functional as F

HEAD_DIM = 8


def naive_gradients(target, batch_size):
    """Per batch, a full copy of all gradients of the mean loss."""
    copies = []
    for ids in target.calibration.split(batch_size):
        target.model.zero_grad()
        logits = target.model(ids).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        copies.append({name: p.grad.clone() for name, p in target.model.named_parameters()})
    target.model.zero_grad()
    return copies


def naive_worth(target, importance):
    """(name, row or None, column or None) -> worth of that vector of weights, all samples in one batch."""
    (whole,), samples = naive_gradients(target, len(target.calibration)), naive_gradients(target, 1)

    def of_elements(name, w):
        g, f = whole[name], sum(sample[name] ** 2 for sample in samples) / len(samples)
        return {
            "l1": w.abs(),
            "l2": w**2,
            "taylor_vector": w * g,
            "taylor_element": (w * g).abs(),
            "second_order": w * f * w,
            "mixed": (w * g - 0.5 * w * f * w).abs(),
        }[importance]

    matrices = {n: of_elements(n, w.detach()) for n, w in target.model.named_parameters() if w.dim() == 2}

    def worth(name, row=slice(None), column=slice(None)):
        return matrices[name][row, column].sum().abs()

    return worth


def reduced(values, reduction):
    stacked = torch.stack(values)
    return stacked[0] if reduction == "first" else getattr(stacked, reduction.replace("max", "amax"))(0)


def naive_scores(target, layer, importance, reduction, heads_of):
    """Per KV group and per neuron, channel by channel, matrix by matrix."""
    config, worth = target.config, naive_worth(target, importance)
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    grouped = config.num_attention_heads > config.num_key_value_heads
    groups = []
    for group in range(config.num_key_value_heads):
        score = 0.0
        for c in range(HEAD_DIM):
            rows = [h * HEAD_DIM + c for h in heads_of(group)]
            q = sum(worth(f"{attention}.q_proj.weight", row=row) for row in rows)
            k, v = (worth(f"{attention}.{n}_proj.weight", row=group * HEAD_DIM + c) for n in "kv")
            o = sum(worth(f"{attention}.o_proj.weight", column=column) for column in rows)
            score += reduced([k, q, v, o] if grouped else [q, k, v, o], reduction)
        groups.append(score)
    neurons = [
        reduced(
            [worth(f"{mlp}.{name}.weight", row=n) for name in ("gate_proj", "up_proj")]
            + [worth(f"{mlp}.down_proj.weight", column=n)],
            reduction,
        )
        for n in range(config.intermediate_size)
    ]
    return {"kv_group": torch.stack(groups), "ffn": torch.stack(neurons)}
