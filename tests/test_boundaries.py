"""Who may import whom: training uses the model, never the other way round, and gradio stays in the page."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent


def imports(path):
    """Every module named by an import statement of a file, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def importers(package, *places):
    files = [f for place in places for f in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))]
    assert files
    return {
        f.relative_to(ROOT).as_posix()
        for f in files
        for name in imports(f)
        if name == package or name.startswith(package + ".")
    }


def test_the_application_never_imports_training():
    assert importers("training", "sana_app", "app.py") == set()


def test_training_takes_only_the_model_the_lines_and_the_caption_form():
    allowed = ("sana_app.model", "sana_app.lines", "sana_app.presets")
    for file in (ROOT / "training").rglob("*.py"):
        for name in imports(file):
            if name.startswith("sana_app") and name != "sana_app":
                assert name.startswith(allowed), f"{file.relative_to(ROOT)} imports {name}"


def test_only_the_page_imports_gradio():
    found = importers("gradio", "sana_app", "training")
    assert {f for f in found if f != "sana_app/ui.py" and not f.startswith("sana_app/pad/")} == set()


def test_the_model_imports_nothing_of_the_page():
    for name in ("engine", "worker", "live", "ui", "pad", "bench"):
        assert importers(f"sana_app.{name}", "sana_app/model") == set()
