"""Walks over edited facts: the catalogue, chains of relations, the graph, the procedure."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from made import provenance

from knowpatch.errors import PatchError
from knowpatch.parts.chains import MARK, arranged, chain_of, marked, wanted_in
from knowpatch.parts.graph import Edge, Graph, name_key
from knowpatch.parts.procedure_kinds.walk import Walk, walk
from knowpatch.parts.procedures import Asking, check_procedure
from knowpatch.parts.relations import (
    SLOT,
    catalogue,
    named_in,
    own_relation,
    relation_of,
    written,
)
from knowpatch.patch import Patch, Procedure
from knowpatch.request import EditRequest

ALL = tuple(catalogue().values())


class Nothing:
    """An encoder to which no two texts are alike."""

    name = "nothing"

    def encode(self, texts, progress=None):
        return torch.eye(len(texts))


@pytest.fixture
def view():
    return SimpleNamespace(
        limits=SimpleNamespace(positions=None),
        kept=SimpleNamespace(encoders={"nothing": Nothing()}),
    )


def _edge(subject, relation, target, id=None):
    template = catalogue()[relation].says if relation in catalogue() else relation
    row = {"subject": subject, "template": template, "relation": relation}
    return {**row, "object": target, "id": id}


def _walk(*edges, parse="auto", fusion=False, hops=5, aliases=None):
    settings = {"parse": parse, "fusion": fusion, "hops": hops}
    return walk([_edge(*edge) for edge in edges], "nothing", aliases=aliases or {}, **settings)


def _said(procedures, view, question, knows=None):
    """The answer; the model says what `knows` has for the end of a prompt."""
    asking = Asking.begin(Walk.join(procedures), question, view)
    while asking.say is not None:
        last = asking.say.prompt.rpartition("Question: ")[2]
        asking.hear((knows or {}).get(last, "?"))
    return asking.answered


def _sources(answered):
    return [step.kind for step in answered.steps if step.kind in ("edit", "model")]


THREE = "What is the capital of the country where the sport of Ann was created?"


def test_the_cards_walk(view):
    """Edges where there are some, the model where not, what follows from what it says."""
    both = _walk(("Ann", "sport", "Bandy"), ("Bandy", "origin", "Chad"))
    capital = {"What is the capital of Chad?\nAnswer:": " Doba.\n"}
    found = _said([both], view, THREE, capital)
    assert (found.text, found.chain) == ("Doba", ("Bandy", "Chad", "Doba"))
    assert _sources(found) == ["edit", "edit", "model"]
    without = Walk.without(both, ["Bandy was created in the country of"])
    knows = {
        "In which country was Bandy created?\nAnswer:": "Eire",
        "What is the capital of Eire?\nAnswer:": "Ferns",
    }
    found = _said([without], view, THREE, knows)
    assert (found.text, _sources(found)) == ("Ferns", ["edit", "model", "model"])


def test_the_last_write_wins_and_taking_it_back_undoes_it(view):
    first, second = _walk(("Chad", "capital", "Doba")), _walk(("chad", "capital", "Fada"))
    question = "What is the capital of Chad?"
    said = [_said(p, view, question).text for p in ([first], [first, second], [second, first])]
    assert said == ["Doba", "Fada", "Doba"]
    kind = Walk.join([first, second])
    assert [edge.object for edge in kind.graph.history("The Chad", "capital")] == ["Doba", "Fada"]
    edits = [step for step in _said([first, second], view, question).steps if step.kind == "edit"]
    assert [(step.text, step.patch) for step in edits] == [("The capital of chad is Fada", 1)]


def test_names_are_one_in_all_their_forms():
    """Capitals, articles, compatible characters; aliases are united and hide no name."""
    assert name_key("The Hague ") == name_key("hague") == "hague"
    assert name_key("The") == "the"
    edges = (Edge("Ａnn", "spouse", "Bob", 0), Edge("Robert", "spouse", "Cid", 0))
    graph = Graph(edges, catalogue(), {"Ann": ["Annie", "Robert"], "ann": ["Nan"]})
    for name in ("Ann", "annie", "NAN"):
        assert graph.edge(name, "spouse").object == "Bob"
    assert graph.edge("Robert", "spouse").object == "Cid"
    assert graph.edge("Anna", "spouse") is None
    assert graph.start("Who is Annie married to?")[0] in ("Ann", "ann")


def test_the_longest_name_that_edges_leave_is_the_start():
    edges = (Edge("Help", "performer", "Ann", 0), Edge("Ann Lee", "spouse", "Help Desk", 0))
    graph = Graph(edges, catalogue(), {})
    assert graph.start("Help and Help Desk")[0] == "Help"
    assert graph.start("did Ann Lee help?")[0] == "Ann Lee"
    assert graph.start("the help desk")[0] == "Help"
    assert graph.start("helpless") is None
    assert graph.start("some Helps of no one")[1] == (5, 10)
    assert graph.start("some Helps of Ann")[0] == "Ann"


@pytest.mark.parametrize(
    ("question", "name", "chain"),
    [
        ("What is the capital of Chad?", "Chad", "capital"),
        ("Who is the spouse of Ann's child?", "Ann", "child spouse"),
        ('Who is the "Help!" performer married to?', "Help!", "performer spouse"),
        ("Which language is the official language of Chad?", "Chad", "language"),
        (
            "In which continent was the CEO of Ikea born?",
            "Ikea",
            "chief_executive birthplace continent",
        ),
        ("From which continent does Ann's sport originate?", "Ann", "sport origin continent"),
        ("Who founded the company that Ann works for?", "Ann", "employer founder"),
        (
            "The author of Emma is a citizen of which country's capital?",
            "Emma",
            "author citizenship capital",
        ),
        (
            "What is the capital of the country where the director/manager of the band that "
            "recorded Help! holds citizenship?",
            "Help!",
            "performer director citizenship capital",
        ),
    ],
)
def test_chains_are_read_from_the_entity_on(question, name, chain):
    at = question.index(name)
    text = marked(question, (at, at + len(name)))
    assert [relation.id for relation in chain_of(text, ALL)] == chain.split()


def _ids(chain):
    return " ".join(relation.id for relation in chain)


@pytest.mark.parametrize(
    ("kinds", "wanted", "read", "order"),
    [
        ("product", "", "director developer citizenship", "developer director citizenship"),
        ("product", "", "manufacturer country founder", "manufacturer founder country"),
        ("person", "", "origin sport continent", "sport origin continent"),
        ("person", "", "sport capital origin", "sport origin capital"),
        ("team", "continent", "head_coach continent sport", "head_coach sport continent"),
        ("person", "", "position sport position origin", "position position sport origin"),
        ("person", "", "spouse citizenship capital", "spouse citizenship capital"),
        ("work", "", "director citizenship", "director citizenship"),
        ("", "", "capital sport", "capital sport"),
        ("person", "city", "capital", "capital"),
        ("person", "city", "", ""),
        ("work", "", "capital " * 7, "capital " * 7),
    ],
)
def test_a_chain_is_put_in_the_order_that_its_kinds_allow(kinds, wanted, read, order):
    """As read if it fits, or nothing else fits better; moved no further than it must be."""
    chain = [catalogue()[one] for one in read.split()]
    assert _ids(arranged(chain, kinds.split(), wanted.split())) == order.strip()


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("In which city is it?", {"city"}),
        ("What is the name of the capital city of Chad?", {"city"}),
        ("What is the official language of Chad?", {"language"}),
        ("which country's capital is it?", set()),
        ("Where was Ann born?", {"city", "region", "country", "continent"}),
        ("Who made it?", {"person", "character", "organisation", "team"}),
        ("Whose is it?", set()),
        ("?", set()),
        ("", set()),
    ],
)
def test_what_kind_of_thing_a_question_asks_for(question, wanted):
    assert wanted_in(question) == wanted


def test_quotation_marks_go_with_the_name():
    assert marked('Of "Help!"\'s maker', (4, 9)) == f"Of {MARK}'s maker"
    assert marked("Of “Help!” itself", (4, 9)) == f"Of {MARK} itself"


def test_the_catalogue_is_whole():
    """Each relation has both wordings, is found by its own statement, and refers to others."""
    assert len(ALL) >= 45
    for relation in ALL:
        assert relation.says.count(SLOT) == relation.asks.count(SLOT) == 1, relation.id
        assert relation_of(relation.says, Nothing()) == relation
        assert relation_of(relation.asks, Nothing()) == relation
        assert written(relation.title, ALL, Nothing()) == relation
        assert {*relation.through, *relation.instead} <= set(catalogue())
        assert relation.of
        assert relation.gives


def test_longer_phrases_hide_shorter_ones():
    found = [one.relation.id for one in named_in("the country of origin of the film director", ALL)]
    assert found == ["origin", "film_director"]
    assert own_relation("Ann envies {}").phrases == ("Ann envies",)
    assert own_relation("Last year {} envied").phrases == ("Last year ... envied",)
    assert relation_of("{} envies", Nothing()).id == "{} envies"


def test_left_out_hops_are_bridged_where_kinds_say_so(view):
    """A song has no manager, its performer has; a country has a currency of its own."""
    song = _walk(("Help", "performer", "Ann"), ("Ann", "director", "Bob"))
    found = _said([song], view, "Who is the manager of Help?")
    assert (found.text, found.chain) == ("Bob", ("Ann", "Bob"))
    implied = _walk(("Ann", "position", "goalkeeper"), ("goalkeeper", "sport", "bandy"))
    assert _said([implied], view, "Which sport does Ann play?").text == "bandy"
    coach = _walk(("Ann", "occupation", "bandy coach"), ("bandy coach", "sport", "bandy"))
    assert _said([coach], view, "Which sport does Ann play?").text == "bandy"
    chad = _walk(("Chad", "head_of_state", "Ann"), ("Ann", "birthplace", "Oslo"))
    question = "What is the currency of Chad?"
    assert _said([chad], view, question, {question: "Franc"}).text == "Franc"


def test_left_out_hops_are_bridged_in_one_way_only():
    """To the relation itself; two ways to different ends that are as near say nothing."""
    founded = Edge("Toyota", "founder", "Ann", 0), Edge("Ann", "birthplace", "Oslo", 0)
    birthplace = catalogue()["birthplace"]

    def way(*more):
        return Graph((*founded, *more), catalogue(), {}).way("Toyota", birthplace)

    assert way() == list(founded)
    assert way(Edge("Toyota", "owner", "Ann", 0))[-1].object == "Oslo"
    assert way(Edge("Toyota", "owner", "Bob", 0), Edge("Bob", "birthplace", "Rome", 0)) == []
    nothing = Edge("Ajax", "head_coach", "Bob", 0), Edge("Bob", "citizenship", "Chad", 0)
    assert Graph(nothing, catalogue(), {}).way("Ajax", birthplace) == []


def test_a_chain_is_walked_in_the_order_that_it_can_have(view):
    """Read as its words stand, the director of a person's citizenship would be asked for."""
    procedure = _walk(
        ("Help", "performer", "Ann"), ("Ann", "director", "Bob"), ("Bob", "citizenship", "Chad")
    )
    asked = "Which is the director's country of citizenship, that of the performer of Help?"
    assert _said([procedure], view, asked).text == "Chad"


def test_the_catalogues_own_questions_are_about_one_relation(view):
    """Whatever other phrases are in them: a work's language is not a country's."""
    procedure = _walk(("Help", "work_language", "Welsh"), ("Help", "language", "Erse"))
    asked = catalogue()["work_language"].asks.replace(SLOT, "Help")
    assert _said([procedure], view, asked).text == "Welsh"


def test_what_is_meant_of_another_kind(view):
    """A sport comes from its country of origin; what is a country already stays."""
    sport = _walk(("Ann", "sport", "bandy"), ("bandy", "origin", "Chad"))
    asked = "Which is the country of citizenship of Ann's sport?"
    assert _said([sport], view, asked).text == "Chad"
    asked = "In the country of which country of origin is Ann's sport?"
    assert _said([sport], view, asked).text == "Chad"


def test_a_question_about_something_else_goes_to_the_model_as_it_came(view):
    procedure = _walk(("Chad", "capital", "Doba"))
    for question in ("Why?", "Chad?", "What is the currency of Chad?"):
        asking = Asking.begin(Walk.join([procedure]), question, view)
        while asking.say.prompt != question:
            asking.hear("something")
        asking.hear(" a plain answer\nand more")
        assert asking.answered.text == " a plain answer\nand more"
        assert asking.answered.chain == ()


def test_a_prompt_is_its_own_relation(view):
    """What the catalogue does not know is asked as it was edited, or by its words."""
    procedure = _walk(("Ann", "Last year {} envied", "Bob"))
    assert _said([procedure], view, "Last year Ann envied").text == "Bob"
    assert _said([procedure], view, "Whom, last year, did Ann envy?").text == "?"


def test_the_model_may_write_the_chain(view):
    edges = ("Ann", "sport", "bandy"), ("bandy", "origin", "Chad")
    asked = "Where do they do what Ann does?"
    knows = {f"{asked}\nRelations:": " sport > country of origin"}
    found = _said([_walk(*edges, parse="model")], view, asked, knows)
    assert (found.text, found.chain) == ("Chad", ("bandy", "Chad"))


HIDDEN = ("Ann", "spouse", "Bob"), ("Bob", "creator", "Cid"), ("Cid", "citizenship", "Chad")
CREATED = "What country is the creator of Ann a citizen of?"


def _relations(question, said):
    """A model that names these relations when it is asked for a question's."""
    return {f"{question}\nRelations:": said}


def _prompts(procedure, view, question, knows=None):
    """The ends of all that the model is asked."""
    asking, prompts = Asking.begin(Walk.join([procedure]), question, view), []
    while asking.say is not None:
        prompts.append(asking.say.prompt.rpartition("Question: ")[2])
        asking.hear((knows or {}).get(prompts[-1], "?"))
    return prompts


def test_the_model_reads_what_edits_do_not_carry(view):
    """A hop that the question leaves out, and a word that no phrase knows."""
    knows = _relations(CREATED, " spouse > creator > country of citizenship")
    found = _said([_walk(*HIDDEN)], view, CREATED, knows)
    assert (found.text, found.chain) == ("Chad", ("Bob", "Cid", "Chad"))
    assert found.steps[0].text == "Ann: spouse > creator > citizenship"
    maker = "Who is the spouse of the one who thought up Emma?"
    author = ("Emma", "author", "Ann"), ("Ann", "spouse", "Bob")
    edges = _walk(*author, ("Emma", "creator", "Cid"), ("Cid", "spouse", "Dot"))
    assert _said([edges], view, maker, _relations(maker, " author > spouse")).text == "Bob"
    assert _said([edges], view, maker).text == "?"


@pytest.mark.parametrize(
    "said",
    [
        " spouse > creator",
        " spouse > country of citizenship",
        " creator > country of citizenship",
        " spouse > creator > country of citizenship > continent",
        " spouse > creator > spouse > country of citizenship",
        " creator > spouse > country of citizenship",
        " nonsense > more of it",
        "",
    ],
)
def test_the_models_reading_only_adds_what_leads_to_an_answer_of_the_kind(view, said):
    """It leaves out nothing that is named, all of it is edited, its end is what is asked for."""
    found = _said([_walk(*HIDDEN)], view, CREATED, _relations(CREATED, said))
    assert found.text == "?"
    assert _sources(found)[-1] == "model"
    assert "edit" not in _sources(found)


@pytest.mark.parametrize("relation", [one for one in ALL if "person" in one.of], ids=lambda r: r.id)
def test_a_plain_question_is_never_read_into(view, relation):
    """Of a relation that an entity can have and no edit gives, whatever the model would say."""
    edges = [edge for edge in HIDDEN if edge[1] != relation.id]
    question = relation.asks.replace(SLOT, "Ann")
    prompts = _prompts(_walk(*edges), view, question, _relations(question, " spouse > creator"))
    assert not any(prompt.endswith("Relations:") for prompt in prompts)
    assert edges[0] == HIDDEN[0] or relation.id == "spouse"


def test_the_model_is_not_asked_for_what_phrases_say(view):
    """Neither where edits carry all of it, nor of what no phrase is found in."""
    question = "Of which country is the creator of Ann's husband a citizen?"
    assert _prompts(_walk(*HIDDEN), view, question) == []
    assert _prompts(_walk(*HIDDEN), view, "Is Ann well?") == ["Is Ann well?"]


def test_fusion_asks_the_model_behind_the_facts_where_the_walk_fails(view):
    question = "What of Chad?"
    procedure = _walk(("Chad", "capital", "Doba"), fusion=True)
    asking = Asking.begin(Walk.join([procedure]), question, view)
    told = "Fact: The capital of Chad is Doba.\nQuestion: What of Chad?\nAnswer:"
    assert asking.say.prompt == told
    asking.hear(" Doba.\n")
    assert asking.answered.text == "Doba"


def test_chains_are_bounded(view):
    procedure = _walk(("Ann", "child", "Bob"), hops=1)
    found = _said([procedure], view, "Who is the spouse of Ann's child?")
    assert (found.text, found.chain) == ("Bob", ("Bob",))


def test_files_and_damage(known, tmp_path):
    model = known("llama")
    request = EditRequest(prompt="The capital of Chad is", subject="Chad", target="Doba")
    procedure = _walk(("Chad", "capital", "Doba", "f"), aliases={"Chad": ("Tchad", "Tchad")})
    patch = Patch(provenance(model, request), procedure=procedure)
    again = Patch.load(patch.save(tmp_path / "p"))
    assert again.id == patch.id
    check_procedure(again.procedure)
    assert again.procedure.data["aliases"] == {"Chad": ["Tchad"]}
    row = procedure.data["edges"][0]
    for change in (
        {"edges": []},
        {"edges": [{**row, "object": ""}]},
        {"edges": [{**row, "more": 1}]},
        {"edges": 3},
        {"aliases": {"a": "b"}},
        {"parse": "guess"},
        {"fusion": 1},
        {"hops": 0},
        {"encoder": None},
    ):
        with pytest.raises(PatchError, match="damaged procedure of kind walk@1"):
            check_procedure(Procedure("walk@1", {**procedure.data, **change}))
    with pytest.raises(PatchError, match="damaged procedure"):
        check_procedure(Procedure("walk@1", procedure.data, {"x": torch.zeros(1)}))
