"""The page in a real browser: a clip dropped, frames seen, questions asked, answers watched; and what must not happen."""

import base64
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from tests.media.clips import h264
from tests.media.numbered import numbered_frame
from tests.server.fakes import FakeLLM, serving

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NUM_FRAMES, RATE = 100, 25


@pytest.fixture(scope="module")
def clip(folder):
    return h264(folder, "numbered.mp4", num_frames=NUM_FRAMES, width=320, height=192, rate=str(RATE))


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail("the page is tested in Chromium, which is not here: apt-get install chromium")
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not work for root, whom containers often run as; the pages are ours.
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield running
        running.close()


@pytest.fixture
def new_page(browser):
    """Opens pages; at the end none may have complained of anything but what the test expects."""
    contexts, complaints = [], []

    def new(address: str, **options) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: _note(message, complaints))
        page.goto(address)
        return page

    yield new
    for context in contexts:
        context.close()
    assert not complaints


def _note(message, complaints: list[str]) -> None:
    # Chromium reports every answer of 4xx as an error; those are what some tests are about.
    if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
        complaints.append(message.text)


@pytest.fixture
def page(new_page, server):
    page = new_page(server.base_url)
    expect(page.locator("#model")).to_have_text("tiny, up to 8,192 tokens")
    return page


def add(page: Page, *paths) -> None:
    page.get_by_label("Choose videos or images").set_input_files(list(map(str, paths)))


def frames(page: Page):
    return page.locator(".strip img[alt^=Frame]")


def hold_first(page: Page, address: str) -> list:
    """Leave the next request to ``address`` without an answer; it appears in the list."""
    held = []
    page.route(address, lambda route: route.continue_() if held else held.append(route))
    return held


def limit_answers(page: Page, tokens: int) -> None:
    page.get_by_text("Answer settings").click()
    page.get_by_label("Tokens at most").fill(str(tokens))


def ask(page: Page, question: str):
    """Ask, and wait for the whole answer; the element that shows it."""
    answers = page.locator(".turn.assistant")
    before = answers.count()
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")
    expect(answers).to_have_count(before + 1)
    expect(answers.last).to_have_attribute("aria-busy", "false", timeout=60_000)
    return answers.last


def test_a_newcomer(page, clip):
    """Upload, look, change the rate, ask, watch, ask again."""
    add(page, clip)
    expect(page.get_by_role("heading", name="numbered.mp4")).to_be_visible()
    expect(frames(page)).to_have_count(8)  # the checkpoint's own rule: 2 a second
    expect(page.locator(".facts")).to_contain_text("h264 · 320 × 192 · 4.00 s · 25 frames per second · 100 frames")
    expect(page.locator(".plan")).to_contain_text("8 frames of 100 will be seen")
    before = [frame.get_attribute("src") for frame in frames(page).all()]
    cost = page.locator("#cost-text").text_content()

    page.get_by_label("Frames per second").fill("1")
    expect(page.locator(".plan")).to_contain_text("4 frames of 100 will be seen")
    expect(frames(page)).to_have_count(4)
    page.get_by_label("From, seconds").fill("2")
    page.get_by_label("Frames per second").fill("4")
    expect(frames(page).first).to_have_attribute("alt", "Frame 50, at 2.00 s")
    expect(frames(page)).to_have_count(8)
    expect(frames(page).last).to_have_attribute("alt", "Frame 99, at 3.96 s")
    assert before != [frame.get_attribute("src") for frame in frames(page).all()]
    assert page.locator("#cost-text").text_content() != ""
    assert re.fullmatch(r"\d+ of 8,192 tokens \([\d.]+ %\), \d+ of them media", cost or "")

    limit_answers(page, 24)
    first = ask(page, "What happens?")
    expect(first.locator(".phases")).to_have_text(
        re.compile(r"Fetch, decode [\d.]+ s\s*Encode, prefill [\d.]+ s\s*Answer [\d.]+ s\s*as seen from this browser")
    )
    assert first.locator(".text").text_content()
    expect(first.locator(".notes")).to_contain_text("24 answer tokens")
    expect(first.locator(".notes")).to_contain_text("Saw 8 frames")
    expect(first.locator(".notes")).to_contain_text("decoded for this answer")
    expect(first.locator(".cached")).to_have_count(0)

    second = ask(page, "And then?")
    cached, total = re.fullmatch(
        r"(\d+) of (\d+) prompt tokens from the cache", second.locator(".cached").text_content() or ""
    ).groups()
    assert 0 < int(cached) < int(total)
    expect(second.locator(".notes")).to_contain_text("nothing was decoded")
    expect(page.get_by_label("Your question")).to_be_focused()


def test_the_answer_is_streamed(new_page):
    llm = FakeLLM(script=("One ", "two ", "<b>three</b>"))
    llm.hold_prompt.set()
    llm.hold_steps.set()
    with serving(llm) as base_url:
        page = new_page(base_url)
        page.get_by_label("Your question").fill("Count")
        page.get_by_role("button", name="Ask").click()
        answer = page.locator(".turn.assistant")
        expect(answer.locator(".now")).to_have_text(re.compile("Fetch, decode"))
        llm.hold_prompt.clear()
        expect(answer.locator(".now")).to_have_text(re.compile("Encode, prefill"))
        expect(answer.locator(".text")).to_have_text("")
        llm.hold_steps.clear()
        expect(answer).to_have_attribute("aria-busy", "false")
        expect(answer.locator(".text")).to_have_text("One two <b>three</b>")
        expect(answer.locator("b")).to_have_count(0)
        expect(answer.locator(".cached")).to_have_text("16 of 30 prompt tokens from the cache")


def test_the_end_of_a_long_conversation_stays_in_view(new_page):
    llm = FakeLLM(script=[f"line {n}\n" for n in range(60)], step_seconds=0.02)
    with serving(llm) as base_url:
        page = new_page(base_url, viewport={"width": 1300, "height": 600})
        log = page.get_by_role("log")
        below = "log => log.scrollHeight - log.scrollTop - log.clientHeight"
        ask(page, "Much?")
        assert log.evaluate(below) < 2
        page.get_by_label("Your question").fill("More?")
        page.keyboard.press("Enter")
        expect(page.locator(".turn.assistant .text").last).to_contain_text("line 20")
        assert log.evaluate(below) < 2
        log.evaluate("log => { log.scrollTop = 0; }")  # to read the beginning again
        expect(page.locator(".turn.assistant").last).to_have_attribute("aria-busy", "false")
        assert log.evaluate("log => log.scrollTop") == 0


def test_an_answer_can_be_stopped(new_page):
    llm = FakeLLM(script=("On ", *["and on "] * 1000), step_seconds=0.02)
    with serving(llm) as base_url:
        page = new_page(base_url)
        page.get_by_label("Your question").fill("Go")
        page.keyboard.press("Enter")
        expect(page.locator(".turn.assistant .text")).to_contain_text("and on")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".turn.assistant")).to_contain_text("Stopped.")
        expect(page.get_by_role("button", name="Stop")).to_be_hidden()
        page.get_by_label("Your question").fill("Again")
        page.keyboard.press("Enter")
        expect(page.locator(".turn.assistant")).to_have_count(2)
        page.keyboard.press("Escape")
        expect(page.locator(".turn.assistant").last).to_contain_text("Stopped.")
        expect(page.get_by_role("button", name="Ask")).to_be_enabled()
    assert len(llm.aborted) == 2
    # What was said before the stop is part of the conversation.
    assert [message["role"] for message in llm.calls[1]["messages"]] == ["user", "assistant", "user"]


def test_several_media_in_one_conversation(page, clip, folder):
    picture = folder / "picture.png"
    Image.fromarray(numbered_frame(77, 320, 192)).save(picture)
    add(page, clip, picture)
    expect(page.locator(".card")).to_have_count(2)
    expect(page.locator(".strip img[alt='picture.png as the model sees it']")).to_be_visible()
    expect(frames(page)).to_have_count(8)
    limit_answers(page, 4)
    first = ask(page, "Compare them.")
    expect(first.locator(".notes")).to_contain_text("Saw 8 frames")
    expect(first.locator(".notes")).to_contain_text(re.compile(r"Saw \d+ × \d+ pixels"))

    page.get_by_label("Address of a video or an image").fill(clip.as_uri())
    page.get_by_role("button", name="Add").click()
    expect(page.locator(".card")).to_have_count(3)
    expect(frames(page)).to_have_count(16)
    third = ask(page, "And this one?")
    assert (third.locator(".notes").text_content() or "").count("Saw ") == 3
    page.get_by_role("button", name="Remove picture.png").click()
    expect(page.locator(".card")).to_have_count(2)
    page.get_by_role("button", name="Start over").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator(".card")).to_have_count(2)
    expect(page.locator("#cost-text")).to_contain_text("of them media")


def test_a_late_plan_changes_nothing(page, clip):
    """The answer to an older setting comes after that to a newer one, or would."""
    add(page, clip)
    expect(frames(page)).to_have_count(8)
    held = hold_first(page, "**/v1/media/plan")
    page.get_by_label("Frames at most").fill("3")
    page.wait_for_timeout(600)
    assert held
    page.get_by_label("Frames at most").fill("5")
    expect(frames(page)).to_have_count(5)
    held[0].abort()  # what the page itself has given up long ago
    page.wait_for_timeout(300)
    expect(frames(page)).to_have_count(5)
    expect(page.locator(".card-error")).to_be_hidden()


def test_media_that_are_dropped(page, clip):
    data = base64.b64encode(clip.read_bytes()).decode()
    transfer = page.evaluate_handle(
        """(data) => {
          const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
          const transfer = new DataTransfer();
          transfer.items.add(new File([bytes], "<img src=x onerror=alert(1)>.mp4", { type: "video/mp4" }));
          return transfer;
        }""",
        data,
    )
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(frames(page)).to_have_count(8)
    # A file's name is text, whatever it looks like.
    expect(page.locator(".card h3")).to_have_text("<img src=x onerror=alert(1)>.mp4")
    expect(page.locator(".card h3 img")).to_have_count(0)


def test_what_is_refused_is_said_where_it_stands(page, clip, folder):
    add(page, clip)
    expect(frames(page)).to_have_count(8)
    page.get_by_label("Address of a video or an image").fill("file:///etc/passwd")
    page.get_by_label("Kind").select_option("video")
    page.get_by_role("button", name="Add").click()
    second = page.locator(".card").nth(1)
    expect(second.get_by_role("alert")).to_contain_text("allowed")
    expect(page.locator(".card").first.get_by_role("alert")).to_be_hidden()
    page.get_by_label("Frames at most").first.fill("3")  # the other clip is looked at all the same
    expect(frames(page)).to_have_count(3)
    page.get_by_role("button", name="Remove passwd").click()
    text = folder / "notes.mp4"
    text.write_text("not a video at all")
    add(page, text)
    expect(second.get_by_role("alert")).to_contain_text("text or web page")
    answer = ask(page, "What is it?")
    expect(answer.get_by_role("alert")).to_contain_text("text or web page")
    expect(page.get_by_label("Your question")).to_have_value("What is it?")
    page.get_by_role("button", name="Remove notes.mp4").click()
    expect(page.locator(".card-error:visible")).to_have_count(0)


def test_a_prompt_that_does_not_fit(page, clip):
    add(page, clip)
    page.get_by_label("Your question").fill("word " * 12_000)
    page.get_by_label("Frames at most").fill("9")
    expect(page.locator("#advice")).to_contain_text("It does not fit.")
    page.get_by_label("Your question").fill("Short")
    page.get_by_label("If it does not fit, show less of it").check()
    expect(page.locator("#advice")).to_be_hidden()


def test_the_key(new_page):
    with serving(FakeLLM(), api_key="secret") as base_url:
        page = new_page(base_url)
        field = page.get_by_label("This server asks for an API key")
        expect(field).to_be_focused()
        field.fill("guess")
        page.keyboard.press("Enter")
        expect(page.locator("#server-error")).to_contain_text("API key")
        field.fill("secret")
        page.get_by_role("button", name="Use this key").click()
        expect(page.locator("#model")).to_have_text("org/tiny-vl, up to 4,096 tokens")
        expect(field).to_be_hidden()
        expect(page.locator("#server-error")).to_be_hidden()
        expect(ask(page, "Hello").locator(".text")).to_have_text("A cat.")
        page.get_by_text("The same request from a program").click()
        expect(page.locator("#snippet")).to_contain_text("Bearer $FILMSTRIP_API_KEY")
        expect(page.locator("#snippet")).not_to_contain_text("secret")


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_the_programs_do_what_the_page_does(page, server, clip, folder, language):
    """They are run as they stand, beside the file."""
    add(page, clip)
    page.get_by_label("Frames at most").fill("6")
    expect(frames(page)).to_have_count(6)
    limit_answers(page, 5)
    page.get_by_label("Your question").fill('What\'s "new" in $HOME?\n`é` \\ 🎬')
    page.get_by_text("The same request from a program").click()
    page.get_by_role("tab", name="curl").focus()
    if language == "Python":
        page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name=language)).to_have_attribute("aria-selected", "true")
    program = page.locator("#snippet").text_content()
    command = ["bash", "-c", program] if language == "curl" else [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=60)
    assert result.returncode == 0, result.stderr
    assert re.search(r"completion_tokens\"?[:=]5\b", result.stdout)
    expected = page.locator("#cost-text").text_content()
    answer = ask(page, page.get_by_label("Your question").input_value())
    prompt_tokens = re.search(r"(\d+) prompt tokens; 5 answer", answer.locator(".notes").text_content() or "")
    assert prompt_tokens
    assert re.search(rf"prompt_tokens\"?[:=]{prompt_tokens[1]}\b", result.stdout), (result.stdout, expected)


def test_by_keyboard_alone(page, clip):
    """From the top of the page to an answer with Tab, Enter and letters."""
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the question")).to_be_focused()
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert reached.index("files") < reached.index("url") < reached.index("url-kind") < reached.index("question")
    page.locator("#url").focus()
    page.keyboard.type(clip.as_uri())
    page.keyboard.press("Enter")
    expect(frames(page)).to_have_count(8)
    page.locator("#url").focus()
    for _ in range(4):  # the kind, Add, Remove, the rate
        page.keyboard.press("Tab")
    page.keyboard.type("1")
    expect(frames(page)).to_have_count(4)
    limit_answers(page, 3)
    assert ask(page, "Well?").locator(".text").text_content() is not None


@pytest.mark.parametrize(("scheme", "background"), [("light", "rgb(245, 246, 248)"), ("dark", "rgb(18, 20, 25)")])
def test_light_and_dark_and_narrow(new_page, server, clip, scheme, background):
    page = new_page(server.base_url, color_scheme=scheme, viewport={"width": 360, "height": 720})
    expect(page.locator("body")).to_have_css("background-color", background)
    add(page, clip)
    expect(frames(page)).to_have_count(8)
    root = page.locator("html")
    assert root.evaluate("element => element.scrollWidth <= element.clientWidth")


def test_a_link_fills_in_and_fetches_nothing(new_page, server, clip):
    page = new_page(f"{server.base_url}/#video={clip.as_uri()}&question=What%20happens%3F")
    expect(page.get_by_label("Your question")).to_have_value("What happens?")
    expect(page.get_by_label("Address of a video or an image")).to_have_value(clip.as_uri())
    page.wait_for_timeout(400)
    expect(page.locator(".card")).to_have_count(0)
    page.get_by_role("button", name="Add").click()
    expect(frames(page)).to_have_count(8)


def test_a_clip_added_during_an_answer_goes_with_the_next_question(new_page, clip):
    llm = FakeLLM()
    llm.hold_steps.set()
    with serving(llm) as base_url:
        page = new_page(base_url)
        expect(page.locator("#model")).to_contain_text("tiny-vl")
        page.get_by_label("Your question").fill("Who?")
        page.keyboard.press("Enter")
        expect(page.locator(".turn.assistant .now")).to_have_text(re.compile("Encode, prefill"))
        page.get_by_label("Address of a video or an image").fill(clip.as_uri())
        page.get_by_role("button", name="Add").click()
        llm.hold_steps.clear()
        expect(page.locator(".turn.assistant")).to_have_attribute("aria-busy", "false")
        ask(page, "And here?")
        ask(page, "And then?")
        expect(page.locator(".turn.user .notes")).to_have_text(["", clip.name, ""])
    questions = [message["content"] for message in llm.calls[2]["messages"] if message["role"] == "user"]
    types = [[part["type"] for part in question] for question in questions]
    assert types == [["text"], ["video_url", "text"], ["text"]]


def test_a_setting_that_is_taken_back_brings_its_pictures_back(page, clip):
    add(page, clip)
    expect(frames(page)).to_have_count(8)
    held = hold_first(page, "**/v1/media/frames")
    page.get_by_label("Frames at most").fill("3")
    expect(page.locator(".strip li")).to_have_count(3)
    expect(frames(page)).to_have_count(0)
    page.get_by_label("Frames at most").fill("")
    expect(frames(page)).to_have_count(8)
    held[0].abort()  # what the page itself has given up long ago


@pytest.mark.parametrize(("label", "refused"), [("From, seconds", "99"), ("Frames per second", "0")])
def test_a_refused_plan_takes_the_one_before_with_it(page, clip, label, refused):
    add(page, clip)
    expect(frames(page)).to_have_count(8)
    page.get_by_label(label).fill(refused)
    expect(page.locator(".card-error")).to_be_visible()
    expect(page.locator(".plan")).to_have_text("")
    expect(page.locator(".strip li")).to_have_count(0)
    expect(page.locator(".timeline .tick")).to_have_count(0)
    expect(page.locator("#cost")).to_be_hidden()
    page.get_by_label(label).fill("")
    expect(frames(page)).to_have_count(8)
    expect(page.locator(".card-error")).to_be_hidden()
    expect(page.locator(".plan")).to_contain_text("8 frames of 100 will be seen")
    expect(page.locator(".timeline .tick")).to_have_count(8)


def test_a_setting_that_is_no_such_number_is_not_passed_over(page, clip):
    add(page, clip)
    field = page.get_by_label("Frames at most")
    field.fill("3")
    expect(frames(page)).to_have_count(3)
    field.fill("2.5")
    expect(page.locator(".card-error")).to_contain_text("Frames at most: ")
    expect(page.locator(".plan")).to_have_text("")
    expect(frames(page)).to_have_count(0)
    page.get_by_label("Your question").fill("What happens?")
    page.keyboard.press("Enter")
    expect(field).to_be_focused()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_label("Your question")).to_have_value("What happens?")
    field.fill("2")
    expect(frames(page)).to_have_count(2)
    expect(page.locator(".card-error")).to_be_hidden()
    limit_answers(page, 3)
    expect(ask(page, "What happens?").locator(".notes")).to_contain_text("Saw 2 frames")


def test_a_refused_file_is_still_named_after_the_plan_of_another(page, clip, folder):
    long = [folder / "long.mp4", folder / "longer.mp4"]
    for path in long:
        with path.open("wb") as file:
            file.truncate(351 * 1024 * 1024)  # a hole, no bytes on the disk
    add(page, long[0], clip, long[1])
    expect(frames(page)).to_have_count(8)
    for path in long:
        expect(page.locator("#server-error")).to_contain_text(f"{path.name} has 351 MiB")
    page.route("**/v1/media/plan", lambda route: route.abort())
    page.get_by_label("Frames at most").fill("4")
    expect(page.locator("#server-error")).to_contain_text("cannot be reached")
    expect(page.locator("#server-error")).to_contain_text("long.mp4")
    page.unroute("**/v1/media/plan")
    page.get_by_label("Frames at most").fill("3")
    expect(frames(page)).to_have_count(3)
    expect(page.locator("#server-error")).to_contain_text("long.mp4")
    expect(page.locator("#server-error")).not_to_contain_text("cannot be reached")
    page.get_by_label("Address of a video or an image").fill(clip.as_uri())
    page.get_by_role("button", name="Add").click()
    expect(page.locator("#server-error")).to_be_hidden()
    page.route("**/v1/media/plan", lambda route: route.abort())
    page.get_by_label("Frames at most").first.fill("4")
    expect(page.locator("#server-error")).to_contain_text("cannot be reached")
    for _ in range(2):
        page.get_by_role("button", name="Remove numbered.mp4").first.click()
    expect(page.locator("#server-error")).to_be_hidden()


@pytest.mark.parametrize(("label", "wrong"), [("Tokens at most", "0"), ("Temperature", "3")])
def test_a_fault_in_closed_settings_is_shown(new_page, label, wrong):
    with serving(FakeLLM()) as base_url:
        page = new_page(base_url)
        expect(page.locator("#model")).to_contain_text("tiny-vl")
        field = page.get_by_label(label)
        page.get_by_text("Answer settings").click()
        field.fill(wrong)
        page.get_by_text("Answer settings").click()
        expect(field).to_be_hidden()
        page.get_by_label("Your question").fill("Hello")
        page.keyboard.press("Enter")
        expect(field).to_be_visible()
        expect(field).to_be_focused()
        expect(page.locator(".turn")).to_have_count(0)
        field.fill("1")
        expect(ask(page, "Hello").locator(".text")).to_have_text("A cat.")


def test_a_key_that_no_header_can_carry(new_page):
    with serving(FakeLLM(), api_key="secret") as base_url:
        page = new_page(base_url)
        field = page.get_by_label("This server asks for an API key")
        field.fill("ключ")
        page.keyboard.press("Enter")
        expect(page.locator("#server-error")).to_contain_text("cannot hold characters outside Latin-1")
        expect(field).to_be_focused()
        field.fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("org/tiny-vl, up to 4,096 tokens")
        expect(page.locator("#server-error")).to_be_hidden()
