"""Every decoder and every clip: right frames or a refusal, as docs/decoders.md says; and PyAV is always right."""

import pytest

from filmstrip.config import VIDEO_DECODERS
from tests.conformance import suite
from tests.conformance.corpus import CLIPS

INSTALLED = [decoder for decoder in VIDEO_DECODERS if suite.is_installed(decoder)]
VERSIONS, DOCUMENTED = suite.documented()


class Outcomes:
    """Makes each clip and runs each decoder over it once."""

    def __init__(self, folder):
        self._folder, self._data, self._outcomes = folder, {}, {}

    def of(self, decoder, name):
        if (decoder, name) not in self._outcomes:
            self._outcomes[decoder, name] = suite.run(decoder, CLIPS[name], self._bytes(name))
        return self._outcomes[decoder, name]

    def _bytes(self, name):
        if name not in self._data:
            place = self._folder / name
            place.mkdir()
            self._data[name] = CLIPS[name].make(place).read_bytes()
        return self._data[name]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return Outcomes(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("decoder", VIDEO_DECODERS)
def test_a_decoder_is_installed(decoder):
    """One line in the report for a decoder that the suite leaves out."""
    if decoder not in INSTALLED:
        pytest.skip(f"{decoder} is not installed")
    assert decoder in suite.IN_TABLE or suite.version(decoder)


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("decoder", INSTALLED)
def test_a_decoder_gives_the_right_frames_or_says_why_not(outcomes, decoder, name):
    outcome = outcomes.of(decoder, name)  # fails by itself where a frame is wrong
    if decoder == "pyav":
        assert str(outcome) == "right"
    elif {suite.version(decoder), suite.encoder_version()} <= set(VERSIONS):
        assert str(outcome) == DOCUMENTED[decoder, CLIPS[name].about]
    else:  # other versions can do more or less, never wrong
        assert (outcome.num_right == outcome.num_reads) != bool(outcome.problem)


def test_the_document_is_what_the_runs_give(outcomes):
    here = [suite.version(decoder) if decoder in INSTALLED else None for decoder in suite.IN_TABLE]
    if [*here[1:], suite.encoder_version()] != VERSIONS[1:]:
        pytest.skip(f"the document was made with {', '.join(VERSIONS)}")
    found = {(decoder, name): outcomes.of(decoder, name) for decoder in suite.IN_TABLE for name in CLIPS}
    assert suite.render(found).replace(here[0], VERSIONS[0]) == suite.DOCUMENT.read_text()


def test_the_corpus_covers_what_decoders_disagree_about():
    """Were every decoder right about every clip, the suite would show nothing."""
    for decoder in suite.IN_TABLE[1:]:
        cells = [DOCUMENTED[decoder, clip.about] for clip in CLIPS.values()]
        assert "right" in cells
        assert any("refused" in cell for cell in cells)
