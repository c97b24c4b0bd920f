"""Settings, recipes, flags: what is accepted, what is refused, and the messages."""

import re
import typing

import pytest
import yaml

from alexnet import LRN
from orchestrator.cli.flags import Parser, add_fields, given_fields
from orchestrator.config.models import MAX_YAML_BYTES, dump_yaml, make_model, parse_yaml, read_yaml
from orchestrator.config.recipes import RECIPES, adapted
from orchestrator.config.train import TrainConfig, make_config


def test_the_defaults_are_the_paper_s():
    config = make_config()
    assert (config.lr, config.momentum, config.weight_decay) == (0.01, 0.9, 0.0005)
    assert (config.global_batch_size, config.epochs, config.dropout) == (128, 90, 0.5)
    assert config.lrn == LRN(k=2.0, n=5, alpha=1e-4, beta=0.75)
    assert (config.preset, config.crop_size) == ("paper", 224)


def test_what_is_not_set_is_the_preset_s_own():
    caffe = make_config(preset="caffe", lrn_beta=0.5)
    assert caffe.lrn == LRN(k=1.0, n=5, alpha=2e-5, beta=0.5)
    assert caffe.crop_size == 227
    assert caffe.changed(input_size=64).crop_size == 64
    assert caffe.lrn_k is None, "a changed copy with another preset has that preset's"
    assert caffe.changed(preset="paper").lrn == LRN(beta=0.5)
    lrn = {"lrn_k": 1.0, "lrn_n": 5, "lrn_alpha": 2e-5, "lrn_beta": 0.5}
    assert caffe.resolved() == caffe.model_dump() | lrn | {"input_size": 227}
    plain = make_config(preset="torchvision")
    assert plain.lrn is None
    assert plain.resolved() == plain.model_dump() | {"input_size": 224}


def test_settings_of_a_run_before_there_were_presets_mean_the_same():
    old = {"preset": "paper", "input_size": 224, "lrn_k": 2.0, "lrn_n": 5, "lrn_alpha": 1e-4, "lrn_beta": 0.75}
    assert make_config(**old).resolved() == make_config().resolved()


def test_a_recipe_s_layout_is_for_its_own_net():
    digits = RECIPES["digits"]()
    assert digits.layout == "columns"
    assert adapted(digits, {"preset": "torchvision"}).layout == "auto"
    for given in ({}, {"preset": "paper"}, {"preset": "caffe", "layout": "columns"}):
        assert adapted(digits, given) == digits


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_source_command_cost_and_result(name):
    assert isinstance(RECIPES[name](), TrainConfig)
    for word in ("Source:", "Command:", "Cost:", "Result:"):
        assert word in RECIPES[name].__doc__, word
    for word in ("Cost:", "Result:"):
        assert re.search(word + r"[^:]*\d", RECIPES[name].__doc__), f"{word} has no figure"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lr": -0.1}, ["lr = -0.1", "greater than 0"]),
        ({"lr": 0}, ["lr = 0", "greater than 0"]),
        ({"epochs": 0}, ["epochs = 0"]),
        ({"lr": float("inf")}, ["lr = inf"]),
        ({"lrn_n": 4}, ["lrn_n = 4", "odd"]),
        ({"optimizer": "adam"}, ["optimizer = 'adam'", "'sgd' or 'lars'"]),
        ({"epochs": 5, "warmup_epochs": 5}, ["warmup_epochs = 5: the run has epochs = 5", "fewer epochs"]),
        ({"trust_coefficient": 0.01}, ["trust_coefficient = 0.01: optimizer sgd has none", "choose optimizer lars"]),
        ({"warmup_epochs": -1}, ["warmup_epochs = -1"]),
        ({"ema": 1.0}, ["ema = 1.0", "less than 1"]),
        ({"accumulate": 0}, ["accumulate = 0"]),
        ({"workers": "8..2"}, ["workers = '8..2'", "a number such as 4, or a range such as 2..8"]),
        ({"workers": 0}, ["workers = 0: expected a number such as 4"]),
        ({"workers": "0..2"}, ["workers = '0..2': expected a number such as 4"]),
        ({"workers": True}, ["workers = True: expected a number"]),
        ({"workers": 1.5}, ["workers = 1.5"]),
        ({"workers": ""}, ["workers = '': expected a number such as 4"]),
        ({"layout": "rows"}, ["layout = 'rows'", "columns"]),
        ({"learning_rate": 0.1}, ["learning_rate", "no such setting"]),
        ({"precision": "fp16"}, ["precision = 'fp16'", "bf16"]),
        ({"input_size": 10}, ["input_size = 10", "64"]),
        ({"width": "wide"}, ["width = 'wide'"]),
        ({"preset": "vgg"}, ["preset = 'vgg': unknown; the presets are paper, caffe, torchvision"]),
        ({"preset": "torchvision", "lrn_n": 3}, ["lrn_n = 3: preset torchvision has no LRN; leave it out"]),
    ],
)
def test_a_wrong_value_is_one_line_with_field_value_and_remedy(fields, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        make_config(**fields)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def numbers():
    return [
        name for name, field in TrainConfig.model_fields.items()
        if {int, float} & {field.annotation, *typing.get_args(field.annotation)}
    ]  # fmt: skip


@pytest.mark.parametrize("name", numbers())
def test_yes_is_not_taken_for_the_number_1(name):
    for value in (True, False):
        with pytest.raises(ValueError, match=f"^{name} = {value}: expected a number"):
            make_config(**{name: value})


def test_a_yaml_yes_is_refused_for_a_number_and_taken_for_a_switch(tmp_path):
    assert {"epochs", "lr", "workers", "num_classes", "threads"} <= set(numbers())
    (tmp_path / "c.yaml").write_text("flip: no\nspread: yes\n")
    config = make_config(**read_yaml(tmp_path / "c.yaml"))
    assert (config.flip, config.spread) == (False, True)
    (tmp_path / "c.yaml").write_text("epochs: yes\n")
    with pytest.raises(ValueError, match=r"^epochs = True: expected a number$"):
        make_config(**read_yaml(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("given", "kept", "counts"),
    [
        (2, 2, (2, 2)), ("2", 2, (2, 2)), (" 2 ", 2, (2, 2)), ("2..2", 2, (2, 2)), ("02", 2, (2, 2)), (2.0, 2, (2, 2)),
        ("2..8", "2..8", (2, 8)), (" 2..8\n", "2..8", (2, 8)), ("02..08", "2..8", (2, 8)),
    ],
)  # fmt: skip
def test_equal_numbers_of_workers_are_equal_however_they_are_written(given, kept, counts, tmp_path):
    made = make_config(workers=given)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"workers": given}))
    read = make_config(**read_yaml(tmp_path / "c.yaml"))
    words = flags_for().parse_args(["--workers", str(given)] if not isinstance(given, float) else ["--workers", "2"])
    typed = make_config().changed(**given_fields(words, TrainConfig))
    for config in (made, read, typed, make_config(**yaml.safe_load(made.to_yaml()))):
        assert (config.workers, type(config.workers)) == (kept, type(kept))
        assert config.worker_range == counts
        assert config.model_dump()["workers"] == kept  # what result.json, MLflow and the workers get
    assert made == read == typed


def test_every_setting_of_text_reads_as_the_value_it_stands_for():
    """As YAML has them in quotes, or without a dot in 1e-3: equal values must be equal afterwards."""
    for recipe in RECIPES.values():
        config = recipe().changed(num_classes=10, threads=2)
        text = {name: str(value) for name, value in config.model_dump().items() if value is not None}
        assert make_config(**text) == config
    assert make_config(**yaml.safe_load("lr: 1e-3")).lr == 0.001


def test_a_config_survives_yaml(tmp_path):
    config = RECIPES["digits"]().changed(lr=0.003, num_classes=10)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert make_config(**read_yaml(tmp_path / "c.yaml")) == config
    assert list(yaml.safe_load(config.to_yaml())) == list(TrainConfig.model_fields)


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "No such file"), ("- a\n- b", "setting: value"), ("1: 2", "setting: value"), ("a: [", "not YAML")],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(tmp_path, text, words):
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        read_yaml(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("010", 10), ("08", 8), ("-010", -10), ("0_1", 1), ("1_000", 1000), ("0o10", 8), ("0x1F", 31), ("0b11", 3),
        ("1:30", 90), ("-1:30", -90), ("1:30.5", 90.5), ("0.1_0", 0.1),
    ],
)  # fmt: skip
def test_a_number_that_is_read_in_several_ways_is_refused(value, meant):
    with pytest.raises(ValueError, match=r"^--config c.yaml, line 2: ") as error:
        parse_yaml(f"lr: 1\nseed: {value}\n", "--config c.yaml")
    assert str(error.value).endswith(f': {value}: is read in several ways; write {meant} or "{value}"')
    assert parse_yaml(f'seed: {meant}\nname: "{value}"', "c") == {"seed": meant, "name": value}
    assert parse_yaml(dump_yaml({"a": value, "b": [value]}), "c") == {"a": value, "b": [value]}


def test_values_of_yaml_are_what_they_seem():
    text = (
        "a: yes\nb: No\nc: ~\nd: 1.5\ne: 1e-5\nf: .inf\ng: -3\nh: 0\ni: 2026-01-02\nj: 2..8\nk: +5\nl: 1.0e-5\nm: 90s\n"
    )
    text += "n: [1, {o: 'x'}]\np: on\nq: null\nr: true"
    assert parse_yaml(text, "c") == {
        "a": True, "b": False, "c": None, "d": 1.5, "e": "1e-5", "f": float("inf"), "g": -3, "h": 0, "i": "2026-01-02",
        "j": "2..8", "k": 5, "l": 1e-5, "m": "90s", "n": [1, {"o": "x"}], "p": True, "q": None, "r": True,
    }  # fmt: skip


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, ", line 1: anchor or alias 'a': write the value out"),
        ("a: *b", ", line 1: anchor or alias 'b': write the value out"),
        ("a: &b 1", ", line 1: anchor or alias 'b'"),
        ("lr: " + "[" * 3000, ", line 1: nested more than 10 deep"),
        ("lr: " + "{a: " * 3000, ", line 1: nested more than 10 deep"),
        ("lr: 1\nseed: 2\nlr: 3", ", line 3: 'lr' is there twice; leave one out"),
        ("space: {lr: 1, lr: 2}", ", line 1: 'lr' is there twice"),
        ("seed: !!int '5'", ", line 1: tag 'tag:yaml.org,2002:int': leave it out"),
        ("seed: !!python/object/apply:os.getcwd []", ", line 1: tag"),
        ("? [1]\n: 2", ", line 1: a name is expected before the colon"),
        ("a: 1\n---\na: 2", ": not YAML: line 2: "),
        ("a: [", ": not YAML: line 1: expected the node content"),
        ("a: \x00", ": not YAML: unacceptable character"),
        ("a: " + "9" * 5000, ", line 1: '9999"),
        ("a: " + "x" * MAX_YAML_BYTES, f": more than {MAX_YAML_BYTES} bytes"),
        (b"a: caf\xe9", ": is not text in UTF-8 (byte 6)"),
        ("x" * 90_000 + ": [", ": not YAML: line 1: "),
        (f"{'x' * 1000}: 1\n{'x' * 1000}: 2", ", line 2: 'xxx"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_yaml_can_and_settings_cannot_is_refused_in_one_short_line(tmp_path, text, words):
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (lambda: read_yaml(tmp_path / "c.yaml"), lambda: parse_yaml(text, f"--config {tmp_path / 'c.yaml'}")):
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            read()
        message = str(error.value)
        assert message.startswith(f"--config {tmp_path / 'c.yaml'}{words}")
        assert message.isprintable()
        assert len(message) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    "fields", [{"seed": "x" * 10**6}, {"seed": list(range(10**5))}, {"x" * 10**6: 1}, {"data": ["\x1b"] * 1000}]
)
def test_a_huge_value_is_quoted_in_short(fields):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - what it says is checked below
        make_model(TrainConfig, **fields)
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()
    assert str(error.value).startswith(next(iter(fields))[:20])


def flags_for(recipe="digits"):
    flags = Parser("train", "doc")
    add_fields(flags, TrainConfig, RECIPES[recipe]())
    return flags


def test_every_field_has_a_flag_with_its_meaning_and_default():
    text = " ".join(flags_for().format_help().split())
    for name, field in TrainConfig.model_fields.items():
        assert "--" + name.replace("_", "-") in text
        assert " ".join(field.description.split())[:30] in text
    assert "that after the warm-up (default: 0.01)" in text


def test_only_the_flags_that_were_given_override():
    args = flags_for().parse_args(["--lr", "0.5", "--no-flip", "--num-classes", "7"])
    assert given_fields(args, TrainConfig) == {"lr": 0.5, "flip": False, "num_classes": 7}


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--lrr", "1"], "unknown argument --lrr; did you mean --lr?"), (["--lr", "fast"], "invalid float value: 'fast'")],
)
def test_a_wrong_flag_is_one_line_and_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        flags_for().parse_args(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["num_samples", "grace_epochs", "max_concurrent", "search_seed"])
def test_yes_is_not_taken_for_the_number_1_in_a_search(name):
    from orchestrator.search.config import SearchSettings

    with pytest.raises(ValueError, match="expected a number"):
        SearchSettings(**{name: True})
