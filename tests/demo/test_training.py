"""Training sees what serving sees: prompts, positions and logits equal those of the product and of plain Transformers."""

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from filmstrip.config import EngineConfig, LLMConfig, MediaConfig
from filmstrip.demo import bundled
from filmstrip.demo.clips import encode_picture, encode_scene
from filmstrip.demo.data import (
    CLIPS_PER_SHARD,
    Pool,
    Shown,
    Watcher,
    blank_checkpoint,
    make_shard,
    rows_of,
    sampling_of,
)
from filmstrip.demo.questions import WEIGHTS, Question, View, ask, ask_in_turn, ask_some, list_looks
from filmstrip.demo.recipe import make_model, make_tokenizer
from filmstrip.demo.scenes import make_picture_scene, make_scene
from filmstrip.demo.teacher import NUM_FACTS, FactEmbedding, cells_of, distance
from filmstrip.demo.train import (
    Drawer,
    Sample,
    Trainer,
    answer_loss,
    attend_in_padded_frames,
    collate,
    fit_for_training,
    glimpse,
    pack,
    pack_facts,
    predict,
    prepare_base,
    thinned,
)
from filmstrip.models.cpu_features import cpu_has_bfloat16_units
from filmstrip.processing.prompt_builder import PromptBuilder
from filmstrip.types import FrameSampling


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blank_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def watcher(base: Path) -> Watcher:
    return Watcher(base)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, watcher: Watcher) -> Pool:
    folder = tmp_path_factory.mktemp("pool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("filmstrip.demo.data.CLIPS_PER_SHARD", 20)
        make_shard(folder, 0, watcher, first_seed=100)
    return Pool(folder)


def _item(pool: Pool, kind: str) -> tuple[str, Shown]:
    return min(
        (item for item in pool.items if item[1].kind == kind), key=lambda item: item[1].rows[1] - item[1].rows[0]
    )


def test_the_same_seed_gives_the_same_checkpoint() -> None:
    tokenizers = [make_tokenizer() for _ in range(2)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    models = [make_model(tokenizer, seed=3) for tokenizer in tokenizers]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    assert 4e6 < sum(p.numel() for p in models[0].parameters()) < 8e6


async def test_prompts_and_pixels_are_those_of_the_server(base: Path, watcher: Watcher) -> None:
    clip, picture = encode_scene(make_scene(5)), encode_picture(make_picture_scene(6))
    clip_path, picture_path = base / "clip", base / "picture"
    clip_path.write_bytes(clip)
    picture_path.write_bytes(picture)
    patches, plan, times = watcher.watch(clip, FrameSampling())
    picture_patches, picture_plan = watcher.look(picture)
    shown = [
        Shown("video", 5, None, plan.height, plan.width, times, (0, 0)),
        Shown("picture", 6, None, picture_plan.height, picture_plan.width, (), (0, 0)),
    ]
    question = ask_some(shown[0].view(), random.Random(0), 1, WEIGHTS)[0]
    prefix = watcher.prefix(shown, "Be brief.")
    turn = watcher.turn(question, first=True)

    builder = PromptBuilder(
        LLMConfig(engine=EngineConfig(model=str(base)), media=MediaConfig(allowed_local_media_path=str(base)))
    )
    try:
        prompt = await builder.build(
            [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": question.text},
                        {"type": "video_url", "video_url": {"url": clip_path.as_uri()}},
                        {"type": "image_url", "image_url": {"url": picture_path.as_uri()}},
                    ],
                },
            ],
            max_model_len=8192,
            report=lambda _: None,
        )
    finally:
        await builder.close()
    assert prompt.token_ids == prefix.token_ids + [
        t for t, said in zip(turn.tokens, turn.is_answer, strict=True) if not said
    ]
    assert prompt.positions is not None
    assert np.array_equal(prompt.positions[:, : len(prefix.token_ids)], watcher.positions(prefix))
    assert prompt.media[0].timestamps == list(times)
    assert np.array_equal(prompt.features[0].patches.torch().numpy(), patches)
    assert np.array_equal(prompt.features[1].patches.torch().numpy(), picture_patches)


def _plain_logits(model: Qwen3VLForConditionalGeneration, sample: Sample, pool: Pool) -> torch.Tensor:
    """Logits of the answers in ``sample`` by Transformers' own forward pass and position rule."""
    tokens = torch.tensor([sample.tokens])
    types = torch.zeros_like(tokens)
    types[tokens == model.config.video_token_id] = 2
    types[tokens == model.config.image_token_id] = 1
    inputs = {}
    for kind, names in (("video", "pixel_values_videos video_grid_thw"), ("picture", "pixel_values image_grid_thw")):
        if parts := sample.rows.get(kind):
            pixels_name, grid_name = names.split()
            inputs[pixels_name] = pool.gather([one for rows, _ in parts for one in rows]).float() / 127.5 - 1
            inputs[grid_name] = torch.tensor([grid for _, grid in parts])
    with torch.no_grad():
        logits = model(input_ids=tokens, mm_token_type_ids=types, **inputs).logits[0]
    return logits[np.flatnonzero(sample.is_answer) - 1]


def test_a_time_is_one_token_wherever_it_stands(watcher: Watcher) -> None:
    for text in ("0.0", "3.1", "24.9"):
        (token,) = watcher.encode(text)
        for text_around in (
            f"<{text} seconds>",
            f"At {text} seconds",
            f"Where is it at {text} seconds?",
            f"{text}: nothing",
        ):
            tokens = watcher.encode(text_around)
            assert tokens.count(token) == 1
            assert watcher.tokenizer.hf.decode(list(tokens)) == text_around
    assert watcher.tokenizer.hf.decode(list(watcher.encode("At 3.14 of 125.5"))) == "At 3.14 of 125.5"


def test_packed_questions_see_only_the_media_and_themselves(watcher: Watcher, pool: Pool) -> None:
    plain, fitted = (make_model(watcher.tokenizer.hf, seed=1) for _ in range(2))
    fit_for_training(fitted)
    embedding = FactEmbedding(fitted.lm_head.in_features)
    video, picture = _item(pool, "video"), _item(pool, "picture")
    view = video[1].view()
    chains = [[question] for question in ask_some(view, random.Random(1), 3, WEIGHTS)]
    chains.append(ask_in_turn(view, random.Random(2), 2))
    assert all(chains)
    for items in ([video], [picture, video], [video, video]):
        packed = pack(watcher, items, chains, None)
        other = pack(watcher, [video], chains[:1], None)
        with torch.no_grad():
            logits, wanted = predict(fitted, collate([packed, other], 0), embedding, pool)
        assert len(wanted) == len(logits) == sum(length for _, length in packed.kinds + other.kinds)
        alone = [_plain_logits(plain, pack(watcher, items, [chain], None), pool) for chain in chains]
        expected = torch.cat([*alone, _plain_logits(plain, other, pool)])
        # The mask is kept in bfloat16 but holds 0 and -inf only; the rest is float32 in another order.
        assert torch.allclose(logits, expected, atol=2e-4)


def test_pool_and_draws(pool: Pool, watcher: Watcher) -> None:
    videos = [shown for _, shown in pool.items if shown.kind == "video"]
    assert len(videos) == 20 < CLIPS_PER_SHARD
    for item in pool.items[:5]:
        assert len(pool.gather([rows_of(item)])) == int(np.prod(item[1].media(watcher.layout).plan.grid_thw))
    assert {sampling_of(seed) for seed in range(40)} > {FrameSampling()}
    drawer = Drawer(watcher, pool, max_tokens=2048, pair_share=0.3)
    one, again = (list(drawer.batches(4)) for _ in range(2))
    assert [batch.tokens.tolist() for batch in one] == [batch.tokens.tolist() for batch in again]
    kinds = {kind for number in range(3) for batch in drawer.batches(number) for kind, _ in batch.kinds}
    assert {"direction", "when", "compare", "picture", "picture_and_video"} <= kinds


def test_a_glimpse_is_a_part_of_the_clip(pool: Pool, watcher: Watcher) -> None:
    cell_pixels = watcher.layout.patch_size * watcher.layout.merge_size
    for seed, item in enumerate(pool.items):
        shown = item[1]
        grid_t, height, width = shown.media(watcher.layout).plan.grid_thw
        groups = pool.gather([rows_of(item)]).numpy().reshape(grid_t, height * width, -1)
        chosen = sorted(random.Random(seed).sample(range(grid_t), min(grid_t, 3)))
        seen = glimpse(watcher, item, random.Random(seed), max_groups=3)
        ((rows, grid),) = seen.rows[shown.kind]
        patches = pool.gather(rows).numpy()
        assert grid == (len(chosen), height, width)
        assert np.array_equal(patches, groups[chosen].reshape(-1, patches.shape[1]))
        (cells,) = seen.cells[shown.kind]
        whole = cells_of(shown.view(), shown.height, shown.width, cell_pixels)
        for name in ("colours", "shapes", "shown", "places", "spots", "extents"):
            rows = getattr(whole, name)
            rows = rows.reshape(grid_t, height * width // 4, *rows.shape[1:])[chosen]
            assert np.array_equal(getattr(cells, name), rows.reshape(getattr(cells, name).shape))


def test_facts_stand_where_features_will_be(pool: Pool, watcher: Watcher) -> None:
    model = make_model(watcher.tokenizer.hf, seed=1)
    fit_for_training(model)
    embedding = FactEmbedding(model.lm_head.in_features)
    items = [_item(pool, "picture"), _item(pool, "video")]
    shown = [each for _, each in items]
    chains = [
        [question] for question in ask_some(shown[1].view(), random.Random(1), 3, {"direction": 1, "where_ends": 1})
    ]
    whole = pack(watcher, items, chains, None)
    cell_pixels = watcher.layout.patch_size * watcher.layout.merge_size
    tables = np.concatenate([cells_of(s.view(), s.height, s.width, cell_pixels).table() for s in shown])
    assert tables.shape[1] == NUM_FACTS
    is_visual = np.isin(whole.tokens, watcher.visual_tokens)
    at = whole.positions[:, is_visual].T.tolist()
    num_full = int((tables[:, 0] == 0).sum())
    lengths = set()
    (question_mark,) = watcher.encode("?")
    for seed in range(10):
        facts = pack_facts(watcher, shown, chains, None, random.Random(seed))
        assert facts.shows_facts
        places, table = facts.places, facts.all_cells.table()
        lengths.add(len(places))
        assert num_full <= len(places) == len(table) <= len(tables)
        # What is left is what was there, in its order and at its positions; only empty cells are gone.
        indices = [at.index(position) for position in facts.positions[:, places].T.tolist()]
        assert indices == sorted(set(indices))
        assert np.array_equal(table, tables[indices])
        assert int((table[:, 0] == 0).sum()) == num_full
        kept = np.ones(len(facts.tokens), bool)
        kept[places] = False
        assert np.array(facts.tokens)[kept].tolist() == np.array(whole.tokens)[~is_visual].tolist()
        assert facts.kinds == whole.kinds
        for sample in (facts, whole):
            assert [sample.tokens[place] for place in sample.asked] == [question_mark] * len(chains)
    assert len(lengths) > 3
    one, other = (pack_facts(watcher, shown, chains, None, random.Random(seed)) for seed in (0, 1))
    with torch.no_grad():
        logits, wanted = predict(model, collate([one, other], 0), embedding, pool)
        embedding.weight.zero_()
        blind, _ = predict(model, collate([one, other], 0), embedding, pool)
        alone, _ = predict(model, collate([one], 0), embedding, pool)
    assert len(wanted) == len(logits) == 2 * sum(length for _, length in one.kinds)
    assert not torch.allclose(logits, blind, atol=1e-3)
    assert torch.allclose(blind[: len(alone)], alone, atol=2e-4)


def test_videos_are_thinned_evenly(pool: Pool) -> None:
    shown = max((shown for _, shown in pool.items), key=lambda shown: len(shown.frame_seconds))
    counts = set()
    for seed in range(30):
        fewer = thinned(shown, random.Random(seed), 5)
        counts.add(len(fewer.frame_seconds))
        assert set(fewer.frame_seconds) <= set(shown.frame_seconds)
        assert fewer.frame_seconds[0] == shown.frame_seconds[0]
        assert fewer.frame_seconds[-1] == shown.frame_seconds[-1]
    assert counts == {4, 6, 8, 10}
    picture = _item(pool, "picture")[1]
    assert thinned(picture, random.Random(0), 5) == picture


def test_the_distance_to_facts_is_none_for_their_embedding_and_one_for_their_mean(pool: Pool, watcher: Watcher) -> None:
    shown = _item(pool, "video")[1]
    cells = cells_of(shown.view(), shown.height, shown.width, watcher.layout.patch_size * watcher.layout.merge_size)
    wanted = FactEmbedding(16).embed(cells)
    assert distance(wanted, wanted, cells) == 0
    off = distance(wanted + wanted.std(), wanted, cells)
    assert off.item() == pytest.approx(1, rel=1e-4)


def _ask(kind: str, view: View) -> Question:
    question = next(question for seed in range(50) if (question := ask(kind, view, random.Random(seed))))
    return question


def test_a_thing_must_be_known_where_its_question_ends_or_its_sentence_starts(pool: Pool, watcher: Watcher) -> None:
    views = [shown.view() for _, shown in pool.items if shown.kind == "video"]
    view = next(view for view in views if len(view.shapes) > 1 and all(view.is_whole(thing) for thing in view.shapes))
    about = _ask("colour", view)
    turn = watcher.turn(about, first=False)
    assert [(watcher.tokenizer.hf.decode([turn.tokens[at]]), thing) for at, thing in turn.things] == [
        ("?", about.thing)
    ]
    assert turn.asked == turn.things[0][0]
    digits_view = max(views, key=lambda view: len(view.digits))
    looks = list_looks(view)
    assert looks is not None
    for question, things in (
        (_ask("describe", view), view.things),
        (looks, view.shapes),
        (_ask("digit", digits_view), digits_view.digits),
    ):
        turn = watcher.turn(question, first=True)
        assert [thing for _, thing in turn.things] == things
        starts = [at + 1 for at, _ in turn.things]
        said = [
            watcher.tokenizer.hf.decode(turn.tokens[start:end]).strip(" ,")
            for start, end in zip(starts, [*starts[1:], len(turn.tokens) - 1], strict=True)
        ]
        assert turn.is_answer.index(True) == starts[0]
        assert said == [
            f"{part}." for part in question.answer.rstrip(".").split(". ")
        ] or said == question.answer.split(", ")
        assert all(thing.shape in words.lower() for thing, words in zip(things, said, strict=True))


def test_a_long_answer_counts_less_for_each_of_its_words() -> None:
    logits, wanted = torch.zeros(17, 5), torch.zeros(17, dtype=torch.long)
    kinds = [("short", 1), ("long", 16)]
    assert answer_loss(logits, wanted, kinds).item() == pytest.approx(np.log(5))
    logits[0, 0] = 100.0  # the short answer is sure and right
    assert answer_loss(logits, wanted, kinds).item() == pytest.approx(0.8 * np.log(5))


SETTINGS = {
    "steps": 4, "max_tokens": 1024, "learning_rate": 1e-3, "warm_up_steps": 2, "decay_share": 0.25, "average_decay": 0.99,
    "log_steps": 2, "measure_steps": 4, "measure_draws": 1, "save_seconds": 1e9, "workers": 1, "few_group_steps": 1,
    "fact_steps": 2, "watch_steps": 2, "teacher_weight": 0.2, "history_weight": 0.3, "story_weight": 0.3, "seed": 0,
    "start_from": None, "pair_share": 0.3, "optimizer": "adamw", "device": "cpu", "loaders": 0, "head_steps": 0,
    "max_seconds": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw",
        pytest.param("muon", marks=pytest.mark.skipif(not cpu_has_bfloat16_units(), reason="takes minutes")),
    ],
)
def test_training_goes_on_where_it_was_stopped(tmp_path: Path, base: Path, pool: Pool, optimizer: str) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "base").symlink_to(base)
    for name in ("pool", "val"):
        (work / name).symlink_to(pool.folder)
    settings = SETTINGS | {"work": str(work), "optimizer": optimizer}
    towers, mergers, words = [], [], []
    for num_steps in (2, 4, 6):
        Trainer(argparse.Namespace(**settings | {"steps": num_steps}), 0).run()
        model = torch.load(work / "state.pt", weights_only=True)["model"]
        towers.append(model["model.visual.blocks.0.attn.qkv.weight"])
        mergers.append(model["model.visual.deepstack_merger_list.0.linear_fc2.weight"])
        words.append(model["model.language_model.layers.0.self_attn.q_proj.weight"])
    # Each half learns by itself; then they meet, and the tower rests but for its mergers.
    assert not torch.equal(towers[0], towers[1])
    assert torch.equal(words[0], words[1])
    assert torch.equal(towers[1], towers[2])
    assert not torch.equal(words[1], words[2])
    assert not mergers[1].any()
    assert mergers[2].any()
    lines = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4, 6]
    assert {"direction", "knows_start"} <= set(lines[0])
    assert "sees_colour" not in lines[0]  # the text model alone
    assert "sees_colour" in lines[1]
    assert "direction" not in lines[1]  # the vision tower alone
    assert {"direction", "sees_colour", "far", "knows_start", "finds_colour"} <= set(lines[3])
    saved = torch.load(work / "state.pt", weights_only=True)
    # Two draws of facts, two of glimpses; then the draw that a run was in is not gone on with.
    assert (saved["step"], saved["draw"]) == (6, 5)
    model = Qwen3VLForConditionalGeneration.from_pretrained(work / "model", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert sum(file.stat().st_size for file in (work / "model").glob("*.safetensors")) < 15 << 20


def test_training_starts_from_trained_weights(tmp_path: Path, pool: Pool) -> None:
    for name in ("pool", "val"):
        (tmp_path / name).symlink_to(pool.folder)
    prepare_base(tmp_path, str(bundled.MODEL))
    assert (tmp_path / "base" / "tokenizer.json").read_bytes() == (bundled.MODEL / "tokenizer.json").read_bytes()
    alone = {"fact_steps": 0, "watch_steps": 0, "start_from": str(bundled.MODEL), "steps": 1, "learning_rate": 0.0}
    Trainer(argparse.Namespace(**SETTINGS | alone | {"work": str(tmp_path)}), 0).run()
    model_class: Any = Qwen3VLForConditionalGeneration
    before, after = (
        model_class.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (bundled.MODEL, tmp_path / "model")
    )
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=1e-2) for name in before)


def test_beside_trained_weights_the_teachers_learn_first(tmp_path: Path, pool: Pool) -> None:
    for name in ("pool", "val"):
        (tmp_path / name).symlink_to(pool.folder)
    prepare_base(tmp_path, str(bundled.MODEL))
    alone = {"fact_steps": 0, "watch_steps": 0, "start_from": str(bundled.MODEL), "head_steps": 2, "loaders": 2}
    words, heads = [], []
    others = set(psutil.Process().children())
    for num_steps in (2, 4):
        Trainer(argparse.Namespace(**SETTINGS | alone | {"work": str(tmp_path), "steps": num_steps}), 0).run()
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
        words.append(saved["model"]["model.language_model.layers.0.self_attn.q_proj.weight"])
        heads.append(saved["clock"]["reads.late.weight"])
        assert set(psutil.Process().children()) <= others  # who drew the batches is gone
    model_class: Any = Qwen3VLForConditionalGeneration
    before = model_class.from_pretrained(bundled.MODEL, dtype=torch.float32).state_dict()
    assert torch.equal(words[0], before["model.language_model.layers.0.self_attn.q_proj.weight"])
    assert not torch.equal(words[0], words[1])
    assert not torch.equal(heads[0], heads[1])


def test_a_run_of_limited_time_ends_with_the_rate_down(tmp_path: Path, base: Path, pool: Pool) -> None:
    for name, target in (("base", base), ("pool", pool.folder), ("val", pool.folder)):
        (tmp_path / name).symlink_to(target)
    settings = SETTINGS | {"work": str(tmp_path), "fact_steps": 0, "watch_steps": 0, "warm_up_steps": 1, "steps": 1000}
    trainer = Trainer(argparse.Namespace(**settings | {"max_seconds": 100.0, "decay_share": 0.5}), 0)
    assert [trainer._rate(seconds) for seconds in (0.0, 50.0, 75.0, 100.0, 200.0)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    Trainer(argparse.Namespace(**settings | {"max_seconds": 0.001}), 0).run()
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 1


def test_processes_draw_what_a_thread_draws(tmp_path: Path, base: Path, pool: Pool) -> None:
    for name, target in (("base", base), ("pool", pool.folder), ("val", pool.folder)):
        (tmp_path / name).symlink_to(target)
    settings = SETTINGS | {"work": str(tmp_path), "fact_steps": 0, "watch_steps": 100}
    drawn = {}
    for loaders in (0, 2):
        trainer = Trainer(argparse.Namespace(**settings | {"loaders": loaders}), 0)
        batches = itertools.islice(trainer._batches(3, 0), 4)
        drawn[loaders] = [({kind: rows for kind, (rows, _) in batch.rows.items()}, used) for batch, used in batches]
    assert [used for _, used in drawn[0]] == [4, 5, 6, 7]
    assert drawn[0] == drawn[2]


def test_frames_of_all_sizes_attend_at_once_as_one_after_the_other() -> None:
    torch.manual_seed(0)
    lengths = (16, 16, 24, 8, 24)
    query, key, value = (torch.randn(sum(lengths), 5, 32) for _ in range(3))
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    together = attend_in_padded_frames(query, key, value, bounds, 0.3)
    for start, stop in itertools.pairwise(bounds.tolist()):
        scores = torch.einsum("qhd,khd->hqk", query[start:stop], key[start:stop]) * 0.3
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[start:stop]).flatten(1)
        assert torch.allclose(together[start:stop], expected, atol=1e-5)
