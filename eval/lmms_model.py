"""The classes that lmms-eval runs (see `lmms_plugin`). The only file that imports lmms-eval."""

from __future__ import annotations

import os
from itertools import groupby
from typing import Any, ClassVar

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from .lmms_plugin import VideoAnswerer, model_args, one_at_a_time, place


class _Likelihood(tuple[float, bool]):
    """(loss, greedy), which lmms-eval's --use_cache cannot keep: it would come back as a text and fail the metric."""

    def strip(self) -> None:
        raise RuntimeError("lmms-eval's --use_cache cannot keep likelihoods: run likelihood tasks without it")


class _Holimerge(lmms):
    """One question at a time. `is_simple`: the tasks give a text and the paths of videos (`doc_to_visual`); lmms-eval
    0.7 can ask likelihoods of such models only."""

    is_simple = True
    family: ClassVar[str]

    def __init__(
        self, batch_size: Any = 1, device: str | None = None, max_batch_size: Any = None, **arguments: Any
    ) -> None:
        super().__init__()
        one_at_a_time(batch_size)
        checked = model_args(arguments)
        where = place(checked["device_map"], device, os.environ, torch.cuda.is_available())
        self.answerer = VideoAnswerer(checked, self.family, where)
        self.batch_size = 1

    @property
    def device(self) -> torch.device:
        """Where lmms-eval puts what its processes gather."""
        return self.answerer.model.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests, with the tokens that entered the LLM and those written."""
        found = []
        for request in self._shown(requests):
            question, given, to_visual, doc_id, task, split = request.args
            answer = self.answerer.generate(question, self._visuals(to_visual, task, split, doc_id), given)
            counts = TokenCounts(input_tokens=answer.entering, output_tokens=answer.written)
            found.append(GenerationResult(answer.text, counts))
        return found

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For every option (loss, whether greedy decoding writes it), loss = minus the sum of its log-probabilities.

        The loss, because lmms-eval 0.7's likelihood metrics take the option with the smallest value. Wrapped, because
        its evaluator turns a bare tuple into a text. The options of one question, which come one after another, share
        the prompt's prefill.
        """
        found = []
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="holimerge")
        for key, group in groupby(requests, key=_question):
            together = list(group)
            options = [self._option(request) for request in together]
            visuals = self._visuals(together[0].args[2], *key[1:]) if len(together[0].args) > 2 else None
            for score in self.answerer.score(key[0], visuals, options):
                pair = _Likelihood((-score.log_likelihood, score.greedy))
                found.append(GenerationResult(pair, TokenCounts(input_tokens=score.entering)))
            bar.update(len(together))
        bar.close()
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("holimerge's models answer questions of one round")

    def clean(self) -> None:
        """Let go of the model: lmms-eval calls this before it scores."""
        del self.answerer
        super().clean()

    def _shown(self, requests: list[Instance]) -> Any:
        return tqdm(requests, disable=self.rank != 0, desc="holimerge")

    def _visuals(self, to_visual: Any, task: str, split: str, doc_id: int) -> Any:
        return to_visual(self.task_dict[task][split][doc_id])

    def _option(self, request: Instance) -> str:
        option = request.args[1]
        if not callable(option):
            return option
        _, _, _, doc_id, task, split = request.args  # output_type: loglikelihood gives the task's doc_to_target
        return str(option(self.task_dict[task][split][doc_id]))


def _question(request: Instance) -> tuple[Any, ...]:
    """What requests about one prompt share: the text, and the task, split and row where its video is named."""
    arguments = request.args
    return (arguments[0], arguments[4], arguments[5], arguments[3]) if len(arguments) > 2 else (arguments[0],)


class LlavaOnevision(_Holimerge):
    """`--model holimerge_llava_onevision`."""

    family = "llava_onevision"


class Qwen2_5VL(_Holimerge):  # noqa: N801
    """`--model holimerge_qwen2_5_vl`."""

    family = "qwen2_5_vl"
