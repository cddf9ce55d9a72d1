"""Marks stand at the right words, lose no character of the text, and nothing in a text acts."""

import pytest

from src.analysis import faithfulness, marks

DIALOGUE = (
    "Doctor: Any allergies?\nPatient: To penicillin. I'm sixty three, my knee's been hurting for two weeks, 100 mg."
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "Takes 99 mg of Tetracycline, which causes hives.",
            "Takes* [99?] mg of [Tetracycline?], which causes* hives*.",
        ),
        ("Is twenty three.", "Is [twenty three?]."),  # 20 and 3 alone would be two other numbers
        ("Sixty-three, knee hurts for 2 weeks, 1,500 mg.", "Sixty-three, knee hurts for 2 weeks, [1,500?] mg."),
        ("Allergies: penicillin, Allergy to penicillins", "Allergies: penicillin, Allergy to penicillins"),
        ("", ""),
    ],
)
def test_a_terminal_shows_what_the_dialogue_lacks(text, shown):
    assert marks.marked_text(text, DIALOGUE) == shown


def test_every_flagged_number_is_marked_and_no_character_is_lost():
    text = " 41 forty one and forty-one; one twenty over eighty,\n\n 7 1.5 (2019)"
    found = marks.pieces(text, DIALOGUE, "forty")
    assert "".join(piece for piece, _ in found) == text
    flagged = faithfulness.unsupported(text, DIALOGUE)
    marked = " ; ".join(piece for piece, kind in found if kind == "number")
    assert flagged and flagged <= faithfulness.facts(marked)


def test_words_of_the_reference_are_one_mark_and_warnings_come_before_them():
    found = marks.pieces("Takes 99 mg daily.", DIALOGUE, "He takes 99 mg daily")
    assert found == [("Takes", "shared"), (" ", ""), ("99", "number"), (" ", ""), ("mg daily", "shared"), (".", "")]
    assert marks.pieces("mg, x", DIALOGUE, "mg")[0] == ("mg", "shared")  # without the comma


def test_html_is_escaped_and_says_its_kind():
    html = marks.marked_html("<b>99</b> & \x1b[8J", DIALOGUE, "<b>")
    assert html == (
        '&lt;<span class="m-shared">b</span>&gt;<span class="m-number">99</span>&lt;/<span class="m-shared">b</span>'
        '&gt; &amp; ␛[<span class="m-number">8J</span>'
    )


def test_unseen_characters_are_written_out():
    assert marks.visible("a\x1b[31m\x00\x7f\r\x9b") == "a␛[31m␀␡␍‹U+009B›"
    hidden = "\u202e\u2066\u200b\u200f\ufeff\u00ad\u2028\ud800\u3164\U000e0041"
    assert marks.visible(hidden) == "".join(f"‹U+{ord(c):04X}›" for c in hidden)
    for kept in ("two\nlines\tand a tab", "naïve Łódź 日本 ½", "👨\u200d👩\u200d👧 ❤\ufe0f"):
        assert marks.visible(kept) == kept
    assert marks.visible("a\u200db") == "a‹U+200D›b"


def test_marks_made_for_a_terminal_hold_no_control_character():
    text = "Takes \x1b]0;title\x07 99\u202e mg"
    shown = marks.marked_text(text, DIALOGUE)
    assert not any(ord(c) < 32 or c == "\u202e" for c in shown) and "[99?]" in shown
