"""Grade a folder of submitted notebooks, with one command:

python -m course_utils grade hw1 submissions graded

Every notebook is answered in a sandbox (`answering.py`) that knows the inputs and not what is right; here its numbers
are compared. Into `graded` go scores.csv, summary.md and feedback/<student>.md. Started again, it goes on where it
stopped, and grades again only what has changed.
"""

import base64
import csv
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from tqdm import tqdm

from course_utils.homework import Case, Failure, Outcome, Question, judge, load_checks, save_checks

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = ROOT / "notebooks" / "homework" / "solutions"
TEXTS = {
    "time": "it was stopped after {seconds:.0f} seconds: does a loop never end?",
    "size": "its results are larger than any right answer: look at their shapes.",
    "exit": "it ended the process without a result.",
    "SIGKILL": "the system stopped it, most likely because it used too much memory.",
    "SIGSEGV": "it crashed the process (SIGSEGV).",
    "unreadable": "its results could not be read.",
}


@dataclass(frozen=True)
class Limits:
    """For each question seconds and megabytes (beyond what torch takes); for a whole submission seconds."""

    seconds: float = 20.0
    megabytes: int = 2000
    whole: float = 180.0


@dataclass
class Score:
    """What one question got."""

    points: float
    of: int
    text: str
    hint: str = ""


@dataclass
class Result:
    """What one submission got, and remarks for the teacher."""

    scores: dict[int, Score] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(score.points for score in self.scores.values())


# ------------------------------------------------------------------------------------------------- sandbox


def bubblewrap(submission: Path, inputs: Path) -> list[str]:
    """The command before Python's: nothing of the computer but Python, this package and the two files, no network."""
    python = Path(sys.executable).absolute()
    folders = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", sys.prefix, sys.base_prefix]
    folders.append(str(python.resolve().parent.parent))
    command = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    for name, value in environment("/course").items():
        command += ["--setenv", name, value]
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    for folder in dict.fromkeys(folders):
        command += ["--ro-bind-try", folder, folder]
    command += ["--ro-bind", str(Path(__file__).parent), "/course/course_utils"]
    for path in (submission, *(inputs.with_suffix(end) for end in (".json", ".safetensors"))):
        command += ["--ro-bind", str(path), str(path)]
    return [*command, "--chdir", "/tmp"]


def unshared(submission: Path, inputs: Path) -> list[str]:
    """The next best, which every Linux has: no network, and no process outlives the submission."""
    return [shutil.which("unshare") or "unshare", "-Ur", "--net", "--pid", "--fork", "--kill-child"]


def plain(submission: Path, inputs: Path) -> list[str]:
    """No sandbox at all, only limits."""
    return []


def environment(course: str) -> dict[str, str]:
    """The variables that a submission sees."""
    ones = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONDONTWRITEBYTECODE"), "1")
    return ones | {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "USER": "student", "PYTHONPATH": course, "LANG": "C.UTF-8"}


@cache
def sandbox() -> str:
    """The strongest sandbox that works here: "bubblewrap", "unshared" or "plain"; a weaker one comes with a warning."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nothing"
        for end in ("", ".json", ".safetensors"):
            Path(f"{path}{end}").touch()
        for make in (bubblewrap, unshared):
            command = [*make(path, path), sys.executable, "-c", "pass"]
            if shutil.which(command[0]) and not subprocess.run(command, capture_output=True, timeout=60).returncode:
                break
        else:
            make = plain
    if make is not bubblewrap:
        risks = "can read your files" if make is unshared else "can read your files and use the network"
        warnings.warn(f"Submissions {risks}: install bubblewrap (bwrap), or grade only people you trust.", stacklevel=2)
    return make.__name__


def answers_of(submission: Path, inputs: Path, limits: Limits, kind: str) -> dict:
    """Run one submission in its sandbox and give the JSON that it printed, or {"problem": ...}."""
    before = {"bubblewrap": bubblewrap, "unshared": unshared, "plain": plain}[kind](submission, inputs)
    command = [*before, sys.executable, "-m", "course_utils.answering", str(submission), str(inputs)]
    command += [str(limits.seconds), str(limits.megabytes)]
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complained:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=complained,
            env=environment(str(ROOT)), cwd=tempfile.gettempdir(), start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(limits.whole)
        except subprocess.TimeoutExpired:
            return {"problem": f"The whole notebook took more than {limits.whole:.0f} seconds and was stopped."}
        finally:
            stop(process)
        said.seek(0)
        try:
            return json.loads(said.read(100_000_000))
        except ValueError:
            complained.seek(0)
            last = complained.read(20_000).decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            return {"problem": f"The notebook could not be run: {last[0][:200]}"}


def stop(process: subprocess.Popen) -> None:
    """End the process and its group; a sandbox takes all that it started with it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


# ------------------------------------------------------------------------------------------------- one submission


def outcomes_in(reply: dict, count: int, limits: Limits) -> tuple[list[Outcome], str]:
    """The outcomes of a question's cases, and what was printed on the way."""
    if "ended" in reply:
        kind = reply["ended"]
        text = reply.get("text") or TEXTS.get(kind, f"it crashed the process ({kind}).").format(seconds=limits.seconds)
        return [Failure(kind, text)] * count, ""
    try:
        content = base64.b64decode(reply["reply"])
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        failures, tensors = json.loads(header["failures"]), load(content)
        results: list[Outcome] = [Failure(*map(str, row)) if row else {} for row in failures]
        for name, value in tensors.items():
            index, output = name.split("/", 1)
            results[int(index)][output] = value
        if len(results) == count:
            return results, str(header.get("printed", ""))[:300]
    except (ValueError, KeyError, IndexError, TypeError, SafetensorError):
        pass
    return [Failure("unreadable", TEXTS["unreadable"])] * count, ""


def score_of(question: Question, cases: list[Case], outcomes: list[Outcome], limits: Limits) -> Score:
    """Points by the share of cases that are right."""
    first = outcomes[0]
    if isinstance(first, Failure) and (first.kind in ("missing", *TEXTS) or first.kind.startswith("SIG")):
        return Score(0, question.points, f"{question.name}: {first.text}")
    verdict = judge(question, cases, outcomes)
    text = verdict.text
    if any(isinstance(one, Failure) and out_of_memory(one) for one in outcomes):
        text += f"\n  It wanted more than the {limits.megabytes} MB that an answer may take."
    return Score(round(question.points * verdict.passed / verdict.total, 1), question.points, text, verdict.hint)


def out_of_memory(failure: Failure) -> bool:
    """Whether an answer failed because it could get no more memory."""
    return failure.kind == "MemoryError" or "allocate memory" in failure.text


def grade(submission: Path, hidden: Path, limits: Limits | None = None, kind: str | None = None) -> Result:
    """Grade one notebook with the checks at `hidden` (a path without its ending)."""
    limits, (questions, cases) = limits or Limits(), load_checks(hidden)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs"
        save_checks(inputs, questions, [replace(case, expected={}, mistakes=()) for case in cases])
        answers = answers_of(submission.absolute(), inputs, limits, kind or sandbox())
    if not isinstance(answers, dict) or "replies" not in answers:
        problem = str(answers.get("problem", "")) if isinstance(answers, dict) else ""
        problem = problem or "The notebook could not be run."
        return Result({place: Score(0, q.points, f"{q.name}: {problem}") for place, q in questions.items()}, [problem])
    result = Result(notes=list(map(str, answers.get("notes", []))))
    for place, question in questions.items():
        mine = [case for case in cases if case.question == place]
        reply = answers["replies"].get(str(place), {"ended": "unreadable"})
        outcomes, printed = outcomes_in(reply, len(mine), limits)
        result.scores[place] = score_of(question, mine, outcomes, limits)
        if printed.strip():
            said = printed.strip().splitlines()[0][:60]
            result.notes.append(f"Question {place} printed {said!r}: what is printed counts for nothing.")
        if "ended" in reply and reply["ended"] != "missing":
            result.notes.append(f"Question {place}: {outcomes[0].text}")
    return result


# ------------------------------------------------------------------------------------------------- a folder of them


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{threading.get_ident()}.part")  # two students may hand in the same file
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def submissions_in(folder: Path) -> dict[str, Path]:
    """Every notebook below a folder, by the name of its student: the path below the folder without its ending."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: name the one that holds the submitted notebooks.")
    paths = [path for path in sorted(folder.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
    if not paths:
        raise FileNotFoundError(f"There is no notebook in {folder}: submissions must end in .ipynb.")
    return {"_".join(path.relative_to(folder).with_suffix("").parts): path for path in paths}


def fingerprint(submission: Path, hidden: Path, limits: Limits) -> str:
    """A hash of all that a result depends on."""
    parts = [submission, hidden.with_suffix(".json"), hidden.with_suffix(".safetensors")]
    content = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in parts)
    return hashlib.sha256(content + repr(limits).encode()).hexdigest()


def stored(path: Path) -> Result | None:
    """A result that was written before."""
    if not path.exists():
        return None
    row = json.loads(path.read_text(encoding="utf-8"))
    return Result({int(place): Score(**score) for place, score in row["scores"].items()}, row["notes"])


def grade_folder(
    folder: Path, out: Path, hidden: Path, limits: Limits | None = None, kind: str | None = None, workers: int = 2
) -> dict[str, Result]:
    """Grade all notebooks below `folder` into `out`; results that are there already are taken as they are."""
    (questions, _), found = load_checks(hidden), submissions_in(folder)
    limits, kind = limits or Limits(), kind or sandbox()

    def one(student: str) -> tuple[str, Result]:
        try:
            kept = out / "results" / f"{fingerprint(found[student], hidden, limits)}.json"
            result = stored(kept)
            if result is None:
                result = grade(found[student], hidden, limits, kind)
                write_whole(kept, json.dumps(asdict(result)))
        except Exception as error:  # a fault of one submission or of the grader takes no other with it
            problem = f"The grader failed on it ({type(error).__name__}: {error}): grade it by hand."
            result = Result({place: Score(0, q.points, problem) for place, q in questions.items()}, [problem])
        write_whole(out / "feedback" / f"{student}.md", feedback(student, result))
        return student, result

    with ThreadPoolExecutor(workers) as pool:
        results = dict(tqdm(pool.map(one, found), total=len(found), desc="grading", unit="notebook"))
    write_scores(out / "scores.csv", results)
    write_whole(out / "summary.md", summary(results, questions))
    return results


# ------------------------------------------------------------------------------------------------- reports


def feedback(student: str, result: Result) -> str:
    """What a student reads."""
    lines = [f"# {student}: {result.total:g} of {sum(score.of for score in result.scores.values())} points", ""]
    for place, score in result.scores.items():
        lines += [f"## Question {place}: {score.points:g} of {score.of}", "", "```text", score.text, "```", ""]
    return "\n".join(lines + [f"- {note}" for note in result.notes]) + "\n"


def write_scores(path: Path, results: dict[str, Result]) -> None:
    """scores.csv: a row a student, a column a question, and what the teacher should look at."""
    places = list(next(iter(results.values())).scores)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["student", "total", *(f"q{place}" for place in places), "notes"])
        for student, result in results.items():
            points = [f"{result.scores[place].points:g}" for place in places]
            table.writerow([student, f"{result.total:g}", *points, " ".join(result.notes)])
    part.replace(path)


def summary(results: dict[str, Result], questions: dict[int, Question]) -> str:
    """summary.md: the distribution of every question, its commonest mistakes, and who needs a look."""
    totals = [result.total for result in results.values()]
    lines = [f"# {len(totals)} submissions", ""]
    middle = f"mean {statistics.mean(totals):.1f}, median {statistics.median(totals):g}"
    lines += [f"Points: {middle}, lowest {min(totals):g}, highest {max(totals):g}.", ""]
    lines += ["| question | mean | none | below half | half or more | all | |", "| --- |" + " ---: |" * 5 + " --- |"]
    for place, question in questions.items():
        shares = [result.scores[place].points / question.points for result in results.values()]
        bins = Counter(0 if s == 0 else 1 if s < 0.5 else 2 if s < 1 else 3 for s in shares)
        bar = "█" * round(20 * bins[3] / len(shares))
        mean = question.points * statistics.mean(shares)
        counts = " | ".join(str(bins[n]) for n in range(4))
        lines.append(f"| {place} {question.name} | {mean:.1f} of {question.points} | {counts} | {bar} |")
    lines += ["", "## Commonest mistakes", ""]
    for place in questions:
        hints = Counter(result.scores[place].hint for result in results.values() if result.scores[place].hint)
        lines += [f"- Question {place}, in {count} of {len(totals)}: {hint}" for hint, count in hints.most_common(3)]
    lines += ["", "## Worth a look", ""]
    lines += [f"- {student}: {note}" for student, result in results.items() for note in result.notes]
    return "\n".join(lines) + "\n"
