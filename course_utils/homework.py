"""The checks of the homework: what an answer is called with, what must come out, and what typical mistakes give.

A check file is a JSON index and a safetensors file beside it; nothing in it is code. In a notebook:

    check("hw1", 3, complete)
"""

import json
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from course_utils.probes import PROBES, Input, Outputs

CHECKS = Path(__file__).resolve().parent.parent / "notebooks" / "homework" / "checks"
RTOL, ATOL = 1e-4, 1e-5


@dataclass(frozen=True)
class Failure:
    """An answer that gave no outputs: the kind is the exception's name, or "unwritten", "changed", "time", ..."""

    kind: str
    text: str = ""


Outcome = Outputs | Failure


@dataclass(frozen=True)
class Question:
    """One function or class that a student writes, called through the probe of that name."""

    name: str
    points: int
    minutes: int
    returns: tuple[str, ...]
    probe: str = "direct"


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of one call, what must come out, and for each typical mistake its hint and what it gives here."""

    question: int
    name: str
    inputs: dict[str, Input]
    expected: Outputs = field(default_factory=dict)
    mistakes: tuple[tuple[str, Outcome], ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What is said of one answer: cases passed of all, the text for the student, and the hint within it."""

    passed: int
    total: int
    text: str
    hint: str = ""


# ------------------------------------------------------------------------------------------------- files


def save_checks(path: Path, questions: dict[int, Question], cases: list[Case]) -> None:
    """Write `path`.json and `path`.safetensors."""
    tensors: dict[str, Tensor] = {}

    def pack(value: Input | dict | Failure) -> object:
        if isinstance(value, dict):
            return {name: pack(one) for name, one in value.items()}
        if isinstance(value, Failure):
            return {"failure": value.kind}
        if not isinstance(value, Tensor):
            return value
        tensors[str(len(tensors))] = value.detach().contiguous().clone()
        return {"tensor": str(len(tensors) - 1)}

    rows = [
        {"question": case.question, "name": case.name, "inputs": pack(case.inputs), "expected": pack(case.expected)}
        | {"mistakes": [[hint, pack(outcome)] for hint, outcome in case.mistakes]}
        for case in cases
    ]
    index = {"questions": {number: vars(question) for number, question in questions.items()}, "cases": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def load_checks(path: Path) -> tuple[dict[int, Question], list[Case]]:
    """Read what `save_checks` wrote. Raises FileNotFoundError where there are no such checks."""
    if not path.with_suffix(".json").exists():
        raise FileNotFoundError(f"There are no checks at {path}.json: is the name of the homework right?")
    index = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    tensors = load_file(path.with_suffix(".safetensors"))

    def unpack(value: object) -> object:
        if not isinstance(value, dict):
            return value
        if set(value) == {"tensor"}:
            return tensors[value["tensor"]]
        if set(value) == {"failure"}:
            return Failure(value["failure"])
        return {name: unpack(one) for name, one in value.items()}

    questions = {
        int(number): Question(**(row | {"returns": tuple(row["returns"])}))
        for number, row in index["questions"].items()
    }
    cases = [
        Case(row["question"], row["name"], unpack(row["inputs"]), unpack(row["expected"]),
             tuple((hint, unpack(outcome)) for hint, outcome in row["mistakes"]))
        for row in index["cases"]
    ]  # fmt: skip
    return questions, cases


# ------------------------------------------------------------------------------------------------- calling


def failure_of(error: BaseException) -> Failure:
    """An exception of an answer as a Failure: its first line, and in which line of the answer it came up."""
    message = (str(error).strip().splitlines() or [""])[0][:300]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if frame.filename.startswith("<") or "ipykernel" in frame.filename]
    return Failure(type(error).__name__, f"{message} (line {own[-1]} of its cell)" if own else message)


def outcome_of(answer: Callable, question: Question, case: Case) -> Outcome:
    """What the answer gives for a case; whatever goes wrong in it comes back as a Failure."""
    inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in case.inputs.items()}
    torch.manual_seed(0)
    try:
        outputs = PROBES[question.probe](answer, question.returns, **inputs)
        outputs = {name: value.detach().cpu().clone() for name, value in outputs.items()}
    except NotImplementedError:
        return Failure("unwritten")
    except Exception as error:
        return failure_of(error)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and not torch.equal(value.detach(), case.inputs[name]):
            return Failure("changed", name)
    return outputs


# ------------------------------------------------------------------------------------------------- comparing


def number(value: Tensor) -> str:
    """One value as a student reads it."""
    return f"{value.item():.6g}"


def close(value: Tensor, expected: Tensor) -> Tensor:
    """Where two tensors of one shape agree, as booleans of that shape."""
    if not expected.is_floating_point():
        return value == expected
    return torch.isclose(value.double(), expected.double(), RTOL, ATOL, equal_nan=False)


def same(outcome: Outcome, other: Outcome) -> bool:
    """Whether two outcomes agree: all outputs within tolerance (NaN where NaN), or the same kind of failure."""
    if isinstance(outcome, Failure) or isinstance(other, Failure):
        return isinstance(outcome, Failure) and isinstance(other, Failure) and outcome.kind == other.kind
    if outcome.keys() != other.keys():
        return False
    pairs = [(outcome[name], other[name]) for name in other]
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return False
    return all(bool((close(a, b) | ((a != a) & (b != b))).all()) for a, b in pairs)


def difference(name: str, value: Tensor, expected: Tensor) -> str:
    """What is wrong with one output, as "expected ..., came ..."; empty where nothing is."""
    if value.shape != expected.shape:
        turned = value.ndim == 2 and value.T.shape == expected.shape
        return (
            f"expected {name} of shape {tuple(expected.shape)}, came {tuple(value.shape)}"
            f"{': rows and columns are exchanged' * turned}"
        )
    if value.dtype != expected.dtype:
        return f"expected {name} of {expected.dtype}, came {value.dtype}".replace("torch.", "")
    wrong = ~close(value, expected)
    if not wrong.any():
        return ""
    place = tuple(wrong.nonzero()[0].tolist())
    where = name + (f"[{', '.join(map(str, place))}]" if place else "")
    count = f" ({int(wrong.sum())} of {wrong.numel()} values differ)" if wrong.numel() > 1 else ""
    return f"expected {where} = {number(expected[place])}, came {number(value[place])}{count}{pattern(value, expected)}"


def pattern(value: Tensor, expected: Tensor) -> str:
    """A remark where all values are a multiple of what is expected, or off by the same number."""
    finite = value.isfinite() & expected.isfinite() & (expected != 0)
    if finite.all() and value.is_floating_point():
        ratio, shift = value.double() / expected.double(), value.double() - expected.double()
        if torch.allclose(ratio, ratio.flatten()[0], rtol=1e-3) and not math.isclose(ratio.flatten()[0], 0):
            return f"; it is {number(ratio.flatten()[0])} times what is expected"
        if value.numel() > 1 and torch.allclose(shift, shift.flatten()[0], rtol=1e-3, atol=1e-5):
            return f"; it is off by {number(shift.flatten()[0])} everywhere"
    return ""


def explain(outcome: Outcome, case: Case) -> str:
    """What is wrong with the outcome of a case; empty where it is right."""
    if isinstance(outcome, Failure):
        return {
            "unwritten": "expected an answer, came NotImplementedError: it is not written yet",
            "changed": f"expected {outcome.text} to be left as it is, came a changed one: work on a copy",
        }.get(outcome.kind, f"expected a result, came {outcome.kind}: {outcome.text}")
    if outcome.keys() != case.expected.keys():
        return f"expected {', '.join(case.expected)}, came {', '.join(outcome)}"
    found = (difference(name, outcome[name], value) for name, value in case.expected.items())
    return next(filter(None, found), "")


def hint_for(outcomes: list[Outcome], cases: list[Case], failed: int) -> str:
    """The mistake that gives the same in the failed case, and of several the one that agrees in most others."""

    def agreement(hint: str) -> int:
        # where a mistake happens to be right it is not kept
        given = [dict(case.mistakes).get(hint, case.expected) for case in cases]
        return sum(same(outcome, mistake) for outcome, mistake in zip(outcomes, given, strict=True))

    candidates = [hint for hint, mistake in cases[failed].mistakes if same(outcomes[failed], mistake)]
    return max(candidates, key=agreement, default="")


def judge(question: Question, cases: list[Case], outcomes: list[Outcome]) -> Verdict:
    """Compare the outcomes of all cases of a question with what must come out."""
    problems = [explain(outcome, case) for outcome, case in zip(outcomes, cases, strict=True)]
    passed = sum(not problem for problem in problems)
    if passed == len(cases):
        return Verdict(passed, passed, f"{question.name}: right in all {passed} cases.")
    failed = next(index for index, problem in enumerate(problems) if problem)
    hint = hint_for(outcomes, cases, failed)
    text = f"{question.name}: right in {passed} of {len(cases)} cases.\n"
    text += f'  In the case "{cases[failed].name}": {problems[failed]}.'
    return Verdict(passed, len(cases), text + f"\n  This looks like: {hint}" * bool(hint), hint)


def examine(homework: str, question: int, answer: Callable, folder: Path = CHECKS) -> Verdict:
    """The verdict of the public check on an answer. Raises ValueError for a question that is not there."""
    questions, cases = load_checks(folder / homework)
    if question not in questions:
        raise ValueError(f"{homework} has no question {question}: its questions are {', '.join(map(str, questions))}.")
    mine = [case for case in cases if case.question == question]
    return judge(questions[question], mine, [outcome_of(answer, questions[question], case) for case in mine])


def check(homework: str, question: int, answer: Callable) -> None:
    """Print what the public check says of an answer: check("hw1", 3, complete)."""
    verdict = examine(homework, question, answer)
    print(f"{'✓' if verdict.passed == verdict.total else '✗'} Question {question}, {verdict.text}")


def overview(homework: str) -> None:
    """Print the questions of a homework with their points and minutes."""
    questions, _ = load_checks(CHECKS / homework)
    total, minutes = sum(q.points for q in questions.values()), sum(q.minutes for q in questions.values())
    print(f"{homework}: {len(questions)} questions, {total} points, about {minutes} minutes")
    for place, q in questions.items():
        print(f"  {place}  {q.name:20s} {q.points:3d} points  {q.minutes:3d} minutes")
