"""The code's form: what ruff checks, short functions, and one self-contained train_gpt.py."""

import ast
import functools
import io
import re
import statistics
import subprocess
import sys
import tokenize

import pytest

from conftest import ROOT

MAIN = ROOT / "train_gpt.py"
LONGEST, MEDIAN = 60, 15  # lines of a function, of any file and of train_gpt.py's middle one
STATEMENTS = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.Constant)  # last: docstrings
SILENCERS = re.compile(r"noqa|ruff: |fmt: (off|skip)")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def ruff(*args):
    """A finished run of ruff in the repository's root."""
    command = [sys.executable, "-m", "ruff", *args, "--no-cache", "."]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True)


def sources():
    """Paths of the repository's .py files: those that ruff sees, which git does not ignore."""
    listed = ruff("check", "--show-files").stdout.split("\n")
    return sorted(path for path in listed if path.endswith(".py"))


FILES = [path.removeprefix(f"{ROOT}/") for path in sources()]


@functools.cache
def tree(path):
    """The syntax tree of a file of the repository."""
    return ast.parse((ROOT / path).read_text("utf-8"))


def functions(path):
    """{"name, line n": number of lines} of every function of a file, methods and nested too."""
    found = (node for node in ast.walk(tree(path)) if isinstance(node, FUNCTIONS))
    return {f"{f.name}, line {f.lineno}": f.end_lineno - f.lineno + 1 for f in found}


def test_the_files_are_found():
    assert {"train_gpt.py", "tests/test_style.py", "bench/common.py"} <= set(FILES)


@pytest.mark.parametrize("command", ["format --check", "check"])
def test_ruff_has_nothing_to_say(command):
    done = ruff(*command.split())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES)
def test_functions_are_short(path):
    assert {name: n for name, n in functions(path).items() if n > LONGEST} == {}


@pytest.mark.parametrize("path", FILES)
def test_no_expression_hides_a_statement(path):
    """`found and use(found)`, `a() if x else b()` and `a(), b()` are not statements."""
    bare = (node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Expr))
    assert [ast.unparse(x) for x in bare if not isinstance(x, STATEMENTS)] == []


@pytest.mark.parametrize("path", FILES)
def test_no_rule_is_silenced(path):
    source = io.StringIO((ROOT / path).read_text("utf-8"))
    comments = (t for t in tokenize.generate_tokens(source.readline) if t.type == tokenize.COMMENT)
    assert [c.string for c in comments if SILENCERS.search(c.string)] == []


def test_the_median_function_of_train_gpt_is_short():
    assert statistics.median(functions("train_gpt.py").values()) <= MEDIAN


def test_whatever_is_public_in_train_gpt_says_what_it_is():
    named = [n for n in tree("train_gpt.py").body if isinstance(n, (*FUNCTIONS, ast.ClassDef))]
    public = [(n.name, n) for n in named if not n.name.startswith("_")]
    for name, node in list(public):
        if isinstance(node, ast.ClassDef):
            methods = (n for n in node.body if isinstance(n, FUNCTIONS))
            public += [(f"{name}.{m.name}", m) for m in methods if not m.name.startswith("_")]
    assert len(public) > 50 and [name for name, n in public if not ast.get_docstring(n)] == []


def imported(path):
    """Names of the top-level modules that a file imports; "." stands for relative imports."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.split(".")[0])
    return names


def test_train_gpt_stands_alone():
    """It imports nothing of the repository, by whatever way."""
    own = {p.stem for p in ROOT.iterdir() if p.is_dir() or p.suffix == ".py"}
    assert {"tools", "tests", "bench"} <= own
    assert imported("train_gpt.py") & {*own, "."} == set()
    source = MAIN.read_text("utf-8")
    assert "sys.modules" not in source
    assert re.findall(r"import_module\(\s*f?[\"']tools[^)]*\)", source) == []


def contents():
    """[(number, title)] of the table of contents in train_gpt.py's docstring."""
    lines = ast.get_docstring(tree("train_gpt.py"), clean=False).splitlines()
    begin = [line.strip() for line in lines].index("Contents")
    found = (re.match(r"\s+(\d+)  +(\S.*)", line) for line in lines[begin + 1 :])
    return [(int(m[1]), re.split(r" {2,}", m[2])[0].rstrip()) for m in found if m]


def test_the_contents_list_the_sections_in_their_order():
    banner = re.compile(r"^# ={4,}\n# (\d+)\. (.+)\n# ={4,}$", re.MULTILINE)
    sections = [(int(n), title) for n, title in banner.findall(MAIN.read_text("utf-8"))]
    assert contents() == sections and len(sections) > 3
    assert [n for n, _ in sections] == list(range(1, len(sections) + 1))


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_have_no_gaps_and_their_links_lead_somewhere(page):
    """No placeholder was left; files that are linked exist, headings that are linked too."""
    text = page.read_text("utf-8")
    assert not re.search(r"@@|TODO|FIXME", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, target
