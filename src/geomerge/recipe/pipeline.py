"""The order of a file with several documents, each of which may use the others' results by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from geomerge.errors import RecipeError
from geomerge.recipe.values import ModelRef, Pipeline, Recipe


def in_order(recipes: Sequence[Recipe]) -> Pipeline:
    """The recipes such that each comes after those whose results it uses; the output last.

    Documents that the output does not use are left out, which a note of the output says.

    Raises:
        RecipeError: A name is given twice, there is not exactly one document without a name (a single document may have
            one), or documents need each other in a circle.
    """
    if len(recipes) == 1 and recipes[0].name is None:
        return Pipeline(tuple(recipes))
    stages: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe.name is None:
            continue
        if recipe.name in stages:
            first = stages[recipe.name].at("name")
            raise RecipeError(
                f"two documents have the name {recipe.name!r}",
                where=str(recipe.at("name")),
                hint=f"the other is at {first}; names must differ",
            )
        stages[recipe.name] = recipe
    unnamed = [recipe for recipe in recipes if recipe.name is None]
    if len(unnamed) > 1:
        raise RecipeError(
            "a second document has no name",
            where=str(unnamed[1].where),
            hint="of several documents exactly one has no 'name': the one that makes the output",
        )
    if not unnamed and len(recipes) > 1:
        raise RecipeError(
            "every document has a name, so none makes the output",
            where=str(recipes[-1].at("name")),
            hint="remove 'name' from the document that makes the output",
        )
    output = unnamed[0] if unnamed else recipes[0]
    ordered = _sorted(stages, output)
    unused = [recipe for recipe in recipes if all(recipe is not each for each in ordered)]
    for recipe in unused:
        _sorted(stages, recipe)  # a circle is an error even where nothing depends on it
    notes = tuple(f"{each.at('name')}: the output does not use {each.name!r}" for each in unused)
    ordered[-1] = replace(output, notes=(*output.notes, *notes))
    return Pipeline(tuple(ordered))


def _sorted(stages: dict[str, Recipe], output: Recipe) -> list[Recipe]:
    """The recipes that `output` needs, in an order in which they can run, with itself at the end."""
    done: list[Recipe] = []
    finished: set[str] = set()
    # An explicit stack: a chain of documents may be longer than Python's.
    path: list[tuple[Recipe, Iterator[str]]] = [(output, _needed(stages, output))]
    open_names = {output.name}
    while path:
        recipe, needed = path[-1]
        name = next((each for each in needed if each not in finished), None)
        if name is None:
            path.pop()
            done.append(recipe)
            open_names.discard(recipe.name)
            if recipe.name is not None:
                finished.add(recipe.name)
        elif name in open_names:
            names = [each.name for each, _ in path]
            circle = [*names[names.index(name) :], name]
            raise RecipeError(
                f"documents need each other in a circle: {' → '.join(str(each) for each in circle)}",
                where=str(stages[name].at("name")),
                hint="a document can only use results that do not depend on it",
            )
        else:
            open_names.add(name)
            path.append((stages[name], _needed(stages, stages[name])))
    return done


def _needed(stages: dict[str, Recipe], recipe: Recipe) -> Iterator[str]:
    """The names of the documents that a recipe uses, in the file's order."""
    used = {reference.path for reference in _references(recipe)}
    return iter([name for name in stages if name in used])


def _references(recipe: Recipe) -> Iterator[ModelRef]:
    for model in recipe.models():
        yield model
        if model.lora is not None:
            yield model.lora
    yield from (rule.copy for rule in recipe.components.values() if rule.copy is not None)
    if recipe.tokenizer is not None:
        if isinstance(recipe.tokenizer.source, ModelRef):
            yield recipe.tokenizer.source
        if isinstance(recipe.tokenizer.missing, ModelRef):
            yield recipe.tokenizer.missing
        yield from (rule.model for rule in recipe.tokenizer.tokens if rule.model is not None)
