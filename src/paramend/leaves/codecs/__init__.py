"""Codecs: how a quantised weight is made of the leaves of its group, and how leaves are made of a weight.

A row of `leaves.schemes` has a codec: a function of the leaves by role ("payload", "scale", "zero", ...) and of what a
configuration says (`Stated`), which raises `SpecMismatch` where they disagree. A `Codec` is parameters alone: how each
leaf lies over the weight (`Field`), what codes stand for (`Codes`), what values are multiplied by (`Scaling`).

`leaves.weights` puts it together: for each group of a tree or a checkpoint the name, the spec and the origin of its
weight. `Decoded` is the origin of the values, `Encoded` that of each leaf for new values.
"""
