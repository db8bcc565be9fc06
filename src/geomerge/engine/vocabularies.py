"""What happens to the matrices over the vocabulary: checked when no policy is given, re-ordered by one that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from geomerge.engine.models import Model, Models
from geomerge.engine.plan import Operand, Rows
from geomerge.errors import IncompatibleModels
from geomerge.recipe.values import ModelRef, Recipe, TokenizerSpec
from geomerge.tokens.compare import without_policy
from geomerge.tokens.policy import build
from geomerge.tokens.rows import OMP, TokenPlan

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "added_tokens.json")


class Vocabularies:
    """The vocabularies of one recipe's models.

    Args:
        recipe: Its ``tokenizer_source`` or ``tokenizer`` is the policy, if it has one.
        members: All models of the recipe.
        base: Its base.
        rows: Where row plans are collected; operands refer to them by index.
        models: Opens a model that the policy names and the recipe does not merge.

    Raises:
        RecipeError, IncompatibleModels: The policy cannot be carried out.
    """

    def __init__(
        self, recipe: Recipe, members: list[Model], base: Model | None, rows: list[Rows], models: Models
    ) -> None:
        self.members, self._recipe = members, recipe
        self.outsiders = _outsiders(recipe.tokenizer, members, models)
        self.inputs = [*members, *self.outsiders]
        self.plan: TokenPlan | None = None
        self.notes: list[str] = []
        self._rows = rows
        self.operand: Callable[[Model, str, str], Operand] = lambda model, stored, name: model.operand(stored)
        self._made: dict[tuple[int, str], Operand] = {}
        self._checked: set[frozenset[int]] = set()
        if recipe.tokenizer is not None:
            vocabularies = [(m.ref, m.vocabulary, m.embedding_rows() or 0) for m in self.inputs]
            self.plan = build(
                recipe.tokenizer,
                vocabularies,
                None if base is None else members.index(base),
                cut_padding=recipe.compat == "mergekit",
                outsiders=len(self.outsiders),
            )
            self._sparsity = recipe.tokenizer.sparsity
            self.notes.extend(self.plan.notes)
            self.notes.extend(self._sums())

    @property
    def size(self) -> int:
        """Rows of the output's matrices over the vocabulary, where they are re-ordered."""
        assert self.plan is not None
        return self.plan.size

    @property
    def changes(self) -> bool:
        """Whether the policy re-orders anything."""
        return self.plan is not None and not self.plan.identity

    def reorders(self, model: Model, name: str) -> bool:
        """Whether this tensor's rows are to be re-ordered.

        Raises:
            IncompatibleModels: They should be, but the vocabulary does not run along the first axis.
        """
        axis = model.anatomy.vocabulary.get(name)
        if axis is None or not self.changes:
            return False
        if axis != 0:
            raise IncompatibleModels(
                f"the vocabulary of {name} runs along axis {axis}; only rows can be re-ordered", where=str(model)
            )
        return True

    def reordered(self, model: Model, name: str) -> Operand:
        """The operand of a matrix with its rows in the output's order.

        Args:
            model: The model.
            name: The output's name: each model has the matrix under it or under the name it is tied to, and the head of a
                model that ties it borrows missing rows from the others' heads.
        """
        assert self.plan is not None
        key = (id(model), name)
        if key not in self._made:
            k = self.members.index(model)
            matrices: list[Operand | None] = []
            for member in self.inputs:
                stored = member.find(name)
                if stored is None:
                    matrices.append(None)
                elif member in self.outsiders:
                    matrices.append(member.operand(stored))
                else:
                    matrices.append(self.operand(member, stored, name))
            own = model.find(name)
            assert own is not None
            plan = self.plan.rows_for(k)
            for donor in plan.pursued:
                if matrices[donor] is None:
                    raise IncompatibleModels(
                        f"it has no {name}, in which the coefficients of {model}'s missing tokens were to be found",
                        where=str(self.inputs[donor]),
                    )
            self._made[key] = model.operand(own)._replace(rows=len(self._rows))
            self._rows.append(Rows(tuple(matrices), plan, self._sparsity))
        return self._made[key]

    def _sums(self) -> Iterator[str]:
        """Notes on sparse sums."""
        assert self.plan is not None
        for k, model in enumerate(self.members):
            rows = self.plan.rows_for(k)
            for donor in rows.pursued:
                count, shared = int((rows.source == OMP - donor).sum()), len(rows.anchors(donor))
                yield (
                    f"{count:,} tokens that {model} lacks are sums of at most {self._sparsity} of its own rows, the "
                    f"coefficients found among {shared:,} shared tokens in {self.inputs[donor]}"
                )

    def check(self, models: list[Model]) -> None:
        """Refuse to merge rows that mean different tokens, when no policy says what to do.

        Raises:
            IncompatibleModels: With the shapes, the tokens that differ and the policies to choose from.
        """
        key = frozenset(id(m) for m in models)
        if self.plan is not None or key in self._checked:
            return
        self._checked.add(key)
        refusal = self.refusal(models)
        if refusal is not None:
            raise refusal

    def refusal(self, models: list[Model]) -> IncompatibleModels | None:
        """Why these models' rows cannot be merged as they are; warnings go to `notes`."""
        rows = [m.embedding_rows() or 0 for m in models]
        folders = [m.tokenizer_folder for m in models]
        if len(set(rows)) == 1 and all(_same_tokenizer(folders[0], f) for f in folders[1:]):
            return None
        first, *others = [(m.ref, m.vocabulary, n) for m, n in zip(models, rows, strict=True)]
        for other in others:
            error, warnings = without_policy([first, other])
            self.notes.extend(warnings)
            if error is not None:
                return IncompatibleModels(error.what, where=str(self._recipe.line_of(other[0])), hint=error.hint)
        return None


def _outsiders(spec: TokenizerSpec | None, members: list[Model], models: Models) -> list[Model]:
    """The model whose tokenizer the output gets, where the recipe does not merge it.

    Only with a policy that says what to do for tokens that no merged model has; otherwise it is left to be refused.
    """
    if spec is None or not isinstance(spec.source, ModelRef) or spec.missing not in ("omp", "zero", "mean"):
        return []
    known = any(m.ref == spec.source or str(m.ref) == str(spec.source) for m in members)
    return [] if known else [models.get(spec.source, spec.where)]


def _same_tokenizer(a: Path | None, b: Path | None) -> bool:
    """Whether two directories hold the same tokenizer files byte for byte: much quicker than comparing vocabularies."""
    if a is None or b is None:
        return False
    for name in _FILES:
        here, there = a / name, b / name
        if here.is_file() != there.is_file():
            return False
        if here.is_file() and (here.stat().st_size != there.stat().st_size or here.read_bytes() != there.read_bytes()):
            return False
    return True
