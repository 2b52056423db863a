"""What runs inside the sandbox: a submission's answers on given inputs. It never sees what is right.

python -m course_utils.answering submission.ipynb inputs SECONDS MEGABYTES

Of the notebook only the answers are run, with the imports, functions, classes and constants that they use: no training,
no cell with an error. Each question runs in a process of its own, forked from this one. Standard output gets one JSON
text, with the numbers that came out; what the answers print is kept apart and counts for nothing.
"""

import ast
import base64
import contextlib
import json
import os
import select
import signal
import sys
import time
import types
from pathlib import Path

import torch
from safetensors.torch import save

from course_utils.homework import Case, Failure, Outcome, Question, failure_of, load_checks, outcome_of

PRINTED, REPLY = 300, 8_000_000  # characters of what an answer prints, bytes of its outputs

# ------------------------------------------------------------------------------------------ reading a notebook


def code_cells(path: Path) -> list[str]:
    """The code of a notebook's cells without magics. Raises ValueError where the file is no notebook."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"The file is not a Jupyter notebook ({type(error).__name__}): save it as .ipynb.") from error
    lines = [[line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))] for source in sources]
    return ["\n".join(kept) for kept in lines]


def parsed(cells: list[str]) -> list[list[ast.stmt]]:
    """The top-level statements of each cell; none for a cell with a syntax error."""
    trees = []
    for source in cells:
        try:
            trees.append(ast.parse(source).body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            trees.append([])
    return trees


def bound(statement: ast.stmt) -> set[str]:
    """The names that an import, function, class or assignment binds; for another statement none."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return set()


def constant(statement: ast.stmt) -> bool:
    """Whether an assignment's value is written out as a literal, so that to run it costs nothing."""
    try:
        ast.literal_eval(statement.value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def program(cells: list[list[ast.stmt]], name: str) -> list[ast.stmt]:
    """The last statement that binds `name`, and before it, in the notebook's order, all that it uses.

    Assignments are run where they stand in a cell with a function that is used, or are plain constants. Raises
    ValueError where nothing is called `name`.
    """
    last: dict[str, tuple[int, int]] = {}
    homes: set[int] = set()
    for i, cell in enumerate(cells):
        for j, statement in enumerate(cell):
            last |= {one: (i, j) for one in bound(statement)}
    if name not in last:
        raise ValueError(f"There is no function or class {name} in the notebook, or its cell has a syntax error.")
    wanted, chosen = [name], set()
    while wanted:
        place = last.get(wanted.pop())
        if place is None or place in chosen:
            continue
        statement = cells[place[0]][place[1]]
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            if place != last[name] and place[0] not in homes and not constant(statement):
                continue
        elif not isinstance(statement, ast.Import | ast.ImportFrom):
            homes.add(place[0])
        chosen.add(place)
        wanted += [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return [cells[i][j] for i, j in sorted(chosen)]


def remarks(cells: list[list[ast.stmt]]) -> list[str]:
    """What the teacher should know of a notebook that replaces the checks or their files."""
    found, statements = [], [one for cell in cells for one in cell]
    modules = {"homework", "course_utils"}
    for statement in statements:
        imported = isinstance(statement, ast.Import | ast.ImportFrom)
        if imported and "course_utils" in ast.unparse(statement):
            modules |= bound(statement)
        if not imported and bound(statement) & {"check", "examine", "homework"}:
            found.append(f"line {ast.unparse(statement).splitlines()[0][:80]!r}")
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if ast.unparse(node).split(".")[0] in modules:
                    found.append(f"assignment to {ast.unparse(node)[:80]!r}")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "homework/checks" in node.value:
                found.append(f"path {node.value[:80]!r}")
    return [f"It edits the checks ({'; '.join(found[:3])}): grading uses its own."] if found else []


# ------------------------------------------------------------------------------------------ running the answers


class Kept:
    """A standard output that keeps the first characters and drops the rest."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text[: PRINTED - len(self.text)] if len(self.text) < PRINTED else ""
        return len(text)

    def flush(self) -> None:
        """Nothing waits to be written."""


def limit(seconds: float, megabytes: int) -> None:
    """Hold this process to so much processor time, memory beyond what it has, and files of 1 MB."""
    import resource

    status = Path("/proc/self/status")
    data = 1_000_000
    if status.exists():
        data = int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmData")))
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")  # of all processes this one goes first
    limits = {"RLIMIT_DATA": data * 1024 + megabytes * 1_000_000, "RLIMIT_CPU": int(seconds) + 1}
    for name, value in (limits | {"RLIMIT_FSIZE": 1_000_000, "RLIMIT_CORE": 0}).items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))


def outcomes(statements: list[ast.stmt], question: Question, cases: list[Case]) -> list[Outcome]:
    """Run the statements and then every case; an outcome that is too large to be right is not kept."""
    module = types.ModuleType("answers")
    sys.modules["answers"] = module
    try:
        exec(compile(ast.Module(statements, type_ignores=[]), "<answers>", "exec"), vars(module))
    except BaseException as error:
        return [failure_of(error)] * len(cases)
    answer = vars(module)[question.name]
    results = []
    for case in cases:
        try:
            outcome = outcome_of(answer, question, case)
            size = 0 if isinstance(outcome, Failure) else sum(value.nbytes for value in outcome.values())
            large = Failure("size", f"{size:,} bytes are larger than any right answer: look at the shapes.")
            results.append(outcome if size < REPLY / len(cases) / 2 else large)
        except BaseException as error:  # SystemExit and the like, which an answer may raise
            results.append(failure_of(error))
    return results


def packed(results: list[Outcome], printed: str) -> bytes:
    """Outcomes as the bytes of a safetensors file, what has no numbers in its header."""
    tensors, rows = {}, []
    for i, outcome in enumerate(results):
        failed = isinstance(outcome, Failure)
        rows.append([outcome.kind, outcome.text] if failed else None)
        if not failed:
            tensors |= {f"{i}/{name}": value.contiguous().clone() for name, value in outcome.items()}
    return save(tensors, metadata={"failures": json.dumps(rows), "printed": printed})


def in_child(statements: list[ast.stmt], question: Question, cases: list[Case], to: int, limits: tuple) -> None:
    """The forked process: answer, write the reply, and end without any clean-up that an answer could have changed."""
    try:
        os.setpgid(0, 0)
        limit(*limits)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nowhere, number)
        sys.stdout = sys.stderr = kept = Kept()
        reply = memoryview(packed(outcomes(statements, question, cases), kept.text))
        while reply:
            reply = reply[os.write(to, reply) :]
    finally:
        os._exit(0)


def ask(statements: list[ast.stmt], question: Question, cases: list[Case], limits: tuple) -> dict[str, str]:
    """One question in a process of its own: its reply in base64, or how the process ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        in_child(statements, question, cases, writing, limits)
    os.close(writing)
    reply, until, late = b"", time.monotonic() + limits[0], False
    while len(reply) <= REPLY:
        late = not select.select([reading], [], [], max(0.0, until - time.monotonic()))[0]
        part = b"" if late else os.read(reading, 1 << 20)
        if not part:
            break
        reply += part
    os.close(reading)
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if late:
        return {"ended": "time"}
    if len(reply) > REPLY:
        return {"ended": "size"}
    return {"reply": base64.b64encode(reply).decode()} if reply else {"ended": ended(status)}


def ended(status: int) -> str:
    """Why a process left no reply."""
    if not os.WIFSIGNALED(status):
        return "exit"
    name = signal.Signals(os.WTERMSIG(status)).name
    return "time" if name == "SIGXCPU" else name


def main(submission: Path, inputs: Path, seconds: float, megabytes: int) -> None:
    """Print the JSON of all answers; see `grading.py` for its reader."""
    channel = os.fdopen(os.dup(1), "w")
    torch.set_num_threads(1)
    questions, cases = load_checks(inputs)
    try:
        cells = parsed(code_cells(submission))
    except ValueError as error:
        json.dump({"problem": str(error)}, channel)
        return
    replies = {}
    for place, question in questions.items():
        mine = [case for case in cases if case.question == place]
        try:
            statements = program(cells, question.name)
        except ValueError as error:
            replies[place] = {"ended": "missing", "text": str(error)}
            continue
        replies[place] = ask(statements, question, mine, (seconds, megabytes))
    json.dump({"replies": replies, "notes": remarks(cells)}, channel)
    channel.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
