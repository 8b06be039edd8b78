"""A checkpoint, from a folder or the Hub → model, tokenizer and the lengths of its windows."""

import pickle
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from files import UserError, refuse_missing_folder
from windows import Layout, make_layout

WINDOW_OPTIONS = {"max_seq_length": 512, "max_question_length": 64, "doc_stride": None}


def load_model(name: str | Path, trust_remote_code: bool) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model, in float32 whatever the checkpoint's precision, from a folder or the Hub.

    Raises UserError if they cannot be had, or if the tokenizer is slow and so knows no character offsets.
    """
    try:
        refuse_missing_folder(str(name))
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(name, config=config, trust_remote_code=trust_remote_code)
        model = AutoModelForQuestionAnswering.from_pretrained(
            name, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    except (
        *(OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, HfHubHTTPError, SafetensorError),
        pickle.UnpicklingError,  # torch.load(weights_only=True) refuses objects, which could run code
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--model_name_or_path {name}: cannot be loaded: {reason}") from None
    if not tokenizer.is_fast:
        raise UserError(
            f"--model_name_or_path {name}: its tokenizer ({type(tokenizer).__name__}) is slow and does not say "
            "which characters a token covers; choose a model with a fast tokenizer (a tokenizer.json)"
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(
            f"--model_name_or_path {name}: there is no tokenizer in it (no tokenizer.json or vocab.txt); save the "
            "tokenizer of the model it was trained from beside it"
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer, model


def choose_layout(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    max_seq_length: int | None = None,
    max_question_length: int | None = None,
    doc_stride: int | None = None,
) -> Layout:
    """Window lengths in tokens: what is asked for, else what the checkpoint was trained with, else the defaults.

    They are noted in the model's config, so that a trained model answers with the windows it was trained on. Raises
    UserError for lengths that do not fit each other or the model.
    """
    stored = getattr(model.config, "qa_windows", None)
    if not isinstance(stored, dict) or not all(type(stored.get(name)) is int for name in WINDOW_OPTIONS):
        stored = {}
    given = {
        "max_seq_length": max_seq_length,
        "max_question_length": max_question_length,
        "doc_stride": doc_stride,
    }
    lengths = {name: stored.get(name, default) if given[name] is None else given[name]
               for name, default in WINDOW_OPTIONS.items()}  # fmt: skip
    if given["doc_stride"] is None and (given["max_seq_length"] or given["max_question_length"]):
        lengths["doc_stride"] = None  # a stored stride belongs to the stored lengths
    longest = max_positions(model)
    if given["max_seq_length"] is None:
        lengths["max_seq_length"] = min(lengths["max_seq_length"], longest)
    elif given["max_seq_length"] > longest:
        raise UserError(f"--max_seq_length is {given['max_seq_length']}, the model takes at most {longest} tokens")
    layout = make_layout(tokenizer, **lengths)
    model.config.qa_windows = lengths | {"doc_stride": layout.doc_stride}
    return layout


def max_positions(model: PreTrainedModel) -> int:
    """The longest input of a model in tokens, as its position embeddings allow (2**20 where nothing limits it)."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if not positions or positions < 0:
        return 2**20
    # RoBERTa and its kin count positions from the padding id on: 514 embeddings serve 512 tokens.
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((getattr(table, "padding_idx", None) for table in tables), None)
    return positions if padding is None else positions - padding - 1
