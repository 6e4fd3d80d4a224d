"""What `paramend help` says of things that are no commands."""

SELECTORS = """\
A selector is text, matched against the whole path of a leaf. Quote it, so that the shell leaves it alone.

  layers.0.mlp.kernel        that leaf; . and / are the same separator
  *                          anything within one key: 'Dense_*', '*_proj'
  **                         any number of whole keys, also none: '**/bias'
  {kernel,bias}              either
  layers[-1]/**              positions, as in Python, among the numbered children: layers/0, layers/1 ...
  Dense_[:2]/*               the same among numbered siblings: Dense_0, Dense_1 ...
  layers/<n>/**              a number that is captured, for renames: to 'h/<n+1>/**'
  "a/b".c                    quotes: exactly this key; a backslash takes the next character as it is

A command takes several, and leaves out what --except matches. Each must match something.

  paramend show PATH 'layers[-1]/**' '**/bias' --except 'head/*'
"""

# Word → text.
TOPICS = dict.fromkeys(("selector", "selectors", "--except", "patterns", "paths"), SELECTORS)

# Command → words that users may look for it by. Those of the edits are in their table.
MEANT = {
    "show": "list ls inspect info stats open load print cat",
    "diff": "compare cmp",
    "delete": "rm remove drop prune",
    "rename": "mv move",
    "apply": "recipe recipes run patch edit",
    "convert": "save export cp copy",
    "graft": "init transfer",
    "stack": "stack_layers",
    "unstack": "unstack_layers",
    "deepen": "grow",
    "undo": "revert rollback restore",
    "history": "log record",
    "verify": "check verify_record",
    "lesson": "lessons learn tutorial",
    "help": "man",
}
