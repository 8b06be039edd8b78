"""A slice of checks/fuzz.py; `make fuzz` runs more."""

from pathlib import Path

import pytest

from checks import fuzz


@pytest.mark.parametrize("kind", list(fuzz.KINDS))
def test_bad_and_odd_input_ends_in_a_right_result_or_one_line(kind, tmp_path):
    codes = fuzz.run_cases(kind, range(100), tmp_path)
    assert codes[2] > 20 and (kind == "config" or codes[0] > 20)


def test_a_case_can_be_a_whole_process(tmp_path):
    assert fuzz.run_cases("nbest", range(1), tmp_path, as_process=True) in ({0: 1}, {2: 1})


def test_a_failure_is_noticed_and_shown(tmp_path, monkeypatch, capsys):
    """Without the check of offsets, wrong rows come out; the first case with such an offset is printed and kept."""
    monkeypatch.setattr(fuzz.prepare_drcd, "nearest", lambda context, text, start: max(start, 0))
    with pytest.raises(SystemExit) as stop:
        fuzz.run_cases("course", range(100), tmp_path)
    printed = capsys.readouterr().out
    assert stop.value.code == 1 and "FAILED course" in printed and "again: python checks/fuzz.py" in printed
    kept = Path(printed.split("its files: ")[1].split(";")[0])
    assert list(kept.glob("*.json"))
