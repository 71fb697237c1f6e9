"""`audioldm2 web` in an environment of its own, used in headless Chromium against a real server."""

import io
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import soundfile
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from audioldm2_triton import AudioLDM2Client
from environments import environment
from metrics_page import is_idle, read_metrics, wait_for_metrics
from serving.local_server import LocalServer, free_ports
from trials.proxy import Proxy

pytestmark = pytest.mark.slow  # an environment with gradio, and a browser

CANCELLED: Final = 'audioldm2_requests_total{engine="cpu",model="denoiser",outcome="cancelled"}'
WAIT_IN_MS: Final = 240_000
# Contrast is that of Gradio's own theme.
NOT_OURS: Final = {"color-contrast"}


@contextmanager
def serving_page(url: str, folder: Path) -> Iterator[str]:
    """The command, as a user has it; its files go to `folder`. Yields the page's address."""
    command = [environment("web") / "bin" / "audioldm2", "web", f"--url={url}", f"--port={free_ports(1)[0]}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(folder)}
    ) as process:
        try:
            assert process.stdout is not None
            ready, address = process.stdout.readline().split()
            assert ready == "ready:"
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 130
    assert not list(folder.glob("audioldm2-web-*"))


@pytest.fixture(scope="module")
def address(server: LocalServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_page(server.grpc_url, tmp_path_factory.mktemp("page")) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        # Chromium refuses root's processes its sandbox.
        launched = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield launched
        launched.close()


@contextmanager
def opened(browser: Browser, address: str) -> Iterator[Page]:
    """The page, which must fetch nothing from anywhere else and log no error."""
    page = browser.new_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda sent: complaints.append(sent.url) if is_elsewhere(sent.url, address) else None)
    page.set_default_timeout(WAIT_IN_MS)
    expect.set_options(timeout=WAIT_IN_MS)
    page.goto(address)
    yield page
    page.close()
    assert not complaints


def is_elsewhere(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", f"blob:{address}"))


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with opened(browser, address) as page:
        yield page


def fill(page: Page, prompt: str, steps: int, seed: str, scheduler: str = "", candidates: int = 1) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("number input for Length in seconds").fill("0.64")
    page.get_by_label("number input for Steps").fill(str(steps))
    page.get_by_label("number input for Candidates").fill(str(candidates))
    page.get_by_label("Seed").fill(seed)
    if scheduler:
        page.get_by_label("Scheduler").fill(scheduler)
        page.get_by_role("option", name=scheduler).click()


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def generate(page: Page) -> None:
    press(page, "Generate")


def test_type_generate_hear(page: Page, server: LocalServer) -> None:
    fill(page, "<b>rain</b> & 雨", 3, "7", "DDIMScheduler", candidates=2)
    page.get_by_label("Negative prompt").fill("noise")
    page.get_by_label("number input for Guidance").fill("2.5")
    generate(page)
    expect(page.get_by_role("status").get_by_text("done, seed 7")).to_be_visible()
    expect(page.get_by_role("heading", name="<b>rain</b> & 雨")).to_be_visible()
    with AudioLDM2Client(server.grpc_url) as client:
        expected = client.generate(
            "<b>rain</b> & 雨",
            negative_prompt="noise",
            audio_length_in_s=0.64,
            num_inference_steps=3,
            guidance_scale=2.5,
            num_waveforms_per_prompt=2,
            seed=7,
            scheduler="DDIMScheduler",
        )
    assert expected.scores is not None
    sounds, pictures = page.locator("audio"), page.get_by_role("img", name="waveform and spectrogram, candidate")
    expect(sounds).to_have_count(2)
    expect(pictures).to_have_count(2)
    for rank in range(2):
        content = page.request.get(sounds.nth(rank).evaluate("each => each.src")).body()
        heard, rate = soundfile.read(io.BytesIO(content), dtype="float32")
        assert rate == expected.sampling_rate
        assert np.abs(heard - np.clip(expected.audio[rank], -1, 1)).max() <= 2.0**-15
        assert pictures.nth(rank).evaluate("each => each.decode().then(() => each.naturalWidth)") == 1200
        caption = page.locator("figcaption").nth(rank)
        expect(caption).to_contain_text(f"candidate {rank + 1} of 2, score {expected.scores[rank]:.4f}")
    # Chromium decodes and plays it to the end.
    assert sounds.first.evaluate(
        "each => new Promise(done => { each.onended = () => done(each.currentTime); each.play(); })"
    ) == pytest.approx(0.64, abs=0.01)


def test_the_first_seconds_are_there_before_the_rest(page: Page) -> None:
    """A whole minute is decoded in many chunks."""
    fill(page, "rain", 1, "7")
    page.get_by_label("number input for Length in seconds").fill("60")
    page.get_by_label("number input for Window in seconds").fill("10")
    generate(page)
    beginning = page.get_by_label("beginning 1")
    heard = page.request.get(beginning.evaluate("each => each.src")).body()
    expect(page.get_by_text("done, seed 7")).to_be_visible()
    expect(beginning).to_have_count(0)
    expect(page.get_by_text("window_length_in_s 10")).to_be_visible()
    whole = page.request.get(page.locator("audio").first.evaluate("each => each.src")).body()
    first, everything = (soundfile.read(io.BytesIO(content))[0] for content in (heard, whole))
    assert 0 < len(first) < len(everything) == 60 * 16000
    assert np.array_equal(first, everything[: len(first)])


def test_a_request_to_copy_and_the_history(page: Page) -> None:
    fill(page, "rain", 2, "7")
    page.get_by_label("Prompt", exact=True).press("Enter")  # as the button does
    expect(page.get_by_text("done, seed 7")).to_be_visible()
    page.get_by_label("Seed").fill("")
    generate(page)
    expect(page.get_by_role("heading", level=2)).to_have_count(2)
    expect(page.get_by_role("status").get_by_text("done, seed")).not_to_contain_text("seed 7")
    seed = page.get_by_role("status").get_by_text("done, seed").inner_text().split()[-1]
    page.get_by_role("button", name="The same sound from a program").click()
    for index, part in enumerate([f"seed={seed},", f"--seed={seed}", f'"seed": {seed},']):
        page.get_by_role("button", name="Copy").nth(index).click()
        page.wait_for_function("part => navigator.clipboard.readText().then(text => text.includes(part))", arg=part)
    violations = Axe().run(page).response["violations"]
    assert {each["id"] for each in violations} <= NOT_OURS


def test_a_cancelled_request_leaves_the_engine(page: Page, server: LocalServer) -> None:
    before = read_metrics(server)[CANCELLED]
    fill(page, "rain", 200, "7", "HeunDiscreteScheduler")
    generate(page)
    expect(page.get_by_role("status").get_by_text("of 399")).to_be_visible()
    expect(page.get_by_role("progressbar", name="steps")).to_have_attribute("max", "399")
    expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    press(page, "Cancel")
    expect(page.get_by_role("alert")).to_have_text("cancelled")
    wait_for_metrics(server, lambda each: each[CANCELLED] == before + 1 and is_idle(each), "a cancelled request")
    # The page goes on.
    fill(page, "rain", 2, "7")
    generate(page)
    expect(page.get_by_text("done, seed 7")).to_be_visible()


def test_a_page_that_is_left_waits_for_nothing(browser: Browser, address: str, server: LocalServer) -> None:
    before = read_metrics(server)[CANCELLED]
    with opened(browser, address) as page:
        fill(page, "rain", 200, "7", "HeunDiscreteScheduler")
        generate(page)
        expect(page.get_by_role("status").get_by_text("of 399")).to_be_visible()
    wait_for_metrics(server, lambda each: each[CANCELLED] == before + 1 and is_idle(each), "a cancelled request")


@pytest.mark.parametrize(
    ("prompt", "seed", "complaint"),
    [(" ", "7", "`prompt`: got ' ' but expected"), ("a", "-1", "`seed`: got -1 but expected"), ("a", "x", "got 'x'")],
)
def test_an_error_is_in_the_contracts_words(prompt: str, seed: str, complaint: str, page: Page) -> None:
    fill(page, prompt, 2, seed)
    generate(page)
    expect(page.get_by_role("alert")).to_contain_text(complaint)
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()


def test_a_server_that_goes_comes_back_and_is_gone(browser: Browser, server: LocalServer, tmp_path: Path) -> None:
    between = Proxy(server.grpc_port)
    url = f"grpc://localhost:{between.port}"
    with serving_page(url, tmp_path) as address, opened(browser, address) as page:
        fill(page, "rain", 200, "7", "HeunDiscreteScheduler")
        generate(page)
        expect(page.get_by_role("status").get_by_text("of 399")).to_be_visible()
        between.reset()
        expect(page.get_by_role("alert")).to_contain_text(f"{url}: ")
        fill(page, "rain", 2, "7")
        generate(page)
        expect(page.get_by_text("done, seed 7")).to_be_visible()
        between.close()
        generate(page)
        expect(page.get_by_role("alert")).to_contain_text(f"{url}: ")


def test_what_keeps_the_page_from_opening_is_one_line(address: str, server: LocalServer) -> None:
    command = [environment("web") / "bin" / "audioldm2", "web"]
    port = address.rstrip("/").rpartition(":")[2]
    for arguments, complaint in (
        ([f"--url={server.grpc_url}", f"--port={port}"], f"audioldm2: --port: got {port} but expected a free"),
        (["--url=grpc://localhost:1"], "audioldm2: grpc://localhost:1: "),
    ):
        run = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
        assert (run.returncode, run.stdout) == (1, "")
        assert run.stderr.startswith(complaint), run.stderr
        assert run.stderr.count("\n") == 1
