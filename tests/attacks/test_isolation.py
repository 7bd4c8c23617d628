"""Attack case A43 over HTTP: decoders that crash, hang, eat memory or lie cost their request an error, and nothing else."""

import psutil
import pytest

from tests.attacks.harness import AttackedServer, Case, attacks, data_url
from tests.media.faults import fault

CODES = {
    "crash": "media_decode_crashed",
    "exit": "media_decode_crashed",
    "raise": "media_decode_crashed",
    "eat": "media_too_large",
    "hang": "media_decode_timeout",
}


@pytest.fixture(scope="module")
def faulty_server(qwen3_vl_dir, clip, tmp_path_factory):
    # Long enough for a busy machine to see memory eaten, short enough to wait for those that hang.
    limits = {"decode_timeout_seconds": 5.0, "max_decode_memory_gb": 0.25}
    folder = tmp_path_factory.mktemp("attack-faults")
    with AttackedServer(qwen3_vl_dir, None, clip, folder, faults="tests.media.faults", **limits) as server:
        yield server


FAULTS = {
    **{
        f"A43-{words}-when-{when}": (f"{when} {words}", code)
        for words, code in CODES.items()
        for when in ("open", "read")
    },
    "A43-lie": ("read lie", "media_decode_crashed"),
}


@attacks(Case(name, codes=(code,), modalities=("video_url",)) for name, (_, code) in FAULTS.items())
def test_a_broken_decoder_costs_one_request(faulty_server, clip, case, kind, stream):
    before = faulty_server.worker_stats()
    words, _ = FAULTS[case.name]
    faulty_server.check_answer(case, kind, stream, url=data_url(clip + fault(words), "video/mp4"))
    after = faulty_server.worker_stats()
    name = {"media_decode_crashed": "num_crashed", "media_decode_timeout": "num_timed_out"}.get(case.codes[0])
    for counter in ("num_crashed", "num_timed_out"):
        assert after[counter] - before[counter] == (counter == name)
    good = [{"type": "video_url", "video_url": {"url": data_url(clip, "video/mp4"), "num_frames": 2}}]
    assert faulty_server.post([{"role": "user", "content": good}]).status_code == 200
    faulty_server.check_still_decodes()


def test_no_worker_is_left_behind(faulty_server):
    """Of this server only the template and the engine stay; workers of the other servers of the run are done, too."""
    workers = [
        process
        for child in psutil.Process().children()
        if "filmstrip.media.worker" in " ".join(child.cmdline())
        for process in child.children()
    ]
    psutil.wait_procs(workers, timeout=10)
    assert not any(process.is_running() for process in workers)
