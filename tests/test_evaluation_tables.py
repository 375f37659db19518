"""Means, deviations, folds, gap closed and the paired test, against figures worked out by hand."""

from __future__ import annotations

import math

import pytest

from nnunet_uda.errors import UDAError
from nnunet_uda.evaluation import Volume, compare_runs
from nnunet_uda.evaluation.report import markdown_table, summary_tables
from nnunet_uda.evaluation.tables import MEAN, gap_closed, summarise, wilcoxon

NAN = math.nan


def volume(case: str, dice: tuple, assd: tuple | None = None, fold: int | None = None) -> Volume:
    assd = assd if assd is not None else tuple(10 * (1 - value) for value in dice)
    pairs = zip("ab", dice, assd, strict=False)
    return Volume(case, {name: {"Dice": d, "ASSD": s, "HD95": 2 * s} for name, d, s in pairs}, fold)


def test_means_and_sample_deviations():
    summary = summarise([volume("1", (0.2, 0.4)), volume("2", (0.6, 1.0))])
    assert summary["a"]["Dice"]["mean"] == pytest.approx(0.4)
    assert summary["a"]["Dice"]["std"] == pytest.approx(0.4 / math.sqrt(2))
    # the mean over structures is taken volume by volume: 0.3 and 0.8
    assert summary[MEAN]["Dice"]["mean"] == pytest.approx(0.55)
    assert summary[MEAN]["Dice"]["std"] == pytest.approx(0.5 / math.sqrt(2))
    assert math.isnan(summarise([volume("1", (0.2, 0.4))])["a"]["Dice"]["std"])


def test_missing_structures_are_counted_never_dropped():
    volumes = [
        volume("both empty", (NAN, 0.5), (NAN, 2.0)),
        volume("one empty", (0.0, 0.7), (NAN, 4.0)),
        volume("whole", (0.8, 0.9), (1.0, 3.0)),
    ]
    summary = summarise(volumes)
    assert summary["a"]["Dice"] == pytest.approx({"mean": 0.4, "std": 0.8 / math.sqrt(2), "n": 2, "n_undefined": 0})
    found = [(summary[row]["ASSD"]["mean"], summary[row]["ASSD"]["n_undefined"]) for row in ("a", "b", MEAN)]
    assert found == [(1.0, 1), (3.0, 0), (pytest.approx((2 + 4 + 2) / 3), 1)] and summary["a"]["ASSD"]["n"] == 1
    assert summary[MEAN]["Dice"]["mean"] == pytest.approx((0.5 + 0.35 + 0.85) / 3)
    table = summary_tables({"run": volumes}, compare_runs({"run": volumes}))[0]
    assd = next(row for row in table["rows"] if row[0].startswith("ASSD"))
    assert assd[2] == "1.00 (n = 1, 1 undefined)"
    assert "1.00 (n = 1, 1 undefined)" in markdown_table(table)


def test_over_folds_the_fold_means_count_alike():
    volumes = [volume("1", (0.2,), fold=0), volume("2", (0.4,), fold=0), volume("3", (0.9,), fold=1)]
    folds = compare_runs({"run": volumes})["folds"]["run"]
    assert folds["by_fold"]["0"]["a"]["Dice"]["mean"] == pytest.approx(0.3)
    assert folds["over_folds"]["a"]["Dice"] == pytest.approx({"mean": 0.6, "std": 0.6 / math.sqrt(2), "n": 2})
    assert compare_runs({"run": volumes[:2]})["folds"] is None


def test_gap_closed():
    assert gap_closed(0.8, 0.2, 1.0, "Dice")[0] == pytest.approx(75)
    assert gap_closed(4.0, 10.0, 2.0, "ASSD")[0] == pytest.approx(75)
    assert gap_closed(0.1, 0.2, 1.0, "Dice")[0] == pytest.approx(-12.5)
    for arguments in ((0.8, 0.5, 0.5, "Dice"), (0.8, 0.6, 0.5, "Dice"), (3.0, 2.0, 2.5, "ASSD")):
        percent, note = gap_closed(*arguments)
        assert math.isnan(percent)
        assert "no better" in note
    assert "no mean ASSD" in gap_closed(NAN, 2.0, 1.0, "ASSD")[1]


def test_gap_closed_of_runs():
    runs = {
        "lower": [volume("1", (0.2, 0.4), (NAN, 6.0)), volume("2", (0.2, 0.4))],
        "ours": [volume("1", (0.6, 0.7)), volume("2", (0.6, 0.7))],
        "upper": [volume("1", (1.0, 1.0)), volume("2", (1.0, 1.0))],
    }
    gap = compare_runs(runs, "lower", "upper")["gap_closed"]
    assert list(gap) == ["ours"]
    assert gap["ours"]["a"]["Dice"] == {"percent": pytest.approx(50), "note": ""}
    assert gap["ours"][MEAN]["Dice"]["percent"] == pytest.approx(100 * 0.35 / 0.7)
    assert "undefined distance" in gap["ours"]["a"]["ASSD"]["note"]


@pytest.mark.parametrize(("run", "percent"), [(2.0, 100), (10.0, 0), (12.0, -25), (1.0, 112.5), (6.0, 50)])
def test_less_distance_is_better(run, percent):
    """ASSD falls from 10 mm of the lower bound to 2 mm of the upper."""
    assert gap_closed(run, 10.0, 2.0, "ASSD") == (pytest.approx(percent), "")
    assert "no better" in gap_closed(run, 2.0, 10.0, "ASSD")[1] and "no better" in gap_closed(run, 2.0, 2.0, "ASSD")[1]
    by_run = {"lower": (0.2, 10.0), "ours": (0.5, run), "upper": (0.8, 2.0)}
    runs = {name: [volume("1", (dice,), (assd,))] for name, (dice, assd) in by_run.items()}
    comparison = compare_runs(runs, "lower", "upper")
    for row in ("a", MEAN):
        assert comparison["gap_closed"]["ours"][row]["ASSD"]["percent"] == pytest.approx(percent)
    comparison["bounds"] = {"lower": "lower", "upper": "upper"}
    table = next(table for table in summary_tables(runs, comparison) if table["caption"].startswith("Gap closed"))
    assert table["rows"] == [
        [metric, "ours", shown, shown] for metric, shown in (("Dice", "50.0 %"), ("ASSD", f"{percent:.1f} %"))
    ]


def test_wilcoxon_by_hand():
    """Six pairs, all of one sign: the exact two-sided p is 2 / 2**6."""
    a = [volume(str(i), (0.5 + 0.01 * (i + 1),)) for i in range(6)]
    b = [volume(str(i), (0.5,)) for i in range(6)]
    test = wilcoxon(a, list(reversed(b)))
    assert test["n"] == test["n_nonzero"] == 6
    assert test["p"] == pytest.approx(2 / 64)
    assert test["mean_difference"] == pytest.approx(0.035)
    assert test["note"] == ""
    # the smallest difference has the other sign: signed-rank sum 1, so 4 of the 64 sign patterns are as extreme
    a[0] = volume("0", (0.49,))
    assert wilcoxon(a, b)["p"] == pytest.approx(4 / 64)


def test_wilcoxon_pairs_by_volume_not_by_position():
    a = [volume("x", (0.9,)), volume("y", (0.1,))]
    b = [volume("y", (0.1,)), volume("x", (0.9,))]
    assert wilcoxon(a, b)["n_nonzero"] == 0


def test_wilcoxon_says_where_n_is_too_small():
    test = wilcoxon([volume(str(i), (0.6 + i / 100,)) for i in range(4)], [volume(str(i), (0.5,)) for i in range(4)])
    assert test["p"] == pytest.approx(0.125)
    assert "too few pairs: 4" in test["note"]
    same = wilcoxon([volume("1", (0.5,))], [volume("1", (0.5,))])
    assert math.isnan(same["p"])
    assert "no volume differs" in same["note"]


def test_bad_comparisons():
    runs = {"a": [volume("1", (0.5,))], "b": [volume("1", (0.5,))]}
    for bounds, words in ((("c", "b"), "-lower c is not among the runs: a, b"), (("a",), "needs two bounds"),
                          (("a", "a"), "needs two bounds")):  # fmt: skip
        with pytest.raises(UDAError, match=words):
            compare_runs(runs, *bounds)
    with pytest.raises(UDAError, match="same volumes"):
        compare_runs({**runs, "c": [volume("2", (0.5,))]})
