"""The rows of bench.py about the device itself: share of its matrix-product rate, peak memory, half precision.

On a CPU (`--only gpu`) the same code runs with the small model, to test it; the figures say little there.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import BertForQuestionAnswering

from arguments import RunArguments
from options import read_config
from postprocess import best_spans
from trainer import QuestionAnsweringTrainer, model_inputs
from windows import Collator, EvaluationWindows, TrainingWindows, split_features

SECONDS = 2.0  # how long each rate is measured
T4_GIB = 14.0  # what a program can have of a T4's 15


def gpu(bench: Any) -> Iterator[dict]:
    """Rows whose `reference` is the device's own rate or room, or the same in float32."""
    device = torch.device(bench.arguments.device)
    if device.type == "cpu" and not (bench.arguments.only and "gpu" in bench.arguments.only):
        return
    half = torch.bfloat16
    rate = matrix_rate(bench.model, device, half)
    for compiled in (False, True):
        trained = training_rate(bench, compiled)
        name = f"training, 512 tokens, {'compiled' if compiled else 'not compiled'}"
        yield bench.row(f"{name}, share of the matrix-product rate", "FLOP/s", trained["flops"], rate)
        yield bench.row(f"{name}, real tokens of those computed", "tokens/s", trained["tokens"], trained["padded"])
    seconds = search_and_forward(bench, half)
    yield bench.row("evaluation, span search against the forward pass", "s", *seconds, less_is_better=True)
    losses = {kind: strong_steps(bench, kind) for kind in ("fp16" if device.type == "cuda" else "bf16", "no")}
    (precision, low), (_, full) = losses.items()
    yield bench.row(f"strong.yaml, {precision}, loss of one step against float32", "loss", low["loss"], full["loss"])
    if device.type == "cuda":
        name = f"strong.yaml, {precision}, peak device memory against a T4"
        yield bench.row(name, "GiB", low["gib"], T4_GIB, less_is_better=True)


def rate(work: float, run: Callable[[], Any], device: torch.device) -> float:
    """`work` a second, over as many calls as fit into `SECONDS`, after two that do not count."""
    for _ in range(2):
        run()
    synchronize(device)
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        run()
        synchronize(device)
        calls += 1
    return work * calls / (time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(model: BertForQuestionAnswering, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the matrix products of a layer at the model's own shapes, 8 windows of 512 tokens."""
    wide, wider, rows = model.config.hidden_size, model.config.intermediate_size, 8 * 512
    shapes = [(wide, wide)] * 4 + [(wide, wider), (wider, wide)]
    pairs = [
        (torch.randn(rows, inner, device=device, dtype=dtype), torch.randn(inner, outer, device=device, dtype=dtype))
        for inner, outer in shapes
    ]
    work = sum(2 * rows * inner * outer for inner, outer in shapes)
    return rate(work, lambda: [left @ right for left, right in pairs], device)


def step_flops(model: BertForQuestionAnswering, rows: int, width: int) -> float:
    """FLOPs of a training step over `rows` windows of `width` tokens: forward once, backward twice as much."""
    shape = model.config
    layer = 8 * shape.hidden_size**2 + 4 * shape.hidden_size * shape.intermediate_size  # a token's matrix products
    layer += 4 * width * shape.hidden_size  # its attention
    return 3.0 * rows * width * layer * shape.num_hidden_layers


def training_rate(bench: Any, compiled: bool) -> dict[str, float]:
    """FLOP/s, real tokens/s and computed tokens/s of steps on the longest windows, in bfloat16."""
    batch = longest_batch(bench, 8, 64 if compiled else 8)
    model = torch.compile(bench.model) if compiled else bench.model
    optimizer = torch.optim.AdamW(bench.model.parameters(), lr=1e-5, fused=True)
    device = torch.device(bench.arguments.device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**model_inputs(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    bench.model.train()
    rows, width = batch["input_ids"].shape
    steps = rate(1.0, step, device)
    real = int(batch["attention_mask"].sum())
    return {"flops": steps * step_flops(bench.model, rows, width), "tokens": steps * real,
            "padded": steps * rows * width}  # fmt: skip


def search_and_forward(bench: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of the span search and of the forward pass of one batch of evaluation."""
    device = torch.device(bench.arguments.device)
    batch = longest_batch(bench, 32, 8)
    bench.model.eval()
    with torch.inference_mode(), torch.autocast(device.type, dtype):
        outputs = bench.model(**model_inputs(batch))
        logits = outputs.start_logits, outputs.end_logits
        ends = batch["char_starts"], batch["char_ends"]
        searches = rate(1.0, lambda: best_spans(*logits, *ends, 20, 50), device)
        forwards = rate(1.0, lambda: bench.model(**model_inputs(batch)), device)
    return 1 / searches, 1 / forwards


def longest_batch(bench: Any, size: int, multiple: int) -> dict[str, torch.Tensor]:
    """The longest labelled windows of the bench's questions, on its device."""
    rows = EvaluationWindows(split_features(bench.few, bench.tokenizer, bench.layout(), "stride", True))
    batch = Collator(bench.tokenizer, multiple)(rows.__getitems__(list(range(min(size, len(rows))))))
    return {name: values.to(bench.arguments.device) for name, values in batch.items()}


def strong_steps(bench: Any, precision: str) -> dict[str, float]:
    """Loss and peak device memory of two steps of configs/strong.yaml, with its batch and accumulation."""
    strong = read_config(str(bench.root / "configs/strong.yaml"))
    own = RunArguments(
        output_dir=str(bench.folder), max_steps=2, mixed_precision=precision, report_to=[], save_strategy="no",
        eval_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False, dataloader_drop_last=True,
        **{name: strong[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps",
                                           "learning_rate", "warmup_steps")},
    )  # fmt: skip
    rows = split_features(bench.few, bench.tokenizer, bench.layout(), "random", True)
    data = TrainingWindows(rows, bench.layout(), seed=0, negative_window_ratio=0.1)
    weights = {name: value.clone() for name, value in bench.model.state_dict().items()}
    collate = Collator(bench.tokenizer, own.pad_to_multiple_of)
    trainer = QuestionAnsweringTrainer(bench.model, own, collate, data, n_best_size=20, max_answer_length=50)
    if own.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.redirect_stdout(None):
        trainer.train()
    bench.model.load_state_dict(weights)
    peak = torch.cuda.max_memory_allocated() / 2**30 if own.device.type == "cuda" else 0.0
    return {"loss": next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), "gib": peak}
