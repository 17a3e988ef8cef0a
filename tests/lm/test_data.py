"""Data in every form a user has it in is read as it is meant, without its padding; what is no data is refused."""

import itertools
import warnings

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from torch.utils.data import DataLoader, TensorDataset

from pycompress.calibration.batches import FEW_TOKENS, prepare
from pycompress.lm import data as batches
from pycompress.lm.data import joined, read, unpadded

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen jugs of liquor, then rest.",
]
IDS = torch.randint(3, 97, (3, 40), generator=torch.Generator().manual_seed(2))


def rows(found):
    return [row.tolist() for batch in found for row in batch["input_ids"]]


@pytest.mark.parametrize(
    "data",
    [
        TEXTS,
        tuple(TEXTS),
        np.array(TEXTS),
        {"text": TEXTS, "id": [1, 2]},
        [{"text": text, "id": 3} for text in TEXTS],
        Dataset.from_dict({"id": [1, 2], "text": TEXTS}),
        Dataset.from_dict({"content": TEXTS}),
        IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS)),
        pandas.DataFrame({"id": [1, 2], "text": TEXTS}),
        pandas.Series(TEXTS),
        iter(TEXTS),
    ],
    ids=lambda data: type(data).__name__,
)
def test_texts_in_any_form(data):
    assert joined(data, "calibration", None) == "\n\n".join(TEXTS)


def test_conversations_take_the_chat_template(byte_tokenizer):
    talk = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
    byte_tokenizer = type(byte_tokenizer)(tokenizer_object=byte_tokenizer.backend_tokenizer)
    byte_tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    expected = "<user> Where?\n<assistant> There."
    for data in (
        talk,
        [talk],
        {"messages": [talk]},
        [{"messages": talk}],
        Dataset.from_dict({"conversations": [talk]}),
    ):
        assert joined(data, "calibration", byte_tokenizer).strip() == expected
    byte_tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        joined(talk, "calibration", byte_tokenizer)


def test_one_batch_is_one_batch(byte_tokenizer, tiny_model):
    model = tiny_model("LlamaForCausalLM", vocab_size=300)
    batch = byte_tokenizer(TEXTS, return_tensors="pt", padding=True)
    ragged = byte_tokenizer(TEXTS)
    expected = [byte_tokenizer(text)["input_ids"] for text in TEXTS]
    frame = pandas.DataFrame(dict(ragged))
    loader = DataLoader(Dataset.from_dict(dict(ragged)), batch_size=None)
    forms = [batch, [batch], dict(batch), ragged, frame, Dataset.from_dict(dict(ragged)), loader, ragged["input_ids"]]
    forms += [{"input_ids": batch["input_ids"].numpy(), "attention_mask": batch["attention_mask"].numpy()}]
    for form in forms:
        assert rows(prepare(model, form, byte_tokenizer)) == expected


@pytest.mark.parametrize(
    "data", [IDS, IDS.numpy(), IDS.tolist(), list(IDS), [IDS], TensorDataset(IDS), DataLoader(IDS, 2), IDS.int()]
)
def test_ids_in_any_form(data, tiny_model):
    found = prepare(tiny_model("LlamaForCausalLM"), data, None)
    assert rows(found) == IDS.tolist()
    assert all(set(batch) == {"input_ids"} for batch in found)


def test_rows_are_batched_alike_however_they_came(tiny_model):
    model, ids = tiny_model("LlamaForCausalLM"), torch.randint(3, 97, (200, 40))
    sizes = [[len(b["input_ids"]) for b in prepare(model, data, None)] for data in (ids, ids.split(7), list(ids))]
    assert sizes[0] == sizes[1] == sizes[2] == [102, 98]  # 4096 tokens at once


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_padding_is_left_out(side, share):
    lengths = [40 - int(share * 40), 40, 17]
    ids, mask = torch.zeros(3, 40, dtype=torch.long), torch.zeros(3, 40, dtype=torch.long)
    for row, length in enumerate(lengths):
        at = slice(40 - length, None) if side == "left" else slice(length)
        ids[row, at], mask[row, at] = IDS[row, :length], 1
    kinds = torch.arange(120).view(3, 40)
    entry = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds, "labels": ids}
    found = unpadded(entry, "entry 0")
    assert rows(found) == [IDS[row, :length].tolist() for row, length in enumerate(lengths)]
    assert [b["token_type_ids"].tolist() for b in found] == [
        kinds[r : r + 1][mask[r : r + 1] == 1][None].tolist() for r in range(3)
    ]
    assert all("labels" not in batch for batch in found)


def test_a_row_that_is_all_padding_is_left_out():
    mask = torch.ones_like(IDS)
    mask[1] = 0
    assert rows(unpadded({"input_ids": IDS, "attention_mask": mask}, "entry 0")) == [IDS[0].tolist(), IDS[2].tolist()]


def test_images_go_with_their_rows():
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    images = torch.arange(3.0)[:, None, None, None].expand(3, 2, 4, 4)
    found = unpadded({"input_ids": IDS, "attention_mask": mask, "pixel_values": images}, "entry 0")
    assert [batch["pixel_values"].unique().tolist() for batch in found] == [[0.0], [1.0], [2.0]]
    with pytest.raises(ValueError, match=r"pixel_values \[5, 2\] cannot be told apart by its 3 rows"):
        unpadded({"input_ids": IDS, "attention_mask": mask, "pixel_values": torch.ones(5, 2)}, "entry 0")


def test_positions_go_along_unless_they_count_from_zero():
    packed = torch.cat([torch.arange(25), torch.arange(15)]).expand(3, -1)
    assert torch.equal(unpadded({"input_ids": IDS, "position_ids": packed}, "entry 0")[0]["position_ids"], packed)
    assert "position_ids" not in unpadded({"input_ids": IDS, "position_ids": torch.arange(40)}, "entry 0")[0]
    mask = torch.ones_like(IDS)
    mask[:, :4] = 0
    entry = {"input_ids": IDS, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    assert all("position_ids" not in batch for batch in unpadded(entry, "entry 0"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"input_ids": IDS.view(3, 4, 10)}, r"must be \[B, T\] or \[T\], got \[3, 4, 10\]"),
        ({"input_ids": IDS.float()}, "must be integers"),
        ({"input_ids": IDS > 5}, "must be integers"),
        ({"input_ids": IDS, "attention_mask": torch.ones(3, 1, 40, 40)}, r"must be \[3, 40\] as input_ids is"),
        ({"input_ids": IDS, "attention_mask": torch.full((3, 40), -1.0)}, "must be of 0 and 1"),
        (
            {"input_ids": IDS, "attention_mask": torch.tensor([1, 0, 1, 1] * 30).view(3, 40)},
            "zeros between ones in row 0",
        ),
        ({"input_ids": IDS, "position_ids": torch.arange(39)}, r"position_ids of entry 0 must be integers \[3, 40\]"),
        ({"input_ids": IDS, "cu_seq_lens_q": torch.arange(3)}, "has cu_seq_lens_q, which is not passed on"),
        ({"input_ids": "abc"}, "must be an integer tensor"),
        ({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1]]}, "2 rows of input_ids and no 2 of attention_mask"),
        ({"input_ids": torch.empty(2, 3, dtype=torch.long, device="meta")}, "on the meta device"),
    ],
)
def test_batches_that_cannot_be_used_are_refused_in_a_sentence(entry, message):
    with pytest.raises((ValueError, TypeError), match=message):
        unpadded(entry, "entry 0")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("data/calibration.txt", "reads as a path, a key or a dataset's name"),
        ("/etc", "reads as a path"),
        ("wikitext2", "reads as a path"),
        ("Salesforce/wikitext", "reads as a path"),
        (["a.txt", "b.txt"], "reads as a path"),
        (["input_ids", "attention_mask"], "reads as a path, a key"),
        ("  \n", "holds no text but blanks"),
        (b"some text", "is bytes; decode them"),
        (3, "is int; give texts"),
        (None, "is NoneType; give texts"),
        ([], "is empty"),
        ({}, "has nothing and no input_ids"),
        ([[]], "entry 0 of calibration is an empty list"),
        (["some text", None], "entry 1 of calibration is NoneType"),
        (["some text", IDS], r"mixes texts and token ids \(entry 1\)"),
        ({"train": ["some text"]}, r"of a set of splits give one \(data\['train'\]\)"),
        (DatasetDict(train=Dataset.from_dict({"text": TEXTS})), r"of a set of splits give one \(data\['train'\]\)"),
        (Dataset.from_dict({"question": TEXTS}), r"of another column its values \(data\['question'\]\)"),
        (pandas.DataFrame({"question": TEXTS}), r"of another column its values"),
        ([{"text": 3}], "has int where a text or a conversation belongs"),
    ],
)
def test_what_is_no_data_is_refused_in_a_sentence(data, message):
    with pytest.raises((ValueError, TypeError), match=message):
        read(data, "calibration")


def test_a_file_that_is_there_is_no_text(tmp_path):
    file = tmp_path / "my own words.md"
    file.write_text("words")
    for given in (file, str(file)):
        with pytest.raises((ValueError, TypeError), match="path"):
            read(given, "calibration")


def test_a_stream_without_an_end_is_cut_with_a_warning(monkeypatch):
    monkeypatch.setattr(batches, "STREAM_LETTERS", 500)
    drawn = itertools.count()
    with pytest.warns(UserWarning, match="its first 10 entries are used; give a list"):
        found = read(({"text": f"document {next(drawn) % 10} ".ljust(50)} for _ in itertools.repeat(0)), "calibration")
    assert len(found) == 10
    assert next(drawn) <= 12
    with pytest.warns(UserWarning, match="has no length"):
        read(({"input_ids": IDS} for _ in itertools.count()), "calibration")
    with pytest.warns(UserWarning, match="has no length"):
        read(("a few words" for _ in itertools.count()), "calibration")


def test_a_handful_of_tokens_is_warned_of(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    with pytest.warns(UserWarning, match="calibration holds 40 tokens, which say little"):
        prepare(model, IDS[:1], None)
    assert IDS.numel() >= FEW_TOKENS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(model, IDS, None)


def test_padding_that_no_mask_tells_of_is_warned_of(tiny_model):
    ids = IDS.clone()
    ids[1, -3:] = 0
    with pytest.warns(UserWarning, match="begin or end in the model's padding token 0"):
        prepare(tiny_model("LlamaForCausalLM"), ids, None)


def test_what_the_models_forward_takes_and_calibration_cannot_give_is_refused(tiny_model):
    model = tiny_model("GPT2LMHeadModel")
    for name in ("inputs_embeds", "encoder_hidden_states"):
        with pytest.raises(ValueError, match=f"has {name}"):
            prepare(model, [{"input_ids": IDS, name: torch.rand(3, 40, 64)[:, : 39 if name[0] == "e" else 40]}], None)
    found = prepare(model, [{"input_ids": IDS, "token_type_ids": IDS, "special_tokens_mask": IDS}], None)
    assert all(set(batch) == {"input_ids", "token_type_ids"} for batch in found)


def test_positions_and_rows_fit_the_model(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    with pytest.raises(ValueError, match=r"has 64 positions, got 65 \(the longest row of calibration\)"):
        prepare(model, torch.full((2, 65), 5), None)
    with pytest.raises(ValueError, match=r"has 64 positions, got 70 \(position_ids of calibration\)"):
        prepare(model, [{"input_ids": IDS, "position_ids": torch.arange(30, 70)}], None)
    with pytest.raises(ValueError, match="position_ids are at least 0"):
        prepare(model, [{"input_ids": IDS, "position_ids": torch.arange(-1, 39)}], None)
