"""The page: fields that become the words of commands, and places for what these say."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from lowmem_reft.data import embedded
from lowmem_reft.errors import InputError
from lowmem_reft.memory.cards import GPUS
from lowmem_reft.memory.shapes import HUB_IDS
from lowmem_reft.methods.table import METHODS
from lowmem_reft.ui.commands import Command, steps_of, words_of
from lowmem_reft.ui.desk import Desk

_ROWS = ("*.jsonl", "*.json", "*.csv", "*.parquet")
"""Files that are offered, of the current directory."""

_WIDTH = 240
"""Of a field at least, pixels: on a phone they stand below each other."""

_MORE = "More flags, as on the command line"

_POLLING_S = 1.0
"""Between two looks at what a command has said."""

STYLE = """
.said textarea { font-family: ui-monospace, monospace; font-size: 13px; }
input[role=combobox] { padding-right: 24px !important; text-overflow: ellipsis; }  /* the arrow's */
@media (max-width: 600px) {
  .tab-container button { padding: 0 10px !important; }
  .block.report { margin: 0 -36px !important; width: auto !important; }
  .chat { height: 280px !important; }
}
.report iframe { width: 100%; height: 85vh; border: 1px solid #8886; border-radius: 8px; }
"""

HEAD = """<script>
let chosen = false;  // with the arrows
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !chosen && event.target.closest(".choice")) {
    event.stopPropagation();
    event.target.blur();
  }
  chosen = event.key.startsWith("Arrow");
}, true);
</script>"""
"""Where a field offers choices, Gradio's Enter takes the first that what is typed is a part of."""

_TO_THE_END = """() => setTimeout(() => {  // when Gradio has given it its height
  const said = document.querySelector(".goes-on textarea");
  if (!said) return;  // the page is being closed
  const end = Math.min(said.end ?? 0, said.scrollHeight);  // as it was before
  const was_at_end = said.scrollTop + said.clientHeight > end - 30;
  said.end = said.scrollHeight;
  if (was_at_end) said.scrollTop = said.end;
}, 100)"""
"""Shows the newest line, unless the reader has scrolled up; Gradio's own scrolling does nothing."""

THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
"""With the reader's own fonts: others would come from the network."""


def build_page(desk: Desk) -> Any:
    """Return the page, Gradio's ``Blocks``; what is started from it runs on ``desk``."""
    with gr.Blocks(title="lowmem_reft", analytics_enabled=False) as page:
        gr.Markdown("# lowmem_reft")
        with gr.Row():
            tiny, rows = str(embedded.model_dir()), str(embedded.task_files()[0])
            model = _choice("Base: hub id or directory", [tiny, *HUB_IDS.values()], tiny)
            data = _choice("Rows: file or datasets id", [rows, *_files()], rows)
        with gr.Tab("Data"):
            _data_tab(model, data)
        with gr.Tab("Train"):
            directory = _train_tab(desk, model, data)
        with gr.Tab("Compare"):
            results = _compare_tab(desk, model, data)
        with gr.Tab("Report"):
            _report_tab(results)
        with gr.Tab("Talk"):
            _talk_tab(desk, model, directory)
        _running(desk)
    return page


def _data_tab(model: Any, data: Any) -> None:
    with gr.Row():
        number = _text("Rows to show", "3")
        more = _text(_MORE, empty="--max-length 256")
    button = gr.Button("Show", variant="primary")
    said = _said("What training takes of each row")

    def show(model: str, data: str, number: str, more: str) -> str:
        command, *flags = words_of("data", more, model=model, num=number)
        return _answered([command, data, *flags] if data else [command, *flags])

    button.click(_refusing(show), [model, data, number, more], said, api_name="data")


def _train_tab(desk: Desk, model: Any, data: Any) -> Any:
    """Return the field of the directory."""
    with gr.Row():
        method = gr.Dropdown([*METHODS], value="loreft", label="Method")
        rank = _text("Rank", empty="the method's own")
        batch_size = _text("Batch size", "8")
    with gr.Row():
        epochs = _text("Epochs", empty="3; up to 10 where there are few rows")
        lr = _text("Learning rate", empty="the method's own")
        directory = _text("Output directory", "run")
    with gr.Row():
        validation = _text("Validation rows", empty="none: the last epoch is kept")
        more = _text(_MORE, empty="--storage nf4 --layers upper:0.5")
        cards = [("this machine's", ""), *(gpu.name for gpu in GPUS.values())]
        card = _choice("Card to plan for, or GiB", cards, "")
    with gr.Row():
        plan_button = gr.Button("Plan")
        train_button = gr.Button("Train", variant="primary")
    said = _said("Plan")

    names = ("model", "data", "method", "rank", "batch_size")
    of_train = ("output_dir", "epochs", "lr", "validation_data")

    def plan(card: str, more: str, *values: str) -> str:
        fields = dict(zip(names + of_train, values, strict=True))
        words = words_of("train", f"--dry-run {more}", **fields)
        if card:
            fields = {name: fields[name] for name in names}
            gib = card.removesuffix("GiB").strip()
            fields |= {"memory_gib": gib} if gib.replace(".", "", 1).isdecimal() else {"gpu": card}
            words = words_of("plan", f"--fit {more}", **fields)
        return _answered(words)

    def train(more: str, *values: str) -> None:
        desk.start(words_of("train", more, **dict(zip(names + of_train, values, strict=True))))

    inputs = [more, model, data, method, rank, batch_size, directory, epochs, lr, validation]
    plan_button.click(_refusing(plan), [card, *inputs], said, api_name="plan")
    train_button.click(_refusing(train), inputs, None, api_name="train")
    return directory


def _compare_tab(desk: Desk, model: Any, data: Any) -> Any:
    """Return the field of the directory."""
    with gr.Row():
        methods = _text("Methods, with overrides in brackets", "loreft,qlora")
        seeds = _text("Seeds", "0")
    with gr.Row():
        test = _text("Test rows", empty="a fixed tenth of the rows")
        directory = _text("Output directory", "compare-results")
        more = _text(_MORE, empty="--epochs 1 --lr-search 0.3,1,3")
    button = gr.Button("Compare", variant="primary")

    def compare(more: str, *values: str) -> None:
        names = ("model", "data", "methods", "seeds", "eval_data", "output_dir")
        desk.start(words_of("compare", more, **dict(zip(names, values, strict=True))))

    inputs = [more, model, data, methods, seeds, test, directory]
    button.click(_refusing(compare), inputs, None, api_name="compare")
    return directory


def _report_tab(results: Any) -> None:
    directory = _text("Directory of a comparison", results.value)
    button = gr.Button("Show", variant="primary")
    shown = gr.HTML(elem_classes="report", padding=False)

    def read(directory: str) -> str:
        page = Path(directory) / "report.html"
        if not page.is_file():
            raise InputError(
                f"directory must be that of a finished comparison, got {directory!r}, where "
                "there is no report.html; start one under Compare"
            )
        text = page.read_text(encoding="utf-8")
        # Its links are to places in itself, and not in the page around it.
        text = html.escape(text.replace("<head>", '<head><base href="about:srcdoc">', 1))
        return f'<iframe title="report" sandbox="allow-scripts" srcdoc="{text}"></iframe>'

    button.click(_refusing(read), directory, shown, api_name="report")
    results.change(lambda value: value, results, directory, api_visibility="private")


def _talk_tab(desk: Desk, model: Any, run: Any) -> None:
    with gr.Row():
        adapter = _text("Adapter, or directory of its run", run.value, empty="none: the base alone")
        more = _text(_MORE, empty="--max-new-tokens 32")
    with gr.Row():
        chats = [
            gr.Chatbot(
                label=label,
                render_markdown=False,
                buttons=[],
                min_width=_WIDTH,
                elem_classes="chat",
            )
            for label in ("Adapter", "Base")
        ]
    notes = _said("Notes", lines=1)
    message = gr.Textbox(label="Message", placeholder="Enter sends it", submit_btn=True)
    button = gr.Button("Begin anew", size="sm")
    told = gr.State([])
    beside = gr.State([])

    def reply(
        model: str, adapter: str, more: str, message: str, told: list[Any], beside: list[Any]
    ) -> Any:
        if not message.strip():
            raise InputError("message must have words, got none; write one")
        asked = {"role": "user", "content": message}
        words = words_of("chat", more, model=model, adapter=adapter)
        answers, noted = desk.answers(words, [*told, asked])
        told, beside = (
            [*before, asked, {"role": "assistant", "content": answer}]
            for before, answer in ((told, answers[0]), (beside, answers[-1]))
        )
        return told if adapter else [], beside, noted, "", told, beside

    outputs = [*chats, notes, message, told, beside]
    inputs = [model, adapter, more, message, told, beside]
    # What is refused would cover all that is filled in: the conversation, and the message.
    message.submit(_refusing(reply), inputs, outputs, show_progress_on=notes, api_name="reply")
    begin = [button.click, *(chat.clear for chat in chats)]
    gr.on(begin, lambda: ([], [], "", "", [], []), None, outputs, api_name="begin")
    run.change(lambda value: value, run, adapter, api_visibility="private")


def _running(desk: Desk) -> None:
    """Show the command that runs or ran last, wherever it was started."""
    with gr.Column(visible=False) as panel:
        state = gr.Textbox(max_lines=12, interactive=False, elem_classes="said")
        button = gr.Button("Stop", variant="stop")
        with gr.Row(visible=False) as charts:
            loss = gr.LinePlot(x="step", y="loss", height=240)
            memory = gr.LinePlot(x="step", y="peak", y_title="peak memory, GiB", height=240)
        said = _said("What it says", "goes-on")
    seen = gr.State()

    def look(seen: Any) -> Any:
        command = desk.command
        now = None if command is None else (command.line, command.code, command.text())
        if now is None or now == seen:
            return [gr.skip() for _ in shown]
        line, code, text = now
        steps = pd.DataFrame(steps_of(text))
        is_drawn = len(steps) > 1  # one point is no line
        ended = "Has ended" if code == 0 else "Has ended without a result"
        return (
            gr.Column(visible=True),
            gr.Textbox(line, label="Runs" if code is None else ended),
            gr.Button(interactive=code is None),
            gr.Row(visible=is_drawn),
            *[steps if is_drawn else gr.skip()] * 2,
            text,
            now,
        )

    shown = [panel, state, button, charts, loss, memory, said, seen]
    gr.Timer(_POLLING_S).tick(look, seen, shown, show_progress="hidden", api_name="look")
    said.change(None, js=_TO_THE_END)
    button.click(desk.stop, None, None, api_name="stop")


def _text(label: str, value: str = "", *, empty: str = "") -> Any:
    """Return a field for a word; ``empty`` says what holds where there is none."""
    return gr.Textbox(value, label=label, placeholder=empty, max_lines=1, min_width=_WIDTH)


def _choice(label: str, choices: list[Any], value: str) -> Any:
    """Return a field with values to choose from, into which others can be typed."""
    return gr.Dropdown(
        choices,
        value=value,
        label=label,
        allow_custom_value=True,
        min_width=_WIDTH,
        elem_classes="choice",
    )


def _said(label: str, *classes: str, lines: int = 8) -> Any:
    return gr.Textbox(
        label=label, lines=lines, max_lines=24, interactive=False, elem_classes=["said", *classes]
    )


def _answered(words: list[str]) -> str:
    """Return a command as it is typed, and what it says until it has ended."""
    command = Command(words)
    return f"{command.line}\n\n{command.wait()}"


def _files() -> list[str]:
    return sorted(str(path) for pattern in _ROWS for path in Path().glob(pattern))


def _refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show what is refused on the page."""

    @functools.wraps(function)
    def shown(*values: Any) -> Any:
        try:
            return function(*values)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return shown
