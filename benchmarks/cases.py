"""What is measured: shapes of real models, crossed with dtype, layout and batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

FORWARD = "forward"
TRAINING = "forward+backward"

# Who computes: the providers' names, here because they can be read without importing torch.
EAGER = "eager"
COMPILE = "torch.compile"
MAX_AUTOTUNE = "torch.compile max-autotune"
LIBRARY = "fpn_kernels"
# With operators that the library keeps from its users until they are measured: the chained pathway.
CHAINED = "fpn_kernels/chained"


@dataclass(frozen=True)
class Image:
    """The backbone maps C2..C5 that a ResNet makes of one image, and the width of the pyramid."""

    name: str
    sizes: tuple[tuple[int, int], ...]
    channels: tuple[int, ...] = (256, 512, 1024, 2048)
    out_channels: int = 256

    def level(self, number: int) -> tuple[int, int, int]:
        """Channels, height and width of C<number>."""
        return (self.channels[number - 2], *self.sizes[number - 2])


# 800 x 1280 halves evenly; 600 x 900 is the odd case, where the ratio of two levels is not 2.
EVEN = Image("800x1280", ((200, 320), (100, 160), (50, 80), (25, 40)))
ODD = Image("600x900", ((150, 225), (75, 113), (38, 57), (19, 29)))
# Two of EfficientDet's: C2 and C3 of its images, at the width of its BiFPN.
D0 = Image("D0 512x512", ((128, 128), (64, 64), (32, 32), (16, 16)), out_channels=64)
D4 = Image("D4 1024x1024", ((256, 256), (128, 128), (64, 64), (32, 32)), out_channels=224)
TINY = Image("60x90", ((15, 23), (8, 12), (4, 6), (2, 3)), channels=(8, 16, 32, 64), out_channels=8)


@dataclass(frozen=True)
class Spot:
    """One place in the network: an image, a level of it (None: the whole neck), an upsampling mode, a BiFPN's node."""

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
    """One line of the report: an operator, a direction, a spot, and how its tensors are stored."""

    operator: str
    direction: str
    spot: Spot
    batch: int
    dtype: str
    layout: str

    def __str__(self) -> str:
        return f"{self.spot} b{self.batch} {self.dtype} {self.layout}"


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

# The coarsest level has nothing above it: no upsample_add there, and a lateral_connection without top.
_MERGES = tuple(Spot(image, level) for image in (EVEN, ODD) for level in (2, 3, 4))
_BILINEAR = (Spot(EVEN, 2, "bilinear"), Spot(ODD, 2, "bilinear"))
_NODES = (
    *(Spot(image, level, node=node) for image, level in ((D0, 3), (D4, 3), (EVEN, 2), (ODD, 3)) for node in NODES),
    Spot(EVEN, 3, "bilinear", TOP_DOWN),
)
_LEVELS = tuple(Spot(image, level) for image in (EVEN, ODD) for level in (2, 3, 4, 5))

FULL: Grid = {
    ("lateral_connection", FORWARD): _LEVELS,
    ("lateral_connection", TRAINING): _LEVELS,
    ("neck", FORWARD): (Spot(EVEN), Spot(ODD)),
    ("neck", TRAINING): (Spot(EVEN), Spot(ODD)),
    ("output_conv", FORWARD): _LEVELS,
    ("output_conv", TRAINING): _LEVELS,
    ("upsample_add", FORWARD): _MERGES + _BILINEAR,
    ("upsample_add", TRAINING): _MERGES + _BILINEAR,
    ("weighted_merge", FORWARD): _NODES,
    ("weighted_merge", TRAINING): _NODES,
}

SMALLEST: Grid = {
    ("lateral_connection", FORWARD): (Spot(TINY, 2), Spot(TINY, 5)),
    ("lateral_connection", TRAINING): (Spot(TINY, 3),),
    ("neck", FORWARD): (Spot(TINY),),
    ("neck", TRAINING): (Spot(TINY),),
    ("output_conv", FORWARD): (Spot(TINY, 2),),
    ("output_conv", TRAINING): (Spot(TINY, 3),),
    ("upsample_add", FORWARD): (Spot(TINY, 2), Spot(TINY, 2, "bilinear")),
    ("upsample_add", TRAINING): (Spot(TINY, 2),),
    ("weighted_merge", FORWARD): tuple(Spot(TINY, 2, node=node) for node in NODES),
    ("weighted_merge", TRAINING): tuple(Spot(TINY, 2, node=node) for node in NODES),
}


@dataclass(frozen=True)
class Selection:
    """What one run measures: a grid of spots and the values each is crossed with."""

    grid: Grid
    dtypes: tuple[str, ...]
    layouts: tuple[str, ...]
    batches: tuple[int, ...]
    compiled: Callable[[Case], bool]  # whether torch.compile is among the providers of a case

    def cases(self, operator: str) -> Iterator[Case]:
        for (name, direction), spots in self.grid.items():
            if name != operator:
                continue
            for spot in spots:
                for batch in self.batches:
                    for dtype in self.dtypes:
                        for layout in self.layouts:
                            yield Case(name, direction, spot, batch, dtype, layout)


def select(
    preset: str,
    device_type: str,
    dtypes: tuple[str, ...] | None = None,
    layouts: tuple[str, ...] | None = None,
    batches: tuple[int, ...] | None = None,
) -> Selection:
    """The selection of a preset ("quick", "full" or "tiny"), with whatever was asked for by name put in."""
    on_gpu = device_type == "cuda"
    sizes = batches or ((1, 8) if on_gpu else (1,))
    if preset == "full":
        # Few CPUs multiply float16: a product ran at about 2 GFLOP/s on one that does not. It can be asked for by name.
        every = ("fp32", "bf16", "fp16") if on_gpu else ("fp32", "bf16")
        return Selection(FULL, dtypes or every, layouts or ("NCHW", "NHWC"), sizes, compiled=lambda _: True)
    if preset == "tiny":
        return Selection(SMALLEST, dtypes or ("fp32",), layouts or ("NCHW",), batches or (1,), compiled=lambda _: False)
    narrowed = dtypes is not None and layouts is not None

    def compiled(case: Case) -> bool:
        # A compilation costs seconds of CPU: one layout of the even image has one, or all of a run narrowed by hand.
        return narrowed or (case.spot.image is EVEN and case.layout == "NHWC" and case.batch == min(sizes))

    return Selection(QUICK, dtypes or ("fp32", "bf16"), layouts or ("NCHW", "NHWC"), sizes, compiled)
