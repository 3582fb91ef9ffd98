"""Likelihood of given answers after one prompt: one prefill, then each answer on a copy of its cache.

The prompt is reduced before any answer is seen, so no answer can change what is kept for another.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def score_options(model: Any, inputs: Mapping[str, Tensor], options: Sequence[Sequence[int]]) -> list[float]:
    """Log-likelihood of each option as the continuation of one prompt.

    Args:
        model: a Hugging Face video LLM, patched or not.
        inputs: the prompt as `generate` takes it, one row, without the options.
        options: token ids of each option, at least one token each.

    Returns:
        one sum of log-probabilities (natural logarithm) per option.

    Raises:
        ValueError: more than one row, no option, or an empty one.
    """
    ids = inputs["input_ids"]
    if ids.shape[0] != 1:
        raise ValueError(f"options are scored for one prompt at a time, got a batch of {ids.shape[0]}")
    if not options or any(len(o) == 0 for o in options):
        raise ValueError(f"options: each needs at least one token, got lengths {[len(o) for o in options]}")
    prompt = {**inputs, "attention_mask": inputs.get("attention_mask", torch.ones_like(ids))}
    # the positions `generate` would use, so that a scored answer equals a generated one
    positions = model._prepare_position_ids_for_generation(ids, dict(prompt))
    out = model(**prompt, position_ids=positions, use_cache=True, logits_to_keep=1)
    first = out.logits[0, -1].float().log_softmax(-1)
    scores = []
    for option in options:
        tokens = torch.as_tensor(option, device=ids.device)[None]
        score = first[tokens[0, 0].to(first.device)]
        rest = tokens[:, :-1]
        if rest.shape[1]:
            step = model(
                input_ids=rest,
                attention_mask=torch.cat([prompt["attention_mask"], torch.ones_like(rest)], dim=1),
                position_ids=positions[..., -1:] + 1 + torch.arange(rest.shape[1], device=positions.device),
                past_key_values=copy.deepcopy(out.past_key_values),
                use_cache=True,
            )
            after = step.logits[0].float().log_softmax(-1)
            score = score + after.gather(1, tokens[0, 1:, None].to(after.device)).sum().to(score.device)
        scores.append(float(score))
    return scores
