"""The classes of all commands: help pages, sources of values, and errors that name what was typed."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from latentrt.cli import main as cli
from latentrt.cli.command import Command, Group, Settings, argument, command, option, settings
from latentrt.cli.config import list_commands
from latentrt.cli.request_options import request_options
from latentrt.cli.values import KeyValue
from latentrt.errors import RequestError
from tests.runtime.cli.conftest import Caller

Given = dict[str, Any]


def root() -> click.Context:
    return click.Context(cli._group, info_name="latentrt")


COMMANDS = {" ".join(context.command_path.split()[1:]): found for context, found in list_commands(root(), every=True)}


@pytest.fixture(autouse=True)
def _no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platformdirs.user_config_path", lambda *_, **__: tmp_path)


@pytest.fixture
def made_up(latentrt: Caller, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that calls `latentrt made-up` and returns what its function was given, or the error."""
    given: Given = {}

    @command("made-up", examples=("latentrt made-up FILE",))
    @argument("file")
    @request_options("width", "height", "num_inference_steps")
    @option("--name", type=click.Choice(["red", "green"]), group="Colours")
    @option("--pair", "pairs", type=KeyValue(), multiple=True, group="Colours")
    @option("--shiny/--no-shiny", default=None, group="Colours")
    @option("--share", type=click.FloatRange(0, 1), default=0.5, group="Colours", help="A share.")
    def function(**values: Any) -> None:
        given.update(values, settings=settings())
        if values["file"] == "fail":
            raise RequestError("`width`: got 0; `num_inference_steps`: got 0; `shiny=False`")

    monkeypatch.setattr(cli, "made_up", function, raising=False)
    monkeypatch.setitem(cli._COMMANDS, "made-up", ("latentrt.cli.main:made_up", "Nothing."))

    def call(*arguments: str, **settled: Any) -> Any:
        given.clear()
        done = latentrt("made-up", *arguments)
        assert done.out == ""
        return dict(given) if done.code == 0 else (done.code, done.err.removeprefix("error: ").rstrip())

    return call


# Every command.


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_parse(name: str) -> None:
    found = COMMANDS[name]
    assert 1 <= len(found.examples) <= 6
    for line in found.examples:
        if line.startswith(("eval ", "mkdir ")):
            continue
        words = shlex.split(line.partition(" > ")[0], comments=True)
        assert words[: 1 + len(name.split())] == ["latentrt", *name.split()]
        found.make_context(name, words[1 + len(name.split()) :], parent=root())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_common_options(name: str) -> None:
    flags = {flag for each in COMMANDS[name].params for flag in each.opts}
    assert {"--json", "-v", "--verbose", "-q", "--quiet", "--log-level", "--debug"} <= flags


@pytest.mark.parametrize("name", COMMANDS)
def test_every_size_is_given_alike(name: str) -> None:
    flags = {flag for each in COMMANDS[name].params for flag in each.opts}
    sized = {"-W", "--width", "-H", "--height", "--size"}
    assert not flags & sized or sized <= flags


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_variable_and_a_help(name: str) -> None:
    prefix = f"LATENTRT_{name.upper().replace(' ', '_').replace('-', '_')}_"
    for each in COMMANDS[name].params:
        if isinstance(each, click.Option):
            assert each.envvar is not None
            assert each.envvar[0].startswith(prefix)
            assert each.help
    assert cli._COMMANDS.keys() >= {name.split()[0]}


def test_the_help_page_has_groups_defaults_and_examples(latentrt: Caller, made_up: Callable[..., Any]) -> None:
    page = latentrt("made-up", "--help").out
    headings = [line for line in page.splitlines() if re.fullmatch(r"[A-Z][a-z ]+:", line)]
    assert headings == ["Image size:", "Sampling:", "Colours:", "Common options:", "Examples:"]
    assert "\n  latentrt made-up FILE\n" in page
    assert "A share.  [default: 0.5; 0<=x<=1]" in page
    assert "--width: LATENTRT_MADE_UP_WIDTH" in " ".join(page.split())


def test_the_main_help_is_in_groups(latentrt: Caller) -> None:
    page = latentrt("--help").out
    for heading in cli._SECTIONS:
        assert f"\n{heading}:\n" in page
    assert "latentrt COMMAND --help" in page
    assert "\n  latentrt demo\n" in page


# Where a value comes from.


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    made_up: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert made_up("a")["num_inference_steps"] is None
    (tmp_path / "config.toml").write_text("[made-up]\nsteps = 3\nname = 'red'\n")
    assert made_up("a")["num_inference_steps"] == 3
    monkeypatch.setenv("LATENTRT_MADE_UP_STEPS", "4")
    assert made_up("a")["num_inference_steps"] == 4
    assert made_up("a")["name"] == "red"
    assert made_up("a", "--steps", "5")["num_inference_steps"] == 5
    monkeypatch.setenv("LATENTRT_MADE_UP_STEPS", "")
    assert made_up("a")["num_inference_steps"] == 3


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("pair = { a = 1, b = 'x' }", {"pairs": (("a", 1), ("b", "x"))}),
        ("pair = ['a=1']", {"pairs": (("a", 1),)}),
        ("pair = 'a=1'", {"pairs": (("a", 1),)}),
        ("shiny = false", {"shiny": False}),
        ("share = 0.25", {"share": 0.25}),
        ("size = '64x32'", {"width": 64, "height": 32}),
        ("size = 64", {"width": 64, "height": 64}),
        ("steps = ''", {"num_inference_steps": None}),
        ("quiet = true", {"settings": Settings(quiet=True)}),
        ("log_level = 'info'", {"settings": Settings(log_level="info")}),
    ],
)
def test_values_of_the_file(made_up: Callable[..., Any], tmp_path: Path, text: str, values: Given) -> None:
    (tmp_path / "config.toml").write_text(f"[made-up]\n{text}\n")
    assert made_up("a").items() >= values.items()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[made-pu]\n", "got the table [made-pu], expected that of a command; did you mean made-up?"),
        ("steps = 3\n", "got 'steps' outside of a table, expected it in the table of a command"),
        ("made-up = 3\n", "got 3 as made-up, expected a table: [made-up]"),
        (
            "[made-up]\nstpes = 3\n",
            "stpes in [made-up] of FILE: got an unknown key, expected an option's name; did you mean",
        ),
        ("[made-up]\nsteps = 'x'\n", "steps in [made-up] of FILE: got 'x', expected a whole number"),
        ("[made-up]\nsteps = 2.5\n", "steps in [made-up] of FILE: got '2.5', expected a whole number"),
        ("[made-up]\nsteps = true\n", "steps in [made-up] of FILE: got True, expected a text or a number"),
        ("[made-up]\nsteps = [1]\n", "steps in [made-up] of FILE: got [1], expected a text or a number"),
        ("[made-up]\nsteps = 2020-01-01\n", "expected a text or a number"),
        (f"[made-up]\nsteps = 0x{'f' * 20_000}\n", "expected a text or a number"),
        ("[made-up]\nshiny = 'yes'\n", "shiny in [made-up] of FILE: got 'yes', expected true or false"),
        ("[made-up]\nname = 'blue'\n", "name in [made-up] of FILE: got 'blue', expected one of red, green"),
        (
            "[made-up]\nwidth = 8\nsize = 8\n",
            "got size in [made-up] of FILE and width in [made-up] of FILE, expected one",
        ),
        ("[made-up\n", "FILE is not TOML: "),
        ("a = " + "[" * 30_000, "FILE is not TOML: its values are nested too deeply"),
        ("\udcff", "FILE is not TOML: "),
        ("#" * 33_000, "FILE is larger than 32,768 bytes"),
        ("[made-up]\nlog-level = 'info'\nlog_level = 'debug'\n", "got the same option as log-level, expected one"),
        (f"[made-up]\npair = {{ a = 0x{'f' * 5000} }}\n", "a of pair in [made-up] of FILE: got a value of type int"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_the_table_and_the_key(
    made_up: Callable[..., Any], tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text, errors="surrogateescape")
    code, message = made_up("a")
    assert code == 2
    assert says.replace("FILE", str(path)) in message
    assert str(path) in message


def test_help_is_there_whatever_the_file(latentrt: Caller, made_up: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[[[")
    assert latentrt("made-up", "--help").code == 0


def test_a_file_that_does_not_exist_is_refused_only_if_it_was_named(
    made_up: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert made_up("a")["file"] == "a"
    monkeypatch.setenv("LATENTRT_CONFIG", str(tmp_path / "other.toml"))
    code, message = made_up("a")
    assert code == 2
    assert f"{tmp_path / 'other.toml'}, which LATENTRT_CONFIG names, cannot be read" in message
    (tmp_path / "other.toml").write_text("[made-up]\nsteps = 8")
    assert made_up("a")["num_inference_steps"] == 8


def test_verbose_says_what_the_environment_and_the_file_set(
    latentrt: Caller, made_up: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text("[made-up]\nsteps = 3\n")
    monkeypatch.setenv("LATENTRT_MADE_UP_NAME", "red")
    assert latentrt("made-up", "a", "-v").err.splitlines() == [
        f"--steps is set by steps in [made-up] of {tmp_path / 'config.toml'}",
        "--name is set by LATENTRT_MADE_UP_NAME",
    ]


def test_a_variable_of_no_option_is_a_warning(
    made_up: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LATENTRT_MADE_UP_STPES", "4")
    made_up("a")
    assert caplog.messages == [
        "the environment variable LATENTRT_MADE_UP_STPES is that of no option; did you mean LATENTRT_MADE_UP_STEPS?"
    ]


# Errors name what was typed.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("fail", "-W", "8", "--no-shiny"), "-W: got 0; --steps: got 0; --no-shiny"),
        (("fail", "-W8", "--steps", "3"), "-W: got 0; --steps: got 0; --no-shiny"),
        (("fail", "--width=8"), "--width: got 0; --steps: got 0; --no-shiny"),
        (("fail", "--size", "8x8"), "--size: got 0; --steps: got 0; --no-shiny"),
        (("fail",), "--width: got 0; --steps: got 0; --no-shiny"),
        (("a", "-W", "x"), "-W: got 'x', expected a whole number"),
        (("a", "--steps", "-W"), "--steps: got '-W', expected a whole number"),
        (("a", "--name", "Red"), "--name: got 'Red', expected one of red, green; did you mean red?"),
        (("a", "--share", "2"), "--share: got '2', expected a number from 0 to 1"),
        (("a", "--pair", "a=1", "--pair", "b"), "--pair: got 'b', expected NAME=VALUE, such as solver_order=3"),
        (("a", "--shiny=1"), "--shiny: got a value, expected none"),
        (("a", "--name"), "--name: got no value, expected one of red, green"),
        (("a", "b"), "got 'b' as well, expected FILE only; quote a text that has spaces"),
        ((), "FILE is missing, as in: latentrt made-up FILE"),
    ],
)
def test_errors_name_the_option_as_it_was_typed(
    made_up: Callable[..., Any], arguments: tuple[str, ...], says: str
) -> None:
    assert made_up(*arguments) == (2, says)


def test_errors_name_the_variable_and_the_key(
    made_up: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text("[made-up]\nsteps = 3")
    monkeypatch.setenv("LATENTRT_MADE_UP_SIZE", "64")
    expected = f"LATENTRT_MADE_UP_SIZE: got 0; steps in [made-up] of {tmp_path / 'config.toml'}: got 0; --no-shiny"
    assert made_up("fail") == (2, expected)
    monkeypatch.setenv("LATENTRT_MADE_UP_SHINY", "maybe")
    assert made_up("fail") == (2, "LATENTRT_MADE_UP_SHINY: got 'maybe', expected true or false")


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        (("--size", "64x32"), (64, 32)),
        (("--size", "64×32"), (64, 32)),
        (("--size", "64"), (64, 64)),
        (("-W", "64", "-H", "32"), (64, 32)),
        (("-W", "64"), (64, None)),
    ],
)
def test_a_size(made_up: Callable[..., Any], arguments: tuple[str, ...], size: tuple[int, int]) -> None:
    given = made_up("a", *arguments)
    assert (given["width"], given["height"]) == size


def test_the_nearest_size_wins(made_up: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_MADE_UP_SIZE", "64x32")
    assert (made_up("a", "-W", "8")["width"], made_up("a", "-W", "8")["height"]) == (8, 32)
    monkeypatch.delenv("LATENTRT_MADE_UP_SIZE")
    monkeypatch.setenv("LATENTRT_MADE_UP_WIDTH", "64")
    assert made_up("a", "--size", "16")["width"] == 16


# The common options.


@pytest.mark.parametrize(
    ("arguments", "level", "made"),
    [
        ((), logging.WARNING, Settings()),
        (("-v",), logging.INFO, Settings(verbosity=1)),
        (("-vv",), logging.DEBUG, Settings(verbosity=2)),
        (("-q",), logging.WARNING, Settings(quiet=True)),
        (("--log-level", "info", "--json"), logging.INFO, Settings(log_level="info", json=True)),
    ],
)
def test_the_settings_of_a_command(
    made_up: Callable[..., Any], arguments: tuple[str, ...], level: int, made: Settings
) -> None:
    given = made_up("a", *arguments)["settings"]
    assert given == made
    assert given.level == level
    assert settings() == Settings(), "outside of a command"


def test_quiet_and_verbose_are_named_as_they_were_set(
    made_up: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made_up("a", "-q", "-v") == (2, "got -q and -v, expected one of the two")
    monkeypatch.setenv("LATENTRT_QUIET", "1")
    assert made_up("a", "-v") == (2, "got LATENTRT_QUIET and -v, expected one of the two")


def test_a_file_of_a_windows_editor(made_up: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("\ufeff[made-up]\nsteps = 3\n", encoding="utf-8")
    assert made_up("a")["num_inference_steps"] == 3


def test_a_level_for_all_commands(made_up: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_LOG_LEVEL", "debug")
    assert made_up("a")["settings"].log_level == "debug"
    monkeypatch.setenv("LATENTRT_MADE_UP_LOG_LEVEL", "info")
    assert made_up("a")["settings"].log_level == "info"


@pytest.fixture
def logging_command(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    @command("made-up", examples=())
    def function() -> None:
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger("latentrt.some.module").log(level, "at %s", level)
        logging.getLogger("other").info("of another library")

    monkeypatch.setattr(cli, "made_up", function, raising=False)
    monkeypatch.setitem(cli._COMMANDS, "made-up", ("latentrt.cli.main:made_up", "Nothing."))
    before = logging.getLogger("latentrt").level
    yield
    assert logging.getLogger("latentrt").level == before


@pytest.mark.usefixtures("logging_command")
@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ((), ["30", "40"]),
        (("-q",), ["30", "40"]),
        (("--log-level", "error"), ["40"]),
        (("-v",), ["20", "30", "40"]),
        (("-vv",), None),
    ],
)
def test_logs_go_to_stderr_from_the_level_on(
    latentrt: Caller, arguments: tuple[str, ...], lines: list[str] | None
) -> None:
    done = latentrt("made-up", *arguments)
    assert done.out == ""
    assert done.err.splitlines() == [f"at {each}" for each in lines or ("10", "20", "30", "40")]


def test_a_group_without_a_command_prints_its_help(latentrt: Caller) -> None:
    done = latentrt("engines")
    assert (done.code, done.err) == (0, "")
    assert "Commands:" in done.out
    assert latentrt("engines", "lsit").err == (
        "error: got 'lsit', expected a command of latentrt engines; did you mean list?\n"
    )


def test_names_of_other_tools_lead_to_the_option(latentrt: Caller) -> None:
    for typed, meant in (("--cfg", "--guidance-scale"), ("--denoising-strength", "--strength")):
        assert latentrt("run", "sample", "a", typed, "1").err.endswith(f"did you mean {meant}?\n")


def test_commands_of_a_group_have_variables_of_their_own() -> None:
    group = Group("tools")

    @group.command("grind", examples=())
    @option("--grain")
    def grind(grain: str | None) -> None: ...

    assert isinstance(grind, Command)
    assert grind.params[0].envvar == ["LATENTRT_TOOLS_GRIND_GRAIN"]
