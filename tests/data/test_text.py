"""What is not drawn becomes an escape; what is drawn stays, whatever its script."""

import sys
import unicodedata

import pytest
from ddetr.data.text import file_name, visible

HIDDEN = {
    "a\x1b]0;title\x07b": r"a\x1b]0;title\x07b",
    "\x1b[2J": r"\x1b[2J",
    "C1\x9b31m": r"C1\x9b31m",
    "two\r\nlines": r"two\r\nlines",
    "tab\t": r"tab\t",
    "\x00\x7f\x85": r"\x00\x7f\x85",
    "\u202eevil\u2066": r"\u202eevil\u2066",
    "line\u2028and\u2029paragraph": r"line\u2028and\u2029paragraph",
    "zero\u200bwidth\ufeff\u00ad\u2060": r"zero\u200bwidth\ufeff\xad\u2060",
    "file\udcff.jpg": r"file\udcff.jpg",
    "flag\U000e0067\U000e007f": r"flag\U000e0067\U000e007f",
    "filler\u3164\u115f": r"filler\u3164\u115f",
    "private\ue000 none\u0378 never\uffff": r"private\ue000 none\u0378 never\uffff",
    "join\u200ded \u200c": r"join\u200ded \u200c",
    "क\u200d\u200dष": r"क\u200d\u200dष",
    "many\ufe0f\ufe0f \ufe0f": "many\ufe0f" + r"\ufe0f \ufe0f",
    "\ufe0fat the start": r"\ufe0fat the start",
}
DRAWN = (
    "shot [v2].jpg", "[red]x", "$\\frac$", "C:\\new", "<script>", ":smile:", "名前", "ß", "é e\u0301", "שלום", "عربي",
    "می\u200cخواهم", "क्\u200dष", "1️⃣ ❤️",
    "👩\u200d🚀", "🏳️\u200d🌈", "👍🏽", "葛\U000e0100", "全角\u3000空白", "a\u00a0b", "۝",
)  # fmt: skip


@pytest.mark.parametrize("text", HIDDEN)
def test_what_is_not_drawn_becomes_an_escape(text):
    assert visible(text) == HIDDEN[text]


@pytest.mark.parametrize("text", DRAWN)
def test_text_of_every_script_stays(text):
    assert visible(text) == text


def test_no_code_point_breaks_a_line_or_commands_a_terminal():
    shown = visible("a".join(map(chr, range(sys.maxunicode + 1))))
    assert len(shown.splitlines()) == 1
    assert not {unicodedata.category(letter) for letter in set(shown)} & {"Cc", "Cs", "Zl", "Zp", "Co", "Cn"}
    embedding = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI", "BN"}
    assert not {unicodedata.bidirectional(letter) for letter in set(shown)} & embedding
    shown.encode()


def test_a_file_name_is_cut_where_a_file_system_takes_no_longer(tmp_path):
    assert file_name("photo", "_detections.jpg") == "photo_detections.jpg"
    for stem in ("n" * 251, "é" * 125, "名" * 84, "\udcff" * 251):
        name = file_name(stem, "_detections.jpg")
        assert name.endswith("_detections.jpg")
        assert len(name) > 90
        (tmp_path / name).touch()
