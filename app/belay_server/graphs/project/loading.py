"""Loading of objects named in `langgraph.json`: `path/to/file.py:variable` or `module:variable`.

Graphs and the project's own HTTP app are imported by the same rules.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class ProjectError(Exception):
    """The project cannot be served; the message names the file or graph and the cause."""


def load_object(root: Path, dependencies: Sequence[Path], target: str, who: str) -> Any:
    """Return the object that a target names. Raise ProjectError, which calls it `who`."""
    location, _, variable = target.rpartition(":")
    module = _module_of(root, dependencies, target, who)
    try:
        return getattr(module, variable)
    except AttributeError as error:
        names = [name for name in vars(module) if not name.startswith("_")]
        similar = difflib.get_close_matches(variable, names, n=1)
        hint = f"; did you mean '{similar[0]}'?" if similar else ""
        raise ProjectError(f"{who}: {location} has no '{variable}'{hint}") from error


def _module_of(root: Path, dependencies: Sequence[Path], target: str, who: str) -> ModuleType:
    """Import the module that a target names. Raise ProjectError."""
    try:
        return _import(root, dependencies, target.rpartition(":")[0], who)
    except ProjectError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        cause = " ".join(f"{type(error).__name__}: {error}".split())  # one line
        hint = ""
        if isinstance(error, ModuleNotFoundError):
            hint = f"; install it where Belay runs: {sys.prefix}"
        raise ProjectError(f"{who} ({target}): {cause}{_place_of(error, root)}{hint}") from error


def _place_of(error: BaseException, root: Path) -> str:
    """Return the place of a syntax error, or the last line of the project's own code in the error's
    traceback, as ` (file:line)`; "" if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [(frame.filename, frame.lineno) for frame in reversed(frames)]
    if isinstance(error, SyntaxError) and error.filename is not None:
        places.insert(0, (error.filename, error.lineno))
    for filename, line in places:
        path = Path(filename)
        if path.is_relative_to(root) and "site-packages" not in path.parts:
            return f" ({path.relative_to(root)}:{line})"
    return ""


def _import(root: Path, dependencies: Sequence[Path], location: str, who: str) -> ModuleType:
    if not location.endswith(".py"):
        return importlib.import_module(location)
    path = (root / location).resolve()
    if not path.is_file():
        raise ProjectError(f"{who}: there is no file {location}")
    # A file inside a dependency's package is imported under its own name, so that its relative
    # imports work and it is not loaded twice.
    # The deepest folder is tried first: with a `src` folder, a module has no `src.` in its name.
    # So is a file directly in a dependency, unless the name is another module's. The processes of
    # `multiprocessing` that do not fork can then import it.
    for folder in sorted(dependencies, key=lambda f: len(f.parts), reverse=True):
        if path.is_relative_to(folder):
            parts = path.relative_to(folder).with_suffix("").parts
            package = folder.joinpath(*parts[:-1])
            if len(parts) > 1 and (package / "__init__.py").is_file():
                return importlib.import_module(".".join(parts))
            if len(parts) == 1 and parts[0].isidentifier() and _is_importable(parts[0], path):
                return importlib.import_module(parts[0])
    name = name_of_file(path)
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise ProjectError(f"{who}: {location} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def name_of_file(path: Path) -> str:
    """Return the name of the module of a file that has none by which others import it. It has no
    dot: `pickle` would import the package before it."""
    stem = re.sub(r"\W", "_", path.stem)
    return f"belay_project_{stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"


def _is_importable(name: str, path: Path) -> bool:
    """Return whether `import name` imports this file."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None and Path(found.origin) == path
