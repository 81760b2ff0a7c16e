"""YAML read strictly: what is read otherwise than it looks, takes long, or leaves a traceback, is one line instead."""

import contextlib
import math
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from esam_dist import config
from esam_dist.config import strict_yaml
from esam_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SECRET = "s3cr-t"
BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))


def read(text):
    return strict_yaml.parse(text.encode("utf-8", "surrogatepass"), "config a.yaml")


def refusal(function, *args):
    """The one line in which `function` refuses `args`, within a second of the processor's time."""
    start = time.process_time()
    with pytest.raises(UserError) as error:
        function(*args)
    assert time.process_time() - start < 1.0
    message = str(error.value)
    assert message.isprintable()
    assert message.isascii()
    return message


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        *(("5e-2", 0.05), ("1e-3", 0.001), ("1e5", 1e5), ("1E+5", 1e5), ("-2.e3", -2000.0), (".5", 0.5), ("+1.5", 1.5)),
        *(("7", 7), ("-7", -7), ("+7", 7), ("0", 0), ("0x1F", 31), ("0o17", 15), ("-9223372036854775808", -(2**63))),
        *((".inf", math.inf), ("-.INF", -math.inf), ("null", None), ("~", None), ("", None), ("# only", None)),
        *(("true", True), ("No", False), ("on", True), ("OFF", False), ("tRue", "tRue")),
        *(("1:30", "1:30"), ("2020-99-99", "2020-99-99"), ("2020-01-01", "2020-01-01"), ("0b11", "0b11")),
        *(("\u0661\u0662", "\u0661\u0662"), ("\uff11e\uff12", "\uff11e\uff12"), ("1_000", "1_000"), ("=", "=")),
        *(("'010'", "010"), ('"5e-2"', "5e-2"), ("|\n  a\n  b", "a\nb"), ("[1, [2.5, x]]", [1, [2.5, "x"]])),
        ("{on: 1, 2: {y: [], ~: {}}}", {"on": 1, "2": {"y": [], "~": {}}}),
        ("\ufeffa: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
    ],
)
def test_what_is_read(text, meant):
    value = read(text)
    assert value == meant
    assert type(value) is type(meant)


def test_not_a_number_is_read():
    assert math.isnan(read(".NaN"))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("train:\n  epochs: 1\n  epochs: 2\n", 3, "key 'epochs' is given twice, first in line 2"),
        ("train: {epochs: 1}\noptim: {}\ntrain: {epochs: 2}\n", 3, "key 'train' is given twice, first in line 1"),
        ("a: 1\nb: &x 2\n", 2, "anchors"),
        ("a: 1\nb: *x\n", 2, "aliases"),
        ("a: 1\n&k b: 1\n", 2, "anchors"),
        ("a: 1\n*k : 1\n", 2, "aliases"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", 1, "anchors"),
        ("a: 1\nc:\n  <<: {b: 1}\n", 3, "merges (<<)"),
        ("a: 1\nb: 010\n", 2, "010 begins with 0"),
        ("a: 1\nb: [-0777]\n", 2, "-0777 begins with 0"),
        ("a: 1\nb: " + "9" * 5000, 2, "99999999999999999999... is an integer of more than 64 bits"),
        ("a: 1\nb: 9223372036854775808", 2, "more than 64 bits"),
        ("a: 1\nb: 0x" + "f" * 5000, 2, "more than 64 bits"),
        ("a: 1\nb: !!int '3'", 2, "tags"),
        ("a: 1\nb: !!python/object:os.system {}", 2, "tags"),
        ("a: 1\nb: ! 3", 2, "tags"),
        ("a: 1\n!!str b: 3", 2, "tags"),
        ("a: 1\n? [b]\n: 3", 2, "a key is a list"),
        ("a: 1\n{b: 1}: 3", 2, "a key is a list"),
        ("a: 1\n---\nb: 1", 2, "a second document"),
        ("a: 1\nb: x\x07y", 2, r"control character '\x07'"),
        ("a: 1\nb: \x00", 2, r"control character '\x00'"),
        ('a: 1\nb: "\\0"', 2, r"control character '\x00'"),
        ('a: 1\nb: "\\ud800"', 2, r"control character '\ud800'"),
        ('a: 1\n"b\\e": 1', 2, r"control character '\x1b'"),
        ("a: 1\nb: \ud800", 2, "is not UTF-8"),
        ("a: 1\nb: [1, 2\n", 3, "not a YAML value (expected ',' or ']', but got '<stream end>')"),
        ("a: 1\nb: c: d\n", 2, "not a YAML value (mapping values are not allowed here)"),
        ("a: 1\n\tb: 1\n", 2, "not a YAML value (found character"),
        ("a: 1\n b: 1\n", 2, "not a YAML value"),
        ("a: 1\nb: 'c\n", 3, "not a YAML value (found unexpected end of stream)"),
        ('a: 1\nb: "\\UFFFFFFFF"\n', 1, "not a YAML value"),
        ("a: 1\nb: " + "[" * 1000 + "]" * 1000, 2, "nested more than 16 deep"),
        ("a: 1\nb: " + "{b: " * 1000 + "}" * 1000, 2, "nested more than 16 deep"),
        ("a: 1\n" + "- " * 1000, 2, "not a YAML value"),
        ("- 1\n" + "- " * 1000, 2, "nested more than 16 deep"),
    ],
)
def test_what_is_refused_names_file_and_line(text, line, words):
    message = refusal(read, text)
    assert message.startswith(f"config a.yaml, line {line}: ")
    assert words in message


@pytest.mark.parametrize("text", ["{a: 1, a: 2}", "[&x 1]", "010", "[1", "- - ! 3", "'"])
def test_where_there_is_one_line_its_number_is_left_out(text):
    assert refusal(read, text).startswith("config a.yaml: ")


def test_depth_up_to_the_limit_is_read():
    assert read("[" * 16 + "]" * 16)
    assert "nested" in refusal(read, "[" * 17 + "]" * 17)


@pytest.mark.parametrize(
    "piece", ["x", "a\n", "[", "{a: ", "- ", "? ", "'", "1,", "\u0661", "&a *a ", "\n", "#", "'' "]
)
def test_size_is_limited_and_what_is_just_as_long_is_read_or_refused_within_a_second(piece):
    text = piece * (strict_yaml.MAX_BYTES // len(piece.encode()))
    start = time.process_time()
    with contextlib.suppress(UserError):
        read(text)
    assert time.process_time() - start < 1.0
    assert "is longer than 65536 bytes" in refusal(read, piece * strict_yaml.MAX_BYTES + " ")


def test_a_large_file_is_not_read_whole(tmp_path):
    path = tmp_path / "config.yaml"
    with path.open("wb") as file:
        file.truncate(2**40)
    assert "is longer than 65536 bytes" in refusal(config.load, path)


def test_aliases_of_aliases_take_no_memory(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(BOMB)
    assert f"config {path}, line 1: anchors" in refusal(config.load, path)


@pytest.mark.parametrize("key", ["optim.lr", "method.rho", "method.beta", "optim.step_factor"])
def test_scientific_numbers_are_numbers_for_every_key(tmp_path, key):
    section, name = key.split(".")
    path = tmp_path / "config.yaml"
    path.write_text(f"{section}: {{{name}: 5e-2}}")
    assert config.flat(config.load(path))[key] == 0.05
    path.write_text("")
    assert config.flat(config.load(path, [f"{key}=5e-2"]))[key] == 0.05


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=("Cc", "Cs"))),
    st.from_regex(strict_yaml.FLOAT, fullmatch=True),
    st.from_regex(strict_yaml.INTEGER, fullmatch=True),
    st.sampled_from(["1e5", "0o17", "010", "08", "yes", "~", "", "<<", "=", "1:30", "2020-01-01", "!x", "&x", "*x"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab<:?- ", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(VALUES)
@example("1e5")
@example("0o17")
def test_what_is_dumped_is_read_back_alike_here_and_by_yaml_1_1(value):
    text = strict_yaml.dump(value)
    for again in (read(text), yaml.safe_load(text)):
        assert again == value
        assert type(again) is type(value)


def test_a_list_held_twice_is_written_twice():
    shared = [1]
    assert read(strict_yaml.dump([shared, shared])) == [[1], [1]]


@pytest.mark.parametrize("folder", ["1e5", "0o17", "010", "2020-01-01", "1:30", "null"])
def test_text_that_looks_like_a_number_survives_the_run_folder(tmp_path, folder):
    path = tmp_path / "config.yaml"
    cfg = config.parse({"run": {"folder": folder}}, "values")
    path.write_text(config.dump(cfg))
    assert config.load(path) == cfg


def read_or_refused(function, *args):
    """Fails where `function` raises anything but a UserError of one line, or takes more than a second."""
    start = time.process_time()
    message = ""
    try:
        function(*args)
    except UserError as error:
        message = str(error)
    assert message.isprintable()
    assert time.process_time() - start < 1.0


PIECES = st.sampled_from(
    [
        *"[]{}:,-?&*!|>'\"%@`#~<=\n\t \r\\\x85\u2028\ufeff0159ex._+",
        *("- ", ": ", "? ", "---", "...", "<<", "!!int ", "%YAML 1.2\n", "%TAG ! a\n", "!<", "&a ", "*a ", "|2", ">-"),
        *("train", "epochs", "\n  ", "\\U0011", "\\x", "\\ud800", "1e5", "0x"),
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(), max_size=300) | st.lists(PIECES, max_size=60).map("".join))
def test_any_text_is_a_value_or_refused(text):
    read_or_refused(read, text)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_value_or_refused(content):
    read_or_refused(strict_yaml.parse, content, "config a.yaml")


CONFIG = (ROOT / "configs/imagenet_resnet50_esam.yaml").read_text()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(CONFIG)), st.integers(0, 30), st.lists(PIECES, max_size=4).map("".join))
def test_any_change_of_a_configuration_is_a_configuration_or_refused(tmp_path_factory, at, dropped, piece):
    path = tmp_path_factory.getbasetemp() / "changed.yaml"
    path.write_bytes((CONFIG[:at] + piece + CONFIG[at + dropped :]).encode())
    read_or_refused(config.load, path)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*config.keys(), "a.b", "train", ""]), st.lists(PIECES, max_size=20).map("".join))
@example("method.rho", "1" * 400)
def test_any_override_is_a_configuration_or_refused(tmp_path_factory, key, text):
    path = tmp_path_factory.getbasetemp() / "empty.yaml"
    path.write_text("")
    read_or_refused(config.load, path, [f"{key}={text}"])


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "configs").glob("*.yaml"))])
def test_our_configurations_hold_what_a_reader_of_yaml_1_1_sees(name):
    content = (ROOT / "configs" / name).read_bytes()
    assert strict_yaml.parse(content, name) == yaml.safe_load(content)


COMMAND = f"pipe:curl -u user:{SECRET} https://host/a.tar"


@pytest.mark.parametrize(
    "override",
    [
        f"data.stream=[{COMMAND}",
        f"data.stream={{a: '{COMMAND}', a: 1}}",
        f"data.stream=[{COMMAND}]",
        f"data.stream=[curl, -u, 'user:{SECRET}']",
        f"data.stream={{password: {SECRET}}}",
        f"data.stream: {COMMAND}",
        f"{COMMAND}=1",
        f"data.{COMMAND}",
        f"data.stream=https://user:{SECRET}@host/\ud800",
        f"data.stream=&x {COMMAND}",
        f"data.steam={COMMAND}",
        f"dat.stream={COMMAND}",
        f"data.stream.x={COMMAND}",
        f"model.num_classes={COMMAND}",
        f"optim.lr=https://host/a?x-sig=1&sig={SECRET}",
        f"metrics.gateway=http://host?token={SECRET}",
        f"model.{COMMAND.replace('.', '')}=1",
        f"""data.stream="{COMMAND}\\q" """,
        f"""data.stream='{COMMAND}""",
        f"data.stream=!{SECRET}!x token={SECRET}",
    ],
)
def test_an_override_that_looks_secret_is_refused_without_its_value(tmp_path, override):
    path = tmp_path / "config.yaml"
    path.write_text("data: {}\n")
    message = refusal(config.load, path, [override])
    assert SECRET not in message.replace(f"!{SECRET}!", "")


@pytest.mark.parametrize(
    "text",
    [
        f"data: '{COMMAND}'",
        f"data:\n  stream: {COMMAND}\n  stream: {COMMAND}",
        f"data:\n  stream: {COMMAND}: x",
        f"data: {{stream: [{COMMAND}]}}",
        f"data: {{'{COMMAND}': 1}}",
        f"'{COMMAND}': 1\n'{COMMAND}': 2",
        f'data:\n  stream: "{COMMAND}\n',
        f"- {COMMAND}",
    ],
)
def test_a_file_that_looks_secret_is_refused_without_its_value(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert SECRET not in refusal(config.load, path)


def test_what_is_not_secret_is_shown(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train:\n")
    assert "override 'train.epochs=[1': not a YAML value" in refusal(config.load, path, ["train.epochs=[1"])
    assert "train.epochs = '3' is refused" in refusal(config.load, path, ["train.epochs='3'"])
    assert "train.epochs = 0 is refused" in refusal(config.load, path, ["train.epochs=0"])
    hidden = "override data.stream=(not shown: it looks like a password, token or signature): "
    assert refusal(config.load, path, [f"data.stream=[{COMMAND}"]).startswith(hidden)


@pytest.mark.parametrize(
    "piece", ["token ", "token_", "auth", "token=' ' ", "://a:", "-u =", "${a", "token   ='", "  "]
)
def test_to_look_for_secrets_takes_no_time(piece):
    text = piece * (strict_yaml.MAX_BYTES // len(piece))
    read_or_refused(config.parse, {"data": {"stream": text}}, "a.yaml")
