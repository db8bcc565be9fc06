"""Mixtures of experts from dense models: ``gm.moe(config, out)``.

`spec` reads the configuration (mergekit-moe's YAML), `families` knows what each output architecture is called and what it can
hold, `router` makes the gates, `build` makes a plan of copies that the engine carries out.
"""

from geomerge.verbs import call_as

call_as(__name__, "build")
