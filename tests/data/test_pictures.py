"""Rows with pictures to tokens: where they stand, how they are given, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

datasets = pytest.importorskip("datasets")
pytest.importorskip("PIL")

from prefkern import data
from prefkern.data.collate import ExampleCollator, PreferenceCollator
from prefkern.data.columns import pictures_of
from prefkern.data.picture_batches import PictureCollator
from support import pictures, tiny
from support.pictures import FAMILIES, QWEN

IMAGE = {"type": "image"}
PLACE = QWEN.placeholder
_, PROCESSOR = QWEN.make()
PAD = PROCESSOR.image_token_id


def row(**change) -> dict:
    made = pictures.rows(QWEN, 1)[0]
    return {**made, "images": [pictures.picture("red", "circle")], **change}


def chat(content, **change) -> dict:
    made = pictures.rows(QWEN, 1, chats=True)[0]
    one = [pictures.picture("red", "circle")]
    return {**made, "images": one, "prompt": [{"role": "user", "content": content}], **change}


def tokenized(rows, **options):
    made = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)
    return data.tokenize_preferences(made, PROCESSOR, **options)


def test_a_picture_has_as_many_tokens_as_the_processor_says() -> None:
    sizes = [(8, 8), (16, 16), (24, 16)]
    rows = [row(images=[pictures.picture("red", "square", *size)]) for size in sizes]
    tokens, report = tokenized(rows)
    assert [ids.count(PAD) for ids in tokens["prompt_ids"]] == [1, 4, 6]
    for each in tokens:
        assert each["prompt_mm_token_types"] == [int(token == PAD) for token in each["prompt_ids"]]
    assert report.pictures == 3 and "3 pictures, whose tokens are the prompts'" in str(report)
    assert report.lengths["prompt"].max - report.lengths["prompt"].min == 5


@pytest.mark.parametrize(
    "content",
    [
        "what is this",
        [IMAGE, {"type": "text", "text": "what is this"}],
        [{**IMAGE, "text": None}, {"type": "text", "text": "what is this"}],
    ],
    ids=["text", "blocks", "blocks from Arrow"],
)
def test_where_a_picture_stands_in_a_conversation(content) -> None:
    ((ids,), (expected,)) = (
        tokenized([each])[0]["prompt_ids"][:]
        for each in (chat(content), row(prompt=f"<user> {PLACE} what is this <eos> <assistant>"))
    )
    assert ids == expected
    between = [{"type": "text", "text": "look at"}, IMAGE, {"type": "text", "text": "this"}]
    ((ids,), (expected,)) = (
        tokenized([each])[0]["prompt_ids"][:]
        for each in (chat(between), row(prompt=f"<user> look at {PLACE} this <eos> <assistant>"))
    )
    assert ids == expected


def test_pictures_stand_before_the_first_question() -> None:
    turns = [
        {"role": "system", "content": "look"},
        {"role": "user", "content": "what is this"},
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": "which shape"},
    ]
    two = [pictures.picture("red", "circle"), pictures.picture("blue", "square")]
    ids = tokenized([chat("", prompt=turns, images=two)])[0]["prompt_ids"][0]
    text = PROCESSOR.tokenizer.decode(ids)
    before, _, after = text.partition("what is this")
    assert before.count("<|image_pad|>") == 8 and "<|image_pad|>" not in after


def test_a_text_that_becomes_a_message_keeps_its_placeholders() -> None:
    """A system column and rankings make conversations of texts, in which pictures stand already."""
    two = [pictures.picture("red", "circle"), pictures.picture("blue", "square")]
    asked = f"look at {PLACE} and {PLACE} what is this"
    expected = f"<user> {asked} <eos> <assistant>"
    ((ids,),) = (tokenized([row(images=two, prompt=expected)])[0]["prompt_ids"][:],)
    made = [row(images=two, prompt=asked, said="which")]
    ((found,),) = (tokenized(made, columns={"system": "said"})[0]["prompt_ids"][:],)
    assert found[-len(ids) :] == ids and len(found) > len(ids)
    one_short = [row(images=two, prompt=f"{PLACE} what is this", said="which")]
    with pytest.raises(ValueError, match="has 2 pictures, and its text has 1 placeholder"):
        tokenized(one_short, columns={"system": "said"})


def test_pictures_beside_a_ranking_stay_with_their_rows() -> None:
    colours = ["red", "blue", "red", "blue"]
    rows = [
        {
            "prompt": f"{PLACE} what is this",
            "responses": ["a blue square", "a red circle"],
            "scores": [1.0, 1.0 if at == 1 else 2.0],
            "images": [pictures.picture(colour, "circle", 8 + 8 * at)],
        }
        for at, colour in enumerate(colours)
    ]
    kept = [rows[0], *rows[2:]]
    tokens, report = tokenized(rows)
    every = data.ranked_pairs(datasets.Dataset.from_list(rows))
    assert report.tied == 1
    for found in (tokens, tokenized(every)[0]):
        assert [pictures_of(each)[0].size for each in found] == [
            each["images"][0].size for each in kept
        ]
        for each, ids in zip(kept, found["prompt_ids"], strict=True):
            alone = tokenized([row(images=each["images"], prompt=each["prompt"])])
            text = tokenized(
                [chat(each["prompt"].removeprefix(PLACE).strip(), images=each["images"])]
            )
            assert ids == text[0]["prompt_ids"][0] and alone[1].pictures == 1


def test_pictures_of_single_responses_stay_with_their_rows() -> None:
    """More pairs than `datasets` maps at once: of each batch all chosen, then all rejected."""
    rows = [row(images=[pictures.picture("red", "circle", width, 8)]) for width in (8, 16, 24)]
    # Three do not divide the 1,000 rows of a batch.
    pairs = datasets.Dataset.from_list(rows).select([0, 1, 2] * 334)
    tokens, _ = data.tokenize_examples(pairs, PROCESSOR)
    assert len(tokens) == 2004
    expected = [pictures_of(each)[0].width // 8 for each in tokens]
    assert [ids.count(PAD) for ids in tokens["prompt_ids"]] == expected


@pytest.mark.parametrize("name", ["none", "the processor's, of blocks"])
def test_conversations_of_text_take_the_processors_template(monkeypatch, name) -> None:
    """A tokenizer beside a processor may have no template, or one that leaves out plain text."""
    own = None if name == "none" else PROCESSOR.chat_template
    monkeypatch.setattr(PROCESSOR.tokenizer, "chat_template", own)
    asked = chat("what is this", images=[])
    text = {name: value for name, value in asked.items() if name != "images"}
    shape = datasets.List(datasets.Image())
    beside = datasets.Dataset.from_list([asked]).cast_column("images", shape)
    for tokenize in (data.tokenize_preferences, data.tokenize_examples):
        (alone, _), (among, _) = (
            tokenize(each, PROCESSOR) for each in (datasets.Dataset.from_list([text]), beside)
        )
        assert alone["prompt_ids"][:] == among["prompt_ids"][:]
        assert "prompt_mm_token_types" not in alone.column_names
    with pytest.raises(ValueError, match="has 0 pictures, and its text has 1 placeholder"):
        tokenized([{**text, "prompt": [{"role": "user", "content": f"{PLACE} what"}]}])
    refused = (
        "has no chat template" if own is None else "template leaves out 'content' of a message"
    )
    with pytest.raises(ValueError, match=refused):
        tokenized([text], assistant_only_loss=True)


def test_the_last_turn_alone_is_scored() -> None:
    turns = [*chat("what is this")["chosen"], {"role": "user", "content": "which shape"}]
    said = [*turns, {"role": "assistant", "content": "a circle"}]
    tokens, _ = tokenized([chat("what is this", chosen=said)], last_turn_only=True)
    mask = tokens[0]["chosen_mask"]
    assert sum(mask) == 3 and mask[-3:] == [True] * 3


def test_a_missing_file_is_an_error_of_its_row(tmp_path: Path) -> None:
    kept = tmp_path / "kept.png"
    pictures.picture("red", "circle").save(kept)
    rows = [chat("what is this", images=[str(path)]) for path in (kept, "nowhere.png")]
    for given, number in ((rows, 1), (rows[::-1], 0)):
        message = f"dataset 'train', row {number}: a picture cannot be read: .*nowhere.png"
        with pytest.raises(ValueError, match=message):
            tokenized(given)
        with pytest.raises(ValueError, match=message):
            data.tokenize_examples(datasets.Dataset.from_list(given), PROCESSOR)


def _png(picture) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_pictures_as_files_bytes_and_one_by_one(tmp_path: Path) -> None:
    drawn = [pictures.picture(colour, "circle") for colour in ("red", "blue")]
    for at, each in enumerate(drawn):
        each.save(tmp_path / f"{at}.png")
    paths = [str(tmp_path / f"{at}.png") for at in range(2)]
    forms = {
        "images": [[each] for each in drawn],
        "paths": [[path] for path in paths],
        "bytes": [[_png(each)] for each in drawn],
        "files": [[{"bytes": None, "path": path}] for path in paths],
    }
    for name, cells in forms.items():
        tokens, _ = tokenized([row(images=cell) for cell in cells])
        found = [[each.tobytes() for each in pictures_of(row)] for row in tokens]
        assert found == [[each.tobytes()] for each in drawn], name
    made = [{**row(), "image": one} for one in (drawn[0], paths[1])]
    for each in made:
        del each["images"]
    for each in made:
        tokens, _ = tokenized([each])
        assert len(pictures_of(tokens[0])) == 1 and PAD in tokens[0]["prompt_ids"]


def test_pixels_stay_as_they_are_stored() -> None:
    """A JPEG that is written again has other pixels."""
    file = io.BytesIO()
    pictures.picture("red", "circle", 24, 24).save(file, "JPEG", quality=40)
    tokens, _ = tokenized([row(images=[{"bytes": file.getvalue(), "path": None}])])
    stored = tokens.cast_column("images", datasets.List(datasets.Image(decode=False)))
    assert stored[0]["images"][0]["bytes"] == file.getvalue()


def test_tokens_are_found_again(tmp_path: Path) -> None:
    """The function that tokenises has one hash, before it has run and after."""
    pictures.dataset(QWEN, 4).save_to_disk(tmp_path / "rows")
    found = [tokenized(datasets.load_from_disk(tmp_path / "rows"))[0].cache_files for _ in range(2)]
    assert found[0] == found[1] != []


LONG = {"images": [pictures.picture("red", "circle", 24, 16)]}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            {"prompt": "what is this"},
            {},
            "row 0: the row has 1 picture, and its text has 0 placeholders '<|image_pad|>'",
        ),
        (
            {"prompt": f"{PLACE} {PLACE} what is this"},
            {},
            "row 0: the row has 1 picture, and its text has 2 placeholders",
        ),
        (
            {"images": []},
            {},
            "row 0: the row has 0 pictures, and its text has 1 placeholder '<|image_pad|>'",
        ),
        ({"chosen": f" it is {PLACE} <eos>"}, {}, "the responses have none"),
        (
            LONG,
            {"max_length": 12},
            r"row 0: .* cut its prompt, which has 1 picture: the row has 16 tokens, 12 of them the prompt's, and max_length is 12 \(max_prompt_length None\); raise it, have",
        ),
        (LONG, {"max_prompt_length": 4}, "max_length is None \\(max_prompt_length 4\\); raise it"),
        ({"images": [None]}, {}, "row 0: one of its pictures is null; leave it out of 'images'"),
        ({"images": ["no.png"]}, {}, "row 0: a picture cannot be read: .*no.png"),
        (
            {"images": "a"},
            {},
            r"'images' must be a list of pictures \(datasets.Image, paths or bytes\), got",
        ),
        ({"images": [3]}, {}, "'images' must be a list of pictures .*, got"),
        (
            {"image": pictures.picture("red", "circle")},
            {},
            "has both 'images' and 'image'; remove one of them",
        ),
        (
            {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]},
            {},
            "row 0 has token ids and pictures, and no 'prompt_mm_token_types'",
        ),
        ({}, {"assistant_only_loss": True}, "assistant_only_loss is not supported beside pictures"),
    ],
)
def test_rows_that_cannot_be_read(change, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        tokenized([row(**change)], **options)


@pytest.mark.parametrize(
    ("content", "change", "message"),
    [
        (
            [{"type": "text", "text": "what is this"}],
            {},
            "row 0: the row has 1 picture, and its prompt has 0 blocks",
        ),
        (
            [IMAGE, IMAGE, {"type": "text", "text": "what is this"}],
            {},
            "the row has 1 picture, and its prompt has 2 blocks",
        ),
        ("<|image_pad|> is this <|image_pad|>", {}, "has 2 placeholders '<|image_pad|>'"),
        (
            [IMAGE, {"type": "text", "text": "what is <|image_pad|>"}],
            {},
            "has 2 placeholders '<|image_pad|>'",
        ),
        (
            [{**IMAGE, "url": "a.png"}, {"type": "text", "text": "what is this"}],
            {},
            "a picture in 'prompt' holds 'url'; put the picture into the row's 'images'",
        ),
        (
            [IMAGE],
            {"chosen": [{"role": "assistant", "content": [IMAGE]}]},
            "'chosen' has a picture, and only a prompt can have pictures",
        ),
        ([{"type": "video"}], {}, "content of type 'video', but only text and image is read here"),
    ],
)
def test_conversations_that_cannot_be_read(content, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        tokenized([chat(content, **change)])


def test_long_rows_may_be_dropped_or_lose_the_end_of_a_response() -> None:
    rows = [row(), row(**LONG)]
    tokens, report = tokenized(rows, max_length=15, truncation_mode="drop")
    assert len(tokens) == 1 and report.too_long == 1
    tokens, report = tokenized(rows, max_length=13, truncation_mode="keep_start")
    assert report.responses_truncated == 2 and report.prompts_truncated == 0
    assert [ids.count(PAD) for ids in tokens["prompt_ids"]] == [4, 6]


def test_other_datasets_and_processors_are_refused() -> None:
    rows = datasets.Dataset.from_list([row()])
    with pytest.raises(ValueError, match="has a transform and a column 'images'"):
        tokenized(rows.with_transform(lambda batch: batch))
    _, blind = FAMILIES[0].make()
    del blind.image_token
    with pytest.raises(ValueError, match="Qwen2_5_VLProcessor has no image_token"):
        data.tokenize_preferences(rows, blind)
    with pytest.raises(
        ValueError, match="need the model's processor, and .* is none: pass processing_class"
    ):
        data.tokenize_preferences(rows, tiny.tokenizer())
    with pytest.raises(ValueError, match="pictures are not read here; remove the column"):
        data.check_columns(rows, "x")


def test_a_mismatched_response_is_cut_and_not_its_prompt() -> None:
    """KTO's mismatched rows: the tokens of a picture stay, whatever the bound."""
    seen = [pictures.picture(colour, "circle") for colour in ("red", "blue")]
    rows = [
        {"prompt_ids": [9] * 6, "completion_ids": ids, "desirable": True, "images": [one]}
        for ids, one in zip(([5, 6, 7], [8]), seen, strict=True)
    ]
    batch = ExampleCollator(0, max_length=8)(rows)
    assert batch["mismatched_input_ids"].tolist() == [[9] * 6 + [8, 0], [9] * 6 + [5, 6]]
    for each in rows:
        each["images"] = []
    assert "mismatched_input_ids" in ExampleCollator(0, max_length=8)(rows)
    assert not len(ExampleCollator(0, max_length=8)(rows)["mismatched_input_ids"])


def test_a_packed_batch_with_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="a packed row cannot have pictures; leave padding_free"):
        PictureCollator(PreferenceCollator(0, padding_free=True), PROCESSOR, frozenset())


@pytest.mark.parametrize("written", ["", "<user> "], ids=["added", "in the text already"])
def test_a_first_token_is_there_once(written: str) -> None:
    """Types of tokens stay beside their tokens."""
    _, processor = QWEN.make()
    first = processor.tokenizer.convert_tokens_to_ids("<user>")
    processor.tokenizer.bos_token = "<user>"
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<user> $A", special_tokens=[("<user>", first)]
    )
    rows = datasets.Dataset.from_list([row(prompt=f"{written}{PLACE} what is this")])
    tokens, report = data.tokenize_preferences(rows, processor)
    ids = tokens[0]["prompt_ids"]
    assert ids[0] == first and ids.count(first) == 1 and ids.count(PAD) == 4
    assert tokens[0]["prompt_mm_token_types"] == [int(token == PAD) for token in ids]
    assert report.begun == bool(written)
