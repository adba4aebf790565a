"""The shapes of a sliced model: plain data, and modules of those shapes.

A *shape record* is written into the model's configuration::

    {"modules":    {name: {"in_features": int, "out_features": int, "bias": bool, "pad": None
                           or {"side": "in" | "out", "blocks": n, "width": w, "padded": p}
                           or {"side": "in" | "out", "positions": [place, ...], "size": n}}},
     "parameters": {name: {parameter: [size, ...]}},
     "attributes": {name: {attribute: int}},
     "rotary":     {name: [positions of cos/sin that are left]}}

``shape_modules`` gives a freshly built model on any device, ``meta`` included, the maps of a record, and
``shape_attention`` the rest of it once weights have been loaded.
"""

from __future__ import annotations
