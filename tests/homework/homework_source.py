"""Make what students and graders get from the solved notebooks, so that the two cannot drift.

python tests/homework/homework_source.py hw1

From notebooks/homework/solutions/hw1.ipynb and the cases and mistakes in tests/homework/hw1.py come the starter
notebooks/homework/hw1.ipynb, the public checks in notebooks/homework/checks/ and the hidden ones beside the solution.
"""

import ast
import copy
import importlib
import json
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent)]

from course_utils.answering import code_cells, parsed, program  # noqa: E402
from course_utils.homework import Case, Failure, Question, outcome_of, same, save_checks  # noqa: E402

MARKER = re.compile(r"#\| question (\d+), (\d+) points, (\d+) minutes\n")
BODY = re.compile(r"( *)# YOUR CODE\n.*?# END OF YOUR CODE", flags=re.DOTALL)
PUBLIC_SEED, HIDDEN_SEED = 0, 20_873


@dataclass
class Spec:
    """What a homework's module says of one question; see `hw1.py`."""

    returns: tuple[str, ...]
    cases: Callable[[int], Iterator[tuple[str, dict]]]
    probe: str = "direct"
    wrong: list[Callable] = field(default_factory=list)
    right: list[Callable] = field(default_factory=list)


class Book(dict):
    """The questions of a homework by number, filled by decorators."""

    def question(self, number: int, returns: tuple[str, ...], probe: str = "direct") -> Callable:
        """Say what question `number` returns, and that the decorated function makes its cases from a seed."""

        def keep(cases: Callable) -> Callable:
            self[number] = Spec(returns, cases, probe)
            return cases

        return keep

    def wrong(self, number: int) -> Callable:
        """The decorated function is a typical mistake; its docstring is the hint."""
        return lambda answer: self[number].wrong.append(answer) or answer

    def right(self, number: int) -> Callable:
        """The decorated function is right, and written differently from the solution."""
        return lambda answer: self[number].right.append(answer) or answer


def hint_of(answer: Callable) -> str:
    """The hint of a wrong answer: its docstring on one line."""
    return " ".join(answer.__doc__.split())


def solution_path(name: str, root: Path = ROOT) -> Path:
    return root / "notebooks" / "homework" / "solutions" / f"{name}.ipynb"


def book(name: str) -> Book:
    return importlib.import_module(name).BOOK


def starter(solved: dict) -> dict:
    """The notebook that students get: answers are taken out, and with them all outputs."""
    made = copy.deepcopy(solved)
    made["metadata"].pop("took", None)
    for cell in made["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        source = BODY.sub(r"\1# YOUR CODE\n\1raise NotImplementedError\n\1# END OF YOUR CODE", source)
        cell |= {"source": source.splitlines(keepends=True), "outputs": [], "execution_count": None}
    return made


def questions_of(name: str, root: Path = ROOT) -> tuple[dict[int, Question], dict[int, Callable]]:
    """The questions that the solved notebook marks, and its answers to them, run without the rest of it."""
    sources, specs = code_cells(solution_path(name, root)), book(name)
    questions, answers = {}, {}
    for source in sources:
        mark = MARKER.search(source)
        if mark is None:
            continue
        place, points, minutes = map(int, mark.groups())
        functions = [one for one in ast.parse(source).body if isinstance(one, ast.FunctionDef | ast.ClassDef)]
        if len(functions) != 1 or "# YOUR CODE" not in source or not ast.get_docstring(functions[0]):
            raise ValueError(f"{name}, question {place}: its cell needs one documented function with # YOUR CODE.")
        function, spec = functions[0].name, specs[place]
        questions[place] = Question(function, points, minutes, spec.returns, spec.probe)
        module = types.ModuleType(function)
        statements = program(parsed(sources), function)
        exec(compile(ast.Module(statements, type_ignores=[]), f"<{name}>", "exec"), vars(module))
        answers[place] = vars(module)[function]
    return questions, answers


def cases_of(name: str, seed: int, root: Path = ROOT) -> tuple[dict[int, Question], list[Case]]:
    """All cases of a homework for a seed, with what the solution and the typical mistakes give."""
    questions, answers = questions_of(name, root)
    cases = []
    for place, question in questions.items():
        spec = book(name)[place]
        for title, inputs in spec.cases(seed):
            case = Case(place, title, inputs)
            expected = outcome_of(answers[place], question, case)
            if isinstance(expected, Failure):
                raise ValueError(f"{name}, question {place}, {title}: the solution fails with {expected}.")
            given = [(hint_of(wrong), outcome_of(wrong, question, case)) for wrong in spec.wrong]
            mistakes = tuple((hint, outcome) for hint, outcome in given if not same(outcome, expected))
            cases.append(Case(place, title, inputs, expected, mistakes))
    return questions, cases


def make(name: str, root: Path = ROOT, to: Path | None = None) -> None:
    """Write the starter, the public checks and the hidden checks of a homework below `to`."""
    homework = (to or root) / "notebooks" / "homework"
    homework.mkdir(parents=True, exist_ok=True)
    solved = json.loads(solution_path(name, root).read_text(encoding="utf-8"))
    text = json.dumps(starter(solved), indent=1, ensure_ascii=False)
    (homework / f"{name}.ipynb").write_text(text + "\n", encoding="utf-8")
    save_checks(homework / "checks" / name, *cases_of(name, PUBLIC_SEED, root))
    save_checks(homework / "solutions" / f"{name}_hidden", *cases_of(name, HIDDEN_SEED, root))


if __name__ == "__main__":
    for one in sys.argv[1:]:
        make(one)
