"""The page of `sjd2 play` in Gradio: three tabs over a `Player`, for this machine alone unless asked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

# before Gradio is imported, which reads them once
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
import gradio as gr

from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.playground import markup
from sjd2_lightning.playground.frames import BLANK, Side, sides
from sjd2_lightning.playground.markup import Row
from sjd2_lightning.playground.offer import MOST_PROMPTS, Offer, Wish, several, single
from sjd2_lightning.playground.player import Player
from sjd2_lightning.playground.race import Race

HOST = "127.0.0.1"
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
_MONO = ("ui-monospace", "Consolas", "monospace")
_MOST_VISITORS = 32  # that draw or wait; the player's thread draws for one at a time
_PROMPT_LENGTH = 2000  # letters
_WINDOW, _LEVELS = 128, 32  # greatest values to choose, if the method itself has no greater ones
_STATE_S = 3600  # seconds that a visitor's last decoding is kept


class Page:
    """The events of the page; each takes what the visitor set and returns what the page then shows.

    Args:
        offer: the model and its methods.
        player: the thread that decodes.
    """

    def __init__(self, offer: Offer, player: Player) -> None:
        self.offer, self.player = offer, player

    def draw(
        self,
        prompt: str,
        size: str,
        seed: float | None,
        temperature: float,
        guidance: float,
        name: str,
        window: float,
        levels: float,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """One prompt by the baseline and by a method, live; then what the scrubber needs."""
        keep = gr.skip()
        try:
            wish = _typed(size, seed, temperature, guidance)
            item = single(prompt, wish.seed)
            methods = {
                BASELINE: self.offer.method(BASELINE, wish),
                name: self.offer.method(name, wish, int(window), int(levels)),
            }
            race = Race(self.offer.backbone, item, methods, self.offer.layout(wish))
            for frame in self.player.watch(str(request.session_hash), race):
                yield markup.pair(frame.sides), markup.status(frame), keep, keep, keep
        except ValueError as error:
            yield keep, markup.line(str(error), "problem"), keep, keep, keep
            return
        if race.done:
            most = max(runner.seen.num_passes for runner in race.runners)
            slider = gr.Slider(maximum=most, value=most, interactive=True)
            yield keep, keep, race, slider, self.scrub(race, most)

    def compare(
        self,
        text: str,
        size: str,
        seed: float | None,
        temperature: float,
        guidance: float,
        first: str,
        second: str,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """A list of prompts by two methods: their sum, the pair that is being drawn, all pairs so far."""
        keep = gr.skip()
        rows: list[Row] = []
        try:
            wish = _typed(size, seed, temperature, guidance)
            items = several(text, wish.seed)
            if first == second:
                raise ValueError("Choose two methods that differ.")
            yield markup.summary(rows, len(items)), "", ""
            for item in items:
                methods = {name: self.offer.method(name, wish) for name in (first, second)}
                race = Race(self.offer.backbone, item, methods, self.offer.layout(wish))
                for frame in self.player.watch(str(request.session_hash), race):
                    yield (
                        keep,
                        markup.line(item.prompt) + markup.pair(frame.sides) + markup.status(frame),
                        keep,
                    )
                if frame.state == "stopped":
                    return
                rows.append(Row(item, replace(frame, sides=tuple(sides(race, whole=False)))))
                yield markup.summary(rows, len(items)), "", markup.gallery(rows)
        except ValueError as error:
            yield markup.line(str(error), "problem"), keep, keep

    def stop(self, request: gr.Request) -> str:
        """Ends this visitor's decoding before its next pass, or takes it out of the queue."""
        self.player.stop(str(request.session_hash))
        return markup.line("Stopped.")

    def leave(self, request: gr.Request) -> None:
        """Frees the device when a visitor closes the page."""
        self.player.stop(str(request.session_hash))

    def scrub(self, race: Race | None, place: float) -> str:
        """The last finished decoding after some pass."""
        if race is None:
            return markup.line("Draw something first: a finished decoding can be looked at here.")
        most = max(runner.seen.num_passes for runner in race.runners)
        return markup.moment(sides(race, int(place)), int(place), most)

    def own_values(self, name: str) -> tuple[Any, Any]:
        """Window and levels that a method has by itself."""
        method, levels = self.offer.methods[name], self.offer.has_levels(name)
        return method.num_drafted, gr.Slider(value=method.num_levels, interactive=levels)


def _typed(size: str, seed: float | None, temperature: float, guidance: float) -> Wish:
    """What a browser sent, where 3.0 is 3 and an empty field is nothing."""
    if seed is None or not size:
        raise ValueError("Seed and size must have a value.")
    return Wish(size, int(seed), float(temperature), float(guidance))


def build(offer: Offer, player: Player) -> gr.Blocks:
    """The page.

    Args:
        offer: the model and its methods.
        player: the thread that decodes.
    """
    page = Page(offer, player)
    with gr.Blocks(title="sjd2 play", analytics_enabled=False) as blocks:
        gr.HTML(
            f"<h1>Watch a picture being decoded</h1><p>{escape(offer.name)}. On the left one token a pass; "
            "on the right drafts of many tokens a pass, faint until the model has checked them.</p>",
            elem_classes="heading",
        )
        race = gr.State(None, time_to_live=_STATE_S)
        with gr.Tabs():
            with gr.Tab("Draw"):
                drawn = _draw_tab(page)
            with gr.Tab("Compare"):
                _compare_tab(page)
            with gr.Tab("Pass by pass"):
                slider = gr.Slider(0, 1, 0, step=1, label="Pass", interactive=False, elem_id="scrubber")
                moment = gr.HTML(page.scrub(None, 0), elem_id="moment")
                slider.input(
                    page.scrub,
                    [race, slider],
                    moment,
                    trigger_mode="always_last",
                    show_progress="hidden",
                    api_visibility="private",
                    concurrency_limit=None,
                )
        drawn([race, slider, moment])
        blocks.unload(page.leave)
    return blocks.queue(max_size=_MOST_VISITORS, api_open=False)


def _draw_tab(page: Page) -> Callable[[list[Any]], None]:
    """The first tab; what it returns binds its button, given the outputs that lie in other tabs."""
    offer, own = page.offer, page.offer.methods[page.offer.preferred]
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            prompt = gr.Textbox(
                offer.prompts[0], label="Prompt", max_lines=4, elem_id="prompt", max_length=_PROMPT_LENGTH
            )
            with gr.Row(elem_classes="chips"):
                for text in offer.prompts:
                    chip = gr.Button(text, size="sm", min_width=0)
                    chip.click(None, None, prompt, js=f"() => {json.dumps(text)}", api_visibility="private")
            with gr.Row(elem_classes="go"):
                button = gr.Button("Draw", variant="primary", min_width=90, elem_id="draw")
                stop = gr.Button("Stop", min_width=90, elem_id="stop")
            pictures = gr.HTML(_empty(offer), elem_id="pictures")
            status = gr.HTML(markup.line(""), elem_id="status")
        with gr.Column(scale=2, min_width=240):
            name = gr.Dropdown(offer.others, value=offer.preferred, label="Method on the right")
            every = offer.methods.values()
            most = max(_WINDOW, *(method.num_drafted for method in every))
            window = gr.Slider(2, most, own.num_drafted, step=1, label="Window")
            levels = gr.Slider(
                0,
                max(_LEVELS, *(method.num_levels for method in every)),
                own.num_levels,
                step=1,
                label="Noise levels",
                interactive=offer.has_levels(offer.preferred),
            )
            wish = _wish(offer)
    name.change(
        page.own_values, name, [window, levels], queue=False, show_progress="hidden", api_visibility="private"
    )

    def bind(others: list[Any]) -> None:
        inputs = [prompt, *wish, name, window, levels]
        _decoding([button.click, prompt.submit], page.draw, inputs, [pictures, status, *others], stop, page)

    return bind


def _compare_tab(page: Page) -> None:
    offer = page.offer
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            label = f"Prompts, one a line, at most {MOST_PROMPTS}"
            text = gr.Textbox("\n".join(offer.prompts), label=label, lines=6, max_lines=12, elem_id="prompts")
            with gr.Row(elem_classes="go"):
                button = gr.Button("Compare", variant="primary", min_width=90, elem_id="compare")
                stop = gr.Button("Stop", min_width=90, elem_id="stop-comparing")
            summary = gr.HTML(markup.line(""), elem_id="summary")
            now = gr.HTML("", elem_id="now")
            gallery = gr.HTML("", elem_id="gallery")
        with gr.Column(scale=2, min_width=240):
            first = gr.Dropdown(list(offer.methods), value=BASELINE, label="First method")
            second = gr.Dropdown(list(offer.methods), value=offer.preferred, label="Second method")
            wish = _wish(offer)
    inputs = [text, *wish, first, second]
    _decoding([button.click], page.compare, inputs, [summary, now, gallery], stop, page)


def _decoding(
    triggers: list[Any],
    start: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    stop: gr.Button,
    page: Page,
) -> None:
    """Binds what decodes and what ends it; one output says how it stands."""
    line = next(output for output in outputs if output.elem_id in ("status", "summary"))
    event = gr.on(
        triggers,
        start,
        inputs,
        outputs,
        show_progress="hidden",
        trigger_mode="once",
        concurrency_limit=_MOST_VISITORS,
        api_visibility="private",
    )
    stop.click(
        page.stop, None, line, cancels=[event], queue=False, show_progress="hidden", api_visibility="private"
    )


def _wish(offer: Offer) -> list[Any]:
    """Size, seed and sampling, in the order of `Wish`."""
    sampling = offer.methods[BASELINE].sampling
    sizes = offer.sizes()
    temperature = gr.Slider(0, 2, sampling.temperature, step=0.05, label="Temperature")
    guidance = gr.Slider(0, 10, sampling.guidance_scale, step=0.1, label="Guidance")
    with gr.Row():
        size = gr.Dropdown(
            sizes, value=sizes[0], label="Height x width", allow_custom_value=True, scale=3, min_width=130
        )
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, scale=2, min_width=70)
    return [size, seed, temperature, guidance]


def _empty(offer: Offer) -> str:
    """Two places for pictures, before anything is drawn."""
    sides = [Side(name, 0, 0.0, 0.0, False, BLANK, offer.pixels) for name in (BASELINE, offer.preferred)]
    return markup.pair(sides)


def _theme() -> gr.themes.Base:
    """Fonts of the reader's machine: a named one of Gradio's would be fetched."""
    base = gr.themes.Base(primary_hue="blue", neutral_hue="gray", font=_FONTS, font_mono=_MONO)
    return base.set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")


def serve(blocks: gr.Blocks, *, port: int | None, share: bool, browser: bool) -> str:
    """Starts the page's server in threads of its own, and returns its address.

    Args:
        blocks: the page.
        port: port on this machine; None is the first free one from 7860 on.
        share: whether Gradio opens a public link to it.
        browser: whether to open a browser.

    Raises:
        ValueError: the port is taken.
    """
    mine = {HOST, "localhost"}  # a proxy of the surroundings has no way to this machine
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(sorted(mine | set(filter(None, os.environ.get(name, "").split(",")))))
    try:
        _, local, public = blocks.launch(
            server_name=HOST,
            server_port=port,
            share=share,
            inbrowser=browser,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            theme=_theme(),
            css_paths=[Path(__file__).with_name("page.css")],
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
        )
    except OSError as error:
        raise ValueError(
            f"--port {port}: {error}; give another port, or none for the first free one"
        ) from error
    return public or local
