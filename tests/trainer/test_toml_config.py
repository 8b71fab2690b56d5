"""The strict TOML loader: what it accepts, which key and value an error names, and that its dump loads again."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from farspan.errors import ConfigError
from farspan.trainer.toml_config import bounded, from_tree, load_config, to_toml

Option = int | float | bool | str


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    folder: Path = Path("runs")
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Attention:
    mechanism: Literal["dense", "window", "mosa"] = "dense"
    options: dict[str, Option] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Moe:
    experts: int = bounded(minimum=2)
    router: Literal["topk", "choice"] | None = None
    taps: Literal[0, 1, 3] = 0


@dataclass(frozen=True, kw_only=True)
class Phase:
    tokens: int
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = bounded(100, minimum=1)
    lr: float = bounded(3e-4, above=0)
    clip: float | None = bounded(1.0, minimum=0, maximum=float("inf"))
    betas: tuple[float, float] = bounded((0.9, 0.95), minimum=0, maximum=1)
    compile: bool = False
    accumulate: int | Literal["auto"] = "auto"
    spans: tuple[int, ...] = field(default=(), metadata={"exclusive_minimum": 0})
    suffixes: tuple[str, ...] = (".py",)
    phases: tuple[Phase, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    run: Run
    seed: int = 0
    attention: Attention = field(default_factory=Attention)
    train: Train = field(default_factory=Train)
    moe: Moe | None = None


@pytest.fixture
def load(tmp_path):
    def read(text: str, *overrides: str) -> Config:
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        return load_config(Config, path, overrides)

    return read


BASE = '[run]\nname = "demo"\n'


def test_defaults_and_every_type_load(load):
    text = """
seed = 7
[run]
name = "demo"
folder = "out/here"
[attention]
mechanism = "mosa"
options = {window = 1_024, scale = 0.5, sinks = true, kind = "a"}
[attention.extras]
nested = {deep = [1, 2]}
[train]
lr = 1
clip = "none"
betas = [0, 0.5]
accumulate = 4
spans = [1, 2]
phases = [{tokens = 5}, {tokens = 6, weight = 2}]
[moe]
experts = 8
"""
    config = load(text)
    assert config == Config(
        run=Run(name="demo", folder=Path("out/here")),
        seed=7,
        attention=Attention(
            mechanism="mosa",
            options={"window": 1024, "scale": 0.5, "sinks": True, "kind": "a"},
            extras={"nested": {"deep": [1, 2]}},
        ),
        train=Train(
            lr=1.0,
            clip=None,
            betas=(0.0, 0.5),
            accumulate=4,
            spans=(1, 2),
            phases=(Phase(tokens=5), Phase(tokens=6, weight=2.0)),
        ),
        moe=Moe(experts=8),
    )
    assert type(config.train.lr) is float
    assert type(config.train.betas[0]) is float
    assert load(BASE) == Config(run=Run(name="demo"))


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("seed=1_000", lambda c: c.seed, 1000),
        ("seed=0x10", lambda c: c.seed, 16),
        ("train.lr=3e-4", lambda c: c.train.lr, 3e-4),
        ("train.lr=2", lambda c: c.train.lr, 2.0),
        ("train.clip=none", lambda c: c.train.clip, None),
        ("train.compile=true", lambda c: c.train.compile, True),
        ("train.accumulate=8", lambda c: c.train.accumulate, 8),
        ("train.accumulate=auto", lambda c: c.train.accumulate, "auto"),
        ("train.spans=[1,2]", lambda c: c.train.spans, (1, 2)),
        ("train.spans=[]", lambda c: c.train.spans, ()),
        ('train.suffixes=[".py", ".md"]', lambda c: c.train.suffixes, (".py", ".md")),
        ("run.name=demo", lambda c: c.run.name, "demo"),
        ("run.name=2026-11-22", lambda c: c.run.name, "2026-11-22"),
        ("run.name=123", lambda c: c.run.name, "123"),
        ("run.name=true", lambda c: c.run.name, "true"),
        ("run.name=", lambda c: c.run.name, ""),
        ("run.name=a=b", lambda c: c.run.name, "a=b"),
        ('run.name="quoted"', lambda c: c.run.name, "quoted"),
        ("run.name=1\nseed = 2", lambda c: (c.run.name, c.seed), ("1\nseed = 2", 0)),
        ("run.folder=/data/x", lambda c: c.run.folder, Path("/data/x")),
        ("run.note=none", lambda c: c.run.note, None),
        ("attention.mechanism=window", lambda c: c.attention.mechanism, "window"),
        ("attention.options.window=1024", lambda c: c.attention.options, {"window": 1024}),
        ("attention.options.scale=1e-2", lambda c: c.attention.options, {"scale": 0.01}),
        ("attention.options.kind=fast", lambda c: c.attention.options, {"kind": "fast"}),
        ("attention.options.day=2026-11-22", lambda c: c.attention.options, {"day": "2026-11-22"}),
        ("attention.extras.a.b=[1]", lambda c: c.attention.extras, {"a": {"b": [1]}}),
        ("moe.experts=4", lambda c: c.moe, Moe(experts=4)),
        ("moe={experts = 4, router = 'choice'}", lambda c: c.moe, Moe(experts=4, router="choice")),
        (" seed = 5 ", lambda c: c.seed, 5),
    ],
)
def test_override_is_typed_by_its_field(load, override, read, expected):
    value = read(load(BASE, override))
    assert value == expected
    assert type(value) is type(expected)


def test_overrides_win_over_the_file_and_over_earlier_ones(load):
    text = BASE + '[train]\nsteps = "wrong"\n'
    assert load(text, "train.steps=3", "train.steps=4").train.steps == 4


def assert_ends_with(refused: pytest.ExceptionInfo[ConfigError], message: str) -> None:
    """A fragment without its final dot is anywhere in the sentence."""
    assert message in str(refused.value)
    assert not message.endswith(".") or str(refused.value).endswith(message)


KEYS = "choose one of run, seed, attention, train, moe."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = 1", f"seeds=1 is not a known key; {KEYS} Did you mean 'seed'?"),
        ("[train]\nstepz = 5", "train.stepz=5 is not a known key; choose one of steps, lr, clip,"),
        ("[train]\nstepz = 5", "Did you mean 'steps'?"),
        ("seed = true", "seed=true must be an integer."),
        ("seed = 1.0", "seed=1.0 must"),
        ('seed = "1"', 'seed="1" must'),
        ("seed = 2026-11-22", "seed=2026-11-22 must"),
        ("[train]\nlr = true", "train.lr=true must be a number."),
        (f"[train]\nlr = 1{'0' * 400}", "must be a number."),
        ("[train]\ncompile = 1", "train.compile=1 must be true or false."),
        ('[train]\nclip = "off"', 'train.clip="off" must be a number or none.'),
        ("[train]\naccumulate = 1.5", "train.accumulate=1.5 must be an integer or one of 'auto'."),
        ("[train]\nspans = 5", "train.spans=5 must be a list in which each item is an integer."),
        ("[train]\nspans = [1, true]", "train.spans[1]=true must be an integer."),
        ("[train]\nspans = [1, 0]", "train.spans[1]=0 must be greater than 0."),
        ("[train]\nbetas = [0.9]", "train.betas=[0.9] must be a list of exactly 2 values."),
        ("[train]\nbetas = [0.9, 1.5]", "train.betas[1]=1.5 must be at most 1."),
        ("[train]\nphases = [{weight = 1}]", "train.phases[0].tokens is missing;"),
        ("[train]\nphases = [{tokens = 1, weigth = 1}]", "Did you mean 'weight'?"),
        ("[train]\nsteps = 0", "train.steps=0 must be at least 1."),
        ("[train]\nlr = 0", "train.lr=0.0 must be greater than 0."),
        ("[train]\nlr = nan", "train.lr=nan must be finite."),
        ("[train]\nlr = inf", "train.lr=inf must be finite."),
        ("seed = 9223372036854775808", "seed=9223372036854775808 must fit in 64 bits."),
        ("[train]\nclip = -0.5", "train.clip=-0.5 must be at least 0."),
        ("[moe]\nexperts = 1", "moe.experts=1 must be at least 2."),
        ("[moe]", "moe.experts is missing; write it in the file, or add moe.experts=VALUE with an integer."),
        ("[moe]\ntaps = false", "moe.taps=false must be one of 0, 1, 3."),
        ("[moe]\ntaps = true", "moe.taps=true must be one of 0, 1, 3."),
        ("[moe]\ntaps = 3.0", "moe.taps=3.0 must be one of 0, 1, 3."),
        ("[moe]\ntaps = 2", "moe.taps=2 must be one of 0, 1, 3."),
        ("moe = 3", "moe=3 must be a section; write [moe] with its keys below it."),
        ("train = 3", "train=3 must be a section; write [train]"),
        ("[[train]]\nsteps = 3", "train=[{steps = 3}] must be a section;"),
        ("[attention]\noptions = 3", "attention.options=3 must be a section; write [attention.options]"),
        ('[attention]\nmechanism = "dens"', "attention.mechanism=\"dens\" must be one of 'dense', 'window', 'mosa'."),
        (
            "[attention.options]\na = [1]",
            "attention.options.a=[1] must be an integer or a number or true or false or a",
        ),
        ("[attention.extras]\na = 2026-11-22", "attention.extras.a=2026-11-22 must be a number, a string,"),
        (f'seed = "{"x" * 500}"', f'seed="{"x" * 59}… must be an integer.'),
    ],
)
def test_refuses_a_bad_value_by_name(load, text, message):
    before, brace, after = text.partition("[")
    with pytest.raises(ConfigError) as refused:
        load(before + "\n" + BASE + brace + after if brace else text + "\n" + BASE)
    assert_ends_with(refused, message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "Override 'seed' has no key and value; write it as section.key=value."),
        ("=5", "Override '=5' has no"),
        ("train..steps=5", "Override 'train..steps=5' has no"),
        ("--seed 5", "Override '--seed 5' has no"),
        ("sed=5", f"sed=5 is not a known key; {KEYS} Did you mean 'seed'?"),
        ("train.stepz=5", "Did you mean 'steps'?"),
        ("trian.steps=5", f"trian.steps=5 is not a known key; {KEYS} Did you mean 'train'?"),
        ("train.steps=1e3", "train.steps=1000.0 must be an integer."),
        ("train.steps=many", 'train.steps="many" must'),
        ("train.steps=none", 'train.steps="none" must'),
        ("train.steps=", 'train.steps="" must'),
        ("train.steps=0", "train.steps=0 must be at least 1."),
        ("train.compile=True", 'train.compile="True" must be true or false.'),
        ("train.suffixes=[py]", 'train.suffixes="[py]" must be a list'),
        ("train.steps.x=1", "train.steps.x=1 is inside train.steps, which is an integer; set train.steps itself."),
        ("attention.options.a.b=1", "attention.options.a.b=1 is inside attention.options.a, which is an integer or"),
        ("run.folder=", 'run.folder="" must be a path.'),
        ('run.folder=""', 'run.folder="" must be a path.'),
        ("steps=5", f"steps=5 is not a known key; {KEYS} Did you mean 'train.steps'?"),
        ("train=5", "train=5 must be a section; write [train]"),
        ("moe.router=choise", "moe.router=\"choise\" must be one of 'topk', 'choice' or none."),
    ],
)
def test_refuses_a_bad_override_by_name(load, override, message):
    with pytest.raises(ConfigError) as refused:
        load(BASE, override)
    assert_ends_with(refused, message)


def test_override_below_a_scalar_of_the_file_is_refused(load):
    with pytest.raises(ConfigError, match=r"^train=3 must be a section; write \[train\]"):
        load("train = 3\n" + BASE, "train.steps=5")


@pytest.mark.parametrize("text", ["", "[run]", "seed = 3"])
def test_missing_key_is_named_also_when_its_section_is_missing(load, text):
    with pytest.raises(ConfigError, match=r"^run\.name is missing; .* add run\.name=VALUE with a string\.$"):
        load(text)


def test_missing_section_without_required_keys_takes_its_defaults():
    @dataclass(frozen=True, kw_only=True)
    class Outer:
        train: Train

    assert from_tree(Outer, {}) == Outer(train=Train())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed = 1\nname = \n", r"config.toml is not valid TOML; fix this: Invalid value \(at line 2, column 8\)\.$"),
        (b'seed = 1\n[run]\nname = "a', r"is not valid TOML; .*line 3"),
        (b"seed = 1\n\n[run", r"is not valid TOML; .*line 3"),
        (b"seed = 1\nseed = 2\n", r"is not valid TOML; .*line 2"),
        (b"seed = 1\nname = '\xff'\n", r"config.toml is not UTF-8 text at byte 17; save it as UTF-8\.$"),
    ],
)
def test_syntax_error_names_file_and_line(tmp_path, content, message):
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(Config, path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.toml does not exist; name a configuration file that does\.$"):
        load_config(Config, tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\); name a readable TOML file\.$"):
        load_config(Config, tmp_path)


AWKWARD = 'a "quoted" \\ back\tslash\nline \x01 \x7f é 漢 # = []'


@pytest.mark.parametrize(
    "config",
    [
        Config(run=Run(name="demo")),
        Config(run=Run(name="", note=AWKWARD, folder=Path("a b/#c"))),
        Config(run=Run(name=AWKWARD), train=Train(lr=1e-05, clip=None, betas=(0.0, 1.0), accumulate=3)),
        Config(run=Run(name="x"), train=Train(clip=float("inf"), spans=(1, 2), suffixes=(AWKWARD, ""))),
        Config(run=Run(name="x"), train=Train(phases=(Phase(tokens=1), Phase(tokens=2, weight=0.1 + 0.2)))),
        Config(run=Run(name="x"), moe=Moe(experts=4)),
        Config(run=Run(name="x"), moe=Moe(experts=4, router="topk")),
        Config(run=Run(name="x"), attention=Attention(options={"a": 1, "b": 1e16, "c": False, "d": "1", 'k."y': 2})),
        Config(run=Run(name="x"), attention=Attention(extras={"n": {"m": {}, "o": [{"p": 1}, {"q r": []}]}})),
        Config(run=Run(name="x"), seed=-(2**62)),
    ],
)
def test_dump_loads_again_to_an_equal_object(load, config):
    text = to_toml(config)
    assert load(text) == config
    assert to_toml(load(text)) == text
    brief = to_toml(config, brief=True)
    assert load(brief) == config
    assert len(brief) < len(text)


def test_dump_is_plain_toml():
    config = Config(run=Run(name="demo"), train=Train(clip=None), attention=Attention(options={"window": 8}))
    assert to_toml(config) == (
        "seed = 0\n\n"
        '[run]\nname = "demo"\nfolder = "runs"\n\n'
        '[attention]\nmechanism = "dense"\n\n'
        "[attention.options]\nwindow = 8\n\n"
        "[attention.extras]\n\n"
        '[train]\nsteps = 100\nlr = 0.0003\nclip = "none"\nbetas = [0.9, 0.95]\ncompile = false\n'
        'accumulate = "auto"\nspans = []\nsuffixes = [".py"]\nphases = []\n'
    )
    assert to_toml(config, brief=True) == (
        '[run]\nname = "demo"\n\n[attention]\n\n[attention.options]\nwindow = 8\n\n[train]\nclip = "none"\n'
    )


def test_field_of_an_unknown_type_is_the_authors_error():
    @dataclass(frozen=True, kw_only=True)
    class Odd:
        numbers: set[int]

    with pytest.raises(TypeError, match="no rule for fields of type set"):
        from_tree(Odd, {"numbers": [1]})
