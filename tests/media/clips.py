"""Makers of the stranger files: appended, cut, misnumbered and damaged clips of numbered frames; decodes nothing."""

import av

from tests.media.numbered import encode, ffmpeg

X264 = ("-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p")


def h264(folder, name, *more, gop=10, num_b_frames=3, **clip):
    """Numbered frames as H.264 in whatever container ``name`` asks for."""
    return encode(folder / name, *X264, "-g", str(gop), "-bf", str(num_b_frames), *more, **clip)


def remux(source, target, *arguments):
    """Copy the packets of ``source`` into ``target``; ``arguments`` are those of the output."""
    ffmpeg("-i", source, "-c", "copy", *arguments, target)
    return target


def append(target, *sources):
    """One file after another, byte by byte, as people join recordings in MPEG-TS."""
    target.write_bytes(b"".join(source.read_bytes() for source in sources))
    return target


def drop_packets(source, target, num_packets):
    """A Matroska copy without the first packets, as when a recording begins between two key frames."""
    return remux(source, target, "-copyinkf", "-bsf:v", f"noise=drop='lt(n,{num_packets})'")


def packets(path):
    """(position in the file, size) of every packet of the first video stream, in coded order."""
    data, places, position = path.read_bytes(), [], 0
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            if packet.size:
                position = data.index(bytes(packet), position)
                places.append((position, packet.size))
    return places


def blank(data, places):
    """``data`` with zeros at the packets in ``places``."""
    damaged = bytearray(data)
    for position, size in places:
        damaged[position : position + size] = bytes(size)
    return bytes(damaged)


def box(kind, *contents):
    """An MP4 box: 32-bit size, four letters, contents."""
    body = b"".join(contents)
    return (len(body) + 8).to_bytes(4, "big") + kind + body
