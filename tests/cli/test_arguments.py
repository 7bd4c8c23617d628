"""The command line's grammar and the settings that come of it; help is quick."""

import subprocess
import sys

import pytest

from filmstrip.cli.arguments import (
    chat_config,
    chat_media,
    chat_media_io_kwargs,
    chat_sampling,
    parse_arguments,
    server_config,
)
from filmstrip.cli.options import UsageError
from filmstrip.config import EngineConfig, LLMConfig, MediaConfig, ProcessorConfig, ServerConfig
from filmstrip.types import FrameSampling, PixelLimits


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv("FILMSTRIP_API_KEY", raising=False)


def serve(*argv: str) -> ServerConfig:
    return server_config(parse_arguments(["serve", *argv]))


def chat(*argv: str):
    return parse_arguments(["chat", *argv])


def refusal(capsys, *argv: str) -> str:
    """The last line of what is printed about a wrong command line."""
    with pytest.raises(SystemExit) as caught:
        parse_arguments(list(argv))
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_defaults_of_serve():
    closed = MediaConfig(allow_local_files=False)
    assert serve("org/model") == ServerConfig(LLMConfig(EngineConfig("org/model"), closed, ProcessorConfig()))


def test_every_layer_has_flags(tmp_path):
    config = serve(
        *("--port", "9000", "--host", "0.0.0.0", "--served-model-name", "tiny", "--keep-alive-seconds", "5"),
        *("--api-key", "secret", "--allowed-hosts", "a", "--allowed-hosts", "b", "--log-level", "warning"),
        *("--dtype", "float32", "--device", "cuda:1", "--max-model-len", "4096", "--max-num-seqs", "4"),
        *("--max-num-batched-tokens", "512", "--kv-cache-gb", "0.5", "--encoder-cache-gb", "0.25"),
        *("--gpu-memory-utilization", "0.5", "--num-threads", "2", "--revision", "main", "--no-enable-prefix-caching"),
        *("--allowed-local-media-path", str(tmp_path), "--allow-private-media-urls", "--max-media-bytes", "1000"),
        *(
            "--max-image-pixels",
            "5000",
            "--max-video-frames",
            "64",
            "--fetch-timeout-seconds",
            "3",
            "--media-cache-gb",
            "0",
        ),
        *("--media-io-kwargs", '{"video": {"num_frames": 10, "fps": 2}}', "--video-prompt-form", "flat"),
        *("--chat-template", "words.jinja"),
        *("--mm-processor-kwargs", '{"image": {"max_pixels": 100}, "video": {"min_pixels": 5}}'),
        "dir/model",
    )
    engine = EngineConfig(
        "dir/model",
        revision="main",
        device="cuda:1",
        dtype="float32",
        max_model_len=4096,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        kv_cache_gb=0.5,
        encoder_cache_gb=0.25,
        gpu_memory_utilization=0.5,
        enable_prefix_caching=False,
        num_threads=2,
    )
    media = MediaConfig(
        allow_local_files=False,
        allowed_local_media_path=str(tmp_path),
        allow_private_media_urls=True,
        max_media_bytes=1000,
        max_image_pixels=5000,
        max_video_frames=64,
        fetch_timeout_seconds=3,
        media_cache_gb=0,
        video=FrameSampling(num_frames=10, fps=2),
    )
    processor = ProcessorConfig(PixelLimits(None, 100), PixelLimits(5, None), "flat", "words.jinja")
    assert config == ServerConfig(
        LLMConfig(engine, media, processor),
        host="0.0.0.0",
        port=9000,
        served_model_name="tiny",
        keep_alive_seconds=5,
        api_key="secret",
        allowed_hosts=("a", "b"),
        log_level="warning",
    )


def test_api_key_of_the_environment(monkeypatch):
    monkeypatch.setenv("FILMSTRIP_API_KEY", "from-environment")
    assert serve("m").api_key == "from-environment"
    assert serve("m", "--api-key", "from-flag").api_key == "from-flag"
    monkeypatch.setenv("FILMSTRIP_API_KEY", "")
    assert serve("m").api_key is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: MODEL"),
        (["m", "--port", "70000"], "argument --port: must be from 0 to 65535, not 70000"),
        (["m", "--max-num-seqs", "0"], "argument --max-num-seqs: must be at least 1, not 0"),
        (
            ["m", "--gpu-memory-utilization", "1.5"],
            "argument --gpu-memory-utilization: must be from 0.01 to 1, not 1.5",
        ),
        (["m", "--kv-cache-gb", "-1"], "argument --kv-cache-gb: must be at least 0.001, not -1"),
        (["m", "--max-seqs", "1"], "unrecognized arguments: --max-seqs 1"),
        (["m", "--max-num", "1"], "unrecognized arguments: --max-num 1"),
        (["m", "--media-io-kwargs", "{"], "argument --media-io-kwargs: not valid JSON: "),
        (["m", "--media-io-kwargs", "[]"], "argument --media-io-kwargs: must be a JSON object, not []"),
        (
            ["m", "--media-io-kwargs", '{"movie": {}}'],
            "argument --media-io-kwargs: media_io_kwargs has no section 'movie'",
        ),
        (["m", "--media-io-kwargs", '{"video": {"fps": 0}}'], "argument --media-io-kwargs: media_io_kwargs.video.fps "),
        (
            ["m", "--media-io-kwargs", '{"video": {"timestamps": [1]}}'],
            "argument --media-io-kwargs: frames_indices, total",
        ),
        (
            ["m", "--media-io-kwargs", '{"video": {"backend": "pyav"}}'],
            "argument --media-io-kwargs: the server's own decoder",
        ),
        (["m", "--media-io-kwargs", '{"video": {"frame": 1}}'], "argument --media-io-kwargs: media_io_kwargs.video "),
        (["m", "--media-io-kwargs", '{"video": {"duration": 1}}'], "argument --media-io-kwargs: frames_indices, "),
        (
            ["m", "--mm-processor-kwargs", '{"video": {"max_pixels": -5}}'],
            "argument --mm-processor-kwargs: mm_processor_kwargs.video.max_pixels must be an integer >= 1, not -5",
        ),
    ],
)
def test_wrong_flags_of_serve(argv, message, capsys):
    assert refusal(capsys, "serve", *argv).startswith(f"filmstrip serve: error: {message}")


def test_directory_of_media_must_be_there(tmp_path):
    with pytest.raises(UsageError, match="--allowed-local-media-path: there is no directory"):
        serve("m", "--allowed-local-media-path", str(tmp_path / "nothing"))


@pytest.mark.parametrize("argv", [[], ["unknown"], ["--port", "1"]])
def test_wrong_commands(argv, capsys):
    assert refusal(capsys, *argv).startswith("filmstrip: error: ")


def test_defaults_of_chat():
    arguments = chat("org/model")
    assert arguments.question is None
    assert chat_config(arguments) == LLMConfig(EngineConfig("org/model"))
    assert chat_sampling(arguments) == {}
    assert chat_media_io_kwargs(arguments) is None
    assert chat_media(arguments) == []


@pytest.mark.parametrize(
    "argv",
    [
        ["m", "--video", "http://a/b.mp4", "--fps", "2", "What?"],
        ["m", "What?", "--fps", "2", "--video", "http://a/b.mp4"],
        ["--video", "http://a/b.mp4", "m", "--fps", "2", "What?"],
        ["--video", "http://a/b.mp4", "--fps", "2", "m", "What?"],
    ],
)
def test_question_may_stand_anywhere_behind_the_model(argv):
    arguments = chat(*argv)
    assert (arguments.model, arguments.question) == ("m", "What?")
    assert chat_media(arguments) == [{"type": "video_url", "video_url": {"url": "http://a/b.mp4"}}]
    assert chat_media_io_kwargs(arguments) == {"video": {"fps": 2}}


def test_media_keep_their_order(tmp_path):
    clip = tmp_path / "clip.mp4"
    clip.touch()
    arguments = chat("m", "--image", "data:image/png;base64,aa", "--video", str(clip), "--image", "https://a/b.png")
    assert [(part["type"], part[part["type"]]["url"]) for part in chat_media(arguments)] == [
        ("image_url", "data:image/png;base64,aa"),
        ("video_url", str(clip)),
        ("image_url", "https://a/b.png"),
    ]


def test_missing_file_is_noticed_before_the_model_loads():
    with pytest.raises(UsageError, match=r"argument --video: there is no file nothing\.mp4"):
        chat_media(chat("m", "--video", "nothing.mp4"))


def test_frames_and_answers_of_chat():
    argv = [
        "m",
        "--num-frames",
        "-1",
        "--fps",
        "0.5",
        "--start-seconds",
        "3",
        "--max-tokens",
        "9",
        "--temperature",
        "0",
    ]
    arguments = chat(*argv, "--seed", "1", "--stop", "a", "--stop", "b", "--num-threads", "2")
    assert chat_media_io_kwargs(arguments) == {"video": {"num_frames": -1, "fps": 0.5, "start": 3.0}}
    expected = {"max_tokens": 9, "temperature": 0.0, "seed": 1, "stop": ("a", "b")}
    assert chat_sampling(arguments) == expected
    assert chat_config(arguments) == LLMConfig(EngineConfig("m", num_threads=2))


def test_wrong_values_of_chat(capsys):
    with pytest.raises(UsageError, match="--temperature must be in"):
        chat_sampling(chat("m", "--temperature", "-1"))
    with pytest.raises(UsageError, match=r"^--fps must be > 0, or -1"):
        chat_media_io_kwargs(chat("m", "--fps", "0"))
    with pytest.raises(UsageError, match=r"^--start-seconds 5\.0 is above 3\.0"):
        chat_media_io_kwargs(chat("m", "--start-seconds", "5", "--end-seconds", "3"))
    assert "unrecognized arguments: b" in refusal(capsys, "chat", "m", "a", "b")


def test_help_and_version_load_no_model_library():
    program = (
        "import sys; sys.argv = ['filmstrip'] + sys.argv[1:]\n"
        "from filmstrip.cli.main import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, 'transformers' in sys.modules, 'av' in sys.modules)"
    )
    for argv, start in (
        (["--version"], "filmstrip 0."),
        (["--help"], "usage: filmstrip"),
        (["serve", "-h"], "usage: "),
    ):
        done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, check=True)
        assert done.stdout.startswith(start)
        assert done.stdout.endswith("False False False\n")
