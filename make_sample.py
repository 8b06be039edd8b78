"""A sample of the project's own in the course's format, and a small untrained model to fine-tune on it.

Reads nothing. Writes `hw7_train.json`, `hw7_dev.json`, `hw7_test.json` (test without its answers), `model/` (a BERT
with random weights, its vocabulary taken from the training questions and passages) and `sample.json` (seed and sizes).

    python make_sample.py --output_dir data/sample

A passage tells the life of one invented person. No name of a person, place, school, work... is drawn twice, so that no
dev or test answer of these kinds can be known from training: a model has to read.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForQuestionAnswering, BertTokenizerFast
from transformers.utils.logging import disable_progress_bar

from files import UserError, replacing_folder, write_json
from options import command, parse_options

# [name] is a fact to ask for, {name} only stands there, {who} is the person the passage is about. The part of a name
# after its "_" is its kind. {name} repeats the text of the passage's fact of that name; else it is a new text.
FACTS = [
    ["{who}生於[birth_year]，故鄉是[birth_place]。", "{who}的故鄉在[birth_place]，生於[birth_year]。",
     "故鄉在[birth_place]的{who}，出生於[birth_year]。"],
    ["{who}曾就讀[study_school]，師從[teacher_person]。", "{who}就讀於[study_school]時，師從[teacher_person]。",
     "{who}早年師從[teacher_person]，後來就讀[study_school]。"],
    ["{who}受雇於[work_firm]，職務是[work_trade]。", "{who}的職務是[work_trade]，受雇於[work_firm]。"],
    ["[move_year]，{who}遷居[move_place]。", "{who}在[move_year]遷居到[move_place]。",
     "{who}於[move_year]遷居[move_place]。"],
    ["{who}的配偶是[spouse_person]。", "{who}的配偶名叫[spouse_person]。", "[spouse_person]是{who}的配偶。"],
    ["{who}的代表作是[main_work]，共印了[main_number]冊。", "[main_work]是{who}的代表作，印了[main_number]冊。",
     "{who}以代表作[main_work]聞名，先後印了[main_number]冊。"],
    ["{who}在{year}發表處女作[first_work]。", "{who}的處女作是[first_work]。", "[first_work]是{who}的處女作。"],
    ["{who}榮獲[won_prize]，時為[won_year]。", "[won_prize]頒給了{who}，時為[won_year]。"],
    ["{who}卒於[death_year]，葬在[death_place]。", "{who}葬於[death_place]，卒於[death_year]。",
     "{who}卒於[death_year]，後來葬在[death_place]。"],
    ["{who}自號「[own_alias]」。", "人們稱{who}為「[own_alias]」。", "「[own_alias]」是{who}的別號。"],
]  # fmt: skip
QUESTIONS = {
    "birth_year": ["{who}生於哪一年？", "{who}是何時出生的？", "請問{who}哪年出生？"],
    "birth_place": ["{who}的故鄉在哪裡？", "{who}的故鄉是什麼地方？", "何處是{who}的故鄉？"],
    "study_school": ["{who}就讀於哪所學校？", "{who}在哪裡讀書？", "{who}曾就讀什麼學校？"],
    "teacher_person": ["{who}的老師是誰？", "{who}師從誰？", "{who}師從何人？"],
    "work_firm": ["{who}受雇於什麼機構？", "誰雇用了{who}？", "{who}在哪裡工作？"],
    "work_trade": ["{who}的職務是什麼？", "{who}擔任什麼職務？", "{who}擔任何種職務？"],
    "move_year": ["{who}哪一年遷居？", "{who}何時遷居？", "{who}是什麼時候遷居的？"],
    "move_place": ["{who}遷居到哪裡？", "{who}遷居何處？", "{who}遷居到什麼地方？"],
    "spouse_person": ["{who}的配偶是誰？", "誰是{who}的配偶？", "{who}的配偶叫什麼名字？"],
    "main_work": ["{who}的代表作是什麼？", "{who}的代表作是哪部書？", "哪部書是{who}的代表作？"],
    "main_number": ["{who}的代表作印了多少冊？", "{who}的書印了幾冊？", "{who}的名作共印多少冊？"],
    "first_work": ["{who}的處女作是什麼？", "{who}的處女作叫什麼？", "哪部作品是{who}的處女作？"],
    "won_year": ["{who}哪一年獲獎？", "{who}何時得獎？", "{who}是什麼時候獲獎的？"],
    "won_prize": ["{who}得過什麼獎？", "{who}榮獲哪個獎項？", "頒給{who}的是什麼獎？"],
    "death_year": ["{who}卒於哪一年？", "{who}何時去世？", "{who}卒於何年？"],
    "death_place": ["{who}葬在哪裡？", "{who}葬於何地？", "{who}葬在什麼地方？"],
    "own_alias": ["{who}的別號是什麼？", "{who}自號什麼？", "人們怎麼稱呼{who}？"],
}
# What nobody asks for: other texts of the same kinds, and the texts of answers once more.
FILLERS = [
    "弟弟{person}生於{year}，後來在{place}經商。", "同一年{place}發生水災，{number}人無家可歸。",
    "好友{person}也在{school}讀過書。", "鄰人{person}寫過一本{work}，賣得並不好。", "當時{firm}才成立不久，人手不足。",
    "表兄{person}是{firm}的股東。", "{year}的報紙曾詳細記載這件事。", "這段往事後來很少有人提起。",
    "鄉里之間至今仍流傳許多說法，真假難辨。", "「{alias}」這個名字則是後人附會的。", "評審{person}對{prize}頗有微詞。",
    "{birth_place}的居民至今傳頌這段往事。", "{main_work}後來由{person}改編成戲曲。", "{teacher_person}對此十分讚賞。",
    "{move_place}的氣候溫和，宜於養病。", "{first_work}的手稿今已不存。", "{work_firm}的舊址現在是一座公園。",
    "{death_year}的冬天特別寒冷。", "{spouse_person}並不同意這樣的安排。",
]  # fmt: skip

SURNAMES = "林陳黃張李王吳劉蔡楊許鄭謝郭洪曾邱廖賴徐周葉蘇莊呂江何蕭羅高潘簡朱鍾游彭詹胡施沈"
# First and second characters apart: a model this small is slow to learn where a name begins from its place alone.
GIVEN = ("志文國春美玉秀俊宏建德仁義信忠孝安淑惠婉雅紹維思敬", "明華榮英傑偉康平和清正元亨利貞芳儀慶祥瑞豐盛昌啟承嗣")
STEM = (
    "東南大新上金銅石水火川河海泉港松竹蘭桃楓龍鶴馬雲雪露",
    "西北小舊下銀鐵土木山溪湖潭灣坡嶺岩沙洲柏梅菊柳杉鳳鹿牛羊霞霜月星",
)
ENDINGS = {
    "place": ["縣", "鎮", "村", "城", "島", "郡", "庄"],
    "school": ["學堂", "書院", "中學", "師範學校", "大學", "學院"],
    "firm": ["印書館", "報社", "商行", "船廠", "銀行", "製藥公司"],
    "prize": ["獎章", "勳章", "文藝獎", "科學獎", "紀念獎"],
    "alias": ["居士", "山人", "先生", "老人", "散人"],
    "work": ["記", "集", "傳", "賦", "夜話", "考", "圖說"],
}
TRADES = [
    "製圖師", "鐘錶匠", "譯員", "編輯", "會計", "教員", "工程師", "攝影師", "藥劑師", "畫師", "記者", "律師", "園藝師",
]  # fmt: skip
SYLLABLES = ["Lan", "Mo", "Ri", "Ka", "Ten", "Sol", "Ver", "Du", "Pa", "Nor", "El", "Bi"]
# The least and the greatest age at which each happens, in years.
LIFE = {"birth_year": (0, 0), "move_year": (20, 50), "won_year": (30, 60), "death_year": (60, 85)}
NUMERALS = "〇一二三四五六七八九"
FULL_WIDTH = str.maketrans("0123456789,", "０１２３４５６７８９，")
RARE_SHARE = 0.04  # of drawn names hold one character so rare that the vocabulary leaves it out
MIN_COUNT = 5  # a character seen less often in training is left to [UNK], so that the model learns what [UNK] is
MAX_LENGTH = 256  # tokens a model input may have
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
OURS = {"hw7_train.json", "hw7_dev.json", "hw7_test.json", "model", "sample.json", "dataset"}  # the last: `make demo`


@dataclass
class SampleOptions:
    """What to make, where."""

    config: str | None = field(default=None, metadata={"help": "YAML file with any of these options"})
    output_dir: str = field(default="data/sample", metadata={"help": "folder to write; only an own one is replaced"})
    seed: int = field(default=7, metadata={"help": "the same seed and sizes write the same bytes"})
    train_passages: int = field(default=900, metadata={"help": "passages in hw7_train.json"})
    dev_passages: int = field(default=160, metadata={"help": "passages in hw7_dev.json"})
    test_passages: int = field(default=90, metadata={"help": "passages in hw7_test.json"})
    questions: int = field(default=4, metadata={"help": "most questions asked of one passage"})

    def sizes(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if name not in ("config", "output_dir", "seed")}

    def __post_init__(self) -> None:
        for name, value in self.sizes().items():
            if value < 1:
                raise ValueError(f"--{name} must be at least 1, not {value}")


class Names:
    """Draws texts of a kind; the name of a person or thing never twice."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.seen: set[str] = set()

    def draw(self, kind: str) -> str:
        """A text of `kind`: year, number, trade, person, or a key of ENDINGS."""
        if kind == "year":
            return self.year(self.rng.randrange(1850, 1990))
        if kind == "number":
            return self.widened(f"{self.rng.randrange(20, 20000):,}")
        if kind == "trade":
            return self.rng.choice(TRADES)
        for _ in range(1000):
            if (text := self.compose(kind)) not in self.seen:
                self.seen.add(text)
                return text
        raise UserError(f"no {kind} is left to name: ask for fewer passages")

    def compose(self, kind: str) -> str:
        choice, chance = self.rng.choice, self.rng.random()
        if kind == "person":
            return choice(SURNAMES) + self.stem(GIVEN)
        if kind == "alias" and chance < 0.2:  # a pen name in Latin letters, with a space in it
            return " ".join(choice(SYLLABLES) + choice(SYLLABLES).lower() for _ in range(2))
        stem, ending = self.stem(STEM), choice(ENDINGS[kind])
        if kind == "work":
            return f"《「{stem}」{ending}》" if chance < 0.1 else f"《{stem}{ending}》"
        return stem + ending

    def stem(self, characters: tuple[str, str]) -> str:
        first, second = map(self.rng.choice, characters)
        rare = chr(self.rng.randrange(0x3400, 0x4DB6))  # a CJK extension A character
        return first + (rare if self.rng.random() < RARE_SHARE else second)

    def year(self, year: int) -> str:
        """A year AD as a text: 1934年, １９３４年 or 民國二十三年."""
        if year > 1911 and self.rng.random() < 0.3:
            return f"民國{chinese_number(year - 1911)}年"
        return self.widened(f"{year}年")

    def widened(self, text: str) -> str:
        return text.translate(FULL_WIDTH) if self.rng.random() < 0.2 else text


def chinese_number(number: int) -> str:
    """1 to 99 in Chinese numerals: 23 is 二十三."""
    tens, ones = divmod(number, 10)
    return (NUMERALS[tens] if tens > 1 else "") + ("十" if tens else "") + (NUMERALS[ones] if ones else "")


def make_split(names: Names, passages: int, questions: int) -> dict[str, Any]:
    """`passages` passages with up to `questions` questions each, in the course's format."""
    data: dict[str, Any] = {"questions": [], "paragraphs": []}
    for paragraph_id in range(passages):
        who, text, spans = make_passage(names)
        data["paragraphs"].append(text)
        for fact in names.rng.sample(list(spans), min(questions, len(spans))):
            start, end = spans[fact]
            row = {"id": len(data["questions"]), "paragraph_id": paragraph_id}
            row["question_text"] = names.rng.choice(QUESTIONS[fact]).replace("{who}", who)
            row |= {"answer_text": text[start:end], "answer_start": start, "answer_end": end - 1}  # the last character
            data["questions"].append(row)
    return data


def make_passage(names: Names) -> tuple[str, str, dict[str, tuple[int, int]]]:
    """A person's name, a passage about them, and the [start, end) in characters of each fact it states."""
    rng = names.rng
    sentences = [rng.choice(paraphrases) for paraphrases in rng.sample(FACTS, rng.randint(2, 6))]
    born = rng.randrange(1850, 1905)
    facts = {
        fact: names.year(born + rng.randint(*LIFE[fact])) if fact in LIFE else names.draw(fact.split("_")[1])
        for fact in re.findall(r"\[(\w+)\]", "".join(sentences))
    }
    unknown = QUESTIONS.keys() - facts.keys()
    fillers = [filler for filler in FILLERS if unknown.isdisjoint(re.findall(r"\{(\w+)\}", filler))]
    sentences += rng.sample(fillers, rng.randint(0, 3))
    rng.shuffle(sentences)

    who, pronoun = names.draw("person"), rng.choice("他她")
    text, spans = "", {}
    for literal, fact, other in re.findall(r"([^\[{]*)(?:\[(\w+)\]|\{(\w+)\}|$)", "".join(sentences)):
        text += literal
        if fact:
            spans[fact] = (len(text), len(text) + len(facts[fact]))
            text += facts[fact]
        elif other == "who":
            text += rng.choice([who, pronoun]) if who in text else who
        elif other:
            text += facts[other] if other in facts else names.draw(other)
    return who, text, spans


def unlabelled(data: dict[str, Any]) -> dict[str, Any]:
    """The same without answers, as the course gives test: `None` in the first two thirds, then the text "null"."""
    labelled = len(data["questions"]) * 2 // 3
    answers = ("answer_text", "answer_start", "answer_end")
    questions = [row | dict.fromkeys(answers, None if row["id"] < labelled else "null") for row in data["questions"]]
    return {"questions": questions, "paragraphs": data["paragraphs"]}


def make_tokenizer(data: dict[str, Any]) -> BertTokenizerFast:
    """A WordPiece tokenizer of single characters: those of `data`'s texts."""
    texts = data["paragraphs"] + [row["question_text"] for row in data["questions"]]
    counts = Counter("".join(texts).lower())
    characters = sorted(char for char, count in counts.items() if count >= MIN_COUNT and not char.isspace())
    inside = [f"##{char}" for char in characters if char.isdigit() or char in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: index for index, token in enumerate(SPECIAL + characters + inside)}
    return BertTokenizerFast(vocab=vocabulary, model_max_length=MAX_LENGTH)


def make_model(vocabulary_size: int, seed: int) -> BertForQuestionAnswering:
    """A BERT small enough to learn the sample on two CPU cores, with random weights.

    Positions start as sines, and keys as queries, so that from the start a token attends to its neighbours and to its
    like. From plain random weights, finding that out takes longer than a demonstration may last.
    """
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary_size,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
    )
    model = BertForQuestionAnswering(config)
    half = config.hidden_size // 2
    angles = torch.arange(MAX_LENGTH)[:, None] / 200 ** (torch.arange(half) / half)
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.copy_(0.2 * torch.cat([angles.sin(), angles.cos()], dim=1))
        for layer in model.bert.encoder.layer:
            layer.attention.self.query.weight.normal_(std=0.07)
            layer.attention.self.key.weight.copy_(layer.attention.self.query.weight)
    return model


def check_folder(folder: Path) -> None:
    """Raise UserError if `folder` is anything but missing, empty, or made by this script."""
    if not folder.exists():
        return
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if found and not (found <= OURS and "sample.json" in found):
        raise UserError(f"{folder}: would be replaced, and holds other files; choose another --output_dir")


@command
def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_options([SampleOptions], argv, __doc__)
    check_folder(Path(options.output_dir))
    names = Names(random.Random(options.seed))
    train = make_split(names, options.train_passages, options.questions)
    dev = make_split(names, options.dev_passages, options.questions)
    test = unlabelled(make_split(names, options.test_passages, options.questions))
    tokenizer = make_tokenizer(train)
    model = make_model(len(tokenizer), options.seed)
    disable_progress_bar()
    with replacing_folder(options.output_dir) as folder:
        for split, data in {"train": train, "dev": dev, "test": test}.items():
            write_json(folder / f"hw7_{split}.json", data)
        tokenizer.save_pretrained(folder / "model")
        model.save_pretrained(folder / "model")
        write_json(folder / "sample.json", {"seed": options.seed} | options.sizes())
    sizes = f"{len(train['questions']):,} training and {len(dev['questions']):,} dev questions"
    print(f"{options.output_dir}: {sizes}, a model of {model.num_parameters():,} random weights")


if __name__ == "__main__":
    main()
