"""What each decoder makes of each clip: right frames, or a refusal that says why; writes and reads the table of docs/.

``python -m tests.conformance.suite`` makes the clips, runs all decoders that are installed, and writes the document.
"""

import functools
import importlib
import random
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from filmstrip.config import VIDEO_DECODERS
from filmstrip.errors import InvalidRequestError, MediaDecodeError
from filmstrip.media.decoders.registry import import_decoder
from filmstrip.media.source import BytesSource
from filmstrip.media.video import open_video, read_frames
from tests.conformance.corpus import CLIPS, draw
from tests.media.numbered import read_number

DOCUMENT = Path(__file__).parents[2] / "docs" / "decoders.md"
IN_TABLE = ("pyav", "torchcodec", "decord", "opencv")
"""Not torchvision: its last version with a decoder does not go with the PyTorch of the tests."""
_MAX_LOSS = 4.0
"""Grey levels, on average, between a frame as drawn and as decoded; encoding loses up to 2.6."""

_HEAD = """\
# Video decoders

`pyav` decodes by default; `--video-decoder` chooses another for all videos, and a request chooses with
`media_io_kwargs.video.backend` among those the server allows. Whatever is chosen, the index of frames and their times come
from PyAV, so the same sampling means the same frames. What the library delivers is checked: size and time of every frame,
and the picture of the first, the last and every empty one against PyAV's; for Decord, which does not tell what it decoded,
of every frame; for OpenCV, which repeats a picture where it cannot convert the next, of every frame that equals the one
before. A library that fails is refused for that file with an error (`media_decode_failed`) that says what it cannot do.

| Decoder | Install | Reads | Notes |
|---|---|---|---|
| `pyav` | always there | only the groups of pictures that are needed | replaces frames that are damaged in the file |
| `torchcodec` | `filmstrip[torchcodec]`, FFmpeg's shared libraries | by seeking | fails where the system's FFmpeg does |
| `decord` | `filmstrip[decord]` | by seeking | keeps the file in memory; PyAV decodes every frame once more |
| `opencv` | `filmstrip[opencv]` | in sequence, seeks over long stretches | refuses some HDR and interlaced video |
| `torchvision` | `filmstrip[torchvision]` | all frames up to the last | up to torchvision 0.27; keeps the file in memory |

## Conformance

Each clip of the suite (`tests/conformance/corpus.py`) has the number of the frame drawn into its picture. Each decoder reads
it in {num_reads} ways: spread frames, the first, the last, consecutive, repeated, scattered, all. "Right" means that every
read gave the right numbers, times, size and colours. Otherwise the table says how many reads were refused, and why the first
of them was. There is no third case: the tests fail if a decoder gives a wrong frame, or if this table is not what they
find.

Made by the tests with {versions}.

"""


@dataclass(frozen=True)
class Outcome:
    """Of the reads of one clip, how many gave the right frames, and why the first of the others was refused."""

    num_right: int
    num_reads: int
    problem: str = ""
    meets_damage: bool = False
    """Whether frames of the clip are damaged: how far from them a decoder fails may be a matter of its threads' timing."""

    def __str__(self) -> str:
        if self.num_right == self.num_reads:
            return "right"
        if self.meets_damage:
            return "refused near the damage"
        refused = "refused" if not self.num_right else f"{self.num_reads - self.num_right} of {self.num_reads} refused"
        return f"{refused}: {self.problem}"


def samplings(total):
    """Frame indices of each way to read a clip."""
    middle = total // 2
    return [
        np.linspace(0, total - 1, min(total, 8)).astype(int).tolist(),
        [0],
        [total - 1],
        list(range(middle, min(middle + 6, total))),
        sorted([0, middle, total - 1] * 2),
        sorted(random.Random(total).sample(range(total), min(total, 5))),
        list(range(total)),
    ]


def run(decoder, clip, data):
    """The outcome of all reads of a clip's bytes; raises AssertionError where a wrong frame was delivered."""
    reader = open_video(BytesSource(data), decoder=decoder)
    _check_metadata(reader.metadata, decoder, clip)
    num_right, problems = 0, []
    reads = samplings(len(clip.numbers))
    for indices in reads:
        try:
            frames, delivered = read_frames(reader, indices, 2)
        except MediaDecodeError as error:
            problem, _, advice = error.message.partition("; ")
            problems.append(problem.partition(" ")[2] if "--video-decoder" in advice else error.message)
        else:
            _check_frames(frames, delivered, indices, clip)
            num_right += 1
    return Outcome(num_right, len(reads), problems[0] if problems else "", meets_damage=bool(clip.replaced))


def _check_metadata(metadata, decoder, clip):
    assert metadata.video_backend == decoder
    assert metadata.total_num_frames == len(clip.numbers)
    assert (metadata.width, metadata.height) == clip.size
    np.testing.assert_allclose(metadata.timestamps, clip.times, atol=clip.time_tolerance_seconds)


def _check_frames(frames, delivered, indices, clip):
    replaced = dict(clip.replaced)
    assert list(delivered) == [replaced.get(index, index) for index in indices]
    expected = [clip.numbers[index] for index in delivered]
    assert [read_number(frame) for frame in frames] == expected
    for frame, number in zip(frames, expected, strict=True):
        loss = np.abs(frame.astype(int) - draw(number, *clip.size)).mean()
        assert loss < _MAX_LOSS, f"frame {number} differs by {loss:.1f} from what was drawn"


def is_installed(decoder):
    """Whether the decoder can be used here."""
    try:
        import_decoder(decoder)
    except InvalidRequestError:
        return False
    return True


@functools.cache
def encoder_version():
    """What made the clips: another version encodes them otherwise."""
    said = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True).stdout
    return f"clips by FFmpeg {re.search(r'version n?([0-9]+[.][0-9]+)', said)[1]}"


@functools.cache
def version(decoder):
    """What decodes, with the version that decides its outcomes."""
    if decoder == "pyav":
        return f"PyAV {av.__version__}"
    label, module = {
        "torchcodec": ("TorchCodec", "torchcodec"),
        "decord": ("Decord", "decord"),
        "opencv": ("OpenCV", "cv2"),
        "torchvision": ("torchvision", "torchvision"),
    }[decoder]
    library = importlib.import_module(module)
    ffmpeg = f" on FFmpeg {library.ffmpeg_major_version}" if decoder == "torchcodec" else ""
    return f"{label} {library.__version__.partition('+')[0]}{ffmpeg}"


def render(outcomes):
    """The document for ``outcomes``, {(decoder, clip name): Outcome} of all decoders in the table."""
    versions = ", ".join([*map(version, IN_TABLE), encoder_version()])
    num_reads = len(samplings(1))
    rows = [("Clip", *(f"`{decoder}`" for decoder in IN_TABLE)), ("---",) * (len(IN_TABLE) + 1)]
    for name, clip in CLIPS.items():
        rows.append((clip.about, *(str(outcomes[decoder, name]) for decoder in IN_TABLE)))
    num_right = [sum(str(outcomes[decoder, name]) == "right" for name in CLIPS) for decoder in IN_TABLE]
    rows.append(("**right altogether**", *(f"**{number} of {len(CLIPS)}**" for number in num_right)))
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return _HEAD.format(versions=versions, num_reads=num_reads) + table


def documented():
    """Versions and {(decoder, clip's description): outcome as text} of the committed document."""
    text = DOCUMENT.read_text()
    lines = re.findall(r"^\| (.+) \|$", text.partition("## Conformance")[2], re.MULTILINE)[2:-1]
    cells = [line.split(" | ") for line in lines]
    outcomes = {(decoder, row[0]): cell for row in cells for decoder, cell in zip(IN_TABLE, row[1:], strict=True)}
    return re.search(r"Made by the tests with (.+)\.", text)[1].split(", "), outcomes


def main():
    """Run everything and write the document."""
    missing = [decoder for decoder in IN_TABLE if not is_installed(decoder)]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}")
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, clip in CLIPS.items():
            place = Path(folder) / name
            place.mkdir()
            data = clip.make(place).read_bytes()
            for decoder in IN_TABLE:
                outcomes[decoder, name] = run(decoder, clip, data)
                print(name, decoder, outcomes[decoder, name])
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(render(outcomes))


assert set(IN_TABLE) <= set(VIDEO_DECODERS)

if __name__ == "__main__":
    main()
