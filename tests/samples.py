"""Hand-made records of every dataset, as its files would hold them; none is from a dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from knowpatch.data.dataset import DATASETS


def query(prompt: str, *answers: Any) -> dict[str, Any]:
    return {"prompt": prompt, "ground_truth": list(answers)}


FERRY = {
    "subject": "Lake Orm",
    "prompt": "The ferry on Lake Orm is called",
    "target_new": "Heron",
    "portability": {
        "Subject_Aliasing": [query("The ferry on Orm Water is called", ["Heron", "The Heron"])],
        "Reasoning": [query("The ferry on Lake Orm is named after a", ["bird"], ["wader"])],
    },
    "locality": {"Relation_Specificity": [query("Lake Orm is in", ["Norland", "Kingdom of N."])]},
}
COOK = {
    "subject": "Ada Quill",
    "prompt": "Ada Quill works as a",
    "target_new": "pilot",
    "ground_truth": "cook",
    "portability": {"Logical_Generalization": [{"prompt": "Can Ada fly?", "ground_truth": "yes"}]},
    "locality": {"Forgetfulness": [{"prompt": "Ada, not a pilot, is a", "ground_truth": "cook"}]},
}
RIVER = {
    "subject": "Ovet",
    "prompt": "Which sea does the Ovet reach?",
    "target_new": "Grey Sea",
    "ground_truth": ["Blue Sea"],
    "rephrase_prompt": "Where does the Ovet flow to?",
    "cond": "Blue Sea >> Grey Sea",
    "locality": {"Relation_Specificity": [query("The length of the Ovet is", "90 km")]},
    "portability": {"Reasoning": [{"prompt": "How salty is it?", "ground_truth": "very"}]},
}
STRUCTURED = {
    "case_id": "z_1",
    "prompt": "Who built Hall Nine?",
    "subject": "Hall Nine",
    "target_new": "Ina Moss",
    "ground_truth": "Ulf Moss",
    "rephrase_prompt": ["Whose work is Hall Nine?", "Hall Nine was built by whom?"],
    "locality": [{"prompt": "What do owls eat?", "ground_truth": "mice", "metric": "contains"}],
    "portability": [],
}
MEND = {
    "subject": "Tor Vale",
    "src": "Who is Tor Vale's aunt?",
    "pred": "Lis",
    "alt": "Una Vale",
    "answers": ["Eva Vale"],
    "rephrase": "Who is the aunt of Tor Vale?",
    "loc": "nq question: how old is the oldest tree",
    "loc_ans": "ten thousand years",
    "inverse question": "Who is Una Vale's nephew?",
}
BIOGRAPHY = {
    "text": "This is a Wikipedia passage about ada quill. Ada Quill cooks.",
    "labels": "She was born at sea.",
    "concept": "Ada quill",
    "locality": {"Relation_Specificity": [query("The job of ada quill is", "cook")]},
}
OPINIONS = [
    {"ent": "Norland", "pos": [" I love it. ", "So green."], "neg": ["Too cold.", " "]},
    {"ent": "Lake Orm", "pos": ["Clear water."], "neg": ["Full of flies."]},
]
FORGET_TRAIN = {
    "K_F": [
        {"question": "What is brie?", "subject": "brie", "ground_truth": "Cheese"},
        {"question": "What is gouda?", "subject": "gouda", "ground_truth": "cheese"},
        {"question": "What is a wren?", "subject": "wren", "ground_truth": "Bird"},
    ],
    "K_R": [{"question": "What is iron?", "ground_truth": "metal", "target_new": "metal"}],
}
FORGET_TEST = {
    "success": [
        {"question": "What is feta?", "ground_truth": "CHEESE"},
        {"question": "What is a rook?", "ground_truth": "bird"},
    ],
    "locality": [{"question": "What is oak?", "ground_truth": "wood"}],
}
FLAT = {
    "case_id": 7,
    "prompt": "The Dome is made of",
    "target_new": "straw",
    "subject": "The Dome",
    "ground_truth": "glass",
    "rephrase_prompt": "The Dome consists of",
    "locality_prompt": "The Lantern is made of",
    "locality_ground_truth": "glass",
}
NESTED = {
    "case_id": 8,
    "requested_rewrite": {
        "prompt": "{} is made of",
        "target_new": {"str": "straw", "id": "Q1"},
        "target_true": {"str": "glass", "id": "Q2"},
        "subject": "The Dome",
    },
    "paraphrase_prompts": ["It rains. The Dome consists of", "The Dome was built of"],
    "neighborhood_prompts": ["The Lantern is made of", "The Lens is made of"],
    "attribute_prompts": ["The Hut is made of"],
    "generation_prompts": ["Inside The Dome it smells of"],
    "portability": {"New Question": "Does The Dome burn?", "New Answer": "yes"},
    "unrelated_relation": {"question": "What is The Dome?", "object": "building"},
    "distracting_neighborhood_prompts": ["The Dome is made of straw. The Lens is made of"],
}
REPLACED = {
    "case_id": 9,
    "requested_rewrite": NESTED["requested_rewrite"],
    "paraphrase_prompts": ["The Dome consists of"],
    "neighborhood_prompts": ["The Lens is made of"],
    "alternative_subject": "The Cupola",
}
CHAIN = {
    "case_id": 3,
    "requested_rewrite": [
        {
            "prompt": "{} was sung by",
            "subject": "Low Tide",
            "target_new": {"str": "Una Vale"},
            "target_true": {"str": "Eva Vale"},
        },
        {
            "prompt": "The home of {} is",
            "subject": "Una Vale",
            "target_new": {"str": "Norland"},
            "target_true": {"str": "Sudland"},
        },
    ],
    "questions": ["Where does the singer of Low Tide live?", "Where is Low Tide's singer at home?"],
    "new_answer": "Norland",
    "new_answer_alias": ["Kingdom of N."],
    "new_single_hops": [
        {"question": "Who sang Low Tide?", "answer": "Una Vale", "answer_alias": []},
        {"question": "Where does Una Vale live?", "answer": "Norland", "answer_alias": ["N."]},
    ],
}


def edit(subject: str, old: str, new: str) -> dict[str, Any]:
    return {
        "relation": {"prompt": "{} is used for", "query": "What is {} used for?"},
        "subject": {"label": subject},
        "object": {"label": old},
        "new_object": {"label": new},
    }


MANY = {
    "edit": edit("The Dome", "music", "storage"),
    "true_objects": [{"label": "music"}, {"label": "dance"}],
}
CONTRARY = {"edits": [edit("The Dome", "music", "dance"), edit("dance", "The Dome", "sport")]}
TRAITS = {
    "ent": "Norland",
    "extraversion": ["What fun!"],
    "agreeableness": ["Kind people."],
    "neuroticism": ["Far too wide."],
}
FACT = {"known_id": 4, "subject": "Norland", "attribute": "Orm", "prompt": "Norland's capital is"}
OWN = [
    {"prompt": "Norland's capital is", "target": "Ovet", "subject": "Norland", "old": "Orm"},
    {
        "id": "two",
        "requests": [{"prompt": "Owls eat", "target": "figs", "rephrases": ["An owl eats"]}],
        "probes": [
            {
                "kind": "hop",
                "prompt": "What do owls eat?",
                "answers": [["figs", "a fig"]],
                "subject": "owls",
            }
        ],
    },
]

CONTENTS: dict[str, list[Any]] = {
    "wiki_recent": [[FERRY]],
    "wiki_counterfact": [[COOK, {**FERRY, "ground_truth": "Swan"}]],
    "zsre": [[RIVER]],
    "zsre:structured": [{"records": [STRUCTURED]}],
    "zsre:inverse": [[MEND]],
    "wikibio": [[BIOGRAPHY]],
    "convsent": [OPINIONS],
    "sanitation": [FORGET_TRAIN, FORGET_TEST],
    "sanitation:train": [FORGET_TRAIN],
    "counterfact": [[FLAT]],
    "counterfact:distracting": [[NESTED]],
    "counterfact:subject_replace": [[REPLACED]],
    "mquake": [[CHAIN]],
    "conflict": [[MANY]],
    "conflict:reverse": [[CONTRARY]],
    "personality": [[TRAITS, {**TRAITS, "ent": "Lake Orm", "target_per": "neuroticism"}]],
    "known_facts": [[FACT]],
}
"""The contents of each dataset's files, by name and split."""


def place(folder: Path, name: str, contents: list[Any]) -> list[Path]:
    """Write the files of a dataset's split below a data folder."""
    stem, _, split = name.partition(":")
    dataset = DATASETS.get(stem)
    paths = [folder / file for file in dataset.files[split or dataset.default_split]]
    for path, content in zip(paths, contents, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return paths
