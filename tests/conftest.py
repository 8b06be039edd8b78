"""No network, a cache of the session's own, one thread a process; small tokenizers and models trained on own text."""

import os
import tempfile

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": tempfile.mkdtemp(prefix="drcd-qa-tests-"),
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "2",
}

import itertools
import random
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertTokenizerFast,
    DebertaV2Config,
    DebertaV2ForQuestionAnswering,
    DebertaV2TokenizerFast,
    ElectraConfig,
    ElectraForQuestionAnswering,
    ElectraTokenizerFast,
    RobertaConfig,
    RobertaForQuestionAnswering,
    RobertaTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForQuestionAnswering,
    XLMRobertaTokenizerFast,
)

FAMILIES = ["bert", "electra", "roberta", "deberta", "xlm-roberta"]
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TEXT = [
    "臺北市立圖書館（總館）位於大安區，創立於1952年，藏書1,234,567冊。",
    "《紅樓夢》是清代作家曹雪芹創作的章回體長篇小說，又名《石頭記》。",
    "陳澄波，臺灣嘉義人，是一位畫家；1926年以〈嘉義街外〉入選帝展。",
    "The café at Tamsui, opened in ２０１２, serves naïve tourists 😀 and locals alike.",
    "問題：誰創辦了這所學校？何時開始招生？哪裡是它的校址？",
]


def character_vocabulary() -> dict[str, int]:
    characters = sorted(set("".join(TEXT).lower()) - {" ", "\N{GRINNING FACE}"})
    inside = [f"##{char}" for char in characters if char.isascii() and char.isalnum()]
    return {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *inside])}


def make_tokenizer(family: str):
    """A fast tokenizer of a model family, trained on `TEXT`."""
    if family in ("bert", "electra"):
        kind = BertTokenizerFast if family == "bert" else ElectraTokenizerFast
        return kind(vocab=character_vocabulary(), model_max_length=128)
    if family == "roberta":
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(
            TEXT, vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False
        )
        with tempfile.TemporaryDirectory() as folder:
            trained.save_model(folder)
            return RobertaTokenizerFast.from_pretrained(folder, model_max_length=128)
    trained = tokenizers.SentencePieceUnigramTokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>"] if family == "xlm-roberta" else ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    trained.train_from_iterator(TEXT, vocab_size=160, special_tokens=special, unk_token=special[3], show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        trained.save(f"{folder}/tokenizer.json")
        model = __import__("json").loads(Path(folder, "tokenizer.json").read_text(encoding="utf-8"))["model"]
    kind = XLMRobertaTokenizerFast if family == "xlm-roberta" else DebertaV2TokenizerFast
    return kind(vocab=[tuple(piece) for piece in model["vocab"]], model_max_length=128)


def make_model(family: str, tokenizer):
    """A random one-layer model of a family for `tokenizer`."""
    config, model = {
        "bert": (BertConfig, BertForQuestionAnswering),
        "electra": (ElectraConfig, ElectraForQuestionAnswering),
        "roberta": (RobertaConfig, RobertaForQuestionAnswering),
        "deberta": (DebertaV2Config, DebertaV2ForQuestionAnswering),
        "xlm-roberta": (XLMRobertaConfig, XLMRobertaForQuestionAnswering),
    }[family]
    positions = 130 if "roberta" in family else 128
    more = {"embedding_size": 32} if family == "electra" else {}
    torch_seed()
    return model(
        config(
            vocab_size=len(tokenizer),
            max_position_embeddings=positions,
            pad_token_id=tokenizer.pad_token_id,
            **SMALL,
            **more,
        )
    )


def torch_seed() -> None:
    transformers.set_seed(0)


@pytest.fixture(scope="session", params=FAMILIES)
def tokenizer(request):
    return make_tokenizer(request.param)


@pytest.fixture(scope="session")
def bert():
    return make_tokenizer("bert")


def passages(count: int, seed: int, most: int = 6) -> list[str]:
    """Random passages out of the sentences of `TEXT`, 1 to `most` each."""
    generator = random.Random(seed)
    return ["".join(generator.choices(TEXT, k=generator.randint(1, most))) for _ in range(count)]


def random_examples(count: int, seed: int) -> dict[str, list]:
    """SQuAD columns with random answers out of random passages; several questions a passage."""
    generator = random.Random(seed)
    contexts = passages(max(1, count // 3), seed)
    columns = {"id": [], "question": [], "context": [], "answers": []}
    for number, context in zip(range(count), itertools.cycle(contexts), strict=False):
        start = generator.randrange(len(context))
        text = context[start : start + generator.randint(1, 12)]
        columns["id"].append(str(number))
        columns["question"].append(generator.choice(TEXT)[: generator.randint(1, 40)])
        columns["context"].append(context)
        columns["answers"].append({"text": [text], "answer_start": [start]})
    return columns
