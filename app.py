"""A web page to ask a trained model: paste a paragraph, ask, and see the answer in its place, the next best beside it.

Reads the trained folders under `outputs`, or any other folder or Hub id that is typed in; writes nothing. The page asks
nothing of other servers. Hugging Face Spaces starts it as it is; GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say where it
listens (127.0.0.1, the first free port from 7860 on).

    python app.py --model_name_or_path outputs/demo
"""

import argparse
import functools
import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

from files import UserError, printable
from inference import Answer, Reader
from options import Parser, command

OUTPUTS = Path("outputs")
FONTS = ["system-ui", "PingFang TC", "Microsoft JhengHei", "Noto Sans TC", "Noto Sans CJK TC", "sans-serif"]
THEME = gr.themes.Default(primary_hue="teal", font=FONTS, font_mono=FONTS, text_size="lg").set(
    body_text_color_subdued="*neutral_500",
    block_info_text_color="*neutral_500",  # the default is too pale to read
)
CSS = """
#passage { max-height: 26rem; overflow-y: auto; border: 1px solid var(--border-color-primary); border-radius: 8px;
  padding: 1rem 1.25rem; background: var(--block-background-fill); }
#passage p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; }
#passage mark { background: #ffd54a; color: #1f2937; border-radius: 4px; padding: 0.1em 0.2em; }
#answer { font-size: 1.5rem; font-weight: 600; overflow-wrap: anywhere; margin: 0; }
#answer.refused { font-size: 1rem; color: var(--error-text-color); }
#best, #passage-box, #best > div, #passage-box > div { padding: 0 !important; }
#answer small { font-size: 1rem; font-weight: 400; color: var(--body-text-color-subdued); white-space: nowrap; }
"""
# Shows the marked answer where the passage is longer than its box.
SCROLL = "() => document.querySelector('#passage mark')?.scrollIntoView({block: 'nearest', behavior: 'smooth'})"
HEADERS = ["答案 Answer", "機率 Prob.", "位置 Place"]
# In the manner of the sample, with names of its kinds: the demo's model knows no other texts.
EXAMPLES = [
    (
        "高雅偉生於民國十二年，故鄉是雲溪鎮。這段往事後來很少有人提起。高雅偉曾就讀龍山師範學校，師從蔡忠承。"
        "「金鹿居士」這個名字則是後人附會的。他的代表作是《上湖傳》，共印了18,437冊。",
        "高雅偉師從誰？",
    ),
    (
        "沈忠盛於1941年遷居鶴梅村。《桃菊記》是他的代表作，印了11,730冊。表兄張思亨是龍木銀行的股東。"
        "《河潭集》是沈忠盛的處女作。沈忠盛的配偶是許思瑞。",
        "沈忠盛的代表作是什麼？",
    ),
    (
        "「馬鹿山人」這個名字則是後人附會的。朱淑儀受雇於馬溪報社，職務是會計。弟弟潘信傑生於1895年，"
        "後來在東岩鎮經商。朱淑儀榮獲露雪文藝獎，時為1934年。同一年石泉鎮發生水災，12,872人無家可歸。"
        "朱淑儀卒於民國五十二年，葬在雪舊城。人們稱她為「南洲居士」。",
        "人們怎麼稱呼朱淑儀？",
    ),
]


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    page = build_page(trained_folders(OUTPUTS), arguments.model_name_or_path)
    # Pages made by a Node server are not what was looked at and tested.
    page.launch(theme=THEME, css=CSS, footer_links=[], ssr_mode=False)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="the model chosen at first: a folder or Hub id (the newest run)")
    return parser.parse_args(argv)


def trained_folders(outputs: Path) -> list[str]:
    """The folders in and under `outputs` that hold a trained model, the newest first; checkpoints are left out."""
    found = [*outputs.glob("*/model.safetensors"), *outputs.glob("*/*/model.safetensors")]
    found = [path for path in found if not path.parent.name.startswith("checkpoint-")]
    return [str(path.parent) for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def build_page(models: Sequence[str], chosen: str | None) -> gr.Blocks:
    """The page, with `models` to choose from and `chosen` (else the first of them) chosen."""
    models = list(dict.fromkeys([chosen, *models] if chosen else models))
    with gr.Blocks(title="中文閱讀問答 drcd-qa", analytics_enabled=False) as page:
        asked = gr.State()  # the paragraph and its answer, for choosing among the n best
        gr.Markdown("# 中文閱讀問答\nPaste a paragraph, ask about it: the model points at the answer in the paragraph.")
        model = gr.Dropdown(
            models,
            value=models[0] if models else None,
            allow_custom_value=True,
            label="模型 Model",
            info="A trained folder under outputs; or type another folder or a Hub id",
            elem_id="model",
        )
        with gr.Row():
            with gr.Column():
                context = gr.Textbox(
                    label="文章 Paragraph", lines=8, max_lines=20, elem_id="context", placeholder="任何長度 Any length"
                )
                question = gr.Textbox(label="問題 Question", lines=1, elem_id="question", submit_btn=False)
                ask = gr.Button("回答 Answer", variant="primary", elem_id="ask")
            with gr.Column():
                best = gr.HTML(show_best(None), elem_id="best")
                passage = gr.HTML(elem_id="passage-box")
                rivals = gr.Dataframe(
                    headers=HEADERS,
                    datatype=["str", "str", "str"],
                    column_widths=["40%", "29%", "31%"],
                    interactive=False,
                    wrap=True,
                    label="最好的候選答案 The n best: choose one to see its place",
                    elem_id="nbest",
                    visible=False,
                    buttons=[],
                )
        gr.Examples([list(example) for example in EXAMPLES], [context, question], label="例子 Examples")
        gr.on(
            [ask.click, question.submit],
            answer,
            inputs=[model, question, context],
            outputs=[asked, best, passage, rivals],
            show_progress_on=best,
            api_name="answer",
        ).then(None, js=SCROLL)
        rivals.select(show_chosen, inputs=asked, outputs=passage, api_name=False).then(None, js=SCROLL)
    return page


def answer(model: str | None, question: str, context: str) -> tuple[Any, ...]:
    """The state, the answer, the passage and the table of the n best; or what is wrong, in words."""
    try:
        if not (model or "").strip():
            raise UserError("no model is chosen: train one (`make demo`), or type a folder or Hub id")
        found = load_reader(model.strip(), last_change(model.strip())).answer(question or "", context or "")
    except UserError as error:
        return None, show_refusal(str(error)), "", gr.Dataframe(visible=False)
    rows = [[candidate["text"], f"{candidate['probability']:.2%}", place(candidate)] for candidate in found.nbest]
    table = gr.Dataframe(rows, visible=bool(rows))
    return (context, found), show_best(found), show_passage(context, found.start, found.end), table


def show_chosen(asked: tuple[str, Answer], chosen: gr.SelectData) -> str:
    """The passage with the candidate of the chosen row marked."""
    context, found = asked
    # By its place: the page may show the rows in another order.
    candidate = next(candidate for candidate in found.nbest if place(candidate) == chosen.row_value[2])
    return show_passage(context, candidate["start"], candidate["end"])


def place(candidate: dict) -> str:
    """Where a candidate stands, in characters of the paragraph, end exclusive."""
    return f"{candidate['start']}–{candidate['end']}"


@functools.lru_cache(maxsize=2)
def load_reader(model: str, changed: float) -> Reader:
    """The reader of a model; of a folder, anew when it was trained again (`changed`)."""
    return Reader(model)


def last_change(model: str) -> float:
    """When the weights in a folder were last written; 0 for what is not there, and on the Hub."""
    path = Path(model, "model.safetensors")
    return path.stat().st_mtime if path.is_file() else 0.0


def show_best(found: Answer | None) -> str:
    if found is None:
        return '<p id="answer"><small>答案會在這裡 The answer will be here</small></p>'
    text = html.escape(found.text) or "（沒有 none）"
    return f'<p id="answer" lang="zh-Hant">{text} <small>{found.probability:.2%}</small></p>'


def show_refusal(message: str) -> str:
    message = printable(message).removeprefix("--model_name_or_path ")  # the option has no name on the page
    return f'<p id="answer" class="refused" role="alert">{html.escape(message)}</p>'


def show_passage(context: str, start: int, end: int) -> str:
    """HTML of the paragraph with its characters `start` to `end` (exclusive) marked; markup in it is only text."""
    before, marked, after = map(html.escape, (context[:start], context[start:end], context[end:]))
    mark = f"<mark>{marked}</mark>" if marked else ""
    return f'<div id="passage" lang="zh-Hant" tabindex="0"><p>{before}{mark}{after}</p></div>'


if __name__ == "__main__":
    main()
