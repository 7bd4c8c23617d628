"""``filmstrip inspect``: facts that are so, frames that are the right ones, and files people can open."""

import asyncio
import base64
import contextlib
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from filmstrip.cli.main import main
from filmstrip.config import EngineConfig, LLMConfig, ProcessorConfig
from filmstrip.demo.checkpoint import build_tokenizer
from filmstrip.media.contact_sheet import contact_sheet, thumbnail_plan
from filmstrip.processing.inspection import published_view
from filmstrip.processing.prompt_builder import PromptBuilder
from filmstrip.types import ProcessedPrompt
from tests.media.clips import h264
from tests.media.numbered import ffmpeg, numbered_frame, read_number

WIDTH, HEIGHT, RATE, NUM_FRAMES = 320, 192, 25, 75


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inspect")


@pytest.fixture(scope="module")
def clip(folder):
    return h264(folder, "clip.mp4", num_frames=NUM_FRAMES, width=WIDTH, height=HEIGHT, rate=str(RATE))


@pytest.fixture
def inspect(capsys):
    """Runs the command; its exit code, output and complaints."""

    def run(*arguments) -> tuple[int, str, str]:
        try:
            code = main(["inspect", *map(str, arguments), "--num-decode-threads", "2"])
        except SystemExit as ended:  # argparse's way
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def found(inspect):
    """The same as JSON."""

    def run(*arguments) -> dict:
        code, out, err = inspect(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


def test_facts_of_a_clip(found, clip):
    said = found(clip)
    assert said["facts"] == {
        "num_bytes": clip.stat().st_size,
        "total_num_frames": NUM_FRAMES,
        "fps": RATE,
        "duration": NUM_FRAMES / RATE,
        "height": HEIGHT,
        "width": WIDTH,
        "video_backend": "pyav",
        "codec": "h264",
        "rotation_degrees": 0,
        "is_mirrored": False,
        "timing_assumed": False,
        "has_audio": False,
        "variable_frame_rate": False,
    }
    assert (said["source"], said["container"]) == ("clip.mp4", "MP4")
    # Qwen3-VL: 2 frames a second, evenly, rounded; sides multiples of 32; two frames share their tokens.
    indices = np.linspace(0, NUM_FRAMES - 1, 6).round().astype(int).tolist()
    assert (said["num_frames"], said["frame_indices"]) == (6, indices)
    assert said["timestamps"] == pytest.approx([index / RATE for index in indices])
    assert (said["width"], said["height"]) == (WIDTH, HEIGHT)
    assert said["num_tokens"] == 3 * (WIDTH // 32) * (HEIGHT // 32)
    assert said["context_share"] == said["prompt_tokens"] / said["max_model_len"] == said["prompt_tokens"] / 262_144


def test_a_variable_rate_rotation_and_sound(found, folder):
    times = "settb=1/90000,setpts='if(lt(N,20),N,20+(N-20)*3)*3600'"
    uneven = h264(folder, "uneven.mp4", "-vf", times, "-vsync", "vfr", "-video_track_timescale", "90000", num_frames=40)
    said = found(uneven, "--num-frames", "40")
    assert said["facts"]["variable_frame_rate"]
    assert said["timestamps"] == pytest.approx([(n if n < 20 else 20 + (n - 20) * 3) / 25 for n in range(40)])

    turned = folder / "turned.mp4"
    plain = h264(folder, "plain.mp4", num_frames=10, width=192, height=96)
    ffmpeg("-i", plain, "-c", "copy", "-metadata:s:v:0", "rotate=90", turned)
    facts = found(turned)["facts"]
    assert facts["rotation_degrees"] in (90, 270)
    assert (facts["width"], facts["height"]) == (96, 192)

    noisy = folder / "noisy.webm"
    tone = ("-f", "lavfi", "-i", "sine=duration=1")
    ffmpeg("-i", plain, *tone, "-c:v", "libvpx-vp9", "-c:a", "libvorbis", "-shortest", noisy)
    said = found(noisy)
    assert said["facts"]["has_audio"]
    assert (said["facts"]["codec"], said["container"]) == ("vp9", "Matroska or WebM")


@pytest.mark.parametrize(
    ("flags", "indices"),
    [
        (("--fps", "1"), [0, 37, 74]),
        (("--fps", "2", "--start", "1", "--end", "2"), [25, 50]),
        (("--start-seconds", "2.8"), [70, 71, 73, 74]),
        (("--num-frames", "-1", "--end", "0.1"), [0, 1, 2]),
    ],
)
def test_frames_that_were_asked_for(found, clip, flags, indices):
    assert found(clip, *flags)["frame_indices"] == indices


def test_pixel_limits_and_long_lists(inspect, found, clip):
    """People see the beginning and the end of a long list, programs all of it."""
    limits = ("--num-frames", "70", "--mm-processor-kwargs", '{"video": {"max_pixels": 600000}}')
    said = found(clip, *limits)
    assert 70 * said["width"] * said["height"] <= 600_000
    assert len(said["frame_indices"]) == 70
    assert "... 6 more, which --json lists ..." in " ".join(inspect(clip, *limits)[1].split())


async def build_prompt(model: str, url: str, **processor) -> ProcessedPrompt:
    builder = PromptBuilder(LLMConfig(EngineConfig(model), processor=ProcessorConfig(**processor)))
    try:
        messages = [{"role": "user", "content": [{"type": "video_url", "video_url": url}]}]
        return await builder.build(messages, max_model_len=32_768, report=lambda progress: None)
    finally:
        await builder.close()


def test_a_checkpoint_is_counted_exactly_and_without_weights(found, qwen3_vl_dir, clip, tmp_path):
    """As the server would count it, from a copy of the checkpoint that has no weights."""
    shutil.copytree(qwen3_vl_dir, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    said = found(clip, "--model", tmp_path / "model")
    prompt = asyncio.run(build_prompt(qwen3_vl_dir, str(clip)))
    (record,) = prompt.media
    assert (said["prompt_tokens"], said["prompt_tokens_exact"]) == (len(prompt.token_ids), True)
    for name in ("frame_indices", "timestamps", "width", "height", "num_tokens"):
        assert said[name] == getattr(record, name)
    assert said["max_model_len"] == 32_768


def test_another_chat_template_is_counted(found, qwen3_vl_dir, clip, tmp_path):
    """The same of inspecting and of asking: nothing but the video, which is 3 groups of frames with their times."""
    template = tmp_path / "bare.jinja"
    template.write_text("<|vision_start|><|video_pad|><|vision_end|>")
    said = found(clip, "--model", qwen3_vl_dir, "--chat-template", template)
    prompt = asyncio.run(build_prompt(qwen3_vl_dir, str(clip), chat_template=str(template)))
    assert said["prompt_tokens"] == len(prompt.token_ids)
    assert said["prompt_tokens"] < found(clip, "--model", qwen3_vl_dir)["prompt_tokens"]


@pytest.mark.parametrize("flag", ["--chat-template", "--revision"])
def test_what_a_model_has_needs_a_model(inspect, clip, flag):
    assert inspect(clip, flag, "x")[0] == 2
    assert f"argument {flag}: needs --model" in inspect(clip, flag, "x")[2]


def test_words_are_counted_as_qwen_cuts_them():
    view = published_view(LLMConfig(EngineConfig("")).media, LLMConfig(EngineConfig("")).processor)
    cut = build_tokenizer().backend_tokenizer.pre_tokenizer
    for text in ("<0.5 seconds>", "<12.5 seconds>", "<1234.5 seconds>", ""):
        assert view.num_text_tokens(text) == len(cut.pre_tokenize_str(text))


def test_text_for_people(inspect, clip):
    code, out, err = inspect(clip, "--num-frames", "3", "--max-model-len", "150")
    assert (code, err) == (0, "")
    said = " ".join(out.split())
    assert said.startswith("clip.mp4 file h264 in MP4, ")
    assert f"{clip.stat().st_size:,} bytes, no sound" in said
    assert "320 x 192, 25 frames per second, constant, 75 frames in 3.000 s" in said
    assert "3 of 75 frames at 320 x 192 pixels: 120 tokens" in said
    assert "of a context of 150 (--max-model-len)" in said
    assert "does not fit" not in said
    assert "frames 0 at 0.000 s, 37 at 1.480 s, 74 at 2.960 s" in said
    assert "it does not fit" in " ".join(inspect(clip, "--num-frames", "6", "--max-model-len", "150")[1].split())


class Pictures(HTMLParser):
    """Pictures of a page with their texts, and what it would load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[tuple[np.ndarray, str]] = []
        self.captions: list[str] = []
        self.elsewhere: list[str] = []
        self._in_caption = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self._in_caption = tag == "figcaption"
        for name in ("src", "href"):
            if not (attributes.get(name) or "data:").startswith("data:"):
                self.elsewhere.append(attributes[name])
        if tag == "img":
            data = base64.b64decode(attributes["src"].removeprefix("data:image/jpeg;base64,"), validate=True)
            self.pictures.append((np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), attributes["alt"]))

    def handle_data(self, data):
        if self._in_caption and data.strip():
            self.captions.append(data)


def test_the_page_needs_nothing_else_and_a_name_is_text(inspect, clip, folder):
    named, path = folder / "<script>alert(1)<", folder / "page.html"
    named.write_bytes(clip.read_bytes())
    assert inspect(named, "--num-frames", "5", "--html", path)[0] == 0
    text = path.read_text()
    page = Pictures(text)
    assert not page.elsewhere
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;" in text
    indices = np.linspace(0, NUM_FRAMES - 1, 5).astype(int).tolist()
    assert [read_number(pixels) for pixels, _ in page.pictures] == indices
    assert [alt for _, alt in page.pictures] == [f"frame {n}, at {n / RATE:.3f} s" for n in indices]
    assert page.captions == [f"frame {n}, {n / RATE:.3f} s" for n in indices]
    assert "320 x 192, 25 frames per second" in text


def test_the_sheet_has_all_frames(inspect, clip, folder):
    path = folder / "sheet.png"
    assert inspect(clip, "--num-frames", "9", "--sheet", path)[0] == 0
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        pixels = np.asarray(sheet.convert("RGB"))
    # Cells are found by the bar of the lowest bit's left border: rows of a picture are alike, the rest is background.
    background = pixels[-1, -1]
    is_picture = (np.abs(pixels.astype(int) - background).sum(-1) > 0).mean(1) > 0.5
    tops = np.flatnonzero(np.diff(is_picture.astype(int)) == 1) + 1
    numbers = []
    for top in tops:
        line = np.abs(pixels[top].astype(int) - background).sum(-1) > 0
        for left in np.flatnonzero(np.diff(line.astype(int)) == 1) + 1:
            cell = pixels[top : top + HEIGHT, left : left + WIDTH]
            if cell.shape[:2] == (HEIGHT, WIDTH):
                numbers.append(read_number(cell))
    assert numbers == np.linspace(0, NUM_FRAMES - 1, 9).astype(int).tolist()


def test_sheets_of_any_number():
    frame = np.full((9, 16, 3), 200, np.uint8)
    for count in (1, 2, 5, 50):
        labels = [f"{n}" for n in range(count)]
        sheet = np.asarray(contact_sheet([frame] * count, labels, "a title"))
        assert (sheet == 200).all(-1).sum() >= count * 9 * 16
    with pytest.raises(ValueError, match="a label for each"):
        contact_sheet([frame], [])


def test_thumbnails_keep_their_shape_and_never_grow():
    plan = thumbnail_plan((0, 5), 720, 1280, 320)
    assert (plan.height, plan.width, plan.patches_shape) == (180, 320, (2 * 180 * 320, 3))
    assert thumbnail_plan((0,), 64, 96, 320).width == 96
    assert thumbnail_plan((0,), 2, 4000, 100).height == 1


def test_a_picture(inspect, found, folder):
    path = folder / "picture.png"
    Image.fromarray(numbered_frame(300, 320, 192)).save(path)
    said = found(path, "--image")
    assert said["facts"] == {"num_bytes": path.stat().st_size, "height": 192, "width": 320, "format": "PNG"}
    # Published smallest picture: 65,536 pixels; this one has 61,440.
    assert said["width"] * said["height"] >= 65_536
    assert said["num_tokens"] == (said["width"] // 32) * (said["height"] // 32)
    assert (said["frame_indices"], said["timestamps"]) == ([], [])
    outputs = ["--html", folder / "picture.html", "--sheet", folder / "picture_sheet.png"]
    code, out, _ = inspect(path, "--image", *outputs)
    assert code == 0
    assert "PNG" in out
    ((pixels, alt),) = Pictures((folder / "picture.html").read_text()).pictures
    assert (read_number(pixels), alt) == (300, "picture.png")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def web(folder):
    handler = lambda *arguments: Quiet(*arguments, directory=str(folder))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_all_kinds_of_addresses(inspect, found, clip):
    expected = found(clip, "--num-frames", "4")
    there_is = ("facts", "frame_indices", "timestamps", "num_tokens", "prompt_tokens")
    data = "data:video/mp4;base64," + base64.b64encode(clip.read_bytes()).decode()
    with web(clip.parent) as address:
        there = f"{address}/clip.mp4?token=secret"
        code, out, err = inspect(there)
        assert (code, out) == (1, "")
        assert "not public" in err or "private" in err
        remote = found(there, "--num-frames", "4", "--allow-private-media-urls")
    assert remote["source"] == "clip.mp4"
    inline = found(data, "--num-frames", "4")
    for said in (found(clip.as_uri(), "--num-frames", "4"), remote, inline):
        for name in there_is:
            assert said[name] == expected[name]
    assert inline["source"] == "data:video/mp4;base64"


def test_frames_sampled_by_the_client(found):
    pictures = []
    for number in (3, 5, 9):
        buffer = io.BytesIO()
        Image.fromarray(numbered_frame(number, 160, 96)).save(buffer, "JPEG")
        pictures.append(base64.b64encode(buffer.getvalue()).decode())
    url = "data:video/jpeg;base64," + ",".join(pictures)
    said = found(url)
    assert (said["num_frames"], said["facts"]["timing_assumed"], said["container"]) == (3, True, None)
    said = found(url, "--start", "0.5", "--end", "0.9")
    assert (said["frame_indices"], said["timestamps"]) == ([1], [0.5])
    said = found(url, "--fps", "4")  # of frames like these, it says when they were taken
    assert (said["timestamps"], said["facts"]["timing_assumed"]) == ([0, 0.25, 0.5], False)


def test_names_that_the_terminal_cannot_show(clip, tmp_path):
    """A byte that is no text, letters that the encoding lacks, and a dash in front: all are names of files."""
    for name in (b"a\xff.mp4", "ünï.mp4".encode(), b"-dash.mp4"):
        (tmp_path / os.fsdecode(name)).write_bytes(clip.read_bytes())
        command = [sys.executable, "-m", "filmstrip.cli.main", "inspect", "--html", "page.html", "--", name]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, timeout=120
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.decode("ascii").startswith(("a\\xff.mp4", "\\xfcn\\xef.mp4", "-dash.mp4", "a\\udcff.mp4"))
        assert "<html" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_place_that_cannot_be_written_to(inspect, clip, tmp_path):
    for path in ("/proc/sheet.png", tmp_path, ""):
        for flag in ("--sheet", "--html"):
            code, _, complaint = inspect(clip, "--num-frames", "1", flag, path)
            assert code == 2
            assert re.search(r"cannot write /proc/sheet\.png: |is no name of a file to write", complaint)


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["nowhere.mp4"], 2, "there is no file nowhere.mp4"),
        (["CLIP", "--sheet", "no/such/dir/sheet.png"], 2, "there is no directory no/such/dir"),
        (["CLIP", "--fps", "0"], 2, "--fps"),
        (["CLIP", "--start", "2", "--end", "1"], 2, "--start-seconds"),
        (["CLIP", "--num-frames", "many"], 2, "invalid int value"),
        (["CLIP", "--start", "9"], 1, "the clip is 3.000 s long"),
        (["CLIP", "--model", "/nowhere/at/all"], 1, "cannot read config.json of '/nowhere/at/all'"),
        (["TEXT"], 1, "text or web page"),
        (["http://127.0.0.1:9/clip.mp4"], 1, "public"),
        ([], 2, "required"),
    ],
)
def test_refusals(inspect, clip, folder, arguments, code, complaint):
    text = folder / "text.mp4"
    text.write_text("nothing to see")
    places = {"CLIP": clip, "TEXT": text}
    ended, out, err = inspect(*[places.get(argument, argument) for argument in arguments])
    assert (ended, out) == (code, "")
    assert complaint in err
    assert "Traceback" not in err
