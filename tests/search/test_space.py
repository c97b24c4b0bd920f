"""What a search may vary, and how configurations are drawn."""

import math

import numpy as np
import pytest

from orchestrator.cli import tune
from orchestrator.config.models import read_yaml
from orchestrator.config.recipes import digits
from orchestrator.search.recipes import PAPERS_SPACE
from orchestrator.search.space import make_space

SPACE = make_space(PAPERS_SPACE | {"seed": {"randint": [3, 6]}}, digits())


def test_a_draw_is_a_function_of_the_seed_and_the_number_and_lies_in_the_space():
    drawn = [SPACE.draw(7, number) for number in range(300)]
    assert drawn == [SPACE.draw(7, number) for number in range(300)]
    assert drawn != [SPACE.draw(8, number) for number in range(300)]
    for d in SPACE.dimensions:
        values = [values[d.name] for values in drawn]
        assert all(0 <= d.position(value) <= 1 for value in values), d.name
        # and is spread evenly over it: 300 uniform numbers miss their median by 0.09 once in 500 times
        assert abs(np.median([d.position(value) for value in values]) - 0.5) < 0.2, d.name
    assert {values["seed"] for values in drawn} == {3, 4, 5, 6}
    assert {values["lrn_n"] for values in drawn} == {3, 5, 7, 9}
    assert sum(values["lr"] < 0.01 for values in drawn) in range(120, 181), "a logarithmic range is even in decades"


def test_the_order_of_a_file_changes_nothing():
    turned = make_space(dict(reversed((PAPERS_SPACE | {"seed": {"randint": [3, 6]}}).items())), digits())
    assert turned == SPACE


def test_every_configuration_that_can_be_drawn_is_valid():
    for number in range(100):
        digits().changed(**SPACE.draw(0, number))
        digits().changed(**SPACE.mutate(SPACE.draw(0, number), number))


def test_the_papers_constants_are_the_papers_and_the_rest_is_the_recipe_s():
    space = make_space({"dropout": {"uniform": [0.0, 0.9]}, "width": {"choice": [0.25, 0.5]}}, digits())
    assert space.paper_baseline(digits()) == {"dropout": 0.5, "width": 0.25}
    assert SPACE.paper_baseline(digits())["lrn_alpha"] == 1e-4
    assert SPACE.paper_baseline(digits().changed(preset="caffe"))["lrn_alpha"] == 2e-5


def test_a_grid_is_every_combination():
    space = make_space({"lrn_n": {"grid": [3, 5]}, "lr": {"choice": [0.1, 0.01, 0.001]}}, digits())
    found = list(space.grid())
    assert len(found) == 6
    assert found[0] == {"lr": 0.1, "lrn_n": 3}
    assert found[1] == {"lr": 0.1, "lrn_n": 5}
    with pytest.raises(ValueError, match=r"lr = loguniform from 0\.001 to 0\.1: a grid needs listed values"):
        list(SPACE.grid())


def test_a_mutation_stays_in_the_space_and_moves():
    values = SPACE.draw(0, 1)
    moved = [SPACE.mutate(values, seed) for seed in range(50)]
    assert moved == [SPACE.mutate(values, seed) for seed in range(50)]
    for d in SPACE.dimensions:
        assert all(0 <= d.position(other[d.name]) <= 1 for other in moved)
        assert len({other[d.name] for other in moved}) > 2, d.name
    near = [
        other
        for other in moved
        if math.isclose(abs(math.log(other["lr"] / values["lr"])), math.log(1.25), rel_tol=1e-3)
    ]
    assert len(near) > 25, "most move by a factor"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lrr": {"uniform": [0, 1]}}, "space: lrr: no such setting; did you mean lr?"),
        ({"epochs": {"choice": [1, 2]}}, "space: epochs: is the clock of the search"),
        ({"lr": {"uniform": [0.1, 0.01]}}, "the low end 0.1 is not below the high end 0.01"),
        ({"lr": {"uniform": [0.1, 0.1]}}, "empty"),
        ({"lr": {"loguniform": [0, 1]}}, "a logarithmic range begins above 0"),
        ({"lr": {"uniform": [0, 1]}}, "space: lr = 0: input should be greater than 0"),
        ({"lr": {"uniform": [0.1]}}, "expected two numbers, the low and the high end"),
        ({"lr": {"uniform": ["a", "b"]}}, "expected two numbers"),
        ({"lr": {"normal": [0, 1]}}, "expected one of choice, grid, uniform, loguniform, randint"),
        ({"lr": [0.1, 0.2]}, "expected one of choice"),
        ({"lrn_n": {"uniform": [3, 9]}}, "is a whole number; use randint or choice"),
        ({"lrn_k": {"randint": [1, 9]}}, "is a real number; use uniform or loguniform"),
        ({"preset": {"choice": ["caffe", "vgg"]}}, "space: preset = 'vgg': unknown; the presets are paper, caffe"),
        ({"lrn_n": {"choice": [3, 4]}}, "space: lrn_n = 4: the window is centred on a map, so n must be odd"),
        ({"flip": {"choice": [0, 1]}}, "0 should be a bool"),
        ({"init": {"uniform": [0, 1]}}, "is no number; use choice"),
        ({"init": {"choice": ["he", "xavier"]}}, "space: init = 'xavier': input should be 'paper' or 'he'"),
        ({"lrn_n": {"randint": [3, 9]}}, "space: lrn_n = 4: the window is centred on a map, so n must be odd"),
        ({"data": {"choice": ["a", "b"]}}, "space: data: is the same for all trials; set --data instead"),
        ({"workers": {"choice": [1, "1..2"]}}, "a trial has a fixed number of workers"),
        ({"lr": {"choice": []}}, "expected a list of values"),
        ({"lr": {"choice": [0.1, 0.1]}}, "a value is there twice"),
        ({}, "space: empty"),
        ({"x" * 10**5: 1}, "space: xxx"),
        ({"lr": list(range(10**5))}, "space: lr = [0, 1, 2"),
        ({"lr": {"choice": ["a\x1b" * 10**5]}}, "space: lr = 'a\\x1ba"),
        ({"lr": {"uniform": list(range(10**5))}}, "space: lr = uniform [0, 1, 2"),
    ],
)
def test_a_wrong_space_is_one_line(fields, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        make_space(fields, digits())
    assert words in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_a_file_may_say_1e_5_which_yaml_takes_for_a_text(tmp_path):
    (tmp_path / "space.yaml").write_text("weight_decay: {loguniform: [1e-5, 1e-2]}\n")
    (dimension,) = make_space(read_yaml(tmp_path / "space.yaml", "--space"), digits()).dimensions
    assert dimension.values == (1e-5, 1e-2)
    with pytest.raises(ValueError, match=r"--space .*none\.yaml: No such file"):
        read_yaml(tmp_path / "none.yaml", "--space")


def test_the_default_space_leaves_out_what_a_preset_does_not_have(capsys):
    _, config, _ = tune.resolve(tune.parser().parse_args(["--preset", "torchvision", "--layout", "single"]))
    assert config.space.names == ("lr", "weight_decay")
    assert config.train.preset == "torchvision"
    assert capsys.readouterr().out == "preset torchvision has no LRN: the search varies lr and weight_decay alone\n"
    _, config, _ = tune.resolve(tune.parser().parse_args(["--preset", "caffe", "--layout", "single"]))
    assert config.space.names == ("lr", "lrn_alpha", "lrn_beta", "lrn_k", "lrn_n", "weight_decay")
    assert capsys.readouterr().out == ""


def test_a_search_freezes_no_random_layers(tmp_path):
    (tmp_path / "space.yaml").write_text('lr: {choice: [0.1, 0.2]}\nfreeze: {choice: ["none", conv1]}\n')
    for given, shown in ((["--freeze", "conv1"], "'conv1'"), (["--space", str(tmp_path / "space.yaml")], ".*conv1.*")):
        with pytest.raises(
            ValueError, match=rf"^freeze = {shown}: trials start from random weights, .*--start-from MODEL$"
        ):
            tune.resolve(tune.parser().parse_args(given))
