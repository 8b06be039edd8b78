"""Windows → Trainer → spans: the built-in Trainer, with the span search in its prediction step."""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import SaveStrategy

from files import UserError
from postprocess import best_spans, independent_spans
from windows import NO_LABEL, TrainingWindows

_FOR_SEARCH = ("example", "char_starts", "char_ends")  # columns of a batch that the model does not take
SPAN_CHOICES = {"joint": best_spans, "independent": independent_spans}


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model takes of a batch of windows (`windows.Collator`)."""
    return {name: value for name, value in batch.items() if name not in _FOR_SEARCH}


def span_loss(
    starts: torch.Tensor, ends: torch.Tensor, start_positions: torch.Tensor, end_positions: torch.Tensor
) -> torch.Tensor:
    """The mean cross-entropy of the answers' first and last tokens, 0 without any; logits are -inf at padding.

    The models' own loss lets padding take part, so that it depends on which rows share a batch.
    """
    losses = []
    for logits, positions in ((starts, start_positions), (ends, end_positions)):
        total = torch.nn.functional.cross_entropy(logits, positions, ignore_index=NO_LABEL, reduction="sum")
        losses.append(total / (positions != NO_LABEL).sum().clamp(min=1))
    return torch.stack(losses).mean()


def find_spans(
    outputs: Any, batch: dict[str, torch.Tensor], span_choice: str, n_best_size: int, max_answer_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and spans of a batch of windows as `postprocess.best_spans` returns them, from the model's outputs.

    Raises UserError for logits that are not finite, whose order says nothing.
    """
    if not (outputs.start_logits.isfinite().all() and outputs.end_logits.isfinite().all()):
        raise UserError(
            "the model's logits are not finite: its training has diverged, lower --learning_rate; or they are too "
            "large for fp16"
        )
    starts, ends = batch["char_starts"], batch["char_ends"]
    search = SPAN_CHOICES[span_choice]
    return search(outputs.start_logits, outputs.end_logits, starts, ends, n_best_size, max_answer_length)


class EpochSampler(Sampler[int]):
    """Numbers `epoch * len(data) + row` of all rows in an order that depends on seed and epoch alone.

    With `batch`, rows of like length come together: of 50 random batches of so many rows each, the rows are sorted.
    """

    def __init__(self, data: TrainingWindows, seed: int, shuffle: bool, batch: int | None):
        self.data, self.seed, self.shuffle, self.batch = data, seed, shuffle, batch
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.batch:
            lengths = self.data.lengths.tolist()
            order = get_length_grouped_indices(lengths, self.batch, mega_batch_mult=50, generator=generator)
        elif self.shuffle:
            order = torch.randperm(len(self), generator=generator).tolist()
        else:
            order = range(len(self))
        return iter([self.epoch * len(self) + row for row in order])


class _Epochs(TrainerCallback):
    """Tells the sampler which epoch begins. Resumed in mid-epoch, `state.epoch` is what the checkpoint says."""

    def __init__(self, sampler: EpochSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.epoch = int(state.epoch or 0)


class _SaveBetween(TrainerCallback):
    """Saves also where `save_strategy` asks for it when the Trainer itself saves at each evaluation."""

    def on_step_end(self, args, state, control, **kwargs):
        steps = args.save_between_steps  # below 1: a share of all steps, as the Trainer has it
        steps = math.ceil(state.max_steps * steps) if steps < 1 else int(steps)
        # At an epoch's end the evaluation saves. A run killed between a save before it and its own, and resumed from
        # the former, never makes up for the evaluation, and may end with another best model.
        at_end = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        evaluated_next = args.eval_strategy == "epoch" and state.epoch >= args.eval_delay and at_end
        if args.save_between == SaveStrategy.STEPS and state.global_step % steps == 0 and not evaluated_next:
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if args.save_between == SaveStrategy.EPOCH:
            control.should_save = True


class QuestionAnsweringTrainer(Trainer):
    """A Trainer over feature rows (`windows.py`) whose predictions are span candidates instead of logits.

    `predict(...).predictions` is a tuple of arrays over windows: `example` [windows], `scores` [windows, n_best_size]
    and `spans` [windows, n_best_size, 2] as `postprocess.merge_windows` takes them. They leave the device every
    `eval_accumulation_steps` batches; logits never do. Every row says which question it belongs to, so no order of the
    windows is relied upon.

    `questions_a_row` is the number of training questions over that of training rows, to log questions/s.
    """

    def __init__(
        self,
        *args: Any,
        n_best_size: int,
        max_answer_length: int,
        span_choice: str = "joint",
        questions_a_row: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.span_choice = span_choice
        self.n_best_size = n_best_size
        self.max_answer_length = max_answer_length
        self.questions_a_row = questions_a_row
        self._counts = torch.zeros(2, dtype=torch.long, device=self.args.device)  # rows with both ends right, rows
        self._counted_since = time.perf_counter()
        self.add_callback(_SaveBetween)

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        wanted = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = wanted and is_training  # every question needs its answer
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = wanted

    def _get_train_sampler(self, train_dataset: TrainingWindows | None = None) -> EpochSampler:
        data = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        grouped = batch if strategy == "group_by_length" else None
        sampler = EpochSampler(data, seed, shuffle=strategy != "sequential", batch=grouped)
        self.pop_callback(_Epochs)
        self.add_callback(_Epochs(sampler))
        return sampler

    def _get_eval_sampler(self, eval_dataset: torch.utils.data.Dataset) -> Sampler | None:
        # The rows are sorted by length already; `train_sampling_strategy` must not reach them.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = model_inputs(inputs)
        outputs = model(**{name: value for name, value in inputs.items() if name not in self.label_names})
        padding = inputs["attention_mask"] == 0
        starts, ends = (
            logits.float().masked_fill(padding, -torch.inf) for logits in (outputs.start_logits, outputs.end_logits)
        )
        loss = span_loss(starts, ends, inputs["start_positions"], inputs["end_positions"])
        if model.training:
            right = (starts.argmax(dim=1) == inputs["start_positions"]) & (
                ends.argmax(dim=1) == inputs["end_positions"]
            )
            self._counts += torch.stack([right.sum(), torch.tensor(len(right), device=right.device)])
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        labels = [inputs[name] for name in self.label_names if name in inputs]
        with torch.no_grad(), self.compute_loss_context_manager():
            if labels:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                loss = loss.detach().mean()
            else:
                loss, outputs = None, model(**model_inputs(inputs))
        if prediction_loss_only:
            return loss, None, None
        scores, spans = find_spans(outputs, inputs, self.span_choice, self.n_best_size, self.max_answer_length)
        return loss, (inputs["example"], scores, spans), tuple(labels) or None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log: every process is here
            right, rows = self.accelerator.reduce(self._counts).tolist()
            now = time.perf_counter()
            if rows:
                logs["train_exact_match"] = right / rows
                logs["questions_per_second"] = rows * self.questions_a_row / (now - self._counted_since)
            self._counts.zero_()
            self._counted_since = now
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        started = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self._counted_since += time.perf_counter() - started  # evaluation is not training time
        return metrics

    def train(self, *args: Any, **kwargs: Any):
        self._counted_since = time.perf_counter()
        return super().train(*args, **kwargs)
