"""A judge: another model reads the free answer and says whether it is correct.

Optional. "The Mirage of Model Editing" (arXiv 2502.11177) judges by a large model, since a text
that contains the answer may also contradict it. The judge is any server that speaks the OpenAI chat
protocol: KNOWPATCH_JUDGE_URL is its address (".../v1"), KNOWPATCH_JUDGE_MODEL the model's name, and
KNOWPATCH_JUDGE_KEY the key, if it wants one. Nothing is sent where the address is not set; what is
sent is the question, the target and the answer. Without a judge a case is unscored, with the
reason. Verdicts of another judge or version are not comparable.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

from knowpatch.data.case import REWRITE, Case, Probe
from knowpatch.future import Future
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.metric import Result, Score, metric, register
from knowpatch.metrics.queries import Asked, per_probe, request_of, values_of
from knowpatch.stepping import Generated

URL, MODEL, KEY = "KNOWPATCH_JUDGE_URL", "KNOWPATCH_JUDGE_MODEL", "KNOWPATCH_JUDGE_KEY"
TIMEOUT, TRIES, FIRST_WAIT = 30.0, 3, 0.5
"""Seconds for one call; calls; seconds before the second, doubled for each further one."""
LONGEST_REPLY = 1 << 20

TASK = """You check one answer. Decide whether it gives the expected answer to the question.

Question: {question}
Expected answer: {expected}
Answer to check: {answer}

It is correct if it says the expected answer, in whatever words. It is incorrect if it says
something else, contradicts itself, or says nothing. The expected answer may be untrue in the real
world: go by it all the same. Reply with one word: CORRECT or INCORRECT."""


class Unjudged(Exception):
    """No verdict was had; the message is the reason, in one line."""


@dataclass(frozen=True)
class Judge:
    """A server that judges.

    Attributes:
        url: its address, up to "/v1"; model: the name it is asked for; key: if it wants one.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)

    @classmethod
    def named(cls, environment: Mapping[str, str]) -> Judge:
        """The judge that the environment names; Unjudged where it names none."""
        url, model = environment.get(URL, ""), environment.get(MODEL, "")
        if not url or not model:
            raise Unjudged(f"no judge: set {URL} and {MODEL}")
        if not url.startswith(("http://", "https://")):
            raise Unjudged(f"{URL} is no address: it begins with http:// or https://")
        return cls(url, model, environment.get(KEY, ""))

    def verdict(self, question: str, expected: str, answer: str) -> bool:
        """Whether `answer` is correct; Unjudged if the judge does not say."""
        task = TASK.format(question=question, expected=expected, answer=answer)
        reply = self._reply(
            {
                "model": self.model,
                "temperature": 0,
                "messages": [{"role": "user", "content": task}],
            }
        )
        said: list[str] = re.findall(r"\b(?:IN)?CORRECT\b", reply.upper())
        if not said:
            raise Unjudged("the judge said neither CORRECT nor INCORRECT")
        return said[-1] == "CORRECT"

    def _reply(self, body: Mapping[str, Any]) -> str:
        """What the judge says; tried again where that may help."""
        for left in reversed(range(TRIES)):
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                passing = error.code == 429 or error.code >= 500
                reason = f"the judge refuses (HTTP {error.code})"
            except (OSError, HTTPException) as error:
                passing, reason = True, f"the judge cannot be reached ({type(error).__name__})"
            except (ValueError, LookupError, TypeError):
                passing, reason = False, "the judge's reply is not a chat completion"
            if not passing or not left:
                raise Unjudged(reason)
            time.sleep(FIRST_WAIT * 2 ** (TRIES - 1 - left))
        raise AssertionError("unreachable: the last try returns or raises")

    def _post(self, body: Mapping[str, Any]) -> str:
        url = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
            found = json.loads(reply.read(LONGEST_REPLY))
        text = found["choices"][0]["message"]["content"]
        if not isinstance(text, str):
            raise TypeError("no text")
        return text


def _named() -> str:
    """Which judge the rows are of."""
    return " ".join(os.environ.get(name, "") for name in (URL, MODEL)).strip()


@metric(
    protocol="judge",
    about="a judge reads the free answer to the edited prompt as the target",
    setting=_named,
)
def success_judge(case: Case, before: Asker, after: Asker) -> Result | None:
    if not any(_expected(case, probe) for probe in case.of(REWRITE)):
        return None
    try:
        judge = Judge.named(os.environ)
    except Unjudged as unjudged:
        reason = str(unjudged)
        return lambda: Score.none(reason)

    def say(model: Asker) -> Asked[Future[Generated]]:
        return per_probe(
            case, REWRITE, lambda p: model.say(p.prompt) if _expected(case, p) else None
        )

    def correct(probe: Probe, said: Future[Generated]) -> float:
        answer = said.result().text.strip()
        return float(judge.verdict(probe.prompt, _expected(case, probe), answer))

    old, new = say(before), say(after)

    def result() -> Score:
        try:
            return Score(values_of(new, correct), values_of(old, correct))
        except Unjudged as unjudged:
            return Score.none(str(unjudged))

    return result


def _expected(case: Case, probe: Probe) -> str:
    """What the judge should expect: the first accepted answer, or an erasure's refusal."""
    request = request_of(case, probe)
    erased = request is not None and request.kind == "erase"
    return request.target if request and erased else (probe.expected or "").strip()


register("judge", success_judge)
