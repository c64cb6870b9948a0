"""The tensors of one layer in an adapter file, and the change of a weight that they make.

A tensor's name is the layer's (`names.py`) and an ending, which says what part it has in the change. Every format's
endings are in `PARTS`.

O output channels, I input channels, kh×kw kernel of a convolution, R rank
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ldm.patches.low_rank import Change, Decomposed, Difference, Factors, Hadamard, Kronecker, LowRank

Shape = tuple[int, ...]

PARTS = {  # ending -> part
    "lora_up.weight": "up", "lora_down.weight": "down", "lora_mid.weight": "core",  # kohya, LyCORIS
    "lora_B.weight": "up", "lora_A.weight": "down",  # peft, diffusers
    "lora.up.weight": "up", "lora.down.weight": "down",  # diffusers until 0.25
    "lora_linear_layer.up.weight": "up", "lora_linear_layer.down.weight": "down",
    "lora_embedding_B": "embedding_up", "lora_embedding_A": "embedding_down",
    "alpha": "alpha",
    "dora_scale": "norms", "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
    **{f"hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": "diff", "w_norm": "diff",
    "diff_b": "bias", "b_norm": "bias",
}  # fmt: skip


@dataclass(frozen=True)
class Scaling:
    """The scale of changes, as a configuration states it; where the file holds an alpha, the file's is used."""

    alpha: float | None = None  # None: the rank
    alphas: Mapping[str, float] = field(default_factory=dict)  # by layer, as regular expressions
    rank: int | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    root: bool = False  # divide by √rank (Kalajdzievski 2023, arXiv 2312.03732)

    def of(self, layer: str, alpha: float | None, rank: int | None) -> float:
        """The scale of a layer with the rank of its tensors, and the alpha in the file."""
        rank = rank or matching(self.ranks, layer, self.rank)
        if alpha is None:
            alpha = matching(self.alphas, layer, self.alpha)
        if alpha is None or not rank:
            return 1.0
        return alpha / (math.sqrt(rank) if self.root else rank)


def matching(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The value of the first pattern that the end of a layer's name matches, as in peft."""
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{key})", layer)), default)


def split(name: str) -> tuple[str, str]:
    """The name of a tensor as its layer's name and its part; the part is "" if the ending is not known."""
    pieces = name.split(".")
    for count in (3, 2, 1):
        if part := PARTS.get(".".join(pieces[-count:])):
            return ".".join(pieces[:-count]), part
    return name, ""


# --- forms of a change ------------------------------------------------------------------------------------------------

Shapes = Mapping[str, Shape]  # by part
Tensors = Mapping[str, Tensor]
BESIDE = {"alpha", "norms", "magnitude", "bias"}  # parts that any form may have


@dataclass(frozen=True)
class Form:
    """One way to store a change of a weight."""

    kind: str
    needed: Callable[[Collection[str]], set[str]]  # the parts that it must have, from those that there are
    optional: frozenset[str]
    size: Callable[[Shapes], Shape | None]  # rows and columns of the change; None if the parts do not fit each other
    rank: Callable[[Shapes], int | None]
    make: Callable[[Tensors, float], Change]


def _product(a: Shape, b: Shape, core: Shape | None) -> Shape | None:
    """Rows and columns of `Factors` of these shapes."""
    if core is None:
        return (a[0], math.prod(b[1:])) if math.prod(a[1:]) == b[0] else None
    return (a[1], b[1] * math.prod(core[2:])) if (a[0], b[0]) == core[:2] else None


def _lora_size(shapes: Shapes) -> Shape | None:
    up, down, core = shapes["up"], shapes["down"], shapes.get("core")
    return _product(up, down, None) if core is None else _product(up[1::-1], down[:2], core)


def _loha_size(shapes: Shapes) -> Shape | None:
    first, second = (_product(shapes[f"hada_w{n}_a"], shapes[f"hada_w{n}_b"], shapes.get(f"hada_t{n}")) for n in (1, 2))
    return first if first == second else None


def _factors(tensors: Tensors, name: str, core: str) -> Factors:
    return Factors(tensors[f"{name}_a"], tensors[f"{name}_b"], tensors.get(core))


def _lokr_needed(there: Collection[str]) -> set[str]:
    return {part for n in (1, 2) for part in ([f"lokr_w{n}"] if f"lokr_w{n}" in there else _halves(n))}


def _halves(number: int) -> list[str]:
    return [f"lokr_w{number}_a", f"lokr_w{number}_b"]


def _lokr_size(shapes: Shapes) -> Shape | None:
    sizes = []
    for n in (1, 2):
        whole = shapes.get(f"lokr_w{n}")
        a, b = (shapes.get(part) for part in _halves(n))
        size = (whole[0], math.prod(whole[1:])) if whole else _product(a, b, shapes.get(f"lokr_t{n}"))  # type: ignore[arg-type]
        if size is None:
            return None
        sizes.append(size)
    return sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1]


def _lokr_rank(shapes: Shapes) -> int | None:
    return next((shapes[part][0] for part in ("lokr_w2_b", "lokr_w1_b") if part in shapes), None)


def _lokr(tensors: Tensors, scale: float) -> Change:
    first, second = (
        tensors[f"lokr_w{n}"] if f"lokr_w{n}" in tensors else _factors(tensors, f"lokr_w{n}", f"lokr_t{n}")
        for n in (1, 2)
    )
    return Kronecker(first, second, scale)


FORMS = [
    Form(
        "LoRA",
        lambda there: {"up", "down"},
        frozenset({"core"}),
        _lora_size,
        lambda shapes: shapes["down"][0],
        lambda t, scale: LowRank(t["up"], t["down"], scale, t.get("core")),
    ),
    Form(  # of an embedding, whose weight is transposed
        "LoRA",
        lambda there: {"embedding_up", "embedding_down"},
        frozenset(),
        lambda shapes: _product(shapes["embedding_down"][::-1], shapes["embedding_up"][::-1], None),
        lambda shapes: shapes["embedding_down"][0],
        lambda t, scale: LowRank(t["embedding_down"].T, t["embedding_up"].T, scale),
    ),
    Form(
        "LoHa",
        lambda there: {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
        frozenset({"hada_t1", "hada_t2"}),
        _loha_size,
        lambda shapes: shapes["hada_w1_b"][0],
        lambda t, scale: Hadamard(_factors(t, "hada_w1", "hada_t1"), _factors(t, "hada_w2", "hada_t2"), scale),
    ),
    Form("LoKr", _lokr_needed, frozenset({"lokr_t2"}), _lokr_size, _lokr_rank, _lokr),
    Form(
        "difference",
        lambda there: {"diff"},
        frozenset(),
        lambda shapes: (shapes["diff"][0], math.prod(shapes["diff"][1:])),
        lambda shapes: None,
        lambda t, scale: Difference(t["diff"]),
    ),
]


def form_of(parts: Collection[str]) -> Form | None:
    """The form that parts have or, if some are missing, begin; None if they are of no form or of several.

    Parts that any form may have (a bias) need no form.
    """
    own = set(parts) - BESIDE
    return next((form for form in FORMS if own and own <= form.needed(own) | form.optional), None)


# --- a layer ----------------------------------------------------------------------------------------------------------


def missing(parts: Collection[str]) -> set[str]:
    """The parts that are needed for a change and are not there."""
    form = form_of(parts)
    if form is None:
        return {"up", "down"} if set(parts) - {"bias"} else set()
    return form.needed(parts) - set(parts)


def fits(shapes: Shapes, weight: Shape) -> bool:
    """Whether complete parts of these shapes make a change of a weight of that shape."""
    if any(len(shape) < (1 if part in {"diff", *BESIDE} else 2) for part, shape in shapes.items() if part != "alpha"):
        return False
    rows, columns = weight[0], math.prod(weight[1:])
    form = form_of(shapes)
    norms = shapes.get("norms", (rows,))
    return (
        (form is None or form.size(shapes) == (rows, columns))
        and math.prod(shapes.get("bias", (rows,))) == rows
        and math.prod(shapes.get("magnitude", (rows,))) == rows
        and math.prod(shapes.get("alpha", ())) == 1
        and (
            math.prod(norms) == rows == norms[0] or (norms[0] == 1 and norms[1:2] == (math.prod(norms),) == weight[1:2])
        )
    )


def kind_of(parts: Collection[str]) -> str:
    """The kind of change: "LoRA", "LoHa", "LoKr" or "difference"; "DoRA", "LoHa (DoRA)" … with learned norms."""
    form = form_of(parts)
    kind = form.kind if form else "difference"
    if not {"norms", "magnitude"} & set(parts):
        return kind
    return "DoRA" if kind == "LoRA" else f"{kind} (DoRA)"


def changes_of(tensors: Tensors, layer: str, weight: Shape, scaling: Scaling) -> dict[str, Change]:
    """The changes of a layer's parameters by name, from all of its tensors."""
    changes: dict[str, Change] = {}
    if form := form_of(tensors):
        shapes = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
        alpha = float(tensors["alpha"]) if "alpha" in tensors else None
        change = form.make(tensors, scaling.of(layer, alpha, form.rank(shapes)))
        norms = tensors.get("magnitude", tensors.get("norms"))
        if norms is not None:
            per_input = "norms" in tensors and norms.shape[0] == 1 and weight[0] != 1
            sides = [1, -1] if per_input else [-1, 1]
            change = Decomposed(change, norms.reshape(*sides, *(1 for _ in weight[2:])))
        changes[f"{layer}.weight"] = change
    if "bias" in tensors:
        changes[f"{layer}.bias"] = Difference(tensors["bias"])
    return changes
