"""The page: its layout, and what its buttons do. Needs the extra `web` (gradio)."""

import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import gradio as gr

from audioldm2_triton.aio import AsyncAudioLDM2Client
from audioldm2_triton.errors import AudioLDM2Error
from audioldm2_triton.events import Progress
from audioldm2_triton.server_info import ServerInfo
from audioldm2_triton.web.controls import ranges, read_options
from audioldm2_triton.web.gallery import show_beginning, show_end, show_error, show_history, show_progress
from audioldm2_triton.web.generation import Beginning, Generated, Runs, generate
from audioldm2_triton.web.request_texts import RequestTexts, request_texts

MAX_HISTORY: Final = 20  # requests of a session

Updates = dict[Any, Any]


def build_page(client: AsyncAudioLDM2Client, info: ServerInfo, url: str, model: str, folder: Path) -> gr.Blocks:
    """Makes the page for one server. Sounds and pictures go to `folder`, which has to be served."""
    runs = Runs()
    with gr.Blocks(title="AudioLDM 2", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# AudioLDM 2\n{info.checkpoint or 'A checkpoint without a name'} at {url}")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                prompt = gr.Textbox(label="Prompt", max_lines=5, autofocus=True)
                controls = _controls(info)
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", min_width=100)
                    cancel = gr.Button("Cancel", interactive=False, min_width=100)
            with gr.Column(scale=3):
                status = gr.HTML(show_end("ready"))
                with gr.Accordion("The same sound from a program", open=False):
                    texts = [
                        gr.Code(label=label, language=language, interactive=False, lines=1, wrap_lines=True)
                        for label, language in (("Python", "python"), ("Command", "shell"), ("curl", "shell"))
                    ]
                sounds = gr.HTML()
        history = gr.State(list[Generated]())

        def show_texts(made: RequestTexts) -> Updates:
            return dict(zip(texts, (made.python, made.command, made.curl), strict=True))

        async def run(values: Updates, request: gr.Request) -> AsyncGenerator[Updates, None]:
            on, off = gr.update(interactive=True), gr.update(interactive=False)
            yield {status: show_progress(None), start: off, cancel: on}
            end: Updates = {}
            try:
                options = read_options(info, {name: values[control] for name, control in controls.items()})
                events = generate(client, values[prompt], options, folder)
                async with contextlib.aclosing(runs.follow(request.session_hash or "", events)) as followed:
                    async for event in followed:
                        if isinstance(event, Progress):
                            yield {status: show_progress(event)}
                            continue
                        if isinstance(event, Beginning):
                            yield {status: show_beginning(event)}
                            continue
                        made = [*values[history], event][-MAX_HISTORY:]
                        end = {
                            status: show_end(f"done, seed {event.options['seed']}"),
                            history: made,
                            sounds: show_history(made),
                            **show_texts(request_texts(url, model, event.prompt, event.options)),
                        }
            except AudioLDM2Error as error:
                end = {status: show_error(error)}
            yield {**end, start: on, cancel: off}

        async def stop(request: gr.Request) -> None:
            await runs.cancel(request.session_hash or "")

        gr.on(
            [start.click, prompt.submit],
            run,
            {prompt, history, *controls.values()},
            [status, start, cancel, sounds, history, *texts],
            show_progress="hidden",
            concurrency_limit=None,  # the server decides how many run at once
            api_visibility="private",
        )
        cancel.click(stop, show_progress="hidden", queue=False, api_visibility="private")
        page.unload(stop)  # whoever leaves the page waits for nothing
    return page


def _controls(info: ServerInfo) -> dict[str, Any]:
    """Makes the controls, by the contract's names."""
    speech = info.transcription == "required"
    return {
        "negative_prompt": gr.Textbox(label="Negative prompt"),
        **({"transcription": gr.Textbox(label="Words to say")} if speech else {}),
        **{
            each.name: gr.Slider(each.low, each.high, each.default, step=each.step, label=each.label)
            for each in ranges(info)
        },
        "seed": gr.Textbox(label="Seed", placeholder="random"),
        "scheduler": gr.Dropdown(list(info.schedulers), value=info.schedulers[0], label="Scheduler"),
    }
