"""The shipped vocabulary with the shipped tokenizer settings, against well-known ids; tokenizers of checkpoints."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from latentrt.bundle.manifest import TokenizerRecord
from latentrt.errors import CheckpointError
from latentrt.text.tokenizer import Tokenizer
from latentrt.text.tokenizer_json import MAX_ADDED_TOKENS
from latentrt_export.checkpoints.config_keys import CONFIG_KEYS, NoEffect, Restricted
from latentrt_export.checkpoints.single_file import CONFIGS
from latentrt_export.checkpoints.tokenizer import build_vocabulary, export_tokenizer, read_merges, write_vocabulary
from latentrt_export.checkpoints.tokenizer_settings import read_tokenizer_settings
from tests.tiny import write_tokenizer


def test_the_vocabulary_is_clips() -> None:
    tokens = build_vocabulary(read_merges())
    assert (len(read_merges()), len(tokens), len(set(tokens))) == (48894, 49408, 49408)
    assert (tokens[0], tokens[255], tokens[256], tokens[320]) == ("!", "\u0143", "!</w>", "a</w>")
    assert tokens[-2:] == ["<|startoftext|>", "<|endoftext|>"]


@pytest.mark.parametrize(("family", "pad"), [("stable-diffusion-1", 49407), ("stable-diffusion-2", 0)])
def test_the_tokenizer_is_the_published_one(family: str, pad: int, tmp_path: Path) -> None:
    folder = shutil.copytree(CONFIGS / family / "tokenizer", tmp_path / "tokenizer")
    write_vocabulary(folder, read_merges())
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    astronaut = tokenizer("An astronaut riding a horse, 8k").input_ids
    assert astronaut == [49406, 550, 18376, 6765, 320, 4558, 267, 279, 330, 49407]
    assert tokenizer("cat", padding="max_length", max_length=5).input_ids == [49406, 2368, 49407, pad, pad]
    assert json.loads((folder / "vocab.json").read_text(encoding="utf-8"))["<|endoftext|>"] == 49407


# Tokenizers of checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The files of a checkpoint that an export of its tokenizer reads."""
    folder = tmp_path / "checkpoint"
    ids = write_tokenizer(folder / "tokenizer", "sd1", "bpe")
    change(folder / "text_encoder" / "config.json", vocab_size=len(ids), max_position_embeddings=77)
    change(folder / "model_index.json", tokenizer=["transformers", "CLIPTokenizer"])
    return folder


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; `...` removes one."""
    path.parent.mkdir(exist_ok=True, parents=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    kept = {key: value for key, value in {**found, **values}.items() if value is not ...}
    path.write_text(json.dumps(kept))


def export(checkpoint: Path) -> TokenizerRecord:
    scratch = checkpoint.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    return export_tokenizer(checkpoint, "tokenizer", "text_encoder", checkpoint, scratch)


def refusal(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        export(checkpoint)
    return str(caught.value)


def add_tokens(checkpoint: Path, *tokens: str) -> CLIPTokenizer:
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    tokenizer.add_tokens([*tokens])
    shutil.rmtree(checkpoint / "tokenizer")
    tokenizer.save_pretrained(checkpoint / "tokenizer")
    return tokenizer


def test_the_record_of_a_tokenizer(checkpoint: Path) -> None:
    record = export(checkpoint)
    assert (record.begin, record.end, record.pad, record.length, record.rows) == (558, 559, 559, 77, 560)


def test_a_token_without_a_row_is_refused_by_name(checkpoint: Path) -> None:
    add_tokens(checkpoint, "<cat>", "<\x1bdog>")
    message = refusal(checkpoint)
    assert "<cat>, <\\x1bdog>" in message
    assert "560 rows" in message
    change(checkpoint / "text_encoder" / "config.json", vocab_size=562)
    assert export(checkpoint).rows == 562


@pytest.mark.parametrize(("length", "expected"), [(76, 76), (3, 3), (..., 77), (int(1e30), 77), (1e30, 77)])
def test_a_shorter_chunk_is_followed_and_a_missing_length_is_the_encoders(
    checkpoint: Path, length: Any, expected: int
) -> None:
    change(checkpoint / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    assert export(checkpoint).length == expected


@pytest.mark.parametrize("length", [78, 248, 2, 0, -1, 77.0, "77", True, float("inf"), [77], 10**19])
def test_another_length_is_refused_with_both_values(checkpoint: Path, length: Any) -> None:
    change(checkpoint / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    message = refusal(checkpoint)
    assert f"model_max_length {length!r}" in message
    assert "77 positions" in message


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many"])
@pytest.mark.parametrize("key", ["vocab_size", "max_position_embeddings"])
def test_a_text_encoder_of_no_size(checkpoint: Path, key: str, value: Any) -> None:
    change(checkpoint / "text_encoder" / "config.json", **{key: value})
    assert f"{key} {value!r}" in refusal(checkpoint)


def test_an_encoder_in_the_configuration_of_a_whole_clip(checkpoint: Path) -> None:
    """The numbers are those of the encoder, as in transformers."""
    path = checkpoint / "text_encoder" / "config.json"
    encoder = json.loads(path.read_text())
    change(path, vocab_size=7, max_position_embeddings=7, text_config=encoder | {"max_position_embeddings": 248})
    change(checkpoint / "tokenizer" / "tokenizer_config.json", model_max_length=248)
    assert export(checkpoint).length == 248


@pytest.mark.parametrize("name", ["BertTokenizer", "XLMRobertaTokenizer", "T5TokenizerFast", "Mine", ["CLIPTokenizer"]])
@pytest.mark.parametrize("place", ["model_index.json", "tokenizer/tokenizer_config.json"])
def test_another_class_is_refused_by_its_name(checkpoint: Path, place: str, name: Any) -> None:
    own = "config" in place
    change(checkpoint / place, **({"tokenizer_class": name} if own else {"tokenizer": ["transformers", name]}))
    message = refusal(checkpoint)
    assert str(name) in message
    assert place in message


def test_another_class_is_refused_before_its_files_are_read(checkpoint: Path) -> None:
    change(checkpoint / "model_index.json", tokenizer=["transformers", "T5Tokenizer"])
    shutil.rmtree(checkpoint / "tokenizer")
    assert "T5Tokenizer" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"])
def test_classes_over_clips_byte_pairs_give_transformers_ids(checkpoint: Path, name: str) -> None:
    theirs = add_tokens(checkpoint, "<cat>", "<cat>_1")
    if name != "CLIPTokenizerFast":
        theirs = PreTrainedTokenizerFast.from_pretrained(checkpoint / "tokenizer")
        theirs.save_pretrained(checkpoint / "tokenizer")
    change(checkpoint / "model_index.json", tokenizer=["transformers", name])
    change(checkpoint / "text_encoder" / "config.json", vocab_size=562)
    record = export(checkpoint)
    ours = Tokenizer.from_json((checkpoint / record.file).read_bytes(), record)
    for text in ("", "It's a RED circle <cat>_1", "<|endoftext|>!! 猫 <CAT>"):
        expected = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.chunks(text)[0].tolist() == expected


def test_a_fast_tokenizer_without_begin_and_end_is_refused(checkpoint: Path) -> None:
    add_tokens(checkpoint)
    change(checkpoint / "tokenizer" / "tokenizer.json", post_processor=None)
    change(checkpoint / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
    assert "frames a text as []" in refusal(checkpoint)


def test_a_fast_tokenizer_of_a_word_list_is_refused_by_its_model(checkpoint: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>"))
    shutil.rmtree(checkpoint / "tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<s>").save_pretrained(checkpoint / "tokenizer")
    change(checkpoint / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
    assert "WordLevel" in refusal(checkpoint)


def test_a_fast_tokenizer_without_its_file(checkpoint: Path) -> None:
    change(checkpoint / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
    assert "has no tokenizer.json" in refusal(checkpoint)


def test_padding_of_an_earlier_call_is_not_exported(checkpoint: Path) -> None:
    """transformers saves the padding and truncation of a tokenizer's last call with it."""
    tokenizer = add_tokens(checkpoint)
    tokenizer("a star", padding="max_length", max_length=77, truncation=True)
    tokenizer.save_pretrained(checkpoint / "tokenizer")
    place = checkpoint / "tokenizer" / "tokenizer.json"
    assert json.loads(place.read_text())["padding"]["strategy"] == {"Fixed": 77}
    export(checkpoint)
    assert json.loads(place.read_text())["padding"] is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": ""}}, "Replace"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "Precompiled"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "_"}}, "Metaspace"),
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
    ],
)
def test_no_library_sees_another_tokenizers_file(
    checkpoint: Path, changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_tokens(checkpoint)
    change(checkpoint / "tokenizer" / "tokenizer.json", **changes)
    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was read"))
    assert reason in refusal(checkpoint)


@pytest.mark.parametrize("name", ["vocab.json", "special_tokens_map.json", "merges.txt"])
def test_a_file_that_is_too_large(checkpoint: Path, name: str) -> None:
    with (checkpoint / "tokenizer" / name).open("r+b") as file:
        file.truncate((8 << 20) + 1)
    assert f"{name} has" in refusal(checkpoint)


class PanicException(BaseException):
    """Named like the class that a panic in Rust has, which no module exports."""


def test_a_panic_is_an_error_of_the_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: Path, *, local_files_only: bool) -> None:
        raise error

    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", read)
    error: BaseException = PanicException("called unwrap on \x1b")
    assert "called unwrap on \\x1b" in refusal(checkpoint)
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint)


@pytest.mark.parametrize("step", ["begin", "write"])
def test_a_panic_after_loading_is_an_error_of_the_checkpoint(
    checkpoint: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(*args: object, **options: object) -> None:
        raise PanicException("called unwrap on \x1b")

    if step == "begin":
        monkeypatch.setattr(CLIPTokenizer, "__call__", panic)
    else:
        load = CLIPTokenizer.from_pretrained

        class Backend:
            no_padding = no_truncation = to_str = panic

        def read(folder: Path, *, local_files_only: bool) -> CLIPTokenizer:
            tokenizer = load(folder, local_files_only=local_files_only)
            tokenizer._tokenizer = Backend()
            return tokenizer

        monkeypatch.setattr(CLIPTokenizer, "from_pretrained", read)
    assert "called unwrap on \\x1b" in refusal(checkpoint)


@pytest.mark.parametrize("index", [10**9, -1, True, 1.0, "1", None])
def test_a_vocabulary_with_a_gap_is_refused_before_memory_is_taken(checkpoint: Path, index: Any) -> None:
    """The tokenizers package takes 17 s and gigabytes for the first one."""
    change(checkpoint / "tokenizer" / "vocab.json", token=index)
    assert f"id {index!r} of 'token'" in refusal(checkpoint)


def test_all_temporary_files_are_in_the_exports_own_folder(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that is killed leaves its folder to the next one, and nothing in the system's."""
    seen = []
    load = CLIPTokenizer.from_pretrained

    def read(folder: Path, *, local_files_only: bool) -> CLIPTokenizer:
        seen.append(Path(folder))
        return load(folder, local_files_only=local_files_only)

    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", read)
    export(checkpoint)
    assert [folder.parent for folder in seen] == [checkpoint.parent / "scratch"]


# The files beside the vocabulary

ESCAPE = "\x1b]0;title\x07"


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("special_tokens_map.json", {"pad_token": {"content": "<|endoftext|>", ESCAPE: 1, "__type": "AddedToken"}}),
        ("special_tokens_map.json", {"pad_token": {"content": "<|endoftext|>", "lstrip": "yes"}}),
        ("special_tokens_map.json", {"pad_token": {"content": 5}}),
        ("special_tokens_map.json", {"pad_token": ["<|endoftext|>"]}),
        ("special_tokens_map.json", {"additional_special_tokens": "<cat>"}),
        ("special_tokens_map.json", {"additional_special_tokens": [ESCAPE * 99]}),
        ("special_tokens_map.json", {"padding_side": "left"}),
        ("special_tokens_map.json", {ESCAPE: "left"}),
        ("tokenizer_config.json", {"pad_token": {"content": "<|endoftext|>", ESCAPE: 1, "__type": "AddedToken"}}),
        ("tokenizer_config.json", {"extra_special_tokens": {"a": {"content": "<cat>", ESCAPE: 1}}}),
        ("tokenizer_config.json", {"extra_special_tokens": [{"content": "<cat>", "__type": ESCAPE}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "<|endoftext|>", ESCAPE: 1}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {ESCAPE: {"content": "<|endoftext|>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": "<|endoftext|>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [{"content": "<|endoftext|>"}]}),
        ("tokenizer_config.json", {"image_token": "<image>"}),
        ("tokenizer_config.json", {"extra_special_tokens": {ESCAPE * 99: "<cat>"}}),
        ("added_tokens.json", {"<cat>": "1"}),
        ("added_tokens.json", {ESCAPE * 99: 1}),
    ],
)
def test_another_form_of_a_token_is_refused_before_transformers_reads_it(
    checkpoint: Path, file: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizers package prints a token's unknown flags as they are."""
    change(checkpoint / "tokenizer" / file, **values)
    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was read"))
    message = refusal(checkpoint)
    assert f"{checkpoint / 'tokenizer' / file} has" in message
    assert "\x1b" not in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("file", "make"),
    [
        ("added_tokens.json", lambda tokens: {token: 560 + index for index, token in enumerate(tokens)}),
        ("special_tokens_map.json", lambda tokens: {"additional_special_tokens": tokens}),
        ("tokenizer_config.json", lambda tokens: {"extra_special_tokens": tokens}),
        ("tokenizer_config.json", lambda tokens: {"extra_special_tokens": dict(zip(tokens, tokens, strict=True))}),
        (
            "tokenizer_config.json",
            lambda tokens: {
                "added_tokens_decoder": {str(560 + i): {"content": token} for i, token in enumerate(tokens)}
            },
        ),
    ],
)
def test_more_tokens_than_a_bundle_may_have_are_refused_before_transformers_reads_them(
    checkpoint: Path, file: str, make: Callable[[list[str]], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers compares each token with every other: 60,000 take more than half a minute."""
    change(checkpoint / "tokenizer" / file, **make([f"<{index:x}>" for index in range(MAX_ADDED_TOKENS + 1)]))
    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was read"))
    assert f"expected at most {MAX_ADDED_TOKENS:,}" in refusal(checkpoint)


def test_tokens_in_several_files_are_counted_once(checkpoint: Path) -> None:
    """transformers 4 wrote each to two files, one of them with six lines for each token."""
    place = checkpoint / "tokenizer"
    tokens = {f"<a token of a textual inversion, {index:x}>": 560 + index for index in range(MAX_ADDED_TOKENS - 10)}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    (place / "added_tokens.json").write_text(json.dumps(tokens))
    config = {"added_tokens_decoder": {str(index): {"content": token, **flags} for token, index in tokens.items()}}
    (place / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    assert (place / "tokenizer_config.json").stat().st_size > 1 << 20
    settings = read_tokenizer_settings(place)
    assert settings.files["tokenizer_config.json"] == config
    assert settings.files["added_tokens.json"] == tokens


def test_every_form_of_a_token_that_transformers_writes_is_followed(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = checkpoint / "tokenizer"
    token = {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    change(place / "tokenizer_config.json", pad_token={"__type": "AddedToken", **token})
    change(place / "special_tokens_map.json", unk_token={"__type": "AddedToken", **token, "special": True})
    change(place / "added_tokens.json", **{"<cat>": 560})
    change(place / "special_tokens_map.json", additional_special_tokens=["<dog>"], sep_token=None)
    change(checkpoint / "text_encoder" / "config.json", vocab_size=562)
    record = export(checkpoint)
    theirs = CLIPTokenizer.from_pretrained(place)
    capfd.readouterr()
    ours = Tokenizer.from_json((checkpoint / record.file).read_bytes(), record)
    text = "a <cat> and a <dog>"
    assert ours.chunks(text)[0].tolist() == theirs(text, padding="max_length", max_length=77).input_ids
    export(checkpoint)
    assert "unknown" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("section", "direction"),
    [
        (
            {"padding": {"strategy": "BatchLongest", "pad_id": 559, "pad_type_id": 0, "pad_token": "<|endoftext|>"}},
            "Left",
        ),
        ({"truncation": {"max_length": 77, "stride": 0, "strategy": "LongestFirst"}}, "Left"),
    ],
)
def test_a_side_of_tokenizer_json_is_refused(checkpoint: Path, section: dict[str, Any], direction: str) -> None:
    """transformers takes both from there, if `tokenizer_config.json` does not have them."""
    add_tokens(checkpoint)
    change(checkpoint / "tokenizer" / "tokenizer_config.json", padding_side=..., truncation_side=...)
    (name, value), *_ = section.items()
    more = {"pad_to_multiple_of": None} if name == "padding" else {}
    change(checkpoint / "tokenizer" / "tokenizer.json", **{name: {**value, **more, "direction": direction}})
    assert f"{name}_side 'left', expected 'right'" in refusal(checkpoint)
    change(checkpoint / "tokenizer" / "tokenizer_config.json", **{f"{name}_side": "right"})
    export(checkpoint)


HANDLINGS = CONFIG_KEYS["CLIPTokenizer"]


def test_every_key_that_transformers_saves_has_a_handling(checkpoint: Path) -> None:
    """Compare with saved files, and with the options of the classes that read them."""
    tokenizer = add_tokens(checkpoint, "<cat>")
    tokenizer("a star", padding="max_length", max_length=77, truncation=True)
    for _ in range(2):  # a saved tokenizer's file has more keys when it is loaded and saved again
        tokenizer.save_pretrained(checkpoint / "tokenizer")
        tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    saved = json.loads((checkpoint / "tokenizer" / "tokenizer_config.json").read_text())
    read = {
        key
        for owner in (PreTrainedTokenizerBase, PreTrainedTokenizerFast)
        for function in (owner.__init__, owner._from_pretrained, owner.convert_to_native_format)
        for key in re.findall(r'(?:kwargs|configuration)\.(?:pop|get)\("(\w+)"', inspect.getsource(function))
    }
    # Of internal calls; of SentencePiece, whose files are not read; and renamed by this function itself.
    read -= {"_spm_precompiled_charsmap", "tokenizer", "unk_id"}
    assert {*saved} | read | {*inspect.signature(CLIPTokenizer.__init__).parameters} - {"self", "kwargs"} <= {
        *HANDLINGS
    }


# Another value of each key that has no effect.
OTHERS: dict[str, Any] = {
    **dict.fromkeys(("add_bos_token", "add_eos_token"), False),
    **dict.fromkeys(("clean_up_tokenization_spaces", "add_prefix_space", "from_slow", "legacy", "verbose"), True),
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
    **dict.fromkeys(("do_lower_case", "use_fast", "is_local", "local_files_only"), False),
    **dict.fromkeys(("max_length", "stride", "pad_to_multiple_of", "pad_token_type_id"), 5),
    **dict.fromkeys(("errors", "truncation_strategy", "chat_template", "name_or_path", "processor_class"), "another"),
    **dict.fromkeys(("vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file"), "another"),
    **dict.fromkeys(("full_tokenizer_file", "backend", "response_template"), "another"),
    "files_loaded": ["another"],
    "chat_control_tokens": ["another"],
    "response_schema": {"another": 1},
    "auto_map": {"AutoTokenizer": ["another.py", None]},
    "model_input_names": ["input_ids"],
}


def test_a_key_without_effect_has_none_in_transformers(checkpoint: Path) -> None:
    listed = {key for key, handling in HANDLINGS.items() if isinstance(handling, NoEffect)}
    assert {*OTHERS} == listed
    text = ["A red circle <|endoftext|> STARS!! 猫 don't", "star " * 80 + "circle"]
    place = checkpoint / "tokenizer" / "tokenizer_config.json"

    def encode() -> Any:
        """Return ids as diffusers' pipelines make them."""
        tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
        length = tokenizer.model_max_length
        return tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids

    expected, original = encode(), place.read_text()
    for key, value in OTHERS.items():
        change(place, **{key: value})
        assert encode() == expected, key
        export(checkpoint)
        place.write_text(original)


@pytest.mark.parametrize("key", [key for key, handling in HANDLINGS.items() if isinstance(handling, Restricted)])
def test_an_unsupported_setting_is_refused_by_its_key(checkpoint: Path, key: str) -> None:
    place = checkpoint / "tokenizer" / "tokenizer_config.json"
    for value in HANDLINGS[key].values:  # type: ignore[union-attr]
        change(place, **{key: value})
        export(checkpoint)
    change(place, **{key: "left"})
    assert f"tokenizer: its configuration has {key} 'left', expected" in refusal(checkpoint)


def test_a_key_that_no_tokenizer_has_does_not_reach_transformers(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(checkpoint / "tokenizer" / "tokenizer_config.json", **{ESCAPE: 1, "add_prefix_space": True})
    (warning,) = read_tokenizer_settings(checkpoint / "tokenizer").warnings
    assert "'\\x1b]0;title\\x07', which CLIPTokenizer does not have" in warning
    load = CLIPTokenizer.from_pretrained

    def read(folder: Path, *, local_files_only: bool) -> CLIPTokenizer:
        assert not {ESCAPE, "add_prefix_space"} & {*json.loads((Path(folder) / "tokenizer_config.json").read_text())}
        return load(folder, local_files_only=local_files_only)

    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", read)
    export(checkpoint)
