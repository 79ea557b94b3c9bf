"""Reads the settings and further words of a tokenizer, which its folder has beside the vocabulary.

transformers hands every key of these files on, and the tokenizers package prints those that it does not know as they
are: a terminal would obey the escapes in them. So only checked keys and words reach the two. Importing this needs no
torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.bundle.printable import counted, printable, quote
from latentrt.errors import CheckpointError
from latentrt.text.tokenizer_json import MAX_ADDED_TOKENS, MAX_TOKEN_CHARACTERS
from latentrt_export.checkpoints.config_keys import CONFIG_KEYS, Honoured, Restricted, check_keys
from latentrt_export.checkpoints.json_file import read_object

__all__ = ["TokenizerSettings", "read_tokenizer_settings"]

_CONFIG, _SPECIAL, _ADDED = _FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_DECODER = "added_tokens_decoder"
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# The form of a word that has settings of its own, which are flags.
_TYPE, _CONTENT = "__type", "content"
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """The settings and further words of a tokenizer.

    Attributes:
        files: name → content, of the files that there are, without the keys that have no effect.
        warnings: one for the keys that a tokenizer does not have.
    """

    files: Mapping[str, Mapping[str, Any]]
    warnings: tuple[str, ...]


def read_tokenizer_settings(folder: Path) -> TokenizerSettings:
    """Read `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`, as far as there are these.

    Args:
        folder: the tokenizer's folder; its name is the component's in messages.

    Raises:
        CheckpointError: a file is damaged, has a setting that is not supported or a word of another form, or there are
            more than `MAX_ADDED_TOKENS` words, each of which transformers compares with every other.
    """
    files = {name: read_object(folder / name) for name in _FILES if (folder / name).is_file()}
    config, special, added = (files.get(name, {}) for name in _FILES)
    warnings = tuple(check_keys(folder.name, "CLIPTokenizer", config))
    words = [
        *_list_words(folder / _CONFIG, config),
        *_list_words(folder / _SPECIAL, special),
        *((f"{folder / _ADDED} has", word) for word in added),
    ]
    if len(words) > MAX_ADDED_TOKENS:
        raise CheckpointError(
            f"{folder} has {counted(len(words), 'word')} in {', '.join(files)}, expected at most "
            f"{MAX_ADDED_TOKENS:,} beside the vocabulary; remove some from the tokenizer"
        )
    for place, word in words:
        _check_word(place, word)
    for word, index in added.items():
        if type(index) is not int:
            raise CheckpointError(f"{folder / _ADDED} has {quote(word)}: {quote(index)}, expected the word's id")
    for key in special:
        if key not in (*_NAMED, *_LISTS):
            raise CheckpointError(
                f"{folder / _SPECIAL} has {quote(key)}, expected only {', '.join((*_NAMED, *_LISTS))}; remove it"
            )
    handlings = CONFIG_KEYS["CLIPTokenizer"]
    if _CONFIG in files:
        files[_CONFIG] = {
            key: value for key, value in config.items() if isinstance(handlings.get(key), Honoured | Restricted)
        }
    # In these two places transformers takes a word's type for an unknown setting of it.
    for word in (*(config.get(_DECODER) or {}).values(), *special.values()):
        if isinstance(word, dict):
            word.pop(_TYPE, None)
    return TokenizerSettings(files=files, warnings=warnings)


def _list_words(path: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield every word of a file with its place, for messages.

    Raises:
        CheckpointError: a key that has words has a value of another form, or is of no special word of CLIP's.
    """
    for key, value in config.items():
        place = f"{path} has {printable(key[:60])}"
        if value is None:
            continue
        if key in _NAMED:
            yield place, value
        elif key == _DECODER and isinstance(value, dict):
            for index, word in value.items():
                if not (index.isascii() and index.isdecimal() and len(index) < 20 and isinstance(word, dict)):
                    raise CheckpointError(f"{place} with {quote(index)}: {quote(word)}, expected an id and a word")
                yield place, word
        elif key in _LISTS and isinstance(value, list | dict):
            yield from ((place, word) for word in (value.values() if isinstance(value, dict) else value))
        elif key in (_DECODER, *_LISTS):
            raise CheckpointError(f"{place} {quote(value)}, expected words; correct it")
        elif key.endswith("_token") and key not in CONFIG_KEYS["CLIPTokenizer"]:
            raise CheckpointError(f"{place} {quote(value)}, expected special words {', '.join(_NAMED)} only; remove it")


def _check_word(place: str, word: object) -> None:
    """Check that a word is a text, or a text with flags.

    Raises:
        CheckpointError: it is not, or is longer than `MAX_TOKEN_CHARACTERS`.
    """
    if isinstance(word, dict):
        for key, value in word.items():
            if key == _TYPE and value == "AddedToken":
                continue
            if key not in (_CONTENT, *_FLAGS) or (key in _FLAGS and not isinstance(value, bool)):
                raise CheckpointError(
                    f"{place} a word with {quote(key)}: {quote(value)}, expected {_CONTENT}, a text, and true or false "
                    f"for {', '.join(_FLAGS)}; correct it"
                )
        word = word.get(_CONTENT)
    if not isinstance(word, str) or not 0 < len(word) <= MAX_TOKEN_CHARACTERS:
        raise CheckpointError(
            f"{place} the word {quote(word)}, expected a text of 1 to {MAX_TOKEN_CHARACTERS} characters; correct it"
        )
