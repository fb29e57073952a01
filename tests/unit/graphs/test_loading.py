"""What an error says about the project's code that could not be loaded."""

from __future__ import annotations

import importlib
import pickle

import pytest

from belay_server.graphs.project.loading import ProjectError, load_object


def error_of(folder, text):
    (folder / "app").mkdir()
    (folder / "app/agent.py").write_text(text)
    with pytest.raises(ProjectError) as caught:
        load_object(folder, [folder], "./app/agent.py:graph", "Graph 'agent'")
    return str(caught.value)


def test_the_place_of_a_syntax_error_is_named(tmp_path):
    error = error_of(tmp_path, "a = 1\nb c\n")
    assert "SyntaxError: invalid syntax" in error
    assert error.endswith("(app/agent.py:2)")


def test_the_place_is_in_the_projects_own_code_not_in_its_virtual_environment(tmp_path):
    library = tmp_path / "venv/lib/site-packages/library.py"
    library.parent.mkdir(parents=True)
    library.write_text("def fail():\n    raise ValueError('broken')\n")
    name = "library_of_test_loading"
    text = f"""
import importlib.util
spec = importlib.util.spec_from_file_location({name!r}, {str(library)!r})
library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
library.fail()
"""
    assert error_of(tmp_path, text).endswith("ValueError: broken (app/agent.py:6)")


def test_a_file_in_a_dependency_has_the_name_by_which_others_import_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "file_of_test_loading.py").write_text("class Order: ...\ngraph = Order()\n")
    loaded = load_object(tmp_path, [tmp_path], "./file_of_test_loading.py:graph", "Graph 'a'")
    module = importlib.import_module("file_of_test_loading")
    assert loaded is module.graph
    assert type(pickle.loads(pickle.dumps(loaded))) is module.Order


@pytest.mark.parametrize("file", ["json.py", "not-a-name.py", "some.thing.py"])
def test_a_file_that_cannot_be_imported_by_its_name_can_be_pickled_all_the_same(
    tmp_path, monkeypatch, file
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / file).write_text("class Order: ...\ngraph = Order()\n")
    loaded = load_object(tmp_path, [tmp_path], f"./{file}:graph", "Graph 'a'")
    assert type(loaded).__module__.startswith("belay_project_")
    assert type(pickle.loads(pickle.dumps(loaded))) is type(loaded)


def test_two_files_whose_paths_differ_in_a_separator_are_two_modules(tmp_path):
    (tmp_path / "sales").mkdir()
    for file, number in (("sales_eu.py", 1), ("sales/eu.py", 2)):
        (tmp_path / file).write_text(f"graph = {number}\n")
        assert load_object(tmp_path, [], f"./{file}:graph", "Graph 'a'") == number
