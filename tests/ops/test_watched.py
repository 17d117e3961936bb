"""Every operator inside functorch's transforms, forward-mode AD, tracers, modes and other operators.

Each gives the numbers that it gives for eager PyTorch, whether a call bypasses the dispatcher or not.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from operators import PUBLIC
from samples import Make, Operator, of_tensors, tensors_of
from targets import INTERPRETED, Target
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import fpn_kernels
from fpn_kernels import reference
from fpn_kernels.operators import paths

Function = Callable[..., Tensor]


def _of_tensors(function: Callable[..., Any], op: Operator, arguments: Any) -> Function:
    """All results of the operator's first sample in one tensor, as a function of its tensors."""
    call = of_tensors(function, arguments, op.samples[0].options)
    return lambda *tensors: torch.cat([result.flatten() for result in call(*tensors)])


def _forward_ad(f: Function, values: Sequence[Tensor], tangents: Sequence[Tensor]) -> Any:
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(f(*map(forward_ad.make_dual, values, tangents)))
        assert result.tangent is not None
        return result.primal, result.tangent


def _forward_over_reverse(f: Function, values: Sequence[Tensor], tangents: Sequence[Tensor]) -> Any:
    leaves = [value.detach().requires_grad_() for value in values]
    with forward_ad.dual_level():
        grads = torch.autograd.grad(f(*map(forward_ad.make_dual, leaves, tangents)).square().sum(), leaves)
        return [forward_ad.unpack_dual(grad).tangent for grad in grads]


def _tangent_of_upstream(f: Function, values: Sequence[Tensor], tangents: Sequence[Tensor]) -> Any:
    """Only the upstream gradient has a tangent; the forward ran without one."""
    leaves = [value.detach().requires_grad_() for value in values]
    result = f(*leaves)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(result), result.detach())
        grads = torch.autograd.grad(result, leaves, upstream)
        return [forward_ad.unpack_dual(grad).tangent for grad in grads]


def _batched_grads(f: Function, values: Sequence[Tensor], tangents: Sequence[Tensor]) -> Any:
    leaves = [value.detach().requires_grad_() for value in values]
    result = f(*leaves)
    upstream = torch.stack([result.detach(), torch.ones_like(result)])
    return torch.autograd.grad(result, leaves, upstream, is_grads_batched=True)


def _vmap_of_some(f: Function, values: Sequence[Tensor], tangents: Sequence[Tensor]) -> Any:
    """The first tensor of a batch, the others of all."""
    return torch.func.vmap(f, (0, *(None for _ in values[1:])))(torch.stack([values[0], tangents[0]]), *values[1:])


def _stacked(values: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
    return [torch.stack(pair) for pair in zip(values, tangents, strict=True)]


def _all(values: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(values)))


def _squares(f: Function) -> Function:
    return lambda *values: f(*values).square().sum()


def _vjp(f: Function, values: Sequence[Tensor], tangents: Sequence[Tensor]) -> Any:
    result, pull = torch.func.vjp(f, *values)
    return pull(result)


def _linearize(f: Function, values: Sequence[Tensor], tangents: Sequence[Tensor]) -> Any:
    result, push = torch.func.linearize(f, *values)
    return result, push(*tangents)


def _through_jvp_of_grad(f: Function, values: Sequence[Tensor], tangents: Sequence[Tensor]) -> Any:
    return torch.func.jvp(torch.func.grad(_squares(f), _all(values)), tuple(values), tuple(tangents))


TRANSFORMS: dict[str, Callable[[Function, Sequence[Tensor], Sequence[Tensor]], Any]] = {
    "jvp": lambda f, values, tangents: torch.func.jvp(f, tuple(values), tuple(tangents)),
    "forward_ad": _forward_ad,
    "forward over reverse": _forward_over_reverse,
    "tangent of the upstream gradient": _tangent_of_upstream,
    "grad": lambda f, values, tangents: torch.func.grad(_squares(f), _all(values))(*values),
    "vjp": _vjp,
    "jacrev": lambda f, values, tangents: torch.func.jacrev(f, 1)(*values),
    "jacfwd": lambda f, values, tangents: torch.func.jacfwd(f, 1)(*values),
    "hessian": lambda f, values, tangents: torch.func.hessian(_squares(f), 0)(*values),
    "jvp of grad": _through_jvp_of_grad,
    "linearize": _linearize,
    "functionalize": lambda f, values, tangents: torch.func.functionalize(f)(*values),
    "vmap": lambda f, values, tangents: torch.func.vmap(f)(*_stacked(values, tangents)),
    "vmap of some": _vmap_of_some,
    "vmap of vmap": lambda f, values, tangents: torch.func.vmap(torch.func.vmap(f))(
        *(stacked[None] for stacked in _stacked(values, tangents))
    ),
    "vmap of grad": lambda f, values, tangents: torch.func.vmap(torch.func.grad(_squares(f), _all(values)))(
        *_stacked(values, tangents)
    ),
    "batched gradients": _batched_grads,
    "vectorized jacobian": lambda f, values, tangents: torch.autograd.functional.jacobian(
        f, tuple(values), vectorize=True
    ),
}


def _assert_close(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    bound = 1e-10 if dtype == torch.float64 else 1e-4
    leaves = torch.utils._pytree.tree_leaves
    assert len(leaves(actual)) == len(leaves(expected)) > 0
    for one, other in zip(leaves(actual), leaves(expected), strict=True):
        one, other = one.detach(), other.detach()
        assert one.shape == other.shape and one.dtype == other.dtype
        assert float((one - other).norm()) <= bound * float(other.norm()) + bound


@pytest.fixture(params=["python", "dispatcher"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of the calls: in Python, which bypasses the dispatcher for plain calls, or through the dispatcher."""
    if request.param == "dispatcher":
        monkeypatch.setattr(paths, "path_of", lambda *tensors: paths.DISPATCHED)
    chosen: str = request.param
    return chosen


def _cases() -> Iterator[Any]:
    """Each transform of one operator in turn, so that each operator meets three transforms; nightly, all pairs.

    Under the interpreter nightly alone: a transform decomposes the operators, and reaches Triton only in parts.
    """
    for number, (transform, (place, op)) in enumerate(itertools.product(TRANSFORMS, enumerate(PUBLIC))):
        first = number // len(PUBLIC) % len(PUBLIC) == place
        yield pytest.param(
            op, transform, id=f"{transform} of {op}", marks=() if first and not INTERPRETED else pytest.mark.nightly
        )


# torch.func.linearize builds a graph whose constants are no attributes, of eager's as well.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("op", "transform"), [*_cases()])
def test_a_transform_gives_what_it_gives_of_eager(op: Operator, transform: str, target: Target) -> None:
    dtype = target.dtypes()[-1] if target.backend != "triton" else torch.float32
    make = Make(dtype, target.device, tiny=True)
    arguments, others = (op.samples[0].arguments(make) for _ in range(2))
    values, tangents = tensors_of(arguments), tensors_of(others)
    expected = TRANSFORMS[transform](_of_tensors(op.eager, op, arguments), values, tangents)
    with fpn_kernels.use_backend(target.backend):
        actual = TRANSFORMS[transform](_of_tensors(op.call, op, arguments), values, tangents)
    _assert_close(actual, expected, dtype)


@pytest.mark.parametrize("transform", ["jacrev", "vmap of grad", "jvp"])
def test_a_transform_inside_a_compiler(transform: str) -> None:
    op = next(op for op in PUBLIC if op.name == ("upsample_add" if transform == "jvp" else "top_down_pathway"))
    arguments, others = (op.samples[0].arguments(Make(torch.float64, tiny=True)) for _ in range(2))
    values, tangents = tensors_of(arguments), tensors_of(others)

    def computed(function: Any) -> Callable[..., Any]:
        return lambda *values: TRANSFORMS[transform](_of_tensors(function, op, arguments), values, tangents)

    torch.compiler.reset()
    actual = torch.compile(computed(op.call), backend="aot_eager", fullgraph=True)(*values)
    _assert_close(actual, computed(op.eager)(*values), torch.float64)


class _Model(nn.Module):
    """All public calls, on parameters."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.library = library
        shapes = {"weight": (3, 4, 1, 1), "bias": (3,), "taps": (3, 3, 3, 3), "factors": (2,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.rand(shape, dtype=torch.float64)))

    def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, ...]:
        of = self.library
        top = of.lateral_connection(coarse, self.weight, self.bias)
        merged = of.lateral_connection(fine, self.weight, None, top)
        pathway = of.top_down_pathway([fine, coarse], [self.weight, self.weight], [self.bias, None], mode="bilinear")
        weighted = of.weighted_merge([merged, top], self.factors)
        return (
            of.upsample_add(top, merged),
            pathway[0],
            pathway[1],
            weighted,
            of.output_conv(merged, self.taps, self.bias),
        )


def _models() -> tuple[_Model, _Model]:
    ours, eager = _Model(fpn_kernels), _Model(reference)
    eager.load_state_dict(ours.state_dict())
    return ours, eager


def _maps(dtype: torch.dtype = torch.float64, scale: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, 9 * scale, 11, dtype=dtype), torch.randn(2, 4, 5, 6 * scale, dtype=dtype)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_traces_what_it_traces_of_eager() -> None:
    """Any size later, with gradients, without this library, and no warning of a tracer's."""
    ours, eager = _models()
    traced = torch.jit.trace(ours, _maps())
    assert not [node for node in traced.inlined_graph.nodes() if node.kind().startswith("fpn_kernels::")]
    maps = _maps(scale=3)
    _assert_close(traced(*maps), eager(*maps), torch.float64)
    sum(each.sum() for each in traced(*maps)).backward()
    sum(each.sum() for each in eager(*maps)).backward()
    gradients = [[parameter.grad for parameter in model.parameters()] for model in (ours, eager)]
    _assert_close(*gradients, torch.float64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_torchscript_exporter_to_onnx() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    ours, eager = (model.float() for model in _models())
    dynamic = {name: {0: "n", 2: f"{name}_h", 3: f"{name}_w"} for name in ("fine", "coarse")}
    file = io.BytesIO()
    torch.onnx.export(ours, _maps(torch.float32), file, dynamo=False, input_names=list(dynamic), dynamic_axes=dynamic)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for scale in (1, 3):
        maps = _maps(torch.float32, scale)
        results = session.run(None, {name: value.numpy() for name, value in zip(dynamic, maps, strict=True)})
        _assert_close([torch.from_numpy(result) for result in results], list(eager(*maps)), torch.float32)


def test_fx_traces_the_public_calls() -> None:
    ours, eager = _models()
    traced = torch.fx.symbolic_trace(ours)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert fpn_kernels.upsample_add in called and fpn_kernels.output_conv in called
    _assert_close(traced(*_maps_of_seed()), eager(*_maps_of_seed()), torch.float64)


def _maps_of_seed() -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    return _maps()


def test_make_fx_records_what_can_be_run() -> None:
    ours, eager = _models()
    graph = make_fx(ours)(*_maps())
    _assert_close(graph(*_maps_of_seed()), eager(*_maps_of_seed()), torch.float64)


def test_a_mode_is_given_the_public_calls() -> None:
    seen: list[Any] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    ours, eager = _models()
    maps = _maps()
    with Mode():
        results = ours(*maps)
    public = ("upsample_add", "lateral_connection", "top_down_pathway", "weighted_merge", "output_conv")
    assert {getattr(fpn_kernels, name) for name in public} <= set(seen)
    _assert_close(results, eager(*maps), torch.float64)


def test_inside_another_operator_nothing_is_recorded(path: str) -> None:
    ours, eager = _models()

    def recorded(model: nn.Module) -> list[bool]:
        name = f"fpn_kernels_test::neck_of_{model.library.__name__.rpartition('.')[2]}_{path}"

        @torch.library.custom_op(name, mutates_args=())
        def neck(fine: Tensor, coarse: Tensor) -> list[Tensor]:
            results = model(fine, coarse)
            inside.extend(result.requires_grad for result in results)
            return [result.detach() for result in results]

        inside: list[bool] = []
        neck(*_maps())
        return inside

    assert recorded(ours) == recorded(eager) == [False] * 5


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("op", PUBLIC, ids=str)
def test_a_backward_runs_as_its_forward_did(op: Operator, target: Target) -> None:
    """Upstream gradients of 1e5 overflow float16: a backward under autocast stays in float32."""
    arguments = op.samples[0].arguments(Make(torch.float32, target.device, tiny=True))
    values = [value.requires_grad_() for value in tensors_of(arguments)]
    with fpn_kernels.use_backend(target.backend):
        result = _of_tensors(op.call, op, arguments)(*values)
        upstream = 1e5 * torch.randn_like(result)
        expected = torch.autograd.grad(result, values, upstream, retain_graph=True)
        with torch.autocast(target.device, torch.float16):
            actual = torch.autograd.grad(result, values, upstream)
    assert all(map(torch.equal, actual, expected))


def test_autocast_is_registered_wherever_it_casts_a_convolution() -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    for key in torch._C.DispatchKey.__members__:
        if key.startswith("Autocast"):
            casts = registered("aten::conv2d", key)
            assert registered("fpn_kernels::lateral_connection", key) == casts
            assert registered("fpn_kernels::upsample_add", key) == casts


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter keeps one grid for the whole process")
@pytest.mark.usefixtures("path")
def test_threads_that_share_a_graph(target: Target) -> None:
    op = next(op for op in PUBLIC if op.name == "top_down_pathway")
    arguments = op.samples[0].arguments(Make(torch.float32, target.device))
    values = [value.requires_grad_() for value in tensors_of(arguments)]
    with fpn_kernels.use_backend(target.backend):
        total = _of_tensors(op.call, op, arguments)(*values).sum()
        expected = torch.autograd.grad(total, values, retain_graph=True)

        def work(_: int) -> list[bool]:
            same: list[bool] = []
            for _ in range(20):
                grads = torch.autograd.grad(total, values, retain_graph=True)
                same.append(all(map(torch.equal, grads, expected)))
            return same

        with ThreadPoolExecutor(4) as pool:
            assert all(itertools.chain(*pool.map(work, range(4))))


# The compiler's own: advice on functions that remember their result, and a look at every tensor's gradient.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_autograd() -> None:
    gradients: list[list[Tensor | None]] = []
    torch.compiler.reset()
    ours, eager = _models()
    # Of torch 2.13, it cannot compile eager's bilinear resize.
    compiled = torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager"))
    for model, how in ((eager, contextlib.nullcontext()), (ours, compiled)):
        total = sum(result.sum() for result in model(*_maps_of_seed()))
        with how:
            total.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    _assert_close(*gradients, torch.float64)
