"""KnowEdit's teacher-forced scores as a plain loop: one record, one question, one pass at a time.

Written from the definitions alone, on raw records (parsed JSON) and a transformers tokenizer, to
hold knowpatch's batched metrics against; it shares no code with them. A model is any callable from
token ids (1, T) to logits (1, T, V).
"""

from __future__ import annotations

from statistics import fmean

import torch


def score(record, before, after, tokenizer) -> dict[str, float | None]:
    """One record's scores, None where it has no such question.

    `before` is the unedited model, `after` the edited one.
    """

    def accuracy(prompt, answers):
        found = []
        for answer in answers:
            if answer.strip():
                wanted, leading = forced(after, tokenizer, prompt, answer)
                found.append(share_equal(wanted, leading))
        return max(found) if found else None

    def unchanged(prompt, answers):
        if not answers or not answers[0].strip():
            return None
        _, old = forced(before, tokenizer, prompt, answers[0])
        _, new = forced(after, tokenizer, prompt, answers[0])
        return share_equal(old, new)

    wanted, leading = forced(after, tokenizer, record["prompt"], record["target_new"])
    return {
        "success": share_equal(wanted, leading),
        "portability": grouped(record.get("portability"), accuracy),
        "locality": grouped(record.get("locality"), unchanged),
    }


def grouped(groups, of) -> float | None:
    """Questions to their sub-kind's mean, sub-kinds to the record's."""
    means = []
    for questions in (groups or {}).values():
        values = [of(item["prompt"], aliases(item["ground_truth"])) for item in questions]
        values = [value for value in values if value is not None]
        if values:
            means.append(fmean(values))
    return fmean(means) if means else None


def aliases(truth) -> list[str]:
    """All accepted strings: a text, a list of texts, or a list of lists of aliases."""
    if isinstance(truth, str):
        return [truth]
    found = []
    for answer in truth:
        found += [answer] if isinstance(answer, str) else answer
    return found


def tokens(tokenizer, prompt, answer) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer as one text, and which of them are the answer's.

    A token belongs to the answer if it ends behind the prompt, even if it begins within it. Blanks
    around an answer (some records have one in front) are not a part of it.
    """
    answer = answer.strip()
    space = "" if prompt[-1].isspace() or answer[0] in ".,;:!?)" else " "
    encoded = tokenizer(prompt + space + answer, return_offsets_mapping=True)
    places = [i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt)]
    return encoded["input_ids"], places


def forced(model, tokenizer, prompt, answer) -> tuple[list[int], list[int]]:
    """The answer's tokens, and for each the likeliest one when all before it are given."""
    ids, places = tokens(tokenizer, prompt, answer)
    with torch.no_grad():
        logits = model(torch.tensor([ids]))
    leading = [int(logits[0, place - 1].argmax()) for place in places]
    return [ids[place] for place in places], leading


def share_equal(some, others) -> float:
    return sum(a == b for a, b in zip(some, others, strict=True)) / len(some)
