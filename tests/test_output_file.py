"""Files in a folder that the user named are replaced only if they belong to an earlier report."""

from __future__ import annotations

from pathlib import Path

import pytest

from higen.errors import OutputError
from higen.output_file import check_own, check_writable, output_file

NAMES, MARK = ("report.md", "sheet.png"), r"^# a report"


@pytest.mark.parametrize("there", [{}, {"report.md": "# a report\n"}, {"report.md": "# a report", "sheet.png": "x"}])
def test_an_earlier_report_may_be_replaced(tmp_path: Path, there: dict[str, str]) -> None:
    for name, text in there.items():
        (tmp_path / name).write_text(text)
    check_own(tmp_path, NAMES, MARK)


@pytest.mark.parametrize("there", [{"report.md": "my thesis"}, {"sheet.png": "a photo"}, {"report.md": ""}])
def test_files_that_no_report_wrote_are_refused(tmp_path: Path, there: dict[str, str]) -> None:
    for name, text in there.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(OutputError, match=f"{next(iter(there))}: was not written by an earlier report: move it away"):
        check_own(tmp_path, NAMES, MARK)


def test_a_folder_in_place_of_a_report(tmp_path: Path) -> None:
    (tmp_path / "report.md").mkdir()
    with pytest.raises(OutputError, match=r"report\.md: was not written by an earlier report"):
        check_own(tmp_path, NAMES, MARK)


def test_a_report_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    for folder, message in (("file/report", "is not a folder"), ("x" * 300, "take this name"), ("a\0b", "NUL")):
        with pytest.raises(OutputError, match=message):
            check_own(Path(f"{tmp_path}/{folder}"), NAMES, MARK)
    check_own(tmp_path / "new" / "folder", NAMES, MARK)


def test_a_missing_folder_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist; make it first"), output_file(tmp_path / "nowhere" / "a.png"):
        pytest.fail("is not to be reached")


def test_a_file_that_another_process_removed_is_not_an_error(tmp_path: Path) -> None:
    check_writable(tmp_path / "gone.png")
    (tmp_path / "kept.png").touch(mode=0o400)
    with pytest.raises(OutputError, match=r"kept\.png: is read-only"):
        check_writable(tmp_path / "kept.png")
