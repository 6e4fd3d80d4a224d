"""Codecs: how a quantised weight is made of the leaves of its group, and how leaves are made of a weight.

A row of `leaves.schemes` has a function that makes the codec of a group from its leaves by role ("payload", "scale",
"zero" ...) and from what a configuration says of it (`Stated`, from `anatomy.quantization.stated`). It raises
`SpecMismatch` where these disagree. A `Codec` holds parameters and no values: how each leaf lies over the weight
(`Field`), what codes stand for (`Codes`), what the values of codes are multiplied by (`Scaling`).

    weight_of(leaves, group, leaf_of, stated)   the weight that a group is: path, spec, codec, parts
    weight.origin(dtype)                        its values, an origin: `Decoded` in axes of the model
    encoded(codec, values, specs, parts)        role → origin of each leaf that changes, for new values; blocks whose
                                                values are what is there keep their bytes; keep=True keeps all scales
    rescaled(codec, parts, factor)              the same for a weight times a number; None if scales cannot take it
    layout_of(scheme, spec), codec_for(...)     which leaves a weight becomes that is not quantised yet, and their codec

All of them read piece by piece. What a leaf loses is the difference of `values` and of `decoded(codec, new parts)`.
"""
