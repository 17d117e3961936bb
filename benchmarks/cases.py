"""The rows of a run: shapes of real models, crossed with dtype, layout, batch and provider."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

FORWARD = "forward"
TRAINING = "forward+backward"

# The names of the providers. A forced backend is "fpn_kernels/<backend>".
EAGER = "eager"
COMPILE = "torch.compile"
MAX_AUTOTUNE = "torch.compile max-autotune"
LIBRARY = "fpn_kernels"


@dataclass(frozen=True)
class Image:
    """The backbone maps C2..C5 of one image, and the width of the pyramid."""

    name: str
    sizes: tuple[tuple[int, int], ...]
    channels: tuple[int, ...] = (256, 512, 1024, 2048)
    out_channels: int = 256

    def level(self, number: int) -> tuple[int, int, int]:
        """Channels, height and width of C<number>."""
        return (self.channels[number - 2], *self.sizes[number - 2])


# 800 x 1280 halves evenly; in 600 x 900 the ratio of two levels is not 2. D0 and D4 are EfficientDet's, with the width
# of their BiFPN.
EVEN = Image("800x1280", ((200, 320), (100, 160), (50, 80), (25, 40)))
ODD = Image("600x900", ((150, 225), (75, 113), (38, 57), (19, 29)))
D0 = Image("D0 512x512", ((128, 128), (64, 64), (32, 32), (16, 16)), out_channels=64)
D4 = Image("D4 1024x1024", ((256, 256), (128, 128), (64, 64), (32, 32)), out_channels=224)
TINY = Image("60x90", ((15, 23), (8, 12), (4, 6), (2, 3)), channels=(8, 16, 32, 64), out_channels=8)


@dataclass(frozen=True)
class Spot:
    """One place in a network: image, level (None: all of them), upsampling mode, node of a BiFPN."""

    image: Image
    level: int | None = None
    mode: str = "nearest"
    node: str | None = None

    def __str__(self) -> str:
        parts = [self.image.name, f"C{self.level}" if self.level else "C2..C5"]
        parts += [] if self.mode == "nearest" else [self.mode]
        return " ".join(parts if self.node is None else [*parts, self.node])


@dataclass(frozen=True)
class Case:
    """Operator, direction, spot, and how the tensors are stored.

    `dtype` "amp-bf16" or "amp-fp16" is autocast: 16-bit maps, float32 parameters.
    """

    operator: str
    direction: str
    spot: Spot
    batch: int
    dtype: str
    layout: str

    def __str__(self) -> str:
        return f"{self.spot} b{self.batch} {self.dtype} {self.layout}"

    def described(self) -> dict[str, object]:
        """The case as a record holds it."""
        names = ("operator", "direction", "batch", "dtype", "layout")
        return {**{name: getattr(self, name) for name in names}, "case": str(self), "level": self.spot.level}


# A map and the coarser one; three maps of one size.
TOP_DOWN, BOTTOM_UP = NODES = ("top-down", "bottom-up")

Grid = Mapping[tuple[str, str], tuple[Spot, ...]]

QUICK: Grid = {
    ("lateral_connection", FORWARD): (Spot(EVEN, 2), Spot(EVEN, 4), Spot(ODD, 3)),
    ("lateral_connection", TRAINING): (Spot(EVEN, 3),),
    ("neck", FORWARD): (Spot(EVEN),),
    ("neck", TRAINING): (Spot(ODD),),
    ("output_conv", FORWARD): (Spot(EVEN, 3), Spot(ODD, 3)),
    ("output_conv", TRAINING): (Spot(EVEN, 4),),
    ("upsample_add", FORWARD): (Spot(EVEN, 2), Spot(ODD, 2)),
    ("upsample_add", TRAINING): (Spot(EVEN, 2),),
    ("weighted_merge", FORWARD): (*(Spot(D0, 3, node=node) for node in NODES), Spot(EVEN, 3, node=TOP_DOWN)),
    ("weighted_merge", TRAINING): tuple(Spot(D0, 3, node=node) for node in NODES),
}

_LEVELS = tuple(Spot(image, level) for image in (EVEN, ODD) for level in (2, 3, 4, 5))
_SPOTS = {
    "lateral_connection": _LEVELS,
    "neck": (Spot(EVEN), Spot(ODD)),
    "output_conv": _LEVELS,
    # The coarsest level has no top.
    "upsample_add": (*(s for s in _LEVELS if s.level != 5), Spot(EVEN, 2, "bilinear"), Spot(ODD, 2, "bilinear")),
    "weighted_merge": (
        *(Spot(image, level, node=n) for image, level in ((D0, 3), (D4, 3), (EVEN, 2), (ODD, 3)) for n in NODES),
        Spot(EVEN, 3, "bilinear", TOP_DOWN),
    ),
}
FULL: Grid = {(name, direction): spots for name, spots in _SPOTS.items() for direction in (FORWARD, TRAINING)}
SMALLEST: Grid = {key: tuple(dict.fromkeys(replace(s, image=TINY) for s in spots)) for key, spots in QUICK.items()}
PRESETS: Mapping[str, Grid] = {"quick": QUICK, "full": FULL, "tiny": SMALLEST}

# The parts of a GPU run: operators with direction and level, where None is all levels; then dtypes and layouts.
Place = tuple[str, str, "int | None"]
_NECK: tuple[Place, ...] = (("neck", FORWARD, None), ("neck", TRAINING, None))
_ALL: tuple[Place, ...] = (
    ("lateral_connection", FORWARD, 2),
    ("top_down_pathway", FORWARD, None),
    *_NECK,
    ("weighted_merge", FORWARD, 3),
    ("weighted_merge", TRAINING, 3),
    ("lateral_connection", FORWARD, None),
    ("lateral_connection", TRAINING, 2),
    ("output_conv", FORWARD, 2),
    ("output_conv", FORWARD, None),
    ("upsample_add", FORWARD, 2),
    ("upsample_add", FORWARD, None),
    ("upsample_add", TRAINING, 2),
)
_MISSED = (("bf16", "NHWC"), ("bf16", "NCHW"))
_OTHERS = (("fp16", "NHWC"), ("fp32", "NHWC"), ("fp32", "NCHW"), ("fp16", "NCHW"))
_USERS = (("fp32", "NCHW"), ("amp-fp16", "NCHW"), ("amp-bf16", "NCHW"), ("bf16", "NHWC"))
# For max-autotune, which takes minutes: the rows that have a target against it, the cheap ones first.
_ORDER = ("upsample_add", "lateral_connection", "top_down_pathway", "output_conv", "neck")
_TUNED = tuple(p for name in _ORDER for p in _ALL if p[0] == name and (p[1] == FORWARD or name == "neck"))
PARTS: Mapping[str, tuple[tuple[Place, ...], tuple[tuple[str, str], ...], tuple[int, ...]]] = {
    "users": (_NECK, _USERS, (2, 8)),
    "missed": (_ALL, _MISSED, (1, 8)),
    "others": (_ALL, _OTHERS, (1, 8)),
    "tuned": (_TUNED, _MISSED[:1], (1, 8)),
}


@dataclass(frozen=True)
class Selection:
    """The rows of a run.

    Attributes:
        name: one of `PRESETS` or `PARTS`.
        device_type: "cpu" or "cuda".
        backends: those that this machine has.
        compiler: whether torch.compile works here.
        tiny: the rows of a part, on maps of a few pixels.
        dtypes, layouts, batches: in place of those of a preset.
    """

    name: str
    device_type: str
    backends: tuple[str, ...] = ()
    compiler: bool = True
    tiny: bool = False
    dtypes: tuple[str, ...] | None = None
    layouts: tuple[str, ...] | None = None
    batches: tuple[int, ...] | None = None

    def rows(self) -> Iterator[tuple[Case, str]]:
        """Cases and providers, in the order in which they are measured."""
        if self.name in PARTS:
            yield from self._part()
        elif self.name in PRESETS:
            yield from ((case, provider) for case in self._preset() for provider in self._providers(case))

    def ceilings(self) -> Iterator[tuple[str, str, str]]:
        """Kind, dtype and moment; before and after the rows of a preset, of which the report takes the best."""
        if self.name not in ("ceilings", *PRESETS):
            return
        for moment in ("before", "after") if self.name in PRESETS else ("once",):
            yield "copy", "fp32", moment
            for dtype in (
                self._dtypes() if self.name in PRESETS else ("bf16",) if self.tiny else ("bf16", "fp16", "fp32")
            ):
                yield "matrix product", dtype, moment
                yield "3x3 convolution", dtype, moment

    def _dtypes(self) -> tuple[str, ...]:
        # Few CPUs multiply float16: without such instructions a product ran at 2 GFLOP/s.
        wide = self.name == "full" and self.device_type == "cuda"
        default = ("fp32",) if self.name == "tiny" else ("fp32", "bf16", "fp16") if wide else ("fp32", "bf16")
        return self.dtypes or default

    def _batches(self) -> tuple[int, ...]:
        return self.batches or ((1, 8) if self.device_type == "cuda" and self.name != "tiny" else (1,))

    def _preset(self) -> Iterator[Case]:
        layouts = self.layouts or (("NCHW",) if self.name == "tiny" else ("NCHW", "NHWC"))
        for (operator, direction), spots in PRESETS[self.name].items():
            for spot in spots:
                for batch in self._batches():
                    for dtype in self._dtypes():
                        for layout in layouts:
                            yield Case(operator, direction, spot, batch, dtype, layout)

    def _providers(self, case: Case) -> Iterator[str]:
        """The baseline first; the providers of a case run back to back, in the same minute of the machine."""
        full = self.name == "full"
        yield EAGER
        # A compilation takes seconds: all rows of a narrowed run have one, else one layout of the even image.
        narrowed = self.dtypes is not None and self.layouts is not None
        plain = case.spot.image is EVEN and case.layout == "NHWC" and case.batch == min(self._batches())
        if full or (self.name == "quick" and (narrowed or plain)):
            yield COMPILE
        if full and self.device_type == "cuda":
            yield MAX_AUTOTUNE
        yield LIBRARY
        forced = self.forced()
        if len(forced) > 1 or (forced and full):
            yield from (*forced, f"{LIBRARY}/{EAGER}") if full else forced

    def forced(self) -> list[str]:
        """The library with a backend named; Triton on CUDA only, never its interpreter."""
        real = [name for name in self.backends if name != EAGER]
        return [f"{LIBRARY}/{name}" for name in real if name != "triton" or self.device_type == "cuda"]

    def _part(self) -> Iterator[tuple[Case, str]]:
        """The library everywhere first, then each backend by itself, then torch.compile."""
        places, formats, batches = PARTS[self.name]
        formats, batches = (formats[-1:], (1,)) if self.tiny else (formats, batches)
        found = [_case(p, batch, *f, self.tiny) for f in formats for batch in batches for p in places]
        compiled = found[:1] if self.tiny else found
        if self.name != "tuned":
            yield from ((case, LIBRARY) for case in found)
            if self.name != "users" and len(self.forced()) > 1:
                yield from ((case, provider) for case in found for provider in self.forced())
        if self.compiler:
            yield from ((case, MAX_AUTOTUNE if self.name == "tuned" else COMPILE) for case in compiled)


def _case(place: Place, batch: int, dtype: str, layout: str, tiny: bool) -> Case:
    operator, direction, level = place
    node = TOP_DOWN if operator == "weighted_merge" else None
    return Case(operator, direction, Spot(TINY if tiny else EVEN, level, node=node), batch, dtype, layout)


def launches(tiny: bool, backends: Sequence[str]) -> list[tuple[Case, str]]:
    """Cases that launch every kernel of the backends, at the sizes of a GPU run or on maps of a few pixels."""
    training = ("upsample_add", "lateral_connection", "weighted_merge")
    places = {(name, TRAINING if name in training else FORWARD, level) for name, _, level in _ALL if name != "neck"}
    return [
        (_case(place, batch, *form, tiny), f"{LIBRARY}/{backend}")
        for backend in backends
        for form in ((_MISSED[0], _OTHERS[2]) if tiny else (*_MISSED, *_OTHERS))
        for batch in ((1,) if tiny else (1, 2, 8))
        for place in sorted(places, key=str)
        # The Triton kernel of the 3x3 reads NHWC maps.
        if (place[0], form[1], backend) != ("output_conv", "NCHW", "triton")
    ]
