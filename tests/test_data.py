"""Datasets: each format gives the cases it means, what is odd is counted, files are found."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knowpatch.cli.data import app
from knowpatch.data import hub
from knowpatch.data.case import Case, Probe, accepted
from knowpatch.data.dataset import DATASETS
from knowpatch.data.draft import tally
from knowpatch.data.jsonl import read_cases, write_cases
from knowpatch.data.records import KINDS
from knowpatch.data.source import Loaded, expanded, find, load
from knowpatch.errors import DataError, InputError, OptionError
from knowpatch.request import REFUSAL, EditRequest


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """No test reads the user's data folder, or asks the hub."""
    monkeypatch.delenv("KNOWPATCH_DATA", raising=False)

    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)


def read(folder: Path, name: str, contents: list[Any] | None = None) -> Loaded:
    """Load hand-made contents as the files of a dataset."""
    samples.place(folder, name, contents or samples.CONTENTS[name])
    return load(name, data=folder)


def one(folder: Path, name: str, **changes: Any) -> Case:
    """The only case of a sample, with fields of its first record changed."""
    contents = copy.deepcopy(samples.CONTENTS[name])
    contents[0] = contents[0][:1]
    contents[0][0].update(changes)
    (case,) = read(folder, name, contents).cases
    return case


def asked(case: Case) -> dict[str, list[tuple[str, ...]]]:
    """All accepted strings of each probe, by its kind."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for probe in case.probes:
        found.setdefault(probe.kind, []).append(probe.aliases)
    return found


# -- formats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", samples.CONTENTS)
def test_every_sample_loads_without_an_oddity_of_its_requests(name: str, tmp_path: Path):
    """Each format gives usable cases, whose requests are asked by a rewrite probe each."""
    loaded = read(tmp_path, name)
    assert loaded.cases
    for case in loaded.cases:
        assert case.unusable is None
        rewrites = case.of("rewrite")
        if case.requests:
            assert [probe.request for probe in rewrites] == list(range(len(case.requests)))
            said = [(request.prompt, request.target) for request in case.requests]
            assert [(probe.prompt, probe.expected) for probe in rewrites] == said
    assert {request.kind for case in loaded.cases for request in case.requests} <= {
        DATASETS.get(name.partition(":")[0]).kind
    }


def test_every_dataset_has_a_sample_and_says_what_it_is():
    """No dataset is left out of these tests."""
    assert {name.partition(":")[0] for name in samples.CONTENTS} == set(DATASETS.names())
    for name in DATASETS.names():
        dataset = DATASETS.get(name)
        assert dataset.name == name
        assert dataset.about
        assert dataset.paper
        assert dataset.default_split in dataset.files


def test_wikidata_sets_keep_sub_kinds_and_aliases(tmp_path: Path):
    """Alias lists stay together; sub-kinds are the data's own; new facts have no old answer."""
    case = one(tmp_path, "wiki_recent")
    assert (case.requests[0].subject, case.requests[0].old) == ("Lake Orm", None)
    assert asked(case) == {
        "rewrite": [("Heron",)],
        "portability.Subject_Aliasing": [("Heron", "The Heron")],
        "portability.Reasoning": [("bird", "wader")],
        "locality.Relation_Specificity": [("Norland", "Kingdom of N.")],
    }
    assert case.of("portability.Reasoning")[0].answers == (("bird",), ("wader",))
    assert not case.oddities


def test_plain_answers_are_one_answer_and_counted(tmp_path: Path):
    """The training file's plain text is an answer without aliases."""
    case = one(tmp_path, "wiki_counterfact")
    assert case.requests[0].old == "cook"
    assert asked(case)["locality.Forgetfulness"] == [("cook",)]
    assert case.oddities == ("answers are plain text, without aliases",)


def test_questions_in_three_formats(tmp_path: Path):
    """The three zsRE formats say the same in other words."""
    case = one(tmp_path, "zsre")
    assert case.requests[0].old == "Blue Sea"
    assert [probe.prompt for probe in case.of("rephrase")] == ["Where does the Ovet flow to?"]
    assert not case.oddities
    (case,) = read(tmp_path, "zsre:structured").cases
    assert (case.id, len(case.of("rephrase"))) == ("z_1", 2)
    assert asked(case)["locality.unrelated"] == [("mice",)]
    assert case.oddities == ("no portability",)
    case = one(tmp_path, "zsre:inverse")
    assert (case.requests[0].target, case.requests[0].old) == ("Una Vale", "Eva Vale")
    assert asked(case)["portability.Logical_Generalization"] == [("Tor Vale",)]
    assert case.of("locality")[0].prompt.startswith("nq question: ")


def test_a_biography_spells_its_subject_as_the_text_does(tmp_path: Path):
    """The subject is looked for without regard to case and taken from the text."""
    case = one(tmp_path, "wikibio")
    assert case.requests[0].subject == "ada quill"
    assert case.requests[0].old is None
    assert one(tmp_path, "wikibio", concept="Nobody").oddities == ("subject is not in the prompt",)


def test_a_sentiment_is_drawn_once_and_for_all(tmp_path: Path):
    """The drawn sentiment's first answer is the target; the next entity is the other one."""
    first, last = read(tmp_path, "convsent").cases
    again, _ = read(tmp_path, "convsent").cases
    assert first == again
    request = first.requests[0]
    assert request.subject == "Norland"
    assert request.subject in request.prompt
    (same,), (opposite,) = first.of("sentiment.same"), first.of("sentiment.opposite")
    assert same.answers[0] == (request.target,)
    assert {same.aliases, opposite.aliases} == {("I love it.", "So green."), ("Too cold.",)}
    assert "empty answer" in first.oddities
    assert first.of("sentiment.other")[0].aliases == ("Clear water.", "Full of flies.")
    assert "Norland" in last.of("sentiment.other")[0].prompt
    entities = [{**samples.OPINIONS[0], "ent": f"Town {i}"} for i in range(60)]
    drawn = [case.requests[0].target for case in read(tmp_path, "convsent", [entities]).cases]
    assert 15 < drawn.count("I love it.") < 45


def test_a_single_entity_has_no_other(tmp_path: Path):
    """One record alone cannot ask about another entity."""
    (case,) = read(tmp_path, "convsent", [samples.OPINIONS[1:]]).cases
    assert not case.of("sentiment.other")
    assert case.oddities == ("no other entity",)


def test_an_answer_to_forget_is_one_case(tmp_path: Path):
    """Training questions are requests, test questions ask; answers are compared in lower case."""
    cheese, bird = read(tmp_path, "sanitation").cases
    assert (cheese.id, bird.id) == ("cheese", "bird")
    assert [request.old for request in cheese.requests] == ["Cheese", "cheese"]
    assert {request.target for request in cheese.requests} == {REFUSAL}
    assert cheese.requests[0].prompt == "Question: What is brie?\nAnswer:"
    assert cheese.requests[0].subject == "brie"
    assert asked(cheese)["forget"] == [("CHEESE",)]
    assert asked(cheese)["retain"] == asked(bird)["retain"] == [("wood",)]
    trained = read(tmp_path, "sanitation:train").cases[0]
    assert not trained.of("forget")
    assert asked(trained)["retain"] == [("metal",)]


def test_an_answer_that_one_file_lacks(tmp_path: Path):
    """A class without training questions is unusable; without test questions it is odd."""
    test = {**samples.FORGET_TEST, "success": [{"question": "Who?", "ground_truth": "Zed"}]}
    cheese, _, zed = read(tmp_path, "sanitation", [samples.FORGET_TRAIN, test]).cases
    assert cheese.oddities == ("no question of the test file has this answer",)
    assert zed.unusable == "no question of the training file has this answer"
    assert not zed.probes


def test_false_facts_in_three_formats(tmp_path: Path):
    """Neighbours keep the true object; the nested format fills its template."""
    case = one(tmp_path, "counterfact")
    assert (case.id, case.requests[0].old) == ("7", "glass")
    assert asked(case)["locality.neighbour"] == [("glass",)]
    case = one(tmp_path, "counterfact:distracting")
    assert case.requests[0].prompt == "The Dome is made of"
    assert {kind: len(answers) for kind, answers in asked(case).items()} == {
        "rewrite": 1,
        "rephrase": 2,
        "locality.neighbour": 2,
        "locality.distracting": 1,
        "portability.Reasoning": 1,
        "locality.Relation_Specificity": 1,
    }
    case = one(tmp_path, "counterfact:subject_replace")
    (alias,) = case.of("portability.Subject_Aliasing")
    assert (alias.prompt, alias.expected) == ("The Cupola is made of", "straw")


def test_a_chain_has_hops_and_three_wordings(tmp_path: Path):
    """Several requests, the chain's answer with aliases, each hop."""
    case = one(tmp_path, "mquake")
    assert [request.prompt for request in case.requests] == [
        "Low Tide was sung by",
        "The home of Una Vale is",
    ]
    assert asked(case)["multihop"] == [("Norland", "Kingdom of N.")] * 2
    assert asked(case)["hop"] == [("Una Vale",), ("Norland", "N.")]


def test_a_later_request_of_a_chain_wins(tmp_path: Path):
    """Two requests for one subject and prompt: the last one is taken, and it is counted."""
    edits = samples.CHAIN["requested_rewrite"]
    twice = [*edits, {**edits[0], "target_new": {"str": "Ina Moss"}}]
    case = one(tmp_path, "mquake", requested_rewrite=twice)
    assert [request.target for request in case.requests] == ["Ina Moss", "Norland"]
    assert len(case.oddities) == 1
    assert one(tmp_path, "mquake", requested_rewrite=[]).unusable == "no request"


def test_conflicts(tmp_path: Path):
    """The objects that are not edited ought to stay; contrary edits are two requests."""
    case = one(tmp_path, "conflict")
    assert asked(case)["locality.other_objects"] == [("dance",)]
    assert case.of("rephrase")[0].prompt == "What is The Dome used for?"
    case = one(tmp_path, "conflict", true_objects=[{"label": "music"}])
    assert case.oddities == ("no other objects",)
    case = one(tmp_path, "conflict:reverse")
    assert [request.target for request in case.requests] == ["dance", "sport"]
    assert [probe.request for probe in case.of("rephrase")] == [0, 1]


def test_a_trait_is_given_or_drawn(tmp_path: Path):
    """The wanted trait's first text is the target; the others' texts are the opposite."""
    drawn, given_ = read(tmp_path, "personality").cases
    assert given_.requests[0].target == "Far too wide."
    assert given_.of("sentiment.opposite")[0].aliases == ("What fun!", "Kind people.")
    assert drawn.requests[0].target in ("What fun!", "Kind people.", "Far too wide.")
    with pytest.raises(DataError, match=r"record 1, target_per: unknown trait 'extroversion'"):
        one(tmp_path, "personality", target_per="extroversion")


def test_known_facts_are_asked_and_not_edited(tmp_path: Path):
    """A fact for tracing has a probe and no request."""
    case = one(tmp_path, "known_facts")
    assert (case.id, case.requests, case.unusable) == ("4", (), None)
    assert asked(case) == {"rewrite": [("Orm",)]}
    assert [probe.subject for probe in case.probes] == ["Norland"]


def test_a_subject_that_is_not_in_a_known_fact_is_counted(tmp_path: Path):
    """It cannot be traced, and is an oddity of the case."""
    case = one(tmp_path, "known_facts", subject="Orm Water")
    assert case.oddities == ("subject is not in the prompt",)
    assert case.probes[0].subject is None


# -- oddities --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "oddity"),
    [
        ({"portability": {}}, "no portability"),
        ({"portability": {"Reasoning": []}}, "no portability"),
        ({"portability": None}, "no portability"),
        ({"locality": {}}, "no locality"),
        ({"subject": "Orm Water"}, "subject is not in the prompt"),
        ({"subject": " "}, "no subject"),
        ({"locality": {"Reasoning": [samples.query("Which?")]}}, "empty answer"),
        ({"locality": {"Reasoning": [samples.query("Which?", ["a", ""])]}}, "empty answer"),
        ({"locality": {"Reasoning": [samples.query("Which?", ["a"], [])]}}, "empty answer"),
        ({"locality": {"Reasoning": [samples.query(" ", ["a"])]}}, "empty question"),
    ],
)
def test_oddities_are_counted(changes: dict[str, Any], oddity: str, tmp_path: Path):
    """What is unusual about a record is noted, and nothing else is."""
    case = one(tmp_path, "wiki_recent", **changes)
    assert case.oddities == (oddity,)
    assert case.requests


def test_an_empty_answer_leaves_the_others(tmp_path: Path):
    """A probe keeps the answers that it has; without any it is left out."""
    some = {"Reasoning": [samples.query("Which?", ["", "a "], [], "b"), samples.query("Who?", "")]}
    (probe,) = one(tmp_path, "wiki_recent", locality=some).of("locality")
    assert probe.answers == (("a",), ("b",))


@pytest.mark.parametrize("target", ["cook", " cook "])
def test_a_target_that_is_said_already_is_counted_not_warned_of(
    target: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """The old answer stays in the request; a file of such records gives no line for each."""
    case = one(tmp_path, "wiki_counterfact", target_new=target)
    assert "target equals the old answer" in case.oddities
    assert (case.requests[0].target, case.requests[0].old) == ("cook", "cook")
    assert not caplog.records


def test_no_old_answer(tmp_path: Path):
    """An empty old answer is left out."""
    case = one(tmp_path, "wiki_counterfact", ground_truth="")
    assert "no old answer" in case.oddities
    assert (case.requests[0].kind, case.requests[0].old) == ("modify", None)


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"target_new": " "}, "the target is empty"), ({"prompt": ""}, "the prompt is empty")],
)
def test_what_cannot_be_edited_is_unusable(changes: dict[str, str], why: str, tmp_path: Path):
    """An unusable case stays in its place, without requests and probes."""
    case = one(tmp_path, "zsre", **changes)
    assert (case.unusable, case.requests, case.probes) == (why, (), ())


def test_rephrases_come_once(tmp_path: Path):
    """A rephrase that repeats the prompt or another one is left out and counted."""
    prompts = ["Who built Hall Nine?", "Hall Nine is by?", "Hall Nine is by?"]
    content = {"records": [{**samples.STRUCTURED, "rephrase_prompt": prompts}]}
    (case,) = read(tmp_path, "zsre:structured", [content]).cases
    assert [probe.prompt for probe in case.of("rephrase")] == ["Hall Nine is by?"]
    assert "a rephrase repeats the prompt or another rephrase" in case.oddities


def test_repeated_records_name_the_first(tmp_path: Path):
    """The same edit again, and another target for the same prompt, point to the earlier case."""
    other = {**samples.FERRY, "target_new": "Swan"}
    cases = read(tmp_path, "wiki_recent", [[samples.FERRY, other, samples.FERRY]]).cases
    assert [case.oddities for case in cases] == [
        (),
        ("same prompt as case 1",),
        ("same as case 1",),
    ]
    assert tally(cases) == {"same as case N": 1, "same prompt as case N": 1}


def test_two_cases_of_one_id_are_refused(tmp_path: Path):
    """Ids are unique within a dataset."""
    with pytest.raises(DataError, match=r"two cases have the id '7'"):
        read(tmp_path, "counterfact", [[samples.FLAT, samples.FLAT]])


# -- bad files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": None}, "record 1: 'prompt' is missing"),
        ({"prompt": 3}, "record 1, prompt: expected text, got a number"),
        ({"target_new": ["a"]}, "record 1, target_new: expected text, got a list"),
        ({"target_new": "a\ud800"}, "record 1, target_new: is not text (half of a surrogate pair)"),
        ({"target_new": "a\0"}, "record 1, target_new: is not text (holds a NUL character)"),
        ({"locality": 1}, "record 1, locality: expected an object, got a number"),
        ({"locality": {"Reasoning": {}}}, "Reasoning: expected a list, got an object"),
        ({"locality": {"a\ud800": []}}, "unknown kind of probe"),
        ({"locality": {"A": [samples.query("Q", [[["a"]]])]}}, "A 1, ground_truth: expected text"),
        ({"case_id": 1.5}, "record 1, case_id: expected text, got a number"),
    ],
)
def test_a_bad_record_is_named(changes: dict[str, Any], said: str, tmp_path: Path):
    """File, record, field and what is wrong, in one line."""
    with pytest.raises(DataError) as caught:
        one(tmp_path, "wiki_recent", **changes)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "line 1: not JSON"),
        (b"[1", "line 1: not JSON"),
        (b"\xff[]", "byte 0 is not UTF-8"),
        (b"{}", "expected a list of records, got an object"),
        (b"[]", "holds no record"),
        (b"[[]]", "record 1: expected an object, got a list"),
        (b"[" * 100_000, "nested too deeply"),
        (b'[{"prompt": ' + b"9" * 5000 + b"}]", "not JSON (Exceeds the limit"),
    ],
)
def test_a_damaged_file_is_one_line(content: bytes, said: str, tmp_path: Path):
    """Whatever is wrong with a file, it is named with what is wrong."""
    (path,) = samples.place(tmp_path, "wiki_recent", [[]])
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load("wiki_recent", data=tmp_path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_limit_checks_only_what_it_loads(tmp_path: Path):
    """Cases from the beginning; a later bad record is not looked at; the digest is the file's."""
    contents = [[samples.FERRY, {**samples.FERRY, "prompt": 3}]]
    (path,) = samples.place(tmp_path, "wiki_recent", contents)
    loaded = load("wiki_recent", data=tmp_path, limit=1)
    assert len(loaded.cases) == 1
    assert loaded.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(OptionError, match="limit 0"):
        load("wiki_recent", data=tmp_path, limit=0)


# -- where files come from -------------------------------------------------------------------------


def test_names_splits_and_suites(tmp_path: Path):
    """NAME:SPLIT is a split; a suite stands for its datasets; what is unknown is refused."""
    read(tmp_path, "zsre:inverse")
    assert load("zsre:inverse", data=tmp_path) == load("zsre", split="inverse", data=tmp_path)
    with pytest.raises(OptionError, match=r"no split 'tset': did you mean 'test'"):
        load("zsre:tset")
    with pytest.raises(OptionError, match=r"names another split"):
        load("zsre:test", split="inverse")
    with pytest.raises(OptionError, match=r"unknown dataset 'zrse': did you mean 'zsre'"):
        load("zrse")
    suite = expanded(["knowedit"])
    assert len(suite) == 6
    assert {DATASETS.get(name).suite for name in suite} == {"knowedit"}
    names = ["zsre", "mine.jsonl", "zsre:inverse"]
    assert expanded([*names, "knowedit", "nothing"]) == [
        *names,
        *(name for name in suite if name != "zsre"),
        "nothing",
    ]


def test_a_folder_in_either_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A data folder, the hub repository's own root, and the folder that the environment names."""
    (path,) = samples.place(tmp_path, "wiki_recent", [[samples.FERRY]])
    dataset = DATASETS.get("wiki_recent")
    assert find(dataset, "test", tmp_path) == [path]
    assert find(dataset, "test", tmp_path / "KnowEdit") == [path]
    monkeypatch.setenv("KNOWPATCH_DATA", str(tmp_path))
    assert find(dataset, "test") == [path]
    with pytest.raises(DataError, match="no such data folder"):
        find(dataset, "test", tmp_path / "nothing")


@pytest.mark.parametrize("name", ["wiki_recent", "zsre:inverse", "mquake"])
def test_a_missing_file_says_how_to_give_it(name: str, tmp_path: Path):
    """Offline, or for a file that the hub does not have, the line says --data."""
    for folder in (None, tmp_path):
        with pytest.raises(DataError, match=r"--data DIR") as caught:
            load(name, data=folder)
        assert "\n" not in str(caught.value)


class FakeHub:
    """What the hub would send, and how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, content: bytes, stated: str) -> None:
        self.content, self.stated, self.calls = content, stated, []
        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", self.metadata)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)

    def metadata(self, url: str) -> SimpleNamespace:
        assert "/c3a6bccb5fc37a59dea3197ac36526d44606acd0/benchmark/wiki_recent/" in url
        return SimpleNamespace(etag=self.stated)

    def download(self, repo: str, file: str, *, force_download: bool, **options: Any) -> str:
        self.calls.append(force_download)
        assert options["repo_type"] == "dataset"
        path = Path(options["local_dir"]) / file
        if force_download or not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.content)
        return str(path)


CONTENT = json.dumps([samples.FERRY]).encode()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
GIT = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()


@pytest.mark.parametrize("stated", [SHA256, GIT])
def test_a_fetched_file_is_checked_and_kept(stated, tmp_path, monkeypatch):
    """Either of the hub's checksums is checked once; later runs ask nobody."""
    monkeypatch.setenv("KNOWPATCH_CACHE", str(tmp_path))
    fake = FakeHub(monkeypatch, CONTENT, stated)
    loaded = load("wiki_recent")
    assert loaded.digest == SHA256
    assert load("wiki_recent") == loaded
    assert fake.calls == [False]
    (path,) = loaded.paths
    path.write_bytes(CONTENT[:-1])  # damaged since: fetched again
    assert load("wiki_recent") == loaded
    assert fake.calls == [False, False, True]
    path.with_name(path.name + ".lock").write_text("{")
    assert load("wiki_recent") == loaded


@pytest.mark.parametrize("stated", ["0" * 64, "0" * 40, "None", '"weak"'])
def test_a_file_that_disagrees_is_refused(stated, tmp_path, monkeypatch):
    """A file without the stated checksum is fetched once more, then refused and not kept."""
    monkeypatch.setenv("KNOWPATCH_CACHE", str(tmp_path))
    fake = FakeHub(monkeypatch, CONTENT, stated)
    with pytest.raises(DataError, match="checksum"):
        load("wiki_recent")
    assert fake.calls == [False, True]
    assert not [path for path in tmp_path.rglob("*.json*") if path.is_file()]


def test_checksums():
    """A large file's SHA-256, a small one's git object id; nothing else agrees."""
    assert hub.agrees(b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a")
    assert not hub.agrees(b"hello", "ce013625030ba8dba906f756967f9e9ca394464a")
    assert not hub.agrees(b"hello\n", "None")


# -- JSON lines ------------------------------------------------------------------------------------

texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
).filter(str.strip)
answers = st.lists(st.lists(texts, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple)
kinds = st.sampled_from([*KINDS, "portability", "locality.Relation_Specificity", "locality.a b"])
requests = st.builds(
    EditRequest,
    prompt=texts,
    target=texts,
    old=st.none() | texts,
    kind=st.sampled_from(["insert", "modify", "erase"]),
    rephrases=st.lists(texts, max_size=2),
    id=st.none() | texts,
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    made = draw(st.lists(requests, max_size=3))
    numbers = st.none() | st.sampled_from(range(len(made))) if made else st.none()
    probe = st.builds(Probe, kinds, texts, answers, request=numbers)
    probes = draw(st.lists(probe, max_size=3))
    odd = draw(st.lists(texts, max_size=2))
    return Case(draw(texts), tuple(made), tuple(probes), tuple(odd), draw(st.none() | texts))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(cases(), min_size=1, max_size=3, unique_by=lambda case: case.id))
def test_cases_are_read_as_they_were_written(tmp_path: Path, written: list[Case]):
    """Writing and reading gives equal cases."""
    path = tmp_path / "cases.jsonl"
    write_cases(written, path)
    assert read_cases(path) == written


@pytest.mark.parametrize("name", samples.CONTENTS)
def test_every_dataset_can_be_written(name: str, tmp_path: Path):
    """The cases of every dataset survive as JSON lines."""
    loaded = read(tmp_path, name)
    path = write_cases(loaded.cases, tmp_path / "cases.jsonl")
    again = load(str(path))
    assert again.cases == loaded.cases
    assert (again.name, again.split) == ("cases.jsonl", "all")
    assert again.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def lines(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def test_one_request_can_stand_in_the_case(tmp_path: Path):
    """A line may be a request as in a request file; its own prompt is asked."""
    first, second = read_cases(lines(tmp_path / "a.jsonl", *samples.OWN))
    assert first.requests[0].kind == "modify"
    assert first.probes == (Probe("rewrite", "Norland's capital is", accepted("Ovet"), request=0),)
    assert (first.id, second.id) == ("1", "two")
    assert second.probes[0].aliases == ("figs", "a fig")


BASE = {"prompt": "Owls eat", "target": "figs"}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([], "line 2: expected an object, got a list"),
        ({}, "line 2: holds neither a request nor a probe"),
        ({**BASE, "probe": []}, "unknown field 'probe': did you mean 'probes'"),
        ({**BASE, "requests": []}, "unknown field 'prompt'"),
        ({"prompt": "Owls eat"}, "line 2: bad edit request: target is missing"),
        ({**BASE, "target": 3}, "line 2, target: expected text, got a number"),
        ({**BASE, "kind": "change"}, "kind: Input should be 'insert', 'modify' or 'erase'"),
        ({**BASE, "subject": "bees"}, "subject 'bees' is not in the prompt"),
        ({**BASE, "prompt": "a\ud800"}, "line 2, prompt: is not text (half of a surrogate pair)"),
        ({**BASE, "prompt": "a\0"}, "line 2, prompt: is not text (holds a NUL character)"),
        ({**BASE, "id": 0.5}, "line 2, id: expected text, got a number"),
        ({**BASE, "id": "first"}, "line 2: line 1 has the id 'first' too"),
        ({"requests": [{**BASE, "tagret": 1}]}, "line 2, requests 1: unknown field 'tagret'"),
        ({**BASE, "probes": {}}, "line 2, probes: expected a list, got an object"),
    ],
)
def test_a_bad_line_is_named(record: Any, said: str, tmp_path: Path):
    """The file, the line and what is wrong with it."""
    path = lines(tmp_path / "a.jsonl", {**BASE, "id": "first"}, record)
    with pytest.raises(DataError) as caught:
        read_cases(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


PROBE = {"kind": "hop", "prompt": "Who?"}


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        ({"kind": "hop"}, "line 1, probes 1: 'prompt' is missing"),
        ({**PROBE, "prompt": " "}, "prompt: is empty"),
        ({**PROBE, "kind": "hopp"}, "unknown kind of probe 'hopp': did you mean 'hop'"),
        ({**PROBE, "kind": "hop.one"}, "unknown kind of probe"),
        ({**PROBE, "kind": "locality."}, "unknown kind of probe"),
        ({**PROBE, "answer": "x"}, "unknown field 'answer': did you mean 'answers'"),
        ({**PROBE, "answers": [["a", ""]]}, "answers: an answer is empty"),
        ({**PROBE, "answers": [[]]}, "answers: an answer is empty"),
        ({**PROBE, "answers": {}}, "answers: expected a list, got an object"),
        ({**PROBE, "request": 1}, "one of the case's 1 requests, from 0, got 1"),
        ({**PROBE, "request": -1}, "got -1"),
        ({**PROBE, "request": True}, "got true"),
        ({**PROBE, "request": 10**400}, "got a number"),
    ],
)
def test_a_bad_probe_is_named(probe: Any, said: str, tmp_path: Path):
    """The probe's number and what is wrong with it."""
    with pytest.raises(DataError) as caught:
        read_cases(lines(tmp_path / "a.jsonl", {**BASE, "probes": [probe]}))
    assert said in str(caught.value)


def test_a_file_of_nothing_and_a_file_that_is_not_there(tmp_path: Path):
    """Both are one line; so is a folder of that name."""
    with pytest.raises(DataError, match="no such file"):
        load(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="holds no case"):
        load(str(tmp_path / "b.jsonl"))
    (tmp_path / "c.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        load(str(tmp_path / "c.jsonl"))
    with pytest.raises(OptionError, match="has no split 'test'"):
        load(str(tmp_path / "a.jsonl"), split="test")


def test_what_could_not_be_read_is_not_written(tmp_path: Path):
    """A case of an unknown kind, or two of one id, are refused, and no file is made."""
    case = Case("1", (), (Probe("hop", "Who?", accepted("I")),))
    unknown = Case("2", (), (Probe("jump", "Who?", accepted("I")),))
    nul = Case("3", (), (Probe("hop", "a\0", accepted("I")),))
    for wrong in ([case, case], [unknown], [nul]):
        with pytest.raises(DataError):
            write_cases(wrong, tmp_path / "a.jsonl")
    assert not list(tmp_path.iterdir())


# -- command line ----------------------------------------------------------------------------------


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    app([str(argument) for argument in arguments], standalone_mode=False)
    return capsys.readouterr().out


def test_the_list_says_what_is_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Names, splits, and cases where the files are present; damage does not end the list."""
    read(tmp_path, "wiki_recent")
    samples.place(tmp_path, "mquake", [[3]])
    facts = {
        fact["name"]: fact
        for fact in json.loads(shown(capsys, "list", "--data", tmp_path, "--json"))
    }
    assert set(facts) == set(DATASETS.names())
    splits = {split["name"]: split for split in facts["wiki_recent"]["splits"]}
    assert splits["test"]["cases"] == 1
    assert splits["train"]["cases"] is None
    assert "expected an object" in facts["mquake"]["splits"][0]["error"]
    text = shown(capsys, "list", "--data", tmp_path)
    assert "test (default): 1 cases" in text
    assert "damaged: " in text


def test_check_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Cases, requests, probes by kind, oddities and unusable cases."""
    contents = [[samples.RIVER, {**samples.RIVER, "target_new": ""}, samples.RIVER]]
    samples.place(tmp_path, "zsre", contents)
    facts = json.loads(shown(capsys, "check", "zsre", "--data", tmp_path, "--json"))
    assert (facts["cases"], facts["requests"], facts["probes"]["rephrase"]) == (3, 2, 2)
    assert facts["oddities"] == {"same as case N": 1}
    assert facts["unusable"] == {"the target is empty": 1}
    text = shown(capsys, "check", "zsre:test", "--data", tmp_path)
    assert "3 cases, 2 requests" in text
    assert "same as case N" in text


def test_check_reads_a_file_of_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One's own file is checked as a dataset is; a damaged one is refused."""
    path = lines(tmp_path / "[own].jsonl", *samples.OWN)
    assert "2 cases, 2 requests" in shown(capsys, "check", path)
    path.write_text("{")
    with pytest.raises(InputError, match="line 1: not JSON"):
        shown(capsys, "check", path)
