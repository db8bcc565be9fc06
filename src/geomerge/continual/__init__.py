"""Continual merging: experts arrive one after the other, and what is kept of them does not grow.

The state of such a merge is a model directory that remembers (`state.State`): beside the merged model it holds a running
sum of task vectors and a few counters. A step (`step.continue_merge`) reads the base, the new expert and the sum, and replaces
the state by the next one; time and memory are those of one step, however many went before.
"""

from geomerge.continual.rules import RULES, Rule
from geomerge.continual.state import State
from geomerge.continual.step import Step, continue_merge

__all__ = ["RULES", "Rule", "State", "Step", "continue_merge"]
