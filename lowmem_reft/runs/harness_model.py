"""The harness's view of a model of ours, which tells a request's context from its continuation."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria

from lowmem_reft.base.blocks import base_of, device_of
from lowmem_reft.base.limits import Limits
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.data.ends import end_ids
from lowmem_reft.data.texts import up_to_answer
from lowmem_reft.data.tokens import Collator, encode_texts
from lowmem_reft.errors import InputError
from lowmem_reft.machine.progress import progress
from lowmem_reft.methods.choices import Shared, continues_from_cache, shared_log_likelihood
from lowmem_reft.methods.likelihood import check_finite
from lowmem_reft.methods.virtual_tokens import (
    embeds_virtual_tokens,
    generate,
    num_virtual_tokens,
    with_virtual_tokens,
)
from lowmem_reft.reft.tuner import prompt_arguments, reft_configs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

logger = logging.getLogger(__name__)

Request = tuple[tuple[str, str], list[int], list[int]]
"""Both texts, the context's tokens, the continuation's tokens: as the harness passes them. Parts of
texts that are scored whole come without texts."""

Scored = tuple[tuple[int, ...], tuple[int, ...], int]
"""The prompt's tokens, those that follow it, and of how many the next ones are scored."""


class AdaptedModel(HFLM):  # type: ignore[misc]  # the harness ships no types
    """The harness's view of a model of ours, which tells context from continuation.

    The model is in evaluation mode, with or without an adapter. ``chats`` tells whether the tasks'
    prompts are written by the tokenizer's chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        chats: bool = False,
        quiet: bool = True,
    ) -> None:
        super().__init__(
            pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size
        )
        self._ends = end_ids(tokenizer, chats=chats)
        bos = tokenizer("")["input_ids"][:1]
        # Chat templates write their own BOS or none, as in training.
        self._start = bos if bos == [tokenizer.bos_token_id] and not chats else []
        self.limits = Limits.of(model, tokenizer)
        positions = self.limits.num_positions or self.max_length
        self._max_length = min(self.max_length, positions) - num_virtual_tokens(model)
        self.quiet = quiet
        self.num_cut_contexts = 0

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a chat as its template writes it, for generation as in training."""
        text = str(super().apply_chat_template(chat_history, add_generation_prompt))
        if not add_generation_prompt:
            return text
        return up_to_answer(text, self.tokenizer, chat_history, source="a task")

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> list[int]:
        """Return the tokens of a text as training has them: after one BOS if there is to be one."""
        ids: list[int] = self.tokenizer(string, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        start = [] if add_special_tokens is False or ids[:1] == self._start else self._start
        if left_truncate_len is not None:
            ids = ids[max(0, len(start) + len(ids) - left_truncate_len) :]
        return start + ids

    def tok_batch_encode(
        self, strings: list[str], left_truncate_len: int | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens and the mask of prompts, left-padded: those of ``encode_prompts``."""
        size = left_truncate_len
        rows = [self.tok_encode(text.rstrip(" "), left_truncate_len=size) for text in strings]
        batch = Collator(self.tokenizer, padding_side="left")([{"input_ids": ids} for ids in rows])
        return batch["input_ids"], batch["attention_mask"]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of both, as of a prompt and its response in training.

        Raises:
            InputError: One of them has no token of its own.
        """
        ((ids, rest),) = encode_texts(
            [(context, continuation)],
            self.tokenizer,
            adds_bos=bool(self._start),
            source=_named((context, continuation)),
        )
        if not ids:
            raise InputError(
                f"a context must have a token of its own, got {context[-40:]!r} before "
                f"{continuation[:40]!r}; leave the task out"
            )
        return ids, rest

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return for each request the continuation's log-likelihood, and whether it is greedy.

        The order is that of the requests. Continuations of the same context share it; where the
        model does not continue from a cache, those that differ in their last token alone do.
        """
        if not requests:
            return []
        self.limits.check(
            [_named(texts) for texts, _, _ in requests],
            [[*context, *continuation] for _, context, continuation in requests],
            cut=True,
        )
        size, quiet = override_bs or int(self.batch_size), self.quiet or disable_tqdm
        cut = [self._cut(context, continuation) for _, context, continuation in requests]
        longest = max(
            len(prompt) + len(rest) for prompt, (_, _, rest) in zip(cut, requests, strict=True)
        )
        if requests[0][0] is not None and continues_from_cache(self.model, longest):
            answers = self._score_shared(requests, cut, batch_size=size, quiet=quiet)
        else:
            answers = self._score_whole(requests, cut, batch_size=size, quiet=quiet)
        for number, (total, _) in enumerate(answers, 1):
            check_finite([total], f"request {number}")
        return answers

    def _score_shared(
        self,
        requests: Sequence[Request],
        cut: Sequence[list[int]],
        *,
        batch_size: int,
        quiet: bool,
    ) -> list[tuple[float, bool]]:
        """Answer requests whose contexts, cut, are each read once for all continuations."""
        sharing: dict[tuple[int, ...], list[int]] = {}
        for index, prompt in enumerate(cut):
            sharing.setdefault(tuple(prompt), []).append(index)
        rows = [
            Shared.of([*prompt], [requests[index][2] for index in indices])
            for prompt, indices in sharing.items()
        ]
        found = shared_log_likelihood(
            self.model, rows, self.tokenizer, batch_size=batch_size, quiet=quiet
        )
        answers = {
            index: answer
            for indices, of_row in zip(sharing.values(), found, strict=True)
            for index, answer in zip(indices, of_row, strict=True)
        }
        return [answers[index] for index in range(len(requests))]

    def _score_whole(
        self,
        requests: Sequence[Request],
        cut: Sequence[list[int]],
        *,
        batch_size: int,
        quiet: bool,
    ) -> list[tuple[float, bool]]:
        """Answer requests by sequences of context and continuation."""
        sharing: dict[Scored, list[int]] = {}
        for index, (texts, _, continuation) in enumerate(requests):
            prompt, rest = tuple(cut[index]), tuple(continuation[:-1])
            key = ((), prompt + rest) if texts is None else (prompt, rest)
            sharing.setdefault((*key, len(continuation)), []).append(index)
        # Like lengths together: little padding; the longest first: too little memory shows at once.
        groups = sorted(sharing.items(), key=lambda item: -len(item[0][0]) - len(item[0][1]))
        answers = {}
        for start in progress(range(0, len(groups), batch_size), "scoring", quiet=quiet):
            batch = groups[start : start + batch_size]
            logits = self._last_logits([scored for scored, _ in batch])
            for row, ((_, _, num_scored), indices) in zip(logits, batch, strict=True):
                predicted = row[len(row) - num_scored :].float().log_softmax(-1)
                greedy = predicted.argmax(-1)
                for index in indices:
                    wanted = torch.tensor(requests[index][2], device=row.device)
                    total = predicted.gather(1, wanted[:, None]).sum()
                    answers[index] = (float(total), bool((greedy == wanted).all()))
        return [answers[index] for index in range(len(requests))]

    def _cut(self, context: list[int], continuation: list[int]) -> list[int]:
        """Return the last tokens of the context that fit: the last of the whole is not read."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise InputError(
                f"a continuation must leave room for its context in {self.max_length} tokens, got "
                f"{len(continuation)}; leave the task out"
            )
        self.num_cut_contexts += len(context) > room
        return context[-room:]

    @torch.no_grad()
    def _last_logits(self, sequences: Sequence[Scored]) -> Tensor:
        """Return the logits of the last tokens of left-padded sequences, (batch, scored, vocab).

        There are as many as any of the sequences needs.
        """
        num_scored = max(count for _, _, count in sequences)
        examples = [
            {"input_ids": [*prompt, *rest], "labels": [*[IGNORED_LABEL] * len(prompt), *rest]}
            for prompt, rest, _ in sequences
        ]
        batch = Collator(self.tokenizer, padding_side="left")(examples)
        names, device = ("input_ids", "attention_mask", "labels"), device_of(self.model)
        ids, mask, labels = (batch[name].to(device) for name in names)
        base = base_of(self.model)
        known = inspect.signature(base.forward).parameters
        if embeds_virtual_tokens(self.model):
            model, inputs = base, with_virtual_tokens(self.model, ids, mask)
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            model, inputs = self.model, {"input_ids": ids, "attention_mask": mask}
            inputs |= {"position_ids": positions, **prompt_arguments(model, labels)}
        if "position_ids" not in known:
            del inputs["position_ids"]
        kept = {"logits_to_keep": num_scored} if "logits_to_keep" in known else {}
        logits: Tensor = model(**inputs, **kept, use_cache=False).logits
        return logits[:, -num_scored:]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods of whole texts: they have no prompt, and are edited as answers."""
        if not all(config.where.response for config in reft_configs(self.model)):
            logger.warning(
                "tasks that score whole texts have no prompt, so the adapter edits nothing there"
            )
        rolled: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return rolled

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, cut from the left to fit.

        Raises:
            InputError: A context has a token without an embedding, or has no room at all.
        """
        contexts = [request.args[0] for request in requests]
        ids = [self.tok_encode(context) for context in contexts]
        self.limits.check([_named((context, "")) for context in contexts], ids, cut=True)
        for request in requests:
            new = request.args[1].get("max_gen_toks", self.max_gen_toks)
            if new >= self.max_length:
                raise InputError(
                    f"a task's max_gen_toks must leave room for a context in the base's "
                    f"{self.max_length} positions, got {new}; leave the task out"
                )
        written: list[str] = super().generate_until(requests, disable_tqdm)
        return written

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """Continue left-padded contexts; return them with what is new.

        What a task does not say is not taken from the base's own ``generation_config``.
        """
        size = context.shape[1]
        # Of prompts that are embeddings, transformers shows the new tokens alone.
        num_before = 0 if embeds_virtual_tokens(self.model) else size
        if not options.setdefault("do_sample", False):
            options.pop("temperature", None)
        new = generate(
            self.model,
            {"input_ids": context, "attention_mask": options.pop("attention_mask")},
            max_new_tokens=max_length - size,
            stopping_criteria=stop_sequences_criteria(
                self.tokenizer, stop, num_before, len(context)
            ),
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self._ends or None,
            use_cache=True,
            **options,
        )
        for end in self._ends:  # an end need not be special, and is no text
            new[new == end] = self.tokenizer.pad_token_id
        return torch.cat([context, new], 1)

    def get_model_info(self) -> dict[str, Any]:
        """Return nothing: the harness would ask the hub for a model that is in memory."""
        return {}


def _named(texts: tuple[str, str] | None) -> str:
    """Return how a message names a request."""
    return "a text" if texts is None else f"the context that ends in {texts[0][-40:]!r}"
