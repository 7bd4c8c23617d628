"""Placeholders: ranges and three-axis positions, checked against the worked example of the reference."""

import numpy as np

from filmstrip.processing.placeholders import Placeholder, assemble, mrope_positions
from filmstrip.types import PlaceholderRange


def encode(text):
    return [1000 + ord(character) for character in text]


def test_neighbouring_text_is_encoded_as_one():
    seen = []

    def spy(text):
        seen.append(text)
        return encode(text)

    assembled = assemble(["ab", "c", 7, "d", Placeholder(0, 9, 1, 2), "e"], spy)
    assert seen == ["abc", "d", "e"]
    assert assembled.token_ids == [*encode("abc"), 7, *encode("d"), 9, 9, *encode("e")]
    assert assembled.segments(0) == (PlaceholderRange(5, 2),)


def test_positions_of_the_worked_example():
    # 2 text, start, three 2x3 groups each followed by an end and a start, then one 3x2 image.
    pieces = [5, 6, 1]
    for _ in range(3):
        pieces += [Placeholder(0, 9, 2, 3), 2, 1]
    pieces += [Placeholder(1, 8, 3, 2), 2]
    assembled = assemble(pieces, encode)
    positions, delta = mrope_positions(len(assembled.token_ids), assembled.placed)
    assert positions[0, 3:9].tolist() == [3] * 6
    assert positions[1, 3:9].tolist() == [3, 3, 3, 4, 4, 4]
    assert positions[2, 3:9].tolist() == [3, 4, 5, 3, 4, 5]
    assert positions[:, 9].tolist() == [6] * 3
    assert delta == positions.max() + 1 - len(assembled.token_ids)
    assert delta == -12


def test_groups_of_one_video_with_nothing_between_them():
    """84 groups of 12 x 16 tokens, four places of time apart, behind 15 tokens of text: 16128 tokens."""
    pieces = [*range(15), *[Placeholder(0, 9, 12, 16, 4 * group) for group in range(84)], 1, 2]
    assembled = assemble(pieces, encode)
    assert len(assembled.segments(0)) == 84
    positions, delta = mrope_positions(len(assembled.token_ids), assembled.placed)
    last = 15 + 16_128 - 1
    assert positions[:, 15].tolist() == [15] * 3
    assert positions[:, last].tolist() == [347, 26, 30]
    assert positions[:, last + 1].tolist() == [31] * 3
    assert delta == 33 - len(assembled.token_ids)
    # The first release let text go on behind the largest position.
    positions, delta = mrope_positions(len(assembled.token_ids), assembled.placed, beyond_time=True)
    assert positions[:, last].tolist() == [347, 26, 30]
    assert positions[:, last + 1].tolist() == [348] * 3
    assert delta == 350 - len(assembled.token_ids)


def test_places_between_those_of_tokens():
    """As ``get_rope_index`` of Qwen3-Omni: 8.666667 places of time between groups of 1 x 2 tokens, in float32."""
    apart = np.float32(26 / 3)
    pieces = [
        1,
        2,
        *[Placeholder(0, 9, 1, 2, float(group * apart)) for group in range(3)],
        3,
        Placeholder(1, 8, 4, 1),
        4,
    ]
    assembled = assemble(pieces, encode)
    positions, delta = mrope_positions(len(assembled.token_ids), assembled.placed, beyond_time=True)
    assert positions.dtype == np.float32
    behind = np.float32(2) + 2 * apart + np.float32(1)
    assert positions[0].tolist()[2:8] == [2, 2, 2 + apart, 2 + apart, 2 + 2 * apart, 2 + 2 * apart]
    assert positions[:, 8].tolist() == [behind] * 3
    assert positions[:, 9].tolist() == [behind + 1] * 3
    assert positions[:, 12].tolist() == [behind + 1, behind + 4, behind + 1]
    assert positions[:, 13].tolist() == [behind + 5] * 3
    assert delta == behind + 6 - len(assembled.token_ids)


def test_neighbours_are_one_video_only_if_they_are_of_one_item():
    first, second = Placeholder(0, 9, 1, 2), Placeholder(1, 9, 3, 1)
    assembled = assemble([first, second, 5], encode)
    positions, _ = mrope_positions(6, assembled.placed, beyond_time=True)
    assert positions[0].tolist() == [0, 0, 2, 2, 2, 5]


def test_text_alone_counts_up():
    positions, delta = mrope_positions(4, [])
    np.testing.assert_array_equal(positions, np.tile(np.arange(4), (3, 1)))
    assert delta == 0
