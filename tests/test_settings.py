from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest
from conftest import TRAINERS

from nnunet_uda.commands import configure
from nnunet_uda.errors import UDAError
from nnunet_uda.methods import check_uda, find_methods, refuse_unknown_methods
from nnunet_uda.plans import merge_uda
from nnunet_uda.settings import UDASettings, describe_settings, parse_settings, setting_notes, split_settings


@dataclass(frozen=True)
class Example:
    count: int = 1
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    flag: bool = True
    seed: int | None = None
    share: float | Literal["auto", 3] = "auto"
    sizes: list[float] = field(default_factory=lambda: [1.0])


def test_values_override_defaults_and_integers_pass_as_numbers():
    settings = parse_settings(Example, {"count": 3, "rate": 2, "kind": "b", "seed": 4}, "x")
    assert settings == Example(3, 2.0, "b", True, 4)
    assert isinstance(settings.rate, float)
    assert parse_settings(Example, {"seed": None}, "x").seed is None
    assert parse_settings(Example, {"share": "auto", "sizes": [1, 2.5]}, "x") == Example(sizes=[1, 2.5])
    assert describe_settings(Example)[-1] == ("sizes", "a list, each item a number", [1.0])


def test_inherited_settings_are_read_by_the_names_of_their_own_module(tmp_path, monkeypatch):
    """And of a module that is gone, as nnU-Net's finder leaves a trainer's."""
    text = "from __future__ import annotations\nfrom dataclasses import dataclass, field\n"
    (tmp_path / "base_settings.py").write_text(
        f"{text}from typing import Literal as Choice\n\n@dataclass(frozen=True)\nclass Base:\n"
        "    kind: Choice['a', 'b'] = 'a'\n"
    )
    (tmp_path / "own_settings.py").write_text(
        f"{text}from base_settings import Base\n\n@dataclass(frozen=True)\nclass Own(Base):\n    count: int = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = importlib.import_module("own_settings").Own
    for name in ("own_settings", "base_settings"):
        monkeypatch.delitem(sys.modules, name)
    assert parse_settings(own, {"kind": "b", "count": 2}, "x") == own("b", 2)
    with pytest.raises(UDAError, match="'kind' must be one of 'a', 'b'"):
        parse_settings(own, {"kind": "c"}, "x")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cuont": 1}, ["cuont", "count", "rate"]),
        ({"count": 1.5}, ["count", "an integer", "1.5"]),
        ({"count": True}, ["count", "an integer"]),
        ({"rate": "fast"}, ["rate", "a number", "fast"]),
        ({"rate": float("nan")}, ["rate", "a number"]),
        ({"kind": "c"}, ["kind", "'a', 'b'", "c"]),
        ({"flag": 1}, ["flag", "true or false"]),
        ({"seed": "x"}, ["seed", "an integer or null"]),
        ({"share": "other"}, ["share", "a number or one of 'auto', 3"]),
        ({"sizes": [1, "x"]}, ["sizes", "a list, each item a number"]),
        ([1], ["JSON object"]),
    ],
)
def test_wrong_values_name_the_setting_and_what_exists(values, words):
    with pytest.raises(UDAError) as caught:
        parse_settings(Example, values, "plans 'p'")
    for word in ["plans 'p'", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "values", [{"num_epochs": 0}, {"foreground_oversampling": 1.5}, {"segmenter_learning_rate": 0}]
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(UDAError, match=next(iter(values))):
        parse_settings(UDASettings, values, "plans")


def test_settings_of_a_method_are_separate_and_unknown_methods_refused():
    uda = {"num_epochs": 3, "cisfa": {"patches": 4}}
    assert split_settings(uda, "cisfa", "x") == ({"num_epochs": 3}, {"patches": 4})
    assert split_settings(uda, None, "x") == ({"num_epochs": 3}, {})
    with pytest.raises(UDAError, match="unknown method 'cisaf'.*Known methods: advent.* cisfa,"):
        refuse_unknown_methods({"cisaf": {}}, "cisfa", "x")
    with pytest.raises(UDAError, match="JSON object"):
        split_settings([], "cisfa", "x")


def test_check_uda_looks_into_every_method():
    check_uda({"num_epochs": 3, "cisfa": {"foreground_weight": 3}}, "x")
    with pytest.raises(UDAError, match="foreground_weight"):
        check_uda({"cisfa": {"foreground_weight": 0.5}}, "x")
    with pytest.raises(UDAError, match=r"x\.cisfa.*no_such"):
        check_uda({"cisfa": {"no_such": 1}}, "x")
    with pytest.raises(UDAError, match=r"x\.cisfa must be a JSON object"):
        check_uda({"cisfa": 3}, "x")
    with pytest.raises(UDAError, match="'seed' must be an integer or null"):
        check_uda({"seed": {}}, "x")


def test_merge_and_assignments():
    changes = dict(
        configure.parse_assignment(text) for text in ("num_epochs=3", "cisfa.patches=8", "augmentation=none")
    )
    assert merge_uda({"seed": 1, "cisfa": {"patches": 2, "generator_blocks": 1}}, changes) == {
        "seed": 1,
        "num_epochs": 3,
        "augmentation": "none",
        "cisfa": {"patches": 8, "generator_blocks": 1},
    }
    with pytest.raises(UDAError, match="NAME=VALUE"):
        configure.parse_assignment("num_epochs")
    with pytest.raises(UDAError, match="seed"):
        merge_uda({"seed": 1}, {"seed.patches": 3})


def test_a_setting_that_is_gone_is_taken_at_the_value_it_is_fixed_at():
    own = {"patches": 4, "gan_beta1": 0.5, "patch_layers": "all"}
    check_uda({"cisfa": own}, "x")
    check_uda({"random_style": {"keep_statistics": True}, "cast": {"random_convolution_layers": 4}}, "x")
    with pytest.raises(UDAError, match=r"x\.cisfa: 'gan_beta1' is no setting any more.* 0\.5; found 0\.9"):
        check_uda({"cisfa": own | {"gan_beta1": 0.9}}, "x")


def test_there_are_at_most_a_hundred_settings():
    names = {("", name) for name, *_ in describe_settings(UDASettings)}
    for method in find_methods().methods:
        names |= {(method.name, name) for name, *_ in describe_settings(method.settings)}
    assert len(names) <= 100


def test_list_names_every_setting_and_default(capsys):
    configure.main(["--list"])
    text = capsys.readouterr().out
    for name, _, default in describe_settings(UDASettings):
        assert f"{name} = {json.dumps(default)}" in text
    assert "cisfa.foreground_weight = 2.0" in text


def test_a_setting_is_described_where_it_stands():
    notes = setting_notes(UDASettings)
    assert {field.name for field in dataclasses.fields(UDASettings)} == set(notes), "each shared setting has a text"
    assert notes["num_epochs"] == "At least 1. Fewer where training takes too long; schedules and shares follow."
    made = dataclasses.make_dataclass("Made", [("a", int, 3)])
    assert setting_notes(made) == {}, "a class without a file has none"


def test_every_setting_of_every_method_says_what_it_is(monkeypatch):
    """Meaning, range and when to change it, for ``--list`` and the page of settings."""
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINERS))
    bare = [
        f"{method.name}.{name}"
        for method in find_methods().methods
        for name, *_ in describe_settings(method.settings)
        if name not in setting_notes(method.settings)
    ]
    assert not bare, "write a text under them"
