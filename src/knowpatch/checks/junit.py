"""A verdict as JUnit XML, which build servers show: one test case for each question or budget.

What does not hold of a list that passes its threshold is no failure: build servers know no share.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from knowpatch.checks.examine import Finding, Verdict

FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold (section 2.2)."""


def junit(verdict: Verdict, name: str, seconds: float) -> bytes:
    """The XML file of one suite.

    Args:
        verdict: what came of it.
        name: the suite's.
        seconds: how long it took.
    """
    total = sum(len(group.findings) for group in verdict.groups)
    facts = {
        "name": name,
        "tests": str(total),
        "failures": str(len(verdict.failures())),
        "errors": "0",
        "time": f"{seconds:.3f}",
    }
    root = ElementTree.Element("testsuites", _plain(facts))
    suite = ElementTree.SubElement(root, "testsuite", _plain(facts))
    for group in verdict.groups:
        for one in group.findings:
            case = {"classname": f"{name}.{group.name}", "name": _called(one)}
            _tell(ElementTree.SubElement(suite, "testcase", _plain(case)), one, group.passed)
    ElementTree.indent(root)
    content: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def _called(one: Finding) -> str:
    return one.asked + (" (chat)" if one.chat else "")


def _tell(case: ElementTree.Element, one: Finding, tolerated: bool) -> None:
    """What was wanted and what came, where it does not hold."""
    if one.holds:
        return
    wanted = f"wanted: {one.wanted}"
    if tolerated:
        part = ElementTree.SubElement(case, "system-out")
    else:
        part = ElementTree.SubElement(case, "failure", _plain({"message": wanted}))
    lines = [wanted, f"before: {one.before}", f"after: {one.after}"]
    part.text = FORBIDDEN.sub("\ufffd", "\n".join(lines))


def _plain(facts: dict[str, str]) -> dict[str, str]:
    return {key: FORBIDDEN.sub("\ufffd", value) for key, value in facts.items()}
