"""Vocabularies: which row of which parent's embedding becomes which row of the output's, and the tokenizer that fits.

`vocabulary` reads a model's tokenizer, `compare` says how two differ, `policy` turns a recipe's tokenizer policy into
row maps, `write` makes the output's tokenizer files, `chat` finds the chat template. Nothing here reads weights.
"""
