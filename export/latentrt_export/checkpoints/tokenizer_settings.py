"""Reads the settings and added tokens of a tokenizer, which its folder has beside the vocabulary.

transformers hands every key of these files on, and the tokenizers package prints those that it does not know as they
are: a terminal would obey the escapes in them. So only checked keys and tokens reach the two. Importing this needs no
torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.bundle.printable import printable, quote
from latentrt.errors import CheckpointError
from latentrt.text.tokenizer_json import MAX_ADDED_TOKENS, MAX_TOKEN_CHARACTERS
from latentrt_export.checkpoints.config_keys import CONFIG_KEYS, Honoured, Restricted, check_keys
from latentrt_export.checkpoints.json_file import read_object

__all__ = ["SETTINGS_FILES", "TokenizerSettings", "read_tokenizer_settings"]

_CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_ADDED = "added_tokens.json"
SETTINGS_FILES = (_CONFIG, _SPECIAL, _ADDED)
_MAX_BYTES = 4 << 20  # of a file with `MAX_ADDED_TOKENS` tokens, each with its flags
_DECODER = "added_tokens_decoder"
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# The form of a token with flags.
_TYPE, _CONTENT = "__type", "content"
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """The settings and added tokens of a tokenizer.

    Attributes:
        files: name → content, of the files that exist, without unknown keys, keys that have no effect, and the type
            of a token where transformers takes it for an unknown flag.
        warnings: one for the keys that a tokenizer does not have.
    """

    files: Mapping[str, Mapping[str, Any]]
    warnings: tuple[str, ...]


def read_tokenizer_settings(folder: Path) -> TokenizerSettings:
    """Read `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`, each if it exists.

    Args:
        folder: the tokenizer's folder; its name is the component's in messages.

    Raises:
        CheckpointError: a file is damaged, has a setting that is not supported or a token of another form, or there are
            more than `MAX_ADDED_TOKENS` tokens, each of which transformers compares with every other.
    """
    names = [name for name in SETTINGS_FILES if (folder / name).is_file()]
    files = {name: read_object(folder / name, _MAX_BYTES) for name in names}
    config, special, added = (files.get(name, {}) for name in (_CONFIG, _SPECIAL, _ADDED))
    warnings = tuple(check_keys(folder.name, "CLIPTokenizer", config))
    _check_special_keys(folder / _SPECIAL, special)
    tokens = [
        *_list_tokens(folder / _CONFIG, config),
        *_list_tokens(folder / _SPECIAL, special),
        *_list_added(folder / _ADDED, added),
    ]
    contents = {_check_token(place, token) for place, token in tokens}
    if len(contents) > MAX_ADDED_TOKENS:
        raise CheckpointError(
            f"{folder} has {len(contents):,} tokens in {', '.join(names)}, expected at most {MAX_ADDED_TOKENS:,} "
            "beside the vocabulary; remove some from the tokenizer"
        )
    followed = {_CONFIG: _select_settings(config), _SPECIAL: _drop_types(special), _ADDED: added}
    return TokenizerSettings(files={name: followed[name] for name in names}, warnings=warnings)


def _check_special_keys(path: Path, special: Mapping[str, Any]) -> None:
    """Check that `special_tokens_map.json` has only the special tokens of CLIP.

    Raises:
        CheckpointError: it has another key.
    """
    for key in special:
        if key not in (*_NAMED, *_LISTS):
            raise CheckpointError(f"{path} has {quote(key)}, expected only {', '.join((*_NAMED, *_LISTS))}; remove it")


def _list_added(path: Path, added: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield every token of `added_tokens.json` with its place, for messages.

    Raises:
        CheckpointError: a token has no id.
    """
    for token, index in added.items():
        if type(index) is not int:
            raise CheckpointError(f"{path} has {quote(token)}: {quote(index)}, expected the token's id")
        yield f"{path} has", token


def _list_tokens(path: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield every token of a file with its place, for messages; also the name of a special token that has its own.

    Raises:
        CheckpointError: a key that has tokens has a value of another form, or is of no special token of CLIP.
    """
    for key, value in config.items():
        place = f"{path} has {printable(key[:60])}"
        if value is None:
            continue
        if key in _NAMED:
            yield place, value
        elif key == _DECODER and isinstance(value, dict):
            for index, token in value.items():
                if not (index.isascii() and index.isdecimal() and len(index) < 20 and isinstance(token, dict)):
                    raise CheckpointError(f"{place} with {quote(index)}: {quote(token)}, expected an id and a token")
                yield place, token
        elif key in _LISTS and isinstance(value, list):
            yield from ((place, token) for token in value)
        elif key in _LISTS and isinstance(value, dict):
            for name, token in value.items():
                _check_token(f"{place} with the name", name)
                yield place, token
        elif key in (_DECODER, *_LISTS):
            raise CheckpointError(f"{place} {quote(value)}, expected tokens; correct it")
        elif key.endswith("_token") and key not in CONFIG_KEYS["CLIPTokenizer"]:
            raise CheckpointError(
                f"{place} {quote(value)}, expected special tokens {', '.join(_NAMED)} only; remove it"
            )


def _check_token(place: str, token: object) -> str:
    """Return the content of a token, which is a text, or a text with flags.

    Raises:
        CheckpointError: it is neither, or is longer than `MAX_TOKEN_CHARACTERS`.
    """
    content = token
    if isinstance(token, dict):
        for key, value in token.items():
            if key == _TYPE and value == "AddedToken":
                continue
            if key not in (_CONTENT, *_FLAGS) or (key in _FLAGS and not isinstance(value, bool)):
                raise CheckpointError(
                    f"{place} a token with {quote(key)}: {quote(value)}, expected {_CONTENT}, a text, and true or "
                    f"false for {', '.join(_FLAGS)}; correct it"
                )
        content = token.get(_CONTENT)
    if not isinstance(content, str) or not 0 < len(content) <= MAX_TOKEN_CHARACTERS:
        raise CheckpointError(
            f"{place} the token {quote(content)}, expected a text of 1 to {MAX_TOKEN_CHARACTERS} characters; correct it"
        )
    return content


def _select_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a tokenizer follows."""
    handlings = CONFIG_KEYS["CLIPTokenizer"]
    selected = {key: value for key, value in config.items() if isinstance(handlings.get(key), Honoured | Restricted)}
    if isinstance(selected.get(_DECODER), dict):
        selected[_DECODER] = _drop_types(selected[_DECODER])
    return selected


def _drop_types(tokens: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokens without their types, which transformers takes for unknown flags in these places."""
    return {
        key: {name: each for name, each in token.items() if name != _TYPE} if isinstance(token, dict) else token
        for key, token in tokens.items()
    }
