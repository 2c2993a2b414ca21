"""What a PPO step computed of its answers, token by token, and how two such records differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dschat.arguments import PpoArguments
from dschat.distributed.collectives import sum_across_ranks
from dschat.losses import policy_ratio
from dschat.rlhf.experience import Experience, MicroBatch, shape_rewards
from dschat.rlhf.ppo_trainer import PPOTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Passes:
    """What actor and critic say of the rows as they learn from them, in each pass over the experience."""

    def __init__(self, trainer: PPOTrainer, ppo: PpoArguments) -> None:
        self._trainer, self._per_pass = trainer, trainer.updates_per_ppo_step // ppo.ppo_epochs
        self._num_passes = ppo.ppo_epochs
        self._seen: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
        trainer.updates.watch = self._note

    def _note(self, role: str, batch: MicroBatch, output: Tensor) -> None:
        number = (self._trainer.position.minibatches_done - 1) // self._per_pass
        assert batch.rows is not None, "micro-batches are cut from the experience by their rows"
        self._seen.setdefault((role, number), []).append((batch.rows, output))

    def table(self, role: str, like: Tensor) -> Tensor:
        """-> [passes, B, T] over all ranks; NaN where no pass met the row. Every rank must call it."""
        found = torch.zeros(self._num_passes, *like.shape, device=like.device)
        times = torch.zeros(self._num_passes, len(like), 1, device=like.device)
        for (name, number), parts in self._seen.items():
            for rows, output in parts if name == role else ():
                found[number, rows, : output.shape[1]] = output.float()
                times[number, rows] = 1
        found, times = (sum_across_ranks(x, axis="data") for x in (found, times))
        return torch.where(times > 0, found, torch.nan)


@dataclass(frozen=True)
class Record:
    """A PPO step: its metrics and, of all answers, what it learned from. Every rank has the same."""

    experience: Experience
    metrics: dict[str, Any]
    columns: dict[str, Tensor]
    """[B] or [B, T], 0 beyond the answers; [passes, B, T] what was said while learning."""


def record_of(trainer: PPOTrainer, passes: Passes, ppo: PpoArguments, metrics: dict[str, Any]) -> Record:
    """The record of the step that the trainer has just done. Every rank must call it."""
    assert trainer.experience is not None, "a PPO step has experience"
    experience = trainer.experience
    rollout, analysis = experience.rollout, experience.analysis
    mask = rollout.answer_mask
    shaped = experience.shaping(analysis.scores, rollout.ended)
    of_tokens = {"old_logprob": analysis.logprobs, "ref_logprob": analysis.ref_logprobs}
    if rollout.logprobs is not None:
        of_tokens["sampled_logprob"] = rollout.logprobs
    if analysis.values is not None:
        of_tokens["value"] = analysis.values
    for name, coef, scores in (("kl_reward", experience.kl_coef, 0 * shaped), ("score_reward", 0.0, shaped)):
        of_tokens[name] = shape_rewards(scores, analysis, mask, ppo, kl_coef=coef)
    of_tokens |= {
        "kl": analysis.log_ratio(mask),
        "entropy": analysis.entropy,
        "raw_advantage": experience.raw_advantages,
        "advantage": experience.advantages,
        "return": experience.returns,
    }
    width = mask.shape[1]
    columns = {name: torch.where(mask, column[:, :width], 0) for name, column in of_tokens.items()}
    columns |= {"score": analysis.scores, "shaped_score": shaped}
    columns |= {f"score_{name}": scores for name, scores in analysis.by_source.items()}
    for role, name in (("actor", "logprob"), ("critic", "new_value")):
        if role == "actor" or analysis.values is not None:
            said = passes.table(role, columns["old_logprob"])
            columns[name] = torch.where(mask, said, torch.where(said.isnan(), said, 0))
    columns["ratio"] = torch.stack(
        [policy_ratio(now, columns["old_logprob"], mask) for now in columns["logprob"]]
    )
    return Record(experience, metrics, columns)


def changes(was: Record, would_be: Record) -> dict[str, float | None]:
    """The largest difference of each column that is not the same to the last bit; None where it has others.

    Columns of other answers have other tokens, and are None all.
    """
    same_answers = torch.equal(was.experience.rollout.input_ids, would_be.experience.rollout.input_ids)
    found: dict[str, float | None] = {} if same_answers else {"answers": None}
    for name in sorted(was.columns.keys() | would_be.columns.keys()):
        before, after = was.columns.get(name), would_be.columns.get(name)
        if before is None or after is None or before.shape != after.shape:
            found[name] = None
        elif not torch.equal(before.nan_to_num(), after.nan_to_num()):
            found[name] = (before - after).abs().nan_to_num().max().item() if same_answers else None
    return found


def prompts_of(record: Record) -> list[list[int]]:
    """The rows of each prompt of the PPO step, in the order of the rollout batch."""
    rows: dict[int, list[int]] = {}
    for row, prompt in enumerate(record.experience.rollout.prompt_rows.tolist()):
        rows.setdefault(prompt, []).append(row)
    return list(rows.values())


def answers_of(
    record: Record, prompts: tuple[int, ...], tokenizer: PreTrainedTokenizerBase, clips: tuple[float, float]
) -> list[dict[str, Any]]:
    """The answers to these prompts, numbered from 1, with a mapping for each token."""
    by_prompt = prompts_of(record)
    return [
        {"prompt": number, **_answer(record, row, tokenizer, clips)}
        for number in prompts
        for row in by_prompt[number - 1]
    ]


def _answer(
    record: Record, row: int, tokenizer: PreTrainedTokenizerBase, clips: tuple[float, float]
) -> dict[str, Any]:
    rollout = record.experience.rollout
    length = int(rollout.answer_lengths[row])
    prompt = rollout.input_ids[row, : rollout.prompt_length]
    prompt = prompt[rollout.attention_mask[row, : rollout.prompt_length].bool()]
    ids = rollout.answers[row, :length].tolist()
    columns = {name: column[..., row, :] for name, column in record.columns.items() if column.dim() > 1}
    of_token = {name: column for name, column in columns.items() if column.dim() == 1}
    of_pass = {name: column for name, column in columns.items() if column.dim() == 2}
    tokens = []
    for place, token in enumerate(ids):
        values: dict[str, Any] = {"id": token, "text": tokenizer.decode([token])}
        values |= {name: column[place].item() for name, column in of_token.items()}
        said = [
            {name: column[number, place].item() for name, column in of_pass.items()}
            for number in range(len(of_pass["ratio"]))
        ]
        values["passes"] = [_pass(one, values["advantage"], clips) for one in said]
        tokens.append(values)
    return {
        "row": row,
        "prompt_text": tokenizer.decode(prompt),
        "answer_text": tokenizer.decode(ids),
        "ended": bool(rollout.ended[row]),
        **{name: column[row].item() for name, column in record.columns.items() if column.dim() == 1},
        "tokens": tokens,
    }


def _pass(values: dict[str, float], advantage: float, clips: tuple[float, float]) -> dict[str, Any]:
    """What a pass said of a token; `clipped` where the ratio is beyond the clip range, and `held` where the
    clip takes the token's gradient away, because its advantage asks for more of the same.
    """
    if values["logprob"] != values["logprob"]:  # NaN: --target_approx_kl ended the step before
        return dict.fromkeys(values) | {"clipped": None, "held": None}
    low, high = clips
    is_above, is_below = values["ratio"] - 1 > high, 1 - values["ratio"] > low
    held = (is_above and advantage > 0) or (is_below and advantage < 0)
    return {**values, "clipped": "above" if is_above else "below" if is_below else "", "held": held}
