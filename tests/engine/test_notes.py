"""Notes: what replies wait for, and how they learn that it failed."""

from respkv.engine.notes import FAILURES_MAX, Note, Notes


def test_a_note_ends_with_its_last_part_and_tells_the_first_reason() -> None:
    notes, note, heard = Notes(), Note(3), []
    notes.add(note)
    note.waiters.append(lambda: heard.append("ended"))
    note.end()
    note.end("no space")
    assert not heard
    assert notes.find(1) is note
    note.end("later")
    assert heard == ["ended"]
    assert notes.find(1) is None
    assert notes.failure(1) == "no space"


def test_one_note_may_have_several_tickets() -> None:
    notes, note = Notes(), Note()
    notes.add(note)
    notes.add(note)
    assert notes.ticket == 2
    note.end("why")
    notes.add(note)  # it has ended: who comes now learns it at once
    assert [notes.failure(ticket) for ticket in (1, 2, 3)] == ["why"] * 3
    assert not len(notes)


def test_a_ticket_that_holds_or_never_was_has_no_failure() -> None:
    notes, note = Notes(), Note()
    notes.add(note)
    note.end()
    assert notes.failure(1) == notes.failure(99) == ""


def test_failures_are_remembered_within_bounds() -> None:
    notes = Notes()
    for _ in range(FAILURES_MAX + 1):
        note = Note()
        notes.add(note)
        note.end("x")
    assert notes.failure(1) == ""
    assert notes.failure(2) == "x"
