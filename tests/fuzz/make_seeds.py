"""Makes the small files that are mutated, into ``seeds/``; run by hand when a format is added, never by the tests.

    python -m tests.fuzz.make_seeds

The results are committed: a mutation is repeatable only for as long as what it starts from stays the same.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from tests.media.numbered import encode, ffmpeg, numbered_frame

FOLDER = Path(__file__).parent / "seeds"
WIDTH, HEIGHT, NUM_FRAMES = 64, 48, 12

_YUV = ("-pix_fmt", "yuv420p", "-map_metadata", "-1", "-fflags", "+bitexact", "-flags", "+bitexact")
_X264 = ("-c:v", "libx264", "-preset", "veryfast", "-g", "5", "-bf", "2", "-crf", "38", *_YUV)
VIDEOS = {
    "h264.mp4": _X264,
    "h264_faststart.mp4": (*_X264, "-movflags", "+faststart"),
    "h264_fragmented.mp4": (*_X264, "-movflags", "+frag_keyframe+empty_moov"),
    "h264.mov": _X264,
    "h264.mkv": _X264,
    "h264.ts": _X264,
    "h264.flv": _X264,
    "hevc.mp4": ("-c:v", "libx265", "-x265-params", "log-level=none:pools=1:info=0", "-crf", "40", "-g", "5", *_YUV),
    "vp9.webm": ("-c:v", "libvpx-vp9", "-crf", "50", "-b:v", "0", "-g", "5", "-threads", "1", *_YUV),
    "vp8.webm": ("-c:v", "libvpx", "-crf", "50", "-b:v", "50k", "-g", "5", "-threads", "1", *_YUV),
    "av1.mkv": ("-c:v", "libaom-av1", "-cpu-used", "8", "-crf", "55", "-g", "5", "-threads", "1", *_YUV),
    "mpeg4.avi": ("-c:v", "mpeg4", "-q:v", "15", "-g", "5", *_YUV),
    "mjpeg.avi": ("-c:v", "mjpeg", "-q:v", "25", "-pix_fmt", "yuvj420p", "-fflags", "+bitexact"),
    "mpeg2.mpg": ("-c:v", "mpeg2video", "-q:v", "20", "-g", "5", *_YUV),
    "prores.mov": ("-c:v", "prores_ks", "-profile:v", "proxy", "-frames:v", "2", "-fflags", "+bitexact"),
    "hap.mov": ("-c:v", "hap", "-frames:v", "2", "-fflags", "+bitexact"),
    "moving.gif": ("-fflags", "+bitexact", "-frames:v", "4"),
    "moving.apng": ("-f", "apng", "-fflags", "+bitexact", "-frames:v", "3"),
}
"""Output arguments of ffmpeg by file name."""


def make_videos() -> None:
    """Numbered frames in every container and codec of :data:`VIDEOS`."""
    for name, arguments in VIDEOS.items():
        encode(FOLDER / name, *arguments, num_frames=NUM_FRAMES, width=WIDTH, height=HEIGHT)


def make_images() -> None:
    """One small picture in every format, with some of the stranger modes."""
    picture = Image.fromarray(numbered_frame(5, 48, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(FOLDER / "turned.jpg", quality=40, exif=exif)
    picture.save(FOLDER / "progressive.jpg", quality=40, progressive=True)
    picture.convert("CMYK").save(FOLDER / "cmyk.jpg", quality=40)
    picture.save(FOLDER / "rgb.png")
    picture.quantize(8).save(FOLDER / "palette.png", transparency=1)
    Image.fromarray(np.arange(32 * 16, dtype=np.uint16).reshape(16, 32) * 97).save(FOLDER / "grey16.png")
    picture.save(FOLDER / "lossy.webp", quality=30)
    picture.save(FOLDER / "lossless.webp", lossless=True)
    picture.save(FOLDER / "moving.webp", save_all=True, append_images=[picture.rotate(90)], quality=30)
    picture.save(FOLDER / "still.gif")
    picture.save(FOLDER / "deflate.tiff", compression="tiff_adobe_deflate")
    picture.convert("1").save(FOLDER / "fax.tiff", compression="group4")
    picture.resize((24, 16)).save(FOLDER / "raw.bmp")
    picture.save(FOLDER / "still.avif", quality=30)


def make_time_series() -> None:
    """Arrays, tables and sounds."""
    wave = np.sin(np.linspace(0, 20, 400, dtype=np.float32)).reshape(200, 2)
    np.save(FOLDER / "float32.npy", wave)
    np.save(FOLDER / "int16_fortran.npy", np.asfortranarray((wave * 30000).astype(np.int16)))
    np.save(FOLDER / "big_endian.npy", wave.astype(">f8")[:50])
    text = io.StringIO()
    np.savetxt(text, wave[:60], delimiter=",", fmt="%.4f", header="left,right", comments="")
    (FOLDER / "table.csv").write_text(text.getvalue())
    sound = ("-f", "lavfi", "-i", "sine=f=440:d=0.1:r=8000")
    bitexact = ("-map_metadata", "-1", "-fflags", "+bitexact", "-flags", "+bitexact")
    for name in ("sound.wav", "sound.flac", "sound.mp3"):
        ffmpeg(*sound, *bitexact, FOLDER / name)


def main() -> None:
    """Make all seeds anew."""
    FOLDER.mkdir(exist_ok=True)
    make_videos()
    make_images()
    make_time_series()


if __name__ == "__main__":
    main()
