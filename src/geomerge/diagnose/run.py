"""`diagnose`: from models to a `Diagnosis`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from geomerge.checkpoint.collector import collector_paused
from geomerge.diagnose.angles import PairAngles, Survey, pair_angles, survey
from geomerge.diagnose.cka import LayerSimilarity, layer_similarity, read_probe
from geomerge.diagnose.decision import Decision, Evidence, decide, specialist_of
from geomerge.diagnose.diagnosis import Diagnosis, NotFinite, Pair
from geomerge.diagnose.differences import differences, main_dtype
from geomerge.diagnose.parents import Parents, open_parents
from geomerge.diagnose.recipe import RecipeFacts
from geomerge.diagnose.rotation import likeness as likeness_of
from geomerge.diagnose.score import Score
from geomerge.diagnose.thresholds import Thresholds
from geomerge.diagnose.tokens import TokenComparison, compare, has_chat
from geomerge.engine.config_differences import Difference
from geomerge.errors import IncompatibleModels, UsageError, did_you_mean

if TYPE_CHECKING:
    from geomerge.checkpoint.checkpoint import Checkpoint
    from geomerge.engine.run import Progress

_FAMILY = ("model_type", "hidden_act", "num_attention_heads", "num_key_value_heads", "head_dim", "rope")
_RMS = ("rms_norm_eps", "layernorm_epsilon", "norm_eps")


@collector_paused()
def diagnose(
    *models: str | Path,
    base: str | Path | None = None,
    cka: bool = False,
    probe: str | Path | None = None,
    specialist: str | None = None,
    thresholds: Thresholds | None = None,
    exact: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    allow_pickle: bool = False,
    given: Mapping[str, Checkpoint] | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Say whether models can be merged, and how.

    Args:
        models: Two or more paths or hub ids.
        base: What they were trained from: adds the angles, signs and supports of their task vectors.
        cka: Compare hidden states on the built-in probe, too. This loads the models.
        probe: A UTF-8 file of texts for that, one sample a line or paragraph.
        specialist: Which of the models is a specialist, if one is known to be.
        thresholds: What to compare with.
        exact: Count signs and supports of task vectors on every element, not on a sample.
        threads: By default one for each core that the process may use.
        device: Where CKA runs the models.
        allow_pickle: Read pickled weights (weights only).
        given: Models in memory by the name that `models` uses.
        progress: Told how many bytes of weights have been read.

    Raises:
        UsageError: There are fewer than two models, one is named twice, or the probe is empty or not UTF-8.
        IncompatibleModels: They have different architectures, or no token in common.
        ModelError: A model cannot be opened.
    """
    limits = thresholds or Thresholds()
    texts = read_probe(probe) if cka or probe is not None else None
    if limits.similarity == "cka" and texts is None:
        raise UsageError("the similarity `cka` needs hidden states", hint="give --cka, or --probe FILE")
    with open_parents(models, base, given=given, allow_pickle=allow_pickle) as parents:
        special = _specialist(specialist, parents)
        pairs = list(combinations(range(len(parents.models)), 2))
        tokens = {(i, j): compare(parents.models[i], parents.models[j]) for i, j in pairs}
        _check_overlap(parents, tokens)
        found = survey(parents, top=limits.top, exact=exact, threads=threads, progress=progress)
        likeness = likeness_of(parents)
        similar = _hidden(parents, texts, device) if texts is not None else {}
        for checkpoint in parents.inputs:
            checkpoint.verify_unchanged()
        return _conclude(parents, found, tokens, likeness, similar, limits, special, base=base, exact=exact)


def _specialist(named: str | None, parents: Parents) -> str | None:
    if named is None:
        return None
    for name, model in zip(parents.names, parents.models, strict=True):
        if named in (name, str(model)):
            return name
    raise UsageError(f"the specialist {named!r} is none of the models", hint=did_you_mean(named, parents.names))


def _check_overlap(parents: Parents, tokens: Mapping[tuple[int, int], TokenComparison]) -> None:
    for (i, j), found in tokens.items():
        if found.overlap == 0:
            raise IncompatibleModels(
                f"the vocabularies of {parents.names[i]} and {parents.names[j]} are disjoint: they have no token in common",
                hint="models can be merged when they share tokens; choose another pair",
            )


def _hidden(parents: Parents, texts: list[str], device: str) -> dict[tuple[int, int], LayerSimilarity]:
    folders: dict[str, Path] = {}
    for name, model in zip(parents.names, parents.models, strict=True):
        if model.folder is None:
            raise UsageError(f"{name} is no model directory, so CKA cannot load it", hint="leave out --cka and --probe")
        if model.checkpoint is not None and model.checkpoint.adapter is not None:
            raise UsageError(
                f"{name} has an adapter beside its weights, so CKA cannot load it",
                hint="merge it into a directory first (`merge_method: passthrough`), or leave out --cka and --probe",
            )
        folders[name] = model.folder
    return layer_similarity(folders, texts, device=device)


def _conclude(
    parents: Parents,
    found: Survey,
    tokens: Mapping[tuple[int, int], TokenComparison],
    likeness: Mapping[tuple[int, int], float],
    similar: Mapping[tuple[int, int], LayerSimilarity],
    limits: Thresholds,
    special: str | None,
    *,
    base: str | Path | None,
    exact: bool,
) -> Diagnosis:
    bad = tuple(
        NotFinite(parents.all_names[k], name, *counts)
        for name, models in found.not_finite.items()
        for k, counts in models.items()
    )
    angles = {pair: pair_angles(parents, found, *pair) for pair in tokens}
    unlike = {pair: differences(parents, *pair, tokens[pair]) for pair in tokens}
    scores = {
        pair: Score.of(
            tokens[pair].overlap,
            similar[pair].mean if limits.similarity == "cka" and pair in similar else angles[pair].mean_cosine,
            angles[pair].omega_bar,
            limits,
        )
        for pair in tokens
    }
    judge = _Judge(parents, limits, special or _moved_most(parents, angles, limits), bad)
    pairs = tuple(
        Pair(
            *pair,
            angles=angles[pair],
            tokens=tokens[pair],
            differences=tuple(unlike[pair]),
            score=scores[pair],
            likeness=likeness.get(pair),
            cka=similar.get(pair),
            decision=judge.pair(
                pair, scores[pair], unlike[pair], likeness.get(pair), assumed=bool(tokens[pair].assumed)
            ),
        )
        for pair in tokens
    )
    nearest = min(range(len(pairs)), key=lambda k: pairs[k].score.omega_bar)
    return Diagnosis(
        models=tuple(str(m) for m in parents.models),
        names=parents.names,
        base=None if base is None else str(base),
        parameters=judge.parameters,
        family=parents.models[0].anatomy.family + (" (guessed)" if parents.models[0].anatomy.guessed else ""),
        pairs=pairs,
        nearest=nearest,
        base_angles=_to_base(parents, found),
        not_finite=bad,
        skipped=parents.lacking,
        decision=pairs[0].decision if len(pairs) == 1 else judge.all(pairs),
        thresholds=limits,
        exact=exact,
        parts=parents.parts,
        facts=RecipeFacts(
            models=tuple(str(m) for m in parents.models),
            dtype=main_dtype(parents.models[0]),
            policy=any(_needs_policy(parents, p) for p in pairs),
            unmatched=bool(parents.lacking),
        ),
    )


def _needs_policy(parents: Parents, pair: Pair) -> bool:
    """Whether `merge` would refuse the pair's vocabularies without a policy."""
    rows = [parents.models[k].embedding_rows() for k in (pair.a, pair.b)]
    moved = pair.tokens.same_ids is not None and pair.tokens.same_ids < 1
    return rows[0] != rows[1] or moved or bool(pair.tokens.only_a or pair.tokens.only_b)


def _moved_most(parents: Parents, angles: Mapping[tuple[int, int], PairAngles], limits: Thresholds) -> str | None:
    """With a base: the model that has moved so much farther than the others that it counts as a specialist."""
    if parents.base is None:
        return None
    norms: dict[int, float] = {}
    for (i, j), found in angles.items():
        lengths = found.task_norms()
        if lengths is not None:
            norms[i], norms[j] = lengths
    return specialist_of([norms.get(k, math.nan) for k in range(len(parents.models))], parents.names, limits.specialist)


def _to_base(parents: Parents, found: Survey) -> tuple[float, ...]:
    """Each model's mean angle to the base, over the groups."""
    if parents.base is None:
        return ()
    unbased = Parents(parents.all, None, parents.all_names, parents.plan, parents.parts, {}, parents.inputs)
    return tuple(pair_angles(unbased, found, 0, k + 1).omega_bar for k in range(len(parents.models)))


class _Judge:
    """Makes the decisions of one diagnosis."""

    def __init__(self, parents: Parents, limits: Thresholds, special: str | None, bad: Sequence[NotFinite]) -> None:
        self.parents, self.limits, self.special, self.bad = parents, limits, special, bad
        first = parents.models[0]
        uncounted = first.anatomy.buffers | {a for a, s in first.anatomy.tied.items() if s in first.tensors}
        self.parameters = sum(prod(k.shape) for n, k in first.tensors.items() if n not in uncounted)
        config = first.config or {}
        self.residual = any(key in config for key in _RMS) and first.anatomy.depth.keys() == {""}
        self.templates = [has_chat(m) for m in parents.models]

    def pair(
        self,
        pair: tuple[int, int],
        score: Score,
        unlike: Sequence[Difference],
        likeness: float | None,
        *,
        assumed: bool,
    ) -> Decision:
        """The decision about two of the models."""
        names = tuple(self.parents.names[k] for k in pair)
        return decide(self._evidence(pair, names, score, unlike, likeness, assumed=assumed), self.limits)

    def all(self, pairs: Sequence[Pair]) -> Decision:
        """The decision about all models: of the mean score, the smallest overlap, and everything that any pair has."""
        worst = max(pairs, key=lambda p: p.score.omega_bar)
        mean = Score.of(
            min(p.score.overlap for p in pairs),
            math.fsum(p.score.similarity for p in pairs) / len(pairs),
            math.fsum(p.score.omega_bar for p in pairs) / len(pairs),
            self.limits,
        )
        known = [p.likeness for p in pairs if p.likeness is not None]
        said = ""
        if worst.score.omega_bar > max(2 * mean.omega_bar, self.limits.near_duplicate):
            a, b = self.parents.names[worst.a], self.parents.names[worst.b]
            said = f"{a} and {b} stand much farther apart ({worst.score.omega_bar:.3g} rad) than the others"
        everyone = tuple(range(len(self.parents.models)))
        unlike = [d for p in pairs for d in p.differences]
        assumed = any(p.tokens.assumed for p in pairs)
        evidence = self._evidence(
            everyone, self.parents.names, mean, unlike, min(known, default=None), said, assumed=assumed
        )
        return decide(evidence, self.limits)

    def _evidence(
        self,
        members: tuple[int, ...],
        names: tuple[str, ...],
        score: Score,
        unlike: Sequence[Difference],
        likeness: float | None,
        worst: str = "",
        *,
        assumed: bool,
    ) -> Evidence:
        chat = [self.templates[k] for k in members]
        with_chat = [i for i, template in enumerate(chat) if template is not None]
        blocking = tuple(dict.fromkeys(f"{d.what}: {d.advice}" for d in unlike if d.severity == "blocking"))
        return Evidence(
            score=score,
            parameters=self.parameters,
            models=names,
            not_finite=tuple(str(n) for n in self.bad if n.model in names or n.model == "the base"),
            blocking=blocking,
            same_family=not any(d.subject.rpartition(".")[2] in _FAMILY for d in unlike if d.severity != "note"),
            likeness=likeness,
            assumed=assumed,
            residual=self.residual,
            specialist=self.special if self.special in names else None,
            aligned=len(with_chat) == len(chat) and len(set(chat)) == 1,
            first=with_chat[0] if with_chat else 0,
            worst=worst,
        )
