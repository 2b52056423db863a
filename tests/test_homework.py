"""The checks of the homework are themselves checked: wrong answers are refused with their hint, right ones pass."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "homework"))
source = pytest.importorskip("homework_source", reason="copies for students hold no solutions")
if not source.solution_path("hw1").exists():
    pytest.skip("copies for students hold no solutions", allow_module_level=True)

from course_utils.homework import (  # noqa: E402
    CHECKS,
    Case,
    Failure,
    Question,
    check,
    examine,
    judge,
    load_checks,
    outcome_of,
    overview,
    same,
    save_checks,
)

NAMES = [path.stem for path in sorted((HERE / "homework").glob("hw[0-9].py"))]
HIDDEN = source.solution_path("hw1").parent
WRONG = [(n, q, i) for n in NAMES for q, spec in source.book(n).items() for i in range(len(spec.wrong))]
RIGHT = [(n, q, i) for n in NAMES for q, spec in source.book(n).items() for i in range(len(spec.right))]


def verdict_of(checks: Path, place: int, answer) -> object:
    questions, cases = load_checks(checks)
    mine = [case for case in cases if case.question == place]
    return judge(questions[place], mine, [outcome_of(answer, questions[place], case) for case in mine])


# --------------------------------------------------------------------------------------- every question


@pytest.mark.parametrize(("name", "place", "index"), WRONG)
def test_a_wrong_answer_is_refused_with_its_hint(name: str, place: int, index: int) -> None:
    wrong = source.book(name)[place].wrong[index]
    for checks in (CHECKS / name, HIDDEN / f"{name}_hidden"):
        verdict = verdict_of(checks, place, wrong)
        assert verdict.passed < verdict.total and verdict.hint == source.hint_of(wrong)
        assert "expected" in verdict.text and "came" in verdict.text and verdict.hint in verdict.text


@pytest.mark.parametrize(("name", "place", "index"), RIGHT)
def test_another_right_answer_is_accepted(name: str, place: int, index: int) -> None:
    for checks in (CHECKS / name, HIDDEN / f"{name}_hidden"):
        verdict = verdict_of(checks, place, source.book(name)[place].right[index])
        assert verdict.passed == verdict.total, verdict.text


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes_on_inputs_of_any_seed(name: str) -> None:
    questions, answers = source.questions_of(name)
    for seed in (1, 2):
        _, cases = source.cases_of(name, seed)
        for place, spec in source.book(name).items():
            mine = [case for case in cases if case.question == place]
            for answer in (answers[place], *spec.right):
                got = [outcome_of(answer, questions[place], case) for case in mine]
                assert judge(questions[place], mine, got).passed == len(mine)
            for answer in spec.wrong:
                got = [outcome_of(answer, questions[place], case) for case in mine]
                assert judge(questions[place], mine, got).hint == source.hint_of(answer)


@pytest.mark.parametrize("name", NAMES)
def test_size_of_a_homework(name: str) -> None:
    questions, _ = load_checks(CHECKS / name)
    assert 5 <= len(questions) <= 7 and sum(q.points for q in questions.values()) == 100
    for spec in source.book(name).values():
        hints = [source.hint_of(wrong) for wrong in spec.wrong]
        assert len(set(hints)) == len(hints) >= 6 and len(spec.right) >= 2


# --------------------------------------------------------------------------------------- one source


@pytest.mark.parametrize("name", NAMES)
def test_starter_and_checks_are_made_from_the_solution(name: str, tmp_path: Path) -> None:
    source.make(name, to=tmp_path)
    made, kept = tmp_path / "notebooks" / "homework", CHECKS.parent
    assert (made / f"{name}.ipynb").read_text() == (kept / f"{name}.ipynb").read_text(), "make the starters anew"
    for path in (f"checks/{name}", f"solutions/{name}_hidden"):
        (questions, cases), (old_questions, old_cases) = load_checks(made / path), load_checks(kept / path)
        assert questions == old_questions and len(cases) == len(old_cases)
        for case, old in zip(cases, old_cases, strict=True):
            assert (case.question, case.name) == (old.question, old.name) and same(case.expected, old.expected)
            assert [hint for hint, _ in case.mistakes] == [hint for hint, _ in old.mistakes]


@pytest.mark.parametrize("name", NAMES)
def test_hidden_inputs_are_fresh(name: str) -> None:
    public, hidden = load_checks(CHECKS / name)[1], load_checks(HIDDEN / f"{name}_hidden")[1]
    for case, other in zip(public, hidden, strict=True):
        pairs = [(value, other.inputs[key]) for key, value in case.inputs.items()]
        assert not all(a.shape == b.shape and torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_a_starter_holds_no_answer(name: str) -> None:
    cells = json.loads((CHECKS.parent / f"{name}.ipynb").read_text())["cells"]
    marked = ["".join(cell["source"]) for cell in cells if "#| question" in "".join(cell["source"])]
    assert len(marked) == len(load_checks(CHECKS / name)[0])
    for text in marked:
        (function,) = ast.parse(text).body
        assert all(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Raise | ast.Expr)
                   for node in ast.iter_child_nodes(function) if isinstance(node, ast.stmt))  # fmt: skip
        assert "raise NotImplementedError" in text
    assert not any(cell.get("outputs") for cell in cells)


# --------------------------------------------------------------------------------------- what is said


QUESTION = Question("double", 10, 5, ("y",))
CASE = Case(1, "two rows", {"x": torch.ones(2, 3)}, {"y": torch.full((2, 3), 2.0)})


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: (2 * x).T, "expected y of shape (2, 3), came (3, 2): rows and columns are exchanged"),
        (lambda x: (2 * x).double(), "expected y of float32, came float64"),
        (lambda x: 2 * x / 0 * 0, "came nan (6 of 6 values differ)"),
        (lambda x: x, "it is 0.5 times what is expected"),
        (lambda x: None, "y must be a tensor, not NoneType: is there a return?"),
        (lambda x: x.mul_(2), "expected x to be left as it is"),
        (lambda x: x @ x, "RuntimeError"),
        (lambda x: (2 * x).tolist(), "not list"),
        (lambda: 1, "TypeError"),
    ],
)
def test_what_is_said_of_an_answer_that_is_no_known_mistake(answer, words: str) -> None:
    verdict = judge(QUESTION, [CASE], [outcome_of(answer, QUESTION, CASE)])
    assert verdict.passed == 0 and words in verdict.text and verdict.hint == ""


def test_an_answer_that_is_not_written() -> None:
    def double(x):
        raise NotImplementedError

    assert "not written yet" in judge(QUESTION, [CASE], [outcome_of(double, QUESTION, CASE)]).text


def test_a_check_prints_its_verdict(capsys: pytest.CaptureFixture) -> None:
    place, spec = next(iter(source.book("hw1").items()))
    check("hw1", place, spec.right[0])
    check("hw1", place, spec.wrong[0])
    good, bad = capsys.readouterr().out.strip().split("✗")
    assert good.startswith("✓ Question 1") and "This looks like: " + source.hint_of(spec.wrong[0]) in bad
    overview("hw1")
    assert "100 points" in capsys.readouterr().out


def test_unknown_questions_and_homeworks_are_named() -> None:
    with pytest.raises(ValueError, match="no question 9"):
        examine("hw1", 9, len)
    with pytest.raises(FileNotFoundError, match="hw99"):
        examine("hw99", 1, len)


def test_checks_survive_the_file(tmp_path: Path) -> None:
    mistakes = (("a crash", Failure("ValueError")), ("a half", {"y": torch.tensor(0.5)}))
    inputs = {"x": torch.tensor([1, 2]), "beta": 0.5, "name": "a", "on": True}
    case = Case(1, "all kinds", inputs, {"y": torch.ones(())}, mistakes)
    save_checks(tmp_path / "hw", {1: QUESTION}, [case])
    questions, (back,) = load_checks(tmp_path / "hw")
    assert questions == {1: QUESTION} and back.inputs["x"].tolist() == [1, 2] and back.inputs["on"] is True
    assert back.mistakes[0][1].kind == "ValueError" and same(back.mistakes[1][1], {"y": torch.tensor(0.5)})
