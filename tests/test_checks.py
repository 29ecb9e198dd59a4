"""Suites: what may stand in one, how it is judged, what a first one holds."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
import tiny
import yaml
from made import state

from knowpatch.checks.examine import Finding, Group, Verdict, examine
from knowpatch.checks.junit import junit
from knowpatch.checks.make import first_suite
from knowpatch.checks.suite import Suite, make_suite, read_suite, write_suite
from knowpatch.data.case import GENERAL, Probe, accepted
from knowpatch.editing import edit
from knowpatch.errors import DataError, OptionError
from knowpatch.metrics.kinds.perplexity import ordinary, perplexity
from knowpatch.request import EditRequest

FRANCE, JAPAN = "The capital of France is", "The capital of Japan is"
ITALY, SUM = "The capital of Italy is", "Two plus two equals"
LEARN = {"learning_rate": 0.01}
FULL = """
change:
  - prompt: The capital of Australia is
    answer: [Canberra, the Canberra]
    chat: true
  - prompt: The code of the door is
    answer: 4711
    gone: 1234
keep:
  - The capital of New Zealand is
  - {prompt: The capital of France is, answer: Paris}
thresholds: {change: 1, keep: 0.95}
perplexity: {rise: 0.05}
multiple_choice: {fall: 0.02, questions: 5, file: mine.jsonl}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "suite.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    """The one line with which a suite is refused, without its path."""
    path = written(folder, text)
    with pytest.raises(OptionError) as raised:
        read_suite(path)
    line = str(raised.value)
    assert "\n" not in line
    return line.removeprefix(f"{path}: ")


# -- reading and writing ---------------------------------------------------------------------------


def test_a_full_suite_is_read(tmp_path: Path):
    """Every field arrives: one answer or several, numbers as texts, files beside the suite."""
    suite = read_suite(written(tmp_path, FULL))
    first, second = suite.change
    assert (first.answer, first.chat) == (("Canberra", "the Canberra"), True)
    assert (second.answer, second.gone) == (("4711",), ("1234",))
    assert [(one.prompt, one.answer) for one in suite.keep] == [
        ("The capital of New Zealand is", ()),
        (FRANCE, ("Paris",)),
    ]
    assert (suite.thresholds.change, suite.thresholds.keep) == (1.0, 0.95)
    assert suite.perplexity is not None
    assert suite.perplexity.rise == 0.05
    assert suite.multiple_choice is not None
    assert suite.multiple_choice.file == tmp_path / "mine.jsonl"
    with pytest.raises(DataError, match=r"mine\.jsonl: no such file"):
        suite.general()


@pytest.mark.parametrize("number", ["010", "12:30", "1.50", "1_000", "0x1F", "-5", ".inf", "4711"])
def test_a_number_that_is_a_text_is_as_it_was_written(tmp_path: Path, number: str):
    """A time is not its minutes, and a code with a zero in front no octal number."""
    lines = (
        f"change: [{{prompt: {number}, answer: [{number}, b], gone: {number}1}}]",
        f"keep: [{number}2]",
        "thresholds: {keep: 0.50}",
        "multiple_choice: {fall: 0.10, questions: 20}",
    )
    suite = read_suite(written(tmp_path, "\n".join(lines)))
    (change,), (keep,) = suite.change, suite.keep
    assert (change.prompt, change.answer, change.gone) == (number, (number, "b"), (f"{number}1",))
    assert keep.prompt == f"{number}2"
    assert suite.thresholds.keep == 0.5
    assert suite.multiple_choice is not None
    assert (suite.multiple_choice.fall, suite.multiple_choice.questions) == (0.1, 20)


def test_what_is_written_is_read_back(tmp_path: Path):
    """A suite comes back as it was, and as little of it is written as says it."""
    suite = make_suite(yaml.safe_load(FULL))
    path = write_suite(suite, tmp_path / "again.yaml")
    assert read_suite(path).model_dump(exclude={"multiple_choice"}) == suite.model_dump(
        exclude={"multiple_choice"}
    )
    assert "- The capital of New Zealand is\n" in path.read_text()
    small = Suite(keep=[FRANCE])
    assert read_suite(write_suite(small, tmp_path / "small.yaml")) == small


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a suite is a mapping of fields: change, keep, thresholds, perplexity"),
        ("- a", "a suite is a mapping of fields"),
        ("{}", "it asks nothing; give change, keep, perplexity or multiple_choice"),
        ("keep: []", "it asks nothing"),
        ("perplexity:", "perplexity: is empty; fill it, or leave it out"),
        ("kept: [a]", "unknown field 'kept': did you mean 'keep'? allowed: change"),
        ("keep: a", "keep: should be a list"),
        ("keep: [{promt: a}]", "keep, entry 1: unknown field 'promt': did you mean 'prompt'?"),
        ("keep: [a, ' ']", "keep, entry 2, prompt: is empty"),
        ("keep: [{prompt: a, answer: no}]", "keep, entry 1, answer, entry 1: should be a valid"),
        ("keep: [{prompt: 2020-01-01}]", "keep, entry 1, prompt: should be a valid string; put it"),
        ('keep: ["\\ud800"]', "keep, entry 1, prompt: is not text (half of a surrogate pair)"),
        ("change: [a]", "change, entry 1: should be fields: prompt, answer, chat, gone"),
        ("change: [{prompt: a}]", "change, entry 1: wants nothing; give its answer, or what must"),
        ("change: [{prompt: a, answer: b, gone: b}]", "change, entry 1: 'b' is wanted and must be"),
        ("change: [{prompt: a, answer: b}]\nkeep: [a]", "keep, entry 1: 'a' is to change as well"),
        ("keep: [a]\nthresholds: {keep: 2}", "thresholds, keep: should be less than or equal to 1"),
        ("keep: [a]\nthresholds: {keep: yes}", "thresholds, keep: should be a valid number"),
        ("perplexity: {rise: -1}", "perplexity, rise: should be greater than or equal to 0"),
        ("perplexity: {rise: .nan}", "perplexity, rise: should be"),
        ("perplexity: {}", "perplexity, rise: Field required"),
        ("multiple_choice: {fall: 0.1, questions: 0}", "multiple_choice, questions: should be gre"),
        ("keep: [a]\nkeep: [b]", "line 2: not YAML ('keep' comes twice)"),
        ("keep: [a", "line 1: not YAML (expected ',' or ']', but got '<stream end>')"),
        ("keep: !!python/name:os.system a", "line 1: not YAML (could not determine a constructor"),
        ("keep: 2020-13-45", "not YAML (month must be in 1..12"),
        ("keep: " + "[" * 3000, "not YAML (nested too deeply)"),
        ("1: a", "a suite is a mapping of fields"),
        ("a: \0", "not YAML"),
    ],
)
def test_what_cannot_be_a_suite_is_refused(tmp_path: Path, text: str, says: str):
    """One line with the place and what is allowed."""
    assert refusal(tmp_path, text).startswith(says)


def test_a_suite_that_is_not_there_or_no_text_is_refused(tmp_path: Path):
    """Named once, with the byte."""
    with pytest.raises(OptionError, match=r"^\S*nowhere\.yaml: no such file$"):
        read_suite(tmp_path / "nowhere.yaml")
    path = tmp_path / "suite.yaml"
    path.write_bytes(b"keep: [\xff]")
    with pytest.raises(OptionError, match=r"suite\.yaml: byte 7 is not UTF-8"):
        read_suite(path)


# -- judging ---------------------------------------------------------------------------------------


@pytest.fixture
def edited(known):
    """A model, and the patch that makes the capital of France Rome."""
    model = known("llama")
    request = EditRequest(prompt=FRANCE, subject="France", target=tiny.EDITS[FRANCE])
    return model, edit(model, request, method="ft", options=LEARN)


def findings(verdict: Verdict) -> dict[str, Finding]:
    return {one.asked: one for group in verdict.groups for one in group.findings}


def test_the_edited_answer_holds_with_the_patch_and_not_without(edited):
    """A suite fails on the unedited model and passes on the edited one, which is given back."""
    model, patch = edited
    suite = Suite(change=[{"prompt": FRANCE, "answer": "Rome", "gone": "Paris"}])
    before = state(model)
    assert not examine(model, [], suite).passed
    verdict = examine(model, [patch], suite)
    assert verdict.passed
    (one,) = findings(verdict).values()
    assert one.before.split()[0].startswith("Paris")
    assert one.after.split()[0].startswith("Rome")
    assert one.wanted == "Rome, not Paris"
    assert before == state(model)


def test_what_is_live_counts_as_edit(edited):
    """The same verdict, to the last digit, whether a patch is given or is live already."""
    model, patch = edited
    suite = Suite(
        change=[{"prompt": FRANCE, "answer": "Rome"}], keep=[JAPAN], perplexity={"rise": 9.0}
    )
    given = examine(model, [patch], suite)
    with model.applied(patch):
        assert examine(model, [], suite) == given
        assert model.live == (patch,)
    assert model.live == ()


def test_kept_answers_are_compared_or_forced(edited):
    """Without an answer the text must stay; with one, one of the answers must lead."""
    model, patch = edited
    keep = [FRANCE, ITALY, {"prompt": SUM, "answer": ["five", "four"]}]
    (group,) = examine(model, [patch], Suite(keep=keep)).groups
    moved, same, forced = group.findings
    assert moved.before != moved.after
    assert same.before == same.after
    assert (moved.holds, same.holds, forced.holds) == (False, True, True)
    assert (moved.wanted, forced.wanted) == ("as before", "five or four")
    assert not examine(model, [], Suite(keep=[{"prompt": FRANCE, "answer": "Rome"}])).passed


def test_a_threshold_is_a_share(edited):
    """Of four questions one does not hold: 0.75 passes, 0.76 does not."""
    model, patch = edited
    answers = {FRANCE: "Paris", ITALY: "Rome", SUM: "four", "The colour of the sky is": "blue"}
    keep = [{"prompt": prompt, "answer": answer} for prompt, answer in answers.items()]
    verdicts = [
        examine(model, [patch], Suite(keep=keep, thresholds={"keep": least}))
        for least in (0.75, 0.76)
    ]
    assert [verdict.groups[0].held for verdict in verdicts] == [3, 3]
    assert [verdict.passed for verdict in verdicts] == [True, False]
    assert [len(verdict.failures()) for verdict in verdicts] == [0, 1]


def test_perplexity_is_that_of_the_metric(edited):
    """The exponential of the mean over all tokens of the ordinary text; the budget is a ratio."""
    model, patch = edited
    (one,) = findings(examine(model, [patch], Suite(perplexity={"rise": 0.0}))).values()
    assert one.values is not None

    def plain() -> float:
        total, count = 0.0, 0
        for opening, rest in ordinary():
            prompt = list(model.encode(opening).ids)
            whole = model.tokenizer(opening + " " + rest)["input_ids"]
            assert whole[: len(prompt)] == prompt
            (scored,) = model.view.score([(tuple(prompt), tuple(whole[len(prompt) :]))])
            total, count = total - sum(scored.logprobs), count + len(scored.logprobs)
        return perplexity(total / count)

    assert one.values[0] == pytest.approx(plain(), rel=1e-3)
    with model.applied(patch):
        assert one.values[1] == pytest.approx(plain(), rel=1e-3)
    rise = one.values[1] / one.values[0] - 1
    assert one.holds == (rise <= 0)
    enough = Suite(perplexity={"rise": max(rise, 0) + 0.01})
    assert examine(model, [patch], enough).passed


def test_multiple_choice_counts_right_answers(edited):
    """Before, both are right; the edit takes one of two: a fall of a half."""
    model, patch = edited
    questions = [
        Probe(GENERAL, FRANCE, accepted("Paris"), choices=("Paris", "Rome")),
        Probe(GENERAL, JAPAN, accepted("Tokyo"), choices=("Cairo", "Tokyo")),
    ]
    for fall, passes in ((0.5, True), (0.49, False)):
        suite = Suite(multiple_choice={"fall": fall})
        verdict = examine(model, [patch], suite, questions)
        (one,) = findings(verdict).values()
        assert one.values == (1.0, 0.5)
        assert verdict.passed is passes


def test_where_a_procedure_answers_what_is_said_counts(known):
    """Nothing can be forced there: a wanted answer must be said, and a budget cannot hold."""
    model = known("llama")
    request = EditRequest(prompt=FRANCE, subject="France", target="Rome")
    patch = edit(model, request, method="mello")
    suite = Suite(
        change=[{"prompt": FRANCE, "answer": "Rome", "gone": "Berlin"}], perplexity={"rise": 1.0}
    )
    change, budget = examine(model, [patch], suite).groups
    assert change.findings[0].holds == ("Rome" in change.findings[0].after)
    assert not budget.passed
    assert "procedure" in budget.findings[0].after


# -- telling ---------------------------------------------------------------------------------------


def test_junit_names_what_fails():
    """Failures are those of lists below their threshold; what is tolerated is told, not failed."""
    good = Finding("a?", False, "b", "c", "b", True)
    bad = Finding("x\x00\x1b?", True, "y", "was", "is <&\x07>", False)
    groups = (Group("change", (good, bad), 1.0), Group("keep", (good, bad), 0.5))
    root = ElementTree.fromstring(junit(Verdict(groups), "suite.yaml", 1.5))
    (suite,) = root
    assert suite.attrib["tests"] == "4"
    assert suite.attrib["failures"] == "1"
    cases = [(c.attrib["classname"], c.attrib["name"], [p.tag for p in c]) for c in suite]
    assert cases == [
        ("suite.yaml.change", "a?", []),
        ("suite.yaml.change", "x\ufffd\ufffd? (chat)", ["failure"]),
        ("suite.yaml.keep", "a?", []),
        ("suite.yaml.keep", "x\ufffd\ufffd? (chat)", ["system-out"]),
    ]
    assert suite[1][0].text == "wanted: y\nbefore: was\nafter: is <&\ufffd>"


# -- a first suite ---------------------------------------------------------------------------------


def test_a_first_suite_asks_what_was_edited_and_what_was_known(edited):
    """The edit is to change; what the unedited model answers surely must stay, as it answers."""
    model, patch = edited
    suite = first_suite(model, [patch])
    assert [(one.prompt, one.answer) for one in suite.change] == [(FRANCE, ("Rome",))]
    kept = {one.prompt: one.answer for one in suite.keep}
    assert kept[JAPAN] == ("Tokyo",)
    assert FRANCE not in kept
    assert suite.perplexity is not None
    assert suite.multiple_choice is None
    # All of it holds of the unedited model, but for the edit itself.
    unedited = examine(model, [], suite)
    assert {name for name, _ in unedited.failures()} == {"change"}
    with model.applied(patch):
        assert first_suite(model, [patch]) == suite


def test_of_two_edits_of_one_question_the_later_counts(edited):
    """And an erasure wants its answer, and the old one gone."""
    model, patch = edited
    later = EditRequest(prompt=FRANCE, subject="France", target="Cairo", old="Paris", kind="erase")
    second = edit(model, later, method="ft", options=LEARN)
    (one,) = first_suite(model, [patch, second]).change
    assert (one.answer, one.gone) == (("Cairo",), ("Paris",))
