"""``geomerge schema``: the recipe's JSON schema, for editors."""

from __future__ import annotations


def schema() -> None:
    """Print the JSON schema of recipes, for editors.

    For example with the YAML language server: `geomerge schema > geomerge.schema.json`, and as the recipe's first line
    `# yaml-language-server: $schema=geomerge.schema.json`.
    """
    from geomerge.cli.console import write_json
    from geomerge.recipe import json_schema

    write_json(json_schema())
